"""What a scanner makes of an anatomy: class means of a contrast, texture, artefacts, skull-stripping, normalisation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from jrs.structures import DRAWN_CLASSES, STRUCTURES, TISSUES
from jrs.train.config import SynthesisConfig
from jrs.train.draws import Draws
from jrs.train.lesions import ENHANCING, PARTS, Lesion

# Mean of each tissue (background first) relative to white matter in T1. T1 was read off two real brains, the
# others off one and the literature's order of brightness.
_TISSUE_MEANS = {
    "t1": (0.0, 1.00, 0.72, 0.82, 0.30, 0.70, 0.92),
    "t1ce": (0.0, 1.00, 0.74, 0.84, 0.32, 0.73, 0.94),
    "t2": (0.0, 0.50, 0.66, 0.56, 1.35, 0.66, 0.52),
    "flair": (0.0, 0.58, 0.72, 0.66, 0.20, 0.72, 0.62),
}
# Of the parts of a lesion: necrosis, oedema, enhancing, non-enhancing, cavity.
LESION_MEANS = {
    "t1": (0.45, 0.74, 0.72, 0.52, 0.32),
    "t1ce": (0.45, 0.74, 1.60, 0.52, 0.34),
    "t2": (1.15, 0.95, 0.88, 1.05, 1.35),
    "flair": (0.75, 1.05, 0.95, 0.95, 0.32),
}
# Structures that differ from their tissue, as a factor on it: in T1 and T1ce, in T2 and FLAIR.
_STRUCTURE_FACTORS = {
    "thalamus": (1.10, 0.96),
    "caudate": (0.95, 1.04),
    "putamen": (1.05, 0.95),
    "pallidum": (1.19, 0.78),
    "hippocampus": (0.91, 1.15),
    "amygdala": (0.93, 1.15),
    "accumbens": (0.92, 1.05),
    "ventral_diencephalon": (1.13, 0.90),
    "cerebellar_white_matter": (0.93, 1.03),
    "third_ventricle": (1.2, 0.95),
}
_WHITE, _CSF = TISSUES.index("white_matter"), TISSUES.index("csf")
_CHOROID_PLEXUS = DRAWN_CLASSES.index("choroid_plexus")
_OUTER_CSF = 1 + list(STRUCTURES).index("csf")
_CORTEX = (TISSUES.index("cortex"), 1 + list(STRUCTURES).index("left_cerebral_cortex"))
_VENTRICLES = tuple(1 + list(STRUCTURES).index(f"{side}_lateral_ventricle") for side in ("left", "right"))


@dataclass(frozen=True)
class Anatomy:
    """A deformed label map on the grid, before any image.

    ``classes`` (X,Y,Z) index ``DRAWN_CLASSES``, ``structures`` (X,Y,Z) are 0 or 1..30; ``samples`` are the joint
    codes ``class * (structures + 1) + structure`` at several points inside each voxel, each (X,Y,Z): their mean
    intensity is the voxel's partial volume.
    """

    classes: Tensor
    structures: Tensor
    samples: Sequence[Tensor]

    @property
    def brain(self) -> Tensor:
        """Voxels of the brain and its fluid (X,Y,Z)."""
        return (self.classes > 0) & (self.classes <= _CHOROID_PLEXUS)


def joint_codes(classes: Tensor, structures: Tensor) -> Tensor:
    """``class * (structures + 1) + structure``, int16."""
    return classes.short() * (len(STRUCTURES) + 1) + structures.short()


def render(
    anatomy: Anatomy, lesions: Sequence[Lesion], channels: Sequence[str], config: SynthesisConfig, draws: Draws
) -> tuple[Tensor, Tensor]:
    """Draw the ``channels`` of an anatomy: (C,X,Y,Z), each of mean 0 and deviation 1 over its foreground, 0 outside.

    Also returns what skull-stripping and the field of view left to be seen, (X,Y,Z) bool.
    """
    table, contrast = _class_means(channels, config, draws)
    rows = torch.zeros(anatomy.classes.numel(), len(channels), device=draws.device)
    for sample in anatomy.samples:
        rows += table[sample.reshape(-1).int()]
    image = (rows / len(anatomy.samples)).T.reshape(len(channels), *draws.shape).contiguous()
    mask = strip(anatomy, config, draws)
    _membranes(image, anatomy, table, config, draws)
    _hyperintensities(image, anatomy, channels, config, draws)
    _contrast_agent(image, anatomy, mask, channels, config, draws)
    for lesion in lesions:
        image = _paint(image, lesion, channels, contrast, config, draws)
    strength = draws.uniforms(len(channels), 2) * config.texture
    image *= 1 + torch.einsum("ck,kxyz->cxyz", strength, draws.smooth(2, 7.0))
    image = _resolution(image, config, draws)
    image *= torch.exp(draws.smooth(len(channels), 70.0) * draws.uniform(0.0, config.bias))
    if config.gamma:
        power = 1 + (draws.uniforms(len(channels), 1, 1, 1) * 2 - 1) * config.gamma
        image = image.clamp_(min=0).pow_(power)
    if config.noise:
        level = draws.uniforms(len(channels), 1, 1, 1) * config.noise
        image += level * draws.noise(*image.shape)
    mask = _field_of_view(mask, config, draws)
    return torch.stack([_normalized(channel, mask) for channel in image]), mask


def strip(anatomy: Anatomy, config: SynthesisConfig, draws: Draws) -> Tensor:
    """The foreground (X,Y,Z): the brain as a skull-stripping tool would leave it, or the whole head in a few.

    The rim of fluid around the brain is left on more or less of, here and there with what lies outside, here and
    there without the outermost cortex.
    """
    if draws.chance(config.with_skull):
        return anatomy.classes > 0
    if config.stripping <= 0.0:
        return anatomy.brain
    solid = (anatomy.brain & (anatomy.structures != _OUTER_CSF)).float()
    near = _blurred_mask(solid, 2.0)
    level = draws.uniform(0.5 - 0.45 * config.stripping, 0.5 + 0.02 * config.stripping)
    wander = draws.uniform(0.0, 0.16) * config.stripping * draws.smooth(1, 24.0)[0]
    return near > (level + wander).clamp_(0.03, 0.62)


def _blurred_mask(mask: Tensor, deviation: float) -> Tensor:
    """(X,Y,Z) in [0, 1], 0.5 on the surface; ``deviation`` in voxels. At half resolution, where it is cheap."""
    half = functional.avg_pool3d(mask[None, None].float(), 2, ceil_mode=True)[0]
    # Each pass has a variance of half a voxel of the coarse grid, which is two of the fine one squared.
    for _ in range(max(1, round(deviation**2 / 2.0))):
        half = diffuse(half, torch.full((1,), 0.25, device=mask.device))
    return functional.interpolate(half[None], size=mask.shape, mode="trilinear", align_corners=False)[0, 0]


def diffuse(image: Tensor, weight: Tensor) -> Tensor:
    """The taps (w, 1-2w, w) along each axis of (C,X,Y,Z), the border repeated; ``weight`` (C,) is w."""
    image, w = image.clone(), weight.view(-1, 1, 1, 1)
    for axis in (1, 2, 3):
        n = image.shape[axis]
        flow = image.diff(dim=axis).mul_(w)
        image.narrow(axis, 0, n - 1).add_(flow)
        image.narrow(axis, 1, n - 1).sub_(flow)
    return image


def _class_means(channels: Sequence[str], config: SynthesisConfig, draws: Draws) -> tuple[Tensor, Tensor]:
    """A table (joint codes, C) of intensities, and each channel's contrast (C,1) about its white matter."""
    count = len(channels)
    base = torch.zeros(count, len(DRAWN_CLASSES), device=draws.device)
    known = torch.tensor([_TISSUE_MEANS.get(c, _TISSUE_MEANS["t1"]) for c in channels], device=draws.device)
    contrast = 1.0 + (draws.uniforms(count, 1) - 0.6) * config.contrast
    white = known[:, _WHITE : _WHITE + 1]
    base[:, : len(TISSUES)] = white + contrast * (known - white)
    base[:, 0] = 0.0
    base[:, _CHOROID_PLEXUS] = 0.5 * (base[:, _CSF] + base[:, _WHITE])
    # Skin, fat, bone and eyes can look like anything.
    base[:, _CHOROID_PLEXUS + 1 :] = 1.3 * draws.uniforms(count, len(DRAWN_CLASSES) - _CHOROID_PLEXUS - 1)
    base *= (1 + config.jitter * draws.normals(*base.shape)).clamp_(0.5, 1.6)
    factors = torch.ones(count, len(STRUCTURES) + 1, device=draws.device)
    for index, name in enumerate(STRUCTURES, start=1):
        pair = _STRUCTURE_FACTORS.get(name.removeprefix("left_").removeprefix("right_"))
        if pair is not None:
            factors[:, index] = torch.tensor([pair[c in ("t2", "flair")] for c in channels], device=draws.device)
    factors *= 1 + 0.35 * config.jitter * draws.normals(*factors.shape)
    return (base[:, :, None] * factors[:, None, :]).reshape(count, -1).T.contiguous(), contrast


def _paint(
    image: Tensor, lesion: Lesion, channels: Sequence[str], contrast: Tensor, config: SynthesisConfig, draws: Draws
) -> Tensor:
    """Lay a lesion over the anatomy, its oedema fading into it."""
    means = torch.tensor([LESION_MEANS.get(c, LESION_MEANS["t1"]) for c in channels], device=image.device)
    white = torch.tensor([_TISSUE_MEANS.get(c, _TISSUE_MEANS["t1"])[_WHITE] for c in channels], device=image.device)
    means = white[:, None] + (0.4 + 0.6 * contrast) * (means - white[:, None])
    means = means * (1 + 2.0 * config.jitter * draws.normals(len(channels), len(PARTS))).clamp_(0.55, 1.6)
    if "t1ce" in channels:
        means[list(channels).index("t1ce"), ENHANCING] = draws.uniform(1.12, 2.2)
    fill = means[:, PARTS.index("edema")].view(-1, 1, 1, 1)
    cloudy = 1 + draws.uniform(0.0, 0.12) * draws.smooth(1, 11.0)
    image = torch.lerp(image, fill * cloudy, draws.uniform(0.7, 1.0) * lesion.edema)
    patchy = 1 + draws.uniform(0.0, 0.15) * draws.smooth(1, 8.0).reshape(-1)
    core = torch.nonzero(lesion.parts.reshape(-1) >= 0)[:, 0]
    image.view(len(channels), -1)[:, core] = means[:, lesion.parts.reshape(-1)[core]] * patchy[core]
    return image


def _membranes(image: Tensor, anatomy: Anatomy, table: Tensor, config: SynthesisConfig, draws: Draws) -> None:
    """Dura, falx and venous sinuses in the fluid around the brain: any grey from fluid to cortex, in patches. In place.

    Label maps call all of it fluid; skull-stripping leaves it on, most of all between the hemispheres and behind.
    """
    if not draws.chance(config.membranes):
        return
    patches = torch.sigmoid((draws.smooth(1, 18.0)[0] - draws.uniform(-1.0, 1.2)) * 5.0)
    patches = patches * (anatomy.structures == _OUTER_CSF)
    fluid, cortex = (table[tissue * (len(STRUCTURES) + 1) + at] for tissue, at in ((_CSF, _OUTER_CSF), _CORTEX))
    level = fluid + (0.2 + draws.uniforms(image.shape[0])) * (cortex - fluid)
    image.lerp_(level.view(-1, 1, 1, 1), patches.expand_as(image))


def _hyperintensities(
    image: Tensor, anatomy: Anatomy, channels: Sequence[str], config: SynthesisConfig, draws: Draws
) -> None:
    """Bright caps of the ventricles and spots in white matter, as ageing brains have them: not a tumour. In place."""
    if not draws.chance(config.hyperintensities):
        return
    ventricles = (anatomy.structures == _VENTRICLES[0]) | (anatomy.structures == _VENTRICLES[1])
    caps = (_blurred_mask(ventricles, 1.5) * draws.uniform(1.0, 4.0)).clamp_(max=1.0)
    spots = torch.sigmoid((draws.smooth(1, 9.0)[0] - draws.uniform(1.6, 2.6)) * 6.0)
    amount = (draws.uniform(0.0, 0.7) * caps + draws.uniform(0.0, 0.5) * spots) * (anatomy.classes == _WHITE)
    for index, channel in enumerate(channels):
        gain = {"flair": 1.0, "t2": 0.7}.get(channel, -0.25)
        image[index] *= 1 + gain * amount


def _contrast_agent(
    image: Tensor, anatomy: Anatomy, mask: Tensor, channels: Sequence[str], config: SynthesisConfig, draws: Draws
) -> None:
    """Vessels, meninges and choroid plexus take up contrast agent too: bright in T1ce, not a tumour. In place."""
    if "t1ce" not in channels or not draws.chance(config.vessels):
        return
    index = list(channels).index("t1ce")
    outside = (anatomy.classes == _CSF) | (anatomy.classes > _CHOROID_PLEXUS)
    # Where two smooth fields are both near zero lies a curve: a vessel.
    fields = draws.smooth(2, 16.0)
    width = draws.uniform(0.06, 0.16)
    vessels = (fields[0].abs() < width) & (fields[1].abs() < width) & (anatomy.classes != _WHITE)
    edge = 1.0 - _blurred_mask(mask, 1.5)
    meninges = (edge > 0.35) & outside & (draws.smooth(1, 30.0)[0] > draws.uniform(-0.3, 1.2))
    bright = draws.uniform(1.0, 2.2)
    image[index] = torch.where((vessels & anatomy.brain) | meninges, bright, image[index])
    image[index] = torch.where(
        anatomy.classes == _CHOROID_PLEXUS, image[index] * draws.uniform(1.0, 2.2), image[index]
    )


def _resolution(image: Tensor, config: SynthesisConfig, draws: Draws) -> Tensor:
    """(C,X,Y,Z) blurred a little, some channels seen through slices thicker than the grid along one axis."""
    image = diffuse(image, draws.uniforms(image.shape[0]) * config.blur)
    for index in range(image.shape[0]):
        if not draws.chance(config.thick_slices):
            continue
        axis = int(draws.uniform(0.0, 2.999))
        thickness = draws.uniform(1.3, max(1.4, config.slice_mm / draws.spacing[axis]))
        size = list(draws.shape)
        size[axis] = max(2, round(size[axis] / thickness))
        thin = functional.interpolate(image[index][None, None], size=size, mode="area")
        thick = functional.interpolate(thin, size=draws.shape, mode="trilinear", align_corners=False)
        image[index] = thick[0, 0]
    return image


def _field_of_view(mask: Tensor, config: SynthesisConfig, draws: Draws) -> Tensor:
    """The foreground, cut off at one end in some images."""
    if not draws.chance(config.cropped):
        return mask
    axis = int(draws.uniform(0.0, 2.999))
    others = tuple(a for a in range(3) if a != axis)
    lines = torch.nonzero(mask.sum(dim=others))[:, 0]
    if lines.numel() < 4:
        return mask
    cut = int(draws.uniform(1.0, 25.0) / draws.spacing[axis])
    first, last = int(lines[0]), int(lines[-1])
    keep = torch.zeros(mask.shape[axis], dtype=torch.bool, device=mask.device)
    start, stop = (first + cut, last + 1) if draws.chance(0.5) else (first, last + 1 - cut)
    keep[start : max(stop, start + 2)] = True
    shape = [1, 1, 1]
    shape[axis] = -1
    return mask & keep.view(shape)


def _normalized(image: Tensor, mask: Tensor) -> Tensor:
    """As ``jrs.runtime.preprocess.normalize`` does it: foreground above a hundredth of the bright end, z-score."""
    step = max(1, image.numel() // 40_000)
    positive = image.reshape(-1)[::step][mask.reshape(-1)[::step]]
    positive = positive[positive > 0]
    if positive.numel() < 10:
        return torch.zeros_like(image)
    foreground = (mask & (image > 0.01 * torch.quantile(positive, 0.98))).float()
    count = foreground.sum().clamp(min=1.0)
    centred = (image - (image * foreground).sum() / count) * foreground
    return centred / (centred.square().sum() / count).sqrt().clamp(min=1e-3)
