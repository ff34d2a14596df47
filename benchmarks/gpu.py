"""Everything that wants a GPU, in one command: parity and latency of each backend, the sampler's kernel, PyTorch.

    python benchmarks/gpu.py                         # what this machine has, on the default bundle
    python benchmarks/gpu.py --shape 144,208,144     # weights of the bundle, exported again on the paper's grid

Backends that are not there are named with the reason. The kernel part needs cupy (pip install cupy-cuda13x), the
PyTorch part a CUDA build of torch; both are left out, and said so, where they are missing. Prints Markdown.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from jrs.bundle import Bundle
from jrs.errors import JrsError, first_line
from jrs.runtime.engines import EngineOptions, all_backends, functions, kernel, on_gpu, open_engine, why_unavailable
from jrs.runtime.engines.cuda import driver_version, visible_devices, why_no_device
from jrs.runtime.selftest import median_ms, run_selftest

# GB/s by the vendor's data sheets, for the share of the limit; others are measured by a copy.
BANDWIDTH = {"H100 80GB": 3350, "H200": 4800, "A100-SXM4-80GB": 2039, "RTX 4090": 1008, "RTX 3090": 936, "Orin": 204}


def backends(bundle: Bundle, runs: int) -> None:
    """Parity with ort-cpu and milliseconds, graph by graph and of a whole case."""
    print("\n## Backends\n\n| backend | graph | precision | error p99 | ms | ort-cpu ms | |")
    print("|---|---|---|---|---|---|---|")
    for name in all_backends():
        lacking = why_unavailable(name)
        if lacking is not None or not on_gpu(name):
            if lacking is not None:
                print(f"| {name} | | | | | | {lacking} |")
            continue
        try:
            result = run_selftest(bundle, name, runs=runs)
        except JrsError as error:
            print(f"| {name} | | | | | | {error} |")
            continue
        for r in result.graphs:
            times = f"{r.milliseconds:.2f} | {r.reference_ms:.1f} | {'passed' if r.passed else 'FAILED'} |"
            print(f"| {name} | {r.graph} | {r.info.precision} | {r.error_p99:.1e} | {times}")
        print(f"| {name} | whole case, fixed codes kept | | | **{result.case_ms:.2f}** | | |")


def bodies(bundle: Bundle, runs: int, backend: str = "ort-cuda") -> None:
    """The transformer by ONNX Runtime's GridSample and by Gather, as older libraries have it; arrays on the device."""
    print("\n## The transformer, by either body of the sampler\n")
    lacking = why_unavailable(backend)
    if lacking is not None:
        print(f"left out: {lacking}")
        return
    print(f"| {backend} | ms | largest difference, of an image from 0 to 1 |\n|---|---|---|")
    rng = np.random.default_rng(0)
    sides = bundle.manifest.model.grid.shape
    feed = {
        "image": rng.random((1, bundle.manifest.model.architecture.in_channels, *sides), dtype=np.float32),
        "flow": rng.normal(size=(1, 3, *sides)).astype(np.float32),
    }
    reference = None
    with tempfile.TemporaryDirectory() as folder:
        gathering = Path(folder) / "transformer.onnx"
        gathering.write_bytes(functions.with_gathering(bundle.graph("transformer").read_bytes()))
        for name, graph in (("GridSample", bundle.graph("transformer")), ("Gather", gathering)):
            with open_engine(graph, "transformer", backend, EngineOptions()) as engine:
                placed = {key: engine.place(value) for key, value in feed.items()}
                moved = engine(feed)["moved"]
                engine.keep(placed)
                taken = median_ms(functools.partial(engine.keep, placed), runs)
            reference = moved if reference is None else reference
            print(f"| {name} | {taken:.2f} | {np.abs(moved - reference).max():.1e} |")


def sampler(shape: tuple[int, int, int], channels: int, runs: int) -> None:
    """The kernel beside torch's grid_sample: the largest error on hard points, and the share of the bandwidth."""
    print("\n## Sampler\n")
    try:
        import cupy
    except ImportError as error:
        print(f"left out: {error}")
        return
    device = visible_devices()[0]
    with tempfile.TemporaryDirectory() as folder:
        # Given as text it would be taken for CUDA's source.
        ptx = Path(folder) / "grid_sample_3d.ptx"
        ptx.write_bytes(kernel.compile_ptx(device.capability))
        module = cupy.RawModule(path=str(ptx))
        launches = {precision: _launcher(cupy, module.get_function(name)) for precision, name in kernel.KERNELS.items()}
    print("| volume | error, hard points | ms | GB/s | share of the limit | torch ms |\n|---|---|---|---|---|---|")
    for precision in ("fp32", "fp16"):
        launch = launches[precision]
        volume, coords = _problem(shape, channels, hard=True)
        stored = volume.astype(np.float16 if precision == "fp16" else np.float32)
        got = cupy.asnumpy(launch(cupy.asarray(stored), cupy.asarray(coords)))
        error = float(np.abs(got.astype(np.float64) - by_numpy(stored, coords)).max())
        volume, coords = _problem(shape, channels, hard=False)
        on_device, where = cupy.asarray(volume.astype(stored.dtype)), cupy.asarray(coords)
        out = launch(on_device, where)
        timed = functools.partial(launch, on_device, where, out)
        milliseconds = _device_ms(cupy, timed, runs)
        moved = on_device.nbytes + where.nbytes + out.nbytes
        rate = moved / milliseconds / 1e6
        limit = _bandwidth(cupy, device.name, runs)
        theirs = _torch_ms(volume, coords, precision, runs)
        share = f"{rate:.0f} | {100 * rate / limit:.0f} %"
        print(f"| {precision} | {error:.1e} | {milliseconds:.3f} | {share} | {theirs} |")


def by_numpy(volume: Any, coords: Any) -> Any:
    """Trilinear in float64, borders clamped, NaN as index 0: (1,C,D,H,W) at (1,3,...)."""
    clean = np.nan_to_num(coords[0].astype(np.float64), nan=0.0, posinf=1e9, neginf=-1e9)
    inside = [np.clip(c, 0, n - 1) for c, n in zip(clean, volume.shape[2:], strict=True)]
    lower = [np.floor(c).astype(int) for c in inside]
    out = np.zeros((1, volume.shape[1], *coords.shape[2:]))
    wide = volume.astype(np.float64)
    for corner in np.ndindex(2, 2, 2):
        index = [np.minimum(i + s, n - 1) for i, s, n in zip(lower, corner, volume.shape[2:], strict=True)]
        parts = [c - i if s else 1 - (c - i) for c, i, s in zip(inside, lower, corner, strict=True)]
        out += np.prod(parts, axis=0) * wide[:, :, index[0], index[1], index[2]]
    return out


def _problem(shape: tuple[int, int, int], channels: int, hard: bool) -> tuple[Any, Any]:
    """A volume, and a smooth field of coordinates; hard ones leave the volume and hold NaN and infinities."""
    rng = np.random.default_rng(0)
    volume = rng.normal(size=(1, channels, *shape)).astype(np.float32)
    coords = np.indices(shape, dtype=np.float32)[None]
    coords += 3.0 * np.sin(coords[:, ::-1] / 9.0)
    if hard:
        coords *= 1.2
        flat = coords.reshape(3, -1)
        flat[:, ::1009], flat[0, ::2003], flat[1, ::3001], flat[2, ::4001] = np.nan, np.inf, -np.inf, np.nan
    return volume, coords


def _launcher(cupy: Any, function: Any) -> Callable[..., Any]:
    def launch(volume: Any, coords: Any, out: Any = None) -> Any:
        channels, depth, height, width = volume.shape[1:]
        points = int(np.prod(coords.shape[2:]))
        out = cupy.empty((1, channels, *coords.shape[2:]), dtype=volume.dtype) if out is None else out
        sizes = (np.int32(n) for n in (channels, depth, height, width, points, points))
        blocks = -(-points // kernel.THREADS)
        function((blocks,), (kernel.THREADS,), (volume, coords, *sizes, out))
        return out

    return launch


def _device_ms(cupy: Any, run: Callable[[], object], runs: int) -> float:
    samples = []
    for _ in range(runs + 3):
        start, stop = cupy.cuda.Event(), cupy.cuda.Event()
        start.record()
        run()
        stop.record()
        stop.synchronize()
        samples.append(cupy.cuda.get_elapsed_time(start, stop))
    return statistics.median(samples[3:])


def _bandwidth(cupy: Any, name: str, runs: int) -> float:
    for known, rate in BANDWIDTH.items():
        if known.lower() in name.lower():
            return float(rate)
    source = cupy.zeros(1 << 28, dtype=cupy.uint8)
    target = cupy.empty_like(source)
    return float(2 * source.nbytes / _device_ms(cupy, lambda: cupy.copyto(target, source), runs) / 1e6)


def _cuda_torch() -> Any:
    try:
        import torch
    except ImportError:
        return None
    return torch if torch.cuda.is_available() else None


def _torch_ms(volume: Any, coords: Any, precision: str, runs: int) -> str:
    torch = _cuda_torch()
    if torch is None:
        return "no CUDA torch"
    size = np.array(volume.shape[2:]).reshape(1, 3, 1, 1, 1)
    grid = (coords * (2.0 / (size - 1)) - 1.0)[:, ::-1].transpose(0, 2, 3, 4, 1)
    dtype = torch.float16 if precision == "fp16" else torch.float32
    where = torch.from_numpy(np.ascontiguousarray(grid, dtype=np.float32)).cuda().to(dtype)
    what = torch.from_numpy(volume).cuda().to(dtype)
    sample = torch.nn.functional.grid_sample
    run = lambda: sample(what, where, padding_mode="border", align_corners=True)  # noqa: E731
    return f"{_torch_time(torch, run, runs):.3f}"


def _torch_time(torch: Any, run: Callable[[], object], runs: int) -> float:
    samples = []
    for _ in range(runs + 3):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        stop.record()
        stop.synchronize()
        samples.append(start.elapsed_time(stop))
    return statistics.median(samples[3:])


def pytorch(bundle: Bundle, runs: int) -> None:
    """Eager and compiled: all that a case takes, every pass and the moved image included, the fixed codes kept."""
    print("\n## PyTorch\n")
    torch = _cuda_torch()
    if torch is None:
        print("left out: no CUDA build of torch")
        return
    from jrs.models.checkpoint import load_checkpoint
    from jrs.models.spatial import compose, warp

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    spec = bundle.manifest.model
    lateral = 2 + spec.grid.axis_along("LR")
    net = load_checkpoint(bundle.folder).network().eval().cuda()
    image = torch.randn(1, spec.architecture.in_channels, *spec.grid.shape, device="cuda")

    def case(fixed: Any) -> Any:
        codes = net.encoder(image)
        probabilities = None
        if net.segmentation is not None:
            probabilities = net.segmentation(codes).softmax(dim=1)
            if spec.mirroring:
                mirrored = net.segmentation(net.encoder(image.flip(lateral))).softmax(dim=1)
                probabilities = (probabilities + mirrored.flip(lateral)) / 2
        coords = net.coordinates(net.flow(codes, fixed))
        for _ in range(spec.passes - 1):
            further = net.flow(net.encoder(warp(image, coords)), fixed)
            coords = compose(coords, net.coordinates(further))
        return probabilities, warp(image, coords)

    print("| | ms |\n|---|---|")
    with torch.no_grad():
        for name in ("eager", "compiled"):
            run = case if name == "eager" else torch.compile(case)
            for dtype in (None, torch.float16, torch.bfloat16):
                try:
                    with torch.autocast("cuda", dtype=dtype or torch.float16, enabled=dtype is not None):
                        fixed = net.encoder(image)
                        taken = f"{_torch_time(torch, lambda r=run, f=fixed: r(f), runs):.2f}"  # type: ignore[misc]
                except Exception as error:  # the rest of the table is worth having
                    taken = f"failed: {first_line(error)}"
                print(f"| {name}, {str(dtype or torch.float32).removeprefix('torch.')} | {taken} |")


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle")
    parser.add_argument("--shape", help="export the bundle's weights again on this grid (needs torch)")
    parser.add_argument("--precision", default="fp32", choices=("fp32", "fp16"), help="of that export")
    parser.add_argument("--runs", type=int, default=20)
    options = parser.parse_args()
    if not visible_devices():
        raise SystemExit(f"gpu.py: no CUDA device is visible: {why_no_device()}")
    device = visible_devices()[0]
    print(f"{device.name}, SM {device.capability}, driver {driver_version()}, {datetime.date.today()}, medians")
    with tempfile.TemporaryDirectory() as folder:
        bundle = Bundle.open(options.bundle)
        if options.shape is not None or options.precision != bundle.manifest.precision:
            from jrs.cli.export import parse_shape
            from jrs.export.exporter import export_bundle

            sides = None if options.shape is None else parse_shape(options.shape)
            bundle = export_bundle(bundle.folder, Path(folder) / "bundle", options.precision, "bench", sides)
        backends(bundle, options.runs)
        bodies(bundle, options.runs)
        sampler(bundle.manifest.model.grid.shape, bundle.manifest.model.architecture.in_channels, options.runs)
        pytorch(bundle, options.runs)


if __name__ == "__main__":
    main()
