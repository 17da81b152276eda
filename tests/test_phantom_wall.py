"""The wall of the abdomen in layers."""

import numpy as np
import pytest

from train.phantom import Grid
from train.phantom.anatomy.wall import Wall
from train.phantom.body import Body, field, stream
from train.phantom.canvas import Canvas
from train.phantom.tissue import T

GRID = Grid.covering((-40, -170, -200), (0, 170, 200), (10, 1.5, 1.5))


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_straight_muscles_in_front_flat_ones_at_the_sides(seed: int) -> None:
    body = Body.draw(seed)
    f = field(body, seed)
    canvas = Canvas(GRID, f.lattice, f.displacement, f.turn)
    muscle, cavity = f.lattice.on(GRID, f.muscle), f.lattice.on(GRID, f.cavity)
    canvas.tissue[muscle > 0] = T.MUSCLE
    canvas.tissue[cavity > 0] = T.FAT
    Wall.draw(body, stream(seed, "wall")).layer(canvas.tissue, canvas.points[:2], muscle, cavity)
    wall = (muscle > 0) & (cavity <= 0)
    fat = canvas.tissue == T.SUBCUTANEOUS
    assert not (fat & ~wall).any()
    assert 0.02 < fat[wall].mean() < 0.4
    x, y = canvas.points[0], canvas.points[1]
    across = np.abs(x) / body.cavity_half_width
    front = wall & (y < 0)
    assert fat[front & (across < 0.01)].mean() > 0.3  # the white line
    assert fat[front & (across > 0.2) & (across < 0.35)].mean() < 0.12  # the straight muscles' bellies
    assert (fat & front & (across > 0.75)).any()  # between the flat muscles
