"""Where a case lies in a BIDS dataset, and the names that follow from it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jrs.errors import UsageError
from jrs.runtime.bids import bids_source, dataset_description, refuse_raw
from jrs.runtime.names import OutputNames


def dataset(root: Path, *files: str, description: bool = True) -> Path:
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).touch()
    if description:
        (root / "dataset_description.json").write_text('{"Name": "x", "BIDSVersion": "1.10.0"}', encoding="utf-8")
    return root


def test_what_all_images_share_is_the_prefix(tmp_path: Path) -> None:
    folder = "sub-01/ses-2/anat"
    names = {
        "t1": "sub-01_ses-2_acq-mprage_run-1_T1w.nii.gz",
        "t1ce": "sub-01_ses-2_acq-mprage_ce-gd_run-1_T1w.nii.gz",
        "flair": "sub-01_ses-2_acq-space_run-1_FLAIR.nii.gz",
    }
    root = dataset(tmp_path, *(f"{folder}/{name}" for name in names.values()))
    source = bids_source({m: root / folder / name for m, name in names.items()})
    assert source is not None
    assert (source.prefix, source.folder, source.root) == ("sub-01_ses-2_run-1", Path(folder), root.resolve())
    assert source.uri("flair") == f"bids:raw:{folder}/{names['flair']}"
    output = OutputNames("whatever", "sri24", source)
    assert output.folder(Path("out")) == Path("out") / folder
    # BIDS has its entities in this order: acq, ce, run, space, desc.
    want = "sub-01_ses-2_acq-mprage_ce-gd_run-1_space-sri24_desc-moved_T1w.nii.gz"
    assert output.moved("t1ce") == want
    assert output.labels_native == "sub-01_ses-2_run-1_seg-tumor_dseg.nii.gz"


def test_an_annexed_file_is_a_link_and_lies_where_the_link_is(tmp_path: Path) -> None:
    root = dataset(tmp_path / "raw", ".git/annex/objects/key", "sub-1/anat/.keep")
    link = root / "sub-1" / "anat" / "sub-1_T1w.nii.gz"
    link.symlink_to(root / ".git" / "annex" / "objects" / "key")
    source = bids_source({"t1": link})
    assert source is not None and source.prefix == "sub-1"


@pytest.mark.parametrize(
    ("files", "description"),
    [
        (("sub-01/anat/sub-01_T1w.nii.gz",), False),  # no dataset
        (("sub-01/anat/sub-02_T1w.nii.gz",), True),  # another subject's name
        (("sub-01/ses-1/anat/sub-01_T1w.nii.gz",), True),  # no session in the name
        (("sub-01/func/sub-01_T1w.nii.gz",), True),
        (("patient/anat/patient_T1w.nii.gz",), True),
        (("sub-01/anat/sub-01_my scan_T1w.nii.gz",), True),
        (("sub-01/anat/sub-01_T1w.mgz",), True),
        (("sub-01/anat/sub-01_T1w.nii.gz", "sub-01/ses-1/anat/sub-01_ses-1_T2w.nii.gz"), True),
    ],
)
def test_what_is_no_bids_case(tmp_path: Path, files: tuple[str, ...], description: bool) -> None:
    root = dataset(tmp_path, *files, description=description)
    assert bids_source({str(i): root / file for i, file in enumerate(files)}) is None


def test_images_without_a_file_or_in_one_file_are_no_bids_case(tmp_path: Path) -> None:
    path = dataset(tmp_path, "sub-01/anat/sub-01_T1w.nii.gz") / "sub-01" / "anat" / "sub-01_T1w.nii.gz"
    assert bids_source({"t1": path, "t2": None}) is None
    assert bids_source({"t1": path, "t2": path}) is None
    assert bids_source({}) is None


def test_links_are_relative_inside_the_dataset_only(tmp_path: Path) -> None:
    raw = dataset(tmp_path / "raw", "sub-1/anat/sub-1_T1w.nii.gz")
    source = bids_source({"t1": raw / "sub-1" / "anat" / "sub-1_T1w.nii.gz"})
    assert source is not None
    assert dataset_description(raw / "derivatives" / "jrs", source)["DatasetLinks"] == {"raw": "../.."}
    elsewhere = dataset_description(tmp_path / "out", source)["DatasetLinks"]
    assert elsewhere == {"raw": raw.resolve().as_uri()}


@pytest.mark.parametrize("content", ['{"Name": "a", "DatasetType": "raw"}', '{"Name": "a"}', "[]", "not json"])
def test_a_raw_dataset_is_refused_as_output(tmp_path: Path, content: str) -> None:
    raw = dataset(tmp_path / "raw", "sub-1/anat/sub-1_T1w.nii.gz")
    source = bids_source({"t1": raw / "sub-1" / "anat" / "sub-1_T1w.nii.gz"})
    assert source is not None
    other = tmp_path / "other"
    other.mkdir()
    refuse_raw(other, source)
    (other / "dataset_description.json").write_text(content, encoding="utf-8")
    with pytest.raises(UsageError, match="derivatives"):
        refuse_raw(other, source)
    (other / "dataset_description.json").write_text(json.dumps({"DatasetType": "derivative"}), encoding="utf-8")
    refuse_raw(other, source)
