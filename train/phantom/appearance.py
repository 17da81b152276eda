"""Hounsfield units: tissues by CT priors and contrast phase, texture at two scales, and what a scanner makes of them."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter, gaussian_filter1d

from train.phantom.artefact import Artefacts, move, streak, streak_from_arms, truncate
from train.phantom.body import Doubles, stream
from train.phantom.canvas import Box, Canvas, Floats, Grid, Lattice, Sampler, lookup, recode
from train.phantom.disease import Disease, LesionTissue
from train.phantom.tissue import GAS, T


@dataclass(frozen=True)
class Phase:
    """``contrast`` 0 (native) to 1; ``arterial`` 1 (early) to 0 (portal venous); ``late``: minutes after that."""

    contrast: float
    arterial: float
    late: bool = False

    @property
    def name(self) -> str:
        """native, arterial, portal or late."""
        timed = "late" if self.late else "arterial" if self.arterial > 0.6 else "portal"
        return timed if self.contrast else "native"

    @classmethod
    def draw(cls, r: np.random.Generator) -> "Phase":
        """Native in 28 %, early arterial in 12 %, late in 14 %, else anything between arterial and portal venous."""
        kind, strength, timing, early = r.random(), r.uniform(0.2, 1), r.uniform(0, 1) ** 1.5, r.uniform(0.85, 1)
        if kind < 0.28:
            return cls(0.0, float(timing))
        if kind < 0.4:
            return cls(float(0.4 + 0.6 * strength), float(early))
        return cls(float(strength), 0.0, True) if kind < 0.54 else cls(float(strength), float(timing))


@dataclass(frozen=True)
class Mottle:
    """What a tissue is mixed with in specks of some mm: ``hu`` where noise exceeds ``level``, in full from 0.3 above it."""

    tissue: int
    level: float
    hu: float


@dataclass(frozen=True)
class Look:
    """HU of the 256 tissue ids, and ``mixed``: the same before contrast medium reached a lumen, where it is not even."""

    phase: Phase
    hu: Floats
    mixed: Floats
    mottles: tuple[Mottle, ...]


def draw_look(r: np.random.Generator, disease: Disease, lesions: dict[int, LesionTissue]) -> Look:
    """HU of every tissue, from ranges measured on CT, for a phase that is drawn first."""
    u = r.uniform
    phase = Phase.draw(r)
    e, a = phase.contrast, phase.arterial
    hu = np.full(256, 40, np.float32)
    _solid(hu, r, e)
    blood = u(29, 54)
    _vessels(hu, r, phase, blood)
    _livers(hu, r, phase, fatty=disease.fatty_liver)
    seen = u(0.5, 1)  # a part of the vessels' contrast: most are narrower than they are painted
    hu[T.LIVER_VESSEL] = seen * hu[T.PORTAL] + (1 - seen) * hu[T.LIVER] if e else blood + u(-4, 4)
    hu[T.PANCREAS] = u(24, 52) - (u(5, 28) if r.random() < 0.2 else 0) + e * u(20, 90)
    hu[T.DUCT] = hu[T.PANCREAS] - u(5, 45)
    _kidneys(hu, r, phase)
    hu[T.PELVIC] = u(35, 55) + e * u(10, 50)
    adrenal = u(8, 42) + e * u(20, 75)
    hu[T.RIGHT_ADRENAL], hu[T.LEFT_ADRENAL] = adrenal, adrenal + u(-4, 4)
    hu[T.GALLBLADDER] = u(-4, 24) if r.random() < 0.85 else u(24, 90)  # sludge, contrast medium in the bile
    hu[T.GALLBLADDER_WALL] = u(22, 48) + e * u(5, 65)
    mixed = hu.copy()
    _lumina(hu, mixed, r, e)
    mixed[T.CAVA] = hu[T.CAVA]
    if e and not phase.late and r.random() < 0.4:  # blood from the legs comes late
        mixed[T.CAVA] = blood + u(0.1, 0.6) * (hu[T.CAVA] - blood)
    if r.random() < 0.35:  # small vessels and calyces that crowd the sinus are not painted
        hu[T.SINUS] = mixed[T.SINUS] = u(float(hu[T.SINUS]), 15)
    for tissue, lesion in lesions.items():
        hu[tissue] = mixed[tissue] = lesion_hu(lesion, hu, r)
    return Look(phase, hu, mixed, _mottles(hu, r, max(0.0, 2.5 * e * (a - 0.6))))


def _vessels(hu: Floats, r: np.random.Generator, phase: Phase, blood: float) -> None:
    """Arteries first, the portal vein, then the cava below the kidneys' veins; minutes later all alike. Heart."""
    u, e, a = r.uniform, phase.contrast, phase.arterial
    aorta = blood + e * (u(70, 160) * (1 - a) + u(160, 340) * a)
    cava = blood + e * u(40, 140) * (1 - 0.8 * a)
    portal = blood + e * u(90, 170) * (1 - 0.9 * a)
    right = blood + e * u(60, 220)
    if phase.late:
        aorta = blood + e * u(45, 120)
        cava, portal, right = aorta + u(-12, 8), aorta + u(-8, 12), aorta + u(-8, 8)
    hu[T.AORTA], hu[T.ARTERY] = aorta, aorta - e * u(0, 25)
    hu[T.CAVA], hu[T.VEIN], hu[T.PORTAL] = cava, cava + e * (1 - a) * u(-20, 30), portal
    hu[T.LEFT_HEART], hu[T.RIGHT_HEART] = aorta + u(-15, 5), right
    hu[T.MYOCARDIUM] = u(35, 55) + e * u(30, 90)
    if r.random() < 0.3:  # hardly darker than the blood
        hu[T.MYOCARDIUM] = max(hu[T.MYOCARDIUM], min(hu[T.LEFT_HEART], hu[T.RIGHT_HEART]) - u(5, 30))


def _livers(hu: Floats, r: np.random.Generator, phase: Phase, *, fatty: bool) -> None:
    """Liver and spleen, either of them the brighter one: fat, iron or amiodarone, early and late blood."""
    u, e, a = r.uniform, phase.contrast, phase.arterial
    fat, dense = r.random() < 0.15, r.random() < 0.06
    lost, gained = u(14, 62), u(12, 38)
    liver = u(42, 70) + e * u(15, 85) * (1 - 0.75 * a)
    if fatty or fat:
        liver -= lost
    elif dense:
        liver += gained
    hu[T.LIVER] = liver
    hu[T.SPLEEN] = u(36, 60) + e * (u(10, 70) if phase.late else u(30, 105))


def _kidneys(hu: Floats, r: np.random.Generator, phase: Phase) -> None:
    """Cortex before medulla; minutes later both alike, and urine that medium may have reached."""
    u, e, a = r.uniform, phase.contrast, phase.arterial
    cortex, lag = u(25, 43) + e * u(90, 200), e * (u(60, 140) * a + u(0, 45) * (1 - a))
    watery, excreted, apart = u(-2, 18), u(60, 700), u(-8, 8, 2)
    full = r.random() < (0.65 if phase.late else 0.1)
    medulla = cortex + e * u(-12, 18) if phase.late else max(cortex - lag, 22.0)
    hu[T.RIGHT_CORTEX], hu[T.RIGHT_MEDULLA] = cortex, medulla
    hu[T.LEFT_CORTEX], hu[T.LEFT_MEDULLA] = cortex + apart[0], medulla + apart[1]
    hu[T.URINE] = watery + (e * excreted if full else 0)


def _solid(hu: Floats, r: np.random.Generator, e: float) -> None:
    """Wall, bone, lung, fluid, metal."""
    u = r.uniform
    hu[T.AIR] = -1000
    fat = u(-120, -85)
    hu[T.SUBCUTANEOUS], hu[T.FAT], hu[T.SINUS] = fat, fat + u(-4, 14), fat + u(5, 45)
    hu[T.MEDIASTINAL] = fat + u(-4, 14)
    hu[T.SKIN] = u(-20, 40)
    hu[T.MUSCLE] = u(38, 66) + e * u(0, 16)
    hu[T.DISC], hu[T.CANAL] = u(55, 105), u(15, 45)
    hu[T.CARTILAGE], hu[T.CORTICAL], hu[T.SPONGY] = u(70, 140), u(320, 850), u(70, 280)
    hu[T.LUNG], hu[T.TABLE] = u(-910, -720), u(-250, -50)
    hu[T.METAL], hu[T.STENT] = 3071, u(150, 1500)
    hu[T.PLAQUE] = hu[T.AORTA_PLAQUE] = u(250, 1100)
    hu[T.ASCITES], hu[T.EFFUSION] = u(-3, 22), u(-2, 26)
    hu[T.ATELECTASIS] = u(20, 50) + e * u(15, 70)


def _mottles(hu: Floats, r: np.random.Generator, spotted: float) -> tuple[Mottle, ...]:
    """Gas in stool, lumps and gas in a meal, folds in the small bowel, fat in wasted muscle.

    ``spotted`` (0 to 1): how unevenly the early blood fills the spleen.
    """
    u = r.uniform
    fat = float(hu[T.FAT])
    foods = (fat, u(-500, -150), u(60, 200))
    mixed = r.random(2) < (0.25, 0.3)  # gas in what fills stomach and duodenum
    out = [
        Mottle(T.STOOL, u(-0.2, 0.9), u(-850, -150)),
        Mottle(T.STOOL, u(0.3, 1.4), float(hu[T.STOOL]) + u(-60, 140)),
        Mottle(T.STOMACH_FOOD, u(-0.3, 0.7), float(foods[int(r.integers(3))])),
        Mottle(T.STOMACH_FOOD, u(0.4, 1.6), u(-800, -200)),
        Mottle(T.FOLDS, u(-0.3, 0.3), float(hu[T.BOWEL_WALL]) + u(-5, 15)),
        Mottle(T.MUSCLE, u(0.55, 2.2), 0.5 * (fat + float(hu[T.MUSCLE]))),
        Mottle(T.PANCREAS, u(0.5, 2.6), 0.6 * fat + 0.4 * float(hu[T.PANCREAS])),
        Mottle(T.SPLEEN, u(-0.3, 0.4), float(hu[T.SPLEEN]) - spotted * u(25, 80)),
    ]
    gas = Mottle(T.STOMACH_CONTENT, u(0.2, 1.0), u(-700, -120)), Mottle(T.DUODENUM_CONTENT, u(0.2, 1.0), u(-800, -120))
    return (*out, *(mottle for mottle, there in zip(gas, mixed, strict=True) if there))


def _lumina(hu: Floats, mixed: Floats, r: np.random.Generator, e: float) -> None:
    """Gut: walls, and contents with or without positive contrast medium, which in half of the cases is not even."""
    u = r.uniform
    wall = u(26, 50) + e * u(5, 60)
    hu[T.STOMACH_WALL], hu[T.DUODENUM_WALL], hu[T.BOWEL_WALL] = wall, wall + u(-8, 12), wall + u(-8, 16) + e * u(0, 35)
    hu[T.ESOPHAGUS_WALL] = u(28, 48) + e * u(5, 45)
    positive, even = r.random() < 0.22, r.random() < 0.5
    grey = float(hu[int(r.choice((T.SPLEEN, T.PANCREAS, T.STOMACH_WALL)))]) + u(-15, 10)  # as a meal's chyme may be
    fluid, thick, like = u(-5, 30), u(10, 65), r.random(2) < (0.15, 0.2)
    plain = grey if like[0] else fluid if r.random() < 0.55 else thick
    hu[T.STOMACH_CONTENT] = u(100, 400) if positive and r.random() < 0.8 else plain
    clear = u(0, 40)
    duodenal = float(hu[T.DUODENUM_WALL]) + u(-15, 5) if like[1] else clear
    hu[T.DUODENUM_CONTENT] = u(80, 320) if positive and r.random() < 0.5 else duodenal
    liver, spleen = float(hu[T.LIVER]), float(hu[T.SPLEEN])  # whose grey bowel beside them may have
    chosen, alike = r.random(), float(r.choice((liver, spleen))) + u(-15, 10)
    hu[T.BOWEL_FLUID] = u(0, 40) if chosen < 0.78 else alike
    hu[T.FOLDS] = u(0, 40)
    hu[T.STOMACH_FOOD] = u(100, 400) if positive else u(-60, 120)
    stool = ((20, 70), (spleen - 25, spleen + 5), (-70, 30), (liver - 20, liver + 10), (70, 300))
    hu[T.STOOL] = u(*stool[int(r.choice(5, p=(0.35, 0.1, 0.25, 0.18, 0.12)))])
    hu[T.BOWEL_CONTRAST] = u(80, 420) if positive else u(5, 60)
    hu[T.ESOPHAGUS_FLUID] = u(0, 40)
    for gas in (T.BOWEL_GAS, T.ESOPHAGUS_GAS, T.STOMACH_GAS, T.DUODENUM_GAS):
        hu[gas] = u(-990, -900)
    filled = [tissue for tissue in T if hu[tissue] != mixed[tissue]]
    mixed[filled] = hu[filled]
    if not even:
        mixed[T.STOMACH_CONTENT], mixed[T.DUODENUM_CONTENT], mixed[T.BOWEL_CONTRAST] = plain, duodenal, u(5, 40)


def lesion_hu(lesion: LesionTissue, hu: Floats, r: np.random.Generator) -> float:
    """HU of a lesion from its kind and its organ's tissue."""
    u = r.uniform
    around = {
        "liver": T.LIVER,
        "spleen": T.SPLEEN,
        "pancreas": T.PANCREAS,
        "right_kidney": T.RIGHT_CORTEX,
        "left_kidney": T.LEFT_CORTEX,
    }
    if lesion.kind == "tumour":
        return float(hu[around[lesion.organ]] + (u(-60, -12) if r.random() < 0.75 else u(12, 60)))
    if lesion.kind == "stone":
        return float(u(60, 250) if r.random() < 0.6 else u(250, 900))
    low, high = {"cyst": (-3, 24), "necrosis": (5, 35), "thrombus": (28, 52), "stent": (250, 1400)}[lesion.kind]
    return float(u(low, high))


def _grain() -> Floats:
    """How much of the texture each tissue shows."""
    grain = np.ones(256, np.float32)
    grain[list(GAS)] = 0
    grain[[T.LUNG, T.TABLE]] = 2.5, 1.0
    grain[[T.STOOL, T.STOMACH_FOOD, T.STOMACH_CONTENT]] = 4.0, 4.0, 2.2
    grain[[T.BOWEL_FLUID, T.FOLDS, T.BOWEL_CONTRAST, T.BOWEL_WALL, T.DUODENUM_CONTENT]] = 2.5
    grain[[T.SPONGY, T.CORTICAL]] = 2.5
    grain[[T.MUSCLE, T.PANCREAS]] = 1.4
    grain[[T.FAT, T.MEDIASTINAL, T.SINUS]] = 1.4
    grain[[T.URINE, T.GALLBLADDER, T.CAVA, T.AORTA, T.LIVER, T.ASCITES, T.EFFUSION]] = 0.4
    return grain


# --- the body's own unevenness: the same at any grid


# Change per mm of noise with control points every 12 and 6 mm, root mean square of the steepest direction.
COARSE_SLOPE, FINE_SLOPE = 0.053, 0.107


@dataclass(frozen=True)
class Texture:
    """``coarse`` and ``fine``: HU at 12 and 5 mm; ``stranding``: HU that inflamed fat is denser by, in patches.

    ``threads``: HU that small vessels and septa are denser than the fat around them; ``thick``: their radius in mm; ``share``: of
    the fat in which they run, from 0 to 1.
    """

    coarse: float
    fine: float
    stranding: float
    threads: float
    thick: float
    share: float


def draw_texture(r: np.random.Generator) -> Texture:
    """Two in five bodies have stranded fat somewhere, all have vessels in some of it."""
    coarse, fine = float(r.uniform(1, 9)), float(r.uniform(1, 9))
    stranding = float(r.uniform(10, 75)) if r.random() < 0.4 else 0.0
    return Texture(coarse, fine, stranding, *r.uniform((30, 0.8, 0.2), (150, 2.4, 1.0)).tolist())


def add_texture(image: Floats, tissue: NDArray[np.uint8], grid: Grid, look: Look, r: np.random.Generator) -> Texture:
    """Add what a body's tissues vary by within themselves, in place. ``tissue`` and ``image`` are on ``grid``."""
    texture = draw_texture(r)
    layers = [_Noise(grid, step, r) for step in (12.0, 5.0)]
    seeds = r.integers(1 << 62, size=3)
    layers += [_Noise(grid, step, np.random.default_rng(s)) for step, s in zip((45.0, 6.0, 30.0), seeds, strict=True)]
    grain, fat = _grain(), lookup((T.FAT,)).astype(np.float32)
    change = look.mixed - look.hu
    for box in layers[0].sampler.slabs():
        here, out = tissue[box], image[box]
        coarse, fine, patches, threads = (layer.at(box) for layer in layers[:4])
        denser = texture.threads * _threads(coarse, threads, patches, texture)
        if texture.stranding:
            denser += texture.stranding * np.clip(patches * 3 - 0.6, 0, 1) * np.clip(threads * 1.5 + 0.3, 0, 1.5)
        denser *= recode(fat, here)
        out += denser
        _mottle(out, here, fine, look)
        coarse *= np.float32(1.7 * texture.coarse)
        fine *= np.float32(1.7 * texture.fine)
        coarse += fine
        coarse *= recode(grain, here)
        out += coarse
        if np.any(change):
            out += np.clip(layers[4].at(box) * 2 + 0.5, 0, 1) * recode(change, here)
    return texture


def _threads(coarse: Floats, fine: Floats, patches: Floats, texture: Texture) -> Floats:
    """Curves in space, 1 on them and 0 away from them: where two noises, of 12 and 6 mm, are both near 0.

    ``patches``: noise that decides where there are any.
    """
    away = np.hypot(coarse * np.float32(1 / COARSE_SLOPE), fine * np.float32(1 / FINE_SLOPE))
    there = np.clip(3 * patches + np.float32(3.6 * texture.share - 1.3), 0, 1)
    return np.asarray(np.clip(np.float32(texture.thick + 0.5) - away, 0, 1) * there, np.float32)


def _mottle(image: Floats, tissue: NDArray[np.uint8], noise: Floats, look: Look) -> None:
    """Mix specks into tissues that have them, in place."""
    at = np.flatnonzero(lookup([mottle.tissue for mottle in look.mottles])[tissue])
    kinds, values, flat = tissue.ravel()[at], noise.ravel()[at], image.reshape(-1)
    for mottle in look.mottles:
        here = (kinds == mottle.tissue) & (values > mottle.level)
        share = np.minimum((values[here] - np.float32(mottle.level)) / np.float32(0.3), 1)
        flat[at[here]] += share * np.float32(mottle.hu - look.hu[mottle.tissue])


class _Noise:
    """Smooth noise with control points every ``step`` mm in body space; a SD of about 0.6."""

    def __init__(self, grid: Grid, step: float, r: np.random.Generator) -> None:
        lattice = Lattice(step)
        self.sampler = Sampler(lattice, grid)
        self.values = r.standard_normal(lattice.shape, dtype=np.float32)

    def at(self, box: Box) -> Floats:
        """The noise in the voxels of ``box``."""
        return self.sampler.at(self.values, box)


# --- the scanner


@dataclass(frozen=True)
class Scanner:
    """One scan's settings. ``thickness`` mm of a slice; ``sharpness`` of the kernel from 0 to 1.

    ``blur`` SD in mm in plane; ``noise`` SD in HU; ``correlation`` of the noise, SD in mm of its grains; ``gain`` and
    ``offset`` of calibration; ``cupping`` HU from the middle to the rim, beam hardening and its correction.
    """

    thickness: float
    sharpness: float
    blur: float
    noise: float
    correlation: float
    gain: float
    offset: float
    cupping: float

    @classmethod
    def draw(cls, r: np.random.Generator, thickness: float, low_dose: bool) -> "Scanner":
        """Settings as they come: a sharp kernel blurs less and makes more noise, and so does a thin slice."""
        sharpness, dose = float(r.random()), float(np.exp(r.uniform(np.log(3), np.log(21))))
        much, spread = float(r.uniform(2, 3)), r.uniform(0.7, 1.35, 2)
        noise = dose * (0.7 + 0.8 * sharpness) * float(np.clip((3 / thickness) ** 0.5, 0.65, 1.6))
        return cls(
            thickness=thickness,
            sharpness=sharpness,
            blur=float((1.05 - 0.72 * sharpness) * spread[0]),
            noise=float(min(noise * (much if low_dose or r.random() < 0.06 else 1), 60)),
            correlation=float((1.3 - 1.15 * sharpness) * spread[1]),
            gain=float(r.uniform(0.97, 1.03)),
            offset=float(r.uniform(-6, 6)),
            cupping=float(np.clip(r.normal(0, 5), -12, 12)),
        )


def render(
    seed: int,
    canvas: Canvas,
    factor: int,
    look: Look,
    scanner: Scanner,
    artefacts: Artefacts,
    arms: Sequence[Doubles],
) -> tuple[NDArray[np.int16], dict[str, object]]:
    """Scan of a painted canvas with ``factor`` (odd) sheets to a slice: int16 HU (z, y, x), and what was drawn for it.

    Texture lives in body space and is the same on every grid; blur, gain, noise and artefacts belong to the scanner.
    ``arms`` beside the body: as for ``streak_from_arms``.
    """
    grid = slices(canvas.grid, factor)
    image = _through_plane(look.hu, canvas.tissue, factor, 0.36 * scanner.thickness / canvas.grid.spacing[0])
    tissue = canvas.tissue[factor // 2 :: factor]
    texture = add_texture(image, tissue, grid, look, stream(seed, "texture"))
    blur = [float(np.hypot(scanner.blur / s, 0.28)) for s in grid.spacing[1:]]
    gaussian_filter(image, (0, *blur), truncate=2.5, output=image)  # line by line: it may be its own result
    r = stream(seed, "artefact")
    r.random(8)  # draw_artefact's
    streaked = streak(image, tissue == T.METAL, grid, r)
    arm_streaks = streak_from_arms(image, grid, arms, stream(seed, "arms")) if arms else {}
    if artefacts.motion:
        image = move(image, grid, artefacts.motion, r)
    _calibrate(image, speckle(grid, scanner, artefacts.low_dose, stream(seed, "noise")), grid, scanner)
    if artefacts.truncation:
        truncate(image, grid, artefacts.truncation, r)
    drawn: dict[str, object] = {
        "scanner": asdict(scanner),
        "texture": asdict(texture),
        "artefacts": artefacts.record(streaked),
        "arm_streaks": {"arms": len(arms), **arm_streaks},
    }
    return _digitise(image), drawn


def slices(sheets: Grid, factor: int) -> Grid:
    """The grid of slices that ``factor`` (odd) sheets each are summed to."""
    (z, y, x), (sz, sy, sx), (oz, oy, ox) = sheets.shape, sheets.spacing, sheets.origin
    return Grid((z // factor, y, x), (sz * factor, sy, sx), (oz + factor // 2 * sz, oy, ox))


def sheets(grid: Grid, factor: int) -> Grid:
    """``factor`` (odd) sheets for every slice of ``grid``, the middle one in the slice's plane."""
    (z, y, x), (sz, sy, sx), (oz, oy, ox) = grid.shape, grid.spacing, grid.origin
    return Grid((z * factor, y, x), (sz / factor, sy, sx), (oz - factor // 2 * sz / factor, oy, ox))


def _through_plane(hu: Floats, tissue: NDArray[np.uint8], factor: int, sigma: float) -> Floats:
    """HU of every slice of ``factor`` sheets of ``tissue``; ``sigma`` of its profile in sheets.

    Partial volume: a slice's profile is nearly Gaussian, 0.36 of its thickness in SD (a box's would be 0.29).
    """
    middles = range(factor // 2, len(tissue), factor)
    out = np.empty((len(middles), *tissue.shape[1:]), np.float32)
    weights = _gaussian(sigma, 2.2) if sigma > 0.2 else np.ones(1)
    reach, exact, last = len(weights) - 1, hu.astype(np.float64), len(tissue) - 1
    held: dict[int, NDArray[np.float64]] = {}  # those that the next slice needs too
    for middle, plane in zip(middles, out, strict=True):
        near = {k: min(max(k, 0), last) for k in range(middle - reach, middle + reach + 1)}
        held = {k: held[k] if k in held else np.take(exact, tissue[k], mode="clip") for k in set(near.values())}
        total = held[middle] * weights[0]
        for away in range(reach, 0, -1):  # as scipy sums, without its way through memory
            pair = held[near[middle - away]] + held[near[middle + away]]
            pair *= weights[away]
            total += pair
        plane[:] = total
    return out


def _gaussian(sigma: float, truncate: float) -> NDArray[np.float64]:
    """Weights of scipy's Gaussian filter from the middle outwards."""
    reach = int(truncate * sigma + 0.5)
    pulse = np.zeros(4 * reach + 1)
    pulse[2 * reach] = 1
    return np.asarray(gaussian_filter1d(pulse, sigma, truncate=truncate)[2 * reach : 3 * reach + 1])


def _across(grid: Grid) -> Floats:
    """Squared distance (y, x) from the middle of the field, 1 at 160 mm."""
    y, x = (grid.coordinates(k) for k in (1, 2))
    squared = ((y[:, None] - y.mean()) / 160) ** 2 + ((x[None] - x.mean()) / 160) ** 2
    return np.asarray(squared, np.float32)


def _calibrate(image: Floats, noise: Floats, grid: Grid, scanner: Scanner) -> None:
    """Gain, offset, cupping and noise, in place, slice by slice in the cache; air stays air."""
    cup = scanner.cupping * (np.minimum(_across(grid), 1.6) - 0.5) / 1000
    gain = (scanner.gain + cup).astype(np.float32)
    for plane, speckles in zip(image, noise, strict=True):
        plane += np.float32(1000)
        plane *= gain
        plane += np.float32(scanner.offset - 1000)
        plane += speckles


def _digitise(image: Floats) -> NDArray[np.int16]:
    """Whole HU from -1024 to 3071; ``image`` is rounded in place."""
    out = np.empty(image.shape, np.int16)
    for plane, whole in zip(image, out, strict=True):
        np.rint(plane, out=plane)
        whole[:] = np.clip(plane, -1024, 3071, out=plane)
    return out


def speckle(grid: Grid, scanner: Scanner, low_dose: bool, r: np.random.Generator) -> Floats:
    """Noise: more of it in the middle of the body, grains by the kernel, streaks across in a scan of low dose."""
    out = r.standard_normal(grid.shape, dtype=np.float32)
    sigma = [scanner.correlation / s for s in grid.spacing[1:]]
    between = 0.25 * max(scanner.thickness / grid.spacing[0] - 1, 0)  # overlapping slices share their noise
    if max(*sigma, between) > 0.25:
        gaussian_filter(out, (between, *sigma), truncate=2.5, output=out)
    if low_dose:
        across = r.standard_normal(grid.shape, dtype=np.float32)
        gaussian_filter(across, (0, 0.5, 10 / grid.spacing[2]), truncate=2, output=across)
        across *= np.float32(0.33 * float(out.std()) / max(float(across.std()), 1e-6))
        out += across
    level = np.float32(scanner.noise / max(float(out[:: max(1, grid.shape[0] // 8)].std()), 1e-6))
    middle = 0.75 + 0.5 * np.exp(-2 * _across(grid))
    for plane in out:
        plane *= level
        plane *= middle
    return np.asarray(out, np.float32)


def phase_record(phase: Phase) -> dict[str, float | str]:
    """JSON-able form."""
    return {"name": phase.name, **asdict(phase)}
