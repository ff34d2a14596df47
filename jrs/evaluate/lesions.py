"""Lesion-wise Dice and HD95 of the BraTS challenges: each lesion counts once, however small or large.

Lesions are the 26-connected components of a region. Reference and predicted lesions are paired one to one, so that
the sum of their Dice is largest, as the challenge's evaluation of 2025 pairs them. A reference lesion without a
partner and a predicted one without a partner score Dice 0 and HD95 373.13 mm. Lesions below 50 mm3 are left out: a
reference lesion with its partner, a predicted one if it has none (BraTS 2023, Saluja et al.).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from jrs.evaluate.overlap import MISSED_HD95_MM, Mask, Spacing, bounding_box, dice, hd95

SMALLEST_LESION_ML = 0.05


@dataclass(frozen=True)
class LesionScores:
    """Means over lesions, and how many were found, missed and invented.

    ``dice`` is 1 and ``hd95_mm`` 0 where there is no lesion and none was predicted.
    """

    dice: float
    hd95_mm: float
    found: int
    missed: int
    invented: int


def lesion_scores(predicted: Mask, reference: Mask, spacing: Spacing) -> LesionScores:
    """Compare two masks (X,Y,Z) lesion by lesion; ``spacing`` in mm."""
    ours, truth = _components(predicted), _components(reference)
    smallest = SMALLEST_LESION_ML * 1000.0 / float(np.prod(spacing))
    sizes = [np.bincount(part.ravel())[1:] for part in (ours, truth)]
    pairs = _pairs(ours, truth, sizes[0], sizes[1])
    overlaps, distances = [], []
    for index, of_ours in pairs.items():
        if sizes[1][index] >= smallest:
            a, b = ours == of_ours + 1, truth == index + 1
            box = bounding_box(a | b)
            overlaps.append(dice(a[box], b[box]))
            distances.append(hd95(a[box], b[box], spacing))
    found = len(overlaps)
    missed = sum(size >= smallest for index, size in enumerate(sizes[1]) if index not in pairs)
    taken = set(pairs.values())
    invented = sum(size >= smallest for index, size in enumerate(sizes[0]) if index not in taken)
    wrong = int(missed + invented)
    if found + wrong == 0:
        return LesionScores(1.0, 0.0, 0, 0, 0)
    count = found + wrong
    mean_dice = float(sum(overlaps)) / count
    mean_distance = (float(sum(distances)) + wrong * MISSED_HD95_MM) / count
    return LesionScores(mean_dice, mean_distance, found, int(missed), int(invented))


def _components(mask: Mask) -> npt.NDArray[np.int32]:
    from scipy.ndimage import generate_binary_structure, label

    components: npt.NDArray[np.int32] = label(mask, generate_binary_structure(3, 3))[0].astype(np.int32)
    return components


def _pairs(
    ours: npt.NDArray[np.int32],
    truth: npt.NDArray[np.int32],
    size_ours: npt.NDArray[np.int64],
    size_truth: npt.NDArray[np.int64],
) -> dict[int, int]:
    """Index of each reference lesion that has a partner, to the partner's index."""
    from scipy.optimize import linear_sum_assignment

    n, m = len(size_truth), len(size_ours)
    if n == 0 or m == 0:
        return {}
    shared = np.bincount((truth.astype(np.int64) * (m + 1) + ours).ravel(), minlength=(n + 1) * (m + 1))
    overlap = 2.0 * shared.reshape(n + 1, m + 1)[1:, 1:] / (size_truth[:, None] + size_ours[None, :])
    rows, columns = linear_sum_assignment(overlap, maximize=True)
    return {int(r): int(c) for r, c in zip(rows, columns, strict=True) if overlap[r, c] > 0}
