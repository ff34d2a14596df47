"""BraTS folders of every year, and any other folder with one file a modality named ``<case>_<modality>``.

Names: ``Brats18_TCIA01_101_1_t1ce``, ``BraTS19_...``, ``BraTS20_Training_001_flair``, ``BraTS2021_00000_t2``, from
2023 on ``BraTS-GLI-00000-000-t1c``, and ``BraTSReg_001_00_0000_t1`` with its ``_landmarks.csv``; ``seg`` in the place
of the modality. Folders between (HGG, LGG, training, validation) may be any.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from jrs.manifest import MODALITIES
from jrs.runtime.cases import IMAGE_FILE, split_name
from jrs.train.datasets.case import BACKGROUND, BRATS_CLASSES, CORE, EDEMA, ENHANCING, ImageFile, TrainingCase
from jrs.train.datasets.walk import folders_below, made_by_jrs, stem_of

_SINCE_2023 = {1: CORE, 2: EDEMA, 3: ENHANCING}
_LANDMARKS = "_landmarks.csv"
_SEGMENTATION = re.compile(r"^(?P<case>.+?)[_-](tumou?r[_-])?segm?(entation)?([_-].*)?$", re.IGNORECASE)
_STRUCTURES = re.compile(r"^(?P<case>.+?)[_-](?P<kind>aseg|synthseg|seg35)$", re.IGNORECASE)
_STRAY_SEGMENTATION = re.compile(r"(^|[_-])segm?(entation)?$", re.IGNORECASE)


@dataclass(frozen=True)
class _Naming:
    pattern: re.Pattern[str]
    classes: Mapping[int, str]
    note: str = ""


_NAMINGS = (
    # 4 is the resection cavity of treated patients (2024): no tumour, by the challenge's definition of the regions.
    _Naming(
        re.compile(r"^(?P<subject>BraTS-(GLI|MET)-\d+)-(?P<session>\d+)$", re.IGNORECASE),
        {**_SINCE_2023, 4: BACKGROUND},
    ),
    _Naming(
        re.compile(r"^(?P<subject>BraTS-PEDs?-\d+)-(?P<session>\d+)$", re.IGNORECASE),
        _SINCE_2023,
        "labels are read as in BraTS-PEDs 2023; 2024 numbers them anew: say what they mean in a manifest",
    ),
    _Naming(re.compile(r"^(?P<subject>BraTS-[A-Za-z]+-\d+)-(?P<session>\d+)$", re.IGNORECASE), _SINCE_2023),
    _Naming(re.compile(r"^(?P<subject>BraTSReg_\d+)_(?P<session>\d+_\d+)$", re.IGNORECASE), BRATS_CLASSES),
    # The year is no part of the subject: the same patients came again in 2018 and 2019.
    _Naming(re.compile(r"^BraTS(20)?1[789]_(?P<subject>.+)_(?P<session>\d+)$", re.IGNORECASE), BRATS_CLASSES),
    _Naming(re.compile(r"^(?P<subject>BraTS(20)?2[0-2]_.+)$", re.IGNORECASE), BRATS_CLASSES),
)


@dataclass
class _Files:
    images: dict[str, Path] = field(default_factory=dict)
    segmentation: Path | None = None
    structures: Path | None = None
    landmarks: Path | None = None
    notes: list[str] = field(default_factory=list)


def recognized(folder: Path) -> bool:
    """Whether some folder below holds images named by their modality."""
    return any(
        IMAGE_FILE.search(name) and split_name(name)[1] for _, _, names in folders_below(folder) for name in names
    )


def find(folder: Path) -> list[TrainingCase]:
    """The cases below a folder, in the order of their names."""
    cases = []
    for here, _, names in folders_below(folder):
        cases += [_case(stem, files) for stem, files in _group(here, names).items()]
    return sorted(cases, key=lambda case: case.name)


def _group(folder: Path, names: list[str]) -> dict[str, _Files]:
    """The files of one folder by case: BraTS-Reg keeps two sessions in one folder, others all cases."""
    groups: dict[str, _Files] = {}
    others: list[str] = []
    for name in (name for name in names if not made_by_jrs(folder / name)):
        stem, modality = split_name(name) if IMAGE_FILE.search(name) else (name, None)
        if modality is not None and stem:
            _add(groups.setdefault(stem, _Files()), modality, folder / name)
        else:
            others.append(name)
    for name in others:
        _assign(groups, folder, name)
    _adopt_stray(folder, others, groups)
    return groups


def _assign(groups: dict[str, _Files], folder: Path, name: str) -> None:
    """Give a label map or landmarks to the case that it belongs to."""
    if name.endswith(_LANDMARKS):
        if (case := name.removesuffix(_LANDMARKS)) in groups:
            groups[case].landmarks = folder / name
        return
    if not IMAGE_FILE.search(name):
        return
    if (match := _STRUCTURES.match(stem_of(name))) and match["case"] in groups:
        groups[match["case"]].structures = folder / name
    elif match := _SEGMENTATION.match(stem_of(name)):
        case = match["case"]
        if case not in groups and _naming(case):
            groups[case] = _Files()  # a label map whose images are missing
        if case in groups and groups[case].segmentation is None:
            groups[case].segmentation = folder / name
        elif case in groups:
            groups[case].notes.append(f"more than one tumour label map, {name} is not taken")


def _add(files: _Files, modality: str, path: Path) -> None:
    if modality in files.images:
        files.notes.append(f"two files for {modality}, {files.images[modality].name} is taken and {path.name} is not")
    else:
        files.images[modality] = path


def _adopt_stray(folder: Path, names: list[str], groups: Mapping[str, _Files]) -> None:
    """BraTS20_Training_355 has its label map under a foreign name (W39_1998.09.19_Segm)."""
    stray = [n for n in names if IMAGE_FILE.search(n) and _STRAY_SEGMENTATION.search(stem_of(n))]
    if len(groups) == 1 and len(stray) == 1:
        (files,) = groups.values()
        if files.segmentation is None:
            files.segmentation = folder / stray[0]
            files.notes.append(f"{stray[0]} is taken for its label map")


def _naming(stem: str) -> tuple[_Naming, re.Match[str]] | None:
    return next(((n, match) for n in _NAMINGS if (match := n.pattern.match(stem))), None)


def _case(stem: str, files: _Files) -> TrainingCase:
    subject, session, classes = stem, None, None
    notes = list(files.notes)
    known = _naming(stem)
    if known is not None:
        naming, match = known
        subject, session, classes = match["subject"], match.groupdict().get("session"), naming.classes
        if naming.note and files.segmentation is not None:
            notes.append(naming.note)
    return TrainingCase(
        name=stem,
        images={m: ImageFile(files.images[m]) for m in MODALITIES if m in files.images},
        segmentation=None if files.segmentation is None else ImageFile(files.segmentation),
        subject=subject,
        session=session,
        tumor_classes=None if files.segmentation is None else classes,
        structures=None if files.structures is None else ImageFile(files.structures),
        numbering="seg35" if files.structures and "seg35" in files.structures.name else "freesurfer",
        landmarks=files.landmarks,
        layout="brats",
        notes=tuple(notes),
    )
