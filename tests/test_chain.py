"""Chains of affines and fields against closed forms, scipy and SimpleITK; inverses and their residuals."""

from __future__ import annotations

from typing import Any

import nibabel as nib
import numpy as np
import pytest

from jrs.fields import DisplacementField, jacobian_determinant
from jrs.geometry import Geometry
from jrs.runtime import sampling
from jrs.runtime.chain import Chain, composed
from jrs.runtime.inversion import InverseField
from jrs.transforms import Affine

pytestmark = pytest.mark.usefixtures("kernels")
SHAPE = (26, 24, 22)


def bend(points: np.ndarray) -> np.ndarray:
    """A smooth displacement of RAS points (..., 3) along all three axes, gradients up to 0.35."""
    x, y, z = np.moveaxis(points, -1, 0)
    return np.stack(
        [5 * np.sin(0.05 * y + 0.3), 4 * np.cos(0.06 * z - 0.02 * x), 6 * np.sin(0.04 * x + 0.05 * y)], axis=-1
    )


@pytest.fixture
def grid(helpers: Any) -> Geometry:
    """Oblique, anisotropic, LAS."""
    return Geometry(SHAPE, helpers.grid_affine(SHAPE, (3.0, 4.0, 3.5), "LAS", (8, -12, 15), (4, -6, 9)))


@pytest.fixture
def affine(helpers: Any) -> Affine:
    return Affine.of_parts(helpers.rotation((35, -20, 15)) @ np.diag([1.1, 0.9, 1.2]), (50, -30, 20))


def world(grid: Geometry, helpers: Any) -> np.ndarray:
    """(n,3) RAS mm of every voxel."""
    return helpers.world_points(grid.affine, grid.shape).reshape(3, -1).T


def field_of(grid: Geometry, helpers: Any, function: Any) -> DisplacementField:
    points = world(grid, helpers)
    vectors = (function(points) - points).T.reshape(3, *grid.shape)
    return DisplacementField(vectors.astype(np.float32), grid)


def inner(grid: Geometry, count: int = 300) -> np.ndarray:
    """Random points well inside a grid."""
    voxels = np.random.default_rng(0).uniform(0.25, 0.75, (count, 3)) * (np.array(grid.shape) - 1)
    return nib.affines.apply_affine(grid.affine, voxels)


# Affines --------------------------------------------------------------------------------------------------


def test_affines_compose_and_invert(affine: Affine) -> None:
    points = np.random.default_rng(1).uniform(-90, 90, (20, 3))
    other = Affine.of_parts(np.diag([2.0, -1.0, 0.5]), (1, 2, 3))
    np.testing.assert_allclose((other @ affine).points(points), other.points(affine.points(points)), atol=1e-9)
    np.testing.assert_allclose(affine.inverse().points(affine.points(points)), points, atol=1e-9)
    assert affine.determinant == pytest.approx(1.1 * 0.9 * 1.2)
    with pytest.raises(ValueError, match="read-only"):
        affine.matrix[0, 0] = 1.0


@pytest.mark.parametrize("matrix", [np.eye(3), np.ones((4, 4)), np.diag([1, 1, 1, 2.0])])
def test_what_is_no_affine_is_refused(matrix: np.ndarray) -> None:
    with pytest.raises(ValueError, match="4x4"):
        Affine(matrix)


def test_neighbouring_affines_become_one(affine: Affine) -> None:
    chain = Chain((affine, affine, affine.inverse()))
    assert chain.affine is not None
    np.testing.assert_allclose(chain.affine.matrix, affine.matrix, atol=1e-9)
    identity = Chain(()).affine
    assert identity is not None and np.array_equal(identity.matrix, np.eye(4))


# Forward --------------------------------------------------------------------------------------------------


def test_steps_act_in_their_order(grid: Geometry, affine: Affine, helpers: Any) -> None:
    field = field_of(grid, helpers, lambda p: p + bend(p))
    points = inner(grid)
    # Up to what trilinear interpolation loses on 4 mm voxels.
    np.testing.assert_allclose(Chain((field, affine)).points(points), affine.points(points + bend(points)), atol=0.06)
    before = affine.inverse().points(points)
    got = Chain((affine, field)).points(before)
    np.testing.assert_allclose(got, points + bend(points), atol=0.06)
    split = composed([Chain((affine,)), Chain((field,))])
    np.testing.assert_allclose(split.points(before), got, atol=1e-6)
    np.testing.assert_allclose(Chain((affine,)).then(Chain((field,))).points(before), got, atol=1e-6)


def test_dense_is_the_chain_at_every_voxel(
    grid: Geometry, affine: Affine, helpers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    field = field_of(grid, helpers, lambda p: p + bend(p))
    shape = (9, 10, 8)
    target = Geometry(shape, helpers.grid_affine(shape, (3.0, 3.0, 4.0), "PIR", (5, 5, 5), tuple(grid.center)))
    for chain in (Chain((field, affine)), Chain((Affine.of_parts(np.eye(3), (2, 1, 3)), field)), Chain((affine,))):
        points = world(target, helpers)
        dense = chain.dense(target)
        np.testing.assert_allclose(dense.vectors_mm.reshape(3, -1).T, chain.points(points) - points, atol=1e-4)
        monkeypatch.setattr(sampling, "_SLAB_VOXELS", 200)
        np.testing.assert_allclose(chain.dense(target).vectors_mm, dense.vectors_mm, atol=1e-4)
        monkeypatch.undo()


def test_a_chain_is_simpleitks_composite(grid: Geometry, affine: Affine, helpers: Any) -> None:
    """The field too where it ends: zero outside its grid."""
    sitk = pytest.importorskip("SimpleITK")
    field = field_of(grid, helpers, lambda p: p + bend(p))
    lps = helpers.sitk_image(np.zeros(SHAPE), grid.affine)
    image = sitk.GetImageFromArray(
        np.moveaxis(field.vectors_mm.astype(np.float64), 0, -1).transpose(2, 1, 0, 3) * [-1, -1, 1], isVector=True
    )
    image.CopyInformation(lps)
    flip = np.diag([-1.0, -1.0, 1.0, 1.0])
    matrix = flip @ affine.matrix @ flip
    composite = sitk.CompositeTransform(
        [
            sitk.AffineTransform(matrix[:3, :3].ravel().tolist(), matrix[:3, 3].tolist()),
            sitk.DisplacementFieldTransform(image),
        ]
    )
    points = grid.center + np.random.default_rng(3).uniform(-70, 70, (400, 3))
    want = np.array([composite.TransformPoint(p) for p in (points * [-1, -1, 1]).tolist()]) * [-1, -1, 1]
    np.testing.assert_allclose(Chain((field, affine)).points(points), want, atol=1e-3)
    outside = np.abs(affine.points(points) - want).max(axis=1) < 1e-9
    assert 0.1 < outside.mean() < 0.9


def test_the_jacobian_of_a_chain_is_the_product(grid: Geometry, affine: Affine, helpers: Any) -> None:
    field = field_of(grid, helpers, lambda p: p + bend(p))
    total = jacobian_determinant(Chain((field, affine)).dense(grid))
    np.testing.assert_allclose(total, affine.determinant * jacobian_determinant(field), atol=1e-3)


# Back -----------------------------------------------------------------------------------------------------


def test_the_inverse_of_a_field_in_closed_form(grid: Geometry, helpers: Any) -> None:
    """x -> x + a sin(y / b) along x alone: the inverse takes the same away."""

    def shear(points: np.ndarray) -> np.ndarray:
        moved = points.copy()
        moved[:, 0] += 7.0 * np.sin(points[:, 1] / 20.0)
        return moved

    points = inner(grid)
    back = Chain((field_of(grid, helpers, shear),)).inverse()
    want = points.copy()
    want[:, 0] -= 7.0 * np.sin(points[:, 1] / 20.0)
    np.testing.assert_allclose(back.points(points), want, atol=0.06)  # 4 mm voxels
    assert back.residuals[0].points == 300 and back.residuals[0].largest_mm < 2e-3


def test_a_total_field_with_a_large_affine_in_it_is_inverted(grid: Geometry, affine: Affine, helpers: Any) -> None:
    """Rotated by more than 40 degrees and shifted by 60 mm: y itself lies outside the field's grid."""
    field = field_of(grid, helpers, lambda p: affine.points(p + bend(p)))
    x = inner(grid)
    forward = Chain((field,))
    back = forward.inverse()
    y = forward.points(x)
    np.testing.assert_allclose(back.points(y), x, atol=2e-3)
    assert back.residuals[0].unsolved == 0
    # And where interpolation does not matter: an affine as a field, everywhere, also beyond the grid.
    alone = Chain((field_of(grid, helpers, affine.points),)).inverse()
    far = np.random.default_rng(4).uniform(-200, 200, (100, 3))
    np.testing.assert_allclose(alone.points(far), affine.inverse().points(far), atol=2e-3)


def test_the_inverse_of_a_chain_leads_back(grid: Geometry, affine: Affine, helpers: Any) -> None:
    chain = Chain((field_of(grid, helpers, lambda p: p + bend(p)), affine))
    x = inner(grid)
    inverse = chain.inverse()
    np.testing.assert_allclose(inverse.points(chain.points(x)), x, atol=2e-3)
    again = inverse.inverse()
    np.testing.assert_allclose(again.points(x), chain.points(x), atol=1e-4)
    assert not any(isinstance(step, InverseField) for step in again.steps)


def test_the_inverse_agrees_with_simpleitks(grid: Geometry, helpers: Any) -> None:
    sitk = pytest.importorskip("SimpleITK")
    field = field_of(grid, helpers, lambda p: p + bend(p))
    image = sitk.GetImageFromArray(
        np.moveaxis(field.vectors_mm.astype(np.float64), 0, -1).transpose(2, 1, 0, 3) * [-1, -1, 1], isVector=True
    )
    image.CopyInformation(helpers.sitk_image(np.zeros(SHAPE), grid.affine))
    inverse = sitk.InvertDisplacementField(
        image, maximumNumberOfIterations=100, maxErrorToleranceThreshold=1e-4, meanErrorToleranceThreshold=1e-5
    )
    theirs = sitk.DisplacementFieldTransform(sitk.Cast(inverse, sitk.sitkVectorFloat64))
    points = inner(grid)
    want = np.array([theirs.TransformPoint(p) for p in (points * [-1, -1, 1]).tolist()]) * [-1, -1, 1]
    got = Chain((field,)).inverse().points(points)
    # Theirs is interpolated between the voxels of 4 mm.
    assert np.abs(got - want).max() < 0.15
    assert np.abs(got - points).max() > 5.0


def test_a_fold_has_an_answer_and_says_how_far_it_is_off(grid: Geometry, helpers: Any) -> None:
    def folding(points: np.ndarray) -> np.ndarray:
        moved = points.copy()
        moved[:, 0] -= 1.8 * 8.0 * np.sin(points[:, 0] / 8.0)
        return moved

    def far(points: np.ndarray) -> np.ndarray:
        """Half of the grid is thrown away: nothing maps to where it was."""
        return points + np.where(points[:, :1] > grid.center[0], 60.0, 0.0)

    for function in (folding, far):
        back = Chain((field_of(grid, helpers, function),)).inverse()
        got = back.points(inner(grid))
        assert np.isfinite(got).all()
    assert back.residuals[0].unsolved > 0 and back.residuals[0].largest_mm > 0.5
