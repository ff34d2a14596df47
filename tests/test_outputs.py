"""The files beside the images: sidecars, colour tables, the report's schema, label schemes, BIDS folders."""

from __future__ import annotations

import errno
import json
import os
import shutil
import struct
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

import jrs
from jrs.errors import CannotCreateError, OutputError, UsageError
from jrs.fields import DisplacementField
from jrs.runtime import results
from jrs.runtime.pipeline import Pipeline
from jrs.runtime.report_schema import report_schema
from jrs.runtime.results import Result

pytest.importorskip("torch")  # makes the tiny bundle
jsonschema = pytest.importorskip("jsonschema")

SUFFIX = {"t1": "T1w", "t1ce": "ce-gadolinium_T1w", "t2": "T2w", "flair": "FLAIR"}


@pytest.fixture(scope="module")
def pipeline(tiny_bundle: Path) -> Iterator[Pipeline]:
    with Pipeline.open(tiny_bundle, "ort-cpu", threads=1) as opened:
        yield opened


@pytest.fixture(scope="module")
def quick(pipeline: Pipeline, phantom: Any) -> Callable[..., Result]:
    """Without the search for an affine."""
    return lambda **changes: pipeline.infer(
        changes.pop("case", phantom.folder), phantom.atlas, **{"affine": "off", **changes}
    )


@pytest.fixture(scope="module")
def folder(quick: Callable[..., Result], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quick().save(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def dataset(phantom: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small valid raw BIDS dataset of one subject and one session."""
    root = tmp_path_factory.mktemp("bids") / "raw"
    anat = root / "sub-01" / "ses-a" / "anat"
    anat.mkdir(parents=True)
    for modality, suffix in SUFFIX.items():
        shutil.copy(phantom.folder / f"case7_{modality}.nii.gz", anat / f"sub-01_ses-a_{suffix}.nii.gz")
    about = {"Name": "phantom", "BIDSVersion": "1.10.0", "License": "CC0", "Authors": ["A. One", "B. Two"]}
    (root / "dataset_description.json").write_text(json.dumps(about), encoding="utf-8")
    (root / "README.md").write_text("A phantom of analytic functions, made for a test.\n" * 5, encoding="utf-8")
    return root


@pytest.fixture(scope="module")
def derivative(dataset: Path, quick: Callable[..., Result]) -> Path:
    """What inference makes of the dataset."""
    out = dataset.parent / "derivatives" / "jrs"
    quick(case=dataset / "sub-01" / "ses-a" / "anat").save(out)
    return out


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def report_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = read(next(folder.glob("*_report.json")))
    return found


# The schema -----------------------------------------------------------------------------------------------


def validate(report: Any) -> None:
    schema = report_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.Draft202012Validator(schema).validate(report)


def test_a_report_fits_its_schema_and_the_schema_names_every_key(folder: Path) -> None:
    report = report_of(folder)
    validate(report)
    assert set(report) <= set(report_schema()["properties"])
    assert report["report_version"] == 1


@pytest.mark.parametrize("options", [{"segment": False, "inverse": False}, {"modality": "t2"}, {"affine": "rigid"}])
def test_reports_of_less_fit_it_too(quick: Callable[..., Result], tmp_path: Path, options: dict[str, Any]) -> None:
    report = report_of(quick(**options).save(tmp_path))
    validate(report)
    if options.get("segment") is False:
        assert report["volumes_ml"] is None and report["label_scheme"] is None and report["label_values"] == {}
        assert report["volume_verdict"]["answer"] == "not_computed"
        assert report["jacobian"]["inside"] is None
    if options.get("modality") == "t2":  # the atlas is a T1
        assert report["similarity"] is None and report["modalities_used"] == ["t2"]


def test_the_schema_refuses_what_is_wrong(folder: Path) -> None:
    for key, value in (("report_version", 2), ("label_scheme", "brats1999"), ("volumes_ml", {}), ("warnings", "none")):
        with pytest.raises(jsonschema.ValidationError):
            validate({**report_of(folder), key: value})
    short = report_of(folder)
    del short["jacobian"]
    with pytest.raises(jsonschema.ValidationError, match="jacobian"):
        validate(short)


def test_jrs_schema_prints_it(capsys: pytest.CaptureFixture[str]) -> None:
    from jrs.cli.main import run

    assert run(["schema", "report"]) == 0
    assert json.loads(capsys.readouterr().out) == report_schema()
    assert run(["schema", "nothing"]) == 2


# Volumes --------------------------------------------------------------------------------------------------


def test_volumes_after_the_affine_and_their_ratio(quick: Callable[..., Result], tmp_path: Path) -> None:
    # An ITK affine that enlarges by 1.08 along each axis about the atlas's centre.
    text = "#Insight Transform File V1.0\n#Transform 0\nTransform: AffineTransform_double_3_3\n"
    text += "Parameters: 1.08 0 0 0 1.08 0 0 0 1.08 0 0 0\nFixedParameters: -1 2 0.5\n"
    (tmp_path / "larger.tfm").write_text(text, encoding="utf-8")
    report = report_of(quick(affine=str(tmp_path / "larger.tfm")).save(tmp_path))
    native, affine, moved = (report["volumes_ml"][where] for where in ("native", "affine", "moved"))
    scale = 1.08**3
    assert report["affine_determinant"] == pytest.approx(scale, rel=1e-5)
    for region in ("WT", "TC", "ET"):
        assert affine[region] == pytest.approx(native[region] / scale, rel=1e-4)
        assert report["volume_ratio_to_affine"][region] == pytest.approx(moved[region] / affine[region], rel=1e-4)
    kept = report["volume_verdict"]["kept_percent"]
    assert kept == pytest.approx(100.0 * moved["WT"] / affine["WT"], rel=1e-4)
    said = any("shrank the whole tumour" in warning for warning in report["warnings"])
    assert said == (report["volume_verdict"]["answer"] == "shrunk") == (kept < 95.0)


# Label schemes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("scheme", "enhancing"), [("brats2018", 4), ("brats2023", 3)])
def test_a_scheme_is_in_every_file(
    quick: Callable[..., Result], tmp_path: Path, scheme: str, enhancing: int
) -> None:
    out = quick(label_scheme=scheme).save(tmp_path)
    report = report_of(out)
    assert report["label_scheme"] == scheme and report["label_values"]["enhancing_tumor"] == enhancing
    for name in (report["outputs"]["labels_native"], report["outputs"]["labels_moved"]):
        image = nib.load(out / name)
        data = np.asarray(image.dataobj)
        assert set(np.unique(data)) == {0, 1, 2, enhancing}
        assert scheme in image.header["descrip"].item().decode()
        beside = read(out / name.replace(".nii.gz", ".json"))
        assert beside["LabelScheme"] == scheme and beside["LabelMap"][str(enhancing)] == "enhancing_tumor"
        rows = (out / name.replace(".nii.gz", ".tsv")).read_text(encoding="utf-8").splitlines()
        assert rows[-1].startswith(f"{enhancing}\tEnhancing")
    ml = abs(np.linalg.det(nib.load(out / report["outputs"]["labels_native"]).affine[:3, :3])) / 1000.0
    labels = np.asarray(nib.load(out / report["outputs"]["labels_native"]).dataobj)
    assert report["volumes_ml"]["native"]["ET"] == pytest.approx(ml * (labels == enhancing).sum(), rel=1e-4)
    for kind in ("colors_slicer", "colors_itksnap"):
        text = (out / report["outputs"][kind]).read_text(encoding="utf-8")
        assert scheme in text and [line.split()[0] for line in text.splitlines()][-1] == str(enhancing)
    assert scheme in (out / report["outputs"]["report_html"]).read_text(encoding="utf-8")


def test_schemes_differ_in_nothing_but_the_number(quick: Callable[..., Result]) -> None:
    old, new = quick(label_scheme="brats2018"), quick(label_scheme="brats2023")
    assert old.labels_native is not None and new.labels_native is not None
    np.testing.assert_array_equal(np.where(old.labels_native == 4, 3, old.labels_native), new.labels_native)
    assert old.volumes_ml == new.volumes_ml
    assert quick().label_scheme == "brats2018"  # the bundle's own


def test_an_unknown_scheme_is_refused_before_anything_is_read(pipeline: Pipeline) -> None:
    with pytest.raises(UsageError, match="label-scheme"):
        pipeline.infer("/no/such/case", label_scheme="brats")


# Headers --------------------------------------------------------------------------------------------------


def test_label_maps_as_stored(folder: Path) -> None:
    import gzip

    for name in (report_of(folder)["outputs"][kind] for kind in ("labels_native", "labels_moved")):
        header = gzip.decompress((folder / name).read_bytes())[:348]
        # Offsets of NIfTI-1: intent_code 68, datatype 70, scl_slope 112, scl_inter 116, qform and sform code 252.
        assert struct.unpack_from("<hh", header, 68) == (1002, 2)
        assert struct.unpack_from("<ff", header, 112) == (1.0, 0.0)
        assert struct.unpack_from("<hh", header, 252) == (1, 1)
        image = nib.load(folder / name)
        np.testing.assert_allclose(image.get_qform(), image.get_sform(), atol=1e-4)


# Sidecars -------------------------------------------------------------------------------------------------


def test_every_image_has_a_sidecar_that_says_where_it_comes_from(folder: Path, phantom: Any) -> None:
    outputs = report_of(folder)["outputs"]
    images = {kind: name for kind, name in outputs.items() if name.endswith(".nii.gz")}
    assert len(images) == 9
    sources = {(phantom.folder / f"case7_{m}.nii.gz").resolve().as_uri() for m in SUFFIX}
    for kind, name in images.items():
        beside = read(folder / name.replace(".nii.gz", ".json"))
        assert outputs[f"{kind}_sidecar"] == name.replace(".nii.gz", ".json")
        assert beside["Description"] and set(beside["Sources"]) <= sources and beside["Sources"]
        made = beside["GeneratedBy"][0]
        assert (made["Name"], made["Version"], made["Bundle"]["Name"]) == ("jrs", jrs.__version__, "tiny")
        reference = phantom.atlas.resolve().as_uri()
        native = kind in ("labels_native", "inverse_field")
        assert (beside["SpatialReference"] == reference) != native
    moved = read(folder / images["moved_t2"].replace(".nii.gz", ".json"))
    assert moved["Sources"] == [(phantom.folder / "case7_t2.nii.gz").resolve().as_uri()]
    assert read(folder / images["field"].replace(".nii.gz", ".json"))["Units"] == "mm"


def test_skull_stripped_is_read_off_the_image(quick: Callable[..., Result], phantom: Any, tmp_path: Path) -> None:
    # The phantom's background ripples around zero, as that of resampled images does.
    image = nib.load(phantom.folder / "case7_t1.nii.gz")
    noisy = np.asarray(image.dataobj) + np.abs(np.random.default_rng(0).normal(2.0, 0.5, image.shape)) + 1.5
    assert noisy.min() > 0
    nib.save(nib.Nifti1Image(noisy.astype(np.float32), image.affine), tmp_path / "x_t1.nii.gz")
    for case, stripped in ((phantom.folder, True), (tmp_path / "x_t1.nii.gz", False)):
        result = quick(case=case, segment=False, inverse=False)
        out = result.save(tmp_path / "out")
        beside = read(out / result.names.moved("t1").replace(".nii.gz", ".json"))
        assert beside["SkullStripped"] is stripped


# BIDS -----------------------------------------------------------------------------------------------------


def test_a_bids_case_gives_a_derivative_dataset(derivative: Path) -> None:
    about = read(derivative / "dataset_description.json")
    assert about["DatasetType"] == "derivative" and about["GeneratedBy"][0]["Name"] == "jrs"
    assert {path.name for path in derivative.iterdir()} == {
        *("dataset_description.json", ".bidsignore", "README.md", "sub-01")
    }
    anat = derivative / "sub-01" / "ses-a" / "anat"
    report = report_of(anat)
    assert {path.name for path in anat.iterdir()} == set(report["outputs"].values())
    assert all(path.name.startswith("sub-01_ses-a_") for path in anat.iterdir())
    outputs = report["outputs"]
    assert outputs["moved_t1ce"] == "sub-01_ses-a_ce-gadolinium_space-phantomatlas_desc-moved_T1w.nii.gz"
    assert outputs["labels_native"] == "sub-01_ses-a_seg-tumor_dseg.nii.gz"
    beside = read(anat / outputs["moved_flair_sidecar"])
    assert beside["Sources"] == ["bids:raw:sub-01/ses-a/anat/sub-01_ses-a_FLAIR.nii.gz"]


def test_the_raw_dataset_is_not_written_into(dataset: Path, quick: Callable[..., Result]) -> None:
    before = {path: path.read_bytes() for path in dataset.rglob("*") if path.is_file()}
    anat = dataset / "sub-01" / "ses-a" / "anat"
    with pytest.raises(UsageError, match="derivatives"):
        quick(case=anat, keep_clear_of=dataset)
    with pytest.raises(UsageError, match="derivatives"):
        quick(case=anat, segment=False, inverse=False).save(dataset)
    assert {path: path.read_bytes() for path in dataset.rglob("*") if path.is_file()} == before


def test_what_a_user_wrote_into_the_derivative_stays(
    dataset: Path, quick: Callable[..., Result], tmp_path: Path
) -> None:
    about = {"Name": "mine", "BIDSVersion": "1.10.0", "DatasetType": "derivative", "GeneratedBy": [{"Name": "me"}]}
    (tmp_path / "dataset_description.json").write_text(json.dumps(about), encoding="utf-8")
    (tmp_path / ".bidsignore").write_text("notes/\n", encoding="utf-8")
    (tmp_path / "README").write_text("mine", encoding="utf-8")
    result = quick(case=dataset / "sub-01" / "ses-a" / "anat", segment=False, inverse=False)
    result.save(tmp_path)
    with pytest.raises(CannotCreateError, match="--overwrite"):
        result.save(tmp_path)
    result.save(tmp_path, overwrite=True)
    assert read(tmp_path / "dataset_description.json") == about
    lines = (tmp_path / ".bidsignore").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "notes/" and len(lines) == len(set(lines)) > 4
    assert not (tmp_path / "README.md").exists()


def test_overwriting_a_bids_case_drops_modalities_that_are_gone(
    dataset: Path, quick: Callable[..., Result], tmp_path: Path
) -> None:
    anat = dataset / "sub-01" / "ses-a" / "anat"
    quick(case=anat, inverse=False).save(tmp_path)
    flair = quick(case=None, modalities={m: anat / f"sub-01_ses-a_{SUFFIX[m]}.nii.gz" for m in ("t1", "flair")})
    folder = flair.save(tmp_path, overwrite=True)
    assert {path.name for path in folder.iterdir()} == set(report_of(folder)["outputs"].values())
    assert not list(folder.glob("*T2w*"))


@pytest.mark.slow
def test_the_bids_validator_finds_no_error(dataset: Path, derivative: Path) -> None:
    validator = shutil.which("bids-validator-deno")
    if validator is None:
        pytest.skip("bids-validator-deno is not installed")
    for root in (dataset, derivative):
        done = subprocess.run(
            [validator, str(root), "--format", "json"], capture_output=True, text=True, timeout=300, check=False
        )
        found = json.loads(done.stdout[done.stdout.index("{") :])
        errors = [issue for issue in found["issues"]["issues"] if issue["severity"] == "error"]
        assert errors == [] and done.returncode == 0, (root, errors, done.stderr)
        assert found["summary"]["subjects"] == ["01"]


# The same again -------------------------------------------------------------------------------------------


def test_images_saved_again_are_the_same_bytes(quick: Callable[..., Result], tmp_path: Path) -> None:
    result = quick()
    folders = [result.save(tmp_path / name) for name in ("one", "two")]
    for name in result.images().values():
        one, two = ((folder / name).read_bytes() for folder in folders)
        assert one == two, name


def test_an_image_that_cannot_be_written_leaves_nothing(
    quick: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = quick()
    save_field = results.save_field
    written = []

    def full(path: Path, field: DisplacementField) -> None:
        if written:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written.append(path)
        save_field(path, field)

    monkeypatch.setattr(results, "save_field", full)
    with pytest.raises(OutputError, match="No space left"):
        result.save(tmp_path / "out")
    assert written and not (tmp_path / "out" / result.case.name).exists()
