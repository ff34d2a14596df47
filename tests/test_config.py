"""Configurations: shipped, of one's own, over one another."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from small_training import ROOT

from jrs.architecture import Architecture
from jrs.errors import ConfigurationError, JrsError, MissingInputError, UsageError
from jrs.manifest import ModelSpec
from jrs.train.config import HardwareConfig, LossConfig, OptimizerConfig, TrainConfig
from jrs.train.configfile import differences, load_config, write_config

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


# Over one another -------------------------------------------------------------------------------------------


def test_a_configuration_extends_one_that_ships(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    changed = '[loss]\nmasked = false\n[model.architecture]\nmerge = "concatenate"\n'
    path.write_text(f'extends = "paper"\nepochs = 7\n{changed}')
    paper, mine = load_config("paper"), load_config(str(path))
    architecture = dataclasses.replace(paper.model.architecture, merge="concatenate")
    assert mine == dataclasses.replace(
        paper,
        epochs=7,
        loss=dataclasses.replace(paper.loss, masked=False),
        model=dataclasses.replace(paper.model, architecture=architecture),
    )
    assert set(differences(paper, mine)) == {"epochs", "model.architecture.merge", "loss.masked"}


def test_extending_a_file_beside_it_and_so_on(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "a.toml").write_text("epochs = 5\nseed = 1\n[optimizer]\nlearning_rate = 0.1\nclip_norm = 2.0\n")
    (tmp_path / "b.toml").write_text('extends = "a.toml"\nseed = 2\n[optimizer]\nclip_norm = 3.0\n')
    (tmp_path / "deep" / "c.toml").write_text('extends = "../b.toml"\nepochs = 6\n')
    config = load_config(str(tmp_path / "deep" / "c.toml"))
    assert (config.epochs, config.seed) == (6, 2)
    assert (config.optimizer.learning_rate, config.optimizer.clip_norm) == (0.1, 3.0)


def test_what_cannot_be_extended(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text('extends = "b.toml"\n')
    (tmp_path / "b.toml").write_text('extends = "a.toml"\n')
    with pytest.raises(ConfigurationError, match="extends itself"):
        load_config(str(tmp_path / "a.toml"))
    (tmp_path / "c.toml").write_text('extends = "none"\n')
    with pytest.raises(MissingInputError, match=r"c\.toml: extends 'none', .*default"):
        load_config(str(tmp_path / "c.toml"))
    (tmp_path / "d.toml").write_text('extends = ["default"]\n')
    with pytest.raises(ConfigurationError, match=r"d\.toml: extends must be"):
        load_config(str(tmp_path / "d.toml"))


@pytest.mark.parametrize(
    ("setting", "field", "value"),
    [
        ("loss.similarity=0.5", "loss.similarity", 0.5),
        ("loss.similarity=2", "loss.similarity", 2.0),
        ("seed = 9", "seed", 9),
        ("loss.masked=false", "loss.masked", False),
        ("model.architecture.head=potential", "model.architecture.head", "potential"),
        ('model.architecture.head="potential"', "model.architecture.head", "potential"),
        ("model.grid.shape=[32, 48, 32]", "model.grid.shape", (32, 48, 32)),
        ("optimizer.schedule=one-cycle", "optimizer.schedule", "one-cycle"),
    ],
)
def test_any_field_by_its_name(setting: str, field: str, value: Any) -> None:
    found: Any = load_config("default", settings=[setting])
    for name in field.split("."):
        found = getattr(found, name)
    assert found == value and type(found) is type(value)
    assert set(differences(load_config("default"), load_config("default", settings=[setting]))) <= {field}


def test_settings_come_last() -> None:
    assert load_config("default", {"epochs": 3, "optimizer.ema_decay": 0.5}, settings=["epochs=4"]).epochs == 4
    assert load_config("default", {"optimizer.ema_decay": 0.5}).optimizer.ema_decay == 0.5


@pytest.mark.parametrize(
    ("setting", "error", "words"),
    [
        ("loss.x=1", ConfigurationError, ("--set loss.x=1", "'x'", "similarity")),
        ("los.similarity=1", ConfigurationError, ("'los'", "loss")),
        ("seed.x=1", ConfigurationError, ("'x'",)),
        ("seed=1.5", ConfigurationError, ("--set seed=1.5", "must be int", "float")),
        ("seed=abc", ConfigurationError, ("must be int", "str")),
        ("optimizer=1", ConfigurationError, ("section", "learning_rate")),
        ("optimizer.schedule=step", ConfigurationError, ("'step'", "one-cycle")),
        ("model.grid.shape=[32, 32]", ConfigurationError, ("3 entries",)),
        ("seed", UsageError, ("field=value",)),
        ("=1", UsageError, ("field=value",)),
        ("epochs=0", ConfigurationError, ("epochs",)),
    ],
)
def test_a_setting_that_means_nothing(setting: str, error: type[JrsError], words: tuple[str, ...]) -> None:
    with pytest.raises(error) as caught:
        load_config("default", settings=[setting])
    assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", sorted(p.stem for p in (ROOT / "jrs" / "data" / "configs").glob("*.toml")))
def test_a_stored_configuration_is_the_same_again(tmp_path: Path, name: str) -> None:
    config = load_config(name, settings=["loss.gradient_l1=1e-12", "loss.similarity=0.1"])
    write_config(tmp_path / "config.toml", config)
    assert load_config(str(tmp_path / "config.toml")) == config


@pytest.mark.parametrize(
    "change",
    [
        {"learning_rate": 0.0},
        {"ema_decay": 1.0},
        {"ema_decay": -0.1},
        {"clip_norm": -1.0},
        {"stop_epochs": 0},
    ],
)
def test_an_optimiser_that_cannot_be(change: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(change))):
        OptimizerConfig(**change)


@pytest.mark.parametrize("change", [{"devices": -2}, {"nodes": -1}, {"workers": 0}, {"prefetch": 0}])
def test_hardware_that_cannot_be(change: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(change))):
        HardwareConfig(**change)
