"""The report for the eye: one self-contained HTML page about one case on one atlas.

Nothing of it comes from elsewhere: pictures, volumes, the viewer and its script lie in the page, and its content
security policy lets it load nothing else. Whatever the report lacks is shown as "not computed".
"""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Iterable, Mapping
from html import escape
from typing import Any

import numpy as np

from jrs.fields import DisplacementField
from jrs.geometry import FloatArray
from jrs.resources import DATA
from jrs.runtime.measures import KEPT_PERCENT
from jrs.runtime.report_pictures import Array, Labels, Look, pictures
from jrs.runtime.report_viewer import own_script
from jrs.volume import Volume

_REGIONS = {"WT": "Whole tumour", "TC": "Tumour core", "ET": "Enhancing tumour"}
_STATISTICS = {"mean": "Mean", "sd": "SD", "p5": "5 %", "p95": "95 %"}
_COLORS = {"kept": "good", "shrunk": "bad", "grown": "bad"}


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


def _answer(report: Mapping[str, Any], affine: FloatArray) -> str:
    scale = abs(float(np.linalg.det(affine[:3, :3])))
    rows = []
    for region, name in _REGIONS.items():
        volumes = [_get(report, "volumes_ml", where, region) for where in ("native", "affine", "moved")]
        shares = [_percent(volumes[2], whole) for whole in (volumes[0], volumes[1])]
        cells = (*(_html(volume, 2) for volume in volumes), *(_html(share, 1, " %") for share in shares))
        rows.append((f"{name} <small>{region}</small>", *cells))
    answer, sentence = (_get(report, "volume_verdict", key) for key in ("answer", "text"))
    header = ("Region", "Case, ml", "Affine alone, ml", "On the atlas, ml", "of the case", "of the affine’s")
    return (
        '<section><h2>Did registration shrink the tumour?</h2><p class="verdict '
        f'{_COLORS.get(str(answer), "open")}">{_html(sentence)}</p>{_table(rows, "numbers", header)}'
        f'<p class="note">The affine alone, which fits the head to the atlas’s size, brings every volume to '
        f"{100.0 / scale:.1f} %. The last column is what the deformation did beside it: below {KEPT_PERCENT:g} % "
        f"counts as shrinking.</p>{_facts(report)}{_measures(report, scale)}</section>"
    )


def _facts(report: Mapping[str, Any]) -> str:
    jacobian, similarity = _get(report, "jacobian"), _get(report, "similarity")
    of, (before, after) = _get(similarity, "modality"), (_get(similarity, k) for k in ("before", "after"))
    facts = {
        "Folding, share of the brain": _html(_get(jacobian, "folding_percent"), 3, " %"),
        "Mean Jacobian inside the tumour, case over atlas": _html(_get(jacobian, "inside_tumor")),
        "Mean Jacobian outside it, case over atlas": _html(_get(jacobian, "outside_tumor")),
        f"Correlation with the atlas{f' ({_html(of)})' if of else ''}": f"{_html(before)} → {_html(after)}",
    }
    cards = "".join(f"<div><dt>{fact}</dt><dd>{value}</dd></div>" for fact, value in facts.items())
    return f'<dl class="cards facts">{cards}</dl>'


def _measures(report: Mapping[str, Any], scale: float) -> str:
    """Distribution of the determinants, and the similarity of every modality."""
    rows = []
    for title, prefix in (("Jacobian", ""), ("its logarithm", "log_")):
        for where in ("inside", "outside"):
            values = (_html(_get(report, "jacobian", where, prefix + key)) for key in _STATISTICS)
            rows.append((f"{title}, {where} the tumour", *values))
    likeness = _get(report, "similarity", "modalities")
    likeness = likeness if isinstance(likeness, Mapping) else {}
    lines = [(_html(m), _html(_get(v, "before")), _html(_get(v, "after"))) for m, v in likeness.items()]
    similar = _table(lines, "numbers", ("Correlation, outside the tumour", "Affine", "Deformation"))
    return (
        '<details><summary>All of these numbers</summary><div class="cards more"><div>'
        f'{_table(rows, "numbers", ("Determinant", *_STATISTICS.values()))}</div><div>{similar}</div></div>'
        '<p class="note">Jacobian determinants are of the whole transform, atlas to case: the affine '
        f"alone has {scale:.3f}; above it, tissue takes up less room on the atlas.</p></details>"
    )


def _details(report: Mapping[str, Any], affine: FloatArray) -> str:
    stages = dict(report.get("timings_s") or {})
    made = {
        **{key.capitalize(): _get(report, "engine", key) for key in ("backend", "device", "precision")},
        **{f"Bundle {key}": _get(report, "bundle", key) for key in ("name", "sha256")},
        "Modalities": ", ".join(map(str, report.get("modalities") or ())),
        "Used by the network": ", ".join(map(str, report.get("modalities_used") or ())),
        "Label scheme": report.get("label_scheme"),
        **{f"Label {value}": name for name, value in _items(report.get("label_values")) if value},
        "Warnings": "see above" if report.get("warnings") else "none" if "warnings" in report else None,
    }
    total = ("total", _html(stages.pop("total", None), 2, " s"), "")
    longest = max((v for v in stages.values() if _percent(v, 1.0) is not None), default=0.0)
    width = {k: f"width:{_percent(v, longest) or 0.0:.1f}%" for k, v in stages.items()}
    bars = [(_html(k), _html(v, 2, " s"), f'<div style="{width[k]}"></div>') for k, v in stages.items()]
    matrix = _table([[f"{v:.4f}" for v in row] for row in affine.tolist()], "matrix")
    cards = {"Engine": _pairs(made), "Time": _table([*bars, total], "words bars")}
    cards |= {"Affine, atlas to case, RAS mm": matrix, "Versions": _pairs(report.get("versions"))}
    files = {k: v for k, v in _items(report.get("outputs")) if not str(k).endswith(("_sidecar", "_table"))}
    cards |= {"Files, beside each image its JSON": _pairs(files)}
    body = "".join(f"<div><h3>{title}</h3>{table}</div>" for title, table in cards.items())
    return f'<section><h2>How it was made</h2><div class="cards">{body}</div></section>'


def _items(values: Any) -> list[tuple[Any, Any]]:
    return list(values.items()) if isinstance(values, Mapping) else []


def drawings(
    native: Volume,
    native_labels: Labels | None,
    fixed: Volume,
    moved: Array,
    moved_labels: Labels | None,
    field: DisplacementField | None,
    affine: FloatArray,
    modality: str,
    jacobian: Array | None = None,
) -> str:
    """The page's pictures.

    ``native`` is the case's ``modality`` with its ``native_labels`` (BraTS: 1, 2, and 3 or 4); ``moved``,
    ``moved_labels`` and ``jacobian``, the determinant of the total transform, lie on the grid of ``fixed``.
    ``field`` is the total displacement d(x) = A(x + u(x)) - x, RAS mm, and ``affine`` is A (4x4).
    """
    looks = {"case": Look(native, native_labels), "atlas": Look(fixed, moved_labels)}
    looks["moved"] = Look(Volume(moved, fixed.geometry), moved_labels)
    map_ = None if jacobian is None else Volume(jacobian, fixed.geometry)
    return pictures(looks, field, map_, np.asarray(affine, dtype=np.float64), modality)


def page(report: Mapping[str, Any], affine: FloatArray, drawn: str, shown: str) -> str:
    """The page about one case, as HTML that needs nothing else.

    ``report`` is the content of ``<case>_report.json``; ``drawn`` (``drawings``) and ``shown`` (``viewer``, or nothing)
    are the parts that take long, and can be made side by side.
    """
    affine = np.asarray(affine, dtype=np.float64)
    title = " on ".join(_html(report.get(key)) for key in ("case", "atlas"))
    items = "".join(f"<li>{_html(warning)}</li>" for warning in report.get("warnings") or ())
    warnings = f'<section class="warnings"><h2>Warnings</h2><ul>{items}</ul></section>' if items else ""
    script = own_script()
    style = (DATA / "report" / "report.css").read_text(encoding="utf-8")
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">{_policy(script)}<meta name="viewport" '
        f'content="width=device-width,initial-scale=1"><title>{escape(str(report.get("case") or "Case"))}: jrs '
        f"report</title><style>{style}</style></head><body><header><p>Registration and tumour segmentation</p>"
        f"<h1>{title}</h1></header><main>{_answer(report, affine)}{warnings}"
        f"{drawn}{shown}{_details(report, affine)}</main><footer>Made by "
        "jrs. Not a medical device: for research use only, not for diagnosis or treatment.</footer>"
        f"<script>{script}</script></body></html>\n"
    )


def _policy(script: str) -> str:
    """Nothing is loaded from anywhere, and only this script runs, and what it starts."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return (
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; img-src data: blob:; "
        f"style-src 'unsafe-inline'; script-src 'sha256-{digest}' 'strict-dynamic'\">"
    )
