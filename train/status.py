"""``python -m train status RUN``: where a loop is, read from its files alone, so from any host and at any time."""

import argparse
import json
import logging
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from inference.bundle import PLAN_NAME
from train.config import Config, read_settings
from train.labelling import Row, read_row
from train.lock import is_locked
from train.selection import criterion, read_selection
from train.workspace import Workspace, iteration_dataset

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Fold:
    """A training. ``fraction``: share that is done, [0, 1]. ``seconds``: trained so far. ``epochs``: of how many."""

    name: str
    epoch: int
    epochs: int
    fraction: float
    seconds: float
    done: bool

    @property
    def whole_seconds(self) -> float | None:
        """How long the training takes in all; None before its first epoch has ended."""
        return self.seconds / self.fraction if self.fraction and self.seconds else None


@dataclass(frozen=True)
class Turn:
    """An iteration. ``accepted`` counts what the criterion accepts of the cases labelled so far."""

    number: int
    folds: tuple[Fold, ...]
    cases: int
    labelled: int
    set_aside: int
    accepted: int
    case_seconds: float | None
    selected: bool


@dataclass(frozen=True)
class Status:
    """Where a run is. ``turns``: its iterations; the last is the final model. ``slots``: jobs side by side."""

    run: Path
    alive: bool
    prepared: int
    turns: tuple[Turn, ...]
    slots: Mapping[str, int]
    done: bool
    quiet_seconds: float

    @property
    def current(self) -> Turn:
        """The first iteration that is not done, or the last one."""
        return next((turn for turn in self.turns if not turn.selected), self.turns[-1])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``python -m train status``."""
    parser.add_argument("run", metavar="RUN", type=Path, help="folder of a run of `loop`")
    parser.add_argument("--json", action="store_true", help="for programs")


def run(arguments: argparse.Namespace) -> int:
    """Say where a run is; returns the exit code."""
    workspace = Workspace(arguments.run)
    try:
        config = read_settings(workspace.settings)
        status = read_status(workspace, config)
    except (ValueError, OSError) as error:
        log.error("%s", error)
        return 1
    sys.stdout.write(_as_json(status) if arguments.json else describe(status))
    return 0


def read_status(workspace: Workspace, config: Config) -> Status:
    """Everything about a run that its files say."""
    cases = _read_json(workspace.cases)
    unlabelled = len(cases["unlabelled"]) if cases else 0
    turns = [_turn(number, unlabelled, workspace, config) for number in range(config.loop.iterations)]
    final = _fold(iteration_dataset(config.loop.iterations), "all", "final", workspace, config, config.loop.iterations)
    done = (workspace.bundle / PLAN_NAME).exists()
    turns.append(Turn(config.loop.iterations, (final,), 0, 0, 0, 0, None, done))
    return Status(
        run=workspace.root,
        alive=is_locked(workspace.lock),
        prepared=_count(workspace.prepared / "images"),
        turns=tuple(turns),
        slots=_read_json(workspace.machine) or {"training": 1, "labelling": 1},
        done=done,
        quiet_seconds=_quiet(workspace, turns),
    )


def seconds_left(status: Status) -> float | None:
    """Expected time until the run is done; None before anything was measured."""
    if status.done:
        return 0.0
    per_epoch = [fold.whole_seconds / fold.epochs for turn in status.turns for fold in turn.folds if fold.whole_seconds]
    per_case = [turn.case_seconds for turn in status.turns if turn.case_seconds]
    if not per_epoch:
        return None
    epoch, case = per_epoch[-1], per_case[-1] if per_case else 0.0
    seconds = 0.0
    for turn in status.turns:
        if not turn.selected:
            left = sum(epoch * fold.epochs * (1 - fold.fraction) for fold in turn.folds if not fold.done)
            seconds += left / max(1, min(status.slots["training"], len(turn.folds)))
            seconds += case * (turn.cases - turn.labelled - turn.set_aside) / max(1, status.slots["labelling"])
    return seconds


def summary(status: Status) -> str:
    """One line for a log."""
    turn = status.current
    final = turn is status.turns[-1]
    name = "final model" if final else f"iteration {turn.number} of {len(status.turns) - 1}"
    trained = ", ".join(
        f"{fold.name} {'done' if fold.done else f'epoch {fold.epoch}/{fold.epochs}'}"
        for fold in turn.folds
        if fold.done or fold.epoch
    )
    parts = [name, trained or "no epoch trained yet"]
    if turn.labelled or (not final and all(fold.done for fold in turn.folds)):
        parts.append(f"{turn.labelled} of {turn.cases} cases labelled, {turn.accepted} accepted so far")
    if turn.set_aside:
        parts.append(f"{turn.set_aside} set aside")
    left = seconds_left(status)
    parts.append("done" if status.done else "time left unknown yet" if left is None else f"about {_span(left)} left")
    return "; ".join(parts)


def describe(status: Status) -> str:
    """A table for people."""
    state = "done" if status.done else "running" if status.alive else "stopped; the same loop command goes on"
    lines = [f"{status.run}: {state}", f"{status.prepared} cases prepared", ""]
    lines.append(
        f"{'iteration':10} {'fold':6} {'epoch':>11} {'minutes':>8} {'labelled':>13} {'accepted':>9}  set aside"
    )
    for turn in status.turns:
        for index, fold in enumerate(turn.folds):
            number = str(turn.number) if index == 0 else ""
            labels = ""
            if index == 0 and turn.cases:
                labels = f"{f'{turn.labelled} of {turn.cases}':>13} {turn.accepted:>9}  {turn.set_aside or ''}"
            epoch = f"{fold.epoch}/{fold.epochs}" if fold.epoch or not fold.done else "done"
            lines.append(f"{number:10} {fold.name:6} {epoch:>11} {fold.seconds / 60:8.1f} {labels}".rstrip())
    lines += ["", summary(status)]
    if status.alive:
        lines.append(f"last sign of life {_span(status.quiet_seconds)} ago")
    return "\n".join(lines) + "\n"


def live_progress(workspace: Workspace, config: Config) -> Callable[[], None]:
    """A function that logs where the run is, at most every ``cluster.progress_seconds`` and only what is new."""
    last, said = time.monotonic(), ""

    def tick() -> None:
        nonlocal last, said
        if time.monotonic() - last < config.cluster.progress_seconds:
            return
        last = time.monotonic()
        line = summary(read_status(workspace, config))
        if line != said:
            log.info("%s", line)
            said = line

    return tick


def _turn(number: int, cases: int, workspace: Workspace, config: Config) -> Turn:
    dataset = iteration_dataset(number)
    folds = tuple(
        _fold(dataset, fold, f"fold {fold}", workspace, config, number) for fold in range(config.training.folds)
    )
    rows = _rows(workspace.rows(number))
    selected = workspace.selection(number).exists()
    accepted = len(_accepted(workspace.selection(number))) if selected else _accepted_so_far(rows, config)
    seconds = [sum(row.seconds.values()) for row in rows]
    return Turn(
        number=number,
        folds=folds,
        cases=cases,
        labelled=len(rows),
        set_aside=_count(workspace.failures(number)),
        accepted=accepted,
        case_seconds=sum(seconds) / len(seconds) if seconds else None,
        selected=selected,
    )


def _fold(dataset: str, fold: int | str, name: str, workspace: Workspace, config: Config, number: int) -> Fold:
    epochs = config.loop.epochs[number] if number < len(config.loop.epochs) else config.training.epochs
    progress = _read_json(workspace.progress(dataset, fold)) or {"epoch": 0, "fraction": 0.0, "seconds": 0.0}
    done = workspace.final_checkpoint(dataset, fold).exists()
    fraction = 1.0 if done else float(progress["fraction"])
    return Fold(name, progress["epoch"], epochs, fraction, float(progress["seconds"]), done)


def _rows(folder: Path) -> list[Row]:
    if not folder.is_dir():
        return []
    return [_row(path) for path in sorted(folder.glob("*.json"))]


@lru_cache(maxsize=100_000)
def _row(path: Path) -> Row:
    """A row; it never changes once it is there."""
    return read_row(path)


@lru_cache(maxsize=1000)
def _accepted(path: Path) -> tuple[str, ...]:
    return read_selection(path).accepted


def _accepted_so_far(rows: list[Row], config: Config) -> int:
    loop = config.loop
    if loop.criterion == "random":
        return min(len(rows), loop.random_cases)
    rule = criterion(loop.criterion)
    return sum(rule.accepts(score, loop.threshold) for score in rule.scores(rows))


def _quiet(workspace: Workspace, turns: list[Turn]) -> float:
    """Seconds since a file of the run changed that changes while it works."""
    files = [workspace.log]
    for turn in turns:
        dataset = iteration_dataset(turn.number)
        files += [workspace.progress(dataset, fold) for fold in (*range(len(turn.folds)), "all")]
        files.append(workspace.rows(turn.number))
    times = [file.stat().st_mtime for file in files if file.exists()]
    return max(0.0, time.time() - max(times)) if times else 0.0


def _count(folder: Path) -> int:
    if not folder.is_dir():
        return 0
    return sum(not entry.name.startswith(".") for entry in folder.iterdir())


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    return content


def _as_json(status: Status) -> str:
    content = {
        "run": str(status.run),
        "running": status.alive,
        "done": status.done,
        "seconds_left": seconds_left(status),
        "iterations": [
            {
                "number": turn.number,
                "folds": [vars(fold) for fold in turn.folds],
                "cases": turn.cases,
                "labelled": turn.labelled,
                "set_aside": turn.set_aside,
                "accepted": turn.accepted,
                "done": turn.selected,
            }
            for turn in status.turns
        ],
    }
    return json.dumps(content, indent=1) + "\n"


def _span(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 2 * 86400 else f"{seconds / 86400:.1f} days"
