"""What is kept from run to run in the user's cache folder: arrays and verdicts, whole, checked, limited in size.

An entry is one file, ``<folder>/<kind>/<digest of its key>.jrs``: 8 bytes of magic, the length of the header and a
CRC-32 of all that follows, 8 bytes each, a JSON header (key, value, arrays) and the arrays' bytes. One that does not
hold in every part is removed, and is as if it had never been. Nothing here raises for the state of the disk: a cache
that cannot be read or written is an empty one.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from jrs.errors import CannotCreateError, JrsError, UsageError
from jrs.files import whole_file
from jrs.gzipped import crc32

FOLDER_VARIABLE = "JRS_CACHE_DIR"
LIMIT_VARIABLE = "JRS_CACHE_LIMIT"
DEFAULT_LIMIT = 2_000_000_000
KINDS = {
    "input": "fixed images as the network takes them",
    "codes": "fixed images encoded",
    "affine": "fixed images as the affine alignment takes them",
    "pyramid": "fixed images as the refinement takes them",
    "precision": "verdicts on bf16",
    "engines": "TensorRT engines",
}
"""Folder of each kind -> what it holds."""
VERDICTS = "precision"
"""Of some hundred bytes each: they are not what takes the room."""
ENGINES = "engines"
"""Counted and cleared here, kept by ``jrs.runtime.engines.plans``."""

_DTYPES = np.dtype(np.float32), np.dtype(np.uint16)
_MAGIC = b"JRSCACH2"
_LONGEST_HEADER = 1 << 20
_ENDING = ".jrs"
_LOCK_S = 5.0
_LEFT_OVER_S = 3600.0
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}


def cache_folder() -> Path:
    """``JRS_CACHE_DIR``, else the user's cache folder of this system."""
    named = os.environ.get(FOLDER_VARIABLE)
    if named:
        return Path(named).expanduser()
    import platformdirs

    return Path(platformdirs.user_cache_dir("jrs", appauthor=False))


def cache_limit() -> int:
    """``JRS_CACHE_LIMIT`` in bytes (``500MB``, ``2G``, ``0`` for nothing), else 2 GB."""
    named = os.environ.get(LIMIT_VARIABLE, "").strip()
    if not named:
        return DEFAULT_LIMIT
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)b?", named.lower())
    if found is None:
        raise UsageError(f"{LIMIT_VARIABLE}={named}: is no size; write it like 500MB or 2GB, or 0 for no cache")
    return int(float(found[1]) * _UNITS[found[2]])


@dataclass(frozen=True, eq=False)
class Entry:
    """What is stored under a key: named arrays, float32 or uint16, and a JSON value.

    Arrays come in C order, as they do from the disk: sums over another order differ in their last bits.
    """

    arrays: dict[str, npt.NDArray[Any]] = field(default_factory=dict)
    value: Any = None

    def __post_init__(self) -> None:
        if any(array.dtype not in _DTYPES for array in self.arrays.values()):
            raise TypeError("an entry holds float32 and uint16 arrays")
        ordered = {name: np.ascontiguousarray(array) for name, array in self.arrays.items()}
        object.__setattr__(self, "arrays", ordered)


@dataclass(frozen=True)
class Store:
    """A cache folder and how many bytes its entries may take; 0 keeps verdicts alone."""

    folder: Path
    limit: int = DEFAULT_LIMIT

    @staticmethod
    def open() -> Store:
        """The user's, as the environment says; raises UsageError for a limit that is no size."""
        return Store(cache_folder(), cache_limit())

    def path(self, kind: str, key: Mapping[str, Any]) -> Path:
        """Where an entry lies."""
        return self.folder / kind / f"{digest(key)[:40]}{_ENDING}"

    def load(self, kind: str, key: Mapping[str, Any]) -> Entry | None:
        """The entry of this key, or None; a damaged one is removed."""
        if not self._keeps(kind):
            return None
        path = self.path(kind, key)
        try:
            with path.open("rb") as stream:
                entry = _read(stream, key)
        except OSError:
            return None
        except (ValueError, KeyError, TypeError, AttributeError):
            _remove(path)
            return None
        with suppress(OSError):
            os.utime(path)  # the oldest used goes first
        return entry

    def save(self, kind: str, key: Mapping[str, Any], entry: Entry) -> bool:
        """Keep an entry, and let the oldest used go where that is more than the limit; whether it is kept."""
        size = sum(array.nbytes for array in entry.arrays.values())
        if not self._keeps(kind) or (kind != VERDICTS and size > self.limit):
            return False
        from filelock import FileLock, Timeout

        path = self.path(kind, key)
        try:
            # Whatever lies here was made from somebody's head.
            for folder in (self.folder, path.parent):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with FileLock(self.folder / ".lock", timeout=_LOCK_S):
                with whole_file(path) as temporary, temporary.open("wb") as stream:
                    _write(stream, key, entry)
                self._make_room()
        except (JrsError, OSError, Timeout, NotImplementedError):
            return False
        return True

    def _keeps(self, kind: str) -> bool:
        return self.limit > 0 or kind == VERDICTS

    def _make_room(self) -> None:
        files = []
        for kind in KINDS:
            for file in self._files(kind) if kind not in (VERDICTS, ENGINES) else ():
                with suppress(FileNotFoundError):
                    stat = file.stat()
                    if not file.name.startswith("."):
                        files.append((stat.st_mtime_ns, stat.st_size, file))
                    elif stat.st_mtime < time.time() - _LEFT_OVER_S:
                        _remove(file)  # of a run that was killed
        total = sum(size for _, size, _ in files)
        for _, size, file in sorted(files):
            if total <= self.limit:
                break
            _remove(file)
            total -= size

    def _files(self, kind: str) -> list[Path]:
        """The files of a kind, and no others: the folder may be one that is not jrs's alone."""
        if kind != ENGINES:
            return list((self.folder / kind).glob(f"*{_ENDING}"))
        return [file for file in (self.folder / kind).glob("*/*") if file.suffix in (".plan", ".json", ".cache")]

    def contents(self) -> dict[str, tuple[int, int]]:
        """Number and bytes of the files of each kind."""
        found = {}
        for kind in KINDS:
            sizes = []
            for file in self._files(kind):
                with suppress(OSError):
                    sizes.append(file.stat().st_size)
            found[kind] = (len(sizes), sum(sizes))
        return found

    def clear(self, kind: str | None = None) -> None:
        """Remove what there is, or what there is of one kind; raises CannotCreateError for what stays."""
        for name in KINDS if kind is None else [kind]:
            for file in self._files(name):
                try:
                    file.unlink(missing_ok=True)
                except OSError as error:
                    raise CannotCreateError(
                        f"{file}: cannot be removed ({error.strerror}); change the folder's permissions"
                    ) from error


def digest(key: Any) -> str:
    """SHA-256 of a JSON value, whatever the order of its keys."""
    return hashlib.sha256(_json(key)).hexdigest()


def _json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, allow_nan=False, separators=(",", ":")).encode()


def _remove(path: Path) -> None:
    with suppress(OSError):  # in a read-only folder it is refused the next time again
        path.unlink(missing_ok=True)


def _write(stream: BinaryIO, key: Mapping[str, Any], entry: Entry) -> None:
    arrays = {name: array.astype(array.dtype.newbyteorder("<"), copy=False) for name, array in entry.arrays.items()}
    shapes = [[name, list(array.shape), array.dtype.name] for name, array in arrays.items()]
    header = _json({"key": key, "value": entry.value, "arrays": shapes})
    checksum = crc32(header)
    for array in arrays.values():
        checksum = crc32(array.data, checksum)
    stream.write(_MAGIC + len(header).to_bytes(8, "little") + checksum.to_bytes(8, "little") + header)
    for array in arrays.values():
        stream.write(array.data)


def _read(stream: BufferedReader, key: Mapping[str, Any]) -> Entry:
    """Raises ValueError, KeyError or TypeError for anything but the whole entry of this key."""
    start = stream.read(len(_MAGIC) + 8 + 8)
    length, wanted = (int.from_bytes(start[i : i + 8], "little") for i in (8, 16))
    if start[:8] != _MAGIC or length > _LONGEST_HEADER:
        raise ValueError("no entry of this format")
    header = stream.read(length)
    described = json.loads(header)
    if _json(described["key"]) != _json(key):
        raise ValueError("another key")
    shapes = {name: (tuple(int(n) for n in shape), np.dtype(kind)) for name, shape, kind in described["arrays"]}
    size = sum(dtype.itemsize * int(np.prod(shape)) for shape, dtype in shapes.values())
    if os.fstat(stream.fileno()).st_size != len(start) + length + size:
        raise ValueError("cut off")
    checksum, arrays = crc32(header), {}
    for name, (shape, dtype) in shapes.items():
        array = np.empty(shape, dtype.newbyteorder("<"))
        stream.readinto(array.data.cast("B"))
        checksum = crc32(array.data, checksum)
        arrays[name] = array.astype(dtype, copy=False)
    if checksum != wanted:
        raise ValueError("damaged")
    return Entry(arrays, described["value"])
