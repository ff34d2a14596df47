"""ITK's transforms and displacement fields: the one file where LPS exists.

ITK points at (-x, -y, z) where RAS+ has (x, y, z); a displacement and an affine flip the same way. Fields are
written as NIfTI (X,Y,Z,1,3) float32, intent 1007 (vector), LPS mm: the only form that SimpleITK, ANTs and
nitransforms all read right.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
import numpy.typing as npt

from jrs.errors import BadDataError, MissingInputError, first_line
from jrs.fields import DisplacementField
from jrs.files import write_text
from jrs.geometry import FloatArray, Geometry
from jrs.writing import save_nifti

_FLIP = np.diag([-1.0, -1.0, 1.0, 1.0])
_HEAD = "#Insight Transform File"


def save_field(path: Path, field: DisplacementField) -> None:
    """Write a displacement field that any ITK program applies: x -> x + d(x).

    Vectors are rounded to 2^-11 mm: a quarter of a micrometre of error, a quarter less to store.
    """
    vectors = np.moveaxis(field.vectors_mm, 0, -1)[:, :, :, None, :]
    save_nifti(path, vectors, field.geometry, "vector", bits=11, signs=(-1.0, -1.0, 1.0))


def to_lps_array(vectors_mm: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """(3,X,Y,Z) RAS to the file's (X,Y,Z,1,3) LPS."""
    lps = vectors_mm * np.array([-1, -1, 1], dtype=np.float32).reshape(3, 1, 1, 1)
    return np.moveaxis(lps, 0, -1)[:, :, :, None, :]


def from_lps_array(data: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """ITK's (X,Y,Z,3) LPS to (3,X,Y,Z) RAS, contiguous."""
    signs = np.array([-1, -1, 1], dtype=np.float32).reshape(3, 1, 1, 1)
    return np.ascontiguousarray(np.moveaxis(data, -1, 0) * signs)


def flipped_points(points: npt.ArrayLike) -> FloatArray:
    """RAS points (..., 3) to LPS or back."""
    result: FloatArray = np.asarray(points, dtype=np.float64) * np.array([-1.0, -1.0, 1.0])
    return result


def flipped_matrix(matrix: npt.ArrayLike) -> FloatArray:
    """A 4x4 matrix that maps LPS to LPS as the one that maps RAS to RAS, or back."""
    result: FloatArray = _FLIP @ np.asarray(matrix, dtype=np.float64) @ _FLIP
    return result


def grid_of_itk(
    size: Sequence[int], origin: Sequence[float], spacing: Sequence[float], direction: Sequence[float]
) -> Geometry:
    """An ITK image's grid."""
    affine = np.eye(4)
    affine[:3, :3] = np.array(direction, dtype=np.float64).reshape(3, 3) * np.array(spacing, dtype=np.float64)
    affine[:3, 3] = origin
    return Geometry((int(size[0]), int(size[1]), int(size[2])), _FLIP @ affine)


def grid_for_itk(grid: Geometry) -> tuple[list[float], list[float], list[float]]:
    """Origin, spacing and direction (row by row) of a grid, as ITK has them."""
    lps = _FLIP @ grid.affine
    spacing = np.array(grid.spacing)
    return lps[:3, 3].tolist(), spacing.tolist(), (lps[:3, :3] / spacing).ravel().tolist()


def load_field(path: Path) -> DisplacementField:
    """Read what ``save_field`` wrote, or another program's field of the same form."""
    if not path.is_file():
        raise MissingInputError(f"{path}: no such displacement field")
    try:
        image = nib.load(path)
        data = np.asarray(image.dataobj, dtype=np.float32)  # type: ignore[attr-defined]
        code = int(image.header["intent_code"])  # type: ignore[index]
    except (OSError, ValueError, EOFError, nib.filebasedimages.ImageFileError, KeyError) as error:
        reason = first_line(error)
        raise BadDataError(f"{path}: cannot be read as a displacement field ({reason}); write it again") from error
    if data.ndim != 5 or data.shape[3:] != (1, 3) or code != 1007:
        raise BadDataError(
            f"{path}: has shape {data.shape} and intent {code}, a displacement field is (X,Y,Z,1,3) with intent 1007; "
            "name the transform, not an image"
        )
    if not np.isfinite(data).all():
        raise BadDataError(f"{path}: has vectors that are not finite; export the field again")
    vectors = from_lps_array(data[:, :, :, 0, :])
    shape = (int(data.shape[0]), int(data.shape[1]), int(data.shape[2]))
    return DisplacementField(vectors, Geometry(shape, np.asarray(image.affine)))  # type: ignore[attr-defined]


def load_affine(path: Path) -> FloatArray:
    """An ITK affine text file (``.txt``, ``.tfm``): A, 4x4, RAS mm of a fixed point to RAS mm of the moving point."""
    if not path.is_file():
        raise MissingInputError(f"{path}: no such transform; give an ITK affine (.txt, .tfm)")
    try:
        transforms = text_transforms(path)
        if len(transforms) != 1:
            raise ValueError(f"it holds {len(transforms)} transforms")
        kind, parameters, fixed = transforms[0]
        if not is_affine_type(kind):
            raise ValueError(f"its type is {kind}")
        if parameters.size != 12 or fixed.size != 3:
            raise ValueError(f"it has {parameters.size} parameters, an affine has 12")
    except (ValueError, OSError) as error:
        raise BadDataError(f"{path}: is not an ITK affine transform ({error}); give a .txt or .tfm file") from error
    matrix = np.eye(4)
    matrix[:3, :3] = parameters[:9].reshape(3, 3)
    matrix[:3, 3] = fixed + parameters[9:] - matrix[:3, :3] @ fixed
    if abs(np.linalg.det(matrix[:3, :3])) < 1e-6:
        raise BadDataError(f"{path}: is singular; give an invertible affine")
    return flipped_matrix(matrix)


def is_affine_type(kind: str) -> bool:
    """Whether a text file's type is a plain 3-D affine, ITK's own or ANTs'."""
    return kind.endswith("_3_3") and ("AffineTransform" in kind or "MatrixOffsetTransformBase" in kind)


def is_text_transform(path: Path) -> bool:
    """Whether a file begins as ITK's text files do."""
    with path.open("rb") as stream:
        return stream.read(64).decode("latin-1").lstrip("\ufeffï»¿").startswith(_HEAD)


def text_transforms(path: Path) -> list[tuple[str, FloatArray, FloatArray]]:
    """Type, parameters and fixed parameters of each transform of an ITK text file; ValueError for anything odd.

    ITK itself takes a transform whose numbers are missing for the identity, so they are counted here.
    """
    transforms: list[dict[str, str]] = []
    for line in path.read_text(encoding="utf-8-sig").splitlines():
        if line.startswith("#") or ":" not in line:
            continue
        key, value = (part.strip() for part in line.split(":", 1))
        if key == "Transform":
            transforms.append({})
        if not transforms or key in transforms[-1]:
            raise ValueError(f"{key} does not belong to a transform" if not transforms else f"{key} is given twice")
        transforms[-1][key] = value
    if not transforms:
        raise ValueError("it names no transform")
    return [
        (entries["Transform"], _numbers(entries, "Parameters", None), _numbers(entries, "FixedParameters", "0 0 0"))
        for entries in transforms
    ]


def _numbers(entries: dict[str, str], key: str, default: str | None) -> FloatArray:
    text = entries.get(key, default)
    if text is None and not entries["Transform"].startswith("CompositeTransform"):
        raise ValueError(f"{key} are missing")
    values = np.array([float(v) for v in (text or "").split()])
    if not np.isfinite(values).all():
        raise ValueError("it has values that are not finite")
    return values


def save_affine(path: Path, matrix: FloatArray) -> None:
    """Write A as an ITK affine text file."""
    lps = flipped_matrix(matrix)
    numbers = " ".join(f"{v:.17g}" for v in (*lps[:3, :3].ravel(), *lps[:3, 3]))
    write_text(
        path,
        f"{_HEAD} V1.0\n#Transform 0\nTransform: AffineTransform_double_3_3\n"
        f"Parameters: {numbers}\nFixedParameters: 0 0 0\n",
    )
