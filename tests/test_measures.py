"""Volumes, determinants and similarity against formulas and numpy."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from jrs.geometry import Geometry
from jrs.runtime.measures import (
    jacobian_summary,
    ratios,
    similarity,
    volume_verdict,
    volumes_after_affine,
    warnings_of,
)
from jrs.runtime.preprocess import NetworkInput


def volumes(native: float, affine: float, moved: float) -> dict[str, dict[str, float]]:
    return {
        where: {"WT": ml, "TC": ml / 2, "ET": 0.0}
        for where, ml in (("native", native), ("affine", affine), ("moved", moved))
    }


def test_the_affine_alone_divides_by_its_determinant() -> None:
    # Atlas to case stretches by 1.25 x 0.8 x 2 and mirrors: a cube of 8 ml of the case is 4 ml on the atlas.
    affine = np.diag([-1.25, 0.8, 2.0, 1.0])
    affine[:3, 3] = (5.0, 6.0, 7.0)
    assert volumes_after_affine({"WT": 8.0}, affine) == pytest.approx({"WT": 4.0})


def test_ratios_have_none_for_nothing() -> None:
    assert ratios({"WT": 3.0, "ET": 1.0}, {"WT": 2.0, "ET": 0.0}) == {"WT": 1.5, "ET": None}


@pytest.mark.parametrize(
    ("native", "affine", "moved", "answer", "kept"),
    [
        (10.0, 12.0, 12.0, "kept", 100.0),
        (10.0, 12.0, 11.5, "kept", 95.83),
        (10.0, 12.0, 9.0, "shrunk", 75.0),
        (10.0, 12.0, 15.0, "grown", 125.0),
        (10.0, 12.0, 0.0, "shrunk", 0.0),
        (0.05, 0.06, 0.01, "too_small", 16.67),
        (0.0, 0.0, 0.0, "no_tumor", None),
        (0.0, 0.0, 1.0, "no_tumor", None),
    ],
)
def test_verdict(native: float, affine: float, moved: float, answer: str, kept: float | None) -> None:
    verdict = volume_verdict(volumes(native, affine, moved))
    assert verdict["answer"] == answer
    assert verdict["kept_percent"] == (None if kept is None else pytest.approx(kept, abs=0.01))
    assert verdict["text"].startswith({"shrunk": "Yes", "kept": "No:", "grown": "No:"}.get(answer, ""))
    assert ("took 25.0 %" in verdict["text"]) == (kept == 75.0)


def test_no_segmentation_no_verdict() -> None:
    assert volume_verdict(None)["answer"] == "not_computed"


@pytest.mark.parametrize(("moved", "answer"), [(7.0, "shrunk"), (13.0, "grown"), (10.0, "kept")])
def test_between_two_images_of_one_patient_a_tumour_may_have_changed(moved: float, answer: str) -> None:
    plain, followed = (volume_verdict(volumes(10.0, 10.0, moved), one_head) for one_head in (False, True))
    assert plain["answer"] == followed["answer"] == answer
    assert followed["text"].startswith(plain["text"])
    assert ("one patient" in followed["text"]) == (answer != "kept")


def test_determinants_inside_and_outside() -> None:
    rng = np.random.default_rng(3)
    jacobian = np.exp(rng.normal(0.0, 0.3, (10, 12, 14))).astype(np.float32)
    jacobian[5, 6, :2] = -0.5  # folds, inside the brain
    brain = np.zeros(jacobian.shape, dtype=bool)
    brain[2:8, 2:10, :] = True
    labels = np.zeros(jacobian.shape, dtype=np.uint8)
    labels[5:9, 5:9, :4] = 2  # a part of it outside the brain
    found = jacobian_summary(jacobian, brain, labels)
    assert found["folding_percent"] == pytest.approx(100.0 * 2 / (6 * 8 * 14))
    for key, mask in (("inside", labels > 0), ("outside", brain & (labels == 0))):
        values = np.sort(jacobian[mask].astype(np.float64))
        logs = [math.log(v) for v in values if v > 0]
        got = found[key]
        assert got["mean"] == pytest.approx(values.sum() / values.size, rel=1e-5)
        assert got["sd"] == pytest.approx(math.sqrt(((values - values.mean()) ** 2).mean()), rel=1e-5)
        assert got["log_mean"] == pytest.approx(sum(logs) / len(logs), rel=1e-4)
        assert np.searchsorted(values, got["p5"]) == pytest.approx(0.05 * values.size, abs=1.1)
        assert np.searchsorted(values, got["p95"]) == pytest.approx(0.95 * values.size, abs=1.1)
        assert got["log_p5"] < got["log_mean"] < got["log_p95"]
        assert found[f"{key}_tumor"] == got["mean"]


def test_without_tumour_or_with_nothing_but_folds() -> None:
    jacobian = np.full((4, 4, 4), -1.0, dtype=np.float32)
    found = jacobian_summary(jacobian, np.ones(jacobian.shape, dtype=bool), None)
    assert found["inside"] is None and found["inside_tumor"] is None
    assert found["folding_percent"] == 100.0
    assert found["outside"]["mean"] == -1.0 and found["outside"]["log_mean"] is None
    nowhere = jacobian_summary(jacobian, np.zeros(jacobian.shape, dtype=bool), None)
    assert nowhere["folding_percent"] == 0.0 and nowhere["outside"] is None


def network_input(images: Any, present: tuple[bool, ...]) -> NetworkInput:
    tensor = np.asarray(images, dtype=np.float32)
    return NetworkInput(tensor[None], present, Geometry(tensor.shape[1:], np.eye(4)))


def test_similarity_of_every_shared_modality_outside_the_tumour() -> None:
    rng = np.random.default_rng(5)
    fixed = rng.normal(size=(3, 12, 12, 12))
    fixed[:, :3] = 0.0  # outside the brain
    moving, moved = fixed + rng.normal(size=fixed.shape), fixed + 0.2 * rng.normal(size=fixed.shape)
    probabilities = np.zeros((2, 12, 12, 12), dtype=np.float32)
    probabilities[0] = 0.6
    probabilities[1, 8:] = 0.9
    moving[:, 8:] = rng.normal(size=moving[:, 8:].shape) * 50.0  # the tumour looks like nothing on the atlas
    channels = ("t1", "t2", "flair")
    found = similarity(
        network_input(moving, (True, True, True)),
        network_input(fixed, (True, False, True)),
        moved.astype(np.float32),
        probabilities,
        channels,
    )
    assert found is not None
    assert list(found["modalities"]) == ["t1", "flair"]
    for index, channel in ((0, "t1"), (2, "flair")):
        region = np.s_[index, 3:8]
        for when, image in (("before", moving), ("after", moved)):
            want = np.corrcoef(image[region].ravel(), fixed[region].ravel())[0, 1]
            assert found["modalities"][channel][when] == pytest.approx(want, abs=1e-3)
    assert (found["modality"], found["before"]) == ("t1", found["modalities"]["t1"]["before"])


def test_no_shared_modality_or_a_flat_image() -> None:
    image = np.random.default_rng(1).normal(size=(1, 12, 12, 12)).astype(np.float32)
    one, none = network_input(image, (True,)), network_input(image, (False,))
    assert similarity(one, none, image, None, ("t1",)) is None
    flat = network_input(np.full_like(image, 0.3), (True,))
    found = similarity(flat, one, image, None, ("t1",))
    assert found is not None and found["before"] is None and found["after"] == pytest.approx(1.0)


def test_warnings_name_what_is_wrong() -> None:
    fine = {"answer": "kept", "kept_percent": 99.0}
    better = {"modalities": {"t1": {"before": 0.5, "after": 0.7}}}
    assert warnings_of({"folding_percent": 0.1}, better, fine) == []
    assert warnings_of({"folding_percent": 0.1}, None, fine) == []
    worse = {"modalities": {"t1": {"before": 0.5, "after": 0.7}, "t2": {"before": 0.9, "after": 0.8}}}
    shrunk = {"answer": "shrunk", "kept_percent": 80.0}
    assert warnings_of({"folding_percent": 0.1}, better, shrunk) == [
        "the deformation shrank the whole tumour to 80.0 % of its volume"
    ]
    (followed,) = warnings_of({"folding_percent": 0.1}, better, shrunk, one_head=True)
    assert "80.0 %" in followed and "one patient's" in followed
    found = warnings_of({"folding_percent": 2.345}, worse, {"answer": "shrunk", "kept_percent": 80.0})
    assert len(found) == 3
    assert "2.35 %" in found[0] or "2.34 %" in found[0]
    assert "80.0 %" in found[1] and found[2].startswith("t2: ")
