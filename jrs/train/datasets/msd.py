"""Task01_BrainTumour of the Medical Segmentation Decathlon: 4-D images, described by ``dataset.json``.

The channels are FLAIR, T1w, T1gd, T2w and the labels 1 oedema, 2 non-enhancing, 3 enhancing tumour: another order
than BraTS in both. What ``dataset.json`` says is what is done.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jrs.errors import BadDataError
from jrs.headers import shown
from jrs.manifest import MODALITIES
from jrs.runtime.cases import IMAGE_FILE
from jrs.runtime.msd import DESCRIPTION, channels, described, table
from jrs.train.datasets.case import BACKGROUND, CORE, EDEMA, ENHANCING, ImageFile, TrainingCase
from jrs.train.datasets.walk import stem_of

_IMAGES, _LABELS = "imagesTr", "labelsTr"
_TASK01: dict[str, Any] = {
    "modality": {"0": "FLAIR", "1": "T1w", "2": "t1gd", "3": "T2w"},
    "labels": {"0": "background", "1": "edema", "2": "non-enhancing tumor", "3": "enhancing tumour"},
}


def recognized(folder: Path) -> bool:
    """Whether the folder holds ``imagesTr``."""
    return (folder / _IMAGES).is_dir()


def find(folder: Path) -> list[TrainingCase]:
    """The training cases, in the order of their names; raises BadDataError for a description that says too little."""
    file = folder / DESCRIPTION
    description = described(file) if file.exists() else _TASK01
    notes = () if file.exists() else (f"no {DESCRIPTION}: channels and labels are taken as published",)
    volumes = channels(file, description)
    classes = _classes(file, description)
    cases = []
    for image in _image_files(folder, description):
        label = folder / _LABELS / image.name
        cases.append(
            TrainingCase(
                name=stem_of(image.name),
                images={m: ImageFile(image, volumes[m]) for m in MODALITIES if m in volumes},
                segmentation=ImageFile(label) if label.exists() else None,
                tumor_classes=classes if label.exists() else None,
                layout="msd",
                notes=notes,
            )
        )
    return sorted(cases, key=lambda case: case.name)


def _classes(file: Path, description: dict[str, Any]) -> dict[int, str]:
    classes = {}
    for value, name in table(file, description, "labels").items():
        kind = class_named(name)
        if kind is None:
            raise BadDataError(f"{shown(file)}: label {value} is {name!r}, not a class of tumour that jrs knows")
        if value:
            classes[value] = kind
    return classes


def class_named(text: str) -> str | None:
    """The BraTS class that a label's name in words stands for.

    >>> class_named("non-enhancing tumor"), class_named("enhancing tumour"), class_named("Oedema")
    ('necrotic_or_nonenhancing_core', 'enhancing_tumor', 'edema')
    """
    words = text.lower().replace("-", "").replace("_", " ")
    if "background" in words:
        return BACKGROUND
    if "edema" in words:
        return EDEMA
    if "nonenhancing" in words or "necro" in words:
        return CORE
    return ENHANCING if "enhancing" in words else None


def _image_files(folder: Path, description: dict[str, Any]) -> list[Path]:
    """As the description lists them, so that one that was not downloaded is missed; else what is there."""
    listed = description.get("training")
    if isinstance(listed, list) and listed and all(isinstance(row, dict) and "image" in row for row in listed):
        return [folder / str(row["image"]) for row in listed]
    there = sorted(p for p in (folder / _IMAGES).iterdir() if IMAGE_FILE.search(p.name))
    return [p for p in there if not p.name.startswith(".")]
