"""What this machine can run jrs on: libraries, devices, and every backend tried on a small graph."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import time
from dataclasses import dataclass

import numpy as np

from jrs import __version__
from jrs.bundle import Bundle
from jrs.errors import JrsError, first_line
from jrs.resources import DATA
from jrs.runtime import native
from jrs.runtime.engines import (
    Array,
    EngineOptions,
    all_backends,
    choose_backend,
    fallbacks,
    on_gpu,
    open_engine,
    plans,
    why_unavailable,
)
from jrs.runtime.engines.cuda import Device, driver_version, visible_devices, why_no_device
from jrs.runtime.machine import computes_bf16, cpu_name
from jrs.runtime.precision import choose_precision

# Name for the reader -> distributions, of which one may be there.
_LIBRARIES = {
    "numpy": ("numpy",),
    "SimpleITK": ("SimpleITK",),
    "onnxruntime": ("onnxruntime-gpu", "onnxruntime"),
    "openvino": ("openvino",),
    "tensorrt": ("tensorrt",),
    "tensorrt-rtx": ("tensorrt-rtx",),
    "cuda-bindings": ("cuda-bindings",),
    "torch": ("torch",),
}
_SAMPLER = DATA / "graphs" / "probe_sampler.onnx"
# Compute capability from which a GPU computes in a precision fast.
_PRECISIONS = {"fp32": (0, 0), "fp16": (7, 0), "bf16": (8, 0)}


@dataclass(frozen=True)
class Library:
    """An optional or required package; ``version`` None where it is not installed."""

    name: str
    version: str | None


@dataclass(frozen=True)
class BackendState:
    """Whether a backend works here: device, precisions, milliseconds of the small graphs, or the reason why not.

    ``remark``: what would make one that works faster.
    """

    name: str
    works: bool
    device: str | None
    precisions: tuple[str, ...]
    milliseconds: float | None
    reason: str | None
    remark: str | None = None


@dataclass(frozen=True)
class AutoChoice:
    """What ``--backend auto --precision auto`` stands for with the default bundle, and why that precision."""

    backend: str
    precision: str
    reason: str


@dataclass(frozen=True)
class Diagnosis:
    """All that ``jrs doctor`` finds; ``no_gpu`` says why there is no GPU, ``auto`` is None where nothing works."""

    jrs: str
    python: str
    system: str
    cpu: str
    cores: int
    kernels: str
    driver: str
    devices: tuple[Device, ...]
    no_gpu: str | None
    libraries: tuple[Library, ...]
    backends: tuple[BackendState, ...]
    auto: AutoChoice | None

    @property
    def healthy(self) -> bool:
        """Whether any backend works."""
        return any(backend.works for backend in self.backends)


def diagnose() -> Diagnosis:
    """Look at everything; never raises for what is missing."""
    backends = tuple(_try(name) for name in all_backends())
    return Diagnosis(
        jrs=__version__,
        python=platform.python_version(),
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        cpu=cpu_name(),
        cores=os.cpu_count() or 1,
        kernels=native.status(),
        driver=driver_version(),
        devices=visible_devices(),
        no_gpu=None if visible_devices() else why_no_device(),
        libraries=tuple(Library(name, _version(names)) for name, names in _LIBRARIES.items()),
        backends=backends,
        auto=_auto({state.name for state in backends if state.works}),
    )


def _auto(working: set[str]) -> AutoChoice | None:
    """The first that works: what ``auto`` begins with it leaves where it fails."""
    try:
        first, _ = choose_backend()
        backend = next((b for b in (first, *fallbacks(first, gpus=True)) if b in working), None)
        if backend is None:
            return None
        bundle = Bundle.open()
        chosen = choose_precision(bundle, backend, "auto")
    except JrsError:
        return None
    precision = bundle.manifest.precision if on_gpu(backend) else chosen.precision
    return AutoChoice(backend, precision, chosen.reason)


def _version(distributions: tuple[str, ...]) -> str | None:
    for name in distributions:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def _try(name: str) -> BackendState:
    """Run a convolution and, where the backend does it itself, the sampler; compare with numpy."""
    lacking = why_unavailable(name)
    if lacking is not None:
        return BackendState(name, False, None, (), None, lacking)
    try:
        start = time.perf_counter()
        device, wrong = _probe(name)
        elapsed = 1000.0 * (time.perf_counter() - start)
    except JrsError as error:
        return BackendState(name, False, None, (), None, str(error))
    except Exception as error:  # whatever a library does, the others are looked at
        return BackendState(name, False, None, (), None, f"{type(error).__name__}: {first_line(error)}")
    if wrong is not None:
        return BackendState(name, False, device, (), elapsed, f"{wrong} comes out wrong")
    return BackendState(name, True, device, _precisions(name), elapsed, None, _remark(name))


def _remark(name: str) -> str | None:
    """What makes a backend slower than it could be, of one that has just been tried."""
    if name in plans.LIBRARIES:
        why = plans.gathers_because(plans.import_library(name), _SAMPLER, "fp32")
        return None if why is None else f"volumes are sampled by Gather: {why}"
    if not name.startswith("ort-") or not on_gpu(name):
        return None
    from jrs.runtime.engines.onnxruntime_gpu import why_slow

    return why_slow()


def _probe(name: str) -> tuple[str, str | None]:
    """The device, and the name of the graph whose numbers are wrong, if one's are."""
    image = np.random.default_rng(0).normal(size=(1, 2, 8, 8, 8)).astype(np.float32)
    coords = np.indices((8, 8, 8), dtype=np.float32)[None]
    coords[:, 2] += 0.5
    options = EngineOptions("fp32", 1)
    with open_engine(DATA / "graphs" / "probe_convolution.onnx", "encoder", name, options) as engine:
        device = engine.info.device
        if not _close(engine({"image": image})["code"], _filtered(image)):
            return device, "a convolution"
    if name != "openvino":  # its transformer is ort-cpu's
        with open_engine(_SAMPLER, "transformer", name, options) as engine:
            if not _close(engine({"image": image, "coords": coords})["moved"], _shifted(image)):
                return device, "the sampler"
    return device, None


def _close(got: Array, want: Array) -> bool:
    return got.shape == want.shape and bool(np.allclose(got, want, atol=1e-4))


def _filtered(image: Array) -> Array:
    """ReLU of the 3x3x3 mean of channel 0, zeros outside, less channel 1."""
    padded = np.pad(image[0, 0], 1)
    mean = np.zeros(image.shape[2:])
    for i, j, k in np.ndindex(3, 3, 3):
        mean += padded[i : i + 8, j : j + 8, k : k + 8] / 27.0
    filtered: Array = np.maximum(mean - image[0, 1], 0.0)[None, None].astype(np.float32)
    return filtered


def _shifted(image: Array) -> Array:
    """Half a voxel on along the last axis: means of neighbours, the last voxel itself."""
    following = np.concatenate([image[..., 1:], image[..., -1:]], axis=-1)
    shifted: Array = (0.5 * (image + following)).astype(np.float32)
    return shifted


def _precisions(name: str) -> tuple[str, ...]:
    if name == "openvino":
        return ("fp32", "bf16") if computes_bf16() else ("fp32",)
    if not on_gpu(name) or name == "ort-tensorrt":
        return ("fp32",)
    capability = visible_devices()[0].capability
    return tuple(precision for precision, least in _PRECISIONS.items() if capability >= least)
