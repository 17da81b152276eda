"""Processes that make phantoms side by side."""

import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager

THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


@contextmanager
def processes(count: int) -> Iterator[ProcessPoolExecutor]:
    """``count`` processes of their own, one BLAS thread each: a fork may not inherit a caller's thread pools."""
    before = {key: os.environ.get(key) for key in THREADS}
    os.environ.update(dict.fromkeys(before, "1"))
    try:
        with ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("spawn")) as pool:
            yield pool
    finally:
        for key, value in before.items():
            os.environ.pop(key, None)
            if value is not None:
                os.environ[key] = value
