"""The organs and what lies around them, placed against a Body and painted from the back of the scene to the front.

Positions (x, y, z) are mm in body coordinates (canvas.py). Every random number is drawn whether or not the grid holds
the structure, so one seed is one person at any grid and field of view. Priors: adult organ volumes and typical CT
anatomy; sizes are set by volume where a shape allows it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import ArrayLike, NDArray

from train.phantom.body import Body, Field, _layers, stream
from train.phantom.canvas import Canvas, Coat, Composite, Ellipsoid, Floats, Sampler, Shape, Tube, through, vector
from train.phantom.disease import Disease, LesionTissue
from train.phantom.gut import FREE, Gut
from train.phantom.tissue import BOWEL, LUMEN, ORGAN_TISSUES, T
from train.phantom.wall import Wall

Doubles = NDArray[np.float64]
ANY_BODY = (T.SUBCUTANEOUS, T.FAT, T.MEDIASTINAL, T.MUSCLE, T.CARTILAGE)

# Adult volumes, mL: median, SD of the logarithm, least, most that a target is drawn from (docs/phantoms.md has sources).
TARGETS: dict[str, tuple[float, float, float, float]] = {
    "liver": (1500, 0.19, 980, 2200),
    "spleen": (195, 0.32, 100, 315),
    "right_kidney": (165, 0.18, 108, 240),
    "left_kidney": (171, 0.18, 110, 246),
    "pancreas": (78, 0.27, 42, 130),
    "gallbladder": (30, 0.45, 9, 75),
    "stomach": (270, 0.55, 70, 780),
    "right_adrenal_gland": (3.9, 0.26, 2.2, 6.4),
    "left_adrenal_gland": (4.5, 0.26, 2.5, 7.0),
    "duodenum": (68, 0.28, 36, 120),
}


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


class Builder:
    """Paints one body. ``build`` is the order of the scene; each method is one region."""

    def __init__(self, seed: int, body: Body, field: Field, canvas: Canvas, disease: Disease) -> None:
        self.r = stream(seed, "anatomy")
        self.body, self.field, self.canvas, self.disease = body, field, canvas, disease
        self.half = body.cavity_half_width
        self.ax = self.half / 132
        self.ay = (body.cavity_front + body.cavity_back) / 168
        self.lift = body.dome_right - 132
        self.gut = Gut(seed, body, canvas, self.lift)
        self.wall = stream(seed, "wall")
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
        if disease.enlarged_spleen:
            self.targets["spleen"] = float(stream(seed, "lesions").uniform(380, 800))

    def build(self) -> None:
        """Paint everything into the canvas."""
        self._layers()
        self._lung_vessels()
        self._heart()
        self._skeleton()
        self._muscles()
        self._pelvis()
        self._breasts()
        self._arms()
        self.gut.small_bowel()
        self.gut.colon()
        self._stomach()
        self._liver()
        self.gut.press_into_liver()
        self._spleen()
        self._kidneys()
        self._great_vessels()
        self._duodenum_and_pancreas()
        self._esophagus()
        self._gallbladder()
        self._adrenals()

    # --- small words

    def _n(self, mean: float, sd: float) -> float:
        return float(np.clip(self.r.normal(mean, sd), mean - 2.2 * sd, mean + 2.2 * sd))

    def _u(self, low: float, high: float) -> float:
        return float(self.r.uniform(low, high))

    def _grown_target(self, name: str, points: Doubles) -> float:
        """The volume in body space, mL, that an organ around ``points`` needs to measure its target in the scan."""
        x, y, z = np.asarray(points, float).reshape(-1, 3).T
        return self.targets[name] * float(self.field.growth_at(x, y, z).mean())

    def _clear(self, shape: Ellipsoid | Tube | Composite, over: Sequence[int]) -> None:
        """Push neighbours off by the width of the fat between organs; bowel that is cut gets its wall back."""
        wall = (-self.gap - 2.6, T.BOWEL_WALL, [t for t in over if t in LUMEN])
        self.canvas.paint_in_turn(shape, (wall, (-self.gap, T.FAT, over)))

    def _course(self, points: Sequence[ArrayLike], jitter: float, per_span: int = 4) -> Doubles:
        p = np.asarray(points, float)
        return through(p + self.r.normal(0, jitter, p.shape).clip(-2 * jitter, 2 * jitter), per_span)

    # --- wall, lungs

    def _layers(self) -> None:
        f, c = self.field, self.canvas
        wall, diaphragm = Wall.draw(self.body, self.wall), self._u(2.0, 3.5)
        sampler = Sampler(f.lattice, c.grid)
        for box in sampler.slabs():
            skin, muscle, cavity, lung = (sampler.at(v, box) for v in (f.skin, f.muscle, f.cavity, f.lung))
            tissue = c.tissue[box]
            tissue[skin > 0] = T.SKIN
            tissue[skin > 1.6] = T.SUBCUTANEOUS
            tissue[muscle > 0] = T.MUSCLE
            wall.layer(tissue, (c.points[0][box], c.points[1][box]), muscle, cavity)
            inside = cavity > 0
            tissue[inside] = T.FAT
            tissue[inside & (lung > -diaphragm)] = T.MUSCLE
            tissue[inside & (lung > 0)] = T.LUNG

    def _heart(self) -> None:
        b = self.body
        base = b.dome_right - 14
        self.canvas.paint(Ellipsoid((0, -8, base + 75), (34, 62, 95)), T.MEDIASTINAL, [T.LUNG])
        size = self._u(0.85, 1.15)
        heart = Ellipsoid(
            (self._n(20, 7), self._n(-22, 6) * self.ay, base + 42 * size),
            (62 * size, 44 * size, 42 * size),
            (self._n(0.2, 0.1), self._n(0.45, 0.1), self._n(0.5, 0.12)),
        )
        # Above the diaphragm alone, or liver and stomach would follow the heart's fat into the chest.
        self.canvas.paint(heart.grown(self._u(2, 8)), T.MEDIASTINAL, [T.LUNG])
        self.canvas.paint(heart, T.MYOCARDIUM, [T.MEDIASTINAL, T.LUNG])
        left = Ellipsoid(heart.at(0.3, 0.15, -0.1), (30 * size, 19 * size, 19 * size))
        left.turn = heart.turn
        right = Ellipsoid(heart.at(-0.2, -0.45, 0.0), (36 * size, 16 * size, 25 * size))
        right.turn = heart.turn
        atrium = Ellipsoid(heart.at(-0.6, 0.05, 0.15), (20 * size, 27 * size, 27 * size))
        behind = Ellipsoid(heart.at(-0.1, 0.6, 0.3), (24 * size, 15 * size, 21 * size))
        for chamber, tissue in (
            (right, T.RIGHT_HEART),
            (atrium, T.RIGHT_HEART),
            (left, T.LEFT_HEART),
            (behind, T.LEFT_HEART),
        ):
            self.canvas.paint(chamber, tissue, [T.MYOCARDIUM])
        self.atrium = heart.at(-0.6, 0.1, -0.2)

    def _lung_vessels(self) -> None:
        root_z = self.body.dome_right + 50
        for _ in range(36):
            side = 1 if self.r.random() < 0.5 else -1
            root = np.array([side * 32.0, -5.0, root_z + self._u(-15, 25)])
            tip = np.array(
                [side * self._u(0.4, 0.9) * self.half, self._u(-0.6, 0.8) * self.half * 0.6, root_z + self._u(-110, 90)]
            )
            bend = (root + tip) / 2 + self.r.normal(0, 9, 3)
            self.canvas.paint(Tube(through([root, bend, tip], 3), [self._u(3, 5.5), 1.0]), T.VEIN, [T.LUNG])

    # --- bones

    def _skeleton(self) -> None:
        b, c = self.body, self.canvas
        vr = b.spine_radius
        levels = np.arange(-300.0, 360.0, 20.0)
        axis = np.array([b.spine(z) for z in levels])
        axis[:, 0] += np.interp(levels, (-300, 0, 160, 360), (0, self._n(0, 2.5), self._n(0, 3), 0))
        radii = vr * np.interp(levels, (-300, -200, -120, 60, 200, 360), (0.5, 1.05, 1.06, 0.95, 0.78, 0.66))
        soft = (*ANY_BODY, T.LUNG)
        c.paint_layers(Tube(axis, list(radii), (1.22, 0.95, 1)), ((0, T.CORTICAL), (1.6, T.SPONGY)), soft)
        heights = []
        z = -178 + self._u(0, 12)
        while z < 340:
            heights.append(z)
            z += float(np.interp(z, (-170, 60, 200), (36, 30, 25))) * self._u(0.97, 1.03)
        for z in heights:
            k = float(np.interp(z, (-170, 60, 250), (1.0, 0.92, 0.7)))
            x, y, _ = b.spine(z)
            c.paint(
                Ellipsoid((x, y, z), (vr * 1.3 * k, vr * 1.02 * k, 5.2 * k), squareness=0.8),
                T.DISC,
                [T.SPONGY, T.CORTICAL],
            )
        for low, high in pairwise(heights):
            self._vertebra_processes((low + high) / 2, vr)
        canal = np.array([(b.spine(z)[0], b.spine(z)[1] + vr + 9, z) for z in np.arange(-240.0, 360.0, 30.0)])
        c.paint(Tube(canal, self._u(7.5, 9.5), (1.2, 0.9, 1)), T.CANAL, (*soft, T.CORTICAL, T.SPONGY))
        self._ribs(heights)

    def _vertebra_processes(self, z: float, vr: float) -> None:
        c = self.canvas
        x, y, _ = self.body.spine(z)
        k = float(np.interp(z, (-170, 60, 250), (1.0, 0.95, 0.8)))
        over = (*ANY_BODY, T.LUNG)
        spongy = ((0, T.CORTICAL), (1.6, T.SPONGY))
        c.paint_layers(Ellipsoid((x, y + vr + 28, z - 8), (4.5, 17, 11)), spongy, over)
        c.paint_layers(Ellipsoid((x, y + vr + 15, z - 3), (17 * k, 7, 10)), ((0, T.CORTICAL), (2.2, T.SPONGY)), over)
        slope = self._u(-0.1, 0.3)
        for side in (-1, 1):
            c.paint_layers(Ellipsoid((x + side * 15 * k, y + vr + 4, z + 4), (5.5, 10, 7)), spongy, over)
            c.paint_layers(
                Ellipsoid((x + side * 31 * k, y + vr + 9, z), (17 * k, 4.5, 5.5), (0, 0, side * slope)), spongy, over
            )

    def _ribs(self, heights: list[float]) -> None:
        b, c = self.body, self.canvas
        first = min(range(len(heights)), key=lambda i: abs(heights[i] - 32))  # the 12th pair leaves near T12
        reach = (0.30, 0.55, 0.83, 0.86, 0.88, 0.9, 0.9, 0.9, 0.9)
        drop = self._u(72, 122)
        size = self._u(0.85, 1.15)
        for k, z in enumerate(heights[first : first + len(reach)]):
            turn = np.linspace(0.12, reach[k] * self._u(0.94, 1.04), 12) * np.pi
            for side in (-1, 1):
                points = []
                for t in turn:
                    # t = 0 is the spine, pi the sternum; angles count from the left side towards posterior
                    angle = np.pi / 2 - side * t
                    down = drop * (1 - np.cos(min(t, 2.4))) / 2 - 12
                    points.append(b.wall_point(angle, z + 14 - down, 0.6))
                rib = Tube(np.array(points), [4.2 * size, 5.0 * size, 4.6 * size], (1, 1, 1.35))
                over = (*ANY_BODY, T.LUNG)
                c.paint_layers(rib, ((0, T.CORTICAL), (1.5, T.SPONGY)), over)
                if k >= 2:  # costal cartilage, rising to the sternum
                    end = points[-1]
                    tip = b.wall_point(-np.pi / 2 + side * 0.25, end[2] + 35, 0.5)
                    middle = b.wall_point(-np.pi / 2 + side * 0.5, end[2] - 4, 0.5)
                    c.paint(Tube(np.array([end, middle, tip]), 5.0 * size), T.CARTILAGE, over)
        sternum = np.array([b.wall_point(-np.pi / 2, z, 0.4) for z in (b.dome_right + 5, b.dome_right + 60, 330)])
        c.paint_layers(Tube(sternum, [6, 7, 7], (2.4, 1, 1)), ((0, T.CORTICAL), (1.6, T.SPONGY)), ANY_BODY)

    def _muscles(self) -> None:
        b, c = self.body, self.canvas
        vr = b.spine_radius
        bulk = self._u(0.85, 1.15)
        thick = self._u(0.6, 1.5)
        over = (T.FAT, T.MEDIASTINAL, T.LUNG)
        for side in (-1, 1):
            levels = range(-230, 340, 40)
            inner = np.array([(side * 26, b.spine(z)[1] + vr + 30, z) for z in levels])
            c.paint(Tube(inner, [17, 24 * bulk, 25 * bulk, 20, 15], (1.0, 1.1, 1)), T.MUSCLE, over)
            outer = np.array([(side * 52, b.spine(z)[1] + vr + 27, z) for z in levels])
            c.paint(Tube(outer, [10, 21 * bulk, 23 * bulk, 17, 10], (1.15, 1.0, 1)), T.MUSCLE, over)
            thin, turn = self.wall.uniform(0.015, 0.06), self.wall.uniform(0, 6, 2)
            if self.wall.random() < 0.85:  # fat between the columns of the back's muscles
                between = (inner + outer) / 2 + np.array((side * turn[0] - side * 3, 0, 0))
                c.paint(Tube(between, 20.0, (thin, 1, 1)), T.SUBCUTANEOUS, [T.MUSCLE])
            psoas = [(side * 86 * self.ax, b.spine(-90)[1] - 42, -262), (side * 70, b.spine(-90)[1] - 22, -190)]
            psoas += [
                (side * (vr * 1.2 + d), b.spine(z)[1] + 2, z) for d, z in ((24, -110), (17, -60), (11, -10), (5, 28))
            ]
            c.paint(Tube(self._course(psoas, 2.0), [15, 19 * bulk, 21 * bulk, 17 * bulk, 12, 5]), T.MUSCLE, [T.FAT])
            quadratus = [(side * 66, b.spine(-130)[1] + 14, -150), (side * 55, b.spine(0)[1] + vr, 20)]
            c.paint(Tube(np.array(quadratus), [13 * bulk, 10], (1.6, 0.8, 1)), T.MUSCLE, [T.FAT])
            crus = [(side * 9, b.spine_front(-35) - 2, -35), (side * 14, b.spine_front(30) - 3, 30)]
            crus += [(side * 17, b.spine_front(80) - 12, 88)]
            c.paint(
                Tube(self._course(crus, 1.5), [3 * thick, 5 * thick, 4.5 * thick], (1, 1.6, 1)),
                T.MUSCLE,
                [T.FAT, T.MEDIASTINAL],
            )

    def _pelvis(self) -> None:
        b, c = self.body, self.canvas
        over = ANY_BODY
        bone = ((0, T.CORTICAL), (2.0, T.SPONGY))
        y0 = b.spine(-180)[1]
        sacrum = np.array([(0, b.spine(z)[1] + d, z) for z, d in ((-190, 8), (-225, 12), (-265, 18), (-300, 8))])
        c.paint_layers(Tube(sacrum, [24, 22, 14, 6], (1.75, 0.75, 1)), bone, over)
        for side in (-1, 1):
            wing = Ellipsoid((side * 92 * self.ax, y0 + 2, -166), (7.5, 52, 52), (0, -side * 0.42, -side * 0.62), 0.4)
            c.paint_layers(wing, bone, over)
            column = np.array([(side * 62, y0 + 34, -195), (side * 84, y0 + 10, -225), (side * 90, y0 - 12, -262)])
            c.paint_layers(Tube(column, [13, 14, 21]), bone, over)
            head = (side * 97 * self.ax, y0 - 12, -275)
            self.hips[side] = head
            c.paint(Ellipsoid(head, (30, 30, 30)), T.CORTICAL, [T.MUSCLE, T.FAT, T.SUBCUTANEOUS])
            c.paint_layers(
                Ellipsoid(head, (24, 24, 24)),
                ((-1.5, T.CARTILAGE), (0, T.CORTICAL), (1.5, T.SPONGY)),
                (*over, T.CORTICAL, T.SPONGY),
            )
            femur = np.array([head, (side * 132 * self.ax, y0 - 4, -300), (side * 138 * self.ax, y0 - 2, -400)])
            c.paint_layers(Tube(femur, [16, 20, 15]), ((0, T.CORTICAL), (4, T.SPONGY)), over)
            pubis = np.array([head, (side * 55, y0 - 52, -300), (side * 6, y0 - 66, -312)])
            c.paint_layers(Tube(pubis, [14, 9, 12]), bone, over)
            ischium = np.array([head, (side * 70, y0 + 22, -330), (side * 60, y0 + 8, -365)])
            c.paint_layers(Tube(ischium, [16, 15, 17]), bone, over)
            gluteus = np.array(
                [
                    (side * 90 * self.ax, y0 + 40, -160),
                    (side * 95 * self.ax, y0 + 58, -240),
                    (side * 110, y0 + 50, -340),
                ]
            )
            c.paint(Tube(gluteus, [16, 36, 34], (1.2, 0.8, 1)), T.MUSCLE, [T.SUBCUTANEOUS, T.FAT])
        c.paint(Ellipsoid((0, y0 - 30, -345), (60, 60, 22)), T.MUSCLE, [T.FAT])
        fill = self._u(0.6, 1.3)
        bladder = Ellipsoid(
            (self._n(0, 4), y0 - 62, -275 + 18 * fill), (44 * fill**0.5, 36 * fill**0.5, 36 * fill), (0.2, 0, 0)
        )
        c.paint_layers(bladder, ((0, T.PELVIC), (self._u(2.5, 5), T.URINE)), [T.FAT])
        c.paint(Ellipsoid((self._n(0, 6), y0 - 14, -278), (26, 20, self._u(20, 45))), T.PELVIC, [T.FAT])
        self.gut.rectum()

    # --- outside the trunk's outline

    def _breasts(self) -> None:
        b, c = self.body, self.canvas
        size, sag, there = self._u(38, 72), self._u(0, 45), self._u(0, 1)
        glandular, asleep = self._u(0.25, 0.75), self._u(0.62, 0.78)
        if not b.female or there < 0.15:
            return
        for side in (-1, 1):
            x, y, z = b.wall_point(-np.pi / 2 + side * asleep, b.dome_right + 28 - sag, 0.0)
            breast = Ellipsoid((x, y - b.fat_front * 0.4, z), (size, size * 0.62, size * 0.9), (0, 0, side * 0.5))
            c.paint_layers(breast, ((0, T.SKIN), (1.6, T.SUBCUTANEOUS)), [T.AIR])
            c.paint(breast.scaled(glandular), T.PELVIC, [T.SUBCUTANEOUS])

    def _arms(self) -> None:
        """Beside the body, where they could not be raised above the head."""
        b, c = self.body, self.canvas
        kind, radius, fat = self._u(0, 1), self._u(33, 48), self._u(0.1, 0.45)
        shift, bone = self.r.normal(0, 10, (2, 3)), ((0, T.CORTICAL), (3.0, T.SPONGY))
        elbow = self._u(-70, 30)
        for side, lying in ((-1, kind < 0.12), (1, kind < 0.08 or kind > 0.95)):
            if not lying:
                continue
            x = side * (b.half_width + radius + 6)
            away = np.array((0.0, 12.0, 0.0)) + np.abs(shift[max(side, 0)]) * (side, 1, 0)
            course = np.array([(x, 0, 330), (x, 8, 120), (x + side * 6, 14, elbow), (x, -4, elbow - 230)]) + away
            arm = Tube(through(course), [radius * 1.15, radius, radius * 0.95, radius * 0.7])
            c.paint_layers(arm, ((0, T.SKIN), (1.6, T.SUBCUTANEOUS), (2 + fat * radius, T.MUSCLE)), [T.AIR])
            inside = (T.MUSCLE, T.SUBCUTANEOUS)
            c.paint_layers(Tube(course[:3], [12, 11, 15]), bone, inside)
            for dy in (-11, 11):
                c.paint_layers(Tube(course[2:] + vector(0, dy, 0), [10, 7]), bone, inside)

    # --- the labelled organs

    def _stomach(self) -> None:
        b, n, c = self.body, self._n, self.canvas
        top = b.dome_left - n(36, 7)
        behind = b.spine_front(-10) - 20  # the plane of the great vessels; the antrum passes in front of the pancreas
        forms = (  # heights of body, sinus, antrum and pylorus: J, long J, steer's horn, cascade
            (0.45 * top + 16, n(22, 9), n(12, 8), n(24, 6)),
            (0.3 * top + 8, n(-28, 12), n(-14, 10), n(16, 7)),
            (0.5 * top + 26, n(44, 7), n(36, 6), n(28, 5)),
            (0.45 * top + 14, n(24, 8), n(16, 7), n(24, 6)),
        )
        form = int(self.r.choice(4, p=(0.4, 0.2, 0.22, 0.18)))
        body_z, sinus_z, antrum_z, pylorus_z = forms[form]
        pylorus = (n(-26, 7) * self.ax, min(-0.42 * b.cavity_front, behind - 34) + n(0, 4), pylorus_z)
        front = n(0.5, 0.05) * b.cavity_front
        back = 0.45 if form == 3 else 0.22
        course = [
            (n(58, 7) * self.ax, back * b.cavity_back, top - (6 if form == 3 else 0)),
            (n(66, 7) * self.ax, -0.3 * front, top - 32),
            (n(56, 8) * self.ax, -0.9 * front, body_z + n(0, 6)),
            (n(32, 8) * self.ax, min(-front, behind - 42), sinus_z),
            (n(4, 7) * self.ax, min(-front, behind - 44), antrum_z),
            pylorus,
        ]
        widths = np.array([29, 31, 28, 22, 17, 9]) * np.exp(self.r.normal(0, (0.16, 0.12, 0.14, 0.18, 0.18, 0.1)))
        tube = Tube(through(course, 4), widths, (n(1.0, 0.06), n(0.92, 0.08), 1))
        tube = tube.bumpy(self.r, self._u(0.03, 0.12))
        tube = tube.of_volume(self._grown_target("stomach", tube.points) * 1.33)
        full = self.targets["stomach"] / 270
        wall = self._u(2.8, 6.5) / max(full, 0.5) ** 0.35
        over = (T.FAT, *BOWEL)
        self._clear(tube, BOWEL)
        empty = full < 0.7 and self.r.random() < 0.6
        inner = self._u(0.35, 0.7) * float(tube.radii.max()) if empty else wall
        c.paint_layers(tube, ((0, T.STOMACH_WALL), (inner, T.STOMACH_CONTENT)), over)
        if self.gut.r.random() < 0.4:  # a meal, or contrast medium, settles behind the fluid
            settled = float(tube.points[:, 1].mean()) + float(self.gut.r.uniform(-12, 25))
            c.settle(tube.grown(-inner), T.STOMACH_FOOD, [T.STOMACH_CONTENT], settled)
        gas, level = self.r.random() < 0.75, self._u(-24, 14)
        if gas:
            height = float(tube.points[:, 1].mean()) + level
            shrunk = Tube(tube.points, list(np.maximum(tube.radii - inner, 0.5)))
            c.level(shrunk, T.STOMACH_GAS, [T.STOMACH_CONTENT, T.STOMACH_FOOD], height)
        self._rugae(tube, inner, full)
        self.shapes["stomach"] = tube
        self.pylorus = pylorus
        i = max(2, len(tube.points) // 6)
        self.cardia = tube.points[i] + vector(-0.8 * tube.radii[i], -0.6 * tube.radii[i], 11.0)

    def _rugae(self, tube: Tube, wall: float, full: float) -> None:
        """Folds along fundus and body; a full stomach has smoothed them."""
        count, size, turn = int(self.r.integers(4, 11)), self._u(1.8, 4.2), self._u(0, 6)
        if self.r.random() < 0.25 + 0.4 * (full > 1.2):
            return
        stop = max(6, int(0.7 * len(tube.points)))
        for k in range(count):
            angles = turn + 2 * np.pi * k / count + np.cumsum(self.r.normal(0, 0.12, stop))
            reach = np.maximum(tube.radii[:stop] - wall, 0)[:, None]
            points = tube.points[:stop] + reach * np.stack([np.cos(angles), np.sin(angles), 0 * angles], 1)
            self.canvas.paint(
                Tube(points[1:], size), T.STOMACH_WALL, (T.STOMACH_CONTENT, T.STOMACH_FOOD, T.STOMACH_GAS)
            )

    def _liver_at(self, scale: float, pose: dict[str, Doubles]) -> Composite:
        k = scale
        right = Ellipsoid(pose["right"], pose["right_axes"] * k, tuple(pose["right_angles"]), 0.35)
        lower = Ellipsoid(pose["lower"], pose["lower_axes"] * k, (0.15, 0, 0))
        left = Ellipsoid(pose["left"], pose["left_axes"] * k, tuple(pose["left_angles"]))
        caudate = Ellipsoid(pose["caudate"], (17 * k, 15 * k, 24 * k))
        hollow = Ellipsoid(pose["hollow"], pose["hollow_axes"])
        fossa = Ellipsoid(pose["fossa"], pose["fossa_axes"])
        groove = Ellipsoid(pose["groove"], pose["groove_axes"])  # where the esophagus comes down
        return Composite((Composite((right, lower, left), (hollow, fossa, groove)), caudate))

    def _liver(self) -> None:
        b, n, c = self.body, self._n, self.canvas
        zl = self.lift
        # A tongue down the flank; a left lobe that reaches the spleen.
        riedel = self._u(15, 45) if self.r.random() < 0.1 else 0.0
        beaver = self._u(20, 45) if self.r.random() < 0.1 else 0.0
        room = 1 + 0.3 * b.visceral
        pose = {
            "right": np.array([-0.56 * self.half + n(0, 3), 4 + n(0, 5), 62 + zl]),
            "right_axes": np.array([n(66, 4) * self.ax, n(84, 5) * self.ay, n(68, 6)]),
            "right_angles": np.array([n(0, 0.08), n(0.1, 0.08), n(0, 0.1)]),
            "lower": np.array([-0.66 * self.half, n(6, 9), n(24, 13) + zl - riedel]),
            "lower_axes": np.array([n(44, 6) * self.ax, n(60, 9) * self.ay, n(60, 11) + 0.8 * riedel]),
            "left": np.array([n(-4, 9) * self.ax, n(-0.52, 0.05) * b.cavity_front, n(86, 8) + zl]),
            "left_axes": np.array([n(76, 15) * self.ax + beaver, n(36, 6) * self.ay, n(35, 7)]),
            "left_angles": np.array([0, n(-0.22, 0.13), n(-0.1, 0.13)]),
            "caudate": np.array([-13 * self.ax, b.spine_front(70) - 34, n(80, 5) + zl]),
            "hollow": np.array([n(10, 5) * self.ax, 14.0 * self.ay, n(18, 5) + zl * 0.6]),
            "fossa": np.array([-(b.spine_radius * 1.2 + 34), b.spine(0)[1] + 46, 6 + 0.35 * zl]),
            "groove": np.array([n(36, 4) * self.ax, b.spine_front(100) - 4, n(100, 4) + zl]),
            "groove_axes": np.array([n(42, 4) * self.ax, n(36, 4) * self.ay, n(48, 4)]),
            "fossa_axes": np.array([30.0 * room, 43.0 * room, 62.0 * room]),
            "hollow_axes": np.array([n(62, 4) * self.ax, n(58, 4) * self.ay, n(50, 4)]),
        }
        hug = Hug(-1, float(self.wall.uniform(4, 16)) * (1 - 0.4 * b.visceral), float(self.wall.uniform(25, 50)))
        scale = self._fit(lambda k: self._liver_at(k, pose), self.targets["liver"] * 1.26, hug)
        liver = self._liver_at(scale, pose)
        self._paint_at_the_wall(liver, ((-2.6, T.BOWEL_WALL, LUMEN), (0.0, T.LIVER, FREE)), hug)
        self.liver = liver
        self.shapes["liver"] = Ellipsoid(pose["right"], pose["right_axes"] * scale * 0.85)
        # Falciform ligament's fissure, porta hepatis
        fissure = [
            (-14 * self.ax, -0.86 * b.cavity_front, n(62, 6) + zl),
            (-18 * self.ax, -0.35 * b.cavity_front, n(72, 5) + zl),
        ]
        c.paint(Tube(through(fissure), self._u(1.5, 4.5), (1, 1, 2.5)), T.FAT, [T.LIVER])
        self.porta = np.array([-32 * self.ax, b.spine_front(60) - 40, n(58, 4) + 0.7 * zl])
        c.paint(Ellipsoid(self.porta + vector(8, 2, -6), (15, 9, 10)), T.FAT, [T.LIVER])
        self._liver_vessels(pose["right"], pose["right_axes"] * scale, pose["left"], pose["left_axes"] * scale)

    def _liver_vessels(self, right: Doubles, axes: Doubles, left: Doubles, left_axes: Doubles) -> None:
        c = self.canvas
        confluence = np.array([-22 * self.ax, self.body.spine_front(90) - 24, right[2] + 42])
        for root, thick in ((self.porta, 5.0), (confluence, 4.8)):
            for k in range(4):
                centre, reach = (left, left_axes) if k == 0 else (right, axes)
                for _ in range(2):
                    way = self.r.normal(size=3) * (0.3, 0.38, 0.32)
                    way[2] *= 1.0 if root is self.porta else 0.5
                    tip = centre + way * reach
                    bend = (root + tip) / 2 + self.r.normal(0, 5, 3)
                    c.paint(
                        Tube(through([root, bend, tip], 4), [thick * self._u(0.7, 1.1), 1.3]), T.LIVER_VESSEL, [T.LIVER]
                    )

    def _paint_at_the_wall(self, shape: Shape, coats: Sequence[Coat], hug: Hug) -> None:
        """As ``Canvas.paint_in_turn``, but the shape swells towards wall and diaphragm."""
        c, lattice = self.canvas, self.field.lattice
        side = np.asarray(lattice.nodes(2), np.float32)  # of the scan's middle: near enough
        pull = hug.pull(np.broadcast_to(side, lattice.shape), self.field.cavity, -self.field.lung)
        sampler = Sampler(lattice, c.grid)
        for box, e in c.distances(shape, (hug.most + max(-depth for depth, _, _ in coats)) * shape.slack):
            e -= sampler.at(pull, box)
            c.coat(box, e, coats)

    def _fit(self, at: Callable[[float], Shape], millilitres: float, hug: Hug) -> float:
        """Scale of a shape at which its part inside the abdominal cavity measures ``millilitres`` in the scan."""
        step = 7.0
        low, high = at(1.6).bounds()
        axes = [np.arange(lo, hi, step) for lo, hi in zip(low, high, strict=True)]
        x, y, z = (a.ravel() for a in np.meshgrid(*axes, indexing="ij"))
        wall, under = _layers(self.body, x, y, z)[2], self.body.dome(x, y) - z
        keep = (wall > 0) & (under > 3)
        growth = self.field.growth_at(x[keep], y[keep], z[keep])
        points = (x[keep].astype(np.float32), y[keep].astype(np.float32), z[keep].astype(np.float32))
        pull = hug.pull(points[0], *(depth[keep].astype(np.float32) for depth in (wall, under)))
        lowest, highest = 0.5, 1.6
        for _ in range(8):
            middle = (lowest + highest) / 2
            volume = float((1 / growth[at(middle).distance(points) < pull]).sum()) * step**3 / 1000
            lowest, highest = (middle, highest) if volume < millilitres else (lowest, middle)
        return (lowest + highest) / 2

    def _spleen(self) -> None:
        b, n = self.body, self._n
        target = self.targets["spleen"]
        size = (target / 200) ** (1 / 3)
        centre = np.array(
            [self.half - n(17, 3) * size, 0.42 * b.cavity_back + n(0, 5), b.dome_left - 42 - 34 * size + n(0, 6)]
        )
        axes = np.array([n(26, 4), n(44, 6), n(48, 7)])
        angles = (n(0.35, 0.2), n(-0.2, 0.13), n(-0.35, 0.2))
        dent, deep = (n(-0.15, 0.15), n(-0.1, 0.2)), n(-1.42, 0.1)

        def at(scale: float) -> Composite:
            body = Ellipsoid(centre, axes * size * scale, angles)
            hollow = Ellipsoid(body.at(deep, *dent), axes * size * (0.85, 0.7, 0.75), angles)
            return Composite((body,), (hollow,))

        hug = Hug(1, float(self.wall.uniform(2, 12)) * (1 - 0.4 * b.visceral), float(self.wall.uniform(0, 14)))
        scale = self._fit(at, target * 1.08, hug)
        missing = "spleen" in self.disease.absent
        if not missing:
            spleen = at(scale)
            over = (T.FAT, *BOWEL, *ORGAN_TISSUES["stomach"], *ORGAN_TISSUES["liver"])
            self._paint_at_the_wall(spleen, ((-2.6, T.BOWEL_WALL, LUMEN), (0.0, T.SPLEEN, over)), hug)
        self.shapes["spleen"] = Ellipsoid(centre, axes * size * scale * 0.8, angles)
        self.hilum = centre + np.array([-22 * size, -8.0, -4.0])

    def _kidneys(self) -> None:
        for name, side, cortex, medulla, height in (
            ("right_kidney", -1, T.RIGHT_CORTEX, T.RIGHT_MEDULLA, 2),
            ("left_kidney", 1, T.LEFT_CORTEX, T.LEFT_MEDULLA, 15),
        ):
            self._kidney(name, side, cortex, medulla, height)

    def _kidney(self, name: str, side: int, cortex: int, medulla: int, height: float) -> None:
        b, n, c = self.body, self._n, self.canvas
        shape = np.array([n(27, 2), n(27, 2), n(53, 4)])
        z = height + n(0, 11) + 0.35 * self.lift
        centre = (side * (b.spine_radius * 1.2 + 34 + n(2, 4)), b.spine(z)[1] + n(6, 5), z)
        # upper pole medial and posterior, hilum towards the front and the middle
        angles = (n(0.16, 0.08), -side * n(0.2, 0.09), side * n(0.5, 0.22))
        if self.disease.horseshoe_kidney:  # low, close, and the lower poles turned to each other
            centre = (centre[0] - side * 9, centre[1] - 8, z - 24)
            angles = (angles[0], side * 0.38, side * 0.15)
        within = np.array(centre) + 0.65 * np.vstack([np.zeros(3), np.diag(shape), -np.diag(shape)])
        target = self._grown_target(name, within) * 1.02  # the sinus goes, the fuller poles come
        axes = shape * (target * 1000 / (4 / 3 * np.pi * float(np.prod(shape)))) ** (1 / 3)
        kidney = Ellipsoid(centre, axes, angles, 0.15)
        self.shapes[name] = kidney
        margin, fat_above = self.gap + self._u(0, 5) * (0.2 + b.visceral), self._u(-4, 4) + 5 * b.visceral
        sinus = Ellipsoid(
            kidney.at(-side * 0.72, -0.1, 0), axes * (self._u(0.42, 0.6), self._u(0.26, 0.38), self._u(0.4, 0.55))
        )
        sinus.turn = kidney.turn
        pyramids = [(t, self.r.random() < 0.85, self.r.normal(0, 0.08)) for t in np.linspace(-2.4, 2.4, 9)]
        thickness = self._u(0.2, 0.28)
        pelvis = self._u(3, 7)
        shell = Composite(
            (kidney.grown(margin), Ellipsoid(kidney.at(0, 0.2, 0.9), axes * (0.6, 0.75, 0.35) + fat_above))
        )
        everything = (*BOWEL, *ORGAN_TISSUES["liver"], T.SPLEEN, *ORGAN_TISSUES["stomach"])
        c.paint(shell, T.FAT, everything)
        if name in self.disease.absent:
            return
        c.paint(kidney, cortex, (T.FAT, T.MUSCLE))
        for t, there, jitter in pyramids:
            if not there:
                continue
            for front in (-0.36, 0.36):
                spot = kidney.at(side * (0.36 * np.cos(t * 0.62) + jitter), front, 0.68 * np.sin(t * 0.62))
                c.paint(Ellipsoid(spot, axes * (0.24, 0.26, 0.15) * (1.25 - thickness)), medulla, [cortex])
        c.paint(sinus, T.SINUS, [cortex, medulla])
        c.paint(Ellipsoid(sinus.at(-0.2, 0, -0.1), (pelvis * 1.6, pelvis * 0.7, pelvis)), T.URINE, [T.SINUS, T.FAT])
        for k in range(3):
            calyx = np.array([sinus.at(-0.1, 0, 0), sinus.at(0.75, 0, 0.75 * (k - 1))])
            c.paint(Tube(calyx, 1.8), T.URINE if k % 2 else T.VEIN, [T.SINUS])

    def _great_vessels(self) -> None:
        b, n, c = self.body, self._n, self.canvas
        ra = self._u(7.4, 11.6) * (1.06 if not b.female else 0.95)
        bow = n(0, 3.5)  # an old aorta winds
        front = b.spine_front
        bifurcation = n(-90, 11)
        aorta = [
            (n(22, 3), front(330) + 6, 330),
            (n(22, 3), front(200) + 2, 200),
            (n(14, 3) - bow, front(120) - ra * 0.5, 120),
            (n(8, 2.5) + 0.4 * bow, front(50) - ra, 50),
            (max(n(6, 3) + bow, 1.0), front(-20) - ra, -20),
            (n(3, 2), front(bifurcation) - ra * 0.9, bifurcation),
        ]
        self.aorta = Tube(self._course(aorta, 0.8), [ra * 1.18, ra * 1.12, ra * 1.05, ra, ra * 0.85, ra * 0.8])
        around = (T.FAT, T.MEDIASTINAL, *BOWEL, T.MUSCLE, T.LUNG, *ORGAN_TISSUES["liver"], *ORGAN_TISSUES["stomach"])
        rv = self._u(8.0, 13)
        cava = [
            (n(-20, 2), front(bifurcation) - rv * 0.6, bifurcation - 10),
            (n(-22, 2), front(-20) - rv * 0.7, -20),
            (n(-24, 2), front(35) - rv - 4, 35),
            (n(-26, 2), front(80) - rv - 11, 80),
            (n(-25, 2), front(110) - rv - 20, b.dome_right - 22),
            (float(self.atrium[0]), float(self.atrium[1]), float(self.atrium[2])),
        ]
        self.cava = Tube(
            self._course(cava, 0.8),
            [rv * 0.92, rv * 0.95, rv, rv * 1.05, rv * 1.15, rv * 1.2],
            (1.15, self._u(0.5, 1.0), 1),
        )
        iliacs = self._iliac_vessels(aorta[-1], cava[0], ra, rv)
        for side, name in ((-1, "right_kidney"), (1, "left_kidney")):
            kidney = self.shapes[name]
            assert isinstance(kidney, Ellipsoid)
            hilum = kidney.at(-side * 0.55, -0.1, 0)
            missing = name in self.disease.absent
            for tissue, radius, lift, dy in ((T.ARTERY, self._u(2.2, 3.4), 3, 4), (T.VEIN, self._u(3.5, 5.5), -5, -6)):
                from_aorta = tissue == T.ARTERY
                x0 = 6 if from_aorta else -22
                start = (
                    x0,
                    front(0) - (ra if from_aorta else rv * 1.1 + (4 if side > 0 else 0)),
                    float(hilum[2]) * 0.5 + lift,
                )
                bend_y = front(0) + dy + (-ra * 1.9 if side > 0 and not from_aorta else 4)
                bend = (side * 22, bend_y, float(hilum[2]) * 0.7 + lift)
                vessel = Tube(self._course([start, bend, hilum + vector(0, 0, lift)], 1.0), [radius, radius * 0.9])
                if not missing:
                    c.paint(vessel, tissue, (T.FAT, T.SINUS, T.MUSCLE))
        c.paint(self.cava.wide(1.12), T.FAT, [T.BOWEL_WALL, T.MUSCLE])
        c.paint(self.cava, T.CAVA, (*around, T.VEIN))
        c.paint(self.aorta, T.AORTA, (*around, T.CAVA, T.ARTERY, T.VEIN))
        self._plaques(iliacs)

    def _iliac_vessels(self, fork: ArrayLike, meeting: ArrayLike, ra: float, rv: float) -> list[Tube]:
        """Below both bifurcations, background: arteries nearly as wide as the aorta now and then. Returns these."""
        b, r, arteries = self.body, self.wall, []
        back = b.spine(-180)[1]
        for side in (-1, 1):
            for start, tissue, radius, off in (
                (fork, T.ARTERY, ra * r.uniform(0.5, 0.78), 0),
                (meeting, T.VEIN, rv * r.uniform(0.65, 0.95), 8),
            ):
                winds = r.normal(0, r.choice((2.0, 7.0)), (3, 3)).clip(-13, 13)
                beside = np.array(
                    [
                        (side * 32, b.spine(-130)[1] - 34 + off, -138),
                        (side * 52, back - 42 + off, -190),
                        (side * 84 * self.ax, back - 72 + off, -275),
                    ]
                )
                end = (side * 88 * self.ax, back - 80 + off, -400)
                wide = r.uniform(1.3, 1.8) if r.random() < 0.08 and tissue == T.ARTERY else 1.0
                vessel = Tube(through([start, *(beside + winds), end], 4), radius * np.array((1, wide, wide, 0.9, 0.8)))
                inner = [
                    vessel.points[6],
                    (side * 46, back - 8 + off, -235),
                    (side * 58, back + 14 + off, -290),
                ]
                for tube in (Tube(through(inner, 3), [0.65 * radius, 0.4 * radius]), vessel):
                    self.canvas.paint(tube, tissue, (T.FAT, *BOWEL, T.MUSCLE))
                arteries += [vessel] if tissue == T.ARTERY else []
        return arteries

    def _plaques(self, iliacs: list[Tube]) -> None:
        """Chalk in the walls of aorta and iliac arteries: none in half of the bodies, much in some."""
        r = self.wall
        count = int(r.poisson(40 * max(0.0, 2 * r.random() - 1) ** 1.5))
        for _ in range(count):
            vessel = self.aorta if r.random() < 0.6 else iliacs[int(r.integers(2))]
            stretch = len(vessel.points) // 2  # the lower aorta, the upper iliac artery
            i = int(r.integers(stretch, len(vessel.points)) if vessel is self.aorta else r.integers(0, stretch))
            way, size = r.uniform(0, 2 * np.pi), r.uniform((0.7, 0.7, 1.5), (2.4, 2.4, 6.5))
            spot = vessel.points[i] + 0.9 * vessel.radii[i] * vector(np.cos(way), np.sin(way), r.uniform(-0.5, 0.5))
            tissue, over = (T.AORTA_PLAQUE, T.AORTA) if vessel is self.aorta else (T.PLAQUE, T.ARTERY)
            self.canvas.paint(Ellipsoid(spot, size), tissue, [over])

    def _duodenum_and_pancreas(self) -> None:
        b, n, c = self.body, self._n, self.canvas
        aorta_y = b.spine_front(-10) - 20
        low = n(-44, 11)
        px, py, pz = self.pylorus
        wide, bulb = n(-50, 6) * self.ax, self._u(0.85, 1.4)
        climbs = self._u(0, 1) < 0.25  # no level third part: a V
        duodenum = [
            (px, py, pz),
            (px - 16, py + 14, pz + n(8, 5)),
            (0.5 * (px - 16 + wide), aorta_y - 14, 0.5 * (pz + n(8, 5))),
            (wide, aorta_y - n(2, 4), 0.5 * low + 12),
            (0.9 * wide, aorta_y - n(4, 3), low + 8),
            (n(-24, 4) * self.ax, aorta_y - 14, low + (4 if climbs else 0)),
            (4, aorta_y - 15, low + (16 if climbs else n(3, 3))),
            (26 * self.ax, aorta_y - 10, low + (28 if climbs else 14)),
            (n(30, 5) * self.ax, aorta_y - 16, low + n(36 if climbs else 30, 6)),
        ]
        widths = np.array([9, 13 * bulb, 12, 12, 12, 11, 9.5, 10.5, 10.5]) * np.exp(self.r.normal(0, 0.13, 9))
        tube = Tube(self._course(duodenum, 2.5), widths, (1, self._u(0.8, 1.0), 1))
        tube = tube.bumpy(self.r, self._u(0.05, 0.16))
        tube = tube.of_volume(self._grown_target("duodenum", tube.points) * 1.1)
        ends = tube.points[-1]
        jejunum = Tube(
            self._course(
                [ends, ends + vector(14, -22, -6), ends + vector(34, -30, -28), ends + vector(26, -34, -62)], 4
            ),
            self._u(10, 13),
        )
        self.gut.piece(jejunum.bumpy(self.r, 0.05), (T.BOWEL_FLUID, T.FOLDS, T.BOWEL_WALL), [T.FAT])
        over = (T.FAT, *BOWEL, *ORGAN_TISSUES["liver"], T.VEIN, T.ARTERY, T.RIGHT_CORTEX)
        self._mesenteric_vessels(aorta_y, low)
        self._clear(tube, BOWEL)
        wall = self._u(2.0, 3.6) if self.r.random() < 0.75 else self._u(4.5, 8.0)
        c.paint_layers(tube, ((0, T.DUODENUM_WALL), (wall, T.DUODENUM_CONTENT)), over)
        if self.r.random() < 0.35:
            at = int(self.r.integers(2, 12))
            bubble = Tube(tube.points[at : at + 4], list(np.maximum(tube.radii[at : at + 4] - wall, 1)))
            c.level(bubble, T.DUODENUM_GAS, [T.DUODENUM_CONTENT], float(bubble.points[:, 1].mean()) - self._u(-2, 4))
        self._pancreas(aorta_y, low, tube)

    def _mesenteric_vessels(self, aorta_y: float, low: float) -> None:
        n, c = self._n, self.canvas
        over = (T.FAT, *BOWEL, T.LIVER)
        sma = [
            (6, aorta_y + 8, 14),
            (4, aorta_y - 18, 6),
            (3, aorta_y - 30, -30),
            (0, aorta_y - 34, low - 20),
            (-8, aorta_y - 30, -110),
        ]
        c.paint(Tube(self._course(sma, 1.2), [4.0, 3.6, 3.2, 2.2]), T.ARTERY, over)
        celiac: list[ArrayLike] = [
            (7, aorta_y + 6, 30),
            (6, aorta_y - 18, 34),
            (26, aorta_y - 16, 40),
            (0.6 * self.hilum[0], aorta_y, 48),
            self.hilum,
        ]
        c.paint(Tube(self._course(celiac, 2), [3.8, 3.0, 2.4]), T.ARTERY, over)
        hepatic: list[ArrayLike] = [(6, aorta_y - 18, 34), (-14, aorta_y - 24, 38), self.porta + vector(4, -6, -4)]
        c.paint(Tube(self._course(hepatic, 1.5), [2.8, 2.2]), T.ARTERY, over)
        self.confluence = np.array([-10 + n(0, 2), aorta_y - 22, 12.0 + n(0, 3)])
        thick = self._u(5.2, 7.5)
        portal: list[ArrayLike] = [
            self.confluence,
            self.confluence + vector(-9, 0, 18),
            self.porta + vector(6, 4, -6),
            self.porta + vector(-6, 0, 6),
        ]
        c.paint(Tube(self._course(portal, 1.0), [thick, thick, thick * 0.85]), T.PORTAL, over)
        smv: list[ArrayLike] = [
            self.confluence,
            (-9, aorta_y - 29, -20),
            (-9, aorta_y - 34, low - 18),
            (-14, aorta_y - 32, -110),
        ]
        c.paint(Tube(self._course(smv, 1.2), [thick * 0.9, thick * 0.8, thick * 0.5]), T.PORTAL, over)
        self.splenic = [
            self.confluence,
            np.array([14, aorta_y - 19, 20.0]),
            np.array([44 * self.ax, aorta_y + 4, 32.0]),
            self.hilum,
        ]
        c.paint(Tube(through(self.splenic), [thick * 0.75, thick * 0.55]), T.PORTAL, over)

    def _pancreas(self, aorta_y: float, low: float, duodenum: Tube) -> None:
        n, c, u = self._n, self.canvas, self._u
        head = np.array([n(-31, 3) * self.ax, aorta_y - n(12, 2), -12.0 + n(0, 6)])
        tail = self.hilum + np.array([n(-8, 6), n(-5, 5), n(-4, 7)])
        s = self.splenic
        reach, arch = (
            u(0.45, 1.0),
            n(0, 6),
        )  # short of the splenic hilum or up to it; rising, level or bent over the spine
        turn = (0.4 * s[2] + 0.6 * tail) * reach + s[2] * (1 - reach)
        end = tail * reach + (0.65 * s[2] + 0.35 * tail) * (1 - reach)
        course = [
            head + vector(2, 0, -16),
            head,
            head + vector(5, -7, 16),
            self.confluence + vector(2, -11, 4),
            s[1] + vector(4, -9, n(-2, 3) + 0.6 * arch),
            s[2] + vector(0, -8, n(-3, 3) + arch),
            turn + vector(0, -6, n(0, 3)),
            end,
        ]
        widths = np.array([9, 12.5, 11.5, 8, 8.5, 9, 9.5, 7]) * np.exp(self.r.normal(0, 0.12, 8))
        widths[:3] *= u(0.8, 1.2)
        widths[5:] *= u(0.75, 1.3)
        body = Tube(self._course(course, 2.0), widths, (1, u(0.75, 1.05), u(0.95, 1.35)))
        body = body.bumpy(self.r, u(0.05, 0.2))
        body = body.of_volume(self._grown_target("pancreas", body.points) * 1.16)
        uncinate = Tube(
            through(
                [head + vector(4, 4, -14), head + vector(16, 2, -16), (n(-6, 4), aorta_y - 15, head[2] - n(4, 3))], 3
            ),
            np.array([7, 6, 4.5]) * u(0.6, 1.2),
        )
        over = (T.FAT, *BOWEL, *ORGAN_TISSUES["liver"], T.ARTERY)
        self._clear(body, (*BOWEL, T.LIVER))
        stomach = ORGAN_TISSUES["stomach"]  # yields, but keeps its wall
        wall = (-self.gap - 3.5, T.STOMACH_WALL, (T.STOMACH_CONTENT, T.STOMACH_FOOD, T.STOMACH_GAS))
        c.paint_in_turn(body, (wall, (-self.gap, T.FAT, stomach)))
        wide, obstructed = self._u(1.4, 3.5), self.r.random() < 0.6
        duct = wide if obstructed and "pancreas" in self.disease.lesions else 0.9
        c.paint(uncinate, T.PANCREAS, (T.FAT, *BOWEL))
        c.paint(body, T.PANCREAS, over)
        self._lobules(body)
        c.paint(Tube(body.points[3:-2], duct), T.DUCT, [T.PANCREAS])
        bile = [self.porta + vector(-4, -6, -2), head + vector(-2, 6, 12), head + vector(-6, 6, -8)]
        self.bile = Tube(through(bile, 4), self._u(2.0, 3.8))
        c.paint(self.bile, T.URINE, (T.FAT, T.PANCREAS))
        self.shapes["pancreas"] = body

    def _lobules(self, body: Tube) -> None:
        """Lobules on the surface; the fat between them, hardly any in the young, much in the old and the obese."""
        u = self._u
        outward, clefts = int(self.r.integers(0, 26)), int(34 * u(0, 1) ** 2 * (0.4 + self.body.visceral))
        for k in range(outward + clefts):
            i = int(self.r.integers(0, len(body.points)))
            way = self.r.normal(size=3)
            way /= np.linalg.norm(way)
            if k < outward:
                spot, size = body.points[i] + 0.85 * body.radii[i] * way, u(0.3, 0.6) * body.radii[i]
                self.canvas.paint(Ellipsoid(spot, size * self.r.uniform(0.8, 1.3, 3)), T.PANCREAS, FREE)
            else:
                spot, size = body.points[i] + u(0.4, 1.0) * body.radii[i] * way, u(1.2, 2.6)
                self.canvas.paint(Ellipsoid(spot, size * self.r.uniform(0.6, 1.8, 3)), T.FAT, [T.PANCREAS])

    def _esophagus(self) -> None:
        b, n, c = self.body, self._n, self.canvas
        front = b.spine_front
        hiatus = b.dome_right - n(36, 6)
        course = [
            (n(2, 2), front(330) - 12, 330),
            (n(2, 3), front(230) - 13, 230),
            (n(2, 3), front(180) - 16, 175),
            (n(8, 3), front(130) - 26, max(hiatus + 14, 108)),
            (n(14, 3), front(100) - 34, hiatus),
            tuple(self.cardia),
        ]
        tube = Tube(
            self._course(course, 0.8, 6),
            [self._u(7, 9), self._u(6.5, 8.5), self._u(7, 9.5), self._u(7.5, 10)],
            (1.15, 0.85, 1),
        )
        over = (
            T.FAT,
            T.MEDIASTINAL,
            T.LUNG,
            T.MUSCLE,
            *BOWEL,
            *ORGAN_TISSUES["liver"],
            T.MYOCARDIUM,
            T.LEFT_HEART,
            T.RIGHT_HEART,
            T.STOMACH_WALL,
        )
        c.paint(tube.grown(self.gap), T.FAT, [T.LUNG, T.LEFT_HEART, T.MYOCARDIUM, T.LIVER])
        c.paint(tube, T.ESOPHAGUS_WALL, over)
        gas, fluid = self.r.random() < 0.5, self.r.random() < 0.3
        start, stop = sorted(self.r.integers(0, 24, 2))
        lumen = Tube(tube.points[start : stop + 3], self._u(1.5, 4.0))
        if gas or fluid:
            c.paint(lumen, T.ESOPHAGUS_GAS if gas else T.ESOPHAGUS_FLUID, [T.ESOPHAGUS_WALL])

    def _gallbladder(self) -> None:
        b, n, c = self.body, self._n, self.canvas
        shape = np.array([n(12, 1.5), n(13, 1.5), n(27, 4)])
        x, y = n(-53, 9) * self.ax, -0.4 * b.cavity_front + n(0, 8)
        angles = (n(0.72, 0.25), n(0.15, 0.2), n(0.0, 0.25))
        # The fossa: where a line upwards at (x, y) first meets the liver's undersurface.
        z = np.arange(-60.0, 110.0, 2.0).astype(np.float32)
        inside = self.liver.distance((np.full_like(z, x), np.full_like(z, y), z)) < 0
        under = float(z[np.argmax(inside)]) if inside.any() else 20.0
        target = self._grown_target("gallbladder", np.array((x, y, under)))
        axes = shape * (target * 1000 / (4 / 3 * np.pi * float(np.prod(shape)))) ** (1 / 3)
        gallbladder = Ellipsoid((x, y, under + 1), axes, angles, 0.1)
        self.shapes["gallbladder"] = gallbladder
        if "gallbladder" in self.disease.absent:
            return
        c.paint(gallbladder.grown(1.5), T.FAT, BOWEL)
        # The fossa is open to the front and the midline: in no slice does liver enclose the gallbladder.
        opening = Ellipsoid((x + 4.0, y - 4.5, under + 1), axes, angles, 0.1)
        c.paint(opening.grown(4.0), T.FAT, ORGAN_TISSUES["liver"])
        over = (T.FAT, *BOWEL, *ORGAN_TISSUES["liver"], *ORGAN_TISSUES["duodenum"], T.MUSCLE)
        c.paint(gallbladder, T.GALLBLADDER, over)

    def _adrenals(self) -> None:
        b, n = self.body, self._n
        for name, side, tissue in (
            ("right_adrenal_gland", -1, T.RIGHT_ADRENAL),
            ("left_adrenal_gland", 1, T.LEFT_ADRENAL),
        ):
            kidney = self.shapes["right_kidney" if side < 0 else "left_kidney"]
            assert isinstance(kidney, Ellipsoid)
            pole = kidney.at(0, 0, 1.0)
            if side < 0:  # behind the vena cava, above the kidney, beside the crus
                high = np.clip(float(pole[2]) + n(3, 5), 36.0, b.dome_right - 58)
                middle = np.array([n(-31, 2.5), b.spine_front(55) - n(2, 3), high])
            else:  # in front of the upper pole, beside the aorta
                forward = min(float(pole[1]) - n(25, 4), b.spine_front(50) - n(1, 2))
                middle = np.array([n(33, 4), forward, min(float(pole[2]) - n(6, 6), b.dome_right - 66)])
            parts = self._adrenal_limbs(middle, side)
            gland = self._of_volume(parts, middle, 1.07 * self._grown_target(name, middle))
            margin = 0.3 + min(self.gap, 3.5) * self._u(0.2, 1.0)
            around = (
                *ORGAN_TISSUES["liver"],
                *ORGAN_TISSUES["stomach"],
                T.SPLEEN,
                T.PANCREAS,
                T.MUSCLE,
                *BOWEL,
                T.PORTAL,
            )
            kidneys = (T.RIGHT_CORTEX, T.LEFT_CORTEX, T.RIGHT_MEDULLA, T.LEFT_MEDULLA)
            for part in gland:
                self.canvas.paint(part.grown(margin), T.FAT, (*around, *kidneys))
            for part in gland:
                self.canvas.paint(part, tissue, (T.FAT, T.MUSCLE, T.ARTERY, T.VEIN))

    def _adrenal_limbs(self, middle: Doubles, side: int) -> list[Tube]:
        """A crest in front and two thin leaves behind it, slice by slice: Y, V, lambda or a single line."""
        u, n = self._u, self._n
        form = self.r.choice(("Y", "V", "lambda", "line"), p=(0.34, 0.3, 0.22, 0.14))
        height, levels = u(22, 40), 5
        crest = {"Y": u(6, 13), "V": u(0, 3), "lambda": u(8, 16), "line": u(5, 10)}[form]
        lengths = np.array((u(13, 26), u(11, 24)))
        if form == "lambda":
            lengths[int(self.r.integers(2))] *= 0.55
        if form == "line":
            lengths[1] = 0.0
        medial = u(-0.1, 0.35) if side < 0 else u(-0.25, 0.3)  # 0 is straight back, pi/2 away from the midline
        directions = (medial, medial + u(0.35, 1.2))
        curve, thick = self.r.normal(0, 0.25, 2), (u(1.5, 2.7), u(1.4, 2.6), u(1.5, 2.7))
        lean = np.array((side * u(-2, 6), u(-7, 2), 0.0))  # from the top down: along the kidney's slope
        stretch = 0.75 * height / (levels - 1) / min(thick)
        parts = []
        for t in np.linspace(0, 1, levels):
            fork = middle + lean * (t - 0.5) + vector(0, 0, height * (0.5 - t)) + self.r.normal(0, 0.6, 3)
            share = np.sin(np.pi * np.clip((0.22 + 0.62 * t, 0.12 + 0.68 * t), 0, 1))  # the medial leaf sits higher
            if crest > 1:
                tip = fork + vector(-side * crest * 0.3, -crest, 0) * (0.6 + 0.4 * share[0])
                parts.append(Tube(np.array([tip, fork]), [0.8 * thick[0], thick[0]], (1, 1, stretch)))
            for k in (0, 1):
                length = float(lengths[k] * share[k])
                if length < 3:
                    continue
                way = directions[k] + np.array((-0.5, 0.5)) * curve[k]
                steps = np.stack([side * np.sin(way), np.cos(way), 0 * way], 1) * length / 2
                leaf = fork + np.vstack([np.zeros(3), np.cumsum(steps, axis=0)])
                parts.append(Tube(leaf, [thick[k + 1], thick[k + 1], 0.75 * thick[k + 1]], (1, 1, stretch)))
        if n(0, 1) > -1.0:  # a body where the leaves meet
            half = np.array((0, 0, u(0.15, 0.4) * height))
            parts.append(Tube(np.array([middle + half + lean * -0.2, middle - half + lean * 0.2]), u(2.6, 4.4)))
        return parts

    @staticmethod
    def _of_volume(parts: list[Tube], about: Doubles, millilitres: float) -> list[Tube]:
        """Tubes enlarged or shrunk from ``about`` until their union has the volume."""
        whole, step = Composite(parts), 1.25
        axes = [np.arange(lo, hi, step, dtype=np.float32) for lo, hi in zip(*whole.bounds(), strict=True)]
        x, y, z = np.meshgrid(*axes, indexing="ij")
        volume = float((whole.distance((x, y, z)) < 0).sum()) * step**3 / 1000
        factor = float(np.clip((millilitres / max(volume, 0.1)) ** (1 / 3), 0.6, 1.6))
        return [part.moved(about, factor) for part in parts]
