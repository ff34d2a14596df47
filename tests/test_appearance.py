"""What a scanner makes of an anatomy: partial volume, artefacts, skull-stripping, normalisation."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import Tensor

from jrs.runtime.preprocess import normalize
from jrs.structures import DRAWN_CLASSES, STRUCTURES, TISSUES
from jrs.train.appearance import Anatomy, diffuse, joint_codes, render, strip
from jrs.train.config import SynthesisConfig
from jrs.train.draws import Draws

SHAPE, SPACING = (32, 36, 32), (2.0, 2.0, 2.0)
WHITE, CORTEX, CSF = (TISSUES.index(name) for name in ("white_matter", "cortex", "csf"))
LEFT_WHITE, LEFT_CORTEX, OUTER_CSF = (
    1 + list(STRUCTURES).index(name) for name in ("left_cerebral_white_matter", "left_cerebral_cortex", "csf")
)
PLAIN = dataclasses.replace(
    SynthesisConfig(),
    **dict.fromkeys(
        ("noise", "bias", "gamma", "jitter", "texture", "blur", "contrast", "stripping"), 0.0
    ),
    **dict.fromkeys(("with_skull", "cropped", "thick_slices", "membranes", "hyperintensities", "vessels"), 0.0),
)


def draws(number: int = 0) -> Draws:
    return Draws((4, number), SHAPE, SPACING, torch.device("cpu"))


def anatomy() -> Anatomy:
    """White matter in cortex in fluid in soft tissue: nested boxes."""
    classes, structures = (torch.zeros(SHAPE, dtype=torch.uint8) for _ in range(2))
    skin = DRAWN_CLASSES.index("extracerebral_507")
    nested = ((1, skin, 0), (4, CSF, OUTER_CSF), (7, CORTEX, LEFT_CORTEX), (10, WHITE, LEFT_WHITE))
    for inset, kind, structure in nested:
        box = tuple(slice(inset, n - inset) for n in SHAPE)
        classes[box], structures[box] = kind, structure
    return Anatomy(classes, structures, [joint_codes(classes, structures)])


def config(**changes: float) -> SynthesisConfig:
    return dataclasses.replace(PLAIN, **changes)


def drawn(number: int = 0, channels: tuple[str, ...] = ("t1", "t2"), **changes: float) -> tuple[Tensor, Tensor]:
    return render(anatomy(), [], channels, config(**changes), draws(number))


def test_without_artefacts_every_tissue_is_flat_and_ordered_as_the_contrast_says() -> None:
    image, mask = drawn(channels=("t1", "t2", "flair"))
    made = anatomy()
    assert torch.equal(mask, made.brain)
    levels = {}
    for tissue in (WHITE, CORTEX, CSF):
        where = made.classes == tissue
        assert float(image[:, where].std(dim=1).max()) < 1e-5
        levels[tissue] = image[:, where].mean(dim=1)
    t1, t2, flair = range(3)
    assert levels[WHITE][t1] > levels[CORTEX][t1] > levels[CSF][t1]
    assert levels[CSF][t2] > levels[CORTEX][t2] > levels[WHITE][t2]
    assert levels[CORTEX][flair] > levels[WHITE][flair] > levels[CSF][flair]


def test_the_mean_of_the_samples_is_the_partial_volume() -> None:
    """Half white matter, half fluid in a voxel gives the mean of both intensities, before the z-score (affine)."""
    made = anatomy()
    mixed = made.classes.clone()
    mixed[16, 16, 16] = CSF
    half = Anatomy(made.classes, made.structures, [made.samples[0], joint_codes(mixed, made.structures)])
    image, _ = render(half, [], ("t1",), config(), draws())
    flat = [float(image[0][made.classes == tissue].median()) for tissue in (WHITE, CSF)]
    assert float(image[0, 16, 16, 16]) == pytest.approx(np.mean(flat), abs=1e-2)


@pytest.mark.parametrize("channel", ["t1", "flair"])
def test_images_are_normalised_as_in_deployment(channel: str) -> None:
    image, mask = drawn(3, (channel,), noise=0.05, gamma=0.3, bias=0.2, jitter=0.08)
    inside = image[0][mask]
    assert abs(float(inside.mean())) < 0.05 and float(inside.std()) == pytest.approx(1.0, abs=0.05)
    # Deployment's own function, given this image brought back to positive intensities, changes nothing.
    raw = torch.where(mask, image[0] + 10.0, 0.0).numpy()
    assert np.abs(normalize(raw, "zscore-foreground") - image[0].numpy())[mask.numpy()].max() < 0.1


def test_diffusion_is_a_convolution_with_the_stated_taps() -> None:
    image = torch.randn(2, 9, 10, 11, generator=torch.Generator().manual_seed(0))
    expected = image.numpy().astype(np.float64)
    for channel, weight in enumerate((0.25, 0.1)):
        for axis in range(3):
            expected[channel] = ndimage.convolve1d(
                expected[channel], [weight, 1 - 2 * weight, weight], axis=axis, mode="nearest"
            )
    assert np.abs(diffuse(image, torch.tensor([0.25, 0.1])).numpy() - expected).max() < 1e-5


def test_stripping_strays_around_the_brain_and_keeps_its_inside() -> None:
    made = anatomy()
    depth = ndimage.distance_transform_edt((made.classes == WHITE).numpy())
    volumes = []
    for number in range(12):
        mask = strip(made, config(stripping=1.0), draws(number))
        assert bool(mask[torch.from_numpy(depth > 2)].all())
        assert not bool(mask[0].any())
        volumes.append(int(mask.sum()))
    solid = int(((made.classes == WHITE) | (made.classes == CORTEX)).sum())
    assert min(volumes) < 1.15 * solid and max(volumes) > 1.35 * solid


def test_the_whole_head_where_it_is_not_stripped() -> None:
    made = anatomy()
    assert torch.equal(strip(made, config(with_skull=1.0), draws()), made.classes > 0)


def test_a_cropped_field_of_view_ends_at_a_plane() -> None:
    whole = anatomy().brain
    for number in range(6):
        _, mask = drawn(number, cropped=1.0)
        assert bool(mask.any()) and not bool((mask & ~whole).any())
        gone = torch.nonzero(whole & ~mask)
        spans = [len(gone[:, axis].unique()) for axis in range(3)]
        # What is missing is a slab: thin along one axis, the brain's full width along the others.
        assert gone.numel() > 0 and sorted(spans)[0] < 13 and sorted(spans)[2] >= 24


def test_thick_slices_blur_along_one_axis_alone() -> None:
    sharp, _ = drawn(1, ("t1",))
    thick, _ = drawn(1, ("t1",), thick_slices=1.0)
    middle = [16, 18, 16]
    changed = []
    for axis in range(3):
        index = [slice(None) if a == axis else middle[a] for a in range(3)]
        changed.append(float((sharp[0][tuple(index)] - thick[0][tuple(index)]).abs().max()))
    assert sorted(changed)[2] > 0.05 and sorted(changed)[1] < 0.3 * sorted(changed)[2]


def test_vessels_are_bright_in_t1ce_alone() -> None:
    channels = ("t1", "t1ce")
    before, mask = drawn(5, channels)
    after, _ = drawn(5, channels, vessels=1.0)
    white = anatomy().classes == WHITE
    assert torch.allclose(before[0], after[0])
    brighter = (after[1] > after[1][white].median() + 0.5) & mask
    assert 5 < int(brighter.sum()) < 0.2 * int(mask.sum())
    assert not bool(brighter[white].any())


def test_membranes_lie_in_the_fluid_around_the_brain_alone() -> None:
    """Between fluid and a little beyond cortex; in patches, some fluid stays as it was."""
    made, changed = anatomy(), 0
    outer = made.structures == OUTER_CSF
    for number in range(6):
        plain, _ = drawn(number, ("t1",))
        with_them, _ = drawn(number, ("t1",), membranes=1.0)

        # Normalisation sees other means: compare contrasts of tissues.
        def level(image: Tensor, where: Tensor) -> Tensor:
            white, cortex = image[0][made.classes == WHITE].median(), image[0][made.classes == CORTEX].median()
            return (image[0][where] - cortex) / (white - cortex)

        inner = made.brain & ~outer
        torch.testing.assert_close(level(with_them, inner), level(plain, inner), atol=1e-3, rtol=0)
        before, after = level(plain, outer), level(with_them, outer)
        changed += int(((after - before) > 0.2 * (0.0 - before)).sum() > 50)
        assert (after > before - 1e-3).all() and after.max() < 0.3 * -before.min() + 0.05
    assert changed >= 3


def test_hyperintensities_lie_in_white_matter_and_are_bright_in_flair() -> None:
    found = 0
    for number in range(8):
        before, _ = drawn(number, ("flair",))
        after, _ = drawn(number, ("flair",), hyperintensities=1.0)
        made = anatomy()
        white = made.classes == WHITE
        rise = after[0] - after[0][white].median() - (before[0] - before[0][white].median())
        found += int((rise[white] > 0.1).sum())
        # Outside white matter nothing is brighter relative to it than before (z-scoring shrinks what is there).
        assert float(rise[made.classes == CORTEX].max()) < 0.05
    assert found > 20
