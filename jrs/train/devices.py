"""On which devices a run computes, and what its processes have to tell one another.

One process drives one device. Processes are started by ``torchrun``, by Slurm's ``srun``, or, where neither is there
and more than one device is asked for, by Lightning Fabric, which runs the command again once a device.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Any, TypeVar

import torch
from lightning_fabric import Fabric
from lightning_fabric.strategies.ddp import DDPStrategy
from lightning_fabric.strategies.model_parallel import ModelParallelStrategy
from lightning_fabric.strategies.strategy import Strategy
from torch import nn

from jrs.errors import BackendError, ConfigurationError, first_line
from jrs.train.config import HardwareConfig, TrainConfig

T = TypeVar("T")

_FABRIC_PRECISION: dict[str, Any] = {"bf16": "bf16-mixed", "fp16": "16-mixed", "fp32": "32-true"}


def make_fabric(config: TrainConfig) -> Fabric:
    """Fabric for the configuration's hardware and precision, not launched yet; raises BackendError if it is not there.

    Under autocast (``bf16``, ``fp16``) weights, gradients and optimiser stay FP32, with either strategy.
    """
    hardware = config.hardware
    accelerator = hardware.accelerator
    if accelerator == "auto":
        accelerator = "cuda" if torch.cuda.is_available() else "cpu"
    if accelerator == "cuda" and not torch.cuda.is_available():
        raise BackendError("no CUDA device was found; choose --accelerator cpu, or install PyTorch for CUDA")
    if accelerator == "cpu" and config.precision == "fp16":
        raise ConfigurationError("precision fp16 needs a GPU; choose bf16 or fp32 on the CPU")
    if accelerator == "cpu" and config.precision == "bf16":
        _refuse_wrong_gradients(config)
    if hardware.strategy == "fsdp" and config.precision == "fp16":
        raise ConfigurationError("strategy fsdp computes in bf16 or fp32; choose one of them, or strategy ddp")
    devices, nodes = process_counts(hardware, accelerator)
    share_of(config, devices * nodes)
    named = getattr(sys.modules["__main__"], "__spec__", None) is not None or Path(sys.argv[0]).is_file()
    if devices > 1 and _started() is None and not named:
        raise BackendError(f"this command cannot be run again for each of {devices} devices; start it with torchrun")
    # Which precision and which rank a process has is said in the run's own words or not at all.
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
    # Of convolutions of 1x1x1, whose layout has no meaning.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    try:
        return Fabric(
            accelerator=accelerator,
            devices=devices,
            num_nodes=nodes,
            strategy=_strategy(hardware, devices * nodes),
            precision=_FABRIC_PRECISION[config.precision],
        )
    except (ValueError, RuntimeError) as error:
        raise BackendError(f"{devices} {accelerator} devices on {nodes} nodes: {first_line(error)}") from error


def _refuse_wrong_gradients(config: TrainConfig) -> None:
    """PyTorch 2.13 leaves a part of such weights' BF16 gradients as the memory was: oneDNN, seen with AVX512-BF16."""
    first, widths = config.model.grid.shape[0], config.model.architecture.widths
    if any(first >> level == 2 and width > 16 for level, width in enumerate(widths)):
        raise ConfigurationError(
            f"precision bf16 on the CPU: gradients are wrong on a grid whose first axis has {first} voxels, for which "
            "PyTorch's convolutions come down to two; choose precision fp32, or 48 voxels or more"
        )


def process_counts(hardware: HardwareConfig, accelerator: str) -> tuple[int, int]:
    """Devices a node and nodes: as asked for, else as torchrun or Slurm started this process, else one of each."""
    started = _started()
    devices, nodes = hardware.devices, hardware.nodes
    if devices == -1:
        devices = max(1, torch.cuda.device_count()) if accelerator == "cuda" else 1
    if started is None:
        return devices or 1, nodes or 1
    asked = (devices or started[0], nodes or started[1])
    if asked != started:
        raise ConfigurationError(
            f"{asked[0]} devices on {asked[1]} nodes were asked for, {started[0]} processes on {started[1]} nodes were "
            "started; leave --devices and --nodes out under torchrun or Slurm, or start as many processes"
        )
    return started


def _started() -> tuple[int, int] | None:
    """Processes a node and nodes as torchrun or Slurm started them; None where neither did."""
    environment = os.environ
    if torch.distributed.is_available() and torch.distributed.is_torchelastic_launched():
        local = int(environment.get("LOCAL_WORLD_SIZE", "1"))
        return local, int(environment["WORLD_SIZE"]) // local
    if "SLURM_NTASKS" in environment and environment.get("SLURM_JOB_NAME") not in ("bash", "interactive"):
        nodes = int(environment.get("SLURM_NNODES", "1"))
        # srun says tasks a node where it was asked for them, else it spreads all evenly.
        return int(environment.get("SLURM_NTASKS_PER_NODE", int(environment["SLURM_NTASKS"]) // nodes)), nodes
    return None


def _strategy(hardware: HardwareConfig, processes: int) -> str | Strategy:
    if hardware.strategy == "fsdp":
        return ModelParallelStrategy(_shard, processes, 1, save_distributed_checkpoint=False)
    if hardware.strategy == "ddp" or processes > 1:
        return DDPStrategy()
    return "auto"


def _shard(module: nn.Module, mesh: Any) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    # Given back after each pass: weights may be exchanged for their average in between.
    fully_shard(module, mesh=mesh["data_parallel"], reshard_after_forward=True)
    return module


def share_of(config: TrainConfig, processes: int) -> int:
    """Pairs that one process works off at once; raises ConfigurationError if a step's pairs cannot be cut evenly."""
    parts = processes * config.accumulate
    if config.batch_size % parts:
        raise ConfigurationError(
            f"batch_size {config.batch_size} cannot be cut evenly over {processes} processes in {config.accumulate} "
            f"parts each (accumulate); choose a multiple of {parts}"
        )
    return config.batch_size // parts


class Peers:
    """Small exchanges between the processes of a run, over the CPU so that no device waits; alone, none at all."""

    def __init__(self, fabric: Fabric) -> None:
        self.rank, self.count = fabric.global_rank, fabric.world_size
        self._group: Any = torch.distributed.new_group(backend="gloo") if self.count > 1 else None

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and reports."""
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """Everybody's value, in the order of the ranks: the same list in every process.

        Raises BackendError where another process has ended.
        """
        if self._group is None:
            return [value]
        everybody: list[Any] = [None] * self.count
        try:
            torch.distributed.all_gather_object(everybody, value, group=self._group)
        except RuntimeError as error:
            raise BackendError(
                f"another process of this run has ended ({first_line(error)}); its own message says why"
            ) from error
        return everybody
