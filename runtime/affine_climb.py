"""From a start to the affine of most mutual information: Mattes' metric with its gradient, by steepest ascent.

Mattes et al. 2003 (doi 10.1109/TMI.2003.809072): a joint histogram of the two images, the fixed one's intensities in
bins, the moving one's spread over them by a cubic B-spline b, so that it can be differentiated. For N samples at points
x of the fixed image with bin f(x), and q(A x) the moving image's position among the bins,

    p(f, m) = 1/N sum over x in bin f of b(m - q(A x)),    I = sum of p log(p / (p_f p_m)),
    dI/dA = -1/N sum over x of [ sum over m of b'(m - q(A x)) log(p(f(x), m) / p_m(m)) ] grad q(A x) (x, 1)^T

Samples that leave the moving image take no part. The image between voxels is trilinear, and grad q is its own slope.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from jrs.geometry import FloatArray
from jrs.runtime import native
from jrs.runtime.affine_search import Block, entropy, rotation_of, top_of
from jrs.runtime.sampling import Sampled, in_threads

Array = npt.NDArray[np.float32]
Bins = npt.NDArray[np.uint8]

BINS = 32
_PAD = 2
"""Bins left free at both ends, for the spline to reach into."""
_PIECES = 16
"""Sums are made over so many pieces of the samples, whatever the number of threads: the result is the same."""
_LEAST_SHARE = 0.125
_SEED = 42


class Metric:
    """Mutual information of two blocks under affines, with its derivative.

    Taken at one place in each ``every`` voxels of the fixed block, at random within the voxel (the same in each run):
    on the grid itself, where interpolation does not smooth, it would favour shifts by whole voxels.
    """

    def __init__(self, moving: Block, fixed: Block, every: int = 1, threads: int | None = None) -> None:
        self.threads = threads
        chosen = np.arange(0, fixed.data.size, every)
        voxels = np.stack(np.unravel_index(chosen, fixed.data.shape)).astype(np.float64)
        voxels += np.random.default_rng(_SEED).uniform(-0.5, 0.5, voxels.shape)
        values = Sampled(fixed.data[None], threads).at(voxels.astype(np.float32), None)[0]
        self._bins: Bins = np.rint(np.clip(values / top_of(fixed.data), 0.0, 1.0) * (BINS - 1)).astype(np.uint8)
        self.center = fixed.center_of_mass
        points = fixed.grid.affine[:3, :3] @ voxels + fixed.grid.affine[:3, 3:4] - self.center[:, None]
        self._points = np.ascontiguousarray(points, dtype=np.float32)
        share = np.clip(moving.data / top_of(moving.data), 0.0, 1.0)
        self._moving = np.ascontiguousarray(_PAD + share * (BINS - 1 - 2 * _PAD), dtype=np.float32)
        self._to_moving = moving.grid.inverse

    @property
    def reach_mm(self) -> FloatArray:
        """Root mean square of the samples' coordinates about the centre, mm (3,)."""
        reach: FloatArray = np.sqrt((self._points.astype(np.float64) ** 2).mean(axis=1))
        return reach

    def __call__(self, matrix: FloatArray) -> tuple[float, FloatArray]:
        """Nats under a 4x4 matrix y = M (x - center) + t, and d/d[M t] (3,4).

        Raises ValueError where less than an eighth of the samples lies in the moving block.
        """
        where = self._to_moving @ matrix
        where[:3, 3] += where[:3, :3] @ self.center
        moved = np.empty((4, self._bins.size), dtype=np.float32)

        def count(a: int, b: int, out: FloatArray) -> None:
            _count(self._moving, where, self._points[:, a:b], self._bins[a:b], moved[:, a:b], out)

        joint = self._summed(BINS * BINS, count)
        joint = joint.reshape(BINS, BINS)
        inside = float(joint.sum())
        if inside < _LEAST_SHARE * self._bins.size:
            raise ValueError("the images hardly overlap")
        joint /= inside
        there = joint > 0.0
        logs = np.log(np.where(there, joint, 1.0)) - there * np.log(np.maximum(joint.sum(axis=0), 1e-300))
        value = float((joint * logs).sum()) + entropy(joint.sum(axis=1))
        table = np.ascontiguousarray(logs, dtype=np.float32)

        def slope(a: int, b: int, out: FloatArray) -> None:
            _slope(moved[:, a:b], self._points[:, a:b], self._bins[a:b], table, out)

        by_voxels = self._summed(12, slope).reshape(3, 4) / inside
        return value, self._to_moving[:3, :3].T @ by_voxels

    def _summed(self, size: int, part: Callable[[int, int, FloatArray], None]) -> FloatArray:
        """The sum of what ``part(start, stop, out)`` puts into ``out`` (size,) for each piece of the samples."""
        count = self._bins.size
        sums = np.zeros((_PIECES, size))

        def work(start: int, stop: int) -> None:
            for piece in range(start, stop):
                part(count * piece // _PIECES, count * (piece + 1) // _PIECES, sums[piece])

        in_threads(work, _PIECES, self.threads, count)
        total: FloatArray = sums.sum(axis=0)
        return total


def _count(volume: Array, where: FloatArray, points: Array, bins: Bins, moved: Array, out: FloatArray) -> None:
    """N p(f, m) into ``out`` (BINS*BINS,); q and its slopes along the voxels' axes into ``moved`` (4,n), -1 outside."""
    if native.available():
        native.count(volume, where, points, bins, BINS, moved, out)
        return
    at = (where[:3, :3] @ points + where[:3, 3:4]).astype(np.float32)
    moved[:] = _with_slopes(volume, at)
    inside = moved[0] >= 0.0
    low, share = _split(moved[0, inside])
    index = bins[inside].astype(np.int64) * BINS + low
    for k, weights in enumerate(_spline(share)):
        out += np.bincount(index + k, weights, out.size)


def _with_slopes(volume: Array, at: Array) -> Array:
    """Trilinear values at voxel coordinates (3,n) and their derivatives, (4,n); -1 and zeros outside."""
    low, share, inside = [], [], np.ones(at.shape[1], dtype=bool)
    for x, n in zip(at, volume.shape, strict=True):
        inside &= (x >= -0.5) & (x <= n - 0.5)
        low.append(np.clip(x, 0, n - 1).astype(np.int64).clip(max=n - 2))
        share.append(np.clip(x, 0, n - 1) - low[-1])
    i, j, k = low
    corners = np.stack([volume[i + a, j + b, k + c] for a, b, c in itertools.product((0, 1), repeat=3)])
    corners = corners.reshape(2, 2, 2, -1)
    values = np.zeros((4, at.shape[1]), dtype=np.float32)
    values[0] = -1.0
    for row, axis in enumerate((None, 0, 1, 2)):
        found = corners
        for along in range(3):
            # What is left of the axes comes first.
            found = found[1] - found[0] if along == axis else found[0] + share[along] * (found[1] - found[0])
        values[row, inside] = found[inside]
    return values


def _slope(moved: Array, points: Array, bins: Bins, table: Array, out: FloatArray) -> None:
    """The sum over samples of N dI/dq grad q (x, 1)^T into ``out`` (12,)."""
    if native.available():
        native.slope(moved, points, bins, table, out)
        return
    inside = moved[0] >= 0.0
    low, share = _split(moved[0, inside])
    rows = bins[inside].astype(np.int64) * BINS + low
    # The weight of bin m is b(m - q), so that its derivative by q has lost the minus.
    pull = sum(weights * table.ravel()[rows + k] for k, weights in enumerate(_spline_slope(share)))
    forces = moved[1:, inside] * pull
    out += np.c_[forces @ points[:, inside].T, forces.sum(axis=1)].ravel()


def _split(positions: Array) -> tuple[npt.NDArray[np.int64], Array]:
    """The lowest of the four bins that each position's spline reaches, and the position's share beyond a whole bin."""
    whole = positions.astype(np.int64)
    return whole - 1, positions - whole


def _spline(t: Array) -> tuple[npt.NDArray[Any], ...]:
    return (1 - t) ** 3 / 6, (3 * t**3 - 6 * t**2 + 4) / 6, (-3 * t**3 + 3 * t**2 + 3 * t + 1) / 6, t**3 / 6


def _spline_slope(t: Array) -> tuple[npt.NDArray[Any], ...]:
    return -((1 - t) ** 2) / 2, (3 * t**2 - 4 * t) / 2, (-3 * t**2 + 2 * t + 1) / 2, t**2 / 2


# The ascent -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Steps:
    """Lengths of steps by how far they move the samples, root mean square in mm: the first, and the shortest.

    Where the slope has turned by more than a right angle, steps become shorter by ``relaxation``.
    """

    first_mm: float
    last_mm: float
    relaxation: float = 0.6
    most: int = 100


def climb(metric: Metric, start: FloatArray, rigid: bool, steps: Steps) -> FloatArray:
    """The best matrix (4x4) on the way up from ``start``; raises ValueError where the images cease to overlap.

    Steepest ascent in parameters of which one unit moves the samples by 1 mm: in these it needs some 25 steps, fewer
    than a quasi-Newton method, whose line searches suffer from the kinks of trilinear interpolation.
    """
    place = best = _Place.of(start, metric, rigid)
    highest, length = -np.inf, steps.first_mm
    before: FloatArray | None = None
    for _ in range(steps.most):
        value, slope = metric(place.matrix)
        if value > highest:
            highest, best = value, place
        uphill = place.along(slope)
        if before is not None and float(uphill @ before) < 0.0:
            length *= steps.relaxation
        size = float(np.linalg.norm(uphill))
        if length < steps.last_mm or size == 0.0:
            break
        place, before = place.moved(uphill * (length / size)), uphill
    return best.matrix


@dataclass(frozen=True)
class _Place:
    """y = M (x - center) + t, and the parameters that lead away from it: of M and t, or of a turn and t."""

    linear: FloatArray
    shift: FloatArray
    center: FloatArray
    reach: FloatArray
    rigid: bool

    @staticmethod
    def of(matrix: FloatArray, metric: Metric, rigid: bool) -> _Place:
        linear, center = matrix[:3, :3], metric.center
        return _Place(linear, linear @ center + matrix[:3, 3], center, metric.reach_mm, rigid)

    @property
    def matrix(self) -> FloatArray:
        matrix = np.eye(4)
        matrix[:3, :3], matrix[:3, 3] = self.linear, self.shift - self.linear @ self.center
        return matrix

    @property
    def _radius(self) -> float:
        """Root mean square distance of the samples from an axis through the centre, over all axes."""
        return float(np.sqrt((self.reach**2).sum() * 2.0 / 3.0))

    def along(self, slope: FloatArray) -> FloatArray:
        """The derivative by the parameters from that by [M t]."""
        if not self.rigid:
            return np.concatenate([(slope[:, :3] / self.reach).ravel(), slope[:, 3]])
        turns = [float((slope[:, :3] * (generator @ self.linear)).sum()) for generator in _GENERATORS]
        return np.array([*(turn / self._radius for turn in turns), *slope[:, 3]])

    def moved(self, step: FloatArray) -> _Place:
        if self.rigid:
            linear = rotation_of(step[:3] / self._radius) @ self.linear
        else:
            linear = self.linear + step[:9].reshape(3, 3) / self.reach
        return dataclasses.replace(self, linear=linear, shift=self.shift + step[-3:])


_GENERATORS = np.array([np.cross(np.eye(3), axis) for axis in np.eye(3)])
"""[e_k]x: the derivative of a rotation by its k-th angle."""
