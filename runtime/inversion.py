"""The inverse of a displacement field, solved where it is asked for.

With T(x) = x + d(x), the field's own affine part B (least squares over its grid) and the rest r(x) = T(x) - B x,
T(x) = y becomes x + B^-1 r(x) = B^-1 y: a large rotation or shift inside d does not disturb what is then solved for,
v with v + u(z + v) = 0 for u = B^-1 r. The compiled kernels take Newton's steps on the trilinear field; without them
v <- v - w (v + u(z + v)) is iterated (Chen et al. 2008, doi 10.1118/1.2816107). Each point has a step of its own,
halved where it overshoots. Beyond its grid a field is continued by B and the border value of r.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from jrs.fields import DisplacementField, fade_windows
from jrs.geometry import FloatArray, Shape
from jrs.runtime import native
from jrs.runtime.sampling import Sampled, affine_coords, in_threads, slabs

Array = npt.NDArray[np.float32]

TOLERANCE_MM = 2e-4
_STEPS = 60
_SMALLEST_STEP = 2.0**-6
_FITTED = 40_000
_EVALUATIONS = 40
"""Of the field for one point, by the compiled kernels; two or three are the rule."""


@dataclass
class Residual:
    """How far T(x) is from y over all points solved so far, mm; ``unsolved`` counts those above 0.1 mm.

    Of those whose x lies on the field's grid: beyond it, T is a continuation that no file holds.
    """

    points: int = 0
    total_mm: float = 0.0
    largest_mm: float = 0.0
    unsolved: int = 0

    @property
    def mean_mm(self) -> float:
        """The mean distance."""
        return self.total_mm / max(1, self.points)

    def add(self, distances_mm: Array) -> None:
        """Count further points."""
        self.points += distances_mm.size
        self.total_mm += float(distances_mm.sum(dtype=np.float64))
        self.largest_mm = max(self.largest_mm, float(distances_mm.max(initial=0.0)))
        self.unsolved += int((distances_mm > 0.1).sum())


@dataclass(frozen=True, eq=False)
class InverseField:
    """``y -> x`` with x + d(x) = y.

    A fold has no inverse: there it is the nearest that was found, and the residual says so.
    """

    field: DisplacementField
    threads: int | None = None
    residual: Residual = dataclasses.field(default_factory=Residual)

    @cached_property
    def _affine(self) -> FloatArray:
        """B, 4x4: the affine nearest to T over the grid."""
        grid = self.field.geometry
        step = max(1, int((np.prod(grid.shape) / _FITTED) ** (1.0 / 3.0)))
        every = (slice(None), *(slice(None, None, step),) * 3)
        x = affine_coords(grid.shape, grid.affine)[every].reshape(3, -1).astype(np.float64)
        y = x + self.field.vectors_mm[every].reshape(3, -1)
        known = np.vstack([x, np.ones(x.shape[1])])
        matrix = np.eye(4)
        matrix[:3] = np.linalg.lstsq(known.T, y.T, rcond=None)[0].T
        # A field that collapses space has no affine part worth the name; the identity then does as well.
        sizes = np.linalg.svd(matrix[:3, :3], compute_uv=False)
        return matrix if sizes.min() > 0.1 and np.linalg.matrix_rank(known) == 4 else np.eye(4)

    @cached_property
    def _rest(self) -> VoxelField:
        """u = B^-1 r on the field's grid."""
        grid = self.field.geometry
        rest = affine_coords(grid.shape, (np.eye(4) - self._affine) @ grid.affine)
        rest += self.field.vectors_mm
        back = np.asarray(np.linalg.inv(self._affine[:3, :3]), dtype=np.float64)
        return VoxelField(DisplacementField(rest, grid), back, self.threads)

    def solve(self, points: Array) -> Array:
        """x for points y (3, ...), RAS mm float32; adds to ``residual``."""
        to_voxels = self.field.geometry.inverse @ np.linalg.inv(self._affine)
        y = points.reshape(3, -1).astype(np.float64)
        z = (to_voxels[:3, :3] @ y + to_voxels[:3, 3:4]).astype(np.float32)
        v, left = self._rest.solve(z, border=True)
        # From voxels of u back to mm of T.
        linear = self._affine[:3, :3] @ self.field.geometry.affine[:3, :3]
        distances = np.sqrt(((linear @ left) ** 2).sum(axis=0)).astype(np.float32)
        self.residual.add(distances[self.field.geometry.holds(z + v)])
        grid = self.field.geometry.affine
        x = grid[:3, :3] @ (z.astype(np.float64) + v) + grid[:3, 3:4]
        return x.reshape(points.shape).astype(np.float32)


class VoxelField:
    """A field laid out once to be sampled and inverted: u = ``linear`` @ its vectors, in voxels of ``grid``.

    With ``fade_mm`` it goes on beyond the field's own grid and falls to zero within that distance, ``grid`` being
    larger by as much; else it ends with it.
    """

    def __init__(
        self,
        field: DisplacementField,
        linear: FloatArray | None = None,
        threads: int | None = None,
        fade_mm: float | None = None,
    ) -> None:
        own = field.geometry
        to_voxels = own.inverse[:3, :3] @ (np.eye(3) if linear is None else linear)
        self.threads = threads
        if native.available():
            ends: Shape = (0, 0, 0)
            windows = [np.ones(n, dtype=np.float32) for n in own.shape]
            if fade_mm is not None:
                ends, windows = fade_windows(own, fade_mm)
            self.grid = own.padded(ends)
            vectors = np.ascontiguousarray(field.vectors_mm, dtype=np.float32)
            volume = np.empty((*self.grid.shape, native.LANES), dtype=np.float32)

            def work(a: int, b: int) -> None:
                native.lay_out((a, b), vectors, ends, to_voxels, windows, volume)

            in_threads(work, volume.shape[0], threads, volume.size)
            self.sampled = Sampled.laid_out(volume, 3, threads)
        else:
            faded = field if fade_mm is None else field.faded(fade_mm)
            self.grid = faded.geometry
            values = to_voxels.astype(np.float32) @ faded.vectors_mm.reshape(3, -1)
            self.sampled = Sampled(values.reshape(3, *self.grid.shape), threads)
        # A voxel's longest side: what is left is then below the tolerance in mm.
        self._tolerance = TOLERANCE_MM / max(own.spacing)

    def solve(self, z: Array, border: bool) -> tuple[Array, Array]:
        """v with v + u(z + v) = 0 for points z (3,n), and what remains of that sum; all in voxels.

        Outside its grid u is zero, or with ``border`` what it is at the nearest voxel.
        """
        v = np.zeros_like(z)
        outside = None if border else 0.0
        if not native.available():
            self._iterate(z, v, outside)
        else:
            squared = np.empty(z.shape[1], dtype=np.float32)
            field, tolerance = self.sampled.field, self._tolerance

            def work(a: int, b: int) -> None:
                part = v[:, a:b]
                native.invert_points(field, z[:, a:b], border, tolerance, _EVALUATIONS, part, squared[a:b])

            in_threads(work, z.shape[1], self.threads, z.shape[1])
        return v, v + self.sampled.at(z + v, outside)

    def solve_on(self, shape: Shape, where: FloatArray, base: FloatArray) -> Array:
        """``base @ (i,j,k,1)`` + v in mm for the voxels of a grid of ``shape``, which lie at z = ``where @ (i,j,k,1)``.

        Outside its grid u is zero. Gives (3, shape) float32.
        """
        out = np.empty((3, *shape), dtype=np.float32)
        linear = self.grid.affine[:3, :3]
        if native.available():
            field, tolerance = self.sampled.field, self._tolerance

            def work(a: int, b: int) -> None:
                native.invert((a, b), field, where, base, linear, False, tolerance, _EVALUATIONS, out)

            in_threads(work, shape[0], self.threads, out[0].size)
            return out
        for start, stop in slabs(shape):
            z = affine_coords(shape, where, start, stop).reshape(3, -1)
            v = np.zeros_like(z)
            self._iterate(z, v, 0.0)
            mm = (linear.astype(np.float32) @ v).reshape(3, stop - start, *shape[1:])
            out[:, start:stop] = affine_coords(shape, base, start, stop) + mm
        return out

    def _iterate(self, z: Array, v: Array, outside: float | None) -> None:
        """Solve in place, without the compiled kernels."""
        error = v + self.sampled.at(z + v, outside)
        distance = np.sqrt((error**2).sum(axis=0))
        step = np.ones(z.shape[1], dtype=np.float32)
        active = np.flatnonzero(distance > self._tolerance)
        for _ in range(_STEPS):
            if active.size == 0:
                break
            tried = v[:, active] - step[active] * error[:, active]
            found = tried + self.sampled.at(z[:, active] + tried, outside)
            length = np.sqrt((found**2).sum(axis=0))
            better = length < distance[active]
            chosen = active[better]
            v[:, chosen], error[:, chosen], distance[chosen] = tried[:, better], found[:, better], length[better]
            step[active[~better]] *= 0.5
            active = active[(distance[active] > self._tolerance) & (step[active] > _SMALLEST_STEP)]
