"""Backends: one file each, chosen by name.

To add one, write a class like ``OnnxRuntimeEngine`` in a file of its own and give it a line in ``_BACKENDS``.
"""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path

from jrs.errors import BackendError, UsageError
from jrs.runtime.engines.base import Array, Engine, EngineInfo, EngineOptions

__all__ = [
    "Array",
    "Engine",
    "EngineInfo",
    "EngineOptions",
    "available_backends",
    "choose_backend",
    "open_engine",
]

# In the order that ``auto`` prefers: name -> (module to have, class).
_BACKENDS = {
    "openvino": ("openvino", "jrs.runtime.engines.openvino", "OpenVinoEngine"),
    "ort-cpu": ("onnxruntime", "jrs.runtime.engines.onnxruntime", "OnnxRuntimeEngine"),
}
# The custom op needs a backend that runs a function's body.
_SAMPLING_BACKEND = "ort-cpu"
_SAMPLING_GRAPHS = ("transformer", "refinement")


def available_backends() -> list[str]:
    """Backends whose library is installed, best first."""
    return [name for name, (library, _, _) in _BACKENDS.items() if importlib.util.find_spec(library) is not None]


def choose_backend(name: str = "auto", precision: str = "auto") -> tuple[str, str]:
    """The backend and precision that ``auto`` stands for here; the same on every run.

    Raises UsageError for an unknown name, BackendError for one that is not installed.
    """
    if name != "auto" and name not in _BACKENDS:
        raise UsageError(f"--backend {name} is unknown; choose auto, {', '.join(_BACKENDS)}")
    if precision not in ("auto", "fp32", "bf16"):
        raise UsageError(f"--precision {precision} is unknown; choose auto, fp32 or bf16")
    available = available_backends()
    if name == "auto":
        if not available:
            raise BackendError("no backend is installed; pip install onnxruntime")
        wanted = [b for b in available if precision != "bf16" or b == "openvino"]
        if not wanted:
            raise BackendError("precision bf16 needs backend openvino; pip install openvino")
        name = wanted[0]
    elif name not in available:
        raise BackendError(f"backend {name} is not installed; pip install {_BACKENDS[name][0]}")
    return name, "fp32" if precision == "auto" else precision


def open_engine(graph: Path, kind: str, backend: str, options: EngineOptions) -> Engine:
    """Load a graph: ``kind`` is its name in a manifest or ``refinement``, ``backend`` as ``choose_backend`` gave it."""
    if kind in _SAMPLING_GRAPHS:
        backend, options = _SAMPLING_BACKEND, EngineOptions("fp32", options.threads)
    _, module, name = _BACKENDS[backend]
    engine: Engine = getattr(importlib.import_module(module), name)(graph, options)
    return engine
