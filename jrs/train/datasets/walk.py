"""Going through folders of data: in the order of names, hidden files left out."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

from jrs.errors import MissingInputError
from jrs.headers import shown
from jrs.runtime.cases import IMAGE_FILE

DEPTH = 4
"""Folders below the one that was given in which cases are looked for (BraTS2018/Training/HGG/case)."""


def folders_below(root: Path, depth: int = DEPTH) -> Iterator[tuple[Path, list[str], list[str]]]:
    """Each folder with the names of its folders and files; the caller may take out folders not to go into.

    Links to folders are followed. Raises MissingInputError for a folder that cannot be read.
    """
    def refuse(error: OSError) -> None:
        reason = error.strerror or error
        raise MissingInputError(f"{shown(error.filename or root)}: cannot be read ({reason}); change its permissions")

    top = len(root.parts)
    for folder, folders, files in os.walk(root, onerror=refuse, followlinks=True):
        here = Path(folder)
        # Hidden: macOS leaves ._ twins of every image on foreign disks.
        folders[:] = sorted(n for n in folders if not n.startswith(".")) if len(here.parts) - top < depth else []
        yield here, folders, sorted(n for n in files if not n.startswith("."))


def stem_of(name: str) -> str:
    """An image's file name without its ending."""
    return IMAGE_FILE.sub("", name)


def first_image(folder: Path, names: list[str], *stems: str) -> Path | None:
    """The image whose name without its ending is one of ``stems``, the first of them that is there."""
    by_stem = {stem_of(name): name for name in reversed(names) if IMAGE_FILE.search(name)}
    return next((folder / by_stem[stem] for stem in stems if stem in by_stem), None)


def made_by_jrs(image: Path) -> bool:
    """Whether a file is what ``jrs infer`` made of images, by its sidecar: nothing to learn from."""
    try:
        sidecar = json.loads((image.parent / f"{stem_of(image.name)}.json").read_text(encoding="utf-8"))
        return any(made["Name"] == "jrs" for made in sidecar["GeneratedBy"])
    except (OSError, ValueError, KeyError, TypeError):
        return False
