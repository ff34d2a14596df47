"""What a case's results were made from, by which those that are there already are known again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from jrs.gzipped import crc32
from jrs.runtime.cases import Case
from jrs.runtime.options import AFFINES, InferOptions
from jrs.runtime.transform_files import load_affine
from jrs.volume import Volume


def recipe(moving: Case, fixed: Case, options: InferOptions, scheme: str | None) -> dict[str, Any]:
    """The checksums of the images of both sides and the options, as JSON; ``scheme`` is None without labels.

    Raises MissingInputError or BadDataError for an affine that cannot be read.
    """
    affine = options.affine
    if affine not in AFFINES:
        affine = _checksum_of(load_affine(Path(affine)))
    return {
        "images": {name: _checksum(volume) for name, volume in moving.images.items()},
        "atlas": {name: _checksum(volume) for name, volume in fixed.images.items()},
        "options": {
            "affine": affine,
            "inverse": options.inverse,
            "label_scheme": scheme,
            "refine": options.refine,
            "same_patient": options.same_patient,
        },
    }


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """In what two recipes differ, in words; empty where they are one."""
    found = []
    for part, words in (("images", "image"), ("atlas", "atlas"), ("options", "option")):
        ours, theirs = one.get(part) or {}, other.get(part) or {}
        names = [name for name in {**ours, **theirs} if ours.get(name, ...) != theirs.get(name, ...)]
        if names:
            found.append(f"{words} {', '.join(names)}")
    return found


def _checksum(volume: Volume) -> str:
    """Of the voxels and of where they lie."""
    return _checksum_of(volume.data, volume.geometry.affine)


def _checksum_of(*arrays: npt.NDArray[Any]) -> str:
    value = 0
    for array in arrays:
        value = crc32(np.ascontiguousarray(array), value)
    return f"{value:08x}"
