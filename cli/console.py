"""What the verbs print: tables for the eye, on stderr, so that stdout stays for results."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table on stderr."""
    from rich.console import Console
    from rich.table import Table

    shown = Table(title=title)
    for column in columns:
        shown.add_column(column)
    for row in rows:
        shown.add_row(*row)
    Console(stderr=True).print(shown)


def note(text: str) -> None:
    """Print a line on stderr."""
    import sys

    print(text, file=sys.stderr)
