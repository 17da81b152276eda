"""``python -m train fit``: prepare a data set, train nnU-Net on it, export the bundle. Starting it again goes on."""

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

from train import nnunet
from train.config import Config, load_config
from train.dataset import labelled_cases
from train.export import export, parse_fold
from train.prepare import prepare, write_organ_minima
from train.record import command_words, note, record_settings, record_start
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
        record_settings(config, workspace, FIXED)
        record_start([*command_words("fit", arguments), "--fold", arguments.fold], arguments.data, workspace)
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
    note({"cases": len(ready), "fold": fold}, workspace)
    export(workspace.final_checkpoint(LABELLED_DATASET, fold), LABELLED_DATASET, config, workspace, workspace.bundle)


def _train(cases: Sequence[str], fold: int | str, config: Config, workspace: Workspace) -> None:
    nnunet.write_dataset(LABELLED_DATASET, cases, config, workspace)
    nnunet.make_plan(LABELLED_DATASET, config, workspace)
    nnunet.preprocess(LABELLED_DATASET, config, workspace)
    splits = nnunet.deal_folds(cases, (), config.training.folds, config.training.seed)
    nnunet.write_splits(LABELLED_DATASET, splits, workspace)
    nnunet.train(LABELLED_DATASET, fold, config, workspace)
