"""Colour tables, read as 3D Slicer, ITK-SNAP and BIDS say that they are written."""

from __future__ import annotations

import csv
import io
import re

from jrs.runtime.colors import bids_table, itksnap_table, label_colors, slicer_table

VALUES = {"background": 0, "necrotic_or_nonenhancing_core": 1, "edema": 2, "enhancing_tumor": 3}
COLORS = label_colors(VALUES)
# Okabe and Ito's yellow, sky blue and vermilion, as published.
PUBLISHED = {1: (240, 228, 66), 2: (86, 180, 233), 3: (213, 94, 0)}


def test_slicer_splits_a_line_at_blanks() -> None:
    lines = slicer_table(COLORS, "brats2023").splitlines()
    assert lines[0].startswith("#") and "brats2023" in lines[0]
    rows = [line.split() for line in lines if not line.startswith("#")]
    assert [len(row) for row in rows] == [6] * 4
    assert [int(row[0]) for row in rows] == [0, 1, 2, 3]
    assert {int(row[0]): tuple(map(int, row[2:5])) for row in rows[1:]} == PUBLISHED
    assert [row[5] for row in rows] == ["0", "255", "255", "255"]
    assert rows[3][1] == "Enhancing_tumour"


def test_itksnap_reads_seven_numbers_and_a_quoted_name() -> None:
    # IDX R G B A VIS MSH "LABEL", as ITK-SNAP's own files have it.
    pattern = re.compile(r'\s*(\d+)\s+(\d+)\s+(\d+)\s+(\d+)\s+([\d.]+)\s+([01])\s+([01])\s+"([^"]+)"')
    text = itksnap_table(COLORS, "brats2023")
    rows = [pattern.fullmatch(line) for line in text.splitlines() if not line.startswith("#")]
    assert len(rows) == 4 and all(rows)
    read = {int(m[1]): tuple(int(m[i]) for i in (2, 3, 4)) for m in rows if m and int(m[1])}
    assert read == PUBLISHED
    assert rows[0] is not None and rows[0].groups()[4:] == ("0", "0", "0", "Clear Label")
    assert rows[3] is not None and rows[3].groups()[4:] == ("1", "1", "1", "Enhancing tumour")


def test_the_bids_table_has_index_and_name() -> None:
    rows = list(csv.DictReader(io.StringIO(bids_table(COLORS)), delimiter="\t"))
    assert [int(row["index"]) for row in rows] == [0, 1, 2, 3]
    assert rows[1]["color"] == "#f0e442" and rows[2]["name"] == "Oedema"


def test_other_classes_keep_their_names_and_differ_in_colour() -> None:
    colors = label_colors({f"class{i}": i for i in range(12)})
    assert [color.name for color in colors] == [f"class{i}" for i in range(12)]
    assert len({color.rgb for color in colors[:8]}) == 8
    assert all(color.rgb != (0, 0, 0) for color in colors[1:])
