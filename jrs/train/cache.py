"""A cache of prepared cases on disk: what `jrs data prepare` writes and training maps into memory.

    CACHE/index.json                    what was prepared, from what, for which network
    CACHE/splits.json                   which cases are for training, validation and test
    CACHE/cases/<key>/image.npy         (C,X,Y,Z) float16
    CACHE/cases/<key>/tumor.npy         (X,Y,Z) uint8, where there are tumour labels
    CACHE/cases/<key>/structures.npy    (X,Y,Z) uint8, where there are anatomical labels
    CACHE/cases/<key>/case.json         shapes, sizes and checksums of these

The key is a hash of the source files' content, of what the network takes and of the atlas: whatever was prepared from
or for something else has another key and is never used. A case's folder appears whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from jrs.errors import BadDataError, ConfigurationError, JrsError, MissingInputError
from jrs.files import sha256_of, whole_folder, write_json
from jrs.manifest import GridSpec, ModelSpec, Normalization
from jrs.schema import decode, encode
from jrs.train.datasets import TrainingCase
from jrs.train.datasets.manifest import case_of_row
from jrs.train.preparing import Align, PreparedCase

INDEX = "index.json"
CASES = "cases"
_RECORD = "case.json"
_FORMAT = 1
_PREPARATION = 1
"""Raised when the same files and settings would be prepared differently: older caches are then redone."""

_AGAIN = "run jrs data prepare again"


@dataclass(frozen=True)
class CacheSpec:
    """For what cases are prepared: the part of a model that their arrays depend on, the atlas, the alignment."""

    channels: tuple[str, ...]
    grid: GridSpec
    normalization: Normalization
    labels: tuple[str, ...]
    label_values: tuple[int, ...]
    atlas_sha256: str
    align: Align
    preparation: int = _PREPARATION

    @staticmethod
    def of(model: ModelSpec, atlas_sha256: str, align: Align) -> CacheSpec:
        """The part of ``model`` that matters here."""
        return CacheSpec(
            model.channels, model.grid, model.normalization, model.labels, model.label_values, atlas_sha256, align
        )


@dataclass(frozen=True)
class StoredArray:
    """One ``.npy`` file."""

    shape: tuple[int, ...]
    dtype: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class CaseRecord:
    """What ``case.json`` says; ``images`` are the hashes of the native voxels by modality."""

    key: str
    present: tuple[bool, ...]
    arrays: dict[str, StoredArray]
    images: dict[str, str]
    moving_from_fixed: tuple[tuple[float, ...], ...] | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class IndexEntry:
    """One case of the index: ``source`` is its row of a manifest."""

    name: str
    source: dict[str, str]
    record: CaseRecord


@dataclass(frozen=True)
class CacheIndex:
    """What ``index.json`` says; ``failed`` names the cases that could not be prepared and why."""

    spec: CacheSpec
    entries: tuple[IndexEntry, ...]
    failed: dict[str, str]
    format: int = _FORMAT


# Writing --------------------------------------------------------------------------------------------------


def case_key(case: TrainingCase, spec: CacheSpec, modalities: Sequence[str]) -> str:
    """The name of a case's folder; reads its source files, and raises MissingInputError if one is not there."""
    hashes: dict[Path, str] = {}

    def identity(role: str) -> list[Any]:
        file = case.files()[role]
        if file.path not in hashes:
            try:
                hashes[file.path] = sha256_of(file.path)
            except OSError as error:
                raise MissingInputError(f"{file.path}: cannot be read ({error.strerror}); check the path") from error
        return [role, hashes[file.path], file.volume]

    value: dict[str, Any] = {"spec": encode(spec), "files": [identity(role) for role in modalities]}
    if spec.labels and case.segmentation is not None:
        classes = case.tumor_classes
        value["tumor"] = [identity("seg"), None if classes is None else sorted(classes.items())]
    if case.structures is not None:
        value["structures"] = [identity("structures"), case.numbering]
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]


def store_case(folder: Path, key: str, prepared: PreparedCase) -> CaseRecord:
    """Write a case's folder, whole or not at all; raises CannotCreateError or OutputError."""
    arrays: dict[str, npt.NDArray[Any] | None] = {
        "image": prepared.image,
        "tumor": prepared.tumor,
        "structures": prepared.structures,
    }
    matrix = prepared.moving_from_fixed
    with whole_folder(folder / CASES / key, overwrite=True) as temporary:
        record = CaseRecord(
            key=key,
            present=prepared.present,
            arrays={name: _write_array(temporary, name, a) for name, a in arrays.items() if a is not None},
            images=dict(prepared.hashes),
            moving_from_fixed=None if matrix is None else tuple(tuple(float(v) for v in row) for row in matrix),
            notes=prepared.notes,
        )
        write_json(temporary / _RECORD, encode(record))
    return record


def _write_array(folder: Path, name: str, array: npt.NDArray[Any]) -> StoredArray:
    path = folder / f"{name}.npy"
    array = np.ascontiguousarray(array)
    # Not numpy.save: where the disk is full, its error does not say so.
    with path.open("wb") as stream:
        np.lib.format.write_array_header_1_0(stream, np.lib.format.header_data_from_array_1_0(array))
        stream.write(array.data)
    return StoredArray(array.shape, array.dtype.str, path.stat().st_size, sha256_of(path))


def stored_case(folder: Path, key: str, fully: bool = False) -> CaseRecord | None:
    """The record of a case that is there and whole (``fully``: to the last byte), else None."""
    try:
        text = (folder / CASES / key / _RECORD).read_text(encoding="utf-8")
        record = decode(CaseRecord, json.loads(text), key)
    except (OSError, ValueError, JrsError):
        return None
    return None if record.key != key or list(_wrong_arrays(folder, record, fully)) else record


def _wrong_arrays(folder: Path, record: CaseRecord, fully: bool) -> Iterable[str]:
    """What is wrong with a case's arrays: by size and header, or by checksum."""
    for name, stored in record.arrays.items():
        path = folder / CASES / record.key / f"{name}.npy"
        try:
            if path.stat().st_size != stored.bytes:
                yield f"{path}: has {path.stat().st_size} bytes, {stored.bytes} were written"
            elif fully and sha256_of(path) != stored.sha256:
                yield f"{path}: its checksum is not that of what was written"
            else:
                array = np.load(path, mmap_mode="r", allow_pickle=False)
                if (array.shape, array.dtype.str) != (stored.shape, stored.dtype):
                    yield f"{path}: is not the array that was written"
        except (OSError, ValueError) as error:
            yield f"{path}: cannot be read ({error})"


def write_index(folder: Path, index: CacheIndex) -> None:
    """Write the index, whole or not at all."""
    write_json(folder / INDEX, encode(index))


# Reading --------------------------------------------------------------------------------------------------


class Cache:
    """A cache that was opened: its index was read, and size and header of every array agree with it."""

    def __init__(self, folder: Path, index: CacheIndex) -> None:
        self.folder, self.index = folder, index
        self.entries = {entry.name: entry for entry in index.entries}

    @staticmethod
    def is_one(path: Path) -> bool:
        """Whether a path looks like a cache."""
        return (path / INDEX).is_file() and (path / CASES).is_dir()

    @staticmethod
    def open(folder: Path) -> Cache:
        """Read the index and check every array by size and header; raises BadDataError or ConfigurationError."""
        path = folder / INDEX
        if not path.is_file():
            started = f"; it was not finished, {_AGAIN}" if (folder / CASES).is_dir() else "; run jrs data prepare"
            raise MissingInputError(f"{folder}: holds no {INDEX}{started}")
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigurationError(f"{path}: is not JSON ({error}); {_AGAIN}") from error
        if isinstance(value, dict) and value.get("format") != _FORMAT:
            raise ConfigurationError(f"{path}: has format {value.get('format')}, this jrs knows {_FORMAT}; {_AGAIN}")
        cache = Cache(folder, decode(CacheIndex, value, str(path)))
        cache.verify(fully=False)
        return cache

    def verify(self, fully: bool = True) -> None:
        """Raise BadDataError, naming the first file, if an array is not what was written; ``fully``: to the byte."""
        wrong = [w for entry in self.index.entries for w in _wrong_arrays(self.folder, entry.record, fully)]
        if wrong:
            more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
            raise BadDataError(f"{wrong[0]}{more}; {_AGAIN}")

    def check_fits(self, model: ModelSpec, atlas_sha256: str) -> None:
        """Raise ConfigurationError if the cases were prepared for another network or atlas.

        A network with fewer channels, or without a segmentation, may use a cache of one with more.
        """
        spec, wanted = self.index.spec, CacheSpec.of(model, atlas_sha256, self.index.spec.align)
        differing = [
            name
            for name, same in {
                "channels": set(wanted.channels) <= set(spec.channels),
                "grid": wanted.grid == spec.grid,
                "normalization": wanted.normalization == spec.normalization,
                "labels": not wanted.labels or wanted.labels == spec.labels,
                "atlas": wanted.atlas_sha256 == spec.atlas_sha256,
                "preparation": wanted.preparation == spec.preparation,
            }.items()
            if not same
        ]
        if differing:
            raise ConfigurationError(
                f"{self.folder}: was prepared for another {' and '.join(differing)} than this run's; "
                "run jrs data prepare with the run's --config and --atlas"
            )
        index = [spec.channels.index(channel) for channel in model.channels]
        for entry in self.index.entries:
            for channel, i in zip(model.channels, index, strict=True):
                if not entry.record.present[i] and channel not in model.optional_channels:
                    raise ConfigurationError(
                        f"{self.folder}: case {entry.name} lacks {channel}, which the network needs; {_AGAIN} with "
                        "the run's --config"
                    )

    def cases(self) -> list[TrainingCase]:
        """The cases as they were found, with their source files."""
        where = f"{self.folder / INDEX}: case"
        return [case_of_row(dict(e.source), self.folder, f"{where} {e.name}") for e in self.index.entries]

    def hashes(self) -> dict[str, list[str]]:
        """Hashes of the native images, by case."""
        return {entry.name: list(entry.record.images.values()) for entry in self.index.entries}

    def load(self, name: str, channels: Sequence[str] | None = None) -> PreparedCase:
        """A case, its arrays mapped into memory; ``channels`` picks some of the cache's (default: all)."""
        record, spec = self.entries[name].record, self.index.spec
        index = list(range(len(spec.channels))) if channels is None else [spec.channels.index(c) for c in channels]
        image = self._map(record, "image")
        whole = index == list(range(len(spec.channels)))
        return PreparedCase(
            image=image if whole else image[index],
            present=tuple(record.present[i] for i in index),
            tumor=self._map(record, "tumor") if "tumor" in record.arrays else None,
            structures=self._map(record, "structures") if "structures" in record.arrays else None,
            hashes=tuple(record.images.items()),
            notes=record.notes,
        )

    def _map(self, record: CaseRecord, name: str) -> npt.NDArray[Any]:
        path = self.folder / CASES / record.key / f"{name}.npy"
        try:
            array: npt.NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise BadDataError(f"{path}: cannot be read ({error}); {_AGAIN}") from error
        return array
