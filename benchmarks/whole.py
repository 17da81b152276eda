"""The whole command, cold, beside nnU-Net's: time, CPU and memory, stage by stage; and how ours grows with the scan.

    python -m benchmarks.whole [--repeats 3] [--out docs/bench.json]      # `make bench`; half an hour on two cores the first time
    python -m benchmarks.whole --only shipped [--out FILE]                # two minutes: the shipped network alone

Both sides run the same full-size network on the same phantom (benchmarks/sides.py), alternately, a process each. Every run is
kept in build/bench, so that a bench that was cut off goes on; a run whose program, network or scan changed is made again. The
report is written after every run. A GPU is measured by benchmarks/gpu.py.
"""

import argparse
import json
import logging
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks import sides
from inference.bundle import Plan, read_bundle
from inference.resample import working_shape
from inference.sliding_window import Layout
from inference.volume import Labels, Shape, Spacing, atomic_write, read_labels

log = logging.getLogger("benchmarks.whole")

SHIPPED = sides.ROOT / "weights"
OUT = sides.ROOT / "docs" / "bench.json"
PAGE_CACHE = Path("/proc/sys/vm/drop_caches")
FULL_SIZE = "full-size"
FIGURES = ("seconds", "cpu_seconds", "ram_mib")
GPU_NOTE = (
    "No GPU was measured: none could be had. The GPU's code was run on ONNX Runtime's CPU provider (tests/test_stitching.py); "
    "`python -m benchmarks.gpu --out DIR` measures it where there is a GPU."
)
Run = Mapping[str, Any]


@dataclass(frozen=True)
class Scan:
    """A phantom of ``shape`` voxels at ``spacing`` mm (z, y, x); ``depth``: only so many slices of it."""

    shape: Shape
    spacing: Spacing
    depth: int | None = None

    @property
    def voxels(self) -> Shape:
        """(z, y, x) of what is stored."""
        return (self.depth or self.shape[0], *self.shape[1:])

    def make(self) -> Path:
        """The folder that holds it."""
        return sides.make_scan(self.shape, self.spacing, depth=self.depth)


@dataclass(frozen=True)
class Setting:
    """What a run is of: whose command, with which network, on which scan, with which options."""

    title: str
    scan: Scan
    network: str = FULL_SIZE
    options: tuple[str, ...] = ()
    theirs: bool = False

    @property
    def bundle(self) -> Path:
        """Folder of the network's bundle."""
        return sides.CACHE / "bundle" if self.network == FULL_SIZE else SHIPPED


@dataclass(frozen=True)
class Plans:
    """All settings of a bench: ``compared``: nnU-Net and ours, in turns; ``repeated``: as often; ``once``: the growth and the rest."""

    compared: tuple[Setting, ...]
    repeated: tuple[Setting, ...]
    growth: tuple[Setting, ...]
    once: tuple[Setting, ...]

    @property
    def all(self) -> tuple[Setting, ...]:
        """Every setting once."""
        return (*self.compared, *self.repeated, *self.growth, *self.once)

    def order(self, repeats: int) -> list[tuple[Setting, int]]:
        """Every run: its setting and number, sides in turns first."""
        turns = [(setting, number) for number in range(repeats) for setting in self.compared]
        turns += [(setting, number) for number in range(repeats) for setting in self.repeated]
        return turns + [(setting, 0) for setting in (*self.growth, *self.once)]


def plan_bench(tiny: bool) -> Plans:
    """The bench, or a rehearsal of it on small scans."""
    side, slices = (200, 60) if tiny else (512, 600)
    scan = Scan((20, side, side) if tiny else (100, side, side), (5.0, 0.75, 0.75))
    # One scan of 1 mm and parts of it: what grows is the number of slices alone.
    scans = [
        Scan((slices, side, side), (1.0, 0.75, 0.75), depth) for depth in (slices // 12, slices // 6, slices // 2, None)
    ]
    growth = [
        Setting(f"ours, {network}, {each.voxels[0]} slices", each, network)
        for network in (FULL_SIZE, "shipped")
        for each in scans
    ]
    return Plans(
        compared=(
            Setting("nnU-Net", scan, theirs=True),
            Setting("ours", scan),
            Setting("ours, float32", scan, options=("--precision", "f32")),
        ),
        repeated=(Setting("ours, shipped weights", scan, "shipped"),),
        growth=tuple(growth),
        once=(
            Setting("ours, one thread", scan, options=("--threads", "1")),
            Setting("ours, shipped weights, one thread", scan, "shipped", ("--threads", "1")),
            Setting("ours, float32, no rules", scan, options=("--precision", "f32", "--no-postprocessing")),
        ),
    )


class Store:
    """The runs so far, in a file that is rewritten whole after each."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.runs: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []

    def find(self, setting: Setting, number: int, cold: bool) -> dict[str, Any] | None:
        """A run of just this program, network and scan, None where there is none."""
        wanted = {"title": setting.title, "number": number, "cold": cold, "made_of": made_of(setting)}
        return next((run for run in self.runs if wanted.items() <= run.items()), None)

    def add(self, run: dict[str, Any]) -> None:
        """Keep a run, in place of an older one of the same title and number."""
        key = (run["title"], run["number"])
        self.runs = [other for other in self.runs if (other["title"], other["number"]) != key] + [run]
        atomic_write(self._path, (json.dumps(self.runs, indent=1) + "\n").encode())


def main() -> int:
    """Run the bench; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="runs of each side (3)")
    parser.add_argument(
        "--out", metavar="FILE", type=Path, help="report (docs/bench.json; with --only a file in build)"
    )
    parser.add_argument(
        "--warm", action="store_true", help="leave the page cache alone; else it is dropped where root may"
    )
    parser.add_argument("--tiny", action="store_true", help="a rehearsal on small scans; its figures mean nothing")
    parser.add_argument("--only", metavar="WORD", help="only settings whose title holds WORD, and what was run before")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    out = report_file(arguments)
    cold = not arguments.warm and os.access(PAGE_CACHE, os.W_OK)
    plans = plan_bench(arguments.tiny)
    order = plans.order(arguments.repeats)
    wanted = {setting for setting, _ in order if arguments.only is None or arguments.only in setting.title}
    if any(setting.network == FULL_SIZE for setting in wanted):
        make_network()
    elif not (sides.CACHE / "bundle" / "plan.json").exists():
        order = [(setting, number) for setting, number in order if setting.network != FULL_SIZE]
    sides.CACHE.mkdir(parents=True, exist_ok=True)
    store = Store(sides.CACHE / ("tiny-runs.json" if arguments.tiny else "runs.json"))
    done: list[Run] = []
    for setting, number in order:
        run = store.find(setting, number, cold)
        if run is None and setting in wanted:
            log.info("%s, run %d", setting.title, number + 1)
            run = make_run(setting, number, cold)
            store.add(run)
            log.info("  %.1f s, %.1f CPU s, %.0f MiB", run["seconds"], run["cpu_seconds"], run["ram_mib"])
        if run is not None:
            done.append(run)
            write_report(out, summarise(plans, done))
    if done:
        report = (
            summarise(plans, done)
            | {"complete": len(done) == len(plans.order(arguments.repeats))}
            | compare_masks(plans, done)
        )
        write_report(out, report)
        sys.stdout.write(tables(report))
    return 0


def report_file(arguments: argparse.Namespace) -> Path:
    """Where the report goes: docs/bench.json, unless another file is named or the run is a rehearsal or but a part."""
    if arguments.out:
        return Path(arguments.out)
    if arguments.tiny:
        return sides.CACHE / "rehearsal.json"
    return sides.CACHE / "part.json" if arguments.only else OUT


def make_network() -> None:
    """The full-size network, where it is not there yet; in a process of its own, so that torch stays out of this one."""
    subprocess.run([sys.executable, "-m", "benchmarks.sides", "network", "cpu"], cwd=sides.ROOT, check=True)


def write_report(path: Path, report: Mapping[str, Any]) -> None:
    """The report as JSON."""
    atomic_write(path, (json.dumps(report, indent=1) + "\n").encode())


def make_run(setting: Setting, number: int, cold: bool) -> dict[str, Any]:
    """Run a setting once; what it cost, and its own report where it is ours."""
    scans = setting.scan.make()
    masks, report = mask_folder(setting), sides.CACHE / "report.json"
    shutil.rmtree(masks, ignore_errors=True)
    if setting.theirs:
        masks.mkdir(parents=True)
        command = sides.their_command(scans, masks, "cpu")
    else:
        command = sides.our_command(scans, masks, setting.bundle, report, ("--device", "cpu", *setting.options))
    if cold and not sides.drop_page_cache():
        raise RuntimeError(f"{PAGE_CACHE} cannot be written to; --warm runs without")
    run = {
        "title": setting.title,
        "number": number,
        "cold": cold,
        "made_of": made_of(setting),
        "time": time.strftime("%Y-%m-%d %H:%M:%S"),
        "load_before": round(os.getloadavg()[0], 2),
    }
    run |= {
        key: round(value, 2) if isinstance(value, float) else value
        for key, value in asdict(sides.measure(command)).items()
    }
    if not setting.theirs:
        content = json.loads(report.read_text(encoding="utf-8"))
        report.unlink()
        run |= {"start": content["start"], "case": content["cases"][0], "engine": content["engine"]}
    return run


def mask_folder(setting: Setting) -> Path:
    """Where a setting's last run wrote its masks."""
    return sides.CACHE / "masks" / setting.title.replace(",", "").replace(" ", "_")


@cache
def made_of(setting: Setting) -> str:
    """Hash of all that a run's figures depend on, but the machine."""
    found = sha256(repr(setting).encode())
    scans = setting.scan.make()
    files = [setting.bundle / "plan.json", *sorted(scans.glob("*.nii.gz"))]
    packages = ["isal", "numpy", "nibabel", "openvino"]
    if setting.theirs:
        packages = ["numpy", "nnunetv2", "torch"]
    else:
        files += [sides.ROOT / "predict.sh", *sorted((sides.ROOT / "inference").glob("*.py"))]
    for path in files:
        found.update(path.read_bytes())
    for name in packages:
        found.update(f"{name} {version(name)}".encode())
    return found.hexdigest()[:16]


def summarise(plans: Plans, runs: Sequence[Run]) -> dict[str, Any]:
    """The report: costs, ratios, stages, growth, and every run they come from."""
    by_title: dict[str, list[Run]] = {}
    for run in runs:
        by_title.setdefault(run["title"], []).append(run)
    theirs = by_title.get(plans.compared[0].title, [])
    full_size = any(
        run["title"] == setting.title and setting.network == FULL_SIZE for run in runs for setting in plans.all
    )
    plan = read_bundle(sides.CACHE / "bundle" if full_size else SHIPPED).plan
    shared = plans.compared[0].scan
    return {
        "complete": False,
        "commit": commit(),
        "machine": dict(sides.machine()),
        "page_cache": "dropped before every run" if all(run["cold"] for run in runs) else "warm",
        "others_cpu_share": round(
            sum(run["others_cpu_seconds"] for run in runs) / sum(run["seconds"] for run in runs) / os.cpu_count(), 3
        ),
        "gpu": {"measured": False, "note": GPU_NOTE},
        "scan": asdict(shared) | {"windows_of_nnunet": count_windows(shared, plan)},
        "network": {
            "patch": plan.patch,
            "spacing": plan.spacing,
            "step": plan.step,
            "training": plan.provenance.get("training"),
        },
        "costs": {title: costs(found) for title, found in by_title.items()},
        "ratios": {
            setting.title: ratios(theirs, by_title[setting.title])
            for setting in plans.compared[1:]
            if theirs and setting.title in by_title
        },
        "stages": {title: stages(found) for title, found in by_title.items() if "case" in found[0]},
        "growth": growth(plans, by_title),
        "runs": list(runs),
    }


def costs(runs: Sequence[Run]) -> dict[str, Any]:
    """Median, lowest and highest of every figure."""
    names = (*FIGURES, "flare_cpu_area", "others_cpu_seconds")
    found = {name: spread([run[name] for run in runs]) for name in names}
    return {"runs": len(runs), **found}


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, lowest and highest."""
    return {"median": round(median(values), 2), "low": min(values), "high": max(values)}


def ratios(theirs: Sequence[Run], ours: Sequence[Run]) -> dict[str, Any]:
    """How many times as much the other side takes: of the medians, and run by run, lowest and highest."""
    found = {}
    for name in FIGURES:
        pairs = [first[name] / second[name] for first, second in zip(theirs, ours, strict=False)]
        middle = median(run[name] for run in theirs) / median(run[name] for run in ours)
        found[name] = {"median": round(middle, 2), "low": round(min(pairs), 2), "high": round(max(pairs), 2)}
    return found


def stages(runs: Sequence[Run]) -> dict[str, dict[str, float]]:
    """Median seconds and CPU seconds of every stage of our command; ``rest``: the shell, the end of the process."""
    rows = [stages_of(run) for run in runs]
    return {
        name: {kind: round(median(row[name][kind] for row in rows), 3) for kind in ("seconds", "cpu_seconds")}
        for name in rows[0]
    }


def stages_of(run: Run) -> dict[str, dict[str, float]]:
    """Stages of one run. The CPU seconds of imports and of the engine are known in sum only, and stand with the engine."""
    start, case = run["start"], run["case"]
    found = {
        "imports": {"seconds": start["imports"], "cpu_seconds": 0.0},
        "engine": {"seconds": start["engine"], "cpu_seconds": start["cpu_seconds"]},
    }
    for name, seconds in case["seconds"].items():
        found[name] = {"seconds": seconds, "cpu_seconds": case["cpu_seconds"][name]}
    known = {kind: sum(row[kind] for row in found.values()) for kind in ("seconds", "cpu_seconds")}
    found["rest"] = {kind: run[kind] - known[kind] for kind in known}
    found["all but the network"] = {kind: run[kind] - found["network"][kind] for kind in known}
    return found


def growth(plans: Plans, by_title: Mapping[str, Sequence[Run]]) -> list[dict[str, Any]]:
    """Our cost by the number of slices, for either network."""
    rows = []
    for setting in plans.growth:
        if setting.title not in by_title:
            continue
        runs = by_title[setting.title]
        rows.append(
            {
                "network": setting.network,
                "slices": setting.scan.voxels[0],
                "mm": setting.scan.spacing[0],
                "windows": runs[0]["case"]["windows"],
                "window": " x ".join(map(str, runs[0]["case"]["window"])),
                **{name: round(median(run[name] for run in runs), 2) for name in FIGURES},
                "network_seconds": round(median(run["case"]["seconds"]["network"] for run in runs), 2),
            }
        )
    return sorted(rows, key=lambda row: (row["network"], row["slices"]))


def count_windows(scan: Scan, plan: Plan) -> int:
    """Windows of a whole field of view, as nnU-Net lays them."""
    return Layout.of(working_shape(scan.voxels, scan.spacing, plan.spacing), plan.patch, plan.step).windows


def compare_masks(plans: Plans, runs: Sequence[Run]) -> dict[str, Any]:
    """What the masks say: how rough they are, and how like nnU-Net's ours are."""
    titles = {run["title"] for run in runs}
    return {"border_share": borders(plans, titles), "dsc_with_nnunet": likeness(plans, titles)}


def borders(plans: Plans, titles: Collection[str]) -> dict[str, float]:
    """Share of voxels with another label in front, above or to the left: how rough a network's masks are."""
    found = {}
    for setting in (*plans.compared, *plans.repeated, *plans.once):
        for path in mask_folder(setting).glob("*.nii.gz") if setting.title in titles else ():
            found[setting.title] = border_share(read_labels(path).voxels)
    return found


def border_share(labels: Labels) -> float:
    """Share of the voxels (z, y, x) whose label differs from the one before along some axis."""
    border = np.zeros(labels.shape, bool)
    border[1:] |= labels[1:] != labels[:-1]
    border[:, 1:] |= labels[:, 1:] != labels[:, :-1]
    border[:, :, 1:] |= labels[:, :, 1:] != labels[:, :, :-1]
    return round(float(border.mean()), 5)


def likeness(plans: Plans, titles: Collection[str]) -> dict[str, float] | None:
    """DSC by organ between nnU-Net's mask and ours, both without rules and in float32."""
    ours = plans.once[-1]
    theirs = plans.compared[0]
    folders = [mask_folder(setting) for setting in (ours, theirs)]
    if not {ours.title, theirs.title} <= set(titles) or not all(folder.exists() for folder in folders):
        return None
    return sides.likeness(*folders)


def commit() -> str:
    """The commit that was measured, marked where the tree differs from it."""
    command = ["git", "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, cwd=sides.ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def tables(report: Mapping[str, Any]) -> str:
    """The report as text for people."""
    machine = report["machine"]
    lines = [f"{machine['processor']}, {machine['cores']} cores; page cache {report['page_cache']}\n"]
    lines += table(
        ("", "runs", "s", "CPU s", "RAM MiB"),
        ([title, row["runs"], *(row[name]["median"] for name in FIGURES)] for title, row in report["costs"].items()),
    )
    lines += table(
        ("nnU-Net takes so many times as much as", "s", "CPU s", "RAM"),
        ([title, *(row[name]["median"] for name in FIGURES)] for title, row in report["ratios"].items()),
    )
    names = list(next(iter(report["stages"].values()), {}))
    for kind in ("seconds", "cpu_seconds"):
        lines += table(
            (f"stages, {kind.replace('_', ' ')}", *names),
            ([title, *(row.get(name, {kind: "-"})[kind] for name in names)] for title, row in report["stages"].items()),
        )
    lines += table(
        ("growth", "slices", "mm", "windows", "voxels of one", "s", "CPU s", "RAM MiB", "network s"),
        (list(row.values()) for row in report["growth"]),
    )
    return "\n".join(lines)


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """Lines of a Markdown table, and an empty one."""
    body = ["| " + " | ".join(cell(value) for value in row) + " |" for row in rows]
    return ["| " + " | ".join(head) + " |", "|" + "---|" * len(head), *body, ""]


def cell(value: object) -> str:
    """A figure with four digits, anything else as it is."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(main())
