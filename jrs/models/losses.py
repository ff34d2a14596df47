"""The paper's losses (Estienne et al. 2020, section 2.3) and the few that train faster.

Images are (N,C,X,Y,Z), masks (N,1,X,Y,Z), labels (N,X,Y,Z) int64; every loss is a scalar in FP32.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def weighted_cross_entropy(logits: Tensor, labels: Tensor, class_weights: Tensor | None = None) -> Tensor:
    """Cross-entropy with one weight a class, the weighted mean over voxels.

    Voxels labelled -1 do not count; where none is known the loss is zero.
    """
    if not (labels >= 0).any():
        return logits.float().sum() * 0.0
    return functional.cross_entropy(logits.float(), labels, class_weights, ignore_index=-1)


def masked_mse(moved: Tensor, fixed: Tensor, mask: Tensor | None = None, present: Tensor | None = None) -> Tensor:
    """||mask (R - D)||^2, the mean over voxels and channels.

    ``mask`` multiplies the residual, as in the paper's L_reg*; it carries no gradient. ``present`` (N,C) in
    {0, 1} leaves out channels that one of the two images lacks.
    """
    residual = moved.float() - fixed.float()
    if mask is not None:
        residual = residual * mask.detach()
    squared = residual.square()
    if present is None:
        return squared.mean()
    per_channel = squared.mean(dim=(2, 3, 4))
    return (per_channel * present).sum() / present.sum().clamp(min=1.0)


def gradient_l1(gradients: Tensor, reduction: str = "sum") -> Tensor:
    """||Phi - 1||_1 of spatial gradients (N,3,X,Y,Z), per image: summed over voxels (the paper's) or ``mean``."""
    distance = (gradients.float() - 1.0).abs()
    return distance.sum() / gradients.shape[0] if reduction == "sum" else distance.mean()


def diffusion(displacement: Tensor) -> Tensor:
    """Mean squared forward difference of a displacement (N,3,X,Y,Z) in voxels along the three axes."""
    total = displacement.new_zeros(())
    for axis in (2, 3, 4):
        total = total + displacement.diff(dim=axis).square().mean()
    return total / 3.0


def folding(displacement: Tensor, margin: float = 0.1) -> Tensor:
    """Mean over voxels of max(0, margin - det d(x + u)/dx), by forward differences of u (N,3,X,Y,Z) in voxels.

    Zero wherever the map keeps its orientation with some room; elsewhere it grows with the depth of the fold.
    """
    inner = displacement[:, :, :-1, :-1, :-1]
    columns = [
        displacement[:, :, 1:, :-1, :-1] - inner,
        displacement[:, :, :-1, 1:, :-1] - inner,
        displacement[:, :, :-1, :-1, 1:] - inner,
    ]
    for axis in range(3):
        unit = torch.zeros(1, 3, 1, 1, 1, device=displacement.device)
        unit[0, axis] = 1.0
        columns[axis] = columns[axis] + unit
    determinant = (columns[0] * torch.linalg.cross(columns[1], columns[2], dim=1)).sum(dim=1)
    return torch.relu(margin - determinant).mean()


def soft_dice(prediction: Tensor, truth: Tensor, mask: Tensor | None = None) -> Tensor:
    """1 - mean over images and channels of 2 sum(p t) / (sum p + sum t), for values in [0, 1] of (N,K,X,Y,Z).

    A channel that is empty in ``truth`` does not count; ``mask`` (N,1,X,Y,Z) leaves voxels out.
    """
    prediction, truth = prediction.float(), truth.float()
    if mask is not None:
        prediction, truth = prediction * mask, truth * mask
    overlap = (prediction * truth).sum(dim=(2, 3, 4))
    sizes = prediction.sum(dim=(2, 3, 4)) + truth.sum(dim=(2, 3, 4))
    counts = (truth.sum(dim=(2, 3, 4)) > 0).float()
    dice = (2.0 * overlap + 1e-3) / (sizes + 1e-3)
    return 1.0 - (dice * counts).sum() / counts.sum().clamp(min=1.0)


def tumor_regions(probabilities: Tensor) -> Tensor:
    """Whole tumour, core and enhancing tumour (N,3,X,Y,Z) from four-class probabilities (N,4,X,Y,Z)."""
    core = probabilities[:, 1] + probabilities[:, 3]
    return torch.stack([core + probabilities[:, 2], core, probabilities[:, 3]], dim=1)
