"""The graphs of the iterative refinement: gradient ascent on local correlation, any size, any number of channels.

One graph is one level of ``jrs.runtime.refine``, which says what the parameters are and how levels follow each
other; the mathematics stand in ``docs/refinement.md``. The loop runs inside the graph.

Inputs: ``fixed``, ``moving`` (1,C,X,Y,Z); ``weights`` (1,1,X,Y,Z), zero where nothing may be compared;
``displacement`` (1,3,X,Y,Z), voxels; ``update_kernel``, ``field_kernel``, odd lengths: the Gaussians that smooth each
update and the whole field; ``step``, the longest update in voxels; ``iterations``, the most of them, at least one.
Outputs: ``refined``, the displacement improved; ``similarity`` (2,), the mean of squared local correlation before the
first and before the last iteration; ``done``, how many there were: it stops when the similarity falls twice in a
row. Every value is FP32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from jrs.export.custom_op import DOMAIN, OP_TYPE, add_function, model_of
from jrs.runtime.refine_level import FORCE_FLOOR, LEAST_WEIGHT, SMALLEST_VARIANCE, VARIANCE_FLOOR, WINDOW

_END = 2**62


class _Graph:
    """Nodes under construction: each call of ``op`` adds one and gives the name of its output."""

    def __init__(self, prefix: str, constants: list[onnx.TensorProto]) -> None:
        self.prefix, self.nodes, self.constants = prefix, list[onnx.NodeProto](), constants

    def constant(self, value: npt.ArrayLike, kind: npt.DTypeLike = np.float32) -> str:
        """An initialiser, shared by all places that need the same."""
        tensor = numpy_helper.from_array(np.asarray(value, dtype=kind))
        for known in self.constants:
            if (known.data_type, known.dims, known.raw_data) == (tensor.data_type, tensor.dims, tensor.raw_data):
                return known.name
        tensor.name = f"constant{len(self.constants)}"
        self.constants.append(tensor)
        return tensor.name

    def op(self, kind: str, *inputs: str | float, output: str = "", **attributes: Any) -> str:
        """One node; a number among the inputs is a constant, "" an input left out."""
        output = output or f"{self.prefix}{len(self.nodes)}"
        names = [value if isinstance(value, str) else self.constant(value) for value in inputs]
        self.nodes.append(helper.make_node(kind, names, [output], name=output, **attributes))
        return output

    def ints(self, *values: int) -> str:
        """A list of integers as a constant."""
        return self.constant(values, np.int64)

    def part(self, x: str, axis: int, start: int, stop: int = _END) -> str:
        """``x[..., start:stop, ...]`` along ``axis``."""
        return self.op("Slice", x, self.ints(start), self.ints(stop), self.ints(axis))

    def parts(self, x: str, count: int) -> list[str]:
        """Channels (axis 1) one by one."""
        return [self.part(x, 1, index, index + 1) for index in range(count)]

    def total(self, terms: Sequence[str]) -> str:
        """Sum of several."""
        result = terms[0]
        for term in terms[1:]:
            result = self.op("Add", result, term)
        return result

    def swapped(self, x: str) -> str:
        """First and second axis exchanged: modalities become a batch, whose size no kernel has to know."""
        return self.op("Transpose", x, perm=[1, 0, 2, 3, 4])

    def box(self, x: str, channels: int) -> str:
        """Mean over the window, zeros outside."""
        for axis in range(3):
            sides = [WINDOW if a == axis else 1 for a in range(3)]
            pads = [side // 2 for side in sides]
            kernel = self.constant(np.full((channels, 1, *sides), 1.0 / WINDOW))
            x = self.op("Conv", x, kernel, group=channels, kernel_shape=sides, pads=pads * 2)
        return x

    def convolved(self, x: str, kernels: Sequence[str], pads: Sequence[str]) -> str:
        """Convolve (N,1,X,Y,Z) along each axis with a kernel that the caller gives, the border repeated."""
        for axis in range(3):
            x = self.op("Conv", self.op("Pad", x, pads[axis], mode="edge"), kernels[axis])
        return x

    def differences(self, x: str, axis: int) -> str:
        """``x[i+1] - x[i-1]`` along a spatial axis, the border repeated."""
        pads = [0] * 10
        pads[2 + axis] = pads[7 + axis] = 1
        padded = self.op("Pad", x, self.ints(*pads), mode="edge")
        return self.op("Sub", self.part(padded, 2 + axis, 2), self.part(padded, 2 + axis, 0, -2))

    def indices(self, shape: str) -> str:
        """Voxel indices (1,3,X,Y,Z) of a grid of ``shape`` (3,)."""
        axes = []
        for axis in range(3):
            length = self.op("Squeeze", self.part(shape, 0, axis, axis + 1), self.ints(0))
            along = self.op("Range", self.constant(0, np.int64), length, self.constant(1, np.int64))
            lying = self.op("Reshape", self.op("Cast", along, to=TensorProto.FLOAT), self._line(axis))
            axes.append(self.op("Expand", lying, self.op("Concat", self.ints(1, 1), shape, axis=0)))
        return self.op("Concat", *axes, axis=1)

    def _line(self, axis: int) -> str:
        return self.ints(*(-1 if a == axis + 2 else 1 for a in range(5)))


def refinement_model() -> onnx.ModelProto:
    """The graph of one level; the sizes of images and kernels are free."""
    constants: list[onnx.TensorProto] = []
    outer, body = _Graph("level", constants), _Graph("iteration", constants)
    _fixed_side(outer)
    _loop_body(body)
    flags = [("iteration_number", TensorProto.INT64), ("go_on", TensorProto.BOOL)]
    carried = [("u", [1, 3, None, None, None]), ("first", []), ("last", []), ("count", []), ("falls", [])]
    inputs = [helper.make_tensor_value_info(name, kind, []) for name, kind in flags]
    inputs += [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in carried]
    outputs = [helper.make_tensor_value_info("still", TensorProto.BOOL, [])]
    outputs += [helper.make_tensor_value_info(f"new_{name}", TensorProto.FLOAT, shape) for name, shape in carried]
    loop = helper.make_graph(body.nodes, "iteration", inputs, outputs)
    start = [outer.constant(True, np.bool_), "displacement", *[outer.constant(0.0)] * 4]
    results = ["refined", "first_similarity", "last_similarity", "done", "last_falls"]
    # No trip count: its type would be the one input that is not FP32.
    outer.nodes.append(helper.make_node("Loop", ["", *start], results, name="loop", body=loop))
    return _finished(outer)


def _finished(outer: _Graph) -> onnx.ModelProto:
    ends = [outer.op("Unsqueeze", name, outer.ints(0)) for name in ("first_similarity", "last_similarity")]
    outer.op("Concat", *ends, axis=0, output="similarity")
    grid = ["X", "Y", "Z"]
    shapes: dict[str, list[int | str]] = {
        "fixed": [1, "C", *grid],
        "moving": [1, "C", *grid],
        "weights": [1, 1, *grid],
        "displacement": [1, 3, *grid],
        "update_kernel": ["K"],
        "field_kernel": ["L"],
        "step": [],
        "iterations": [],
    }
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()]
    outputs = [
        helper.make_tensor_value_info("refined", TensorProto.FLOAT, [1, 3, *grid]),
        helper.make_tensor_value_info("similarity", TensorProto.FLOAT, [2]),
        helper.make_tensor_value_info("done", TensorProto.FLOAT, []),
    ]
    graph = helper.make_graph(outer.nodes, "refinement", inputs, outputs, outer.constants)
    model = model_of(graph)
    add_function(model)
    onnx.checker.check_model(model, full_check=True)
    return model


def _fixed_side(graph: _Graph) -> None:
    """What does not change from iteration to iteration, under names that the loop's body uses."""
    graph.op("Transpose", "fixed", perm=[1, 0, 2, 3, 4], output="f")
    amount = graph.box("weights", 1)
    enough = graph.op("Greater", amount, LEAST_WEIGHT)
    inverse = graph.op("Reciprocal", graph.op("Max", amount, LEAST_WEIGHT))
    graph.op("Where", enough, inverse, 0.0, output="inverse_amount")
    weighted = graph.op("Mul", "weights", "f")
    means = graph.op("Concat", weighted, graph.op("Mul", weighted, "f"), axis=1)
    mean, square = graph.parts(graph.op("Mul", graph.box(means, 2), "inverse_amount"), 2)
    graph.op("Identity", mean, output="f_mean")
    floored = graph.op("Add", _variance(graph, mean, square), VARIANCE_FLOOR)
    graph.op("Reciprocal", floored, output="f_precision")
    windows = graph.op("ReduceSum", graph.op("Cast", enough, to=TensorProto.FLOAT), keepdims=0)
    channels = graph.op("Cast", graph.op("Squeeze", graph.op("Shape", "fixed", start=1, end=2)), to=TensorProto.FLOAT)
    graph.op("Max", graph.op("Mul", windows, channels), 1.0, output="windows")
    graph.op("Identity", graph.indices(graph.op("Shape", "fixed", start=2, end=5)), output="image_indices")
    for name in ("update", "field"):
        size = graph.op("Shape", f"{name}_kernel")
        radius = graph.op("Div", size, graph.ints(2))
        none, lead = graph.ints(0), graph.ints(0, 0)
        for axis in range(3):
            sides = [size if a == axis else graph.ints(1) for a in range(3)]
            line = graph.op("Concat", graph.ints(1, 1), *sides, axis=0)
            graph.op("Reshape", f"{name}_kernel", line, output=f"{name}_kernel{axis}")
            side = [radius if a == axis else none for a in range(3)]
            graph.op("Concat", lead, *side, lead, *side, axis=0, output=f"{name}_pads{axis}")


def _variance(graph: _Graph, mean: str, square: str) -> str:
    return graph.op("Relu", graph.op("Sub", square, graph.op("Mul", mean, mean)))


def _loop_body(graph: _Graph) -> None:
    """One iteration: u to new_u, with the similarity of u."""
    m = graph.swapped(graph.op(OP_TYPE, "moving", graph.op("Add", "u", "image_indices"), domain=DOMAIN))
    similarity, slope = _correlation(graph, m)
    along = [graph.op("Mul", slope, graph.differences(m, axis)) for axis in range(3)]
    forces = [graph.op("ReduceSum", force, graph.ints(0)) for force in along]
    # The three components are a batch, so that one kernel serves them.
    update = graph.convolved(graph.op("Concat", *forces, axis=0), *_kernels("update"))
    square = graph.op("ReduceSum", graph.op("Mul", update, update), graph.ints(0))
    longest = graph.op("Sqrt", graph.op("ReduceMax", square, keepdims=0))
    scale = graph.op("Div", "step", graph.op("Max", longest, FORCE_FLOOR))
    d = graph.op("Mul", update, scale)
    graph.op("Identity", _composed(graph, d), output="new_u")
    _bookkeeping(graph, similarity)


def _kernels(name: str) -> tuple[list[str], list[str]]:
    return [f"{name}_kernel{axis}" for axis in range(3)], [f"{name}_pads{axis}" for axis in range(3)]


def _correlation(graph: _Graph, m: str) -> tuple[str, str]:
    """Mean squared local correlation of f and m, and its derivative by m up to a factor, (C,1,X,Y,Z)."""
    weighted = graph.op("Mul", "weights", m)
    means = graph.op("Concat", weighted, graph.op("Mul", weighted, m), graph.op("Mul", weighted, "f"), axis=1)
    mean, square, product = graph.parts(graph.op("Mul", graph.box(means, 3), "inverse_amount"), 3)
    variance = _variance(graph, mean, square)
    covariance = graph.op("Sub", product, graph.op("Mul", mean, "f_mean"))
    floored = graph.op("Add", variance, VARIANCE_FLOOR)
    ratio = graph.op("Div", graph.op("Mul", covariance, "f_precision"), floored)
    total = graph.op("ReduceSum", graph.op("Mul", ratio, covariance), keepdims=0)
    a = graph.op("Mul", ratio, "inverse_amount")
    # The floors are weights of the windows, not parts of what is differentiated: they would ask for contrast.
    b = graph.op("Mul", a, graph.op("Div", covariance, graph.op("Max", variance, SMALLEST_VARIANCE)))
    c = graph.op("Sub", graph.op("Mul", a, "f_mean"), graph.op("Mul", b, mean))
    a, b, c = graph.parts(graph.box(graph.op("Concat", a, b, c, axis=1), 3), 3)
    slope = graph.op("Sub", graph.op("Sub", graph.op("Mul", "f", a), graph.op("Mul", m, b)), c)
    return graph.op("Div", total, "windows"), graph.op("Mul", slope, "weights")


def _composed(graph: _Graph, d: str) -> str:
    """d + u(x + d), to first order in d, smoothed: (1,3,X,Y,Z)."""
    u = graph.swapped("u")
    terms = [u, d]
    for axis, component in enumerate(graph.parts(graph.op("Mul", graph.swapped(d), 0.5), 3)):
        terms.append(graph.op("Mul", component, graph.differences(u, axis)))
    return graph.swapped(graph.convolved(graph.total(terms), *_kernels("field")))


def _bookkeeping(graph: _Graph, similarity: str) -> None:
    begun = graph.op("Greater", "count", 0.5)
    graph.op("Where", begun, "first", similarity, output="new_first")
    graph.op("Identity", similarity, output="new_last")
    graph.op("Add", "count", 1.0, output="new_count")
    fell = graph.op("And", begun, graph.op("Less", similarity, "last"))
    graph.op("Where", fell, graph.op("Add", "falls", 1.0), 0.0, output="new_falls")
    # One fall may be the field's smoothing, as it begins to work on a rough start.
    rising = graph.op("Less", "new_falls", 1.5)
    graph.op("And", graph.op("Less", "new_count", "iterations"), rising, output="still")
