"""Geometry against nibabel and against the equations of its grids."""

from __future__ import annotations

import itertools
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from jrs.geometry import Geometry, apply_affine
from jrs.volume import occupied

SHAPE = (7, 5, 4)
AXES = [
    "".join(letters)
    for order in itertools.permutations(("RL", "AP", "SI"))
    for letters in itertools.product(*order)
]
"""The 48 orientations that an array can have."""


@pytest.fixture
def oblique(helpers: Any) -> np.ndarray:
    return helpers.grid_affine(SHAPE, (0.9, 1.5, 3.0), "LAS", (12.0, -7.0, 20.0), (4.0, -11.0, 30.0))


@pytest.fixture
def sheared(oblique: np.ndarray) -> np.ndarray:
    affine = oblique.copy()
    affine[:3, :3] = affine[:3, :3] @ np.array([[1, 0.4, 0], [0, 1, 0.5], [0, 0, 1]])
    return affine


# Against nibabel ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["oblique", "sheared"])
def test_points_map_as_in_nibabel(name: str, request: pytest.FixtureRequest) -> None:
    affine = request.getfixturevalue(name)
    grid = Geometry(SHAPE, affine)
    voxels = np.random.default_rng(0).uniform(-3, 9, (4, 6, 3))
    points = nib.affines.apply_affine(affine, voxels)
    np.testing.assert_allclose(grid.to_ras(voxels), points, atol=1e-12)
    np.testing.assert_allclose(apply_affine(affine, voxels), points, atol=1e-12)
    np.testing.assert_allclose(grid.to_voxels(points), voxels, atol=1e-9)
    np.testing.assert_allclose(grid.inverse @ affine, np.eye(4), atol=1e-12)


@pytest.mark.parametrize("name", ["oblique", "sheared"])
def test_spacing_and_orientation_are_nibabels(name: str, request: pytest.FixtureRequest) -> None:
    affine = request.getfixturevalue(name)
    grid = Geometry(SHAPE, affine)
    np.testing.assert_allclose(grid.spacing, nib.affines.voxel_sizes(affine), rtol=1e-12)
    assert grid.orientation == "".join(nib.aff2axcodes(affine)) == "LAS"


def test_spacing_is_what_the_grid_was_made_with(oblique: np.ndarray) -> None:
    grid = Geometry(SHAPE, oblique)
    np.testing.assert_allclose(grid.spacing, (0.9, 1.5, 3.0), rtol=1e-12)
    assert grid.voxel_volume_ml == pytest.approx(0.9 * 1.5 * 3.0 / 1000.0, rel=1e-12)
    np.testing.assert_allclose(grid.center, (4.0, -11.0, 30.0), atol=1e-12)


def test_a_voxel_of_a_sheared_grid_is_as_large_as_its_determinant(sheared: np.ndarray) -> None:
    # Shear keeps the volume, while the product of the column lengths grows.
    grid = Geometry(SHAPE, sheared)
    assert grid.voxel_volume_ml == pytest.approx(0.9 * 1.5 * 3.0 / 1000.0, rel=1e-12)
    assert np.prod(grid.spacing) / 1000.0 > 1.01 * grid.voxel_volume_ml


def test_corners_are_the_eight_outermost_voxel_centres(oblique: np.ndarray) -> None:
    corners = Geometry(SHAPE, oblique).corners()
    expected = [
        nib.affines.apply_affine(oblique, (i, j, k)) for i in (0, 6) for j in (0, 4) for k in (0, 3)
    ]
    assert corners.shape == (8, 3)
    np.testing.assert_allclose(np.sort(corners, axis=0), np.sort(expected, axis=0), atol=1e-12)


# Grids made from grids ------------------------------------------------------------------------------------


def test_a_refined_grid_cuts_each_voxel_into_equal_parts(sheared: np.ndarray) -> None:
    factors = (2, 3, 1)
    coarse = Geometry(SHAPE, sheared)
    fine = coarse.refined(factors)
    assert fine.shape == (14, 15, 4)
    parts = nib.affines.apply_affine(fine.affine, np.moveaxis(np.indices(fine.shape), 0, -1))
    parts = parts.reshape(7, 2, 5, 3, 4, 1, 3)
    # The mean of the parts' centres is the voxel's centre, and neighbours are a half and a third apart.
    wholes = nib.affines.apply_affine(sheared, np.moveaxis(np.indices(SHAPE), 0, -1))
    np.testing.assert_allclose(parts.mean(axis=(1, 3, 5)), wholes, atol=1e-9)
    np.testing.assert_allclose(fine.affine[:3, :3] * factors, sheared[:3, :3], atol=1e-12)
    # The outer faces coincide.
    np.testing.assert_allclose(fine.to_ras((-0.5,) * 3), coarse.to_ras((-0.5,) * 3), atol=1e-9)
    np.testing.assert_allclose(
        fine.to_ras(np.array(fine.shape) - 0.5), coarse.to_ras(np.array(SHAPE) - 0.5), atol=1e-9
    )


def test_refining_by_one_changes_nothing(oblique: np.ndarray) -> None:
    assert Geometry(SHAPE, oblique).refined((1, 1, 1)) == Geometry(SHAPE, oblique)


def test_a_padded_grid_keeps_its_voxels_and_gains_a_border(sheared: np.ndarray) -> None:
    padded = Geometry(SHAPE, sheared).padded((3, 3, 3))
    assert padded.shape == (13, 11, 10)
    inner = np.moveaxis(np.indices(SHAPE), 0, -1)
    np.testing.assert_allclose(
        nib.affines.apply_affine(padded.affine, inner + 3), nib.affines.apply_affine(sheared, inner), atol=1e-9
    )


@pytest.mark.parametrize("codes", AXES)
def test_an_aligned_grid_has_its_spacing_middle_and_orientation(codes: str) -> None:
    spacing, center = (1.0, 2.0, 3.5), (10.0, -20.0, 5.0)
    grid = Geometry.aligned((6, 5, 4), spacing, center, codes)
    assert "".join(nib.aff2axcodes(grid.affine)) == codes
    np.testing.assert_allclose(nib.affines.voxel_sizes(grid.affine), spacing, rtol=1e-12)
    corners = nib.affines.apply_affine(grid.affine, [(0, 0, 0), (5, 4, 3)])
    np.testing.assert_allclose(corners.mean(axis=0), center, atol=1e-12)
    # Along the world's axes: one entry a column.
    assert np.count_nonzero(grid.affine[:3, :3]) == 3


# Equality -------------------------------------------------------------------------------------------------


def test_equal_grids_are_equal_and_hash_alike(oblique: np.ndarray) -> None:
    one, two = Geometry(SHAPE, oblique), Geometry(SHAPE, oblique.copy())
    assert one == two
    assert len({one, two}) == 1


def test_a_grid_differs_by_shape_by_affine_and_from_other_things(oblique: np.ndarray) -> None:
    grid = Geometry(SHAPE, oblique)
    shifted = oblique.copy()
    shifted[0, 3] += 1e-9
    assert grid != Geometry((7, 5, 3), oblique)
    assert grid != Geometry(SHAPE, shifted)
    assert grid != "grid"


def test_minus_zero_is_zero_for_equality_and_for_the_hash() -> None:
    # Affines from reorientation and from flips hold -0.0 where others hold 0.0.
    plain, negative = np.eye(4), np.eye(4)
    negative[0, 1] = -0.0
    one, two = Geometry(SHAPE, plain), Geometry(SHAPE, negative)
    assert one == two
    assert hash(one) == hash(two)


def test_close_grids_are_told_by_their_corners(oblique: np.ndarray) -> None:
    grid = Geometry(SHAPE, oblique)
    near, far = oblique.copy(), oblique.copy()
    near[1, 3] += 5e-4
    far[1, 3] += 2e-3
    assert grid.is_close_to(Geometry(SHAPE, near))
    assert not grid.is_close_to(Geometry(SHAPE, far))
    assert grid.is_close_to(Geometry(SHAPE, far), tolerance_mm=0.01)
    assert not grid.is_close_to(Geometry((7, 5, 3), oblique), tolerance_mm=100.0)
    # A turn that keeps the first voxel in place moves the far corner.
    turned = oblique.copy()
    turned[:3, 0] *= 1.001
    assert not grid.is_close_to(Geometry(SHAPE, turned))


def test_a_grid_cannot_be_changed_from_outside(oblique: np.ndarray) -> None:
    given = oblique.copy()
    grid = Geometry(SHAPE, given)
    given[0, 3] = 1e6
    np.testing.assert_array_equal(grid.affine, oblique)
    with pytest.raises(ValueError, match="read-only"):
        grid.affine[0, 0] = 2.0
    with pytest.raises(AttributeError):
        grid.shape = (1, 1, 1)  # type: ignore[misc]


# Canonical order ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codes", AXES)
def test_every_orientation_has_one_canonical_grid(oblique: np.ndarray, helpers: Any, codes: str) -> None:
    """The same array and the same grid to the last bit, after single precision as a header has it."""
    data = np.random.default_rng(0).normal(size=SHAPE)
    turned, affine = helpers.stored_as(data, oblique, codes)
    grid, order = Geometry(turned.shape, affine.astype(np.float32)).canonical()
    want, want_affine = helpers.stored_as(data, oblique, "RAS")
    np.testing.assert_array_equal(order.apply(turned), want)
    np.testing.assert_array_equal(order.undo(order.apply(turned)), turned)
    several = np.stack([turned, 2 * turned])
    np.testing.assert_array_equal(order.undo(order.apply(several)), several)
    assert grid.shape == want.shape and grid.orientation == "RAS"
    np.testing.assert_allclose(grid.affine, want_affine, atol=0.01)
    again, _ = Geometry(SHAPE, oblique.astype(np.float32)).canonical()
    assert grid == again


# Parts ----------------------------------------------------------------------------------------------------


def test_a_part_keeps_its_voxels_where_they_are(sheared: np.ndarray) -> None:
    grid = Geometry((6, 7, 8), sheared)
    part = grid.part((slice(2, 5), slice(0, 7), slice(3, 4)))
    assert part.shape == (3, 7, 1)
    for index in ((0, 0, 0), (2, 6, 0), (1, 3, 0)):
        whole = (index[0] + 2, index[1], index[2] + 3)
        np.testing.assert_allclose(part.to_ras(index), nib.affines.apply_affine(sheared, whole), atol=1e-9)


@pytest.mark.parametrize("seed", range(4))
def test_the_occupied_box_loses_no_voxel(seed: int) -> None:
    """Of images with a few voxels that are not zero: all of them within, and a plane of zeros or the border around."""
    generator = np.random.default_rng(seed)
    images = [np.zeros((9, 8, 7), dtype=np.float32) for _ in range(2)]
    for image in images:
        image[tuple(generator.integers(1, 6, (3, 3)))] = generator.normal(size=3)
    box = occupied(images)
    both = np.abs(images).sum(axis=0)
    assert np.count_nonzero(both[box]) == np.count_nonzero(both) > 0
    for axis in range(3):
        ends = np.moveaxis(both[box], axis, 0)
        assert box[axis].start == 0 or (not ends[0].any() and ends[1].any())
        assert box[axis].stop == both.shape[axis] or (not ends[-1].any() and ends[-2].any())


def test_of_nothing_the_whole_is_kept() -> None:
    assert occupied([np.zeros((2, 3, 4))]) == (slice(0, 2), slice(0, 3), slice(0, 4))
    assert occupied([np.full((2, 3, 4), np.nan)]) == (slice(0, 2), slice(0, 3), slice(0, 4))
