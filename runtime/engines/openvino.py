"""OpenVINO on the CPU: the convolutions' fastest place there; it has no 5-D GridSample, so no transformer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from jrs.errors import BackendError, OutOfMemoryError, last_line
from jrs.runtime.engines.base import (
    Array,
    ChannelsLast,
    Closing,
    EngineInfo,
    EngineOptions,
    Value,
    graph_name,
    hosted,
    is_code,
    on_host,
)
from jrs.runtime.libraries import import_openvino

_TYPES = {"fp32": "f32", "bf16": "bf16"}


class OpenVinoEngine(Closing):
    """One graph compiled by OpenVINO (see ``Engine``)."""

    def __init__(self, graph: Path, options: EngineOptions) -> None:
        try:
            openvino = import_openvino()
        except ImportError as error:
            raise BackendError(f"backend openvino: cannot be imported ({error}); pip install openvino") from error
        if options.precision not in _TYPES:
            raise BackendError(f"backend openvino: precision {options.precision} is not offered; use fp32 or bf16")
        # The default is bf16 on some CPUs and FP32 on others: always say which.
        settings: dict[str, Any] = {
            "INFERENCE_PRECISION_HINT": _TYPES[options.precision],
            "PERFORMANCE_HINT": "LATENCY",
        }
        if options.threads:
            settings["INFERENCE_NUM_THREADS"] = options.threads
        try:
            from jrs.runtime.engines.openvino_graph import average_in_blocks, codes_last

            core = openvino.Core()
            model = core.read_model(str(graph))
            average_in_blocks(model)
            model = codes_last(model, getattr(openvino.Type, _TYPES[options.codes]))
            # As the graph has them: compiled, a port also bears the names of what was folded into it.
            self._inputs = [parameter.get_friendly_name() for parameter in model.get_parameters()]
            self._outputs = [port.get_any_name() for port in model.outputs]
            self._native: Any = core.compile_model(model, "CPU", settings)
        except Exception as error:
            raise BackendError(f"backend openvino: cannot compile {graph_name(graph)} ({last_line(error)})") from error
        self._graph, self._lean = graph, options.lean
        self.info = EngineInfo("openvino", "CPU", options.precision)

    def __enter__(self) -> OpenVinoEngine:
        return self

    def keep(self, inputs: Mapping[str, Value]) -> dict[str, Value]:
        """Run once; codes stay in the layout and precision in which the next graph takes them."""
        try:
            ports = zip(self._inputs, self._native.inputs, strict=True)
            feeds = [_fed(name, inputs[name], port) for name, port in ports]
            results = [np.empty(tuple(port.shape), _dtype(port)) for port in self._native.outputs]
            self._infer(feeds, results)
        except Exception as error:
            reason = last_line(error)
            if "alloc" in reason.lower() or "memory" in reason.lower():
                raise OutOfMemoryError(
                    f"{graph_name(self._graph)}: out of memory; close other programs or use a smaller grid"
                ) from error
            raise BackendError(f"backend openvino: {graph_name(self._graph)} failed ({reason})") from error
        return {n: _named(n, result) for n, result in zip(self._outputs, results, strict=True)}

    def __call__(self, inputs: Mapping[str, Value]) -> dict[str, Array]:
        """Run once."""
        return hosted(self.keep(inputs))

    def _infer(self, feeds: list[npt.NDArray[Any]], results: list[npt.NDArray[Any]]) -> None:
        tensor = import_openvino().Tensor
        request = self._native.create_infer_request()
        for port, array in zip((*self._native.inputs, *self._native.outputs), (*feeds, *results), strict=True):
            # Shared: outputs are written where the caller keeps them.
            request.set_tensor(port, tensor(array, port.shape, port.element_type))
        request.infer()
        del request
        if self._lean:
            self._native.release_memory()


def _fed(name: str, value: Value, port: Any) -> npt.NDArray[Any]:
    dtype = _dtype(port)
    if is_code(name):
        if not (isinstance(value, ChannelsLast) and value.data.dtype == dtype):
            value = ChannelsLast.of(on_host(value), dtype)
        array = value.data
    else:
        array = on_host(value)
    if array.shape != tuple(port.shape):  # memory is handed over as it is, and nothing further on looks
        raise ValueError(f"{name}: {array.shape} where {tuple(port.shape)} belongs")
    # Writeable, because OpenVINO takes nothing else; it writes to no input.
    return np.require(array, dtype, ("C", "W"))


def _named(name: str, result: npt.NDArray[Any]) -> Value:
    return ChannelsLast(result) if is_code(name) else result.astype(np.float32, copy=False)


def _dtype(port: Any) -> Any:
    """What NumPy keeps a port's values in: of bfloat16 the bits."""
    return np.dtype(np.uint16) if port.element_type.get_type_name() == "bf16" else port.element_type.to_dtype()
