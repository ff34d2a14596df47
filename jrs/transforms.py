"""Affine maps of the world; displacement fields are in `jrs.fields`, chains of both in `jrs.runtime.chain`."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from jrs.geometry import FloatArray, apply_affine


@dataclass(frozen=True, eq=False)
class Affine:
    """``x -> A x``, RAS mm to RAS mm; ``matrix`` is A, 4x4, read-only.

    >>> a = Affine.of_parts(np.diag([2.0, 1.0, 1.0]), (10.0, 0.0, 0.0))
    >>> a.points([[1.0, 2.0, 3.0]]).tolist(), (a.inverse() @ a).matrix.trace().item(), a.determinant
    ([[12.0, 2.0, 3.0]], 4.0, 2.0)
    """

    matrix: FloatArray

    def __post_init__(self) -> None:
        matrix = np.array(self.matrix, dtype=np.float64)
        if matrix.shape != (4, 4) or not np.array_equal(matrix[3], (0.0, 0.0, 0.0, 1.0)):
            raise ValueError("an affine is a 4x4 matrix whose last row is 0 0 0 1")
        matrix.setflags(write=False)
        object.__setattr__(self, "matrix", matrix)

    @staticmethod
    def of_parts(linear: npt.ArrayLike, translation_mm: npt.ArrayLike) -> Affine:
        """From the 3x3 part and the translation."""
        matrix = np.eye(4)
        matrix[:3, :3] = linear
        matrix[:3, 3] = translation_mm
        return Affine(matrix)

    def points(self, points_ras: npt.ArrayLike) -> FloatArray:
        """A x for points (..., 3)."""
        return apply_affine(self.matrix, points_ras)

    def inverse(self) -> Affine:
        """``A^-1``; numpy's LinAlgError if there is none."""
        inverse: FloatArray = np.asarray(np.linalg.inv(self.matrix), dtype=np.float64)
        inverse[3] = (0.0, 0.0, 0.0, 1.0)
        return Affine(inverse)

    def __matmul__(self, other: Affine) -> Affine:
        """``self @ other``: ``other`` first, then ``self``."""
        return Affine(self.matrix @ other.matrix)

    @property
    def determinant(self) -> float:
        """The Jacobian determinant, the same everywhere."""
        return float(np.linalg.det(self.matrix[:3, :3]))
