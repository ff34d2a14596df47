"""Images drawn from label maps: reproducible, with exact truth, with tumours and missing modalities."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from small_training import (
    CORTEX,
    CSF,
    SHAPE,
    SPACING,
    STILL,
    WHITE,
    brain,
    label_maps,
    model_spec,
    same,
    source,
)

from jrs.errors import ConfigurationError
from jrs.structures import STRUCTURES
from jrs.train.batch import PairBatch
from jrs.train.labelmaps import LabelMaps
from jrs.train.synth import SyntheticPairs

pytestmark = pytest.mark.usefixtures("one_thread")

# Nothing is cut off, nothing left on: the foreground is the brain.
WHOLE = {"stripping": 0.0, "with_skull": 0.0, "cropped": 0.0}


# Synthesis --------------------------------------------------------------------------------------------------


def test_an_image_is_a_function_of_seed_and_number() -> None:
    first = source()
    drawn = [first.draw(1, number, fixed=False) for number in range(3)]
    # Another object, another order, other images in between.
    second = source()
    second.draw(0, 17, fixed=True)
    for number in (2, 0, 1):
        assert same(second.draw(1, number, fixed=False), drawn[number])
    assert not same(drawn[0], drawn[1])


def test_another_seed_draws_other_images() -> None:
    assert not same(source(seed=6).draw(1, 0, fixed=False), source(seed=5).draw(1, 0, fixed=False))


def test_torchs_own_generator_plays_no_part() -> None:
    torch.manual_seed(1)
    first = source().draw(0, 0, fixed=False)
    state = torch.get_rng_state()
    torch.manual_seed(2)
    assert same(source().draw(0, 0, fixed=False), first)
    torch.manual_seed(1)
    source().draw(0, 0, fixed=False)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_batch_is_its_pairs() -> None:
    pairs = source()
    whole, parts = pairs.batch(1, 2), [pairs.batch(k, 1) for k in (2, 3)]
    for field in dataclasses.fields(PairBatch):
        assert torch.equal(
            getattr(whole, field.name), torch.cat([getattr(part, field.name) for part in parts])
        )
    assert same(source().batch(1, 2), whole)
    assert not same(pairs.batch(2, 2), whole)


def test_the_two_images_of_a_pair_are_drawn_apart() -> None:
    batch = source(
        maps=LabelMaps(("a", "b"), *(t.repeat(2, 1, 1, 1) for t in (x[None] for x in brain())))
    ).batch(0, 1)
    assert not torch.equal(batch.moving, batch.fixed)


@pytest.mark.parametrize("number", range(3))
def test_shapes_types_and_normalisation(number: int) -> None:
    drawn = source(drop_channel=0.4, moving_tumor=0.0, **WHOLE).draw(2, number, fixed=False)
    assert drawn.image.shape == (1, 2, *SHAPE) and drawn.image.dtype == torch.float32
    assert drawn.tumor.shape == (1, *SHAPE) and drawn.tumor.dtype == torch.int64
    assert drawn.structures.shape == (1, *SHAPE) and drawn.structures.dtype == torch.uint8
    assert drawn.present.shape == (1, 2) and set(drawn.present.ravel().tolist()) <= {0.0, 1.0}
    inside = drawn.structures[0].numpy() > 0  # every voxel of these brains belongs to a structure
    for channel in range(2):
        values = drawn.image[0, channel].numpy().astype(np.float64)
        assert (values[~inside] == 0.0).all()
        if drawn.present[0, channel]:
            # What is as dark as the background does not count as foreground, as in deployment.
            shown = values[values != 0.0]
            assert shown.size > 0.8 * inside.sum()
            assert abs(shown.mean()) < 1e-3 and shown.std() == pytest.approx(1.0, abs=1e-3)
        else:
            assert not values.any()


def test_without_any_deformation_the_map_is_what_is_drawn() -> None:
    drawn = SyntheticPairs(label_maps(), model_spec(), STILL, 0).draw(1, 0, fixed=False)
    assert torch.equal(drawn.structures[0], brain(1)[0])


def test_a_shift_moves_the_map_by_voxels() -> None:
    config = dataclasses.replace(STILL, shift_mm=20.0)
    original, found = brain()[0].numpy(), set()
    for number in range(6):
        drawn = SyntheticPairs(label_maps(), model_spec(), config, 0).draw(0, number, fixed=False)
        reach = [math.ceil(20.0 / s) for s in SPACING]
        shifts = [
            shift
            for shift in itertools.product(*(range(-r, r + 1) for r in reach))
            if np.array_equal(
                drawn.structures[0].numpy(),
                original[
                    np.ix_(*(np.clip(np.arange(n) + s, 0, n - 1) for n, s in zip(SHAPE, shift, strict=True)))
                ],
            )
        ]
        assert len(shifts) >= 1
        found.add(shifts[0])
    assert len(found) > 1


def test_deformations_keep_to_their_size() -> None:
    """Structures of half the brain's size move by some mm, not by their own size."""
    wide, narrow = [], []
    for number in range(8):
        for deformation, kept in ((24.0, wide), (2.0, narrow)):
            config = dataclasses.replace(STILL, deformation_mm=deformation)
            drawn = SyntheticPairs(label_maps(), model_spec(), config, 1).draw(0, number, fixed=False)
            kept.append(float((drawn.structures[0] != brain()[0]).float().mean()))
    assert np.mean(narrow) < 0.1 and np.mean(wide) > 0.1


# Tumours ----------------------------------------------------------------------------------------------------


def test_tumours_are_classes_of_the_segmentation_inside_the_brain() -> None:
    config = dataclasses.replace(STILL, moving_tumor=1.0, mass_effect=0.0, **WHOLE)
    pairs, seen = SyntheticPairs(label_maps(), model_spec(), config, 5), set()
    inside = brain()[0] > 0
    for number in range(16):
        drawn = pairs.draw(0, number, fixed=False)
        tumor = drawn.tumor[0]
        seen |= set(tumor.unique().tolist())
        assert set(tumor.unique().tolist()) <= {0, 1, 2, 3}
        assert not bool(((tumor > 0) & ~inside).any())
        # Under a core there is no structure; under oedema there is.
        assert not bool((drawn.structures[0] > 0)[(tumor == 1) | (tumor == 3)].any())
        assert bool((drawn.structures[0] > 0)[tumor == 2].all())
    assert seen == {0, 1, 2, 3}


def test_shares_of_images_with_a_tumour() -> None:
    for moving, fixed in ((1.0, 0.0), (0.0, 1.0)):
        pairs = source(moving_tumor=moving, fixed_tumor=fixed)
        for number in range(4):
            assert bool((pairs.draw(0, number, fixed=False).tumor > 0).any()) is (moving > 0)
            assert bool((pairs.draw(0, number, fixed=True).tumor > 0).any()) is (fixed > 0)
    pairs = source(moving_tumor=0.5)
    count = sum(bool((pairs.draw(0, number, fixed=False).tumor > 0).any()) for number in range(60))
    assert 15 < count < 45


@pytest.mark.parametrize("tissue", [CSF, CORTEX])
def test_no_white_matter_no_tumour(tissue: int) -> None:
    structures, tissues = brain()
    tissues = torch.where(tissues > 0, tissue, 0).to(torch.uint8)
    maps = LabelMaps(("a", "b"), torch.stack([structures] * 2), torch.stack([tissues] * 2))
    pairs = source(maps, moving_tumor=1.0)
    assert not any(bool((pairs.draw(0, number, fixed=False).tumor > 0).any()) for number in range(6))


def test_what_cannot_be_seen_has_no_tumour() -> None:
    pairs = source(moving_tumor=1.0, cropped=1.0, single_modality_moving=0.0, drop_channel=0.0)
    for number in range(8):
        drawn = pairs.draw(0, number, fixed=False)
        dark = (drawn.image[0] == 0.0).all(dim=0)
        # A slab without any signal at one end of the brain holds no label.
        for axis in range(3):
            blank = dark.movedim(axis, 0).flatten(1).all(dim=1)
            assert not bool((drawn.tumor[0].movedim(axis, 0)[blank] > 0).any())


def test_a_mirrored_image_has_left_and_right_exchanged() -> None:
    """The array flipped along the first axis (R), the name of each structure changed to the other side's."""
    names = list(STRUCTURES)
    left, right = (1 + names.index(f"{side}_cerebral_cortex") for side in ("left", "right"))
    stem = 1 + names.index("brain_stem")
    structures = torch.zeros(SHAPE, dtype=torch.uint8)
    structures[2:8, 2:14, 4:20], structures[8:13, 3:14, 6:28], structures[7:9, 7:9, 8:12] = left, right, stem
    maps = LabelMaps(("a", "b"), torch.stack([structures] * 2), torch.stack([(structures > 0).byte() * CORTEX] * 2))
    mirrored = SyntheticPairs(maps, model_spec(), STILL, 0).draw(0, 0, fixed=False, mirrored=True).structures[0]
    expected = structures.flip(0)
    expected = torch.where(expected == left, 99, torch.where(expected == right, left, expected))
    assert torch.equal(mirrored, torch.where(expected == 99, right, expected).byte())


def test_a_mirrored_push_still_points_outwards() -> None:
    """Mirroring an image with mass effect mirrors the push: the anatomy is that of the mirrored map, pushed."""
    structures, tissues = brain()
    maps = LabelMaps(("a", "b"), torch.stack([structures] * 2), torch.stack([tissues] * 2))
    flipped = LabelMaps(("a", "b"), maps.structures.flip(1), maps.classes.flip(1))
    config = dataclasses.replace(STILL, moving_tumor=1.0, mass_effect=0.45, **WHOLE)
    for number in range(4):
        one = SyntheticPairs(maps, model_spec(), config, 2).draw(0, number, fixed=False, mirrored=True)
        other = SyntheticPairs(flipped, model_spec(), config, 2).draw(0, number, fixed=False)
        # Structures 1 to 3 are left ones here; only their place is compared.
        assert float(((one.structures > 0) == (other.structures > 0)).float().mean()) > 0.995


def test_maps_on_a_finer_grid_give_partial_volumes() -> None:
    """A border inside a voxel shows as a value between both sides' in the image of a finer map, in none of a coarse."""
    fine = torch.zeros(tuple(2 * n for n in SHAPE), dtype=torch.uint8)
    fine[6:26, 6:26, 11:53] = CORTEX  # from the middle of voxel 5 on the third axis
    plain = dict.fromkeys(("noise", "bias", "gamma", "jitter", "texture", "blur", "thick_slices"), 0.0)
    extras = dict.fromkeys(("membranes", "hyperintensities", "vessels"), 0.0)
    config = dataclasses.replace(STILL, **plain, **WHOLE, **extras, single_modality_moving=0.0)
    fine[6:26, 6:26, 11:31] = WHITE
    maps = LabelMaps(("a", "b"), torch.zeros(2, *fine.shape, dtype=torch.uint8), torch.stack([fine] * 2))
    line = SyntheticPairs(maps, model_spec(), config, 0).draw(0, 0, fixed=False).image[0, 0, 8, 8]
    white, cortex = float(line[10]), float(line[20])
    assert min(white, cortex) < float(line[15]) < max(white, cortex)
    assert abs(float(line[14]) - white) < 1e-4 and abs(float(line[16]) - cortex) < 1e-4


def test_maps_that_do_not_fit_the_grid() -> None:
    with pytest.raises(ConfigurationError, match="no multiple of the grid"):
        SyntheticPairs(label_maps(shape=(24, 16, 32)), model_spec(), STILL, 0)


def test_there_is_no_oedema_in_csf() -> None:
    """White matter at one end of a head of CSF: a core may press into it, oedema may not follow."""
    tissues = torch.full(SHAPE, CSF, dtype=torch.uint8)
    tissues[:, :, :6] = WHITE
    maps = LabelMaps(("a", "b"), torch.stack([tissues] * 2), torch.stack([tissues] * 2))
    pairs = SyntheticPairs(maps, model_spec(), dataclasses.replace(STILL, moving_tumor=1.0, mass_effect=0.0), 3)
    drawn = [pairs.draw(0, number, fixed=False).tumor[0] for number in range(12)]
    assert any(bool((tumor[:, :, :6] == 2).any()) for tumor in drawn)
    assert any(bool((tumor[:, :, 6:] > 0).any()) for tumor in drawn)
    assert not any(bool((tumor[:, :, 6:] == 2).any()) for tumor in drawn)


def test_a_tumour_changes_the_image_where_it_lies() -> None:
    texture = {"noise": 0.0, "bias": 0.0, "texture": 0.0, "jitter": 0.0, "gamma": 0.0, "drop_channel": 0.0}
    spec = model_spec(("t1", "t1ce", "t2", "flair"))
    pairs = source(spec=spec, moving_tumor=1.0, single_modality_moving=0.0, **texture)
    drawn = pairs.draw(0, 1, fixed=False)
    image, tumor = drawn.image[0].numpy(), drawn.tumor[0].numpy()
    white = (drawn.structures[0].numpy() == 1) & (tumor == 0)
    assert (tumor == 2).sum() > 50 and white.sum() > 50
    # Oedema is dark in T1, bright in T2 and FLAIR, beside white matter.
    dark, bright = (image[0] + image[1]) / 2, (image[2] + image[3]) / 2
    assert dark[tumor == 2].mean() < dark[white].mean() - 0.2
    assert bright[tumor == 2].mean() > bright[white].mean() + 0.2


# Missing modalities -----------------------------------------------------------------------------------------


def test_one_channel_alone_and_mostly_the_first() -> None:
    pairs = source(single_modality_moving=1.0, single_modality_fixed=0.0, drop_channel=0.0)
    alone = [pairs.draw(0, number, fixed=False).present[0].tolist() for number in range(30)]
    assert {sum(present) for present in alone} == {1.0}
    assert 18 < sum(present == [1.0, 0.0] for present in alone) < 30
    assert all(pairs.draw(0, number, fixed=True).present.tolist() == [[1.0, 1.0]] for number in range(4))


def test_t1ce_and_flair_alone() -> None:
    spec = model_spec(("t1", "t1ce", "t2", "flair"))
    pairs = source(spec=spec, single_modality_moving=0.0, two_modalities=1.0)
    assert pairs.draw(0, 0, fixed=False).present.tolist() == [[0.0, 1.0, 0.0, 1.0]]


def test_dropping_all_leaves_one() -> None:
    pairs = source(single_modality_moving=0.0, drop_channel=1.0)
    seen = {tuple(pairs.draw(0, number, fixed=False).present[0].tolist()) for number in range(20)}
    assert seen == {(1.0, 0.0), (0.0, 1.0)}


def test_a_channel_that_is_needed_is_never_dropped() -> None:
    pairs = source(spec=model_spec(optional=("flair",)), single_modality_moving=0.0, drop_channel=0.5)
    seen = {tuple(pairs.draw(0, number, fixed=False).present[0].tolist()) for number in range(20)}
    assert seen == {(1.0, 0.0), (1.0, 1.0)}




def test_a_share_of_the_pairs_shows_one_head_twice() -> None:
    """Drawn anew from one label map; the other pairs, and all images, are what they are without."""
    usual, twice = source(), source(one_head=0.4)
    pairs = [twice.names(index, 1)[0] for index in range(60)]
    plain = [usual.names(index, 1)[0] for index in range(60)]
    same_head = [a == b for a, b in pairs]
    assert 12 <= sum(same_head) <= 36 and all(a != b for a, b in plain)
    assert [pair for pair, one in zip(pairs, same_head, strict=True) if not one] == [
        pair for pair, one in zip(plain, same_head, strict=True) if not one
    ]
    number = same_head.index(True)
    got, was = twice.batch(number, 1), usual.batch(number, 1)
    assert torch.equal(got.moving, was.moving) and not torch.equal(got.moving, got.fixed)
    assert not torch.equal(got.fixed, was.fixed)
