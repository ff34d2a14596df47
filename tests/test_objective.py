"""The joint loss of a batch."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from small_training import (
    SHAPE,
    model_spec,
    source,
)

from jrs.models.network import JointNet
from jrs.models.spatial import identity_coords
from jrs.train.config import LossConfig
from jrs.train.objective import joint_loss, moved_along, structure_overlap

pytestmark = pytest.mark.usefixtures("one_thread")


def generators(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(n) for n in range(count)]


def test_the_joint_loss_is_the_weighted_sum_of_its_terms() -> None:
    torch.manual_seed(0)
    net, batch = JointNet(model_spec().architecture), source().batch(0, 2)
    present = {
        "moving_present": torch.tensor([[1.0, 1], [1, 0]]),
        "fixed_present": torch.tensor([[0.0, 1], [1, 1]]),
    }
    batch = dataclasses.replace(batch, **present)
    config = LossConfig(
        similarity=0.7,
        gradient_l1=1e-4,
        segmentation=0.3,
        tumor_dice=0.5,
        structure_dice=1.5,
        diffusion=0.2,
        folding=2.0,
        class_weights=(1.0, 2.0, 3.0, 4.0),
    )
    output = net(batch.moving, batch.fixed)
    total, terms = joint_loss(net, output, batch, config, generators(2))
    names = {
        "similarity",
        "gradient_l1",
        "segmentation",
        "tumor_dice",
        "structure_dice",
        "diffusion",
        "folding",
    }
    assert set(terms) == names
    assert not any(term.requires_grad for term in terms.values())
    assert total.shape == (2,) and all(term.shape == (2,) for term in terms.values())
    expected = sum(getattr(config, name) * term for name, term in terms.items())
    torch.testing.assert_close(total.detach(), expected, rtol=1e-5, atol=0.0)
    # CE(S) + CE(R), and the masked residual over the channels both images have.
    entropy = np.zeros(2)
    for logits, labels in (
        (output.moving_logits, batch.moving_tumor),
        (output.fixed_logits, batch.fixed_tumor),
    ):
        x, t = logits.detach().double().numpy(), labels.numpy()
        logs = np.take_along_axis(x - np.log(np.exp(x).sum(axis=1, keepdims=True)), t[:, None], axis=1)[:, 0]
        weights = np.array(config.class_weights)[t]
        entropy -= (weights * logs).sum(axis=(1, 2, 3)) / weights.sum(axis=(1, 2, 3))
    np.testing.assert_allclose(terms["segmentation"], entropy, rtol=1e-4)
    residual = (output.nontumor_mask * (output.moved - batch.fixed)).detach().double().numpy()
    both = (batch.moving_present * batch.fixed_present).numpy().astype(bool)
    assert both.tolist() == [[False, True], [True, False]]
    np.testing.assert_allclose(terms["similarity"], (residual**2).mean(axis=(2, 3, 4))[both], rtol=1e-4)


def test_without_a_mask_the_whole_residual_counts() -> None:
    torch.manual_seed(0)
    net, batch = (
        JointNet(model_spec().architecture),
        source(drop_channel=0.0, single_modality_moving=0.0).batch(0, 1),
    )
    output = net(batch.moving, batch.fixed)
    config = LossConfig(masked=False)
    _, terms = joint_loss(net, output, batch, config, generators(1))
    residual = (output.moved - batch.fixed).detach().double().numpy() ** 2
    both = (batch.moving_present * batch.fixed_present).numpy().astype(bool)
    assert float(terms["similarity"]) == pytest.approx(residual.mean(axis=(2, 3, 4))[both].mean(), rel=1e-4)


@pytest.mark.parametrize("shift", [0, 2])
def test_overlap_of_structures(shift: int) -> None:
    batch = source().batch(0, 2)
    assert batch.moving_structures is not None and batch.fixed_structures is not None
    coords = identity_coords(batch.moving[:, :1].expand(-1, 3, -1, -1, -1)).clone()
    coords[:, 2] += shift
    got = structure_overlap(coords, batch).numpy()
    for n in range(2):
        moving, fixed = batch.moving_structures[n].numpy(), batch.fixed_structures[n].numpy()
        moved = moving[:, :, np.clip(np.arange(SHAPE[2]) + shift, 0, SHAPE[2] - 1)]
        common = sorted((set(moved.ravel()) & set(fixed.ravel())) - {0})
        dice = [
            2 * ((moved == k) & (fixed == k)).sum() / ((moved == k).sum() + (fixed == k).sum())
            for k in common
        ]
        assert len(common) >= 2
        assert got[n] == pytest.approx(np.mean(dice), abs=1e-5)


def test_a_batch_moved_along_a_field() -> None:
    """Images by scipy's linear, labels by its nearest interpolation; the fixed side stays."""
    from scipy.ndimage import map_coordinates

    batch = source().batch(0, 2)
    assert batch.moving_tumor is not None and batch.moving_structures is not None
    unknown = batch.moving_tumor.clone()
    unknown[1] = -1
    batch = dataclasses.replace(batch, moving_tumor=unknown)
    wander = np.random.default_rng(4).uniform(-2.0, 2.0, (2, 3, *SHAPE))
    coords = np.indices(SHAPE)[None] + wander
    got = moved_along(batch, torch.from_numpy(coords).float())
    for n in range(2):
        for channel, image in zip(got.moving[n].numpy(), batch.moving[n].numpy(), strict=True):
            want = map_coordinates(image.astype(np.float64), coords[n], order=1, mode="nearest")
            np.testing.assert_allclose(channel, want, atol=1e-4)
        pairs = ((got.moving_tumor, unknown), (got.moving_structures, batch.moving_structures))
        for labels, before in pairs:
            assert labels is not None and labels.dtype == before.dtype
            want = map_coordinates(before[n].numpy(), coords[n], order=0, mode="nearest")
            np.testing.assert_array_equal(labels[n].numpy(), want)
    assert got.fixed is batch.fixed and got.fixed_structures is batch.fixed_structures
