"""The total transform against numpy, scipy and SimpleITK: forward, dense, on points, and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from jrs.fields import DisplacementField
from jrs.geometry import Geometry
from jrs.itk import save_field
from jrs.runtime import sampling
from jrs.runtime.sampling import Sampled
from jrs.runtime.transform import FADE_MM, Transform, to_voxel_coords

pytestmark = pytest.mark.usefixtures("kernels")
NETWORK_SHAPE = (24, 26, 22)
LPS = np.array([-1.0, -1.0, 1.0])


def wave(points: np.ndarray, scale: float = 1.0) -> np.ndarray:
    """A smooth displacement at RAS points (3,...), up to 8 mm, gradients up to about 0.2."""
    x, y, z = points
    return scale * np.stack(
        [
            2.0 + 3.5 * np.sin(0.035 * x + 0.02 * y),
            -1.0 + 4.0 * np.cos(0.025 * y - 0.035 * z + 0.5),
            1.5 + 3.5 * np.sin(0.04 * z - 0.02 * x + 1.0),
        ]
    )


@pytest.fixture
def network(helpers: Any) -> Geometry:
    """The network's grid: along the world's axes, 5 mm."""
    affine = helpers.grid_affine(NETWORK_SHAPE, (5.0, 5.0, 5.0), "RAS", center=(2, -5, 3))
    return Geometry(NETWORK_SHAPE, affine)


@pytest.fixture
def displacement(network: Geometry, helpers: Any) -> DisplacementField:
    vectors = wave(helpers.world_points(network.affine, NETWORK_SHAPE))
    return DisplacementField(vectors.astype(np.float32), network)


@pytest.fixture
def affine(helpers: Any) -> np.ndarray:
    matrix = np.eye(4)
    matrix[:3, :3] = helpers.rotation((8, -6, 10)) @ np.array([[1.08, 0.05, 0], [0, 0.93, 0.04], [0, 0, 1.03]])
    matrix[:3, 3] = (7.0, -11.0, 5.0)
    return matrix


@pytest.fixture(params=["oblique", "aligned"])
def fixed(helpers: Any, request: pytest.FixtureRequest) -> Geometry:
    """Anisotropic, within the network's grid; along the world's axes there is a shorter way to sample."""
    shape = (23, 20, 16)
    degrees = (6, -4, 9) if request.param == "oblique" else (0, 0, 0)
    return Geometry(shape, helpers.grid_affine(shape, (3.5, 4.0, 5.0), "LAS", degrees, (0, -4, 2)))


@pytest.fixture
def native_grid(helpers: Any, affine: np.ndarray) -> Geometry:
    """The moving image's grid: about where A takes the fixed one, another orientation."""
    shape = (18, 22, 19)
    center = tuple(nib.affines.apply_affine(affine, (0, -4, 2)))
    return Geometry(shape, helpers.grid_affine(shape, (4.0, 3.5, 4.5), "PSR", (-5, 7, 3), center))


def interpolated(field: DisplacementField, points: np.ndarray) -> np.ndarray:
    """The field at RAS points (n,3) inside its grid, by scipy in float64."""
    voxels = nib.affines.apply_affine(np.linalg.inv(field.geometry.affine), points).T
    return np.stack([ndimage.map_coordinates(c.astype(float), voxels, order=1) for c in field.vectors_mm], axis=1)


def flat(points: np.ndarray) -> np.ndarray:
    """(3,X,Y,Z) to (n,3)."""
    return points.reshape(3, -1).T


def total(affine: np.ndarray, displacement: DisplacementField, points: np.ndarray) -> np.ndarray:
    """A(x + u(x)) at points (n,3) inside the network's grid."""
    return nib.affines.apply_affine(affine, points + interpolated(displacement, points))


# Forward --------------------------------------------------------------------------------------------------


def test_forward_is_the_affine_behind_the_displacement(
    affine: np.ndarray, displacement: DisplacementField, fixed: Geometry, helpers: Any
) -> None:
    moved = Transform(affine, displacement, 1).positions(fixed)
    points = flat(helpers.world_points(fixed.affine, fixed.shape))
    np.testing.assert_allclose(flat(moved), total(affine, displacement, points), atol=1e-3)
    # The order matters here: u(A x) would be far off.
    swapped = nib.affines.apply_affine(affine, points)
    swapped = swapped + wave(swapped.T).T
    assert np.abs(swapped - flat(moved)).max() > 1.0


def test_images_are_pulled_from_where_the_transform_leads(
    affine: np.ndarray, displacement: DisplacementField, fixed: Geometry, native_grid: Geometry, helpers: Any
) -> None:
    """Five channels, which fill one group of four and begin another; outside the image there is -3."""
    data = np.random.default_rng(8).normal(50.0, 20.0, (5, *native_grid.shape)).astype(np.float32)
    moved = Transform(affine, displacement, 1).pull(Sampled(data, 1), native_grid, fixed, -3.0)
    points = total(affine, displacement, flat(helpers.world_points(fixed.affine, fixed.shape)))
    voxels = nib.affines.apply_affine(np.linalg.inv(native_grid.affine), points).T
    last = np.array(native_grid.shape)[:, None] - 1
    outside = ((voxels < -0.5) | (voxels > last + 0.5)).any(axis=0)
    border = (np.abs(voxels + 0.5) < 1e-3).any(axis=0) | (np.abs(voxels - last - 0.5) < 1e-3).any(axis=0)
    assert 0.02 < outside.mean() < 0.9
    for got, channel in zip(moved, data, strict=True):
        want = ndimage.map_coordinates(channel.astype(float), voxels, order=1, mode="nearest")
        want[outside] = -3.0
        np.testing.assert_allclose(got.ravel()[~border], want[~border], atol=0.02)


def test_dense_is_forward_less_the_identity(
    affine: np.ndarray, displacement: DisplacementField, fixed: Geometry, helpers: Any
) -> None:
    dense = Transform(affine, displacement, 1).dense(fixed)
    assert dense.geometry == fixed and dense.vectors_mm.dtype == np.float32
    points = flat(helpers.world_points(fixed.affine, fixed.shape))
    np.testing.assert_allclose(flat(dense.vectors_mm), total(affine, displacement, points) - points, atol=1e-3)


def test_points_move_as_images_do(affine: np.ndarray, displacement: DisplacementField, fixed: Geometry) -> None:
    points = fixed.center + np.random.default_rng(0).uniform(-30, 30, (40, 3))
    got = Transform(affine, displacement, 1).points(points)
    assert got.shape == (40, 3) and got.dtype == np.float64
    np.testing.assert_allclose(got, total(affine, displacement, points), atol=1e-3)
    # Analytically, up to what 5 mm voxels interpolate.
    np.testing.assert_allclose(got, nib.affines.apply_affine(affine, points + wave(points.T).T), atol=0.05)


def test_far_outside_the_network_grid_the_affine_remains(
    affine: np.ndarray, displacement: DisplacementField, network: Geometry, helpers: Any
) -> None:
    shape = (6, 5, 4)
    far = Geometry(shape, helpers.grid_affine(shape, (3, 3, 3), "LAS", center=(2 + 58 + FADE_MM + 12, -5, 3)))
    points = flat(helpers.world_points(far.affine, shape))
    assert (points[:, 0] > network.corners()[:, 0].max() + FADE_MM).all()
    transform = Transform(affine, displacement, 1)
    want = nib.affines.apply_affine(affine, points)
    np.testing.assert_allclose(flat(transform.dense(far).vectors_mm), want - points, atol=1e-3)
    np.testing.assert_allclose(transform.points(points), want, atol=1e-3)


def test_across_the_network_border_nothing_jumps(
    affine: np.ndarray, displacement: DisplacementField, network: Geometry
) -> None:
    """A line of points from inside to beyond the fade: u changes by no more than it may fade in a millimetre."""
    x = np.arange(40.0, 100.0, 0.25)
    points = np.stack([x, np.full_like(x, -5.0), np.full_like(x, 3.0)], axis=1)
    assert x[0] < network.corners()[:, 0].max() < x[-1] - FADE_MM
    u = Transform(np.eye(4), displacement, 1).points(points) - points
    steps = np.linalg.norm(np.diff(u, axis=0), axis=1) / 0.25
    largest = np.linalg.norm(displacement.vectors_mm, axis=0).max()
    assert steps.max() < 1.2 * (np.pi / 2) * largest / FADE_MM + 0.3
    np.testing.assert_allclose(u[-1], 0.0, atol=1e-4)
    assert np.linalg.norm(u[0]) > 1.0


def test_the_affine_alone(affine: np.ndarray, fixed: Geometry, native_grid: Geometry, helpers: Any) -> None:
    transform = Transform(affine, None)
    points = flat(helpers.world_points(fixed.affine, fixed.shape))
    want = nib.affines.apply_affine(affine, points)
    np.testing.assert_allclose(flat(transform.dense(fixed).vectors_mm), want - points, atol=1e-3)
    np.testing.assert_allclose(transform.points(points), want, atol=1e-9)
    back = flat(helpers.world_points(native_grid.affine, native_grid.shape))
    want = nib.affines.apply_affine(np.linalg.inv(affine), back) - back
    np.testing.assert_allclose(flat(transform.inverse_dense(native_grid).vectors_mm), want, atol=1e-3)


def test_to_voxel_coords_is_the_inverse_affine(fixed: Geometry) -> None:
    points = np.random.default_rng(1).uniform(-60, 60, (3, 4, 5, 2)).astype(np.float32)
    want = nib.affines.apply_affine(np.linalg.inv(fixed.affine), np.moveaxis(points, 0, -1))
    np.testing.assert_allclose(np.moveaxis(to_voxel_coords(points, fixed), 0, -1), want, atol=1e-3)


def test_slab_seams_do_not_show(
    affine: np.ndarray,
    displacement: DisplacementField,
    fixed: Geometry,
    native_grid: Geometry,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    transform = Transform(affine, displacement, 1)
    dense, inverse = transform.dense(fixed).vectors_mm, transform.inverse_dense(native_grid).vectors_mm
    monkeypatch.setattr(sampling, "_SLAB_VOXELS", 700)
    assert len(sampling.slabs(fixed.shape)) > 5
    # To float rounding: the affine's matrix product depends on how many points it has.
    np.testing.assert_allclose(transform.dense(fixed).vectors_mm, dense, atol=1e-4)
    np.testing.assert_allclose(transform.inverse_dense(native_grid).vectors_mm, inverse, atol=1e-4)


# Back -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 2.5], ids=["smooth", "strong"])
def test_forward_after_inverse_is_the_identity(
    affine: np.ndarray, network: Geometry, native_grid: Geometry, helpers: Any, scale: float
) -> None:
    """For the strong one |u| is up to 20 mm and its gradient up to 0.5."""
    vectors = wave(helpers.world_points(network.affine, NETWORK_SHAPE), scale).astype(np.float32)
    displacement = DisplacementField(vectors, network)
    transform = Transform(affine, displacement, 1)
    inverse = transform.inverse_dense(native_grid)
    assert inverse.geometry == native_grid
    y = flat(helpers.world_points(native_grid.affine, native_grid.shape))
    x = y + flat(inverse.vectors_mm)
    np.testing.assert_allclose(transform.points(x), y, atol=0.05)
    # By scipy, where x lies in the network's own grid.
    inside = ((x > network.corners().min(axis=0)) & (x < network.corners().max(axis=0))).all(axis=1)
    assert inside.mean() > 0.9
    np.testing.assert_allclose(total(affine, displacement, x[inside]), y[inside], atol=0.05)
    # And it is not the affine's inverse alone.
    assert np.abs(x - nib.affines.apply_affine(np.linalg.inv(affine), y)).max() > 3.0 * scale


def test_the_inverse_holds_where_the_field_fades(
    affine: np.ndarray, displacement: DisplacementField, network: Geometry, helpers: Any
) -> None:
    """A native image larger than the network's grid: across its border and beyond, where u bends most."""
    shape = (24, 24, 24)
    center = tuple(nib.affines.apply_affine(affine, network.center))
    native_grid = Geometry(shape, helpers.grid_affine(shape, (9.0, 9.0, 9.0), "LPS", (3, 2, 1), center))
    transform = Transform(affine, displacement, 1)
    y = flat(helpers.world_points(native_grid.affine, shape))
    x = y + flat(transform.inverse_dense(native_grid).vectors_mm)
    error = np.linalg.norm(transform.points(x) - y, axis=1)
    inside = ((x > network.corners().min(axis=0)) & (x < network.corners().max(axis=0))).all(axis=1)
    assert 0.1 < inside.mean() < 0.5
    assert error[inside].max() < 0.05
    assert np.percentile(error[~inside], 99) < 0.05
    assert error.max() < 0.3


def test_the_saved_files_invert_each_other_in_simpleitk(
    tmp_path: Path,
    affine: np.ndarray,
    displacement: DisplacementField,
    fixed: Geometry,
    native_grid: Geometry,
) -> None:
    sitk = pytest.importorskip("SimpleITK")
    transform = Transform(affine, displacement, 1)
    save_field(tmp_path / "forward.nii.gz", transform.dense(fixed))
    save_field(tmp_path / "inverse.nii.gz", transform.inverse_dense(native_grid))
    forward, inverse = (
        sitk.DisplacementFieldTransform(sitk.ReadImage(str(tmp_path / f"{name}.nii.gz"), sitk.sitkVectorFloat64))
        for name in ("forward", "inverse")
    )
    x = fixed.center + np.random.default_rng(2).uniform(-15, 15, (200, 3))
    y = np.array([forward.TransformPoint(p) for p in (x * LPS).tolist()]) * LPS
    back = np.array([inverse.TransformPoint(p) for p in (y * LPS).tolist()]) * LPS
    np.testing.assert_allclose(y, total(affine, displacement, x), atol=0.05)
    # Each file's own grid interpolates a smooth field, 0.05 mm in all.
    np.testing.assert_allclose(back, x, atol=0.05)
    assert np.linalg.norm(y - x, axis=1).min() > 3.0


def test_a_fold_has_no_inverse_but_an_answer(network: Geometry, native_grid: Geometry, helpers: Any) -> None:
    """u = -1.8 a sin(x/a) folds: the iteration must end, finite, within the size of u."""
    points = helpers.world_points(network.affine, NETWORK_SHAPE)
    vectors = np.zeros((3, *NETWORK_SHAPE), dtype=np.float32)
    vectors[0] = -1.8 * 12.0 * np.sin(points[0] / 12.0)
    inverse = Transform(np.eye(4), DisplacementField(vectors, network), 1).inverse_dense(native_grid)
    assert np.isfinite(inverse.vectors_mm).all()
    assert np.abs(inverse.vectors_mm).max() <= 1.8 * 12.0 + 0.01


def test_the_inverse_of_a_field_of_fine_voxels(native_grid: Geometry, affine: np.ndarray, helpers: Any) -> None:
    """Voxels of 1.2 to 3 mm, waves of 20 mm."""
    shape = (40, 46, 20)
    grid = Geometry(shape, helpers.grid_affine(shape, (1.2, 1.3, 3.0), "LAS", (4.0, 0.0, -6.0), (2.0, -5.0, 3.0)))
    x, y, z = helpers.world_points(grid.affine, shape) / 20.0 * 2.0 * np.pi
    vectors = 0.9 * np.stack([np.sin(y), np.cos(z + 0.5), np.sin(x - 0.3)])
    transform = Transform(affine, DisplacementField(vectors.astype(np.float32), grid), 1)
    y = flat(helpers.world_points(native_grid.affine, native_grid.shape))
    error = np.linalg.norm(transform.points(y + flat(transform.inverse_dense(native_grid).vectors_mm)) - y, axis=1)
    assert np.abs(transform.points(y) - nib.affines.apply_affine(affine, y)).max() > 0.8
    assert error.max() < 0.06
