"""Exported graphs: what the files hold, that they compute what PyTorch computes, and what guards a bundle."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, numpy_helper
from torch import Tensor

import jrs.export.exporter
import jrs.export.parity
from jrs.architecture import Architecture
from jrs.bundle import Bundle
from jrs.cli.main import main
from jrs.errors import CannotCreateError, ConfigurationError, JrsError, MissingInputError
from jrs.export.custom_op import sampler_model
from jrs.export.exporter import ParityError, export_bundle
from jrs.export.gathering import gathering_model
from jrs.export.graphs import EncoderGraph, RegistrationGraph, SegmentationGraph, build_graphs
from jrs.export.parity import check_parity
from jrs.manifest import GridSpec, ModelSpec
from jrs.models.checkpoint import Checkpoint, load_checkpoint
from jrs.models.network import JointNet
from jrs.models.spatial import displacement

Array = np.ndarray[Any, Any]

ROOT = Path(__file__).parents[1]
GRAPHS = ("encoder", "segmentation", "registration", "transformer")
MODALITIES = ("t1", "t1ce", "t2", "flair")


@dataclass(frozen=True)
class Export:
    """A bundle and the checkpoint it came from."""

    folder: Path
    checkpoint: Path
    precision: str

    def model(self, graph: str) -> onnx.ModelProto:
        return onnx.load(self.folder / f"{graph}.onnx")

    def net(self) -> JointNet:
        return load_checkpoint(self.checkpoint).network()

    def shape(self) -> tuple[int, ...]:
        return Bundle.open(self.folder).manifest.model.grid.shape


def spec_of(architecture: Architecture, shape: tuple[int, int, int] = (32, 32, 32)) -> ModelSpec:
    channels = MODALITIES[: architecture.in_channels]
    labels = ("background", "core", "edema", "enhancing")[: architecture.num_labels]
    values = (0, 1, 2, 4)[: architecture.num_labels]
    return ModelSpec(
        architecture, channels, channels, GridSpec(shape, (6.0, 6.0, 6.0)), labels=labels, label_values=values
    )


def images(channels: int, shape: tuple[int, ...], seed: int = 0) -> tuple[Tensor, Tensor]:
    """Two smooth random images."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(2, channels, *(n // 4 for n in shape), generator=generator)
    fine = torch.nn.functional.interpolate(coarse, size=shape, mode="trilinear")
    fine = fine + 0.1 * torch.randn(fine.shape, generator=generator)
    return fine[:1], fine[1:]


def random_network(spec: ModelSpec, seed: int) -> JointNet:
    """Random weights; a field of some voxels, every class wins somewhere."""
    torch.manual_seed(seed)
    net = JointNet(spec.architecture).eval()
    moving, fixed = images(spec.architecture.in_channels, spec.grid.shape, 9)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
            elif "norms" in name:
                parameter.normal_(mean=1.0, std=0.1)
        a, b = net.encoder(moving), net.encoder(fixed)
        if net.registration is not None:
            scale = 0.5 / net.flow(a, b).std(dim=(0, 2, 3, 4))
            net.registration.output.weight *= scale.view(-1, 1, 1, 1, 1)
        if net.segmentation is not None:
            logits, bias = net.segmentation(a), net.segmentation.output.bias
            assert bias is not None
            scale = 2.0 / logits.std(dim=(0, 2, 3, 4))
            bias.copy_((bias - logits.mean(dim=(0, 2, 3, 4))) * scale)
            net.segmentation.output.weight *= scale.view(-1, 1, 1, 1, 1)
    return net


# Of the shared bundle in conftest.py: fp32, instance norm, displacement head, subtraction.
SHARED = "fp32, instance, displacement"
PLAIN = "fp32, no norm, gradient, concatenate"
HALF = "fp16, instance, potential, add"
KINDS = (SHARED, PLAIN, HALF)

TRAINING = {
    "config": {"model": {"secret": 1}, "seed": 7},
    "progress": {"step": 12, "best_loss": 0.5, "validation": {"val_loss": 0.5}},
}


def make(folder: Path, architecture: Architecture, precision: Any, shape: Any = None, passes: int = 1) -> Export:
    spec, checkpoint = dataclasses.replace(spec_of(architecture), passes=passes), folder / "net.safetensors"
    Checkpoint(spec, random_network(spec, 1).state_dict(), TRAINING).save(checkpoint)
    return Export(
        export_bundle(checkpoint, folder / "bundle", precision, shape=shape).folder, checkpoint, precision
    )


@pytest.fixture(scope="session")
def one(tmp_path_factory: pytest.TempPathFactory) -> Export:
    """The smallest, on another grid than its checkpoint's."""
    architecture = Architecture(1, 4, 3, merge="concatenate", head="gradient", grid_origin=1, mask="unwarped")
    return make(tmp_path_factory.mktemp("plain"), architecture, "fp32", (32, 16, 48))


@pytest.fixture(scope="session")
def half(tmp_path_factory: pytest.TempPathFactory) -> Export:
    architecture = Architecture(2, 3, 4, norm="instance", head="potential", merge="add")
    return make(tmp_path_factory.mktemp("half"), architecture, "fp16")


@pytest.fixture(scope="session")
def exports(tiny_bundle: Path, one: Export, half: Export) -> dict[str, Export]:
    shared = Export(tiny_bundle, tiny_bundle.parent / "tiny.safetensors", "fp32")
    return {SHARED: shared, PLAIN: one, HALF: half}


@pytest.fixture(params=KINDS)
def export(request: pytest.FixtureRequest, exports: dict[str, Export]) -> Export:
    return exports[request.param]


def nodes(model: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    """Every node, of functions and of subgraphs too."""

    def walk(held: Any) -> Iterator[onnx.NodeProto]:
        for node in held:
            yield node
            for attribute in node.attribute:
                yield from walk(attribute.g.node)
                for graph in attribute.graphs:
                    yield from walk(graph.node)

    yield from walk(model.graph.node)
    for function in model.functions:
        yield from walk(function.node)


# The files --------------------------------------------------------------------------------------------------


def test_a_bundle_is_a_manifest_and_single_files(export: Export) -> None:
    expected = {"manifest.json", *(f"{graph}.onnx" for graph in GRAPHS)}
    assert {path.name for path in export.folder.iterdir()} == expected


CHECK = """
import sys, onnx
assert not onnx.defs.has("JrsGridSample3D", "ai.jrs"), "the operator must not be known here"
for path in sys.argv[1:]:
    onnx.checker.check_model(onnx.load(path), full_check=True)
    onnx.checker.check_model(path, full_check=True)
    inferred = onnx.shape_inference.infer_shapes(onnx.load(path), strict_mode=True, data_prop=True)
    assert all(v.type.tensor_type.shape.dim for v in inferred.graph.output), path
assert not {"torch", "jrs", "onnxscript"} & set(sys.modules)
"""


@pytest.fixture(scope="module")
def twice(tmp_path_factory: pytest.TempPathFactory) -> Export:
    """Of a network that registers in two passes."""
    architecture = Architecture(2, 3, 4, norm="instance", head="gradient", grid_origin=1)
    return make(tmp_path_factory.mktemp("twice"), architecture, "fp32", passes=2)


def test_several_passes_have_a_composer(twice: Export, helpers: Any) -> None:
    """u(x) = v(x) + w(x + v(x)) and the image there, by scipy's interpolation."""
    bundle = Bundle.open(twice.folder)
    assert set(bundle.manifest.graphs) == {*GRAPHS, "composer"}
    assert bundle.manifest.parity["composed"].passed and bundle.manifest.parity["moved_composed"].passed
    shape = bundle.manifest.model.grid.shape
    moving = images(2, shape, 4)[0].numpy()
    w, v = (3.0 * image.numpy() for image in images(3, shape, 5))
    got = session(twice.folder / "composer.onnx")(image=moving, first=w, further=v)
    u = v[0] + helpers.at(w[0], v[0].astype(np.float64))
    assert np.abs(u).max() > 2.0
    np.testing.assert_allclose(got["displacement"][0], u, atol=1e-4)
    np.testing.assert_allclose(got["moved"][0], helpers.at(moving[0], u), atol=1e-3)


def test_passes_by_graphs_alone_are_the_networks(twice: Export, monkeypatch: pytest.MonkeyPatch) -> None:
    from jrs.runtime.network import Network

    monkeypatch.setenv("JRS_KERNELS", "off")
    bundle, net = Bundle.open(twice.folder), load_checkpoint(twice.checkpoint).network()
    moving, fixed = images(2, bundle.manifest.model.grid.shape, 6)
    with torch.no_grad():
        want = displacement(net.register(moving, fixed, 2)).numpy()
    with Network(bundle, "ort-cpu", threads=1) as network:
        got = network.register(moving.numpy(), network.encode(moving.numpy()), network.encode(fixed.numpy()))
    assert np.abs(want).max() > 0.5
    assert np.percentile(np.abs(got.displacement - want), 99) < 2e-3


def test_several_passes_without_a_composer_are_refused(twice: Export, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(twice.folder, copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    del manifest["graphs"]["composer"]
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ConfigurationError, match="lacks the composer graph"):
        Bundle.open(copy)


def test_onnx_accepts_every_graph_without_knowing_the_operator(exports: dict[str, Export]) -> None:
    files = [str(export.folder / f"{graph}.onnx") for export in exports.values() for graph in GRAPHS]
    done = subprocess.run([sys.executable, "-c", CHECK, *files], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("graph", GRAPHS)
def test_opsets_and_functions(export: Export, graph: str) -> None:
    model = export.model(graph)
    opsets = {entry.domain: entry.version for entry in model.opset_import}
    assert opsets[""] == 20
    custom = [node for node in model.graph.node if node.domain == "ai.jrs"]
    functions = [(function.domain, function.name) for function in model.functions]
    if graph == "transformer":
        assert opsets["ai.jrs"] == 1
        assert [node.op_type for node in custom] == ["JrsGridSample3D"]
        assert functions == [("ai.jrs", "JrsGridSample3D")]
        body = {node.op_type: node for node in model.functions[0].node}
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in body["GridSample"].attribute}
        assert attributes == {"mode": b"linear", "padding_mode": b"border", "align_corners": 1}
        assert all(node.domain == "" for node in model.functions[0].node)
    else:
        assert custom == [] and functions == []
    assert {node.domain for node in nodes(model)} <= {"", "ai.jrs"}


@pytest.mark.parametrize("graph", GRAPHS)
def test_what_no_graph_may_hold(export: Export, graph: str) -> None:
    model = export.model(graph)
    kinds = {node.op_type for node in nodes(model)}
    assert not kinds & {"CumSum", "Scan", "Loop", "If", "InstanceNormalization"}
    stored = [
        *model.graph.initializer,
        *(a.t for node in nodes(model) for a in node.attribute if a.HasField("t")),
    ]
    assert all(t.data_location != TensorProto.EXTERNAL and not t.external_data for t in stored)
    assert not any(t.data_type == TensorProto.DOUBLE for t in stored)


@pytest.mark.parametrize("graph", GRAPHS)
def test_nothing_of_the_machine_that_exported_is_told(export: Export, graph: str) -> None:
    content = (export.folder / f"{graph}.onnx").read_bytes()
    for trace in (
        b"site-packages",
        b".py",
        b"Traceback",
        b'File "',
        b"stack_trace",
        b"torch.nn",
        str(ROOT).encode(),
        str(export.folder.parent).encode(),
        sys.prefix.encode(),
        str(Path.home()).encode() + b"/",
    ):
        assert trace not in content, trace


@pytest.mark.parametrize("graph", GRAPHS)
def test_names_shapes_and_types_of_the_ends(export: Export, graph: str) -> None:
    model, architecture = export.model(graph), load_checkpoint(export.checkpoint).spec.architecture
    x, y, z = export.shape()
    code = {f"code{k + 1}": [1, architecture.base_channels * 2**k, x >> k, y >> k, z >> k] for k in range(5)}
    image, flow = [1, architecture.in_channels, x, y, z], [1, 3, x, y, z]
    both = {f"{side}_{name}": shape for side in ("moving", "fixed") for name, shape in code.items()}
    expected: dict[str, tuple[dict[str, list[int]], dict[str, list[int]]]] = {
        "encoder": ({"image": image}, code),
        "segmentation": (code, {"probabilities": [1, architecture.num_labels, x, y, z]}),
        "registration": (both, {"flow": flow}),
        "transformer": ({"image": image, "flow": flow}, {"moved": image, "displacement": flow}),
    }
    for values, wanted in zip((model.graph.input, model.graph.output), expected[graph], strict=True):
        got = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in values}
        assert list(got.items()) == list(wanted.items())
        assert {v.type.tensor_type.elem_type for v in values} == {TensorProto.FLOAT}


# FP16 -------------------------------------------------------------------------------------------------------


def convolutions(model: onnx.ModelProto) -> list[tuple[onnx.NodeProto, list[onnx.TensorProto]]]:
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    return [
        (node, [stored[name] for name in node.input[1:]])
        for node in model.graph.node
        if node.op_type in ("Conv", "ConvTranspose")
    ]


@pytest.mark.parametrize(("graph", "count"), [("encoder", 17), ("segmentation", 14), ("registration", 14)])
def test_convolutions_are_float16_but_the_last(half: Export, graph: str, count: int) -> None:
    found = convolutions(half.model(graph))
    assert len(found) == count
    last = 0 if graph == "encoder" else 1
    for _, tensors in found[: count - last]:
        assert {t.data_type for t in tensors} == {TensorProto.FLOAT16}
    for _, tensors in found[count - last :]:
        assert {t.data_type for t in tensors} == {TensorProto.FLOAT}
        assert list(tensors[0].dims)[2:] == [1, 1, 1] and tensors[0].dims[0] == 3


def test_the_transformer_is_float32_in_an_fp16_bundle(half: Export) -> None:
    model = half.model("transformer")
    assert not any(t.data_type == TensorProto.FLOAT16 for t in model.graph.initializer)
    casts = [onnx.helper.get_attribute_value(n.attribute[0]) for n in model.graph.node if n.op_type == "Cast"]
    assert TensorProto.FLOAT16 not in casts


@pytest.mark.parametrize("graph", GRAPHS[:3])
def test_an_fp32_bundle_has_no_float16(one: Export, graph: str) -> None:
    found = convolutions(one.model(graph))
    assert {t.data_type for _, tensors in found for t in tensors} == {TensorProto.FLOAT}


# The numbers ------------------------------------------------------------------------------------------------


def session(model: onnx.ModelProto | Path) -> Callable[..., dict[str, Array]]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    source = str(model) if isinstance(model, Path) else model.SerializeToString()
    made = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in made.get_outputs()]
    return lambda **inputs: dict(zip(names, made.run(None, inputs), strict=True))


def run_chain(folder: Path, moving: Tensor, fixed: Tensor) -> dict[str, Array]:
    """All four graphs of a bundle, each fed by the one before."""
    run = {graph: session(folder / f"{graph}.onnx") for graph in GRAPHS}
    a, b = (run["encoder"](image=image.numpy()) for image in (moving, fixed))
    both = {f"moving_{k}": v for k, v in a.items()} | {f"fixed_{k}": v for k, v in b.items()}
    out = {f"moving_{k}": v for k, v in a.items()} | run["registration"](**both)
    out |= {"moving_probabilities": run["segmentation"](**a)["probabilities"]}
    out |= {"fixed_probabilities": run["segmentation"](**b)["probabilities"]}
    return out | run["transformer"](image=moving.numpy(), flow=out["flow"])


def run_torch(net: JointNet, moving: Tensor, fixed: Tensor) -> dict[str, Array]:
    with torch.no_grad():
        out = net(moving, fixed)
        codes = net.encoder(moving)
    assert out.flow is not None and out.moved is not None and out.coords_vox is not None
    assert out.moving_probabilities is not None and out.fixed_probabilities is not None
    identity = np.indices(moving.shape[2:], dtype=np.float32)
    return {
        **{f"moving_code{k + 1}": code.numpy() for k, code in enumerate(codes)},
        "flow": out.flow.numpy(),
        "moved": out.moved.numpy(),
        "displacement": out.coords_vox.numpy() - identity,
        "moving_probabilities": out.moving_probabilities.numpy(),
        "fixed_probabilities": out.fixed_probabilities.numpy(),
    }


def both_ways(export: Export) -> tuple[dict[str, Array], dict[str, Array]]:
    net = export.net()
    moving, fixed = images(net.architecture.in_channels, export.shape())
    return run_chain(export.folder, moving, fixed), run_torch(net, moving, fixed)


@pytest.mark.parametrize("kind", [SHARED, PLAIN])
def test_fp32_graphs_compute_what_pytorch_computes(exports: dict[str, Export], kind: str) -> None:
    got, want = both_ways(exports[kind])
    assert got.keys() == want.keys()
    assert float(want["displacement"].std()) > 0.01
    for name, value in want.items():
        assert got[name].dtype == np.float32 and got[name].shape == value.shape
        np.testing.assert_allclose(got[name], value, atol=1e-4, rtol=1e-4, err_msg=name)


def test_fp16_graphs_stay_near(half: Export) -> None:
    got, want = both_ways(half)
    error = np.abs(got["displacement"] - want["displacement"])
    assert float(want["displacement"].std()) > 0.1
    assert 0.0 < error.max() < 0.05
    for name in ("moving_probabilities", "fixed_probabilities"):
        labels = want[name].argmax(axis=1)
        assert len(np.unique(labels)) == 3
        assert (got[name].argmax(axis=1) == labels).mean() >= 0.995


def test_flow_is_what_the_head_has_not_seen_yet(one: Export) -> None:
    """The transformer alone: coordinates of the gradient head in float64, from any flow."""
    shape = one.shape()
    flow = torch.randn(1, 3, *shape, generator=torch.Generator().manual_seed(4)).numpy()
    got = session(one.folder / "transformer.onnx")(image=np.zeros((1, 1, *shape), np.float32), flow=flow)
    phi = 2.0 / (1.0 + np.exp(-flow.astype(np.float64)))
    coords = np.stack([np.cumsum(phi[:, i], axis=i + 1) for i in range(3)], axis=1)  # the origin is 1
    np.testing.assert_allclose(got["displacement"], coords - np.indices(shape), atol=1e-4)


# The operator -----------------------------------------------------------------------------------------------


def trilinear(volume: Array, coords: Array) -> Array:
    """(C,D,H,W) at (3,...), float64, indices clamped to the border."""
    inside = [np.clip(c.astype(np.float64), 0, n - 1) for c, n in zip(coords, volume.shape[1:], strict=True)]
    lower = [np.floor(c).astype(int) for c in inside]
    out = np.zeros((volume.shape[0], *coords.shape[1:]))
    for corner in itertools.product((0, 1), repeat=3):
        index = [np.minimum(i + s, n - 1) for i, s, n in zip(lower, corner, volume.shape[1:], strict=True)]
        weight = np.prod(
            [c - i if s else 1 - (c - i) for c, i, s in zip(inside, lower, corner, strict=True)], axis=0
        )
        out += weight * volume[:, index[0], index[1], index[2]]
    return out


SHIPPED = ROOT / "jrs" / "data" / "graphs"
# The operator alone, by either body, and as it ships.
SAMPLERS = {"sampler.onnx": sampler_model, "sampler_gathering.onnx": gathering_model}


@pytest.mark.parametrize(
    ("size", "target"), [((5, 7, 9), (4, 3, 6)), ((1, 6, 4), (2, 2, 2)), ((3, 1, 1), (5, 1, 2))]
)
@pytest.mark.parametrize("channels", [1, 3])
def test_the_operators_body(size: tuple[int, ...], target: tuple[int, ...], channels: int) -> None:
    rng = np.random.default_rng(0)
    volume = rng.normal(size=(channels, *size)).astype(np.float32)
    extent = np.array(size).reshape(3, 1, 1, 1)
    coords = (rng.random((3, *target)) * (extent + 4) - 2.5).astype(np.float32)
    expected = trilinear(volume, coords)
    for name, make in SAMPLERS.items():
        for model in (make(), SHIPPED / name):
            got = session(model)(volume=volume[None], coords=coords[None])["sampled"]
            np.testing.assert_allclose(got[0], expected, atol=1e-5)


def test_gathering_takes_several_images_and_odd_coordinates() -> None:
    model = gathering_model()
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = "N"
    rng = np.random.default_rng(0)
    volume = rng.normal(size=(3, 2, 4, 5, 6)).astype(np.float32)
    coords = rng.uniform(-2, 8, (3, 3, 2, 3, 4)).astype(np.float32)
    coords[0, 0, 0, 0, 0], coords[1, 1, 1, 1, 1], coords[2, 2, 1, 2, 3] = np.inf, -np.inf, 3e38
    coords[2, 0, 0, 1, 1] = np.nan  # as the device's kernel has it: index 0
    known = np.nan_to_num(coords, posinf=99.0, neginf=-99.0)
    expected = np.stack([trilinear(v, c) for v, c in zip(volume, known, strict=True)])
    got = session(model)(volume=volume, coords=coords)["sampled"]
    np.testing.assert_allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_shipped_sampler_is_the_one_the_code_makes(name: str) -> None:
    shipped, made = onnx.load(SHIPPED / name), SAMPLERS[name]()
    for model in (shipped, made):
        model.ClearField("producer_version")
    assert shipped == made


# The bundle -------------------------------------------------------------------------------------------------


def test_the_manifest(export: Export) -> None:
    bundle = Bundle.open(export.folder)
    manifest = json.loads((export.folder / "manifest.json").read_text(encoding="utf-8"))
    loaded = load_checkpoint(export.checkpoint)
    assert manifest["format_version"] == 1
    assert manifest["name"] == bundle.name == export.folder.name
    assert manifest["precision"] == export.precision
    assert manifest["opset"] == 20
    assert bundle.manifest.model.architecture == loaded.spec.architecture
    assert bundle.manifest.model.channels == loaded.spec.channels
    assert bundle.manifest.model.label_values == loaded.spec.label_values
    assert set(manifest["graphs"]) == set(GRAPHS)
    for graph, entry in manifest["graphs"].items():
        content = (export.folder / entry["file"]).read_bytes()
        assert entry["sha256"] == hashlib.sha256(content).hexdigest()
        assert bundle.graph(graph) == export.folder / entry["file"]
    assert bundle.sha256 == hashlib.sha256((export.folder / "manifest.json").read_bytes()).hexdigest()
    outputs = {f"code{k}" for k in range(1, 6)} | {
        "probabilities",
        "labels",
        "flow",
        "moved",
        "displacement",
        "field",
    }
    assert set(manifest["parity"]) == outputs
    for record in manifest["parity"].values():
        assert 0.0 <= record[record["measure"]] <= record["limit"]


def test_the_manifest_tells_of_the_training_but_not_of_resuming(one: Export) -> None:
    training = Bundle.open(one.folder).manifest.training
    assert training == {"config": {"seed": 7}, "steps": 12, "validation": {"val_loss": 0.5}}


def test_another_grid_than_the_checkpoints(one: Export) -> None:
    grid = Bundle.open(one.folder).manifest.model.grid
    assert grid.shape == (32, 16, 48) != load_checkpoint(one.checkpoint).spec.grid.shape
    assert grid.spacing == (6.0, 6.0, 6.0)


@pytest.mark.parametrize("kind", [PLAIN, HALF])
def test_the_weights_come_back_from_a_bundle(exports: dict[str, Export], kind: str) -> None:
    export = exports[kind]
    loaded, back = load_checkpoint(export.checkpoint), load_checkpoint(export.folder)
    assert back.spec.architecture == loaded.spec.architecture
    assert back.weights.keys() == loaded.weights.keys()
    for name, value in loaded.weights.items():
        assert back.weights[name].dtype == torch.float32
        if export.precision == "fp32":
            assert torch.equal(back.weights[name], value), name
        else:
            np.testing.assert_allclose(
                back.weights[name].numpy(), value.numpy(), rtol=1e-3, atol=1e-6, err_msg=name
            )


def test_untrained_norms_cannot_be_told_apart_in_a_bundle(exports: dict[str, Export]) -> None:
    """Parameters of equal content become one initialiser; the refusal says what to use instead."""
    with pytest.raises(ConfigurationError, match="use the checkpoint it came from"):
        load_checkpoint(exports[SHARED].folder)


def copy_of(export: Export, tmp_path: Path) -> Path:
    return Path(shutil.copytree(export.folder, tmp_path / "bundle"))


def refused(folder: Path, *words: str, error: type[JrsError] = ConfigurationError) -> None:
    with pytest.raises(JrsError) as caught:
        Bundle.open(folder)
    message = str(caught.value)
    assert type(caught.value) is error, message
    assert message.startswith(str(folder)) and "\n" not in message
    assert all(word in message for word in words), message


@pytest.mark.parametrize("graph", GRAPHS)
def test_one_changed_byte_in_a_graph(one: Export, tmp_path: Path, graph: str) -> None:
    folder = copy_of(one, tmp_path)
    content = bytearray((folder / f"{graph}.onnx").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / f"{graph}.onnx").write_bytes(content)
    refused(folder, f"{graph}.onnx", "checksum")


@pytest.mark.parametrize("graph", GRAPHS)
def test_a_missing_graph(one: Export, tmp_path: Path, graph: str) -> None:
    folder = copy_of(one, tmp_path)
    (folder / f"{graph}.onnx").unlink()
    refused(folder, f"{graph}.onnx", "missing")


Change = Callable[[dict[str, Any]], Any]

CHANGES: dict[str, tuple[Change, tuple[str, ...]]] = {
    "newer format": (lambda m: m.update(format_version=2), ("version 2",)),
    "no format": (lambda m: m.pop("format_version"), ("version",)),
    "format as text": (lambda m: m.update(format_version="1"), ("version",)),
    "unknown field": (lambda m: m.update(colour=1), ("colour",)),
    "unknown field inside": (lambda m: m["model"]["grid"].update(colour=1), ("model", "grid", "colour")),
    "missing field": (lambda m: m.pop("precision"), ("precision", "missing")),
    "wrong type": (lambda m: m.update(opset="20"), ("opset", "must be int")),
    "unknown precision": (lambda m: m.update(precision="int8"), ("precision", "int8")),
    "unknown head": (lambda m: m["model"]["architecture"].update(head="x"), ("head",)),
    "grid": (lambda m: m["model"]["grid"].update(shape=[32, 16, 47]), ("grid", "multiple of 16")),
    "channels": (lambda m: m["model"].update(channels=["t1", "t2"]), ("channel",)),
    "checksum": (lambda m: m["graphs"]["encoder"].update(sha256="0" * 64), ("encoder.onnx", "checksum")),
    "no encoder": (lambda m: m["graphs"].pop("encoder"), ("encoder",)),
    "no transformer": (lambda m: m["graphs"].pop("transformer"), ("transformer",)),
    "an unknown graph": (lambda m: m["graphs"].update(more=m["graphs"]["encoder"]), ("more",)),
    "a path out": (lambda m: m["graphs"]["encoder"].update(file="../encoder.onnx"), ("../encoder.onnx",)),
    "an absolute path": (lambda m: m["graphs"]["encoder"].update(file="/etc/hosts"), ("/etc/hosts",)),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_a_changed_manifest(one: Export, tmp_path: Path, kind: str) -> None:
    change, words = CHANGES[kind]
    folder = copy_of(one, tmp_path)
    shutil.copy(folder / "encoder.onnx", tmp_path / "encoder.onnx")
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    refused(folder, *words)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe{}", b"null"])
def test_a_manifest_that_is_none(one: Export, tmp_path: Path, content: bytes) -> None:
    folder = copy_of(one, tmp_path)
    (folder / "manifest.json").write_bytes(content)
    refused(folder, "manifest.json")


def test_no_bundle_at_all(tmp_path: Path) -> None:
    refused(tmp_path, "manifest.json", error=MissingInputError)
    refused(tmp_path / "none", error=MissingInputError)


def test_a_bundle_can_be_moved(one: Export, tmp_path: Path) -> None:
    assert Bundle.open(copy_of(one, tmp_path)).sha256 == Bundle.open(one.folder).sha256


# Exporting --------------------------------------------------------------------------------------------------


@pytest.fixture
def traced(one: Export, monkeypatch: pytest.MonkeyPatch) -> dict[str, onnx.ModelProto]:
    """Graphs that the exporter finds ready instead of tracing them again; tests may change them."""
    graphs = {graph: one.model(graph) for graph in GRAPHS}
    monkeypatch.setattr(jrs.export.exporter, "build_graphs", lambda *arguments: graphs)
    return graphs


def again(one: Export, out: Path, **options: Any) -> Bundle:
    return export_bundle(one.checkpoint, out, shape=(32, 16, 48), **options)


@pytest.mark.parametrize("output", ["codes", "probabilities", "flow", "moved", "displacement", "field"])
def test_a_parity_miss_writes_nothing(
    one: Export, tmp_path: Path, traced: Any, monkeypatch: pytest.MonkeyPatch, output: str
) -> None:
    unit, measure, limits = jrs.export.parity._LIMITS[output]
    monkeypatch.setitem(jrs.export.parity._LIMITS, output, (unit, measure, {**limits, "fp32": -1.0}))
    with pytest.raises(ParityError) as caught:
        again(one, tmp_path / "bundle")
    message = str(caught.value)
    assert str(one.checkpoint) in message and ("code1" if output == "codes" else output) in message
    assert list(tmp_path.iterdir()) == []


def weight(model: onnx.ModelProto, place: int) -> onnx.TensorProto:
    """The bias of a convolution."""
    return convolutions(model)[place][1][1]


@pytest.mark.parametrize("graph", GRAPHS[:3])
@pytest.mark.parametrize("value", [1.0, np.nan])
def test_a_graph_that_computes_something_else_is_found(
    one: Export, tmp_path: Path, traced: dict[str, onnx.ModelProto], graph: str, value: float
) -> None:
    bias = weight(traced[graph], -1)
    changed = numpy_helper.to_array(bias).copy()
    changed[0] += value
    bias.CopyFrom(numpy_helper.from_array(changed, bias.name))
    with pytest.raises(ParityError):
        again(one, tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []


def test_a_transformer_that_samples_in_another_way_is_found(
    one: Export, tmp_path: Path, traced: dict[str, onnx.ModelProto]
) -> None:
    body = traced["transformer"].functions[0]
    (sampler,) = (node for node in body.node if node.op_type == "GridSample")
    (mode,) = (a for a in sampler.attribute if a.name == "mode")
    mode.s = b"nearest"
    with pytest.raises(ParityError, match="moved"):
        again(one, tmp_path / "bundle")


def test_the_parity_check_measures_the_error(one: Export, traced: dict[str, onnx.ModelProto]) -> None:
    """A known error: every displacement is off by 0.25 voxel."""
    loaded = load_checkpoint(one.checkpoint)
    spec = Bundle.open(one.folder).manifest.model
    graph = traced["transformer"].graph
    (node,) = (node for node in graph.node if "displacement" in node.output)
    node.output[list(node.output).index("displacement")] = "before"
    graph.initializer.append(numpy_helper.from_array(np.array(0.25, np.float32), "quarter"))
    graph.node.append(onnx.helper.make_node("Add", ["before", "quarter"], ["displacement"]))
    records = check_parity(loaded.network(), spec, traced, "fp32")
    for name in ("displacement", "field"):
        assert records[name].maximum == pytest.approx(0.25, abs=1e-3)
        assert records[name].percentile_99 == pytest.approx(0.25, abs=1e-3)
        assert records[name].unit == "voxel" and not records[name].passed
    assert records["moved"].passed and records["flow"].passed


def test_an_existing_folder_is_refused_before_any_work(
    one: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*arguments: Any) -> Any:
        raise AssertionError("traced before looking")

    monkeypatch.setattr(jrs.export.exporter, "build_graphs", never)
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "precious").write_text("x")
    with pytest.raises(CannotCreateError, match="--overwrite"):
        again(one, tmp_path / "bundle")
    assert [p.name for p in tmp_path.rglob("*")] == ["bundle", "precious"]


def test_overwriting_replaces_the_whole_folder(one: Export, tmp_path: Path, traced: Any) -> None:
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "old").write_text("x")
    bundle = again(one, tmp_path / "bundle", overwrite=True, name="other")
    assert bundle.name == "other"
    assert not (tmp_path / "bundle" / "old").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["bundle"]


def test_a_miss_leaves_the_old_bundle(
    one: Export, tmp_path: Path, traced: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copy_of(one, tmp_path)
    before = Bundle.open(folder).sha256
    unit, measure, limits = jrs.export.parity._LIMITS["flow"]
    monkeypatch.setitem(jrs.export.parity._LIMITS, "flow", (unit, measure, {**limits, "fp32": -1.0}))
    with pytest.raises(ParityError):
        again(one, folder, overwrite=True)
    assert Bundle.open(folder).sha256 == before
    assert [p.name for p in tmp_path.iterdir()] == ["bundle"]


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    text = tmp_path / "text.safetensors"
    text.write_text("nothing")
    with pytest.raises(ConfigurationError, match=r"text\.safetensors"):
        export_bundle(text, tmp_path / "bundle")
    with pytest.raises(MissingInputError, match="no such checkpoint"):
        export_bundle(tmp_path / "none.safetensors", tmp_path / "bundle")
    with pytest.raises(MissingInputError, match="holds no checkpoint"):
        export_bundle(tmp_path, tmp_path / "bundle")
    assert [p.name for p in tmp_path.iterdir()] == ["text.safetensors"]


@pytest.mark.parametrize(
    ("architecture", "graphs"),
    [
        (Architecture(1, 0, 2), {"encoder", "registration", "transformer"}),
        (Architecture(1, 2, 2, registration=False), {"encoder", "segmentation"}),
    ],
)
def test_a_network_of_one_decoder(architecture: Architecture, graphs: set[str]) -> None:
    spec = spec_of(architecture, (32, 16, 16))
    net = random_network(spec, 5)
    built = build_graphs(net, spec, "fp32")
    assert set(built) == graphs
    records = check_parity(net, spec, built, "fp32")
    assert all(record.passed for record in records.values())
    assert ("probabilities" in records) is architecture.segmentation
    assert ("flow" in records) is architecture.registration


@pytest.mark.parametrize("graph", [EncoderGraph, SegmentationGraph, RegistrationGraph])
def test_exporting_leaves_the_network_as_it_is(graph: Any) -> None:
    """Half precision and the norms written out belong to copies."""
    net = random_network(spec_of(Architecture(1, 2, 2, norm="instance")), 6)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    image = images(1, (32, 16, 16))[0]
    expected = net(image, image)
    assert any(p.dtype == torch.float16 for p in graph(net, "fp16").parameters())
    after = net.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[k], after[k]) and after[k].dtype == torch.float32 for k in before)
    again = net(image, image)
    assert torch.equal(again.flow, expected.flow)
    assert torch.equal(again.moving_logits, expected.moving_logits)


# The command ------------------------------------------------------------------------------------------------


def command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: Any
) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["jrs", "export", *map(str, words)])
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        main()
    out, err = capsys.readouterr()
    return int(caught.value.code or 0), out, err


def test_the_command(
    one: Export,
    tmp_path: Path,
    traced: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "made"
    words = (one.checkpoint, "--out", out, "--shape", "32x16x48", "--name", "mine")
    code, printed, err = command(monkeypatch, capsys, *words)
    assert (code, printed) == (0, f"{out}\n"), err
    assert Bundle.open(out).name == "mine"
    assert "flow" in err and "probabilities" in err
    code, printed, err = command(monkeypatch, capsys, *words)
    assert (code, printed) == (73, "") and "--overwrite" in err
    assert err.startswith("jrs: ") and err.count("\n") == 1


@pytest.mark.parametrize(
    ("shape", "expected"), [("32,16", 2), ("a,b,c", 2), ("32,16,-48", 2), ("32,16,47", 78), ("0,16,16", 78)]
)
def test_a_shape_that_cannot_be(
    one: Export,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    shape: str,
    expected: int,
) -> None:
    code, printed, err = command(
        monkeypatch, capsys, one.checkpoint, "--out", tmp_path / "x", "--shape", shape
    )
    assert (code, printed) == (expected, "")
    assert err.startswith("jrs: ") and err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


# TensorRT ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("graph", GRAPHS)
def test_tensorrt_builds_every_graph_without_a_gpu(export: Export, graph: str) -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    parsed = parser.parse((export.folder / f"{graph}.onnx").read_bytes())
    assert parsed, [parser.get_error(i).desc() for i in range(parser.num_errors)]
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    kinds = [layer.type for layer in layers]
    assert kinds.count(trt.LayerType.GRID_SAMPLE) == (1 if graph == "transformer" else 0)
    assert trt.LayerType.CUMULATIVE not in kinds and trt.LayerType.PLUGIN_V3 not in kinds
    outputs = {network.get_output(i).name: network.get_output(i).dtype for i in range(network.num_outputs)}
    assert set(outputs) == {value.name for value in export.model(graph).graph.output}
    assert set(outputs.values()) == {trt.float32}
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM86, 0)
    plan = builder.build_serialized_network(network, config)
    assert plan is not None and plan.nbytes > 1000


def test_the_operator_becomes_a_native_layer(one: Export) -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    logger = trt.Logger(trt.Logger.ERROR)
    network = trt.Builder(logger).create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    assert parser.parse((one.folder / "transformer.onnx").read_bytes())
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    (layer,) = (layer for layer in layers if layer.type == trt.LayerType.GRID_SAMPLE)
    layer.__class__ = trt.IGridSampleLayer
    assert layer.align_corners
    assert layer.interpolation_mode == trt.InterpolationMode.LINEAR
    assert layer.sample_mode == trt.SampleMode.CLAMP
    assert tuple(layer.get_input(1).shape) == (1, *one.shape(), 3)
    assert layer.get_input(0).dtype == layer.get_input(1).dtype == trt.float32


def test_a_cumulative_sum_would_be_seen() -> None:
    """The check above is not blind: TensorRT does have a layer for what the graphs avoid."""
    trt = pytest.importorskip("tensorrt_rtx")
    value = onnx.helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4])
    result = onnx.helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 4])
    axis = numpy_helper.from_array(np.array(1, np.int64), "axis")
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("CumSum", ["x", "axis"], ["y"])], "g", [value], [result], [axis]
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
    logger = trt.Logger(trt.Logger.ERROR)
    network = trt.Builder(logger).create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    assert trt.OnnxParser(network, logger).parse(model.SerializeToString())
    assert trt.LayerType.CUMULATIVE in [network.get_layer(i).type for i in range(network.num_layers)]


def test_a_bundle_does_not_say_where_the_training_data_lay() -> None:
    from jrs.bundle import Bundle
    from jrs.export.exporter import _training_record
    from jrs.models.checkpoint import Checkpoint

    spec = Bundle.open(None).manifest.model
    record = {"options": {"synthetic": "/home/someone/labels"}, "data": {"training": "16 images, 6ed2"}}
    kept = _training_record(Checkpoint(spec, {}, {"record": record, "progress": {"step": 5, "validation": 0.4}}))
    assert kept == {"record": {"data": {"training": "16 images, 6ed2"}}, "steps": 5, "validation": 0.4}
