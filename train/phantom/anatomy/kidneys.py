"""Kidneys and adrenal glands."""

from dataclasses import dataclass

import numpy as np

from train.phantom.anatomy.scene import Doubles, Scene
from train.phantom.anatomy.trunk import clear_of_organs, section
from train.phantom.canvas import Composite, Ellipsoid, Tube, vector
from train.phantom.tissue import BOWEL, LUMEN, ORGAN_TISSUES, T

SQUARE = 0.15  # of a kidney's ellipsoid
FORMS = ("Y", "V", "lambda", "line")  # of an adrenal gland in an axial slice
PTOTIC = {-1: 0.22, 1: 0.07}  # share of kidneys, right and left, that lie low
WEDGE = 9.0  # mm, half of the fat between crus and right gland at its widest
# mm from the middle of an adrenal gland to the cardia, below which the esophagus would cover the gland; and the same where the
# kidney has come down, so that the gland may lie above the cardia.
BESIDE, ALONE = 8.0, 30.0
# Right and left: share of adrenal glands that lie across, and by how many radians at most.
ACROSS = {-1: (0.4, 1.0), 1: (0.25, 0.6)}
ASIDE = 1.7  # radians from straight back that a leaf points at most
# Right and left, mean and SD: mm of a kidney's middle behind that of the spine, radians that its hilum is turned to the front.
BEHIND = {-1: (4, 7), 1: (6, 5)}
TURNED = {-1: (0.58, 0.26), 1: (0.5, 0.22)}


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
    """The ellipsoid that a kidney's outline follows; leaves parenchyma and sinus, which measure the target volume."""
    b, n = scene.body, scene.n
    shape = np.array([n(30.5, 2), n(23.5, 1.8), n(53, 4)])  # from the hilum outwards, lip to lip, pole to pole
    z = height + n(0, 11) + 0.35 * scene.lift
    centre = (side * (b.spine_radius * 1.2 + 36 + n(2, 4)), b.spine(z)[1] + n(*BEHIND[side]), z)
    # upper pole medial and posterior, hilum towards the front and the middle
    angles = (n(0.16, 0.08), -side * n(0.2, 0.09), side * n(*TURNED[side]))
    low = scene.variants
    chance, drop, turned = low.random(), float(low.uniform(12, 58)), float(low.uniform(0, 1.1))
    scene.lowered[name] = 0.0
    if chance < PTOTIC[side] and not scene.disease.horseshoe_kidney:  # beside the psoas where it is thick, and turned
        scene.lowered[name] = drop
        z -= drop
        centre = (centre[0] + side * 0.22 * drop, b.spine(z)[1] - n(4, 6), z)
        angles = (angles[0], angles[1], side * turned)
    if scene.disease.horseshoe_kidney:  # low, close, and the lower poles turned to each other
        centre = (centre[0] - side * 9, centre[1] - 8, z - 24)
        angles = (angles[0], side * 0.38, side * 0.15)
    within = np.array(centre) + 0.65 * np.vstack([np.zeros(3), np.diag(shape), -np.diag(shape)])
    target = scene.grown_target(name, within)
    draft, plan = Ellipsoid(centre, shape, angles, SQUARE), Renal.draw(scene, side)
    axes = shape * (target / _millilitres(plan.parenchyma(draft), 2.5)) ** (1 / 3)
    kidney = Ellipsoid(centre, axes, angles, SQUARE)
    scene.renal[name] = plan.parenchyma(kidney), plan.sinus(kidney)
    return kidney


@dataclass(frozen=True)
class Lump:
    """An ellipsoid in units of a kidney's half-axes."""

    centre: tuple[float, float, float]
    half: tuple[float, float, float]

    def on(self, kidney: Ellipsoid) -> Ellipsoid:
        """Its place in the body."""
        lump = Ellipsoid(kidney.at(*self.centre), kidney.axes * self.half)
        lump.turn = kidney.turn
        return lump


@dataclass(frozen=True)
class Renal:
    """What a kidney's outline has beyond its ellipsoid: poles, humps, flat faces; its sinus and the sinus's mouth."""

    lumps: tuple[Lump, ...]
    faces: tuple[Lump, ...]
    hollow: Lump
    mouth: Lump

    @classmethod
    def draw(cls, scene: Scene, side: int) -> "Renal":
        """``side``: -1 right, 1 left. The young and lean have a slit for a sinus, the old and obese a wide hollow."""
        r = scene.retro
        u, inner = r.uniform, -side
        lumps = [
            Lump((u(-0.06, 0.06), u(-0.08, 0.08), pole), (u(0.86, 0.98), u(0.88, 1.02), u(0.64, 0.7)))
            for pole in (0.33, -0.33)
        ]
        hump, place, knobs = r.random(), u((-0.3, -0.2), (0.2, 0.3)), r.normal(size=(4, 3))
        if hump < (0.15 if side < 0 else 0.35):
            lumps.append(Lump((side * 0.64, place[0], place[1]), (0.5, 0.5, 0.34)))
        if r.random() < 0.4:  # lobulated as in childhood
            for knob in knobs:
                way = 0.82 * knob / float(np.linalg.norm(knob))
                lumps.append(Lump((side * abs(way[0]), way[1], way[2]), (0.27, 0.3, 0.22)))
        faces = [  # at psoas and quadratus; at liver or spleen
            Lump((x * (4 - d), y * (4 - d), z), (3.0, 3.0, 3.0))
            for x, y, z, d in ((inner * 0.5, 0.87, u(-1, 1), u(0, 0.12)), (side * 0.8, -0.6, u(-1, 1), u(0, 0.12)))
        ]
        size = float(np.clip(0.62 * r.random() + 0.38 * scene.body.visceral, 0, 1))
        back = float(np.clip(r.normal(0.06, 0.08), -0.1, 0.22))  # the anterior lip is the thicker one
        depth = u(0.64, 0.76)
        hollow = Lump((inner * 0.34, back, u(-0.06, 0.06)), (depth, 0.17 + 0.24 * size, 0.34 + 0.16 * size))
        mouth = Lump(
            (inner * u(0.98, 1.1), back - 0.06, hollow.centre[2]), (0.62, 0.36 + 0.3 * size, 0.26 + 0.12 * size)
        )
        return cls(tuple(lumps), tuple(faces), hollow, mouth)

    def parenchyma(self, kidney: Ellipsoid) -> Composite:
        """Cortex and medulla."""
        holes = (*self.faces, self.hollow, self.mouth)
        return Composite((kidney, *(p.on(kidney) for p in self.lumps)), [hole.on(kidney) for hole in holes])

    def sinus(self, kidney: Ellipsoid) -> Composite:
        """The fat within, without the mouth, which belongs to the fat around the kidney."""
        return Composite((self.hollow.on(kidney),))


def _millilitres(shape: Composite, step: float) -> float:
    """Volume of a shape, mL, counted in a grid of ``step`` mm."""
    axes = [np.arange(lo, hi, step, dtype=np.float32) for lo, hi in zip(*shape.bounds(), strict=True)]
    x, y, z = np.meshgrid(*axes, indexing="ij")
    return float((shape.distance((x, y, z)) < 0).sum()) * step**3 / 1000


def _kidney(scene: Scene, name: str, side: int, cortex: int, medulla: int) -> None:
    b, c, kidney = scene.body, scene.canvas, scene.shapes[name]
    assert isinstance(kidney, Ellipsoid)
    parenchyma, sinus = scene.renal[name]
    axes = kidney.axes
    margin, fat_above = scene.gap + scene.u(0, 5) * (0.2 + b.visceral), scene.u(-4, 4) + 5 * b.visceral
    wide = scene.u(0.55, 0.95)  # of the renal pelvis, as a share of the sinus
    pyramids = [(t, scene.r.random() < 0.85, scene.r.normal(0, 0.08)) for t in np.linspace(-2.4, 2.4, 9)]
    thickness = scene.u(0.2, 0.28)
    pelvis, vessel = scene.u(3, 7), scene.retro.uniform(1.6, 3.4)
    if scene.retro.random() < 0.35:  # a full pelvis, which reaches out of the hilum
        pelvis, wide = pelvis * scene.retro.uniform(1.2, 1.9), 1.0
    shell = Composite((kidney.grown(margin), Ellipsoid(kidney.at(0, 0.3, 0.88), axes * (0.7, 0.7, 0.26) + fat_above)))
    everything = (*BOWEL, *ORGAN_TISSUES["liver"], T.SPLEEN, *ORGAN_TISSUES["stomach"])
    c.paint(shell, T.FAT, everything)
    if side < 0:  # the cap of fat over the upper pole is open to the back, where the liver has no peritoneum
        top = kidney.at(0, 0.2, 0.88)
        opening = (1 - 0.4 * scene.covered) * (np.array((0.6, 0.8)) * axes[1] + fat_above)
        behind = Tube(np.array([top, top + vector(5, 60, 4)]), opening)
        c.paint(behind, T.FAT, ORGAN_TISSUES["liver"])
    if name in scene.disease.absent:
        return
    c.paint(parenchyma, cortex, (T.FAT, T.MUSCLE))
    for t, there, jitter in pyramids:
        if not there:
            continue
        for front in (-0.42, 0.42):
            spot = kidney.at(side * (0.42 * np.cos(t * 0.62) + jitter), front, 0.7 * np.sin(t * 0.62))
            c.paint(Ellipsoid(spot, axes * (0.24, 0.28, 0.15) * (1.25 - thickness)), medulla, [cortex])
    c.paint(sinus, T.SINUS, (T.FAT, T.MUSCLE))
    hollow = sinus.parts[0]
    assert isinstance(hollow, Ellipsoid)
    flat = min(pelvis * 0.7, wide * float(hollow.axes[1]))
    c.paint(Ellipsoid(hollow.at(-side * 0.35, 0, -0.1), (pelvis * 1.6, flat, pelvis)), T.URINE, [T.SINUS, T.FAT])
    for k in range(3):
        calyx = np.array([hollow.at(-side * 0.2, 0, 0), hollow.at(side * 0.6, 0, 0.75 * (k - 1))])
        c.paint(Tube(calyx, 1.8 if k % 2 else vessel), T.URINE if k % 2 else T.VEIN, [T.SINUS])


def adrenals(scene: Scene) -> None:
    """Both, above and before the kidneys."""
    for name, side, tissue in (
        ("right_adrenal_gland", -1, T.RIGHT_ADRENAL),
        ("left_adrenal_gland", 1, T.LEFT_ADRENAL),
    ):
        middle = _right_gland_at(scene) if side < 0 else _left_gland_at(scene)
        parts = _adrenal_limbs(scene, middle, side)
        gland = _of_volume(parts, middle, 1.07 * scene.grown_target(name, middle))
        margin = 0.3 + min(scene.gap, 3.5) * scene.u(0.2, 1.0)
        around = (*ORGAN_TISSUES["stomach"], *ORGAN_TISSUES["gallbladder"], T.SPLEEN, T.PANCREAS, *BOWEL, T.PORTAL)
        kidneys = (T.RIGHT_CORTEX, T.LEFT_CORTEX, T.RIGHT_MEDULLA, T.LEFT_MEDULLA)
        if side < 0:
            _wedge(scene, gland, middle, 0.5 * margin)
        else:
            _left_adrenal_bed(scene, middle)
        for part in gland:
            scene.canvas.paint(part.grown(margin), T.FAT, (*around, *kidneys))
            scene.canvas.paint(part.grown(max(margin, 1.3)), T.FAT, [T.MUSCLE])  # the crus beside it
            if side > 0:
                scene.canvas.paint(part.grown(margin), T.FAT, ORGAN_TISSUES["liver"])
        for part in gland:
            scene.canvas.paint(part, tissue, (T.FAT, T.MUSCLE, T.ARTERY, T.VEIN, *ORGAN_TISSUES["liver"]))


def _right_gland_at(scene: Scene) -> Doubles:
    """Behind the vena cava's outer half, above the kidney, beside the crus."""
    b, n, kidney = scene.body, scene.n, scene.shapes["right_kidney"]
    assert isinstance(kidney, Ellipsoid)
    pole = float(kidney.at(0, 0, 1.0)[2]) + scene.lowered["right_kidney"]  # the gland stays where a kidney descends
    high = float(np.clip(pole + n(3, 8), 40.0, max(b.dome_right - 56, 42.0)))
    x, y, wide, deep = section(scene.cava, high)
    crus, _, half, _ = section(scene.crura[-1], high)
    medial = min(x - scene.u(-0.3, 0.3) * wide, crus - half - scene.u(4, 8), -b.spine_radius - scene.u(4.5, 7.5))
    return np.array([medial, y + deep + n(6, 1.5), high])


def _left_gland_at(scene: Scene) -> Doubles:
    """In front of the upper pole, beside crus and aorta."""
    b, n, kidney = scene.body, scene.n, scene.shapes["left_kidney"]
    assert isinstance(kidney, Ellipsoid)
    pole = kidney.at(0, 0, 1.0) + vector(0, 0, scene.lowered["left_kidney"])
    forward = min(float(pole[1]) - n(22, 4), b.spine_front(50) - n(1, 2))
    middle = np.array([n(33, 4), forward, min(float(pole[2]) - n(11, 8), b.dome_right - 66)])
    crus, _, half, _ = section(scene.crura[1], float(middle[2]))
    middle[0] = max(float(middle[0]), crus + half + scene.u(5, 8))
    middle[2] -= _under_the_esophagus(scene, middle)
    return middle


def _wedge(scene: Scene, gland: list[Tube], middle: Doubles, margin: float) -> None:
    """The fat that the right gland lies in: from the crus to the gland's outer face, where the liver's edge runs along it.

    It is open to the back, to the fat around the kidney; in the lean it is hardly wider than the gland.
    """
    wide = margin + scene.u(0, 2) + 5 * scene.body.visceral**2
    parts = [part.grown(margin) for part in gland]
    for part in gland:
        crus, _, half, _ = section(scene.crura[-1], float(part.points[0, 2]))
        outer = part.points[:, 0] - part.radii - margin
        inner = np.clip(crus - half, outer + 4, outer + 2 * WEDGE)
        points = np.column_stack([(outer + inner) / 2, part.points[:, 1:]])
        radii = (inner - outer) / 2
        if part.points[-1, 1] > middle[1] + 6:  # a leaf: on to the back
            points = np.vstack([points, points[-1] + vector(-0.12 * 40 - wide, 40, -6)])
            radii = np.append(radii, radii[-1] + wide)
        parts.append(Tube(points, radii))
    over = ORGAN_TISSUES["liver"]
    bowel = (-2.6, T.BOWEL_WALL, LUMEN)
    scene.canvas.paint_in_turn(Composite(parts), (bowel, (0.0, T.FAT, (*over, *BOWEL))))


def _under_the_esophagus(scene: Scene, middle: Doubles) -> float:
    """mm that a gland around ``middle`` has to come down where the esophagus ends at it, which is rare."""
    aside = float(np.hypot(*(scene.cardia - middle)[:2]))
    beside = ALONE if scene.lowered["left_kidney"] else BESIDE
    return float(np.clip(14 - (scene.cardia[2] - middle[2]), 0, 14)) if aside < beside else 0.0


def _left_adrenal_bed(scene: Scene, middle: Doubles) -> None:
    """The fat between crus, kidney and what lies in front, which even the lean have."""
    half = np.array((scene.u(6, 12), scene.u(8, 14), 20.0))
    bed = Ellipsoid(middle + vector(3, 4, 2), half * (1 + 0.4 * scene.body.visceral))
    clear_of_organs(scene, bed, 0.0)


def _adrenal_limbs(scene: Scene, middle: Doubles, side: int) -> list[Tube]:
    """A crest in front and two thin leaves behind it, slice by slice: Y, V, lambda or a single line."""
    u, n = scene.u, scene.n
    right = side < 0
    form = scene.r.choice(FORMS, p=(0.3, 0.22, 0.08, 0.4) if right else (0.36, 0.32, 0.24, 0.08))
    height, levels = u(22, 40), 8
    crest = {"Y": u(6, 13), "V": u(0, 3), "lambda": u(8, 16), "line": u(5, 10)}[form]
    lengths = np.array((u(16, 32), u(11, 26)) if right else (u(13, 26), u(11, 24)))
    if form == "lambda":
        lengths[int(scene.r.integers(2))] *= 0.55
    if form == "line":
        lengths[1] = 0.0
    # 0 is straight back, pi/2 away from the midline; the right gland runs between crus and liver, along either of them.
    medial = u(-0.1, 0.75) if right else u(-0.25, 0.3)
    directions = (medial, medial + (u(0.25, 0.65) if right else u(0.35, 1.2)))
    across, swing = _across(scene, side)
    fine = float(scene.variants.uniform(0.6, 1.0))  # many limbs are no thicker than 2 to 3 mm
    curve, thick = scene.r.normal(0, 0.25, 2), tuple(fine * t for t in (u(1.5, 2.7), u(1.4, 2.6), u(1.5, 2.7)))
    height, lengths = height / fine**0.5, lengths / fine**0.5
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
            way = min(directions[k] + across + swing * t, ASIDE) + np.array((-0.5, 0.5)) * curve[k]
            steps = np.stack([side * np.sin(way), np.cos(way), 0 * way], 1) * length / 2
            leaf = fork + np.vstack([np.zeros(3), np.cumsum(steps, axis=0)])
            parts.append(Tube(leaf, [thick[k + 1], thick[k + 1], 0.75 * thick[k + 1]], (1, 1, stretch)))
    if n(0, 1) > -1.0:  # a body where the leaves meet
        half = np.array((0, 0, u(0.15, 0.4) * height))
        thickest = u(2.6, 4.4) * (1 if scene.retro.random() > 0.15 else scene.retro.uniform(1.3, 1.9))  # nodular
        parts.append(Tube(np.array([middle + half + lean * -0.2, middle - half + lean * 0.2]), thickest))
    return parts


def _across(scene: Scene, side: int) -> tuple[float, float]:
    """Radians by which a gland's leaves turn away from the midline, all of them, and from the top down besides.

    Low leaves lie across the front of the kidney; where it reaches high beside the vena cava, so does the whole right gland.
    """
    r = scene.variants
    share, most = ACROSS[side]
    turned, swing = float(r.uniform(0.3, most)), float(r.uniform(0.0, 0.8))
    return (turned if r.random() < share else 0.0), swing


def _of_volume(parts: list[Tube], about: Doubles, millilitres: float) -> list[Tube]:
    """Tubes enlarged or shrunk from ``about`` until their union has the volume."""
    volume = _millilitres(Composite(parts), 1.25)
    factor = float(np.clip((millilitres / max(volume, 0.1)) ** (1 / 3), 0.6, 1.6))
    return [part.moved(about, factor) for part in parts]
