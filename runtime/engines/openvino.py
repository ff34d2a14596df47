"""OpenVINO on the CPU: the convolutions' fastest place there; it has no 5-D GridSample, so no transformer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

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
        self._graph, self._lean = graph, options.lean
        self.info = EngineInfo("openvino", "CPU", options.precision)

    def __enter__(self) -> OpenVinoEngine:
        return self

    def keep(self, inputs: Mapping[str, Value]) -> dict[str, Array]:
        """Run once: the host's memory is this backend's."""
        return self(inputs)

    def __call__(self, inputs: Mapping[str, Value]) -> dict[str, Array]:
        """Run once; outputs are written where the caller keeps them."""
        try:
            given = hosted(inputs)
            # Writeable, because OpenVINO takes nothing else; it writes to no input.
            feeds = [np.require(given[p.get_any_name()], _type(p), ("C", "W")) for p in self._native.inputs]
            results = [np.empty(tuple(p.shape), _type(p)) for p in self._native.outputs]
            self._infer(feeds, results)
            names = [p.get_any_name() for p in self._native.outputs]
        except Exception as error:
            reason = last_line(error)
            if "alloc" in reason.lower() or "memory" in reason.lower():
                raise OutOfMemoryError(
                    f"{graph_name(self._graph)}: out of memory; close other programs or use a smaller grid"
                ) from error
            raise BackendError(f"backend openvino: {graph_name(self._graph)} failed ({reason})") from error
        return {n: result.astype(np.float32, copy=False) for n, result in zip(names, results, strict=True)}

    def _infer(self, feeds: list[npt.NDArray[Any]], results: list[npt.NDArray[Any]]) -> None:
        from openvino import Tensor

        request = self._native.create_infer_request()
        for port, array in zip((*self._native.inputs, *self._native.outputs), (*feeds, *results), strict=True):
            request.set_tensor(port, Tensor(array, shared_memory=True))
        request.infer()
        del request
        if self._lean:
            self._native.release_memory()


def _type(port: Any) -> Any:
    return port.element_type.to_dtype()
