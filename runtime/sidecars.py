"""The JSON beside each image: what it is, from what it was made, in which space, by which versions."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jrs import __version__
from jrs.resources import DATA

if TYPE_CHECKING:
    from jrs.runtime.results import Result

SHIPPED_ATLASES = {"sri24_t1": "https://www.nitrc.org/projects/sri24"}
"""Where the atlases that ship with jrs are described, by the stem of their file."""


def sidecars(result: Result) -> dict[str, dict[str, Any]]:
    """The sidecar of every image that the result writes: the image's file name to the JSON's content."""
    names, space = result.names, _reference(result.fixed.path)
    images = {modality: _uri(result, modality) for modality in result.case.images}
    everything = list(dict.fromkeys(images.values()))
    used = list(dict.fromkeys(images[m] for m in result.modalities_used if m in images)) or everything
    first = everything[0]
    atlas = {"SpatialReference": space} if space else {}
    native = {"SpatialReference": first}
    common = {"GeneratedBy": _generated_by(result)}
    found: dict[str, dict[str, Any]] = {}

    def add(name: str, description: str, sources: list[str], *more: Mapping[str, Any]) -> None:
        found[name] = {"Description": description, "Sources": sources}
        for values in (*more, common):
            found[name].update(values)

    if result.labels_native is not None and result.labels_moved is not None:
        labels = _labels(result)
        add(names.labels_native, "Tumour labels on the grid of the case", used, native, labels)
        add(names.labels_moved, "Tumour labels moved to the atlas's grid", used, atlas, labels)
    for modality in result.moved:
        add(
            names.moved(modality),
            f"{modality} moved to the atlas's grid, resampled once from the native image",
            [images[modality]],
            atlas,
            {"Units": "arbitrary", "Interpolation": "trilinear", "SkullStripped": result.skull_stripped(modality)},
        )
    field = {"Units": "mm", "Frame": "LPS", "Form": "displacement field (X,Y,Z,1,3), NIfTI intent 1007"}
    meaning = {"Equation": "d(x) = A(x + u(x)) - x", "Maps": f"points of {result.atlas} to points of the case"}
    text = f"Displacement field that moves an image of the case to {result.atlas}"
    add(names.field, text, used, atlas, field, meaning)
    if result.inverse_field is not None:
        meaning = {"Equation": "x(y) - y, where A(x + u(x)) = y", "Maps": f"points of the case to {result.atlas}"}
        text = f"Displacement field that moves an image of {result.atlas} to the case"
        add(names.inverse_field, text, used, native, field, meaning)
    text = "Determinant of the Jacobian of the whole transform, atlas to case; above 1 the atlas has less room"
    add(names.jacobian, text, used, atlas, {"Units": "1"})
    return found


def _labels(result: Result) -> dict[str, Any]:
    return {
        "LabelScheme": result.label_scheme,
        "LabelMap": {str(value): name for name, value in result.label_values.items()},
        "Manual": False,
    }


def _generated_by(result: Result) -> list[dict[str, Any]]:
    engine = {"Backend": result.engine.backend, "Device": result.engine.device, "Precision": result.engine.precision}
    bundle = {"Name": result.bundle["name"], "SHA256": result.bundle["sha256"]}
    return [{"Name": "jrs", "Version": __version__, "Bundle": bundle, "Engine": engine}]


def _uri(result: Result, modality: str) -> str:
    """A BIDS URI inside a dataset, else the file's path as a URI; the modality for an image without a file."""
    bids, path = result.names.bids, result.case.images[modality].path
    if bids is not None:
        return bids.uri(modality)
    return modality if path is None else (path.parent.resolve() / path.name).as_uri()


def _reference(path: Path | None) -> str | None:
    """Where a fixed image is described, else its path as a URI."""
    if path is None:
        return None
    if path.resolve().is_relative_to(DATA.resolve()):
        stem = path.name.removesuffix(".nii.gz")
        return SHIPPED_ATLASES.get(stem, f"jrs:{stem}")
    return path.resolve().as_uri()
