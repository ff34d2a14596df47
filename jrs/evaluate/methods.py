"""The methods that an evaluation compares, run on one pair."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from jrs.errors import BackendError, JrsError, UsageError
from jrs.evaluate.landmarks import LandmarkSpace
from jrs.evaluate.pairs import Pair
from jrs.evaluate.peers import PeerResult, register, require
from jrs.evaluate.scores import PairData, Score, registration_scores, segmentation_scores
from jrs.evaluate.subjects import Subject, as_classes, named_as_given, read_subject, staged
from jrs.evaluate.transforms import SpatialTransform, warp_labels
from jrs.fields import DisplacementField
from jrs.files import remove_tree
from jrs.geometry import FloatArray, Geometry
from jrs.runtime.pipeline import Pipeline
from jrs.runtime.results import Result
from jrs.runtime.transform import Transform
from jrs.volume import Volume

BASELINES = ("affine", "identity", "ants", "ants-masked", "greedy", "greedy-masked")
"""What can be compared with: jrs's own affine, no registration at all, and other programs."""


def check_baselines(names: Sequence[str]) -> tuple[str, ...]:
    """The methods that were asked for, each once, affine first; raises UsageError, BackendError if one is missing."""
    unknown = [name for name in names if name not in BASELINES]
    if unknown:
        raise UsageError(f"--baseline {unknown[0]}: is unknown; choose from {', '.join(BASELINES)}")
    chosen = tuple(dict.fromkeys(("affine", *names)))
    for name in chosen:
        if name not in ("affine", "identity"):
            require(name)
    return chosen


@dataclass(frozen=True)
class MethodScore:
    """A `Score` and whose it is."""

    method: str
    metric: str
    of: str
    value: float


@dataclass(frozen=True)
class PairScores:
    """Everything that was measured on a pair; ``failures`` names other programs that failed, and why."""

    scores: list[MethodScore]
    warnings: list[str]
    failures: list[str]


@dataclass(frozen=True, eq=False)
class _Known:
    """A transform whose field on the fixed image's grid was computed already."""

    transform: SpatialTransform
    field: DisplacementField

    def dense(self, fixed: Geometry) -> DisplacementField:
        return self.field if fixed == self.field.geometry else self.transform.dense(fixed)

    def points(self, points_ras: npt.ArrayLike) -> FloatArray:
        return self.transform.points(points_ras)


@dataclass(frozen=True, eq=False)
class Inference:
    """What jrs made of a pair, and what every method is measured with; ``predicted`` holds class indices."""

    result: Result
    data: PairData
    predicted: npt.NDArray[np.uint8] | None


class Evaluator:
    """Runs and scores all methods on one pair after the other; ``work`` is a folder for temporary files.

    ``affine`` and ``refine`` are what ``InferOptions`` takes; ``refine`` None leaves it at its default.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        methods: Sequence[str],
        work: Path,
        space: LandmarkSpace = "lps",
        affine: str = "auto",
        refine: int | None = None,
        threads: int | None = None,
    ) -> None:
        self.pipeline, self.methods, self.work, self.space = pipeline, tuple(methods), work, space
        self.affine, self.refine, self.threads = affine, refine, threads
        self.spec = pipeline.network.bundle.manifest.model
        self._fixed: Subject | None = None

    def evaluate(self, pair: Pair, progress: Callable[[str], None] = lambda text: None) -> PairScores:
        """All scores of a pair; raises JrsError if the pair cannot be evaluated.

        Another program that fails is named in the result and has no scores.
        """
        progress("jrs")
        found = self.infer(pair)
        scores: list[MethodScore] = []
        if found.predicted is not None:
            for region, volume in (found.result.volumes_ml or {}).get("native", {}).items():
                scores.append(MethodScore("jrs", "tumor_predicted_ml", region, volume))
            truth = found.data.moving.tumor
            if truth is not None:
                scores += [_of("jrs", score) for score in segmentation_scores(found.predicted, truth)]
        failures: list[str] = []
        for method, transform, seconds in self.transforms(found, progress, failures):
            scores += [_of(method, score) for score in registration_scores(transform, found.data)]
            scores.append(MethodScore(method, "seconds", "", seconds))
        return PairScores([*scores, *_to_affine(scores)], list(found.result.warnings), failures)

    def infer(self, pair: Pair) -> Inference:
        """Run the pipeline on a pair, as ``jrs infer`` would."""
        moving = read_subject(pair.moving, self.spec, self.space)
        fixed = self._fixed_subject(pair)
        with tempfile.TemporaryDirectory(dir=self.work) as here:
            case, atlas = staged(pair.moving, Path(here)), staged(pair.fixed, self.work / "fixed")
            options: dict[str, Any] = {} if self.refine is None else {"refine": self.refine}
            try:
                result = self.pipeline.infer(case, atlas, inverse=False, affine=self.affine, **options)
            except JrsError as error:
                text = named_as_given(str(error), pair.moving, case)
                error.args = (named_as_given(text, pair.fixed, atlas),)
                raise
        predicted = None if result.labels_native is None else as_classes(result.labels_native, self.spec)
        return Inference(result, _pair_data(moving, fixed, result, predicted), predicted)

    def transforms(
        self,
        found: Inference,
        progress: Callable[[str], None] = lambda text: None,
        failures: list[str] | None = None,
    ) -> Iterator[tuple[str, SpatialTransform, float]]:
        """Each method, its total transform and the seconds it took; other programs run when their turn comes.

        With a list of ``failures``, a program that fails is left out and named there; without, it raises BackendError.
        """
        timings = found.result.timings_s
        affine = sum(timings.get(stage, 0.0) for stage in ("read_case", "read_atlas", "affine"))
        yield "jrs", _Known(found.result.transform, found.result.field), timings["total"]
        for method in self.methods[1:]:
            if method == "affine":
                yield method, Transform(found.result.transform.affine, None, self.threads), affine
            elif method == "identity":
                yield method, Transform(np.eye(4), None, self.threads), 0.0
            else:
                progress(method)
                try:
                    peer = self._peer(method, found.data)
                except BackendError as error:
                    if failures is None:
                        raise
                    failures.append(str(error))
                    progress(str(error))
                    continue
                yield method, peer.transform, peer.seconds

    def _fixed_subject(self, pair: Pair) -> Subject:
        if self._fixed is None or self._fixed.case != pair.fixed:
            # What the last fixed image left in memory and on disk is not needed any more; the network is.
            remove_tree(self.work / "fixed")
            self.pipeline = Pipeline(self.pipeline.network, self.pipeline.threads)
            self._fixed = read_subject(pair.fixed, self.spec, self.space)
        return self._fixed

    def _peer(self, method: str, data: PairData) -> PeerResult:
        moving_tumor = fixed_tumor = None
        if method.endswith("-masked"):
            moving_tumor = _tumor_on(data.image.geometry, data.tumor)
            fixed_tumor = None if data.fixed_tumor is None else data.fixed_tumor > 0
        name = method.removesuffix("-masked")
        return register(name, data.image, data.target, moving_tumor, fixed_tumor, self.threads)


def _tumor_on(grid: Geometry, tumor: Volume | None) -> npt.NDArray[np.bool_] | None:
    """The whole tumour on the grid of the image that is registered, which may not be the labels' own."""
    if tumor is None or tumor.geometry == grid:
        return None if tumor is None else tumor.data > 0
    here = DisplacementField(np.zeros((3, *grid.shape), dtype=np.float32), grid)
    mask: npt.NDArray[np.bool_] = warp_labels(tumor, here) > 0
    return mask


def _of(method: str, score: Score) -> MethodScore:
    return MethodScore(method, score.metric, score.of, score.value)


def _pair_data(
    moving: Subject, fixed: Subject, result: Result, predicted: npt.NDArray[np.uint8] | None
) -> PairData:
    """Of both images one modality that they share, else the first of each: the one that the affine goes by."""
    modality = next((m for m in result.case.images if m in fixed.case.images), None)
    image = result.case.images[modality] if modality else next(iter(result.case.images.values()))
    target = result.fixed
    if modality and modality != next(iter(fixed.case.images)):
        target = fixed.case.images[modality].read()
    tumor = moving.tumor
    if tumor is None and predicted is not None:
        tumor = Volume(predicted, result.native)
    fixed_tumor = None if fixed.tumor is None else fixed.tumor.data
    return PairData(moving, fixed, image, target, target.foreground(), tumor, fixed_tumor)


def _to_affine(scores: Sequence[MethodScore]) -> Iterator[MethodScore]:
    """The tumour's moved volume relative to what the affine alone makes of it."""
    ratios = [s for s in scores if s.metric == "tumor_volume_ratio"]
    affine = {s.of: s.value for s in ratios if s.method == "affine"}
    for score in ratios:
        base = affine.get(score.of, math.nan)
        value = score.value / base if base and not math.isnan(base) else math.nan
        yield MethodScore(score.method, "tumor_volume_to_affine", score.of, value)
