"""What a scan costs on a GPU: cold and warm starts, further cases, memory of the whole device, engine settings, nnU-Net beside.

    python -m benchmarks.gpu --out DIR [--device cuda] [--repeats 3] [--reference 1]

Everything is made on the spot (benchmarks/sides.py: phantoms, network, scan) and written to DIR/gpu.json after every step.
Each figure is of a process of its own; one that fails is recorded with what it said, and the rest goes on.
``python -m benchmarks.gpu variant SETTINGS ...`` is the command of one variant: `python -m inference` with other settings.
"""

import argparse
import json
import logging
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import sides
from inference.bundle import Bundle
from inference.engine import Device, Engine, OnnxRuntimeEngine, Precision
from inference.volume import Shape, Spacing, atomic_write
from train.sampler import Gpu, find_gpu

log = logging.getLogger("benchmarks.gpu")

SCAN: tuple[Shape, Spacing] = ((100, 512, 512), (5.0, 0.75, 0.75))
LONG: tuple[Shape, Spacing] = ((600, 512, 512), (1.0, 0.75, 0.75))
CASES = 4
MIB = 2**20
# Name of a variant to what it changes: `settings` of the CUDA provider, `limit_mib` of its arena, `session` options,
# `host`: windows are added up on the host, `arguments` of the command.
VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "as shipped": {},
    "arena 800 MiB": {"limit_mib": 800},
    "arena 900 MiB": {"limit_mib": 900},
    "arena 1000 MiB": {"limit_mib": 1000},
    "arena 1100 MiB": {"limit_mib": 1100},
    "arena 1300 MiB": {"limit_mib": 1300},
    "no limit": {"limit_mib": 65536},
    "small workspace": {"settings": {"cudnn_conv_use_max_workspace": "0"}},
    "small workspace, arena 900 MiB": {"settings": {"cudnn_conv_use_max_workspace": "0"}, "limit_mib": 900},
    "default search": {"settings": {"cudnn_conv_algo_search": "DEFAULT"}},
    "exhaustive search": {"settings": {"cudnn_conv_algo_search": "EXHAUSTIVE"}},
    "channels last": {"settings": {"prefer_nhwc": "1"}},
    "fused bias": {"settings": {"fuse_conv_bias": "1"}},
    "no memory pattern": {"session": {"enable_mem_pattern": False}},
    "powers of two": {"settings": {"arena_extend_strategy": "kNextPowerOfTwo"}},
    "basic graph optimization": {"session": {"graph_optimization_level": "ORT_ENABLE_BASIC"}},
    "scratch memory kept": {"shrink": None},
    "added up on the host": {"host": True},
    "float32 with TF32": {"half": False, "limit_mib": 65536},
    "no rules": {"arguments": ["--no-postprocessing"]},
    "float32 no rules": {"arguments": ["--precision", "f32", "--no-postprocessing"], "limit_mib": 65536},
}


class Record:
    """The figures so far, rewritten whole after every step."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.content: dict[str, Any] = {"machine": dict(sides.machine()), "steps": {}}

    def step(self, name: str, work: Callable[[], Any]) -> Any:
        """Do some work and keep what it returns, or what went wrong."""
        start = time.perf_counter()
        try:
            result = work()
        except Exception as error:  # whatever it is: the next step may work
            log.error("%s: %s", name, error)
            result = {"error": f"{type(error).__name__}: {error}"[-1500:]}
        log.info("%s (%.1f s): %s", name, time.perf_counter() - start, json.dumps(result)[:600])
        self.content["steps"][name] = result
        atomic_write(self._path, (json.dumps(self.content, indent=1) + "\n").encode())
        return result


def main() -> int:
    """Run the benchmark, or one variant; returns the exit code."""
    if sys.argv[1:2] == ["variant"]:
        return run_variant(json.loads(sys.argv[2]), sys.argv[3:])
    arguments = parse_arguments()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    arguments.out.mkdir(parents=True, exist_ok=True)
    record = Record(arguments.out / "gpu.json")
    with tempfile.TemporaryDirectory() as masks:
        benchmark(record, arguments, Path(masks))
    return 0


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", metavar="DIR", type=Path, required=True, help="folder for gpu.json")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a rehearsal without a GPU")
    parser.add_argument(
        "--weights", metavar="DIR", type=Path, help="another bundle; no reference, no network is trained"
    )
    parser.add_argument("--repeats", type=int, default=3, help="runs of our command (3)")
    parser.add_argument("--reference", type=int, default=1, help="runs of nnUNetv2_predict (1)")
    parser.add_argument("--variants", nargs="*", choices=list(VARIANTS), default=list(VARIANTS), help="all")
    parser.add_argument("--shape", type=int, nargs=3, metavar=("Z", "Y", "X"), default=SCAN[0], help="of the scan")
    parser.add_argument("--no-long", action="store_true", help="leave out the scan of 600 slices")
    parser.add_argument("--keep-network", action="store_true", help="store the trained network in DIR (62 MB)")
    parser.add_argument("--drop-page-cache", action="store_true", help="make first starts cold ones; wants root")
    return parser.parse_args()


def benchmark(record: Record, arguments: argparse.Namespace, masks: Path) -> None:
    """All steps, the most wanted first. Started cold where the page cache may be dropped (root), else warm."""
    gpu = find_gpu(0) if arguments.device == "cuda" else None
    if gpu:
        record.step("memory of the idle device, MiB", gpu.used)
    bundle = arguments.weights
    shape = tuple(arguments.shape)
    made = {"scan made": sides.start("scan", *shape, *SCAN[1])}
    if not arguments.no_long:
        made["long scan made"] = sides.start("scan", *LONG[0], *LONG[1])
    if bundle is None:
        # In a process of its own: one that trained would keep its hold on the GPU's memory.
        made["network made"] = sides.start("network", arguments.device)
        bundle = sides.CACHE / "bundle"
    for name, process in made.items():
        record.step(name, partial(sides.finish, process))
    scan = partial(sides.make_scan, shape, SCAN[1])
    record.step("scan", lambda: [str(scan(cases=count)) for count in (1, CASES)])
    ours = partial(run_ours, bundle=bundle, out=masks, device=arguments.device, gpu=gpu)
    cold = arguments.drop_page_cache
    if arguments.keep_network:
        record.step("network kept", lambda: sides.pack(arguments.out))
    record.step("page cache dropped", lambda: cold and sides.drop_page_cache())
    record.step("ours, first start", partial(ours, "first", scan()))
    for number in range(arguments.repeats):
        record.step(f"ours, start {number + 1}", partial(ours, f"again{number}", scan()))
    record.step(f"ours, {CASES} cases", lambda: ours("folder", scan(cases=CASES)))
    for name in arguments.variants:
        record.step(f"variant: {name}", partial(ours, name.replace(" ", "_"), scan(), VARIANTS[name]))
    if not arguments.no_long:
        record.step("ours, 600 slices", lambda: ours("long", sides.make_scan(*LONG)))
    if arguments.weights is None:
        record.step("page cache dropped again", lambda: cold and sides.drop_page_cache())
        for number in range(arguments.reference):
            record.step(f"nnU-Net, start {number + 1}", lambda: run_theirs(scan(), masks, arguments.device, gpu))
        record.step("DSC with nnU-Net", lambda: sides.likeness(masks / "no_rules", masks / "nnunet"))
    record.step("DSC with float32", lambda: sides.likeness(masks / "no_rules", masks / "float32_no_rules"))


def run_ours(
    name: str,
    scans: Path,
    change: Mapping[str, Any] | None = None,
    *,
    bundle: Path,
    out: Path,
    device: str,
    gpu: Gpu | None,
) -> dict[str, Any]:
    """One run of our command, or of a variant of it: what it cost, and its own report."""
    masks, report = out / name, out / f"{name}.json"
    shutil.rmtree(masks, ignore_errors=True)
    options = ["--device", device, *(change or {}).get("arguments", ())]
    command = sides.our_command(scans, masks, bundle, report, options)
    if device == "cpu" and change is not None:
        change = {**change, "provider": "CPUExecutionProvider"}  # the GPU path, rehearsed
    if change:
        command = [sys.executable, "-m", "benchmarks.gpu", "variant", json.dumps(change), *command[2:]]
    cost = sides.measure(command, gpu)
    found = json.loads(report.read_text(encoding="utf-8"))
    report.unlink()
    cases = [
        {key: case.get(key) for key in ("seconds", "peak_memory_mib", "error") if key in case}
        for case in found["cases"]
    ]
    volumes = found["cases"][0].get("organ_ml", {})
    return {**asdict(cost), "start": found["start"], "engine": found["engine"], "cases": cases, "organ_ml": volumes}


def run_theirs(scans: Path, out: Path, device: str, gpu: Gpu | None) -> dict[str, Any]:
    """One run of nnU-Net's command."""
    return asdict(sides.measure(sides.their_command(scans, out / "nnunet", device), gpu))


def run_variant(change: Mapping[str, Any], arguments: Sequence[str]) -> int:
    """`python -m inference` with other settings of the CUDA engine."""
    import os

    os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", MKL_NUM_THREADS="1")
    from inference import __main__ as program
    from inference import engine

    engine.CUDA_SETTINGS.update(change.get("settings", {}))
    if "limit_mib" in change:
        engine.GPU_MEMORY = change["limit_mib"] * MIB
    engine.SHRINKAGE = change.get("shrink", engine.SHRINKAGE)
    session = change.get("session", {})
    original = engine.OnnxRuntimeEngine.session_options

    def options(self: Any) -> Any:
        made = original(self)
        for name, value in session.items():
            if name == "graph_optimization_level":
                value = getattr(self.runtime.GraphOptimizationLevel, value)
            setattr(made, name, value)
        return made

    engine.OnnxRuntimeEngine.session_options = options  # type: ignore[method-assign]
    if change.get("host"):
        engine.ADDING_OPSET = 99
    if not change.get("half", True):
        engine.to_half = lambda content: content  # type: ignore[attr-defined]
    if "provider" in change:
        program.load_engine = partial(load_for_rehearsal, change["provider"])  # type: ignore[attr-defined]
    return program.main(list(arguments))


def load_for_rehearsal(provider: str, bundle: Bundle, device: Device, threads: int, precision: Precision) -> Engine:
    """The GPU engine on another provider of ONNX Runtime."""
    return OnnxRuntimeEngine(bundle, precision, provider)


if __name__ == "__main__":
    sys.exit(main())
