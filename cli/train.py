"""``jrs train``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from jrs.errors import UsageError


def train(
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder of the run: checkpoints, log, configuration.")
    ] = None,
    synthetic: Annotated[
        Path | None,
        typer.Option("--synthetic", help="Folder of label maps (FreeSurfer numbers) to draw images from."),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option("--data", help="Cases: a folder (BraTS, MSD, BIDS, FreeSurfer), a manifest, or a cache."),
    ] = None,
    validation: Annotated[
        Path | None,
        typer.Option("--validation", help="Held-out label maps or cases (default: a share of the subjects)."),
    ] = None,
    layout: Annotated[
        str | None, typer.Option("--layout", help="Of --data: auto, brats, msd, bids, freesurfer or manifest.")
    ] = None,
    splits: Annotated[
        Path | None, typer.Option("--splits", help="JSON of case or subject names: train, validation, test.")
    ] = None,
    align: Annotated[
        str | None, typer.Option("--align", help="auto: align affinely what lies not on the atlas's grid; or off.")
    ] = None,
    config: Annotated[
        str | None, typer.Option("--config", help="TOML file, or a name that ships, like default or paper.")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="FIELD=VALUE", help="Any field of the configuration: --set loss.similarity=0.5."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print configuration, weights, memory and steps; no training.")
    ] = False,
    init: Annotated[Path | None, typer.Option("--init", help="Checkpoint whose weights to start from.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --out where it stopped.")] = False,
    atlas: Annotated[
        str | None,
        typer.Option("--atlas", help="T1 atlas that label maps are aligned to and the grid is placed on (sri24)."),
    ] = None,
    epochs: Annotated[int | None, typer.Option("--epochs", help="At most so many epochs.")] = None,
    steps_per_epoch: Annotated[
        int | None, typer.Option("--steps-per-epoch", help="0: one pass over the cases.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option("--batch-size", help="Pairs a step, over all devices.")] = None,
    accumulate: Annotated[
        int | None, typer.Option("--accumulate", help="Parts a device works its pairs of a step off in.")
    ] = None,
    learning_rate: Annotated[float | None, typer.Option("--learning-rate", help="Of Adam.")] = None,
    ema_decay: Annotated[
        float | None, typer.Option("--ema-decay", help="Of the average of the weights, like 0.999; 0: none.")
    ] = None,
    head: Annotated[str | None, typer.Option("--head", help="gradient (paper), potential or displacement.")] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Of everything random.")] = None,
    precision: Annotated[str | None, typer.Option("--precision", help="bf16, fp16 or fp32.")] = None,
    accelerator: Annotated[str | None, typer.Option("--accelerator", help="auto, cpu or cuda.")] = None,
    devices: Annotated[
        int | None, typer.Option("--devices", help="Devices a node; -1: all GPUs; torchrun and Slurm know it.")
    ] = None,
    nodes: Annotated[int | None, typer.Option("--nodes", help="Machines, likewise.")] = None,
    strategy: Annotated[str | None, typer.Option("--strategy", help="auto, ddp or fsdp.")] = None,
    workers: Annotated[
        int | None,
        typer.Option("--workers", help="Threads a device that prepare batches; on a GPU, processes that draw images."),
    ] = None,
    threads: Annotated[int | None, typer.Option("--threads", help="CPU threads of the network.")] = None,
    memory_check: Annotated[
        bool, typer.Option("--memory-check/--no-memory-check", help="Refuse at once what will not fit into memory.")
    ] = True,
) -> None:
    """Train the joint network on label maps (synthetic images) or on real cases."""
    if synthetic is not None and data is not None:
        raise UsageError("give either --synthetic LABEL_DIR or --data CASES, not both")
    if synthetic is None and data is None and not resume and not dry_run:
        raise UsageError("give either --synthetic LABEL_DIR or --data CASES")
    if out is None and not dry_run:
        raise UsageError("give --out, the folder of the run")
    if align not in (None, "auto", "off"):
        raise UsageError(f"--align {align} is unknown; choose auto or off")
    if splits is not None and (validation is not None or synthetic is not None):
        raise UsageError("--splits parts the cases of --data; it excludes --validation and --synthetic")
    if resume and init is not None:
        raise UsageError("--resume and --init exclude each other")
    from jrs.train.run import TrainRequest, configuration, describe, train_run

    overrides = {
        "epochs": epochs,
        "steps_per_epoch": steps_per_epoch,
        "batch_size": batch_size,
        "accumulate": accumulate,
        "optimizer.learning_rate": learning_rate,
        "optimizer.ema_decay": ema_decay,
        "seed": seed,
        "precision": precision,
        "hardware.accelerator": accelerator,
        "hardware.devices": devices,
        "hardware.nodes": nodes,
        "hardware.strategy": strategy,
        "hardware.workers": workers,
    }
    request = TrainRequest(
        out=out or Path(),
        synthetic=synthetic,
        data=data,
        validation=validation,
        config=config,
        init=init,
        resume=resume,
        atlas=atlas,
        overrides={name: value for name, value in overrides.items() if value is not None},
        head=head,
        settings=tuple(settings or ()),
        threads=threads,
        memory_check=memory_check,
        layout=layout,
        splits=splits,
        align=align,
    )
    if dry_run:
        typer.echo(describe(configuration(request)), nl=False)
        return
    train_run(request)
