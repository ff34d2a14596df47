"""How well two segmentations agree: Dice and the 95th percentile of the Hausdorff distance, mm."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

Mask = npt.NDArray[np.bool_]
Spacing = tuple[float, float, float]

MISSED_HD95_MM = 374.0
"""HD95 of a tumour region that only one of the two has, as BraTS 2023 sets it: the diagonal of its images."""


def dice(a: Mask, b: Mask) -> float:
    """``2 |A and B| / (|A| + |B|)``; 1 where both are empty, as BraTS has it."""
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
