"""The training loop: steps, validation, schedule, checkpoints; resumable to the same numbers."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor

from jrs.errors import ConfigurationError, JrsError
from jrs.files import write_json
from jrs.models.checkpoint import Checkpoint, load_checkpoint
from jrs.models.network import JointNet
from jrs.models.spatial import identity_coords
from jrs.schema import encode
from jrs.train.augment import augment
from jrs.train.batch import PairBatch, PairSource
from jrs.train.config import TrainConfig
from jrs.train.log import RunLog
from jrs.train.objective import forward_pair, joint_loss, structure_overlap

BEST, LAST = "best.safetensors", "last.safetensors"


@dataclass
class Progress:
    """What ``--resume`` needs beside the tensors; all JSON values."""

    step: int = 0
    best_loss: float = math.inf
    epochs_without_improvement: int = 0
    learning_rate: float = 0.0
    validation: dict[str, float] = field(default_factory=dict)


class Trainer:
    """Trains one network on one source of pairs and keeps its run in a folder.

    ``report(step, steps, values)`` is called after each logged step, for a progress bar.
    """

    def __init__(
        self,
        config: TrainConfig,
        train: PairSource,
        validation: PairSource,
        folder: Path,
        report: Callable[[int, int, dict[str, float]], None] = lambda step, steps, values: None,
    ) -> None:
        self.config, self.train, self.validation, self.folder, self.report = (
            config,
            train,
            validation,
            folder,
            report,
        )
        if len(train) < 2 or len(validation) < 2:
            raise ConfigurationError(
                f"{len(train)} training and {len(validation)} validation images; pairs need at least 2 of each"
            )
        self.fabric = Fabric(
            accelerator="auto", devices=1, precision="bf16-mixed" if config.precision == "bf16" else "32-true"
        )
        torch.manual_seed(config.seed)
        net = JointNet(config.model.architecture).to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
        optimizer = torch.optim.Adam(net.parameters(), lr=config.optimizer.learning_rate, fused=True)
        self.net, self.optimizer = self.fabric.setup(net, optimizer)
        self.steps_per_epoch = config.steps_per_epoch or max(1, math.ceil(len(train) / config.batch_size))
        self.steps = self.steps_per_epoch * config.epochs
        self.progress = Progress(learning_rate=config.optimizer.learning_rate)

    def start_from(self, path: Path) -> None:
        """Take the weights of another checkpoint of the same architecture."""
        checkpoint = load_checkpoint(path)
        if checkpoint.spec.architecture.deployed != self.config.model.architecture.deployed:
            raise ConfigurationError(f"{path}: has another architecture than this run; drop --init or change the model")
        self._module.load_state_dict(checkpoint.weights)

    def resume(self) -> None:
        """Continue after the last checkpoint of the folder, with the same numbers as if never stopped."""
        checkpoint = load_checkpoint(self.folder / LAST)
        if checkpoint.training.get("config") != encode(self.config):
            raise ConfigurationError(
                f"{self.folder}: was started with another configuration; resume with the same options, or start anew"
            )
        self._module.load_state_dict(checkpoint.weights)
        state = self.optimizer.state_dict()
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        tensors: dict[int, dict[str, Tensor]] = {}
        for name, value in checkpoint.optimizer.items():
            index, entry = name.split(".", 1)
            parameter = parameters[int(index)]
            if value.shape == parameter.shape:
                # The fused step walks memory in order: a moment has to lie there as its parameter does.
                value = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
            tensors.setdefault(int(index), {})[entry] = value
        self.optimizer.load_state_dict({"state": tensors, "param_groups": state["param_groups"]})
        stored = dict(checkpoint.training["progress"])
        if stored["best_loss"] is None:
            stored["best_loss"] = math.inf
        self.progress = Progress(**stored)

    @property
    def _module(self) -> JointNet:
        module: JointNet = self.net.module
        return module

    def run(self) -> Progress:
        """Train to the end of the schedule; returns where it ended. Interrupting keeps the last checkpoint."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / "config.json", encode(self.config))
        log = RunLog(self.folder, self.progress.step)
        saved_at = time.monotonic()
        sums: dict[str, float] = {}
        # One batch is prepared while the network works on the one before.
        ahead = ThreadPoolExecutor(1)
        prepared = ahead.submit(self.train.batch, self.progress.step, self.config.batch_size)
        try:
            while self.progress.step < self.steps:
                self._set_learning_rate()
                batch = prepared.result()
                prepared = ahead.submit(self.train.batch, self.progress.step + 1, self.config.batch_size)
                values = self._step(batch, self.progress.step)
                self.progress.step += 1
                step, epoch = self.progress.step, (self.progress.step - 1) // self.steps_per_epoch
                for name, value in values.items():
                    sums[name] = sums.get(name, 0.0) + value
                if step % self.config.log_every == 0:
                    means = {name: value / self.config.log_every for name, value in sums.items()}
                    log.write(step, epoch, "train", {**means, "learning_rate": self.progress.learning_rate})
                    self.report(step, self.steps, {**means, **self.progress.validation})
                    sums = {}
                if step % self.steps_per_epoch == 0:
                    log.write(step, epoch, "validation", self._end_epoch())
                    if self._exhausted():
                        break
                if time.monotonic() - saved_at > 60.0 * self.config.checkpoint_minutes and not sums:
                    self.save(LAST, with_optimizer=True)
                    saved_at = time.monotonic()
            self.save(LAST, with_optimizer=True)
        finally:
            ahead.shutdown(cancel_futures=True)
            log.close()
        return self.progress

    def _set_learning_rate(self) -> None:
        options = self.config.optimizer
        if options.schedule == "one-cycle":
            # Up over 15 % of the run, then down, both along half a cosine (Smith & Topin 2018).
            fraction, top = self.progress.step / max(1, self.steps), 0.15
            if fraction < top:
                share = 0.04 + 0.96 * (1 - math.cos(math.pi * fraction / top)) / 2
            else:
                share = 1e-3 + (1 - 1e-3) * (1 + math.cos(math.pi * (fraction - top) / (1 - top))) / 2
            self.progress.learning_rate = options.learning_rate * share
        for group in self.optimizer.param_groups:
            group["lr"] = self.progress.learning_rate

    def _step(self, batch: PairBatch, index: int) -> dict[str, float]:
        generator = torch.Generator().manual_seed(self.config.seed * 7_919 + index)
        batch = augment(self._channels_last(batch), self.config.augment, generator, self.config.model)
        self.optimizer.zero_grad(set_to_none=True)
        output = forward_pair(self.net, batch, self.config.loss)
        loss, terms = joint_loss(self._module, output, batch, self.config.loss, generator)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise JrsError(
                f"{self.folder}: the loss of step {index + 1} is not a number; resume from the last checkpoint "
                "with a lower learning rate"
            )
        self.fabric.backward(loss)
        if self.config.optimizer.clip_norm:
            self.fabric.clip_gradients(self.net, self.optimizer, max_norm=self.config.optimizer.clip_norm)
        self.optimizer.step()
        return {"loss": value, **{name: float(term) for name, term in terms.items()}}

    def _channels_last(self, batch: PairBatch) -> PairBatch:
        batch = batch.to(self.fabric.device)
        layout = torch.channels_last_3d
        images = {
            "moving": batch.moving.to(memory_format=layout),
            "fixed": batch.fixed.to(memory_format=layout),
        }
        return PairBatch(**{**vars(batch), **images})

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Means over the validation pairs: the loss and its terms, Dice of structures warped and unwarped."""
        self.net.eval()
        sums: dict[str, float] = {}
        for index in range(self.config.validation_pairs):
            batch = self._channels_last(self.validation.batch(index, 1))
            output = forward_pair(self.net, batch, self.config.loss)
            generator = torch.Generator().manual_seed(index)
            loss, terms = joint_loss(self._module, output, batch, self.config.loss, generator)
            values = {"loss": float(loss), **{name: float(term) for name, term in terms.items()}}
            if output.coords_vox is not None and batch.moving_structures is not None:
                identity = identity_coords(output.coords_vox).expand_as(output.coords_vox)
                values["dice_affine"] = float(structure_overlap(identity, batch).mean())
                values["dice_moved"] = float(structure_overlap(output.coords_vox, batch).mean())
            for name, value in values.items():
                sums[name] = sums.get(name, 0.0) + value / self.config.validation_pairs
        self.net.train()
        return sums

    def _end_epoch(self) -> dict[str, float]:
        values = self.validate()
        self.progress.validation = {
            f"val_{k}": v for k, v in values.items() if k in ("loss", "dice_moved", "dice_affine")
        }
        if values["loss"] < self.progress.best_loss:
            self.progress.best_loss, self.progress.epochs_without_improvement = values["loss"], 0
            self.save(BEST, with_optimizer=False)
            return values
        self.progress.epochs_without_improvement += 1
        options = self.config.optimizer
        if options.schedule == "plateau" and self.progress.epochs_without_improvement % options.plateau_epochs == 0:
            self.progress.learning_rate *= options.plateau_factor
        return values

    def _exhausted(self) -> bool:
        options = self.config.optimizer
        return options.schedule == "plateau" and self.progress.epochs_without_improvement >= options.stop_epochs

    def save(self, name: str, with_optimizer: bool) -> None:
        """Write a checkpoint into the run's folder, whole or not at all."""
        tensors: dict[str, Tensor] = {}
        if with_optimizer:
            for index, entries in self.optimizer.state_dict()["state"].items():
                for entry, value in entries.items():
                    tensors[f"{index}.{entry}"] = torch.as_tensor(value)
        training: dict[str, Any] = {
            "config": encode(self.config),
            "progress": json.loads(json.dumps(vars(self.progress)).replace("Infinity", "null")),
        }
        Checkpoint(self.config.model, self._module.state_dict(), training, tensors).save(self.folder / name)
