"""ONNX Runtime on the CPU: runs every graph, the custom op by its body."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jrs.errors import BackendError, OutOfMemoryError, first_line
from jrs.runtime.engines.base import Array, Closing, EngineInfo, EngineOptions, Value, graph_name, hosted
from jrs.runtime.libraries import import_onnxruntime


class OnnxRuntimeEngine(Closing):
    """One graph in an ONNX Runtime session (see ``Engine``)."""

    def __init__(self, graph: Path, options: EngineOptions) -> None:
        try:
            onnxruntime = import_onnxruntime()
        except ImportError as error:
            raise BackendError(
                f"backend ort-cpu: onnxruntime cannot be imported ({error}); install jrs again"
            ) from error
        if options.precision != "fp32":
            raise BackendError(f"backend ort-cpu: precision {options.precision} is not offered; use fp32")
        session = onnxruntime.SessionOptions()
        session.log_severity_level = 3
        if options.threads:
            session.intra_op_num_threads = options.threads
        try:
            self._native: Any = onnxruntime.InferenceSession(str(graph), session, providers=["CPUExecutionProvider"])
        except Exception as error:
            if options.graph_precision == "bf16":
                raise BackendError(
                    f"backend ort-cpu: {graph_name(graph)} has BF16 convolutions, which ONNX Runtime "
                    "computes on no CPU; use --backend openvino, a GPU, or a bundle of another precision"
                ) from error
            raise BackendError(f"backend ort-cpu: cannot load {graph_name(graph)} ({first_line(error)})") from error
        self._outputs = [output.name for output in self._native.get_outputs()]
        self._graph = graph
        self.info = EngineInfo("ort-cpu", "CPU", "fp32")

    def __enter__(self) -> OnnxRuntimeEngine:
        return self

    def keep(self, inputs: Mapping[str, Value]) -> dict[str, Array]:
        """Run once: the host's memory is this backend's."""
        return self(inputs)

    def __call__(self, inputs: Mapping[str, Value]) -> dict[str, Array]:
        """Run once."""
        return self.only(self._outputs, inputs)

    def only(self, outputs: Sequence[str], inputs: Mapping[str, Value]) -> dict[str, Array]:
        """Run once, as far as these outputs need."""
        import onnxruntime

        options = onnxruntime.RunOptions()
        options.only_execute_path_to_fetches = True
        try:
            results = self._native.run(list(outputs), hosted(inputs), options)
        except Exception as error:
            if "alloc" in str(error).lower():
                raise OutOfMemoryError(
                    f"{graph_name(self._graph)}: out of memory; close other programs or use a smaller grid"
                ) from error
            raise BackendError(f"backend ort-cpu: {graph_name(self._graph)} failed ({first_line(error)})") from error
        return dict(zip(outputs, results, strict=True))
