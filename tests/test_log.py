"""The log of a run."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small_training import (
    rows,
    series,
)

from jrs.train.log import METRICS, PICTURE, TIMINGS, RunLog

pytestmark = pytest.mark.usefixtures("one_thread")


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


def test_timings_are_kept_apart(tmp_path: Path) -> None:
    log = RunLog(tmp_path, 0)
    log.write(1, 0, "train", {"loss": 1.0})
    log.write_timings(1, 0, {"data_wait": 0.25})
    log.close()
    assert [row["name"] for row in rows(tmp_path)] == ["loss"]
    assert (tmp_path / TIMINGS).read_text().splitlines()[1:] == ["1,0,train,data_wait,0.25"]


def test_a_log_that_a_crash_damaged(tmp_path: Path) -> None:
    (tmp_path / METRICS).write_bytes(
        b"step,epoch,split,name,value\n1,0,train,loss,3\n2,0,train,loss,2\nx,,\n\0\0\0\0\n2,0,tra"
    )
    RunLog(tmp_path, 2).close()
    assert series(tmp_path, "train", "loss") == [3.0, 2.0] and len(rows(tmp_path)) == 2


def test_what_tensorboard_shows(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = RunLog(tmp_path, 0)
    picture = np.arange(6 * 5 * 3, dtype=np.uint8).reshape(6, 5, 3)
    for step in (1, 2):
        log.write(step, 0, "train", {"loss": 1.0 / step})
        log.write_timings(step, 0, {"data_wait": 0.5})
    log.write_picture(2, picture)
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"images": 0})
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(1, 1.0), (2, 0.5)]
    assert [e.value for e in events.Scalars("time/data_wait")] == [0.5, 0.5]
    image = Image.open(io.BytesIO(events.Images("validation/pair")[0].encoded_image_string))
    assert np.array_equal(np.asarray(image), picture)
    assert np.array_equal(np.asarray(Image.open(tmp_path / PICTURE)), picture)
