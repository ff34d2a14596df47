"""What a graph of convolutions could take at best on this machine: by its operations and by its memory traffic."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnx
from onnx import shape_inference

SIZES = {"fp32": 4, "bf16": 2}


def best_s(work: Callable[[], object], runs: int = 5) -> float:
    """Least seconds of a call: what the machine can do."""
    seconds = []
    for _ in range(runs):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def machine() -> dict[str, float]:
    """GFLOP/s of a large matrix product in FP32 and BF16, and GB/s of a large copy (read and written)."""
    import torch

    found = {}
    for name, kind in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        a = torch.randn(3072, 3072).to(kind)
        found[name] = 2.0 * 3072**3 / best_s(lambda a=a: a @ a) / 1e9  # type: ignore[misc]
    source, target = torch.zeros(64_000_000), torch.zeros(64_000_000)
    found["GB/s"] = 2.0 * 4 * source.numel() / best_s(lambda: target.copy_(source)) / 1e9
    return found


def cost(model: onnx.ModelProto) -> tuple[float, int, int]:
    """Operations (two a multiply-add) of the convolutions; values that all nodes read and write; those of the graph.

    The last counts inputs, outputs and weights once: what must move however well the nodes are fused.
    """
    graph = shape_inference.infer_shapes(model).graph
    values = (*graph.input, *graph.output, *graph.value_info)
    sizes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in values}
    weights = {w.name: list(w.dims) for w in graph.initializer}
    sizes |= weights
    operations, moved = 0.0, 0
    for node in graph.node:
        moved += sum(int(np.prod(sizes[name])) for name in (*node.input, *node.output) if name in sizes)
        if node.op_type == "Conv":
            operations += 2.0 * np.prod(sizes[node.output[0]]) * np.prod(sizes[node.input[1]][1:])
        elif node.op_type == "ConvTranspose":
            operations += 2.0 * np.prod(sizes[node.input[0]]) * np.prod(sizes[node.input[1]][1:])
    ends = (*(v.name for v in (*graph.input, *graph.output)), *weights)
    return float(operations), moved, sum(int(np.prod(sizes[name])) for name in dict.fromkeys(ends))


def roofline(graphs: Mapping[str, Path], seconds: Mapping[str, float], limits: Mapping[str, float]) -> str:
    """A Markdown table; ``seconds`` by ``<graph> <precision>``."""
    lines = [
        f"Measured here: {limits['fp32']:.0f} GFLOP/s FP32, {limits['bf16']:.0f} BF16, {limits['GB/s']:.1f} GB/s.",
        "",
        "| graph | GFLOP | GB, node by node | GB, at least | s | s by operations | s by memory, at least | bound / s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, path in graphs.items():
        operations, moved, least = cost(onnx.load(str(path)))
        for precision, size in SIZES.items():
            taken = seconds[f"{name} {precision}"]
            by_operations, by_memory = operations / limits[precision] / 1e9, least * size / limits["GB/s"] / 1e9
            share = max(by_operations, by_memory) / taken
            cells = [f"{name} {precision}", f"{operations / 1e9:.1f}"]
            cells += [f"{moved * size / 1e9:.2f}", f"{least * size / 1e9:.2f}"]
            cells += [f"{taken:.2f}", f"{by_operations:.2f}", f"{by_memory:.3f}", f"{share:.0%}"]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
