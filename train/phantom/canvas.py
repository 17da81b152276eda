"""Draw shapes given in body millimetres on any voxel grid, under one smooth deformation.

Body coordinates are LPS: x to the patient's left, y to posterior, z to superior, zero between the vertebrae L1 and L2
at the body's centre. Points and axes of shapes are written (x, y, z); arrays are (z, y, x) as everywhere.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float32]
Value = TypeVar("Value", np.float32, np.uint8)
Points = tuple[Floats, Floats, Floats]
Box = tuple[slice, slice, slice]
Vector = tuple[float, float, float]
Coat = tuple[float, int, Sequence[int]]  # depth mm, tissue, what it may cover
Corners = tuple[NDArray[np.float64], NDArray[np.float64]]  # lowest and highest (x, y, z), mm

# The part of space in which a body may be drawn (x, y, z), mm.
LOW = np.array([-280.0, -230.0, -460.0])
HIGH = np.array([280.0, 230.0, 360.0])
SLAB, PIECE = 1 << 15, 1 << 19  # voxels that are measured, and painted, at a time
FEW = 8000  # voxels, below which it takes longer to find where a part lies than to measure it in all of them
UPRIGHT = np.eye(3)
CLOSE = 1e-8 + 1e-5 * UPRIGHT  # what two rotations may differ by and be one
COLUMNS = 64  # of a grid that a spline is evaluated in at a time


@dataclass(frozen=True)
class Grid:
    """A voxel grid in body space. ``shape``, ``spacing`` (mm) and ``origin`` (mm, centre of voxel 0) are (z, y, x)."""

    shape: tuple[int, int, int]
    spacing: Vector
    origin: Vector

    def __post_init__(self) -> None:
        if len(self.shape) != 3 or min(self.shape) < 1:
            raise ValueError(f"a grid needs three sizes of at least 1, not {self.shape}")
        if len(self.spacing) != 3 or not all(0 < s < 50 for s in self.spacing):
            raise ValueError(f"a grid needs three spacings between 0 and 50 mm, not {self.spacing}")

    def coordinates(self, axis: int) -> NDArray[np.float64]:
        """Voxel centres along ``axis`` (0 z, 1 y, 2 x), mm."""
        return np.asarray(self.origin[axis] + self.spacing[axis] * np.arange(self.shape[axis]), np.float64)

    @classmethod
    def covering(cls, low: Vector, high: Vector, spacing: Vector) -> "Grid":
        """The grid of ``spacing`` whose voxels fill the box from ``low`` to ``high``, all (z, y, x) in mm."""
        count = [max(1, round((h - lo) / s)) for lo, h, s in zip(low, high, spacing, strict=True)]
        start = [(lo + h - (n - 1) * s) / 2 for lo, h, n, s in zip(low, high, count, spacing, strict=True)]
        return cls((count[0], count[1], count[2]), spacing, (start[0], start[1], start[2]))


class Lattice:
    """Cubic B-spline control points at ``step`` mm over the whole body space: the same for every grid."""

    def __init__(self, step: float) -> None:
        self.step = step
        counts = np.ceil((HIGH - LOW) / step).astype(int) + 1
        self.shape = (int(counts[2]), int(counts[1]), int(counts[0]))

    def nodes(self, axis: int) -> NDArray[np.float64]:
        """Positions of the control points along ``axis`` (0 z, 1 y, 2 x), mm."""
        return np.asarray(float(LOW[2 - axis]) + self.step * np.arange(self.shape[axis]), np.float64)

    def basis(self, positions: NDArray[np.float64], axis: int) -> Floats:
        """Weights of the control points along ``axis`` at ``positions`` (mm): (positions, control points)."""
        t = (positions - LOW[2 - axis]) / self.step
        first = np.floor(t).astype(int)
        f = t - first
        weights = ((1 - f) ** 3, 3 * f**3 - 6 * f**2 + 4, -3 * f**3 + 3 * f**2 + 3 * f + 1, f**3)
        basis = np.zeros((len(t), self.shape[axis]), np.float32)
        rows = np.arange(len(t))
        for offset, weight in zip(range(-1, 3), weights, strict=True):
            np.add.at(basis, (rows, np.clip(first + offset, 0, self.shape[axis] - 1)), weight / 6)
        return basis

    def evaluate(
        self, values: Floats, z: NDArray[np.float64], y: NDArray[np.float64], x: NDArray[np.float64]
    ) -> Floats:
        """The spline through control ``values`` at every (z, y, x) of three coordinate vectors, as three products."""
        a = self.basis(z, 0) @ values.reshape(self.shape[0], -1)
        a = np.matmul(self.basis(y, 1), a.reshape(len(z), self.shape[1], self.shape[2]))
        a = a.reshape(-1, self.shape[2]) @ self.basis(x, 2).T
        return np.asarray(a.reshape(len(z), len(y), len(x)), np.float32)

    def on(self, grid: Grid, values: Floats) -> Floats:
        """The spline on a voxel grid."""
        return self.evaluate(values, grid.coordinates(0), grid.coordinates(1), grid.coordinates(2))


class Sampler:
    """Splines of one lattice on a voxel grid, piece by piece."""

    def __init__(self, lattice: Lattice, grid: Grid) -> None:
        self.shape = lattice.shape
        self._basis = [lattice.basis(grid.coordinates(k), k) for k in range(3)]
        self._size = grid.shape

    def at(self, values: Floats, box: Box) -> Floats:
        """The spline through control ``values`` in the voxels of ``box``."""
        z, y, x = (basis[cut] for basis, cut in zip(self._basis, box, strict=True))
        used = np.flatnonzero(z.any(0))
        near = slice(int(used[0]), int(used[-1]) + 1)  # control points above and below do not matter
        a = (z[:, near] @ values[near].reshape(near.stop - near.start, -1)).reshape(len(z), *self.shape[1:])
        a = np.matmul(y, a).reshape(-1, self.shape[2])
        out = np.empty((len(a), len(x)), np.float32)
        for first in range(0, len(x), COLUMNS):  # few control points matter to few columns
            block = slice(first, first + COLUMNS)
            used = np.flatnonzero(x[block].any(0))
            near = slice(int(used[0]), int(used[-1]) + 1)
            np.matmul(a[:, near], x[block, near].T, out=out[:, block])
        return out.reshape(len(z), len(y), len(x))

    def slabs(self) -> Iterator[Box]:
        """The whole grid, some slices at a time: small enough for the cache."""
        planes, rows, columns = self._size
        step = max(1, PIECE // (rows * columns))
        for first in range(0, planes, step):
            yield slice(first, min(first + step, planes)), slice(0, rows), slice(0, columns)


class Shape(Protocol):
    """Something that knows how far a point is from its surface."""

    def bounds(self) -> Corners:
        """Lowest and highest corner (x, y, z), mm."""

    def distance(self, points: Points) -> Floats:
        """About the distance in mm to the surface at points (x, y, z), negative inside."""

    @property
    def slack(self) -> float:
        """mm that the shape reaches out, at most, where its distance says 1 mm."""


def rotation(about_x: float, about_y: float, about_z: float) -> NDArray[np.float64]:
    """Rotation matrix from angles in radians, x first."""
    (ca, cb, cc), (sa, sb, sc) = np.cos([about_x, about_y, about_z]), np.sin([about_x, about_y, about_z])
    rx = np.array([[1, 0, 0], [0, ca, -sa], [0, sa, ca]])
    ry = np.array([[cb, 0, sb], [0, 1, 0], [-sb, 0, cb]])
    rz = np.array([[cc, -sc, 0], [sc, cc, 0], [0, 0, 1]])
    return np.asarray(rz @ ry @ rx)


def _dot(points: Sequence[Floats], direction: Floats) -> Floats:
    """Sum of three arrays times the three numbers of ``direction``."""
    out, more = points[0] * direction[0], points[1] * direction[1]
    out += more
    out += np.multiply(points[2], direction[2], out=more)
    return np.asarray(out, np.float32)


class Ellipsoid:
    """An ellipsoid, or with ``squareness`` towards 1 a fuller body (fourth powers)."""

    def __init__(self, centre: ArrayLike, axes: ArrayLike, angles: Vector = (0, 0, 0), squareness: float = 0.0) -> None:
        self.centre = np.asarray(centre, float)
        self.axes = np.maximum(np.asarray(axes, float), 0.5)
        self.turn = rotation(*angles)
        self.squareness = squareness

    def scaled(self, factor: float) -> "Ellipsoid":
        """The same body, ``factor`` times as long in every direction."""
        return self.grown(0.0, factor)

    def grown(self, margin: float, factor: float = 1.0) -> "Ellipsoid":
        """The same body with ``margin`` mm more on every half-axis."""
        other = Ellipsoid(self.centre, self.axes * factor + margin, squareness=self.squareness)
        other.turn = self.turn
        return other

    def at(self, *local: float) -> NDArray[np.float64]:
        """Body position of a point given in units of the half-axes."""
        return np.asarray(self.centre + self.turn @ (self.axes * np.asarray(local)))

    @property
    def volume(self) -> float:
        """mm3, without squareness."""
        return float(4 / 3 * np.pi * np.prod(self.axes))

    @property
    def slack(self) -> float:
        return float(self.axes.max() / self.axes.min())

    def bounds(self) -> Corners:
        half = np.sqrt(((self.turn * self.axes) ** 2).sum(1)) * (1 + 0.35 * self.squareness)
        return self.centre - half, self.centre + half

    def distance(self, points: Points) -> Floats:
        d = [p - np.float32(c) for p, c in zip(points, self.centre, strict=True)]
        matrix = (self.turn / self.axes).astype(np.float32)
        square: Floats | None = None
        fourth: Floats | None = None
        plain = bool((np.abs(self.turn - UPRIGHT) <= CLOSE).all())
        for k in range(3):
            u = d[k] * matrix[k, k] if plain else _dot(d, matrix[:, k])
            u *= u
            if self.squareness > 0:
                fourth = u * u if fourth is None else np.add(fourth, u * u, out=fourth)
            square = u if square is None else np.add(square, u, out=square)
        assert square is not None
        if fourth is not None:
            w = np.float32(self.squareness)
            square *= 1 - w
            fourth *= w
            square += fourth
        out = np.sqrt(square, out=square)
        out -= np.float32(1)
        out *= np.float32(self.axes.min())
        return np.asarray(out, np.float32)


def through(points: Sequence[ArrayLike] | NDArray[np.float64], per_span: int = 4) -> NDArray[np.float64]:
    """A Catmull-Rom curve through ``points``, ``per_span`` pieces between two of them."""
    p = np.asarray(points, float)
    p = np.vstack([2 * p[0] - p[1], p, 2 * p[-1] - p[-2]])
    t = np.arange(per_span)[:, None] / per_span
    spans = [
        0.5 * (2 * b + (c - a) * t + (2 * a - 5 * b + 4 * c - d) * t**2 + (3 * b - a - 3 * c + d) * t**3)
        for a, b, c, d in zip(p[:-3], p[1:-2], p[2:-1], p[3:], strict=True)
    ]
    return np.vstack([*spans, p[-2:-1]])


class Tube:
    """A chain of cones with round ends. ``stretch`` > 1 along an axis widens the cross-section in that direction.

    ``stretch`` is one (x, y, z) for the whole tube, or one for every point: (points, 3).
    """

    def __init__(self, points: NDArray[np.float64], radii: ArrayLike, stretch: ArrayLike = (1, 1, 1)) -> None:
        self.points = np.asarray(points, float)
        r = np.atleast_1d(np.asarray(radii, float))
        self.radii = np.interp(np.linspace(0, 1, len(self.points)), np.linspace(0, 1, len(r)), r)
        self.stretch = np.asarray(stretch, float)

    @property
    def volume(self) -> float:
        """mm3: the cones and half a ball at either end, without overlaps in bends."""
        stretch = np.broadcast_to(self.stretch, self.points.shape)
        middle = (stretch[:-1] + stretch[1:]) / 2
        lengths = np.linalg.norm(np.diff(self.points, axis=0) / middle, axis=1)
        a, b = self.radii[:-1], self.radii[1:]
        ends = 2 / 3 * np.pi * (self.radii[[0, -1]] ** 3 * stretch[[0, -1]].prod(1)).sum()
        return float((np.pi / 3 * lengths * (a * a + a * b + b * b) * middle.prod(1)).sum() + ends)

    def of_cone(self, i: int) -> NDArray[np.float64]:
        """Stretch of the ``i``-th cone."""
        return np.asarray(self.stretch if self.stretch.ndim == 1 else self.stretch[i : i + 2].mean(0))

    def part(self, first: int, stop: int) -> "Tube":
        """The tube from point ``first`` up to, not including, point ``stop``."""
        stretch = self.stretch if self.stretch.ndim == 1 else self.stretch[first:stop]
        return Tube(self.points[first:stop], self.radii[first:stop], stretch)

    def of_volume(self, millilitres: float) -> "Tube":
        """The same course, radii scaled until the volume fits."""
        low, high = 0.1, 5.0
        for _ in range(20):
            factor = (low * high) ** 0.5
            low, high = (factor, high) if self.wide(factor).volume < millilitres * 1000 else (low, factor)
        return self.wide((low * high) ** 0.5)

    def wide(self, factor: float) -> "Tube":
        """The same course, radii times ``factor``."""
        return Tube(self.points, self.radii * factor, self.stretch)

    def grown(self, margin: float) -> "Tube":
        """The same course, radii plus ``margin`` mm."""
        return Tube(self.points, self.radii + margin, self.stretch)

    def bumpy(self, rng: np.random.Generator, amplitude: float) -> "Tube":
        """Radii times smooth noise: lobules, haustra, folds."""
        factors = np.exp(amplitude * rng.normal(size=len(self.radii)))
        return Tube(self.points, self.radii * factors, self.stretch)

    def moved(self, about: NDArray[np.float64], factor: float) -> "Tube":
        """The same tube, ``factor`` times as large seen from the point ``about``."""
        points = about + (self.points - about) * factor
        return Tube(points, self.radii * factor, self.stretch)

    def front(self, z: float) -> float:
        """y of the anterior wall at the point nearest to height ``z``, for a tube that runs along the body."""
        at = int(np.argmin(np.abs(self.points[:, 2] - z)))
        return float(self.points[at, 1] - self.radii[at] * np.broadcast_to(self.stretch, self.points.shape)[at, 1])

    def lumen(self, wall: float) -> NDArray[np.float64]:
        """Points spread evenly through the volume inside a wall of ``wall`` mm, (n, 3) mm; the same at every call."""
        r = np.random.default_rng(0)
        stretch, inner = np.broadcast_to(self.stretch, self.points.shape), np.maximum(self.radii - wall, 0.3)
        steps = np.linalg.norm(np.gradient(self.points, axis=0), axis=1)
        share = steps * inner**2 * stretch[:, 1]
        at = r.choice(len(share), 600, p=share / share.sum())
        way = r.normal(size=(600, 3))
        way *= r.random((600, 1)) ** 0.4 / np.linalg.norm(way, axis=1, keepdims=True)
        return np.asarray(self.points[at] + inner[at, None] * stretch[at] * way)

    def cone_bounds(self, i: int) -> Corners:
        """Corners of the ``i``-th cone alone."""
        reach = self.radii[i : i + 2, None] * self.of_cone(i)
        points = self.points[i : i + 2]
        return (points - reach).min(0), (points + reach).max(0)

    @property
    def slack(self) -> float:
        return float(self.stretch.max())

    def bounds(self) -> Corners:
        reach = self.radii[:, None] * self.stretch
        return (self.points - reach).min(0), (self.points + reach).max(0)

    def distance(self, points: Points) -> Floats:
        out: Floats | None = None
        for i in range(len(self.points) - 1):
            e = self.cone(i, points)
            out = e if out is None else np.minimum(out, e, out=out)
        assert out is not None
        return out

    def cone(self, i: int, points: Points) -> Floats:
        """Distance to the ``i``-th cone, negative inside."""
        stretch = self.of_cone(i)
        scale = (1 / stretch).astype(np.float32)
        start = (self.points[i] / stretch).astype(np.float32)
        step = (self.points[i + 1] / stretch).astype(np.float32) - start
        d: list[Floats] = [p * s - a if s != 1 else p - a for p, s, a in zip(points, scale, start, strict=True)]
        t = _dot(d, step)
        t /= np.float32(max(float(step @ step), 1e-6))
        np.maximum(t, 0, out=t)
        np.minimum(t, 1, out=t)
        away = np.empty_like(t)
        for k in range(3):
            np.multiply(t, step[k], out=away)
            d[k] -= away
            d[k] *= d[k]
        e = d[0]
        e += d[1]
        e += d[2]
        np.sqrt(e, out=e)
        t *= np.float32(self.radii[i + 1] - self.radii[i])
        e -= t
        e -= np.float32(self.radii[i])
        return e


class Below:
    """Everything below the plane through ``point`` that rises by ``slope`` mm per mm to the left and to the back."""

    slack = 1.0

    def __init__(self, point: ArrayLike, slope: tuple[float, float]) -> None:
        self.point, self.slope = np.asarray(point, float), slope

    def bounds(self) -> Corners:
        return LOW, HIGH

    def distance(self, points: Points) -> Floats:
        x, y, z = (p - np.float32(c) for p, c in zip(points, self.point, strict=True))
        z -= x * np.float32(self.slope[0])
        z -= y * np.float32(self.slope[1])
        z *= np.float32((1 + self.slope[0] ** 2 + self.slope[1] ** 2) ** -0.5)
        return np.asarray(z, np.float32)


class Composite:
    """The union of ``parts`` without ``holes``."""

    def __init__(self, parts: Sequence[Shape], holes: Sequence[Shape] = ()) -> None:
        self.parts, self.holes = parts, holes

    @property
    def slack(self) -> float:
        return max(part.slack for part in self.parts)

    def bounds(self) -> Corners:
        corners = [part.bounds() for part in self.parts]
        return np.min([c[0] for c in corners], axis=0), np.max([c[1] for c in corners], axis=0)

    def distance(self, points: Points) -> Floats:
        out = self.parts[0].distance(points)
        for part in self.parts[1:]:
            np.minimum(out, part.distance(points), out=out)
        for hole in self.holes:
            np.maximum(out, -hole.distance(points), out=out)
        return out


class Canvas:
    """A tissue map on ``grid`` whose voxels know their place in the undeformed body.

    ``displacement`` holds three control arrays (x, y, z) on ``lattice``; ``turn`` is the body's tilt on the table.
    """

    def __init__(
        self, grid: Grid, lattice: Lattice, displacement: tuple[Floats, Floats, Floats], turn: NDArray[np.float64]
    ) -> None:
        self.grid, self.lattice, self.turn = grid, lattice, turn
        self.tissue = np.zeros(grid.shape, np.uint8)
        axes = [grid.coordinates(k) for k in range(3)]
        self.points = self._place(displacement)
        self._ends = np.array([(a[0], a[-1]) for a in axes[::-1]]).T  # first and last voxel (x, y, z)
        self._controls = np.concatenate([displacement, np.negative(displacement)])  # one maximum finds both ends
        most = self._controls.max((1, 2, 3))
        self._anywhere = -most[3:], most[:3]
        self._back, self._spread = turn.T, np.abs(turn.T)

    def _place(self, displacement: tuple[Floats, Floats, Floats]) -> Points:
        grid, sampler = self.grid, Sampler(self.lattice, self.grid)
        z, y, x = (grid.coordinates(k) for k in range(3))
        out = (np.empty(grid.shape, np.float32), np.empty(grid.shape, np.float32), np.empty(grid.shape, np.float32))
        for box in sampler.slabs():
            for p, d, turn in zip(out, displacement, self.turn, strict=True):
                across = ((turn[1] * y)[:, None] + turn[0] * x).astype(np.float32)
                moved, up = sampler.at(d, box), (turn[2] * z[box[0]]).astype(np.float32)
                for plane, shift, height in zip(p[box[0]], moved, up, strict=True):  # plane by plane, in the cache
                    np.add(shift, across, out=plane)
                    plane += height
        return out

    def _room(self, bounds: Corners, shift: Corners) -> Corners:
        """Corners, in the scan, of the box around body ``bounds`` where displacements lie between two ``shift``s."""
        low, high = bounds[0] - shift[1], bounds[1] - shift[0]
        centre, half = self._back @ (low + high) / 2, self._spread @ (high - low) / 2
        return np.maximum(centre - half, self._ends[0]), np.minimum(centre + half, self._ends[1])

    def _shift(self, room: Corners) -> Corners:
        """Least and greatest displacement in a box of the scan: a B-spline lies between its control points."""
        step, (nx, ny, nz) = self.lattice.step, self._controls.shape[:0:-1]
        first = (math.floor(t) - 1 for t in ((room[0] - LOW) / step).tolist())
        last = (math.floor(t) + 3 for t in ((room[1] - LOW) / step).tolist())
        x, y, z = (min(max(k, 0), n - 1) for k, n in zip(first, (nx, ny, nz), strict=True))
        u, v, w = (max(k, 1) for k in last)
        most = self._controls[:, z:w, y:v, x:u].reshape(6, -1).max(1)  # one axis: much faster than three
        return -most[3:], most[:3]

    def _reach(self, bounds: Corners, shift: Corners, rounds: int = 2) -> tuple[Box, Corners] | None:
        """The voxels that a shape with these corners can touch, and the displacements there, narrower than ``shift``."""
        for _ in range(rounds):
            room = self._room(bounds, shift)
            if (room[1] < room[0]).any():
                return None
            shift = self._shift(room)
        room = self._room(bounds, shift)
        if (room[1] < room[0]).any():
            return None
        slices, low, high = [], room[0].tolist(), room[1].tolist()
        for axis in range(3):
            start, step = self.grid.origin[axis], self.grid.spacing[axis]
            first = math.ceil((low[2 - axis] - start) / step - 1e-3)
            last = math.floor((high[2 - axis] - start) / step + 1e-3)
            if last < first:
                return None
            slices.append(slice(max(first, 0), min(last + 1, self.grid.shape[axis])))
        return (slices[0], slices[1], slices[2]), shift

    def box(self, shape: Shape) -> Box | None:
        """The voxels that ``shape`` can reach, None where it lies outside the grid."""
        found = self._reach(shape.bounds(), self._anywhere)
        return None if found is None else found[0]

    def distance(self, shape: Shape, margin: float = 0.0) -> tuple[Box, Floats] | None:
        """The shape's distance in its box and ``margin`` mm around it; where it is far, a large number may stand.

        Parts of a composite and pieces of a tube are measured where they can be, not in the whole box.
        """
        low, high = shape.bounds()
        found = self._reach((low - margin, high + margin), self._anywhere)
        return None if found is None else (found[0], self._within(shape, *found, margin))

    def distances(self, shape: Shape, margin: float = 0.0) -> Iterator[tuple[Box, Floats]]:
        """As ``distance``, a large shape in slabs of some slices, so that what is made of them stays in the cache."""
        low, high = shape.bounds()
        found = self._reach((low - margin, high + margin), self._anywhere)
        if found is None:
            return
        (planes, rows, columns), shift = found
        step = max(1, PIECE // ((rows.stop - rows.start) * (columns.stop - columns.start)))
        step = planes.stop - planes.start if isinstance(shape, Tube) else step  # whose cones are small already
        for first in range(planes.start, planes.stop, step):
            box = slice(first, min(first + step, planes.stop)), rows, columns
            yield box, self._within(shape, box, shift, margin)

    def _within(self, shape: Shape, box: Box, shift: Corners, margin: float) -> Floats:
        if isinstance(shape, Ellipsoid):
            return self._in_slabs(shape.distance, box)
        out = np.full([s.stop - s.start for s in box], 1e3, np.float32)
        if isinstance(shape, Tube):
            for i in range(len(shape.points) - 1):
                for cut, view, _ in self._part(shape.cone_bounds(i), out, box, shift, margin):
                    np.minimum(view, self._in_slabs(partial(shape.cone, i), cut), out=view)
        elif isinstance(shape, Composite):
            for part in shape.parts:
                for cut, view, inner in self._part(part.bounds(), out, box, shift, margin):
                    np.minimum(view, self._within(part, cut, inner, margin), out=view)
            for hole in shape.holes:
                for cut, view, inner in self._part(hole.bounds(), out, box, shift, margin):
                    np.maximum(view, -self._within(hole, cut, inner, margin), out=view)
        else:
            np.copyto(out, self._in_slabs(shape.distance, box))
        return out

    def _part(
        self, bounds: Corners, out: Floats, box: Box, shift: Corners, margin: float
    ) -> Iterator[tuple[Box, Floats, Corners]]:
        """The voxels in ``box`` that a part with these corners can reach, ``out`` there, its displacements; or nothing."""
        if out.size < FEW:
            yield box, out, shift
            return
        found = self._reach((bounds[0] - margin, bounds[1] + margin), shift, rounds=1)
        if found is None:
            return
        cut = [slice(max(c.start, b.start), min(c.stop, b.stop)) for c, b in zip(found[0], box, strict=True)]
        if all(c.start < c.stop for c in cut):
            view = out[tuple(slice(c.start - b.start, c.stop - b.start) for c, b in zip(cut, box, strict=True))]
            yield (cut[0], cut[1], cut[2]), view, found[1]

    def _in_slabs(self, distance: Callable[[Points], Floats], box: Box) -> Floats:
        """``distance`` at the voxels of ``box``, some slices at a time so that what lies between stays in the cache."""
        planes, rows, columns = box
        size = rows.stop - rows.start, columns.stop - columns.start
        step = max(1, SLAB // (size[0] * size[1]))
        if step >= planes.stop - planes.start:
            return distance(self._at(box))
        out = np.empty((planes.stop - planes.start, *size), np.float32)
        for first in range(planes.start, planes.stop, step):
            slab = slice(first, min(first + step, planes.stop))
            out[slab.start - planes.start : slab.stop - planes.start] = distance(self._at((slab, rows, columns)))
        return out

    def _at(self, box: Box) -> Points:
        return self.points[0][box], self.points[1][box], self.points[2][box]

    def carve(self, box: Box, e: Floats, holes: Sequence[Shape]) -> None:
        """Take ``holes`` out of a shape with distances ``e`` in ``box``."""
        for hole in holes:
            for cut, view, inner in self._part(hole.bounds(), e, box, self._anywhere, 0.0):
                np.maximum(view, -self._within(hole, cut, inner, 0.0), out=view)

    def paint(self, shape: Shape, tissue: int, over: Sequence[int]) -> None:
        """Give ``tissue`` to the voxels of ``shape`` that hold one of ``over``."""
        self.paint_layers(shape, ((0.0, tissue),), over)

    def paint_layers(self, shape: Shape, layers: Sequence[tuple[float, int]], over: Sequence[int]) -> None:
        """Nested tissues: each (depth mm, tissue) fills what lies deeper than ``depth`` inside ``shape``.

        ``over`` is what lay there before the first. A depth below 0 reaches out of the shape. Not for the inside of a
        composite with holes: there only depths up to 0 are right.
        """
        for box, e in self.distances(shape, self._margin(shape, [depth for depth, _ in layers])):
            view = self.tissue[box]
            allowed = _among(over, view)
            for depth, tissue in layers:
                inside = e < -depth
                inside &= allowed
                np.copyto(view, np.uint8(tissue), where=inside)

    def paint_in_turn(self, shape: Shape, coats: Sequence[Coat]) -> None:
        """As ``paint_layers``, but each (depth, tissue, over) paints over what the ones before it have left."""
        for box, e in self.distances(shape, self._margin(shape, [depth for depth, _, _ in coats])):
            self.coat(box, e, coats)

    def coat(self, box: Box, e: Floats, coats: Sequence[Coat]) -> None:
        """Paint in turn what lies at distances ``e`` in ``box``."""
        view = self.tissue[box]
        for depth, tissue, over in coats:
            inside = e < -depth
            inside &= _among(over, view)
            np.copyto(view, np.uint8(tissue), where=inside)

    @staticmethod
    def _margin(shape: Shape, depths: Sequence[float]) -> float:
        return max(0.0, -min(depths)) * shape.slack

    def level(self, shape: Shape, tissue: int, over: Sequence[int], height: float) -> None:
        """Gas rises: in ``shape``, what lies in front of the plane y = ``height`` mm (scanner's) becomes ``tissue``."""
        self._beyond(shape, tissue, over, self.grid.coordinates(1) < height)

    def settle(self, shape: Shape, tissue: int, over: Sequence[int], height: float) -> None:
        """What is heavy sinks: as ``level``, behind the plane."""
        self._beyond(shape, tissue, over, self.grid.coordinates(1) >= height)

    def _beyond(self, shape: Shape, tissue: int, over: Sequence[int], rows: NDArray[np.bool_]) -> None:
        found = self.distance(shape)
        if found is None:
            return
        box, e = found
        view = self.tissue[box]
        view[lookup(over)[view] & rows[box[1]][None, :, None] & (e < 0)] = tissue


def vector(x: float, y: float, z: float) -> NDArray[np.float64]:
    """(x, y, z) as an array, to shift a point by."""
    return np.array((x, y, z), np.float64)


def recode(table: NDArray[Value], tissue: NDArray[np.uint8]) -> NDArray[Value]:
    """``table``'s value for every voxel of ``tissue``. Slice by slice: numpy widens an index to 8 bytes first."""
    out = np.empty(tissue.shape, table.dtype)
    for plane, values in zip(tissue, out, strict=True):
        np.take(table, plane, out=values, mode="clip")
    return out


def _among(tissues: Sequence[int], view: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Where ``view`` holds one of ``tissues``: compared with run after run of ids, which is faster than to look them up."""
    out: NDArray[np.bool_] | None = None
    for first, last in _runs(tuple(tissues)):
        found = (
            view == first if first == last else view - np.uint8(first) <= np.uint8(last - first)
        )  # wraps below first
        out = found if out is None else np.logical_or(out, found, out=out)
    return np.zeros(view.shape, bool) if out is None else out


@cache
def _runs(tissues: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """First and last of every run of ids that follow one another."""
    ids = sorted({int(tissue) for tissue in tissues})
    starts = [k for k in ids if k - 1 not in ids]
    return tuple(zip(starts, (k for k in ids if k + 1 not in ids), strict=True))


def lookup(tissues: Sequence[int]) -> NDArray[np.bool_]:
    """Table over the 256 tissue ids: True for ``tissues``."""
    table = np.zeros(256, bool)
    table[list(tissues)] = True
    return table
