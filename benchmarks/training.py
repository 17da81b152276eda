"""An iteration of training on a CPU: nnU-Net's own beside ours, on the same batches of the same network.

    python -m benchmarks.training [--config train/wide.toml] [--repeats 3]      # some minutes on two cores

Both sides are the trainer of train/trainer; nnU-Net's side has the methods taken out that make ours fast, so that it inherits
nnU-Net's. They run in turns, a process each, and the ratio of their medians is printed.
"""

import argparse
import json
import logging
import os
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from inspect import isfunction
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import Any

from benchmarks.sides import CACHE, ROOT
from train import nnunet
from train.config import Config, load_config
from train.dataset import labelled_cases
from train.phantom.cohort import Recipe, write_dataset
from train.prepare import prepare
from train.workspace import CONFIGURATION, LABELLED_DATASET, PLANS, TRAINER, Workspace

log = logging.getLogger("benchmarks.training")

SIDES = ("nnU-Net", "ours")
CASES = 4
WARM_UP, ITERATIONS = 4, 12
SETTINGS = ("training.device=cpu", "training.augmentation_workers=0", "training.folds=2", "training.start_from=")


def make_run(config: Config, workspace: Workspace) -> None:
    """Phantoms, prepared and planned, up to where a training begins; what is there stays."""
    data = CACHE / "training-data"
    if len(list((data / "labelsTr").glob("*.nii.gz"))) < CASES:
        recipe = Recipe(spacing=(4.0, 2.0, 2.0), auxiliary=True)
        write_dataset(data, CASES, 0, 0, seed=1, recipe=recipe, jobs=len(os.sched_getaffinity(0)))
    ready = prepare(labelled_cases(data, config.data), config, workspace)
    nnunet.write_dataset(LABELLED_DATASET, ready, config, workspace)
    nnunet.make_plan(LABELLED_DATASET, config, workspace)
    nnunet.preprocess(LABELLED_DATASET, config, workspace)
    splits = nnunet.deal_folds(ready, (), config.training.folds, config.training.seed)
    nnunet.write_splits(LABELLED_DATASET, splits, workspace)
    nnunet.set_training(config.training, LABELLED_DATASET, workspace)


def iterate(side: str, config: Config, workspace: Workspace) -> dict[str, Any]:
    """Seconds of each iteration after the first few, and peak MiB, of one side in this process."""
    with nnunet.environment(config, workspace):
        import torch
        from nnunetv2.run.run_training import get_trainer_from_args

        torch.set_num_threads(config.training.threads or len(os.sched_getaffinity(0)))
        trainer = get_trainer_from_args(
            LABELLED_DATASET, CONFIGURATION, "all", TRAINER, PLANS, device=torch.device("cpu")
        )
        if side == "nnU-Net":
            for name in fast_methods(type(trainer), sys.modules["cpu_training"]):
                delattr(type(trainer), name)
        trainer.on_train_start()
        seconds = []
        for _ in range(WARM_UP + ITERATIONS):
            batch = next(trainer.dataloader_train)
            start = time.monotonic()
            trainer.train_step(batch)
            seconds.append(time.monotonic() - start)
    return {"seconds": seconds[WARM_UP:], "mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def fast_methods(trainer: type, fast: ModuleType) -> list[str]:
    """What ``trainer`` does its own way on a CPU: the methods it overrides that ask whether it is on one, or use ``fast``.

    Its constructor only notes where it is. Raises RuntimeError where there is none: then both sides would be the same.
    """
    wanted = {name for name, value in vars(fast).items() if getattr(value, "__module__", "") == fast.__name__}
    wanted.add("on_cpu")
    found = [
        name
        for name, method in vars(trainer).items()
        if name != "__init__" and isfunction(method) and hasattr(trainer.__base__, name)
        if wanted & set(method.__code__.co_names)
    ]
    if not found:
        raise RuntimeError(f"{trainer.__name__} overrides nothing for a CPU; expected what makes it fast there")
    return found


def run_side(side: str, arguments: Sequence[str]) -> dict[str, Any]:
    """``iterate`` in a process of its own. Raises RuntimeError with what it said where it fails."""
    command = [sys.executable, "-m", "benchmarks.training", "--side", side, *arguments]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)}: exit code {process.returncode}\n{process.stderr[-3000:]}")
    result: dict[str, Any] = json.loads(process.stdout.splitlines()[-1])
    return result


def main() -> int:
    """Run both sides in turns and print the ratio; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=ROOT / "train" / "wide.toml", help="settings of the training")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each side")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    config = load_config(arguments.config, SETTINGS)
    workspace = Workspace(CACHE / f"training-{arguments.config.stem}")
    if arguments.side:
        sys.stdout.write("\n" + json.dumps(iterate(arguments.side, config, workspace)))
        return 0
    make_run(config, workspace)
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    for number in range(arguments.repeats):
        for side in SIDES:
            log.info("run %d of %d: %s", number + 1, arguments.repeats, side)
            runs[side].append(run_side(side, ["--config", str(arguments.config.resolve())]))
    medians = {side: median(second for run in runs[side] for second in run["seconds"]) for side in SIDES}
    for side in SIDES:
        memory = max(run["mib"] for run in runs[side])
        sys.stdout.write(f"{side:8} {medians[side]:6.2f} s an iteration, at most {memory:.0f} MiB\n")
    sys.stdout.write(f"ours is {medians['nnU-Net'] / medians['ours']:.1f} times faster\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
