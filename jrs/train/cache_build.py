"""Filling a cache: in parallel, and from where it was when it was stopped."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from pathlib import Path

from filelock import FileLock, Timeout

from jrs.errors import BadDataError, CannotCreateError, MissingInputError, OutOfMemoryError, OutputError, UsageError
from jrs.files import remove_tree, sha256_of
from jrs.geometry import Geometry
from jrs.manifest import ModelSpec
from jrs.reading import read_volume
from jrs.runtime.preprocess import place_grid
from jrs.train.cache import (
    CASES,
    CacheIndex,
    CacheSpec,
    CaseRecord,
    IndexEntry,
    case_key,
    store_case,
    stored_case,
    write_index,
)
from jrs.train.datasets import TrainingCase
from jrs.train.datasets.manifest import row_of_case
from jrs.train.pool import for_each
from jrs.train.preparing import Align, prepare_case, require_channels, wanted_modalities
from jrs.volume import Volume

_LOCK = ".lock"
_FREE_BYTES = 256 * 1024**2  # left to others on the disk


@dataclass(frozen=True)
class CaseOutcome:
    """What became of one case: its record, or why there is none; ``reused`` if it was there already."""

    name: str
    record: CaseRecord | None
    error: str = ""
    reused: bool = False


@dataclass(frozen=True)
class BuildReport:
    """A finished cache: its index, and how many cases were there already and how many stale ones were removed."""

    index: CacheIndex
    reused: int
    removed: int


@dataclass(frozen=True)
class _Job:
    case: TrainingCase
    model: ModelSpec
    spec: CacheSpec
    atlas: Path
    folder: Path
    verify: bool


def build_cache(
    cases: Sequence[TrainingCase],
    model: ModelSpec,
    atlas: Path,
    folder: Path,
    *,
    align: Align = "auto",
    workers: int = 1,
    verify: bool = False,
    done: Callable[[CaseOutcome], None] = lambda outcome: None,
) -> BuildReport:
    """Prepare every case that ``folder`` does not hold yet for this model and atlas, then write the index.

    A case that cannot be prepared is listed as failed and the others go on. ``verify`` checks all bytes of what is
    there, not only sizes and headers, and redoes what is wrong. What belongs to no case of this call is removed.
    Raises OutputError when the disk is full, CannotCreateError if the folder cannot be written or another process
    fills it; what was finished by then stays and is not done again.
    """
    read_volume(atlas)
    spec = CacheSpec.of(model, sha256_of(atlas), align)
    with _locked(folder):
        for left in (folder / CASES).glob(".*"):
            remove_tree(left)  # of a run that was killed
        _check_space(folder, len(cases), spec)
        jobs = [_Job(case, model, spec, atlas, folder, verify) for case in cases]
        outcomes = for_each(_prepare, jobs, workers, done)
        entries = tuple(
            IndexEntry(case.name, {k: v for k, v in row_of_case(case).items() if v}, outcome.record)
            for case, outcome in zip(cases, outcomes, strict=True)
            if outcome.record is not None
        )
        failed = {outcome.name: outcome.error for outcome in outcomes if outcome.record is None}
        index = CacheIndex(spec, entries, failed)
        write_index(folder, index)
        removed = _remove_stale(folder, {entry.record.key for entry in entries})
    return BuildReport(index, sum(outcome.reused for outcome in outcomes), removed)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process fills a cache at a time; the system frees the lock of one that was killed."""
    lock = FileLock(folder / _LOCK)
    try:
        (folder / CASES).mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout as error:
        raise CannotCreateError(f"{folder}: another jrs data prepare is filling it; wait for it to end") from error
    except OSError as error:
        reason = error.strerror or error
        raise CannotCreateError(f"{folder}: cannot be written ({reason}); choose another --out") from error
    try:
        yield
    finally:
        lock.release()


def _check_space(folder: Path, count: int, spec: CacheSpec) -> None:
    """Refuse before hours are spent what cannot fit."""
    per_case = prod(spec.grid.shape) * (2 * len(spec.channels) + 2)
    there = sum(1 for _ in (folder / CASES).iterdir())
    needed = max(0, count - there) * per_case
    free = shutil.disk_usage(folder).free - _FREE_BYTES
    if needed > free:
        raise OutputError(
            f"{folder}: {count} cases need about {needed / 1e9:.1f} GB and {max(0, free) / 1e9:.1f} GB are free; "
            "free some space or choose another --out"
        )


@lru_cache(maxsize=1)
def _atlas(path: Path, model: ModelSpec) -> tuple[Volume, Geometry]:
    atlas = read_volume(path)
    return atlas, place_grid(model.grid, atlas)[0]


def _prepare(job: _Job) -> CaseOutcome:
    """One case in a process of its own; whatever is wrong with the case itself is told, not raised."""
    case = job.case
    try:
        require_channels(case, job.model)
        key = case_key(case, job.spec, wanted_modalities(case, job.spec.channels))
        there = stored_case(job.folder, key, job.verify)
        if there is not None:
            return CaseOutcome(case.name, there, reused=True)
        atlas, grid = _atlas(job.atlas, job.model)
        prepared = prepare_case(case, job.model, grid, atlas, job.spec.align, threads=1)
    except (BadDataError, MissingInputError, UsageError) as error:
        return CaseOutcome(case.name, None, str(error))
    except MemoryError as error:
        raise OutOfMemoryError(f"{case.name}: not enough memory to prepare it; use fewer --workers") from error
    try:
        return CaseOutcome(case.name, store_case(job.folder, key, prepared))
    except CannotCreateError:
        # Two cases with the same files have one folder, and the other worker was a moment faster.
        there = stored_case(job.folder, key)
        if there is None:
            raise
        return CaseOutcome(case.name, there, reused=True)


def _remove_stale(folder: Path, used: set[str]) -> int:
    """Remove what was prepared from other files or for another network."""
    stale = [entry for entry in (folder / CASES).iterdir() if entry.name not in used]
    for entry in stale:
        remove_tree(entry)
    return len(stale)
