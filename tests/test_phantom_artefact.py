import numpy as np
import pytest

from train.phantom import Artefacts, Grid, Phantom, appearance, generate
from train.phantom.appearance import Scanner, speckle
from train.phantom.artefact import KINDS, circle, draw_artefact, streak, streak_from_arms, truncate
from train.phantom.body import stream

SEED = 41
SMALL = Grid.covering((20, -130, -180), (60, 140, 180), (10, 6, 6))
GRID = Grid.covering((-60, -130, -180), (100, 140, 180), (4, 2.5, 2.5))


@pytest.fixture(scope="module")
def clean() -> Phantom:
    return generate(SEED, GRID)


def test_motion_doubles_edges_and_leaves_the_truth(clean: Phantom) -> None:
    moved = generate(SEED, GRID, artefacts=Artefacts(motion=10.0))
    assert moved.record["artefacts"]["motion"] == 10.0
    assert np.array_equal(moved.labels, clean.labels)
    # A fainter body shows in the air around the body; neither its inside nor far air changes as much.
    air = (clean.hu < -900) & (clean.auxiliary == 0)
    ghost = air & (moved.hu > clean.hu.astype(int) + 200)
    assert 100 < ghost.sum() < 0.2 * air.sum()
    assert moved.hu[ghost].max() < -200
    assert np.median(np.abs(moved.hu.astype(int) - clean.hu)[air]) < 3


def test_truncation_leaves_nothing_outside_its_circle_and_a_bright_rim_inside(clean: Phantom) -> None:
    cut = generate(SEED, GRID, artefacts=Artefacts(truncation=120.0))
    inside = circle(GRID, 120.0)
    assert (cut.hu[:, ~inside] == -1024).all()
    assert not cut.labels[:, ~inside].any()
    assert not cut.auxiliary[:, ~inside].any()
    assert np.array_equal(cut.labels[:, inside], clean.labels[:, inside])
    rim = inside & ~circle(GRID, 112.0)
    muscle = (clean.hu > -200) & (clean.hu < 150)
    assert (cut.hu.astype(int) - clean.hu)[:, rim][muscle[:, rim]].mean() > 15
    core = circle(GRID, 30.0)
    assert np.abs(cut.hu.astype(int) - clean.hu)[:, core].mean() < 4
    assert cut.record["organs"]["liver"]["ml"] < clean.record["organs"]["liver"]["ml"]


def test_air_beside_the_body_does_not_brighten_the_rim() -> None:
    image = np.full((2, 100, 100), -1000, np.float32)
    grid = Grid((2, 100, 100), (5, 3, 3), (0, 0, 0))
    truncate(image, grid, 100.0, stream(1, "artefact"))
    assert image.max() == -1000


def test_low_dose_is_noise_with_lines_across(clean: Phantom) -> None:
    noisy = generate(SEED, GRID, artefacts=Artefacts(low_dose=True))
    liver = (clean.labels == 1) & (noisy.labels == 1)
    assert np.array_equal(noisy.labels, clean.labels)
    assert noisy.hu[liver].std() > 1.6 * clean.hu[liver].std()
    scanner = Scanner(3.0, 0.5, 0.6, 20.0, 0.3, 1.0, 0.0, 0.0)
    pattern = speckle(Grid((20, 96, 96), (3, 1.5, 1.5), (0, 0, 0)), scanner, True, stream(1, "noise"))
    across = np.mean(pattern[:, :, 4:] * pattern[:, :, :-4])
    down = np.mean(pattern[:, 4:] * pattern[:, :-4])
    assert across > 3 * abs(down)


def test_metal_streaks_its_own_slices_and_no_others() -> None:
    image = np.zeros((5, 120, 120), np.float32)
    metal = np.zeros(image.shape, bool)
    metal[2, 58:63, 30:35] = metal[2, 58:63, 85:90] = True
    metal[4, 60, 60] = True  # a clip's tip, 4 mm2
    assert streak(image, metal, Grid(image.shape, (5, 2, 2), (0, 0, 0)), stream(3, "artefact")) == 1
    assert not image[[0, 1, 3, 4]].any()
    assert image[2].std() > 5
    between, above = image[2, 60, 40:80].mean(), image[2, 10:30, 40:80].mean()
    assert between < above - 15


def test_every_kind_of_heavy_artefact_is_drawn() -> None:
    drawn = [draw_artefact(seed, 160.0) for seed in range(60)]
    assert {kind for _, kind in drawn} == set(KINDS)
    for artefacts, kind in drawn:
        on = {"motion": artefacts.motion > 0, "truncation": artefacts.truncation > 0, "low_dose": artefacts.low_dose}
        assert {name for name, there in on.items() if there} == {kind} - {"metal"}


def test_artefacts_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="not between 0 and 30"):
        Artefacts(motion=-1)
    with pytest.raises(ValueError, match="not between 60 and 400"):
        Artefacts(truncation=10)


def test_a_thin_slice_and_a_sharp_kernel_make_more_noise_and_less_blur() -> None:
    def mean(attribute: str, thickness: float, sharp: bool) -> float:
        scanners = [Scanner.draw(stream(seed, "scanner"), thickness, False) for seed in range(400)]
        return float(np.mean([getattr(s, attribute) for s in scanners if (s.sharpness > 0.5) == sharp]))

    assert mean("noise", 1.0, True) > 1.4 * mean("noise", 5.0, True)
    assert mean("noise", 3.0, True) > 1.2 * mean("noise", 3.0, False)
    assert mean("blur", 3.0, True) < 0.8 * mean("blur", 3.0, False)
    assert mean("correlation", 3.0, True) < 0.7 * mean("correlation", 3.0, False)


def test_a_thick_slice_shows_what_lies_above_and_below_it() -> None:
    thin, thick = (
        generate(SEED, Grid.covering((-20, -130, -180), (60, 140, 180), (2, 3, 3)), thickness=t) for t in (2, 8)
    )
    assert np.array_equal(thin.labels, thick.labels)
    assert thick.record["scanner"]["thickness"] == 8
    step = [np.abs(np.diff(p.hu.astype(int), axis=0))[p.auxiliary[1:] > 0].mean() for p in (thin, thick)]
    assert step[1] < 0.6 * step[0]


def test_sheets_of_a_slice_keep_the_truth_of_its_plane() -> None:
    fine = Grid.covering((-20, -130, -180), (60, 140, 180), (4, 1.8, 1.8))  # painted three sheets to a slice
    plane = generate(SEED, fine)
    middle = generate(SEED, Grid((1, *fine.shape[1:]), (1, 1.8, 1.8), (fine.origin[0] + 40, *fine.origin[1:])))
    assert np.mean(plane.labels[10] != middle.labels[0]) < 1e-3


def arm(x: float, y: float) -> np.ndarray:
    return np.array([(x, y, -300.0), (x, y, 300.0)])


def test_two_arms_streak_what_lies_between_them_wherever_they_are() -> None:
    image = np.zeros(GRID.shape, np.float32)
    outside = [arm(-260, 10), arm(240, 30)]  # of the view
    drawn = streak_from_arms(image, GRID, outside, stream(SEED, "arms"))
    assert drawn["dark"] >= 6
    y, x = GRID.coordinates(1)[:, None], GRID.coordinates(2)[None, :]
    away = np.abs(y - 20 - x * 20 / 500)  # from the line that joins them
    assert not image[:, away > 140].any()
    assert image[:, away < 30].mean() < -1
    middle, lines = image[:, 45:60], image[:, 45:60].mean(0)
    assert lines.std() > 1.5  # bands stay from slice to slice
    noise = middle - lines
    assert noise.std() > 1.5  # and the noise of each is its own, along the line, though neighbours share rays
    share = np.corrcoef(noise[1:].ravel(), noise[:-1].ravel())[0, 1]
    assert 0.1 < share < 0.8
    assert np.abs(np.diff(image, axis=2)).mean() < 0.3 * np.abs(np.diff(image, axis=1)).mean()


def test_arms_streak_tissue_and_leave_air_alone() -> None:
    image = np.zeros(GRID.shape, np.float32)
    image[:, :, :30], image[:, :, 30:50] = -1000, -850
    before = image.copy()
    streak_from_arms(image, GRID, [arm(-260, 10), arm(240, 10)], stream(SEED, "arms"))
    change = np.abs(image - before)
    air, lung, tissue = (change[:, :, part].mean() for part in (slice(20), slice(35, 45), slice(60, None)))
    assert air == 0
    assert 0 < lung < 0.4 * tissue


def test_one_arm_streaks_less_the_farther_it_is() -> None:
    image = np.zeros(GRID.shape, np.float32)
    streak_from_arms(image, GRID, [arm(200, 10)], stream(SEED, "arms"))
    left, right = (np.abs(image[:, :, part]).mean() for part in (slice(-20, None), slice(20)))
    assert left > 2 * right > 0


def test_a_body_whose_arms_lie_beside_it_is_streaked_and_its_truth_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    seeds = {
        arms: next(s for s in range(60) if generate(s, SMALL).record["arm_streaks"]["arms"] == arms) for arms in (0, 2)
    }
    assert generate(seeds[0], SMALL).record["arm_streaks"] == {"arms": 0}
    streaked = generate(seeds[2], SMALL)
    assert streaked.record["arm_streaks"]["dark"] >= 6
    monkeypatch.setattr(appearance, "streak_from_arms", lambda *arguments: {})
    clean = generate(seeds[2], SMALL)
    assert np.array_equal(clean.labels, streaked.labels)
    assert streaked.labels.any()
    assert (streaked.hu != clean.hu)[streaked.labels > 0].mean() > 0.5
