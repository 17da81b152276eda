import errno
import json
import os
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter
from scipy.special import softmax

from inference.bundle import Bundle, Intensity
from inference.engine import load_engine
from inference.organs import CLASSES, ORGANS
from inference.pipeline import Options, Segmenter
from inference.postprocess import Context, postprocess
from inference.resample import argmax
from inference.volume import VolumeError, read_labels, read_volume
from tests.conftest import block_levels, block_scan, level_model, make_bundle, save_nifti
from train.agreement import pairwise_dice
from train.config import Labelling
from train.labelling import Files, Labeller, LabellingError, changed_share, merge, read_row, working_set

SETTINGS = Labelling(step=0.9, mirroring=False, postprocess=False)
# Each network looks at another neighbour, so they agree inside the organs and differ at their borders.
SHIFTS = ((0, 0, 0), (0, 0, 1), (0, 1, 0), (0, 0, -1), (1, 0, 0))


@pytest.fixture(scope="module")
def bundles() -> list[Bundle]:
    return [make_bundle(level_model(shift=shift)) for shift in SHIFTS]


@pytest.fixture(scope="module")
def labeller(bundles: list[Bundle]) -> Labeller:
    return Labeller(bundles, SETTINGS, 1, "cpu")


@pytest.fixture
def scan(tmp_path: Path) -> Path:
    """A prepared scan: blocks, blurred and noisy, so that models doubt."""
    (tmp_path / "images").mkdir()
    return save_scan(tmp_path / "images" / "CASE.nii.gz")


def save_scan(path: Path, shape: tuple[int, int, int] = (20, 48, 56), seed: int = 0) -> Path:
    levels = gaussian_filter(block_levels(shape).astype(np.float32), 0.7) * 10
    noise = np.random.default_rng(seed).normal(0, 3, shape)
    return save_nifti(path, np.rint(levels + noise * (levels > 1)).astype(np.int16))


def logits_alone(bundles: list[Bundle], scan: Path, step: float = 0.9, axes: tuple[int, ...] = ()) -> np.ndarray:
    """Logits (models, classes, z, y, x) of each model run by itself."""
    image = read_volume(scan).voxels.astype(np.float32)
    slabs = [
        [slab.copy() for slab in Segmenter(bundle, load_engine(bundle, "cpu", 1), Options(step, axes)).logits(image)]
        for bundle in bundles
    ]
    return np.array([np.concatenate(model, axis=1) for model in slabs])


def label(labeller: Labeller, scan: Path, leave_out: tuple[int, ...] = (), **files):
    """A pseudo-label (z, y, x) and its row."""
    out = scan.parent.parent / "out"
    out.mkdir(exist_ok=True)
    row = labeller.label(Files(scan, out / "CASE.nii.gz", out / "CASE.json", **files), leave_out)
    return read_labels(out / "CASE.nii.gz").voxels, row


def assert_is_mean(labels: np.ndarray, mean: np.ndarray) -> None:
    """``labels`` are the arg-max of ``mean`` (classes, z, y, x), but for ties."""
    second, first = np.sort(mean, axis=0)[-2:]
    clear = first - second > 1e-5
    assert clear.mean() > 0.99
    assert (labels == mean.argmax(axis=0))[clear].all()


def test_five_models_at_once_are_five_models_alone(bundles, labeller: Labeller, scan: Path) -> None:
    logits = logits_alone(bundles, scan)
    mean = softmax(logits.astype(np.float64), axis=1).mean(axis=0)
    masks = [argmax(model) for model in logits]
    labels, row = label(labeller, scan)
    assert_is_mean(labels, mean)
    assert row.agreement == pairwise_dice(masks)
    assert 0.3 < row.agreement.minimum < 0.99
    seen = np.any(masks, axis=0)
    entropy = -(mean * np.log(np.maximum(mean, 1e-300))).sum(axis=0)
    assert row.entropy == pytest.approx(entropy[seen].mean(), abs=1e-5)
    assert 0.2 < row.entropy < np.log(14)
    assert row.models == 5
    for organ in ORGANS:
        assert row.volumes_ml[organ.name] == pytest.approx(np.count_nonzero(labels == organ.id) * 16e-3, abs=0.01)


@pytest.mark.parametrize("shape", [(5, 12, 40), (30, 17, 16)])
def test_scans_smaller_and_longer_than_the_window_are_labelled_too(bundles, labeller, tmp_path: Path, shape) -> None:
    (tmp_path / "images").mkdir()
    path = tmp_path / "images" / "CASE.nii.gz"
    save_nifti(path, np.random.default_rng(1).integers(0, 131, shape).astype(np.int16))
    labels, row = label(labeller, path)
    logits = logits_alone(bundles, path)
    assert_is_mean(labels, softmax(logits.astype(np.float64), axis=1).mean(axis=0))
    assert row.agreement == pairwise_dice([argmax(model) for model in logits])


def test_step_and_mirroring_are_settings(bundles: list[Bundle], scan: Path) -> None:
    two = bundles[:2]
    labels, _ = label(Labeller(two, replace(SETTINGS, step=0.5, mirroring=True), 1, "cpu"), scan)
    expected = softmax(logits_alone(two, scan, 0.5, (0, 1, 2)).astype(np.float64), axis=1).mean(axis=0)
    assert_is_mean(labels, expected)
    plain, _ = label(Labeller(two, SETTINGS, 1, "cpu"), scan)
    assert (labels != plain).any()


def test_the_mean_may_prefer_what_no_model_prefers() -> None:
    # Shares of background, 1, 2, 3: two models have a favourite each, and both have 3 second.
    shares = np.array([[0.01, 0.54, 0.01, 0.44], [0.01, 0.01, 0.54, 0.44]])
    logits = np.zeros((2, 14, 1, 1), np.float32) - 50
    logits[:, :4, 0, 0] = np.log(shares)
    labels, total, voxels = merge(logits, [argmax(model) for model in logits])
    assert labels[0, 0] == 3
    mean = shares.mean(axis=0)
    assert total == pytest.approx(-(mean * np.log(mean)).sum(), abs=1e-5)
    assert voxels == 1


def test_entropy_is_over_what_some_model_calls_an_organ() -> None:
    # One voxel is background to both, though not surely; at the other one model of two sees the spleen.
    logits = np.full((2, 14, 1, 2), -50, np.float32)
    logits[:, 0] = 0
    logits[:, 1, 0, 0] = -1
    logits[1, 3, 0, 1] = 40
    labels, total, voxels = merge(logits, [argmax(model) for model in logits])
    assert labels.tolist() == [[0, 0]]
    assert total == pytest.approx(np.log(2), abs=1e-4)
    assert voxels == 1


def test_a_scan_without_any_organ_has_an_empty_label_full_agreement_and_no_entropy(
    labeller: Labeller, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "images").mkdir()
    air = np.full((10, 20, 20), -900, np.int16)
    air[0, 0, 0] = -1000
    labels, row = label(labeller, save_nifti(tmp_path / "images" / "CASE.nii.gz", air))
    assert not labels.any()
    assert (row.agreement.minimum, row.entropy) == (1.0, 0.0)
    assert "CASE.nii.gz: no organ found" in caplog.text


AUXILIARY = ("bone", "lung")


@pytest.fixture(scope="module")
def auxiliary_bundles() -> list[Bundle]:
    """Networks that know bone and lung, too."""
    return [make_bundle(level_model(16, shift), classes=CLASSES + AUXILIARY) for shift in SHIFTS]


@pytest.fixture
def whole_body(tmp_path: Path) -> Path:
    """A prepared scan with organs, bone in front of some and a lung behind others."""
    (tmp_path / "images").mkdir()
    levels = block_levels()
    levels[2:8, 40:47, :50] = 14
    levels[12:18, 40:47, :50] = 15
    noise = np.random.default_rng(0).normal(0, 3, levels.shape)
    return save_nifti(tmp_path / "images" / "CASE.nii.gz", np.rint(levels * 10.0 + noise).astype(np.int16))


def test_auxiliary_classes_are_taught_on_but_neither_shown_nor_measured(
    auxiliary_bundles: list[Bundle], whole_body: Path
) -> None:
    target = whole_body.parent / "training.nii.gz"
    labels, row = label(Labeller(auxiliary_bundles, SETTINGS, 1, "cpu"), whole_body, training_label=target)
    logits = logits_alone(auxiliary_bundles, whole_body)
    mean = softmax(logits.astype(np.float64), axis=1).mean(axis=0)
    training = read_labels(target).voxels
    assert_is_mean(training, mean)
    assert np.count_nonzero(training == 14) > 500
    assert np.count_nonzero(training == 15) > 500
    assert (labels == np.where(training < 14, training, 0)).all()
    masks = [argmax(model) for model in logits]
    organs = [np.where(mask < 14, mask, 0).astype(np.uint8) for mask in masks]
    assert row.agreement == pairwise_dice(organs)
    assert list(row.agreement.values) == list(row.volumes_ml) == list(CLASSES[1:])
    entropy = -(mean * np.log(np.maximum(mean, 1e-300))).sum(axis=0)
    assert row.entropy == pytest.approx(entropy[np.any(organs, axis=0)].mean(), abs=1e-5)


def test_models_that_differ_on_an_auxiliary_class_settle_it_without_a_word_on_entropy() -> None:
    logits = np.full((2, 16, 1, 2), -50, np.float32)
    logits[:, 0, 0, 1] = 0
    logits[0, 14:, 0, 0] = 1, 0
    logits[1, 14:, 0, 0] = 0, 5
    labels, total, voxels = merge(logits, [argmax(model) for model in logits])
    assert labels.tolist() == [[15, 0]]
    assert (total, voxels) == (0.0, 0)


def test_an_organ_that_a_rule_removes_is_background_to_the_next_training_too(
    auxiliary_bundles: list[Bundle], whole_body: Path
) -> None:
    strict = [
        Bundle(replace(bundle.plan, organ_minima_mm3={"spleen": 1e9}), bundle.model) for bundle in auxiliary_bundles[:2]
    ]
    target = whole_body.parent / "training.nii.gz"
    plain, _ = label(Labeller(strict, SETTINGS, 1, "cpu"), whole_body, training_label=target)
    before = read_labels(target).voxels
    labels, _ = label(
        Labeller(strict, replace(SETTINGS, postprocess=True), 1, "cpu"), whole_body, training_label=target
    )
    after = read_labels(target).voxels
    assert (plain == 3).any()
    assert not (after[plain == 3] == 3).any()
    assert (np.where(after < 14, after, 0) == labels).all()
    untouched = (labels == 0) & (before >= 14)
    assert (after[untouched] == before[untouched]).all()


def test_models_that_trained_on_a_case_label_it_but_are_not_compared(bundles, labeller: Labeller, scan: Path) -> None:
    whole, _ = label(labeller, scan)
    labels, row = label(labeller, scan, leave_out=(0, 2, 4))
    masks = [argmax(model) for model in logits_alone(bundles, scan)]
    assert row.agreement == pairwise_dice([masks[1], masks[3]])
    assert row.models == 2
    assert (labels == whole).all()


def test_fewer_than_two_models_to_compare_are_refused(labeller: Labeller, scan: Path) -> None:
    for leave_out in ((0, 1, 2, 3), (7,)):
        with pytest.raises(LabellingError, match="expected at least two to be compared"):
            label(labeller, scan, leave_out=leave_out)


def test_change_is_against_the_label_of_the_iteration_before(labeller: Labeller, scan: Path) -> None:
    labels, row = label(labeller, scan)
    assert row.change is None
    before = labels.copy()
    before[labels == 3] = 0
    before[0, 0, :5] = 9
    assert not labels[0, 0, :5].any()
    save_nifti(scan.parent / "before.nii.gz", before)
    _, row = label(labeller, scan, previous=scan.parent / "before.nii.gz")
    changed = np.count_nonzero(labels == 3) + 5
    assert row.change == pytest.approx(changed / (np.count_nonzero(labels) + 5))
    _, row = label(labeller, scan, previous=scan.parent.parent / "out" / "CASE.nii.gz")
    assert row.change == 0.0


def test_change_counts_other_organs_and_nothing_at_all() -> None:
    one = np.array([[[1, 1, 0, 0]]], np.uint8)
    assert changed_share(one, np.array([[[1, 2, 0, 0]]], np.uint8)) == 0.5
    assert changed_share(one, np.zeros_like(one)) == 1.0
    assert changed_share(np.zeros_like(one), np.zeros_like(one)) == 0.0


def test_post_processing_is_a_setting(bundles: list[Bundle], labeller: Labeller, scan: Path) -> None:
    two = [Bundle(replace(bundle.plan, organ_minima_mm3={"spleen": 1e9}), bundle.model) for bundle in bundles[:2]]
    plain, raw = label(Labeller(two, SETTINGS, 1, "cpu"), scan)
    labels, row = label(Labeller(two, replace(SETTINGS, postprocess=True), 1, "cpu"), scan)
    assert (plain == 3).any()
    assert not (labels == 3).any()
    assert (labels == postprocess(plain, Context.of(two[0].plan, (4.0, 2.0, 2.0)))[0]).all()
    assert row.agreement == raw.agreement
    assert row.volumes_ml["spleen"] == 0


def test_nothing_but_label_and_row_is_written(labeller: Labeller, scan: Path) -> None:
    before = scan.read_bytes()
    label(labeller, scan)
    root = scan.parent.parent
    files = {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}
    assert files == {"images/CASE.nii.gz", "out/CASE.nii.gz", "out/CASE.json"}
    assert scan.read_bytes() == before
    assert (root / "out" / "CASE.nii.gz").stat().st_size < np.prod(block_levels().shape)


def test_a_pseudo_label_lies_on_its_scan(labeller: Labeller, scan: Path) -> None:
    label(labeller, scan)
    image, found = read_volume(scan), read_labels(scan.parent.parent / "out" / "CASE.nii.gz")
    assert found.shape == image.shape
    assert found.spacing == image.spacing
    assert (found.affine == image.affine).all()
    assert found.header.get_data_dtype() == np.uint8


def test_the_same_scan_gives_the_same_label_and_the_same_row_but_for_the_time(labeller: Labeller, scan: Path) -> None:
    _, first = label(labeller, scan)
    content = (scan.parent.parent / "out" / "CASE.nii.gz").read_bytes()
    _, second = label(labeller, scan)
    assert replace(second, seconds=first.seconds) == first
    assert (scan.parent.parent / "out" / "CASE.nii.gz").read_bytes() == content


def test_a_row_comes_back_as_it_was_written(labeller: Labeller, scan: Path) -> None:
    _, row = label(labeller, scan)
    path = scan.parent.parent / "out" / "CASE.json"
    assert read_row(path) == row
    content = json.loads(path.read_text())
    assert (content["case"], content["change"]) == ("CASE", None)
    assert list(content["agreement"]) == list(content["volumes_ml"]) == list(CLASSES[1:])
    assert {"read", "network", "labels", "write"} <= set(content["seconds"])


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"case": "A"}', '{"agreement": {"liver": 2}}'])
def test_what_is_no_row_is_refused_by_name(tmp_path: Path, text: str) -> None:
    path = tmp_path / "A.json"
    path.write_text(text)
    with pytest.raises(LabellingError, match=r"A\.json: cannot be read .* expected the row"):
        read_row(path)


def test_a_full_disk_leaves_no_row_and_no_part(labeller, scan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        label(labeller, scan)
    assert list((scan.parent.parent / "out").iterdir()) == []


def test_a_scan_that_was_not_prepared_is_refused_by_name(labeller: Labeller, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    path = save_nifti(tmp_path / "images" / "CASE.nii.gz", block_scan(block_levels()), (5.0, 2.0, 2.0))
    with pytest.raises(VolumeError, match=r"CASE\.nii\.gz: spacing 5 x 2 x 2 mm; expected .* 4 x 2 x 2 mm"):
        label(labeller, path)
    path.write_bytes(b"")
    with pytest.raises(VolumeError, match=r"CASE\.nii\.gz: the file is empty"):
        label(labeller, path)


def test_a_previous_label_of_another_shape_is_refused_by_name(labeller: Labeller, scan: Path) -> None:
    before = save_nifti(scan.parent / "before.nii.gz", np.zeros((20, 48, 55), np.uint8))
    with pytest.raises(VolumeError, match=r"before\.nii\.gz: \(20, 48, 55\) voxels"):
        label(labeller, scan, previous=before)


@pytest.mark.parametrize(
    ("name", "value"),
    [("patch", (8, 16, 20)), ("intensity", Intensity(-900.0, 1000.0, 0.0, 10.0)), ("spacing", (4.0, 2.0, 2.5))],
)
def test_models_of_different_plans_are_refused(bundles: list[Bundle], name: str, value: object) -> None:
    other = Bundle(replace(bundles[1].plan, **{name: value}), bundles[1].model)
    with pytest.raises(LabellingError, match=f"model 1: {name} is .*; expected .*, as model 0"):
        Labeller([bundles[0], other], SETTINGS, 1, "cpu")


def test_one_model_and_foreign_classes_are_refused(bundles: list[Bundle]) -> None:
    with pytest.raises(LabellingError, match="1 model; expected at least two"):
        Labeller(bundles[:1], SETTINGS, 1, "cpu")
    foreign = make_bundle(level_model(3), classes=("background", "liver", "spleen"))
    with pytest.raises(LabellingError, match=r"expected background, liver, right_kidney.*, then auxiliary ones"):
        Labeller([foreign, foreign], SETTINGS, 1, "cpu")


def peak_bytes(labeller: Labeller, scans: list[Path]) -> int:
    """Most that labelling ``scans``, one after the other, adds to what is held."""
    tracemalloc.start()
    try:
        for scan in scans:
            label(labeller, scan)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(("shape", "mirroring"), [((24, 96, 80), False), ((5, 90, 12), False), ((16, 20, 24), True)])
def test_the_working_set_is_as_stated(bundles, tmp_path: Path, shape, mirroring: bool) -> None:
    settings = replace(SETTINGS, mirroring=mirroring)
    labeller = Labeller(bundles, settings, 1, "cpu")
    (tmp_path / "images").mkdir()
    scan = save_nifti(
        tmp_path / "images" / "CASE.nii.gz", np.random.default_rng(1).integers(0, 131, shape).astype(np.int16)
    )
    label(labeller, scan)  # imports and caches
    stated = working_set(shape, labeller.plan, 5, mirroring)
    assert 0.5 * stated < peak_bytes(labeller, [scan]) < 1.02 * stated


def test_the_working_set_grows_with_slices_by_the_scan_alone(labeller: Labeller) -> None:
    one, two = (working_set((slices, 320, 320), labeller.plan, 5) for slices in (100, 200))
    assert two - one == 100 * 320 * 320 * 11


def test_the_working_set_does_not_grow_with_the_number_of_cases(labeller: Labeller, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    scans = [save_scan(tmp_path / "images" / f"CASE{seed}.nii.gz", seed=seed) for seed in range(8)]
    label(labeller, scans[0])
    assert peak_bytes(labeller, scans) < 1.05 * peak_bytes(labeller, scans[:2])
