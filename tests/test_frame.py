"""Where the network's grid lies on a fixed image: in the pose and the size that the network was trained on."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jrs.errors import ConfigurationError
from jrs.geometry import Geometry, apply_affine
from jrs.manifest import GridSpec
from jrs.reading import read_volume
from jrs.resources import atlas_path
from jrs.runtime import fixed
from jrs.runtime.affine import foreground_box
from jrs.runtime.pipeline import Pipeline
from jrs.runtime.preprocess import place_grid
from jrs.volume import Volume

FRAMED = GridSpec((80, 96, 80), (2.0, 2.0, 2.0), "RAS", frame="sri24")


@pytest.fixture(scope="module")
def atlas() -> Volume:
    """SRI24 as it ships."""
    return read_volume(atlas_path("sri24"))


def tilted(atlas: Volume, degrees: float, scale: float) -> tuple[Volume, np.ndarray]:
    """The same head nodding, of another size, somewhere else; and the matrix that takes it there."""
    angle = math.radians(degrees)
    matrix = np.eye(4)
    matrix[1:3, 1:3] = [[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]
    matrix[:3, :3] *= scale
    matrix[:3, 3] = (20.0, -35.0, 12.0)
    return Volume(atlas.data, Geometry(atlas.data.shape, matrix @ atlas.geometry.affine)), matrix


def corners(grid: Geometry) -> np.ndarray:
    """The grid's eight corners, RAS mm."""
    ends = [(0, n - 1) for n in grid.shape]
    return grid.to_ras(np.stack(np.meshgrid(*ends, indexing="ij"), axis=-1).reshape(-1, 3))


@pytest.mark.parametrize("frame", ["", "sri24"])
def test_on_its_own_atlas_the_grid_lies_along_the_axes(atlas: Volume, frame: str) -> None:
    grid, note = place_grid(GridSpec(FRAMED.shape, FRAMED.spacing, "LPS", frame), atlas)
    assert note is None
    assert np.array_equal(grid.affine[:3, :3], np.diag([-2.0, -2.0, 2.0]))
    middle = grid.to_ras((np.array(grid.shape) - 1) / 2)
    np.testing.assert_allclose(middle, np.mean(foreground_box(atlas), axis=0))


def test_on_a_tilted_head_the_grid_is_tilted_with_it(atlas: Volume) -> None:
    head, matrix = tilted(atlas, 14.0, 0.9)
    grid, note = place_grid(FRAMED, head)
    assert note is None
    wanted = apply_affine(matrix, corners(place_grid(FRAMED, atlas)[0]))
    assert np.linalg.norm(corners(grid) - wanted, axis=1).max() < 1.5


def test_without_a_frame_the_grid_stays_upright(atlas: Volume) -> None:
    head, _ = tilted(atlas, 14.0, 0.9)
    grid, note = place_grid(GridSpec((80, 96, 80), (2.0, 2.0, 2.0), "RAS"), head)
    assert note is None
    assert np.array_equal(grid.affine[:3, :3], np.diag([2.0, 2.0, 2.0]))


def test_what_is_no_head_is_said_and_the_grid_stays_upright() -> None:
    axes = np.indices((40, 50, 30)).astype(np.float32)
    data = ((axes[1] > 22) & (axes[1] < 28)).astype(np.float32) * (1 + axes[0])
    bar = Volume(data, Geometry((40, 50, 30), np.eye(4)))
    grid, note = place_grid(FRAMED, bar)
    assert note is not None and "sri24" in note
    assert np.array_equal(grid.affine[:3, :3], np.diag([2.0, 2.0, 2.0]))


def test_an_unknown_frame_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="frame 'mni'"):
        GridSpec(frame="mni")


def test_a_grid_that_does_not_fit_is_warned_of_also_from_the_cache(
    tiny_bundle: Path, phantom: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JRS_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(fixed, "place_grid", lambda *given: (place_grid(*given)[0], "it does not align well"))
    for made in (True, False):
        if not made:
            monkeypatch.setattr(fixed, "place_grid", None)
        with Pipeline.open(tiny_bundle, "ort-cpu", "fp32", threads=1) as pipeline:
            result = pipeline.infer(phantom.folder, phantom.atlas, refine=0, segment=False, inverse=False)
        assert result.warnings[0] == "it does not align well"
