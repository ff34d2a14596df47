"""CUDA without PyTorch: which devices there are (the driver alone), and memory and a stream on one (cuda-python)."""

from __future__ import annotations

import ctypes
import re
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from jrs.errors import BackendError, OutOfMemoryError, first_line
from jrs.runtime.engines.base import Array

# CUdevice_attribute.
_CAPABILITY_MAJOR, _CAPABILITY_MINOR = 75, 76


@dataclass(frozen=True)
class Device:
    """A GPU: name, compute capability, bytes of memory."""

    name: str
    capability: tuple[int, int]
    memory: int

    @property
    def sm(self) -> str:
        """``SM87``, as TensorRT names it."""
        return f"SM{self.capability[0]}{self.capability[1]}"


@lru_cache(maxsize=1)
def visible_devices() -> tuple[Device, ...]:
    """The CUDA devices of this process, by the driver; none without a driver."""
    driver = _driver()
    if driver is None or driver.cuInit(0) != 0:
        return ()
    count = ctypes.c_int()
    driver.cuDeviceGetCount(ctypes.byref(count))
    return tuple(_device(driver, index) for index in range(count.value))


def why_no_device() -> str:
    """Why ``visible_devices`` is empty, for a message."""
    driver = _driver()
    if driver is None:
        return "no NVIDIA driver is installed"
    status = driver.cuInit(0)
    return "the driver shows no device" if status in (0, 100) else f"the driver does not start (CUDA error {status})"


def driver_version() -> str:
    """The driver's own version, else the CUDA version it offers, else ``none``."""
    kernel = Path("/proc/driver/nvidia/version")
    if kernel.is_file():
        found = re.search(r"\b(\d{3}\.\d+(?:\.\d+)?)\b", kernel.read_text(encoding="utf-8", errors="replace"))
        if found:
            return found[1]
    driver, version = _driver(), ctypes.c_int()
    if driver is None or driver.cuDriverGetVersion(ctypes.byref(version)) != 0:
        return "none"
    return f"cuda-{version.value // 1000}.{version.value % 1000 // 10}"


def _driver() -> Any:
    for name in ("libcuda.so.1", "nvcuda.dll"):
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    return None


def _device(driver: Any, index: int) -> Device:
    name = ctypes.create_string_buffer(256)
    driver.cuDeviceGetName(name, len(name), index)
    values = []
    for attribute in (_CAPABILITY_MAJOR, _CAPABILITY_MINOR):
        value = ctypes.c_int()
        driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, index)
        values.append(value.value)
    memory = ctypes.c_size_t()
    driver.cuDeviceTotalMem_v2(ctypes.byref(memory), index)
    return Device(name.value.decode(errors="replace"), (values[0], values[1]), memory.value)


class DeviceArray:
    """FP32 memory on the device, given back to its session when nothing refers to it any more."""

    def __init__(self, session: CudaSession, shape: Sequence[int]) -> None:
        self.session, self.shape = session, tuple(shape)
        self.nbytes = 4 * int(np.prod(self.shape))
        self.address = session.take(self.nbytes)
        weakref.finalize(self, session.give, self.address, self.nbytes)

    def numpy(self) -> Array:
        """A copy on the host."""
        return self.session.download(self)


class CudaSession:
    """One stream of the first device, with device and pinned host memory that is kept and used again."""

    def __init__(self) -> None:
        if not visible_devices():
            raise BackendError(f"needs a CUDA device: {why_no_device()}")
        try:
            from cuda.bindings import runtime
        except ImportError as error:
            raise BackendError(
                f"cuda-python cannot be imported ({first_line(error)}); pip install 'jrs[cuda]'"
            ) from error
        self.cuda: Any = runtime
        self.device = visible_devices()[0]
        self.stream = int(self.call("cudaStreamCreateWithFlags", runtime.cudaStreamNonBlocking))
        self._free: dict[int, list[int]] = {}
        self._pinned: dict[int, tuple[int, Array]] = {}
        self._in_flight = False
        weakref.finalize(self, _release, runtime, self.stream, self._free, self._pinned)

    def call(self, name: str, *arguments: Any) -> Any:
        """Call the CUDA runtime; its result, or BackendError, or OutOfMemoryError."""
        status, *rest = getattr(self.cuda, name)(*arguments)
        if status == self.cuda.cudaError_t.cudaSuccess:
            return rest[0] if rest else None
        if status == self.cuda.cudaError_t.cudaErrorMemoryAllocation:
            raise OutOfMemoryError(
                f"{self.device.name}: out of device memory; "
                "close other programs, use a smaller grid or --backend ort-cpu"
            )
        raise BackendError(f"{self.device.name}: {name} failed ({status.name})")

    def take(self, nbytes: int) -> int:
        """The address of device memory of a size, fresh or used before."""
        kept = self._free.get(nbytes)
        if kept:
            return kept.pop()
        try:
            return int(self.call("cudaMalloc", nbytes))
        except OutOfMemoryError:
            self._drop_free()
            return int(self.call("cudaMalloc", nbytes))

    def give(self, address: int, nbytes: int) -> None:
        """Take memory back; one stream runs everything, so what is queued on it finishes before its next use."""
        self._free.setdefault(nbytes, []).append(address)

    def _drop_free(self) -> None:
        self.synchronize()
        for addresses in self._free.values():
            while addresses:
                self.call("cudaFree", addresses.pop())

    def upload(self, array: Array) -> DeviceArray:
        """An array on the device; the host's copy may change as soon as this returns."""
        made = DeviceArray(self, array.shape)
        address, pinned = self._staging(made.nbytes)
        if self._in_flight:
            self.synchronize()
        np.copyto(pinned.reshape(array.shape), array)
        kind = self.cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        self.call("cudaMemcpyAsync", made.address, address, made.nbytes, kind, self.stream)
        self._in_flight = True
        return made

    def download(self, array: DeviceArray) -> Array:
        """A copy on the host, after all that is queued."""
        address, pinned = self._staging(array.nbytes)
        kind = self.cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self.call("cudaMemcpyAsync", address, array.address, array.nbytes, kind, self.stream)
        self.synchronize()
        return pinned.reshape(array.shape).copy()

    def synchronize(self) -> None:
        """Wait until all that is queued has run."""
        self.call("cudaStreamSynchronize", self.stream)
        self._in_flight = False

    def _staging(self, nbytes: int) -> tuple[int, Array]:
        if nbytes not in self._pinned:
            address = int(self.call("cudaHostAlloc", nbytes, self.cuda.cudaHostAllocDefault))
            raw = (ctypes.c_byte * nbytes).from_address(address)
            self._pinned[nbytes] = (address, np.frombuffer(memoryview(raw), dtype=np.float32))
        return self._pinned[nbytes]


def _release(runtime: Any, stream: int, free: dict[int, list[int]], pinned: dict[int, tuple[int, Array]]) -> None:
    for addresses in free.values():
        for address in addresses:
            runtime.cudaFree(address)
    for address, _ in pinned.values():
        runtime.cudaFreeHost(address)
    runtime.cudaStreamDestroy(stream)


_shared: weakref.ref[CudaSession] | None = None


def shared_session() -> CudaSession:
    """The process's session, as long as an engine or an array holds it: graphs hand arrays to one another in it."""
    global _shared
    session = _shared() if _shared is not None else None
    if session is None:
        session = CudaSession()
        _shared = weakref.ref(session)
    return session
