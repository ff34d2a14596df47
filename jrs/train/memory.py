"""Whether a step will fit into memory, asked before the first one is taken.

What the backward pass needs is counted layer by layer and multiplied by a measured constant, because libraries hold
copies and gradients beside it. The constants are from the peak resident memory of whole steps on the CPU (PyTorch
2.13, channels-last; 48, 64 and 96 voxels a side; with and without instance norm; fp32 and bf16; structure and tumour
Dice, diffusion and folding in the loss): there the estimate was within 3 %. It was up to a sixth too high for a loss of
fewer terms, and by 28 % for 16 base channels. On a GPU the constants are the same, not measured.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from jrs.architecture import CONVOLUTIONS_PER_LEVEL, LEVELS, Architecture
from jrs.errors import OutOfMemoryError
from jrs.models.network import JointNet
from jrs.train.config import TrainConfig
from jrs.train.devices import process_counts, share_of

# Bytes held for each byte that is counted: input, output and gradient of the layer at work, and layout copies.
_HELD_PER_COUNTED = 1.58
# FP32 values a voxel of one pair outside the network: logits, probabilities, warped images, the terms of the loss.
_LOSS_VALUES = 90
# What the libraries allocate once, whatever the size.
_LIBRARIES = 60_000_000

_GIB = 2**30


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that one process needs on its device: for a step's pairs, and for the weights and the optimiser."""

    step: int
    weights: int

    @property
    def total(self) -> int:
        """Everything, the libraries' own included."""
        return self.step + self.weights + _LIBRARIES


def estimate_memory(config: TrainConfig, share: int) -> MemoryEstimate:
    """For ``share`` pairs worked off at once."""
    voxels = share
    for side in config.model.grid.shape:
        voxels *= side
    width = 4 if config.precision == "fp32" else 2
    counted = values_per_voxel(config.model.architecture, config.loss.both_ways) * width * _HELD_PER_COUNTED
    # FP32 each: weight, gradient, Adam's two moments, and the average with the copy it is exchanged for.
    copies = 6 if config.optimizer.ema_decay else 4
    weights = 4 * copies * sum(parameter_counts(config.model.architecture).values())
    return MemoryEstimate(int(voxels * (counted + 4 * _LOSS_VALUES)), weights)


def values_per_voxel(architecture: Architecture, both_ways: bool = False) -> float:
    """Values that a pair's backward pass needs of the network's layers, a voxel of the grid.

    ``both_ways``: the registration decoder runs a second time, from the exchanged codes.
    """
    # Of a convolution its activation; with a norm also what went into it and what came out.
    kept = 1 if architecture.norm == "none" else 3
    encoder, decoder = float(architecture.widths[0]), 0.0
    for level, (width, convolutions) in enumerate(zip(architecture.widths, CONVOLUTIONS_PER_LEVEL, strict=True)):
        # The activations, the residual sum, and the input from the level above.
        encoder += width * (convolutions * kept + 1 + (level > 0)) / 8**level
        if level < LEVELS - 1:
            # The activations, the upsampled input, both halves put together, and the residual sum.
            decoder += width * (convolutions * kept + 1 + 2 + 1) / 8**level
    if not architecture.registration:
        return 2 * (encoder + decoder)
    factor = (1.5 if architecture.merge == "concatenate" else 1.0) * (2 if both_ways else 1)
    return 2 * encoder + (2 * decoder if architecture.segmentation else 0.0) + factor * decoder


def parameter_counts(architecture: Architecture) -> dict[str, int]:
    """Weights of each part of the network, by the part's name."""
    with torch.device("meta"):
        net = JointNet(architecture)
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in net.named_children()}
    return {name: count for name, count in counts.items() if count}


def available_memory(device: torch.device) -> int | None:
    """Free bytes on the device; of the host what this process may still have. None where nothing says so."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    found = [value for value in (_free_on_host(), _free_in_control_group()) if value is not None]
    return min(found) if found else None


def check_memory(config: TrainConfig, device: torch.device, processes: int) -> None:
    """Raise OutOfMemoryError, with what to lower, if a step of one of ``processes`` will not fit on its device."""
    available = available_memory(device)
    if available is None:
        return
    if device.type == "cpu":
        available //= process_counts(config.hardware, "cpu")[0]
    share = share_of(config, processes)
    needed = estimate_memory(config, share).total
    if needed <= available:
        return
    remedies = []
    if share > 1:
        remedies.append(f"raise accumulate (now {config.accumulate}) or lower batch_size (now {config.batch_size})")
    if config.precision == "fp32":
        remedies.append("choose precision bf16")
    shape = "x".join(map(str, config.model.grid.shape))
    remedies.append(f"choose a smaller model.grid.shape (now {shape}) or model.architecture.base_channels")
    raise OutOfMemoryError(
        f"a step needs about {needed / _GIB:.1f} GiB on {device.type}, {available / _GIB:.1f} GiB are free; "
        f"{', or '.join(remedies)}; --no-memory-check tries it all the same"
    )


def _free_on_host() -> int | None:
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass
    try:
        # Not free but all there is: the best that can be known without /proc.
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (OSError, ValueError, AttributeError):
        return None


def _free_in_control_group(own: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """What a container or a scheduler's job may still have (control groups, version 2 or 1)."""
    try:
        lines = own.read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    free: list[int] = []
    for line in lines:
        _, controllers, place = line.split(":", 2)
        if controllers == "":
            base, limit, used = root, "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            base, limit, used = root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        folder = base / place.lstrip("/")
        # Every group above has its limit too; inside a container the place is that of the host.
        for group in (folder, *folder.parents):
            if not group.is_relative_to(base):
                break
            try:
                allowed = int((group / limit).read_text())
                cached = _reclaimable(group / "memory.stat")
                free.append(allowed - int((group / used).read_text()) + cached)
            except (OSError, ValueError):
                continue
    return min(free) if free else None


def _reclaimable(statistics: Path) -> int:
    """Bytes of files that a group keeps in memory and gives back when memory is short."""
    names = ("inactive_file", "active_file")
    entries = dict(line.split() for line in statistics.read_text().splitlines())
    return sum(int(entries.get(name, 0)) for name in names)
