import csv
import json
from pathlib import Path

import numpy as np
import pytest

from inference.bundle import read_bundle, write_bundle
from tests.conftest import block_levels, block_scan, make_bundle, save_nifti
from train import ablate
from train.__main__ import main
from train.ablate import AblationError, Result, ablation_csv, ablation_markdown, parse_grid, segmenter_of, setting_name

SPACING = (4.0, 2.0, 2.0)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A test split of two cases: the network's answer is right in A, and in B the truth lacks the liver."""
    root = tmp_path / "data"
    labels = block_levels()
    for name, truth in (("A", labels), ("B", np.where(labels == 1, 0, labels))):
        for folder in ("imagesTs", "labelsTs"):
            (root / folder).mkdir(parents=True, exist_ok=True)
        save_nifti(root / "imagesTs" / f"{name}_0000.nii.gz", block_scan(labels), SPACING)
        save_nifti(root / "labelsTs" / f"{name}.nii.gz", truth.astype(np.uint8), SPACING)
    return root


def call(data: Path, weights: Path, out: Path, *grid: str) -> int:
    words = ["--grid", *grid] if grid else []
    return main(["ablate", "--data", str(data), "--weights", str(weights), "--out", str(out), *words])


def test_a_grid_is_every_combination() -> None:
    assert parse_grid(["step=0.5,0.9", "mirror=off,on"]) == [
        {"step": "0.5", "mirror": "off"},
        {"step": "0.5", "mirror": "on"},
        {"step": "0.9", "mirror": "off"},
        {"step": "0.9", "mirror": "on"},
    ]


@pytest.mark.parametrize(
    "words", [["stride=2"], ["step"], ["step=1.5"], ["step=a"], ["mirror=yes"], ["step=0.5", "step=0.9"], ["step=1,1"]]
)
def test_a_wrong_grid_is_refused(words: list[str]) -> None:
    with pytest.raises(AblationError, match="--grid"):
        parse_grid(words)


def test_a_setting_reaches_the_pipeline(weights: Path) -> None:
    bundle = read_bundle(weights)
    changed = segmenter_of(bundle, {"step": "0.5", "mirror": "on", "postprocess": "off"})
    assert (changed.options.step, changed.options.mirror_axes, changed.options.postprocess) == (0.5, (0, 1, 2), False)
    plain = segmenter_of(bundle, {})
    assert (plain.options.step, plain.options.mirror_axes, plain.options.postprocess) == (None, (), True)


def test_table_5_comes_of_two_cases(
    data: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    # Without post-processing, which takes the upper slices of these blocks: they have no vessel.
    assert call(data, weights, out, *ablate.TABLE_5, "postprocess=off") == 0
    with (out / "ablation.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["step"], row["mirror"], row["case"]) for row in rows] == [
        (step, mirror, case) for step in ("0.5", "0.9") for mirror in ("off", "on") for case in "AB"
    ]
    # Of B's 13 organs one is not there: 12 / 13.
    assert [row["dsc"] for row in rows] == ["1.0000", "0.9231"] * 4
    assert {row["gpu_seconds"] for row in rows} == {"no GPU"}
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].split() == ["step", "mirror", "postprocess", "DSC", "NSD", "time", "(s)", "GPU", "time", "(s)"]
    assert shown[1].split()[:4] == ["0.5", "off", "off", "0.9615"]
    assert not list(out.rglob("*.nii.gz"))


def test_what_was_measured_is_not_measured_again(
    data: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    assert call(data, weights, out, "step=0.9", "postprocess=off") == 0
    (out / "step-0.9_postprocess-off" / "B.json").unlink()
    measured = []
    before = ablate._segment_and_score
    monkeypatch.setattr(
        ablate, "_segment_and_score", lambda case, *rest: (measured.append(case.id), before(case, *rest))[1]
    )
    assert call(data, weights, out, "step=0.9", "postprocess=off") == 0
    assert measured == ["B"]


def test_results_of_other_weights_are_not_mixed(
    data: Path, weights: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "ablation.json").write_text(json.dumps({"sha256": "other", "engine": "other"}))
    assert call(data, weights, out, "mirror=off") == 2
    assert "another folder" in caplog.text


def test_gpu_time_stands_in_the_table_where_there_is_one() -> None:
    settings = parse_grid(["step=0.5,0.9"])
    results = {
        setting_name(setting): [Result("A", 0.5, 0.25, 3.0, gpu), Result("B", 1.0, 0.75, 5.0, gpu)]
        for setting, gpu in zip(settings, (2.0, None))
    }
    text = ablation_markdown(settings, results, "some engine")
    assert "| 0.5 | 0.7500 | 0.5000 | 4.0 | 2.0 |" in text
    assert "| 0.9 | 0.7500 | 0.5000 | 4.0 | no GPU |" in text
    assert ablation_csv(settings, results).splitlines()[1] == "0.5,A,0.5000,0.2500,3.000,2.000"


def test_a_data_set_without_a_test_split_is_named(
    weights: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert call(tmp_path, weights, tmp_path / "out") == 2
    assert "imagesTs" in caplog.text


def test_mirroring_that_training_never_showed_is_refused_before_anything_is_measured(
    data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    weights = tmp_path / "weights"
    write_bundle(weights, make_bundle(mirrored_axes=()))
    out = tmp_path / "out"
    assert call(data, weights, out, "step=0.9", "mirror=off,on") == 2
    assert "mirrored_axes" in caplog.text
    assert not out.exists()
