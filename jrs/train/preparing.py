"""One case from its files to what the network trains on: aligned, resampled, normalised, labels as class indices."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from jrs.errors import BadDataError, UsageError
from jrs.geometry import FloatArray, Geometry
from jrs.manifest import ModelSpec
from jrs.runtime.affine import register_affine
from jrs.runtime.preprocess import network_input
from jrs.runtime.sampling import affine_coords, sample_nearest
from jrs.structures import SEG35, compact_tables
from jrs.train.datasets import TrainingCase
from jrs.train.datasets.case import class_table, tumor_classes
from jrs.volume import Volume

Align = Literal["auto", "off"]
Codes = npt.NDArray[np.uint8]

UNKNOWN = 255
"""Class of voxels whose tumour label is not known."""

_SAME_GRID_MM = 1.0


@dataclass(frozen=True, eq=False)
class PreparedCase:
    """One case on the network's grid.

    Attributes:
        image: (C,X,Y,Z) float16, normalised, a missing channel all zero.
        present: which channels are there.
        tumor: (X,Y,Z) class index, None where nothing is known of it.
        structures: (X,Y,Z) anatomical index 1..30, 0 for none; None without a label map.
        moving_from_fixed: the affine that aligned it, RAS mm of an atlas point to RAS mm of the case; None if the
            case lies in the atlas's space.
        hashes: SHA-256 of the native voxels of each modality.
        notes: what the reader had to decide.
    """

    image: npt.NDArray[np.float16]
    present: tuple[bool, ...]
    tumor: Codes | None
    structures: Codes | None
    moving_from_fixed: FloatArray | None = None
    hashes: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()


def wanted_modalities(case: TrainingCase, channels: tuple[str, ...]) -> tuple[str, ...]:
    """The modalities that are read: the network's channels, and the one that the alignment goes by.

    Raises UsageError if the case has none of the channels.
    """
    wanted = tuple(m for m in case.images if m in channels)
    if not wanted:
        raise UsageError(f"{case.name}: has only {', '.join(case.images) or 'no image'}; needs {', '.join(channels)}")
    guide = alignment_modality(case)
    return wanted if guide in wanted else (*wanted, guide)


def alignment_modality(case: TrainingCase) -> str:
    """The image that is aligned to a T1 atlas, as in deployment: T1 if it is there, else the first."""
    return "t1" if "t1" in case.images else next(iter(case.images))


def require_channels(case: TrainingCase, model: ModelSpec) -> None:
    """Raise UsageError if the case lacks a channel that the network needs."""
    for channel in model.channels:
        if channel not in case.images and channel not in model.optional_channels:
            raise UsageError(
                f"{case.name}: lacks {channel}, which the network needs; add it, leave the case out, or name it in "
                "optional_channels of the configuration"
            )


def prepare_case(
    case: TrainingCase,
    model: ModelSpec,
    grid: Geometry,
    atlas: Volume,
    align: Align = "auto",
    threads: int | None = None,
) -> PreparedCase:
    """Read a case and bring it onto ``grid``, the network's grid placed on ``atlas``.

    With ``align`` ``auto`` a case is aligned affinely to the atlas unless it lies on the atlas's own grid, as BraTS
    does on SRI24's; ``off`` takes every case to be in the atlas's space.
    Raises BadDataError, MissingInputError or UsageError, naming the file or the case.
    """
    require_channels(case, model)
    volumes = case.read_images(wanted_modalities(case, model.channels))
    guide = volumes[alignment_modality(case)]
    matrix = None
    if align == "auto" and not in_atlas_space(guide.geometry, atlas.geometry):
        matrix = register_affine(guide, atlas, threads=threads).matrix
    image = network_input(volumes, model, grid, matrix, threads, whose=case.name)
    tumor = None
    if model.labels and case.segmentation is not None:
        labels = case.segmentation.read(labels=True)
        table = class_table(case, model.labels, model.label_values)
        classes = tumor_classes(labels.data, table, case.segmentation)
        tumor = _on_grid(classes, labels.geometry, grid, matrix)
    structures = None
    if case.structures is not None:
        anatomy = case.structures.read(labels=True)
        structures = _on_grid(structure_codes(case, anatomy), anatomy.geometry, grid, matrix)
    return PreparedCase(
        image=image.tensor[0].astype(np.float16),
        present=image.present,
        tumor=tumor,
        structures=structures,
        moving_from_fixed=matrix,
        hashes=tuple((name, voxel_hash(volume.data)) for name, volume in volumes.items()),
        notes=tuple(f"{name}: {note}" for name, volume in volumes.items() for note in volume.notes),
    )


def in_atlas_space(case: Geometry, atlas: Geometry) -> bool:
    """Whether two grids are one: the same shape, and corners at the same place within a millimetre."""
    if case.shape != atlas.shape:
        return False
    return bool(np.abs(case.corners() - atlas.corners()).max() < _SAME_GRID_MM)


def _on_grid(codes: Codes, source: Geometry, grid: Geometry, matrix: FloatArray | None) -> Codes:
    total = source.inverse @ (grid.affine if matrix is None else matrix @ grid.affine)
    sampled: Codes = sample_nearest(codes, affine_coords(grid.shape, total))
    return sampled


def structure_codes(case: TrainingCase, labels: Volume) -> Codes:
    """A case's anatomical labels as the compact index 0..30; labels that are not scored become 0."""
    table = compact_tables()[0]
    if case.numbering == "seg35":
        table = table[np.array((0, *SEG35))]
    low, high = int(labels.data.min()), int(labels.data.max())
    if low < 0 or high >= len(table):
        raise BadDataError(
            f"{case.structures}: labels reach from {low} to {high}; {case.numbering} numbers lie in 0..{len(table) - 1}"
        )
    codes: Codes = table[labels.data]
    if not codes.any():
        raise BadDataError(f"{case.structures}: holds no label of the brain; give a segmentation like aseg")
    return codes


def voxel_hash(data: npt.NDArray[Any]) -> str:
    """SHA-256 of an image's voxels and shape: equal for the same image however its file was packed."""
    digest = hashlib.sha256(repr((data.shape, data.dtype.str)).encode())
    digest.update(np.ascontiguousarray(data).data)
    return digest.hexdigest()
