"""What training and evaluation know of one case: which files, whose, and what the labels in them mean."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from jrs.errors import BadDataError
from jrs.headers import shown
from jrs.reading import count_channels, read_channels, read_volume
from jrs.volume import Volume

Numbering = Literal["freesurfer", "seg35"]

CORE, EDEMA, ENHANCING, BACKGROUND = "necrotic_or_nonenhancing_core", "edema", "enhancing_tumor", "background"
"""The classes of the BraTS challenges by the names that `jrs.manifest.ModelSpec.labels` gives them."""

BRATS_CLASSES: dict[int, str] = {1: CORE, 2: EDEMA, 3: ENHANCING, 4: ENHANCING}
"""BraTS labels of an unknown year: enhancing tumour is 4 up to 2022 and 3 from 2023 on, never both in one file."""


@dataclass(frozen=True)
class ImageFile:
    """A 3-D image: a file, or one volume of a 4-D file, counted from 0. Written ``path`` or ``path::index``."""

    path: Path
    volume: int | None = None

    @staticmethod
    def parse(text: str, folder: Path = Path()) -> ImageFile:
        """Read the written form; a relative path starts at ``folder``."""
        path, separator, index = text.rpartition("::")
        if separator and path and index.isdigit():
            return ImageFile(folder / path, int(index))
        return ImageFile(folder / text)

    def __str__(self) -> str:
        return str(self.path) if self.volume is None else f"{self.path}::{self.volume}"

    def read(self, labels: bool = False) -> Volume:
        """Its voxels through `jrs.reading`, whose errors it raises; BadDataError for a volume that is not there."""
        if self.volume is None:
            return read_volume(self.path, labels=labels)
        count = count_channels(self.path)
        if self.volume >= count:
            raise BadDataError(f"{shown(self.path)}: has {count} volumes, there is no number {self.volume} (from 0)")
        if labels:
            raise BadDataError(f"{shown(self.path)}: labels in a 4-D file are not read; give a 3-D label map")
        return read_channels(self.path)[self.volume]


@dataclass(frozen=True)
class TrainingCase:
    """One session of one subject, as files; nothing has been read yet.

    Attributes:
        name: of the case, unique within a cohort.
        images: the image of each modality (`jrs.manifest.MODALITIES`), all in one space.
        segmentation: tumour label map, None without one.
        subject: whose images these are; sessions of one subject never fall into different splits.
        session: which of a subject's sessions, None where there is one.
        tumor_classes: class name of each value in ``segmentation`` but 0, which is always background; None where
            the layout does not say, then the model's own ``label_values`` (or BraTS labels of any year) are meant.
        structures: anatomical label map, None without one.
        numbering: of ``structures``: FreeSurfer's, or the 35 labels of the neurite OASIS release.
        landmarks: CSV of landmarks (BraTS-Reg).
        layout: the layout it was found in.
        notes: what was decided when it was found and the user should know.
    """

    name: str
    images: Mapping[str, ImageFile]
    segmentation: ImageFile | None = None
    subject: str = ""
    session: str | None = None
    tumor_classes: Mapping[int, str] | None = None
    structures: ImageFile | None = None
    numbering: Numbering = "freesurfer"
    landmarks: Path | None = None
    layout: str = "manifest"
    notes: tuple[str, ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        if not self.subject:
            object.__setattr__(self, "subject", self.name)

    def files(self) -> dict[str, ImageFile]:
        """Every image file by its role: the modalities, ``seg`` and ``structures``."""
        others = {"seg": self.segmentation, "structures": self.structures}
        return {**self.images, **{role: file for role, file in others.items() if file is not None}}

    def read_images(self, modalities: tuple[str, ...] | None = None) -> dict[str, Volume]:
        """The images of some modalities (default: all), each 4-D file read once; raises what `jrs.reading` does."""
        wanted = {m: f for m, f in self.images.items() if modalities is None or m in modalities}
        stacks = {
            path: read_channels(path)
            for path, count in _uses(wanted).items()
            if count > 1 and count_channels(path) > 1
        }
        volumes = {}
        for modality, file in wanted.items():
            stack = stacks.get(file.path)
            inside = stack is not None and file.volume is not None and file.volume < len(stack)
            volumes[modality] = stack[file.volume] if inside else file.read()  # type: ignore[index]
        return volumes


def _uses(files: Mapping[str, ImageFile]) -> dict[Path, int]:
    counts: dict[Path, int] = {}
    for file in files.values():
        counts[file.path] = counts.get(file.path, 0) + 1
    return counts


def class_table(case: TrainingCase, labels: tuple[str, ...], label_values: tuple[int, ...]) -> dict[int, int]:
    """Value in the case's segmentation to index in ``labels``, the model's class names.

    Where the case does not say what its values mean, they are the model's ``label_values``; a model that writes 4
    for enhancing tumour then also takes 3, BraTS's label from 2023 on. A model without a class that the case
    names raises BadDataError.
    """
    if case.tumor_classes is None:
        table = {value: index for index, value in enumerate(label_values)}
        if 4 in table and 3 not in table:
            table[3] = table[4]
        return table
    unknown = [name for name in case.tumor_classes.values() if name not in labels]
    if unknown:
        raise BadDataError(
            f"{case.segmentation}: its class {unknown[0]} is not one of the model's ({', '.join(labels)}); "
            "give a manifest whose column labels names these"
        )
    return {0: 0, **{value: labels.index(name) for value, name in case.tumor_classes.items()}}


def tumor_classes(values: npt.NDArray[Any], table: Mapping[int, int], file: ImageFile) -> npt.NDArray[np.uint8]:
    """Values of a label map to class indices; raises BadDataError for values that the table does not know.

    3 and 4 for one class in one file is refused: BraTS 2024 labels the resection cavity 4.
    """
    found = [int(v) for v in np.unique(values)]
    unknown = [v for v in found if v not in table]
    if unknown:
        raise BadDataError(f"{file}: label {unknown[0]} is unknown; expected {sorted(table)} (BraTS labels)")
    if 3 in found and 4 in found and table[3] == table[4]:
        raise BadDataError(
            f"{file}: holds both 3 and 4, which are both enhancing tumour, of different years of BraTS; say what they "
            "mean in the column labels of a manifest (BraTS 2024: 4=background, the resection cavity)"
        )
    classes = np.zeros(values.shape, dtype=np.uint8)
    for value in found:
        classes[values == value] = table[value]
    return classes
