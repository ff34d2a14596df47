"""The training loop: steps, validation, schedule, checkpoints; resumable to the same numbers, on any devices.

Everything random is drawn from generators that a seed and the number of a pair make, so that there is no state of a
generator to keep, and a step is the same whichever processes share it.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric

from jrs.errors import ConfigurationError, JrsError
from jrs.models.checkpoint import Checkpoint, load_checkpoint
from jrs.models.network import JointNet
from jrs.models.widening import can_widen, widen
from jrs.schema import decode, encode
from jrs.train.augment import augment
from jrs.train.batch import PairBatch, PairSource
from jrs.train.config import TrainConfig
from jrs.train.configfile import differences, write_config
from jrs.train.devices import Peers, make_fabric, share_of
from jrs.train.guard import NotANumber
from jrs.train.loader import Loader
from jrs.train.log import RunLog
from jrs.train.objective import moved_along
from jrs.train.pictures import draw_pair
from jrs.train.state import BEST, LAST, TrainingState, load_last, remove_leavings, save_last
from jrs.train.step import PairLoss, Work, generator_of, mean_values, overlaps
from jrs.train.stopping import StopSignal

__all__ = ["BEST", "LAST", "Progress", "Timing", "Trainer"]


@dataclass
class Progress:
    """What ``--resume`` needs beside the tensors; all JSON values.

    Attributes:
        step: steps done.
        best_loss, epochs_without_improvement, learning_rate: of the schedule.
        validation: values of the last validation, for the progress bar.
        sums, summed: training values added up since the last row of the log, and over how many steps.
    """

    step: int = 0
    best_loss: float = math.inf
    epochs_without_improvement: int = 0
    learning_rate: float = 0.0
    validation: dict[str, float] = field(default_factory=dict)
    sums: dict[str, float] = field(default_factory=dict)
    summed: int = 0


@dataclass
class Timing:
    """Seconds in which this process waited for data and in which it computed steps."""

    waited_s: float = 0.0
    computed_s: float = 0.0

    @property
    def wait_share(self) -> float:
        """Share of the time that data were waited for."""
        total = self.waited_s + self.computed_s
        return self.waited_s / total if total else 0.0

    def since(self, before: Timing) -> Timing:
        """What was added after ``before``."""
        return Timing(self.waited_s - before.waited_s, self.computed_s - before.computed_s)


class Trainer:
    """Trains one network on one source of pairs and keeps its run in a folder.

    ``report(step, steps, values)`` is called after each logged step, for a progress bar. ``fabric`` is made from the
    configuration if none is given. With several processes every one makes a Trainer and calls the same methods; the
    first one writes. ``record`` goes into the checkpoints beside the configuration; ``record["data"]`` has to be the
    same when the run is resumed.
    """

    def __init__(
        self,
        config: TrainConfig,
        train: PairSource,
        validation: PairSource,
        folder: Path,
        report: Callable[[int, int, dict[str, float]], None] = lambda step, steps, values: None,
        fabric: Fabric | None = None,
        record: dict[str, Any] | None = None,
    ) -> None:
        self.config, self.train, self.validation, self.folder = config, train, validation, folder
        self.report, self.record = report, record or {}
        if len(train) < 2 or len(validation) < 2:
            raise ConfigurationError(
                f"{len(train)} training and {len(validation)} validation images; pairs need at least 2 of each"
            )
        if fabric is None:
            fabric = make_fabric(config)
            fabric.launch()
        self.fabric, self.peers = fabric, Peers(fabric)
        self._share = share_of(config, self.peers.count)
        self._guard = NotANumber(folder, train, validation, self.peers)
        torch.manual_seed(config.seed)
        sharded = config.hardware.strategy == "fsdp"  # which takes contiguous weights alone
        layout = torch.contiguous_format if sharded else torch.channels_last_3d
        net = JointNet(config.model.architecture).to(memory_format=layout)  # type: ignore[call-overload]
        self._module: JointNet = net
        self.net: Any = fabric.setup_module(PairLoss(net, config.loss, several=self.peers.count > 1))
        # With a scaled loss the fused step would do the unscaling, and nothing could be clipped before it.
        fused = config.precision != "fp16"
        adam = torch.optim.Adam(self.net.parameters(), lr=config.optimizer.learning_rate, fused=fused)
        self.optimizer: Any = fabric.setup_optimizers(adam)
        root = self.net.module if sharded else None
        self.state = TrainingState(net, self.optimizer, config.optimizer.ema_decay, root)
        self.steps_per_epoch = config.steps_per_epoch or max(1, math.ceil(len(train) / config.batch_size))
        self.steps = self.steps_per_epoch * config.epochs
        self.progress = Progress(learning_rate=config.optimizer.learning_rate)
        self.timing = Timing()
        self._log: RunLog | None = None

    def start_from(self, path: Path) -> None:
        """Take the weights of another checkpoint of the same architecture, or of a narrower one, which are widened."""
        checkpoint = load_checkpoint(path)
        theirs, ours = checkpoint.spec.architecture.deployed, self.config.model.architecture.deployed
        if not can_widen(theirs, ours):
            raise ConfigurationError(f"{path}: has another architecture than this run; drop --init or change the model")
        weights = checkpoint.weights if theirs == ours else widen(checkpoint.weights, theirs, ours, self.config.seed)
        self.state.load_weights(weights)

    def resume(self, say: Callable[[str], None] = lambda text: None) -> None:
        """Continue after the last checkpoint of the folder, with the same numbers as if never stopped.

        If that file is damaged the one before it serves, and ``say`` is told. Raises ConfigurationError naming the
        fields in which this configuration and the run's differ.
        """
        checkpoint = load_last(self.folder, say)
        stored = decode(TrainConfig, checkpoint.training.get("config"), f"{self.folder / LAST}: config")
        changed = [name for name in differences(stored, self.config) if not name.startswith("hardware.")]
        data, now = (record.get("data", {}) for record in (checkpoint.training.get("record", {}), self.record))
        changed += [f"{kind} images" for kind, images in now.items() if data.get(kind, images) != images]
        if changed:
            raise ConfigurationError(
                f"{self.folder}: was started with another configuration; {', '.join(changed)} "
                f"{'differ' if len(changed) > 1 else 'differs'}, resume with the same options, or start anew"
            )
        self.state.load(checkpoint)
        if checkpoint.training.get("scaler"):
            self.fabric.strategy.precision.load_state_dict(checkpoint.training["scaler"])
        progress = dict(checkpoint.training["progress"])
        if progress["best_loss"] is None:
            progress["best_loss"] = math.inf
        self.progress = Progress(**progress)

    def run(self) -> Progress:
        """Train to the end of the schedule; returns where it ended.

        The first SIGINT or SIGTERM lets the step end, saves, and raises KeyboardInterrupt or SystemExit.
        """
        with ExitStack() as stack:
            if self.peers.first:
                self.folder.mkdir(parents=True, exist_ok=True)
                remove_leavings(self.folder)
                write_config(self.folder / "config.toml", self.config)
                self._log = RunLog(self.folder, self.progress.step)
                stack.callback(self._log.close)
            loader = self._loader()
            stack.callback(loader.close)
            stop = stack.enter_context(StopSignal())
            ended, saved_at, logged = 0, time.monotonic(), Timing()
            while self.progress.step < self.steps and not self._exhausted():
                due = time.monotonic() - saved_at > 60.0 * self.config.checkpoint_minutes and self.progress.step > 0
                parts, ended, due = self._agree(loader, stop, due)
                if due:
                    self.save(LAST, with_optimizer=True)
                    saved_at = time.monotonic()
                if ended:
                    break
                logged = self._advance(parts, logged)
            self.save(LAST, with_optimizer=True)
            stop.end(ended)
        return self.progress

    # One step ---------------------------------------------------------------------------------------------------

    def _loader(self) -> Loader:
        """This process's parts of every step to come, cut out of the run's one sequence of pairs."""
        parts, processes, rank = self.config.accumulate, self.peers.count, self.peers.rank
        numbers = (
            (step * processes + rank) * parts + part
            for step in range(self.progress.step, self.steps)
            for part in range(parts)
        )
        return self._load(self.train, numbers, self._share, self.config.hardware.prefetch * parts)

    def _load(self, source: PairSource, numbers: Iterator[int], size: int, ahead: int) -> Loader:
        pin = self.fabric.device.type == "cuda"
        return Loader(source, numbers, size, self.config.hardware.workers, ahead, pin)

    def _agree(self, loader: Loader, stop: StopSignal, due: bool) -> tuple[list[PairBatch], int, bool]:
        """This process's batches of the next step, and, the same in all processes, the signal and whether to save."""
        parts: list[PairBatch] = []
        failure: BaseException | None = None
        waited_s = loader.waited_s
        try:
            parts = [loader.next() for _ in range(self.config.accumulate)]
        except BaseException as error:  # raised again below, once the others know
            failure = error
        self.timing.waited_s += loader.waited_s - waited_s
        replies = self.peers.gather((failure is not None, isinstance(failure, Exception), stop.number, due))
        due = replies[0][3]
        if any(failed for failed, *_ in replies):
            if self.progress.step and (due or all(expected for failed, expected, *_ in replies if failed)):
                self.save(LAST, with_optimizer=True)
            # Where it was another process that failed, that one says why.
            raise failure or SystemExit(JrsError.exit_code)
        return parts, max(number for _, _, number, _ in replies), due

    def _advance(self, parts: list[PairBatch], logged: Timing) -> Timing:
        """One step, its rows in the log, and the validation that may be due; returns the time of the last row."""
        started = time.perf_counter()
        values = self._step(parts)
        self.timing.computed_s += time.perf_counter() - started
        progress = self.progress
        progress.step += 1
        progress.summed += 1
        for name, value in values.items():
            progress.sums[name] = progress.sums.get(name, 0.0) + value
        step, epoch = progress.step, (progress.step - 1) // self.steps_per_epoch
        if step % self.config.log_every == 0:
            logged = self._log_means(step, epoch, logged)
        if step % self.steps_per_epoch == 0:
            validation = self._end_epoch()
            if self._log is not None:
                self._log.write(step, epoch, "validation", validation)
        return logged

    def _log_means(self, step: int, epoch: int, logged: Timing) -> Timing:
        progress, spent = self.progress, self.timing.since(logged)
        means = {name: value / progress.summed for name, value in progress.sums.items()}
        means["learning_rate"] = progress.learning_rate
        per_step = (spent.waited_s + spent.computed_s) / progress.summed
        progress.sums, progress.summed = {}, 0
        if self._log is not None:
            self._log.write(step, epoch, "train", means)
            self._log.write_timings(step, epoch, {"data_wait": spent.wait_share, "seconds_per_step": per_step})
            self.report(step, self.steps, {**means, **progress.validation, "data_wait": spent.wait_share})
        return Timing(self.timing.waited_s, self.timing.computed_s)

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

    def _step(self, parts: list[PairBatch]) -> dict[str, float]:
        """One step of the optimiser; means over the pairs of all processes. Raises JrsError for a NaN."""
        self._set_learning_rate()
        self.optimizer.zero_grad(set_to_none=True)
        number = self.progress.step * self.config.batch_size + self.peers.rank * self._share * len(parts)
        mine: list[dict[str, float]] = []
        for index, batch in enumerate(parts):
            pairs = range(number + index * self._share, number + (index + 1) * self._share)
            generators = [generator_of(self.config.seed, pair) for pair in pairs]
            batch = augment(self._on_device(batch), self.config.augment, generators, self.config.model)
            if self._is_second_pass(self.progress.step):
                batch = self._after_first_pass(batch, [generator_of(self.config.seed, pair) for pair in pairs])
            work = Work(batch, generators)
            last = index == len(parts) - 1
            with self.fabric.no_backward_sync(self.net, enabled=self.peers.count > 1 and not last):
                loss = self.net(work)
                self.fabric.backward(loss / len(parts))
            mine += work.results()
        replies = self.peers.gather((mine, self._gradient_norm()))
        everyone = [values for theirs, _ in replies for values in theirs]
        self._guard.check_step(self.progress.step, everyone, [norm for _, norm in replies])
        self.optimizer.step()
        self.state.update_average(self.progress.step + 1)
        return mean_values(everyone)

    def _is_second_pass(self, step: int) -> bool:
        """Spread evenly over the run by the number of the step, so the same in all processes and when resumed."""
        share = self.config.second_pass
        return math.floor((step + 1) * share) > math.floor(step * share)

    @torch.no_grad()
    def _after_first_pass(self, batch: PairBatch, generators: list[torch.Generator]) -> PairBatch:
        """The pairs as the network as it is leaves them to a second pass."""
        work = Work(batch, generators)
        self.net(work)
        assert work.output is not None and work.output.coords_vox is not None
        return moved_along(batch, work.output.coords_vox)

    def _gradient_norm(self) -> float:
        """Clip the gradients, if so configured; their norm before, 0 where only the loss scaler can know it."""
        limit = self.config.optimizer.clip_norm
        norm: Any
        if limit:
            norm = self.fabric.clip_gradients(self.net, self.optimizer, max_norm=limit, error_if_nonfinite=False)
        else:
            gradients = [p.grad for p in self.net.parameters() if p.grad is not None]
            norm = torch.nn.utils.get_total_norm(gradients)
        # A scaled loss overflows now and then: the scaler leaves such a step out and scales less.
        return 0.0 if self.config.precision == "fp16" else float(getattr(norm, "full_tensor", lambda: norm)())

    def _on_device(self, batch: PairBatch) -> PairBatch:
        batch = batch.to(self.fabric.device)
        layout = torch.channels_last_3d
        images = {
            "moving": batch.moving.to(memory_format=layout),
            "fixed": batch.fixed.to(memory_format=layout),
        }
        return PairBatch(**{**vars(batch), **images})

    # Validation and schedule ------------------------------------------------------------------------------------

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Means over the validation pairs: the loss and its terms, Dice of structures warped and unwarped.

        With the average of the weights, if one is kept. The pairs are shared by the processes.
        """
        pairs, processes = self.config.validation_pairs, self.peers.count
        # The same number of passes in every process: those without a pair of their own repeat the first.
        numbers = [n if n < pairs else 0 for n in range(self.peers.rank, pairs + (-pairs % processes), processes)]
        self.net.eval()
        mine: list[tuple[int, dict[str, float]]] = []
        loader = self._load(self.validation, iter(numbers), 1, self.config.hardware.prefetch)
        with self.state.averaged(), closing(loader):
            for number in numbers:
                work = Work(self._on_device(loader.next()), [torch.Generator().manual_seed(number)])
                self.net(work)
                values = work.results()[0]
                # Where the loss is no number there may be no coordinates to look up.
                mine.append((number, values | (overlaps(work) if math.isfinite(values["loss"]) else {})))
                if number == 0 and self._log is not None:
                    self._log.write_picture(self.progress.step, draw_pair(work.batch, work.output))
        self.net.train()
        everyone = {number: values for theirs in self.peers.gather(mine) for number, values in theirs}
        self._guard.check_validation(self.progress.step, everyone)
        return mean_values([everyone[number] for number in sorted(everyone)])

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

    # Checkpoints ------------------------------------------------------------------------------------------------

    def save(self, name: str, with_optimizer: bool) -> None:
        """Write a checkpoint into the run's folder, whole or not at all; every process has to call."""
        weights, optimizer = self.state.tensors(with_optimizer)
        if not self.peers.first:
            return
        if not all(bool(torch.isfinite(value).all()) for value in weights.values()):
            raise JrsError(f"{self.folder}: the weights after step {self.progress.step} are not numbers; not saved")
        progress = vars(self.progress) | {"best_loss": _finite_or_none(self.progress.best_loss)}
        training: dict[str, Any] = {"config": encode(self.config), "progress": json.loads(json.dumps(progress))}
        if self.record:
            training["record"] = self.record
        if self.config.precision == "fp16":
            training["scaler"] = self.fabric.strategy.precision.state_dict()
        checkpoint = Checkpoint(self.config.model, weights, training, optimizer)
        if name == LAST:
            save_last(checkpoint, self.folder)
        else:
            checkpoint.save(self.folder / name)


def _finite_or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None
