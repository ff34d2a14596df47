"""Tumours drawn into a brain: where they grow, what they are made of, how they push."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from jrs.structures import STRUCTURES, TISSUES
from jrs.train.config import SynthesisConfig
from jrs.train.draws import Draws

# What a lesion is made of; the values index ``jrs.train.appearance.LESION_MEANS``.
PARTS = ("necrosis", "edema", "enhancing", "nonenhancing", "cavity")
NECROSIS, EDEMA, ENHANCING, NONENHANCING, CAVITY = range(len(PARTS))
SEGMENTATION = (1, 2, 3, 1, 0)
"""Class of the segmentation for each part: 1 necrotic or non-enhancing core, 2 oedema, 3 enhancing, 0 none."""

Kind = Literal["ring", "solid", "nonenhancing", "mixed", "cavity"]
_SHARES: dict[Kind, float] = {"ring": 0.44, "solid": 0.08, "nonenhancing": 0.28, "mixed": 0.14, "cavity": 0.06}

_WHITE, _CSF = TISSUES.index("white_matter"), TISSUES.index("csf")
_CEREBRAL_WHITE = tuple(1 + list(STRUCTURES).index(f"{side}_cerebral_white_matter") for side in ("left", "right"))
_VENTRICLES = tuple(
    1 + list(STRUCTURES).index(name)
    for name in ("left_lateral_ventricle", "right_lateral_ventricle", "third_ventricle")
)


@dataclass(frozen=True)
class Plan:
    """Where a lesion grows, before the anatomy around it is known: ``center`` in voxels, lengths in mm.

    ``push`` is the share of the radius by which the surroundings are moved away.
    """

    center: tuple[int, int, int]
    radius: float
    kind: Kind
    push: float


@dataclass(frozen=True)
class Lesion:
    """One lesion on the grid.

    ``edema`` (X,Y,Z) in [0, 1] is the weight of oedema, 0.5 at its border; ``parts`` (X,Y,Z) int64 the index in
    ``PARTS`` of each voxel of the core, -1 outside.
    """

    edema: Tensor
    parts: Tensor


def plan_lesions(classes: Tensor, structures: Tensor, config: SynthesisConfig, draws: Draws) -> list[Plan]:
    """One lesion in most images, up to three in some; centres in the white matter of the cerebrum.

    ``classes`` and ``structures`` (X,Y,Z) are those of the anatomy without a tumour. None fits where there is no
    white matter.
    """
    white = classes == _WHITE
    cerebral = white & ((structures == _CEREBRAL_WHITE[0]) | (structures == _CEREBRAL_WHITE[1]))
    candidates = torch.nonzero((cerebral if bool(cerebral.any()) else white).reshape(-1))[:, 0]
    if candidates.numel() == 0:
        return []
    shape, plans = draws.shape, []
    count = 1 if draws.chance(0.84) else (2 if draws.chance(0.7) else 3)
    for index in range(count):
        chosen = int(candidates[int(draws.uniform() * (candidates.numel() - 1))])
        center = (chosen // (shape[1] * shape[2]), chosen // shape[2] % shape[1], chosen % shape[2])
        # Equal shares of small and large ones on a logarithmic scale; further lesions are smaller.
        radius = 5.0 * (27.0 / 5.0) ** draws.uniform() * (1.0 if index == 0 else 0.6)
        pick, kind = draws.uniform(), list(_SHARES)[-1]
        for name, share in _SHARES.items():
            if pick < share:
                kind = name
                break
            pick -= share
        push = draws.uniform(0.0, config.mass_effect) if draws.chance(0.7) and kind != "cavity" else 0.0
        plans.append(Plan(center, max(radius, 3.0), kind, push))
    return plans


def mass_effect(plan: Plan, draws: Draws) -> Tensor | None:
    """Displacement (3,X,Y,Z) mm that shows the surroundings pushed outwards, to add to the sampling points.

    What lay at distance r0 from the centre is seen at r = r0 + p R exp(-((r - R) / L)^2 / 2) beyond the radius R,
    and the tissue inside is spread over it: r0 = (1 - p) r.
    """
    if plan.push <= 0.0:
        return None
    axes = _offsets(plan.center, draws)
    squares = axes[0].square()[:, None, None] + axes[1].square()[None, :, None] + axes[2].square()[None, None, :]
    r = squares.sqrt().clamp(min=1e-3)
    length = max(8.0, draws.uniform(0.6, 1.4) * plan.radius)
    amount = min(plan.push * plan.radius, 9.0)
    shift = amount * torch.exp(-0.5 * ((r - plan.radius).clamp(min=0.0) / length).square())
    shift = torch.where(r < plan.radius, amount * r / plan.radius, shift) / r
    return -torch.stack(
        [shift * axes[0][:, None, None], shift * axes[1][None, :, None], shift * axes[2][None, None, :]]
    )


def grow(plan: Plan, classes: Tensor, structures: Tensor, brain: Tensor, draws: Draws) -> Lesion:
    """Draw one lesion into the anatomy: irregular, its oedema following white matter and never in CSF.

    ``classes``, ``structures`` (X,Y,Z) and ``brain`` (bool) are of the deformed anatomy.
    """
    distance = _rough_distance(plan, draws)
    radius, brain_or_pressed = plan.radius, brain & ((classes != _CSF) | (distance < 0.8 * plan.radius))
    for ventricle in _VENTRICLES:
        # A core may reach into a sulcus; into a ventricle it grows less.
        brain_or_pressed &= (structures != ventricle) | (distance < 0.5 * radius)
    little = {"ring": 0.1, "solid": 0.1, "nonenhancing": 0.55, "mixed": 0.3, "cavity": 0.4}[plan.kind]
    reach = radius + (draws.uniform(0.5, 3.0) if draws.chance(little) else draws.uniform(3.0, 24.0))
    # Oedema spreads further in white matter than in grey, along fingers, and stops at CSF.
    fingers = 1.0 + draws.uniform(0.0, 0.5) * draws.smooth(1, 14.0)[0]
    grey = draws.uniform(0.15, 0.5)
    edge = torch.where(classes == _WHITE, radius + (reach - radius) * fingers, radius + grey * (reach - radius))
    softness = draws.uniform(0.6, 2.5)
    allowed = brain & ((classes != _CSF) | (distance < 0.8 * radius))
    edema = torch.sigmoid((edge - distance) / softness) * allowed
    core = (distance < radius) & brain_or_pressed
    inside = _core(plan, distance, draws)
    parts = torch.where(core, inside, -1)
    return Lesion(edema, parts)


def _offsets(center: tuple[int, int, int], draws: Draws) -> list[Tensor]:
    """Millimetres from the centre along each axis."""
    return [
        (torch.arange(n, device=draws.device) - c) * s
        for n, c, s in zip(draws.shape, center, draws.spacing, strict=True)
    ]


def _rough_distance(plan: Plan, draws: Draws) -> Tensor:
    """Millimetres from the centre (X,Y,Z), stretched along the axes and roughened on two scales."""
    squares = [(offset / draws.uniform(0.7, 1.4)).square() for offset in _offsets(plan.center, draws)]
    distance = (squares[0][:, None, None] + squares[1][None, :, None] + squares[2][None, None, :]).sqrt()
    rough = 1.0 + draws.uniform(0.1, 0.35) * draws.smooth(1, max(10.0, 1.1 * plan.radius))[0]
    rough = rough + draws.uniform(0.03, 0.16) * draws.smooth(1, 9.0)[0]
    return distance * rough.clamp_(min=0.3)


def _core(plan: Plan, distance: Tensor, draws: Draws) -> Tensor:
    """Part of each voxel, (X,Y,Z) int64, as if the core were everywhere."""
    if plan.kind == "ring":
        rim = min(draws.uniform(1.5, 8.0), 0.7 * plan.radius)
        wall = rim * (1.0 + draws.uniform(0.2, 0.7) * draws.smooth(1, 12.0)[0])
        inside = torch.where(distance < plan.radius - wall, NECROSIS, ENHANCING)
        if draws.chance(0.3):
            # Part of the wall does not enhance.
            inside = torch.where((draws.smooth(1, 22.0)[0] > 0.6) & (inside == ENHANCING), NONENHANCING, inside)
        return inside
    if plan.kind == "mixed":
        patches = draws.smooth(1, 10.0)[0]
        return torch.where(patches > 0.4, ENHANCING, torch.where(patches < -0.8, NECROSIS, NONENHANCING))
    if plan.kind == "cavity":
        rim = draws.uniform(1.0, 3.0) if draws.chance(0.4) else 0.0
        return torch.where(distance < plan.radius - rim, CAVITY, ENHANCING)
    whole = ENHANCING if plan.kind == "solid" else NONENHANCING
    inside = torch.full_like(distance, whole, dtype=torch.int64)
    if draws.chance(0.3):
        inside = torch.where(draws.smooth(1, 9.0)[0] > 1.2, NECROSIS, inside)
    return inside
