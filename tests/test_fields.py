"""Determinants against analytic fields, and how a field is continued beyond its grid."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from jrs.fields import DisplacementField, jacobian_determinant
from jrs.geometry import Geometry

SHAPE = (13, 11, 9)


@pytest.fixture
def grid(helpers: Any) -> Geometry:
    """Oblique, anisotropic, LAS."""
    return Geometry(SHAPE, helpers.grid_affine(SHAPE, (1.5, 2.0, 3.0), "LAS", (12, -20, 30), (5, -7, 11)))


def field_of(grid: Geometry, vectors: np.ndarray) -> DisplacementField:
    return DisplacementField(np.ascontiguousarray(vectors, dtype=np.float32), grid)


# The field itself -----------------------------------------------------------------------------------------


def test_a_field_is_read_only_and_fits_its_grid(grid: Geometry) -> None:
    vectors = np.zeros((3, *SHAPE), dtype=np.float32)
    field = DisplacementField(vectors, grid)
    with pytest.raises(ValueError, match="read-only"):
        field.vectors_mm[0, 0, 0, 0] = 1.0
    vectors[0, 0, 0, 0] = 2.0  # the caller's own array stays writable
    with pytest.raises(ValueError, match="do not fit"):
        DisplacementField(np.zeros((*SHAPE, 3), dtype=np.float32), grid)
    with pytest.raises(ValueError, match="do not fit"):
        DisplacementField(np.zeros((3, 13, 11, 8), dtype=np.float32), grid)


def test_from_voxels_moves_a_voxel_as_its_index_moves(grid: Geometry) -> None:
    steps = np.random.default_rng(0).normal(size=(3, *SHAPE)).astype(np.float32)
    field = DisplacementField.from_voxels(steps, grid)
    index = np.indices(SHAPE)
    moved = np.einsum("wi,ixyz->wxyz", grid.affine[:3, :3], index + steps)
    here = np.einsum("wi,ixyz->wxyz", grid.affine[:3, :3], index)
    assert field.vectors_mm.dtype == np.float32
    np.testing.assert_allclose(field.vectors_mm, moved - here, atol=1e-5)


# Determinants ---------------------------------------------------------------------------------------------


def test_of_the_identity_it_is_one(grid: Geometry) -> None:
    determinant = jacobian_determinant(field_of(grid, np.zeros((3, *SHAPE))))
    assert determinant.dtype == np.float32 and determinant.shape == SHAPE
    np.testing.assert_allclose(determinant, 1.0, atol=1e-5)


def test_of_a_translation_it_is_one(grid: Geometry) -> None:
    vectors = np.broadcast_to(np.array([30.0, -20.0, 5.0]).reshape(3, 1, 1, 1), (3, *SHAPE))
    np.testing.assert_allclose(jacobian_determinant(field_of(grid, vectors)), 1.0, atol=1e-5)


@pytest.mark.parametrize(
    "matrix",
    [
        np.diag([1.2, 0.9, 1.1]),
        np.array([[1.1, 0.2, -0.1], [0.05, 0.9, 0.3], [-0.2, 0.1, 1.05]]),
        np.diag([0.3, 1.0, 1.0]),
        np.diag([-0.5, 1.0, 1.0]),
    ],
    ids=["scaling", "general", "squeeze", "mirror"],
)
def test_of_an_affine_map_it_is_the_matrix_determinant(grid: Geometry, helpers: Any, matrix: np.ndarray) -> None:
    points = helpers.world_points(grid.affine, SHAPE)
    vectors = np.einsum("ij,jxyz->ixyz", matrix - np.eye(3), points) + 3.0
    determinant = jacobian_determinant(field_of(grid, vectors))
    # At the border too: one-sided differences of a linear map are exact.
    np.testing.assert_allclose(determinant, np.linalg.det(matrix), atol=2e-4)


def test_of_a_rotation_it_is_one(grid: Geometry, helpers: Any) -> None:
    points = helpers.world_points(grid.affine, SHAPE)
    vectors = np.einsum("ij,jxyz->ixyz", helpers.rotation((20, 10, -30)) - np.eye(3), points)
    np.testing.assert_allclose(jacobian_determinant(field_of(grid, vectors)), 1.0, atol=2e-4)


def test_of_a_quadratic_map_it_is_exact_inside(grid: Geometry, helpers: Any) -> None:
    """d_i(x) = x'Q_i x + B x: central differences of a quadratic are its derivative, det(I + 2 Q x + B)."""
    rng = np.random.default_rng(1)
    q = rng.normal(scale=6e-3, size=(3, 3, 3))
    q = (q + q.transpose(0, 2, 1)) / 2
    b = rng.normal(scale=0.05, size=(3, 3))
    points = helpers.world_points(grid.affine, SHAPE) - grid.center.reshape(3, 1, 1, 1)
    vectors = np.einsum("jxyz,ijk,kxyz->ixyz", points, q, points) + np.einsum("ij,jxyz->ixyz", b, points)
    jacobian = np.eye(3) + b + 2 * np.einsum("ijk,kxyz->xyzij", q, points)
    want = np.linalg.det(jacobian)
    got = jacobian_determinant(field_of(grid, vectors))
    assert want.max() - want.min() > 0.2
    inner = (slice(1, -1),) * 3
    np.testing.assert_allclose(got[inner], want[inner], atol=2e-4)
    # Half a voxel off at the border, where the differences are one-sided.
    assert np.abs(got - want).max() < 0.3


@pytest.mark.parametrize("rows", [1, 2, 3, 12, 13, 100])
def test_slab_seams_do_not_show(grid: Geometry, rows: int) -> None:
    vectors = np.random.default_rng(2).normal(size=(3, *SHAPE))
    field = field_of(grid, vectors)
    # One slab, in float64 by hand.
    steps = np.stack(np.gradient(vectors.astype(np.float32).astype(np.float64), axis=(1, 2, 3)), axis=1)
    jacobian = np.moveaxis(steps, (0, 1), (-2, -1)) @ np.linalg.inv(grid.affine[:3, :3]) + np.eye(3)
    np.testing.assert_allclose(jacobian_determinant(field, rows), np.linalg.det(jacobian), atol=1e-4)
    np.testing.assert_array_equal(jacobian_determinant(field, rows), jacobian_determinant(field, 16))


def test_where_a_field_folds_it_is_negative(grid: Geometry, helpers: Any) -> None:
    """d = -1.8 mm * a sin(x/a) along x: dx'/dx = 1 - 1.8 cos(x/a) changes its sign at cos = 1/1.8."""
    a = 6.0
    points = helpers.world_points(grid.affine, SHAPE)
    vectors = np.zeros((3, *SHAPE))
    vectors[0] = -1.8 * a * np.sin(points[0] / a)
    want = 1.0 - 1.8 * np.cos(points[0] / a)
    got = jacobian_determinant(field_of(grid, vectors))
    inner = (slice(1, -1),) * 3
    clear = np.abs(want[inner]) > 0.25
    assert (want[inner] < 0).any() and (want[inner] > 0).any()
    np.testing.assert_array_equal((got[inner] < 0)[clear], (want[inner] < 0)[clear])
    assert got.min() < -0.5


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_along_an_axis_of_one_voxel_nothing_changes(helpers: Any, axis: int) -> None:
    shape = [6, 5, 4]
    shape[axis] = 1
    affine = helpers.grid_affine(tuple(shape), (1.5, 2.0, 3.0), "LAS")
    points = helpers.world_points(affine, tuple(shape))
    matrix = np.diag([1.2, 1.1, 0.8])
    vectors = np.einsum("ij,jxyz->ixyz", matrix - np.eye(3), points)
    got = jacobian_determinant(field_of(Geometry(tuple(shape), affine), vectors))
    want = np.delete(np.diag(matrix), axis).prod()
    np.testing.assert_allclose(got, want, atol=1e-4)


def test_it_agrees_with_simpleitk_on_a_plain_grid(helpers: Any) -> None:
    import SimpleITK as sitk

    shape = (12, 10, 8)
    affine = helpers.grid_affine(shape, (1.5, 2.0, 3.0), "LPS")
    x, y, z = helpers.world_points(affine, shape)
    vectors = np.stack([2 * np.sin(0.2 * y + 0.1 * z), 1.5 * np.cos(0.15 * x), np.sin(0.1 * x + 0.2 * y)])
    lps = vectors * np.array([-1, -1, 1]).reshape(3, 1, 1, 1)
    image = sitk.GetImageFromArray(np.ascontiguousarray(np.moveaxis(lps, 0, -1).transpose(2, 1, 0, 3)), isVector=True)
    image.CopyInformation(helpers.sitk_image(vectors[0], affine))
    want = helpers.sitk_array(sitk.DisplacementFieldJacobianDeterminant(image))
    got = jacobian_determinant(field_of(Geometry(shape, affine), vectors))
    inner = (slice(1, -1),) * 3
    np.testing.assert_allclose(got[inner], want[inner], atol=1e-4)


# Continued beyond the grid --------------------------------------------------------------------------------


@pytest.fixture
def cube(helpers: Any) -> DisplacementField:
    """Random vectors, 3 mm voxels, oblique."""
    shape = (8, 7, 6)
    affine = helpers.grid_affine(shape, (3.0, 3.0, 3.0), "LAS", (12, -20, 30), (5, -7, 11))
    vectors = np.random.default_rng(3).normal(5.0, 1.0, (3, *shape))
    return field_of(Geometry(shape, affine), vectors)


def test_inside_its_grid_a_faded_field_is_unchanged(cube: DisplacementField) -> None:
    faded = cube.faded(12.0)
    n = 4  # 12 mm of 3 mm voxels
    assert faded.geometry.shape == (16, 15, 14)
    np.testing.assert_array_equal(faded.vectors_mm[:, n:-n, n:-n, n:-n], cube.vectors_mm)
    np.testing.assert_allclose(faded.geometry.to_ras((n, n, n)), cube.geometry.to_ras((0, 0, 0)), atol=1e-9)


def test_a_faded_field_ends_at_zero(cube: DisplacementField) -> None:
    vectors = cube.faded(12.0).vectors_mm
    inner = vectors.copy()
    inner[:, 1:-1, 1:-1, 1:-1] = 0
    assert np.abs(inner).max() < 1e-6
    assert np.abs(vectors[:, 1]).max() > 0  # and not earlier


def test_a_field_fades_smoothly_from_its_border_value(cube: DisplacementField) -> None:
    margin, n = 30.0, 10
    vectors = cube.faded(margin).vectors_mm.astype(np.float64)
    # Outward from the middle of each face: the profile as a share of the border's vector.
    for axis in range(3):
        for outward in (slice(None, None, -1), slice(None)):
            line = [s // 2 for s in vectors.shape[1:]]
            index: list[Any] = [slice(None), *line]
            index[axis + 1] = outward
            profile = vectors[tuple(index)]
            profile = profile[:, -n - 1 :] / profile[:, -n - 1 : -n]
            np.testing.assert_allclose(profile[0], profile[1], atol=1e-5)
            share = profile[0]
            assert share[0] == pytest.approx(1.0) and share[-1] == pytest.approx(0.0, abs=1e-6)
            assert (np.diff(share) <= 1e-6).all()
            # Smooth: flat at both ends and no step larger than a cosine's steepest, pi/2 of the mean one.
            assert np.abs(np.diff(share)[[0, -1]]).max() < 0.3 / n
            assert np.abs(np.diff(share)).max() < 1.1 * (np.pi / 2) / (n - 0.5)
            assert np.abs(np.diff(share, 2)).max() < 1.1 * (np.pi**2 / 2) / (n - 0.5) ** 2


def test_a_corner_fades_at_least_as_fast_as_a_face(cube: DisplacementField) -> None:
    vectors = cube.faded(12.0).vectors_mm
    corner = cube.vectors_mm[:, 0, 0, 0]
    for k in range(4):
        diagonal = np.linalg.norm(vectors[:, k, k, k])
        straight = np.linalg.norm(vectors[:, k, 4, 4])
        assert diagonal <= straight + 1e-6 <= np.linalg.norm(corner) + 1e-5


@pytest.mark.parametrize(
    "spacing",
    [
        (3.0, 3.0, 3.0),
        (2.0, 3.0, 4.0),
        (1.0, 1.0, 5.0),
    ],
    ids=str,
)
def test_a_field_is_zero_at_the_margin_along_every_axis(helpers: Any, spacing: tuple[float, ...]) -> None:
    """Zero beyond ``margin_mm``, to a voxel; on a grid of unequal spacing too."""
    margin, shape = 12.0, (6, 5, 4)
    grid = Geometry(shape, helpers.grid_affine(shape, spacing, "RAS"))
    faded = field_of(grid, np.ones((3, *shape))).faded(margin)
    there = np.abs(faded.vectors_mm).max(axis=0) > 1e-6
    points = np.moveaxis(helpers.world_points(faded.geometry.affine, faded.geometry.shape), 0, -1)[there]
    half = grid.corners().max(axis=0)
    beyond = points.max(axis=0) - half
    assert (beyond <= margin + np.array(spacing)).all(), beyond
    assert (beyond > margin / 2 - np.array(spacing)).all(), beyond


def test_a_tiny_margin_still_fades() -> None:
    grid = Geometry((4, 4, 4), np.diag([6.0, 6.0, 6.0, 1.0]))
    faded = field_of(grid, np.ones((3, 4, 4, 4))).faded(1.0)
    assert faded.vectors_mm[0, 0].max() == pytest.approx(0.0, abs=1e-6)
    assert faded.vectors_mm[0].max() == 1.0
