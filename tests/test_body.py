import numpy as np
import pytest

from inference.body import Windows, find_body
from inference.resample import working_shape
from inference.sliding_window import Layout
from inference.volume import Spacing
from train.phantom import Disease, Grid, generate
from train.phantom.body import Body

SPACING = (5.0, 2.0, 2.0)
# A box is never longer for these, nor is its margin less.
FREE = (Windows(1, 1000.0, 1.0), Windows(1, 1000.0, 1.0))


def body_box(voxels: np.ndarray, spacing: Spacing, windows: tuple[Windows, Windows]) -> tuple[slice, slice]:
    rows, columns = (extent.span(along) for extent, along in zip(find_body(voxels, spacing), windows))
    return rows, columns


def scan(shape: tuple[int, int, int] = (20, 160, 200)) -> np.ndarray:
    """Air with a body of fat and water in rows 40-109, columns 60-149, and a table under it."""
    voxels = np.full(shape, -1000, np.int16)
    voxels[:, 40:110, 60:150] = -100
    voxels[:, 60:90, 80:130] = 40
    voxels[:, 115:117, 10:190] = 80
    voxels[:, 60:90, 95:100] = -800
    return voxels


def test_the_box_holds_the_body_and_a_margin_but_neither_air_nor_table() -> None:
    rows, columns = body_box(scan(), SPACING, FREE)
    assert 30 <= rows.start <= 36
    assert 112 <= rows.stop <= 122
    assert 50 <= columns.start <= 56
    assert 154 <= columns.stop <= 162


def test_the_box_is_as_large_as_a_window_where_the_scan_is() -> None:
    rows, columns = body_box(scan(), SPACING, (Windows(125, 0.9, 2.0), Windows(500, 0.9, 2.0)))
    assert rows.stop - rows.start == 125
    assert (columns.start, columns.stop) == (0, 200)
    low = np.roll(scan(), -38, axis=1)
    rows, _ = body_box(low, SPACING, (Windows(125, 0.9, 2.0), FREE[1]))
    assert (rows.start, rows.stop) == (0, 125)


def windows_of(box: tuple[slice, slice], windows: Windows) -> list[int]:
    """How many windows the box takes along y and x."""
    shape = (20, *(part.stop - part.start for part in box))
    patch = (8, windows.patch, windows.patch)
    layout = Layout.of(working_shape(shape, SPACING, (4.0, windows.voxel, windows.voxel)), patch, windows.step)
    return [len(starts) for starts in layout.starts[1:]]


def test_the_margin_gives_way_where_less_of_it_saves_a_window() -> None:
    # The body takes 140 mm in rows, 180 mm in columns; twice 16 mm of margin, and a window of 163 mm is not enough.
    windows = Windows(102, 0.25, 1.6)
    found = body_box(scan(), SPACING, (windows, windows))
    assert windows_of(found, windows) == [1, 2]
    assert (found[0].start, found[0].stop) <= (39, 112)
    assert found[0].stop > 110
    assert found[1].start < 60
    assert found[1].stop > 150


def test_a_box_of_one_window_takes_one_window_whatever_the_two_grids() -> None:
    for patch in range(85, 100):
        windows = Windows(patch, 0.9, 2.3)
        found = body_box(scan(), SPACING, (windows, windows))
        assert windows_of(found, windows) == [1, 1], patch
        assert found[0].stop - found[0].start >= int(patch * 2.3 / 2)


@pytest.mark.parametrize("value", [-1000, 50], ids=["air", "water"])
def test_without_air_or_without_a_body_the_box_is_the_field_of_view(value: int) -> None:
    voxels = np.full((4, 50, 60), value, np.int16)
    rows, columns = body_box(voxels, SPACING, FREE)
    assert voxels[:, rows, columns].shape == voxels.shape


def test_thin_and_tiny_scans_have_a_box() -> None:
    for shape in ((1, 1, 1), (1, 3, 200), (3, 2, 2)):
        voxels = np.full(shape, 40, np.int16)
        rows, columns = body_box(voxels, (5.0, 0.7, 0.7), (Windows(100, 0.9, 3.0), Windows(100, 0.9, 3.0)))
        assert voxels[:, rows, columns].shape == shape


@pytest.mark.parametrize("seed", range(6))
def test_no_organ_of_a_phantom_lies_outside(seed: int) -> None:
    body = Body.draw(seed)
    wide, deep = body.half_width * 1.4, body.half_depth * 1.7
    grid = Grid.covering((-120, -deep, -wide), (body.dome_right + 20, deep, wide), (8.0, 4.0, 4.0))
    phantom = generate(seed, grid, Disease())
    box = body_box(phantom.hu, phantom.spacing, FREE)
    cropped = phantom.labels[:, box[0], box[1]]
    assert np.count_nonzero(cropped) == np.count_nonzero(phantom.labels)
    assert cropped.size < 0.85 * phantom.labels.size
