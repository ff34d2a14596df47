"""``jrs evaluate``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from jrs.cli.console import note


def evaluate(
    model: Annotated[str, typer.Argument(help="Bundle (folder or shipped name), checkpoint or folder of a run.")],
    data: Annotated[Path, typer.Argument(help="Folder of cases (BraTS, MSD, BIDS, FreeSurfer) or a manifest.")],
    out: Annotated[Path, typer.Option("--out", help="Folder of the results.")],
    atlas: Annotated[
        str | None,
        typer.Option("--atlas", help="Fixed image of all pairs: sri24 (default), a case's name, a file or a folder."),
    ] = None,
    atlas_labels: Annotated[
        Path | None, typer.Option("--atlas-labels", help="Anatomical labels of the atlas (FreeSurfer numbers).")
    ] = None,
    pairs: Annotated[Path | None, typer.Option("--pairs", help="CSV: moving,fixed, names of cases.")] = None,
    pairing: Annotated[
        str | None, typer.Option("--pairing", help="all: each case to every other; ring: each to the next.")
    ] = None,
    baseline: Annotated[
        str,
        typer.Option("--baseline", help="affine,identity,ants,ants-masked,greedy,greedy-masked; affine always runs."),
    ] = "affine",
    affine: Annotated[str, typer.Option("--affine", help="auto, rigid, or off for cases in the fixed space.")] = "auto",
    refine: Annotated[
        int | None, typer.Option("--refine", min=0, help="Iterations of the refinement; 0: the network alone.")
    ] = None,
    layout: Annotated[str, typer.Option("--layout", help="auto, brats, msd, bids, freesurfer, manifest.")] = "auto",
    landmark_space: Annotated[
        str, typer.Option("--landmark-space", help="What landmark files hold: lps (BraTS-Reg), ras or voxel.")
    ] = "lps",
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="At most so many pairs.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Keep the pairs that are finished in --out.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Start anew where --out holds results.")] = False,
    backend: Annotated[str, typer.Option("--backend", help="As in jrs infer.")] = "auto",
    precision: Annotated[str, typer.Option("--precision", help="As in jrs infer.")] = "auto",
    threads: Annotated[int | None, typer.Option("--threads", min=1, help="CPU threads.")] = None,
) -> int:
    """Measure a bundle on pairs of cases, beside other registration programs, with paired tests."""
    from jrs.evaluate.compare import side_by_side
    from jrs.evaluate.run import EvaluateRequest, evaluate_run
    from jrs.evaluate.tables import aligned, grid, plain

    found = evaluate_run(
        EvaluateRequest(
            model=model,
            data=data,
            out=out,
            atlas=atlas,
            atlas_labels=atlas_labels,
            pairs=pairs,
            pairing=pairing,
            layout=layout,
            affine=affine,
            refine=refine,
            baselines=tuple(name.strip() for name in baseline.split(",") if name.strip()),
            landmark_space=landmark_space,
            limit=limit,
            resume=resume,
            overwrite=overwrite,
            backend=backend,
            precision=precision,
            threads=threads,
        ),
        lambda text: note(f"jrs: {text}"),
    )
    note("\n".join(aligned(*grid(found.summaries, found.methods))))
    means = {name: {m: s.mean for m, s in by.items()} for name, by in side_by_side(found.summaries, found.methods)}
    line = {"out": str(out), "pairs": found.about["pairs"], "failed": found.failed, "mean": means}
    print(json.dumps(plain(line), ensure_ascii=False))
    return 1 if found.failed else 0
