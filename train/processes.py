"""Processes for work side by side, which end with the one that started them, however it ends."""

import contextlib
import ctypes
import multiprocessing
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager

from inference.engine import available_cores

THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
PR_SET_PDEATHSIG = 1  # linux/prctl.h


@contextmanager
def process_pool(count: int) -> Iterator[ProcessPoolExecutor]:
    """``count`` processes, one BLAS thread each. Of what waits nothing is begun once an exception leaves the block."""
    before = {key: os.environ.get(key) for key in THREADS}
    os.environ.update(dict.fromkeys(before, "1"))
    try:
        # spawn: a forked child would inherit the locks of numeric libraries' threads.
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(count, context, die_with_parent) as pool:
            try:
                yield pool
            except BaseException:  # or Ctrl-C and SIGTERM would only be heard at the end
                pool.shutdown(cancel_futures=True)
                raise
    finally:
        for key, value in before.items():
            os.environ.pop(key, None)
            if value is not None:
                os.environ[key] = value


def worker_count(setting: int, jobs: int) -> int:
    """Processes for ``jobs`` jobs: the setting, or one per core where it is 0."""
    return max(1, min(jobs, setting or available_cores()))


def die_with_parent() -> None:
    """Have Linux kill this process when its parent ends, so that a killed run leaves nobody who writes into its folder."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
