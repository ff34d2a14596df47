"""From files to a result: read, align, run the network, bring everything to the grids people use."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from jrs.bundle import Bundle
from jrs.errors import ConfigurationError, UsageError
from jrs.fields import DisplacementField, jacobian_determinant
from jrs.files import refuse_existing
from jrs.geometry import FloatArray, Geometry
from jrs.itk import load_affine
from jrs.resources import atlas_path
from jrs.runtime.affine import register_affine
from jrs.runtime.cases import Case, load_case
from jrs.runtime.labels import LabelSampler, region_volumes_ml
from jrs.runtime.names import OutputNames, atlas_label
from jrs.runtime.network import Codes, Network
from jrs.runtime.preprocess import NetworkInput, network_input, place_grid
from jrs.runtime.results import Result
from jrs.runtime.sampling import affine_coords, sample, slabs
from jrs.runtime.transform import Transform, to_voxel_coords

Array = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class InferOptions:
    """What to compute for a case; the fields are the options of ``jrs infer``.

    ``affine``: ``auto`` (12 parameters), ``rigid``, ``off`` (the images share a space), or an ITK affine file.
    ``segment``, ``inverse``: whether to make the labels and the inverse field. ``keep_clear_of``: stop before the
    work if this folder holds the case's results for this atlas already.
    """

    modality: str | None = None
    channels: Sequence[str] | None = None
    modalities: Mapping[str, Path] | None = None
    affine: str = "auto"
    segment: bool = True
    inverse: bool = True
    keep_clear_of: Path | None = None


@dataclass(frozen=True)
class FixedImage:
    """An atlas, encoded: what every case registered to it can share."""

    label: str
    case: Case
    grid: Geometry
    input: NetworkInput
    codes: Codes


@dataclass
class _Clock:
    """Wall seconds of each stage; ``report`` hears of each as it begins."""

    report: Callable[[str], None]
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        self.report(name.replace("_", " "))
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


class Pipeline:
    """One bundle on one backend, ready for cases; a context manager.

    Fixed images are encoded once and kept: a cohort registered to one atlas pays for it once. ``progress`` is
    called with the name of each stage as it begins.
    """

    def __init__(self, network: Network, threads: int | None = None) -> None:
        self.network, self.threads = network, threads
        self.progress: Callable[[str], None] = lambda stage: None
        self._fixed: dict[str, FixedImage] = {}

    @staticmethod
    def open(
        bundle: str | Path | None = None,
        backend: str = "auto",
        precision: str = "auto",
        threads: int | None = None,
    ) -> Pipeline:
        """Open a bundle (default: the one that ships with jrs) on a backend (default: the best one here)."""
        opened = Bundle.open(bundle)
        if not opened.manifest.model.architecture.registration:
            raise ConfigurationError(f"{opened.folder}: has no registration; jrs infer needs a bundle that has one")
        return Pipeline(Network(opened, backend, precision, threads), threads)

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._fixed.clear()
        self.network.__exit__(kind, error, trace)

    def infer(
        self,
        case: str | Path | None = None,
        atlas: str | Path = "sri24",
        options: InferOptions | None = None,
        **changes: Any,
    ) -> Result:
        """Register a case to an atlas and segment it.

        ``case`` is a folder, a 3-D or a 4-D file; ``atlas`` a shipped name, a file or a folder. Further
        arguments are the fields of ``InferOptions``. Raises JrsError for anything a user can mend.
        """
        if options is None:
            options = InferOptions(**changes)
        elif changes:
            raise UsageError("give either options or single arguments")
        clock = _Clock(self.progress)
        start = time.perf_counter()
        spec = self.network.bundle.manifest.model
        path = atlas_path(atlas)
        label = atlas_label(path, str(atlas) if path != Path(atlas) else None)
        with clock.stage("read_case"):
            moving = load_case(
                case,
                modality=options.modality,
                channels=options.channels,
                default_channels=spec.channels,
                modalities=options.modalities,
            )
        if options.keep_clear_of is not None:
            names = OutputNames(moving.name, label)
            refuse_existing(options.keep_clear_of / moving.name, [names.report_json, names.field], overwrite=False)
        fixed = self._fixed_image(path, label, clock)
        warnings = _notes(moving, spec.channels)
        with clock.stage("affine"):
            affine, quality = self._affine(moving, fixed.case, options.affine)
        with clock.stage("preprocess"):
            inputs = network_input(moving.images, spec, fixed.grid, affine, self.threads)
        with clock.stage("encoder"):
            codes = self.network.encode(inputs.tensor)
        probabilities = None
        if options.segment and spec.architecture.segmentation:
            with clock.stage("segmentation"):
                probabilities = self.network.segment(codes)
        with clock.stage("registration"):
            registered = self.network.register(inputs.tensor, codes, fixed.codes)
        warnings.extend(self.network.notes)
        displacement = DisplacementField.from_voxels(registered.displacement[0], fixed.grid)
        transform = Transform(affine, displacement, self.threads)
        sampler = None
        if probabilities is not None:
            sampler = LabelSampler(probabilities, fixed.grid, spec.label_values, self.threads)
        measured = _Measured(moving, fixed, transform, sampler, self.threads)
        with clock.stage("resampling"):
            moved, dense, labels_moved = measured.on_the_atlas()
        labels_native = None
        if sampler is not None:
            with clock.stage("native_labels"):
                labels_native = measured.native_labels(sampler)
        with clock.stage("jacobian"):
            jacobian = jacobian_determinant(dense)
        inverse = None
        if options.inverse:
            with clock.stage("inverse"):
                inverse = transform.inverse_dense(measured.native)
        volumes = None
        if labels_native is not None and labels_moved is not None:
            volumes = {
                "native": region_volumes_ml(labels_native, spec.label_values, measured.native),
                "moved": region_volumes_ml(labels_moved, spec.label_values, measured.fixed.geometry),
            }
        brain = measured.fixed.foreground()
        summary = _jacobian_summary(jacobian, brain, labels_moved)
        if (summary["folding_percent"] or 0.0) > 0.5:
            warnings.append(f"the transform folds in {summary['folding_percent']:.2f} % of the brain")
        clock.seconds["total"] = time.perf_counter() - start
        return Result(
            case=moving,
            native=measured.native,
            atlas=fixed.label,
            fixed=measured.fixed,
            bundle={"name": self.network.bundle.name, "sha256": self.network.bundle.sha256},
            engine=self.network.info,
            transform=transform,
            moved=moved,
            field=dense,
            jacobian=jacobian,
            inverse_field=inverse,
            labels_native=labels_native,
            labels_moved=labels_moved,
            label_values=dict(zip(spec.labels, spec.label_values, strict=True)) if sampler is not None else {},
            volumes_ml=volumes,
            jacobian_summary=summary,
            similarity=_similarity(inputs, fixed.input, registered.moved[0], probabilities, spec.channels),
            affine_quality=quality,
            timings_s=clock.seconds,
            warnings=tuple(warnings),
        )

    def _fixed_image(self, path: Path, label: str, clock: _Clock) -> FixedImage:
        stamp = path.stat()
        key = f"{path.resolve()}:{stamp.st_mtime_ns}:{stamp.st_size}"
        if key not in self._fixed:
            spec = self.network.bundle.manifest.model
            with clock.stage("read_atlas"):
                case = load_case(path, default_channels=spec.channels)
            with clock.stage("encode_atlas"):
                grid = place_grid(spec.grid, next(iter(case.images.values())))
                inputs = network_input(case.images, spec, grid, threads=self.threads, whose=f"the atlas {path}")
                codes = self.network.encode(inputs.tensor)
            self._fixed[key] = FixedImage(label, case, grid, inputs, codes)
        return self._fixed[key]

    def _affine(self, moving: Case, fixed: Case, wanted: str) -> tuple[FloatArray, dict[str, Any] | None]:
        if wanted == "off":
            return np.eye(4), None
        if wanted not in ("auto", "rigid"):
            return load_affine(Path(wanted)), None
        shared = [m for m in moving.images if m in fixed.images]
        a, b = (shared[0], shared[0]) if shared else (next(iter(moving.images)), next(iter(fixed.images)))
        kind: Any = "affine" if wanted == "auto" else "rigid"
        found = register_affine(moving.images[a], fixed.images[b], kind, self.threads)
        quality = {
            "moving": a,
            "fixed": b,
            "mutual_information_before": round(-found.metric_before, 4),
            "mutual_information_after": round(-found.metric_after, 4),
        }
        return found.matrix, quality


class _Measured:
    """Everything that is sampled through the total transform, each image once."""

    def __init__(
        self,
        moving: Case,
        fixed: FixedImage,
        transform: Transform,
        sampler: LabelSampler | None,
        threads: int | None,
    ) -> None:
        self.moving, self.transform, self.sampler, self.threads = moving, transform, sampler, threads
        self.fixed = next(iter(fixed.case.images.values()))
        self.native = next(iter(moving.images.values())).geometry

    def on_the_atlas(self) -> tuple[dict[str, Array], DisplacementField, npt.NDArray[np.uint8] | None]:
        """Moved modalities, the dense field and the moved labels on the fixed image's grid."""
        grid = self.fixed.geometry
        field = np.empty((3, *grid.shape), dtype=np.float32)
        moved = {name: np.empty(grid.shape, dtype=np.float32) for name in self.moving.images}
        labels = np.zeros(grid.shape, dtype=np.uint8) if self.sampler is not None else None
        # Modalities on one grid share their coordinates.
        groups: list[tuple[Geometry, list[str], Array]] = []
        for geometry in dict.fromkeys(v.geometry for v in self.moving.images.values()):
            names = [name for name, v in self.moving.images.items() if v.geometry == geometry]
            groups.append((geometry, names, np.stack([self.moving.images[n].data for n in names])))
        for planes, points, before_affine in self.transform.forward(grid):
            identity = _identity(grid, planes)
            field[:, planes] = points - identity
            for geometry, names, data in groups:
                sampled = sample(data, to_voxel_coords(points, geometry), 0.0, self.threads)
                for index, name in enumerate(names):
                    moved[name][planes] = sampled[index]
            if labels is not None and self.sampler is not None:
                labels[planes] = self.sampler.at(before_affine)
        return moved, DisplacementField(field, grid), labels

    def native_labels(self, sampler: LabelSampler) -> npt.NDArray[np.uint8]:
        """Labels on the native grid: y lies at A^-1 y in the network's space."""
        back = Geometry(self.native.shape, np.linalg.inv(self.transform.affine) @ self.native.affine)
        labels = np.zeros(self.native.shape, dtype=np.uint8)
        for start, stop in slabs(self.native.shape):
            labels[start:stop] = sampler.at(_identity(back, slice(start, stop)))
        return labels


def _identity(grid: Geometry, planes: slice) -> Array:
    """RAS mm of the voxels of some planes of a grid, (3,...)."""
    return affine_coords(grid.shape, grid.affine, planes.start, planes.stop)


def _notes(case: Case, channels: Sequence[str]) -> list[str]:
    notes = [f"{name}: {note}" for name, volume in case.images.items() for note in volume.notes]
    missing = [channel for channel in channels if channel not in case.images]
    if missing:
        notes.append(f"without {', '.join(missing)} the segmentation is less certain")
    unused = [name for name in case.images if name not in channels]
    if unused:
        notes.append(f"{', '.join(unused)} is moved but not used: the bundle does not take it")
    return notes


def _jacobian_summary(jacobian: Array, brain: Mask, labels: npt.NDArray[np.uint8] | None) -> dict[str, float | None]:
    tumor = np.zeros(brain.shape, dtype=bool) if labels is None else labels > 0
    outside = brain & ~tumor
    return {
        "folding_percent": float(100.0 * (jacobian[brain] <= 0).mean()),
        "inside_tumor": float(jacobian[tumor].mean()) if tumor.any() else None,
        "outside_tumor": float(jacobian[outside].mean()) if outside.any() else None,
    }


def _similarity(
    moving: NetworkInput,
    fixed: NetworkInput,
    moved: Array,
    probabilities: Array | None,
    channels: Sequence[str],
) -> dict[str, Any] | None:
    """Correlation with the fixed image inside its brain and outside the tumour, after the affine and after all."""
    shared = [i for i in range(len(channels)) if moving.present[i] and fixed.present[i]]
    if not shared:
        return None
    index = shared[0]
    where = fixed.tensor[0, index] != 0
    if probabilities is not None:
        where &= probabilities.argmax(axis=0) == 0
    if where.sum() < 100:
        return None
    target = fixed.tensor[0, index][where]

    def correlation(image: Array) -> float:
        return round(float(np.corrcoef(image[where], target)[0, 1]), 4)

    return {
        "measure": "correlation",
        "modality": channels[index],
        "before": correlation(moving.tensor[0, index]),
        "after": correlation(moved[index]),
    }
