"""Kidneys, adrenal glands, crura of the diaphragm and the spleen's lobe, as axial slices show them."""

from functools import cache

import numpy as np
import pytest
from scipy.ndimage import distance_transform_edt
from scipy.spatial import ConvexHull

from inference.organs import ORGANS
from train.phantom import Grid, Phantom, generate
from train.phantom.census import SPACING, healthy_labels, outside, volumes
from train.phantom.tissue import AUXILIARY

ID = {organ.name: organ.id for organ in ORGANS}
SEEDS = (400, 401, 402, 403)
USUAL = (401, 403, 404, 405)  # whose right kidney has not come down
PIXEL = 2.0  # mm
GRID = Grid.covering((-80, -110, -130), (110, 130, 130), (4.0, PIXEL, PIXEL))


@cache
def body(seed: int) -> Phantom:
    return generate(seed, GRID)


def hollow(plane: np.ndarray) -> float:
    """Share of the convex hull of an organ in a slice that the organ does not fill."""
    corners = np.argwhere(plane)[:, None] + np.array([(-0.5, -0.5), (-0.5, 0.5), (0.5, -0.5), (0.5, 0.5)])
    return 1 - float(plane.sum()) / float(ConvexHull(corners.reshape(-1, 2)).volume)


def hollows(seed: int, name: str) -> list[float]:
    """Of every slice of a kidney from pole to pole."""
    return [hollow(plane) for plane in body(seed).labels == ID[name] if plane.sum() > 20]


def test_a_kidney_is_open_at_its_hilum_and_full_at_its_poles() -> None:
    kidneys = [hollows(seed, name) for seed in SEEDS for name in ("right_kidney", "left_kidney")]
    assert np.median([max(found) for found in kidneys]) > 0.22
    for found in kidneys:
        assert max(found[1 : len(found) // 6 + 1]) < 0.15
        assert max(found[-len(found) // 6 : -1]) < 0.15


def beside_liver(seed: int) -> float:
    """Share of the right adrenal gland's rows in slices that have liver within 8 mm to the right."""
    labels = body(seed).labels
    rows = liver = 0
    for plane in labels[(labels == ID["right_adrenal_gland"]).any((1, 2))]:
        for line in plane:
            columns = np.flatnonzero(line == ID["right_adrenal_gland"])
            if columns.size:
                rows += 1
                liver += bool((line[max(columns[0] - int(8 / PIXEL), 0) : columns[0]] == ID["liver"]).any())
    return liver / rows


def test_the_livers_edge_runs_along_the_right_adrenal_gland() -> None:
    assert np.mean([beside_liver(seed) for seed in SEEDS]) > 0.35


def crus_near(seed: int, name: str) -> float:
    """Share of an adrenal gland's slices in which muscle comes within 12 mm of its medial side."""
    phantom = body(seed)
    gland = phantom.labels == ID[name]
    slices = [z for z in range(len(gland)) if gland[z].any()]
    near = 0
    for z in slices:
        columns = np.flatnonzero(gland[z].any(0))
        muscle = phantom.auxiliary[z] == AUXILIARY["muscle"]
        middle = int(columns.mean())
        medial = (
            np.arange(muscle.shape[1]) > middle if name.startswith("right") else np.arange(muscle.shape[1]) < middle
        )
        distance = distance_transform_edt(~gland[z], sampling=PIXEL)
        near += int((muscle & medial & (distance <= 12)).sum() >= 6)
    return near / len(slices)


def test_a_crus_of_the_diaphragm_lies_beside_the_left_adrenal_gland() -> None:
    assert np.mean([crus_near(seed, "left_adrenal_gland") for seed in SEEDS]) > 0.4


def test_a_crus_of_the_diaphragm_lies_beside_the_right_adrenal_gland() -> None:
    assert np.mean([crus_near(seed, "right_adrenal_gland") for seed in SEEDS]) > 0.7


def turned(seed: int, name: str, low: bool) -> float:
    """Degrees by which the longest line of a gland's upper or lower half points away from straight back, outwards."""
    gland = body(seed).labels == ID[name]
    slices = np.flatnonzero(gland.any((1, 2)))
    half = slices[: len(slices) // 2] if low else slices[len(slices) // 2 :]
    places = [np.argwhere(gland[z]).astype(float) for z in half if gland[z].sum() > 5]
    around = np.concatenate([at - at.mean(axis=0) for at in places])
    back, left = np.linalg.eigh(around.T @ around)[1][:, 1]
    outwards = left if name.startswith("left") else -left
    angle = float(np.degrees(np.arctan2(outwards * np.sign(back), abs(back))))
    return angle if angle > -45 else angle + 180


@pytest.mark.parametrize("name", ["right_adrenal_gland", "left_adrenal_gland"])
def test_low_leaves_of_an_adrenal_gland_lie_across_and_some_glands_whole(name: str) -> None:
    upper, lower = np.array([[turned(seed, name, low) for seed in range(400, 408)] for low in (False, True)])
    assert np.mean(lower) > max(38, np.mean(upper) + 5)
    assert lower.max() > 70
    assert upper.min() < 20


def organs_at_the_spine(seed: int) -> float:
    """mL of liver, spleen and stomach within 6 mm of vertebrae, 3 cm to either side of them, beside the right gland."""
    phantom = body(seed)
    gland = (phantom.labels == ID["right_adrenal_gland"]).any((1, 2))
    reach, found = int(30 / PIXEL), 0
    for plane, auxiliary in zip(phantom.labels[gland], phantom.auxiliary[gland], strict=True):
        bone = auxiliary == AUXILIARY["bone"]
        middle = int(np.median(np.argwhere(bone)[:, 1]))
        near = (distance_transform_edt(~bone, sampling=PIXEL) <= 6)[:, middle - reach : middle + reach]
        organs = np.isin(plane, [ID[name] for name in ("liver", "spleen", "stomach")])
        found += int((near & organs[:, middle - reach : middle + reach]).sum())
    return found * float(np.prod(phantom.spacing)) / 1000


def test_no_sheet_of_liver_or_stomach_lies_between_crus_and_spine() -> None:
    assert np.mean([organs_at_the_spine(seed) for seed in SEEDS]) < 1.2


@cache
def below_its_gland(seed: int) -> float:
    """mm that the right kidney's middle lies below that of the right adrenal gland."""
    labels = healthy_labels(seed)
    gland, kidney = (np.argwhere(labels == ID[f"right_{organ}"])[:, 0].mean() for organ in ("adrenal_gland", "kidney"))
    return float(gland - kidney) * SPACING[0]


@pytest.mark.parametrize("seed", [411, 434, 439])
def test_a_kidney_may_lie_low_and_leaves_its_adrenal_gland_where_it_was(seed: int) -> None:
    assert below_its_gland(seed) > max(below_its_gland(usual) for usual in USUAL) + 10
    assert not outside(volumes(healthy_labels(seed)))


def behind_stomach(phantom: Phantom) -> float:
    """Share of the spleen's columns, from front to back, that have stomach in front of the spleen."""
    spleen, stomach = (phantom.labels == ID[name] for name in ("spleen", "stomach"))
    both = spleen.any(1) & stomach.any(1)
    first = np.argmax(stomach, 1) < np.argmax(spleen, 1)
    return float((both & first).sum() / spleen.any(1).sum())


def test_a_lobe_of_the_spleen_may_lie_behind_the_stomach(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same three bodies with their lobes and without them."""
    seeds = (400, 407, 408)
    lobed = np.mean([behind_stomach(body(seed)) for seed in seeds])
    monkeypatch.setattr("train.phantom.anatomy.liver.LOBED", 0.0)
    assert lobed > np.mean([behind_stomach(generate(seed, GRID)) for seed in seeds]) + 0.08
