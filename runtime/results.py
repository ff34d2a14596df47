"""What inference gives, and how it is written."""

from __future__ import annotations

import dataclasses
import json
import platform
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from jrs import __version__
from jrs.fields import DisplacementField
from jrs.files import whole_set, write_json, write_text
from jrs.geometry import Geometry
from jrs.itk import save_field
from jrs.runtime.cases import Case
from jrs.runtime.engines import EngineInfo
from jrs.runtime.names import OutputNames
from jrs.runtime.transform import Transform
from jrs.volume import Volume
from jrs.writing import rounded, save_nifti

Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Result:
    """One case registered to one atlas and segmented.

    Attributes:
        case: the images as read; ``case.images`` by modality, each on its native grid.
        atlas: label of the atlas in file names; ``fixed`` its image.
        labels_native, labels_moved: tumour labels (uint8, ``label_values``) on the native and the atlas's grid;
            None without a segmentation.
        moved: each modality on the atlas's grid, float32.
        field: total displacement d(x) = A(x + u(x)) - x on the atlas's grid; ``inverse_field`` on the native one.
        transform: A and u themselves, for points and further images.
        jacobian: determinant of the total transform on the atlas's grid.
        volumes_ml: ``native`` and ``moved``: ml of WT, TC, ET; None without a segmentation.
        folding_percent: share of the atlas's brain where the determinant is not positive.
    """

    case: Case
    native: Geometry
    atlas: str
    fixed: Volume
    bundle: Mapping[str, str]
    engine: EngineInfo
    transform: Transform
    moved: Mapping[str, Array]
    field: DisplacementField
    jacobian: Array
    inverse_field: DisplacementField | None = None
    labels_native: npt.NDArray[np.uint8] | None = None
    labels_moved: npt.NDArray[np.uint8] | None = None
    label_values: Mapping[str, int] = dataclasses.field(default_factory=dict)
    volumes_ml: Mapping[str, Mapping[str, float]] | None = None
    jacobian_summary: Mapping[str, float | None] = dataclasses.field(default_factory=dict)
    similarity: Mapping[str, Any] | None = None
    refinement: Mapping[str, Any] | None = None
    affine_quality: Mapping[str, Any] | None = None
    timings_s: Mapping[str, float] = dataclasses.field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    @property
    def folding_percent(self) -> float:
        """Share of the atlas's brain where the total transform folds, percent."""
        value = self.jacobian_summary["folding_percent"]
        assert value is not None
        return value

    @property
    def names(self) -> OutputNames:
        """The names of this result's files."""
        return OutputNames(self.case.name, self.atlas)

    def outputs(self) -> dict[str, str]:
        """What ``save`` writes: kind to file name."""
        names = self.names
        files = {
            "labels_native": names.labels_native if self.labels_native is not None else None,
            "labels_moved": names.labels_moved if self.labels_moved is not None else None,
            **{f"moved_{modality}": names.moved(modality) for modality in self.moved},
            "field": names.field,
            "inverse_field": names.inverse_field if self.inverse_field is not None else None,
            "jacobian": names.jacobian,
            "report_json": names.report_json,
            "report_html": names.report_html,
        }
        return {kind: name for kind, name in files.items() if name is not None}

    def report(self, writing_s: float | None = None) -> dict[str, Any]:
        """The content of ``<case>_report.json``; every value is plain JSON."""
        timings = dict(self.timings_s)
        if writing_s is not None:
            timings["total"] = timings.get("total", 0.0) + writing_s
            timings["write"] = writing_s
        ratio = None
        if self.volumes_ml is not None:
            native, moved = self.volumes_ml["native"], self.volumes_ml["moved"]
            ratio = {region: _rounded(moved[region] / native[region]) if native[region] else None for region in native}
        return {
            "case": self.case.name,
            "atlas": self.atlas,
            "bundle": dict(self.bundle),
            "engine": {
                "backend": self.engine.backend,
                "device": self.engine.device,
                "precision": self.engine.precision,
            },
            "modalities": list(self.case.images),
            "label_values": dict(self.label_values),
            "volumes_ml": None
            if self.volumes_ml is None
            else {where: {r: _rounded(v) for r, v in regions.items()} for where, regions in self.volumes_ml.items()},
            "volume_ratio": ratio,
            "jacobian": {key: _rounded(value) for key, value in self.jacobian_summary.items()},
            "similarity": self.similarity,
            "refinement": self.refinement,
            "affine": self.transform.affine.tolist(),
            "affine_determinant": _rounded(float(np.linalg.det(self.transform.affine[:3, :3]))),
            "affine_quality": self.affine_quality,
            "timings_s": {stage: round(seconds, 3) for stage, seconds in timings.items()},
            "warnings": list(self.warnings),
            "versions": _versions(),
            "outputs": self.outputs(),
        }

    def save(self, out: str | Path, overwrite: bool = False) -> Path:
        """Write all files into ``out/<case>/``, all of them or none; returns that folder.

        Raises CannotCreateError if one exists without ``overwrite``, OutputError if the disk is full.
        """
        from jrs.runtime.report_html import html_report

        folder = Path(out) / self.case.name
        files = self.outputs()
        start = time.perf_counter()
        with whole_set(folder, list(files.values()), self.names.everything(), overwrite) as temporary:
            jobs: list[Callable[[], None]] = [
                lambda: save_field(temporary / files["field"], self.field),
                *([self._writer_of_inverse(temporary)] if self.inverse_field is not None else []),
                lambda: save_nifti(temporary / files["jacobian"], rounded(self.jacobian, 12), self.fixed.geometry),
                *(self._writer_of(temporary, modality) for modality in self.moved),
            ]
            if self.labels_native is not None and self.labels_moved is not None:
                save_nifti(temporary / files["labels_native"], self.labels_native, self.native, "label")
                save_nifti(temporary / files["labels_moved"], self.labels_moved, self.fixed.geometry, "label")
            # zlib works outside Python's lock: one thread a core, the largest files first.
            with ThreadPoolExecutor() as pool:
                for job in [pool.submit(job) for job in jobs]:
                    job.result()
            report = self.report(time.perf_counter() - start)
            modality = next(iter(self.moved))
            page = html_report(
                report,
                self.case.images[modality],
                self.labels_native if self.case.images[modality].geometry.is_close_to(self.native) else None,
                self.fixed,
                self.moved[modality],
                self.labels_moved,
                self.field,
                self.transform.affine,
                modality,
            )
            write_text(temporary / files["report_html"], page)
            write_json(temporary / files["report_json"], report)
        return folder

    def _writer_of(self, folder: Path, modality: str) -> Callable[[], None]:
        return lambda: save_nifti(folder / self.names.moved(modality), self.moved[modality], self.fixed.geometry)

    def _writer_of_inverse(self, folder: Path) -> Callable[[], None]:
        inverse = self.inverse_field
        assert inverse is not None
        return lambda: save_field(folder / self.names.inverse_field, inverse)


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.6g}")


def _versions() -> dict[str, str]:
    versions = {"jrs": __version__, "python": platform.python_version()}
    for package in ("numpy", "nibabel", "onnxruntime-gpu", "onnxruntime", "openvino", "SimpleITK"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


def summary_line(report_file: Path) -> str:
    """One JSON line about a finished case, for stdout."""
    report = json.loads(report_file.read_text(encoding="utf-8"))
    line = {"out": str(report_file.parent)}
    line |= {key: report[key] for key in ("case", "atlas", "volumes_ml", "volume_ratio")}
    line["folding_percent"] = report["jacobian"]["folding_percent"]
    line["seconds"] = report["timings_s"]["total"]
    return json.dumps(line, ensure_ascii=False)
