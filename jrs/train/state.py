"""Weights, their average and the optimiser: into a checkpoint and out of it, whole, however they are spread.

A checkpoint's ``model`` tensors are the weights to use: the average, if one is kept. The weights being trained are
then the entry ``weight`` of the optimiser's tensors, ``<parameter index>.weight``.
"""

from __future__ import annotations

import os
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from jrs.errors import ConfigurationError, MissingInputError
from jrs.models.checkpoint import Checkpoint, load_checkpoint
from jrs.models.network import JointNet

BEST, LAST, PREVIOUS = "best.safetensors", "last.safetensors", "previous.safetensors"
_RAW = "weight"


class TrainingState:
    """What a step changes. ``root`` is the PairLoss whose weights are spread over the processes (fsdp), if they are."""

    def __init__(self, net: JointNet, optimizer: Any, ema_decay: float, root: nn.Module | None = None) -> None:
        self._net, self._optimizer, self._decay = net, optimizer, ema_decay
        self._names = [name for name, _ in net.named_parameters()]
        self._root = root
        self._average: list[Tensor] = []
        self.reset_average()

    @property
    def _parameters(self) -> list[Tensor]:
        """The weights, or this process's part of each."""
        return [getattr(p.detach(), "to_local", p.detach)() for p in self._net.parameters()]

    # The average ----------------------------------------------------------------------------------------------

    def reset_average(self) -> None:
        """Let the average start at the weights as they are."""
        if self._decay:
            self._average = [p.clone() for p in self._parameters]

    @torch.no_grad()
    def update_average(self, steps: int) -> None:
        """Move the average towards the weights after step number ``steps``; see ``OptimizerConfig.ema_decay``."""
        if self._decay:
            decay = min(self._decay, (1 + steps) / (10 + steps))
            torch._foreach_lerp_(self._average, self._parameters, 1.0 - decay)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The network has the average for its weights inside this block, if one is kept."""
        if not self._decay:
            yield
            return
        kept = [p.clone() for p in self._parameters]
        self._set(self._average)
        try:
            yield
        finally:
            self._set(kept)

    @torch.no_grad()
    def _set(self, values: list[Tensor]) -> None:
        for parameter, value in zip(self._parameters, values, strict=True):
            parameter.copy_(value)

    # Out of the network ---------------------------------------------------------------------------------------

    def tensors(self, with_optimizer: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """``weights`` and ``optimizer`` of a Checkpoint; every process must call, the first one gets them all."""
        raw = self._weights()
        optimizer = self._moments() if with_optimizer else {}
        if not self._decay:
            return raw, optimizer
        if with_optimizer:
            for index, name in enumerate(self._names):
                if name in raw:
                    optimizer[f"{index}.{_RAW}"] = raw[name].clone()
        with self.averaged():
            return {name: value.clone() for name, value in self._weights().items()}, optimizer

    def _weights(self) -> dict[str, Tensor]:
        if self._root is None:
            return self._net.state_dict()
        from torch.distributed.checkpoint.state_dict import get_model_state_dict

        whole: Any = get_model_state_dict(self._root, options=_whole())
        return {name.removeprefix("net."): value for name, value in whole.items()}

    def _moments(self) -> dict[str, Tensor]:
        if self._root is None:
            state = self._optimizer.state_dict()["state"]
        else:
            from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

            whole: Any = get_optimizer_state_dict(self._root, self._optimizer.optimizer, options=_whole())
            named = whole.get("state", {})
            state = {self._names.index(name.removeprefix("net.")): entries for name, entries in named.items()}
        return {
            f"{index}.{name}": torch.as_tensor(value)
            for index, entries in state.items()
            for name, value in entries.items()
        }

    # Into the network -----------------------------------------------------------------------------------------

    def load_weights(self, weights: dict[str, Tensor]) -> None:
        """Take a network's weights, and start the average there; every process must call with all of them."""
        if self._root is None:
            self._net.load_state_dict(weights)
        else:
            from torch.distributed.checkpoint.state_dict import set_model_state_dict

            named: Any = {f"net.{name}": value for name, value in weights.items()}
            set_model_state_dict(self._root, named, options=_whole())
        self.reset_average()

    def load(self, checkpoint: Checkpoint) -> None:
        """Take everything from a checkpoint; every process must call."""
        moments = {k: v for k, v in checkpoint.optimizer.items() if not k.endswith(f".{_RAW}")}
        self.load_weights(checkpoint.weights)
        raw = {int(k.split(".")[0]): v for k, v in checkpoint.optimizer.items() if k.endswith(f".{_RAW}")}
        if raw:
            average = self._average
            self.load_weights({**checkpoint.weights, **{self._names[index]: value for index, value in raw.items()}})
            self._average = average
        self._load_moments(moments)

    def _load_moments(self, moments: dict[str, Tensor]) -> None:
        entries: dict[int, dict[str, Tensor]] = {}
        for name, value in moments.items():
            index, entry = name.split(".", 1)
            entries.setdefault(int(index), {})[entry] = value
        if self._root is not None:
            self._load_sharded_moments(self._root, entries)
            return
        parameters = [p for group in self._optimizer.param_groups for p in group["params"]]
        for number, values in entries.items():
            parameter = parameters[number]
            for entry, value in values.items():
                if value.shape == parameter.shape:
                    # The fused step walks memory in order: a moment has to lie there as its parameter does.
                    values[entry] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
        groups = self._optimizer.state_dict()["param_groups"]
        self._optimizer.load_state_dict({"state": entries, "param_groups": groups})

    def _load_sharded_moments(self, root: nn.Module, entries: dict[int, dict[str, Tensor]]) -> None:
        from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

        optimizer = self._optimizer.optimizer
        groups = get_optimizer_state_dict(root, optimizer, options=_whole())["param_groups"]
        named = {f"net.{self._names[index]}": values for index, values in entries.items()}
        whole: Any = {"state": named, "param_groups": groups}
        set_optimizer_state_dict(root, optimizer, whole, options=_whole())


def _whole() -> Any:
    from torch.distributed.checkpoint.state_dict import StateDictOptions

    return StateDictOptions(full_state_dict=True, cpu_offload=True)


# Files ----------------------------------------------------------------------------------------------------------


def save_last(checkpoint: Checkpoint, folder: Path) -> None:
    """Write ``last.safetensors`` and keep the one before it as ``previous.safetensors``."""
    checkpoint.training["crc32"] = checksum(checkpoint)
    if (folder / LAST).exists():
        # A second name first: at every moment one whole file has one of the two names.
        with tempfile.TemporaryDirectory(prefix=".jrs-", dir=folder) as temporary:
            second = Path(temporary) / LAST
            try:
                os.link(folder / LAST, second)
            except OSError:
                import shutil

                shutil.copyfile(folder / LAST, second)
            second.replace(folder / PREVIOUS)
    checkpoint.save(folder / LAST)


def load_last(folder: Path, say: Callable[[str], None] = lambda text: None) -> Checkpoint:
    """The newest checkpoint of a run that is whole: the last, or, with a word to ``say``, the one before it.

    Raises MissingInputError if there is none, ConfigurationError if all are damaged.
    """
    found = [folder / name for name in (LAST, PREVIOUS) if (folder / name).exists()]
    if not found:
        raise MissingInputError(f"{folder / LAST}: no such checkpoint; train first, or name the folder of a run")
    damage = ""
    for path in found:
        if damage:
            say(f"{damage}; continuing from {path.name}")
        try:
            checkpoint = load_checkpoint(path)
        except ConfigurationError as error:
            damage = str(error)
            continue
        if checkpoint.training.get("crc32") in (None, checksum(checkpoint)):
            return checkpoint
        damage = f"{path}: is damaged, its checksum does not fit"
    raise ConfigurationError(f"{damage}; no other checkpoint is left, start anew in another folder")


def checksum(checkpoint: Checkpoint) -> int:
    """CRC-32 of all tensors, in the order of their names."""
    value = 0
    for part in (checkpoint.weights, checkpoint.optimizer):
        for name in sorted(part):
            data: Any = part[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
            value = zlib.crc32(data, zlib.crc32(name.encode(), value))
    return value


def remove_leavings(folder: Path) -> None:
    """Remove the unfinished files of a process that was killed while it wrote a checkpoint."""
    import shutil

    for path in folder.glob(".jrs-*"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
