"""What a program costs while it runs, read every 0.1 s: the host's CPU and RAM, the program's own, the GPU's memory.

The organisers' sampler (JunMa11/FLARE, Efficiency.py) reads the host and the device; a container's control group, or a
process and its descendants in /proc, say what the program itself used.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

# Seconds between readings. Nominal in the organisers' code, where the time that a reading takes comes on top.
PERIOD = 0.1
# From one reading of a process's memory to the next pass at least so many times as long as it took: 2 % of a core.
READING_SHARE = 50
MIB = 2**20
CGROUPS = Path("/sys/fs/cgroup")
PROC = Path("/proc")
TICKS: int = os.sysconf("SC_CLK_TCK")


class SamplerError(RuntimeError):
    """A machine that cannot be sampled, or a GPU that is not there. The message says what was looked for."""


@dataclass(frozen=True)
class Usage:
    """What a program used: CPU seconds so far, MiB of memory now (without page cache), and the most so far."""

    cpu_seconds: float
    ram: float
    ram_peak: float


@dataclass(frozen=True)
class HostTimes:
    """CPU seconds of the host, all cores added up, since it was started."""

    user: float
    system: float
    idle: float
    busy: float


@dataclass(frozen=True)
class Sample:
    """One reading. ``seconds`` since the start; ``host_cpu`` percent by the organisers' formula; memory in MiB.

    ``own``: None while the program's control group is not there yet. ``gpu``: None without a GPU.
    """

    seconds: float
    host_cpu: float
    host_ram: float
    own: Usage | None
    gpu: float | None


@dataclass(frozen=True)
class Trace:
    """A program's run: wall seconds, exit code, samples, and the host's busy CPU seconds meanwhile, whoever used them."""

    seconds: float
    exit_code: int
    samples: tuple[Sample, ...]
    host_busy: float
    output: str = ""


class Subject(Protocol):
    """The program that is sampled."""

    def usage(self) -> Usage | None:
        """What it used so far; None where it is not there (yet, or any more)."""
        ...


class Gpu:
    """The memory of one NVIDIA GPU through NVML, the library under nvidia-smi."""

    def __init__(self, index: int, library: str = "libnvidia-ml.so.1") -> None:
        """Raises SamplerError where there is no such GPU."""
        try:
            self._nvml = ctypes.CDLL(library)
        except OSError as error:
            raise SamplerError(f"GPU {index}: no NVIDIA driver here ({error})") from error
        self._device = ctypes.c_void_p()
        if self._nvml.nvmlInit_v2() or self._nvml.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(self._device)):
            raise SamplerError(f"GPU {index}: the NVIDIA driver does not know it")

    def used(self) -> float:
        """MiB that are not free, of the whole device: driver, contexts and every process, as the organisers count."""
        memory = (ctypes.c_ulonglong * 3)()
        if self._nvml.nvmlDeviceGetMemoryInfo(self._device, ctypes.byref(memory)):
            raise SamplerError("the NVIDIA driver no longer tells the GPU's memory")
        total, free, _ = memory
        return float(total - free) / MIB


class ControlGroup:
    """A container, by the control group that its engine made: version 1 or 2."""

    def __init__(self, identity: Path, root: Path = CGROUPS) -> None:
        """``identity``: the file into which the engine writes the container's id."""
        self._identity = identity
        self._root = root
        self._second = (root / "cgroup.controllers").exists()
        self._place: Path | None = None
        self._peak = 0.0

    def usage(self) -> Usage | None:
        place = self._place = self._place or self._find()
        if place is None:
            return None
        try:
            usage = self._read_second(place) if self._second else self._read_first(place)
        except (OSError, ValueError):  # the container ended between two readings
            return None
        self._peak = max(self._peak, usage.ram_peak)
        return Usage(usage.cpu_seconds, usage.ram, self._peak)

    def _find(self) -> Path | None:
        """The group's path below the root (version 1: below the root of each controller)."""
        try:
            identity = self._identity.read_text().strip()
        except OSError:
            return None
        top = self._root if self._second else self._root / "memory"
        for folder, inner, _ in os.walk(top):
            for name in inner:
                # podman keeps its monitor in a group of its own, under the same id.
                if identity and identity in name and "conmon" not in name:
                    return (Path(folder) / name).relative_to(top)
        return None

    def _read_second(self, place: Path) -> Usage:
        group = self._root / place
        stat = _fields(group / "memory.stat")
        ram = stat["anon"] + stat["shmem"]
        # Before Linux 5.19 there is no peak; then the largest of the readings is it.
        peaks = [
            int((group / name).read_text()) for name in ("memory.peak", "memory.current") if (group / name).exists()
        ]
        return Usage(_fields(group / "cpu.stat")["usage_usec"] / 1e6, ram / MIB, max(peaks) / MIB)

    def _read_first(self, place: Path) -> Usage:
        memory = self._root / "memory" / place
        stat = _fields(memory / "memory.stat")
        ram = stat["total_rss"] + stat.get("total_shmem", 0)
        peak = int((memory / "memory.max_usage_in_bytes").read_text())
        cpu = int((self._root / "cpuacct" / place / "cpuacct.usage").read_text())
        return Usage(cpu / 1e9, ram / MIB, peak / MIB)


class ProcessTree:
    """A process and its descendants, by /proc. Memory that several share is divided among them (PSS).

    The kernel walks all pages of a process to tell that: a tenth of a second for some gigabytes, on one of the cores that
    are measured. So it is read as often as costs little, and the reading before stands until then. What fell in between shows in
    each process's own high-water mark.
    """

    def __init__(self, pid: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._pid = pid
        self._clock = clock
        self._cpu = self._ram = self._peak = 0.0
        self._due = clock()

    def usage(self) -> Usage | None:
        cpu = highest = 0.0
        found = _descendants(self._pid)
        for pid in found:
            with contextlib.suppress(OSError, KeyError, ValueError):  # it ended while it was read
                cpu += _process_cpu(pid)
                highest = max(highest, _fields(PROC / str(pid) / "status")["VmHWM:"] / 1024)
        start = self._clock()
        if start >= self._due:
            self._ram = _shared_out(found)
            self._due = start + READING_SHARE * (self._clock() - start)
        if not cpu and not self._ram:
            return None
        self._cpu = max(self._cpu, cpu)
        self._peak = max(self._peak, self._ram, highest)
        return Usage(self._cpu, self._ram, self._peak)


def find_gpu(index: int) -> Gpu | None:
    """The GPU of that number, None where there is none."""
    try:
        return Gpu(index)
    except SamplerError:
        return None


def flare_cpu(before: HostTimes, after: HostTimes) -> float:
    """Percent of the host's CPU in use, by the organisers' formula: 100 x (1 - idle / (total + 0.1)).

    Their total is user + system + idle: time at a lower priority (nice) is in none of them. The 0.1 s makes an idle host
    of N cores read 100 / (N + 1).
    """
    idle = after.idle - before.idle
    total = after.user - before.user + after.system - before.system + idle
    return 100 * (1 - idle / (total + 0.1))


def host_times() -> HostTimes:
    """Read /proc/stat. Raises SamplerError where there is none."""
    try:
        words = (PROC / "stat").read_text().split("\n", 1)[0].split()[1:]
    except OSError as error:
        raise SamplerError(f"{PROC}/stat: cannot be read ({error.strerror}); sampling needs Linux") from error
    user, nice, system, idle, _, irq, softirq = (int(word) / TICKS for word in words[:7])
    return HostTimes(user, system, idle, user + nice + system + irq + softirq)


def host_ram() -> float:
    """MiB of the host's memory in use, without buffers and page cache: psutil's `used`, which the organisers read."""
    memory = _fields(PROC / "meminfo")
    spare = sum(memory.get(name, 0) for name in ("MemFree:", "Buffers:", "Cached:", "SReclaimable:"))
    return (memory["MemTotal:"] - spare) / 1024


def run_sampled(
    command: Sequence[str], container: Path | None = None, gpu: Gpu | None = None, limit: float | None = None
) -> Trace:
    """Run a command to its end and sample it. Its group of processes is ended when this is interrupted.

    ``container``: the file into which the command, an engine's `run`, writes the container's id; None samples the
    process itself. Raises OSError where the command cannot be started, TimeoutError after ``limit`` seconds.
    """
    first = host_times()
    start = time.monotonic()
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True
    ) as process:
        subject = ProcessTree(process.pid) if container is None else ControlGroup(container)
        sampler = _Sampler(subject, gpu, start, first)
        sampler.start()
        try:
            output, _ = process.communicate(timeout=limit)
            seconds = time.monotonic() - start
        except subprocess.TimeoutExpired as error:
            raise TimeoutError(f"did not end within {limit:.0f} s") from error
        finally:
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGTERM)
            sampler.stop()
    return Trace(seconds, process.returncode, tuple(sampler.samples), host_times().busy - first.busy, output)


class _Sampler(threading.Thread):
    """Takes a sample every PERIOD until it is stopped."""

    def __init__(self, subject: Subject, gpu: Gpu | None, start: float, first: HostTimes) -> None:
        super().__init__(daemon=True)
        self.samples: list[Sample] = []
        self._subject, self._gpu = subject, gpu
        self._start, self._before = start, first
        self._stopped = threading.Event()
        self._error: Exception | None = None

    def run(self) -> None:
        due = self._start
        try:
            while not self._stopped.wait(due - time.monotonic()):
                # From this reading, late or not: over a shorter span the formula of `flare_cpu` would read too high.
                due = time.monotonic() + PERIOD
                self.samples.append(self._sample())
        except (OSError, SamplerError) as error:
            self._error = error

    def stop(self) -> None:
        """End the sampling. Raises SamplerError if it had ended by itself, because the samples are not whole."""
        self._stopped.set()
        self.join()
        if self._error is not None:
            raise SamplerError(f"sampling broke off: {self._error}") from self._error

    def _sample(self) -> Sample:
        now, seconds = host_times(), time.monotonic() - self._start
        percent, self._before = flare_cpu(self._before, now), now
        return Sample(seconds, percent, host_ram(), self._subject.usage(), self._gpu.used() if self._gpu else None)


def _fields(path: Path) -> dict[str, int]:
    return _numbers(path.read_text())


def _numbers(text: str) -> dict[str, int]:
    """Lines `name number ...`."""
    lines = (line.split() for line in text.splitlines())
    return {words[0]: int(words[1]) for words in lines if len(words) > 1 and words[1].isdigit()}


def _shared_out(pids: Iterable[int]) -> float:
    """MiB of processes together (PSS)."""
    memory = {}
    for pid in pids:
        with contextlib.suppress(OSError, KeyError, ValueError):  # it ended while it was read
            # A child between vfork and exec lives in its parent's memory: the same text, counted once.
            text = (PROC / str(pid) / "smaps_rollup").read_text()
            memory[text] = _numbers(text)["Pss:"]
    return sum(memory.values()) / 1024


def _descendants(pid: int) -> list[int]:
    found = [pid]
    for each in found:
        for children in (PROC / str(each) / "task").glob("*/children"):
            with contextlib.suppress(OSError):
                found += [int(word) for word in children.read_text().split()]
    return found


def _process_cpu(pid: int) -> float:
    """CPU seconds of a process and of the children that it has waited for."""
    # The program's name, in brackets, may hold anything.
    words = (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    return sum(int(word) for word in words[11:15]) / TICKS
