"""The run's log: one row a step in ``metrics.csv``, the same scalars in TensorBoard."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class RunLog:
    """Appends rows to ``metrics.csv`` and to TensorBoard's event files; a resumed run cuts what it will redo."""

    COLUMNS = ("step", "epoch", "split", "name", "value")

    def __init__(self, folder: Path, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._path = folder / "metrics.csv"
        kept = self._rows_before(first_step)
        self._stream = self._path.open("w", newline="", encoding="utf-8")
        self._writer = csv.writer(self._stream)
        self._writer.writerow(self.COLUMNS)
        self._writer.writerows(kept)
        self._stream.flush()
        self._board: Any = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step or None)

    def _rows_before(self, step: int) -> list[list[str]]:
        if not self._path.exists() or step == 0:
            return []
        with self._path.open(newline="", encoding="utf-8") as stream:
            return [row for row in list(csv.reader(stream))[1:] if len(row) == 5 and int(row[0]) <= step]

    def write(self, step: int, epoch: int, split: str, values: Mapping[str, float]) -> None:
        """Add one value a name; ``split`` is train or validation."""
        for name, value in values.items():
            self._writer.writerow([step, epoch, split, name, f"{value:.8g}"])
            self._board.add_scalar(f"{split}/{name}", value, step)
        self._stream.flush()

    def close(self) -> None:
        """Flush both files."""
        self._stream.close()
        self._board.close()
