import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

from inference.organs import CLASSES
from inference.postprocess import (
    RULES,
    Context,
    _box,
    _closed,
    _dilated,
    _within,
    close_adrenal_glands,
    crop_to_abdomen,
    postprocess,
    remove_displaced,
    remove_fragments,
    remove_too_small,
    return_gallbladder_to_liver,
)

IDS = {name: index for index, name in enumerate(CLASSES) if index}
LIVER, SPLEEN, AORTA, RIGHT_ADRENAL, GALLBLADDER, ESOPHAGUS, LEFT_KIDNEY = 1, 3, 5, 7, 9, 10, 13
SPACING = (2.0, 1.0, 1.0)  # mm


def context(**minima: float) -> Context:
    return Context(IDS, minima, SPACING)


def empty(shape: tuple[int, int, int] = (10, 20, 20)) -> np.ndarray:
    return np.zeros(shape, np.uint8)


def test_an_organ_under_half_its_smallest_training_volume_goes() -> None:
    labels = empty()
    labels[3:5, 3:8, 3:8] = SPLEEN  # 50 voxels, 100 mm3
    labels[3:5, 12:18, 12:18] = LIVER  # 72 voxels, 144 mm3
    kept = remove_too_small(labels, context(spleen=200.0, liver=280.0))
    assert (kept == labels).all()  # exactly half stays
    cut = remove_too_small(labels, context(spleen=201.0, liver=280.0))
    assert not (cut == SPLEEN).any()
    assert ((cut == LIVER) == (labels == LIVER)).all()


@pytest.mark.parametrize("end", [0, 9])
def test_an_organ_that_the_scans_end_cuts_is_not_too_small(end: int) -> None:
    labels = empty()
    labels[end, 3:13, 3:13] = SPLEEN  # 100 voxels, 200 mm3
    assert (remove_too_small(labels, context(spleen=10_000.0)) == labels).all()  # exactly 2 % and 0.2 mL stay
    slices = slice(0, 2) if end == 0 else slice(8, 10)
    labels[slices, :, :12] = labels[slices, :10, 12] = SPLEEN  # 500 voxels, 1 mL, of an organ of any size
    assert (remove_too_small(labels, context(spleen=1e6)) == labels).all()


@pytest.mark.parametrize("end", [0, 9])
def test_a_fleck_at_the_scans_end_goes(end: int) -> None:
    labels = empty()
    labels[end, 3:13, 3:13] = SPLEEN
    assert not remove_too_small(labels, context(spleen=10_001.0)).any()
    labels[end, 3, 3] = 0  # 198 mm3, of an organ of any size
    assert not remove_too_small(labels, context(spleen=400.0)).any()


def test_an_organ_at_the_scans_side_is_still_too_small() -> None:
    labels = empty()
    labels[4, 0:2, 0:2] = SPLEEN
    assert not remove_too_small(labels, context(spleen=1e6)).any()


def test_an_organ_without_a_minimum_stays() -> None:
    labels = empty()
    labels[4, 4, 4] = SPLEEN
    assert (remove_too_small(labels, context(liver=1e6)) == labels).all()


def test_a_gap_in_an_adrenal_gland_is_closed() -> None:
    labels = empty()
    labels[4, 5, 2:6] = RIGHT_ADRENAL
    labels[4, 5, 9:13] = RIGHT_ADRENAL
    closed = close_adrenal_glands(labels, context())
    assert (closed[4, 5, 2:13] == RIGHT_ADRENAL).all()
    assert np.count_nonzero(closed) == 11


def test_the_fat_between_an_adrenal_glands_limbs_stays() -> None:
    labels = empty()
    labels[4, 5:9, 5] = labels[4, 5:9, 8] = labels[4, 4, 5:9] = RIGHT_ADRENAL
    assert (close_adrenal_glands(labels, context()) == labels).all()
    # A piece beside it: the gap between the two is filled, the one between the limbs is not.
    labels[4, 5:9, 11] = RIGHT_ADRENAL
    joined = close_adrenal_glands(labels, context())
    assert (joined[4, 5:9, 9:11] == RIGHT_ADRENAL).all()
    assert np.count_nonzero(joined) == np.count_nonzero(labels) + 8


def test_a_fragment_draws_no_closing_along() -> None:
    labels = empty()
    labels[4, 2:12, 5] = RIGHT_ADRENAL
    labels[4, 6, 9] = RIGHT_ADRENAL  # one of eleven voxels, which rule 5 takes
    assert (close_adrenal_glands(labels, context()) == labels).all()
    labels[4, 7, 9] = RIGHT_ADRENAL
    assert np.count_nonzero(close_adrenal_glands(labels, context())) == 12 + 6


def test_closing_overwrites_no_other_organ() -> None:
    labels = empty()
    labels[4, 5, 2:6] = RIGHT_ADRENAL
    labels[4, 5, 7] = LIVER
    labels[4, 5, 9:13] = RIGHT_ADRENAL
    closed = close_adrenal_glands(labels, context())
    assert closed[4, 5].tolist()[2:13] == [7, 7, 7, 7, 7, 1, 7, 7, 7, 7, 7]


def test_closing_is_the_same_at_the_scans_border() -> None:
    labels = empty((3, 6, 6))
    labels[0, 0, 0] = labels[0, 0, 3] = labels[2, 5, 5] = RIGHT_ADRENAL
    wide = np.pad(labels, 8)
    expected = close_adrenal_glands(wide, context())[8:-8, 8:-8, 8:-8]
    assert (close_adrenal_glands(labels, context()) == expected).all()


def test_closing_leaves_other_organs_open() -> None:
    labels = empty()
    labels[4, 5, 2:6] = labels[4, 5, 7:9] = SPLEEN
    assert (close_adrenal_glands(labels, context()) == labels).all()


def test_slices_beyond_vessels_and_esophagus_go_and_their_own_stay() -> None:
    labels = empty()
    labels[:, 2:5, 2:5] = LIVER
    labels[3:6, 10, 10] = AORTA
    labels[7, 12, 12] = ESOPHAGUS
    cropped = crop_to_abdomen(labels, context())
    assert [bool(plane.any()) for plane in cropped] == [3 <= z <= 7 for z in range(10)]
    assert (cropped[3:8] == labels[3:8]).all()


def test_a_vessels_small_pieces_hold_no_slices() -> None:
    labels = empty()
    labels[:, 2:5, 2:5] = LIVER
    labels[5:9, 10, 10] = AORTA
    labels[0, 16, 16] = AORTA  # under half of four voxels
    labels[2:4, 16, 16] = AORTA  # half
    labels[9, 12, 12] = ESOPHAGUS  # its own largest
    cropped = crop_to_abdomen(labels, context())
    assert [bool(plane.any()) for plane in cropped] == [z >= 2 for z in range(10)]
    assert (cropped[2:] == labels[2:]).all()


def test_a_scan_without_vessels_keeps_its_labels_and_says_so() -> None:
    labels = empty()
    labels[2:8, 2:8, 2:8] = LIVER
    assert (crop_to_abdomen(labels, context()) == labels).all()
    result, warnings = postprocess(labels, context())
    assert (result == labels).all()
    assert "not cropped" in warnings[0]


def liver_with_gallbladder() -> np.ndarray:
    labels = empty()
    labels[1:9, 2:18, 2:18] = LIVER
    labels[3:6, 6:9, 6:9] = GALLBLADDER
    return labels


def test_a_gallbladder_inside_the_liver_becomes_liver() -> None:
    returned = return_gallbladder_to_liver(liver_with_gallbladder(), context())
    assert not (returned == GALLBLADDER).any()
    assert (returned[3:6, 6:9, 6:9] == LIVER).all()


def test_a_gallbladder_goes_where_liver_encloses_more_than_half_of_its_slices() -> None:
    labels = liver_with_gallbladder()
    labels[6, 6:9, 6:9] = GALLBLADDER  # slices 3 to 6
    labels[3, 6, 9] = 0  # slices 4 to 6 stay enclosed
    assert not (return_gallbladder_to_liver(labels, context()) == GALLBLADDER).any()
    labels[4, 5, 7] = 0  # two of four: a gallbladder whose neck the liver closes around
    assert (return_gallbladder_to_liver(labels, context()) == labels).all()


def test_a_gap_in_every_slices_ring_keeps_the_gallbladder() -> None:
    labels = liver_with_gallbladder()
    labels[3:6, 5, 5] = 0  # a corner of the ring
    assert (return_gallbladder_to_liver(labels, context()) == labels).all()


def test_only_the_enclosed_component_changes() -> None:
    labels = liver_with_gallbladder()
    labels[3:6, 17:20, 12:15] = GALLBLADDER  # hangs out of the liver
    returned = return_gallbladder_to_liver(labels, context())
    assert (returned[3:6, 6:9, 6:9] == LIVER).all()
    assert (returned[3:6, 17:20, 12:15] == GALLBLADDER).all()


def test_the_scans_border_does_not_count_as_liver() -> None:
    labels = np.full((3, 8, 8), LIVER, np.uint8)
    labels[1, 0:2, 3:5] = GALLBLADDER
    assert (return_gallbladder_to_liver(labels, context()) == labels).all()


def liver_and_two_gallbladders() -> np.ndarray:
    """The larger is 11 mm from the liver (y), the smaller touches it and is under a tenth of both."""
    labels = empty((10, 40, 20))
    labels[1:9, 2:12, 2:18] = LIVER
    labels[2:7, 22:28, 8:14] = GALLBLADDER
    labels[5, 12:15, 6:9] = GALLBLADDER
    return labels


def test_a_gallbladder_far_from_the_liver_goes_where_another_is_near() -> None:
    labels = liver_and_two_gallbladders()
    kept = remove_displaced(labels, context())
    assert (kept == labels).all()  # the smaller one is a fragment: too little to decide
    labels[6, 12:15, 6:9] = labels[7, 12:15, 6:9] = GALLBLADDER
    kept = remove_displaced(labels, context())
    assert not (kept[:, 20:] == GALLBLADDER).any()
    assert (kept[:, :20] == labels[:, :20]).all()
    # A tenth of what stays, not of all: the fifth rule comes after.
    labels[3, 12:15, 11:15] = GALLBLADDER
    assert (postprocess(labels, context())[0][:, :20] == labels[:, :20]).all()


def test_what_is_near_is_in_millimetres() -> None:
    labels = liver_and_two_gallbladders()
    labels[5:8, 12:15, 6:9] = GALLBLADDER
    for mm, stays in ((1.0, False), (0.6, True)):  # 11 and 6.6 mm
        kept = remove_displaced(labels, Context(IDS, {}, (2.0, mm, 1.0)))
        assert (kept[:, 20:] == GALLBLADDER).any() == stays


def test_components_that_are_all_far_stay() -> None:
    labels = liver_and_two_gallbladders()
    labels[:, 12:16] = 0
    labels[2:7, 32:36, 8:14] = GALLBLADDER
    assert (remove_displaced(labels, context()) == labels).all()
    labels[labels == LIVER] = 0
    assert (remove_displaced(labels, context()) == labels).all()


def test_a_fragment_of_the_neighbour_is_no_neighbour() -> None:
    labels = liver_and_two_gallbladders()
    labels[5:8, 12:15, 6:9] = GALLBLADDER
    labels[4, 29, 10] = LIVER
    assert not (remove_displaced(labels, context())[:, 20:] == GALLBLADDER).any()


def test_a_spleen_in_the_pelvis_goes() -> None:
    labels = empty((80, 20, 20))
    labels[60:70, 4:8, 4:8] = LEFT_KIDNEY
    labels[62:75, 10:14, 4:8] = SPLEEN
    labels[0:25, 10:14, 4:8] = SPLEEN
    kept = remove_displaced(labels, context())
    assert not kept[:30].any()
    assert (kept[30:] == labels[30:]).all()


def test_a_fragment_under_a_tenth_of_its_organ_goes() -> None:
    labels = empty()
    labels[2:4, 2:7, 2:7] = SPLEEN  # 50
    labels[7, 10, 10:15] = SPLEEN  # 5 of 60
    labels[7, 15, 10:15] = SPLEEN  # 5 of 60
    kept = remove_fragments(labels, context())
    assert np.count_nonzero(kept) == 50


def test_a_component_of_a_tenth_stays() -> None:
    labels = empty()
    labels[2:4, 2:5, 2:5] = SPLEEN  # 18
    labels[7, 10, 10:12] = SPLEEN  # 2 of 20
    assert (remove_fragments(labels, context()) == labels).all()


def test_voxels_that_touch_at_a_corner_are_one_component() -> None:
    labels = empty()
    labels[2:4, 2:7, 2:7] = SPLEEN
    labels[4, 7, 7] = SPLEEN
    assert (remove_fragments(labels, context()) == labels).all()


def random_labels(seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    labels = np.zeros((14, 30, 30), np.uint8)
    for _ in range(60):
        corner = rng.integers(0, (12, 26, 26))
        size = rng.integers(1, (6, 12, 12))
        labels[tuple(slice(c, c + s) for c, s in zip(corner, size))] = rng.choice([0, 1, 1, 1, 5, 7, 8, 9, 9, 9, 13])
    return labels


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_each_rule_is_idempotent_and_leaves_its_input_alone(rule) -> None:
    settings = context(liver=3000.0, aorta=200.0, gallbladder=150.0)
    changed = 0
    for seed in range(20):
        labels = random_labels(seed)
        before = labels.copy()
        once = rule(labels, settings)
        assert (labels == before).all()
        assert (rule(once, settings) == once).all()
        changed += not (once == labels).all()
    assert changed > 0


def test_the_rules_run_in_the_papers_order_and_ours_before_the_last() -> None:
    assert [rule.__name__ for rule in RULES] == [
        "remove_too_small",
        "close_adrenal_glands",
        "crop_to_abdomen",
        "return_gallbladder_to_liver",
        "remove_displaced",
        "remove_fragments",
    ]
    # The gallbladder in the liver, rejoined by rule 4, is no fragment for rule 5: order shows in the result.
    labels = liver_with_gallbladder()
    labels[1:9, 19, 19] = AORTA
    assert not (postprocess(labels, context())[0][3:6, 6:9, 6:9] != LIVER).any()


def test_a_bundle_without_the_organs_skips_their_rules() -> None:
    labels = empty()
    labels[2:6, 3, 3:6] = labels[2:6, 3, 7:9] = 1
    other = Context({"bladder": 1}, {}, SPACING)
    result, warnings = postprocess(labels, other)
    assert (result == labels).all()
    assert warnings == ()


def test_an_empty_mask_is_a_valid_answer() -> None:
    result, warnings = postprocess(empty(), context(liver=1e6))
    assert not result.any()
    assert warnings == ()


@pytest.mark.parametrize("seed", range(5))
def test_rules_on_the_organs_window_equal_rules_on_the_whole_scan(seed: int) -> None:
    labels = np.pad(random_labels(seed), ((0, 0), (7, 3), (2, 9)))
    settings = context(liver=3000.0, aorta=200.0, gallbladder=150.0)
    whole = labels
    for rule in RULES:
        whole = rule(whole, settings)
    assert (postprocess(labels, settings)[0] == whole).all()
    touching = random_labels(seed)  # organs at the scan's sides
    whole = touching
    for rule in RULES:
        whole = rule(whole, settings)
    assert (postprocess(touching, settings)[0] == whole).all()


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 9, 4), (7, 12, 10), (15, 15, 15)])
@pytest.mark.parametrize("density", [0.03, 0.3, 0.9])
def test_boxes_and_cubes_equal_scipys(shape: tuple[int, int, int], density: float) -> None:
    random = np.random.default_rng(0)
    for _ in range(10):
        mask = random.random(shape) < density
        cube = np.ones((5, 5, 5), bool)
        wanted = ndimage.binary_closing(np.pad(mask, 2), cube)[2:-2, 2:-2, 2:-2]
        np.testing.assert_array_equal(_closed(mask, 2), wanted)
        np.testing.assert_array_equal(_dilated(mask, 1), ndimage.binary_dilation(mask, np.ones((3, 3, 3), bool)))
        flat = ndimage.binary_dilation(mask, np.ones((1, 3, 3), bool))
        np.testing.assert_array_equal(_dilated(mask, 1, axes=(1, 2)), flat)
        assert [_box(mask)] == (ndimage.find_objects(mask.astype(np.uint8)) or [None])


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (5.0, 2.4, 2.4), (3.0, 0.8, 1.7)])
@pytest.mark.parametrize("reach", [0.0, 4.0, 8.0, 60.0])
def test_distances_equal_scipys(spacing: tuple[float, float, float], reach: float) -> None:
    random = np.random.default_rng(0)
    for _ in range(5):
        mask = random.random((9, 20, 14)) < 0.003
        mask[4, 4, 4] = True
        wanted = ndimage.distance_transform_edt(~mask, sampling=spacing) <= reach
        np.testing.assert_array_equal(_within(mask, reach, spacing), wanted)


def test_the_adrenal_rule_equals_a_closing_looked_at_piece_by_piece() -> None:
    """Written once more, with scipy."""
    random = np.random.default_rng(0)
    cube, around = np.ones((5, 5, 5), bool), np.ones((3, 3, 3), bool)
    kept = dropped = fragments = 0
    for share in (0.004, 0.01, 0.02) * 10:
        gland = ndimage.binary_dilation(random.random((8, 12, 14)) < share, np.ones((1, 2, 3), bool))
        labels = np.where(gland, RIGHT_ADRENAL, LIVER * (random.random(gland.shape) < 0.1)).astype(np.uint8)
        wanted = labels.copy()
        while True:
            gland = wanted == RIGHT_ADRENAL
            components, count = ndimage.label(gland, around)
            for index in range(1, count + 1):
                if np.count_nonzero(components == index) < 0.1 * np.count_nonzero(gland):
                    components[components == index] = 0
                    fragments += 1
            whole = components > 0
            added = ndimage.binary_closing(np.pad(whole, 2), cube)[2:-2, 2:-2, 2:-2] & ~whole
            parts, count = ndimage.label(added, around)
            before = wanted.copy()
            for index in range(1, count + 1):
                neighbours = set(components[ndimage.binary_dilation(parts == index, around)]) - {0}
                if len(neighbours) > 1:
                    wanted[(parts == index) & (wanted == 0)] = RIGHT_ADRENAL
                    kept += 1
                else:
                    dropped += 1
            if (wanted == before).all():
                break
        np.testing.assert_array_equal(close_adrenal_glands(labels, context()), wanted)
    assert min(kept, dropped, fragments) > 10


def test_the_gallbladder_rule_equals_the_ring_of_every_component_in_every_slice() -> None:
    """Written once more: component by component, slice by slice."""
    random = np.random.default_rng(0)
    returned = 0
    for _ in range(20):
        labels = random.choice([LIVER, GALLBLADDER, 0], size=(5, 14, 14), p=[0.86, 0.13, 0.01]).astype(np.uint8)
        wanted = labels.copy()
        components, count = ndimage.label(labels == GALLBLADDER, np.ones((3, 3, 3)))
        framed = np.pad(labels, ((0, 0), (1, 1), (1, 1)))
        for index in range(1, count + 1):
            component = np.pad(components == index, ((0, 0), (1, 1), (1, 1)))
            rings = ndimage.binary_dilation(component, np.ones((1, 3, 3), bool)) & ~component
            planes = zip(framed, component, rings)
            enclosed = [(plane[ring] == LIVER).all() for plane, piece, ring in planes if piece.any()]
            if sum(enclosed) > len(enclosed) / 2:
                wanted[components == index] = LIVER
                returned += 1
        np.testing.assert_array_equal(return_gallbladder_to_liver(labels, context()), wanted)
    assert returned > 20


def test_the_program_starts_where_scipy_is_not_installed() -> None:
    """The import of scipy.ndimage takes as long as that of all the rest, and scipy 113 MB of the image."""
    code = "import sys; sys.modules['scipy'] = None; import inference.__main__"
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], check=True)
