"""The published JSON schema of ``<case>_report.json``, one file for each version."""

from __future__ import annotations

import json
from typing import Any

from jrs.resources import DATA

REPORT_VERSION = 1
"""Of the report's JSON; it rises when a key goes or changes its meaning, not when one is added."""


def report_schema(version: int = REPORT_VERSION) -> dict[str, Any]:
    """The schema (JSON Schema, draft 2020-12) of the reports of that version."""
    schema: dict[str, Any] = json.loads((DATA / "schemas" / f"report-{version}.json").read_text(encoding="utf-8"))
    return schema
