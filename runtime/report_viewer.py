"""The report's interactive viewer: NiiVue and the volumes that it shows, inside the page.

The volumes lie on a grid of their own along the world's axes around the atlas's brain, coarse enough that the
page stays small; images and labels are bytes. NiiVue comes with the package, see `NIIVUE` and its licence.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from html import escape
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt

from jrs.geometry import FloatArray, Geometry
from jrs.gzipped import packed as gzipped
from jrs.resources import DATA
from jrs.runtime.colors import CLASS_COLORS, CLASS_NAMES
from jrs.runtime.report_pictures import Sparse, label_center
from jrs.runtime.sampling import Sampled, affine_coords, sample_nearest
from jrs.volume import Volume, foreground_mask, raised

Array = npt.NDArray[np.float32]
Labels = npt.NDArray[np.uint8]

NIIVUE = "0.69.0"
"""The version of `@niivue/niivue` in ``jrs/data/report/``: its ``dist/niivue.umd.js``, compressed, unchanged."""
SPACING_MM = 1.5
CHANGE_LIMIT = 1.0
"""The volume change is shown as its binary logarithm up to this, either way: from half to twice."""

_FOLDER = DATA / "report"
_MARGIN_MM = 6.0
_MOST_VOXELS = 3_000_000
_THREADS = 1


def own_script() -> str:
    """The page's own JavaScript, which also starts the viewer."""
    return (_FOLDER / "report.js").read_text(encoding="utf-8")


def viewer(
    fixed: Volume,
    moved: Array,
    labels: Labels | None,
    jacobian: Array | None,
    affine: FloatArray,
) -> str:
    """The viewer's section of the page; ``moved``, ``labels`` and ``jacobian`` lie on the grid of ``fixed``."""
    grid = viewer_grid(fixed)
    middle = grid.to_ras((np.array(grid.shape) - 1.0) / 2.0)
    volumes: dict[str, Array | Labels] = {"atlas": fixed.raised, "moved": raised(moved)}
    packed = {name: _packed(_bytes(_onto(image, fixed, grid)), grid) for name, image in volumes.items()}
    options: dict[str, dict[str, Any]] = {name: _shown(name, "gray") for name in packed}
    if jacobian is not None:
        scale = abs(float(np.linalg.det(affine[:3, :3])))
        coarse = Geometry.aligned(_halved(grid.shape), (2.0 * grid.spacing[0],) * 3, middle, "RAS")  # it is smooth
        change = np.log2(scale / np.maximum(_onto(jacobian, fixed, coarse), 1e-6))
        change[~foreground_mask(_onto(fixed.raised, fixed, coarse))] = 0.0
        packed["change"] = _packed(_signed(change), coarse, CHANGE_LIMIT / 127.0)
        limits = {"cal_min": 0.05, "cal_max": CHANGE_LIMIT, "cal_minNeg": -CHANGE_LIMIT, "cal_maxNeg": -0.05}
        options["change"] = _shown("change", "blue2cyan", colormapNegative="warm", opacity=0.0, **limits)
    center = None
    if labels is not None:
        center = label_center(labels, fixed.geometry)
        coords = affine_coords(grid.shape, fixed.geometry.inverse @ grid.affine)
        packed["labels"] = _packed(sample_nearest(labels, coords), grid, intent=1002)
        options["labels"] = _shown("labels", "gray") | {"colors": _label_colors(int(labels.max(initial=3)))}
    return _section(packed, options, middle if center is None else center)


def viewer_grid(fixed: Volume) -> Geometry:
    """A RAS grid around the brain of the fixed image: `SPACING_MM`, or coarser where that were too many voxels."""
    low, high = Sparse.of(fixed).extent() + np.array([[-_MARGIN_MM], [_MARGIN_MM]])
    spacing = SPACING_MM * max(1.0, (float(np.prod((high - low) / SPACING_MM)) / _MOST_VOXELS) ** (1.0 / 3.0))
    x, y, z = (max(2, int(np.ceil(side / spacing))) for side in high - low)
    return Geometry.aligned((x, y, z), (spacing,) * 3, (low + high) / 2.0, "RAS")


def _onto(image: npt.NDArray[Any], fixed: Volume, grid: Geometry) -> Array:
    """Trilinear; the grid is hardly coarser than the images, so nothing is averaged."""
    onto: Array = Sampled(image[None], _THREADS).pull(grid.shape, fixed.geometry.inverse @ grid.affine)[0]
    return onto


def _halved(shape: tuple[int, int, int]) -> tuple[int, int, int]:
    x, y, z = ((n + 1) // 2 for n in shape)
    return x, y, z


def _bytes(image: Array) -> Labels:
    """1st to 99.5th percentile of what is bright to 0 to 255."""
    image = np.nan_to_num(image)
    bright = image[::2, ::2, ::2]
    bright = bright[bright > 0] if (bright > 0).any() else bright.ravel()
    low, high = np.percentile(bright, (1.0, 99.5))
    low = min(low, float(high) * 0.1)
    scaled: Labels = np.rint(np.clip((image - low) * (255.0 / max(high - low, 1e-30)), 0.0, 255.0)).astype(np.uint8)
    return scaled


def _signed(change: Array) -> npt.NDArray[np.int8]:
    steps: npt.NDArray[np.int8] = np.rint(np.clip(change / CHANGE_LIMIT, -1.0, 1.0) * 127.0).astype(np.int8)
    return steps


def _packed(data: npt.NDArray[Any], grid: Geometry, slope: float = 1.0, intent: int = 0) -> str:
    """A gzipped NIfTI file as base64."""
    image = nib.Nifti1Image(data, grid.affine)
    image.header.set_data_dtype(data.dtype)
    image.header.set_xyzt_units("mm")
    image.header["intent_code"] = intent
    header = bytearray(image.header.binaryblock)
    header[108:112] = np.float32(352.0).tobytes()  # vox_offset of a single file
    header[112:120] = np.array([slope, 0.0], dtype=np.float32).tobytes()
    content = bytes(header) + bytes(4) + data.tobytes(order="F")
    return base64.b64encode(gzipped(content)).decode()


def _shown(name: str, colormap: str, **more: Any) -> dict[str, Any]:
    title = {"atlas": "atlas", "moved": "moved case", "change": "volume change, log2", "labels": "label"}[name]
    return {"name": f"{title}.nii.gz", "colormap": colormap, "opacity": 1.0, **more}


def _label_colors(largest: int) -> dict[str, list[Any]]:
    """NiiVue's colour map of labels: BraTS's classes, 3 and 4 both enhancing."""
    order = [0, 1, 2, 3, 3, *(3 for _ in range(5, largest + 1))]
    red, green, blue = (list(band) for band in zip(*(CLASS_COLORS[i] for i in order), strict=True))
    alpha = [0, *(255 for _ in order[1:])]
    names = [CLASS_NAMES[i] if i else "none" for i in order]
    return {"R": red, "G": green, "B": blue, "A": alpha, "I": list(range(len(order))), "labels": names}


_PANEL = """<p class="panel"><label>View <select id="view"><option value="3">three planes</option>
<option value="0">axial</option><option value="1">coronal</option><option value="2">sagittal</option>
<option value="4">atlas in 3-D</option></select></label>
<label>Atlas <input id="blend" type="range" min="0" max="100" value="100"> moved case</label>{}</p>"""
_LABELS = """<label>Labels <input id="labels" type="range" min="0" max="100" value="30"></label>
<label><input id="outline" type="checkbox" checked> outlines</label>"""
_CHANGE = """<label>Volume change <input id="change" type="range" min="0" max="100" value="0"></label>"""


def _section(packed: Mapping[str, str], options: Mapping[str, Any], center: FloatArray) -> str:
    panel = _PANEL.format((_LABELS if "labels" in packed else "") + (_CHANGE if "change" in packed else ""))
    licence = (_FOLDER / "LICENSE_NIIVUE.txt").read_text(encoding="utf-8")
    script = base64.b64encode((_FOLDER / "niivue.umd.js.gz").read_bytes()).decode()
    data = {f"volume-{name}": content for name, content in packed.items()}
    data |= {"volumes": json.dumps(options), "center": json.dumps([round(float(v), 2) for v in center])}
    data |= {"niivue": script}
    blocks = "".join(f'<script type="text/plain" id="{name}">{content}</script>' for name, content in data.items())
    return (
        '<section id="viewer-section"><h2>Interactive viewer</h2><p class="note" id="viewer-note">The viewer needs '
        f'JavaScript and WebGL 2.</p><div id="viewer" hidden>{panel}<div id="stage"><canvas id="canvas"></canvas>'
        '</div><p class="note" id="place"></p><p class="note">Click to move the crosshair, scroll to change the slice, '
        f"drag the 3-D view to turn it. Atlas and moved case at {SPACING_MM:g} mm; volume change in blue where tissue "
        "takes up more room on the atlas than under the affine alone, in red and yellow where less.</p></div>"
        f"<details><summary>The viewer is NiiVue {NIIVUE}; its licences</summary><pre>{escape(licence)}</pre></details>"
        f"{blocks}</section>"
    )
