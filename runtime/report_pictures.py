"""The pictures of the report: planes of case, atlas and moved case, and of what the deformation did.

Pictures are planes along the world's axes at 1 mm a pixel, whatever way the files are stored. They follow the
radiological convention: the patient's left is on the right, anterior on the left of sagittal planes. Only
planes are sampled, never volumes.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from html import escape
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFilter

from jrs.fields import DisplacementField
from jrs.geometry import FloatArray, Geometry, apply_affine
from jrs.runtime.colors import CLASS_COLORS, CLASS_NAMES
from jrs.runtime.sampling import affine_coords, sample, sample_nearest
from jrs.volume import Volume, foreground_mask

Array = npt.NDArray[np.float32]
Labels = npt.NDArray[np.uint8]
Picture = npt.NDArray[np.uint8]  # rows, columns, red/green/blue

_VALUES = ((1,), (2,), (3, 4))
CLASSES: dict[str, tuple[tuple[int, ...], str]] = {
    name: (values, "#" + bytes(color).hex())
    for name, values, color in zip(CLASS_NAMES[1:], _VALUES, CLASS_COLORS[1:], strict=True)
}
"""Name: label values of every BraTS scheme, outline colour."""
GRID_MM = 8  # between the lines of the deformed grid
CHECK_MM = 24  # side of a field of the checkerboard

_VIRIDIS = ("#440154", "#472d7b", "#3b528b", "#2c728e", "#21918c", "#28ae80", "#5ec962", "#addc30", "#fde725")
_CHANGE = ("#b2541b", "#e08a4a", "#f3c9a5", "#f7f7f7", "#a8cde4", "#4f97c9", "#1f5f99")
"""From half the volume through none to twice: orange, white, blue."""
_FOLD = "#ff00ff"
_PLANES = {"axial": (0, 1), "coronal": (0, 2), "sagittal": (1, 2)}  # world axes along columns and rows
_ENDS = ("RL", "AP", "SI")  # first and last letter along each world axis as drawn
_RAMP = """</p><div class="ramp" style="background:linear-gradient(to right,{})"></div><div class="ticks">
<span>{}</span><span>{}</span><span>{}</span></div><p>{}"""
_MARGIN_MM, _MAX_SIDE_MM, _THREADS = 6.0, 320.0, 1  # planes are too small for more threads


@dataclass(frozen=True, eq=False)
class _Plane:
    """A picture's pixels in the world: 1 mm apart, RAS coordinates falling along both columns and rows.

    ``origin_ras`` is the pixel in the upper left corner, ``axes`` the world axes along columns and rows.
    """

    origin_ras: FloatArray
    axes: tuple[int, int]
    width: int
    height: int

    def coords(self, grid: Geometry) -> Array:
        """Voxel indices of ``grid`` under every pixel, (3, width, height, 1)."""
        matrix = np.zeros((4, 4))
        matrix[self.axes[0], 0] = matrix[self.axes[1], 1] = -1.0
        matrix[:, 3] = (*self.origin_ras, 1.0)
        return affine_coords((self.width, self.height, 1), grid.inverse @ matrix)

    def displacement(self, field: DisplacementField, affine: FloatArray) -> Array:
        """The non-linear part u(x) = A^-1 (x + d(x)) - x, mm, (3, rows, columns); border repeated."""
        ends = np.array(field.geometry.shape, dtype=np.float32).reshape(3, 1, 1, 1) - 1.0
        coords = np.clip(self.coords(field.geometry), 0.0, ends)
        points = field.geometry.to_ras(np.moveaxis(coords, 0, -1))
        d = np.moveaxis(sample(field.vectors_mm, coords, None, _THREADS), 0, -1)
        u = apply_affine(np.linalg.inv(affine), points + d) - points
        return np.nan_to_num(u[:, :, 0].T).astype(np.float32)


@dataclass(frozen=True, eq=False)
class Sparse:
    """Some voxels of an image, ``steps`` apart: ``mask`` says which, ``values`` (n,) are theirs."""

    mask: npt.NDArray[np.bool_]
    values: npt.NDArray[Any]
    steps: tuple[int, ...]
    grid: Geometry

    @staticmethod
    def of(volume: Volume) -> Sparse:
        """Every few voxels of the foreground, or of the whole grid if there is none."""
        steps = tuple(max(1, n // 80) for n in volume.data.shape)
        data = volume.raised[tuple(slice(None, None, step) for step in steps)]
        mask = foreground_mask(data)
        mask |= not mask.any()
        return Sparse(mask, data[mask], steps, volume.geometry)

    def center(self) -> FloatArray:
        """Their centre of mass, RAS mm."""
        index = np.unravel_index(np.flatnonzero(self.mask), self.mask.shape)
        return self.grid.to_ras(np.array([axis.mean() for axis in index]) * self.steps)

    def extent(self) -> FloatArray:
        """Lowest and highest coordinates, (2, 3) RAS mm."""
        # Only the ends of rows can be extreme, whatever way the grid is turned.
        rows = np.argwhere(self.mask.any(axis=2))
        first = self.mask.argmax(axis=2)
        last = self.mask.shape[2] - 1 - self.mask[:, :, ::-1].argmax(axis=2)
        ends = [np.column_stack([rows, end[tuple(rows.T)]]) for end in (first, last)]
        points = self.grid.to_ras(np.concatenate(ends) * self.steps)
        return np.array([points.min(axis=0), points.max(axis=0)])


@dataclass(frozen=True, eq=False)
class Look:
    """An image as it is shown: its window, the place of its foreground, the tumour's outlines."""

    volume: Volume
    labels: Labels | None

    @cached_property
    def foreground(self) -> Sparse:
        """Every few voxels of it; of the whole grid if there is none."""
        return Sparse.of(self.volume)

    @cached_property
    def window(self) -> tuple[float, float]:
        """What is shown black and white: the foreground's 1st and 99th percentile."""
        low, high = np.percentile(np.nan_to_num(self.foreground.values), (1.0, 99.0))
        return low if low < high else 0.0, high

    @cached_property
    def tumor_center(self) -> FloatArray | None:
        """Centre of mass of all labels, RAS mm; None without a tumour."""
        return None if self.labels is None else label_center(self.labels, self.volume.geometry)

    def grey(self, plane: _Plane) -> Array:
        """The image on a plane, (rows, columns), 1st to 99th percentile of the foreground mapped to 0..1."""
        (low, high), coords = self.window, plane.coords(self.volume.geometry)
        values = np.nan_to_num(sample(self.volume.raised[None], coords, 0.0, _THREADS)[0, :, :, 0].T)
        grey: Array = np.clip((values - low) / max(high - low, 1e-30), 0.0, 1.0).astype(np.float32)
        return grey

    def outlined(self, plane: _Plane, picture: Picture) -> Picture:
        """A picture of that plane with the outline of each tumour class."""
        if self.labels is not None:
            labels = sample_nearest(self.labels, plane.coords(self.volume.geometry))[:, :, 0].T
            for values, color in CLASSES.values():
                picture[_edge(np.isin(labels, values))] = _bytes_of(color)
        return picture


def label_center(labels: Labels, grid: Geometry) -> FloatArray | None:
    """Centre of mass of all labels, RAS mm; None without one."""
    where = np.flatnonzero(labels != 0)  # several times faster than argwhere
    index = np.unravel_index(where, labels.shape)
    return grid.to_ras(np.array([axis.mean() for axis in index])) if where.size else None


def _views(
    looks: Mapping[str, Look], field: DisplacementField | None, affine: FloatArray
) -> tuple[dict[str, _Plane], dict[str, _Plane], FloatArray, FloatArray]:
    """Planes on the case and on the atlas through corresponding points, and these points (RAS mm)."""
    case, atlas, moved = looks["case"], looks["atlas"], looks["moved"]
    point, there = atlas.tumor_center, case.tumor_center
    if point is None and there is not None:  # segmented, but nothing of it on the atlas
        point = apply_affine(np.linalg.inv(affine), there)
    else:
        point = atlas.foreground.center() if point is None else point
        u = 0.0 if field is None else _Plane(point, (0, 1), 1, 1).displacement(field, affine)[:, 0, 0]
        there = apply_affine(affine, point + u)
    shown = case.foreground.extent(), np.concatenate([atlas.foreground.extent(), moved.foreground.extent()])
    low, high = np.array([p.min(axis=0) for p in shown]), np.array([p.max(axis=0) for p in shown])
    side = np.ceil(np.minimum((high - low).max(axis=0) + 2.0 * _MARGIN_MM, _MAX_SIDE_MM)) + 1.0
    views: list[dict[str, _Plane]] = [{}, {}]
    for planes, through, middle in zip(views, (there, point), (low + high) / 2.0, strict=True):
        for name, (across, down) in _PLANES.items():
            origin, width, height = through.copy(), side[across], max(side[1], side[2])  # all of one height
            origin[across] = middle[across] + (width - 1.0) / 2.0
            origin[down] = middle[down] + (height - 1.0) / 2.0
            planes[name] = _Plane(origin, (across, down), int(width), int(height))
    return views[0], views[1], there, point


def _bytes_of(color: str) -> list[int]:
    return list(bytes.fromhex(color[1:]))


def _rgb(grey: Array) -> Picture:
    return np.repeat(np.rint(grey * 255.0).astype(np.uint8)[:, :, None], 3, axis=2)


def _edge(mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """A mask less its erosion by one pixel (four neighbours)."""
    padded = np.pad(mask, 1)
    inner = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return np.logical_and(mask, ~inner)


def _grid_picture(plane: _Plane, u: Array, grey: Array) -> Picture:
    """The image of a regular grid of lines under x -> x + u(x), in-plane, over the dimmed atlas."""
    fine = 4  # drawn this much larger, then averaged: smooth lines
    canvas = Image.new("L", (plane.width * fine, plane.height * fine))
    rows, columns = np.mgrid[0 : plane.height, 0 : plane.width].astype(np.float32)
    # World coordinates fall along columns and rows, so a positive u moves a pixel back.
    moved = np.stack([columns - u[plane.axes[0]], rows - u[plane.axes[1]]], axis=-1) * fine + fine / 2.0
    for axis, lines in zip(plane.axes, (moved.transpose(1, 0, 2), moved), strict=True):
        for line in lines[round(plane.origin_ras[axis]) % GRID_MM :: GRID_MM]:
            ImageDraw.Draw(canvas).line(line.ravel().tolist(), fill=255, width=fine)
    lines = np.asarray(canvas.resize((plane.width, plane.height), Image.Resampling.BOX), dtype=np.float32)
    return _rgb(np.maximum(grey * 0.5, lines * (0.9 / 255.0)))


def _closed(grey: Array) -> npt.NDArray[np.bool_]:
    """Where an image has foreground, its small holes closed."""
    # A mean over 11 x 11 pixels is above zero where the maximum is, and far cheaper.
    mean, white = ImageFilter.BoxBlur(5), np.uint8(255)
    widened = np.asarray(Image.fromarray((grey > 0.0) * white).filter(mean)) > 0
    closed: npt.NDArray[np.bool_] = np.asarray(Image.fromarray(~widened * white).filter(mean)) == 0
    return closed


def _colored(share: Array, colors: tuple[str, ...], mask: npt.NDArray[np.bool_]) -> Picture:
    """0 to 1 in colours, black outside the mask."""
    anchors = np.array([_bytes_of(color) for color in colors], dtype=np.float64)
    at = np.clip(share, 0.0, 1.0) * (len(anchors) - 1)
    bands = [np.interp(at, np.arange(len(anchors)), band) * mask for band in anchors.T]
    picture: Picture = np.rint(np.stack(bands, axis=-1)).astype(np.uint8)
    return picture


def _length_picture(u: Array, mask: npt.NDArray[np.bool_], top_mm: float) -> Picture:
    """|u| in colours from 0 to ``top_mm``."""
    return _colored(np.linalg.norm(u, axis=0) / np.float32(top_mm), _VIRIDIS, mask)


def _change_picture(plane: _Plane, jacobian: Volume, scale: float, mask: npt.NDArray[np.bool_]) -> Picture:
    """Volume on the atlas by volume under the affine alone, |det A| / J, from half to twice; folds stand out."""
    values = sample(jacobian.data[None], plane.coords(jacobian.geometry), None, _THREADS)[0, :, :, 0].T
    change: Array = np.log2(np.float32(scale) / np.maximum(values, 1e-6))
    picture = _colored((change + 1.0) / 2.0, _CHANGE, mask)
    picture[mask & (values <= 0.0)] = _bytes_of(_FOLD)
    return picture


def _checkerboard(plane: _Plane, one: Picture, two: Picture) -> Picture:
    """Fields of two pictures in turn."""
    rows, columns = np.mgrid[0 : plane.height, 0 : plane.width] // CHECK_MM
    picture: Picture = np.where(((rows + columns) % 2 == 0)[:, :, None], one, two)
    return picture


def _pane(picture: Picture, plane: _Plane, alt: str, key: str) -> str:
    """One picture with its direction letters; ``data-origin`` is the upper left pixel in RAS mm."""
    png = io.BytesIO()
    Image.fromarray(picture).save(png, "PNG", compress_level=4)  # level 6 takes longer for a few percent
    ends = zip("wens", _ENDS[plane.axes[0]] + _ENDS[plane.axes[1]], strict=True)
    return (
        f'<div class="pane"><img src="data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}" '
        f'width="{plane.width}" height="{plane.height}" alt="{alt}" data-picture="{key}" '
        f'data-origin="{",".join(f"{v:.3f}" for v in plane.origin_ras)}">'
        + "".join(f'<b class="{place}">{letter}</b>' for place, letter in ends)
        + f'<i style="width:{5000.0 / plane.width:.2f}%">5 cm</i></div>'
    )


def pictures(
    looks: Mapping[str, Look],
    field: DisplacementField | None,
    jacobian: Volume | None,
    affine: FloatArray,
    modality: str,
) -> str:
    """The section of pictures as HTML; ``looks`` are ``case``, ``atlas`` and ``moved``."""
    away, here, there, point = _views(looks, field, affine)
    planes = {"case": away, "atlas": here, "moved": here}
    grey = {key: {n: looks[key].grey(plane) for n, plane in planes[key].items()} for key in planes}
    plain = {key: {n: _rgb(grey[key][n]) for n in here} for key in planes}
    drawn = {k: {n: looks[k].outlined(p, plain[k][n].copy()) for n, p in planes[k].items()} for k in planes}
    fixed, ramps = grey["atlas"], {"length": "", "jacobian": ""}
    drawn["blend"] = {n: np.dstack([plain["atlas"][n][..., :1], plain["moved"][n][..., 1:]]) for n in here}
    drawn["checker"] = {n: _checkerboard(p, plain["atlas"][n], plain["moved"][n]) for n, p in here.items()}
    masks = {n: _closed(fixed[n]) for n in here}
    if field is not None:
        u = {n: plane.displacement(field, affine) for n, plane in here.items()}
        most = max(float(np.linalg.norm(u[n], axis=0).max(initial=0.0, where=fixed[n] > 0.0)) for n in here)
        top = max(1, math.ceil(most - 0.01))
        grids = {n: _grid_picture(plane, u[n], fixed[n]) for n, plane in here.items()}
        drawn["grid"] = {n: looks["atlas"].outlined(plane, grids[n]) for n, plane in here.items()}
        drawn["length"] = {n: _length_picture(u[n], masks[n], top) for n in here}
        words = f"At most {most:.1f} mm in these planes."
        ramps["length"] = _RAMP.format(",".join(_VIRIDIS), 0, f"{top / 2:g}", f"{top} mm", words)
    if jacobian is not None:
        scale = abs(float(np.linalg.det(affine[:3, :3])))
        changes = {n: _change_picture(plane, jacobian, scale, masks[n]) for n, plane in here.items()}
        drawn["jacobian"] = {n: looks["atlas"].outlined(plane, changes[n]) for n, plane in here.items()}
        ramps["jacobian"] = _RAMP.format(",".join(_CHANGE), "half", "same", "twice", "Magenta: folded.")
    return _section(drawn, planes, here, _captions(escape(modality.upper()), there, point, ramps))


def _captions(
    shown: str, there: FloatArray, point: FloatArray, ramps: Mapping[str, str]
) -> dict[str, tuple[str, str]]:
    at = "({:.0f}, {:.0f}, {:.0f}) mm"
    change = f"Jacobian map: volume on the atlas by volume under the affine alone.{ramps['jacobian']}"
    return {
        "case": ("Case", f"{shown} as read, planes through {at.format(*there)}."),
        "atlas": ("Atlas", f"Planes through {at.format(*point)}."),
        "moved": ("Moved case", f"{shown} on the atlas’s grid."),
        "grid": ("Deformed grid", f"Lines every {GRID_MM} mm, moved by the deformation without the affine."),
        "jacobian": ("Volume change", change),
        "blend": ("Overlay", "Atlas red, moved case cyan; grey where both are equally bright."),
        "checker": ("Checkerboard", f"Atlas and moved case in turn, fields of {CHECK_MM} mm."),
        "length": ("Displacement", f"Length of the deformation without the affine.{ramps['length']}"),
    }


_SLIDER = """<div class="row slider" hidden><div><h3>Slider</h3><p>From the atlas to the moved case.</p>
<input type="range" min="0" max="100" value="50" aria-label="From the atlas to the moved case"></div></div>"""


def _section(
    drawn: Mapping[str, Mapping[str, Picture]],
    planes: Mapping[str, Mapping[str, _Plane]],
    here: Mapping[str, _Plane],
    captions: Mapping[str, tuple[str, str]],
) -> str:
    rows = ""
    for key, (title, words) in captions.items():
        panes = '<p class="absent"><span class="na">not computed</span></p>'
        if key in drawn:
            of = planes.get(key, here).items()
            panes = "".join(_pane(drawn[key][n], p, f"{title}, {n} plane", f"{key}-{n}") for n, p in of)
        rows += f'<div class="row"><div><h3>{title}</h3><p>{words}</p></div>{panes}</div>'
        rows += _SLIDER if key == "blend" else ""
    legend = "".join(f'<li><i style="background:{c}"></i>{name}</li>' for name, (_, c) in CLASSES.items())
    heads = "".join(f"<b>{n.capitalize()}</b>" for n in here)
    columns = " ".join(f"minmax(0,{plane.width}fr)" for plane in here.values())
    return (
        '<section><h2>Pictures</h2><p class="note">World axes, one scale, radiological convention: the '
        f'patient’s left is on the right. Outlines:</p><ul class="legend">{legend}</ul>'
        f'<div style="--columns:{columns}"><div class="row heads"><i></i>{heads}</div>{rows}</div></section>'
    )
