"""The paper's losses (Estienne et al. 2020, section 2.3) and those beyond it.

Images are (N,C,X,Y,Z), masks (N,1,X,Y,Z), labels (N,X,Y,Z) int64; every loss is (N,), one value an image by itself, in
FP32 whatever the autocast state. On a GPU all but mutual information leave the host free. Displacements are in voxels,
and so are their derivatives: on an isotropic grid of spacing s mm, squared first derivatives are those of the field in
mm, squared second derivatives s^2 times those.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional


def weighted_cross_entropy(logits: Tensor, labels: Tensor, class_weights: Tensor | None = None) -> Tensor:
    """Cross-entropy with one weight a class, the weighted mean over voxels.

    Voxels labelled -1 do not count; where none is known the loss is zero.
    """
    unlike = functional.cross_entropy(logits.float(), labels, class_weights, ignore_index=-1, reduction="none")
    weights = (labels >= 0).float()
    if class_weights is not None:
        weights = weights * class_weights[labels.clamp(min=0)]
    return unlike.sum(dim=(1, 2, 3)) / weights.sum(dim=(1, 2, 3)).clamp(min=1e-12)


def masked_mse(moved: Tensor, fixed: Tensor, mask: Tensor | None = None, present: Tensor | None = None) -> Tensor:
    """||mask (R - D)||^2, the mean over voxels and channels.

    ``mask`` multiplies the residual, as in the paper's L_reg*; it carries no gradient. ``present`` (N,C) in
    {0, 1} leaves out channels that one of the two images lacks.
    """
    residual = moved.float() - fixed.float()
    if mask is not None:
        residual = residual * mask.detach()
    return _over_channels(residual.square().mean(dim=(2, 3, 4)), present)


def _over_channels(values: Tensor, present: Tensor | None) -> Tensor:
    """The mean (N,) of (N,C) over the channels that are ``present``, 0 where none is."""
    if present is None:
        return values.mean(dim=1)
    return (values * present).sum(dim=1) / present.sum(dim=1).clamp(min=1.0)


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
    n, channels = moved.shape[:2]
    with torch.autocast(moved.device.type, enabled=False):
        image, other = moved.float().flatten(0, 1), fixed.float().flatten(0, 1)
        weight = image.new_ones(1, *image.shape[1:]) if mask is None else mask.detach().float()[:, 0]
        weight = weight.expand(n, -1, -1, -1)
        owner = torch.arange(n, device=moved.device).repeat_interleave(channels)
        kept = None
        # To know which channels are absent the host would have to wait for a GPU; there all are computed.
        if present is not None and moved.device.type == "cpu" and not bool(present.all()):
            kept = present.flatten().nonzero()[:, 0]
            if not kept.numel():
                return image.sum() * image.new_zeros(n)
            image, other, owner = image[kept], other[kept], owner[kept]
        inside = _window_sums(weight, window, stride).clamp(min=1e-3)[owner]
        wide = weight[owner]
        weighted, weighted_other = wide * image, wide * other
        mean = _window_sums(weighted, window, stride) / inside
        mean_other = _window_sums(weighted_other, window, stride) / inside
        variance = _window_sums(weighted * image, window, stride) / inside - mean.square()
        variance_other = _window_sums(weighted_other * other, window, stride) / inside - mean_other.square()
        covariance = _window_sums(weighted * other, window, stride) / inside - mean * mean_other
        scale = (variance.clamp(min=0.0) + epsilon) * (variance_other.clamp(min=0.0) + epsilon)
        counts = wide[:, ::stride, ::stride, ::stride] * (variance_other > epsilon)
        unlike = (counts * (1.0 - covariance.square() / scale)).sum(dim=(1, 2, 3))
        values = unlike / counts.sum(dim=(1, 2, 3)).clamp(min=1.0)
        if kept is not None:
            values = values.new_zeros(n * channels).index_copy(0, kept, values)
        return _over_channels(values.view(n, channels), present)


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
    generators: Sequence[torch.Generator] | None = None,
) -> Tensor:
    """Minus the mutual information (nats) of both images, by Gaussian Parzen windows, the mean over channels.

    Voxels: ``samples`` drawn by the image's own of ``generators`` (CPU) where ``mask`` is above 0.5 and not both images
    are zero. Each image's bins span its 0.5th to 99.5th percentile. ``present`` as in ``masked_mse``.
    """
    from monai.losses import GlobalMutualInformationLoss  # type: ignore[attr-defined]  # takes seconds to load

    with torch.autocast(moved.device.type, enabled=False):
        information = GlobalMutualInformationLoss(num_bins=bins).to(moved.device)
        results = []
        for n, (image, other) in enumerate(zip(moved.float(), fixed.float(), strict=True)):
            values = []
            for c in range(image.shape[0]):
                counts = (image[c].detach() != 0) | (other[c] != 0)
                if mask is not None:
                    counts &= mask[n, 0] > 0.5
                places = counts.flatten().nonzero()[:, 0]
                if places.numel() < 2 or (present is not None and not bool(present[n, c])):
                    continue
                if places.numel() > samples:
                    generator = None if generators is None else generators[n]
                    places = places[torch.randint(places.numel(), (samples,), generator=generator).to(places.device)]
                a, b = _to_unit_range(image[c].flatten()[places]), _to_unit_range(other[c].flatten()[places])
                values.append(information(a[None], b[None]))
            results.append(torch.stack(values).mean() if values else image.sum() * 0.0)
        return torch.stack(results)


def _to_unit_range(values: Tensor) -> Tensor:
    low, high = torch.quantile(values.detach(), values.new_tensor([0.005, 0.995]))
    scaled: Tensor = (values - low) / (high - low).clamp(min=1e-3)
    return scaled


def gradient_l1(gradients: Tensor, reduction: str = "sum") -> Tensor:
    """||Phi - 1||_1 of spatial gradients (N,3,X,Y,Z), summed over voxels (the paper's) or their ``mean``."""
    distance = (gradients.float() - 1.0).abs().flatten(1)
    return distance.sum(dim=1) if reduction == "sum" else distance.mean(dim=1)


def diffusion(displacement: Tensor) -> Tensor:
    """Mean squared forward difference of a displacement (N,3,X,Y,Z) in voxels along the three axes."""
    total = displacement.new_zeros(len(displacement))
    for axis in (2, 3, 4):
        total = total + _mean(displacement.diff(dim=axis).square())
    return total / 3.0


def tumor_rigidity(displacement: Tensor, tumor: Tensor) -> Tensor:
    """Mean squared forward difference of a displacement (N,3,X,Y,Z) in voxels where ``tumor`` (N,1,X,Y,Z) is 1, (N,).

    ``tumor`` is the moving image's, warped. The sum of its weights counts ten voxels more, so that a speck weighs less
    than a lesion and none gives 0. It holds a tumour's volume, as Dong et al. (2023, arXiv 2309.10153) do, and its
    shape.
    """
    total = displacement.new_zeros(len(displacement))
    for axis in (2, 3, 4):
        inside = tumor.narrow(axis, 0, tumor.shape[axis] - 1)
        squares = displacement.diff(dim=axis).square().mean(dim=1, keepdim=True)
        total = total + (squares * inside).sum(dim=(1, 2, 3, 4)) / (inside.sum(dim=(1, 2, 3, 4)) + 10.0)
    return total / 3.0


def _mean(values: Tensor) -> Tensor:
    """Over all but the images, (N,)."""
    return values.mean(dim=tuple(range(1, values.dim())))


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

    energy = u.new_zeros(len(u))
    for a in range(3):
        energy = energy + _mean((at((a, 1)) - 2.0 * at() + at((a, -1))).square())
        for b in range(a + 1, 3):
            mixed = at((a, 1), (b, 1)) - at((a, 1), (b, -1)) - at((a, -1), (b, 1)) + at((a, -1), (b, -1))
            energy = energy + 2.0 * _mean((mixed / 4.0).square())
    return energy


def inverse_consistency(displacement: Tensor, carried: Tensor) -> Tensor:
    """Mean square of u(x) + v(x + u(x)), voxels: zero where the map back undoes the map there.

    ``carried`` is the other direction's displacement v, sampled at x + u(x); both (N,3,X,Y,Z).
    """
    return _mean((displacement.float() + carried.float()).square())


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
    return _mean(torch.relu(margin - determinant))


def soft_dice(prediction: Tensor, truth: Tensor, mask: Tensor | None = None) -> Tensor:
    """1 - mean over channels of 2 sum(p t) / (sum p + sum t), for values in [0, 1] of (N,K,X,Y,Z).

    A channel that is empty in ``truth`` does not count; ``mask`` (N,1,X,Y,Z) leaves voxels out.
    """
    prediction, truth = prediction.float(), truth.float()
    if mask is not None:
        prediction, truth = prediction * mask, truth * mask
    overlap = (prediction * truth).sum(dim=(2, 3, 4))
    sizes = prediction.sum(dim=(2, 3, 4)) + truth.sum(dim=(2, 3, 4))
    counts = (truth.sum(dim=(2, 3, 4)) > 0).float()
    dice = (2.0 * overlap + 1e-3) / (sizes + 1e-3)
    return 1.0 - (dice * counts).sum(dim=1) / counts.sum(dim=1).clamp(min=1.0)


def tumor_regions(probabilities: Tensor) -> Tensor:
    """Whole tumour, core and enhancing tumour (N,3,X,Y,Z) from four-class probabilities (N,4,X,Y,Z)."""
    core = probabilities[:, 1] + probabilities[:, 3]
    return torch.stack([core + probabilities[:, 2], core, probabilities[:, 3]], dim=1)
