"""The report for the eye: one self-contained HTML page about one case on one atlas.

Pictures are planes along the world's axes at 1 mm a pixel, whatever way the files are stored. They follow the
radiological convention: the patient's left is on the right, anterior on the left of sagittal planes. Only
planes are sampled, never volumes. Whatever the report lacks is shown as "not computed".
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from html import escape
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFilter

from jrs.fields import DisplacementField
from jrs.geometry import FloatArray, Geometry, apply_affine
from jrs.runtime.sampling import affine_coords, sample, sample_nearest
from jrs.volume import Volume, foreground_mask

Array = npt.NDArray[np.float32]
Labels = npt.NDArray[np.uint8]
Picture = npt.NDArray[np.uint8]  # rows, columns, red/green/blue

CLASSES: dict[str, tuple[tuple[int, ...], str]] = {
    "Necrotic and non-enhancing core": ((1,), "#f0e442"),
    "Oedema": ((2,), "#56b4e9"),
    "Enhancing tumour": ((3, 4), "#d55e00"),
}
"""Name: label values, outline colour (Okabe and Ito's palette, which colour-blind readers can tell apart)."""
KEPT_PERCENT = 95.0  # a tumour that the deformation leaves this much of its volume has not been shrunk
GRID_MM = 8  # between the lines of the deformed grid

_VIRIDIS = ("#440154", "#472d7b", "#3b528b", "#2c728e", "#21918c", "#28ae80", "#5ec962", "#addc30", "#fde725")
_REGIONS = {"WT": "Whole tumour", "TC": "Tumour core", "ET": "Enhancing tumour"}
_PLANES = {"axial": (0, 1), "coronal": (0, 2), "sagittal": (1, 2)}  # world axes along columns and rows
_ENDS = ("RL", "AP", "SI")  # first and last letter along each world axis as drawn
_RAMP = """</p><div class="ramp" style="background:linear-gradient(to right,{})"></div><div class="ticks">
<span>0</span><span>{:g}</span><span>{} mm</span></div><p>At most {:.1f} mm in these planes."""
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
class _Look:
    """An image as it is shown: its window, the place of its foreground, the tumour's outlines."""

    volume: Volume
    labels: Labels | None

    @cached_property
    def foreground(self) -> tuple[npt.NDArray[Any], FloatArray]:
        """Every few voxels of it: values (n,), RAS mm (n,3); of the whole grid if there is none."""
        steps = [max(1, n // 80) for n in self.volume.data.shape]
        data = self.volume.data[tuple(slice(None, None, step) for step in steps)]
        mask = foreground_mask(data)
        mask |= not mask.any()
        return data[mask], self.volume.geometry.to_ras(np.argwhere(mask) * steps)

    @cached_property
    def tumor_center(self) -> FloatArray | None:
        """Centre of mass of all labels, RAS mm; None without a tumour."""
        where = np.empty((0, 3)) if self.labels is None else np.argwhere(self.labels != 0)
        return self.volume.geometry.to_ras(where.mean(axis=0)) if where.size else None

    def grey(self, plane: _Plane) -> Array:
        """The image on a plane, (rows, columns), 1st to 99th percentile of the foreground mapped to 0..1."""
        low, high = np.percentile(np.nan_to_num(self.foreground[0]), (1.0, 99.0))
        low, coords = low if low < high else 0.0, plane.coords(self.volume.geometry)
        values = np.nan_to_num(sample(self.volume.data[None], coords, 0.0, _THREADS)[0, :, :, 0].T)
        grey: Array = np.clip((values - low) / max(high - low, 1e-30), 0.0, 1.0).astype(np.float32)
        return grey

    def outlined(self, plane: _Plane, picture: Picture) -> Picture:
        """A picture of that plane with the outline of each tumour class."""
        if self.labels is not None:
            labels = sample_nearest(self.labels, plane.coords(self.volume.geometry))[:, :, 0].T
            for values, color in CLASSES.values():
                picture[_edge(np.isin(labels, values))] = _bytes_of(color)
        return picture


def _views(
    looks: Mapping[str, _Look], field: DisplacementField | None, affine: FloatArray
) -> tuple[dict[str, _Plane], dict[str, _Plane], FloatArray, FloatArray]:
    """Planes on the case and on the atlas through corresponding points, and these points (RAS mm)."""
    case, atlas, moved = looks["case"], looks["atlas"], looks["moved"]
    point, there = atlas.tumor_center, case.tumor_center
    if point is None and there is not None:  # segmented, but nothing of it on the atlas
        point = apply_affine(np.linalg.inv(affine), there)
    else:
        point = atlas.foreground[1].mean(axis=0) if point is None else point
        u = 0.0 if field is None else _Plane(point, (0, 1), 1, 1).displacement(field, affine)[:, 0, 0]
        there = apply_affine(affine, point + u)
    shown = (case.foreground[1], np.concatenate([atlas.foreground[1], moved.foreground[1]]))
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


def _length_picture(u: Array, grey: Array, top_mm: float) -> Picture:
    """|u| in colours from 0 to ``top_mm`` where the atlas has foreground, its small holes closed."""
    mask = Image.fromarray((grey > 0.0).astype(np.uint8))
    mask = mask.filter(ImageFilter.MaxFilter(11)).filter(ImageFilter.MinFilter(11))
    anchors = np.array([_bytes_of(color) for color in _VIRIDIS], dtype=np.float64)
    at = np.clip(np.linalg.norm(u, axis=0) / top_mm, 0.0, 1.0) * (len(anchors) - 1)
    colors = [np.interp(at, np.arange(len(anchors)), c) * np.asarray(mask) for c in anchors.T]
    picture: Picture = np.rint(np.stack(colors, axis=-1)).astype(np.uint8)
    return picture


def _get(report: Any, *keys: str) -> Any:
    for key in keys:
        report = report.get(key) if isinstance(report, Mapping) else None
    return report


def _html(value: Any, digits: int = 3, ending: str = "") -> str:
    """A value as HTML: floats rounded, text escaped, what is missing said in words."""
    if value is None or value == "" or (isinstance(value, float) and not math.isfinite(value)):
        return '<span class="na">not computed</span>'
    return escape(f"{value:.{digits}f}" if isinstance(value, float) else str(value)) + ending


def _percent(part: Any, whole: Any) -> float | None:
    numbers = all(isinstance(v, (int, float)) and math.isfinite(v) for v in (part, whole))
    return 100.0 * part / whole if numbers and whole > 0 else None


def _table(rows: Iterable[Iterable[str]], kind: str = "words", header: Iterable[str] = ()) -> str:
    """Cells are HTML already."""
    lines = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    head = "".join(f'<th scope="col">{cell}</th>' for cell in header)
    table = f'<table class="{kind}"><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table>'
    return table if lines else _html(None)


def _pairs(values: Any) -> str:
    items = values.items() if isinstance(values, Mapping) else ()
    return _table((escape(str(key)), _html(value)) for key, value in items)


def _verdict(kept: float | None, native_ml: Any) -> tuple[str, str]:
    """The answer in words and its colour, from the percentage that the deformation alone keeps."""
    if kept is None:
        return ("No tumour was segmented." if native_ml == 0 else "Not computed: no tumour volumes."), "open"
    if kept < KEPT_PERCENT:
        return f"Yes: the deformation took {100.0 - kept:.1f} % of the whole tumour’s volume.", "bad"
    color = "good" if kept <= 10_000.0 / KEPT_PERCENT else "bad"
    return f"No: the deformation left the whole tumour at {kept:.1f} % of its volume.", color


def _answer(report: Mapping[str, Any], affine: FloatArray) -> str:
    scale = abs(float(np.linalg.det(affine[:3, :3])))
    rows, kept = [], {}
    for region, name in _REGIONS.items():
        native, moved = (_get(report, "volumes_ml", where, region) for where in ("native", "moved"))
        ratio = _percent(moved, native)
        kept[region] = alone = None if ratio is None else ratio * scale
        cells = _html(native, 2), _html(moved, 2), _html(ratio, 1, " %"), _html(alone, 1, " %")
        rows.append((f"{name} <small>{region}</small>", *cells))
    sentence, color = _verdict(kept["WT"], _get(report, "volumes_ml", "native", "WT"))
    header = ("Region", "Case, ml", "On the atlas, ml", "Ratio", "Deformation alone")
    jacobian, similarity = _get(report, "jacobian"), _get(report, "similarity")
    of, (before, after) = _get(similarity, "modality"), (_get(similarity, k) for k in ("before", "after"))
    facts = {
        "Folding, share of the brain": _html(_get(jacobian, "folding_percent"), 3, " %"),
        "Mean Jacobian inside the tumour": _html(_get(jacobian, "inside_tumor")),
        "Mean Jacobian outside the tumour": _html(_get(jacobian, "outside_tumor")),
        f"Correlation with the atlas{f' ({_html(of)})' if of else ''}": f"{_html(before)} → {_html(after)}",
    }
    return (
        f'<section><h2>Did registration shrink the tumour?</h2><p class="verdict {color}">{sentence}</p>'
        f'{_table(rows, "numbers", header)}<p class="note">The affine alone, which fits the head to the '
        f"atlas’s size, brings every volume to {100.0 / scale:.1f} %; the last column has this divided out, "
        f'and below {KEPT_PERCENT:g} % there counts as shrinking.</p><dl class="cards facts">'
        + "".join(f"<div><dt>{fact}</dt><dd>{value}</dd></div>" for fact, value in facts.items())
        + '</dl><p class="note">Jacobian determinants are of the whole transform, atlas to case: the affine '
        f"alone has {scale:.3f}; above it, tissue takes up less room on the atlas.</p></section>"
    )


def _pane(picture: Picture, plane: _Plane, alt: str, key: str) -> str:
    """One picture with its direction letters; ``data-origin`` is the upper left pixel in RAS mm."""
    png = io.BytesIO()
    Image.fromarray(picture).save(png, "PNG")
    ends = zip("wens", _ENDS[plane.axes[0]] + _ENDS[plane.axes[1]], strict=True)
    return (
        f'<div class="pane"><img src="data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}" '
        f'width="{plane.width}" height="{plane.height}" alt="{alt}" data-picture="{key}" '
        f'data-origin="{",".join(f"{v:.3f}" for v in plane.origin_ras)}">'
        + "".join(f'<b class="{place}">{letter}</b>' for place, letter in ends)
        + f'<i style="width:{5000.0 / plane.width:.2f}%">5 cm</i></div>'
    )


def _pictures(looks: Mapping[str, _Look], field: DisplacementField | None, affine: FloatArray, modality: str) -> str:
    away, here, there, point = _views(looks, field, affine)
    planes = {"case": away, "atlas": here, "moved": here}
    grey = {key: {n: looks[key].grey(plane) for n, plane in planes[key].items()} for key in planes}
    pictures = {k: {n: looks[k].outlined(p, _rgb(grey[k][n])) for n, p in planes[k].items()} for k in planes}
    fixed, moved, ramp = grey["atlas"], grey["moved"], ""
    pictures["blend"] = {n: np.dstack([_rgb(fixed[n])[..., :1], _rgb(moved[n])[..., 1:]]) for n in here}
    if field is not None:
        u = {n: plane.displacement(field, affine) for n, plane in here.items()}
        most = max(float(np.linalg.norm(u[n], axis=0).max(initial=0.0, where=fixed[n] > 0.0)) for n in here)
        top = max(1, math.ceil(most - 0.01))
        grids = {n: _grid_picture(plane, u[n], fixed[n]) for n, plane in here.items()}
        pictures["grid"] = {n: looks["atlas"].outlined(plane, grids[n]) for n, plane in here.items()}
        pictures["length"] = {n: _length_picture(u[n], fixed[n], top) for n in here}
        ramp = _RAMP.format(",".join(_VIRIDIS), top / 2, top, most)
    shown, at = escape(modality.upper()), "({:.0f}, {:.0f}, {:.0f}) mm"
    captions = {
        "case": ("Case", f"{shown} as read, planes through {at.format(*there)}."),
        "atlas": ("Atlas", f"Planes through {at.format(*point)}."),
        "moved": ("Moved case", f"{shown} on the atlas’s grid."),
        "grid": ("Deformed grid", f"Lines every {GRID_MM} mm, moved by the deformation without the affine."),
        "blend": ("Overlay", "Atlas red, moved case cyan; grey where both are equally bright."),
        "length": ("Displacement", f"Length of the deformation without the affine.{ramp}"),
    }
    rows = ""
    for key, (title, words) in captions.items():
        panes = f'<p class="absent">{_html(None)}</p>'
        if key in pictures:
            of = planes.get(key, here).items()
            panes = "".join(_pane(pictures[key][n], p, f"{title}, {n} plane", f"{key}-{n}") for n, p in of)
        rows += f'<div class="row"><div><h3>{title}</h3><p>{words}</p></div>{panes}</div>'
    legend = "".join(f'<li><i style="background:{c}"></i>{name}</li>' for name, (_, c) in CLASSES.items())
    heads = "".join(f"<b>{n.capitalize()}</b>" for n in here)
    columns = " ".join(f"minmax(0,{plane.width}fr)" for plane in here.values())
    return (
        '<section><h2>Pictures</h2><p class="note">World axes, one scale, radiological convention: the '
        f'patient’s left is on the right. Outlines:</p><ul class="legend">{legend}</ul>'
        f'<div style="--columns:{columns}"><div class="row heads"><i></i>{heads}</div>{rows}</div></section>'
    )


def _details(report: Mapping[str, Any], affine: FloatArray) -> str:
    stages = dict(report.get("timings_s") or {})
    made = {
        **{key.capitalize(): _get(report, "engine", key) for key in ("backend", "device", "precision")},
        **{f"Bundle {key}": _get(report, "bundle", key) for key in ("name", "sha256")},
        "Modalities": ", ".join(map(str, report.get("modalities") or ())),
        "Warnings": "see above" if report.get("warnings") else "none" if "warnings" in report else None,
    }
    total = ("total", _html(stages.pop("total", None), 2, " s"), "")
    longest = max((v for v in stages.values() if _percent(v, 1.0) is not None), default=0.0)
    width = {k: f"width:{_percent(v, longest) or 0.0:.1f}%" for k, v in stages.items()}
    bars = [(_html(k), _html(v, 2, " s"), f'<div style="{width[k]}"></div>') for k, v in stages.items()]
    matrix = _table([[f"{v:.4f}" for v in row] for row in affine.tolist()], "matrix")
    cards = {"Engine": _pairs(made), "Time": _table([*bars, total], "words bars")}
    cards |= {"Affine, atlas to case, RAS mm": matrix, "Versions": _pairs(report.get("versions"))}
    cards |= {"Files": _pairs(report.get("outputs"))}
    body = "".join(f"<div><h3>{title}</h3>{table}</div>" for title, table in cards.items())
    return f'<section><h2>How it was made</h2><div class="cards">{body}</div></section>'


def html_report(
    report: Mapping[str, Any],
    native: Volume,
    native_labels: Labels | None,
    fixed: Volume,
    moved: Array,
    moved_labels: Labels | None,
    field: DisplacementField | None,
    affine: FloatArray,
    modality: str,
) -> str:
    """The page about one case, as HTML that needs nothing else.

    ``report`` is the content of ``<case>_report.json``. ``native`` is the case's ``modality`` with its
    ``native_labels`` (BraTS: 1, 2, and 3 or 4); ``moved`` and ``moved_labels`` lie on the grid of ``fixed``.
    ``field`` is the total displacement d(x) = A(x + u(x)) - x, RAS mm, and ``affine`` is A (4x4).
    """
    affine = np.asarray(affine, dtype=np.float64)
    title = " on ".join(_html(report.get(key)) for key in ("case", "atlas"))
    looks = {"case": _Look(native, native_labels), "atlas": _Look(fixed, moved_labels)}
    looks["moved"] = _Look(Volume(moved, fixed.geometry), moved_labels)
    items = "".join(f"<li>{_html(warning)}</li>" for warning in report.get("warnings") or ())
    warnings = f'<section class="warnings"><h2>Warnings</h2><ul>{items}</ul></section>' if items else ""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width='
        'device-width,initial-scale=1"><meta http-equiv="Content-Security-Policy" content="default-src '
        "'none'; img-src data:; style-src 'unsafe-inline'\"><title>"
        f"{escape(str(report.get('case') or 'Case'))}: jrs report</title><style>{_STYLE}</style></head><body>"
        f"<header><p>Registration and tumour segmentation</p><h1>{title}</h1></header><main>"
        f"{_answer(report, affine)}{warnings}{_pictures(looks, field, affine, modality)}"
        f"{_details(report, affine)}</main><footer>Made by jrs. Not a medical device: for research use only, "
        "not for diagnosis or treatment.</footer></body></html>\n"
    )


_STYLE = """
:root{color-scheme:light;--page:#f5f6f8;--card:#fff;--text:#1b2330;--soft:#5b6675;--line:#dde2e9;
--good:#0b7a5c;--bad:#b3450b;--warn:#fff4dc}@media screen and (prefers-color-scheme:dark){
:root{color-scheme:dark;--page:#12161c;--card:#1b212a;--text:#e6eaf0;--soft:#9aa6b5;--line:#313a46;
--good:#4cc9a2;--bad:#f0945c;--warn:#3a2e12}}*{box-sizing:border-box}
body{margin:auto;padding:24px;max-width:1180px;background:var(--page);color:var(--text);
font:15px/1.5 system-ui,"Segoe UI",Roboto,sans-serif;print-color-adjust:exact}h1,h2,h3,p,ul,dl,dd{margin:0}
h1{font-size:26px;overflow-wrap:anywhere}h2{font-size:18px;margin-bottom:12px}h3{font-size:15px}
header p,footer,small,.note,.na,.row p,dt,th{color:var(--soft)}
.note,dt,th,.row p,.ticks,footer{font-size:13px}.na{font-style:italic;font-weight:400}
dd,.verdict{font-size:19px;font-weight:600}footer{text-align:center}
section{margin:20px 0;padding:20px;background:var(--card);border:1px solid var(--line);border-radius:8px}
.verdict{padding:10px 14px;margin-bottom:16px;border-left:5px solid}.good{color:var(--good)}
.bad{color:var(--bad)}.warnings{background:var(--warn);border:2px solid var(--bad)}.note{margin:10px 0}
table{width:100%;border-collapse:collapse;font-variant-numeric:tabular-nums}
td,th{padding:5px 8px;text-align:right;border-top:1px solid var(--line);font-weight:400;vertical-align:top}
th{border:0}.words td,tr>:first-child{text-align:left}.words td{overflow-wrap:anywhere}
.words td:first-child{white-space:nowrap}.matrix td{text-align:right!important}.bars td:last-child{width:45%}
.bars div{height:10px;margin-top:6px;background:#4a86c8}.cards>div{break-inside:avoid}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,440px),1fr));gap:24px 32px}
.facts{grid-template-columns:repeat(auto-fit,minmax(150px,1fr))}.legend{padding:0;margin-bottom:12px}
.legend li{display:inline-block;margin-right:20px}h2,.legend,.heads{break-after:avoid}
.legend i{display:inline-block;width:12px;height:12px;margin-right:7px}
.row{display:grid;grid-template-columns:150px var(--columns);gap:6px;margin-bottom:6px;break-inside:avoid}
.row p{padding-bottom:6px}.absent{grid-column:2/-1}.heads{text-align:center}
.pane img{width:100%;height:auto;display:block}.pane{position:relative;overflow:hidden;border-radius:4px}
.pane>:not(img){position:absolute;color:#fff;font:600 12px/1 sans-serif;text-shadow:0 0 2px #000,0 0 4px #000}
.w,.e{top:calc(50% - 6px)}.n,.s{left:calc(50% - 4px)}.w{left:5px}.e{right:5px}.n{top:5px}.s{bottom:5px}
.pane>i:last-child{left:8px;bottom:6px;padding-bottom:3px;border-bottom:2px solid;font:10px sans-serif}
.row:nth-child(n+3) .pane>i{display:none}.ramp{height:12px}.ticks{display:flex;justify-content:space-between}
@media (max-width:700px){.row{grid-template-columns:var(--columns)}.row>:first-child,.absent{grid-column:1/-1}
}@media print{@page{margin:12mm}body{padding:0;max-width:none;background:#fff;font-size:12px}
section{border:0;padding:0}.warnings{padding:10px}h2+.note{break-after:avoid}}
"""
