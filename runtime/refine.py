"""Iterative refinement of a displacement on the pair of images it belongs to.

Each level maximises the squared local correlation of the moved with the fixed image by steepest ascent: the
analytic force, smoothed, moves the field by composition, and the field is smoothed in turn (Avants et al. 2008,
doi 10.1016/j.media.2007.06.004; Yushkevich et al. 2016, ``greedy``). The arithmetic is one ONNX graph with a
loop inside, made by ``jrs.export.refinement``; ``docs/refinement.md`` has the equations and what was measured.

Tumours take no part: nothing inside them is compared, and those that are certain move as rigid bodies, so that the
deformation neither shrinks nor swells them. Between two images of one head, which are told by how well a smooth
deformation explains them, there is less to find and all of it can be found: see ``Refiner.refine``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from jrs.errors import BadDataError
from jrs.fields import DisplacementField
from jrs.geometry import FloatArray, Geometry
from jrs.resources import DATA
from jrs.runtime import native
from jrs.runtime.affine import foreground_box
from jrs.runtime.cases import Case
from jrs.runtime.engines import EngineOptions, on_gpu, open_engine
from jrs.runtime.refine_level import refine_level
from jrs.runtime.sampling import affine_coords, resample_affine
from jrs.runtime.transform import displacement_on, to_voxel_coords
from jrs.runtime.tumors import HALF_DIAGONAL, Tumors
from jrs.volume import Volume, foreground_mask

Array = npt.NDArray[np.float32]
_LevelBy: TypeAlias = Callable[[dict[str, Array]], Mapping[str, Array]]

GRAPH = DATA / "graphs" / "refine.onnx"
DEFAULT_ITERATIONS = 4


@dataclass(frozen=True)
class Stage:
    """Some iterations at one level: ``share`` for each one asked for; deviations and step in voxels."""

    level: int
    share: int
    update_deviation: float
    field_deviation: float
    step: float = 1.0


SPACINGS_MM = (4.0, 2.0, 4.0 / 3.0)
"""Of the levels, coarse to fine."""
_TWO_HEADS = (Stage(0, 3, 1.7, 0.7), Stage(1, 2, 1.0, 0.4), Stage(2, 1, 0.8, 0.35))
"""The coarse level is stiff, because what it gets wrong the others do not mend."""
_ONE_HEADS = (
    Stage(0, 12, 2.5, 0.5),
    Stage(1, 12, 3.0, 0.4),
    Stage(1, 7, 2.5, 0.4),
    Stage(2, 4, 2.4, 0.35),
)
"""Between two images of one head all that there is to find is smooth, and more iterations find more of it."""
_MARGIN_MM = 6.0
_WORTHWHILE = 0.6
"""A level whose voxels are smaller than this part of the images' own is left out."""
_WORTH_A_TRIAL = 0.82
"""A smooth deformation at the coarse level that makes two images less like than this part of what the network does
is none of one head's."""
_ONE_HEAD = 0.86
"""One head's images are made this nearly as like by a smooth deformation as by one that is not."""
_TRIAL = 6
"""Iterations at the second level, for each one by default at the finest."""


@dataclass(frozen=True)
class Refined:
    """``displacement`` on the finest level's grid; mean squared local correlation there before and after.

    ``iterations`` of a level that did not raise it are 0, for what it did was dropped. ``one_head``: the images
    were taken for two of the same head, and the network's displacement was left for the affine.
    """

    displacement: DisplacementField
    similarity_before: float
    similarity_after: float
    iterations: tuple[int, ...]
    spacings_mm: tuple[float, ...]
    modalities: tuple[str, ...]
    one_head: bool = False

    def summary(self) -> dict[str, Any]:
        """For the report."""
        return {
            "modalities": list(self.modalities),
            "levels_mm": [round(spacing, 3) for spacing in self.spacings_mm],
            "iterations": list(self.iterations),
            "start": "affine" if self.one_head else "network",
            "local_correlation": {"before": round(self.similarity_before, 4), "after": round(self.similarity_after, 4)},
        }


@dataclass(frozen=True, eq=False)
class Pyramid:
    """One image on the grid of each level of a pair: ``images`` (1,C,X,Y,Z), unit variance, the tumors blank.

    ``grids`` go from coarse to fine. ``tumors`` lie in their space, before any displacement; ``sources`` are the grids
    of the files.
    """

    grids: tuple[Geometry, ...]
    images: tuple[Array, ...]
    tumors: Tumors
    sources: tuple[Geometry, ...]
    affine: FloatArray
    modalities: tuple[str, ...]


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


def _first_modality(image: Pyramid) -> Pyramid:
    return replace(image, images=tuple(data[:, :1] for data in image.images), modalities=image.modalities[:1])


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
    # The axes nearest to RAS first: what comes out does not depend on how a file stores its voxels.
    volumes = [images[name].canonical for name in modalities]
    finer: tuple[Geometry, Array] | None = None
    sampled = []
    for grid in reversed(grids):
        if finer is not None and grid.is_close_to(_halved(finer[0])):
            a, b, c = grid.shape
            data = finer[1][:, : 2 * a, : 2 * b, : 2 * c].reshape(-1, a, 2, b, 2, c, 2).mean(axis=(2, 4, 6))
        else:
            parts = [resample_affine(v.data[None], v.geometry, grid, affine, threads=threads) for v in volumes]
            data = np.concatenate(parts)
        finer = grid, data
        blank = None
        if tumors.mask is not None:
            blank = tumors.blank_at(affine_coords(grid.shape, grid.affine), grid.spacing[0])
        sampled.append(np.stack([_standardized(channel, blank) for channel in data])[None])
    sources = tuple(dict.fromkeys(images[name].geometry for name in modalities))
    return Pyramid(grids, tuple(reversed(sampled)), tumors, sources, affine, tuple(modalities))


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


class Shelf(Protocol):
    """Where a fixed image's pyramids are kept."""

    def pyramid(
        self,
        grids: tuple[Geometry, ...],
        modalities: Sequence[str],
        tumors: Tumors,
        make: Callable[[], Pyramid],
    ) -> Pyramid:
        """The one of these ingredients, by ``make`` if there is none yet."""


class Refiner:
    """The refinement on one backend; grids have their axes along ``orientation``."""

    def __init__(self, backend: str, orientation: str = "RAS", threads: int | None = None) -> None:
        self.backend, self.orientation, self.threads = backend, orientation, threads

    def refine_case(
        self,
        moving: tuple[Case, Tumors],
        fixed: tuple[Case, Tumors],
        affine: FloatArray,
        start: DisplacementField,
        iterations: int,
        shelf: Shelf | None = None,
        same_patient: bool | None = None,
    ) -> tuple[Refined, list[str]]:
        """Improve ``start`` on the modalities that both cases have; and what the user should know.

        Without a shared modality the first of each are compared: squared correlation also holds where one image
        is bright and the other dark. ``shelf`` keeps the fixed image's pyramids from case to case.
        ``same_patient``: as ``refine`` takes it.
        """
        notes = []
        ours = theirs = [name for name in moving[0].images if name in fixed[0].images]
        if not ours:
            ours, theirs = list(moving[0].images)[:1], list(fixed[0].images)[:1]
            notes.append(f"no modality is shared: refined by comparing moving {ours[0]} with fixed {theirs[0]}")
        first = moving[0].images[ours[0]], fixed[0].images[theirs[0]]
        grids = level_grids(*first, self.orientation)

        def make() -> Pyramid:
            return pyramid(fixed[0].images, theirs, grids, np.eye(4), fixed[1], self.threads)

        atlas = make() if shelf is None else shelf.pyramid(grids, theirs, fixed[1], make)
        images = pyramid(moving[0].images, ours, grids, affine, moving[1], self.threads)
        return self.refine(images, atlas, start, iterations, same_patient), notes

    def refine(
        self,
        moving: Pyramid,
        fixed: Pyramid,
        start: DisplacementField,
        iterations: int,
        same_patient: bool | None = None,
    ) -> Refined:
        """Improve ``start``, ``iterations`` times at the finest level and a multiple of it at each coarser one.

        Both pyramids have the same grids; ``start`` may lie on any. Where the result has no grid it fades as
        ``Transform`` says.

        Images of one head at two times differ by less than the network, which has learnt how heads differ, adds of
        its own. Unless ``same_patient`` says whether they are, they are told by a smooth deformation: begun from the
        affine alone, it makes them nearly as similar as less smooth ones do, from there or from the network's
        displacement; two heads stay far behind. They are refined from there, by stages of their own.
        If the fixed one shows a tumour as well, what became of it is theirs to show: none is held rigid.
        """
        with self._level() as level_by:
            begun = None
            if same_patient is not False:
                begun = self._of_one_head(level_by, moving, fixed, start, certain=same_patient is True)
            one_head, (field, tried) = begun is not None, begun or (start, 0)
            free = one_head and bool(fixed.tumors.lesions)
            finest = len(fixed.grids) - 1
            stages = [stage for stage in (_ONE_HEADS if one_head else _TWO_HEADS) if stage.level <= finest]
            done, similar = [tried, *[0] * finest], (0.0, 0.0)
            for stage in stages:
                grid = fixed.grids[stage.level]
                u_mm, worked, similar = self._climb(level_by, moving, fixed, stage, field, iterations * stage.share)
                done[stage.level] += worked
                # With the start as it is, not as this level's grid holds it.
                if worked or stage is stages[-1]:
                    field = DisplacementField(u_mm if free else moving.tumors.stiffened(u_mm, grid), grid)
        spacings = tuple(grid.spacing[0] for grid in fixed.grids)
        return Refined(field, *similar, tuple(done), spacings, moving.modalities, one_head)

    def _climb(
        self,
        level_by: _LevelBy,
        moving: Pyramid,
        fixed: Pyramid,
        stage: Stage,
        start: DisplacementField,
        iterations: int,
    ) -> tuple[Array, int, tuple[float, float]]:
        """One stage: u (3,X,Y,Z) mm on its grid; iterations, 0 if they were dropped; similarity before and after."""
        grid = fixed.grids[stage.level]
        u_mm = displacement_on(start, grid, self.threads)
        linear = np.linalg.inv(grid.affine[:3, :3]).astype(np.float32)
        result = level_by(
            {
                "fixed": fixed.images[stage.level],
                "moving": moving.images[stage.level],
                "weights": _weights(moving, fixed, u_mm, grid)[None, None],
                "displacement": np.einsum("iw,wxyz->ixyz", linear, u_mm)[None],
                "update_kernel": gaussian(stage.update_deviation),
                "field_kernel": gaussian(stage.field_deviation),
                "step": np.array(stage.step, dtype=np.float32),
                "iterations": np.array(iterations, dtype=np.float32),
            }
        )
        before, after = (float(value) for value in result["similarity"])
        if not after >= before:  # nor if it is no number
            # The coarse level is stiff: all that it can do to a good start is to smooth it.
            return u_mm, 0, (before, before)
        refined = DisplacementField.from_voxels(result["refined"][0], grid)
        return refined.vectors_mm, int(result["done"]), (before, after)

    def _of_one_head(
        self, level_by: _LevelBy, moving: Pyramid, fixed: Pyramid, start: DisplacementField, certain: bool
    ) -> tuple[DisplacementField, int] | None:
        """What the coarse level makes of the affine alone, and its iterations, if that tells the images as one head's.

        If that is ``certain`` it is not tried. In a number of iterations of its own, so that what is one head's does
        not depend on what was asked for, and on the first modality alone, which takes a share of the time.
        """
        if len(fixed.grids) < 2 and not certain:
            return None
        climb = partial(self._climb, level_by, _first_modality(moving), _first_modality(fixed))
        coarse, smooth, *_ = _ONE_HEADS
        finer = _TWO_HEADS[1]
        grids = fixed.grids
        nothing = DisplacementField(np.zeros((3, *grids[0].shape), dtype=np.float32), grids[0])
        u_mm, worked, _ = climb(coarse, nothing, DEFAULT_ITERATIONS * coarse.share)
        begun = DisplacementField(u_mm, grids[0])
        if certain:
            return begun, worked
        by_coarse, by_start = (climb(finer, field, 1)[2][0] for field in (begun, start))
        if not by_coarse >= _WORTH_A_TRIAL * by_start > 0.0:
            return None
        u_mm, *_ = climb(smooth, begun, DEFAULT_ITERATIONS * _TRIAL)
        # From its own end as well: a network that knows nothing is no standard.
        ends = DisplacementField(u_mm, grids[1]), start
        likes = [climb(finer, field, DEFAULT_ITERATIONS * finer.share)[2] for field in ends]
        return (begun, worked) if likes[0][0] >= _ONE_HEAD * max(after for _, after in likes) else None

    @contextmanager
    def _level(self) -> Iterator[_LevelBy]:
        """What works a level off: on the CPU the kernels, where they were compiled, else the graph."""
        if native.available() and not on_gpu(self.backend):
            yield partial(refine_level, threads=self.threads)
            return
        # Opened anew each time, so that the memory it worked in is given back.
        with open_engine(GRAPH, "refinement", self.backend, EngineOptions("fp32", self.threads)) as engine:
            yield engine


def _weights(moving: Pyramid, fixed: Pyramid, u_mm: Array, grid: Geometry) -> Array:
    """What to compare, (X,Y,Z): inside both images, outside the tumours of both."""
    points = affine_coords(grid.shape, grid.affine)
    weights = np.ones(grid.shape, dtype=np.float32)
    for image in (fixed, moving):
        weights *= image.tumors.weights_at(points, grid.spacing[0])
        for source in image.sources:
            weights *= _inside(points, Geometry(source.shape, np.linalg.inv(image.affine) @ source.affine), grid)
        # The moving image's points; the loop ends there.
        points += u_mm
    return weights


def _inside(points: Array, source: Geometry, grid: Geometry) -> npt.NDArray[np.bool_]:
    """Which points lie so far inside ``source`` that what ``grid`` has there, and differences, know no edge."""
    coords = to_voxel_coords(points, source)
    inside = np.ones(points.shape[1:], dtype=bool)
    for axis, n in enumerate(source.shape):
        margin = (HALF_DIAGONAL + 1.0) * grid.spacing[0] / source.spacing[axis] - 0.5
        inside &= (coords[axis] >= margin) & (coords[axis] <= n - 1 - margin)
    return inside


def gaussian(deviation: float) -> Array:
    """Samples of a Gaussian out to three deviations, odd in number, summing to 1."""
    radius = max(1, int(np.ceil(3.0 * deviation)))
    x = np.arange(-radius, radius + 1)
    samples = np.exp(-0.5 * (x / deviation) ** 2)
    kernel: Array = (samples / samples.sum()).astype(np.float32)
    return kernel
