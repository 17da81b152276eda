import argparse
import csv
import io
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from inference.organs import ORGANS
from train import evaluate
from train.evaluate import (
    EvaluationError,
    score_case,
    score_folder,
    score_labels,
    summarise,
    summary_csv,
    summary_markdown,
    table,
)
from train.metrics import Score

ROOT = Path(__file__).resolve().parents[1]
AFFINE = np.diag([-1.0, -1.0, 2.0, 1.0])
PERFECT = {organ.name: Score(1.0, 1.0) for organ in ORGANS}
FAILED = {organ.name: Score(0.0, 0.0) for organ in ORGANS}


def organs() -> np.ndarray:
    """A (z, y, x) label map with every organ as a small block."""
    labels = np.zeros((20, 16, 16), np.uint8)
    for organ in ORGANS:
        row, column = divmod(organ.id - 1, 4)
        labels[4:12, 4 * row : 4 * row + 3, 4 * column : 4 * column + 3] = organ.id
    return labels


def save(path: Path, labels: np.ndarray, affine: np.ndarray = AFFINE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(labels.T, affine), path)
    return path


def pair(folder: Path, prediction: np.ndarray, reference: np.ndarray, affine: np.ndarray = AFFINE) -> tuple[Path, Path]:
    return (
        save(folder / "predictions" / "A.nii.gz", prediction, affine),
        save(folder / "references" / "A.nii.gz", reference, affine),
    )


def call(folder: Path, *more: str) -> int:
    parser = argparse.ArgumentParser()
    evaluate.add_arguments(parser)
    places = [f"--{name}={folder / name}" for name in ("predictions", "references", "out")]
    return evaluate.run(parser.parse_args([*places, *more]))


def test_a_label_map_scores_1_against_itself_and_organs_are_told_apart() -> None:
    reference = organs()
    prediction = np.where(reference == 2, 13, reference)
    assert score_labels(reference, reference, (2.0, 1.0, 1.0)) == PERFECT
    scores = score_labels(reference, prediction, (2.0, 1.0, 1.0))
    assert scores["right_kidney"] == Score(0.0, 0.0)
    assert scores["left_kidney"].dsc == 0.6667
    assert scores["liver"] == Score(1.0, 1.0)


def test_label_maps_of_two_shapes_are_refused() -> None:
    with pytest.raises(EvaluationError, match=r"\(20, 16, 16\), prediction \(20, 16, 15\)"):
        score_labels(organs(), organs()[:, :, 1:], (2.0, 1.0, 1.0))


def test_the_slice_left_out_is_the_last_of_the_file_whichever_way_it_points(tmp_path: Path) -> None:
    reference = organs()
    without_last, without_first = reference.copy(), reference.copy()
    without_last[11] = 0
    without_first[4] = 0
    for direction in (2.0, -2.0):
        affine = np.diag([-1.0, -1.0, direction, 1.0])
        assert score_case(*pair(tmp_path, without_last, reference, affine))["aorta"] == Score(1.0, 1.0)
        assert score_case(*pair(tmp_path, without_first, reference, affine))["aorta"].dsc < 1.0


def test_distances_follow_the_spacing_of_the_reference_header(tmp_path: Path) -> None:
    reference = organs()
    reference[reference != 9] = 0
    moved = np.roll(reference, 2, axis=0)
    near, far = (
        score_case(*pair(tmp_path, moved, reference, np.diag([1.0, 1.0, spacing, 1.0])))["gallbladder"]
        for spacing in (1.0, 1.5)
    )
    assert near == Score(0.75, 1.0)  # two slices of 1 mm: the tolerance
    assert far.dsc == 0.75
    assert far.nsd < 1.0


def test_a_missing_prediction_scores_0_and_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pair(tmp_path, organs(), organs())
    save(tmp_path / "references" / "B.nii.gz", organs())
    evaluation = score_folder(tmp_path / "predictions", tmp_path / "references")
    assert evaluation.scores == {"A": PERFECT, "B": FAILED}
    assert evaluation.missing == ("B",)
    assert "B: no prediction" in caplog.text
    assert call(tmp_path) == 0
    assert "scored 0: B." in (tmp_path / "out" / "summary.md").read_text()


def test_a_failed_case_is_named_and_the_others_go_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shifted = AFFINE.copy()
    shifted[0, 3] = 5.0
    predictions = tmp_path / "predictions"
    for case in ("cut", "fine", "flipped", "moved", "small"):
        save(predictions / f"{case}.nii.gz", organs())
        save(tmp_path / "references" / f"{case}.nii.gz", organs())
    save(predictions / "moved.nii.gz", organs(), shifted)
    save(predictions / "small.nii.gz", organs()[1:])
    save(predictions / "flipped.nii.gz", organs(), np.diag([1.0, -1.0, 2.0, 1.0]))
    content = (predictions / "cut.nii.gz").read_bytes()
    (predictions / "cut.nii.gz").write_bytes(content[: len(content) // 2])

    assert call(tmp_path, "--jobs=2") == 1
    assert "moved.nii.gz: lies up to 5 mm away" in caplog.text
    assert "small.nii.gz: 16 x 16 x 19 voxels" in caplog.text
    assert "flipped.nii.gz: stored as RPS, its reference" in caplog.text
    assert "cut.nii.gz: the gzip data is cut off" in caplog.text
    assert "4 of 5 cases failed: cut, flipped, moved, small" in caplog.text
    rows = list(csv.DictReader((tmp_path / "out" / "scores.csv").open()))
    assert {row["case"] for row in rows} == {"fine"}


def test_headers_that_differ_by_rounding_are_the_same_grid(tmp_path: Path) -> None:
    rounded = AFFINE.copy()
    rounded[:3, 3] += 1e-3
    prediction, reference = pair(tmp_path, organs(), organs())
    save(prediction, organs(), rounded)
    assert score_case(prediction, reference) == PERFECT


def test_cases_in_several_processes_score_as_in_one(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for case in ("A", "B", "C"):
        save(tmp_path / "references" / f"{case}.nii.gz", organs())
        save(
            tmp_path / "predictions" / f"{case}.nii", np.where(rng.random((20, 16, 16)) < 0.1, 0, organs()).astype("u1")
        )
    one, several = (score_folder(tmp_path / "predictions", tmp_path / "references", jobs) for jobs in (1, 3))
    assert one == several
    assert list(one.scores) == ["A", "B", "C"]


def test_the_files_are_the_long_table_and_two_summaries(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pair(tmp_path, organs(), organs())
    assert call(tmp_path) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["scores.csv", "summary.csv", "summary.md"]
    lines = (tmp_path / "out" / "scores.csv").read_text().splitlines()
    assert lines[0] == "case,organ,dsc,nsd"
    assert lines[1] == "A,liver,1.0000,1.0000"
    assert [line.split(",")[1] for line in lines[1:]] == [organ.name for organ in ORGANS]
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].split() == ["organ", "A", "mean", "DSC", "mean", "NSD"]
    assert printed[-1].split() == ["overall", "1.0000", "1.0000", "1.0000"]


def test_the_summary_is_mean_median_and_an_interval_around_the_mean() -> None:
    dsc = [0.9, 0.8, 0.4, 0.7, 0.7]
    scores = {f"{i}": {organ.name: Score(value, value / 2) for organ in ORGANS} for i, value in enumerate(dsc)}
    rows = summarise(scores)
    assert [row.name for row in rows] == [*(organ.name for organ in ORGANS), "overall"]
    liver = rows[0]
    assert liver.cases == 5
    assert liver.dsc.mean == pytest.approx(0.7)
    assert liver.dsc.median == pytest.approx(0.7)
    assert liver.nsd.mean == pytest.approx(0.35)
    # Five values with standard deviation 0.167: the mean's is 0.075, so the interval is about 0.7 -0.16 +0.12.
    assert liver.dsc.low == pytest.approx(0.54, abs=0.03)
    assert liver.dsc.high == pytest.approx(0.82, abs=0.03)
    assert summarise(scores) == rows


def test_overall_is_the_mean_over_organs_of_each_case() -> None:
    scores = {"A": dict(FAILED, liver=Score(0.65, 0.13))}
    overall = summarise(scores)[-1]
    assert overall.dsc.mean == overall.dsc.low == overall.dsc.high == pytest.approx(0.05)
    assert overall.nsd.mean == pytest.approx(0.01)


def test_the_markdown_has_the_rows_of_table_4() -> None:
    rows = summarise({"A": PERFECT})
    text = summary_markdown(evaluate.Evaluation({"A": PERFECT}, {"B": "B.nii.gz: cut off"}, ()), rows)
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert lines[0] == "| Organ | DSC | Median DSC | NSD | Median NSD |"
    assert lines[8] == "| Right Adrenal Gland | 1.0000 [1.0000, 1.0000] | 1.0000 | 1.0000 [1.0000, 1.0000] | 1.0000 |"
    assert lines[-1].startswith("| Overall |")
    assert len(lines) == 2 + 13 + 1
    assert "- B.nii.gz: cut off" in text


def test_many_cases_are_shown_as_means_alone() -> None:
    scores = {f"case_{i}": PERFECT for i in range(20)}
    assert table(scores, summarise(scores)).splitlines()[0].split() == ["organ", "mean", "DSC", "mean", "NSD"]


def test_the_summary_table_is_one_row_per_organ() -> None:
    rows = list(csv.DictReader(io.StringIO(summary_csv(summarise({"A": PERFECT})))))
    assert rows[4]["organ"] == "aorta"
    assert rows[4]["dsc_mean"] == rows[4]["nsd_high"] == "1.0000"
    assert len(rows) == 14


@pytest.mark.parametrize(
    ("predictions", "message"),
    [
        ({}, "predictions: no such folder"),
        ({"A_0000.nii.gz": None}, "share no case"),
        ({"A.nii.gz": None, "A.nii": None}, "is the same case"),
    ],
)
def test_a_wrong_folder_is_refused_and_nothing_is_written(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, predictions: dict, message: str
) -> None:
    save(tmp_path / "references" / "A.nii.gz", organs())
    for name in predictions:
        (tmp_path / "predictions").mkdir(exist_ok=True)
        (tmp_path / "predictions" / name).touch()
    assert call(tmp_path) == 2
    assert message in caplog.text
    assert not (tmp_path / "out").exists()


def test_an_empty_folder_of_predictions_scores_0_and_one_of_references_is_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path / "references" / "A.nii.gz", organs())
    (tmp_path / "predictions").mkdir()
    assert score_folder(tmp_path / "predictions", tmp_path / "references").scores == {"A": FAILED}
    assert call(tmp_path) == 0
    (tmp_path / "references" / "A.nii.gz").unlink()
    assert call(tmp_path) == 2
    assert "references: holds no .nii.gz or .nii file" in caplog.text


def test_when_every_case_fails_nothing_is_written(tmp_path: Path) -> None:
    prediction, _ = pair(tmp_path, organs(), organs())
    prediction.write_bytes(b"")
    assert call(tmp_path) == 2
    assert not list((tmp_path / "out").iterdir())


def test_a_place_that_cannot_be_written_is_refused_before_the_work(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pair(tmp_path, organs(), organs())
    (tmp_path / "out").touch()
    assert call(tmp_path) == 2
    assert f"{tmp_path / 'out'}: cannot be written" in caplog.text
    assert "DSC" not in caplog.text


def test_some_organs_alone_are_scored_where_the_true_masks_have_no_others(tmp_path: Path) -> None:
    whole = organs()
    pair(tmp_path, whole, np.where(np.isin(whole, (1, 3)), whole, 0))
    for case in ("B", "C"):  # another one, and one without a prediction
        save(tmp_path / "references" / f"{case}.nii.gz", whole)
    save(tmp_path / "predictions" / "B.nii.gz", np.where(whole == 3, 0, whole))
    assert call(tmp_path, "--organs", "spleen", "liver") == 0
    rows = list(csv.DictReader((tmp_path / "out" / "scores.csv").open()))
    found = {(row["case"], row["organ"]): float(row["dsc"]) for row in rows}
    assert found == {
        ("A", "liver"): 1.0,
        ("A", "spleen"): 1.0,
        ("B", "liver"): 1.0,
        ("B", "spleen"): 0.0,
        ("C", "liver"): 0.0,
        ("C", "spleen"): 0.0,
    }
    assert "2 of the 13 organs were scored" in (tmp_path / "out" / "summary.md").read_text()
    summary = list(csv.DictReader((tmp_path / "out" / "summary.csv").open()))
    assert [row["organ"] for row in summary] == ["liver", "spleen", "overall"]
    assert summary[-1]["dsc_mean"] == "0.5000"


def test_groups_of_phantoms_need_all_organs(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pair(tmp_path, organs(), organs())
    assert call(tmp_path, "--organs", "liver", "--records", str(tmp_path)) == 2
    assert "expected it without --organs" in caplog.text
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_sigterm_does_not_wait_for_all_the_cases(tmp_path: Path, jobs: str) -> None:
    """Sent to this process alone, as ``docker stop`` does; nothing is written of a folder that was scored in part."""
    many = 300
    for path in pair(tmp_path, organs(), organs()):
        for number in range(1, many):
            path.with_name(f"B{number:03}.nii.gz").hardlink_to(path)
    words = [f"--{name}={tmp_path / name}" for name in ("predictions", "references", "out")]
    command = [sys.executable, "-m", "train", "evaluate", *words, "--jobs", jobs]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr
        for line in process.stderr:
            if f" 10/{many} " in line:
                process.terminate()
                break
        rest = process.stderr.read()
    assert process.returncode == 143, rest
    assert rest.count(f"/{many} ") < many / 2
    assert not list((tmp_path / "out").iterdir())
