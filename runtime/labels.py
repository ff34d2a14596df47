"""From probabilities on the network's grid to labels on any other, sampled once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from jrs.errors import UsageError
from jrs.geometry import Geometry
from jrs.runtime.sampling import sample
from jrs.runtime.transform import to_voxel_coords

Array = npt.NDArray[np.float32]
Labels = npt.NDArray[np.uint8]

REGIONS: dict[str, tuple[int, ...]] = {"WT": (1, 2, 3), "TC": (1, 3), "ET": (3,)}
"""Classes of whole tumour, tumour core and enhancing tumour (0 background, 1 core, 2 oedema, 3 enhancing)."""

OWN_SCHEME = "bundle"
SCHEMES: dict[str, tuple[int, ...]] = {"brats2018": (0, 1, 2, 4), "brats2023": (0, 1, 2, 3)}
"""What BraTS writes the four classes as: enhancing tumour was 4 up to 2022 and is 3 from 2023 on."""


def label_scheme(values: Sequence[int], wanted: str = OWN_SCHEME) -> tuple[str, tuple[int, ...]]:
    """The name of a label scheme and the number of each class in it.

    ``values`` are the bundle's own, in the order background, core, oedema, enhancing; ``wanted`` is one of
    `SCHEMES`, or ``bundle`` to keep them. Raises UsageError for an unknown scheme, and for one that a bundle of
    other classes cannot have.
    """
    if wanted == OWN_SCHEME:
        own = tuple(int(value) for value in values)
        return next((name for name, numbers in SCHEMES.items() if numbers == own), OWN_SCHEME), own
    if wanted not in SCHEMES:
        known = ", ".join((*SCHEMES, OWN_SCHEME))
        raise UsageError(f"--label-scheme: unknown scheme {wanted!r}; choose from {known}")
    if len(values) != len(SCHEMES[wanted]):
        raise UsageError(
            f"--label-scheme {wanted}: has {len(SCHEMES[wanted])} classes and the bundle {len(values)}; leave it out"
        )
    return wanted, SCHEMES[wanted]


class LabelSampler:
    """The most probable class at points of the network's space.

    Interpolated probabilities have their maximum at the background wherever it is the maximum at all eight
    corners, so only points in the box around the other classes have to be sampled.
    """

    def __init__(self, probabilities: Array, grid: Geometry, values: Sequence[int], threads: int | None = None) -> None:
        self.probabilities, self.grid, self.threads = probabilities, grid, threads
        self.values = np.array(values, dtype=np.uint8)
        where = np.argwhere(probabilities.argmax(axis=0) > 0)
        self.box = None if where.size == 0 else (where.min(axis=0) - 1.0, where.max(axis=0) + 1.0)

    def at(self, points: Array) -> Labels:
        """Label values at points (3,x,y,z), RAS mm, as (x,y,z) uint8."""
        labels = np.full(points.shape[1:], self.values[0], dtype=np.uint8)
        if self.box is None:
            return labels
        coords = to_voxel_coords(points, self.grid)
        inside = np.ones(points.shape[1:], dtype=bool)
        for axis in range(3):
            inside &= (coords[axis] > self.box[0][axis]) & (coords[axis] < self.box[1][axis])
        if inside.any():
            chosen = np.ascontiguousarray(coords[:, inside])[:, :, None, None]
            classes = sample(self.probabilities, chosen, None, self.threads)[:, :, 0, 0].argmax(axis=0)
            labels[inside] = self.values[classes]
        return labels


def region_volumes_ml(labels: Labels, values: Sequence[int], geometry: Geometry) -> dict[str, float]:
    """Volume of each region, ml; ``values`` are the numbers that the classes are written as."""
    counts = np.bincount(labels.ravel(), minlength=256)
    return {
        region: float(sum(counts[values[c]] for c in classes if c < len(values)) * geometry.voxel_volume_ml)
        for region, classes in REGIONS.items()
    }
