"""Measures every exported graph against PyTorch, on a real brain, and judges it."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from jrs.bundle import ParityRecord, Precision
from jrs.export.graphs import code_names
from jrs.manifest import ModelSpec
from jrs.models.network import Codes, JointNet
from jrs.models.spatial import compose, displacement, warp
from jrs.reading import read_volume
from jrs.resources import atlas_path
from jrs.runtime.libraries import import_onnxruntime
from jrs.runtime.preprocess import network_input, place_grid
from jrs.volume import Volume

Arrays = dict[str, npt.NDArray[np.float32]]

# Per output: unit, measure, limit for FP32 graphs, for FP16 and for BF16 ones.
_LIMITS: dict[str, tuple[str, str, dict[Precision, float]]] = {
    "codes": ("relative", "maximum", {"fp32": 2e-3, "fp16": 0.25, "bf16": 1.0}),
    "probabilities": ("probability", "percentile_99", {"fp32": 1e-4, "fp16": 0.02, "bf16": 0.1}),
    "flow": ("relative", "maximum", {"fp32": 2e-3, "fp16": 0.25, "bf16": 1.0}),
    "moved": ("relative", "maximum", {"fp32": 1e-3, "fp16": 1e-3, "bf16": 1e-3}),
    "displacement": ("voxel", "maximum", {"fp32": 1e-3, "fp16": 1e-3, "bf16": 1e-3}),
    "field": ("voxel", "percentile_99", {"fp32": 0.002, "fp16": 0.05, "bf16": 0.2}),
    "labels": ("share", "maximum", {"fp32": 1e-3, "fp16": 0.005, "bf16": 0.02}),
}


def parity_images(spec: ModelSpec) -> tuple[Tensor, Tensor]:
    """A moving and a fixed image (1,C,X,Y,Z): the SRI24 brain, its contrast changed a channel, shifted and squeezed."""
    atlas = read_volume(atlas_path("sri24"))
    grid = place_grid(spec.grid, atlas)[0]
    top = float(np.percentile(atlas.data, 99.5))
    channels = {}
    for index, name in enumerate(spec.channels):
        curve = np.clip(atlas.data / top, 0, 1.2) ** (0.7 + 0.4 * index)
        # Every other channel shows fluid bright, as T2 does.
        shown = np.where((index % 2 == 1) & (atlas.data > 0.01 * top), 1.3 - curve, curve)
        channels[name] = Volume(shown.astype(np.float32), atlas.geometry)
    squeeze = np.diag([1.03, 0.97, 1.02, 1.0])
    squeeze[:3, 3] = grid.center - squeeze[:3, :3] @ grid.center + np.array([2.0, -3.0, 1.5])
    fixed = network_input(channels, spec, grid).tensor
    moving = network_input(channels, spec, grid, squeeze).tensor
    return torch.from_numpy(moving), torch.from_numpy(fixed)


def check_parity(
    net: JointNet, spec: ModelSpec, graphs: dict[str, onnx.ModelProto], precision: Precision
) -> dict[str, ParityRecord]:
    """Run each graph in ONNX Runtime and the network in PyTorch on the same images.

    Each graph is fed PyTorch's own inputs, so its error is its own; ``field`` and ``labels`` are the whole chain.
    """
    moving, fixed = parity_images(spec)
    records: dict[str, ParityRecord] = {}

    def record(name: str, key: str, got: npt.NDArray[np.float32], want: Tensor) -> None:
        unit, measure, limits = _LIMITS[key]
        error = np.abs(got.astype(np.float64) - want.double().numpy())
        if unit == "relative":
            error = error / max(float(want.std()), 1e-6)
        records[name] = ParityRecord(
            float(error.max()),
            float(np.percentile(error, 99)),
            unit,  # type: ignore[arg-type]
            limits[precision],
            measure,  # type: ignore[arg-type]
        )

    with torch.no_grad():
        codes = {"moving": net.encoder(moving), "fixed": net.encoder(fixed)}
    encode = GraphSession(graphs["encoder"])
    chain = {side: encode(image=image.numpy()) for side, image in (("moving", moving), ("fixed", fixed))}
    for index, name in enumerate(code_names()):
        record(name, "codes", chain["moving"][name], codes["moving"][index])
    if net.segmentation is not None:
        segment = GraphSession(graphs["segmentation"])
        with torch.no_grad():
            want = torch.softmax(net.segmentation(codes["moving"]), dim=1)
        record("probabilities", "probabilities", segment(**_named(codes["moving"]))["probabilities"], want)
        got = segment(**chain["moving"])["probabilities"]
        differs = float((got.argmax(axis=1) != want.numpy().argmax(axis=1)).mean())
        unit, _, limits = _LIMITS["labels"]
        records["labels"] = ParityRecord(differs, differs, unit, limits[precision])  # type: ignore[arg-type]
    if net.registration is not None:
        register, transform = GraphSession(graphs["registration"]), GraphSession(graphs["transformer"])
        with torch.no_grad():
            flow = net.flow(codes["moving"], codes["fixed"])
            coords = net.coordinates(flow)
            moved = warp(moving, coords)
        both = {**_named(codes["moving"], "moving_"), **_named(codes["fixed"], "fixed_")}
        record("flow", "flow", register(**both)["flow"], flow)
        alone = transform(image=moving.numpy(), flow=flow.numpy())
        record("moved", "moved", alone["moved"], moved)
        record("displacement", "displacement", alone["displacement"], displacement(coords))
        if "composer" in graphs:
            first = displacement(coords).numpy()
            done = GraphSession(graphs["composer"])(image=moving.numpy(), first=first, further=first)
            twice = compose(coords, coords)
            record("composed", "displacement", done["displacement"], displacement(twice))
            record("moved_composed", "moved", done["moved"], warp(moving, twice))
        both = {f"{side}_{name}": value for side in chain for name, value in chain[side].items()}
        field = transform(image=moving.numpy(), flow=register(**both)["flow"])["displacement"]
        record("field", "field", field, displacement(coords))
    return records


def _named(codes: Codes, prefix: str = "") -> Arrays:
    return dict(zip(code_names(prefix), (code.numpy() for code in codes), strict=True))


class GraphSession:
    """A graph in memory on the CPU; BF16, which ONNX Runtime has no convolutions for there, as rounded FP32."""

    def __init__(self, model: onnx.ModelProto) -> None:
        onnxruntime = import_onnxruntime()

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        # As many as PyTorch has been given, and none of them spinning: both share the machine with others.
        options.intra_op_num_threads = torch.get_num_threads()
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        if _has_bf16(model):
            # What is to be rounded must not be optimised away.
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
            model = rounded_bf16(model)
        self._session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        self._outputs = [output.name for output in self._session.get_outputs()]

    def __call__(self, **inputs: npt.NDArray[np.float32]) -> Arrays:
        """Run once."""
        return dict(zip(self._outputs, self._session.run(None, inputs), strict=True))


def _has_bf16(model: onnx.ModelProto) -> bool:
    return any(tensor.data_type == TensorProto.BFLOAT16 for tensor in model.graph.initializer)


def rounded_bf16(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same arithmetic in FP32, every BF16 value rounded to BF16 where it arises.

    That is what a device with BF16 storage and FP32 sums computes, up to the order of its sums.
    """
    inferred = onnx.shape_inference.infer_shapes(model)
    narrow = {v.name for v in inferred.graph.value_info if v.type.tensor_type.elem_type == TensorProto.BFLOAT16}
    out = onnx.ModelProto()
    out.CopyFrom(model)
    del out.graph.node[:], out.graph.value_info[:], out.graph.initializer[:]
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.BFLOAT16:
            array = numpy_helper.to_array(tensor).astype(np.float32)
            tensor = numpy_helper.from_array(array, tensor.name)
        out.graph.initializer.append(tensor)
    for node in model.graph.node:
        made = out.graph.node.add()
        made.CopyFrom(node)
        for index, name in enumerate(node.output):
            if name not in narrow:
                continue
            if node.op_type == "Cast":
                made.attribute[0].i = TensorProto.FLOAT
            made.output[index] = f"{name}_wide"
            rounded = helper.make_node("Cast", [f"{name}_wide"], [f"{name}_bf16"], to=TensorProto.BFLOAT16)
            back = helper.make_node("Cast", [f"{name}_bf16"], [name], to=TensorProto.FLOAT)
            out.graph.node.extend([rounded, back])
    return out
