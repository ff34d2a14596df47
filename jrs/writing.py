"""Writes NIfTI files that every other program reads the same way, whole or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import nibabel as nib
import numpy as np
import numpy.typing as npt

from jrs import __version__
from jrs.files import whole_file
from jrs.geometry import Geometry

_INTENTS = {"image": 0, "label": 1002, "vector": 1007, "fsl-warp": 2006}


def save_nifti(
    path: Path,
    data: npt.NDArray[Any],
    geometry: Geometry,
    intent: Literal["image", "label", "vector", "fsl-warp"] = "image",
    description: str = "",
    fourth: float | None = None,
) -> None:
    """Write ``data`` (X,Y,Z[,...]) with identical qform and sform, slope 1, millimetres.

    ``description`` follows the program's name in the header's ``descrip``, 79 bytes in all. A sheared grid has no
    qform; then the sform alone holds. ``fourth`` is the step along a fourth axis, in the unit of the file that it
    comes from: seconds as a rule.
    """
    image = nib.Nifti1Image(data, geometry.affine)
    header = image.header
    header.set_data_dtype(data.dtype)
    header.set_xyzt_units("mm", "sec" if fourth is not None else "unknown")
    if fourth is not None:
        header["pixdim"][4] = fourth
    header["intent_code"] = _INTENTS[intent]
    header["descrip"] = f"jrs {__version__} {description}".strip().encode("ascii", "replace")[:79]
    header["scl_slope"], header["scl_inter"] = 1.0, 0.0
    image.set_sform(geometry.affine, code=1)
    columns = geometry.affine[:3, :3] / np.linalg.norm(geometry.affine[:3, :3], axis=0)
    if np.allclose(columns.T @ columns, np.eye(3), atol=1e-4):
        image.set_qform(geometry.affine, code=1)
    else:
        image.set_qform(None, code=0)
    with whole_file(path) as temporary:
        nib.save(image, temporary)


def rounded(data: npt.NDArray[np.float32], bits: int) -> npt.NDArray[np.float32]:
    """Values rounded to multiples of 2^-bits: what lies below means nothing and does not compress."""
    step = np.float32(2.0**-bits)
    result: npt.NDArray[np.float32] = np.rint(data / step) * step
    return result
