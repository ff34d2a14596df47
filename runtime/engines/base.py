"""What every backend offers: a graph that takes named arrays and gives named arrays."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]


class Held(Protocol):
    """An array as a backend keeps it, in a device's memory or in a layout of its own."""

    @property
    def shape(self) -> tuple[int, ...]:
        """As the graph names it."""

    def numpy(self) -> Array:
        """A copy on the host, FP32."""


@dataclass(frozen=True, eq=False)
class ChannelsLast:
    """A volume (1,C,X,Y,Z) as a CPU's convolutions take it.

    ``data`` is (1,X,Y,Z,C), float32, or uint16 that are bfloat16's bits, which NumPy does not know.
    """

    data: npt.NDArray[Any]

    @staticmethod
    def of(array: Array, dtype: npt.DTypeLike) -> ChannelsLast:
        """``array`` (1,C,X,Y,Z) laid out anew; for uint16 rounded to the nearest bfloat16, ties to even."""
        last = np.ascontiguousarray(np.moveaxis(array, 1, -1), dtype=np.float32)
        if np.dtype(dtype) != np.uint16:
            return ChannelsLast(last)
        bits = last.view(np.uint32)
        rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
        # A NaN whose low bits are set would carry into the exponent.
        return ChannelsLast(np.where(np.isnan(last), 0x7FC0, rounded).astype(np.uint16))

    @property
    def shape(self) -> tuple[int, ...]:
        """(1,C,X,Y,Z)."""
        n, *sides, channels = self.data.shape
        return (n, channels, *sides)

    def numpy(self) -> Array:
        """A copy (1,C,X,Y,Z), FP32."""
        data = self.data
        wide = (data.astype(np.uint32) << 16).view(np.float32) if data.dtype == np.uint16 else data
        return np.ascontiguousarray(np.moveaxis(wide, -1, 1))


Value: TypeAlias = Array | Held


@dataclass(frozen=True)
class EngineInfo:
    """What runs a graph: backend (``openvino``, ``tensorrt``), device and the precision of the arithmetic.

    ``reason`` is why that precision, ``gate`` what was measured of BF16 where ``auto`` had to decide.
    """

    backend: str
    device: str
    precision: str
    reason: str | None = None
    gate: Mapping[str, Any] | None = None


class Engine(Protocol):
    """One graph on one device; a context manager. Inputs are never changed, outputs are FP32."""

    info: EngineInfo

    def __call__(self, inputs: Mapping[str, Value]) -> dict[str, Array]:
        """Run once."""

    def keep(self, inputs: Mapping[str, Value]) -> Mapping[str, Value]:
        """Run once, the outputs left where the next graph of the same backend takes them."""

    def place(self, array: Array) -> Value:
        """An array where graphs of this backend take it, so that it goes there once."""

    def __enter__(self) -> Engine: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


@dataclass(frozen=True)
class EngineOptions:
    """``precision`` is fp32 or bf16, what the backend is to compute in; ``threads`` None leaves the count to it.

    ``graph_precision`` is what the bundle's convolutions are stored in (fp32, fp16, bf16): GPUs compute in that.
    ``codes``: the precision (fp32, bf16) in which a CPU's graphs hand codes to each other.
    ``lean``: give the memory back that a run worked in; the next one then takes longer.
    """

    precision: str = "fp32"
    threads: int | None = None
    graph_precision: str = "fp32"
    codes: str = "fp32"
    lean: bool = False


class Closing:
    """The context manager's half of an engine: leaving drops the native object and its memory."""

    _native: object | None

    def place(self, array: Array) -> Value:
        """As it is: an engine of the CPU takes arrays where they lie."""
        return array

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Release the backend's memory."""
        self._native = None


def hosted(inputs: Mapping[str, Value]) -> dict[str, Array]:
    """The same inputs, those that a backend holds copied to the host."""
    return {name: on_host(value) for name, value in inputs.items()}


def on_host(value: Value) -> Array:
    """An array as it is, what a backend holds as a copy."""
    return value if isinstance(value, np.ndarray) else value.numpy()


def is_code(name: str) -> bool:
    """Whether an input or output of a graph is a code: code1, moving_code1, fixed_code1, ..."""
    return name.rpartition("_")[2].startswith("code")


def graph_name(path: Path) -> str:
    """A graph as messages call it: bundle folder and file."""
    return f"{path.parent.name}/{path.name}"
