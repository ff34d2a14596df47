"""The paper's losses (Estienne et al. 2020, section 2.3) and those beyond it.

Images are (N,C,X,Y,Z), masks (N,1,X,Y,Z), labels (N,X,Y,Z) int64; every loss is a scalar in FP32, whatever the
autocast state. Displacements are in voxels, and so are their derivatives: on an isotropic grid of spacing s mm,
squared first derivatives are those of the field in mm, squared second derivatives s^2 times those.
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


def local_ncc(
    moved: Tensor,
    fixed: Tensor,
    mask: Tensor | None = None,
    present: Tensor | None = None,
    window: int = 9,
    stride: int = 1,
    epsilon: float = 1e-4,
) -> Tensor:
    """1 - the mean squared correlation of both images within cubes of ``window`` voxels, a value in [0, 1].

    Mean, variance and covariance within a cube are weighted by ``mask`` (no gradient), and so is the mean over
    cubes, by the mask at their centres: what the mask leaves out counts neither in the middle of a cube nor at
    its edge. Cubes without structure in the fixed image do not count; ``epsilon`` is added to both variances.
    ``stride`` takes every so many-th cube along each axis, at an eighth of the work for 2; each voxel is still in
    (window / stride)^3 of them. ``present`` as in ``masked_mse``. Without mask and stride this is one more than
    ``monai.losses.LocalNormalizedCrossCorrelationLoss`` up to the grid's border, where cubes are cut, not padded.
    """
    with torch.autocast(moved.device.type, enabled=False):
        image, other, weight = _present_channels(moved, fixed, mask, present)
        if image.shape[0] == 0:
            return moved.float().sum() * 0.0
        inside = _window_sums(weight, window, stride).clamp(min=1e-3)
        weighted, weighted_other = weight * image, weight * other
        mean = _window_sums(weighted, window, stride) / inside
        mean_other = _window_sums(weighted_other, window, stride) / inside
        variance = _window_sums(weighted * image, window, stride) / inside - mean.square()
        variance_other = _window_sums(weighted_other * other, window, stride) / inside - mean_other.square()
        covariance = _window_sums(weighted * other, window, stride) / inside - mean * mean_other
        scale = (variance.clamp(min=0.0) + epsilon) * (variance_other.clamp(min=0.0) + epsilon)
        counts = weight[:, ::stride, ::stride, ::stride] * (variance_other > epsilon)
        unlike = (counts * (1.0 - covariance.square() / scale)).sum(dim=(1, 2, 3))
        return (unlike / counts.sum(dim=(1, 2, 3)).clamp(min=1.0)).mean()


def _present_channels(
    moved: Tensor, fixed: Tensor, mask: Tensor | None, present: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The channels that count, one after the other: both images (P,X,Y,Z), and weights (P,X,Y,Z) or (1,X,Y,Z)."""
    channels = moved.shape[1]
    image, other = moved.float().flatten(0, 1), fixed.float().flatten(0, 1)
    weight = image.new_ones(1, *image.shape[1:]) if mask is None else mask.detach().float()[:, 0]
    if weight.shape[0] > 1:
        weight = weight.repeat_interleave(channels, dim=0)
    if present is not None and not bool(present.all()):
        kept = present.flatten().nonzero()[:, 0]
        image, other = image[kept], other[kept]
        if weight.shape[0] > 1:
            weight = weight[kept]
    return image.contiguous(), other.contiguous(), weight.contiguous()


def _window_sums(volumes: Tensor, window: int, stride: int) -> Tensor:
    """Sums over cubes around every ``stride``-th voxel of (P,X,Y,Z), cut at the border.

    Three products with banded matrices: on a CPU several times faster than pooling or convolutions, and the
    gradient is as cheap.
    """
    p, x, y, z = volumes.shape
    along_x, along_y, along_z = (_band(n, window, stride, volumes) for n in (x, y, z))
    sums = torch.matmul(along_x, volumes.reshape(p, x, y * z)).reshape(p, -1, y, z)
    return torch.matmul(torch.matmul(along_y, sums), along_z.T)


def _band(n: int, window: int, stride: int, like: Tensor) -> Tensor:
    place = torch.arange(n, device=like.device)
    return ((place[::stride, None] - place).abs() <= window // 2).to(like.dtype)


def mutual_information(
    moved: Tensor,
    fixed: Tensor,
    mask: Tensor | None = None,
    present: Tensor | None = None,
    bins: int = 32,
    samples: int = 65536,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Minus the mutual information (nats) of both images, by Gaussian Parzen windows, the mean over channels.

    Voxels: ``samples`` drawn by ``generator`` (CPU) where ``mask`` is above 0.5 and not both images are zero.
    Each image's bins span its 0.5th to 99.5th percentile. ``present`` as in ``masked_mse``.
    """
    from monai.losses import GlobalMutualInformationLoss  # type: ignore[attr-defined]  # takes seconds to load

    with torch.autocast(moved.device.type, enabled=False):
        information = GlobalMutualInformationLoss(num_bins=bins).to(moved.device)
        image, other, weight = _present_channels(moved, fixed, mask, present)
        values = []
        for p in range(image.shape[0]):
            counts = (weight[p % weight.shape[0]] > 0.5) & ((image[p].detach() != 0) | (other[p] != 0))
            places = counts.flatten().nonzero()[:, 0]
            if places.numel() < 2:
                continue
            if places.numel() > samples:
                drawn = torch.randint(places.numel(), (samples,), generator=generator)
                places = places[drawn.to(places.device)]
            a, b = _to_unit_range(image[p].flatten()[places]), _to_unit_range(other[p].flatten()[places])
            values.append(information(a[None], b[None]))
        total: Tensor = torch.stack(values).mean() if values else moved.float().sum() * 0.0
        return total


def _to_unit_range(values: Tensor) -> Tensor:
    low, high = torch.quantile(values.detach(), values.new_tensor([0.005, 0.995]))
    scaled: Tensor = (values - low) / (high - low).clamp(min=1e-3)
    return scaled


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


def bending_energy(displacement: Tensor) -> Tensor:
    """Mean over voxels and components of the squared second derivatives of u (N,3,X,Y,Z) in voxels, mixed ones twice.

    By central differences over the inner voxels; zero for every affine map. The value of MONAI's
    ``BendingEnergyLoss``, which indexes tensors in a way that PyTorch is about to drop.
    """
    u = displacement.float()
    inner = [slice(1, -1)] * 3

    def at(*steps: tuple[int, int]) -> Tensor:
        """The inner voxels' neighbours, so many steps away along those axes."""
        place = list(inner)
        for axis, step in steps:
            place[axis] = slice(1 + step, u.shape[2 + axis] - 1 + step)
        return u[(slice(None), slice(None), *place)]

    energy = u.new_zeros(())
    for a in range(3):
        energy = energy + (at((a, 1)) - 2.0 * at() + at((a, -1))).square().mean()
        for b in range(a + 1, 3):
            mixed = at((a, 1), (b, 1)) - at((a, 1), (b, -1)) - at((a, -1), (b, 1)) + at((a, -1), (b, -1))
            energy = energy + 2.0 * (mixed / 4.0).square().mean()
    return energy


def inverse_consistency(displacement: Tensor, carried: Tensor) -> Tensor:
    """Mean square of u(x) + v(x + u(x)), voxels: zero where the map back undoes the map there.

    ``carried`` is the other direction's displacement v, sampled at x + u(x); both (N,3,X,Y,Z).
    """
    return (displacement.float() + carried.float()).square().mean()


def folding(displacement: Tensor, margin: float = 0.1) -> Tensor:
    """Mean over voxels of max(0, margin - det d(x + u)/dx), by forward differences of u (N,3,X,Y,Z) in voxels.

    Zero wherever the map keeps its orientation with some room; elsewhere it grows with the depth of the fold.
    """
    inner = displacement[:, :, :-1, :-1, :-1]
    a, d, g = (displacement[:, :, 1:, :-1, :-1] - inner).unbind(1)
    b, e, h = (displacement[:, :, :-1, 1:, :-1] - inner).unbind(1)
    c, f, i = (displacement[:, :, :-1, :-1, 1:] - inner).unbind(1)
    a, e, i = a + 1.0, e + 1.0, i + 1.0
    # Written out, component by component: less than half the time of a cross product, forwards and backwards.
    determinant = a * (e * i - f * h) - b * (d * i - f * g) + c * (d * h - e * g)
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
