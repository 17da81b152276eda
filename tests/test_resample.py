import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from inference.resample import (
    argmax,
    labels_on_grid,
    labels_to_working_grid,
    to_working_grid,
    working_affine,
    working_shape,
)

SIZES = st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9))


def resized(array: np.ndarray, target: tuple[int, int, int]) -> np.ndarray:
    """scipy's trilinear resize with half-pixel centres and replicated edges, as the independent reference."""
    grid = np.meshgrid(*((np.arange(m) + 0.5) * n / m - 0.5 for n, m in zip(array.shape, target)), indexing="ij")
    return ndimage.map_coordinates(array.astype(float), grid, order=1, mode="nearest")


def test_the_working_grid_is_rounded_as_nnunet_rounds_it() -> None:
    assert working_shape((100, 512, 512), (5.0, 0.75, 0.75), (4.0, 1.2, 1.2)) == (125, 320, 320)
    assert working_shape((1, 3, 512), (0.5, 0.1, 0.8), (4.0, 1.2, 1.2)) == (1, 1, 341)


@given(SIZES, SIZES, st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_a_scan_is_interpolated_trilinearly_and_edges_replicate(source: tuple, target: tuple, seed: int) -> None:
    scan = np.random.default_rng(seed).integers(-1000, 1000, source).astype(np.int16)
    found = to_working_grid(scan, target)
    assert found.dtype == np.float32
    assert np.abs(found - resized(scan, target)).max() <= 0.501  # whole HU


def averaged(array: np.ndarray, target: tuple[int, int, int]) -> np.ndarray:
    """The mean under a triangle, one axis after the other and one target after the other, of an array whose edges go on."""
    for axis, count in enumerate(target):
        source = array.shape[axis]
        pad = [(2 * source, 2 * source) if a == axis else (0, 0) for a in range(3)]
        padded, reach, means = np.pad(array.astype(float), pad, "edge"), max(1.0, source / count), []
        for i in range(count):
            away = np.abs(np.arange(5 * source) - 2 * source - ((i + 0.5) * source / count - 0.5))
            means.append(np.average(padded, axis, np.clip(1 - away / reach, 0, None)))
        array = np.stack(means, axis)
    return array


@given(SIZES, SIZES, st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_a_scan_is_averaged_where_the_working_grid_is_coarser(source: tuple, target: tuple, seed: int) -> None:
    scan = np.random.default_rng(seed).integers(-1000, 1000, source).astype(np.int16)
    found = to_working_grid(scan, target, anti_aliasing=True)
    assert found.dtype == np.float32
    assert np.abs(found - averaged(scan, target)).max() <= 0.501  # whole HU


def test_averaging_is_that_of_torch_inside_and_interpolation_on_a_finer_grid() -> None:
    torch = pytest.importorskip("torch")
    scan = np.random.default_rng(3).integers(-1000, 1000, (4, 50, 70)).astype(np.int16)
    found = to_working_grid(scan, (4, 20, 31), anti_aliasing=True)
    batch = torch.tensor(scan.astype(np.float32))[None]
    expected = torch.nn.functional.interpolate(batch, (20, 31), mode="bilinear", antialias=True)[0].numpy()
    assert np.abs(found - expected)[:, 3:-3, 3:-3].max() <= 0.501
    finer = (9, 50, 80)
    assert np.abs(to_working_grid(scan, finer, anti_aliasing=True) - to_working_grid(scan, finer)).max() <= 1


def test_averaging_takes_noise_away_and_leaves_edges_where_they_are() -> None:
    noise = np.random.default_rng(4).normal(0, 30, (20, 120, 120)).astype(np.int16)
    sampled, mean = (to_working_grid(noise, (20, 45, 45), anti_aliasing=way).std() for way in (False, True))
    assert mean < 0.5 * sampled
    step = np.zeros((1, 1, 120), np.int16)
    step[..., 61:] = 100  # inside a voxel of 8/3
    found = to_working_grid(step, (1, 1, 45), anti_aliasing=True)[0, 0]
    assert found.sum() * 120 / 45 == pytest.approx(100 * 59, rel=0.005)


@pytest.mark.parametrize("anti_aliasing", [False, True])
def test_a_scan_is_clipped_before_it_is_interpolated(anti_aliasing: bool) -> None:
    scan = np.array([[[0, 1000, 0, -1000]]], np.int16)
    found = to_working_grid(scan, (1, 1, 2), (-100.0, 200.0), anti_aliasing).ravel().tolist()
    assert found == ([75, -25] if anti_aliasing else [100, -50])  # weights of 1, 3, 3, 1 eighths
    if not anti_aliasing:
        assert to_working_grid(scan, (1, 1, 2)).ravel().tolist() == [500, -500]


@pytest.mark.parametrize("anti_aliasing", [False, True])
def test_a_constant_scan_stays_constant_up_to_its_border(anti_aliasing: bool) -> None:
    scan = np.full((5, 7, 9), 40, np.int16)
    assert (to_working_grid(scan, (13, 3, 20), anti_aliasing=anti_aliasing) == 40).all()


@given(SIZES, SIZES, st.integers(2, 5), st.integers(0, 1000))
@settings(max_examples=100, deadline=None)
def test_labels_equal_the_argmax_of_every_interpolated_class(
    source: tuple, target: tuple, classes: int, seed: int
) -> None:
    logits = np.random.default_rng(seed).normal(size=(classes, *source)).astype(np.float32)
    full = np.stack([resized(channel, target) for channel in logits])
    found = labels_on_grid([logits[:, :1], logits[:, 1:]], source[0], target)
    best_two = np.sort(full, axis=0)[-2:]
    clear = best_two[1] - best_two[0] > 1e-5  # where two classes tie, rounding may choose either
    assert (found == full.argmax(axis=0))[clear].all()


def test_too_few_slices_are_an_error_not_a_half_filled_mask() -> None:
    with pytest.raises(ValueError, match="expected 4"):
        labels_on_grid([np.zeros((2, 3, 5, 5), np.float32)], 4, (8, 5, 5))


def test_argmax_takes_the_first_of_equals() -> None:
    logits = np.array([[1, 0, 2], [1, 5, 2], [0, 5, 3]], np.float32)
    assert argmax(logits).tolist() == [0, 1, 2]


def test_labels_survive_the_way_to_a_finer_grid_and_back() -> None:
    labels = np.zeros((6, 10, 10), np.uint8)
    labels[1:5, 2:8, 3:6] = 4
    labels[2:4, 2:8, 6:9] = 13
    fine = labels_to_working_grid(labels, (12, 20, 20))
    assert set(np.unique(fine)) == {0, 4, 13}
    assert (labels_to_working_grid(fine, labels.shape) == labels).all()


def test_the_working_affine_keeps_the_scans_outer_corners_in_place() -> None:
    affine = np.array([[-0.8, 0.1, 0, 10], [0, -0.7, 0.2, 20], [0.05, 0, 5, -30], [0, 0, 0, 1]])
    moved = working_affine(affine, (100, 512, 480), (125, 300, 320))
    for corner in ((0, 0, 0), (1, 0, 1), (1, 1, 1)):
        before = affine @ [*(c * n - 0.5 for c, n in zip(corner, (480, 512, 100))), 1]
        after = moved @ [*(c * n - 0.5 for c, n in zip(corner, (320, 300, 125))), 1]
        np.testing.assert_allclose(before, after)
