"""ITK's transforms and displacement fields: the one file where LPS exists.

ITK points at (-x, -y, z) where RAS+ has (x, y, z); a displacement and an affine flip the same way. Fields are
written as NIfTI (X,Y,Z,1,3) float32, intent 1007 (vector), LPS mm: the only form that SimpleITK, ANTs and
nitransforms all read right.
"""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import numpy.typing as npt

from jrs.errors import BadDataError, MissingInputError, first_line
from jrs.fields import DisplacementField
from jrs.files import write_text
from jrs.geometry import FloatArray, Geometry
from jrs.writing import rounded, save_nifti

_FLIP = np.diag([-1.0, -1.0, 1.0, 1.0])


def save_field(path: Path, field: DisplacementField) -> None:
    """Write a displacement field that any ITK program applies: x -> x + d(x).

    Vectors are rounded to 2^-11 mm: a quarter of a micrometre of error, a quarter less to store.
    """
    save_nifti(path, rounded(to_lps_array(field.vectors_mm), 11), field.geometry, intent="vector")


def to_lps_array(vectors_mm: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """(3,X,Y,Z) RAS to the file's (X,Y,Z,1,3) LPS."""
    lps = vectors_mm * np.array([-1, -1, 1], dtype=np.float32).reshape(3, 1, 1, 1)
    return np.moveaxis(lps, 0, -1)[:, :, :, None, :]


def load_field(path: Path) -> DisplacementField:
    """Read what ``save_field`` wrote, or another program's field of the same form."""
    if not path.is_file():
        raise MissingInputError(f"{path}: no such displacement field")
    try:
        image = nib.load(path)
        data = np.asarray(image.dataobj, dtype=np.float32)  # type: ignore[attr-defined]
        code = int(image.header["intent_code"])  # type: ignore[index]
    except (OSError, ValueError, EOFError, nib.filebasedimages.ImageFileError, KeyError) as error:
        raise BadDataError(f"{path}: cannot be read as a displacement field ({first_line(error)})") from error
    if data.ndim != 5 or data.shape[3:] != (1, 3) or code != 1007:
        raise BadDataError(
            f"{path}: has shape {data.shape} and intent {code}; a displacement field is (X,Y,Z,1,3) with intent 1007"
        )
    vectors = np.moveaxis(data[:, :, :, 0, :], -1, 0) * np.array([-1, -1, 1], dtype=np.float32).reshape(3, 1, 1, 1)
    shape = (int(data.shape[0]), int(data.shape[1]), int(data.shape[2]))
    return DisplacementField(np.ascontiguousarray(vectors), Geometry(shape, np.asarray(image.affine)))  # type: ignore[attr-defined]


def load_affine(path: Path) -> FloatArray:
    """An ITK affine text file (``.txt``, ``.tfm``): A, 4x4, RAS mm of a fixed point to RAS mm of the moving point."""
    if not path.is_file():
        raise MissingInputError(f"{path}: no such transform; give an ITK affine (.txt, .tfm)")
    try:
        values = _entries(path.read_text(encoding="utf-8-sig"))
        parameters = np.array([float(v) for v in values["Parameters"].split()])
        fixed = np.array([float(v) for v in values.get("FixedParameters", "0 0 0").split()])
        if "Affine" not in values["Transform"] and "MatrixOffset" not in values["Transform"]:
            raise ValueError(f"its type is {values['Transform'] or 'not given'}")
        if parameters.size != 12 or fixed.size != 3:
            raise ValueError(f"it has {parameters.size} parameters, an affine has 12")
        if not (np.isfinite(parameters).all() and np.isfinite(fixed).all()):
            raise ValueError("it has values that are not finite")
    except (KeyError, ValueError, OSError) as error:
        raise BadDataError(f"{path}: is not an ITK affine transform ({error}); give a .txt or .tfm file") from error
    matrix = np.eye(4)
    matrix[:3, :3] = parameters[:9].reshape(3, 3)
    matrix[:3, 3] = fixed + parameters[9:] - matrix[:3, :3] @ fixed
    if abs(np.linalg.det(matrix[:3, :3])) < 1e-6:
        raise BadDataError(f"{path}: is singular; give an invertible affine")
    return _FLIP @ matrix @ _FLIP


def save_affine(path: Path, matrix: FloatArray) -> None:
    """Write A as an ITK affine text file."""
    lps = _FLIP @ np.asarray(matrix, dtype=np.float64) @ _FLIP
    numbers = " ".join(f"{v:.17g}" for v in (*lps[:3, :3].ravel(), *lps[:3, 3]))
    write_text(
        path,
        "#Insight Transform File V1.0\n#Transform 0\nTransform: AffineTransform_double_3_3\n"
        f"Parameters: {numbers}\nFixedParameters: 0 0 0\n",
    )


def _entries(text: str) -> dict[str, str]:
    """The file's fields; ValueError for a file of several transforms, whose order a single affine cannot keep."""
    pairs = [line.split(":", 1) for line in text.splitlines() if ":" in line]
    entries = {key.strip(): value.strip() for key, value in pairs}
    if len(entries) < len(pairs):
        raise ValueError("it holds several transforms; compose them into one affine first")
    return entries
