"""How well two segmentations agree: Dice and the 95th percentile of the Hausdorff distance, mm.

What an empty mask means: tumour regions follow BraTS (both empty is a perfect match, one empty the worst); an
anatomical structure that one of the two subjects lacks is not scored (NaN).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

Mask = npt.NDArray[np.bool_]
Distances = npt.NDArray[np.float64]
Spacing = tuple[float, float, float]

MISSED_HD95_MM = 373.13
"""HD95 where only one of two tumour regions is empty, as in BraTS: the diagonal of its 240x240x155 mm images."""


def dice(a: Mask, b: Mask) -> float:
    """``2 |A and B| / (|A| + |B|)``; 1 where both are empty."""
    total = int(np.count_nonzero(a)) + int(np.count_nonzero(b))
    return 1.0 if total == 0 else 2.0 * int(np.count_nonzero(a & b)) / total


def label_dice(moved: npt.NDArray[Any], fixed: npt.NDArray[Any], labels: Mapping[str, int]) -> dict[str, float]:
    """Dice of each label, all in one pass; NaN where both maps lack it."""
    size = max(labels.values()) + 1
    a = np.where((moved >= 0) & (moved < size), moved, 0).ravel()
    b = np.where((fixed >= 0) & (fixed < size), fixed, 0).ravel()
    both = np.bincount(a[a == b], minlength=size)
    total = np.bincount(a, minlength=size) + np.bincount(b, minlength=size)
    return {name: 2.0 * float(both[v]) / float(total[v]) if total[v] else math.nan for name, v in labels.items()}


def hd95(a: Mask, b: Mask, spacing: Spacing) -> float:
    """The 95th percentile of the Hausdorff distance, mm: the larger of the two directed percentiles.

    0 where both masks are empty, `MISSED_HD95_MM` where one is. Surfaces are the masks' own voxels that touch the
    outside by a face, as in MONAI; voxels at the image's border count as touching it.
    """
    if not a.any() or not b.any():
        return 0.0 if a.any() == b.any() else MISSED_HD95_MM
    there, back = surface_distances(a, b, spacing)
    return float(max(np.percentile(there, 95), np.percentile(back, 95)))


def surface_distances(a: Mask, b: Mask, spacing: Spacing) -> tuple[Distances, Distances]:
    """Distance in mm of each surface voxel of ``a`` to the surface of ``b``, and the other way; neither is empty."""
    from scipy.ndimage import distance_transform_edt

    box = bounding_box(a | b)
    borders = [surface(mask[box]) for mask in (a, b)]
    to_a, to_b = (distance_transform_edt(~border, sampling=spacing) for border in borders)
    return to_b[borders[0]], to_a[borders[1]]


def surface(mask: Mask) -> Mask:
    """Voxels of a mask that touch the outside by a face."""
    from scipy.ndimage import binary_erosion

    border: Mask = mask & ~binary_erosion(mask)
    return border


def bounding_box(mask: Mask) -> tuple[slice, slice, slice]:
    """The smallest box that holds a mask, which is not empty."""
    ends = [np.flatnonzero(mask.any(axis=tuple({0, 1, 2} - {axis}))) for axis in range(3)]
    x, y, z = (slice(int(along[0]), int(along[-1]) + 1) for along in ends)
    return x, y, z
