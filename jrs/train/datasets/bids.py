"""BIDS: ``sub-*/[ses-*/]anat`` with T1w, ce-gadolinium T1w, T2w and FLAIR, label maps among the derivatives."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from jrs.manifest import MODALITIES
from jrs.runtime.cases import IMAGE_FILE, split_name
from jrs.train.datasets.case import ImageFile, TrainingCase
from jrs.train.datasets.walk import folders_below, made_by_jrs, stem_of

_NATIVE = (None, "orig", "T1w", "native")  # spaces of a derivative that are the raw images' own
_TUMOR = re.compile(r"tumou?r|lesion|glioma|brats|metasta", re.IGNORECASE)
_ANATOMY = re.compile(r"^(aseg|synthseg)$", re.IGNORECASE)
# Their plain _dseg is grey matter, white matter and CSF.
_TISSUE_PIPELINES = re.compile(r"^(f|s|nibabies-?f?)mriprep|^smriprep|^fastsurfer|^freesurfer", re.IGNORECASE)


@dataclass(frozen=True)
class _Image:
    path: Path
    entities: dict[str, str]
    pipeline: str  # empty for raw data

    @property
    def session(self) -> tuple[str, str | None]:
        return self.entities["sub"], self.entities.get("ses")

    @property
    def rank(self) -> tuple[int, str]:
        """The plainest name first, then the lowest run."""
        return len(self.entities), self.path.name


def recognized(folder: Path) -> bool:
    """Whether the folder holds subjects' folders; those that fMRIPrep has FreeSurfer write are called the same."""
    return any(True for pattern in ("sub-*/anat", "sub-*/ses-*/anat") for _ in folder.glob(pattern))


def find(folder: Path) -> list[TrainingCase]:
    """The cases of a data set, one a session, in the order of their names."""
    images: dict[tuple[str, str | None], dict[str, list[_Image]]] = {}
    labels: dict[tuple[str, str | None], list[_Image]] = {}
    for found in _images(folder):
        modality = split_name(found.path.name)[1]
        if stem_of(found.path.name).endswith("_dseg"):
            if not made_by_jrs(found.path):
                labels.setdefault(found.session, []).append(found)
        elif modality is not None and not found.pipeline:
            images.setdefault(found.session, {}).setdefault(modality, []).append(found)
    cases = [_case(session, images[session], labels.get(session, [])) for session in images]
    return sorted(cases, key=lambda case: case.name)


def _images(folder: Path) -> list[_Image]:
    """Every image of a subject, raw ones and those of the pipelines in ``derivatives``."""
    derivatives = folder / "derivatives"
    pipelines = sorted(p for p in derivatives.iterdir() if p.is_dir()) if derivatives.is_dir() else []
    roots = [(folder, "")] + [(p, p.name) for p in pipelines] + ([(derivatives, "derivatives")] if pipelines else [])
    images = []
    for root, pipeline in roots:
        for subject in sorted(p for p in root.iterdir() if p.name.startswith("sub-") and p.is_dir()):
            for here, _, names in folders_below(subject, depth=2):
                for name in names:
                    entities = dict(part.split("-", 1) for part in stem_of(name).split("_") if "-" in part)
                    if IMAGE_FILE.search(name) and "sub" in entities:
                        images.append(_Image(here / name, entities, pipeline))
    return images


def _case(session: tuple[str, str | None], images: dict[str, list[_Image]], labels: list[_Image]) -> TrainingCase:
    # All images of one space: that of most modalities, the native one if there is a choice.
    found = [image for candidates in images.values() for image in candidates]
    spaces = {image.entities.get("space") for image in found}

    def modalities(space: str | None) -> int:
        return sum(any(i.entities.get("space") == space for i in candidates) for candidates in images.values())

    space = max(spaces, key=lambda s: (modalities(s), s is None, s or ""))
    chosen, notes = {}, []
    for modality in (m for m in MODALITIES if m in images):
        candidates = sorted((i for i in images[modality] if i.entities.get("space") == space), key=lambda i: i.rank)
        if candidates:
            chosen[modality] = ImageFile(candidates[0].path)
        if len(candidates) > 1:
            notes.append(f"{len(candidates)} images for {modality}, {candidates[0].path.name} is taken")
    same = _NATIVE if space in _NATIVE else (space,)
    usable = sorted((i for i in labels if i.entities.get("space") in same), key=lambda i: i.rank)
    tumors = [i for i in usable if _is_tumor(i)]
    anatomies = [i for i in usable if _ANATOMY.match(_what(i))]
    if len(tumors) > 1:
        notes.append(f"{len(tumors)} tumour label maps, {tumors[0].path.name} is taken")
    subject, visit = session
    return TrainingCase(
        name=f"sub-{subject}" + (f"_ses-{visit}" if visit else ""),
        images=chosen,
        segmentation=ImageFile(tumors[0].path) if tumors else None,
        subject=f"sub-{subject}",
        session=visit,
        structures=ImageFile(anatomies[0].path) if anatomies else None,
        layout="bids",
        notes=tuple(notes),
    )


def _what(image: _Image) -> str:
    """What a label map shows, as far as its name tells."""
    return image.entities.get("seg") or image.entities.get("desc") or ""


def _is_tumor(image: _Image) -> bool:
    what = _what(image)
    return bool(_TUMOR.search(what)) if what else not _TISSUE_PIPELINES.match(image.pipeline)
