"""The layers of the abdominal wall: straight muscles in front, three flat ones at the sides, fat between them."""

import numpy as np
from numpy.typing import NDArray

from train.phantom.body import Body
from train.phantom.canvas import Canvas, Floats
from train.phantom.tissue import T


def layer(canvas: Canvas, body: Body, muscle: Floats, cavity: Floats, r: np.random.Generator) -> None:
    """Turn a wall of plain MUSCLE into layers. ``muscle``, ``cavity``: mm below its outer and above its inner face.

    Its fat is SUBCUTANEOUS: what is painted into the abdomen's fat must not enter the wall.
    """
    fatness = 0.4 + body.visceral
    planes, thickness = r.uniform((0.28, 0.6), (0.42, 0.76)), r.uniform(0.25, 1.1, 2) * fatness
    edge, gap, taper = r.uniform(0.5, 0.62), r.uniform(0.02, 0.07) * fatness + 0.01, r.uniform(0.3, 0.7)
    at = np.flatnonzero((muscle > 0) & (cavity <= 0))
    outer, inner = muscle.ravel()[at], cavity.ravel()[at]
    wall = outer - inner
    depth = outer / wall
    x, y = canvas.points[0].ravel()[at], canvas.points[1].ravel()[at]
    across = np.abs(x) / np.float32(body.cavity_half_width)
    front = (y < 0) & (across < edge)
    flat = np.zeros(len(at), bool)
    for plane, half in zip(planes, thickness, strict=True):
        flat |= np.abs(depth - np.float32(plane)) * wall < half
    along = np.clip((across - gap) / (edge - gap), 0, 1)
    belly = (1 - (2 * along - 1) ** 2) ** np.float32(taper)
    straight = np.abs(depth - np.float32(0.5)) * wall > np.maximum(0.5 * belly * wall, 1.0)
    fat: NDArray[np.bool_] = np.where(front, straight, flat & (across > edge + 0.04))
    canvas.tissue.reshape(-1)[at[fat]] = T.SUBCUTANEOUS
