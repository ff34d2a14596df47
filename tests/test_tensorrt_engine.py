"""The TensorRT engine's own work, on a simulated device: memory, one stream that runs late, CUDA graphs, errors.

What TensorRT and CUDA are asked for is recorded and done on the host, not before the stream is waited for; so what is
given back or changed too early shows.
"""
# ruff: noqa: N802, N815  (the names are CUDA's and TensorRT's)

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from enum import IntEnum
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest

from jrs.errors import BackendError, OutOfMemoryError
from jrs.runtime.engines import EngineOptions, cuda, plans
from jrs.runtime.engines.cuda import CudaSession, Device, DeviceArray
from jrs.runtime.engines.tensorrt import TensorRtEngine

bindings = pytest.importorskip("cuda.bindings")

SHAPE = (1, 2, 3, 4, 5)


class Status(IntEnum):
    cudaSuccess = 0
    cudaErrorMemoryAllocation = 2
    cudaErrorIllegalAddress = 700


class Runtime:
    """CUDA's runtime as cuda-python offers it, on the host; what is queued runs when the stream is waited for."""

    cudaError_t = Status
    cudaStreamNonBlocking = 1
    cudaHostAllocDefault = 0
    cudaMemcpyKind = SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2)
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeRelaxed=2)

    def __init__(self) -> None:
        self.memory: dict[int, Any] = {}
        self.pinned: dict[int, Any] = {}
        self.limit = 10**9
        self.queue: list[Callable[[], object]] = []
        self.capturing: list[Callable[[], object]] | None = None
        self.graphs: dict[int, list[Callable[[], object]]] = {}
        self.runs: dict[int, list[Callable[[], object]]] = {}
        self.counts = {"malloc": 0, "copies": 0, "launches": 0}
        self.status = Status.cudaSuccess
        self.streams = 0

    def add(self, work: Callable[[], object]) -> None:
        (self.queue if self.capturing is None else self.capturing).append(work)

    def cudaStreamCreateWithFlags(self, flags: int) -> tuple[Status, int]:
        self.streams += 1
        return Status.cudaSuccess, 7

    def cudaStreamDestroy(self, stream: int) -> tuple[Status]:
        self.streams -= 1
        return (Status.cudaSuccess,)

    def cudaMalloc(self, size: int) -> tuple[Status, int]:
        if size + sum(len(b) for b in self.memory.values()) > self.limit:
            return Status.cudaErrorMemoryAllocation, 0
        block = ctypes.create_string_buffer(size)
        self.memory[ctypes.addressof(block)] = block
        self.counts["malloc"] += 1
        return Status.cudaSuccess, ctypes.addressof(block)

    def cudaFree(self, address: int) -> tuple[Status]:
        assert not self.queue, "memory is freed that queued work may use"
        del self.memory[address]
        return (Status.cudaSuccess,)

    def cudaHostAlloc(self, size: int, flags: int) -> tuple[Status, int]:
        block = ctypes.create_string_buffer(size)
        self.pinned[ctypes.addressof(block)] = block
        return Status.cudaSuccess, ctypes.addressof(block)

    def cudaFreeHost(self, address: int) -> tuple[Status]:
        del self.pinned[address]
        return (Status.cudaSuccess,)

    def cudaMemcpyAsync(self, to: int, of: int, size: int, kind: int, stream: int) -> tuple[Status]:
        assert (to if kind == 2 else of) in self.pinned
        self.counts["copies"] += 1
        self.add(lambda: ctypes.memmove(to, of, size))
        return (self.status,)

    def cudaStreamSynchronize(self, stream: int) -> tuple[Status]:
        work, self.queue = self.queue, []
        for step in work:
            step()
        return (self.status,)

    def cudaStreamBeginCapture(self, stream: int, mode: int) -> tuple[Status]:
        self.capturing = []
        return (Status.cudaSuccess,)

    def cudaStreamEndCapture(self, stream: int) -> tuple[Status, int]:
        assert self.capturing is not None
        number = 100 + len(self.graphs) + len(self.runs)
        self.graphs[number], self.capturing = self.capturing, None
        return Status.cudaSuccess, number

    def cudaGraphInstantiate(self, graph: int, flags: int) -> tuple[Status, int]:
        number = 1000 + self.counts["launches"] + len(self.runs)
        self.runs[number] = list(self.graphs[graph])
        return Status.cudaSuccess, number

    def cudaGraphDestroy(self, graph: int) -> tuple[Status]:
        del self.graphs[graph]
        return (Status.cudaSuccess,)

    def cudaGraphExecDestroy(self, run: int) -> tuple[Status]:
        del self.runs[run]
        return (self.status,)

    def cudaGraphLaunch(self, run: int, stream: int) -> tuple[Status]:
        self.counts["launches"] += 1
        self.queue += self.runs[run]
        return (Status.cudaSuccess,)


class Context:
    """Doubles and adds one, from and to the addresses that it has when it is queued."""

    def __init__(self, library: Library, config: RuntimeConfig | None = None) -> None:
        self.library, self.addresses, self.config = library, dict[str, int](), config

    def set_tensor_address(self, name: str, address: int) -> None:
        self.addresses[name] = address

    def execute_async_v3(self, stream: int) -> bool:
        runtime = self.library.runtime
        if self.library.error is not None:
            assert self.library.logger is not None
            self.library.logger.log(1, self.library.error)
            return False
        if runtime.capturing is not None and not self.library.capturable:
            return False
        if self.config is not None:
            self.config.cache.content = b"kernels"
        source, target = (_at(self.addresses[name]) for name in ("image", "code"))
        runtime.add(lambda: np.copyto(target, 2 * source + 1))
        return True


class RuntimeCache:
    """TensorRT-RTX's cache of kernels that it has compiled."""

    loaded: ClassVar[list[bytes]] = []

    def __init__(self) -> None:
        self.content = b""

    def deserialize(self, content: bytes) -> bool:
        self.loaded.append(content)
        self.content = content
        return content == b"kernels"

    def serialize(self) -> memoryview:
        return memoryview(self.content)


class RuntimeConfig:
    """TensorRT-RTX's choices for a context."""

    def create_runtime_cache(self) -> RuntimeCache:
        return RuntimeCache()

    def set_runtime_cache(self, cache: RuntimeCache) -> bool:
        self.cache = cache
        return True


def _at(address: int) -> np.ndarray:
    size = int(np.prod(SHAPE))
    return np.ctypeslib.as_array((ctypes.c_float * size).from_address(address)).reshape(SHAPE)


class Library:
    """As much of ``tensorrt`` as loading and running an engine takes."""

    __name__, __version__ = "tensorrt", "11.4"
    TensorIOMode = SimpleNamespace(INPUT=0, OUTPUT=1)

    class ILogger:
        Severity = SimpleNamespace(ERROR=1, INTERNAL_ERROR=0)

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self.capturable = True
        self.error: str | None = None
        self.logger: Any = None
        self.loads: Any = True
        self.compiles = False

    def Runtime(self, logger: Any) -> Any:
        self.logger = logger
        return SimpleNamespace(deserialize_cuda_engine=self._engine)

    def _engine(self, content: bytes) -> Any:
        if isinstance(self.loads, Exception):
            raise self.loads
        if not self.loads:
            self.logger.log(1, "the engine is of another version")
            return None
        names = ["image", "code"]
        more = {"create_runtime_config": RuntimeConfig} if self.compiles else {}
        return SimpleNamespace(
            **more,
            num_io_tensors=2,
            get_tensor_name=names.__getitem__,
            get_tensor_shape=lambda name: SHAPE,
            get_tensor_mode=names.index,
            create_execution_context=lambda *config: Context(self, *config),
        )


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Runtime:
    made = Runtime()
    monkeypatch.setattr(bindings, "runtime", made, raising=False)
    for module in (cuda, plans):
        monkeypatch.setattr(module, "visible_devices", lambda: (Device("Simulated", (8, 7), 2**33),))
    monkeypatch.setattr(cuda, "_shared", None)
    return made


@pytest.fixture
def library(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> Library:
    made = Library(runtime)
    monkeypatch.setattr(plans, "import_library", lambda backend: made)
    monkeypatch.setattr(plans, "ready_plan", lambda *arguments: b"plan")
    return made


def opened() -> TensorRtEngine:
    return TensorRtEngine(Path("bundle/encoder.onnx"), EngineOptions())


def image(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=SHAPE).astype(np.float32)


def test_runs_agree_direct_captured_and_replayed(library: Library, runtime: Runtime) -> None:
    with opened() as engine:
        for seed in range(6):
            np.testing.assert_array_equal(engine({"image": image(seed)})["code"], 2 * image(seed) + 1)
        assert runtime.counts["launches"] >= 3 and len(runtime.runs) <= 2 and not runtime.graphs
        # One array in, one out, used again each time.
        assert runtime.counts["malloc"] == 2
    assert not runtime.runs


def test_arrays_stay_on_the_device_from_engine_to_engine(library: Library, runtime: Runtime) -> None:
    with opened() as first, opened() as second:
        kept = first.keep({"image": image(0)})
        other = first.keep({"image": image(1)})
        further = second.keep({"image": kept["code"]})
        del kept
        runtime_copies = runtime.counts["copies"]
        last = second.keep({"image": further["code"]})
        assert runtime.counts["copies"] == runtime_copies == 2
        np.testing.assert_array_equal(last["code"].numpy(), 2 * (2 * (2 * image(0) + 1) + 1) + 1)
        np.testing.assert_array_equal(other["code"].numpy(), 2 * image(1) + 1)


def test_an_upload_does_not_overwrite_one_that_is_still_queued(runtime: Runtime) -> None:
    session = CudaSession()
    source = image(0)
    first = session.upload(source)
    source[:] = 0.0
    second = session.upload(image(1))
    np.testing.assert_array_equal(first.numpy(), image(0))
    np.testing.assert_array_equal(second.numpy(), image(1))


def test_memory_kept_for_later_is_given_up_before_it_runs_out(runtime: Runtime) -> None:
    session = CudaSession()
    nbytes = DeviceArray(session, SHAPE).nbytes  # dropped at once, and kept
    runtime.limit = 2 * nbytes
    larger = DeviceArray(session, (2, *SHAPE[1:]))
    assert larger.nbytes == 2 * nbytes and len(runtime.memory) == 1
    with pytest.raises(OutOfMemoryError, match="Simulated: out of device memory"):
        DeviceArray(session, SHAPE)


def test_everything_is_given_back(library: Library, runtime: Runtime) -> None:
    with opened() as engine:
        codes = [engine({"image": image(seed)})["code"] for seed in range(3)]
    del engine
    gc.collect()
    # Results stay readable, in memory of the host's that goes with them.
    assert not runtime.memory and runtime.streams == 0 and len(runtime.pinned) == 3
    np.testing.assert_array_equal(codes[0], 2 * image(0) + 1)
    last = codes.pop()[0, 0]
    del codes
    gc.collect()
    assert len(runtime.pinned) == 1
    np.testing.assert_array_equal(last, (2 * image(2) + 1)[0, 0])
    del last
    gc.collect()
    assert not runtime.pinned


def test_an_engine_that_cannot_be_captured_runs_without(library: Library, runtime: Runtime) -> None:
    library.capturable = False
    with opened() as engine:
        for seed in range(4):
            np.testing.assert_array_equal(engine({"image": image(seed)})["code"], 2 * image(seed) + 1)
    assert runtime.counts["launches"] == 0 and not runtime.graphs and not runtime.runs


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        ("Cuda Runtime (an illegal memory access was encountered)", BackendError),
        ("Error Code 2: OutOfMemory (Requested size was 1 bytes.)", OutOfMemoryError),
        ("Requested amount of GPU memory (1 bytes) could not be allocated.", OutOfMemoryError),
    ],
)
def test_an_illegal_access_is_no_lack_of_memory(library: Library, error: str, kind: type[Exception]) -> None:
    with opened() as engine:
        library.logger.log(1, "out of memory, while a tactic was tried that was not taken")
        library.error = error
        with pytest.raises(kind) as caught:
            engine({"image": image(0)})
        library.error = None
        np.testing.assert_array_equal(engine({"image": image(0)})["code"], 2 * image(0) + 1)
    assert "bundle/encoder.onnx" in str(caught.value) and type(caught.value) is kind


def test_leaving_a_device_that_failed_for_good(library: Library, runtime: Runtime) -> None:
    with opened() as engine:
        for seed in range(2):
            engine({"image": image(seed)})
        runtime.status = Status.cudaErrorIllegalAddress
        with pytest.raises(BackendError, match="cudaErrorIllegalAddress"):
            engine({"image": image(0)})
    assert engine._native is None and not runtime.runs


def test_kernels_compiled_while_running_are_kept(
    library: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library.compiles = True
    monkeypatch.setattr(RuntimeCache, "loaded", [])
    graph = tmp_path / "encoder.onnx"
    graph.write_bytes(b"graph")

    def once() -> None:
        with TensorRtEngine(graph, EngineOptions()) as engine:
            np.testing.assert_array_equal(engine({"image": image(0)})["code"], 2 * image(0) + 1)

    once()
    (kept,) = (tmp_path / "engines").iterdir()
    assert kept.suffix == ".cache" and RuntimeCache.loaded == []
    stored = kept.read_bytes()
    once()
    assert RuntimeCache.loaded == [b"kernels"] and kept.read_bytes() == stored
    kept.write_bytes(stored[:-1])  # damaged: never handed to the library
    once()
    assert RuntimeCache.loaded == [b"kernels"] and kept.read_bytes() == stored
    library.__version__ = "11.5"  # another library's are another file
    once()
    assert len(list((tmp_path / "engines").iterdir())) == 2


def test_inputs_that_do_not_fit(library: Library) -> None:
    with opened() as engine:
        with pytest.raises(BackendError, match=r"takes image \(1, 2, 3, 4, 5\), not \(1, 2\)"):
            engine({"image": np.zeros((1, 2), np.float32)})
        with pytest.raises(BackendError, match="has no input picture"):
            engine({"image": image(0), "picture": image(0)})
    with pytest.raises(BackendError, match="is closed"):
        engine({"image": image(0)})


@pytest.mark.parametrize(
    ("loads", "reason"),
    [(False, "the engine is of another version"), (TypeError("factory function returned nullptr"), "returned nullptr")],
)
def test_an_engine_that_does_not_load_is_one_line(library: Library, loads: Any, reason: str) -> None:
    library.loads = loads
    with pytest.raises(BackendError, match=reason) as caught:
        opened()
    assert "bundle/encoder.onnx" in str(caught.value) and "\n" not in str(caught.value)
