"""The custom operator ``torch.ops.jrs.grid_sample_3d``: trilinear sampling at absolute voxel indices.

Its ONNX twin is ``ai.jrs::JrsGridSample3D`` (``jrs.export.custom_op``).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Values of torch's enumerations for grid_sampler: bilinear, border.
_LINEAR, _BORDER = 0, 1


def _scale(coords: Tensor, shape: torch.Size) -> Tensor:
    """Factors (1,3,1,1,1) from voxel indices to torch's units, -1 and 1 at the centres of the border voxels."""
    return torch.tensor([2.0 / max(n - 1, 1) for n in shape[2:]], dtype=coords.dtype, device=coords.device).view(
        1, 3, 1, 1, 1
    )


def _torch_grid(coords: Tensor, volume: Tensor) -> Tensor:
    """Absolute indices (N,3,...) to torch's grid (N,...,3), whose last axis comes first."""
    grid = coords * _scale(coords, volume.shape) - 1.0
    return grid.flip(1).permute(0, 2, 3, 4, 1).to(volume.dtype)


@torch.library.custom_op("jrs::grid_sample_3d", mutates_args=())
def grid_sample_3d(volume: Tensor, coords: Tensor) -> Tensor:
    """Sample ``volume`` (N,C,D,H,W) at ``coords`` (N,3,D',H',W'), giving (N,C,D',H',W').

    ``coords`` are float32 voxel indices, channel i along array axis i. Trilinear; a point outside takes the
    value of the nearest border voxel. Differentiable once, in both arguments.
    """
    sampled = torch.ops.aten.grid_sampler_3d(volume, _torch_grid(coords, volume), _LINEAR, _BORDER, True)
    # An operator has to return memory of its declared layout.
    fresh: Tensor = sampled.contiguous()
    return fresh


@grid_sample_3d.register_fake
def _(volume: Tensor, coords: Tensor) -> Tensor:
    torch._check(volume.dim() == 5 and coords.dim() == 5, lambda: "grid_sample_3d takes 5-D tensors")
    torch._check(coords.shape[1] == 3, lambda: f"coords must have 3 channels, not {coords.shape[1]}")
    return volume.new_empty((volume.shape[0], volume.shape[1], *coords.shape[2:]))


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
    volume, coords = ctx.saved_tensors
    needed = list(ctx.needs_input_grad)
    to_volume, to_grid = torch.ops.aten.grid_sampler_3d_backward(
        gradient, volume, _torch_grid(coords, volume), _LINEAR, _BORDER, True, needed
    )
    if not needed[1]:
        return to_volume, None
    to_coords = to_grid.permute(0, 4, 1, 2, 3).flip(1).to(coords.dtype) * _scale(coords, volume.shape)
    return (to_volume if needed[0] else None), to_coords


grid_sample_3d.register_autograd(_backward, setup_context=_setup_context)
