"""Finding cases: every layout by the names its publisher gives the files, manifests, and what a scan tells."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from jrs.errors import BadDataError, MissingInputError, UsageError
from jrs.train.datasets import ImageFile, TrainingCase, detect_layout, find_cases, load_manifest
from jrs.train.datasets.case import class_table, tumor_classes
from jrs.train.datasets.manifest import write_manifest
from jrs.train.datasets.scan import scan_cases
from jrs.train.preparing import structure_codes
from jrs.volume import Volume

Array = np.ndarray[Any, Any]
CORE, EDEMA, ENHANCING = "necrotic_or_nonenhancing_core", "edema", "enhancing_tumor"
LABELS = ("background", CORE, EDEMA, ENHANCING)


def touch(root: Path, *names: str) -> Path:
    """Empty files: finding cases looks at names alone."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")
    return root


def only(root: Path, layout: str = "auto") -> TrainingCase:
    (case,) = find_cases(root, layout)
    return case


# BraTS ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("folder", "stem", "ending", "modalities", "subject", "session"),
    [
        ("HGG/", "Brats18_TCIA01_101_1", "_{}.nii.gz", "t1 t1ce t2 flair", "TCIA01_101", "1"),
        ("LGG/", "BraTS19_TCIA13_653_1", "_{}.nii.gz", "t1 t1ce t2 flair", "TCIA13_653", "1"),
        ("", "BraTS19_CBICA_AAB_1", "_{}.nii", "t1 t1ce t2 flair", "CBICA_AAB", "1"),
        ("", "BraTS20_Training_001", "_{}.nii.gz", "t1 t1ce t2 flair", "BraTS20_Training_001", None),
        ("", "BraTS2021_00000", "_{}.nii.gz", "t1 t1ce t2 flair", "BraTS2021_00000", None),
        ("", "BraTS-GLI-00002-001", "-{}.nii.gz", "t1n t1c t2w t2f", "BraTS-GLI-00002", "001"),
        ("a/b/", "BraTS-SSA-00002-000", "-{}.nii.gz", "t1n t1c t2w t2f", "BraTS-SSA-00002", "000"),
    ],
)
def test_brats_of_every_year(
    tmp_path: Path, folder: str, stem: str, ending: str, modalities: str, subject: str, session: str | None
) -> None:
    files = {k: f"{folder}{stem}/{stem}{ending.format(k)}" for k in (*modalities.split(), "seg")}
    touch(tmp_path, *files.values(), "name_mapping.csv", f"{folder}{stem}/._{stem}{ending.format('t1')}")
    assert detect_layout(tmp_path) == "brats"
    case = only(tmp_path)
    wanted = dict(zip(("t1", "t1ce", "t2", "flair"), modalities.split(), strict=True))
    assert case.images == {m: ImageFile(tmp_path / files[word]) for m, word in wanted.items()}
    assert list(case.images) == ["t1", "t1ce", "t2", "flair"]
    assert case.segmentation == ImageFile(tmp_path / files["seg"])
    assert (case.name, case.subject, case.session) == (stem, subject, session)


def test_the_same_patient_of_two_years_is_one_subject(tmp_path: Path) -> None:
    touch(tmp_path, *(f"{y}_CBICA_AAB_1/{y}_CBICA_AAB_1_t1.nii.gz" for y in ("Brats18", "BraTS19")))
    assert {case.subject for case in find_cases(tmp_path)} == {"CBICA_AAB"}


def test_brats_reg_keeps_two_sessions_in_one_folder(tmp_path: Path) -> None:
    stems = ("BraTSReg_001_00_0000", "BraTSReg_001_01_0106")
    touch(tmp_path, *(f"BraTSReg_001/{s}_{k}" for s in stems for k in ("t1.nii.gz", "t1ce.nii.gz", "landmarks.csv")))
    first, second = find_cases(tmp_path)
    assert (first.name, second.name) == stems
    assert first.subject == second.subject == "BraTSReg_001"
    assert (first.session, second.session) == ("00_0000", "01_0106")
    assert second.landmarks == tmp_path / "BraTSReg_001" / f"{stems[1]}_landmarks.csv"


def test_the_misnamed_label_map_of_brats_2020(tmp_path: Path) -> None:
    folder = "BraTS20_Training_355"
    touch(tmp_path, f"{folder}/{folder}_t1.nii", f"{folder}/W39_1998.09.19_Segm.nii")
    case = only(tmp_path)
    assert case.segmentation == ImageFile(tmp_path / folder / "W39_1998.09.19_Segm.nii")
    assert "W39" in case.notes[0]


def test_a_label_map_without_images_is_a_case_that_says_so(tmp_path: Path) -> None:
    touch(tmp_path, "BraTS2021_00001/BraTS2021_00001_seg.nii.gz", "BraTS2021_00000/BraTS2021_00000_t1.nii.gz")
    report = scan_cases(find_cases(tmp_path))
    assert any("no image" in f.text for f in report.cases[1].findings) and not report.cases[1].usable


def test_other_names_with_a_modality_at_their_end(tmp_path: Path) -> None:
    touch(tmp_path, "UCSF-PDGM-0004_T1c.nii.gz", "UCSF-PDGM-0004_tumor_segmentation.nii.gz")
    touch(tmp_path, "b_t1.nii.gz", "b_aseg.mgz")
    glioma, bert = find_cases(tmp_path)
    assert list(glioma.images) == ["t1ce"] and glioma.segmentation is not None and glioma.tumor_classes is None
    assert bert.structures == ImageFile(tmp_path / "b_aseg.mgz") and bert.segmentation is None


def test_two_files_for_one_modality_are_told(tmp_path: Path) -> None:
    touch(tmp_path, "BraTS2021_00000_t1.nii", "BraTS2021_00000_t1.nii.gz")
    assert "two files for t1" in only(tmp_path).notes[0]


# What labels mean -----------------------------------------------------------------------------------------


def classes(case: TrainingCase, *values: int) -> list[int]:
    table = class_table(case, LABELS, (0, 1, 2, 4))
    return tumor_classes(np.array(values), table, ImageFile(Path("seg.nii.gz"))).tolist()


def case_named(tmp_path: Path, stem: str, between: str = "_") -> TrainingCase:
    touch(tmp_path / stem, *(f"{stem}{between}{k}.nii.gz" for k in ("t2w", "seg")))
    return only(tmp_path / stem)


def test_enhancing_tumour_is_4_up_to_2022_and_3_after(tmp_path: Path) -> None:
    assert classes(case_named(tmp_path, "BraTS2021_00000"), 0, 1, 2, 4) == [0, 1, 2, 3]
    assert classes(case_named(tmp_path, "BraTS2021_00001"), 0, 1, 2, 3) == [0, 1, 2, 3]
    assert classes(case_named(tmp_path, "BraTS-GLI-00000-000", "-"), 0, 1, 2, 3) == [0, 1, 2, 3]


def test_4_is_the_resection_cavity_in_2024(tmp_path: Path) -> None:
    assert classes(case_named(tmp_path, "BraTS-GLI-02064-100", "-"), 0, 1, 2, 3, 4) == [0, 1, 2, 3, 0]


@pytest.mark.parametrize("stem", ["BraTS2021_00000", "case"])
def test_3_and_4_in_one_file_are_refused(tmp_path: Path, stem: str) -> None:
    with pytest.raises(BadDataError, match=r"^seg\.nii\.gz: holds both 3 and 4[^\n]+4=background"):
        classes(case_named(tmp_path, stem), 0, 1, 2, 3, 4)


def test_paediatric_labels_of_2024_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadDataError, match="label 4 is unknown"):
        classes(case_named(tmp_path, "BraTS-PED-00002-000", "-"), 0, 1, 2, 3, 4)


# MSD ------------------------------------------------------------------------------------------------------

TASK01 = {
    "modality": {"0": "FLAIR", "1": "T1w", "2": "t1gd", "3": "T2w"},
    "labels": {"0": "background", "1": "edema", "2": "non-enhancing tumor", "3": "enhancing tumour"},
    "training": [{"image": "./imagesTr/BRATS_001.nii.gz", "label": "./labelsTr/BRATS_001.nii.gz"}],
}


def msd(root: Path, description: Any = TASK01) -> Path:
    touch(root, "imagesTr/BRATS_001.nii.gz", "imagesTr/._BRATS_001.nii.gz", "labelsTr/BRATS_001.nii.gz")
    if description is not None:
        (root / "dataset.json").write_text(json.dumps(description))
    return root


def test_the_decathlons_channels_and_labels(tmp_path: Path) -> None:
    case = only(msd(tmp_path))
    image = tmp_path / "imagesTr/BRATS_001.nii.gz"
    assert case.images == {m: ImageFile(image, i) for m, i in (("t1", 1), ("t1ce", 2), ("t2", 3), ("flair", 0))}
    assert case.name == "BRATS_001" and case.layout == "msd"
    assert classes(case, 0, 1, 2, 3) == [0, LABELS.index(EDEMA), LABELS.index(CORE), LABELS.index(ENHANCING)]


def test_the_description_decides(tmp_path: Path) -> None:
    case = only(msd(tmp_path, {**TASK01, "modality": {"0": "T2w", "1": "FLAIR", "2": "T1w", "3": "T1gd"}}))
    assert {m: f.volume for m, f in case.images.items()} == {"t1": 2, "t1ce": 3, "t2": 0, "flair": 1}


def test_without_a_description_the_published_order_is_taken(tmp_path: Path) -> None:
    case = only(msd(tmp_path, None))
    assert case.images["flair"].volume == 0 and "dataset.json" in case.notes[0]


@pytest.mark.parametrize("change", [{"modality": {"0": "CT"}}, {"labels": {"1": "liver"}}, {"modality": []}])
def test_another_task_of_the_decathlon(tmp_path: Path, change: Any) -> None:
    with pytest.raises(BadDataError, match=rf"^{tmp_path}/dataset\.json: [^\n]+$"):
        find_cases(msd(tmp_path, {**TASK01, **change}))


def test_volumes_of_a_4d_file_are_read_in_their_order(tmp_path: Path, helpers: Any) -> None:
    data = np.stack([np.arange(64.0).reshape(4, 4, 4) + 100 * k for k in range(4)], axis=-1).astype(np.float32)
    helpers.write_image(msd(tmp_path) / "imagesTr/BRATS_001.nii.gz", data, np.eye(4))
    volumes = only(tmp_path).read_images()
    for modality, index in (("t1", 1), ("t1ce", 2), ("t2", 3), ("flair", 0)):
        np.testing.assert_array_equal(volumes[modality].data, data[..., index])
    with pytest.raises(BadDataError, match=r"has 4 volumes, there is no number 4"):
        ImageFile(tmp_path / "imagesTr/BRATS_001.nii.gz", 4).read()


# BIDS -----------------------------------------------------------------------------------------------------


def test_bids_sessions_and_derivatives(tmp_path: Path) -> None:
    raw = "sub-01/ses-a/anat/sub-01_ses-a"
    names = (f"{raw}_T1w.nii.gz", f"{raw}_ce-gadolinium_T1w.nii.gz", f"{raw}_T2w.nii.gz", f"{raw}_FLAIR.nii.gz")
    labels = ("seg-tumor_dseg", "desc-aseg_dseg", "space-MNI152_seg-tumor_dseg")
    touch(tmp_path, "dataset_description.json", *names, "sub-01/ses-b/anat/sub-01_ses-b_T1w.nii.gz")
    touch(tmp_path, *(f"derivatives/jrs/{raw}_{label}.nii.gz" for label in labels))
    assert detect_layout(tmp_path) == "bids"
    first, second = find_cases(tmp_path)
    assert first.images == {
        m: ImageFile(tmp_path / n) for m, n in zip(("t1", "t1ce", "t2", "flair"), names, strict=True)
    }
    assert first.segmentation == ImageFile(tmp_path / f"derivatives/jrs/{raw}_seg-tumor_dseg.nii.gz")
    assert first.structures == ImageFile(tmp_path / f"derivatives/jrs/{raw}_desc-aseg_dseg.nii.gz")
    assert (first.name, first.subject, first.session) == ("sub-01_ses-a", "sub-01", "a")
    assert (second.name, second.subject) == ("sub-01_ses-b", "sub-01")


def test_what_jrs_itself_segmented_is_no_truth(tmp_path: Path) -> None:
    label = "derivatives/jrs/sub-01/anat/sub-01_seg-tumor_dseg"
    touch(tmp_path, "dataset_description.json", "sub-01/anat/sub-01_T1w.nii.gz", f"{label}.nii.gz")
    assert only(tmp_path).segmentation == ImageFile(tmp_path / f"{label}.nii.gz")
    for made_by, known in (("a rater", True), ("jrs", False)):
        sidecar = {"Manual": made_by != "jrs", "GeneratedBy": [{"Name": made_by}]}
        (tmp_path / f"{label}.json").write_text(json.dumps(sidecar), encoding="utf-8")
        assert (only(tmp_path).segmentation is not None) is known


def test_what_jrs_wrote_beside_a_case_is_none(tmp_path: Path) -> None:
    """As ``--out`` makes it that names the folder of the cases."""
    made = ("seg-tumor_dseg", "space-sri24_desc-moved_T1w")
    touch(tmp_path, "A/A_t1.nii.gz", "A/A_flair.nii.gz", *(f"A/A_{name}.nii.gz" for name in made))
    for name in made:
        (tmp_path / f"A/A_{name}.json").write_text('{"GeneratedBy": [{"Name": "jrs"}]}', encoding="utf-8")
    case = only(tmp_path)
    assert case.name == "A" and set(case.images) == {"t1", "flair"} and case.segmentation is None


def test_tissues_of_fmriprep_are_no_tumour(tmp_path: Path) -> None:
    touch(tmp_path, "sub-01/anat/sub-01_T1w.nii.gz", "derivatives/fmriprep/sub-01/anat/sub-01_dseg.nii.gz")
    assert only(tmp_path).segmentation is None


def test_the_images_of_a_case_lie_in_one_space(tmp_path: Path) -> None:
    spaces = {"space-SRI24_T1w", "space-SRI24_FLAIR", "T1w", "space-SRI24_seg-tumor_dseg"}
    touch(tmp_path, *(f"sub-01/anat/sub-01_{s}.nii.gz" for s in spaces), "sub-01/anat/sub-01_run-2_T1w.nii.gz")
    case = only(tmp_path)
    assert {f.path.name for f in case.files().values()} == {
        f"sub-01_space-SRI24_{k}.nii.gz" for k in ("T1w", "FLAIR", "seg-tumor_dseg")
    }


# FreeSurfer -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("folder", "image", "labels", "subject", "session", "numbering"),
    [
        ("bert", "mri/norm.mgz", "mri/aseg.mgz", "bert", None, "freesurfer"),
        ("OAS1_0002_MR1", "norm.mgz", "aseg.nii.gz", "OAS1_0002", "MR1", "freesurfer"),
        ("OASIS_OAS1_0001_MR1", "norm.nii.gz", "seg35.nii.gz", "OAS1_0001", "MR1", "seg35"),
        ("OASIS_OAS1_0003_MR1", "aligned_norm.nii.gz", "aligned_seg35.nii.gz", "OAS1_0003", "MR1", "seg35"),
        ("OAS30001_MR_d0129", "mri/norm.mgz", "mri/aseg.mgz", "OAS30001", "MR_d0129", "freesurfer"),
        ("tp2.long.anna", "mri/norm.mgz", "mri/aseg.mgz", "anna", "tp2", "freesurfer"),
    ],
)
def test_freesurfer_and_oasis(
    tmp_path: Path, folder: str, image: str, labels: str, subject: str, session: str | None, numbering: str
) -> None:
    touch(tmp_path, f"{folder}/{image}", f"{folder}/{labels}", "fsaverage/mri/norm.mgz", f"{folder}/mri/orig.mgz")
    assert detect_layout(tmp_path) == "freesurfer"
    case = only(tmp_path)
    assert case.images == {"t1": ImageFile(tmp_path / folder / image)}
    assert case.structures == ImageFile(tmp_path / folder / labels)
    assert (case.name, case.subject, case.session, case.numbering) == (folder, subject, session, numbering)
    assert only(tmp_path / folder).name == folder


def test_two_visits_of_oasis_are_one_subject(tmp_path: Path) -> None:
    touch(tmp_path, *(f"disc1/OAS1_0061_MR{k}/mri/norm.mgz" for k in (1, 2)))
    assert [(c.subject, c.session) for c in find_cases(tmp_path)] == [("OAS1_0061", "MR1"), ("OAS1_0061", "MR2")]


def test_freesurfers_subjects_of_a_bids_data_set(tmp_path: Path) -> None:
    inside = "derivatives/freesurfer/sub-01_ses-a/mri"
    touch(tmp_path, f"{inside}/norm.mgz", f"{inside}/aseg.mgz", "sub-01/ses-a/anat/sub-01_ses-a_T1w.nii.gz")
    assert detect_layout(tmp_path) == "bids"
    assert only(tmp_path).images["t1"].path.name == "sub-01_ses-a_T1w.nii.gz"
    case = only(tmp_path / "derivatives/freesurfer")
    assert (case.layout, case.subject, case.session) == ("freesurfer", "sub-01", "ses-a")


def test_mgz_is_read_with_its_affine(tmp_path: Path) -> None:
    affine = np.array([[-1.0, 0, 0, 4], [0, 0, 1, -3], [0, -1, 0, 5], [0, 0, 0, 1]])
    data = np.random.default_rng(0).uniform(1, 100, (6, 7, 8)).astype(np.float32)
    aseg = np.random.default_rng(1).choice([0, 2, 3, 41, 77], (6, 7, 8)).astype(np.int32)
    (tmp_path / "bert/mri").mkdir(parents=True)
    nib.save(nib.MGHImage(data, affine), tmp_path / "bert/mri/norm.mgz")
    nib.save(nib.MGHImage(aseg, affine), tmp_path / "bert/mri/aseg.mgz")
    case = only(tmp_path)
    volume = case.read_images()["t1"]
    np.testing.assert_array_equal(volume.data, data)
    np.testing.assert_allclose(volume.geometry.affine, affine)
    assert case.structures is not None
    codes = structure_codes(case, case.structures.read(labels=True))
    # Left and right of a paired structure are 1..13 and 14..26 in the order of jrs.structures; 77 is not scored.
    expected = np.select([aseg == 2, aseg == 3, aseg == 41], [1, 2, 14])
    np.testing.assert_array_equal(codes, expected)


def test_the_35_labels_of_the_neurite_release(helpers: Any) -> None:
    """Numbers as the release's own table (seg35_labels.txt) names them."""
    from jrs.geometry import Geometry
    from jrs.structures import STRUCTURES

    named = {
        1: "left_cerebral_white_matter",
        2: "left_cerebral_cortex",
        7: "left_thalamus",
        12: "fourth_ventricle",
        13: "brain_stem",
        14: "left_hippocampus",
        17: "left_ventral_diencephalon",
        20: "right_cerebral_white_matter",
        25: "right_cerebellar_cortex",
        30: "right_hippocampus",
        33: "right_ventral_diencephalon",
    }
    compact = {name: index for index, name in enumerate(STRUCTURES, start=1)}
    case = TrainingCase("a", {}, structures=ImageFile(Path("seg35.nii.gz")), numbering="seg35")
    labels = np.arange(36, dtype=np.int32).reshape(4, 3, 3)
    codes = structure_codes(case, Volume(labels, Geometry((4, 3, 3), np.eye(4)))).ravel()
    assert {n: int(codes[n]) for n in named} == {n: compact[name] for n, name in named.items()}
    assert codes[0] == codes[18] == codes[35] == 0  # background, vessel, choroid plexus
    assert len(set(codes[codes > 0].tolist())) == 29  # all but CSF, which the release has not
    with pytest.raises(BadDataError, match=r"0\.\.35"):
        structure_codes(case, Volume(labels + 1, Geometry((4, 3, 3), np.eye(4))))


# Any layout -----------------------------------------------------------------------------------------------


def test_what_is_no_data(tmp_path: Path) -> None:
    with pytest.raises(MissingInputError, match=r"no such folder or manifest"):
        find_cases(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(MissingInputError, match=r"^[^\n]+layout that jrs knows[^\n]+$"):
        find_cases(tmp_path / "empty")
    with pytest.raises(UsageError, match="nifti"):
        find_cases(tmp_path, "nifti")
    touch(tmp_path / "brats", "a_t1.nii.gz")
    with pytest.raises(MissingInputError, match="no case of layout freesurfer"):
        find_cases(tmp_path / "brats", "freesurfer")


def test_a_name_twice(tmp_path: Path) -> None:
    touch(tmp_path, "a/x_t1.nii.gz", "b/x_t1.nii.gz")
    with pytest.raises(BadDataError, match="two cases"):
        find_cases(tmp_path)


def test_a_layout_that_is_named_is_used(tmp_path: Path) -> None:
    touch(tmp_path, "sub-01/anat/sub-01_T1w.nii.gz")
    assert find_cases(tmp_path)[0].layout == "bids"
    assert find_cases(tmp_path, "brats")[0].layout == "brats"


# Manifests ------------------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A folder of empty files that manifests may name."""
    return touch(tmp_path, *(f"data/{n}.nii.gz" for n in ("a_t1", "a_flair", "a_seg", "b_t1")))


def test_a_csv_manifest(files: Path) -> None:
    absolute = files / "data" / "b_t1.nii.gz"
    (files / "cases.csv").write_text(
        f"case,t1,flair,seg\nA,data/a_t1.nii.gz,data/a_flair.nii.gz,data/a_seg.nii.gz\n,{absolute},,\n",
        encoding="utf-8-sig",
    )
    first, second = load_manifest(files / "cases.csv")
    data = files / "data"
    images = {"t1": ImageFile(data / "a_t1.nii.gz"), "flair": ImageFile(data / "a_flair.nii.gz")}
    assert first == TrainingCase("A", images, ImageFile(data / "a_seg.nii.gz"))
    # A row's number names a case, but nobody.
    assert second == TrainingCase("row-2", {"t1": ImageFile(absolute)}, subject=str(absolute))


def test_a_json_manifest(files: Path) -> None:
    value = [
        {"case": "A", "t1": "data/a_t1.nii.gz", "seg": "data/a_seg.nii.gz", "labels": {"1": EDEMA}, "session": 2},
        {"case": "B", "subject": "A", "t1": "data/b_t1.nii.gz", "t2": ""},
    ]
    (files / "cases.json").write_text(json.dumps(value), encoding="utf-8")
    first, second = load_manifest(files / "cases.json")
    assert first.segmentation == ImageFile(files / "data/a_seg.nii.gz")
    assert first.tumor_classes == {1: EDEMA} and first.session == "2"
    assert second == TrainingCase("B", {"t1": ImageFile(files / "data/b_t1.nii.gz")}, subject="A")


def test_every_column_survives_a_manifest(tmp_path: Path) -> None:
    names = ("four.nii.gz", "seg.nii.gz", "norm, old.mgz", "seg35.nii.gz", "l.csv")
    touch(tmp_path, *names)
    four, seg, norm, structures, landmarks = (tmp_path / name for name in names)
    cases = [
        TrainingCase(
            "a",
            {"t1": ImageFile(four, 1), "flair": ImageFile(four, 0)},
            ImageFile(seg),
            subject="s",
            session="2",
            tumor_classes={1: EDEMA, 2: CORE, 3: ENHANCING},
            landmarks=landmarks,
        ),
        TrainingCase("b", {"t1": ImageFile(norm)}, structures=ImageFile(structures), numbering="seg35"),
    ]
    for name in ("out.csv", "out.json", "deeper/out.csv"):
        write_manifest(tmp_path / name, cases)
        assert load_manifest(tmp_path / name) == cases
    # Paths below the manifest move with it.
    moved = tmp_path.rename(tmp_path.with_name("moved"))
    assert load_manifest(moved / "out.csv")[0].images["t1"] == ImageFile(moved / "four.nii.gz", 1)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("m.csv", "", ("lists no case",)),
        ("m.csv", "case,t1\n", ("lists no case",)),
        ("m.csv", "case,t1,pd\nA,data/a_t1.nii.gz,x\n", ("'pd'", "t1ce")),
        ("m.csv", "case,t1\nA,data/a_t1.nii.gz\nB,\n", ("row 2", "case B", "no image")),
        ("m.csv", "case,t1,seg\nA,,data/a_seg.nii.gz\n", ("row 1", "no image")),
        ("m.csv", "case,t1\nA,data/a_t1.nii.gz,more\n", ("row 1", "cells")),
        ("m.csv", "case,t1,labels\nA,data/a_t1.nii.gz,edema\n", ("row 1", "1=edema")),
        ("m.csv", "case,t1,numbering\nA,data/a_t1.nii.gz,dkt\n", ("row 1", "dkt", "seg35")),
        ("m.csv", b"\xff\xfe\x00case", ("CSV or JSON",)),
        ("m.json", "{", ("CSV or JSON",)),
        ("m.json", "{}", ("lists no case",)),
        ("m.json", '["a"]', ("lists no case",)),
        ("m.json", "[]", ("lists no case",)),
        ("m.json", '[{"case": "A", "T1": "data/a_t1.nii.gz"}]', ("'T1'",)),
        ("m.json", '[{"case": "A"}]', ("row 1", "case A", "no image")),
    ],
)
def test_a_bad_manifest(files: Path, name: str, content: str | bytes, words: tuple[str, ...]) -> None:
    (files / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(BadDataError) as caught:
        load_manifest(files / name)
    message = str(caught.value)
    assert message.startswith(str(files / name)) and "\n" not in message
    assert all(word in message for word in words), message


def test_a_manifest_that_names_what_is_not_there(files: Path) -> None:
    (files / "m.csv").write_text("case,t1\nA,data/a_t1.nii.gz\nB,data/none.nii.gz\n")
    with pytest.raises(MissingInputError, match=r"none\.nii\.gz: no such file \(row 2, case B of "):
        load_manifest(files / "m.csv")
    for path in (files / "no.csv", files):
        with pytest.raises(MissingInputError, match="no such folder or manifest"):
            load_manifest(path)


# A scan ---------------------------------------------------------------------------------------------------

SHAPE = (20, 22, 18)
AFFINE = np.diag([8.0, 8.0, 8.0, 1.0])


@pytest.fixture
def cohort(tmp_path: Path, helpers: Any) -> Callable[..., Path]:
    """Write a healthy BraTS cohort of ``count`` cases of T1 and FLAIR; ``change`` then spoils some of it."""

    def make(count: int = 3) -> Path:
        for k in range(count):
            stem = f"BraTS2021_{k:05d}"
            points = helpers.world_points(helpers.grid_affine(SHAPE, (8.0, 8.0, 8.0)), SHAPE)
            for contrast, modality in ((0, "t1"), (3, "flair")):
                data = (helpers.head(points + k, contrast)).astype(np.float32)
                helpers.write_image(tmp_path / stem / f"{stem}_{modality}.nii.gz", data, AFFINE)
            seg = np.zeros(SHAPE, np.uint8)
            seg[8:12, 8:12, 8:11] = (1, 2, 4)
            helpers.write_image(tmp_path / stem / f"{stem}_seg.nii.gz", seg, AFFINE)
        return tmp_path

    return make


def found(root: Path, deep: bool, name: str = "BraTS2021_00001", **options: Any) -> list[tuple[str, str]]:
    report = scan_cases(find_cases(root), deep=deep, **options)
    return [
        (f.level, f.text) for r in report.cases if r.case.name == name for f in r.findings if "odd voxel" not in f.text
    ]


def path_of(root: Path, kind: str, k: int = 1) -> Path:
    return root / f"BraTS2021_{k:05d}" / f"BraTS2021_{k:05d}_{kind}.nii.gz"


@pytest.mark.parametrize("deep", [False, True])
def test_a_healthy_cohort(cohort: Callable[..., Path], deep: bool) -> None:
    report = scan_cases(find_cases(cohort()), deep=deep)
    assert len(report.usable) == 3 and not report.cohort
    for case in report.cases:
        assert [f.text for f in case.findings] == ["odd voxel size 8 x 8 x 8 mm"]
        assert case.shape == SHAPE and case.values == ({1: 16, 2: 16, 4: 16} if deep else None)
    json.dumps(report.as_json())


@pytest.mark.parametrize("deep", [False, True])
def test_a_cut_off_file_is_found_by_its_end(cohort: Callable[..., Path], deep: bool) -> None:
    path = path_of(cohort(), "flair")
    path.write_bytes(path.read_bytes()[:-200])
    ((level, text),) = found(path.parents[1], deep)
    assert level == "error" and str(path) in text and "cut off" in text


def test_gzip_of_several_members_is_no_fault(cohort: Callable[..., Path]) -> None:
    path = path_of(cohort(), "flair")
    raw = gzip.decompress(path.read_bytes())
    path.write_bytes(gzip.compress(raw[:5000]) + gzip.compress(raw[5000:]))
    assert not found(path.parents[1], False) and not found(path.parents[1], True)


def test_files_that_are_no_images(cohort: Callable[..., Path]) -> None:
    path = path_of(cohort(), "t1")
    path.write_bytes(b"")
    assert found(path.parents[1], False)[0][0] == "error"
    path.write_text("no image at all")
    assert found(path.parents[1], False)[0][0] == "error"


@pytest.mark.parametrize(
    ("kind", "shape", "shift", "level", "words"),
    [
        ("flair", (20, 22, 17), 0.0, "warning", "grids differ: flair has 20x22x17, t1 20x22x18 voxels"),
        ("flair", SHAPE, 0.5, "warning", "grids differ: flair lies up to 0.50 mm from t1"),
        ("seg", SHAPE, 900.0, "error", "do not overlap"),
    ],
)
def test_grids_that_differ(
    cohort: Callable[..., Path], helpers: Any, kind: str, shape: Any, shift: float, level: str, words: str
) -> None:
    root = cohort()
    affine = AFFINE.copy()
    affine[0, 3] = shift
    helpers.write_image(path_of(root, kind), np.ones(shape, np.float32), affine)
    assert any(f[0] == level and words in f[1] for f in found(root, False)), found(root, False)


def spoiled(value: float, share: float) -> Callable[[Array], Array]:
    def change(data: Array) -> Array:
        data = np.array(data, dtype=np.float32, order="C")
        data.reshape(-1)[: int(share * data.size)] = value
        return data

    return change


@pytest.mark.parametrize(
    ("kind", "change", "level", "words"),
    [
        ("t1", lambda data: np.zeros_like(data), "error", "every voxel is 0"),
        ("t1", lambda data: data * (data > np.percentile(data, 99.5)), "error", "no brain"),
        ("t1", lambda data: data + 100.0, "warning", "more than a brain"),
        ("t1", spoiled(np.nan, 0.5), "error", "NaN"),
        ("t1", spoiled(np.nan, 0.001), "warning", "NaN"),
        ("seg", lambda data: np.zeros_like(data), "warning", "no tumour"),
        ("seg", lambda data: data * 3, "error", "label 6 is unknown"),
        ("seg", lambda data: np.where(data == 1, 3, data), "error", "both 3 and 4"),
        ("seg", lambda data: data.astype(np.float32) / 2, "error", "whole numbers"),
    ],
)
def test_voxels_are_looked_at_when_asked(
    cohort: Callable[..., Path], helpers: Any, kind: str, change: Any, level: str, words: str
) -> None:
    root = cohort()
    data = np.asarray(nib.load(path_of(root, kind)).dataobj)
    helpers.write_image(path_of(root, kind), change(data), AFFINE)
    assert not found(root, False)
    assert any(f[0] == level and words in f[1] for f in found(root, True)), found(root, True)


def test_a_missing_modality(cohort: Callable[..., Path]) -> None:
    root = cohort()
    path_of(root, "flair").unlink()
    assert found(root, False) == [("warning", "lacks flair, which others have")]
    assert found(root, False, required=("flair",)) == [("error", "lacks flair")]
    assert len(scan_cases(find_cases(root), required=("t1ce",)).usable) == 0


def test_a_cohort_of_two_years(cohort: Callable[..., Path], helpers: Any) -> None:
    root = cohort()
    seg = np.asarray(nib.load(path_of(root, "seg")).dataobj)
    helpers.write_image(path_of(root, "seg"), np.where(seg == 4, 3, seg), AFFINE)
    report = scan_cases(find_cases(root), deep=True)
    (finding,) = report.cohort
    assert "3 in 1 (BraTS2021_00001)" in finding.text and "4 in 2 (BraTS2021_00000)" in finding.text
    assert len(report.usable) == 3


@pytest.mark.parametrize("deep", [False, True])
def test_the_same_image_under_two_names(cohort: Callable[..., Path], deep: bool) -> None:
    root = cohort()
    content = path_of(root, "t1", 0).read_bytes()
    path_of(root, "t1").write_bytes(content if not deep else gzip.compress(gzip.decompress(content), 1))
    ((level, text),) = found(root, deep)
    assert level == "warning" and "same image as BraTS2021_00000, of another subject" in text


def test_odd_voxels(tmp_path: Path, helpers: Any) -> None:
    data = np.random.default_rng(0).uniform(1, 2, (64, 64, 8)).astype(np.float32)
    helpers.write_image(tmp_path / "a_t1.nii.gz", data, np.diag([0.9, 0.9, 6.0, 1.0]))
    (report,) = scan_cases(find_cases(tmp_path)).cases
    texts = [finding.text for finding in report.findings]
    assert texts == ["odd voxel size 0.9 x 0.9 x 6 mm", "odd field of view, 58 x 58 x 48 mm"]


def test_several_processes_find_the_same(cohort: Callable[..., Path]) -> None:
    cases = find_cases(cohort())
    assert scan_cases(cases, deep=True, workers=2) == scan_cases(cases, deep=True)
