"""Trilinear resampling of whole volumes, by the project's own grid-sample operator on ONNX Runtime.

Coordinates are voxel indices of the image that is sampled, float32, shape (3, x, y, z). A point further than
half a voxel outside the image takes the value ``outside``, as in ITK; ``outside=None`` repeats the border.
"""

from __future__ import annotations

import itertools
import os
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from importlib import resources
from typing import Any

import numpy as np
import numpy.typing as npt

from jrs.geometry import FloatArray, Geometry, Shape

Array = npt.NDArray[np.float32]

_SLAB_VOXELS = 2_000_000
"""Voxels of the target worked on at once: bounds the memory for coordinates to some 24 MB."""
_LABELS_AT_ONCE = 500_000
_SAME_WEIGHT = 1e-6
_WORTH_A_THREAD = 20_000
"""Points from which on more than one thread pays."""


@lru_cache(maxsize=1)
def _session() -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    # The kernel would split work by channel alone; pieces of the target on threads of our own scale further.
    options.intra_op_num_threads = 1
    graph = resources.files("jrs").joinpath("data/graphs/sampler.onnx").read_bytes()
    return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


@lru_cache(maxsize=2)
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="jrs-sample")


def sample(data: npt.ArrayLike, coords: Array, outside: float | None = 0.0, threads: int | None = None) -> Array:
    """Sample ``data`` (C,X,Y,Z) at ``coords`` (3,x,y,z) voxels, giving float32 (C,x,y,z)."""
    volume = np.ascontiguousarray(data, dtype=np.float32)[None]
    count = coords.shape[1]
    out = np.empty((volume.shape[1], *coords.shape[1:]), dtype=np.float32)
    workers = threads or min(8, os.cpu_count() or 1)
    pieces = min(workers, count) if out[0].size > _WORTH_A_THREAD else 1

    def work(start: int, stop: int) -> None:
        part = np.ascontiguousarray(coords[:, start:stop], dtype=np.float32)
        sampled = _session().run(None, {"volume": volume, "coords": part[None]})[0][0]
        if outside is not None:
            inside = _inside(part, volume.shape[2:])
            if not inside.all():
                sampled[:, ~inside] = outside
        out[:, start:stop] = sampled

    bounds = [round(i * count / pieces) for i in range(pieces + 1)]
    if pieces == 1:
        work(0, count)
    else:
        list(_pool(workers).map(work, bounds[:-1], bounds[1:]))
    return out


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


def sample_along_axes(data: Array, matrix: FloatArray, shape: Shape, start: int, stop: int) -> Array | None:
    """``sample(data, affine_coords(shape, matrix, start, stop))`` where ``matrix`` keeps the axes apart, else None.

    Trilinear interpolation is then three products with banded matrices, several times faster than a point at a
    time. ``data`` (C,X,Y,Z) falls to zero outside.
    """
    linear = matrix[:3, :3]
    used = np.abs(linear) > 1e-9 * np.abs(linear).max()
    if not ((used.sum(axis=0) == 1).all() and (used.sum(axis=1) == 1).all()):
        return None
    target_axes = used.argmax(axis=1)
    ranges = [(start, stop), (0, shape[1]), (0, shape[2])]
    out = data
    # The slab's own axis first: what follows then works on its planes alone.
    for axis in sorted(range(3), key=lambda a: target_axes[a] != 0):
        low, high = ranges[target_axes[axis]]
        position = linear[axis, target_axes[axis]] * np.arange(low, high) + matrix[axis, 3]
        n = data.shape[axis + 1]
        weights = np.maximum(0.0, 1.0 - np.abs(np.clip(position, 0, n - 1)[:, None] - np.arange(n)[None, :]))
        weights[(position < -0.5) | (position > n - 0.5)] = 0.0
        product = np.tensordot(weights.astype(np.float32), out, axes=(1, axis + 1))
        out = np.moveaxis(product, 0, axis + 1)
    return np.ascontiguousarray(out.transpose(0, *(int(a) + 1 for a in np.argsort(target_axes))))


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
    to_source = source.inverse @ matrix @ fine.affine
    out = np.empty((data.shape[0], *target.shape), dtype=np.float32)
    volume = np.ascontiguousarray(data, dtype=np.float32)
    rows = max(1, _SLAB_VOXELS // (fine.shape[1] * fine.shape[2] * factors[0]))
    for start in range(0, target.shape[0], rows):
        stop = min(start + rows, target.shape[0])
        coords = affine_coords(fine.shape, to_source, start * factors[0], stop * factors[0])
        piece = sample(volume, coords, outside, threads)
        if factors != (1, 1, 1):
            a, b, c = factors
            piece = piece.reshape(-1, stop - start, a, target.shape[1], b, target.shape[2], c).mean(axis=(2, 4, 6))
        out[:, start:stop] = piece
    return out
