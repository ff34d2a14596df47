"""Paired tests and summaries against scipy, numpy and a published example."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from jrs.evaluate.compare import Row, compare, holm, median_interval, summarize, wilcoxon_p
from jrs.evaluate.tables import aligned, plain, write_csv

GENERATOR = np.random.default_rng(8)
OURS = GENERATOR.normal(0.70, 0.05, 14)
OTHERS = {"a": OURS - GENERATOR.normal(0.02, 0.02, 14), "b": OURS - GENERATOR.normal(0.0, 0.02, 14)}


def rows() -> list[Row]:
    values = {"jrs": OURS, **OTHERS}
    return [
        Row(f"case{i}", "atlas", method, "structure_dice", "mean", float(x))
        for method, found in values.items()
        for i, x in enumerate(found)
    ]


def test_wilcoxon_is_scipys_on_the_differences() -> None:
    for other in OTHERS.values():
        assert wilcoxon_p(OURS - other) == pytest.approx(stats.wilcoxon(OURS, other).pvalue)


def test_wilcoxon_where_there_is_nothing_to_test() -> None:
    assert wilcoxon_p(np.zeros(5)) == 1.0
    assert math.isnan(wilcoxon_p(np.array([0.3])))


def test_wilcoxon_of_five_gains_is_two_over_two_to_the_five() -> None:
    assert wilcoxon_p(np.array([0.1, 0.2, 0.3, 0.4, 0.5])) == pytest.approx(2 / 2**5)


def test_holm_steps_down() -> None:
    # By hand: sorted 0.01, 0.02, 0.03, 0.04 times 4, 3, 2, 1, then never falling.
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.6, 0.7]) == pytest.approx([1.0, 1.0])
    corrected = holm([0.01, math.nan, 0.02])
    assert corrected[0] == pytest.approx(0.02)
    assert math.isnan(corrected[1])


def test_the_interval_holds_the_median_and_repeats() -> None:
    difference = OURS - OTHERS["a"]
    low, high = median_interval(difference)
    assert low < np.median(difference) < high
    assert (low, high) == median_interval(difference)
    # By resampling with numpy alone.
    draws = np.random.default_rng(1).choice(difference, (4999, difference.size))
    expected = np.percentile(np.median(draws, axis=1), (2.5, 97.5))
    assert (low, high) == pytest.approx(expected, abs=0.004)


def test_methods_are_compared_on_the_pairs_that_both_have() -> None:
    table = [row for row in rows() if not (row.method == "b" and row.moving == "case3")]
    table.append(Row("case9", "atlas", "c", "structure_dice", "mean", math.nan))
    found = {c.other: c for c in compare(table, "jrs", ["a", "b", "c"])}
    assert set(found) == {"a", "b"}
    assert (found["a"].n, found["b"].n) == (14, 13)
    kept = np.arange(14) != 3
    assert found["a"].median_difference == pytest.approx(np.median(OURS - OTHERS["a"]))
    assert found["b"].median_difference == pytest.approx(np.median((OURS - OTHERS["b"])[kept]))
    p = [stats.wilcoxon(OURS - OTHERS["a"]).pvalue, stats.wilcoxon((OURS - OTHERS["b"])[kept]).pvalue]
    assert min(found.values(), key=lambda c: c.p).p_holm == pytest.approx(2 * min(p))


def test_summary_is_numpys_and_leaves_nan_out() -> None:
    summary = {s.method: s for s in summarize([*rows(), Row("x", "atlas", "jrs", "structure_dice", "mean", math.nan)])}
    jrs = summary["jrs"]
    assert (jrs.n, jrs.mean, jrs.sd) == (14, pytest.approx(OURS.mean()), pytest.approx(OURS.std(ddof=1)))
    assert (jrs.lower_quartile, jrs.upper_quartile) == pytest.approx(tuple(np.percentile(OURS, (25, 75))))


def test_tables_hold_the_numbers_and_no_nan(tmp_path: Path) -> None:
    table = [*rows(), Row("x,y", "atlas", "jrs", "folding_percent", "", math.nan)]
    write_csv(tmp_path / "cases.csv", Row, table)
    with (tmp_path / "cases.csv").open(encoding="utf-8", newline="") as stream:
        back = list(csv.DictReader(stream))
    assert [float(row["value"]) for row in back[:14]] == pytest.approx(OURS, rel=1e-5)
    assert (back[-1]["moving"], back[-1]["value"]) == ("x,y", "")
    assert json.loads(json.dumps(plain(table[-1]), allow_nan=False))["value"] is None


def test_markdown_tables_line_up() -> None:
    lines = aligned(["a", "long name"], [["1234", "5"]])
    assert lines == ["| a    | long name |", "|------|-----------|", "| 1234 | 5         |"]
