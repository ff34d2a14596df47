"""Affines and displacement fields one behind the other, evaluated point by point: nothing is resampled in between."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from jrs.fields import DisplacementField
from jrs.geometry import FloatArray, Geometry
from jrs.runtime.inversion import InverseField, Residual
from jrs.runtime.sampling import Sampled, affine_coords, slabs
from jrs.transforms import Affine

Array = npt.NDArray[np.float32]
Step = Affine | DisplacementField | InverseField


@dataclass(frozen=True, eq=False)
class Chain:
    """``x -> s_n(... s_2(s_1(x)))``, RAS mm: a point of the fixed image through each step in turn.

    A displacement field is zero outside its grid (half a voxel around it included), as in ITK. Neighbouring affines
    are multiplied. ``Chain(())`` is the identity.
    """

    steps: tuple[Step, ...]
    threads: int | None = None
    _ready: dict[int, Sampled] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        merged: list[Step] = []
        for step in self.steps:
            if merged and isinstance(step, Affine) and isinstance(merged[-1], Affine):
                merged[-1] = step @ merged[-1]
            else:
                merged.append(step)
        object.__setattr__(self, "steps", tuple(merged))

    @property
    def affine(self) -> Affine | None:
        """The whole chain as one affine, None if it has a field."""
        if not self.steps:
            return Affine(np.eye(4))
        return self.steps[0] if len(self.steps) == 1 and isinstance(self.steps[0], Affine) else None

    def then(self, later: Chain) -> Chain:
        """This chain first, ``later`` behind it."""
        return Chain(self.steps + later.steps, self.threads)

    def inverse(self) -> Chain:
        """The chain that leads back; fields are inverted where they are evaluated."""
        return Chain(tuple(self._inverted(step) for step in reversed(self.steps)), self.threads)

    def _inverted(self, step: Step) -> Step:
        if isinstance(step, Affine):
            return step.inverse()
        return step.field if isinstance(step, InverseField) else InverseField(step, self.threads)

    @property
    def residuals(self) -> list[Residual]:
        """Of each inverted field, over the points evaluated so far."""
        return [step.residual for step in self.steps if isinstance(step, InverseField)]

    def through(self, points: Array) -> Array:
        """Points (3, a, b, c) RAS mm float32 through all steps; likewise."""
        for step in self.steps:
            if isinstance(step, Affine):
                flat = step.matrix[:3, :3] @ points.reshape(3, -1) + step.matrix[:3, 3:4]
                points = flat.reshape(points.shape).astype(np.float32)
            elif isinstance(step, InverseField):
                points = step.solve(points)
            else:
                inverse = step.geometry.inverse
                coords = (inverse[:3, :3] @ points.reshape(3, -1) + inverse[:3, 3:4]).reshape(points.shape)
                points = points + self._sampled(step).at(coords.astype(np.float32))
        return points

    def _sampled(self, step: DisplacementField) -> Sampled:
        """A field made ready once, however many slabs of points go through it."""
        if id(step) not in self._ready:
            self._ready[id(step)] = Sampled(step.vectors_mm, self.threads)
        return self._ready[id(step)]

    def forward(self, grid: Geometry) -> Iterator[tuple[slice, Array]]:
        """Slab by slab of ``grid``: which planes, and where their voxels are led, (3, x, y, z) RAS mm."""
        # Affines in front of the first field act on the grid itself, in double precision.
        first = self.steps[0] if self.steps and isinstance(self.steps[0], Affine) else None
        start_affine = grid.affine if first is None else first.matrix @ grid.affine
        rest = self if first is None else Chain(self.steps[1:], self.threads, self._ready)
        for start, stop in slabs(grid.shape):
            yield slice(start, stop), rest.through(affine_coords(grid.shape, start_affine, start, stop))

    def points(self, points_ras: npt.ArrayLike) -> FloatArray:
        """Map points (n,3), RAS mm."""
        points = np.asarray(points_ras, dtype=np.float64)
        if self.affine is not None:
            return self.affine.points(points)
        return self.through(points.T.astype(np.float32)[:, :, None, None])[:, :, 0, 0].T.astype(np.float64)

    def outside(self, points_ras: npt.ArrayLike) -> int:
        """How many points (n,3) leave the grid of a field on their way; it is zero there, inverted its affine part."""
        at = np.asarray(points_ras, dtype=np.float64)
        left = np.zeros(len(at), dtype=bool)
        for step in self.steps:
            after = Chain((step,), self.threads, self._ready).points(at)
            if isinstance(step, InverseField):
                left |= ~step.field.geometry.holds(step.field.geometry.to_voxels(after).T)
            elif isinstance(step, DisplacementField):
                left |= ~step.geometry.holds(step.geometry.to_voxels(at).T)
            at = after
        return int(np.count_nonzero(left))

    def dense(self, grid: Geometry) -> DisplacementField:
        """The whole chain as one field on ``grid``: d(x) = chain(x) - x."""
        out = np.empty((3, *grid.shape), dtype=np.float32)
        for planes, moved in self.forward(grid):
            out[:, planes] = moved - affine_coords(grid.shape, grid.affine, planes.start, planes.stop)
        return DisplacementField(out, grid)


def composed(chains: Iterable[Chain], threads: int | None = None) -> Chain:
    """Chains one behind the other, the first acting first."""
    return Chain(tuple(step for chain in chains for step in chain.steps), threads)
