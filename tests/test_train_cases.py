"""Pairs of real cases, in memory and from a cache: what a batch holds, and that it depends on its number alone."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch

from jrs.architecture import Architecture
from jrs.errors import BadDataError, ConfigurationError, JrsError, OutOfMemoryError
from jrs.geometry import Geometry
from jrs.manifest import GridSpec, ModelSpec
from jrs.train.batch import PairBatch, pair_indices
from jrs.train.cache_build import build_cache
from jrs.train.cases import CasePairs, Cohort, MemoryCases, check_apart, real_pairs
from jrs.train.config import TrainConfig
from jrs.train.datasets import ImageFile, TrainingCase
from jrs.train.datasets.manifest import write_manifest
from jrs.volume import Volume

Array = np.ndarray[Any, Any]

SHAPE = (16, 16, 32)
SPACING = (8.0, 8.0, 4.0)


def model_spec(channels: tuple[str, ...] = ("t1", "flair"), optional: Any = None, num_labels: int = 4) -> ModelSpec:
    architecture = Architecture(in_channels=len(channels), base_channels=2, num_labels=num_labels)
    return ModelSpec(
        architecture,
        channels,
        channels if optional is None else optional,
        GridSpec(SHAPE, SPACING),
        labels=ModelSpec().labels if num_labels else (),
        label_values=(0, 1, 2, 4) if num_labels else (),
    )


def same(a: PairBatch, b: PairBatch) -> bool:
    """Whether all tensors of two batches are equal."""
    pairs = [(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(a)]
    return all(x is y is None or torch.equal(x, y) for x, y in pairs)


# Pairs of real cases ----------------------------------------------------------------------------------------


def case_image(seed: int) -> Array:
    """Positive everywhere, so that the foreground is the whole grid."""
    return np.random.default_rng(seed).uniform(50.0, 150.0, SHAPE).astype(np.float32)


def case_labels(seed: int, values: tuple[int, ...] = (0, 1, 2, 4)) -> Array:
    return np.random.default_rng(seed).choice(values, SHAPE).astype(np.int16)


AFFINE = Geometry.aligned(SHAPE, SPACING, (3.0, -2.0, 1.0)).affine


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, Array], ImageFile]:
    def put(name: str, data: Array) -> ImageFile:
        image = nib.Nifti1Image(data, AFFINE)
        image.header.set_xyzt_units("mm")
        image.set_sform(AFFINE, code=1)
        image.set_qform(AFFINE, code=1)
        nib.save(image, tmp_path / f"{name}.nii.gz")
        return ImageFile(tmp_path / f"{name}.nii.gz")

    return put


def case_pairs(cases: list[TrainingCase], spec: ModelSpec | None = None) -> CasePairs:
    """On an atlas that covers the grid, so that voxels meet voxels."""
    atlas = Volume(np.full(SHAPE, 100.0, dtype=np.float32), Geometry(SHAPE, AFFINE))
    return CasePairs(cases, spec or model_spec(), atlas, seed=0)


def test_cases_are_normalised_and_paired(write: Any) -> None:
    images = {name: case_image(seed) for seed, name in enumerate(("a_t1", "a_flair", "b_t1"))}
    paths = {name: write(name, data) for name, data in images.items()}
    seg = write("a_seg", case_labels(1))
    cases = [
        TrainingCase("a", {"t1": paths["a_t1"], "flair": paths["a_flair"]}, seg),
        TrainingCase("b", {"t1": paths["b_t1"]}, None),
    ]
    pairs = case_pairs(cases)
    assert len(pairs) == 2
    batch, (order,) = pairs.batch(0, 1), pair_indices(0, 1, 2, 0)
    assert pairs.names(0, 1) == [("ab"[order[0]], "ab"[order[1]])]
    sides = {
        order[0]: (batch.moving, batch.moving_present, batch.moving_tumor),
        order[1]: (batch.fixed, batch.fixed_present, batch.fixed_tumor),
    }
    assert set(sides) == {0, 1}
    for index, names in ((0, ("a_t1", "a_flair")), (1, ("b_t1", None))):
        image, present, tumor = sides[index]
        assert image.shape == (1, 2, *SHAPE) and image.dtype == torch.float32
        assert present.tolist() == [[float(name is not None) for name in names]]
        for channel, name in enumerate(names):
            if name is None:
                assert not image[0, channel].any()
                continue
            data = images[name].astype(np.float64)
            # Kept as float16.
            np.testing.assert_allclose(
                image[0, channel].numpy(), (data - data.mean()) / data.std(), atol=4e-3
            )
        expected = (
            np.select([case_labels(1) == v for v in (1, 2, 4)], [1, 2, 3])
            if index == 0
            else np.full(SHAPE, -1)
        )
        assert tumor is not None and tumor.dtype == torch.int64
        np.testing.assert_array_equal(tumor[0].numpy(), expected)
    assert same(case_pairs(cases).batch(0, 1), batch)


@pytest.mark.parametrize("enhancing", [3, 4])
def test_enhancing_tumour_is_three_or_four(write: Any, enhancing: int) -> None:
    labels = case_labels(2, (0, 1, 2, enhancing))
    case = TrainingCase("a", {"t1": write("t1", case_image(0))}, write("seg", labels))
    batch = case_pairs([case, case]).batch(0, 1)
    assert batch.moving_tumor is not None
    expected = np.where(labels == enhancing, 3, labels)
    np.testing.assert_array_equal(batch.moving_tumor[0].numpy(), expected)


def test_a_model_that_writes_three_does_not_know_four(write: Any) -> None:
    spec = dataclasses.replace(model_spec(), label_values=(0, 1, 2, 3))
    image = {"t1": write("t1", case_image(0))}
    good = TrainingCase("a", image, write("good", case_labels(2, (0, 1, 2, 3))))
    batch = case_pairs([good, good], spec).batch(0, 1)
    assert batch.moving_tumor is not None
    np.testing.assert_array_equal(batch.moving_tumor[0].numpy(), case_labels(2, (0, 1, 2, 3)))
    bad = TrainingCase("b", image, write("bad", case_labels(2, (0, 1, 2, 4))))
    with pytest.raises(BadDataError, match="label 4 is unknown"):
        case_pairs([bad, bad], spec).batch(0, 1)


@pytest.mark.parametrize("value", [5, -1, 255])
def test_an_unknown_label_names_the_file(write: Any, value: int) -> None:
    labels = case_labels(3)
    labels[0, 0, 0] = value
    path = write("seg", labels)
    case = TrainingCase("a", {"t1": write("t1", case_image(0))}, path)
    with pytest.raises(BadDataError, match=rf"^{path}: label {value} is unknown; [^\n]+$"):
        case_pairs([case, case]).batch(0, 1)


def test_without_a_segmentation_decoder_no_labels_are_read(write: Any) -> None:
    case = TrainingCase("a", {"t1": write("t1", case_image(0))}, write("seg", np.full(SHAPE, 77, np.int16)))
    batch = case_pairs([case, case], model_spec(num_labels=0)).batch(0, 1)
    assert batch.moving_tumor is None and batch.fixed_tumor is None


def test_a_modality_that_the_model_needs(write: Any) -> None:
    case = TrainingCase("a", {"flair": write("flair", case_image(0))}, None)
    with pytest.raises(JrsError, match="t1"):
        case_pairs([case, case], model_spec(optional=("flair",))).batch(0, 1)


# Structures -------------------------------------------------------------------------------------------------


def case_aseg(seed: int) -> Array:
    return np.random.default_rng(seed).choice([0, 2, 41, 77], SHAPE).astype(np.int16)


def test_structures_are_compact_and_zero_where_a_case_has_none(write: Any) -> None:
    aseg = case_aseg(0)
    labelled = TrainingCase("a", {"t1": write("a_t1", case_image(0))}, structures=write("a_aseg", aseg))
    other = TrainingCase("b", {"t1": write("b_t1", case_image(1))})
    batch, (order,) = case_pairs([labelled, other]).batch(0, 1), pair_indices(0, 1, 2, 0)
    sides = dict(zip(order, (batch.moving_structures, batch.fixed_structures), strict=True))
    assert sides[0] is not None and sides[0].dtype == torch.uint8 and sides[0].shape == (1, *SHAPE)
    # Left and right white matter are 1 and 14 of jrs.structures; 77 is not scored.
    np.testing.assert_array_equal(sides[0][0].numpy(), np.select([aseg == 2, aseg == 41], [1, 14]))
    assert sides[1] is not None and not sides[1].any()
    assert case_pairs([other, other]).batch(0, 1).moving_structures is None


# From a cache -----------------------------------------------------------------------------------------------


@pytest.fixture
def cohort(write: Any, tmp_path: Path) -> Callable[..., Cohort]:
    """Five cases and an atlas on one grid; ``make(True)`` opens their cache, ``make(False)`` their manifest."""
    cases = []
    for k in range(5):
        images = {m: write(f"c{k}_{m}", case_image(10 * k + i)) for i, m in enumerate(("t1", "flair"))}
        seg = write(f"c{k}_seg", case_labels(k)) if k else None
        structures = write(f"c{k}_aseg", case_aseg(k)) if k == 1 else None
        cases.append(TrainingCase(f"c{k}", images, seg, subject=f"s{k // 2}", structures=structures))
    write_manifest(tmp_path / "cases.csv", cases)
    atlas = write("atlas", np.full(SHAPE, 100.0, np.float32) + np.arange(SHAPE[2], dtype=np.float32)).path

    def make(cached: bool, model: ModelSpec | None = None) -> Cohort:
        if not cached:
            return Cohort.open(tmp_path / "cases.csv", "auto", model or model_spec(), atlas)
        build_cache(cases, model_spec(), atlas, tmp_path / "cache")
        return Cohort.open(tmp_path / "cache", "auto", model or model_spec(), atlas)

    return make


def names(cohort: Cohort) -> list[str]:
    return [case.name for case in cohort.cases]


def test_cached_and_prepared_pairs_are_the_same_bits(cohort: Any, tmp_path: Path) -> None:
    atlas = tmp_path / "atlas.nii.gz"
    cached, direct = (cohort(kind).pairs(names(cohort(kind)), model_spec(), atlas, 3) for kind in (True, False))
    assert len(cached) == len(direct) == 5
    for index in (0, 4, 1, 0):
        assert same(cached.batch(index, 2), direct.batch(index, 2))


def test_a_batch_depends_on_its_number_and_the_seed_alone(cohort: Any, tmp_path: Path) -> None:
    opened, atlas = cohort(True), tmp_path / "atlas.nii.gz"
    pairs = opened.pairs(names(opened), model_spec(), atlas, 3)
    batches = [pairs.batch(index, 2) for index in range(4)]
    again = opened.pairs(names(opened), model_spec(), atlas, 3)
    assert all(same(again.batch(index, 2), batches[index]) for index in (3, 1, 2, 0))
    assert not same(opened.pairs(names(opened), model_spec(), atlas, 4).batch(0, 2), batches[0])
    batches[0].moving.zero_()  # what a step does to its batch does not reach the cache
    assert same(pairs.batch(1, 2), batches[1]) and pairs.batch(0, 2).moving.any()


def test_unknown_tumour_of_a_cached_case(cohort: Any, tmp_path: Path) -> None:
    opened = cohort(True)
    batch = opened.pairs(["c0", "c1"], model_spec(), tmp_path / "atlas.nii.gz", 0).batch(0, 2)
    tumours = torch.cat([batch.moving_tumor, batch.fixed_tumor])
    assert tumours.dtype == torch.int64
    assert sorted({tuple(t.unique().tolist()) for t in tumours}) == [(-1,), (0, 1, 2, 3)]


def test_a_network_of_one_channel_on_a_cache_of_two(cohort: Any, tmp_path: Path) -> None:
    one = model_spec(("flair",), (), num_labels=0)
    atlas = tmp_path / "atlas.nii.gz"
    opened = cohort(True, one)
    batch = opened.pairs(names(opened), one, atlas, 3).batch(0, 2)
    both = cohort(True).pairs(names(opened), model_spec(), atlas, 3).batch(0, 2)
    assert batch.moving.shape == (2, 1, *SHAPE) and batch.moving_tumor is None
    assert torch.equal(batch.moving, both.moving[:, 1:])


def test_a_cache_for_another_network_is_not_opened(cohort: Any) -> None:
    other = dataclasses.replace(model_spec(), grid=GridSpec(SHAPE, (8.0, 8.0, 5.0)))
    with pytest.raises(ConfigurationError, match="another grid"):
        cohort(True, other)


def test_fewer_than_two_cases(cohort: Any, tmp_path: Path) -> None:
    with pytest.raises(BadDataError, match="1 cases make no pair"):
        cohort(False).pairs(["c0"], model_spec(), tmp_path / "atlas.nii.gz", 0)


def test_unusable_cases_are_refused_before_the_first_is_prepared(cohort: Any, tmp_path: Path) -> None:
    atlas = tmp_path / "atlas.nii.gz"
    opened = cohort(False)
    opened.cases[2] = dataclasses.replace(opened.cases[2], images={"t1": opened.cases[2].images["t1"]})
    with pytest.raises(BadDataError, match=r"1 of 5 cases cannot be used \(c2: lacks flair[^\n]+jrs data scan"):
        opened.pairs(names(opened), model_spec(optional=()), atlas, 0)
    opened.pairs(names(opened), model_spec(), atlas, 0)
    image = tmp_path / "c3_t1.nii.gz"
    image.write_bytes(image.read_bytes()[:-100])
    with pytest.raises(BadDataError, match=rf"1 of 5 cases cannot be used \(c3: t1: {image}: is cut off"):
        opened.pairs(names(opened), model_spec(), atlas, 0)


def test_a_validation_folder_that_shares_a_subject_or_an_image(cohort: Any, tmp_path: Path) -> None:
    train = cohort(False)
    check_apart(
        dataclasses.replace(train, cases=train.cases[:4]), dataclasses.replace(train, cases=train.cases[4:])
    )  # subjects s0, s1 and s2
    with pytest.raises(BadDataError, match=r"train and validation share 1 subject \(s1\)"):
        check_apart(
            dataclasses.replace(train, cases=train.cases[:3]), dataclasses.replace(train, cases=train.cases[3:])
        )
    copy = tmp_path / "copy.nii.gz"
    copy.write_bytes((tmp_path / "c0_t1.nii.gz").read_bytes())
    held = dataclasses.replace(train, cases=[TrainingCase("x", {"t1": ImageFile(copy)})])
    with pytest.raises(BadDataError, match=r"share 1 image \(train: c0 and validation: x\)"):
        check_apart(train, held)


def test_a_resumed_run_keeps_its_splits(cohort: Any, tmp_path: Path) -> None:
    """As drawn by the first seed, whatever the configuration says later; other splits are refused."""
    cohort(False)
    first, later = (TrainConfig(model=model_spec(), seed=seed, validation_share=0.3) for seed in (0, 1))
    data, atlas, out = tmp_path / "cases.csv", tmp_path / "atlas.nii.gz", tmp_path / "run"
    said: list[str] = []
    train, held = real_pairs(data, None, first, atlas, out, say=said.append)
    assert said == [f"cases: {len(train)} to train on, {len(held)} to validate on, 0 for testing"]
    stored = (out / "splits.json").read_bytes()
    again = real_pairs(data, None, later, atlas, out, resume=True)
    assert (out / "splits.json").read_bytes() == stored
    assert set(sum(again[0].names(0, len(again[0])), ())) == set(sum(train.names(0, len(train)), ()))
    others = tmp_path / "others.json"
    others.write_text(json.dumps({"train": ["c4", "s0"], "validation": ["s1"]}))
    with pytest.raises(ConfigurationError, match=rf"^{others}: differs from {out}/splits\.json"):
        real_pairs(data, None, later, atlas, out, resume=True, splits=others)
    given, _ = real_pairs(data, None, later, atlas, tmp_path / "new", splits=others)
    assert set(sum(given.names(0, 3), ())) == {"c4", "c0", "c1"}


def test_more_cases_than_memory(write: Any) -> None:
    case = TrainingCase("a", {"t1": write("t1", case_image(0))})
    atlas = Volume(np.full(SHAPE, 100.0, dtype=np.float32), Geometry(SHAPE, AFFINE))
    with pytest.raises(OutOfMemoryError, match=r"^\d+ cases need [\d.]+ GB[^\n]+jrs data prepare"):
        MemoryCases([case] * 100, dataclasses.replace(model_spec(), grid=GridSpec((4096, 4096, 4096))), atlas)
