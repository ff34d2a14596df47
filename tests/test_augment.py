"""Augmentation: what may change and what may not, geometry against scipy, mirrors by FreeSurfer's numbers."""

from __future__ import annotations

import csv
import dataclasses
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation
from torch import Tensor

from jrs.architecture import Architecture
from jrs.errors import ConfigurationError
from jrs.manifest import GridSpec, ModelSpec
from jrs.structures import STRUCTURES
from jrs.train.augment import affine_matrices, augment, sampling_coords
from jrs.train.batch import PairBatch, concatenate
from jrs.train.config import AugmentConfig, LossConfig, OptimizerConfig, TrainConfig
from jrs.train.loop import Trainer

SHAPE = (32, 48, 16)
CHANNELS = ("t1", "t1ce", "t2")
EVERYTHING = AugmentConfig(
    drop_channel=0.3, flip=(0.5, 0.5, 0.5), affine=0.7, elastic=0.7, blur=0.5, resolution=0.5, bias=0.5, gamma=0.5,
    noise=0.5, intensity=0.5,
)  # fmt: skip


def spec(orientation: str = "RAS", optional: tuple[str, ...] = CHANNELS, **changes: Any) -> ModelSpec:
    return ModelSpec(
        Architecture(in_channels=3),
        CHANNELS,
        optional,
        GridSpec(SHAPE, (2.0, 1.5, 3.0), orientation),
        **changes,
    )


def generators(count: int, seed: int = 0) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed + n) for n in range(count)]


def brain() -> Tensor:
    """An ellipsoid that leaves a margin."""
    axes = [torch.linspace(-1.25, 1.25, n) for n in SHAPE]
    return sum(a.square() for a in torch.meshgrid(*axes, indexing="ij")) < 1  # type: ignore[return-value]


def normalized(images: Tensor, volume: bool = False) -> Tensor:
    """Each (X,Y,Z) by itself, over what is not 0 or over all."""
    flat = images.flatten(0, -4)
    for k, image in enumerate(flat):
        values = image if volume else image[image != 0]
        done = (image - values.mean()) / values.std(correction=0)
        flat[k] = done if volume else torch.where(image != 0, done, 0.0)
    return flat.view(images.shape)


def smooth_noise(count: int, seed: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 3, 8, 12, 5, generator=g)
    return torch.nn.functional.interpolate(coarse, size=SHAPE, mode="trilinear", align_corners=True)


def batch(count: int = 2, seed: int = 0, volume: bool = False) -> PairBatch:
    """Brains of smooth noise; the second channel of a moving image is missing, so is the first of a fixed one."""
    images = []
    for k in range(2):
        raw = (torch.exp(0.4 * smooth_noise(count, seed + k)) + 0.2) * brain()
        image = normalized(raw, volume)
        image[:, 1 - k] = 0.0
        images.append(image)
    g = torch.Generator().manual_seed(seed + 7)
    tumor = torch.randint(0, 4, (2 * count, *SHAPE), generator=g) * brain()
    structures = (torch.randint(0, 31, (2 * count, *SHAPE), generator=g) * brain()).to(torch.uint8)
    return PairBatch(
        images[0], images[1],
        torch.tensor([[1.0, 0.0, 1.0]]).repeat(count, 1), torch.tensor([[0.0, 1.0, 1.0]]).repeat(count, 1),
        tumor[:count], tumor[count:], structures[:count], structures[count:],
    )  # fmt: skip


def same(a: PairBatch, b: PairBatch) -> bool:
    return all(torch.equal(x, y) for x, y in zip(vars(a).values(), vars(b).values(), strict=True))


def copied(pairs: PairBatch) -> PairBatch:
    return PairBatch(**{name: value.clone() for name, value in vars(pairs).items()})


# Draws ----------------------------------------------------------------------------------------------------


def test_no_chance_no_change() -> None:
    pairs = batch()
    assert augment(pairs, AugmentConfig(), generators(2), spec()) is pairs


def test_a_pair_is_a_function_of_its_generator() -> None:
    pairs = batch(3)
    before = copied(pairs)
    together = augment(pairs, EVERYTHING, generators(3), spec())
    assert same(pairs, before)
    assert same(together, augment(pairs, EVERYTHING, generators(3), spec()))
    assert not same(together, augment(pairs, EVERYTHING, generators(3, seed=9), spec()))
    alone = [
        augment(PairBatch(**{k: v[n : n + 1] for k, v in vars(pairs).items()}), EVERYTHING, generators(3)[n], spec())
        for n in range(3)
    ]
    for name, value in vars(concatenate(alone)).items():
        np.testing.assert_allclose(getattr(together, name), value, atol=2e-4, err_msg=name)
    assert not torch.equal(together.moving[0, 2] != 0, together.moving[1, 2] != 0)


def test_one_generator_serves_all_pairs() -> None:
    pairs, g = batch(), torch.Generator().manual_seed(0)
    first, second = augment(pairs, EVERYTHING, g, spec()), augment(pairs, EVERYTHING, g, spec())
    assert not same(first, second)
    assert same(first, augment(pairs, EVERYTHING, torch.Generator().manual_seed(0), spec()))


def test_a_generator_too_few() -> None:
    with pytest.raises(ValueError, match="1 generators for 2 pairs"):
        augment(batch(), EVERYTHING, generators(1), spec())


def test_images_keep_their_layout_and_type() -> None:
    pairs = batch()
    layout = torch.channels_last_3d
    wide = dataclasses.replace(
        pairs, moving=pairs.moving.to(memory_format=layout), fixed=pairs.fixed.to(memory_format=layout)
    )
    got = augment(wide, EVERYTHING, generators(2), spec())
    assert got.moving.is_contiguous(memory_format=layout) and got.fixed.is_contiguous(memory_format=layout)
    assert same(got, augment(pairs, EVERYTHING, generators(2), spec()))
    assert [v.dtype for v in vars(got).values()] == [v.dtype for v in vars(pairs).values()]


def test_labels_may_be_missing() -> None:
    pairs = dataclasses.replace(batch(), fixed_tumor=None, moving_structures=None, fixed_structures=None)
    got = augment(pairs, EVERYTHING, generators(2), spec())
    assert got.moving_tumor is not None
    assert got.fixed_tumor is None and got.moving_structures is None and got.fixed_structures is None


# Channels -------------------------------------------------------------------------------------------------


def many(count: int) -> PairBatch:
    """Pairs of ones with the channels of ``batch``."""
    moving, fixed = torch.tensor([[1.0, 0.0, 1.0]]).repeat(count, 1), torch.tensor([[0.0, 1.0, 1.0]]).repeat(count, 1)
    images = [present[:, :, None, None, None].expand(-1, -1, 2, 2, 2).clone() for present in (moving, fixed)]
    return PairBatch(images[0], images[1], moving, fixed, torch.ones(count, 2, 2, 2, dtype=torch.int64))


def test_dropped_channels() -> None:
    pairs = many(400)
    config = AugmentConfig(drop_channel=0.3)
    got = augment(pairs, config, generators(400), spec(optional=("t1", "t1ce")))
    for image, present, before in (
        (got.moving, got.moving_present, pairs.moving_present),
        (got.fixed, got.fixed_present, pairs.fixed_present),
    ):
        assert torch.equal(image.abs().amax((2, 3, 4)) > 0, present > 0)
        assert bool((present <= before).all()) and bool((present[:, 2] == 1).all())
        optional = 0 if before[0, 0] else 1
        assert float(present[:, optional].mean()) == pytest.approx(0.7, abs=0.07)
    moving, fixed = got.moving_present[:, 0], got.fixed_present[:, 1]
    assert float((moving * fixed).mean()) == pytest.approx(0.49, abs=0.08)
    assert got.moving_tumor is pairs.moving_tumor


def test_one_channel_always_stays() -> None:
    pairs = many(300)
    got = augment(pairs, AugmentConfig(drop_channel=1.0), generators(300), spec())
    for present, before in ((got.moving_present, pairs.moving_present), (got.fixed_present, pairs.fixed_present)):
        assert bool((present.sum(dim=1) == 1).all()) and bool((present <= before).all())
        # Either of the two that are there.
        assert float(present[:, 2].mean()) == pytest.approx(0.5, abs=0.1)


# Mirrors --------------------------------------------------------------------------------------------------

# Left and right numbers of FreeSurfer's colour table.
SIDES = {2: 41, 3: 42, 4: 43, 7: 46, 8: 47, 10: 49, 11: 50, 12: 51, 13: 52, 17: 53, 18: 54, 26: 58, 28: 60}


@pytest.mark.parametrize(
    ("orientation", "axes"), [("RAS", (0, 1, 2)), ("LPS", (0, 1, 2)), ("PIR", (2, 0, 1)), ("SLA", (1, 2, 0))]
)
def test_a_mirror_exchanges_left_and_right(orientation: str, axes: tuple[int, int, int]) -> None:
    pairs = batch()
    numbers = np.array([0, *STRUCTURES.values()])
    exchanged = {**SIDES, **{right: left for left, right in SIDES.items()}}
    for which, axis in enumerate(axes):
        chances = tuple(float(k == which) for k in range(3))
        got = augment(pairs, AugmentConfig(flip=chances), generators(2), spec(orientation))  # type: ignore[arg-type]
        for name, value in vars(pairs).items():
            if name.endswith("present"):
                assert torch.equal(getattr(got, name), value)
                continue
            expected = value.flip(axis + value.dim() - 3)
            if name.endswith("structures"):
                there, found = numbers[expected.numpy()], numbers[getattr(got, name).numpy()]
                if which == 0:
                    there = np.vectorize(lambda n: exchanged.get(n, n))(there)
                np.testing.assert_array_equal(found, there)
            else:
                assert torch.equal(getattr(got, name), expected), name


def test_a_pair_is_mirrored_as_a_whole() -> None:
    pairs = batch(60)
    got = augment(pairs, AugmentConfig(flip=(0.5, 0.0, 0.0)), generators(60), spec())
    moving = [torch.equal(got.moving[n], pairs.moving[n].flip(1)) for n in range(60)]
    fixed = [torch.equal(got.fixed[n], pairs.fixed[n].flip(1)) for n in range(60)]
    assert moving == fixed and 15 < sum(moving) < 45
    assert all(flipped or torch.equal(got.moving[n], pairs.moving[n]) for n, flipped in enumerate(moving))


# Geometry -------------------------------------------------------------------------------------------------


def test_affine_matrices() -> None:
    angles = torch.tensor([[0.3, -0.2, 0.5], [0.0, 0.0, 0.0]])
    stretch, skews = torch.tensor([[0.1, -0.2, 0.05], [0.0, 0.0, 0.0]]), torch.tensor([[0.04, -0.03, 0.02], [0, 0, 0]])
    shear = np.array([[1, 0.04, -0.03], [0, 1, 0.02], [0, 0, 1]])
    expected = Rotation.from_rotvec([0.3, -0.2, 0.5]).as_matrix() @ shear @ np.diag([1.1, 0.8, 1.05])
    got = affine_matrices(angles, stretch, skews).numpy()
    np.testing.assert_allclose(got[0], expected, atol=1e-6)
    np.testing.assert_allclose(got[1], np.eye(3), atol=1e-7)


def test_points_are_mapped_in_millimetres() -> None:
    grid = spec().grid
    matrix = affine_matrices(torch.tensor([[0.2, 0.1, -0.3]]), torch.tensor([[0.1, 0.0, -0.1]]), torch.zeros(1, 3))
    shift = torch.tensor([[4.0, -3.0, 1.5]])
    coarse = torch.tensor([0.5, -2.0, 1.0]).view(1, 3, 1, 1, 1).expand(1, 3, 2, 3, 2)
    coords = sampling_coords(matrix, shift, coarse, grid, torch.device("cpu")).numpy()[0]
    affine = np.diag([*grid.spacing, 1.0])
    middle = nib.affines.apply_affine(affine, (np.array(SHAPE) - 1) / 2)
    for index in ((0, 0, 0), (31, 47, 15), (5, 20, 9)):
        x = nib.affines.apply_affine(affine, index)
        y = middle + matrix[0].double().numpy() @ (x - middle) + shift[0].numpy() + np.array([0.5, -2.0, 1.0])
        np.testing.assert_allclose(coords[(slice(None), *index)], y / grid.spacing, atol=1e-4)


def test_a_random_displacement_has_its_size() -> None:
    """Where the image is a coordinate, what is sampled is where it was sampled."""
    config = AugmentConfig(elastic=1.0, elastic_mm=4.0, elastic_control_mm=20.0)
    sizes = []
    for n in range(40):
        g = torch.Generator().manual_seed(n)
        place = torch.arange(SHAPE[1], dtype=torch.float32).view(1, 1, 1, -1, 1).expand(1, 3, *SHAPE)
        ramp = PairBatch(*[normalized(place + 1.0)] * 2, torch.ones(1, 3), torch.ones(1, 3))
        got = augment(ramp, config, g, spec()).moving[0, 0]
        ranks = got / got.std() * place.std() - got.mean()
        sizes.append(float((ranks - (place[0, 0] - place.mean()))[8:-8, 12:-12, 4:-4].std()) * 1.5)
    assert 0.5 < np.median(sizes) < 4.0


def balls() -> PairBatch:
    """A bright ball with a label, as tumour and as structure, in a brain of one grey."""
    axes = [torch.arange(n, dtype=torch.float32) * s for n, s in zip(SHAPE, (2.0, 1.5, 3.0), strict=True)]
    points = torch.stack(torch.meshgrid(*axes, indexing="ij"))
    ball = (points - torch.tensor([36.0, 26.0, 24.0]).view(3, 1, 1, 1)).square().sum(0) < 12.0**2
    image = normalized((1.0 + ball + 0.01 * torch.rand(SHAPE)).mul(brain()).expand(2, 3, *SHAPE).clone())
    label = ball.expand(2, *SHAPE)
    return PairBatch(
        image, image.clone(), torch.ones(2, 3), torch.ones(2, 3),
        label.long(), 3 * label.long(), 5 * label.to(torch.uint8), 9 * label.to(torch.uint8),
    )  # fmt: skip


def test_labels_go_with_their_image() -> None:
    pairs = balls()
    config = AugmentConfig(affine=1.0, elastic=1.0)
    got = augment(pairs, config, generators(2), spec())
    for image, tumor, structures, k, s in (
        (got.moving, got.moving_tumor, got.moving_structures, 1, 5),
        (got.fixed, got.fixed_tumor, got.fixed_structures, 3, 9),
    ):
        assert tumor is not None and structures is not None
        assert set(tumor.unique().tolist()) == {0, k} and set(structures.unique().tolist()) == {0, s}
        assert torch.equal(tumor > 0, structures > 0)
        for n in range(2):
            inside = image[n, 0][image[n, 0] != 0]
            bright = image[n, 0] > (inside.min() + inside.max()) / 2
            overlap = 2 * float((bright & (tumor[n] > 0)).sum()) / float(bright.sum() + (tumor[n] > 0).sum())
            assert overlap > 0.95
    # And each its own way.
    sizes = {int((t > 0).sum()) for tumors in (got.moving_tumor, got.fixed_tumor) for t in tumors}
    assert len(sizes) == 4


def test_what_comes_from_outside_is_background_and_the_unknown_stays_unknown() -> None:
    pairs = batch()
    full = torch.full((2, *SHAPE), 2)
    pairs = dataclasses.replace(
        pairs,
        moving=normalized(torch.rand(2, 3, *SHAPE) + 1.0),
        moving_present=torch.ones(2, 3),
        moving_tumor=full,
        fixed_tumor=torch.full((2, *SHAPE), -1),
    )
    config = AugmentConfig(affine=1.0, rotation_deg=0.0, scale=0.0, shear=0.0, shift_mm=12.0)
    got = augment(pairs, config, generators(2), spec())
    assert bool((got.fixed_tumor == -1).all())
    outside = got.moving_tumor == 0
    assert 0.02 < float(outside.float().mean()) < 0.9
    assert float(got.moving[outside.unsqueeze(1).expand_as(got.moving)].abs().max()) == 0.0
    assert float((got.moving != 0).float().mean()) > 0.1


# Intensities ----------------------------------------------------------------------------------------------

EFFECTS: list[dict[str, Any]] = [
    {"affine": 1.0, "elastic": 1.0},
    {"blur": 1.0, "blur_mm": 8.0},
    {"resolution": 1.0},
    {"bias": 1.0},
    {"gamma": 1.0},
    {"noise": 1.0},
]


@pytest.mark.parametrize("effect", EFFECTS)
@pytest.mark.parametrize("volume", [False, True])
def test_what_was_changed_is_normalised_again(effect: dict[str, Any], volume: bool) -> None:
    pairs = batch(volume=volume)
    model = spec(normalization="zscore-volume" if volume else "zscore-foreground")
    got = augment(pairs, AugmentConfig(**effect), generators(2), model)
    for image, present, before in (
        (got.moving, got.moving_present, pairs.moving),
        (got.fixed, got.fixed_present, pairs.fixed),
    ):
        for n, c in np.ndindex(2, 3):
            values = image[n, c]
            if not present[n, c]:
                assert float(values.abs().max()) == 0.0
                continue
            assert float((values - before[n, c]).abs().max()) > 1e-3
            ground = values[0, 0, 0]
            assert int((values == ground).sum()) > 0.3 * values.numel()
            if "affine" not in effect:
                assert torch.equal(values != ground, before[n, c] != before[n, c][0, 0, 0])
            counted = values if volume else values[values != 0]
            assert float(ground) == 0.0 or volume
            assert float(counted.mean()) == pytest.approx(0.0, abs=1e-3)
            assert float(counted.std(correction=0)) == pytest.approx(1.0, abs=1e-3)


def changed(seed: int = 0, **effect: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Third channel of the first moving image before and after, and its foreground."""
    pairs = batch()
    got = augment(pairs, AugmentConfig(**effect), generators(2, seed), spec())
    return pairs.moving[0, 2], got.moving[0, 2], pairs.moving[0, 2] != 0


def test_levels_change_by_a_line_within_the_foreground() -> None:
    for seed in range(4):
        before, after, there = changed(seed, intensity=1.0, intensity_scale=0.3, intensity_shift=0.2)
        factor, offset = np.polyfit(before[there], after[there], 1)
        assert 0.7 <= factor <= 1.3 and -0.2 <= offset <= 0.2 and abs(factor - 1) + abs(offset) > 1e-3
        np.testing.assert_allclose(after[there], factor * before[there] + offset, atol=1e-4)
        assert float(after[~there].abs().max()) == 0.0


def test_gamma_keeps_the_order_and_bends_the_line() -> None:
    before, after, there = changed(gamma=1.0, gamma_range=0.5)
    order = before[there].argsort()
    assert bool((after[there][order].diff() >= -1e-5).all())
    residual = after[there] - np.polyval(np.polyfit(before[there], after[there], 1), before[there])
    assert float(residual.abs().max()) > 0.05


def roughness(image: Tensor, axis: int) -> float:
    """Mean squared second difference along an axis."""
    return float(image.diff(n=2, dim=axis).square().mean())


def test_noise_is_white_and_bounded() -> None:
    levels = []
    for seed in range(6):
        before, after, there = changed(seed, noise=1.0, noise_level=0.4)
        factor, offset = np.polyfit(before[there], after[there], 1)
        residual = after - (factor * before + offset) * there
        levels.append(float(residual[there].std()) / factor)
        pairs = there[1:] & there[:-1]
        correlation = np.corrcoef(residual[1:][pairs], residual[:-1][pairs])[0, 1]
        assert abs(correlation) < 0.1
    assert max(levels) < 0.42 and np.ptp(levels) > 0.05


def smoothed(effect: str, size: float) -> np.ndarray[Any, Any]:
    """Roughness along each axis that is left of white noise without a background, a row a seed."""
    rows = []
    for seed in range(8):
        noise = normalized(torch.rand(1, 3, *SHAPE, generator=torch.Generator().manual_seed(1)) + 1.0)
        pairs = PairBatch(noise, noise, torch.ones(1, 3), torch.ones(1, 3))
        name = {"blur": "blur_mm", "resolution": "resolution_factor"}[effect]
        after = augment(pairs, AugmentConfig(**{effect: 1.0, name: size}), generators(1, seed), spec()).moving[0, 2]
        rows.append([roughness(after, k) / roughness(noise[0, 2], k) for k in range(3)])
    return np.array(rows)


def test_blur_smooths_all_axes_by_their_spacing() -> None:
    left = smoothed("blur", 4.0)
    assert left.min() < 0.3
    clear = left[left[:, 0] < 0.9]
    # Voxels of 1.5, 2 and 3 mm: the finer, the smoother.
    assert len(clear) >= 5 and bool((clear[:, 1] < clear[:, 0]).all()) and bool((clear[:, 0] < clear[:, 2]).all())


def test_thick_slices_smooth_one_axis() -> None:
    left = np.sort(smoothed("resolution", 6.0), axis=1)
    np.testing.assert_allclose(left[:, 1:], 1.0, atol=0.1)
    assert (left[:, 0] < 0.7).sum() >= 6
    assert len(set(smoothed("resolution", 6.0).argmin(axis=1).tolist())) > 1


def test_bias_is_smooth() -> None:
    pairs = batch()
    board = (torch.stack(torch.meshgrid(*(torch.arange(n) for n in SHAPE), indexing="ij")).sum(0) % 2).float()
    image = normalized((1.0 + board).mul(brain()).expand(2, 3, *SHAPE).clone())
    pairs = dataclasses.replace(pairs, moving=image, moving_present=torch.ones(2, 3))
    after = augment(pairs, AugmentConfig(bias=1.0, bias_strength=0.5), generators(2), spec()).moving[0, 2]
    there = brain()
    for axis in range(3):
        step = (after - after.roll(2, axis))[there & there.roll(2, axis)]
        assert float(step.abs().max()) < 0.5
    assert float(after[there & (board > 0)].std()) > 0.1


def test_channels_are_drawn_apart() -> None:
    pairs = batch(60)
    got = augment(pairs, AugmentConfig(gamma=0.5), generators(60), spec())
    moving = torch.stack([(got.moving[:, c] != pairs.moving[:, c]).flatten(1).any(1) for c in (0, 2)])
    fixed = torch.stack([(got.fixed[:, c] != pairs.fixed[:, c]).flatten(1).any(1) for c in (1, 2)])
    drawn = torch.cat([moving, fixed]).float()
    np.testing.assert_allclose(drawn.mean(dim=1), 0.5, atol=0.2)
    assert np.abs(np.corrcoef(drawn.numpy()) - np.eye(4)).max() < 0.45


# In a run -------------------------------------------------------------------------------------------------


class Kept:
    """The same two pairs, always."""

    def __len__(self) -> int:
        return 2

    def batch(self, index: int, size: int) -> PairBatch:
        return batch(size)


def losses_of_a_run(folder: Path, **changes: Any) -> dict[str, float]:
    """Loss of a step and of the validation after it, the weights all but standing still."""
    model = dataclasses.replace(
        spec(), architecture=Architecture(in_channels=3, base_channels=2, head="displacement", deep_supervision=1)
    )
    config = TrainConfig(
        model=model, optimizer=OptimizerConfig(learning_rate=1e-12), epochs=1, steps_per_epoch=1, validation_pairs=1,
        precision="fp32", log_every=1, **changes,
    )  # fmt: skip
    Trainer(config, Kept(), Kept(), folder).run()
    with (folder / "metrics.csv").open() as file:
        return {row["split"]: float(row["value"]) for row in csv.DictReader(file) if row["name"] == "loss"}


def test_a_run_augments_what_it_trains_with_and_nothing_else(tmp_path: Path) -> None:
    plain = losses_of_a_run(tmp_path / "plain")
    changed = losses_of_a_run(tmp_path / "changed", augment=EVERYTHING)
    assert set(plain) == {"train", "validation"}
    assert plain["validation"] == pytest.approx(changed["validation"], rel=1e-5)
    assert abs(plain["train"] - changed["train"]) > 1e-4


def test_a_run_counts_both_ways(tmp_path: Path) -> None:
    plain = losses_of_a_run(tmp_path / "plain")
    loss = LossConfig(similarity_measure="lncc", structure_dice=1.0, symmetric=1.0, inverse_consistency=1.0)
    both = losses_of_a_run(tmp_path / "both", loss=loss, augment=EVERYTHING)
    assert all(np.isfinite(value) and value > 0 for value in both.values())
    assert both["validation"] != pytest.approx(plain["validation"], rel=1e-3)


# Configuration --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {"drop_channel": 1.5}, {"affine": -0.1}, {"elastic": float("nan")}, {"noise": 2.0}, {"flip": (0.5, 0.0, 1.1)},
        {"elastic_mm": -1.0}, {"scale": 1.0}, {"resolution_factor": 0.5}, {"bias_control_mm": 0.0},
        {"noise_level": float("inf")},
    ],
)  # fmt: skip
def test_an_augmentation_that_makes_no_sense(change: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(change))):
        AugmentConfig(**change)
