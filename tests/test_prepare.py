import json
import logging
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from inference.resample import to_working_grid
from inference.volume import read_labels, read_volume, write_volume
from train.config import Config, load_config
from train.dataset import Case, DatasetError, labelled_cases, unlabelled_cases
from train.intensities import read_intensities, write_intensities
from train.prepare import (
    PrepareError,
    clip_range,
    exact_spacing,
    organ_minima,
    organ_volumes,
    prepare,
    prepare_case,
    write_organ_minima,
)
from train.workspace import Workspace

ROOT = Path(__file__).resolve().parents[1]
LPS = np.diag([-1.5, -1.5, 3.0, 1.0])


def settings(*more: str) -> Config:
    return load_config(None, ["prepare.spacing=[4.0, 2.0, 2.0]", "prepare.workers=1", *more])


def write_case(root: Path, name: str, auxiliary: bool = False) -> None:
    """A scan of 3 x 1.5 x 1.5 mm with a liver block inside and an aorta through all slices."""
    voxels = np.full((20, 24, 28), -100, np.int16)
    labels = np.zeros(voxels.shape, np.uint8)
    labels[5:12, 4:12, 4:12] = 1
    labels[:, 16:20, 16:20] = 5
    voxels[labels == 1], voxels[labels == 5] = 60, 200
    for folder, content, suffix in (("imagesTr", voxels, "_0000"), ("labelsTr", labels, "")):
        (root / folder).mkdir(parents=True, exist_ok=True)
        write_volume(root / folder / f"{name}{suffix}.nii.gz", content, LPS)
    if auxiliary:
        (root / "auxiliaryTr").mkdir(exist_ok=True)
        write_volume(root / "auxiliaryTr" / f"{name}.nii.gz", np.full(voxels.shape, 14, np.uint8), LPS)


def test_labelled_cases_pair_images_with_label_maps(tmp_path: Path) -> None:
    for name in ("B", "A"):
        write_case(tmp_path, name)
    cases = labelled_cases(tmp_path, settings().data)
    assert [case.id for case in cases] == ["A", "B"]
    assert cases[0].image.name == "A_0000.nii.gz"
    assert cases[0].label is not None


@pytest.mark.parametrize(
    ("file", "message"),
    [("labelsTr/A.nii.gz", "no label map A"), ("imagesTr/A_0000.nii.gz", "no image A_0000")],
)
def test_an_unpaired_file_is_named(tmp_path: Path, file: str, message: str) -> None:
    for name in ("A", "B"):
        write_case(tmp_path, name)
    (tmp_path / file).unlink()
    with pytest.raises(DatasetError, match=message):
        labelled_cases(tmp_path, settings().data)


def test_a_missing_folder_and_an_image_without_channel_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="unlabeled: not a folder"):
        unlabelled_cases(tmp_path, settings().data)
    (tmp_path / "unlabeled").mkdir()
    (tmp_path / "unlabeled" / "scan.nii.gz").touch()
    with pytest.raises(DatasetError, match="CASE_0000"):
        unlabelled_cases(tmp_path, settings().data)


def test_a_prepared_case_lies_on_the_working_grid(tmp_path: Path) -> None:
    write_case(tmp_path, "A")
    workspace = Workspace(tmp_path / "run")
    assert prepare(labelled_cases(tmp_path, settings().data), settings(), workspace) == ("A",)
    image, label = read_volume(workspace.image("A")), read_labels(workspace.label("A"))
    assert image.shape == label.shape == (15, 18, 21)
    assert image.spacing == pytest.approx((4, 2, 2))
    assert image.voxels.dtype == np.int16
    assert image.voxels[label.voxels == 1].mean() == pytest.approx(60, abs=10)
    millilitres = (label.voxels == 1).sum() * label.voxel_volume / 1000
    assert millilitres == pytest.approx(7 * 8 * 8 * 3 * 1.5 * 1.5 / 1000, rel=0.25)


def test_a_prepared_case_is_kept(tmp_path: Path) -> None:
    write_case(tmp_path, "A")
    workspace = Workspace(tmp_path / "run")
    cases = labelled_cases(tmp_path, settings().data)
    prepare(cases, settings(), workspace)
    before = workspace.image("A").stat()
    prepare(cases, settings(), workspace)
    after = workspace.image("A").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


def test_scans_are_clipped_to_the_labelled_organs_range_before_they_are_resampled(tmp_path: Path) -> None:
    write_case(tmp_path, "A")
    image = tmp_path / "imagesTr" / "A_0000.nii.gz"
    scan = read_volume(image)
    bright = np.array(scan.voxels)
    bright[:, :, 15] = 3000  # a plane of metal between the organs
    write_volume(image, bright, scan.affine)
    workspace = Workspace(tmp_path / "run")
    prepare(labelled_cases(tmp_path, settings().data), settings(), workspace)
    found = read_intensities(workspace.intensities)
    assert (found["percentile_00_5"], found["percentile_99_5"]) == (60, 200)
    voxels = read_volume(workspace.image("A")).voxels
    assert (voxels.min(), voxels.max()) == (60, 200)
    # The range stays: unlabelled scans and later calls are clipped alike.
    write_intensities(workspace.intensities, found | {"percentile_99_5": 100.0})
    prepare([Case("B", image)], settings(), workspace)
    assert read_volume(workspace.image("B")).voxels.max() == 100


def test_scans_are_averaged_where_it_is_asked_for(tmp_path: Path) -> None:
    write_case(tmp_path, "A")
    scan = read_volume(tmp_path / "imagesTr" / "A_0000.nii.gz").voxels
    found = {}
    for way in ("false", "true"):
        workspace = Workspace(tmp_path / way)
        config = settings(f"prepare.anti_aliasing={way}")
        prepare(labelled_cases(tmp_path, config.data), config, workspace)
        found[way] = read_volume(workspace.image("A")).voxels
        expected = to_working_grid(scan, found[way].shape, clip_range(workspace), way == "true")
        assert (found[way] == expected).all()
    assert (found["true"] != found["false"]).any()


def test_what_was_prepared_without_a_range_is_not_mixed_with_it(tmp_path: Path) -> None:
    write_case(tmp_path, "A")
    workspace = Workspace(tmp_path / "run")
    cases = labelled_cases(tmp_path, settings().data)
    prepare(cases, settings(), workspace)
    workspace.intensities.unlink()
    with pytest.raises(PrepareError, match="expected a new folder"):
        prepare(cases, settings(), workspace)


def test_a_training_that_starts_from_another_keeps_its_range(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    wanted = {"percentile_00_5": -50.0, "percentile_99_5": 70.0, "mean": 5.0, "std": 6.0}
    plans = {"foreground_intensity_properties_per_channel": {"0": wanted}}
    torch.save({"init_args": {"plans": plans}}, tmp_path / "start.pth")
    write_case(tmp_path, "A")
    workspace = Workspace(tmp_path / "run")
    config = settings(f"training.start_from={tmp_path / 'start.pth'}")
    prepare(labelled_cases(tmp_path, config.data), config, workspace)
    assert read_intensities(workspace.intensities) == wanted
    assert read_volume(workspace.image("A")).voxels.max() == 70


def test_a_bad_scan_is_named_and_set_aside_and_the_rest_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("A", "B"):
        write_case(tmp_path, name)
    (tmp_path / "imagesTr" / "B_0000.nii.gz").write_bytes(b"")
    workspace = Workspace(tmp_path / "run")
    with caplog.at_level(logging.WARNING):
        assert prepare(labelled_cases(tmp_path, settings().data), settings(), workspace) == ("A",)
    assert "B is set aside" in caplog.text
    assert "empty" in workspace.set_aside("B").read_text(encoding="utf-8")
    assert not workspace.image("B").exists()


def test_a_label_map_on_another_grid_or_with_a_strange_label_is_refused(tmp_path: Path) -> None:
    write_case(tmp_path, "A")
    workspace = Workspace(tmp_path / "run")
    case = labelled_cases(tmp_path, settings().data)[0]
    assert case.label is not None
    for folder in (workspace.image, workspace.label, workspace.volumes):
        folder("A").parent.mkdir(parents=True)
    write_intensities(workspace.intensities, {"percentile_00_5": -100.0, "percentile_99_5": 200.0})
    write_volume(case.label, np.zeros((20, 24, 27), np.uint8), LPS)
    with pytest.raises(ValueError, match="20 x 24 x 27"):
        prepare_case(case, settings(), workspace)
    write_volume(case.label, np.full((20, 24, 28), 14, np.uint8), LPS)
    with pytest.raises(ValueError, match="label 14; expected 0 to 13"):
        prepare_case(case, settings(), workspace)
    assert not workspace.image("A").exists()


def test_auxiliary_classes_fill_only_what_no_organ_takes(tmp_path: Path) -> None:
    write_case(tmp_path, "A", auxiliary=True)
    config = settings('data.auxiliary_classes=["fat"]')
    workspace = Workspace(tmp_path / "run")
    prepare(labelled_cases(tmp_path, config.data), config, workspace)
    organs, both = read_labels(workspace.label("A")).voxels, read_labels(workspace.training_label("A")).voxels
    assert set(np.unique(both)) == {1, 5, 14}
    assert ((both == 1) == (organs == 1)).mean() > 0.99


def test_the_spacing_of_a_prepared_file_is_exact() -> None:
    affine = np.array([[-2.01, 0, 0.1, 5], [0, -1.99, 0, 6], [0, 0.1, 4.02, 7], [0, 0, 0, 1.0]])
    scaled = exact_spacing(affine, (4.0, 2.0, 2.0))
    assert np.linalg.norm(scaled[:3, :3], axis=0) == pytest.approx([2, 2, 4])
    assert scaled[:3, 3].tolist() == [5, 6, 7]


def test_a_cut_organ_does_not_set_the_minimum_while_a_whole_one_exists() -> None:
    whole = {"liver": {"mm3": 900.0, "cut": False}, "aorta": {"mm3": 50.0, "cut": True}}
    cut = {"liver": {"mm3": 100.0, "cut": True}, "aorta": {"mm3": 40.0, "cut": True}}
    assert organ_minima([whole, cut]) == {"liver": 900.0, "aorta": 40.0}


def test_cut_organs_count_where_hardly_any_case_shows_a_whole_one() -> None:
    cut = [{"esophagus": {"mm3": 3000.0 + number, "cut": True}} for number in range(9)]
    whole = {"esophagus": {"mm3": 57000.0, "cut": False}}
    assert organ_minima([*cut, whole]) == {"esophagus": 57000.0}  # a tenth
    assert organ_minima([*cut, cut[0], whole]) == {"esophagus": 3000.0}


def test_volumes_are_in_mm3_and_know_what_the_scan_cuts() -> None:
    labels = np.zeros((6, 5, 5), np.uint8)
    labels[2:4, 1:3, 1:3] = 1
    labels[4:, 4, 4] = 3
    volumes = organ_volumes(labels, (5.0, 2.0, 1.0))
    assert volumes == {"liver": {"mm3": 80.0, "cut": False}, "spleen": {"mm3": 20.0, "cut": True}}


def test_minima_are_learned_from_the_original_label_maps(tmp_path: Path) -> None:
    write_case(tmp_path, "A")
    workspace = Workspace(tmp_path / "run")
    prepare(labelled_cases(tmp_path, settings().data), settings(), workspace)
    minima = write_organ_minima(("A",), workspace)
    assert minima == pytest.approx({"liver": 7 * 8 * 8 * 6.75, "aorta": 20 * 4 * 4 * 6.75})
    assert json.loads(workspace.organ_minima.read_text(encoding="utf-8")) == minima


def test_an_unlabelled_case_needs_no_label_map(tmp_path: Path) -> None:
    write_case(tmp_path, "A")
    case = replace(labelled_cases(tmp_path, settings().data)[0], label=None)
    workspace = Workspace(tmp_path / "run")
    workspace.intensities.parent.mkdir(parents=True)
    write_intensities(workspace.intensities, {"percentile_00_5": -100.0, "percentile_99_5": 200.0})
    assert prepare([Case(case.id, case.image)], settings(), workspace) == ("A",)
    assert not workspace.label("A").exists()


def test_sigterm_does_not_wait_for_all_the_scans(tmp_path: Path) -> None:
    """Sent to this process alone, as ``docker stop`` does; Ctrl-C reaches the workers too."""
    data, many = tmp_path / "data", 400
    write_case(data, "CASE_0000")
    for number in range(1, many):
        for file in ("imagesTr/CASE_{}_0000.nii.gz", "labelsTr/CASE_{}.nii.gz"):
            (data / file.format(f"{number:04}")).hardlink_to(data / file.format("0000"))
    command = [sys.executable, "-m", "train", "fit", "--data", str(data), "--out", str(tmp_path / "run")]
    told = ["--set", "prepare.workers=1", "--set", "training.start_from=weights"]
    with subprocess.Popen([*command, *told], cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr
        for line in process.stderr:
            if "prepare: 10 of" in line:
                process.terminate()
                break
        rest = process.stderr.read()
    assert process.returncode == 143, rest
    assert "what was finished is kept" in rest
    assert 10 <= len(list(Workspace(tmp_path / "run").volumes("x").parent.iterdir())) < many / 2
