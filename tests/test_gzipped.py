"""Gzip by either library: what is written strict readers take, what is damaged is refused."""

from __future__ import annotations

import gzip
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest

import jrs
from jrs import gzipped
from jrs.gzipped import DAMAGED, crc32, open_gzip, packed, packer

# Runs, noise and a longer stretch of zeros: stored, fixed and dynamic blocks.
CONTENT = np.random.default_rng(0).integers(0, 40, 6000).astype(np.uint8).tobytes() + bytes(3000) + b"end"
REFUSALS = (EOFError, *DAMAGED)


@pytest.fixture(params=["isal", "zlib"], autouse=True)
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    name = str(request.param)
    if name == "zlib":
        monkeypatch.setattr(gzipped, "igzip", None)
        monkeypatch.setattr(gzipped, "isal_zlib", None)
    else:
        pytest.importorskip("isal")
    return name


def strictly(content: bytes) -> bytes:
    """Unpacked by zlib, which must find one whole member and nothing behind it."""
    stream = zlib.decompressobj(31)
    data = stream.decompress(content)
    assert stream.eof and stream.unused_data == b"" and stream.unconsumed_tail == b""
    return data


def read(path: Path, content: bytes, at_a_time: int = 1000) -> bytes:
    path.write_bytes(content)
    with open_gzip(path) as stream:
        return b"".join(iter(lambda: stream.read(at_a_time), b""))


# Writing --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"", b"x", CONTENT, bytes(5_000_000), CONTENT * 300])
def test_one_whole_member(content: bytes) -> None:
    assert strictly(packed(content)) == content


def test_neither_name_nor_time_is_kept() -> None:
    head = packed(CONTENT)[:10]
    # RFC 1952: magic, method 8, flags, seconds; flag 8 would be a name.
    assert head[:4] == b"\x1f\x8b\x08\x00" and head[4:8] == bytes(4)
    assert packed(CONTENT) == packed(CONTENT)


def test_pieces_of_any_size_and_kind() -> None:
    stream = packer()
    data = np.frombuffer(CONTENT, dtype=np.uint8)
    pieces = [stream.compress(piece.data.cast("B")) for piece in np.array_split(data, 7)]
    assert strictly(b"".join((*pieces, stream.flush()))) == CONTENT


# Reading --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", [0, 1, 6, 9])
@pytest.mark.parametrize("at_a_time", [1, 777, 2**20])
def test_whatever_zlib_wrote_is_read(tmp_path: Path, level: int, at_a_time: int) -> None:
    assert read(tmp_path / "a.gz", gzip.compress(CONTENT, level), at_a_time) == CONTENT


def test_several_members_are_read_as_one(tmp_path: Path) -> None:
    members = gzip.compress(CONTENT[:10]) + gzip.compress(b"") + gzip.compress(CONTENT[10:])
    assert read(tmp_path / "a.gz", members) == CONTENT


def test_zeros_behind_the_end_are_padding(tmp_path: Path) -> None:
    assert read(tmp_path / "a.gz", gzip.compress(CONTENT) + bytes(300)) == CONTENT


def test_names_comments_and_more_in_the_header(tmp_path: Path) -> None:
    raw = zlib.compressobj(6, zlib.DEFLATED, -15)
    body = raw.compress(CONTENT) + raw.flush()
    # RFC 1952: extra field, name, comment and a checksum of the header itself.
    head = b"\x1f\x8b\x08\x1e" + bytes(6) + struct.pack("<H", 5) + b"extraname\0comment\0"
    head += struct.pack("<H", zlib.crc32(head) & 0xFFFF)
    tail = struct.pack("<II", zlib.crc32(CONTENT), len(CONTENT))
    assert read(tmp_path / "a.gz", head + body + tail) == CONTENT


def test_cut_off_anywhere(tmp_path: Path) -> None:
    whole = gzip.compress(CONTENT)
    for length in (*range(2, 40), *range(40, len(whole) - 20, 97), *range(len(whole) - 20, len(whole))):
        with pytest.raises(EOFError):
            read(tmp_path / "a.gz", whole[:length])


@pytest.mark.parametrize("level", [0, 6])
def test_a_flipped_bit_is_never_taken_for_the_content(tmp_path: Path, level: int) -> None:
    whole = gzip.compress(CONTENT, level, mtime=0)
    for at in (*range(10, 30), *range(30, len(whole) - 8, 61)):
        damaged = bytearray(whole)
        damaged[at] ^= 1 << at % 8
        with pytest.raises(REFUSALS):
            read(tmp_path / "a.gz", bytes(damaged))


@pytest.mark.parametrize("at", range(-8, 0))
def test_a_wrong_checksum_or_length_is_damage(tmp_path: Path, at: int) -> None:
    damaged = bytearray(gzip.compress(CONTENT))
    damaged[at] ^= 1
    with pytest.raises(DAMAGED):
        read(tmp_path / "a.gz", bytes(damaged))


def test_anything_else_behind_the_end_is_damage(tmp_path: Path) -> None:
    with pytest.raises(DAMAGED):
        read(tmp_path / "a.gz", gzip.compress(CONTENT) + b"something else")
    with pytest.raises(REFUSALS):  # shorter than a header: ISA-L takes it for a member that is cut off
        read(tmp_path / "a.gz", gzip.compress(CONTENT) + b"some")


def test_a_bomb_is_unpacked_only_as_far_as_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.gz"
    path.write_bytes(gzip.compress(bytes(200_000_000), 1)[:-1])  # its end would be an error
    with open_gzip(path) as stream:
        assert stream.read(1000) == bytes(1000)


# Without ISA-L --------------------------------------------------------------------------------------------


def test_it_works_where_isa_l_is_not_installed(tmp_path: Path, library: str) -> None:
    if library == "isal":
        pytest.skip("once is enough")
    path = tmp_path / "a.gz"
    code = (
        "import sys; sys.modules['isal'] = None\n"
        "from pathlib import Path\nfrom jrs import gzipped\n"
        f"assert gzipped.isal_zlib is None\npath = Path({str(path)!r})\n"
        "path.write_bytes(gzipped.packed(b'content'))\nprint(gzipped.open_gzip(path).read())"
    )
    root = str(Path(jrs.__file__).resolve().parent.parent)
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": root},
        check=False,
    )
    assert done.stdout == "b'content'\n", done.stderr
    assert gzip.decompress(path.read_bytes()) == b"content"


def test_the_checksum_is_zlibs_in_one_piece_or_several() -> None:
    array = np.arange(5000, dtype=np.float32)
    assert crc32(array.data) == zlib.crc32(array.tobytes())
    assert crc32(CONTENT[100:], crc32(CONTENT[:100])) == zlib.crc32(CONTENT)
