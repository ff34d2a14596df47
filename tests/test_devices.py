"""Several processes: the same numbers as one, ended together; which processes there are."""

from __future__ import annotations

import dataclasses
import math
import os
import signal
import socket
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_training import ONE_CYCLE, Stopped, model_spec, series, start_small_run, train_config, trainer

from jrs.architecture import Architecture
from jrs.errors import ConfigurationError
from jrs.manifest import GridSpec, ModelSpec
from jrs.models.checkpoint import load_checkpoint
from jrs.train.config import HardwareConfig, TrainConfig
from jrs.train.devices import make_fabric, process_counts, share_of
from jrs.train.log import METRICS
from jrs.train.loop import LAST

pytestmark = pytest.mark.usefixtures("one_thread")
PATIENCE_S = 300.0


def torchrun(processes: int) -> tuple[str, ...]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return "-m", "torch.distributed.run", f"--nproc-per-node={processes}", f"--master-port={port}"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "accumulate", "by_torchrun"), [("ddp", 1, True), ("ddp", 2, False), ("fsdp", 2, True)]
)
def test_two_processes_go_on_as_one_would(tmp_path: Path, strategy: Any, accumulate: int, by_torchrun: bool) -> None:
    """Over gloo: a run that one process began, cut in the middle, is the run that one process does alone.

    No norm: a bias before one has no gradient but rounding, which Adam makes steps of.
    """
    config = train_config(
        model_spec(norm="none"), batch_size=4, optimizer=dataclasses.replace(ONE_CYCLE, ema_decay=0.9)
    )
    config = dataclasses.replace(config, epochs=3, steps_per_epoch=3, validation_pairs=3)
    trainer(tmp_path / "one", config).run()
    with pytest.raises(Stopped):
        trainer(tmp_path / "two", config, stop_at=4).run()
    hardware = HardwareConfig("cpu", devices=0 if by_torchrun else 2, strategy=strategy)
    several = dataclasses.replace(config, accumulate=accumulate, hardware=hardware)
    if accumulate > 1:
        # Another way to cut the same step is another configuration: from the start.
        (tmp_path / "two" / LAST).unlink()
    prefix = torchrun(2) if by_torchrun else ()
    process = start_small_run(tmp_path / "two", several, "--resume", prefix=prefix)
    _, errors = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, errors
    for split in ("train", "validation"):
        one, two = (series(tmp_path / run, split, "loss") for run in ("one", "two"))
        assert len(one) == {"train": 9, "validation": 3}[split]
        np.testing.assert_allclose(two, one, rtol=2e-6)
    alone, together = (load_checkpoint(tmp_path / run / LAST) for run in ("one", "two"))
    assert together.optimizer.keys() == alone.optimizer.keys()
    for one, two in ((alone.weights, together.weights), (alone.optimizer, together.optimizer)):
        for name, value in one.items():
            # Adam moves a weight whose gradient is all but rounding as far as any other: a hundredth of a step.
            torch.testing.assert_close(two[name], value, rtol=1e-4, atol=0.01 * ONE_CYCLE.learning_rate)


@pytest.mark.slow
def test_an_interrupt_ends_all_processes_after_the_same_step(tmp_path: Path) -> None:
    config = train_config(batch_size=2, epochs=300, checkpoint_minutes=60.0, hardware=HardwareConfig("cpu", devices=2))
    folder = tmp_path / "run"
    process = start_small_run(folder, config, apart=True)
    deadline = time.monotonic() + PATIENCE_S
    while not ((folder / METRICS).exists() and "train" in (folder / METRICS).read_text()):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == -signal.SIGINT, errors
    with pytest.raises(ProcessLookupError):
        while time.monotonic() < deadline:
            os.killpg(process.pid, 0)
            time.sleep(0.1)
    step = load_checkpoint(folder / LAST).training["progress"]["step"]
    assert step == int((folder / METRICS).read_text().splitlines()[-1].split(",")[0])


# One process ------------------------------------------------------------------------------------------------


def test_a_batch_worked_off_in_parts_has_the_same_gradients(tmp_path: Path) -> None:
    """Norms, labels and structures differ between pairs: a ratio over the batch would not survive the cut."""
    config = train_config(batch_size=4)
    gradients = []
    for accumulate in (1, 2, 4):
        made = trainer(tmp_path / str(accumulate), dataclasses.replace(config, accumulate=accumulate))
        share = 4 // accumulate
        made._step([made.train.batch(part, share) for part in range(accumulate)])
        gradients.append([p.grad.clone() for p in made._module.parameters() if p.grad is not None])
    norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradients[0]))
    for other in gradients[1:]:
        difference = sum(
            float((a.double() - b.double()).square().sum()) for a, b in zip(gradients[0], other, strict=True)
        )
        assert math.sqrt(difference) < 1e-5 * norm


@pytest.mark.parametrize(("batch_size", "accumulate", "processes", "share"), [(8, 1, 2, 4), (8, 2, 2, 2), (1, 1, 1, 1)])
def test_share_of_a_process(batch_size: int, accumulate: int, processes: int, share: int) -> None:
    assert share_of(train_config(batch_size=batch_size, accumulate=accumulate), processes) == share


def test_a_batch_that_cannot_be_cut() -> None:
    with pytest.raises(ConfigurationError, match=r"batch_size 6 .* 4 processes .* multiple of 4"):
        share_of(train_config(batch_size=6), 4)
    with pytest.raises(ConfigurationError, match="accumulate 4 must divide batch_size 6"):
        train_config(batch_size=6, accumulate=4)


SLURM = {"SLURM_NTASKS": "8", "SLURM_NNODES": "2", "SLURM_JOB_NAME": "train"}


@pytest.mark.parametrize(
    ("environment", "asked", "expected"),
    [
        ({}, (0, 0), (1, 1)),
        ({}, (3, 0), (3, 1)),
        ({}, (-1, 0), (1, 1)),
        (SLURM, (0, 0), (4, 2)),
        (SLURM | {"SLURM_NTASKS_PER_NODE": "4"}, (4, 2), (4, 2)),
        (SLURM | {"SLURM_JOB_NAME": "bash"}, (0, 0), (1, 1)),
        ({"TORCHELASTIC_RUN_ID": "x", "LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "6"}, (0, 0), (2, 3)),
    ],
)
def test_how_many_processes(
    environment: dict[str, str], asked: tuple[int, int], expected: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in os.environ if name.startswith(("SLURM_", "TORCHELASTIC_"))]:
        monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert process_counts(HardwareConfig(devices=asked[0], nodes=asked[1]), "cpu") == expected


def test_more_devices_than_were_started(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigurationError, match=r"5 devices on 2 nodes .* 4 processes on 2 nodes"):
        process_counts(HardwareConfig(devices=5), "cpu")


@pytest.mark.parametrize(
    ("first", "base", "refused"), [(32, 2, True), (32, 1, False), (16, 4, True), (16, 2, False), (48, 8, False)]
)
def test_grids_of_wrong_gradients_are_refused(first: int, base: int, refused: bool) -> None:
    """Two voxels along the first axis at the fifth level or the fourth, of more than 16 channels; in BF16 on a CPU."""
    spec = ModelSpec(Architecture(base_channels=base), grid=GridSpec((first, 48, 48), (4.0, 4.0, 4.0)))
    make_fabric(train_config(spec, precision="fp32", hardware=HardwareConfig("cpu")))
    config = train_config(spec, precision="bf16", hardware=HardwareConfig("cpu"))
    if not refused:
        make_fabric(config)
        return
    with pytest.raises(ConfigurationError, match=f"first axis has {first} voxels.*fp32"):
        make_fabric(config)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"precision": "fp16", "hardware": HardwareConfig("cpu")}, "fp16 needs a GPU"),
        ({"precision": "fp16", "hardware": HardwareConfig("cpu", strategy="fsdp")}, "fp16"),
        ({"batch_size": 2, "hardware": HardwareConfig("cpu", devices=3)}, "multiple of 3"),
    ],
)
def test_what_cannot_be_computed_is_refused(changes: dict[str, Any], words: str) -> None:
    config: TrainConfig = train_config(**changes)
    with pytest.raises(ConfigurationError, match=words):
        make_fabric(config)
