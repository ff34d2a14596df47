"""The progress of a run where stderr is no terminal."""

from __future__ import annotations

import pytest

from jrs.train.progress import ProgressDisplay


def test_a_line_every_so_often(capsys: pytest.CaptureFixture[str]) -> None:
    now = 0.0
    with ProgressDisplay(every_s=60.0, clock=lambda: now) as display:
        for step in range(1, 11):
            now = 30.0 * step
            display.update(step, 10, {"loss": 1.0 / step, "learning_rate": 2e-3, "data_wait": 0.25})
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert captured.out == ""
    assert [line.split(":")[0] for line in lines] == [
        "step 1 of 10",
        "step 3 of 10, 4 min left",
        "step 5 of 10, 2 min left",
        "step 7 of 10, 2 min left",
        "step 9 of 10, 30 s left",
        "step 10 of 10, 0 s left",
    ]
    assert lines[1].endswith("loss 0.3333, rate 2.0e-03, data wait 25%")


def test_a_resumed_run_counts_its_own_steps(capsys: pytest.CaptureFixture[str]) -> None:
    now = 0.0
    with ProgressDisplay(every_s=1.0, clock=lambda: now) as display:
        for step in (500, 501):
            now += 10.0
            display.update(step, 600, {"loss": 1.0})
    assert capsys.readouterr().err.splitlines()[1].startswith("step 501 of 600, 16 min left")


def test_other_processes_are_silent(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressDisplay(shown=False) as display:
        display.update(10, 10, {"loss": 1.0})
    assert capsys.readouterr() == ("", "")
