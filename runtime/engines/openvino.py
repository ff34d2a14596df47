"""OpenVINO on the CPU: the convolutions' fastest place there; it has no 5-D GridSample, so no transformer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jrs.errors import BackendError, OutOfMemoryError, last_line
from jrs.runtime.engines.base import Array, Closing, EngineInfo, EngineOptions, Value, graph_name, hosted

_HINTS = {"fp32": "f32", "bf16": "bf16"}


class OpenVinoEngine(Closing):
    """One graph compiled by OpenVINO (see ``Engine``)."""

    def __init__(self, graph: Path, options: EngineOptions) -> None:
        try:
            import openvino
        except ImportError as error:
            raise BackendError(f"backend openvino: cannot be imported ({error}); pip install openvino") from error
        if options.precision not in _HINTS:
            raise BackendError(f"backend openvino: precision {options.precision} is not offered; use fp32 or bf16")
        # The default is bf16 on some CPUs and FP32 on others: always say which.
        settings: dict[str, Any] = {
            "INFERENCE_PRECISION_HINT": _HINTS[options.precision],
            "PERFORMANCE_HINT": "LATENCY",
        }
        if options.threads:
            settings["INFERENCE_NUM_THREADS"] = options.threads
        try:
            core = openvino.Core()
            self._native: Any = core.compile_model(core.read_model(str(graph)), "CPU", settings)
        except Exception as error:
            raise BackendError(f"backend openvino: cannot compile {graph_name(graph)} ({last_line(error)})") from error
        self._outputs = [output.get_any_name() for output in self._native.outputs]
        self._graph = graph
        self.info = EngineInfo("openvino", "CPU", options.precision)

    def __enter__(self) -> OpenVinoEngine:
        return self

    def keep(self, inputs: Mapping[str, Value]) -> dict[str, Array]:
        """Run once: the host's memory is this backend's."""
        return self(inputs)

    def __call__(self, inputs: Mapping[str, Value]) -> dict[str, Array]:
        """Run once."""
        try:
            results = self._native(hosted(inputs))
        except Exception as error:
            reason = last_line(error)
            if "alloc" in reason.lower() or "memory" in reason.lower():
                raise OutOfMemoryError(
                    f"{graph_name(self._graph)}: out of memory; close other programs or use a smaller grid"
                ) from error
            raise BackendError(f"backend openvino: {graph_name(self._graph)} failed ({reason})") from error
        # Results are views of the request's own memory, which the next run overwrites.
        return {name: np.array(results[name], dtype=np.float32) for name in self._outputs}
