"""``torch.ops.jrs.grid_sample_3d`` against numpy, SimpleITK and torch's own sampler."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from jrs.models.grid_sample import grid_sample_3d

Array = np.ndarray[Any, Any]

# Volume and target sizes, no two alike.
SIZES = [((6, 7, 8), (4, 5, 3)), ((9, 3, 5), (2, 6, 7)), ((2, 16, 4), (16, 1, 2))]


def trilinear(volume: Array, coords: Array) -> Array:
    """(N,C,D,H,W) at (N,3,...) in float64 by the definition: eight corners, indices clamped to the border."""
    volume, coords = volume.astype(np.float64), coords.astype(np.float64)
    out = np.zeros((*volume.shape[:2], *coords.shape[2:]))
    for n in range(volume.shape[0]):
        inside = [np.clip(coords[n, axis], 0, size - 1) for axis, size in enumerate(volume.shape[2:])]
        lower = [np.floor(c).astype(int) for c in inside]
        for corner in itertools.product((0, 1), repeat=3):
            weight, index = np.ones(coords.shape[2:]), []
            for axis, step in enumerate(corner):
                fraction = inside[axis] - lower[axis]
                weight = weight * (fraction if step else 1.0 - fraction)
                index.append(np.minimum(lower[axis] + step, volume.shape[2 + axis] - 1))
            out[n] += weight * volume[n][:, index[0], index[1], index[2]]
    return out


def random(
    size: tuple[int, int, int], target: tuple[int, int, int], margin: float = 0.0, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Two volumes of three channels, and points in them or up to ``margin`` voxels outside."""
    generator = torch.Generator().manual_seed(seed)
    volume = torch.randn(2, 3, *size, generator=generator)
    extent = torch.tensor([n - 1.0 for n in size]).view(1, 3, 1, 1, 1)
    coords = torch.rand(2, 3, *target, generator=generator) * (extent + 2 * margin) - margin
    return volume, coords


def sample(volume: torch.Tensor, coords: torch.Tensor) -> Array:
    result = torch.ops.jrs.grid_sample_3d(volume, coords)
    return result.detach().numpy()


# Values ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "target"), SIZES)
@pytest.mark.parametrize("margin", [0.0, 3.0, 1000.0])
def test_against_the_definition(size: Any, target: Any, margin: float) -> None:
    volume, coords = random(size, target, margin)
    got = sample(volume, coords)
    assert got.shape == (2, 3, *target) and got.dtype == np.float32
    np.testing.assert_allclose(got, trilinear(volume.numpy(), coords.numpy()), atol=2e-5)


@pytest.mark.parametrize(("size", "target"), SIZES)
def test_against_torchs_sampler(size: Any, target: Any) -> None:
    volume, coords = random(size, target, 2.0, seed=1)
    # torch wants -1..1, the last array axis first.
    unit = [2.0 * coords[:, axis] / (size[axis] - 1) - 1.0 for axis in (2, 1, 0)]
    expected = functional.grid_sample(
        volume, torch.stack(unit, dim=-1), mode="bilinear", padding_mode="border", align_corners=True
    )
    np.testing.assert_allclose(sample(volume, coords), expected.numpy(), atol=1e-5)


def test_against_simpleitk_at_points_inside() -> None:
    sitk = pytest.importorskip("SimpleITK")
    volume, coords = random((7, 9, 6), (3, 4, 5), seed=2)
    got = sample(volume[:1], coords[:1])
    for channel in range(3):
        # SimpleITK takes arrays z, y, x and points x, y, z.
        image = sitk.GetImageFromArray(volume[0, channel].numpy().transpose(2, 1, 0).copy())
        for place in itertools.product(range(3), range(4), range(5)):
            point = [float(coords[0, axis][place]) for axis in range(3)]
            expected = image.EvaluateAtContinuousIndex(point, sitk.sitkLinear)
            assert got[0, channel][place] == pytest.approx(expected, abs=1e-5)


def test_whole_indices_give_the_voxels_themselves() -> None:
    volume, _ = random((5, 4, 3), (1, 1, 1))
    identity = torch.tensor(np.indices((5, 4, 3)), dtype=torch.float32).expand(2, 3, 5, 4, 3)
    np.testing.assert_allclose(sample(volume, identity), volume.numpy(), atol=1e-6)


@pytest.mark.parametrize("size", [(1, 5, 6), (5, 1, 6), (5, 6, 1), (1, 1, 4), (1, 1, 1)])
def test_an_axis_of_one_voxel_repeats_it(size: Any) -> None:
    volume, coords = random(size, (3, 2, 4), 2.0, seed=3)
    got = sample(volume, coords)
    assert np.isfinite(got).all()
    np.testing.assert_allclose(got, trilinear(volume.numpy(), coords.numpy()), atol=1e-5)


def test_outside_is_the_nearest_border_voxel() -> None:
    volume = torch.arange(24, dtype=torch.float32).view(1, 1, 2, 3, 4)
    points = {(-5, -5, -5): 0.0, (9, 9, 9): 23.0, (-1, 1, 99): 7.0, (0, -0.4, 1): 1.0, (1.6, 2.4, 3.2): 23.0}
    coords = torch.tensor(list(points), dtype=torch.float32).T.reshape(1, 3, len(points), 1, 1)
    np.testing.assert_allclose(sample(volume, coords).ravel(), list(points.values()), atol=1e-5)


def test_channel_i_is_array_axis_i() -> None:
    ramps = torch.tensor(np.indices((4, 5, 6)), dtype=torch.float32)[None]
    point = torch.tensor([1.25, 3.5, 0.75]).view(1, 3, 1, 1, 1)
    np.testing.assert_allclose(sample(ramps, point).ravel(), [1.25, 3.5, 0.75], atol=1e-5)


def test_a_volume_laid_out_channels_last() -> None:
    volume, coords = random((4, 5, 6), (3, 3, 3))
    laid = volume.to(memory_format=torch.channels_last_3d)
    assert not laid.is_contiguous()
    result = grid_sample_3d(laid, coords)
    assert result.is_contiguous()
    np.testing.assert_allclose(result.numpy(), sample(volume, coords), atol=1e-6)


def test_each_image_of_a_batch_has_its_own_points() -> None:
    volume, coords = random((4, 5, 6), (3, 3, 3))
    both = sample(volume, coords)
    assert np.abs(both[0] - both[1]).max() > 0.1
    for n in range(2):
        np.testing.assert_allclose(sample(volume[n : n + 1], coords[n : n + 1])[0], both[n], atol=1e-6)


# Gradients ------------------------------------------------------------------------------------------------


def off_the_lattice(size: tuple[int, int, int], target: tuple[int, int, int]) -> torch.Tensor:
    """Points away from whole indices, where the derivative jumps; some lie outside."""
    generator = torch.Generator().manual_seed(4)
    whole = torch.stack([torch.randint(-1, n, target, generator=generator) for n in size])
    return (whole + 0.2 + 0.6 * torch.rand(3, *target, generator=generator))[None]


def test_gradients_against_finite_differences() -> None:
    volume = torch.randn(1, 2, 3, 4, 2, generator=torch.Generator().manual_seed(5)).double()
    coords = off_the_lattice((3, 4, 2), (2, 2, 2)).double()
    outside = (coords < 0).any() and (coords[:, 0] > 2).any()
    assert outside, "the points must reach beyond the border"
    assert torch.autograd.gradcheck(grid_sample_3d, (volume.requires_grad_(), coords.requires_grad_()))


def test_gradient_of_the_points_against_numpy() -> None:
    volume, coords = random((5, 6, 4), (3, 2, 2), 0.0, seed=6)
    coords = (coords.floor() + 0.5).clamp(min=0.5, max=2.5)
    weight = torch.randn(2, 3, 3, 2, 2, generator=torch.Generator().manual_seed(7))
    leaf = coords.clone().requires_grad_()
    (grid_sample_3d(volume, leaf) * weight).sum().backward()
    step = 0.25  # trilinear is linear between whole indices, so any step inside the cell is exact
    for axis in range(3):
        move = np.zeros((1, 3, 1, 1, 1))
        move[0, axis] = step
        ahead, behind = (trilinear(volume.numpy(), coords.numpy() + sign * move) for sign in (1, -1))
        expected = ((ahead - behind) / (2 * step) * weight.numpy()).sum(axis=1)
        assert leaf.grad is not None
        np.testing.assert_allclose(leaf.grad[:, axis].numpy(), expected, atol=1e-4)


def test_gradient_of_the_volume_is_the_weights_of_the_corners() -> None:
    volume = torch.zeros(1, 1, 4, 4, 4, requires_grad=True)
    point = torch.tensor([1.25, 2.5, 0.0]).view(1, 3, 1, 1, 1)
    grid_sample_3d(volume, point).sum().backward()
    expected = np.zeros((4, 4, 4))
    expected[1, 2:4, 0], expected[2, 2:4, 0] = 0.375, 0.125
    assert volume.grad is not None
    np.testing.assert_allclose(volume.grad[0, 0].numpy(), expected, atol=1e-6)


def test_beyond_the_border_the_points_have_no_gradient() -> None:
    ramp = torch.tensor(np.indices((4, 5, 6)).sum(axis=0), dtype=torch.float32)[None, None]
    coords = torch.tensor([-2.0, 2.5, 9.0]).view(1, 3, 1, 1, 1).requires_grad_()
    grid_sample_3d(ramp, coords).sum().backward()
    assert coords.grad is not None
    np.testing.assert_allclose(coords.grad.ravel().numpy(), [0.0, 1.0, 0.0], atol=1e-5)


@pytest.mark.parametrize(("of_volume", "of_coords"), [(True, False), (False, True), (False, False)])
def test_only_the_gradients_asked_for(of_volume: bool, of_coords: bool) -> None:
    volume, coords = random((4, 5, 6), (3, 3, 3))
    result = grid_sample_3d(volume.requires_grad_(of_volume), coords.requires_grad_(of_coords))
    assert result.requires_grad is (of_volume or of_coords)
    if result.requires_grad:
        result.square().sum().backward()
    assert (volume.grad is not None) is of_volume
    assert (coords.grad is not None) is of_coords


# As an operator of torch ----------------------------------------------------------------------------------


@pytest.mark.parametrize("with_gradient", [False, True])
def test_opcheck(with_gradient: bool) -> None:
    volume, coords = random((3, 4, 5), (2, 3, 2))
    torch.library.opcheck(
        torch.ops.jrs.grid_sample_3d.default,
        (volume.requires_grad_(with_gradient), coords.requires_grad_(with_gradient)),
    )


def test_shapes_are_known_without_values() -> None:
    volume, coords = torch.empty(2, 5, 6, 7, 8, device="meta"), torch.empty(2, 3, 4, 3, 2, device="meta")
    assert torch.ops.jrs.grid_sample_3d(volume, coords).shape == (2, 5, 4, 3, 2)


def test_a_grid_of_other_than_three_channels_is_refused() -> None:
    with pytest.raises(RuntimeError):
        grid_sample_3d(torch.zeros(1, 1, 4, 4, 4), torch.zeros(1, 2, 4, 4, 4))
