"""The joint loss of a batch: L = L_reg* + beta L_seg (paper, section 2.3), and the terms beyond it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from jrs.models.losses import (
    bending_energy,
    diffusion,
    folding,
    gradient_l1,
    inverse_consistency,
    local_ncc,
    masked_mse,
    mutual_information,
    soft_dice,
    tumor_regions,
    tumor_rigidity,
    weighted_cross_entropy,
)
from jrs.models.network import JointNet, JointOutput
from jrs.models.spatial import displacement, spatial_gradients, warp
from jrs.structures import STRUCTURES
from jrs.train.batch import PairBatch
from jrs.train.config import LossConfig

Terms = dict[str, Tensor]


def forward_pair(net: Any, batch: PairBatch, config: LossConfig) -> JointOutput:
    """One pass of a JointNet (or what Fabric made of it) with all that ``joint_loss`` needs of it."""
    output: JointOutput = net(batch.moving, batch.fixed, reverse=config.both_ways)
    return output


def joint_loss(
    net: JointNet, output: JointOutput, batch: PairBatch, config: LossConfig, generators: Sequence[torch.Generator]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Of each pair the weighted sum (N,) and its terms (N,) (before weighting, detached), by ``LossConfig``'s names.

    ``generators`` (CPU), one a pair, draw which structures are warped in this step, and mutual information's voxels.
    """
    terms: Terms = {}
    if output.coords_vox is not None:
        drawn = [torch.randperm(len(STRUCTURES), generator=each)[: config.structures_per_step] for each in generators]
        chosen = torch.stack(drawn) + 1
        terms = _registration_terms(net, output, batch, config, chosen, generators)
        if config.both_ways:
            if output.reverse is None:
                raise ValueError("both ways count in this loss: run the network with reverse=True")
            terms = _with_the_way_back(terms, net, output, batch, config, chosen, generators)
    if output.moving_logits is not None and output.fixed_logits is not None:
        terms |= _segmentation_terms(output, batch, config)
    total = sum(
        (float(getattr(config, name)) * value for name, value in terms.items()),
        start=batch.moving.new_zeros(len(batch.moving)),
    )
    return total, {name: value.detach() for name, value in terms.items()}


def _registration_terms(
    net: JointNet,
    output: JointOutput,
    batch: PairBatch,
    config: LossConfig,
    chosen: Tensor,
    generators: Sequence[torch.Generator],
) -> Terms:
    """The terms of one direction."""
    assert output.flow is not None and output.coords_vox is not None
    terms: Terms = {}
    if config.similarity:
        terms["similarity"] = _similarity(output, batch, config, generators)
    if config.gradient_l1:
        terms["gradient_l1"] = gradient_l1(spatial_gradients(output.flow, net.architecture.head))
    if config.diffusion or config.bending or config.folding or config.tumor_rigidity:
        field = displacement(output.coords_vox)
        measures = {"diffusion": diffusion, "bending": bending_energy, "folding": folding}
        terms |= {name: measure(field) for name, measure in measures.items() if getattr(config, name)}
        if config.tumor_rigidity and batch.moving_tumor is not None and batch.fixed_tumor is not None:
            # Where the tumour comes to lie is given here: moving it off its own strain is no way out.
            tumor = warp((batch.moving_tumor > 0).unsqueeze(1).float(), output.coords_vox.detach())
            terms["tumor_rigidity"] = tumor_rigidity(field, tumor)
    if config.structure_dice and batch.moving_structures is not None and batch.fixed_structures is not None:
        terms["structure_dice"] = _structure_dice(output.coords_vox, batch, config, chosen)
    return terms


def _with_the_way_back(
    terms: Terms,
    net: JointNet,
    output: JointOutput,
    batch: PairBatch,
    config: LossConfig,
    chosen: Tensor,
    generators: Sequence[torch.Generator],
) -> Terms:
    """The terms of both directions: their mean with the weights 1 and ``symmetric``, and what joins them."""
    back = output.reverse
    assert back is not None and output.coords_vox is not None and back.coords_vox is not None
    if config.symmetric:
        other = _registration_terms(net, back, _exchanged(batch), config, chosen, generators)
        share = config.symmetric / (1.0 + config.symmetric)
        terms = {name: torch.lerp(value, other[name], share) for name, value in terms.items()}
    if config.inverse_consistency:
        there, here = displacement(output.coords_vox), displacement(back.coords_vox)
        terms["inverse_consistency"] = 0.5 * (
            inverse_consistency(there, warp(here, output.coords_vox))
            + inverse_consistency(here, warp(there, back.coords_vox))
        )
    return terms


def _exchanged(batch: PairBatch) -> PairBatch:
    return PairBatch(
        moving=batch.fixed,
        fixed=batch.moving,
        moving_present=batch.fixed_present,
        fixed_present=batch.moving_present,
        moving_tumor=batch.fixed_tumor,
        fixed_tumor=batch.moving_tumor,
        moving_structures=batch.fixed_structures,
        fixed_structures=batch.moving_structures,
    )


def _similarity(
    output: JointOutput, batch: PairBatch, config: LossConfig, generators: Sequence[torch.Generator]
) -> Tensor:
    assert output.moved is not None
    mask = output.nontumor_mask if config.masked else None
    present = batch.moving_present * batch.fixed_present
    if config.similarity_measure == "lncc":
        return local_ncc(output.moved, batch.fixed, mask, present, config.lncc_window, config.lncc_stride)
    if config.similarity_measure == "mi":
        return mutual_information(
            output.moved, batch.fixed, mask, present, config.mi_bins, config.mi_samples, generators
        )
    return masked_mse(output.moved, batch.fixed, mask, present)


def _segmentation_terms(output: JointOutput, batch: PairBatch, config: LossConfig) -> Terms:
    """Cross-entropy, the sum over both images, and Dice, their mean.

    Auxiliary heads join in with weights that halve from level to level and add up to 1 with the finest's, their
    truth being every second label along each axis of the level before (nnU-Net, doi 10.1038/s41592-020-01008-z).
    """
    images = [
        ((logits, *auxiliary), labels)
        for logits, auxiliary, labels in (
            (output.moving_logits, output.moving_auxiliary, batch.moving_tumor),
            (output.fixed_logits, output.fixed_auxiliary, batch.fixed_tumor),
        )
        if logits is not None and labels is not None
    ]
    weights = torch.tensor(config.class_weights, device=batch.moving.device)
    entropy, dice = [], []
    for levels, labels in images:
        whole = sum(0.5**k for k in range(len(levels)))
        for k, logits in enumerate(levels):
            share, step = 0.5**k / whole, 2**k
            truth = labels[:, ::step, ::step, ::step]
            if config.segmentation:
                entropy.append(share * weighted_cross_entropy(logits, truth, weights))
            if config.tumor_dice:
                dice.append(share * _tumor_dice(logits, truth))
    terms: Terms = {}
    if entropy:
        terms["segmentation"] = torch.stack(entropy).sum(dim=0)
    if dice:
        terms["tumor_dice"] = torch.stack(dice).sum(dim=0) / len(images)
    return terms


def _tumor_dice(logits: Tensor, labels: Tensor) -> Tensor:
    known = (labels >= 0).unsqueeze(1).float()
    truth = functional.one_hot(labels.clamp(min=0), logits.shape[1]).movedim(-1, 1).float()
    return soft_dice(tumor_regions(logits.float().softmax(dim=1)), tumor_regions(truth), known)


def _structure_dice(coords_vox: Tensor, batch: PairBatch, config: LossConfig, chosen: Tensor) -> Tensor:
    """Some structures (N,K) at random: warping all would double the time of a step and teach no more."""
    assert batch.moving_structures is not None and batch.fixed_structures is not None
    chosen = chosen.to(batch.moving.device)[:, :, None, None, None]
    moving = (batch.moving_structures.unsqueeze(1) == chosen).float()
    fixed = (batch.fixed_structures.unsqueeze(1) == chosen).float()
    mask = None
    if config.masked and batch.moving_tumor is not None and batch.fixed_tumor is not None:
        # Under a tumour there is no structure to match, in either image.
        moving = moving * (batch.moving_tumor == 0).unsqueeze(1)
        mask = (batch.fixed_tumor == 0).unsqueeze(1).float()
    return soft_dice(warp(moving, coords_vox), fixed, mask)


@torch.no_grad()
def structure_overlap(coords_vox: Tensor, batch: PairBatch) -> Tensor:
    """Mean Dice over the structures present in both images, labels warped by nearest neighbour; one a pair."""
    assert batch.moving_structures is not None and batch.fixed_structures is not None
    structures = _moved_labels(batch.moving_structures, coords_vox)
    results = []
    for n in range(coords_vox.shape[0]):
        moved = structures[n].long().reshape(-1)
        fixed = batch.fixed_structures[n].long().reshape(-1)
        size = len(STRUCTURES) + 1
        joint = torch.bincount(moved * size + fixed, minlength=size * size).reshape(size, size).float()
        overlap, sums = joint.diagonal()[1:], joint.sum(0)[1:] + joint.sum(1)[1:]
        there = (joint.sum(0)[1:] > 0) & (joint.sum(1)[1:] > 0)
        results.append((2 * overlap / sums.clamp(min=1))[there].mean())
    return torch.stack(results)


@torch.no_grad()
def moved_along(batch: PairBatch, coords_vox: Tensor) -> PairBatch:
    """The batch with its moving images (trilinear) and their labels (nearest) sampled at ``coords_vox`` (N,3,X,Y,Z)."""
    moving, tumor, structures = batch.moving, batch.moving_tumor, batch.moving_structures
    return dataclasses.replace(
        batch,
        moving=warp(moving, coords_vox),
        moving_tumor=None if tumor is None else _moved_labels(tumor, coords_vox),
        moving_structures=None if structures is None else _moved_labels(structures, coords_vox),
    )


def _moved_labels(labels: Tensor, coords_vox: Tensor) -> Tensor:
    """Labels (N,X,Y,Z) of the voxels nearest to ``coords_vox``, the border repeated."""
    shape = torch.tensor(labels.shape[1:], device=coords_vox.device).view(1, 3, 1, 1, 1)
    index = coords_vox.round().clamp(min=0).minimum(shape - 1.0).long()
    return torch.stack([of[at[0], at[1], at[2]] for of, at in zip(labels, index, strict=True)])
