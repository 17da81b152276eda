"""The loop: first its logic with fast stand-ins for nnU-Net and the labeller, then all of it on phantoms, killed and not."""

import contextlib
import errno
import hashlib
import json
import logging
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from inference.bundle import PLAN_NAME, read_bundle
from inference.organs import CLASSES, ORGANS
from inference.volume import atomic_write, read_labels
from train import budget, loop, nnunet
from train.agreement import Agreement
from train.cluster import Job, Labels, Queue
from train.config import ConfigError, load_config
from train.dataset import DatasetError
from train.labelling import Files, Labeller, Row, read_row, write_row
from train.lock import locked
from train.phantom.tissue import AUXILIARY
from train.selection import read_selection
from train.workspace import LABELLED_DATASET, Workspace, iteration_dataset

ROOT = Path(__file__).resolve().parents[1]
ORGAN_NAMES = [organ.name for organ in ORGANS]


# Stand-ins: what they write is a few bytes, but in the places and in the order of the real ones.


class Killed(BaseException):
    """What SIGKILL is to a test within one process."""


class Inline:
    """Jobs one after the other, in this process."""

    training_slots = labelling_slots = 1

    def train(self, jobs: list[Job], tick: Callable[[], None]) -> None:
        for job in jobs:
            job.work()
            tick()

    def label(self, labels: Labels, tick: Callable[[], None]) -> None:
        work, queue = labels.load(), Queue(labels.cases, labels.attempts)
        while len(queue):
            case = queue.take()
            try:
                work(case)
            except ValueError as error:
                if queue.fail(case):
                    labels.set_aside(case, str(error))
            tick()


@dataclass
class World:
    """A data set of empty files, and how well the models agree on each case in each iteration."""

    data: Path
    agreement: Callable[[int, str], float] = lambda number, case: 0.95
    done: Counter = field(default_factory=Counter)
    broken: set[str] = field(default_factory=set)
    leave_out: dict[int, Mapping[str, tuple[int, ...]]] = field(default_factory=dict)
    trained: dict[str, Any] = field(default_factory=dict)

    def prepare(self, cases, config, workspace) -> tuple[str, ...]:
        for case in cases:
            if workspace.image(case.id).exists():
                continue
            self.done[f"prepare {case.id}"] += 1
            for path in (workspace.volumes(case.id), workspace.image(case.id)):
                path.parent.mkdir(parents=True, exist_ok=True)
                atomic_write(path, json.dumps({"liver": {"mm3": 1e6, "cut": False}}).encode())
        return tuple(sorted(case.id for case in cases))

    def make_plan(self, dataset, config, workspace) -> None:
        workspace.plans(dataset).parent.mkdir(parents=True, exist_ok=True)
        atomic_write(workspace.fingerprint(dataset), b"{}")
        atomic_write(workspace.plans(dataset), json.dumps({"dataset_name": dataset}).encode())

    def preprocess(self, dataset, config, workspace, earlier) -> None:
        self.trained[f"{dataset} earlier"] = earlier

    def train(self, dataset, fold, config, workspace, warm_start=None) -> None:
        final = workspace.final_checkpoint(dataset, fold)
        if final.exists():
            return
        splits = json.loads(workspace.splits(dataset).read_text())
        cases = splits[fold]["train"] if fold != "all" else sorted({c for s in splits for c in s["train"] + s["val"]})
        settings = json.loads(workspace.plans(dataset).read_text())["training"]
        content = {"cases": cases, "settings": settings | {"initial_weights": None}}
        self.done[f"train {dataset} {fold}"] += 1
        self.trained[f"{dataset} {fold}"] = cases, config.training, warm_start
        atomic_write(final, json.dumps(content).encode())

    def export(self, checkpoint, dataset, config, workspace, out, parity_case=None, auxiliary=False) -> None:
        final = checkpoint.parent.name == "fold_all"
        assert (parity_case, auxiliary) == (("L1", False) if final else (None, True))
        out.mkdir(parents=True, exist_ok=True)
        atomic_write(out / PLAN_NAME, hashlib.sha256(checkpoint.read_bytes()).hexdigest().encode())

    def load_labeller(self, number, leave_out, config, workspace):
        self.leave_out[number] = leave_out

        def label(case: str) -> None:
            if case in self.broken:
                raise ValueError(f"{case} is broken")
            self.done[f"label {number} {case}"] += 1
            value = self.agreement(number, case)
            files = loop.files_of(case, number, config, workspace)
            for path in (files.label, files.training_label):
                if path is not None:
                    atomic_write(path, f"{number} {case}".encode())
            values = {name: value if name == "pancreas" else 0.99 for name in ORGAN_NAMES}
            write_row(files.row, Row(case, 5, Agreement(values), {}, 0.1, None, {"network": 2.0}))

        return label


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    data = tmp_path / "data"
    for folder in ("imagesTr", "labelsTr", "unlabeled"):
        (data / folder).mkdir(parents=True)
    for number in range(1, 8):
        (data / "imagesTr" / f"L{number}_0000.nii.gz").touch()
        (data / "labelsTr" / f"L{number}.nii.gz").touch()
    for number in range(1, 7):
        (data / "unlabeled" / f"U{number}_0000.nii.gz").touch()
    world = World(data)
    monkeypatch.setattr(budget, "free_bytes", lambda run: 10**15)  # whatever disk the tests run on
    monkeypatch.setattr(loop, "prepare", world.prepare)
    monkeypatch.setattr(loop, "export", world.export)
    monkeypatch.setattr(loop, "load_labeller", world.load_labeller)
    for name in ("make_plan", "preprocess", "train"):
        monkeypatch.setattr(nnunet, name, getattr(world, name))
    return world


def self_train(world: World, run: Path, *settings: str) -> Workspace:
    config = load_config(settings=["loop.iterations=2", "cluster.progress_seconds=0.0001", *settings])
    workspace = Workspace(run)
    run.mkdir(exist_ok=True)
    if not workspace.provenance.exists():
        atomic_write(workspace.provenance, b"{}")
    labelled, unlabelled = loop.find_cases(world.data, config)
    loop.check_data([*labelled, *unlabelled], workspace)
    loop.self_train(labelled, unlabelled, config, workspace, Inline())
    return workspace


def training_cases(workspace: Workspace, number: int, fold: int) -> set[str]:
    return set(json.loads(workspace.splits(iteration_dataset(number)).read_text())[fold]["train"])


def accepted(workspace: Workspace, number: int) -> tuple[str, ...]:
    return read_selection(workspace.selection(number)).accepted


def test_accepted_cases_join_the_next_training_and_the_last_ones_the_final_model(world: World, tmp_path: Path) -> None:
    good = {0: {"U1", "U2"}, 1: {"U2", "U3", "U4"}}
    world.agreement = lambda number, case: 0.9 if case in good[number] else 0.8999
    workspace = self_train(world, tmp_path / "run")
    assert [set(accepted(workspace, number)) for number in (0, 1)] == [good[0], good[1]]
    labelled = {f"L{number}" for number in range(1, 8)}
    for fold in range(5):
        assert training_cases(workspace, 0, fold) < labelled
    trained = [training_cases(workspace, 1, fold) for fold in range(5)]
    assert set().union(*trained) == labelled | good[0]
    assert Counter(case for cases in trained for case in cases) == dict.fromkeys(labelled | good[0], 4)
    assert set(world.trained[f"{iteration_dataset(2)} all"][0]) == labelled | good[1]
    assert sum(count for job, count in world.done.items() if job.startswith("train")) == 11
    assert (workspace.bundle / PLAN_NAME).exists()


def test_nnunet_reads_the_pseudo_labels_of_the_iteration_before(world: World, tmp_path: Path) -> None:
    workspace = self_train(world, tmp_path / "run")
    path = workspace.raw_dataset(iteration_dataset(1))
    cases = json.loads(path.read_text())["dataset"]
    assert (path.parent / cases["U3"]["label"]).resolve() == workspace.pseudo_label(0, "U3").resolve()
    assert (path.parent / cases["U3"]["images"][0]).resolve() == workspace.image("U3").resolve()
    assert (path.parent / cases["L3"]["label"]).resolve() == workspace.label("L3").resolve()
    final = json.loads(workspace.raw_dataset(iteration_dataset(2)).read_text())["dataset"]
    assert (path.parent / final["U3"]["label"]).resolve() == workspace.pseudo_label(1, "U3").resolve()
    assert world.trained[f"{iteration_dataset(2)} earlier"] == [iteration_dataset(1), LABELLED_DATASET]


def test_validation_stays_on_labelled_cases_which_keep_their_folds(world: World, tmp_path: Path) -> None:
    workspace = self_train(world, tmp_path / "run")
    splits = [json.loads(workspace.splits(iteration_dataset(number)).read_text()) for number in (0, 1)]
    assert [split["val"] for split in splits[0]] == [split["val"] for split in splits[1]]
    assert sorted(case for split in splits[1] for case in split["val"]) == [f"L{number}" for number in range(1, 8)]


def test_an_iteration_that_accepts_nothing_goes_on_with_the_labelled_cases_and_says_so(
    world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    world.agreement = lambda number, case: 0.5 if number == 0 else 0.95
    workspace = self_train(world, tmp_path / "run")
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert ["ITERATION 0 ACCEPTED NO CASE" in warning for warning in warnings] == [True]
    assert not any(case.startswith("U") for fold in range(5) for case in training_cases(workspace, 1, fold))
    assert len(accepted(workspace, 1)) == 6


def test_the_unfiltered_variant_accepts_every_case_and_the_random_one_as_many_as_asked(
    world: World, tmp_path: Path
) -> None:
    world.agreement = lambda number, case: 0.1
    assert len(accepted(self_train(world, tmp_path / "all", "loop.criterion=all"), 0)) == 6
    drawn = self_train(world, tmp_path / "random", "loop.criterion=random", "loop.random_cases=2")
    assert len(accepted(drawn, 0)) == 2


def test_held_out_models_train_on_three_fifths_and_two_judge_each_case(world: World, tmp_path: Path) -> None:
    workspace = self_train(world, tmp_path / "run", "loop.held_out=true")
    trained = [training_cases(workspace, 1, fold) for fold in range(5)]
    for case in [f"L{number}" for number in range(1, 8)] + [f"U{number}" for number in range(1, 7)]:
        assert sum(case in cases for cases in trained) == 3
    assert world.leave_out[0] == {}
    for case, models in world.leave_out[1].items():
        assert models == tuple(fold for fold in range(5) if case in trained[fold])
        assert len(models) == 3
    assert set(world.leave_out[1]) == set(accepted(workspace, 0))
    self_train(world, tmp_path / "paper")
    assert world.leave_out[1] == {}


def test_early_iterations_may_be_short_and_start_warm_and_seeds_differ(world: World, tmp_path: Path) -> None:
    self_train(world, tmp_path / "run", "loop.warm_start=true", "loop.epochs=[3, 7]", "training.epochs=20")
    settings = [world.trained[f"{iteration_dataset(number)} {fold}"] for number, fold in ((0, 1), (1, 1), (2, "all"))]
    assert [training.epochs for _, training, _ in settings] == [3, 7, 20]
    assert [warm for _, _, warm in settings] == [None, iteration_dataset(0), iteration_dataset(1)]
    assert len({training.seed for _, training, _ in settings}) == 3


def test_no_iterations_train_the_final_model_on_the_labelled_cases(world: World, tmp_path: Path) -> None:
    workspace = self_train(world, tmp_path / "run", "loop.iterations=0")
    assert len(world.trained[f"{LABELLED_DATASET} all"][0]) == 7
    assert (workspace.bundle / PLAN_NAME).exists()


def test_a_case_that_fails_three_times_is_set_aside_and_the_run_goes_on(
    world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    world.broken = {"U2"}
    workspace = self_train(world, tmp_path / "run")
    assert workspace.failure(0, "U2").read_text() == "U2 is broken\n"
    assert [decision.case for decision in read_selection(workspace.selection(0)).decisions] == [
        "U1",
        "U3",
        "U4",
        "U5",
        "U6",
    ]
    assert "1 cases are set aside" in caplog.text
    world.broken = {f"U{number}" for number in range(1, 7)}
    with pytest.raises(loop.LoopError, match="not one case could be labelled"):
        self_train(world, tmp_path / "none")


def snapshot(run: Path) -> dict[str, tuple[int, int, bytes]]:
    """Inode, time and content of every finished file: what a step leaves, not what is rewritten at each start."""
    files = {}
    for path in sorted(run.rglob("*")):
        step = path.name in ("selection.csv", PLAN_NAME, "checkpoint_final.pth", "cases.json", "splits_final.json")
        if path.parent.name in ("labels", "auxiliary") and path.parent.parent.name != "prepared":
            step = (path.parents[1] / "rows" / path.name.replace(".nii.gz", ".json")).exists()
        if path.is_file() and (step or path.parent.name in ("rows", "images")):
            status = path.stat()
            files[str(path.relative_to(run))] = status.st_ino, status.st_mtime_ns, path.read_bytes()
    return files


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_killed_at_any_rename_and_started_again_it_ends_the_same(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: bool
) -> None:
    world.agreement = lambda number, case: 0.95 if case in ("U1", "U5") else 0.2
    whole = snapshot(self_train(world, tmp_path / "whole").root)
    jobs = set(world.done)
    real = Path.replace
    countdown = -1

    def replace(self: Path, target: Path) -> Path:
        nonlocal countdown
        countdown -= 1
        if countdown == 0 and not after:
            raise Killed
        result = real(self, target)
        if countdown == 0:
            raise Killed
        return result

    monkeypatch.setattr(Path, "replace", replace)
    kills = 0
    for number in range(1, 1000, 3):
        run = tmp_path / f"run{number}"
        world.done.clear()
        countdown = number
        try:
            self_train(world, run)
            break  # it had fewer renames: all moments were tried
        except Killed:
            kills += 1
        countdown = -1
        before = snapshot(run)
        self_train(world, run)
        end = snapshot(run)
        assert {name: entry for name, entry in end.items() if name in before} == before
        assert {name: entry[2] for name, entry in end.items()} == {name: entry[2] for name, entry in whole.items()}
        assert set(world.done) == jobs
        assert sum(world.done.values()) <= len(jobs) + 1  # the step that was cut off, once more
    assert kills > 25


def test_a_finished_loop_started_again_does_nothing(world: World, tmp_path: Path) -> None:
    before = snapshot(self_train(world, tmp_path / "run").root)
    world.done.clear()
    assert snapshot(self_train(world, tmp_path / "run").root) == before
    assert not world.done


def test_a_run_refuses_other_cases_and_others_of_the_same_name(world: World, tmp_path: Path) -> None:
    self_train(world, tmp_path / "run")
    (world.data / "unlabeled" / "U9_0000.nii.gz").touch()
    with pytest.raises(loop.LoopError, match="1 differ, such as U9"):
        self_train(world, tmp_path / "run")
    (world.data / "unlabeled" / "U9_0000.nii.gz").unlink()
    for folder, case in (("labelsTr", "L2"), ("unlabeled", "U3_0000")):
        (world.data / folder / f"{case}.nii.gz").write_bytes(b"another patient")
    with pytest.raises(loop.LoopError, match="2 differ, such as L2"):
        self_train(world, tmp_path / "run")


def test_what_is_wrong_with_the_data_is_said_before_any_work(world: World) -> None:
    config = load_config()
    (world.data / "unlabeled" / "L3_0000.nii.gz").touch()
    with pytest.raises(DatasetError, match="L3 is a labelled and an unlabelled case"):
        loop.find_cases(world.data, config)
    for number in (1, 2, 3):
        (world.data / "imagesTr" / f"L{number}_0000.nii.gz").unlink()
        (world.data / "labelsTr" / f"L{number}.nii.gz").unlink()
    with pytest.raises(DatasetError, match="4 labelled cases; expected at least 5"):
        loop.find_cases(world.data, config)


def test_auxiliary_classes_pass_from_the_labelled_cases_to_the_accepted_ones(world: World, tmp_path: Path) -> None:
    setting = 'data.auxiliary_classes=["bone", "lung"]'
    with pytest.raises(DatasetError, match="auxiliaryTr: not a folder"):
        self_train(world, tmp_path / "run", setting)
    (world.data / "auxiliaryTr").mkdir()
    for number in range(1, 8):
        (world.data / "auxiliaryTr" / f"L{number}.nii.gz").touch()
    workspace = self_train(world, tmp_path / "run", setting)
    path = workspace.raw_dataset(iteration_dataset(1))
    content = json.loads(path.read_text())
    assert list(content["labels"])[-3:] == ["left_kidney", "bone", "lung"]
    labels = {case: (path.parent / files["label"]).resolve() for case, files in content["dataset"].items()}
    assert labels["L3"] == workspace.training_label("L3").resolve()
    assert labels["U3"] == workspace.training_pseudo_label(0, "U3").resolve()
    assert labels["U3"].exists()
    plain = self_train(world, tmp_path / "plain")
    assert not plain.training_pseudo_label(0, "U3").exists()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("loop.treshold=0.8", "unknown key loop.treshold"),
        ("loop.threshold=1.2", "loop.threshold is 1.2"),
        ("loop.criterion=best", "loop.criterion is 'best'"),
        ("loop.criterion=random", "loop.random_cases is 0"),
        ("loop.epochs=[1, 2, 3, 4, 5, 6]", "at most 5 entries"),
        ("training.folds=1", "training.folds is 1"),
        ("labelling.step=0", "labelling.step is 0"),
        ("cluster.attempts=0", "cluster.attempts is 0"),
    ],
)
def test_a_bad_setting_stops_before_any_work(
    world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture, setting: str, message: str
) -> None:
    assert command(world, tmp_path / "run", "--set", setting) == 1
    assert message in caplog.text
    assert not (tmp_path / "run").exists()


def command(world: World, run: Path, *options: str) -> int:
    from train.__main__ import main

    return main(["loop", "--data", str(world.data), "--out", str(run), *options])


def test_held_out_needs_four_folds(world: World) -> None:
    with pytest.raises(ConfigError, match=r"at least 4 with loop\.held_out"):
        load_config(settings=["loop.held_out=true", "training.folds=3"])


def test_a_dry_run_says_what_the_run_takes_and_leaves_nothing(
    world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    assert command(world, tmp_path / "run", "--dry-run") == 0
    assert "21 trainings and 24 cases to label" in caplog.text
    assert not (tmp_path / "run").exists()


def test_a_run_that_is_worked_on_is_refused(world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with locked(Workspace(tmp_path / "run").lock):
        assert command(world, tmp_path / "run") == 1
    assert "another process works on it" in caplog.text
    assert not Workspace(tmp_path / "run").settings.exists()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_run_that_is_told_to_stop_says_so_and_goes_on_when_started_again(
    world: World,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    number: int,
    code: int,
) -> None:
    monkeypatch.setattr(loop.cluster, "connect", lambda *arguments: contextlib.nullcontext(Inline()))
    preprocess = world.preprocess
    monkeypatch.setattr(nnunet, "preprocess", lambda *arguments: os.kill(os.getpid(), number))
    before = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    try:
        assert command(world, tmp_path / "run") == code
        assert "start the same command again" in caplog.text
        monkeypatch.setattr(nnunet, "preprocess", preprocess)
        assert command(world, tmp_path / "run") == 0
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def test_a_full_disk_is_named_with_what_to_do(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(loop.cluster, "connect", lambda *arguments: contextlib.nullcontext(Inline()))
    monkeypatch.setattr(nnunet, "preprocess", full)
    assert command(world, tmp_path / "run") == 1
    assert f"{tmp_path / 'run'}: [Errno 28] No space left on device; what was finished is kept" in caplog.text


# All of it: phantoms, nnU-Net, Ray, OpenVINO.

TOY = {
    "prepare": {"spacing": [10.0, 8.0, 8.0], "workers": 1},
    "network": {
        "patch": [16, 32, 32],
        "features": [6, 12, 24],
        "kernels": [[3, 3, 3]] * 3,
        "strides": [[1, 1, 1], [2, 2, 2], [2, 2, 2]],
        "encoder_convolutions": [1, 1, 1],
        "decoder_convolutions": [1, 1],
        "batch_dice": True,
    },
    "training": {
        "epochs": 6,
        "iterations_per_epoch": 25,
        "validation_iterations": 1,
        "optimizer": "adamw",
        "learning_rate": 0.01,
        "mirroring": False,
        "augmentation": "none",
        "device": "cpu",
        "cpu_precision": "float32",
        "threads": 1,
        "deterministic": True,
    },
    "loop": {"iterations": 2},
    "cluster": {"labelling_threads": 1, "progress_seconds": 1.0},
}


def toy_settings(**changes: object) -> list[str]:
    """Options of the command line; ``changes``: section__key=value."""
    values = {f"{section}.{key}": value for section, entries in TOY.items() for key, value in entries.items()}
    values |= {name.replace("__", "."): value for name, value in changes.items()}
    return [word for key, value in values.items() for word in ("--set", f"{key}={json.dumps(value)}")]


def toy_command(data: Path, run: Path, **changes: object) -> list[str]:
    settings = toy_settings(**changes)
    return [sys.executable, "-m", "train", "loop", "--data", str(data), "--out", str(run), *settings]


def toy_loop(data: Path, run: Path, threshold: float) -> list[str]:
    """The loop of the tests below: all classes that phantoms carry."""
    return toy_command(data, run, loop__threshold=threshold, data__auxiliary_classes=list(AUXILIARY))


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from train.phantom import Recipe, write_dataset

    folder = tmp_path_factory.mktemp("phantoms")
    write_dataset(folder, 6, 5, 0, seed=6, recipe=Recipe(spacing=(10.0, 8.0, 8.0), auxiliary=True), jobs=2)
    return folder


@dataclass(frozen=True)
class Toy:
    """A finished loop and the threshold it was run with."""

    workspace: Workspace
    threshold: float
    seconds: float


@pytest.fixture(scope="module")
def toy(phantoms: Path, tmp_path_factory: pytest.TempPathFactory) -> Toy:
    """A loop to its end.

    Networks of 150 steps agree on little, and on how little depends on the processor. So a first start, with the paper's
    threshold, ends when the first iteration is labelled; the threshold then lies in the widest gap between its cases.
    """
    for package in ("torch", "nnunetv2", "ray"):
        pytest.importorskip(package)
    workspace = Workspace(tmp_path_factory.mktemp("loop") / "run")
    start = time.monotonic()
    minima = pilot(phantoms, workspace)
    widest = max(range(1, len(minima)), key=lambda place: minima[place] - minima[place - 1])
    threshold = (minima[widest - 1] + minima[widest]) / 2
    run_to_the_end(toy_loop(phantoms, workspace.root, threshold))
    return Toy(workspace, threshold, time.monotonic() - start)


def run_to_the_end(command: list[str]) -> None:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def pilot(phantoms: Path, workspace: Workspace) -> list[float]:
    """Run until the first iteration is labelled, and forget what followed. Returns its cases' least agreements, sorted."""
    errors = workspace.root.with_name("errors")
    with errors.open("w") as output:
        process = subprocess.Popen(toy_loop(phantoms, workspace.root, 0.9), cwd=ROOT, stderr=output)
        while not workspace.selection(0).exists():
            assert process.poll() is None, errors.read_text()
            time.sleep(0.2)
        process.kill()
        process.wait()
    time.sleep(2)
    decisions = read_selection(workspace.selection(0)).decisions
    folders = [workspace.nnunet_raw, workspace.nnunet_preprocessed, workspace.nnunet_results]
    for folder in (workspace.iteration(1), *(folder / iteration_dataset(1) for folder in folders)):
        shutil.rmtree(folder, ignore_errors=True)
    workspace.selection(0).unlink()
    workspace.settings.unlink()
    return sorted(decision.agreement.minimum for decision in decisions)


def test_the_toy_loop_accepts_some_cases_and_rejects_others(toy: Toy) -> None:
    decisions = read_selection(toy.workspace.selection(0)).decisions
    assert len(decisions) == 5
    assert {decision.accepted for decision in decisions} == {True, False}
    for decision in decisions:
        assert decision.accepted == (decision.agreement.minimum >= toy.threshold)
        assert (decision.failed_organ is None) == decision.accepted


def test_nnunet_trained_on_an_accepted_pseudo_label(toy: Toy) -> None:
    dataset = iteration_dataset(1)
    case = accepted(toy.workspace, 0)[0]
    splits = json.loads(toy.workspace.splits(dataset).read_text())
    folds = [fold for fold, split in enumerate(splits) if case in split["train"]]
    assert len(folds) == 4
    assert (toy.workspace.preprocessed_cases(dataset) / f"{case}.b2nd").exists()
    # nnU-Net's own log says how many cases each fold trained on.
    for fold in folds:
        assert f"{len(splits[fold]['train'])} training" in toy.workspace.nnunet_log(dataset, fold).read_text()


def test_nnunet_trained_on_the_auxiliary_classes_of_a_pseudo_label(toy: Toy) -> None:
    case = accepted(toy.workspace, 0)[0]
    shown = read_labels(toy.workspace.pseudo_label(0, case)).voxels
    taught = read_labels(toy.workspace.training_pseudo_label(0, case)).voxels
    assert (shown == np.where(taught < 14, taught, 0)).all()
    learned = toy.workspace.preprocessed_cases(iteration_dataset(1)) / f"{case}.pkl"
    places = pickle.loads(learned.read_bytes())["class_locations"]
    found = {value for value in np.unique(taught) if value}
    assert found & set(range(14, 14 + len(AUXILIARY)))
    assert {value for value, voxels in places.items() if len(voxels)} == found
    # Models of the folds know all classes, the one that leaves the run shows the organs.
    assert read_bundle(toy.workspace.fold_bundle(1, 0)).plan.classes == CLASSES + tuple(AUXILIARY)
    assert read_bundle(toy.workspace.bundle).plan.classes == CLASSES


def test_scans_are_on_the_disk_once_however_many_iterations_there_are(toy: Toy) -> None:
    first, last = (toy.workspace.preprocessed_cases(iteration_dataset(number)) for number in (0, 2))
    for case in json.loads(toy.workspace.cases.read_text())["labelled"]:
        assert (first / f"{case}.b2nd").stat().st_ino == (last / f"{case}.b2nd").stat().st_ino
        assert (first / f"{case}.pkl").stat().st_ino == (last / f"{case}.pkl").stat().st_ino


def test_the_loop_ends_in_a_bundle_that_inference_runs(toy: Toy, phantoms: Path, tmp_path: Path) -> None:
    from inference.__main__ import main

    scan = sorted((phantoms / "unlabeled").glob("*.nii.gz"))[0]
    assert main([str(scan), str(tmp_path), "--weights", str(toy.workspace.bundle), "--threads", "1"]) == 0
    assert (tmp_path / "Case_00001.nii.gz").exists()
    origin = json.loads((toy.workspace.bundle / PLAN_NAME).read_text())["provenance"]
    assert origin["accepted_cases"] == len(accepted(toy.workspace, 1))
    assert origin["command"].startswith("python -m train loop")


def test_the_run_records_how_it_was_made(toy: Toy) -> None:
    start = json.loads(toy.workspace.starts.read_text())[-1]
    assert {"time", "command", "commit", "image", "versions"} <= set(start)
    assert {"ray", "torch", "nnunetv2", "python"} <= set(start["versions"])
    settings = json.loads(toy.workspace.settings.read_text())
    assert settings["training"]["seed"] == 0
    assert settings["loop"]["threshold"] == toy.threshold


def test_the_log_shows_where_the_run_is(toy: Toy) -> None:
    text = toy.workspace.log.read_text()
    assert "iteration 0 of 2" in text
    assert "left" in text


def kill_and_resume(toy: Toy, phantoms: Path, run: Path, kills: int, seed: int) -> None:
    """The same loop, killed with SIGKILL at random moments and started again; finished files must stay as they are.

    A moment is a random share of the finished files, and up to some seconds more: so kills spread over the whole loop.
    """
    draw, finished = random.Random(seed), {}
    command = toy_loop(phantoms, run, toy.threshold)
    last = len(snapshot(toy.workspace.root)) - 1
    for files in sorted(draw.randint(0, last) for _ in range(kills)):
        process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
        while len(snapshot(run)) < files and process.poll() is None:
            time.sleep(0.2)
        time.sleep(draw.uniform(0, 10))
        process.send_signal(signal.SIGKILL)
        process.wait()
        time.sleep(2)
        now = snapshot(run)
        assert {name: now[name] for name in finished} == finished
        finished = now
    run_to_the_end(command)
    end = snapshot(run)
    assert {name: end[name] for name in finished} == finished
    assert len(json.loads(Workspace(run).starts.read_text())) > 1


def weights(workspace: Workspace) -> dict[str, Any]:
    import torch

    final = workspace.final_checkpoint(iteration_dataset(2), "all")
    return dict(torch.load(final, map_location="cpu", weights_only=False)["network_weights"])


def assert_same_result(one: Workspace, other: Workspace) -> None:
    for number in (0, 1):
        assert one.selection(number).read_bytes() == other.selection(number).read_bytes()
    expected, found = weights(one), weights(other)
    assert expected.keys() == found.keys()
    assert all((expected[name] == found[name]).all() for name in expected)
    assert (one.bundle / "model.onnx").read_bytes() == (other.bundle / "model.onnx").read_bytes()


def test_killed_twice_at_random_moments_the_loop_ends_the_same(toy: Workspace, phantoms: Path, tmp_path: Path) -> None:
    kill_and_resume(toy, phantoms, tmp_path / "run", 2, seed=1)
    assert_same_result(toy.workspace, Workspace(tmp_path / "run"))


@pytest.mark.long
def test_killed_ten_times_at_random_moments_the_loop_ends_the_same(toy: Toy, phantoms: Path, tmp_path: Path) -> None:
    kill_and_resume(toy, phantoms, tmp_path / "run", 10, seed=1)
    assert_same_result(toy.workspace, Workspace(tmp_path / "run"))


@pytest.fixture(scope="module")
def judged(phantoms: Path, tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A loop of four folds whose models start warm and are judged by those that never saw a case."""
    workspace = Workspace(tmp_path_factory.mktemp("judged") / "run")
    changes = {
        "training__folds": 4,
        "training__epochs": 3,
        "loop__held_out": True,
        "loop__warm_start": True,
        "loop__criterion": "all",
    }
    run_to_the_end(toy_command(phantoms, workspace.root, **changes))
    return workspace


@pytest.mark.long
def test_the_two_models_that_never_saw_a_pseudo_label_judge_its_scan(judged: Workspace, tmp_path: Path) -> None:
    splits = json.loads(judged.splits(iteration_dataset(1)).read_text())
    for case in accepted(judged, 0):
        unseen = [fold for fold, split in enumerate(splits) if case not in split["train"]]
        assert len(unseen) == 2
        assert read_row(judged.row(0, case)).models == 4
        row = read_row(judged.row(1, case))
        assert row.models == 2
        judges = [read_bundle(judged.fold_bundle(1, fold)) for fold in unseen]
        files = Files(judged.image(case), tmp_path / f"{case}.nii.gz", tmp_path / f"{case}.json")
        alone = Labeller(judges, load_config().labelling, 1, "cpu").label(files)
        assert row.agreement == alone.agreement
    for fold, split in enumerate(splits):
        text = judged.nnunet_log(iteration_dataset(1), fold).read_text()
        assert f"{len(split['train'])} training" in text


@pytest.mark.long
def test_a_warm_start_begins_where_the_same_fold_ended(judged: Workspace) -> None:
    for fold in range(4):
        cold, warm = (losses(judged, number, fold) for number in (0, 1))
        assert warm[0] < (cold[0] + cold[-1]) / 2
        assert (
            judged.model(iteration_dataset(0)).name
            in (json.loads(judged.plans(iteration_dataset(1)).read_text())["training"]["initial_weights"])
        )
    assert losses(judged, 2, "all")[0] < (losses(judged, 0, 0)[0] + losses(judged, 1, 0)[-1]) / 2


def losses(workspace: Workspace, number: int, fold: int | str) -> list[float]:
    """Training loss of each epoch, from nnU-Net's checkpoint."""
    import torch

    checkpoint = workspace.final_checkpoint(iteration_dataset(number), fold)
    return list(torch.load(checkpoint, map_location="cpu", weights_only=False)["logging"]["train_losses"])
