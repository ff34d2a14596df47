"""How far a run is, on stderr: a bar with the time left on a terminal, elsewhere a plain line every so often."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

_SHOWN = {
    "loss": "loss {:.4f}",
    "learning_rate": "rate {:.1e}",
    "data_wait": "data wait {:.0%}",
    "val_loss": "validation {:.4f}",
    "val_dice_moved": "Dice {:.3f}",
    "val_dice_affine": "affine {:.3f}",
}


class ProgressDisplay:
    """Shows steps done, time left and the latest values; silent unless ``shown`` (all processes but the first)."""

    def __init__(self, shown: bool = True, every_s: float = 60.0, clock: Callable[[], float] = time.monotonic) -> None:
        from rich.console import Console

        self._console = Console(stderr=True)
        self._shown, self._every_s, self._clock = shown, every_s, clock
        self._bar: Any = None
        self._first: tuple[float, int] | None = None
        self._printed = -float("inf")

    def __enter__(self) -> ProgressDisplay:
        if self._shown and self._console.is_terminal:
            self._bar = _bar(self._console)
            self._bar.start()
            self._task = self._bar.add_task("training", total=None, values="")
        return self

    def __exit__(self, *error: Any) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, step: int, steps: int, values: dict[str, float]) -> None:
        """Show that ``step`` of ``steps`` are done; ``values`` as the loop reports them."""
        text = ", ".join(shape.format(values[name]) for name, shape in _SHOWN.items() if name in values)
        if self._bar is not None:
            if self._first is None:
                # Steps of an earlier session of the run say nothing about this one's speed.
                self._bar.reset(self._task, total=steps, completed=step, values=text)
                self._first = (self._clock(), step)
            self._bar.update(self._task, total=steps, completed=step, values=text)
        elif self._shown:
            self._print_line(step, steps, text)

    def _print_line(self, step: int, steps: int, text: str) -> None:
        now = self._clock()
        self._first = self._first or (now, step)
        if now - self._printed < self._every_s and step < steps:
            return
        self._printed = now
        started, first = self._first
        left = f", {_duration((now - started) / (step - first) * (steps - step))} left" if step > first else ""
        print(f"step {step} of {steps}{left}: {text}", file=sys.stderr, flush=True)


def _bar(console: Any) -> Any:
    from rich import progress

    return progress.Progress(
        progress.TextColumn("training"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TimeElapsedColumn(),
        progress.TimeRemainingColumn(),
        progress.TextColumn("{task.fields[values]}"),
        console=console,
    )


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60.0)
    if minutes < 1:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
