"""``jrs data scan`` and ``jrs data prepare`` as a user runs them, and training on what they give."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jrs.cli.main import run
from jrs.train.datasets import find_cases

ROOT = Path(__file__).parents[1]
SHAPE = (26, 30, 24)
CONFIG = """
epochs = 1
steps_per_epoch = 1
batch_size = 1
validation_pairs = 1
validation_share = 0.3
precision = "fp32"

[model]
channels = ["t1", "flair"]
optional_channels = ["flair"]

[model.architecture]
in_channels = 2
base_channels = 2
norm = "instance"
head = "displacement"

[model.grid]
shape = [16, 16, 32]
spacing = [9.0, 10.0, 4.0]
"""


@dataclass(frozen=True)
class Place:
    """BraTS 2023-like data of three subjects with two sessions each, an atlas and a configuration."""

    root: Path

    def __getattr__(self, name: str) -> str:
        return str(self.root / {"atlas": "atlas.nii.gz", "config": "tiny.toml"}.get(name, name))

    def image(self, subject: int, session: int, kind: str) -> Path:
        stem = f"BraTS-GLI-{subject:05d}-{session:03d}"
        return self.root / "data" / stem / f"{stem}-{kind}.nii.gz"

    def prepare(self, *options: str) -> int:
        fixed = ["data", "prepare", self.data, "--out", self.cache, "--config", self.config, "--atlas", self.atlas]
        return run([*fixed, *options])


@pytest.fixture
def place(tmp_path: Path, helpers: Any) -> Place:
    made = Place(tmp_path)
    affine = helpers.grid_affine(SHAPE, (6.0, 6.0, 6.0), "LPS")
    points = helpers.world_points(affine, SHAPE)
    helpers.write_image(tmp_path / "atlas.nii.gz", helpers.head(points).astype(np.float32), affine)
    for subject in range(3):
        for session in range(2):
            scale = 1 + 0.02 * subject + 0.01 * session
            for contrast, kind in ((0, "t1n"), (3, "t2f")):
                data = helpers.head(points * scale, contrast).astype(np.float32)
                helpers.write_image(made.image(subject, session, kind), data, affine)
            seg = np.zeros(SHAPE, np.uint8)
            seg[12:18, 12:18, 9:15] = np.array((1, 2, 3)).repeat(2)
            helpers.write_image(made.image(subject, session, "seg"), seg, affine)
    (tmp_path / "tiny.toml").write_text(CONFIG)
    return made


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-500])


# Scan -------------------------------------------------------------------------------------------------------


def test_scan_of_a_healthy_folder(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["data", "scan", place.data, "--deep", "--workers", "1"]) == 0
    out, err = capsys.readouterr()
    assert out == "6 of 6 cases (3 subjects, layout brats) are usable\n"
    assert "seg 1,2,3" in err and "3 subjects have several cases" in err


def test_scan_names_what_is_wrong_and_lists_what_is_usable(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    cut(place.image(1, 0, "t2f"))
    place.image(2, 1, "t2f").unlink()
    manifest = place.root / "usable.csv"
    manifest.write_text("notes\n", encoding="utf-8")
    assert run(["data", "scan", place.data, "--out", str(manifest)]) == 73
    assert manifest.read_text(encoding="utf-8") == "notes\n"
    assert f"{manifest}: exists already" in capsys.readouterr().err
    assert run(["data", "scan", place.data, "--json", "--out", str(manifest), "--overwrite"]) == 1
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert report["usable"] == 5
    by_name = {case["case"]: case for case in report["cases"]}
    (finding,) = [f for f in by_name["BraTS-GLI-00001-000"]["findings"] if f["level"] == "error"]
    assert str(place.image(1, 0, "t2f")) in finding["text"] and "cut off" in finding["text"]
    assert by_name["BraTS-GLI-00002-001"]["usable"]
    assert f"error: BraTS-GLI-00001-000: flair: {place.image(1, 0, 't2f')}: is cut off" in err
    with manifest.open() as stream:
        rows = list(csv.DictReader(stream))
    assert [row["case"] for row in rows] == [c.name for c in find_cases(Path(place.data)) if "1-000" not in c.name]
    assert rows[0]["t1"] == "data/BraTS-GLI-00000-000/BraTS-GLI-00000-000-t1n.nii.gz"
    assert run(["data", "scan", str(manifest), "--require", "t1,flair"]) == 1
    assert capsys.readouterr().out.startswith("4 of 5 cases")


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["{data}", "--require", "pd"], 2, "'pd'"),
        (["{data}", "--out", "{root}/x.txt"], 2, ".csv or .json"),
        (["{data}", "--layout", "nifti"], 2, "nifti"),
        (["{root}/none"], 66, "no such"),
    ],
)
def test_scan_refuses(
    place: Place, arguments: list[str], code: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    values = {"data": place.data, "root": str(place.root)}
    assert run(["data", "scan", *(a.format(**values) for a in arguments)]) == code
    out, err = capsys.readouterr()
    assert out == "" and words in err and err.startswith("jrs: ") and err.count("\n") == 1


# Prepare ----------------------------------------------------------------------------------------------------


def test_prepare_and_prepare_again(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    assert place.prepare("--test-share", "0.3", "--seed", "3") == 0
    assert capsys.readouterr().out == f"{place.cache}: 6 of 6 cases (0 were there); 2 train, 2 validation, 2 test\n"
    splits = json.loads((place.root / "cache" / "splits.json").read_text())
    parts = [{name[:-4] for name in splits[part]} for part in ("train", "validation", "test")]
    assert sorted(map(len, parts)) == [1, 1, 1] and len(set.union(*parts)) == 3  # sessions stay together
    assert place.prepare("--verify") == 0
    assert "(6 were there)" in capsys.readouterr().out
    assert json.loads((place.root / "cache" / "splits.json").read_text()) == splits


def test_a_test_share_that_cannot_be_kept_is_an_error(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    """Training would draw splits of its own, and use the cases that were to be kept from it."""
    assert place.prepare("--test-share", "0.9") == 78
    assert "kept for testing" in capsys.readouterr().err
    assert not (place.root / "cache" / "splits.json").exists()
    assert place.prepare("--validation-share", "0.9") == 0
    assert "no splits" in capsys.readouterr().err


def test_a_bad_case_is_named_and_the_others_are_prepared(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    cut(place.image(1, 0, "t1n"))
    assert place.prepare("--workers", "2") == 1
    out, err = capsys.readouterr()
    assert "5 of 6 cases" in out
    assert f"BraTS-GLI-00001-000: {place.image(1, 0, 't1n')}: is cut off" in err


def test_given_splits_that_share_a_subject(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    lists = {"train": ["BraTS-GLI-00000-000"], "validation": ["BraTS-GLI-00000-001", "BraTS-GLI-00001"]}
    (place.root / "lists.json").write_text(json.dumps(lists))
    assert place.prepare("--splits", str(place.root / "lists.json")) == 65
    assert "train and validation share 1 subject (BraTS-GLI-00000)" in capsys.readouterr().err


def test_prepare_refuses(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    assert place.prepare("--align", "rigid") == 2
    assert "auto or off" in capsys.readouterr().err
    assert place.prepare("--workers", "0") == 2


@pytest.mark.slow
def test_killed_while_preparing_and_begun_again(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    """The real command with two workers, killed as soon as something is finished."""
    arguments = ["data", "prepare", place.data, "--out", place.cache, "--config", place.config]
    arguments += ["--atlas", place.atlas, "--workers", "2"]
    code = "import sys\nfrom jrs.cli.main import main\nmain()"
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments], env=env, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    cases = place.root / "cache" / "cases"
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and not list(cases.glob("[!.]*")):
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (place.root / "cache" / "index.json").exists()
    assert place.prepare() == 0
    out = capsys.readouterr().out
    assert "6 of 6 cases" in out and "(0 were there" not in out
    assert place.prepare("--verify") == 0
    assert "(6 were there)" in capsys.readouterr().out


# Training ---------------------------------------------------------------------------------------------------


def train(place: Place, data: str, *options: str) -> int:
    fixed = ["train", "--data", data, "--config", place.config, "--atlas", place.atlas, "--out", place.run]
    return run([*fixed, "--threads", "1", *options])


@pytest.mark.parametrize("kind", ["folder", "manifest", "cache"])
def test_training_takes_a_folder_a_manifest_and_a_cache(
    place: Place, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    data = place.data
    if kind == "manifest":
        data = str(place.root / "m.csv")
        assert run(["data", "scan", place.data, "--out", data]) == 0
    if kind == "cache":
        assert place.prepare("--seed", "0") == 0
        data = place.cache
    assert train(place, data) == 0
    assert "4 to train on, 2 to validate on" in capsys.readouterr().err
    stored = json.loads((place.root / "run" / "splits.json").read_text())
    assert len({name[:-4] for name in stored["train"]} | {name[:-4] for name in stored["validation"]}) == 3
    if kind == "cache":
        assert stored == json.loads((place.root / "cache" / "splits.json").read_text())


def test_training_by_given_splits(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    lists = {"train": ["BraTS-GLI-00000"], "validation": ["BraTS-GLI-00002"]}
    (place.root / "lists.json").write_text(json.dumps(lists))
    assert train(place, place.data, "--splits", str(place.root / "lists.json")) == 0
    assert "2 to train on, 2 to validate on, 0 for testing, 2 in no split" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("lists", "code", "words"),
    [
        ({"train": ["BraTS-GLI-00000"], "validation": ["BraTS-GLI-00000-001"]}, 65, "share 1 subject"),
        ({"train": ["BraTS-GLI-00000"]}, 65, "0 cases make no pair"),
        ({"train": ["BraTS-GLI-99999"]}, 65, "no case or subject"),
    ],
)
def test_training_refuses_splits(
    place: Place, lists: Any, code: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (place.root / "lists.json").write_text(json.dumps(lists))
    assert train(place, place.data, "--splits", str(place.root / "lists.json")) == code
    assert words in capsys.readouterr().err


def test_training_on_a_cache_for_another_network(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    assert place.prepare() == 0
    (place.root / "tiny.toml").write_text(CONFIG.replace("[9.0, 10.0, 4.0]", "[9.0, 10.0, 5.0]"))
    assert train(place, place.cache) == 78
    assert "prepared for another grid" in capsys.readouterr().err
