"""Training: synthesis and pairs, the loop and its checkpoints, configurations."""

from __future__ import annotations

import csv
import dataclasses
import errno
import itertools
import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from jrs.architecture import Architecture
from jrs.errors import (
    CannotCreateError,
    ConfigurationError,
    JrsError,
    MissingInputError,
    OutputError,
)
from jrs.manifest import GridSpec, ModelSpec
from jrs.models.checkpoint import Checkpoint, load_checkpoint
from jrs.models.network import JointNet
from jrs.models.spatial import identity_coords
from jrs.train.batch import PairBatch, pair_indices
from jrs.train.config import LossConfig, OptimizerConfig, SynthesisConfig, TrainConfig
from jrs.train.labelmaps import LabelMaps
from jrs.train.log import RunLog
from jrs.train.loop import BEST, LAST, Trainer
from jrs.train.objective import joint_loss, structure_overlap
from jrs.train.run import TrainRequest, load_config, split_indices, train_run
from jrs.train.synth import SyntheticPairs

Array = np.ndarray[Any, Any]

ROOT = Path(__file__).parents[1]
SHAPE = (16, 16, 32)
SPACING = (8.0, 8.0, 4.0)
# Indices of tissues in a label map.
WHITE, CORTEX, CSF = 1, 2, 4


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def brain(shift: int = 0, shape: tuple[int, int, int] = SHAPE) -> tuple[Tensor, Tensor]:
    """Structures and tissues (X,Y,Z) of nested boxes: cortex around white matter around a ventricle."""
    structures, tissues = (torch.zeros(shape, dtype=torch.uint8) for _ in range(2))
    for inset, structure, tissue in ((2, 2, CORTEX), (4, 1, WHITE), (7, 3, CSF)):
        box = tuple(slice(inset + (shift if axis == 2 else 0), n - inset) for axis, n in enumerate(shape))
        structures[box], tissues[box] = structure, tissue
    return structures, tissues


def label_maps(count: int = 3, shape: tuple[int, int, int] = SHAPE) -> LabelMaps:
    made = [brain(k, shape) for k in range(count)]
    structures, tissues = (torch.stack(column) for column in zip(*made, strict=True))
    return LabelMaps(tuple(f"map{k}" for k in range(count)), structures, tissues)


def model_spec(
    channels: tuple[str, ...] = ("t1", "flair"), optional: Any = None, shape: Any = SHAPE, **choices: Any
) -> ModelSpec:
    architecture = Architecture(
        **{
            "in_channels": len(channels),
            "base_channels": 2,
            "head": "displacement",
            "norm": "instance",
            **choices,
        }
    )
    labels = ModelSpec().labels if architecture.segmentation else ()
    return ModelSpec(
        architecture,
        channels,
        channels if optional is None else optional,
        GridSpec(shape, SPACING),
        labels=labels,
        label_values=(0, 1, 2, 4) if labels else (),
    )


STILL = SynthesisConfig(deformation_mm=0.0, rotation_deg=0.0, scale=0.0, shift_mm=0.0)


def source(
    maps: LabelMaps | None = None, seed: int = 5, spec: ModelSpec | None = None, **synthesis: Any
) -> SyntheticPairs:
    config = dataclasses.replace(SynthesisConfig(), **synthesis)
    return SyntheticPairs(maps or label_maps(), spec or model_spec(), config, seed)


def same(a: Any, b: Any) -> bool:
    """Whether all tensors of two dataclasses are equal."""
    pairs = [(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(a)]
    return all(x is y is None or torch.equal(x, y) for x, y in pairs)


# Synthesis --------------------------------------------------------------------------------------------------


def test_an_image_is_a_function_of_seed_and_number() -> None:
    first = source()
    drawn = [first.draw(1, number, fixed=False) for number in range(3)]
    # Another object, another order, other images in between.
    second = source()
    second.draw(0, 17, fixed=True)
    for number in (2, 0, 1):
        assert same(second.draw(1, number, fixed=False), drawn[number])
    assert not same(drawn[0], drawn[1])


def test_another_seed_draws_other_images() -> None:
    assert not same(source(seed=6).draw(1, 0, fixed=False), source(seed=5).draw(1, 0, fixed=False))


def test_torchs_own_generator_plays_no_part() -> None:
    torch.manual_seed(1)
    first = source().draw(0, 0, fixed=False)
    state = torch.get_rng_state()
    torch.manual_seed(2)
    assert same(source().draw(0, 0, fixed=False), first)
    torch.manual_seed(1)
    source().draw(0, 0, fixed=False)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_batch_is_its_pairs() -> None:
    pairs = source()
    whole, parts = pairs.batch(1, 2), [pairs.batch(k, 1) for k in (2, 3)]
    for field in dataclasses.fields(PairBatch):
        assert torch.equal(
            getattr(whole, field.name), torch.cat([getattr(part, field.name) for part in parts])
        )
    assert same(source().batch(1, 2), whole)
    assert not same(pairs.batch(2, 2), whole)


def test_the_two_images_of_a_pair_are_drawn_apart() -> None:
    batch = source(
        maps=LabelMaps(("a", "b"), *(t.repeat(2, 1, 1, 1) for t in (x[None] for x in brain())))
    ).batch(0, 1)
    assert not torch.equal(batch.moving, batch.fixed)


@pytest.mark.parametrize("number", range(3))
def test_shapes_types_and_normalisation(number: int) -> None:
    drawn = source(drop_channel=0.4).draw(2, number, fixed=False)
    assert drawn.image.shape == (1, 2, *SHAPE) and drawn.image.dtype == torch.float32
    assert drawn.tumor.shape == (1, *SHAPE) and drawn.tumor.dtype == torch.int64
    assert drawn.structures.shape == (1, *SHAPE) and drawn.structures.dtype == torch.uint8
    assert drawn.present.shape == (1, 2) and set(drawn.present.ravel().tolist()) <= {0.0, 1.0}
    inside = drawn.structures[0].numpy() > 0  # every voxel of these brains belongs to a structure
    for channel in range(2):
        values = drawn.image[0, channel].numpy().astype(np.float64)
        assert (values[~inside] == 0.0).all()
        if drawn.present[0, channel]:
            assert abs(values[inside].mean()) < 1e-3 and values[inside].std() == pytest.approx(1.0, abs=1e-3)
        else:
            assert not values.any()


def test_without_any_deformation_the_map_is_what_is_drawn() -> None:
    drawn = SyntheticPairs(label_maps(), model_spec(), STILL, 0).draw(1, 0, fixed=False)
    assert torch.equal(drawn.structures[0], brain(1)[0])


def test_a_shift_moves_the_map_by_voxels() -> None:
    config = dataclasses.replace(STILL, shift_mm=20.0)
    original, found = brain()[0].numpy(), set()
    for number in range(6):
        drawn = SyntheticPairs(label_maps(), model_spec(), config, 0).draw(0, number, fixed=False)
        reach = [math.ceil(20.0 / s) for s in SPACING]
        shifts = [
            shift
            for shift in itertools.product(*(range(-r, r + 1) for r in reach))
            if np.array_equal(
                drawn.structures[0].numpy(),
                original[
                    np.ix_(*(np.clip(np.arange(n) + s, 0, n - 1) for n, s in zip(SHAPE, shift, strict=True)))
                ],
            )
        ]
        assert len(shifts) >= 1
        found.add(shifts[0])
    assert len(found) > 1


def test_deformations_keep_to_their_size() -> None:
    """Structures of half the brain's size move by some mm, not by their own size."""
    wide, narrow = [], []
    for number in range(8):
        for deformation, kept in ((24.0, wide), (2.0, narrow)):
            config = dataclasses.replace(STILL, deformation_mm=deformation)
            drawn = SyntheticPairs(label_maps(), model_spec(), config, 1).draw(0, number, fixed=False)
            kept.append(float((drawn.structures[0] != brain()[0]).float().mean()))
    assert np.mean(narrow) < 0.1 and np.mean(wide) > 0.1


# Tumours ----------------------------------------------------------------------------------------------------


def test_tumours_are_classes_of_the_segmentation_inside_the_brain() -> None:
    pairs, seen = source(moving_tumor=1.0), set()
    for number in range(12):
        drawn = pairs.draw(0, number, fixed=False)
        tumor = drawn.tumor[0]
        seen |= set(tumor.unique().tolist())
        assert set(tumor.unique().tolist()) <= {0, 1, 2, 3}
        assert bool((tumor > 0).any())
        assert not bool(((tumor > 0) & (drawn.structures[0] == 0)).any())
    assert seen == {0, 1, 2, 3}


def test_shares_of_images_with_a_tumour() -> None:
    for moving, fixed in ((1.0, 0.0), (0.0, 1.0)):
        pairs = source(moving_tumor=moving, fixed_tumor=fixed)
        for number in range(4):
            assert bool((pairs.draw(0, number, fixed=False).tumor > 0).any()) is (moving > 0)
            assert bool((pairs.draw(0, number, fixed=True).tumor > 0).any()) is (fixed > 0)
    pairs = source(moving_tumor=0.5)
    count = sum(bool((pairs.draw(0, number, fixed=False).tumor > 0).any()) for number in range(60))
    assert 15 < count < 45


@pytest.mark.parametrize("tissue", [CSF, CORTEX])
def test_no_white_matter_no_tumour(tissue: int) -> None:
    structures, tissues = brain()
    tissues = torch.where(tissues > 0, tissue, 0).to(torch.uint8)
    maps = LabelMaps(("a", "b"), torch.stack([structures] * 2), torch.stack([tissues] * 2))
    pairs = source(maps, moving_tumor=1.0)
    assert not any(bool((pairs.draw(0, number, fixed=False).tumor > 0).any()) for number in range(6))


def test_there_is_no_oedema_in_csf() -> None:
    """White matter at one end of a head of CSF: a core may press into it, oedema may not follow."""
    tissues = torch.full(SHAPE, CSF, dtype=torch.uint8)
    tissues[:, :, :6] = WHITE
    maps = LabelMaps(("a", "b"), torch.stack([tissues] * 2), torch.stack([tissues] * 2))
    pairs = SyntheticPairs(maps, model_spec(), dataclasses.replace(STILL, moving_tumor=1.0), 3)
    drawn = [pairs.draw(0, number, fixed=False).tumor[0] for number in range(12)]
    assert any(bool((tumor[:, :, :6] == 2).any()) for tumor in drawn)
    assert any(bool((tumor[:, :, 6:] > 0).any()) for tumor in drawn)
    assert not any(bool((tumor[:, :, 6:] == 2).any()) for tumor in drawn)


def test_a_tumour_changes_the_image_where_it_lies() -> None:
    texture = {"noise": 0.0, "bias": 0.0, "texture": 0.0, "jitter": 0.0, "gamma": 0.0, "drop_channel": 0.0}
    spec = model_spec(("t1", "t1ce", "t2", "flair"))
    pairs = source(spec=spec, moving_tumor=1.0, single_modality_moving=0.0, **texture)
    drawn = pairs.draw(0, 1, fixed=False)
    image, tumor = drawn.image[0].numpy(), drawn.tumor[0].numpy()
    white = (drawn.structures[0].numpy() == 1) & (tumor == 0)
    assert (tumor == 2).sum() > 50 and white.sum() > 50
    # Oedema is dark in T1, bright in T2 and FLAIR, beside white matter.
    dark, bright = (image[0] + image[1]) / 2, (image[2] + image[3]) / 2
    assert dark[tumor == 2].mean() < dark[white].mean() - 0.2
    assert bright[tumor == 2].mean() > bright[white].mean() + 0.2


# Missing modalities -----------------------------------------------------------------------------------------


def test_the_first_channel_alone() -> None:
    pairs = source(single_modality_moving=1.0, single_modality_fixed=0.0, drop_channel=0.0)
    for number in range(4):
        assert pairs.draw(0, number, fixed=False).present.tolist() == [[1.0, 0.0]]
        assert pairs.draw(0, number, fixed=True).present.tolist() == [[1.0, 1.0]]


def test_dropping_all_leaves_one() -> None:
    pairs = source(single_modality_moving=0.0, drop_channel=1.0)
    seen = {tuple(pairs.draw(0, number, fixed=False).present[0].tolist()) for number in range(20)}
    assert seen == {(1.0, 0.0), (0.0, 1.0)}


def test_a_channel_that_is_needed_is_never_dropped() -> None:
    pairs = source(spec=model_spec(optional=("flair",)), single_modality_moving=0.0, drop_channel=0.5)
    seen = {tuple(pairs.draw(0, number, fixed=False).present[0].tolist()) for number in range(20)}
    assert seen == {(1.0, 0.0), (1.0, 1.0)}


# Pairs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("images", [2, 3, 7])
@pytest.mark.parametrize("seed", [0, 11])
def test_pairs_of_a_round(images: int, seed: int) -> None:
    rounds = []
    for number in range(4):
        pairs = pair_indices(number, images, images, seed)
        assert sorted(moving for moving, _ in pairs) == list(range(images))
        assert sorted(fixed for _, fixed in pairs) == list(range(images))
        assert all(moving != fixed for moving, fixed in pairs)
        rounds.append(pairs)
    if images > 3:
        assert len({tuple(pairs) for pairs in rounds}) == 4


@pytest.mark.parametrize("size", [1, 2, 5])
def test_batches_are_slices_of_one_sequence(size: int) -> None:
    whole = pair_indices(0, 30, 4, 3)
    parts = [pair for index in range(30 // size) for pair in pair_indices(index, size, 4, 3)]
    assert parts == whole
    assert pair_indices(0, 30, 4, 4) != whole


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


# The objective ----------------------------------------------------------------------------------------------


def train_config(spec: ModelSpec | None = None, **changes: Any) -> TrainConfig:
    values: dict[str, Any] = {
        "model": spec or model_spec(),
        "loss": LossConfig(structure_dice=1.0, tumor_dice=0.5, diffusion=0.1, gradient_l1=0.0),
        "epochs": 4,
        "steps_per_epoch": 3,
        "batch_size": 1,
        "precision": "fp32",
        "validation_pairs": 2,
        "log_every": 1,
        "checkpoint_minutes": 0.0,
    }
    return TrainConfig(**values | changes)


def test_the_joint_loss_is_the_weighted_sum_of_its_terms() -> None:
    torch.manual_seed(0)
    net, batch = JointNet(model_spec().architecture), source().batch(0, 2)
    present = {
        "moving_present": torch.tensor([[1.0, 1], [1, 0]]),
        "fixed_present": torch.tensor([[0.0, 1], [1, 1]]),
    }
    batch = dataclasses.replace(batch, **present)
    config = LossConfig(
        similarity=0.7,
        gradient_l1=1e-4,
        segmentation=0.3,
        tumor_dice=0.5,
        structure_dice=1.5,
        diffusion=0.2,
        folding=2.0,
        class_weights=(1.0, 2.0, 3.0, 4.0),
    )
    output = net(batch.moving, batch.fixed)
    total, terms = joint_loss(net, output, batch, config, torch.Generator().manual_seed(0))
    names = {
        "similarity",
        "gradient_l1",
        "segmentation",
        "tumor_dice",
        "structure_dice",
        "diffusion",
        "folding",
    }
    assert set(terms) == names
    assert not any(term.requires_grad for term in terms.values())
    expected = sum(getattr(config, name) * float(term) for name, term in terms.items())
    assert float(total.detach()) == pytest.approx(expected, rel=1e-5)
    # CE(S) + CE(R), and the masked residual over the channels both images have.
    entropy = 0.0
    for logits, labels in (
        (output.moving_logits, batch.moving_tumor),
        (output.fixed_logits, batch.fixed_tumor),
    ):
        x, t = logits.detach().double().numpy(), labels.numpy()
        logs = np.take_along_axis(x - np.log(np.exp(x).sum(axis=1, keepdims=True)), t[:, None], axis=1)[:, 0]
        weights = np.array(config.class_weights)[t]
        entropy -= (weights * logs).sum() / weights.sum()
    assert float(terms["segmentation"]) == pytest.approx(entropy, rel=1e-4)
    residual = (output.nontumor_mask * (output.moved - batch.fixed)).detach().double().numpy()
    both = (batch.moving_present * batch.fixed_present).numpy().astype(bool)
    assert both.tolist() == [[False, True], [True, False]]
    assert float(terms["similarity"]) == pytest.approx(
        (residual**2).mean(axis=(2, 3, 4))[both].mean(), rel=1e-4
    )


def test_without_a_mask_the_whole_residual_counts() -> None:
    torch.manual_seed(0)
    net, batch = (
        JointNet(model_spec().architecture),
        source(drop_channel=0.0, single_modality_moving=0.0).batch(0, 1),
    )
    output = net(batch.moving, batch.fixed)
    config = LossConfig(masked=False)
    _, terms = joint_loss(net, output, batch, config, torch.Generator())
    residual = (output.moved - batch.fixed).detach().double().numpy() ** 2
    both = (batch.moving_present * batch.fixed_present).numpy().astype(bool)
    assert float(terms["similarity"]) == pytest.approx(residual.mean(axis=(2, 3, 4))[both].mean(), rel=1e-4)


@pytest.mark.parametrize("shift", [0, 2])
def test_overlap_of_structures(shift: int) -> None:
    batch = source().batch(0, 2)
    assert batch.moving_structures is not None and batch.fixed_structures is not None
    coords = identity_coords(batch.moving[:, :1].expand(-1, 3, -1, -1, -1)).clone()
    coords[:, 2] += shift
    got = structure_overlap(coords, batch).numpy()
    for n in range(2):
        moving, fixed = batch.moving_structures[n].numpy(), batch.fixed_structures[n].numpy()
        moved = moving[:, :, np.clip(np.arange(SHAPE[2]) + shift, 0, SHAPE[2] - 1)]
        common = sorted((set(moved.ravel()) & set(fixed.ravel())) - {0})
        dice = [
            2 * ((moved == k) & (fixed == k)).sum() / ((moved == k).sum() + (fixed == k).sum())
            for k in common
        ]
        assert len(common) >= 2
        assert got[n] == pytest.approx(np.mean(dice), abs=1e-5)


# The loop ---------------------------------------------------------------------------------------------------


class Stopped(Exception):  # noqa: N818
    """What ends a run in the middle."""


class Stopping:
    """A source that fails when batch ``at`` is asked for."""

    def __init__(self, inner: SyntheticPairs, at: int, error: type[BaseException] = Stopped) -> None:
        self.inner, self.at, self.error = inner, at, error

    def __len__(self) -> int:
        return len(self.inner)

    def batch(self, index: int, size: int) -> PairBatch:
        if index >= self.at:
            raise self.error
        return self.inner.batch(index, size)


def trainer(
    folder: Path, config: TrainConfig, stop_at: int | None = None, error: type[BaseException] = Stopped
) -> Trainer:
    maps = label_maps(shape=config.model.grid.shape)
    pairs: Any = SyntheticPairs(maps, config.model, config.synthesis, config.seed)
    if stop_at is not None:
        pairs = Stopping(pairs, stop_at, error)
    return Trainer(config, pairs, SyntheticPairs(maps, config.model, config.synthesis, 99), folder)


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def series(folder: Path, split: str, name: str) -> list[float]:
    return [float(row["value"]) for row in rows(folder) if (row["split"], row["name"]) == (split, name)]


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
    assert {"config.json", "metrics.csv", LAST, BEST, "tensorboard"} == {p.name for p in folder.iterdir()}
    stored = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert stored["epochs"] == 2 and stored["model"]["architecture"]["head"] == "displacement"
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


ONE_CYCLE = OptimizerConfig(schedule="one-cycle", learning_rate=5e-3, clip_norm=1.0)
exact = pytest.mark.skipif(torch.cuda.is_available(), reason="bit for bit on the CPU only")


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


def test_a_log_keeps_what_was_done(tmp_path: Path) -> None:
    log = RunLog(tmp_path, 0)
    for step in (1, 2, 3):
        log.write(step, 0, "train", {"loss": step / 3, "other": 1.0})
    log.close()
    log = RunLog(tmp_path, 2)
    log.write(3, 0, "train", {"loss": 9.0})
    log.close()
    assert series(tmp_path, "train", "loss") == [pytest.approx(1 / 3), pytest.approx(2 / 3), 9.0]
    assert [row["step"] for row in rows(tmp_path) if row["name"] == "other"] == ["1", "2"]
    RunLog(tmp_path, 0).close()
    assert rows(tmp_path) == []


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


def test_a_run_that_cannot_be_resumed_or_started(tmp_path: Path) -> None:
    with pytest.raises(MissingInputError, match=r"holds no last\.safetensors to resume"):
        train_run(TrainRequest(out=tmp_path, synthetic=tmp_path, resume=True))
    (tmp_path / LAST).write_bytes(b"")
    with pytest.raises(CannotCreateError, match="holds a run already"):
        train_run(TrainRequest(out=tmp_path, synthetic=tmp_path))
    with pytest.raises(MissingInputError, match="no such checkpoint"):
        trainer(tmp_path / "none", train_config()).resume()


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
    assert maps.names == ("map0",) and maps.tissues.shape == (1, *SHAPE)
    config = train_config()
    alone = SyntheticPairs(maps, config.model, config.synthesis, 0)
    with pytest.raises(ConfigurationError, match="at least 2"):
        Trainer(config, alone, alone, tmp_path)


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


# Checkpoints ------------------------------------------------------------------------------------------------


def small_checkpoint(**changes: Any) -> Checkpoint:
    torch.manual_seed(7)
    spec = model_spec()
    values = {"spec": spec, "weights": JointNet(spec.architecture).state_dict(), "training": {"a": [1, None]}}
    return Checkpoint(**values | changes)


def test_a_checkpoint_comes_back_as_it_was(tmp_path: Path) -> None:
    checkpoint = small_checkpoint(optimizer={"0.exp_avg": torch.randn(2, 3), "0.step": torch.tensor(4.0)})
    checkpoint.save(tmp_path / "new" / "net.safetensors")
    loaded = load_checkpoint(tmp_path / "new" / "net.safetensors")
    assert loaded.spec == checkpoint.spec and loaded.training == {"a": [1, None]}
    for name in ("weights", "optimizer"):
        expected, got = getattr(checkpoint, name), getattr(loaded, name)
        assert expected.keys() == got.keys()
        assert all(torch.equal(expected[k], got[k]) and expected[k].dtype == got[k].dtype for k in expected)
    assert not loaded.network().training


def test_a_write_that_fails_leaves_the_old_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / LAST
    small_checkpoint().save(path)
    content = path.read_bytes()

    def broken(error: BaseException) -> Callable[..., None]:
        def save(tensors: Any, file: Path, metadata: Any) -> None:
            Path(file).write_bytes(content[:100])
            raise error

        return save

    for error, expected in (
        (KeyboardInterrupt(), KeyboardInterrupt),
        (OSError(errno.ENOSPC, "No space left on device"), OutputError),
    ):
        monkeypatch.setattr("safetensors.torch.save_file", broken(error))
        with pytest.raises(expected):
            small_checkpoint(training={"b": 2}).save(path)
        assert path.read_bytes() == content
        assert [p.name for p in tmp_path.iterdir()] == [LAST]


def test_a_process_killed_while_writing_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / LAST
    path.write_text("old")
    code = f"""
import os
from pathlib import Path
from jrs.files import whole_file
with whole_file(Path({str(path)!r})) as temporary:
    temporary.write_text("half of the n")
    os.kill(os.getpid(), 9)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60)
    assert done.returncode == -9
    assert path.read_text() == "old"


def write_header(path: Path, metadata: dict[str, str] | None) -> None:
    from safetensors.torch import save_file

    save_file({"model.x": torch.zeros(2)}, path, metadata=metadata)


def good_header(**changes: Any) -> str:
    from jrs.schema import encode

    return json.dumps({"format_version": 1, "spec": encode(model_spec()), "training": {}} | changes)


def cut_in_half(path: Path) -> None:
    small_checkpoint().save(path)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


GARBAGE: dict[str, Callable[[Path], Any]] = {
    "text": lambda path: path.write_text("not a checkpoint\n" * 20),
    "empty": lambda path: path.write_bytes(b""),
    "pickle": lambda path: torch.save({"a": torch.zeros(2)}, path),
    "cut in half": cut_in_half,
    "safetensors of another program": lambda path: write_header(path, None),
    "header that is no JSON": lambda path: write_header(path, {"jrs": "{"}),
    "newer format": lambda path: write_header(path, {"jrs": good_header(format_version=2)}),
    "unknown field": lambda path: write_header(path, {"jrs": good_header(spec={"colour": 1})}),
    "wrong type": lambda path: write_header(path, {"jrs": good_header(spec={"channels": "t1"})}),
    "spec that is no object": lambda path: write_header(path, {"jrs": good_header(spec=[])}),
    "header without a spec": lambda path: write_header(path, {"jrs": json.dumps({"format_version": 1})}),
    "header that is a list": lambda path: write_header(path, {"jrs": "[]"}),
}


@pytest.mark.parametrize("kind", list(GARBAGE))
def test_what_is_no_checkpoint(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "net.safetensors"
    GARBAGE[kind](path)
    with pytest.raises(ConfigurationError) as caught:
        load_checkpoint(path)
    message = str(caught.value)
    assert message.startswith(str(path)) and "\n" not in message


def test_weights_that_do_not_fit(tmp_path: Path) -> None:
    other = JointNet(Architecture(2, 4, 4, head="displacement", norm="instance")).state_dict()
    small_checkpoint(weights=other).save(tmp_path / "net.safetensors")
    with pytest.raises(ConfigurationError, match=r"^[^\n]*do not fit[^\n]*$"):
        load_checkpoint(tmp_path / "net.safetensors").network()


def test_no_checkpoint_at_all(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none.safetensors"):
        with pytest.raises(MissingInputError, match=rf"^{path}: [^\n]+$"):
            load_checkpoint(path)


# Configurations ---------------------------------------------------------------------------------------------


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
