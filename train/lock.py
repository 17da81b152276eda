"""One process at a time works on a run, and one on a training."""

import contextlib
import errno
import fcntl
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

log = logging.getLogger(__name__)

# File systems that cannot lock; there, starting a run twice is the user's risk.
UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class LockError(RuntimeError):
    """A run or a training that another process works on."""


@contextlib.contextmanager
def locked(path: Path, wait: float = 0.0) -> Iterator[None]:
    """Hold the lock ``path`` for as long as the block lasts; it is free again when the process ends, however it ends.

    ``wait``: seconds to wait for another process, which may be about to end. Raises LockError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        deadline = time.monotonic() + wait
        while not _try(file):
            if time.monotonic() >= deadline:
                raise LockError(f"{path.parent}: another process works on it; expected to be alone")
            time.sleep(0.5)
        yield


def is_locked(path: Path) -> bool:
    """Whether a process holds the lock."""
    try:
        with path.open("a") as file:
            return not _try(file)
    except OSError:
        return False


def _try(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        log.warning("%s: this file system has no locks; make sure that the run is started once", file.name)
    return True
