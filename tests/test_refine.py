"""The refinement: its force against automatic differentiation, known deformations, tumours, engines."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import ndimage

from jrs.errors import BadDataError, UsageError
from jrs.fields import DisplacementField, jacobian_determinant
from jrs.geometry import Geometry
from jrs.runtime import native, refine
from jrs.runtime.cases import Case
from jrs.runtime.engines import EngineOptions, open_engine
from jrs.runtime.options import InferOptions
from jrs.runtime.pipeline import Pipeline
from jrs.runtime.preprocess import NetworkInput
from jrs.runtime.pyramid import level_grids, pyramid
from jrs.runtime.refine import GRAPH, Refined, Refiner, gaussian
from jrs.runtime.refine_level import refine_level
from jrs.runtime.sampling import Sampled, affine_coords
from jrs.runtime.transform import Transform, displacement_on
from jrs.runtime.tumors import Tumors, shows_enhancement, shows_tumors, smallest_ml
from jrs.volume import Volume

Array = np.ndarray[Any, Any]
ONE = np.ones(1, dtype=np.float32)
FLOOR = 2e-2  # of a window's variance, in images of unit variance


@pytest.fixture(scope="module", params=["graph", "compiled, 1", "compiled, 3"])
def run(request: Any) -> Callable[..., dict[str, Array]]:
    """One level of the graph, or by the kernels that do its work; by default one unsmoothed step from zero."""
    engine: Callable[[dict[str, Array]], Any]
    if request.param == "graph":
        engine = open_engine(GRAPH, "refinement", "ort-cpu", EngineOptions(threads=1))
    elif native.available():
        engine = partial(refine_level, threads=int(request.param[-1]))
    else:
        pytest.skip("the kernels were not compiled")

    def once(fixed: Array, moving: Array, weights: Array | None = None, **changes: Any) -> dict[str, Array]:
        shape = fixed.shape[1:]
        inputs: dict[str, Any] = {
            "fixed": fixed[None],
            "moving": moving[None],
            "weights": (np.ones(shape) if weights is None else weights)[None, None],
            "displacement": np.zeros((1, 3, *shape)),
            "update_kernel": ONE,
            "field_kernel": ONE,
            "step": np.array(0.5),
            "iterations": np.array(1.0),
        } | changes
        return engine({name: np.ascontiguousarray(value, dtype=np.float32) for name, value in inputs.items()})

    return once


def smooth_noise(rng: np.random.Generator, shape: tuple[int, ...], deviation: float = 1.5) -> Array:
    """Unit variance."""
    noise = np.stack([ndimage.gaussian_filter(rng.normal(size=shape[1:]), deviation) for _ in range(shape[0])])
    return (noise / noise.std()).astype(np.float32)


# One step of the graph ------------------------------------------------------------------------------------


def correlation(fixed: Any, moving: Any, weights: Any) -> Any:
    """The sum of squared local correlation over 5x5x5 windows, written down one by one in float64, and their number.

    Each window's weight, how far its variances stand above a floor, is not differentiated.
    """
    import torch
    import torch.nn.functional as F  # noqa: N812

    def windows(x: Any) -> Any:
        """(C,X,Y,Z) to (C,X,Y,Z,125), zeros outside."""
        padded = F.pad(x, (2,) * 6)
        return padded.unfold(1, 5, 1).unfold(2, 5, 1).unfold(3, 5, 1).flatten(4)

    w, f, m = windows(weights[None]), windows(fixed), windows(moving)
    amount = w.sum(-1, keepdim=True)
    enough = amount[..., 0] > 0.21 * 125
    share = w / amount.clamp(min=1e-9)
    f = f - (share * f).sum(-1, keepdim=True)
    m = m - (share * m).sum(-1, keepdim=True)
    product = (share * f * f).sum(-1) * (share * m * m).sum(-1)
    floored = ((share * f * f).sum(-1) + FLOOR) * ((share * m * m).sum(-1) + FLOOR)
    squares = (share * f * m).sum(-1) ** 2 / product * (product / floored).detach()
    return torch.where(enough, squares, 0.0).sum(), enough.sum().item() * len(fixed)


@pytest.mark.parametrize(("channels", "shape"), [(1, (9, 11, 10)), (3, (12, 7, 8))])
@pytest.mark.parametrize("masked", [False, True])
def test_the_force_is_the_derivative_of_local_correlation(
    run: Callable[..., dict[str, Array]], channels: int, shape: tuple[int, int, int], masked: bool
) -> None:
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(channels)
    fixed, moving = smooth_noise(rng, (channels, *shape)), smooth_noise(rng, (channels, *shape))
    weights = np.ones(shape)
    if masked:
        weights = rng.uniform(0.3, 1.0, shape)
        weights[2:6, 1:5, 3:8] = 0.0
    variable = torch.tensor(moving, dtype=torch.float64, requires_grad=True)
    total, windows = correlation(torch.tensor(fixed, dtype=torch.float64), variable, torch.tensor(weights))
    total.backward()
    slopes = [ndimage.correlate1d(moving, [-0.5, 0.0, 0.5], axis, mode="nearest") for axis in (1, 2, 3)]
    force = np.stack([(variable.grad.numpy() * slope).sum(axis=0) for slope in slopes])
    result = run(fixed, moving, weights)
    assert result["similarity"][0] == pytest.approx(total.item() / windows, abs=1e-5)
    expected = 0.5 * force / max(1.0, np.sqrt((force**2).sum(axis=0)).max())
    np.testing.assert_allclose(result["refined"][0], expected, atol=1e-4)
    if masked:
        assert np.all(result["refined"][0][:, 2:6, 1:5, 3:8] == 0.0)


def test_no_axis_is_preferred(run: Callable[..., dict[str, Array]]) -> None:
    """Half of the volume is not compared: windows lie across a straight edge, where rounding must not decide."""
    rng = np.random.default_rng(2)
    fixed, moving = smooth_noise(rng, (1, 14, 18, 12)), smooth_noise(rng, (1, 14, 18, 12))
    u = 0.5 * smooth_noise(rng, (3, 14, 18, 12), 3.0)
    weights = np.ones(fixed.shape[1:])
    weights[:5] = 0.0
    options = {"update_kernel": gaussian(1.2), "field_kernel": gaussian(0.5), "iterations": np.array(3.0)}
    want = run(fixed, moving, weights, displacement=u[None], **options)
    turned = [np.moveaxis(x, -3, -1) for x in (fixed, moving, weights, u[[1, 2, 0]])]
    got = run(*turned[:3], displacement=turned[3][None], **options)
    np.testing.assert_allclose(got["similarity"], want["similarity"], atol=1e-5)
    back = np.moveaxis(got["refined"][0], -1, -3)[[2, 0, 1]]
    np.testing.assert_allclose(back, want["refined"][0], atol=1e-3)


def test_the_longest_update_is_the_step(run: Callable[..., dict[str, Array]]) -> None:
    """Where forces are long, as those of these images of two modalities are."""
    rng = np.random.default_rng(3)
    fixed, moving = smooth_noise(rng, (2, 12, 14, 10)), smooth_noise(rng, (2, 12, 14, 10))
    kernel = gaussian(0.8)
    for step in (0.25, 1.0):
        update = run(fixed, moving, update_kernel=kernel, step=np.array(step))["refined"][0]
        assert np.sqrt((update**2).sum(axis=0)).max() == pytest.approx(step, abs=1e-5)


def test_updates_are_smoothed_by_the_kernel(run: Callable[..., dict[str, Array]]) -> None:
    rng = np.random.default_rng(4)
    fixed, moving = smooth_noise(rng, (1, 15, 13, 14)), smooth_noise(rng, (1, 15, 13, 14))
    raw = run(fixed, moving)["refined"][0]
    smoothed = run(fixed, moving, update_kernel=gaussian(1.2))["refined"][0]
    expected = ndimage.gaussian_filter(raw, (0, 1.2, 1.2, 1.2), mode="nearest", truncate=3.4)
    np.testing.assert_allclose(smoothed / np.abs(smoothed).max(), expected / np.abs(expected).max(), atol=1e-4)


def test_updates_are_composed(run: Callable[..., dict[str, Array]]) -> None:
    """u <- smooth(d + u o (x + d)): to second order in d, here against cubic interpolation."""
    rng = np.random.default_rng(5)
    shape = (16, 18, 14)
    fixed, moving = smooth_noise(rng, (1, *shape)), smooth_noise(rng, (1, *shape))
    u = 0.8 * smooth_noise(rng, (3, *shape), 4.0)
    index = np.indices(shape).astype(np.float64)
    warped = ndimage.map_coordinates(moving[0], index + u, order=1, mode="nearest")[None].astype(np.float32)
    kernel = gaussian(2.0)
    # The update at u is the update of the warped image at zero.
    d = run(fixed, warped, update_kernel=kernel, step=np.array(0.2))["refined"][0]
    composed = d + np.stack([ndimage.map_coordinates(part, index + d, order=3, mode="nearest") for part in u])
    expected = ndimage.gaussian_filter(composed, (0, 0.35, 0.35, 0.35), mode="nearest", truncate=5.0)
    got = run(
        fixed, moving, displacement=u[None], update_kernel=kernel, field_kernel=gaussian(0.35), step=np.array(0.2)
    )["refined"][0]
    inner = (slice(None), *(slice(2, -2),) * 3)
    assert np.abs(expected - u)[inner].max() > 0.02
    np.testing.assert_allclose(got[inner], expected[inner], atol=0.002)


def test_equal_images_stay_where_they_are(run: Callable[..., dict[str, Array]]) -> None:
    image = smooth_noise(np.random.default_rng(6), (2, 16, 12, 14))
    result = run(image, image, update_kernel=gaussian(0.8), step=np.array(1.0), iterations=np.array(10.0))
    assert np.abs(result["refined"]).max() < 0.02


def test_images_without_structure_are_left_alone(run: Callable[..., dict[str, Array]]) -> None:
    flat = np.zeros((1, 10, 10, 10), dtype=np.float32)
    result = run(flat, flat, iterations=np.array(3.0))
    assert np.all(result["refined"] == 0.0) and np.all(result["similarity"] == 0.0)


def test_it_stops_when_the_similarity_falls(run: Callable[..., dict[str, Array]]) -> None:
    """Steps of four voxels overshoot at once."""
    rng = np.random.default_rng(7)
    fixed = smooth_noise(rng, (1, 18, 18, 18))
    moving = np.roll(fixed, 1, axis=1)
    result = run(fixed, moving, update_kernel=gaussian(1.0), step=np.array(4.0), iterations=np.array(50.0))
    assert 2 <= result["done"] < 50
    full = run(fixed, moving, update_kernel=gaussian(1.0), step=np.array(0.2), iterations=np.array(5.0))
    assert full["done"] == 5 and full["similarity"][1] > full["similarity"][0] + 0.05


# Known deformations ------------------------------------------------------------------------------------------


def waves(points: Array, size: float = 4.0) -> Array:
    """A smooth displacement (3,...) of up to about ``size`` mm at RAS points, nowhere folding."""
    x, y, z = points / 30.0
    return size * np.stack([np.sin(y + 0.5) * np.cos(z), np.sin(z + x), np.cos(x - 0.3) * np.sin(y)]) * 0.8


@pytest.fixture(scope="module")
def pair(helpers: Any) -> tuple[Volume, Volume, Geometry]:
    """Fixed and moving phantom with moving(x + waves(x)) = fixed(x); grids of other orientation and spacing."""
    grid = Geometry((48, 56, 44), helpers.grid_affine((48, 56, 44), (2.0, 2.0, 2.1), "LPS"))
    other = Geometry((60, 48, 50), helpers.grid_affine((60, 48, 50), (1.9, 2.1, 2.0), "PIR", (4.0, 2.0, -3.0)))
    points = helpers.world_points(grid.affine, grid.shape)
    fixed = helpers.head(points + waves(points)).astype(np.float32)
    moving = helpers.head(helpers.world_points(other.affine, other.shape)).astype(np.float32)
    return Volume(moving, other), Volume(fixed, grid), grid


def case(**images: Volume) -> Case:
    return Case("case", images)


def refined(moving: Volume, fixed: Volume, iterations: int = 4, **options: Any) -> Refined:
    none = Tumors(None, fixed.geometry)
    start = DisplacementField(np.zeros((3, 8, 8, 8), dtype=np.float32), Geometry((8, 8, 8), np.diag([12.0, 12, 12, 1])))
    refiner = Refiner(options.pop("orientation", "RAS"), threads=1)
    mine, theirs = options.pop("tumors", (none, none))
    names = options.pop("names", ("t1", "t1"))
    images = (case(**{names[0]: moving}), mine), (case(**{names[1]: fixed}), theirs)
    found, notes = refiner.refine_case(*images, np.eye(4), start, iterations)
    assert notes == options.pop("notes", []) and not options
    return found


def errors(found: Refined, fixed: Volume) -> tuple[Array, Array]:
    """Length of what was missed and of what was there, mm, over the fixed image's head."""
    grid = fixed.geometry
    u = Transform(np.eye(4), found.displacement, 1).dense(grid).vectors_mm
    truth = waves(affine_coords(grid.shape, grid.affine).astype(np.float64))
    inside = ndimage.binary_erosion(fixed.data > 30, iterations=2)
    return np.linalg.norm(u - truth, axis=0)[inside], np.linalg.norm(truth, axis=0)[inside]


def test_a_known_deformation_is_found(pair: tuple[Volume, Volume, Geometry]) -> None:
    moving, fixed, _ = pair
    found = refined(moving, fixed)
    missed, there = errors(found, fixed)
    assert there.mean() > 2.5
    assert missed.mean() < 0.3 * there.mean()
    assert found.similarity_after > found.similarity_before
    assert jacobian_determinant(found.displacement).min() > 0.2


@pytest.mark.parametrize("orientation", ["LPS", "PIR"])
def test_the_grids_orientation_does_not_matter(pair: tuple[Volume, Volume, Geometry], orientation: str) -> None:
    moving, fixed, grid = pair
    a, b = refined(moving, fixed, 2), refined(moving, fixed, 2, orientation=orientation)
    assert b.displacement.geometry.orientation == orientation
    dense = [Transform(np.eye(4), found.displacement, 1).dense(grid).vectors_mm for found in (a, b)]
    assert np.abs(dense[0] - dense[1]).max() < 0.02


def test_opposite_contrasts_without_a_shared_modality(pair: tuple[Volume, Volume, Geometry]) -> None:
    moving, fixed, _ = pair
    head = moving.data > 20
    inverted = Volume(np.where(head, 160.0 - moving.data, 0.0).astype(np.float32), moving.geometry)
    note = ["no modality is shared: refined by comparing moving t2 with fixed t1"]
    missed, there = errors(refined(inverted, fixed, names=("t2", "t1"), notes=note), fixed)
    assert missed.mean() < 0.7 * there.mean()


def test_two_modalities_are_compared_together(pair: tuple[Volume, Volume, Geometry], helpers: Any) -> None:
    """The first is noise: alone it finds nothing, with the second the deformation is found."""
    moving, fixed, _ = pair
    rng = np.random.default_rng(8)

    def noise(like: Volume) -> Volume:
        values = np.where(like.data > 20, 80 + 20 * rng.normal(size=like.data.shape), 0)
        return Volume(values.astype(np.float32), like.geometry)

    noises = noise(moving), noise(fixed)
    none = Tumors(None, fixed.geometry)
    start = DisplacementField(np.zeros((3, 2, 2, 2), dtype=np.float32), Geometry((2, 2, 2), np.eye(4)))
    both = case(t1=noises[0], flair=moving), case(flair=fixed, t1=noises[1])
    found, _ = Refiner(threads=1).refine_case((both[0], none), (both[1], none), np.eye(4), start, 4)
    assert found.modalities == ("t1", "flair")
    alone, _ = errors(refined(*noises), fixed)
    missed, there = errors(found, fixed)
    assert missed.mean() < 0.4 * there.mean() < alone.mean()


@pytest.fixture(scope="module")
def ripples(pair: tuple[Volume, Volume, Geometry]) -> tuple[Volume, Volume, DisplacementField]:
    """A textured head, the same moved by ripples of some 25 mm, and those: too short for the coarse level."""
    moving, _, grid = pair
    rng = np.random.default_rng(3)
    texture = smooth_noise(rng, moving.data.shape, 1.2)
    textured = np.where(moving.data > 20, moving.data + 40.0 * texture / texture.std(), 0.0).astype(np.float32)
    vectors = waves(7.0 * affine_coords(grid.shape, grid.affine), 3.0)
    truth = DisplacementField(vectors.astype(np.float32), grid)
    exact = Transform(np.eye(4), truth, 1).pull(Sampled(textured[None], 1), moving.geometry, grid)[0]
    return Volume(textured, moving.geometry), Volume(exact, grid), truth


def missed_mm(found: Refined, truth: DisplacementField, fixed: Volume) -> float:
    """Mean distance over the fixed image's head."""
    inside = ndimage.binary_erosion(fixed.data > 30, iterations=2)
    u = Transform(np.eye(4), found.displacement, 1).dense(truth.geometry).vectors_mm
    return float(np.linalg.norm(u - truth.vectors_mm, axis=0)[inside].mean())


def from_start(moving: Volume, fixed: Volume, start: DisplacementField, iterations: int) -> Refined:
    none = Tumors(None, fixed.geometry)
    images = (case(t1=moving), none), (case(t1=fixed), none)
    return Refiner(threads=1).refine_case(*images, np.eye(4), start, iterations)[0]


def test_a_start_is_improved_not_forgotten(ripples: tuple[Volume, Volume, DisplacementField]) -> None:
    """With the truth to start from, one iteration leaves it nearly as it is."""
    moving, fixed, truth = ripples
    found = from_start(moving, fixed, truth, 1)
    assert not found.one_head and found.summary()["start"] == "network"
    assert missed_mm(found, truth, fixed) < 0.3


def test_a_level_that_worsens_a_good_start_is_dropped(
    ripples: tuple[Volume, Volume, DisplacementField], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The coarse level smooths the truth, to no use: its result counts for nothing, the start goes on as it is."""
    moving, fixed, truth = ripples
    none = Tumors(None, truth.geometry)
    images = case(t1=moving), case(t1=fixed)
    grids = level_grids(moving, fixed, "RAS")
    sides = [pyramid(c.images, ["t1"], grids[:1], np.eye(4), none, 1) for c in images]
    found = Refiner(threads=1).refine(*sides, truth, 4)
    assert found.iterations == (0,) and found.similarity_after == found.similarity_before
    np.testing.assert_array_equal(found.displacement.vectors_mm, displacement_on(truth, grids[0], 1))
    # From no displacement the same level is of use.
    zero = DisplacementField(np.zeros_like(truth.vectors_mm), truth.geometry)
    again = Refiner(threads=1).refine(*sides, zero, 4)
    assert again.iterations[0] > 0 and again.similarity_after > again.similarity_before
    # Levels after it begin where it began.
    two = [pyramid(c.images, ["t1"], grids[:2], np.eye(4), none, 1) for c in images]
    both = Refiner(threads=1).refine(*two, truth, 4)
    assert both.iterations[0] == 0
    monkeypatch.setattr(refine, "_COARSE", (replace(refine._COARSE[1], level=0),))
    finer = [pyramid(c.images, ["t1"], grids[1:2], np.eye(4), none, 1) for c in images]
    alone = Refiner(threads=1).refine(*finer, truth, 4)
    np.testing.assert_array_equal(both.displacement.vectors_mm, alone.displacement.vectors_mm)


@pytest.mark.parametrize(
    ("knows", "worthwhile", "climbed"), [(1.0, 0.4, [0, 2, 3]), (0.0, 0.4, [0, 1, 2, 3]), (1.0, 0.6, [0, 1, 2])]
)
def test_what_the_coarsest_level_cannot_better_is_left_to_the_fine_ones(
    ripples: tuple[Volume, Volume, DisplacementField],
    monkeypatch: pytest.MonkeyPatch,
    knows: float,
    worthwhile: float,
    climbed: list[int],
) -> None:
    moving, fixed, truth = ripples
    monkeypatch.setattr("jrs.runtime.pyramid._WORTHWHILE", worthwhile)  # the phantom is coarse
    none = Tumors(None, truth.geometry)
    images = (case(t1=moving), none), (case(t1=fixed), none)
    levels: list[int] = []

    class Watched(Refiner):
        def _climb(self, *given: Any) -> Any:
            levels.append(given[3].level)
            return super()._climb(*given)

    start = DisplacementField(np.float32(knows) * truth.vectors_mm, truth.geometry)
    found, _ = Watched(threads=1).refine_case(*images, np.eye(4), start, 4, same_patient=False)
    assert levels == climbed
    assert found.spacings_mm == pytest.approx((4.0, 2.0, 4.0 / 3.0, 1.0)[: climbed[-1] + 1])
    assert found.displacement.geometry.spacing[0] == pytest.approx(found.spacings_mm[-1])
    assert (found.iterations[0] > 0) == (knows == 0.0)
    assert all(done == 0 for level, done in enumerate(found.iterations) if level not in climbed)
    quarter = 0.25 * min(fixed.geometry.spacing)  # of a voxel
    before = missed_mm(replace(found, displacement=start), truth, fixed)
    assert missed_mm(found, truth, fixed) < (quarter if knows else 0.5 * before)


@pytest.mark.skipif(not native.available(), reason="the kernels were not compiled")
def test_the_kernels_refine_where_they_were_compiled(
    ripples: tuple[Volume, Volume, DisplacementField], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The graph takes several times as long."""
    moving, fixed, truth = ripples
    grids = level_grids(moving, fixed, "RAS")[:1]
    none = Tumors(None, truth.geometry)
    sides = [pyramid(case(t1=v).images, ["t1"], grids, np.eye(4), none, 1) for v in (moving, fixed)]
    monkeypatch.setattr(refine, "open_engine", None)
    zero = DisplacementField(np.zeros_like(truth.vectors_mm), truth.geometry)
    assert Refiner(threads=1).refine(*sides, zero, 1, same_patient=False).iterations[0] > 0


def test_a_level_that_ends_in_no_number_is_dropped(
    ripples: tuple[Volume, Volume, DisplacementField], monkeypatch: pytest.MonkeyPatch
) -> None:
    moving, fixed, truth = ripples
    grids = level_grids(moving, fixed, "RAS")
    none = Tumors(None, truth.geometry)
    images = case(t1=moving), case(t1=fixed)
    sides = [pyramid(c.images, ["t1"], grids[:1], np.eye(4), none, 1) for c in images]
    refiner = Refiner(threads=1)

    def broken(inputs: dict[str, Array]) -> dict[str, Array]:
        similarity, done = np.array([0.5, np.nan], np.float32), np.array(4.0, np.float32)
        return {"refined": inputs["displacement"] * np.nan, "similarity": similarity, "done": done}

    monkeypatch.setattr(refiner, "_level", lambda: nullcontext(broken))
    found = refiner.refine(*sides, truth, 4)
    assert found.iterations == (0,) and np.isfinite(found.displacement.vectors_mm).all()


# One head or two --------------------------------------------------------------------------------------------


def test_of_one_head_the_truth_is_found_whatever_the_start_added(
    ripples: tuple[Volume, Volume, DisplacementField],
) -> None:
    """Moved by long waves; the start has these and ripples of its own that are in neither image."""
    moving, _, noise = ripples
    grid = noise.geometry
    truth = DisplacementField(waves(affine_coords(grid.shape, grid.affine), 3.0).astype(np.float32), grid)
    exact = Transform(np.eye(4), truth, 1).pull(Sampled(moving.data[None], 1), moving.geometry, grid)[0]
    fixed = Volume(exact, grid)
    start = DisplacementField(truth.vectors_mm + 0.6 * noise.vectors_mm, grid)
    found = from_start(moving, fixed, start, 4)
    assert found.one_head and found.summary()["start"] == "affine"
    assert missed_mm(found, truth, fixed) < 0.4
    assert np.linalg.norm(0.6 * noise.vectors_mm, axis=0).mean() > 1.0
    none = Tumors(None, grid)
    images = (case(t1=moving), none), (case(t1=fixed), none)
    others, _ = Refiner(threads=1).refine_case(*images, np.eye(4), start, 4, same_patient=False)
    assert not others.one_head and others.iterations != found.iterations
    # More iterations, and at the coarse level those that told.
    most = [4 * (12 + 12) + 12, 4 * (12 + 12)]
    assert all(0 < done <= limit for done, limit in zip(found.iterations, most, strict=False))


@pytest.mark.parametrize("knows", [1.0, 0.0])
def test_two_heads_keep_the_networks_start(ripples: tuple[Volume, Volume, DisplacementField], knows: float) -> None:
    """Half of what one shows the other does not, whether the network knows how the rest has moved or nothing."""
    moving, fixed, truth = ripples
    rng = np.random.default_rng(9)
    own = smooth_noise(rng, fixed.data.shape, 1.2)
    mixed = np.where(fixed.data > 20, fixed.data + 30.0 * own / own.std(), 0.0).astype(np.float32)
    start = DisplacementField(np.float32(knows) * truth.vectors_mm, truth.geometry)
    found = from_start(moving, Volume(mixed, fixed.geometry), start, 4)
    assert not found.one_head and found.similarity_after >= found.similarity_before
    none = Tumors(None, truth.geometry)
    images = (case(t1=moving), none), (case(t1=Volume(mixed, fixed.geometry)), none)
    own_way, _ = Refiner(threads=1).refine_case(*images, np.eye(4), start, 4, same_patient=True)
    assert own_way.one_head and own_way.iterations[0] >= 48


@pytest.mark.parametrize(("same_patient", "start"), [(True, "affine"), (False, "network")])
def test_the_user_knows_whose_scans_they_are(
    pipeline: Pipeline, phantom: Any, same_patient: bool, start: str
) -> None:
    for atlas in (phantom.atlas, "sri24"):
        for said in (same_patient, np.bool_(same_patient), int(same_patient)):
            result = pipeline.infer(phantom.folder, atlas, refine=1, same_patient=said, inverse=False)
            assert result.refinement is not None and result.refinement["start"] == start
            assert result.refinement["same_patient"] is same_patient


def test_what_cannot_be_said_of_the_scans() -> None:
    with pytest.raises(UsageError, match="same_patient 'no'"):
        InferOptions(same_patient="no")  # type: ignore[arg-type]
    for said in (True, False):
        with pytest.raises(UsageError, match="--refine 0 leaves out"):
            InferOptions(same_patient=said, refine=0)
    assert InferOptions(refine=0).same_patient is None


def test_part_of_the_head_outside_the_moving_image(pair: tuple[Volume, Volume, Geometry]) -> None:
    """What the moving image does not show is not compared, so that its edge draws nothing."""
    moving, fixed, _ = pair
    affine = moving.geometry.affine.copy()
    affine[:3, 3] = moving.geometry.to_ras((22, 0, 0))
    cut = Volume(np.ascontiguousarray(moving.data[22:]), Geometry(moving.data[22:].shape, affine))
    found = refined(cut, fixed)
    assert jacobian_determinant(found.displacement).min() > 0.0
    missed, _ = errors(found, fixed)
    assert np.median(missed) < 1.5


# Levels ------------------------------------------------------------------------------------------------------


def blob(shape: tuple[int, int, int], spacing: float) -> Volume:
    index = np.indices(shape) - (np.array(shape).reshape(3, 1, 1, 1) - 1) / 2
    data = (np.linalg.norm(index, axis=0) * spacing < 40).astype(np.float32)
    return Volume(data, Geometry(shape, np.diag([spacing, spacing, spacing, 1.0])))


def test_levels_fit_the_images_resolution() -> None:
    fine, coarse = blob((100, 100, 100), 1.0), blob((30, 30, 30), 4.0)
    grids = level_grids(fine, fine, "LPS")
    assert [g.orientation for g in grids] == ["LPS"] * 4
    assert [g.spacing[0] for g in grids] == pytest.approx([4.0, 2.0, 4.0 / 3.0, 1.0])
    thick = blob((100, 100, 20), 1.0)
    thick = Volume(thick.data, Geometry(thick.data.shape, np.diag([1.0, 1.0, 5.0, 1.0])))
    assert [g.spacing[0] for g in level_grids(thick, fine, "LPS")] == pytest.approx([4.0, 2.0, 4.0 / 3.0])
    for grid in grids:
        ends = np.abs(grid.to_voxels(fine.geometry.center) - (np.array(grid.shape) - 1) / 2) * grid.spacing
        assert ends.max() < 1.0
        assert all(86 <= n * s < 100 for n, s in zip(grid.shape, grid.spacing, strict=True))
    for image in (coarse, blob((3, 30, 30), 30.0)):
        assert [grid.spacing[0] for grid in level_grids(image, fine, "RAS")] == [4.0]


@pytest.mark.parametrize("deviation", [0.35, 0.7, 1.7])
def test_gaussian(deviation: float) -> None:
    radius = max(1, int(np.ceil(3 * deviation)))
    impulse = np.zeros(2 * radius + 1)
    impulse[radius] = 1.0
    expected = ndimage.gaussian_filter1d(impulse, deviation, radius=radius, mode="constant")
    np.testing.assert_allclose(gaussian(deviation), expected, atol=1e-6)


def test_an_empty_image_is_refused(pair: tuple[Volume, Volume, Geometry]) -> None:
    _, fixed, grid = pair
    with pytest.raises(BadDataError, match="--affine"):
        refined(Volume(np.zeros(grid.shape, dtype=np.float32), grid), fixed)


# Engines and the shipped graph -------------------------------------------------------------------------------


def test_the_graph_and_the_kernels_give_the_same(
    pair: tuple[Volume, Volume, Geometry], monkeypatch: pytest.MonkeyPatch
) -> None:
    moving, fixed, grid = pair
    none = Tumors(None, grid)
    start = DisplacementField(np.zeros((3, *grid.shape), dtype=np.float32), grid)

    def vectors() -> Array:
        images = (case(t1=moving), none), (case(t1=fixed), none)
        return Refiner(threads=1).refine_case(*images, np.eye(4), start, 1)[0].displacement.vectors_mm

    by_kernels = vectors()
    monkeypatch.setenv("JRS_KERNELS", "off")
    np.testing.assert_allclose(vectors(), by_kernels, atol=1e-3)


@pytest.mark.skipif(not native.available(), reason="the kernels were not compiled")
@pytest.mark.parametrize("channels", [1, 3, 5])
def test_the_kernels_follow_the_graph(channels: int) -> None:
    """Many iterations with smoothing and a mask, planes shared by threads; the threads change no bit."""
    rng = np.random.default_rng(11)
    shape = (41, 27, 33)
    fixed = smooth_noise(rng, (channels, *shape), 2.0)
    weights = rng.uniform(0.0, 1.0, shape)
    weights[10:20, 5:15, 3:18] = 0.0
    inputs: dict[str, Any] = {
        "fixed": fixed[None],
        "moving": (np.roll(fixed, 2, axis=2) + 0.1 * smooth_noise(rng, (channels, *shape)))[None],
        "weights": weights[None, None],
        "displacement": 0.7 * smooth_noise(rng, (3, *shape), 4.0)[None],
        "update_kernel": gaussian(1.0),
        "field_kernel": gaussian(0.4),
        "step": np.array(1.0),
        "iterations": np.array(6.0),
    }
    inputs = {name: np.asarray(value, dtype=np.float32) for name, value in inputs.items()}
    want = open_engine(GRAPH, "refinement", "ort-cpu", EngineOptions(threads=1))(inputs)
    one, two, five = (refine_level(inputs, threads) for threads in (1, 2, 5))
    assert one["done"] == want["done"] == 6
    np.testing.assert_allclose(one["similarity"], want["similarity"], atol=1e-5)
    np.testing.assert_allclose(one["refined"], want["refined"], atol=2e-3)
    assert np.abs(want["refined"] - inputs["displacement"]).max() > 1.0
    for other in (two, five):
        for name, value in one.items():
            np.testing.assert_array_equal(other[name], value)


@pytest.mark.skipif(not native.available(), reason="the kernels were not compiled")
def test_the_kernels_leave_their_inputs_alone() -> None:
    rng = np.random.default_rng(12)
    images = smooth_noise(rng, (2, 14, 12, 13))[:, None]
    inputs = {"fixed": images[:1], "moving": images[1:], "weights": np.ones((1, 1, 14, 12, 13), dtype=np.float32)}
    inputs |= {"displacement": smooth_noise(rng, (3, 14, 12, 13), 3.0)[None]}
    inputs |= {"update_kernel": gaussian(1.0), "field_kernel": ONE}
    inputs |= {"step": np.array(1.0, dtype=np.float32), "iterations": np.array(3.0, dtype=np.float32)}
    before = {name: value.copy() for name, value in inputs.items()}
    refine_level(inputs, 1)
    for name, value in before.items():
        np.testing.assert_array_equal(inputs[name], value)


@pytest.mark.skipif(not native.available(), reason="the kernels were not compiled")
def test_a_kernel_wider_than_the_grid() -> None:
    """Against the graph, which takes any."""
    rng = np.random.default_rng(13)
    images = smooth_noise(rng, (2, 6, 9, 10))[:, None]
    inputs = {"fixed": images[:1], "moving": images[1:], "weights": np.ones((1, 1, 6, 9, 10), dtype=np.float32)}
    inputs |= {"displacement": smooth_noise(rng, (3, 6, 9, 10), 3.0)[None]}
    inputs |= {"update_kernel": gaussian(20.0), "field_kernel": gaussian(15.0)}
    inputs |= {"step": np.array(1.0, dtype=np.float32), "iterations": np.array(2.0, dtype=np.float32)}
    got = refine_level(inputs, 1)
    want = open_engine(GRAPH, "refinement", "ort-cpu", EngineOptions(threads=1))(inputs)
    np.testing.assert_allclose(got["refined"], want["refined"], atol=1e-3)


@pytest.mark.parametrize("name", ["moving", "weights", "displacement"])
def test_grids_that_differ_are_refused(name: str) -> None:
    shapes = {"fixed": (1, 2, 6, 7, 8), "moving": (1, 2, 6, 7, 8), "weights": (1, 1, 6, 7, 8)}
    shapes |= {"displacement": (1, 3, 6, 7, 8)}
    shapes[name] = (*shapes[name][:2], 5, 7, 8)
    inputs = {key: np.zeros(shape, dtype=np.float32) for key, shape in shapes.items()}
    inputs |= {"update_kernel": ONE, "field_kernel": ONE, "step": np.array(1.0), "iterations": np.array(1.0)}
    with pytest.raises(ValueError, match="one grid"):
        refine_level(inputs, 1)


def test_the_shipped_graph_is_the_one_the_code_makes() -> None:
    onnx = pytest.importorskip("onnx")
    from jrs.export.refinement import refinement_model

    assert onnx.load(str(GRAPH)) == refinement_model()


def test_tensorrt_builds_the_graph() -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    onnx = pytest.importorskip("onnx")
    model = onnx.load(str(GRAPH))
    sizes = {"C": 2, "X": 20, "Y": 24, "Z": 16, "K": 7, "L": 5}
    for value in model.graph.input:
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_value = sizes[dim.dim_param]
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    assert parser.parse(model.SerializeToString()), [parser.get_error(i).desc() for i in range(parser.num_errors)]
    kinds = [network.get_layer(i).type for i in range(network.num_layers)]
    assert kinds.count(trt.LayerType.GRID_SAMPLE) == 1 and trt.LayerType.PLUGIN_V3 not in kinds
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM86, 0)
    assert builder.build_serialized_network(network, config).nbytes > 1000


# In the pipeline ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pipeline(tiny_bundle: Path) -> Any:
    with Pipeline.open(tiny_bundle, "ort-cpu", threads=1) as opened:
        yield opened


def test_without_refinement_the_field_is_the_networks(pipeline: Pipeline, phantom: Any) -> None:
    fields = []
    register = pipeline.network.register

    def remembered(*inputs: Any) -> Any:
        fields.append(register(*inputs))
        return fields[-1]

    pipeline.network.register = remembered  # type: ignore[method-assign]
    try:
        plain = pipeline.infer(phantom.folder, phantom.atlas, refine=0, segment=False)
        better = pipeline.infer(phantom.folder, phantom.atlas, refine=1, segment=False)
    finally:
        pipeline.network.register = register  # type: ignore[method-assign]
    field = plain.transform.displacement
    expected = np.einsum("wi,ixyz->wxyz", field.geometry.affine[:3, :3], fields[0].displacement[0])
    np.testing.assert_allclose(field.vectors_mm, expected, rtol=1e-6)
    assert field.geometry.shape == (32, 32, 32)
    assert plain.report()["refinement"] is None and "refinement" not in plain.timings_s
    summary = better.report()["refinement"]
    assert summary["modalities"] == ["t1"] and summary["levels_mm"] == [4.0, 2.0]
    assert summary["start"] == "affine"  # case and atlas are one phantom
    coarse, fine = summary["iterations"]
    assert 0 <= coarse <= 12 + 36 and 1 <= fine <= 8
    assert summary["similarity_before"] == plain.report()["similarity"]["after"]
    assert better.report()["similarity"]["after"] > summary["similarity_before"]
    assert better.timings_s["refinement"] > 0


@pytest.mark.parametrize(
    ("channels", "present", "believed"),
    [
        (("t1", "t1ce", "t2", "flair"), (True, False, False, False), False),
        (("t1", "t1ce", "t2", "flair"), (True, False, False, True), True),
        (("t1", "flair"), (False, True), True),
        (("t1",), (True,), True),  # a network made for T1 alone
    ],
)
def test_a_tumour_seen_in_t1_alone_is_uncertain(
    channels: tuple[str, ...], present: tuple[bool, ...], believed: bool
) -> None:
    empty = np.zeros((len(channels), 2, 2, 2), dtype=np.float32)
    image = NetworkInput(empty[None], present, Geometry((2, 2, 2), np.eye(4)))
    assert shows_tumors(image, channels) is believed
    assert shows_enhancement(image, channels) is ("t1ce" not in channels)
    assert smallest_ml(image, channels) == (0.05 if believed else 3.0)


def test_a_tumour_seen_in_t1_alone_is_not_compared_and_may_deform(
    pipeline: Pipeline, phantom: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the other modalities it is rigid as well. A fixed image of T1 alone is taken as it is."""
    given: list[Tumors] = []
    refine = pipeline.refiner.refine_case

    def watched(moving: Any, fixed: Any, *rest: Any, **more: Any) -> Any:
        given.extend((moving[1], fixed[1]))
        return refine(moving, fixed, *rest, **more)

    monkeypatch.setattr(pipeline.refiner, "refine_case", watched)
    pipeline.infer(phantom.folder, phantom.atlas, refine=1, inverse=False)
    t1 = next(Path(phantom.folder).glob("*t1.nii.gz"))
    pipeline.infer(None, phantom.atlas, modalities={"t1": t1}, refine=1, inverse=False)
    whole, _, alone, fixed = given
    assert whole.certain and not alone.certain
    assert alone.mask is not None and alone.lesions and fixed.mask is None


def test_small_regions_seen_in_t1_alone_are_left_out(
    pipeline: Pipeline, phantom: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the report says so; with the other modalities the same region stays."""
    segment = pipeline.network.segment

    def with_a_spot(image: Any, codes: Any) -> Array:
        found = np.zeros_like(segment(image, codes))
        found[0] = 1.0
        # Half a millilitre in voxels of 5 mm.
        found[:, 14:16, 14:16, 14] = np.eye(len(found), dtype=np.float32)[2].reshape(-1, 1, 1)
        return found

    monkeypatch.setattr(pipeline.network, "segment", with_a_spot)
    whole = pipeline.infer(phantom.folder, phantom.atlas, refine=0, inverse=False)
    t1 = next(Path(phantom.folder).glob("*t1.nii.gz"))
    alone = pipeline.infer(None, phantom.atlas, modalities={"t1": t1}, refine=0, inverse=False)
    assert whole.volumes_ml is not None and whole.volumes_ml["native"]["WT"] > 0
    assert alone.volumes_ml is not None and alone.volumes_ml["native"]["WT"] == 0
    assert [w for w in alone.warnings if "what may enhance counts as core" in w]
    assert [w for w in alone.warnings if "left out of the labels" in w and "\n" not in w]
    # Volumes are the patient's: of one twice as large as the atlas it is 4 ml, which is enough.
    monkeypatch.setattr(pipeline, "_affine", lambda *of: (np.diag([2.0, 2.0, 2.0, 1.0]), None, ()))
    larger = pipeline.infer(None, phantom.atlas, modalities={"t1": t1}, refine=0, inverse=False)
    assert not [w for w in larger.warnings if "left out" in w]
    assert not [w for w in whole.warnings if "left out" in w]
