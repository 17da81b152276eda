"""Both sides of a comparison with nnU-Net: the same full-size network as a bundle and as nnU-Net's checkpoint, scans, commands.

The network is nnU-Net's for the paper's patch (30.7 million parameters), and its output is smooth, as noise would distort the
times of labels and rules. Training it takes a GPU hours, so one a quarter as wide learns from phantoms for minutes, on a smaller
patch, and then every channel is repeated four times (Net2Net, Chen et al., ICLR 2016): the same function, at the full cost.

    python -m benchmarks.sides network cpu|cuda            # makes the network, in a process that then leaves the GPU
                                                           # --set training.max_minutes=5: a shorter training
    python -m benchmarks.sides unpack DIR                  # takes one that `benchmarks.gpu --keep-network` kept in DIR
    python -m benchmarks.sides scan Z Y X SZ SY SX         # makes a scan: voxels, mm
"""

import argparse
import io
import json
import logging
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from inference.bundle import Bundle, Plan, read_bundle, write_bundle
from inference.organs import ORGANS
from inference.volume import Shape, Spacing, read_labels, read_volume, write_volume
from train.config import load_config
from train.export import to_onnx
from train.fit import fit
from train.metrics import dice
from train.nnunet import TRAINER_FOLDER, load_network
from train.phantom.canvas import Grid
from train.phantom.cohort import Recipe, write_dataset
from train.phantom.scan import generate
from train.record import record_start
from train.sampler import PERIOD, Gpu, ProcessTree, flare_cpu, host_times
from train.workspace import CONFIGURATION, LABELLED_DATASET, PLANS, TRAINER, Workspace

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parents[1]
# What is made once is kept here; git does not see it.
CACHE = ROOT / "build" / "bench"
PATCH = (40, 224, 192)
STEP = 0.9
# How often each channel of the trained network is repeated; a power of 2, so that the weights divide exactly.
WIDER = 4
# On two cores that do nothing else, and on a GPU.
TRAINING = {
    "cpu": ["network.patch=[24,160,160]", "network.batch_size=1", "training.max_minutes=45"],
    "cuda": ["training.max_minutes=2"],
}
COMMON = [
    "training.epochs=1000",
    "training.iterations_per_epoch=25",
    "training.validation_iterations=1",
    "training.foreground_oversampling=1.0",
    "training.optimizer=adamw",
    "training.learning_rate=0.002",
    "training.mirroring=false",
    "training.augmentation=none",
    "training.augmentation_workers=0",
    "network.batch_dice=true",
]
# Bytes of a part of a packed network.
PART = 15 << 20
LABELLED = 20
SEED = 5
SCAN_SEED = 2_000_007
NAME = "scan"


@dataclass(frozen=True)
class Measured:
    """One run of a command: wall and CPU seconds, MiB at most: RAM of all its processes, memory of the whole GPU.

    ``others_cpu_seconds``: what the rest of the machine used meanwhile; near 0 where it was idle. ``flare_cpu_area``: percent
    x s of the whole host, as the FLARE challenge adds it up.
    """

    seconds: float
    cpu_seconds: float
    ram_mib: float
    gpu_mib: float | None
    others_cpu_seconds: float
    flare_cpu_area: float
    warnings: tuple[str, ...] = ()


def make_network(device: str, cache: Path = CACHE, settings: Sequence[str] = ()) -> Path:
    """Train the network where it is not there yet; folder of the bundle with the full patch, beside nnU-Net's ``results``.

    ``settings``: of the training, over the benchmark's own. A training that was cut off goes on.
    """
    bundle_folder = cache / "bundle"
    if (bundle_folder / "plan.json").exists():
        return bundle_folder
    log.info("data of the network: %d phantoms", LABELLED)
    data = cache / "data"
    if len(list((data / "labelsTr").glob("*.nii.gz"))) < LABELLED:
        recipe = Recipe(spacing=(4.0, 1.2, 1.2))
        write_dataset(data, LABELLED, 0, 0, seed=SEED, recipe=recipe, jobs=len(os.sched_getaffinity(0)))
    features = [width // WIDER for width in load_config(None).network.features]
    narrow = [f"network.features={features}", f"training.device={device}"]
    config = load_config(None, [*COMMON, *narrow, *TRAINING[device], *settings])
    workspace = Workspace(cache / "run")
    os.environ.update(nnUNet_compile="false")  # takes longer than this training
    workspace.root.mkdir(parents=True, exist_ok=True)
    record_start(["python", "-m", "benchmarks.sides", "network", device], data, workspace)
    fit(data, "all", config, workspace)
    _write_results(workspace, workspace.final_checkpoint(LABELLED_DATASET, "all"), cache)
    progress = json.loads(
        (workspace.final_checkpoint(LABELLED_DATASET, "all").parent / "progress.json").read_text("utf-8")
    )
    plan = read_bundle(workspace.bundle).plan
    provenance = {**plan.provenance, "training": progress, "wider": WIDER}
    return _write_bundle(replace(plan, patch=PATCH, step=STEP, provenance=provenance), cache)


def _write_results(workspace: Workspace, checkpoint: Path, cache: Path) -> None:
    """nnU-Net's folder of the full-size network: the trained one widened, the full patch in its plan, no optimizer's state."""
    import torch

    model = _results(cache)
    (model / "fold_all").mkdir(parents=True, exist_ok=True)
    shutil.copy(workspace.model(LABELLED_DATASET) / "dataset.json", model)
    plans = json.loads((workspace.model(LABELLED_DATASET) / "plans.json").read_text(encoding="utf-8"))
    configuration = plans["configurations"][CONFIGURATION]
    configuration["patch_size"] = list(PATCH)
    size = configuration["architecture"]["arch_kwargs"]
    size["features_per_stage"] = [WIDER * width for width in size["features_per_stage"]]
    (model / "plans.json").write_text(json.dumps(plans), encoding="utf-8")
    content = torch.load(checkpoint, map_location="cpu", weights_only=False)
    content["optimizer_state"] = None
    content["network_weights"] = widened(content["network_weights"], WIDER)
    torch.save(content, model / "fold_all" / "checkpoint_final.pth")


def widened(weights: Mapping[str, "torch.Tensor"], times: int) -> dict[str, "torch.Tensor"]:
    """State of nnU-Net's U-Net with every channel between image and logits ``times`` in a row: the same function.

    Copies of a channel are normalised alike, and what reads them adds up ``times`` as many weights of 1 / ``times`` the size.
    Tensors under several names stay one.
    """
    made: dict[int, torch.Tensor] = {}
    for name, values in weights.items():
        if values.data_ptr() in made:
            continue
        wide, inward = values, 0 if "transpconvs" in name else 1  # transposed convolutions hold (in, out, z, y, x)
        if "seg_layers" not in name:
            wide = wide.repeat_interleave(times, 1 - inward if values.ndim > 1 else 0)
        if values.ndim > 1 and values.shape[inward] > 1:  # one channel: the image
            wide = wide.repeat_interleave(times, inward) / times
        made[values.data_ptr()] = wide
    return {name: made[values.data_ptr()] for name, values in weights.items()}


def _results(cache: Path) -> Path:
    return cache / "results" / LABELLED_DATASET / Workspace(cache).model(LABELLED_DATASET).name


def _write_bundle(plan: Plan, cache: Path) -> Path:
    """The bundle of what nnU-Net's folder holds; its folder."""
    workspace, model = Workspace(cache / "full"), _results(cache)
    plans = workspace.plans(LABELLED_DATASET)
    plans.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(model / "plans.json", plans)
    config = load_config(None, COMMON)
    network = load_network(LABELLED_DATASET, model / "fold_all" / "checkpoint_final.pth", config, workspace)
    content = to_onnx(network, PATCH, half=False)
    entry = replace(plan.model, sha256=sha256(content).hexdigest())
    write_bundle(cache / "bundle", Bundle(replace(plan, model=entry), content))
    return cache / "bundle"


def pack(out: Path, cache: Path = CACHE) -> list[str]:
    """The trained network in float16, in files of at most PART bytes, for a machine that could not train it; their names."""
    import torch

    checkpoint = next((cache / "results").rglob("checkpoint_final.pth"))
    model = checkpoint.parents[1]
    content = torch.load(checkpoint, map_location="cpu", weights_only=False)
    # nnU-Net stores most tensors under several names; they stay one.
    tensors = content["network_weights"]
    halves = {values.data_ptr(): values.half() for values in tensors.values()}
    content["network_weights"] = {name: halves[values.data_ptr()] for name, values in tensors.items()}
    texts = {path.name: path.read_text() for path in (model / "dataset.json", model / "plans.json")}
    buffer = io.BytesIO()
    torch.save({"checkpoint": content, "texts": texts, "plan": (cache / "bundle" / "plan.json").read_text()}, buffer)
    whole = buffer.getvalue()
    names = []
    for number, start in enumerate(range(0, len(whole), PART)):
        names.append(f"network.{number:02d}")
        (out / names[-1]).write_bytes(whole[start : start + PART])
    return names


def unpack(parts: Path, cache: Path = CACHE) -> Path:
    """Both sides of a network that ``pack`` wrote to the folder ``parts``; folder of the bundle."""
    import torch

    names = sorted(parts.glob("network.*"))
    packed = torch.load(
        io.BytesIO(b"".join(name.read_bytes() for name in names)), map_location="cpu", weights_only=False
    )
    content = packed["checkpoint"]
    tensors = content["network_weights"]
    whole = {values.data_ptr(): values.float() for values in tensors.values()}
    content["network_weights"] = {name: whole[values.data_ptr()] for name, values in tensors.items()}
    model = _results(cache)
    (model / "fold_all").mkdir(parents=True, exist_ok=True)
    for name, text in packed["texts"].items():
        (model / name).write_text(text)
    torch.save(content, model / "fold_all" / "checkpoint_final.pth")
    return _write_bundle(Plan.from_json(packed["plan"]), cache)


def make_scan(shape: Shape, spacing: Spacing, cache: Path = CACHE, cases: int = 1, depth: int | None = None) -> Path:
    """Folder of a phantom scan of that shape and spacing (z, y, x), as so many ``cases``.

    ``depth``: only so many slices of it, the middle ones.
    """
    name = "x".join(str(size) for size in shape) + f"_{spacing[0]:g}mm"
    path = cache / "scans" / name / f"{NAME}_0000.nii.gz"
    if not path.exists():
        log.info("scan: phantom of %s voxels at %s mm", shape, spacing)
        extent = [count * side for count, side in zip(shape, spacing, strict=True)]
        # The middle of the abdomen lies below the origin, the liver's dome above it.
        origin = (-0.55 * extent[0], -extent[1] / 2, -extent[2] / 2)
        _store(path, generate(SCAN_SEED, Grid(shape, spacing, origin)).hu, spacing)
    if depth is not None:
        name = f"{depth}_of_{name}"
        whole, path = path, cache / "scans" / name / f"{NAME}_0000.nii.gz"
        if not path.exists():
            first = (shape[0] - depth) // 2
            _store(path, read_volume(whole).voxels[first : first + depth], spacing)
    folder = cache / "inputs" / f"{name}_{cases}"
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(cases):
        link = folder / f"{NAME}{number}_0000.nii.gz"
        if not link.exists():
            os.link(path, link)
    return folder


def _store(path: Path, voxels: npt.NDArray[np.int16], spacing: Spacing) -> None:
    z, y, x = spacing
    path.parent.mkdir(parents=True, exist_ok=True)
    write_volume(path, voxels, np.diag([-x, -y, z, 1.0]))


def our_command(scans: Path, masks: Path, bundle: Path, report: Path, options: Sequence[str] = ()) -> list[str]:
    """What a container runs, as a plain process."""
    os.environ["PYTHON"] = sys.executable  # predict.sh looks for one itself only without
    command = ["sh", str(ROOT / "predict.sh"), str(scans), str(masks), "--weights", str(bundle)]
    return [*command, "--report", str(report), *options]


def their_command(scans: Path, masks: Path, device: str, cache: Path = CACHE) -> list[str]:
    """nnU-Net's own command, with one process each to read and to write."""
    found = Path(sys.executable).with_name("nnUNetv2_predict")
    start = (
        [str(found)]
        if found.exists()
        else [
            sys.executable,
            "-c",
            "from nnunetv2.inference.predict_from_raw_data import predict_entry_point as p; p()",
        ]
    )
    os.environ.update(
        nnUNet_raw=str(cache),
        nnUNet_preprocessed=str(cache),
        nnUNet_results=str(cache / "results"),
        nnUNet_extTrainer=str(TRAINER_FOLDER),
    )
    command = [*start, "-i", str(scans), "-o", str(masks), "-d", LABELLED_DATASET, "-p", PLANS, "-tr", TRAINER]
    command += ["-c", CONFIGURATION, "-f", "all", "-step_size", str(STEP), "--disable_tta", "--disable_progress_bar"]
    return [*command, "-device", device, "-npp", "1", "-nps", "1"]


def measure(command: Sequence[str], gpu: Gpu | None = None) -> Measured:
    """Run a command to its end. Raises RuntimeError with what it said where it fails."""
    before, host = resource.getrusage(resource.RUSAGE_CHILDREN), host_times()
    start = time.monotonic()
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True
    ) as process:
        watcher = Watcher(ProcessTree(process.pid), gpu)
        watcher.start()
        try:
            output, _ = process.communicate()
            seconds = time.monotonic() - start
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
            watcher.stop()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)}: exit code {process.returncode}\n{output[-3000:]}")
    cpu = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    others = max(0.0, host_times().busy - host.busy - cpu)
    warnings = tuple(line.replace(f"{ROOT}/", "") for line in output.splitlines() if line.startswith("W "))
    return Measured(seconds, cpu, watcher.ram, watcher.gpu, others, watcher.area, warnings)


class Watcher(threading.Thread):
    """Reads the GPU's memory, the host's load and the processes' memory every 0.1 s."""

    def __init__(self, processes: ProcessTree, gpu: Gpu | None) -> None:
        super().__init__(daemon=True)
        self.ram = self.area = 0.0
        self.gpu: float | None = None
        self._processes, self._device = processes, gpu
        self._stopped = threading.Event()

    def run(self) -> None:
        before = host_times()
        while not self._stopped.wait(PERIOD):
            now = host_times()
            self.area += flare_cpu(before, now) * PERIOD
            before = now
            if self._device:
                self.gpu = max(self.gpu or 0.0, self._device.used())
            if usage := self._processes.usage():
                self.ram = max(self.ram, usage.ram_peak)

    def stop(self) -> None:
        """End the watch."""
        self._stopped.set()
        self.join()


def drop_page_cache() -> bool:
    """Make the next start a cold one; False where this process may not."""
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3\n")
    except OSError:
        return False
    return True


def likeness(masks: Path, others: Path) -> dict[str, float]:
    """Mean DSC by organ between the masks of two folders; organs that neither has are left out."""
    found: dict[str, list[float]] = {}
    for path in sorted(masks.glob("*.nii.gz")):
        first, second = read_labels(path).voxels, read_labels(others / path.name).voxels
        for organ in ORGANS:
            if (first == organ.id).any() or (second == organ.id).any():
                found.setdefault(organ.name, []).append(dice(first == organ.id, second == organ.id))
    return {name: round(float(np.mean(values)), 4) for name, values in found.items()}


def machine() -> Mapping[str, object]:
    """What a figure is worth only beside: processor, cores, memory, GPU, versions."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    flags = next((line for line in lines if line.startswith("flags")), "")
    total = Path("/proc/meminfo").read_text().split()[1]
    versions = {}
    for name in ("nnunetv2", "torch", "openvino", "onnxruntime", "onnxruntime-gpu", "numpy"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "processor": models[0] if models else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "bf16": any(flag in flags for flag in ("avx512_bf16", "amx_bf16")),
        "memory_gib": round(int(total) / 2**20, 1),
        "gpu": _gpu_name(),
        "python": platform.python_version(),
        "versions": versions,
    }


def _gpu_name() -> str | None:
    command = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def start(*words: object) -> subprocess.Popen[str]:
    """Start one of this module's commands."""
    command = [sys.executable, "-m", "benchmarks.sides", *(str(word) for word in words)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen[str]) -> str:
    """Wait for a command that was started; its last line. Raises RuntimeError with what it said where it failed."""
    output, _ = process.communicate()
    if process.returncode:
        raise RuntimeError(f"{process.args!r}: exit code {process.returncode}\n{output[-3000:]}")
    return output.strip().rpartition("\n")[2]


def main() -> int:
    """Make the network or a scan; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    network = commands.add_parser("network")
    network.add_argument("device", choices=("cpu", "cuda"))
    network.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help="a setting of the training")
    commands.add_parser("unpack").add_argument("parts", type=Path)
    scan = commands.add_parser("scan")
    scan.add_argument("shape", type=int, nargs=3)
    scan.add_argument("spacing", type=float, nargs=3)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    if arguments.command == "network":
        made = make_network(arguments.device, settings=arguments.set)
    elif arguments.command == "unpack":
        made = unpack(arguments.parts)
    else:
        made = make_scan(tuple(arguments.shape), tuple(arguments.spacing))
    sys.stdout.write(f"{made}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
