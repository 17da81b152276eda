"""What goes wrong at the scanner: motion, a truncated field, low dose, streaks from metal and from arms beside the body."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter, gaussian_filter1d, label, shift

from train.phantom.body import Doubles, stream
from train.phantom.canvas import Floats, Grid

SMALLEST_METAL = 12.0  # mm2 in a slice: surgical clips hardly streak


@dataclass(frozen=True)
class Artefacts:
    """``motion``: mm between the two edges that a breath makes; ``truncation``: radius in mm of the reconstructed circle.

    0 is none of either. ``low_dose``: two to three times the noise, with streaks across where the body is widest.
    """

    motion: float = 0.0
    truncation: float = 0.0
    low_dose: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.motion <= 30:
            raise ValueError(f"motion: {self.motion} mm is not between 0 and 30")
        if self.truncation and not 60 <= self.truncation <= 400:
            raise ValueError(f"truncation: a radius of {self.truncation} mm is not between 60 and 400")

    def record(self, streaked_slices: int) -> dict[str, float | bool | int]:
        """JSON-able form, with the number of slices that metal streaks."""
        return {**asdict(self), "streaked_slices": streaked_slices}


KINDS = ("metal", "motion", "truncation", "low_dose")


def draw_artefact(seed: int, half_width: float) -> tuple[Artefacts, str]:
    """A heavy artefact for the body of ``seed`` (``half_width`` mm), and its kind; metal is a Disease's implant."""
    r = stream(seed, "artefact")
    kind = KINDS[int(r.integers(len(KINDS)))]
    motion, radius = round(float(r.uniform(6, 14)), 1), round(float(half_width * r.uniform(0.66, 0.88)), 1)
    return {
        "metal": Artefacts(),
        "motion": Artefacts(motion=motion),
        "truncation": Artefacts(truncation=radius),
        "low_dose": Artefacts(low_dose=True),
    }[kind], kind


def move(image: Floats, grid: Grid, millimetres: float, r: np.random.Generator) -> Floats:
    """The scan with a fainter copy of itself, shifted as a breath shifts: downwards and to the front. Truth stays."""
    share, front = float(r.uniform(0.3, 0.45)), float(r.uniform(0.2, 0.7))
    away = (-millimetres * np.sqrt(1 - front**2) / grid.spacing[0], -millimetres * front / grid.spacing[1], 0.0)
    ghost = shift(image, away, order=1, mode="nearest", prefilter=False)
    return np.asarray((1 - share) * image + share * ghost, np.float32)


def _from_axis(grid: Grid) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """y and x of the pixels from the middle of the field, mm."""
    y, x = grid.coordinates(1), grid.coordinates(2)
    return (y - (y[0] + y[-1]) / 2)[:, None], (x - (x[0] + x[-1]) / 2)[None, :]


def circle(grid: Grid, radius: float) -> NDArray[np.bool_]:
    """The pixels (y, x) inside the reconstructed circle."""
    y, x = _from_axis(grid)
    return np.asarray(np.hypot(y, x) <= radius)


def truncate(image: Floats, grid: Grid, radius: float, r: np.random.Generator) -> None:
    """Bright rim where body reaches out of the field, and nothing outside it; in place."""
    y, x = _from_axis(grid)
    depth = radius - np.hypot(y, x)
    rim = float(r.uniform(60, 350)) * np.exp(-np.maximum(depth, 0) / float(r.uniform(6, 18)))
    # Only what is cut off brightens the rim: the air beside the body does not.
    edge = image[:, (depth > 0) & (depth < 12)]
    body = np.zeros(len(image), np.float32)
    if edge.size:
        body += np.mean(edge > -400, axis=1)
    image += np.where(depth > 0, rim, 0).astype(np.float32) * body[:, None, None]
    image[:, depth <= 0] = -1024


def streak(image: Floats, metal: NDArray[np.bool_], grid: Grid, r: np.random.Generator) -> int:
    """Star-shaped streaks from every piece of metal and dark bands between two, in place; the number of such slices."""
    y, x = grid.coordinates(1)[:, None], grid.coordinates(2)[None, :]
    pixel = grid.spacing[1] * grid.spacing[2]
    strength, reach = float(r.uniform(15, 60)), float(r.uniform(30, 90))
    star = _star(r)
    count = 0
    for k in np.flatnonzero(metal.sum(axis=(1, 2)) * pixel >= SMALLEST_METAL):
        centres, areas = _pieces(metal[k], y, x, pixel)
        jitter = _star(r)
        added = np.zeros(image.shape[1:], np.float32)
        for (cy, cx), area in zip(centres, areas, strict=True):
            dy, dx = y - cy, x - cx
            distance = np.hypot(dy, dx)
            turn = ((np.arctan2(dy, dx) / (2 * np.pi) % 1) * len(star)).astype(int) % len(star)
            size = strength * min((area / 60) ** 0.5, 3.5)
            added += (size * (0.85 * star + 0.3 * jitter)[turn] * np.exp(-distance / reach)).astype(np.float32)
        for a in range(len(centres)):
            for b in range(a):
                added -= _band(centres[a], centres[b], y, x) * np.float32(1.5 * strength)
        image[k] += added
        count += 1
    return count


def streak_from_arms(image: Floats, grid: Grid, arms: Sequence[Doubles], r: np.random.Generator) -> dict[str, float]:
    """Dark and bright bands and grainy lines from arm to arm, in place; what was drawn: HU of bands and of lines.

    Rays that pass along both arms are hardened and starved: their bones darken what lies between them, and noise lies along
    the rays. These cross under small angles, for an arm is as wide as its bone, and the starved ones are those that pass
    much tissue: lung and air beside it stay quiet. A slice shares some rays with the next. The scanner sees arms outside of
    the field of view all the same. ``arms``: for each, points (x, y, z) of its bone in mm, upwards. One arm alone streaks
    less strongly, and less the farther away.
    """
    y, x = grid.coordinates(1), grid.coordinates(2)
    dark, lines = round(float(r.uniform(6, 45)), 1), round(float(r.uniform(4, 18)), 1)
    middles, widths = r.uniform(-22, 22, 4), r.uniform(4, 15, 4)
    shares = np.array((-1, -0.7, 0.5, 0.35)) * r.uniform(0.4, 1, 4)
    fineness, breadth, reach = r.uniform(1.5, 4.0), r.uniform(18, 38), r.uniform(90, 220)
    # Slopes of the rays, which go from one edge of a bone to the other edge of the next.
    tilts = np.array((-1, 0, 1)) * r.uniform(0.02, 0.06)
    shared = np.exp(-grid.spacing[0] / r.uniform(3, 9))
    off = np.arange(-120.0, 120.5, 0.5)  # mm from the line that joins the arms
    bands = dark * (shares[:, None] * np.exp(-(((off - middles[:, None]) / widths[:, None]) ** 2))).sum(0)
    grain = r.normal(size=(len(tilts), len(off)))
    for plane, z in zip(image, grid.coordinates(0), strict=True):
        ends = np.array([[np.interp(z, arm[:, 2], arm[:, axis]) for axis in (0, 1)] for arm in arms])
        grain = shared * grain + np.sqrt(1 - shared**2) * r.normal(size=grain.shape)
        fine = gaussian_filter1d(grain, fineness / 0.5, axis=1)
        fine *= lines / np.sqrt(len(tilts)) / fine.std() * np.exp(-((off / breadth) ** 2))
        if len(ends) == 2:
            slope, middle = (ends[1, 1] - ends[0, 1]) / (ends[1, 0] - ends[0, 0]), ends[:, 0].mean()
            fade = np.ones(len(x))
        else:
            slope, middle = 0.0, ends[0, 0]
            fade = 0.6 * np.exp(-np.abs(x - ends[0, 0]) / reach)
        below = y[:, None] - (ends[0, 1] + slope * (x - ends[0, 0]))[None, :]
        added = np.interp(below, off, bands, 0, 0)
        for tilt, profile in zip(tilts, fine, strict=True):
            added += np.interp(below - tilt * (x - middle), off, profile, 0, 0)
        plane += added * fade * _density(plane, grid)
    return {"dark": dark, "lines": lines}


def _density(plane: Floats, grid: Grid) -> Floats:
    """1 where a slice (y, x) is soft tissue or fat within a centimetre, a third at -700 HU and less in airier lung, 0 in air."""
    near = gaussian_filter(np.clip(plane, -1000, 0), [8 / s for s in grid.spacing[1:]], truncate=2)
    return np.asarray(np.clip((near + 950) / 750, 0, 1), np.float32)


def _star(r: np.random.Generator) -> Floats:
    """Brightness over the angle: many fine rays, a few broad ones."""
    fine = gaussian_filter1d(r.normal(size=720), 2.0, mode="wrap")
    broad = gaussian_filter1d(r.normal(size=720), 12.0, mode="wrap")
    out = fine / fine.std() + broad / broad.std()
    return np.asarray(out - out.mean(), np.float32)


def _pieces(
    metal: NDArray[np.bool_], y: NDArray[np.float64], x: NDArray[np.float64], pixel: float
) -> tuple[list[tuple[float, float]], list[float]]:
    """Centre (y, x) in mm and area in mm2 of the six largest pieces of one slice."""
    parts, count = label(metal)
    sizes = np.bincount(parts.ravel(), minlength=count + 1)[1:]
    centres, areas = [], []
    for part in np.argsort(-sizes, kind="stable")[:6] + 1:
        row, column = np.nonzero(parts == part)
        centres.append((float(y[row, 0].mean()), float(x[0, column].mean())))
        areas.append(float(len(row)) * pixel)
    return centres, areas


def _band(a: tuple[float, float], b: tuple[float, float], y: NDArray[np.float64], x: NDArray[np.float64]) -> Floats:
    """1 on the line between two points (y, x), falling off within some millimetres."""
    dy, dx = b[0] - a[0], b[1] - a[1]
    along = np.clip(((y - a[0]) * dy + (x - a[1]) * dx) / max(dy * dy + dx * dx, 1e-6), 0, 1)
    off = (y - a[0] - along * dy) ** 2 + (x - a[1] - along * dx) ** 2
    return np.asarray(np.exp(-off / 7.0**2), np.float32)
