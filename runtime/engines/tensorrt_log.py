"""What TensorRT says: kept instead of printed, in one line, and whether it is of memory."""

from __future__ import annotations

import re
from typing import Any

_MEMORY = re.compile(r"out ?of ?memory|enough free memory|memory ?allocation|not be allocated", re.IGNORECASE)


def make_logger(trt: Any) -> Any:
    """A logger of the library that keeps ``errors`` and prints nothing."""

    class Quiet(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.errors.append(message)

    return Quiet()


def short(reasons: list[str], length: int = 200) -> str:
    """The first of a library's reasons, in one line."""
    reason = " ".join((reasons or ["it gives no reason"])[0].split())
    return reason if len(reason) <= length else reason[: length - 3] + "..."


def tells_of_memory(reason: str) -> bool:
    """Whether an error of TensorRT is that the device's memory does not do; an illegal access to it is another."""
    return _MEMORY.search(reason) is not None
