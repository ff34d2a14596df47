"""Manifests of real cases, and the pairs made of them."""

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
from small_training import (
    SHAPE,
    SPACING,
    Array,
    model_spec,
    same,
)

from jrs.errors import (
    BadDataError,
    JrsError,
    MissingInputError,
)
from jrs.geometry import Geometry
from jrs.manifest import ModelSpec
from jrs.train.batch import pair_indices
from jrs.train.cases import CasePairs, TrainingCase, load_manifest
from jrs.volume import Volume

pytestmark = pytest.mark.usefixtures("one_thread")


# Manifests of real cases ------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A folder of empty files that manifests may name."""
    for name in ("a_t1.nii.gz", "a_flair.nii.gz", "a_seg.nii.gz", "b_t1.nii.gz"):
        (tmp_path / "data" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "data" / name).write_bytes(b"")
    return tmp_path


def test_a_csv_manifest(files: Path) -> None:
    absolute = files / "data" / "b_t1.nii.gz"
    (files / "cases.csv").write_text(
        f"case,t1,flair,seg\nA,data/a_t1.nii.gz,data/a_flair.nii.gz,data/a_seg.nii.gz\n,{absolute},,\n",
        encoding="utf-8-sig",
    )
    first, second = load_manifest(files / "cases.csv")
    data = files / "data"
    images = {"t1": data / "a_t1.nii.gz", "flair": data / "a_flair.nii.gz"}
    assert first == TrainingCase("A", images, data / "a_seg.nii.gz")
    assert second == TrainingCase("row-2", {"t1": absolute}, None)


def test_a_json_manifest(files: Path) -> None:
    value = [
        {"case": "A", "t1": "data/a_t1.nii.gz", "seg": "data/a_seg.nii.gz"},
        {"t1": "data/b_t1.nii.gz", "t2": ""},
    ]
    (files / "cases.json").write_text(json.dumps(value), encoding="utf-8")
    first, second = load_manifest(files / "cases.json")
    assert first == TrainingCase("A", {"t1": files / "data/a_t1.nii.gz"}, files / "data/a_seg.nii.gz")
    assert second == TrainingCase("row-2", {"t1": files / "data/b_t1.nii.gz"}, None)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("m.csv", "", ("lists no case",)),
        ("m.csv", "case,t1\n", ("lists no case",)),
        ("m.csv", "case,t1,pd\nA,data/a_t1.nii.gz,x\n", ("'pd'", "t1ce")),
        ("m.csv", "case,t1\nA,data/a_t1.nii.gz\nB,\n", ("row 2", "case B", "no image")),
        ("m.csv", "case,t1,seg\nA,,data/a_seg.nii.gz\n", ("row 1", "no image")),
        ("m.csv", "case,t1\nA,data/a_t1.nii.gz,more\n", ("row 1", "cells")),
        ("m.csv", b"\xff\xfe\x00case", ("CSV or JSON",)),
        ("m.json", "{", ("CSV or JSON",)),
        ("m.json", "{}", ("lists no case",)),
        ("m.json", '["a"]', ("lists no case",)),
        ("m.json", "[]", ("lists no case",)),
        ("m.json", '[{"case": "A", "T1": "data/a_t1.nii.gz"}]', ("'T1'",)),
        ("m.json", '[{"case": "A"}]', ("row 1", "case A", "no image")),
    ],
)
def test_a_bad_manifest(files: Path, name: str, content: str | bytes, words: tuple[str, ...]) -> None:
    (files / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(BadDataError) as caught:
        load_manifest(files / name)
    message = str(caught.value)
    assert message.startswith(str(files / name)) and "\n" not in message
    assert all(word in message for word in words), message


def test_a_manifest_that_names_what_is_not_there(files: Path) -> None:
    (files / "m.csv").write_text("case,t1\nA,data/a_t1.nii.gz\nB,data/none.nii.gz\n")
    with pytest.raises(MissingInputError, match=r"none\.nii\.gz: no such file \(row 2, case B of "):
        load_manifest(files / "m.csv")
    for path in (files / "no.csv", files):
        with pytest.raises(MissingInputError, match="no such manifest"):
            load_manifest(path)


# Pairs of real cases ----------------------------------------------------------------------------------------


def case_image(seed: int) -> Array:
    """Positive everywhere, so that the foreground is the whole grid."""
    return np.random.default_rng(seed).uniform(50.0, 150.0, SHAPE).astype(np.float32)


def case_labels(seed: int, values: tuple[int, ...] = (0, 1, 2, 4)) -> Array:
    return np.random.default_rng(seed).choice(values, SHAPE).astype(np.int16)


AFFINE = Geometry.aligned(SHAPE, SPACING, (3.0, -2.0, 1.0)).affine


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, Array], Path]:
    def put(name: str, data: Array) -> Path:
        image = nib.Nifti1Image(data, AFFINE)
        image.header.set_xyzt_units("mm")
        image.set_sform(AFFINE, code=1)
        image.set_qform(AFFINE, code=1)
        nib.save(image, tmp_path / f"{name}.nii.gz")
        return tmp_path / f"{name}.nii.gz"

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
