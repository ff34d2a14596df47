"""What a run keeps: checkpoints that survive a kill, a damaged file, and the average of the weights."""

from __future__ import annotations

import dataclasses
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from small_training import ONE_CYCLE, exact, same_checkpoint, start_small_run, train_config, trainer

from jrs.errors import ConfigurationError
from jrs.models.checkpoint import load_checkpoint
from jrs.train.config import OptimizerConfig, TrainConfig
from jrs.train.log import METRICS
from jrs.train.loop import BEST, LAST
from jrs.train.state import PREVIOUS, checksum, load_last, save_last

pytestmark = pytest.mark.usefixtures("one_thread")
PATIENCE_S = 300.0


AVERAGED = dataclasses.replace(ONE_CYCLE, ema_decay=0.9)


@exact
@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again(tmp_path: Path) -> None:
    """In the middle of writing a checkpoint, the last or the best, and wherever the clock says."""
    config = train_config(epochs=4, steps_per_epoch=5, batch_size=2, accumulate=2, optimizer=AVERAGED, log_every=2)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    trainer(whole, config).run()
    for write in (2, 6):
        process = start_small_run(cut, config, "--resume", "--kill-write", str(write))
        process.communicate(timeout=PATIENCE_S)
        assert process.returncode == -signal.SIGKILL
    process = start_small_run(cut, config, "--resume")
    before, deadline = (cut / METRICS).stat().st_mtime_ns, time.monotonic() + PATIENCE_S
    while process.poll() is None and (cut / METRICS).stat().st_mtime_ns == before and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(random.Random(3).uniform(0.0, 0.3))
    process.kill()
    process.communicate(timeout=PATIENCE_S)
    process = start_small_run(cut, config, "--resume")
    out, errors = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, errors
    assert out == "20\n"
    for name in (LAST, BEST):
        assert same_checkpoint(whole / name, cut / name)
    assert (cut / METRICS).read_text() == (whole / METRICS).read_text()
    assert not list(cut.glob(".jrs-*"))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_the_step_end_and_saves(tmp_path: Path, number: signal.Signals) -> None:
    config = train_config(epochs=300, checkpoint_minutes=60.0)
    process = start_small_run(tmp_path / "run", config)
    deadline = time.monotonic() + PATIENCE_S
    path = tmp_path / "run" / METRICS
    while process.poll() is None and not (path.exists() and "train" in path.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(number)
    _, errors = process.communicate(timeout=PATIENCE_S)
    # Python ends with the signal itself after a KeyboardInterrupt that nobody caught.
    assert process.returncode == (-signal.SIGINT if number == signal.SIGINT else 128 + number), errors
    step = load_checkpoint(tmp_path / "run" / LAST).training["progress"]["step"]
    assert 0 < step < 900
    rows = [line.split(",") for line in path.read_text().splitlines()[1:]]
    assert max(int(row[0]) for row in rows) == step


def finished(tmp_path: Path, **changes: Any) -> tuple[TrainConfig, Path]:
    config = train_config(epochs=1, steps_per_epoch=3, **changes)
    trainer(tmp_path / "run", config).run()
    return config, tmp_path / "run"


def damage(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "cut":
        content = content[: len(content) // 2]
    else:  # a block of zeros, as a disk leaves that lost power
        middle = len(content) // 2
        content[middle : middle + 512] = bytes(512)
    path.write_bytes(content)


@pytest.mark.parametrize("how", ["cut", "zeros"])
def test_the_checkpoint_before_the_last_serves_where_that_is_damaged(tmp_path: Path, how: str) -> None:
    config, folder = finished(tmp_path)
    expected = load_checkpoint(folder / PREVIOUS)
    assert expected.training["progress"]["step"] == 2
    damage(folder / LAST, how)
    said: list[str] = []
    found = load_last(folder, said.append)
    assert found.training == expected.training
    assert len(said) == 1 and LAST in said[0] and PREVIOUS in said[0]
    made = trainer(folder, config)
    made.resume()
    assert made.run().step == 3
    assert load_last(folder, said.append).training["progress"]["step"] == 3 and len(said) == 1


def test_all_damaged(tmp_path: Path) -> None:
    _, folder = finished(tmp_path)
    for name in (LAST, PREVIOUS):
        damage(folder / name, "zeros")
    with pytest.raises(ConfigurationError, match=r"damaged, [^\n]*start anew[^\n]*$"):
        load_last(folder)


def test_the_last_one_alone(tmp_path: Path) -> None:
    """Killed between the two renames there is a previous and no newer one, or two names of one file."""
    _, folder = finished(tmp_path)
    (folder / LAST).unlink()
    assert load_last(folder).training["progress"]["step"] == 2
    checkpoint = load_checkpoint(folder / PREVIOUS)
    for step in (7, 8):
        checkpoint.training = {"progress": {"step": step}}
        save_last(checkpoint, folder)
    assert [load_checkpoint(folder / n).training["progress"]["step"] for n in (LAST, PREVIOUS)] == [8, 7]


def test_a_checksum_sees_every_tensor(tmp_path: Path) -> None:
    _, folder = finished(tmp_path)
    checkpoint = load_checkpoint(folder / LAST)
    first = checksum(checkpoint)
    for part in (checkpoint.weights, checkpoint.optimizer):
        name = sorted(part)[len(part) // 2]
        kept = part[name].clone()
        part[name].reshape(-1)[0] += 1.0
        assert checksum(checkpoint) != first
        part[name] = kept
    assert checksum(checkpoint) == first


# The average of the weights ---------------------------------------------------------------------------------


def test_the_average_is_what_the_formula_says(tmp_path: Path) -> None:
    config = train_config(epochs=1, steps_per_epoch=5, optimizer=OptimizerConfig(ema_decay=0.3))
    made = trainer(tmp_path, config)
    names = [name for name, _ in made._module.named_parameters()]
    average = [p.detach().double().clone() for p in made._module.parameters()]
    step, original = 0, made._step

    def watched(parts: Any) -> Any:
        nonlocal step
        values = original(parts)
        step += 1
        decay = min(0.3, (1 + step) / (10 + step))
        for mean, p in zip(average, made._module.parameters(), strict=True):
            mean.mul_(decay).add_(p.detach().double(), alpha=1 - decay)
        return values

    made._step = watched  # type: ignore[method-assign]
    made.run()
    last, best = load_checkpoint(tmp_path / LAST), load_checkpoint(tmp_path / BEST)
    for index, (name, mean, p) in enumerate(zip(names, average, made._module.parameters(), strict=True)):
        torch.testing.assert_close(last.weights[name].double(), mean, rtol=1e-5, atol=1e-7)
        assert torch.equal(last.weights[name], best.weights[name])
        # The weights being trained are kept beside it.
        assert torch.equal(last.optimizer[f"{index}.weight"], p)
        assert torch.equal(made._module.state_dict()[name], p)


def test_the_average_is_validated(tmp_path: Path) -> None:
    config = train_config(epochs=1, steps_per_epoch=4, optimizer=OptimizerConfig(learning_rate=1e-2, ema_decay=0.999))
    made = trainer(tmp_path / "run", config)
    made.run()
    loss = made.validate()["loss"]
    plain = trainer(tmp_path / "plain", dataclasses.replace(config, optimizer=OptimizerConfig()))
    plain.start_from(tmp_path / "run" / BEST)
    assert plain.validate()["loss"] == loss
    plain._module.load_state_dict(made._module.state_dict())
    assert plain.validate()["loss"] != loss
