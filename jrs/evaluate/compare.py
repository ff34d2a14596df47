"""Methods side by side: summaries, and paired tests against the others."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from jrs.geometry import FloatArray

HEADLINES: tuple[tuple[str, str], ...] = (
    ("structure_dice", "mean"),
    ("structure_hd95_mm", "mean"),
    ("landmark_median_mm", ""),
    ("landmark_robustness", ""),
    ("correlation_outside_tumor", ""),
    ("folding_percent", ""),
    ("jacobian_sd_log", ""),
    ("tumor_volume_to_affine", "WT"),
    ("seconds", ""),
)
"""The measures, and of what, that methods are tested on."""


@dataclass(frozen=True)
class Row:
    """One value of the long table."""

    moving: str
    fixed: str
    method: str
    metric: str
    of: str
    value: float


@dataclass(frozen=True)
class Summary:
    """A measure of a method over the pairs that have it."""

    method: str
    metric: str
    of: str
    n: int
    mean: float
    sd: float
    median: float
    lower_quartile: float
    upper_quartile: float
    minimum: float
    maximum: float


@dataclass(frozen=True)
class Comparison:
    """A method against another on the same pairs.

    Attributes:
        n: pairs that both have.
        median_difference: of ``method`` minus ``other``, with its 95 % bootstrap interval ``low`` to ``high``.
        p: Wilcoxon's signed-rank test, two-sided; ``p_holm`` corrected for all comparisons of this measure. NaN
            for fewer than two pairs.
    """

    metric: str
    of: str
    method: str
    other: str
    n: int
    median_difference: float
    low: float
    high: float
    p: float
    p_holm: float


def summarize(rows: Iterable[Row]) -> list[Summary]:
    """Every measure of every method; values that are NaN are left out."""
    groups: dict[tuple[str, str, str], list[float]] = {}
    for row in rows:
        groups.setdefault((row.method, row.metric, row.of), []).append(row.value)
    found = []
    for (method, metric, of), values in groups.items():
        x = np.array([value for value in values if not math.isnan(value)])
        if x.size:
            sd = float(x.std(ddof=1)) if x.size > 1 else math.nan
            low, middle, high = (float(q) for q in np.percentile(x, (25, 50, 75)))
            ends = (float(x.min()), float(x.max()))
            found.append(Summary(method, metric, of, x.size, float(x.mean()), sd, middle, low, high, *ends))
    return found


def compare(
    rows: Sequence[Row], method: str, others: Sequence[str], measures: Sequence[tuple[str, str]] = HEADLINES
) -> list[Comparison]:
    """``method`` against each of the others, measure by measure, on the pairs that both have."""
    values: dict[tuple[str, str, str], dict[tuple[str, str], float]] = {}
    for row in rows:
        if not math.isnan(row.value):
            values.setdefault((row.method, row.metric, row.of), {})[row.moving, row.fixed] = row.value
    found = []
    for metric, of in measures:
        ours = values.get((method, metric, of), {})
        tests = []
        for other in others:
            theirs = values.get((other, metric, of), {})
            shared = [pair for pair in ours if pair in theirs]
            if shared:
                difference = np.array([ours[pair] - theirs[pair] for pair in shared])
                tests.append((other, difference, wilcoxon_p(difference)))
        corrected = holm([p for _, _, p in tests])
        for (other, difference, p), p_holm in zip(tests, corrected, strict=True):
            low, high = median_interval(difference)
            middle = float(np.median(difference))
            found.append(Comparison(metric, of, method, other, difference.size, middle, low, high, p, p_holm))
    return found


def wilcoxon_p(difference: FloatArray) -> float:
    """Two-sided p of Wilcoxon's signed-rank test; 1 where no pair differs, NaN for fewer than two pairs."""
    if difference.size < 2:
        return math.nan
    if not difference.any():
        return 1.0
    from scipy.stats import wilcoxon

    return float(wilcoxon(difference).pvalue)


def holm(p: Sequence[float]) -> list[float]:
    """Holm's step-down correction (Holm 1979); NaN stays and does not count."""
    order = sorted((i for i in range(len(p)) if not math.isnan(p[i])), key=lambda i: p[i])
    corrected = [math.nan] * len(p)
    largest = 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p[index]))
        corrected[index] = largest
    return corrected


def median_interval(difference: FloatArray, seed: int = 0, draws: int = 4999) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the median; NaN for fewer than two pairs."""
    if difference.size < 2:
        return math.nan, math.nan
    from scipy.stats import bootstrap

    found = bootstrap(
        (difference,), np.median, n_resamples=draws, method="percentile", rng=np.random.default_rng(seed)
    ).confidence_interval
    return float(found.low), float(found.high)


def side_by_side(summaries: Sequence[Summary], methods: Sequence[str]) -> list[tuple[str, Mapping[str, Summary]]]:
    """The headline measures, each with its summary by method; measures that no method has are left out."""
    by_key = {(s.metric, s.of, s.method): s for s in summaries}
    table: list[tuple[str, Mapping[str, Summary]]] = []
    for metric, of in (*_TUMOR, *HEADLINES):
        found = {m: by_key[metric, of, m] for m in methods if (metric, of, m) in by_key}
        if found:
            table.append((f"{metric} {of}".strip(), found))
    return table


_TUMOR = tuple((metric, of) for metric in ("tumor_dice", "lesion_dice", "tumor_hd95_mm") for of in ("WT", "TC", "ET"))
