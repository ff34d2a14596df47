"""Other registration programs find a known affine, whose transform is read as they wrote it; where installed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from jrs.errors import BackendError
from jrs.evaluate.peers import PEERS, register
from jrs.geometry import Geometry
from jrs.volume import Volume


@pytest.mark.slow
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", sorted(PEERS))
def test_a_peer_finds_a_known_affine(
    name: str, masked: bool, phantom: Any, capfd: pytest.CaptureFixture[str], helpers: Any
) -> None:
    pytest.importorskip(PEERS[name][0])
    import nibabel as nib

    image, atlas = phantom.image("t1"), nib.load(phantom.atlas)
    moving, fixed = (
        Volume(np.asarray(i.dataobj, np.float32), Geometry(i.shape, i.affine)) for i in (image, atlas)
    )
    tumor = np.zeros(moving.data.shape, dtype=bool)
    # Off the middle, where one landmark lies.
    tumor[24:28, 12:16, 20:24] = True
    found = register(name, moving, fixed, tumor if masked else None, None, 1)
    points = np.array([(0, 0, 0), (20, 10, 10), (-20, 15, 5), (10, -30, -10)], dtype=float)
    expected = nib.affines.apply_affine(phantom.truth, points)
    before = np.linalg.norm(points - expected, axis=1)
    after = np.linalg.norm(found.transform.points(points) - expected, axis=1)
    assert before.min() > 8.0
    assert np.median(after) < 1.5
    assert found.seconds > 0.0
    assert capfd.readouterr().out == ""


@pytest.mark.slow
def test_a_program_that_fails_is_an_error_of_its_own() -> None:
    pytest.importorskip("picsl_greedy")
    # ITK smooths no image of fewer than four voxels.
    tiny = Volume(np.zeros((3, 3, 3), dtype=np.float32), Geometry((3, 3, 3), np.eye(4)))
    with pytest.raises(BackendError, match=r"greedy: ended with exit code 1 \(ITK ERROR"):
        register("greedy", tiny, tiny)
