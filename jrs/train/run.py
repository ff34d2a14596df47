"""A training run from its request: configuration, data, progress bar, loop."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jrs.errors import CannotCreateError, ConfigurationError, MissingInputError
from jrs.reading import read_volume
from jrs.resources import atlas_path
from jrs.train.batch import PairSource
from jrs.train.config import TrainConfig
from jrs.train.configfile import load_config


@dataclass(frozen=True)
class TrainRequest:
    """What ``jrs train`` was asked for; see the command's help."""

    out: Path
    synthetic: Path | None = None
    data: Path | None = None
    validation: Path | None = None
    config: str = "default"
    init: Path | None = None
    resume: bool = False
    atlas: str = "sri24"
    overrides: dict[str, Any] = field(default_factory=dict)
    head: str | None = None
    settings: tuple[str, ...] = ()
    threads: int | None = None


def train_run(request: TrainRequest) -> None:
    """Do what was asked; raises JrsError for anything a user can mend."""
    import torch

    from jrs.train.loop import LAST, Trainer

    if request.threads:
        torch.set_num_threads(request.threads)
    if request.resume and not (request.out / LAST).exists():
        raise MissingInputError(f"{request.out}: holds no {LAST} to resume; drop --resume to start")
    if not request.resume and (request.out / LAST).exists():
        raise CannotCreateError(f"{request.out}: holds a run already; pass --resume, or choose another folder")
    config = load_config(request.config, request.overrides, request.head, request.settings)
    train, validation = _sources(request, config)
    with _ProgressBar() as bar:
        trainer = Trainer(config, train, validation, request.out, bar.update)
        if request.init is not None:
            trainer.start_from(request.init)
        if request.resume:
            trainer.resume()
        progress = trainer.run()
    print(f"{request.out}: {progress.step} steps, best validation loss {progress.best_loss:.4f}")


def _sources(request: TrainRequest, config: TrainConfig) -> tuple[PairSource, PairSource]:
    atlas = read_volume(atlas_path(request.atlas))
    if request.synthetic is not None:
        from jrs.train.labelmaps import find_label_maps, prepare_label_maps
        from jrs.train.synth import SyntheticPairs

        def load(folder: Path) -> Any:
            return prepare_label_maps(
                find_label_maps(folder), config.model.grid, atlas, request.out / "label-maps", _say
            )

        maps = load(request.synthetic)
        if request.validation is not None:
            held_out = load(request.validation)
        else:
            chosen, rest = split_indices(len(maps.names), config)
            maps, held_out = maps.subset(rest), maps.subset(chosen)
        seed = config.seed
        return (
            SyntheticPairs(maps, config.model, config.synthesis, seed),
            SyntheticPairs(held_out, config.model, config.synthesis, seed + 500_009),
        )
    from jrs.train.cases import CasePairs, load_manifest

    assert request.data is not None
    cases = load_manifest(request.data)
    if request.validation is not None:
        held = load_manifest(request.validation)
    else:
        chosen, rest = split_indices(len(cases), config)
        cases, held = [cases[i] for i in rest], [cases[i] for i in chosen]
    return (
        CasePairs(cases, config.model, atlas, config.seed),
        CasePairs(held, config.model, atlas, config.seed + 500_009),
    )


def split_indices(count: int, config: TrainConfig) -> tuple[list[int], list[int]]:
    """Held-out and remaining indices, by the run's seed; at least two of each."""
    import torch

    if count < 4:
        raise ConfigurationError(f"{count} images are too few to hold some out; give --validation or at least 4")
    generator = torch.Generator().manual_seed(config.seed)
    order = torch.randperm(count, generator=generator).tolist()
    held = min(max(2, round(count * config.validation_share)), count - 2)
    return sorted(order[:held]), sorted(order[held:])


def _say(text: str) -> None:
    print(text, file=sys.stderr)


class _ProgressBar:
    """Steps done, time left and the latest values, on stderr."""

    def __enter__(self) -> _ProgressBar:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._bar = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[values]}"),
            console=Console(stderr=True),
        )
        self._bar.__enter__()
        self._task = self._bar.add_task("training", total=None, values="")
        return self

    def __exit__(self, *error: Any) -> None:
        self._bar.__exit__(*error)

    def update(self, step: int, steps: int, values: dict[str, float]) -> None:
        shown = " ".join(
            f"{name} {values[name]:.3f}" for name in ("loss", "val_dice_moved", "val_dice_affine") if name in values
        )
        self._bar.update(self._task, total=steps, completed=step, values=shown)
