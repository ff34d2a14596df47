"""Random numbers for synthesis: reproducible, and fields of the stated smoothness."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional

from jrs.train.draws import Draws

SHAPE, SPACING = (20, 24, 16), (2.0, 1.5, 3.0)
CPU = torch.device("cpu")


def draws(*key: int) -> Draws:
    return Draws(key, SHAPE, SPACING, CPU)


def test_a_stream_is_a_function_of_its_key() -> None:
    def numbers(stream: Draws) -> list[float]:
        return [stream.uniform(), float(stream.normals(1)), float(stream.noise(1)), float(stream.smooth(1, 9.0).sum())]

    assert numbers(draws(3, 1)) == numbers(draws(3, 1))
    assert numbers(draws(3, 1)) != numbers(draws(3, 2))
    # 32 bits are all that PyTorch keeps of a seed: keys that differ above them still differ.
    assert numbers(draws(3, 1)) != numbers(draws(3 + 2**33, 1))


def test_numbers_keep_to_their_range() -> None:
    stream = draws(1)
    values = [stream.uniform(2.0, 5.0) for _ in range(400)]
    assert 2.0 <= min(values) < 2.1 and 4.9 < max(values) <= 5.0
    assert 60 < sum(stream.chance(0.25) for _ in range(400)) < 140


@pytest.mark.parametrize("scale", [5.0, 12.0, 200.0])
def test_smooth_noise_is_torchs_trilinear_interpolation_of_its_control_points(scale: float) -> None:
    coarse = [max(2, int(np.ceil(n * s / scale)) + 1) for n, s in zip(SHAPE, SPACING, strict=True)]
    control = draws(7).noise(2, *coarse)
    expected = functional.interpolate(control[None], size=SHAPE, mode="trilinear", align_corners=True)[0]
    assert torch.allclose(draws(7).smooth(2, scale), expected, atol=1e-5)
