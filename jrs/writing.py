"""Writes NIfTI files that every other program reads the same way, whole or not at all."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import nibabel as nib
import numpy as np
import numpy.typing as npt

from jrs import __version__
from jrs.files import whole_file
from jrs.geometry import Geometry
from jrs.gzipped import packer

_INTENTS = {"image": 0, "label": 1002, "vector": 1007, "fsl-warp": 2006}
_SLAB = 16  # planes at a time: one cache line of float32 along the last axis, few bytes in all


def save_nifti(
    path: Path,
    data: npt.NDArray[Any],
    geometry: Geometry,
    intent: Literal["image", "label", "vector", "fsl-warp"] = "image",
    description: str = "",
    fourth: float | None = None,
    *,
    bits: int | None = None,
    signs: Sequence[float] = (),
) -> None:
    """Write ``data`` (X,Y,Z[,...]) with identical qform and sform, slope 1, millimetres.

    ``description`` follows the program's name in the header's ``descrip``, 79 bytes in all. A sheared grid has no
    qform; then the sform alone holds. ``fourth`` is the step along a fourth axis, in the unit of the file that it
    comes from: seconds as a rule. With ``bits``, float32 values are stored as multiples of 2^-bits: what lies below
    means nothing and does not compress; ``signs`` then are 1 or -1 for each index of the last of more than three axes.
    """
    header = _header(data, geometry, _INTENTS[intent], description, fourth)
    with whole_file(path) as temporary, temporary.open("wb") as file:
        gzip = packer() if path.name.lower().endswith(".gz") else None
        pack: Callable[[Any], bytes] = bytes if gzip is None else gzip.compress
        file.write(pack(header))
        for block in _blocks(data, bits, signs):
            file.write(pack(block))
        if gzip is not None:
            file.write(gzip.flush())


def _header(data: npt.NDArray[Any], geometry: Geometry, intent: int, description: str, fourth: float | None) -> bytes:
    """All that lies before the voxels."""
    image = nib.Nifti1Image(data, geometry.affine)
    header = image.header
    header.set_data_dtype(data.dtype.newbyteorder("="))
    header.set_xyzt_units("mm", "sec" if fourth is not None else "unknown")
    if fourth is not None:
        header["pixdim"][4] = fourth
    header["intent_code"] = intent
    header["descrip"] = f"jrs {__version__} {description}".strip().encode("ascii", "replace")[:79]
    header["scl_slope"], header["scl_inter"] = 1.0, 0.0
    image.set_sform(geometry.affine, code=1)
    columns = geometry.affine[:3, :3] / np.linalg.norm(geometry.affine[:3, :3], axis=0)
    if np.allclose(columns.T @ columns, np.eye(3), atol=1e-4):
        image.set_qform(geometry.affine, code=1)
    else:
        image.set_qform(None, code=0)
    content = io.BytesIO()
    header.write_to(content)
    return content.getvalue()


def _blocks(data: npt.NDArray[Any], bits: int | None, signs: Sequence[float]) -> Iterator[memoryview]:
    """The voxels in the file's order, the first axis the fastest, a few planes at a time: no second image in memory."""
    dtype = data.dtype.newbyteorder("=")
    volumes = data.reshape(*data.shape[:3], -1, order="F") if data.ndim > 3 else data[..., None]
    for number in range(volumes.shape[3]):
        for start in range(0, data.shape[2], _SLAB):
            part = volumes[:, :, start : start + _SLAB, number].T
            block = np.empty(part.shape, dtype)
            if bits is None:
                block[...] = part
            else:
                np.multiply(part, np.float32((signs[number] if signs else 1.0) * 2.0**bits), out=block)
                np.rint(block, out=block)
                block *= np.float32(2.0**-bits)
            yield block.data.cast("B")
