"""Reading what Python says of its imports. The lines are those of python -X importtime."""

import subprocess
import sys

from benchmarks.start import Start, import_times, tables

LINES = """\
import time: self [us] | cumulative | imported package
import time:       100 |        100 |   a.inner
import time:       300 |        300 |     b.deepest
import time:       200 |        500 |   b.deep
import time:      1000 |       1600 | top
I 1 case
import time:        50 |         50 | other
"""


def test_modules_come_before_what_they_import() -> None:
    found = import_times(LINES.splitlines())
    assert list(found.items()) == [
        ("top", 1.6),
        ("  a.inner", 0.1),
        ("  b.deep", 0.5),
        ("    b.deepest", 0.3),
        ("other", 0.05),
    ]


def test_what_this_python_writes_can_be_read() -> None:
    command = [sys.executable, "-X", "importtime", "-c", "import json"]
    found = import_times(subprocess.run(command, capture_output=True, text=True, check=True).stderr.splitlines())
    names = [name.strip() for name in found]
    assert "json.decoder" in names
    assert names.index("json") < names.index("json.decoder")
    inner, outer = (
        next(taken for name, taken in found.items() if name.strip() == each) for each in ("json.decoder", "json")
    )
    assert 0 < inner <= outer


def test_the_tables_hold_medians_and_leave_out_what_is_short() -> None:
    runs = [
        Start({"imports": seconds, "whole command": 2 * seconds}, {"top": 40 * seconds, "  tiny": 1.0}, 8.0)
        for seconds in (1.0, 5.0, 2.0)
    ]
    text = tables(runs, least=5)
    assert "| imports | 2 |" in text
    assert "| whole command | 4 |" in text
    assert "| top | 80 |" in text
    assert "tiny" not in text
    assert "8 MiB read" in text
