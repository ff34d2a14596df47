"""ONNX Runtime's CUDA and TensorRT providers: inputs and outputs bound on the device, nothing left to the CPU."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from jrs.errors import BackendError, OutOfMemoryError, first_line
from jrs.runtime.engines import functions
from jrs.runtime.engines.base import Array, Closing, EngineInfo, EngineOptions, Value, graph_name, on_host
from jrs.runtime.engines.cuda import CudaSession, shared_session, visible_devices
from jrs.runtime.libraries import import_onnxruntime

_Result = TypeVar("_Result")
PROVIDERS = {"ort-cuda": "CUDAExecutionProvider", "ort-tensorrt": "TensorrtExecutionProvider"}
_FIRST_WITH_SAMPLER = (1, 25)
"""The first ONNX Runtime whose GridSample takes volumes on CUDA."""


def why_no_provider(backend: str) -> str | None:
    """What the installed ONNX Runtime lacks for a backend; None if it has the provider."""
    onnxruntime = import_onnxruntime()

    if PROVIDERS[backend] in onnxruntime.get_available_providers():
        return None
    return f"this onnxruntime has no {PROVIDERS[backend]}; pip install onnxruntime-gpu in the place of onnxruntime"


class OrtArray:
    """An array that ONNX Runtime keeps on its device; ``cuda``, if given, copies it into pinned memory."""

    def __init__(self, value: Any, cuda: CudaSession | None = None) -> None:
        self.value, self.shape = value, tuple(value.shape())
        self._cuda = cuda

    def numpy(self) -> Array:
        """A copy on the host."""
        if self._cuda is not None:
            return self._cuda.download(self.value.data_ptr(), self.shape)
        array: Array = self.value.numpy()
        return array


class BoundSession:
    """A session whose inputs and outputs are bound in the memory of ``device`` (``cuda``, or ``cpu``)."""

    def __init__(self, session: Any, device: str, cuda: CudaSession | None = None) -> None:
        self._session, self._device, self._cuda = session, device, cuda
        self._inputs = [value.name for value in session.get_inputs()]
        self._outputs = [value.name for value in session.get_outputs()]

    def run(self, inputs: Mapping[str, Value]) -> dict[str, OrtArray]:
        """Run once; what is on the device already is taken in place, what comes out is new memory there."""
        odd = sorted(set(inputs) - set(self._inputs)) or sorted(set(self._inputs) - set(inputs))
        if odd:
            raise ValueError(f"input {odd[0]} is unknown or missing")
        binding = self._session.io_binding()
        held = []
        for name, value in inputs.items():
            if not isinstance(value, OrtArray):
                value = self.place(on_host(value))
            held.append(value)
            binding.bind_ortvalue_input(name, value.value)
        for name in self._outputs:
            binding.bind_output(name, self._device, 0)
        self._session.run_with_iobinding(binding)
        outputs = zip(self._outputs, binding.get_outputs(), strict=True)
        return {name: OrtArray(value, self._cuda) for name, value in outputs}

    def place(self, array: Array) -> OrtArray:
        """The array on the device."""
        import onnxruntime

        value = onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array), self._device, 0)
        return OrtArray(value, self._cuda)


class OrtCudaEngine(Closing):
    """One graph in a session on CUDA (see ``Engine``)."""

    backend = "ort-cuda"

    def __init__(self, graph: Path, options: EngineOptions) -> None:
        try:
            onnxruntime = import_onnxruntime()
        except ImportError as error:
            raise BackendError(
                f"backend {self.backend}: onnxruntime cannot be imported ({error}); install jrs again"
            ) from error
        if options.precision != "fp32" and options.precision != options.graph_precision:
            raise BackendError(
                f"backend {self.backend}: the bundle's graphs are {options.graph_precision}; "
                f"export one with jrs export --precision {options.precision}"
            )
        self._graph = graph
        session = onnxruntime.SessionOptions()
        session.log_severity_level = 3
        # A node without a kernel on the GPU would go to the CPU without a word, and its data with it.
        session.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        if hasattr(onnxruntime, "preload_dlls"):
            # CUDA and cuDNN from NVIDIA's wheels, where they are installed; it prints what it does not find.
            with redirect_stdout(io.StringIO()):
                onnxruntime.preload_dlls()
        try:
            # Where this fails the package would print a line and try again without the GPU.
            providers = self.providers(graph, options)
            model = loadable(graph, onnxruntime.__version__)
            native = onnxruntime.InferenceSession(model, session, providers=providers, enable_fallback=0)
        except Exception as error:
            raise self._failure("cannot be loaded", error) from error
        if PROVIDERS[self.backend] not in native.get_providers():
            # The Python package goes on without a provider whose libraries do not load.
            raise BackendError(
                f"backend {self.backend}: {PROVIDERS[self.backend]} does not start (CUDA or cuDNN libraries are "
                "missing or of another version than the driver's); pip install 'jrs[ort-cuda]', or see docs/gpu.md"
            )
        self._native: BoundSession | None = BoundSession(native, "cuda", _copying_session())
        self.info = EngineInfo(self.backend, visible_devices()[0].name, options.graph_precision)

    def providers(self, graph: Path, options: EngineOptions) -> Sequence[tuple[str, dict[str, str]]]:
        """The providers to register, with their options."""
        return [("CUDAExecutionProvider", cuda_options())]

    def __enter__(self) -> OrtCudaEngine:
        return self

    def __call__(self, inputs: Mapping[str, Value]) -> dict[str, Array]:
        """Run once."""
        return {name: value.numpy() for name, value in self.keep(inputs).items()}

    def keep(self, inputs: Mapping[str, Value]) -> dict[str, OrtArray]:
        """Run once; the outputs stay on the device."""
        return self._done(lambda native: native.run(inputs))

    def place(self, array: Array) -> OrtArray:
        """An array on the device."""
        return self._done(lambda native: native.place(array))

    def _done(self, work: Callable[[BoundSession], _Result]) -> _Result:
        if self._native is None:
            raise BackendError(f"backend {self.backend}: {graph_name(self._graph)} is closed")
        try:
            return work(self._native)
        except Exception as error:
            raise self._failure("failed", error) from error

    def _failure(self, what: str, error: Exception) -> BackendError | OutOfMemoryError:
        if any(sign in str(error).lower() for sign in ("out of memory", "failed to allocate", "bad_alloc")):
            return OutOfMemoryError(
                f"{graph_name(self._graph)}: out of device memory; close other programs or use a smaller grid"
            )
        return BackendError(f"backend {self.backend}: {graph_name(self._graph)} {what} ({first_line(error)})")


def loadable(graph: Path, version: str) -> str | bytes:
    """What a session of this version loads: the file, or its bytes with a sampler that the version has on CUDA."""
    if tuple(int(part) for part in version.split(".")[:2]) >= _FIRST_WITH_SAMPLER:
        return str(graph)
    return functions.with_gathering(graph.read_bytes())


def _copying_session() -> CudaSession | None:
    """The process's CUDA session; None without a cuda-python that fits: ONNX Runtime then copies itself."""
    try:
        return shared_session()
    except Exception:  # with a driver that does not fit the bindings raise what they like
        return None


def why_slow() -> str | None:
    """What would bring results back through pinned memory, which is several times faster; None where it is there."""
    if _copying_session() is not None:
        return None
    return "results come back slowly without cuda-python for this driver; pip install 'jrs[cuda]'"


def cuda_options() -> dict[str, str]:
    """Options of the CUDA provider: TF32 off, convolutions searched for (the default choice can be 50 times slower)."""
    return {
        "device_id": "0",
        "use_tf32": "0",
        "cudnn_conv_algo_search": os.environ.get("JRS_CUDNN_SEARCH", "HEURISTIC").upper(),
        "cudnn_conv_use_max_workspace": "1",
        "arena_extend_strategy": "kSameAsRequested",
        "do_copy_in_default_stream": "1",
    }


class OrtTensorRtEngine(OrtCudaEngine):
    """One graph in a session on TensorRT, by way of ONNX Runtime; what it does not take runs on CUDA."""

    backend = "ort-tensorrt"

    def providers(self, graph: Path, options: EngineOptions) -> Sequence[tuple[str, dict[str, str]]]:
        """TensorRT, then CUDA, with their options."""
        from jrs.runtime.engines.plans import plan_folder

        if options.graph_precision != "fp32":
            raise BackendError(
                f"backend ort-tensorrt: a {options.graph_precision} bundle would have its FP32 parts reduced as well; "
                "use --backend tensorrt"
            )
        # The provider has no option for TF32; NVIDIA's libraries read this.
        os.environ.setdefault("NVIDIA_TF32_OVERRIDE", "0")
        folder = plan_folder(graph) / "onnxruntime"
        folder.mkdir(parents=True, exist_ok=True)
        tensorrt = {
            "device_id": "0",
            "trt_engine_cache_enable": "1",
            "trt_engine_cache_path": str(folder),
            "trt_timing_cache_enable": "1",
            "trt_timing_cache_path": str(folder),
            "trt_max_workspace_size": str(2 << 30),
        }
        return [("TensorrtExecutionProvider", tensorrt), ("CUDAExecutionProvider", cuda_options())]
