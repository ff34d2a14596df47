"""Resampling against scipy, SimpleITK and block means, and its independence of how an image is stored."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from jrs.geometry import Geometry
from jrs.runtime import sampling
from jrs.runtime.sampling import (
    affine_coords,
    resample_affine,
    sample,
    sample_nearest,
    slabs,
)

pytestmark = pytest.mark.usefixtures("kernels")
SHAPE = (9, 7, 6)
ORIENTATIONS = [
    "".join(letters)
    for order in itertools.permutations(("RL", "AP", "SI"))
    for letters in itertools.product(*order)
]


@pytest.fixture
def image() -> np.ndarray:
    return np.random.default_rng(3).normal(50.0, 20.0, (2, *SHAPE)).astype(np.float32)


def random_coords(count: int, low: float, high: float, seed: int = 5) -> np.ndarray:
    """Points from ``low`` to ``high`` beyond each border, (3,count,1,1) float32."""
    unit = np.random.default_rng(seed).uniform(0, 1, (3, count, 1, 1))
    last = np.array(SHAPE).reshape(3, 1, 1, 1) - 1.0
    return (low + unit * (last + high - low)).astype(np.float32)


# Single points --------------------------------------------------------------------------------------------


def test_inside_it_is_trilinear(image: np.ndarray) -> None:
    coords = random_coords(500, 0.0, 0.0)
    got = sample(image, coords, threads=1)
    assert got.dtype == np.float32 and got.shape == (2, 500, 1, 1)
    for channel in range(2):
        want = ndimage.map_coordinates(image[channel].astype(np.float64), coords.astype(np.float64), order=1)
        np.testing.assert_allclose(got[channel], want, atol=2e-4)


def test_at_voxels_it_is_the_image(image: np.ndarray) -> None:
    coords = np.indices(SHAPE).astype(np.float32)
    np.testing.assert_allclose(sample(image, coords, threads=1), image, atol=2e-5)


def test_without_an_outside_value_the_border_repeats(image: np.ndarray) -> None:
    coords = random_coords(500, -6.0, 6.0)
    got = sample(image, coords, outside=None, threads=1)
    for channel in range(2):
        want = ndimage.map_coordinates(image[channel], coords.astype(np.float64), order=1, mode="nearest")
        np.testing.assert_allclose(got[channel], want, atol=2e-4)


def test_beyond_half_a_voxel_it_is_the_outside_value(image: np.ndarray) -> None:
    for axis, n in enumerate(SHAPE):
        for position, inside in ((-0.51, False), (-0.49, True), (n - 0.51, True), (n - 0.49, False)):
            point = np.array([2.0, 3.0, 4.0])
            point[axis] = position
            coords = point.reshape(3, 1, 1, 1).astype(np.float32)
            border = np.clip(point, 0, np.array(SHAPE) - 1).astype(int)
            want = image[:, border[0], border[1], border[2]] if inside else [-7.0, -7.0]
            np.testing.assert_allclose(sample(image, coords, -7.0, 1).ravel(), want, rtol=1e-5)
            value = sample_nearest(image[0], coords, -7).item()
            assert value == pytest.approx(want[0], rel=1e-5)


def test_both_ends_of_an_axis_are_alike(image: np.ndarray) -> None:
    # ITK takes in the half voxel at the low end and not the one at the high end: a flip would change the image.
    for position in (-0.5, SHAPE[0] - 0.5):
        coords = np.array([position, 3.0, 4.0], dtype=np.float32).reshape(3, 1, 1, 1)
        end = 0 if position < 0 else SHAPE[0] - 1
        np.testing.assert_allclose(sample(image, coords, -7.0, 1).ravel(), image[:, end, 3, 4], rtol=1e-5)


@pytest.mark.parametrize("outside", [0.0, -50.0])
@pytest.mark.parametrize("nearest", [False, True])
def test_it_agrees_with_simpleitk(image: np.ndarray, helpers: Any, outside: float, nearest: bool) -> None:
    """A rotated and shifted view of an oblique image, a good part of it outside."""
    import SimpleITK as sitk

    source = helpers.grid_affine(SHAPE, (1.5, 2.0, 3.0), "LPS", (10, 20, -15), (3, 2, 1))
    target_shape = (14, 13, 12)
    target = helpers.grid_affine(target_shape, (1.7, 1.3, 2.1), "SAR", (-5, 8, 30), (2, -1, 3))
    reference = helpers.sitk_image(np.zeros(target_shape, dtype=np.float32), target)
    kind = sitk.sitkNearestNeighbor if nearest else sitk.sitkLinear
    resampled = sitk.Resample(helpers.sitk_image(image[0], source), reference, sitk.Transform(), kind, outside)
    want = helpers.sitk_array(resampled)
    points = helpers.world_points(target, target_shape)
    coords = nib.affines.apply_affine(np.linalg.inv(source), np.moveaxis(points, 0, -1))
    coords = np.moveaxis(coords, -1, 0).astype(np.float32)
    got = sample_nearest(image[0], coords, int(outside)) if nearest else sample(image[:1], coords, outside, 1)[0]
    assert 0.2 < (want == outside).mean() < 0.8  # the test sees both sides of the border
    np.testing.assert_array_equal(got == outside, want == outside)
    np.testing.assert_allclose(got, want, atol=1e-3)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int32, np.float32])
def test_nearest_keeps_the_type_and_invents_no_value(dtype: type) -> None:
    labels = np.random.default_rng(2).choice([0, 1, 2, 4], SHAPE).astype(dtype)
    coords = random_coords(400, -3.0, 3.0)
    got = sample_nearest(labels, coords, 9)
    assert got.dtype == dtype and got.shape == (400, 1, 1)
    want = ndimage.map_coordinates(labels, coords.astype(np.float64), order=0, mode="nearest")
    last = np.array(SHAPE).reshape(3, 1, 1, 1) - 1
    outside = ((coords < -0.5) | (coords > last + 0.5)).any(axis=0)
    assert outside.any() and not outside.all()
    np.testing.assert_array_equal(got, np.where(outside, 9, want))


def test_inputs_are_not_changed(image: np.ndarray) -> None:
    coords = random_coords(50, -3.0, 3.0)
    before = image.copy(), coords.copy()
    sample(image, coords, 0.0, 1)
    sample_nearest(image[0], coords)
    image.setflags(write=False)
    sample(image, coords, None, 1)
    np.testing.assert_array_equal(image, before[0])
    np.testing.assert_array_equal(coords, before[1])


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_pieces_on_threads_do_not_show(image: np.ndarray, monkeypatch: pytest.MonkeyPatch, threads: int) -> None:
    rng = np.random.default_rng(8)
    coords = (rng.uniform(-2, 10, (3, 7, 13, 11))).astype(np.float32)
    want = np.stack([ndimage.map_coordinates(c, coords.astype(float), order=1, mode="nearest") for c in image])
    outside = np.zeros(coords.shape[1:], dtype=bool)
    for axis, n in enumerate(SHAPE):
        outside |= (coords[axis] < -0.5) | (coords[axis] > n - 0.5)
    want[:, outside] = -3.0
    monkeypatch.setattr(sampling, "_WORTH_A_THREAD", 10)
    np.testing.assert_allclose(sample(image, coords, -3.0, threads), want, atol=5e-4)


def test_no_points_at_all(image: np.ndarray) -> None:
    assert sample(image, np.zeros((3, 0, 1, 1), dtype=np.float32), 0.0, 1).shape == (2, 0, 1, 1)


def test_an_axis_of_one_voxel() -> None:
    plane = np.arange(12, dtype=np.float32).reshape(1, 4, 3, 1)
    coords = np.array([1.5, 1.0, 0.3], dtype=np.float32).reshape(3, 1, 1, 1)
    assert sample(plane, coords, 0.0, 1).item() == pytest.approx((4 + 7) / 2)


# Grids ----------------------------------------------------------------------------------------------------


def test_affine_coords_are_the_matrix_times_the_index(helpers: Any) -> None:
    matrix = helpers.grid_affine(SHAPE, (1.5, 2.0, 3.0), "LPS", (10, 20, -15), (30, -20, 10))
    want = np.moveaxis(nib.affines.apply_affine(matrix, np.moveaxis(np.indices(SHAPE), 0, -1)), -1, 0)
    got = affine_coords(SHAPE, matrix)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, want, atol=1e-5)
    np.testing.assert_array_equal(affine_coords(SHAPE, matrix, 3, 7), got[:, 3:7])


@pytest.mark.parametrize("bound", [1, 10, 100, 10**6])
def test_slabs_cover_the_grid_once(monkeypatch: pytest.MonkeyPatch, bound: int) -> None:
    monkeypatch.setattr(sampling, "_SLAB_VOXELS", bound)
    pieces = slabs((9, 5, 4))
    assert [i for start, stop in pieces for i in range(start, stop)] == list(range(9))
    assert max(stop - start for start, stop in pieces) * 20 <= max(bound, 20)


# Whole images ---------------------------------------------------------------------------------------------


def test_onto_its_own_grid_an_image_is_itself(image: np.ndarray, helpers: Any) -> None:
    grid = Geometry(SHAPE, helpers.grid_affine(SHAPE, (1.5, 2.0, 3.0), "LPS", (10, 20, -15), (30, -20, 10)))
    np.testing.assert_allclose(resample_affine(image, grid, grid, threads=1), image, atol=1e-3)


@pytest.mark.parametrize("factors", [(2, 2, 2), (3, 1, 2), (4, 2, 1), (8, 8, 8)])
def test_larger_voxels_are_the_mean_of_what_they_hold(factors: tuple[int, int, int], helpers: Any) -> None:
    shape = tuple(3 * f for f in factors)
    data = np.random.default_rng(4).normal(size=(1, *shape)).astype(np.float32)
    affine = helpers.grid_affine(shape, (0.7, 1.0, 1.2), "ASR", (10, 20, -15), (3, 2, 1))
    coarse = affine.copy()
    coarse[:3, :3] = affine[:3, :3] * factors
    coarse[:3, 3] = nib.affines.apply_affine(affine, (np.array(factors) - 1) / 2)
    a, b, c = factors
    want = data[0].reshape(3, a, 3, b, 3, c).mean(axis=(1, 3, 5))
    got = resample_affine(data, Geometry(shape, affine), Geometry((3, 3, 3), coarse), threads=1)[0]
    np.testing.assert_allclose(got, want, atol=1e-4)


def test_nothing_aliases(helpers: Any) -> None:
    """A checkerboard of +-1 is grey on voxels twice as large, wherever these lie."""
    shape = (24, 24, 24)
    data = (1.0 - 2.0 * (np.indices(shape).sum(axis=0) % 2)).astype(np.float32)
    source = Geometry(shape, np.eye(4))
    target = Geometry((8, 8, 8), np.array([[2, 0, 0, 4.0], [0, 2, 0, 4.0], [0, 0, 2, 4.0], [0, 0, 0, 1]]))
    points = np.moveaxis(helpers.world_points(target.affine, target.shape), 0, -1).astype(int)
    assert np.abs(data[tuple(points.reshape(-1, 3).T)]).min() == 1.0  # plain sampling would see the board
    assert np.abs(resample_affine(data[None], source, target, threads=1)).max() < 1e-5


def test_through_an_affine_it_agrees_with_simpleitk(image: np.ndarray, helpers: Any) -> None:
    import SimpleITK as sitk

    source = helpers.grid_affine(SHAPE, (2.0, 2.0, 2.0), "LPS", (10, 20, -15), (3, 2, 1))
    shape = (12, 11, 10)
    target = helpers.grid_affine(shape, (1.9, 1.4, 2.0), "RSA", (0, 8, 5), (1, 1, 1))
    matrix = np.eye(4)
    matrix[:3, :3] = helpers.rotation((5, -3, 8)) * 0.95
    matrix[:3, 3] = (1.0, -2.0, 0.5)
    lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ matrix @ np.diag([-1.0, -1.0, 1.0, 1.0])
    transform = sitk.AffineTransform(lps[:3, :3].ravel().tolist(), lps[:3, 3].tolist())
    reference = helpers.sitk_image(np.zeros(shape, dtype=np.float32), target)
    moved = sitk.Resample(helpers.sitk_image(image[1], source), reference, transform, sitk.sitkLinear, 0.0)
    got = resample_affine(image[1:], Geometry(SHAPE, source), Geometry(shape, target), matrix, threads=1)[0]
    np.testing.assert_allclose(got, helpers.sitk_array(moved), atol=1e-3)


def test_slab_seams_do_not_show(image: np.ndarray, monkeypatch: pytest.MonkeyPatch, helpers: Any) -> None:
    source = Geometry(SHAPE, np.eye(4))
    target = Geometry((7, 4, 3), helpers.grid_affine((7, 4, 3), (1.3, 2.1, 2.0), "RAS", center=(4, 3, 2.5)))
    whole = resample_affine(image, source, target, threads=1)
    monkeypatch.setattr(sampling, "_SLAB_VOXELS", 1)
    np.testing.assert_array_equal(resample_affine(image, source, target, threads=1), whole)


@pytest.mark.parametrize("spacing", [(2.0, 2.0, 2.0), (5.0, 5.0, 5.0), (2.0, 6.0, 3.0)], ids=str)
def test_the_result_does_not_depend_on_how_the_image_is_stored(spacing: tuple[float, ...], helpers: Any) -> None:
    """One image in all 48 orientations, onto finer, coarser and mixed voxels."""
    shape = (14, 12, 10)
    affine = helpers.grid_affine(shape, (2.0, 2.5, 3.0), "RAS", (8, -12, 5), (2, 1, -3))
    data = np.random.default_rng(6).normal(100.0, 30.0, shape).astype(np.float32)
    target_shape = (6, 5, 7)
    target = Geometry(target_shape, helpers.grid_affine(target_shape, spacing, "RAS", (0, 4, 0), (1, 2, -1)))
    results = {}
    for codes in ORIENTATIONS:
        stored, stored_affine = helpers.stored_as(data, affine, codes)
        assert "".join(nib.aff2axcodes(stored_affine)) == codes
        source = Geometry(stored.shape, stored_affine)
        results[codes] = resample_affine(np.ascontiguousarray(stored)[None], source, target, threads=1)
    assert len(results) == 48
    first = results["RAS"]
    assert float(first.std()) > 5.0
    for codes, result in results.items():
        np.testing.assert_allclose(result, first, atol=5e-3, err_msg=codes)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_forked_process_has_threads_of_its_own() -> None:
    """As the workers of a data loader are, after their parent has sampled in threads."""
    code = (
        "import os, numpy as np\n"
        "from jrs.runtime.sampling import Sampled\n"
        "image, where = np.ones((1, 40, 40, 40), np.float32), np.full((3, 60000), 7.0, np.float32)\n"
        "once = lambda: Sampled(image, 2).at(where).mean()\n"
        "assert once() == 1.0\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    os._exit(int(once() == 1.0))\n"
        "raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 1)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
