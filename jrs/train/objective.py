"""The joint loss of a batch: L = L_reg* + beta L_seg (paper, section 2.3), and the terms beyond it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from jrs.models.losses import (
    diffusion,
    folding,
    gradient_l1,
    masked_mse,
    soft_dice,
    tumor_regions,
    weighted_cross_entropy,
)
from jrs.models.network import JointNet, JointOutput
from jrs.models.spatial import displacement, spatial_gradients, warp
from jrs.structures import STRUCTURES
from jrs.train.batch import PairBatch
from jrs.train.config import LossConfig


def joint_loss(
    net: JointNet, output: JointOutput, batch: PairBatch, config: LossConfig, generator: torch.Generator
) -> tuple[Tensor, dict[str, Tensor]]:
    """The weighted sum and its terms (before weighting, detached), by the names of ``LossConfig``.

    ``generator`` (CPU) draws which structures are warped in this step.
    """
    terms: dict[str, Tensor] = {}
    if output.moved is not None and output.flow is not None and output.coords_vox is not None:
        architecture = net.architecture
        mask = output.nontumor_mask if config.masked else None
        present = batch.moving_present * batch.fixed_present
        terms["similarity"] = masked_mse(output.moved, batch.fixed, mask, present)
        if config.gradient_l1:
            terms["gradient_l1"] = gradient_l1(spatial_gradients(output.flow, architecture.head))
        if config.diffusion:
            terms["diffusion"] = diffusion(displacement(output.coords_vox))
        if config.folding:
            terms["folding"] = folding(displacement(output.coords_vox))
        if config.structure_dice and batch.moving_structures is not None and batch.fixed_structures is not None:
            terms["structure_dice"] = _structure_dice(output, batch, config, generator)
    if output.moving_logits is not None and output.fixed_logits is not None:
        terms |= _segmentation_terms(output, batch, config)
    total = sum(
        (float(getattr(config, name)) * value for name, value in terms.items()),
        start=batch.moving.new_zeros(()),
    )
    return total, {name: value.detach() for name, value in terms.items()}


def _segmentation_terms(output: JointOutput, batch: PairBatch, config: LossConfig) -> dict[str, Tensor]:
    terms: dict[str, Tensor] = {}
    weights = torch.tensor(config.class_weights, device=batch.moving.device)
    entropy, dice = [], []
    for logits, labels in (
        (output.moving_logits, batch.moving_tumor),
        (output.fixed_logits, batch.fixed_tumor),
    ):
        if logits is None or labels is None:
            continue
        entropy.append(weighted_cross_entropy(logits, labels, weights))
        if config.tumor_dice:
            known = (labels >= 0).unsqueeze(1).float()
            truth = functional.one_hot(labels.clamp(min=0), logits.shape[1]).movedim(-1, 1).float()
            dice.append(soft_dice(tumor_regions(logits.softmax(dim=1)), tumor_regions(truth), known))
    if entropy:
        terms["segmentation"] = torch.stack(entropy).sum()
    if dice:
        terms["tumor_dice"] = torch.stack(dice).mean()
    return terms


def _structure_dice(output: JointOutput, batch: PairBatch, config: LossConfig, generator: torch.Generator) -> Tensor:
    """Some structures at random: warping all would double the time of a step and teach no more."""
    assert output.coords_vox is not None and batch.moving_structures is not None and batch.fixed_structures is not None
    count = min(config.structures_per_step, len(STRUCTURES))
    chosen = (torch.randperm(len(STRUCTURES), generator=generator)[:count] + 1).to(batch.moving.device)
    chosen = chosen.view(1, -1, 1, 1, 1)
    moving = (batch.moving_structures.unsqueeze(1) == chosen).float()
    fixed = (batch.fixed_structures.unsqueeze(1) == chosen).float()
    mask = None
    if config.masked and batch.moving_tumor is not None and batch.fixed_tumor is not None:
        # Under a tumour there is no structure to match, in either image.
        moving = moving * (batch.moving_tumor == 0).unsqueeze(1)
        mask = (batch.fixed_tumor == 0).unsqueeze(1).float()
    return soft_dice(warp(moving, output.coords_vox), fixed, mask)


@torch.no_grad()
def structure_overlap(coords_vox: Tensor, batch: PairBatch) -> Tensor:
    """Mean Dice over the structures present in both images, labels warped by nearest neighbour; one a pair."""
    assert batch.moving_structures is not None and batch.fixed_structures is not None
    shape = torch.tensor(batch.moving.shape[2:], device=coords_vox.device).view(1, 3, 1, 1, 1)
    index = coords_vox.round().clamp(min=0).minimum(shape - 1.0).long()
    results = []
    for n in range(coords_vox.shape[0]):
        moved = batch.moving_structures[n][index[n, 0], index[n, 1], index[n, 2]].long().reshape(-1)
        fixed = batch.fixed_structures[n].long().reshape(-1)
        size = len(STRUCTURES) + 1
        joint = torch.bincount(moved * size + fixed, minlength=size * size).reshape(size, size).float()
        overlap, sums = joint.diagonal()[1:], joint.sum(0)[1:] + joint.sum(1)[1:]
        there = (joint.sum(0)[1:] > 0) & (joint.sum(1)[1:] > 0)
        results.append((2 * overlap / sums.clamp(min=1))[there].mean())
    return torch.stack(results)
