"""``python -m train alter``: the same truth in other voxels and at another size."""

import os
import signal
from pathlib import Path

import numpy as np
import pytest

from inference.volume import read_labels, read_volume, write_volume
from train.__main__ import main
from train.alter import Alteration

AFFINE = np.array([[-1.0, 0, 0, 20], [0, -1.0, 0, 30], [0, 0, 2.0, -10], [0, 0, 0, 1]])  # LPS, 1 x 1 x 2 mm


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """One scan of a ball of 100 HU in air of -50, and its mask."""
    z, y, x = np.ogrid[:24, :48, :48]
    ball = 4.0 * (z - 12) ** 2 + (y - 20) ** 2 + (x - 26) ** 2 < 14**2
    for name, array in (
        ("imagesTs/a_0000.nii.gz", np.where(ball, 100, -50).astype(np.int16)),
        ("labelsTs/a.nii.gz", ball.astype(np.uint8)),
    ):
        (tmp_path / name).parent.mkdir()
        write_volume(tmp_path / name, array, AFFINE)
    return tmp_path


def call(data: Path, *more: str) -> int:
    """The command on ``data``, into ``data / "out"``."""
    labels = ("--labels", str(data / "labelsTs"))
    return main(["alter", str(data / "imagesTs"), *labels, "--out", str(data / "out"), *more])


def middle(path: Path) -> tuple[np.ndarray, float]:
    """Where a mask's organ lies, RAS mm, and its volume in mL."""
    mask = read_labels(path)
    voxels = np.argwhere(mask.voxels == 1)[:, ::-1].mean(0)
    return (mask.affine @ [*voxels, 1])[:3], (mask.voxels == 1).sum() * mask.voxel_volume / 1000


def test_a_larger_body_has_the_same_voxels_and_more_millilitres(data: Path) -> None:
    assert call(data, "--size", "1.15") == 0
    old, new = (read_volume(data / f"{folder}imagesTs/a_0000.nii.gz") for folder in ("", "out/"))
    np.testing.assert_array_equal(old.voxels, new.voxels)
    np.testing.assert_allclose(new.spacing, np.multiply(old.spacing, 1.15), rtol=1e-5)
    (place, volume), (place_before, before) = (middle(data / f"{f}labelsTs/a.nii.gz") for f in ("out/", ""))
    assert volume == pytest.approx(before * 1.15**3, rel=1e-4)
    np.testing.assert_allclose(place, place_before * 1.15, atol=1e-3)


def test_other_voxels_show_the_same_organ_in_the_same_place(data: Path) -> None:
    assert call(data, "--spacing", "3", "2.5", "2.5") == 0
    scan = read_volume(data / "out/imagesTs/a_0000.nii.gz")
    np.testing.assert_allclose(scan.spacing, (3, 2.5, 2.5), rtol=0.02)
    (place, volume), (place_before, before) = (middle(data / f"{f}labelsTs/a.nii.gz") for f in ("out/", ""))
    np.testing.assert_allclose(place, place_before, atol=0.4)
    assert volume == pytest.approx(before, rel=0.05)


def test_larger_voxels_blur_and_smaller_ones_do_not(data: Path) -> None:
    """By the volume of what is neither ball nor surroundings: larger where voxels are larger, none in the scan itself."""

    def between(*spacing: str) -> float:
        assert call(data, "--spacing", *spacing) == 0
        scan = read_volume(data / "out/imagesTs/a_0000.nii.gz")
        return float(((scan.voxels > -40) & (scan.voxels < 90)).sum()) * scan.voxel_volume

    fine, own, coarse = between("1", "0.5", "0.5"), between("2", "1", "1"), between("4", "3", "3")
    assert own == 0 < fine < 0.5 * coarse


def test_a_scan_without_its_mask_fails_and_the_others_are_written(data: Path, caplog: pytest.LogCaptureFixture) -> None:
    scan = read_volume(data / "imagesTs/a_0000.nii.gz")
    write_volume(data / "imagesTs/b_0000.nii.gz", scan.voxels, scan.affine)
    write_volume(data / "imagesTs/c_0000.nii.gz", scan.voxels, scan.affine)
    write_volume(data / "labelsTs/c.nii.gz", np.zeros((3, 4, 5), np.uint8), scan.affine)
    assert call(data) == 1
    assert "b_0000.nii.gz: no mask of it; expected" in caplog.text
    assert "c.nii.gz: 5 x 4 x 3 voxels; expected 48 x 48 x 24" in caplog.text
    assert sorted(path.name for path in (data / "out/imagesTs").iterdir()) == ["a_0000.nii.gz"]


def test_what_is_read_is_not_overwritten(data: Path, caplog: pytest.LogCaptureFixture) -> None:
    before = (data / "imagesTs/a_0000.nii.gz").read_bytes()
    assert main(["alter", str(data / "imagesTs"), "--out", str(data), "--size", "2"]) == 1
    assert "would be overwritten" in caplog.text
    assert (data / "imagesTs/a_0000.nii.gz").read_bytes() == before


@pytest.mark.parametrize("wrong", [{"size": 0.0}, {"size": 9.0}, {"spacing": (0.1, 1.0, 1.0)}])
def test_no_scan_has_such_a_size_or_spacing(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must lie between"):
        Alteration(**wrong)  # type: ignore[arg-type]


def killed(*_: object) -> None:
    """What a worker does in place of its work."""
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_process_that_is_killed_is_a_case_that_failed(
    data: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("train.alter.alter", killed)
    assert call(data) == 1
    assert "a: its process was killed" in caplog.text
