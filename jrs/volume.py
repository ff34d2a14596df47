"""A scalar image: voxels and where they lie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from jrs.geometry import Geometry

MOST_BRAIN_ML = 2300.0
"""A brain with the fluid around it, loosely stripped, takes less; a head takes 3000 and more."""
_LEAST_AIR, _MOST_AIR = 0.1, 0.3
"""The share of an image that is exactly zero, or of another value, if that is what lies around the brain."""
_LEAST_BELOW = 0.1
"""The share of the rest that lies below its surroundings in an image normalised around zero."""
_NEARLY, _WIDER = 2e-4, 100.0
"""Of an image's range: as far from zero as a spline's ripples in the air, and so many times as far near the brain."""
_MOST_SIDES = 4
"""Of a voxel's six neighbours, that are brain where it is."""
_LEAST_RIPPLES = 0.02
"""The share of an image that such ripples make up where there are any."""
_RIPPLE = 0.05
"""Of the bright end: as far below zero as resampling leads an image that is not."""
_APART, _FAR_APART, _ABOVE = 0.5, 2.0, 0.2
"""Of the brain's own range, from its dark end to its bright one: so far above the air it lies apart from it, so far
where the air is 0, and so far it is put in its place. Images as they are made have 0.03 to 0.31."""


@dataclass(frozen=True, eq=False)
class Volume:
    """A 3-D image, read-only.

    ``data`` is (X, Y, Z) in the file's own array order, ``geometry`` says where its voxels lie (RAS mm),
    ``notes`` are what the reader had to decide and the user should know.
    """

    data: npt.NDArray[Any]
    geometry: Geometry
    path: Path | None = None
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.data.shape != self.geometry.shape:
            raise ValueError(f"data {self.data.shape} does not fit a grid of {self.geometry.shape}")
        view = self.data.view()
        view.setflags(write=False)
        object.__setattr__(self, "data", view)

    @cached_property
    def raised(self) -> npt.NDArray[Any]:
        """The intensities with the brain above zero; see ``raised``."""
        return raised(self.data)

    def foreground(self) -> npt.NDArray[np.bool_]:
        """Voxels of the head or brain; see ``foreground_mask``."""
        return foreground_mask(self.raised)

    @property
    def thinned(self) -> npt.NDArray[Any]:
        """Every ``thinning``-th voxel of ``raised`` along each axis, no fewer than 64 of them where there are."""
        return _thinned(self.raised)

    @property
    def thinning(self) -> tuple[int, int, int]:
        """What ``thinned`` leaves, along each axis."""
        return _thinning(self.data.shape)

    @cached_property
    def foreground_ml(self) -> float:
        """Volume of the foreground, estimated from ``thinned``."""
        share = np.count_nonzero(foreground_mask(self.thinned)) / self.thinned.size
        return share * self.data.size * self.geometry.voxel_volume_ml

    @property
    def unstripped(self) -> str | None:
        """What to tell the user of an image that holds more than a brain: a skull, or a background that is not 0."""
        if self.foreground_ml <= MOST_BRAIN_ML:
            return None
        return (
            f"{self.foreground_ml / 1000:.1f} litres are above zero, more than a brain: strip the skull first (HD-BET "
            "or SynthStrip do), with 0 outside the brain"
        )

    @cached_property
    def canonical(self) -> Volume:
        """The same image, ``raised``, with its axes nearest to RAS (``Geometry.canonical``), without the air around it.

        What is sampled with zero outside does not change when planes of zeros are left out.
        """
        grid, order = self.geometry.canonical()
        data = order.apply(self.raised)
        box = occupied([data])
        return Volume(np.ascontiguousarray(data[box]), grid.part(box), self.path, self.notes)


def occupied(images: Sequence[npt.NDArray[Any]]) -> tuple[slice, slice, slice]:
    """The smallest box that holds every voxel other than zero of any of ``images`` (X,Y,Z), and one voxel around it."""
    shape = images[0].shape
    along: list[npt.NDArray[np.bool_]] = [np.zeros(n, dtype=bool) for n in shape]
    for data in images:
        behind = np.any(data, axis=0)
        along[0] |= np.any(data, axis=(1, 2))
        along[1] |= behind.any(axis=1)
        along[2] |= behind.any(axis=0)
    box = []
    for used, n in zip(along, shape, strict=True):
        where = np.flatnonzero(used)
        box.append(slice(max(0, int(where[0]) - 1), min(n, int(where[-1]) + 2)) if where.size else slice(0, n))
    return box[0], box[1], box[2]


def _thinning(shape: tuple[int, ...]) -> tuple[int, int, int]:
    a, b, c = (max(1, n // 64) for n in shape)
    return a, b, c


def _thinned(data: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Some voxels of an image (X,Y,Z): enough for shares."""
    thin: npt.NDArray[Any] = data[tuple(slice(None, None, step) for step in _thinning(data.shape))]
    return thin


def raised(data: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """An image (X,Y,Z) with air of 0 and the brain above it, as most are; of others their intensities, moved there.

    Those are normalised around zero within the brain, so that half of it lies below its surroundings (z-scores of the
    foreground, which many programs for training write), or have another number than 0 around the brain. One that lies
    far below all of it, as -1000 does, would leave a brain without contrast, and voxels halfway at its edge.
    Resampling's ripples, some of them negative, stay as they are.
    """
    sample = _thinned(data)
    air, width = _air(sample)
    if air is None:
        return data
    beside = sample[np.abs(sample - air) > width] - air
    bright = beside[beside > 0]
    if bright.size == 0:
        return data
    high = float(np.percentile(bright, 98.0))
    moved_air = abs(air) > _NEARLY * high
    low, lift = _dark_end(beside, high, _APART if moved_air else _FAR_APART), 0.0
    if low is not None:
        lift = _ABOVE * (high - low) - low
    elif np.count_nonzero(beside < -_RIPPLE * high) > _LEAST_BELOW * beside.size:
        lowest = float(data.min()) - air
        lift = _RIPPLE * (high - lowest) - lowest
    elif not moved_air:
        return data
    around = data == air if width == 0.0 else ~_filled(np.abs(data - np.float32(air)) > np.float32(width))
    moved = data + np.float32(lift - air)
    if low is not None:  # what lies between the air and the brain is its edge
        moved = np.maximum(moved, np.float32(_RIPPLE * (high - low)))
    lifted: npt.NDArray[Any] = np.where(around, np.float32(0.0), moved)
    return lifted


def _dark_end(beside: npt.NDArray[Any], high: float, least: float) -> float | None:
    """The dark end of a brain that lies apart from the air, ``least`` times its range above it; None if it does not.

    ``beside`` are the intensities but the air's, less that, ``high`` their bright end. Where an image was resampled
    with its air far below, its edge is everything in between: the dark end is then told by the middle of the brain.
    """
    lowest, below, middle = (float(value) for value in np.percentile(beside, (2.0, 30.0, 50.0)))
    low = middle - 4.0 * (middle - below)  # where a normal distribution has its first two percent, and some way on
    low = max(lowest, low - 0.6 * (high - low))
    # One of a single intensity has no range to go by.
    return low if high - low > _NEARLY * high and low > least * (high - low) else None


def _air(sample: npt.NDArray[Any]) -> tuple[float | None, float]:
    """The intensity around the brain, None if none is found, and how far from it a voxel still is air."""
    zeros = np.count_nonzero(sample == 0)
    if zeros < _LEAST_AIR * sample.size:
        values, counts = np.unique(sample, return_counts=True)
        most = counts.argmax()
        # Noise, whole numbers too, has no value that a third of an image shares.
        if counts[most] >= _MOST_AIR * sample.size:
            return float(values[most]), 0.0
    width = _NEARLY * float(np.ptp(sample))
    near = np.count_nonzero(np.abs(sample) <= width)
    if near - zeros >= _LEAST_RIPPLES * sample.size and near >= _MOST_AIR * sample.size:
        return 0.0, width * _WIDER
    return (0.0, 0.0) if zeros >= _LEAST_AIR * sample.size else (None, 0.0)


def _filled(mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """With its pores: what lies near the air's number among voxels of a brain is brain."""
    beside = np.zeros(mask.shape, dtype=np.uint8)
    padded = np.pad(mask, 1)
    for axis in range(3):
        for step in (0, 2):
            window = [slice(1, -1)] * 3
            window[axis] = slice(step, step + mask.shape[axis])
            beside += padded[tuple(window)]
    return mask | (beside >= _MOST_SIDES)


def foreground_mask(data: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """Voxels that belong to the head or brain: above a hundredth of the bright end of the histogram.

    Skull-stripped images are zero outside the brain up to resampling ripple, some of it negative.
    """
    positive = data[data > 0]
    if positive.size == 0:
        return np.zeros(data.shape, dtype=bool)
    # A sample is enough for a percentile and several times faster than all voxels.
    bright = np.percentile(positive[:: max(1, positive.size // 200_000)], 98.0)
    mask: npt.NDArray[np.bool_] = data > 0.01 * bright
    return mask
