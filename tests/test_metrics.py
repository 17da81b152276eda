from math import sqrt

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from inference.organs import ORGANS
from train.metrics import CORNERS, Score, dice, labelled_slices, score, surface_dice, surfel_areas, surfels, within

ORGAN = {organ.name: organ for organ in ORGANS}
CUBE = (1.0, 1.0, 1.0)


def block(z: slice, y: slice, x: slice, shape: tuple[int, int, int] = (12, 12, 12)) -> np.ndarray:
    mask = np.zeros(shape, bool)
    mask[z, y, x] = True
    return mask


def cube(x: int, size: int = 3) -> np.ndarray:
    return block(slice(2, 2 + size), slice(2, 2 + size), slice(x, x + size))


def test_dice_of_two_blocks_that_share_half_is_a_half() -> None:
    assert dice(block(slice(0, 4), slice(0, 4), slice(0, 4)), block(slice(0, 4), slice(0, 4), slice(2, 6))) == 0.5


def test_dice_of_two_empty_masks_is_1() -> None:
    assert dice(np.zeros((2, 2, 2), bool), np.zeros((2, 2, 2), bool)) == 1.0


def test_the_surface_of_one_voxel_is_eight_cut_corners() -> None:
    points, codes = surfels(block(slice(5, 6), slice(5, 6), slice(5, 6)))
    areas = np.array(surfel_areas((2.0, 3.0, 5.0)))[codes]
    assert len(points) == 8
    # Eight triangles through the midpoints to the neighbours: half a voxel along each axis.
    assert areas.sum() == pytest.approx(8 * 0.5 * np.linalg.norm(np.cross([-1, 1.5, 0], [-1, 0, 2.5])))


def test_the_surface_of_a_block_is_faces_bevelled_edges_and_cut_corners() -> None:
    _, codes = surfels(block(slice(2, 5), slice(2, 6), slice(2, 7)))  # 3 x 4 x 5 voxels
    faces = 2 * (2 * 3 + 2 * 4 + 3 * 4)
    edges = 4 * (2 + 3 + 4) * sqrt(0.5)
    corners = 8 * sqrt(3) / 8
    assert np.array(surfel_areas(CUBE))[codes].sum() == pytest.approx(faces + edges + corners)


def test_a_block_at_the_border_of_the_scan_has_the_surface_of_one_inside() -> None:
    table = np.array(surfel_areas(CUBE))
    inside, border = (table[surfels(block(at, at, at))[1]].sum() for at in (slice(3, 6), slice(0, 3)))
    assert border == pytest.approx(inside)
    assert border == pytest.approx(table[surfels(block(slice(9, 12), slice(9, 12), slice(9, 12)))[1]].sum())


def test_surface_dice_of_a_cube_shifted_by_one_voxel_is_what_a_pencil_says() -> None:
    # Surfels lie on four planes along x. Two cubes of 3, one apart, share the ring of 12 surfels on three planes: for
    # either cube two rings of its sides (8 faces, 4 edges) and one of its end (8 edges, 4 corners).
    edge, corner = sqrt(0.5), sqrt(3) / 8
    side, end = 8 + 4 * edge, 8 * edge + 4 * corner
    whole = 2 * side + 2 * (4 + end)
    assert surface_dice(cube(2), cube(3), CUBE, 0.5) == pytest.approx((2 * side + end) / whole)


def test_a_distance_of_exactly_the_tolerance_counts_as_overlap() -> None:
    slab = block(slice(0, 12), slice(0, 12), slice(2, 4))
    moved = block(slice(0, 12), slice(0, 12), slice(4, 6))
    assert surface_dice(slab, moved, CUBE, 2.0) == 1.0
    assert surface_dice(slab, moved, CUBE, 1.99) < 1.0


def test_distances_are_in_mm_along_each_axis() -> None:
    one = block(slice(5, 6), slice(5, 6), slice(5, 6))
    for axis, spacing in enumerate((4.0, 0.5, 1.0)):
        reached = surface_dice(one, np.roll(one, 3, axis), (4.0, 0.5, 1.0), 2 * spacing)
        short = surface_dice(one, np.roll(one, 3, axis), (4.0, 0.5, 1.0), 2 * spacing - 0.01)
        assert reached > short


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([(1.0, 1.0, 1.0), (4.0, 1.2, 1.2), (2.5, 0.8, 0.6)]))
def test_surfels_within_the_tolerance_are_those_of_a_distance_transform(seed: int, spacing: tuple) -> None:
    rng = np.random.default_rng(seed)
    shape = tuple(rng.integers(1, 8, 3))
    (points, _), (others, _) = (surfels(rng.random(shape) < rng.random()) for _ in range(2))
    if not len(others):
        assert not within(points, others, spacing, 2.0).any()
        return
    surface = np.zeros([size + 1 for size in shape], bool)
    surface[tuple(others.T)] = True
    distance = ndimage.distance_transform_edt(~surface, sampling=spacing)
    for tolerance in (0.0, 2.0, 5.0):
        expected = distance[tuple(points.T)] <= tolerance
        assert np.array_equal(within(points, others, spacing, tolerance), expected)


def test_a_surfel_and_its_inverse_have_one_area_and_so_have_its_mirror_images() -> None:
    areas = surfel_areas((2.5, 0.8, 0.6))
    assert areas[0] == areas[255] == 0
    for code in range(256):
        mirrored = sum(1 << CORNERS.index((1 - z, y, x)) for bit, (z, y, x) in enumerate(CORNERS) if code >> bit & 1)
        assert areas[code] == pytest.approx(areas[255 - code])
        assert areas[code] == pytest.approx(areas[mirrored])


def test_areas_follow_the_axes() -> None:
    straight, turned = surfel_areas((2.0, 3.0, 5.0)), surfel_areas((5.0, 3.0, 2.0))
    for code in range(256):
        swapped = sum(1 << CORNERS.index((x, y, z)) for bit, (z, y, x) in enumerate(CORNERS) if code >> bit & 1)
        assert straight[code] == pytest.approx(turned[swapped])


def test_a_flat_surface_has_the_area_of_its_pixels_and_a_staircase_that_of_its_slope() -> None:
    half = block(slice(0, 6), slice(0, 12), slice(0, 12))
    points, codes = surfels(half)
    inner = ((points[:, 1:] > 0) & (points[:, 1:] < 12)).all(axis=1) & (points[:, 0] == 6)
    assert np.array(surfel_areas((5.0, 0.5, 0.25)))[codes[inner]] == pytest.approx(0.125)
    z, y, _ = np.indices((12, 12, 12))
    points, codes = surfels(z + y < 12)
    inner = (points > 1).all(axis=1) & (points < 11).all(axis=1)
    # The plane at 45 degrees through the stairs cuts a wall off each cube on its way.
    assert np.array(surfel_areas(CUBE))[codes[inner]] == pytest.approx(sqrt(0.5))


def test_score_of_two_empty_masks_is_1_and_of_one_empty_mask_0() -> None:
    empty, full = np.zeros((4, 4, 4), bool), np.ones((4, 4, 4), bool)
    assert score(empty, empty, CUBE, ORGAN["liver"]) == Score(1.0, 1.0)
    assert score(empty, full, CUBE, ORGAN["liver"]) == Score(0.0, 0.0)
    assert score(full, empty, CUBE, ORGAN["aorta"]) == Score(0.0, 0.0)


def test_nsd_is_0_where_dsc_is_below_a_fifth_though_the_surfaces_are_near() -> None:
    wide, moved = block(slice(0, 12), slice(0, 12), slice(2, 4)), block(slice(0, 12), slice(0, 12), slice(4, 6))
    assert surface_dice(wide, moved, CUBE, 5.0) == 1.0
    assert score(wide, moved, CUBE, ORGAN["liver"]) == Score(0.0, 0.0)


def test_each_organ_has_its_own_tolerance() -> None:
    slab, thick = block(slice(0, 12), slice(0, 12), slice(0, 4)), block(slice(0, 12), slice(0, 12), slice(0, 7))
    assert score(slab, thick, CUBE, ORGAN["spleen"]).nsd == 1.0  # 3 mm
    assert score(slab, thick, CUBE, ORGAN["gallbladder"]).nsd < 1.0  # 2 mm


def test_aorta_is_compared_in_the_labelled_slices_but_the_last() -> None:
    reference = block(slice(2, 6), slice(4, 8), slice(4, 8))
    longer = block(slice(0, 12), slice(4, 8), slice(4, 8))
    wrong_at_the_end = reference.copy()
    wrong_at_the_end[5] = False
    for prediction in (longer, wrong_at_the_end):
        assert score(reference, prediction, CUBE, ORGAN["aorta"]) == Score(1.0, 1.0)
        assert score(reference, prediction, CUBE, ORGAN["liver"]).dsc < 1.0
    assert labelled_slices(reference) == slice(2, 5)


def test_an_aorta_labelled_in_one_slice_is_compared_in_that_slice() -> None:
    reference = block(slice(3, 4), slice(4, 8), slice(4, 8))
    assert score(reference, block(slice(0, 12), slice(4, 8), slice(4, 8)), CUBE, ORGAN["aorta"]) == Score(1.0, 1.0)
    assert score(reference, block(slice(6, 8), slice(4, 8), slice(4, 8)), CUBE, ORGAN["aorta"]) == Score(0.0, 0.0)


def test_scores_have_four_digits_rounded_half_to_even() -> None:
    # 2 x 1 / (1 + 63) = 0.03125: NumPy's rounding, the evaluator's, goes to the even digit.
    row = np.ones((1, 1, 63), bool)
    one = block(slice(0, 1), slice(0, 1), slice(0, 1), (1, 1, 63))
    assert score(row, one, CUBE, ORGAN["liver"]).dsc == 0.0312


def test_a_score_outside_0_to_1_and_masks_of_two_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"nsd is 1\.5"):
        Score(0.5, 1.5)
    with pytest.raises(ValueError, match=r"reference is \(2, 2, 2\), prediction \(2, 2, 3\)"):
        score(np.ones((2, 2, 2), bool), np.ones((2, 2, 3), bool), CUBE, ORGAN["liver"])
