"""FreeSurfer's subject folders and the OASIS releases made with it: a skull-stripped T1 and its anatomical labels.

``<subject>/mri/norm.mgz`` with ``aseg.mgz``, or both flat in the subject's folder, as the neurite release of OASIS
has them (``OASIS_OAS1_0001_MR1/norm.nii.gz`` with ``seg35.nii.gz``, or ``aligned_norm`` with ``aligned_seg35``).
"""

from __future__ import annotations

import re
from pathlib import Path

from jrs.train.datasets.case import ImageFile, Numbering, TrainingCase
from jrs.train.datasets.walk import first_image, folders_below

# Images, then labels that go with them and their numbering; the first pair with an image is taken.
_PAIRS: tuple[tuple[tuple[str, ...], tuple[tuple[str, Numbering], ...]], ...] = (
    (("norm", "brain"), (("aseg", "freesurfer"), ("seg35", "seg35"))),
    (("aligned_norm",), (("aligned_aseg", "freesurfer"), ("aligned_seg35", "seg35"))),
)
_SUBJECTS = (
    re.compile(r"^(OASIS_)?(?P<subject>OAS[12]_\d{4})_(?P<session>MR\d+)"),
    re.compile(r"^(OASIS_)?(?P<subject>OAS[34]\d{4,})_(?P<session>(MR_)?d\d+)"),
    re.compile(r"^(?P<subject>sub-[A-Za-z0-9]+)_(?P<session>ses-[A-Za-z0-9]+)"),
    # FreeSurfer's longitudinal stream: <session>.long.<subject's template>
    re.compile(r"^(?P<session>.+)\.long\.(?P<subject>.+)$"),
)
_TEMPLATES = re.compile(r"^(fsaverage.*|cvs_avg.*|[lr]h\.EC_average)$")


def recognized(folder: Path) -> bool:
    """Whether a folder below is a subject's, or this one."""
    return bool(_find(folder, first=True))


def find(folder: Path) -> list[TrainingCase]:
    """The cases below a folder, in the order of their names."""
    return sorted(_find(folder), key=lambda case: case.name)


def _find(folder: Path, first: bool = False) -> list[TrainingCase]:
    cases: list[TrainingCase] = []
    for here, folders, names in folders_below(folder):
        subject = here.parent if here.name == "mri" else here
        case = None if _TEMPLATES.match(subject.name) else _case(subject, here, names)
        if case is not None:
            cases.append(case)
            folders.clear()
            if first:
                break
    return cases


def subject_of(name: str) -> tuple[str, str | None]:
    """Subject and session that a folder's name tells; OAS1_0001_MR1 and OAS1_0001_MR2 are one subject.

    >>> subject_of("OASIS_OAS1_0001_MR1"), subject_of("bert")
    (('OAS1_0001', 'MR1'), ('bert', None))
    """
    for pattern in _SUBJECTS:
        match = pattern.match(name)
        if match:
            return match["subject"], match["session"]
    return name, None


def _case(subject: Path, folder: Path, names: list[str]) -> TrainingCase | None:
    for images, labels in _PAIRS:
        image = first_image(folder, names, *images)
        if image is None:
            continue
        found = [(path, kind) for stem, kind in labels if (path := first_image(folder, names, stem)) is not None]
        structures, numbering = found[0] if found else (None, "freesurfer")
        name = subject.resolve().name
        whose, session = subject_of(name)
        return TrainingCase(
            name=name,
            images={"t1": ImageFile(image)},
            subject=whose,
            session=session,
            structures=None if structures is None else ImageFile(structures),
            numbering="seg35" if numbering == "seg35" else "freesurfer",
            layout="freesurfer",
        )
    return None
