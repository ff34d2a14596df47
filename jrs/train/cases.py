"""Training pairs from real cases listed in a CSV or JSON manifest.

CSV: a header with ``case``, one column a modality (t1, t1ce, t2, flair) and, if there are labels, ``seg``; paths are
relative to the manifest's folder. JSON: a list of objects with the same keys. All images of a case lie in one
space; cases are expected in the atlas's space (BraTS is), as the paper's are.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from jrs.errors import BadDataError
from jrs.manifest import ModelSpec
from jrs.reading import read_volume
from jrs.runtime.preprocess import network_input, place_grid
from jrs.runtime.sampling import affine_coords, sample_nearest
from jrs.train.batch import PairBatch, concatenate, pair_indices
from jrs.train.datasets import TrainingCase
from jrs.volume import Volume


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
            volumes = case.read_images()
            image = network_input(volumes, self.model, self.grid)
            tumor = None
            if self.model.architecture.segmentation:
                tumor = torch.full((1, *self.grid.shape), -1, dtype=torch.int64)
                if case.segmentation is not None:
                    tumor = self._labels(case.segmentation.path)
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
