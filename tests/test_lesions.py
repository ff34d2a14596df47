"""Synthetic tumours: where they grow, what they are made of, how they push."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor

from jrs.structures import STRUCTURES, TISSUES
from jrs.train.config import SynthesisConfig
from jrs.train.draws import Draws
from jrs.train.lesions import (
    CAVITY,
    ENHANCING,
    NECROSIS,
    NONENHANCING,
    SEGMENTATION,
    Kind,
    Plan,
    grow,
    mass_effect,
    plan_lesions,
)

SHAPE, SPACING = (40, 44, 40), (3.0, 3.0, 3.0)
WHITE, CORTEX, CSF = (TISSUES.index(name) for name in ("white_matter", "cortex", "csf"))
LEFT_WHITE, LEFT_VENTRICLE, CEREBELLUM = (
    1 + list(STRUCTURES).index(name)
    for name in ("left_cerebral_white_matter", "left_lateral_ventricle", "left_cerebellar_white_matter")
)


def draws(number: int) -> Draws:
    return Draws((9, number), SHAPE, SPACING, torch.device("cpu"))


def head() -> tuple[Tensor, Tensor]:
    """Classes and structures: white matter of the cerebrum with a slab of CSF on one side, cerebellum below."""
    classes = torch.full(SHAPE, WHITE, dtype=torch.uint8)
    structures = torch.full(SHAPE, LEFT_WHITE, dtype=torch.uint8)
    classes[:, 30:], structures[:, 30:] = CSF, 0
    structures[:, :, :8] = CEREBELLUM
    return classes, structures


def test_centres_lie_in_the_white_matter_of_the_cerebrum() -> None:
    classes, structures = head()
    plans = [p for k in range(120) for p in plan_lesions(classes, structures, SynthesisConfig(), draws(k))]
    assert len(plans) > 120  # some images have several
    for plan in plans:
        assert structures[plan.center] == LEFT_WHITE and classes[plan.center] == WHITE
        assert 3.0 <= plan.radius <= 27.0 and 0.0 <= plan.push <= 0.45
    assert {plan.kind for plan in plans} == {"ring", "solid", "nonenhancing", "mixed", "cavity"}


def test_no_white_matter_no_lesion() -> None:
    classes, structures = head()
    assert plan_lesions(torch.where(classes == WHITE, CORTEX, classes), structures, SynthesisConfig(), draws(0)) == []


def test_mass_effect_is_the_stated_displacement() -> None:
    plan = Plan((20, 22, 20), 12.0, "ring", 0.4)
    push = mass_effect(plan, draws(3))
    assert push is not None
    push = push.numpy()
    # Along the first axis from the centre: towards it (what is seen comes from nearer), nothing across.
    along = push[0, 21:, 22, 20]
    assert (along < 0).all() and np.abs(push[1:, :, 22, 20]).max() < 1e-6
    distances = 3.0 * np.arange(1, 20)
    inside = distances <= 12.0
    assert np.allclose(along[inside], -0.4 * distances[inside], atol=1e-5)
    # Beyond the radius 4.8 mm fall off as a Gaussian: the logarithm is a parabola from the edge.
    beyond = distances[~inside] - 12.0
    curve = np.log(-along[~inside] / 4.8)
    assert np.allclose(curve / beyond**2, (curve / beyond**2)[0], rtol=1e-3)
    # Symmetric, and the map r -> r0 never folds back.
    assert np.allclose(push[0, 1:20, 22, 20][::-1], -along, atol=1e-6)
    assert (np.diff(distances + along) > 0).all()


def test_without_a_push_nothing_moves() -> None:
    assert mass_effect(Plan((20, 22, 20), 12.0, "ring", 0.0), draws(0)) is None


@pytest.mark.parametrize("number", range(4))
def test_oedema_stays_out_of_csf_and_surrounds_the_core(number: int) -> None:
    classes, structures = head()
    lesion = grow(Plan((20, 20, 22), 12.0, "ring", 0.0), classes, structures, classes > 0, draws(number))
    edema, core = lesion.edema > 0.5, lesion.parts >= 0
    assert core.sum() > 100 and edema.sum() > core.sum()
    assert float(lesion.edema.min()) >= 0.0 and float(lesion.edema.max()) <= 1.0
    assert not bool((edema & ~core)[:, 36:].any())
    assert bool(edema[core & (classes == WHITE)].float().mean() > 0.9)


@pytest.mark.parametrize(
    ("kind", "allowed", "needed"),
    [
        ("ring", {NECROSIS, ENHANCING, NONENHANCING}, {NECROSIS, ENHANCING}),
        ("solid", {ENHANCING, NECROSIS}, {ENHANCING}),
        ("nonenhancing", {NONENHANCING, NECROSIS}, {NONENHANCING}),
        ("mixed", {NECROSIS, ENHANCING, NONENHANCING}, {NONENHANCING}),
        ("cavity", {CAVITY, ENHANCING}, {CAVITY}),
    ],
)
def test_what_each_kind_is_made_of(kind: Kind, allowed: set[int], needed: set[int]) -> None:
    classes, structures = head()
    seen: set[int] = set()
    for number in range(5):
        lesion = grow(Plan((20, 18, 22), 15.0, kind, 0.0), classes, structures, classes > 0, draws(number))
        seen |= set(lesion.parts[lesion.parts >= 0].tolist())
    assert needed <= seen <= allowed


def test_a_ring_has_its_wall_outside() -> None:
    classes, structures = head()
    plan = Plan((20, 18, 22), 18.0, "ring", 0.0)
    lesion = grow(plan, classes, structures, classes > 0, draws(2))
    points = torch.stack(torch.meshgrid(*(torch.arange(n) for n in SHAPE), indexing="ij")).float()
    distance = (points - torch.tensor(plan.center).view(3, 1, 1, 1)).norm(dim=0)
    assert distance[lesion.parts == NECROSIS].mean() < distance[lesion.parts == ENHANCING].mean() - 1.0


def test_a_core_hardly_enters_a_ventricle() -> None:
    classes, structures = head()
    classes[:, 24:30], structures[:, 24:30] = CSF, LEFT_VENTRICLE
    parts = grow(Plan((20, 20, 22), 15.0, "solid", 0.0), classes, structures, classes > 0, draws(1)).parts
    white = float((parts[:, :24] >= 0).float().sum())
    assert white > 200 and float((parts[:, 27:30] >= 0).float().sum()) < 0.02 * white


def test_a_cavity_is_no_part_of_the_tumour() -> None:
    assert SEGMENTATION[CAVITY] == 0
    assert (SEGMENTATION[NECROSIS], SEGMENTATION[NONENHANCING], SEGMENTATION[ENHANCING]) == (1, 1, 3)


def test_the_largest_push_is_the_configurations() -> None:
    classes, structures = head()
    config = dataclasses.replace(SynthesisConfig(), mass_effect=0.0)
    plans = [p for k in range(10) for p in plan_lesions(classes, structures, config, draws(k))]
    assert all(plan.push == 0.0 for plan in plans)
