"""Configurations: shipped, of one's own, over one another."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from small_training import (
    ROOT,
)

from jrs.architecture import Architecture
from jrs.errors import (
    ConfigurationError,
    MissingInputError,
)
from jrs.manifest import ModelSpec
from jrs.train.config import LossConfig, OptimizerConfig, TrainConfig
from jrs.train.run import load_config

pytestmark = pytest.mark.usefixtures("one_thread")


def plain(value: Any) -> Any:
    """Dataclasses and tuples as what TOML knows."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    return [plain(item) for item in value] if isinstance(value, tuple) else value


def contains(whole: Any, part: Any) -> bool:
    if isinstance(part, dict):
        return isinstance(whole, dict) and all(k in whole and contains(whole[k], v) for k, v in part.items())
    return bool(whole == part)


@pytest.mark.parametrize("name", ["default", "default-3mm", "paper"])
def test_shipped_configurations(name: str) -> None:
    tomllib = pytest.importorskip("tomllib")
    written = tomllib.loads((ROOT / "jrs" / "data" / "configs" / f"{name}.toml").read_text(encoding="utf-8"))
    assert {"epochs", "model", "loss", "optimizer"} <= set(written)
    assert contains(plain(load_config(name)), written)


def test_the_papers_recipe() -> None:
    config = load_config("paper")
    architecture, optimizer, loss = config.model.architecture, config.optimizer, config.loss
    assert (architecture.merge, architecture.head, architecture.norm) == ("subtract", "gradient", "none")
    assert (architecture.in_channels, architecture.num_labels, architecture.base_channels) == (4, 4, 8)
    assert config.model.grid.shape == (144, 208, 144) and config.model.grid.spacing == (1.0, 1.0, 1.0)
    assert (optimizer.learning_rate, optimizer.schedule) == (2e-3, "plateau")
    assert optimizer.plateau_factor == pytest.approx(1 / 5)
    assert (optimizer.plateau_epochs, optimizer.stop_epochs) == (30, 50)
    assert config.batch_size == 2
    assert (loss.gradient_l1, loss.segmentation, loss.similarity, loss.masked) == (1e-10, 1.0, 1.0, True)
    assert (loss.tumor_dice, loss.structure_dice, loss.diffusion, loss.folding) == (0.0, 0.0, 0.0, 0.0)


def test_what_the_command_line_overrides() -> None:
    config = load_config("paper", {"epochs": 3, "seed": 8}, head="potential")
    assert (config.epochs, config.seed, config.model.architecture.head) == (3, 8, "potential")
    assert config.batch_size == load_config("paper").batch_size
    assert load_config("paper").model.architecture.head == "gradient"


def test_a_configuration_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text("epochs = 3\n[optimizer]\nlearning_rate = 1\n")
    config = load_config(str(path), head="displacement")
    expected = TrainConfig(
        model=ModelSpec(Architecture(head="displacement")),
        epochs=3,
        optimizer=OptimizerConfig(learning_rate=1.0),
    )
    assert config == expected


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("epochs = ", ("TOML",)),
        (b"\xff\xfe", ("TOML",)),
        ("epoch = 3", ("'epoch'", "epochs")),
        ("epochs = '3'", ("epochs", "must be int")),
        ("epochs = 0", ("epochs",)),
        ("[optimizer]\nschedule = 'step'", ("optimizer: schedule", "one-cycle")),
        ("validation_share = 1.0", ("validation_share",)),
        ("[loss]\nclass_weights = [1.0, 2.0]", ("class_weights", "2", "4")),
        ("[model]\ngrid = 3", ("model: grid",)),
    ],
)
def test_a_bad_configuration(tmp_path: Path, content: str | bytes, words: tuple[str, ...]) -> None:
    path = tmp_path / "mine.toml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigurationError) as caught:
        load_config(str(path))
    message = str(caught.value)
    assert message.startswith(str(path)) and "\n" not in message
    assert all(word in message for word in words), message


@pytest.mark.parametrize("labels", [2, 5])
def test_dice_of_tumour_regions_needs_the_four_classes(labels: int) -> None:
    names, values = tuple("abcde"[:labels]), tuple(range(labels))
    spec = ModelSpec(Architecture(num_labels=labels), labels=names, label_values=values)
    with pytest.raises(ConfigurationError):
        TrainConfig(model=spec, loss=LossConfig(tumor_dice=0.5, class_weights=(1.0,) * labels))


def test_an_unknown_configuration() -> None:
    with pytest.raises(MissingInputError, match=r"no such configuration; .*default.*paper"):
        load_config("nonsense")
