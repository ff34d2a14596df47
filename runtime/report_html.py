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
from PIL import Image, ImageDraw

from jrs.fields import DisplacementField
from jrs.geometry import FloatArray, Geometry, apply_affine
from jrs.runtime.sampling import affine_coords, sample, sample_nearest
from jrs.volume import Volume, foreground_mask

Array = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]
Labels = npt.NDArray[np.uint8]
Picture = npt.NDArray[np.uint8]
"""Rows, columns, red/green/blue."""

CLASSES: dict[str, tuple[tuple[int, ...], str]] = {
    "Necrotic and non-enhancing core": ((1,), "#f0e442"),
    "Oedema": ((2,), "#56b4e9"),
    "Enhancing tumour": ((3, 4), "#d55e00"),
}
"""Name: label values, outline colour (Okabe and Ito's palette, which colour-blind readers can tell apart)."""
KEPT_PERCENT = 95.0
"""A tumour that the deformation leaves at least this much of its volume has not been shrunk."""
GRID_MM = 8
"""Distance between the lines of the deformed grid."""

_VIRIDIS = ("#440154", "#472d7b", "#3b528b", "#2c728e", "#21918c", "#28ae80", "#5ec962", "#addc30", "#fde725")
_MISSING = "not computed"
_REGIONS = {"WT": "Whole tumour", "TC": "Tumour core", "ET": "Enhancing tumour"}
_PLANES = {"axial": (0, 1, 2), "coronal": (0, 2, 1), "sagittal": (1, 2, 0)}
"""World axis along the columns, along the rows, and across."""
_ENDS = ("RL", "AP", "SI")  # first and last letter along each world axis as drawn
_MARGIN_MM = 6.0
_MAX_SIDE_MM = 320.0
_THREADS = 1  # planes are too small for more


# Planes and images ----------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Plane:
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
        """The non-linear part u(x) = A^-1 (x + d(x)) - x, mm, (3, rows, columns); repeated outside the grid."""
        ends = np.array(field.geometry.shape, dtype=np.float32).reshape(3, 1, 1, 1) - 1.0
        coords = np.clip(self.coords(field.geometry), 0.0, ends)
        points = field.geometry.to_ras(np.moveaxis(coords, 0, -1))
        d = np.moveaxis(sample(field.vectors_mm, coords, None, _THREADS), 0, -1)
        u = apply_affine(np.linalg.inv(affine), points + d) - points
        return np.nan_to_num(u[:, :, 0].T).astype(np.float32)


@dataclass(frozen=True, eq=False)
class Look:
    """How an image is shown: window, box and centre from every few voxels, and the tumour's outline."""

    volume: Volume
    labels: Labels | None

    @cached_property
    def _foreground(self) -> tuple[npt.NDArray[Any], FloatArray]:
        """Foreground values (n,) and their RAS mm (n,3); the whole grid's if there is no foreground."""
        steps = [max(1, n // 80) for n in self.volume.data.shape]
        data = self.volume.data[tuple(slice(None, None, step) for step in steps)]
        mask = foreground_mask(data)
        if not mask.any():
            mask = np.ones(data.shape, dtype=bool)
        return data[mask], self.volume.geometry.to_ras(np.argwhere(mask) * steps)

    @cached_property
    def window(self) -> tuple[float, float]:
        """1st and 99th percentile of the foreground."""
        low, high = (float(v) for v in np.percentile(np.nan_to_num(self._foreground[0]), (1.0, 99.0)))
        return low, high if high > low else low + 1.0

    @property
    def box(self) -> FloatArray:
        """Lowest and highest RAS mm of the foreground, (2,3)."""
        points = self._foreground[1]
        return np.stack([points.min(axis=0), points.max(axis=0)])

    @property
    def center(self) -> FloatArray:
        """Centre of mass of the foreground, RAS mm."""
        center: FloatArray = self._foreground[1].mean(axis=0)
        return center

    @cached_property
    def tumor_center(self) -> FloatArray | None:
        """Centre of mass of all labels, RAS mm; None without a tumour."""
        where = np.empty((0, 3)) if self.labels is None else np.argwhere(self.labels != 0)
        return self.volume.geometry.to_ras(where.mean(axis=0)) if where.size else None

    def grey(self, plane: Plane) -> Array:
        """The image on a plane, (rows, columns), its window mapped to 0..1."""
        values = sample(self.volume.data[None], plane.coords(self.volume.geometry), 0.0, _THREADS)[0, :, :, 0].T
        low, high = self.window
        grey: Array = np.clip((np.nan_to_num(values) - low) / (high - low), 0.0, 1.0).astype(np.float32)
        return grey

    def outlined(self, plane: Plane, picture: Picture | None = None) -> Picture:
        """The image on a plane, or ``picture``, with the outline of each tumour class."""
        picture = _rgb_of(self.grey(plane)) if picture is None else picture
        if self.labels is not None:
            labels = sample_nearest(self.labels, plane.coords(self.volume.geometry))[:, :, 0].T
            for values, color in CLASSES.values():
                picture[_edge(np.isin(labels, values))] = _bytes_of(color)
        return picture


def _planes(point: FloatArray, box: FloatArray, size: FloatArray) -> dict[str, Plane]:
    """The three planes through ``point``, centred on ``box``; ``size`` (3,) mm, all pictures of one height."""
    height = int(max(size[1], size[2]))
    planes = {}
    for name, (across, down, _) in _PLANES.items():
        origin, width = np.array(point, dtype=np.float64), int(size[across])
        origin[across] = box[:, across].mean() + (width - 1) / 2.0
        origin[down] = box[:, down].mean() + (height - 1) / 2.0
        planes[name] = Plane(origin, (across, down), width, height)
    return planes


def _views(
    looks: Mapping[str, Look], field: DisplacementField | None, affine: FloatArray
) -> tuple[dict[str, Plane], dict[str, Plane], FloatArray, FloatArray]:
    """Planes on the case and on the atlas through corresponding points, and these points (RAS mm)."""
    case, atlas, moved = looks["case"], looks["atlas"], looks["moved"]
    point = atlas.tumor_center
    if point is None and case.tumor_center is not None:  # segmented, but nothing of it on the atlas
        there, point = case.tumor_center, apply_affine(np.linalg.inv(affine), case.tumor_center)
    else:
        point = atlas.center if point is None else point
        there = apply_affine(affine, point)
        if field is not None:
            spot = Plane(point, (0, 1), 1, 1).displacement(field, affine)[:, 0, 0]
            there = apply_affine(affine, point + spot)
    box = np.stack([np.minimum(atlas.box, moved.box)[0], np.maximum(atlas.box, moved.box)[1]])
    sides = np.maximum(np.ptp(box, axis=0), np.ptp(case.box, axis=0)) + 2.0 * _MARGIN_MM
    size = np.ceil(np.minimum(sides, _MAX_SIDE_MM)) + 1.0
    return _planes(there, case.box, size), _planes(point, box, size), there, point


# Pictures -------------------------------------------------------------------------------------------------


def _bytes_of(color: str) -> tuple[int, ...]:
    return tuple(bytes.fromhex(color[1:]))


def _rgb_of(grey: Array) -> Picture:
    return np.repeat(np.rint(grey * 255.0).astype(np.uint8)[:, :, None], 3, axis=2)


def _edge(mask: Mask) -> Mask:
    """A mask less its erosion by one pixel (four neighbours)."""
    padded = np.pad(mask, 1)
    edge: Mask = mask & ~(padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:])
    return edge


def _grid_picture(plane: Plane, u: Array, grey: Array) -> Picture:
    """The image of a regular grid of lines under x -> x + u(x), in-plane, over the dimmed atlas."""
    fine = 4  # drawn this much larger, then averaged: smooth lines
    canvas = Image.new("L", (plane.width * fine, plane.height * fine))
    draw = ImageDraw.Draw(canvas)
    rows, columns = np.mgrid[0 : plane.height, 0 : plane.width].astype(np.float32)
    # World coordinates fall along columns and rows, so a positive u moves a pixel back.
    moved = np.stack([columns - u[plane.axes[0]], rows - u[plane.axes[1]]], axis=-1) * fine + fine / 2.0
    for turned, axis in enumerate(plane.axes):
        lines = moved if turned else moved.transpose(1, 0, 2)
        for line in lines[round(plane.origin_ras[axis]) % GRID_MM :: GRID_MM]:
            draw.line(line.ravel().tolist(), fill=255, width=fine)
    alpha = np.asarray(canvas.resize((plane.width, plane.height), Image.Resampling.BOX), dtype=np.float32) / 255.0
    return _rgb_of(np.maximum(grey * 0.5, alpha * 0.9))


def _length_picture(u: Array, grey: Array, top_mm: float) -> Picture:
    """|u| in colours from 0 to ``top_mm``, where the atlas has foreground."""
    anchors = np.array([_bytes_of(color) for color in _VIRIDIS], dtype=np.float64)
    at = np.clip(np.linalg.norm(u, axis=0) / top_mm, 0.0, 1.0) * (len(anchors) - 1)
    colors = np.stack([np.interp(at, np.arange(len(anchors)), channel) for channel in anchors.T], axis=-1)
    colors[grey <= 0.0] = 0.0
    return np.rint(colors).astype(np.uint8)


def _round_up(value: float) -> float:
    """The next round number (1, 1.5, 2, 3, 4, 5, 6, 8 times a power of ten), 1 at least."""
    power = 10.0 ** math.floor(math.log10(max(value, 1.0)))
    return next(power * step for step in (1, 1.5, 2, 3, 4, 5, 6, 8, 10) if power * step >= value - 1e-6)


# Words, numbers, tables -----------------------------------------------------------------------------------


def _get(report: Any, *keys: str) -> Any:
    for key in keys:
        report = report.get(key) if isinstance(report, Mapping) else None
    return report


def _number(value: Any, digits: int = 3, ending: str = "") -> str:
    """A value as HTML: numbers rounded, all else escaped, what is missing said in words."""
    if isinstance(value, (int, float)) and math.isfinite(value):
        return escape(f"{value:.{digits}f}{ending}" if isinstance(value, float) else f"{value}{ending}")
    missing = value is None or value == "" or isinstance(value, float)
    return f'<span class="na">{_MISSING}</span>' if missing else escape(str(value))


def _percent(part: Any, whole: Any) -> float | None:
    numbers = all(isinstance(v, (int, float)) and math.isfinite(v) for v in (part, whole))
    return 100.0 * part / whole if numbers and whole > 0 else None


def _table(rows: Iterable[Iterable[str]], header: Iterable[str] = (), kind: str = "words") -> str:
    """Rows of cells that are HTML already; the first cell of each names the row."""
    lines = []
    for first, *others in rows:
        lines.append(f'<tr><th scope="row">{first}</th>' + "".join(f"<td>{cell}</td>" for cell in others) + "</tr>")
    head = "".join(f'<th scope="col">{cell}</th>' for cell in header)
    top = f"<thead><tr>{head}</tr></thead>" if head else ""
    return f'<table class="{kind}">{top}<tbody>{"".join(lines)}</tbody></table>' if lines else f"<p>{_number(None)}</p>"


def _card(title: str, body: str) -> str:
    return f'<div class="card"><h3>{title}</h3>{body}</div>'


# The page -------------------------------------------------------------------------------------------------


def _verdict(kept: float | None, native_ml: Any) -> tuple[str, str]:
    """The answer in words and its colour, from the percentage that the deformation alone keeps."""
    if kept is None:
        return "No tumour was segmented." if native_ml == 0 else f"{_MISSING.capitalize()}: no segmentation.", "open"
    if kept < KEPT_PERCENT:
        return f"Yes: the deformation took {100.0 - kept:.1f} % of the whole tumour’s volume.", "bad"
    if kept > 10_000.0 / KEPT_PERCENT:
        return f"No: the deformation enlarged the whole tumour by {kept - 100.0:.1f} %.", "bad"
    return f"No: the deformation left the whole tumour {kept:.1f} % of its volume.", "good"


def _answer(report: Mapping[str, Any], affine: FloatArray) -> str:
    scale = abs(float(np.linalg.det(affine[:3, :3])))
    rows, kept = [], {}
    for region, name in _REGIONS.items():
        native, moved = (_get(report, "volumes_ml", where, region) for where in ("native", "moved"))
        ratio = _percent(moved, native)
        kept[region] = None if ratio is None else ratio * scale
        cells = (_number(native, 2), _number(moved, 2), _number(ratio, 1, " %"), _number(kept[region], 1, " %"))
        rows.append((f"{name} <small>{region}</small>", *cells))
    sentence, color = _verdict(kept["WT"], _get(report, "volumes_ml", "native", "WT"))
    header = ("Region", "Case, ml", "On the atlas, ml", "Ratio", "Deformation alone")
    name = _get(report, "similarity", "modality")
    before, after = (_number(_get(report, "similarity", key)) for key in ("before", "after"))
    facts = {
        "Folding, share of the brain": _number(_get(report, "jacobian", "folding_percent"), 3, " %"),
        "Mean Jacobian inside the tumour": _number(_get(report, "jacobian", "inside_tumor")),
        "Mean Jacobian outside the tumour": _number(_get(report, "jacobian", "outside_tumor")),
        f"Correlation with the atlas{f' ({escape(str(name))})' if name else ''}": f"{before} → {after}",
    }
    return (
        f'<section><h2>Did registration shrink the tumour?</h2><p class="verdict {color}">{sentence}</p>'
        f'{_table(rows, header, "numbers")}<p class="note">The affine alone, which fits the head to the atlas’s '
        f"size, brings every volume to {100.0 / scale:.1f} %; the last column has this divided out, and below "
        f'{KEPT_PERCENT:g} % there counts as shrinking.</p><dl class="facts">'
        + "".join(f"<div><dt>{fact}</dt><dd>{value}</dd></div>" for fact, value in facts.items())
        + '</dl><p class="note">Jacobian determinants are of the whole transform, atlas to case: the affine alone '
        f"has {scale:.3f}; above it, tissue takes up less room on the atlas.</p></section>"
    )


def _warnings(report: Mapping[str, Any]) -> str:
    warnings = report.get("warnings") or ()
    items = [warnings] if isinstance(warnings, str) else list(warnings)
    lines = "".join(f"<li>{escape(str(item))}</li>" for item in items)
    return f'<section class="warnings" role="alert"><h2>Warnings</h2><ul>{lines}</ul></section>' if items else ""


def _pane(picture: Picture, plane: Plane, alt: str, key: str) -> str:
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


def _row(key: str, title: str, words: str, pictures: Mapping[str, Picture] | None, planes: Mapping[str, Plane]) -> str:
    panes = f'<p class="absent">{_number(None)}</p>'
    if pictures is not None:
        panes = "".join(_pane(pictures[n], planes[n], f"{title}, {n} plane", f"{key}-{n}") for n in _PLANES)
    return f'<div class="row"><div><h3>{title}</h3>{words}</div>{panes}</div>'


def _pictures(looks: Mapping[str, Look], field: DisplacementField | None, affine: FloatArray, modality: str) -> str:
    away, here, there, point = _views(looks, field, affine)
    fixed, moved = ({n: looks[k].grey(plane) for n, plane in here.items()} for k in ("atlas", "moved"))
    shown, at = escape(modality.upper()), "at ({:.0f}, {:.0f}, {:.0f}) mm"
    blends = {n: np.dstack([_rgb_of(fixed[n])[..., :1], _rgb_of(moved[n])[..., 1:]]) for n in here}
    grids = lengths = None
    ramp = ""
    if field is not None:
        u = {n: plane.displacement(field, affine) for n, plane in here.items()}
        most = max(float(np.linalg.norm(u[n], axis=0).max(initial=0.0, where=fixed[n] > 0.0)) for n in here)
        top = _round_up(most)
        grids = {n: looks["atlas"].outlined(here[n], _grid_picture(here[n], u[n], fixed[n])) for n in here}
        lengths = {n: _length_picture(u[n], fixed[n], top) for n in here}
        ramp = (
            f'<div class="ramp" style="background:linear-gradient(to right,{",".join(_VIRIDIS)})"></div>'
            f'<div class="ticks"><span>0</span><span>{top / 2:g}</span><span>{top:g} mm</span></div>'
            f"<p>At most {most:.1f} mm in these planes.</p>"
        )
    rows = (
        _row("case", "Case", f"<p>{shown}, {at.format(*there)}.</p>",
             {n: looks["case"].outlined(plane) for n, plane in away.items()}, away),
        _row("atlas", "Atlas", f"<p>{at.format(*point).capitalize()}, with the moved outline.</p>",
             {n: looks["atlas"].outlined(here[n], _rgb_of(fixed[n])) for n in here}, here),
        _row("moved", "Moved case", f"<p>{shown} on the atlas’s grid.</p>",
             {n: looks["moved"].outlined(here[n], _rgb_of(moved[n])) for n in here}, here),
        _row("grid", "Deformed grid", f"<p>Lines every {GRID_MM} mm, moved by the deformation; no affine.</p>", grids, here),
        _row("blend", "Overlay", "<p>Atlas red, moved case cyan; grey where both are equally bright.</p>", blends, here),
        _row("length", "Displacement", f"<p>Length of the deformation; no affine.</p>{ramp}", lengths, here),
    )  # fmt: skip
    legend = "".join(f'<li><i style="background:{color}"></i>{name}</li>' for name, (_, color) in CLASSES.items())
    columns = " ".join(f"minmax(0,{plane.width}fr)" for plane in here.values())
    heads = "".join(f"<span>{name.capitalize()}</span>" for name in here)
    return (
        f'<section><h2>Pictures</h2><p class="note">World axes, radiological convention: the patient’s left is on '
        f'the right. All at one scale.</p><ul class="legend">{legend}</ul><div style="--columns:{columns}">'
        f'<div class="row heads"><span></span>{heads}</div>{"".join(rows)}</div></section>'
    )


def _timings(timings: Any) -> str:
    stages = {k: v for k, v in timings.items() if k != "total"} if isinstance(timings, Mapping) else {}
    longest = max((v for v in stages.values() if _percent(v, 1.0) is not None), default=0.0)
    bar = '<div class="bar" style="width:{:.1f}%"></div>'
    rows = [(escape(str(k)), _number(v, 2, " s"), bar.format(_percent(v, longest) or 0.0)) for k, v in stages.items()]
    return _table([*rows, ("total", _number(_get(timings, "total"), 2, " s"), "")], kind="words bars")


def _details(report: Mapping[str, Any], affine: FloatArray) -> str:
    def pairs(*keys: str) -> list[tuple[str, str]]:
        values = _get(report, *keys)
        return [(escape(str(k)), _number(v)) for k, v in values.items()] if isinstance(values, Mapping) else []

    modalities = report.get("modalities")
    listed = ", ".join(map(str, modalities)) if isinstance(modalities, (list, tuple)) else modalities
    engine = [(k.capitalize(), _number(_get(report, "engine", k))) for k in ("backend", "device", "precision")]
    bundle = [(f"Bundle {k}", _number(_get(report, "bundle", k))) for k in ("name", "sha256")]
    matrix = _table([[f"{v:.4f}" for v in row] for row in affine.tolist()], kind="numbers")
    return (
        '<section><h2>How it was made</h2><div class="cards">'
        + _card("Engine", _table([*engine, *bundle, ("Modalities", _number(listed))]))
        + _card("Time", _timings(report.get("timings_s")))
        + _card("Affine, atlas point to case point, RAS mm", matrix)
        + _card("Versions", _table(pairs("versions")))
        + _card("Files", _table(pairs("outputs")))
        + _card("Warnings", "<p>See above.</p>" if report.get("warnings") else "<p>None.</p>")
        + "</div></section>"
    )


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

    ``report`` is the content of ``<case>_report.json``. ``native`` is the case's ``modality`` with
    ``native_labels`` (BraTS: 1, 2, and 3 or 4) on its own grid; ``moved`` and ``moved_labels`` lie on the grid
    of ``fixed``. ``field`` is the total displacement d(x) = A(x + u(x)) - x, RAS mm, and ``affine`` is A (4x4).
    """
    matrix = np.asarray(affine, dtype=np.float64)
    case, atlas = _number(report.get("case")), _number(report.get("atlas"))
    looks = {
        "case": Look(native, native_labels),
        "atlas": Look(fixed, moved_labels),
        "moved": Look(Volume(moved, fixed.geometry), moved_labels),
    }
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; img-src data:; "
        "style-src 'unsafe-inline'\">"
        f"<title>{escape(str(report.get('case') or 'Case'))}: jrs report</title><style>{_STYLE}</style></head><body>"
        f"<header><p>Registration and tumour segmentation</p><h1>{case} <small>on</small> {atlas}</h1></header><main>"
        f"{_answer(report, matrix)}{_warnings(report)}{_pictures(looks, field, matrix, modality)}"
        f"{_details(report, matrix)}</main><footer>Made by jrs. Not a medical device: for research use only, not for "
        "diagnosis or treatment.</footer></body></html>\n"
    )


_STYLE = """
:root{color-scheme:light;--page:#f5f6f8;--card:#fff;--text:#1b2330;--soft:#5b6675;--line:#dde2e9;--main:#1f5fa8;
--good:#0b7a5c;--bad:#b3450b;--warn:#fff4dc}
@media screen and (prefers-color-scheme:dark){:root{color-scheme:dark;--page:#12161c;--card:#1b212a;--text:#e6eaf0;
--soft:#9aa6b5;--line:#313a46;--main:#7fb2ee;--good:#4cc9a2;--bad:#f0945c;--warn:#3a2e12}}
*{box-sizing:border-box}
body{margin:0 auto;padding:24px;max-width:1180px;background:var(--page);color:var(--text);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif;-webkit-print-color-adjust:exact;
print-color-adjust:exact}
h1{margin:0;font-size:26px;overflow-wrap:anywhere}h2{margin:0 0 12px;font-size:18px}h3{margin:0 0 4px;font-size:15px}
header p,footer,small,.note,.na,.row p,dt{color:var(--soft)}header p{margin:0}small{font-weight:400}
section{margin:20px 0;padding:20px;background:var(--card);border:1px solid var(--line);border-radius:8px}
.verdict{margin:0 0 16px;padding:10px 14px;border-left:5px solid var(--soft);font-size:19px;font-weight:600}
.good{border-color:var(--good);color:var(--good)}.bad{border-color:var(--bad);color:var(--bad)}
.warnings{background:var(--warn);border:2px solid var(--bad)}.warnings ul{margin:0;padding-left:20px}
table{width:100%;border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{padding:5px 8px;border-bottom:1px solid var(--line);text-align:left;font-weight:400;vertical-align:top}
thead th{color:var(--soft);font-size:13px}tr:last-child>*{border-bottom:0}thead tr>*{border-bottom:1px solid var(--line)}
.numbers td,.numbers thead th+th{text-align:right}.words td{overflow-wrap:anywhere}.words th{white-space:nowrap}
.note{margin:10px 0;font-size:13px}.na{font-style:italic}dl{margin:0}dd{margin:0;font-size:19px;font-weight:600}
.facts,.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(210px,1fr));gap:12px 24px}dt{font-size:13px}
.cards{grid-template-columns:repeat(auto-fit,minmax(min(100%,440px),1fr));gap:24px 32px}
.row{display:grid;grid-template-columns:150px var(--columns);gap:6px;margin-bottom:6px;break-inside:avoid}
.row p{margin:0 0 6px;font-size:13px}.heads{text-align:center;font-weight:600}.row .absent{grid-column:2/-1}
.pane{position:relative;overflow:hidden;border-radius:4px;background:#000}.pane img{display:block;width:100%;height:auto}
.pane b,.pane i{position:absolute;color:#fff;font:600 12px/1 system-ui,sans-serif;text-shadow:0 0 3px #000,0 0 3px #000}
.w{left:5px;top:calc(50% - 6px)}.e{right:5px;top:calc(50% - 6px)}.n{top:5px;left:calc(50% - 4px)}.s{bottom:5px;left:calc(50% - 4px)}
.pane i{left:8px;bottom:6px;padding-bottom:3px;border-bottom:2px solid;font-weight:400;font-size:10px;display:none}
.row:nth-child(2) .pane i{display:block}
.legend{display:flex;flex-wrap:wrap;gap:4px 20px;margin:0 0 12px;padding:0;list-style:none}
.legend i{display:inline-block;width:12px;height:12px;margin-right:7px;border-radius:2px}
.ramp{height:12px;border-radius:2px}.ticks{display:flex;justify-content:space-between;font-size:12px}
.bars td:last-child{width:45%;vertical-align:middle}.bar{height:10px;min-width:1px;border-radius:2px;background:var(--main)}
footer{font-size:13px;text-align:center}
@media (max-width:760px){body{padding:12px}.row{grid-template-columns:var(--columns)}.row>:first-child{grid-column:1/-1}
.row .absent{grid-column:1/-1}}
@media print{@page{margin:12mm}body{padding:0;max-width:none;background:#fff;font-size:12px}
section{border:0;padding:0}.warnings{padding:10px;border:2px solid}.row{grid-template-columns:110px var(--columns)}}
"""
