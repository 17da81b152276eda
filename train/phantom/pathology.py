"""Disease painted into a healthy scene: lesions, fluid, what is left after an operation, and what was put in.

``settle`` bends the body before it is painted, ``paint`` works on the painted scene. As in anatomy, every position comes
from the body and the seed, never from the voxels, so one seed has one disease at any grid.
"""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from train.phantom.anatomy.scene import ANY_BODY, Scene
from train.phantom.body import Body, Field, stream
from train.phantom.canvas import Composite, Ellipsoid, Floats, Tube, lookup, through, vector
from train.phantom.disease import Disease, LesionTissue
from train.phantom.tissue import BOWEL, ORGAN_TISSUES, T

Doubles = NDArray[np.float64]
SETTLING = 0.7  # a removed organ's bed shrinks to 1 / (1 + this) of its width
BONES = (T.CORTICAL, T.SPONGY, T.CARTILAGE, T.DISC, T.CANAL)


def settle(field: Field, body: Body, disease: Disease) -> Field:
    """The deformation with the neighbours of a removed organ drawn into its bed by up to about two centimetres."""
    beds = [_bed(body, organ) for organ in disease.resected if organ != "gallbladder"]
    if not beds:
        return field
    lattice = field.lattice
    z, y, x = np.meshgrid(*[lattice.nodes(k) for k in range(3)], indexing="ij")
    turn = field.turn
    here = [turn[k, 0] * x + turn[k, 1] * y + turn[k, 2] * z + field.displacement[k] for k in range(3)]
    moved = [d.astype(np.float64) for d in field.displacement]
    # The wall with its ribs and the spine stay where they are.
    inside = np.clip(field.cavity / 25, 0, 1) * np.clip((np.abs(here[0]) - body.spine_radius) / 30, 0, 1)
    for centre in beds:
        away = [p - c for p, c in zip(here, centre, strict=True)]
        weight = SETTLING * inside * np.exp(-sum(a * a for a in away) / 48.0**2)
        for d, a in zip(moved, away, strict=True):
            d += weight * a
    dx, dy, dz = (m.astype(np.float32) for m in moved)
    return replace(field, displacement=(dx, dy, dz))


def _bed(body: Body, organ: str) -> Doubles:
    """About where an organ lies, (x, y, z) mm."""
    if organ == "spleen":
        return vector(body.cavity_half_width - 24, 0.4 * body.cavity_back, body.dome_left - 76)
    side, z = (-1, 2) if organ == "right_kidney" else (1, 15)
    return vector(side * (body.spine_radius * 1.2 + 36), body.spine(z)[1] + 4, z)


def paint(scene: Scene, seed: int) -> None:
    """Everything that ``scene.disease`` says, into the finished scene."""
    disease = scene.disease
    r = stream(seed, "lesions")
    if disease.horseshoe_kidney:
        _isthmus(scene)
    _lesions(scene, r)
    for name in disease.hydronephrosis:
        _hydronephrosis(scene, name, r)
    if disease.gallstones:
        _gallstones(scene, r)
    for organ in disease.resected:
        _after_resection(scene, organ, r)
    if disease.ascites:
        _ascites(scene, disease.ascites, r)
    for side in disease.effusion:
        _effusion(scene, 1 if side == "left" else -1, r)
    if "aortic" in disease.stents:
        _aortic_stent(scene, r)
    if "biliary" in disease.stents:
        _biliary_stent(scene, r)
    if "spine" in disease.implants:
        _screws(scene, r)
    if "hip" in disease.implants:
        _hip(scene, r)


def _deal(scene: Scene, organ: str, kind: str) -> int:
    """A tissue id of its own that counts as ``organ``."""
    tissue = int(T.LESION) + len(scene.lesions)
    scene.lesions[tissue] = LesionTissue(organ, kind)
    return tissue


# --- lesions


def _lesions(scene: Scene, r: np.random.Generator) -> None:
    for kind, organs in (("cyst", scene.disease.cysts), ("tumour", scene.disease.lesions)):
        for organ in organs:
            tissue = _deal(scene, organ, kind)
            core = _deal(scene, organ, "necrosis") if kind == "tumour" and r.random() < 0.4 else None
            # Those of kidney and pancreas bulge into the fat, and still count as the organ.
            over = [*ORGAN_TISSUES[organ], *((T.FAT,) if "kidney" in organ or organ == "pancreas" else ())]
            for _ in range(int(r.integers(1, 6 if organ in ("liver", "spleen") else 3))):
                shape, radius = _lump(scene, organ, r)
                layers = [(0.0, tissue)] + ([(radius * r.uniform(0.25, 0.6), core)] if core is not None else [])
                scene.canvas.paint_layers(shape, layers, over)


def _lump(scene: Scene, organ: str, r: np.random.Generator) -> tuple[Ellipsoid, float]:
    largest = {"pancreas": 16.0, "liver": 38.0}.get(organ, 26.0)
    radius = float(np.exp(r.uniform(np.log(4), np.log(largest))))
    home = scene.shapes[organ]
    if isinstance(home, Tube):
        centre = np.asarray(home.points[int(r.integers(2, len(home.points) - 2))] + r.normal(0, 3, 3))
    else:
        way = r.normal(size=3)
        centre = home.at(*(way / np.linalg.norm(way) * r.uniform(0.2, 0.9)))
    angles = (float(r.uniform(-1, 1)), 0.0, float(r.uniform(-1, 1)))
    return Ellipsoid(centre, radius * r.uniform(0.8, 1.2, 3), angles), radius


def _gallstones(scene: Scene, r: np.random.Generator) -> None:
    home = scene.shapes["gallbladder"]
    assert isinstance(home, Ellipsoid)
    tissue = _deal(scene, "gallbladder", "stone")
    for _ in range(int(r.integers(1, 6))):
        radius = float(r.uniform(2, 8))
        spot = home.at(*r.uniform(-0.4, 0.4, 2), r.uniform(-0.7, 0.1)) + vector(0, 0.35 * home.axes[1], 0)
        scene.canvas.paint(Ellipsoid(spot, radius * r.uniform(0.8, 1.2, 3)), tissue, ORGAN_TISSUES["gallbladder"])


# --- kidneys


def _kidney(scene: Scene, name: str) -> tuple[Ellipsoid, int, tuple[T, ...]]:
    """Shape, side (-1 right, 1 left) and tissues."""
    kidney = scene.shapes[name]
    assert isinstance(kidney, Ellipsoid)
    return kidney, -1 if name == "right_kidney" else 1, ORGAN_TISSUES[name]


def _isthmus(scene: Scene) -> None:
    """The bridge of a horseshoe kidney in front of the great vessels; the body's midline parts right from left."""
    poles = {
        side: kidney.at(0, 0, -0.8) for kidney, side, _ in (_kidney(scene, n) for n in ("right_kidney", "left_kidney"))
    }
    z = float(poles[-1][2] + poles[1][2]) / 2 - 6
    # In front of aorta and vena cava, whichever reaches further.
    front = min(vessel.front(z) for vessel in (scene.aorta, scene.cava)) - 11
    middle = vector(2, front, z)
    over = (T.FAT, *BOWEL, *ORGAN_TISSUES["duodenum"], T.VEIN, T.ARTERY, T.PORTAL, T.MUSCLE)
    for side, cortex in ((-1, T.RIGHT_CORTEX), (1, T.LEFT_CORTEX)):
        beside = vector(0.75 * poles[side][0], 0.35 * poles[side][1] + 0.65 * front, 0.5 * (poles[side][2] + z))
        bridge = Tube(through([poles[side], beside, middle], 4), [16, 13, 11, 10], (1, 0.85, 1.3))
        scene.canvas.paint(bridge, cortex, over)


def _hydronephrosis(scene: Scene, name: str, r: np.random.Generator) -> None:
    """Pelvis and calyces full of urine, which is background as the renal sinus is; the cortex above them thins."""
    kidney, side, tissues = _kidney(scene, name)
    grade = float(r.uniform(0.35, 1))
    over = (*tissues, T.SINUS, T.URINE, T.FAT)
    pelvis = Ellipsoid(
        kidney.at(-side * 0.7, -0.15, -0.05), kidney.axes * vector(0.62, 0.42, 0.38) * (0.55 + 0.5 * grade)
    )
    pelvis.turn = kidney.turn
    parts: list[Ellipsoid] = [pelvis]
    for t in np.linspace(-1.2, 1.2, 5):
        for front in (-0.25, 0.25):
            spot = kidney.at(side * 0.3 * np.cos(t), front, 0.62 * np.sin(t))
            parts.append(Ellipsoid(spot, (5 + 8 * grade) * r.uniform(0.75, 1.15, 3)))
    scene.canvas.paint(Composite(parts), T.URINE, over)
    y0 = scene.body.spine(-180)[1]
    ureter: list[Doubles] = [
        kidney.at(-side * 0.9, -0.1, -0.3),
        vector(side * 40, scene.body.spine(-60)[1] - 22, -60),
        vector(side * 48, scene.body.spine(-160)[1] - 34, -165),
        vector(side * 18, y0 - 46, -265),
    ]
    scene.canvas.paint(Tube(through(ureter, 5), 2.5 + 3 * grade), T.URINE, (T.FAT, T.VEIN))


# --- after operations


def _after_resection(scene: Scene, organ: str, r: np.random.Generator) -> None:
    """Clips at the vessels, and bowel in the bed of a kidney or the spleen."""
    bed = scene.shapes[organ]
    assert isinstance(bed, Ellipsoid)
    medial = {"gallbladder": (0.0, 0.0, 0.6), "right_kidney": (0.5, -0.1, 0.0)}.get(organ, (-0.5, -0.1, 0.0))
    centre = bed.at(*medial)
    size = 1.0 if organ == "gallbladder" else 1.0 + SETTLING  # what lies in a bed shrinks with it
    for _ in range(int(r.integers(3, 8))):
        angles = (float(r.uniform(-1, 1)), float(r.uniform(-1, 1)), 0.0)
        clip = Ellipsoid(centre + r.normal(0, 7, 3), size * vector(2.0, 2.0, 4.5), angles)
        scene.canvas.paint(clip, T.METAL, (T.FAT, *BOWEL, T.VEIN, T.ARTERY, T.PORTAL, *ORGAN_TISSUES["liver"]))
    loops, content = int(r.integers(1, 4)), (T.STOOL, T.BOWEL_FLUID, T.BOWEL_GAS)
    if organ == "gallbladder":
        return
    for _ in range(loops):
        spots = [bed.at(*r.uniform(-0.5, 0.5, 3)) - vector(0, r.uniform(0, 18), 0) for _ in range(3)]
        loop = Tube(through(spots, 3), r.uniform(9, 17)).bumpy(r, 0.08)
        layers = ((0.0, int(T.BOWEL_WALL)), (2.5, int(content[int(r.integers(3))])))
        scene.canvas.paint_layers(loop, layers, (T.FAT,))


# --- fluid


def _below_the_wall(scene: Scene) -> Floats:
    """Depth in mm below wall and diaphragm of every voxel, negative outside the abdominal cavity."""
    on, grid = scene.field.lattice.on, scene.canvas.grid
    return np.minimum(on(grid, scene.field.cavity), -on(grid, scene.field.lung) - 2)


def _ascites(scene: Scene, most: float, r: np.random.Generator) -> None:
    """Fluid around liver and spleen, in the gutters beside the colon and in the pelvis; none behind the peritoneum.

    It pushes the organs off the wall: up to 40 % of its depth (8 mm) goes from liver and spleen, the rest from fat.
    """
    b, c = scene.body, scene.canvas
    depth = _below_the_wall(scene)
    x, y, z = c.points
    # Deeper at the back, where it flows in a patient on the back, and at the sides.
    reach = (most * np.clip(0.75 + 0.4 * y / b.cavity_back, 0.35, 1.2)).astype(np.float32)
    retroperitoneum = (y > np.float32(b.spine_front(0) - 8)) & (np.abs(x) < np.float32(0.66 * scene.half))
    free = (depth > 0) & ~retroperitoneum & (z > -235)
    tissue = c.tissue
    soft = lookup((T.FAT, T.BOWEL_WALL))[tissue] & (depth < reach)
    taken = np.minimum(0.4 * reach, 8)
    solid = lookup((*ORGAN_TISSUES["liver"], T.SPLEEN))[tissue] & (depth < taken)
    tissue[free & (soft | solid)] = T.ASCITES
    y0, fill = b.spine(-180)[1], most / 15
    pelvis = Ellipsoid((0, y0 - 38, -245), (66, 46, 22 + 18 * min(fill, 1.6)), squareness=0.4)
    c.paint(pelvis, T.ASCITES, (T.FAT,))
    for side in (-1, 1):  # between bowel loops
        for _ in range(int(3 * fill) + 1):
            spot = vector(side * r.uniform(5, 70), r.uniform(-0.6, 0) * b.cavity_front, r.uniform(-170, 0))
            c.paint(Ellipsoid(spot, r.uniform(8, 26, 3)), T.ASCITES, (T.FAT,))


def _effusion(scene: Scene, side: int, r: np.random.Generator) -> None:
    """Pleural fluid at the back of one chest, with the collapsed edge of the lung on it."""
    b, c = scene.body, scene.canvas
    level, edge = r.uniform(0.0, 0.6) * b.cavity_back, r.uniform(3, 16)
    x, y, z = c.points
    slope = 0.25 * (z - np.float32(b.dome_right - 60))  # a meniscus: less of it higher up
    lung = (c.tissue == T.LUNG) & (x * side > 0)
    c.tissue[lung & (y > np.float32(level - edge) + slope)] = T.ATELECTASIS
    c.tissue[lung & (y > np.float32(level) + slope)] = T.EFFUSION


# --- implants


def _aortic_stent(scene: Scene, r: np.random.Generator) -> None:
    """A stent graft below the renal arteries, in an aneurysm with thrombus in three of five; all of it counts as aorta."""
    points, radii = scene.aorta.points, scene.aorta.radii
    part = (points[:, 2] < 22) & (points[:, 2] > points[-1, 2] + 6)
    if part.sum() < 2:
        return
    points, radii = points[part], radii[part]
    stent, thrombus = _deal(scene, "aorta", "stent"), _deal(scene, "aorta", "thrombus")
    swelling, width = r.random() < 0.6, r.uniform(0.3, 1.0)
    if swelling:
        bulge = np.sin(np.linspace(0, np.pi, len(radii))) * width
        sac = Tube(points - vector(0, 4, 0), radii * (1 + bulge))
        scene.canvas.paint(sac, thrombus, (T.FAT, *BOWEL, T.MUSCLE, T.VEIN))
    mesh = Tube(points, radii * 0.85)
    scene.canvas.paint_layers(mesh, ((0, stent), (1.3, T.AORTA)), ORGAN_TISSUES["aorta"])


def _biliary_stent(scene: Scene, r: np.random.Generator) -> None:
    """A tube in the common bile duct, with gas in it in half of the cases; background as the duct is."""
    inside = T.BOWEL_GAS if r.random() < 0.5 else T.URINE
    tube = Tube(scene.bile.points, r.uniform(2.8, 4.6))
    over = (T.URINE, T.FAT, *ORGAN_TISSUES["pancreas"])
    scene.canvas.paint_layers(tube, ((0, T.STENT), (1.1, inside)), over)


def _screws(scene: Scene, r: np.random.Generator) -> None:
    """Pedicle screws in two to four vertebrae and the rods between them."""
    b, c = scene.body, scene.canvas
    low, levels, pitch = r.uniform(-140, -10), int(r.integers(2, 5)), r.uniform(31, 36)
    over = (*ANY_BODY, *BONES)
    heights = low + pitch * np.arange(levels)
    for side in (-1, 1):
        for z in heights:
            y = b.spine(z)[1]
            screw = [(side * 21, y + b.spine_radius + 26, z), (side * 9, y - 6, z + 3)]
            c.paint(Tube(np.array(screw, float), [4.5, 2.8]), T.METAL, over)
        rod = [(side * 21, b.spine(z)[1] + b.spine_radius + 26, z) for z in (heights[0] - 6, heights[-1] + 6)]
        c.paint(Tube(np.array(rod, float), 3.2), T.METAL, over)


def _hip(scene: Scene, r: np.random.Generator) -> None:
    """A total hip replacement on one side."""
    side = 1 if r.random() < 0.5 else -1
    x, y, z = scene.hips[side]
    over = (*ANY_BODY, *BONES)
    scene.canvas.paint(Ellipsoid((x, y, z), (25, 25, 25)), T.METAL, over)
    stem = [(x, y, z), (x + side * 34, y + 8, z - 25), (x + side * 40, y + 10, z - 130)]
    scene.canvas.paint(Tube(np.array(stem, float), [9, 10, 6]), T.METAL, over)
