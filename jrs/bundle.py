"""The bundle: what is deployed. A folder with ``manifest.json`` and single-file ONNX graphs."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from jrs.errors import ConfigurationError, MissingInputError
from jrs.files import sha256_of
from jrs.manifest import ModelSpec
from jrs.resources import bundle_path
from jrs.schema import decode

Precision = Literal["fp32", "fp16", "bf16"]
FORMAT_VERSION = 1
MANIFEST = "manifest.json"
SAMPLING = ("transformer", "composer")
"""Graphs that sample volumes: always FP32, and on the CPU where a backend has no sampler."""
GRAPHS = ("encoder", "segmentation", "registration", *SAMPLING)


@dataclass(frozen=True)
class GraphFile:
    """One graph: its file's name in the bundle's folder and the SHA-256 of its content."""

    file: str
    sha256: str


@dataclass(frozen=True)
class ParityRecord:
    """How far a graph's output is from PyTorch's: largest and 99th percentile error, and the limit it passed.

    ``limit`` bounds ``measure``: the maximum or the 99th percentile. ``unit`` is ``relative`` (to the standard
    deviation of the output), ``probability``, ``voxel``, or ``share`` (of voxels whose label differs).
    """

    maximum: float
    percentile_99: float
    unit: Literal["relative", "probability", "voxel", "share"]
    limit: float
    measure: Literal["maximum", "percentile_99"] = "maximum"

    @property
    def passed(self) -> bool:
        """Whether the measure keeps to the limit."""
        return float(getattr(self, self.measure)) <= self.limit


@dataclass(frozen=True)
class AccuracyRecord:
    """What the graphs' precision costs on one pair of real volumes, against FP32; None where there is no such output.

    Attributes:
        field_p99_mm: 99th percentile of the displacement's change, mm.
        field_max_mm: its largest.
        labels_share: share of voxels whose label differs.
        folding_percent: share of the brain where the transform folds.
        folding_fp32_percent: the same in FP32.
        limits: the largest allowed field_p99_mm, labels_share and rise of folding_percent.
    """

    field_p99_mm: float | None
    field_max_mm: float | None
    labels_share: float | None
    folding_percent: float | None
    folding_fp32_percent: float | None
    limits: tuple[float, float, float]

    @property
    def passed(self) -> bool:
        """Whether every limit is kept."""
        field, labels, folding = self.limits
        added = (self.folding_percent or 0.0) - (self.folding_fp32_percent or 0.0)
        return (self.field_p99_mm or 0.0) <= field and (self.labels_share or 0.0) <= labels and added <= folding


@dataclass(frozen=True)
class BundleManifest:
    """The typed content of ``manifest.json``.

    Attributes:
        format_version: of this schema; an unknown one is an error.
        name: what reports call the bundle.
        model: network, channels, grid, normalisation, labels.
        precision: of the convolutions in the graphs.
        opset: of the graphs' standard operators.
        graphs: by name (encoder, segmentation, registration, transformer; composer, where there are several passes).
        training: how the weights came to be; free JSON values.
        parity: what the exporter measured against PyTorch, output by output.
        accuracy: what the precision costs on real volumes, by the case's name.
        jrs_version: that wrote it.
    """

    format_version: int
    name: str
    model: ModelSpec
    precision: Precision
    opset: int
    graphs: dict[str, GraphFile]
    training: dict[str, Any] = field(default_factory=dict)
    parity: dict[str, ParityRecord] = field(default_factory=dict)
    accuracy: dict[str, AccuracyRecord] = field(default_factory=dict)
    jrs_version: str = ""


@dataclass(frozen=True)
class Bundle:
    """An opened bundle whose checksums hold."""

    folder: Path
    manifest: BundleManifest
    sha256: str

    @property
    def name(self) -> str:
        """The bundle's name."""
        return self.manifest.name

    def graph(self, name: str) -> Path:
        """The file of a graph; raises ConfigurationError if the bundle has none of that name."""
        if name not in self.manifest.graphs:
            raise ConfigurationError(f"{self.folder}: has no {name} graph; use a bundle that was exported with one")
        return self.folder / self.manifest.graphs[name].file

    @staticmethod
    def open(path: str | Path | None = None) -> Bundle:
        """Read and verify a bundle: a folder, a shipped name, or the default one.

        Raises MissingInputError if there is none, ConfigurationError for an unknown version, a damaged
        manifest or a file whose checksum differs.
        """
        folder = bundle_path(path if path is not None else "default")
        file = folder / MANIFEST
        if not file.is_file():
            raise MissingInputError(f"{folder}: is not a bundle (no {MANIFEST}); make one with jrs export")
        try:
            value = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigurationError(f"{file}: cannot be read as JSON ({error}); export the bundle again") from error
        if not isinstance(value, dict) or value.get("format_version") != FORMAT_VERSION:
            version = value.get("format_version") if isinstance(value, dict) else None
            raise ConfigurationError(
                f"{file}: format version {version} is unknown to this jrs (it reads {FORMAT_VERSION}); "
                "update jrs or export the bundle again"
            )
        manifest = decode(BundleManifest, value, str(file))
        _check_graphs(folder, manifest)
        return Bundle(folder, manifest, sha256_of(file))


def _check_graphs(folder: Path, manifest: BundleManifest) -> None:
    architecture = manifest.model.architecture
    needed = {"encoder"}
    needed |= {"segmentation"} if architecture.segmentation else set()
    needed |= {"registration", "transformer"} if architecture.registration else set()
    needed |= {"composer"} if architecture.registration and manifest.model.passes > 1 else set()
    missing = sorted(needed - set(manifest.graphs))
    if missing:
        raise ConfigurationError(f"{folder}: lacks the {missing[0]} graph its architecture needs; export it again")
    for name, graph in manifest.graphs.items():
        file = folder / graph.file
        if name not in GRAPHS or Path(graph.file).name != graph.file:
            raise ConfigurationError(f"{folder}: graph {name!r} ({graph.file}) is not one a bundle may hold")
        if not file.is_file():
            raise ConfigurationError(f"{file}: is missing from the bundle; export or install it again")
        if sha256_of(file) != graph.sha256:
            raise ConfigurationError(f"{file}: its checksum differs from the manifest's; export or install it again")
