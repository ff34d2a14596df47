"""What the numbers of a computation depend on besides its inputs: processor, libraries, the code itself."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import platform
import sys
from functools import cache
from pathlib import Path
from typing import Any

from jrs import __version__
from jrs.parallel import available_cpus
from jrs.runtime import native
from jrs.runtime.libraries import import_openvino

_LIBRARIES = ("numpy", "onnxruntime-gpu", "onnxruntime", "openvino", "SimpleITK")
_BF16_FLAGS = {"avx512_bf16", "amx_bf16"}


@cache
def cpu_name() -> str:
    """The processor's name, as far as the system tells it."""
    return _cpuinfo("model name") or platform.processor() or platform.machine()


@cache
def computes_bf16() -> bool:
    """Whether OpenVINO computes BF16 on this processor in hardware: AVX512-BF16 or AMX-BF16."""
    if sys.platform == "linux" and platform.machine() == "x86_64":
        # The same answer as the library's, without the tenth of a second that importing it takes.
        return bool(_BF16_FLAGS & set((_cpuinfo("flags") or "").split()))
    try:
        return "BF16" in import_openvino().Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    except Exception:  # no library, no device: opening an engine says why
        return False


def _cpuinfo(name: str) -> str | None:
    """What Linux says of the first processor; the file is made as it is read, and long where there are many."""
    info = Path("/proc/cpuinfo")
    if sys.platform == "linux" and info.is_file():
        with info.open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                if line.lower().startswith(name):
                    return line.split(":", 1)[1].strip()
    return None


@cache
def versions() -> dict[str, str]:
    """Version of jrs and of each library that computes, where it is installed."""
    found = {"jrs": __version__}
    for name in _LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


@cache
def _features() -> str:
    """SHA-256 of what the processor can do: virtual machines hide features of one and shorten its name."""
    return hashlib.sha256(" ".join(sorted((_cpuinfo("flags") or "").split())).encode()).hexdigest()


def numerics(threads: int | None) -> dict[str, Any]:
    """All but the inputs that may change the last bit of a result, as a part of a key."""
    return {
        "cpu": cpu_name(),
        "features": _features(),
        "threads": threads or available_cpus(),
        "versions": versions(),
        "kernels": code_digest("jrs.runtime._kernels") if native.available() else None,
    }


@cache
def code_digest(*modules: str) -> str:
    """SHA-256 of the source of modules, by their dotted names: what they made is made anew when they change."""
    total = hashlib.sha256()
    for name in modules:
        spec = importlib.util.find_spec(name)
        file = Path(spec.origin) if spec is not None and spec.origin else None
        total.update(file.read_bytes() if file is not None and file.is_file() else __version__.encode())
    return total.hexdigest()
