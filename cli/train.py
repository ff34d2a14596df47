"""``jrs train``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from jrs.errors import UsageError


def train(
    out: Annotated[Path, typer.Option("--out", help="Folder of the run: checkpoints, log, configuration.")],
    synthetic: Annotated[
        Path | None,
        typer.Option("--synthetic", help="Folder of label maps (FreeSurfer numbers) to draw images from."),
    ] = None,
    data: Annotated[
        Path | None, typer.Option("--data", help="CSV or JSON manifest: case, one column a modality, seg.")
    ] = None,
    validation: Annotated[
        Path | None,
        typer.Option("--validation", help="Held-out label maps or manifest (default: a share of the data)."),
    ] = None,
    config: Annotated[
        str | None, typer.Option("--config", help="TOML file, or one of default, default-3mm, paper.")
    ] = None,
    init: Annotated[Path | None, typer.Option("--init", help="Checkpoint whose weights to start from.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --out where it stopped.")] = False,
    atlas: Annotated[
        str,
        typer.Option("--atlas", help="T1 atlas that label maps are aligned to and the grid is placed on."),
    ] = "sri24",
    epochs: Annotated[int | None, typer.Option("--epochs", help="At most so many epochs.")] = None,
    steps_per_epoch: Annotated[
        int | None, typer.Option("--steps-per-epoch", help="0: one pass over the cases.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option("--batch-size", help="Pairs a step.")] = None,
    head: Annotated[str | None, typer.Option("--head", help="gradient (paper), potential or displacement.")] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Of everything random.")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="FIELD=VALUE", help="Any field of the configuration: --set loss.similarity=0.5."),
    ] = None,
    threads: Annotated[int | None, typer.Option("--threads", help="CPU threads.")] = None,
) -> None:
    """Train the joint network on label maps (synthetic images) or on cases of a manifest."""
    if (synthetic is None) == (data is None):
        raise UsageError("give either --synthetic LABEL_DIR or --data MANIFEST")
    if resume and init is not None:
        raise UsageError("--resume and --init exclude each other")
    from jrs.train.run import TrainRequest, train_run

    overrides = {"epochs": epochs, "steps_per_epoch": steps_per_epoch, "batch_size": batch_size, "seed": seed}
    train_run(
        TrainRequest(
            out=out,
            synthetic=synthetic,
            data=data,
            validation=validation,
            config=config or ("default" if synthetic is not None else "paper"),
            init=init,
            resume=resume,
            atlas=atlas,
            overrides={name: value for name, value in overrides.items() if value is not None},
            head=head,
            settings=tuple(settings or ()),
            threads=threads,
        )
    )
