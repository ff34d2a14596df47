"""Each loss against its formula in numpy and float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from jrs.models.losses import (
    diffusion,
    folding,
    gradient_l1,
    masked_mse,
    soft_dice,
    tumor_regions,
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


def scalar(value: torch.Tensor) -> float:
    assert value.shape == () and value.dtype == torch.float32
    return float(value.detach())


# Cross-entropy --------------------------------------------------------------------------------------------


def cross_entropy(logits: torch.Tensor, truth: torch.Tensor, weights: Array) -> float:
    x, t = wide(logits), truth.numpy()
    logs = x - np.log(np.exp(x).sum(axis=1, keepdims=True))
    total = weight = 0.0
    for place in np.ndindex(t.shape):
        if t[place] >= 0:
            total -= weights[t[place]] * logs[(place[0], t[place], *place[1:])]
            weight += weights[t[place]]
    return total / weight


@pytest.mark.parametrize("weights", [None, (0.5, 2.0, 3.0, 1.0)])
def test_cross_entropy(weights: Any) -> None:
    logits, truth = normal(2, 4), labels(4)
    given = None if weights is None else torch.tensor(weights)
    expected = cross_entropy(logits, truth, np.ones(4) if weights is None else np.array(weights))
    assert scalar(weighted_cross_entropy(logits, truth, given)) == pytest.approx(expected, rel=1e-5)


def test_cross_entropy_leaves_out_what_is_unknown() -> None:
    logits, truth = normal(2, 4), labels(4)
    truth[:, 1:3] = -1
    weights = torch.tensor([0.5, 2.0, 3.0, 1.0])
    got = scalar(weighted_cross_entropy(logits, truth, weights))
    assert got == pytest.approx(cross_entropy(logits, truth, weights.numpy()), rel=1e-5)
    changed = logits.clone()
    changed[:, :, 1:3] += 10 * normal(2, 4, seed=1)[:, :, 1:3]
    assert scalar(weighted_cross_entropy(changed, truth, weights)) == pytest.approx(got, rel=1e-6)


def test_cross_entropy_computes_in_float32() -> None:
    logits = normal(2, 4).bfloat16()
    assert scalar(weighted_cross_entropy(logits, labels(4))) == pytest.approx(
        cross_entropy(logits.float(), labels(4), np.ones(4)), rel=1e-5
    )


def test_cross_entropy_of_nothing_known_is_zero() -> None:
    truth = torch.full((2, *SHAPE), -1)
    assert scalar(weighted_cross_entropy(normal(2, 4), truth)) == 0.0


# Similarity -----------------------------------------------------------------------------------------------


def test_mse() -> None:
    moved, fixed = normal(2, 3), normal(2, 3, seed=1)
    assert scalar(masked_mse(moved, fixed)) == pytest.approx(
        ((wide(moved) - wide(fixed)) ** 2).mean(), rel=1e-5
    )


def test_a_mask_multiplies_the_residual() -> None:
    moved, fixed, mask = normal(2, 3), normal(2, 3, seed=1), uniform(2, 1, seed=2)
    expected = ((wide(mask) * (wide(moved) - wide(fixed))) ** 2).mean()
    assert scalar(masked_mse(moved, fixed, mask)) == pytest.approx(expected, rel=1e-5)


def test_absent_channels_do_not_count() -> None:
    moved, fixed, mask = normal(2, 3), normal(2, 3, seed=1), uniform(2, 1, seed=2)
    present = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]])
    squared = (wide(mask) * (wide(moved) - wide(fixed))) ** 2
    expected = np.mean([squared[0, 0].mean(), squared[0, 2].mean(), squared[1, 2].mean()])
    assert scalar(masked_mse(moved, fixed, mask, present)) == pytest.approx(expected, rel=1e-5)


def test_all_channels_present_is_the_plain_mean() -> None:
    moved, fixed = normal(2, 3), normal(2, 3, seed=1)
    plain = scalar(masked_mse(moved, fixed))
    assert scalar(masked_mse(moved, fixed, present=torch.ones(2, 3))) == pytest.approx(plain, rel=1e-5)


def test_no_common_channel_is_no_loss() -> None:
    assert scalar(masked_mse(normal(2, 3), normal(2, 3, seed=1), present=torch.zeros(2, 3))) == 0.0


def test_no_gradient_passes_through_the_mask() -> None:
    moved, mask = normal(2, 3).requires_grad_(), uniform(2, 1, seed=2).requires_grad_()
    fixed = normal(2, 3, seed=1)
    masked_mse(moved, fixed, mask).backward()
    assert mask.grad is None and moved.grad is not None
    expected = 2 * wide(mask) ** 2 * (wide(moved) - wide(fixed)) / moved.numel()
    np.testing.assert_allclose(moved.grad.numpy(), expected, atol=1e-6)


# Regularity -----------------------------------------------------------------------------------------------


def test_gradient_l1_is_a_sum_over_voxels_and_a_mean_over_images() -> None:
    phi = 2 * uniform(2, 3)
    distance = np.abs(wide(phi) - 1.0)
    assert scalar(gradient_l1(phi)) == pytest.approx(distance[0].sum() / 2 + distance[1].sum() / 2, rel=1e-5)
    assert scalar(gradient_l1(phi, "mean")) == pytest.approx(distance.mean(), rel=1e-5)
    assert scalar(gradient_l1(torch.ones(1, 3, *SHAPE))) == 0.0


def test_diffusion() -> None:
    field = 3 * normal(2, 3)
    u = wide(field)
    expected = np.mean([(np.diff(u, axis=axis) ** 2).mean() for axis in (2, 3, 4)])
    assert scalar(diffusion(field)) == pytest.approx(expected, rel=1e-5)


def test_diffusion_of_simple_fields() -> None:
    grid = torch.tensor(np.indices(SHAPE), dtype=torch.float32)[None]
    assert scalar(diffusion(torch.full((1, 3, *SHAPE), 7.0))) == 0.0
    # u_x = 2 x: along x the square is 4 in one of three components, along y and z nothing.
    stretch = torch.zeros_like(grid)
    stretch[:, 0] = 2 * grid[:, 0]
    assert scalar(diffusion(stretch)) == pytest.approx(4.0 / 3.0 / 3.0, rel=1e-6)


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
    assert scalar(folding(field, margin)) == pytest.approx(expected, rel=1e-4)


def test_folding_of_simple_fields() -> None:
    x = torch.tensor(np.indices(SHAPE), dtype=torch.float32)[None]
    mirrored, squeezed = torch.zeros_like(x), torch.zeros_like(x)
    mirrored[:, 0], squeezed[:, 1] = -2.0 * x[:, 0], -0.95 * x[:, 1]
    assert scalar(folding(torch.zeros_like(x))) == 0.0
    assert scalar(folding(0.3 * x)) == 0.0
    assert scalar(folding(mirrored)) == pytest.approx(1.1, rel=1e-5)
    assert scalar(folding(squeezed)) == pytest.approx(0.05, rel=1e-3)


def test_folding_is_mended_by_its_gradient() -> None:
    field = (0.6 * normal(1, 3)).requires_grad_()
    before = folding(field)
    before.backward()
    assert field.grad is not None
    assert scalar(folding(field - 0.1 * field.grad / field.grad.abs().max())) < scalar(before)


# Dice -----------------------------------------------------------------------------------------------------


def dice_loss(prediction: Array, truth: Array, mask: Array | None = None) -> float:
    """1 - the mean Dice over images and channels that truth has."""
    values = []
    for n in range(prediction.shape[0]):
        for k in range(prediction.shape[1]):
            weight = 1.0 if mask is None else mask[n, 0]
            p, t = prediction[n, k] * weight, truth[n, k] * weight
            if t.sum() > 0:
                values.append(2 * (p * t).sum() / (p.sum() + t.sum()))
    return 1.0 - float(np.mean(values))


def blocks(seed: int = 3) -> torch.Tensor:
    return (uniform(2, 3, seed=seed) > 0.5).float()


def test_dice() -> None:
    prediction, truth = uniform(2, 3), blocks()
    expected = dice_loss(wide(prediction), wide(truth))
    assert scalar(soft_dice(prediction, truth)) == pytest.approx(expected, abs=1e-4)


def test_dice_of_equal_and_of_disjoint_sets() -> None:
    truth = blocks()
    assert scalar(soft_dice(truth, truth)) == pytest.approx(0.0, abs=1e-4)
    assert scalar(soft_dice(1 - truth, truth)) == pytest.approx(1.0, abs=1e-3)


def test_dice_leaves_out_channels_that_truth_lacks() -> None:
    prediction, truth = uniform(2, 3), blocks()
    truth[0, 1], truth[1, 2] = 0.0, 0.0
    got = scalar(soft_dice(prediction, truth))
    assert got == pytest.approx(dice_loss(wide(prediction), wide(truth)), abs=1e-4)
    other = prediction.clone()
    other[0, 1] = 1.0
    assert scalar(soft_dice(other, truth)) == got


def test_dice_under_a_mask() -> None:
    prediction, truth, mask = uniform(2, 3), blocks(), (uniform(2, 1, seed=4) > 0.4).float()
    expected = dice_loss(wide(prediction), wide(truth), wide(mask))
    assert scalar(soft_dice(prediction, truth, mask)) == pytest.approx(expected, abs=1e-4)
    assert abs(expected - dice_loss(wide(prediction), wide(truth))) > 1e-3


def test_dice_of_nothing_has_no_gradient() -> None:
    prediction = uniform(1, 3).requires_grad_()
    loss = soft_dice(prediction, torch.zeros(1, 3, *SHAPE))
    loss.backward()
    assert torch.isfinite(loss) and prediction.grad is not None
    assert float(prediction.grad.abs().max()) == 0.0


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
