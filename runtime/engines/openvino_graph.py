"""What is changed in a graph before OpenVINO compiles it: how means are taken, and how codes lie in memory."""

from __future__ import annotations

import numpy as np
import openvino
from openvino import opset13 as ops

from jrs.runtime.engines.base import is_code

LARGEST_BLOCK, SMALLEST_BLOCK = 8, 4
_TO_FIRST, _TO_LAST = [0, 4, 1, 2, 3], [0, 2, 3, 4, 1]


def average_in_blocks(model: openvino.Model) -> None:
    """Take the means of norms (``TwoStageNorm``) over blocks of up to 8x8x8 voxels first.

    OpenVINO puts two means in a row together, into one running FP32 sum over a volume: 0.1 to 0.6 % off at
    144x208x144, with blocks a millionth. With eight channels it is also eight times faster.
    """
    for node in model.get_ordered_ops():
        if node.get_type_name() != "ReduceMean" or node.input_value(1).get_node().get_type_name() != "Constant":
            continue
        source, shape = node.input_value(0), node.input_value(0).get_partial_shape()
        axes = sorted(np.atleast_1d(node.input_value(1).get_node().get_data()).tolist())
        if shape.rank.is_dynamic or shape.rank.get_length() != 5 or shape.is_dynamic or axes not in ([3, 4], [-2, -1]):
            continue
        following = [target.get_node().get_type_name() for target in node.output(0).get_target_inputs()]
        if following != ["ReduceMean"]:  # the means of the planes are wanted themselves
            continue
        side = int(np.gcd.reduce([*shape.to_shape()[2:], LARGEST_BLOCK]))
        if side >= SMALLEST_BLOCK:  # else there are few
            pooled = ops.avg_pool(source, [side] * 3, [0] * 3, [0] * 3, [side] * 3, True)
            node.input(0).replace_source_output(pooled.output(0))
    model.validate_nodes_and_infer_types()


def codes_last(model: openvino.Model, dtype: openvino.Type) -> openvino.Model:
    """The same graph with its codes, at either end, (N,X,Y,Z,C) and of ``dtype``: the convolutions' own layout."""
    results = []
    for result in model.get_results():
        value = result.input_value(0)
        if is_code(value.get_any_name()):
            names = value.get_names()
            last = ops.convert(ops.transpose(value, _order(_TO_LAST)), dtype)
            value.set_names(set())
            last.output(0).set_names(names)
            result = ops.result(last)
        results.append(result)
    inputs = {p.get_friendly_name(): p for p in model.get_parameters() if is_code(p.output(0).get_any_name())}
    new = {name: _laid_out(parameter, dtype) for name, parameter in inputs.items()}
    for name, parameter in inputs.items():
        for target in parameter.output(0).get_target_inputs():
            node = target.get_node()
            sources = [node.input_value(i).get_node().get_friendly_name() for i in range(node.get_input_size())]
            if node.get_type_name() in ("Add", "Subtract") and all(source in new for source in sources):
                # Merge first and turn then: turned before, every operand would be copied.
                if name == sources[0]:
                    _merge(node, *(new[source] for source in sources))
            else:
                target.replace_source_output(_first(new[name]).output(0))
    parameters = [new.get(p.get_friendly_name(), p) for p in model.get_parameters()]
    return openvino.Model(results, parameters, model.get_friendly_name())


def _laid_out(parameter: openvino.Node, dtype: openvino.Type) -> openvino.Node:
    n, channels, *sides = parameter.get_partial_shape().to_shape()
    made = ops.parameter([n, *sides, channels], dtype, name=parameter.get_friendly_name())
    made.output(0).set_names(parameter.output(0).get_names())
    return made


def _merge(node: openvino.Node, a: openvino.Node, b: openvino.Node) -> None:
    made = getattr(ops, node.get_type_name().lower())(*(ops.convert(x, openvino.Type.f32) for x in (a, b)))
    for target in node.output(0).get_target_inputs():
        target.replace_source_output(_first(made).output(0))


def _first(value: openvino.Node) -> openvino.Node:
    return ops.transpose(ops.convert(value, openvino.Type.f32), _order(_TO_FIRST))


def _order(axes: list[int]) -> openvino.Node:
    return ops.constant(np.array(axes, dtype=np.int64))
