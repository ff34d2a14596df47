"""An image as the refinement takes it: on the grids of its levels, normalised, the tumours blank."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from jrs.errors import BadDataError
from jrs.geometry import FloatArray, Geometry
from jrs.runtime.affine import foreground_box
from jrs.runtime.sampling import affine_coords, resample_affine
from jrs.runtime.tumors import Tumors
from jrs.volume import Volume, foreground_mask

Array = npt.NDArray[np.float32]

SPACINGS_MM = (4.0, 2.0, 4.0 / 3.0, 1.0)
"""Of the levels, coarse to fine."""
_MARGIN_MM = 6.0
_WORTHWHILE = 0.6
"""A level whose voxels are smaller than this part of the images' own is left out."""


@dataclass(frozen=True, eq=False)
class Pyramid:
    """One image on the grid of each level of a pair, from coarse to fine.

    ``tumors`` lie in the grids' space, before any displacement; ``sources`` are the grids of the files. ``make`` gives
    the image at a level, and at whatever others come of it, when it is first asked for.
    """

    grids: tuple[Geometry, ...]
    tumors: Tumors
    sources: tuple[Geometry, ...]
    affine: FloatArray
    modalities: tuple[str, ...]
    make: Callable[[int], Mapping[int, Array]]
    _made: dict[int, Array] = field(default_factory=dict)

    def image(self, level: int) -> Array:
        """At a level, (1,C,X,Y,Z), unit variance, the tumors blank."""
        if level not in self._made:
            self._made.update(self.make(level))
        return self._made[level]


def level_grids(moving: Volume, fixed: Volume, orientation: str) -> tuple[Geometry, ...]:
    """The grids of the levels worth having for two images, coarse to fine, around the fixed image's brain."""
    lower, upper = foreground_box(fixed)
    center, extent = (lower + upper) / 2.0, upper - lower + 2.0 * _MARGIN_MM
    native = max(float(np.cbrt(np.prod(volume.geometry.spacing))) for volume in (fixed, moving))
    spacings = tuple(spacing for spacing in SPACINGS_MM if spacing >= _WORTHWHILE * native) or SPACINGS_MM[:1]
    # The sides of the world's axes in the order of the array's, and even: a coarser grid can hold voxels two by two.
    axes = [next(i for i, pair in enumerate(("RL", "AP", "SI")) if letter in pair) for letter in orientation]
    grids: list[Geometry] = []
    for spacing in reversed(spacings):
        if grids and np.isclose(spacing, 2.0 * grids[-1].spacing[0]):
            grids.append(_halved(grids[-1]))
            continue
        a, b, c = (2 * int(np.ceil(extent[axis] / (2.0 * spacing))) for axis in axes)
        grids.append(Geometry.aligned((a, b, c), (spacing,) * 3, center, orientation))
    return tuple(reversed(grids))


def _halved(grid: Geometry) -> Geometry:
    """The grid whose voxels are eight of this one's."""
    a, b, c = (n // 2 for n in grid.shape)
    affine = grid.affine.copy()
    affine[:3, :3] *= 2.0
    affine[:3, 3] = grid.to_ras((0.5, 0.5, 0.5))
    return Geometry((a, b, c), affine)


def pyramid(
    images: Mapping[str, Volume],
    modalities: Sequence[str],
    grids: tuple[Geometry, ...],
    affine: FloatArray,
    tumors: Tumors,
    threads: int | None = None,
) -> Pyramid:
    """Bring ``modalities`` of an image onto the grids through ``affine`` (grid to image, RAS mm)."""
    def blank_on(grid: Geometry) -> npt.NDArray[np.bool_] | None:
        if tumors.mask is None:
            return None
        return tumors.blank_at(affine_coords(grid.shape, grid.affine), grid.spacing[0])

    def make(level: int) -> dict[int, Array]:
        finer = level + 1
        halved = finer < len(grids) and grids[level].is_close_to(_halved(grids[finer]))
        made = [level, finer] if halved else [level]
        blanks = {index: blank_on(grids[index]) for index in made}
        out = {index: np.empty((1, len(modalities), *grids[index].shape), dtype=np.float32) for index in made}
        a, b, c = grids[level].shape
        for channel, name in enumerate(modalities):
            # The axes nearest to RAS first: what comes out does not depend on how a file stores its voxels.
            v = images[name].canonical
            data = resample_affine(v.data[None], v.geometry, grids[made[-1]], affine, threads=threads)[0]
            out[made[-1]][0, channel] = _standardized(data, blanks[made[-1]])
            if halved:
                means = data[: 2 * a, : 2 * b, : 2 * c].reshape(a, 2, b, 2, c, 2).mean(axis=(1, 3, 5))
                out[level][0, channel] = _standardized(means, blanks[level])
        return out

    sources = tuple(dict.fromkeys(images[name].geometry for name in modalities))
    return Pyramid(grids, tumors, sources, affine, tuple(modalities), make)


def _standardized(data: Array, blank: npt.NDArray[np.bool_] | None) -> Array:
    """Mean 0 and deviation 1 over the brain, its mean where it is blank, with no look at what was there."""
    mask = foreground_mask(data if blank is None else np.where(blank, np.float32(0.0), data))
    values = data[mask]
    deviation = float(values.std(dtype=np.float64)) if values.size else 0.0
    if deviation == 0.0:
        if blank is not None and foreground_mask(data).any():
            return np.zeros_like(data)  # a tumour everywhere leaves nothing to compare, but is no fault of the image's
        raise BadDataError("nothing but background lies around the fixed image's brain; check the alignment (--affine)")
    standard: Array = ((data - np.float32(values.mean(dtype=np.float64))) / np.float32(deviation)).astype(np.float32)
    if blank is not None:
        standard[blank] = 0.0
    return standard
