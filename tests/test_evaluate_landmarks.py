"""Landmark files of BraTS-Reg, written here, and errors under a known transform."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jrs.errors import BadDataError, MissingInputError
from jrs.evaluate.landmarks import landmark_errors, read_landmarks
from jrs.evaluate.transforms import FieldTransform, warp_image, warp_labels
from jrs.fields import DisplacementField
from jrs.geometry import Geometry
from jrs.runtime.transform import Transform
from jrs.volume import Volume

# The BraTS grid: ITK's origin is 0, -239, 0 and its direction the identity.
BRATS = Geometry((240, 240, 155), np.array([[-1, 0, 0, 0], [0, -1, 0, 239], [0, 0, 1, 0], [0, 0, 0, 1]]))


def write(path: Path, rows: str) -> Path:
    path.write_text("Landmark,X,Y,Z\n" + rows, encoding="utf-8")
    return path


def test_bratsreg_coordinates_are_itks(tmp_path: Path) -> None:
    import SimpleITK as sitk

    points = read_landmarks(write(tmp_path / "a_landmarks.csv", "1,116,-123,62\n2,80.5,-40,100\n"), BRATS)
    image = sitk.Image(240, 240, 155, sitk.sitkUInt8)
    image.SetOrigin((0.0, -239.0, 0.0))
    for name, physical in (("1", (116, -123, 62)), ("2", (80.5, -40, 100))):
        index = image.TransformPhysicalPointToContinuousIndex(physical)
        assert BRATS.to_voxels(points[name]) == pytest.approx(index)


@pytest.mark.parametrize(
    ("space", "row"), [("ras", "7,-116,123,62"), ("voxel", "7,116,116,62"), ("lps", "7,116,-123,62")]
)
def test_one_point_in_three_spaces(tmp_path: Path, space: Any, row: str) -> None:
    points = read_landmarks(write(tmp_path / "p.csv", row + "\n"), BRATS, space)
    assert points["7"] == pytest.approx([-116, 123, 62])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Landmark,X,Y\n1,2,3\n", "Landmark,X,Y,Z"),
        ("Landmark,X,Y,Z\n", "one row a landmark"),
        ("Landmark,X,Y,Z\n1,2,-3,4\n1,5,-6,7\n", "a name of its own"),
        ("Landmark,X,Y,Z\n1,2,x,4\n", "Landmark,X,Y,Z"),
        ("Landmark,X,Y,Z\n1,2,nan,4\n", "finite"),
        ("Landmark,X,Y,Z\n1,116,123,62\n", "--landmark-space"),
        ("", "Landmark,X,Y,Z"),
    ],
)
def test_bad_files_say_what_is_wrong(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "bad.csv").write_text(text, encoding="utf-8")
    with pytest.raises(BadDataError, match=message) as caught:
        read_landmarks(tmp_path / "bad.csv", BRATS)
    assert "bad.csv" in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(MissingInputError, match=r"none\.csv"):
        read_landmarks(tmp_path / "none.csv", BRATS)


def test_errors_are_distances_in_the_moving_image(helpers: Any) -> None:
    matrix = np.eye(4)
    matrix[:3, :3] = helpers.rotation((5.0, -4.0, 10.0))
    matrix[:3, 3] = (3.0, -6.0, 2.0)
    fixed = {str(i): p for i, p in enumerate(np.random.default_rng(2).normal(0, 30, (6, 3)))}
    offset = np.array([0.0, 3.0, 4.0])
    moving = {name: matrix[:3, :3] @ p + matrix[:3, 3] + offset for name, p in fixed.items()}
    moving |= {"5": matrix[:3, :3] @ fixed["5"] + matrix[:3, 3], "only here": np.zeros(3)}
    after, before = landmark_errors(Transform(matrix, None), moving, fixed)
    assert after == pytest.approx([5.0, 5.0, 5.0, 5.0, 5.0, 0.0], abs=1e-9)
    assert before == pytest.approx([np.linalg.norm(fixed[n] - moving[n]) for n in fixed])
    assert landmark_errors(Transform(matrix, None), {}, fixed)[0].size == 0


# Fields of other programs ---------------------------------------------------------------------------------


@pytest.fixture
def field(helpers: Any) -> DisplacementField:
    """A smooth field of some mm on an oblique grid."""
    shape = (30, 26, 24)
    affine = helpers.grid_affine(shape, (2.0, 2.2, 2.4), "LPS", (5.0, -3.0, 8.0), (4.0, 2.0, -3.0))
    x, y, z = helpers.world_points(affine, shape)
    vectors = np.stack([3 * np.sin(y / 20), 2 * np.cos(x / 25), 1.5 * np.sin(z / 15 + 1)]).astype(np.float32)
    return DisplacementField(vectors, Geometry(shape, affine))


def test_a_field_is_applied_as_simpleitk_applies_it(field: DisplacementField, helpers: Any, tmp_path: Path) -> None:
    import SimpleITK as sitk

    from jrs.itk import save_field

    shape = (32, 30, 28)
    affine = helpers.grid_affine(shape, (2.1, 2.0, 2.2), "RAS")
    points = helpers.world_points(affine, shape)
    image = helpers.head(points).astype(np.float32)
    labels = (points[0] > 0) * 1 + (points[1] > 4) * 2
    save_field(tmp_path / "field.nii", field)
    transform = sitk.DisplacementFieldTransform(sitk.ReadImage(str(tmp_path / "field.nii"), sitk.sitkVectorFloat64))
    target = helpers.sitk_image(np.zeros(field.geometry.shape, np.float32), field.geometry.affine)
    geometry = Geometry(shape, affine)
    for data, interpolator, ours in (
        (image, sitk.sitkLinear, warp_image(Volume(image, geometry), field)),
        (labels.astype(np.int32), sitk.sitkNearestNeighbor, warp_labels(Volume(labels, geometry), field)),
    ):
        moving = helpers.sitk_image(data, affine)
        theirs = helpers.sitk_array(sitk.Resample(moving, target, transform, interpolator, 0.0))
        # Rounding decides at half voxels and at the image's border.
        assert (np.abs(ours - theirs) < 0.05).mean() > 0.999


def test_a_field_maps_points_and_other_grids_alike(field: DisplacementField) -> None:
    transform = FieldTransform(field)
    assert transform.dense(field.geometry) is field
    index = np.array([[8, 9, 10], [20, 15, 12]])
    points = field.geometry.to_ras(index)
    vectors = np.array([field.vectors_mm[:, i, j, k] for i, j, k in index])
    assert transform.points(points) == pytest.approx(points + vectors, abs=1e-4)
    fine = field.geometry.refined((2, 1, 1))
    dense = transform.dense(fine)
    there = fine.to_ras([[16, 9, 10]])
    assert dense.vectors_mm[:, 16, 9, 10] == pytest.approx((transform.points(there) - there)[0], abs=1e-4)
