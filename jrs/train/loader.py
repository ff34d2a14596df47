"""Batches prepared ahead of the step that needs them."""

from __future__ import annotations

import dataclasses
import time
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from jrs.train.batch import PairBatch, PairSource


class Loader:
    """The batches ``numbers`` of a source, in that order, up to ``ahead`` of them prepared by ``workers`` threads.

    Threads, because what prepares a batch (PyTorch, NumPy, reading) leaves Python's lock alone and shares the
    source's memory. Each batch is a function of its number, so the threads change nothing but the time. With
    ``pin`` the batches lie in pinned memory, from where a GPU copies them beside its work. ``waited_s`` adds up the
    seconds that ``next`` waited.
    """

    def __init__(
        self, source: PairSource, numbers: Iterable[int], size: int, workers: int = 1, ahead: int = 2, pin: bool = False
    ) -> None:
        self.waited_s = 0.0
        self._source, self._numbers, self._size, self._pin = source, iter(numbers), size, pin
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="jrs-loader")
        self._prepared: deque[Future[PairBatch]] = deque()
        for _ in range(ahead):
            self._order()

    def next(self) -> PairBatch:
        """The next batch; raises what preparing it raised."""
        started = time.perf_counter()
        try:
            batch = self._prepared.popleft().result()
        finally:
            self.waited_s += time.perf_counter() - started
        self._order()
        return batch

    def close(self) -> None:
        """Drop what is not needed any more; a batch in the making is waited for."""
        self._pool.shutdown(cancel_futures=True)

    def _order(self) -> None:
        number = next(self._numbers, None)
        if number is not None:
            self._prepared.append(self._pool.submit(self._prepare, number))

    def _prepare(self, number: int) -> PairBatch:
        batch = self._source.batch(number, self._size)
        if not self._pin:
            return batch
        values: dict[str, Any] = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)}
        return PairBatch(**{k: v if v is None or v.is_cuda else v.pin_memory() for k, v in values.items()})
