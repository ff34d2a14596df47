"""Transforms in files, against the programs whose files they are: SimpleITK, ANTs, nitransforms, fslpy."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from jrs.errors import BadDataError, JrsError, MissingInputError, UsageError
from jrs.fields import DisplacementField
from jrs.geometry import Geometry
from jrs.runtime.chain import Chain
from jrs.runtime.transform_files import load_affine, load_chain, load_transform, save_fsl, save_transform
from jrs.transforms import Affine

sitk = pytest.importorskip("SimpleITK")

SHAPE = (20, 22, 18)
LPS = np.array([-1.0, -1.0, 1.0])


def bend(points: np.ndarray) -> np.ndarray:
    x, y, z = np.moveaxis(points, -1, 0)
    return np.stack([4 * np.sin(0.05 * y), 3 * np.cos(0.06 * z), 5 * np.sin(0.04 * x + 0.05 * y)], axis=-1)


@pytest.fixture
def grid(helpers: Any) -> Geometry:
    return Geometry(SHAPE, helpers.grid_affine(SHAPE, (3.0, 4.0, 3.5), "LAS", (8, -12, 15), (4, -6, 9)))


@pytest.fixture
def affine(helpers: Any) -> Affine:
    return Affine.of_parts(helpers.rotation((10, -8, 12)) @ np.diag([1.1, 0.9, 1.05]), (12, -9, 7))


@pytest.fixture
def chain(grid: Geometry, affine: Affine, helpers: Any) -> Chain:
    points = helpers.world_points(grid.affine, SHAPE)
    vectors = np.moveaxis(bend(np.moveaxis(points, 0, -1)), -1, 0).astype(np.float32)
    return Chain((DisplacementField(vectors, grid), affine))


@pytest.fixture
def cloud(grid: Geometry) -> np.ndarray:
    return grid.center + np.random.default_rng(0).uniform(-50, 50, (200, 3))


def theirs(transform: Any, points: np.ndarray) -> np.ndarray:
    return np.array([transform.TransformPoint(p) for p in (points * LPS).tolist()]) * LPS


# ITK ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", [".h5", ".hdf5"])
def test_simpleitk_reads_our_composite_and_we_do(tmp_path: Path, chain: Chain, cloud: np.ndarray, ending: str) -> None:
    path = tmp_path / f"xfm{ending}"
    save_transform(path, chain)
    want = theirs(sitk.ReadTransform(str(path)), cloud)
    np.testing.assert_allclose(want, chain.points(cloud), atol=1e-3)
    again = load_transform(path)
    np.testing.assert_allclose(again.points(cloud), want, atol=1e-3)
    assert [type(step) for step in again.steps] == [DisplacementField, Affine]
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_we_read_simpleitks_composites_of_any_depth(tmp_path: Path, chain: Chain, cloud: np.ndarray) -> None:
    save_transform(tmp_path / "inner.h5", chain)
    inner = sitk.CompositeTransform(sitk.ReadTransform(str(tmp_path / "inner.h5")))
    parts = [
        sitk.Euler3DTransform((1.0, 2.0, 3.0), 0.1, 0.2, 0.3, (4.0, 5.0, 6.0)),
        sitk.VersorRigid3DTransform((0, 0, 1), 0.3, (4.0, 5.0, 6.0), (9.0, 8.0, 7.0)),
        sitk.TranslationTransform(3, (1.0, 2.0, 3.0)),
        sitk.Similarity3DTransform(1.1, (0, 1, 0), 0.2, (1.0, 0.0, 2.0), (3.0, 2.0, 1.0)),
        sitk.ScaleTransform(3, (1.1, 0.9, 1.2)),
    ]
    nested = sitk.CompositeTransform([parts[0], inner, parts[2]])
    nested.FlattenTransform()  # as ITK's files need it
    for name, transform in (
        ("nested.h5", nested),
        ("linear.h5", sitk.CompositeTransform(parts)),
        ("linear.tfm", sitk.CompositeTransform(parts)),
    ):
        path = tmp_path / name
        sitk.WriteTransform(transform, str(path))
        np.testing.assert_allclose(load_transform(path).points(cloud), theirs(transform, cloud), atol=1e-3)
    np.testing.assert_allclose(
        nib.affines.apply_affine(load_affine(tmp_path / "linear.tfm"), cloud), theirs(transform, cloud), atol=1e-8
    )


@pytest.mark.parametrize("ending", [".mat", ".txt", ".tfm", ".h5"])
def test_affines_in_every_form(tmp_path: Path, affine: Affine, cloud: np.ndarray, ending: str) -> None:
    path = tmp_path / f"a{ending}"
    save_transform(path, Chain((affine,)))
    np.testing.assert_allclose(theirs(sitk.ReadTransform(str(path)), cloud), affine.points(cloud), atol=1e-9)
    np.testing.assert_allclose(load_affine(path), affine.matrix, atol=1e-9)


def test_a_field_file_is_the_whole_chain(tmp_path: Path, chain: Chain, grid: Geometry, cloud: np.ndarray) -> None:
    path = tmp_path / "xfm.nii.gz"
    save_transform(path, chain, grid)
    transform = sitk.DisplacementFieldTransform(sitk.ReadImage(str(path), sitk.sitkVectorFloat64))
    np.testing.assert_allclose(load_transform(path).points(cloud), theirs(transform, cloud), atol=1e-3)
    voxels = grid.to_ras(np.array([[3, 4, 5], [10, 2, 8], [17, 19, 15]]))
    np.testing.assert_allclose(load_transform(path).points(voxels), chain.points(voxels), atol=1e-3)


def test_an_inverse_is_written_on_a_grid(tmp_path: Path, chain: Chain, grid: Geometry) -> None:
    for name in ("inverse.h5", "inverse.nii.gz"):
        save_transform(tmp_path / name, chain.inverse(), grid)
        points = grid.to_ras(np.array([[8, 9, 7], [10, 12, 8], [12, 10, 9]]))
        reached = load_transform(tmp_path / name).points(chain.points(points))
        assert np.abs(reached - points).max() < 0.3  # interpolated on 4 mm
    with pytest.raises(UsageError, match="--reference"):
        save_transform(tmp_path / "b.h5", chain.inverse())
    assert not (tmp_path / "b.h5").exists()


# Order and spelling ---------------------------------------------------------------------------------------


def test_transforms_are_named_in_ants_order(tmp_path: Path, chain: Chain, grid: Geometry, cloud: np.ndarray) -> None:
    field, affine = chain.steps
    save_transform(tmp_path / "1Warp.nii.gz", Chain((field,)), grid)
    save_transform(tmp_path / "0GenericAffine.mat", Chain((affine,)))
    names = [str(tmp_path / "1Warp.nii.gz"), str(tmp_path / "0GenericAffine.mat")]
    np.testing.assert_allclose(load_chain(names).points(cloud), chain.points(cloud), atol=1e-3)
    there_and_back = load_chain([*names, f"[{names[1]},1]", "identity", f"[{names[0]}, 1]"])
    inner = grid.center + np.random.default_rng(1).uniform(-15, 15, (50, 3))
    np.testing.assert_allclose(there_and_back.points(inner), inner, atol=3e-3)
    back = load_chain(names, inverse=True)
    np.testing.assert_allclose(back.points(chain.points(inner)), inner, atol=3e-3)
    for wrong in ("[a.mat]", "[a.mat,2]"):
        with pytest.raises(UsageError, match="FILE,1"):
            load_chain([wrong])


# Other readers --------------------------------------------------------------------------------------------


def test_nitransforms_reads_our_files(tmp_path: Path, chain: Chain, grid: Geometry, helpers: Any) -> None:
    """An oblique LAS image through all three: the same moved image."""
    resampling = pytest.importorskip("nitransforms.resampling")
    nonlinear = pytest.importorskip("nitransforms.nonlinear")
    shape = (24, 26, 22)
    native = helpers.grid_affine(shape, (3.2, 3.0, 3.6), "LAS", (5, 4, -8), tuple(chain.points([grid.center])[0]))
    data = helpers.head(helpers.world_points(native, shape) - chain.points([grid.center]).reshape(3, 1, 1, 1))
    image = helpers.write_image(tmp_path / "native.nii.gz", data.astype(np.float32), native)
    reference = helpers.write_image(tmp_path / "ref.nii.gz", np.zeros(SHAPE, np.float32), grid.affine)
    field = tmp_path / "xfm.nii.gz"
    save_transform(field, chain, grid)
    transform = sitk.DisplacementFieldTransform(sitk.ReadImage(str(field), sitk.sitkVectorFloat64))
    want = helpers.sitk_array(sitk.Resample(sitk.ReadImage(str(image)), sitk.ReadImage(str(reference)), transform))
    loaded = nonlinear.DenseFieldTransform.from_filename(str(field), fmt="itk")
    moved = resampling.apply(loaded, nib.load(image), reference=str(reference), order=1, prefilter=False)
    got = np.asarray(moved.dataobj)
    inside = (want != 0) & (got != 0)
    assert inside.mean() > 0.3
    # One voxel around the border they treat differently.
    assert np.percentile(np.abs(got - want)[inside], 98) < 1e-2


def test_fslpy_reads_our_warp_and_matrix(tmp_path: Path, chain: Chain, grid: Geometry, helpers: Any) -> None:
    """Both signs of the determinant on either side: FSL turns x around where it is positive."""
    fnirt = pytest.importorskip("fsl.transform.fnirt")
    flirt = pytest.importorskip("fsl.transform.flirt")
    image_class = pytest.importorskip("fsl.data.image").Image
    points = grid.center + np.random.default_rng(5).uniform(-20, 20, (50, 3))
    for ref_codes, src_codes in (("LAS", "RAS"), ("RAS", "LAS"), ("LAS", "LAS"), ("PSR", "RIA")):
        ref = Geometry(SHAPE, helpers.grid_affine(SHAPE, (3.0, 4.0, 3.5), ref_codes, (8, -12, 15), tuple(grid.center)))
        shape = (24, 20, 21)
        src = Geometry(shape, helpers.grid_affine(shape, (2.5, 3.0, 4.0), src_codes, (3, 5, 7), (20, -10, 5)))
        files = [
            helpers.write_image(tmp_path / name, np.zeros(g.shape, np.float32), g.affine)
            for name, g in (("ref.nii.gz", ref), ("src.nii.gz", src))
        ]
        reference, source = (image_class(str(f)) for f in files)
        save_fsl(tmp_path / "warp.nii.gz", chain, src, ref)
        warp = fnirt.readFnirt(str(tmp_path / "warp.nii.gz"), source, reference)
        assert warp.deformationType == "relative"
        voxels = np.round(ref.to_voxels(points))
        at = ref.to_ras(voxels)
        got = warp.transform(at, "world", "world")
        np.testing.assert_allclose(got, chain.points(at), atol=2e-3)
        affine = chain.steps[1]
        assert isinstance(affine, Affine)
        save_fsl(tmp_path / "a.mat", Chain((affine,)), src, ref)
        matrix = flirt.fromFlirt(flirt.readFlirt(str(tmp_path / "a.mat")), source, reference, "world", "world")
        np.testing.assert_allclose(matrix @ affine.matrix, np.eye(4), atol=1e-5)


# Refusals -------------------------------------------------------------------------------------------------


def refusal(function: Any, *arguments: Any, error: type[Exception] = BadDataError) -> str:
    with pytest.raises(error) as caught:
        function(*arguments)
    message = str(caught.value)
    assert "\n" not in message and str(arguments[0]) in message and "; " in message
    return message


def test_what_is_no_transform_is_refused(
    tmp_path: Path, chain: Chain, capfd: pytest.CaptureFixture[str]
) -> None:
    refusal(load_transform, tmp_path / "absent.h5", error=MissingInputError)
    refusal(load_transform, tmp_path, error=MissingInputError)
    for name, content in (
        ("a.h5", b"\x89HDF\r\n\x1a\n damaged"),
        ("b.mat", bytes(range(256))),
        ("c.mat", b"1 0 0 0\n0 1 0 0\n0 0 1 0\n0 0 0 1\n"),
        ("d.nii.gz", b"\x1f\x8b damaged"),
        ("e", b""),
        ("f.tfm", b"#Insight Transform File V1.0\n#Transform 0\nTransform: Euler3DTransform_double_3_3\n"),
    ):
        path = tmp_path / name
        path.write_bytes(content)
        refusal(load_transform, path)
    assert "damaged or cut off" in refusal(load_transform, tmp_path / "a.h5")
    assert not capfd.readouterr().err  # HDF5 would print its whole call chain
    save_transform(tmp_path / "xfm.h5", chain)
    assert "affine" in refusal(load_affine, tmp_path / "xfm.h5")


def test_transforms_that_are_not_supported_say_so(tmp_path: Path) -> None:
    spline = sitk.BSplineTransformInitializer(sitk.Image(10, 10, 10, sitk.sitkFloat32), [3, 3, 3])
    for name, transform in (("b.tfm", spline), ("two.tfm", sitk.Euler2DTransform())):
        sitk.WriteTransform(transform, str(tmp_path / name))
        message = refusal(load_transform, tmp_path / name) if name == "b.tfm" else None
        if message is None:
            with pytest.raises(BadDataError, match="2-D"):
                load_transform(tmp_path / name)
        else:
            assert "BSpline" in message


def test_endings_that_cannot_hold_it_are_refused(tmp_path: Path, chain: Chain, grid: Geometry) -> None:
    for name in ("a.txt", "a.mat", "a.xyz", "a.nii.gz"):
        with pytest.raises(UsageError):
            save_transform(tmp_path / name, chain)
    for name in ("a.mat", "a.h5"):
        with pytest.raises(UsageError):
            save_fsl(tmp_path / name, chain, grid, grid)
    assert list(tmp_path.iterdir()) == []


def test_what_hdf5_prints_of_a_full_disk_is_not_shown(
    tmp_path: Path, chain: Chain, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def full(transform: Any, path: str) -> None:
        os.write(2, b"HDF5-DIAG: Error detected in HDF5\n")
        raise RuntimeError("no space left")

    monkeypatch.setattr(sitk, "WriteTransform", full)
    with pytest.raises(JrsError):
        save_transform(tmp_path / "xfm.h5", chain)
    os.write(2, b"shown again\n")
    assert capfd.readouterr().err == "shown again\n"
    assert not list(tmp_path.iterdir())
