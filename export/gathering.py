"""A body of the sampling operator without GridSample, for libraries whose GridSample takes no volumes.

The eight voxels around a point are gathered one by one and mixed by linear interpolation along each axis in turn. It
moves more memory than a kernel does, and everything stays on the device.
"""

from __future__ import annotations

import onnx

from jrs.export.custom_op import DOMAIN, OPSET, sampler_model

_START = f"""
<opset_import: ["" : {OPSET}], domain: "{DOMAIN}">
JrsGridSample3D (gathered_volume, gathered_coords) => (gathered)
{{
    nought = Constant <value = float {{0.0}}> ()
    one = Constant <value = int32 {{1}}> ()
    axis_0 = Constant <value = int64 {{0}}> ()
    axis_1 = Constant <value = int64 {{1}}> ()
    axis_2 = Constant <value = int64 {{2}}> ()
    as_list = Constant <value_ints = [-1]> ()
    as_column = Constant <value_ints = [-1, 1]> ()
    by_rows = Constant <value_ints = [3, -1]> ()

    images = Shape <start = 0, end = 1> (gathered_volume)
    channels = Shape <start = 1, end = 2> (gathered_volume)
    extent = Shape <start = 2, end = 5> (gathered_volume)
    target = Shape <start = 2, end = 5> (gathered_coords)
    sizes = Cast <to = 6> (extent)
    depth = Gather <axis = 0> (sizes, axis_0)
    height = Gather <axis = 0> (sizes, axis_1)
    width = Gather <axis = 0> (sizes, axis_2)

    axis_first = Transpose <perm = [1, 0, 2, 3, 4]> (gathered_coords)
    points = Reshape (axis_first, by_rows)
    ends = Sub (sizes, one)
    end_column = Reshape (ends, as_column)
    last = Cast <to = 1> (end_column)
    positive = Greater (points, nought)
    known = Where (positive, points, nought)
    inside = Min (known, last)
    floor = Floor (inside)
    weights = Sub (inside, floor)
    low = Cast <to = 6> (floor)
    beyond = Add (low, one)
    high = Min (beyond, end_column)

    channel_first = Transpose <perm = [1, 0, 2, 3, 4]> (gathered_volume)
    by_channel = Concat <axis = 0> (channels, as_list)
    voxels = Reshape (channel_first, by_channel)
    count = Squeeze (images)
    numbers = Range (axis_0, count, axis_1)
    numbers_32 = Cast <to = 6> (numbers)
    numbered = Reshape (numbers_32, as_column)
    planes_before = Mul (numbered, depth)
    by_image = Concat <axis = 0> (images, as_list)
"""
"""Points (3, N*P) clamped to the volume, NaN to 0, with the voxel below, the one above and the weight between them.

TensorRT 10.6 takes a tensor of the graph for an input of the same name: these occur in none."""

_END = """
    by_axis = Concat <axis = 0> (channels, images, target)
    shaped = Reshape (mixed, by_axis)
    gathered = Transpose <perm = [1, 0, 2, 3, 4]> (shaped)
}
"""


def _mix(result: str, low: str, high: str, axis: int) -> list[str]:
    return [
        f"{result}_step = Sub ({high}, {low})",
        f"{result}_part = Mul ({result}_step, weight_{axis})",
        f"{result} = Add ({low}, {result}_part)",
    ]


def gathering_body() -> onnx.FunctionProto:
    """The operator's body by Gather; indices are int32, so the volume may hold up to 2^31 voxels over all images."""
    lines = []
    for axis in range(3):
        lines.append(f"weight_{axis} = Gather <axis = 0> (weights, axis_{axis})")
        lines += [f"{side}_{axis} = Gather <axis = 0> ({side}, axis_{axis})" for side in ("low", "high")]
    for z in ("low", "high"):
        lines += [
            f"{z}_plane_of_image = Reshape ({z}_0, by_image)",
            f"{z}_planes = Add ({z}_plane_of_image, planes_before)",
            f"{z}_plane = Reshape ({z}_planes, as_list)",
            f"{z}_plane_rows = Mul ({z}_plane, height)",
        ]
        for y in ("low", "high"):
            row = f"{z}_{y}"
            lines += [f"{row}_row = Add ({z}_plane_rows, {y}_1)", f"{row}_start = Mul ({row}_row, width)"]
            for x in ("low", "high"):
                lines += [
                    f"{row}_{x}_index = Add ({row}_start, {x}_2)",
                    f"{row}_{x}_value = Gather <axis = 1> (voxels, {row}_{x}_index)",
                ]
            lines += _mix(f"{row}_value", f"{row}_low_value", f"{row}_high_value", 2)
        lines += _mix(f"{z}_value", f"{z}_low_value", f"{z}_high_value", 1)
    lines += _mix("mixed", "low_value", "high_value", 0)
    return onnx.parser.parse_function(_START + "\n".join(lines) + _END)


def gathering_model() -> onnx.ModelProto:
    """The operator alone with this body, as ``sampler_model`` has it with the other: what ships with jrs."""
    model = sampler_model()
    del model.functions[:]
    model.functions.append(gathering_body())
    onnx.checker.check_model(model)
    return model
