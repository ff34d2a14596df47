"""Pictures of a pair: what is drawn where."""

from __future__ import annotations

import numpy as np
import torch

from jrs.models.network import JointOutput
from jrs.models.spatial import identity_coords
from jrs.train.batch import PairBatch
from jrs.train.pictures import draw_pair

SHAPE = (16, 24, 20)
LABEL, GAP, ZOOM = 16, 4, 2


def pair(shift: float = 0.0) -> tuple[PairBatch, JointOutput]:
    """A ramp along x in a box, a tumour in one corner of it, and a field that shifts along x."""
    images = torch.zeros(2, 1, 2, *SHAPE)
    ramp = torch.linspace(-1.0, 1.0, 12).view(-1, 1, 1).expand(12, 20, 16)
    images[:, :, 1, 2:14, 2:22, 2:18] = ramp
    tumor = torch.zeros(1, *SHAPE, dtype=torch.int64)
    tumor[0, 4:6, 16:18, 12:14] = 2
    present = torch.tensor([[0.0, 1.0]])
    batch = PairBatch(images[0], images[1], present, present, tumor, torch.full_like(tumor, -1))
    coords = identity_coords(torch.zeros(1, 3, *SHAPE)).clone()
    coords[:, 0] += shift
    probabilities = torch.nn.functional.one_hot(tumor, 4).movedim(-1, 1).float()
    return batch, JointOutput(probabilities, probabilities, coords_vox=coords, moved=images[0].clone())


def cells(picture: np.ndarray) -> list[list[np.ndarray]]:
    """The planes of each row, without names and gaps; a cell is as wide as its name at least."""
    rows, top = [], 0
    for width, height in ((SHAPE[0], SHAPE[1]), (SHAPE[0], SHAPE[2]), (SHAPE[1], SHAPE[2])):
        row, left = [], 0
        names = ("fixed", "moving", "moved", "fixed - moved", "moving, predicted", "moving, labels", "fixed, predicted")
        for name in (*names, "grid"):
            plane = picture[top + LABEL : top + LABEL + ZOOM * height, left : left + ZOOM * width]
            row.append(plane)
            left += max(ZOOM * width, 8 * len(name)) + GAP
        rows.append(row)
        top += ZOOM * height + LABEL + GAP
    assert picture.shape[0] == top
    return rows


def test_planes_lie_as_they_should() -> None:
    batch, output = pair()
    picture = draw_pair(batch, output)
    assert picture.dtype == np.uint8 and picture.shape[2] == 3
    axial, coronal, sagittal = cells(picture)
    # Through the tumour's middle; x to the right, so the ramp rises to the right; y or z upwards.
    for row, below in ((axial, 2), (coronal, 2)):
        line = row[0][ZOOM * 10, :, 0].astype(int)
        assert (np.diff(line[2 * ZOOM : 14 * ZOOM]) >= 0).all() and line[13 * ZOOM] > 250 and line[2 * ZOOM] < 5
        assert not row[0][: ZOOM * below].any() and not row[0][-ZOOM * below :].any()
    assert len(np.unique(sagittal[0][ZOOM * 4 : -ZOOM * 4, ZOOM * 4 : -ZOOM * 4])) == 1


def test_the_tumour_is_coloured_where_it_is() -> None:
    batch, output = pair()
    axial = cells(draw_pair(batch, output))[0]
    for plane in (axial[4], axial[5], axial[6]):
        coloured = np.argwhere(plane.max(axis=2).astype(int) - plane.min(axis=2) > 20)
        rows, columns = coloured[:, 0], coloured[:, 1]
        # x 4 to 5 from the left, y 16 to 17 of 24 from the bottom.
        assert (columns.min(), columns.max()) == (ZOOM * 4, ZOOM * 6 - 1)
        assert (rows.min(), rows.max()) == (ZOOM * (24 - 18), ZOOM * (24 - 16) - 1)


def test_no_difference_is_white_and_signs_are_red_and_blue() -> None:
    batch, output = pair()
    assert (cells(draw_pair(batch, output))[0][3] == 255).all()
    assert output.moved is not None
    output.moved = output.moved + 1.5 * (output.moved != 0)
    changed = cells(draw_pair(batch, output))[0][3].reshape(-1, 3).astype(int)
    darkest = changed[changed[:, 0].argmin()]
    assert darkest[2] == 255 and abs(darkest[0] - 127) <= 1  # fixed less moved is negative: blue


def test_the_grid_of_the_identity_is_straight_and_follows_a_shift() -> None:
    lines = []
    for shift in (0.0, 1.0):
        plane = cells(draw_pair(*pair(shift)))[0][7]
        dark = plane[:, :, 0] < 128
        columns = np.flatnonzero(dark.mean(axis=0) > 0.9)
        lines.append(columns)
        assert len(columns) >= 3 and (np.diff(columns) == 4 * ZOOM).all()
        assert (np.diff(np.flatnonzero(dark.mean(axis=1) > 0.9)) == 4 * ZOOM).all()
    # Sampled one voxel further along x, the moving image's lines come to lie one voxel lower.
    assert (lines[0][0] - lines[1][0]) % (4 * ZOOM) == ZOOM


def test_a_network_that_only_segments_has_no_moved_image() -> None:
    batch, output = pair()
    registered = draw_pair(batch, output)
    alone = draw_pair(batch, JointOutput(output.moving_probabilities, output.fixed_probabilities))
    assert alone.shape[0] == registered.shape[0] and alone.shape[1] < registered.shape[1]
