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
    OutputError,
    UsageError,
)
from jrs.files import write_text
from jrs.headers import shown
from jrs.runtime.names import TABLE
from jrs.runtime.pipeline import InferOptions, Pipeline
from jrs.runtime.results import result_line

_OF_ALL = (BackendError, CannotCreateError, ConfigurationError, OutputError)
"""Errors that the next case would meet as well."""
_REGIONS = ("WT", "TC", "ET")


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
    second is an error.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        atlas: str | Path,
        options: InferOptions,
        out: Path,
        overwrite: bool = False,
        skip_existing: bool = False,
    ) -> None:
        if overwrite and skip_existing:
            raise UsageError("--overwrite and --skip-existing contradict each other; give one of them")
        pipeline.check(atlas, options)
        self._pipeline, self._atlas, self._out = pipeline, atlas, out
        self._overwrite, self._skip = overwrite, skip_existing
        self._options = replace(options, keep_clear_of=None if overwrite else out)
        self.outcomes: list[Outcome] = []
        self._rows: list[dict[str, Any]] = []

    def add(self, case: Path | None) -> Outcome:
        """Do a case. Raises only what the next one would meet as well: backends, outputs that cannot be written."""
        try:
            outcome = self._done(case)
        except AlreadyThereError as error:
            outcome = self._there(case, error)
        except _OF_ALL:
            raise
        except JrsError as error:
            outcome = Outcome(case, error=error)
        try:
            row = _row(outcome)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            what = f"{shown(outcome.report or '')}: is no report of jrs; remove it or pass --overwrite"
            outcome = Outcome(case, error=BadDataError(what))
            row = _row(outcome)
        self.outcomes.append(outcome)
        self._rows.append(row)
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
        if self._skip and error.file.suffix == ".json":
            return Outcome(case, error.file, there=True)
        return Outcome(case, error=error)

    def _reports(self) -> set[Path]:
        return {outcome.report for outcome in self.outcomes if outcome.report is not None}

    def _same_name(self, case: Path | None, report: Path) -> UsageError:
        other = next(outcome.source for outcome in self.outcomes if outcome.report == report)
        return UsageError(
            f"{shown(case or 'the case')}: its results have the same name as those of {shown(other or 'the case')}, "
            f"{shown(report.parent)}; give another --out"
        )

    def write_table(self) -> Path:
        """All cases so far as ``out/cases.csv``, a row each; returns that file."""
        file = self._out / TABLE
        stream = io.StringIO()
        writer = csv.DictWriter(stream, list(self._rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(self._rows)
        write_text(file, stream.getvalue())
        return file


def _row(outcome: Outcome) -> dict[str, Any]:
    """Of the table: where a case came from and what became of it."""
    row: dict[str, Any] = dict.fromkeys(("source", "case", "atlas", "status", "out"), "")
    row["source"] = "" if outcome.source is None else str(outcome.source)
    volumes = [f"{region}_{kind}" for region in _REGIONS for kind in ("native_ml", "affine_ml", "moved_ml")]
    row |= dict.fromkeys([*volumes, "WT_to_affine", "folding_percent", "correlation", "seconds"], "")
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
