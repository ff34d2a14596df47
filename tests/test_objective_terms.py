"""The joint loss in both directions, its similarity measures and deep supervision, against the parts it is made of."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from lightning_fabric import Fabric
from scipy.ndimage import map_coordinates
from torch import Tensor

from jrs.architecture import Architecture
from jrs.errors import ConfigurationError
from jrs.models.losses import (
    bending_energy,
    diffusion,
    folding,
    local_ncc,
    masked_mse,
    mutual_information,
    soft_dice,
    tumor_rigidity,
    weighted_cross_entropy,
)
from jrs.models.network import JointNet, JointOutput
from jrs.models.spatial import displacement, identity_coords, warp
from jrs.train.batch import PairBatch
from jrs.train.config import LossConfig
from jrs.train.objective import forward_pair, joint_loss

SHAPE = (16, 32, 16)
NOTHING = LossConfig(similarity=0.0, gradient_l1=0.0, segmentation=0.0)


def network(**choices: Any) -> JointNet:
    """A small network whose field is about a voxel."""
    torch.manual_seed(1)
    net = JointNet(Architecture(**{"in_channels": 2, "base_channels": 2, "head": "displacement", **choices}))
    assert net.registration is not None
    with torch.no_grad():
        net.registration.output.weight.normal_(std=3.0)
        net.registration.output.bias += torch.tensor([0.6, -0.4, 0.3])
    return net


def batch(size: int = 2, seed: int = 0, shape: tuple[int, int, int] = SHAPE) -> PairBatch:
    """Noise with labels in blocks."""
    g = torch.Generator().manual_seed(seed)
    blocks = [n // 4 for n in shape]

    def labels(classes: int, kind: torch.dtype) -> Tensor:
        coarse = torch.randint(0, classes, (size, *blocks), generator=g)
        return coarse.repeat_interleave(4, 1).repeat_interleave(4, 2).repeat_interleave(4, 3).to(kind)

    return PairBatch(
        torch.randn(size, 2, *shape, generator=g),
        torch.randn(size, 2, *shape, generator=g),
        torch.tensor([[1.0, 0.0], [1.0, 1.0]])[:size],
        torch.tensor([[1.0, 1.0], [0.0, 1.0]])[:size],
        labels(4, torch.int64),
        labels(4, torch.int64),
        labels(31, torch.uint8),
        labels(31, torch.uint8),
    )


def generators(seed: int = 0) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed + n) for n in range(2)]


def terms_of(net: JointNet, pairs: PairBatch, config: LossConfig, seed: int = 0) -> dict[str, float]:
    """The mean of each over the pairs."""
    output = forward_pair(net, pairs, config)
    total, terms = joint_loss(net, output, pairs, config, generators(seed))
    means = {name: float(value.mean()) for name, value in terms.items()}
    assert float(total.detach().mean()) == pytest.approx(
        sum(getattr(config, name) * value for name, value in means.items()), rel=1e-5
    )
    return means


def exchanged(pairs: PairBatch) -> PairBatch:
    return PairBatch(
        **{
            name: getattr(pairs, ("fixed" if name.startswith("moving") else "moving") + name[name.find("_") :])
            if "_" in name
            else getattr(pairs, {"moving": "fixed", "fixed": "moving"}[name])
            for name in vars(pairs)
        }
    )


# Similarity -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [True, False])
def test_the_measure_is_the_one_that_was_chosen(masked: bool) -> None:
    net, pairs = network(), batch()
    out = net(pairs.moving, pairs.fixed)
    mask = out.nontumor_mask if masked else None
    both = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    drawing = generators()
    for generator in drawing:
        torch.randperm(30, generator=generator)
    expected = {
        "mse": masked_mse(out.moved, pairs.fixed, mask, both),
        "lncc": local_ncc(out.moved, pairs.fixed, mask, both, window=5, stride=3),
        "mi": mutual_information(out.moved, pairs.fixed, mask, both, bins=8, samples=300, generators=drawing),
    }
    for measure, value in expected.items():
        config = dataclasses.replace(
            NOTHING, similarity=2.0, similarity_measure=measure, masked=masked,
            lncc_window=5, lncc_stride=3, mi_bins=8, mi_samples=300,
        )  # fmt: skip
        assert terms_of(net, pairs, config) == {"similarity": pytest.approx(float(value.detach().mean()), rel=1e-5)}


def test_a_term_of_weight_zero_is_not_computed() -> None:
    assert terms_of(network(), batch(), NOTHING) == {}


def test_regularity() -> None:
    net, pairs = network(), batch()
    field = displacement(net(pairs.moving, pairs.fixed).coords_vox)
    config = dataclasses.replace(NOTHING, diffusion=0.3, bending=0.2, folding=2.0)
    expected = {"diffusion": diffusion(field), "bending": bending_energy(field), "folding": folding(field)}
    got = terms_of(net, pairs, config)
    assert got == {name: pytest.approx(float(value.detach().mean()), rel=1e-5) for name, value in expected.items()}
    assert all(value > 0 for value in got.values())


def test_a_tumour_is_to_move_as_one() -> None:
    """Where the moving image's tumour comes to lie, whatever the fixed image shows; nothing where there is none."""
    net, pairs = network(), batch()
    coords = net(pairs.moving, pairs.fixed).coords_vox
    config = dataclasses.replace(NOTHING, tumor_rigidity=3.0)
    moved = warp((pairs.moving_tumor > 0).unsqueeze(1).float(), coords)
    expected = float(tumor_rigidity(displacement(coords), moved).detach().mean())
    assert terms_of(net, pairs, config) == {"tumor_rigidity": pytest.approx(expected, rel=1e-5)} and expected > 0.01
    healthy = dataclasses.replace(pairs, moving_tumor=torch.zeros_like(pairs.moving_tumor))
    assert terms_of(net, healthy, config) == {"tumor_rigidity": 0.0}
    assert terms_of(net, dataclasses.replace(pairs, moving_tumor=None), config) == {}


def test_the_strain_within_a_tumour_can_be_trained_away() -> None:
    """And not by moving the tumour off it: where the tumour lies is given, so the gradient is the strain's alone."""
    net, pairs = network(), batch()
    config = dataclasses.replace(NOTHING, tumor_rigidity=1.0)
    weights = net.registration.output.weight  # type: ignore[union-attr]
    total, _ = joint_loss(net, forward_pair(net, pairs, config), pairs, config, generators())
    (got,) = torch.autograd.grad(total.sum(), weights)
    coords = net(pairs.moving, pairs.fixed).coords_vox
    fixed = warp((pairs.moving_tumor > 0).unsqueeze(1).float(), coords).detach()
    (want,) = torch.autograd.grad(tumor_rigidity(displacement(coords), fixed).sum(), weights)
    torch.testing.assert_close(got, want)
    before = terms_of(net, pairs, config)["tumor_rigidity"]
    with torch.no_grad():
        weights -= 0.05 * got / got.norm() * weights.norm()
    assert terms_of(net, pairs, config)["tumor_rigidity"] < before


# Both ways ------------------------------------------------------------------------------------------------

REGISTRATION = {
    "similarity": 1.0, "gradient_l1": 1e-3, "diffusion": 0.1, "bending": 0.1, "folding": 1.0, "structure_dice": 1.0,
    "tumor_rigidity": 1.0,
}  # fmt: skip


@pytest.mark.parametrize("merge", ["subtract", "concatenate"])
@pytest.mark.parametrize("weight", [1.0, 0.25])
def test_symmetric_terms_are_means_of_both_directions(merge: Any, weight: float) -> None:
    net, pairs = network(merge=merge), batch()
    config = dataclasses.replace(NOTHING, tumor_dice=0.5, segmentation=1.0, structures_per_step=30, **REGISTRATION)
    there, back = terms_of(net, pairs, config), terms_of(net, exchanged(pairs), config)
    got = terms_of(net, pairs, dataclasses.replace(config, symmetric=weight))
    assert set(got) == set(there)
    for name in REGISTRATION:
        assert abs(there[name] - back[name]) > 1e-4 * abs(there[name]), name
        assert got[name] == pytest.approx((there[name] + weight * back[name]) / (1.0 + weight), rel=1e-3), name
    for name in ("segmentation", "tumor_dice"):
        assert got[name] == pytest.approx(there[name], rel=1e-4)


def test_symmetric_training_needs_both_directions() -> None:
    net, pairs = network(), batch()
    config = LossConfig(symmetric=1.0)
    with pytest.raises(ValueError, match="reverse"):
        joint_loss(net, net(pairs.moving, pairs.fixed), pairs, config, generators())


def test_inverse_consistency_is_how_far_there_and_back_misses() -> None:
    net, pairs = network(), batch()
    config = dataclasses.replace(NOTHING, inverse_consistency=1.0)
    out = net(pairs.moving, pairs.fixed, reverse=True)
    fields = [displacement(o.coords_vox).detach().double().numpy() for o in (out, out.reverse)]
    grid, misses = np.indices(SHAPE), []
    for u, v in (fields, fields[::-1]):
        for n in range(2):
            carried = [map_coordinates(v[n, i], grid + u[n], order=1, mode="nearest") for i in range(3)]
            misses.append(((u[n] + np.stack(carried)) ** 2).mean())
    assert terms_of(net, pairs, config) == {"inverse_consistency": pytest.approx(np.mean(misses), rel=1e-3)}


def test_opposite_shifts_are_inverse_to_each_other() -> None:
    net, pairs = network(num_labels=0), batch()
    identity = identity_coords(pairs.moving[:, :1].expand(-1, 3, -1, -1, -1))
    shift = torch.tensor([1.5, -2.0, 0.5]).view(1, 3, 1, 1, 1)
    config = dataclasses.replace(NOTHING, inverse_consistency=1.0)
    for back, expected in ((identity - shift, 0.0), (identity + shift, float((4 * shift**2).mean()))):
        out = JointOutput(flow=shift, coords_vox=identity + shift, reverse=JointOutput(flow=shift, coords_vox=back))
        _, terms = joint_loss(net, out, pairs, config, generators())
        assert float(terms["inverse_consistency"].mean()) == pytest.approx(expected, abs=1e-5)


def test_gradients_of_both_ways_under_fabric_and_bf16() -> None:
    # Where a level is two voxels wide, PyTorch 2.13's BF16 convolution on a CPU leaves parts of weight gradients unset.
    pairs = batch(shape=(48, 48, 48))
    fabric = Fabric(accelerator="cpu", devices=1, precision="bf16-mixed")
    plain = network(deep_supervision=2)
    net, _ = fabric.setup(plain, torch.optim.SGD(plain.parameters(), lr=0.1))
    config = LossConfig(
        similarity_measure="lncc", lncc_window=5, symmetric=1.0, inverse_consistency=0.1, folding=1.0,
        structure_dice=1.0, tumor_dice=1.0, bending=0.1,
    )  # fmt: skip
    output = forward_pair(net, pairs, config)
    assert output.reverse is not None and output.reverse.flow is not None and output.reverse.flow.dtype == torch.float32
    total, terms = joint_loss(net.module, output, pairs, config, generators())
    assert all(value.dtype == torch.float32 for value in terms.values())
    fabric.backward(total.mean())
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in plain.parameters())


# Deep supervision -----------------------------------------------------------------------------------------


def test_auxiliary_heads_count_half_as_much_a_level() -> None:
    net, pairs = network(deep_supervision=2), batch()
    assert pairs.moving_tumor is not None
    pairs.moving_tumor[:, :5] = -1
    config = dataclasses.replace(NOTHING, segmentation=1.0, tumor_dice=1.0, class_weights=(1.0, 2.0, 3.0, 4.0))
    out = net(pairs.moving, pairs.fixed)
    entropy, dice = 0.0, []
    for logits, auxiliary, labels in (
        (out.moving_logits, out.moving_auxiliary, pairs.moving_tumor),
        (out.fixed_logits, out.fixed_auxiliary, pairs.fixed_tumor),
    ):
        assert len(auxiliary) == 2
        for share, level, truth in (
            (4 / 7, logits, labels),
            (2 / 7, auxiliary[0], labels[:, ::2, ::2, ::2]),
            (1 / 7, auxiliary[1], labels[:, ::4, ::4, ::4]),
        ):
            weights = torch.tensor(config.class_weights)
            entropy += share * float(weighted_cross_entropy(level.detach(), truth, weights).mean())
            p = torch.softmax(level.detach(), dim=1)
            regions = torch.stack([1 - p[:, 0], p[:, 1] + p[:, 3], p[:, 3]], dim=1)
            truths = torch.stack([truth > 0, (truth == 1) | (truth == 3), truth == 3], dim=1).float()
            dice.append(share * float(soft_dice(regions, truths, (truth >= 0)[:, None].float()).mean()))
    expected = {"segmentation": pytest.approx(entropy, rel=1e-4), "tumor_dice": pytest.approx(sum(dice) / 2, rel=1e-3)}
    assert terms_of(net, pairs, config) == expected


def test_validation_sees_the_finest_level_alone() -> None:
    pairs, config = batch(), LossConfig()
    deep, plain = network(deep_supervision=2).eval(), network().eval()
    plain.load_state_dict(deep.state_dict())
    assert terms_of(deep, pairs, config) == terms_of(plain, pairs, config)


# Configuration --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"lncc_window": 4}, "lncc_window"),
        ({"lncc_window": 1}, "lncc_window"),
        ({"lncc_stride": 0}, "lncc_stride"),
        ({"lncc_stride": 11}, "lncc_stride"),
        ({"mi_bins": 1}, "mi_bins"),
        ({"mi_samples": 0}, "mi_samples"),
        ({"structures_per_step": 0}, "structures_per_step"),
        ({"symmetric": -1.0}, "symmetric"),
        ({"bending": float("nan")}, "bending"),
        ({"diffusion": float("inf")}, "diffusion"),
    ],
)
def test_a_loss_that_makes_no_sense(change: dict[str, Any], word: str) -> None:
    with pytest.raises(ConfigurationError, match=word):
        LossConfig(**change)
