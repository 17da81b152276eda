"""Skin, fat, wall, diaphragm, the muscles of the back; breasts and arms."""

import numpy as np

from train.phantom.anatomy.scene import Scene
from train.phantom.anatomy.wall import Wall
from train.phantom.canvas import Ellipsoid, Sampler, Tube, through, vector
from train.phantom.tissue import BOWEL, LUMEN, ORGAN_TISSUES, T


def layers(scene: Scene) -> None:
    """Fill the canvas: skin, fat, wall, the abdomen's fat, diaphragm, lungs."""
    f, c = scene.field, scene.canvas
    wall, diaphragm = Wall.draw(scene.body, scene.wall), scene.u(2.0, 3.5)
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


def muscles(scene: Scene) -> None:
    """Erector spinae with fat between its columns, psoas, quadratus lumborum; leaves a draft of ``crura``."""
    b, c = scene.body, scene.canvas
    vr = b.spine_radius
    bulk = scene.u(0.85, 1.15)
    thick = scene.u(0.6, 1.5)
    over = (T.FAT, T.MEDIASTINAL, T.LUNG)
    for side in (-1, 1):
        levels = range(-230, 340, 40)
        inner = np.array([(side * 26, b.spine(z)[1] + vr + 30, z) for z in levels])
        c.paint(Tube(inner, [17, 24 * bulk, 25 * bulk, 20, 15], (1.0, 1.1, 1)), T.MUSCLE, over)
        outer = np.array([(side * 52, b.spine(z)[1] + vr + 27, z) for z in levels])
        c.paint(Tube(outer, [10, 21 * bulk, 23 * bulk, 17, 10], (1.15, 1.0, 1)), T.MUSCLE, over)
        thin, turn = scene.wall.uniform(0.015, 0.06), scene.wall.uniform(0, 6, 2)
        if scene.wall.random() < 0.85:  # fat between the columns of the back's muscles
            between = (inner + outer) / 2 + np.array((side * turn[0] - side * 3, 0, 0))
            c.paint(Tube(between, 20.0, (thin, 1, 1)), T.SUBCUTANEOUS, [T.MUSCLE])
        psoas = [(side * 86 * scene.ax, b.spine(-90)[1] - 42, -262), (side * 70, b.spine(-90)[1] - 22, -190)]
        psoas += [(side * (vr * 1.2 + d), b.spine(z)[1] + 2, z) for d, z in ((24, -110), (17, -60), (11, -10), (5, 28))]
        c.paint(Tube(scene.course(psoas, 2.0), [15, 19 * bulk, 21 * bulk, 17 * bulk, 12, 5]), T.MUSCLE, [T.FAT])
        quadratus = [(side * 66, b.spine(-130)[1] + 14, -150), (side * 55, b.spine(0)[1] + vr, 20)]
        c.paint(Tube(np.array(quadratus), [13 * bulk, 10], (1.6, 0.8, 1)), T.MUSCLE, [T.FAT])
        crus = [(side * 9, b.spine_front(-35) - 2, -35), (side * 14, b.spine_front(30) - 3, 30)]
        crus += [(side * 17, b.spine_front(80) - 12, 88)]
        scene.crura[side] = Tube(scene.course(crus, 1.5), [3 * thick, 5 * thick, 4.5 * thick])


def crura(scene: Scene) -> None:
    """The diaphragm's lumbar part: two bands beside spine and aorta that meet in front of it, and go over into the domes.

    After the aorta, which they embrace; leaves their course in ``crura``.
    """
    b, c, r = scene.body, scene.canvas, scene.retro
    fat, slim, thin = r.uniform(1, 3.5) + 2 * b.visceral, r.uniform(0.6, 0.9), r.uniform(1.5, 2.6)
    flat, lowest = r.uniform(1.6, 2.4), r.uniform(-58, -38)
    spine = Tube(np.array([b.spine(z) for z in range(-20, 116, 15)]), b.spine_radius + 2 * thin + 4)
    clear_of_organs(scene, spine, 0.0)  # nothing lies behind the crura
    for side in (-1, 1):
        levels = np.linspace(lowest if side < 0 else lowest + 22, 104, 11)
        radii = np.interp(levels, (-60, 0, 50, 85, 104), (0.5, 0.8, 1, 1, 0.7)) * scene.crura[side].radii.mean()
        radii = np.clip(radii * np.exp(0.16 * r.normal(size=11)) * (1 if side < 0 else slim), 1.8, 6)  # nodular
        points = []
        for z, radius in zip(levels.tolist(), radii.tolist(), strict=True):
            x, y, wide, _ = section(scene.aorta, z)
            beside = side * x + wide + fat + radius  # from the midline
            up = float(np.interp(z, (10, 60, 104), (0, 0.8, 1.1)))  # from the spine to the aorta's side and its front
            away = max(np.interp(z, (-60, 0, 60), (9, 13, 15)), beside - max(up - 0.8, 0) * wide)
            points.append((side * away, (1 - min(up, 1)) * (b.spine_front(z) - 2) + up * (y - 2), z))
        scene.crura[side] = Tube(through(points, 2), radii, (1, flat, 1))
        clear_of_organs(scene, scene.crura[side], 1.5)
        c.paint(scene.crura[side], T.MUSCLE, (T.FAT, T.MEDIASTINAL))
    for z in range(24, 110, 12):
        plate = (1, 1, 8 / thin)
        ends = {side: section(scene.crura[side], z) for side in (-1, 1)}
        if z >= 56:  # the median arcuate ligament and what lies above it
            x, y, wide, _ = section(scene.aorta, z)
            arch = [(ends[-1][0], ends[-1][1], z), (x, y - wide - fat - thin, z), (ends[1][0], ends[1][1], z)]
            c.paint(Tube(through(arch, 3), thin, plate), T.MUSCLE, (T.FAT, T.MEDIASTINAL))
        for side in (-1, 1):  # along the vertebral bodies to the back
            middle, vr = b.spine(z)[1], b.spine_radius
            band = [(ends[side][0], ends[side][1], z), (side * (0.8 * vr + thin + 1), middle - 0.62 * vr, z)]
            band += [(side * (vr + thin + 1), middle, z), (side * (vr + 9), middle + 0.6 * vr, z)]
            c.paint(Tube(np.array(band), thin, plate), T.MUSCLE, (T.FAT, T.MEDIASTINAL))


def clear_of_organs(scene: Scene, shape: Ellipsoid | Tube, margin: float) -> None:
    """Fat instead of liver, spleen, stomach and bowel in ``shape`` and ``margin`` mm around it; what is cut keeps a wall."""
    stomach = (-margin - 3.5, T.STOMACH_WALL, (T.STOMACH_CONTENT, T.STOMACH_FOOD, T.STOMACH_GAS))
    bowel = (-margin - 2.6, T.BOWEL_WALL, LUMEN)
    over = (*ORGAN_TISSUES["stomach"], *ORGAN_TISSUES["liver"], T.SPLEEN, *BOWEL)
    scene.canvas.paint_in_turn(shape, (stomach, bowel, (-margin, T.FAT, over)))


def section(vessel: Tube, z: float) -> tuple[float, float, float, float]:
    """x, y, half the width and half the depth of an upright tube at height ``z``."""
    order = np.argsort(vessel.points[:, 2])
    halves = vessel.radii[:, None] * np.broadcast_to(vessel.stretch, vessel.points.shape)[:, :2]
    height, columns = vessel.points[order, 2], np.column_stack([vessel.points[:, :2], halves])[order]
    x, y, wide, deep = (float(np.interp(z, height, column)) for column in columns.T)
    return x, y, wide, deep


def breasts(scene: Scene) -> None:
    """On women, before the chest's wall."""
    b, c = scene.body, scene.canvas
    size, sag, there = scene.u(38, 72), scene.u(0, 45), scene.u(0, 1)
    glandular, asleep = scene.u(0.25, 0.75), scene.u(0.62, 0.78)
    if not b.female or there < 0.15:
        return
    for side in (-1, 1):
        x, y, z = b.wall_point(-np.pi / 2 + side * asleep, b.dome_right + 28 - sag, 0.0)
        breast = Ellipsoid((x, y - b.fat_front * 0.4, z), (size, size * 0.62, size * 0.9), (0, 0, side * 0.5))
        c.paint_layers(breast, ((0, T.SKIN), (1.6, T.SUBCUTANEOUS)), [T.AIR])
        c.paint(breast.scaled(glandular), T.PELVIC, [T.SUBCUTANEOUS])


def arms(scene: Scene) -> None:
    """Beside the body, where they could not be raised above the head."""
    b, c = scene.body, scene.canvas
    kind, radius, fat = scene.u(0, 1), scene.u(33, 48), scene.u(0.1, 0.45)
    shift, bone = scene.r.normal(0, 10, (2, 3)), ((0, T.CORTICAL), (3.0, T.SPONGY))
    elbow = scene.u(-70, 30)
    for side, lying in ((-1, kind < 0.17), (1, kind < 0.13 or kind > 0.95)):
        if not lying:
            continue
        x = side * (b.half_width + radius + 6)
        away = np.array((0.0, 12.0, 0.0)) + np.abs(shift[max(side, 0)]) * (side, 1, 0)
        course = np.array([(x, 0, 330), (x, 8, 120), (x + side * 6, 14, elbow), (x, -4, elbow - 230)]) + away
        arm = Tube(through(course), [radius * 1.15, radius, radius * 0.95, radius * 0.7])
        c.paint_layers(arm, ((0, T.SKIN), (1.6, T.SUBCUTANEOUS), (2 + fat * radius, T.MUSCLE)), [T.AIR])
        scene.arms.append(scene.field.in_scan(course[::-1]))
        inside = (T.MUSCLE, T.SUBCUTANEOUS)
        c.paint_layers(Tube(course[:3], [12, 11, 15]), bone, inside)
        for dy in (-11, 11):
            c.paint_layers(Tube(course[2:] + vector(0, dy, 0), [10, 7]), bone, inside)
