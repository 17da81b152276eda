"""A run of the loop as one HTML page that needs nothing else: numbers, charts, cases to look at.

Everything is inside the page (styles, charts as SVG, pictures as JPEG), and its security policy forbids every request.
"""

import argparse
import base64
import io
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np

from inference.organs import ORGANS
from inference.resample import labels_to_working_grid
from inference.volume import VolumeError, atomic_write, read_labels, read_volume
from train import charts
from train.agreement import Agreement
from train.config import ConfigError
from train.evaluate import EvaluationError, find_masks
from train.history import FINAL, History, HistoryError, Truths, Turn, compare_with_truth, read_history
from train.labelling import LabellingError
from train.picture import BACKGROUND, render
from train.selection import Decision, SelectionError

log = logging.getLogger(__name__)

# Dots per inch and quality of the overlays: a page holds six.
PICTURE_DPI = 80
PICTURE_QUALITY = 80
REJECTED_PICTURES = 3
# At an end of a long table nobody reads on; the filter finds the rest.
OPEN_ROWS = 12

STYLE = """
:root { color-scheme: light; --ink: #202124; --faint: #5f6368; --line: #dadce0; --back: #f6f7f9; --blue: #0b57d0; }
* { box-sizing: border-box; }
body { margin: 0; font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; color: var(--ink); background: var(--back); }
main { max-width: 1320px; margin: 0 auto; padding: 20px 16px 64px; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 40px 0 4px; }
h3 { font-size: 1rem; margin: 16px 0 4px; }
p { margin: 4px 0 12px; max-width: 75ch; }
.faint, figcaption { color: var(--faint); font-size: .9rem; }
code { overflow-wrap: anywhere; font-size: .88em; }
.tiles, .charts, .organs { display: grid; gap: 12px; }
.tiles { grid-template-columns: repeat(auto-fit, minmax(min(100%, 150px), 1fr)); margin: 16px 0; }
/* A table may follow. */
.charts { margin-bottom: 12px; grid-template-columns: repeat(auto-fill, minmax(min(100%, 380px), 1fr)); }
.organs { grid-template-columns: repeat(auto-fill, minmax(min(46%, 220px), 1fr)); }
.tile, figure, .table { background: #fff; border: 1px solid var(--line); border-radius: 8px; }
.tile { padding: 10px 14px; }
.tile b { display: block; font-size: 1.5rem; line-height: 1.25; }
figure { margin: 0; padding: 10px; min-width: 0; }
figure img { display: block; width: 100%; height: auto; }
figcaption { margin-bottom: 6px; }
.picture { margin: 0 0 12px; }
.picture div { overflow-x: auto; background: #101114; border-radius: 4px; }
.picture img { min-width: 860px; }
.table { overflow: auto; margin: 0 0 12px; max-height: 460px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { padding: 5px 12px; text-align: right; white-space: nowrap; border-bottom: 1px solid #eceef1; }
th:first-child, td:first-child, td.text, th.text { text-align: left; }
thead th { position: sticky; top: 0; background: #fff; box-shadow: 0 1px 0 var(--line); font-weight: 600; }
input { font: inherit; padding: 6px 10px; border: 1px solid var(--line); border-radius: 6px; width: min(100%, 320px); margin: 4px 0 8px; }
"""
# The rows of a long table whose text holds what was typed.
SCRIPT = """
for (const input of document.querySelectorAll('input[data-table]')) {
  const rows = [...document.getElementById(input.dataset.table).tBodies[0].rows];
  const count = document.getElementById(input.dataset.table + '-count');
  input.addEventListener('input', () => {
    const wanted = input.value.toLowerCase();
    let shown = 0;
    for (const row of rows) {
      row.hidden = !row.textContent.toLowerCase().includes(wanted);
      shown += !row.hidden;
    }
    count.textContent = shown + ' of ' + rows.length + ' shown';
  });
}
"""
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


@dataclass(frozen=True)
class Truth:
    """True label maps by case, on the scans' own grids, and how the pseudo-labels compare."""

    masks: Mapping[str, Path]
    dsc: Truths


@dataclass(frozen=True)
class Shown:
    """A case that is drawn, and why."""

    case: str
    caption: str


def build_report(history: History, truth: Truth | None = None) -> str:
    """The page. Cases that cannot be drawn are logged and left out."""
    sections = [
        _head(history),
        _iterations(history, truth),
        _accuracy(history, truth),
        _agreement(history),
        _selection(history),
        _trainings(history),
        _examples(history, truth),
        _rejected(history, truth),
        _hours(history),
        _left_out(history),
    ]
    name = escape(history.workspace.root.resolve().name)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<title>{name}: self-training</title><style>{STYLE}</style></head>\n<body><main>\n"
        + "\n".join(section for section in sections if section)
        + f"\n</main><script>{SCRIPT}</script></body></html>\n"
    )


def best_median_worst(decisions: Sequence[Decision], score: Callable[[Decision], float]) -> dict[str, Decision]:
    """The cases of highest, middle and lowest score; no case twice."""
    ranked = sorted(decisions, key=lambda decision: (-score(decision), decision.case))
    if not ranked:
        return {}
    chosen = {"Best": ranked[0], "Median": ranked[len(ranked) // 2], "Worst": ranked[-1]}
    if len(ranked) < len(chosen):
        del chosen["Median"]
    if len(ranked) == 1:
        del chosen["Worst"]
    return chosen


def rejected_by_different_organs(decisions: Sequence[Decision], count: int) -> list[Decision]:
    """The least agreed-on rejected cases, each kept out by another organ as far as there are so many (figure 5)."""
    rejected = sorted((each for each in decisions if not each.accepted), key=lambda each: each.agreement.minimum)
    first: list[Decision] = []
    for decision in rejected:
        if decision.agreement.weakest not in [each.agreement.weakest for each in first]:
            first.append(decision)
    return (first + [each for each in rejected if each not in first])[:count]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``python -m train report``."""
    parser.description = "One self-contained HTML page of a run of `loop`, done or not."
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of the run")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="HTML", help="the page to write")
    parser.add_argument(
        "--truth", type=Path, metavar="DIR", help="true label maps CASE.nii.gz of unlabelled cases, where there are any"
    )
    parser.add_argument(
        "--truth-cases",
        type=int,
        default=100,
        metavar="N",
        help="compare so many with their truth (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    """Exit status: 0 if the page was written, 2 if not."""
    try:
        history = read_history(args.run)
        truth = None
        if args.truth is not None:
            truth = Truth(find_masks(args.truth), compare_with_truth(history, args.truth, args.truth_cases))
        page = build_report(history, truth)
        args.output.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(args.output, page.encode())
    except (HistoryError, ConfigError, EvaluationError, LabellingError, SelectionError) as error:
        log.error("%s", error)
        return 2
    except OSError as error:
        log.error("%s: %s", error.filename or args.output, error.strerror)
        return 2
    log.info("wrote %s (%.1f MB)", args.output, len(page) / 1e6)
    return 0


def _head(history: History) -> str:
    chosen = history.selected
    state = (
        "done" if history.done else f"not done: {len(chosen)} of {history.config.loop.iterations} iterations selected"
    )
    loop = history.config.loop
    by_threshold = loop.criterion not in ("all", "random")
    rule = (f"{loop.threshold:g}", f"threshold ({loop.criterion})") if by_threshold else (loop.criterion, "selection")
    tiles = [
        ("labelled cases", str(len(history.labelled))),
        ("unlabelled cases", str(len(history.unlabelled))),
        ("accepted last", f"{chosen[-1].accepted} ({_share(chosen[-1])})" if chosen else "–"),
        rule[::-1],
        ("hours of computation", f"{_all_seconds(history) / 3600:.1f}"),
    ]
    first = history.starts[0] if history.starts else {}
    started = escape(f"{first.get('time', 'unknown')}, commit {str(first.get('commit') or 'unknown')[:12]}")
    return (
        f"<h1>{escape(history.workspace.root.resolve().name)}</h1><p>Self-training after Alves and de Wilde: {escape(state)}.</p>"
        f'<p class="faint"><code>{escape(str(first.get("command", "")))}</code><br>first started {started}; '
        f"{len(history.starts)} start{'s' * (len(history.starts) != 1)}</p>"
        + '<div class="tiles">'
        + "".join(f'<div class="tile"><b>{escape(value)}</b>{escape(name)}</div>' for name, value in tiles)
        + "</div>"
    )


def _iterations(history: History, truth: Truth | None) -> str:
    header = [
        "iteration",
        "training cases",
        "of these accepted before",
        "epochs",
        "pseudo Dice",
        "labelled",
        "accepted",
    ]
    header += ["set aside", "DSC of pseudo-labels"] if truth else ["set aside"]
    rows = []
    for turn in history.turns:
        final = turn.trainings and turn.trainings[0].fold == FINAL
        dice = [each.epochs[-1].pseudo_dice for each in turn.trainings if each.epochs]
        epochs = [len(each.epochs) for each in turn.trainings]
        cells = [
            "final model" if final else str(turn.number),
            str(len(history.labelled) + turn.added),
            str(turn.added),
            _span(epochs),
            f"{np.mean(dice):.4f}" if dice else "–",
            str(len(turn.decisions)) if turn.decisions else "–",
            f"{turn.accepted} ({_share(turn)})" if turn.decisions else "–",
            str(len(turn.set_aside) or "–"),
        ]
        if truth:
            cells.append(_mean_dsc(truth.dsc.get(turn.number, {})))
        rows.append(cells)
    note = (
        "Pseudo Dice is nnU-Net's own figure on patches of the held-out labelled cases, after the last epoch, mean over folds; "
        "of the final model it is no validation, because that one trains on all cases."
    )
    chart = _figure(charts.accepted_chart(history), "Training cases per iteration") if history.turns else ""
    return f"<h2>Iterations</h2><p>{note}</p>{_table(header, rows)}<div class='charts'>{chart}</div>"


def _accuracy(history: History, truth: Truth | None) -> str:
    title = "<h2>DSC per iteration</h2>"
    if truth is None:
        return f"{title}<p>No truth of the unlabelled cases was given (<code>--truth DIR</code>), so pseudo-labels are not scored.</p>"
    count = max((len(cases) for cases in truth.dsc.values()), default=0)
    last = history.selected[-1]
    threshold = history.config.loop.threshold if history.config.loop.criterion == "minimum" else None
    figures = [
        _figure(charts.truth_chart(history, truth.dsc), "Mean DSC of pseudo-labels, all organs"),
        _figure(
            charts.agreement_and_truth_chart(last, truth.dsc[last.number], threshold),
            f"Least agreement and DSC, iteration {last.number}: accepted green, rejected orange",
        ),
    ]
    header = ["organ", *(f"iteration {turn.number}" for turn in history.selected)]
    rows = [
        [organ.title, *(_mean_of(truth.dsc[turn.number], organ.name) for turn in history.selected)] for organ in ORGANS
    ]
    note = f"Pseudo-labels of {count} cases against their truth, on the working grid, over whole volumes, without post-processing."
    return f"{title}<p>{note}</p><div class='charts'>{''.join(figures)}</div>{_table(header, rows)}"


def _agreement(history: History) -> str:
    if not history.selected:
        return ""
    figures = [_figure(charts.agreement_chart(history, organ), organ.title) for organ in ORGANS]
    note = (
        "Mean DSC over all pairs of models (equation 1), per case. Box: quartiles and median over the cases; whiskers: 5 and "
        "95 %; across: iterations. The scales differ."
    )
    return f"<h2>Agreement per organ</h2><p>{note}</p><div class='organs'>{''.join(figures)}</div>"


def _selection(history: History) -> str:
    if not history.selected:
        return ""
    note = "How many cases would pass at another threshold of the least agreement over the organs."
    chart = _figure(charts.selection_chart(history), "Cases that pass, per iteration")
    return f"<h2>Selection</h2><p>{note}</p><div class='charts'>{chart}</div>"


def _trainings(history: History) -> str:
    figures = []
    for turn in history.turns:
        if any(training.epochs for training in turn.trainings):
            done, folds = sum(training.done for training in turn.trainings), history.config.training.folds
            final = turn.trainings[0].fold == FINAL
            name = "Final model" if final else f"Iteration {turn.number}: {done} of {folds} folds done"
            figures.append(_figure(charts.training_chart(turn), name))
    if not figures:
        return ""
    return f"<h2>Trainings</h2><p>One line per fold.</p><div class='charts'>{''.join(figures)}</div>"


def _examples(history: History, truth: Truth | None) -> str:
    if not history.selected:
        return ""
    turn = history.selected[-1]
    dsc = truth.dsc[turn.number] if truth else {}
    name = "mean DSC" if dsc else "mean agreement"
    decisions = [decision for decision in turn.decisions if not dsc or decision.case in dsc]

    def score(decision: Decision) -> float:
        return (dsc[decision.case] if dsc else decision.agreement).mean

    shown = [
        Shown(decision.case, f"{word}: {decision.case}, {name} {score(decision):.4f}")
        for word, decision in best_median_worst(decisions, score).items()
    ]
    what = "Prediction and reference" if dsc else "Pseudo-label; no truth is known"
    note = f"Iteration {turn.number}, by {name}. {what}."
    return f"<h2>Best, median, worst</h2><p>{note}</p>{_pictures(shown, turn, history, truth)}"


def _rejected(history: History, truth: Truth | None) -> str:
    if not history.selected:
        return ""
    turn = history.selected[-1]
    rejected = sorted((each for each in turn.decisions if not each.accepted), key=lambda each: each.agreement.minimum)
    title = f"<h2>Rejected in iteration {turn.number}</h2>"
    if not rejected:
        return f"{title}<p>None: every case was accepted.</p>"
    shown = [
        Shown(each.case, f"{each.case}: {_title(each.agreement.weakest)}, agreement {each.agreement.minimum:.3f}")
        for each in rejected_by_different_organs(turn.decisions, REJECTED_PICTURES)
    ]
    dsc = truth.dsc[turn.number] if truth else {}
    header = ["case", "organ", "least agreement", "mean agreement", "entropy", *(["mean DSC"] if dsc else [])]
    rows = [
        [
            each.case,
            _title(each.failed_organ or each.agreement.weakest),
            f"{each.agreement.minimum:.4f}",
            f"{each.agreement.mean:.4f}",
            f"{each.entropy:.4f}",
            *([f"{dsc[each.case].mean:.4f}" if each.case in dsc else "–"] if dsc else []),
        ]
        for each in rejected
    ]
    chart = (
        _figure(charts.rejected_chart(turn), "Organ that kept a case out")
        if any(e.failed_organ for e in rejected)
        else ""
    )
    note = f"{len(rejected)} of {len(turn.decisions)} cases. The organ is the one of least agreement."
    return (
        f"{title}<p>{note}</p><div class='charts'>{chart}</div><h3>Least agreed on</h3>"
        f"{_pictures(shown, turn, history, truth)}<h3>All</h3>{_filtered_table('rejected', header, rows)}"
    )


def _hours(history: History) -> str:
    header = ["iteration", "training h", "labelling h", "GPU h"]
    rows = []
    for turn in history.turns:
        both = turn.training_seconds + turn.labelling_seconds
        gpu = {None: "unknown", False: "no GPU", True: f"{both / 3600:.2f}"}[turn.on_gpu]
        final = turn.trainings and turn.trainings[0].fold == FINAL
        name = "final model" if final else str(turn.number)
        rows.append([name, f"{turn.training_seconds / 3600:.2f}", f"{turn.labelling_seconds / 3600:.2f}", gpu])
    total = [
        sum(turn.training_seconds for turn in history.turns),
        sum(turn.labelling_seconds for turn in history.turns),
    ]
    known = [turn.on_gpu for turn in history.turns]
    gpu_hours = "unknown" if None in known else _gpu_hours(history)
    rows.append(["all", *(f"{seconds / 3600:.2f}" for seconds in total), gpu_hours])
    note = (
        "Added up over processes that ran side by side. A training holds one GPU; labelling is counted as the trainings of its "
        "iteration, on the same machines."
    )
    chart = _figure(charts.hours_chart(history), "Hours of computation") if history.turns else ""
    return f"<h2>Time</h2><p>{note}</p>{_table(header, rows)}<div class='charts'>{chart}</div>"


def _left_out(history: History) -> str:
    rows = [["preparing", case, reason] for case, reason in history.unprepared.items()]
    for turn in history.turns:
        rows += [[f"iteration {turn.number}", case, reason] for case, reason in turn.set_aside.items()]
    if not rows:
        return ""
    note = "Scans that could not be read or labelled; the run went on without them."
    table = _filtered_table("aside", ["when", "case", "reason"], rows, text=True)
    return f"<h2>Set aside</h2><p>{note}</p>{table}"


def _pictures(shown: Sequence[Shown], turn: Turn, history: History, truth: Truth | None) -> str:
    return "".join(_picture(each, turn, history, truth) for each in shown)


def _picture(shown: Shown, turn: Turn, history: History, truth: Truth | None) -> str:
    """A case's overlay on the working grid, with its reference where there is one."""
    workspace = history.workspace
    log.info("drawing %s", shown.case)
    try:
        scan = read_volume(workspace.image(shown.case))
        labels = read_labels(workspace.pseudo_label(turn.number, shown.case)).voxels
        reference = None
        if truth is not None and shown.case in truth.masks:
            reference = labels_to_working_grid(read_labels(truth.masks[shown.case]).voxels, scan.shape)
        figure = render(scan.voxels, labels, scan.spacing, reference, shown.case)
    except (VolumeError, OSError, ValueError) as error:
        log.error("%s: not drawn: %s", shown.case, error)
        return f"<p>{escape(shown.caption)}: cannot be drawn ({escape(str(error))}).</p>"
    content = io.BytesIO()
    figure.savefig(
        content, format="jpeg", dpi=PICTURE_DPI, facecolor=BACKGROUND, pil_kwargs={"quality": PICTURE_QUALITY}
    )
    return (
        f'<figure class="picture"><figcaption>{escape(shown.caption)}</figcaption><div>'
        f"{_image(content.getvalue(), 'image/jpeg', shown.caption)}</div></figure>"
    )


def _figure(svg: str, caption: str) -> str:
    image = _image(svg.encode(), "image/svg+xml", caption)
    return f"<figure><figcaption>{escape(caption)}</figcaption>{image}</figure>"


def _image(content: bytes, kind: str, text: str) -> str:
    return f'<img alt="{escape(text)}" src="data:{kind};base64,{base64.b64encode(content).decode()}">'


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], name: str = "", text: bool = False) -> str:
    kind = ' class="text"' if text else ""
    head = "".join(f"<th{kind}>{escape(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td{kind}>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    identity = f' id="{name}"' if name else ""
    return f'<div class="table"><table{identity}><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _filtered_table(name: str, header: Sequence[str], rows: Sequence[Sequence[str]], text: bool = False) -> str:
    """A long table, with a field that narrows it down where it is long."""
    if len(rows) <= OPEN_ROWS:
        return _table(header, rows, text=text)
    field = f'<input type="search" data-table="{name}" placeholder="case, organ ..." aria-label="Filter the table">'
    return f'{field} <span class="faint" id="{name}-count">{len(rows)} of {len(rows)} shown</span>{_table(header, rows, name, text)}'


def _share(turn: Turn) -> str:
    return f"{100 * turn.accepted / len(turn.decisions):.0f} %"


def _span(numbers: Sequence[int]) -> str:
    if not numbers:
        return "–"
    low, high = min(numbers), max(numbers)
    return str(low) if low == high else f"{low}–{high}"


def _mean_dsc(cases: Mapping[str, Agreement]) -> str:
    return f"{np.mean([each.mean for each in cases.values()]):.4f}" if cases else "–"


def _mean_of(cases: Mapping[str, Agreement], organ: str) -> str:
    return f"{np.mean([each.values[organ] for each in cases.values()]):.4f}" if cases else "–"


def _gpu_hours(history: History) -> str:
    seconds = sum(turn.training_seconds + turn.labelling_seconds for turn in history.turns if turn.on_gpu)
    return f"{seconds / 3600:.2f}" if seconds else "no GPU"


def _all_seconds(history: History) -> float:
    return sum(turn.training_seconds + turn.labelling_seconds for turn in history.turns)


def _title(organ: str) -> str:
    return organ.replace("_", " ")
