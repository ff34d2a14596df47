"""The total transform x -> A(x + u(x)), fixed to moving, RAS mm: applied, inverted, made dense."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from jrs.fields import DisplacementField
from jrs.geometry import FloatArray, Geometry
from jrs.runtime.sampling import affine_coords, sample, sample_along_axes, slabs

Array = npt.NDArray[np.float32]

FADE_MM = 24.0
"""Outside the network's grid the displacement falls to zero within this distance."""
_INVERSION_SPACING_MM = 2.0
"""The inverse is found on voxels no smaller than this, and then settled at the points that are asked for."""
_INVERSION_STEPS = 12
_FULL_STEPS = 8
_SETTLING_STEPS = 12
_INVERSION_TOLERANCE_MM = 0.005


@dataclass(frozen=True, eq=False)
class Transform:
    """An affine A (4x4) behind a displacement u on the network's grid; u None is the affine alone."""

    affine: FloatArray
    displacement: DisplacementField | None
    threads: int | None = None

    @cached_property
    def field(self) -> DisplacementField | None:
        """u, continued beyond the network's grid and faded to zero."""
        return None if self.displacement is None else self.displacement.faded(FADE_MM)

    def displaced(self, field: DisplacementField | None, grid: Geometry, start: int, stop: int) -> Array:
        """``field`` (3,x,y,z) mm at the voxels of ``grid``, planes ``start`` to ``stop``; zero without one."""
        if field is None:
            return np.zeros((3, stop - start, *grid.shape[1:]), dtype=np.float32)
        matrix = field.geometry.inverse @ grid.affine
        aligned = sample_along_axes(field.vectors_mm, matrix, grid.shape, start, stop)
        if aligned is not None:
            return aligned
        return sample(field.vectors_mm, affine_coords(grid.shape, matrix, start, stop), 0.0, self.threads)

    def forward(self, fixed: Geometry) -> Iterator[tuple[slice, Array, Array]]:
        """Slab by slab of the fixed grid: which planes, A(x + u(x)) (3,...) RAS mm, and x + u(x) likewise."""
        linear, offset = self.affine[:3, :3], self.affine[:3, 3]
        for start, stop in slabs(fixed.shape):
            before = affine_coords(fixed.shape, fixed.affine, start, stop)
            before += self.displaced(self.field, fixed, start, stop)
            yield slice(start, stop), _apply(linear, offset, before), before

    def dense(self, fixed: Geometry) -> DisplacementField:
        """d(x) = A(x + u(x)) - x on the fixed image's grid."""
        out = np.empty((3, *fixed.shape), dtype=np.float32)
        for planes, moved, _ in self.forward(fixed):
            out[:, planes] = moved - affine_coords(fixed.shape, fixed.affine, planes.start, planes.stop)
        return DisplacementField(out, fixed)

    @cached_property
    def inverse_displacement(self) -> DisplacementField | None:
        """v with (z + v(z)) + u(z + v(z)) = z, on the faded grid or a coarser one, by iterating v <- -u(z + v)."""
        if self.field is None:
            return None
        grid = _coarsened(self.field.geometry, _INVERSION_SPACING_MM)
        field = self.field
        if grid != field.geometry:
            field = DisplacementField(self.displaced(field, grid, 0, grid.shape[0]), grid)
        to_voxels = grid.inverse[:3, :3].astype(np.float32)
        index = affine_coords(grid.shape, np.eye(4))
        v = np.zeros_like(field.vectors_mm)
        for step in range(_INVERSION_STEPS):
            coords = index + np.einsum("iw,wxyz->ixyz", to_voxels, v)
            change = -sample(field.vectors_mm, coords, 0.0, self.threads) - v
            # Full steps converge where |grad u| < 1; where they still swing after a few, half steps settle.
            v += change if step < _FULL_STEPS else 0.5 * change
            # A fold has no inverse and never converges: judge by nearly all voxels, not by the worst.
            if float((np.abs(change) > _INVERSION_TOLERANCE_MM).mean()) < 1e-4:
                break
        return DisplacementField(v, grid)

    def inverse_dense(self, moving: Geometry) -> DisplacementField:
        """x(y) - y on the moving image's grid, where A(x + u(x)) = y."""
        inverse = np.linalg.inv(self.affine)
        back = Geometry(moving.shape, inverse @ moving.affine)
        out = np.empty((3, *moving.shape), dtype=np.float32)
        for start, stop in slabs(moving.shape):
            z = affine_coords(moving.shape, back.affine, start, stop)
            v = self.displaced(self.inverse_displacement, back, start, stop)
            if self.field is not None:
                self._settle(self.field, z, v)
            x = z + v
            out[:, start:stop] = x - affine_coords(moving.shape, moving.affine, start, stop)
        return DisplacementField(out, moving)

    def _settle(self, field: DisplacementField, z: Array, v: Array) -> None:
        """Iterate v <- -u(z + v) at the points z themselves, in place, until it moves no more."""
        where = np.flatnonzero(np.abs(v).reshape(3, -1).max(axis=0) > _INVERSION_TOLERANCE_MM)
        start, found = z.reshape(3, -1), v.reshape(3, -1)
        for step in range(_SETTLING_STEPS):
            if where.size == 0:
                break
            now = found[:, where]
            coords = to_voxel_coords((start[:, where] + now)[:, :, None, None], field.geometry)
            change = -sample(field.vectors_mm, coords, 0.0, self.threads)[:, :, 0, 0] - now
            # As above: where full steps still swing, half steps settle.
            found[:, where] = now + (change if step < _SETTLING_STEPS // 2 else 0.5 * change)
            where = where[np.abs(change).max(axis=0) > _INVERSION_TOLERANCE_MM]

    def points(self, points_ras: npt.ArrayLike) -> FloatArray:
        """Map fixed points (n,3) to moving points (n,3), RAS mm."""
        points = np.asarray(points_ras, dtype=np.float64)
        if self.field is not None:
            coords = self.field.geometry.to_voxels(points).T.astype(np.float32)[:, :, None, None]
            points = points + sample(self.field.vectors_mm, coords, 0.0, self.threads)[:, :, 0, 0].T
        result: FloatArray = points @ self.affine[:3, :3].T + self.affine[:3, 3]
        return result


def _coarsened(grid: Geometry, spacing_mm: float) -> Geometry:
    """The grid with the same first voxel, covering the same, of voxels no smaller than ``spacing_mm``."""
    scales = [max(1.0, spacing_mm / spacing) for spacing in grid.spacing]
    if max(scales) == 1.0:
        return grid
    a, b, c = (int(np.ceil((n - 1) / scale)) + 1 for n, scale in zip(grid.shape, scales, strict=True))
    affine = grid.affine.copy()
    affine[:3, :3] *= np.array(scales)
    return Geometry((a, b, c), affine)


def to_voxel_coords(points: Array, grid: Geometry) -> Array:
    """RAS mm (3,...) to voxel indices of ``grid`` (3,...), float32."""
    return _apply(grid.inverse[:3, :3], grid.inverse[:3, 3], points)


def _apply(linear: FloatArray, offset: FloatArray, points: Array) -> Array:
    flat = points.reshape(3, -1)
    moved = linear.astype(np.float32) @ flat + offset.astype(np.float32)[:, None]
    result: Array = moved.reshape(points.shape)
    return result
