"""The custom operator ``ai.jrs::JrsGridSample3D``, version 1, in ONNX.

Inputs ``X`` (N,C,D,H,W) and ``coords`` (N,3,D',H',W'), float32 absolute voxel indices, channel i along array
axis i; output (N,C,D',H',W'). Trilinear, the nearest border voxel outside, corners aligned. One file serves
every backend because the operator carries a body of standard operators: a backend with a kernel of its own
takes that, every other one runs the body.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

DOMAIN = "ai.jrs"
OP_TYPE = "JrsGridSample3D"
VERSION = 1
OPSET = 20
"""The first opset whose GridSample takes volumes."""
BF16_OPSET = 22
"""The first opset whose convolutions take BF16."""
IR_VERSION = 10
PLUGIN_ATTRIBUTES: dict[str, str | int] = {"plugin_namespace": "jrs", "plugin_version": "1", "aot": 1}
"""By these TensorRT finds a plugin for the node; where there is none, it takes the body."""

_BODY = """
<opset_import: ["" : 20], domain: "ai.jrs">
JrsGridSample3D (X, coords) => (Y)
{
    shape = Shape <start = 2, end = 5> (X)
    extent = Cast <to = 1> (shape)
    one = Constant <value = float {1.0}> ()
    two = Constant <value = float {2.0}> ()
    last = Sub (extent, one)
    span = Max (last, one)
    scale = Div (two, span)
    channel_first = Constant <value_ints = [1, 3, 1, 1, 1]> ()
    factors = Reshape (scale, channel_first)
    scaled = Mul (coords, factors)
    centred = Sub (scaled, one)
    last_axis_first = Constant <value_ints = [2, 1, 0]> ()
    reversed = Gather <axis = 1> (centred, last_axis_first)
    grid = Transpose <perm = [0, 2, 3, 4, 1]> (reversed)
    Y = GridSample <mode = "linear", padding_mode = "border", align_corners = 1> (X, grid)
}
"""


def register_schema() -> None:
    """Tell this process's onnx about the operator, which tracing needs; files do not depend on it."""
    if onnx.defs.has(OP_TYPE, DOMAIN):
        return
    parameter = onnx.defs.OpSchema.FormalParameter
    kinds = {str: onnx.defs.OpSchema.AttrType.STRING, int: onnx.defs.OpSchema.AttrType.INT}
    onnx.defs.register_schema(
        onnx.defs.OpSchema(
            OP_TYPE,
            DOMAIN,
            VERSION,
            doc="Trilinear sampling of X (N,C,D,H,W) at voxel indices coords (N,3,D',H',W'), border values outside.",
            inputs=[parameter("X", "tensor(float)"), parameter("coords", "tensor(float)")],
            outputs=[parameter("Y", "tensor(float)")],
            attributes=[
                onnx.defs.OpSchema.Attribute(name, kinds[type(value)], "For TensorRT's plugins.", required=False)
                for name, value in PLUGIN_ATTRIBUTES.items()
            ],
        )
    )


def function_body() -> onnx.FunctionProto:
    """The operator's body: normalise, reverse the axes, GridSample."""
    return onnx.parser.parse_function(_BODY)


def add_function(model: onnx.ModelProto) -> None:
    """Give ``model`` the operator's body and its domain, once, and its nodes what TensorRT looks for."""
    for node in _nodes(model.graph):
        if node.domain == DOMAIN and node.op_type == OP_TYPE:
            present = {attribute.name for attribute in node.attribute}
            node.attribute.extend(
                helper.make_attribute(name, value) for name, value in PLUGIN_ATTRIBUTES.items() if name not in present
            )
    if not any(f.domain == DOMAIN and f.name == OP_TYPE for f in model.functions):
        model.functions.append(function_body())
    if not any(o.domain == DOMAIN for o in model.opset_import):
        model.opset_import.append(helper.make_opsetid(DOMAIN, VERSION))


def _nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """Every node, those inside loops and branches included."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from _nodes(attribute.g)


def model_of(graph: onnx.GraphProto) -> onnx.ModelProto:
    """A graph that was not traced, as a model."""
    opsets = [helper.make_opsetid("", OPSET)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="jrs")


def sampler_model() -> onnx.ModelProto:
    """A graph of this one operator with free sizes: how the runtime resamples every image."""
    volume = helper.make_tensor_value_info("volume", TensorProto.FLOAT, [1, "C", "D", "H", "W"])
    coords = helper.make_tensor_value_info("coords", TensorProto.FLOAT, [1, 3, "x", "y", "z"])
    sampled = helper.make_tensor_value_info("sampled", TensorProto.FLOAT, [1, "C", "x", "y", "z"])
    node = helper.make_node(OP_TYPE, ["volume", "coords"], ["sampled"], name="sample", domain=DOMAIN)
    graph = helper.make_graph([node], "sampler", [volume, coords], [sampled])
    model = model_of(graph)
    add_function(model)
    onnx.checker.check_model(model)
    return model


def probe_models() -> dict[str, onnx.ModelProto]:
    """Two small graphs of fixed sizes by which ``jrs doctor`` tries a backend: a convolution and the sampler.

    ``convolution``: image (1,2,8,8,8) to code, ReLU of the mean over 3x3x3 of channel 0 less channel 1 itself.
    """

    def value(name: str, channels: int) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, channels, 8, 8, 8])

    weight = np.zeros((1, 2, 3, 3, 3), dtype=np.float32)
    weight[0, 0], weight[0, 1, 1, 1, 1] = 1.0 / 27.0, -1.0
    convolution = helper.make_graph(
        [
            helper.make_node("Conv", ["image", "weight"], ["filtered"], kernel_shape=[3, 3, 3], pads=[1] * 6),
            helper.make_node("Relu", ["filtered"], ["code"]),
        ],
        "convolution",
        [value("image", 2)],
        [value("code", 1)],
        [numpy_helper.from_array(weight, "weight")],
    )
    node = helper.make_node(OP_TYPE, ["image", "coords"], ["moved"], name="sample", domain=DOMAIN)
    sampler = helper.make_graph([node], "sampler", [value("image", 2), value("coords", 3)], [value("moved", 2)])
    models = {graph.name: model_of(graph) for graph in (convolution, sampler)}
    add_function(models["sampler"])
    return models
