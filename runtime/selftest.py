"""Every graph of a bundle on one backend beside ONNX Runtime on the CPU: are the numbers right, and how fast."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from jrs.bundle import Bundle
from jrs.errors import BackendError
from jrs.reading import read_volume
from jrs.resources import atlas_path
from jrs.runtime.engines import (
    Array,
    ChannelsLast,
    EngineInfo,
    EngineOptions,
    Value,
    choose_backend,
    hosted,
    open_engine,
)
from jrs.runtime.engines.base import is_code
from jrs.runtime.network import Network, engine_options
from jrs.runtime.precision import choose_precision
from jrs.runtime.preprocess import network_input, place_grid
from jrs.volume import Volume

# Largest 99th percentile of the error, relative to the output's deviation, by the precision of the arithmetic.
# FP32 in another order differs by a millionth in a trained network, by thousandths in one of random weights whose
# instance norms see a handful of voxels.
LIMITS = {"fp32": 5e-3, "fp16": 2e-2, "bf16": 0.15}


@dataclass(frozen=True)
class GraphResult:
    """One graph: errors relative to the deviation of ort-cpu's output, and milliseconds a run.

    ``milliseconds`` from arrays on the host to arrays on the host; ``reference_ms`` the same of ort-cpu.
    """

    graph: str
    info: EngineInfo
    error_p99: float
    error_max: float
    limit: float
    milliseconds: float
    reference_ms: float

    @property
    def passed(self) -> bool:
        """Whether the error keeps to the limit."""
        return self.error_p99 <= self.limit


@dataclass(frozen=True)
class SelfTest:
    """Graph by graph, and milliseconds of a whole case, every pass of it, the fixed codes kept."""

    graphs: tuple[GraphResult, ...]
    case_ms: float

    @property
    def passed(self) -> bool:
        """Whether every graph keeps to its limit."""
        return all(result.passed for result in self.graphs)


def run_selftest(bundle: Bundle, backend: str = "auto", precision: str = "auto", runs: int = 5) -> SelfTest:
    """Run every graph ``runs`` times on both, on the SRI24 brain; raises what the backend raises.

    Each graph gets the reference's inputs, so an error is its own.
    """
    backend, _ = choose_backend(backend, precision)
    if bundle.manifest.precision == "bf16":
        raise BackendError(
            f"{bundle.folder}: BF16 convolutions have no reference on a CPU; test an fp32 or fp16 bundle"
        )
    precision = choose_precision(bundle, backend, precision).precision
    feeds = _feeds(bundle)
    results = tuple(_compare(bundle, name, inputs, backend, precision, runs) for name, inputs in feeds.items())
    return SelfTest(results, _time_case(bundle, feeds["encoder"]["image"], backend, precision, runs))


def _feeds(bundle: Bundle) -> dict[str, dict[str, Array]]:
    """Inputs of each graph, by ort-cpu."""
    spec = bundle.manifest.model
    atlas = read_volume(atlas_path("sri24"))
    grid = place_grid(spec.grid, atlas)[0]
    images = {}
    for index, channel in enumerate(spec.channels):
        curve = np.sqrt(np.clip(atlas.data, 0, None)) if index % 2 else atlas.data
        images[channel] = Volume(curve.astype(np.float32), atlas.geometry)
    shift = np.eye(4)
    shift[:3, 3] = (3.0, -2.0, 4.0)
    moving = network_input(images, spec, grid, shift).tensor
    fixed = network_input(images, spec, grid).tensor
    feeds: dict[str, dict[str, Array]] = {"encoder": {"image": moving}}
    codes = {
        side: _reference(bundle, "encoder", {"image": image}) for side, image in (("moving", moving), ("fixed", fixed))
    }
    if "segmentation" in bundle.manifest.graphs:
        feeds["segmentation"] = codes["moving"]
    if "registration" in bundle.manifest.graphs:
        both = {f"{side}_{name}": code for side, those in codes.items() for name, code in those.items()}
        feeds["registration"] = both
        feeds["transformer"] = {"image": moving, "flow": _reference(bundle, "registration", both)["flow"]}
    if "composer" in bundle.manifest.graphs:
        field = _reference(bundle, "transformer", feeds["transformer"])["displacement"]
        feeds["composer"] = {"image": moving, "first": field, "further": field}
    return feeds


def _reference(bundle: Bundle, name: str, inputs: Mapping[str, Array]) -> dict[str, Array]:
    with open_engine(bundle.graph(name), name, "ort-cpu", engine_options(bundle, name, "fp32")) as engine:
        return engine(inputs)


def _compare(
    bundle: Bundle, name: str, inputs: Mapping[str, Array], backend: str, precision: str, runs: int
) -> GraphResult:
    with open_engine(bundle.graph(name), name, "ort-cpu", engine_options(bundle, name, "fp32")) as engine:
        reference = engine(inputs)
        reference_ms = median_ms(lambda: engine(inputs), min(runs, 2))
    options = engine_options(bundle, name, precision)
    with open_engine(bundle.graph(name), name, backend, options) as engine:
        run, given = (engine.keep, _handed_on(inputs, options)) if backend == "openvino" else (engine, inputs)
        got = hosted(run(given))
        info = engine.info
        milliseconds = median_ms(lambda: run(given), runs)
    worst, typical = 0.0, 0.0
    for output, want in reference.items():
        error = np.abs(got[output].astype(np.float64) - want) / max(float(want.std()), 1e-6)
        worst, typical = max(worst, float(error.max())), max(typical, float(np.percentile(error, 99)))
    limit = LIMITS.get(info.precision, LIMITS["fp32"])
    return GraphResult(name, info, typical, worst, limit, milliseconds, reference_ms)


def _handed_on(inputs: Mapping[str, Array], options: EngineOptions) -> dict[str, Value]:
    """Codes as OpenVINO's graphs get them from each other."""
    dtype = np.uint16 if options.codes == "bf16" else np.float32
    return {name: ChannelsLast.of(value, dtype) if is_code(name) else value for name, value in inputs.items()}


def _time_case(bundle: Bundle, image: Array, backend: str, precision: str, runs: int) -> float:
    with Network(bundle, backend, precision) as network:
        fixed = network.encode(image)

        def case() -> None:
            codes = network.encode(image)
            if "segmentation" in bundle.manifest.graphs:
                network.segment(image, codes)
            if "registration" in bundle.manifest.graphs:
                network.register(image, codes, fixed)

        case()  # engines open, algorithms found, CUDA graphs captured
        case()
        return median_ms(case, runs)


def median_ms(run: Callable[[], object], times: int) -> float:
    """Milliseconds of a run, the median of so many."""
    samples = []
    for _ in range(times):
        start = time.perf_counter()
        run()
        samples.append(1000.0 * (time.perf_counter() - start))
    return statistics.median(samples)
