"""Cases listed in a CSV or JSON manifest.

CSV: a header and one row a case. Columns: ``case``, one a modality (t1, t1ce, t2, flair) and, where there are any,
``seg`` (tumour labels), ``labels`` (what its values mean: ``1=edema 2=necrotic_or_nonenhancing_core``),
``structures`` (anatomical labels), ``numbering`` of these (freesurfer or seg35), ``landmarks`` (CSV), ``subject`` and
``session``. Paths are relative to the manifest's folder; ``path::2`` is volume 2, counted from 0, of a 4-D file.
JSON: a list of objects with the same keys.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from jrs.errors import BadDataError, MissingInputError
from jrs.files import write_text
from jrs.manifest import MODALITIES
from jrs.train.datasets.case import ImageFile, Numbering, TrainingCase

COLUMNS = ("case", "subject", "session", *MODALITIES, "seg", "labels", "structures", "numbering", "landmarks")


def load_manifest(path: Path) -> list[TrainingCase]:
    """Read a manifest and check that every file is there; raises BadDataError naming the row."""
    if not path.is_file():
        raise MissingInputError(
            f"{path}: no such folder or manifest; give a folder of cases, or a CSV or JSON file with columns case, t1, "
            "..., seg"
        )
    try:
        text = path.read_text(encoding="utf-8-sig")
        rows: Any = json.loads(text) if path.suffix.lower() == ".json" else list(csv.DictReader(io.StringIO(text)))
    except (OSError, UnicodeDecodeError, ValueError, csv.Error) as error:
        raise BadDataError(f"{path}: is not a CSV or JSON manifest ({error})") from error
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise BadDataError(f"{path}: lists no case; write a header (case, t1, ..., seg) and one row a case")
    cases = []
    for number, row in enumerate(rows, start=1):
        case = case_of_row(row, path.parent, f"{path}: row {number}", f"row-{number}")
        for file in [*(image.path for image in case.files().values()), case.landmarks]:
            if file is not None and not file.is_file():
                raise MissingInputError(f"{file}: no such file (row {number}, case {case.name} of {path})")
        cases.append(case)
    return cases


def case_of_row(row: dict[str, Any], folder: Path, where: str, name: str = "") -> TrainingCase:
    """One row as a case; ``where`` names it in an error, ``name`` is the case's if the row has none."""
    if None in row:
        raise BadDataError(f"{where} has more cells than the header; quote commas in paths")
    unknown = [key for key in row if key not in COLUMNS]
    if unknown:
        raise BadDataError(f"{where}: column {unknown[0]!r} is unknown; known are {', '.join(COLUMNS)}")
    name = str(row.get("case") or name)
    files = {key: ImageFile.parse(str(row[key]), folder) for key in (*MODALITIES, "seg", "structures") if row.get(key)}
    segmentation, structures = files.pop("seg", None), files.pop("structures", None)
    if not files:
        raise BadDataError(f"{where}, case {name}, names no image; fill one of {', '.join(MODALITIES)}")
    by_name = "seg35" if structures is not None and "seg35" in structures.path.name else "freesurfer"
    numbering: Any = row.get("numbering") or by_name
    if numbering not in get_args(Numbering):
        raise BadDataError(f"{where}: numbering {numbering!r} is unknown; known are {', '.join(get_args(Numbering))}")
    return TrainingCase(
        name=name,
        images=files,
        segmentation=segmentation,
        # A row's number tells nobody's identity.
        subject=str(row.get("subject") or row.get("case") or next(iter(files.values()))),
        session=str(row["session"]) if row.get("session") else None,
        tumor_classes=_classes(row["labels"], where) if row.get("labels") else None,
        structures=structures,
        numbering=numbering,
        landmarks=folder / str(row["landmarks"]) if row.get("landmarks") else None,
    )


def _classes(value: Any, where: str) -> dict[int, str]:
    """``1=edema 2=...``, or in JSON also an object from value to name."""
    pairs = value.items() if isinstance(value, dict) else (part.partition("=")[::2] for part in str(value).split())
    classes = {}
    for number, name in pairs:
        if not str(number).isdigit() or not name:
            raise BadDataError(f"{where}: labels {value!r} cannot be read; write them like 1=edema 3=enhancing_tumor")
        classes[int(number)] = str(name)
    return classes


def row_of_case(case: TrainingCase, folder: Path | None = None) -> dict[str, str]:
    """A case as a row; paths below ``folder`` are relative to it, all others absolute."""

    def written(path: Path) -> str:
        absolute = path.absolute()
        if folder is not None and absolute.is_relative_to(folder.absolute()):
            return absolute.relative_to(folder.absolute()).as_posix()
        return str(absolute)

    row = {"case": case.name, "subject": case.subject, "session": case.session or ""}
    for role, file in case.files().items():
        row[role] = str(ImageFile(Path(written(file.path)), file.volume))
    row["labels"] = " ".join(f"{value}={name}" for value, name in (case.tumor_classes or {}).items())
    row["numbering"] = case.numbering if case.structures is not None else ""
    row["landmarks"] = written(case.landmarks) if case.landmarks is not None else ""
    return {key: row.get(key, "") for key in COLUMNS}


def write_manifest(path: Path, cases: Sequence[TrainingCase]) -> None:
    """Write cases as a CSV or, by its ending, JSON manifest, whole or not at all; empty columns are left out."""
    rows = [row_of_case(case, path.parent) for case in cases]
    used = [column for column in COLUMNS if column == "case" or any(row[column] for row in rows)]
    if path.suffix.lower() == ".json":
        text = json.dumps([{k: row[k] for k in used if row[k]} for row in rows], indent=2, ensure_ascii=False) + "\n"
    else:
        stream = io.StringIO()
        writer = csv.DictWriter(stream, used, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        text = stream.getvalue()
    write_text(path, text)
