"""What labelling costs: five models in one pass against five runs of nnU-Net's own command, and memory.

    python -m benchmarks.labelling compare RUN SCANS   # RUN: of `python -m train fit`; SCANS: a folder of CASE_0000.nii.gz
    python -m benchmarks.labelling memory RUN          # the same process over 5 and over 50 cases
    python -m benchmarks.labelling paper               # the same process with five networks of the paper's size

Each figure is of a process of its own, start-up and imports included, on whatever this machine is. A run has one network;
it stands in for all five models, which costs the same. Both sides get the scans as they lie on disk, the same window step
and no mirroring.
"""

import argparse
import hashlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from inference.bundle import FORMAT_VERSION, Bundle, Intensity, Model, Plan, read_bundle, write_bundle
from inference.engine import cuda_available
from inference.organs import CLASSES, ORGANS
from inference.resample import labels_to_working_grid
from inference.volume import ORIENTATION, read_labels, write_volume
from train.config import Config, load_config, read_settings
from train.dataset import Case
from train.export import export, to_onnx
from train.labelling import Files, Labeller, working_set
from train.metrics import dice
from train.nnunet import TRAINER_FOLDER, architecture
from train.prepare import prepare_case
from train.workspace import CONFIGURATION, LABELLED_DATASET, PLANS, TRAINER, Workspace

log = logging.getLogger("benchmarks.labelling")

MODELS = 5
CHANNEL = "_0000.nii.gz"


@dataclass(frozen=True)
class Usage:
    """Of a command and its children: wall-clock and CPU seconds, largest resident set of one process in MiB."""

    seconds: float
    cpu: float
    memory: float


# Scans and a folder for what comes of them, to what it took.
Way = Callable[[Path, Path], Usage]


def main() -> int:
    """Run one sub-command; returns the exit code."""
    arguments = parse_arguments()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    if arguments.command == "label":
        label(arguments.bundle, arguments.scans, arguments.out)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        if arguments.command == "compare":
            sys.stdout.write(
                compare(Workspace(arguments.run), arguments.scans, Path(folder), arguments.runs, arguments.softmax)
            )
        elif arguments.command == "memory":
            sys.stdout.write(memory(Workspace(arguments.run), Path(folder)))
        else:
            sys.stdout.write(paper(Path(folder)))
    return 0


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    both = commands.add_parser("compare", help="time per case beside nnUNetv2_predict")
    both.add_argument("run", metavar="RUN", type=Path)
    both.add_argument("scans", metavar="SCANS", type=Path)
    both.add_argument(
        "--runs", type=int, choices=range(1, MODELS + 1), default=MODELS, help="nnU-Net's runs to measure (default: 5)"
    )
    both.add_argument("--softmax", action="store_true", help="measure nnU-Net with stored softmax, too")
    resident = commands.add_parser("memory", help="memory over 5 and over 50 cases")
    resident.add_argument("run", metavar="RUN", type=Path)
    commands.add_parser("paper", help="memory with five networks of the paper's size, of random weights")
    one = commands.add_parser("label", help="the process that is measured")
    for name in ("bundle", "scans", "out"):
        one.add_argument(name, type=Path)
    return parser.parse_args()


def label(bundle_folder: Path, scans: Path, out: Path) -> None:
    """Prepare and label every scan of a folder, with one bundle as all models."""
    bundle = read_bundle(bundle_folder)
    config = load_config(None, [f"prepare.spacing={list(bundle.plan.spacing)}", f"labelling.step={bundle.plan.step}"])
    workspace = Workspace(out)
    labeller = Labeller([bundle] * MODELS, config.labelling)
    for folder in (workspace.image("case").parent, out / "labels", out / "rows"):
        folder.mkdir(parents=True, exist_ok=True)
    for scan in sorted(scans.glob(f"*{CHANNEL}")):
        case = scan.name.removesuffix(CHANNEL)
        prepare_case(Case(case, scan), config, workspace)
        labeller.label(Files(workspace.image(case), out / "labels" / f"{case}.nii.gz", out / "rows" / f"{case}.json"))


def compare(workspace: Workspace, scans: Path, folder: Path, runs: int, softmax: bool) -> str:
    """The table: both sides on one case and on all, so that start-up and the cost of one more case come apart.

    ``runs``: how many of nnU-Net's five are measured; they count for all. ``softmax``: measure nnU-Net with its softmax
    stored, too, which a mean over models would need.
    """
    config = read_settings(workspace.settings)
    cases = sorted(scans.glob(f"*{CHANNEL}"))
    if len(cases) < 2:
        raise SystemExit(f"{scans}: {len(cases)} scans named CASE{CHANNEL}; expected at least two")
    checkpoint = find_checkpoint(workspace)
    export(checkpoint, LABELLED_DATASET, config, workspace, folder / "bundle")
    copy_model(checkpoint, workspace, folder / "results")
    for name, chosen in (("one", cases[:1]), ("all", cases)):
        (folder / name).mkdir()
        for case in chosen:
            (folder / name / case.name).symlink_to(case.resolve())
    five_runs = partial(theirs, folder=folder, step=config.inference.step, runs=runs)
    ways = {
        "five models, one pass": partial(ours, folder=folder),
        "5 x nnUNetv2_predict, masks": five_runs,
    }
    if softmax:
        ways["5 x nnUNetv2_predict, masks and softmax"] = partial(five_runs, options=("--save_probabilities",))
    lines = [table_line(title, way, folder, number) for number, (title, way) in enumerate(ways.items())]
    return (
        f"{len(cases)} scans, {len(os.sched_getaffinity(0))} cores, step {config.inference.step:g}, no mirroring, "
        f"{runs} of nnU-Net's {MODELS} runs measured; mean DSC between both sides' labels "
        f"{likeness(folder / '0_all', folder / '1_all'):.4f}\n\n"
        f"| | 1 case: s | CPU s | {len(cases)} cases: s | CPU s | peak MiB of a process |\n"
        "|---|---|---|---|---|---|\n" + "".join(lines)
    )


def table_line(title: str, way: Way, folder: Path, number: int) -> str:
    """Measure one way, on one case and on all."""
    one = way(folder / "one", folder / f"{number}_one")
    every = way(folder / "all", folder / f"{number}_all")
    line = (
        f"| {title} | {one.seconds:.1f} | {one.cpu:.1f} | {every.seconds:.1f} | {every.cpu:.1f} | {every.memory:.0f} |"
    )
    log.info("%s", line)
    return line + "\n"


def ours(scans: Path, out: Path, folder: Path) -> Usage:
    """Prepare and label ``scans`` with five models at once."""
    module = [sys.executable, "-m", "benchmarks.labelling", "label"]
    return measure([*module, str(folder / "bundle"), str(scans), str(out)])


def theirs(scans: Path, out: Path, folder: Path, step: float, runs: int, options: Sequence[str] = ()) -> Usage:
    """nnU-Net's command on ``scans``, once per model, one after the other; ``runs`` of them count for all."""
    command = [str(Path(sys.executable).with_name("nnUNetv2_predict")), "-d", LABELLED_DATASET, "-i", str(scans)]
    command += ["-p", PLANS, "-tr", TRAINER, "-c", CONFIGURATION, "--disable_tta", "--disable_progress_bar"]
    command += ["-step_size", str(step), *options]
    if not cuda_available():
        command += ["-device", "cpu"]
    variables = {
        "nnUNet_raw": str(folder),
        "nnUNet_preprocessed": str(folder),
        "nnUNet_results": str(folder / "results"),
        "nnUNet_extTrainer": str(TRAINER_FOLDER),
    }
    taken = [measure([*command, "-f", str(fold), "-o", str(out / str(fold))], variables) for fold in range(runs)]
    seconds, cpu = (MODELS * float(np.mean([getattr(run, each) for run in taken])) for each in ("seconds", "cpu"))
    return Usage(seconds, cpu, max(run.memory for run in taken))


def memory(workspace: Workspace, folder: Path) -> str:
    """Peak memory of one labelling process over 5 and over 50 cases, a little larger than a window."""
    config = read_settings(workspace.settings)
    plan = export(find_checkpoint(workspace), LABELLED_DATASET, config, workspace, folder / "bundle")
    shape = (plan.patch[0] + 4, plan.patch[1], plan.patch[2])
    random = np.random.default_rng(0)
    z, y, x = plan.spacing
    lines = [
        f"working set of a scan by `working_set`: {working_set(shape, plan, MODELS) / 2**20:.0f} MiB, and the networks\n\n"
    ]
    lines.append("| cases | peak MiB |\n|---|---|\n")
    for count in (5, 50):
        scans = folder / str(count)
        scans.mkdir()
        for number in range(count):
            scan = random.normal(0, 200, shape).astype(np.int16)
            write_volume(scans / f"Case_{number:05d}{CHANNEL}", scan, np.diag([-x, -y, z, 1.0]))
        usage = ours(scans, folder / f"out_{count}", folder)
        lines.append(f"| {count} | {usage.memory:.0f} |\n")
        log.info("%s", lines[-1].strip())
    return "".join(lines)


def paper(folder: Path) -> str:
    """Peak memory of one labelling process with five networks of the paper's size, on a scan of one window."""
    plan = write_untrained(folder / "bundle", load_config())
    z, y, x = plan.spacing
    (folder / "scans").mkdir()
    scan = np.random.default_rng(0).normal(0, 200, plan.patch).astype(np.int16)
    write_volume(folder / "scans" / f"Case_00001{CHANNEL}", scan, np.diag([-x, -y, z, 1.0]))
    usage = ours(folder / "scans", folder / "out", folder)
    networks = MODELS * (folder / "bundle" / plan.model.file).stat().st_size / 2**20
    whole = (125, 320, 320)
    return (
        f"five networks: {networks:.0f} MiB; working set of one window by `working_set`: "
        f"{working_set(plan.patch, plan, MODELS) / 2**20:.0f} MiB, of a scan of {' x '.join(map(str, whole))} voxels "
        f"{working_set(whole, plan, MODELS) / 2**20:.0f} MiB\n"
        f"peak of the process, one window: {usage.memory:.0f} MiB; {usage.cpu:.0f} CPU s\n"
    )


def write_untrained(folder: Path, config: Config) -> Plan:
    """A bundle of the settings' network with random weights."""
    from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

    described = architecture(config)
    network = get_network_from_plans(
        described["network_class_name"],
        described["arch_kwargs"],
        described["_kw_requires_import"],
        1,
        len(CLASSES),
        deep_supervision=False,
    )
    model = to_onnx(network.eval(), config.network.patch, half=False)
    plan = Plan(
        format_version=FORMAT_VERSION,
        model=Model("model.onnx", hashlib.sha256(model).hexdigest()),
        orientation=ORIENTATION,
        spacing=config.prepare.spacing,
        patch=config.network.patch,
        step=config.inference.step,
        classes=CLASSES,
        intensity=Intensity(-160.0, 240.0, 50.0, 80.0),
        organ_minima_mm3={},
    )
    write_bundle(folder, Bundle(plan, model))
    return plan


def find_checkpoint(workspace: Workspace) -> Path:
    """The run's network: of the finished training, or the latest of one that still runs."""
    for path in (workspace.final_checkpoint, workspace.latest_checkpoint):
        if path(LABELLED_DATASET, "all").exists():
            return path(LABELLED_DATASET, "all")
    raise SystemExit(
        f"{workspace.fold(LABELLED_DATASET, 'all')}: no checkpoint; expected a run of `python -m train fit`"
    )


def copy_model(checkpoint: Path, workspace: Workspace, results: Path) -> None:
    """A results folder of nnU-Net's in which the one network is all five folds."""
    model = results / LABELLED_DATASET / workspace.model(LABELLED_DATASET).name
    model.mkdir(parents=True)
    for name in ("dataset.json", "plans.json"):
        shutil.copy(workspace.model(LABELLED_DATASET) / name, model)
    for fold in range(MODELS):
        (model / f"fold_{fold}").mkdir()
        shutil.copy(checkpoint, model / f"fold_{fold}" / "checkpoint_final.pth")


def measure(command: Sequence[str], variables: Mapping[str, str] | None = None) -> Usage:
    """Run a command to its end, its output thrown away unless it fails."""
    with tempfile.TemporaryFile() as output:
        start = time.perf_counter()
        process = subprocess.Popen(command, env={**os.environ, **(variables or {})}, stdout=output, stderr=output)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            output.seek(0)
            raise SystemExit(f"{' '.join(command)}: exit code {process.returncode}\n{output.read().decode()}")
    return Usage(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024)


def likeness(mine: Path, theirs: Path) -> float:
    """Mean DSC over organs and cases between our pseudo-labels and nnU-Net's masks, both on the working grid."""
    found = []
    for path in sorted((mine / "labels").glob("*.nii.gz")):
        labels = read_labels(path).voxels
        # Classes beside the organs become background, as the export folds them.
        other = read_labels(theirs / "0" / path.name).voxels
        organs = np.where(other > len(ORGANS), 0, other).astype(np.uint8)
        resampled = labels_to_working_grid(organs, labels.shape)
        found += [dice(labels == organ.id, resampled == organ.id) for organ in ORGANS]
    return float(np.mean(found))


if __name__ == "__main__":
    sys.exit(main())
