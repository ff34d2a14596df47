"""A trained network with more channels that computes the same, to go on from: Net2WiderNet.

Chen et al. 2016, "Net2Net: Accelerating Learning via Knowledge Transfer" (arXiv 1511.05641). Every channel appears
several times, and what leaves it is split between its copies; split at random, so that training parts them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from jrs.architecture import LEVELS, Architecture
from jrs.errors import ConfigurationError

_SMALLEST_SHARE = 0.2
_NAME = re.compile(r"(\w+)(?:\.(input|output|levels|ups|downs))?(?:\.(\d+))?(?:\.(convs|norms)\.(\d+))?\.\w+")


def can_widen(old: Architecture, new: Architecture) -> bool:
    """Whether ``new`` is ``old`` with as many or more channels at every level."""
    same = {name for name in vars(old) if name not in ("base_channels", "level_channels", "deep_supervision")}
    return all(getattr(old, name) == getattr(new, name) for name in same) and all(
        b >= a for a, b in zip(old.widths, new.widths, strict=True)
    )


def widen(weights: Mapping[str, Tensor], old: Architecture, new: Architecture, seed: int = 0) -> dict[str, Tensor]:
    """The weights of ``new`` that compute what ``weights`` of ``old`` do; raises ConfigurationError if it cannot be."""
    if not can_widen(old, new):
        raise ConfigurationError(f"channels {old.widths} cannot be widened to {new.widths}")
    generator = torch.Generator().manual_seed(seed)
    # Of which channel of the old network each channel of a level is a copy.
    levels = [torch.arange(b) * a // b for a, b in zip(old.widths, new.widths, strict=True)]
    wide = {}
    for name, value in weights.items():
        inputs, outputs = _spaces(name, levels, old)
        if value.ndim == 1:
            wide[name] = value if outputs is None else value[outputs]
            continue
        # A transposed convolution has its inputs first.
        value = value.transpose(0, 1) if ".ups." in name else value
        value = value if outputs is None else value[outputs]
        value = value if inputs is None else _split(value, inputs, generator)
        wide[name] = (value.transpose(0, 1) if ".ups." in name else value).contiguous()
    return wide


def _spaces(name: str, levels: list[Tensor], old: Architecture) -> tuple[Tensor | None, Tensor | None]:
    """Copies among a weight's inputs and outputs; None where the network's own inputs and outputs are."""
    match = _NAME.fullmatch(name)
    assert match is not None, name
    part, kind, number, convolutions, place = match.groups()
    k = int(number or 0)
    if part == "auxiliary":
        return levels[k + 1], None
    if kind == "input":
        return None, levels[0]
    if kind == "output":
        return levels[0], None
    if kind == "downs":
        return levels[k], levels[k + 1]
    both = part == "registration" and old.merge == "concatenate"
    if kind == "ups":
        return _joined(levels[-1:] * (1 + both)) if k == LEVELS - 2 else levels[k + 1], levels[k]
    if part == "encoder" or convolutions == "norms" or int(place) > 0:
        return levels[k], levels[k]
    return _joined([levels[k]] * (2 + both)), levels[k]


def _joined(parts: list[Tensor]) -> Tensor:
    offsets = [0]
    for part in parts:
        offsets.append(offsets[-1] + int(part.max()) + 1)
    return torch.cat([part + offset for part, offset in zip(parts, offsets, strict=False)])


def _split(value: Tensor, copies: Tensor, generator: torch.Generator) -> Tensor:
    """(O,I,...) to (O,len(copies),...): each input's weights shared out among its copies, the shares adding up to 1."""
    share = torch.rand(value.shape[0], len(copies), generator=generator) + _SMALLEST_SHARE
    total = torch.zeros(value.shape[0], value.shape[1]).index_add_(1, copies, share)
    share = share / total[:, copies]
    return value[:, copies] * share.view(*share.shape, *[1] * (value.ndim - 2)).to(value.dtype)
