"""Images of any contrast drawn from label maps, with exact truth: tissue, structures, tumour.

From a map: a smooth deformation on two scales, a small affine, left and right exchanged in half; lesions that grow
and push (``jrs.train.lesions``); contrasts, artefacts and skull-stripping (``jrs.train.appearance``); missing
modalities. Every image is a function of (seed, number) alone.

Images drawn at random from label maps teach a network to read real ones: SynthMorph (Hoffmann et al. 2022, doi
10.1109/TMI.2021.3116879), SynthSeg (Billot et al. 2023, doi 10.1016/j.media.2023.102789).
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from jrs.errors import ConfigurationError
from jrs.manifest import ModelSpec
from jrs.structures import DRAWN_CLASSES, STRUCTURES, mirrored_structures
from jrs.train.appearance import Anatomy, joint_codes, render
from jrs.train.batch import PairBatch, concatenate, pair_indices
from jrs.train.config import SynthesisConfig
from jrs.train.draws import Draws
from jrs.train.labelmaps import LabelMaps
from jrs.train.lesions import SEGMENTATION, Lesion, grow, mass_effect, plan_lesions

# Beside its middle, two points inside each voxel: the fewest whose mean is a partial volume along every axis.
_SAMPLES = ((0.3, 0.3, 0.3), (-0.3, -0.3, -0.3))


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
        factors = {n // g for n, g in zip(maps.classes.shape[1:], model.grid.shape, strict=True)}
        exact = all(n % g == 0 for n, g in zip(maps.classes.shape[1:], model.grid.shape, strict=True))
        if len(factors) != 1 or not exact:
            raise ConfigurationError(
                f"label maps of {tuple(maps.classes.shape[1:])} voxels are no multiple of the grid {model.grid.shape}"
            )
        self.factor = factors.pop()
        self.names_of_maps = maps.names
        self.codes = joint_codes(maps.classes, maps.structures).to(self.device)
        self.model, self.config, self.seed = model, config, seed
        self._mirror = _mirror_table().to(self.device)

    def on(self, device: torch.device) -> SyntheticPairs:
        """The same source drawing on another device; its random fields, and so its images, are others there."""
        moved = copy.copy(self)
        moved.device, moved.codes, moved._mirror = device, self.codes.to(device), self._mirror.to(device)
        return moved

    def __len__(self) -> int:
        """Number of label maps."""
        return int(self.codes.shape[0])

    def batch(self, index: int, size: int) -> PairBatch:
        """Batch number ``index`` of ``size`` pairs, always the same for one seed."""
        pairs = []
        for place, (moving, fixed, mirrored) in enumerate(self._pairs(index, size)):
            number = 2 * (index * size + place)
            a = self.draw(moving, number, fixed=False, mirrored=mirrored)
            b = self.draw(fixed, number + 1, fixed=True, mirrored=mirrored)
            pairs.append(
                PairBatch(a.image, b.image, a.present, b.present, a.tumor, b.tumor, a.structures, b.structures)
            )
        return concatenate(pairs)

    def names(self, index: int, size: int) -> list[tuple[str, str]]:
        """Names of the maps that each pair of batch ``index`` is drawn from."""
        pairs = self._pairs(index, size)
        return [(self.names_of_maps[moving], self.names_of_maps[fixed]) for moving, fixed, _ in pairs]

    def _pairs(self, index: int, size: int) -> list[tuple[int, int, bool]]:
        """Label maps of the moving and the fixed image of each pair, and whether both are mirrored.

        Both or neither: no left hemisphere has to become a right one.
        """
        pairs = []
        for place, (moving, fixed) in enumerate(pair_indices(index, size, len(self), self.seed)):
            draws = self._draws(2 * (index * size + place), "pair")
            mirrored, one_head = draws.chance(self.config.mirror), draws.chance(self.config.one_head)
            pairs.append((moving, moving if one_head else fixed, mirrored))
        return pairs

    def _draws(self, number: int, what: str = "image") -> Draws:
        key = (self.seed, number, int(what == "pair"))
        return Draws(key, self.model.grid.shape, self.model.grid.spacing, self.device)

    @torch.no_grad()
    def draw(self, map_index: int, number: int, fixed: bool, mirrored: bool = False) -> Drawn:
        """Image ``number`` of label map ``map_index``; ``fixed`` chooses the shares of a fixed image."""
        draws, config = self._draws(number), self.config
        codes = self.codes[map_index].reshape(-1)
        present = self._presence(draws, fixed)
        coords = self._coords(draws, mirrored)
        lesions: list[Lesion] = []
        if draws.chance(config.fixed_tumor if fixed else config.moving_tumor):
            before = self._anatomy(codes, coords, mirrored, samples=False)
            plans = plan_lesions(before.classes, before.structures, config, draws)
            spacing = torch.tensor(self.model.grid.spacing, device=self.device).view(3, 1, 1, 1)
            for plan in plans:
                push = mass_effect(plan, draws)
                if push is not None:
                    coords += push * (self.factor / spacing) * self._signs(mirrored)
            anatomy = self._anatomy(codes, coords, mirrored)
            brain = anatomy.brain
            lesions = [grow(plan, anatomy.classes, anatomy.structures, brain, draws) for plan in plans]
        else:
            anatomy = self._anatomy(codes, coords, mirrored)
        channels = [c for c, there in zip(self.model.channels, present.tolist(), strict=True) if there]
        rendered, visible = render(anatomy, lesions, channels, config, draws)
        image = torch.zeros(len(present), *self.model.grid.shape, device=self.device)
        image[present.bool().to(self.device)] = rendered
        structures, tumor = anatomy.structures, torch.zeros(self.model.grid.shape, dtype=torch.int64)
        tumor = tumor.to(self.device)
        table = torch.tensor(SEGMENTATION, device=self.device)
        for lesion in lesions:
            tumor = torch.where((lesion.edema > 0.5) & (tumor == 0), 2, tumor)
        for lesion in lesions:
            tumor = torch.where(lesion.parts >= 0, table[lesion.parts.clamp(min=0)], tumor)
            structures = torch.where(lesion.parts >= 0, 0, structures)
        tumor = tumor * visible
        return Drawn(image[None], present[None].to(self.device), tumor[None], structures[None])

    def _coords(self, draws: Draws, mirrored: bool) -> Tensor:
        """(3,X,Y,Z): where in a map, in its own voxels, each voxel of the drawn image lies."""
        config, shape, spacing = self.config, self.model.grid.shape, self.model.grid.spacing
        axes = [(torch.arange(n, device=self.device) - (n - 1) / 2.0) * s for n, s in zip(shape, spacing, strict=True)]
        points = torch.stack(torch.meshgrid(*axes, indexing="ij"))
        angles = (draws.uniforms(3) * 2 - 1) * math.radians(config.rotation_deg)
        stretch = 1 + (draws.uniforms(3) * 2 - 1) * config.scale
        shift = (draws.uniforms(3) * 2 - 1) * config.shift_mm
        skew = torch.zeros(3, 3, device=self.device)
        skew[0, 1], skew[0, 2], skew[1, 2] = -angles[2], angles[1], -angles[0]
        linear = torch.linalg.matrix_exp(skew - skew.T) @ torch.diag(stretch)
        moved = torch.einsum("ij,jxyz->ixyz", linear, points) + shift.view(3, 1, 1, 1)
        moved += draws.uniform(0.2, 1.0) * config.deformation_mm * draws.smooth(3, config.control_mm)
        moved += draws.uniform(0.0, 1.0) * config.fine_deformation_mm * draws.smooth(3, config.control_mm / 2.0)
        moved *= self._signs(mirrored)
        for axis in range(3):
            n = shape[axis] * self.factor
            moved[axis] = moved[axis] * (self.factor / spacing[axis]) + (n - 1) / 2.0
        return moved

    def _signs(self, mirrored: bool) -> Tensor:
        """(3,1,1,1): -1 along the axis from left to right in a mirrored image."""
        signs = torch.ones(3, 1, 1, 1, device=self.device)
        if mirrored:
            signs[self.model.grid.axis_along("LR")] = -1.0
        return signs

    def _anatomy(self, codes: Tensor, coords: Tensor, mirrored: bool, samples: bool = True) -> Anatomy:
        """The map at ``coords``; ``samples`` also takes the points inside each voxel."""
        table = self._mirror if mirrored else None
        middle = self._at(codes, coords, (0.0, 0.0, 0.0), table)
        structures = middle % (len(STRUCTURES) + 1)
        classes = torch.div(middle, len(STRUCTURES) + 1, rounding_mode="floor").to(torch.uint8)
        inner = [self._at(codes, coords, offset, table) for offset in _SAMPLES] if samples else []
        return Anatomy(classes, structures.to(torch.uint8), [middle, *inner])

    def _at(self, codes: Tensor, coords: Tensor, offset: tuple[float, float, float], table: Tensor | None) -> Tensor:
        """Codes of the map's voxels nearest to ``coords`` plus ``offset`` of the grid's voxel, (X,Y,Z)."""
        flat = torch.zeros(coords.shape[1:], dtype=torch.int32, device=self.device)
        for axis, n in enumerate(self.model.grid.shape):
            limit = n * self.factor
            index = (coords[axis] + offset[axis] * self.factor).round_().clamp_(0, limit - 1)
            flat = flat.mul_(limit).add_(index.int())
        found = codes[flat.reshape(-1)].reshape(flat.shape)
        return found if table is None else table[found.int()]

    def _presence(self, draws: Draws, fixed: bool) -> Tensor:
        """(C,) 1 or 0: the first channel alone, T1ce and FLAIR, or all but a few; always at least one."""
        config, channels, n = self.config, self.model.channels, len(self.model.channels)
        alone = config.single_modality_fixed if fixed else config.single_modality_moving
        optional = [c in self.model.optional_channels for c in channels]
        chosen = draws.uniform()
        if chosen < alone:
            # Nearly always the first: the one that brains are registered by.
            only = 0 if draws.chance(0.8) else int(draws.uniform(0.0, n - 1e-6))
            kept = [index == only or not optional[index] for index in range(n)]
        elif chosen < alone + config.two_modalities and {"t1ce", "flair"} <= set(channels):
            kept = [c in ("t1ce", "flair") or not o for c, o in zip(channels, optional, strict=True)]
        else:
            kept = [not (draws.chance(config.drop_channel) and o) for o in optional]
        if not any(kept):
            kept[int(draws.uniform(0.0, n - 1e-6))] = True
        return torch.tensor(kept, dtype=torch.float32)


def _mirror_table() -> Tensor:
    """Joint code of each joint code with left and right exchanged, int16."""
    other = torch.from_numpy(mirrored_structures()).long()
    codes = torch.arange(len(DRAWN_CLASSES) * len(other))
    structure = codes % len(other)
    return (codes - structure + other[structure]).short()
