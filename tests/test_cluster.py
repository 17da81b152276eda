"""Jobs on Ray: who fails, who dies, and that nothing is lost."""

import errno
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from train import cluster
from train.cluster import ClusterError, Demand, Job, Labels, Queue, RayCluster

CASES = [f"case{number}" for number in range(8)]


def nothing() -> None:
    """A tick."""


def test_a_case_waits_for_its_turn_again_until_its_last_attempt() -> None:
    queue = Queue(["a", "b"], attempts=3)
    assert queue.take() == "a"
    assert not queue.fail("a")
    assert [queue.take(), queue.take()] == ["b", "a"]
    assert not queue.fail("a")
    queue.take()
    assert queue.fail("a")
    assert len(queue) == 0


def test_a_job_takes_a_gpu_each_where_there_are_any() -> None:
    hosts = [{"CPU": 16.0, "GPU": 4.0}, {"CPU": 8.0, "GPU": 1.0}]
    training, labelling = cluster.demands(hosts, "auto", (0, 0))
    assert training == labelling == Demand(gpus=1, cores=1)
    assert sum(training.fits(host) for host in hosts) == 5


def test_without_gpus_a_job_takes_cores() -> None:
    hosts = [{"CPU": 16.0}, {"CPU": 8.0}]
    whole, two = cluster.demands(hosts, "auto", (0, 2))
    assert [whole.fits(host) for host in hosts] == [1, 0]
    assert [two.fits(host) for host in hosts] == [8, 4]
    more, _ = cluster.demands(hosts, "auto", (64, 0))
    assert more.fits(hosts[0]) == 1


def test_the_cpu_can_be_wanted_and_a_gpu_can_be_missed() -> None:
    training, _ = cluster.demands([{"CPU": 8.0, "GPU": 2.0}], "cpu", (4, 4))
    assert training == Demand(gpus=0, cores=4)
    with pytest.raises(ClusterError, match="Ray found no GPU on any host"):
        cluster.demands([{"CPU": 8.0}], "cuda", (0, 0))


def test_the_folder_of_sockets_has_a_short_path(tmp_path: Path) -> None:
    deep = tmp_path / ("x" * 100) / ("y" * 100)
    assert len(str(cluster.temporary_folder(deep))) < 40 + len(os.environ.get("TMPDIR", "/tmp"))
    assert cluster.temporary_folder(deep) != cluster.temporary_folder(tmp_path)


# With Ray, on this machine.


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayCluster]:
    pytest.importorskip("ray")
    before = signal.getsignal(signal.SIGTERM)
    with cluster.connect(None, tmp_path_factory.mktemp("run"), "cpu", (1, 1), retries=3) as ready:
        assert signal.getsignal(signal.SIGTERM) == before
        yield ready


def write(path: Path) -> None:
    path.write_text(str(os.getpid()))


def refuse() -> None:
    raise ValueError("not this one")


def die_once(path: Path) -> None:
    """The first time the process is killed, as by the kernel when memory is short."""
    if not path.exists():
        path.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    path.with_suffix(".done").touch()


def test_usage_statistics_are_off_and_nothing_is_left_behind(local: RayCluster) -> None:
    import ray

    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"
    assert ray._common.usage.usage_lib._usage_stats_enabledness().name == "DISABLED_EXPLICITLY"
    assert not (Path.home() / ".ray" / "auth_token").exists() or "RAY_AUTH_TOKEN" in os.environ


def test_one_job_that_fails_is_named_and_the_others_are_done(local: RayCluster, tmp_path: Path) -> None:
    jobs = [Job(f"fold {n}", partial(write, tmp_path / str(n)), tmp_path / "log" / str(n)) for n in range(3)]
    jobs.insert(1, Job("fold bad", refuse, tmp_path / "log" / "bad"))
    with pytest.raises(ClusterError, match="fold bad: ValueError: not this one"):
        local.train(jobs, nothing)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1", "2", "log"]


def test_a_training_whose_process_dies_is_run_again(local: RayCluster, tmp_path: Path) -> None:
    local.train([Job("fold 0", partial(die_once, tmp_path / "tried"), tmp_path / "log")], nothing)
    assert (tmp_path / "tried.done").exists()


def labeller(
    folder: Path, bad: str = "", dying: str = "", full: str = "", seconds: float = 0.05
) -> Callable[[str], None]:
    """Loads nothing and labels with a file; one case may be broken, one kill the process, one find the disk full."""
    folder.mkdir(exist_ok=True)
    (folder.parent / "loads").mkdir(exist_ok=True)
    (folder.parent / "loads" / str(os.getpid())).touch()

    def label(case: str) -> None:
        time.sleep(seconds)
        if case == bad:
            raise ValueError(f"{case} is broken\nand more")
        if case == full:
            raise OSError(errno.ENOSPC, "No space left on device")
        if case == dying:
            os.kill(os.getpid(), signal.SIGKILL)
        (folder / case).touch()

    return label


def label_all(executor: RayCluster, folder: Path, **faults: str) -> dict[str, str]:
    """Label all cases; returns who was set aside, and why."""
    aside: dict[str, str] = {}
    load = partial(labeller, folder / "out", **faults)
    executor.label(Labels(load, CASES, 3, aside.__setitem__, folder / "log"), nothing)
    return aside


def done(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "out").iterdir())


def test_workers_load_once_and_label_many_cases(local: RayCluster, tmp_path: Path) -> None:
    assert label_all(local, tmp_path) == {}
    assert done(tmp_path) == CASES
    assert len(list((tmp_path / "loads").iterdir())) <= local.labelling_slots


def test_a_broken_case_is_set_aside_after_three_attempts(local: RayCluster, tmp_path: Path) -> None:
    assert label_all(local, tmp_path, bad="case3") == {"case3": "ValueError: case3 is broken"}
    assert done(tmp_path) == [case for case in CASES if case != "case3"]


def test_a_case_that_kills_its_worker_is_set_aside_and_the_others_are_done(local: RayCluster, tmp_path: Path) -> None:
    aside = label_all(local, tmp_path, dying="case3")
    assert list(aside) == ["case3"]
    assert "the worker died" in aside["case3"]
    assert done(tmp_path) == [case for case in CASES if case != "case3"]


def test_a_full_disk_stops_the_labelling_and_sets_nothing_aside(local: RayCluster, tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match=r"case0: OSError.*No space left"):
        label_all(local, tmp_path, full="case0")


def test_models_that_cannot_be_loaded_stop_the_labelling(local: RayCluster, tmp_path: Path) -> None:
    labels = Labels(refuse_to_load, CASES, 3, {}.__setitem__, tmp_path / "log")
    with pytest.raises(ClusterError, match="the models cannot be loaded: ValueError: no such bundle"):
        local.label(labels, nothing)


def refuse_to_load() -> Callable[[str], None]:
    raise ValueError("no such bundle")


def test_workers_that_die_while_they_load_stop_the_labelling(local: RayCluster, tmp_path: Path) -> None:
    labels = Labels(die_while_loading, CASES, 2, {}.__setitem__, tmp_path / "log")
    with pytest.raises(ClusterError, match=f"{2 * local.labelling_slots} labelling workers in a row died"):
        local.label(labels, nothing)


def die_while_loading() -> Callable[[str], None]:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def test_a_signal_to_stop_ends_the_wait_for_a_job(local: RayCluster, tmp_path: Path) -> None:
    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    timer = threading.Timer(3.0, os.kill, (os.getpid(), signal.SIGTERM))
    timer.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            local.train([Job("fold 0", partial(time.sleep, 20.0), tmp_path / "log")], nothing)
    finally:
        timer.cancel()
        signal.signal(signal.SIGTERM, before)


# With Ray, on two hosts that are processes of this machine.


def run_and_count(path: Path, seconds: float) -> None:
    """Work that takes a while; every start of it is counted."""
    with path.open("a") as file:
        file.write(f"{os.getppid()}\n")
    time.sleep(seconds)
    path.with_suffix(".done").touch()


def use_gpu(path: Path) -> None:
    """Note which GPU this process sees, and when."""
    start = time.time()
    time.sleep(1.0)
    path.write_text(json.dumps([os.environ["CUDA_VISIBLE_DEVICES"], start, time.time()]))


def test_a_host_that_dies_loses_nothing_and_no_gpu_is_used_twice(tmp_path: Path) -> None:
    """Run in a process of its own: Ray is a different one there."""
    pytest.importorskip("ray")
    root = Path(__file__).resolve().parents[1]
    command = [sys.executable, "-c", f"from tests.test_cluster import two_hosts; two_hosts({str(tmp_path)!r})"]
    ended = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=600)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert done(tmp_path) == sorted(MANY)
    assert (tmp_path / "aside").read_text() == "{}"
    assert len((tmp_path / "loads.txt").read_text().split()) >= 2
    for fold in range(2):
        assert (tmp_path / f"fold{fold}.done").exists()
    started = [len((tmp_path / f"fold{fold}").read_text().split()) for fold in range(2)]
    assert sorted(started) == [1, 2]  # the one on the dead host once more
    # Two GPUs, four jobs: each has one for itself, both are used.
    spans = [json.loads(path.read_text()) for path in sorted((tmp_path / "gpus").iterdir())]
    assert {gpu for gpu, _, _ in spans} == {"0", "1"}
    for one, other in itertools.combinations(spans, 2):
        assert one[0] != other[0] or one[2] <= other[1] or other[2] <= one[1]


MANY = [f"case{number:02d}" for number in range(30)]


def two_hosts(folder: str) -> None:
    """Label and train on two hosts; one is killed in the middle of each."""
    from ray.cluster_utils import Cluster

    root = Path(folder)
    store = {"object_store_memory": 100 * 2**20}
    hosts = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "num_gpus": 2, **store})
    aside: dict[str, str] = {}

    def kill_when(ready: Callable[[], bool]) -> threading.Thread:
        second = hosts.add_node(num_cpus=2, **store)

        def kill() -> None:
            while not ready():
                time.sleep(0.1)
            hosts.remove_node(second, allow_graceful=False)

        thread = threading.Thread(target=kill)
        thread.start()
        return thread

    def both_label() -> bool:
        return (root / "out").exists() and len(list((root / "out").iterdir())) >= 6 and len(loads()) >= 2

    def loads() -> list[str]:
        return [path.name for path in (root / "loads").iterdir()]

    def both_train() -> bool:
        return all((root / f"fold{fold}").exists() for fold in range(2))

    killer = kill_when(both_label)
    with cluster.connect(hosts.address, root, "cpu", (2, 2), retries=3) as ready:
        assert ready.labelling_slots == 2
        load = partial(labeller, root / "out", seconds=0.7)
        ready.label(Labels(load, MANY, 3, aside.__setitem__, root / "log"), nothing)
        killer.join()
        (root / "loads.txt").write_text("\n".join(loads()))
        killer = kill_when(both_train)
        while ready.training_slots < 2:
            time.sleep(0.2)
        jobs = [Job(f"fold {n}", partial(run_and_count, root / f"fold{n}", 8.0), root / "log") for n in range(2)]
        ready.train(jobs, nothing)
        killer.join()
    (root / "gpus").mkdir()
    with cluster.connect(hosts.address, root, "auto", (0, 0), retries=3) as ready:
        jobs = [Job(f"fold {n}", partial(use_gpu, root / "gpus" / str(n)), root / "log") for n in range(4)]
        ready.train(jobs, nothing)
    (root / "aside").write_text(str(aside))
    hosts.shutdown()
