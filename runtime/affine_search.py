"""How well two images overlap under an affine, and where a search for one should start.

Works on small averaged copies of both images, along RAS axes: thousands of placements can be tried in the time
that one optimisation takes, and none of them can be missed because its basin is narrow.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from jrs.geometry import FloatArray, Geometry
from jrs.runtime.sampling import affine_coords, sample
from jrs.volume import foreground_mask

Array = npt.NDArray[np.float32]

_BINS = 24
_POINTS_AT_ONCE = 1_000_000
_TRIED_NEARBY = 3
_ROUNDS = 14
_SMALLEST_STEP = 0.1


@dataclass(frozen=True)
class Block:
    """An image on a grid along RAS axes: ``data`` (X,Y,Z) float32, not negative."""

    data: Array
    grid: Geometry

    def averaged(self, factor: int) -> Block:
        """Means of cubes of ``factor`` voxels a side; what is over at the far ends is filled with zeros."""
        shape = [-(-n // factor) for n in self.data.shape]
        filled = np.zeros([n * factor for n in shape], dtype=np.float32)
        filled[tuple(slice(0, n) for n in self.data.shape)] = self.data
        a, b, c = shape
        means = filled.reshape(a, factor, b, factor, c, factor).mean(axis=(1, 3, 5), dtype=np.float32)
        affine = self.grid.affine.copy()
        affine[:3, :3] *= factor
        affine[:3, 3] = self.grid.to_ras([(factor - 1) / 2.0] * 3)
        return Block(means, Geometry((a, b, c), affine))

    @cached_property
    def mask(self) -> npt.NDArray[np.bool_]:
        """The foreground."""
        return foreground_mask(self.data)

    @cached_property
    def _moments(self) -> tuple[FloatArray, float]:
        weights = np.minimum(self.data, np.percentile(self.data[self.mask], 98.0)).astype(np.float64)
        points = affine_coords(self.grid.shape, self.grid.affine).reshape(3, -1).astype(np.float64)
        center = points @ weights.ravel() / weights.sum()
        return center, float(np.count_nonzero(self.mask)) * self.grid.voxel_volume_ml

    @property
    def center_of_mass(self) -> FloatArray:
        """RAS mm of the centre of mass, the brightest voxels cut off."""
        return self._moments[0]

    @property
    def foreground_ml(self) -> float:
        """Volume of the foreground."""
        return self._moments[1]


@dataclass(frozen=True)
class Quality:
    """Two images under an affine: ``mutual_information`` in nats, ``overlap`` the Dice score of the foregrounds."""

    mutual_information: float
    overlap: float


def quality(moving: Block, fixed: Block, matrix: FloatArray) -> Quality:
    """Judge A (fixed to moving, RAS mm) over the fixed block; what lies outside the moving block is background."""
    coords = affine_coords(fixed.grid.shape, moving.grid.inverse @ matrix @ fixed.grid.affine)
    there = sample(moving.mask[None].astype(np.float32), coords, 0.0, 1)[0] > 0.5
    # What the affine leaves outside the fixed block counts as well.
    moved_ml = moving.foreground_ml / abs(float(np.linalg.det(matrix[:3, :3])))
    shared = np.count_nonzero(there & fixed.mask) * fixed.grid.voxel_volume_ml
    overlap = 2.0 * shared / max(moved_ml + fixed.foreground_ml, 1e-9)
    return Quality(float(Scores(moving, fixed).of([matrix])[0]), float(min(1.0, overlap)))


class Scores:
    """Mutual information (nats) of many placements of one pair of blocks."""

    def __init__(self, moving: Block, fixed: Block) -> None:
        self._moving = moving.data[None]
        self._to_moving = moving.grid.inverse
        self._points = affine_coords(fixed.grid.shape, fixed.grid.affine).reshape(3, -1).astype(np.float64)
        self._fixed_bins = np.floor(_binned(fixed.data).ravel() + 0.5).astype(np.int64)
        self._top = top_of(moving.data)

    def of(self, matrices: Sequence[FloatArray]) -> FloatArray:
        """The mutual information under each 4x4 matrix; intensities in ``_BINS`` bins, moving ones shared linearly."""
        count = self._points.shape[1]
        many = max(1, _POINTS_AT_ONCE // count)
        scores = np.empty(len(matrices))
        for start in range(0, len(matrices), many):
            chunk = [self._to_moving @ m for m in matrices[start : start + many]]
            coords = np.empty((3, len(chunk), count, 1), dtype=np.float32)
            for index, m in enumerate(chunk):
                coords[:, index, :, 0] = m[:3, :3] @ self._points + m[:3, 3:4]
            values = sample(self._moving, coords, 0.0, 1)[0, :, :, 0]
            for index in range(len(chunk)):
                scores[start + index] = self._information(values[index])
        return scores

    def _information(self, values: Array) -> float:
        position = np.clip(values * ((_BINS - 1) / self._top), 0.0, _BINS - 1)
        low = np.minimum(position.astype(np.int64), _BINS - 2)
        share = position - low
        index = self._fixed_bins * _BINS + low
        counts = np.bincount(index, 1.0 - share, _BINS * _BINS) + np.bincount(index + 1, share, _BINS * _BINS)
        joint: FloatArray = counts.reshape(_BINS, _BINS).astype(np.float64) / values.size
        return entropy(joint.sum(axis=0)) + entropy(joint.sum(axis=1)) - entropy(joint)


def top_of(data: Array) -> float:
    """The intensity that the highest bin begins at: brighter voxels are few."""
    return max(float(np.percentile(data[data > 0], 99.5)) if (data > 0).any() else 1.0, 1e-12)


def _binned(data: Array) -> Array:
    binned: Array = np.clip(data * ((_BINS - 1) / top_of(data)), 0.0, _BINS - 1)
    return binned


def entropy(p: FloatArray) -> float:
    """Of a distribution, nats."""
    p = p[p > 0]
    return float(-(p * np.log(p)).sum())


# Starts ---------------------------------------------------------------------------------------------------


def starts(moving: Block, fixed: Block, scaled: bool, everywhere: bool, count: int) -> list[FloatArray]:
    """The ``count`` best placements found on coarse blocks, best first.

    Centres of mass are brought together under every rotation of a net: of up to 50 degrees about the axes, or with
    ``everywhere`` of any angle; principal axes are matched too. The best are improved step by step in rotation,
    translation and, if ``scaled``, size.
    """
    scores = Scores(moving, fixed)
    about, onto = fixed.center_of_mass, moving.center_of_mass
    sizes = [1.0]
    if scaled:
        ratio = (moving.foreground_ml / max(fixed.foreground_ml, 1e-9)) ** (1.0 / 3.0)
        sizes += [ratio] if 0.7 < ratio < 1.4 and abs(ratio - 1.0) > 0.03 else []
    rotations = _net(everywhere) + _principal(moving, fixed)
    tried = [_placed(size * rotation, about, onto) for size in sizes for rotation in rotations]
    order = np.argsort(-scores.of(tried), kind="stable")
    chosen = _apart([tried[i] for i in order], fixed, count + _TRIED_NEARBY if everywhere else count)
    improved = [_improved(scores, matrix, about, scaled) for matrix in chosen]
    improved.sort(key=lambda pair: -pair[0])
    return _apart([matrix for _, matrix in improved], fixed, count)


def _placed(linear: FloatArray, about: FloatArray, onto: FloatArray) -> FloatArray:
    matrix = np.eye(4)
    matrix[:3, :3] = linear
    matrix[:3, 3] = onto - linear @ about
    return matrix


def rotation_of(vector: npt.ArrayLike) -> FloatArray:
    """The rotation about ``vector`` by its length in radians (Rodrigues)."""
    x, y, z = np.asarray(vector, dtype=np.float64)
    angle = float(np.sqrt(x * x + y * y + z * z))
    cross = np.array([[0.0, -z, y], [z, 0.0, -x], [-y, x, 0.0]])
    a = np.sinc(angle / np.pi)
    b = 0.5 * np.sinc(angle / (2.0 * np.pi)) ** 2
    result: FloatArray = np.eye(3) + a * cross + b * cross @ cross
    return result


def _net(everywhere: bool) -> list[FloatArray]:
    """Rotations no further than about 26 degrees apart, the identity first."""
    near = sorted(itertools.product((-1, 0, 1), repeat=3), key=lambda v: (sum(map(abs, v)), v))
    small = [rotation_of(np.radians(30.0) * np.array(v)) for v in near]
    if not everywhere:
        return small
    turns = []
    for axes in itertools.permutations(range(3)):
        for signs in itertools.product((1.0, -1.0), repeat=3):
            turn = np.zeros((3, 3))
            turn[range(3), axes] = signs
            if np.linalg.det(turn) > 0:
                turns.append(turn)
    turns.sort(key=lambda t: -float(np.trace(t)))
    return [turn @ rotation for turn in turns for rotation in small]


def _principal(moving: Block, fixed: Block) -> list[FloatArray]:
    """The four rotations that bring the principal axes of the foregrounds together."""
    frames = []
    for block in (moving, fixed):
        points = affine_coords(block.grid.shape, block.grid.affine)[:, block.mask].astype(np.float64)
        axes = np.linalg.eigh(np.cov(points))[1]
        frames.append(axes * np.sign(np.linalg.det(axes)))
    flips = [np.diag(d) for d in ((1.0, 1.0, 1.0), (1.0, -1.0, -1.0), (-1.0, 1.0, -1.0), (-1.0, -1.0, 1.0))]
    return [frames[0] @ flip @ frames[1].T for flip in flips]


def _apart(matrices: list[FloatArray], fixed: Block, count: int) -> list[FloatArray]:
    """The first ``count`` matrices that move some corner of the fixed block by more than 15 mm to the ones before."""
    corners = np.c_[fixed.grid.corners(), np.ones(8)].T
    kept: list[FloatArray] = []
    for matrix in matrices:
        gaps = [np.linalg.norm(((matrix - other) @ corners)[:3], axis=0).max() for other in kept]
        if not gaps or min(gaps) > 15.0:
            kept.append(matrix)
        if len(kept) == count:
            break
    return kept


def _improved(scores: Scores, matrix: FloatArray, about: FloatArray, scaled: bool) -> tuple[float, FloatArray]:
    """Climb: the best of all single steps is taken, and where none helps the steps are halved."""
    units = np.diag([np.radians(12.0)] * 3 + [8.0] * 3 + ([0.08] if scaled else []))
    best = float(scores.of([matrix])[0])
    step = 1.0
    for _ in range(_ROUNDS):
        tried = [_stepped(matrix, about, sign * step * unit) for unit in units for sign in (1.0, -1.0)]
        found = scores.of(tried)
        index = int(found.argmax())
        if found[index] > best:
            best, matrix = float(found[index]), tried[index]
        else:
            step *= 0.5
            if step < _SMALLEST_STEP:
                break
    return best, matrix


def _stepped(matrix: FloatArray, about: FloatArray, step: FloatArray) -> FloatArray:
    """``matrix`` turned by step[:3] (radians) about ``about``, shifted by step[3:6] mm, enlarged by exp(step[6])."""
    change = rotation_of(step[:3]) * (np.exp(step[6]) if step.size > 6 else 1.0)
    result = np.eye(4)
    result[:3, :3] = matrix[:3, :3] @ change
    result[:3, 3] = matrix[:3, :3] @ about + matrix[:3, 3] + step[3:6] - result[:3, :3] @ about
    return result
