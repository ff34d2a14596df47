"""Predicted tumours as the refinement sees them: what it must not compare, and what must keep its volume."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from jrs.geometry import FloatArray, Geometry
from jrs.manifest import ModelSpec
from jrs.runtime.labels import Labels, foreground
from jrs.runtime.preprocess import NetworkInput
from jrs.runtime.sampling import affine_coords, sample
from jrs.runtime.transform import to_voxel_coords
from jrs.volume import occupied

Array = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]

_CLOSED_MM = 4.0
"""Gaps in a lesion up to twice as wide belong to it."""
_FADING_MM = 2.0
"""Within this distance of all that may show something of a lesion the comparison comes in."""
_RIGID_MM = 2.0
"""So far around a lesion everything moves as it does."""
_FREE_MM = 14.0
"""From this distance on the surroundings deform freely."""
_SMALLEST_ML = 0.5
"""Smaller lesions are not compared but deform with their surroundings."""
_SPECK_ML = 0.05
"""Smaller regions are noise, with whatever modalities; BraTS' lesion-wise scores leave out true ones of that size."""
_FAINT_ML = 3.0
"""Smaller regions are left out where T1 alone was there to see them by: healthy brains have some."""
_TRACE_ML = 0.2
"""Less enhancing tumour in all is noise: 200 voxels of BraTS' images, of which nnU-Net made necrosis in 2020."""
_PASSES = 2
_FAR_MM = 1e6
HALF_DIAGONAL = 0.87
"""Of a voxel, in its sides: so far a point shines by averaging."""


_CONTRAST = "t1ce"
_TELLING = (_CONTRAST, "t2", "flair")
"""Modalities that show a tumour; from T1 alone the default bundle finds some in a healthy brain now and then."""


def shows_tumors(image: NetworkInput, channels: Sequence[str]) -> bool:
    """Whether the tumour of an image can be believed: not from T1 alone by a network that knows better modalities."""
    telling = [there for channel, there in zip(channels, image.present, strict=True) if channel in _TELLING]
    return not telling or any(telling)


def smallest_ml(image: NetworkInput, channels: Sequence[str]) -> float:
    """The volume from which on a region that was segmented in an image counts as a lesion."""
    return _SPECK_ML if shows_tumors(image, channels) else _FAINT_ML


def drop_doubtful(probabilities: Array, voxel_ml: float, least_ml: float, certainty: float) -> float:
    """Make background of doubtful regions, in ``probabilities`` (K,X,Y,Z); returns how many ml they were.

    A connected region is doubtful if it is smaller than ``least_ml``, or if its mean probability of being tumour, of
    any class, is below ``certainty``.
    """
    mask = foreground(probabilities)
    if not mask.any():
        return 0.0
    box = occupied([mask])
    labels = _labelled(mask[box])
    counts = np.bincount(labels.ravel())
    certain = np.bincount(labels.ravel(), 1.0 - probabilities[(0, *box)].ravel()) / np.maximum(counts, 1)
    doubtful = (counts * voxel_ml < least_ml) | (certain < certainty)
    doubtful[0] = False
    probabilities[(slice(None), *box)][:, doubtful[labels]] = np.eye(len(probabilities), 1, dtype=np.float32)
    return float(counts[doubtful].sum() * voxel_ml)


def drop_unbelievable(probabilities: Array, image: NetworkInput, model: ModelSpec) -> tuple[float, str]:
    """Leave in ``probabilities`` (K,X,Y,Z) of an image what is to be believed; how many ml went, and by what rule.

    All volumes are the patient's, as those of the labels on the image's own grid.
    """
    least = smallest_ml(image, model.channels)
    dropped = drop_doubtful(probabilities, image.voxel_ml, least, model.certainty)
    drop_traces(probabilities, image.voxel_ml, shows_enhancement(image, model.channels))
    sure = f", or with a mean probability of tumour below {model.certainty:g}," if model.certainty else ""
    return dropped, f"regions below {least:g} ml{sure}"


def shows_enhancement(image: NetworkInput, channels: Sequence[str]) -> bool:
    """Whether a contrast agent is there to see: a network that knows T1ce guesses without."""
    return _CONTRAST not in channels or image.present[tuple(channels).index(_CONTRAST)]


def drop_traces(probabilities: Array, voxel_ml: float, visible: bool = True) -> None:
    """Make core of what enhances in BraTS' four classes, in ``probabilities``, if there is no more than a trace in all.

    Where the truth has none, any at all scores nothing (Isensee et al. 2021, doi 10.1007/978-3-030-72087-2_11).
    All of it becomes core where enhancement is not ``visible``.
    """
    if len(probabilities) != 4:
        return
    mask = foreground(probabilities)
    if not mask.any():
        return
    inside = probabilities[(slice(None), *occupied([mask]))]
    winner = inside.argmax(axis=0)
    if visible and np.count_nonzero(winner == 3) * voxel_ml >= _TRACE_ML:
        return
    # To the class that wins without it, so that nothing but the trace itself changes, interpolated or not.
    winner[winner == 3] = 1
    for index in range(3):
        inside[index] += np.where(winner == index, inside[3], np.float32(0.0))
    inside[3] = 0.0


def drop_specks(grids: Sequence[tuple[Labels, float]], values: Sequence[int], scale: float) -> None:
    """Keep to the same limits on the grids that labels are written on: the patient's own first, then the atlas's.

    Interpolation leaves crumbs beside regions, and a little less of small ones. ``grids`` are labels (X,Y,Z), changed
    in place, with the volume of a voxel, ml; ``values`` the numbers of the classes; ``scale`` ml of the patient in one
    of the atlas. What enhances is left on both grids or on neither.
    """
    for (labels, voxel_ml), of_patient in zip(grids, (1.0, scale), strict=True):
        mask = labels != values[0]
        if not mask.any():
            continue
        inside = labels[occupied([mask])]
        parts = _labelled(inside != values[0])
        small = np.bincount(parts.ravel()) * voxel_ml * of_patient < _SPECK_ML
        small[0] = False
        inside[small[parts]] = values[0]
    if len(values) == 4:
        native, voxel_ml = grids[0]
        if np.count_nonzero(native == values[3]) * voxel_ml < _TRACE_ML:
            for labels, _ in grids:
                labels[labels == values[3]] = values[1]


@dataclass(frozen=True, eq=False)
class Tumors:
    """Lesions (X,Y,Z) on a grid, closed; ``mask`` None or empty if there are none.

    ``certain`` ones move as rigid bodies. Others are not compared either, and deform as what surrounds them does: that
    keeps most of a true lesion's volume, and costs little where there is none (docs/refinement.md).
    """

    mask: Mask | None
    grid: Geometry
    threads: int | None = None
    certain: bool = True

    @staticmethod
    def found(
        probabilities: Array | None, grid: Geometry, threads: int | None = None, certain: bool = True
    ) -> Tumors:
        """From class probabilities (K,X,Y,Z), background first; None if nothing was segmented."""
        mask = None if probabilities is None else foreground(probabilities)
        if mask is None or not mask.any():
            return Tumors(None, grid, threads, certain)
        # Closed: what lies no deeper inside the grown lesion than it has grown.
        grown = _distance_mm(mask, grid) <= _CLOSED_MM
        return Tumors(mask | (_distance_mm(~grown, grid) > _CLOSED_MM), grid, threads, certain)

    @cached_property
    def distance_mm(self) -> Array | None:
        """Distance to the nearest lesion, (X,Y,Z); None without one."""
        return None if self.mask is None else _distance_mm(self.mask, self.grid)

    @cached_property
    def lesions(self) -> list[Mask]:
        """Each that is not too small to matter."""
        if self.mask is None:
            return []
        smallest = _SMALLEST_ML / self.grid.voxel_volume_ml
        return [part for part in _components(self.mask) if part.sum() >= smallest]

    @cached_property
    def _stiff(self) -> list[Array]:
        """For each lesion that is to move as a rigid body: 1 in it, smoothly 0 at some distance."""
        if not self.certain:
            return []
        return [1.0 - _ramp(_distance_mm(part, self.grid), _RIGID_MM, _FREE_MM) for part in self.lesions]

    def blank_at(self, points_ras: Array, voxel_mm: float) -> Mask:
        """Where voxels of that size at points (3,x,y,z) may show something of a lesion, (x,y,z)."""
        return self._distance_at(points_ras) <= HALF_DIAGONAL * voxel_mm

    def weights_at(self, points_ras: Array, voxel_mm: float) -> Array:
        """How much to compare there: 0 where it is blank and so near that differences reach it, 1 further away."""
        low = (HALF_DIAGONAL + 1.0) * voxel_mm
        return _ramp(self._distance_at(points_ras), low, low + _FADING_MM)

    def _distance_at(self, points_ras: Array) -> Array:
        if self.distance_mm is None:
            return np.full(points_ras.shape[1:], _FAR_MM, dtype=np.float32)
        coords = to_voxel_coords(points_ras, self.grid)
        distance: Array = sample(self.distance_mm[None], coords, _FAR_MM, self.threads)[0]
        return distance

    def stiffened(self, u_mm: Array, grid: Geometry) -> Array:
        """u (3,X,Y,Z) mm on ``grid``, made a rigid motion in every certain lesion, where x + u(x) is a lesion's point.

        The motion is the one nearest to u; it goes over into u between ``_RIGID_MM`` and ``_FREE_MM`` from the
        lesion. A rigid motion has determinant 1: the affine alone decides what becomes of the volume.
        """
        out = u_mm.copy()
        reach = float(np.abs(u_mm).max(initial=0.0))
        for stiff in self._stiff:
            box = _box(stiff > 0, self.grid, grid, reach)
            corner = Geometry(grid.shape, grid.affine).to_ras([part.start for part in box])
            affine = grid.affine.copy()
            affine[:3, 3] = corner
            x, u = affine_coords(tuple(p.stop - p.start for p in box), affine), out[(slice(None), *box)]
            s = self._at(stiff, x + u)
            near = s > 0.0  # nothing else ever comes in: the rest does not move
            x, u, s = x[:, near], u[:, near], s[near]
            moved = u
            # What lies in the lesion depends on the motion in turn.
            for index in range(_PASSES):
                s = self._at(stiff, x + moved) if index else s
                if float(s.sum()) > 1.0:
                    moved = u + s * (_rigid(x, u, s) - u)
            out[(slice(None), *box)][:, near] = moved
        return out

    def _at(self, values: Array, points_ras: Array) -> Array:
        """``values`` (X,Y,Z) at points (3,...), 0 outside the grid."""
        sampled: Array = sample(values[None], to_voxel_coords(points_ras, self.grid), 0.0, self.threads)[0]
        return sampled


def _rigid(x: Array, u: Array, weights: Array) -> Array:
    """The rigid displacement of points x (3,n) that is nearest to u (3,n) with ``weights``, to first order in u."""
    w = weights.astype(np.float64)
    w /= w.sum()
    # No matrix products: BLAS' sums depend on the number of its threads.
    center, shift = (np.einsum("an,n->a", values, w) for values in (x, u))
    r = x - center[:, None]
    moments = np.einsum("an,bn->ab", w * r, r)
    inertia = np.trace(moments) * np.eye(3) - moments
    turning = np.einsum("an,n->a", np.cross(r, u, axis=0), w)
    turn = np.linalg.lstsq(inertia, turning, rcond=1e-6)[0]
    motion: Array = ((_rotation(turn) - np.eye(3)) @ r + shift[:, None]).astype(np.float32)
    return motion


def _rotation(turn: FloatArray) -> FloatArray:
    """Rodrigues' formula: 3x3 from axis times angle."""
    angle = float(np.linalg.norm(turn))
    if angle < 1e-12:
        return np.eye(3)
    a, b, c = turn / angle
    cross = np.array([[0.0, -c, b], [c, 0.0, -a], [-b, a, 0.0]])
    result: FloatArray = np.eye(3) + np.sin(angle) * cross + (1.0 - np.cos(angle)) * cross @ cross
    return result


def _box(region: Mask, source: Geometry, target: Geometry, reach_mm: float) -> tuple[slice, slice, slice]:
    """The part of ``target`` from where ``reach_mm`` leads into ``region`` of ``source``."""
    index = np.argwhere(region)
    ends = np.stack([index.min(axis=0) - 1, index.max(axis=0) + 1])
    corners = np.stack(np.meshgrid(*ends.T, indexing="ij"), axis=-1).reshape(-1, 3)
    points = target.to_voxels(source.to_ras(corners))
    more = reach_mm * np.sqrt(3.0) / np.array(target.spacing)
    low = np.maximum(0, np.floor(points.min(axis=0) - more)).astype(int)
    high = np.minimum(target.shape, np.ceil(points.max(axis=0) + more) + 1).astype(int)
    a, b, c = (slice(int(i), max(int(i), int(j))) for i, j in zip(low, high, strict=True))
    return a, b, c


def _ramp(distance_mm: Array, low: float, high: float) -> Array:
    """0 up to ``low``, 1 from ``high`` on, smooth between."""
    t = np.clip((distance_mm - low) / (high - low), 0.0, 1.0)
    ramp: Array = (t * t * (3.0 - 2.0 * t)).astype(np.float32)
    return ramp


def _image(mask: Mask, spacing: Sequence[float]) -> tuple[Any, Any]:
    import SimpleITK as sitk

    image = sitk.GetImageFromArray(mask.transpose(2, 1, 0).astype(np.uint8))
    image.SetSpacing([float(s) for s in spacing])
    return sitk, image


def _distance_mm(mask: Mask, grid: Geometry) -> Array:
    """Distance of each voxel to the nearest one of ``mask``, 0 inside; far if the mask is empty."""
    if not mask.any():
        return np.full(mask.shape, _FAR_MM, dtype=np.float32)
    sitk, image = _image(mask, grid.spacing)
    distance = sitk.SignedMaurerDistanceMap(image, insideIsPositive=False, squaredDistance=False, useImageSpacing=True)
    array: Array = np.maximum(sitk.GetArrayFromImage(distance).transpose(2, 1, 0), 0.0).astype(np.float32)
    return array


def _labelled(mask: Mask) -> npt.NDArray[np.uint32]:
    """Connected regions, numbered from 1; voxels that touch at a corner are connected."""
    sitk, image = _image(mask, (1.0, 1.0, 1.0))
    labels: npt.NDArray[np.uint32] = sitk.GetArrayFromImage(sitk.ConnectedComponent(image, True)).transpose(2, 1, 0)
    return labels


def _components(mask: Mask) -> list[Mask]:
    labels = _labelled(mask)
    return [labels == index for index in range(1, int(labels.max()) + 1)]
