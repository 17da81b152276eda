"""The range of HU: nnU-Net's figures, on the scans' own grids, and what starts from a training keeps that one's."""

import json
from pathlib import Path

import numpy as np
import pytest

from inference.volume import write_volume
from train.dataset import Case
from train.intensities import (
    IntensityError,
    intensities,
    intensities_of_training,
    organ_shares,
    read_intensities,
    shares_of_case,
    write_intensities,
)

LPS = np.diag([-1.0, -1.0, 1.0, 1.0])


def scan(seed: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    voxels = random.normal(40 + 30 * seed, 60, (size, 40, 40)).astype(np.int16)
    return voxels, random.integers(0, 3, voxels.shape).astype(np.uint8)


def test_the_figures_are_those_that_nnunet_takes_of_the_organs_voxels() -> None:
    voxels, labels = scan(0, 30)
    found = intensities([organ_shares(voxels, labels)])
    organs = voxels[labels > 0].astype(float)
    assert found["mean"] == pytest.approx(organs.mean())
    assert found["std"] == pytest.approx(organs.std())
    assert (found["min"], found["max"]) == (organs.min(), organs.max())
    for name, percent in (("percentile_00_5", 0.5), ("median", 50), ("percentile_99_5", 99.5)):
        assert found[name] == pytest.approx(np.percentile(organs, percent), abs=1)


def test_every_case_counts_alike_however_many_voxels_it_has_and_one_without_organs_not_at_all() -> None:
    small, large = scan(0, 10), scan(2, 90)
    nothing = (large[0], np.zeros_like(large[1]))
    found = intensities(organ_shares(*case) for case in (small, large, nothing))
    means = [voxels[labels > 0].mean() for voxels, labels in (small, large)]
    assert found["mean"] == pytest.approx(np.mean(means))


def test_no_organ_anywhere_is_an_error() -> None:
    voxels, labels = scan(0, 10)
    with pytest.raises(IntensityError, match="no labelled case shows an organ"):
        intensities([organ_shares(voxels, np.zeros_like(labels))])


def test_scans_of_fractions_and_beyond_int16_are_counted() -> None:
    voxels = np.array([[[-1e6, 10.4, 10.6, 1e6]]], np.float32)
    found = intensities([organ_shares(voxels, np.ones(voxels.shape, np.uint8))])
    assert (found["min"], found["max"]) == (-32768, 32767)
    assert found["median"] == 10


def test_a_case_whose_label_map_lies_on_another_grid_counts_nothing(tmp_path: Path) -> None:
    voxels, labels = scan(0, 10)
    write_volume(tmp_path / "a_0000.nii.gz", voxels, LPS)
    for name, content in (("fits", labels), ("not", labels[1:])):
        write_volume(tmp_path / f"{name}.nii.gz", content, LPS)
    image = tmp_path / "a_0000.nii.gz"
    assert shares_of_case(Case("a", image, tmp_path / "fits.nii.gz")).sum() == pytest.approx(1)
    assert not shares_of_case(Case("a", image, tmp_path / "not.nii.gz")).any()


def test_a_training_is_gone_on_with_in_its_own_range(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    wanted = {"percentile_00_5": -12.0, "percentile_99_5": 34.0, "mean": 5.0, "std": 6.0}
    plans = {"foreground_intensity_properties_per_channel": {"0": wanted}}
    torch.save({"init_args": {"plans": plans}, "network_weights": {}}, tmp_path / "checkpoint.pth")
    assert intensities_of_training(tmp_path / "checkpoint.pth") == wanted
    (tmp_path / "broken.pth").write_bytes(b"no checkpoint")
    with pytest.raises(IntensityError, match=r"broken\.pth: cannot be read"):
        intensities_of_training(tmp_path / "broken.pth")
    with pytest.raises(IntensityError, match="expected a training's checkpoint or a bundle's folder"):
        intensities_of_training(tmp_path / "missing.pth")


def test_what_was_written_is_read_and_a_missing_file_is_named(tmp_path: Path) -> None:
    write_intensities(tmp_path / "intensities.json", {"mean": 1.5})
    assert read_intensities(tmp_path / "intensities.json") == json.loads('{"mean": 1.5}')
    with pytest.raises(IntensityError, match=r"no\.json: cannot be read"):
        read_intensities(tmp_path / "no.json")
