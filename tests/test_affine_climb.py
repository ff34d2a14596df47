"""Mutual information and its derivative against the definition, and the ascent."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from jrs.geometry import Geometry
from jrs.runtime import native
from jrs.runtime.affine_climb import BINS, Metric, Steps, climb
from jrs.runtime.affine_search import Block, rotation_of
from jrs.runtime.sampling import sample

Make = Callable[..., Block]
SHAPE = (46, 52, 44)
SPACING = 2.5
A = np.array([[1.02, 0.03, -0.02, 1.3], [-0.04, 0.97, 0.05, -2.1], [0.01, -0.03, 1.04, 0.9], [0.0, 0.0, 0.0, 1.0]])


@pytest.fixture(scope="module")
def block(helpers: Any) -> Make:
    """Makes the phantom head at y = matrix x, on a grid about the origin of the world."""

    def make(matrix: np.ndarray, contrast: int = 0) -> Block:
        grid = Geometry.aligned(SHAPE, (SPACING,) * 3, np.zeros(3))
        data = helpers.head(helpers.world_points(np.linalg.inv(matrix) @ grid.affine, SHAPE), contrast)
        return Block(np.maximum(data, 0.0).astype(np.float32), grid)

    return make


def by_definition(metric: Metric, matrix: np.ndarray) -> float:
    """I by the sums of the module's first lines, in FP64 with the spline written out, from the metric's own samples."""
    points = metric._points.astype(np.float64) + metric.center[:, None]
    moved = metric._to_moving @ matrix @ np.vstack([points, np.ones(points.shape[1])])
    q = sample(metric._moving[None], moved[:3].astype(np.float32), -1.0)[0].astype(np.float64)
    inside = q >= 0
    u = np.abs(np.arange(BINS)[:, None] - q[inside])
    spline = np.where(u < 1, (4 - 6 * u**2 + 3 * u**3) / 6, np.where(u < 2, (2 - u) ** 3 / 6, 0.0))
    joint = np.stack([spline[:, metric._bins[inside] == f].sum(axis=1) for f in range(BINS)]) / inside.sum()
    outer = joint.sum(axis=1)[:, None] * joint.sum(axis=0)
    there = joint > 0
    return float((joint[there] * np.log(joint[there] / outer[there])).sum())


@pytest.mark.parametrize("contrast", [0, 1])
def test_mutual_information_is_what_its_definition_says(kernels: str, contrast: int, block: Make) -> None:
    metric = Metric(block(A, contrast), block(np.eye(4)), threads=1)
    for matrix in (A, np.eye(4)):
        assert metric(matrix)[0] == pytest.approx(by_definition(metric, matrix), abs=2e-5)
    assert metric(A)[0] > metric(np.eye(4))[0] + 0.3


def test_it_agrees_with_simpleitk(block: Make) -> None:
    """Whose bins reach from the smallest to the largest intensity, and whose samples are the voxels."""
    sitk = pytest.importorskip("SimpleITK")
    moving, fixed = block(A), block(np.eye(4))
    images = []
    for one in (fixed, moving):
        image = sitk.GetImageFromArray(one.data.transpose(2, 1, 0))
        image.SetSpacing(list(one.grid.spacing))
        image.SetOrigin(one.grid.affine[:3, 3].tolist())
        images.append(image)
    method = sitk.ImageRegistrationMethod()
    method.SetMetricAsMattesMutualInformation(BINS)
    method.SetInterpolator(sitk.sitkLinear)
    metric = Metric(moving, fixed, threads=1)
    ours, theirs = [], []
    for share in (0.0, 0.5, 1.0):
        matrix = (1 - share) * np.eye(4) + share * A
        transform = sitk.AffineTransform(3)
        transform.SetMatrix(matrix[:3, :3].ravel().tolist())
        transform.SetTranslation(matrix[:3, 3].tolist())
        method.SetInitialTransform(transform)
        theirs.append(-method.MetricEvaluate(*images))
        ours.append(metric(matrix)[0])
    np.testing.assert_allclose(ours, theirs, rtol=0.1)
    assert np.corrcoef(ours, theirs)[0, 1] > 0.99


def test_the_slope_is_the_derivative(kernels: str, block: Make) -> None:
    """Of the value, by central differences, where no sample leaves the moving block."""
    moving = block(A)
    beyond = Geometry.aligned(tuple(n + 12 for n in SHAPE), (SPACING,) * 3, np.zeros(3))
    metric = Metric(Block(np.pad(moving.data, 6), beyond), block(np.eye(4)), threads=1)
    slope = metric(np.eye(4))[1]
    for row in range(3):
        for column in range(4):
            h = 0.05 if column == 3 else 0.05 / metric.reach_mm[column]
            values = []
            for sign in (1.0, -1.0):
                linear, shift = np.eye(3), metric.center.copy()
                if column == 3:
                    shift[row] += sign * h
                else:
                    linear[row, column] += sign * h
                changed = np.eye(4)
                changed[:3, :3], changed[:3, 3] = linear, shift - linear @ metric.center
                values.append(metric(changed)[0])
            reach = 1.0 if column == 3 else metric.reach_mm[column]
            found = (values[0] - values[1]) / (2 * h)
            assert slope[row, column] / reach == pytest.approx(found / reach, abs=0.02 * np.abs(slope[:, 3]).max())


def test_the_kernels_give_what_numpy_gives(monkeypatch: pytest.MonkeyPatch, block: Make) -> None:
    if not native.available():
        pytest.skip("no compiled kernels")
    ours = Metric(block(A), block(np.eye(4)), every=2, threads=1)(np.eye(4))
    monkeypatch.setenv("JRS_KERNELS", "off")
    theirs = Metric(block(A), block(np.eye(4)), every=2, threads=1)(np.eye(4))
    assert ours[0] == pytest.approx(theirs[0], abs=1e-6)
    np.testing.assert_allclose(ours[1], theirs[1], atol=1e-4 * np.abs(theirs[1]).max())


def test_the_result_does_not_depend_on_the_threads(block: Make) -> None:
    """To the last bit, of more samples than one thread takes."""
    pair = block(A), block(np.eye(4))
    twice = np.ones((2, 2, 2), dtype=np.float32)
    large = [Block(np.kron(one.data, twice), one.grid.refined((2, 2, 2))) for one in pair]
    one, two, many = (Metric(*large, threads=threads)(np.eye(4)) for threads in (1, 2, 7))
    for other in (two, many):
        assert other[0] == one[0]
        np.testing.assert_array_equal(other[1], one[1])


@pytest.mark.parametrize("contrast", [0, 1])
def test_the_ascent_finds_the_affine(kernels: str, contrast: int, block: Make) -> None:
    metric = Metric(block(A, contrast), block(np.eye(4)), threads=1)
    found = climb(metric, np.eye(4), False, Steps(4.0, 0.02))
    corners = np.array([[a, b, c, 1.0] for a in (-30, 30) for b in (-35, 35) for c in (-25, 25)]).T
    apart = np.linalg.norm(((found - A) @ corners)[:3], axis=0)
    assert apart.max() < 1.0 and np.linalg.norm(((np.eye(4) - A) @ corners)[:3], axis=0).max() > 4.0


def test_the_ascent_finds_the_rotation(kernels: str, block: Make) -> None:
    truth = np.eye(4)
    truth[:3, :3], truth[:3, 3] = rotation_of(np.radians([4.0, -3.0, 5.0])), (2.0, -3.0, 1.0)
    metric = Metric(block(truth), block(np.eye(4)), threads=1)
    found = climb(metric, np.eye(4), True, Steps(4.0, 0.02))
    np.testing.assert_allclose(found[:3, :3] @ found[:3, :3].T, np.eye(3), atol=1e-9)
    turn = found[:3, :3] @ truth[:3, :3].T
    assert np.degrees(np.arccos(np.clip((np.trace(turn) - 1) / 2, -1, 1))) < 0.5
    np.testing.assert_allclose((found - truth)[:3] @ np.r_[metric.center, 1.0], 0.0, atol=0.4)


def test_the_best_on_the_way_is_returned(block: Make) -> None:
    """Never worse than the start, even where every step is far too long."""
    metric = Metric(block(A), block(np.eye(4)), threads=1)
    assert metric(climb(metric, A, False, Steps(30.0, 20.0)))[0] >= metric(A)[0]


def test_images_apart_are_refused(kernels: str, block: Make) -> None:
    far = np.eye(4)
    far[:3, 3] = 300.0
    with pytest.raises(ValueError, match="overlap"):
        climb(Metric(block(A), block(np.eye(4)), threads=1), far, False, Steps(4.0, 0.1))


def test_no_number_does_no_harm(kernels: str, block: Make) -> None:
    """A voxel that is no number takes no part, nor do the samples beside it."""
    moving, fixed = block(A), block(np.eye(4))
    holed = moving.data.copy()
    holed[20:23, 20:23, 20:23] = np.nan
    value, slope = Metric(Block(holed, moving.grid), fixed, threads=1)(np.eye(4))
    assert np.isfinite(value) and np.isfinite(slope).all()
    assert value == pytest.approx(Metric(moving, fixed, threads=1)(np.eye(4))[0], abs=0.01)
