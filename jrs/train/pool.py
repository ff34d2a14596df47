"""One function over many items in processes of their own, ready for any way in which they can end."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from jrs.errors import OutOfMemoryError

T = TypeVar("T")
R = TypeVar("R")


def for_each(
    function: Callable[[T], R], items: Sequence[T], workers: int, done: Callable[[R], None] = lambda result: None
) -> list[R]:
    """``[function(item) for item in items]``, ``workers`` at a time; ``done`` is told of each result as it comes.

    ``function`` and the items must be picklable. The first exception cancels what has not begun and is raised. No
    process outlives its parent, however that ends; one that the system kills raises OutOfMemoryError.
    """
    if workers <= 1 or len(items) <= 1:
        results = []
        for item in items:
            results.append(function(item))
            done(results[-1])
        return results
    # Spawned, not forked: libraries that keep threads (onnxruntime, ITK) do not survive a fork.
    pool = ProcessPoolExecutor(min(workers, len(items)), multiprocessing.get_context("spawn"), start_worker)
    try:
        futures = [pool.submit(function, item) for item in items]
        for future in as_completed(futures):
            done(future.result())
        return [future.result() for future in futures]
    except BrokenProcessPool as error:
        raise OutOfMemoryError("a worker was killed, most likely for its memory; use fewer with --workers") from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def start_worker() -> None:
    """In a worker: leave Ctrl-C to the parent, and end when it does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
