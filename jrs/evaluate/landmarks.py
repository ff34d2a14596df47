"""Landmarks: reading them, and how far a transform puts them from where they belong.

The file is that of BraTS-Reg: a CSV with the columns Landmark, X, Y, Z. Its coordinates are ITK's physical ones, LPS
mm (Y is negative on the BraTS grid, whose origin is 0, -239, 0).
"""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from jrs.errors import BadDataError, MissingInputError
from jrs.evaluate.transforms import SpatialTransform
from jrs.geometry import FloatArray, Geometry

LandmarkSpace = Literal["lps", "ras", "voxel"]
SPACES: tuple[str, ...] = get_args(LandmarkSpace)
_COLUMNS = ("landmark", "x", "y", "z")


def read_landmarks(path: Path, image: Geometry, space: LandmarkSpace = "lps") -> dict[str, FloatArray]:
    """Name of each landmark to its RAS mm, (3,).

    ``space`` says what the file's numbers are: LPS mm, RAS mm, or voxel indices of ``image`` from 0.
    Raises MissingInputError, and BadDataError for another format and for points that lie outside the image.
    """
    if not path.is_file():
        raise MissingInputError(f"{path}: no such file of landmarks; give a CSV with columns Landmark,X,Y,Z")
    try:
        rows = list(csv.reader(path.read_text(encoding="utf-8-sig").splitlines(), skipinitialspace=True))
        header = [name.strip().lower() for name in rows[0]]
        columns = [header.index(name) for name in _COLUMNS]
        names = [row[columns[0]].strip() for row in rows[1:] if row]
        values = np.array([[float(row[c]) for c in columns[1:]] for row in rows[1:] if row]).reshape(-1, 3)
    except (OSError, ValueError, IndexError, csv.Error) as error:
        what = f"cannot be read ({error or type(error).__name__})"
        raise BadDataError(f"{path}: {what}; landmarks are a CSV with columns Landmark,X,Y,Z") from error
    if not names or len(set(names)) < len(names) or not np.isfinite(values).all():
        raise BadDataError(f"{path}: needs one row a landmark, each with a name of its own and finite X, Y, Z")
    points = image.to_ras(values) if space == "voxel" else values * ((-1, -1, 1) if space == "lps" else 1)
    outside = (np.abs(image.to_voxels(points) - (np.array(image.shape) - 1) / 2) > np.array(image.shape) / 2 + 1).any(1)
    if outside.any():
        raise BadDataError(
            f"{path}: landmark {names[int(outside.argmax())]} lies outside the image if X, Y, Z are {space}; "
            f"say what they are with --landmark-space ({', '.join(SPACES)})"
        )
    return dict(zip(names, points, strict=True))


def landmark_errors(
    transform: SpatialTransform, moving: Mapping[str, FloatArray], fixed: Mapping[str, FloatArray]
) -> tuple[FloatArray, FloatArray]:
    """|T(x) - y| mm of the landmarks that both images have, and |x - y|, what it was before any registration.

    x are the fixed image's landmarks, y the moving one's: errors are measured in the moving image, as BraTS-Reg does
    for the pre-operative scan if that is the moving one.
    """
    shared = [name for name in fixed if name in moving]
    if not shared:
        return np.empty(0), np.empty(0)
    x, y = (np.stack([points[name] for name in shared]) for points in (fixed, moving))
    after: FloatArray = np.linalg.norm(transform.points(x) - y, axis=1)
    before: FloatArray = np.linalg.norm(x - y, axis=1)
    return after, before
