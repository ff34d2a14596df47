"""The sampler as a CUDA kernel of our own: compiled by NVRTC, put into a TensorRT engine as an ahead-of-time plugin.

TensorRT 10 and 11.0 to 11.1 have no GridSample for volumes. From 10.9 on the plugin ``jrs::JrsGridSample3D`` is
registered before a graph is parsed; the compiled kernel then lies inside the engine, which loads without Python's
half of it.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

from jrs.errors import BackendError, first_line
from jrs.resources import DATA

SOURCE = DATA / "kernels" / "grid_sample_3d.cu"
KERNELS = {"fp32": "jrs_grid_sample_3d_fp32", "fp16": "jrs_grid_sample_3d_fp16"}
PLUGIN = "jrs::JrsGridSample3D"
THREADS = 256
"""Of a block; a multiple of a warp."""

_registered: dict[str, str] = {}
"""By library: empty, or why it did not take the plugin; half of one may be left in its registry."""


def compile_ptx(compute_capability: tuple[int, int]) -> bytes:
    """PTX of the kernels for a compute capability (8, 7), by NVRTC.

    Raises BackendError where NVRTC is missing or refuses, with its first line.
    """
    nvrtc = _import_nvrtc()
    status, program = nvrtc.nvrtcCreateProgram(SOURCE.read_bytes(), SOURCE.name.encode(), 0, [], [])
    _check(nvrtc, status)
    try:
        return _compiled(nvrtc, program, compute_capability)
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _compiled(nvrtc: Any, program: Any, compute_capability: tuple[int, int]) -> bytes:
    major, minor = compute_capability
    options = [f"--gpu-architecture=compute_{major}{minor}".encode(), b"--std=c++17", b"--fmad=true"]
    (status,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        _, size = nvrtc.nvrtcGetProgramLogSize(program)
        log = b" " * size
        nvrtc.nvrtcGetProgramLog(program, log)
        reason = log.decode(errors="replace").strip(" \0\n").splitlines() or [str(status)]
        raise BackendError(f"{SOURCE.name}: NVRTC cannot compile it for capability {major}.{minor} ({reason[0]})")
    status, size = nvrtc.nvrtcGetPTXSize(program)
    _check(nvrtc, status)
    ptx = b" " * size
    _check(nvrtc, *nvrtc.nvrtcGetPTX(program, ptx))
    compiled: bytes = ptx.rstrip(b"\0 ")
    return compiled


def _import_nvrtc() -> Any:
    try:
        from cuda.bindings import nvrtc

        nvrtc.nvrtcVersion()
    except (ImportError, RuntimeError) as error:
        raise BackendError(
            f"NVRTC cannot be used ({first_line(error)}); pip install nvidia-cuda-nvrtc, for CUDA 12 "
            "nvidia-cuda-nvrtc-cu12, or install the CUDA toolkit"
        ) from error
    return nvrtc


def _check(nvrtc: Any, status: Any) -> None:
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise BackendError(f"NVRTC failed ({status})")


def has_native_sampler(library: ModuleType) -> bool:
    """Whether the library's GridSample takes volumes: TensorRT-RTX from 1.6 on, and TensorRT from 11.2.1 on."""
    return _version(library) >= ((1, 6) if library.__name__ == "tensorrt_rtx" else (11, 2, 1))


def _version(library: ModuleType) -> tuple[int, ...]:
    return tuple(int(part) for part in str(library.__version__).split(".")[:3] if part.isdigit())


def takes_plugins(library: ModuleType) -> bool:
    """Whether the library takes plugins that are compiled ahead of time (TensorRT from 10.9 on)."""
    return _plugin_module(library) is not None


def _plugin_module(library: Any) -> Any:
    """The library's module of Python plugins, None if it has none that are compiled ahead of time."""
    # On import it prints a line to stdout by this class, where results go.
    loud = library.Logger
    library.Logger = type("Quiet", (loud,), {"log": lambda self, *message: None})
    try:
        module = importlib.import_module(f"{library.__name__}.plugin")
    except ImportError:
        return None
    finally:
        library.Logger = loud
    return module if hasattr(module, "aot_impl") else None


def register_plugin(library: ModuleType, compute_capability: tuple[int, int]) -> None:
    """Register the plugin with a TensorRT library, once a process; the kernel is compiled for the capability.

    Raises BackendError where the kernel cannot be compiled or the library does not take the plugin.
    """
    if library.__name__ not in _registered:
        ptx = compile_ptx(compute_capability)
        refused = ""
        try:
            _define(library, _plugin_module(library), ptx)
        except Exception as error:
            of = f"{library.__name__} {library.__version__}"
            refused = f"{of} does not take the plugin {PLUGIN} ({first_line(error)})"
        _registered[library.__name__] = refused
    if _registered[library.__name__]:
        raise BackendError(_registered[library.__name__])


def _define(library: Any, trtp: Any, ptx: bytes) -> None:
    # TensorRT checks the annotations of these functions, and takes no strings for them: they are set by hand.
    def describe(X, coords):  # type: ignore[no-untyped-def]
        out = X.like()
        for axis in (2, 3, 4):
            out.shape_expr[axis] = coords.shape_expr[axis]
        return out

    describe.__annotations__ = {"X": trtp.TensorDesc, "coords": trtp.TensorDesc, "return": trtp.TensorDesc}
    trtp.register(PLUGIN)(describe)

    def tune(X, coords, outputs):  # type: ignore[no-untyped-def]
        return [trtp.AutoTuneCombination(types, "LINEAR") for types in ("FP32, FP32, FP32", "FP16, FP32, FP16")]

    trtp.autotune(PLUGIN)(tune)

    def implement(X, coords, outputs, tactic):  # type: ignore[no-untyped-def]
        size, target = X.shape_expr, outputs[0].shape_expr
        points = target[2] * target[3] * target[4]
        scalars = [size[1], size[2], size[3], size[4], points, size[0] * points]
        launch = trtp.KernelLaunchParams()
        launch.grid_x = trtp.cdiv(size[0] * points, THREADS)
        launch.block_x = THREADS
        launch.shared_mem = 0
        kernel = KERNELS["fp16" if X.dtype == library.float16 else "fp32"]
        extra = trtp.SymIntExprs.from_tuple([trtp.SymInt32(value) for value in scalars])
        return kernel.encode(), ptx, launch, extra

    returned = tuple[bytes, bytes, trtp.KernelLaunchParams, trtp.SymIntExprs]
    implement.__annotations__ = {"return": returned}
    trtp.aot_impl(PLUGIN)(implement)
