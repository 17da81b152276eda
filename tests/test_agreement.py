from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inference.organs import ORGANS
from train.agreement import Agreement, Overlap, pairwise_dice
from train.metrics import dice

IDS = {organ.name: organ.id for organ in ORGANS}
# The published code measures these in a range of slices only, takes the range from another axis and drops its last slice.
VESSELS = ("aorta", "inferior_vena_cava", "esophagus")


def rods(organ: str, *lengths: int, size: int = 24) -> list[np.ndarray]:
    """A label map per length: a rod of that many voxels of one organ along x, all from the same voxel on."""
    masks = []
    for length in lengths:
        mask = np.zeros((4, 5, size), np.uint8)
        mask[2, 3, :length] = IDS[organ]
        masks.append(mask)
    return masks


def test_equation_1_is_the_mean_over_all_pairs() -> None:
    # Rods of 2, 4 and 8: DSC 4/6, 4/10, 8/12.
    agreement = pairwise_dice(rods("spleen", 2, 4, 8))
    assert agreement.values["spleen"] == pytest.approx((2 / 3 + 2 / 5 + 2 / 3) / 3, abs=1e-15)


def test_five_models_make_ten_pairs() -> None:
    # One of five sees a rod of 3 where the others see one of 1: four pairs of DSC 2/4, six of 1.
    agreement = pairwise_dice(rods("liver", 1, 1, 3, 1, 1))
    assert agreement.values["liver"] == pytest.approx((4 * 0.5 + 6) / 10, abs=1e-15)


def test_an_organ_that_no_model_sees_counts_1() -> None:
    agreement = pairwise_dice(rods("liver", 1, 2, 3, 4, 5))
    assert {value for name, value in agreement.values.items() if name != "liver"} == {1.0}


def test_a_pair_of_which_one_lacks_the_organ_counts_0() -> None:
    # Pairs: two of DSC 1 and 0 each ... 0-0: 1, 0-4: 0, 0-4: 0.
    assert pairwise_dice(rods("pancreas", 0, 0, 4)).values["pancreas"] == pytest.approx(1 / 3)
    assert pairwise_dice(rods("pancreas", 0, 4)).values["pancreas"] == 0.0


def test_all_models_blind_to_everything_agree() -> None:
    agreement = pairwise_dice(rods("liver", 0, 0, 0, 0, 0))
    assert agreement.minimum == 1.0


def test_organs_are_compared_by_name_and_not_with_each_other() -> None:
    one, other = rods("right_kidney", 6) + rods("left_kidney", 6)
    agreement = pairwise_dice([one, other])
    assert {name for name, value in agreement.values.items() if value == 0} == {"right_kidney", "left_kidney"}
    assert list(agreement.values) == [organ.name for organ in ORGANS]


@pytest.mark.parametrize("organ", VESSELS)
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_the_last_slice_counts_along_every_axis_for_vessels_too(organ: str, axis: int) -> None:
    whole = np.full((4, 4, 4), IDS[organ], np.uint8)
    short = whole.copy()
    np.moveaxis(short, axis, 0)[-1] = 0
    # 64 and 48 voxels; without the last slice, or in the slices of one of them alone, this would be 1.
    assert pairwise_dice([whole, short]).values[organ] == pytest.approx(2 * 48 / 112, abs=1e-15)


@pytest.mark.parametrize("organ", VESSELS)
def test_vessels_count_where_only_one_model_sees_them(organ: str) -> None:
    low, high = (np.zeros((10, 4, 4), np.uint8) for _ in range(2))
    low[0:6, 1, 1] = IDS[organ]
    high[4:10, 1, 1] = IDS[organ]
    assert pairwise_dice([low, high]).values[organ] == pytest.approx(2 * 2 / 12, abs=1e-15)


def test_a_mean_of_exactly_nine_tenths_is_nine_tenths() -> None:
    # Three pairs of DSC 1 and three of 4/5: in floating point 0.8999999999999999, which the threshold would refuse.
    assert pairwise_dice(rods("aorta", 2, 2, 2, 3)).values["aorta"] == 0.9


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 5), st.integers(0, 2**32 - 1))
def test_counts_agree_with_dice_of_every_pair_of_masks(models: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    truth = random.integers(0, 15, (5, 6, 7))  # 14 is no organ
    masks = [np.where(random.random(truth.shape) < 0.2, 0, truth).astype(np.uint8) for _ in range(models)]
    agreement = pairwise_dice(masks)
    for organ in ORGANS:
        pairs = [dice(a == organ.id, b == organ.id) for a, b in combinations(masks, 2)]
        assert agreement.values[organ.name] == pytest.approx(np.mean(pairs), abs=1e-12)


def test_counting_piece_by_piece_is_counting_at_once() -> None:
    masks = list(np.random.default_rng(5).integers(0, 14, (3, 9, 8, 7)).astype(np.uint8))
    overlap = Overlap(3)
    overlap.add([mask[:4] for mask in masks])
    overlap.add([mask[4:] for mask in masks])
    assert overlap.agreement() == pairwise_dice(masks)


def test_the_weakest_organ_has_the_minimum() -> None:
    agreement = Agreement({"liver": 0.95, "duodenum": 0.5, "spleen": 0.5})
    assert (agreement.minimum, agreement.weakest) == (0.5, "duodenum")
    assert agreement.mean == pytest.approx(0.65)


def test_masks_that_cannot_be_compared_are_refused() -> None:
    with pytest.raises(ValueError, match="1 mask to compare; expected at least two"):
        pairwise_dice(rods("liver", 1))
    with pytest.raises(ValueError, match="expected one shape"):
        pairwise_dice([np.zeros((2, 3, 4), np.uint8), np.zeros((3, 3, 4), np.uint8)])
    with pytest.raises(ValueError, match="3 masks; expected 2"):
        Overlap(2).add(rods("liver", 1, 2, 3))
    with pytest.raises(ValueError, match="agreement of liver is nan"):
        Agreement({"liver": float("nan")})
