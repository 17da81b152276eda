"""The parts of a stage side by side, on the threads of the CPU engine, which rests meanwhile."""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

# Does some work for each of several parts, whose results must not depend on each other.
Each = Callable[[Callable[[Any], None], Iterable[Any]], None]


def in_turn(work: Callable[[Any], None], parts: Iterable[Any]) -> None:
    """One part after the other: all that one thread can."""
    for part in parts:
        work(part)


def side_by_side(threads: int) -> Each:
    """As many parts at a time as there are ``threads``. numpy leaves the others alone while it computes."""
    if threads == 1:
        return in_turn
    pool = ThreadPoolExecutor(threads, thread_name_prefix="part")

    def run(work: Callable[[Any], None], parts: Iterable[Any]) -> None:
        for _ in pool.map(work, parts):
            pass  # asked for, so that an error comes out

    return run
