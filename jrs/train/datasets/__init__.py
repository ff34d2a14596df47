"""Where cases come from: folders of every common layout, and manifests, each as a list of `TrainingCase`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Literal, get_args

from jrs.errors import BadDataError, MissingInputError, UsageError
from jrs.headers import shown
from jrs.train.datasets import bids, brats, freesurfer, msd
from jrs.train.datasets.case import ImageFile, TrainingCase
from jrs.train.datasets.manifest import load_manifest

Layout = Literal["auto", "brats", "msd", "bids", "freesurfer", "manifest"]
LAYOUTS: tuple[str, ...] = get_args(Layout)

_FOLDERS: dict[str, tuple[Callable[[Path], bool], Callable[[Path], list[TrainingCase]]]] = {
    # The order of asking: the more particular first.
    "msd": (msd.recognized, msd.find),
    "bids": (bids.recognized, bids.find),
    "freesurfer": (freesurfer.recognized, freesurfer.find),
    "brats": (brats.recognized, brats.find),
}


def find_cases(path: Path, layout: str = "auto") -> list[TrainingCase]:
    """The cases of a folder, a manifest or a cache, in the order of their names; nothing but names is looked at.

    ``layout`` is one of `LAYOUTS`; ``auto`` takes a file for a manifest and tells a folder by what lies in it. A
    cache (`jrs.train.cache`) gives the cases that it was prepared from.
    Raises MissingInputError where there is no case, UsageError for an unknown layout, BadDataError for a bad
    manifest and for a name that two cases share.
    """
    path = Path(path)
    if layout not in LAYOUTS:
        raise UsageError(f"layout {layout!r} is unknown; choose from {', '.join(LAYOUTS)}")
    if layout == "manifest" or (layout == "auto" and not path.is_dir()):
        return _unique(path, load_manifest(path))
    if not path.is_dir():
        raise MissingInputError(f"{shown(path)}: no such folder; layout {layout} is a folder of cases")
    from jrs.train.cache import Cache  # which itself speaks of cases

    if layout == "auto" and Cache.is_one(path):
        return Cache.open(path).cases()
    kind = detect_layout(path) if layout == "auto" else layout
    cases = _FOLDERS[kind][1](path)
    if not cases:
        raise MissingInputError(f"{shown(path)}: holds no case of layout {kind}; check the folder or pass --layout")
    return _unique(path, cases)


def detect_layout(folder: Path) -> str:
    """Which layout a folder has; raises MissingInputError if it looks like none."""
    for kind, (recognized, _) in _FOLDERS.items():
        if recognized(folder):
            return kind
    raise MissingInputError(
        f"{shown(folder)}: holds no case of a layout that jrs knows ({', '.join(_FOLDERS)}); "
        "check the folder, or list its files in a CSV manifest"
    )


def _unique(path: Path, cases: list[TrainingCase]) -> list[TrainingCase]:
    twice = [name for name, count in Counter(case.name for case in cases).items() if count > 1]
    if twice:
        raise BadDataError(f"{shown(path)}: {len(twice)} names stand for two cases ({twice[0]}); rename one of each")
    return cases


__all__ = ["LAYOUTS", "ImageFile", "Layout", "TrainingCase", "detect_layout", "find_cases", "load_manifest"]
