"""What the loop takes a step with, and where it comes from."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor


@dataclass(frozen=True)
class PairBatch:
    """N pairs on the network's grid.

    Attributes:
        moving, fixed: images (N,C,X,Y,Z) float32, normalised, a missing channel all zero.
        moving_present, fixed_present: (N,C) 1 where the channel is there.
        moving_tumor, fixed_tumor: class of each voxel (N,X,Y,Z) int64, -1 where unknown; None without labels.
        moving_structures, fixed_structures: anatomical index (N,X,Y,Z) uint8, 0 for none; None without.
    """

    moving: Tensor
    fixed: Tensor
    moving_present: Tensor
    fixed_present: Tensor
    moving_tumor: Tensor | None = None
    fixed_tumor: Tensor | None = None
    moving_structures: Tensor | None = None
    fixed_structures: Tensor | None = None

    def to(self, device: torch.device) -> PairBatch:
        """The same on another device; the copy runs on beside the host where memory is pinned."""
        values: dict[str, Any] = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        moved: dict[str, Any] = {k: None if v is None else v.to(device, non_blocking=True) for k, v in values.items()}
        return PairBatch(**moved)


class PairSource(Protocol):
    """Pairs by number: the same number always gives the same pairs, so a run can be resumed anywhere.

    Batches are slices of one sequence of pairs: batch ``index`` of ``size`` is pairs ``index * size`` to
    ``(index + 1) * size``, whatever the size, so several processes can share a batch. ``batch`` is called from
    several threads.
    """

    def __len__(self) -> int:
        """Images that pairs are made of."""

    def batch(self, index: int, size: int) -> PairBatch:
        """Batch number ``index`` of ``size`` pairs."""


@runtime_checkable
class NamedPairs(Protocol):
    """A source that can say which images a pair is made of."""

    def names(self, index: int, size: int) -> list[tuple[str, str]]:
        """Names of the moving and the fixed image of each pair of ``batch(index, size)``."""


def pair_names(source: PairSource, number: int) -> tuple[str, str]:
    """Names of the moving and the fixed image of pair ``number``; empty where the source does not know."""
    return source.names(number, 1)[0] if isinstance(source, NamedPairs) else ("", "")


def concatenate(pairs: list[PairBatch]) -> PairBatch:
    """Several batches as one; all must have the same kinds of labels."""
    names = [f.name for f in dataclasses.fields(PairBatch)]
    columns: dict[str, Any] = {name: [getattr(pair, name) for pair in pairs] for name in names}
    joined: dict[str, Any] = {k: None if v[0] is None else torch.cat(v) for k, v in columns.items()}
    return PairBatch(**joined)


def pair_indices(index: int, size: int, images: int, seed: int) -> list[tuple[int, int]]:
    """Which two different images make each pair of batch ``index``.

    Every image is the moving one once in each round of ``images`` pairs, in an order drawn from ``seed``.
    """
    pairs = []
    for position in range(index * size, (index + 1) * size):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + position // images)
        order = torch.randperm(images, generator=generator).tolist()
        shift = int(torch.randint(1, max(images, 2), (1,), generator=generator))
        place = position % images
        pairs.append((order[place], order[(place + shift) % images]))
    return pairs
