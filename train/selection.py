"""Which pseudo-labels the next iteration trains on (paper section 2.2), and why."""

import csv
import hashlib
import io
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Protocol

from inference.organs import ORGANS
from inference.volume import atomic_write
from train.agreement import Agreement
from train.labelling import Row

log = logging.getLogger(__name__)

ORGAN_NAMES = tuple(organ.name for organ in ORGANS)
COLUMNS = ("case", *ORGAN_NAMES, "minimum", "entropy", "change", "score", "accepted", "failed_organ")


class SelectionError(ValueError):
    """Rows that cannot be selected from, or a selection that cannot be read. The message says what was found."""


class Criterion(Protocol):
    """Scores cases and says which scores pass."""

    @property
    def by_organ(self) -> bool:
        """Whether a score is one organ's, so that an organ can be named where a case fails."""
        ...

    def scores(self, rows: Sequence[Row]) -> list[float]:
        """One score per case."""
        ...

    def accepts(self, score: float, threshold: float) -> bool:
        """Whether a case of this score is used."""
        ...


@dataclass(frozen=True)
class AtLeast:
    """A case is used if its score is the threshold or more."""

    score: Callable[[Row], float]
    by_organ: bool = False

    def scores(self, rows: Sequence[Row]) -> list[float]:
        return [self.score(row) for row in rows]

    def accepts(self, score: float, threshold: float) -> bool:
        return score >= threshold


@dataclass(frozen=True)
class AtMost:
    """A case is used if its score is the threshold or less."""

    score: Callable[[Row], float]
    by_organ: bool = False

    def scores(self, rows: Sequence[Row]) -> list[float]:
        return [self.score(row) for row in rows]

    def accepts(self, score: float, threshold: float) -> bool:
        return score <= threshold


@dataclass(frozen=True)
class Everything:
    """Every case is used, whatever its agreement: the paper's unfiltered variant."""

    by_organ: bool = False

    def scores(self, rows: Sequence[Row]) -> list[float]:
        return [row.agreement.minimum for row in rows]

    def accepts(self, score: float, threshold: float) -> bool:
        return True


@dataclass(frozen=True)
class Draw:
    """``count`` cases drawn by lot, the same for the same seed and cases: a control of equal size. The score is the lot's place."""

    seed: int
    count: int
    by_organ: bool = False

    def scores(self, rows: Sequence[Row]) -> list[float]:
        # A hash of the case's name, not a shuffle: the lot of a case does not hang on which others there are.
        lots = [hashlib.sha256(f"{self.seed} {row.case}".encode()).hexdigest() for row in rows]
        places = {lot: place for place, lot in enumerate(sorted(lots), start=1)}
        return [float(places[lot]) for lot in lots]

    def accepts(self, score: float, threshold: float) -> bool:
        return score <= self.count


def _change(row: Row) -> float:
    # The first iteration has nothing before it: all its labels count as unchanged, and are used.
    return 0.0 if row.change is None else row.change


CRITERIA: Mapping[str, Criterion] = {
    "minimum": AtLeast(lambda row: row.agreement.minimum, by_organ=True),
    "mean": AtLeast(lambda row: row.agreement.mean),
    "entropy": AtMost(lambda row: row.entropy),
    "change": AtMost(_change),
    "all": Everything(),
}
# Beside these, "random" needs a seed and a count: see ``criterion``.
CRITERION_NAMES = (*CRITERIA, "random")


@dataclass(frozen=True)
class Decision:
    """One line of selection.csv. ``failed_organ``: the organ that kept a case out, None where no single one did."""

    case: str
    agreement: Agreement
    entropy: float
    change: float | None
    score: float
    accepted: bool
    failed_organ: str | None


@dataclass(frozen=True)
class Selection:
    """The decision on every case, sorted by case."""

    decisions: tuple[Decision, ...]

    @property
    def accepted(self) -> tuple[str, ...]:
        """Cases whose pseudo-labels are used."""
        return tuple(decision.case for decision in self.decisions if decision.accepted)


def criterion(name: str, seed: int = 0, count: int = 0) -> Criterion:
    """A criterion by name. ``seed``, ``count``: of "random", how many cases it draws. Raises SelectionError."""
    if name == "random":
        return Draw(seed, count)
    if name not in CRITERIA:
        raise SelectionError(f"criterion {name!r}; expected one of {', '.join(CRITERION_NAMES)}")
    return CRITERIA[name]


def select(rows: Sequence[Row], criterion: Criterion = CRITERIA["minimum"], threshold: float = 0.9) -> Selection:
    """Decide on every row. By default as the paper: used if every organ's mean pairwise DSC is 0.9 or more.

    Raises SelectionError for a case that has two rows.
    """
    rows = sorted(rows, key=lambda row: row.case)
    for one, other in pairwise(rows):
        if one.case == other.case:
            raise SelectionError(f"{one.case} has two rows; expected one per case")
    decisions = tuple(
        _decide(row, score, criterion, threshold) for row, score in zip(rows, criterion.scores(rows), strict=True)
    )
    selection = Selection(decisions)
    log.info("select: %d of %d cases accepted", len(selection.accepted), len(rows))
    return selection


def write_selection(path: Path, selection: Selection) -> None:
    """Write selection.csv (docs/formats.md), whole or not at all. Numbers come back as they were."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(_fields(decision) for decision in selection.decisions)
    atomic_write(path, text.getvalue().encode())


def read_selection(path: Path) -> Selection:
    """Read selection.csv back. Raises SelectionError naming the file and the line."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SelectionError(f"{path}: cannot be read ({error}); expected a selection") from error
    reader = csv.DictReader(io.StringIO(text, newline=""))
    found = tuple(reader.fieldnames or ())
    if found != COLUMNS:
        raise SelectionError(f"{path}: columns {', '.join(found) or 'none'}; expected {', '.join(COLUMNS)}")
    decisions = []
    for fields in reader:
        try:
            decisions.append(_decision(fields))
        except (ValueError, TypeError, KeyError) as error:
            raise SelectionError(f"{path}: line {reader.line_num} cannot be read ({error})") from error
    return Selection(tuple(decisions))


def _decide(row: Row, score: float, criterion: Criterion, threshold: float) -> Decision:
    accepted = criterion.accepts(score, threshold)
    failed = row.agreement.weakest if criterion.by_organ and not accepted else None
    return Decision(row.case, row.agreement, row.entropy, row.change, score, accepted, failed)


def _fields(decision: Decision) -> dict[str, str]:
    """The columns of a decision; ``repr`` of a float is its shortest exact text."""
    return {
        "case": decision.case,
        **{name: repr(decision.agreement.values[name]) for name in ORGAN_NAMES},
        "minimum": repr(decision.agreement.minimum),
        "entropy": repr(decision.entropy),
        "change": "" if decision.change is None else repr(decision.change),
        "score": repr(decision.score),
        "accepted": "yes" if decision.accepted else "no",
        "failed_organ": decision.failed_organ or "",
    }


def _decision(fields: Mapping[str, str]) -> Decision:
    return Decision(
        case=fields["case"],
        agreement=Agreement({name: float(fields[name]) for name in ORGAN_NAMES}),
        entropy=float(fields["entropy"]),
        change=float(fields["change"]) if fields["change"] else None,
        score=float(fields["score"]),
        accepted={"yes": True, "no": False}[fields["accepted"]],
        failed_organ=fields["failed_organ"] or None,
    )
