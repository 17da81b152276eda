import numpy as np
import pytest

from inference.body import body_box
from train.phantom import Disease, Grid, generate
from train.phantom.body import Body

SPACING = (5.0, 2.0, 2.0)


def scan(shape: tuple[int, int, int] = (20, 160, 200)) -> np.ndarray:
    """Air with a body of fat and water in rows 40-109, columns 60-149, and a table under it."""
    voxels = np.full(shape, -1000, np.int16)
    voxels[:, 40:110, 60:150] = -100
    voxels[:, 60:90, 80:130] = 40
    voxels[:, 115:117, 10:190] = 80
    voxels[:, 60:90, 95:100] = -800
    return voxels


def test_the_box_holds_the_body_and_a_margin_but_neither_air_nor_table() -> None:
    rows, columns = body_box(scan(), SPACING, (0, 0))
    assert 30 <= rows.start <= 36
    assert 112 <= rows.stop <= 122
    assert 50 <= columns.start <= 56
    assert 154 <= columns.stop <= 162


def test_the_box_is_as_large_as_a_window_where_the_scan_is() -> None:
    rows, columns = body_box(scan(), SPACING, (250, 1000))
    assert rows.stop - rows.start == 125
    assert (columns.start, columns.stop) == (0, 200)
    low = np.roll(scan(), -38, axis=1)
    rows, _ = body_box(low, SPACING, (250, 0))
    assert (rows.start, rows.stop) == (0, 125)


@pytest.mark.parametrize("value", [-1000, 50], ids=["air", "water"])
def test_without_air_or_without_a_body_the_box_is_the_field_of_view(value: int) -> None:
    voxels = np.full((4, 50, 60), value, np.int16)
    rows, columns = body_box(voxels, SPACING, (0, 0))
    assert voxels[:, rows, columns].shape == voxels.shape


def test_thin_and_tiny_scans_have_a_box() -> None:
    for shape in ((1, 1, 1), (1, 3, 200), (3, 2, 2)):
        voxels = np.full(shape, 40, np.int16)
        rows, columns = body_box(voxels, (5.0, 0.7, 0.7), (300, 300))
        assert voxels[:, rows, columns].shape == shape


@pytest.mark.parametrize("seed", range(6))
def test_no_organ_of_a_phantom_lies_outside(seed: int) -> None:
    body = Body.draw(seed)
    wide, deep = body.half_width * 1.4, body.half_depth * 1.7
    grid = Grid.covering((-120, -deep, -wide), (body.dome_right + 20, deep, wide), (8.0, 4.0, 4.0))
    phantom = generate(seed, grid, Disease())
    box = body_box(phantom.hu, phantom.spacing, (0, 0))
    cropped = phantom.labels[:, box[0], box[1]]
    assert np.count_nonzero(cropped) == np.count_nonzero(phantom.labels)
    assert cropped.size < 0.85 * phantom.labels.size
