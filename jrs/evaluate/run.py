"""A whole evaluation: every pair through the pipeline and the other methods, scored, tested and written."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast, get_args

from jrs.bundle import MANIFEST
from jrs.errors import BackendError, CannotCreateError, JrsError, UsageError, first_line
from jrs.evaluate.compare import Comparison, Row, Summary, compare, summarize
from jrs.evaluate.landmarks import LandmarkSpace
from jrs.evaluate.methods import BASELINES, Evaluator, check_baselines
from jrs.evaluate.pairs import Pair, listed, paired, to_atlas
from jrs.evaluate.plots import write_plots
from jrs.evaluate.tables import plain, write_summary
from jrs.files import write_json
from jrs.resources import bundle_path
from jrs.runtime.options import AFFINES
from jrs.runtime.pipeline import Pipeline
from jrs.train.datasets import find_cases

METHOD = "jrs"
_PAIRS = "pairs"


@dataclass(frozen=True)
class EvaluateRequest:
    """What ``jrs evaluate`` is asked for.

    Attributes:
        model: folder or shipped name of a bundle, or a checkpoint.
        data: manifest or folder of cases.
        out: folder of the results.
        atlas: fixed image of all pairs (default: sri24, unless ``pairs`` or ``pairing`` is given).
        atlas_labels: anatomical label map of the atlas, FreeSurfer numbers.
        pairs: CSV with columns moving and fixed.
        pairing: all or ring.
        layout: of ``data``, as in `find_cases`.
        affine: auto, rigid or off, as in ``jrs infer``.
        refine: iterations of the refinement, 0 for the network alone, None for the default of ``jrs infer``.
        landmark_space: of landmark files, as in `read_landmarks`.
        baselines: other methods, of `BASELINES`; affine is always among them.
        limit: at most so many pairs.
        resume: keep the pairs that are finished in ``out``.
        overwrite: start anew where ``out`` holds an evaluation.
    """

    model: str
    data: Path
    out: Path
    atlas: str | None = None
    atlas_labels: Path | None = None
    pairs: Path | None = None
    pairing: str | None = None
    layout: str = "auto"
    baselines: tuple[str, ...] = ()
    affine: str = "auto"
    refine: int | None = None
    landmark_space: str = "lps"
    limit: int | None = None
    resume: bool = False
    overwrite: bool = False
    backend: str = "auto"
    precision: str = "auto"
    threads: int | None = None


@dataclass
class Evaluation:
    """What came out: the long table, its summaries and tests, and the pairs that failed, with the reason."""

    about: dict[str, Any]
    methods: tuple[str, ...]
    rows: list[Row] = field(default_factory=list)
    summaries: list[Summary] = field(default_factory=list)
    comparisons: list[Comparison] = field(default_factory=list)

    @property
    def failed(self) -> dict[str, str]:
        """Name of a pair to what went wrong."""
        found: dict[str, str] = self.about["failed"]
        return found


def evaluate_run(request: EvaluateRequest, progress: Callable[[str], None] = lambda text: None) -> Evaluation:
    """Evaluate a model on pairs of cases and write the results into ``request.out``.

    A pair that fails is named in the result, the others go on. Raises JrsError for a request that cannot be met at
    all: no model, no case, a missing program.
    """
    if request.landmark_space not in get_args(LandmarkSpace):
        raise UsageError(f"--landmark-space {request.landmark_space}: choose {', '.join(get_args(LandmarkSpace))}")
    if request.affine not in AFFINES:
        raise UsageError(f"--affine {request.affine}: choose {', '.join(AFFINES)}")
    methods = (METHOD, *check_baselines(request.baselines))
    pairs = choose_pairs(request)
    _prepare_out(request)
    space = cast(LandmarkSpace, request.landmark_space)
    with (
        tempfile.TemporaryDirectory(prefix="jrs-evaluate-") as name,
        _opened(request, Path(name) / "bundle", progress) as pipeline,
    ):
        bundle = {"name": pipeline.network.bundle.name, "sha256": pipeline.network.bundle.sha256}
        evaluator = Evaluator(pipeline, methods, Path(name), space, request.affine, request.refine, request.threads)
        rows, warnings, failed = _all_pairs(request, evaluator, pairs, bundle["sha256"], progress)
        engine = plain(pipeline.network.info)
    about = {
        "bundle": bundle,
        "engine": engine,
        "data": str(request.data),
        "pairs": len(pairs),
        "methods": list(methods),
        "failed": failed,
        "warnings": warnings,
    }
    found = Evaluation(about, methods, rows)
    found.summaries = summarize(rows)
    found.comparisons = compare(rows, METHOD, methods[1:])
    write_summary(request.out, about, rows, found.summaries, found.comparisons, methods)
    write_plots(request.out, rows, methods)
    return found


def choose_pairs(request: EvaluateRequest) -> list[Pair]:
    """The pairs that a request asks for."""
    given = [name for name in ("atlas", "pairs", "pairing") if getattr(request, name) is not None]
    if len(given) > 1:
        raise UsageError(f"--{given[0]} and --{given[1]} exclude each other; give one")
    cases = find_cases(request.data, request.layout)
    if request.atlas_labels is not None and given not in ([], ["atlas"]):
        raise UsageError("--atlas-labels belongs to --atlas")
    if request.pairs is not None:
        pairs = listed(cases, request.pairs)
    elif request.pairing is not None:
        pairs = paired(cases, request.pairing)
    else:
        pairs = to_atlas(cases, request.atlas or "sri24", request.atlas_labels)
    return pairs[: request.limit]


def _prepare_out(request: EvaluateRequest) -> None:
    if request.resume and request.overwrite:
        raise UsageError("--resume and --overwrite exclude each other; give one")
    if request.out.exists() and not request.out.is_dir():
        raise CannotCreateError(f"{request.out}: is a file, a folder is to be written there; choose another --out")
    there = [name for name in ("summary.json", _PAIRS) if (request.out / name).exists()]
    if there and not (request.resume or request.overwrite):
        raise CannotCreateError(f"{request.out / there[0]}: exists already; pass --resume or --overwrite")
    if request.overwrite:
        for file in (request.out / _PAIRS).glob("*.json"):
            file.unlink()


@contextmanager
def _opened(request: EvaluateRequest, exported: Path, progress: Callable[[str], None]) -> Iterator[Pipeline]:
    """The pipeline of a bundle, or of a checkpoint that is exported first."""
    bundle: str | Path = request.model
    path = Path(request.model)
    if path.suffix == ".safetensors" or (path.is_dir() and not (path / MANIFEST).exists()):
        progress("exporting the checkpoint")
        try:
            from jrs.export.exporter import export_bundle
        except ImportError as error:
            raise BackendError(
                f"{path}: is a checkpoint, whose export needs {error.name}; pip install 'jrs[train]' brings it"
            ) from error
        bundle = export_bundle(path, exported, name=path.stem).folder
    else:
        bundle_path(request.model)
    with Pipeline.open(bundle, request.backend, request.precision, request.threads) as pipeline:
        yield pipeline


def _all_pairs(
    request: EvaluateRequest,
    evaluator: Evaluator,
    pairs: Sequence[Pair],
    sha256: str,
    progress: Callable[[str], None],
) -> tuple[list[Row], dict[str, list[str]], dict[str, str]]:
    rows: list[Row] = []
    warnings: dict[str, list[str]] = {}
    failed: dict[str, str] = {}
    settings: dict[str, Any] = {"bundle": sha256, "methods": list(evaluator.methods)}
    settings |= {"space": evaluator.space, "affine": evaluator.affine, "refine": evaluator.refine}
    for number, pair in enumerate(pairs, start=1):
        file = request.out / _PAIRS / f"{_digest(pair)}.json"
        done = _finished(file, settings) if request.resume else None
        if done is None:
            progress(f"pair {number} of {len(pairs)}: {pair.name}")
            try:
                scored = evaluator.evaluate(pair, progress)
            except (JrsError, MemoryError) as error:
                failed[pair.name] = str(error) or "out of memory"
                progress(f"{pair.name} failed: {failed[pair.name]}")
                continue
            except RuntimeError as error:  # a library's own, which names no case
                failed[pair.name] = first_line(error)
                progress(f"{pair.name} failed: {failed[pair.name]}")
                continue
            done = {"settings": settings, "pair": pair.name, **plain(scored)}
            write_json(file, done)
        rows += [
            Row(pair.moving.name, pair.fixed.name, s["method"], s["metric"], s["of"], _number(s["value"]))
            for s in done["scores"]
        ]
        if done["failures"]:
            failed[pair.name] = "; ".join(done["failures"])
        if done["warnings"]:
            warnings[pair.name] = done["warnings"]
    return rows, warnings, failed


def _number(value: float | None) -> float:
    return float("nan") if value is None else float(value)


def _digest(pair: Pair) -> str:
    """A file name for a pair, whatever its cases are called: their files decide."""
    text = json.dumps([sorted(f"{k}={v}" for k, v in case.files().items()) for case in (pair.moving, pair.fixed)])
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def _finished(file: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """What an earlier run found, if it was asked for the same and nothing failed."""
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    fits = isinstance(stored, dict) and stored.get("settings") == settings and stored.get("failures") == []
    return cast("dict[str, Any]", stored) if fits else None


__all__ = ["BASELINES", "METHOD", "EvaluateRequest", "Evaluation", "choose_pairs", "evaluate_run"]
