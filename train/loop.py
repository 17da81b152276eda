"""The main path, read first: self-training, the paper's figure 2, as ``python -m train loop``.

Five models learn from the labelled scans, label the others, and where they agree the label joins the next training. In the
end one model learns from all that was accepted. Every step leaves a file and is passed over where the file exists, so the
same command, started again at any time, goes on.
"""

import argparse
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from inference.bundle import PLAN_NAME, read_bundle
from inference.engine import Device
from inference.volume import atomic_write
from train import cluster, nnunet
from train.budget import expected, measure_scans
from train.cluster import CaseWork, Executor, Job, Labels, Tick
from train.config import Config, load_config
from train.dataset import Case, DatasetError, labelled_cases, unlabelled_cases
from train.export import export
from train.labelling import Files, Labeller, read_row
from train.lock import locked
from train.prepare import prepare, write_organ_minima
from train.record import command_words, note, record_settings, record_start
from train.selection import Selection, criterion, read_selection, select, write_selection
from train.status import live_progress
from train.workspace import LABELLED_DATASET, Workspace, iteration_dataset

log = logging.getLogger(__name__)

# Settings that decide on the result; the rest may change when a run is started again.
FIXED = ("data", "prepare", "network", "training", "loop", "labelling", "inference", "export")
# Seconds that a training waits for one of a lost host that may not have noticed yet.
PATIENCE = 300.0
# Seconds that a start waits for the run: `status` holds its lock for a moment, to see whether anybody does.
GLANCE = 1.0
FINAL_FOLD = "all"


class LoopError(RuntimeError):
    """A loop that cannot go on. The message says what was found and what was expected."""


@dataclass(frozen=True)
class Cases:
    """Ids of the prepared cases, sorted."""

    labelled: tuple[str, ...]
    unlabelled: tuple[str, ...]


@dataclass(frozen=True)
class Iteration:
    """One turn of the loop. ``accepted``: pseudo-label of each case that the iteration before accepted."""

    number: int
    cases: Cases
    accepted: Mapping[str, Path]

    @property
    def dataset(self) -> str:
        """nnU-Net's name for its training cases."""
        return iteration_dataset(self.number)

    def splits(self, config: Config) -> tuple[nnunet.Split, ...]:
        """Who trains on what: labelled and accepted cases, dealt into folds."""
        left_out = 2 if config.loop.held_out else 1
        return nnunet.deal_folds(
            self.cases.labelled, sorted(self.accepted), config.training.folds, config.training.seed, left_out
        )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``python -m train loop``."""
    parser.add_argument("--data", metavar="DIR", type=Path, required=True, help="data set in FLARE22's layout")
    parser.add_argument("--out", metavar="RUN", type=Path, required=True, help="folder of the run")
    parser.add_argument("--config", metavar="FILE", type=Path, help="settings over the defaults of train/config.toml")
    parser.add_argument(
        "--set", metavar="KEY=VALUE", action="append", default=[], help="one setting: section.key=value"
    )
    parser.add_argument(
        "--ray-address", metavar="ADDRESS", help="a Ray cluster: HOST:PORT or auto; default: this machine"
    )
    parser.add_argument("--dry-run", action="store_true", help="say what the run will take, and stop")


def run(arguments: argparse.Namespace) -> int:
    """The whole loop; returns the exit code."""
    workspace = Workspace(arguments.out)
    try:
        config = load_config(arguments.config, arguments.set)
        labelled, unlabelled = find_cases(arguments.data, config)
        budget = expected(measure_scans([*labelled, *unlabelled], config), len(labelled), config)
        log.info("%s", budget.describe(workspace.root))
        if config.loop.check_disk:
            budget.check_disk(workspace.root)
        if arguments.dry_run:
            return 0
        with locked(workspace.lock, GLANCE):
            _log_into(workspace.log)
            check_data([*labelled, *unlabelled], workspace)
            record_settings(config, workspace, FIXED)
            record_start(command_words("loop", arguments), arguments.data, workspace)
            cores = config.training.threads, config.cluster.labelling_threads
            with cluster.connect(
                arguments.ray_address, workspace.root, config.training.device, cores, config.cluster.retries
            ) as executor:
                _write_json(
                    workspace.machine, {"training": executor.training_slots, "labelling": executor.labelling_slots}
                )
                log.info(
                    "%d trainings and %d labelling workers run side by side",
                    executor.training_slots,
                    executor.labelling_slots,
                )
                self_train(labelled, unlabelled, config, workspace, executor)
    except (ValueError, RuntimeError) as error:
        log.error("%s", error)
        return 1
    except OSError as error:  # a full disk says neither where nor what next
        log.error("%s: %s; what was finished is kept, the same command goes on", workspace.root, error)
        return 1
    return 0


def self_train(
    labelled: Sequence[Case], unlabelled: Sequence[Case], config: Config, workspace: Workspace, executor: Executor
) -> None:
    """The paper's figure 2, from scans to one bundle. What is done already is kept."""
    tick = live_progress(workspace, config)
    cases = prepare_cases(labelled, unlabelled, config, workspace)
    plan_network(cases, config, workspace)
    iteration = Iteration(0, cases, {})
    for _ in range(config.loop.iterations):
        log.info("iteration %d: %d labelled, %d accepted cases", iteration.number, *_counts(iteration))
        if not workspace.selection(iteration.number).exists():
            fit_folds(iteration, config, workspace, executor, tick)
            label(iteration, config, workspace, executor, tick)
            choose(iteration, config, workspace)
        iteration = following(iteration, config, workspace)
    fit_final(iteration, config, workspace, executor, tick)


def find_cases(data: Path, config: Config) -> tuple[tuple[Case, ...], tuple[Case, ...]]:
    """Labelled and unlabelled cases of a data set, and all that can be known to be wrong before any work.

    Raises DatasetError.
    """
    labelled = labelled_cases(data, config.data)
    if len(labelled) < config.training.folds:
        raise DatasetError(
            f"{data / config.data.images}: {len(labelled)} labelled cases; expected at least {config.training.folds}, "
            "one to validate each fold (training.folds)"
        )
    unlabelled = unlabelled_cases(data, config.data) if config.loop.iterations else ()
    for name in sorted({case.id for case in labelled} & {case.id for case in unlabelled}):
        raise DatasetError(f"{data}: {name} is a labelled and an unlabelled case; expected a name for each")
    return labelled, unlabelled


def check_data(cases: Sequence[Case], workspace: Workspace) -> None:
    """Note which scans a run is about, or see that they are the same: names, and bytes of their files. Raises LoopError."""
    found = {case.id: sum(path.stat().st_size for path in _files(case)) for case in cases}
    if not workspace.data.exists():
        _write_json(workspace.data, found)
        return
    recorded = json.loads(workspace.data.read_text(encoding="utf-8"))
    changed = sorted(case for case in found.keys() | recorded.keys() if found.get(case) != recorded.get(case))
    if changed:
        raise LoopError(
            f"{workspace.root} was started with other scans ({len(changed)} differ, such as {changed[0]}): use a new folder"
        )


def prepare_cases(labelled: Sequence[Case], unlabelled: Sequence[Case], config: Config, workspace: Workspace) -> Cases:
    """Bring every scan onto the working grid, once; who could be prepared stays fixed for the run. Raises LoopError."""
    if workspace.cases.exists():
        recorded = json.loads(workspace.cases.read_text(encoding="utf-8"))
        return Cases(tuple(recorded["labelled"]), tuple(recorded["unlabelled"]))
    cases = Cases(prepare(labelled, config, workspace), prepare(unlabelled, config, workspace))
    if len(cases.labelled) < config.training.folds:
        raise LoopError(
            f"{len(cases.labelled)} of {len(labelled)} labelled cases could be prepared; expected at least "
            f"{config.training.folds} (training.folds)"
        )
    write_organ_minima(cases.labelled, workspace)
    _write_json(workspace.cases, asdict(cases))
    note({"labelled_cases": len(cases.labelled), "unlabelled_cases": len(cases.unlabelled)}, workspace)
    return cases


def plan_network(cases: Cases, config: Config, workspace: Workspace) -> None:
    """Patch, network and intensities, from the labelled cases; they stay over all iterations."""
    if not workspace.plans(LABELLED_DATASET).exists():
        nnunet.write_dataset(LABELLED_DATASET, cases.labelled, config, workspace)
        nnunet.make_plan(LABELLED_DATASET, config, workspace)


def fit_folds(iteration: Iteration, config: Config, workspace: Workspace, executor: Executor, tick: Tick) -> None:
    """Train and export one model per fold, side by side where there is room."""
    todo = [
        fold
        for fold in range(config.training.folds)
        if not (workspace.fold_bundle(iteration.number, fold) / PLAN_NAME).exists()
    ]
    if not todo:
        return
    write_training_set(iteration, config, workspace)
    jobs = [fit_job(iteration, fold, workspace.fold_bundle(iteration.number, fold), config, workspace) for fold in todo]
    executor.train(jobs, tick)


def fit_final(iteration: Iteration, config: Config, workspace: Workspace, executor: Executor, tick: Tick) -> None:
    """Train the one model on all labelled and accepted cases, and export it: what the inference image bakes in."""
    if (workspace.bundle / PLAN_NAME).exists():
        log.info("the loop is done: %s", workspace.bundle)
        return
    log.info("final model: %d labelled, %d accepted cases", *_counts(iteration))
    write_training_set(iteration, config, workspace)
    note({"accepted_cases": len(iteration.accepted), "iterations": iteration.number}, workspace)
    executor.train([fit_job(iteration, FINAL_FOLD, workspace.bundle, config, workspace)], tick)
    log.info("the loop is done: %s", workspace.bundle)


def write_training_set(iteration: Iteration, config: Config, workspace: Workspace) -> None:
    """Data set, plan, preprocessed cases and folds of an iteration, as nnU-Net wants them."""
    dataset, settings = iteration.dataset, iteration_settings(iteration.number, config)
    if not workspace.splits(dataset).exists():
        nnunet.write_dataset(dataset, iteration.cases.labelled, config, workspace, iteration.accepted)
        nnunet.share_plan(dataset, workspace)
        earlier = [iteration_dataset(number) for number in reversed(range(iteration.number))]
        nnunet.preprocess(dataset, config, workspace, earlier)
        nnunet.write_splits(dataset, iteration.splits(config), workspace)
    nnunet.set_training(settings.training, dataset, workspace, warm_start_of(iteration.number, config))


def fit_job(iteration: Iteration, fold: int | str, out: Path, config: Config, workspace: Workspace) -> Job:
    """One training with its export, as a job for any process on any host that sees the run's folder."""
    settings = iteration_settings(iteration.number, config)
    warm_start = warm_start_of(iteration.number, config)
    work = partial(fit, iteration.dataset, fold, out.resolve(), settings, _absolute(workspace), warm_start)
    name = f"iteration {iteration.number} fold {fold}"
    return Job(name, work, _absolute(workspace).job_log(iteration.number, f"fold_{fold}"))


def fit(dataset: str, fold: int | str, out: Path, config: Config, workspace: Workspace, warm_start: str | None) -> None:
    """Train a fold, or go on with it, and export its bundle to ``out``."""
    with locked(workspace.fold_lock(dataset, fold), PATIENCE):
        nnunet.train(dataset, fold, config, workspace, warm_start)
        if not (out / PLAN_NAME).exists():
            # The model that leaves the run is held against nnU-Net's own predictor, the others are not worth the time.
            # And it alone folds auxiliary classes into the background: the others teach them to the next iteration.
            final = fold == FINAL_FOLD
            case = nnunet.read_cases(dataset, workspace)[0] if final else None
            export(workspace.final_checkpoint(dataset, fold), dataset, config, workspace, out, case, not final)


def label(iteration: Iteration, config: Config, workspace: Workspace, executor: Executor, tick: Tick) -> None:
    """All models of the iteration on all unlabelled cases: a pseudo-label and a row each. Raises LoopError."""
    number, workspace = iteration.number, _absolute(workspace)
    files = files_of("case", number, config, workspace)
    for path in (files.label, files.training_label, files.row, workspace.failure(number, "case")):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
    todo = [
        case
        for case in iteration.cases.unlabelled
        if not workspace.row(number, case).exists() and not workspace.failure(number, case).exists()
    ]
    if todo:
        log.info("label: %d of %d cases to do", len(todo), len(iteration.cases.unlabelled))
        load = partial(load_labeller, number, _leave_out(iteration, config), config, workspace)
        aside = partial(_set_aside, number, workspace)
        labels = Labels(load, todo, config.cluster.attempts, aside, workspace.job_log(number, "labelling"))
        executor.label(labels, tick)
    failed = len(_failed(iteration, workspace))
    if failed:
        log.warning("label: %d cases are set aside, see %s", failed, workspace.failures(number))
    if failed == len(iteration.cases.unlabelled):
        raise LoopError(f"{workspace.failures(number)}: not one case could be labelled; expected at least one")


def load_labeller(
    number: int, leave_out: Mapping[str, tuple[int, ...]], config: Config, workspace: Workspace
) -> CaseWork:
    """Load the models of an iteration. Returns what labels a case, in the process that calls it."""
    bundles = [read_bundle(workspace.fold_bundle(number, fold)) for fold in range(config.training.folds)]
    device: Device = "cpu" if config.training.device == "cpu" else "auto"
    labeller = Labeller(bundles, config.labelling, config.cluster.labelling_threads, device)

    def work(case: str) -> None:
        labeller.label(files_of(case, number, config, workspace), leave_out.get(case, ()))
        log.info("labelled %s", case)

    return work


def files_of(case: str, number: int, config: Config, workspace: Workspace) -> Files:
    """What labelling a case in an iteration reads and writes."""
    before = workspace.pseudo_label(number - 1, case)
    return Files(
        image=workspace.image(case),
        label=workspace.pseudo_label(number, case),
        row=workspace.row(number, case),
        training_label=workspace.training_pseudo_label(number, case) if config.data.auxiliary_classes else None,
        previous=before if number and before.exists() else None,
    )


def choose(iteration: Iteration, config: Config, workspace: Workspace) -> Selection:
    """Decide which pseudo-labels the next iteration trains on, and write it down: the iteration is done."""
    number = iteration.number
    failed = _failed(iteration, workspace)
    rows = [read_row(workspace.row(number, case)) for case in iteration.cases.unlabelled if case not in failed]
    seed = iteration_seed(number, config)
    selection = select(rows, criterion(config.loop.criterion, seed, config.loop.random_cases), config.loop.threshold)
    write_selection(workspace.selection(number), selection)
    return selection


def following(iteration: Iteration, config: Config, workspace: Workspace) -> Iteration:
    """The iteration after one that is done. Says so loudly where nothing was accepted."""
    number = iteration.number
    accepted = read_selection(workspace.selection(number)).accepted
    if not accepted:
        log.warning(
            "!!! ITERATION %d ACCEPTED NO CASE !!! The next training has the labelled cases alone. %s says which organ "
            "kept each case out; loop.threshold and loop.criterion decide.",
            number,
            workspace.selection(number),
        )
    label = workspace.training_pseudo_label if config.data.auxiliary_classes else workspace.pseudo_label
    return Iteration(number + 1, iteration.cases, {case: label(number, case) for case in accepted})


def iteration_settings(number: int, config: Config) -> Config:
    """The settings of an iteration's trainings: their epochs, and a seed of their own."""
    epochs = config.loop.epochs[number] if number < len(config.loop.epochs) else config.training.epochs
    return replace(config, training=replace(config.training, epochs=epochs, seed=iteration_seed(number, config)))


def iteration_seed(number: int, config: Config) -> int:
    """A seed drawn from the run's and the iteration's number; the trainer adds fold and epoch."""
    return int(np.random.SeedSequence([config.training.seed, number]).generate_state(1)[0] >> 1)


def warm_start_of(number: int, config: Config) -> str | None:
    """The data set whose models an iteration starts from, None: from scratch."""
    return iteration_dataset(number - 1) if config.loop.warm_start and number else None


def _leave_out(iteration: Iteration, config: Config) -> dict[str, tuple[int, ...]]:
    """With loop.held_out, the models that trained on each accepted case: they have no say on it."""
    if not config.loop.held_out:
        return {}
    splits = iteration.splits(config)
    return {
        case: tuple(fold for fold, split in enumerate(splits) if case in split.train) for case in iteration.accepted
    }


def _set_aside(number: int, workspace: Workspace, case: str, reason: str) -> None:
    atomic_write(workspace.failure(number, case), f"{reason}\n".encode())


def _failed(iteration: Iteration, workspace: Workspace) -> set[str]:
    return {case for case in iteration.cases.unlabelled if workspace.failure(iteration.number, case).exists()}


def _files(case: Case) -> list[Path]:
    return [path for path in (case.image, case.label, case.auxiliary) if path is not None]


def _counts(iteration: Iteration) -> tuple[int, int]:
    return len(iteration.cases.labelled), len(iteration.accepted)


def _absolute(workspace: Workspace) -> Workspace:
    """The workspace for other processes, whose working folder may be another."""
    return Workspace(workspace.root.resolve())


def _log_into(path: Path) -> None:
    """Keep what the loop says beside the run, too."""
    file = logging.FileHandler(path, encoding="utf-8")
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname).1s %(message)s"))
    logging.getLogger().addHandler(file)


def _write_json(path: Path, content: object) -> None:
    atomic_write(path, (json.dumps(content, indent=1) + "\n").encode())
