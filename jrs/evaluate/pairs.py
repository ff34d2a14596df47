"""Which case is registered to which."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jrs.errors import BadDataError, MissingInputError, UsageError
from jrs.evaluate.subjects import atlas_case
from jrs.train.datasets import TrainingCase

PAIRINGS = ("all", "ring")


@dataclass(frozen=True)
class Pair:
    """A moving case and the fixed one."""

    moving: TrainingCase
    fixed: TrainingCase

    @property
    def name(self) -> str:
        """Both names, for tables."""
        return f"{self.moving.name} to {self.fixed.name}"


def to_atlas(cases: Sequence[TrainingCase], atlas: str, structures: Path | None = None) -> list[Pair]:
    """Every case to one fixed image: a case of the same cohort by its name, a shipped atlas, a file or a folder."""
    chosen = [case for case in cases if case.name == atlas]
    if chosen and structures is not None:
        raise UsageError(f"--atlas {atlas} is a case with labels of its own; leave --atlas-labels out")
    fixed = chosen[0] if chosen else atlas_case(atlas, structures)
    return [Pair(case, fixed) for case in cases if case is not fixed]


def paired(cases: Sequence[TrainingCase], pairing: str) -> list[Pair]:
    """``ring``: each case to the next, the last to the first; ``all``: each to every other. Never to itself."""
    if pairing not in PAIRINGS:
        raise UsageError(f"--pairing {pairing}: choose {' or '.join(PAIRINGS)}")
    if len(cases) < 2:
        raise UsageError(f"--pairing {pairing} needs at least 2 cases, there is {len(cases)}; pass --atlas")
    if pairing == "ring":
        return [Pair(case, cases[(index + 1) % len(cases)]) for index, case in enumerate(cases)]
    # By fixed image, which is read and encoded once for all that are registered to it.
    return [Pair(moving, fixed) for fixed in cases for moving in cases if moving is not fixed]


def listed(cases: Sequence[TrainingCase], file: Path) -> list[Pair]:
    """The pairs of a CSV with the columns ``moving`` and ``fixed``: names of cases; ``fixed`` may be an atlas."""
    if not file.is_file():
        raise MissingInputError(f"{file}: no such file of pairs; give a CSV with columns moving,fixed")
    try:
        rows = list(csv.DictReader(file.read_text(encoding="utf-8-sig").splitlines(), skipinitialspace=True))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise BadDataError(f"{file}: is not a CSV file ({error}); give one with columns moving,fixed") from error
    if not rows or not {"moving", "fixed"} <= set(rows[0]):
        raise BadDataError(f"{file}: needs a header with moving,fixed and at least one row")
    by_name = {case.name: case for case in cases}
    atlases: dict[str, TrainingCase] = {}
    pairs = []
    for number, row in enumerate(rows, start=1):
        moving, fixed = (row["moving"] or "").strip(), (row["fixed"] or "").strip()
        if moving not in by_name:
            raise BadDataError(f"{file}: row {number} names the case {moving!r}, which the data do not hold")
        if fixed not in by_name and fixed not in atlases:
            atlases[fixed] = atlas_case(fixed)
        pairs.append(Pair(by_name[moving], by_name.get(fixed) or atlases[fixed]))
    return pairs
