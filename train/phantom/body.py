"""One person's build: outline, fat, wall, diaphragm, spine. Everything the organs are placed against, from the seed alone."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from train.phantom.canvas import LOW, Floats, Lattice, rotation

Doubles = NDArray[np.float64]

STREAMS = (
    "body",
    "deformation",
    "anatomy",
    "disease",
    "appearance",
    "texture",
    "noise",
    "view",
    "lesions",
    "scanner",
    "artefact",
    "slices",
    "gut",
    "wall",
    "renal",
    "viscera",
    "arms",
    "bare area",
    "meal",
    "variants",
    "small vessels",
)


def stream(seed: int, name: str) -> np.random.Generator:
    """The random numbers of one purpose, so that more draws for one never change another."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(STREAMS.index(name),)))


@dataclass(frozen=True)
class Body:
    """Lengths in mm. Half-axes of the skin's outline at the waist, layers of its wall, tops of the diaphragm."""

    half_width: float
    half_depth: float
    squareness: float  # exponent of the outline's superellipse
    fat_front: float
    fat_side: float
    fat_back: float
    wall_front: float
    wall_side: float
    wall_back: float
    widths: tuple[float, ...]  # factors of half_width at LEVELS
    dome_right: float
    dome_left: float
    spine_radius: float
    spine_shift: float
    tilt: tuple[float, float, float]  # radians about x, y, z
    female: bool
    visceral: float  # fat between the organs: 0 hardly any, 1 as much as there is room for
    bend: tuple[float, float, float, float]  # curves of the trunk: mm to the side, mm to the back, mm per turn, phase

    LEVELS = (-330.0, -170.0, -60.0, 40.0, 150.0, 300.0)

    @classmethod
    def draw(cls, seed: int) -> "Body":
        """The build that belongs to ``seed``."""
        r = stream(seed, "body")
        u = r.uniform
        female = bool(r.random() < 0.5)
        frame = float(np.clip(r.normal(0.98 if female else 1.02, 0.055), 0.84, 1.16))
        girth = float(np.clip(r.normal(0, 1), -2, 2.2))
        # Women carry more of their fat under the skin, men between the organs.
        visceral = float(np.clip(0.4 + 0.2 * girth + (-0.07 if female else 0.07) + r.normal(0, 0.13), 0, 1))
        fat = float(np.clip(np.exp(np.log(19 if female else 15) + 0.42 * girth + r.normal(0, 0.3)), 2.5, 58))
        right = float(np.clip(r.normal(132, 11), 105, 158))
        fats = (fat * u(0.75, 1.3), fat * u(0.45, 0.95), fat * u(0.6, 1.15) + u(0, 4))
        walls = (u(6, 13), u(10, 19), u(9, 16))
        front = 86 * frame * (0.8 + 0.55 * visceral) * u(0.95, 1.05)
        back = 76 * frame * (0.93 + 0.15 * visceral) * u(0.96, 1.04)
        side = 130 * frame * (0.94 + 0.16 * visceral) * u(0.96, 1.05)
        turned = r.random() < 0.12  # lying askew
        return cls(
            half_width=side + fats[1] + walls[1],
            half_depth=(front + back + fats[0] + fats[2] + walls[0] + walls[2]) / 2,
            squareness=u(2.05, 2.6),
            fat_front=fats[0],
            fat_side=fats[1],
            fat_back=fats[2],
            wall_front=walls[0],
            wall_side=walls[1],
            wall_back=walls[2],
            widths=(
                (1.06 if female else 1.0) * u(0.95, 1.06),
                (1.07 if female else 1.0) * u(0.96, 1.06),
                (0.95 if female else 0.99) * u(0.95, 1.05),
                0.99,
                0.99 * u(0.97, 1.03),
                0.95 * u(0.95, 1.03),
            ),
            dome_right=right,
            dome_left=right - u(2, 26),
            spine_radius=float(np.clip((20.5 if female else 22.5) * frame + r.normal(0, 0.8), 18, 26)),
            spine_shift=u(-5, 5),
            tilt=(float(r.normal(0, 0.035)), float(r.normal(0, 0.03)), float(r.normal(0, 0.11 if turned else 0.04))),
            female=female,
            visceral=visceral,
            bend=(float(r.normal(0, 4.5)), float(r.normal(0, 4)), u(330, 600), u(0, 2 * np.pi)),
        )

    # --- the wall, layer by layer, along rays from the body's axis; c, s: cosine and sine of the ray (x, y)

    def skin(self, c: Doubles, s: Doubles, z: Doubles) -> Doubles:
        """Radius of the skin."""
        bx = self.half_width * np.interp(z, self.LEVELS, self.widths)
        by = self.half_depth * np.interp(z, (-330, -150, 0, 150, 300), (1.0, 0.97, 1.0, 1.03, 1.0))
        by = by * (1 - 0.05 * s)
        p = self.squareness
        return np.asarray(((np.abs(c) / bx) ** p + (np.abs(s) / by) ** p) ** (-1 / p))

    @staticmethod
    def _around(front: float, side: float, back: float, s: Doubles) -> Doubles:
        return np.asarray(side + (front - side) * np.clip(-s, 0, 1) ** 2 + (back - side) * np.clip(s, 0, 1) ** 2)

    def fat(self, s: Doubles) -> Doubles:
        """Thickness of the subcutaneous fat."""
        return self._around(self.fat_front, self.fat_side, self.fat_back, s)

    def wall(self, s: Doubles) -> Doubles:
        """Thickness of the muscular wall."""
        return self._around(self.wall_front, self.wall_side, self.wall_back, s)

    def wall_point(self, angle: float, z: float, depth: float) -> tuple[float, float, float]:
        """A point in the wall: ``angle`` from the left side towards posterior, ``depth`` 0 outer to 1 inner face."""
        c, s = np.array(np.cos(angle)), np.array(np.sin(angle))
        r = float(self.skin(c, s, np.array(z)) - self.fat(s) - depth * self.wall(s))
        return r * float(c), r * float(s), z

    @property
    def cavity_half_width(self) -> float:
        """Half the inner width at the waist."""
        return self.half_width - self.fat_side - self.wall_side

    @property
    def cavity_front(self) -> float:
        """Distance from the axis to the anterior inner wall."""
        return self.half_depth * 1.05 - self.fat_front - self.wall_front

    @property
    def cavity_back(self) -> float:
        """Distance from the axis to the posterior inner wall."""
        return self.half_depth * 0.95 - self.fat_back - self.wall_back

    def spine(self, z: float) -> tuple[float, float, float]:
        """Centre of the vertebral bodies at height ``z``: lumbar lordosis, thoracic kyphosis, sacrum to the back."""
        base = 0.34 * self.cavity_back + self.spine_shift
        y = np.interp(z, (-300, -250, -180, -90, -20, 60, 160, 330), (55, 48, 14, -4, -5, 2, 14, 20))
        return 0.0, float(base + y), z

    def spine_front(self, z: float) -> float:
        """y of the anterior face of the vertebral bodies."""
        return self.spine(z)[1] - self.spine_radius * float(np.interp(z, (-100, 40, 200), (0.95, 0.9, 0.8)))

    def dome(self, x: Doubles, y: Doubles) -> Doubles:
        """Height of the diaphragm: two domes, steep to the back and the sides, shallow between."""
        heights = []
        for side, top in ((-1, self.dome_right), (1, self.dome_left)):
            half = self.cavity_half_width
            lateral = (x * side - 0.5 * half) / (0.5 * half)
            dy = y + 8
            drop = np.where(lateral > 0, 62 * lateral**2, 24 * lateral**2)
            drop = drop + np.where(dy > 0, 92 * (dy / self.cavity_back) ** 2, 34 * (dy / self.cavity_front) ** 2)
            heights.append(top - drop)
        gap = np.abs(heights[0] - heights[1])
        return np.asarray(np.maximum(heights[0], heights[1]) + 6 * np.exp(-gap / 12))


@dataclass(frozen=True)
class Field:
    """Control arrays on ``lattice``: the deformation (x, y, z), and the layers of the body, in mm, positive inside."""

    lattice: Lattice
    turn: NDArray[np.float64]
    displacement: tuple[Floats, Floats, Floats]
    skin: Floats
    muscle: Floats
    cavity: Floats
    lung: Floats  # height above the diaphragm
    growth: Floats  # how many times its volume in the scan a piece of tissue takes up in body coordinates

    def growth_at(self, x: Doubles, y: Doubles, z: Doubles) -> Doubles:
        """``growth`` around points in body mm: a shape of volume V there measures about V / growth in the scan."""
        turned = np.stack([self.turn[0, k] * x + self.turn[1, k] * y + self.turn[2, k] * z for k in range(3)])
        index = np.rint((turned - LOW[:, None]) / self.lattice.step).astype(int)
        for k in range(3):
            np.clip(index[k], 0, self.growth.shape[2 - k] - 1, out=index[k])
        return np.asarray(self.growth[index[2], index[1], index[0]], np.float64)

    def in_scan(self, points: Doubles) -> Doubles:
        """Where ``points`` (n, 3) of the body lie in the scan, (x, y, z) mm, to about a millimetre."""
        found = np.asarray(points, np.float64) @ self.turn
        for _ in range(3):
            index = np.rint((found - LOW) / self.lattice.step).astype(int).T
            i, j, k = (np.clip(index[a], 0, self.lattice.shape[2 - a] - 1) for a in range(3))
            moved = np.stack([d[k, j, i] for d in self.displacement], 1)
            found = (np.asarray(points, np.float64) - moved) @ self.turn
        return np.asarray(found, np.float64)


def _layers(body: Body, x: Doubles, y: Doubles, z: Doubles) -> tuple[Doubles, Doubles, Doubles]:
    r = np.maximum(np.hypot(x, y), 1.0)
    c, s = x / r, y / r
    skin = body.skin(c, s, z) - r
    muscle = skin - body.fat(s)
    return skin, muscle, muscle - body.wall(s)


def field(body: Body, seed: int) -> Field:
    """Smooth random deformation (SD 3-7 mm at 70 mm, 1-2.5 mm at 26 mm; little of it at the skin), bends of the
    trunk, and the layers."""
    r = stream(seed, "deformation")
    lattice = Lattice(8.0)
    nodes = [lattice.nodes(k) for k in range(3)]
    z, y, x = np.meshgrid(*nodes, indexing="ij")
    turn = rotation(*body.tilt)
    x, y, z = (turn[k, 0] * x + turn[k, 1] * y + turn[k, 2] * z for k in range(3))
    inside = np.clip((_layers(body, x, y, z)[0] - 5) / 40, 0, 1)
    coarse_amplitude, fine_amplitude = r.uniform(3, 6.5), r.uniform(0.8, 2.2)
    moved = []
    for p, bend in zip((x, y, z), _bends(body, z), strict=True):
        coarse = _smooth_noise(r, 70.0, lattice) * coarse_amplitude
        fine = _smooth_noise(r, 26.0, lattice) * fine_amplitude
        moved.append(((coarse + bend) * (0.4 + 0.6 * inside) + fine * inside, p))
    bx, by, bz = (p + d for d, p in moved)
    skin, muscle, cavity = (layer.astype(np.float32) for layer in _layers(body, bx, by, bz))
    lung = (bz - body.dome(bx, by)).astype(np.float32)
    d = [m[0].astype(np.float32) for m in moved]
    return Field(lattice, turn, (d[0], d[1], d[2]), skin, muscle, cavity, lung, _growth(turn, d, lattice.step))


def _growth(turn: NDArray[np.float64], displacement: list[Floats], step: float) -> Floats:
    """Determinant of the map from scan to body at the nodes of the lattice."""
    slopes = [np.gradient(d, step) for d in displacement]  # along z, y, x
    (a, b, c), (d, e, f), (g, h, i) = ([slopes[r][2 - k] + turn[r, k] for k in range(3)] for r in range(3))
    return np.asarray(a * (e * i - f * h) - b * (d * i - f * g) + c * (d * h - e * g), np.float32)


def _bends(body: Body, z: Doubles) -> tuple[Doubles, Doubles, Doubles]:
    """Curves of the spine and all that hangs on it: scoliosis, more or less lordosis."""
    side, back, turn, phase = body.bend
    angle = 2 * np.pi * z / turn + phase
    return side * np.sin(angle), back * np.cos(angle), np.zeros_like(z)


def _smooth_noise(r: np.random.Generator, step: float, onto: Lattice) -> Floats:
    """Noise of unit SD with control points every ``step`` mm, read at the nodes of a finer lattice."""
    source = Lattice(step)
    values = r.normal(size=source.shape).astype(np.float32)
    out = source.evaluate(values, onto.nodes(0), onto.nodes(1), onto.nodes(2))
    return np.asarray(out / max(float(out.std()), 1e-6), np.float32)
