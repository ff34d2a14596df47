"""Label maps as training from synthesis takes them: FreeSurfer's numbers, and nothing that merely looks like them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

from jrs.errors import BadDataError
from jrs.manifest import GridSpec
from jrs.reading import read_volume
from jrs.resources import atlas_path
from jrs.train.labelmaps import prepare_label_maps

SHAPE = (60, 70, 60)
GRID = GridSpec((32, 48, 32), (5.0, 5.0, 5.0))


def head(extra: bool) -> Any:
    """White and grey matter of both sides within fluid, ellipsoids; ``extra``: in a head of extracerebral numbers."""
    x, y, z = np.meshgrid(*[np.linspace(-1.4, 1.4, n) for n in SHAPE], indexing="ij")
    radius, left = np.sqrt(x**2 + y**2 + z**2), x < 0
    labels = np.where(radius < 1.3, np.where(y > 0, 502, 516), 0) if extra else np.zeros(SHAPE, int)
    for limit, ours, theirs in ((1.0, 24, 24), (0.93, 3, 42), (0.75, 2, 41)):
        labels = np.where(radius < limit, np.where(left, ours, theirs), labels)
    return labels.astype(np.int32)


def prepared(path: Path) -> Any:
    said: list[str] = []
    maps = prepare_label_maps([path], GRID, read_volume(atlas_path("sri24")), path.parent / "cache", said.append)
    assert said == [f"aligning {path.name}"]
    return maps


@pytest.mark.parametrize("extra", [False, True])
def test_a_segmentation_is_taken(helpers: Any, tmp_path: Path, extra: bool) -> None:
    path = helpers.write_image(tmp_path / "seg.nii.gz", head(extra), np.diag([2.5, 2.5, 2.5, 1.0]))
    maps = prepared(path)
    assert maps.names == ("seg.nii.gz",) and maps.structures.shape == (1, *GRID.shape)
    assert len(np.unique(maps.structures)) >= 5


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("image", "% of its voxels hold numbers that are no FreeSurfer label"),
        ("mask", "no FreeSurfer label of the brain"),
    ],
)
def test_what_is_no_segmentation_is_refused(helpers: Any, tmp_path: Path, kind: str, words: str) -> None:
    labels = head(True)
    data = np.where(labels == 0, 0, 1)
    if kind == "image":
        data = np.where(labels == 0, 0, np.random.default_rng(0).integers(1, 160, SHAPE))
    path = helpers.write_image(tmp_path / "t1.nii.gz", data.astype(np.int32), np.diag([2.5, 2.5, 2.5, 1.0]))
    with pytest.raises(BadDataError, match=words):
        prepared(path)
    assert not list((tmp_path / "cache").glob("*"))
