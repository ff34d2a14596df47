"""``jrs export`` and ``jrs import-weights``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jrs.errors import CannotCreateError, UsageError

if TYPE_CHECKING:
    from jrs.bundle import Bundle
    from jrs.runtime.engines.plans import BuildOptions


def export(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint (.safetensors) or folder of a run.")],
    out: Annotated[Path, typer.Option("--out", help="Folder of the bundle.")],
    precision: Annotated[
        str, typer.Option("--precision", help="fp32, fp16 or bf16: of the convolutions; the head stays FP32.")
    ] = "fp32",
    fp16: Annotated[bool, typer.Option("--fp16", help="The same as --precision fp16.")] = False,
    check_on: Annotated[
        list[Path] | None,
        typer.Option("--check-on", help="Real case on which the precision has to keep near FP32; may repeat."),
    ] = None,
    name: Annotated[str | None, typer.Option("--name", help="Name of the bundle (default: the folder's).")] = None,
    shape: Annotated[
        str | None, typer.Option("--shape", help="Another grid, for example 144,208,144; multiples of 16.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing folder.")] = False,
    tensorrt: Annotated[
        bool, typer.Option("--tensorrt", help="Build TensorRT engines for this GPU as well, as jrs build does.")
    ] = False,
    capability: Annotated[
        list[str] | None,
        typer.Option("--capability", help="Target of --tensorrt such as 8.6, with no GPU (tensorrt-rtx); may repeat."),
    ] = None,
    triton: Annotated[
        Path | None, typer.Option("--triton", help="Write a Triton model repository of the bundle there as well.")
    ] = None,
    triton_atlas: Annotated[
        str, typer.Option("--triton-atlas", help="Fixed image whose codes the repository holds.")
    ] = "sri24",
) -> None:
    """Export a checkpoint to a bundle of ONNX graphs, checked against PyTorch."""
    from jrs.cli.console import table
    from jrs.export.exporter import export_bundle

    if precision not in ("fp32", "fp16", "bf16"):
        raise UsageError(f"--precision {precision}: choose fp32, fp16 or bf16")
    if fp16 and precision == "bf16":
        raise UsageError("--fp16 and --precision bf16 exclude each other")
    sides = parse_shape(shape) if shape is not None else None
    wanted: Any = "fp16" if fp16 else precision
    # What cannot be made of the bundle is said before the work.
    if capability and not tensorrt:
        raise UsageError("--capability is for --tensorrt; add that or leave it out")
    options = _engines(capability or ()) if tensorrt else None
    if triton is not None:
        from jrs.export.triton import check_triton

        bundle_folder, models = out.resolve(), triton.resolve()
        if bundle_folder == models or bundle_folder in models.parents or models in bundle_folder.parents:
            raise UsageError(f"--triton {triton}: the repository and the bundle, {out}, need folders beside each other")
        check_triton(triton, triton_atlas, wanted, overwrite)
    bundle = export_bundle(checkpoint, out, wanted, name, sides, overwrite, check_on or ())
    table(
        f"parity with PyTorch, {bundle.manifest.precision}",
        ("output", "maximum", "99th percentile", "unit", "limit"),
        [
            (key, f"{r.maximum:.2e}", f"{r.percentile_99:.2e}", r.unit, f"{r.limit:g} ({r.measure})")
            for key, r in bundle.manifest.parity.items()
        ],
    )
    if bundle.manifest.accuracy:
        _accuracy_table(bundle)
    print(bundle.folder)
    if options is not None:
        from jrs.cli.build import build_bundle

        for path in build_bundle(bundle, _library(options), options):
            print(path)
    if triton is not None:
        from jrs.export.triton import export_triton

        print(export_triton(bundle, triton, triton_atlas, overwrite))


def _engines(capabilities: Sequence[str]) -> BuildOptions:
    """How engines of the bundle to come are built; raises what would be raised then."""
    from jrs.cli.build import parse_capability
    from jrs.runtime.engines.plans import BuildOptions, check_targets, import_library

    options = BuildOptions(capabilities=tuple(parse_capability(c) for c in capabilities))
    check_targets(import_library(_library(options)), options)
    return options


def _library(options: BuildOptions) -> str:
    """The one that builds for other GPUs, where they are named; else the first that is installed."""
    from jrs.cli.build import choose_library

    return choose_library("tensorrt-rtx" if options.capabilities else "auto")


def _accuracy_table(bundle: Bundle) -> None:
    from jrs.cli.console import table

    def shown(value: float | None) -> str:
        return "-" if value is None else f"{value:.3g}"

    table(
        f"{bundle.manifest.precision} beside FP32, real volumes",
        ("case", "field, p99 mm", "maximum mm", "labels that differ", "folding %", "in FP32 %"),
        [
            (
                case,
                shown(r.field_p99_mm),
                shown(r.field_max_mm),
                shown(r.labels_share),
                shown(r.folding_percent),
                shown(r.folding_fp32_percent),
            )
            for case, r in bundle.manifest.accuracy.items()
        ],
    )


def import_weights(
    file: Annotated[Path, typer.Argument(help="The authors' Keras weights (.h5).")],
    out: Annotated[Path, typer.Option("--out", help="Checkpoint to write (.safetensors).")],
    merge: Annotated[
        str | None, typer.Option("--merge", help="subtract, add or concatenate, for a wrapped file that does not say.")
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
