"""Bowel: what it holds, where it lies, and that it never enters the wall of the abdomen."""

import numpy as np
import pytest

from train.phantom import Grid
from train.phantom.anatomy.gut import Gut
from train.phantom.body import Body, field
from train.phantom.canvas import Below, Canvas, Tube
from train.phantom.tissue import BOWEL, LUMEN, T

GRID = Grid.covering((-160, -120, -180), (120, 140, 180), (5, 3, 3))


def gut(seed: int) -> tuple[Gut, Canvas]:
    body = Body.draw(seed)
    shape_field = field(body, seed)
    canvas = Canvas(GRID, shape_field.lattice, shape_field.displacement, shape_field.turn)
    canvas.tissue[:] = T.MUSCLE
    canvas.tissue[shape_field.lattice.on(GRID, shape_field.cavity) > 0] = T.FAT
    return Gut(seed, body, canvas, 0.0), canvas


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_bowel_fills_fat_alone(seed: int) -> None:
    painter, canvas = gut(seed)
    muscle = canvas.tissue == T.MUSCLE
    painter.small_bowel()
    painter.colon()
    assert np.array_equal(canvas.tissue == T.MUSCLE, muscle)
    litres = np.isin(canvas.tissue, BOWEL).sum() * 45 / 1e6
    assert 0.4 < litres < 3.5
    assert np.isin(canvas.tissue, LUMEN).sum() > 0.3 * np.isin(canvas.tissue, BOWEL).sum()


def test_an_empty_piece_is_narrower_than_a_full_one_and_has_no_lumen() -> None:
    tube = Tube(np.array([(0.0, 0, -40), (0, 0, 40)]), 14.0)
    counts = []
    for collapses in (0.0, 1.0):
        painter, canvas = gut(5)
        painter.piece(tube, (T.STOOL,), (T.FAT,), collapses)
        counts.append([int((canvas.tissue == t).sum()) for t in (T.BOWEL_WALL, T.STOOL)])
    (wall, stool), (empty, none) = counts
    assert stool > 0
    assert none == 0
    assert wall + stool > 1.4 * empty > 0


def test_the_colon_runs_along_both_flanks_and_across() -> None:
    painter, canvas = gut(4)
    painter.colon()
    bowel = np.isin(canvas.tissue, BOWEL)
    x = GRID.coordinates(2)
    for z in (-100.0, -60.0):
        across = x[bowel[int(np.argmin(np.abs(GRID.coordinates(0) - z)))].any(0)]
        assert across.min() < -0.5 * painter.half
        assert across.max() > 0.5 * painter.half


def test_only_ascending_and_transverse_colon_press_into_the_liver() -> None:
    painter, canvas = gut(6)
    painter.colon()
    canvas.tissue[:] = T.LIVER
    painter.press_into_liver(Below((0, 0, 300), (0, 0)))
    x = GRID.coordinates(2)[(canvas.tissue != T.LIVER).any((0, 1))]
    assert painter.right_colon
    assert len(x) == 0 or x.min() < -0.4 * painter.half


def test_colon_does_not_press_deep_into_the_liver() -> None:
    face = Below((0, 0, -40), (0.3, 0.1))
    painter, canvas = gut(4)
    painter.colon()
    canvas.tissue[:] = T.LIVER
    painter.press_into_liver(face)
    pressed = np.isin(canvas.tissue, BOWEL)
    assert pressed.any()
    depths = face.distance(canvas.points)[pressed]
    assert float(depths.max()) < 12 + max(piece.tube.radii.max() for piece in painter.right_colon)
