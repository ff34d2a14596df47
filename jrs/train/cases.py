"""Training pairs from real cases listed in a CSV or JSON manifest.

CSV: a header with ``case``, one column a modality (t1, t1ce, t2, flair) and, if there are labels, ``seg``; paths are
relative to the manifest's folder. JSON: a list of objects with the same keys. All images of a case lie in one
space; cases are expected in the atlas's space (BraTS is), as the paper's are.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from jrs.errors import BadDataError, MissingInputError
from jrs.manifest import MODALITIES, ModelSpec
from jrs.reading import read_volume
from jrs.runtime.preprocess import network_input, place_grid
from jrs.runtime.sampling import affine_coords, sample_nearest
from jrs.train.batch import PairBatch, concatenate, pair_indices
from jrs.volume import Volume


@dataclass(frozen=True)
class TrainingCase:
    """One subject: image files by modality, and the tumour labels if there are any."""

    name: str
    images: dict[str, Path]
    segmentation: Path | None


def load_manifest(path: Path) -> list[TrainingCase]:
    """Read a manifest and check that every file is there; raises BadDataError naming the row."""
    if not path.is_file():
        raise MissingInputError(f"{path}: no such manifest; give a CSV or JSON file with columns case, t1, ..., seg")
    try:
        text = path.read_text(encoding="utf-8-sig")
        rows: Any = json.loads(text) if path.suffix.lower() == ".json" else list(csv.DictReader(text.splitlines()))
    except (OSError, UnicodeDecodeError, ValueError, csv.Error) as error:
        raise BadDataError(f"{path}: is not a CSV or JSON manifest ({error})") from error
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise BadDataError(f"{path}: lists no case; write a header (case, t1, ..., seg) and one row a case")
    return [_case(path, number, row) for number, row in enumerate(rows, start=1)]


def _case(manifest: Path, number: int, row: dict[str, Any]) -> TrainingCase:
    if None in row:
        raise BadDataError(f"{manifest}: row {number} has more cells than the header; quote commas in paths")
    unknown = [key for key in row if key not in ("case", "seg", *MODALITIES)]
    if unknown:
        raise BadDataError(
            f"{manifest}: column {unknown[0]!r} is unknown; known are case, {', '.join(MODALITIES)}, seg"
        )
    name = str(row.get("case") or f"row-{number}")
    files = {key: manifest.parent / str(row[key]) for key in (*MODALITIES, "seg") if row.get(key)}
    for file in files.values():
        if not file.is_file():
            raise MissingInputError(f"{file}: no such file (row {number}, case {name} of {manifest})")
    segmentation = files.pop("seg", None)
    if not files:
        raise BadDataError(
            f"{manifest}: row {number}, case {name}, names no image; fill one of {', '.join(MODALITIES)}"
        )
    return TrainingCase(name, files, segmentation)


class CasePairs:
    """Pairs of real cases (a ``PairSource``), each resampled once and kept in memory as float16."""

    def __init__(self, cases: Sequence[TrainingCase], model: ModelSpec, atlas: Volume, seed: int) -> None:
        self.cases, self.model, self.seed = list(cases), model, seed
        self.grid = place_grid(model.grid, atlas)
        self._kept: dict[int, tuple[Tensor, Tensor, Tensor | None]] = {}

    def __len__(self) -> int:
        """Number of cases."""
        return len(self.cases)

    def batch(self, index: int, size: int) -> PairBatch:
        """Batch number ``index`` of ``size`` pairs, always the same for one seed."""
        pairs = []
        for moving, fixed in pair_indices(index, size, len(self), self.seed):
            a, b = self._load(moving), self._load(fixed)
            pairs.append(PairBatch(a[0].float(), b[0].float(), a[1], b[1], a[2], b[2]))
        return concatenate(pairs)

    def _load(self, index: int) -> tuple[Tensor, Tensor, Tensor | None]:
        if index not in self._kept:
            case = self.cases[index]
            volumes = {name: read_volume(path) for name, path in case.images.items()}
            image = network_input(volumes, self.model, self.grid)
            tumor = None
            if self.model.architecture.segmentation:
                tumor = torch.full((1, *self.grid.shape), -1, dtype=torch.int64)
                if case.segmentation is not None:
                    tumor = self._labels(case.segmentation)
            present = torch.tensor([image.present], dtype=torch.float32)
            self._kept[index] = (torch.from_numpy(image.tensor).half(), present, tumor)
        return self._kept[index]

    def _labels(self, path: Path) -> Tensor:
        labels = read_volume(path, labels=True)
        coords = affine_coords(self.grid.shape, labels.geometry.inverse @ self.grid.affine)
        values = sample_nearest(labels.data, coords)
        classes = np.zeros(values.shape, dtype=np.int64)
        accepted = {0}
        for index, value in enumerate(self.model.label_values):
            classes[values == value] = index
            accepted.add(value)
        # BraTS writes enhancing tumour as 4 up to 2022 and as 3 from 2023 on; never both.
        if 4 in accepted and 3 not in accepted:
            classes[values == 3] = self.model.label_values.index(4)
            accepted.add(3)
        unknown = sorted(set(np.unique(labels.data).tolist()) - accepted)
        if unknown:
            raise BadDataError(f"{path}: label {unknown[0]} is unknown; expected {sorted(accepted)} (BraTS labels)")
        return torch.from_numpy(classes)[None]
