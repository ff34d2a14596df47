"""What CASE on the command line means: folders, 3-D files, 4-D files, files by modality."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from jrs.errors import BadDataError, JrsError, MissingInputError, UsageError
from jrs.geometry import Geometry
from jrs.runtime.cases import MODALITIES, Case, find_case, load_case
from jrs.volume import Volume


def image(path: Path, level: int = 100, volumes: int = 0, shape: tuple[int, int, int] = (4, 3, 2)) -> Path:
    """A small image whose voxels say which it is: level, level + 1, ...; of volumes, level + 1000 k."""
    data = (np.arange(np.prod(shape)).reshape(shape) + level).astype(np.int16)
    if volumes:
        data = np.stack([data + 1000 * k for k in range(volumes)], axis=-1)
    kind = nib.MGHImage if path.suffix.lower() == ".mgz" else nib.Nifti1Image
    path.parent.mkdir(parents=True, exist_ok=True)
    kind(data, np.eye(4)).to_filename(path)
    return path


def level(volume: Any) -> int:
    return int(volume.data[0, 0, 0])


def usage(words: str, *arguments: Any, error: type[JrsError] = UsageError, **options: Any) -> str:
    with pytest.raises(JrsError) as caught:
        load_case(*arguments, **options)
    message = str(caught.value)
    assert type(caught.value) is error, message
    assert words in message
    assert "\n" not in message and "; " in message
    return message


# Folders --------------------------------------------------------------------------------------------------

FOLDERS = {
    "BraTS 2020": (
        "BraTS20_Training_001",
        "_t1.nii",
        "_t1ce.nii",
        "_t2.nii",
        "_flair.nii",
        ["_seg.nii", "_t1", "_t2.img", "_t2.hdr", "_flair.json"],
    ),
    "BraTS 2023": (
        "BraTS-GLI-00000-000",
        "-t1n.nii.gz",
        "-t1c.nii.gz",
        "-t2w.nii.gz",
        "-t2f.nii.gz",
        ["-seg.nii.gz"],
    ),
    "TCGA": (
        "TCGA-DU-7294",
        "_t1.nii.gz",
        "_t1Gd.nii.gz",
        "_t2.nii.gz",
        "_flair.nii.gz",
        ["_GlistrBoost.nii.gz", "_GlistrBoost_ManuallyCorrected.nii.gz"],
    ),
    "dots": ("TCGA-02-0006_1996.08.23", "_T1.nii", "_T1GD.nii", "_T2.nii", "_FLA.nii", ["_seg_t1_x.nii"]),
    "BIDS": (
        "sub-01_ses-02",
        "_T1w.nii.gz",
        "_ce-gadolinium_T1w.nii.gz",
        "_T2w.nii.gz",
        "_FLAIR.nii.gz",
        ["_T1w.json", "_desc-brain_mask.nii.gz", "_space-T1w_dseg.nii.gz"],
    ),
    "capitals": ("P1", "_T1.NII.GZ", "_T1CE.NII.GZ", "_T2.NII", "_FLAIR.NII", ["_SEG.NII", "_MASK.NII"]),
    "FreeSurfer": ("P1", "_T1.mgz", "_T1c.mgz", "_T2.mgz", "_FLAIR.mgz", ["_aseg.mgz", "_brain.mgz"]),
}


@pytest.mark.parametrize("convention", FOLDERS)
def test_a_folder_by_the_names_of_its_files(tmp_path: Path, convention: str) -> None:
    name, t1, t1ce, t2, flair, others = FOLDERS[convention]
    for k, ending in enumerate((flair, t2, t1, t1ce)):  # in an order that is not the channels'
        image(tmp_path / f"{name}{ending}", 100 * k)
    for ending in others:
        (tmp_path / f"{name}{ending}").write_bytes(b"must not be read")
    (tmp_path / f"._{name}{t1}").write_bytes(b"AppleDouble")
    (tmp_path / f"other{t2}").mkdir()
    case = load_case(tmp_path)
    assert case.name == name
    assert case.source == tmp_path
    assert list(case.images) == list(MODALITIES) == ["t1", "t1ce", "t2", "flair"]
    assert {m: level(v) for m, v in case.images.items()} == {"flair": 0, "t2": 100, "t1": 200, "t1ce": 300}
    assert find_case(tmp_path)["t1ce"] == tmp_path / f"{name}{t1ce}"


@pytest.mark.parametrize(
    ("ending", "modality"),
    [(e, "t1") for e in ("t1", "t1n", "t1w")]
    + [(e, "t1ce") for e in ("t1ce", "t1c", "t1gd")]
    + [(e, "t2") for e in ("t2", "t2w")]
    + [(e, "flair") for e in ("flair", "t2f", "fla")],
)
@pytest.mark.parametrize("mark", ["_", "-"])
def test_every_ending(tmp_path: Path, ending: str, modality: str, mark: str) -> None:
    for name in (f"p{mark}{ending}.nii", f"p{mark}{ending.upper()}.nii.gz"):
        path = image(tmp_path / name)
        assert find_case(tmp_path) == {modality: path}
        assert load_case(path).name == "p"
        assert list(load_case(path).images) == [modality]
        path.unlink()


def test_files_named_by_modality_only_take_the_name_of_their_folder(tmp_path: Path) -> None:
    image(tmp_path / "patient 7" / "t1.nii.gz")
    image(tmp_path / "patient 7" / "FLAIR.nii.gz")
    case = load_case(tmp_path / "patient 7")
    assert list(case.images) == ["t1", "flair"]
    assert case.name == "patient_7"
    assert load_case(tmp_path / "patient 7" / "t1.nii.gz").name == "patient_7"


@pytest.mark.parametrize(
    ("first", "second"), [("case_12", "case_13"), ("case-12", "case-13"), ("case.x", "case")]
)
def test_the_name_is_what_whole_words_have_in_common(tmp_path: Path, first: str, second: str) -> None:
    image(tmp_path / f"{first}_t1.nii")
    image(tmp_path / f"{second}_t2.nii")
    assert load_case(tmp_path).name == "case"


def test_nothing_in_common(tmp_path: Path) -> None:
    image(tmp_path / "here" / "a_t1.nii")
    image(tmp_path / "here" / "b_t2.nii")
    assert load_case(tmp_path / "here").name == "here"


def test_a_bids_subject_or_session_stands_for_its_anat_folder(tmp_path: Path) -> None:
    image(tmp_path / "sub-01" / "anat" / "sub-01_T1w.nii.gz", 100)
    image(tmp_path / "sub-02" / "ses-a" / "anat" / "sub-02_ses-a_FLAIR.nii.gz", 200)
    assert (load_case(tmp_path / "sub-01").name, list(load_case(tmp_path / "sub-01").images)) == ("sub-01", ["t1"])
    for folder in (tmp_path / "sub-02", tmp_path / "sub-02" / "ses-a"):
        assert load_case(folder).name == "sub-02_ses-a" and level(load_case(folder).images["flair"]) == 200
    image(tmp_path / "sub-02" / "ses-b" / "anat" / "sub-02_ses-b_FLAIR.nii.gz", 300)
    usage("holds 2 sessions, ses-a, ses-b", tmp_path / "sub-02")
    assert level(load_case(tmp_path / "sub-02" / "ses-b").images["flair"]) == 300
    # Another folder of such a name is not searched.
    image(tmp_path / "x" / "anat" / "x_T1w.nii.gz")
    usage("only anat", tmp_path / "x", error=MissingInputError)


@pytest.mark.parametrize("original", ["b_t1.nii.gz", "b_zz_t1.nii.gz"])
def test_images_that_jrs_moved_do_not_stand_for_their_sources(tmp_path: Path, original: str) -> None:
    image(tmp_path / "b_space-sri24_desc-moved_T1w.nii.gz", 300)
    assert set(find_case(tmp_path)) == {"t1"}
    image(tmp_path / original, 100)
    assert find_case(tmp_path) == {"t1": tmp_path / original}
    image(tmp_path / "b_space-mni_desc-moved_T1w.nii.gz", 400)
    assert find_case(tmp_path) == {"t1": tmp_path / original}
    (tmp_path / original).unlink()
    usage("two files for t1", tmp_path)


def test_two_files_for_one_modality(tmp_path: Path) -> None:
    image(tmp_path / "a_t1ce.nii.gz")
    image(tmp_path / "a_t1gd.nii")
    message = usage("two files for t1ce", tmp_path)
    assert "a_t1ce.nii.gz" in message and "a_t1gd.nii" in message and str(tmp_path) in message


def test_the_same_image_plain_and_gzipped_is_two_files(tmp_path: Path) -> None:
    image(tmp_path / "a_t1.nii.gz")
    image(tmp_path / "a_t1.nii")
    usage("a_t1.nii and a_t1.nii.gz", tmp_path)


def test_nothing_found_lists_endings_and_what_is_there(tmp_path: Path) -> None:
    for k in range(7):
        image(tmp_path / f"scan{k}.nii")
    message = usage(
        "scan0.nii, scan1.nii, scan2.nii, scan3.nii, scan4.nii", tmp_path, error=MissingInputError
    )
    assert "scan5" not in message and "2 more" in message
    for ending in ("t1", "t1n", "t1w", "t1ce", "t1c", "t1gd", "t2", "t2w", "flair", "t2f", "fla"):
        assert f" {ending}," in message
    (tmp_path / "empty").mkdir()
    usage("only nothing", tmp_path / "empty", error=MissingInputError)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(MissingInputError, match=r"no such folder"):
        find_case(tmp_path / "gone")
    usage("no such file", tmp_path / "gone", error=MissingInputError)


def test_a_folder_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", fail)
    usage("permission denied", tmp_path, error=MissingInputError)
    monkeypatch.setattr(Path, "is_dir", fail)
    monkeypatch.setattr(Path, "stat", fail)
    usage("permission denied", tmp_path, error=MissingInputError)


def test_one_modality_of_a_folder(tmp_path: Path) -> None:
    image(tmp_path / "a_t1.nii", 100)
    (tmp_path / "a_t2.nii").write_bytes(b"must not be read")
    case = load_case(tmp_path, modality="t1")
    assert {m: level(v) for m, v in case.images.items()} == {"t1": 100}
    assert "t1, t2" in usage("holds no flair", tmp_path, modality="flair")
    usage("--channels is for a 4-D file", tmp_path, channels=["t1", "t2"])


def test_modalities_may_lie_on_different_grids(tmp_path: Path) -> None:
    image(tmp_path / "a_t1.nii")
    image(tmp_path / "a_flair.nii", shape=(7, 6, 5))
    images = load_case(tmp_path).images
    assert (images["t1"].geometry.shape, images["flair"].geometry.shape) == ((4, 3, 2), (7, 6, 5))


def test_a_bad_file_in_a_folder_is_named(tmp_path: Path) -> None:
    image(tmp_path / "a_t1.nii")
    (tmp_path / "a_t2.nii").write_bytes(b"rubbish")
    usage("a_t2.nii: is not an image", tmp_path, error=BadDataError)


# One file -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "option", "modality", "case_name"),
    [
        ("xxx_flair.nii.gz", None, "flair", "xxx"),
        ("xxx_flair.nii.gz", "t2", "t2", "xxx"),
        ("xxx.nii.gz", None, "t1", "xxx"),
        ("xxx.nii", "FLAIR", "flair", "xxx"),
        ("sub-01_ce-gadolinium_T1w.nii.gz", None, "t1ce", "sub-01"),
        ("sub-01_ce-gadolinium_acq-mprage_T1w.nii.gz", None, "t1ce", "sub-01_acq-mprage"),
        ("sub-01_T1w.nii.gz", None, "t1", "sub-01"),
        ("sub-01_ce-gadolinium_FLAIR.nii.gz", None, "flair", "sub-01_ce-gadolinium"),
        ("BraTS-GLI-00000-000-t2f.nii.gz", None, "flair", "BraTS-GLI-00000-000"),
        ("scan.2024.01.nii.gz", None, "t1", "scan.2024.01"),
        ("two words & more_t2.nii", None, "t2", "two_words_more"),
        ("-rf_t1.nii", None, "t1", "rf"),
        ("..hidden_t1.nii", None, "t1", "hidden"),
        ("xxx_FLAIR_brain.nii.gz", None, "flair", "xxx_FLAIR_brain"),
        ("t2_to_t1_brain.nii.gz", None, "t1", "t2_to_t1_brain"),
        ("brain.mgz", None, "t1", "brain"),
        ("Größe_t1.nii", None, "t1", "Größe"),
    ],
)
def test_a_3d_file(tmp_path: Path, name: str, option: str | None, modality: str, case_name: str) -> None:
    path = image(tmp_path / name, 7)
    case = load_case(str(path), modality=option)
    assert {m: level(v) for m, v in case.images.items()} == {modality: 7}
    assert case.images[modality].path == path
    assert case.name == case_name
    assert case.source == path


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("xxx.nii.gz", "taken for t1, as its name tells nothing else"),
        ("t2_to_t1_brain.nii.gz", "taken for t1, though its name says t1 and t2"),
        ("T2 bet.nii.gz", "taken for t2, by words in its name"),
        ("xxx_FLAIR_brain.nii.gz", "taken for flair, by words in its name"),
        ("xxx_T2_FLAIR_brain.nii.gz", "taken for flair, by words in its name"),
        ("sub-01_ce-gadolinium_T1w_brain.nii.gz", "taken for t1ce, by words in its name"),
        ("T1-Gd bet.nii.gz", "taken for t1ce, by words in its name"),
        ("mni_icbm152_t1_tal.nii.gz", None),
        ("xxx_flair.nii.gz", None),
    ],
)
def test_what_a_file_is_taken_for_is_told(tmp_path: Path, name: str, told: str | None) -> None:
    path = image(tmp_path / name)
    doubts = load_case(path).doubts
    assert len(doubts) == (told is not None)
    if told is not None:
        assert doubts[0].startswith(f"the image is {told}; ")
    assert load_case(path, modality="t2").doubts == []


def test_a_long_name_leaves_room_for_what_is_appended(tmp_path: Path) -> None:
    name = load_case(image(tmp_path / ("ä" * 110 + "_t1.nii"))).name
    assert name == "ä" * 60


def test_a_4d_file_in_the_default_order(tmp_path: Path) -> None:
    path = image(tmp_path / "brats.nii.gz", 5, volumes=4)
    case = load_case(path)
    found = {m: level(v) for m, v in case.images.items()}
    assert found == {"t1": 5, "t1ce": 1005, "t2": 2005, "flair": 3005}
    assert (case.name, case.source) == ("brats", path)


def test_channels_name_the_volumes_in_the_order_of_the_file(tmp_path: Path) -> None:
    path = image(tmp_path / "msd.nii.gz", 5, volumes=4)
    case = load_case(path, channels=["flair", "T1", "t1ce", "t2"])
    assert list(case.images) == ["t1", "t1ce", "t2", "flair"]
    assert {m: level(v) for m, v in case.images.items()} == {"flair": 5, "t1": 1005, "t1ce": 2005, "t2": 3005}


def test_default_channels_of_another_bundle(tmp_path: Path) -> None:
    path = image(tmp_path / "a.nii.gz", 5, volumes=2)
    case = load_case(path, default_channels=("t2", "t1"))
    assert {m: level(v) for m, v in case.images.items()} == {"t1": 1005, "t2": 5}
    message = usage("file has 2 volumes, the default is 4: t1,t1ce,t2,flair", path)
    assert "--channels" in message


def test_a_wrong_count_names_both_numbers(tmp_path: Path) -> None:
    path = image(tmp_path / "a.nii.gz", volumes=3)
    message = usage(
        "file has 3 volumes, --channels names 4: t1,t1ce,t2,flair", path, channels=list(MODALITIES)
    )
    assert str(path) in message
    single = image(tmp_path / "b.nii.gz")
    usage("file has 1 volume, --channels names 2: t1,t2", single, channels=["t1", "t2"])
    assert list(load_case(single, channels=["t2"]).images) == ["t2"]


def test_a_wrong_count_is_told_before_the_voxels_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = image(tmp_path / "a.nii", volumes=3)
    monkeypatch.setattr("jrs.runtime.cases.read_channels", lambda _: pytest.fail("the voxels were read"))
    usage("file has 3 volumes", path)


def test_contradictions(tmp_path: Path) -> None:
    path = image(tmp_path / "a.nii.gz", volumes=4)
    usage("4 volumes, --modality is for a single one", path, modality="t1")
    usage("give one of them", path, modality="t1", channels=["t1"])
    usage("names t1,t1", path, channels=["t1", "t1"])
    usage("names nothing", path, channels=[])


@pytest.mark.parametrize("options", [{"modality": "pd"}, {"channels": ["t1", "pd"]}])
def test_unknown_modalities(tmp_path: Path, options: dict[str, Any]) -> None:
    message = usage("unknown modality 'pd'", image(tmp_path / "a.nii"), **options)
    assert "t1, t1ce, t2, flair" in message
    assert f"--{next(iter(options))}" in message


# Files by modality ----------------------------------------------------------------------------------------


def test_files_by_modality(tmp_path: Path) -> None:
    files = {
        "flair": image(tmp_path / "p3_dark.nii", 1),
        "t1": image(tmp_path / "p3_flair.nii", 2),  # the option wins over the name
    }
    case = load_case(None, modalities=files)
    assert list(case.images) == ["t1", "flair"]
    assert {m: level(v) for m, v in case.images.items()} == {"flair": 1, "t1": 2}
    assert case.name == "p3"
    assert case.source is None


def test_files_by_modality_exclude_the_rest(tmp_path: Path) -> None:
    path = image(tmp_path / "a.nii")
    usage("exclude each other", path, modalities={"t1": path})
    usage("exclude each other", None, modalities={"t1": path}, modality="t1")
    usage("exclude each other", None, modalities={"t1": path}, channels=["t1"])
    usage("--pd: unknown modality 'pd'", None, modalities={"pd": path})
    usage("no case given", None)
    usage("no case given", None, modalities={})
    assert list(load_case(path, modalities={}).images) == ["t1"]


def test_a_4d_file_by_modality_is_refused(tmp_path: Path) -> None:
    path = image(tmp_path / "a.nii", volumes=4)
    usage("is 4-D with 4 volumes", None, modalities={"t1": path}, error=BadDataError)


def test_the_case_is_frozen(tmp_path: Path) -> None:
    case = load_case(image(tmp_path / "a.nii"))
    with pytest.raises(AttributeError):
        case.name = "b"  # type: ignore[misc]


# Damage ---------------------------------------------------------------------------------------------------


def test_of_several_damaged_files_the_first_modality_is_named(tmp_path: Path) -> None:
    for ending in ("flair", "t2", "t1ce", "t1"):
        image(tmp_path / f"a_{ending}.nii.gz", shape=(40, 40, 40))
    for ending in ("flair", "t2", "t1ce"):
        path = tmp_path / f"a_{ending}.nii.gz"
        path.write_bytes(path.read_bytes()[:-1] if ending == "t1ce" else b"nothing")
    # t1ce is found wrong only at its end, after the others.
    assert "a_t1ce.nii.gz" in usage("cut off", tmp_path, error=BadDataError)


def ball(radius_mm: float, center_x_mm: float, spacing_mm: tuple[float, float, float], extent_mm: float) -> Volume:
    """Bright within a ball, 0 outside, around the world's origin but for ``center_x_mm``."""
    a, b, c = (int(extent_mm / s) for s in spacing_mm)
    shape = a, b, c
    geometry = Geometry.aligned(shape, spacing_mm, np.zeros(3), "RAS")
    points = geometry.to_ras(np.moveaxis(np.indices(shape), 0, -1).reshape(-1, 3)) - [center_x_mm, 0.0, 0.0]
    inside = (np.linalg.norm(points, axis=1) < radius_mm).reshape(shape)
    return Volume(np.where(inside, 100.0, 0.0).astype(np.float32), geometry)


@pytest.mark.parametrize(
    ("shift_mm", "told"), [(0.0, None), (5.0, None), (30.0, 70), (-60.0, 43), (150.0, 0), (220.0, None)]
)
@pytest.mark.parametrize("spacing_mm", [(2.0, 2.0, 2.0), (1.1, 2.5, 5.0)])
def test_modalities_that_lie_apart_are_told(
    shift_mm: float, told: int | None, spacing_mm: tuple[float, float, float]
) -> None:
    """Two balls of radius r at distance d share 1 - 3d / 4r + d^3 / 16r^3 of each."""
    images = {"t1": ball(75.0, 0.0, (2.0, 2.0, 2.0), 300.0), "t2": ball(75.0, shift_mm, spacing_mm, 460.0)}
    doubts = Case("x", images).doubts
    if shift_mm == 220.0:
        assert doubts[0].startswith("t2: does not lie where t1 lies (they hardly show the same part of the world);")
    elif told is None:
        assert not doubts
    else:
        (doubt,) = doubts
        assert doubt.startswith("t2: does not lie where t1 lies (")
        assert abs(int(doubt.split("(")[1].split(" %")[0]) - told) <= 1


def test_an_image_that_sees_less_of_the_brain_lies_where_the_other_lies() -> None:
    whole = ball(75.0, 0.0, (2.0, 2.0, 2.0), 200.0)
    slab = Volume(whole.data[:, :, 30:60], whole.geometry.part((slice(0, 100), slice(0, 100), slice(30, 60))))
    assert not Case("x", {"t1": whole, "flair": slab}).doubts
    assert not Case("x", {"t1": slab, "flair": whole}).doubts
    # Each shows what the other does not, in all 56 % of one and 50 % of the other.
    upper, lower = (whole.data[:, :, a:b] for a, b in ((40, 100), (0, 60)))
    parts = [whole.geometry.part((slice(0, 100), slice(0, 100), slice(a, b))) for a, b in ((40, 100), (0, 60))]
    assert not Case("x", {"t1": Volume(upper, parts[0]), "flair": Volume(lower, parts[1])}).doubts


def test_one_image_for_two_modalities_is_told() -> None:
    one = ball(75.0, 0.0, (2.0, 2.0, 2.0), 200.0)
    other = Volume(one.data * 2.0, one.geometry)
    (doubt,) = Case("x", {"t1": one, "t1ce": other, "t2": Volume(one.data.copy(), one.geometry)}).doubts
    assert doubt.startswith("t1 and t2 are the same image, voxel by voxel;")


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (("pat12_t1", "pat13_flair"), True),
        (("case_12_t1", "case_13_flair"), True),
        (("BraTS20_Training_001_t1", "BraTS20_Training_002_flair"), True),
        (("sub-01_ses-1_T1w", "sub-01_ses-2_FLAIR"), True),
        (("sub-A_T1w", "sub-B_FLAIR"), True),
        (("BraTS20_001_t1", "BraTS20_001_flair"), False),
        (("sub-01_run-1_T1w", "sub-01_run-2_FLAIR"), False),
        (("sub-01_chunk-1_T1w", "sub-01_chunk-2_FLAIR"), False),
        (("sub-01_acq-mprage_T1w", "sub-01_FLAIR"), False),
        (("sub-01_ce-gadolinium_T1w", "sub-01_T2w"), False),
        (("3_T1", "9_FLAIR"), False),
        (("P01_3_T1", "P01_5_FLAIR"), False),
        (("20190101_1012_t1", "20190101_1020_flair"), False),
        (("pre_t1", "post_flair"), False),
        (("Case-t1", "case-t2"), False),
        (("t1", "flair"), False),
        (("t1", "P7_flair"), False),
    ],
)
def test_images_named_as_two_patients_are_told(tmp_path: Path, names: tuple[str, str], told: bool) -> None:
    for number, name in enumerate(names):
        image(tmp_path / f"{name}.nii.gz", level=100 * (number + 1))
    notes = load_case(tmp_path).notes
    assert len(notes) == told
    assert not told or all(f"{name}.nii.gz" in notes[0] for name in names)


def test_names_that_contradict_the_options_are_told(tmp_path: Path) -> None:
    for name in ("p_t1", "p_flair", "q"):
        image(tmp_path / f"{name}.nii.gz")
    files = {"t1": tmp_path / "p_flair.nii.gz", "flair": tmp_path / "p_t1.nii.gz", "t2": tmp_path / "q.nii.gz"}
    notes = load_case(None, modalities=files).notes
    assert [note.split(":")[0] for note in notes] == [f"--t1 {files['t1']}", f"--flair {files['flair']}"]
    assert "its name says flair" in notes[0]


def test_a_link_to_nothing_is_no_missing_modality(tmp_path: Path) -> None:
    """As git-annex leaves what has not been fetched."""
    image(tmp_path / "p_flair.nii.gz")
    (tmp_path / "p_t1.nii.gz").symlink_to(tmp_path / "annex" / "SHA256-1")
    assert "git annex get" in usage("p_t1.nii.gz: is a link", tmp_path, error=MissingInputError)
    (tmp_path / "p_t1.nii.gz").unlink()
    (tmp_path / "p_t1.nii.gz").mkdir()  # no image either way
    assert list(load_case(tmp_path).images) == ["flair"]
    (tmp_path / "p_t2.nii.gz").symlink_to(tmp_path / "annex" / "SHA256-2")
    assert list(load_case(tmp_path, modality="flair").images) == ["flair"]  # all that is asked for


@pytest.mark.parametrize("folder", ["imagesTr", "imagesTs", "elsewhere"])
def test_a_decathlon_folder_says_what_the_volumes_are(tmp_path: Path, folder: str) -> None:
    file = image(tmp_path / folder / "BRATS_001.nii.gz", level=1, volumes=4)
    table = {"0": "FLAIR", "1": "T1w", "2": "t1gd", "3": "T2w"}
    (tmp_path / "dataset.json").write_text(json.dumps({"modality": table}))
    case = load_case(file)
    values = {name: level(volume) // 1000 for name, volume in case.images.items()}
    if folder == "elsewhere":
        assert values == {"t1": 0, "t1ce": 1, "t2": 2, "flair": 3}
        assert case.notes and "taken for t1, t1ce, t2, flair, in this order" in case.notes[0]
    else:
        assert values == {"flair": 0, "t1": 1, "t1ce": 2, "t2": 3} and not case.notes
    asked = load_case(file, channels=["t2", "t1", "t1ce", "flair"])
    assert level(asked.images["t2"]) == 1 and not asked.notes
