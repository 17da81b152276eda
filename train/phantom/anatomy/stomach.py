"""The stomach, from the cardia to the pylorus."""

import numpy as np

from train.phantom.anatomy.scene import Scene
from train.phantom.canvas import Tube, through, vector
from train.phantom.tissue import BOWEL, T


def stomach(scene: Scene) -> None:
    """J, long J, steer's horn or cascade; leaves ``pylorus`` and ``cardia``."""
    b, n, c = scene.body, scene.n, scene.canvas
    top = b.dome_left - n(36, 7)
    behind = b.spine_front(-10) - 20  # the plane of the great vessels; the antrum passes in front of the pancreas
    forms = (  # heights of body, sinus, antrum and pylorus: J, long J, steer's horn, cascade
        (0.45 * top + 16, n(22, 9), n(12, 8), n(24, 6)),
        (0.3 * top + 8, n(-28, 12), n(-14, 10), n(16, 7)),
        (0.5 * top + 26, n(44, 7), n(36, 6), n(28, 5)),
        (0.45 * top + 14, n(24, 8), n(16, 7), n(24, 6)),
    )
    form = int(scene.r.choice(4, p=(0.4, 0.2, 0.22, 0.18)))
    low = 0.4 * min(scene.lift, 0.0)  # the liver comes down with the diaphragm, and the pylorus below it
    body_z, sinus_z, antrum_z, pylorus_z = (z + low for z in forms[form])
    pylorus = (n(-28, 9) * scene.ax, min(-0.42 * b.cavity_front, behind - 34) + n(0, 4), pylorus_z)
    front = n(0.5, 0.05) * b.cavity_front
    back = 0.45 if form == 3 else 0.22
    course = [
        (n(58, 7) * scene.ax, back * b.cavity_back, top - (6 if form == 3 else 0)),
        (n(66, 7) * scene.ax, -0.3 * front, top - 32),
        (n(56, 8) * scene.ax, -0.9 * front, body_z + n(0, 6)),
        (n(32, 8) * scene.ax, min(-front, behind - 42), sinus_z),
        (n(4, 7) * scene.ax, min(-front, behind - 44), antrum_z),
        pylorus,
    ]
    widths = np.array([29, 31, 28, 22, 17, 9]) * np.exp(scene.r.normal(0, (0.16, 0.12, 0.14, 0.18, 0.18, 0.1)))
    if scene.variants.random() < 0.35:  # a wide antrum, at the spine's right side or as far as the gallbladder
        widths = widths * (0.9, 0.9, 1, *scene.variants.uniform(1.15, 1.6, 2), 1.2)
        right = float(scene.variants.uniform(0, 45))
        course = [
            (x - share * right, y, z) for (x, y, z), share in zip(course, (0, 0, 0.2, 0.5, 0.9, 0.25), strict=True)
        ]
        pylorus = course[-1]
    tube = Tube(through(course, 4), widths, (n(1.0, 0.06), n(0.92, 0.08), 1))
    tube = tube.bumpy(scene.r, scene.u(0.03, 0.12))
    tube = tube.of_volume(scene.grown_target("stomach", tube.points) * 1.33)
    full = scene.targets["stomach"] / 270
    wall = scene.u(2.8, 6.5) / max(full, 0.5) ** 0.35
    over = (T.FAT, *BOWEL)
    scene.clear(tube, BOWEL)
    empty = full < 0.7 and scene.r.random() < 0.6
    inner = scene.u(0.35, 0.7) * float(tube.radii.max()) if empty else wall
    c.paint_layers(tube, ((0, T.STOMACH_WALL), (inner, T.STOMACH_CONTENT)), over)
    middle = float(scene.field.in_scan(tube.points)[:, 1].mean())  # of the body lies elsewhere
    if scene.gut.r.random() < 0.4:  # a meal, or contrast medium, settles behind the fluid
        settled = middle + float(scene.gut.r.uniform(-12, 25))
        c.settle(tube.grown(-inner), T.STOMACH_FOOD, [T.STOMACH_CONTENT], settled)
    gas, level = scene.r.random() < 0.75, scene.u(-24, 14)
    if gas:
        height = middle + level
        shrunk = Tube(tube.points, list(np.maximum(tube.radii - inner, 0.5)))
        c.level(shrunk, T.STOMACH_GAS, [T.STOMACH_CONTENT, T.STOMACH_FOOD], height)
    _rugae(scene, tube, inner, full)
    scene.shapes["stomach"] = tube
    scene.pylorus = pylorus
    i = max(2, len(tube.points) // 6)
    scene.cardia = tube.points[i] + vector(-0.8 * tube.radii[i], -0.6 * tube.radii[i], 11.0)


def _rugae(scene: Scene, tube: Tube, wall: float, full: float) -> None:
    """Folds along fundus and body; a full stomach has smoothed them."""
    count, size, turn = int(scene.r.integers(4, 11)), scene.u(1.8, 4.2), scene.u(0, 6)
    if scene.r.random() < 0.25 + 0.4 * (full > 1.2):
        return
    stop = max(6, int(0.7 * len(tube.points)))
    for k in range(count):
        angles = turn + 2 * np.pi * k / count + np.cumsum(scene.r.normal(0, 0.12, stop))
        reach = np.maximum(tube.radii[:stop] - wall, 0)[:, None]
        points = tube.points[:stop] + reach * np.stack([np.cos(angles), np.sin(angles), 0 * angles], 1)
        scene.canvas.paint(Tube(points[1:], size), T.STOMACH_WALL, (T.STOMACH_CONTENT, T.STOMACH_FOOD, T.STOMACH_GAS))
