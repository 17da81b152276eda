"""The bench's bookkeeping: what is run in which order, what is kept, what is made of the figures. Costs are made up here."""

import argparse
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import sides, whole
from inference.bundle import read_bundle, write_bundle
from tests.conftest import make_bundle

STAGES = {"read": 0.0, "resample": 0.5, "network": 6.0, "labels": 0.5, "rules": 0.25, "write": 0.25}


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """A bench whose commands cost what their names say; the list of the commands that were run."""
    commands: list[list[str]] = []

    def measure(command: list[str]) -> sides.Measured:
        commands.append(command)
        theirs = "--report" not in command
        if not theirs:
            case = {"seconds": STAGES, "cpu_seconds": {name: 2 * value for name, value in STAGES.items()}}
            case |= {"windows": 8, "window": [40, 224, 192]}
            start = {"imports": 0.5, "engine": 1.0, "cpu_seconds": 2.0}
            report = {"engine": "E", "start": start, "cases": [case]}
            Path(command[command.index("--report") + 1]).write_text(json.dumps(report))
        seconds = (100.0 if theirs else 10.0) + len(commands) % 3
        return sides.Measured(seconds, 2 * seconds, 3000.0 if theirs else 1000.0, None, 0.0, 5.0)

    def make_scan(shape: tuple[int, ...], spacing: tuple[float, ...], depth: int | None) -> Path:
        folder = tmp_path / "scans" / f"{depth}_{shape}_{spacing}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "scan0_0000.nii.gz").write_bytes(repr(spacing).encode())
        return folder

    write_bundle(tmp_path / "bundle", make_bundle())
    monkeypatch.setattr(sides, "CACHE", tmp_path)
    monkeypatch.setattr(sides, "measure", measure)
    monkeypatch.setattr(sides, "make_scan", make_scan)
    monkeypatch.setattr(whole, "make_network", lambda: None)
    monkeypatch.setattr(whole, "commit", lambda: "abc")
    whole.made_of.cache_clear()
    return commands


def test_a_part_of_the_bench_leaves_the_whole_ones_report_alone() -> None:
    def file(**options: object) -> Path:
        return whole.report_file(argparse.Namespace(**{"out": None, "tiny": False, "only": None} | options))

    assert file() == whole.OUT
    assert file(out=Path("x.json"), only="shipped") == Path("x.json")
    assert whole.OUT not in {file(only="shipped"), file(tiny=True)}


def run(monkeypatch: pytest.MonkeyPatch, out: Path, *words: str) -> dict:
    monkeypatch.setattr(sys, "argv", ["whole", "--warm", "--out", str(out), *words])
    assert whole.main() == 0
    found: dict = json.loads(out.read_text())
    return found


def test_sides_are_run_in_turns_and_the_rest_after_them() -> None:
    titles = [setting.title for setting, _ in whole.plan_bench(tiny=False).order(3)]
    assert titles[:9] == ["nnU-Net", "ours", "ours, float32"] * 3
    assert len(titles) == len(set(titles)) + 2 * 4
    shapes = {setting.scan.voxels for setting, _ in whole.plan_bench(tiny=False).order(1)}
    assert shapes == {(count, 512, 512) for count in (50, 100, 300, 600)}


def test_the_border_of_a_block_is_where_its_label_begins_and_ends() -> None:
    labels = np.zeros((4, 4, 4), np.uint8)
    labels[1:3, 1:3, 1:3] = 5
    # Of the block all but its last voxel, and behind each of its three last faces four voxels.
    assert whole.border_share(labels) == round((7 + 12) / 64, 5)


def test_ratios_and_stages_come_from_the_runs(
    bench: list, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = run(monkeypatch, tmp_path / "bench.json")
    assert report["complete"]
    assert report["costs"]["nnU-Net"]["runs"] == 3
    # Runs 1, 4, 7 are nnU-Net's (101 s each), 2, 5, 8 ours (12 s).
    assert report["ratios"]["ours"]["seconds"] == {"median": 8.42, "low": 8.42, "high": 8.42}
    assert report["ratios"]["ours"]["ram_mib"]["median"] == 3
    stages = report["stages"]["ours"]
    assert stages["network"] == {"seconds": 6, "cpu_seconds": 12}
    assert stages["rest"] == {"seconds": 12 - 1.5 - 7.5, "cpu_seconds": 24 - 2 - 15}
    assert stages["all but the network"] == {"seconds": 6, "cpu_seconds": 12}
    assert {row["windows"] for row in report["growth"]} == {8}
    assert [row["slices"] for row in report["growth"]] == [50, 100, 300, 600] * 2
    assert report["gpu"]["measured"] is False
    assert "| ours, float32 | 3 |" in capsys.readouterr().out


def test_the_shipped_network_is_measured_alone_without_a_full_size_one(
    bench: list, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shutil.rmtree(tmp_path / "bundle")
    monkeypatch.setattr(whole, "make_network", lambda: pytest.fail("a full-size network is made"))
    report = run(monkeypatch, tmp_path / "bench.json", "--only", "shipped")
    assert len(bench) == 3 + 4 + 1
    assert all(str(whole.SHIPPED) in " ".join(command) for command in bench)
    assert {row["network"] for row in report["growth"]} == {"shipped"}
    assert report["network"]["patch"] == list(read_bundle(whole.SHIPPED).plan.patch)
    assert not report["complete"]


def test_a_bench_that_was_cut_off_goes_on_and_a_changed_network_is_measured_again(
    bench: list, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    first = run(monkeypatch, tmp_path / "bench.json", "--repeats", "1", "--only", "nnU-Net")
    assert (len(bench), first["complete"]) == (1, False)
    run(monkeypatch, tmp_path / "bench.json", "--repeats", "1")
    assert sum("--report" not in command for command in bench) == 1
    count = len(bench)
    run(monkeypatch, tmp_path / "bench.json", "--repeats", "1")
    assert len(bench) == count
    write_bundle(tmp_path / "bundle", make_bundle(step=0.5))
    whole.made_of.cache_clear()
    run(monkeypatch, tmp_path / "bench.json", "--repeats", "1")
    assert sum("--report" not in command for command in bench) == 2
