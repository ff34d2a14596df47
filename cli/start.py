"""Where the ``jrs`` command starts: with an allocator that takes large pages, where there is a choice."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

NUMPY_THREADS = "OPENBLAS_NUM_THREADS"
TUNABLES = "GLIBC_TUNABLES"
# Large pages, and one heap for all threads: what one has freed another takes without touching new memory.
LARGE_PAGES = "glibc.malloc.hugetlb=1:glibc.malloc.arena_max=1"
_MODES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_SINCE = (2, 35)


def start() -> None:
    """Entry point of the ``jrs`` command and of ``python -m jrs``."""
    # NumPy's threads wait by turning: after each small product of matrices they take processors from those that work.
    os.environ.setdefault(NUMPY_THREADS, "1")
    if wants_large_pages(sys.argv[1:], os.environ):
        # glibc reads its tunables when a process begins, so it begins again; that takes some 40 ms.
        os.environ[TUNABLES] = LARGE_PAGES
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    try:
        from jrs.cli.main import main

        main()
    except SystemExit as end:
        if sys.argv[1:2] == ["infer"] and isinstance(end.code, int):
            _leave(end.code)
        raise
    except KeyboardInterrupt:  # in an import; later ones are main's
        print("jrs: interrupted", file=sys.stderr)
        _leave(130)


def _leave(code: int) -> None:
    """End at once: all is written and closed, and to take Python and the engines down piece by piece costs 0.15 s."""
    try:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:  # closed before Python began
                stream.flush()
    except (OSError, ValueError):
        return  # Python's own end has words for that
    os._exit(code)


def wants_large_pages(arguments: Sequence[str], environment: Mapping[str, str]) -> bool:
    """Whether this command fills gigabytes, and the system gives large pages to programs that ask for them.

    A page of 4 kB that is touched for the first time costs as much as computing on it: docs/speed.md has what large
    ones save. Tunables that are set already are left alone.
    """
    if arguments[:1] != ["infer"] or TUNABLES in environment or not sys.platform.startswith("linux"):
        return False
    try:
        library, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").split()
        return (
            library == "glibc"
            and tuple(int(part) for part in version.split(".")[:2]) >= _SINCE
            and "[madvise]" in _MODES.read_text(encoding="ascii")
        )
    except (OSError, ValueError):
        return False
