"""The layers of the abdominal wall: straight muscles in front, three flat ones at the sides, fat between them."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from train.phantom.body import Body
from train.phantom.canvas import Floats
from train.phantom.tissue import T


@dataclass(frozen=True)
class Wall:
    """Where the fat in one body's wall lies.

    ``planes`` between the flat muscles, as parts of the wall's thickness, and their half ``thickness`` in mm; the straight
    muscles from ``gap`` to ``edge``, as parts of the cavity's half ``width`` (mm); ``taper`` of these towards both.
    """

    width: float
    planes: tuple[float, float]
    thickness: tuple[float, float]
    gap: float
    edge: float
    taper: float

    @classmethod
    def draw(cls, body: Body, r: np.random.Generator) -> "Wall":
        """One body's; more fat where there is much in the abdomen."""
        fatness = 0.4 + body.visceral
        return cls(
            width=body.cavity_half_width,
            planes=(float(r.uniform(0.28, 0.42)), float(r.uniform(0.6, 0.76))),
            thickness=(float(r.uniform(0.25, 1.1)) * fatness, float(r.uniform(0.25, 1.1)) * fatness),
            gap=float(r.uniform(0.02, 0.07)) * fatness + 0.01,
            edge=float(r.uniform(0.5, 0.62)),
            taper=float(r.uniform(0.3, 0.7)),
        )

    def layer(self, tissue: NDArray[np.uint8], points: tuple[Floats, Floats], muscle: Floats, cavity: Floats) -> None:
        """Lay fat into a wall of plain muscle. All arrays have one shape: body ``points`` x and y, and the depth in mm
        below the wall's outer face (``muscle``) and its inner one (``cavity``).

        The fat is SUBCUTANEOUS: what is painted into the abdomen's fat must not enter the wall.
        """
        at = np.flatnonzero((muscle > 0) & (cavity <= 0))
        outer, inner, x, y = (a.ravel()[at] for a in (muscle, cavity, *points))
        wall = outer - inner
        depth = outer / wall
        across = np.abs(x) / np.float32(self.width)
        flat = np.zeros(len(x), bool)
        for plane, half in zip(self.planes, self.thickness, strict=True):
            flat |= np.abs(depth - np.float32(plane)) * wall < half
        along = np.clip((across - np.float32(self.gap)) / np.float32(self.edge - self.gap), 0, 1)
        belly = (1 - (2 * along - 1) ** 2) ** np.float32(self.taper)
        straight = np.abs(depth - np.float32(0.5)) * wall > np.maximum(0.5 * belly * wall, 1.0)
        front = (y < 0) & (across < self.edge)
        fat = np.where(front, straight, flat & (across > self.edge + 0.04))
        tissue.reshape(-1)[at[fat]] = T.SUBCUTANEOUS
