"""The cases of an evaluation, read: images by file, labels and landmarks in memory."""

from __future__ import annotations

import glob
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from jrs.errors import BadDataError, UsageError
from jrs.evaluate.landmarks import LandmarkSpace, read_landmarks
from jrs.geometry import FloatArray, Geometry
from jrs.manifest import ModelSpec
from jrs.reading import read_geometry
from jrs.resources import atlas_path
from jrs.runtime.cases import find_case, load_case
from jrs.structures import STRUCTURES
from jrs.train.datasets import ImageFile, TrainingCase
from jrs.train.datasets.case import class_table, tumor_classes
from jrs.train.preparing import structure_codes
from jrs.volume import Volume
from jrs.writing import save_nifti

CODES = {name: index for index, name in enumerate(STRUCTURES, start=1)}
"""Structure to its index in `Subject.structures`."""
_SAME_GRID_MM = 0.1


@dataclass(frozen=True, eq=False)
class Subject:
    """One case as the scores need it.

    Attributes:
        case: its files.
        tumor: class index of each voxel on the images' grid (0 background, 1 core, 2 oedema, 3 enhancing), uint8;
            None where the truth is not known.
        structures: anatomical index 1..30 (`CODES`) on the label map's own grid, 0 for none; None without one.
        landmarks: name to RAS mm.
    """

    case: TrainingCase
    tumor: Volume | None
    structures: Volume | None
    landmarks: dict[str, FloatArray]


def read_subject(case: TrainingCase, spec: ModelSpec, space: LandmarkSpace = "lps") -> Subject:
    """Read a case's labels and landmarks; raises BadDataError for labels that do not fit the images."""
    native = image_geometry(case)
    tumor = None if case.segmentation is None else _tumor(case, spec, native)
    structures = None
    if case.structures is not None:
        labels = case.structures.read(labels=True)
        structures = Volume(structure_codes(case, labels), labels.geometry, labels.path)
    landmarks = {} if case.landmarks is None else read_landmarks(case.landmarks, native, space)
    return Subject(case, tumor, structures, landmarks)


def image_geometry(case: TrainingCase) -> Geometry:
    """The grid of the case's first image."""
    return read_geometry(next(iter(case.images.values())).path)


def _tumor(case: TrainingCase, spec: ModelSpec, native: Geometry) -> Volume:
    assert case.segmentation is not None
    labels = case.segmentation.read(labels=True)
    if not labels.geometry.is_close_to(native, _SAME_GRID_MM):
        raise BadDataError(f"{case.segmentation}: lies on another grid than {case.name}'s images; resample the labels")
    classes = tumor_classes(labels.data, class_table(case, spec.labels, spec.label_values), case.segmentation)
    return Volume(classes, native, labels.path)


def as_classes(labels: npt.NDArray[np.uint8], spec: ModelSpec) -> npt.NDArray[np.uint8]:
    """What a bundle wrote, in its ``label_values``, as class indices."""
    table = np.zeros(256, dtype=np.uint8)
    table[list(spec.label_values)] = np.arange(len(spec.label_values), dtype=np.uint8)
    classes: npt.NDArray[np.uint8] = table[labels]
    return classes


def atlas_case(name: str, structures: Path | None = None) -> TrainingCase:
    """An atlas as a case: a shipped name, a file or a folder, and its anatomical label map if there is one."""
    path = atlas_path(name)
    label = _safe(name if path != Path(name) else path.name.split(".")[0])
    found = find_case(path) if path.is_dir() else {next(iter(load_case(path).images)): path}
    return TrainingCase(
        name=label,
        images={modality: ImageFile(file) for modality, file in found.items()},
        structures=None if structures is None else ImageFile(structures),
    )


def staged(case: TrainingCase, folder: Path) -> Path:
    """A folder that holds the case as ``jrs infer`` takes it: links to its files, volumes of 4-D files as their own."""
    place = folder / _safe(case.name)
    if place.exists():
        return place
    place.mkdir(parents=True)
    for modality, image in case.images.items():
        source = image.path.resolve()
        if image.volume is not None:
            volume = image.read()
            save_nifti(place / f"{place.name}_{modality}.nii", volume.data, volume.geometry)
            continue
        ending = re.search(r"\.(nii|nii\.gz|mgz)$", source.name, re.IGNORECASE)
        if ending is None:
            raise UsageError(f"{image.path}: is not a .nii, .nii.gz or .mgz file; convert it")
        link = place / f"{place.name}_{modality}{ending[0]}"
        try:
            link.symlink_to(source)
        except OSError:  # where links are not allowed
            shutil.copyfile(source, link)
    return place


def named_as_given(text: str, case: TrainingCase, place: Path) -> str:
    """A message about files of ``place``, where the case was ``staged``, with the names that the user knows."""
    for modality, image in case.images.items():
        for file in place.glob(f"{glob.escape(place.name)}_{modality}.*"):
            text = text.replace(str(file), str(image.path))
    return text.replace(str(place), case.name)


def _safe(name: str) -> str:
    return re.sub(r"[^\w.+-]+", "_", name).strip("_-.") or "case"
