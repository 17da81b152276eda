from typing import Any

import numpy as np
import pytest

from inference.organs import ORGANS
from train.phantom import AUXILIARY, Disease, Grid, Phantom, generate
from train.phantom.disease import draw_disease
from train.phantom.volumes import LIMITS

ID = {organ.name: organ.id for organ in ORGANS}
SEED = 31
TRUNK = Grid.covering((-330, -130, -190), (190, 140, 190), (6, 3, 3))
ABDOMEN = Grid.covering((-140, -140, -180), (170, 140, 180), (5, 2.5, 2.5))


def made(grid: Grid = ABDOMEN, seed: int = SEED, **switches: Any) -> Phantom:
    return generate(seed, grid, Disease(**switches))


def volume(phantom: Phantom, organ: str) -> float:
    return float(phantom.record["organs"][organ]["ml"])


def at(phantom: Phantom, organ: str) -> np.ndarray:
    return np.asarray(np.argwhere(phantom.labels == ID[organ]).mean(0) * phantom.spacing)


@pytest.fixture(scope="module")
def healthy() -> Phantom:
    return made()


@pytest.fixture(scope="module")
def healthy_trunk() -> Phantom:
    return made(TRUNK)


def changed(ill: Phantom, well: Phantom, least: float) -> np.ndarray:
    """Voxels that the disease changed by more than ``least`` HU (the noise is the same in both)."""
    return np.abs(ill.hu.astype(int) - well.hu) > least


@pytest.mark.parametrize("organ", Disease.CAN_HAVE)
@pytest.mark.parametrize("kind", ["lesions", "cysts"])
def test_a_lesion_is_recorded_seen_and_counts_as_its_organ(organ: str, kind: str, healthy: Phantom) -> None:
    ill = made(**{kind: (organ,)})
    assert ill.record["disease"][kind] == (organ,)
    recorded = [x for x in ill.record["lesions"] if x["organ"] == organ]
    assert {x["kind"] for x in recorded} - {"necrosis"} == {"tumour" if kind == "lesions" else "cyst"}
    assert sum(x["ml"] for x in recorded) > 0.05
    # the organ has not lost a voxel to it: what differs is inside the label
    lost = (healthy.labels == ID[organ]) & (ill.labels != ID[organ])
    assert not lost.any()
    assert volume(ill, organ) >= volume(healthy, organ)
    assert changed(ill, healthy, 8)[ill.labels == ID[organ]].any()


def test_stones_lie_in_the_gallbladder_and_are_denser_than_bile(healthy: Phantom) -> None:
    ill = made(gallstones=True)
    gallbladder = ill.labels == ID["gallbladder"]
    assert np.array_equal(gallbladder, healthy.labels == ID["gallbladder"])
    assert (ill.hu.astype(int) - healthy.hu)[gallbladder].max() > 30
    assert [(x["organ"], x["kind"]) for x in ill.record["lesions"]] == [("gallbladder", "stone")]


def test_hydronephrosis_is_urine_and_background(healthy: Phantom) -> None:
    ill = made(hydronephrosis=("left_kidney",))
    assert ill.record["disease"]["hydronephrosis"] == ("left_kidney",)
    assert ill.record["tissues"]["urine"] > healthy.record["tissues"]["urine"] + 8
    assert volume(ill, "left_kidney") < volume(healthy, "left_kidney") - 3
    assert volume(ill, "right_kidney") == volume(healthy, "right_kidney")
    gone = (healthy.labels == ID["left_kidney"]) & (ill.labels != ID["left_kidney"])
    assert set(np.unique(ill.labels[gone])) == {0}


def test_a_horseshoe_kidney_is_one_piece_of_two_labels() -> None:
    from scipy.ndimage import label

    ill, well = made(horseshoe_kidney=True), made()
    both = np.isin(ill.labels, (ID["left_kidney"], ID["right_kidney"]))
    parts, _ = label(both)
    sizes = np.bincount(parts.ravel())[1:]
    assert sizes.max() > 0.97 * sizes.sum()
    apart, _ = label(np.isin(well.labels, (ID["left_kidney"], ID["right_kidney"])))
    assert np.sort(np.bincount(apart.ravel())[1:])[-2] > 0.3 * apart.astype(bool).sum()
    assert at(ill, "right_kidney")[2] < at(ill, "inferior_vena_cava")[2] < at(ill, "left_kidney")[2]
    assert ill.record["disease"]["horseshoe_kidney"] is True


@pytest.mark.parametrize("organ", ["spleen", "left_kidney", "right_kidney", "gallbladder"])
def test_a_resected_organ_leaves_clips_and_its_neighbours_move_in(organ: str, healthy: Phantom) -> None:
    ill = made(resected=(organ,))
    assert volume(ill, organ) == 0
    assert ill.record["disease"]["resected"] == (organ,)
    assert 0 < ill.record["tissues"]["metal"] < 4
    assert healthy.record["tissues"]["metal"] == 0
    bed = healthy.labels == ID[organ]
    if organ == "gallbladder":
        return
    inside_fat = np.mean(ill.auxiliary[bed] == AUXILIARY["fat"])
    others = np.mean((ill.auxiliary[bed] != AUXILIARY["fat"]) & (ill.auxiliary[bed] != 0))
    assert inside_fat < 1
    assert others > 0.1


def test_a_missing_organ_leaves_no_clips() -> None:
    ill = made(missing=("left_kidney",))
    assert volume(ill, "left_kidney") == 0
    assert ill.record["tissues"]["metal"] == 0


def test_ascites_is_background_of_water_around_liver_spleen_and_in_the_pelvis(healthy_trunk: Phantom) -> None:
    small, large = made(TRUNK, ascites=6.0), made(TRUNK, ascites=22.0)
    assert healthy_trunk.record["tissues"]["ascites"] == 0
    assert 100 < small.record["tissues"]["ascites"] < large.record["tissues"]["ascites"] < 6000
    water = changed(large, healthy_trunk, 70) & (large.labels == 0) & (large.hu > -60) & (large.hu < 90)
    z = TRUNK.coordinates(0)
    assert water[z < -215].any()
    near_liver = water & (np.arange(TRUNK.shape[2]) < TRUNK.shape[2] / 2) & (z > 0)[:, None, None]
    near_spleen = water & (np.arange(TRUNK.shape[2]) > TRUNK.shape[2] / 2) & (z > 20)[:, None, None]
    assert near_liver.any()
    assert near_spleen.any()
    for organ in ("liver", "spleen"):
        assert 0.6 * volume(healthy_trunk, organ) < volume(large, organ) <= volume(healthy_trunk, organ)
    for organ in ("aorta", "pancreas", "left_kidney", "right_kidney"):
        assert volume(large, organ) == volume(healthy_trunk, organ), organ


def test_an_effusion_fills_the_back_of_one_chest(healthy_trunk: Phantom) -> None:
    ill = made(TRUNK, effusion=("left",))
    assert ill.record["tissues"]["effusion"] > 20
    filled = changed(ill, healthy_trunk, 400)
    assert np.argwhere(filled)[:, 2].min() > 0.45 * TRUNK.shape[2]
    assert not ill.labels[filled].any()
    assert np.array_equal(ill.labels, healthy_trunk.labels)


def test_an_aortic_stent_and_its_thrombus_are_aorta() -> None:
    stented = [made(seed=seed, stents=("aortic",)) for seed in (31, 32, 33, 34)]
    for ill in stented:
        well = made(seed=ill.record["seed"])
        assert {x["kind"] for x in ill.record["lesions"]} == {"stent", "thrombus"}
        assert not ((well.labels == ID["aorta"]) & (ill.labels != ID["aorta"])).any()
    assert max(x["ml"] for ill in stented for x in ill.record["lesions"] if x["kind"] == "thrombus") > 2


def test_a_biliary_stent_is_background(healthy: Phantom) -> None:
    ill = made(stents=("biliary",))
    seen = changed(ill, healthy, 60)
    assert seen.any()
    assert (healthy.labels == ID["pancreas"]).sum() >= (ill.labels == ID["pancreas"]).sum()
    assert np.mean(ill.labels[seen] == 0) > 0.5


@pytest.mark.parametrize("implant", ["spine", "hip"])
def test_implants_are_metal_and_streak(implant: str, healthy_trunk: Phantom) -> None:
    ill = made(TRUNK, implants=(implant,))
    assert healthy_trunk.record["artefacts"]["streaked_slices"] == 0
    assert ill.record["artefacts"]["streaked_slices"] >= 2
    assert (ill.hu > 2500).sum() > (healthy_trunk.hu > 2500).sum() + 10
    assert np.array_equal(ill.labels, healthy_trunk.labels)
    away = changed(ill, healthy_trunk, 25) & (ill.hu < 300)
    assert away.sum() > 200


@pytest.mark.parametrize("seed", [400, 404, 409])
def test_an_enlarged_spleen_is_larger_than_any_healthy_one(seed: int) -> None:
    large, usual = (volume(made(seed=seed, enlarged_spleen=switch), "spleen") for switch in (True, False))
    assert large > LIMITS["spleen"][1] > usual


@pytest.mark.parametrize(
    ("switches", "message"),
    [
        ({"lesions": ("aorta",)}, "aorta is none of"),
        ({"hydronephrosis": ("spleen",)}, "spleen is none of"),
        ({"stents": ("iliac",)}, "iliac is none of"),
        ({"ascites": 40.0}, "not between 0 and 30"),
        ({"missing": ("spleen",), "enlarged_spleen": True}, "absent organ: spleen"),
        ({"missing": ("spleen",), "resected": ("spleen",)}, "missing already"),
        ({"resected": ("left_kidney",), "horseshoe_kidney": True}, "absent organ: left_kidney"),
    ],
)
def test_a_disease_that_cannot_be_is_refused(switches: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Disease(**switches)


def test_labelled_cases_have_disease_of_the_pancreas_only() -> None:
    drawn = [draw_disease(seed, every=False) for seed in range(200)]
    assert {o for d in drawn for o in (*d.lesions, *d.cysts)} == {"pancreas"}
    for d in drawn:
        others = (d.enlarged_spleen, d.fatty_liver, d.resected, d.hydronephrosis, d.horseshoe_kidney, d.gallstones)
        assert not any((*others, d.ascites, d.effusion, d.implants))


def test_the_other_cases_have_every_disease_and_every_switch_comes() -> None:
    drawn = [draw_disease(seed, every=True) for seed in range(1500)]
    assert {o for d in drawn for o in d.lesions} == {o for d in drawn for o in d.cysts} == set(Disease.CAN_HAVE)
    assert {o for d in drawn for o in d.resected} == {o for d in drawn for o in d.missing} == set(Disease.CAN_MISS)
    for switch in vars(Disease()):
        assert any(getattr(d, switch) for d in drawn), switch
    assert 0.2 < np.mean([d == Disease() for d in drawn]) < 0.4
    assert not any({"left_kidney", "right_kidney"} <= set(d.absent) for d in drawn)
