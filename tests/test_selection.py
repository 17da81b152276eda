from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from inference.organs import ORGANS
from train.agreement import Agreement
from train.labelling import Row
from train.selection import (
    COLUMNS,
    CRITERION_NAMES,
    SelectionError,
    criterion,
    read_selection,
    select,
    write_selection,
)


def row(case: str, entropy: float = 0.1, change: float | None = None, **agreement: float) -> Row:
    """A row of full agreement but for the organs given."""
    values = {organ.name: 1.0 for organ in ORGANS} | agreement
    return Row(case, 5, Agreement(values), {organ.name: 1.0 for organ in ORGANS}, entropy, change, {"network": 1.0})


def random_rows(count: int) -> list[Row]:
    random = np.random.default_rng(3)
    return [
        row(f"Case_{number:05d}", float(random.random()), float(random.random()), **values)
        for number in range(count)
        for values in [{organ.name: float(random.uniform(0.89, 1)) for organ in ORGANS}]
    ]


def test_the_paper_accepts_a_minimum_of_exactly_the_threshold() -> None:
    below = float(np.nextafter(0.9, 0))
    selection = select([row("A", duodenum=0.9), row("B", duodenum=below), row("C", aorta=0.95)])
    assert selection.accepted == ("A", "C")


def test_the_selected_set_is_exactly_the_cases_whose_minimum_reaches_the_threshold() -> None:
    rows = random_rows(200)
    expected = {each.case for each in rows if min(each.agreement.values.values()) >= 0.9}
    assert 10 < len(expected) < 190
    assert set(select(rows, threshold=0.9).accepted) == expected


def test_a_rejected_case_names_the_organ_that_failed_it() -> None:
    low, passed = select([row("A", duodenum=0.7, aorta=0.8), row("B")]).decisions
    assert (low.failed_organ, low.score) == ("duodenum", 0.7)
    assert (passed.failed_organ, passed.score) == (None, 1.0)


def test_the_mean_forgives_one_organ() -> None:
    rows = [row("A", duodenum=0.0), row("B", duodenum=0.0, stomach=0.0)]
    selection = select(rows, criterion("mean"), 0.9)
    assert selection.accepted == ("A",)
    assert [decision.score for decision in selection.decisions] == pytest.approx([12 / 13, 11 / 13])
    assert {decision.failed_organ for decision in selection.decisions} == {None}


def test_entropy_is_accepted_up_to_the_threshold() -> None:
    rows = [row("A", entropy=0.2), row("B", entropy=0.3), row("C", entropy=0.31, duodenum=1.0)]
    assert select(rows, criterion("entropy"), 0.3).accepted == ("A", "B")


def test_change_is_accepted_up_to_the_threshold_and_where_nothing_was_before() -> None:
    rows = [row("A", change=0.05), row("B", change=0.06), row("C", change=None)]
    assert select(rows, criterion("change"), 0.05).accepted == ("A", "C")


def test_all_accepts_every_case() -> None:
    rows = [row("A"), row("B", entropy=9.0, change=1.0, **{organ.name: 0.0 for organ in ORGANS})]
    assert select(rows, criterion("all"), 1.0).accepted == ("A", "B")


def test_random_draws_as_many_as_asked_and_the_same_again() -> None:
    rows = random_rows(100)
    drawn = select(rows, criterion("random", seed=1, count=30)).accepted
    assert len(drawn) == 30
    assert select(rows[::-1], criterion("random", seed=1, count=30)).accepted == drawn
    assert select(rows, criterion("random", seed=2, count=30)).accepted != drawn
    assert set(drawn) < set(select(rows, criterion("random", seed=1, count=31)).accepted)
    assert len(select(rows, criterion("random", count=1000)).accepted) == 100
    assert select(rows, criterion("random", count=0)).accepted == ()


def test_random_does_not_look_at_the_rows() -> None:
    rows = random_rows(100)
    blind = [row(each.case) for each in rows]
    draw = criterion("random", seed=4, count=50)
    assert select(rows, draw).accepted == select(blind, draw).accepted


def test_nothing_to_select_from_selects_nothing() -> None:
    for name in CRITERION_NAMES:
        assert select([], criterion(name)).accepted == ()


def test_a_selection_comes_back_as_it_was_written(tmp_path: Path) -> None:
    rows = random_rows(20)
    rows[3] = replace(rows[3], change=None)
    selection = select(rows)
    write_selection(tmp_path / "selection.csv", selection)
    assert read_selection(tmp_path / "selection.csv") == selection
    assert [path.name for path in tmp_path.iterdir()] == ["selection.csv"]


def test_the_file_holds_what_was_decided_on_every_case(tmp_path: Path) -> None:
    write_selection(tmp_path / "selection.csv", select([row("B", aorta=0.25), row("A", change=0.5)]))
    header, first, second = (tmp_path / "selection.csv").read_text().splitlines()
    assert header.split(",") == list(COLUMNS)
    assert first == "A," + "1.0," * 13 + "1.0,0.1,0.5,1.0,yes,"
    assert second == "B," + "1.0," * 4 + "0.25," + "1.0," * 8 + "0.25,0.1,,0.25,no,aorta"


def test_the_same_rows_give_the_same_bytes_in_any_order(tmp_path: Path) -> None:
    rows = random_rows(20)
    write_selection(tmp_path / "one.csv", select(rows))
    write_selection(tmp_path / "other.csv", select(rows[::-1]))
    assert (tmp_path / "one.csv").read_bytes() == (tmp_path / "other.csv").read_bytes()


def test_what_is_no_selection_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "selection.csv"
    with pytest.raises(SelectionError, match=r"selection\.csv: cannot be read"):
        read_selection(path)
    path.write_text("case,score\nA,1\n")
    with pytest.raises(SelectionError, match=r"columns case, score; expected case, liver"):
        read_selection(path)
    write_selection(path, select([row("A"), row("B")]))
    path.write_text(path.read_text().replace("yes", "maybe", 1))
    with pytest.raises(SelectionError, match=r"line 2 cannot be read \('maybe'\)"):
        read_selection(path)
    write_selection(path, select([row("A"), row("B")]))
    path.write_text(path.read_text()[:-9])
    with pytest.raises(SelectionError, match="line 3 cannot be read"):
        read_selection(path)


def test_bad_requests_are_refused() -> None:
    with pytest.raises(SelectionError, match="criterion 'best'; expected one of minimum, mean"):
        criterion("best")
    with pytest.raises(SelectionError, match="A has two rows"):
        select([row("A"), row("A")])
