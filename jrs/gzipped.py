"""Gzip by ISA-L where it is installed, else by zlib: the same format, read and written several times as fast."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path
from typing import IO, Any, cast

try:
    from isal import igzip, isal_zlib
except ImportError:  # there is no wheel for every machine
    igzip = isal_zlib = None  # type: ignore[assignment]

_ISAL_LEVEL, _ZLIB_LEVEL = 2, 1  # docs/speed.md has the measurements
_GZIP = 31  # window bits that ask for gzip's header and checksum

DAMAGED: tuple[type[Exception], ...] = (gzip.BadGzipFile, zlib.error)
"""What reading a damaged stream raises; one that ends early raises EOFError."""
if isal_zlib is not None:
    DAMAGED = (*DAMAGED, isal_zlib.IsalError)  # type: ignore[arg-type]  # its stubs say an instance


def open_gzip(path: Path) -> IO[bytes]:
    """A gzip file for reading; its end is reached only if its checksums hold."""
    opener: Any = gzip.open if igzip is None else igzip.open
    return cast(IO[bytes], opener(path, "rb"))


def crc32(content: Any, value: int = 0) -> int:
    """The checksum that gzip uses, of the bytes of a buffer; ``value`` is that of what lies before it."""
    return int((zlib if isal_zlib is None else isal_zlib).crc32(content, value))


def packer() -> Any:
    """Makes one gzip member with ``compress`` and ``flush``, as `zlib.compressobj` does.

    It holds neither name nor time: equal content gives equal bytes.
    """
    if isal_zlib is None:
        return zlib.compressobj(_ZLIB_LEVEL, zlib.DEFLATED, _GZIP)
    return isal_zlib.compressobj(_ISAL_LEVEL, isal_zlib.DEFLATED, _GZIP)


def packed(content: bytes) -> bytes:
    """Content as a gzip file."""
    stream = packer()
    result: bytes = stream.compress(content) + stream.flush()
    return result
