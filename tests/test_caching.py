"""What is kept from run to run: whole or not at all, found by its key alone, never larger than allowed."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jrs.cli.main import run
from jrs.errors import CannotCreateError, UsageError
from jrs.runtime.caching import DEFAULT_LIMIT, KINDS, Entry, Store, cache_folder, cache_limit, digest

KEY = {"bundle": "abc", "grid": [[1, 2, 3], [0.1, -0.0]], "threads": 2}


def arrays(seed: int = 0, n: int = 100) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {"code1": rng.normal(size=(2, n)).astype(np.float32), "code2": np.full((3,), seed, dtype=np.float32)}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "cache")


# Entries --------------------------------------------------------------------------------------------------


def test_what_was_kept_comes_back_to_the_last_bit(store: Store) -> None:
    kept = arrays()
    kept["code1"][0, :4] = [np.nan, -0.0, np.inf, np.nextafter(np.float32(1), np.float32(2))]
    value = {"affine": [[0.1, 1 / 3], [-0.0, 1e-300]]}
    assert store.load("codes", KEY) is None
    assert store.save("codes", KEY, Entry(kept, value))
    found = Store(store.folder).load("codes", dict(reversed(KEY.items())))
    assert found is not None and found.value == value
    assert {name: a.tobytes() for name, a in found.arrays.items()} == {name: a.tobytes() for name, a in kept.items()}
    assert [a.shape for a in found.arrays.values()] == [(2, 100), (3,)]
    found.arrays["code2"][:] = 7.0  # the caller's own
    again = store.load("codes", KEY)
    assert again is not None and float(again.arrays["code2"][0]) == 0.0


def test_arrays_have_one_order_whether_they_come_from_the_disk_or_not() -> None:
    turned = np.arange(6, dtype=np.float32).reshape(2, 3).T
    entry = Entry({"a": turned})
    assert entry.arrays["a"].flags.c_contiguous and np.array_equal(entry.arrays["a"], turned)
    with pytest.raises(TypeError, match="float32"):
        Entry({"a": np.zeros(3)})


def test_an_entry_keeps_what_kind_of_numbers_it_holds(store: Store) -> None:
    kept = {"bits": np.arange(6, dtype=np.uint16).reshape(2, 3) + 40000, "single": np.float32([0.1, np.nan])}
    store.save("codes", KEY, Entry(dict(kept)))
    again = store.load("codes", KEY)
    assert again is not None
    for name, array in kept.items():
        assert again.arrays[name].dtype == array.dtype and again.arrays[name].tobytes() == array.tobytes()


@pytest.mark.parametrize("change", [{"bundle": "abd"}, {"threads": 3}, {"threads": None}, {"further": 1}])
def test_another_key_is_another_entry(store: Store, change: dict[str, object]) -> None:
    store.save("codes", KEY, Entry(arrays()))
    assert store.load("codes", {**KEY, **change}) is None
    assert store.load("input", KEY) is None
    assert digest({**KEY, **change}) != digest(KEY)


def _flip(position: int) -> object:
    def damage(content: bytes) -> bytes:
        changed = bytearray(content)
        changed[position] ^= 1
        return bytes(changed)

    return damage


DAMAGES = {
    "magic": _flip(0),
    "length": _flip(9),
    "checksum": _flip(20),
    "header": _flip(60),
    "first_value": _flip(-812),
    "last_value": _flip(-1),
    "cut_off": lambda content: content[:-1],
    "header_alone": lambda content: content[:-812],
    "longer": lambda content: content + b"\0",
    "empty": lambda content: b"",
    "garbage": lambda content: bytes(range(256)) * 20,
    "no_such_length": lambda content: content[:8] + b"\xff" * 8 + content[16:],
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_entry_is_none_and_goes(store: Store, damage: object) -> None:
    store.save("codes", KEY, Entry(arrays()))
    path = store.path("codes", KEY)
    path.write_bytes(damage(path.read_bytes()))  # type: ignore[operator]
    assert store.load("codes", KEY) is None
    assert not path.exists()
    assert store.save("codes", KEY, Entry(arrays(1)))
    found = store.load("codes", KEY)
    assert found is not None and np.array_equal(found.arrays["code1"], arrays(1)["code1"])


def test_an_entry_under_anothers_name_is_not_taken(store: Store) -> None:
    other = {**KEY, "bundle": "other"}
    store.save("codes", other, Entry(arrays()))
    store.path("codes", other).rename(store.path("codes", KEY))
    assert store.load("codes", KEY) is None


def test_others_cannot_read_what_was_made_from_a_head(store: Store) -> None:
    store.save("codes", KEY, Entry(arrays()))
    for folder in (store.folder, store.folder / "codes"):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700


# Size -----------------------------------------------------------------------------------------------------


def test_the_oldest_used_make_room(tmp_path: Path) -> None:
    one = 4 * 203  # bytes of the arrays of an entry
    store = Store(tmp_path, 3 * one + 900)
    keys = [{"number": number} for number in range(5)]
    for index, key in enumerate(keys[:3]):
        store.save("codes", key, Entry(arrays(index)))
        os.utime(store.path("codes", key), (1000 + index, 1000 + index))
    assert store.load("codes", keys[0]) is not None  # used now: not the oldest any more
    store.save("input", keys[3], Entry(arrays(3)))
    assert [store.path("codes", key).exists() for key in keys[:3]] == [True, False, True]
    os.utime(store.path("input", keys[3]), (1001, 1001))
    store.save("codes", keys[4], Entry(arrays(4)))
    assert not store.path("input", keys[3]).exists()
    assert sum(size for _, size in store.contents().values()) <= store.limit


def test_what_is_larger_than_the_limit_drives_nothing_out(tmp_path: Path) -> None:
    store = Store(tmp_path, 2000)
    store.save("codes", KEY, Entry(arrays()))
    assert not store.save("codes", {"large": 1}, Entry(arrays(n=1000)))
    assert store.load("codes", KEY) is not None


def test_a_limit_of_nothing_keeps_verdicts_alone(tmp_path: Path) -> None:
    store = Store(tmp_path, 0)
    assert not store.save("codes", KEY, Entry(arrays()))
    assert store.save("precision", KEY, Entry(value=1))
    found = store.load("precision", KEY)
    assert found is not None and found.value == 1 and store.load("codes", KEY) is None


def test_what_a_killed_run_left_goes_in_time(store: Store) -> None:
    store.save("codes", KEY, Entry(arrays()))
    old, young = store.folder / "codes" / ".jrs-old.jrs", store.folder / "codes" / ".jrs-young.jrs"
    for file in (old, young):
        file.write_bytes(b"half")
    os.utime(old, (1000, 1000))
    store.save("codes", {"other": 1}, Entry(arrays()))
    assert young.exists() and not old.exists()


@pytest.mark.parametrize(
    ("text", "size"),
    [("", DEFAULT_LIMIT), ("0", 0), ("1234", 1234), ("500MB", 500_000_000), ("1.5 g", 1_500_000_000), ("2kB", 2000)],
)
def test_sizes_as_people_write_them(text: str, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JRS_CACHE_LIMIT", text)
    assert cache_limit() == size


@pytest.mark.parametrize("text", ["much", "-1", "2XB", "1e9", "MB"])
def test_what_is_no_size_is_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JRS_CACHE_LIMIT", text)
    with pytest.raises(UsageError, match="JRS_CACHE_LIMIT"):
        Store.open()


def test_where_it_lies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("JRS_CACHE_DIR", str(tmp_path / "mine"))
    assert Store.open().folder == tmp_path / "mine"
    monkeypatch.delenv("JRS_CACHE_DIR")
    assert cache_folder().name.lower() in ("jrs", "cache")


# Disks and processes --------------------------------------------------------------------------------------


def test_a_folder_that_cannot_be_is_an_empty_cache(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("not a folder")
    store = Store(file / "cache")
    assert not store.save("codes", KEY, Entry(arrays()))
    assert store.load("codes", KEY) is None
    assert set(store.contents().values()) == {(0, 0)}
    store.clear()


@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="root writes everywhere")
def test_a_read_only_folder_gives_what_it_holds(store: Store) -> None:
    store.save("codes", KEY, Entry(arrays()))
    for folder in (store.folder / "codes", store.folder):
        folder.chmod(0o500)
    try:
        assert store.load("codes", KEY) is not None
        assert not store.save("codes", {"other": 1}, Entry(arrays()))
        with pytest.raises(CannotCreateError, match="permissions"):
            store.clear()
    finally:
        for folder in (store.folder, store.folder / "codes"):
            folder.chmod(0o700)


WORKER = """
import sys
from pathlib import Path
import numpy as np
from jrs.runtime.caching import Entry, Store

store = Store(Path(sys.argv[1]), 60_000)
for turn in range(40):
    number = (turn * 7 + int(sys.argv[2])) % 12
    found = store.load("codes", {"number": number})
    if found is not None:
        assert (found.arrays["a"] == number).all() and found.arrays["a"].shape == (2500,)
    else:
        store.save("codes", {"number": number}, Entry({"a": np.full(2500, number, dtype=np.float32)}))
print("done")
"""


def test_processes_share_one_folder(store: Store) -> None:
    """Four at once, more entries than there is room for: each finds a whole entry or none."""
    command = [sys.executable, "-c", WORKER, str(store.folder)]
    running = [
        subprocess.Popen([*command, str(number)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for number in range(4)
    ]
    for process in running:
        out, errors = process.communicate(timeout=120)
        assert (process.returncode, out) == (0, "done\n"), errors
    number, size = store.contents()["codes"]
    assert 0 < size <= 60_000 and 0 < number <= 5
    assert not [file for file in (store.folder / "codes").iterdir() if file.name.startswith(".")]


# The command ----------------------------------------------------------------------------------------------


def test_jrs_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("JRS_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("JRS_CACHE_LIMIT", "3MB")
    store = Store.open()
    store.save("codes", KEY, Entry(arrays()))
    store.save("input", KEY, Entry(arrays()))
    plan = tmp_path / "engines" / "bundle-0" / "encoder-1.plan"
    plan.parent.mkdir(parents=True)
    plan.write_bytes(b"12345")
    strangers = [tmp_path / "codes" / "notes.txt", tmp_path / "letters" / "mine.jrs", tmp_path / "mine.jrs"]
    for file in strangers:
        file.parent.mkdir(exist_ok=True)
        file.write_text("not the cache's")

    def info() -> dict[str, object]:
        capsys.readouterr()
        assert run(["cache", "info", "--json"]) == 0
        found: dict[str, object] = json.loads(capsys.readouterr().out)
        return found

    found = info()
    size = store.path("codes", KEY).stat().st_size
    assert (found["folder"], found["limit"], found["bytes"]) == (str(tmp_path), 3_000_000, 2 * size + 5)
    nothing = {"files": 0, "bytes": 0}
    one = {"files": 1, "bytes": size}
    held = {**dict.fromkeys(KINDS, nothing), "codes": one, "input": one, "engines": {"files": 1, "bytes": 5}}
    assert found["kinds"] == held
    assert run(["cache", "info"]) == 0
    out = capsys.readouterr()
    assert out.out == f"{tmp_path}: 0.0 MB, limit 3.0 MB\n" and "fixed images encoded" in out.err

    assert run(["cache", "clear", "--kind", "input"]) == 0
    assert info()["kinds"] == {**held, "input": nothing}
    assert run(["cache", "clear"]) == 0
    assert info()["bytes"] == 0
    assert all(file.exists() for file in strangers)


def test_jrs_cache_refuses_in_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["cache", "clear", "--kind", "everything"]) == 2
    assert "codes" in capsys.readouterr().err
    monkeypatch.setenv("JRS_CACHE_LIMIT", "lots")
    assert run(["cache", "info"]) == 2
    assert "JRS_CACHE_LIMIT=lots" in capsys.readouterr().err
