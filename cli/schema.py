"""``jrs schema``."""

from __future__ import annotations

from typing import Annotated

import typer

from jrs.errors import UsageError


def schema(of: Annotated[str, typer.Argument(help="Whose schema: report.")] = "report") -> None:
    """Print the JSON schema of a file that jrs writes."""
    if of != "report":
        raise UsageError(f"{of}: has no schema; the only one is report")
    import json

    from jrs.runtime.report_schema import report_schema

    print(json.dumps(report_schema(), indent=2, ensure_ascii=False))
