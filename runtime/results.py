"""What inference gives, and how it is written."""

from __future__ import annotations

import dataclasses
import json
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
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
from jrs.parallel import together
from jrs.runtime.bids import describe_dataset, refuse_raw
from jrs.runtime.cases import Case
from jrs.runtime.colors import bids_table, itksnap_table, label_colors, slicer_table
from jrs.runtime.engines import EngineInfo
from jrs.runtime.measures import ratios
from jrs.runtime.names import NOT_IN_BIDS, OutputNames, output_names
from jrs.runtime.report_schema import REPORT_VERSION
from jrs.runtime.transform import Transform
from jrs.volume import Volume
from jrs.writing import save_nifti

Array = npt.NDArray[np.float32]

_STRIPPED_SHARE = 0.25  # of voxels that are exactly zero or less: no scanner leaves that many


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
        label_scheme: ``brats2018``, ``brats2023`` or ``bundle``; None without a segmentation.
        modalities_used: those that the network took; ``case.images`` has all that were moved.
        volumes_ml: ``native``, ``affine`` (what the affine alone makes of them) and ``moved``: ml of WT, TC, ET;
            None without a segmentation. ``volume_verdict``: whether registration shrank the tumour.
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
    label_scheme: str | None = None
    label_values: Mapping[str, int] = dataclasses.field(default_factory=dict)
    modalities_used: tuple[str, ...] = ()
    volumes_ml: Mapping[str, Mapping[str, float]] | None = None
    volume_verdict: Mapping[str, Any] | None = None
    jacobian_summary: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    similarity: Mapping[str, Any] | None = None
    refinement: Mapping[str, Any] | None = None
    affine_quality: Mapping[str, Any] | None = None
    made_from: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    timings_s: Mapping[str, float] = dataclasses.field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    @property
    def folding_percent(self) -> float:
        """Share of the atlas's brain where the total transform folds, percent."""
        return float(self.jacobian_summary["folding_percent"])

    @property
    def names(self) -> OutputNames:
        """The names of this result's files."""
        return output_names(self.case, self.atlas)

    def skull_stripped(self, modality: str) -> bool:
        """Whether an image has a background of exact zeros, as skull-stripped images do, and no head's volume."""
        volume = self.case.images[modality]
        return bool((volume.thinned <= 0).mean() > _STRIPPED_SHARE) and volume.unstripped is None

    def images(self) -> dict[str, str]:
        """The images that ``save`` writes: kind to file name."""
        names = self.names
        segmented = {"labels_native": names.labels_native, "labels_moved": names.labels_moved}
        return {
            **(segmented if self.labels_native is not None else {}),
            **{f"moved_{modality}": names.moved(modality) for modality in self.moved},
            "field": names.field,
            **({"inverse_field": names.inverse_field} if self.inverse_field is not None else {}),
            "jacobian": names.jacobian,
        }

    def outputs(self) -> dict[str, str]:
        """What ``save`` writes: kind to file name."""
        names, images = self.names, self.images()
        tables = {f"{kind}_table": names.lookup(name) for kind, name in images.items() if kind.startswith("labels")}
        if tables:
            tables |= {"colors_slicer": names.slicer_colors, "colors_itksnap": names.itksnap_colors}
        return {
            **images,
            **{f"{kind}_sidecar": names.sidecar(name) for kind, name in images.items()},
            **tables,
            "report_json": names.report_json,
            "report_html": names.report_html,
        }

    def report(self, writing_s: float | None = None) -> dict[str, Any]:
        """The content of ``<case>_report.json``; every value is plain JSON."""
        timings = dict(self.timings_s)
        if writing_s is not None:
            timings["total"] = timings.get("total", 0.0) + writing_s
            timings["write"] = writing_s
        volumes = self.volumes_ml
        return {
            "report_version": REPORT_VERSION,
            "case": self.case.name,
            "atlas": self.atlas,
            "bundle": dict(self.bundle),
            "engine": {
                "backend": self.engine.backend,
                "device": self.engine.device,
                "precision": self.engine.precision,
                "reason": self.engine.reason,
                "gate": self.engine.gate,
            },
            "modalities": list(self.case.images),
            "modalities_used": list(self.modalities_used),
            "inputs": {name: _input(volume) for name, volume in self.case.images.items()},
            "label_scheme": self.label_scheme,
            "label_values": dict(self.label_values),
            "volumes_ml": _rounded(volumes),
            "volume_ratio": volumes and _rounded(ratios(volumes["moved"], volumes["native"])),
            "volume_ratio_to_affine": volumes and _rounded(ratios(volumes["moved"], volumes["affine"])),
            "volume_verdict": _rounded(self.volume_verdict),
            "jacobian": _rounded(self.jacobian_summary),
            "similarity": self.similarity,
            "refinement": self.refinement,
            "affine": self.transform.affine.tolist(),
            "affine_determinant": _rounded(float(np.linalg.det(self.transform.affine[:3, :3]))),
            "affine_quality": self.affine_quality,
            "made_from": self.made_from,
            "timings_s": {stage: round(seconds, 3) for stage, seconds in timings.items()},
            "warnings": list(self.warnings),
            "versions": _versions(),
            "outputs": self.outputs(),
        }

    def save(self, out: str | Path, overwrite: bool = False) -> Path:
        """Write all files into ``out/<case>/``, all of them or none; returns that folder.

        Raises CannotCreateError if one exists without ``overwrite``, OutputError if the disk is full.
        """
        from jrs.runtime.report_html import page

        folder, names, files = self.names.folder(Path(out)), self.names, self.outputs()
        start = time.perf_counter()
        if names.bids is not None:
            refuse_raw(Path(out), names.bids)
        with whole_set(folder, list(files.values()), self._stale(folder), overwrite) as temporary:
            drawn, shown = self._write_images(temporary)
            self._write_texts(temporary)
            report = self.report(time.perf_counter() - start)
            write_text(temporary / files["report_html"], page(report, self.transform.affine, drawn, shown))
            write_json(temporary / files["report_json"], report)
        if names.bids is not None:
            describe_dataset(Path(out), names.bids, NOT_IN_BIDS)
        return folder

    def _stale(self, folder: Path) -> list[str]:
        """Files of an earlier run of this case against this atlas, by their names and by its report."""
        try:
            report = json.loads((folder / self.names.report_json).read_text(encoding="utf-8"))
            listed = report["outputs"].values() if report["atlas"] == self.atlas else ()
        except (OSError, ValueError, KeyError, AttributeError, TypeError):
            listed = ()
        return [*self.names.everything(), *(n for n in listed if isinstance(n, str) and Path(n).name == n)]

    def _write_images(self, folder: Path) -> tuple[str, str]:
        """Write the images, and beside that make the report's pictures and viewer, which are returned."""
        names, fixed = self.names, self.fixed.geometry
        jobs: list[Callable[[], Any]] = [self._drawings, self._viewer]
        jobs.append(partial(save_field, folder / names.field, self.field))
        if self.inverse_field is not None:
            jobs.append(partial(save_field, folder / names.inverse_field, self.inverse_field))
        jobs.append(partial(save_nifti, folder / names.jacobian, self.jacobian, fixed, bits=12))
        jobs += [partial(save_nifti, folder / names.moved(m), data, fixed) for m, data in self.moved.items()]
        if self.labels_native is not None and self.labels_moved is not None:
            save_labels = partial(save_nifti, intent="label", description=f"tumour labels, {self.label_scheme}")
            jobs.append(partial(save_labels, folder / names.labels_native, self.labels_native, self.native))
            jobs.append(partial(save_labels, folder / names.labels_moved, self.labels_moved, fixed))
        drawn, shown, *_ = together(jobs, self.transform.threads)
        return drawn, shown

    def _write_texts(self, folder: Path) -> None:
        """Sidecars and colour tables."""
        from jrs.runtime.sidecars import sidecars

        names = self.names
        for image, content in sidecars(self).items():
            write_json(folder / names.sidecar(image), content)
        if self.labels_native is not None:
            colors, scheme = label_colors(self.label_values), self.label_scheme or "bundle"
            for labels in (names.labels_native, names.labels_moved):
                write_text(folder / names.lookup(labels), bids_table(colors))
            write_text(folder / names.slicer_colors, slicer_table(colors, scheme))
            write_text(folder / names.itksnap_colors, itksnap_table(colors, scheme))

    def _drawings(self) -> str:
        from jrs.runtime.report_html import drawings

        modality = next(iter(self.moved))
        image, moved = self.case.images[modality], self.moved[modality]
        native_labels = self.labels_native if image.geometry.is_close_to(self.native) else None
        on_the_atlas = self.fixed, moved, self.labels_moved, self.field
        return drawings(image, native_labels, *on_the_atlas, self.transform.affine, modality, self.jacobian)

    def _viewer(self) -> str:
        from jrs.runtime.report_viewer import viewer

        moved = next(iter(self.moved.values()))
        return viewer(self.fixed, moved, self.labels_moved, self.jacobian, self.transform.affine)


def _input(volume: Volume) -> dict[str, Any]:
    grid = volume.geometry
    return {
        "file": None if volume.path is None else Path(volume.path).name,
        "shape": list(grid.shape),
        "spacing_mm": [round(float(v), 4) for v in np.linalg.norm(grid.affine[:3, :3], axis=0)],
    }


def _rounded(value: Any) -> Any:
    """Floats to six digits, however deep they lie."""
    if isinstance(value, Mapping):
        return {key: _rounded(item) for key, item in value.items()}
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _versions() -> dict[str, str]:
    versions = {"jrs": __version__, "python": platform.python_version()}
    for package in ("numpy", "nibabel", "isal", "onnxruntime-gpu", "onnxruntime", "openvino", "SimpleITK"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


def summary_line(report_file: Path, ascii_only: bool = False) -> str:
    """One JSON line about a finished case, for stdout."""
    report = json.loads(report_file.read_text(encoding="utf-8"))
    return json.dumps(result_line(report, report_file.parent), ensure_ascii=ascii_only)


def result_line(report: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The few values of a report, which lies in ``folder``, that are wanted at once."""
    line: dict[str, Any] = {"out": str(folder)}
    line |= {key: report[key] for key in ("case", "atlas", "volumes_ml", "volume_ratio")}
    line["folding_percent"] = report["jacobian"]["folding_percent"]
    line["seconds"] = report["timings_s"]["total"]
    return line
