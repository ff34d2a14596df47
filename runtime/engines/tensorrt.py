"""TensorRT and TensorRT-RTX on a GPU: arrays stay on the device from graph to graph, one stream, CUDA graphs."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from jrs.errors import BackendError, JrsError, OutOfMemoryError, first_line
from jrs.runtime.engines import plans, tensorrt_log
from jrs.runtime.engines.base import Array, Closing, EngineInfo, EngineOptions, Value, graph_name, on_host
from jrs.runtime.engines.cuda import CudaSession, DeviceArray, shared_session

_GRAPHS_KEPT = 4
"""CUDA graphs are bound to addresses; memory is used again, so few sets of addresses ever occur."""


class TensorRtEngine(Closing):
    """One graph as an engine of TensorRT (see ``Engine``); ``backend`` is tensorrt or tensorrt-rtx."""

    backend = "tensorrt"

    def __init__(self, graph: Path, options: EngineOptions) -> None:
        if options.precision != "fp32" and options.precision != options.graph_precision:
            raise BackendError(
                f"backend {self.backend}: the bundle's graphs are {options.graph_precision}; "
                f"export one with jrs export --precision {options.precision}"
            )
        library = plans.import_library(self.backend)
        try:
            self._session: CudaSession = shared_session()
        except BackendError as error:
            raise BackendError(f"backend {self.backend}: {error}") from error
        self._graph = graph
        self._cuda_graphs: OrderedDict[tuple[int, ...], Any] = OrderedDict()
        self._capturable = True
        try:
            self._open(library, plans.ready_plan(library, graph, options.graph_precision), options.graph_precision)
        except JrsError:
            raise
        except Exception as error:  # with a driver that does not fit the bindings raise what they like
            raise BackendError(
                f"backend {self.backend}: {graph_name(graph)} cannot be opened ({first_line(error)})"
            ) from error
        self.info = EngineInfo(self.backend, self._session.device.name, options.graph_precision)

    def _open(self, trt: Any, content: bytes, precision: str) -> None:
        self._logger = tensorrt_log.make_logger(trt)
        self._runtime: Any = trt.Runtime(self._logger)
        engine = self._runtime.deserialize_cuda_engine(content)
        if engine is None:
            raise self._failure("cannot be loaded")
        self._native: Any = self._make_context(trt, engine, precision)
        if self._native is None:
            raise self._failure("has no execution context")
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        self._shapes = {name: tuple(int(n) for n in engine.get_tensor_shape(name)) for name in names}
        inputs = trt.TensorIOMode.INPUT
        self._inputs = [name for name in names if engine.get_tensor_mode(name) == inputs]
        self._outputs = [name for name in names if engine.get_tensor_mode(name) != inputs]

    def _make_context(self, trt: Any, engine: Any, precision: str) -> Any:
        if not hasattr(engine, "create_runtime_config"):
            return engine.create_execution_context()
        config = engine.create_runtime_config()
        if hasattr(trt, "CudaGraphStrategy"):
            # The library's own capture; ours is left out for it.
            config.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        self._own_graphs = hasattr(trt, "CudaGraphStrategy")
        if hasattr(config, "create_runtime_cache"):
            # TensorRT-RTX compiles kernels as it runs, in every process again unless it is given those of the last.
            file = plans.kernels_file(trt, self._graph, precision)
            cache, known = config.create_runtime_cache(), plans.load_kernels(file)
            if known is None or not cache.deserialize(known):
                known = b""
            config.set_runtime_cache(cache)
            self._kernels = cache, known, file
        return engine.create_execution_context(config)

    def _keep_kernels(self) -> None:
        if self._kernels is not None:
            cache, known, file = self._kernels
            kernels = cache.serialize()
            if kernels is not None and bytes(kernels) != known:
                plans.store_kernels(file, bytes(kernels))

    _kernels: tuple[Any, bytes, Path] | None = None
    _own_graphs = False

    def __enter__(self) -> TensorRtEngine:
        return self

    def __exit__(self, *rest: Any) -> None:
        """Release the engine and its CUDA graphs, when all that is queued has run."""
        # Whatever the device's state: after an error all that is left is to let go.
        with suppress(JrsError):
            self._session.synchronize()
            self._keep_kernels()
        for captured in self._cuda_graphs.values():
            if captured is not None:
                with suppress(JrsError):
                    self._session.call("cudaGraphExecDestroy", captured)
        self._cuda_graphs.clear()
        super().__exit__(*rest)
        self._runtime = None

    def __call__(self, inputs: Mapping[str, Value]) -> dict[str, Array]:
        """Run once."""
        return {name: value.numpy() for name, value in self.keep(inputs).items()}

    def keep(self, inputs: Mapping[str, Value]) -> dict[str, DeviceArray]:
        """Run once; the outputs stay on the device."""
        if self._native is None:
            raise BackendError(f"backend {self.backend}: {graph_name(self._graph)} is closed")
        bound = {name: self._bind(name, inputs) for name in self._inputs}
        unknown = sorted(set(inputs) - set(self._inputs))
        if unknown:
            raise BackendError(f"backend {self.backend}: {graph_name(self._graph)} has no input {unknown[0]}")
        outputs = {name: DeviceArray(self._session, self._shapes[name]) for name in self._outputs}
        everything = {**bound, **outputs}
        for name, array in everything.items():
            self._native.set_tensor_address(name, array.address)
        self._launch(tuple(array.address for array in everything.values()))
        return outputs

    def _bind(self, name: str, inputs: Mapping[str, Value]) -> DeviceArray:
        value = inputs.get(name)
        if value is None or tuple(value.shape) != self._shapes[name]:
            shape = None if value is None else tuple(value.shape)
            raise BackendError(
                f"backend {self.backend}: {graph_name(self._graph)} takes {name} {self._shapes[name]}, not {shape}"
            )
        if isinstance(value, DeviceArray):
            return value
        return self.place(on_host(value))

    def place(self, array: Array) -> DeviceArray:
        """An array on the device."""
        return self._session.upload(np.ascontiguousarray(array, dtype=np.float32))

    def _launch(self, addresses: tuple[int, ...]) -> None:
        """Queue the engine: at once the first time, captured the second, replayed from then on."""
        captured = self._cuda_graphs.get(addresses)
        if captured is None and addresses in self._cuda_graphs and self._capturable and not self._own_graphs:
            captured = self._captured()
        if captured is None:
            self._enqueue()
        else:
            self._session.call("cudaGraphLaunch", captured, self._session.stream)
        self._cuda_graphs[addresses] = captured
        self._cuda_graphs.move_to_end(addresses)
        while len(self._cuda_graphs) > _GRAPHS_KEPT:
            _, old = self._cuda_graphs.popitem(last=False)
            if old is not None:
                self._session.call("cudaGraphExecDestroy", old)

    def _captured(self) -> Any:
        """A run of the engine as a CUDA graph; None if it cannot be captured, and then not tried again."""
        call, stream = self._session.call, self._session.stream
        mode = self._session.cuda.cudaStreamCaptureMode.cudaStreamCaptureModeRelaxed
        call("cudaStreamBeginCapture", stream, mode)
        graph = None
        try:
            try:
                queued = self._native.execute_async_v3(stream)
            finally:
                graph = call("cudaStreamEndCapture", stream)
            if queued:
                return call("cudaGraphInstantiate", graph, 0)
        except BackendError:
            pass
        finally:
            if graph is not None:
                call("cudaGraphDestroy", graph)
        self._capturable = False
        return None

    def _enqueue(self) -> None:
        self._logger.errors.clear()
        if not self._native.execute_async_v3(self._session.stream):
            raise self._failure("failed")

    def _failure(self, what: str) -> BackendError | OutOfMemoryError:
        reason = tensorrt_log.short(self._logger.errors[-1:])
        if tensorrt_log.tells_of_memory(reason):
            return OutOfMemoryError(
                f"{graph_name(self._graph)}: out of device memory; close other programs or use a smaller grid"
            )
        return BackendError(f"backend {self.backend}: {graph_name(self._graph)} {what} ({reason})")


class TensorRtRtxEngine(TensorRtEngine):
    """The same with TensorRT-RTX."""

    backend = "tensorrt-rtx"
