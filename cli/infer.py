"""``jrs infer``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from jrs.cli.console import note, status
from jrs.errors import UsageError


def infer(
    cases: Annotated[
        list[Path] | None,
        typer.Argument(
            help="Folder with BraTS or BIDS names, a 3-D file (what its name says, else T1) or a 4-D file; or several, "
            "of which OUT/cases.csv becomes the table.",
        ),
    ] = None,
    atlas: Annotated[
        str, typer.Option("--atlas", help="Fixed image: sri24 (ships with jrs), a file or a folder.")
    ] = "sri24",
    out: Annotated[Path, typer.Option("--out", help="Results go to OUT/<case>/.")] = Path("out"),
    bundle: Annotated[
        str | None,
        typer.Option("--bundle", help="Folder of a bundle (default: the one that ships with jrs)."),
    ] = None,
    modality: Annotated[
        str | None,
        typer.Option("--modality", help="What a 3-D file is: t1, t1ce, t2 or flair; of a folder: the one to use."),
    ] = None,
    channels: Annotated[
        str | None,
        typer.Option(
            "--channels",
            help="Volumes of a 4-D file in its order (default: what dataset.json of a Decathlon folder says, else "
            "t1,t1ce,t2,flair).",
        ),
    ] = None,
    t1: Annotated[Path | None, typer.Option("--t1", help="T1 image, instead of CASE.")] = None,
    t1ce: Annotated[Path | None, typer.Option("--t1ce", help="Contrast-enhanced T1.")] = None,
    t2: Annotated[Path | None, typer.Option("--t2", help="T2 image.")] = None,
    flair: Annotated[Path | None, typer.Option("--flair", help="FLAIR image.")] = None,
    affine: Annotated[
        str, typer.Option("--affine", help="auto, rigid, off, or an ITK affine file (.txt, .tfm).")
    ] = "auto",
    seg: Annotated[bool, typer.Option("--seg/--no-seg", help="Segment the tumour.")] = True,
    label_scheme: Annotated[
        str,
        typer.Option(
            "--label-scheme",
            help="What labels are written as: brats2018 (enhancing 4), brats2023 (enhancing 3) or bundle (its own).",
        ),
    ] = "bundle",
    inverse: Annotated[bool, typer.Option("--inverse/--no-inverse", help="Write the inverse field.")] = True,
    refine: Annotated[
        int | None,
        typer.Option(
            "--refine",
            min=0,
            help="Iterations on this pair at 1 mm, more at coarser levels (default: 4); 0: the network alone.",
        ),
    ] = None,
    same_patient: Annotated[
        bool | None,
        typer.Option(
            "--same-patient/--other-patient",
            help="Whether the atlas is the patient's scan of another time, for the refinement (default: found out).",
        ),
    ] = None,
    backend: Annotated[
        str,
        typer.Option(
            "--backend",
            help="auto, tensorrt, tensorrt-rtx, ort-cuda, ort-tensorrt, openvino or ort-cpu; see jrs doctor.",
        ),
    ] = "auto",
    precision: Annotated[
        str,
        typer.Option("--precision", help="fp32, bf16, or auto: bf16 where CPU and bundle bear it; see jrs doctor."),
    ] = "auto",
    threads: Annotated[int | None, typer.Option("--threads", min=1, help="CPU threads.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace existing files.")] = False,
    skip_existing: Annotated[
        bool,
        typer.Option("--skip-existing", help="Leave out cases that have results of the same images and options."),
    ] = False,
) -> None:
    """Register a case to an atlas and segment its tumour, or many cases one after another."""
    named = {"t1": t1, "t1ce": t1ce, "t2": t2, "flair": flair}
    modalities = {name: path for name, path in named.items() if path is not None}
    if not cases and not modalities:
        raise UsageError("no case given; name a folder, a file, or files with --t1, --t1ce, --t2, --flair")
    if cases and len(cases) > 1 and modalities:
        raise UsageError(f"--{next(iter(modalities))} is for one case, and {len(cases)} are given; leave it out")
    from jrs.headers import shown
    from jrs.runtime.cohort import Cohort
    from jrs.runtime.options import InferOptions
    from jrs.runtime.pipeline import Pipeline
    from jrs.runtime.results import summary_line

    options = InferOptions(
        modality=modality,
        channels=None if channels is None else [name.strip() for name in channels.split(",")],
        modalities=modalities or None,
        affine=affine,
        segment=seg,
        inverse=inverse,
        label_scheme=label_scheme,
        same_patient=same_patient,
        refine=InferOptions.refine if refine is None else refine,
    )
    many = len(cases or ()) > 1
    with Pipeline.open(bundle, backend, precision, threads) as pipeline, status() as say:
        cohort = Cohort(pipeline, atlas, options, out, overwrite, skip_existing, many)
        if many:
            cohort.write_table()  # where that cannot be done it is said before the work
        for number, case in enumerate(cases or [None], 1):
            which = f"{number} of {len(cases or ())}, {shown(case)}: " if many and case is not None else ""
            pipeline.progress = lambda stage, which=which: say(which + stage)  # type: ignore[misc]
            done = cohort.add(case)
            if done.error is not None and not many:
                raise done.error
            for warning in done.warnings:
                note(f"jrs: warning: {which}{warning}")
            if done.error is not None:
                note(f"jrs: {done.error}")
            elif done.there:
                note(f"jrs: {done.report}: is there already, left out")
            if many:
                cohort.write_table()
            if done.report is not None:
                # Other encodings' escapes are none of JSON's.
                utf8 = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
                print(summary_line(done.report, ascii_only=not utf8), flush=True)
    failed = [done.error for done in cohort.outcomes if done.error is not None]
    if failed:
        note(f"jrs: {len(failed)} of {len(cohort.outcomes)} cases failed, as told above")
        raise typer.Exit(failed[0].exit_code)
