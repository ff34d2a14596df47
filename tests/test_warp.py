"""``jrs warp`` and ``jrs convert-xfm`` against SimpleITK and ANTs: the same image, label map and points."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from jrs.cli.main import run
from jrs.fields import DisplacementField
from jrs.geometry import Geometry
from jrs.runtime.chain import Chain
from jrs.runtime.sampling import sample_labels
from jrs.runtime.transform_files import save_transform
from jrs.runtime.warp import warp_volumes
from jrs.transforms import Affine

sitk = pytest.importorskip("SimpleITK")

SHAPE = (26, 28, 24)
REFERENCE = (24, 22, 20)
LPS = np.array([-1.0, -1.0, 1.0])


def bend(points: np.ndarray) -> np.ndarray:
    x, y, z = np.moveaxis(points, -1, 0)
    return np.stack([5 * np.sin(0.05 * y), 4 * np.cos(0.06 * z), 6 * np.sin(0.04 * x + 0.05 * y)], axis=-1)


class Scene:
    """An oblique LAS image, a reference on another grid, and a bend behind an affine, all as files."""

    def __init__(self, folder: Path, helpers: Any) -> None:
        self.folder = folder
        self.affine = helpers.grid_affine(SHAPE, (3.0, 2.8, 3.4), "LAS", (8, -12, 15), (12, -8, 5))
        points = helpers.world_points(self.affine, SHAPE)
        self.data = helpers.head(points - np.array([12.0, -8, 5]).reshape(3, 1, 1, 1)).astype(np.float32)
        self.image = helpers.write_image(folder / "image.nii.gz", self.data, self.affine)
        self.labels_data = np.digitize(self.data, (20, 50, 80, 100, 120)).astype(np.uint8) * 7
        self.labels = helpers.write_image(folder / "labels.nii.gz", self.labels_data, self.affine)
        self.target = Geometry(
            REFERENCE, helpers.grid_affine(REFERENCE, (3.2, 3.6, 3.4), "PSR", (-4, 6, 3), (2, 3, -4))
        )
        self.reference = helpers.write_image(folder / "ref.nii.gz", np.ones(REFERENCE, np.float32), self.target.affine)
        grid_shape = (20, 20, 20)
        grid = Geometry(grid_shape, helpers.grid_affine(grid_shape, (6.0, 5.0, 5.0), "RAS", (3, 3, 3)))
        vectors = bend(np.moveaxis(helpers.world_points(grid.affine, grid_shape), 0, -1))
        matrix = Affine.of_parts(helpers.rotation((9, -7, 5)) @ np.diag([1.05, 0.95, 1.02]), (10, -9, 8))
        self.chain = Chain((DisplacementField(np.moveaxis(vectors, -1, 0).astype(np.float32), grid), matrix))
        self.warp, self.mat, self.h5 = folder / "1Warp.nii.gz", folder / "0GenericAffine.mat", folder / "xfm.h5"
        save_transform(self.warp, Chain(self.chain.steps[:1]), grid)
        save_transform(self.mat, Chain(self.chain.steps[1:]))
        save_transform(self.h5, self.chain)

    def simpleitk(self, file: Path, kind: int, outside: float = 0.0) -> np.ndarray:
        moving = sitk.ReadImage(str(file))
        reference = sitk.ReadImage(str(self.reference))
        transform = sitk.ReadTransform(str(self.h5))
        return sitk.GetArrayFromImage(sitk.Resample(moving, reference, transform, kind, outside)).transpose(2, 1, 0)

    def jrs(self, *arguments: Any, code: int = 0) -> Path:
        out = self.folder / f"out{len(list(self.folder.iterdir()))}.nii.gz"
        assert run(["warp", *map(str, arguments), "-r", str(self.reference), "-o", str(out)]) == code
        return out


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory, helpers: Any) -> Scene:
    return Scene(tmp_path_factory.mktemp("scene"), helpers)


def voxels(path: Path) -> np.ndarray:
    return np.asarray(nib.load(path).dataobj)


# Against other programs -----------------------------------------------------------------------------------


@pytest.mark.parametrize("outside", [0.0, -40.0])
@pytest.mark.parametrize(("name", "kind"), [("linear", sitk.sitkLinear), ("bspline", sitk.sitkBSpline3)])
def test_images_are_simpleitks(scene: Scene, name: str, kind: int, outside: float) -> None:
    want = scene.simpleitk(scene.image, kind, outside)
    out = scene.jrs(scene.image, "-t", scene.h5, "-n", name, "--outside", outside)
    got = voxels(out)
    assert got.dtype == np.float32
    np.testing.assert_allclose(nib.load(out).affine, scene.target.affine, atol=1e-4)
    # Within float rounding of the image's border a point may fall on either side.
    edge = (got == outside) != (want == outside)
    assert edge.mean() < 1e-3 and 0.02 < (want == outside).mean() < 0.9
    np.testing.assert_allclose(got[~edge], want[~edge], atol=1e-3 if name == "linear" else 5e-3)


@pytest.mark.parametrize(("name", "kind"), [("nearest", sitk.sitkNearestNeighbor), ("label", sitk.sitkLabelLinear)])
def test_label_maps_are_simpleitks(scene: Scene, name: str, kind: int) -> None:
    want = scene.simpleitk(scene.labels, kind, 3)
    out = scene.jrs(scene.labels, "-t", scene.h5, "-n", name, "--outside", 3)
    got = voxels(out)
    assert got.dtype == np.uint8 and set(np.unique(got)) <= {3, *np.unique(scene.labels_data)}
    assert (got == want).mean() > 0.999  # ties and the border
    assert int(nib.load(out).header["intent_code"]) == (1002 if name == "label" else 0)


@pytest.mark.parametrize("name", ["linear", "nearest", "bspline"])
@pytest.mark.parametrize("inverse", [False, True])
def test_lists_of_transforms_are_ants(scene: Scene, name: str, inverse: bool) -> None:
    """antsApplyTransforms in its own order; the inverse of the affine alone, ANTs inverts no field."""
    ants = pytest.importorskip("ants")
    kind = {"linear": "linear", "nearest": "nearestNeighbor", "bspline": "bSpline"}[name]
    files = [str(scene.mat)] if inverse else [str(scene.warp), str(scene.mat)]
    want = ants.apply_transforms(
        ants.image_read(str(scene.reference)),
        ants.image_read(str(scene.image)),
        files,
        interpolator=kind,
        whichtoinvert=[inverse] * len(files),
    ).numpy()
    ours = [f"[{f},1]" if inverse else f for f in files]
    got = voxels(scene.jrs(scene.image, *(part for f in ours for part in ("-t", f)), "-n", name))
    edge = (got == 0) != (want == 0)
    assert edge.mean() < 2e-3 and (want != 0).mean() > 0.2
    close = np.abs(got - want)[~edge] < (1e-3 if name != "bspline" else 5e-3)
    assert close.mean() > (0.998 if name == "nearest" else 0.99999)


def test_ants_reads_what_we_write(scene: Scene, tmp_path: Path) -> None:
    """Our total field, our composite and our matrix, by ANTs."""
    ants = pytest.importorskip("ants")
    fixed, moving = ants.image_read(str(scene.reference)), ants.image_read(str(scene.image))
    field = tmp_path / "total.nii.gz"
    assert run(["convert-xfm", str(scene.h5), "-o", str(field), "-r", str(scene.reference)]) == 0
    total = sitk.DisplacementFieldTransform(sitk.ReadImage(str(field), sitk.sitkVectorFloat64))
    for files, transform in (([str(field)], total), ([str(scene.h5)], sitk.ReadTransform(str(scene.h5)))):
        got = ants.apply_transforms(fixed, moving, files, interpolator="linear").numpy()
        images = sitk.ReadImage(str(scene.image)), sitk.ReadImage(str(scene.reference))
        want = sitk.GetArrayFromImage(sitk.Resample(*images, transform, sitk.sitkLinear)).transpose(2, 1, 0)
        difference = np.abs(got - want)[(got != 0) & (want != 0)]
        assert difference.size > 2000 and difference.max() < 1e-3


# Back -----------------------------------------------------------------------------------------------------


def test_there_and_back_is_the_image(scene: Scene, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The inverse undoes the forward transform, in one resampling each; its residual is told."""
    moved = scene.jrs(scene.image, "-t", scene.h5, "-n", "bspline")
    out = tmp_path / "back.nii.gz"
    capsys.readouterr()
    code = run(
        ["warp", str(moved), "-t", str(scene.h5), "--inverse", "-r", str(scene.image), "-o", str(out), "-n", "bspline"]
    )
    said = capsys.readouterr()
    assert code == 0 and said.out.strip() == str(out) and "inverse is off by" in said.err
    got = voxels(out)
    inner = (slice(7, -7),) * 3
    assert np.corrcoef(got[inner].ravel(), scene.data[inner].ravel())[0, 1] > 0.98
    unmoved = voxels(scene.jrs(scene.image, "-t", "identity"))
    assert np.corrcoef(unmoved[inner].ravel(), voxels(moved)[inner].ravel())[0, 1] < 0.95


def test_composing_resamples_once(scene: Scene) -> None:
    """A transform and its inverse in one call leave the image as sharp as it was."""
    out = scene.folder / "same.nii.gz"
    arguments = ["-t", str(scene.h5), "-t", f"[{scene.h5},1]", "-r", str(scene.image), "-o", str(out)]
    assert run(["warp", str(scene.image), *arguments]) == 0
    inner = (slice(6, -6),) * 3
    np.testing.assert_allclose(voxels(out)[inner], scene.data[inner], atol=0.05)


# Labels ---------------------------------------------------------------------------------------------------


def test_each_label_by_itself_and_the_largest(helpers: Any) -> None:
    """Against one interpolation a label, by scipy."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 9, (8, 7, 6)).astype(np.int16) * 100 - 200
    coords = rng.uniform(-0.5, 5.5, (3, 4000, 1, 1)).astype(np.float32)
    values = np.unique(labels)
    scores = [
        ndimage.map_coordinates((labels == v).astype(float), coords.astype(float), order=1, mode="nearest")
        for v in values
    ]
    want = values[np.argmax(scores, axis=0)]  # the first, smallest, of equals
    top = np.sort(scores, axis=0)
    clear = top[-1] - top[-2] > 1e-5
    got = sample_labels(labels, coords, -7)
    assert got.dtype == np.int16 and clear.mean() > 0.99
    inside = (coords < np.array([8, 7, 6]).reshape(3, 1, 1, 1) - 0.5).all(axis=0)
    np.testing.assert_array_equal(got[clear & inside], want[clear & inside])
    assert (got[~inside] == -7).all()


def test_of_equal_labels_the_smaller_is_taken() -> None:
    labels = np.zeros((2, 2, 2), dtype=np.uint8)
    labels[1], labels[0] = 4, 9
    half = np.full((3, 1, 1, 1), 0.5, dtype=np.float32)
    assert sample_labels(labels, half).item() == 4
    assert sample_labels(labels[::-1], half).item() == 4


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int32, np.uint16, np.float64])
@pytest.mark.parametrize("name", ["nearest", "label"])
def test_the_type_is_kept(scene: Scene, helpers: Any, tmp_path: Path, dtype: type, name: str) -> None:
    path = helpers.write_image(tmp_path / "l.nii.gz", scene.labels_data.astype(dtype), scene.affine)
    got = voxels(scene.jrs(path, "-t", scene.h5, "-n", name))
    assert got.dtype == dtype
    np.testing.assert_array_equal(got, voxels(scene.jrs(scene.labels, "-t", scene.h5, "-n", name)))


def test_an_outside_value_that_the_type_cannot_hold_is_refused(scene: Scene) -> None:
    for value in (-1, 300, 0.5, "nan", "inf"):
        scene.jrs(scene.labels, "-t", scene.h5, "-n", "nearest", "--outside", value, code=2)


def test_labels_that_are_blended_are_told(
    scene: Scene, helpers: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scene.jrs(scene.labels, "-t", scene.h5)
    assert "labels.nii.gz: it holds 6 whole numbers, as label maps do" in capsys.readouterr().err
    whole = helpers.write_image(tmp_path / "whole.nii.gz", np.rint(scene.data).astype(np.int16), scene.affine)
    scene.jrs(scene.labels, "-t", scene.h5, "-n", "label")
    scene.jrs(scene.image, "-t", scene.h5)
    scene.jrs(whole, "-t", scene.h5)
    assert "whole numbers" not in capsys.readouterr().err


def test_an_image_that_lies_elsewhere_is_told(
    scene: Scene, helpers: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    affine = scene.affine.copy()
    affine[:3, 3] += 900.0
    far = helpers.write_image(tmp_path / "far.nii.gz", scene.data, affine)
    for outside in ("0", "-7"):
        assert (voxels(scene.jrs(far, "-t", scene.h5, "--outside", outside)) == float(outside)).all()
        assert "far.nii.gz: nothing of it lies where the transform leads" in capsys.readouterr().err
    scene.jrs(scene.image, "-t", scene.h5)
    assert "nothing of it" not in capsys.readouterr().err


# Series and odd inputs ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["linear", "bspline", "nearest"])
def test_a_series_is_its_volumes(scene: Scene, helpers: Any, tmp_path: Path, name: str) -> None:
    """One of them empty; the time step is kept."""
    series = np.stack([scene.data, np.zeros_like(scene.data), 2 * scene.data], axis=-1)
    image = nib.Nifti1Image(series, scene.affine)
    image.header.set_xyzt_units("mm", "msec")
    image.header["pixdim"][4] = 2500.0
    nib.save(image, tmp_path / "series.nii.gz")
    out = scene.jrs(tmp_path / "series.nii.gz", "-t", scene.h5, "-n", name)
    got, single = voxels(out), voxels(scene.jrs(scene.image, "-t", scene.h5, "-n", name))
    assert got.shape == (*REFERENCE, 3)
    np.testing.assert_allclose(got[..., 0], single, atol=1e-4)
    np.testing.assert_allclose(got[..., 2], 2 * single, atol=1e-3)
    assert (got[..., 1] == 0).all()
    header = nib.load(out).header
    assert header.get_zooms()[3] == pytest.approx(2.5) and header.get_xyzt_units() == ("mm", "sec")


def test_a_sheared_image_is_sampled_where_its_voxels_lie(scene: Scene, helpers: Any) -> None:
    affine = scene.affine.copy()
    affine[:3, :3] = affine[:3, :3] @ np.array([[1, 0.3, 0], [0, 1, 0.2], [0, 0, 1]])
    coords = np.linalg.inv(affine) @ scene.target.affine
    points = nib.affines.apply_affine(coords, np.moveaxis(np.indices(REFERENCE), 0, -1))
    for name, order in (("linear", 1), ("bspline", 3)):
        got = warp_volumes([scene.data], Geometry(SHAPE, affine), Chain(()), scene.target, name, np.nan)  # type: ignore[arg-type]
        want = ndimage.map_coordinates(scene.data.astype(float), np.moveaxis(points, -1, 0), order=order, mode="mirror")
        inside = ((points >= 0) & (points <= np.array(SHAPE) - 1)).all(axis=-1)
        assert inside.mean() > 0.3 and np.isfinite(got[inside]).all() and not np.isfinite(got).all()
        np.testing.assert_allclose(got[inside], want[inside], atol=2e-2)


def test_slab_seams_do_not_show(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("linear", "bspline", "nearest", "label"):
        source = Geometry(SHAPE, scene.affine)
        data = scene.labels_data if name in ("nearest", "label") else scene.data
        whole = warp_volumes([data], source, scene.chain, scene.target, name)  # type: ignore[arg-type]
        with monkeypatch.context() as patch:
            patch.setattr("jrs.runtime.sampling._SLAB_VOXELS", 3000)
            pieces = warp_volumes([data], source, scene.chain, scene.target, name)  # type: ignore[arg-type]
        assert (np.abs(pieces.astype(float) - whole) < 1e-2).mean() > 0.9999


def test_what_cannot_be_warped_is_refused(
    scene: Scene, helpers: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rgb = np.zeros(SHAPE, dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
    nib.save(nib.Nifti1Image(rgb, scene.affine), tmp_path / "rgb.nii.gz")
    scene.jrs(tmp_path / "rgb.nii.gz", "-t", scene.h5, code=65)
    assert "RGB" in capsys.readouterr().err
    scene.jrs(scene.image, "-t", scene.h5, "-n", "label", code=65)  # no whole numbers
    scene.jrs(scene.image, "-t", tmp_path / "absent.h5", code=66)
    scene.jrs(scene.image, "-t", scene.image, code=65)  # an image where a field is needed
    scene.jrs(scene.image, "-t", scene.h5, "-n", "cubic", code=2)
    out = tmp_path / "x.mgz"
    assert run(["warp", str(scene.image), "-t", str(scene.h5), "-r", str(scene.reference), "-o", str(out)]) == 2
    assert run(["warp", str(scene.image), "-t", str(scene.h5), "-o", str(tmp_path / "x.nii.gz")]) == 2
    there = scene.jrs(scene.image, "-t", scene.h5)
    arguments = ["warp", str(scene.image), "-t", str(scene.h5), "-r", str(scene.reference), "-o", str(there)]
    assert run(arguments) == 73 and run([*arguments, "--overwrite"]) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["rgb.nii.gz"]


# Points ---------------------------------------------------------------------------------------------------


def test_points_outside_the_field_are_told(
    scene: Scene, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is zero there, and inverted it goes on by its affine part: no residual speaks of these."""
    path, out = tmp_path / "points.csv", tmp_path / "moved.csv"
    path.write_text("x,y,z\n3,3,3\n300,0,0\n0,-200,5\n", encoding="utf-8")
    for more in ([], ["--inverse"]):
        given = ["warp", str(path), "-t", str(scene.warp), "-o", str(out), "--points-space", "ras", "--overwrite"]
        assert run([*given, *more]) == 0
        err = capsys.readouterr().err
        assert "2 of 3 points lie outside the field" in err
        assert ("the inverse is off by" in err) == bool(more)
    # Nothing is said of an inverse of which no point is known.
    path.write_text("x,y,z\n300,0,0\n", encoding="utf-8")
    assert run([*given, "--inverse"]) == 0
    assert "is off by" not in capsys.readouterr().err


def test_points_are_written_as_csv(scene: Scene, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = tmp_path / "points.csv", tmp_path / "moved.nii.gz"
    path.write_text("x,y,z\n3,3,3\n", encoding="utf-8")
    assert run(["warp", str(path), "-t", str(scene.warp), "-o", str(out), "--points-space", "ras"]) == 2
    assert "end the name in .csv" in capsys.readouterr().err and not out.exists()


@pytest.mark.parametrize("frame", ["ras", "lps"])
def test_points_are_simpleitks(scene: Scene, tmp_path: Path, frame: str) -> None:
    points = np.random.default_rng(0).uniform(-25, 25, (12, 3))
    path, out = tmp_path / "points.csv", tmp_path / "moved.csv"
    rows = "".join(f"n{i},{x},{y},{z},0\n" for i, (x, y, z) in enumerate(points.tolist()))
    path.write_text("name,x,y,z,t\n" + rows, encoding="utf-8")
    assert run(["warp", str(path), "-t", str(scene.h5), "-o", str(out), "--points-space", frame]) == 0
    lines = [line.split(",") for line in out.read_text(encoding="utf-8").splitlines()]
    assert lines[0] == ["name", "x", "y", "z", "t"] and [line[0] for line in lines[1:]] == [f"n{i}" for i in range(12)]
    got = np.array([[float(v) for v in line[1:4]] for line in lines[1:]])
    transform = sitk.ReadTransform(str(scene.h5))
    sign = LPS if frame == "ras" else 1.0
    want = np.array([transform.TransformPoint(p) for p in (points * sign).tolist()]) * sign
    np.testing.assert_allclose(got, want, atol=1e-3)
    back = tmp_path / "back.csv"
    assert run(["warp", str(out), "-t", str(scene.h5), "-o", str(back), "--points-space", frame, "--inverse"]) == 0
    again = [[float(v) for v in line.split(",")[1:4]] for line in back.read_text(encoding="utf-8").splitlines()[1:]]
    np.testing.assert_allclose(again, points, atol=3e-3)


@pytest.mark.parametrize("text", ["", "a,b,c\n1,2,3\n", "x,y,z\n1,2\n", "x,y,z\n1,2,three\n", "x,y,z\n1,2,nan\n"])
def test_damaged_points_are_refused(scene: Scene, tmp_path: Path, text: str) -> None:
    path, out = tmp_path / "points.csv", tmp_path / "moved.csv"
    path.write_text(text, encoding="utf-8")
    assert run(["warp", str(path), "-t", str(scene.h5), "-o", str(out), "--points-space", "ras"]) == 65
    assert run(["warp", str(path), "-t", str(scene.h5), "-o", str(out)]) == 2
    assert not out.exists()


# Converting -----------------------------------------------------------------------------------------------


def test_convert_writes_what_the_ending_names(scene: Scene, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    both = [str(scene.warp), str(scene.mat)]
    assert run(["convert-xfm", *both, "-o", str(tmp_path / "both.h5")]) == 0
    points = np.random.default_rng(1).uniform(-20, 20, (20, 3))
    want = [sitk.ReadTransform(str(scene.h5)).TransformPoint(p) for p in points.tolist()]
    got = [sitk.ReadTransform(str(tmp_path / "both.h5")).TransformPoint(p) for p in points.tolist()]
    np.testing.assert_allclose(got, want, atol=1e-3)
    assert run(["convert-xfm", str(scene.mat), "-o", str(tmp_path / "a.txt"), "--inverse"]) == 0
    theirs = sitk.ReadTransform(str(tmp_path / "a.txt"))
    forward = sitk.ReadTransform(str(scene.mat))
    back = [theirs.TransformPoint(forward.TransformPoint(p)) for p in points.tolist()]
    np.testing.assert_allclose(back, points, atol=1e-8)
    fsl = ["--to", "fsl", "--source", str(scene.image), "--reference", str(scene.reference)]
    assert run(["convert-xfm", *both, "-o", str(tmp_path / "fsl.nii.gz"), *fsl]) == 0
    assert run(["convert-xfm", str(scene.mat), "-o", str(tmp_path / "flirt.mat"), *fsl]) == 0
    warp = nib.load(tmp_path / "fsl.nii.gz")
    assert warp.shape == (*REFERENCE, 3) and int(warp.header["intent_code"]) == 2006
    assert np.loadtxt(tmp_path / "flirt.mat").shape == (4, 4)
    assert run(["convert-xfm", *both, "-o", str(tmp_path / "x.nii.gz"), "--to", "fsl"]) == 2
    assert run(["convert-xfm", *both, "-o", str(tmp_path / "x.nii.gz"), "--to", "afni"]) == 2
    assert run(["convert-xfm", *both, "-o", str(tmp_path / "x.txt")]) == 2
    capsys.readouterr()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.txt", "both.h5", "flirt.mat", "fsl.nii.gz"]
