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
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from jrs.fields import DisplacementField
from jrs.geometry import FloatArray, Geometry
from jrs.resources import DATA
from jrs.runtime import native
from jrs.runtime.cases import Case
from jrs.runtime.engines import EngineOptions, open_engine
from jrs.runtime.pyramid import Pyramid, level_grids, pyramid
from jrs.runtime.refine_level import refine_level
from jrs.runtime.sampling import affine_coords
from jrs.runtime.transform import displacement_on, to_voxel_coords
from jrs.runtime.tumors import HALF_DIAGONAL, Tumors

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


_COARSE = (Stage(0, 3, 1.7, 0.7), Stage(1, 2, 1.0, 0.4))
"""The coarse level is stiff, because what it gets wrong the others do not mend."""
_FINE = ((2, 1.2, 0.4), (1, 0.9, 0.3))
"""Share and deviations at the second finest level and at the finest, where there are more than two."""
_ONE_HEADS = (
    Stage(0, 12, 2.5, 0.5),
    Stage(1, 12, 3.0, 0.4),
    Stage(1, 7, 2.5, 0.4),
    Stage(2, 4, 2.4, 0.35),
)
"""Between two images of one head all that there is to find is smooth, and more iterations find more of it."""
_WORTH_A_TRIAL = 0.82
"""A smooth deformation at the coarse level that makes two images less like than this part of what the network does
is none of one head's."""
_ONE_HEAD = 0.86
"""One head's images are made this nearly as like by a smooth deformation as by one that is not."""
_PLANES = 8
_TRIAL = 6
"""Iterations at the second level, for each one by default at the finest."""


@dataclass(frozen=True)
class Refined:
    """``displacement`` on the grid of the finest level that was used; mean squared local correlation there before
    and after.

    ``iterations`` of a level that was left out are 0, and of one that did not raise it, for what it did was dropped.
    ``one_head``: the images were taken for two of the same head, and the network's displacement was left for the
    affine.
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


def _two_heads(finest: int) -> tuple[Stage, ...]:
    """The stages between two heads, where ``finest`` is the number of the finest level."""
    if finest < 2:
        return _COARSE[: finest + 1]
    return *_COARSE[: finest - 1], *(Stage(finest - 1 + index, *of) for index, of in enumerate(_FINE))


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
    """The refinement, on the CPU beside any backend; grids have their axes along ``orientation``."""

    def __init__(self, orientation: str = "RAS", threads: int | None = None) -> None:
        self.orientation, self.threads = orientation, threads

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
        """Improve ``start``, ``iterations`` times at the finest of four levels and a multiple of it at coarser ones.

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
            stages = [stage for stage in _ONE_HEADS if stage.level <= finest] if one_head else _two_heads(finest)
            grids = fixed.grids[: stages[-1].level + 1]
            done, similar, good = [tried, *[0] * (len(grids) - 1)], (0.0, 0.0), False
            for stage in stages:
                if good and stage.level < finest - 1:
                    continue
                grid = grids[stage.level]
                u_mm, worked, similar = self._climb(level_by, moving, fixed, stage, field, iterations * stage.share)
                done[stage.level] += worked
                # A start that the coarsest level cannot better knows more of shapes than the next one finds.
                good = good or (not worked and not one_head and similar[0] > 0.0)
                # With the start as it is, not as this level's grid holds it.
                if worked or stage is stages[-1]:
                    field = DisplacementField(u_mm if free else moving.tumors.stiffened(u_mm, grid), grid)
        spacings = tuple(grid.spacing[0] for grid in grids)
        return Refined(field, *similar, tuple(done), spacings, moving.modalities, one_head)

    def _climb(
        self,
        level_by: _LevelBy,
        moving: Pyramid,
        fixed: Pyramid,
        stage: Stage,
        start: DisplacementField,
        iterations: int,
        first_modality: bool = False,
    ) -> tuple[Array, int, tuple[float, float]]:
        """One stage: u (3,X,Y,Z) mm on its grid; iterations, 0 if they were dropped; similarity before and after.

        By all modalities, or by the first alone.
        """
        grid = fixed.grids[stage.level]
        chosen = slice(None, 1 if first_modality else None)
        u_mm = displacement_on(start, grid, self.threads)
        linear = np.linalg.inv(grid.affine[:3, :3]).astype(np.float32)
        result = level_by(
            {
                "fixed": fixed.image(stage.level)[:, chosen],
                "moving": moving.image(stage.level)[:, chosen],
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
        climb = partial(self._climb, level_by, moving, fixed, first_modality=True)
        coarse, smooth, *_ = _ONE_HEADS
        finer = _COARSE[1]
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
        """What works a level off: the kernels, where they were compiled, or the graph."""
        if native.available():
            yield partial(refine_level, threads=self.threads)
            return
        # Opened anew each time, so that the memory it worked in is given back.
        with open_engine(GRAPH, "refinement", "ort-cpu", EngineOptions("fp32", self.threads)) as engine:
            yield engine


def _weights(moving: Pyramid, fixed: Pyramid, u_mm: Array, grid: Geometry) -> Array:
    """What to compare, (X,Y,Z): inside both images, outside the tumours of both."""
    weights = np.ones(grid.shape, dtype=np.float32)
    reach = float(np.sqrt(3.0) * max(u_mm.max(), -u_mm.min()))
    for image, moved_mm in (fixed, 0.0), (moving, reach):
        sources = [Geometry(s.shape, np.linalg.inv(image.affine) @ s.affine) for s in image.sources]
        cut = [source for source in sources if not _holds(source, grid, moved_mm)]
        if not cut and image.tumors.mask is None:
            continue
        # Some planes at a time: what they take stays in the cache.
        for start in range(0, grid.shape[0], _PLANES):
            some = slice(start, start + _PLANES)
            points = affine_coords(grid.shape, grid.affine, some.start, some.stop)
            if image is moving:
                points += u_mm[:, some]
            if image.tumors.mask is not None:
                weights[some] *= image.tumors.weights_at(points, grid.spacing[0])
            for source in cut:
                weights[some] *= _inside(points, source, grid)
    return weights


def _margins(source: Geometry, grid: Geometry) -> FloatArray:
    """How many voxels inside ``source``'s outermost ones what ``grid`` has there, and differences, know no edge."""
    return (HALF_DIAGONAL + 1.0) * grid.spacing[0] / np.array(source.spacing) - 0.5


def _holds(source: Geometry, grid: Geometry, moved_mm: float) -> bool:
    """Whether all of ``grid`` lies inside ``source``, however its points are moved by so much."""
    ends = np.stack(np.meshgrid(*((0, n - 1) for n in grid.shape), indexing="ij"), axis=-1).reshape(-1, 3)
    corners = source.to_voxels(grid.to_ras(ends))
    more = _margins(source, grid) + moved_mm * np.linalg.norm(source.inverse[:3, :3], axis=1)
    return bool((corners >= more).all() and (corners <= np.array(source.shape) - 1 - more).all())


def _inside(points: Array, source: Geometry, grid: Geometry) -> npt.NDArray[np.bool_]:
    """Which points lie so far inside ``source`` that no edge is seen from there."""
    coords = to_voxel_coords(points, source)
    inside = np.ones(points.shape[1:], dtype=bool)
    for axis, (n, margin) in enumerate(zip(source.shape, _margins(source, grid), strict=True)):
        inside &= (coords[axis] >= margin) & (coords[axis] <= n - 1 - margin)
    return inside


def gaussian(deviation: float) -> Array:
    """Samples of a Gaussian out to three deviations, odd in number, summing to 1."""
    radius = max(1, int(np.ceil(3.0 * deviation)))
    x = np.arange(-radius, radius + 1)
    samples = np.exp(-0.5 * (x / deviation) ** 2)
    kernel: Array = (samples / samples.sum()).astype(np.float32)
    return kernel
