"""The paper's table 5, and any other grid of inference settings: accuracy against time, with one bundle on one data set."""

import argparse
import csv
import io
import json
import logging
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from inference.bundle import Bundle, BundleError, read_bundle
from inference.engine import Device, Engine, EngineError, Precision, load_engine
from inference.pipeline import Options, Segmenter
from inference.volume import VolumeError, atomic_write, read_volume, write_labels
from train.config import ConfigError, load_config
from train.dataset import Case, DatasetError, held_out_cases
from train.efficiency import NO_GPU
from train.evaluate import EvaluationError, score_case

log = logging.getLogger(__name__)

Setting = dict[str, str]
ALL_AXES = (0, 1, 2)
SWITCH = {"on": True, "off": False}


class AblationError(ValueError):
    """A grid or a data set that cannot be used. The message says what was found and what was expected."""


def _step(text: str) -> str:
    """A fraction of the patch; `plan` is the bundle's own."""
    if text != "plan" and not 0 < float(text) <= 1:
        raise ValueError(text)
    return text


def _word(*words: str) -> Callable[[str], str]:
    def check(text: str) -> str:
        if text not in words:
            raise ValueError(text)
        return text

    return check


@dataclass(frozen=True)
class Axis:
    """One setting of a grid: how a value is checked, what is expected, and its value where the grid does not name it."""

    check: Callable[[str], str]
    expected: str
    default: str


AXES: Mapping[str, Axis] = {
    "step": Axis(_step, "numbers above 0 and at most 1, or plan", "plan"),
    "mirror": Axis(_word(*SWITCH), "on, off", "off"),
    "postprocess": Axis(_word(*SWITCH), "on, off", "on"),
    "device": Axis(_word("auto", "cpu", "cuda"), "auto, cpu, cuda", "auto"),
    "precision": Axis(_word("auto", "f32", "bf16"), "auto, f32, bf16", "auto"),
}
TABLE_5 = ("step=0.5,0.9", "mirror=off,on")


@dataclass(frozen=True)
class Result:
    """One case under one setting. ``dsc``, ``nsd``: means over the organs; ``seconds``: from reading the scan to its labels;

    ``gpu_seconds``: those in which the network ran on a GPU, None on a CPU.
    """

    case: str
    dsc: float
    nsd: float
    seconds: float
    gpu_seconds: float | None


def parse_grid(words: Sequence[str]) -> list[Setting]:
    """Every combination of ``name=value,value`` words, later names varying fastest. Raises AblationError."""
    axes: dict[str, list[str]] = {}
    for word in words:
        name, equals, values = word.partition("=")
        if name not in AXES or not equals or name in axes:
            raise AblationError(f"--grid {word!r}; expected each of {', '.join(AXES)} once, as name=value,value")
        try:
            axes[name] = [AXES[name].check(value) for value in values.split(",")]
        except ValueError as error:
            raise AblationError(f"--grid {word!r}; expected {AXES[name].expected}") from error
        if len(set(axes[name])) < len(axes[name]):
            raise AblationError(f"--grid {word!r} names a value twice; expected each once")
    return [dict(zip(axes, values, strict=True)) for values in product(*axes.values())]


def setting_name(setting: Setting) -> str:
    """A setting as the name of its folder: step-0.9_mirror-off."""
    return "_".join(f"{name}-{value}" for name, value in setting.items()) or "plan"


def ablate(cases: Sequence[Case], bundle: Bundle, settings: Sequence[Setting], out: Path) -> dict[str, list[Result]]:
    """Segment and score every case under every setting; what lies in ``out`` already is kept.

    A first, unmeasured window warms the engine up. Raises the errors of bundle, engine, volume, evaluation.
    """
    results: dict[str, list[Result]] = {}
    for number, setting in enumerate(settings, start=1):
        name = setting_name(setting)
        log.info("%d/%d %s", number, len(settings), name)
        todo = [case for case in cases if not _result_path(out, name, case.id).exists()]
        if todo:
            _measure(todo, segmenter_of(bundle, setting), out, name)
        results[name] = [_read_result(_result_path(out, name, case.id)) for case in cases]
    return results


def segmenter_of(bundle: Bundle, setting: Setting) -> Segmenter:
    """The pipeline under one setting."""
    values = {name: setting.get(name, axis.default) for name, axis in AXES.items()}
    # Checked by parse_grid.
    device: Device = values["device"]  # type: ignore[assignment]
    precision: Precision = values["precision"]  # type: ignore[assignment]
    options = Options(
        None if values["step"] == "plan" else float(values["step"]),
        ALL_AXES if SWITCH[values["mirror"]] else (),
        SWITCH[values["postprocess"]],
    )
    return Segmenter(bundle, load_engine(bundle, device, precision=precision), options)


def ablation_csv(settings: Sequence[Setting], results: Mapping[str, Sequence[Result]]) -> str:
    """One row per setting and case."""
    names = list(settings[0])
    lines = [
        [
            *setting.values(),
            each.case,
            f"{each.dsc:.4f}",
            f"{each.nsd:.4f}",
            f"{each.seconds:.3f}",
            _gpu(each.gpu_seconds, 3),
        ]
        for setting in settings
        for each in results[setting_name(setting)]
    ]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*names, "case", "dsc", "nsd", "seconds", "gpu_seconds"])
    writer.writerows(lines)
    return text.getvalue()


def ablation_markdown(settings: Sequence[Setting], results: Mapping[str, Sequence[Result]], engine: str) -> str:
    """The paper's table 5: one row per setting, means over the cases."""
    names = list(settings[0])
    count = len(results[setting_name(settings[0])])
    lines = [
        f"Mean over {count} {'case' if count == 1 else 'cases'} ({engine}). Time: from reading a scan to its labels, the "
        "network loaded; GPU time: the network's part of it on a GPU.",
        "",
        "| " + " | ".join([*(name.capitalize() for name in names), "DSC", "NSD", "Time (s)", "GPU time (s)"]) + " |",
        "|" + "---|" * (len(names) + 4),
    ]
    for setting in settings:
        cells = [*setting.values(), *_means(results[setting_name(setting)])]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def table(settings: Sequence[Setting], results: Mapping[str, Sequence[Result]]) -> str:
    """The same for the terminal."""
    heads = [*settings[0], "DSC", "NSD", "time (s)", "GPU time (s)"]
    lines = [heads, *([*setting.values(), *_means(results[setting_name(setting)])] for setting in settings)]
    widths = [max(len(cell) for cell in column) for column in zip(*lines, strict=True)]
    return "".join(
        "  ".join(f"{c:<{w}}" for c, w in zip(cells, widths, strict=True)).rstrip() + "\n" for cells in lines
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``python -m train ablate``."""
    parser.description = (
        "Accuracy and time over a grid of inference settings: the paper's table 5 unless --grid says otherwise."
    )
    parser.add_argument(
        "--data", type=Path, required=True, metavar="DIR", help="data set whose test split (imagesTs, labelsTs) is used"
    )
    parser.add_argument("--weights", type=Path, required=True, metavar="DIR", help="bundle: plan.json and its network")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where results and tables go")
    parser.add_argument(
        "--grid",
        nargs="+",
        default=list(TABLE_5),
        metavar="NAME=VALUE,...",
        help="; ".join(f"{name}: {axis.expected}" for name, axis in AXES.items()) + f" (default: {' '.join(TABLE_5)})",
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="settings, for other folder names (section data)")


def run(args: argparse.Namespace) -> int:
    """Exit status: 0 if every setting was measured, 2 if not."""
    try:
        settings = parse_grid(args.grid)
        cases = held_out_cases(args.data, load_config(args.config).data)
        bundle = read_bundle(args.weights)
        if any(SWITCH[setting.get("mirror", "off")] for setting in settings):
            bundle.plan.check_mirroring(ALL_AXES)  # before hours are spent on the other settings
        engine = load_engine(bundle).name
        check_same_ablation(args.out, bundle, engine)
        results = ablate(cases, bundle, settings, args.out)
        atomic_write(args.out / "ablation.csv", ablation_csv(settings, results).encode())
        atomic_write(args.out / "ablation.md", ablation_markdown(settings, results, engine).encode())
    except (AblationError, BundleError, ConfigError, DatasetError, EngineError, EvaluationError, VolumeError) as error:
        log.error("%s", error)
        return 2
    except OSError as error:
        log.error("%s: %s", error.filename or args.out, error.strerror)
        return 2
    sys.stdout.write(table(settings, results))
    return 0


def check_same_ablation(out: Path, bundle: Bundle, engine: str) -> None:
    """Results of other weights or another machine must not stand beside these. Raises AblationError."""
    record = out / "ablation.json"
    facts = {"sha256": bundle.plan.model.sha256, "engine": engine}
    if record.exists():
        found = json.loads(record.read_text(encoding="utf-8"))
        if found != facts:
            raise AblationError(f"{out}: holds results of {found}, now it is {facts}; expected another folder")
    out.mkdir(parents=True, exist_ok=True)
    atomic_write(record, (json.dumps(facts, indent=2) + "\n").encode())


def _measure(cases: Sequence[Case], segmenter: Segmenter, out: Path, name: str) -> None:
    folder = out / name
    folder.mkdir(parents=True, exist_ok=True)
    _warm_up(segmenter.engine, segmenter.plan.patch)
    for number, case in enumerate(cases, start=1):
        result = _segment_and_score(case, segmenter, folder)
        atomic_write(_result_path(out, name, case.id), (json.dumps(asdict(result)) + "\n").encode())
        log.info("  %d/%d %s: DSC %.4f, %.1f s", number, len(cases), case.id, result.dsc, result.seconds)


def _segment_and_score(case: Case, segmenter: Segmenter, folder: Path) -> Result:
    assert case.label is not None  # the test split is paired
    start = time.perf_counter()
    scan = read_volume(case.image, segmenter.plan.orientation)
    done = segmenter.segment(scan)
    seconds = time.perf_counter() - start
    # Through a file, as the evaluator sees it; gone once it is scored.
    mask = folder / f"{case.id}.nii.gz"
    write_labels(mask, done.labels, scan)
    try:
        scores = score_case(mask, case.label).values()
    finally:
        mask.unlink()
    gpu = done.seconds["network"] if "CUDA" in segmenter.engine.name else None
    dsc, nsd = (float(np.mean([getattr(score, figure) for score in scores])) for figure in ("dsc", "nsd"))
    return Result(case.id, dsc, nsd, seconds, gpu)


def _warm_up(engine: Engine, patch: tuple[int, int, int]) -> None:
    """The first window is slow: the engine chooses its algorithms. A container pays for it once per scan."""
    engine(np.zeros(patch, np.float32))


def _result_path(out: Path, name: str, case: str) -> Path:
    return out / name / f"{case}.json"


def _read_result(path: Path) -> Result:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return Result(**content)


def _means(results: Sequence[Result]) -> list[str]:
    dsc, nsd, seconds = (
        float(np.mean([getattr(each, name) for each in results])) for name in ("dsc", "nsd", "seconds")
    )
    gpu = [each.gpu_seconds for each in results if each.gpu_seconds is not None]
    return [f"{dsc:.4f}", f"{nsd:.4f}", f"{seconds:.1f}", _gpu(float(np.mean(gpu)) if gpu else None, 1)]


def _gpu(seconds: float | None, digits: int) -> str:
    return NO_GPU if seconds is None else f"{seconds:.{digits}f}"
