"""Anatomical label maps, aligned affinely to an atlas and brought onto the network's grid."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from jrs.errors import BadDataError, MissingInputError
from jrs.files import sha256_of, whole_file
from jrs.geometry import Geometry
from jrs.manifest import GridSpec
from jrs.reading import read_volume
from jrs.runtime.affine import register_affine
from jrs.runtime.preprocess import place_grid
from jrs.runtime.sampling import affine_coords, sample_nearest
from jrs.structures import DRAWN_CLASSES, compact_tables, drawing_table
from jrs.volume import Volume

Codes = npt.NDArray[np.uint8]

# T1-like intensity of each tissue (jrs.structures.TISSUES), enough for an affine against a T1 atlas.
_T1 = np.array([0.0, 1.0, 0.72, 0.82, 0.30, 0.70, 0.95], dtype=np.float32)
_EXTRACEREBRAL = 500
"""From here on numbers are of what lies around the brain, or of parcels of its cortex."""
_MOST_UNKNOWN = 0.2
"""Of the voxels with other numbers; segmentations have none that are unknown, images most."""


@dataclass(frozen=True)
class LabelMaps:
    """M maps on one grid, (M,X,Y,Z) uint8: the scored structure (0 or 1..30) and the drawn class of each voxel.

    Classes are indices in ``jrs.structures.DRAWN_CLASSES``, whose first are the tissues of the brain. The grid is
    the network's, or it cut into ``oversampling`` parts along each axis.
    """

    names: tuple[str, ...]
    structures: Tensor
    classes: Tensor

    def subset(self, indices: Sequence[int]) -> LabelMaps:
        """Some of the maps."""
        chosen = list(indices)
        return LabelMaps(tuple(self.names[i] for i in chosen), self.structures[chosen], self.classes[chosen])


def find_label_maps(folder: Path) -> list[Path]:
    """The label maps of a folder, in the order of their names."""
    if not folder.is_dir():
        raise MissingInputError(f"{folder}: no such folder; give one of label maps (.nii, .nii.gz, .mgz)")
    files = sorted(p for p in folder.iterdir() if p.name.endswith((".nii", ".nii.gz", ".mgz")))
    if len(files) < 2:
        raise MissingInputError(f"{folder}: holds {len(files)} label maps, pairs need at least 2 (.nii, .nii.gz, .mgz)")
    return files


def prepare_label_maps(
    files: Sequence[Path],
    grid: GridSpec,
    atlas: Volume,
    cache: Path,
    progress: Callable[[str], None] = lambda text: None,
    oversampling: int = 1,
) -> LabelMaps:
    """Align each map to ``atlas`` (a skull-stripped T1) and sample it by nearest neighbour.

    The grid is the network's, its voxels cut into ``oversampling`` parts along each axis.

    ``cache`` is a folder: a map that was prepared before for the same grid and atlas is taken from there.
    Raises BadDataError if a file holds no FreeSurfer label of the brain.
    """
    structures, classes = [], []
    placed = place_grid(grid, atlas)[0].refined((oversampling, oversampling, oversampling))
    settings = json.dumps(["drawn classes", DRAWN_CLASSES, placed.shape]) + placed.affine.tobytes().hex()
    for path in files:
        key = hashlib.sha256((sha256_of(path) + settings).encode()).hexdigest()[:24]
        stored = cache / f"{key}.npz"
        if not stored.exists():
            progress(f"aligning {path.name}")
            structure, drawn = _prepare(path, placed, atlas)
            with whole_file(stored) as temporary, temporary.open("wb") as stream:
                np.savez_compressed(stream, structure=structure, drawn=drawn)
        with np.load(stored) as arrays:
            structures.append(torch.from_numpy(arrays["structure"]))
            classes.append(torch.from_numpy(arrays["drawn"]))
    return LabelMaps(tuple(p.name for p in files), torch.stack(structures), torch.stack(classes))


def _prepare(path: Path, placed: Geometry, atlas: Volume) -> tuple[Codes, Codes]:
    labels = read_volume(path, labels=True)
    to_structure, to_tissue = compact_tables()
    if labels.data.min() < 0 or labels.data.max() >= len(to_tissue):
        raise BadDataError(
            f"{path}: holds numbers from {labels.data.min()} to {labels.data.max()}, FreeSurfer's lie in "
            f"0..{len(to_tissue) - 1}; is it an image? Give a segmentation like aseg"
        )
    tissue = to_tissue[labels.data]
    if not tissue.any():
        raise BadDataError(f"{path}: holds no FreeSurfer label of the brain; give a segmentation like aseg")
    within = (labels.data > 0) & (labels.data < _EXTRACEREBRAL)
    unknown = float((tissue[within] == 0).mean()) if within.any() else 0.0
    if unknown > _MOST_UNKNOWN:
        raise BadDataError(
            f"{path}: {unknown:.0%} of its voxels hold numbers that are no FreeSurfer label; is it an image? Give a "
            "segmentation like aseg"
        )
    drawn = Volume(_T1[tissue], labels.geometry, path)
    matrix = register_affine(drawn, atlas).matrix
    coords = affine_coords(placed.shape, labels.geometry.inverse @ matrix @ placed.affine)
    sampled = sample_nearest(labels.data, coords)
    return to_structure[sampled], drawing_table()[sampled]
