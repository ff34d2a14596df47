"""How fast ``jrs infer`` is on this CPU, beside PyTorch, ONNX Runtime, ANTs, greedy and SimpleITK in the same run.

    python benchmarks/speed.py examples/TCGA-DU-7294 --peer-python PEERS/bin/python --json FILE --plot FILE.png
    python benchmarks/speed.py examples/TCGA-DU-7294 --no-peers --runs 1

Whole processes (imports, reading, registering, writing), medians: the default bundle, and the paper's network with
random weights at 1 mm, 144x208x144; with an empty cache and with a full one; with and without refinement. Then the
network's stages alone at 1 mm, and what each graph could take at best on this machine. ``--peer-python`` is an
interpreter that has antspyx, picsl-greedy, SimpleITK and nibabel (antspyx needs an older numpy than constraints.txt
names). Needs PyTorch, onnx and matplotlib (``jrs[train,evaluate]``). Prints Markdown.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from roofline import machine, roofline
from stages import CPU, PEAK, WALL, run_once

from jrs.architecture import Architecture
from jrs.bundle import Bundle
from jrs.export.exporter import export_bundle
from jrs.manifest import GridSpec, ModelSpec
from jrs.models.checkpoint import Checkpoint, load_checkpoint
from jrs.resources import atlas_path
from jrs.runtime.cases import load_case
from jrs.runtime.engines import open_engine
from jrs.runtime.network import Network, engine_options
from jrs.writing import save_nifti

ROOT = Path(__file__).resolve().parent.parent
SHAPE = (144, 208, 144)
PEERS = {"SimpleITK affine + demons": "", "greedy affine + deformable": "greedy", "ANTs affine + SyN": "ants"}
GRAPHS = ("encoder", "segmentation", "registration")
SIMPLEITK = """
import sys, SimpleITK as sitk
moving, fixed = (sitk.ReadImage(f"{sys.argv[1]}/{n}.nii", sitk.sitkFloat32) for n in ("moving", "fixed"))
moments = sitk.CenteredTransformInitializerFilter.MOMENTS
start = sitk.CenteredTransformInitializer(fixed, moving, sitk.AffineTransform(3), moments)
method = sitk.ImageRegistrationMethod()
method.SetMetricAsMattesMutualInformation(32)
method.SetMetricSamplingStrategy(method.REGULAR)
method.SetMetricSamplingPercentage(0.2, 1)
method.SetInterpolator(sitk.sitkLinear)
method.SetOptimizerAsGradientDescentLineSearch(1.0, 100)
method.SetOptimizerScalesFromPhysicalShift()
method.SetShrinkFactorsPerLevel([4, 2])
method.SetSmoothingSigmasPerLevel([2, 1])
method.SetInitialTransform(start)
affine = method.Execute(fixed, moving)
moved = sitk.HistogramMatching(sitk.Resample(moving, fixed, affine), fixed, 128, 7, True)
demons = sitk.FastSymmetricForcesDemonsRegistrationFilter()
demons.SetNumberOfIterations(50)
demons.SetStandardDeviations(1.5)
sitk.WriteImage(demons.Execute(fixed, moved), f"{sys.argv[1]}/sitk.nii.gz")
"""


def paper_network(work: Path) -> tuple[Path, Bundle]:
    """Checkpoint and bundle of the paper's 8 channels, instance norms, a displacement head, random weights, at 1 mm.

    Its segmentation leans towards the background: random labels all over a head would cost what no tumour does.
    """
    import torch

    from jrs.models.network import JointNet

    torch.manual_seed(0)
    architecture = Architecture(norm="instance", head="displacement")
    net = JointNet(architecture)
    assert net.segmentation is not None and net.segmentation.output.bias is not None
    with torch.no_grad():
        net.segmentation.output.bias.copy_(torch.tensor([8.0, 0.0, 0.0, 0.0]))
    spec = ModelSpec(architecture, grid=GridSpec(SHAPE, (1.0, 1.0, 1.0), "RAS", "sri24"))
    checkpoint = work / "random.safetensors"
    Checkpoint(spec, net.state_dict()).save(checkpoint)
    return checkpoint, export_bundle(checkpoint, work / "one-mm")


def infer_rows(case: str, bundles: dict[str, Path | None], runs: int, work: Path) -> dict[str, dict[str, float]]:
    """``jrs infer`` of each bundle: cold cache, warm cache, and warm with refinement."""
    rows = {}
    for name, folder in bundles.items():
        chosen = [] if folder is None else ["--bundle", str(folder)]
        cold = [run_once(case, [*chosen, "--refine", "0"], _cache(work / f"cold-{name}-{i}")) for i in range(runs)]
        warm_cache = _cache(work / f"cold-{name}-0")
        warm = [run_once(case, [*chosen, "--refine", "0"], warm_cache) for _ in range(runs)]
        run_once(case, chosen, warm_cache)
        refined = [run_once(case, chosen, warm_cache) for _ in range(runs)]
        for what, found in (("cold", cold), ("warm", warm), ("warm, refined", refined)):
            names = dict.fromkeys(key for row in found for key in row)
            rows[f"{name}, {what}"] = {k: statistics.median(row.get(k, 0.0) for row in found) for k in names}
    return rows


def _cache(folder: Path) -> dict[str, str]:
    return {"JRS_CACHE_DIR": str(folder)}


def median_s(work: Callable[[], object], runs: int) -> float:
    """Median seconds of a call, after one to warm up."""
    work()
    seconds = []
    for _ in range(runs):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def network_rows(checkpoint: Path, bundle: Bundle, runs: int) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds of a pair through the network in each library; seconds of each graph in the one that auto takes."""
    import torch

    from jrs.models.spatial import warp

    generator = np.random.default_rng(0)
    shape = (1, bundle.manifest.model.architecture.in_channels, *bundle.manifest.model.grid.shape)
    moving, fixed = (generator.standard_normal(shape).astype(np.float32) for _ in range(2))
    net = load_checkpoint(checkpoint).network().eval()
    assert net.segmentation is not None
    segmentation, tensors = net.segmentation, (torch.from_numpy(moving), torch.from_numpy(fixed))

    def eager() -> None:
        """No more than the engines do: the network's own forward pass segments both images."""
        here, there = (net.encoder(image) for image in tensors)
        torch.softmax(segmentation(here), dim=1)
        warp(tensors[0], net.coordinates(net.flow(here, there)))

    with torch.inference_mode():
        rows = {"PyTorch eager FP32, both images": median_s(eager, max(1, runs // 2))}
    for backend, precision in (("ort-cpu", "fp32"), ("openvino", "fp32"), ("openvino", "bf16"), ("auto", "auto")):
        with Network(bundle, backend, precision) as network:
            name = f"{network.info.backend} {network.info.precision}"

            def pair(codes: Any = None, network: Network = network) -> None:
                there = network.encode(fixed) if codes is None else codes
                here = network.encode(moving)
                network.segment(moving, here)
                network.register(moving, here, there)

            if backend == "auto":
                run = partial(pair, network.encode(fixed))
                rows[f"jrs ({name}), codes of the fixed image cached"] = median_s(run, runs)
            else:
                rows[f"{name}, both images"] = median_s(pair, runs)
    return rows, _graph_seconds(bundle, moving, runs)


def _graph_seconds(bundle: Bundle, image: Any, runs: int) -> dict[str, float]:
    """Seconds of each graph of convolutions in FP32 and BF16 by OpenVINO."""
    seconds = {}
    for precision in ("fp32", "bf16"):
        engines = {
            name: open_engine(bundle.graph(name), name, "openvino", engine_options(bundle, name, precision))
            for name in GRAPHS
        }
        codes = engines["encoder"].keep({"image": image})
        pairs = {f"{side}_{name}": code for side in ("moving", "fixed") for name, code in codes.items()}
        feeds = {"encoder": {"image": image}, "segmentation": codes, "registration": pairs}
        for name in GRAPHS:
            seconds[f"{name} {precision}"] = median_s(partial(engines[name].keep, feeds[name]), runs)
    return seconds


def peer_s(name: str, case: str, python: str, work: Path) -> float:
    """Seconds of another program, one whole process, on the case's T1 and the atlas."""
    images = load_case(case).images
    moving = images.get("t1") or next(iter(images.values()))
    fixed = next(iter(load_case(atlas_path("sri24")).images.values()))
    for role, volume in (("moving", moving), ("fixed", fixed)):
        save_nifti(work / f"{role}.nii", volume.data.astype(np.float32), volume.geometry)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS", None)
    program = PEERS[name]
    arguments = ["-m", "jrs.evaluate.peers", program, str(work), "0"] if program else ["-c", SIMPLEITK, str(work)]
    print(name, file=sys.stderr)
    start = time.perf_counter()
    subprocess.run([python, *arguments], env=environment, check=True, stdout=subprocess.DEVNULL, cwd=work)
    return time.perf_counter() - start


def check_peers(python: str) -> None:
    """End with one line, before anything is measured, where the other programs' interpreter lacks one."""
    needs = "ants, nibabel, picsl_greedy, SimpleITK"
    try:
        subprocess.run([python, "-c", f"import {needs}"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        why = (getattr(error, "stderr", None) or str(error)).strip().splitlines()[-1]
        raise SystemExit(f"speed.py: {python} does not have all of {needs} ({why}); or give --no-peers") from error


def _keep(found: dict[str, Any], path: Path | None) -> None:
    if path is not None:
        path.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def table(head: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    """Markdown."""
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def report(found: dict[str, Any]) -> str:
    """Everything as Markdown tables."""
    infer, network, peers = found["infer"], found["network"], found["peers"]
    parts = [f"{found['cpu']}, {os.cpu_count()} cores; medians of {found['runs']} runs, peers once."]
    base = infer["1 mm, warm"][WALL]
    rows = [(n, f"{r[WALL]:.1f}", f"{r[CPU]:.1f}", f"{r[PEAK]:.2f}", f"{r[WALL] / base:.2f}") for n, r in infer.items()]
    rows += [(name, f"{seconds:.1f}", "", "", f"**{seconds / base:.1f}**") for name, seconds in peers.items()]
    parts.append(table(("whole process", "wall, s", "CPU, s", "peak, GB", "wall / jrs at 1 mm, warm"), rows))
    stages = [s for s in infer["1 mm, warm, refined"] if s not in (WALL, CPU, PEAK)]
    columns = ("default, warm", "1 mm, cold", "1 mm, warm", "1 mm, warm, refined")
    body = [(s, *(f"{infer[c].get(s, 0.0):.2f}" for c in columns)) for s in stages]
    parts.append(table(("stage, s", *columns), body))
    eager = network["PyTorch eager FP32, both images"]
    rows = [(name, f"{seconds:.2f}", f"{eager / seconds:.1f}") for name, seconds in network.items()]
    parts.append(table(("network and warp of a pair, 144x208x144x4", "s", "times faster than PyTorch"), rows))
    parts.append(found["roofline"])
    return "\n\n".join(parts)


def plot(found: dict[str, Any], path: Path) -> None:
    """Whole processes as bars, jrs's in stages."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 0.42 * (len(found["infer"]) + len(found["peers"])) + 1.2))
    peers, infer = found["peers"], found["infer"]
    names = [*reversed(peers), *reversed(infer)]
    bars = axes.barh(names, [peers[n] if n in peers else infer[n][WALL] for n in names])
    for bar, name in zip(bars, names, strict=True):
        bar.set_color("#9aa0a6" if name in peers else "#1a73e8")
        axes.annotate(f" {bar.get_width():.1f} s", (bar.get_width(), bar.get_y() + bar.get_height() / 2), va="center")
    axes.set_xscale("log")
    axes.set_xlim(1, 2.2 * max(bar.get_width() for bar in bars))
    axes.set_xlabel("seconds, whole process (log)")
    axes.set_yticks(range(len(names)), [name if name in peers else f"jrs, {name}" for name in names])
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--peer-python", default=sys.executable)
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    given = parser.parse_args()
    if not given.no_peers:
        check_peers(given.peer_python)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        checkpoint, bundle = paper_network(work)
        limits = machine()
        found: dict[str, Any] = {"cpu": platform.processor() or platform.machine(), "runs": given.runs}
        found["limits"] = limits
        found["infer"] = infer_rows(given.case, {"default": None, "1 mm": bundle.folder}, given.runs, work)
        found["network"], seconds = network_rows(checkpoint, bundle, given.runs)
        found["roofline"] = roofline({name: bundle.graph(name) for name in GRAPHS}, seconds, limits)
        found["peers"] = {}
        # After each of the slow ones, so that a run that is cut off is not lost.
        for name in () if given.no_peers else PEERS:
            _keep(found, given.json)
            found["peers"][name] = peer_s(name, given.case, given.peer_python, work)
    _keep(found, given.json)
    print(report(found))
    if given.plot:
        plot(found, given.plot)


if __name__ == "__main__":
    main()
