"""Hounsfield units: tissues by CT priors and contrast phase, texture at two scales, blur, correlated noise."""

from dataclasses import asdict, dataclass

import numpy as np
from scipy.ndimage import gaussian_filter

from train.phantom.anatomy import Disease, LesionTissue
from train.phantom.body import stream
from train.phantom.canvas import Canvas, Floats, Lattice
from train.phantom.tissue import GAS, T


@dataclass(frozen=True)
class Phase:
    """``contrast`` 0 (native) to 1; ``arterial`` 1 (early) to 0 (portal venous)."""

    contrast: float
    arterial: float

    @property
    def name(self) -> str:
        """native, arterial or portal."""
        return "native" if self.contrast == 0 else "arterial" if self.arterial > 0.6 else "portal"


def draw_table(r: np.random.Generator, disease: Disease, lesions: dict[int, LesionTissue]) -> tuple[Phase, Floats]:
    """HU of every tissue id, from ranges measured on CT (native in 30 %, else arterial to portal)."""
    u = r.uniform
    native, strength, timing, fatty = r.random() < 0.3, u(0.25, 1), u(0, 1) ** 1.5, r.random() < 0.1
    e = 0.0 if native else strength
    a = float(timing)
    hu = np.full(256, 40, np.float32)
    hu[T.AIR] = -1000
    fat = u(-118, -88)
    hu[T.SUBCUTANEOUS], hu[T.FAT], hu[T.SINUS] = fat, fat + u(-4, 14), fat + u(5, 45)
    hu[T.SKIN] = u(-20, 40)
    muscle = u(42, 66) + e * u(0, 14)
    hu[T.MUSCLE], hu[T.DISC], hu[T.CANAL] = muscle, u(55, 105), u(15, 45)
    hu[T.CARTILAGE], hu[T.CORTICAL], hu[T.SPONGY] = u(70, 140), u(350, 800), u(110, 270)
    hu[T.LUNG], hu[T.TABLE] = u(-900, -740), u(-250, -50)
    blood = u(32, 52)
    aorta = blood + e * (u(70, 160) * (1 - a) + u(160, 330) * a)
    cava = blood + e * u(40, 140) * (1 - 0.7 * a)
    portal = blood + e * u(90, 170) * (1 - 0.75 * a)
    hu[T.AORTA], hu[T.ARTERY] = aorta, aorta - e * u(0, 25)
    hu[T.CAVA], hu[T.VEIN], hu[T.PORTAL] = cava, cava + e * u(-20, 30), portal
    hu[T.LEFT_HEART], hu[T.RIGHT_HEART] = aorta + u(-15, 5), blood + e * u(60, 220)
    hu[T.MYOCARDIUM] = u(35, 55) + e * u(30, 90)
    liver = u(46, 68) + e * u(15, 75) * (1 - 0.65 * a)
    if disease.fatty_liver or fatty:
        liver -= u(18, 55)
    hu[T.LIVER] = liver
    hu[T.LIVER_VESSEL] = blood + u(-4, 4) if native else (portal + liver) / 2 + u(0, 0.5) * (portal - liver)
    hu[T.SPLEEN] = u(40, 58) + e * u(35, 100)
    hu[T.PANCREAS] = u(25, 50) + e * u(25, 85)
    hu[T.DUCT] = hu[T.PANCREAS] - u(5, 45)
    cortex = u(27, 42) + e * u(90, 200)
    medulla = cortex - e * (u(60, 120) * a + u(0, 35) * (1 - a))
    hu[T.RIGHT_CORTEX], hu[T.RIGHT_MEDULLA] = cortex, medulla
    hu[T.LEFT_CORTEX], hu[T.LEFT_MEDULLA] = cortex + u(-8, 8), medulla + u(-8, 8)
    hu[T.URINE] = u(0, 18) if r.random() < 0.85 else u(0, 18) + e * u(100, 400)
    hu[T.PELVIC] = u(35, 55) + e * u(10, 50)
    adrenal = u(18, 42) + e * u(20, 75)
    hu[T.RIGHT_ADRENAL], hu[T.LEFT_ADRENAL] = adrenal, adrenal + u(-4, 4)
    hu[T.GALLBLADDER] = u(-4, 24)
    wall = u(28, 48) + e * u(10, 60)
    hu[T.STOMACH_WALL], hu[T.DUODENUM_WALL], hu[T.BOWEL_WALL] = wall, wall + u(-6, 12), wall + u(-6, 16)
    hu[T.ESOPHAGUS_WALL] = u(30, 48) + e * u(5, 45)
    positive = r.random() < 0.2
    hu[T.STOMACH_CONTENT] = (
        u(120, 380) if positive and r.random() < 0.8 else u(-5, 30) if r.random() < 0.6 else u(10, 65)
    )
    hu[T.DUODENUM_CONTENT] = u(80, 300) if positive and r.random() < 0.5 else u(5, 40)
    hu[T.BOWEL_FLUID], hu[T.STOOL] = u(5, 38), u(-60, 45)
    hu[T.BOWEL_CONTRAST] = u(100, 400) if positive else u(5, 60)
    hu[T.ESOPHAGUS_FLUID] = u(0, 40)
    for gas in (T.BOWEL_GAS, T.ESOPHAGUS_GAS, T.STOMACH_GAS, T.DUODENUM_GAS):
        hu[gas] = u(-990, -900)
    base = {
        "liver": T.LIVER,
        "spleen": T.SPLEEN,
        "pancreas": T.PANCREAS,
        "right_kidney": T.RIGHT_CORTEX,
        "left_kidney": T.LEFT_CORTEX,
    }
    for tissue, lesion in lesions.items():
        organ = float(hu[base[lesion.organ]])
        hu[tissue] = u(-3, 22) if lesion.kind == "cyst" else organ + (u(-60, -15) if r.random() < 0.8 else u(15, 60))
    return Phase(e, a), hu


def _grain() -> Floats:
    """How much of the texture each tissue shows."""
    grain = np.ones(256, np.float32)
    grain[list(GAS)] = 0
    grain[[T.LUNG, T.TABLE]] = 2.5, 1.0
    grain[[T.STOOL, T.STOMACH_CONTENT]] = 5.0, 2.2
    grain[[T.BOWEL_FLUID, T.BOWEL_CONTRAST, T.BOWEL_WALL, T.DUODENUM_CONTENT]] = 2.5
    grain[[T.SPONGY, T.CORTICAL]] = 2.5
    grain[[T.MUSCLE, T.PANCREAS]] = 1.4
    grain[[T.FAT, T.SINUS]] = 1.4
    grain[[T.URINE, T.GALLBLADDER, T.CAVA, T.AORTA, T.LIVER]] = 0.4
    return grain


def render(seed: int, canvas: Canvas, hu: Floats) -> tuple[np.ndarray, dict[str, float]]:
    """Scan of a painted canvas, int16 HU (z, y, x), and what was drawn for it.

    Texture lives in body space and is the same on every grid; blur, gain and noise belong to the scanner.
    """
    r, grid = stream(seed, "texture"), canvas.grid
    coarse, fine = r.uniform(1, 9), r.uniform(1, 9)
    image = np.take(hu, canvas.tissue)
    texture: Floats | None = None
    for step, amplitude in ((12.0, coarse), (5.0, fine)):
        lattice = Lattice(step)
        values = r.normal(0, 1.7 * amplitude, size=lattice.shape).astype(np.float32)
        layer = lattice.on(grid, values)
        texture = layer if texture is None else np.add(texture, layer, out=texture)
    assert texture is not None
    texture *= np.take(_grain(), canvas.tissue)
    image += texture
    del texture
    r = stream(seed, "noise")
    blur = float(r.uniform(0.35, 0.8))
    through_plane = float(r.uniform(0.3, 0.55))
    gain, offset = float(r.uniform(0.97, 1.03)), float(r.uniform(-6, 6))
    noise, kernel = float(np.exp(r.uniform(np.log(4), np.log(24)))), float(r.choice([0.0, 0.45, 0.7, 0.9]))
    image = gaussian_filter(image, (through_plane, blur, blur), truncate=2.5, output=np.float32)
    image *= np.float32(gain)
    image += np.float32(offset + 1000 * (gain - 1))  # air stays air
    speckle = r.standard_normal(grid.shape, dtype=np.float32)
    if kernel:
        speckle = gaussian_filter(speckle, (0, kernel, kernel), truncate=2.5, output=np.float32)
    speckle *= np.float32(noise / max(float(speckle[:: max(1, grid.shape[0] // 8)].std()), 1e-6))
    image += speckle
    np.rint(image, out=image)
    np.clip(image, -1024, 3071, out=image)
    drawn = {"blur": blur, "gain": gain, "offset": offset, "noise_hu": noise, "kernel": kernel}
    return image.astype(np.int16), drawn


def phase_record(phase: Phase) -> dict[str, float | str]:
    """JSON-able form."""
    return {"name": phase.name, **asdict(phase)}
