"""The run's log: ``metrics.csv`` and ``timings.csv``, one row a value, and the same in TensorBoard.

``metrics.csv`` holds what the run computed, so two runs that did the same have the same file; ``timings.csv`` holds
how long it took.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from jrs.files import whole_file

METRICS, TIMINGS, PICTURE = "metrics.csv", "timings.csv", "validation.png"


class _Table:
    """A CSV file that grows, cut where a resumed run goes on; it is whole at every moment but for its last line."""

    COLUMNS = ("step", "epoch", "split", "name", "value")

    def __init__(self, path: Path, first_step: int) -> None:
        kept = self._rows_until(path, first_step)
        with whole_file(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as stream:
            csv.writer(stream).writerows([self.COLUMNS, *kept])
        self._stream = path.open("a", newline="", encoding="utf-8")
        self._writer = csv.writer(self._stream)

    @staticmethod
    def _rows_until(path: Path, step: int) -> list[list[str]]:
        if not path.exists() or step == 0:
            return []
        with path.open(newline="", encoding="utf-8", errors="replace") as stream:
            rows = list(csv.reader(line.replace("\0", "") for line in stream))[1:]
        return [row for row in rows if len(row) == 5 and row[0].isdecimal() and int(row[0]) <= step]

    def write(self, step: int, epoch: int, split: str, values: Mapping[str, float]) -> None:
        self._writer.writerows([step, epoch, split, name, f"{value:.8g}"] for name, value in values.items())
        self._stream.flush()

    def close(self) -> None:
        self._stream.close()


class RunLog:
    """Appends to the run's tables and to TensorBoard's event files; a resumed run cuts what it will redo."""

    def __init__(self, folder: Path, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._folder = folder
        self._metrics = _Table(folder / METRICS, first_step)
        self._timings = _Table(folder / TIMINGS, first_step)
        self._board: Any = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step + 1 if first_step else None)

    def write(self, step: int, epoch: int, split: str, values: Mapping[str, float]) -> None:
        """Add one value a name; ``split`` is train or validation."""
        self._metrics.write(step, epoch, split, values)
        self._scalars(step, split, values)

    def write_timings(self, step: int, epoch: int, values: Mapping[str, float]) -> None:
        """Add how long things took."""
        self._timings.write(step, epoch, "train", values)
        self._scalars(step, "time", values)

    def write_picture(self, step: int, picture: npt.NDArray[np.uint8]) -> None:
        """Add a picture (height, width, 3); the newest one lies in the run's folder as well."""
        from PIL import Image

        self._board.add_image("validation/pair", picture, step, dataformats="HWC")
        with whole_file(self._folder / PICTURE) as temporary:
            Image.fromarray(picture).save(temporary, format="PNG")

    def close(self) -> None:
        """Flush everything."""
        self._metrics.close()
        self._timings.close()
        self._board.close()

    def _scalars(self, step: int, group: str, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._board.add_scalar(f"{group}/{name}", value, step)
