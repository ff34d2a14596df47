"""The spatial transformer against its equations, written in numpy and float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from jrs.models.spatial import coordinates, displacement, identity_coords, spatial_gradients, warp

Array = np.ndarray[Any, Any]
HEADS = ("gradient", "potential", "displacement")
SHAPE = (6, 9, 5)


def random_flow(scale: float = 1.0, seed: int = 0, shape: tuple[int, int, int] = SHAPE) -> torch.Tensor:
    return scale * torch.randn(2, 3, *shape, generator=torch.Generator().manual_seed(seed))


def identity(shape: tuple[int, ...] = SHAPE) -> Array:
    return np.indices(shape).astype(np.float64)


def sigmoid(x: Array) -> Array:
    return 1.0 / (1.0 + np.exp(-x))


def own_axis(field: Array, function: Any) -> Array:
    """Apply ``function(array, axis)`` to channel i along spatial axis i of (N,3,X,Y,Z)."""
    return np.stack([function(field[:, i], i + 1) for i in range(3)], axis=1)


def difference(array: Array, axis: int) -> Array:
    return np.diff(array, axis=axis, prepend=0.0)


def expected_gradients(flow: torch.Tensor, head: str) -> Array:
    v = flow.numpy().astype(np.float64)
    if head == "gradient":
        return 2.0 * sigmoid(v)
    slopes = own_axis(v, difference)
    return 2.0 * sigmoid(2.0 * slopes) if head == "potential" else 1.0 + slopes


def expected_coordinates(flow: torch.Tensor, head: str, origin: int) -> Array:
    if head == "displacement":
        return identity(tuple(flow.shape[2:])) + flow.numpy().astype(np.float64) + origin
    return own_axis(expected_gradients(flow, head), lambda a, axis: np.cumsum(a, axis=axis)) - 1.0 + origin


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("origin", [0, 1])
def test_coordinates_by_their_equations(head: Any, origin: int) -> None:
    flow = random_flow()
    got = coordinates(flow, head, origin)
    assert got.shape == flow.shape and got.dtype == torch.float32
    np.testing.assert_allclose(got.numpy(), expected_coordinates(flow, head, origin), atol=1e-5)


@pytest.mark.parametrize("head", HEADS)
def test_gradients_by_their_equations(head: Any) -> None:
    flow = random_flow(seed=1)
    got = spatial_gradients(flow, head)
    assert got.dtype == torch.float32
    np.testing.assert_allclose(got.numpy(), expected_gradients(flow, head), atol=1e-5)


@pytest.mark.parametrize("head", ("gradient", "potential"))
def test_gradients_are_differences_of_the_coordinates(head: Any) -> None:
    flow = random_flow(seed=2)
    coords = coordinates(flow, head).double().numpy()
    steps = own_axis(coords, lambda a, axis: np.diff(a, axis=axis, prepend=-1.0))
    np.testing.assert_allclose(steps, spatial_gradients(flow, head).numpy(), atol=1e-5)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("origin", [0, 1])
def test_no_flow_is_the_identity(head: Any, origin: int) -> None:
    flow = torch.zeros(1, 3, *SHAPE)
    np.testing.assert_array_equal(coordinates(flow, head, origin)[0].numpy(), identity() + origin)
    np.testing.assert_array_equal(spatial_gradients(flow, head).numpy(), np.ones((1, 3, *SHAPE)))


def test_a_small_potential_is_a_displacement() -> None:
    flow = random_flow(0.02, seed=3)
    got = coordinates(flow, "potential").double().numpy()
    # 2 sigmoid(2 d) = 1 + tanh(d) = 1 + d - d^3 / 3 ..., summed over at most nine voxels.
    bound = 9 * np.abs(own_axis(flow.double().numpy(), difference)).max() ** 3 / 3 + 1e-5
    assert bound < 0.01
    np.testing.assert_allclose(got, identity() + flow.numpy(), atol=bound)


def test_a_large_potential_is_not() -> None:
    flow = torch.full((1, 3, *SHAPE), -5.0)
    got = coordinates(flow, "potential")
    # The first step is 2 sigmoid(-10), all others are 1: the border cannot be left far behind.
    np.testing.assert_allclose(got[0].numpy(), identity() - 1.0 + 2.0 * sigmoid(np.array(-10.0)), atol=1e-5)


# Beyond these a float32 coordinate stands still, no more.
@pytest.mark.parametrize(("head", "bound"), [("gradient", 6.0), ("potential", 1.5)])
def test_every_coordinate_increases_along_its_own_axis(head: Any, bound: float) -> None:
    flow = bound * torch.tanh(random_flow(3.0, seed=4, shape=(16, 16, 16)))
    coords = coordinates(flow, head)
    phi = spatial_gradients(flow, head)
    assert float(phi.min()) > 0.0 and float(phi.max()) < 2.0
    for axis in range(3):
        assert float(coords[:, axis].diff(dim=axis + 1).min()) > 0.0
    # The other axes are free: this flow folds.
    assert float(coords[:, 0].diff(dim=2).min()) < 0.0


def test_a_displacement_head_promises_nothing() -> None:
    coords = coordinates(random_flow(4.0, seed=4), "displacement")
    assert float(coords[:, 0].diff(dim=1).min()) < 0.0


def test_the_sum_over_a_long_line_stays_exact() -> None:
    flow = random_flow(1.0, seed=5, shape=(256, 1, 2))
    np.testing.assert_allclose(
        coordinates(flow, "gradient").numpy(), expected_coordinates(flow, "gradient", 0), atol=1e-3
    )


@pytest.mark.parametrize("head", HEADS)
def test_autocast_changes_nothing(head: Any) -> None:
    flow = random_flow(seed=6)
    with torch.autocast("cpu", torch.bfloat16):
        got = coordinates(flow, head)
    assert got.dtype == torch.float32
    np.testing.assert_array_equal(got.numpy(), coordinates(flow, head).numpy())


@pytest.mark.parametrize("head", HEADS)
def test_a_flow_of_half_precision_is_integrated_in_float32(head: Any) -> None:
    flow = random_flow(seed=7).bfloat16()
    got = coordinates(flow, head)
    assert got.dtype == torch.float32
    np.testing.assert_allclose(got.numpy(), expected_coordinates(flow.float(), head, 0), atol=1e-5)


@pytest.mark.parametrize("head", HEADS)
def test_coordinates_have_a_gradient(head: Any) -> None:
    flow = random_flow(seed=8, shape=(2, 3, 2)).requires_grad_()
    weight = random_flow(seed=9, shape=(2, 3, 2))
    (coordinates(flow, head) * weight).sum().backward()
    assert flow.grad is not None
    plain, step = flow.detach(), 1e-3
    for place in [(0, 0, 0, 0, 0), (1, 1, 1, 2, 1), (0, 2, 1, 1, 1)]:
        values = []
        for sign in (1, -1):
            moved = plain.clone()
            moved[place] += sign * step
            values.append((expected_coordinates(moved, head, 0) * weight.numpy()).sum())
        assert float(flow.grad[place]) == pytest.approx((values[0] - values[1]) / (2 * step), abs=2e-3)


@pytest.mark.parametrize("origin", [0, 1])
def test_identity_coords(origin: int) -> None:
    got = identity_coords(torch.ones(2, 3, *SHAPE), origin)
    assert got.dtype == torch.float32
    np.testing.assert_array_equal(got.numpy(), np.stack([identity() + origin] * 2))


def test_displacement_is_what_differs_from_the_index() -> None:
    coords = random_flow(20.0, seed=10)
    np.testing.assert_allclose(displacement(coords).numpy(), coords.numpy() - identity(), atol=1e-5)
    # An origin of one is part of the displacement: it moves the image.
    shifted = displacement(coordinates(torch.zeros(1, 3, *SHAPE), "gradient", 1))
    np.testing.assert_array_equal(shifted.numpy(), np.ones((1, 3, *SHAPE)))


def test_warp_moves_an_image_by_whole_voxels() -> None:
    image = torch.randn(1, 2, *SHAPE, generator=torch.Generator().manual_seed(11))
    flow = torch.zeros(1, 3, *SHAPE)
    flow[:, 0], flow[:, 1], flow[:, 2] = 2.0, -1.0, 1.0
    got = warp(image, coordinates(flow, "displacement")).numpy()
    padded = np.pad(image.numpy(), ((0, 0), (0, 0), (2, 2), (2, 2), (2, 2)), mode="edge")
    expected = padded[:, :, 4 : 4 + SHAPE[0], 1 : 1 + SHAPE[1], 3 : 3 + SHAPE[2]]
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_warp_between_voxels_is_their_mean() -> None:
    image = torch.randn(1, 1, *SHAPE, generator=torch.Generator().manual_seed(12))
    flow = torch.zeros(1, 3, *SHAPE)
    flow[:, 1] = 0.5
    got = warp(image, coordinates(flow, "displacement")).numpy()
    data = image.numpy()
    np.testing.assert_allclose(got[:, :, :, :-1], (data[:, :, :, :-1] + data[:, :, :, 1:]) / 2, atol=1e-5)
    np.testing.assert_allclose(got[:, :, :, -1], data[:, :, :, -1], atol=1e-6)


def test_warp_computes_in_float32() -> None:
    image = torch.randn(1, 1, *SHAPE, generator=torch.Generator().manual_seed(13)).bfloat16()
    got = warp(image, coordinates(torch.zeros(1, 3, *SHAPE), "gradient"))
    assert got.dtype == torch.float32
    np.testing.assert_allclose(got.numpy(), image.float().numpy(), atol=1e-6)
