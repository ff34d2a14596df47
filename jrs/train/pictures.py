"""A pair for the eye: three planes, each with what went in, what came out, and the field between."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from jrs.models.network import JointOutput
from jrs.models.spatial import warp
from jrs.train.batch import PairBatch

Image = npt.NDArray[np.float32]
Picture = npt.NDArray[np.uint8]

# Classes 1 to 3 as most viewers of BraTS show them; more take their turn again.
_COLOURS = np.array([(220, 50, 47), (80, 190, 90), (240, 200, 40), (60, 140, 220)], dtype=np.float32) / 255.0
_ZOOM = 2
_GRID_EVERY = 4
_GAP = 4
_LABEL = 16


def draw_pair(batch: PairBatch, output: JointOutput | None) -> Picture:
    """The first pair of a batch as (height, width, 3): a row a plane, axial, coronal and sagittal.

    Columns: fixed, moving, moved, fixed less moved, segmentations of moving and fixed over their images, and the
    moved grid. Images are the first channel that both have. Planes go through the tumour's middle, else the grid's.
    """
    channel = _common_channel(batch)
    fixed, moving = _array(batch.fixed[0, channel]), _array(batch.moving[0, channel])
    columns: list[tuple[str, Image]] = [("fixed", _grey(fixed)), ("moving", _grey(moving))]
    if output is not None and output.moved is not None and output.coords_vox is not None:
        # The background of a z-scored image is zero, its middle grey: between the two only the warped mask tells.
        foreground = (batch.moving[:1, channel : channel + 1] != 0).float()
        moved = _array((output.moved[:1, channel] * (warp(foreground, output.coords_vox[:1])[:, 0] > 0.5))[0])
        columns += [("moved", _grey(moved)), ("fixed - moved", _signed(fixed - moved))]
    if output is not None and output.moving_probabilities is not None and output.fixed_probabilities is not None:
        for name, image, probabilities, labels in (
            ("moving", moving, output.moving_probabilities, batch.moving_tumor),
            ("fixed", fixed, output.fixed_probabilities, batch.fixed_tumor),
        ):
            predicted = probabilities[0].argmax(dim=0)
            columns.append((f"{name}, predicted", _overlay(image, _array(predicted))))
            if labels is not None and bool((labels[0] >= 0).any()):
                columns.append((f"{name}, labels", _overlay(image, _array(labels[0].clamp(min=0)))))
    grid = _array(output.coords_vox[0]) if output is not None and output.coords_vox is not None else None
    centre = _centre(batch)
    rows = []
    for axis in (2, 1, 0):
        cells = [_cell(name, _plane(image, axis, centre[axis])) for name, image in columns]
        if grid is not None:
            kept = [k for k in range(3) if k != axis]
            lines = _grid_lines(np.take(grid[kept], centre[axis], axis=axis + 1))
            cells.append(_cell("grid", lines))
        rows.append(_beside(cells, axis=1))
    return _beside(rows, axis=0)


def _array(tensor: Tensor) -> Image:
    return tensor.detach().float().cpu().numpy()


def _common_channel(batch: PairBatch) -> int:
    both = (batch.moving_present[0] * batch.fixed_present[0]).tolist()
    return both.index(1.0) if 1.0 in both else 0


def _centre(batch: PairBatch) -> list[int]:
    if batch.moving_tumor is not None:
        places = torch.nonzero(batch.moving_tumor[0] > 0)
        if len(places):
            return [int(v) for v in places.float().mean(dim=0).round().tolist()]
    return [n // 2 for n in batch.moving.shape[2:]]


def _grey(image: Image) -> Image:
    """(X,Y,Z) to (X,Y,Z,3) between the 1st and the 99.5th percentile of what is not background."""
    inside = image[image != 0]
    low, high = np.percentile(inside, (1.0, 99.5)) if inside.size else (0.0, 1.0)
    scaled = np.clip((image - low) / max(high - low, 1e-6), 0.0, 1.0) * (image != 0)
    return np.repeat(scaled[..., None], 3, axis=-1).astype(np.float32)


def _signed(difference: Image) -> Image:
    """Red above zero, blue below, white at zero; three deviations of a z-scored image are full colour."""
    share = np.clip(difference / 3.0, -1.0, 1.0)
    red, blue = 1.0 - np.maximum(-share, 0.0), 1.0 - np.maximum(share, 0.0)
    return np.stack([red, 1.0 - np.abs(share), blue], axis=-1).astype(np.float32)


def _overlay(image: Image, labels: Image) -> Image:
    shown, codes = _grey(image), labels.astype(int)
    colour = _COLOURS[(np.maximum(codes, 1) - 1) % len(_COLOURS)]
    return np.where((codes > 0)[..., None], 0.5 * shown + 0.5 * colour, shown).astype(np.float32)


def _plane(image: Image, axis: int, index: int) -> Image:
    """One plane of (X,Y,Z,3), the first remaining axis to the right, the second upwards."""
    return np.flip(np.take(image, index, axis=axis).swapaxes(0, 1), axis=0)


def _grid_lines(coords: Image) -> Image:
    """Where every fourth line of the moving grid comes to lie on a plane of the fixed one; (2,A,B) to (B,A,3).

    A line lies where a coordinate passes a multiple of the distance between two lines: level sets of the field,
    so folds and stretches show as they are.
    """
    smooth = functional.interpolate(torch.from_numpy(coords)[None], scale_factor=_ZOOM, mode="bilinear")
    zoomed = smooth[0].numpy()
    cells = np.floor(zoomed / _GRID_EVERY)
    lines = np.zeros(cells.shape[1:], dtype=bool)
    for channel in cells:
        lines[:-1] |= channel[1:] != channel[:-1]
        lines[:, :-1] |= channel[:, 1:] != channel[:, :-1]
    shown = np.flip(1.0 - 0.8 * lines.astype(np.float32).T, axis=0)
    return np.repeat(shown[..., None], 3, axis=-1)


def _cell(name: str, plane: Image) -> Picture:
    from PIL import Image as Pillow
    from PIL import ImageDraw

    if name != "grid":
        plane = np.repeat(np.repeat(plane, _ZOOM, axis=0), _ZOOM, axis=1)
    height, width = plane.shape[:2]
    pixels = (np.clip(plane, 0.0, 1.0) * 255.0).round().astype(np.uint8)
    image = Pillow.new("RGB", (max(width, 8 * len(name)), height + _LABEL))
    image.paste(Pillow.fromarray(pixels), (0, _LABEL))
    ImageDraw.Draw(image).text((2, 2), name, fill=(255, 255, 255))
    return np.asarray(image)


def _beside(pictures: list[Picture], axis: int) -> Picture:
    """Pictures next to each other, those that are smaller filled up with black."""
    other = 1 - axis
    size = max(picture.shape[other] for picture in pictures)
    filled: list[Any] = []
    for picture in pictures:
        pad = [(0, 0), (0, 0), (0, 0)]
        pad[other], pad[axis] = (0, size - picture.shape[other]), (0, _GAP)
        filled.append(np.pad(picture, pad))
    return np.concatenate(filled, axis=axis)
