"""What is wrong with a cohort, case by case, before hours are spent on it.

Headers alone tell missing and cut-off files, grids that differ and odd voxel sizes; with ``deep`` every voxel is read
as training would read it.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, Literal

import numpy as np

from jrs.errors import BadDataError, JrsError
from jrs.geometry import Geometry
from jrs.headers import ImageHeader, one_line, read_header
from jrs.manifest import MODALITIES, ModelSpec
from jrs.train.datasets.case import ENHANCING, ImageFile, TrainingCase, class_table, tumor_classes
from jrs.train.pool import for_each
from jrs.train.preparing import structure_codes, voxel_hash
from jrs.train.splits import repeated_images

Level = Literal["error", "warning", "note"]

_SAME_MM = 1e-2
_SMALL_MM, _LARGE_MM, _ANISOTROPY = 0.4, 3.5, 4.0
_SHORT_MM, _LONG_MM = 90.0, 400.0
# Behind the voxels of an honest gzip: tags of MGH, padding.
_TAIL_BYTES = 1024**2
_FEW_QUICK = 64
_LEAST_ML = 50.0  # a newborn's brain has 300


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong: ``error`` makes a case unusable, ``warning`` should be looked at."""

    level: Level
    text: str


@dataclass(frozen=True)
class CaseReport:
    """One case: what was found, and what its files are.

    ``values`` counts the voxels of each tumour label (deep only); ``content`` are hashes by which copies are found.
    """

    case: TrainingCase
    findings: tuple[Finding, ...]
    shape: tuple[int, int, int] | None = None
    spacing: tuple[float, float, float] | None = None
    values: dict[int, int] | None = None
    content: tuple[str, ...] = ()

    @property
    def usable(self) -> bool:
        """Whether nothing is an error."""
        return all(finding.level != "error" for finding in self.findings)


@dataclass(frozen=True)
class ScanReport:
    """All cases, and what only the whole cohort shows."""

    cases: tuple[CaseReport, ...]
    cohort: tuple[Finding, ...]
    deep: bool

    @property
    def usable(self) -> list[TrainingCase]:
        """The cases without an error."""
        return [report.case for report in self.cases if report.usable]

    def as_json(self) -> dict[str, Any]:
        """Plain values for a JSON file."""
        return {
            "deep": self.deep,
            "usable": len(self.usable),
            "cohort": [{"level": f.level, "text": f.text} for f in self.cohort],
            "cases": [_as_json(report) for report in self.cases],
        }


def _as_json(report: CaseReport) -> dict[str, Any]:
    case = report.case
    return {
        "case": case.name,
        "subject": case.subject,
        "session": case.session,
        "layout": case.layout,
        "files": {role: str(file) for role, file in case.files().items()},
        "landmarks": None if case.landmarks is None else str(case.landmarks),
        "labels": None if case.tumor_classes is None else {str(v): name for v, name in case.tumor_classes.items()},
        "shape": report.shape,
        "spacing_mm": report.spacing,
        "tumor_voxels": None if report.values is None else {str(v): n for v, n in report.values.items()},
        "usable": report.usable,
        "findings": [{"level": f.level, "text": f.text} for f in report.findings],
    }


def scan_cases(
    cases: Sequence[TrainingCase],
    *,
    deep: bool = False,
    required: Sequence[str] = (),
    workers: int = 1,
    done: Callable[[CaseReport], None] = lambda report: None,
) -> ScanReport:
    """Look at every case, ``workers`` at a time; a case that lacks one of the ``required`` modalities is unusable."""
    look = partial(scan_case, deep=deep)
    # Headers of a few cases are read before another process would have started.
    reports = for_each(look, cases, workers if deep or len(cases) > _FEW_QUICK else 1, done)
    if not deep:
        content = repeated_images(cases)
        reports = [replace(report, content=tuple(content.get(report.case.name, ()))) for report in reports]
    expected = {m for m in MODALITIES if any(m in case.images for case in cases)}
    reports = [_with(report, _missing(report.case, expected, set(required))) for report in reports]
    reports = _with_copies(reports)
    return ScanReport(tuple(reports), tuple(_of_the_cohort(reports)), deep)


# One case -------------------------------------------------------------------------------------------------


def scan_case(case: TrainingCase, deep: bool = False) -> CaseReport:
    """Look at one case; nothing that its files can do is raised."""
    findings = [Finding("note", note) for note in case.notes]
    if not case.images:
        findings.append(Finding("error", "has no image"))
    headers: dict[str, ImageHeader] = {}
    for role, file in case.files().items():
        try:
            headers[role] = _header(file)
        except JrsError as error:
            findings.append(Finding("error", f"{role}: {error}"))
        else:
            findings += [Finding("note", f"{role}: {note}") for note in headers[role].notes]
    findings += _grids({role: header.geometry for role, header in headers.items()})
    if case.landmarks is not None and not case.landmarks.is_file():
        findings.append(Finding("error", f"landmarks: {case.landmarks}: no such file"))
    values: dict[int, int] | None = None
    content: tuple[str, ...] = ()
    if deep and len(headers) == len(case.files()):
        values, content, more = _voxels(case)
        # The readers' notes repeat those of the headers.
        findings += [finding for finding in more if finding not in findings]
    first = next((headers[role].geometry for role in case.images if role in headers), None)
    return CaseReport(
        case,
        tuple(findings),
        None if first is None else first.shape,
        None if first is None else first.spacing,
        values,
        content,
    )


def _header(file: ImageFile) -> ImageHeader:
    """The header, and of a gzip file also whether its end is there."""
    with one_line(file.path):
        header = read_header(file.path)
        if (file.volume or 0) >= header.channels:
            raise BadDataError(f"{file}: has {header.channels} volumes")
        if file.volume is None and header.channels > 1:
            raise BadDataError(f"{file}: is 4-D with {header.channels} volumes; name one as path::index")
        if not _ends_as_it_should(header):
            _read_through(file.path)
    return header


def _ends_as_it_should(header: ImageHeader) -> bool:
    """A gzip file ends in the length of its content (modulo 2^32); one that was cut off, in anything."""
    with header.data_path.open("rb") as stream:
        if stream.read(2) != b"\x1f\x8b":
            return True
        stream.seek(-4, 2)
        length = int.from_bytes(stream.read(4), "little")
    needed = header.offset + prod(header.geometry.shape) * header.channels * header.dtype.itemsize
    return (length - needed) % 2**32 <= _TAIL_BYTES


def _read_through(path: Path) -> None:
    """Read a gzip file to its end, where it fails if it was cut off; several members in one file are no fault."""
    import gzip

    with gzip.open(path, "rb") as stream:
        try:
            while stream.read(1 << 20):
                pass
        except (EOFError, zlib.error) as error:
            raise BadDataError(f"{path}: is cut off or damaged ({error}); copy, download or export it again") from error


def _grids(geometries: dict[str, Geometry]) -> list[Finding]:
    """Grids of one case that differ, voxel sizes and fields of view that are no brain's."""
    if not geometries:
        return []
    findings = []
    (first, reference), *others = geometries.items()
    for role, geometry in others:
        if geometry.shape != reference.shape:
            shapes = f"{'x'.join(map(str, geometry.shape))}, {first} {'x'.join(map(str, reference.shape))}"
            findings.append(Finding("warning", f"grids differ: {role} has {shapes} voxels"))
        elif (gap := float(np.abs(geometry.corners() - reference.corners()).max())) > _SAME_MM:
            findings.append(Finding("warning", f"grids differ: {role} lies up to {gap:.2f} mm from {first}"))
        if not _overlap(geometry, reference):
            findings.append(Finding("error", f"{role} and {first} lie in different places and do not overlap"))
    spacing, shape = np.array(reference.spacing), np.array(reference.shape)
    text = " x ".join(f"{s:.3g}" for s in spacing)
    if spacing.min() < _SMALL_MM or spacing.max() > _LARGE_MM or spacing.max() / spacing.min() > _ANISOTROPY:
        findings.append(Finding("warning", f"odd voxel size {text} mm"))
    extent = spacing * shape
    if extent.min() < _SHORT_MM or extent.max() > _LONG_MM:
        span = " x ".join(f"{e:.0f}" for e in extent)
        findings.append(Finding("warning", f"odd field of view, {span} mm"))
    return findings


def _overlap(one: Geometry, other: Geometry) -> bool:
    a, b = one.corners(), other.corners()
    return bool((np.minimum(a.max(axis=0), b.max(axis=0)) > np.maximum(a.min(axis=0), b.min(axis=0))).all())


def _voxels(case: TrainingCase) -> tuple[dict[int, int] | None, tuple[str, ...], list[Finding]]:
    """Read everything as training would: tumour labels and their counts, hashes of the images, findings."""
    findings: list[Finding] = []
    values, content = None, []
    try:
        for modality, volume in case.read_images().items():
            content.append(voxel_hash(volume.data))
            # A damaged part of the image is worth a look; what the header said has been told.
            findings += [
                Finding("warning" if "NaN" in note else "note", f"{modality}: {note}") for note in volume.notes
            ]
            if volume.foreground_ml < _LEAST_ML:
                text = f"{modality}: only {volume.foreground_ml:.0f} ml are above zero, no brain is in it"
                findings.append(Finding("error", text))
            elif (note := volume.unstripped) is not None:
                findings.append(Finding("warning", f"{modality}: {note}"))
    except JrsError as error:
        findings.append(Finding("error", str(error)))
    if case.segmentation is not None:
        try:
            values = _tumor_values(case, case.segmentation)
        except JrsError as error:
            findings.append(Finding("error", f"seg: {error}"))
        else:
            if not any(values.values()):
                findings.append(Finding("warning", "seg: holds no tumour"))
    if case.structures is not None:
        try:
            structure_codes(case, case.structures.read(labels=True))
        except JrsError as error:
            findings.append(Finding("error", f"structures: {error}"))
    return values, tuple(content), findings


def _tumor_values(case: TrainingCase, file: ImageFile) -> dict[int, int]:
    """Voxels of each label but 0; raises BadDataError for one that no model with the BraTS classes knows."""
    default = ModelSpec()
    data = file.read(labels=True).data
    found, counts = np.unique(data, return_counts=True)
    try:
        tumor_classes(data, class_table(case, default.labels, default.label_values), file)
    except BadDataError as error:
        listed = ", ".join(f"{v} ({n})" for v, n in zip(found, counts, strict=True) if v)
        raise BadDataError(f"{error}; the file holds {listed}") from error
    return {int(v): int(n) for v, n in zip(found, counts, strict=True) if v}


# All cases ------------------------------------------------------------------------------------------------


def _with(report: CaseReport, findings: Iterable[Finding]) -> CaseReport:
    return replace(report, findings=(*report.findings, *findings))


def _missing(case: TrainingCase, expected: set[str], required: set[str]) -> list[Finding]:
    findings = []
    for modality in MODALITIES:
        if modality in case.images or not case.images:
            continue
        if modality in required:
            findings.append(Finding("error", f"lacks {modality}"))
        elif modality in expected:
            findings.append(Finding("warning", f"lacks {modality}, which others have"))
    return findings


def _with_copies(reports: list[CaseReport]) -> list[CaseReport]:
    """Name the cases that hold the same image as one before them."""
    first: dict[str, CaseReport] = {}
    result = []
    for report in reports:
        findings = {}
        for digest in report.content:
            original = first.setdefault(digest, report)
            if original is not report:
                whose = "the same subject" if original.case.subject == report.case.subject else "another subject"
                text = f"holds the same image as {original.case.name}, of {whose}"
                findings[original.case.name] = Finding("warning", text)
        result.append(_with(report, findings.values()))
    return result


def _of_the_cohort(reports: Sequence[CaseReport]) -> list[Finding]:
    findings = []
    sessions: dict[str, list[str]] = {}
    for report in reports:
        sessions.setdefault(report.case.subject, []).append(report.case.name)
    several = {subject: names for subject, names in sessions.items() if len(names) > 1}
    if several:
        subject, names = next(iter(several.items()))
        example = f"{subject}: {', '.join(names[:3])}"
        text = f"{len(several)} subjects have several cases ({example}); splits keep them together"
        findings.append(Finding("note", text))
    enhancing: dict[int, list[str]] = {}
    for report in reports:
        for value in report.values or ():
            classes = report.case.tumor_classes
            if value in (3, 4) and (classes is None or classes.get(value) == ENHANCING):
                enhancing.setdefault(value, []).append(report.case.name)
    if len(enhancing) > 1:
        counts = " and ".join(f"{value} in {len(names)} ({names[0]})" for value, names in sorted(enhancing.items()))
        text = f"enhancing tumour is {counts} cases: BraTS of different years; each is read by its own labels"
        findings.append(Finding("warning", text))
    return findings
