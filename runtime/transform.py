"""The total transform x -> A(x + u(x)), fixed to moving, RAS mm: applied, inverted, made dense."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from jrs.fields import DisplacementField
from jrs.geometry import FloatArray, Geometry
from jrs.runtime.inversion import VoxelField
from jrs.runtime.sampling import Sampled, Warp, positions

Array = npt.NDArray[np.float32]

FADE_MM = 24.0
"""Outside the network's grid the displacement falls to zero within this distance."""


@dataclass(frozen=True, eq=False)
class Transform:
    """An affine A (4x4) behind a displacement u on the network's grid; u None is the affine alone."""

    affine: FloatArray
    displacement: DisplacementField | None
    threads: int | None = None

    @cached_property
    def _field(self) -> VoxelField | None:
        """u, continued beyond the network's grid and faded to zero."""
        if self.displacement is None:
            return None
        return VoxelField(self.displacement, threads=self.threads, fade_mm=FADE_MM)

    def _warp(self, fixed: Geometry, linear: FloatArray) -> Warp | None:
        """u at the voxels of ``fixed``, multiplied by ``linear``."""
        if self._field is None:
            return None
        grid = self._field.grid
        return Warp(self._field.sampled, grid.inverse @ fixed.affine, linear[:3, :3] @ grid.affine[:3, :3])

    def pull(self, image: Sampled, source: Geometry, fixed: Geometry, outside: float = 0.0) -> Array:
        """out(x) = image(A(x + u(x))) for an image on grid ``source``: (C, shape of ``fixed``) float32."""
        matrix = source.inverse @ self.affine
        return image.pull(fixed.shape, matrix @ fixed.affine, self._warp(fixed, matrix), outside)

    def positions(self, fixed: Geometry) -> Array:
        """A(x + u(x)) for the voxels of a grid, (3, its shape) RAS mm."""
        return positions(fixed.shape, self.affine @ fixed.affine, self._warp(fixed, self.affine), self.threads)

    def dense(self, fixed: Geometry) -> DisplacementField:
        """d(x) = A(x + u(x)) - x on the fixed image's grid."""
        base = (self.affine - np.eye(4)) @ fixed.affine
        return DisplacementField(positions(fixed.shape, base, self._warp(fixed, self.affine), self.threads), fixed)

    def inverse_dense(self, moving: Geometry) -> DisplacementField:
        """x(y) - y on the moving image's grid, where A(x + u(x)) = y."""
        back = np.linalg.inv(self.affine) @ moving.affine
        base = back - moving.affine
        if self._field is None:
            return DisplacementField(positions(moving.shape, base, None, self.threads), moving)
        return DisplacementField(self._field.solve_on(moving.shape, self._field.grid.inverse @ back, base), moving)

    def points(self, points_ras: npt.ArrayLike) -> FloatArray:
        """Map fixed points (n,3) to moving points (n,3), RAS mm."""
        points = np.asarray(points_ras, dtype=np.float64)
        if self._field is not None:
            grid = self._field.grid
            u = self._field.sampled.at(grid.to_voxels(points).T.astype(np.float32))
            points = points + u.T @ grid.affine[:3, :3].T
        result: FloatArray = points @ self.affine[:3, :3].T + self.affine[:3, 3]
        return result


def displacement_on(field: DisplacementField, grid: Geometry, threads: int | None) -> Array:
    """A field, faded beyond its own grid, at the voxels of another: (3,X,Y,Z) mm."""
    return Transform(np.eye(4), field, threads).dense(grid).vectors_mm


def to_voxel_coords(points: Array, grid: Geometry) -> Array:
    """RAS mm (3,...) to voxel indices of ``grid`` (3,...), float32."""
    flat = points.reshape(3, -1)
    linear, offset = grid.inverse[:3, :3], grid.inverse[:3, 3]
    moved = linear.astype(np.float32) @ flat + offset.astype(np.float32)[:, None]
    result: Array = moved.reshape(points.shape)
    return result
