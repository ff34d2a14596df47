"""Training, validation and test cases: drawn by subject, stored, checked.

Whatever shows the same person stays together: cases of one subject, and cases that hold the same image under
different names.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from jrs.errors import BadDataError, ConfigurationError, MissingInputError
from jrs.files import sha256_of, write_json
from jrs.schema import decode, encode
from jrs.train.datasets import TrainingCase

SPLITS = "splits.json"
_FORMAT = 1
_SHOWN = 3
_SAMPLE_BYTES = 64 * 1024


@dataclass(frozen=True)
class Splits:
    """Names of the cases in each part; ``seed`` and the shares say how they were drawn, if they were."""

    train: tuple[str, ...]
    validation: tuple[str, ...] = ()
    test: tuple[str, ...] = ()
    seed: int | None = None
    validation_share: float | None = None
    test_share: float | None = None
    format: int = _FORMAT

    def parts(self) -> dict[str, tuple[str, ...]]:
        """The three parts by name."""
        return {"train": self.train, "validation": self.validation, "test": self.test}


def identities(cases: Iterable[TrainingCase], hashes: Mapping[str, Iterable[str]]) -> dict[str, frozenset[str]]:
    """What tells whose images a case holds: its subject, and the hashes of its images where they are known."""
    return {
        case.name: frozenset({f"subject {case.subject}", *(f"image {h[:12]}" for h in hashes.get(case.name, ()))})
        for case in cases
    }


def repeated_images(cases: Sequence[TrainingCase]) -> dict[str, list[str]]:
    """SHA-256 of the image files that may be there twice, by case.

    Only files that agree in size and in a sample of their bytes are read in full; files that cannot be read are left
    for the reader to name.
    """
    uses: dict[tuple[bytes, int | None], list[tuple[str, Path]]] = {}
    samples: dict[Path, bytes | None] = {}
    for case in cases:
        for file in case.images.values():
            if file.path not in samples:
                samples[file.path] = _sample(file.path)
            if (sample := samples[file.path]) is not None:
                uses.setdefault((sample, file.volume), []).append((case.name, file.path))
    files: dict[Path, str] = {}
    hashes: dict[str, list[str]] = {}
    for (_, volume), users in uses.items():
        if len({name for name, _ in users}) > 1:
            for name, path in users:
                try:
                    files[path] = files.get(path) or sha256_of(path)
                except OSError:
                    continue
                hashes.setdefault(name, []).append(f"{files[path]}{'' if volume is None else volume}")
    return hashes


def _sample(path: Path) -> bytes | None:
    """A file's size and the hash of its middle, which differs between images even where they are not compressed."""
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            stream.seek(size // 2)
            middle = stream.read(_SAMPLE_BYTES)
    except OSError:
        return None
    return hashlib.sha256(size.to_bytes(8, "little") + middle).digest()


def make_splits(
    whose: Mapping[str, frozenset[str]], seed: int, validation_share: float, test_share: float = 0.0
) -> Splits:
    """Draw the parts by ``seed``; the same cases give the same parts in whatever order they come.

    Shares are of the cases; as subjects stay whole, a part may be a few cases larger. Validation and training get at
    least two cases each, for pairs are made of them. Raises ConfigurationError where there are too few.
    """
    if validation_share < 0 or test_share < 0 or validation_share + test_share >= 1:
        raise ConfigurationError("the shares of validation and test must be positive and leave some for training")
    groups = sorted(_groups(whose), key=lambda names: hashlib.sha256(f"{seed}/{names[0]}".encode()).digest())
    wanted = {
        "validation": max(2, round(len(whose) * validation_share)) if validation_share else 0,
        "test": max(1, round(len(whose) * test_share)) if test_share else 0,
    }
    parts: dict[str, list[str]] = {"validation": [], "test": [], "train": []}
    for names in groups:
        part = next((p for p, count in wanted.items() if len(parts[p]) < count), "train")
        parts[part] += names
    if len(parts["train"]) < 2 or any(len(parts[p]) < count for p, count in wanted.items()):
        raise ConfigurationError(
            f"{len(whose)} images of {len(groups)} subjects are too few to hold some out; "
            "give --validation, --splits, or more data (at least 2 images on either side)"
        )
    return Splits(
        **{part: tuple(sorted(names)) for part, names in parts.items()},  # type: ignore[arg-type]
        seed=seed,
        validation_share=validation_share,
        test_share=test_share,
    )


def _groups(whose: Mapping[str, frozenset[str]]) -> list[list[str]]:
    """Cases that share an identity, directly or through others (union-find)."""
    parent = {name: name for name in whose}

    def root(name: str) -> str:
        while parent[name] != name:
            parent[name] = parent[parent[name]]
            name = parent[name]
        return name

    first: dict[str, str] = {}
    for name in sorted(whose):
        for identity in whose[name]:
            parent[root(name)] = root(first.setdefault(identity, name))
    groups: dict[str, list[str]] = {}
    for name in sorted(whose):
        groups.setdefault(root(name), []).append(name)
    return list(groups.values())


def check_splits(parts: Mapping[str, Sequence[str]], whose: Mapping[str, frozenset[str]], source: str) -> None:
    """Raise BadDataError, with names, if two parts hold the same case, subject or image."""
    for one, other in combinations(parts, 2):
        owners: dict[str, str] = {}
        for name in parts[one]:
            for identity in {f"case {name}", *whose.get(name, ())}:
                owners[identity] = name
        shared = sorted(
            {
                (identity, owners[identity], name)
                for name in parts[other]
                for identity in {f"case {name}", *whose.get(name, ())}
                if identity in owners
            }
        )
        if shared:
            kinds = {kind: [s for s in shared if s[0].startswith(kind)] for kind in ("subject", "image", "case")}
            kind, found = next((k, s) for k, s in kinds.items() if s)
            count = len({s[0] for s in found})
            examples = ", ".join(_example(kind, *s) for s in found[:_SHOWN])
            more = "" if len(found) <= _SHOWN else ", ..."
            raise BadDataError(
                f"{source}: {one} and {other} share {count} {kind}{'s' if count > 1 else ''} ({examples}{more}); "
                "what is learnt from one side must not be measured on the other, move each to one side"
            )


def _example(kind: str, identity: str, one: str, other: str) -> str:
    if kind == "subject":
        return identity.removeprefix("subject ")
    return f"{one} and {other}" if kind == "image" else one


def read_splits(path: Path, cases: Iterable[TrainingCase], absent: Iterable[str] = ()) -> Splits:
    """Read a stored file; its entries are names of cases, or subjects, which stand for all of their cases.

    Entries in ``absent`` are known to be unusable and left out. Raises MissingInputError, ConfigurationError for a
    file that is none, BadDataError for an entry that is neither.
    """
    if not path.is_file():
        raise MissingInputError(f"{path}: no such file; give a JSON file with lists train, validation and test")
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"{path}: is not JSON ({error}); give lists train, validation and test") from error
    stored = decode(Splits, value, str(path))
    if stored.format != _FORMAT:
        raise ConfigurationError(f"{path}: has format {stored.format}, this jrs knows {_FORMAT}")
    by_subject: dict[str, list[str]] = {}
    names = set()
    for case in cases:
        names.add(case.name)
        by_subject.setdefault(case.subject, []).append(case.name)
    skipped = set(absent)
    resolved: dict[str, tuple[str, ...]] = {}
    for part, entries in stored.parts().items():
        found: dict[str, None] = {}
        for entry in entries:
            if entry in names or entry in by_subject:
                found |= dict.fromkeys([entry] if entry in names else sorted(by_subject[entry]))
            elif entry not in skipped:
                raise BadDataError(f"{path}: {part} names {entry}, which is no case or subject of the data")
        resolved[part] = tuple(found)
    shares = (stored.seed, stored.validation_share, stored.test_share)
    return Splits(resolved["train"], resolved["validation"], resolved["test"], *shares)


def settle_splits(
    cases: Sequence[TrainingCase],
    whose: Mapping[str, frozenset[str]],
    seed: int,
    shares: tuple[float, float],
    *,
    given: Path | None = None,
    stored: Path | None = None,
    absent: Iterable[str] = (),
) -> Splits:
    """The splits ``given`` by the user, else those ``stored`` before, else drawn by the seed; always checked.

    Raises what `read_splits`, `check_splits` and `make_splits` raise.
    """
    path = given if given is not None else stored
    if path is None or (given is None and not path.exists()):
        return make_splits(whose, seed, *shares)
    splits = read_splits(path, cases, absent)
    check_splits(splits.parts(), whose, str(path))
    return splits


def write_splits(path: Path, splits: Splits) -> None:
    """Store the parts as JSON, whole or not at all."""
    write_json(path, encode(splits))
