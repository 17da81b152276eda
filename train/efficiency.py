"""Time, GPU memory, CPU and RAM of a container per case, as the FLARE organisers measure them, and as they truly are.

One fresh container per case, by the organisers' own command, while a sampler reads the host every 0.1 s
(``train.sampler``). Their figures are of the whole host and the whole GPU, so nothing else should run meanwhile; what the
container itself used is measured beside them, and the log says when the host was busy with other work.
"""

import argparse
import csv
import io
import logging
import os
import re
import shlex
import shutil
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from inference.pipeline import Case, InputError, find_cases
from inference.volume import atomic_write
from train.container import (
    PREDICT,
    ContainerError,
    Mounts,
    find_engine,
    inspect_image,
    last_line,
    remove_container,
    run_command,
)
from train.sampler import PERIOD, Gpu, Sample, SamplerError, Trace, find_gpu, run_sampled

log = logging.getLogger(__name__)

# MB of GPU memory that the challenge's text does not count. Its published code subtracts nothing: both areas are given.
GPU_TOLERANCE = 2048
# FLARE22 passes over values that make up no more than this share of the samples; FLARE23 takes the true maximum.
RARE = 0.02
NO_GPU = "no GPU"
UNKNOWN = "unknown"
# CPU seconds per second that others may take before the host's figures are called disturbed.
DISTURBANCE = 0.2
CORES = os.cpu_count() or 1


class EfficiencyError(ValueError):
    """Something that cannot be measured. The message says what was found and what was expected."""


@dataclass(frozen=True)
class Efficiency:
    """One case. Areas are sum of samples x 0.1 s. None: no GPU, or the container could not be seen from here.

    ``gpu_*``: MB and MB s of the whole device; ``gpu_highest_flare22`` without rare values, ``gpu_area_tolerance`` of
    what exceeds 2048 MB. ``cpu_area_flare``: % s of the host by the organisers' formula; ``cpu_area_true``: % s of the
    host that the container itself used; ``cpu_seconds``: the same in seconds of one core. ``ram_peak``: most MB of the
    container with its page cache, what a memory limit counts; ``ram_own``: without; ``ram_host``: of the whole host.
    """

    case: str
    seconds: float
    exit_code: int
    mask: bool
    gpu_highest: float | None
    gpu_highest_flare22: float | None
    gpu_area: float | None
    gpu_area_tolerance: float | None
    cpu_area_flare: float
    cpu_area_true: float | None
    cpu_seconds: float | None
    ram_peak: float | None
    ram_own: float | None
    ram_host: float
    samples: int


UNITS = {
    "seconds": "s",
    "gpu_highest": "mb",
    "gpu_highest_flare22": "mb",
    "gpu_area": "mb_s",
    "gpu_area_tolerance": "mb_s",
    "cpu_area_flare": "percent_s",
    "cpu_area_true": "percent_s",
    "ram_peak": "mb",
    "ram_own": "mb",
    "ram_host": "mb",
}
# Column of the table, what it is called there, digits.
TABLE = (
    ("seconds", "Time (s)", 1),
    ("gpu_highest", "GPU highest (MB)", 0),
    ("gpu_highest_flare22", "GPU highest, FLARE22 (MB)", 0),
    ("gpu_area", "GPU area (MB s)", 0),
    ("gpu_area_tolerance", "GPU area over 2048 MB (MB s)", 0),
    ("cpu_area_flare", "CPU area, FLARE (% s)", 1),
    ("cpu_area_true", "CPU area, true (% s)", 1),
    ("cpu_seconds", "CPU (s)", 1),
    ("ram_peak", "RAM peak (MB)", 0),
    ("ram_own", "RAM without cache (MB)", 0),
    ("ram_host", "RAM of the host (MB)", 0),
)


@dataclass(frozen=True)
class Program:
    """What is measured: an image, or a plain command with {inputs} and {outputs} in it. ``gpu``: its GPU's number."""

    image: str | None
    command: tuple[str, ...]
    engine: tuple[str, ...]
    options: tuple[str, ...]
    gpu: int

    def measure(self, inputs: Path, outputs: Path, gpu: Gpu | None) -> Trace:
        """Run it once on a folder that holds one case."""
        if self.image is None:
            folders = {"{inputs}": str(inputs), "{outputs}": str(outputs)}
            command = [_filled(word, folders) for word in self.command]
            return run_sampled(command, gpu=gpu)
        return measure_container(
            self.engine, self.image, Mounts(inputs, outputs), gpu, [*self.options, *gpu_options(gpu, self.gpu)]
        )


def gpu_options(gpu: Gpu | None, index: int) -> list[str]:
    """The organisers' way to hand a GPU to a container; nothing where there is none."""
    return ["--gpus", f"device={index}"] if gpu else []


def measure_container(
    engine: Sequence[str],
    image: str,
    mounts: Mounts,
    gpu: Gpu | None = None,
    options: Sequence[str] = (),
    command: Sequence[str] = PREDICT,
    limit: float | None = None,
) -> Trace:
    """Run one fresh container to its end and sample it. It is removed, also when this is interrupted.

    Raises TimeoutError after ``limit`` seconds.
    """
    name = re.sub(r"[^a-z0-9]+", "-", image.lower()).strip("-") + f"-{os.getpid()}"
    identity = mounts.outputs.parent / f".{name}.id"
    identity.unlink(missing_ok=True)
    naming = ["--name", name, "--cidfile", str(identity)]
    try:
        return run_sampled(run_command(engine, image, mounts, [*naming, *options], command), identity, gpu, limit)
    except BaseException:
        remove_container(engine, name)
        raise
    finally:
        identity.unlink(missing_ok=True)


def figures(case: str, trace: Trace, mask: bool) -> Efficiency:
    """The figures of one case from its samples. Raises EfficiencyError if it ended before a sample was taken."""
    if not trace.samples:
        raise EfficiencyError(f"{case}: ended after {trace.seconds:.2f} s, before a sample was taken")
    gpu = [sample.gpu for sample in trace.samples if sample.gpu is not None]
    own = [sample.own for sample in trace.samples if sample.own is not None]
    cpu_seconds = max((usage.cpu_seconds for usage in own), default=None)
    return Efficiency(
        case=case,
        seconds=trace.seconds,
        exit_code=trace.exit_code,
        mask=mask,
        gpu_highest=max(gpu, default=None),
        gpu_highest_flare22=highest_but_rare(gpu),
        gpu_area=sum(gpu) * PERIOD if gpu else None,
        gpu_area_tolerance=sum(max(0.0, value - GPU_TOLERANCE) for value in gpu) * PERIOD if gpu else None,
        cpu_area_flare=sum(sample.host_cpu for sample in trace.samples) * PERIOD,
        cpu_area_true=None if cpu_seconds is None else 100 * cpu_seconds / CORES,
        cpu_seconds=cpu_seconds,
        ram_peak=max((usage.ram_peak for usage in own), default=None),
        ram_own=max((usage.ram for usage in own), default=None),
        ram_host=max(sample.host_ram for sample in trace.samples),
        samples=len(trace.samples),
    )


def highest_but_rare(values: Sequence[float]) -> float | None:
    """The highest value that makes up more than 2 % of them, as FLARE22 takes it.

    Where every value is rare, the organisers' code fails; here that gives the true maximum. None of none.
    """
    counts = Counter(values)
    frequent = [value for value, count in counts.items() if count > RARE * len(values)]
    return max(frequent or counts, default=None)


def efficiency_csv(rows: Sequence[Efficiency]) -> str:
    """One row per case; the header carries the units, `no GPU` and `unknown` stand for what was not there."""
    header = [
        f"{field.name}_{UNITS[field.name]}" if field.name in UNITS else field.name for field in fields(Efficiency)
    ]
    names = [field.name for field in fields(Efficiency)]
    lines = [[_cell(name, value, 3) for name, value in zip(names, astuple(row), strict=True)] for row in rows]
    return _csv(header, lines)


def samples_csv(trace: Trace) -> str:
    """Every sample of a case."""
    header = (
        "seconds",
        "host_cpu_percent",
        "host_ram_mb",
        "own_cpu_seconds",
        "own_ram_mb",
        "own_ram_peak_mb",
        "gpu_mb",
    )
    lines = []
    for sample in trace.samples:
        own = sample.own
        values = (own.cpu_seconds, own.ram, own.ram_peak) if own else (None, None, None)
        numbers = (sample.seconds, sample.host_cpu, sample.host_ram, *values, sample.gpu)
        lines.append(["" if number is None else f"{number:.3f}" for number in numbers])
    return _csv(header, lines)


def efficiency_markdown(rows: Sequence[Efficiency]) -> str:
    """Mean and highest of every figure over the cases, and what the reader must know."""
    lines = [
        f"Efficiency over {len(rows)} {'case' if len(rows) == 1 else 'cases'}, one start per case.",
        "",
        "| Figure | Mean | Highest |",
        "|---|---|---|",
    ]
    for name, title, digits in TABLE:
        values = [getattr(row, name) for row in rows]
        known = [value for value in values if value is not None]
        if len(known) < len(values):
            cells = [_absent(name)] * 2
        else:
            cells = [f"{np.mean(known):.{digits}f}", f"{max(known):.{digits}f}"]
        lines.append(f"| {title} | {cells[0]} | {cells[1]} |")
    lines += [
        "",
        "MB are 2^20 bytes. Areas are sums of samples x 0.1 s. FLARE's CPU area is of the whole host, 100 x (1 - idle / (total + 0.1)) per "
        f"sample: compare it on one host only (this one has {CORES} cores). The true area is what the container itself used, "
        f"in the same unit: 100 x CPU seconds / {CORES}. FLARE22's highest GPU memory passes over values in at most 2 % of "
        "the samples.",
    ]
    failed = [row for row in rows if row.exit_code or not row.mask]
    if failed:
        lines += ["", "Failed:", "", *(f"- {row.case}: {_failure(row)}" for row in failed)]
    return "\n".join(lines) + "\n"


def table(rows: Sequence[Efficiency]) -> str:
    """A table for the terminal, one line per case and a mean."""
    columns = [
        entry
        for entry in TABLE
        if entry[0] in ("seconds", "gpu_highest", "cpu_area_flare", "cpu_area_true", "ram_peak")
    ]
    width = max(8, *(len(row.case) for row in rows))
    lines = [f"{'case':<{width}}" + "".join(f"  {title:>{len(title)}}" for _, title, _ in columns)]
    for row in rows:
        cells = [_cell(name, getattr(row, name), digits) for name, _, digits in columns]
        lines.append(
            f"{row.case:<{width}}" + "".join(f"  {c:>{len(t)}}" for c, (_, t, _) in zip(cells, columns, strict=True))
        )
    return "\n".join(lines) + "\n"


def draw_processor_and_memory(traces: dict[str, Trace]) -> Figure:
    """The paper's figure 6: CPU (left) and RAM (right) over the session, one case after the other."""
    figure = Figure(figsize=(11, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    begin = 0.0
    for number, trace in enumerate(traces.values()):
        times = np.array([sample.seconds for sample in trace.samples]) + begin
        labels = [None] * 4 if number else ["host, FLARE's formula", "container", "host", "container"]
        left.plot(times, [sample.host_cpu for sample in trace.samples], color="#9aa0a6", lw=0.8, label=labels[0])
        left.plot(times, _own_percent(trace.samples), color="#0b57d0", lw=1.0, label=labels[1])
        right.plot(times, [sample.host_ram for sample in trace.samples], color="#9aa0a6", lw=1.0, label=labels[2])
        right.plot(times, _own_ram(trace.samples), color="#0b57d0", lw=1.0, label=labels[3])
        begin += trace.seconds
    _finish(left, "CPU utilisation (% of the host)", "CPU")
    _finish(right, "RAM (MB)", "RAM")
    left.set_ylim(0, 105)
    return figure


def draw_gpu_memory(traces: dict[str, Trace]) -> Figure:
    """The paper's figure 7: GPU memory of the whole device over a single case, the one of median running time."""
    case = sorted(traces, key=lambda name: traces[name].seconds)[len(traces) // 2]
    figure = Figure(figsize=(5.5, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    samples = traces[case].samples
    times, memory = [sample.seconds for sample in samples], [sample.gpu or 0.0 for sample in samples]
    axes.plot(times, memory, color="#0b57d0", lw=1.2, label="whole device")
    axes.axhline(GPU_TOLERANCE, color="#9aa0a6", lw=0.8, ls="--", label=f"{GPU_TOLERANCE} MB")
    _finish(axes, "GPU memory (MB)", f"GPU memory, {case}")
    return figure


def measure_cases(cases: Sequence[Case], program: Program, out: Path) -> list[Efficiency]:
    """Measure every case and write what is known after each: efficiency.csv, samples/CASE.csv; then tables and figures.

    Masks go to out/masks, which stays over all cases, as the organisers' outputs do.
    """
    gpu = find_gpu(program.gpu)
    if gpu is None:
        log.info("no GPU %d here: its columns say %r", program.gpu, NO_GPU)
    masks, inputs, samples = out / "masks", out / f".inputs-{os.getpid()}", out / "samples"
    for folder in (masks, samples):
        folder.mkdir(parents=True, exist_ok=True)
    # A container may run as any user.
    masks.chmod(0o777)
    rows, traces = [], {}
    for number, case in enumerate(cases, start=1):
        trace = _measure_case(case, program, inputs, masks, gpu)
        row = figures(case.name, trace, (masks / f"{case.name}.nii.gz").is_file())
        rows.append(row)
        traces[case.name] = trace
        _report(number, len(cases), row, trace)
        atomic_write(samples / f"{case.name}.csv", samples_csv(trace).encode())
        atomic_write(out / "efficiency.csv", efficiency_csv(rows).encode())
    atomic_write(out / "efficiency.md", efficiency_markdown(rows).encode())
    atomic_write(out / "figure6.png", _png(draw_processor_and_memory(traces)))
    if gpu is not None:
        atomic_write(out / "figure7.png", _png(draw_gpu_memory(traces)))
    return rows


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``python -m train efficiency``."""
    parser.description = "Running time, GPU memory, CPU and RAM per case, as the FLARE organisers measure them: one fresh container per case."
    subject = parser.add_mutually_exclusive_group(required=True)
    subject.add_argument("--image", help="the image, such as organs:latest")
    subject.add_argument(
        "--command",
        dest="words",
        metavar="WORDS",
        help="a plain process instead, such as 'sh predict.sh {inputs} {outputs}'",
    )
    parser.add_argument("--inputs", type=Path, required=True, metavar="DIR", help="scans named CASE_0000.nii.gz")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where tables, figures and masks go")
    parser.add_argument(
        "--options",
        default="",
        metavar="WORDS",
        help="further options of the engine's run, such as '-m 28G --shm-size 28gb' as FLARE23 has",
    )
    parser.add_argument("--gpu", type=int, default=0, metavar="N", help="the GPU's number (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Exit status: 0 if every case got its mask, 1 if one did not, 2 if there was nothing to measure."""
    try:
        cases, problems = find_cases(args.inputs, args.out / "masks")
        if problems:
            raise EfficiencyError(problems[0])
        rows = measure_cases(cases, _program(args), args.out)
    except (InputError, ContainerError, EfficiencyError, SamplerError) as error:
        log.error("%s", error)
        return 2
    except OSError as error:
        log.error("%s: %s", error.filename or args.out, error.strerror)
        return 2
    sys.stdout.write(table(rows))
    failed = [row.case for row in rows if row.exit_code or not row.mask]
    if failed:
        log.error("%d of %d cases failed: %s", len(failed), len(rows), ", ".join(failed))
    return 1 if failed else 0


def _program(args: argparse.Namespace) -> Program:
    if args.image is None:
        words = tuple(shlex.split(args.words))
        for name in ("{inputs}", "{outputs}"):
            if not any(name in word for word in words):
                raise EfficiencyError(f"--command {args.words!r} holds no {name}; expected both folders in it")
        return Program(None, words, (), (), args.gpu)
    engine = find_engine()
    inspect_image(engine, args.image)
    return Program(args.image, (), tuple(engine), tuple(shlex.split(args.options)), args.gpu)


def _measure_case(case: Case, program: Program, inputs: Path, masks: Path, gpu: Gpu | None) -> Trace:
    """The organisers copy one file into the inputs, run, and remove it."""
    # A mask from an earlier measurement must not stand for this one's.
    (masks / f"{case.name}.nii.gz").unlink(missing_ok=True)
    inputs.mkdir()
    try:
        shutil.copyfile(case.scan, inputs / case.scan.name)
        return program.measure(inputs, masks, gpu)
    finally:
        # With whatever the program left beside the scan.
        shutil.rmtree(inputs)


def _report(number: int, count: int, row: Efficiency, trace: Trace) -> None:
    log.info("%d/%d %s: %.1f s", number, count, row.case, row.seconds)
    if row.exit_code or not row.mask:
        log.error("%s: %s: %s", row.case, _failure(row), last_line(trace.output))
    if row.cpu_seconds is None:
        log.warning("%s: its control group is not to be seen from here: own CPU and RAM are %s", row.case, UNKNOWN)
    elif trace.host_busy - row.cpu_seconds > DISTURBANCE * trace.seconds + 0.5:
        log.warning(
            "%s: the host did %.1f s of CPU work beside it: figures of the host and the running time are disturbed",
            row.case,
            trace.host_busy - row.cpu_seconds,
        )


def _failure(row: Efficiency) -> str:
    return f"exit code {row.exit_code}" if row.exit_code else "no mask was written"


def _own_percent(samples: Sequence[Sample]) -> list[float]:
    """CPU of the container between readings, percent of the host; none before it is there."""
    percents = []
    before, then = 0.0, 0.0
    for sample in samples:
        if sample.own is None:
            percents.append(0.0 if not before else float("nan"))
        else:
            span = max(sample.seconds - then, 1e-3)
            percents.append(100 * (sample.own.cpu_seconds - before) / span / CORES)
            before = sample.own.cpu_seconds
        then = sample.seconds
    return percents


def _own_ram(samples: Sequence[Sample]) -> list[float]:
    return [sample.own.ram if sample.own else float("nan") for sample in samples]


def _finish(axes: Axes, label: str, title: str) -> None:
    axes.set_xlabel("Time (s)")
    axes.set_ylabel(label)
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)


def _png(figure: Figure) -> bytes:
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=150, metadata={"Software": None})
    return content.getvalue()


def _filled(word: str, folders: dict[str, str]) -> str:
    for name, folder in folders.items():
        word = word.replace(name, folder)
    return word


def _cell(name: str, value: object, digits: int) -> str:
    if value is None:
        return _absent(name)
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.{digits}f}" if isinstance(value, float) else str(value)


def _absent(name: str) -> str:
    return NO_GPU if name.startswith("gpu") else UNKNOWN


def _csv(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(lines)
    return text.getvalue()
