"""Duodenum and pancreas, who lie around each other."""

from collections.abc import Sequence

import numpy as np

from train.phantom.anatomy.scene import Scene
from train.phantom.anatomy.vessels import mesenteric_vessels
from train.phantom.canvas import Ellipsoid, Tube, through, vector
from train.phantom.tissue import BOWEL, ORGAN_TISSUES, T


def duodenum_and_pancreas(scene: Scene) -> None:
    """The C of the duodenum, the first loop of jejunum, the vessels behind, the pancreas; leaves ``bile``."""
    b, n, c = scene.body, scene.n, scene.canvas
    aorta_y = b.spine_front(-10) - 20
    low = n(-44, 11)
    px, py, pz = scene.pylorus
    wide, bulb = n(-50, 6) * scene.ax, scene.u(0.85, 1.4)
    climbs = scene.u(0, 1) < 0.25  # no level third part: a V
    duodenum = [
        (px, py, pz),
        (px - 16, py + 14, pz + n(5, 5)),
        (0.5 * (px - 16 + wide), aorta_y - 14, 0.5 * (pz + n(5, 5))),
        (wide, aorta_y - n(2, 4), 0.5 * low + 12),
        (0.9 * wide, aorta_y - n(4, 3), low + 8),
        (n(-24, 4) * scene.ax, aorta_y - 14, low + (4 if climbs else 0)),
        (4, aorta_y - 15, low + (16 if climbs else n(3, 3))),
        (26 * scene.ax, aorta_y - 10, low + (28 if climbs else 14)),
        (n(30, 5) * scene.ax, aorta_y - 16, low + n(36 if climbs else 30, 6)),
    ]
    widths = np.array([9, 13 * bulb, 12, 12, 12, 11, 9.5, 10.5, 10.5]) * np.exp(scene.r.normal(0, 0.13, 9))
    tube = Tube(scene.course(duodenum, 2.5), widths, (1, scene.u(0.8, 1.0), 1))
    tube = tube.bumpy(scene.r, scene.u(0.05, 0.16))
    widest = 1.6 * float(np.median(tube.radii))  # a bulb of 6 cm is none
    tube = Tube(tube.points, np.minimum(tube.radii, widest), (1, float(tube.stretch[1]), 1))
    tube = tube.of_volume(scene.grown_target("duodenum", tube.points) * 1.1)
    ends = tube.points[-1]
    jejunum = Tube(
        scene.course([ends, ends + vector(14, -22, -6), ends + vector(34, -30, -28), ends + vector(26, -34, -62)], 4),
        scene.u(10, 13),
    )
    scene.gut.piece(jejunum.bumpy(scene.r, 0.05), (T.BOWEL_FLUID, T.FOLDS, T.BOWEL_WALL), [T.FAT])
    over = (T.FAT, *BOWEL, *ORGAN_TISSUES["liver"], T.VEIN, T.ARTERY, T.RIGHT_CORTEX)
    mesenteric_vessels(scene, aorta_y, low)
    scene.clear(_uneven(scene, tube), BOWEL)
    # Pylorus and bulb lie under the liver, not in it: open to the midline and downwards.
    for aside in (vector(16, -6, 3), vector(13, -3, -5), vector(24, -5, -14), vector(34, -6, -28)):
        c.paint(Tube(tube.points[:9] + aside, tube.radii[:9] + 3), T.FAT, ORGAN_TISSUES["liver"])
    wall = scene.u(2.0, 3.6) if scene.r.random() < 0.75 else scene.u(4.5, 8.0)
    c.paint_layers(tube, ((0, T.DUODENUM_WALL), (wall, T.DUODENUM_CONTENT)), over)
    if scene.r.random() < 0.35:
        at = int(scene.r.integers(2, 12))
        bubble = Tube(tube.points[at : at + 4], list(np.maximum(tube.radii[at : at + 4] - wall, 1)))
        c.level(bubble, T.DUODENUM_GAS, [T.DUODENUM_CONTENT], float(bubble.points[:, 1].mean()) - scene.u(-2, 4))
    _pancreas(scene, aorta_y, low, tube)


def _pancreas(scene: Scene, aorta_y: float, low: float, duodenum: Tube) -> None:
    n, c, u = scene.n, scene.canvas, scene.u
    head = np.array([n(-31, 3) * scene.ax, aorta_y - n(12, 2), -12.0 + n(0, 6)])
    tail = scene.hilum + np.array([n(-8, 6), n(-5, 5), n(-4, 7)])
    s = scene.splenic
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
        scene.confluence + vector(2, -11, 4),
        s[1] + vector(4, -9, n(-2, 3) + 0.6 * arch),
        s[2] + vector(0, -8, n(-3, 3) + arch),
        turn + vector(0, -6, n(0, 3)),
        end,
    ]
    widths = np.array([9, 12.5, 11.5, 8, 8.5, 9, 9.5, 7]) * np.exp(scene.r.normal(0, 0.12, 8))
    widths[:3] *= u(0.8, 1.2)
    widths[5:] *= u(0.75, 1.3)
    body = Tube(scene.course(course, 2.0), widths, (1, u(0.75, 1.05), u(0.95, 1.35)))
    body = body.bumpy(scene.r, u(0.05, 0.2))
    body = body.of_volume(scene.grown_target("pancreas", body.points) * 1.36)
    uncinate = Tube(
        through([head + vector(4, 4, -14), head + vector(16, 2, -16), (n(-6, 4), aorta_y - 15, head[2] - n(4, 3))], 3),
        np.array([7, 6, 4.5]) * u(0.6, 1.2),
    )
    over = (T.FAT, *BOWEL, *ORGAN_TISSUES["liver"], T.ARTERY)
    bed = _uneven(scene, body)
    scene.clear(bed, (*BOWEL, T.LIVER))
    stomach = ORGAN_TISSUES["stomach"]  # yields, but keeps its wall
    wall = (-scene.gap - 3.5, T.STOMACH_WALL, (T.STOMACH_CONTENT, T.STOMACH_FOOD, T.STOMACH_GAS))
    c.paint_in_turn(bed, (wall, (-scene.gap, T.FAT, stomach)))
    wide, obstructed = scene.u(1.4, 3.5), scene.r.random() < 0.6
    duct = wide if obstructed and "pancreas" in scene.disease.lesions else 0.9
    c.paint(uncinate, T.PANCREAS, (T.FAT, *BOWEL))
    lobular = u(0, 1)
    c.paint(body.wide(1 - 0.26 * lobular), T.PANCREAS, over)
    for tube, share in ((body, 1.0), (uncinate, 0.6)):
        _lobules(scene, tube, lobular * share, over)
    _clefts(scene, body, lobular)
    c.paint(Tube(body.points[3:-2], duct), T.DUCT, [T.PANCREAS])
    bile = [scene.porta + vector(-4, -6, -2), head + vector(-2, 6, 12), head + vector(-6, 6, -8)]
    scene.bile = Tube(through(bile, 4), scene.u(2.0, 3.8))
    c.paint(scene.bile, T.URINE, (T.FAT, T.PANCREAS))
    scene.shapes["pancreas"] = body


def _uneven(scene: Scene, tube: Tube) -> Tube:
    """``tube``, here thinner and there thicker: a neighbour touches it in one place and keeps away in another."""
    margin = scene.gap * np.clip(scene.r.normal(0, 0.8, len(tube.radii)), -1, 1.4)
    return Tube(tube.points, tube.radii + margin, (tube.stretch[0], tube.stretch[1], tube.stretch[2]))


def _lobules(scene: Scene, body: Tube, lobular: float, over: Sequence[int]) -> None:
    """Lobules side by side around the gland: the higher ``lobular`` (0 to 1), the deeper the notches between them."""
    r = scene.r
    lengths = np.linalg.norm(np.diff(body.points, axis=0), axis=1)
    count = int(lengths.sum() * (0.3 + 0.5 * lobular))
    where = r.uniform(0, len(lengths), count)
    for at in where:
        i, share = int(at), at % 1
        middle = body.points[i] * (1 - share) + body.points[i + 1] * share
        radius = body.radii[i] * (1 - share) + body.radii[i + 1] * share
        way = r.normal(size=3)
        way *= body.stretch / np.linalg.norm(way)
        size = radius * r.uniform(0.3, 0.52)
        spot = middle + way * (radius * (1 + 0.22 * lobular * r.uniform(-0.4, 1)) - size)
        scene.canvas.paint(Ellipsoid(spot, size * r.uniform(0.8, 1.25, 3)), T.PANCREAS, over)


def _clefts(scene: Scene, body: Tube, lobular: float) -> None:
    """Fat that grows in between lobules, hardly any in the young, much in the old and the obese: thin leaves from outside."""
    u, r = scene.u, scene.r
    for _ in range(int(46 * u(0, 1) ** 1.5 * (0.3 + 0.4 * lobular + 0.6 * scene.body.visceral))):
        i = int(r.integers(1, len(body.points) - 1))
        way = r.normal(size=3)
        way /= np.linalg.norm(way)
        spot = body.points[i] + u(0.6, 1.0) * body.radii[i] * way
        leaf = (u(0.6, 1.3), u(0.35, 0.65) * body.radii[i], u(0.35, 0.65) * body.radii[i])
        along = body.points[i + 1] - body.points[i - 1]
        turn = float(np.arctan2(along[1], along[0])) + float(r.normal(0, 0.5))
        scene.canvas.paint(Ellipsoid(spot, leaf, (0, float(r.normal(0, 0.5)), turn)), T.FAT, [T.PANCREAS])
