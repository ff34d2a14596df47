"""Affine pre-alignment of the moving to the fixed image with SimpleITK: Mattes mutual information.

Both images are first brought onto grids along the world's axes at half resolution, from their canonical order of
axes, so the result does not depend on how the files are stored, and SimpleITK never sees a direction matrix: its
physical space is our RAS+ millimetres.

A search over rotations on 8 mm copies gives the start. How the images overlap in the end is measured; where it is
poor, further starts all over the sphere are tried, and what is still poor is said.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from jrs.errors import BadDataError, last_line
from jrs.geometry import FloatArray, Geometry
from jrs.runtime.affine_search import Block, Quality, quality, starts
from jrs.runtime.sampling import resample_affine
from jrs.volume import Volume

Kind = Literal["affine", "rigid"]

POOR_OVERLAP = 0.75
"""A Dice score of the foregrounds below this is no alignment of two images of the same part of a head."""
_SPACING_MM = 2.0
_MARGIN_MM = 6.0
_COARSE = 4
_MEASURED = 2
_FURTHER_STARTS = 3
_NO_OVERLAP = 0.2
_LARGEST_SCALE = 2.5  # between the heads of a newborn and of an adult: 1.6


@dataclass(frozen=True)
class AffineResult:
    """``matrix`` is A, 4x4, RAS mm of a fixed point to RAS mm of the moving point.

    ``before`` is how the images overlap as they lie in the world, ``after`` how they do under A. ``starts`` is
    from how many places the optimiser set out, ``warning`` one line where the outcome is poor.
    """

    matrix: FloatArray
    before: Quality
    after: Quality
    starts: int
    warning: str | None


def register_affine(
    moving: Volume,
    fixed: Volume,
    kind: Kind = "affine",
    threads: int | None = None,
    fixed_block: Block | None = None,
) -> AffineResult:
    """Find the affine (12 parameters) or rigid (6) transform that aligns two images of the same head or brain.

    ``fixed_block`` is ``block_of(fixed)`` where it is known already.
    Raises BadDataError if the images do not overlap enough for a metric.
    """
    a, b = block_of(moving, threads), fixed_block or block_of(fixed, threads)
    coarse_a, coarse_b = a.averaged(_COARSE), b.averaged(_COARSE)
    measured_a, measured_b = a.averaged(_MEASURED), b.averaged(_MEASURED)
    before = quality(measured_a, measured_b, np.eye(4))
    found: list[tuple[Quality, FloatArray]] = []
    reason: Exception | None = None
    for everywhere, count in ((False, 1), (True, _FURTHER_STARTS)):
        for start in starts(coarse_a, coarse_b, kind == "affine", everywhere, count):
            try:
                matrix = _optimised(a, b, start, kind, threads)
            except RuntimeError as error:
                reason = error
                continue
            judged = quality(measured_a, measured_b, matrix)
            sizes = np.linalg.svd(matrix[:3, :3], compute_uv=False)
            if sizes.min() > 1.0 / _LARGEST_SCALE and sizes.max() < _LARGEST_SCALE and judged.overlap > _NO_OVERLAP:
                found.append((judged, matrix))
        if found and max(q.overlap for q, _ in found) >= POOR_OVERLAP:
            break
    if not found:
        raise BadDataError(
            f"{moving.path or 'moving image'}: cannot be aligned to {fixed.path or 'the atlas'} "
            f"({'they hardly overlap' if reason is None else last_line(reason)}); "
            "check that both show the same part of the head, or pass --affine FILE"
        ) from reason
    after, matrix = max(found, key=lambda pair: pair[0].mutual_information)
    return AffineResult(matrix, before, after, len(found), poor_alignment(before, after))


def judge_affine(
    moving: Volume, fixed: Volume, matrix: FloatArray, threads: int | None = None, fixed_block: Block | None = None
) -> tuple[Quality, Quality, str | None]:
    """How two images overlap as they lie and under a given A, and one line where that is poor."""
    blocks = block_of(moving, threads), fixed_block or block_of(fixed, threads)
    a, b = (block.averaged(_MEASURED) for block in blocks)
    before, after = quality(a, b, np.eye(4)), quality(a, b, matrix)
    return before, after, poor_alignment(before, after)


def poor_alignment(before: Quality, after: Quality) -> str | None:
    """One line for the report if an alignment should not be trusted unseen."""
    if after.overlap < POOR_OVERLAP:
        what = f"the foregrounds overlap by {after.overlap:.2f} (Dice)"
    elif after.mutual_information < 0.95 * before.mutual_information:
        what = (
            f"the images fit worse than as they lie (mutual information {after.mutual_information:.3f}, "
            f"before {before.mutual_information:.3f})"
        )
    else:
        return None
    return (
        f"the affine alignment is poor, {what}; look at the moved image, check that both images show the same part "
        "of the head with or without its skull, or pass --affine FILE"
    )


def _optimised(moving: Block, fixed: Block, start: FloatArray, kind: Kind, threads: int | None) -> FloatArray:
    """Climb from ``start`` in two levels of resolution; RuntimeError where the images cease to overlap."""
    import SimpleITK as sitk

    fixed_image, moving_image = _simpleitk_image(sitk, fixed), _simpleitk_image(sitk, moving)
    transform: Any = sitk.Euler3DTransform() if kind == "rigid" else sitk.AffineTransform(3)
    center = fixed.center_of_mass
    transform.SetCenter(center.tolist())
    transform.SetMatrix(start[:3, :3].ravel().tolist())
    transform.SetTranslation((start[:3, :3] @ center + start[:3, 3] - center).tolist())
    method = sitk.ImageRegistrationMethod()
    method.SetMetricAsMattesMutualInformation(32)
    method.SetMetricSamplingStrategy(method.REGULAR)
    method.SetMetricSamplingPercentagePerLevel([0.4, 0.1], 42)
    method.SetInterpolator(sitk.sitkLinear)
    # One evaluation a step; a line search takes five times the time to the same place. Steps are in mm.
    method.SetOptimizerAsRegularStepGradientDescent(
        learningRate=4.0,
        minStep=0.01,
        numberOfIterations=100,
        relaxationFactor=0.75,
        gradientMagnitudeTolerance=1e-6,
    )
    method.SetOptimizerScalesFromPhysicalShift()
    method.SetShrinkFactorsPerLevel([2, 1])
    method.SetSmoothingSigmasPerLevel([1.0, 0.0])
    if threads:
        method.SetNumberOfThreads(threads)
    method.SetInitialTransform(transform, inPlace=True)
    method.Execute(fixed_image, moving_image)
    return _matrix_of(transform)


def block_of(volume: Volume, threads: int | None) -> Block:
    """The image at half resolution on a grid along RAS axes that just holds its foreground, negatives cut off."""
    volume = volume.canonical
    lower, upper = _box(volume)
    lower, upper = lower - _MARGIN_MM, upper + _MARGIN_MM
    shape = np.maximum(8, np.ceil((upper - lower) / _SPACING_MM)).astype(int)
    grid = Geometry.aligned((int(shape[0]), int(shape[1]), int(shape[2])), (_SPACING_MM,) * 3, (lower + upper) / 2.0)
    data = resample_affine(volume.data[None], volume.geometry, grid, threads=threads)[0]
    return Block(np.maximum(data, 0.0), grid)


def _simpleitk_image(sitk: Any, block: Block) -> Any:
    image = sitk.GetImageFromArray(block.data.transpose(2, 1, 0))
    image.SetSpacing(list(block.grid.spacing))
    image.SetOrigin(block.grid.affine[:3, 3].tolist())
    return image


def foreground_box(volume: Volume) -> tuple[FloatArray, FloatArray]:
    """RAS mm of the lower and upper corner of the box that holds the image's foreground."""
    return _box(volume.canonical)


def _box(volume: Volume) -> tuple[FloatArray, FloatArray]:
    mask = volume.foreground()
    ends = []
    for axis in range(3):
        others = tuple(a for a in range(3) if a != axis)
        along = np.flatnonzero(mask.sum(axis=others) > 20)
        if along.size == 0:
            raise BadDataError(f"{volume.path or 'image'}: has no foreground; check the file in a viewer")
        ends.append((along[0], along[-1]))
    corners = np.stack(np.meshgrid(*ends, indexing="ij"), axis=-1).reshape(-1, 3)
    points = volume.geometry.to_ras(corners)
    return points.min(axis=0), points.max(axis=0)


def _matrix_of(transform: Any) -> FloatArray:
    """ITK's centred form y = M (x - c) + c + t as one 4x4 matrix."""
    linear = np.array(transform.GetMatrix()).reshape(3, 3)
    center, translation = np.array(transform.GetCenter()), np.array(transform.GetTranslation())
    matrix = np.eye(4)
    matrix[:3, :3] = linear
    matrix[:3, 3] = center + translation - linear @ center
    return matrix
