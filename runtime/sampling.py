"""Trilinear resampling of whole volumes, by the project's own grid-sample operator on ONNX Runtime.

Coordinates are voxel indices of the image that is sampled, float32, shape (3, x, y, z). A point further than
half a voxel outside the image takes the value ``outside``, as in ITK; ``outside=None`` repeats the border.
"""

from __future__ import annotations

from functools import lru_cache
from importlib import resources
from typing import Any

import numpy as np
import numpy.typing as npt

from jrs.geometry import FloatArray, Geometry, Shape

Array = npt.NDArray[np.float32]

_SLAB_VOXELS = 2_000_000
"""Voxels of the target worked on at once: bounds the memory for coordinates to some 24 MB."""


@lru_cache(maxsize=4)
def _session(threads: int | None) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if threads:
        options.intra_op_num_threads = threads
    graph = resources.files("jrs").joinpath("data/graphs/sampler.onnx").read_bytes()
    return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


def sample(data: npt.ArrayLike, coords: Array, outside: float | None = 0.0, threads: int | None = None) -> Array:
    """Sample ``data`` (C,X,Y,Z) at ``coords`` (3,x,y,z) voxels, giving float32 (C,x,y,z)."""
    volume = np.ascontiguousarray(data, dtype=np.float32)
    coords = np.ascontiguousarray(coords, dtype=np.float32)
    sampled: Array = _session(threads).run(None, {"volume": volume[None], "coords": coords[None]})[0][0]
    if outside is not None:
        inside = np.ones(coords.shape[1:], dtype=bool)
        for axis, n in enumerate(volume.shape[1:]):
            inside &= (coords[axis] >= -0.5) & (coords[axis] <= n - 0.5)
        if not inside.all():
            sampled[:, ~inside] = outside
    return sampled


def sample_nearest(data: npt.NDArray[Any], coords: Array, outside: int = 0) -> npt.NDArray[Any]:
    """The value of the nearest voxel of ``data`` (X,Y,Z) at ``coords`` (3,x,y,z), of the same type."""
    inside = np.ones(coords.shape[1:], dtype=bool)
    index = []
    for axis, n in enumerate(data.shape):
        inside &= (coords[axis] >= -0.5) & (coords[axis] <= n - 0.5)
        index.append(np.clip(np.rint(coords[axis]), 0, n - 1).astype(np.intp))
    values: npt.NDArray[Any] = np.where(inside, data[tuple(index)], data.dtype.type(outside))
    return values


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
