"""The organs and what lies around them, placed against a Body and painted from the back of the scene to the front.

Positions (x, y, z) are mm in body coordinates (canvas.py). Every random number is drawn whether or not the grid holds
the structure, so one seed is one person at any grid and field of view. Priors: adult organ volumes and typical CT
anatomy; sizes are set by volume where a shape allows it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from train.phantom.anatomy.gut import Gut
from train.phantom.body import Body, Field, _layers, stream
from train.phantom.canvas import Canvas, Coat, Composite, Ellipsoid, Floats, Points, Sampler, Tube, through
from train.phantom.disease import Disease, LesionTissue
from train.phantom.tissue import LUMEN, T

Doubles = NDArray[np.float64]
ANY_BODY = (T.SUBCUTANEOUS, T.FAT, T.MEDIASTINAL, T.MUSCLE, T.CARTILAGE)

# Adult volumes, mL: median, SD of the logarithm, least, most that a target is drawn from (docs/phantoms.md has sources).
TARGETS: dict[str, tuple[float, float, float, float]] = {
    "liver": (1500, 0.19, 980, 2200),
    "spleen": (195, 0.32, 100, 315),
    "right_kidney": (165, 0.18, 108, 240),
    "left_kidney": (171, 0.18, 110, 246),
    "pancreas": (78, 0.27, 42, 130),
    "gallbladder": (30, 0.45, 9, 66),
    "stomach": (270, 0.55, 95, 720),
    "right_adrenal_gland": (3.8, 0.28, 1.8, 5.4),
    "left_adrenal_gland": (4.4, 0.28, 2.0, 5.9),
    "duodenum": (70, 0.33, 34, 135),
}
CONTRACTED = 0.1  # share of people whose gallbladder has emptied, as after a meal


@dataclass(frozen=True)
class Hug:
    """How a soft organ fills the gap below ``wall`` and ``diaphragm``: by so many mm there, by none 45 mm below them.

    ``side`` that the organ lies on: -1 right, 1 left.
    """

    side: int
    wall: float
    diaphragm: float

    @property
    def most(self) -> float:
        """mm that a surface can move."""
        return max(self.wall, self.diaphragm)

    def pull(self, x: Floats, below_wall: Floats, below_diaphragm: Floats) -> Floats:
        """mm that the surface moves outwards at points ``x`` to the left of the body's middle, at two depths (mm)."""
        out = np.maximum(self._ramp(below_wall, self.wall), self._ramp(below_diaphragm, self.diaphragm))
        out *= np.clip(x * np.float32(self.side / 30), 0, 1)
        return out

    @staticmethod
    def _ramp(depth: Floats, most: float) -> Floats:
        return np.asarray(np.clip(1 - depth / np.float32(45), 0, 1) * np.float32(most), np.float32)


class Scene:
    """One body on its way to be painted: measures, random numbers, and what a region leaves for those that come after."""

    atrium: Doubles  # where the vena cava ends
    pylorus: tuple[float, float, float]
    cardia: Doubles
    liver: Composite
    porta: Doubles  # porta hepatis
    hilum: Doubles  # of the spleen
    renal: dict[str, tuple[Composite, Composite]]  # parenchyma and sinus of each kidney
    lowered: dict[str, float]  # mm that each kidney lies below where its adrenal gland has stayed
    crura: dict[int, Tube]  # of the diaphragm: -1 right, 1 left
    arms: list[Doubles]  # those beside the body: points (x, y, z) along the bones in the scan, upwards
    aorta: Tube
    cava: Tube
    confluence: Doubles  # of the portal vein
    splenic: list[Doubles]  # course of the splenic vein
    bile: Tube  # common bile duct

    def __init__(self, seed: int, body: Body, field: Field, canvas: Canvas, disease: Disease) -> None:
        self.r = stream(seed, "anatomy")
        self.body, self.field, self.canvas, self.disease = body, field, canvas, disease
        self.half = body.cavity_half_width
        self.ax = self.half / 132
        self.ay = (body.cavity_front + body.cavity_back) / 168
        self.lift = body.dome_right - 132
        self.gut = Gut(seed, body, canvas, self.lift)
        self.wall, self.viscera = stream(seed, "wall"), stream(seed, "viscera")
        self.retro = stream(seed, "renal")  # behind the peritoneum: outline of the kidneys, crura
        self.variants = stream(seed, "variants")  # wide antra, low kidneys, lobes of the spleen, thin adrenal glands
        self.branches = stream(seed, "small vessels")  # in the fat, and nodes of lymph
        # How far the liver reaches back above the right kidney, from 0 to 1.
        self.covered = float(stream(seed, "bare area").random())
        self.renal, self.lowered, self.crura, self.arms = {}, {}, {}, []
        # mm of fat between neighbours
        self.gap = float(self.r.uniform(0.2, 1.0) + 4.5 * body.visceral**1.3 * self.r.uniform(0.6, 1.3))
        self.shapes: dict[str, Ellipsoid | Tube] = {}
        self.lesions: dict[int, LesionTissue] = {}
        self.hips: dict[int, tuple[float, float, float]] = {}
        size = (self.ax * self.ay) ** 0.5  # broad people have large organs
        self.targets = {
            name: float(np.clip(mean * size * np.exp(self.r.normal(0, sd)), low, high))
            for name, (mean, sd, low, high) in TARGETS.items()
        }
        meal = stream(seed, "meal")
        if meal.random() < CONTRACTED:
            self.targets["gallbladder"] = float(meal.uniform(3, 10))
        if disease.enlarged_spleen:
            self.targets["spleen"] = float(stream(seed, "lesions").uniform(400, 800))

    def n(self, mean: float, sd: float) -> float:
        return float(np.clip(self.r.normal(mean, sd), mean - 2.2 * sd, mean + 2.2 * sd))

    def u(self, low: float, high: float) -> float:
        return float(self.r.uniform(low, high))

    def grown_target(self, name: str, points: Doubles) -> float:
        """The volume in body space, mL, that an organ around ``points`` needs to measure its target in the scan."""
        x, y, z = np.asarray(points, float).reshape(-1, 3).T
        return self.targets[name] * float(self.field.growth_at(x, y, z).mean())

    def gas(self, lumen: Tube, wall: float, share: float) -> float:
        """Height y in the scan above (in front of) which ``share`` of a hollow organ's lumen lies."""
        return float(np.quantile(self.field.in_scan(lumen.lumen(wall))[:, 1], share))

    def clear(self, shape: Ellipsoid | Tube | Composite, over: Sequence[int]) -> None:
        """Push neighbours off by the width of the fat between organs; bowel that is cut gets its wall back."""
        wall = (-self.gap - 2.6, T.BOWEL_WALL, [t for t in over if t in LUMEN])
        self.canvas.paint_in_turn(shape, (wall, (-self.gap, T.FAT, over)))

    def course(self, points: Sequence[ArrayLike], jitter: float, per_span: int = 4) -> Doubles:
        p = np.asarray(points, float)
        return through(p + self.r.normal(0, jitter, p.shape).clip(-2 * jitter, 2 * jitter), per_span)

    def fit(self, at: Callable[[float], Composite], millilitres: float, hug: Hug, most: float = 1.6) -> float:
        """Scale of a shape at which its part inside the abdominal cavity measures ``millilitres`` in the scan."""
        cavity = self._cavity(at(most), hug)
        lowest, highest = 0.5, most
        for _ in range(8):
            middle = (lowest + highest) / 2
            lowest, highest = (middle, highest) if cavity.volume(at(middle)) < millilitres else (lowest, middle)
        return (lowest + highest) / 2

    def room(self, shape: Composite, hug: Hug) -> float:
        """mL that a shape measures in the scan inside the abdominal cavity."""
        return self._cavity(shape, hug).volume(shape)

    def _cavity(self, shape: Composite, hug: Hug) -> "_Cavity":
        step = 7.0
        low, high = shape.bounds()
        axes = [np.arange(lo, hi, step) for lo, hi in zip(low, high, strict=True)]
        x, y, z = (a.ravel() for a in np.meshgrid(*axes, indexing="ij"))
        wall, under = _layers(self.body, x, y, z)[2], self.body.dome(x, y) - z
        keep = (wall > 0) & (under > 3)
        growth = self.field.growth_at(x[keep], y[keep], z[keep])
        points = (x[keep].astype(np.float32), y[keep].astype(np.float32), z[keep].astype(np.float32))
        pull = hug.pull(points[0], *(depth[keep].astype(np.float32) for depth in (wall, under)))
        return _Cavity(points, pull, step**3 / 1000 / growth)

    def paint_at_the_wall(self, shape: Composite, coats: Sequence[Coat], hug: Hug) -> None:
        """As ``Canvas.paint_in_turn``, but the shape's parts swell towards wall and diaphragm, and its holes stay."""
        c, lattice = self.canvas, self.field.lattice
        side = np.asarray(lattice.nodes(2), np.float32)  # of the scan's middle: near enough
        pull = hug.pull(np.broadcast_to(side, lattice.shape), self.field.cavity, -self.field.lung)
        sampler = Sampler(lattice, c.grid)
        parts = Composite(shape.parts)
        for box, e in c.distances(parts, (hug.most + max(-depth for depth, _, _ in coats)) * parts.slack):
            e -= sampler.at(pull, box)
            c.carve(box, e, shape.holes)
            c.coat(box, e, coats)


@dataclass(frozen=True)
class _Cavity:
    """Points in the abdominal cavity, the pull of its wall there in mm, and the mL in the scan that each stands for."""

    points: Points
    pull: Floats
    millilitres: Doubles

    def volume(self, shape: Composite) -> float:
        """mL of ``shape`` in the scan."""
        return float(self.millilitres[_swollen(shape, self.points, self.pull) < 0].sum())


def _swollen(shape: Composite, points: Points, pull: Floats) -> Floats:
    """Distance at ``points`` to a shape whose parts, not its holes, have swollen by ``pull`` mm there."""
    out = Composite(shape.parts).distance(points) - pull
    for hole in shape.holes:
        np.maximum(out, -hole.distance(points), out=out)
    return np.asarray(out, np.float32)
