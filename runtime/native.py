"""The compiled kernels of ``kernels.c`` and ``refinement.c``, called through ctypes: one thread's share, no lock held.

They are built with the package where there is a C compiler. Without them ONNX Runtime and NumPy do the same, several
times slower; ``JRS_KERNELS=off`` asks for that.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from jrs.geometry import FloatArray, Shape

Array = npt.NDArray[np.float32]

LANES = 4
"""Channels that lie beside one another in an interleaved volume."""

_POINTER, _I64, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
_ARGUMENTS = {
    "jrs_count": [*[_POINTER] * 4, _I64, _POINTER, _I64, _I64, _POINTER, _I64, _POINTER],
    "jrs_slope": [_POINTER, _I64, _POINTER, _I64, _POINTER, _I64, _I64, _POINTER, _POINTER],
    "jrs_jacobian": [_POINTER, _POINTER, _POINTER, _I64, _I64, _POINTER],
    "jrs_lay_out": [_POINTER] * 7 + [_I64, _I64, _POINTER],
    "jrs_force": [_POINTER, _I64, _I64, *[_POINTER] * 6, _FLOAT, _FLOAT, _INT, *[_POINTER] * 3],
    "jrs_smooth": [_POINTER, _I64, _I64, _POINTER, _POINTER, _FLOAT, _POINTER, _I64, *[_POINTER] * 3],
    "jrs_warp": [_POINTER, _POINTER, _I64, _I64, _POINTER, _I64, _I64, _POINTER],
    "jrs_windows": [_POINTER, _I64, _I64, _POINTER, _POINTER, _FLOAT, _FLOAT, *[_POINTER] * 5],
    "jrs_sample": [_POINTER, _POINTER, _I64, _I64, _POINTER, _I64, _I64, _INT, _FLOAT, _POINTER, _I64],
    "jrs_pull": [
        *(_POINTER, _I64, _I64, _POINTER, _POINTER, _POINTER, _POINTER, _POINTER),
        *(_POINTER, _POINTER, _I64, _I64, _INT, _FLOAT, _POINTER, _POINTER, _I64),
    ],
    "jrs_invert": [
        *(_POINTER, _I64, _I64, _POINTER, _POINTER, _POINTER, _POINTER, _POINTER),
        *(_INT, _FLOAT, _INT, _POINTER, _I64),
    ],
    "jrs_invert_points": [_POINTER, _POINTER, _POINTER, _I64, _I64, _INT, _FLOAT, _INT, _POINTER, _POINTER],
}


_VERSION = 2
"""Of the kernels that this file calls, as ``jrs_version`` says it."""


def _file() -> str | None:
    """The compiled library, of whatever version."""
    found = importlib.util.find_spec("jrs.runtime._kernels")
    return None if found is None else found.origin


@lru_cache(maxsize=1)
def _loaded() -> Any:
    file = _file()
    if file is None:
        return None
    try:
        library = ctypes.CDLL(file)
        library.jrs_version.restype = library.jrs_wide.restype = _I64
        if library.jrs_version() != _VERSION:
            return None
        for name, arguments in _ARGUMENTS.items():
            function = getattr(library, name)
            function.argtypes, function.restype = arguments, None
    except (OSError, AttributeError):
        return None
    return library


def available() -> bool:
    """Whether the kernels were compiled and are not turned off."""
    return os.environ.get("JRS_KERNELS", "on") != "off" and _loaded() is not None


def status() -> str:
    """What ``jrs doctor`` says of them."""
    if _loaded() is None and _file() is not None:
        return "compiled for another version of jrs, resampling and refinement are slower; install jrs again"
    if _loaded() is None:
        return "not compiled, resampling and refinement are slower; install a C compiler and then jrs again"
    if not available():
        return "turned off by JRS_KERNELS"
    registers = wide()
    return "compiled" if registers is None else f"compiled, {'with' if registers else 'without'} AVX2 and FMA"


def wide() -> bool | None:
    """Whether the version for AVX2 and FMA runs; None where the kernels have one version alone."""
    # (1 + 2^-12)^2 - (1 + 2^-11), which is 2^-24 unless the product is rounded first.
    numbers = np.array([1.0 + 2.0**-12, 1.0 + 2.0**-12, -1.0 - 2.0**-11], dtype=np.float32)
    found = _loaded().jrs_wide(_POINTER(_at(numbers)))
    return None if found < 0 else bool(found)


def _at(array: npt.NDArray[Any] | None) -> int | None:
    return None if array is None else array.ctypes.data


def _shape(shape: tuple[int, ...]) -> npt.NDArray[np.int64]:
    return np.array(shape, dtype=np.int64)


def _rows(matrix: FloatArray) -> FloatArray:
    """The upper three rows of a matrix as the kernels read them."""
    return np.ascontiguousarray(matrix[:3], dtype=np.float64)


def sample(volume: Array, lanes: int, coords: Array, outside: float | None, out: Array) -> None:
    """Values of ``volume`` at ``coords`` (3,n) into ``out`` (C,n); both may be slices of their last axis."""
    shape = _shape(volume.shape[:3])
    _loaded().jrs_sample(
        *(_at(volume), _at(shape), lanes, out.shape[0], _at(coords), coords.strides[0] // 4, coords.shape[1]),
        *(int(outside is None), outside or 0.0, _at(out), out.strides[0] // 4),
    )


def jacobian(planes: tuple[int, int], vectors: Array, linear: FloatArray, out: Array) -> None:
    """``jrs_jacobian`` for some planes of ``out`` (X,Y,Z); ``vectors`` (3,X,Y,Z) in C order, ``linear`` 3x3."""
    shape, rows = _shape(out.shape), _rows(linear)
    _loaded().jrs_jacobian(_at(vectors), _at(shape), _at(rows), *planes, _at(out))


def lay_out(
    planes: tuple[int, int], vectors: Array, more: Shape, linear: FloatArray, windows: Sequence[Array], out: Array
) -> None:
    """``jrs_lay_out`` for some planes of ``out`` (X,Y,Z,4); ``vectors`` (3,x,y,z) in C order."""
    shape, pads, rows = _shape(vectors.shape[1:]), _shape(more), _rows(linear)
    _loaded().jrs_lay_out(_at(vectors), _at(shape), _at(pads), _at(rows), *map(_at, windows), *planes, _at(out))


def pull(
    planes: tuple[int, int],
    base: FloatArray,
    warp: tuple[Array, FloatArray, FloatArray] | None,
    source: tuple[Array, int] | None,
    outside: float | None,
    parts: Shape,
    out: Array,
) -> None:
    """``jrs_pull`` for some planes of ``out`` (C,x,y,z).

    ``warp`` is a field (X,Y,Z,4), ``where`` and ``linear``; ``source`` a volume and its lanes, None for coordinates.
    """
    field, where, linear = warp or (None, None, None)
    volume, lanes = source or (None, 0)
    keep = (
        _shape(out.shape[1:]),
        _rows(base),
        None if field is None else _shape(field.shape[:3]),
        None if where is None else _rows(where),
        None if linear is None else _rows(linear),
        None if volume is None else _shape(volume.shape[:3]),
        _shape(parts),
    )
    shape, rows, field_shape, where_rows, linear_rows, source_shape, part_shape = keep
    _loaded().jrs_pull(
        *(_at(shape), *planes, _at(rows), _at(field), _at(field_shape), _at(where_rows), _at(linear_rows)),
        *(_at(volume), _at(source_shape), lanes, out.shape[0], int(outside is None), outside or 0.0),
        *(_at(part_shape), _at(out), out.strides[0] // 4),
    )


def invert(
    planes: tuple[int, int],
    field: Array,
    where: FloatArray,
    base: FloatArray,
    linear: FloatArray,
    border: bool,
    tolerance: float,
    evaluations: int,
    out: Array,
) -> None:
    """``jrs_invert`` for some planes of ``out`` (3,x,y,z); ``field`` is (X,Y,Z,4) in its own voxels."""
    shape, field_shape = _shape(out.shape[1:]), _shape(field.shape[:3])
    where, base, linear = _rows(where), _rows(base), _rows(linear)
    _loaded().jrs_invert(
        *(_at(shape), *planes, _at(field), _at(field_shape), _at(where), _at(base), _at(linear)),
        *(int(border), tolerance, evaluations, _at(out), out.strides[0] // 4),
    )


def invert_points(
    field: Array, points: Array, border: bool, tolerance: float, evaluations: int, v: Array, left: Array
) -> None:
    """``jrs_invert_points``: ``points`` and ``v`` (3,n) may be slices of their last axis, alike in their strides."""
    shape = _shape(field.shape[:3])
    _loaded().jrs_invert_points(
        *(_at(field), _at(shape), _at(points), points.strides[0] // 4, points.shape[1]),
        *(int(border), tolerance, evaluations, _at(v), _at(left)),
    )


def count(
    volume: Array,
    where: FloatArray,
    points: Array,
    rows: npt.NDArray[np.uint8],
    bins: int,
    moved: Array,
    out: FloatArray,
) -> None:
    """``jrs_count``: ``points`` (3,n) and ``moved`` (4,n) may be slices of their last axis, ``out`` is (bins*bins,)."""
    shape, matrix = _shape(volume.shape), _rows(where)
    _loaded().jrs_count(
        *(_at(volume), _at(shape), _at(matrix), _at(points), points.strides[0] // 4),
        *(_at(rows), rows.size, bins, _at(moved), moved.strides[0] // 4, _at(out)),
    )


def slope(moved: Array, points: Array, rows: npt.NDArray[np.uint8], table: Array, out: FloatArray) -> None:
    """``jrs_slope``: ``moved`` and ``points`` as in ``count``, ``table`` (bins,bins), ``out`` (12,)."""
    _loaded().jrs_slope(
        *(_at(moved), moved.strides[0] // 4, _at(points), points.strides[0] // 4),
        *(_at(rows), rows.size, table.shape[0], _at(table), _at(out)),
    )


# The refinement, in ``refinement.c`` ----------------------------------------------------------------------


def warp(planes: tuple[int, int], volume: Array, lanes: int, u: Array, out: Array) -> None:
    """``jrs_warp`` for some planes of ``out`` (C,X,Y,Z); ``u`` (3,X,Y,Z) in voxels."""
    shape = _shape(out.shape[1:])
    _loaded().jrs_warp(_at(volume), _at(shape), lanes, out.shape[0], _at(u), *planes, _at(out))


def windows(
    planes: tuple[int, int],
    fixed: Array,
    weights: Array,
    least: float,
    floor: float,
    scratch: Array,
    inverse: Array,
    mean: Array,
    precision: Array,
    found: FloatArray,
) -> None:
    """``jrs_windows`` for some planes; images (X,Y,Z), ``found`` (X,)."""
    shape = _shape(fixed.shape)
    _loaded().jrs_windows(
        *(_at(shape), *planes, _at(fixed), _at(weights), least, floor, _at(scratch)),
        *(_at(inverse), _at(mean), _at(precision), _at(found)),
    )


def force(
    planes: tuple[int, int],
    fixed: Array,
    moved: Array,
    weights: Array,
    inverse: Array,
    mean: Array,
    precision: Array,
    floor: float,
    smallest: float,
    first: bool,
    scratch: Array,
    out: Array,
    similarity: FloatArray,
) -> None:
    """``jrs_force`` for some planes of ``out`` (3,X,Y,Z); images (X,Y,Z), ``similarity`` (X,)."""
    shape = _shape(fixed.shape)
    _loaded().jrs_force(
        *(_at(shape), *planes, _at(fixed), _at(moved), _at(weights), _at(inverse), _at(mean), _at(precision)),
        *(floor, smallest, int(first), _at(scratch), _at(out), _at(similarity)),
    )


def smooth(
    planes: tuple[int, int],
    field: Array,
    update: Array | None,
    scale: float,
    kernel: Array,
    scratch: Array,
    out: Array,
    largest: Array,
) -> None:
    """``jrs_smooth`` for some planes of ``out`` (3,X,Y,Z); ``largest`` (X,)."""
    shape = _shape(field.shape[1:])
    _loaded().jrs_smooth(
        *(_at(shape), *planes, _at(field), _at(update), scale, _at(kernel), kernel.size // 2),
        *(_at(scratch), _at(out), _at(largest)),
    )
