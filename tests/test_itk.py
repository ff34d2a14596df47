"""What SimpleITK makes of our files and we of its: the only place where LPS exists."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from jrs.errors import BadDataError, MissingInputError
from jrs.fields import DisplacementField
from jrs.geometry import Geometry
from jrs.itk import load_affine, load_field, save_affine, save_field

sitk = pytest.importorskip("SimpleITK")

SHAPE = (12, 10, 9)
LPS = np.array([-1.0, -1.0, 1.0])


@pytest.fixture
def grid(helpers: Any) -> Geometry:
    """Oblique, anisotropic, LAS."""
    return Geometry(SHAPE, helpers.grid_affine(SHAPE, (1.5, 2.0, 3.0), "LAS", (12, -20, 30), (5, -7, 11)))


@pytest.fixture
def field(grid: Geometry, helpers: Any) -> DisplacementField:
    """All three components vary along all three axes."""
    x, y, z = helpers.world_points(grid.affine, SHAPE)
    vectors = np.stack(
        [5 + 3 * np.sin(0.2 * x - 0.1 * y), -2 + 2 * np.cos(0.15 * y + 0.2 * z), 1 + 4 * np.sin(0.1 * x + 0.25 * z)]
    )
    return DisplacementField(vectors.astype(np.float32), grid)


def inner_points(count: int = 200) -> np.ndarray:
    """Voxel indices (n,3) within the grid."""
    return np.random.default_rng(0).uniform(0, 1, (count, 3)) * (np.array(SHAPE) - 1)


def reason(call: Any, *arguments: Any, error: type[Exception] = BadDataError) -> str:
    """The one-line message of a refusal."""
    with pytest.raises(error) as caught:
        call(*arguments)
    message = str(caught.value)
    assert type(caught.value) is error
    assert "\n" not in message
    assert str(arguments[0]) in message
    return message


# Displacement fields --------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", [".nii.gz", ".nii"])
def test_simpleitk_moves_points_as_the_field_says(
    tmp_path: Path, grid: Geometry, field: DisplacementField, ending: str
) -> None:
    path = tmp_path / f"field{ending}"
    save_field(path, field)
    transform = sitk.DisplacementFieldTransform(sitk.ReadImage(str(path), sitk.sitkVectorFloat64))
    voxels = inner_points()
    points = nib.affines.apply_affine(grid.affine, voxels)
    vectors = np.stack([ndimage.map_coordinates(c, voxels.T, order=1) for c in field.vectors_mm.astype(float)], axis=1)
    got = np.array([transform.TransformPoint(p) for p in (points * LPS).tolist()]) * LPS
    np.testing.assert_allclose(got, points + vectors, atol=1e-3)
    assert np.linalg.norm(vectors, axis=1).min() > 1.0


def test_simpleitk_finds_the_grid(tmp_path: Path, grid: Geometry, field: DisplacementField, helpers: Any) -> None:
    save_field(tmp_path / "field.nii.gz", field)
    image = sitk.ReadImage(str(tmp_path / "field.nii.gz"))
    want = helpers.sitk_image(np.zeros(SHAPE, dtype=np.float32), grid.affine)
    assert image.GetDimension() == 3 and image.GetNumberOfComponentsPerPixel() == 3
    assert image.GetSize() == SHAPE
    np.testing.assert_allclose(image.GetOrigin(), want.GetOrigin(), atol=1e-4)
    np.testing.assert_allclose(image.GetSpacing(), want.GetSpacing(), rtol=1e-6)
    np.testing.assert_allclose(image.GetDirection(), want.GetDirection(), atol=1e-6)


def test_the_header_is_the_form_that_every_program_reads(tmp_path: Path, field: DisplacementField) -> None:
    save_field(tmp_path / "field.nii.gz", field)
    image = nib.load(tmp_path / "field.nii.gz")
    header = image.header
    assert image.shape == (*SHAPE, 1, 3)
    assert int(header["intent_code"]) == 1007
    assert header.get_data_dtype() == np.dtype("<f4")
    assert header.get_xyzt_units()[0] == "mm"
    qform, qcode = header.get_qform(coded=True)
    sform, scode = header.get_sform(coded=True)
    assert qcode == scode > 0
    np.testing.assert_allclose(qform, sform, atol=1e-4)
    np.testing.assert_allclose(sform, field.geometry.affine, atol=1e-4)
    np.testing.assert_allclose(header.get_zooms()[:3], field.geometry.spacing, rtol=1e-6)
    assert header.get_slope_inter() in ((1.0, 0.0), (None, None))
    # The vectors are LPS, rounded to less than a micrometre.
    raw = np.asarray(image.dataobj)[:, :, :, 0, :]
    want = np.moveaxis(field.vectors_mm, 0, -1) * LPS
    np.testing.assert_allclose(raw, want, atol=2.5e-4 + 1e-6)


def test_a_field_survives_its_file(tmp_path: Path, field: DisplacementField) -> None:
    save_field(tmp_path / "field.nii.gz", field)
    back = load_field(tmp_path / "field.nii.gz")
    assert back.geometry.is_close_to(field.geometry)
    assert back.vectors_mm.dtype == np.float32
    np.testing.assert_allclose(back.vectors_mm, field.vectors_mm, atol=2.5e-4 + 1e-6)


def test_a_sheared_grid_has_no_qform(tmp_path: Path, grid: Geometry, field: DisplacementField) -> None:
    sheared = grid.affine.copy()
    sheared[:3, 1] += 0.3 * sheared[:3, 0]
    save_field(tmp_path / "field.nii.gz", DisplacementField(field.vectors_mm, Geometry(SHAPE, sheared)))
    header = nib.load(tmp_path / "field.nii.gz").header
    assert int(header["qform_code"]) == 0
    np.testing.assert_allclose(header.get_sform(), sheared, atol=1e-4)
    np.testing.assert_allclose(load_field(tmp_path / "field.nii.gz").geometry.affine, sheared, atol=1e-4)


def test_a_field_written_by_simpleitk_is_read(tmp_path: Path, grid: Geometry, helpers: Any) -> None:
    lps = np.random.default_rng(4).normal(size=(*SHAPE, 3))
    image = sitk.GetImageFromArray(np.ascontiguousarray(lps.transpose(2, 1, 0, 3)), isVector=True)
    image.CopyInformation(helpers.sitk_image(np.zeros(SHAPE), grid.affine))
    sitk.WriteImage(image, str(tmp_path / "theirs.nii.gz"))
    field = load_field(tmp_path / "theirs.nii.gz")
    np.testing.assert_allclose(field.vectors_mm, np.moveaxis(lps * LPS, -1, 0), atol=1e-5)
    assert field.geometry.is_close_to(grid)


@pytest.mark.parametrize(
    ("shape", "intent"),
    [
        ((*SHAPE, 1, 3), 1006),
        ((*SHAPE, 1, 3), 0),
        ((*SHAPE, 3), 1007),
        ((*SHAPE, 1, 2), 1007),
        ((*SHAPE, 2, 3), 1007),
        (SHAPE, 0),
    ],
    ids=str,
)
def test_other_forms_are_refused(tmp_path: Path, grid: Geometry, shape: tuple[int, ...], intent: int) -> None:
    image = nib.Nifti1Image(np.ones(shape, dtype=np.float32), grid.affine)
    image.header["intent_code"] = intent
    nib.save(image, tmp_path / "field.nii.gz")
    message = reason(load_field, tmp_path / "field.nii.gz")
    assert "1007" in message and str(shape) in message


def test_files_that_are_no_fields_are_refused(tmp_path: Path, field: DisplacementField) -> None:
    path = tmp_path / "field.nii.gz"
    save_field(path, field)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    reason(load_field, path)
    path.write_bytes(gzip.compress(b"no image at all" * 100))
    reason(load_field, path)
    path.write_bytes(b"")
    reason(load_field, path)
    reason(load_field, tmp_path / "absent.nii.gz", error=MissingInputError)
    reason(load_field, tmp_path, error=MissingInputError)


# Affines --------------------------------------------------------------------------------------------------


@pytest.fixture
def matrix(helpers: Any) -> np.ndarray:
    """A, RAS mm."""
    matrix = np.eye(4)
    matrix[:3, :3] = helpers.rotation((10, -20, 15)) @ np.array([[1.1, 0.05, 0], [0, 0.9, -0.1], [0.02, 0, 1.05]])
    matrix[:3, 3] = (12.5, -30.25, 7.75)
    return matrix


def cloud() -> np.ndarray:
    return np.random.default_rng(1).uniform(-100, 100, (50, 3))


def theirs(transform: Any, points_ras: np.ndarray) -> np.ndarray:
    """SimpleITK's own answer, RAS in, RAS out."""
    return np.array([transform.TransformPoint(p) for p in (points_ras * LPS).tolist()]) * LPS


@pytest.mark.parametrize("ending", [".txt", ".tfm"])
def test_simpleitk_reads_our_affine(tmp_path: Path, matrix: np.ndarray, ending: str) -> None:
    path = tmp_path / f"a{ending}"
    save_affine(path, matrix)
    transform = sitk.ReadTransform(str(path))
    np.testing.assert_allclose(theirs(transform, cloud()), nib.affines.apply_affine(matrix, cloud()), atol=1e-9)
    np.testing.assert_allclose(load_affine(path), matrix, atol=1e-12)


@pytest.mark.parametrize("ending", [".txt", ".tfm"])
@pytest.mark.parametrize("center", [(0.0, 0.0, 0.0), (30.0, -45.5, 60.25)])
def test_we_read_simpleitks_affine(tmp_path: Path, matrix: np.ndarray, ending: str, center: Any) -> None:
    transform = sitk.AffineTransform(3)
    transform.SetMatrix(matrix[:3, :3].ravel().tolist())
    transform.SetTranslation((3.0, -4.0, 5.5))
    transform.SetCenter(center)
    path = tmp_path / f"a{ending}"
    sitk.WriteTransform(transform, str(path))
    got = nib.affines.apply_affine(load_affine(path), cloud())
    np.testing.assert_allclose(got, theirs(transform, cloud()), atol=1e-8)


def test_an_affine_as_ants_writes_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "ants.txt"
    path.write_text(
        "#Insight Transform File V1.0\n# Transform 0\nTransform: MatrixOffsetTransformBase_double_3_3\n"
        "Parameters: 0 -1 0 1 0 0 0 0 1 10 20 30\nFixedParameters: 1 2 3\n\n",
        encoding="utf-8",
    )
    # In LPS: y = M (x - c) + c + t, by hand for x = (5, 6, 7): M (4, 4, 4) = (-4, 4, 4); + c + t.
    want_lps = np.array([-4 + 1 + 10, 4 + 2 + 20, 4 + 3 + 30])
    got = nib.affines.apply_affine(load_affine(path), np.array([5, 6, 7]) * LPS)
    np.testing.assert_allclose(got, want_lps * LPS, atol=1e-12)


@pytest.mark.parametrize(
    "transform",
    [
        sitk.Euler3DTransform((1.0, 2.0, 3.0), 0.1, 0.2, 0.3, (4.0, 5.0, 6.0)),
        sitk.VersorRigid3DTransform((0, 0, 1), 0.3, (4.0, 5.0, 6.0)),
        sitk.TranslationTransform(3, (1.0, 2.0, 3.0)),
        sitk.AffineTransform(2),
    ],
    ids=lambda t: t.GetName(),
)
def test_transforms_that_are_no_3d_affine_are_refused(tmp_path: Path, transform: Any) -> None:
    """Rigid ones as well: the message says what to give instead."""
    path = tmp_path / "other.tfm"
    sitk.WriteTransform(transform, str(path))
    assert "affine" in reason(load_affine, path)


def test_a_chain_of_transforms_is_refused_or_composed(tmp_path: Path, matrix: np.ndarray) -> None:
    one = sitk.AffineTransform(matrix[:3, :3].ravel().tolist(), (1.0, 2.0, 3.0))
    two = sitk.AffineTransform(np.diag([1.2, 0.9, 1.0]).ravel().tolist(), (-10.0, 0.0, 5.0))
    chain = sitk.CompositeTransform([one, two])
    path = tmp_path / "chain.tfm"
    sitk.WriteTransform(chain, str(path))
    try:
        loaded = load_affine(path)
    except BadDataError:
        return
    np.testing.assert_allclose(nib.affines.apply_affine(loaded, cloud()), theirs(chain, cloud()), atol=1e-6)


GOOD = "#Insight Transform File V1.0\n#Transform 0\nTransform: AffineTransform_double_3_3\n"
IDENTITY = "Parameters: 1 0 0 0 1 0 0 0 1 0 0 0\n"


def test_the_damaged_files_below_are_damaged_by_one_thing_only(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(GOOD + IDENTITY + "FixedParameters: 0 0 0\n", encoding="utf-8")
    np.testing.assert_array_equal(load_affine(tmp_path / "a.txt"), np.eye(4))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "not a transform",
        GOOD,
        GOOD + "Parameters: 1 0 0 0 1 0 0 0 1 0 0\nFixedParameters: 0 0 0\n",
        GOOD + "Parameters: 1 0 0 0 1 0 0 0 1 0 0 x\nFixedParameters: 0 0 0\n",
        GOOD + "Parameters: 1 0 0 0 1 0 0 0 1 0 0 nan\nFixedParameters: 0 0 0\n",
        GOOD + IDENTITY + "FixedParameters: 0 0\n",
        GOOD + "Parameters: 1 0 0 0 1 0 0 0 0 0 0 0\nFixedParameters: 0 0 0\n",
        IDENTITY + "FixedParameters: 0 0 0\n",
    ],
    ids=["empty", "text", "no numbers", "eleven", "letter", "nan", "short centre", "singular", "no type"],
)
def test_damaged_files_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.txt"
    path.write_text(text, encoding="utf-8")
    reason(load_affine, path)


def test_a_centre_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text(GOOD + IDENTITY + "FixedParameters: nan 0 0\n", encoding="utf-8")
    reason(load_affine, path)


def test_a_binary_file_and_no_file_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.mat"
    path.write_bytes(bytes(range(256)))
    reason(load_affine, path)
    reason(load_affine, tmp_path / "absent.txt", error=MissingInputError)
    reason(load_affine, tmp_path, error=MissingInputError)
