"""From probabilities on the network's grid to labels on any other, sampled once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from jrs.errors import UsageError
from jrs.geometry import FloatArray, Geometry, apply_affine
from jrs.runtime.sampling import Sampled
from jrs.runtime.transform import Transform

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


def foreground(probabilities: Array) -> npt.NDArray[np.bool_]:
    """Where another class than the first is the most probable, (X,Y,Z): argmax(axis=0) > 0, faster."""
    mask: npt.NDArray[np.bool_] = np.zeros(probabilities.shape[1:], dtype=bool)
    for other in probabilities[1:]:
        mask |= other > probabilities[0]
    return mask


class LabelSampler:
    """The most probable class at the voxels of any grid.

    ``probabilities`` (K,X,Y,Z) lie on ``grid`` in the fixed image's space, ``affine`` A leads from there to the moving
    image's. Interpolated, they have their maximum at the background wherever it is the maximum at all eight
    corners, so only voxels in the box around the other classes have to be sampled.
    """

    def __init__(
        self,
        probabilities: Array,
        grid: Geometry,
        affine: FloatArray,
        values: Sequence[int],
        threads: int | None = None,
    ) -> None:
        self._values = np.array(values, dtype=np.uint8)
        self._grid = Geometry(grid.shape, affine @ grid.affine)
        self._threads = threads
        where = np.argwhere(foreground(probabilities))
        self._sampled = Sampled(probabilities, threads) if where.size else None
        ends = np.stack([where.min(axis=0) - 1, where.max(axis=0) + 1]) if where.size else np.zeros((2, 3))
        self._corners = self._grid.to_ras(np.stack(np.meshgrid(*ends.T, indexing="ij"), axis=-1).reshape(-1, 3))

    def native(self, target: Geometry) -> Labels:
        """Label values (x,y,z) on a grid in the moving image's space."""
        return self._on(target, Transform(np.eye(4), None, self._threads))

    def moved(self, target: Geometry, transform: Transform) -> Labels:
        """Label values (x,y,z) at A(x + u(x)) for x on a grid in the fixed image's space."""
        return self._on(target, transform)

    def _on(self, target: Geometry, transform: Transform) -> Labels:
        labels = np.full(target.shape, self._values[0], dtype=np.uint8)
        if self._sampled is None:
            return labels
        # Where x has to lie for A(x + u(x)) to lie within the corners.
        index = target.to_voxels(apply_affine(np.linalg.inv(transform.affine), self._corners))
        u = transform.displacement
        reach = 0.0 if u is None else float(np.abs(u.vectors_mm).max())
        more = reach * np.sqrt(3.0) / np.array(target.spacing)
        low = np.maximum(0, np.floor(index.min(axis=0) - more)).astype(int)
        high = np.minimum(target.shape, np.ceil(index.max(axis=0) + more) + 1).astype(int)
        box = slice(low[0], high[0]), slice(low[1], high[1]), slice(low[2], high[2])
        if (high > low).all():
            labels[box] = self._values[transform.pull(self._sampled, self._grid, target.part(box)).argmax(axis=0)]
        return labels


def region_volumes_ml(labels: Labels, values: Sequence[int], geometry: Geometry) -> dict[str, float]:
    """Volume of each region, ml; ``values`` are the numbers that the classes are written as."""
    counts = [0, *(int(np.count_nonzero(labels == value)) for value in values[1:])]
    return {
        region: float(sum(counts[c] for c in classes if c < len(values)) * geometry.voxel_volume_ml)
        for region, classes in REGIONS.items()
    }
