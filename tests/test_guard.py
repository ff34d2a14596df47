"""A loss that is not a number: the pair and the term are named, and nothing good is lost."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from small_training import label_maps, train_config

from jrs.errors import JrsError
from jrs.models.checkpoint import load_checkpoint
from jrs.train.batch import PairBatch
from jrs.train.config import TrainConfig
from jrs.train.guard import NAN
from jrs.train.loop import LAST, Trainer
from jrs.train.synth import SyntheticPairs

pytestmark = pytest.mark.usefixtures("one_thread")


class Poisoned(SyntheticPairs):
    """One voxel of the fixed image of one pair is NaN."""

    poisoned = -1

    def batch(self, index: int, size: int) -> PairBatch:
        batch = super().batch(index, size)
        for n in range(size):
            if index * size + n == self.poisoned:
                batch.fixed[n, :, 3, 4, 5] = float("nan")
                batch.fixed_present[n] = batch.moving_present[n] = 1.0
        return batch


def poisoned(folder: Path, config: TrainConfig, train: int = -1, validation: int = -1) -> tuple[Trainer, Any]:
    sources = [Poisoned(label_maps(), config.model, config.synthesis, seed) for seed in (1, 2)]
    sources[0].poisoned, sources[1].poisoned = train, validation
    return Trainer(config, sources[0], sources[1], folder), sources


@pytest.mark.parametrize(("batch_size", "accumulate"), [(1, 1), (4, 1), (4, 2)])
def test_the_pair_is_named(tmp_path: Path, batch_size: int, accumulate: int) -> None:
    config = train_config(batch_size=batch_size, accumulate=accumulate)
    pair = 2 * batch_size + batch_size // 2
    made, (train, _) = poisoned(tmp_path, config, train=pair)
    moving, fixed = train.names(pair, 1)[0]
    with pytest.raises(JrsError) as caught:
        made.run()
    message = str(caught.value)
    assert f"loss of step 3 is not a number; pair {pair} (moving {moving}, fixed {fixed})" in message
    assert "similarity" in message and NAN in message and "\n" not in message
    record = json.loads((tmp_path / NAN).read_text())
    assert (record["set"], record["step"], len(record["pairs"])) == ("training", 3, 1)
    entry = record["pairs"][0]
    assert (entry["pair"], entry["moving"], entry["fixed"]) == (pair, moving, fixed)
    assert "similarity" in entry["not_numbers"] and entry["values"]["similarity"] == "nan"


def test_the_last_checkpoint_is_good_and_goes_on_with_a_good_pair(tmp_path: Path) -> None:
    config = train_config()
    made, _ = poisoned(tmp_path, config, train=5)
    with pytest.raises(JrsError):
        made.run()
    checkpoint = load_checkpoint(tmp_path / LAST)
    assert checkpoint.training["progress"]["step"] == 5
    assert all(bool(torch.isfinite(value).all()) for value in checkpoint.weights.values())
    mended, _ = poisoned(tmp_path, config)
    mended.resume()
    assert mended.run().step == 12


def test_a_validation_pair_is_named_too(tmp_path: Path) -> None:
    made, (_, validation) = poisoned(tmp_path, train_config(), validation=1)
    moving, fixed = validation.names(1, 1)[0]
    with pytest.raises(JrsError, match=rf"validation loss of step 3 .* pair 1 \(moving {moving}, fixed {fixed}\)"):
        made.run()
    assert json.loads((tmp_path / NAN).read_text())["set"] == "validation"


def test_a_gradient_that_is_no_number_changes_no_weight(tmp_path: Path) -> None:
    """The loss is a number and its derivative is not: all pairs of the step are named."""
    config = dataclasses.replace(train_config(batch_size=2))
    made, _ = poisoned(tmp_path, config)
    weight = next(iter(made._module.parameters()))
    weight.register_hook(lambda gradient: gradient * float("inf"))
    before = weight.detach().clone()
    with pytest.raises(JrsError, match=r"gradient of step 1 is not a number; pair 0 \(.*\) and 1 more"):
        made.run()
    assert torch.equal(weight, before)
    assert [entry["pair"] for entry in json.loads((tmp_path / NAN).read_text())["pairs"]] == [0, 1]


def test_without_names_the_number_is_told(tmp_path: Path) -> None:
    class Nameless:
        def __init__(self, inner: SyntheticPairs) -> None:
            self.inner = inner

        def __len__(self) -> int:
            return len(self.inner)

        def batch(self, index: int, size: int) -> PairBatch:
            return self.inner.batch(index, size)

    config = train_config()
    inner = Poisoned(label_maps(), config.model, config.synthesis, 1)
    inner.poisoned = 1
    with pytest.raises(JrsError, match=r"step 2 .* pair 1 \(moving unnamed, fixed unnamed\)"):
        Trainer(config, Nameless(inner), Nameless(inner), tmp_path).run()
