"""The loss of some pairs as one module, and what to say when it is not a number.

The loss of a batch is the mean over its pairs of each pair's own joint loss. So a batch may be cut, over processes
and into parts one after the other, and the gradients stay those of the whole: terms that are ratios over a batch (of
labelled voxels, of structures present) would weigh a pair by its neighbours. A pair without labels counts as zero.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn

from jrs.models.network import JointNet, JointOutput
from jrs.models.spatial import identity_coords
from jrs.train.batch import PairBatch
from jrs.train.config import LossConfig
from jrs.train.objective import forward_pair, joint_loss, structure_overlap


class Work:
    """A batch on the device, one generator a pair, and, once worked off, what came out.

    No dataclass, so that nothing on the way (autocast, DDP) looks inside and rounds the images to 16 bits.

    Attributes:
        output: of the network.
        values: (N, 1 + terms) of each pair its loss and the terms that ``names`` names; detached, on the device.
    """

    def __init__(self, batch: PairBatch, generators: list[torch.Generator]) -> None:
        self.batch, self.generators = batch, generators
        self.output: JointOutput | None = None
        self.names: list[str] = []
        self.values = torch.empty(0)

    def results(self) -> list[dict[str, float]]:
        """Of each pair its loss and terms; waits for the device."""
        return [dict(zip(self.names, row, strict=True)) for row in self.values.tolist()]


class PairLoss(nn.Module):
    """Network and joint loss in one forward pass, so that DDP and FSDP see every use of a weight."""

    def __init__(self, net: JointNet, config: LossConfig, several: bool) -> None:
        super().__init__()
        self.net, self.config, self.several = net, config, several

    def forward(self, work: Work) -> Tensor:
        """The mean over the pairs of their losses; details go into ``work``."""
        batch = work.batch
        work.output = output = forward_pair(self.net, batch, self.config)
        # Autocast is for the network; a loss is FP32.
        with torch.autocast(batch.moving.device.type, enabled=False):
            losses, terms = joint_loss(self.net, output, batch, self.config, work.generators)
            work.names = ["loss", *terms]
            work.values = torch.stack([losses.detach(), *terms.values()], dim=1).float()
            total = losses.mean()
            if self.several and self.training:
                # Where a batch has no labels a decoder is not used; DDP waits for the gradient of every weight.
                total = total + 0.0 * torch.stack([p.float().sum() for p in self.net.parameters()]).sum()
        return total


def generator_of(seed: int, pair: int) -> torch.Generator:
    """A CPU generator for everything random in one training pair's step, whichever process works it off."""
    # PyTorch's CPU generator keeps 32 bits of a seed, so all numbers are mixed into as many.
    mixed = np.random.SeedSequence([seed, pair, 1]).generate_state(1)[0]
    return torch.Generator().manual_seed(int(mixed))


def not_numbers(values: dict[str, float]) -> list[str]:
    """Names of the values that are NaN or infinite, terms before the loss that they make so."""
    bad = [name for name, value in values.items() if not math.isfinite(value)]
    return [name for name in bad if name != "loss"] or bad


def mean_values(pairs: list[dict[str, float]]) -> dict[str, float]:
    """The mean of each value over the pairs that have it, in the order given."""
    columns: dict[str, list[float]] = {}
    for values in pairs:
        for name, value in values.items():
            columns.setdefault(name, []).append(value)
    return {name: sum(column) / len(column) for name, column in columns.items()}


def overlaps(work: Work) -> dict[str, float]:
    """Dice of structures by the affine alone and moved; empty where a pair has none in common."""
    output, batch = work.output, work.batch
    if output is None or output.coords_vox is None or batch.moving_structures is None:
        return {}
    identity = identity_coords(output.coords_vox).expand_as(output.coords_vox)
    values = {
        "dice_affine": float(structure_overlap(identity, batch).mean()),
        "dice_moved": float(structure_overlap(output.coords_vox, batch).mean()),
    }
    return {name: value for name, value in values.items() if math.isfinite(value)}
