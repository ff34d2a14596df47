"""What is measured of a result: volumes, determinants, similarity, and what a user should be told of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from jrs.fields import DisplacementField, jacobian_determinant
from jrs.geometry import FloatArray
from jrs.runtime import native
from jrs.runtime.labels import foreground
from jrs.runtime.preprocess import NetworkInput
from jrs.runtime.sampling import in_threads

Array = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]
Volumes = Mapping[str, float]

KEPT_PERCENT = 95.0
"""A tumour that the deformation leaves this much of its volume has not been shrunk."""
SMALL_ML = 0.1
"""Below this volume, a hundred voxels of 1 mm, counting voxels is too coarse for a verdict."""
FOLDING_PERCENT = 0.5
_WORSE = 0.005  # of correlation
_FEWEST = 100  # voxels for a correlation
_PIECE = 1 << 14
_FLAT = 1e-12  # of a sum of squares: what rounding leaves of no variance


def jacobian_map(field: DisplacementField, threads: int | None = None) -> Array:
    """``jrs.fields.jacobian_determinant``, by the compiled kernels where they are there."""
    if not native.available():
        return jacobian_determinant(field)
    vectors, linear = np.ascontiguousarray(field.vectors_mm, dtype=np.float32), field.geometry.affine[:3, :3]
    out = np.empty(field.geometry.shape, dtype=np.float32)

    def work(start: int, stop: int) -> None:
        native.jacobian((start, stop), vectors, linear, out)

    in_threads(work, out.shape[0], threads, out.size)
    return out


def volumes_after_affine(native_ml: Volumes, affine: FloatArray) -> dict[str, float]:
    """What the affine alone makes of volumes, ml: A maps atlas to case, so V / |det A|."""
    scale = abs(float(np.linalg.det(affine[:3, :3])))
    return {region: volume / scale for region, volume in native_ml.items()}


def ratios(part: Volumes, whole: Volumes) -> dict[str, float | None]:
    """``part / whole`` by region; None where there is nothing to divide by."""
    return {region: part[region] / whole[region] if whole[region] > 0.0 else None for region in whole}


def volume_verdict(volumes_ml: Mapping[str, Volumes] | None, one_head: bool = False) -> dict[str, Any]:
    """Did registration shrink the tumour? Whole tumour on the atlas, against what the affine alone makes of it.

    ``volumes_ml`` has ``native``, ``affine`` and ``moved``; ``one_head``: both images are taken for the same patient's,
    whose tumour may have changed between them. ``answer`` is one of ``kept``, ``shrunk``, ``grown``,
    ``too_small``, ``no_tumor``, ``not_computed``; ``kept_percent`` is None without a ratio; ``text`` says it.
    """
    if volumes_ml is None:
        return _verdict("not_computed", None, "Not computed: no tumour volumes.")
    native, affine, moved = (volumes_ml[where]["WT"] for where in ("native", "affine", "moved"))
    if not native > 0.0:
        return _verdict("no_tumor", None, "No tumour was segmented.")
    kept = 100.0 * moved / affine
    if min(native, affine) < SMALL_ML:
        return _verdict("too_small", kept, f"The tumour of {native:.2f} ml is too small for an answer.")
    if kept < KEPT_PERCENT:
        text = f"Yes: the deformation took {100.0 - kept:.1f} % of the whole tumour’s volume.{_MAY_BE_TRUE * one_head}"
        return _verdict("shrunk", kept, text)
    if kept > 10_000.0 / KEPT_PERCENT:
        text = f"No: the deformation enlarged the whole tumour to {kept:.1f} % of its volume.{_MAY_BE_TRUE * one_head}"
        return _verdict("grown", kept, text)
    return _verdict("kept", kept, f"No: the deformation left the whole tumour at {kept:.1f} % of its volume.")


_MAY_BE_TRUE = " Both images were taken for one patient’s: that may be what became of it."


def _verdict(answer: str, kept_percent: float | None, text: str) -> dict[str, Any]:
    return {"answer": answer, "kept_percent": kept_percent, "text": text}


def jacobian_summary(jacobian: Array, brain: Mask, labels: npt.NDArray[np.uint8] | None) -> dict[str, Any]:
    """Determinants of the total transform in the atlas's brain, inside the moved tumour and outside it.

    ``inside`` and ``outside`` have mean, sd, p5 and p95 of the determinant, and the same of its natural
    logarithm where it is positive; None where there is no voxel.
    """
    tumor = np.zeros(brain.shape, dtype=bool) if labels is None else labels > 0
    inside, outside = _statistics(jacobian[tumor]), _statistics(jacobian[brain & ~tumor])
    return {
        "folding_percent": float(100.0 * (jacobian[brain] <= 0).mean()) if brain.any() else 0.0,
        "inside_tumor": None if inside is None else inside["mean"],
        "outside_tumor": None if outside is None else outside["mean"],
        "inside": inside,
        "outside": outside,
    }


def _statistics(values: Array) -> dict[str, float | None] | None:
    if values.size == 0:
        return None
    found: dict[str, float | None] = {}
    for prefix, of in (("", values), ("log_", np.log(values[values > 0]))):
        low, high = np.percentile(of, (5.0, 95.0)) if of.size else (None, None)
        found |= {
            f"{prefix}mean": float(of.mean(dtype=np.float64)) if of.size else None,
            f"{prefix}sd": float(of.std(dtype=np.float64)) if of.size else None,
            f"{prefix}p5": None if low is None else float(low),
            f"{prefix}p95": None if high is None else float(high),
        }
    return found


def similarity(
    moving: NetworkInput,
    fixed: NetworkInput,
    moved: Array,
    probabilities: Array | None,
    channels: Sequence[str],
) -> dict[str, Any] | None:
    """Pearson's correlation with the fixed image inside its brain and outside the tumour, on the network's grid.

    ``before`` is after the affine alone, ``after`` is after the deformation; both of the first shared modality,
    and of every one under ``modalities``. None if no modality is shared or nothing but tumour is left.
    """
    outside = None if probabilities is None else ~foreground(probabilities)
    found = {}
    for index, channel in enumerate(channels):
        if not (moving.present[index] and fixed.present[index]):
            continue
        where = fixed.tensor[0, index] != 0
        if outside is not None:
            where &= outside
        if where.sum() < _FEWEST:
            continue
        target = fixed.tensor[0, index][where]
        images = {"before": moving.tensor[0, index], "after": moved[index]}
        found[channel] = {when: _correlation(image[where], target) for when, image in images.items()}
    if not found:
        return None
    first = next(iter(found))
    return {"measure": "correlation", "modality": first, **found[first], "modalities": found}


def _correlation(a: Array, b: Array) -> float | None:
    """Pearson's, summed in pieces: copies of whole volumes in double precision take longer than the sums."""
    sums = np.zeros(5)
    for start in range(0, a.size, _PIECE):
        x, y = (values[start : start + _PIECE].astype(np.float64) for values in (a, b))
        sums += x.sum(), y.sum(), x @ x, y @ y, x @ y
    total_a, total_b, aa, bb, ab = sums
    spread_a, spread_b = aa - total_a**2 / a.size, bb - total_b**2 / a.size
    if not (spread_a > _FLAT * aa and spread_b > _FLAT * bb):
        return None
    return round(float((ab - total_a * total_b / a.size) / np.sqrt(spread_a * spread_b)), 4)


def warnings_of(
    jacobian: Mapping[str, Any],
    likeness: Mapping[str, Any] | None,
    verdict: Mapping[str, Any],
    one_head: bool = False,
) -> list[str]:
    """What in the numbers a user should look at, one line each."""
    found = []
    if jacobian["folding_percent"] > FOLDING_PERCENT:
        found.append(f"the transform folds in {jacobian['folding_percent']:.2f} % of the brain")
    if verdict["answer"] == "shrunk":
        where = "; both images were taken for one patient's, so it may be so" if one_head else ""
        found.append(f"the deformation shrank the whole tumour to {verdict['kept_percent']:.1f} % of its volume{where}")
    for modality, value in ({} if likeness is None else likeness["modalities"]).items():
        before, after = value["before"], value["after"]
        if before is not None and after is not None and after < before - _WORSE:
            found.append(f"{modality}: the deformation made it less like the atlas, {before:.3f} to {after:.3f}")
    return found
