"""The only module that speaks Ray: jobs side by side, on this machine or on a cluster.

What a job does and where its result lies is not known here. A job leaves a file when it is done, so a job that is lost with
its host is simply run again.
"""

import contextlib
import errno
import logging
import os
import secrets
import shutil
import signal
import tempfile
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from inference.engine import available_cores
from train.processes import die_with_parent

# Before Ray is imported. A hospital's machine reports to nobody; and a small /dev/shm is enough, since no data passes
# through Ray but names of files.
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ.setdefault("RAY_OBJECT_STORE_ALLOW_SLOW_STORAGE", "1")
# Logs of a week stay small; and without a limit a worker looks, at a job's end, for a log file that Ray itself may have
# moved away, and the job that was done would count as failed.
os.environ.setdefault("RAY_ROTATION_MAX_BYTES", str(50 * 2**20))
os.environ.setdefault("RAY_ROTATION_BACKUP_COUNT", "1")
# A busy machine starts slowly: seconds until Ray gives up on a worker.
os.environ.setdefault("RAY_worker_register_timeout_seconds", "300")
# Ray would have its workers give way to everybody else; but they are what the machine is for.
os.environ.setdefault("RAY_worker_niceness", "0")
# What Ray is about to do by itself, and warns of: a job without a GPU keeps CUDA_VISIBLE_DEVICES as it is.
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

log = logging.getLogger(__name__)

OBJECT_STORE_BYTES = 100 * 2**20
# Errors of a disk that the next case would meet too.
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
# Seconds between two looks at the cluster: new hosts get work, lost ones are replaced.
LOOK = 2.0
START_ATTEMPTS = 3

Work = Callable[[], None]
CaseWork = Callable[[str], None]
Tick = Callable[[], None]


class ClusterError(RuntimeError):
    """Jobs that cannot be run. The message names the job and the reason."""


@dataclass(frozen=True)
class Job:
    """A training: its name, what to do, and the file that its log goes to."""

    name: str
    work: Work
    log: Path


@dataclass(frozen=True)
class Demand:
    """What one job takes of a host: a GPU and one core beside it, or cores."""

    gpus: int
    cores: int

    def fits(self, resources: Mapping[str, float]) -> int:
        """How many such jobs run on a host at once."""
        if self.gpus:
            return int(resources.get("GPU", 0)) // self.gpus
        return int(resources.get("CPU", 0)) // self.cores


@dataclass(frozen=True)
class Labels:
    """The labelling of an iteration. ``load`` makes, in each worker once, the function that labels a case.

    ``attempts``: how often a case is tried; then ``set_aside`` is told its name and the last reason.
    """

    load: Callable[[], CaseWork]
    cases: Sequence[str]
    attempts: int
    set_aside: Callable[[str, str], None]
    log: Path


class Executor(Protocol):
    """Runs the jobs of a loop."""

    def train(self, jobs: Sequence[Job], tick: Tick) -> None:
        """Run all jobs; ``tick`` is called now and then. Raises ClusterError after all have ended."""
        ...

    def label(self, labels: Labels, tick: Tick) -> None:
        """Label all cases; one that fails too often is set aside. Raises ClusterError."""
        ...


@dataclass
class Queue:
    """Cases still to be done, and how often each has failed."""

    cases: Iterable[str]
    attempts: int
    failures: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._waiting = deque(self.cases)

    def __len__(self) -> int:
        return len(self._waiting)

    def take(self) -> str:
        """The next case."""
        return self._waiting.popleft()

    def fail(self, case: str) -> bool:
        """Count a failure. True: that was the last attempt; otherwise the case waits for its turn again."""
        self.failures[case] = self.failures.get(case, 0) + 1
        if self.failures[case] >= self.attempts:
            return True
        self._waiting.append(case)
        return False


class RayCluster:
    """Jobs on Ray. Made by ``connect``."""

    def __init__(self, training: Demand, labelling: Demand, retries: int) -> None:
        self.training = training
        self.labelling = labelling
        self.retries = retries

    @property
    def training_slots(self) -> int:
        """Trainings that run at once."""
        return slots(self.training)

    @property
    def labelling_slots(self) -> int:
        """Workers that label at once."""
        return slots(self.labelling)

    def train(self, jobs: Sequence[Job], tick: Tick) -> None:
        """See ``Executor``. A job whose process or host dies goes on elsewhere, from its last checkpoint."""
        import ray

        remote = ray.remote(_run_job).options(
            num_gpus=self.training.gpus, num_cpus=self.training.cores, max_retries=self.retries, retry_exceptions=False
        )
        running = {remote.remote(job): job.name for job in jobs}
        failures = []
        while running:
            ended, _ = ray.wait(list(running), num_returns=1, timeout=LOOK)
            for reference in ended:
                name = running.pop(reference)
                try:
                    ray.get(reference)
                except ray.exceptions.RayError as error:
                    failures.append(f"{name}: {_reason(error)}")
                    log.error("%s; the other jobs go on", failures[-1])
            tick()
        if failures:
            raise ClusterError("; ".join(failures))

    def label(self, labels: Labels, tick: Tick) -> None:
        """See ``Executor``. A worker that dies is replaced; hosts that join get workers."""
        staff = Staff(self.labelling, labels)
        try:
            while staff.busy:
                staff.hire()
                staff.wait()
                tick()
        finally:
            staff.dismiss()


class Staff:
    """Workers that keep their models loaded, and the cases they are at. One case is under way per worker."""

    def __init__(self, demand: Demand, labels: Labels) -> None:
        import ray

        self.labels = labels
        self.demand = demand
        self.queue = Queue(labels.cases, labels.attempts)
        self._worker = ray.remote(_Worker).options(num_gpus=demand.gpus, num_cpus=demand.cores)
        self._under_way: dict[Any, tuple[Any, str | None]] = {}  # reference: worker, case (None: it loads its models)
        self._lost_loading = 0  # workers in a row that died before they had their models

    @property
    def busy(self) -> bool:
        """Whether a case is waiting or under way."""
        return len(self.queue) > 0 or any(case is not None for _, case in self._under_way.values())

    def hire(self) -> None:
        """Start as many workers as there is room and work for."""
        wanted = min(slots(self.demand), len(self.queue)) if len(self.queue) else 0
        for _ in range(wanted - len(self._under_way)):
            worker = self._worker.remote(self.labels.log)
            self._under_way[worker.load.remote(self.labels.load)] = worker, None

    def wait(self) -> None:
        """Wait for somebody to end, a moment at most, and give out the next cases. Raises ClusterError."""
        import ray

        if not self._under_way:
            time.sleep(LOOK)  # no host is left; one may join
            return
        ended, _ = ray.wait(list(self._under_way), num_returns=1, timeout=LOOK)
        for reference in ended:
            worker, case = self._under_way.pop(reference)
            try:
                ray.get(reference)
            except ray.exceptions.RayTaskError as error:
                self._check(error, case)
                self._failed(case, _reason(error))
            except ray.exceptions.RayError as error:  # the worker or its host is gone
                log.warning("a labelling worker is lost: %s", _reason(error))
                self._lost(case, _reason(error))
                continue
            else:
                self._lost_loading = 0
            if len(self.queue):
                case = self.queue.take()
                self._under_way[worker.label.remote(case)] = worker, case
            else:
                ray.kill(worker)

    def dismiss(self) -> None:
        """End all workers."""
        import ray

        for worker, _ in self._under_way.values():
            ray.kill(worker)

    def _check(self, error: Any, case: str | None) -> None:
        """Stop for what no other case would survive: models that cannot be loaded, a disk that is full."""
        if case is None:
            raise ClusterError(f"the models cannot be loaded: {_reason(error)}")
        if isinstance(error.cause, OSError) and error.cause.errno in DISK_ERRORS:
            raise ClusterError(f"{case}: {_reason(error)}")

    def _lost(self, case: str | None, reason: str) -> None:
        """A worker died: of a case, or while it loaded its models, which the next one may not survive either."""
        self._failed(case, f"the worker died: {reason}")
        if case is None:
            self._lost_loading += 1
            # A host that goes takes all its workers along, so what counts is each one's share.
            if self._lost_loading >= self.labels.attempts * max(1, slots(self.demand)):
                raise ClusterError(
                    f"{self._lost_loading} labelling workers in a row died while they loaded their models, most likely for "
                    "lack of memory; without a GPU a larger cluster.labelling_threads means fewer at once. The last one: "
                    + reason
                )

    def _failed(self, case: str | None, reason: str) -> None:
        if case is None:
            return
        if self.queue.fail(case):
            log.error("label: %s is set aside: %s", case, reason)
            self.labels.set_aside(case, reason)
        else:
            log.warning("label: %s failed and is tried again: %s", case, reason)


class _Worker:
    """A process that labels cases, one after the other."""

    def __init__(self, log_file: Path) -> None:
        _start_process(log_file)
        self._label: CaseWork | None = None

    def load(self, load: Callable[[], CaseWork]) -> None:
        self._label = load()

    def label(self, case: str) -> None:
        assert self._label is not None
        self._label(case)


@contextlib.contextmanager
def connect(address: str | None, run: Path, device: str, cores: tuple[int, int], retries: int) -> Iterator[RayCluster]:
    """Ray on this machine, or the cluster at ``address``, for as long as the block lasts.

    ``run``: the run's folder; it names Ray's temporary folder. ``device``: "auto" takes GPUs where there are any.
    ``cores``: of a training and of a labelling worker where there are no GPUs; 0: all of a host. Raises ClusterError.
    """
    import ray

    temporary = temporary_folder(run)
    stop = signal.getsignal(signal.SIGTERM)
    try:
        if address:
            _join(address)
        else:
            _start(temporary)
        # Ray takes the signal that Docker and Slurm stop us with for a crash, and aborts.
        signal.signal(signal.SIGTERM, stop)
        hosts = [host["Resources"] for host in ray.nodes() if host["Alive"]]
        yield RayCluster(*demands(hosts, device, cores), retries)
    finally:
        ray.shutdown()
        shutil.rmtree(temporary, ignore_errors=True)


def _join(address: str) -> None:
    import ray

    try:
        ray.init(address, log_to_driver=False, logging_level=logging.ERROR)
    except Exception as error:  # Ray raises many
        raise ClusterError(f"the Ray cluster at {address} cannot be reached: {error}") from error


def _start(temporary: Path) -> None:
    """Ray on this machine. It gives up after half a minute, which a busy machine may need: three tries."""
    import ray

    # A secret of its own: Ray would leave one in the home folder.
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    for attempt in range(START_ATTEMPTS):
        shutil.rmtree(temporary, ignore_errors=True)  # of a process that was killed: the run's lock is ours
        try:
            ray.init(
                num_cpus=available_cores(),
                object_store_memory=OBJECT_STORE_BYTES,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                _temp_dir=str(temporary),
            )
        except Exception as error:  # Ray raises that class itself
            ray.shutdown()
            if attempt == START_ATTEMPTS - 1:
                raise ClusterError(f"Ray cannot be started on this machine: {error}") from error
            log.warning("Ray did not start (%s); trying again", error)
        else:
            return


def temporary_folder(run: Path) -> Path:
    """Where Ray keeps its sockets and logs: short, since the path of a socket has at most 107 characters."""
    name = f"ray-{os.getuid()}-{zlib.crc32(str(run.resolve()).encode()):08x}"
    return Path(tempfile.gettempdir()) / name


def demands(hosts: Sequence[Mapping[str, float]], device: str, cores: tuple[int, int]) -> tuple[Demand, Demand]:
    """What a training and a labelling worker take, given the resources of the hosts. Raises ClusterError."""
    gpus = sum(int(host.get("GPU", 0)) for host in hosts)
    if device == "cuda" and not gpus:
        raise ClusterError("training.device is 'cuda'; Ray found no GPU on any host")
    if device != "cpu" and gpus:
        return Demand(1, 1), Demand(1, 1)
    largest = max(int(host.get("CPU", 0)) for host in hosts)
    wanted = [min(number or largest, largest) for number in cores]
    return Demand(0, wanted[0]), Demand(0, wanted[1])


def slots(demand: Demand) -> int:
    """Jobs that run at once on the hosts that are alive now."""
    import ray

    return sum(demand.fits(host["Resources"]) for host in ray.nodes() if host["Alive"])


def _run_job(job: Job) -> None:
    _start_process(job.log)
    job.work()


def _start_process(log_file: Path) -> None:
    """What every worker process does first: end with its host's Ray, as its children do with it, and log into the run."""
    die_with_parent()
    os.register_at_fork(after_in_child=die_with_parent)
    log_file.parent.mkdir(parents=True, exist_ok=True)
    logging.basicConfig(
        filename=log_file, level=logging.INFO, format="%(asctime)s %(levelname).1s %(message)s", force=True
    )


def _reason(error: Any) -> str:
    """One line that says why."""
    cause = getattr(error, "cause", None) or error
    lines = str(cause).strip().splitlines()
    return f"{type(cause).__name__}: {lines[0] if lines else 'no message'}"
