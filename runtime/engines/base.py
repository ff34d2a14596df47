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


class OnDevice(Protocol):
    """An array in a device's memory, which only its backend can read in place."""

    shape: tuple[int, ...]

    def numpy(self) -> Array:
        """A copy on the host."""


Value: TypeAlias = Array | OnDevice


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

    def __enter__(self) -> Engine: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


@dataclass(frozen=True)
class EngineOptions:
    """``precision`` is fp32 or bf16, what the backend is to compute in; ``threads`` None leaves the count to it.

    ``graph_precision`` is what the bundle's convolutions are stored in (fp32, fp16, bf16): GPUs compute in that.
    ``lean``: give the memory back that a run worked in; the next one then takes longer.
    """

    precision: str = "fp32"
    threads: int | None = None
    graph_precision: str = "fp32"
    lean: bool = False


class Closing:
    """The context manager's half of an engine: leaving drops the native object and its memory."""

    _native: object | None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Release the backend's memory."""
        self._native = None


def hosted(inputs: Mapping[str, Value]) -> dict[str, Array]:
    """The same inputs, those on a device copied to the host."""
    return {name: value if isinstance(value, np.ndarray) else value.numpy() for name, value in inputs.items()}


def graph_name(path: Path) -> str:
    """A graph as messages call it: bundle folder and file."""
    return f"{path.parent.name}/{path.name}"
