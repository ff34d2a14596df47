"""Headers of the images users bring: parsed by nibabel, judged here before anything large is read.

Formats are told by content, not by name: NIfTI-1 and NIfTI-2, single file or ``.hdr``/``.img`` pair, either
byte order, and FreeSurfer's MGH; each plain or gzipped.
"""

from __future__ import annotations

import math
import re
import stat
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
from nibabel.freesurfer.mghformat import MGHHeader
from nibabel.freesurfer.mghformat import data_type_codes as mgh_types
from nibabel.nifti1 import Nifti1PairHeader, data_type_codes
from nibabel.nifti2 import Nifti2PairHeader
from nibabel.spatialimages import HeaderDataError

from jrs.errors import BadDataError, MissingInputError, OutOfMemoryError
from jrs.geometry import FloatArray, Geometry, Shape
from jrs.gzipped import DAMAGED, open_gzip

MAX_AXIS = 1024
"""Most voxels along one axis."""
MAX_VOXELS = 512 * 1024**2
"""Most voxels in one file, all channels together."""
MIN_SPACING_MM, MAX_SPACING_MM = 0.05, 50.0
"""Voxel sizes outside these are not a brain MRI in the unit that the header names."""

_MAX_OFFSET = 64 * 1024**2  # header extensions lie before the voxels; real ones are far smaller
_MAX_DISTANCE_MM = 1e6
_MAX_CONDITION = 100.0
_SHEAR = 1e-3
_DISAGREEMENT_MM = 1.0
# Deflate cannot shrink by more than 1032; a smaller file than this cannot hold what its header promises.
_MAX_DEFLATE_RATIO = 1100
_UNITS = {1: ("metre", 1000.0), 3: ("micron", 0.001)}  # 2 is mm; 0, unknown, is mm in every other reader too

_FORMATS = "NIfTI (.nii, .nii.gz, .hdr/.img) or FreeSurfer (.mgz, .mgh)"
AGAIN = "copy, download or export it again"
_NO_CODE = "has no orientation code, left and right are unknown"
_MGH_OFFSET = 284
_NIFTI: dict[int, tuple[Any, int, bytes, bytes]] = {  # header length: class, where its magic is, single, pair
    348: (Nifti1PairHeader, 344, b"n+1\0", b"ni1\0"),
    540: (Nifti2PairHeader, 4, b"n+2\0", b"ni2\0"),
}


def shown(path: Path | str) -> str:
    """A path as a message shows it: on one line, whatever characters it holds."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(path))


@dataclass(frozen=True)
class ImageHeader:
    """What is needed to find the voxels and to place them; it has passed every check a header can fail."""

    geometry: Geometry
    channels: int
    dtype: np.dtype[Any]
    scale: tuple[float, float] | None  # slope, intercept
    data_path: Path
    offset: int
    notes: tuple[str, ...]


# Errors ---------------------------------------------------------------------------------------------------


def bad(path: Path, message: str) -> BadDataError:
    """The refusal of a file whose content cannot be trusted."""
    return BadDataError(f"{shown(path)}: {message}")


def missing(path: Path, message: str) -> MissingInputError:
    """The refusal of a file that is not there or cannot be opened."""
    return MissingInputError(f"{shown(path)}: {message}")


@contextmanager
def one_line(path: Path) -> Iterator[None]:
    """Turn whatever a damaged file makes a library raise into one line about that file."""
    try:
        yield
    except PermissionError as error:
        raise missing(path, "cannot be read (permission denied); change its permissions") from error
    except FileNotFoundError as error:
        raise missing(path, "is no longer there; check the path") from error
    except MemoryError as error:
        message = f"{shown(path)}: not enough memory to read it; close other programs"
        raise OutOfMemoryError(message) from error
    except EOFError as error:
        raise bad(path, f"is cut off, its gzip stream ends early; {AGAIN}") from error
    except DAMAGED as error:
        raise bad(path, f"is damaged, its gzip stream is wrong ({_reason(error)}); {AGAIN}") from error
    except (OSError, ValueError, TypeError, LookupError, ArithmeticError, HeaderDataError) as error:
        raise bad(path, f"cannot be read ({_reason(error)}); {AGAIN}") from error


def _reason(error: Exception) -> str:
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split()) or type(error).__name__


# Files ----------------------------------------------------------------------------------------------------


def _size_of(path: Path) -> int:
    """The size of a regular file that holds something."""
    try:
        status = path.stat()
    except PermissionError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a NUL character in the name
        raise missing(path, "no such file; check the path") from error
    if stat.S_ISDIR(status.st_mode):
        raise missing(path, "is a folder where a file is needed; name one image in it")
    if not stat.S_ISREG(status.st_mode):
        raise missing(path, "is a pipe or device, not a file; save the image to a file")
    if status.st_size == 0:
        raise bad(path, f"is empty (0 bytes); {AGAIN}")
    return status.st_size


def _is_gzip(path: Path) -> bool:
    with path.open("rb") as stream:
        return stream.read(2) == b"\x1f\x8b"


@contextmanager
def opened(path: Path) -> Iterator[IO[bytes]]:
    """The file's bytes, unpacked if it is gzip by content: names lie in both directions."""
    with open_gzip(path) if _is_gzip(path) else path.open("rb") as stream:
        yield stream


def _other_half(path: Path, ending: str) -> Path:
    """The ``.hdr`` or ``.img`` file that goes with ``path``, plain or gzipped."""
    stem = re.sub(r"\.(hdr|img|nii)(\.gz)?$", "", path.name, flags=re.IGNORECASE)
    for name in (stem + ending, stem + ending + ".gz"):
        if path.with_name(name).exists():
            return path.with_name(name)
    raise missing(path, f"its other half {stem}{ending} is missing; put both into one folder")


# Headers --------------------------------------------------------------------------------------------------


def read_header(path: Path) -> ImageHeader:
    """Parse and judge the header; whatever it already shows to be wrong is refused here."""
    _size_of(path)
    head = _other_half(path, ".hdr") if path.name.lower().endswith((".img", ".img.gz")) else path
    _size_of(head)
    with opened(head) as stream:
        block = stream.read(max(_NIFTI))
    header = _mgh(path, block) if block[:4] == b"\0\0\0\1" else _nifti(path, head, block)
    # Before memory is set aside for the voxels: can the file hold them at all?
    size = _size_of(header.data_path)
    voxels = math.prod(header.geometry.shape) * header.channels
    needed = header.offset + voxels * header.dtype.itemsize
    if size * (_MAX_DEFLATE_RATIO if _is_gzip(header.data_path) else 1) < needed:
        message = f"is cut off, its {size} bytes cannot hold the {needed} that its header promises; {AGAIN}"
        raise bad(path, message)
    return header


def _mgh(path: Path, block: bytes) -> ImageHeader:
    if len(block) < _MGH_OFFSET:
        raise bad(path, f"is cut off within its header; {AGAIN}")
    # nibabel replaces an orientation that is not valid by a default one: ask before it does.
    if not int.from_bytes(block[28:30], "big"):
        raise bad(path, f"{_NO_CODE} (goodRASFlag is 0); set it with mri_convert --in_orientation")
    header: Any = MGHHeader(block, check=False)
    code = int(header["type"])
    if code not in mgh_types.value_set("code"):
        raise bad(path, f"has the unknown MGH data type {code}; convert it with mri_convert -odt float")
    dtype: np.dtype[Any] = np.dtype(header.get_data_dtype())
    dims = [int(n) for n in header["dims"]]
    # MGH always stores four sizes: a last 1 says nothing that the user should know.
    shape, channels, notes = _sizes(path, dims[:3] if dims[3] == 1 else dims)
    affine = np.asarray(header.get_affine(), dtype=np.float64)
    notes += _judge_affine(path, affine, "")
    return ImageHeader(Geometry(shape, affine), channels, dtype, None, path, _MGH_OFFSET, tuple(notes))


def _nifti(path: Path, head: Path, block: bytes) -> ImageHeader:
    found = [(n, order) for n in _NIFTI for order in "<>" if block[:4] == struct.pack(order + "i", n)]
    if not found:
        raise bad(path, f"is not an image that jrs reads ({_FORMATS}); convert it, DICOM with dcm2niix")
    length, order = found[0]
    kind, at, single, pair = _NIFTI[length]
    magic = block[at : at + 4]
    if len(block) < length:
        raise bad(path, f"is cut off within its header; {AGAIN}")
    if magic not in (single, pair):
        raise bad(path, "is Analyze 7.5 or damaged, without orientation; convert its source to NIfTI")
    header: Any = kind(block[:length], order, check=False)
    dtype = _data_type(path, header)
    shape, channels, notes = _sizes(path, _dims(path, header))
    scale = _scaling(path, header)
    # Single files: four bytes behind the header say whether extensions follow.
    offset = _voxel_offset(path, header, length + 4 if magic == single else 0)
    affine, more = _nifti_affine(path, header, shape)
    data = head
    if magic == pair:
        data = path if path != head else _other_half(head, ".img")
    return ImageHeader(Geometry(shape, affine), channels, dtype, scale, data, offset, (*notes, *more))


def _dims(path: Path, header: Any) -> list[int]:
    # Not nibabel's get_data_shape: it applies FreeSurfer's tricks for surfaces, and sizes below 1 pass.
    count = int(header["dim"][0])
    if not 1 <= count <= 7:
        raise bad(path, f"has {count} dimensions in its header; {AGAIN}")
    return [int(n) for n in header["dim"][1 : count + 1]]


def _sizes(path: Path, dims: list[int]) -> tuple[Shape, int, list[str]]:
    """The grid's shape, the number of volumes, and notes."""
    text = "x".join(str(n) for n in dims)
    if min(dims) < 1:
        raise bad(path, f"has a size of {text} voxels in its header; {AGAIN}")
    notes: list[str] = []
    if len(dims) > 3 and dims[-1] == 1:
        notes.append(f"stored as {len(dims)}-D ({text}), its last axes of length 1 were dropped")
        while len(dims) > 3 and dims[-1] == 1:
            dims = dims[:-1]
    if len(dims) < 3 or 1 in dims[:3]:
        raise bad(path, f"is 2-D ({text}), a 3-D image is needed; export all slices as one volume")
    if len(dims) > 4:
        raise bad(path, f"is {len(dims)}-D ({text}), a 3-D image or 4-D channels are needed; split it")
    if max(dims[:3]) > MAX_AXIS or math.prod(dims) > MAX_VOXELS:
        limit = f"{MAX_AXIS} along an axis or {MAX_VOXELS} in all"
        raise bad(path, f"has {text} voxels, more than {limit}; resample it to about 1 mm")
    return (dims[0], dims[1], dims[2]), math.prod(dims[3:]), notes


def _data_type(path: Path, header: Any) -> np.dtype[Any]:
    code = int(header["datatype"])
    remedy = "save it with one float32 or int16 value a voxel"
    if code not in data_type_codes.value_set("code"):
        raise bad(path, f"has the unknown data type code {code}; {remedy}")
    dtype: np.dtype[Any] = np.dtype(cast(Any, data_type_codes.dtype[code]))
    # nibabel gives void where this machine has no such type: 128-bit floats on x86, single bits everywhere.
    if dtype.kind not in "iuf":
        raise bad(path, f"holds {data_type_codes.label[code]} voxels, plain numbers are needed; {remedy}")
    return dtype.newbyteorder(str(header.endianness))  # type: ignore[arg-type]


def _scaling(path: Path, header: Any) -> tuple[float, float] | None:
    """Slope and intercept; None where the standard says unscaled (slope 0, and NaN as nibabel writes it)."""
    slope, intercept = float(header["scl_slope"]), float(header["scl_inter"])
    if slope == 0 or math.isnan(slope):
        return None
    if not (math.isfinite(slope) and math.isfinite(intercept)):
        values = f"scl_slope {slope:g}, scl_inter {intercept:g}"
        raise bad(path, f"has a scaling that is not finite ({values}); set slope 1 and intercept 0")
    return None if (slope, intercept) == (1.0, 0.0) else (slope, intercept)


def _voxel_offset(path: Path, header: Any, least: int) -> int:
    offset = float(header["vox_offset"])
    if offset == 0:
        return least
    if not least <= offset <= _MAX_OFFSET:  # false for NaN as well
        raise bad(path, f"says that its voxels start at byte {offset:g} (vox_offset); {AGAIN}")
    return int(offset)


# Placement ------------------------------------------------------------------------------------------------


def _nifti_affine(path: Path, header: Any, shape: Shape) -> tuple[FloatArray, list[str]]:
    """Voxel indices to RAS mm: the sform where its code is set, else the qform, as nibabel and ITK choose."""
    unit, to_mm = _UNITS.get(int(header["xyzt_units"]) & 7, ("", 1.0))
    notes = [f"the header's unit is {unit}, converted to mm"] if unit else []
    has_qform = int(header["qform_code"]) > 0
    qform = _qform(header, to_mm) if has_qform else None
    if int(header["sform_code"]) > 0:
        affine = _in_mm(header.get_sform(), to_mm)
        if has_qform and qform is None:
            notes.append("the qform is damaged, the sform is used")
        elif qform is not None and np.isfinite(affine).all():
            apart = Geometry(shape, affine).corners() - Geometry(shape, qform).corners()
            gap = float(np.linalg.norm(apart, axis=1).max())
            if gap > _DISAGREEMENT_MM:
                notes.append(f"qform and sform disagree by up to {gap:.1f} mm, the sform is used")
    elif qform is not None:
        affine = qform
    elif has_qform:
        raise bad(path, "has a damaged qform and no sform; set one with nibabel's set_sform")
    else:
        remedy = "set one with fslorient -setsformcode 1 or nibabel's set_sform"
        raise bad(path, f"{_NO_CODE} (qform_code and sform_code are 0); {remedy}")
    return affine, notes + _judge_affine(path, affine, unit)


def _in_mm(affine: Any, to_mm: float) -> FloatArray:
    result = np.array(affine, dtype=np.float64)
    result[:3] *= to_mm
    return result


def _qform(header: Any, to_mm: float) -> FloatArray | None:
    """The qform, or None if its numbers make none; the sign of a voxel size means nothing and is dropped."""
    header["pixdim"][0] = -1.0 if header["pixdim"][0] < 0 else 1.0
    header["pixdim"][1:4] = np.abs(header["pixdim"][1:4])
    try:
        affine = _in_mm(header.get_qform(), to_mm)
    except (ValueError, HeaderDataError):
        return None
    return affine if np.isfinite(affine).all() else None


def _judge_affine(path: Path, affine: FloatArray, unit: str) -> list[str]:
    """Refuse an affine that places no brain; note one that is sheared."""
    if not np.isfinite(affine).all():
        raise bad(path, "has an affine that is not finite; set its sform with nibabel's set_sform")
    with np.errstate(all="ignore"):
        spacing = np.linalg.norm(affine[:3, :3], axis=0)
        columns = affine[:3, :3] / spacing
        usable = bool(np.isfinite(columns).all()) and bool(np.linalg.cond(columns) < _MAX_CONDITION)
    if not usable:
        raise bad(path, "has a singular affine; set its sform, for example with fslorient -copyqform2sform")
    if spacing.min() < MIN_SPACING_MM or spacing.max() > MAX_SPACING_MM:
        size = " x ".join(f"{s:.4g}" for s in spacing) + (f" mm (unit: {unit})" if unit else " mm")
        limits = f"{MIN_SPACING_MM:g} to {MAX_SPACING_MM:g} mm"
        raise bad(path, f"has voxels of {size}, outside {limits}; correct its voxel size or unit")
    if np.abs(affine[:3, 3]).max() > _MAX_DISTANCE_MM:
        raise bad(path, f"lies more than {_MAX_DISTANCE_MM:g} mm from the origin; correct its affine")
    if np.abs(columns.T @ columns - np.eye(3)).max() > _SHEAR:
        return ["the affine is sheared, its axes are not at right angles"]
    return []
