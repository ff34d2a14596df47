"""What tests of training share: small label maps, models, configurations and runs."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from jrs.architecture import Architecture
from jrs.manifest import GridSpec, ModelSpec
from jrs.models.checkpoint import Checkpoint, load_checkpoint
from jrs.models.network import JointNet
from jrs.schema import encode
from jrs.train.batch import PairBatch
from jrs.train.config import LossConfig, OptimizerConfig, SynthesisConfig, TrainConfig
from jrs.train.labelmaps import LabelMaps
from jrs.train.loop import Trainer
from jrs.train.synth import SyntheticPairs

Array = np.ndarray[Any, Any]

ROOT = Path(__file__).parents[1]
SHAPE = (16, 16, 32)
SPACING = (8.0, 8.0, 4.0)
# Indices of tissues in a label map.
WHITE, CORTEX, CSF = 1, 2, 4
exact = pytest.mark.skipif(torch.cuda.is_available(), reason="bit for bit on the CPU only")
ONE_CYCLE = OptimizerConfig(schedule="one-cycle", learning_rate=5e-3, clip_norm=1.0)


def brain(shift: int = 0, shape: tuple[int, int, int] = SHAPE) -> tuple[Tensor, Tensor]:
    """Structures and tissues (X,Y,Z) of nested boxes: cortex around white matter around a ventricle."""
    structures, tissues = (torch.zeros(shape, dtype=torch.uint8) for _ in range(2))
    for inset, structure, tissue in ((2, 2, CORTEX), (4, 1, WHITE), (7, 3, CSF)):
        box = tuple(slice(inset + (shift if axis == 2 else 0), n - inset) for axis, n in enumerate(shape))
        structures[box], tissues[box] = structure, tissue
    return structures, tissues


def label_maps(count: int = 3, shape: tuple[int, int, int] = SHAPE) -> LabelMaps:
    made = [brain(k, shape) for k in range(count)]
    structures, tissues = (torch.stack(column) for column in zip(*made, strict=True))
    return LabelMaps(tuple(f"map{k}" for k in range(count)), structures, tissues)


def model_spec(
    channels: tuple[str, ...] = ("t1", "flair"), optional: Any = None, shape: Any = SHAPE, **choices: Any
) -> ModelSpec:
    architecture = Architecture(
        **{
            "in_channels": len(channels),
            "base_channels": 2,
            "head": "displacement",
            "norm": "instance",
            **choices,
        }
    )
    labels = ModelSpec().labels if architecture.segmentation else ()
    return ModelSpec(
        architecture,
        channels,
        channels if optional is None else optional,
        GridSpec(shape, SPACING),
        labels=labels,
        label_values=(0, 1, 2, 4) if labels else (),
    )


STILL = SynthesisConfig(
    deformation_mm=0.0, fine_deformation_mm=0.0, rotation_deg=0.0, scale=0.0, shift_mm=0.0, mirror=0.0, moving_tumor=0.0
)


def source(
    maps: LabelMaps | None = None, seed: int = 5, spec: ModelSpec | None = None, **synthesis: Any
) -> SyntheticPairs:
    config = dataclasses.replace(SynthesisConfig(), **synthesis)
    return SyntheticPairs(maps or label_maps(), spec or model_spec(), config, seed)


def same(a: Any, b: Any) -> bool:
    """Whether all tensors of two dataclasses are equal."""
    pairs = [(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(a)]
    return all(x is y is None or torch.equal(x, y) for x, y in pairs)


def train_config(spec: ModelSpec | None = None, **changes: Any) -> TrainConfig:
    values: dict[str, Any] = {
        "model": spec or model_spec(),
        "loss": LossConfig(structure_dice=1.0, tumor_dice=0.5, diffusion=0.1, gradient_l1=0.0),
        "epochs": 4,
        "steps_per_epoch": 3,
        "batch_size": 1,
        "precision": "fp32",
        "validation_pairs": 2,
        "log_every": 1,
        "checkpoint_minutes": 0.0,
    }
    return TrainConfig(**values | changes)


class Stopped(Exception):  # noqa: N818
    """What ends a run in the middle."""


class Stopping:
    """A source that fails when batch ``at`` is asked for."""

    def __init__(self, inner: SyntheticPairs, at: int, error: type[BaseException] = Stopped) -> None:
        self.inner, self.at, self.error = inner, at, error

    def __len__(self) -> int:
        return len(self.inner)

    def batch(self, index: int, size: int) -> PairBatch:
        if index >= self.at:
            raise self.error
        return self.inner.batch(index, size)


def trainer(
    folder: Path, config: TrainConfig, stop_at: int | None = None, error: type[BaseException] = Stopped
) -> Trainer:
    maps = label_maps(shape=config.model.grid.shape)
    pairs: Any = SyntheticPairs(maps, config.model, config.synthesis, config.seed)
    if stop_at is not None:
        pairs = Stopping(pairs, stop_at, error)
    return Trainer(config, pairs, SyntheticPairs(maps, config.model, config.synthesis, 99), folder)


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def series(folder: Path, split: str, name: str) -> list[float]:
    return [float(row["value"]) for row in rows(folder) if (row["split"], row["name"]) == (split, name)]


def small_checkpoint(**changes: Any) -> Checkpoint:
    torch.manual_seed(7)
    spec = model_spec()
    values = {"spec": spec, "weights": JointNet(spec.architecture).state_dict(), "training": {"a": [1, None]}}
    return Checkpoint(**values | changes)


def start_small_run(
    folder: Path, config: TrainConfig, *arguments: str, prefix: tuple[str, ...] = (), apart: bool = False
) -> subprocess.Popen[str]:
    """run_small_training.py in a process of its own; ``prefix`` stands before it, ``apart`` gives it a group."""
    path = folder.with_suffix(".json")
    path.write_text(json.dumps(encode(config)))
    script = str(ROOT / "tests" / "run_small_training.py")
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    return subprocess.Popen(
        [sys.executable, *prefix, script, str(folder), str(path), *arguments],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=apart,
    )


def same_checkpoint(a: Path, b: Path) -> bool:
    first, second = load_checkpoint(a), load_checkpoint(b)
    return first.training == second.training and all(
        one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)
        for one, two in ((first.weights, second.weights), (first.optimizer, second.optimizer))
    )
