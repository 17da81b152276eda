import json
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from inference.volume import read_labels, read_volume
from train.phantom import Disease, Recipe, write_dataset
from train.phantom.body import Body
from train.phantom.cohort import (
    LABELLED,
    TEST,
    UNLABELLED,
    VALIDATION,
    Order,
    Orientation,
    Split,
    affine,
    draw_findings,
    field_of_view,
    make,
    slice_increment,
    slice_thickness,
    view_name,
)

COARSE = (12.0, 8.0, 8.0)


def order(split: Split, number: int, recipe: Recipe) -> Order:
    return Order(Path("nowhere"), split, number, split.offset + number, recipe)


def test_labelled_cases_have_disease_of_the_pancreas_and_no_artefacts_unless_all_is_asked_for() -> None:
    plain = [draw_findings(order(LABELLED, k, Recipe())) for k in range(1, 200)]
    assert {o for f in plain for o in (*f.disease.lesions, *f.disease.cysts)} == {"pancreas"}
    assert not any(f.heavy for f in plain)
    every = [draw_findings(order(LABELLED, k, Recipe(disease="all"))) for k in range(1, 400)]
    assert {o for f in every for o in f.disease.lesions} == set(Disease.CAN_HAVE)
    assert 0.05 < np.mean([bool(f.heavy) for f in every]) < 0.2


@pytest.mark.parametrize("split", [UNLABELLED, VALIDATION, TEST])
def test_the_other_splits_have_disease_of_liver_kidney_and_spleen(split: Split) -> None:
    found = [draw_findings(order(split, k, Recipe())).disease for k in range(1, 200)]
    assert {"liver", "left_kidney", "right_kidney", "spleen"} <= {o for d in found for o in d.lesions}


def test_every_tenth_test_case_has_a_heavy_artefact() -> None:
    found = {k: draw_findings(order(TEST, k, Recipe())) for k in range(1, 101)}
    assert [k for k, f in found.items() if f.heavy] == list(range(10, 101, 10))
    assert all("spine" in f.disease.implants for f in found.values() if f.heavy == "metal")


def test_pixel_gives_the_slices_that_scanners_have() -> None:
    grids = [field_of_view(seed, None, 1.5) for seed in range(200)]
    assert all(g.spacing[1:] == (1.5, 1.5) for g in grids)
    increments = np.array([g.spacing[0] for g in grids])
    assert increments.min() <= 1.25
    assert increments.max() >= 5
    assert all(g.spacing[0] >= 2 for g in grids if g.shape[0] * g.spacing[0] > 405)
    ratio = np.array([slice_thickness(seed, slice_increment(seed)) / slice_increment(seed) for seed in range(400)])
    assert 0.2 < np.mean(ratio > 1) < 0.45  # reconstructed with overlap
    assert 0.02 < np.mean(ratio < 1) < 0.12
    assert all(0.6 <= slice_thickness(seed, slice_increment(seed)) <= 8 for seed in range(400))


def test_views_go_from_slabs_to_the_whole_trunk() -> None:
    seeds = range(600)
    names = [view_name(seed) for seed in seeds]
    grids = [field_of_view(seed, COARSE) for seed in seeds]
    assert set(names) >= {"abdomen", "slab", "liver's top cut", "upper abdomen", "thorax, abdomen and pelvis"}
    for seed, name, grid in zip(seeds, names, grids, strict=True):
        low, high = grid.coordinates(0)[[0, -1]]
        if name == "slab":
            assert 10 < high - low < 155  # between the middles of slices 12 mm apart
        if name == "liver's top cut":
            assert high < Body.draw(seed).dome_right
        if name == "thorax, abdomen and pelvis":
            assert high - low > 420
    heights = [g.shape[0] * 12 for g, n in zip(grids, names, strict=True) if n == "slab"]
    assert sum(60 <= height <= 150 for height in heights) > 0.15 * len(names)
    assert sum(height < 60 for height in heights) > 0.08 * len(names)
    slabs = [g.coordinates(0) for g, n in zip(grids, names, strict=True) if n == "slab"]
    assert min(z[-1] for z in slabs) < -120  # below every organ
    assert max(z[0] for z in slabs) > 60
    narrow = [g.shape[2] * g.spacing[2] < 2 * Body.draw(s).half_width for s, g in zip(seeds, grids, strict=True)]
    assert 0.03 < np.mean(narrow) < 0.2
    wide = [g.shape[2] * g.spacing[2] > 2.7 * Body.draw(s).half_width for s, g in zip(seeds, grids, strict=True)]
    assert 0.04 < np.mean(wide) < 0.2


def test_native_scans_are_a_third_and_their_organs_are_as_grey_as_each_other() -> None:
    from train.phantom.appearance import draw_look
    from train.phantom.body import stream
    from train.phantom.tissue import T

    looks = [draw_look(stream(seed, "appearance"), Disease(), {}) for seed in range(600)]
    native = [x for x in looks if x.phase.name == "native"]
    assert 0.25 < len(native) / len(looks) < 0.35
    organs = [T.SPLEEN, T.RIGHT_CORTEX, T.BOWEL_WALL, T.AORTA]
    spread = [np.ptp(x.hu[organs]) for x in native]
    assert 8 < float(np.median(spread)) < 25
    enhanced = [np.ptp(x.hu[organs]) for x in looks if x.phase.name != "native"]
    assert np.median(enhanced) > 60


def test_mixed_orientations_hold_the_same_scan(tmp_path: Path) -> None:
    recipe = Recipe(spacing=COARSE, orientations="mixed")
    write_dataset(tmp_path, 5, 0, 0, seed=9, recipe=recipe)
    codes = set()
    for k in range(1, 6):
        case = Order(tmp_path, LABELLED, k, 90_000_000 + k, recipe)
        phantom, paths = make(case), case.paths()
        codes.add(nib.orientations.aff2axcodes(nib.load(paths["image"]).affine))
        scan = read_volume(paths["image"])
        assert np.array_equal(scan.voxels, phantom.hu)
        assert np.array_equal(read_labels(paths["labels"]).voxels, phantom.labels)
        if not Orientation.draw(case.seed).turned:
            assert np.allclose(scan.affine, affine(phantom.spacing, case.seed, phantom.hu.shape), atol=1e-4)
        record = json.loads(paths["record"].read_text())
        assert record["orientation"] == Orientation.draw(case.seed).record()
    assert len(codes) > 2


def test_some_mixed_orientations_are_oblique_and_some_are_not() -> None:
    turned = [Orientation.draw(seed).turned for seed in range(200)]
    assert 0.2 < np.mean(np.array(turned) != 0) < 0.45


def test_a_record_says_how_its_case_was_made(tmp_path: Path) -> None:
    recipe = Recipe(spacing=COARSE)
    write_dataset(tmp_path, 1, 1, 1, validation=1, seed=2, recipe=recipe)
    assert (tmp_path / "imagesVal" / "FLARE22_Val_0001_0000.nii.gz").is_file()
    assert (tmp_path / "labelsVal" / "FLARE22_Val_0001.nii.gz").is_file()
    cases = json.loads((tmp_path / "phantoms.json").read_text())["cases"]
    assert [c["split"] for c in cases] == ["labelled", "unlabelled", "validation", "test"]
    for case in cases:
        assert {"view", "heavy_artefact", "recipe", "scanner", "artefacts", "disease", "tissues"} <= set(case)
    with pytest.raises(ValueError, match="choose an empty folder"):
        write_dataset(tmp_path, 1, 1, 1, validation=1, seed=2, recipe=replace(recipe, disease="all"))


def test_recipes_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="give one of the two"):
        Recipe(spacing=COARSE, pixel=1.0)
    with pytest.raises(ValueError, match="must lie between"):
        Recipe(pixel=40)
    with pytest.raises(ValueError, match="none of pancreas, all"):
        Recipe(disease="liver")
