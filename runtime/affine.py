"""Affine pre-alignment of the moving to the fixed image with SimpleITK: Mattes mutual information.

Both images are first brought onto grids along the world's axes at half resolution, so the result does not
depend on how the files are oriented, and SimpleITK never sees a direction matrix: its physical space is our
RAS+ millimetres.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from jrs.errors import BadDataError, last_line
from jrs.geometry import FloatArray, Geometry
from jrs.runtime.sampling import resample_affine
from jrs.volume import Volume

_SPACING_MM = 2.0
_MARGIN_MM = 6.0


@dataclass(frozen=True)
class AffineResult:
    """``matrix`` is A, 4x4, RAS mm of a fixed point to RAS mm of the moving point.

    ``metric_before`` and ``metric_after`` are negative Mattes mutual information at the start (centres of mass
    aligned) and at the end; lower is better.
    """

    matrix: FloatArray
    metric_before: float
    metric_after: float


def register_affine(
    moving: Volume, fixed: Volume, kind: Literal["affine", "rigid"] = "affine", threads: int | None = None
) -> AffineResult:
    """Find the affine (12 parameters) or rigid (6) transform that aligns two images of the same head or brain.

    Settings (measured at 1.4 s a pair on 2 cores): moments start, half resolution, two levels, 20 % of the
    voxels on a regular grid with a fixed seed, gradient descent with line search.
    Raises BadDataError if the images do not overlap enough for a metric.
    """
    import SimpleITK as sitk

    fixed_image, moving_image = (
        _simpleitk_image(sitk, fixed, threads),
        _simpleitk_image(sitk, moving, threads),
    )
    start = sitk.CenteredTransformInitializer(
        fixed_image,
        moving_image,
        sitk.Euler3DTransform() if kind == "rigid" else sitk.AffineTransform(3),
        sitk.CenteredTransformInitializerFilter.MOMENTS,
    )
    method = sitk.ImageRegistrationMethod()
    method.SetMetricAsMattesMutualInformation(32)
    method.SetMetricSamplingStrategy(method.REGULAR)
    method.SetMetricSamplingPercentage(0.2, 42)
    method.SetInterpolator(sitk.sitkLinear)
    method.SetOptimizerAsGradientDescentLineSearch(
        learningRate=1.0, numberOfIterations=60, convergenceMinimumValue=1e-5, convergenceWindowSize=8
    )
    method.SetOptimizerScalesFromPhysicalShift()
    method.SetShrinkFactorsPerLevel([2, 1])
    method.SetSmoothingSigmasPerLevel([1.0, 0.0])
    if threads:
        method.SetNumberOfThreads(threads)
    method.SetInitialTransform(start, inPlace=True)
    try:
        before = float(method.MetricEvaluate(fixed_image, moving_image))
        method.Execute(fixed_image, moving_image)
    except RuntimeError as error:
        raise BadDataError(
            f"{moving.path or 'moving image'}: cannot be aligned to {fixed.path or 'the atlas'} ({last_line(error)}); "
            "check that both show the same part of the head, or pass --affine FILE"
        ) from error
    return AffineResult(_matrix_of(start), before, float(method.GetMetricValue()))


def _simpleitk_image(sitk: Any, volume: Volume, threads: int | None) -> Any:
    """The image on a grid along RAS axes that just holds its foreground, negative values cut off."""
    lower, upper = foreground_box(volume)
    lower, upper = lower - _MARGIN_MM, upper + _MARGIN_MM
    shape = np.maximum(8, np.ceil((upper - lower) / _SPACING_MM)).astype(int)
    grid = Geometry.aligned((int(shape[0]), int(shape[1]), int(shape[2])), (_SPACING_MM,) * 3, (lower + upper) / 2.0)
    data = resample_affine(volume.data[None], volume.geometry, grid, threads=threads)[0]
    image = sitk.GetImageFromArray(np.maximum(data, 0.0).transpose(2, 1, 0))
    image.SetSpacing([_SPACING_MM] * 3)
    image.SetOrigin(grid.affine[:3, 3].tolist())
    return image


def foreground_box(volume: Volume) -> tuple[FloatArray, FloatArray]:
    """RAS mm of the lower and upper corner of the box that holds the image's foreground."""
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
