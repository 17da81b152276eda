"""What a run of the loop went through, read from its files: trainings, agreement, selections, seconds, and truth where it is.

For people who look back at a run (``train.report``); ``train.status`` says where it is.
"""

import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from inference.bundle import PLAN_NAME
from inference.resample import labels_to_working_grid
from inference.volume import VolumeError, read_labels
from train.agreement import Agreement, pairwise_dice
from train.config import Config, read_settings
from train.evaluate import find_masks
from train.labelling import read_row
from train.record import read_starts
from train.selection import Decision, read_selection
from train.workspace import Workspace, iteration_dataset

log = logging.getLogger(__name__)

FINAL = "all"
# A line of nnU-Net's log: time, then one of these.
EPOCH = re.compile(r": Epoch (\d+)\s*$")
VALUE = re.compile(r": (train_loss|val_loss|Epoch time:|Pseudo dice) (.*)$")
# np.float32(0.9423), 0.9423 or nan within brackets.
NUMBER = re.compile(r"(?<![\w.])(\d+(?:\.\d*)?(?:e[+-]?\d+)?|nan)(?=\s*[,)\]])")
PROGRESS_EVERY = 50


class HistoryError(ValueError):
    """A folder that is no run. The message names it and what was expected."""


@dataclass(frozen=True)
class Epoch:
    """One epoch of a training: both losses, mean pseudo Dice over the classes that were there (nan: none), seconds."""

    number: int
    train_loss: float
    validation_loss: float
    pseudo_dice: float
    seconds: float


@dataclass(frozen=True)
class Training:
    """One training: its fold, or "all" of the final model. ``device``: cuda, cpu, or None where it is not known."""

    fold: str
    epochs: tuple[Epoch, ...]
    seconds: float
    done: bool
    device: str | None


@dataclass(frozen=True)
class Turn:
    """One iteration. ``added``: pseudo-labelled cases among its training cases; the last turn is the final model alone.

    ``decisions``: empty before its selection. ``labelling_seconds``: of all its pseudo-labels. ``set_aside``: reason by case.
    """

    number: int
    added: int
    trainings: tuple[Training, ...]
    decisions: tuple[Decision, ...]
    labelling_seconds: float
    set_aside: Mapping[str, str]

    @property
    def accepted(self) -> int:
        return sum(decision.accepted for decision in self.decisions)

    @property
    def training_seconds(self) -> float:
        return sum(training.seconds for training in self.trainings)

    @property
    def on_gpu(self) -> bool | None:
        """Whether its trainings ran on a GPU; None where nothing says so."""
        devices = {training.device for training in self.trainings if training.device}
        return None if not devices else devices == {"cuda"}


@dataclass(frozen=True)
class History:
    """A whole run. ``turns``: those that were begun. ``unprepared``: scans that could not be used, reason by case."""

    workspace: Workspace
    config: Config
    labelled: tuple[str, ...]
    unlabelled: tuple[str, ...]
    turns: tuple[Turn, ...]
    starts: tuple[Mapping[str, Any], ...]
    unprepared: Mapping[str, str]
    done: bool

    @property
    def selected(self) -> tuple[Turn, ...]:
        """The iterations that chose their cases."""
        return tuple(turn for turn in self.turns if turn.decisions)


# By iteration, then case: DSC per organ of its pseudo-label against the truth.
Truths = dict[int, dict[str, Agreement]]


def read_history(root: Path) -> History:
    """Read a run. Raises HistoryError where there is none, and the errors of settings, rows and selections."""
    workspace = Workspace(root)
    if not workspace.settings.exists() or not workspace.cases.exists():
        raise HistoryError(
            f"{root}: holds no {workspace.settings.name} and {workspace.cases.name}; expected a run of `loop`"
        )
    config = read_settings(workspace.settings)
    cases = json.loads(workspace.cases.read_text(encoding="utf-8"))
    turns = []
    added = 0
    for number in range(config.loop.iterations + 1):
        turn = _read_turn(number, added, workspace, config)
        if not turn.trainings and not turn.decisions:
            break
        turns.append(turn)
        added = turn.accepted
    return History(
        workspace=workspace,
        config=config,
        labelled=tuple(cases["labelled"]),
        unlabelled=tuple(cases["unlabelled"]),
        turns=tuple(turns),
        starts=tuple(read_starts(workspace)),
        unprepared=_reasons(workspace.prepared_aside),
        done=(workspace.bundle / PLAN_NAME).exists(),
    )


def parse_epochs(text: str) -> tuple[Epoch, ...]:
    """The epochs of nnU-Net's log; of one that was trained again after a restart, the last time. Unfinished ones are left out."""
    found: dict[int, Epoch] = {}
    number: int | None = None
    values: dict[str, float] = {}
    for line in text.splitlines():
        if match := EPOCH.search(line):
            number, values = int(match.group(1)), {}
        elif number is not None and (match := VALUE.search(line)):
            name, rest = match.groups()
            values[name] = _mean(NUMBER.findall(rest)) if name == "Pseudo dice" else float(rest.split()[0])
            if len(values) == len(("train_loss", "val_loss", "Pseudo dice", "Epoch time:")):
                numbers = (values[key] for key in ("train_loss", "val_loss", "Pseudo dice", "Epoch time:"))
                found[number] = Epoch(number, *numbers)
    return tuple(found[key] for key in sorted(found))


def compare_with_truth(history: History, truth: Path, limit: int, seed: int = 0) -> Truths:
    """DSC of pseudo-labels against true label maps CASE.nii.gz on the scans' own grids, brought to the working grid.

    ``limit``: so many of the cases that have a truth, drawn by lot. Raises the errors of ``find_masks``; a case whose files
    cannot be read is logged and left out.
    """
    masks = find_masks(truth)
    cases = sorted(masks.keys() & set(history.unlabelled))
    if not cases:
        raise HistoryError(f"{truth}: holds a label map of none of the run's unlabelled cases; expected CASE.nii.gz")
    if len(cases) > limit:
        cases = sorted(np.random.default_rng(seed).choice(cases, limit, replace=False).tolist())
    found: Truths = {turn.number: {} for turn in history.selected}
    for number, case in enumerate(cases, start=1):
        try:
            _compare_case(case, masks[case], history, found)
        except (VolumeError, OSError, ValueError) as error:
            log.error("%s: not compared with its truth: %s", case, error)
        if number % PROGRESS_EVERY == 0 or number == len(cases):
            log.info("%d of %d cases compared with their truth", number, len(cases))
    return found


def _compare_case(case: str, truth: Path, history: History, found: Truths) -> None:
    labels = None
    for turn in history.selected:
        path = history.workspace.pseudo_label(turn.number, case)
        if path.exists():
            pseudo = read_labels(path).voxels
            if labels is None:
                labels = labels_to_working_grid(read_labels(truth).voxels, pseudo.shape)
            found[turn.number][case] = pairwise_dice([labels, pseudo])


def _read_turn(number: int, added: int, workspace: Workspace, config: Config) -> Turn:
    final = number == config.loop.iterations
    folds: Sequence[int | str] = (FINAL,) if final else range(config.training.folds)
    trainings = [_read_training(iteration_dataset(number), fold, workspace) for fold in folds]
    selection = workspace.selection(number)
    decisions = read_selection(selection).decisions if not final and selection.exists() else ()
    return Turn(
        number=number,
        added=added,
        trainings=tuple(training for training in trainings if training is not None),
        decisions=decisions,
        labelling_seconds=0.0 if final else _labelling_seconds(workspace.rows(number)),
        set_aside={} if final else _reasons(workspace.failures(number)),
    )


def _read_training(dataset: str, fold: int | str, workspace: Workspace) -> Training | None:
    """A training, None where none was begun."""
    path = workspace.nnunet_log(dataset, fold)
    if not path.exists():
        return None
    epochs = parse_epochs(path.read_text(encoding="utf-8", errors="replace"))
    facts = _read_json(workspace.training_facts(dataset, fold))
    progress = _read_json(workspace.progress(dataset, fold))
    device = facts.get("device")
    return Training(
        fold=str(fold),
        epochs=epochs,
        seconds=float(progress.get("seconds", sum(epoch.seconds for epoch in epochs))),
        done=workspace.final_checkpoint(dataset, fold).exists(),
        device=None if device is None else str(device).split(":")[0],
    )


def _labelling_seconds(rows: Path) -> float:
    if not rows.is_dir():
        return 0.0
    return sum(sum(read_row(path).seconds.values()) for path in sorted(rows.glob("*.json")))


def _reasons(folder: Path) -> dict[str, str]:
    if not folder.is_dir():
        return {}
    return {path.stem: path.read_text(encoding="utf-8").strip() for path in sorted(folder.glob("*.txt"))}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return {}
    return content


def _mean(words: Sequence[str]) -> float:
    values = [float(word) for word in words if word != "nan"]
    return sum(values) / len(values) if values else float("nan")
