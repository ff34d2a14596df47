"""BIDS: whether a case lies in a dataset, and what makes the output folder a derivative dataset.

Names and metadata follow the Brain Imaging Data Structure, https://bids-specification.readthedocs.io.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jrs import __version__
from jrs.errors import UsageError
from jrs.files import write_json, write_text

BIDS_VERSION = "1.10.0"
MOVED = "moved"
"""The ``desc`` entity of an image that was moved onto an atlas, in BIDS and beside it."""
DESCRIPTION = "dataset_description.json"
IGNORE = ".bidsignore"
RAW = "raw"
"""What sidecars call the dataset that the case comes from, as in ``bids:raw:sub-01/anat/sub-01_T1w.nii.gz``."""

_README = f"""# Registration to an atlas and tumour segmentation

Made by jrs {__version__} from the raw dataset that `{DESCRIPTION}` names. Each subject's folder holds a report
(`*_report.html`, `*_report.json`), tumour labels (`*_dseg.nii.gz`), the images moved to the atlas
(`*_desc-moved_*.nii.gz`) and the transforms (`*_xfm.nii.gz`). Not a medical device: for research use only.
"""

_ENDING = re.compile(r"\.(nii|nii\.gz)$", re.IGNORECASE)
_ENTITY = re.compile(r"([a-z]+)-([0-9A-Za-z+]+)")
_REPLACED = ("space", "res", "den", "label", "seg", "desc")  # what an output says anew


@dataclass(frozen=True)
class BidsSource:
    """A case's place in a BIDS dataset.

    ``root`` is the dataset's folder, ``folder`` the case's in it (``sub-01/ses-1/anat``), ``prefix`` the entities
    that all of its images share (``sub-01_ses-1``), ``files`` the name of each modality's file.
    """

    root: Path
    folder: Path
    prefix: str
    files: Mapping[str, str]

    def uri(self, modality: str) -> str:
        """The BIDS URI of a modality's file."""
        return f"bids:{RAW}:{(self.folder / self.files[modality]).as_posix()}"


def bids_source(paths: Mapping[str, Path | None]) -> BidsSource | None:
    """Where images by modality lie in a BIDS dataset; None if they do not all lie in one ``anat`` folder of one."""
    # The folder is resolved, the file is not: in an annexed dataset it is a link to somewhere else.
    files = {modality: path.parent.resolve() / path.name for modality, path in paths.items() if path is not None}
    folders = {file.parent for file in files.values()}
    if len(files) < len(paths) or len(folders) != 1 or len(set(files.values())) < len(files):
        return None
    folder = folders.pop()
    session = folder.parent if folder.parent.name.startswith("ses-") else None
    subject = folder.parent if session is None else session.parent
    expected = [name for name in (subject.name, session.name if session else None) if name]
    root = subject.parent
    if folder.name != "anat" or not subject.name.startswith("sub-") or not (root / DESCRIPTION).is_file():
        return None
    entities = [_entities(file.name) for file in files.values()]
    if any(found is None or list(found[0])[: len(expected)] != expected for found in entities):
        return None
    shared = [part for part in entities[0][0] if all(part in found[0] for found in entities if found)]  # type: ignore[index]
    shared = [part for part in shared if part.split("-")[0] not in ("ce", *_REPLACED)]
    names = {modality: file.name for modality, file in files.items()}
    return BidsSource(root, folder.relative_to(root), "_".join(shared), names)


def _entities(name: str) -> tuple[list[str], str] | None:
    """The entities and the suffix of a BIDS file name; None if it is not one."""
    *parts, suffix = _ENDING.sub("", name).split("_")
    if not parts or not _ENDING.search(name) or not suffix.isalnum():
        return None
    return (parts, suffix) if all(_ENTITY.fullmatch(part) for part in parts) else None


def derived(name: str, **entities: str) -> str:
    """The stem of an output's name: the source's entities and suffix with ``entities`` before the suffix.

    >>> derived("sub-01_ce-gadolinium_desc-preproc_T1w.nii.gz", space="sri24", desc="moved")
    'sub-01_ce-gadolinium_space-sri24_desc-moved_T1w'
    """
    *parts, suffix = _ENDING.sub("", name).split("_")
    kept = [part for part in parts if part.split("-")[0] not in _REPLACED]
    return "_".join([*kept, *(f"{key}-{value}" for key, value in entities.items()), suffix])


def describe_dataset(out: Path, source: BidsSource, ignored: Sequence[str]) -> None:
    """Make ``out`` a BIDS derivative of the case's dataset; what is there already stays.

    ``ignored`` are the patterns for ``.bidsignore``. Raises UsageError if ``out`` is the dataset itself or
    another raw one.
    """
    refuse_raw(out, source)
    if not (out / DESCRIPTION).exists():
        write_json(out / DESCRIPTION, dataset_description(out, source))
    if not any(out.glob("README*")):
        write_text(out / "README.md", _README)
    there = (out / IGNORE).read_text(encoding="utf-8").splitlines() if (out / IGNORE).is_file() else []
    missing = [pattern for pattern in ignored if pattern not in there]
    if missing:
        write_text(out / IGNORE, "\n".join([*there, *missing]) + "\n")


def refuse_raw(out: Path, source: BidsSource) -> None:
    """Raise UsageError if ``out`` is a raw BIDS dataset: derivatives have a folder of their own."""
    if not (out / DESCRIPTION).is_file():
        return
    try:
        found = json.loads((out / DESCRIPTION).read_text(encoding="utf-8"))
        derivative = isinstance(found, dict) and found.get("DatasetType", RAW) == "derivative"
    except ValueError:
        derivative = False
    if not derivative or out.resolve() == source.root.resolve():
        proposed = source.root / "derivatives" / "jrs"
        raise UsageError(f"{out}: is a raw BIDS dataset and results go elsewhere; pass --out {proposed}")


def dataset_description(out: Path, source: BidsSource) -> dict[str, Any]:
    """``dataset_description.json`` of the derivative, its links relative where the datasets lie together."""
    there, here = source.root.resolve(), out.resolve()
    link = os.path.relpath(there, here) if there in here.parents else there.as_uri()
    return {
        "Name": "jrs: registration to an atlas and tumour segmentation",
        "BIDSVersion": BIDS_VERSION,
        "DatasetType": "derivative",
        "GeneratedBy": [{"Name": "jrs", "Version": __version__}],
        "SourceDatasets": [{"URL": link}],
        "DatasetLinks": {RAW: link},
    }
