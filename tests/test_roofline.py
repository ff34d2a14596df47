"""The speed benchmark's count of operations and traffic against a count by hand."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest

FILE = Path(__file__).resolve().parent.parent / "benchmarks" / "roofline.py"


@pytest.fixture
def benchmark() -> Any:
    pytest.importorskip("onnx")
    if not FILE.exists():
        pytest.skip("the benchmarks are not in the source distribution")
    spec = importlib.util.spec_from_file_location("roofline", FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_operations_and_traffic_of_two_convolutions(benchmark: Any) -> None:
    from onnx import TensorProto, helper, numpy_helper

    def value(name: str, shape: list[int]) -> Any:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)

    down, up = np.zeros((5, 3, 2, 2, 2), dtype=np.float32), np.zeros((5, 4, 2, 2, 2), dtype=np.float32)
    nodes = [
        helper.make_node("Conv", ["x", "down"], ["small"], kernel_shape=[2, 2, 2], strides=[2, 2, 2]),
        helper.make_node("ConvTranspose", ["small", "up"], ["y"], kernel_shape=[2, 2, 2], strides=[2, 2, 2]),
    ]
    weights = [numpy_helper.from_array(down, "down"), numpy_helper.from_array(up, "up")]
    graph = helper.make_graph(nodes, "g", [value("x", [1, 3, 4, 6, 8])], [value("y", [1, 4, 4, 6, 8])], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])
    operations, moved, least = benchmark.cost(model)
    voxels = 2 * 3 * 4  # of the coarse grid
    assert operations == 2 * (voxels * 5 * 3 * 8) + 2 * (voxels * 5 * 4 * 8)
    x, y, small = 3 * 192, 4 * 192, 5 * voxels
    assert moved == x + 120 + small + small + 160 + y
    assert least == x + y + 120 + 160


def test_the_table_names_the_larger_bound(benchmark: Any, tmp_path: Path) -> None:
    import onnx
    from onnx import TensorProto, helper

    shape = [1, 1, 100, 100, 100]
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, shape) for n in "xy"]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", ends[:1], ends[1:])
    onnx.save(helper.make_model(graph), tmp_path / "g.onnx")
    limits = {"fp32": 100.0, "bf16": 200.0, "GB/s": 8.0}
    text = benchmark.roofline({"g": tmp_path / "g.onnx"}, {"g fp32": 0.002, "g bf16": 0.001}, limits)
    # 8 MB at 8 GB/s is 1 ms.
    assert "| g fp32 | 0.0 | 0.01 | 0.01 | 0.00 | 0.00 | 0.001 | 50% |" in text
