"""Whether the command begins again with large pages: once, where it helps, with the same arguments."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from jrs.cli import start


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Linux with glibc 2.36 whose large pages are for programs that ask; the file that says so."""
    modes = tmp_path / "enabled"
    modes.write_text("always [madvise] never\n")
    monkeypatch.setattr(start, "_MODES", modes)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(os, "confstr", lambda name: "glibc 2.36", raising=False)
    return modes


def test_infer_asks_for_large_pages(system: Path) -> None:
    assert start.wants_large_pages(["infer", "case"], {})
    assert not start.wants_large_pages(["doctor"], {})
    assert not start.wants_large_pages([], {})
    assert not start.wants_large_pages(["infer", "case"], {"GLIBC_TUNABLES": "glibc.malloc.check=1"})


@pytest.mark.parametrize("mode", ["[always] madvise never", "always madvise [never]", ""])
def test_where_the_system_decides_nothing_is_asked(system: Path, mode: str) -> None:
    system.write_text(mode)
    assert not start.wants_large_pages(["infer"], {})
    system.unlink()
    assert not start.wants_large_pages(["infer"], {})


@pytest.mark.parametrize("version", ["glibc 2.34", "musl 1.2", "", "glibc"])
def test_an_allocator_that_cannot_is_left_alone(
    system: Path, version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "confstr", lambda name: version)
    assert not start.wants_large_pages(["infer"], {})
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.delattr(os, "confstr")
    assert not start.wants_large_pages(["infer"], {})


def test_the_command_begins_again_once_with_its_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the real command: the second process finds the tunables set, and says what any would."""
    modes = tmp_path / "enabled"
    modes.write_text("always [madvise] never\n")
    monkeypatch.setattr(start, "_MODES", modes)
    code = (
        "import os, pathlib\nfrom jrs.cli import start\n"
        f"start._MODES = pathlib.Path({str(modes)!r})\n"
        "print(os.getpid(), os.environ.get('GLIBC_TUNABLES'), flush=True)\nstart.start()"
    )
    environment = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    command = [sys.executable, "-c", code, "infer", str(tmp_path / "no such case"), "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 66, done.stderr
    assert "no such case" in done.stderr and done.stderr.count("\n") == 1
    lines = done.stdout.splitlines()
    if not start.wants_large_pages(["infer"], environment):
        pytest.skip("this system gives no large pages")
    (first, before), (second, after) = (line.split() for line in lines)
    assert first == second and (before, after) == ("None", start.LARGE_PAGES)


@pytest.mark.parametrize(("users", "want"), [(None, "1"), ("3", "3")])
def test_numpys_own_threads_are_left_out(users: str | None, want: str) -> None:
    """NumPy reads the variable when it is loaded, so it must not be there yet."""
    code = (
        "import os, sys\nfrom jrs.cli import start\nprint('numpy' in sys.modules)\n"
        "sys.argv[1:] = ['--version']\ntry:\n    start.start()\nexcept SystemExit:\n"
        f"    print(os.environ['{start.NUMPY_THREADS}'])"
    )
    environment = {name: value for name, value in os.environ.items() if name != start.NUMPY_THREADS}
    environment |= {} if users is None else {start.NUMPY_THREADS: users}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    before, *_, after = done.stdout.split()
    assert (before, after) == ("False", want)


def test_the_command_says_all_before_it_ends() -> None:
    """It leaves Python at once: nothing may be lost in a buffer on the way."""
    command = [sys.executable, "-m", "jrs", "infer"]
    done = subprocess.run([*command, "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "--refine" in done.stdout and done.stdout.endswith("\n")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.startswith("jrs: no case given")


@pytest.mark.parametrize("closed", [">&-", "2>&-"])
def test_a_stream_that_was_closed_is_no_error(closed: str) -> None:
    command = f"{sys.executable} -m jrs infer --help {closed}"
    done = subprocess.run(["/bin/sh", "-c", command], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and not done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_output_that_cannot_be_written_is_an_error() -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "jrs", "infer", "--help"], stdout=full, stderr=subprocess.PIPE, check=False
        )
    assert done.returncode != 0
