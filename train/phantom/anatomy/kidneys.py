"""Kidneys and adrenal glands."""

import numpy as np

from train.phantom.anatomy.scene import Doubles, Scene
from train.phantom.canvas import Composite, Ellipsoid, Tube, vector
from train.phantom.tissue import BOWEL, LUMEN, ORGAN_TISSUES, T

BESIDE = 5.0  # mm from the middle of an adrenal gland to the cardia, below which the esophagus would cover the gland


def place(scene: Scene) -> None:
    """Where both kidneys lie, for the liver to keep away from; leaves their shapes."""
    for name, side, height in (("right_kidney", -1, 2), ("left_kidney", 1, 15)):
        scene.shapes[name] = _placed(scene, name, side, height)


def kidneys(scene: Scene) -> None:
    """Both, each in its fat."""
    for name, side, cortex, medulla in (
        ("right_kidney", -1, T.RIGHT_CORTEX, T.RIGHT_MEDULLA),
        ("left_kidney", 1, T.LEFT_CORTEX, T.LEFT_MEDULLA),
    ):
        _kidney(scene, name, side, cortex, medulla)


def _placed(scene: Scene, name: str, side: int, height: float) -> Ellipsoid:
    b, n = scene.body, scene.n
    shape = np.array([n(27, 2), n(27, 2), n(53, 4)])
    z = height + n(0, 11) + 0.35 * scene.lift
    centre = (side * (b.spine_radius * 1.2 + 34 + n(2, 4)), b.spine(z)[1] + n(6, 5), z)
    # upper pole medial and posterior, hilum towards the front and the middle
    angles = (n(0.16, 0.08), -side * n(0.2, 0.09), side * n(0.5, 0.22))
    if scene.disease.horseshoe_kidney:  # low, close, and the lower poles turned to each other
        centre = (centre[0] - side * 9, centre[1] - 8, z - 24)
        angles = (angles[0], side * 0.38, side * 0.15)
    within = np.array(centre) + 0.65 * np.vstack([np.zeros(3), np.diag(shape), -np.diag(shape)])
    target = scene.grown_target(name, within) * 1.02  # the sinus goes, the fuller poles come
    axes = shape * (target * 1000 / (4 / 3 * np.pi * float(np.prod(shape)))) ** (1 / 3)
    return Ellipsoid(centre, axes, angles, 0.15)


def _kidney(scene: Scene, name: str, side: int, cortex: int, medulla: int) -> None:
    b, c, kidney = scene.body, scene.canvas, scene.shapes[name]
    assert isinstance(kidney, Ellipsoid)
    axes = kidney.axes
    margin, fat_above = scene.gap + scene.u(0, 5) * (0.2 + b.visceral), scene.u(-4, 4) + 5 * b.visceral
    sinus = Ellipsoid(
        kidney.at(-side * 0.72, -0.1, 0), axes * (scene.u(0.42, 0.6), scene.u(0.26, 0.38), scene.u(0.4, 0.55))
    )
    sinus.turn = kidney.turn
    pyramids = [(t, scene.r.random() < 0.85, scene.r.normal(0, 0.08)) for t in np.linspace(-2.4, 2.4, 9)]
    thickness = scene.u(0.2, 0.28)
    pelvis = scene.u(3, 7)
    shell = Composite((kidney.grown(margin), Ellipsoid(kidney.at(0, 0.3, 0.88), axes * (0.7, 0.7, 0.26) + fat_above)))
    everything = (*BOWEL, *ORGAN_TISSUES["liver"], T.SPLEEN, *ORGAN_TISSUES["stomach"])
    c.paint(shell, T.FAT, everything)
    if side < 0:  # the cap of fat over the upper pole is open to the back, where the liver has no peritoneum
        top = kidney.at(0, 0.2, 0.88)
        behind = Tube(np.array([top, top + vector(5, 60, 4)]), [0.6 * axes[0] + fat_above, 0.8 * axes[0] + fat_above])
        c.paint(behind, T.FAT, ORGAN_TISSUES["liver"])
    if name in scene.disease.absent:
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


def adrenals(scene: Scene) -> None:
    """Both, above and before the kidneys."""
    b, n = scene.body, scene.n
    for name, side, tissue in (
        ("right_adrenal_gland", -1, T.RIGHT_ADRENAL),
        ("left_adrenal_gland", 1, T.LEFT_ADRENAL),
    ):
        kidney = scene.shapes["right_kidney" if side < 0 else "left_kidney"]
        assert isinstance(kidney, Ellipsoid)
        pole = kidney.at(0, 0, 1.0)
        if side < 0:  # behind the vena cava, above the kidney, beside the crus
            high = np.clip(float(pole[2]) + n(3, 5), 36.0, b.dome_right - 58)
            middle = np.array([n(-31, 2.5), b.spine_front(55) - n(2, 3), high])
        else:  # in front of the upper pole, beside the aorta
            forward = min(float(pole[1]) - n(25, 4), b.spine_front(50) - n(1, 2))
            middle = np.array([n(33, 4), forward, min(float(pole[2]) - n(6, 6), b.dome_right - 66)])
            middle[2] -= _under_the_esophagus(scene, middle)
        parts = _adrenal_limbs(scene, middle, side)
        gland = _of_volume(parts, middle, 1.07 * scene.grown_target(name, middle))
        margin = 0.3 + min(scene.gap, 3.5) * scene.u(0.2, 1.0)
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
        _adrenal_bed(scene, middle, side)
        for part in gland:
            scene.canvas.paint(part.grown(margin), T.FAT, (*around, *kidneys))
        for part in gland:
            scene.canvas.paint(part, tissue, (T.FAT, T.MUSCLE, T.ARTERY, T.VEIN))


def _under_the_esophagus(scene: Scene, middle: Doubles) -> float:
    """mm that a gland around ``middle`` has to come down where the esophagus ends at it, which is rare."""
    aside = float(np.hypot(*(scene.cardia - middle)[:2]))
    return float(np.clip(14 - (scene.cardia[2] - middle[2]), 0, 14)) if aside < BESIDE else 0.0


def _adrenal_bed(scene: Scene, middle: Doubles, side: int) -> None:
    """The fat between crus, kidney and what lies in front, which even the lean have; on the right the liver leaves less."""
    half = np.array((scene.u(6, 12), scene.u(8, 14), 20.0)) + (1 - side) * np.array((-1.0, 0.0, 0.0))
    bed = Ellipsoid(middle + vector(side * 3, 4, 2), half * (1 + 0.4 * scene.body.visceral))
    stomach = (-3.5, T.STOMACH_WALL, (T.STOMACH_CONTENT, T.STOMACH_FOOD, T.STOMACH_GAS))
    bowel = (-2.6, T.BOWEL_WALL, LUMEN)
    over = (*ORGAN_TISSUES["stomach"], *ORGAN_TISSUES["liver"], T.SPLEEN, *BOWEL)
    scene.canvas.paint_in_turn(bed, (stomach, bowel, (0.0, T.FAT, over)))


def _adrenal_limbs(scene: Scene, middle: Doubles, side: int) -> list[Tube]:
    """A crest in front and two thin leaves behind it, slice by slice: Y, V, lambda or a single line."""
    u, n = scene.u, scene.n
    form = scene.r.choice(("Y", "V", "lambda", "line"), p=(0.34, 0.3, 0.22, 0.14))
    height, levels = u(22, 40), 5
    crest = {"Y": u(6, 13), "V": u(0, 3), "lambda": u(8, 16), "line": u(5, 10)}[form]
    lengths = np.array((u(13, 26), u(11, 24)))
    if form == "lambda":
        lengths[int(scene.r.integers(2))] *= 0.55
    if form == "line":
        lengths[1] = 0.0
    medial = u(-0.1, 0.35) if side < 0 else u(-0.25, 0.3)  # 0 is straight back, pi/2 away from the midline
    directions = (medial, medial + u(0.35, 1.2))
    curve, thick = scene.r.normal(0, 0.25, 2), (u(1.5, 2.7), u(1.4, 2.6), u(1.5, 2.7))
    lean = np.array((side * u(-2, 6), u(-7, 2), 0.0))  # from the top down: along the kidney's slope
    stretch = 0.75 * height / (levels - 1) / min(thick)
    parts = []
    for t in np.linspace(0, 1, levels):
        fork = middle + lean * (t - 0.5) + vector(0, 0, height * (0.5 - t)) + scene.r.normal(0, 0.6, 3)
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


def _of_volume(parts: list[Tube], about: Doubles, millilitres: float) -> list[Tube]:
    """Tubes enlarged or shrunk from ``about`` until their union has the volume."""
    whole, step = Composite(parts), 1.25
    axes = [np.arange(lo, hi, step, dtype=np.float32) for lo, hi in zip(*whole.bounds(), strict=True)]
    x, y, z = np.meshgrid(*axes, indexing="ij")
    volume = float((whole.distance((x, y, z)) < 0).sum()) * step**3 / 1000
    factor = float(np.clip((millilitres / max(volume, 0.1)) ** (1 / 3), 0.6, 1.6))
    return [part.moved(about, factor) for part in parts]
