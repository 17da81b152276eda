"""Work side by side, and what becomes of it when the one who asked for it is stopped."""

import os
import time
from concurrent.futures import Future

import pytest

from inference.engine import available_cores
from train.processes import process_pool, worker_count


def stop_at_once(waiting: list[Future[None]]) -> None:
    with process_pool(1) as pool:
        waiting += [pool.submit(time.sleep, 0.1) for _ in range(60)]
        raise KeyError


def test_what_waits_is_not_begun_after_an_error() -> None:
    waiting: list[Future[None]] = []
    with pytest.raises(KeyError):
        stop_at_once(waiting)
    assert sum(future.cancelled() for future in waiting) > 30


def test_a_process_has_one_thread_for_linear_algebra_and_the_caller_its_own_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    with process_pool(1) as pool:
        assert pool.submit(os.getenv, "OMP_NUM_THREADS").result() == "1"
    assert os.environ["OMP_NUM_THREADS"] == "7"
    assert "MKL_NUM_THREADS" not in os.environ


def test_there_are_no_more_processes_than_jobs_or_the_setting_says() -> None:
    assert worker_count(3, 10) == 3
    assert worker_count(3, 2) == 2
    assert worker_count(0, 1000) == available_cores()
    assert worker_count(0, 0) == 1
