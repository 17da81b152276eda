"""Where a run is, read from files that a test wrote."""

import json
import logging
import time
from pathlib import Path

import pytest

from inference.bundle import PLAN_NAME
from inference.organs import ORGANS
from train import status
from train.__main__ import main
from train.agreement import Agreement
from train.config import Config, load_config
from train.labelling import Row, write_row
from train.lock import locked
from train.selection import criterion, select, write_selection
from train.workspace import Workspace, iteration_dataset

SETTINGS = ["loop.iterations=2", "training.epochs=10", "training.folds=2", "cluster.progress_seconds=0.001"]


@pytest.fixture
def config() -> Config:
    return load_config(settings=SETTINGS)


@pytest.fixture
def run(tmp_path: Path, config: Config) -> Workspace:
    """A run whose four cases are prepared."""
    workspace = Workspace(tmp_path / "run")
    workspace.root.mkdir()
    workspace.settings.write_text(config.to_json())
    write(workspace.cases, {"labelled": ["L1"], "unlabelled": ["U1", "U2", "U3", "U4"], "found": []})
    write(workspace.machine, {"training": 2, "labelling": 1})
    return workspace


def write(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def train(run: Workspace, number: int, fold: int | str, epochs: int, seconds: float, of: int = 10) -> None:
    """As the trainer writes it after so many epochs."""
    dataset = iteration_dataset(number)
    write(run.progress(dataset, fold), {"epoch": epochs, "fraction": epochs / of, "seconds": seconds})
    if epochs == of:
        run.final_checkpoint(dataset, fold).touch()


def label(run: Workspace, number: int, case: str, agreement: float, seconds: float = 4.0) -> Row:
    run.rows(number).mkdir(parents=True, exist_ok=True)
    values = Agreement({organ.name: agreement for organ in ORGANS})
    row = Row(case, 5, values, {}, 0.1, None, {"read": seconds / 4, "network": 3 * seconds / 4})
    write_row(run.row(number, case), row)
    return row


def test_a_run_that_has_not_trained_yet_knows_no_time(run: Workspace, config: Config) -> None:
    found = status.read_status(run, config)
    assert status.seconds_left(found) is None
    assert "iteration 0 of 2; no epoch trained yet; time left unknown yet" in status.describe(found)


def test_time_left_adds_up_trainings_and_labelling(run: Workspace, config: Config) -> None:
    train(run, 0, 0, 10, 100.0)
    train(run, 0, 1, 4, 40.0)
    found = status.read_status(run, config)
    # Two side by side: 60 s are left of fold 1, then 2 x 100 s of iteration 1, then the final model alone.
    assert status.seconds_left(found) == pytest.approx(60 / 2 + 200 / 2 + 100)
    train(run, 0, 1, 10, 100.0)
    label(run, 0, "U1", 0.95, seconds=5.0)
    found = status.read_status(run, config)
    assert status.seconds_left(found) == pytest.approx(3 * 5 + (200 / 2 + 4 * 5) + 100)


def test_accepted_so_far_follows_the_criterion(run: Workspace, config: Config) -> None:
    for fold in (0, 1):
        train(run, 0, fold, 10, 100.0)
    label(run, 0, "U1", 0.95)
    label(run, 0, "U2", 0.85)
    run.failures(0).mkdir(parents=True)
    run.failure(0, "U3").write_text("broken")
    line = status.summary(status.read_status(run, config))
    assert "fold 0 done, fold 1 done; 2 of 4 cases labelled, 1 accepted so far; 1 set aside" in line


def test_the_current_iteration_is_the_first_without_a_selection(run: Workspace, config: Config) -> None:
    for fold in (0, 1):
        train(run, 0, fold, 10, 100.0)
    rows = [label(run, 0, f"U{number}", 0.5 + number / 10) for number in range(1, 5)]
    write_selection(run.selection(0), select(rows, criterion("minimum"), 0.9))
    train(run, 1, 1, 3, 30.0)
    found = status.read_status(run, config)
    assert (found.current.number, found.turns[0].accepted) == (1, 1)
    assert "iteration 1 of 2; fold 1 epoch 3/10" in status.summary(found)


def test_a_finished_run_is_done(run: Workspace, config: Config) -> None:
    run.bundle.mkdir()
    (run.bundle / PLAN_NAME).touch()
    found = status.read_status(run, config)
    assert status.seconds_left(found) == 0
    assert "done" in status.describe(found).splitlines()[0]


def test_a_run_says_whether_somebody_works_on_it(run: Workspace, config: Config) -> None:
    assert "stopped; the same loop command goes on" in status.describe(status.read_status(run, config))
    with locked(run.lock):
        assert "running" in status.describe(status.read_status(run, config))


def test_the_command_writes_a_table_or_json(run: Workspace, capsys: pytest.CaptureFixture) -> None:
    train(run, 0, 0, 4, 40.0)
    assert main(["status", str(run.root)]) == 0
    assert "fold 0        4/10      0.7        0 of 4" in capsys.readouterr().out
    assert main(["status", str(run.root), "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["iterations"][0]["folds"][0]["epoch"] == 4
    assert content["seconds_left"] > 0


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert main(["status", str(tmp_path)]) == 1
    assert "expected the settings of a run" in caplog.text


def test_the_log_gets_a_line_when_something_has_changed(
    run: Workspace, config: Config, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    tick = status.live_progress(run, config)
    for epochs in (1, 1, 2):
        train(run, 0, 0, epochs, 10.0 * epochs)
        time.sleep(0.002)
        tick()
    lines = [record.getMessage() for record in caplog.records if "fold 0" in record.getMessage()]
    assert ["epoch 1/10" in lines[0], "epoch 2/10" in lines[1], len(lines)] == [True, True, 2]
