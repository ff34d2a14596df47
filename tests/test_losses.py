"""Each loss against its formula in numpy and float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from monai.losses import BendingEnergyLoss, LocalNormalizedCrossCorrelationLoss

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

Array = np.ndarray[Any, Any]
SHAPE = (4, 5, 3)


def normal(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*size, *SHAPE, generator=torch.Generator().manual_seed(seed))


def uniform(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*size, *SHAPE, generator=torch.Generator().manual_seed(seed))


def wide(tensor: torch.Tensor) -> Array:
    return tensor.detach().numpy().astype(np.float64)


def labels(classes: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, classes, (2, *SHAPE), generator=torch.Generator().manual_seed(seed))


def mean(values: torch.Tensor) -> float:
    """Of a loss's values, one an image."""
    assert values.dim() == 1 and values.dtype == torch.float32
    return float(values.detach().mean())


# Cross-entropy --------------------------------------------------------------------------------------------


def cross_entropy(logits: torch.Tensor, truth: torch.Tensor, weights: Array) -> float:
    """Image by image the weighted mean over voxels; the mean of these."""
    values = []
    for x, t in zip(wide(logits), truth.numpy(), strict=True):
        logs = x - np.log(np.exp(x).sum(axis=0, keepdims=True))
        total = weight = 0.0
        for place in np.ndindex(t.shape):
            if t[place] >= 0:
                total -= weights[t[place]] * logs[(t[place], *place)]
                weight += weights[t[place]]
        values.append(total / weight)
    return float(np.mean(values))


@pytest.mark.parametrize("weights", [None, (0.5, 2.0, 3.0, 1.0)])
def test_cross_entropy(weights: Any) -> None:
    logits, truth = normal(2, 4), labels(4)
    given = None if weights is None else torch.tensor(weights)
    expected = cross_entropy(logits, truth, np.ones(4) if weights is None else np.array(weights))
    assert mean(weighted_cross_entropy(logits, truth, given)) == pytest.approx(expected, rel=1e-5)


def test_cross_entropy_leaves_out_what_is_unknown() -> None:
    logits, truth = normal(2, 4), labels(4)
    truth[:, 1:3] = -1
    weights = torch.tensor([0.5, 2.0, 3.0, 1.0])
    got = mean(weighted_cross_entropy(logits, truth, weights))
    assert got == pytest.approx(cross_entropy(logits, truth, weights.numpy()), rel=1e-5)
    changed = logits.clone()
    changed[:, :, 1:3] += 10 * normal(2, 4, seed=1)[:, :, 1:3]
    assert mean(weighted_cross_entropy(changed, truth, weights)) == pytest.approx(got, rel=1e-6)


def test_cross_entropy_computes_in_float32() -> None:
    logits = normal(2, 4).bfloat16()
    assert mean(weighted_cross_entropy(logits, labels(4))) == pytest.approx(
        cross_entropy(logits.float(), labels(4), np.ones(4)), rel=1e-5
    )


def test_cross_entropy_of_nothing_known_is_zero() -> None:
    truth = torch.full((2, *SHAPE), -1)
    assert mean(weighted_cross_entropy(normal(2, 4), truth)) == 0.0


# Similarity -----------------------------------------------------------------------------------------------


def test_mse() -> None:
    moved, fixed = normal(2, 3), normal(2, 3, seed=1)
    assert mean(masked_mse(moved, fixed)) == pytest.approx(
        ((wide(moved) - wide(fixed)) ** 2).mean(), rel=1e-5
    )


def test_a_mask_multiplies_the_residual() -> None:
    moved, fixed, mask = normal(2, 3), normal(2, 3, seed=1), uniform(2, 1, seed=2)
    expected = ((wide(mask) * (wide(moved) - wide(fixed))) ** 2).mean()
    assert mean(masked_mse(moved, fixed, mask)) == pytest.approx(expected, rel=1e-5)


def test_absent_channels_do_not_count() -> None:
    moved, fixed, mask = normal(2, 3), normal(2, 3, seed=1), uniform(2, 1, seed=2)
    present = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]])
    squared = (wide(mask) * (wide(moved) - wide(fixed))) ** 2
    expected = np.mean([(squared[0, 0].mean() + squared[0, 2].mean()) / 2, squared[1, 2].mean()])
    assert mean(masked_mse(moved, fixed, mask, present)) == pytest.approx(expected, rel=1e-5)


def test_all_channels_present_is_the_plain_mean() -> None:
    moved, fixed = normal(2, 3), normal(2, 3, seed=1)
    plain = mean(masked_mse(moved, fixed))
    assert mean(masked_mse(moved, fixed, present=torch.ones(2, 3))) == pytest.approx(plain, rel=1e-5)


def test_no_common_channel_is_no_loss() -> None:
    assert mean(masked_mse(normal(2, 3), normal(2, 3, seed=1), present=torch.zeros(2, 3))) == 0.0


def test_no_gradient_passes_through_the_mask() -> None:
    moved, mask = normal(2, 3).requires_grad_(), uniform(2, 1, seed=2).requires_grad_()
    fixed = normal(2, 3, seed=1)
    masked_mse(moved, fixed, mask).mean().backward()
    assert mask.grad is None and moved.grad is not None
    expected = 2 * wide(mask) ** 2 * (wide(moved) - wide(fixed)) / moved.numel()
    np.testing.assert_allclose(moved.grad.numpy(), expected, atol=1e-6)


# Local correlation ----------------------------------------------------------------------------------------


def correlation_loss(
    moved: Array, fixed: Array, mask: Array, channels: list[tuple[int, int]], window: int, stride: int
) -> float:
    """Cube by cube, each cut out of the image; weights and moments as numpy's averages."""
    reach, values = window // 2, []
    for n, c in channels:
        total = weight = 0.0
        for centre in np.ndindex(*moved.shape[2:]):
            if any(i % stride for i in centre):
                continue
            cube = tuple(slice(max(0, i - reach), i + reach + 1) for i in centre)
            w, a, b = mask[n, 0][cube].ravel(), moved[n, c][cube].ravel(), fixed[n, c][cube].ravel()
            if w.sum() == 0:
                continue
            a, b = a - np.average(a, weights=w), b - np.average(b, weights=w)
            variances = [np.average(x * x, weights=w) for x in (a, b)]
            squared = np.average(a * b, weights=w) ** 2 / ((variances[0] + 1e-4) * (variances[1] + 1e-4))
            if variances[1] > 1e-4:
                total += mask[n, 0][centre] * (1.0 - squared)
                weight += mask[n, 0][centre]
        values.append((n, total / weight))
    images = {n for n, _ in values}
    return float(np.mean([np.mean([value for owner, value in values if owner == n]) for n in images]))


BOTH = [(n, c) for n in range(2) for c in range(3)]


@pytest.mark.parametrize(("window", "stride"), [(3, 1), (3, 2), (5, 1)])
def test_local_correlation(window: int, stride: int) -> None:
    moved, fixed = normal(2, 3), normal(2, 3, seed=1)
    expected = correlation_loss(wide(moved), wide(fixed), np.ones((2, 1, *SHAPE)), BOTH, window, stride)
    assert mean(local_ncc(moved, fixed, window=window, stride=stride)) == pytest.approx(expected, rel=1e-4)


def test_local_correlation_under_a_mask_and_without_absent_channels() -> None:
    moved, fixed, mask = normal(2, 3), normal(2, 3, seed=1), uniform(2, 1, seed=2)
    mask[0, 0, :2] = 0.0
    present = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]])
    for given, channels in ((None, BOTH), (present, [(0, 0), (0, 2), (1, 2)])):
        expected = correlation_loss(wide(moved), wide(fixed), wide(mask), channels, 3, 1)
        assert mean(local_ncc(moved, fixed, mask, given, window=3)) == pytest.approx(expected, rel=1e-3)
    nothing = local_ncc(moved.requires_grad_(), fixed, mask, torch.zeros(2, 3))
    assert mean(nothing) == 0.0 and nothing.requires_grad


def noise_in_air(seed: int) -> torch.Tensor:
    """Noise in the middle of nothing, so that no cube with noise in it reaches the border."""
    image = torch.zeros(1, 2, 22, 24, 20)
    image[..., 6:16, 6:18, 6:14] = torch.randn(1, 2, 10, 12, 8, generator=torch.Generator().manual_seed(seed))
    return image


def test_local_correlation_is_monais() -> None:
    a, b = noise_in_air(0), noise_in_air(1)
    fixed = b + 0.7 * a
    monai = LocalNormalizedCrossCorrelationLoss(kernel_size=5, smooth_dr=1e-5)(a, fixed)
    # MONAI's mean runs over all cubes, ours over those that hold some of the noise.
    share = (14 * 16 * 12) / (22 * 24 * 20)
    assert mean(local_ncc(a, fixed, window=5)) == pytest.approx(1.0 + float(monai) / share, abs=2e-3)


def test_local_correlation_does_not_see_contrast() -> None:
    image = noise_in_air(0)
    assert mean(local_ncc(-3.0 * image + 0.5, image)) < 5e-3
    assert mean(local_ncc(noise_in_air(1), image)) > 0.9


def test_what_the_mask_leaves_out_does_not_count_in_local_correlation() -> None:
    moved, fixed = noise_in_air(0).requires_grad_(), noise_in_air(1)
    mask = torch.ones(1, 1, 22, 24, 20)
    mask[..., 8:12, 8:12, 8:12] = 0.0
    loss = local_ncc(moved, fixed, mask)
    loss.backward()
    assert moved.grad is not None
    inside = moved.grad[..., 8:12, 8:12, 8:12]
    assert float(inside.abs().max()) == 0.0 < float(moved.grad.abs().max())
    changed = moved.detach().clone()
    changed[..., 8:12, 8:12, 8:12] += 5.0
    assert mean(local_ncc(changed, fixed, mask)) == pytest.approx(mean(loss), rel=1e-6)


@pytest.mark.parametrize("level", [0.0, -0.7, 300.0])
def test_constant_regions_have_finite_gradients(level: float) -> None:
    flat = torch.full((1, 2, 22, 24, 20), level)
    for moved, fixed in ((flat, noise_in_air(0) + level), (noise_in_air(0) + level, flat), (flat, flat)):
        given = moved.clone().requires_grad_()
        for loss in (local_ncc(given, fixed), mutual_information(given, fixed)):
            (gradient,) = torch.autograd.grad(loss, given)
            assert torch.isfinite(loss) and torch.isfinite(gradient).all()
            assert float(gradient.abs().max()) < 1.0


def test_similarities_compute_in_float32_under_autocast() -> None:
    moved, fixed = noise_in_air(0), noise_in_air(1) + noise_in_air(0)
    for loss in (local_ncc, mutual_information):
        plain = mean(loss(moved, fixed))
        with torch.autocast("cpu", torch.bfloat16):
            assert mean(loss(moved, fixed)) == plain


# Mutual information ---------------------------------------------------------------------------------------


def parzen_information(a: Array, b: Array, bins: int) -> float:
    """Mutual information of two samples under Gaussian windows of half a bin, their range that of 99 % of them."""
    weights = []
    for values in (a, b):
        low, high = np.quantile(values, [0.005, 0.995])
        scaled = np.clip((values - low) / (high - low), 0.0, 1.0)
        centres = np.linspace(0.0, 1.0, bins)
        w = np.exp(-((scaled[:, None] - centres) ** 2) / (2.0 * (0.5 / (bins - 1)) ** 2))
        weights.append(w / w.sum(axis=1, keepdims=True))
    joint = weights[0].T @ weights[1] / len(a)
    product = joint.sum(axis=1, keepdims=True) * joint.sum(axis=0, keepdims=True)
    there = joint > 1e-12
    return float((joint[there] * np.log(joint[there] / product[there])).sum())


def test_mutual_information() -> None:
    a = noise_in_air(0)
    b = torch.where(a != 0, (2.0 * a).sin() + 0.2 * noise_in_air(1), 0.0)
    mask = torch.ones(1, 1, 22, 24, 20)
    mask[..., :9, :, :] = 0.0
    for given in (None, mask):
        values = []
        for c in (0, 1):
            counts = wide(a)[0, c] != 0
            if given is not None:
                counts &= wide(given)[0, 0] > 0
            values.append(parzen_information(wide(a)[0, c][counts], wide(b)[0, c][counts], 16))
        got = mean(mutual_information(a, b, given, bins=16))
        assert got == pytest.approx(-np.mean(values), rel=1e-3)
    second = torch.tensor([[0.0, 1.0]])
    assert mean(mutual_information(a, b, mask, second, bins=16)) == pytest.approx(-values[1], rel=1e-3)
    assert mean(mutual_information(a, b, present=torch.zeros(1, 2))) == 0.0


def test_mutual_information_does_not_see_contrast() -> None:
    a, b = noise_in_air(0), noise_in_air(1)
    alike, inverted = mean(mutual_information(a, a)), mean(mutual_information(-2.0 * a, a))
    assert inverted == pytest.approx(alike, rel=1e-3)
    assert alike < -1.5 < -0.5 < mean(mutual_information(b, a))


def test_mutual_information_of_some_voxels() -> None:
    a = noise_in_air(0)
    b = a + 0.5 * noise_in_air(1)
    drawn = [
        mean(mutual_information(a, b, bins=8, samples=500, generators=[torch.Generator().manual_seed(seed)]))
        for seed in (0, 0, 1)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    assert drawn[0] == pytest.approx(mean(mutual_information(a, b, bins=8)), rel=0.2)


# Regularity -----------------------------------------------------------------------------------------------


def test_gradient_l1_is_a_sum_over_voxels_and_a_mean_over_images() -> None:
    phi = 2 * uniform(2, 3)
    distance = np.abs(wide(phi) - 1.0)
    assert mean(gradient_l1(phi)) == pytest.approx(distance[0].sum() / 2 + distance[1].sum() / 2, rel=1e-5)
    assert mean(gradient_l1(phi, "mean")) == pytest.approx(distance.mean(), rel=1e-5)
    assert mean(gradient_l1(torch.ones(1, 3, *SHAPE))) == 0.0


def test_diffusion() -> None:
    field = 3 * normal(2, 3)
    u = wide(field)
    expected = np.mean([(np.diff(u, axis=axis) ** 2).mean() for axis in (2, 3, 4)])
    assert mean(diffusion(field)) == pytest.approx(expected, rel=1e-5)


def test_diffusion_of_simple_fields() -> None:
    grid = torch.tensor(np.indices(SHAPE), dtype=torch.float32)[None]
    assert mean(diffusion(torch.full((1, 3, *SHAPE), 7.0))) == 0.0
    # u_x = 2 x: along x the square is 4 in one of three components, along y and z nothing.
    stretch = torch.zeros_like(grid)
    stretch[:, 0] = 2 * grid[:, 0]
    assert mean(diffusion(stretch)) == pytest.approx(4.0 / 3.0 / 3.0, rel=1e-6)


def test_tumor_rigidity() -> None:
    field, tumor = 3 * normal(2, 3), uniform(2, 1, seed=1)
    u, w = wide(field), wide(tumor)
    expected = np.zeros(2)
    for axis in (2, 3, 4):
        squares = (np.diff(u, axis=axis) ** 2).mean(axis=1)
        inside = np.take(w[:, 0], range(u.shape[axis] - 1), axis=axis - 1)
        expected += (squares * inside).sum(axis=(1, 2, 3)) / (inside.sum(axis=(1, 2, 3)) + 10.0) / 3.0
    np.testing.assert_allclose(tumor_rigidity(field, tumor).numpy(), expected, rtol=1e-5)


def test_tumor_rigidity_sees_the_tumour_alone() -> None:
    """0 without one, and where it is merely moved while everything beside it is stretched; as diffusion everywhere."""
    grid = torch.tensor(np.indices(SHAPE), dtype=torch.float32)[None]
    stretched = 5.0 + 2.0 * (grid[:, :1] - 2.0).clamp(min=0.0).expand(-1, 3, -1, -1, -1)
    tumor = (grid[:, :1] < 2).float()
    assert mean(tumor_rigidity(stretched, tumor)) == 0.0 < mean(diffusion(stretched))
    assert mean(tumor_rigidity(stretched, torch.zeros_like(tumor))) == 0.0
    field = 3 * normal(1, 3)
    assert mean(tumor_rigidity(field, 1e6 * torch.ones_like(tumor))) == pytest.approx(mean(diffusion(field)), rel=1e-4)


@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence")
def test_bending_energy_is_monais() -> None:
    field = 3 * normal(2, 3)
    assert mean(bending_energy(field)) == pytest.approx(float(BendingEnergyLoss()(field)), rel=1e-5)


def test_bending_energy_of_simple_fields() -> None:
    x = torch.tensor(np.indices(SHAPE), dtype=torch.float32)[None]
    field = torch.zeros_like(x)
    assert mean(bending_energy(2.0 * x + 3.0)) == 0.0
    # u_x = x^2 / 2: one second derivative of 1 in one of three components.
    field[:, 0] = x[:, 0] ** 2 / 2
    assert mean(bending_energy(field)) == pytest.approx(1.0 / 3.0, rel=1e-6)
    # u_z = x y: the mixed one, counted twice.
    field[:, 0], field[:, 2] = 0.0, x[:, 0] * x[:, 1]
    assert mean(bending_energy(field)) == pytest.approx(2.0 / 3.0, rel=1e-6)


def test_inverse_consistency() -> None:
    there, back = normal(2, 3), normal(2, 3, seed=1)
    assert mean(inverse_consistency(there, -there)) == 0.0
    assert mean(inverse_consistency(there, back)) == pytest.approx(
        ((wide(there) + wide(back)) ** 2).mean(), rel=1e-5
    )


def fold_loss(u: Array, margin: float) -> float:
    """Voxel by voxel: the determinant of the 3x3 matrix of forward differences of x + u."""
    values = []
    for n in range(u.shape[0]):
        for i, j, k in np.ndindex(*(side - 1 for side in u.shape[2:])):
            here = u[n, :, i, j, k]
            steps = [u[n, :, i + 1, j, k] - here, u[n, :, i, j + 1, k] - here, u[n, :, i, j, k + 1] - here]
            values.append(max(0.0, margin - float(np.linalg.det(np.eye(3) + np.stack(steps, axis=1)))))
    return float(np.mean(values))


@pytest.mark.parametrize("margin", [0.1, 0.5])
def test_folding(margin: float) -> None:
    field = 0.6 * normal(2, 3)
    expected = fold_loss(wide(field), margin)
    assert expected > 0.01
    assert mean(folding(field, margin)) == pytest.approx(expected, rel=1e-4)


def test_folding_of_simple_fields() -> None:
    x = torch.tensor(np.indices(SHAPE), dtype=torch.float32)[None]
    mirrored, squeezed = torch.zeros_like(x), torch.zeros_like(x)
    mirrored[:, 0], squeezed[:, 1] = -2.0 * x[:, 0], -0.95 * x[:, 1]
    assert mean(folding(torch.zeros_like(x))) == 0.0
    assert mean(folding(0.3 * x)) == 0.0
    assert mean(folding(mirrored)) == pytest.approx(1.1, rel=1e-5)
    assert mean(folding(squeezed)) == pytest.approx(0.05, rel=1e-3)


def test_folding_is_mended_by_its_gradient() -> None:
    field = (0.6 * normal(1, 3)).requires_grad_()
    before = folding(field)
    before.backward()
    assert field.grad is not None
    assert mean(folding(field - 0.1 * field.grad / field.grad.abs().max())) < mean(before)


# Dice -----------------------------------------------------------------------------------------------------


def dice_loss(prediction: Array, truth: Array, mask: Array | None = None) -> float:
    """1 - the mean Dice over the channels that truth has, the mean over images."""
    images = []
    for n in range(prediction.shape[0]):
        values = []
        for k in range(prediction.shape[1]):
            weight = 1.0 if mask is None else mask[n, 0]
            p, t = prediction[n, k] * weight, truth[n, k] * weight
            if t.sum() > 0:
                values.append(2 * (p * t).sum() / (p.sum() + t.sum()))
        images.append(1.0 - np.mean(values))
    return float(np.mean(images))


def blocks(seed: int = 3) -> torch.Tensor:
    return (uniform(2, 3, seed=seed) > 0.5).float()


def test_dice() -> None:
    prediction, truth = uniform(2, 3), blocks()
    expected = dice_loss(wide(prediction), wide(truth))
    assert mean(soft_dice(prediction, truth)) == pytest.approx(expected, abs=1e-4)


def test_dice_of_equal_and_of_disjoint_sets() -> None:
    truth = blocks()
    assert mean(soft_dice(truth, truth)) == pytest.approx(0.0, abs=1e-4)
    assert mean(soft_dice(1 - truth, truth)) == pytest.approx(1.0, abs=1e-3)


def test_dice_leaves_out_channels_that_truth_lacks() -> None:
    prediction, truth = uniform(2, 3), blocks()
    truth[0, 1], truth[1, 2] = 0.0, 0.0
    got = mean(soft_dice(prediction, truth))
    assert got == pytest.approx(dice_loss(wide(prediction), wide(truth)), abs=1e-4)
    other = prediction.clone()
    other[0, 1] = 1.0
    assert mean(soft_dice(other, truth)) == got


def test_dice_under_a_mask() -> None:
    prediction, truth, mask = uniform(2, 3), blocks(), (uniform(2, 1, seed=4) > 0.4).float()
    expected = dice_loss(wide(prediction), wide(truth), wide(mask))
    assert mean(soft_dice(prediction, truth, mask)) == pytest.approx(expected, abs=1e-4)
    assert abs(expected - dice_loss(wide(prediction), wide(truth))) > 1e-3


def test_dice_of_nothing_has_no_gradient() -> None:
    prediction = uniform(1, 3).requires_grad_()
    loss = soft_dice(prediction, torch.zeros(1, 3, *SHAPE))
    loss.backward()
    assert torch.isfinite(loss) and prediction.grad is not None
    assert float(prediction.grad.abs().max()) == 0.0


# Image by image -------------------------------------------------------------------------------------------


def test_an_image_does_not_weigh_its_neighbours() -> None:
    """The values of three images together are those of each alone, whatever the others lack."""
    moved, fixed, mask = normal(3, 2), normal(3, 2, seed=1), uniform(3, 1, seed=2)
    present = torch.tensor([[1.0, 1.0], [0.0, 1.0], [0.0, 0.0]])
    field, back, logits = 0.5 * normal(3, 3, seed=3), 0.5 * normal(3, 3, seed=4), normal(3, 4, seed=5)
    truth = torch.cat([labels(4), torch.full((1, *SHAPE), -1)])
    truth[1, 2:] = -1
    regions = (uniform(3, 3, seed=6) > 0.5).float()
    regions[1, 0] = 0.0
    weights = torch.tensor([0.5, 2.0, 3.0, 1.0])

    def values(part: slice) -> dict[str, torch.Tensor]:
        generators = [torch.Generator().manual_seed(n) for n in range(3)[part]]
        pair = moved[part], fixed[part], mask[part], present[part]
        return {
            "cross-entropy": weighted_cross_entropy(logits[part], truth[part], weights),
            "mse": masked_mse(*pair),
            "lncc": local_ncc(*pair, window=3),
            "mi": mutual_information(*pair, bins=8, samples=20, generators=generators),
            "gradient": gradient_l1(field[part]),
            "diffusion": diffusion(field[part]),
            "bending": bending_energy(field[part]),
            "folding": folding(field[part]),
            "rigidity": tumor_rigidity(field[part], mask[part]),
            "inverse": inverse_consistency(field[part], back[part]),
            "dice": soft_dice(uniform(3, 3)[part], regions[part], mask[part]),
        }

    together = values(slice(0, 3))
    for n in range(3):
        for name, alone in values(slice(n, n + 1)).items():
            assert together[name].shape == (3,)
            torch.testing.assert_close(together[name][n : n + 1], alone, rtol=1e-5, atol=1e-6)
    assert float(together["cross-entropy"][2]) == float(together["lncc"][2]) == float(together["mi"][2]) == 0.0


# Regions --------------------------------------------------------------------------------------------------


def test_regions_of_labels() -> None:
    truth = labels(4, seed=5)
    onehot = torch.stack([(truth == k).float() for k in range(4)], dim=1)
    t = truth.numpy()
    got = tumor_regions(onehot).numpy()
    assert got.shape == (2, 3, *SHAPE)
    np.testing.assert_array_equal(got[:, 0], t > 0)
    np.testing.assert_array_equal(got[:, 1], (t == 1) | (t == 3))
    np.testing.assert_array_equal(got[:, 2], t == 3)


def test_regions_of_probabilities() -> None:
    p = torch.softmax(normal(2, 4), dim=1)
    w = wide(p)
    expected = np.stack([1.0 - w[:, 0], w[:, 1] + w[:, 3], w[:, 3]], axis=1)
    np.testing.assert_allclose(tumor_regions(p).numpy(), expected, atol=1e-6)
