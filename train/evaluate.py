"""Score a folder of predictions as the FLARE22 organisers do: DSC and NSD per case and organ, and their summary.

Three levels, each calling the one below: arrays (``score_labels``), one case (``score_case``), a folder
(``score_folder``).
"""

import argparse
import csv
import io
import logging
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from scipy import ndimage

from inference.engine import available_cores
from inference.organs import ORGANS, Organ
from inference.volume import SUFFIXES, Labels, Volume, VolumeError, atomic_write, read_labels
from train import groups
from train.metrics import Figure, Score, Spacing, score, summarise_values
from train.processes import process_pool

log = logging.getLogger(__name__)

Scores = dict[str, Score]
Box = tuple[slice, slice, slice]

# Masks of one grid that went through different tools differ by rounding; a tenth of a voxel is no rounding.
GEOMETRY_TOLERANCE = 0.1
# Characters: cases stand side by side only where a terminal shows them without breaking lines.
TERMINAL_WIDTH = 100


class EvaluationError(ValueError):
    """A pair of masks or a pair of folders that cannot be compared. The message names the file."""


@dataclass(frozen=True)
class Evaluation:
    """What came of a folder: scores by case and organ, failed cases with the reason, cases without a prediction."""

    scores: dict[str, Scores]
    errors: dict[str, str]
    missing: tuple[str, ...]


@dataclass(frozen=True)
class Row:
    """One line of the summary: an organ, or the mean over organs."""

    name: str
    cases: int
    dsc: Figure
    nsd: Figure


def score_labels(reference: Labels, prediction: Labels, spacing: Spacing, organs: Sequence[Organ] = ORGANS) -> Scores:
    """Score ``organs`` of two label maps (z, y, x) in the file's index order; ``spacing`` in mm, (z, y, x).

    Raises EvaluationError if the shapes differ.
    """
    if reference.shape != prediction.shape:
        raise EvaluationError(f"reference is {reference.shape}, prediction {prediction.shape} (z, y, x)")
    boxes = [ndimage.find_objects(labels, max_label=len(ORGANS)) for labels in (reference, prediction)]
    scores = {}
    for organ in organs:
        # Cropped to the organ: the rest of the scan holds nothing that either figure counts.
        box = _enclosing(found[organ.id - 1] for found in boxes)
        scores[organ.name] = score(reference[box] == organ.id, prediction[box] == organ.id, spacing, organ)
    return scores


def score_case(prediction: Path, reference: Path, organs: Sequence[Organ] = ORGANS) -> Scores:
    """Score ``organs`` of one pair of files on the same grid.

    Voxels are compared as stored and spacing is the reference's header's, as in the organisers' code.
    Raises VolumeError for an unreadable file, EvaluationError if the grids differ.
    """
    truth, mask = read_labels(reference), read_labels(prediction)
    _check_geometry(prediction, mask, reference, truth)
    return score_labels(_as_stored(truth), _as_stored(mask), _header_spacing(truth), organs)


def score_folder(predictions: Path, references: Path, jobs: int = 1, organs: Sequence[Organ] = ORGANS) -> Evaluation:
    """Score ``organs`` of every reference of a folder, ``jobs`` cases at a time.

    A case without a prediction scores 0 throughout; a case that fails is named in ``errors`` and the others go on.
    Raises EvaluationError as ``find_pairs`` does.
    """
    truth, masks = find_pairs(predictions, references)
    paired = sorted(truth.keys() & masks.keys())
    for case in sorted(masks.keys() - truth.keys()):
        log.info("%s: no reference, so not scored", masks[case])
    missing = tuple(sorted(truth.keys() - masks.keys()))
    for case in missing:
        log.warning("%s: no prediction in %s, so every organ scores 0", case, predictions)
    scores: dict[str, Scores] = {case: {organ.name: Score(0.0, 0.0) for organ in organs} for case in missing}
    errors = {}
    pairs = [(case, masks[case], truth[case]) for case in paired]
    for done, (case, outcome, seconds) in enumerate(_score_pairs(pairs, jobs, organs), start=1):
        if isinstance(outcome, str):
            errors[case] = outcome
            log.error("%d/%d %s", done, len(pairs), outcome)
        else:
            scores[case] = outcome
            dsc, nsd = _means(outcome)
            log.info("%d/%d %s: DSC %.4f, NSD %.4f (%.1f s)", done, len(pairs), case, dsc, nsd, seconds)
    return Evaluation(dict(sorted(scores.items())), dict(sorted(errors.items())), missing)


def find_pairs(predictions: Path, references: Path) -> tuple[dict[str, Path], dict[str, Path]]:
    """References and predictions by case.

    No prediction at all is a valid, if poor, result. Raises EvaluationError as ``find_masks`` does, for a folder of
    references without a mask, and if predictions have other names than references.
    """
    truth, masks = find_masks(references), find_masks(predictions)
    if not truth:
        raise EvaluationError(f"{references}: holds no .nii.gz or .nii file; expected masks named CASE.nii.gz")
    if masks and not truth.keys() & masks.keys():
        raise EvaluationError(
            f"{predictions} and {references} share no case: predictions are named {_examples(masks)}, "
            f"references {_examples(truth)}; expected CASE.nii.gz under the same name in both"
        )
    return truth, masks


def find_masks(folder: Path) -> dict[str, Path]:
    """The masks of a folder by case. Raises EvaluationError for a missing folder or a case that is there twice."""
    if not folder.is_dir():
        raise EvaluationError(f"{folder}: no such folder; expected one with masks named CASE.nii.gz")
    masks: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        suffix = next((suffix for suffix in SUFFIXES if path.name.endswith(suffix)), None)
        if suffix is None or path.name.startswith("."):
            continue
        case = path.name.removesuffix(suffix)
        if case in masks:
            raise EvaluationError(f"{path}: {masks[case].name} is the same case; expected one mask per case")
        masks[case] = path
    return masks


def check_same_grid(path: Path, mask: Volume, other_path: Path, other: Volume) -> None:
    """Do two volumes share shape and place? Raises EvaluationError naming both files and how they differ."""
    if mask.shape != other.shape:
        sizes = [" x ".join(str(size) for size in volume.shape[::-1]) for volume in (mask, other)]
        raise EvaluationError(f"{path}: {sizes[0]} voxels; expected {sizes[1]} as {other_path} has")
    z, y, x = (size - 1 for size in mask.shape)
    corners = np.array([(i, j, k, 1) for i in (0, x) for j in (0, y) for k in (0, z)], float).T
    shift = float(np.linalg.norm(((mask.affine - other.affine) @ corners)[:3], axis=0).max())
    if shift > GEOMETRY_TOLERANCE * min(other.spacing):
        raise EvaluationError(
            f"{path}: lies up to {shift:.3g} mm away from {other_path}: spacing, origin or direction of their headers differ"
        )


def summarise(scores: dict[str, Scores]) -> list[Row]:
    """One row per organ and a last one, "overall": the mean over organs of each case. At least one case."""
    if not scores:
        raise EvaluationError("no case was scored, so there is nothing to summarise")
    organs = _organs(scores)
    dsc, nsd = (
        np.array([[getattr(case[organ], name) for organ in organs] for case in scores.values()])
        for name in ("dsc", "nsd")
    )
    names = [*organs, "overall"]
    columns = [np.column_stack([values, values.mean(axis=1)]).T for values in (dsc, nsd)]
    return [
        Row(name, len(scores), summarise_values(d), summarise_values(n))
        for name, d, n in zip(names, *columns, strict=True)
    ]


def scores_csv(scores: dict[str, Scores]) -> str:
    """The long table: case, organ, dsc, nsd, one row per case and organ."""
    lines = [
        (case, organ, f"{score.dsc:.4f}", f"{score.nsd:.4f}")
        for case, organs in scores.items()
        for organ, score in organs.items()
    ]
    return _csv(("case", "organ", "dsc", "nsd"), lines)


def summary_csv(rows: Sequence[Row]) -> str:
    """The summary as a table: mean, 95 % interval and median of both figures per organ."""
    names = ("mean", "low", "high", "median")
    header = ("organ", "cases", *(f"{figure}_{name}" for figure in ("dsc", "nsd") for name in names))
    lines = [
        (row.name, str(row.cases), *(f"{getattr(figure, name):.4f}" for figure in (row.dsc, row.nsd) for name in names))
        for row in rows
    ]
    return _csv(header, lines)


def summary_markdown(evaluation: Evaluation, rows: Sequence[Row]) -> str:
    """The summary as the paper's table 4, with intervals, and what the reader must know about the cases."""
    count = len(evaluation.scores)
    lines = [
        f"DSC and NSD per organ: mean over {count} {_cases(count)} [95 % bootstrap interval], and median.",
        "",
        "| Organ | DSC | Median DSC | NSD | Median NSD |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [_title(row.name)]
        for figure in (row.dsc, row.nsd):
            cells += [f"{figure.mean:.4f} [{figure.low:.4f}, {figure.high:.4f}]", f"{figure.median:.4f}"]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "By the rules of the FLARE22 evaluation: an organ absent from both masks scores 1, from one of them 0; NSD is 0 where "
        "DSC is below 0.2; aorta, inferior vena cava and esophagus are compared in the labelled slices but the last.",
    ]
    if len(rows) - 1 < len(ORGANS):
        lines += ["", f"{len(rows) - 1} of the {len(ORGANS)} organs were scored; overall is the mean over these."]
    if evaluation.missing:
        lines += ["", f"Without a prediction, scored 0: {', '.join(evaluation.missing)}."]
    if evaluation.errors:
        lines += ["", "Failed, and not part of the table:", "", *(f"- {error}" for error in evaluation.errors.values())]
    return "\n".join(lines) + "\n"


def table(scores: dict[str, Scores], rows: Sequence[Row]) -> str:
    """A table for the terminal: organs down; DSC of each case across where they fit, then mean DSC and NSD."""
    width = max([8, *(len(case) for case in scores)])
    cases = list(scores) if 40 + len(scores) * (2 + width) <= TERMINAL_WIDTH else []
    lines = ["".join([f"{'organ':<20}", *(f"  {case:>{width}}" for case in cases), "  mean DSC  mean NSD"])]
    for row in rows:
        values = [f"  {_case_dsc(scores[case], row.name):>{width}.4f}" for case in cases]
        name = row.name.replace("_", " ")
        lines.append("".join([f"{name:<20}", *values, f"  {row.dsc.mean:8.4f}  {row.nsd.mean:8.4f}"]))
    lines.insert(len(lines) - 1, "-" * len(lines[0]))
    return "\n".join(lines) + "\n"


def write_evaluation(evaluation: Evaluation, out: Path) -> list[Row]:
    """Write scores.csv, summary.csv and summary.md into a folder, each whole or not at all; give the summary's rows."""
    rows = summarise(evaluation.scores)
    out.mkdir(parents=True, exist_ok=True)
    atomic_write(out / "scores.csv", scores_csv(evaluation.scores).encode())
    atomic_write(out / "summary.csv", summary_csv(rows).encode())
    atomic_write(out / "summary.md", summary_markdown(evaluation, rows).encode())
    return rows


def write_groups(scores: dict[str, Scores], contents: Mapping[str, groups.Contents], out: Path) -> str:
    """Write groups.csv, organs_by_finding.csv and groups.md into a folder, and give both tables for the terminal.
    At least one case.
    """
    cases, organs = groups.by_group(scores, contents), groups.by_organ(scores, contents)
    for name, rows, section in (("groups.csv", cases, "section"), ("organs_by_finding.csv", organs, "organ")):
        header, *lines = groups.table_lines(rows, section)
        atomic_write(out / name, _csv(header, lines).encode())
    atomic_write(out / "groups.md", groups.groups_markdown(cases, organs).encode())
    return groups.groups_table(cases, organs)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``python -m train evaluate``."""
    parser.description = "Score predictions as the FLARE22 organisers do: DSC and NSD per case and organ."
    parser.add_argument("--predictions", type=Path, required=True, metavar="DIR", help="masks named CASE.nii.gz")
    parser.add_argument(
        "--references", type=Path, required=True, metavar="DIR", help="true masks, same names and grids"
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="where scores.csv, summary.csv and summary.md go"
    )
    parser.add_argument(
        "--records",
        type=Path,
        metavar="PATH",
        help="of synthetic scans: their data set, its phantoms.json or its records; also score by disease, artefact, "
        "contrast and extent (groups.csv, organs_by_finding.csv, groups.md)",
    )
    parser.add_argument(
        "--organs",
        nargs="+",
        choices=[organ.name for organ in ORGANS],
        metavar="ORGAN",
        help="score these alone, where the true masks have no others: %(choices)s (default: all 13)",
    )
    parser.add_argument(
        "--jobs",
        type=_positive,
        default=available_cores(),
        metavar="N",
        help="cases at a time (default: %(default)s, the cores)",
    )


def run(args: argparse.Namespace) -> int:
    """Exit status: 0 if every pair was scored (a missing prediction scores 0), 1 if some failed, 2 if there was nothing to score or nowhere to write."""
    if args.organs and args.records:
        log.error("--records groups the mean over all organs: expected it without --organs")
        return 2
    organs = [organ for organ in ORGANS if not args.organs or organ.name in args.organs]
    try:
        # Before the work, which may take an hour: is there something to score, and somewhere to write?
        references, _ = find_pairs(args.predictions, args.references)
        contents = groups.read_contents(args.records, references) if args.records else None
        args.out.mkdir(parents=True, exist_ok=True)
        evaluation = score_folder(args.predictions, args.references, args.jobs, organs)
        rows = write_evaluation(evaluation, args.out)
        by_group = write_groups(evaluation.scores, contents, args.out) if contents else ""
    except (EvaluationError, groups.RecordError) as error:
        log.error("%s", error)
        return 2
    except OSError as error:
        log.error("%s: cannot be written (%s)", error.filename or args.out, error.strerror)
        return 2
    sys.stdout.write(table(evaluation.scores, rows))
    if by_group:
        sys.stdout.write(f"\n{by_group}")
    if evaluation.errors:
        log.error("%d of %d cases failed: %s", len(evaluation.errors), _total(evaluation), ", ".join(evaluation.errors))
        return 1
    return 0


def _score_pairs(
    pairs: Sequence[tuple[str, Path, Path]], jobs: int, organs: Sequence[Organ]
) -> Iterator[tuple[str, Scores | str, float]]:
    """Case, its scores or the sentence that says why there are none, and seconds, in order of completion."""
    if jobs == 1 or len(pairs) <= 1:
        for case, prediction, reference in pairs:
            yield case, *_attempt(case, prediction, reference, organs)
        return
    with process_pool(min(jobs, len(pairs))) as pool:
        futures: dict[Future[tuple[Scores | str, float]], str] = {
            pool.submit(_attempt, *pair, organs): pair[0] for pair in pairs
        }
        for future in as_completed(futures):
            case = futures[future]
            error = future.exception()
            if error is None:
                yield case, *future.result()
            else:  # a worker that the system ended, mostly for memory
                yield case, f"{case}: the worker process died ({error}); fewer --jobs need less memory", 0.0


def _attempt(case: str, prediction: Path, reference: Path, organs: Sequence[Organ]) -> tuple[Scores | str, float]:
    start = time.monotonic()
    try:
        return score_case(prediction, reference, organs), time.monotonic() - start
    except (VolumeError, EvaluationError) as error:
        return str(error), time.monotonic() - start
    except MemoryError:
        return f"{case}: out of memory; fewer --jobs need less", time.monotonic() - start


def _check_geometry(prediction: Path, mask: Volume, reference: Path, truth: Volume) -> None:
    """The evaluator compares index by index and looks at no affine; a mask elsewhere in space is still wrong."""
    if not np.array_equal(mask.to_file, truth.to_file):
        axes = [_axes(volume) for volume in (mask, truth)]
        raise EvaluationError(f"{prediction}: stored as {axes[0]}, its reference {reference} as {axes[1]}")
    check_same_grid(prediction, mask, reference, truth)


def _as_stored(volume: Volume) -> Labels:
    """Voxels (z, y, x) in the file's own order: the last labelled slice, which the evaluator drops, is the file's last."""
    stored: Labels = nib.apply_orientation(volume.voxels.T, volume.to_file).T
    return stored


def _header_spacing(volume: Volume) -> Spacing:
    """mm of the stored axes (z, y, x), from pixdim itself: the affine's rounding decides at a tolerance of whole voxels."""
    x, y, z = (abs(float(size)) for size in volume.header.get_zooms()[:3])
    return z, y, x


def _axes(volume: Volume) -> str:
    internal_to_file = nib.orientations.inv_ornt_aff(volume.to_file, volume.voxels.T.shape)
    return "".join(nib.aff2axcodes(volume.affine @ internal_to_file))


def _enclosing(boxes: Iterable[Box | None]) -> Box:
    """The smallest box around several; an empty one where there are none."""
    found = [box for box in boxes if box is not None]
    if not found:
        return slice(0, 0), slice(0, 0), slice(0, 0)
    z, y, x = (
        slice(min(part.start for part in axis), max(part.stop for part in axis)) for axis in zip(*found, strict=True)
    )
    return z, y, x


def _organs(scores: Mapping[str, Scores]) -> list[str]:
    """Names of the organs that were scored, the same in every case."""
    return list(next(iter(scores.values())))


def _means(scores: Scores) -> tuple[float, float]:
    return float(np.mean([each.dsc for each in scores.values()])), float(
        np.mean([each.nsd for each in scores.values()])
    )


def _case_dsc(scores: Scores, name: str) -> float:
    return _means(scores)[0] if name == "overall" else scores[name].dsc


def _csv(header: Sequence[str], lines: Iterable[Sequence[Any]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(lines)
    return text.getvalue()


def _title(name: str) -> str:
    """As table 4 writes it: 'Right Adrenal Gland'."""
    return name.replace("_", " ").title()


def _cases(count: int) -> str:
    return "case" if count == 1 else "cases"


def _total(evaluation: Evaluation) -> int:
    return len(evaluation.scores) + len(evaluation.errors)


def _examples(masks: dict[str, Path]) -> str:
    names = [path.name for path in masks.values()]
    return ", ".join(names[:2]) + (", ..." if len(names) > 2 else "")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not a number from 1 up")
    return value
