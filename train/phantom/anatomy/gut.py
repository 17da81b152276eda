"""Small bowel and colon: what fills the abdomen between the labelled organs, and looks like them where it lies at them."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import ArrayLike, NDArray

from train.phantom.body import Body, stream
from train.phantom.canvas import Canvas, Ellipsoid, Shape, Tube, through, vector
from train.phantom.tissue import BOWEL, ORGAN_TISSUES, T

Doubles = NDArray[np.float64]
FREE = (T.FAT, *BOWEL)
JEJUNUM = (T.FOLDS, T.FOLDS, T.FOLDS, T.BOWEL_FLUID, T.BOWEL_CONTRAST, T.BOWEL_GAS)
ILEUM = (T.BOWEL_FLUID, T.BOWEL_FLUID, T.FOLDS, T.FOLDS, T.STOOL, T.BOWEL_CONTRAST, T.BOWEL_GAS)
RIGHT_COLON = (T.STOOL,) * 5 + (T.BOWEL_GAS, T.BOWEL_GAS, T.BOWEL_FLUID, T.BOWEL_FLUID, T.BOWEL_CONTRAST)
LEFT_COLON = (T.STOOL,) * 4 + (T.BOWEL_GAS,) * 3 + (T.BOWEL_FLUID, T.BOWEL_CONTRAST)


@dataclass(frozen=True)
class Piece:
    """A painted piece of bowel: its ``wall`` in mm, what it holds, the ``height`` (y, mm) of the gas in it, if any."""

    tube: Tube
    content: int
    wall: float
    height: float | None


class Gut:
    """Paints bowel into ``canvas``, with random numbers of its own; ``lift`` mm is how high the diaphragm stands."""

    def __init__(self, seed: int, body: Body, canvas: Canvas, lift: float) -> None:
        self.r = stream(seed, "gut")
        self.body, self.canvas, self.lift = body, canvas, lift
        self.half = body.cavity_half_width
        self.right_colon: list[Piece] = []  # what can lie at the liver

    def _u(self, low: float, high: float) -> float:
        return float(self.r.uniform(low, high))

    def _n(self, mean: float, sd: float) -> float:
        return float(np.clip(self.r.normal(mean, sd), mean - 2.2 * sd, mean + 2.2 * sd))

    def course(self, points: Sequence[ArrayLike], jitter: float, per_span: int = 4) -> Doubles:
        """A smooth curve near ``points``."""
        p = np.asarray(points, float)
        return through(p + self.r.normal(0, jitter, p.shape).clip(-2 * jitter, 2 * jitter), per_span)

    def piece(self, tube: Tube, contents: Sequence[int], over: Sequence[int], collapses: float = 0.25) -> Piece:
        """Paint ``tube`` with one of ``contents``; with the chance ``collapses`` it is empty, and narrower."""
        content = int(contents[int(self.r.integers(len(contents)))])
        wall, squeeze = self._u(1.6, 3.2), self._u(0.45, 0.8)
        level, gas, empty = self._u(-0.6, 0.8), self.r.random() < 0.35, self.r.random() < collapses
        if empty:
            flat = tube.wide(squeeze)
            self.canvas.paint(flat, T.BOWEL_WALL, over)
            return Piece(flat, int(T.BOWEL_WALL), wall, None)
        self.canvas.paint_layers(tube, ((0.0, int(T.BOWEL_WALL)), (wall, content)), over)
        if not gas or content == T.BOWEL_GAS:
            return Piece(tube, content, wall, None)
        radius = float(tube.radii.mean())
        height = float(tube.points[:, 1].mean()) - level * radius
        self.canvas.level(tube.wide(max(0.3, 1 - wall / radius)), T.BOWEL_GAS, [content], height)
        return Piece(tube, content, wall, height)

    # --- small bowel

    def small_bowel(self) -> None:
        """Loops, in nests where fat keeps them apart; jejunum under the stomach. One gut in 14 is dilated."""
        b = self.body
        calibre = self._u(0.8, 1.15) * (self._u(1.3, 1.8) if self.r.random() < 0.07 else 1)
        loops = int(self._u(60, 92) * (1.5 - 0.7 * b.visceral) / calibre)
        nested = 0.25 + 0.4 * b.visceral
        nests = [self._anywhere(k == 0) for k in range(5)]
        for _ in range(loops):
            jejunum = self.r.random() < 0.22
            centre = self._anywhere(jejunum)
            if self.r.random() < nested:
                centre = 0.5 * centre + 0.5 * nests[0 if jejunum else int(self.r.integers(1, 5))]
            radius = self._u(8.0, 15.0) * calibre
            tube = Tube(through(self._walk(centre), 3), radius).bumpy(self.r, 0.08)
            self.piece(tube, JEJUNUM if jejunum else ILEUM, FREE, 0.3)
        self._mesentery()

    def _anywhere(self, jejunum: bool) -> Doubles:
        """A place for a loop: jejunum on the left under the stomach, ileum in all of the lower abdomen."""
        b = self.body
        low, high, bottom, top = (0.05, 0.72, -40, 62) if jejunum else (-0.68, 0.72, -260, 30)
        z = self._u(bottom, top)
        x = self._u(low, high) * self.half * float(np.interp(z, (-260, -190), (0.5, 1.0)))  # the pelvis is narrow
        y = self._u(-0.82 * b.cavity_front, 0.16 * b.cavity_back)
        y += 0.4 * b.cavity_back * max(0.0, abs(x) / self.half - 0.35)  # beside the spine's muscles
        return np.array([x, y, z])

    def _walk(self, centre: Doubles) -> list[Doubles]:
        points, heading = [centre], self.r.normal(size=3) * (1, 0.7, 0.7)
        for _ in range(int(self.r.integers(2, 5))):
            heading = 0.55 * heading / np.linalg.norm(heading) + 0.6 * self.r.normal(size=3) * (1, 0.7, 0.8)
            points.append(points[-1] + heading / np.linalg.norm(heading) * self._u(18, 36))
        return points

    def _mesentery(self) -> None:
        b = self.body
        for _ in range(45):
            root = np.array([self._n(3, 8), b.spine_front(0) - 30, self._u(-50, 10)])
            tip = np.array([self._u(-0.6, 0.6) * self.half, self._u(-0.7, -0.1) * b.cavity_front, self._u(-170, 0)])
            sag = (root + tip) / 2 + self.r.normal(0, 10, 3)
            vessel = T.VEIN if self.r.random() < 0.6 else T.ARTERY
            self.canvas.paint(Tube(through([root, sag, tip], 3), [2.8, 1.2]), vessel, [T.FAT])

    # --- colon

    def colon(self) -> None:
        """From the caecum to the sigmoid: each leg in pieces that are filled each in its own way."""
        filling = self._u(0.75, 1.2)
        empty = self._u(0, 0.5) ** 2  # the left colon is the more often empty
        legs = (
            (18, 31, RIGHT_COLON, 0.3 * empty),
            (12, 26, LEFT_COLON, empty),
            (8, 19, LEFT_COLON, 2 * empty),
            (9, 19, LEFT_COLON, empty),
        )
        for k, (course, (low, high, contents, collapses)) in enumerate(zip(self._frame(), legs, strict=True)):
            ends = [self._u(low, high) * filling, self._u(low, high) * filling]
            tube = self._haustra(Tube(self.course(course, 6, 6), ends), 0.26 if k < 2 else 0.18)
            main = int(contents[int(self.r.integers(len(contents)))])
            for part in self._cut(tube):
                piece = self.piece(part, (main, main, *contents[::3]), FREE, collapses)
                self._bubbles(piece)
                if k < 2:
                    self.right_colon.append(piece)

    def _frame(self) -> tuple[list[ArrayLike], ...]:
        """Ascending, transverse, descending, sigmoid colon: points (x, y, z) along each."""
        b, n = self.body, self._n
        h, front, back = self.half, b.cavity_front, b.cavity_back
        right, left = n(0.76, 0.04) * h, n(0.77, 0.04) * h
        hepatic, splenic = n(2, 20), n(58, 16) + self.lift * 0.5
        sag = float(np.clip(n(-40, 40), -130, 40))
        ascending: list[ArrayLike] = [
            (-right * 0.85, 0.0, -165),
            (-right, 0.25 * back, -95),
            (-right, 0.28 * back, -40),
            (-right * 0.95, 0.1 * back, hepatic),
        ]
        transverse: list[ArrayLike] = [
            (-right * 0.95, 0.05 * back, hepatic),
            (-n(0.5, 0.1) * h, -n(0.55, 0.1) * front, hepatic - n(8, 12)),
            (0, -n(0.74, 0.06) * front, sag),
            (n(0.5, 0.08) * h, -n(0.6, 0.08) * front, 0.5 * (sag + splenic)),
            (left * 0.95, 0.1 * back, splenic),
        ]
        descending: list[ArrayLike] = [
            (left * 0.95, 0.1 * back, splenic),
            (left, 0.38 * back, -5),
            (left, 0.32 * back, -80),
            (left * 0.9, 0.1 * back, -160),
        ]
        sigmoid: list[ArrayLike] = [
            (left * 0.9, 0.1 * back, -160),
            (0.4 * h, -0.3 * front, -205),
            (-0.1 * h, -0.2 * front, -190),
            (20, b.spine(-180)[1] - 8, -215),
        ]
        return ascending, transverse, descending, sigmoid

    def rectum(self) -> None:
        """Before the sacrum."""
        y = self.body.spine(-180)[1]
        course = self.course([(0, y + 30, -345), (4, y + 34, -290), (-6, y + 16, -240), (20, y - 8, -215)], 4)
        tube = Tube(course, self._u(13, 21)).bumpy(self.r, 0.08)
        self.piece(tube, (T.STOOL, T.STOOL, T.BOWEL_GAS), [T.FAT])

    def _haustra(self, tube: Tube, deepest: float) -> Tube:
        """Sacs every 25-40 mm."""
        along = np.r_[0, np.cumsum(np.linalg.norm(np.diff(tube.points, axis=0), axis=1))]
        waves = 1 + self._u(0.06, deepest) * np.sin(2 * np.pi * along / self._u(25, 40) + self._u(0, 6))
        return Tube(tube.points, tube.radii * waves).bumpy(self.r, 0.08)

    def _cut(self, tube: Tube) -> list[Tube]:
        """One to four pieces end to end, with a fold of wall between them."""
        last = len(tube.points) - 1
        inner = np.unique(self.r.integers(3, last - 2, int(self.r.integers(0, 4))))
        edges = [0, *(int(k) for k in inner), last]
        return [Tube(tube.points[a : b + 1], list(tube.radii[a : b + 1])) for a, b in pairwise(edges)]

    def _bubbles(self, piece: Piece) -> None:
        """Gas in stool."""
        tube, count = piece.tube, int(self.r.integers(2, 9))
        picks, sizes = self.r.integers(0, len(tube.points), count), self.r.uniform(1.5, 6.5, count)
        off = self.r.normal(0, 0.35, (count, 3))
        if piece.content != T.STOOL:
            return
        for i, size, way in zip(picks, sizes, off, strict=True):
            spot = tube.points[i] + way * tube.radii[i]
            self.canvas.paint(Ellipsoid(spot, (size * 1.3, size, size)), T.BOWEL_GAS, [T.STOOL])

    def press_into_liver(self, face: Shape) -> None:
        """The hepatic flexure and the transverse colon press into the liver's lower ``face`` as often as they yield to it."""
        presses, depth = self.r.random() < 0.65, self._u(0.7, 0.9)
        for piece in self.right_colon if presses else []:
            low = _before(piece.tube.wide(depth), face, 12.0)
            if low is None:
                continue
            aside = Tube(low.points + vector(-9, 0, -9), list(low.radii))  # no scraps of liver between colon and wall
            self.canvas.paint(aside, T.FAT, ORGAN_TISSUES["liver"])
            layers = ((0.0, int(T.BOWEL_WALL)), (piece.wall, piece.content))
            self.canvas.paint_layers(low, layers, ORGAN_TISSUES["liver"])
            if piece.height is not None and float(low.radii.min()) > piece.wall + 0.5:
                self.canvas.level(low.grown(-piece.wall), T.BOWEL_GAS, [piece.content], piece.height)


def _before(tube: Tube, face: Shape, depth: float) -> Tube | None:
    """The part of ``tube`` up to where it first runs ``depth`` mm behind ``face``, from its lowest point both ways."""
    x, y, z = tube.points.T.astype(np.float32)
    deep = np.flatnonzero(face.distance((x, y, z)) > depth)
    lowest = int(np.argmin(z))
    first = int(deep[deep < lowest].max(initial=-1)) + 1
    last = int(deep[deep > lowest].min(initial=len(x)))
    return Tube(tube.points[first:last], list(tube.radii[first:last])) if last - first > 1 else None
