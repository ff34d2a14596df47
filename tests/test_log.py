"""The log of a run."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_training import (
    rows,
    series,
)

from jrs.train.log import RunLog

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
