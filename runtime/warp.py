"""A saved transform applied to any image, series, label map or list of points, resampled once."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import nibabel as nib
import numpy as np
import numpy.typing as npt

from jrs.errors import BadDataError, MissingInputError, UsageError
from jrs.files import write_text
from jrs.geometry import FloatArray, Geometry
from jrs.headers import read_header, shown
from jrs.itk import flipped_points
from jrs.reading import read_geometry, read_series
from jrs.runtime.chain import Chain
from jrs.runtime.sampling import Sampled, sample_labels, sample_nearest
from jrs.runtime.transform import to_voxel_coords
from jrs.volume import Volume
from jrs.writing import save_nifti

Array = npt.NDArray[np.float32]
Interpolation = Literal["linear", "nearest", "label", "bspline"]
Frame = Literal["ras", "lps"]
Sampler = Callable[[Array], npt.NDArray[Any]]

INTERPOLATIONS: tuple[str, ...] = get_args(Interpolation)
_SECONDS = {"sec": 1.0, "msec": 1e-3, "usec": 1e-6}
_MOST_LABELS = 64
"""Of a label map; images of whole numbers have more."""


def warp_volumes(
    volumes: Sequence[npt.NDArray[Any]],
    source: Geometry,
    chain: Chain,
    target: Geometry,
    interpolation: Interpolation = "linear",
    outside: float = 0.0,
) -> npt.NDArray[Any]:
    """out(x) = image(chain(x)) for x on ``target``: (x,y,z), with several volumes (x,y,z,T).

    ``volumes`` are (X,Y,Z) on ``source``. ``linear`` and ``bspline`` (cubic) give float32; ``nearest`` and ``label``
    (the label with the largest trilinear weight) keep the type. Points further than half a voxel outside the image
    become ``outside``. The chain is evaluated once, however many volumes there are.
    """
    samplers = [_sampler(volume, interpolation, outside, chain.threads) for volume in volumes]
    dtype = np.dtype(np.float32) if interpolation in ("linear", "bspline") else volumes[0].dtype
    out = np.empty((*target.shape, len(volumes)), dtype=dtype)
    for planes, points in chain.forward(target):
        coords = to_voxel_coords(points, source)
        for index, at in enumerate(samplers):
            out[planes, ..., index] = at(coords)
    return out[..., 0] if len(volumes) == 1 else out


def _sampler(
    volume: npt.NDArray[Any], interpolation: Interpolation, outside: float, threads: int | None
) -> Sampler:
    """What gives the image's values at voxel coordinates (3,x,y,z)."""
    if interpolation == "linear":
        image = Sampled(volume[None], threads)
        return lambda coords: image.at(coords, outside)[0]
    if interpolation == "bspline":
        return _bspline(volume, outside, threads)
    if volume.dtype.kind in "iu":
        limits = np.iinfo(volume.dtype)
        if not (limits.min <= outside <= limits.max and outside == int(outside)):
            raise UsageError(f"--outside {outside:g}: is no {volume.dtype} value; give one that the image can hold")
        outside = int(outside)
    choose = sample_nearest if interpolation == "nearest" else sample_labels
    return lambda coords: choose(volume, coords, outside)  # type: ignore[arg-type]


def _bspline(volume: npt.NDArray[Any], outside: float, threads: int | None) -> Sampler:
    """Cubic B-splines by ITK. Both grids are voxel indices there, so that any geometry will do, sheared ones too."""
    import SimpleITK as sitk

    image = sitk.GetImageFromArray(np.ascontiguousarray(volume.transpose(2, 1, 0), dtype=np.float32))
    # Of the whole image once; the resampler alone would compute them anew for every slab.
    coefficients = sitk.BSplineDecomposition(image, 3)

    def at(coords: Array) -> npt.NDArray[Any]:
        steps = coords - np.indices(coords.shape[1:], dtype=np.float32)
        field = sitk.GetImageFromArray(steps.transpose(3, 2, 1, 0).astype(np.float64), isVector=True)
        resampler = sitk.ResampleImageFilter()
        resampler.SetSize(list(coords.shape[1:]))
        resampler.SetTransform(sitk.DisplacementFieldTransform(field))
        resampler.SetInterpolator(sitk.sitkBSplineResamplerOrder3)
        resampler.SetDefaultPixelValue(outside)
        resampler.SetOutputPixelType(sitk.sitkFloat32)
        if threads:
            resampler.SetNumberOfThreads(threads)
        result: npt.NDArray[Any] = sitk.GetArrayFromImage(resampler.Execute(coefficients)).transpose(2, 1, 0)
        return result

    return at


def warp_file(
    image: Path, chain: Chain, reference: Path, out: Path, interpolation: Interpolation, outside: float = 0.0
) -> tuple[str, ...]:
    """Resample a 3-D or 4-D file onto the grid of ``reference`` and write it; returns what the user should know."""
    if not out.name.lower().endswith((".nii", ".nii.gz")):
        raise UsageError(f"{shown(out)}: images are written as NIfTI; end the name in .nii.gz")
    target = read_geometry(reference)
    volumes = _read(image, interpolation)
    data = warp_volumes([v.data for v in volumes], volumes[0].geometry, chain, target, interpolation, outside)
    series = data.ndim == 4
    intent: Literal["image", "label"] = "label" if interpolation == "label" else "image"
    save_nifti(out, data, target, intent, fourth=_time_step(image) if series else None)
    notes = [*volumes[0].notes]
    if not (data != outside).any() and any(v.data.any() for v in volumes):
        notes.append(
            f"nothing of it lies where the transform leads from {shown(reference)}; is it in the moving image's space?"
        )
    if interpolation in ("linear", "bspline") and (labels := _label_count(volumes[0])):
        notes.append(f"it holds {labels} whole numbers, as label maps do, and they were blended; -n label keeps labels")
    return tuple(notes)


def _label_count(volume: Volume) -> int:
    """How many values an image has, if so few whole numbers that it may be a label map; else 0."""
    values = np.unique(volume.thinned)
    few = values.size <= _MOST_LABELS and bool((values == np.rint(values)).all())
    return int(values.size) if few and values.size > 1 else 0


def _read(image: Path, interpolation: Interpolation) -> list[Volume]:
    """The volumes, in the type in which they are stored where the interpolation keeps it."""
    if interpolation in ("linear", "bspline"):
        return read_series(image)
    header = read_header(image)
    whole = header.dtype.kind in "iu" and header.scale is None
    volumes = read_series(image, labels=whole or interpolation == "label")
    stored = header.dtype.newbyteorder("=")
    if header.scale is not None or stored == volumes[0].data.dtype:
        return volumes
    return [Volume(v.data.astype(stored), v.geometry, v.path, v.notes) for v in volumes]


def _time_step(image: Path) -> float | None:
    """Seconds between the volumes of a series, None where the file does not say."""
    header: Any = nib.load(image).header
    zooms = header.get_zooms()
    unit = header.get_xyzt_units()[1] if hasattr(header, "get_xyzt_units") else "msec"
    step = float(zooms[3]) * _SECONDS.get(unit, 1.0) if len(zooms) > 3 else 0.0
    return step if np.isfinite(step) and step > 0 else None


# Points ---------------------------------------------------------------------------------------------------


def warp_points_file(points: Path, chain: Chain, out: Path, frame: Frame) -> tuple[str, ...]:
    """Map the points of a CSV file (columns x, y, z in mm, others are kept) and write it.

    Returns what the user should know.

    A point of the fixed image becomes one of the moving image; the inverse chain leads back. ``frame`` is what the
    numbers of both files are: RAS as in nibabel, or LPS as in ITK and ANTs.
    """
    if out.suffix.lower() != ".csv":
        raise UsageError(f"{shown(out)}: points are written as CSV; end the name in .csv")
    columns, rows, where = _read_points(points)
    outside = 0
    if rows:
        given = np.array([[float(row[i]) for i in where] for row in rows])
        ras = given if frame == "ras" else flipped_points(given)
        moved: FloatArray = chain.points(ras)
        outside = chain.outside(ras)
        moved = moved if frame == "ras" else flipped_points(moved)
        for row, point in zip(rows, moved, strict=True):
            for i, value in zip(where, point, strict=True):
                row[i] = f"{value:.6f}"
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([columns, *rows])
    write_text(out, text.getvalue())
    if not outside:
        return ()
    return (f"{outside} of {len(rows)} points lie outside the field, where nothing is known of them",)


def _read_points(path: Path) -> tuple[list[str], list[list[str]], list[int]]:
    if not path.is_file():
        raise MissingInputError(f"{shown(path)}: no such file; check the path")
    try:
        table = [row for row in csv.reader(path.read_text(encoding="utf-8-sig").splitlines()) if row]
    except (UnicodeDecodeError, csv.Error) as error:
        raise BadDataError(f"{shown(path)}: is not a CSV file; give points as text with a header x,y,z") from error
    columns = table[0] if table else []
    names = [name.strip().lower() for name in columns]
    if any(names.count(axis) != 1 for axis in "xyz"):
        raise BadDataError(f"{shown(path)}: has no columns x, y and z in its first line; name them there")
    where = [names.index(axis) for axis in "xyz"]
    for number, row in enumerate(table[1:], 2):
        try:
            fine = len(row) == len(columns) and bool(np.isfinite([float(row[i]) for i in where]).all())
        except ValueError:
            fine = False
        if not fine:
            raise BadDataError(f"{shown(path)}: row {number} holds no point; give numbers for x, y and z")
    return columns, table[1:], where
