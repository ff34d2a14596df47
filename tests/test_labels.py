"""Label schemes: what the classes are written as."""

from __future__ import annotations

from typing import Any

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from jrs.errors import UsageError
from jrs.fields import DisplacementField
from jrs.geometry import Geometry
from jrs.runtime.labels import LabelSampler, label_scheme
from jrs.runtime.transform import Transform


@pytest.mark.parametrize(
    ("values", "wanted", "expected"),
    [
        ((0, 1, 2, 4), "bundle", ("brats2018", (0, 1, 2, 4))),
        ((0, 1, 2, 3), "bundle", ("brats2023", (0, 1, 2, 3))),
        ((0, 10, 20, 30), "bundle", ("bundle", (0, 10, 20, 30))),
        ((0, 1), "bundle", ("bundle", (0, 1))),
        ((0, 1, 2, 4), "brats2023", ("brats2023", (0, 1, 2, 3))),
        ((0, 1, 2, 3), "brats2018", ("brats2018", (0, 1, 2, 4))),
    ],
)
def test_schemes(values: tuple[int, ...], wanted: str, expected: tuple[str, tuple[int, ...]]) -> None:
    assert label_scheme(values, wanted) == expected


def test_an_unknown_scheme_names_the_known_ones() -> None:
    with pytest.raises(UsageError, match=r"brats2021.*brats2018, brats2023, bundle"):
        label_scheme((0, 1, 2, 4), "brats2021")


def test_a_bundle_of_other_classes_has_no_brats_scheme() -> None:
    with pytest.raises(UsageError, match="4 classes and the bundle 2"):
        label_scheme((0, 1), "brats2018")


@pytest.mark.parametrize("codes", ["RAS", "LSP"])
def test_labels_are_the_largest_interpolated_probability(helpers: Any, codes: str) -> None:
    """Two blobs of two classes, by scipy, on a native grid and on a fixed grid through a displacement."""
    shape = (20, 22, 18)
    grid = Geometry(shape, helpers.grid_affine(shape, (3.0, 3.0, 3.0), "RAS", center=(1, 2, 3)))
    points = helpers.world_points(grid.affine, shape)
    centers = [np.reshape(c, (3, 1, 1, 1)) for c in ((5, 0, 4), (-9, 6, 0))]
    blobs = [np.exp(-((points - c) ** 2).sum(axis=0) / 120.0) for c in centers]
    probabilities = np.stack([np.full(shape, 0.4), *blobs]).astype(np.float32)
    affine = np.eye(4)
    affine[:3, :3] = helpers.rotation((5, -8, 10)) * 1.1
    affine[:3, 3] = (12.0, -7.0, 4.0)
    u = DisplacementField(np.stack([3 * np.sin(points[1] / 20), 2 * np.cos(points[2] / 25), points[0] / 40]), grid)
    sampler = LabelSampler(probabilities, grid, affine, (0, 10, 20))

    def wanted(at: np.ndarray) -> np.ndarray:
        voxels = np.moveaxis(nib.affines.apply_affine(np.linalg.inv(grid.affine), np.moveaxis(at, 0, -1)), -1, 0)
        values = [ndimage.map_coordinates(p.astype(float), voxels, order=1, mode="nearest") for p in probabilities]
        return np.array([0, 10, 20])[np.argmax(values, axis=0)]

    native_shape = (31, 27, 33)
    center = tuple(nib.affines.apply_affine(affine, (1, 2, 3)))
    target = Geometry(native_shape, helpers.grid_affine(native_shape, (2.0, 2.2, 1.8), codes, (3, 2, 1), center))
    world = helpers.world_points(target.affine, native_shape)
    back = np.moveaxis(nib.affines.apply_affine(np.linalg.inv(affine), np.moveaxis(world, 0, -1)), -1, 0)
    got, want = sampler.native(target), wanted(back)
    assert set(np.unique(want)) == {0, 10, 20} and got.dtype == np.uint8
    assert (got != want).mean() < 1e-4
    fixed = Geometry(shape, helpers.grid_affine(shape, (2.5, 2.0, 2.2), codes, (0, 4, 2), (0, 3, 3)))
    transform = Transform(affine, u)
    here = helpers.world_points(fixed.affine, shape)
    voxels = np.moveaxis(nib.affines.apply_affine(np.linalg.inv(grid.affine), np.moveaxis(here, 0, -1)), -1, 0)
    moved = here + np.stack([ndimage.map_coordinates(c.astype(float), voxels, order=1) for c in u.vectors_mm])
    got, want = sampler.moved(fixed, transform), wanted(moved)
    assert set(np.unique(want)) == {0, 10, 20}
    assert (got != want).mean() < 1e-3


def test_without_a_tumour_there_are_no_labels() -> None:
    grid = Geometry((4, 4, 4), np.eye(4))
    healthy = np.stack([np.ones((4, 4, 4)), np.zeros((4, 4, 4))]).astype(np.float32)
    assert not LabelSampler(healthy, grid, np.eye(4), (0, 1)).native(grid).any()
