"""Box plots of an evaluation, as PNG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from jrs.evaluate.compare import Row
from jrs.evaluate.subjects import CODES
from jrs.files import whole_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, which colour-blind readers can tell apart.
_COLORS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#999999", "#f0e442")
_METHODS_FIGURE = (
    ("structure_dice", "mean", "mean Dice of structures"),
    ("structure_hd95_mm", "mean", "mean HD95 of structures, mm"),
    ("landmark_median_mm", "", "median landmark error, mm"),
    ("correlation_outside_tumor", "", "correlation outside the tumour"),
    ("folding_percent", "", "folding, % of the brain"),
    ("jacobian_sd_log", "", "standard deviation of log J"),
    ("tumor_volume_to_affine", "WT", "tumour volume, relative to the affine"),
    ("seconds", "", "seconds"),
)


class _Values:
    def __init__(self, rows: Sequence[Row]) -> None:
        self.by_key: dict[tuple[str, str, str], list[float]] = {}
        for row in rows:
            if not math.isnan(row.value):
                self.by_key.setdefault((row.metric, row.of, row.method), []).append(row.value)

    def of(self, metric: str, of: str, method: str) -> list[float]:
        return self.by_key.get((metric, of, method), [])

    def any(self, metric: str, of: str, methods: Sequence[str]) -> bool:
        return any(self.of(metric, of, method) for method in methods)


def write_plots(folder: Path, rows: Sequence[Row], methods: Sequence[str]) -> list[Path]:
    """``methods.png``, ``structures.png`` and ``tumor.png``, each where there is something to show."""
    values = _Values(rows)
    figures = {
        "methods.png": _methods(values, methods),
        "structures.png": _structures(values, methods),
        "tumor.png": _tumor(values, methods[0]),
    }
    written = []
    for name, figure in figures.items():
        if figure is not None:
            with whole_file(folder / name) as temporary:
                figure.savefig(temporary, dpi=150, format="png")
            written.append(folder / name)
    return written


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _methods(values: _Values, methods: Sequence[str]) -> Figure | None:
    """One panel a measure, one box a method."""
    shown = [panel for panel in _METHODS_FIGURE if values.any(panel[0], panel[1], methods)]
    if not shown:
        return None
    columns = min(4, len(shown))
    lines = math.ceil(len(shown) / columns)
    figure = _figure(0.8 + 3.0 * columns, 0.3 + 2.6 * lines)
    axes = figure.subplots(lines, columns, squeeze=False).ravel()
    for ax, (metric, of, title) in zip(axes, shown, strict=False):
        present = [m for m in methods if values.of(metric, of, m)]
        _boxes(ax, [values.of(metric, of, m) for m in present], list(range(len(present))), 0.6, methods, present)
        ax.set_xticks(range(len(present)), present, rotation=35, ha="right")
        ax.set_title(title, fontsize=10)
        ax.grid(axis="y", alpha=0.3)
    for ax in axes[len(shown) :]:
        ax.set_visible(False)
    return figure


def _structures(values: _Values, methods: Sequence[str]) -> Figure | None:
    """Dice and HD95 of each structure, methods side by side."""
    names = [name for name in CODES if values.any("structure_dice", name, methods)]
    present = [m for m in methods if any(values.of("structure_dice", name, m) for name in names)]
    if not names:
        return None
    figure = _figure(11.0, 1.2 + len(names) * (0.12 + 0.13 * len(present)))
    axes = figure.subplots(1, 2, sharey=True)
    for ax, metric, label in zip(axes, ("structure_dice", "structure_hd95_mm"), ("Dice", "HD95, mm"), strict=True):
        _grouped(ax, values, metric, names, present, methods, horizontal=True)
        ax.set_xlabel(label)
        ax.grid(axis="x", alpha=0.3)
    axes[0].set_yticks(range(len(names)), [name.replace("_", " ") for name in names], fontsize=8)
    axes[0].invert_yaxis()
    _legend(figure, present, methods)
    return figure


def _tumor(values: _Values, method: str) -> Figure | None:
    """The regions of the segmentation: over the image, and lesion by lesion."""
    regions = [r for r in ("WT", "TC", "ET") if values.of("tumor_dice", r, method)]
    if not regions:
        return None
    panels = (("tumor_dice", "Dice"), ("lesion_dice", "lesion-wise Dice"), ("tumor_hd95_mm", "HD95, mm"))
    figure = _figure(10.0, 3.4)
    for ax, (metric, label) in zip(figure.subplots(1, 3), panels, strict=True):
        _grouped(ax, values, metric, regions, [method], [method], horizontal=False)
        ax.set_xticks(range(len(regions)), regions)
        ax.set_title(label, fontsize=10)
        ax.grid(axis="y", alpha=0.3)
    return figure


def _grouped(
    ax: Axes,
    values: _Values,
    metric: str,
    names: Sequence[str],
    present: Sequence[str],
    methods: Sequence[str],
    horizontal: bool,
) -> None:
    step = 0.8 / len(present)
    for index, method in enumerate(present):
        filled = [(i, values.of(metric, name, method)) for i, name in enumerate(names)]
        filled = [(i, found) for i, found in filled if found]
        positions = [i + (index - (len(present) - 1) / 2) * step for i, _ in filled]
        chosen = [method] * len(filled)
        _boxes(ax, [found for _, found in filled], positions, 0.8 * step, methods, chosen, horizontal)


def _boxes(
    ax: Axes,
    data: Sequence[Sequence[float]],
    positions: Sequence[float],
    width: float,
    methods: Sequence[str],
    chosen: Sequence[str],
    horizontal: bool = False,
) -> None:
    if not data:
        return
    drawn = ax.boxplot(
        [list(found) for found in data],
        positions=list(positions),
        widths=width,
        orientation="horizontal" if horizontal else "vertical",
        patch_artist=True,
        manage_ticks=False,
        medianprops={"color": "black"},
        flierprops={"markersize": 3},
    )
    for box, method in zip(drawn["boxes"], chosen, strict=True):
        box.set_facecolor(_color(methods, method))
        box.set_alpha(0.75)


def _legend(figure: Figure, present: Sequence[str], methods: Sequence[str]) -> None:
    from matplotlib.patches import Patch

    handles = [Patch(facecolor=_color(methods, method), alpha=0.75, label=method) for method in present]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(present), frameon=False)


def _color(methods: Sequence[str], method: str) -> str:
    return _COLORS[list(methods).index(method) % len(_COLORS)]
