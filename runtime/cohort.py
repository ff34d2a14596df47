"""Many cases on one atlas, each as it would be alone; one that fails holds up none of the others."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jrs.errors import (
    AlreadyThereError,
    BackendError,
    BadDataError,
    CannotCreateError,
    ConfigurationError,
    JrsError,
    MissingInputError,
    OutOfMemoryError,
    OutputError,
    UsageError,
)
from jrs.files import write_text
from jrs.headers import shown
from jrs.runtime.names import TABLE
from jrs.runtime.options import InferOptions
from jrs.runtime.pipeline import Pipeline
from jrs.runtime.recipe import differences
from jrs.runtime.results import result_line

_OF_ALL = (BackendError, CannotCreateError, ConfigurationError, OutputError)
"""Errors that the next case would meet as well."""
_REGIONS = ("WT", "TC", "ET")
COLUMNS = (
    *("source", "case", "atlas", "status", "out"),
    *(f"{region}_{kind}_ml" for region in _REGIONS for kind in ("native", "affine", "moved")),
    *("WT_to_affine", "folding_percent", "correlation", "seconds", "warnings", "error"),
)
"""Of the table."""


@dataclass(frozen=True)
class Outcome:
    """What became of a case: its ``report`` (JSON file), which was ``there`` before, or an ``error``."""

    source: Path | None
    report: Path | None = None
    warnings: tuple[str, ...] = ()
    there: bool = False
    error: JrsError | None = None


class Cohort:
    """Cases that are registered one after another to one atlas, their results in ``out/<case>/``.

    With ``skip_existing`` cases whose results are there are left out. Two cases of one name would share a folder: the
    second is an error. ``many``: more than one is to come.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        atlas: str | Path,
        options: InferOptions,
        out: Path,
        overwrite: bool = False,
        skip_existing: bool = False,
        many: bool = True,
    ) -> None:
        if overwrite and skip_existing:
            raise UsageError("--overwrite and --skip-existing contradict each other; give one of them")
        self._label = pipeline.check(atlas, options)
        self._pipeline, self._atlas, self._out = pipeline, atlas, out
        self._overwrite, self._skip, self._many = overwrite, skip_existing, many
        self._options = replace(options, keep_clear_of=None if overwrite else out)
        self.outcomes: list[Outcome] = []
        self._rows: list[dict[str, Any]] = []

    def add(self, case: Path | None) -> Outcome:
        """Do a case.

        Raises only what the next one would meet as well: a backend that fails, outputs that cannot be written, an atlas
        or an affine that cannot be read.
        """
        try:
            outcome = self._done(case)
        except AlreadyThereError as error:
            outcome = self._there(case, error)
        except _OF_ALL:
            raise
        except JrsError as error:
            outcome = Outcome(case, error=error)
        except MemoryError:
            outcome = Outcome(case, error=OutOfMemoryError("out of memory; close other programs"))
        if outcome.error is not None and self._many:
            self._pipeline.read_shared(self._atlas, self._options)
        self.outcomes.append(outcome)
        self._rows.append(_row(outcome))
        return outcome

    def _done(self, case: Path | None) -> Outcome:
        result = self._pipeline.infer(case, self._atlas, self._options)
        report = result.names.folder(self._out) / result.names.report_json
        if report in self._reports():
            raise self._same_name(case, report)
        self._pipeline.progress("write")
        result.save(self._out, self._overwrite)
        return Outcome(case, report, result.warnings)

    def _there(self, case: Path | None, error: AlreadyThereError) -> Outcome:
        if error.file in self._reports():
            return Outcome(case, error=self._same_name(case, error.file))
        if not self._skip or error.file.suffix != ".json":
            return Outcome(case, error=error)
        try:
            report = json.loads(error.file.read_text(encoding="utf-8"))
            theirs, made_from = (report["atlas"], report["bundle"]["sha256"]), dict(report.get("made_from", {}))
            listed = [error.file.parent / name for name in report["outputs"].values()]
        except (OSError, ValueError, KeyError, TypeError):
            what = f"{shown(error.file)}: is no report of jrs; remove it or pass --overwrite"
            return Outcome(case, error=BadDataError(what))
        if theirs != (self._label, self._pipeline.network.bundle.sha256):
            what = f"{shown(error.file)}: is of atlas {theirs[0]}, or of another bundle; give another --out"
            return Outcome(case, error=UsageError(what))
        ours = self._pipeline.recipe(case, self._atlas, self._options)
        if others := differences(ours, made_from):
            what = f"{shown(error.file)}: was made with another {' and another '.join(others)}"
            return Outcome(case, error=UsageError(f"{what}; give another --out or pass --overwrite"))
        if gone := [file for file in listed if not file.exists()]:
            what = f"{shown(gone[0])}: is gone, which {error.file.name} lists; pass --overwrite"
            return Outcome(case, error=MissingInputError(what))
        return Outcome(case, error.file, there=True)

    def _reports(self) -> set[Path]:
        return {outcome.report for outcome in self.outcomes if outcome.report is not None}

    def _same_name(self, case: Path | None, report: Path) -> UsageError:
        other = next(outcome.source for outcome in self.outcomes if outcome.report == report)
        return UsageError(
            f"{shown(case or 'the case')}: its results have the same name as those of {shown(other or 'the case')}, "
            f"{shown(report.parent)}; give another --out"
        )

    def write_table(self) -> Path:
        """A row for each case as ``out/cases.csv``; returns that file.

        Rows of other cases that are there stay, and those of results that are there still where a case failed now.
        Nothing is written while no case has a result. Raises AlreadyThereError if the file is another's.
        """
        file = self._out / TABLE
        rows = {row["source"]: row for row in _table(file)}
        for row in self._rows:
            if row["status"] != "failed" or rows.get(row["source"], row)["status"] == "failed":
                rows[row["source"]] = row
        if any(row["status"] != "failed" for row in rows.values()):
            stream = io.StringIO()
            writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows.values())
            write_text(file, stream.getvalue())
        return file


def _table(file: Path) -> list[dict[str, Any]]:
    """The rows of a table that is there."""
    if not file.exists():
        return []
    try:
        reader = csv.DictReader(io.StringIO(file.read_text(encoding="utf-8")))
        rows = list(reader)
    except (OSError, UnicodeDecodeError, csv.Error):
        reader, rows = None, []
    if reader is None or tuple(reader.fieldnames or ()) != COLUMNS:
        raise AlreadyThereError(file, "it is no table of jrs infer; choose another --out")
    return rows


def _row(outcome: Outcome) -> dict[str, Any]:
    """Of the table: where a case came from and what became of it."""
    row: dict[str, Any] = dict.fromkeys(COLUMNS, "")
    row |= {"source": "" if outcome.source is None else str(outcome.source)}
    row |= {"warnings": " | ".join(outcome.warnings), "error": "" if outcome.error is None else str(outcome.error)}
    row["status"] = "failed" if outcome.report is None else "there before" if outcome.there else "done"
    if outcome.report is None:
        return row
    line = result_line(report := json.loads(outcome.report.read_text(encoding="utf-8")), outcome.report.parent)
    row |= {name: line[name] for name in ("case", "atlas", "out", "folding_percent", "seconds")}
    for kind, of in (line["volumes_ml"] or {}).items():
        row |= {f"{region}_{kind}_ml": of[region] for region in _REGIONS if region in of}
    row["WT_to_affine"] = (report["volume_ratio_to_affine"] or {}).get("WT")
    row["correlation"] = (report["similarity"] or {}).get("after")
    row["warnings"] = " | ".join(report["warnings"])
    return {name: "" if value is None else value for name, value in row.items()}
