"""Aorta, vena cava, their branches; the portal vein and its roots."""

import numpy as np
from numpy.typing import ArrayLike

from train.phantom.anatomy.scene import Doubles, Scene
from train.phantom.canvas import Ellipsoid, Tube, through, vector
from train.phantom.tissue import BOWEL, ORGAN_TISSUES, T


def great_vessels(scene: Scene) -> None:
    """Aorta and vena cava, iliac and renal vessels; leaves ``aorta`` and ``cava``."""
    b, n, c = scene.body, scene.n, scene.canvas
    ra = scene.u(7.4, 11.6) * (1.06 if not b.female else 0.95)
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
    scene.aorta = Tube(scene.course(aorta, 0.8), [ra * 1.18, ra * 1.12, ra * 1.05, ra, ra * 0.85, ra * 0.8])
    around = (T.FAT, T.MEDIASTINAL, *BOWEL, T.MUSCLE, T.LUNG, *ORGAN_TISSUES["liver"], *ORGAN_TISSUES["stomach"])
    rv = scene.u(8.0, 13)
    cava = [
        (n(-20, 2), front(bifurcation) - rv * 0.6, bifurcation - 10),
        (n(-22, 2), front(-20) - rv * 0.7, -20),
        (n(-24, 2), front(35) - rv - 4, 35),
        (n(-26, 2), front(80) - rv - 11, 80),
        (n(-25, 2), front(110) - rv - 20, b.dome_right - 22),
        (float(scene.atrium[0]), float(scene.atrium[1]), float(scene.atrium[2])),
    ]
    course = scene.course(cava, 0.8)
    widths = [rv * 0.92, rv * 0.95, rv, rv * 1.05, rv * 1.15, rv * 1.2]
    scene.cava = Tube(
        course, widths, _flatness(course[:, 2], scene.u(0.35, 0.85), float(scene.wall.uniform(0.6, 1.05)))
    )
    iliacs = _iliac_vessels(scene, aorta[-1], cava[0], ra, rv)
    _renal_vessels(scene, ra, rv)
    c.paint(scene.cava.wide(1.12), T.FAT, [T.BOWEL_WALL, T.MUSCLE])
    c.paint(scene.cava, T.CAVA, (*around, T.VEIN))
    c.paint(scene.aorta, T.AORTA, (*around, T.CAVA, T.ARTERY, T.VEIN))
    _plaques(scene, iliacs)


def _flatness(z: Doubles, low: float, high: float) -> Doubles:
    """Stretch of the vena cava at heights ``z`` mm: its depth over its width is ``low`` below the renal veins, ``high`` in the liver.

    Where little blood fills it, its walls meet; it does not grow wider for it.
    """
    ratio = np.interp(z, (15, 85), (low, high))
    wide = 0.93 * np.maximum(ratio, 0.55) ** -0.5
    return np.stack([wide, wide * ratio, np.ones(len(z))], 1)


def _renal_vessels(scene: Scene, ra: float, rv: float) -> None:
    """Artery and vein of each kidney that is there; the left vein passes in front of the aorta."""
    front, c = scene.body.spine_front, scene.canvas
    for side, name in ((-1, "right_kidney"), (1, "left_kidney")):
        kidney = scene.shapes[name]
        assert isinstance(kidney, Ellipsoid)
        hilum = kidney.at(-side * 0.55, -0.1, 0)
        missing = name in scene.disease.absent
        for tissue, radius, lift, dy in ((T.ARTERY, scene.u(2.2, 3.4), 3, 4), (T.VEIN, scene.u(3.5, 5.5), -5, -6)):
            from_aorta = tissue == T.ARTERY
            x0 = 6 if from_aorta else -22
            start = (
                x0,
                front(0) - (ra if from_aorta else rv * 1.1 + (4 if side > 0 else 0)),
                float(hilum[2]) * 0.5 + lift,
            )
            bend_y = front(0) + dy + (-ra * 1.9 if side > 0 and not from_aorta else 4)
            bend = (side * 22, bend_y, float(hilum[2]) * 0.7 + lift)
            vessel = Tube(scene.course([start, bend, hilum + vector(0, 0, lift)], 1.0), [radius, radius * 0.9])
            if not missing:
                c.paint(vessel, tissue, (T.FAT, T.SINUS, T.MUSCLE))


def _iliac_vessels(scene: Scene, fork: ArrayLike, meeting: ArrayLike, ra: float, rv: float) -> list[Tube]:
    """Below both bifurcations, background: arteries nearly as wide as the aorta now and then. Returns these."""
    b, r, arteries = scene.body, scene.wall, []
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
                    (side * 84 * scene.ax, back - 72 + off, -275),
                ]
            )
            end = (side * 88 * scene.ax, back - 80 + off, -400)
            wide = r.uniform(1.3, 1.8) if r.random() < 0.08 and tissue == T.ARTERY else 1.0
            vessel = Tube(through([start, *(beside + winds), end], 4), radius * np.array((1, wide, wide, 0.9, 0.8)))
            inner = [
                vessel.points[6],
                (side * 46, back - 8 + off, -235),
                (side * 58, back + 14 + off, -290),
            ]
            for tube in (Tube(through(inner, 3), [0.65 * radius, 0.4 * radius]), vessel):
                scene.canvas.paint(tube, tissue, (T.FAT, *BOWEL, T.MUSCLE))
            arteries += [vessel] if tissue == T.ARTERY else []
    return arteries


def _plaques(scene: Scene, iliacs: list[Tube]) -> None:
    """Chalk in the walls of aorta and iliac arteries: none in half of the bodies, much in some."""
    r = scene.wall
    count = int(r.poisson(40 * max(0.0, 2 * r.random() - 1) ** 1.5))
    for _ in range(count):
        vessel = scene.aorta if r.random() < 0.6 else iliacs[int(r.integers(2))]
        stretch = len(vessel.points) // 2  # the lower aorta, the upper iliac artery
        i = int(r.integers(stretch, len(vessel.points)) if vessel is scene.aorta else r.integers(0, stretch))
        way, size = r.uniform(0, 2 * np.pi), r.uniform((0.7, 0.7, 1.5), (2.4, 2.4, 6.5))
        spot = vessel.points[i] + 0.9 * vessel.radii[i] * vector(np.cos(way), np.sin(way), r.uniform(-0.5, 0.5))
        tissue, over = (T.AORTA_PLAQUE, T.AORTA) if vessel is scene.aorta else (T.PLAQUE, T.ARTERY)
        scene.canvas.paint(Ellipsoid(spot, size), tissue, [over])


def mesenteric_vessels(scene: Scene, aorta_y: float, low: float) -> None:
    """Around the pancreas: coeliac trunk, superior mesenteric vessels, portal and splenic vein; leaves ``confluence``, ``splenic``."""
    n, c = scene.n, scene.canvas
    over = (T.FAT, *BOWEL, T.LIVER)
    # From the aorta; in the lean hardly more than a vessel's width.
    far = scene.u(0.5, 0.85) + 0.25 * scene.body.visceral
    sma = [
        (6, aorta_y + 8, 14),
        (4, aorta_y - 18 * far, 6),
        (3, aorta_y - 10 - 20 * far, -30),
        (0, aorta_y - 34, low - 20),
        (-8, aorta_y - 30, -110),
    ]
    c.paint(Tube(scene.course(sma, 1.2), [4.0, 3.6, 3.2, 2.2]), T.ARTERY, over)
    celiac: list[ArrayLike] = [
        (7, aorta_y + 6, 30),
        (6, aorta_y - 18, 34),
        (26, aorta_y - 16, 40),
        (0.6 * scene.hilum[0], aorta_y, 48),
        scene.hilum,
    ]
    c.paint(Tube(scene.course(celiac, 2), [3.8, 3.0, 2.4]), T.ARTERY, over)
    hepatic: list[ArrayLike] = [(6, aorta_y - 18, 34), (-14, aorta_y - 24, 38), scene.porta + vector(4, -6, -4)]
    c.paint(Tube(scene.course(hepatic, 1.5), [2.8, 2.2]), T.ARTERY, over)
    scene.confluence = np.array([-10 + n(0, 2), aorta_y - 3 - 19 * far, 12.0 + n(0, 3)])
    thick = scene.u(5.2, 7.5)
    portal: list[ArrayLike] = [
        scene.confluence,
        scene.confluence + vector(-9, 0, 18),
        scene.porta + vector(6, 4, -6),
        scene.porta + vector(-6, 0, 6),
    ]
    c.paint(Tube(scene.course(portal, 1.0), [thick, thick, thick * 0.85]), T.PORTAL, over)
    smv: list[ArrayLike] = [
        scene.confluence,
        (-9, aorta_y - 10 - 19 * far, -20),
        (-9, aorta_y - 34, low - 18),
        (-14, aorta_y - 32, -110),
    ]
    c.paint(Tube(scene.course(smv, 1.2), [thick * 0.9, thick * 0.8, thick * 0.5]), T.PORTAL, over)
    scene.splenic = [
        scene.confluence,
        np.array([14, aorta_y - 2 - 18 * far, 20.0]),
        np.array([44 * scene.ax, aorta_y + 12 - 9 * far, 32.0]),
        scene.hilum,
    ]
    c.paint(Tube(through(scene.splenic), [thick * 0.75, thick * 0.55]), T.PORTAL, over)


def small_vessels(scene: Scene) -> None:
    """What else lies in the fat beside the adrenal glands: phrenic, gastric and splenic branches, and nodes of lymph."""
    b, r, c = scene.body, scene.branches, scene.canvas
    for _ in range(int(r.poisson(5))):
        start = np.array((r.uniform(-8, 34), b.spine_front(50) - r.uniform(2, 30), r.uniform(20, 90)))
        way = r.normal(0, (26, 16, 20))
        bend = start + way / 2 + r.normal(0, 6, 3)
        tissue, radius = (T.ARTERY, T.VEIN)[int(r.integers(2))], r.uniform(0.8, 2.1)
        c.paint(Tube(through([start, bend, start + way], 4), [radius, 0.7 * radius]), tissue, [T.FAT])
    for _ in range(int(r.poisson(4))):  # at the hilum of the spleen
        start = scene.hilum + r.normal(0, (5, 8, 10))
        end = start + r.normal((9, 0, 0), (9, 16, 22))
        tissue, radius = (T.ARTERY, T.PORTAL)[int(r.random() < 0.7)], r.uniform(1.2, 3.6)
        course = through([start, (start + end) / 2 + r.normal(0, 5, 3), end], 4)
        c.paint(Tube(course, [radius, 0.7 * radius]), tissue, [T.FAT])
    for _ in range(int(r.poisson(1.2))):
        spot = np.array((r.uniform(-40, 50), b.spine_front(20) - r.uniform(-4, 34), r.uniform(-70, 80)))
        c.paint(Ellipsoid(spot, r.uniform(1.8, 5.0) * r.uniform(0.7, 1.2, 3)), T.PELVIC, [T.FAT])
