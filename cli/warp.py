"""``jrs warp`` and ``jrs convert-xfm``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from jrs.cli.console import note
from jrs.errors import UsageError

if TYPE_CHECKING:
    from jrs.runtime.chain import Chain

_TRANSFORM = (
    "Field (.nii.gz) or ITK or ANTs transform (.h5, .mat, .tfm, .txt); several in ANTs' order: first the one that acts "
    "first on the fixed image's points; [FILE,1] for an inverse, or identity."
)


def warp(
    image: Annotated[Path, typer.Argument(help="3-D or 4-D image or label map, or points (.csv with x,y,z in mm).")],
    transform: Annotated[list[str], typer.Option("--transform", "-t", help=_TRANSFORM)],
    out: Annotated[Path, typer.Option("--out", "-o", help="File to write (.nii.gz, for points .csv).")],
    reference: Annotated[
        Path | None, typer.Option("--reference", "-r", help="Image whose grid the result has.")
    ] = None,
    inverse: Annotated[bool, typer.Option("--inverse", help="Apply the inverse of the whole.")] = False,
    interpolation: Annotated[
        str, typer.Option("--interpolation", "-n", help="linear, nearest, label (best for label maps) or bspline.")
    ] = "linear",
    outside: Annotated[float, typer.Option("--outside", help="Value where the image does not reach.")] = 0.0,
    points_space: Annotated[
        str | None, typer.Option("--points-space", help="What a CSV's numbers are: ras (nibabel) or lps (ITK, ANTs).")
    ] = None,
    threads: Annotated[int | None, typer.Option("--threads", min=1, help="CPU threads.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing file.")] = False,
) -> None:
    """Apply a saved transform to another image, label map or points, resampling once.

    Images go from the moving to the fixed space; points go the other way, so for points of the moving image the inverse
    is what leads to the fixed one.
    """
    from jrs.files import refuse_existing

    refuse_existing(out.parent, [out.name], overwrite)
    points = image.suffix.lower() == ".csv"
    if points and points_space not in ("ras", "lps"):
        raise UsageError("--points-space: say what the numbers in the CSV file are, ras or lps")
    if not points and reference is None:
        raise UsageError("--reference: name an image whose grid the result shall have")
    from jrs.runtime.transform_files import load_chain
    from jrs.runtime.warp import INTERPOLATIONS, warp_file, warp_points_file

    if interpolation not in INTERPOLATIONS:
        raise UsageError(f"--interpolation {interpolation}: choose {', '.join(INTERPOLATIONS)}")
    chain = load_chain(transform, inverse, threads)
    if points:
        remarks = warp_points_file(image, chain, out, points_space)  # type: ignore[arg-type]
    else:
        assert reference is not None
        remarks = warp_file(image, chain, reference, out, interpolation, outside)  # type: ignore[arg-type]
    for remark in remarks:
        note(f"jrs: note: {image.name}: {remark}")
    _tell_residuals(chain)
    print(out)


def convert_xfm(
    transform: Annotated[list[str], typer.Argument(help=_TRANSFORM)],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="itk: .nii.gz, .h5, .tfm, .txt or .mat; fsl: .nii.gz or .mat.")
    ],
    to: Annotated[str, typer.Option("--to", help="itk (ANTs and 3D Slicer too) or fsl.")] = "itk",
    source: Annotated[Path | None, typer.Option("--source", help="fsl: the moving image.")] = None,
    reference: Annotated[
        Path | None, typer.Option("--reference", "-r", help="Image whose grid a field has; for fsl the fixed image.")
    ] = None,
    inverse: Annotated[bool, typer.Option("--inverse", help="Write the inverse.")] = False,
    threads: Annotated[int | None, typer.Option("--threads", min=1, help="CPU threads.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing file.")] = False,
) -> None:
    """Compose transforms and write the result for another program."""
    from jrs.files import refuse_existing

    refuse_existing(out.parent, [out.name], overwrite)
    if to not in ("itk", "fsl"):
        raise UsageError(f"--to {to}: choose itk or fsl")
    if to == "fsl" and (source is None or reference is None):
        raise UsageError("--to fsl: needs --source and --reference, FSL's coordinates depend on both images")
    from jrs.reading import read_geometry
    from jrs.runtime.transform_files import load_chain, save_fsl, save_transform

    chain = load_chain(transform, inverse, threads)
    grid = None if reference is None else read_geometry(reference)
    if to == "fsl" and source is not None and grid is not None:
        save_fsl(out, chain, read_geometry(source), grid)
    else:
        save_transform(out, chain, grid)
    _tell_residuals(chain)
    print(out)


def _tell_residuals(chain: Chain) -> None:
    for residual in chain.residuals:
        if residual.points:
            share = 100.0 * residual.unsolved / residual.points
            note(
                f"jrs: the inverse is off by {residual.mean_mm:.4f} mm on average, {residual.largest_mm:.3f} mm at "
                f"most; {share:.3g} % of the points by more than 0.1 mm"
            )
