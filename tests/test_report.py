"""The page of a run, from a run's folder that a test wrote as the loop writes it."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from inference.bundle import PLAN_NAME
from inference.organs import ORGANS
from tests.conftest import block_levels, block_scan, save_nifti
from train.__main__ import main
from train.agreement import Agreement
from train.config import load_config
from train.history import compare_with_truth, parse_epochs, read_history
from train.labelling import Row, write_row
from train.report import Shown, best_median_worst, rejected_by_different_organs
from train.report import _hours as hours_section
from train.report import _pictures as pictures
from train.selection import Decision, criterion, select, write_selection
from train.workspace import Workspace, iteration_dataset

FOLDS, EPOCHS = 2, 12
SETTINGS = ["loop.iterations=2", f"training.epochs={EPOCHS}", f"training.folds={FOLDS}"]
EPOCH = """
2026-11-23 07:29:41.557260: Epoch {n}
2026-11-23 07:29:41.557331: Current learning rate: 0.00064
2026-11-23 07:30:46.928624: train_loss {train}
2026-11-23 07:30:46.928810: val_loss {val}
2026-11-23 07:30:46.929006: Pseudo dice [np.float32({dice}), np.float32(nan), np.float32({dice})]
2026-11-23 07:30:46.929124: Epoch time: 60.0 s
2026-11-23 07:30:47.069754: Yayy! New best EMA pseudo Dice: 0.6829000115394592
"""


def write(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


def write_training(run: Workspace, number: int, fold: int | str, device: str = "cpu") -> None:
    dataset = iteration_dataset(number)
    epochs = [EPOCH.format(n=n, train=1 - n / 10, val=1.1 - n / 10, dice=round(n / EPOCHS, 4)) for n in range(EPOCHS)]
    write(run.nnunet_log(dataset, fold), "".join(epochs))
    write(run.progress(dataset, fold), {"epoch": EPOCHS - 1, "fraction": 1.0, "seconds": 1800.0})
    write(run.training_facts(dataset, fold), {"device": device})
    run.final_checkpoint(dataset, fold).touch()


def row(case: str, index: int, count: int, number: int, rng: np.random.Generator) -> Row:
    """The first cases agree best, and later iterations more than earlier ones."""
    base = 0.99 - 0.15 * index / count + 0.04 * number
    values = {organ.name: float(np.clip(base + rng.normal(0, 0.015), 0, 1)) for organ in ORGANS}
    change = None if number == 0 else 0.05
    return Row(case, FOLDS, Agreement(values), {}, 0.1, change, {"read": 1.0, "network": 8.0})


def write_run(root: Path, count: int, device: str = "cpu") -> Workspace:
    """A finished run of two iterations over ``count`` unlabelled cases, whose scans and pseudo-labels share one file."""
    run = Workspace(root)
    rng = np.random.default_rng(1)
    cases = [f"Case_{number:05d}" for number in range(1, count + 1)]
    write(run.settings, load_config(settings=SETTINGS).to_json())
    write(run.cases, {"labelled": [f"Tr_{n}" for n in range(5)], "unlabelled": cases, "found": []})
    write(run.starts, [{"time": "2026-11-23T07:00:00", "command": "python -m train loop <&>", "commit": "abc"}])
    labels = block_levels()
    scan, mask = (root / name for name in ("scan.nii.gz", "mask.nii.gz"))
    save_nifti(scan, block_scan(labels))
    save_nifti(mask, labels)
    for number in range(2):
        for fold in range(FOLDS):
            write_training(run, number, fold, device)
        run.rows(number).mkdir(parents=True)
        rows = [row(case, index, count, number, rng) for index, case in enumerate(cases)]
        for each in rows:
            write_row(run.row(number, each.case), each)
            link(mask, run.pseudo_label(number, each.case))
        write_selection(run.selection(number), select(rows, criterion("minimum"), 0.9))
    for case in cases:
        link(scan, run.image(case))
    write_training(run, 2, "all", device)
    write(run.set_aside("Case_99999"), "Case_99999_0000.nii.gz: holds NaN")
    write(run.bundle / PLAN_NAME, "{}")
    return run


def link(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    os.link(source, target)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return write_run(tmp_path_factory.mktemp("history") / "run", 15)


@pytest.fixture(scope="module")
def truth(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """True label maps of two cases of the run, the first on a finer grid, the second without a liver, and of a stranger."""
    folder = tmp_path_factory.mktemp("truth")
    labels = block_levels()
    save_nifti(folder / "Case_00001.nii.gz", labels.repeat(2, axis=2), (4.0, 2.0, 1.0))
    save_nifti(folder / "Case_00002.nii.gz", np.where(labels == 1, 0, labels).astype(np.uint8))
    save_nifti(folder / "Other.nii.gz", labels)
    return folder


@pytest.fixture(scope="module")
def page(run: Workspace, truth: Path) -> str:
    return page_of(run, "--truth", str(truth))


def page_of(run: Workspace, *more: str) -> str:
    page = run.root.parent / "report.html"
    assert main(["report", str(run.root), "-o", str(page), *more]) == 0
    return page.read_text()


def headings(page: str) -> list[str]:
    return re.findall(r"<h2>(.*?)</h2>", page)


def decision(case: str, accepted: bool, **low: float) -> Decision:
    agreement = Agreement({organ.name: 0.95 for organ in ORGANS} | low)
    return Decision(case, agreement, 0.1, None, agreement.minimum, accepted, None if accepted else agreement.weakest)


def test_epochs_are_read_from_nnunets_log() -> None:
    first = parse_epochs(EPOCH.format(n=0, train=-0.5, val=0.25, dice=0.5))
    assert [(each.number, each.train_loss, each.validation_loss, each.pseudo_dice, each.seconds) for each in first] == [
        (0, -0.5, 0.25, 0.5, 60.0)
    ]


def test_an_epoch_trained_again_after_a_restart_counts_once_and_one_cut_short_does_not() -> None:
    text = EPOCH.format(n=0, train=1, val=1, dice=0.1) + EPOCH.format(n=1, train=2, val=2, dice=0.2)
    text += EPOCH.format(n=1, train=3, val=3, dice=0.3) + EPOCH.format(n=2, train=4, val=4, dice=0.4).split("Pseudo")[0]
    assert [(each.number, each.train_loss) for each in parse_epochs(text)] == [(0, 1), (1, 3)]


def test_a_history_holds_what_the_run_went_through(run: Workspace) -> None:
    history = read_history(run.root)
    assert [len(turn.trainings) for turn in history.turns] == [FOLDS, FOLDS, 1]
    assert history.turns[0].labelling_seconds == pytest.approx(15 * 9)
    assert history.turns[1].training_seconds == FOLDS * 1800
    assert [turn.added for turn in history.turns] == [0, history.turns[0].accepted, history.turns[1].accepted]
    assert 0 < history.turns[0].accepted < history.turns[1].accepted < 15
    assert history.done
    assert not history.turns[0].on_gpu


def test_the_page_has_every_section(run: Workspace, page: str) -> None:
    assert headings(page) == [
        "Iterations",
        "DSC per iteration",
        "Agreement per organ",
        "Selection",
        "Trainings",
        "Best, median, worst",
        "Rejected in iteration 1",
        "Time",
        "Set aside",
    ]
    assert page.count("data:image/jpeg") == 2 + 3
    assert page.count("data:image/svg+xml") == 1 + 2 + 13 + 1 + 3 + 1 + 1
    assert "python -m train loop &lt;&amp;&gt;" in page
    assert "Case_99999_0000.nii.gz: holds NaN" in page
    assert "no GPU" in page
    history = read_history(run.root)
    assert f"<td>{history.turns[0].accepted} ({100 * history.turns[0].accepted / 15:.0f} %)</td>" in page


def test_the_page_asks_for_nothing_from_outside(page: str) -> None:
    assert re.findall(r'(?:src|href)="(?!data:)', page) == []
    assert not re.search(r"https?:|@import|url\(|<iframe|fetch\(", page)
    assert "default-src 'none'" in page


def test_gpu_hours_are_those_of_trainings_and_labelling_on_gpus(tmp_path: Path) -> None:
    page = hours_section(read_history(write_run(tmp_path / "run", 10, "cuda:0").root))
    hours = [2 * 0.5 + 90 / 3600, 2 * 0.5 + 90 / 3600, 0.5]
    rows = re.findall(r"<tr><td>(?:0|1|final model|all)</td>(?:<td>[\d.]+</td>){2}<td>([\d.]+)</td></tr>", page)
    assert [float(cell) for cell in rows] == pytest.approx([*hours, sum(hours)], abs=0.006)


def test_pseudo_labels_are_compared_with_the_truth_on_the_working_grid(run: Workspace, truth: Path, page: str) -> None:
    found = compare_with_truth(read_history(run.root), truth, limit=10)
    assert sorted(found) == [0, 1]
    assert found[1]["Case_00001"].minimum == 1
    assert found[1]["Case_00002"].values["liver"] == 0
    assert found[1]["Case_00002"].values["spleen"] == 1
    assert list(compare_with_truth(read_history(run.root), truth, limit=1)[0]) in (["Case_00001"], ["Case_00002"])
    assert "Best: Case_00001, mean DSC 1.0000" in page
    assert "Worst: Case_00002, mean DSC 0.9231" in page
    assert "Pseudo-labels of 2 cases against their truth" in page


def test_a_run_in_progress_has_a_page_too(tmp_path: Path) -> None:
    run = Workspace(tmp_path / "run")
    write(run.settings, load_config(settings=SETTINGS).to_json())
    write(run.cases, {"labelled": ["Tr"], "unlabelled": ["Case"], "found": []})
    page = page_of(run)
    assert "not done: 0 of 2 iterations selected" in page
    write_training(run, 0, 0)
    assert "Iteration 0: 1 of 2 folds done" in page_of(run)


def test_a_case_whose_files_are_gone_is_named(run: Workspace) -> None:
    history = read_history(run.root)
    text = pictures([Shown("Case_77777", "Best: <Case_77777>")], history.turns[1], history, None)
    assert text.startswith("<p>Best: &lt;Case_77777&gt;: cannot be drawn (")


def test_best_median_and_worst_are_cases_of_their_own() -> None:
    decisions = [decision(name, True, liver=value) for name, value in zip("ABCD", (0.91, 0.94, 0.93, 0.92))]

    def chosen(count: int) -> dict[str, str]:
        found = best_median_worst(decisions[:count], lambda each: each.agreement.minimum)
        return {word: each.case for word, each in found.items()}

    assert chosen(4) == {"Best": "B", "Median": "D", "Worst": "A"}
    assert chosen(2) == {"Best": "B", "Worst": "A"}
    assert chosen(1) == {"Best": "A"}
    assert chosen(0) == {}


def test_rejected_cases_are_shown_for_different_organs_first() -> None:
    decisions = [
        decision("A", False, liver=0.1),
        decision("B", False, liver=0.2),
        decision("C", False, spleen=0.3),
        decision("D", True),
    ]
    assert [each.case for each in rejected_by_different_organs(decisions, 3)] == ["A", "C", "B"]


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert main(["report", str(tmp_path), "-o", str(tmp_path / "page.html")]) == 2
    assert "expected a run of `loop`" in caplog.text
    assert not (tmp_path / "page.html").exists()


@pytest.mark.skipif(not shutil.which("chromium"), reason="no chromium to open the page with")
@pytest.mark.usefixtures("page")
def test_the_page_opens_without_a_word_on_the_console(run: Workspace) -> None:
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom"]
    done = subprocess.run(
        ["chromium", *options, (run.root.parent / "report.html").as_uri()], capture_output=True, text=True, check=True
    )
    assert "<h2>Set aside</h2>" in done.stdout
    assert "CONSOLE" not in done.stderr
