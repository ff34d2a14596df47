"""What an evaluation writes: tables for machines and for people."""

from __future__ import annotations

import csv
import dataclasses
import io
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from jrs.evaluate.compare import Comparison, Row, Summary, side_by_side
from jrs.files import write_json, write_text


def write_csv(path: Path, kind: type[Any], rows: Iterable[Any]) -> None:
    """Dataclass instances as CSV, one column a field; NaN becomes an empty cell."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    names = [field.name for field in dataclasses.fields(kind)]
    writer.writerow(names)
    for row in rows:
        writer.writerow([_cell(getattr(row, name)) for name in names])
    write_text(path, stream.getvalue())


def _cell(value: Any) -> Any:
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.6g}"
    return value


def plain(value: Any) -> Any:
    """A dataclass, or a list or dict of them, as JSON values; NaN becomes null, six digits are kept."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return None if not math.isfinite(value) else float(f"{value:.6g}")
    return value


def write_summary(
    folder: Path,
    about: dict[str, Any],
    rows: Sequence[Row],
    summaries: Sequence[Summary],
    comparisons: Sequence[Comparison],
    methods: Sequence[str],
) -> None:
    """``cases.csv``, ``summary.csv``, ``comparisons.csv``, ``summary.json`` and ``summary.md``."""
    write_csv(folder / "cases.csv", Row, rows)
    write_csv(folder / "summary.csv", Summary, summaries)
    write_csv(folder / "comparisons.csv", Comparison, comparisons)
    write_json(folder / "summary.json", plain({**about, "summary": summaries, "comparisons": comparisons}))
    write_text(folder / "summary.md", markdown(about, summaries, comparisons, methods))


def grid(summaries: Sequence[Summary], methods: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """The headline table: columns and rows of text, mean ± standard deviation."""
    rows = []
    for name, found in side_by_side(summaries, methods):
        count = max(summary.n for summary in found.values())
        cells = [_mean(found[method]) if method in found else "" for method in methods]
        rows.append([name, str(count), *cells])
    return ["measure", "pairs", *methods], rows


def markdown(
    about: dict[str, Any], summaries: Sequence[Summary], comparisons: Sequence[Comparison], methods: Sequence[str]
) -> str:
    """The headline table and the tests, as Markdown."""
    lines = [f"# {about['bundle']['name']} on {about['data']}", ""]
    lines.append(f"{about['pairs']} pairs, {len(about['failed'])} failed. Mean ± standard deviation over pairs.")
    columns, rows = grid(summaries, methods)
    lines += ["", *aligned(columns, rows)]
    if comparisons:
        lines += ["", f"{methods[0]} minus each other method, pair by pair; Wilcoxon's signed-rank test.", ""]
        head = ["measure", "other", "pairs", "median difference", "95 % interval", "p", "p (Holm)"]
        lines += aligned(head, [_test(comparison) for comparison in comparisons])
    if about["failed"]:
        lines += ["", "Failed:", "", *(f"- {pair}: {reason}" for pair, reason in about["failed"].items())]
    return "\n".join(lines) + "\n"


def _test(c: Comparison) -> list[str]:
    interval = f"{_short(c.low)} to {_short(c.high)}" if not math.isnan(c.low) else ""
    name = f"{c.metric} {c.of}".strip()
    return [name, c.other, str(c.n), _short(c.median_difference), interval, _short(c.p), _short(c.p_holm)]


def aligned(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A Markdown table whose columns also line up as plain text."""
    cells = [list(columns), *(list(row) for row in rows)]
    widths = [max(len(row[index]) for row in cells) for index in range(len(columns))]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |" for row in cells]
    return [lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]]


def _mean(summary: Summary) -> str:
    spread = "" if math.isnan(summary.sd) else f" ± {_short(summary.sd)}"
    return f"{_short(summary.mean)}{spread}"


def _short(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.3g}"
