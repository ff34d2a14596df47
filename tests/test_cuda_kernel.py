"""The sampler's CUDA kernel: its arithmetic on the host against PyTorch and SciPy, its compilation for every GPU."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jrs.errors import BackendError
from jrs.runtime.engines import kernel

CAPABILITIES = [(7, 5), (8, 0), (8, 7), (9, 0), (12, 0)]
Array = np.ndarray[Any, Any]


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The kernel's own source as C++ for the host."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    library = tmp_path_factory.mktemp("kernel") / "host.so"
    shim = Path(__file__).with_name("grid_sample_3d_host.cpp")
    command = [compiler, "-O1", "-std=c++17", "-shared", "-fPIC", "-w", f'-DKERNEL="{kernel.SOURCE}"']
    subprocess.run([*command, str(shim), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


def run(host: ctypes.CDLL, volume: Array, coords: Array) -> Array:
    """(N,C,D,H,W) at (N,3,d,h,w) by the compiled kernel, in the type of ``volume``."""
    n, channels, *size = volume.shape
    points = int(np.prod(coords.shape[2:]))
    sizes = np.array([channels, *size, points, n * points], dtype=np.int32)
    out = np.full((n, channels, *coords.shape[2:]), np.nan, dtype=volume.dtype)
    function = host.run_fp16 if volume.dtype == np.float16 else host.run_fp32
    volume, coords = np.ascontiguousarray(volume), np.ascontiguousarray(coords, dtype=np.float32)
    function(*(ctypes.c_void_p(a.ctypes.data) for a in (volume, coords, sizes, out)))
    return out


def by_torch(volume: Array, coords: Array) -> Array:
    """torch's own grid_sample, float64, border padding, corners aligned."""
    torch = pytest.importorskip("torch")
    size = np.array(volume.shape[2:]).reshape(1, 3, 1, 1, 1)
    grid = coords.astype(np.float64) * (2.0 / np.maximum(size - 1, 1)) - 1.0
    grid = np.ascontiguousarray(grid[:, ::-1].transpose(0, 2, 3, 4, 1))
    sampled = torch.nn.functional.grid_sample(
        torch.from_numpy(volume.astype(np.float64)),
        torch.from_numpy(grid),
        mode="bilinear",
        padding_mode="border",
        align_corners=True,
    )
    result: Array = sampled.numpy()
    return result


SIZES = [
    ((5, 7, 9), (4, 3, 6)),
    ((1, 6, 4), (2, 2, 2)),
    ((3, 1, 1), (5, 1, 2)),
    ((2, 2, 2), (1, 1, 1)),
    ((6, 5, 4), (9, 11, 13)),
]


@pytest.mark.parametrize(("size", "target"), SIZES)
@pytest.mark.parametrize("channels", [1, 3, 8, 9, 17])
def test_the_kernel_samples_as_torch_does(
    host: ctypes.CDLL, size: tuple[int, ...], target: tuple[int, ...], channels: int
) -> None:
    rng = np.random.default_rng(channels)
    volume = rng.normal(size=(2, channels, *size)).astype(np.float32)
    extent = np.array(size).reshape(1, 3, 1, 1, 1)
    coords = (rng.random((2, 3, *target)) * (extent + 4) - 2.5).astype(np.float32)
    np.testing.assert_allclose(run(host, volume, coords), by_torch(volume, coords), atol=2e-5)


def test_voxels_borders_and_far_points(host: ctypes.CDLL) -> None:
    volume = np.random.default_rng(1).normal(size=(1, 5, 4, 5, 6)).astype(np.float32)
    identity = np.indices((4, 5, 6), dtype=np.float32)[None]
    np.testing.assert_array_equal(run(host, volume, identity), volume)
    far = np.full((1, 3, 1, 1, 4), 0.0, dtype=np.float32)
    far[0, 0, 0, 0] = [-np.inf, np.inf, 3e38, -3e38]
    want = volume[0, :, [0, 3, 3, 0], 0, 0].T
    np.testing.assert_array_equal(run(host, volume, far)[0, :, 0, 0], want)


def test_a_coordinate_that_is_not_a_number_is_index_zero(host: ctypes.CDLL) -> None:
    """As the GPU's fmax and fmin have it, and torch on a GPU with them; torch on a CPU takes the last index."""
    volume = np.random.default_rng(2).normal(size=(1, 4, 4, 5, 6)).astype(np.float32)
    coords = np.full((1, 3, 1, 1, 1), np.nan, dtype=np.float32)
    got = run(host, volume, coords)
    np.testing.assert_array_equal(got[0, :, 0, 0, 0], volume[0, :, 0, 0, 0])
    one = coords.copy()
    one[0, 0], one[0, 1], one[0, 2] = np.nan, 2.0, 3.0
    np.testing.assert_array_equal(run(host, volume, one)[0, :, 0, 0, 0], volume[0, :, 0, 2, 3])


def test_fp16_volumes_are_summed_in_fp32(host: ctypes.CDLL) -> None:
    rng = np.random.default_rng(3)
    volume = (1000.0 * rng.normal(size=(1, 6, 6, 7, 8))).astype(np.float16)
    coords = (rng.random((1, 3, 5, 6, 7)) * 9 - 1).astype(np.float32)
    got = run(host, volume, coords)
    assert got.dtype == np.float16
    exact = by_torch(volume, coords)
    # One rounding, at the end: half a unit in the last place of FP16.
    assert (np.abs(got - exact) <= 0.501 * np.spacing(np.abs(exact).astype(np.float16)) + 1e-3).all()


def test_scipy_agrees_inside(host: ctypes.CDLL) -> None:
    ndimage = pytest.importorskip("scipy.ndimage")
    rng = np.random.default_rng(4)
    volume = rng.normal(size=(1, 1, 6, 5, 7)).astype(np.float32)
    coords = rng.uniform(0, 4, (1, 3, 3, 4, 5)).astype(np.float32)
    want = ndimage.map_coordinates(volume[0, 0].astype(float), coords[0].astype(float), order=1)
    np.testing.assert_allclose(run(host, volume, coords)[0, 0], want, atol=2e-6)


# For the device -------------------------------------------------------------------------------------------


def entries(ptx: str) -> list[str]:
    return re.findall(r"\.visible \.entry (\w+)\(", ptx)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_nvrtc_compiles_the_kernel(capability: tuple[int, int]) -> None:
    pytest.importorskip("cuda.bindings.nvrtc")
    try:
        ptx = kernel.compile_ptx(capability).decode()
    except BackendError as error:
        pytest.skip(str(error))
    assert f".target sm_{capability[0]}{capability[1]}" in ptx
    assert sorted(entries(ptx)) == sorted(kernel.KERNELS.values())
    # Two pointers, six integers, one pointer: what the plugin passes, in this order.
    head = ptx[ptx.index(".entry jrs_grid_sample_3d_fp32") :].split(")")[0]
    assert re.findall(r"\.param \.(\w+)", head) == ["u64"] * 2 + ["u32"] * 6 + ["u64"]
    assert "cvt.f32.f16" in ptx and ".f64" not in ptx


def test_nvcc_assembles_it_without_spilling(tmp_path: Path) -> None:
    """Beyond PTX: machine code for every architecture, whose registers fit."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("needs nvcc")
    done = subprocess.run(
        [nvcc, "-std=c++17", "-cubin", "-arch=sm_87", "-Xptxas", "-v", str(kernel.SOURCE), "-o", str(tmp_path / "k")],
        capture_output=True,
        text=True,
        check=True,
    )
    spills = re.findall(r"(\d+) bytes spill", done.stderr)
    assert spills and set(spills) == {"0"}
    assert all(int(n) <= 128 for n in re.findall(r"Used (\d+) registers", done.stderr))


def test_a_capability_that_nvrtc_does_not_know_is_one_line() -> None:
    pytest.importorskip("cuda.bindings.nvrtc")
    with pytest.raises(BackendError) as caught:
        kernel.compile_ptx((1, 0))
    assert "\n" not in str(caught.value)
