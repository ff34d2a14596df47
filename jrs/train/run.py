"""A training run from its request: configuration, data, progress bar, loop."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from jrs.errors import CannotCreateError, ConfigurationError, MissingInputError
from jrs.reading import read_volume
from jrs.resources import atlas_path, config_path
from jrs.schema import decode
from jrs.train.batch import PairSource
from jrs.train.config import TrainConfig


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
    threads: int | None = None
    layout: str = "auto"
    splits: Path | None = None
    align: Literal["auto", "off"] = "auto"


def load_config(name: str, overrides: dict[str, Any] | None = None, head: str | None = None) -> TrainConfig:
    """Read a TOML configuration, shipped or a file; ``overrides`` replace top-level fields."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib

    path = config_path(name)
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise ConfigurationError(f"{path}: is not a TOML configuration ({error})") from error
    values |= overrides or {}
    if head is not None:
        values.setdefault("model", {}).setdefault("architecture", {})["head"] = head
    return decode(TrainConfig, values, str(path))


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
    config = load_config(request.config, request.overrides, request.head)
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
        from jrs.train.splits import make_splits
        from jrs.train.synth import SyntheticPairs

        def load(folder: Path) -> Any:
            return prepare_label_maps(
                find_label_maps(folder), config.model.grid, atlas, request.out / "label-maps", _say
            )

        maps = load(request.synthetic)
        if request.validation is not None:
            held_out = load(request.validation)
        else:
            whose = {name: frozenset({name}) for name in maps.names}
            splits = make_splits(whose, config.seed, config.validation_share)
            held_out = maps.subset([maps.names.index(name) for name in splits.validation])
            maps = maps.subset([maps.names.index(name) for name in splits.train])
        seed = config.seed
        return (
            SyntheticPairs(maps, config.model, config.synthesis, seed),
            SyntheticPairs(held_out, config.model, config.synthesis, seed + 500_009),
        )
    return _real_cases(request, config)


def _real_cases(request: TrainRequest, config: TrainConfig) -> tuple[PairSource, PairSource]:
    """Cases of a folder, manifest or cache; the splits are stored in the run and stay what they are."""
    from jrs.train.cases import Cohort, check_apart
    from jrs.train.splits import SPLITS, Splits, settle_splits, write_splits

    assert request.data is not None
    atlas = atlas_path(request.atlas)
    train = held = Cohort.open(request.data, request.layout, config.model, atlas)
    if request.validation is not None:
        held = Cohort.open(request.validation, request.layout, config.model, atlas)
        check_apart(train, held)
        splits = Splits(tuple(case.name for case in train.cases), tuple(case.name for case in held.cases))
    else:
        own = request.out / SPLITS
        stored = own if request.resume else None if train.cache is None else request.data / SPLITS
        shares = (config.validation_share, 0.0)

        def settled(given: Path | None) -> Splits:
            return settle_splits(
                train.cases, train.whose, config.seed, shares, given=given, stored=stored, absent=train.unusable
            )

        splits = settled(request.splits)
        if request.resume and own.exists() and splits.parts() != settled(None).parts():
            raise ConfigurationError(f"{request.splits}: differs from {own}, by which the run was begun; drop --splits")
    write_splits(request.out / SPLITS, splits)
    left = len(train.cases) + (len(held.cases) if held is not train else 0) - sum(map(len, splits.parts().values()))
    counts = f"{len(splits.train)} to train on, {len(splits.validation)} to validate on, {len(splits.test)} for testing"
    _say(f"cases: {counts}" + (f", {left} in no split" if left else ""))
    return (
        train.pairs(splits.train, config.model, atlas, config.seed, request.align),
        held.pairs(splits.validation, config.model, atlas, config.seed + 500_009, request.align),
    )


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
