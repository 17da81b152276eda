import argparse
from pathlib import Path

import numpy as np
import pytest

from inference.volume import read_labels, write_volume
from train import baseline
from train.baseline import count, from_counts, patient_box
from train.metrics import dice

SPACING = (4.0, 2.0, 2.0)
AFFINE = np.diag([-2.0, -2.0, 4.0, 1.0])


def patient(seed: int = 0, shift: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Fat in air (z, y, x), moved by ``shift`` columns: kidneys of one HU at two places, aorta and cava side by side."""
    rng = np.random.default_rng(seed)
    scan, labels = np.full((16, 64, 96), -1000.0), np.zeros((16, 64, 96), np.uint8)
    scan[:, 8:56, 12 + shift : 84 + shift] = -100
    wobble = rng.integers(-1, 2, 3)
    for organ, hu, (z, y, x) in (
        (2, 150, (3, 34, 20)),
        (13, 150, (3, 34, 62)),
        (5, 300, (0, 28, 44)),
        (6, 80, (0, 28, 36)),
    ):
        z, y, x = np.array((z, y, x)) + wobble * (0, 1, 1)
        where = np.s_[z : 16 - z, y : y + 12, x + shift : x + shift + 8]
        scan[where], labels[where] = hu, organ
    return np.rint(scan + rng.normal(0, 10, scan.shape)).astype(np.int16), labels


def learned(cases: int = 6) -> baseline.Baseline:
    counts = [count(*patient(seed), SPACING) for seed in range(cases)]
    return from_counts(sum(places for places, _ in counts), sum(hu for _, hu in counts))


def test_organs_of_one_hu_are_told_apart_by_position_and_neighbours_by_hu() -> None:
    scan, truth = patient(seed=100)
    labels = learned().segment(scan, SPACING)
    for organ in (2, 13, 5, 6):
        assert dice(labels == organ, truth == organ) > 0.85
    assert set(np.unique(labels)) == {0, 2, 5, 6, 13}


def test_positions_are_those_in_the_patient_not_in_the_scan() -> None:
    scan, truth = patient(seed=101, shift=10)
    labels = learned().segment(scan, SPACING)
    for organ in (2, 13, 5, 6):
        assert dice(labels == organ, truth == organ) > 0.85


def test_an_organ_does_not_appear_where_its_hu_is_not() -> None:
    scan, _ = patient(seed=102)
    scan[scan > 0] = -100
    assert not learned().segment(scan, SPACING).any()


def test_the_atlas_follows_the_number_of_slices() -> None:
    scan, truth = patient(seed=103)
    thin = learned().segment(np.repeat(scan, 2, axis=0), (2.0, 2.0, 2.0))
    assert dice(thin == 2, np.repeat(truth, 2, axis=0) == 2) > 0.85


def test_prior_and_likelihood_are_probabilities_of_the_classes() -> None:
    found = learned(2)
    assert found.prior.sum(axis=0) == pytest.approx(1.0)
    assert found.likelihood[[0, 2, 5, 6, 13]].sum(axis=1) == pytest.approx(1.0, abs=1e-3)
    assert (found.prior > 0).all()
    assert (found.likelihood > 0).all()


def test_the_box_is_the_patient_without_table() -> None:
    scan, _ = patient()
    scan[:, 60:62, :] = 200
    _, y, x = patient_box(scan)
    assert (y, x) == (slice(8, 56), slice(12, 84))


def test_a_scan_of_air_holds_no_organ() -> None:
    assert not learned(2).segment(np.full((4, 20, 20), -1000, np.int16), SPACING).any()


def write_dataset(folder: Path) -> None:
    for images, labels, seeds in (("imagesTr", "labelsTr", range(4)), ("imagesTs", "labelsTs", range(10, 12))):
        for name in (images, labels):
            (folder / name).mkdir(parents=True)
        for seed in seeds:
            scan, truth = patient(seed)
            write_volume(folder / images / f"P{seed}_0000.nii.gz", scan, AFFINE)
            write_volume(folder / labels / f"P{seed}.nii.gz", truth, AFFINE)


def call(data: Path, out: Path) -> int:
    parser = argparse.ArgumentParser()
    baseline.add_arguments(parser)
    return baseline.run(parser.parse_args([f"--data={data}", f"--out={out}"]))


def test_the_command_writes_a_mask_per_test_case(tmp_path: Path) -> None:
    write_dataset(tmp_path)
    assert call(tmp_path, tmp_path / "out") == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["P10.nii.gz", "P11.nii.gz"]
    mask, truth = (read_labels(tmp_path / name / "P10.nii.gz") for name in ("out", "labelsTs"))
    assert np.array_equal(mask.affine, truth.affine)
    assert dice(mask.voxels == 5, truth.voxels == 5) > 0.85


def test_a_broken_scan_is_named_and_the_others_are_segmented(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_dataset(tmp_path)
    (tmp_path / "imagesTs" / "P10_0000.nii.gz").write_bytes(b"")
    assert call(tmp_path, tmp_path / "out") == 1
    assert "P10_0000.nii.gz: the file is empty" in caplog.text
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["P11.nii.gz"]


def test_a_folder_that_is_no_data_set_is_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert call(tmp_path, tmp_path / "out") == 2
    assert "imagesTr: not a folder" in caplog.text
    assert not (tmp_path / "out").exists()
