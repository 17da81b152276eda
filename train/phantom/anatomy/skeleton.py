"""Spine, ribs, sternum, pelvis with what lies in it, hips."""

from itertools import pairwise

import numpy as np

from train.phantom.anatomy.scene import ANY_BODY, Scene
from train.phantom.canvas import Ellipsoid, Tube, through, vector
from train.phantom.tissue import T


def skeleton(scene: Scene) -> None:
    """Spine, spinal canal, ribs, sternum."""
    b, c = scene.body, scene.canvas
    vr = b.spine_radius
    levels = np.arange(-300.0, 360.0, 20.0)
    axis = np.array([b.spine(z) for z in levels])
    axis[:, 0] += np.interp(levels, (-300, 0, 160, 360), (0, scene.n(0, 2.5), scene.n(0, 3), 0))
    radii = vr * np.interp(levels, (-300, -200, -120, 60, 200, 360), (0.5, 1.05, 1.06, 0.95, 0.78, 0.66))
    soft = (*ANY_BODY, T.LUNG)
    c.paint_layers(Tube(axis, list(radii), (1.22, 0.95, 1)), ((0, T.CORTICAL), (1.6, T.SPONGY)), soft)
    heights = []
    z = -178 + scene.u(0, 12)
    while z < 340:
        heights.append(z)
        z += float(np.interp(z, (-170, 60, 200), (36, 30, 25))) * scene.u(0.97, 1.03)
    for z in heights:
        k = float(np.interp(z, (-170, 60, 250), (1.0, 0.92, 0.7)))
        x, y, _ = b.spine(z)
        c.paint(
            Ellipsoid((x, y, z), (vr * 1.3 * k, vr * 1.02 * k, 5.2 * k), squareness=0.8),
            T.DISC,
            [T.SPONGY, T.CORTICAL],
        )
    for low, high in pairwise(heights):
        _vertebra_processes(scene, (low + high) / 2, vr)
    canal = np.array([(b.spine(z)[0], b.spine(z)[1] + vr + 9, z) for z in np.arange(-240.0, 360.0, 30.0)])
    c.paint(Tube(canal, scene.u(7.5, 9.5), (1.2, 0.9, 1)), T.CANAL, (*soft, T.CORTICAL, T.SPONGY))
    _ribs(scene, heights)


def _vertebra_processes(scene: Scene, z: float, vr: float) -> None:
    c = scene.canvas
    x, y, _ = scene.body.spine(z)
    k = float(np.interp(z, (-170, 60, 250), (1.0, 0.95, 0.8)))
    over = (*ANY_BODY, T.LUNG)
    spongy = ((0, T.CORTICAL), (1.6, T.SPONGY))
    c.paint_layers(Ellipsoid((x, y + vr + 28, z - 8), (4.5, 17, 11)), spongy, over)
    c.paint_layers(Ellipsoid((x, y + vr + 15, z - 3), (17 * k, 7, 10)), ((0, T.CORTICAL), (2.2, T.SPONGY)), over)
    slope = scene.u(-0.1, 0.3)
    for side in (-1, 1):
        c.paint_layers(Ellipsoid((x + side * 15 * k, y + vr + 4, z + 4), (5.5, 10, 7)), spongy, over)
        c.paint_layers(
            Ellipsoid((x + side * 31 * k, y + vr + 9, z), (17 * k, 4.5, 5.5), (0, 0, side * slope)), spongy, over
        )


def _ribs(scene: Scene, heights: list[float]) -> None:
    b, c = scene.body, scene.canvas
    first = min(range(len(heights)), key=lambda i: abs(heights[i] - 32))  # the 12th pair leaves near T12
    reach = (0.30, 0.55, 0.83, 0.86, 0.88, 0.9, 0.9, 0.9, 0.9)
    drop = scene.u(72, 122)
    size = scene.u(0.85, 1.15)
    for k, z in enumerate(heights[first : first + len(reach)]):
        turn = np.linspace(0.12, reach[k] * scene.u(0.94, 1.04), 12) * np.pi
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


def pelvis(scene: Scene) -> None:
    """Sacrum, hip bones, femurs; bladder, uterus or prostate, rectum."""
    b, c = scene.body, scene.canvas
    over = ANY_BODY
    bone = ((0, T.CORTICAL), (2.0, T.SPONGY))
    y0 = b.spine(-180)[1]
    sacrum = np.array([(0, b.spine(z)[1] + d, z) for z, d in ((-190, 8), (-225, 12), (-265, 18), (-300, 8))])
    c.paint_layers(Tube(sacrum, [24, 22, 14, 6], (1.75, 0.75, 1)), bone, over)
    for side in (-1, 1):
        wing = Ellipsoid((side * 92 * scene.ax, y0 + 2, -166), (7.5, 52, 52), (0, -side * 0.42, -side * 0.62), 0.4)
        c.paint_layers(wing, bone, over)
        _hip_muscles(scene, wing, side)
        column = np.array([(side * 62, y0 + 34, -195), (side * 84, y0 + 10, -225), (side * 90, y0 - 12, -262)])
        c.paint_layers(Tube(column, [13, 14, 21]), bone, over)
        head = (side * 97 * scene.ax, y0 - 12, -275)
        scene.hips[side] = head
        c.paint(Ellipsoid(head, (30, 30, 30)), T.CORTICAL, [T.MUSCLE, T.FAT, T.SUBCUTANEOUS])
        c.paint_layers(
            Ellipsoid(head, (24, 24, 24)),
            ((-1.5, T.CARTILAGE), (0, T.CORTICAL), (1.5, T.SPONGY)),
            (*over, T.CORTICAL, T.SPONGY),
        )
        femur = np.array([head, (side * 132 * scene.ax, y0 - 4, -300), (side * 138 * scene.ax, y0 - 2, -400)])
        c.paint_layers(Tube(femur, [16, 20, 15]), ((0, T.CORTICAL), (4, T.SPONGY)), over)
        pubis = np.array([head, (side * 55, y0 - 52, -300), (side * 6, y0 - 66, -312)])
        c.paint_layers(Tube(pubis, [14, 9, 12]), bone, over)
        ischium = np.array([head, (side * 70, y0 + 22, -330), (side * 60, y0 + 8, -365)])
        c.paint_layers(Tube(ischium, [16, 15, 17]), bone, over)
        gluteus = np.array(
            [
                (side * 90 * scene.ax, y0 + 40, -160),
                (side * 95 * scene.ax, y0 + 58, -240),
                (side * 110, y0 + 50, -340),
            ]
        )
        c.paint(Tube(gluteus, [16, 36, 34], (1.2, 0.8, 1)), T.MUSCLE, [T.SUBCUTANEOUS, T.FAT])
    c.paint(Ellipsoid((0, y0 - 30, -345), (60, 60, 22)), T.MUSCLE, [T.FAT])
    fill = scene.u(0.6, 1.3)
    bladder = Ellipsoid(
        (scene.n(0, 4), y0 - 62, -275 + 18 * fill), (44 * fill**0.5, 36 * fill**0.5, 36 * fill), (0.2, 0, 0)
    )
    c.paint_layers(bladder, ((0, T.PELVIC), (scene.u(2.5, 5), T.URINE)), [T.FAT])
    c.paint(Ellipsoid((scene.n(0, 6), y0 - 14, -278), (26, 20, scene.u(20, 45))), T.PELVIC, [T.FAT])
    scene.gut.rectum()


def _hip_muscles(scene: Scene, wing: Ellipsoid, side: int) -> None:
    """Iliacus inside the hip bone's wing, the lesser gluteal muscles outside, the internal obturator below."""
    bulk, r = scene.wall.uniform(0.7, 1.3), scene.wall
    for inside, thick, over in ((-1, 12, (T.FAT,)), (1, 17, (T.FAT, T.SUBCUTANEOUS))):
        shift = wing.turn @ vector(side * inside * (5 + 0.8 * thick * bulk), 0, 0)
        muscle = Ellipsoid(wing.centre + shift, vector(thick * bulk, 46, 48))
        muscle.turn = wing.turn
        scene.canvas.paint(muscle, T.MUSCLE, over)
    lateral = [wing.at(0, -0.2, -0.6) + vector(side * 16, 0, 0), vector(side * 118 * scene.ax, wing.centre[1], -235)]
    lateral += [vector(side * 136 * scene.ax, wing.centre[1] + 4, -290)]
    scene.canvas.paint(
        Tube(through(lateral), np.array((20, 24, 16)) * bulk, (0.9, 1.4, 1)), T.MUSCLE, (T.FAT, T.SUBCUTANEOUS)
    )
    x, y = side * r.uniform(54, 62) * scene.ax, scene.body.spine(-180)[1] - r.uniform(0, 10)
    scene.canvas.paint(Ellipsoid((x, y, -285), (9 * bulk, 34, 36), (0, 0, side * 0.25)), T.MUSCLE, [T.FAT])
