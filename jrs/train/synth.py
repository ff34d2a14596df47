"""Images of any contrast drawn from label maps, with exact truth: tissue, structures, tumour.

From a map: a smooth deformation and a small affine; a blob tumour in a share of the images; one random mean per
class and contrast around a plausible one; texture, bias field, gamma, blur, noise; missing modalities. Every image
is a function of (seed, number) alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from jrs.manifest import ModelSpec
from jrs.structures import STRUCTURES, TISSUES
from jrs.train.batch import PairBatch, concatenate, pair_indices
from jrs.train.config import SynthesisConfig
from jrs.train.labelmaps import LabelMaps

# Mean of each class relative to white matter in T1. Columns: the tissues (background first), then necrosis,
# oedema, enhancing, non-enhancing tumour.
_CLASSES = (*TISSUES, "necrosis", "edema", "enhancing", "nonenhancing")
_MEANS = {
    "t1": (0.0, 1.00, 0.72, 0.82, 0.30, 0.70, 0.95, 0.50, 0.75, 0.80, 0.62),
    "t1ce": (0.0, 1.00, 0.75, 0.84, 0.32, 0.74, 0.97, 0.48, 0.76, 1.65, 0.64),
    "t2": (0.0, 0.50, 0.68, 0.55, 1.35, 0.66, 0.52, 1.20, 0.98, 0.90, 1.02),
    "flair": (0.0, 0.58, 0.74, 0.64, 0.22, 0.72, 0.62, 0.85, 1.20, 1.00, 1.02),
}
_FIRST_TUMOR = len(TISSUES)
_NECROSIS, _EDEMA, _ENHANCING, _NONENHANCING = range(_FIRST_TUMOR, _FIRST_TUMOR + 4)
# Class of the segmentation for each drawn class: 1 necrotic or non-enhancing core, 2 oedema, 3 enhancing.
_SEGMENTATION = torch.tensor([0] * _FIRST_TUMOR + [1, 2, 3, 1])
_WHITE, _CSF = TISSUES.index("white_matter"), TISSUES.index("csf")


@dataclass(frozen=True)
class Drawn:
    """One image: (1,C,X,Y,Z) normalised, presence (1,C), tumour (1,X,Y,Z) int64, structures (1,X,Y,Z) uint8."""

    image: Tensor
    present: Tensor
    tumor: Tensor
    structures: Tensor


class SyntheticPairs:
    """Pairs of images drawn from label maps (a ``PairSource``)."""

    def __init__(
        self,
        maps: LabelMaps,
        model: ModelSpec,
        config: SynthesisConfig,
        seed: int,
        device: torch.device | None = None,
    ) -> None:
        self.device = device if device is not None else torch.device("cpu")
        self.map_names = maps.names
        self.structures = maps.structures.to(self.device)
        self.tissues = maps.tissues.to(self.device)
        self.model, self.config, self.seed = model, config, seed

    def __len__(self) -> int:
        """Number of label maps."""
        return int(self.tissues.shape[0])

    def batch(self, index: int, size: int) -> PairBatch:
        """Batch number ``index`` of ``size`` pairs, always the same for one seed."""
        pairs = []
        for place, (moving, fixed) in enumerate(pair_indices(index, size, len(self), self.seed)):
            number = 2 * (index * size + place)
            a, b = self.draw(moving, number, fixed=False), self.draw(fixed, number + 1, fixed=True)
            pairs.append(
                PairBatch(a.image, b.image, a.present, b.present, a.tumor, b.tumor, a.structures, b.structures)
            )
        return concatenate(pairs)

    def names(self, index: int, size: int) -> list[tuple[str, str]]:
        """Label maps that the moving and the fixed image of each pair of ``batch(index, size)`` are drawn from."""
        pairs = pair_indices(index, size, len(self), self.seed)
        return [(self.map_names[moving], self.map_names[fixed]) for moving, fixed in pairs]

    @torch.no_grad()
    def draw(self, map_index: int, number: int, fixed: bool) -> Drawn:
        """Image ``number`` of label map ``map_index``; ``fixed`` chooses the shares of a fixed image."""
        # PyTorch's CPU generator keeps 32 bits of a seed, so both numbers are mixed into as many.
        mixed = np.random.SeedSequence([self.seed, number]).generate_state(1)[0]
        generator = torch.Generator(self.device).manual_seed(int(mixed))
        spacing = self.model.grid.spacing
        nearest = self._deformed_indices(generator, spacing)
        structures = self.structures[map_index].reshape(-1)[nearest]
        tissue = self.tissues[map_index].reshape(-1)[nearest].long()
        share = self.config.fixed_tumor if fixed else self.config.moving_tumor
        drawn = tissue.clone()
        if self._uniform(generator) < share:
            for _ in range(2 if self._uniform(generator) < 0.15 else 1):
                drawn = self._with_tumor(drawn, tissue, spacing, generator)
        image = self._intensities(drawn, structures, tissue > 0, generator)
        present = self._presence(generator, fixed)
        image = image * present.view(1, -1, 1, 1, 1)
        segmentation = _SEGMENTATION.to(self.device)[drawn]
        return Drawn(image, present[None], segmentation[None], structures[None])

    def _uniform(self, generator: torch.Generator, low: float = 0.0, high: float = 1.0) -> float:
        return low + (high - low) * float(torch.rand((), generator=generator, device=self.device))

    def _smooth_noise(self, channels: int, scale_mm: float, generator: torch.Generator) -> Tensor:
        """(channels,X,Y,Z) of unit variance at its control points, which lie ``scale_mm`` apart."""
        shape, spacing = self.model.grid.shape, self.model.grid.spacing
        coarse = [max(2, math.ceil(n * s / scale_mm) + 1) for n, s in zip(shape, spacing, strict=True)]
        noise = torch.randn(1, channels, *coarse, generator=generator, device=self.device)
        return functional.interpolate(noise, size=shape, mode="trilinear", align_corners=True)[0]

    def _deformed_indices(self, generator: torch.Generator, spacing: tuple[float, float, float]) -> Tensor:
        """Flat index (X,Y,Z) into a map for every voxel of the deformed one."""
        config, shape = self.config, self.model.grid.shape
        mm = torch.tensor(spacing, device=self.device)
        axes = [(torch.arange(n, device=self.device) - (n - 1) / 2.0) * s for n, s in zip(shape, spacing, strict=True)]
        points = torch.stack(torch.meshgrid(*axes, indexing="ij"))
        angles = (torch.rand(3, generator=generator, device=self.device) * 2 - 1) * math.radians(config.rotation_deg)
        stretch = 1 + (torch.rand(3, generator=generator, device=self.device) * 2 - 1) * config.scale
        shift = (torch.rand(3, generator=generator, device=self.device) * 2 - 1) * config.shift_mm
        skew = torch.zeros(3, 3, device=self.device)
        skew[0, 1], skew[0, 2], skew[1, 2] = -angles[2], angles[1], -angles[0]
        linear = torch.linalg.matrix_exp(skew - skew.T) @ torch.diag(stretch)
        amplitude = self._uniform(generator, 0.2, 1.0) * config.deformation_mm
        moved = torch.einsum("ij,jxyz->ixyz", linear, points) + shift.view(3, 1, 1, 1)
        moved = moved + amplitude * self._smooth_noise(3, config.control_mm, generator)
        flat = torch.zeros(shape, dtype=torch.int64, device=self.device)
        for axis, n in enumerate(shape):
            index = (moved[axis] / mm[axis] + (n - 1) / 2.0).round_().clamp_(0, n - 1).long()
            flat = flat * n + index
        return flat

    def _with_tumor(
        self, drawn: Tensor, tissue: Tensor, spacing: tuple[float, float, float], generator: torch.Generator
    ) -> Tensor:
        """Paint one irregular lesion, its centre in white matter, its oedema following white matter, never in CSF."""
        candidates = torch.nonzero(tissue.reshape(-1) == _WHITE)[:, 0]
        if candidates.numel() == 0:
            return drawn
        chosen = int(candidates[int(self._uniform(generator) * (candidates.numel() - 1))])
        shape = self.model.grid.shape
        center = (chosen // (shape[1] * shape[2]), chosen // shape[2] % shape[1], chosen % shape[2])
        stretch = [self._uniform(generator, 0.75, 1.35) for _ in range(3)]
        squares = [
            ((torch.arange(n, device=self.device) - c) * s / e).square()
            for n, c, s, e in zip(shape, center, spacing, stretch, strict=True)
        ]
        distance = (squares[0][:, None, None] + squares[1][None, :, None] + squares[2][None, None, :]).sqrt()
        rough = 1 + 0.25 * self._smooth_noise(1, 22.0, generator)[0] + 0.12 * self._smooth_noise(1, 9.0, generator)[0]
        distance = distance * rough.clamp(min=0.3)
        radius = self._uniform(generator, 6.0, 24.0)
        reach = radius + self._uniform(generator, 1.0, 22.0) * (1.0 if self._uniform(generator) < 0.8 else 0.1)
        brain = tissue > 0
        # Oedema spreads further in white matter than in grey, and stops at CSF.
        edge = torch.where(tissue == _WHITE, reach, radius + 0.4 * (reach - radius))
        edema = (distance < edge) & brain & ((tissue != _CSF) | (distance < 0.8 * radius))
        core = (distance < radius) & brain & ((tissue != _CSF) | (distance < 0.8 * radius))
        drawn = torch.where(edema & (drawn < _FIRST_TUMOR), _EDEMA, drawn)
        kind = self._uniform(generator)
        if kind < 0.55:
            rim = self._uniform(generator, 0.15, 0.6)
            inside = torch.where(distance < radius * (1 - rim), _NECROSIS, _ENHANCING)
        elif kind < 0.80:
            inside = torch.full_like(drawn, _NONENHANCING)
        else:
            patches = self._smooth_noise(1, 10.0, generator)[0]
            inside = torch.where(patches > 0.4, _ENHANCING, torch.where(patches < -0.8, _NECROSIS, _NONENHANCING))
        return torch.where(core, inside, drawn)

    def _intensities(self, drawn: Tensor, structures: Tensor, brain: Tensor, generator: torch.Generator) -> Tensor:
        """(1,C,X,Y,Z): class means, texture, blur, bias, gamma, noise, z-score over the brain, zero outside."""
        config, channels = self.config, self.model.channels
        base = torch.tensor([_MEANS.get(c, _MEANS["t1"]) for c in channels], device=self.device)
        jitter = torch.randn(base.shape, generator=generator, device=self.device) * config.jitter
        jitter[:, _FIRST_TUMOR:] *= 2.0
        base = base * (1 + jitter).clamp(0.4, 1.8)
        # Each structure differs a little from its tissue, as nuclei do; tumour classes stay whole.
        own = 1 + 0.35 * config.jitter * torch.randn(
            len(channels), len(STRUCTURES) + 1, generator=generator, device=self.device
        )
        own = torch.cat([own, torch.ones(len(channels), 1, device=self.device)], dim=1)
        table = (base[:, :, None] * own[:, None, :]).reshape(len(channels), -1)
        column = torch.where(drawn < _FIRST_TUMOR, structures.long(), len(STRUCTURES) + 1)
        index = drawn * (len(STRUCTURES) + 2) + column
        image = table[:, index.reshape(-1)].reshape(len(channels), *drawn.shape)
        texture = self._smooth_noise(2, 7.0, generator)
        strength = torch.rand(len(channels), 2, generator=generator, device=self.device) * config.texture
        image = image * (1 + torch.einsum("ck,kxyz->cxyz", strength, texture))
        image = _blur(image, self._uniform(generator, 0.05, config.blur))
        bias = self._smooth_noise(len(channels), 70.0, generator) * self._uniform(generator, 0.0, config.bias)
        image = image * torch.exp(bias)
        power = 1 + (torch.rand(len(channels), 1, 1, 1, generator=generator, device=self.device) * 2 - 1) * config.gamma
        image = image.clamp_(min=0).pow_(power)
        level = torch.rand(len(channels), 1, 1, 1, generator=generator, device=self.device) * config.noise
        image = image + level * torch.randn(image.shape, generator=generator, device=self.device)
        values = image[:, brain]
        mean, deviation = (
            values.mean(dim=1).view(-1, 1, 1, 1),
            values.std(dim=1).clamp(min=1e-3).view(-1, 1, 1, 1),
        )
        return ((image - mean) / deviation * brain).unsqueeze(0)

    def _presence(self, generator: torch.Generator, fixed: bool) -> Tensor:
        """(C,) 1 or 0: the first channel alone, or all but a few; always at least one."""
        config, n = self.config, len(self.model.channels)
        alone = config.single_modality_fixed if fixed else config.single_modality_moving
        present = torch.zeros(n, device=self.device)
        if self._uniform(generator) < alone:
            present[0] = 1
            return present
        optional = torch.tensor([c in self.model.optional_channels for c in self.model.channels], device=self.device)
        dropped = (torch.rand(n, generator=generator, device=self.device) < config.drop_channel) & optional
        present[~dropped] = 1
        if not present.any():
            present[int(self._uniform(generator) * (n - 1e-6))] = 1
        return present


def _blur(image: Tensor, weight: float) -> Tensor:
    """Three taps (w, 1-2w, w) along each axis of (C,X,Y,Z): the partial volume of a scanner, cheap on a CPU."""
    for axis in (1, 2, 3):
        n = image.shape[axis]
        ahead = torch.cat([image.narrow(axis, 1, n - 1), image.narrow(axis, n - 1, 1)], dim=axis)
        behind = torch.cat([image.narrow(axis, 0, 1), image.narrow(axis, 0, n - 1)], dim=axis)
        image = torch.lerp(image, (ahead + behind) / 2.0, 2.0 * weight)
    return image
