"""Above the diaphragm: the lungs' vessels, heart, esophagus down to the cardia."""

import numpy as np

from train.phantom.anatomy.scene import Scene
from train.phantom.canvas import Ellipsoid, Tube, through
from train.phantom.tissue import BOWEL, ORGAN_TISSUES, T


def lung_vessels(scene: Scene) -> None:
    """Branches from both hila."""
    root_z = scene.body.dome_right + 50
    for _ in range(36):
        side = 1 if scene.r.random() < 0.5 else -1
        root = np.array([side * 32.0, -5.0, root_z + scene.u(-15, 25)])
        tip = np.array(
            [side * scene.u(0.4, 0.9) * scene.half, scene.u(-0.6, 0.8) * scene.half * 0.6, root_z + scene.u(-110, 90)]
        )
        bend = (root + tip) / 2 + scene.r.normal(0, 9, 3)
        scene.canvas.paint(Tube(through([root, bend, tip], 3), [scene.u(3, 5.5), 1.0]), T.VEIN, [T.LUNG])


def heart(scene: Scene) -> None:
    """Four chambers in a muscle, in fat; the diaphragm between the domes cuts its lowest centimetre or two flat."""
    b = scene.body
    scene.canvas.paint(Ellipsoid((0, -8, b.dome_right + 61), (34, 62, 95)), T.MEDIASTINAL, [T.LUNG])
    size = scene.u(0.85, 1.15)
    heart = Ellipsoid(
        (scene.n(20, 7), scene.n(-34, 8) * scene.ay, b.dome_right + 8),
        (62 * size, 44 * size, 42 * size),
        (scene.n(0.2, 0.1), scene.n(0.45, 0.1), scene.n(0.5, 0.12)),
    )
    # Above the diaphragm alone, or liver and stomach would follow the heart's fat into the chest.
    scene.canvas.paint(heart.grown(scene.u(2, 8)), T.MEDIASTINAL, [T.LUNG])
    scene.canvas.paint(heart, T.MYOCARDIUM, [T.MEDIASTINAL, T.LUNG])
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
        scene.canvas.paint(chamber, tissue, [T.MYOCARDIUM])
    scene.atrium = heart.at(-0.6, 0.1, -0.2)


def esophagus(scene: Scene) -> None:
    """From the thorax through the hiatus to the cardia, empty or with gas or fluid."""
    b, n, c = scene.body, scene.n, scene.canvas
    front = b.spine_front
    hiatus = b.dome_right - n(36, 6)
    course = [
        (n(2, 2), front(330) - 12, 330),
        (n(2, 3), front(230) - 13, 230),
        (n(2, 3), front(180) - 16, 175),
        (n(8, 3), front(130) - 26, max(hiatus + 14, 108)),
        (n(14, 3), front(100) - 34, hiatus),
        tuple(scene.cardia),
    ]
    tube = Tube(
        scene.course(course, 0.8, 6),
        [scene.u(7, 9), scene.u(6.5, 8.5), scene.u(7, 9.5), scene.u(7.5, 10)],
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
    c.paint(tube.grown(scene.gap), T.FAT, [T.LUNG, T.LEFT_HEART, T.MYOCARDIUM, T.LIVER])
    c.paint(tube, T.ESOPHAGUS_WALL, over)
    gas, fluid = scene.r.random() < 0.5, scene.r.random() < 0.3
    start, stop = sorted(scene.r.integers(0, 24, 2))
    lumen = Tube(tube.points[start : stop + 3], scene.u(1.5, 4.0))
    if gas or fluid:
        c.paint(lumen, T.ESOPHAGUS_GAS if gas else T.ESOPHAGUS_FLUID, [T.ESOPHAGUS_WALL])
