"""Grey values: contrast phases, organs that look like each other, contents of the gut. Over 600 draws."""

from functools import cache

import numpy as np
import pytest
from scipy.ndimage import distance_transform_edt

from train.phantom.appearance import Look, Scanner, Texture, _Noise, _threads, add_texture, draw_look
from train.phantom.body import stream
from train.phantom.canvas import Grid
from train.phantom.cohort import slice_increment
from train.phantom.disease import Disease
from train.phantom.tissue import T


@cache
def looks() -> list[Look]:
    return [draw_look(stream(seed, "appearance"), Disease(), {}) for seed in range(600)]


def hu(phase: str, tissue: int) -> np.ndarray:
    return np.array([look.hu[tissue] for look in looks() if look.phase.name == phase])


@pytest.mark.parametrize("phase", ["native", "arterial", "portal", "late"])
def test_every_phase_is_common(phase: str) -> None:
    assert len(hu(phase, T.LIVER)) > 0.1 * len(looks())


def test_blood_reaches_arteries_first_and_veins_later() -> None:
    lead = {phase: hu(phase, T.AORTA) - hu(phase, T.CAVA) for phase in ("native", "arterial", "portal", "late")}
    assert np.abs(lead["native"]).max() == 0
    assert np.abs(lead["late"]).max() <= 12
    assert np.median(lead["arterial"]) > 90
    assert 5 < np.median(lead["portal"]) < np.median(lead["arterial"])


def test_the_cortex_outshines_the_medulla_only_while_blood_is_early() -> None:
    rim = {phase: hu(phase, T.RIGHT_CORTEX) - hu(phase, T.RIGHT_MEDULLA) for phase in ("arterial", "late")}
    assert np.median(rim["arterial"]) > 40
    assert np.abs(rim["late"]).max() < 20
    assert min(hu("arterial", T.RIGHT_MEDULLA)) >= 21


def test_the_spleen_is_mottled_in_the_arterial_phase_alone() -> None:
    for look in looks():
        (spots,) = [mottle for mottle in look.mottles if mottle.tissue == T.SPLEEN]
        darker = look.hu[T.SPLEEN] - spots.hu
        if look.phase.name == "arterial":
            assert darker >= 0
        else:
            assert darker == pytest.approx(0, abs=1e-3)
    early = [look for look in looks() if look.phase.arterial > 0.85 and look.phase.contrast > 0.6]
    assert len(early) > 20


@pytest.mark.parametrize("phase", ["native", "arterial", "portal", "late"])
def test_either_of_liver_and_spleen_may_be_the_brighter_one(phase: str) -> None:
    assert 0.08 < np.mean(hu(phase, T.LIVER) > hu(phase, T.SPLEEN)) < 0.92


def test_what_fills_the_gut_may_be_as_grey_as_an_organ_beside_it() -> None:
    def alike(one: int, other: int) -> float:
        return float(np.mean([abs(look.hu[one] - look.hu[other]) < 15 for look in looks()]))

    assert alike(T.STOMACH_CONTENT, T.SPLEEN) > 0.08
    assert alike(T.BOWEL_FLUID, T.SPLEEN) > 0.08
    assert alike(T.STOOL, T.LIVER) > 0.15
    assert alike(T.DUODENUM_CONTENT, T.DUODENUM_WALL) > 0.2


def test_gas_mixes_with_what_fills_stomach_and_duodenum_in_some() -> None:
    for tissue in (T.STOMACH_CONTENT, T.DUODENUM_CONTENT):
        assert 0.15 < np.mean([any(mottle.tissue == tissue for mottle in look.mottles) for look in looks()]) < 0.45


def test_scanners_go_from_smooth_to_sharp_and_from_quiet_to_noisy() -> None:
    scanners = [Scanner.draw(stream(seed, "scanner"), slice_increment(seed), low_dose=False) for seed in range(600)]
    noise, blur, thickness = (np.array([getattr(s, name) for s in scanners]) for name in ("noise", "blur", "thickness"))
    assert np.percentile(noise, 3) < 4
    assert np.percentile(noise, 97) > 25
    assert np.percentile(blur, 3) < 0.4
    assert np.percentile(blur, 97) > 1.05
    assert (thickness.min(), thickness.max()) == (1, 8)
    sharp = np.array([s.sharpness for s in scanners]) > 0.5
    assert np.median(blur[sharp]) < np.median(blur[~sharp])
    assert np.median(noise[sharp]) > np.median(noise[~sharp])


def test_vessels_in_fat_are_thin_and_fill_more_of_it_with_thickness_and_share() -> None:
    grid = Grid((24, 80, 80), (1.5, 1.5, 1.5), (-18.0, -60.0, -60.0))
    noises = [_Noise(grid, step, np.random.default_rng(0)) for step in (12.0, 6.0, 45.0)]
    coarse, fine, patches = (np.concatenate([n.at(box) for box in n.sampler.slabs()]) for n in noises)

    def drawn(thick: float, share: float) -> np.ndarray:
        return _threads(coarse, fine, patches, Texture(0, 0, 0, 1, thick, share))

    everywhere = drawn(1.5, 1.0)
    assert everywhere.min() == 0
    assert everywhere.max() == 1
    assert drawn(1.5, 0.3).mean() < drawn(1.5, 0.6).mean() < everywhere.mean() < drawn(2.4, 1.0).mean() < 0.2
    depth = distance_transform_edt(everywhere > 0.5, sampling=1.5)
    assert np.quantile(depth[depth > 0], 0.95) < 4  # mm


def test_vessels_run_through_fat_alone() -> None:
    grid = Grid((12, 80, 80), (3.0, 1.5, 1.5), (-18.0, -60.0, -60.0))
    tissue = np.full(grid.shape, T.FAT, np.uint8)
    tissue[:, :40] = T.LIVER
    denser = []
    for seed in range(6):
        image = np.zeros(grid.shape, np.float32)
        texture = add_texture(image, tissue, grid, looks()[0], stream(seed, "texture"))
        assert np.abs(image[:, :40]).max() < 25
        denser.append(image[:, 40:].max() > 0.7 * texture.threads)
    assert np.mean(denser) > 0.5
