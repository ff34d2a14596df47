"""Augmentation of a batch on the device that trains: geometry, contrast, scanner, missing channels.

Every number is drawn on the CPU by the generator of its pair (noise by one on the device that this one seeds), so a
pair is changed in the same way whichever batch it is in, and the device is not waited for. An image is taken back to
intensities above a background of 0, as it was before its normalisation; there it is deformed and changed, and
normalised again over what is its foreground then.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from jrs.manifest import GridSpec, ModelSpec, Normalization
from jrs.models.spatial import warp
from jrs.structures import mirrored_structures
from jrs.train.batch import PairBatch
from jrs.train.config import AugmentConfig

_DARKEST, _FOREGROUND = 0.02, 0.01
"""With a bright end of about 1: the darkest of the foreground, and from where on a voxel is foreground."""


@torch.no_grad()
def augment(
    batch: PairBatch,
    config: AugmentConfig,
    generator: torch.Generator | Sequence[torch.Generator],
    model: ModelSpec,
) -> PairBatch:
    """The batch changed at random; itself where all chances are 0.

    ``generator`` (CPU): one a pair, or one that serves all pairs in turn. A pair is mirrored as a whole; otherwise
    each image is deformed on its own, its labels with it, and each channel's intensities on their own. A channel
    that nothing was drawn for comes back bit by bit, one that is missing stays zero.
    """
    if not config.active:
        return batch
    pairs = batch.moving.shape[0]
    draws = _Draws([generator] * pairs if isinstance(generator, torch.Generator) else list(generator))
    if len(draws.generators) != pairs:
        raise ValueError(f"{len(draws.generators)} generators for {pairs} pairs")
    batch = _without_channels(batch, config, draws, model)
    batch = _mirrored(batch, config, draws, model.grid)
    if not config.changes_images:
        return batch
    deformed, coords = _deformation(config, draws, model.grid, batch.moving.device)
    images = torch.cat([batch.moving, batch.fixed]).contiguous()
    present = torch.cat([batch.moving_present, batch.fixed_present])
    with torch.autocast(images.device.type, enabled=False):
        images = _changed(images, present, deformed, coords, config, draws, model)
    if batch.moving.is_contiguous(memory_format=torch.channels_last_3d):
        images = images.to(memory_format=torch.channels_last_3d)
    batch = dataclasses.replace(batch, moving=images[:pairs], fixed=images[pairs:])
    split = int(deformed[:pairs].sum())
    return dataclasses.replace(
        batch,
        moving_tumor=_deformed_labels(batch.moving_tumor, deformed[:pairs], coords[:split]),
        moving_structures=_deformed_labels(batch.moving_structures, deformed[:pairs], coords[:split]),
        fixed_tumor=_deformed_labels(batch.fixed_tumor, deformed[pairs:], coords[split:]),
        fixed_structures=_deformed_labels(batch.fixed_structures, deformed[pairs:], coords[split:]),
    )


class _Draws:
    """Draws for all pairs at once, each pair's by its own generator and in the same order whatever is drawn."""

    def __init__(self, generators: Sequence[torch.Generator]) -> None:
        self.generators = generators

    def pairs(self, *shape: int) -> Tensor:
        """(N, shape), uniform in [0, 1)."""
        return torch.stack([torch.rand(shape, generator=g, device=g.device) for g in self.generators]).cpu()

    def images(self, *shape: int) -> Tensor:
        """(2N, shape), uniform in [0, 1): the moving images, then the fixed ones."""
        return self.pairs(2, *shape).transpose(0, 1).flatten(0, 1)

    def signed(self, *shape: int) -> Tensor:
        """(2N, shape), uniform in [-1, 1)."""
        return 2.0 * self.images(*shape) - 1.0

    def normal(self, *shape: int) -> Tensor:
        """(2N, shape), of unit variance."""
        drawn = [torch.randn(2, *shape, generator=g, device=g.device) for g in self.generators]
        return torch.stack(drawn).cpu().transpose(0, 1).flatten(0, 1)

    def seeds(self) -> list[int]:
        """One a pair, for a generator on another device."""
        return [int(torch.randint(2**31, (), generator=g, device=g.device)) for g in self.generators]


# Channels and mirrors -----------------------------------------------------------------------------------------------


def _without_channels(batch: PairBatch, config: AugmentConfig, draws: _Draws, model: ModelSpec) -> PairBatch:
    """Modality dropout: optional channels of either image left out, never all that it has."""
    chances = draws.images(len(model.channels))
    if not config.drop_channel:
        return batch
    optional = torch.tensor([channel in model.optional_channels for channel in model.channels])
    dropped = ((chances < config.drop_channel) & optional).to(batch.moving.device)
    chances = chances.to(batch.moving.device)
    present = torch.cat([batch.moving_present, batch.fixed_present])
    kept = present * ~dropped
    # Where all were dropped, the one that came closest to staying does.
    last = functional.one_hot(torch.where(present > 0, chances, -1.0).argmax(dim=1), present.shape[1]) * present
    kept = torch.where(kept.sum(dim=1, keepdim=True) > 0, kept, last)
    n = batch.moving.shape[0]
    return dataclasses.replace(
        batch,
        moving=batch.moving * _per_channel(kept[:n]),
        fixed=batch.fixed * _per_channel(kept[n:]),
        moving_present=kept[:n],
        fixed_present=kept[n:],
    )


def _mirrored(batch: PairBatch, config: AugmentConfig, draws: _Draws, grid: GridSpec) -> PairBatch:
    """Both images of a pair and their labels mirrored along anatomical axes, left structures becoming right ones."""
    chosen = draws.pairs(3) < torch.tensor(config.flip)
    for which, letters in enumerate(("LR", "AP", "IS")):
        pairs = chosen[:, which]
        if not pairs.any():
            continue
        axis = grid.axis_along(letters)
        rows = pairs.nonzero()[:, 0].to(batch.moving.device)
        changes: dict[str, Tensor] = {}
        for name, value in vars(batch).items():
            if value is None or name.endswith("present"):
                continue
            flipped = value[rows].flip(axis + value.dim() - 3)
            if which == 0 and name.endswith("structures"):
                flipped = torch.from_numpy(mirrored_structures()).to(value.device)[flipped.long()].to(value.dtype)
            changes[name] = value.clone().index_copy_(0, rows, flipped)
        batch = dataclasses.replace(batch, **changes)
    return batch


# Geometry -----------------------------------------------------------------------------------------------------------


def _deformation(
    config: AugmentConfig, draws: _Draws, grid: GridSpec, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Which images (2N, on the CPU) are deformed, and where (D,3,X,Y,Z) each voxel of those is sampled."""
    affine, angles, stretch = draws.images() < config.affine, draws.signed(3), draws.signed(3)
    skews, shift = draws.signed(3), draws.signed(3)
    elastic, amplitude = draws.images() < config.elastic, 0.2 + 0.8 * draws.images()
    coarse = draws.normal(3, *_control_points(grid, config.elastic_control_mm))
    deformed = affine | elastic
    matrices = affine_matrices(
        angles * math.radians(config.rotation_deg), stretch * config.scale, skews * config.shear
    )
    matrices = torch.where(affine.view(-1, 1, 1), matrices, torch.eye(3))[deformed]
    shift = (shift * config.shift_mm * affine.view(-1, 1))[deformed]
    coarse = coarse * (config.elastic_mm * amplitude * elastic).view(-1, 1, 1, 1, 1)
    return deformed, sampling_coords(matrices, shift, coarse[deformed], grid, device)


def affine_matrices(angles: Tensor, stretch: Tensor, skews: Tensor) -> Tensor:
    """(N,3,3): a rotation about the vector ``angles`` (N,3; radians), after shears, after 1 + ``stretch`` per axis."""
    turn = torch.zeros(angles.shape[0], 3, 3)
    turn[:, 0, 1], turn[:, 0, 2], turn[:, 1, 2] = -angles[:, 2], angles[:, 1], -angles[:, 0]
    shear = torch.eye(3).repeat(angles.shape[0], 1, 1)
    shear[:, 0, 1], shear[:, 0, 2], shear[:, 1, 2] = skews.unbind(1)
    rotation: Tensor = torch.linalg.matrix_exp(turn - turn.transpose(1, 2))
    return rotation @ shear @ torch.diag_embed(1.0 + stretch)


def sampling_coords(matrices: Tensor, shift: Tensor, coarse: Tensor, grid: GridSpec, device: torch.device) -> Tensor:
    """(N,3,X,Y,Z) voxel indices of c + M (x - c) + t + e(x), c the grid's middle, lengths in mm along the axes.

    ``matrices`` (N,3,3), ``shift`` t (N,3), ``coarse`` (N,3,x,y,z) the displacement e at its control points.
    """
    spacing = torch.tensor(grid.spacing)
    voxel_matrices = (matrices * spacing / spacing.view(3, 1)).to(device)
    middle = (torch.tensor(grid.shape, dtype=torch.float32) - 1.0) / 2.0
    start = (middle + shift / spacing).to(device)
    fine = _smooth(coarse.to(device), grid.shape)
    coords = []
    for i in range(3):
        total = fine[:, i] / grid.spacing[i] + start[:, i].view(-1, 1, 1, 1)
        for j, n in enumerate(grid.shape):
            offset = torch.arange(n, device=device, dtype=torch.float32) - (n - 1) / 2.0
            place = [1, 1, 1]
            place[j] = n
            total = total + voxel_matrices[:, i, j].view(-1, 1, 1, 1) * offset.view(1, *place)
        coords.append(total)
    return torch.stack(coords, dim=1)


def _control_points(grid: GridSpec, distance_mm: float) -> tuple[int, int, int]:
    x, y, z = (max(2, math.ceil(n * s / distance_mm) + 1) for n, s in zip(grid.shape, grid.spacing, strict=True))
    return x, y, z


def _smooth(coarse: Tensor, shape: tuple[int, int, int]) -> Tensor:
    if coarse.shape[0] == 0:
        return coarse.new_zeros(0, coarse.shape[1], *shape)
    fine: Tensor = functional.interpolate(coarse, size=shape, mode="trilinear", align_corners=True)
    return fine


def _outside(coords: Tensor) -> Tensor:
    """(N,X,Y,Z), where a point lies beyond the outermost voxels' outer faces."""
    ends = torch.tensor(coords.shape[2:], device=coords.device).view(1, 3, 1, 1, 1) - 0.5
    return ((coords < -0.5) | (coords > ends)).any(dim=1)


def _deformed_labels(labels: Tensor | None, deformed: Tensor, coords: Tensor) -> Tensor | None:
    """Labels (N,X,Y,Z) by nearest neighbour, background outside; those that were unknown stay so."""
    if labels is None or coords.shape[0] == 0:
        return labels
    flat = torch.zeros(coords.shape[0], *coords.shape[2:], dtype=torch.int64, device=coords.device)
    for axis, n in enumerate(coords.shape[2:]):
        flat = flat * n + coords[:, axis].round().clamp(0, n - 1).long()
    rows = deformed.nonzero()[:, 0].to(labels.device)
    moved = labels[rows].flatten(1).gather(1, flat.flatten(1)).view(flat.shape)
    moved = torch.where(_outside(coords) & (moved > 0), 0, moved).to(labels.dtype)
    return labels.clone().index_copy_(0, rows, moved)


# Intensities --------------------------------------------------------------------------------------------------------


def _changed(
    images: Tensor,
    present: Tensor,
    deformed: Tensor,
    coords: Tensor,
    config: AugmentConfig,
    draws: _Draws,
    model: ModelSpec,
) -> Tensor:
    """Images (2N,C,X,Y,Z) deformed, changed in their intensities and normalised again."""
    light = _Light.of(images, model.normalization)
    touched = deformed.view(-1, 1).repeat(1, images.shape[1])
    if coords.shape[0]:
        rows = deformed.nonzero()[:, 0].to(images.device)
        light.values[rows] = warp(light.values[rows], coords) * ~_outside(coords).unsqueeze(1)
    foreground = light.values > _FOREGROUND
    for effect in (_blur, _coarsen, _bias, _gamma, _noise):
        touched |= effect(light, config, draws, model.grid)
    changed = _normalized(light.values * foreground, foreground, model.normalization)
    # Of the normalised image, for before it they would be undone: another foreground, a lesion that shifts the mean.
    scaled = draws.images(images.shape[1]) < config.intensity
    change = draws.signed(2, images.shape[1]) * scaled.unsqueeze(1)
    scale, shift = change[:, 0] * config.intensity_scale, change[:, 1] * config.intensity_shift
    factor, offset = (_per_channel(x.to(images.device)) for x in (1.0 + scale, shift))
    changed = torch.where(foreground, changed * factor + offset, changed) * _per_channel(present)
    return torch.where(_per_channel((touched | scaled).to(images.device)), changed, images)


@dataclass
class _Light:
    """Intensities (2N,C,X,Y,Z) as before normalisation up to a factor: background 0, mean plus two deviations 1.

    ``deviation`` (2N,C) is the foreground's.
    """

    values: Tensor
    deviation: Tensor

    @staticmethod
    def of(images: Tensor, normalization: Normalization) -> _Light:
        # The background of an image that was normalised as a whole has some value: that of a corner.
        ground = 0.0 if normalization == "zscore-foreground" else images[:, :, :1, :1, :1]
        there = images != ground
        floor = torch.where(there, images, math.inf).amin(dim=(2, 3, 4))
        mean, deviation = _moments(images, there)
        span = (mean - floor + 2.0 * deviation).clamp(min=1e-3)
        values = torch.where(there, _DARKEST + (images - _per_channel(floor)) / _per_channel(span), 0.0)
        return _Light(values, deviation / span)

    def change(self, chosen: Tensor, change: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Put ``change(values (P,X,Y,Z), numbers (P,) on the CPU)`` in the place of the channels chosen (2N,C)."""
        numbers = chosen.flatten().nonzero()[:, 0]
        if numbers.numel():
            places = numbers.to(self.values.device)
            flat = self.values.flatten(0, 1)
            flat.index_copy_(0, places, change(flat[places], numbers))
        return chosen


def _moments(images: Tensor, there: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation (2N,C) over the voxels that are there."""
    count = there.sum(dim=(2, 3, 4)).clamp(min=1)
    mean = (images * there).sum(dim=(2, 3, 4)) / count
    variance = ((images - _per_channel(mean)) * there).square().sum(dim=(2, 3, 4)) / count
    return mean, variance.sqrt()


def _normalized(values: Tensor, foreground: Tensor, normalization: Normalization) -> Tensor:
    over = foreground if normalization == "zscore-foreground" else torch.ones_like(foreground)
    mean, deviation = _moments(values, over)
    return (values - _per_channel(mean)) / _per_channel(deviation.clamp(min=1e-3)) * over


def _per_channel(values: Tensor) -> Tensor:
    return values[:, :, None, None, None]


def _column(values: Tensor, like: Tensor) -> Tensor:
    return values.to(like.device).view(-1, 1, 1, 1)


def _along(values: Tensor, matrices: Tensor, axis: int) -> Tensor:
    """Each of ``matrices`` (P,n,n) applied along an axis of its volume (P,X,Y,Z)."""
    p, x, y, z = values.shape
    if axis == 0:
        return torch.matmul(matrices, values.reshape(p, x, y * z)).reshape(p, x, y, z)
    if axis == 1:
        return torch.matmul(matrices.unsqueeze(1), values)
    return torch.matmul(values, matrices.transpose(1, 2).unsqueeze(1))


def _blur(light: _Light, config: AugmentConfig, draws: _Draws, grid: GridSpec) -> Tensor:
    """Gaussian, the same along all axes in mm."""
    channels = light.values.shape[1]
    chosen, sigma_mm = draws.images(channels) < config.blur, draws.images(channels) * config.blur_mm

    def change(values: Tensor, numbers: Tensor) -> Tensor:
        for axis, spacing in enumerate(grid.spacing):
            sigma = (sigma_mm.flatten()[numbers] / spacing).clamp(min=1e-2).to(values.device).view(-1, 1, 1)
            place = torch.arange(values.shape[1 + axis], device=values.device)
            weights = torch.exp(-0.5 * ((place[:, None] - place) / sigma).square())
            values = _along(values, weights / weights.sum(dim=2, keepdim=True), axis)
        return values

    return light.change(chosen, change)


def _coarsen(light: _Light, config: AugmentConfig, draws: _Draws, grid: GridSpec) -> Tensor:
    """Thick slices along one axis: means over slabs, linear between their middles."""
    channels = light.values.shape[1]
    chosen = draws.images(channels) < config.resolution
    axes = (3.0 * draws.images(channels)).long().clamp(max=2)
    factors = 1.0 + draws.images(channels) * (config.resolution_factor - 1.0)
    for axis, n in enumerate(grid.shape):

        def change(values: Tensor, numbers: Tensor, axis: int = axis, n: int = n) -> Tensor:
            matrices = []
            for factor in factors.flatten()[numbers].tolist():
                slabs = functional.interpolate(torch.eye(n)[None], size=max(2, round(n / factor)), mode="area")
                matrices.append(functional.interpolate(slabs, size=n, mode="linear")[0].T)
            return _along(values, torch.stack(matrices).to(values.device), axis)

        light.change(chosen & (axes == axis), change)
    return chosen


def _bias(light: _Light, config: AugmentConfig, draws: _Draws, grid: GridSpec) -> Tensor:
    """A smooth factor, as of coils."""
    channels = light.values.shape[1]
    chosen, strength = draws.images(channels) < config.bias, draws.images(channels) * config.bias_strength
    coarse = draws.normal(channels, *_control_points(grid, config.bias_control_mm)).flatten(0, 1)

    def change(values: Tensor, numbers: Tensor) -> Tensor:
        logarithm = _smooth(coarse[numbers].unsqueeze(1).to(values.device), grid.shape)[:, 0]
        return values * torch.exp(_column(strength.flatten()[numbers], values) * logarithm)

    return light.change(chosen, change)


def _gamma(light: _Light, config: AugmentConfig, draws: _Draws, grid: GridSpec) -> Tensor:
    """A power between 1 / (1 + range) and 1 + range."""
    channels = light.values.shape[1]
    chosen = draws.images(channels) < config.gamma
    power = (1.0 + config.gamma_range) ** draws.signed(channels)
    return light.change(chosen, lambda v, numbers: v.clamp(min=0.0) ** _column(power.flatten()[numbers], v))


def _noise(light: _Light, config: AugmentConfig, draws: _Draws, grid: GridSpec) -> Tensor:
    """Gaussian, its deviation a share of the foreground's."""
    images, channels = light.values.shape[:2]
    chosen, level = draws.images(channels) < config.noise, draws.images(channels) * config.noise_level
    device, seeds = light.values.device, draws.seeds()
    drawn = {}
    for pair, seed in enumerate(seeds):
        generator = torch.Generator(device).manual_seed(seed)
        for image in (pair, pair + images // 2):
            for channel in chosen[image].nonzero()[:, 0].tolist():
                noise = torch.randn(grid.shape, generator=generator, device=device)
                drawn[image * channels + channel] = noise

    def change(values: Tensor, numbers: Tensor) -> Tensor:
        noise = torch.stack([drawn[number] for number in numbers.tolist()])
        deviation = light.deviation.flatten()[numbers.to(device)].view(-1, 1, 1, 1)
        return values + _column(level.flatten()[numbers], values) * deviation * noise

    return light.change(chosen, change)
