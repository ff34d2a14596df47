"""Tumours in the refinement: not compared, rigid, and without a say in the field."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy import ndimage

from jrs.fields import DisplacementField, jacobian_determinant
from jrs.geometry import Geometry
from jrs.runtime.cases import Case
from jrs.runtime.refine import Refiner
from jrs.runtime.sampling import affine_coords
from jrs.runtime.tumors import Tumors, drop_doubtful, drop_specks, drop_traces
from jrs.volume import Volume

Array = np.ndarray[Any, Any]
SPACING = (2.0, 3.0, 2.5)
SHAPE = (50, 36, 40)


@pytest.fixture
def grid(helpers: Any) -> Geometry:
    return Geometry(SHAPE, helpers.grid_affine(SHAPE, SPACING, "LAS", (5.0, 0.0, 8.0), (3.0, 4.0, 5.0)))


def ball(grid: Geometry, center: tuple[float, float, float], radius: float) -> Array:
    points = affine_coords(grid.shape, grid.affine)
    return np.linalg.norm(points - np.array(center).reshape(3, 1, 1, 1), axis=0) <= radius


def probabilities(mask: Array) -> Array:
    """Three classes; those of the tumour take turns."""
    turn = np.indices(mask.shape).sum(axis=0) % 2 == 0
    return np.stack([~mask, mask & turn, mask & ~turn]).astype(np.float32)


def test_none_found(grid: Geometry) -> None:
    points = affine_coords(grid.shape, grid.affine)
    for tumors in (Tumors.found(None, grid), Tumors.found(probabilities(np.zeros(SHAPE, bool)), grid)):
        assert tumors.mask is None
        assert np.all(tumors.weights_at(points, 2.0) == 1.0)
        u = np.random.default_rng(0).normal(size=(3, *SHAPE)).astype(np.float32)
        assert np.array_equal(tumors.stiffened(u, grid), u)


def test_regions_too_small_to_be_believed_become_background(grid: Geometry) -> None:
    """By scipy's components, corners included; what stays keeps its classes."""
    rng = np.random.default_rng(3)
    mask = ball(grid, (-20, -15, 0), 11) | ball(grid, (20, 20, 10), 5) | (rng.random(SHAPE) > 0.995)
    labels, count = ndimage.label(mask, np.ones((3, 3, 3)))
    ml = np.prod(SPACING) / 1000
    sizes = np.bincount(labels.ravel())[1:] * ml
    assert count > 50 and (sizes > 1.0).sum() == 1 and ((sizes > 0.3) & (sizes < 1.0)).sum() >= 1
    for least in (0.0, 0.3, 1.0, 99.0):
        given = probabilities(mask)
        dropped = drop_doubtful(given, grid.voxel_volume_ml, least, 0.0)
        kept = np.isin(labels, 1 + np.flatnonzero(sizes >= least))
        np.testing.assert_array_equal(given, np.where(kept, probabilities(mask), probabilities(np.zeros(SHAPE, bool))))
        assert dropped == pytest.approx(sizes[sizes < least].sum())


def test_crumbs_on_a_written_grid_are_swept_up() -> None:
    """Regions below 0.05 ml of the patient's, on either grid; 5000 voxels of 1 mm3, then of 0.5 mm3, are one."""
    values = (0, 1, 2, 4)
    grids = []
    for voxel_ml in (1e-3, 0.5e-3):
        labels = np.zeros((40, 40, 40), dtype=np.uint8)
        labels[5:25, 5:25, 5:20], labels[10:20, 10:20, 10:14] = 2, 4
        labels[30:34, 30:34, 30:33] = 2  # 48 voxels: 0.048 ml, and half of that
        labels[30:34, 30:34, 2:6] = 1  # 64 voxels: 0.064 ml, and 0.032 times the scale
        grids.append((labels, voxel_ml))
    drop_specks(grids, values, 2.0)
    for labels, _ in grids:
        assert (labels[30:34, 30:34, 30:33] == 0).all() and (labels[30:34, 30:34, 2:6] == 1).all()
        assert np.count_nonzero(labels == 2) == 6000 - 400 and np.count_nonzero(labels == 4) == 400
    grids[1][0][30:34, 30:34, 2:6] = 1
    drop_specks(grids, values, 1.0)
    assert not (grids[1][0] == 1).any() and (grids[0][0] == 1).any()


def test_a_trace_of_enhancement_goes_on_both_grids_or_on_neither() -> None:
    values = (0, 1, 2, 3)
    for voxels, kept in ((199, False), (200, True)):
        native, moved = (np.full((20, 20, 20), 2, dtype=np.uint8) for _ in range(2))
        native.reshape(-1)[:voxels], moved.reshape(-1)[:300] = 3, 3
        drop_specks([(native, 1e-3), (moved, 1e-3)], values, 1.0)
        assert (native == 3).any() == (moved == 3).any() == kept
        assert kept or (np.count_nonzero(native == 1), np.count_nonzero(moved == 1)) == (voxels, 300)


def test_nothing_found_is_nothing_dropped(grid: Geometry) -> None:
    given = probabilities(np.zeros(SHAPE, bool))
    assert drop_doubtful(given, grid.voxel_volume_ml, 1.0, 0.8) == 0.0 and (given[0] == 1.0).all()


@pytest.mark.parametrize(("certainty", "kept"), [(0.0, (True, True)), (0.8, (True, False)), (0.95, (False, False))])
def test_regions_of_little_certainty_are_dropped(grid: Geometry, certainty: float, kept: tuple[bool, bool]) -> None:
    """Two balls, tumour by 0.9 and 0.7 in the mean, each with voxels that are certain."""
    balls = [ball(grid, (-25.0, 0.0, 8.0), 12.0), ball(grid, (25.0, 0.0, 8.0), 12.0)]
    assert not (balls[0] & balls[1]).any()
    given = probabilities(np.zeros(SHAPE, bool))
    for where, mean in zip(balls, (0.9, 0.7), strict=True):
        count = int(where.sum())
        tumor = np.full(count, 0.6)
        tumor[: round(count * (mean - 0.6) / 0.4)] = 1.0
        assert tumor.mean() == pytest.approx(mean, abs=0.01)
        given[0, where], given[1, where], given[2, where] = 1.0 - tumor, tumor, 0.0
    before = given.copy()
    dropped = drop_doubtful(given, grid.voxel_volume_ml, 0.05, certainty)
    gone = np.zeros(SHAPE, bool)
    for where, stays in zip(balls, kept, strict=True):
        gone |= where & (not stays)
    np.testing.assert_array_equal(given, np.where(gone, probabilities(np.zeros(SHAPE, bool)), before))
    assert dropped == pytest.approx(gone.sum() * grid.voxel_volume_ml)


@pytest.mark.parametrize(("voxels", "kept"), [(0, False), (13, False), (14, True), (200, True)])
def test_traces_of_enhancement_become_core(grid: Geometry, voxels: int, kept: bool) -> None:
    """0.2 ml are 13.3 of these voxels. No other voxel changes its class, and probabilities go on adding up to 1."""
    rng = np.random.default_rng(5)
    given = rng.dirichlet((4.0, 3.0, 3.0, 3.0), size=SHAPE).transpose(3, 0, 1, 2).astype(np.float32)
    given[3] = np.minimum(given[3], 0.99 * given[:3].max(axis=0))
    given[3].reshape(-1)[rng.choice(given[0].size, voxels, replace=False)] = 2.0
    given /= given.sum(axis=0)
    before = given.copy()
    drop_traces(given, grid.voxel_volume_ml)
    classes = before.argmax(axis=0)
    assert (classes == 3).sum() == voxels
    if kept:
        np.testing.assert_array_equal(given, before)
        return
    np.testing.assert_array_equal(given.argmax(axis=0), np.where(classes == 3, 1, classes))
    np.testing.assert_allclose(given.sum(axis=0), 1.0, rtol=1e-5)
    assert given[3].max() == 0.0


def test_enhancement_that_cannot_be_seen_is_core(grid: Geometry) -> None:
    """However much: no other voxel changes its class."""
    rng = np.random.default_rng(6)
    given = rng.dirichlet((4.0, 3.0, 3.0, 3.0), size=SHAPE).transpose(3, 0, 1, 2).astype(np.float32)
    classes = given.argmax(axis=0)
    drop_traces(given, grid.voxel_volume_ml, visible=False)
    assert (classes == 3).sum() * grid.voxel_volume_ml > 10.0 and given[3].max() == 0.0
    np.testing.assert_array_equal(given.argmax(axis=0), np.where(classes == 3, 1, classes))


def test_other_classes_have_no_traces(grid: Geometry) -> None:
    given = probabilities(ball(grid, (0, 0, 0), 3))
    before = given.copy()
    drop_traces(given, grid.voxel_volume_ml)
    np.testing.assert_array_equal(given, before)


def test_gaps_are_closed_and_nothing_is_lost(grid: Geometry) -> None:
    mask = ball(grid, (0, 0, 0), 16) & ~ball(grid, (0, 0, 0), 3)
    mask &= np.random.default_rng(1).random(SHAPE) > 0.2
    found = Tumors.found(probabilities(mask), grid).mask
    assert found is not None
    assert np.all(found[mask])
    assert np.all(found[ball(grid, (0, 0, 0), 12)])
    assert not np.any(found[~ball(grid, (0, 0, 0), 18)])


def test_weights_by_distance(grid: Geometry) -> None:
    mask = ball(grid, (0, 0, 0), 12)
    tumors = Tumors.found(probabilities(mask), grid)
    assert tumors.mask is not None
    distance = ndimage.distance_transform_edt(~tumors.mask, SPACING)
    weights = tumors.weights_at(affine_coords(grid.shape, grid.affine), 2.0)
    assert np.all(weights[distance <= 3.7] == 0.0)
    assert np.all(weights[distance >= 5.8] == 1.0)
    between = (distance > 3.8) & (distance < 5.7)
    assert np.all((weights[between] > 0) & (weights[between] < 1))
    order = np.argsort(distance[between])
    assert np.all(np.diff(weights[between][order]) >= -1e-5)
    blank = tumors.blank_at(affine_coords(grid.shape, grid.affine), 2.0)
    assert np.array_equal(blank, distance <= 2.0 * 0.87)
    far = np.full((3, 1, 1, 1), 500.0, dtype=np.float32)
    assert tumors.weights_at(far, 2.0).item() == 1.0


def volume_ratio(mask_of: Tumors, u: Array, grid: Geometry) -> float:
    """Volume of what x + u(x) takes into the mask, over the mask's own."""
    assert mask_of.mask is not None
    source = mask_of.grid
    coords = np.linalg.inv(source.affine)[:3, :3] @ (affine_coords(grid.shape, grid.affine) + u).reshape(3, -1)
    coords = (coords + np.linalg.inv(source.affine)[:3, 3:]).reshape(3, *grid.shape)
    inside = ndimage.map_coordinates(mask_of.mask.astype(np.float32), coords, order=1)
    return float(inside.sum() * grid.voxel_volume_ml / (mask_of.mask.sum() * source.voxel_volume_ml))


def test_what_would_shrink_becomes_rigid(grid: Geometry) -> None:
    """x + u(x) = 1.25 x about the tumour's middle would make it half as large."""
    target = Geometry.aligned((60, 60, 60), (1.5, 1.5, 1.5), (2.0, 2.0, 2.0))
    tumors = Tumors.found(probabilities(ball(grid, (6, -3, 4), 13)), grid)
    points = affine_coords(target.shape, target.affine)
    u = (0.25 * (points - np.array([6, -3, 4]).reshape(3, 1, 1, 1)) + 3.0).astype(np.float32)
    out = tumors.stiffened(u, target)
    assert volume_ratio(tumors, u, target) == pytest.approx(0.8**3, rel=0.03)
    assert volume_ratio(tumors, out, target) == pytest.approx(1.0, rel=0.03)
    z = points + u
    far = np.linalg.norm(z - np.array([6, -3, 4]).reshape(3, 1, 1, 1), axis=0) > 32
    assert np.array_equal(out[:, far], u[:, far])
    determinant = jacobian_determinant(DisplacementField(out, target))
    assert determinant.min() > 0.0


def test_rigid_motions_are_kept(grid: Geometry, helpers: Any) -> None:
    tumors = Tumors.found(probabilities(ball(grid, (6, -3, 4), 13) | ball(grid, (-20, 10, 0), 8)), grid)
    turn = helpers.rotation((3.0, -2.0, 4.0))
    points = affine_coords(grid.shape, grid.affine)
    u = np.einsum("ab,bxyz->axyz", turn - np.eye(3), points) + np.array([2.0, -1.0, 3.0]).reshape(3, 1, 1, 1)
    np.testing.assert_allclose(tumors.stiffened(u.astype(np.float32), grid), u, atol=0.06)


def test_what_may_be_no_tumour_deforms_and_is_not_compared(grid: Geometry) -> None:
    mask = ball(grid, (6, -3, 4), 13)
    sure, unsure = (Tumors.found(probabilities(mask), grid, certain=certain) for certain in (True, False))
    points = affine_coords(grid.shape, grid.affine)
    u = (0.25 * points).astype(np.float32)
    assert np.array_equal(unsure.stiffened(u, grid), u) and not np.array_equal(sure.stiffened(u, grid), u)
    np.testing.assert_array_equal(unsure.weights_at(points, 2.0), sure.weights_at(points, 2.0))
    assert unsure.weights_at(points, 2.0)[mask].max() == 0.0


def test_small_spots_deform(grid: Geometry) -> None:
    tumors = Tumors.found(probabilities(ball(grid, (0, 0, 0), 4)), grid)
    u = (0.1 * affine_coords(grid.shape, grid.affine)).astype(np.float32)
    assert np.array_equal(tumors.stiffened(u, grid), u)


@pytest.fixture(scope="module")
def images(helpers: Any) -> tuple[Volume, Volume, Tumors]:
    """A phantom with a tumour, swollen and moved a little against the fixed one without."""
    shape = (46, 54, 42)
    grid = Geometry(shape, helpers.grid_affine(shape, (2.0, 2.0, 2.0)))
    points = helpers.world_points(grid.affine, shape)
    fixed = helpers.head(points, 0).astype(np.float32)
    center = np.array([18.0, 12.0, 9.0]).reshape(3, 1, 1, 1)
    push = 4.0 * np.exp(-((np.linalg.norm(points - center, axis=0) - 8) ** 2) / 300)
    moving = helpers.head(points - push * (points - center) / 20, 0).astype(np.float32)
    mask = np.linalg.norm(points - center, axis=0) < 10
    return Volume(moving, grid), Volume(fixed, grid), Tumors.found(probabilities(mask), grid)


def refined(moving: Volume, fixed: Volume, tumors: tuple[Tumors, Tumors]) -> DisplacementField:
    grid = fixed.geometry
    start = DisplacementField(np.zeros((3, *grid.shape), dtype=np.float32), grid)
    pairs = (Case("m", {"t1": moving}), tumors[0]), (Case("f", {"t1": fixed}), tumors[1])
    return Refiner(threads=1).refine_case(*pairs, np.eye(4), start, 3)[0].displacement


@pytest.mark.parametrize("whose", [0, 1])
def test_what_is_in_a_tumour_has_no_say(images: tuple[Volume, Volume, Tumors], whose: int) -> None:
    *pair, tumors = images
    assert tumors.mask is not None
    none = Tumors(None, tumors.grid)
    masks = (tumors, none) if whose == 0 else (none, tumors)
    rng = np.random.default_rng(2)
    # The outermost voxels of a coarse image shine further by interpolation.
    inside = ndimage.binary_erosion(tumors.mask)
    painted = pair[whose].data + np.where(inside, rng.normal(0, 200, tumors.mask.shape), 0)
    other = list(pair)
    other[whose] = Volume(painted.astype(np.float32), tumors.grid)
    a, b = refined(*pair, masks), refined(*other, masks)
    assert np.abs(a.vectors_mm).max() > 1.0
    np.testing.assert_allclose(a.vectors_mm, b.vectors_mm, atol=1e-4)
    free = refined(*other, (none, none))
    assert np.abs(free.vectors_mm - refined(*pair, (none, none)).vectors_mm).max() > 0.5


def test_a_tumour_keeps_its_volume(images: tuple[Volume, Volume, Tumors]) -> None:
    moving, fixed, tumors = images
    none = Tumors(None, tumors.grid)
    kept, free = refined(moving, fixed, (tumors, none)), refined(moving, fixed, (none, none))
    assert volume_ratio(tumors, kept.vectors_mm, kept.geometry) == pytest.approx(1.0, abs=0.03)
    assert abs(volume_ratio(tumors, free.vectors_mm, free.geometry) - 1.0) > 0.06
    # The same head with a tumour at both times: what became of it is not known beforehand.
    later = refined(moving, fixed, (tumors, tumors))
    assert abs(volume_ratio(tumors, later.vectors_mm, later.geometry) - 1.0) > 0.06
    # A speck is no tumour.
    assert tumors.mask is not None
    speck = np.zeros_like(tumors.mask)
    speck[5:8, 5:8, 5:8] = True
    assert 0.05 < speck.sum() * tumors.grid.voxel_volume_ml < 0.5
    held = refined(moving, fixed, (tumors, Tumors(speck, tumors.grid)))
    assert volume_ratio(tumors, held.vectors_mm, held.geometry) == pytest.approx(1.0, abs=0.03)
    assert jacobian_determinant(kept).min() > 0.0
