"""The one gate through which every image of a user comes in: its voxels.

SimpleITK fills the lost tail of a cut-off ``.nii.gz`` with zeros and says nothing, and nibabel trusts a
header's size before it has seen the data. So headers are judged first (`jrs.headers`), and voxels are read
here, never more than the header needs. A file is accepted, accepted with a note, or refused with one line that
says what is wrong, with which file, and what to do.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from jrs.geometry import Geometry
from jrs.headers import AGAIN, ImageHeader, bad, one_line, opened, read_header
from jrs.volume import Volume

MAX_NON_FINITE = 0.01
"""Largest share of NaN or infinite voxels that is replaced rather than refused."""

# Behind the voxels: MGH tags, padding, and with gzip the checksum that only its end reveals.
_SURPLUS = 1024**2
_CHUNK = 1024**2
_SLAB = 32
_WHOLE = 1e-4


def read_volume(path: Path | str, *, labels: bool = False) -> Volume:
    """Read one 3-D image; a 4-D file with a single volume counts as one.

    The voxels keep the file's own array order: float32, C-contiguous, the header's scaling applied. With
    ``labels`` they must be whole numbers and become int32; an empty or constant label map is accepted.
    Raises MissingInputError if there is nothing to read, BadDataError if it cannot be trusted.
    """
    path = Path(path)
    with one_line(path):
        header = read_header(path)
        if header.channels != 1:
            what = f"is 4-D with {header.channels} volumes where one 3-D image is needed"
            raise bad(path, f"{what}; pass it with --channels")
        return _read_volumes(path, header, _labels if labels else _intensities)[0]


def read_channels(path: Path | str) -> list[Volume]:
    """Read the volumes along the last axis of a 4-D file, in its order; a 3-D file gives one."""
    path = Path(path)
    with one_line(path):
        return _read_volumes(path, read_header(path), _intensities)


def read_series(path: Path | str, *, labels: bool = False) -> list[Volume]:
    """Every volume of a 3-D or 4-D file as it is: one of a series may be constant, an empty mask for example.

    With ``labels`` the voxels must be whole numbers and become int32.
    """
    path = Path(path)
    with one_line(path):
        return _read_volumes(path, read_header(path), _labels if labels else _any_intensities)


def count_channels(path: Path | str) -> int:
    """How many volumes a file holds; only its header is read, and refused as `read_volume` would."""
    path = Path(path)
    with one_line(path):
        return read_header(path).channels


def read_geometry(path: Path | str) -> Geometry:
    """Where a file's voxels lie; only its header is read, and refused as `read_volume` would."""
    path = Path(path)
    with one_line(path):
        return read_header(path).geometry


_Converter = Callable[
    [Path, npt.NDArray[Any], tuple[float, float] | None, str], tuple[npt.NDArray[Any], list[str]]
]


def _read_volumes(path: Path, header: ImageHeader, convert: _Converter) -> list[Volume]:
    notes = list(header.notes)
    arrays = []
    with opened(header.data_path) as stream:
        stream.seek(header.offset)
        for index in range(header.channels):
            where = f"volume {index + 1} of {header.channels}: " if header.channels > 1 else ""
            data, more = convert(path, _next_volume(path, stream, header), header.scale, where)
            arrays.append(data)
            notes += more
        surplus = 0
        # On to the end, where gzip verifies its checksum, but no further than an honest file goes.
        while surplus <= _SURPLUS and (part := stream.read(_CHUNK)):
            surplus += len(part)
    if surplus > _SURPLUS:
        notes.append("the file holds more data than its header says, the rest was not read")
    return [Volume(data, header.geometry, path, tuple(notes)) for data in arrays]


def _next_volume(path: Path, stream: IO[bytes], header: ImageHeader) -> npt.NDArray[Any]:
    shape = header.geometry.shape
    buffer = np.empty(math.prod(shape) * header.dtype.itemsize, dtype=np.uint8)
    done = 0
    while done < buffer.size:
        part = stream.read(min(_CHUNK, buffer.size - done))
        if not part:
            raise bad(path, f"is cut off, it ends before its last voxel; {AGAIN}")
        buffer[done : done + len(part)] = np.frombuffer(part, dtype=np.uint8)
        done += len(part)
    return buffer.view(header.dtype).reshape(shape, order="F")


def _scaled(raw: npt.NDArray[Any], scale: tuple[float, float] | None, dtype: Any) -> npt.NDArray[Any]:
    with np.errstate(over="ignore", invalid="ignore"):
        if scale is None:
            return np.ascontiguousarray(raw, dtype=dtype)
        data = np.empty(raw.shape, dtype=dtype)
        # In slabs: double precision without a second image of it in memory.
        for start in range(0, raw.shape[2], _SLAB):
            slab = np.s_[:, :, start : start + _SLAB]
            data[slab] = raw[slab].astype(np.float64) * scale[0] + scale[1]
        return data


def _zero_non_finite(path: Path, data: npt.NDArray[Any], raw: npt.NDArray[Any], where: str) -> list[str]:
    """Set NaN and infinite voxels to 0, in place; refuse many of them, and any that the conversion made."""
    finite = np.isfinite(data)
    broken = data.size - int(np.count_nonzero(finite))
    if broken == 0:
        return []
    if broken > raw.size - int(np.count_nonzero(np.isfinite(raw))):
        raise bad(path, f"{where}has values too large for 32-bit floats; rescale its intensities")
    if broken > MAX_NON_FINITE * data.size:
        share = f"{broken} voxels ({100.0 * broken / data.size:.3g} %)"
        raise bad(path, f"{where}{share} are NaN or infinite; replace them or export it again")
    data[~finite] = 0
    return [f"{where}{broken} voxels were NaN or infinite and were set to 0"]


def _intensities(
    path: Path, raw: npt.NDArray[Any], scale: tuple[float, float] | None, where: str
) -> tuple[npt.NDArray[Any], list[str]]:
    data, notes = _any_intensities(path, raw, scale, where)
    low, high = float(data.min()), float(data.max())
    if low == high:
        raise bad(path, f"{where}every voxel is {low:g}, there is no image; check that it is the right file")
    return data, notes


def _any_intensities(
    path: Path, raw: npt.NDArray[Any], scale: tuple[float, float] | None, where: str
) -> tuple[npt.NDArray[Any], list[str]]:
    data = _scaled(raw, scale, np.float32)
    return data, _zero_non_finite(path, data, raw, where)


def _labels(
    path: Path, raw: npt.NDArray[Any], scale: tuple[float, float] | None, where: str
) -> tuple[npt.NDArray[Any], list[str]]:
    notes: list[str] = []
    whole = raw
    if scale is not None or raw.dtype.kind == "f":
        values = _scaled(raw, scale, np.float64)
        notes = _zero_non_finite(path, values, raw, where)
        whole = np.rint(values)
        broken = values[np.abs(values - whole) > _WHOLE]
        if broken.size:
            raise bad(path, f"{where}holds {broken[0]:g}, labels are whole numbers; give a label map")
    limits = np.iinfo(np.int32)
    if whole.min() < limits.min or whole.max() > limits.max:
        raise bad(path, f"{where}holds labels that need more than 32 bits; renumber them")
    return np.ascontiguousarray(whole, dtype=np.int32), notes
