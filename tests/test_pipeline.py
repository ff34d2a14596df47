"""From files to files with a tiny bundle: every output against SimpleITK, scipy and counts made here."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from jrs.errors import (
    BackendError,
    BadDataError,
    CannotCreateError,
    ConfigurationError,
    JrsError,
    MissingInputError,
    UsageError,
)
from jrs.runtime.engines import available_backends
from jrs.runtime.options import InferOptions
from jrs.runtime.pipeline import Pipeline
from jrs.runtime.results import Result

sitk = pytest.importorskip("SimpleITK")
pytest.importorskip("torch")  # makes the tiny bundle

MODALITIES = ("t1", "t1ce", "t2", "flair")
SEG_NATIVE = "case7_seg-tumor_dseg.nii.gz"
SEG_MOVED = "case7_space-phantomatlas_seg-tumor_dseg.nii.gz"
MOVED = {
    "t1": "case7_space-phantomatlas_desc-moved_T1w.nii.gz",
    "t1ce": "case7_space-phantomatlas_desc-moved_ce-gadolinium_T1w.nii.gz",
    "t2": "case7_space-phantomatlas_desc-moved_T2w.nii.gz",
    "flair": "case7_space-phantomatlas_desc-moved_FLAIR.nii.gz",
}
FIELD = "case7_from-native_to-phantomatlas_mode-image_xfm.nii.gz"
INVERSE = "case7_from-phantomatlas_to-native_mode-image_xfm.nii.gz"
JACOBIAN = "case7_space-phantomatlas_desc-jacobian_map.nii.gz"
REPORTS = {"case7_report.json", "case7_report.html"}
COLORS = {"case7_seg-tumor_desc-slicer_colors.ctbl", "case7_seg-tumor_desc-itksnap_colors.txt"}


def beside(*images: str) -> set[str]:
    """Images and what lies beside each."""
    sidecars = {name.replace(".nii.gz", ".json") for name in images}
    return {*images, *sidecars, *(name.replace(".nii.gz", ".tsv") for name in images if "_dseg" in name)}


EVERY = beside(SEG_NATIVE, SEG_MOVED, *MOVED.values(), FIELD, INVERSE, JACOBIAN) | REPORTS | COLORS
GRID = (32, 32, 32)
VALUES = np.array([0, 1, 2, 4], dtype=np.uint8)


@pytest.fixture(scope="module")
def pipeline(tiny_bundle: Path) -> Iterator[Pipeline]:
    with Pipeline.open(tiny_bundle, "ort-cpu", threads=1) as opened:
        yield opened


@pytest.fixture(scope="module")
def truth_file(phantom: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The true affine as SimpleITK writes it."""
    lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ phantom.truth @ np.diag([-1.0, -1.0, 1.0, 1.0])
    transform = sitk.AffineTransform(lps[:3, :3].ravel().tolist(), lps[:3, 3].tolist())
    path = tmp_path_factory.mktemp("affine") / "truth.tfm"
    sitk.WriteTransform(transform, str(path))
    return path


class Run:
    """One inference: the result, its folder, and what the network answered on the way."""

    def __init__(self, result: Result, folder: Path, probabilities: np.ndarray) -> None:
        self.result, self.folder, self.probabilities = result, folder, probabilities

    def data(self, name: str) -> np.ndarray:
        return np.asarray(nib.load(self.folder / name).dataobj)

    def affine(self, name: str) -> np.ndarray:
        return nib.load(self.folder / name).affine

    @property
    def report(self) -> dict[str, Any]:
        return strict_json(self.folder / "case7_report.json")


def strict_json(path: Path) -> Any:
    """JSON as the standard has it: no NaN, no Infinity."""

    def refuse(word: str) -> None:
        raise AssertionError(f"{path.name} holds {word}")

    return json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)


@pytest.fixture(scope="module")
def run(pipeline: Pipeline, phantom: Any, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The whole way, the affine found."""
    out = tmp_path_factory.mktemp("out")
    kept = {}
    segment = pipeline.network.segment

    def keeping(image: Any, codes: Any) -> Any:
        kept["probabilities"] = segment(image, codes)
        return kept["probabilities"].copy()

    pipeline.network.segment = keeping  # type: ignore[method-assign]
    try:
        result = pipeline.infer(phantom.folder, phantom.atlas, refine=0)
    finally:
        del pipeline.network.segment
    return Run(result, result.save(out), kept["probabilities"])


def field_lps_to_ras(data: np.ndarray) -> np.ndarray:
    """A field file's (X,Y,Z,1,3) as (3,X,Y,Z) RAS."""
    return np.moveaxis(data[:, :, :, 0, :] * np.array([-1, -1, 1]), -1, 0)


def foreground(data: np.ndarray) -> np.ndarray:
    """The brain as the report counts it: above a hundredth of the 98th percentile of what is positive."""
    return data > 0.01 * np.percentile(data[data > 0], 98)


# The files ------------------------------------------------------------------------------------------------


def test_every_file_is_there_and_no_other(run: Run) -> None:
    assert {path.name for path in run.folder.iterdir()} == EVERY
    assert run.folder.name == "case7"
    assert set(run.report["outputs"].values()) == EVERY
    assert all(path.stat().st_size > 0 for path in run.folder.iterdir())


@pytest.mark.parametrize(
    ("name", "native", "dtype", "intent", "tail"),
    [
        (SEG_NATIVE, True, "u1", 1002, ()),
        (SEG_MOVED, False, "u1", 1002, ()),
        *((name, False, "f4", 0, ()) for name in MOVED.values()),
        (FIELD, False, "f4", 1007, (1, 3)),
        (INVERSE, True, "f4", 1007, (1, 3)),
        (JACOBIAN, False, "f4", 0, ()),
    ],
)
def test_each_image_has_its_grid_type_and_intent(
    run: Run, phantom: Any, name: str, native: bool, dtype: str, intent: int, tail: tuple[int, ...]
) -> None:
    image = nib.load(run.folder / name)
    grid = phantom.image("t1") if native else nib.load(phantom.atlas)
    header = image.header
    assert image.shape == (*grid.shape, *tail)
    np.testing.assert_allclose(image.affine, grid.affine, atol=1e-5)
    assert header.get_data_dtype() == np.dtype(dtype)
    assert int(header["intent_code"]) == intent
    qform, qcode = header.get_qform(coded=True)
    sform, scode = header.get_sform(coded=True)
    assert qcode == scode > 0
    np.testing.assert_allclose(qform, sform, atol=1e-4)
    # 1 as written; nibabel shows a slope that changes nothing as absent.
    assert header.get_slope_inter() in ((1.0, 0.0), (None, None))
    assert header.get_xyzt_units()[0] == "mm"
    assert np.isfinite(np.asarray(image.dataobj)).all()


def test_the_html_report_is_a_page(run: Run) -> None:
    text = (run.folder / "case7_report.html").read_text(encoding="utf-8")
    assert text.lstrip().lower().startswith("<!doctype html") and "case7" in text


# What is in them ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("modality", MODALITIES)
def test_simpleitk_gets_the_same_moved_image_from_the_written_field(run: Run, phantom: Any, modality: str) -> None:
    transform = sitk.DisplacementFieldTransform(sitk.ReadImage(str(run.folder / FIELD), sitk.sitkVectorFloat64))
    native = sitk.ReadImage(str(phantom.folder / f"case7_{modality}.nii.gz"), sitk.sitkFloat32)
    reference = sitk.ReadImage(str(phantom.atlas), sitk.sitkFloat32)
    # The written field is rounded by a quarter of a micrometre, so the border may fall on the other side.
    field = field_lps_to_ras(run.data(FIELD))
    want = sitk.GetArrayFromImage(sitk.Resample(native, reference, transform, sitk.sitkLinear, 0.0)).transpose(2, 1, 0)
    got = run.data(MOVED[modality])
    scale = float(np.percentile(np.abs(want), 99))
    assert np.abs(field).max() > 5.0 and scale > 50.0
    assert np.abs(got - want).max() < 1e-2 * scale
    assert got.min() < -0.1  # the ripple below zero is the image's own


def test_the_moved_image_fits_the_atlas_as_the_affine_is_found(run: Run, phantom: Any) -> None:
    atlas = np.asarray(nib.load(phantom.atlas).dataobj)
    brain = foreground(atlas)
    assert np.corrcoef(atlas[brain], run.data(MOVED["t1"])[brain])[0, 1] > 0.9
    plain = ndimage.zoom(np.asarray(phantom.image("t1").dataobj), np.array(atlas.shape) / (40, 42, 38), order=1)
    assert np.corrcoef(atlas[brain], plain[brain])[0, 1] < 0.8


def labels_at(run: Run, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Labels at RAS points (3,...) of the network's space, by scipy, and where the network's grid is surely in."""
    voxels = np.moveaxis(nib.affines.apply_affine(np.linalg.inv(grid_affine(run)), np.moveaxis(points, 0, -1)), -1, 0)
    sampled = [ndimage.map_coordinates(p.astype(float), voxels, order=1, mode="nearest") for p in run.probabilities]
    inside = np.ones(points.shape[1:], dtype=bool)
    for axis, n in enumerate(GRID):
        inside &= (voxels[axis] >= 0) & (voxels[axis] <= n - 1)
    return VALUES[np.argmax(sampled, axis=0)], inside


def grid_affine(run: Run) -> np.ndarray:
    """The network's grid: RAS, 5 mm, its middle on the middle of the box around the atlas's brain."""
    fixed = run.result.fixed
    mask = foreground(np.asarray(fixed.data))
    ends = []
    for axis in range(3):
        along = np.flatnonzero(mask.sum(axis=tuple(a for a in range(3) if a != axis)) > 20)
        ends.append((along[0] + along[-1]) / 2)
    affine = np.diag([5.0, 5.0, 5.0, 1.0])
    middle = nib.affines.apply_affine(np.asarray(fixed.geometry.affine), ends)
    affine[:3, 3] = middle - 5.0 * (np.array(GRID) - 1) / 2
    return affine


def test_native_labels_are_the_most_probable_classes_through_the_affine(run: Run, phantom: Any, helpers: Any) -> None:
    native = phantom.image("t1")
    back = np.linalg.inv(np.array(run.report["affine"])) @ native.affine
    want, inside = labels_at(run, helpers.world_points(back, native.shape))
    got = run.data(SEG_NATIVE)
    assert set(np.unique(got)) == {0, 1, 2, 4}
    assert inside.mean() > 0.5
    # The rest are ties to rounding.
    assert (got == want)[inside].mean() > 0.999
    wrong = np.roll(got, 1, axis=0)
    assert (wrong == want)[inside].mean() < 0.97


def test_moved_labels_are_sampled_once_at_x_plus_u(run: Run, helpers: Any) -> None:
    atlas_affine = run.affine(SEG_MOVED)
    field = field_lps_to_ras(run.data(FIELD))
    points = helpers.world_points(atlas_affine, field.shape[1:]) + field
    before = nib.affines.apply_affine(np.linalg.inv(np.array(run.report["affine"])), np.moveaxis(points, 0, -1))
    want, inside = labels_at(run, np.moveaxis(before, -1, 0))
    got = run.data(SEG_MOVED)
    assert inside.mean() > 0.9
    assert (got == want)[inside].mean() > 0.999


def test_outside_the_network_grid_there_is_only_background(
    pipeline: Pipeline, phantom: Any, helpers: Any, tmp_path: Path
) -> None:
    shape = (44, 44, 44)
    affine = helpers.grid_affine(shape, (6.0, 6.0, 6.0), "RAS")
    data = helpers.head(helpers.world_points(affine, shape)).astype(np.float32)
    path = helpers.write_image(tmp_path / "wide_t1.nii.gz", data, affine)
    result = pipeline.infer(path, phantom.atlas, affine="off", inverse=False)
    points = helpers.world_points(affine, shape)
    far = (np.abs(points) > 80.0 + 10.0).any(axis=0)
    assert far.mean() > 0.5
    assert result.labels_native is not None and (result.labels_native[far] == 0).all()
    assert (result.labels_native > 0).any()


def test_the_jacobian_is_the_written_fields(run: Run) -> None:
    """In float64, in the world: I + dd/dx by numpy from the field file."""
    field = field_lps_to_ras(run.data(FIELD)).astype(np.float64)
    steps = np.stack(np.gradient(field, axis=(1, 2, 3)), axis=1)
    inverse = np.linalg.inv(run.affine(FIELD)[:3, :3])
    jacobian = np.eye(3) + np.moveaxis(steps, (0, 1), (-2, -1)) @ inverse
    want = np.linalg.det(jacobian)
    got = run.data(JACOBIAN)
    np.testing.assert_allclose(got, want, atol=2e-3)
    assert want.max() - want.min() > 0.5
    # The affine is in it.
    assert np.median(got) == pytest.approx(np.linalg.det(np.array(run.report["affine"])), abs=0.05)


def test_the_inverse_field_leads_back(run: Run, helpers: Any, phantom: Any) -> None:
    """Where the forward map is not near a fold: atlas(x) -> native -> atlas within a third of a voxel."""
    forward, inverse = (
        sitk.DisplacementFieldTransform(sitk.ReadImage(str(run.folder / name), sitk.sitkVectorFloat64))
        for name in (FIELD, INVERSE)
    )
    smooth = ndimage.minimum_filter(run.data(JACOBIAN), 5) > 0.6
    smooth &= ndimage.binary_erosion(foreground(np.asarray(nib.load(phantom.atlas).dataobj)), iterations=3)
    points = helpers.world_points(run.affine(FIELD), smooth.shape)[:, smooth].T
    assert len(points) > 100
    error = []
    for point in (points * [-1, -1, 1]).tolist():
        error.append(np.linalg.norm(np.subtract(inverse.TransformPoint(forward.TransformPoint(point)), point)))
    # This field is rough: what 3 mm voxels interpolate of it is most of the error.
    assert np.median(error) < 0.25
    assert np.percentile(error, 95) < 1.0


# The report -----------------------------------------------------------------------------------------------


def test_the_report_has_its_keys(run: Run, tiny_bundle: Path) -> None:
    report = run.report
    assert set(report) >= {
        *("case", "atlas", "bundle", "engine", "volumes_ml", "jacobian", "affine", "timings_s"),
        *("warnings", "versions", "outputs", "label_values", "volume_ratio", "modalities"),
    }
    assert report["case"] == "case7" and report["atlas"] == "phantomatlas"
    digest = hashlib.sha256((tiny_bundle / "manifest.json").read_bytes()).hexdigest()
    assert report["bundle"] == {"name": "tiny", "sha256": digest}
    engine = {"backend": "ort-cpu", "device": "CPU", "precision": "fp32", "gate": None}
    assert report["engine"] == {**engine, "reason": "ort-cpu computes in fp32 alone"}
    assert report["modalities"] == list(MODALITIES)
    # Random weights deform at random: the report has to say so, and nothing else is wrong.
    assert all("less like the atlas" in warning for warning in report["warnings"])
    assert report["versions"]["numpy"] == np.__version__ and report["versions"]["jrs"]
    assert list(report["label_values"].values()) == [0, 1, 2, 4]
    assert set(report["jacobian"]) >= {"folding_percent", "inside_tumor", "outside_tumor"}


def test_timings_add_up(run: Run) -> None:
    timings = run.report["timings_s"]
    assert set(timings) >= {"affine", "encoder", "segmentation", "registration", "write", "total"}
    assert all(seconds >= 0 for seconds in timings.values())
    stages = sum(seconds for stage, seconds in timings.items() if stage != "total")
    assert stages <= timings["total"] + 0.05
    assert stages > 0.8 * timings["total"]


def test_volumes_are_counts_of_labels(run: Run) -> None:
    report = run.report
    for where, name in (("native", SEG_NATIVE), ("moved", SEG_MOVED)):
        labels = run.data(name)
        ml = abs(np.linalg.det(run.affine(name)[:3, :3])) / 1000.0
        # BraTS: whole tumour is everything, the core 1 and 4, enhancing 4.
        want = {
            "WT": ml * int((labels > 0).sum()),
            "TC": ml * int(np.isin(labels, (1, 4)).sum()),
            "ET": ml * int((labels == 4).sum()),
        }
        assert report["volumes_ml"][where] == pytest.approx(want, rel=1e-4)
        assert min(want.values()) > 0.0
    for region in ("WT", "TC", "ET"):
        ratio = report["volumes_ml"]["moved"][region] / report["volumes_ml"]["native"][region]
        assert report["volume_ratio"][region] == pytest.approx(ratio, rel=1e-4)
    assert run.result.volumes_ml is not None
    assert run.result.volumes_ml["native"]["WT"] == pytest.approx(report["volumes_ml"]["native"]["WT"], rel=1e-4)


def test_folding_and_jacobian_are_those_of_the_file(run: Run, phantom: Any) -> None:
    brain = foreground(np.asarray(nib.load(phantom.atlas).dataobj))
    jacobian, tumour = run.data(JACOBIAN), run.data(SEG_MOVED) > 0
    report = run.report["jacobian"]
    # The file is rounded to 2^-12: a value next to zero may count on either side.
    low, high = (100.0 * (jacobian[brain] <= edge).mean() for edge in (-1e-3, 1e-3))
    assert low - 1e-4 <= report["folding_percent"] <= high + 1e-4
    assert 0.0 < high < 1.0  # the phantom's field folds a little
    assert report["inside_tumor"] == pytest.approx(jacobian[tumour].mean(), abs=1e-3)
    assert report["outside_tumor"] == pytest.approx(jacobian[brain & ~tumour].mean(), abs=1e-3)
    assert run.result.folding_percent == pytest.approx(report["folding_percent"], rel=1e-4, abs=1e-9)


def test_the_affine_maps_fixed_points_to_moving_points(run: Run, phantom: Any) -> None:
    affine = np.array(run.report["affine"])
    corners = np.array([(x, y, z) for x in (-25, 25) for y in (-30, 30) for z in (-22, 22)])
    want = nib.affines.apply_affine(phantom.truth, corners)
    error = np.linalg.norm(nib.affines.apply_affine(affine, corners) - want, axis=1)
    assert error.max() < 2.5
    # Its inverse would be far off.
    inverse = nib.affines.apply_affine(np.linalg.inv(affine), corners)
    assert np.linalg.norm(inverse - want, axis=1).max() > 8.0
    assert run.report["affine_determinant"] == pytest.approx(np.linalg.det(affine), rel=1e-4)


# Choices --------------------------------------------------------------------------------------------------


def test_affine_off_is_the_identity(pipeline: Pipeline, phantom: Any) -> None:
    result = pipeline.infer(phantom.folder, phantom.atlas, affine="off", segment=False, inverse=False)
    np.testing.assert_array_equal(result.transform.affine, np.eye(4))
    assert result.report()["affine"] == np.eye(4).tolist()


def test_affine_rigid_is_a_rotation(pipeline: Pipeline, phantom: Any) -> None:
    result = pipeline.infer(phantom.folder, phantom.atlas, affine="rigid", segment=False, inverse=False)
    linear = result.transform.affine[:3, :3]
    np.testing.assert_allclose(linear @ linear.T, np.eye(3), atol=1e-6)
    moved = nib.affines.apply_affine(result.transform.affine, (0, 0, 0))
    np.testing.assert_allclose(moved, phantom.truth[:3, 3], atol=2.0)


def test_an_affine_file_is_taken_as_it_is(pipeline: Pipeline, phantom: Any, truth_file: Path) -> None:
    result = pipeline.infer(phantom.folder, phantom.atlas, affine=str(truth_file), segment=False, inverse=False)
    np.testing.assert_allclose(result.transform.affine, phantom.truth, atol=1e-9)
    quality = result.report()["affine_quality"]
    assert quality["foreground_overlap_after"] > max(0.95, quality["foreground_overlap_before"])
    assert quality["mutual_information_after"] > quality["mutual_information_before"]


def test_without_segmentation_and_inverse_their_files_are_absent(
    pipeline: Pipeline, phantom: Any, tmp_path: Path
) -> None:
    result = pipeline.infer(phantom.folder, phantom.atlas, affine="off", segment=False, inverse=False)
    folder = result.save(tmp_path)
    assert {path.name for path in folder.iterdir()} == EVERY - beside(SEG_NATIVE, SEG_MOVED, INVERSE) - COLORS
    report = strict_json(folder / "case7_report.json")
    assert report["volumes_ml"] is None and report["volume_ratio"] is None
    assert report["jacobian"]["inside_tumor"] is None
    assert not {"labels_native", "labels_moved", "inverse_field"} & set(report["outputs"])


def test_a_bundle_without_segmentation_gives_none(
    phantom: Any, changed_bundle: Callable[..., Path], tmp_path: Path
) -> None:
    def no_labels(manifest: dict[str, Any]) -> None:
        manifest["model"]["architecture"]["num_labels"] = 0
        manifest["model"]["labels"] = []
        manifest["model"]["label_values"] = []
        del manifest["graphs"]["segmentation"]

    with Pipeline.open(changed_bundle(no_labels), "ort-cpu", threads=1) as opened:
        folder = opened.infer(phantom.folder, phantom.atlas, affine="off").save(tmp_path)
    assert {path.name for path in folder.iterdir()} == EVERY - beside(SEG_NATIVE, SEG_MOVED) - COLORS
    assert strict_json(folder / "case7_report.json")["volumes_ml"] is None


@pytest.mark.skipif(len(available_backends()) < 2, reason="needs two backends")
def test_backends_agree(tiny_bundle: Path, phantom: Any, truth_file: Path) -> None:
    results = []
    for backend in available_backends():
        with Pipeline.open(tiny_bundle, backend, "fp32", 1) as opened:
            results.append(opened.infer(phantom.folder, phantom.atlas, affine=str(truth_file), inverse=False, refine=0))
    one, two = results
    assert one.engine.backend != two.engine.backend
    assert (one.labels_native == two.labels_native).mean() > 0.999
    assert np.abs(one.field.vectors_mm - two.field.vectors_mm).max() < 0.02


# Files that are there already -----------------------------------------------------------------------------


@pytest.fixture
def quick(pipeline: Pipeline, phantom: Any) -> Callable[..., Result]:
    """Without the search for an affine."""
    return lambda **changes: pipeline.infer(phantom.folder, phantom.atlas, **{"affine": "off", **changes})


def test_saving_twice_is_refused_and_overwriting_drops_stale_files(
    quick: Callable[..., Result], tmp_path: Path
) -> None:
    folder = quick().save(tmp_path)
    (folder / "notes.txt").write_text("mine", encoding="utf-8")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    short = quick(segment=False, inverse=False)
    with pytest.raises(CannotCreateError, match="--overwrite"):
        short.save(tmp_path)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    short.save(tmp_path, overwrite=True)
    assert {path.name for path in folder.iterdir()} == EVERY - beside(SEG_NATIVE, SEG_MOVED, INVERSE) - COLORS | {
        "notes.txt"
    }


def test_overwriting_drops_modalities_that_are_gone(quick: Callable[..., Result], tmp_path: Path) -> None:
    folder = quick().save(tmp_path)
    quick(modality="t1").save(tmp_path, overwrite=True)
    report = strict_json(folder / "case7_report.json")
    assert {path.name for path in folder.iterdir()} == set(report["outputs"].values())


def counted(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the encoder was asked, call by call."""
    calls: list[Any] = []
    encode = pipeline.network.encode

    def counting(image: Any) -> Any:
        calls.append(image)
        return encode(image)

    monkeypatch.setattr(pipeline.network, "encode", counting)
    return calls


def test_a_refusal_comes_before_the_case_is_aligned_or_encoded(
    pipeline: Pipeline, phantom: Any, quick: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick(keep_clear_of=tmp_path).save(tmp_path)
    calls = counted(pipeline, monkeypatch)
    monkeypatch.setattr("jrs.runtime.pipeline.register_affine", lambda *a, **k: pytest.fail("aligned"))
    with pytest.raises(CannotCreateError, match="--overwrite"):
        pipeline.infer(phantom.folder, phantom.atlas, keep_clear_of=tmp_path)
    assert calls == []
    # Elsewhere is free.
    quick(keep_clear_of=tmp_path / "elsewhere")
    assert len(calls) == 1


def test_a_refusal_comes_before_the_atlas_is_encoded(
    tiny_bundle: Path, phantom: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "case7").mkdir()
    (tmp_path / "case7" / "case7_report.json").write_text("{}", encoding="utf-8")
    with Pipeline.open(tiny_bundle, "ort-cpu", threads=1) as fresh:
        calls = counted(fresh, monkeypatch)
        with pytest.raises(CannotCreateError, match="--overwrite"):
            fresh.infer(phantom.folder, phantom.atlas, affine="off", keep_clear_of=tmp_path)
        assert calls == []


# What goes in ---------------------------------------------------------------------------------------------


def same(one: Result, two: Result) -> None:
    """Bit for bit."""
    np.testing.assert_array_equal(one.field.vectors_mm, two.field.vectors_mm)
    np.testing.assert_array_equal(one.labels_native, two.labels_native)
    np.testing.assert_array_equal(one.labels_moved, two.labels_moved)
    assert list(one.moved) == list(two.moved)
    for name, array in one.moved.items():
        np.testing.assert_array_equal(array, two.moved[name])


def test_running_twice_gives_the_same(quick: Callable[..., Result]) -> None:
    same(quick(), quick())


def test_a_4d_file_is_as_good_as_a_folder(
    quick: Callable[..., Result], pipeline: Pipeline, phantom: Any, tmp_path: Path
) -> None:
    images = {m: np.asarray(phantom.image(m).dataobj) for m in MODALITIES}
    affine = phantom.image("t1").affine
    nib.save(nib.Nifti1Image(np.stack(list(images.values()), axis=-1), affine), tmp_path / "case7.nii.gz")
    default = pipeline.infer(tmp_path / "case7.nii.gz", phantom.atlas, affine="off")
    assert default.case.name == "case7"
    same(default, quick())
    order = ("flair", "t1", "t2", "t1ce")
    nib.save(nib.Nifti1Image(np.stack([images[m] for m in order], axis=-1), affine), tmp_path / "mixed.nii.gz")
    same(pipeline.infer(tmp_path / "mixed.nii.gz", phantom.atlas, affine="off", channels=order), quick())


def test_files_by_name_are_as_good_as_a_folder(
    quick: Callable[..., Result], pipeline: Pipeline, phantom: Any
) -> None:
    files = {m: phantom.folder / f"case7_{m}.nii.gz" for m in reversed(MODALITIES)}
    same(pipeline.infer(None, phantom.atlas, InferOptions(modalities=files, affine="off")), quick())


def test_modalities_may_lie_on_grids_of_their_own(
    pipeline: Pipeline, phantom: Any, truth_file: Path, helpers: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "native"
    shutil.copytree(phantom.folder, folder)
    shape = (30, 45, 28)
    affine = helpers.grid_affine(shape, (4.0, 2.9, 4.5), "PIR", (-6, 4, 2), tuple(phantom.truth[:3, 3]))
    points = helpers.world_points(np.linalg.inv(phantom.truth) @ affine, shape)
    helpers.write_image(folder / "case7_t2.nii.gz", helpers.head(points, 2).astype(np.float32), affine)
    result = pipeline.infer(folder, phantom.atlas, affine=str(truth_file))
    written = result.save(tmp_path / "out")
    # The t1's grid is the native one; each moved image comes from its own file.
    assert result.labels_native is not None and result.labels_native.shape == phantom.image("t1").shape
    transform = sitk.DisplacementFieldTransform(sitk.ReadImage(str(written / FIELD), sitk.sitkVectorFloat64))
    reference = sitk.ReadImage(str(phantom.atlas), sitk.sitkFloat32)
    for modality in ("t1", "t2"):
        native = sitk.ReadImage(str(folder / f"case7_{modality}.nii.gz"), sitk.sitkFloat32)
        want = sitk.GetArrayFromImage(sitk.Resample(native, reference, transform, sitk.sitkLinear, 0.0))
        got = np.asarray(nib.load(written / MOVED[modality]).dataobj)
        assert np.abs(got - want.transpose(2, 1, 0)).max() < 1.0
    # The network saw the same head as on the common grid, up to interpolation.
    common = pipeline.infer(phantom.folder, phantom.atlas, affine=str(truth_file))
    assert (result.labels_native == common.labels_native).mean() > 0.8


def test_a_missing_modality_is_a_warning(quick: Callable[..., Result], tmp_path: Path) -> None:
    result = quick(modality="t1")
    assert any("t1ce, t2, flair" in warning for warning in result.warnings)
    without = quick(modality="t1", segment=False)
    assert not any("segmentation" in warning for warning in without.warnings)
    folder = result.save(tmp_path)
    moved = {path.name for path in folder.glob("*desc-moved*.nii.gz")}
    assert moved == {MOVED["t1"]}
    report = strict_json(folder / "case7_report.json")
    assert report["modalities"] == ["t1"] and report["warnings"] == list(result.warnings)


@pytest.mark.parametrize(
    ("radius_mm", "background", "noise", "litres"),
    [
        (80.0, 0.0, 0.0, None),
        (80.0, -1.0, 0.0, None),
        (92.0, 0.0, 0.0, "3.3"),
        (60.0, 20.0, 0.0, None),
        (60.0, 20.0, 5.0, "8.0"),
    ],
    ids=["brain", "negative-outside", "head", "air-of-20", "air-of-noise"],
)
def test_more_than_a_brain_is_told(
    pipeline: Pipeline,
    helpers: Any,
    tmp_path: Path,
    radius_mm: float,
    background: float,
    noise: float,
    litres: str | None,
) -> None:
    """Balls: 4/3 pi r^3 is 2.1, 3.3 and 0.9 litres, the whole field of view 8."""
    axis = np.arange(-98.0, 101.0, 4.0)
    distance = np.sqrt(sum(np.square(part) for part in np.meshgrid(axis, axis, axis, indexing="ij")))
    air = background + noise * np.random.default_rng(0).random(distance.shape)
    data = np.where(distance < radius_mm, 100.0 + distance, air).astype(np.float32)
    affine = np.diag([4.0, 4.0, 4.0, 1.0])
    affine[:3, 3] = -98.0
    image = helpers.write_image(tmp_path / "ball_t1.nii.gz", data, affine)
    result = pipeline.infer(image, image, affine="off", refine=0, segment=False, inverse=False)
    told = [warning for warning in result.warnings if "skull" in warning]
    if litres is None:
        assert not told
    else:
        assert [f"the atlas {image}" in warning for warning in told] == [True, False]
        assert all(f"t1: {litres} litres" in warning for warning in told)
    assert result.skull_stripped("t1") is (litres is None)


def refusal(kind: type[JrsError], call: Callable[[], Any]) -> str:
    with pytest.raises(JrsError) as caught:
        call()
    message = str(caught.value)
    assert type(caught.value) is kind, message
    assert "\n" not in message
    return message


def require(*channels: str) -> Callable[[dict[str, Any]], None]:
    """An edit of the manifest: these channels must be there."""

    def change(manifest: dict[str, Any]) -> None:
        manifest["model"]["optional_channels"] = [m for m in MODALITIES if m not in channels]

    return change


def test_a_modality_that_the_bundle_needs_is_asked_for(
    phantom: Any, changed_bundle: Callable[..., Path]
) -> None:
    with Pipeline.open(changed_bundle(require("t2")), "ort-cpu", threads=1) as opened:
        # The case itself as the atlas: it has all four.
        message = refusal(
            UsageError, lambda: opened.infer(phantom.folder, phantom.folder, modality="flair", affine="off")
        )
        assert "t2" in message and "--t2" in message
        opened.infer(phantom.folder, phantom.folder, affine="off", segment=False, inverse=False)


def test_a_modality_that_the_atlas_lacks_is_said_of_the_atlas(
    phantom: Any, changed_bundle: Callable[..., Path]
) -> None:
    """The case has its t2; --t2 FILE, which the message asks for, would not help."""
    with Pipeline.open(changed_bundle(require("t2")), "ort-cpu", threads=1) as opened:
        message = refusal(UsageError, lambda: opened.infer(phantom.folder, phantom.atlas, affine="off"))
        assert "atlas" in message


def only_flair(manifest: dict[str, Any]) -> None:
    manifest["model"]["channels"] = ["flair"]
    manifest["model"]["optional_channels"] = []
    manifest["model"]["architecture"]["in_channels"] = 1


def test_a_case_without_any_channel_of_the_bundle_is_refused(
    phantom: Any, changed_bundle: Callable[..., Path]
) -> None:
    with Pipeline.open(changed_bundle(only_flair), "ort-cpu", threads=1) as opened:
        t1 = phantom.folder / "case7_t1.nii.gz"
        message = refusal(UsageError, lambda: opened.infer(t1, phantom.atlas, affine="off"))
        assert "t1" in message and "flair" in message


def test_graphs_of_other_channels_than_the_manifest_says_are_one_line(
    phantom: Any, changed_bundle: Callable[..., Path]
) -> None:
    with Pipeline.open(changed_bundle(only_flair), "ort-cpu", threads=1) as opened:
        flair = phantom.folder / "case7_flair.nii.gz"
        message = refusal(BackendError, lambda: opened.infer(flair, flair, affine="off"))
        assert "encoder.onnx" in message


def test_a_bundle_without_registration_is_refused_at_once(changed_bundle: Callable[..., Path]) -> None:
    def change(manifest: dict[str, Any]) -> None:
        manifest["model"]["architecture"]["registration"] = False

    path = changed_bundle(change)
    assert "registration" in refusal(ConfigurationError, lambda: Pipeline.open(path))


def test_images_that_do_not_meet_are_refused(pipeline: Pipeline, phantom: Any, helpers: Any, tmp_path: Path) -> None:
    image = phantom.image("t1")
    far = image.affine.copy()
    far[:3, 3] += 1000.0
    path = helpers.write_image(tmp_path / "far_t1.nii.gz", np.asarray(image.dataobj), far)
    message = refusal(BadDataError, lambda: pipeline.infer(path, phantom.atlas, affine="off"))
    assert "far_t1.nii.gz" in message and "--affine" in message


def test_what_is_not_there_is_named(pipeline: Pipeline, phantom: Any, tmp_path: Path) -> None:
    for arguments in (
        {"case": tmp_path / "no_case", "atlas": phantom.atlas},
        {"case": phantom.folder, "atlas": tmp_path / "no_atlas.nii.gz"},
        {"case": phantom.folder, "atlas": phantom.atlas, "affine": str(tmp_path / "no_affine.txt")},
    ):
        message = refusal(MissingInputError, lambda arguments=arguments: pipeline.infer(**arguments))
        assert "no_" in message
    message = refusal(UsageError, lambda: pipeline.infer(phantom.folder, phantom.atlas, InferOptions(), affine="off"))
    assert "options" in message


# Orientation ----------------------------------------------------------------------------------------------


def folder_stored_as(phantom: Any, helpers: Any, folder: Path, codes: str) -> Path:
    for modality in MODALITIES:
        image = phantom.image(modality)
        data, affine = helpers.stored_as(np.asarray(image.dataobj), image.affine, codes)
        helpers.write_image(folder / f"case7_{modality}.nii.gz", np.ascontiguousarray(data), affine)
    return folder


@pytest.mark.parametrize("codes", ["RAS", "PSR", "IAL", "SLP"])
def test_a_case_stored_in_another_orientation_gives_the_same(
    pipeline: Pipeline, phantom: Any, truth_file: Path, helpers: Any, tmp_path: Path, codes: str
) -> None:
    """Same field on the atlas, same labels mapped back; rounding alone differs (measured: 2e-5 mm, no label)."""
    folder = folder_stored_as(phantom, helpers, tmp_path / codes, codes)
    want = pipeline.infer(phantom.folder, phantom.atlas, affine=str(truth_file))
    got = pipeline.infer(folder, phantom.atlas, affine=str(truth_file))
    assert got.native.orientation == codes != want.native.orientation
    assert np.abs(got.field.vectors_mm - want.field.vectors_mm).max() < 1e-3
    assert np.abs(got.jacobian - want.jacobian).max() < 1e-3
    for modality in MODALITIES:
        assert np.abs(got.moved[modality] - want.moved[modality]).max() < 0.05
    assert (got.labels_moved == want.labels_moved).mean() > 0.9999
    back, _ = helpers.stored_as(got.labels_native, np.asarray(got.native.affine), want.native.orientation)
    assert back.shape == want.labels_native.shape
    assert (back == want.labels_native).mean() > 0.9999
    assert got.volumes_ml["native"]["WT"] == pytest.approx(want.volumes_ml["native"]["WT"], rel=1e-3)
    for axis in range(3):
        lps = np.asarray(got.inverse_field.vectors_mm[axis])
        turned, _ = helpers.stored_as(lps, np.asarray(got.native.affine), want.native.orientation)
        assert np.percentile(np.abs(turned - want.inverse_field.vectors_mm[axis]), 99) < 0.02


@pytest.mark.parametrize("codes", ["RAS", "ASL"])
def test_an_atlas_stored_in_another_orientation_gives_the_same(
    pipeline: Pipeline, phantom: Any, truth_file: Path, helpers: Any, tmp_path: Path, codes: str
) -> None:
    image = nib.load(phantom.atlas)
    data, affine = helpers.stored_as(np.asarray(image.dataobj), image.affine, codes)
    atlas = helpers.write_image(tmp_path / "phantom_atlas.nii.gz", np.ascontiguousarray(data), affine)
    want = pipeline.infer(phantom.folder, phantom.atlas, affine=str(truth_file), inverse=False)
    got = pipeline.infer(phantom.folder, atlas, affine=str(truth_file), inverse=False)
    assert (got.labels_native == want.labels_native).mean() > 0.9999
    back, _ = helpers.stored_as(got.moved["t1"], np.asarray(got.fixed.geometry.affine), "LAS")
    assert np.abs(back - want.moved["t1"]).max() < 0.05
    for axis in range(3):
        turned, _ = helpers.stored_as(got.field.vectors_mm[axis], np.asarray(got.fixed.geometry.affine), "LAS")
        assert np.abs(turned - want.field.vectors_mm[axis]).max() < 1e-3


@pytest.mark.slow
def test_the_whole_way_does_not_depend_on_orientation(
    run: Run, pipeline: Pipeline, phantom: Any, helpers: Any, tmp_path: Path
) -> None:
    """With the affine found anew: its optimiser may end a little elsewhere."""
    folder = folder_stored_as(phantom, helpers, tmp_path / "SLP", "SLP")
    got = pipeline.infer(folder, phantom.atlas, refine=0)
    brain = foreground(np.asarray(run.result.fixed.data))
    difference = np.linalg.norm(got.field.vectors_mm - run.result.field.vectors_mm, axis=0)[brain]
    assert np.percentile(difference, 95) < 0.3
    # Random weights are far more sensitive than trained ones.
    assert (got.labels_moved == run.result.labels_moved)[brain].mean() > 0.93


# The fixed image's codes ----------------------------------------------------------------------------------


def test_an_atlas_is_encoded_once_for_two_cases(
    tiny_bundle: Path, phantom: Any, helpers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JRS_CACHE_LIMIT", "0")  # in memory alone
    second = folder_stored_as(phantom, helpers, tmp_path / "second", "RAS")
    with Pipeline.open(tiny_bundle, "ort-cpu", threads=1) as fresh:
        calls = counted(fresh, monkeypatch)
        options = InferOptions(affine="off", segment=False, inverse=False)
        fresh.infer(phantom.folder, phantom.atlas, options)
        assert len(calls) == 2
        fresh.infer(second, str(phantom.atlas), options)
        assert len(calls) == 3
        # Another file, or the same name with other content, is another atlas.
        copy = tmp_path / "atlas" / phantom.atlas.name
        copy.parent.mkdir()
        shutil.copy(phantom.atlas, copy)
        fresh.infer(phantom.folder, copy, options)
        assert len(calls) == 5
        image = nib.load(phantom.atlas)
        helpers.write_image(copy, np.asarray(image.dataobj)[::-1] * 1.5, image.affine)
        fresh.infer(phantom.folder, copy, options)
        assert len(calls) == 7


def test_a_shared_pipeline_gives_what_a_fresh_one_gives(
    quick: Callable[..., Result], tiny_bundle: Path, phantom: Any
) -> None:
    with Pipeline.open(tiny_bundle, "ort-cpu", threads=1) as fresh:
        same(fresh.infer(phantom.folder, phantom.atlas, affine="off"), quick())


# The five lines -------------------------------------------------------------------------------------------


def test_the_five_lines_a_user_writes(
    tiny_bundle: Path, phantom: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """As in the package's docstring, with the default bundle and its names replaced."""
    import jrs.bundle

    monkeypatch.setattr(jrs.bundle, "bundle_path", lambda name: tiny_bundle if name == "default" else Path(name))
    monkeypatch.chdir(tmp_path)
    shutil.copy(phantom.folder / "case7_t1.nii.gz", "case.nii.gz")
    shutil.copy(phantom.atlas, "atlas.nii.gz")
    from jrs import Pipeline

    with Pipeline.open() as pipeline:
        result = pipeline.infer("case.nii.gz", atlas="atlas.nii.gz")
    result.save("out/")
    print(result.volumes_ml, result.folding_percent)

    assert "WT" in capsys.readouterr().out
    assert (tmp_path / "out" / "case" / "case_report.json").exists()
    assert (tmp_path / "out" / "case" / "case_from-native_to-atlas_mode-image_xfm.nii.gz").exists()
