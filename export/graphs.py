"""From PyTorch modules to the single-file ONNX graphs of a bundle."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import onnx
import torch
from onnxscript import values
from torch import Tensor, nn

from jrs.architecture import LEVELS
from jrs.bundle import Precision
from jrs.export.custom_op import BF16_OPSET, DOMAIN, OP_TYPE, OPSET, VERSION, add_function, register_schema
from jrs.manifest import ModelSpec
from jrs.models.network import Codes, Decoder, InstanceNorm, JointNet
from jrs.models.spatial import compose, coordinates, displacement, warp

_CONVOLUTION_TYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class EncoderGraph(nn.Module):
    """image (1,C,X,Y,Z) to code1..code5, FP32 at both ends."""

    def __init__(self, net: JointNet, precision: Precision) -> None:
        super().__init__()
        self.encoder = copy.deepcopy(net.encoder)
        self.dtype = _convolve_in(self.encoder, precision)

    def forward(self, image: Tensor) -> Codes:
        """Run the encoder in its precision."""
        return tuple(code.float() for code in self.encoder(image.to(self.dtype)))


class SegmentationGraph(nn.Module):
    """code1..code5 to probabilities (1,K,X,Y,Z), the softmax in FP32."""

    def __init__(self, net: JointNet, precision: Precision) -> None:
        super().__init__()
        assert net.segmentation is not None
        self.decoder = copy.deepcopy(net.segmentation)
        self.dtype = _convolve_in(self.decoder, precision)

    def forward(self, *codes: Tensor) -> Tensor:
        """Run the decoder in its precision."""
        return torch.softmax(self.decoder(tuple(code.to(self.dtype) for code in codes)), dim=1)


class RegistrationGraph(nn.Module):
    """moving_code1..5 and fixed_code1..5 to the head's raw channels (1,3,X,Y,Z), merged in FP32."""

    def __init__(self, net: JointNet, precision: Precision) -> None:
        super().__init__()
        assert net.registration is not None
        self.decoder = copy.deepcopy(net.registration)
        self.dtype = _convolve_in(self.decoder, precision)
        # The function alone, not the network with all its weights.
        self.merge = net.merge

    def forward(self, *codes: Tensor) -> Tensor:
        """Merge, then run the decoder in its precision."""
        merged = self.merge(codes[:LEVELS], codes[LEVELS:])
        flow: Tensor = self.decoder(tuple(code.to(self.dtype) for code in merged))
        return flow


class TransformerGraph(nn.Module):
    """image and flow to moved (1,C,X,Y,Z) and displacement (1,3,X,Y,Z) in voxels; always FP32."""

    def __init__(self, net: JointNet) -> None:
        super().__init__()
        self.coordinates = net.coordinates

    def forward(self, image: Tensor, flow: Tensor) -> tuple[Tensor, Tensor]:
        """Head, integration, sampling."""
        coords = self.coordinates(flow)
        return warp(image, coords), displacement(coords)


class ComposerGraph(nn.Module):
    """image, displacement and a further pass's displacement to moved and both displacements in one; FP32, voxels."""

    def forward(self, image: Tensor, first: Tensor, further: Tensor) -> tuple[Tensor, Tensor]:
        """The image moved by u(x) = v(x) + w(x + v(x)), w the first and v the further one, and u."""
        coords = compose(*(coordinates(field, "displacement") for field in (first, further)))
        return warp(image, coords), displacement(coords)


class TwoStageNorm(nn.Module):
    """Instance normalisation written out, its means taken plane by plane and then over planes.

    Backends add up a whole volume in one FP32 running sum, which errs by up to half a percent; two short sums
    err by a millionth and take the same time.
    """

    def __init__(self, norm: InstanceNorm) -> None:
        super().__init__()
        assert norm.weight is not None and norm.bias is not None
        shape = (1, -1, 1, 1, 1)
        self.weight, self.bias, self.eps = norm.weight.view(shape), norm.bias.view(shape), norm.eps

    def forward(self, x: Tensor) -> Tensor:
        """(1,C,X,Y,Z), same shape and type, computed in FP32."""
        wide = x.float()
        centred = wide - _mean(wide)
        scale = self.weight * torch.rsqrt(_mean(centred.square()) + self.eps)
        return (centred * scale + self.bias).to(x.dtype)


class WideUp(nn.ConvTranspose3d):
    """A transposed convolution in FP32 between BF16 layers: TensorRT-RTX has none in BF16."""

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        """(N,C,X,Y,Z) to (N,K,2X,2Y,2Z), the type kept."""
        return super().forward(x.float(), output_size).to(x.dtype)


def _mean(x: Tensor) -> Tensor:
    return x.mean((3, 4), keepdim=True).mean(2, keepdim=True)


def _with_two_stage_norms(module: nn.Module) -> nn.Module:
    for name, child in module.named_children():
        if isinstance(child, InstanceNorm):
            setattr(module, name, TwoStageNorm(child))
        else:
            _with_two_stage_norms(child)
    return module


def _convolve_in(module: nn.Module, precision: Precision) -> torch.dtype:
    """Ready a module for tracing: convolutions in their precision, norms written out.

    Norms and a decoder's last convolution stay FP32, with BF16 the transposed ones as well.
    Returns the type the module takes.
    """
    _with_two_stage_norms(module)
    if precision == "fp32":
        return torch.float32
    dtype = _CONVOLUTION_TYPES[precision]
    kept: list[nn.Module] = []
    if isinstance(module, Decoder):
        kept.append(module.output)
        if precision == "bf16":
            kept.extend(module.ups)
            for up in module.ups:
                up.__class__ = WideUp  # the same weights under the same names
    for part in module.modules():
        if isinstance(part, (nn.Conv3d, nn.ConvTranspose3d)) and part not in kept:
            part.to(dtype)
    return dtype


def code_names(prefix: str = "") -> list[str]:
    """``code1`` .. ``code5`` with a prefix."""
    return [f"{prefix}code{level + 1}" for level in range(LEVELS)]


def example_codes(spec: ModelSpec) -> list[Tensor]:
    """Zero codes of the right shapes, for tracing."""
    x, y, z = spec.grid.shape
    return [
        torch.zeros(1, width, x >> level, y >> level, z >> level)
        for level, width in enumerate(spec.architecture.widths)
    ]


def build_graphs(net: JointNet, spec: ModelSpec, precision: Precision) -> dict[str, onnx.ModelProto]:
    """Trace every graph that the architecture has: name to model, the custom op with its body."""
    net = net.eval()
    opset = opset_of(precision)
    image = torch.zeros(1, spec.architecture.in_channels, *spec.grid.shape)
    codes = example_codes(spec)
    graphs = {"encoder": _trace(EncoderGraph(net, precision), [image], ["image"], code_names(), opset)}
    if net.segmentation is not None:
        graphs["segmentation"] = _trace(
            SegmentationGraph(net, precision), codes, code_names(), ["probabilities"], opset
        )
    if net.registration is not None:
        names = code_names("moving_") + code_names("fixed_")
        both = codes + example_codes(spec)
        graphs["registration"] = _trace(RegistrationGraph(net, precision), both, names, ["flow"], opset)
        flow = torch.zeros(1, 3, *spec.grid.shape)
        graphs["transformer"] = _trace(
            TransformerGraph(net), [image, flow], ["image", "flow"], ["moved", "displacement"]
        )
        if spec.passes > 1:
            graphs["composer"] = build_composer(spec)
    return graphs


def build_composer(spec: ModelSpec) -> onnx.ModelProto:
    """What composes the passes of a network that has several."""
    image = torch.zeros(1, spec.architecture.in_channels, *spec.grid.shape)
    field = torch.zeros(1, 3, *spec.grid.shape)
    names = ["image", "first", "further"]
    return _trace(ComposerGraph(), [image, field, field.clone()], names, ["moved", "displacement"])


def opset_of(precision: Precision) -> int:
    """Of the encoder and the decoders: the lowest whose convolutions take the precision."""
    return BF16_OPSET if precision == "bf16" else OPSET


def _trace(
    module: nn.Module,
    inputs: Sequence[Tensor],
    input_names: Sequence[str],
    output_names: Sequence[str],
    opset_version: int = OPSET,
) -> onnx.ModelProto:
    register_schema()
    opset = values.Opset(DOMAIN, VERSION)

    def grid_sample(volume, coords):  # type: ignore[no-untyped-def]
        return getattr(opset, OP_TYPE)(volume, coords)

    with torch.no_grad(), _quiet():
        program = torch.onnx.export(
            module.eval(),
            tuple(inputs),
            input_names=list(input_names),
            output_names=list(output_names),
            opset_version=opset_version,
            dynamo=True,
            optimize=True,
            verbose=False,
            custom_translation_table={torch.ops.jrs.grid_sample_3d.default: grid_sample},
        )
    assert program is not None
    model = program.model_proto
    if any(node.domain == DOMAIN for node in model.graph.node):
        add_function(model)
    model.producer_name, model.producer_version, model.doc_string = "jrs", "", ""
    _forget_paths(model)
    onnx.checker.check_model(model, full_check=True)
    return model


@contextmanager
def _quiet() -> Iterator[None]:
    """The tracer speaks of packages that nothing here needs, and of its own deprecated calls."""
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _forget_paths(model: onnx.ModelProto) -> None:
    """Drop the tracer's notes, which hold paths and stack traces of the machine that exported."""
    del model.metadata_props[:]
    for owner in (model.graph, *model.functions):
        del owner.metadata_props[:]
        for node in owner.node:
            del node.metadata_props[:]
            node.doc_string = ""
    for value in (*model.graph.value_info, *model.graph.input, *model.graph.output, *model.graph.initializer):
        del value.metadata_props[:]
        value.doc_string = ""
