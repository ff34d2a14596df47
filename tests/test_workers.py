"""Pairs drawn by processes of their own: the same pairs, in order, and what happens when a process is killed."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import closing

import pytest
import torch
from small_training import same, source

from jrs.errors import OutOfMemoryError
from jrs.train.workers import WorkerPairs

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def pairs() -> Iterator[WorkerPairs]:
    """Two processes on the CPU."""
    with closing(WorkerPairs(source(), torch.device("cpu"), 2)) as pairs:
        yield pairs


def test_workers_draw_the_pairs_of_their_source(pairs: WorkerPairs) -> None:
    own = source()
    assert len(pairs) == len(own)
    for index in (1, 0):
        assert same(pairs.batch(index, 2), own.batch(index, 2))
        assert pairs.names(index, 2) == own.names(index, 2)


def test_a_killed_worker_is_said_to_be_out_of_memory(pairs: WorkerPairs) -> None:
    pairs.batch(0, 1)
    for pid in pairs._pool._processes:
        os.kill(pid, signal.SIGKILL)
    with pytest.raises(OutOfMemoryError, match="--workers"):
        pairs.batch(1, 2)


def test_a_source_on_another_device_leaves_the_first_as_it_is() -> None:
    first = source()
    meta = first.on(torch.device("meta"))
    assert (first.device.type, first.codes.device.type) == ("cpu", "cpu")
    assert (meta.device.type, meta.codes.device.type, meta.seed) == ("meta", "meta", first.seed)
