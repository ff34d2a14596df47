"""Output files appear whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jrs.errors import AlreadyThereError, CannotCreateError, OutputError, last_line

_ROOM = 1 << 20


@contextmanager
def whole_file(path: Path, suffix: str | None = None) -> Iterator[Path]:
    """Yield a temporary path in the folder of ``path``; on success it replaces ``path``, else it is removed.

    ``suffix`` is the ending of the temporary name, for writers that choose a format by it
    (default: the ending of ``path``).
    """
    ending = suffix if suffix is not None else "".join(path.suffixes[-2:])
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=".jrs-", suffix=ending, dir=path.parent)
        os.close(handle)
    except OSError as error:
        raise _cannot_write(path, error) from error
    temporary = Path(name)
    try:
        yield temporary
        _open_to_others(temporary, 0o666)
        temporary.replace(path)
    except OSError as error:
        raise _cannot_write(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: Path, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary folder beside ``path`` that becomes ``path`` when the block ends without an error.

    An existing ``path`` is an error unless ``overwrite``; then it is replaced at the end, and only if the
    new one is complete.
    """
    if path.exists() and not overwrite:
        raise AlreadyThereError(path, "choose another name or pass --overwrite")
    if path.exists() and not path.is_dir():
        raise CannotCreateError(f"{path}: is a file, a folder is to be written there; choose another name")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    except OSError as error:
        raise _cannot_write(path, error) from error
    try:
        yield temporary
        _open_to_others(temporary, 0o777)
        if path.exists():
            _swap(path, temporary)
        else:
            temporary.replace(path)
    except OSError as error:
        raise _cannot_write(path, error) from error
    finally:
        if temporary.exists():
            remove_tree(temporary)


_UMASK_LOCK = threading.Lock()


def _open_to_others(path: Path, mode: int) -> None:
    """Temporary names are private; what they become follows the user's umask as any other file does."""
    # The umask can only be read by setting it, for the whole process: one thread at a time.
    with _UMASK_LOCK:
        umask = os.umask(0)
        os.umask(umask)
    path.chmod(mode & ~umask)


def _swap(path: Path, new: Path) -> None:
    """Put folder ``new`` in the place of ``path``; if that fails, ``path`` is what it was."""
    retired = Path(tempfile.mkdtemp(prefix=f".{path.name}-old-", dir=path.parent))
    try:
        path.replace(retired / path.name)
        try:
            new.replace(path)
        except OSError:
            (retired / path.name).rename(path)
            raise
    finally:
        remove_tree(retired)


@contextmanager
def whole_set(folder: Path, names: list[str], stale: list[str], overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary folder; when the block ends without an error, its files move into ``folder`` together.

    If one of ``names`` is there already, that is an error unless ``overwrite``; then files named in ``stale``
    (of an earlier run) are removed when the new ones take their place.
    """
    refuse_existing(folder, names, overwrite)
    created = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".jrs-", dir=folder))
    except OSError as error:
        raise _cannot_write(folder, error) from error
    try:
        yield temporary
        refuse_existing(folder, names, overwrite)  # another process may have been faster
        written = sorted(temporary.iterdir())
        for file in written:
            file.replace(folder / file.name)
        if overwrite:
            for name in set(stale) - {file.name for file in written}:
                (folder / name).unlink(missing_ok=True)
    except OSError as error:
        raise _cannot_write(folder, error) from error
    finally:
        remove_tree(temporary)
        if created and not any(folder.iterdir()):
            folder.rmdir()


def refuse_existing(folder: Path, names: list[str], overwrite: bool) -> None:
    """Raise AlreadyThereError if one of the files is there, unless ``overwrite``."""
    if folder.exists() and not folder.is_dir():
        raise AlreadyThereError(folder, "it is a file, and a folder is to be written there; choose another --out")
    there = [name for name in names if (folder / name).exists()]
    if there and not overwrite:
        raise AlreadyThereError(folder / there[0], "choose another --out or pass --overwrite")


def remove_tree(path: Path) -> None:
    """Remove a folder and all that it holds."""
    import shutil

    shutil.rmtree(path, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text, whole or not at all; of names that are none, each byte becomes an escape as JSON has them."""
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON; NaN is refused because no other reader takes it."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def sha256_of(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        for block in iter(lambda: stream.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def unnumbered(error: Exception, folder: Path, otherwise: int = 0) -> OSError:
    """The OSError behind a library's own error at writing into ``folder``, which has words and no number.

    It is that of a full disk if next to nothing is left on it, while the unfinished file is still there.
    """
    full = shutil.disk_usage(folder).free < _ROOM
    return OSError(errno.ENOSPC if full else otherwise, last_line(error))


def _cannot_write(path: Path, error: OSError) -> CannotCreateError | OutputError:
    reason = error.strerror or str(error)
    if error.errno in (errno.ENOSPC, errno.EIO, errno.EDQUOT):
        return OutputError(f"{path}: {reason}; free some space or choose another folder")
    return CannotCreateError(f"{path}: cannot be written ({reason}); choose another folder")
