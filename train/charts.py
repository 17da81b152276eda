"""The charts of a run's report, as SVG by matplotlib: small, so that they stand side by side or one below the other."""

import io
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from inference.organs import ORGANS, Organ
from train.agreement import Agreement
from train.history import History, Training, Truths, Turn

BLUE, ORANGE, GREY, GREEN = "#0b57d0", "#c2410c", "#8a8f98", "#15803d"
STYLE = {
    "font.size": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#5f6368",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e3e5e8",
    "grid.linewidth": 0.7,
    "xtick.color": "#3c4043",
    "ytick.color": "#3c4043",
    "legend.frameon": False,
    "legend.fontsize": 8.0,
    # The same chart gives the same text.
    "svg.hashsalt": "charts",
}
# Inches.
WIDE, SMALL = (4.6, 2.9), (2.4, 1.75)
THRESHOLDS = np.linspace(0, 1, 201)


def accepted_chart(history: History) -> str:
    """How many cases each iteration trained on, labelled and accepted, and the final model."""

    def draw(axes: Axes) -> None:
        numbers = [turn.number for turn in history.turns]
        labelled = len(history.labelled)
        added = [turn.added for turn in history.turns]
        axes.bar(numbers, [labelled] * len(numbers), color=GREY, width=0.6, label="labelled")
        bars = axes.bar(numbers, added, bottom=labelled, color=BLUE, width=0.6, label="pseudo-labelled")
        axes.bar_label(bars, labels=[f"{count:+d}" for count in added], padding=2, fontsize=8)
        axes.set_ylim(0, 1.25 * (labelled + max(added, default=0)) + 1)
        axes.legend(loc="upper left", ncols=2)
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        _iterations(axes, numbers)
        axes.set_ylabel("training cases")

    return _chart(draw)


def selection_chart(history: History) -> str:
    """How many cases a threshold would accept, per iteration: least agreement over the organs against the threshold."""

    def draw(axes: Axes) -> None:
        for turn, colour in zip(history.selected, _shades(len(history.selected)), strict=True):
            least = np.sort([decision.agreement.minimum for decision in turn.decisions])
            counts = len(least) - np.searchsorted(least, THRESHOLDS, side="left")
            axes.plot(THRESHOLDS, counts, color=colour, label=f"iteration {turn.number}")
        if history.config.loop.criterion == "minimum":
            axes.axvline(history.config.loop.threshold, color=ORANGE, lw=1, ls="--", label="threshold")
        # From where the curves begin to fall.
        low = min(
            float(np.percentile([each.agreement.minimum for each in turn.decisions], 2)) for turn in history.selected
        )
        axes.set_xlim(max(0.0, min(low, history.config.loop.threshold) - 0.05), 1)
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("threshold of the least agreement")
        axes.set_ylabel("cases that pass")
        axes.legend(loc="lower left")

    return _chart(draw)


def agreement_chart(history: History, organ: Organ) -> str:
    """Distribution of one organ's agreement over the cases, per iteration: box of quartiles, whiskers of 5 and 95 %."""

    def draw(axes: Axes) -> None:
        values = [[each.agreement.values[organ.name] for each in turn.decisions] for turn in history.selected]
        numbers = [turn.number for turn in history.selected]
        axes.boxplot(
            values,
            positions=numbers,
            widths=0.55,
            whis=(5, 95),
            showfliers=False,
            patch_artist=True,
            boxprops={"facecolor": "#c7dafc", "edgecolor": BLUE},
            medianprops={"color": BLUE, "linewidth": 1.6},
            whiskerprops={"color": BLUE},
            capprops={"color": BLUE},
        )
        if history.config.loop.criterion == "minimum":
            axes.axhline(history.config.loop.threshold, color=ORANGE, lw=0.9, ls="--")
        axes.set_ylim(_floor(values), 1.01)
        _iterations(axes, numbers)
        axes.set_xlabel("")

    return _chart(draw, SMALL)


def truth_chart(history: History, truths: Truths) -> str:
    """Mean DSC of the pseudo-labels against the truth, per iteration: all, accepted, rejected cases."""

    def draw(axes: Axes) -> None:
        for name, colour, wanted in (("all", BLUE, None), ("accepted", GREEN, True), ("rejected", ORANGE, False)):
            points = [
                (turn.number, np.mean(values))
                for turn in history.selected
                if (values := _mean_dsc(turn, truths[turn.number], wanted))
            ]
            if points:
                numbers, means = zip(*points, strict=True)
                axes.plot(numbers, means, "o-", color=colour, ms=4, label=name)
        _iterations(axes, [turn.number for turn in history.selected])
        axes.set_ylabel("mean DSC")
        axes.set_ylim(top=min(1.005, axes.get_ylim()[1]))
        axes.legend()

    return _chart(draw)


def agreement_and_truth_chart(turn: Turn, truth: Mapping[str, Agreement], threshold: float | None) -> str:
    """Does agreement tell quality? One dot per case: least agreement against mean DSC. ``truth``: DSC by case."""

    def draw(axes: Axes) -> None:
        found = [decision for decision in turn.decisions if decision.case in truth]
        least = [decision.agreement.minimum for decision in found]
        dsc = [truth[decision.case].mean for decision in found]
        colours = [GREEN if decision.accepted else ORANGE for decision in found]
        axes.scatter(least, dsc, s=14, c=colours, alpha=0.75, linewidths=0)
        if threshold is not None:
            axes.axvline(threshold, color=GREY, lw=1, ls="--")
        axes.set_xlabel("least agreement")
        axes.set_ylabel("mean DSC")
        axes.set_ylim(top=min(1.005, axes.get_ylim()[1]))

    return _chart(draw)


def training_chart(turn: Turn) -> str:
    """Losses and pseudo Dice over the epochs, one line per fold."""

    def draw(axes: Axes) -> None:
        loss = axes
        dice = loss.twinx()
        dice.grid(visible=False)
        dice.spines["right"].set_visible(True)
        for index, training in enumerate(turn.trainings):
            numbers = [epoch.number for epoch in training.epochs]
            first = index == 0
            loss.plot(
                numbers, _values(training, "train_loss"), color=GREY, lw=0.9, label="training loss" if first else None
            )
            loss.plot(
                numbers,
                _values(training, "validation_loss"),
                color=ORANGE,
                lw=0.9,
                label="validation loss" if first else None,
            )
            dice.plot(numbers, _values(training, "pseudo_dice"), color=BLUE, lw=0.9)
        loss.plot([], [], color=BLUE, label="pseudo Dice (right)")
        loss.set_xlabel("epoch")
        loss.set_ylabel("loss")
        dice.set_ylim(0, 1)
        loss.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        # Above the curves, which cross the whole picture.
        loss.legend(
            loc="lower left", bbox_to_anchor=(0, 1), ncols=3, borderaxespad=0.2, columnspacing=1, handlelength=1.2
        )

    return _chart(draw)


def rejected_chart(turn: Turn) -> str:
    """How many cases each organ kept out."""

    def draw(axes: Axes) -> None:
        failed = [decision.failed_organ for decision in turn.decisions if decision.failed_organ]
        counts = sorted(((failed.count(organ.name), organ.title) for organ in ORGANS), key=lambda pair: pair[0])
        bars = axes.barh([title for _, title in counts], [count for count, _ in counts], color=ORANGE, height=0.65)
        axes.bar_label(bars, padding=2, fontsize=8)
        axes.grid(visible=False, axis="y")
        axes.set_xlim(0, 1.12 * max(1, counts[-1][0]))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("cases kept out")

    return _chart(draw, (4.6, 3.4))


def hours_chart(history: History) -> str:
    """Hours of computation per iteration: trainings and labelling, added up over all processes."""

    def draw(axes: Axes) -> None:
        numbers = [turn.number for turn in history.turns]
        training = np.array([turn.training_seconds for turn in history.turns]) / 3600
        labelling = np.array([turn.labelling_seconds for turn in history.turns]) / 3600
        axes.bar(numbers, training, color=BLUE, width=0.6, label="training")
        axes.bar(numbers, labelling, bottom=training, color=ORANGE, width=0.6, label="labelling")
        axes.set_ylim(0, 1.25 * max(float((training + labelling).max()), 1e-6))
        axes.legend(loc="upper left", ncols=2)
        _iterations(axes, numbers)
        axes.set_ylabel("hours")

    return _chart(draw)


def _mean_dsc(turn: Turn, truth: Mapping[str, Agreement], accepted: bool | None) -> list[float]:
    """Mean DSC over the organs of the cases with a truth; all, or those that were accepted or not."""
    return [
        truth[decision.case].mean
        for decision in turn.decisions
        if decision.case in truth and (accepted is None or decision.accepted == accepted)
    ]


def _values(training: Training, name: str) -> list[float]:
    return [getattr(epoch, name) for epoch in training.epochs]


def _floor(values: Sequence[Sequence[float]]) -> float:
    lowest = min((float(np.percentile(each, 5)) for each in values if each), default=0.0)
    return max(0.0, lowest - 0.05)


def _shades(count: int) -> list[str]:
    """From light to dark: later iterations stand out."""
    shades = ["#a9c5f7", "#6f9ef0", "#3a77e4", "#0b57d0", "#08306b"]
    return [shades[round(place)] for place in np.linspace(0, len(shades) - 1, count)] if count > 1 else [BLUE] * count


def _iterations(axes: Axes, numbers: Sequence[int]) -> None:
    axes.set_xticks(numbers, [str(number) for number in numbers])
    axes.set_xlim(min(numbers, default=0) - 0.6, max(numbers, default=0) + 0.6)
    axes.set_xlabel("iteration")


def _chart(draw: Callable[[Axes], None], size: tuple[float, float] = WIDE) -> str:
    with rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasSVG(figure)
        draw(figure.subplots())
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    return text.getvalue()
