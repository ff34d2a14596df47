"""From files to a result: read, align, run the network, bring everything to the grids people use."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from jrs.bundle import Bundle
from jrs.errors import ConfigurationError, UsageError
from jrs.fields import DisplacementField
from jrs.files import refuse_existing
from jrs.geometry import FloatArray, Geometry
from jrs.manifest import ModelSpec
from jrs.parallel import together
from jrs.resources import atlas_path
from jrs.runtime.affine import judge_affine, register_affine
from jrs.runtime.bids import refuse_raw
from jrs.runtime.cases import Case, load_case
from jrs.runtime.fixed import FixedImage, FixedImages
from jrs.runtime.labels import LabelSampler, label_scheme, region_volumes_ml
from jrs.runtime.measures import (
    jacobian_map,
    jacobian_summary,
    similarity,
    volume_verdict,
    volumes_after_affine,
    warnings_of,
)
from jrs.runtime.names import atlas_label, output_names
from jrs.runtime.network import Codes, Network
from jrs.runtime.options import AFFINES, InferOptions
from jrs.runtime.preprocess import NetworkInput, network_input
from jrs.runtime.recipe import recipe
from jrs.runtime.refine import Refiner
from jrs.runtime.results import Result
from jrs.runtime.sampling import Sampled
from jrs.runtime.transform import Transform
from jrs.runtime.transform_files import load_affine
from jrs.runtime.tumors import Tumors, drop_specks, drop_unbelievable, shows_tumors
from jrs.volume import occupied

Array = npt.NDArray[np.float32]

_WORTH_TELLING_ML = 0.3
"""Of what was left out of the labels."""


@dataclass(frozen=True)
class _Deformation:
    """u; the moving image's channels moved by it on the network's grid (C,X,Y,Z); what refining did, if anything.

    ``one_head``: it took both images for the same patient's.
    """

    displacement: DisplacementField
    moved: Array
    refinement: dict[str, Any] | None = None
    notes: tuple[str, ...] = ()
    one_head: bool = False


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
        self._fixed = FixedImages(network, threads)
        orientation = network.bundle.manifest.model.grid.orientation
        self.refiner = Refiner(orientation, threads)

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

    def check(self, atlas: str | Path, options: InferOptions) -> str:
        """Raise UsageError or MissingInputError for what no case can be registered with; returns the atlas's label."""
        label_scheme(self.network.bundle.manifest.model.label_values, options.label_scheme)
        return _label(atlas)

    def read_shared(self, atlas: str | Path, options: InferOptions) -> None:
        """Read what all cases share, the fixed image and an affine that was given; raises what is wrong with them."""
        self._fixed.get(atlas_path(atlas), _label(atlas), lambda _: nullcontext())
        if options.affine not in AFFINES:
            load_affine(Path(options.affine))

    def recipe(self, case: str | Path | None, atlas: str | Path, options: InferOptions) -> dict[str, Any]:
        """What ``infer`` would make the results from, as their report has it (``made_from``); reads the images."""
        fixed = load_case(atlas_path(atlas), default_channels=self.network.bundle.manifest.model.channels)
        return recipe(self._loaded(case, options), fixed, options, self._scheme(options)[0])

    def _loaded(self, case: str | Path | None, options: InferOptions) -> Case:
        return load_case(
            case,
            modality=options.modality,
            channels=options.channels,
            default_channels=self.network.bundle.manifest.model.channels,
            modalities=options.modalities,
        )

    def _scheme(self, options: InferOptions) -> tuple[str | None, tuple[int, ...]]:
        """The name of the label scheme, None without labels, and the number of each class."""
        spec = self.network.bundle.manifest.model
        scheme, values = label_scheme(spec.label_values, options.label_scheme)
        return scheme if options.segment and spec.architecture.segmentation else None, values

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
        path, label = atlas_path(atlas), _label(atlas)
        scheme, values = self._scheme(options)
        segments = scheme is not None
        self.network.open_ahead(_graphs(segments))
        with clock.stage("read_case"):
            moving = self._loaded(case, options)
        if options.keep_clear_of is not None:
            names = output_names(moving, label)
            if names.bids is not None:
                refuse_raw(options.keep_clear_of, names.bids)
            there = [names.report_json, names.field]
            refuse_existing(names.folder(options.keep_clear_of), there, overwrite=False)
        fixed = self._fixed.get(path, label, clock.stage)
        warnings = [*fixed.notes, *_notes(moving, spec, segments)]
        with clock.stage("affine"):
            affine, quality, doubts = self._affine(moving, fixed, options.affine)
            warnings += doubts
        with clock.stage("preprocess"):
            inputs = network_input(moving.images, spec, fixed.grid, affine, self.threads)
        with clock.stage("encoder"):
            codes = self.network.encode(inputs.tensor)
        with clock.stage("encode_atlas"):
            both = codes, fixed.codes  # while the encoder is open
        probabilities = None
        if segments:
            with clock.stage("segmentation"):
                probabilities, note = self._segmented(codes, inputs)
            warnings += note
        found = self._deformation(moving, fixed, inputs, both, probabilities, affine, options, clock)
        del codes, both  # 0.16 GB at 1 mm
        warnings += [*self.network.notes, *found.notes]
        transform = Transform(affine, found.displacement, self.threads)
        target = next(iter(fixed.case.images.values()))
        native = next(iter(moving.images.values())).geometry
        with clock.stage("resampling"):
            dense = transform.dense(target.geometry)
            moved = _moved(moving, transform, target.geometry, self.threads)
        labels_native = labels_moved = None
        if probabilities is not None:
            with clock.stage("labels"):
                sampler = LabelSampler(probabilities, fixed.grid, affine, values, self.threads)
                labels_native = _native_labels(sampler, native)
                labels_moved = sampler.moved(target.geometry, transform)
                both_grids = (labels_native, native.voxel_volume_ml), (labels_moved, target.geometry.voxel_volume_ml)
                drop_specks(both_grids, values, inputs.scale)
        with clock.stage("jacobian"):
            jacobian = jacobian_map(dense, self.threads)
        inverse = None
        if options.inverse:
            with clock.stage("inverse"):
                inverse = transform.inverse_dense(native)
        with clock.stage("measures"):
            jobs: list[Callable[[], dict[str, Any] | None]] = [
                partial(similarity, inputs, fixed.input, found.moved, probabilities, spec.channels),
                partial(jacobian_summary, jacobian, target.foreground(), labels_moved),
            ]
            likeness, summary = together(jobs, self.threads)
            assert summary is not None
            volumes = None
            if labels_native is not None and labels_moved is not None:
                native_ml = region_volumes_ml(labels_native, values, native)
                volumes = {
                    "native": native_ml,
                    "affine": volumes_after_affine(native_ml, affine),
                    "moved": region_volumes_ml(labels_moved, values, target.geometry),
                }
            verdict = volume_verdict(volumes, found.one_head)
            warnings += warnings_of(summary, likeness, verdict, found.one_head)
        clock.seconds["total"] = time.perf_counter() - start
        return Result(
            case=moving,
            native=native,
            atlas=fixed.label,
            fixed=target,
            bundle={"name": self.network.bundle.name, "sha256": self.network.bundle.sha256},
            engine=self.network.info,
            transform=transform,
            moved=moved,
            field=dense,
            jacobian=jacobian,
            inverse_field=inverse,
            labels_native=labels_native,
            labels_moved=labels_moved,
            label_scheme=scheme,
            label_values=dict(zip(spec.labels, values, strict=True)) if labels_native is not None else {},
            modalities_used=tuple(c for c, there in zip(spec.channels, inputs.present, strict=True) if there),
            volumes_ml=volumes,
            volume_verdict=verdict,
            jacobian_summary=summary,
            similarity=likeness,
            refinement=found.refinement,
            affine_quality=quality,
            made_from=recipe(moving, fixed.case, options, scheme),
            timings_s=clock.seconds,
            warnings=tuple(warnings),
        )

    def _deformation(
        self,
        moving: Case,
        fixed: FixedImage,
        inputs: NetworkInput,
        codes: tuple[Codes, Codes],
        probabilities: Array | None,
        affine: FloatArray,
        options: InferOptions,
        clock: _Clock,
    ) -> _Deformation:
        """The network's displacement, refined on the pair where iterations are asked for."""
        with clock.stage("registration"):
            registered = self.network.register(inputs.tensor, *codes)
        displacement = DisplacementField.from_voxels(registered.displacement[0], fixed.grid)
        if not options.refine:
            return _Deformation(displacement, registered.moved[0])
        # An atlas that ships with jrs is nobody's earlier scan.
        same_patient = False if options.same_patient is None and fixed.healthy else options.same_patient
        theirs = self._tumors(probabilities, fixed, clock)
        with clock.stage("refinement"):
            channels = self.network.bundle.manifest.model.channels
            tumors = Tumors.found(probabilities, fixed.grid, self.threads, shows_tumors(inputs, channels))
            images = (moving, tumors), (fixed.case, theirs)
            refined, notes = self.refiner.refine_case(
                *images, affine, displacement, options.refine, fixed, same_patient
            )
            network = similarity(inputs, fixed.input, registered.moved[0], probabilities, channels)
            record = {
                **refined.summary(),
                "same_patient": options.same_patient,
                "similarity_before": network and network["after"],
            }
            moved = _moved_again(inputs.tensor[0], refined.displacement, fixed.grid, self.threads)
        return _Deformation(refined.displacement, moved, record, tuple(notes), refined.one_head)

    def _segmented(self, codes: Codes, image: NetworkInput) -> tuple[Array, list[str]]:
        """Probabilities (K,X,Y,Z) without regions that are not to be believed, and what to say of these."""
        probabilities = self.network.segment(image.tensor, codes)
        dropped, rule = drop_unbelievable(probabilities, image, self.network.bundle.manifest.model)
        if dropped < _WORTH_TELLING_ML:
            return probabilities, []
        note = f"{dropped:.1f} ml were left out of the labels: {rule} are not told from healthy tissue"
        return probabilities, [note]

    def _tumors(self, probabilities: Array | None, fixed: FixedImage, clock: _Clock) -> Tumors:
        """What to leave out of the fixed image; atlases that ship with jrs, and most of T1 alone, are healthy."""
        channels = self.network.bundle.manifest.model.channels
        if probabilities is None or fixed.healthy or not shows_tumors(fixed.input, channels):
            return Tumors(None, fixed.grid)
        if fixed.tumors is None:
            with clock.stage("segmentation"):
                found, _ = self._segmented(fixed.codes, fixed.input)
                fixed.tumors = Tumors.found(found, fixed.grid, self.threads)
        return fixed.tumors

    def _affine(
        self, moving: Case, fixed: FixedImage, wanted: str
    ) -> tuple[FloatArray, dict[str, Any] | None, tuple[str, ...]]:
        """A, how well it aligns the images, and what the user should know of that."""
        if wanted == "off":
            return np.eye(4), None, ()
        theirs = fixed.case.images
        shared = [m for m in moving.images if m in theirs]
        a, b = (shared[0], shared[0]) if shared else (next(iter(moving.images)), next(iter(theirs)))
        pair, block = (moving.images[a], theirs[b]), fixed.block(b)
        if wanted in ("auto", "rigid"):
            found = register_affine(*pair, "affine" if wanted == "auto" else "rigid", self.threads, block)
            matrix, before, after, warning = found.matrix, found.before, found.after, found.warning
        else:
            matrix = load_affine(Path(wanted))
            before, after, warning = judge_affine(*pair, matrix, self.threads, block)
        quality = {
            "moving": a,
            "fixed": b,
            "mutual_information_before": round(before.mutual_information, 4),
            "mutual_information_after": round(after.mutual_information, 4),
            "foreground_overlap_before": round(before.overlap, 4),
            "foreground_overlap_after": round(after.overlap, 4),
        }
        return matrix, quality, () if warning is None else (warning,)


def _label(atlas: str | Path) -> str:
    path = atlas_path(atlas)
    return atlas_label(path, str(atlas) if path != Path(atlas) else None)


def _graphs(segments: bool) -> list[str]:
    """The graphs that a case needs, in the order it needs them."""
    return ["encoder", *(["segmentation"] if segments else []), "registration", "transformer"]


def _moved_again(images: Array, displacement: DisplacementField, grid: Geometry, threads: int | None) -> Array:
    """``images`` (C,X,Y,Z) on the network's grid, moved by a displacement that lies on another."""
    return Transform(np.eye(4), displacement, threads).pull(Sampled(images, threads), grid, grid)


def _moved(case: Case, transform: Transform, fixed: Geometry, threads: int | None) -> dict[str, Array]:
    """Each modality on the fixed image's grid, resampled once."""
    moved: dict[str, Array] = {}
    # Modalities on one grid share their coordinates.
    for geometry in dict.fromkeys(v.geometry for v in case.images.values()):
        names = [name for name, v in case.images.items() if v.geometry == geometry]
        data = [case.images[name].data for name in names]
        box = occupied(data)  # the air around a head is zero, which is what lies outside an image
        images = Sampled([channel[box] for channel in data], threads)
        moved |= dict(zip(names, transform.pull(images, geometry.part(box), fixed), strict=True))
    return {name: moved[name] for name in case.images}


def _native_labels(sampler: LabelSampler, native: Geometry) -> npt.NDArray[np.uint8]:
    """Labels on the native grid, computed on its canonical order of axes, which no file's own order changes."""
    grid, order = native.canonical()
    return np.ascontiguousarray(order.undo(sampler.native(grid)))


def _notes(case: Case, spec: ModelSpec, segments: bool) -> list[str]:
    channels = spec.channels
    notes = [f"{name}: {note}" for name, volume in case.images.items() for note in volume.notes]
    notes += case.doubts
    missing = [channel for channel in channels if channel not in case.images]
    if missing and segments:
        guess = ", and what may enhance counts as core" if "t1ce" in missing and len(spec.labels) == 4 else ""
        notes.append(f"without {', '.join(missing)} the segmentation is less certain{guess}")
    unused = [name for name in case.images if name not in channels]
    if unused:
        notes.append(f"{', '.join(unused)} is moved but not used: the bundle does not take it")
    return notes
