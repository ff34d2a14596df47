"""TensorRT engines ("plans") of a bundle's graphs: built, stored under everything they depend on, checked on loading.

One code path for ``tensorrt`` 10 and 11 and for ``tensorrt_rtx``; the library is a parameter. A plan is code that
runs on the device: one whose key or checksum does not hold is never loaded, it is built again.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import os
import platform
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from jrs.errors import BackendError, JrsError, OutOfMemoryError, UsageError, first_line
from jrs.files import sha256_of, whole_file, write_json
from jrs.resources import DATA
from jrs.runtime.caching import ENGINES, cache_folder
from jrs.runtime.engines import functions, kernel
from jrs.runtime.engines.base import graph_name
from jrs.runtime.engines.cuda import Device, driver_version, visible_devices
from jrs.runtime.engines.tensorrt_log import make_logger, short, tells_of_memory

LIBRARIES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
ANY = "any"


@dataclass(frozen=True)
class BuildOptions:
    """How an engine is built.

    Attributes:
        optimization_level: 0 to 5, the library's own scale; higher searches longer.
        workspace_mb: limit of the scratch memory a layer may use.
        capabilities: targets such as ``SM86``, ahead of time and without a GPU (tensorrt-rtx alone); empty: this GPU.
    """

    optimization_level: int = 3
    workspace_mb: int = 2048
    capabilities: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.optimization_level <= 5:
            raise UsageError(f"optimization level {self.optimization_level}: must lie between 0 and 5")
        if self.workspace_mb < 16:
            raise UsageError(f"workspace {self.workspace_mb} MB: must be at least 16")


@dataclass(frozen=True)
class PlanKey:
    """All that a plan depends on; two plans of one key are interchangeable.

    ``capability``, ``gpu`` and ``driver`` are those of this machine, or the targets and ``any`` ahead of time.
    """

    graph: str
    onnx_sha256: str
    library: str
    library_version: str
    machine: str
    capability: str
    gpu: str
    driver: str
    precision: str
    kernel_sha256: str
    optimization_level: int
    workspace_mb: int

    @property
    def digest(self) -> str:
        """SHA-256 of the key."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    @property
    def file(self) -> str:
        """The plan's name in its folder."""
        return f"{self.graph}-{self.digest[:20]}.plan"


@dataclass(frozen=True)
class Plan:
    """A built engine and what the library made of the graph: layers by type, their outputs by number type.

    ``sampler`` is how it samples volumes (native, plugin, gather; empty where it does not), ``remark`` why not by the
    plugin where the library takes plugins.
    """

    key: PlanKey
    content: bytes
    layers: dict[str, int] = field(default_factory=dict)
    types: dict[str, int] = field(default_factory=dict)
    sampler: str = ""
    remark: str = ""


def import_library(backend: str) -> ModuleType:
    """``tensorrt`` or ``tensorrt_rtx``; raises BackendError if it is not installed or does not load."""
    name = LIBRARIES[backend]
    try:
        return importlib.import_module(name)
    except (ImportError, OSError) as error:
        raise BackendError(
            f"backend {backend}: {name} cannot be imported ({first_line(error)}); pip install 'jrs[{backend}]'"
        ) from error


def plan_key(library: ModuleType, graph: Path, precision: str, options: BuildOptions) -> PlanKey:
    """The key of a graph's plan for this machine's GPU, or for the targets that ``options`` name."""
    if options.capabilities:
        capability, gpu, driver = "+".join(sorted(options.capabilities)), ANY, ANY
    else:
        device = _this_device(library)
        capability, gpu, driver = device.sm, device.name, driver_version()
    return PlanKey(
        graph=graph.stem,
        onnx_sha256=sha256_of(graph),
        library=library.__name__,
        library_version=str(library.__version__),
        machine=f"{platform.system()}-{platform.machine()}",
        capability=capability,
        gpu=gpu,
        driver=driver,
        precision=precision,
        kernel_sha256=_sha256_of_samplers(library, graph),
        optimization_level=options.optimization_level,
        workspace_mb=options.workspace_mb,
    )


def _sha256_of_samplers(library: ModuleType, graph: Path) -> str:
    """Of what may be put into an engine of this graph; empty for nothing."""
    if kernel.has_native_sampler(library) or not functions.samples(graph.read_bytes()):
        return ""
    return hashlib.sha256(kernel.SOURCE.read_bytes() + functions.GATHERING.read_bytes()).hexdigest()


def _this_device(library: ModuleType) -> Device:
    from jrs.runtime.engines.cuda import why_no_device

    devices = visible_devices()
    if not devices:
        more = "; name targets with --capability to build ahead of time" if library.__name__ == "tensorrt_rtx" else ""
        raise BackendError(f"{library.__name__} builds for the GPU at hand, and there is none: {why_no_device()}{more}")
    return devices[0]


def check_targets(library: ModuleType, options: BuildOptions) -> None:
    """Raise UsageError for targets that the library does not build for, BackendError if there is none at all."""
    if not options.capabilities:
        _this_device(library)
        return
    trt: Any = library
    if not hasattr(trt, "ComputeCapability"):
        raise UsageError(f"{trt.__name__} builds for the GPU at hand alone; --capability needs --library tensorrt-rtx")
    known = [name for name in dir(trt.ComputeCapability) if name.startswith("SM")]
    for name in options.capabilities:
        if name not in known:
            raise UsageError(f"{name} is no target of {trt.__name__}; choose from {', '.join(known)}")


# Building -------------------------------------------------------------------------------------------------


def build_plan(
    library: ModuleType, graph: Path, key: PlanKey, options: BuildOptions, cache: Path | None = None
) -> Plan:
    """Build a graph's engine: strongly typed, TF32 off. ``cache`` is a folder for the library's timings.

    Volumes are sampled by the library itself, by our plugin, or else by its Gather; a plugin that does not build is
    left for that, and the plan says why.
    Raises BackendError with the library's own reason, OutOfMemoryError if the device has not enough memory.
    """
    model = graph.read_bytes()
    if not functions.samples(model):
        return _build(library, graph, model, key, options, cache)
    if kernel.has_native_sampler(library):
        return replace(_build(library, graph, model, key, options, cache), sampler="native")
    refused = ""
    if kernel.takes_plugins(library):
        try:
            kernel.register_plugin(library, _this_device(library).capability)
            # Some versions take an operator's body, which they cannot compute, before its plugin.
            bare = functions.without_body(model)
            return replace(_build(library, graph, bare, key, options, cache), sampler="plugin")
        except OutOfMemoryError:
            raise
        except BackendError as error:
            refused = str(error)
    try:
        plan = _build(library, graph, functions.with_gathering(model), key, options, cache)
    except BackendError as error:
        raise BackendError(f"{error}; nor with the plugin: {refused}" if refused else str(error)) from error
    return replace(plan, sampler="gather", remark=refused)


def _build(
    library: ModuleType, graph: Path, model: bytes, key: PlanKey, options: BuildOptions, cache: Path | None
) -> Plan:
    trt: Any = library
    logger = make_logger(trt)
    builder = trt.Builder(logger)
    # From TensorRT 11 on every network is strongly typed, and the flag may be gone.
    typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if typed is None else 1 << int(typed))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(model, str(graph)):
        reasons = [parser.get_error(index).desc() for index in range(parser.num_errors)]
        raise BackendError(f"{library.__name__}: cannot read {graph_name(graph)} ({short([*reasons, *logger.errors])})")
    layers, types = _describe(network)
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_mb << 20)
    config.builder_optimization_level = options.optimization_level
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    _set_targets(trt, config, options)
    timings = _TimingCache(trt, config, key, cache)
    content = builder.build_serialized_network(network, config)
    if content is None:
        reason = short(logger.errors[-1:])  # those before it are of tactics that were left out
        if tells_of_memory(reason):
            raise OutOfMemoryError(f"{library.__name__}: no device memory to build {graph_name(graph)} ({reason})")
        raise BackendError(f"{library.__name__}: cannot build {graph_name(graph)} for {key.capability} ({reason})")
    timings.save()
    return Plan(key, bytes(content), layers, types)


def _set_targets(trt: Any, config: Any, options: BuildOptions) -> None:
    if not options.capabilities:
        return
    check_targets(trt, options)
    config.num_compute_capabilities = len(options.capabilities)
    for index, name in enumerate(sorted(options.capabilities)):
        config.set_compute_capability(getattr(trt.ComputeCapability, name), index)


class _TimingCache:
    """The timings that TensorRT measured, kept from one build to the next; TensorRT-RTX has none of use.

    There, a timing cache forbids building without a GPU and changes nothing in the engine.
    """

    def __init__(self, trt: Any, config: Any, key: PlanKey, folder: Path | None) -> None:
        self._config, self._file = config, None
        if folder is None or trt.__name__ == "tensorrt_rtx":
            return
        of = f"{key.library}-{key.library_version}-{key.gpu}-{key.driver}"
        self._file = folder / f"timings-{hashlib.sha256(of.encode()).hexdigest()[:20]}.cache"
        known = self._file.read_bytes() if self._file.is_file() else b""
        # One that does not fit is refused by the library, and timings are taken anew.
        stored = config.create_timing_cache(known)
        if stored is None or not config.set_timing_cache(stored, False):
            config.set_timing_cache(config.create_timing_cache(b""), False)

    def save(self) -> None:
        """Store what the build added."""
        if self._file is not None:
            with whole_file(self._file) as temporary:
                temporary.write_bytes(bytes(self._config.get_timing_cache().serialize()))


def _describe(network: Any) -> tuple[dict[str, int], dict[str, int]]:
    layers: Counter[str] = Counter()
    types: Counter[str] = Counter()
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        layers[layer.type.name] += 1
        if layer.type.name in ("CONVOLUTION", "DECONVOLUTION", "GRID_SAMPLE", "MATRIX_MULTIPLY"):
            types[f"{layer.type.name} {layer.get_output(0).dtype.name}"] += 1
    return dict(layers), dict(types)


# Storing --------------------------------------------------------------------------------------------------


def plan_folder(graph: Path) -> Path:
    """Where a graph's plans lie: ``engines`` in the bundle, or the user's cache if that cannot be written.

    Shipped bundles are left as they are installed.
    """
    bundle = graph.resolve().parent
    if DATA.resolve() not in bundle.parents and os.access(bundle, os.W_OK):
        return bundle / "engines"
    place = hashlib.sha256(str(bundle).encode()).hexdigest()[:16]
    return cache_folder() / ENGINES / f"{bundle.name}-{place}"


def store_plan(folder: Path, plan: Plan) -> Path:
    """Write a plan and, after it, the record that vouches for it."""
    path = folder / plan.key.file
    with whole_file(path) as temporary:
        temporary.write_bytes(plan.content)
    record = {
        "key": asdict(plan.key),
        "sha256": hashlib.sha256(plan.content).hexdigest(),
        "layers": plan.layers,
        "types": plan.types,
        "sampler": plan.sampler,
        "remark": plan.remark,
    }
    write_json(path.with_suffix(".json"), record)
    return path


def load_plan(folder: Path, key: PlanKey) -> bytes | None:
    """The content of the stored plan of this key, its checksum verified; None if there is none to trust."""
    path = folder / key.file
    record = plan_record(path)
    try:
        content = path.read_bytes()
    except OSError:
        return None
    if record.get("key") != asdict(key):
        return None
    return content if record.get("sha256") == hashlib.sha256(content).hexdigest() else None


def plan_record(path: Path) -> dict[str, Any]:
    """What ``store_plan`` wrote beside a plan; empty if that is not there or no such thing."""
    try:
        record = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def gathers_because(library: ModuleType, graph: Path, precision: str) -> str | None:
    """Why the stored plan of a graph samples by Gather; None if it does not, or there is none."""
    record = plan_record(plan_folder(graph) / plan_key(library, graph, precision, BuildOptions()).file)
    if record.get("sampler") != "gather":
        return None
    version = f"{library.__name__} {library.__version__}"
    return record.get("remark") or f"{version} has no GridSample for volumes and takes no plugins ahead of time"


def kernels_file(library: ModuleType, graph: Path, precision: str) -> Path:
    """Where the kernels that TensorRT-RTX compiles on this machine as it runs a graph are kept, beside its plans."""
    key = plan_key(library, graph, precision, BuildOptions())
    return (plan_folder(graph) / key.file).with_suffix(".cache")


def load_kernels(path: Path) -> bytes | None:
    """What ``store_kernels`` stored, its checksum verified; None if there is nothing to trust."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    checksum, kernels = content[:32], content[32:]
    return kernels if hashlib.sha256(kernels).digest() == checksum else None


def store_kernels(path: Path, kernels: bytes) -> None:
    """Write compiled kernels behind their SHA-256; where nothing can be written they are compiled again."""
    with suppress(JrsError, OSError), whole_file(path) as temporary:
        temporary.write_bytes(hashlib.sha256(kernels).digest() + kernels)


def ready_plan(library: ModuleType, graph: Path, precision: str, options: BuildOptions | None = None) -> bytes:
    """The plan of a graph for this machine: stored, or stored ahead of time for a GPU like this, or built now."""
    options = options or BuildOptions()
    folder = plan_folder(graph)
    key = plan_key(library, graph, precision, options)
    content = load_plan(folder, key)
    if content is None:
        content = next((c for k in _ahead_of_time(folder, key) if (c := load_plan(folder, k)) is not None), None)
    if content is None:
        plan = build_plan(library, graph, key, options, folder)
        store_plan(folder, plan)
        content = plan.content
    return content


def _ahead_of_time(folder: Path, key: PlanKey) -> Iterator[PlanKey]:
    """Keys of stored plans that are ``key``'s but for having been built for several GPUs, this one included."""
    free = {"capability", "gpu", "driver", "optimization_level", "workspace_mb"}
    for path in sorted(folder.glob(f"{key.graph}-*.json")):
        try:
            stored = PlanKey(**plan_record(path)["key"])
        except (TypeError, KeyError):
            continue
        same = all(value == asdict(stored)[name] for name, value in asdict(key).items() if name not in free)
        if same and stored.gpu == ANY and key.capability in stored.capability.split("+"):
            yield stored
