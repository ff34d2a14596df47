"""The sampler's plugin in TensorRT's own Python package: its checks, and what it makes of the plugin.

The package's libraries need a GPU; small ones stand for them, in a process of its own. CI installs the package for
this test alone: ``tensorrt`` brings its own under the same name.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from jrs.runtime.engines import kernel

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What ``run_tensorrt_plugin.py`` says, all of its stdout."""
    compiler = shutil.which("g++")
    if compiler is None or importlib.util.find_spec("tensorrt_bindings") is None:
        pytest.skip("needs g++, and tensorrt or tensorrt-cu12-bindings")
    folder = tmp_path_factory.mktemp("tensorrt")
    libraries = []
    for name in ("libnvinfer", "libnvonnxparser", "libnvinfer_plugin"):
        for major in (10, 11):
            library = folder / f"{name}.so.{major}"
            command = [compiler, "-shared", "-fPIC", f"-Wl,-soname,{library.name}", "-o", str(library)]
            subprocess.run([*command, str(HERE / "tensorrt_without_gpu.cpp")], check=True)
            libraries.append(str(library))
    command = [sys.executable, str(HERE / "run_tensorrt_plugin.py"), *libraries]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    # One line of JSON: the package says on stdout that its plugins are experimental, where results go.
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def test_plugins_are_compiled_ahead_of_time_from_10_9_on(told: dict[str, Any]) -> None:
    version = tuple(int(part) for part in told["version"].split(".")[:2])
    assert told["takes_plugins"] is (version >= (10, 9))


@pytest.mark.parametrize(("kind", "precision"), [("float32", "fp32"), ("float16", "fp16")])
def test_tensorrt_launches_the_kernel_with_its_arguments(told: dict[str, Any], kind: str, precision: str) -> None:
    made = told["kernels"][kind]
    assert (made["kernel"], made["ptx"]) == (kernel.KERNELS[precision], "ptx")
    # Two images of four channels, 10x12x14 voxels, at 5x6x7 points each.
    assert made["shape"] == [2, 4, 5, 6, 7]
    names = ("channels", "depth", "height", "width", "points", "total")
    assert dict(zip(names, (value for _, value in made["scalars"]), strict=True)) == {
        "channels": 4,
        "depth": 10,
        "height": 12,
        "width": 14,
        "points": 5 * 6 * 7,
        "total": 2 * 5 * 6 * 7,
    }
    assert {name for name, _ in made["scalars"]} == {"SymInt32"}
    blocks = -(-2 * 5 * 6 * 7 // kernel.THREADS)
    sizes = {"grid_x": blocks, "grid_y": 1, "grid_z": 1, "block_x": kernel.THREADS, "block_y": 1, "block_z": 1}
    assert made["launch"] == {**sizes, "shared_mem": 0}
    # Volumes in either type, coordinates in FP32, the output as the volume.
    assert made["combinations"] == [["FLOAT", "FLOAT", "FLOAT"], ["HALF", "FLOAT", "HALF"]]
    assert made["formats"] == ["LINEAR"]
    # The kernel's own parameters stand in this order between the inputs and the output.
    source = kernel.SOURCE.read_text(encoding="utf-8")
    signature = source[source.index("__global__") :].split("{")[0]
    places = [signature.index(f"int {name}") for name in names]
    assert places == sorted(places)
    assert signature.index("coords") < places[0] and places[-1] < signature.index("out")
