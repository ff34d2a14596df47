"""Transforms of any origin, applied in one way: each label map and each image is sampled once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from jrs.fields import DisplacementField
from jrs.geometry import FloatArray, Geometry
from jrs.runtime.sampling import Sampled, Warp, affine_coords, sample, sample_nearest, slabs
from jrs.runtime.transform import to_voxel_coords
from jrs.volume import Volume

Array = npt.NDArray[np.float32]


class SpatialTransform(Protocol):
    """A map from points of the fixed to points of the moving image, RAS mm; ``jrs.runtime``'s ``Transform`` is one."""

    def dense(self, fixed: Geometry) -> DisplacementField:
        """T(x) - x at every voxel of a grid."""
        ...

    def points(self, points_ras: npt.ArrayLike) -> FloatArray:
        """T(x) of points (n,3)."""
        ...


@dataclass(frozen=True, eq=False)
class FieldTransform:
    """T(x) = x + d(x) of a total displacement field on the fixed image's grid, as other programs write it.

    Beyond the grid the border's displacement holds.
    """

    field: DisplacementField
    threads: int | None = None

    def dense(self, fixed: Geometry) -> DisplacementField:
        """The field itself where the grid is its own, else sampled linearly."""
        if fixed == self.field.geometry:
            return self.field
        matrix = self.field.geometry.inverse @ fixed.affine
        vectors_mm = Sampled(self.field.vectors_mm, self.threads).pull(fixed.shape, matrix, None, None)
        return DisplacementField(vectors_mm, fixed)

    def points(self, points_ras: npt.ArrayLike) -> FloatArray:
        """T(x) of points (n,3), the field sampled linearly."""
        points = np.asarray(points_ras, dtype=np.float64)
        coords = self.field.geometry.to_voxels(points).T.astype(np.float32)[:, :, None, None]
        moved: FloatArray = points + sample(self.field.vectors_mm, coords, None, self.threads)[:, :, 0, 0].T
        return moved


def warp_labels(labels: Volume, field: DisplacementField) -> npt.NDArray[Any]:
    """A label map at x + d(x) for x on the field's grid, nearest neighbour, 0 outside."""
    grid = field.geometry
    out = np.zeros(grid.shape, dtype=labels.data.dtype)
    for start, stop in slabs(grid.shape):
        out[start:stop] = sample_nearest(labels.data, _moving_coords(field, start, stop, labels.geometry))
    return out


def warp_image(image: Volume, field: DisplacementField, threads: int | None = None) -> Array:
    """An image at x + d(x) for x on the field's grid, trilinear, 0 outside."""
    grid, to_image = field.geometry, image.geometry.inverse
    warp = Warp(Sampled(field.vectors_mm, threads), np.eye(4), to_image[:3, :3])
    moved: Array = Sampled(image.data[None], threads).pull(grid.shape, to_image @ grid.affine, warp)[0]
    return moved


def _moving_coords(field: DisplacementField, start: int, stop: int, moving: Geometry) -> Array:
    grid = field.geometry
    points = affine_coords(grid.shape, grid.affine, start, stop) + field.vectors_mm[:, start:stop]
    return to_voxel_coords(points, moving)
