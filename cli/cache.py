"""``jrs cache info|clear``."""

from __future__ import annotations

from typing import Annotated

import typer

from jrs.errors import UsageError

app = typer.Typer(
    name="cache",
    help="What jrs keeps from run to run: fixed images, verdicts on precision, TensorRT engines.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.command("info")
def info(as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False) -> None:
    """Say where the cache is, what it holds and how large it may become."""
    import json

    from jrs.cli.console import table
    from jrs.runtime.caching import KINDS, Store

    store = Store.open()
    held = store.contents()
    total = sum(size for _, size in held.values())
    rows = [(kind, KINDS[kind], str(number), _megabytes(size)) for kind, (number, size) in held.items()]
    table("the cache", ("kind", "what", "files", "MB"), rows)
    if as_json:
        kinds = {kind: {"files": number, "bytes": size} for kind, (number, size) in held.items()}
        print(
            json.dumps({"folder": str(store.folder), "limit": store.limit, "bytes": total, "kinds": kinds}, indent=2)
        )
    else:
        print(f"{store.folder}: {_megabytes(total)} MB, limit {_megabytes(store.limit)} MB")


@app.command("clear")
def clear(
    kind: Annotated[str | None, typer.Option("--kind", help="Only this kind, as jrs cache info names it.")] = None,
) -> None:
    """Remove what the cache holds; it is made again where it is needed."""
    from jrs.runtime.caching import KINDS, Store

    if kind is not None and kind not in KINDS:
        raise UsageError(f"--kind {kind} is unknown; choose from {', '.join(KINDS)}")
    store = Store.open()
    before = store.contents()
    store.clear(kind)
    after = store.contents()
    freed = sum(before[name][1] - after[name][1] for name in KINDS)
    print(f"{store.folder}: {_megabytes(freed)} MB removed")


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f}"
