"""Displacement fields: vectors in RAS millimetres on a grid."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

from jrs.geometry import FloatArray, Geometry, Shape
from jrs.parallel import together

Array = npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class DisplacementField:
    """``x -> x + u(x)``, read-only.

    ``vectors_mm`` is (3,X,Y,Z) float32, RAS millimetres, at the voxels of ``geometry``.
    """

    vectors_mm: Array
    geometry: Geometry

    def __post_init__(self) -> None:
        if self.vectors_mm.shape != (3, *self.geometry.shape):
            raise ValueError(f"vectors {self.vectors_mm.shape} do not fit a grid of {self.geometry.shape}")
        view = self.vectors_mm.view()
        view.setflags(write=False)
        object.__setattr__(self, "vectors_mm", view)

    @staticmethod
    def from_voxels(displacement_vox: Array, geometry: Geometry) -> DisplacementField:
        """From displacements (3,X,Y,Z) in voxels along the array's axes: the only step from network to world space."""
        vectors = geometry.affine[:3, :3].astype(np.float32) @ displacement_vox.reshape(3, -1)
        return DisplacementField(vectors.reshape(displacement_vox.shape), geometry)

    def faded(self, margin_mm: float) -> DisplacementField:
        """The field continued beyond its grid: border values that fall to zero, smoothly, within ``margin_mm``.

        Outside the returned grid the displacement is zero, so the affine alone remains there.
        """
        (a, b, c), windows = fade_windows(self.geometry, margin_mm)
        grid = self.geometry.padded((a, b, c))
        padded = np.empty((3, *grid.shape), dtype=np.float32)

        def fill(component: int) -> None:
            along, across, up = windows
            values = np.pad(self.vectors_mm[component], ((0, 0), (b, b), (c, c)), mode="edge")
            values *= across[:, None] * up[None, :]
            padded[component][a:-a] = values
            padded[component][:a] = values[:1] * along[:a, None, None]
            padded[component][-a:] = values[-1:] * along[-a:, None, None]

        together([partial(fill, component) for component in range(3)])
        return DisplacementField(padded, grid)


def fade_windows(grid: Geometry, margin_mm: float) -> tuple[Shape, list[Array]]:
    """By how many voxels to continue a field each way, and its factors along each axis: 1 on ``grid``, 0 at the end."""
    a, b, c = (max(2, int(np.ceil(margin_mm / s))) for s in grid.spacing)
    windows = []
    for n, more in zip(grid.shape, (a, b, c), strict=True):
        outside = np.maximum(0, np.abs(np.arange(n + 2 * more) - more - (n - 1) / 2.0) - (n - 1) / 2.0)
        window = 0.5 * (1.0 + np.cos(np.pi * np.minimum(1.0, outside / (more - 0.5))))
        windows.append(window.astype(np.float32))
    return (a, b, c), windows


def jacobian_determinant(field: DisplacementField, rows: int = 16) -> Array:
    """det d(x + d(x))/dx at every voxel, (X,Y,Z) float32, from central differences of the field.

    With F the grid's linear part and G the differences of d along the array's axes, the determinant is
    det(F + G) / det(F); any orientation, spacing and shear. ``rows`` planes are worked on at once by each thread.
    """
    linear: FloatArray = field.geometry.affine[:3, :3]
    count = field.geometry.shape[0]
    out = np.empty(field.geometry.shape, dtype=np.float32)

    def work(start: int) -> None:
        stop = min(start + rows, count)
        # One plane more on either side, so that the differences at the seams are central too.
        low, high = max(0, start - 1), min(count, stop + 1)
        inner = slice(start - low, stop - low)
        columns: list[Array] = []
        for axis in range(3):
            along = _differences(field.vectors_mm[:, low:high], axis + 1)[:, inner]
            columns.append(along + linear[:, axis].astype(np.float32).reshape(3, 1, 1, 1))
        a, b, c = columns
        out[start:stop] = (
            a[0] * (b[1] * c[2] - b[2] * c[1]) - a[1] * (b[0] * c[2] - b[2] * c[0]) + a[2] * (b[0] * c[1] - b[1] * c[0])
        ) / np.float32(np.linalg.det(linear))

    together([partial(work, start) for start in range(0, count, rows)])
    return out


def _differences(values: Array, axis: int) -> Array:
    if values.shape[axis] < 2:
        return np.zeros_like(values)
    result: Array = np.gradient(values, axis=axis).astype(np.float32, copy=False)
    return result
