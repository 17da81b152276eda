"""Duodenum and pancreas, who lie around each other."""

from collections.abc import Sequence

import numpy as np

from train.phantom.anatomy.scene import Scene
from train.phantom.anatomy.vessels import mesenteric_vessels
from train.phantom.canvas import Ellipsoid, Tube, through, vector
from train.phantom.tissue import BOWEL, ORGAN_TISSUES, T


def duodenum_and_pancreas(scene: Scene) -> None:
    """The C of the duodenum, the first loop of jejunum, the vessels behind, the pancreas; leaves ``bile``."""
    n, c = scene.n, scene.canvas
    aorta_y = scene.body.spine_front(-10) - 20
    low = n(-44, 11)
    # Behind the pancreas lie vessels and fat, no bowel and no liver.
    c.paint(Ellipsoid((4, aorta_y - 4, 6), (48 * scene.ax, 24, 50)), T.FAT, BOWEL)
    c.paint(Ellipsoid((16, aorta_y - 6, 6), (32 * scene.ax, 22, 48)), T.FAT, ORGAN_TISSUES["liver"])
    tube, bend = _duodenal_tube(scene, aorta_y, low)
    ends = tube.points[-1]
    jejunum = Tube(
        scene.course([ends, ends + vector(14, -22, -6), ends + vector(34, -30, -28), ends + vector(26, -34, -62)], 4),
        scene.u(10, 13),
    )
    scene.gut.piece(jejunum.bumpy(scene.r, 0.05), (T.BOWEL_FLUID, T.FOLDS, T.BOWEL_WALL), [T.FAT])
    mesenteric_vessels(scene, aorta_y, low)
    scene.clear(_uneven(scene, tube), BOWEL)
    # Pylorus and bulb lie under the liver, not in it: open to the midline and downwards.
    for aside in (vector(16, -6, 3), vector(13, -3, -5), vector(24, -5, -14), vector(34, -6, -28)):
        c.paint(Tube(tube.points[:9] + aside, tube.radii[:9] + 3), T.FAT, ORGAN_TISSUES["liver"])
    _fill_duodenum(scene, tube, bend)
    _pancreas(scene, aorta_y)


def _duodenal_tube(scene: Scene, aorta_y: float, low: float) -> tuple[Tube, int]:
    """The C, and the point at which its crossing part begins: flat between the great and the mesenteric vessels.

    On the right, before the vena cava and below the pancreas, it is often as thick as it is high.
    """
    n, u, r = scene.n, scene.u, scene.viscera
    px, py, pz = scene.pylorus
    wide, bulb = n(-50, 6) * scene.ax, u(0.85, 1.4)
    climbs = u(0, 1) < 0.25  # no level third part: a V
    # mm from front to back: before the vena cava, between the vessels, left of them; mm high
    right, between, left = (float(v) for v in r.uniform((9, 8, 9), (27, 14, 20)))
    high = max(float(r.uniform(20, 30)), right)
    cava_x, aorta_x = (float(v.points[np.argmin(np.abs(v.points[:, 2] - low)), 0]) for v in (scene.cava, scene.aorta))
    rise = low + (14 if climbs else 4)

    def upon(vessel: Tube, z: float, thick: float) -> float:
        return vessel.front(z) - 0.5 * thick + 0.5

    middle = 0.5 * (min(right, 18) + between)
    points = [
        (px, py, pz),
        (px - 16, py + 14, pz + n(5, 5)),
        (0.5 * (px - 16 + wide), aorta_y - 14, 0.5 * (pz + n(5, 5))),
        (wide, aorta_y - n(2, 4), 0.5 * low + 12),
        (0.9 * wide, aorta_y - n(4, 3), low + 8),
        (cava_x - 8, upon(scene.cava, low, right) + n(0, 1), low),
        (
            0.5 * (cava_x + aorta_x),
            min(upon(scene.cava, low, middle), upon(scene.aorta, rise, middle)),
            0.5 * (low + rise),
        ),
        (aorta_x + 2, upon(scene.aorta, rise, between), rise),
        (aorta_x + 22, upon(scene.aorta, rise, 0.5 * (between + left)) + n(2, 2), rise + 9),
        (n(30, 5) * scene.ax, aorta_y - 12, max(rise + n(26, 6), -14)),
    ]
    bend = 4 * 4 + 2
    course = scene.course(points, 1.2)
    across = len(course) - bend
    widths = np.array([9, 13 * bulb, 12, 12, 12]) * np.exp(r.normal(0, 0.13, 5))
    upper = Tube(course[:bend], widths, (1, u(0.8, 1.0), 1)).bumpy(scene.r, u(0.05, 0.16))
    depth = np.interp(
        np.arange(bend, len(course)), 4 * np.arange(5, 10), (right, middle, between, 0.5 * (between + left), left)
    )
    flat = np.column_stack([np.ones(across), depth / high, np.ones(across)])
    lower = Tube(course[bend:], 0.5 * high * np.exp(r.normal(0, 0.09, 6)), flat)
    target = scene.grown_target("duodenum", course) * 1000
    if (most := 0.55 * target) < lower.volume:
        lower = lower.wide((most / lower.volume) ** 0.5)
    upper = upper.of_volume(1.1 * (target - lower.volume) / 1000)
    widest = min(1.6 * float(np.median(upper.radii)), 21.0)  # a bulb of 6 cm is none
    radii = np.concatenate([np.minimum(upper.radii, widest), lower.radii])
    flatness = np.concatenate([np.full(bend, float(upper.stretch[1])), flat[:, 1]])
    round_end = np.linspace(0, 1, 5)[1:-1]
    flatness[bend - 2 : bend + 1] = flatness[0] + (float(flat[0, 1]) - flatness[0]) * round_end
    ones = np.ones(len(course))
    return Tube(course, radii, np.stack([ones, flatness, ones], 1)), bend


def _fill_duodenum(scene: Scene, tube: Tube, bend: int) -> None:
    """Wall, contents and gas: in front in the bulb, now and then elsewhere; the crossing part is often collapsed."""
    c, r = scene.canvas, scene.viscera
    over = (T.FAT, *BOWEL, *ORGAN_TISSUES["liver"], T.VEIN, T.ARTERY, T.RIGHT_CORTEX)
    wall = scene.u(2.0, 3.6) if scene.r.random() < 0.75 else scene.u(4.5, 8.0)
    fullness = r.choice(("collapsed", "fluid", "gas"), p=(0.5, 0.33, 0.17))
    in_bulb, elsewhere, shares = r.random() < 0.55, r.random() < 0.3, r.uniform(0.15, 0.95, 3)
    at = int(r.integers(7, bend - 4))
    c.paint_layers(tube, ((0, T.DUODENUM_WALL), (wall, T.DUODENUM_CONTENT)), over)
    across = tube.part(bend + 1, len(tube.points))
    if fullness == "collapsed":
        c.paint(across, T.DUODENUM_WALL, [T.DUODENUM_CONTENT])
    for piece, there, share in (
        (tube.part(1, 8), in_bulb, shares[0]),
        (tube.part(at, at + 5), elsewhere, 0.6 * shares[1]),
        (across, fullness == "gas", 0.7 * shares[2]),
    ):
        if there:
            lumen = Tube(piece.points, np.maximum(piece.radii - wall, 1), piece.stretch)
            c.level(lumen, T.DUODENUM_GAS, [T.DUODENUM_CONTENT], scene.gas(piece, wall, float(share)))


def _pancreas(scene: Scene, aorta_y: float) -> None:
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
    return Tube(tube.points, tube.radii + margin, tube.stretch)


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
