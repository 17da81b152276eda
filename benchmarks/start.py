"""Where the time of a short case goes: `sh predict.sh` with the shipped network, cold, line by line.

    python -m benchmarks.start [--runs 5] [--least 5]      # a minute, the scan made before

Three tables: the stages as the program reports them, every module whose import takes some milliseconds, and what was read
from the disk. Figures are medians over the runs; the page cache is dropped before each where root may.
"""

import argparse
import json
import logging
import os
import re
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from benchmarks import sides
from benchmarks.whole import PAGE_CACHE, SHIPPED, table

log = logging.getLogger("benchmarks.start")

SHAPE, SPACING = (100, 512, 512), (5.0, 0.75, 0.75)
BLOCK = 512  # bytes, of which getrusage counts what was read
LINE = re.compile(r"^import time:\s+(\d+) \|\s+(\d+) \| ( *)(\S+)$")
Milliseconds = Mapping[str, float]


@dataclass(frozen=True)
class Start:
    """One run: seconds by stage, ms by module with all that it imports (inner ones indented), MiB read from the disk."""

    stages: Mapping[str, float]
    imports: Milliseconds
    read_mib: float


def import_times(lines: Iterable[str]) -> dict[str, float]:
    """Milliseconds that each module and what it imports took, from the lines of python -X importtime, outer ones first.

    A name is indented by two spaces for each module that it is imported by.
    """
    found = [match.groups() for line in lines if (match := LINE.match(line))]
    # Python writes a module when it is done, so inner ones come before outer ones.
    return {f"{indent}{name}": int(total) / 1000 for _, total, indent, name in _outer_first(found)}


def _outer_first(rows: Sequence[tuple[str, str, str, str]]) -> list[tuple[str, str, str, str]]:
    out: list[tuple[str, str, str, str]] = []
    inner: dict[int, list[tuple[str, str, str, str]]] = {}
    for row in rows:
        depth = len(row[2])
        deeper = [each for level in sorted(inner) if level > depth for each in inner.pop(level)]
        inner.setdefault(depth, []).extend([row, *deeper])
    for level in sorted(inner):
        out += inner[level]
    return out


def run_once(scans: Path, folder: Path) -> Start:
    """Run the command once. Raises RuntimeError with what it said where it fails."""
    report = folder / "report.json"
    command = sides.our_command(scans, folder / "masks", SHIPPED, report)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.monotonic()
    process = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "PYTHONPROFILEIMPORTTIME": "1"}
    )
    seconds = time.monotonic() - start
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)}: exit code {process.returncode}\n{process.stderr[-3000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    content = json.loads(report.read_text(encoding="utf-8"))
    stages = {name: content["start"][name] for name in ("imports", "engine")} | content["cases"][0]["seconds"]
    stages["rest"] = seconds - sum(stages.values())
    cpu = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    read = (after.ru_inblock - before.ru_inblock) * BLOCK / 2**20
    return Start(
        {**stages, "whole command": seconds, "CPU seconds": cpu}, import_times(process.stderr.splitlines()), read
    )


def tables(starts: Sequence[Start], least: float) -> str:
    """The runs as text for people; modules of fewer than ``least`` ms are left out."""
    first = starts[0]
    lines = table(("stage", "s"), ((name, median(run.stages[name] for run in starts)) for name in first.stages))
    modules = ((name, median(run.imports.get(name, 0.0) for run in starts)) for name in first.imports)
    shown = ((name.replace("  ", "· "), taken) for name, taken in modules if taken >= least)
    lines += table(("import, with all inside it", "ms"), shown)
    lines += [f"{median(run.read_mib for run in starts):.0f} MiB read from the disk", ""]
    return "\n".join(lines)


def main() -> int:
    """Run the command some times and print the tables; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5, help="how often (5)")
    parser.add_argument("--least", type=float, default=5.0, help="ms from which a module is listed (5)")
    parser.add_argument("--warm", action="store_true", help="leave the page cache alone")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    cold = not arguments.warm and os.access(PAGE_CACHE, os.W_OK)
    scans = sides.make_scan(SHAPE, SPACING)
    folder = sides.CACHE / "start"
    starts = []
    for number in range(arguments.runs):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        if cold:
            sides.drop_page_cache()
        starts.append(run_once(scans, folder))
        log.info("run %d of %d: %.2f s", number + 1, arguments.runs, starts[-1].stages["whole command"])
    sys.stdout.write(
        f"page cache {'dropped before every run' if cold else 'warm'}\n\n{tables(starts, arguments.least)}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
