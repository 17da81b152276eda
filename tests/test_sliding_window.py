import numpy as np
import pytest

from inference.sliding_window import Layout, fitted_window, gaussian, mirrored, shares, sliding_window, window_starts


def run(image: np.ndarray, patch: tuple[int, int, int], step: float, network, **options) -> np.ndarray:
    return np.concatenate([slab.copy() for slab in sliding_window(image, patch, step, network, **options)], axis=1)


def pointwise(window: np.ndarray) -> np.ndarray:
    """A network whose answer does not depend on where its window lies."""
    return np.stack([window, -2 * window, window**2])


@pytest.mark.parametrize("shape", [(8, 16, 16), (30, 50, 17), (3, 40, 9), (1, 1, 1), (9, 16, 33)])
@pytest.mark.parametrize("step", [0.5, 0.9, 1.0])
def test_stitching_reproduces_a_pointwise_network_exactly_at_any_size(shape: tuple, step: float) -> None:
    image = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    found = run(image, (8, 16, 16), step, pointwise)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, pointwise(image), atol=1e-5)


def test_windows_lie_where_nnunet_puts_them() -> None:
    assert window_starts(110, 64, 0.5) == [0, 23, 46]
    assert window_starts(64, 64, 0.9) == [0]
    assert window_starts(125, 40, 0.9) == [0, 28, 57, 85]
    assert window_starts(65, 64, 0.9) == [0, 1]


def test_windows_and_weights_equal_nnunets_own() -> None:
    predict = pytest.importorskip("nnunetv2.inference.sliding_window_prediction")
    for size in range(40, 400, 7):
        for step in (0.5, 0.9):
            theirs = predict.compute_steps_for_sliding_window((size,) * 3, (40, 40, 40), step)
            assert window_starts(size, 40, step) == theirs[0]
    theirs = predict.compute_gaussian((20, 56, 48), value_scaling_factor=10, device="cpu").numpy()
    z, y, x = (gaussian(n) for n in (20, 56, 48))
    np.testing.assert_allclose(
        10 * z[:, None, None] * y[:, None] * x, theirs, rtol=2e-3, atol=1e-6
    )  # theirs is float16


def test_windows_are_blended_by_the_gaussian() -> None:
    answers = iter([1.0, 3.0])
    found = run(np.zeros((4, 8, 12), np.float32), (4, 8, 8), 0.5, lambda w: np.full((1, *w.shape), next(answers)))
    left, right = gaussian(8)[5], gaussian(8)[1]  # voxel x = 5 in the windows at 0 and 4
    assert found[0, 2, 3, 5] == pytest.approx((left * 1 + right * 3) / (left + right), rel=1e-5)
    assert found[0, 2, 3, 0] == pytest.approx(1)
    assert found[0, 2, 3, 11] == pytest.approx(3)


def test_the_shares_of_a_voxel_add_up_to_one() -> None:
    total = np.zeros(30)
    for start, share in zip((0, 9, 18), shares((0, 9, 18), 12, 30)):
        total[start : start + 12] += share
    np.testing.assert_allclose(total, 1, rtol=1e-6)


def test_a_small_scan_is_padded_evenly_with_the_mean_intensity() -> None:
    seen = []

    def network(window: np.ndarray) -> np.ndarray:
        seen.append(window.copy())
        return window[None].copy()

    image = np.ones((3, 16, 16), np.float32)
    assert (run(image, (8, 16, 16), 0.9, network) == 1).all()
    assert seen[0][:, 0, 0].tolist() == [0, 0, 1, 1, 1, 0, 0, 0]


def test_progress_counts_every_window() -> None:
    seen = []
    run(
        np.zeros((16, 16, 30), np.float32), (8, 16, 16), 0.9, pointwise, progress=lambda done, n: seen.append((done, n))
    )
    assert seen == [(1, 6), (2, 6), (3, 6), (4, 6), (5, 6), (6, 6)]


def test_mirroring_averages_over_all_flips_in_the_scans_own_frame() -> None:
    ramp = np.arange(4, dtype=np.float32)

    def network(window: np.ndarray) -> np.ndarray:
        return (window + ramp)[None]  # adds what depends on the direction of x only

    image = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32)
    np.testing.assert_allclose(mirrored(network, (2,))(image)[0], image + 1.5, rtol=1e-6)
    np.testing.assert_allclose(mirrored(network, (0, 1, 2))(image)[0], image + 1.5, rtol=1e-5)
    assert mirrored(network, ()) is network


PATCH, UNIT = (40, 224, 192), (8, 32, 32)


def voxels(shape: tuple[int, int, int], window: tuple[int, int, int]) -> int:
    """That the network computes for an image."""
    return Layout.of(shape, window, 0.9).windows * int(np.prod(window))


def test_a_fitted_window_is_the_patch_where_larger_ones_save_little() -> None:
    for shape in ((40, 224, 192), (10, 100, 100), (110, 224, 192), (76, 200, 350)):
        assert fitted_window(shape, PATCH, 0.9, UNIT) == PATCH


def test_larger_windows_take_the_place_of_overlap_and_of_what_lies_beyond_the_image() -> None:
    assert fitted_window((125, 205, 298), PATCH, 0.9, UNIT) == (48, 224, 320)  # 3 windows for 8, a quarter fewer voxels
    assert fitted_window((41, 100, 100), PATCH, 0.9, UNIT) == (48, 224, 192)  # 1 for 2


def test_a_fitted_window_keeps_to_the_growth_that_is_allowed() -> None:
    assert fitted_window((125, 205, 298), PATCH, 0.9, UNIT, 1.7) == (40, 224, 320)  # 4 windows, 5/3 of the patch
    assert fitted_window((125, 205, 298), PATCH, 0.9, UNIT, 1.0) == PATCH


def test_a_fitted_window_keeps_to_unit_memory_and_gain() -> None:
    r = np.random.default_rng(0)
    grown = 0
    for _ in range(200):
        shape = tuple(int(n) for n in r.integers((1, 50, 50), (300, 500, 500)))
        found = fitted_window(shape, PATCH, 0.9, UNIT)
        grown += found != PATCH
        assert all(n >= p and (n - p) % u == 0 for n, p, u in zip(found, PATCH, UNIT))
        assert np.prod(found) <= 2 * np.prod(PATCH)
        assert found == PATCH or voxels(shape, found) <= 0.85 * voxels(shape, PATCH)
    assert grown > 20


def test_without_overlap_to_save_no_window_grows() -> None:
    assert fitted_window((80, 448, 384), PATCH, 1.0, UNIT) == PATCH
