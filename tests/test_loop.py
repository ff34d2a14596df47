"""The training loop: steps, resuming, schedules."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_training import (
    ONE_CYCLE,
    SHAPE,
    Stopped,
    Stopping,
    exact,
    label_maps,
    model_spec,
    rows,
    series,
    train_config,
    trainer,
)

from jrs.errors import (
    ConfigurationError,
    JrsError,
)
from jrs.models.checkpoint import Checkpoint, load_checkpoint
from jrs.models.network import JointNet
from jrs.train.batch import PairBatch
from jrs.train.config import OptimizerConfig, TrainConfig
from jrs.train.configfile import load_config
from jrs.train.log import METRICS, PICTURE, TIMINGS
from jrs.train.loop import BEST, LAST, Trainer
from jrs.train.objective import moved_along
from jrs.train.state import PREVIOUS
from jrs.train.synth import SyntheticPairs

pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_loss_falls(tmp_path: Path) -> None:
    config = train_config(
        epochs=2, steps_per_epoch=10, optimizer=OptimizerConfig(learning_rate=1e-2), checkpoint_minutes=5.0
    )
    made = trainer(tmp_path, config)
    before = made.validate()["loss"]
    progress = made.run()
    assert progress.step == 20
    after = made.validate()["loss"]
    assert after < 0.9 * before
    losses = series(tmp_path, "train", "loss")
    assert len(losses) == 20 and np.mean(losses[-5:]) < np.mean(losses[:5])
    assert series(tmp_path, "validation", "loss")[-1] == pytest.approx(after, rel=1e-6)
    assert progress.best_loss == pytest.approx(min(series(tmp_path, "validation", "loss")), rel=1e-6)


def test_a_run_leaves_its_files(tmp_path: Path) -> None:
    config = train_config(epochs=2, steps_per_epoch=2)
    trainer(tmp_path / "new" / "run", config).run()
    folder = tmp_path / "new" / "run"
    tables = {METRICS, TIMINGS, PICTURE, "config.toml", "tensorboard"}
    assert {LAST, PREVIOUS, BEST, *tables} == {p.name for p in folder.iterdir()}
    assert load_config(str(folder / "config.toml")) == config
    best, last = load_checkpoint(folder / BEST), load_checkpoint(folder / LAST)
    assert last.optimizer and not best.optimizer
    assert best.spec == last.spec == config.model
    assert last.training["progress"]["step"] == 4
    # The folder means its best checkpoint.
    assert load_checkpoint(folder).training["progress"]["step"] == best.training["progress"]["step"]


# oneDNN 3.x leaves the bf16 weight gradient of a 3x3x3 convolution unset where the first axis has two voxels,
# as some level has where the grid's has 16 or 32 (PyTorch 2.13 on the CPU).
BF16_SPEC = model_spec(shape=(48, 16, 16))


def test_bf16_trains_too(tmp_path: Path) -> None:
    made = trainer(tmp_path, train_config(BF16_SPEC, epochs=1, steps_per_epoch=2, precision="bf16"))
    before = [p.detach().clone() for p in made._module.parameters()]
    made.run()
    assert all(p.dtype == torch.float32 and bool(torch.isfinite(p).all()) for p in made._module.parameters())
    assert any(not torch.equal(a, b) for a, b in zip(before, made._module.parameters(), strict=True))


def test_logged_values_are_means_since_the_last_row(tmp_path: Path) -> None:
    config = train_config(epochs=1, steps_per_epoch=6)
    trainer(tmp_path / "one", config).run()
    trainer(tmp_path / "three", dataclasses.replace(config, log_every=3)).run()
    single, mean = series(tmp_path / "one", "train", "loss"), series(tmp_path / "three", "train", "loss")
    assert [row["step"] for row in rows(tmp_path / "three") if row["name"] == "similarity"] == ["3", "6", "6"]
    np.testing.assert_allclose(mean, [np.mean(single[:3]), np.mean(single[3:])], rtol=1e-6)


def interrupted(
    tmp_path: Path, config: TrainConfig, at: int, error: type[BaseException] = Stopped
) -> Trainer:
    """A run that was cut when batch ``at`` was due, then resumed by another process's Trainer."""
    with pytest.raises(error):
        trainer(tmp_path / "cut", config, at, error).run()
    resumed = trainer(tmp_path / "cut", config)
    resumed.resume()
    return resumed




@exact
@pytest.mark.parametrize(
    ("at", "changes"),
    [
        pytest.param(7, {}),
        pytest.param(5, {"optimizer": ONE_CYCLE, "precision": "bf16", "spec": BF16_SPEC}),
        pytest.param(8, {"log_every": 3}),
        pytest.param(6, {"batch_size": 2, "spec": model_spec(num_labels=0)}),
    ],
)
def test_a_resumed_run_is_the_same_run(tmp_path: Path, at: int, changes: dict[str, Any]) -> None:
    config = train_config(**changes)
    whole = trainer(tmp_path / "whole", config)
    whole.run()
    resumed = interrupted(tmp_path, config, at)
    assert 0 < resumed.progress.step <= at
    resumed.run()
    assert resumed.progress == whole.progress
    expected, got = whole._module.state_dict(), resumed._module.state_dict()
    assert all(torch.equal(got[name], value) for name, value in expected.items())
    assert (tmp_path / "cut" / "metrics.csv").read_text() == (tmp_path / "whole" / "metrics.csv").read_text()
    for name in (LAST, BEST):
        a, b = (load_checkpoint(tmp_path / run / name) for run in ("whole", "cut"))
        assert a.training == b.training
        assert all(torch.equal(a.weights[k], b.weights[k]) for k in a.weights)
        assert all(torch.equal(a.optimizer[k], b.optimizer[k]) for k in a.optimizer)


@exact
def test_resuming_restores_every_value(tmp_path: Path) -> None:
    config = train_config()
    with pytest.raises(Stopped):
        (cut := trainer(tmp_path / "cut", config, 7)).run()
    resumed = trainer(tmp_path / "cut", config)
    resumed.resume()
    assert resumed.progress == cut.progress and resumed.progress.step == 7
    for a, b in zip(cut._module.parameters(), resumed._module.parameters(), strict=True):
        assert torch.equal(a, b)
    before, after = (t.optimizer.state_dict()["state"] for t in (cut, resumed))
    assert before.keys() == after.keys() and len(before) > 50
    for index, entries in before.items():
        assert entries.keys() == after[index].keys()
        assert all(torch.equal(value, after[index][name]) for name, value in entries.items())


@pytest.mark.parametrize("error", [Stopped, KeyboardInterrupt])
def test_the_log_of_a_resumed_run_has_each_row_once(tmp_path: Path, error: type[BaseException]) -> None:
    config = train_config(log_every=2)
    resumed = interrupted(tmp_path, config, 8, error)
    # Rows of steps that will be done again, as a crash leaves them; the last one is cut.
    with (tmp_path / "cut" / "metrics.csv").open("a", encoding="utf-8") as stream:
        stream.write("10,3,train,loss,0.5\r\n11,3,tra")
    resumed.run()
    found = [(int(row["step"]), row["split"], row["name"]) for row in rows(tmp_path / "cut")]
    assert len(found) == len(set(found))
    assert [step for step, split, name in found if (split, name) == ("train", "loss")] == [2, 4, 6, 8, 10, 12]
    assert [step for step, split, name in found if (split, name) == ("validation", "loss")] == [3, 6, 9, 12]


@pytest.mark.parametrize(
    "change",
    [
        {"epochs": 5},
        {"seed": 1},
        {"batch_size": 2},
        {"optimizer": OptimizerConfig(learning_rate=1e-3)},
        {"model": model_spec(head="potential")},
    ],
)
def test_another_configuration_is_not_resumed(tmp_path: Path, change: dict[str, Any]) -> None:
    trainer(tmp_path, train_config(epochs=1, steps_per_epoch=1)).run()
    other = trainer(tmp_path, train_config(**{"epochs": 1, "steps_per_epoch": 1, **change}))
    with pytest.raises(ConfigurationError, match=r"another configuration; [^\n]+$"):
        other.resume()


def test_starting_from_other_weights(tmp_path: Path) -> None:
    torch.manual_seed(5)
    spec = model_spec()
    net = JointNet(spec.architecture)
    Checkpoint(spec, net.state_dict()).save(tmp_path / "net.safetensors")
    made = trainer(tmp_path / "run", train_config())
    made.start_from(tmp_path / "net.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), made._module.parameters(), strict=True))
    other = trainer(tmp_path / "other", train_config(spec=model_spec(norm="none")))
    with pytest.raises(ConfigurationError, match="another architecture"):
        other.start_from(tmp_path / "net.safetensors")


def test_a_single_image_makes_no_pair(tmp_path: Path) -> None:
    maps = label_maps().subset([0])
    assert maps.names == ("map0",) and maps.classes.shape == (1, *SHAPE)
    config = train_config()
    alone = SyntheticPairs(maps, config.model, config.synthesis, 0)
    with pytest.raises(ConfigurationError, match="at least 2"):
        Trainer(config, alone, alone, tmp_path)


def test_a_share_of_the_steps_goes_on_from_a_first_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps 4, 8, ...; there the moving image is the one that the weights of that moment move."""
    from jrs.train import loop

    config = train_config(epochs=1, steps_per_epoch=8, second_pass=0.25, batch_size=2)
    made = trainer(tmp_path, config)
    seen: list[tuple[int, PairBatch, torch.Tensor, dict[str, torch.Tensor]]] = []

    def spy(batch: PairBatch, coords_vox: torch.Tensor) -> PairBatch:
        weights = {name: value.clone() for name, value in made._module.state_dict().items()}
        seen.append((made.progress.step, batch, coords_vox, weights))
        return moved_along(batch, coords_vox)

    monkeypatch.setattr(loop, "moved_along", spy)
    made.run()
    assert [step for step, *_ in seen] == [3, 7]
    assert all(math.isfinite(loss) for loss in series(tmp_path, "train", "loss"))
    net = JointNet(config.model.architecture)
    for _, batch, coords, weights in seen:
        net.load_state_dict(weights)
        assert not coords.requires_grad
        with torch.no_grad():
            want = net(batch.moving, batch.fixed).coords_vox
        assert want is not None
        torch.testing.assert_close(coords, want, rtol=0.0, atol=1e-3)
    assert not torch.equal(seen[0][2], seen[1][2])


class Unlabelled(Stopping):
    """Pairs whose tumours are unknown."""

    def batch(self, index: int, size: int) -> PairBatch:
        batch = self.inner.batch(index, size)
        unknown = torch.full_like(batch.moving_tumor, -1)  # type: ignore[arg-type]
        return dataclasses.replace(batch, moving_tumor=unknown, fixed_tumor=unknown)


def test_images_without_a_segmentation_train_the_registration(tmp_path: Path) -> None:
    config = train_config(epochs=1, steps_per_epoch=2)
    pairs: Any = Unlabelled(SyntheticPairs(label_maps(), config.model, config.synthesis, 0), 0)
    made = Trainer(config, pairs, pairs, tmp_path)
    assert made._module.segmentation is not None and made._module.registration is not None
    before = made._module.segmentation.output.weight.detach().clone()
    moving = made._module.registration.output.weight.detach().clone()
    assert made.run().step == 2
    assert torch.equal(made._module.segmentation.output.weight, before)
    assert not torch.equal(made._module.registration.output.weight, moving)


def test_a_loss_that_is_no_number_stops_the_run(tmp_path: Path) -> None:
    made = trainer(tmp_path, train_config())
    with torch.no_grad():
        next(iter(made._module.parameters())).fill_(float("nan"))
    with pytest.raises(JrsError, match=r"loss of step 1 is not a number; [^\n]+$"):
        made.run()


# Schedules --------------------------------------------------------------------------------------------------


def test_the_plateau_of_the_paper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = OptimizerConfig(learning_rate=1e-3, plateau_factor=0.2, plateau_epochs=3, stop_epochs=7)
    config = train_config(epochs=40, steps_per_epoch=1, optimizer=options, checkpoint_minutes=5.0)
    made = trainer(tmp_path, config)
    # Better in epochs 1, 2 and 4, never again.
    losses = iter([5.0, 4.0, 4.5, 3.0] + [3.5] * 40)
    monkeypatch.setattr(made, "validate", lambda: {"loss": next(losses)})
    progress = made.run()
    assert progress.step == 4 + 7
    assert progress.best_loss == 3.0
    assert load_checkpoint(tmp_path / BEST).training["progress"]["step"] == 4
    # Three epochs without a better one: a fifth, after six of them a twenty-fifth.
    expected = [1e-3] * 7 + [2e-4] * 3 + [4e-5]
    np.testing.assert_allclose(series(tmp_path, "train", "learning_rate"), expected, rtol=1e-6)


def test_one_cycle(tmp_path: Path) -> None:
    options = OptimizerConfig(learning_rate=2e-3, schedule="one-cycle")
    config = train_config(epochs=1, steps_per_epoch=20, optimizer=options, checkpoint_minutes=5.0)
    trainer(tmp_path, config).run()
    rates = np.array(series(tmp_path, "train", "learning_rate")) / 2e-3
    assert len(rates) == 20
    assert rates[0] == pytest.approx(0.04, rel=1e-3)
    assert int(rates.argmax()) == 3 and rates.max() == pytest.approx(1.0, rel=1e-6)
    assert (np.diff(rates[:4]) > 0).all() and (np.diff(rates[3:]) < 0).all()
    # Half way down half a cosine: 3 + 8.5 of 20 steps.
    assert rates[11] > 0.5 > rates[12] and rates[-1] < 0.02


def test_the_optimiser_is_adam_at_that_rate(tmp_path: Path) -> None:
    """Its first step, by the equations of Kingma and Ba: lr g / (|g| + 1e-8)."""
    config = train_config(epochs=1, steps_per_epoch=1, optimizer=OptimizerConfig(learning_rate=3e-3))
    made = trainer(tmp_path, config)
    before = [p.detach().double().numpy().copy() for p in made._module.parameters()]
    made.run()
    largest = 0.0
    for parameter, old in zip(made._module.parameters(), before, strict=True):
        assert parameter.grad is not None
        g = parameter.grad.double().numpy()
        moved = parameter.detach().double().numpy() - old
        np.testing.assert_allclose(moved, -3e-3 * g / (np.abs(g) + 1e-8), atol=3e-6)
        largest = max(largest, float(np.abs(moved).max()))
    assert largest == pytest.approx(3e-3, rel=1e-3)


def test_gradients_are_clipped_to_their_norm(tmp_path: Path) -> None:
    options = OptimizerConfig(learning_rate=1e-3, clip_norm=0.05)
    made = trainer(tmp_path, train_config(epochs=1, steps_per_epoch=1, optimizer=options))
    made.run()
    squares = sum(
        float(p.grad.double().square().sum()) for p in made._module.parameters() if p.grad is not None
    )
    assert math.sqrt(squares) == pytest.approx(0.05, rel=1e-3)
