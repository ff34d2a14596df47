"""A training run from its request."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from small_training import (
    train_config,
    trainer,
)

from jrs.errors import (
    CannotCreateError,
    ConfigurationError,
    MissingInputError,
)
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
