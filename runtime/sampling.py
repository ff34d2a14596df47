"""Trilinear resampling of whole volumes, by compiled kernels, or by the project's own grid-sample operator.

Coordinates are voxel indices of the image that is sampled, float32, shape (3, x, y, z). A point further than
half a voxel outside the image takes the value ``outside``, as in ITK; ``outside=None`` repeats the border.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from typing import Any

import numpy as np
import numpy.typing as npt

from jrs.geometry import FloatArray, Geometry, Shape
from jrs.parallel import available_cpus
from jrs.runtime import native
from jrs.runtime.libraries import import_onnxruntime

Array = npt.NDArray[np.float32]

_SLAB_VOXELS = 2_000_000
"""Voxels of the target worked on at once: bounds the memory for coordinates to some 24 MB."""
_LABELS_AT_ONCE = 500_000
_SAME_WEIGHT = 1e-6
_WORTH_A_THREAD = 20_000
"""Points from which on more than one thread pays."""
_WORTH_INTERLEAVING = 0.2
"""Points a voxel of the image from which on it pays to lay its channels beside one another."""


@lru_cache(maxsize=1)
def _session() -> Any:
    onnxruntime = import_onnxruntime()

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    # The kernel would split work by channel alone; pieces of the target on threads of our own scale further.
    options.intra_op_num_threads = 1
    graph = resources.files("jrs").joinpath("data/graphs/sampler.onnx").read_bytes()
    return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


@lru_cache(maxsize=2)
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="jrs-sample")


if hasattr(os, "register_at_fork"):
    # Threads do not live on in a forked process, which would wait for them for ever.
    os.register_at_fork(after_in_child=_pool.cache_clear)


def in_threads(work: Callable[[int, int], None], count: int, threads: int | None, points: int) -> None:
    """``work(start, stop)`` for pieces of ``range(count)``, each on a thread if there are enough ``points`` in all."""
    workers = threads or min(8, available_cpus())
    pieces = min(workers, count) if points > _WORTH_A_THREAD else 1
    if pieces <= 1:
        work(0, count)
        return
    bounds = [round(i * count / pieces) for i in range(pieces + 1)]
    list(_pool(workers).map(work, bounds[:-1], bounds[1:]))


class Sampled:
    """An image (C,X,Y,Z), or its channels, made ready to be sampled more than once or at many points."""

    def __init__(self, data: Sequence[npt.NDArray[Any]] | npt.NDArray[Any], threads: int | None = None) -> None:
        self.threads = threads
        planar = [np.asarray(channel, dtype=np.float32) for channel in data]
        self.channels, self.shape = len(planar), planar[0].shape
        self._native = native.available()
        self._data: Array | None = None if self._native else np.stack(planar)
        # (volume, lanes, channels): four channels beside one another, or one alone.
        self._groups: list[tuple[Array, int, int]] = []
        for first in range(0, self.channels if self._native else 0, native.LANES):
            chosen = planar[first : first + native.LANES]
            if len(chosen) == 1:
                self._groups.append((np.ascontiguousarray(chosen[0]), 1, 1))
            else:
                self._groups.append((self._interleaved(chosen), native.LANES, len(chosen)))

    @classmethod
    def laid_out(cls, volume: Array, channels: int, threads: int | None = None) -> Sampled:
        """Of a volume (X,Y,Z,4) that has ``channels`` beside one another already; for the compiled kernels alone."""
        made = cls.__new__(cls)
        made.threads, made.channels, made.shape = threads, channels, volume.shape[:3]
        made._native, made._data = True, None
        made._groups = [(volume, native.LANES, channels)]
        return made

    def _interleaved(self, chosen: Sequence[Array]) -> Array:
        volume = np.empty((*self.shape, native.LANES), dtype=np.float32)
        volume[..., len(chosen) :] = 0.0

        def work(start: int, stop: int) -> None:
            for lane, channel in enumerate(chosen):
                volume[start:stop, ..., lane] = channel[start:stop]

        in_threads(work, volume.shape[0], self.threads, volume.size)
        return volume

    @property
    def field(self) -> Array:
        """Three channels as the compiled kernels take a displacement field."""
        return self._groups[0][0]

    def at(self, coords: Array, outside: float | None = 0.0) -> Array:
        """Values at ``coords`` (3, ...), float32 (C, ...)."""
        flat = np.ascontiguousarray(coords, dtype=np.float32).reshape(3, -1)
        out = np.empty((self.channels, flat.shape[1]), dtype=np.float32)

        def work(start: int, stop: int) -> None:
            part = flat[:, start:stop]
            for index, (volume, lanes, channels) in enumerate(self._groups):
                first = index * native.LANES
                native.sample(volume, lanes, part, outside, out[first : first + channels, start:stop])
            if self._data is not None:
                out[:, start:stop] = _by_operator(self._data, part, outside)

        in_threads(work, flat.shape[1], self.threads, flat.shape[1])
        return out.reshape(self.channels, *coords.shape[1:])

    def warped(self, u: Array, out: Array) -> None:
        """Values at x + ``u`` (3,X,Y,Z), voxels, the border repeated, into ``out`` (C,X,Y,Z); by the kernels alone."""

        def work(start: int, stop: int) -> None:
            for index, (volume, lanes, channels) in enumerate(self._groups):
                first = index * native.LANES
                native.warp((start, stop), volume, lanes, u, out[first : first + channels])

        in_threads(work, out.shape[1], self.threads, u[0].size)

    def pull(
        self,
        shape: Shape,
        base: FloatArray,
        warp: Warp | None = None,
        outside: float | None = 0.0,
        parts: Shape = (1, 1, 1),
    ) -> Array:
        """Values where the voxels (i,j,k) of a target of ``shape`` lie: ``base @ (i,j,k,1)``, and what ``warp`` adds.

        With ``parts`` above 1 each is the mean of so many regular samples inside it along each axis, and (i,j,k)
        counts those. Gives (C, shape) float32.
        """
        out = np.empty((self.channels, *shape), dtype=np.float32)
        points = out[0].size * int(np.prod(parts))
        if not self._native:
            for start, stop in slabs((shape[0], shape[1], shape[2] * int(np.prod(parts)))):
                out[:, start:stop] = self._pulled(shape, base, warp, outside, parts, start, stop)
            return out

        def work(start: int, stop: int) -> None:
            through = None if warp is None else (warp.field.field, warp.where, warp.linear)
            for index, (volume, lanes, channels) in enumerate(self._groups):
                part = out[index * native.LANES : index * native.LANES + channels]
                native.pull((start, stop), base, through, (volume, lanes), outside, parts, part)

        in_threads(work, shape[0], self.threads, points)
        return out

    def _pulled(
        self,
        shape: Shape,
        base: FloatArray,
        warp: Warp | None,
        outside: float | None,
        parts: Shape,
        start: int,
        stop: int,
    ) -> Array:
        """Some planes of ``pull`` without the compiled kernels."""
        a, b, c = parts
        fine = (shape[0] * a, shape[1] * b, shape[2] * c)
        values = self.at(_positions(fine, base, warp, start * a, stop * a), outside)
        means: Array = values.reshape(-1, stop - start, a, shape[1], b, shape[2], c).mean(axis=(2, 4, 6))
        return means


@dataclass(frozen=True)
class Warp:
    """Adds ``linear @ u(where @ (i,j,k,1))`` to the coordinates of a voxel (i,j,k), u being zero outside ``field``.

    ``where`` (4x4) leads to voxels of the field, ``linear`` (3x3) from its vectors to the coordinates.
    """

    field: Sampled
    where: FloatArray
    linear: FloatArray


def positions(shape: Shape, base: FloatArray, warp: Warp | None = None, threads: int | None = None) -> Array:
    """Where `Sampled.pull` samples: ``base @ (i,j,k,1)`` and what ``warp`` adds, (3, shape) float32."""
    if not native.available():
        return _positions(shape, base, warp, 0, shape[0])
    out = np.empty((3, *shape), dtype=np.float32)

    def work(start: int, stop: int) -> None:
        through = None if warp is None else (warp.field.field, warp.where, warp.linear)
        native.pull((start, stop), base, through, None, None, (1, 1, 1), out)

    in_threads(work, shape[0], threads, out[0].size)
    return out


def _positions(shape: Shape, base: FloatArray, warp: Warp | None, start: int, stop: int) -> Array:
    coords = affine_coords(shape, base, start, stop)
    if warp is not None:
        u = warp.field.at(affine_coords(shape, warp.where, start, stop))
        coords += (warp.linear.astype(np.float32) @ u.reshape(3, -1)).reshape(coords.shape)
    return coords


def sample(data: npt.ArrayLike, coords: Array, outside: float | None = 0.0, threads: int | None = None) -> Array:
    """Sample ``data`` (C,X,Y,Z) at ``coords`` (3, ...) voxels, giving float32 (C, ...)."""
    volume = np.asarray(data, dtype=np.float32)
    if native.available() and coords[0].size < _WORTH_INTERLEAVING * volume[0].size:
        return np.concatenate([Sampled(channel[None], threads).at(coords, outside) for channel in volume])
    return Sampled(volume, threads).at(coords, outside)


def _by_operator(volume: Array, coords: Array, outside: float | None) -> Array:
    """``Sampled.at`` for points (3,n) by the custom operator in ONNX Runtime, (C,n)."""
    part = np.ascontiguousarray(coords)
    values = _session().run(None, {"volume": volume[None], "coords": part[None, :, :, None, None]})[0]
    sampled: Array = values[0, :, :, 0, 0]
    if outside is not None:
        inside = _inside(part, volume.shape[1:])
        if not inside.all():
            sampled[:, ~inside] = outside
    return sampled


def _inside(coords: Array, shape: tuple[int, ...]) -> npt.NDArray[np.bool_]:
    """Which points lie within half a voxel of the image."""
    inside = np.ones(coords.shape[1:], dtype=bool)
    for axis, n in enumerate(shape):
        inside &= (coords[axis] >= -0.5) & (coords[axis] <= n - 0.5)
    return inside


def sample_nearest(data: npt.NDArray[Any], coords: Array, outside: int = 0) -> npt.NDArray[Any]:
    """The value of the nearest voxel of ``data`` (X,Y,Z) at ``coords`` (3,x,y,z), of the same type."""
    inside = _inside(coords, data.shape)
    index = [np.clip(np.rint(coords[axis]), 0, n - 1).astype(np.intp) for axis, n in enumerate(data.shape)]
    values: npt.NDArray[Any] = np.where(inside, data[tuple(index)], data.dtype.type(outside))
    return values


def sample_labels(data: npt.NDArray[Any], coords: Array, outside: int = 0) -> npt.NDArray[Any]:
    """The label of ``data`` (X,Y,Z) with the largest trilinear weight at ``coords`` (3,x,y,z), of the same type.

    The same as interpolating every label by itself and taking the largest, but only the eight voxels around a point
    are looked at, however many labels there are. Of labels that weigh the same the smallest is taken, so that the
    result does not depend on the order of the axes.
    """
    flat = coords.reshape(3, -1)
    out = np.full(flat.shape[1], outside, dtype=data.dtype)
    chosen = np.flatnonzero(_inside(coords, data.shape).ravel())
    for start in range(0, chosen.size, _LABELS_AT_ONCE):
        part = chosen[start : start + _LABELS_AT_ONCE]
        out[part] = _heaviest(data, flat[:, part])
    return out.reshape(coords.shape[1:])


def _heaviest(data: npt.NDArray[Any], coords: Array) -> npt.NDArray[Any]:
    """``sample_labels`` at points (3,n) inside the image."""
    ends, far = [], []
    for axis, n in enumerate(data.shape):
        position = np.clip(coords[axis], 0, n - 1)
        low = np.minimum(position.astype(np.intp), max(n - 2, 0))
        ends.append((low, np.minimum(low + 1, n - 1)))
        far.append((1.0 - (position - low), position - low))
    corners = list(itertools.product((0, 1), repeat=3))
    labels = np.stack([data[ends[0][a], ends[1][b], ends[2][c]] for a, b, c in corners])
    mixed = np.flatnonzero((labels != labels[0]).any(axis=0))
    result: npt.NDArray[Any] = labels[0].copy()
    if mixed.size:
        labels = labels[:, mixed]
        weights = np.stack([far[0][a][mixed] * far[1][b][mixed] * far[2][c][mixed] for a, b, c in corners])
        scores = np.stack([np.where(labels == label, weights, 0.0).sum(axis=0) for label in labels])
        best = scores >= scores.max(axis=0) - _SAME_WEIGHT
        largest = np.iinfo(data.dtype).max if data.dtype.kind in "iu" else np.inf
        result[mixed] = np.where(best, labels, labels.dtype.type(largest)).min(axis=0)
    return result


def affine_coords(shape: Shape, matrix: FloatArray, start: int = 0, stop: int | None = None) -> Array:
    """``matrix @ (i, j, k, 1)`` for every voxel of a grid of ``shape``, its first axis from ``start`` to ``stop``."""
    i, j, k = (np.arange(n, dtype=np.float64) for n in shape)
    i = i[start:stop]
    coords = np.empty((3, i.size, j.size, k.size), dtype=np.float32)
    for row in range(3):
        plane = (matrix[row, 0] * i)[:, None] + (matrix[row, 1] * j + matrix[row, 3])[None, :]
        np.add(plane[:, :, None], (matrix[row, 2] * k)[None, None, :], out=coords[row], casting="same_kind")
    return coords


def slabs(shape: Shape) -> list[tuple[int, int]]:
    """Cut a grid's first axis into pieces of bounded size: (start, stop) pairs."""
    rows = max(1, _SLAB_VOXELS // max(1, shape[1] * shape[2]))
    return [(start, min(start + rows, shape[0])) for start in range(0, shape[0], rows)]


def resample_affine(
    data: npt.NDArray[Any],
    source: Geometry,
    target: Geometry,
    moving_from_fixed: FloatArray | None = None,
    outside: float = 0.0,
    threads: int | None = None,
) -> Array:
    """Bring ``data`` (C,X,Y,Z) on grid ``source`` onto ``target``: out(x) = data(A x), (C,x,y,z) float32.

    ``moving_from_fixed`` is A, RAS mm of the target to RAS mm of the source (default: identity). Where the
    target's voxels are larger than the source's, each is the mean of a regular grid of samples inside it, so
    that nothing aliases; the result does not depend on how the source is oriented.
    """
    matrix = np.eye(4) if moving_from_fixed is None else np.asarray(moving_from_fixed, dtype=np.float64)
    total = source.inverse @ matrix @ target.affine
    steps = np.abs(np.linalg.norm(total[:3, :3], axis=0))
    factors = tuple(int(max(1, min(8, np.floor(s + 0.25)))) for s in steps)
    fine = target.refined(factors)  # type: ignore[arg-type]
    return Sampled(data, threads).pull(target.shape, source.inverse @ matrix @ fine.affine, None, outside, factors)  # type: ignore[arg-type]
