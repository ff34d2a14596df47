"""Anatomical labels (FreeSurfer's numbers) and the tissue each belongs to."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

TISSUES = ("background", "white_matter", "cortex", "deep_grey", "csf", "cerebellar_cortex", "brain_stem")

_PAIRED = {
    "cerebral_white_matter": (2, 41, "white_matter"),
    "cerebral_cortex": (3, 42, "cortex"),
    "lateral_ventricle": (4, 43, "csf"),
    "cerebellar_white_matter": (7, 46, "white_matter"),
    "cerebellar_cortex": (8, 47, "cerebellar_cortex"),
    "thalamus": (10, 49, "deep_grey"),
    "caudate": (11, 50, "deep_grey"),
    "putamen": (12, 51, "deep_grey"),
    "pallidum": (13, 52, "deep_grey"),
    "hippocampus": (17, 53, "deep_grey"),
    "amygdala": (18, 54, "deep_grey"),
    "accumbens": (26, 58, "deep_grey"),
    "ventral_diencephalon": (28, 60, "deep_grey"),
}
_MIDLINE = {
    "third_ventricle": (14, "csf"),
    "fourth_ventricle": (15, "csf"),
    "brain_stem": (16, "brain_stem"),
    "csf": (24, "csf"),
}
# Small labels that are drawn but not scored: too small, or not in every subject.
_UNSCORED = {
    "white_matter": (25, 57, 77, 78, 79, 85, 251, 252, 253, 254, 255),
    "csf": (5, 44, 30, 62, 72),
    "deep_grey": (31, 63, 80, 136, 137, 163, 164),
}

STRUCTURES: dict[str, int] = {
    **{f"left_{name}": left for name, (left, _, _) in _PAIRED.items()},
    **{f"right_{name}": right for name, (_, right, _) in _PAIRED.items()},
    **{name: number for name, (number, _) in _MIDLINE.items()},
}
"""The 30 structures that Dice is measured on: name to FreeSurfer number, in the order of the compact index 1..30."""

SEG35 = (
    *(2, 3, 4, 5, 7, 8, 10, 11, 12, 13, 14, 15, 16, 17, 18, 26, 28, 30, 31),
    *(41, 42, 43, 44, 46, 47, 49, 50, 51, 52, 53, 54, 58, 60, 62, 63),
)
"""FreeSurfer number of each label 1..35 of ``seg35`` in the neurite OASIS release: FreeSurfer's own order, no CSF."""

FIRST_EXTRACEREBRAL = 500
"""Labels from here on (skull, scalp, eyes) lie outside the brain."""

_CHOROID_PLEXUS = (31, 63)
_EXTRACEREBRAL = (502, 506, 507, 508, 509, 511, 512, 514, 515, 516, 530)
DRAWN_CLASSES = (*TISSUES, "choroid_plexus", *(f"extracerebral_{number}" for number in _EXTRACEREBRAL))
"""What images are drawn from: the tissues of the brain first, then what is only drawn."""


def compact_tables() -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """Two tables over FreeSurfer numbers 0..1023: to the structure index (0 = none) and to the tissue index."""
    structure, tissue = np.zeros(1024, dtype=np.uint8), np.zeros(1024, dtype=np.uint8)
    for index, number in enumerate(STRUCTURES.values(), start=1):
        structure[number] = index
    for left, right, kind in _PAIRED.values():
        tissue[[left, right]] = TISSUES.index(kind)
    for number, kind in _MIDLINE.values():
        tissue[number] = TISSUES.index(kind)
    for kind, numbers in _UNSCORED.items():
        tissue[list(numbers)] = TISSUES.index(kind)
    return structure, tissue


def drawing_table() -> npt.NDArray[np.uint8]:
    """A table over FreeSurfer numbers 0..1023 to the index in ``DRAWN_CLASSES``, the head around the brain included.

    Extra-cerebral numbers that are not named count as the soft tissue around the skull (507).
    """
    table = compact_tables()[1]
    table[list(_CHOROID_PLEXUS)] = DRAWN_CLASSES.index("choroid_plexus")
    table[FIRST_EXTRACEREBRAL:] = DRAWN_CLASSES.index("extracerebral_507")
    for number in _EXTRACEREBRAL:
        table[number] = DRAWN_CLASSES.index(f"extracerebral_{number}")
    return table


def mirrored_structures() -> npt.NDArray[np.uint8]:
    """Table (31,) from a structure's compact index to the one it is in a mirror: left to right and back."""
    names = list(STRUCTURES)
    table = [0]
    for name in names:
        side, _, rest = name.partition("_")
        other = {"left": f"right_{rest}", "right": f"left_{rest}"}.get(side, name)
        table.append(names.index(other) + 1)
    return np.array(table, dtype=np.uint8)
