"""The shipped configurations: the paper's recipe value by value, and its twelve ablations."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from jrs.models.network import JointNet
from jrs.resources import DATA
from jrs.train.config import TrainConfig
from jrs.train.run import load_config

# Name, channels, classes, masked, merge, parameters of encoder, segmentation and registration decoder. The counts of
# four channels with subtraction are the published ones; others by hand: an input channel less is 8 weights less in
# the first convolution, and concatenation gives the registration decoder's skips and its first step up twice as many
# channels, that is 27 * (8*8 + 16*16 + 32*32 + 64*64) + 8 * 128 * 64 weights more.
MORE = 27 * (8 * 8 + 16 * 16 + 32 * 32 + 64 * 64) + 8 * 128 * 64
ENCODER, SEGMENTATION, REGISTRATION = 1_845_408, 664_676, 664_667
ABLATIONS: list[tuple[str, int, int, bool, str, int, int, int]] = [
    ("4mod-registration-concatenate", 4, 0, False, "concatenate", ENCODER, 0, REGISTRATION + MORE),
    ("4mod-registration-subtract", 4, 0, False, "subtract", ENCODER, 0, REGISTRATION),
    ("4mod-joint-concatenate", 4, 4, False, "concatenate", ENCODER, SEGMENTATION, REGISTRATION + MORE),
    ("4mod-joint-subtract", 4, 4, False, "subtract", ENCODER, SEGMENTATION, REGISTRATION),
    ("4mod-joint-masked-concatenate", 4, 4, True, "concatenate", ENCODER, SEGMENTATION, REGISTRATION + MORE),
    ("4mod-joint-masked-subtract", 4, 4, True, "subtract", ENCODER, SEGMENTATION, REGISTRATION),
    ("t1-registration-concatenate", 1, 0, False, "concatenate", ENCODER - 24, 0, REGISTRATION + MORE),
    ("t1-registration-subtract", 1, 0, False, "subtract", ENCODER - 24, 0, REGISTRATION),
    ("t1-joint-concatenate", 1, 4, False, "concatenate", ENCODER - 24, SEGMENTATION, REGISTRATION + MORE),
    ("t1-joint-subtract", 1, 4, False, "subtract", ENCODER - 24, SEGMENTATION, REGISTRATION),
    ("t1-joint-masked-concatenate", 1, 4, True, "concatenate", ENCODER - 24, SEGMENTATION, REGISTRATION + MORE),
    ("t1-joint-masked-subtract", 1, 4, True, "subtract", ENCODER - 24, SEGMENTATION, REGISTRATION),
]


def check_the_recipe(config: TrainConfig) -> None:
    """What the paper states, and nothing beyond it switched on."""
    architecture, optimizer, loss = config.model.architecture, config.optimizer, config.loss
    assert (config.epochs, config.steps_per_epoch, config.batch_size, config.precision) == (200, 0, 2, "fp32")
    assert config.model.grid.shape == (144, 208, 144) and config.model.grid.spacing == (1.0, 1.0, 1.0)
    assert config.model.optional_channels == () and config.model.normalization == "zscore-volume"
    assert (architecture.base_channels, architecture.head, architecture.norm) == (8, "gradient", "none")
    assert (architecture.registration, architecture.mask, architecture.grid_origin) == (True, "warped", 0)
    assert architecture.deep_supervision == 0
    assert (loss.similarity, loss.similarity_measure, loss.gradient_l1) == (1.0, "mse", 1e-10)
    beyond = ("tumor_dice", "structure_dice", "diffusion", "bending", "folding", "tumor_rigidity", "symmetric")
    for name in (*beyond, "inverse_consistency"):
        assert getattr(loss, name) == 0.0, name
    assert (optimizer.learning_rate, optimizer.schedule, optimizer.clip_norm) == (2e-3, "plateau", 0.0)
    assert optimizer.plateau_factor == pytest.approx(1 / 5)
    assert (optimizer.plateau_epochs, optimizer.stop_epochs) == (30, 50)
    assert not config.augment.active


@pytest.mark.parametrize("row", ABLATIONS, ids=[row[0] for row in ABLATIONS])
def test_the_twelve_ablations(row: tuple[Any, ...]) -> None:
    name, channels, classes, masked, merge, *parameters = row
    config = load_config(f"paper-{name}")
    check_the_recipe(config)
    assert config.model.channels == (("t1", "t1ce", "t2", "flair") if channels == 4 else ("t1",))
    architecture, loss = config.model.architecture, config.loss
    assert (architecture.in_channels, architecture.num_labels, architecture.merge) == (channels, classes, merge)
    assert (loss.masked, loss.segmentation) == (masked, 1.0 if classes else 0.0)
    if classes:
        assert loss.class_weights == (1.0, 1.0, 1.0, 1.0) and config.model.label_values == (0, 1, 2, 4)
    net = JointNet(architecture)
    parts = (net.encoder, net.segmentation, net.registration)
    assert [sum(p.numel() for p in part.parameters()) if part else 0 for part in parts] == parameters


def test_the_papers_own_are_two_of_them() -> None:
    assert load_config("paper") == load_config("paper-4mod-joint-masked-subtract")
    assert load_config("paper-t1") == load_config("paper-t1-joint-masked-subtract")
    net = JointNet(load_config("paper").model.architecture)
    assert sum(p.numel() for p in net.parameters()) == 3_174_751


def test_no_two_ablations_are_the_same() -> None:
    configs = [load_config(f"paper-{row[0]}") for row in ABLATIONS]
    assert all(a != b for n, a in enumerate(configs) for b in configs[:n])


def test_every_shipped_configuration_is_read() -> None:
    names = {path.stem for path in (DATA / "configs").glob("*.toml")}
    ablations = {f"paper-{row[0]}" for row in ABLATIONS}
    assert names >= ablations | {"paper", "paper-t1", "default", "default-3mm"}
    assert {name for name in names if name.startswith("paper")} == ablations | {"paper", "paper-t1"}
    for name in names:
        assert load_config(name).epochs >= 1


def test_a_part_of_a_recipe_is_replaced_and_the_rest_stays() -> None:
    joint, paper = load_config("paper-4mod-joint-concatenate"), load_config("paper")
    architecture = dataclasses.replace(paper.model.architecture, merge="concatenate")
    expected = dataclasses.replace(
        paper,
        model=dataclasses.replace(paper.model, architecture=architecture),
        loss=dataclasses.replace(paper.loss, masked=False),
    )
    assert joint == expected
