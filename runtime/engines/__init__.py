"""Backends: one file each, chosen by name.

To add one, write a class like ``OnnxRuntimeEngine`` in a file of its own and give it a line in ``_BACKENDS``.
"""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path

from jrs.bundle import SAMPLING
from jrs.errors import BackendError, UsageError
from jrs.runtime.engines.base import (
    Array,
    ChannelsLast,
    Engine,
    EngineInfo,
    EngineOptions,
    Held,
    Value,
    hosted,
    on_host,
)

__all__ = [
    "Array",
    "ChannelsLast",
    "Engine",
    "EngineInfo",
    "EngineOptions",
    "Held",
    "Value",
    "all_backends",
    "available_backends",
    "choose_backend",
    "fallbacks",
    "hosted",
    "on_gpu",
    "on_host",
    "open_engine",
    "why_unavailable",
]

# In the order that ``auto`` prefers: name -> (module to have, module, class).
_BACKENDS = {
    "tensorrt": ("tensorrt", "jrs.runtime.engines.tensorrt", "TensorRtEngine"),
    "tensorrt-rtx": ("tensorrt_rtx", "jrs.runtime.engines.tensorrt", "TensorRtRtxEngine"),
    "ort-cuda": ("onnxruntime", "jrs.runtime.engines.onnxruntime_gpu", "OrtCudaEngine"),
    "ort-tensorrt": ("onnxruntime", "jrs.runtime.engines.onnxruntime_gpu", "OrtTensorRtEngine"),
    "openvino": ("openvino", "jrs.runtime.engines.openvino", "OpenVinoEngine"),
    "ort-cpu": ("onnxruntime", "jrs.runtime.engines.onnxruntime", "OnnxRuntimeEngine"),
}
# What to install for a library that is missing.
_EXTRAS = {"tensorrt": "'jrs[tensorrt]'", "tensorrt_rtx": "'jrs[tensorrt-rtx]'", "cuda.bindings": "'jrs[cuda]'"}
_NEEDS_CUDA_PYTHON = ("tensorrt", "tensorrt-rtx")
_ON_GPU = ("tensorrt", "tensorrt-rtx", "ort-cuda", "ort-tensorrt")
# Compute capabilities before 12 that TensorRT-RTX 1.7 runs a bundle on. On 7.5 it has no FP32 3-D convolutions; on
# others it refuses every engine.
_OF_RTX = ((8, 0), (8, 6), (8, 9))
# Chosen by name alone: builds engines of its own at every change, for what ``tensorrt`` does better.
_NOT_BY_AUTO = ("ort-tensorrt",)
# The custom op needs a backend that runs a function's body or has a kernel; the CPU's others have neither.
_SAMPLING_BACKEND = "ort-cpu"


def all_backends() -> list[str]:
    """The names of all backends, best first."""
    return list(_BACKENDS)


def on_gpu(backend: str) -> bool:
    """Whether a backend computes on a CUDA device."""
    return backend in _ON_GPU


def why_unavailable(backend: str) -> str | None:
    """What a backend lacks on this machine (library, device), with the remedy; None if it can be tried."""
    library = _BACKENDS[backend][0]
    for name in (library, "cuda.bindings") if backend in _NEEDS_CUDA_PYTHON else (library,):
        if not _installed(name):
            return f"{name} is not installed; pip install {_EXTRAS.get(name, name)}"
    if not on_gpu(backend):
        return None
    from jrs.runtime.engines.cuda import visible_devices, why_no_device

    if not visible_devices():
        return f"no CUDA device is visible: {why_no_device()}"
    major, minor = visible_devices()[0].capability
    if backend == "tensorrt-rtx" and (major, minor) not in _OF_RTX and major < 12:
        return f"TensorRT-RTX does not run bundles on compute capability {major}.{minor}; use tensorrt or ort-cuda"
    if library == "onnxruntime":
        from jrs.runtime.engines.onnxruntime_gpu import why_no_provider

        return why_no_provider(backend)
    return None


def _installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # of the parent package
        return False


def available_backends() -> list[str]:
    """Backends whose library is installed and whose device is there, best first."""
    return [name for name in _BACKENDS if why_unavailable(name) is None]


def fallbacks(backend: str, gpus: bool) -> list[str]:
    """What ``auto`` goes on with where a backend of its choice fails, best first; ``gpus``: another GPU's as well."""
    later = list(_BACKENDS)[list(_BACKENDS).index(backend) + 1 :]
    return [b for b in available_backends() if b in later and b not in _NOT_BY_AUTO and (gpus or not on_gpu(b))]


def choose_backend(name: str = "auto", precision: str = "auto") -> tuple[str, str]:
    """The backend and precision that ``auto`` stands for here; the same on every run.

    ``precision`` is what a CPU backend computes in; a GPU computes in what the bundle's graphs are stored in. Without
    a bundle, ``auto`` is FP32; ``jrs.runtime.precision`` says what it is with one.
    Raises UsageError for an unknown name, BackendError for one that is not installed or has no device.
    """
    if name != "auto" and name not in _BACKENDS:
        raise UsageError(f"--backend {name} is unknown; choose auto, {', '.join(_BACKENDS)}")
    if precision not in ("auto", "fp32", "bf16"):
        raise UsageError(f"--precision {precision} is unknown; choose auto, fp32 or bf16")
    if name == "auto":
        available = [backend for backend in available_backends() if backend not in _NOT_BY_AUTO]
        if not available:
            raise BackendError("no backend is installed; pip install onnxruntime")
        wanted = [b for b in available if precision != "bf16" or b == "openvino"]
        if not wanted:
            raise BackendError("precision bf16 needs backend openvino; pip install openvino")
        name = wanted[0]
    else:
        lacking = why_unavailable(name)
        if lacking is not None:
            raise BackendError(f"backend {name} cannot be used: {lacking}")
    return name, "fp32" if precision == "auto" else precision


def open_engine(graph: Path, kind: str, backend: str, options: EngineOptions) -> Engine:
    """Load a graph: ``kind`` is its name in a manifest or ``refinement``, ``backend`` as ``choose_backend`` gave it."""
    if kind in SAMPLING and not on_gpu(backend):
        backend, options = _SAMPLING_BACKEND, EngineOptions("fp32", options.threads)
    _, module, name = _BACKENDS[backend]
    engine: Engine = getattr(importlib.import_module(module), name)(graph, options)
    return engine
