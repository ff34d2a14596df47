"""``jrs infer`` on several cases: each as alone, what fails in one told, all in a table."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from jrs.cli.main import run
from jrs.errors import OutputError
from jrs.runtime import results
from jrs.runtime.pipeline import Pipeline

Run = Callable[..., int]


@pytest.fixture
def cases(phantom: Any, tmp_path: Path) -> list[Path]:
    """Three folders of the phantom's images, by other names; the second has no T1."""
    folders = []
    for name in ("alpha", "beta", "gamma"):
        folder = tmp_path / "cases" / f"of {name}"
        folder.mkdir(parents=True)
        for image in Path(phantom.folder).glob("case7_*.nii.gz"):
            if name != "beta" or not image.name.endswith("_t1.nii.gz"):
                (folder / image.name.replace("case7", name)).symlink_to(image)
        folders.append(folder)
    return folders


@pytest.fixture
def infer(phantom: Any, tiny_bundle: Path, tmp_path: Path) -> Run:
    def command(*arguments: object) -> int:
        fixed = ["--atlas", phantom.atlas, "--bundle", tiny_bundle, "--affine", "off", "--refine", "0", "--no-inverse"]
        given = [*fixed, "--backend", "ort-cpu", "--threads", "1", "--out", tmp_path / "out", *arguments]
        return run(["infer", *map(str, given)])

    return command


def rows(out: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((out / "cases.csv").read_text(encoding="utf-8").splitlines()))


def test_every_case_is_done_as_alone(
    infer: Run, cases: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert infer(*cases) == 0
    said = capsys.readouterr()
    lines = [json.loads(line) for line in said.out.splitlines()]
    assert [line["case"] for line in lines] == ["alpha", "beta", "gamma"]
    assert f"jrs: warning: 2 of 3, {cases[1]}: without t1 the segmentation is less certain" in said.err
    together = rows(out)
    assert [row["status"] for row in together] == ["done"] * 3
    assert [row["source"] for row in together] == [*map(str, cases)]
    for row, line in zip(together, lines, strict=True):
        report = json.loads((out / row["case"] / f"{row['case']}_report.json").read_text())
        assert row["out"] == line["out"] == str(out / row["case"]) and row["atlas"] == report["atlas"]
        for region in ("WT", "TC", "ET"):
            for kind in ("native", "affine", "moved"):
                assert float(row[f"{region}_{kind}_ml"]) == report["volumes_ml"][kind][region]
        assert float(row["folding_percent"]) == report["jacobian"]["folding_percent"]
        shared = row["case"] != "beta"  # the atlas is a T1
        assert row["correlation"] == (str(report["similarity"]["after"]) if shared else "") and row["error"] == ""
        assert row["warnings"] == " | ".join(report["warnings"])
    assert "without t1" in together[1]["warnings"]
    assert infer(cases[2], "--out", tmp_path / "alone") == 0
    assert not (tmp_path / "alone" / "cases.csv").exists()
    for file in (tmp_path / "alone" / "gamma").glob("*.nii.gz"):
        assert file.read_bytes() == (out / "gamma" / file.name).read_bytes()


def test_one_that_fails_holds_up_no_other(
    infer: Run, cases: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    (cases[1] / "beta_t2.nii.gz").unlink()
    (cases[1] / "beta_t2.nii.gz").write_bytes(b"no image")
    assert infer(empty, cases[1], cases[2]) == 66
    said = capsys.readouterr()
    assert [json.loads(line)["case"] for line in said.out.splitlines()] == ["gamma"]
    told = said.err.splitlines()
    assert len(told) == 3 and str(empty) in told[0] and "beta_t2.nii.gz" in told[1]
    assert told[2] == "jrs: 2 of 3 cases failed, as told above"
    found = rows(tmp_path / "out")
    assert [row["status"] for row in found] == ["failed", "failed", "done"]
    assert [f"jrs: {row['error']}" for row in found[:2]] == told[:2]


def test_what_is_there_is_left_out_if_asked_for(
    infer: Run, cases: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert infer(cases[0], "--skip-existing") == 0
    report = tmp_path / "out" / "alpha" / "alpha_report.json"
    written = report.stat().st_mtime_ns
    capsys.readouterr()
    assert infer(*cases, "--skip-existing") == 0
    said = capsys.readouterr()
    assert f"jrs: {report}: is there already, left out" in said.err and len(said.out.splitlines()) == 3
    assert report.stat().st_mtime_ns == written
    found = rows(tmp_path / "out")
    assert [row["status"] for row in found] == ["there before", "done", "done"] and found[0]["WT_native_ml"]
    assert infer(*cases) == 73  # and the table still has what is there
    assert rows(tmp_path / "out") == found
    assert infer(*cases, "--overwrite") == 0
    assert [row["status"] for row in rows(tmp_path / "out")] == ["done"] * 3
    assert report.stat().st_mtime_ns > written
    report.write_text("{}")
    capsys.readouterr()
    assert infer(*cases, "--skip-existing") == 65
    assert f"jrs: {report}: is no report of jrs; remove it or pass --overwrite" in capsys.readouterr().err


def test_results_on_another_atlas_are_not_these(
    infer: Run, cases: list[Path], tmp_path: Path, phantom: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert infer(*cases[:2]) == 0
    other = tmp_path / "other.nii.gz"
    other.symlink_to(phantom.atlas)
    assert infer(*cases[:2], "--skip-existing", "--atlas", other) == 2
    assert "is of atlas phantomatlas, or of another bundle" in capsys.readouterr().err


def test_results_of_other_images_or_options_are_not_these(
    infer: Run, cases: list[Path], tmp_path: Path, phantom: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another site's patient of the same name, another atlas of the same name, other options, an output gone."""
    out, other = tmp_path / "out" / "alpha", tmp_path / "other site" / "alpha"
    assert infer(cases[0]) == 0
    written = {path.name: path.read_bytes() for path in out.iterdir()}
    shutil.copytree(cases[0], other)
    assert infer(other, "--skip-existing") == 0  # the same images, wherever they lie
    image = other / "alpha_t1.nii.gz"
    data = nib.load(image).get_fdata()
    nib.save(nib.Nifti1Image(data[::-1].astype(np.float32), nib.load(image).affine), image)
    atlas = tmp_path / "elsewhere" / Path(phantom.atlas).name
    atlas.parent.mkdir()
    shutil.copyfile(next(iter(cases[0].glob("*_flair.nii.gz"))), atlas)
    for wrong, given in (
        ("image t1", [other]),
        ("option refine", [cases[0], "--refine", "1"]),
        ("option label_scheme", [cases[0], "--no-seg"]),
        ("atlas t1", [cases[0], "--atlas", atlas]),
    ):
        capsys.readouterr()
        assert infer(*given, "--skip-existing") == 2
        assert f"was made with another {wrong}" in capsys.readouterr().err
        assert {path.name: path.read_bytes() for path in out.iterdir()} == written
    assert infer(cases[0], "--skip-existing", "--affine", tmp_path / "none.mat") == 66
    assert "none.mat: no such transform" in capsys.readouterr().err
    gone = next(out.glob("*_xfm.nii.gz"))
    gone.unlink()
    assert infer(cases[0], "--skip-existing") == 66
    assert f"{gone}: is gone" in capsys.readouterr().err


def test_a_table_of_another_is_kept(infer: Run, cases: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "cases.csv").write_text("case,t1\nmine,a.nii.gz\n")
    assert infer(*cases) == 73
    assert (out / "cases.csv").read_text() == "case,t1\nmine,a.nii.gz\n" and len(list(out.iterdir())) == 1


def test_rows_of_other_cases_stay(infer: Run, cases: list[Path], tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    assert infer(empty, empty) == 66
    assert not (tmp_path / "out").exists()  # no table of failures alone
    assert infer(cases[0], empty) == 66
    assert infer(cases[1], cases[2]) == 0
    found = rows(tmp_path / "out")
    assert [(row["case"], row["status"]) for row in found] == [
        *(("alpha", "done"), ("", "failed"), ("beta", "done"), ("gamma", "done"))
    ]


def test_a_file_in_the_way_of_one_case_stops_no_other(infer: Run, cases: list[Path], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "alpha").write_text("mine")
    assert infer(*cases) == 73
    assert [row["status"] for row in rows(tmp_path / "out")] == ["failed", "done", "done"]


@pytest.mark.parametrize("more", [(), ("--overwrite",), ("--skip-existing",)])
def test_two_cases_of_one_name_are_not_mixed_up(
    infer: Run, cases: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], more: tuple[str, ...]
) -> None:
    twin = tmp_path / "twin"
    twin.mkdir()
    (twin / "alpha_flair.nii.gz").symlink_to(cases[0] / "alpha_flair.nii.gz")
    assert infer(cases[0], twin, *more) == 2
    report = json.loads((tmp_path / "out" / "alpha" / "alpha_report.json").read_text())
    assert len(report["modalities"]) == 4
    assert f"{twin}: its results have the same name as those of {cases[0]}" in capsys.readouterr().err


def test_what_every_case_would_meet_ends_it_at_once(
    infer: Run, cases: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert infer(*cases, "--label-scheme", "brats1999") == 2
    assert infer(*cases, "--atlas", tmp_path / "nowhere.nii.gz") == 66
    for option in ("--atlas", "--affine"):
        (tmp_path / "bad.nii.gz").write_bytes(b"no image")
        assert infer(*cases, option, tmp_path / "bad.nii.gz") == 65
    assert len(capsys.readouterr().err.splitlines()) == 4 and not (tmp_path / "out").exists()
    real, left = results.Result.save, [1]

    def full(self: results.Result, *rest: Any) -> Path:
        if not left:
            raise OutputError("out: the disk is full")
        left.pop()
        return real(self, *rest)

    monkeypatch.setattr(results.Result, "save", full)
    assert infer(*cases) == 74
    assert [row["case"] for row in rows(tmp_path / "out")] == ["alpha"]
    assert capsys.readouterr().err.splitlines()[-1] == "jrs: out: the disk is full"


def test_the_fixed_image_is_encoded_once(
    infer: Run, cases: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = []
    real = Pipeline.open

    def noted(*arguments: Any) -> Pipeline:
        pipeline = real(*arguments)
        encode = pipeline.network.encode
        monkeypatch.setattr(pipeline.network, "encode", lambda image: opened.append(1) or encode(image))
        return pipeline

    monkeypatch.setattr(Pipeline, "open", staticmethod(noted))
    monkeypatch.setenv("JRS_CACHE_LIMIT", "0")
    assert infer(*cases) == 0
    assert len(opened) == len(cases) + 1
