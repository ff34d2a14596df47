"""Random numbers for drawing images: a function of (seed, number) alone, on the device that trains."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


class Draws:
    """One image's stream of random numbers.

    Single numbers come from a generator on the CPU, so that a GPU need not be waited for; fields from one on
    ``device``. ``shape`` and ``spacing`` (mm) are those of the grid that fields are drawn on.
    """

    def __init__(
        self,
        seed: Sequence[int],
        shape: tuple[int, int, int],
        spacing: tuple[float, float, float],
        device: torch.device,
    ) -> None:
        # PyTorch's CPU generator keeps 32 bits of a seed, so all numbers are mixed into as many.
        state = np.random.SeedSequence(list(seed)).generate_state(2)
        self.shape, self.spacing, self.device = shape, spacing, device
        self._scalars = torch.Generator().manual_seed(int(state[0]))
        self._fields = torch.Generator(device).manual_seed(int(state[1]))

    def uniform(self, low: float = 0.0, high: float = 1.0) -> float:
        """A number between ``low`` and ``high``."""
        return low + (high - low) * float(torch.rand((), generator=self._scalars))

    def chance(self, probability: float) -> bool:
        """True in a share ``probability`` of the calls."""
        return self.uniform() < probability

    def normals(self, *shape: int) -> Tensor:
        """Standard normal numbers, a small tensor on the device."""
        return torch.randn(*shape, generator=self._scalars).to(self.device)

    def uniforms(self, *shape: int) -> Tensor:
        """Numbers between 0 and 1, a small tensor on the device."""
        return torch.rand(*shape, generator=self._scalars).to(self.device)

    def noise(self, *shape: int) -> Tensor:
        """White standard normal noise, drawn on the device."""
        return torch.randn(*shape, generator=self._fields, device=self.device)

    def smooth(self, channels: int, scale_mm: float) -> Tensor:
        """(channels,X,Y,Z) noise of unit variance at its control points, which lie ``scale_mm`` apart."""
        coarse = [max(2, math.ceil(n * s / scale_mm) + 1) for n, s in zip(self.shape, self.spacing, strict=True)]
        field = self.noise(channels, *coarse)
        # Linear interpolation as one small product an axis: several times faster than a point at a time on a CPU.
        x, y, z = (self._weights(n, c) for n, c in zip(self.shape, coarse, strict=True))
        field = torch.matmul(field, z.T)
        field = torch.matmul(y, field)
        return torch.matmul(x, field.flatten(2)).reshape(channels, *self.shape)

    def _weights(self, fine: int, coarse: int) -> Tensor:
        """(fine,coarse): linear interpolation between control points, the outermost on the grid's ends."""
        position = torch.linspace(0.0, coarse - 1.0, fine, device=self.device)
        return (1.0 - (position[:, None] - torch.arange(coarse, device=self.device)).abs()).clamp_(min=0.0)
