"""The whole way from files to files, with a network whose answer is known: label = HU / 10."""

import errno
import itertools
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from inference.__main__ import main
from inference.bundle import write_bundle
from inference.engine import OpenVinoEngine
from inference.pipeline import Options, Segmenter
from inference.resample import to_working_grid
from inference.volume import Shape, Volume, read_labels, read_volume
from tests.conftest import block_levels, block_scan, level_model, make_bundle, save_nifti, u_net

ROOT = Path(__file__).resolve().parents[1]
LEVELS = block_levels()
SCAN = block_scan(LEVELS)


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    (tmp_path / "in").mkdir()
    return tmp_path / "in", tmp_path / "out"


def run(inputs: Path, outputs: Path, weights: Path, *options: str) -> int:
    return main(
        [str(inputs), str(outputs), "--weights", str(weights), "--threads", "1", "--precision", "f32", *options]
    )


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def dice(a: np.ndarray, b: np.ndarray) -> float:
    return 2 * np.count_nonzero(a & b) / (np.count_nonzero(a) + np.count_nonzero(b))


def test_a_scan_on_the_working_grid_comes_back_exactly(folders, weights: Path) -> None:
    inputs, outputs = folders
    save_nifti(inputs / "CASE_0000.nii.gz", SCAN)
    assert run(inputs, outputs, weights, "--no-postprocessing") == 0
    assert names(outputs) == ["CASE.nii.gz"]
    assert (read_labels(outputs / "CASE.nii.gz").voxels == LEVELS).all()


def test_a_scan_on_another_grid_comes_back_on_its_own(folders, weights: Path) -> None:
    inputs, outputs = folders
    fine = LEVELS.repeat(2, 0).repeat(3, 1).repeat(3, 2)
    save_nifti(inputs / "CASE_0000.nii", block_scan(fine), (2.0, 2 / 3, 2 / 3))
    assert run(inputs, outputs, weights, "--no-postprocessing") == 0
    found = read_labels(outputs / "CASE.nii.gz").voxels
    assert found.shape == fine.shape
    for organ in range(14):  # between two organs' levels lie other levels, so borders are left out
        core = ndimage.binary_erosion(fine == organ, iterations=3)
        assert core.any()
        assert (found[core] == organ).all()


@pytest.mark.parametrize("shape", [(1, 30, 30), (2, 7, 9), (40, 16, 16), (3, 100, 11)])
def test_slabs_and_scans_smaller_than_a_window_work(folders, weights: Path, shape: tuple) -> None:
    inputs, outputs = folders
    levels = np.random.default_rng(0).integers(0, 14, shape).astype(np.uint8)
    save_nifti(inputs / "CASE_0000.nii.gz", levels.astype(np.int16) * 10)
    assert run(inputs, outputs, weights, "--no-postprocessing") == 0
    assert (read_labels(outputs / "CASE.nii.gz").voxels == levels).all()


def test_a_scan_outside_the_abdomen_gives_an_empty_mask(
    folders, weights: Path, caplog: pytest.LogCaptureFixture
) -> None:
    inputs, outputs = folders
    save_nifti(inputs / "HEAD_0000.nii.gz", np.where(LEVELS > 5, -900, -1000).astype(np.int16))
    assert run(inputs, outputs, weights) == 0
    assert not read_labels(outputs / "HEAD.nii.gz").voxels.any()
    assert "the mask is empty" in caplog.text


def test_the_same_anatomy_in_eight_orientations_and_oblique(tmp_path: Path) -> None:
    """The network looks one voxel to the left, behind and above: axes that were not turned right would show."""
    bundle = make_bundle(level_model(shift=(1, 1, 1)))
    segmenter = Segmenter(bundle, OpenVinoEngine(bundle, 1, "f32"), Options(postprocess=False))
    image = nib.load(save_nifti(tmp_path / "first.nii.gz", SCAN))
    first = segmenter.segment(read_volume(tmp_path / "first.nii.gz")).labels
    # Most of it moved by that one voxel; the rest saw the border of its window.
    assert dice(first[:-1, :-1, :-1] > 0, LEVELS[1:, 1:, 1:] > 0) > dice(first > 0, LEVELS > 0) + 0.05
    path = tmp_path / "other.nii.gz"
    for number, signs in enumerate(itertools.product((1, -1), repeat=3)):
        order = list(itertools.permutations(range(3)))[number % 6]
        nib.save(image.as_reoriented(np.array(list(zip(order, signs)))), path)
        assert (segmenter.segment(read_volume(path)).labels == first).all()
    turn = np.eye(4)
    turn[:2, :2] = [[np.cos(0.3), -np.sin(0.3)], [np.sin(0.3), np.cos(0.3)]]
    nib.save(nib.Nifti1Image(SCAN.T, turn @ image.affine), path)
    assert (segmenter.segment(read_volume(path)).labels == first).all()


def test_a_bundle_in_another_orientation_sees_its_own_axes(folders, tmp_path: Path) -> None:
    inputs, outputs = folders
    save_nifti(inputs / "CASE_0000.nii.gz", SCAN)
    write_bundle(tmp_path / "ras", make_bundle(level_model(shift=(0, 0, 1)), orientation="RAS"))
    assert run(inputs, outputs, tmp_path / "ras", "--no-postprocessing") == 0
    # Its x grows to the right, so the next voxel of RAS is the one before in LPS.
    assert (read_labels(outputs / "CASE.nii.gz").voxels[:, :, 1:] == LEVELS[:, :, :-1]).all()


def test_a_foreign_bundle_runs_with_a_hand_written_plan(folders, tmp_path: Path) -> None:
    inputs, outputs = folders
    names_ = ("background", *(f"structure {index}" for index in range(1, 20)))
    model = level_model(20, shape=("N", 1, 12, 24, 16), half=True, opset=13)
    bundle = make_bundle(model, classes=names_, patch=(12, 24, 16), spacing=(4.0, 2.0, 2.0), step=0.5)
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "net.onnx").write_bytes(model)
    plan = json.loads(bundle.plan.to_json())
    plan["model"]["file"] = "net.onnx"
    (tmp_path / "foreign" / "plan.json").write_text(json.dumps(plan))
    save_nifti(inputs / "CASE_0000.nii.gz", SCAN)
    assert run(inputs, outputs, tmp_path / "foreign") == 0
    assert dice(read_labels(outputs / "CASE.nii.gz").voxels > 0, LEVELS > 0) > 0.99


def test_post_processing_runs_unless_switched_off(folders, weights: Path) -> None:
    inputs, outputs = folders
    levels = LEVELS.copy()
    levels[19, 40:44, 50:54] = 3  # a fragment of the spleen, above every vessel
    save_nifti(inputs / "CASE_0000.nii.gz", block_scan(levels))
    run(inputs, outputs, weights)
    assert not (read_labels(outputs / "CASE.nii.gz").voxels[19] == 3).any()
    run(inputs, outputs, weights, "--no-postprocessing")
    assert (read_labels(outputs / "CASE.nii.gz").voxels[19] == 3).any()


def test_air_around_the_body_is_not_worked_on_and_changes_nothing(folders, weights: Path, tmp_path: Path) -> None:
    inputs, outputs = folders
    wide = np.pad(SCAN, ((0, 0), (30, 50), (70, 40)), constant_values=-1000)
    save_nifti(inputs / "CASE_0000.nii.gz", wide)
    seen = []
    for name, options in (("cropped", ()), ("whole", ("--no-crop",))):
        report = tmp_path / f"{name}.json"
        assert run(inputs, outputs, weights, "--no-postprocessing", "--report", str(report), *options) == 0
        labels = read_labels(outputs / "CASE.nii.gz").voxels
        assert (labels == np.pad(LEVELS, ((0, 0), (30, 50), (70, 40)))).all()
        seen.append(json.loads(report.read_text())["cases"][0]["organ_ml"])
    assert seen[0] == seen[1]


def test_windows_are_fitted_to_the_body_unless_told_otherwise(folders, tmp_path: Path) -> None:
    inputs, outputs = folders
    write_bundle(tmp_path / "u_net", make_bundle(u_net(), patch=(8, 16, 16)))
    save_nifti(inputs / "CASE_0000.nii.gz", SCAN)
    seen = {}
    for name, options in (("fitted", ()), ("patch", ("--no-fit",))):
        report = tmp_path / f"{name}.json"
        assert run(inputs, outputs, tmp_path / "u_net", "--step", "0.5", "--report", str(report), *options) == 0
        seen[name] = json.loads(report.read_text())["cases"][0]["windows"]
    # A scan of 20 x 48 x 56 voxels.
    assert seen["patch"] == 4 * 5 * 6
    assert seen["fitted"] < seen["patch"] / 1.5


def test_while_the_network_runs_only_what_two_rows_of_windows_share_is_held() -> None:
    held = []

    class Network:
        name, unit, growth = "zeros", None, 1.0

        def __call__(self, window: np.ndarray) -> np.ndarray:
            held.append(tracemalloc.get_traced_memory()[0])
            return np.zeros((14, *window.shape), np.float32)

    patch = (8, 48, 56)
    scan = Volume(SCAN, (4.0, 2.0, 2.0), np.eye(4), None, np.eye(3))
    tracemalloc.start()
    try:
        Segmenter(make_bundle(patch=patch), Network(), Options(postprocess=False)).segment(scan)
    finally:
        tracemalloc.stop()
    assert len(held) == 3  # at slices 0, 6 and 12
    row = 14 * np.prod(patch) * 4
    assert max(held) - held[0] < row / 2


@pytest.mark.parametrize("threads", [1, 2])
def test_a_network_is_compiled_once_for_the_windows_that_fit_the_scan(
    monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    compiled = []
    compile_for = OpenVinoEngine._compile

    def noted(self: OpenVinoEngine, window: Shape) -> None:
        compiled.append((window, threading.current_thread() is threading.main_thread()))
        compile_for(self, window)

    monkeypatch.setattr(OpenVinoEngine, "_compile", noted)
    bundle = make_bundle(u_net())
    segmenter = Segmenter(bundle, OpenVinoEngine(bundle, threads, "f32"), Options(step=0.5))
    scan = Volume(SCAN, (4.0, 2.0, 2.0), np.eye(4), None, np.eye(3))
    prepared = segmenter.prepare(scan)
    segmenter.finish(prepared)
    segmenter.segment(scan)
    assert prepared.window != bundle.plan.patch
    assert compiled == [(prepared.window, threads == 1)]  # beside the resampling where there are two threads


def test_a_scan_is_averaged_for_a_network_that_learned_from_means() -> None:
    scan = Volume(SCAN, (2.0, 1.0, 1.0), np.eye(4), None, np.eye(3))
    for means in (False, True):
        bundle = make_bundle(anti_aliasing=means)
        prepared = Segmenter(bundle, OpenVinoEngine(bundle, 1, "f32"), Options(crop=False)).prepare(scan)
        expected = to_working_grid(SCAN, prepared.image.shape, (-1000.0, 1000.0), means) / 10
        assert np.allclose(prepared.image, expected)


def test_a_network_that_cannot_be_compiled_is_named_at_the_first_window(
    monkeypatch: pytest.MonkeyPatch, folders, weights: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(self: OpenVinoEngine, window: Shape) -> None:
        raise RuntimeError("no such layer")

    monkeypatch.setattr(OpenVinoEngine, "_compile", refuse)
    inputs, outputs = folders
    save_nifti(inputs / "CASE_0000.nii.gz", SCAN)
    for options in ((), ("--threads", "2")):
        caplog.clear()
        assert run(inputs, outputs, weights, *options) == 1
        assert "model.onnx: OpenVINO refuses the network (no such layer)" in caplog.text
    assert names(outputs) == []


def test_step_and_mirroring_stay_reachable(weights: Path) -> None:
    calls = 0
    bundle = make_bundle()
    engine = OpenVinoEngine(bundle, 1, "f32")

    class Counting:
        name = "counting"

        def __call__(self, window: np.ndarray) -> np.ndarray:
            nonlocal calls
            calls += 1
            return engine(window)

    image = np.zeros((8, 16, 44), np.float32)
    expected = {(0.9, ()): 3, (0.5, ()): 5, (0.9, (0, 1, 2)): 24}
    for (step, axes), count in expected.items():
        calls = 0
        list(Segmenter(bundle, Counting(), Options(step, axes)).logits(image))
        assert calls == count


def test_bad_cases_are_named_and_the_others_are_done(folders, weights: Path, caplog: pytest.LogCaptureFixture) -> None:
    inputs, outputs = folders
    save_nifti(inputs / "GOOD_0000.nii.gz", SCAN)
    save_nifti(inputs / "ALSO_0000.nii", SCAN)
    save_nifti(inputs / "NONAME.nii.gz", SCAN)
    save_nifti(inputs / "_0000.nii.gz", SCAN)
    save_nifti(inputs / "TWICE_0000.nii.gz", SCAN)
    save_nifti(inputs / "TWICE_0000.nii", SCAN)
    (inputs / "EMPTY_0000.nii.gz").write_bytes(b"")
    (inputs / "TEXT_0000.nii.gz").write_text("hello")
    (inputs / "notes.txt").write_text("hello")
    assert run(inputs, outputs, weights) == 1
    assert names(outputs) == ["ALSO.nii.gz", "GOOD.nii.gz"]
    errors = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    for part in ("NONAME.nii.gz", "/_0000.nii.gz", "TWICE_0000.nii and TWICE_0000.nii.gz", "EMPTY_0000", "TEXT_0000"):
        assert sum(part in error for error in errors) == 1, part
    assert "5 of 7 failed" in errors[-1]
    assert "notes.txt: passed over" in caplog.text


def test_an_empty_or_missing_input_is_refused(folders, weights: Path, caplog: pytest.LogCaptureFixture) -> None:
    inputs, outputs = folders
    assert run(inputs, outputs, weights) == 2
    assert "holds no scan" in caplog.text
    assert run(inputs / "none", outputs, weights) == 2
    assert "no such file or folder" in caplog.text


def test_outputs_that_cannot_be_written_are_refused_before_any_work(
    folders, weights: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs, outputs = folders
    save_nifti(inputs / "CASE_0000.nii.gz", SCAN)
    (tmp_path / "file").write_text("")
    assert run(inputs, tmp_path / "file", weights) == 2
    assert "cannot be made" in caplog.text
    assert run(inputs, inputs, weights) == 2
    assert "is the input folder too" in caplog.text
    assert run(inputs, outputs, weights, "--report", str(outputs / "report.json")) == 2
    assert "masks and nothing else" in caplog.text
    assert run(inputs, outputs, weights, "--report", str(tmp_path / "none" / "report.json")) == 2
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anywhere, so the system is made to say no
    assert run(inputs, outputs, weights) == 2
    assert "cannot be written to" in caplog.text
    assert names(outputs) == []


def test_a_full_disk_fails_its_case_and_leaves_nothing(
    folders, weights: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs, outputs = folders
    for name in ("A", "B", "C"):
        save_nifti(inputs / f"{name}_0000.nii.gz", SCAN)
    calls = itertools.count()

    def full_once(descriptor: int) -> None:
        if next(calls) == 1:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_once)
    assert run(inputs, outputs, weights) == 1
    assert names(outputs) == ["A.nii.gz", "C.nii.gz"]
    assert "B.nii.gz: could not be written (No space left on device)" in caplog.text


def test_other_files_in_the_output_folder_stay_untouched(folders, weights: Path) -> None:
    inputs, outputs = folders
    outputs.mkdir()
    (outputs / "OTHER.nii.gz").write_bytes(b"somebody's")
    before = (outputs / "OTHER.nii.gz").stat()
    save_nifti(inputs / "CASE_0000.nii.gz", SCAN)
    assert run(inputs, outputs, weights) == 0
    assert names(outputs) == ["CASE.nii.gz", "OTHER.nii.gz"]
    assert (outputs / "OTHER.nii.gz").read_bytes() == b"somebody's"
    assert (outputs / "OTHER.nii.gz").stat().st_mtime_ns == before.st_mtime_ns


def test_one_file_is_a_case_too_and_the_same_input_gives_the_same_bytes(folders, weights: Path, tmp_path: Path) -> None:
    inputs, outputs = folders
    scan = save_nifti(inputs / "CASE_0000.nii.gz", SCAN)
    assert run(scan, outputs, weights) == 0
    assert run(scan, tmp_path / "again", weights) == 0
    assert (outputs / "CASE.nii.gz").read_bytes() == (tmp_path / "again" / "CASE.nii.gz").read_bytes()


def test_the_report_tells_volumes_seconds_memory_and_warnings(folders, weights: Path, tmp_path: Path) -> None:
    inputs, outputs = folders
    save_nifti(inputs / "CASE_0000.nii.gz", SCAN)
    (inputs / "BAD_0000.nii.gz").write_bytes(b"")
    report = tmp_path / "report.json"
    assert run(inputs, outputs, weights, "--no-postprocessing", "--report", str(report)) == 1
    content = json.loads(report.read_text())
    bad, good = content["cases"]
    assert bad["case"] == "BAD"
    assert "is empty" in bad["error"]
    assert good["case"] == "CASE"
    assert good["organ_ml"]["liver"] == pytest.approx(np.count_nonzero(LEVELS == 1) * 16 / 1000, abs=0.01)
    assert set(good["seconds"]) == {"read", "resample", "network", "labels", "write"}
    assert good["peak_memory_mib"] > 10
    # 20 x 48 x 56 voxels in windows of 8 x 16 x 16 at a step of 0.9: 3 x 4 x 4.
    assert (good["windows"], good["window"]) == (48, [8, 16, 16])
    assert good["warnings"] == []


def test_a_broken_bundle_is_refused_before_any_work(folders, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    inputs, outputs = folders
    save_nifti(inputs / "CASE_0000.nii.gz", SCAN)
    write_bundle(tmp_path / "weights", make_bundle())
    (tmp_path / "weights" / "model.onnx").write_bytes(b"other")
    assert run(inputs, outputs, tmp_path / "weights") == 2
    assert "sha256" in caplog.text
    assert names(outputs) == []


def hear_ctrl_c() -> None:
    """A shell's background job, such as a test run may be, ignores Ctrl-C and hands that down."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_ctrl_c_leaves_whole_masks_and_nothing_else(folders, tmp_path: Path) -> None:
    inputs, outputs = folders
    write_bundle(tmp_path / "weights", make_bundle())
    big = np.tile(SCAN, (2, 2, 2))
    for number in range(40):
        save_nifti(inputs / f"C{number:02d}_0000.nii.gz", big)
    command = [sys.executable, "-m", "inference", str(inputs), str(outputs), "--weights", str(tmp_path / "weights")]
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, preexec_fn=hear_ctrl_c)
        deadline = time.monotonic() + 60
        while not list(outputs.glob("*.nii.gz")) and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == code, errors
        assert "Traceback" not in errors
        masks = names(outputs)
        assert 0 < len(masks) < 40
        for mask in masks:
            assert read_labels(outputs / mask).shape == big.shape
            (outputs / mask).unlink()


def test_wrong_arguments_are_usage_errors(folders, weights: Path) -> None:
    for options in (["--step", "0"], ["--step", "1.5"], ["--threads", "-1"], ["--device", "tpu"]):
        with pytest.raises(SystemExit) as caught:
            run(*folders, weights, *options)
        assert caught.value.code == 2
