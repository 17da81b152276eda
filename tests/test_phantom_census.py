"""The table of volumes: what it says, and that the documentation's is of the same literature and limits."""

import logging
from pathlib import Path

import pytest

from inference.organs import ORGANS
from train.__main__ import main
from train.phantom.census import census, outside, table
from train.phantom.volumes import LIMITS, LITERATURE

DOCUMENT = Path(__file__).parents[1] / "docs" / "phantoms.md"
MIDDLE = {name: (low + high) / 2 for name, (low, high) in LIMITS.items()}


def test_every_organ_has_limits_and_literature() -> None:
    assert set(LIMITS) == set(LITERATURE) == {organ.name for organ in ORGANS}


def test_a_row_has_literature_median_extremes_and_limits() -> None:
    bodies = [{**MIDDLE, "liver": 900.0 + 100 * k, "left_adrenal_gland": 3.0 + k / 10} for k in range(11)]
    rows = table(bodies).splitlines()
    assert len(rows) == 2 + len(ORGANS)
    assert f"| liver | {LITERATURE['liver']} | 1400 [925, 1875] | 900-1900 | 750-2500 |" in rows
    assert f"| left adrenal | {LITERATURE['left_adrenal_gland']} | 3.5 [3.0, 4.0] | 3.0-4.0 | 1.2-9 |" in rows
    assert any(row.startswith("| vena cava |") for row in rows)


def test_only_what_lies_beyond_a_limit_is_outside() -> None:
    low, high = LIMITS["spleen"]
    assert outside(MIDDLE) == {}
    assert outside({**MIDDLE, "spleen": high}) == {}
    assert outside({**MIDDLE, "spleen": low - 1, "liver": 1.0}) == {"spleen": low - 1, "liver": 1.0}


def test_the_documentation_has_the_same_literature_and_limits() -> None:
    lines = [line.split(" | ") for line in DOCUMENT.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    rows = {line[0].strip("| "): line for line in lines}
    for line in table([MIDDLE]).splitlines()[2:]:
        title, literature, _, _, limits = line.split(" | ")
        written = rows[title.strip("| ")]
        assert (written[1], written[-1]) == (literature, limits), title


def test_processes_measure_the_same_bodies_in_the_same_order() -> None:
    alone = list(census(range(2)))
    assert [seed for seed, _ in alone] == [0, 1]
    assert alone == list(census(range(2), jobs=2))


def test_the_command_writes_the_table_and_names_what_is_outside(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr("train.phantom.census._measure", lambda seed: {**MIDDLE, "liver": 1000.0 * seed})
    assert main(["phantom-volumes", "--seeds", "2", "--first", "1"]) == 0
    assert capsys.readouterr().out == table([{**MIDDLE, "liver": 1000.0}, {**MIDDLE, "liver": 2000.0}])
    assert "2 of 2 bodies" in caplog.text
    assert main(["phantom-volumes", "--seeds", "2", "--first", "2"]) == 1
    assert "seed 3: liver of 3000.0 mL" in caplog.text


@pytest.mark.parametrize("wrong", [["--seeds", "0"], ["--jobs", "0"], ["--first", "-1"]])
def test_a_wrong_option_is_one_line(wrong: list[str], caplog: pytest.LogCaptureFixture) -> None:
    assert main(["phantom-volumes", *wrong]) == 1
    assert len(caplog.messages) == 1
