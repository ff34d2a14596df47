"""Batches prepared ahead: in order, the same, and how long they were waited for."""

from __future__ import annotations

import random
import threading
import time

import pytest
import torch

from jrs.train.batch import PairBatch
from jrs.train.loader import Loader


class Numbered:
    """Batches that hold their own number and take a while, each another one."""

    def __init__(self, seconds: float = 0.0, fails_at: int = -1) -> None:
        self.seconds, self.fails_at = seconds, fails_at
        self.threads: set[str] = set()
        self.ordered = 0

    def __len__(self) -> int:
        return 2

    def batch(self, index: int, size: int) -> PairBatch:
        self.ordered = max(self.ordered, index)
        self.threads.add(threading.current_thread().name)
        time.sleep(random.Random(index).uniform(0.0, 2.0) * self.seconds)
        if index == self.fails_at:
            raise RuntimeError("broken")
        values = torch.full((size, 1, 1, 1, 1), float(index))
        return PairBatch(values, values, values[:, :, 0, 0, 0], values[:, :, 0, 0, 0])


@pytest.mark.parametrize(("workers", "ahead"), [(1, 1), (1, 4), (3, 6)])
def test_batches_come_in_order(workers: int, ahead: int) -> None:
    source, numbers = Numbered(0.002), [5, 3, 11, 4, 4, 0, 9, 2, 8, 1]
    loader = Loader(source, numbers, 3, workers, ahead)
    got = [loader.next().moving[:, 0, 0, 0, 0].tolist() for _ in numbers]
    loader.close()
    assert got == [[float(n)] * 3 for n in numbers]
    assert len(source.threads) <= workers


def test_no_more_than_so_many_are_prepared_ahead() -> None:
    source = Numbered()
    loader = Loader(source, iter(range(100)), 1, 1, ahead=3)
    for done in range(5):
        loader.next()
        time.sleep(0.05)
        assert source.ordered == done + 3
    loader.close()


def test_an_error_comes_with_its_batch() -> None:
    loader = Loader(Numbered(fails_at=2), range(5), 1, 2, 4)
    assert [float(loader.next().moving.sum()) for _ in range(2)] == [0.0, 1.0]
    with pytest.raises(RuntimeError, match="broken"):
        loader.next()
    loader.close()


def test_waiting_is_measured() -> None:
    slow = Loader(Numbered(0.05), range(4), 1, 1, 1)
    started = time.perf_counter()
    for _ in range(4):
        slow.next()
    elapsed = time.perf_counter() - started
    slow.close()
    assert 0.5 * elapsed < slow.waited_s <= elapsed
    ready = Loader(Numbered(), range(4), 1, 1, 4)
    time.sleep(0.2)
    for _ in range(4):
        ready.next()
    ready.close()
    assert ready.waited_s < 0.1
