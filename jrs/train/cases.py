"""Training pairs from real cases: prepared on the fly and kept in memory, or mapped from a cache."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from jrs.errors import BadDataError, ConfigurationError, OutOfMemoryError
from jrs.files import sha256_of
from jrs.manifest import ModelSpec
from jrs.reading import read_volume
from jrs.runtime.preprocess import place_grid
from jrs.train.batch import PairBatch, concatenate, pair_indices
from jrs.train.cache import Cache
from jrs.train.config import TrainConfig
from jrs.train.datasets import TrainingCase, find_cases
from jrs.train.datasets.scan import scan_case
from jrs.train.preparing import UNKNOWN, Align, PreparedCase, prepare_case
from jrs.train.splits import (
    SPLITS,
    Splits,
    check_splits,
    identities,
    repeated_images,
    settle_splits,
    write_splits,
)
from jrs.volume import Volume

_MEMORY_SHARE = 0.7


class CaseSource(Protocol):
    """Prepared cases by number."""

    has_structures: bool

    def __len__(self) -> int:
        """Number of cases."""

    def name(self, index: int) -> str:
        """Of one case."""

    def load(self, index: int) -> PreparedCase:
        """One case, the same at every call; called from several threads."""


class MemoryCases:
    """Cases that are prepared when they are first used and kept as float16 (a ``CaseSource``)."""

    def __init__(
        self, cases: Sequence[TrainingCase], model: ModelSpec, atlas: Volume, align: Align = "auto"
    ) -> None:
        self.cases, self.model, self.atlas, self.align = list(cases), model, atlas, align
        self.grid = place_grid(model.grid, atlas)[0]
        self.has_structures = any(case.structures is not None for case in self.cases)
        self._kept: dict[int, PreparedCase] = {}
        needed = len(self.cases) * prod(model.grid.shape) * (2 * len(model.channels) + 2)
        if needed > _MEMORY_SHARE * _memory_bytes():
            raise OutOfMemoryError(
                f"{len(self.cases)} cases need {needed / 1e9:.1f} GB of memory and this machine has "
                f"{_memory_bytes() / 1e9:.1f} GB; prepare them once with jrs data prepare and train on the cache"
            )

    def __len__(self) -> int:
        """Number of cases."""
        return len(self.cases)

    def name(self, index: int) -> str:
        """Of one case."""
        return self.cases[index].name

    def load(self, index: int) -> PreparedCase:
        """One case; raises what `prepare_case` raises."""
        if index not in self._kept:
            self._kept[index] = prepare_case(self.cases[index], self.model, self.grid, self.atlas, self.align)
        return self._kept[index]


class CachedCases:
    """Some of the cases of a cache, mapped into memory at each use (a ``CaseSource``)."""

    def __init__(self, cache: Cache, names: Sequence[str], model: ModelSpec) -> None:
        self.cache, self.names, self.model = cache, list(names), model
        self.has_structures = any("structures" in cache.entries[name].record.arrays for name in self.names)

    def __len__(self) -> int:
        """Number of cases."""
        return len(self.names)

    def name(self, index: int) -> str:
        """Of one case."""
        return self.names[index]

    def load(self, index: int) -> PreparedCase:
        """One case with the model's channels."""
        return self.cache.load(self.names[index], self.model.channels)


class CasePairs:
    """Pairs of real cases (a ``PairSource``); ``batch`` is a function of its arguments and the seed alone.

    Tumour classes are given where the network segments, -1 where a case has no labels; structures where any case has
    anatomical labels, 0 everywhere in one without.
    """

    def __init__(
        self,
        cases: Sequence[TrainingCase] | CaseSource,
        model: ModelSpec,
        atlas: Volume,
        seed: int,
        align: Align = "auto",
    ) -> None:
        self.source: CaseSource = MemoryCases(cases, model, atlas, align) if isinstance(cases, Sequence) else cases
        self.model, self.seed = model, seed

    def __len__(self) -> int:
        """Number of cases."""
        return len(self.source)

    def batch(self, index: int, size: int) -> PairBatch:
        """Batch number ``index`` of ``size`` pairs, always the same for one seed."""
        pairs = []
        for moving, fixed in pair_indices(index, size, len(self), self.seed):
            a, b = self._tensors(moving), self._tensors(fixed)
            pairs.append(PairBatch(a[0], b[0], a[1], b[1], a[2], b[2], a[3], b[3]))
        return concatenate(pairs)

    def names(self, index: int, size: int) -> list[tuple[str, str]]:
        """Names of the moving and the fixed case of each pair of ``batch(index, size)``."""
        pairs = pair_indices(index, size, len(self), self.seed)
        return [(self.source.name(moving), self.source.name(fixed)) for moving, fixed in pairs]

    def _tensors(self, index: int) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Image (1,C,X,Y,Z), channels that are there (1,C), tumour (1,X,Y,Z), structures (1,X,Y,Z)."""
        case = self.source.load(index)
        image = torch.from_numpy(case.image.astype(np.float32))
        present = torch.tensor([case.present], dtype=torch.float32)
        tumor = structures = None
        if self.model.architecture.segmentation:
            tumor = torch.full((1, *image.shape[1:]), -1, dtype=torch.int64)
            if case.tumor is not None:
                tumor[0] = torch.from_numpy(case.tumor.astype(np.int64))
                tumor[tumor == UNKNOWN] = -1
        if self.source.has_structures:
            structures = torch.zeros((1, *image.shape[1:]), dtype=torch.uint8)
            if case.structures is not None:
                structures[0] = torch.from_numpy(np.array(case.structures))
        return image[None], present, tumor, structures


@dataclass(frozen=True)
class Cohort:
    """All cases of a folder, manifest or cache, and what tells whose they are."""

    path: Path
    cases: list[TrainingCase]
    whose: dict[str, frozenset[str]]
    cache: Cache | None

    @staticmethod
    def open(path: Path, layout: str, model: ModelSpec, atlas: Path) -> Cohort:
        """Find the cases; a cache must fit the model and the atlas. Raises JrsError saying what is wrong."""
        if layout == "auto" and Cache.is_one(path):
            cache = Cache.open(path)
            cache.check_fits(model, sha256_of(atlas))
            cases = cache.cases()
            return Cohort(path, cases, identities(cases, cache.hashes()), cache)
        cases = find_cases(path, layout)
        return Cohort(path, cases, identities(cases, repeated_images(cases)), None)

    @property
    def unusable(self) -> list[str]:
        """Names of cases that were given to the cache and could not be prepared."""
        return [] if self.cache is None else list(self.cache.index.failed)

    def pairs(self, names: Iterable[str], model: ModelSpec, atlas: Path, seed: int, align: Align = "auto") -> CasePairs:
        """Pairs of some of the cases.

        Raises BadDataError if there are fewer than two, and, before the first is prepared, for what headers and names
        show to be unusable.
        """
        chosen = set(names)
        cases = [case for case in self.cases if case.name in chosen]
        if len(cases) < 2:
            raise BadDataError(f"{self.path}: {len(cases)} cases make no pair; at least 2 are needed on either side")
        volume = read_volume(atlas)
        if self.cache is None:
            _refuse_unusable(self.path, cases, model)
            return CasePairs(cases, model, volume, seed, align)
        return CasePairs(CachedCases(self.cache, [case.name for case in cases], model), model, volume, seed)


def real_pairs(
    data: Path,
    validation: Path | None,
    config: TrainConfig,
    atlas: Path,
    out: Path,
    *,
    resume: bool = False,
    layout: str = "auto",
    splits: Path | None = None,
    align: Align = "auto",
    say: Callable[[str], None] = lambda text: None,
) -> tuple[CasePairs, CasePairs]:
    """The pairs that a run in ``out`` trains on and those it is validated on.

    Without a ``validation`` folder the splits are those of the run if it is resumed, else ``splits``, else the
    cache's, else drawn by the seed; they are stored in the run. Raises JrsError for anything a user can mend.
    """
    train = held = Cohort.open(data, layout, config.model, atlas)
    if validation is not None:
        held = Cohort.open(validation, layout, config.model, atlas)
        check_apart(train, held)
        parts = Splits(tuple(case.name for case in train.cases), tuple(case.name for case in held.cases))
    else:
        parts = _splits_of(train, config, out, resume, splits)
    write_splits(out / SPLITS, parts)
    total = len(train.cases) + (0 if validation is None else len(held.cases))
    left = total - sum(map(len, parts.parts().values()))
    counts = f"{len(parts.train)} to train on, {len(parts.validation)} to validate on, {len(parts.test)} for testing"
    say(f"cases: {counts}" + (f", {left} in no split" if left else ""))
    return (
        train.pairs(parts.train, config.model, atlas, config.seed, align),
        held.pairs(parts.validation, config.model, atlas, config.seed + 500_009, align),
    )


def _splits_of(cohort: Cohort, config: TrainConfig, out: Path, resume: bool, given: Path | None) -> Splits:
    own = out / SPLITS
    stored = own if resume else None if cohort.cache is None else cohort.path / SPLITS

    def settled(given: Path | None) -> Splits:
        shares = (config.validation_share, 0.0)
        return settle_splits(
            cohort.cases, cohort.whose, config.seed, shares, given=given, stored=stored, absent=cohort.unusable
        )

    splits = settled(given)
    if given is not None and resume and own.exists() and splits.parts() != settled(None).parts():
        raise ConfigurationError(f"{given}: differs from {own}, by which the run was begun; drop --splits")
    return splits


def _refuse_unusable(path: Path, cases: Sequence[TrainingCase], model: ModelSpec) -> None:
    needed = tuple(channel for channel in model.channels if channel not in model.optional_channels)
    errors = []
    for case in cases:
        found = [f.text for f in scan_case(case).findings if f.level == "error"]
        found += [f"lacks {channel}, which the network needs" for channel in needed if channel not in case.images]
        if not found and not set(case.images) & set(model.channels):
            found.append(f"has none of {', '.join(model.channels)}")
        errors += [f"{case.name}: {found[0]}"] if found else []
    if errors:
        raise BadDataError(
            f"{path}: {len(errors)} of {len(cases)} cases cannot be used ({errors[0]}); jrs data scan lists them all, "
            "and --out of it writes a manifest without them"
        )


def check_apart(train: Cohort, held: Cohort) -> None:
    """Raise BadDataError, with names, if two cohorts share a subject or an image."""
    cohorts = {"train": train, "validation": held}
    renamed = [replace(c, name=f"{side}: {c.name}") for side, cohort in cohorts.items() for c in cohort.cases]
    whose = identities(renamed, repeated_images(renamed))
    parts = {side: [c.name for c in renamed if c.name.startswith(f"{side}: ")] for side in cohorts}
    check_splits(parts, whose, str(held.path))


def _memory_bytes() -> float:
    """Of the machine; infinite where the system does not say."""
    try:
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (AttributeError, ValueError, OSError):
        return float("inf")
