"""Dice, HD95 and lesion-wise scores against SimpleITK, MONAI and masks counted by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from jrs.evaluate.lesions import lesion_scores
from jrs.evaluate.overlap import MISSED_HD95_MM, dice, hd95, label_dice, surface_distances

SPACING = (1.5, 0.8, 3.0)


@pytest.fixture(scope="module")
def blobs() -> tuple[Any, Any]:
    """Two overlapping, irregular masks on a grid of 28x40x18."""
    from scipy.ndimage import gaussian_filter

    noise = np.random.default_rng(4).standard_normal((2, 28, 40, 18))
    x = np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in (28, 40, 18)), indexing="ij"))
    ball = 0.5 - np.sqrt((x**2).sum(axis=0))
    a, b = (ball + 0.6 * gaussian_filter(n, 2.0) * 8 > 0 for n in noise)
    return a, np.roll(b, 2, axis=1)


def sitk_pair(masks: tuple[Any, Any]) -> list[Any]:
    import SimpleITK as sitk

    images = []
    for mask in masks:
        image = sitk.GetImageFromArray(mask.astype(np.uint8).transpose(2, 1, 0))
        image.SetSpacing(SPACING)
        images.append(image)
    return images


def test_dice_is_simpleitks(blobs: tuple[Any, Any]) -> None:
    import SimpleITK as sitk

    measure = sitk.LabelOverlapMeasuresImageFilter()
    measure.Execute(*sitk_pair(blobs))
    assert dice(*blobs) == pytest.approx(measure.GetDiceCoefficient(), abs=1e-12)
    assert 0.3 < dice(*blobs) < 0.95


def test_the_largest_surface_distance_is_simpleitks_hausdorff_distance(blobs: tuple[Any, Any]) -> None:
    import SimpleITK as sitk

    measure = sitk.HausdorffDistanceImageFilter()
    # From whole mask to whole mask: the furthest voxel lies outside the other one, where both are the same.
    measure.Execute(*sitk_pair(blobs))
    there, back = surface_distances(*blobs, SPACING)
    assert max(there.max(), back.max()) == pytest.approx(measure.GetHausdorffDistance(), rel=1e-6)


def test_hd95_is_monais(blobs: tuple[Any, Any]) -> None:
    import torch
    from monai.metrics import compute_hausdorff_distance

    a, b = (torch.from_numpy(mask)[None, None].float() for mask in blobs)
    expected = compute_hausdorff_distance(a, b, include_background=True, percentile=95, spacing=SPACING)
    assert hd95(*blobs, SPACING) == pytest.approx(float(expected), rel=1e-5)
    assert hd95(*blobs, SPACING) == pytest.approx(hd95(*blobs[::-1], SPACING))


def test_hd95_of_shifted_boxes_is_the_shift_in_mm() -> None:
    a = np.zeros((20, 20, 20), dtype=bool)
    a[5:9, 5:9, 5:9] = True
    assert hd95(a, np.roll(a, 3, axis=2), (1.0, 1.0, 2.0)) == 6.0
    assert hd95(a, a, SPACING) == 0.0


def test_empty_regions_are_what_brats_says() -> None:
    empty, full = np.zeros((4, 4, 4), dtype=bool), np.ones((4, 4, 4), dtype=bool)
    assert (dice(empty, empty), dice(empty, full), dice(full, full)) == (1.0, 0.0, 1.0)
    assert (hd95(empty, empty, SPACING), hd95(empty, full, SPACING)) == (0.0, MISSED_HD95_MM)
    assert round(math.sqrt(240**2 + 240**2 + 155**2), 2) == MISSED_HD95_MM


def test_label_dice_counts_each_label_once_for_all() -> None:
    moved = np.array([0, 1, 1, 2, 2, 2, 900])
    fixed = np.array([0, 1, 2, 2, 2, 0, 3])
    found = label_dice(moved, fixed, {"one": 1, "two": 2, "three": 3, "four": 4})
    assert found["one"] == pytest.approx(2 * 1 / 3)
    assert found["two"] == pytest.approx(2 * 2 / 6)
    assert found["three"] == 0.0
    assert math.isnan(found["four"])


def boxes(*corners: tuple[int, int]) -> Any:
    """Cubes (corner along every axis, side) in an image of 40 voxels a side."""
    mask = np.zeros((40, 40, 40), dtype=bool)
    for corner, side in corners:
        mask[(slice(corner, corner + side),) * 3] = True
    return mask


def test_lesions_count_once_each() -> None:
    # A large lesion found whole, one of 64 voxels missed, one of 64 invented.
    scores = lesion_scores(boxes((2, 10), (30, 4)), boxes((2, 10), (20, 4)), (1.0, 1.0, 1.0))
    assert (scores.found, scores.missed, scores.invented) == (1, 1, 1)
    assert scores.dice == pytest.approx(1 / 3)
    assert scores.hd95_mm == pytest.approx(2 * MISSED_HD95_MM / 3)


def test_lesions_are_paired_one_to_one_for_the_largest_sum() -> None:
    # One prediction over two lesions: it belongs to the larger one, the other is missed.
    truth = boxes((2, 6)) | boxes((12, 4))
    predicted = truth.copy()
    predicted[8:12, 8:12, 8:12] = True  # the bridge
    scores = lesion_scores(predicted, truth, (1.0, 1.0, 1.0))
    assert (scores.found, scores.missed, scores.invented) == (1, 1, 0)
    assert scores.dice == pytest.approx(2 * 216 / (216 + 216 + 64 + 64) / 2)


def test_lesions_below_fifty_cubic_millimetres_are_left_out() -> None:
    truth, predicted = boxes((2, 10), (20, 3)), boxes((2, 10), (30, 3))
    assert lesion_scores(predicted, truth, (1.0, 1.0, 1.0)).dice == 1.0
    # 27 voxels of 2 mm3 are 54 mm3.
    assert lesion_scores(predicted, truth, (1.0, 1.0, 2.0)).dice == pytest.approx(1 / 3)


def test_no_lesion_and_none_predicted_is_right() -> None:
    nothing = boxes()
    scores = lesion_scores(nothing, nothing, SPACING)
    assert (scores.dice, scores.hd95_mm, scores.found) == (1.0, 0.0, 0)
    assert lesion_scores(boxes((2, 9)), nothing, SPACING).dice == 0.0
