"""The main path, read first: load a bundle once, segment a volume, walk a folder of scans."""

import json
import logging
import os
import resource
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from inference.body import Windows, find_body
from inference.bundle import Bundle, BundleError, Intensity, Plan
from inference.engine import Engine, EngineError, OnnxRuntimeEngine, OpenVinoEngine
from inference.postprocess import Context, postprocess
from inference.resample import Floats, labels_on_grid, to_working_grid, working_shape
from inference.sliding_window import Layout, Progress, fitted_window, mirrored, sliding_window
from inference.stitching import Stitcher
from inference.threads import in_turn, side_by_side
from inference.volume import (
    SUFFIXES,
    Labels,
    Shape,
    Spacing,
    Volume,
    VolumeError,
    atomic_write,
    read_volume,
    write_labels,
)

log = logging.getLogger(__name__)

# A case CASE is CASE_0000.nii.gz among the inputs (nnU-Net's channel 0) and CASE.nii.gz among the outputs.
CHANNEL = "_0000"
STAGES = ("read", "resample", "network", "labels", "rules", "write")


class InputError(ValueError):
    """Inputs or outputs that cannot be walked at all. The message names the path, what was found and what was expected."""


@dataclass(frozen=True)
class Options:
    """How a bundle is run. ``step``: window step, None takes the plan's. ``mirror_axes``: test-time mirroring, 0 z, 1 y, 2 x.

    ``crop``: only the rows and columns that hold the body are worked on; outside them the mask is background. ``fit``: windows
    may be larger than the plan's patch where that saves work, and where the engine can.
    """

    step: float | None = None
    mirror_axes: tuple[int, ...] = ()
    postprocess: bool = True
    crop: bool = True
    fit: bool = True

    def __post_init__(self) -> None:
        if self.step is not None and not 0 < self.step <= 1:
            raise ValueError(f"step is {self.step}; expected a number above 0 and at most 1")


@dataclass(frozen=True)
class Segmentation:
    """A label map (z, y, x) on the scan's grid, seconds and CPU seconds per stage, and what its reader should know."""

    labels: Labels
    seconds: dict[str, float]
    cpu_seconds: dict[str, float]
    warnings: tuple[str, ...]


@dataclass
class Stopwatch:
    """Seconds per stage, and CPU seconds of the whole process meanwhile; a stage that is entered again adds up."""

    seconds: dict[str, float] = field(default_factory=dict)
    cpu_seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start, cpu_start = time.perf_counter(), time.process_time()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
            self.cpu_seconds[name] = self.cpu_seconds.get(name, 0.0) + time.process_time() - cpu_start

    def take_out(self, inner: "Stopwatch", outer: str) -> None:
        """Stages that another watch measured within the stage ``outer`` count for themselves alone."""
        for mine, theirs in ((self.seconds, inner.seconds), (self.cpu_seconds, inner.cpu_seconds)):
            for name, spent in theirs.items():
                mine[outer] -= spent
                mine[name] = mine.get(name, 0.0) + spent


@dataclass(frozen=True)
class Prepared:
    """A scan as the network sees it: ``image`` (z, y, x) on the working grid, normalised, of the ``box`` of a scan of
    ``shape`` voxels, ``spacing`` mm apart; ``window``: of the sliding window, voxels of the working grid; ``watch``: what
    that took. The scan's own voxels are no longer needed."""

    image: Floats
    window: Shape
    box: tuple[slice, slice, slice]
    shape: Shape
    spacing: Spacing
    watch: Stopwatch

    @property
    def target(self) -> Shape:
        """Voxels (z, y, x) of the scan in the box."""
        z, y, x = (len(range(*part.indices(size))) for part, size in zip(self.box, self.shape, strict=True))
        return z, y, x


@dataclass(frozen=True)
class Case:
    """One scan on disk and the path of its mask."""

    name: str
    scan: Path
    mask: Path


class Segmenter:
    """A loaded bundle, ready for any number of scans. Raises BundleError for mirroring that the network never learned."""

    def __init__(self, bundle: Bundle, engine: Engine, options: Options | None = None) -> None:
        self.plan = bundle.plan
        self.engine = engine
        self.options = options or Options()
        self.plan.check_mirroring(self.options.mirror_axes)
        # Beside a GPU one thread does everything, as in the paper (section 4.3).
        self._each = side_by_side(engine.threads) if isinstance(engine, OpenVinoEngine) else in_turn
        self._stitcher: Stitcher | None = None
        # Why the device does not stitch although it should.
        self._left_to_host: tuple[str, ...] = ()
        if isinstance(engine, OnnxRuntimeEngine) and engine.adds_up and not self.options.mirror_axes:
            try:
                self._stitcher = Stitcher(engine, len(self.plan.classes))
            except (EngineError, BundleError) as error:
                self._leave_to_host(error)

    def logits(self, image: Floats, progress: Progress | None = None) -> Iterator[Floats]:
        """Logits of a scan on the working grid, in HU (z, y, x), as consecutive slabs (classes, n, y, x).

        A slab is valid until the next one is asked for.
        """
        return self._slabs(normalise(image.astype(np.float32), self.plan.intensity), self.plan.patch, progress)

    def _slabs(self, normalised: Floats, window: Shape, progress: Progress | None) -> Iterator[Floats]:
        network = mirrored(self.engine, self.options.mirror_axes)
        return sliding_window(normalised, window, self.step, network, progress, self._each)

    @property
    def step(self) -> float:
        """Window step as a fraction of the patch."""
        return self.plan.step if self.options.step is None else self.options.step

    def segment(self, scan: Volume, progress: Progress | None = None) -> Segmentation:
        """Label map of a scan, which must be in the plan's orientation. Its working set is a few windows and the scan."""
        return self.finish(self.prepare(scan), progress)

    def prepare(self, scan: Volume) -> Prepared:
        """A scan, which must be in the plan's orientation, on the working grid."""
        watch = Stopwatch()
        with watch.stage("resample"):
            window, box = self._place(scan)
            with self._made_ready(window):
                voxels = scan.voxels[box]
                intensity = self.plan.intensity
                working = working_shape(voxels.shape, scan.spacing, self.plan.spacing)
                clip = (intensity.clip_low, intensity.clip_high)
                image = to_working_grid(voxels, working, clip, self.plan.anti_aliasing)
                image = normalise(image, intensity)
        return Prepared(image, window, box, scan.shape, scan.spacing, watch)

    def finish(self, prepared: Prepared, progress: Progress | None = None) -> Segmentation:
        """Label map of a scan that was prepared, on its own grid."""
        watch = prepared.watch
        labels = self._labels(prepared, progress)
        if isinstance(self.engine, OpenVinoEngine):
            self.engine.release()  # the rules take its place in memory
        warnings = self._left_to_host
        if self.options.postprocess:
            with watch.stage("rules"):
                labels, notes = postprocess(labels, Context.of(self.plan, prepared.spacing, self._each))
                warnings = (*warnings, *notes)
        if not labels.any():
            warnings = (*warnings, "no organ found: the mask is empty")
        whole = np.zeros(prepared.shape, np.uint8)
        whole[prepared.box] = labels
        return Segmentation(whole, watch.seconds, watch.cpu_seconds, warnings)

    @contextmanager
    def _made_ready(self, window: Shape) -> Iterator[None]:
        """Meanwhile, on a thread to spare, make the CPU's network ready for ``window``.

        What goes wrong there goes wrong again at the first window, and is told then.
        """
        if not isinstance(self.engine, OpenVinoEngine) or self.engine.threads == 1:
            yield
            return
        with ThreadPoolExecutor(1, thread_name_prefix="network") as thread:
            thread.submit(self.engine.make_ready, window)
            yield

    def _place(self, scan: Volume) -> tuple[Shape, tuple[slice, slice, slice]]:
        """The sliding window, in voxels of the working grid, and the part of the scan that is worked on, both (z, y, x)."""
        body = find_body(scan.voxels, scan.spacing) if self.options.crop else None
        least = (slice(None), *(extent.least for extent in body)) if body else (slice(None),) * 3
        window = self.plan.patch
        if self.options.fit and self.engine.unit:
            working = working_shape(scan.voxels[least].shape, scan.spacing, self.plan.spacing)
            window = fitted_window(working, self.plan.patch, self.step, self.engine.unit, self.engine.growth)
        if not body:
            return window, (slice(None), slice(None), slice(None))
        y, x = (
            extent.span(Windows(size, self.step, side))
            for extent, size, side in zip(body, window[1:], self.plan.spacing[1:], strict=True)
        )
        return window, (slice(None), y, x)

    def layout(self, prepared: Prepared) -> Layout:
        """Where the windows lie in a prepared scan."""
        z, y, x = prepared.image.shape
        return Layout.of((z, y, x), prepared.window, self.step)

    def _labels(self, prepared: Prepared, progress: Progress | None) -> Labels:
        """Labels of a prepared scan's box, on the scan's grid."""
        image, target, watch = prepared.image, prepared.target, prepared.watch
        layout = self.layout(prepared)
        if self._stitcher and self._stitcher.fits(layout):
            try:
                return self._stitcher.labels(image, layout, target, watch.stage, progress)
            except EngineError as error:
                self._leave_to_host(error)
        within = Stopwatch()
        with watch.stage("labels"):
            slabs = _timed(self._slabs(image, prepared.window, progress), within, "network")
            labels = labels_on_grid(slabs, image.shape[0], target, self._each)
        watch.take_out(within, "labels")  # the slabs are made while the labels are painted
        return labels

    def _leave_to_host(self, error: Exception) -> None:
        """From now on the device computes windows only. A scan whose windows fail on the host's way too fails with that."""
        self._stitcher = None
        self._left_to_host = (f"the device could not add windows up, so the host does ({error})",)
        if isinstance(self.engine, OnnxRuntimeEngine):
            self.engine.stop_adding()


def normalise(image: Floats, intensity: Intensity) -> Floats:
    """HU to the network's range, in place: clip, then z-score (nnU-Net's CT scheme)."""
    np.clip(image, intensity.clip_low, intensity.clip_high, out=image)
    image -= np.float32(intensity.mean)
    image /= np.float32(intensity.std)
    return image


def find_cases(inputs: Path, outputs: Path) -> tuple[list[Case], list[str]]:
    """Cases of a folder, or of one scan, and a sentence for every scan that cannot be one.

    Raises InputError where there is no scan at all.
    """
    if inputs.is_dir():
        entries = sorted(entry for entry in inputs.iterdir() if entry.is_file() and not entry.name.startswith("."))
    elif inputs.is_file():
        entries = [inputs]
    else:
        raise InputError(f"{inputs}: no such file or folder; expected a scan CASE{CHANNEL}.nii.gz or a folder of them")
    scans = [entry for entry in entries if entry.name.endswith(SUFFIXES)]
    for entry in entries:
        if entry not in scans:
            log.warning("%s: passed over; scans end in %s", entry, " or ".join(SUFFIXES))
    if not scans:
        raise InputError(f"{inputs}: holds no scan; expected at least one file CASE{CHANNEL}.nii.gz")
    by_name: dict[str, list[Path]] = {}
    problems = []
    for scan in scans:
        stem = scan.name.removesuffix(".gz").removesuffix(".nii")
        name = stem.removesuffix(CHANNEL)
        if name in (stem, ""):
            problems.append(f"{scan}: the name does not end in {CHANNEL}; expected CASE{CHANNEL}.nii.gz")
        else:
            by_name.setdefault(name, []).append(scan)
    cases = []
    for name, paths in by_name.items():
        if len(paths) > 1:
            both = " and ".join(path.name for path in paths)
            problems.append(f"{inputs}: {both} would both become {name}.nii.gz; expected one scan per case")
        else:
            cases.append(Case(name, paths[0], outputs / f"{name}.nii.gz"))
    return cases, problems


def check_outputs(inputs: Path, outputs: Path, report: Path | None) -> None:
    """Make the output folder and see that results can be written, before any work. Raises InputError."""
    try:
        outputs.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{outputs}: cannot be made ({error.strerror}); expected a folder for the masks") from error
    if not os.access(outputs, os.W_OK | os.X_OK):
        raise InputError(f"{outputs}: cannot be written to; expected a writable folder for the masks")
    folder = inputs if inputs.is_dir() else inputs.parent
    if folder.resolve() == outputs.resolve():
        raise InputError(f"{outputs}: is the input folder too; expected another folder for the masks")
    if report is None:
        return
    if report.resolve().is_relative_to(outputs.resolve()):
        raise InputError(
            f"{report}: lies in the output folder, which holds masks and nothing else; expected a path outside"
        )
    if not (report.parent.is_dir() and os.access(report.parent, os.W_OK | os.X_OK)):
        raise InputError(f"{report}: its folder does not exist or cannot be written to; expected a writable folder")


class Reader:
    """Reads scans in a thread, each while the one before is worked on, the first while the engine is loaded."""

    def __init__(self, cases: Sequence[Case], orientation: str) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="read")
        self._paths = [case.scan for case in cases]
        self._orientation = orientation
        self._next: Future[Volume] | None = None
        self._read_next()

    def take(self) -> Volume:
        """The next scan, in the order of the cases; reading of the one after begins. Raises VolumeError, MemoryError."""
        assert self._next is not None, "more scans taken than cases"
        ready, self._next = self._next, None
        wait((ready,))
        self._read_next()
        return ready.result()

    def _read_next(self) -> None:
        if self._paths:
            self._next = self._thread.submit(read_volume, self._paths.pop(0), self._orientation)


def segment_cases(
    cases: Sequence[Case],
    segmenter: Segmenter,
    problems: Sequence[str] = (),
    report: Path | None = None,
    reader: Reader | None = None,
    start: Mapping[str, float] | None = None,
) -> int:
    """Segment every case and write its mask; one that fails is named and the rest goes on.

    ``problems`` (see ``find_cases``) and the cases that fail are logged and counted: the number is returned.
    ``reader``: of these cases, where it has begun already. ``start``: seconds of the start, for the report.
    ``report``: JSON of organ volumes, seconds, memory and warnings per case, rewritten whole after each case.
    """
    for problem in problems:
        log.error("%s", problem)
    entries: list[dict[str, Any]] = [{"case": None, "error": problem} for problem in problems]
    failed = len(problems)
    reader = reader or Reader(cases, segmenter.plan.orientation)
    for number, case in enumerate(cases, start=1):
        log.info("%d/%d %s", number, len(cases), case.name)
        try:
            entry = _segment_case(case, segmenter, reader)
        except (VolumeError, EngineError, BundleError, OSError, MemoryError) as error:
            failed += 1
            message = _message(case, error)
            log.error("%s", message)
            entry = {"case": case.name, "error": message}
        entries.append(entry)
        if report:
            _write_report(report, {"engine": segmenter.engine.name, "start": dict(start or {}), "cases": entries})
    return failed


def _write_report(report: Path, content: Mapping[str, Any]) -> None:
    """The report of what was done so far. A report that cannot be written is no reason to stop making masks."""
    try:
        atomic_write(report, (json.dumps(content, indent=2) + "\n").encode())
    except OSError as error:
        log.error("%s: could not be written (%s)", report, error.strerror)


def _segment_case(case: Case, segmenter: Segmenter, reader: Reader) -> dict[str, Any]:
    """Segment and write the next case of ``reader``; returns its entry of the report. ``read``: seconds waited for it."""
    watch = Stopwatch()
    with watch.stage("read"):
        scan = reader.take()
    prepared = segmenter.prepare(scan)
    scan = scan.without_voxels()
    result = segmenter.finish(prepared, _log_progress())
    with watch.stage("write"):
        write_labels(case.mask, result.labels, scan)
    warnings = (*scan.warnings, *result.warnings)
    for warning in warnings:
        log.warning("%s: %s", case.scan, warning)
    seconds = _in_order({**watch.seconds, **result.seconds})
    log.info(
        "  %s in %.1f s (%s)", case.mask, sum(seconds.values()), ", ".join(f"{k} {v:.1f}" for k, v in seconds.items())
    )
    return {
        "case": case.name,
        "shape": scan.shape,
        "spacing": [round(side, 4) for side in scan.spacing],
        "windows": segmenter.layout(prepared).windows,
        "window": prepared.window,
        "organ_ml": organ_volumes(result.labels, segmenter.plan, scan.voxel_volume),
        "seconds": seconds,
        "cpu_seconds": _in_order({**watch.cpu_seconds, **result.cpu_seconds}),
        "peak_memory_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "warnings": warnings,
    }


def _in_order(seconds: Mapping[str, float]) -> dict[str, float]:
    """Seconds by stage, in the order of the stages."""
    return {name: round(seconds[name], 3) for name in STAGES if name in seconds}


def organ_volumes(labels: Labels, plan: Plan, voxel_volume: float) -> dict[str, float]:
    """mL of every organ of the plan in a label map."""
    counts = np.zeros(256, np.int64)
    for plane in labels:  # numpy counts in 64 bits: a plane at a time, not the whole scan
        counts += np.bincount(plane.ravel(), minlength=256)
    return {name: round(counts[index] * voxel_volume / 1000, 2) for index, name in enumerate(plan.classes) if index}


def _message(case: Case, error: Exception) -> str:
    """One sentence that names the file."""
    if isinstance(error, VolumeError):
        return str(error)
    if isinstance(error, MemoryError):
        return f"{case.scan}: not enough memory ({error}); expected room for the scan and a few windows"
    if isinstance(error, OSError):
        return f"{case.mask}: could not be written ({error.strerror or error}); nothing was left of it"
    return f"{case.scan}: {error}"


def _timed(slabs: Iterator[Floats], watch: Stopwatch, stage: str) -> Iterator[Floats]:
    """Pass slabs on and charge the time that they take to make to ``stage``."""
    while True:
        with watch.stage(stage):
            slab = next(slabs, None)
        if slab is None:
            return
        yield slab
        del slab  # its memory is the next one's


def _log_progress(every: float = 5.0) -> Progress:
    """A progress callback that logs at most once in ``every`` seconds."""
    start = last = time.monotonic()

    def progress(done: int, windows: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= every and done < windows:
            last = now
            left = (now - start) / done * (windows - done)
            log.info("  window %d of %d, about %.0f s left", done, windows, left)

    return progress
