"""The inverse of a displacement field, solved where it is asked for.

With T(x) = x + d(x), the field's own affine part B (least squares over its grid) and the rest r(x) = T(x) - B x,
T(x) = y is solved by x <- x + w B^-1 (y - T(x)): a fixed-point iteration (Chen et al. 2008, doi 10.1118/1.2816107)
that a large rotation or shift inside d does not disturb. Beyond its grid the field is continued by B and the border
value of r. Each point has a step w of its own, halved where it overshoots.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from jrs.fields import DisplacementField
from jrs.geometry import FloatArray
from jrs.runtime.sampling import affine_coords, sample

Array = npt.NDArray[np.float32]

TOLERANCE_MM = 1e-3
_STEPS = 60
_SMALLEST_STEP = 2.0**-6
_FITTED = 40_000


@dataclass
class Residual:
    """How far T(x) is from y over all points solved so far, mm; ``unsolved`` counts those above 0.1 mm."""

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
    def _rest(self) -> Array:
        """r = T(x) - B x on the field's grid, (3,X,Y,Z)."""
        grid = self.field.geometry
        rest = affine_coords(grid.shape, (np.eye(4) - self._affine) @ grid.affine)
        rest += self.field.vectors_mm
        return rest

    def solve(self, points: Array) -> Array:
        """x for points y (3, ...), RAS mm float32; adds to ``residual``."""
        y = points.reshape(3, -1).astype(np.float64)
        matrix = self._affine
        back = np.linalg.inv(matrix[:3, :3])
        x = back @ (y - matrix[:3, 3:4])
        error = self._error(x, y)
        distance = np.sqrt((error**2).sum(axis=0))
        step = np.ones(y.shape[1])
        active = np.flatnonzero(distance > TOLERANCE_MM)
        for _ in range(_STEPS):
            if active.size == 0:
                break
            tried = x[:, active] + step[active] * (back @ error[:, active])
            found = self._error(tried, y[:, active])
            length = np.sqrt((found**2).sum(axis=0))
            better = length < distance[active]
            chosen = active[better]
            x[:, chosen], error[:, chosen], distance[chosen] = tried[:, better], found[:, better], length[better]
            step[active[~better]] *= 0.5
            active = active[(distance[active] > TOLERANCE_MM) & (step[active] > _SMALLEST_STEP)]
        self.residual.add(distance.astype(np.float32))
        return x.reshape(points.shape).astype(np.float32)

    def _error(self, x: FloatArray, y: FloatArray) -> FloatArray:
        """y - T(x), (3,n)."""
        matrix, to_voxels = self._affine, self.field.geometry.inverse
        coords = (to_voxels[:3, :3] @ x + to_voxels[:3, 3:4]).astype(np.float32)[:, :, None, None]
        rest = sample(self._rest, coords, None, self.threads)[:, :, 0, 0]
        result: FloatArray = y - (matrix[:3, :3] @ x + matrix[:3, 3:4]) - rest
        return result
