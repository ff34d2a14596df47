"""Threads for work that leaves Python's lock alone: compression, and NumPy on large arrays."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def available_cpus() -> int:
    """Processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def together(jobs: Sequence[Callable[[], T]], threads: int | None = None) -> list[T]:
    """Run jobs in at most ``threads`` threads (default: one a processor); their results in order.

    They begin in order, so give the longest first. Of those that fail, the first in order raises. When this function
    ends, in whatever way, none is running any more.
    """
    pool = ThreadPoolExecutor(max_workers=max(1, min(threads or available_cpus(), len(jobs))))
    try:
        return [future.result() for future in [pool.submit(job) for job in jobs]]
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
