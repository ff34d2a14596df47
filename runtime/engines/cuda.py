"""CUDA without PyTorch: which devices there are (the driver alone), and memory and a stream on one (cuda-python)."""

from __future__ import annotations

import ctypes
import itertools
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
        return self.session.download(self.address, self.shape)


class PinnedMemory:
    """Host memory that a device reaches by itself, kept and used again until closed.

    Arrays in it outlive the session that made them, and hold nothing of it.
    """

    def __init__(self, runtime: Any) -> None:
        self._cuda = runtime
        self._free: dict[int, list[int]] = {}
        self._open = True

    def array(self, shape: Sequence[int]) -> Array:
        """An FP32 array, taken back when nothing refers to it any more; ordinary memory where there is no other."""
        nbytes = 4 * int(np.prod(shape))
        kept = self._free.get(nbytes)
        if kept:
            address = kept.pop()
        else:
            status, address = self._cuda.cudaHostAlloc(nbytes, self._cuda.cudaHostAllocDefault)
            if status != self._cuda.cudaError_t.cudaSuccess:
                return np.empty(shape, np.float32)
        block = (ctypes.c_byte * nbytes).from_address(int(address))
        # Not at exit: arrays may still be read then.
        weakref.finalize(block, self._give, int(address), nbytes).atexit = False
        return np.frombuffer(memoryview(block), dtype=np.float32).reshape(shape)

    def _give(self, address: int, nbytes: int) -> None:
        if self._open:
            self._free.setdefault(nbytes, []).append(address)
        else:
            self._cuda.cudaFreeHost(address)

    def close(self) -> None:
        """Release what is free, and what comes back from now on."""
        self._open = False
        for address in itertools.chain.from_iterable(self._free.values()):
            self._cuda.cudaFreeHost(address)
        self._free.clear()


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
        self._pinned = PinnedMemory(runtime)
        self._uploading: list[Array] = []
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
        made, staged = DeviceArray(self, array.shape), self._pinned.array(array.shape)
        np.copyto(staged, array)
        kind = self.cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        self.call("cudaMemcpyAsync", made.address, staged.ctypes.data, made.nbytes, kind, self.stream)
        self._uploading.append(staged)
        return made

    def download(self, address: int, shape: Sequence[int]) -> Array:
        """A copy on the host of FP32 memory of the device, after all that is queued."""
        copy = self._pinned.array(shape)
        kind = self.cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self.call("cudaMemcpyAsync", copy.ctypes.data, address, copy.nbytes, kind, self.stream)
        self.synchronize()
        return copy

    def synchronize(self) -> None:
        """Wait until all that is queued has run."""
        copied, self._uploading = self._uploading, []
        self.call("cudaStreamSynchronize", self.stream)
        copied.clear()


def _release(runtime: Any, stream: int, free: dict[int, list[int]], pinned: PinnedMemory) -> None:
    for address in itertools.chain.from_iterable(free.values()):
        runtime.cudaFree(address)
    pinned.close()
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
