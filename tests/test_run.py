"""A training run from its request."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from filelock import FileLock
from small_training import train_config, trainer

from jrs.cli.main import run
from jrs.errors import CannotCreateError, ConfigurationError, MissingInputError
from jrs.models.checkpoint import load_checkpoint
from jrs.train.configfile import load_config
from jrs.train.loop import LAST
from jrs.train.run import TrainRequest, split_indices, train_run

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("count", [4, 5, 16, 100])
def test_held_out_images(count: int) -> None:
    config = dataclasses.replace(train_config(), validation_share=0.15)
    held, rest = split_indices(count, config)
    assert sorted(held + rest) == list(range(count))
    assert min(len(held), len(rest)) >= 2
    assert len(held) == max(2, round(0.15 * count))
    assert split_indices(count, config) == (held, rest)


def test_too_few_images_to_hold_some_out() -> None:
    with pytest.raises(ConfigurationError, match="too few"):
        split_indices(3, train_config())


def test_a_run_that_cannot_be_resumed_or_started(tmp_path: Path) -> None:
    with pytest.raises(MissingInputError, match=r"holds no last\.safetensors to resume"):
        train_run(TrainRequest(out=tmp_path, synthetic=tmp_path, resume=True))
    (tmp_path / LAST).write_bytes(b"")
    with pytest.raises(CannotCreateError, match="holds a run already"):
        train_run(TrainRequest(out=tmp_path, synthetic=tmp_path))
    with pytest.raises(MissingInputError, match="no such checkpoint"):
        trainer(tmp_path / "none", train_config()).resume()


def test_two_runs_do_not_share_a_folder(tmp_path: Path) -> None:
    out = tmp_path / "run"
    out.mkdir()
    with (
        FileLock(out / ".lock"),
        pytest.raises(CannotCreateError, match=r"run: another jrs train is at work in it; choose another --out"),
    ):
        train_run(TrainRequest(out=out, synthetic=tmp_path))
    # Nothing of the first one's is left in the way.
    with pytest.raises(MissingInputError, match="label map"):
        train_run(TrainRequest(out=out, synthetic=tmp_path))


# The command ------------------------------------------------------------------------------------------------

SMALL = """
epochs = 2
steps_per_epoch = 2
validation_pairs = 1
log_every = 1
precision = "fp32"
[model]
channels = ["t1"]
optional_channels = ["t1"]
labels = []
label_values = []
[model.architecture]
in_channels = 1
num_labels = 0
base_channels = 2
head = "displacement"
norm = "instance"
[model.grid]
shape = [32, 32, 32]
spacing = [6.0, 6.0, 6.0]
"""


@pytest.fixture
def cohort(tmp_path: Path, helpers: Any) -> Path:
    """Four small T1 images about the atlas's place, their manifest, and a configuration."""
    affine = np.diag([6.0, 6.0, 6.0, 1.0])
    affine[:3, 3] = (-90.0, -115.0, -60.0)
    lines = ["case,t1"]
    for number in range(4):
        data = np.random.default_rng(number).uniform(50.0, 150.0, (32, 36, 32)).astype(np.float32)
        helpers.write_image(tmp_path / "cases" / f"c{number}.nii.gz", data, affine)
        lines.append(f"case{number},c{number}.nii.gz")
    (tmp_path / "cases" / "cases.csv").write_text("\n".join(lines) + "\n")
    (tmp_path / "small.toml").write_text(SMALL)
    return tmp_path


def test_a_run_is_continued_as_it_was_asked_for(cohort: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = cohort / "run"
    options = ["--data", str(cohort / "cases" / "cases.csv"), "--config", str(cohort / "small.toml"), "--out", str(out)]
    options += ["--align", "off"]
    assert run(["train", *options, "--set", "loss.diffusion=0.5", "--batch-size", "1"]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith(f"{out}: 4 steps, best validation loss ") and "waited for data" in captured.out
    assert "step 4 of 4" in captured.err and "data wait" in captured.err
    stored = load_config(str(out / "config.toml"))
    assert stored.loss.diffusion == 0.5 and stored.batch_size == 1 and stored.epochs == 2
    assert load_checkpoint(out / LAST).training["progress"]["step"] == 4
    # Everything comes from the folder; what is changed is named and refused.
    assert run(["train", "--out", str(out), "--resume"]) == 0
    assert capsys.readouterr().out.startswith(f"{out}: 4 steps")
    code = run(["train", "--out", str(out), "--resume", "--learning-rate", "0.01", "--set", "loss.diffusion=0.4"])
    assert code == 78
    message = capsys.readouterr().err.splitlines()[-1]
    assert "loss.diffusion, optimizer.learning_rate differ" in message
    assert run(["train", *options]) == 73


def test_other_images_are_not_the_same_run(cohort: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest, out = cohort / "cases" / "cases.csv", cohort / "run"
    options = ["--config", str(cohort / "small.toml"), "--align", "off", "--out", str(out)]
    assert run(["train", "--data", str(manifest), *options]) == 0
    lines = manifest.read_text()
    # Further cases do not touch the run, whose splits are stored; one that is gone does.
    manifest.write_text(lines + "case4,c0.nii.gz\n")
    assert run(["train", "--out", str(out), "--resume"]) == 0
    assert "1 in no split" in capsys.readouterr().err
    manifest.write_text(lines.replace("case1,", "other,"))
    assert run(["train", "--out", str(out), "--resume"]) == 65
    assert "case1" in capsys.readouterr().err


def test_a_dry_run_says_what_would_be_done(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    options = ["--config", "paper", "--dry-run", "--set", "steps_per_epoch=10", "--epochs", "3", "--accumulate", "2"]
    assert run(["train", *options]) == 0
    text = capsys.readouterr().out
    # Weights of the paper's table.
    assert "# parameters: 3,174,751 (encoder 1,845,408, segmentation 664,676, registration 664,667)" in text
    assert "# steps: at most 30 (3 epochs of 10), 2 pairs each" in text and "GiB a process" in text
    (tmp_path / "again.toml").write_text(text)
    expected = load_config("paper", {"steps_per_epoch": 10, "epochs": 3, "accumulate": 2})
    assert load_config(str(tmp_path / "again.toml")) == expected


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        ((), 2, "--synthetic LABEL_DIR or --data"),
        (("--data", "a", "--synthetic", "b"), 2, "not both"),
        (("--data", "a"), 2, "--out"),
        (("--data", "a", "--out", "b", "--resume", "--init", "c"), 2, "exclude each other"),
        (("--dry-run", "--set", "loss.x=1"), 78, "'x'"),
        (("--dry-run", "--precision", "fp8"), 78, "precision: 'fp8'"),
    ],
)
def test_what_was_asked_wrongly(
    options: tuple[str, ...], code: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["train", *options]) == code
    assert words in capsys.readouterr().err


def test_what_will_not_fit_into_memory(cohort: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--data", str(cohort / "cases" / "cases.csv"), "--config", str(cohort / "small.toml"), "--align", "off"]
    out = cohort / "run"
    assert run(["train", *options, "--out", str(out), "--set", "model.grid.shape=[2048, 2048, 2048]"]) == 75
    assert "--no-memory-check" in capsys.readouterr().err
    assert not out.exists()
