"""``jrs export`` and ``jrs import-weights``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from jrs.errors import CannotCreateError, UsageError


def export(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint (.safetensors) or folder of a run.")],
    out: Annotated[Path, typer.Option("--out", help="Folder of the bundle.")],
    fp16: Annotated[
        bool, typer.Option("--fp16", help="Convolutions in FP16; the head and all behind it stay FP32.")
    ] = False,
    name: Annotated[str | None, typer.Option("--name", help="Name of the bundle (default: the folder's).")] = None,
    shape: Annotated[
        str | None, typer.Option("--shape", help="Another grid, for example 144,208,144; multiples of 16.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing folder.")] = False,
) -> None:
    """Export a checkpoint to a bundle of ONNX graphs, checked against PyTorch."""
    from jrs.cli.console import table
    from jrs.export.exporter import export_bundle

    sides = parse_shape(shape) if shape is not None else None
    bundle = export_bundle(checkpoint, out, "fp16" if fp16 else "fp32", name, sides, overwrite)
    table(
        f"parity with PyTorch, {bundle.manifest.precision}",
        ("output", "maximum", "99th percentile", "unit", "limit"),
        [
            (key, f"{r.maximum:.2e}", f"{r.percentile_99:.2e}", r.unit, f"{r.limit:g} ({r.measure})")
            for key, r in bundle.manifest.parity.items()
        ],
    )
    print(bundle.folder)


def import_weights(
    file: Annotated[Path, typer.Argument(help="The authors' Keras weights (.h5).")],
    out: Annotated[Path, typer.Option("--out", help="Checkpoint to write (.safetensors).")],
    merge: Annotated[
        str | None, typer.Option("--merge", help="subtract or add, for a wrapped file that does not say.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing file.")] = False,
) -> None:
    """Turn the published Keras weights of the method's authors into a checkpoint."""
    if merge not in (None, "subtract", "concatenate", "add"):
        raise UsageError(f"--merge {merge}: choose subtract, concatenate or add")
    if out.exists() and not overwrite:
        raise CannotCreateError(f"{out}: exists already; choose another name or pass --overwrite")
    from jrs.models.reference import reference_checkpoint

    checkpoint = reference_checkpoint(file, merge)  # type: ignore[arg-type]
    checkpoint.save(out)
    print(out)


def parse_shape(text: str) -> tuple[int, int, int]:
    """``144,208,144`` or ``144x208x144`` as three integers."""
    parts = text.replace("x", ",").split(",")
    if len(parts) != 3 or not all(p.strip().isdigit() for p in parts):
        raise UsageError(f"--shape {text}: give three whole numbers, for example 144,208,144")
    return int(parts[0]), int(parts[1]), int(parts[2])
