"""The compiled kernels beside scipy and beside the same work without them, at their seams and edges."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import ndimage

from jrs.fields import DisplacementField, jacobian_determinant
from jrs.geometry import Geometry
from jrs.runtime import native
from jrs.runtime.inversion import VoxelField
from jrs.runtime.measures import jacobian_map
from jrs.runtime.sampling import Sampled, Warp, positions, sample

pytestmark = pytest.mark.skipif(not native.available(), reason="the kernels were not compiled")
GENERATOR = np.random.default_rng


@contextmanager
def portable() -> Iterator[None]:
    """Without the compiled kernels."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JRS_KERNELS", "off")
        yield


def smooth(shape: tuple[int, ...], size: float, seed: int) -> np.ndarray:
    """A random displacement (3, shape), smooth over some voxels, of deviation ``size``."""
    noise = GENERATOR(seed).normal(size=(3, *shape))
    field = np.stack([ndimage.gaussian_filter(c, 3.0) for c in noise])
    return (field / field.std() * size).astype(np.float32)


@pytest.mark.skipif(not Path("/proc/cpuinfo").is_file(), reason="nothing says what the processor has")
def test_the_processors_registers_are_used() -> None:
    """Which version runs is the loader's choice, and a wrong one shows in nothing but the time."""
    if native.wide() is None:
        pytest.skip("this compiler makes one version alone")
    flags = Path("/proc/cpuinfo").read_text().split()
    assert native.wide() == all(flag in flags for flag in ("avx2", "fma", "bmi1", "bmi2", "f16c", "movbe"))
    assert native.status() == f"compiled, {'with' if native.wide() else 'without'} AVX2 and FMA"


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5, 9])
@pytest.mark.parametrize("threads", [1, 3])
def test_any_number_of_channels(channels: int, threads: int) -> None:
    data = GENERATOR(0).normal(size=(channels, 11, 9, 8)).astype(np.float32)
    coords = GENERATOR(1).uniform(0.0, 7.0, (3, 40, 30, 20)).astype(np.float32)
    want = np.stack([ndimage.map_coordinates(c.astype(float), coords.astype(float), order=1) for c in data])
    np.testing.assert_allclose(Sampled(data, threads).at(coords), want, atol=1e-5)
    np.testing.assert_allclose(sample(data, coords, 0.0, threads), want, atol=1e-5)
    few = coords[:, :2, :2, :2]
    np.testing.assert_allclose(sample(data, few, None, threads), want[:, :2, :2, :2], atol=1e-5)


@pytest.mark.parametrize("outside", [None, 0.0, -7.0])
def test_edges_half_a_voxel_and_no_number(outside: float | None) -> None:
    line = np.arange(4, dtype=np.float32).reshape(1, 4, 1, 1) + 1.0
    x = np.array([-9.0, -0.51, -0.5, -0.25, 0.0, 1.25, 3.0, 3.5, 3.51, np.inf, -np.inf, np.nan], dtype=np.float32)
    coords = np.stack([x, np.zeros_like(x), np.zeros_like(x)])
    there = np.array([1.0, 1.0, 1.0, 1.0, 1.0, 2.25, 4.0, 4.0, 4.0, 4.0, 1.0, 1.0])
    gone = np.array([1, 1, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1], dtype=bool)
    want = there if outside is None else np.where(gone, outside, there)
    for data in (line, np.repeat(line, 3, axis=0)):
        got = Sampled(data).at(coords, outside)
        np.testing.assert_allclose(got, np.repeat(want[None], len(data), axis=0), atol=1e-6)


@pytest.mark.parametrize("parts", [(1, 1, 1), (2, 1, 3), (1, 2, 2), (8, 8, 8)], ids=str)
@pytest.mark.parametrize("warped", [False, True])
def test_pull_agrees_with_what_it_replaces(parts: tuple[int, int, int], warped: bool) -> None:
    """Rows longer than what is worked on at once, targets partly outside, fields smaller than the target."""
    data = GENERATOR(2).normal(size=(5, 12, 10, 300)).astype(np.float32)
    shape = (5, 4, 310)
    base = np.eye(4)
    base[:3, :3] = np.array([[2.1, 0.3, 0.0], [-0.2, 1.9, 0.01], [0.1, 0.3, 1.02]]) / np.array(parts)
    base[:3, 3] = (-1.2, 0.4, -6.3)
    warp = None
    if warped:
        where = np.diag([*(1.2 / np.array(parts)), 1.0])
        where[:3, 3] = (0.3, -0.2, 0.1)
        linear = np.array([[1.0, 0.2, 0.0], [0.0, 0.9, -0.1], [0.1, 0.0, 1.1]])
        warp = Warp(Sampled(smooth((6, 5, 200), 1.5, 3)), where, linear)
    got = Sampled(data, 2).pull(shape, base, warp, -2.0, parts)
    got_positions = positions(shape, base, warp, 2)
    with portable():
        if warp is not None:
            warp = Warp(Sampled(smooth((6, 5, 200), 1.5, 3)), warp.where, warp.linear)
        want = Sampled(data, 2).pull(shape, base, warp, -2.0, parts)
        want_positions = positions(shape, base, warp, 2)
    np.testing.assert_allclose(got_positions, want_positions, atol=1e-4)
    assert float(want.std()) > 0.05
    # A point on the border to outside may fall on either side of it.
    off = np.abs(got - want) > 2e-3
    assert off.mean() < 1e-3


def test_the_number_of_threads_changes_nothing() -> None:
    field = smooth((30, 28, 26), 1.0, 4)
    grid = Geometry((30, 28, 26), np.diag([2.0, 2.5, 2.0, 1.0]))
    data = GENERATOR(5).normal(size=(4, 30, 28, 26)).astype(np.float32)
    results = []
    for threads in (1, 2, 5):
        warp = Warp(Sampled(field, threads), np.eye(4), np.eye(3))
        pulled = Sampled(data, threads).pull((30, 28, 26), np.eye(4), warp)
        laid_out = VoxelField(DisplacementField(field, grid), threads=threads)
        inverse = laid_out.solve_on((30, 28, 26), np.eye(4), np.eye(4))
        results.append((pulled, inverse))
    for pulled, inverse in results[1:]:
        np.testing.assert_array_equal(pulled, results[0][0])
        np.testing.assert_array_equal(inverse, results[0][1])


@pytest.mark.parametrize("border", [False, True])
def test_the_inverse_is_one_and_the_same_without_the_kernels(border: bool) -> None:
    """Over the whole field and outside it; slopes up to 0.5."""
    field = smooth((24, 22, 20), 0.4, 6)
    assert 0.2 < np.abs(np.gradient(field, axis=(1, 2, 3))).max() < 0.6
    grid = Geometry((24, 22, 20), np.eye(4))
    z = GENERATOR(7).uniform(-6.0, 29.0, (3, 30_000)).astype(np.float32)
    v, left = VoxelField(DisplacementField(field, grid), threads=2).solve(z, border)
    with portable():
        want, want_left = VoxelField(DisplacementField(field, grid), threads=2).solve(z, border)
    # Zero outside by a jump: near it there are points without a solution, or with two.
    solved = (np.abs(left).max(axis=0) < 2e-3) & (np.abs(want_left).max(axis=0) < 2e-3)
    assert solved.mean() > (0.9999 if border else 0.95)
    same = np.abs(v - want).max(axis=0)[solved] < 4e-3
    assert same.mean() > (0.9999 if border else 0.98)
    # By scipy: x = z + v leads back to z.
    x = z + v
    ends = np.array(field.shape[1:])[:, None] - 1.0
    inside = solved & ((x >= 0) & (x <= ends)).all(axis=0)
    u = np.stack([ndimage.map_coordinates(c.astype(float), x[:, inside].astype(float), order=1) for c in field])
    assert inside.mean() > 0.2
    np.testing.assert_allclose(x[:, inside] + u, z[:, inside], atol=3e-3)


def test_grid_and_points_have_the_same_inverse() -> None:
    field = smooth((16, 15, 14), 0.8, 9)
    grid = Geometry((16, 15, 14), np.diag([2.0, 3.0, 2.5, 1.0]))
    u = VoxelField(DisplacementField(field, grid))
    where = np.array([[0.0, 1.1, 0.0, 0.3], [0.9, 0.0, 0.1, 0.2], [0.0, 0.1, -1.0, 12.0], [0.0, 0.0, 0.0, 1.0]])
    shape = (14, 13, 12)
    got = u.solve_on(shape, where, np.zeros((4, 4)))
    index = np.concatenate([np.indices(shape).reshape(3, -1), np.ones((1, np.prod(shape)))])
    v, left = u.solve((where[:3] @ index).astype(np.float32), border=False)
    close = np.abs(left).max(axis=0) < 1e-3
    assert close.mean() > 0.97
    want = grid.affine[:3, :3] @ v
    same = np.abs(got.reshape(3, -1) - want).max(axis=0) < 0.01
    assert same[close].mean() > 0.99


@pytest.mark.parametrize("shape", [(13, 11, 9), (1, 11, 9), (4, 1, 1), (2, 2, 2)])
def test_determinants_are_those_of_the_field(shape: tuple[int, int, int], helpers: Any) -> None:
    grid = Geometry(shape, helpers.grid_affine(shape, (1.5, 2.0, 3.0), "LAS", (12, -20, 30), (5, -7, 11)))
    vectors = GENERATOR(12).normal(size=(3, *shape)).astype(np.float32)
    field = DisplacementField(vectors, grid)
    want = jacobian_determinant(field)
    for threads in (1, 3):
        np.testing.assert_allclose(jacobian_map(field, threads), want, rtol=1e-4, atol=1e-5)
    with portable():
        np.testing.assert_array_equal(jacobian_map(field), want)


@pytest.mark.parametrize("margin", [None, 9.0])
@pytest.mark.parametrize("threads", [1, 3])
def test_a_field_is_laid_out_in_its_voxels_and_fades(margin: float | None, threads: int) -> None:
    vectors = smooth((13, 9, 11), 1.5, 10)
    affine = np.array([[0.0, 2.0, 0.3, 5.0], [-1.5, 0.0, 0.0, 2.0], [0.1, 0.0, 2.5, -7.0], [0.0, 0.0, 0.0, 1.0]])
    field = DisplacementField(vectors, Geometry((13, 9, 11), affine))
    linear = np.array([[1.1, 0.2, 0.0], [0.0, 0.9, -0.1], [0.0, 0.0, 1.0]])
    made = VoxelField(field, linear, threads, margin)
    want = field if margin is None else field.faded(margin)
    np.testing.assert_array_equal(made.grid.affine, want.geometry.affine)
    mm = np.linalg.inv(linear) @ affine[:3, :3] @ made.sampled.at(np.indices(made.grid.shape)).reshape(3, -1)
    np.testing.assert_allclose(mm.reshape(want.vectors_mm.shape), want.vectors_mm, atol=2e-5)


def test_they_can_be_turned_off(monkeypatch: pytest.MonkeyPatch) -> None:
    assert native.status().startswith("compiled")
    monkeypatch.setenv("JRS_KERNELS", "off")
    assert not native.available()
    assert native.status() == "turned off by JRS_KERNELS"


def test_without_the_compiled_module_nothing_is_missed(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """A library that cannot be loaded counts as none."""
    broken = tmp_path / "_kernels.so"
    broken.write_bytes(b"no library")
    spec = type("Spec", (), {"origin": str(broken)})()
    monkeypatch.setattr(native.importlib.util, "find_spec", lambda name: spec)
    native._loaded.cache_clear()
    try:
        assert not native.available() and "another version" in native.status()
        data = np.arange(24, dtype=np.float32).reshape(1, 2, 3, 4)
        np.testing.assert_allclose(sample(data, np.indices((2, 3, 4)).astype(np.float32)), data, atol=1e-4)
    finally:
        monkeypatch.undo()
        native._loaded.cache_clear()


def test_kernels_of_another_version_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert native.available()
    monkeypatch.setattr(native, "_VERSION", native._VERSION + 1)
    native._loaded.cache_clear()
    try:
        assert not native.available() and "another version" in native.status()
        monkeypatch.setattr(native.importlib.util, "find_spec", lambda name: None)
        native._loaded.cache_clear()
        assert "install a C compiler" in native.status()
    finally:
        monkeypatch.undo()
        native._loaded.cache_clear()


@pytest.mark.parametrize("passes", [2, 3])
def test_passes_are_composed(tiny_bundle: Any, several_passes: Any, helpers: Any, kernels: str, passes: int) -> None:
    """Against the passes one by one, composed by scipy's interpolation."""
    from jrs.bundle import Bundle
    from jrs.runtime.network import Network

    once = Bundle.open(tiny_bundle)
    shape = (1, len(once.manifest.model.channels), *once.manifest.model.grid.shape)
    image, other = (GENERATOR(seed).normal(size=shape).astype(np.float32) for seed in (20, 21))
    with Network(once, "ort-cpu", threads=1) as network:
        fixed = network.encode(other)
        moved, u = image, np.zeros((3, *shape[2:]))
        for _ in range(passes):
            further = network.register(moved, network.encode(moved), fixed).displacement[0].astype(np.float64)
            u = further + helpers.at(u, further)
            moved = helpers.at(image[0], u).astype(np.float32)[None]
    with Network(Bundle.open(several_passes(passes)), "ort-cpu", threads=1) as network:
        got = network.register(image, network.encode(image), network.encode(other))
    assert np.abs(u).max() > 0.05
    np.testing.assert_allclose(got.displacement[0], u, atol=2e-4)
    np.testing.assert_allclose(got.moved, moved, atol=2e-3)


def test_the_networks_own_warp_is_the_graphs() -> None:
    """On the CPU the moved image is sampled by the kernels, in place of the transformer's graph."""
    from jrs.bundle import Bundle
    from jrs.runtime.network import Network

    bundle = Bundle.open(None)
    shape = (1, len(bundle.manifest.model.channels), *bundle.manifest.model.grid.shape)
    image, fixed = (GENERATOR(seed).normal(size=shape).astype(np.float32) for seed in (10, 11))
    with Network(bundle, "ort-cpu") as network:
        codes = network.encode(image), network.encode(fixed)
        got = network.register(image, *codes)
        with portable():
            want = network.register(image, *codes)
    # The graph adds the index and takes it away again, and a second pass sees what that did to the image.
    np.testing.assert_allclose(got.displacement, want.displacement, atol=5e-4)
    assert np.abs(want.moved - image).max() > 0.1
    np.testing.assert_allclose(got.moved, want.moved, atol=2e-3)
