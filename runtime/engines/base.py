"""What every backend offers: a graph that takes named arrays and gives named arrays."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class EngineInfo:
    """What runs a graph: backend (``openvino``, ``ort-cpu``), device and the precision of the arithmetic."""

    backend: str
    device: str
    precision: str


class Engine(Protocol):
    """One graph on one device; a context manager. Inputs are never changed, outputs are FP32."""

    info: EngineInfo

    def __call__(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run once."""

    def __enter__(self) -> Engine: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


@dataclass(frozen=True)
class EngineOptions:
    """``precision`` is fp32 or bf16; ``threads`` None leaves the count to the backend."""

    precision: str = "fp32"
    threads: int | None = None


class Closing:
    """The context manager's half of an engine: leaving drops the native object and its memory."""

    _native: object | None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Release the backend's memory."""
        self._native = None


def graph_name(path: Path) -> str:
    """A graph as messages call it: bundle folder and file."""
    return f"{path.parent.name}/{path.name}"
