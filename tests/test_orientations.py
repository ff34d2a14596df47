"""One case stored in every way: the labels are the same voxels and the field the same millimetres."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from jrs.geometry import Geometry
from jrs.runtime.pipeline import Pipeline
from jrs.runtime.results import Result

pytest.importorskip("SimpleITK")
pytest.importorskip("torch")  # makes the tiny bundle

ORIENTATIONS = [
    "".join(letters)
    for order in itertools.permutations(("RL", "AP", "SI"))
    for letters in itertools.product(*order)
]
FIELD_MM = 1e-3


@pytest.fixture(scope="module")
def pipeline(tiny_bundle: Path) -> Iterator[Pipeline]:
    with Pipeline.open(tiny_bundle, "ort-cpu", threads=1) as opened:
        yield opened


@pytest.fixture(scope="module")
def as_stored(pipeline: Pipeline, phantom: Any) -> Result:
    """The phantom's T1, oblique LPS, through the whole way, its affine found."""
    result = pipeline.infer(phantom.folder / "case7_t1.nii.gz", phantom.atlas)
    assert result.labels_native is not None and len(np.unique(result.labels_native)) > 2
    assert np.abs(result.field.vectors_mm).max() > 5.0
    return result


def check(result: Result, expected: Result, helpers: Any) -> None:
    """Labels voxel by voxel after mapping back, both fields to a micrometre."""
    assert result.labels_native is not None and expected.labels_native is not None
    codes = expected.native.orientation
    back, affine = helpers.stored_as(result.labels_native, np.asarray(result.native.affine), codes)
    np.testing.assert_allclose(affine, expected.native.affine, atol=1e-3)
    np.testing.assert_array_equal(back, expected.labels_native)
    assert result.labels_moved is not None and expected.labels_moved is not None
    np.testing.assert_array_equal(result.labels_moved, expected.labels_moved)
    np.testing.assert_allclose(result.field.vectors_mm, expected.field.vectors_mm, atol=FIELD_MM)
    assert result.inverse_field is not None and expected.inverse_field is not None
    for got, want in zip(result.inverse_field.vectors_mm, expected.inverse_field.vectors_mm, strict=True):
        turned = helpers.stored_as(got, np.asarray(result.native.affine), codes)[0]
        # Where the field nearly folds its inverse is steep; elsewhere it is as good as the field.
        assert (np.abs(turned - want) < FIELD_MM).mean() > 0.999


@pytest.mark.slow
@pytest.mark.parametrize("codes", ORIENTATIONS)
def test_every_orientation_gives_the_same(
    pipeline: Pipeline, phantom: Any, as_stored: Result, helpers: Any, tmp_path: Path, codes: str
) -> None:
    """Through files: NIfTI keeps the affine in single precision, so that each lies micrometres elsewhere."""
    image = phantom.image("t1")
    data, affine = helpers.stored_as(np.asarray(image.dataobj), image.affine, codes)
    path = helpers.write_image(tmp_path / "case7_t1.nii.gz", data, affine)
    check(pipeline.infer(path, phantom.atlas), as_stored, helpers)


@pytest.mark.slow
@pytest.mark.parametrize("codes", ["RAS", "SPL"])
def test_the_atlas_may_be_stored_in_any_way_too(
    pipeline: Pipeline, phantom: Any, as_stored: Result, helpers: Any, tmp_path: Path, codes: str
) -> None:
    atlas = nib.load(phantom.atlas)
    path = helpers.write_image(
        tmp_path / "phantom_atlas.nii.gz", *helpers.stored_as(np.asarray(atlas.dataobj), atlas.affine, codes)
    )
    result = pipeline.infer(phantom.folder / "case7_t1.nii.gz", path)
    np.testing.assert_array_equal(result.labels_native, as_stored.labels_native)
    for got, want in zip(result.field.vectors_mm, as_stored.field.vectors_mm, strict=True):
        turned = helpers.stored_as(got, np.asarray(result.fixed.geometry.affine), "LAS")[0]
        np.testing.assert_allclose(turned, want, atol=FIELD_MM)


# Forms of one file ----------------------------------------------------------------------------------------


def write(path: Path, data: np.ndarray, affine: np.ndarray, form: str) -> Path:
    if form == "mgz":
        nib.save(nib.MGHImage(data, affine), path.with_name("case7_t1.mgz"))
        return path.with_name("case7_t1.mgz")
    kind: Any = nib.Nifti2Image if form == "nifti2" else nib.Nifti1Image
    header = kind.header_class(endianness=">") if form == "big-endian" else None
    image = kind(data[..., None] if form == "4-D" else data, affine, header)
    image.set_sform(affine, code=1)
    image.set_qform(affine, code=1)
    path = path.with_name("case7_t1.nii" if form == "plain" else "case7_t1.nii.gz")
    nib.save(image, path)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("form", ["plain", "gz", "4-D", "big-endian", "nifti2", "mgz"])
def test_every_form_of_a_file_gives_the_same(
    pipeline: Pipeline, phantom: Any, as_stored: Result, helpers: Any, tmp_path: Path, form: str
) -> None:
    image = phantom.image("t1")
    path = write(tmp_path / "case7_t1", np.asarray(image.dataobj), image.affine, form)
    if form == "big-endian":
        assert nib.load(path).header.endianness == ">"
    check(pipeline.infer(path, phantom.atlas), as_stored, helpers)


# Other grids ----------------------------------------------------------------------------------------------

GRIDS = {
    "thick slices": ((80, 84, 22), (1.6, 1.7, 6.0), "LPS", (0, 0, 0), None),
    "fine": ((140, 150, 22), (0.9, 0.9, 6.0), "SAR", (4, -6, 3), None),
    "oblique": ((44, 46, 42), (3.0, 3.1, 3.0), "PIR", (25, -20, 30), None),
    "sheared": ((44, 46, 42), (3.0, 3.1, 3.0), "LAS", (3, 2, 1), np.array([[1, 0.25, 0], [0, 1, 0.15], [0, 0, 1.0]])),
    "large view": ((90, 80, 100), (3.0, 3.0, 3.0), "RAS", (5, 0, 0), None),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", GRIDS)
def test_another_grid_shows_the_same_head(
    pipeline: Pipeline, phantom: Any, as_stored: Result, helpers: Any, tmp_path: Path, name: str
) -> None:
    """The same head sampled otherwise: the affine is the same to a voxel, and the labels where both have voxels."""
    shape, spacing, codes, degrees, shear = GRIDS[name]
    affine = helpers.grid_affine(shape, spacing, codes, degrees, (5.0, -9.0, 4.0))
    if shear is not None:
        middle = (np.array(shape) - 1) / 2
        center = nib.affines.apply_affine(affine, middle)
        affine[:3, :3] = affine[:3, :3] @ shear
        affine[:3, 3] = center - affine[:3, :3] @ middle
    points = helpers.world_points(np.linalg.inv(phantom.truth) @ affine, shape)
    image = nib.Nifti1Image(helpers.head(points).astype(np.float32), affine)
    image.set_sform(affine, code=1)
    image.set_qform(None, code=0)
    nib.save(image, tmp_path / "case7_t1.nii.gz")
    result = pipeline.infer(tmp_path / "case7_t1.nii.gz", phantom.atlas)
    corners = Geometry((2, 2, 2), np.diag([80.0, 90.0, 70.0, 1.0])).corners() - np.array([40.0, 45.0, 35.0])
    gap = nib.affines.apply_affine(result.transform.affine - as_stored.transform.affine + np.eye(4), corners) - corners
    assert np.linalg.norm(gap, axis=1).mean() < 1.5
    assert result.labels_native is not None and result.labels_native.shape == shape
    expected = as_stored.volumes_ml
    assert result.volumes_ml is not None and expected is not None
    assert result.volumes_ml["moved"]["WT"] == pytest.approx(expected["moved"]["WT"], rel=0.35)
    if shear is not None:
        assert any("sheared" in warning for warning in result.warnings)
