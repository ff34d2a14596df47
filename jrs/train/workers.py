"""Pairs drawn by processes of their own: a GPU's main process has its hands full with starting kernels."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import torch
import torch.multiprocessing

from jrs.errors import OutOfMemoryError
from jrs.train.batch import PairBatch, concatenate
from jrs.train.pool import start_worker
from jrs.train.synth import SyntheticPairs

_source: SyntheticPairs | None = None
"""In a worker: what it draws from."""


class WorkerPairs:
    """The pairs of ``source`` on ``device``, drawn there by ``count`` processes with one thread each.

    A ``PairSource``; its batches come on the CPU. The processes start with the first batch and end with ``close``.
    """

    def __init__(self, source: SyntheticPairs, device: torch.device, count: int) -> None:
        self.source = source
        # Spawned: neither CUDA nor PyTorch's threads survive a fork.
        context: Any = torch.multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(count, context, _start, (source, device))

    def __len__(self) -> int:
        """Number of images."""
        return len(self.source)

    def batch(self, index: int, size: int) -> PairBatch:
        """Batch number ``index`` of ``size`` pairs; raises OutOfMemoryError if a process was killed."""
        try:
            futures = [self._pool.submit(_draw, number) for number in range(index * size, (index + 1) * size)]
            return concatenate([future.result() for future in futures])
        except BrokenProcessPool as error:
            raise OutOfMemoryError(
                "a process that draws images was killed, most likely for its memory; use fewer with --workers"
            ) from error

    def names(self, index: int, size: int) -> list[tuple[str, str]]:
        """Names of the maps that each pair is drawn from."""
        return self.source.names(index, size)

    def close(self) -> None:
        """End the processes."""
        self._pool.shutdown(cancel_futures=True)


def _start(source: SyntheticPairs, device: torch.device) -> None:
    global _source
    start_worker()
    torch.set_num_threads(1)
    _source = source.on(device)


def _draw(number: int) -> PairBatch:
    assert _source is not None
    return _source.batch(number, 1).to(torch.device("cpu"))
