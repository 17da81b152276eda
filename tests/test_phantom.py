import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter1d, label

from inference.organs import ORGANS
from inference.postprocess import Context, remove_displaced, return_gallbladder_to_liver
from inference.volume import read_labels, read_volume
from train.phantom import AUXILIARY, Disease, Grid, Phantom, Recipe, add_arguments, generate, run, write_dataset
from train.phantom.appearance import _through_plane
from train.phantom.canvas import Ellipsoid, Tube
from train.phantom.cohort import field_of_view
from train.phantom.volumes import LIMITS

ID = {organ.name: organ.id for organ in ORGANS}
ABDOMEN = Grid.covering((-140, -140, -180), (170, 140, 180), (5, 3, 3))
SEEDS = (11, 12, 13)


@pytest.fixture(scope="module")
def phantoms() -> list[Phantom]:
    return [generate(seed, ABDOMEN) for seed in SEEDS]


def centre(phantom: Phantom, organ: str) -> np.ndarray:
    return np.argwhere(phantom.labels == ID[organ]).mean(0) * phantom.spacing


def test_the_same_seed_gives_the_same_bytes(phantoms: list[Phantom]) -> None:
    again = generate(SEEDS[0], ABDOMEN)
    assert again.hu.tobytes() == phantoms[0].hu.tobytes()
    assert again.labels.tobytes() == phantoms[0].labels.tobytes()
    assert again.auxiliary.tobytes() == phantoms[0].auxiliary.tobytes()
    assert json.dumps(again.record) == json.dumps(phantoms[0].record)


def test_another_seed_is_another_body(phantoms: list[Phantom]) -> None:
    assert (phantoms[0].labels != phantoms[1].labels).mean() > 0.02


def test_the_same_seed_on_a_finer_grid_is_the_same_body(phantoms: list[Phantom]) -> None:
    fine = generate(SEEDS[0], Grid.covering((-140, -140, -180), (170, 140, 180), (2.5, 3, 2)))
    for name, coarse in phantoms[0].record["organs"].items():
        tolerance = 0.25 if "adrenal" in name else 0.05
        assert fine.record["organs"][name]["ml"] == pytest.approx(coarse["ml"], rel=tolerance), name
        assert np.abs(centre(fine, name) - centre(phantoms[0], name)).max() < 3, name


def test_a_slab_is_cut_out_of_the_same_body(phantoms: list[Phantom]) -> None:
    z, y, x = ABDOMEN.origin
    slab = generate(SEEDS[1], Grid((6, *ABDOMEN.shape[1:]), ABDOMEN.spacing, (z + 40 * 5, y, x)))
    assert (slab.labels != phantoms[1].labels[40:46]).mean() < 1e-3


def test_scan_and_maps_have_the_right_types_and_values(phantoms: list[Phantom]) -> None:
    for p in phantoms:
        assert p.hu.dtype == np.int16
        assert p.labels.dtype == p.auxiliary.dtype == np.uint8
        assert p.hu.shape == p.labels.shape == p.auxiliary.shape == ABDOMEN.shape
        assert p.hu.min() >= -1024
        assert p.hu.max() <= 3071
        assert np.array_equal(p.auxiliary[p.labels > 0], p.labels[p.labels > 0])
        assert set(np.unique(p.auxiliary)) == {0, *ID.values(), *AUXILIARY.values()}
        assert np.median(p.hu[p.auxiliary == 0]) == pytest.approx(-1000, abs=25)


def test_every_organ_is_there_with_an_adult_volume(phantoms: list[Phantom]) -> None:
    for p in phantoms:
        for name, (low, high) in LIMITS.items():
            assert low <= p.record["organs"][name]["ml"] <= high, (p.record["seed"], name)


def test_organs_lie_where_they_belong(phantoms: list[Phantom]) -> None:
    z, y, x = 0, 1, 2
    for p in phantoms:
        c = {name: centre(p, name) for name in ID}
        middle = ABDOMEN.shape[2] * 3 / 2
        assert c["liver"][x] < middle < c["spleen"][x]
        assert c["right_kidney"][x] < c["inferior_vena_cava"][x] < c["aorta"][x] < c["left_kidney"][x]
        assert c["right_adrenal_gland"][z] > c["right_kidney"][z] + 20
        assert c["left_adrenal_gland"][z] > c["left_kidney"][z] + 20
        assert c["right_adrenal_gland"][x] < c["aorta"][x] < c["left_adrenal_gland"][x]
        assert c["stomach"][y] < c["spleen"][y]
        assert c["esophagus"][z] > c["stomach"][z]
        assert c["duodenum"][x] < c["pancreas"][x]
        spine = np.argwhere(p.auxiliary == AUXILIARY["bone"])[:, y].mean() * 3
        assert c["aorta"][y] < spine


def test_neighbours_touch(phantoms: list[Phantom]) -> None:
    pairs = (("gallbladder", "liver"), ("esophagus", "stomach"), ("stomach", "duodenum"), ("pancreas", "duodenum"))
    for p in phantoms:
        for one, other in pairs:
            where = p.labels == ID[one]
            near = where.copy()
            for axis in range(3):
                for step in (-2, -1, 1, 2):
                    near |= np.roll(where, step, axis)
            assert (near & (p.labels == ID[other])).any(), (p.record["seed"], one, other)


def test_organs_are_never_air_except_for_the_hollow_ones(phantoms: list[Phantom]) -> None:
    for p in phantoms:
        for name in ("liver", "spleen", "right_kidney", "left_kidney", "pancreas", "aorta"):
            assert np.median(p.hu[p.labels == ID[name]]) > -30, name


def test_disease_switches_change_what_they_name() -> None:
    plain = generate(21, ABDOMEN)
    ill = generate(
        21, ABDOMEN, Disease(("liver",), ("right_kidney",), ("gallbladder", "left_kidney"), enlarged_spleen=True)
    )
    before, after = plain.record["organs"], ill.record["organs"]
    assert after["gallbladder"]["ml"] == after["left_kidney"]["ml"] == 0
    assert after["spleen"]["ml"] > 1.3 * before["spleen"]["ml"]
    assert after["aorta"]["ml"] == pytest.approx(before["aorta"]["ml"], rel=0.05)
    kinds = {(x["organ"], x["kind"]) for x in ill.record["lesions"]}
    assert kinds - {("liver", "necrosis")} == {("liver", "tumour"), ("right_kidney", "cyst")}
    assert ill.record["disease"]["enlarged_spleen"] is True


def test_a_disease_of_an_unknown_organ_is_refused() -> None:
    with pytest.raises(ValueError, match="aorta is none of"):
        Disease(lesions=("aorta",))


def test_fields_of_view_are_those_of_scanners() -> None:
    grids = [field_of_view(seed, None) for seed in range(40)]
    lengths = [g.shape[0] * g.spacing[0] for g in grids]
    assert all(g.shape[1:] == (512, 512) and 0.4 < g.spacing[1] < 0.98 and 2 <= g.spacing[0] <= 5 for g in grids)
    assert min(lengths) < 130
    assert max(lengths) > 420


def test_a_tube_takes_the_volume_it_is_asked_for() -> None:
    tube = Tube(np.array([(0.0, 0, -50), (0, 0, 50)]), [8, 12]).of_volume(60)
    z, y, x = np.meshgrid(*[np.arange(-80, 80, 1.5, dtype=np.float32)] * 3, indexing="ij")
    assert (tube.distance((x, y, z)) < 0).sum() * 1.5**3 / 1000 == pytest.approx(60, rel=0.03)


def test_an_ellipsoid_reaches_its_bounds_when_turned() -> None:
    shape = Ellipsoid((5, -3, 2), (10, 20, 30), (0.3, -0.4, 0.8))
    z, y, x = np.meshgrid(*[np.arange(-40, 40, 1.0, dtype=np.float32)] * 3, indexing="ij")
    inside = np.argwhere(shape.distance((x, y, z)) < 0)[:, ::-1] - 40
    low, high = shape.bounds()
    assert np.abs(inside.min(0) - low).max() < 1.5
    assert np.abs(inside.max(0) - high).max() < 1.5


@pytest.mark.parametrize(("factor", "sigma"), [(1, 0.1), (1, 0.36), (1, 3.6), (3, 1.08)])
def test_a_slices_profile_is_that_of_a_gaussian_filter(factor: int, sigma: float) -> None:
    r = np.random.default_rng(1)
    tissue, hu = r.integers(0, 256, (9, 6, 5), dtype=np.uint8), r.normal(0, 300, 256).astype(np.float32)
    whole = hu[tissue]
    if sigma > 0.2:
        whole = gaussian_filter1d(whole, sigma, axis=0, truncate=2.2, output=np.float32, mode="nearest")
    expected = whole[factor // 2 :: factor]
    assert np.allclose(_through_plane(hu, tissue, factor, sigma), expected, rtol=0, atol=1e-3)


def test_a_data_set_has_the_layout_of_flare22_and_is_resumed(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"seed": 3, "recipe": Recipe(spacing=(12.0, 8.0, 8.0), auxiliary=True)}
    write_dataset(tmp_path, 2, 1, 1, **settings)
    files = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file())
    assert files == [
        "auxiliaryTr/FLARE22_Tr_0001.nii.gz",
        "auxiliaryTr/FLARE22_Tr_0002.nii.gz",
        "imagesTr/FLARE22_Tr_0001_0000.nii.gz",
        "imagesTr/FLARE22_Tr_0002_0000.nii.gz",
        "imagesTs/FLARE22_Ts_0001_0000.nii.gz",
        "labelsTr/FLARE22_Tr_0001.nii.gz",
        "labelsTr/FLARE22_Tr_0002.nii.gz",
        "labelsTs/FLARE22_Ts_0001.nii.gz",
        "phantoms.json",
        "records/Case_00001.json",
        "records/FLARE22_Tr_0001.json",
        "records/FLARE22_Tr_0002.json",
        "records/FLARE22_Ts_0001.json",
        "unlabeled/Case_00001_0000.nii.gz",
    ]
    cases = json.loads((tmp_path / "phantoms.json").read_text())["cases"]
    assert [c["split"] for c in cases] == ["labelled", "labelled", "unlabelled", "test"]
    image = read_volume(tmp_path / "imagesTr/FLARE22_Tr_0001_0000.nii.gz")
    labels = read_labels(tmp_path / "labelsTr/FLARE22_Tr_0001.nii.gz")
    assert image.voxels.shape == labels.voxels.shape == tuple(cases[0]["shape"])
    assert np.allclose(image.spacing, (12, 8, 8))
    assert np.array_equal(image.affine, labels.affine)

    (tmp_path / "imagesTr/FLARE22_Tr_0002_0000.nii.gz").unlink()
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.nii.gz")}
    write_dataset(tmp_path, 2, 1, 1, **settings)
    changed = {p.name for p, t in before.items() if p.stat().st_mtime_ns != t}
    assert changed == {"FLARE22_Tr_0002.nii.gz"}
    assert (tmp_path / "imagesTr/FLARE22_Tr_0002_0000.nii.gz").is_file()

    with pytest.raises(ValueError, match="choose an empty folder"):
        write_dataset(tmp_path, 2, 1, 1, seed=4, recipe=settings["recipe"])


def test_the_command_refuses_nonsense_with_exit_code_1(tmp_path: Path) -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    assert run(parser.parse_args([str(tmp_path / "a"), "--labelled", "-1"])) == 1
    assert run(parser.parse_args([str(tmp_path / "a"), "--spacing", "0", "1", "1"])) == 1
    assert run(parser.parse_args([str(tmp_path / "a"), "--pixel", "40"])) == 1
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("seed", [100, 103, 108])
def test_no_gallbladder_lies_where_the_fourth_rule_would_give_it_to_the_liver(seed: int) -> None:
    """A ring of liver around it in any slice would; anatomy keeps its fossa open."""
    body = generate(seed, Grid((40, 150, 200), (5.0, 2.0, 2.0), (-90.0, -150.0, -200.0)))
    ids = {organ.name: organ.id for organ in ORGANS}
    assert (body.labels == ids["gallbladder"]).any()
    assert (return_gallbladder_to_liver(body.labels, Context(ids, {}, (5.0, 2.0, 2.0))) == body.labels).all()


@pytest.mark.parametrize("seed", [100, 103, 108])
def test_no_part_of_an_organ_in_a_slab_lies_where_the_rule_for_far_pieces_would_drop_it(seed: int) -> None:
    """Slabs cut a duodenum in two, and part it from what it lies by."""
    spacing = (5.0, 2.0, 2.0)
    body = generate(seed, Grid((40, 150, 200), spacing, (-90.0, -150.0, -200.0)))
    ids = {organ.name: organ.id for organ in ORGANS}
    parted = 0
    for first in range(0, 40, 4):
        slab = body.labels[first : first + 8]
        parted += label(slab == ids["duodenum"], np.ones((3, 3, 3)))[1] > 1
        assert (remove_displaced(slab, Context(ids, {}, spacing)) == slab).all()
    assert parted
