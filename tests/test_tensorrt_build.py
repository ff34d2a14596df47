"""TensorRT engines: real ones of real graphs, built by TensorRT-RTX without a GPU; their keys, storage and refusal."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jrs.bundle import Bundle
from jrs.errors import BackendError, UsageError
from jrs.runtime.engines import EngineOptions, cuda, functions, kernel, plans, tensorrt_log
from jrs.runtime.engines.plans import BuildOptions, Plan, PlanKey

trt = pytest.importorskip("tensorrt_rtx")

AHEAD = BuildOptions(capabilities=("SM86", "SM120"))
GRAPHS = ("encoder", "segmentation", "registration", "transformer", "composer")
no_gpu = pytest.mark.skipif(bool(cuda.visible_devices()), reason="a GPU is here")


def build(graph: Path, options: BuildOptions = AHEAD, precision: str = "fp32") -> Plan:
    return plans.build_plan(trt, graph, plans.plan_key(trt, graph, precision, options), options)


@pytest.fixture(scope="module")
def default() -> Bundle:
    return Bundle.open()


@pytest.fixture(scope="module")
def built(default: Bundle) -> dict[str, Plan]:
    return {name: build(default.graph(name)) for name in GRAPHS}


# Real engines ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GRAPHS)
def test_every_graph_of_the_default_bundle_builds(default: Bundle, built: dict[str, Plan], name: str) -> None:
    onnx = pytest.importorskip("onnx")
    plan = built[name]
    assert len(plan.content) > 100_000
    assert "CUMULATIVE" not in plan.layers and not any("PLUGIN" in layer for layer in plan.layers)
    ops = [node.op_type for node in onnx.load(default.graph(name)).graph.node]
    assert "CumSum" not in ops
    for op, layer in (("Conv", "CONVOLUTION"), ("ConvTranspose", "DECONVOLUTION"), ("JrsGridSample3D", "GRID_SAMPLE")):
        assert plan.layers.get(layer, 0) == ops.count(op)
        assert plan.types.get(f"{layer} FLOAT", 0) == ops.count(op)


@pytest.mark.parametrize(("precision", "name", "transposed"), [("fp16", "HALF", "HALF"), ("bf16", "BF16", "FLOAT")])
def test_the_precision_is_in_the_graph_and_the_head_stays_fp32(
    tmp_path: Path, precision: str, name: str, transposed: str
) -> None:
    plan = build(registration_in(precision, tmp_path), precision=precision)
    # All but the last convolution, of 1x1x1; in BF16 there are no transposed ones.
    assert plan.types[f"CONVOLUTION {name}"] == plan.layers["CONVOLUTION"] - 1
    assert plan.types["CONVOLUTION FLOAT"] == 1
    assert plan.types[f"DECONVOLUTION {transposed}"] == plan.layers["DECONVOLUTION"] == 4


def registration_in(precision: Any, folder: Path) -> Path:
    """A small registration graph of random weights, traced in a precision."""
    torch = pytest.importorskip("torch")
    from jrs.architecture import Architecture
    from jrs.export import graphs
    from jrs.manifest import GridSpec, ModelSpec
    from jrs.models.network import JointNet

    torch.manual_seed(3)
    spec = ModelSpec(architecture=Architecture(base_channels=4, norm="instance"), grid=GridSpec((32, 32, 32)))
    module = graphs.RegistrationGraph(JointNet(spec.architecture).eval(), precision)
    names = graphs.code_names("moving_") + graphs.code_names("fixed_")
    codes = graphs.example_codes(spec) + graphs.example_codes(spec)
    model = graphs._trace(module, codes, names, ["flow"], graphs.opset_of(precision))
    path = folder / "registration.onnx"
    path.write_bytes(model.SerializeToString())
    return path


# Refusals -------------------------------------------------------------------------------------------------


def message(kind: type[Exception], *arguments: Any) -> str:
    with pytest.raises(kind) as caught:
        build(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_graph_that_is_none_is_named_with_the_librarys_reason(tmp_path: Path) -> None:
    (tmp_path / "bundle7").mkdir()
    bad = tmp_path / "bundle7" / "encoder.onnx"
    bad.write_bytes(b"not a graph" * 20)
    assert "bundle7/encoder.onnx" in message(BackendError, bad)


def test_what_a_target_cannot_compute_is_said(default: Bundle) -> None:
    """Turing has no FP32 3-D convolutions in TensorRT-RTX 1.7."""
    text = message(BackendError, default.graph("encoder"), BuildOptions(capabilities=("SM75",)))
    assert "SM75" in text and "default/encoder.onnx" in text


def test_unknown_targets_and_silly_limits(default: Bundle) -> None:
    assert "SM86" in message(UsageError, default.graph("transformer"), BuildOptions(capabilities=("SM10",)))
    with pytest.raises(UsageError):
        BuildOptions(optimization_level=9)
    with pytest.raises(UsageError):
        BuildOptions(workspace_mb=0)


@no_gpu
def test_without_a_gpu_only_ahead_of_time(default: Bundle) -> None:
    assert "--capability" in message(BackendError, default.graph("encoder"), BuildOptions())


def test_a_library_that_is_missing_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(BackendError, match=r"jrs\[tensorrt\]"):
        plans.import_library("tensorrt")


# Keys and storage -----------------------------------------------------------------------------------------


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    path = tmp_path / "bundle7" / "encoder.onnx"
    path.parent.mkdir()
    path.write_bytes(b"content")
    return path


def test_the_key_holds_all_that_a_plan_depends_on(graph: Path) -> None:
    key = plans.plan_key(trt, graph, "fp16", AHEAD)
    assert key.onnx_sha256 == hashlib.sha256(b"content").hexdigest()
    assert (key.library, key.library_version) == ("tensorrt_rtx", trt.__version__)
    assert (key.capability, key.gpu, key.driver, key.precision) == ("SM120+SM86", "any", "any", "fp16")
    for name in (f.name for f in dataclasses.fields(PlanKey)):
        value = getattr(key, name)
        other = dataclasses.replace(key, **{name: value + 1 if isinstance(value, int) else value + "x"})
        assert other.digest != key.digest and other.file != key.file
    graph.write_bytes(b"other content")
    assert plans.plan_key(trt, graph, "fp16", AHEAD).digest != key.digest


def test_a_stored_plan_comes_back_and_a_changed_one_does_not(graph: Path, tmp_path: Path) -> None:
    key = plans.plan_key(trt, graph, "fp32", AHEAD)
    plan = Plan(key, b"engine" * 100, {"CONVOLUTION": 3}, {"CONVOLUTION FLOAT": 3})
    folder = tmp_path / "engines"
    assert plans.load_plan(folder, key) is None
    path = plans.store_plan(folder, plan)
    assert plans.load_plan(folder, key) == plan.content
    record = path.with_suffix(".json")
    told = json.loads(record.read_text(encoding="utf-8"))
    assert told["sha256"] == hashlib.sha256(plan.content).hexdigest() and told["layers"] == {"CONVOLUTION": 3}
    for damage in (plan.content[:-1], plan.content[:-1] + b"X", b""):
        path.write_bytes(damage)
        assert plans.load_plan(folder, key) is None
    path.write_bytes(plan.content)
    told["key"]["driver"] = "other"
    record.write_text(json.dumps(told), encoding="utf-8")
    assert plans.load_plan(folder, key) is None
    record.write_text("{", encoding="utf-8")
    assert plans.load_plan(folder, key) is None
    record.unlink()
    assert plans.load_plan(folder, key) is None


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that has an RTX 3090, as far as keys go."""
    device = cuda.Device("NVIDIA GeForce RTX 3090", (8, 6), 24 << 30)
    monkeypatch.setattr(plans, "visible_devices", lambda: (device,))
    monkeypatch.setattr(plans, "driver_version", lambda: "580.65")


def test_plans_built_ahead_of_time_serve_the_gpus_they_name(graph: Path, on_a_gpu: None) -> None:
    folder = plans.plan_folder(graph)
    assert folder == graph.parent / "engines"
    for options, content in ((AHEAD, b"right"), (BuildOptions(capabilities=("SM89",)), b"another GPU's")):
        plans.store_plan(folder, Plan(plans.plan_key(trt, graph, "fp32", options), content))
    assert plans.plan_key(trt, graph, "fp32", BuildOptions()).capability == "SM86"
    assert plans.ready_plan(trt, graph, "fp32") == b"right"


def test_what_cannot_be_trusted_is_built_again(default: Bundle, tmp_path: Path, on_a_gpu: None) -> None:
    """The build itself fails here, as it needs the GPU that this test only claims to have; nothing is loaded."""
    copy = tmp_path / "bundle7" / "transformer.onnx"
    copy.parent.mkdir()
    copy.write_bytes(default.graph("transformer").read_bytes())
    key = plans.plan_key(trt, copy, "fp32", BuildOptions())
    path = plans.store_plan(plans.plan_folder(copy), Plan(key, b"trusted"))
    assert plans.ready_plan(trt, copy, "fp32") == b"trusted"
    path.write_bytes(b"changed")
    try:
        fresh = plans.ready_plan(trt, copy, "fp32")
    except BackendError:
        return
    assert fresh != b"changed" and plans.load_plan(plans.plan_folder(copy), key) == fresh


def test_a_bundle_that_cannot_be_written_has_its_plans_in_the_users_cache(
    graph: Path, default: Bundle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("JRS_CACHE_DIR", str(tmp_path / "cache"))
    # The one that ships is left as it was installed, whoever runs this.
    shipped = plans.plan_folder(default.graph("encoder"))
    assert default.folder not in shipped.parents
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    elsewhere = plans.plan_folder(graph)
    assert elsewhere not in (shipped, graph.parent / "engines")
    assert elsewhere == plans.plan_folder(graph)


# The command ----------------------------------------------------------------------------------------------


def test_jrs_build(tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from jrs.cli.main import run

    arguments = ["build", str(tiny_bundle), "--library", "tensorrt-rtx", "--capability", "8.6", "--out", str(tmp_path)]
    assert run(arguments) == 0
    out = capsys.readouterr()
    files = [Path(line) for line in out.out.splitlines()]
    assert [f.name.split("-")[0] for f in files] == list(GRAPHS[:4])  # it registers in one pass
    assert all(f.is_file() and f.with_suffix(".json").is_file() for f in files)
    assert "grid_sample" in out.err and "built" in out.err
    before = [f.stat().st_mtime_ns for f in files]
    assert run(arguments) == 0
    assert [f.stat().st_mtime_ns for f in files] == before
    assert "was there" in capsys.readouterr().err
    assert run([*arguments[:-4], "--capability", "GPU", "--out", str(tmp_path)]) == 2
    assert run(["build", str(tiny_bundle), "--library", "tensorflow"]) == 2


# The sampler where TensorRT has none ----------------------------------------------------------------------


class Library:
    """A stand-in that has a name and a version, which is all that is asked of it here."""

    def __init__(self, name: str, version: str) -> None:
        self.__name__, self.__version__ = name, version


@pytest.mark.parametrize(
    ("name", "version", "native"),
    [
        ("tensorrt_rtx", "1.4.0.76", False),
        ("tensorrt_rtx", "1.5.0.114", False),
        ("tensorrt_rtx", "1.6.1.120", True),
        ("tensorrt_rtx", "1.7.1.116", True),
        ("tensorrt", "10.3.0", False),
        ("tensorrt", "10.16.2.5", False),
        ("tensorrt", "11.1.0.10", False),
        ("tensorrt", "11.2.1", True),
        ("tensorrt", "11.4.1.9", True),
    ],
)
def test_which_libraries_sample_volumes(name: str, version: str, native: bool) -> None:
    assert kernel.has_native_sampler(Library(name, version)) is native  # type: ignore[arg-type]


@pytest.fixture
def no_sampler(monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorRT-RTX as if it were TensorRT 10.3: neither GridSample for volumes nor plugins."""
    monkeypatch.setattr(kernel, "has_native_sampler", lambda library: False)
    monkeypatch.setattr(kernel, "takes_plugins", lambda library: False)


@pytest.mark.parametrize("name", ["transformer", "composer"])
def test_a_library_that_cannot_sample_gathers(default: Bundle, no_sampler: None, name: str) -> None:
    """As on JetPack 6."""
    onnx = pytest.importorskip("onnx")
    plan = build(default.graph(name))
    assert (plan.sampler, plan.remark) == ("gather", "") and len(plan.content) > 100_000
    samplers = [n for n in onnx.load(default.graph(name)).graph.node if n.op_type == "JrsGridSample3D"]
    assert "GRID_SAMPLE" not in plan.layers and not any("PLUGIN" in layer for layer in plan.layers)
    # Eight corners each.
    assert plan.layers["GATHER"] >= 8 * len(samplers) > 0


def test_only_what_samples_is_rewritten(default: Bundle, built: dict[str, Plan], no_sampler: None) -> None:
    plan = build(default.graph("registration"))
    assert plan.sampler == "" and plan.layers == built["registration"].layers
    # A plan of another sampler is another plan, where anything is sampled.
    assert plan.key == built["registration"].key
    key = plans.plan_key(trt, default.graph("transformer"), "fp32", AHEAD)
    assert key.kernel_sha256 and not built["transformer"].key.kernel_sha256


def test_the_library_itself_samples_where_it_can(built: dict[str, Plan]) -> None:
    assert built["transformer"].sampler == built["composer"].sampler == "native"
    assert built["encoder"].sampler == ""


class BrokenPlugin(trt.IPluginCreatorV3One):  # type: ignore[misc]
    """A creator that makes nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.name, self.plugin_namespace, self.plugin_version = "JrsGridSample3D", "jrs", "1"
        self.field_names = trt.PluginFieldCollection([])

    def create_plugin(self, name: str, fields: Any, phase: Any) -> Any:
        raise RuntimeError("no plugin")


@pytest.fixture
def broken_plugin(no_sampler: None, on_a_gpu: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A plugin that the library has registered and cannot make, as far as a library without a device can go."""
    registry, creator = trt.get_plugin_registry(), BrokenPlugin()
    assert registry.register_creator(creator, "jrs")
    monkeypatch.setattr(kernel, "takes_plugins", lambda library: True)
    monkeypatch.setattr(kernel, "register_plugin", lambda library, capability: None)
    yield
    assert registry.deregister_creator(creator)


def test_a_plugin_that_does_not_build_is_left_for_gather(default: Bundle, broken_plugin: None) -> None:
    plan = build(default.graph("transformer"))
    assert plan.sampler == "gather" and plan.layers["GATHER"] >= 8
    assert "transformer.onnx" in plan.remark and "\n" not in plan.remark
    # Under the operator's name the parser would have taken the plugin again.
    content = functions.with_gathering(default.graph("transformer").read_bytes())
    logger = tensorrt_log.make_logger(trt)
    network = trt.Builder(logger).create_network(0)
    parser = trt.OnnxParser(network, logger)
    assert not parser.parse(content.replace(b"JrsGatherSample", b"JrsGridSample3D"))


def test_where_neither_builds_both_reasons_are_said(
    default: Bundle, broken_plugin: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(functions, "with_gathering", lambda model: b"nothing")
    text = message(BackendError, default.graph("transformer"))
    assert text.count("transformer.onnx") == 2 and "nor with the plugin" in text


def test_what_was_lacking_for_the_plugin_is_looked_for_again(
    default: Bundle, no_sampler: None, on_a_gpu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By ``jrs build``; ``jrs infer`` keeps what there is."""
    from jrs.cli.build import build_bundle

    def refuse(library: Any, capability: tuple[int, int]) -> None:
        raise BackendError("NVRTC cannot be used")

    monkeypatch.setattr(kernel, "takes_plugins", lambda library: True)
    monkeypatch.setattr(kernel, "register_plugin", refuse)
    records = [path.with_suffix(".json") for path in build_bundle(default, "tensorrt-rtx", AHEAD, tmp_path)]
    remarks = [json.loads(record.read_text(encoding="utf-8"))["remark"] for record in records]
    assert remarks == ["", "", "", "NVRTC cannot be used", "NVRTC cannot be used"]
    before = [record.stat().st_mtime_ns for record in records]
    monkeypatch.setattr(kernel, "takes_plugins", lambda library: False)
    build_bundle(default, "tensorrt-rtx", AHEAD, tmp_path)
    after = [record.stat().st_mtime_ns for record in records]
    assert [old == new for old, new in zip(before, after, strict=True)] == [True, True, True, False, False]
    assert json.loads(records[3].read_text(encoding="utf-8"))["remark"] == ""


def test_the_doctor_says_why_a_library_gathers(
    default: Bundle, no_sampler: None, on_a_gpu: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("JRS_CACHE_DIR", str(tmp_path))
    graph = default.graph("transformer")
    key = plans.plan_key(trt, graph, "fp32", BuildOptions())
    assert plans.gathers_because(trt, graph, "fp32") is None
    for sampler, remark, told in (
        ("native", "", None),
        ("plugin", "", None),
        ("gather", "NVRTC cannot be used", "NVRTC cannot be used"),
        ("gather", "", "no GridSample for volumes"),
    ):
        plans.store_plan(plans.plan_folder(graph), Plan(key, b"plan", sampler=sampler, remark=remark))
        why = plans.gathers_because(trt, graph, "fp32")
        assert (why is None) if told is None else (told in str(why))


def test_the_record_and_the_table_say_which(
    default: Bundle, no_sampler: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from jrs.cli.build import build_bundle

    files = build_bundle(default, "tensorrt-rtx", AHEAD, tmp_path)
    told = {f.name.split("-")[0]: json.loads(f.with_suffix(".json").read_text(encoding="utf-8")) for f in files}
    assert {name: record["sampler"] for name, record in told.items()} == {
        "encoder": "", "segmentation": "", "registration": "", "transformer": "gather", "composer": "gather"
    }  # fmt: skip
    assert capsys.readouterr().err.count("sampler by gather") == 2


def test_a_plugin_that_the_library_refuses_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    reasons = ["no such thing\nand more", "there is one already"]

    def refuse(*arguments: Any) -> None:
        raise ValueError(reasons.pop(0))

    monkeypatch.setattr(kernel, "_registered", {})
    monkeypatch.setattr(kernel, "compile_ptx", lambda capability: b"ptx")
    plugin = types.SimpleNamespace(register=refuse, TensorDesc=None)
    monkeypatch.setattr(kernel, "_plugin_module", lambda library: plugin)
    module = types.SimpleNamespace(__name__="tensorrt", __version__="10.16.2")
    for _ in range(2):  # the second time as well, and not for what the first has left behind
        with pytest.raises(BackendError, match=r"10.16.2 does not take the plugin jrs::\w+ \(no such thing\)"):
            kernel.register_plugin(module, (8, 7))  # type: ignore[arg-type]


def test_without_its_body_the_operator_is_left_to_a_plugin(default: Bundle) -> None:
    onnx = pytest.importorskip("onnx")
    content = default.graph("transformer").read_bytes()
    whole, bare = onnx.load_from_string(content), onnx.load_from_string(functions.without_body(content))
    assert len(whole.functions) >= 1 and not bare.functions
    del whole.functions[:]
    assert bare == whole
    # TensorRT-RTX then looks for a plugin; with the body it samples itself.
    logger = tensorrt_log.make_logger(trt)
    network = trt.Builder(logger).create_network(0)
    parser = trt.OnnxParser(network, logger)
    assert not parser.parse(functions.without_body(content))
    assert "JrsGridSample3D" in " ".join([parser.get_error(0).desc(), *logger.errors])


@pytest.mark.parametrize("content", [b"", b"not a graph" * 20, b"\xff" * 9])
def test_what_is_no_model_stays_as_it_is(content: bytes) -> None:
    assert functions.without_body(content) == functions.with_gathering(content) == content
    assert not functions.samples(content)


@pytest.mark.parametrize(
    ("reason", "memory"),
    [
        ("Cuda Runtime (out of memory)", True),
        ("Error Code 2: OutOfMemory (Requested size was 1 bytes.)", True),
        ("There may not be enough free memory for allocation to succeed.", True),
        ("an illegal memory access was encountered", False),
        ("too much shared memory", False),
    ],
)
def test_which_errors_are_of_memory(reason: str, memory: bool) -> None:
    assert tensorrt_log.tells_of_memory(reason) is memory


def test_the_node_carries_what_the_plugin_registry_asks_for(default: Bundle) -> None:
    onnx = pytest.importorskip("onnx")
    (node,) = [n for n in onnx.load(default.graph("transformer")).graph.node if n.op_type == "JrsGridSample3D"]
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    assert attributes == {"plugin_namespace": b"jrs", "plugin_version": b"1", "aot": 1}
    assert f"{attributes['plugin_namespace'].decode()}::{node.op_type}" == kernel.PLUGIN


def test_so_does_the_one_inside_the_refinements_loop() -> None:
    onnx = pytest.importorskip("onnx")
    from jrs.runtime.refine import GRAPH

    (loop,) = [n for n in onnx.load(str(GRAPH)).graph.node if n.op_type == "Loop"]
    (body,) = [a.g for a in loop.attribute if a.name == "body"]
    (node,) = [n for n in body.node if n.op_type == "JrsGridSample3D"]
    assert {a.name for a in node.attribute} == {"plugin_namespace", "plugin_version", "aot"}


# On a device ----------------------------------------------------------------------------------------------


@no_gpu
def test_without_a_device_the_engine_says_so(default: Bundle) -> None:
    from jrs.runtime.engines.tensorrt import TensorRtRtxEngine

    with pytest.raises(BackendError) as caught:
        TensorRtRtxEngine(default.graph("encoder"), EngineOptions())
    assert "tensorrt-rtx" in str(caught.value) and "CUDA device" in str(caught.value)


@pytest.mark.skipif(not cuda.visible_devices(), reason="needs a GPU")
@pytest.mark.parametrize("backend", ["tensorrt-rtx", "tensorrt", "ort-cuda"])
def test_on_a_gpu_the_graphs_agree_with_the_cpu(default: Bundle, backend: str) -> None:
    from jrs.runtime.engines import why_unavailable
    from jrs.runtime.selftest import run_selftest

    if why_unavailable(backend):
        pytest.skip(str(why_unavailable(backend)))
    result = run_selftest(default, backend, runs=2)
    assert result.passed and np.isfinite(result.case_ms)
