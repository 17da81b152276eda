import os
import shutil
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest

from train import sampler
from train.sampler import (
    ControlGroup,
    Gpu,
    HostTimes,
    ProcessTree,
    SamplerError,
    Usage,
    find_gpu,
    flare_cpu,
    run_sampled,
)

IDENTITY = "ab12" * 16

# NVML's three calls that the sampler makes: one GPU with 10000 MiB of which 7000 are free, used says something else.
FAKE_NVML = r"""
int nvmlInit_v2(void) { return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned int index, void **device) { *device = (void *)1; return index != 0; }
int nvmlDeviceGetMemoryInfo(void *device, unsigned long long memory[3]) {
  memory[0] = 10000ULL << 20; memory[1] = 7000ULL << 20; memory[2] = 1ULL << 20;
  return device != (void *)1;
}
"""


def write(files: dict[Path, str]) -> None:
    for path, text in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.fixture
def identity(tmp_path: Path) -> Path:
    path = tmp_path / "id"
    path.write_text(IDENTITY)
    return path


def test_an_idle_host_of_n_cores_reads_100_over_n_plus_1_by_the_organisers_formula() -> None:
    for cores in (1, 2, 16):
        assert flare_cpu(HostTimes(5, 5, 5, 10), HostTimes(5, 5, 5 + 0.1 * cores, 10)) == pytest.approx(
            100 / (cores + 1)
        )


def test_a_busy_host_reads_100_by_the_organisers_formula_and_niced_work_is_in_no_term_of_it() -> None:
    assert flare_cpu(HostTimes(0, 0, 0, 0), HostTimes(0.1, 0.1, 0, 0.2)) == 100
    half = flare_cpu(HostTimes(0, 0, 0, 0), HostTimes(0, 0, 0.1, 0.1))
    assert half == pytest.approx(50)


def test_a_container_is_read_from_control_groups_of_version_2(tmp_path: Path, identity: Path) -> None:
    group = tmp_path / "system.slice" / f"docker-{IDENTITY}.scope"
    write(
        {
            tmp_path / "cgroup.controllers": "cpu memory",
            group / "cpu.stat": "usage_usec 2500000\nuser_usec 2000000\n",
            group / "memory.stat": f"anon {300 * 2**20}\nfile 77\nshmem {4 * 2**20}\n",
            group / "memory.current": str(400 * 2**20),
            group / "memory.peak": str(512 * 2**20),
        }
    )
    assert ControlGroup(identity, tmp_path).usage() == Usage(2.5, 304.0, 512.0)


def test_a_container_is_read_from_control_groups_of_version_1_past_podmans_monitor(
    tmp_path: Path, identity: Path
) -> None:
    monitor, group = (Path("libpod_parent") / f"libpod-{part}{IDENTITY}" for part in ("conmon-", ""))
    write(
        {
            tmp_path / "memory" / monitor / "memory.stat": "total_rss 1\n",
            tmp_path / "memory" / group / "memory.stat": f"total_rss {200 * 2**20}\ntotal_shmem {2**20}\n",
            tmp_path / "memory" / group / "memory.max_usage_in_bytes": str(250 * 2**20),
            tmp_path / "cpuacct" / group / "cpuacct.usage": "1500000000",
        }
    )
    assert ControlGroup(identity, tmp_path).usage() == Usage(1.5, 201.0, 250.0)


def test_a_peak_is_kept_where_the_kernel_keeps_none(tmp_path: Path, identity: Path) -> None:
    group = tmp_path / IDENTITY
    write(
        {
            tmp_path / "cgroup.controllers": "",
            group / "cpu.stat": "usage_usec 1\n",
            group / "memory.stat": "anon 0\nshmem 0\n",
            group / "memory.current": str(9 * 2**20),
        }
    )
    reader = ControlGroup(identity, tmp_path)
    first = reader.usage()
    (group / "memory.current").write_text(str(5 * 2**20))
    second = reader.usage()
    assert first is not None
    assert second is not None
    assert (first.ram_peak, second.ram_peak) == (9, 9)


def test_a_container_that_is_not_there_yet_or_any_more_has_no_usage(tmp_path: Path) -> None:
    (tmp_path / "cgroup.controllers").touch()
    reader = ControlGroup(tmp_path / "id", tmp_path)
    assert reader.usage() is None
    (tmp_path / "id").write_text(IDENTITY)
    assert reader.usage() is None
    (tmp_path / IDENTITY).mkdir()
    assert reader.usage() is None


def test_gpu_memory_is_total_less_free_of_the_device(tmp_path: Path) -> None:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler for a driver's stand-in")
    source, library = tmp_path / "nvml.c", tmp_path / "libnvml.so"
    source.write_text(FAKE_NVML)
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source], check=True)
    assert Gpu(0, str(library)).used() == 3000
    with pytest.raises(SamplerError, match="GPU 3"):
        Gpu(3, str(library))


def test_no_driver_is_no_gpu() -> None:
    with pytest.raises(SamplerError, match="no NVIDIA driver"):
        Gpu(0, "libof-nobody.so")
    assert find_gpu(999) is None


def test_a_process_and_its_children_are_charged_with_what_they_used() -> None:
    burn = "import time\nwhile time.process_time() < 0.5: pass"
    code = (
        "import subprocess, sys, time\n"
        "held = bytearray(b'x') * 150_000_000\n"
        f"for _ in range(2): subprocess.run([sys.executable, '-c', {burn!r}])\n"
        "time.sleep(0.5)\nprint('done', len(held)); sys.exit(3)"
    )
    trace = run_sampled([sys.executable, "-c", code])
    assert trace.exit_code == 3
    assert trace.output.startswith("done")
    own = [sample.own for sample in trace.samples if sample.own]
    assert own[-1].cpu_seconds == pytest.approx(1.0, abs=0.35)  # and three interpreters started
    assert 143 < max(usage.ram for usage in own) < 175
    assert own[-1].ram_peak >= max(usage.ram for usage in own)
    assert all(sample.gpu is None for sample in trace.samples) or find_gpu(0)


def test_memory_that_takes_long_to_read_is_read_seldom(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    readings = []

    def slow(pids: list[int]) -> float:
        nonlocal now
        now += 0.1
        readings.append(now)
        return 10.0 * len(readings)

    monkeypatch.setattr(sampler, "_shared_out", slow)
    tree = ProcessTree(os.getpid(), lambda: now)
    seen = []
    for _ in range(280):
        usage = tree.usage()
        assert usage is not None
        seen.append(usage.ram)
        now += 0.1
    # Half a minute: the readings take 2 % of it. In between the last one stands.
    assert len(readings) == 6
    assert sorted(set(seen)) == [10.0 * (number + 1) for number in range(6)]
    assert tree.usage().ram_peak > 60  # by this process's own high-water mark


def test_samples_are_a_tenth_of_a_second_apart() -> None:
    trace = run_sampled([sys.executable, "-c", "import time; time.sleep(1)"])
    times = [sample.seconds for sample in trace.samples]
    # A machine that is busy with other work comes late; it never comes early.
    assert all(later - earlier > 0.08 for earlier, later in pairwise(times))
    assert len(times) <= trace.seconds / 0.1 + 1
    assert len(times) >= 5


def test_what_was_started_ends_with_an_interrupt(monkeypatch: pytest.MonkeyPatch) -> None:
    started = time.monotonic()

    def interrupted(self: subprocess.Popen[str], timeout: float | None = None) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess.Popen, "communicate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_sampled(["sleep", "60"])
    assert time.monotonic() - started < 30


def test_a_program_past_its_limit_is_ended() -> None:
    started = time.monotonic()
    with pytest.raises(TimeoutError, match="did not end within 1 s"):
        run_sampled(["sleep", "60"], limit=1)
    assert time.monotonic() - started < 30
