"""Everything that is measured on one pair."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from jrs.evaluate.landmarks import landmark_errors
from jrs.evaluate.lesions import lesion_scores
from jrs.evaluate.overlap import dice, hd95, label_dice
from jrs.evaluate.subjects import CODES, Subject
from jrs.evaluate.transforms import SpatialTransform, warp_image, warp_labels
from jrs.fields import DisplacementField, jacobian_determinant
from jrs.runtime.labels import REGIONS
from jrs.volume import Volume

Classes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Score:
    """One number: which measure, of which region or structure (empty where of none), NaN where it has no meaning."""

    metric: str
    of: str
    value: float


def segmentation_scores(predicted: Classes, truth: Volume) -> Iterator[Score]:
    """Dice and HD95 of WT, TC and ET, over the image and lesion by lesion, on the native grid; volumes in ml."""
    for region, classes in REGIONS.items():
        ours, theirs = np.isin(predicted, classes), np.isin(truth.data, classes)
        yield Score("tumor_dice", region, dice(ours, theirs))
        yield Score("tumor_hd95_mm", region, hd95(ours, theirs, truth.geometry.spacing))
        lesions = lesion_scores(ours, theirs, truth.geometry.spacing)
        yield Score("lesion_dice", region, lesions.dice)
        yield Score("lesion_hd95_mm", region, lesions.hd95_mm)
        yield Score("lesions_found", region, lesions.found)
        yield Score("lesions_missed", region, lesions.missed)
        yield Score("lesions_invented", region, lesions.invented)
        yield Score("tumor_true_ml", region, float(theirs.sum()) * truth.geometry.voxel_volume_ml)


@dataclass(frozen=True, eq=False)
class PairData:
    """What every method is measured with.

    ``image`` and ``target`` are the moving and the fixed image of one modality, ``brain`` is the fixed one's
    foreground. ``tumor`` holds class indices on the moving image's grid, the truth or else the prediction;
    ``fixed_tumor`` likewise on the fixed image's grid, None where nothing is known.
    """

    moving: Subject
    fixed: Subject
    image: Volume
    target: Volume
    brain: npt.NDArray[np.bool_]
    tumor: Volume | None
    fixed_tumor: Classes | None


def registration_scores(transform: SpatialTransform, data: PairData) -> Iterator[Score]:
    """Structures, landmarks, Jacobian, tumour volume and similarity of one transform on one pair."""
    field = transform.dense(data.target.geometry)
    yield from structure_scores(transform, field, data)
    yield from _landmark_scores(transform, data)
    moved_tumor = None if data.tumor is None else warp_labels(data.tumor, field)
    yield from _volume_scores(moved_tumor, data)
    tumor = np.zeros(data.brain.shape, dtype=bool) if moved_tumor is None else moved_tumor > 0
    yield from _jacobian_scores(jacobian_determinant(field), data.brain, tumor)
    outside = data.brain & ~tumor
    if data.fixed_tumor is not None:
        outside &= data.fixed_tumor == 0
    moved = warp_image(data.image, field)
    yield Score("correlation_outside_tumor", "", correlation(moved, data.target.data, outside))


def structure_scores(
    transform: SpatialTransform, field: DisplacementField, data: PairData, surfaces: bool = True
) -> Iterator[Score]:
    """Dice and HD95 of each structure that both subjects have, on the fixed label map's grid, and their means.

    ``field`` is the transform on the fixed image's grid, used where the label map lies on it. ``surfaces`` False
    leaves HD95 out, which takes most of the time.
    """
    a, b = data.moving.structures, data.fixed.structures
    if a is None or b is None:
        return
    if b.geometry != field.geometry:
        field = transform.dense(b.geometry)
    moved = warp_labels(a, field)
    both = set(np.unique(a.data).tolist()) & set(np.unique(b.data).tolist())
    overlaps = label_dice(moved, b.data, CODES)
    found: dict[str, list[float]] = {"structure_dice": [], "structure_hd95_mm": []}
    for name, code in CODES.items():
        if code not in both:
            continue
        mask = moved == code
        # A structure that the transform made vanish has no surface; its Dice says so.
        measured = surfaces and mask.any()
        distance = hd95(mask, b.data == code, b.geometry.spacing) if measured else math.nan
        for metric, value in zip(found, (overlaps[name], distance), strict=True):
            found[metric].append(value)
            yield Score(metric, name, value)
    for metric, values in found.items():
        known = [value for value in values if not math.isnan(value)]
        if known:
            yield Score(metric, "mean", float(np.mean(known)))


def _landmark_scores(transform: SpatialTransform, data: PairData) -> Iterator[Score]:
    after, before = landmark_errors(transform, data.moving.landmarks, data.fixed.landmarks)
    if after.size:
        yield Score("landmark_median_mm", "", float(np.median(after)))
        yield Score("landmark_mean_mm", "", float(after.mean()))
        yield Score("landmark_before_mm", "", float(np.median(before)))
        yield Score("landmark_robustness", "", float((after < before).mean()))


def _volume_scores(moved: Classes | None, data: PairData) -> Iterator[Score]:
    if moved is None or data.tumor is None:
        return
    for region, classes in REGIONS.items():
        before = float(np.isin(data.tumor.data, classes).sum()) * data.tumor.geometry.voxel_volume_ml
        after = float(np.isin(moved, classes).sum()) * data.target.geometry.voxel_volume_ml
        yield Score("tumor_ml", region, before)
        yield Score("tumor_moved_ml", region, after)
        yield Score("tumor_volume_ratio", region, after / before if before else math.nan)


def _jacobian_scores(
    jacobian: npt.NDArray[np.float32], brain: npt.NDArray[np.bool_], tumor: npt.NDArray[np.bool_]
) -> Iterator[Score]:
    inside = jacobian[brain]
    yield Score("folding_percent", "", 100.0 * float((inside <= 0).mean()))
    # Standard deviation of log J, folds cut off, as Learn2Reg reports it.
    yield Score("jacobian_sd_log", "", float(np.log(np.clip(inside, 1e-9, 1e9)).std()))
    yield Score("jacobian_1st_percentile", "", float(np.percentile(inside, 1)))
    yield Score("jacobian_99th_percentile", "", float(np.percentile(inside, 99)))
    yield Score("jacobian_mean", "outside_tumor", _mean(jacobian[brain & ~tumor]))
    yield Score("jacobian_mean", "inside_tumor", _mean(jacobian[tumor]))


def _mean(values: npt.NDArray[np.float32]) -> float:
    return float(values.mean()) if values.size else math.nan


def correlation(a: npt.NDArray[np.float32], b: npt.NDArray[np.float32], where: npt.NDArray[np.bool_]) -> float:
    """Pearson's correlation of two images inside a mask; NaN where it has no meaning."""
    x, y = a[where].astype(np.float64), b[where].astype(np.float64)
    if x.size < 2 or x.std() == 0 or y.std() == 0:
        return math.nan
    return float(np.corrcoef(x, y)[0, 1])
