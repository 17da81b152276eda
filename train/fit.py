"""``python -m train fit``: prepare a data set, train nnU-Net on it, export the bundle. Starting it again goes on."""

import argparse
import datetime
import json
import logging
import shlex
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from inference.volume import atomic_write
from train import nnunet
from train.config import Config, ConfigError, load_config, read_settings
from train.dataset import labelled_cases
from train.export import export, git_commit, package_versions, parse_fold
from train.prepare import prepare, write_organ_minima
from train.workspace import LABELLED_DATASET, Workspace

log = logging.getLogger(__name__)

# What is made once per run; the rest may change when a run is started again.
FIXED = ("data", "prepare", "network")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``python -m train fit``."""
    parser.add_argument("--data", metavar="DIR", type=Path, required=True, help="data set in FLARE22's layout")
    parser.add_argument("--out", metavar="RUN", type=Path, required=True, help="folder of the run")
    parser.add_argument("--config", metavar="FILE", type=Path, help="settings over the defaults of train/config.toml")
    parser.add_argument(
        "--set", metavar="KEY=VALUE", action="append", default=[], help="one setting: section.key=value"
    )
    parser.add_argument("--fold", default="all", help="all: one model on every case (default), or a fold's number")


def run(arguments: argparse.Namespace) -> int:
    """Prepare, train, export to RUN/bundle; returns the exit code."""
    workspace = Workspace(arguments.out)
    try:
        config = load_config(arguments.config, arguments.set)
        fold = parse_fold(arguments.fold)
        _record(config, arguments, workspace)
        fit(arguments.data, fold, config, workspace)
    except (ValueError, RuntimeError, OSError) as error:
        log.error("%s", error)
        return 1
    return 0


def fit(data: Path, fold: int | str, config: Config, workspace: Workspace) -> None:
    """The whole way from a folder of labelled scans to a bundle; what is done already is kept."""
    cases = labelled_cases(data, config.data)
    ready = prepare(cases, config, workspace)
    if not ready:
        raise nnunet.TrainingError(
            f"{data}: none of {len(cases)} labelled cases could be prepared; expected at least one"
        )
    write_organ_minima(ready, workspace)
    _train(ready, fold, config, workspace)
    _note_cases(len(ready), fold, workspace)
    export(workspace.final_checkpoint(LABELLED_DATASET, fold), LABELLED_DATASET, config, workspace, workspace.bundle)


def _train(cases: Sequence[str], fold: int | str, config: Config, workspace: Workspace) -> None:
    nnunet.write_dataset(LABELLED_DATASET, cases, config, workspace)
    nnunet.make_plan(LABELLED_DATASET, config, workspace)
    nnunet.preprocess(LABELLED_DATASET, config, workspace)
    splits = nnunet.deal_folds(cases, (), config.training.folds, config.training.seed)
    nnunet.write_splits(LABELLED_DATASET, splits, workspace)
    nnunet.train(LABELLED_DATASET, fold, config, workspace)


def _record(config: Config, arguments: argparse.Namespace, workspace: Workspace) -> None:
    """Write the run's settings and origin. Raises ConfigError when the folder holds a run that does not fit."""
    if workspace.settings.exists():
        before, now = asdict(read_settings(workspace.settings)), asdict(config)
        for section in FIXED:
            for key, value in before[section].items():
                if key != "workers" and now[section][key] != value:
                    found = now[section][key]
                    raise ConfigError(
                        f"{section}.{key} is {found!r}; {workspace.root} was started with {value!r}: use a new folder"
                    )
    workspace.root.mkdir(parents=True, exist_ok=True)
    atomic_write(workspace.settings, config.to_json().encode())
    provenance = {
        "command": _command(arguments),
        "data": arguments.data.resolve().name,
        "started": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "versions": package_versions(),
        "commit": git_commit(),
    }
    if not workspace.provenance.exists():
        atomic_write(workspace.provenance, (json.dumps(provenance, indent=1) + "\n").encode())


def _command(arguments: argparse.Namespace) -> str:
    """The command as anyone could repeat it: folders by name, wherever they lay."""
    words = [
        "python",
        "-m",
        "train",
        "fit",
        "--data",
        arguments.data.resolve().name,
        "--out",
        arguments.out.resolve().name,
    ]
    if arguments.config is not None:
        words += ["--config", _shown(arguments.config)]
    for setting in arguments.set:
        words += ["--set", setting]
    return shlex.join([*words, "--fold", arguments.fold])


def _shown(path: Path) -> str:
    return path.name if path.is_absolute() else str(path)


def _note_cases(count: int, fold: int | str, workspace: Workspace) -> None:
    """Add to the run's origin how many cases it learned from."""
    recorded = json.loads(workspace.provenance.read_text(encoding="utf-8"))
    recorded |= {"cases": count, "fold": fold}
    atomic_write(workspace.provenance, (json.dumps(recorded, indent=1) + "\n").encode())
