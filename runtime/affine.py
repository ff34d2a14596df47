"""Affine pre-alignment of the moving to the fixed image by mutual information.

Both images are first brought onto grids along the world's axes at half resolution, from their canonical order of
axes, so the result does not depend on how the files are stored.

A search over rotations on 8 mm copies gives the start of an ascent at 4 mm and then at 2 mm. How the images overlap in
the end is measured; where it is poor, further starts all over the sphere are tried, and what is still poor is said.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from jrs.errors import BadDataError
from jrs.geometry import FloatArray, Geometry
from jrs.runtime.affine_climb import Metric, Steps, climb
from jrs.runtime.affine_search import Block, Quality, quality, starts
from jrs.runtime.sampling import resample_affine
from jrs.volume import Volume

Kind = Literal["affine", "rigid"]

POOR_OVERLAP = 0.75
"""A Dice score of the foregrounds below this is no alignment of two images of the same part of a head."""
_SPACING_MM = 2.0
_FEWEST_VOXELS = 8
_LARGEST_MM = 1000.0
"""No head reaches so far; a header of wrong spacings does, and would fill the memory."""
_MARGIN_MM = 6.0
_COARSE = 4
_MEASURED = 2
_SAMPLES = 100_000
_LEVELS = (Steps(first_mm=4.0, last_mm=0.1), Steps(first_mm=1.0, last_mm=0.02))
"""The ascent on blocks averaged by ``_MEASURED``, and on the blocks themselves."""
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
    levels = [
        (Metric(*pair, every=max(1, pair[1].data.size // _SAMPLES), threads=threads), steps)
        for pair, steps in zip(((measured_a, measured_b), (a, b)), _LEVELS, strict=True)
    ]
    found: list[tuple[Quality, FloatArray]] = []
    for everywhere, count in ((False, 1), (True, _FURTHER_STARTS)):
        for start in starts(coarse_a, coarse_b, kind == "affine", everywhere, count):
            matrix = start
            try:
                for metric, steps in levels:
                    matrix = climb(metric, matrix, kind == "rigid", steps)
            except ValueError:
                continue
            judged = quality(measured_a, measured_b, matrix)
            sizes = np.linalg.svd(matrix[:3, :3], compute_uv=False)
            if sizes.min() > 1.0 / _LARGEST_SCALE and sizes.max() < _LARGEST_SCALE and judged.overlap > _NO_OVERLAP:
                found.append((judged, matrix))
        if found and max(q.overlap for q, _ in found) >= POOR_OVERLAP:
            break
    if not found:
        raise BadDataError(
            f"{moving.path or 'moving image'}: cannot be aligned to {fixed.path or 'the atlas'} (they hardly overlap); "
            "check that both show the same part of the head, or pass --affine FILE"
        )
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


def block_of(volume: Volume, threads: int | None) -> Block:
    """The image at half resolution on a grid along RAS axes that just holds its foreground, negatives cut off."""
    volume = volume.canonical
    lower, upper = _box(volume)
    extent = (upper - lower).max()
    if extent > _LARGEST_MM:
        raise BadDataError(
            f"{volume.path or 'image'}: its foreground spans {extent:.0f} mm; check the voxel size in its header"
        )
    lower, upper = lower - _MARGIN_MM, upper + _MARGIN_MM
    shape = np.maximum(8, np.ceil((upper - lower) / _SPACING_MM)).astype(int)
    grid = Geometry.aligned((int(shape[0]), int(shape[1]), int(shape[2])), (_SPACING_MM,) * 3, (lower + upper) / 2.0)
    data = resample_affine(volume.data[None], volume.geometry, grid, threads=threads)[0]
    block = Block(np.maximum(data, 0.0), grid)
    # What the search works on: as small as that, no axes can be told from one another.
    if min(np.count_nonzero(block.averaged(n).mask) for n in (1, _MEASURED, _COARSE)) < _FEWEST_VOXELS:
        raise BadDataError(f"{volume.path or 'image'}: has next to no foreground; check the file in a viewer")
    return block


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
