"""Output files appear whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from jrs import files
from jrs.errors import CannotCreateError, OutputError
from jrs.files import sha256_of, unnumbered, whole_file, whole_folder, whole_set, write_json, write_text


class Interrupted(BaseException):
    """Stands for whatever may end a block: an error, Ctrl-C, memory running out."""


ENDINGS = (RuntimeError, KeyboardInterrupt, MemoryError, Interrupted)


def tree(folder: Path) -> dict[str, str | None]:
    """Everything below a folder, hidden files too: relative path to content, None for a folder."""
    return {
        str(path.relative_to(folder)): path.read_text(encoding="utf-8") if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture
def umask() -> Iterator[Any]:
    """Set the umask for one test."""
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


@pytest.fixture
def failing_replace(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Let os.replace fail with an error number, from its n-th call on."""

    def arm(number: int, after: int = 0) -> None:
        real, calls = os.replace, 0

        def replace(*arguments: Any, **options: Any) -> None:
            nonlocal calls
            calls += 1
            if calls > after:
                raise OSError(number, os.strerror(number))
            real(*arguments, **options)

        monkeypatch.setattr(os, "replace", replace)

    return arm


# One file -------------------------------------------------------------------------------------------------


def test_a_file_appears_at_the_end_and_nothing_stays_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "note.txt"
    with whole_file(path) as temporary:
        assert temporary.parent == path.parent  # a rename is atomic within a file system only
        temporary.write_text("all of it", encoding="utf-8")
        assert not path.exists()
    assert tree(tmp_path) == {"a": None, "a/b": None, "a/b/note.txt": "all of it"}


def test_the_temporary_name_tells_the_format(tmp_path: Path) -> None:
    with whole_file(tmp_path / "image.nii.gz") as temporary:
        assert temporary.name.endswith(".nii.gz")
    with whole_file(tmp_path / "weights", suffix=".npz") as temporary:
        assert temporary.name.endswith(".npz")


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("existing", [True, False])
def test_a_block_that_fails_leaves_the_old_file_or_none(
    tmp_path: Path, ending: type[BaseException], existing: bool
) -> None:
    path = tmp_path / "note.txt"
    if existing:
        path.write_text("old", encoding="utf-8")
    with pytest.raises(ending), whole_file(path) as temporary:
        temporary.write_text("half", encoding="utf-8")
        raise ending
    assert tree(tmp_path) == ({"note.txt": "old"} if existing else {})


def test_a_new_file_replaces_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "note.txt"
    write_text(path, "old, and longer")
    write_text(path, "né, new")
    assert path.read_bytes() == "né, new".encode()
    assert list(tree(tmp_path)) == ["note.txt"]


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077, 0o000])
def test_permissions_follow_the_umask(tmp_path: Path, umask: Any, mask: int) -> None:
    umask(mask)
    write_text(tmp_path / "file", "x")
    with whole_folder(tmp_path / "folder") as temporary:
        (temporary / "inner").write_text("x", encoding="utf-8")
    with whole_set(tmp_path / "set", ["one"], []) as temporary:
        write_text(temporary / "one", "x")
    assert mode(tmp_path / "file") == 0o666 & ~mask
    assert mode(tmp_path / "folder") == 0o777 & ~mask
    assert mode(tmp_path / "folder" / "inner") == 0o666 & ~mask
    assert mode(tmp_path / "set") == 0o777 & ~mask
    assert mode(tmp_path / "set" / "one") == 0o666 & ~mask
    assert os.umask(mask) == mask  # it was put back


def test_a_folder_that_cannot_be_is_a_cannot_create_error(tmp_path: Path) -> None:
    # A file as parent: permissions would not stop root.
    (tmp_path / "file").write_text("x", encoding="utf-8")
    for path in (tmp_path / "file" / "out.txt", tmp_path / "file" / "sub" / "out.txt"):
        with pytest.raises(CannotCreateError, match="cannot be written") as caught:
            write_text(path, "x")
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value) and "; " in str(caught.value)
        assert caught.value.exit_code == 73
    assert tree(tmp_path) == {"file": "x"}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_is_a_cannot_create_error(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(CannotCreateError, match="Permission denied"):
            write_text(tmp_path / "out.txt", "x")
    finally:
        tmp_path.chmod(0o700)


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (errno.ENOSPC, OutputError),
        (errno.EDQUOT, OutputError),
        (errno.EIO, OutputError),
        (errno.EACCES, CannotCreateError),
        (errno.EROFS, CannotCreateError),
    ],
)
def test_an_error_of_the_disk_keeps_the_old_file(
    tmp_path: Path, failing_replace: Any, number: int, kind: type[Exception]
) -> None:
    path = tmp_path / "note.txt"
    path.write_text("old", encoding="utf-8")
    failing_replace(number)
    with pytest.raises(kind) as caught:
        write_text(path, "new")
    assert type(caught.value) is kind
    assert str(path) in str(caught.value) and os.strerror(number) in str(caught.value)
    assert tree(tmp_path) == {"note.txt": "old"}


def test_a_disk_that_fills_while_writing_is_an_output_error(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="No space left") as caught, whole_file(tmp_path / "note.txt") as temporary:
        temporary.write_text("half", encoding="utf-8")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert caught.value.exit_code == 74
    assert "free some space" in str(caught.value)
    assert tree(tmp_path) == {}


@pytest.mark.parametrize(("free", "kind"), [(0, OutputError), (1 << 30, CannotCreateError)])
def test_a_library_that_does_not_say_that_the_disk_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int, kind: type[Exception]
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=free))
    with pytest.raises(kind, match=r"x\.h5: .*H5Dwrite failed"), whole_file(tmp_path / "x.h5") as temporary:
        raise unnumbered(RuntimeError("ITK ERROR:\nH5Dwrite failed"), temporary.parent)
    assert tree(tmp_path) == {}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's full device")
def test_a_device_that_is_full_is_an_output_error(tmp_path: Path) -> None:
    # The kernel's own ENOSPC, raised where Python flushes.
    with pytest.raises(OutputError), whole_file(tmp_path / "note.txt"), open("/dev/full", "w") as full:  # noqa: PTH123
        full.write("x")
    assert tree(tmp_path) == {}


# A folder -------------------------------------------------------------------------------------------------


def test_a_folder_appears_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "bundle"
    with whole_folder(path) as temporary:
        (temporary / "one").write_text("1", encoding="utf-8")
        assert not path.exists()
    assert tree(tmp_path) == {"deep": None, "deep/bundle": None, "deep/bundle/one": "1"}


def test_an_existing_folder_is_refused_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "old").write_text("old", encoding="utf-8")
    worked = False
    with pytest.raises(CannotCreateError, match="--overwrite"), whole_folder(tmp_path / "bundle"):
        worked = True
    assert not worked
    assert tree(tmp_path) == {"bundle": None, "bundle/old": "old"}


def test_overwriting_a_folder_leaves_nothing_of_the_old_one(tmp_path: Path) -> None:
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "old").write_text("old", encoding="utf-8")
    with whole_folder(tmp_path / "bundle", overwrite=True) as temporary:
        (temporary / "new").write_text("new", encoding="utf-8")
        assert (tmp_path / "bundle" / "old").exists()
    assert tree(tmp_path) == {"bundle": None, "bundle/new": "new"}


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("existing", [True, False])
def test_a_folder_whose_block_fails_is_the_old_one_or_none(
    tmp_path: Path, ending: type[BaseException], existing: bool
) -> None:
    if existing:
        (tmp_path / "bundle").mkdir()
        (tmp_path / "bundle" / "old").write_text("old", encoding="utf-8")
    with pytest.raises(ending), whole_folder(tmp_path / "bundle", overwrite=True) as temporary:
        (temporary / "half").write_text("half", encoding="utf-8")
        raise ending
    assert tree(tmp_path) == ({"bundle": None, "bundle/old": "old"} if existing else {})


@pytest.mark.parametrize("overwrite", [True, False])
def test_a_file_in_the_place_of_a_folder_is_refused(tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "bundle").write_text("x", encoding="utf-8")
    with pytest.raises(CannotCreateError), whole_folder(tmp_path / "bundle", overwrite):
        pass
    with pytest.raises(CannotCreateError), whole_set(tmp_path / "bundle", ["a"], [], overwrite):
        pass
    with pytest.raises(CannotCreateError), whole_folder(tmp_path / "bundle" / "inner"):
        pass
    assert tree(tmp_path) == {"bundle": "x"}


def test_a_full_disk_at_the_end_of_a_folder_is_an_output_error(tmp_path: Path, failing_replace: Any) -> None:
    failing_replace(errno.ENOSPC)
    with pytest.raises(OutputError, match="free some space"), whole_folder(tmp_path / "bundle") as temporary:
        (temporary / "one").write_text("1", encoding="utf-8")
    assert tree(tmp_path) == {}


@pytest.mark.parametrize("after", [0, 1])
def test_a_full_disk_while_overwriting_a_folder_does_not_lose_the_old_one(
    tmp_path: Path, failing_replace: Any, after: int
) -> None:
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "old").write_text("old", encoding="utf-8")
    failing_replace(errno.ENOSPC, after)
    with (
        pytest.raises(OutputError, match="free some space"),
        whole_folder(tmp_path / "bundle", overwrite=True) as temporary,
    ):
        (temporary / "new").write_text("new", encoding="utf-8")
    assert tree(tmp_path) == {"bundle": None, "bundle/old": "old"}


# A set of files -------------------------------------------------------------------------------------------


def fill(folder: Path, **content: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in content.items():
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def test_a_set_appears_together(tmp_path: Path) -> None:
    folder = tmp_path / "out" / "case"
    with whole_set(folder, ["a", "b"], []) as temporary:
        fill(temporary, a="1", b="2")
        assert not (folder / "a").exists()
    assert tree(folder) == {"a": "1", "b": "2"}


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_set_whose_block_fails_changes_nothing(tmp_path: Path, ending: type[BaseException]) -> None:
    folder = fill(tmp_path / "case", a="old", stale="old", other="kept")
    with pytest.raises(ending), whole_set(folder, ["a", "b"], ["stale"], overwrite=True) as temporary:
        fill(temporary, a="half")
        raise ending
    assert tree(folder) == {"a": "old", "stale": "old", "other": "kept"}
    with pytest.raises(ending), whole_set(tmp_path / "new", ["a"], []) as temporary:
        fill(temporary, a="half")
        raise ending
    assert not (tmp_path / "new").exists()


def test_an_existing_file_of_a_set_is_refused_before_the_work(tmp_path: Path) -> None:
    folder = fill(tmp_path / "case", b="old")
    worked = False
    with pytest.raises(CannotCreateError, match="--overwrite") as caught, whole_set(folder, ["a", "b"], []):
        worked = True
    assert not worked
    assert str(folder / "b") in str(caught.value)
    assert tree(folder) == {"b": "old"}


def test_a_set_that_another_process_wrote_meanwhile_is_left_alone(tmp_path: Path) -> None:
    with pytest.raises(CannotCreateError, match="--overwrite"), whole_set(tmp_path / "case", ["a", "b"], []) as mine:
        fill(mine, a="mine", b="mine")
        with whole_set(tmp_path / "case", ["a", "b"], []) as theirs:
            fill(theirs, a="theirs", b="theirs")
    assert tree(tmp_path / "case") == {"a": "theirs", "b": "theirs"}


def test_a_set_goes_beside_files_of_others(tmp_path: Path) -> None:
    folder = fill(tmp_path / "case", other="kept")
    with whole_set(folder, ["a"], ["stale"]) as temporary:
        fill(temporary, a="new")
    assert tree(folder) == {"a": "new", "other": "kept"}


def test_overwriting_a_set_removes_what_is_stale(tmp_path: Path) -> None:
    folder = fill(tmp_path / "case", a="old", stale="old", other="kept")
    with whole_set(folder, ["a"], ["stale", "never there"], overwrite=True) as temporary:
        fill(temporary, a="new")
        assert (folder / "stale").exists()
    assert tree(folder) == {"a": "new", "other": "kept"}


def test_without_overwrite_nothing_of_an_earlier_run_is_removed(tmp_path: Path) -> None:
    """A file that would be removed as stale is data as well: refuse, or leave it."""
    folder = fill(tmp_path / "case", stale="hand-corrected labels")
    try:
        with whole_set(folder, ["a"], ["stale"], overwrite=False) as temporary:
            fill(temporary, a="new")
    except CannotCreateError:
        pass
    assert tree(folder).get("stale") == "hand-corrected labels"


def test_a_full_disk_at_the_end_of_a_set_is_an_output_error(tmp_path: Path, failing_replace: Any) -> None:
    folder = fill(tmp_path / "case", a="old")
    failing_replace(errno.ENOSPC)
    with (
        pytest.raises(OutputError, match="free some space"),
        whole_set(folder, ["a", "b"], [], overwrite=True) as temporary,
    ):
        fill(temporary, a="new", b="new")
    assert tree(folder) == {"a": "old"}


def test_a_full_disk_while_replacing_does_not_remove_stale_files_first(
    tmp_path: Path, failing_replace: Any
) -> None:
    folder = fill(tmp_path / "case", a="old", stale="old")
    failing_replace(errno.ENOSPC)
    with pytest.raises(OutputError), whole_set(folder, ["a"], ["stale"], overwrite=True) as temporary:
        fill(temporary, a="new")
    assert tree(folder) == {"a": "old", "stale": "old"}


def test_a_full_disk_half_way_leaves_only_whole_files(tmp_path: Path, failing_replace: Any) -> None:
    folder = fill(tmp_path / "case", a="old", b="old")
    failing_replace(errno.ENOSPC, after=1)
    with pytest.raises(OutputError), whole_set(folder, ["a", "b"], [], overwrite=True) as temporary:
        fill(temporary, a="new", b="new")
    assert set(tree(folder)) == {"a", "b"}
    assert set(tree(folder).values()) <= {"old", "new"}


def test_an_unwritable_place_of_a_set_is_a_cannot_create_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x", encoding="utf-8")
    with pytest.raises(CannotCreateError, match="cannot be written"), whole_set(tmp_path / "file" / "case", ["a"], []):
        pass
    assert tree(tmp_path) == {"file": "x"}


# JSON and checksums ---------------------------------------------------------------------------------------


def test_json_is_utf8_and_reads_back(tmp_path: Path) -> None:
    value = {"name": "Müller", "numbers": [1, 2.5, None], "nested": {"yes": True}}
    write_json(tmp_path / "a.json", value)
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert json.loads(text) == value
    assert "Müller" in text and text.endswith("}\n")


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_json_refuses_what_no_other_reader_takes(tmp_path: Path, number: float) -> None:
    write_json(tmp_path / "a.json", {"old": 1})
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "a.json", {"deep": [1.0, {"x": number}]})
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"old": 1}
    assert list(tree(tmp_path)) == ["a.json"]


def test_checksum_of_a_file_larger_than_a_block(tmp_path: Path) -> None:
    content = bytes(range(256)) * 9000  # 2.2 MB
    (tmp_path / "a").write_bytes(content)
    assert sha256_of(tmp_path / "a") == hashlib.sha256(content).hexdigest()
    # FIPS 180-2, appendix B.1.
    (tmp_path / "b").write_bytes(b"abc")
    assert sha256_of(tmp_path / "b") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_remove_tree_takes_what_is_not_there(tmp_path: Path) -> None:
    fill(tmp_path / "a" / "b", c="1")
    files.remove_tree(tmp_path / "a")
    files.remove_tree(tmp_path / "a")
    assert tree(tmp_path) == {}
