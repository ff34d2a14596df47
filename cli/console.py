"""What the verbs print: tables for the eye, on stderr, so that stdout stays for results."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table on stderr."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    shown = Table(title=title)
    for column in columns:
        shown.add_column(column)
    for row in rows:
        shown.add_row(*(Text(cell) for cell in row))  # not markup: cells hold brackets
    console = Console(stderr=True)
    if not console.is_terminal:
        # A log file has no width to fit into: rows stay whole.
        console.width = 200
    console.print(shown)


def note(text: str) -> None:
    """Print a line on stderr."""
    print(text, file=sys.stderr)


@contextmanager
def status() -> Iterator[Callable[[str], None]]:
    """A line on stderr that says what is being done, where stderr is a terminal; elsewhere nothing."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda stage: None
        return
    with console.status("starting") as shown:
        yield lambda stage: shown.update(stage)
