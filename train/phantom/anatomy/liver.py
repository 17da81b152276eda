"""Soft organs under the diaphragm: liver and gallbladder, spleen."""

import numpy as np

from train.phantom.anatomy.gut import FREE
from train.phantom.anatomy.scene import Doubles, Hug, Scene
from train.phantom.body import _layers
from train.phantom.canvas import Below, Composite, Ellipsoid, Tube, through, vector
from train.phantom.tissue import BOWEL, LUMEN, ORGAN_TISSUES, T

LEAST_LIVER = 1000.0  # mL beside stomach and right kidney, of which smaller neighbours and deformation take some
LEAST_SPLEEN = 112.0  # mL beside the left kidney, of which stomach and deformation take some
MOST_SPLEEN = 345.0  # mL of a healthy one
LEAST_ENLARGED = 480.0  # mL beside the left kidney of an enlarged one, of which neighbours take some
LOBED = 0.45  # share of spleens with a lobe behind the stomach, where the stomach is not small
NARROW = 18.0  # mm between kidney and wall: the liver stays in front


def _liver_at(scene: Scene, scale: float, pose: dict[str, Doubles]) -> Composite:
    k = scale
    right = Ellipsoid(pose["right"], pose["right_axes"] * k, tuple(pose["right_angles"]), 0.35)
    lower = Ellipsoid(pose["lower"], pose["lower_axes"] * k, (0.15, 0, 0))
    left = Ellipsoid(pose["left"], pose["left_axes"] * k, tuple(pose["left_angles"]))
    hollow = Ellipsoid(pose["hollow"], pose["hollow_axes"])
    fossa = Ellipsoid(pose["fossa"], pose["fossa_axes"])  # of the kidney
    groove = Ellipsoid(pose["groove"], pose["groove_axes"])  # where the esophagus comes down
    edge = Below(pose["edge"] - vector(0, 0, 45 * max(k - 1.1, 0)), (float(pose["slope"][0]), float(pose["slope"][1])))
    # Of the vena cava's back: no prong beside the spine.
    medial = Ellipsoid(pose["medial"], pose["medial_axes"], squareness=0.8)
    impression = Ellipsoid(pose["impression"], pose["impression_axes"])  # of pylorus and bulb
    antrum, bed = (Tube(pose[name][:, :3], pose[name][:, 3]) for name in ("antrum", "bed"))  # of the stomach
    return Composite((right, lower, left), (hollow, fossa, groove, medial, impression, antrum, bed, edge))


def liver(scene: Scene) -> None:
    """Lobes, fissure, porta hepatis, vessels; leaves ``liver`` and ``porta``."""
    b, n, c = scene.body, scene.n, scene.canvas
    zl = scene.lift
    # A tongue down the flank; a left lobe that reaches the spleen.
    riedel = scene.u(15, 45) if scene.r.random() < 0.1 else 0.0
    beaver = scene.u(20, 45) if scene.r.random() < 0.1 else 0.0
    pose = {
        **_renal_fossa(scene),
        **_lower_edge(scene, riedel),
        **_impression(scene),
        "right": np.array([-0.56 * scene.half + n(0, 3), 4 + n(0, 5), 62 + zl]),
        "right_axes": np.array([n(66, 4) * scene.ax, n(84, 5) * scene.ay, n(68, 6)]),
        "right_angles": np.array([n(0, 0.08), n(0.1, 0.08), n(0, 0.1)]),
        "lower": np.array([-0.66 * scene.half, n(6, 9), n(24, 13) + zl - riedel]),
        "lower_axes": np.array([n(44, 6) * scene.ax, n(60, 9) * scene.ay, n(60, 11) + 0.8 * riedel]),
        "left": np.array([n(0, 10) * scene.ax, n(-0.52, 0.05) * b.cavity_front, n(80, 8) + zl]),
        "left_axes": np.array([n(76, 15) * scene.ax + beaver, scene.u(22, 42) * scene.ay, n(40, 7)]),
        "left_angles": np.array([0, n(-0.22, 0.13), n(-0.1, 0.13)]),
        "caudate": np.array([-13 * scene.ax, b.spine_front(70) - 34, n(80, 5) + zl]),
        "hollow": np.array([n(12, 5) * scene.ax, 8.0 * scene.ay, n(16, 5) + zl * 0.6]),
        "groove": np.array([n(36, 4) * scene.ax, b.spine_front(100) - 4, n(100, 4) + zl]),
        "groove_axes": np.array([n(42, 4) * scene.ax, n(36, 4) * scene.ay, n(48, 4)]),
        "hollow_axes": np.array([n(62, 4) * scene.ax, n(60, 4) * scene.ay, n(52, 4)]),
    }
    hug = Hug(-1, float(scene.wall.uniform(4, 16)) * (1 - 0.4 * b.visceral), float(scene.wall.uniform(25, 50)))
    scale = scene.fit(lambda k: _liver_at(scene, k, pose), scene.targets["liver"] * 1.25, hug, 1.5)
    for _ in range(4):  # a flat body: further down the flank, and over the kidney
        if scene.room(_beside(scene, _liver_at(scene, scale, pose)), hug) >= LEAST_LIVER:
            break
        pose["edge"] = pose["edge"] - vector(0, 0, 30)
        pose["lower"] = pose["lower"] - vector(0, 0, 20)
        pose["lower_axes"] = pose["lower_axes"] + vector(4, 4, 14)
        pose["fossa_axes"] = pose["fossa_axes"] * (0.86, 1, 1)
        scale = scene.fit(lambda k: _beside(scene, _liver_at(scene, k, pose)), 1.1 * LEAST_LIVER, hug)
    liver = _liver_at(scene, scale, pose)
    coats = ((-2.6, T.BOWEL_WALL, LUMEN), (0.0, T.LIVER, FREE))
    scene.paint_at_the_wall(liver, coats, hug)
    # Its own size: a lobe that a thin body's liver had scaled up stood out before the great vessels.
    c.paint_in_turn(Ellipsoid(pose["caudate"], np.array((17, 15, 24)) * min(scale, 1.05)), coats)
    scene.liver = liver
    scene.shapes["liver"] = Ellipsoid(pose["right"], pose["right_axes"] * scale * 0.85)
    # Falciform ligament's fissure, porta hepatis
    fissure = [
        (-14 * scene.ax, -0.86 * b.cavity_front, n(62, 6) + zl),
        (-18 * scene.ax, -0.35 * b.cavity_front, n(72, 5) + zl),
    ]
    c.paint(Tube(through(fissure), scene.u(1.5, 4.5), (1, 1, 2.5)), T.FAT, [T.LIVER])
    scene.porta = np.array([-32 * scene.ax, b.spine_front(60) - 40, n(58, 4) + 0.7 * zl])
    c.paint(Ellipsoid(scene.porta + vector(8, 2, -6), (15, 9, 10)), T.FAT, [T.LIVER])
    _liver_vessels(scene, pose["right"], pose["right_axes"] * scale, pose["left"], pose["left_axes"] * scale)


def _beside(scene: Scene, liver: Composite) -> Composite:
    """What stomach and right kidney leave of the liver."""
    kidney, stomach = scene.shapes["right_kidney"], scene.shapes["stomach"]
    return Composite(liver.parts, (*liver.holes, kidney.grown(scene.gap), stomach.grown(scene.gap)))


def _impression(scene: Scene) -> dict[str, Doubles]:
    """The hollow of antrum, pylorus and duodenal bulb, open to the midline and downwards: the liver covers them, no more."""
    x, y, z = scene.pylorus
    stomach = scene.shapes["stomach"]
    assert isinstance(stomach, Tube)
    antrum, bed = stomach.points[-15:] + vector(5, 5, -13), stomach.points[3:13] + vector(14, 20, -3)
    size = 0.5 + 0.5 * (scene.targets["duodenum"] / 68) ** (1 / 3)
    return {
        "impression": np.array([x - 2, y + 14, z - 10]),
        "impression_axes": np.array([36.0, 33.0, 44.0]) * size,
        "bed": np.column_stack([bed, stomach.radii[3:13]]),
        "antrum": np.column_stack([antrum, stomach.radii[-15:] + 4]),
    }


def _renal_fossa(scene: Scene) -> dict[str, Doubles]:
    """The hollow that keeps the liver from behind the right kidney, and from beside it where there is no room.

    Above the kidney it ends in fat or soon gives way to the liver, which there lies at the diaphragm's back.
    """
    kidney = scene.shapes["right_kidney"]
    assert isinstance(kidney, Ellipsoid)
    low, high = kidney.bounds()
    half = (high - low) / 2
    x, _, z = kidney.centre
    beside = np.array([[low[0]], [kidney.centre[1]], [kidney.centre[2]]])
    room = float(_layers(scene.body, *beside)[2][0])  # mm between kidney and wall
    wide = 1.3 * half[0] + 8 + 3 * scene.body.visceral
    if room < NARROW:  # a sheet of liver would be squeezed in
        wide = half[0] + NARROW + 22
    tall = (1.15 - 0.2 * scene.covered) * half[2] + 14 - 10 * scene.covered + 8 * scene.body.visceral
    return {
        "fossa": kidney.centre + vector(9, 34, 8),  # the fat above the upper pole lies at the back and the middle
        "fossa_axes": np.array([wide, 40.0, tall]),
        "medial": np.array([0.5 * x, scene.body.spine_front(z) + 16.0, z - 6]),
        "medial_axes": np.array([0.5 * abs(x) + 10, 36.0, 1.02 * half[2]]),
    }


def _lower_edge(scene: Scene, riedel: float) -> dict[str, Doubles]:
    """Where the lower face begins at the right wall, mostly above the kidney's lower pole, and how it rises to the left and the back."""
    pole = float(scene.shapes["right_kidney"].bounds()[0][2]) + 0.7 * scene.lowered["right_kidney"]
    edge = pole + scene.n(24, 22) - riedel
    slope = np.array([scene.u(0.18, 0.46), scene.u(0.05, 0.5)])
    return {"edge": np.array([-scene.half, -0.3 * scene.body.cavity_front, edge]), "slope": slope}


def _liver_vessels(scene: Scene, right: Doubles, axes: Doubles, left: Doubles, left_axes: Doubles) -> None:
    c = scene.canvas
    confluence = np.array([-22 * scene.ax, scene.body.spine_front(90) - 24, right[2] + 42])
    for root, thick in ((scene.porta, 5.0), (confluence, 4.8)):
        for k in range(4):
            centre, reach = (left, left_axes) if k == 0 else (right, axes)
            for _ in range(2):
                way = scene.r.normal(size=3) * (0.3, 0.38, 0.32)
                way[2] *= 1.0 if root is scene.porta else 0.5
                tip = centre + way * reach
                bend = (root + tip) / 2 + scene.r.normal(0, 5, 3)
                c.paint(
                    Tube(through([root, bend, tip], 4), [thick * scene.u(0.7, 1.1), 1.3]), T.LIVER_VESSEL, [T.LIVER]
                )


def gallbladder(scene: Scene) -> None:
    """In its fossa at the liver's lower face."""
    b, n, c = scene.body, scene.n, scene.canvas
    shape = np.array([n(12, 1.5), n(13, 1.5), n(27, 4)])
    x, y = n(-53, 9) * scene.ax, -0.4 * b.cavity_front + n(0, 8)
    angles = (n(-0.6, 0.25), n(0.15, 0.2), n(0.0, 0.25))  # fundus down and to the front, neck up and to the back
    x, under = _fossa(scene, x, y)
    target = scene.grown_target("gallbladder", np.array((x, y, under)))
    axes = shape * (0.95 * target * 1000 / (4 / 3 * np.pi * float(np.prod(shape)))) ** (1 / 3)
    gallbladder = Ellipsoid((x, y, under + 1), axes, angles, 0.1)
    scene.shapes["gallbladder"] = gallbladder
    if "gallbladder" in scene.disease.absent:
        return
    c.paint(gallbladder.grown(1.5), T.FAT, BOWEL)
    # The fossa is open to the front and the midline: in no slice does liver enclose the gallbladder.
    opening = Ellipsoid((x + 4.0, y - 4.5, under + 1), axes, angles, 0.1)
    c.paint(opening.grown(4.0), T.FAT, ORGAN_TISSUES["liver"])
    over = (T.FAT, *BOWEL, *ORGAN_TISSUES["liver"], *ORGAN_TISSUES["duodenum"], T.MUSCLE)
    thick = min(scene.u(0.7, 2.4), 0.3 * float(axes.min()))
    layers = ((0.0, int(T.GALLBLADDER_WALL)), (thick, int(T.GALLBLADDER)))
    for part in (_neck(gallbladder, scene.porta), gallbladder):
        c.paint_layers(part, layers, (*over, T.GALLBLADDER_WALL))


def _fossa(scene: Scene, x: float, y: float) -> tuple[float, float]:
    """x and z of the gallbladder's bed: the hollow's side at mid-height, else where a line upwards at ``x`` meets liver."""
    level = scene.n(6, 8) + 0.5 * scene.lift
    along = np.arange(-20.0 * scene.ax, -0.64 * scene.half, -2.0).astype(np.float32)
    beside = scene.liver.distance((along, np.full_like(along, y), np.full_like(along, level))) < 0
    if beside.any():
        return float(along[np.argmax(beside)]) + 3, level
    z = np.arange(-60.0, 70.0, 2.0).astype(np.float32)
    inside = scene.liver.distance((np.full_like(z, x), np.full_like(z, y), z)) < 0
    return x, float(z[np.argmax(inside)]) if inside.any() else 20.0


def _neck(gallbladder: Ellipsoid, porta: Doubles) -> Tube:
    """From the gallbladder's upper end a bit of the way to the porta hepatis, narrower and narrower."""
    start, end = gallbladder.at(0, 0, 0.55), gallbladder.at(0, 0, 1.05)
    tip = end + (porta - end) * min(1.0, 9 / float(np.linalg.norm(porta - end)))
    return Tube(through([start, end, tip], 3), [0.75 * gallbladder.axes.min(), 0.42 * gallbladder.axes.min(), 2.2])


def spleen(scene: Scene) -> None:
    """In the left dome, hollow towards the stomach; leaves ``hilum``."""
    b, n = scene.body, scene.n
    target = scene.targets["spleen"]
    size = (target / 200) ** (1 / 3)
    centre = np.array(
        [scene.half - n(17, 3) * size, 0.42 * b.cavity_back + n(2, 8), b.dome_left - 42 - 34 * size + n(0, 6)]
    )
    axes = np.array([n(27, 5), n(44, 7), n(48, 8)])
    angles = (n(0.35, 0.2), n(-0.2, 0.13), n(-0.38, 0.28))
    dent, deep = (n(-0.15, 0.15), n(-0.1, 0.2)), n(-1.46, 0.13)
    r = scene.variants
    lobed, aside = r.random() < LOBED, r.uniform((-48, -14, 8), (-26, 8, 40)) * size
    lobed = lobed and scene.targets["stomach"] > 140  # of a small one too little would be left
    lobe_axes = r.uniform((26, 13, 18), (46, 20, 30))
    centre[2] += r.uniform(4, 20) if lobed else 0.0  # the kidney takes its place further down

    def at(scale: float) -> Composite:
        body = Ellipsoid(centre, axes * size * scale, angles)
        hollow = Ellipsoid(body.at(deep, *dent), axes * size * (0.85, 0.7, 0.75), angles)
        if not lobed:
            return Composite((body,), (hollow,))
        # A lobe that runs behind the stomach towards the spine, above the kidney.
        lobe = Ellipsoid(centre + aside * scale, lobe_axes * size * scale, (0.0, 0.0, -0.25))
        hollow = Ellipsoid(body.at(deep, dent[0] - 0.45, dent[1]), axes * size * (0.85, 0.7, 0.75), angles)
        return Composite((body, lobe), (hollow,))

    hug = Hug(1, float(scene.wall.uniform(2, 12)) * (1 - 0.4 * b.visceral), float(scene.wall.uniform(0, 14)))
    scale = scene.fit(at, target * 1.13 if scene.disease.enlarged_spleen else min(target * 1.13, MOST_SPLEEN), hug)
    kidney = scene.shapes["left_kidney"]
    assert isinstance(kidney, Ellipsoid)
    beside = kidney.grown(scene.gap + 2)

    def free(scale: float) -> Composite:
        return Composite(at(scale).parts, (*at(scale).holes, beside))

    least = LEAST_ENLARGED if scene.disease.enlarged_spleen else LEAST_SPLEEN
    if scene.room(free(scale), hug) < least:  # a large kidney in a lean body would squeeze a small spleen out
        scale = scene.fit(free, least + 12, hug, 2.0)
    missing = "spleen" in scene.disease.absent
    if not missing:
        spleen = at(scale)
        over = (T.FAT, *BOWEL, *ORGAN_TISSUES["stomach"], *ORGAN_TISSUES["liver"])
        stomach = (-3.2, T.STOMACH_WALL, (T.STOMACH_CONTENT, T.STOMACH_FOOD, T.STOMACH_GAS))
        scene.paint_at_the_wall(spleen, (stomach, (-2.6, T.BOWEL_WALL, LUMEN), (0.0, T.SPLEEN, over)), hug)
    scene.shapes["spleen"] = Ellipsoid(centre, axes * size * scale * 0.8, angles)
    scene.hilum = centre + np.array([-22 * size, -8.0, -4.0])
