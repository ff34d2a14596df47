"""Jobs side by side: order, limits, and every way to end."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from jrs.parallel import available_cpus, together


def test_results_come_in_the_order_of_the_jobs() -> None:
    released = threading.Event()

    def last() -> int:
        released.set()
        return 2

    # The first can only end after the second has begun.
    assert together([lambda: (released.wait(10), 1)[1], last], threads=2) == [1, 2]
    assert together([], threads=2) == []


@pytest.mark.parametrize(("threads", "jobs"), [(1, 5), (3, 9), (None, 20)])
def test_no_more_threads_than_asked_for(threads: int | None, jobs: int) -> None:
    seen: set[int] = set()
    together([lambda: seen.add(threading.get_ident())] * jobs, threads)
    assert 1 <= len(seen) <= (threads or available_cpus())


def failing(error: type[BaseException], after: threading.Event | None = None) -> Callable[[], None]:
    def job() -> None:
        if after is not None:
            after.wait(10)
        raise error

    return job


def test_the_first_in_order_raises_whichever_failed_first() -> None:
    second_failed = threading.Event()

    def second() -> None:
        second_failed.set()
        raise ValueError

    with pytest.raises(KeyError):
        together([failing(KeyError, second_failed), second], threads=2)


@pytest.mark.parametrize("error", [OSError, MemoryError, KeyboardInterrupt])
def test_nothing_runs_any_more_after_a_failure(error: type[BaseException]) -> None:
    begun, finished = threading.Event(), threading.Event()
    late: list[int] = []

    def another() -> None:
        threading.Event().wait(0.1)
        late.append(1)

    def slow() -> None:
        begun.set()
        threading.Event().wait(0.2)
        finished.set()

    with pytest.raises(error):
        together([failing(error, begun), slow, *([another] * 50)], threads=2)
    assert finished.is_set()
    before = len(late)
    threading.Event().wait(0.2)
    assert len(late) == before < 50
