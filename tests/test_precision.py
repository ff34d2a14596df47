"""Reduced precisions: what BF16 graphs are, their arithmetic reproduced on a CPU, the gate on real volumes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
onnx = pytest.importorskip("onnx")

import jrs.export.accuracy  # noqa: E402
import jrs.export.exporter  # noqa: E402
from jrs.architecture import Architecture  # noqa: E402
from jrs.bundle import AccuracyRecord, Bundle  # noqa: E402
from jrs.errors import BackendError  # noqa: E402
from jrs.export.accuracy import _compare, _Outcome, _Pair  # noqa: E402
from jrs.export.exporter import ParityError, export_bundle  # noqa: E402
from jrs.export.graphs import EncoderGraph, SegmentationGraph  # noqa: E402
from jrs.export.parity import GraphSession  # noqa: E402
from jrs.geometry import Geometry  # noqa: E402
from jrs.manifest import GridSpec, ModelSpec  # noqa: E402
from jrs.models.checkpoint import Checkpoint, load_checkpoint  # noqa: E402
from jrs.models.network import JointNet  # noqa: E402
from jrs.runtime.engines import EngineOptions, open_engine  # noqa: E402

SPEC = ModelSpec(
    Architecture(1, 2, 4, norm="instance", head="displacement"),
    ("t1",),
    ("t1",),
    GridSpec((32, 32, 32), (6.0, 6.0, 6.0)),
    labels=("background", "tumor"),
    label_values=(0, 1),
)


@pytest.fixture(scope="module")
def net() -> JointNet:
    torch.manual_seed(2)
    torch.set_num_threads(1)
    made = JointNet(SPEC.architecture).eval()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "norms" in name or name.endswith("bias"):
                parameter.add_(0.1 * torch.randn(parameter.shape))
    return made


@pytest.fixture(scope="module")
def checkpoint(net: JointNet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("precision") / "net.safetensors"
    Checkpoint(SPEC, net.state_dict()).save(path)
    return path


@pytest.fixture(scope="module")
def narrow(checkpoint: Path) -> Bundle:
    return export_bundle(checkpoint, checkpoint.parent / "narrow", "bf16")


def test_a_bf16_bundle_says_so_and_what_it_costs(narrow: Bundle) -> None:
    manifest = narrow.manifest
    assert (manifest.precision, manifest.opset) == ("bf16", 22)
    record = manifest.accuracy["sri24"]
    assert record.passed and record.limits == jrs.export.accuracy.LIMITS["bf16"]
    assert record.field_p99_mm is not None and record.field_max_mm is not None and record.labels_share is not None
    # Something is rounded, and little.
    assert 0.0 < record.field_p99_mm <= record.field_max_mm < 1.0
    assert 0.0 <= record.labels_share < 0.01


def types(path: Path, op: str) -> set[int]:
    """Element types of the weights of all nodes of a kind."""
    model = onnx.load(path)
    kinds = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    return {kinds[node.input[1]] for node in model.graph.node if node.op_type == op}


def test_where_bf16_is(narrow: Bundle) -> None:
    bf16, fp32 = onnx.TensorProto.BFLOAT16, onnx.TensorProto.FLOAT
    assert types(narrow.graph("encoder"), "Conv") == {bf16}
    for decoder in ("segmentation", "registration"):
        assert types(narrow.graph(decoder), "Conv") == {bf16, fp32}
        assert types(narrow.graph(decoder), "ConvTranspose") == {fp32}
    for name in narrow.manifest.graphs:
        for value in (*onnx.load(narrow.graph(name)).graph.input, *onnx.load(narrow.graph(name)).graph.output):
            assert value.type.tensor_type.elem_type == fp32


def test_the_weights_come_back_rounded(narrow: Bundle, net: JointNet) -> None:
    back = load_checkpoint(narrow.folder).weights
    for name, value in net.state_dict().items():
        np.testing.assert_allclose(back[name].numpy(), value.numpy(), rtol=2**-8, atol=1e-30, err_msg=name)


def test_rounded_fp32_is_what_pytorch_computes_in_bf16(narrow: Bundle, net: JointNet) -> None:
    """PyTorch's own BF16 kernels: FP32 sums, results rounded."""
    graphs = {name: onnx.load(narrow.graph(name)) for name in ("encoder", "segmentation")}
    image = torch.randn(1, 1, 32, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        codes = EncoderGraph(net, "bf16")(image)
        probabilities = SegmentationGraph(net, "bf16")(*codes)
        exact = net.encoder(image)
    got = GraphSession(graphs["encoder"])(image=image.numpy())
    # A sum in another order rounds to the other side now and then, and every level adds to that.
    for name, ours, fp32, share in zip(got, codes, exact, (0.05, 0.2, 1.0, 1.0, 1.0), strict=True):
        assert got[name].dtype == np.float32
        # All values are BF16 numbers, near PyTorch's, and nearer to them than to FP32's.
        assert not (got[name].view(np.uint32) & 0xFFFF).any()
        apart = np.abs(got[name] - ours.numpy())
        rounding = np.abs(ours.numpy() - fp32.numpy())
        assert apart.mean() < share * rounding.mean()
    feed = {f"code{k + 1}": code.numpy() for k, code in enumerate(codes)}
    probable = GraphSession(graphs["segmentation"])(**feed)["probabilities"]
    np.testing.assert_allclose(probable, probabilities.numpy(), atol=0.02)


def test_bf16_on_a_cpu_is_openvinos(narrow: Bundle, net: JointNet) -> None:
    graph, options = narrow.graph("encoder"), EngineOptions("fp32", 1, "bf16")
    with pytest.raises(BackendError, match="openvino"):
        open_engine(graph, "encoder", "ort-cpu", options)
    pytest.importorskip("openvino")
    image = np.random.default_rng(0).normal(size=(1, 1, 32, 32, 32)).astype(np.float32)
    with torch.no_grad():
        want = net.encoder(torch.from_numpy(image))[0].numpy()
    with open_engine(graph, "encoder", "openvino", options) as engine:
        got = engine({"image": image})["code1"]
    assert np.abs(got - want).max() < 0.15 * want.std()


# The gate -------------------------------------------------------------------------------------------------


def test_a_precision_that_costs_too_much_writes_nothing(
    checkpoint: Path, narrow: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    traced = {name: onnx.load(narrow.graph(name)) for name in narrow.manifest.graphs}
    monkeypatch.setattr(jrs.export.exporter, "build_graphs", lambda *arguments: traced)
    monkeypatch.setitem(jrs.export.accuracy.LIMITS, "bf16", (1e-9, 1.0, 100.0))
    with pytest.raises(ParityError, match=r"bf16 costs too much on sri24.*--precision fp32"):
        export_bundle(checkpoint, checkpoint.parent / "gate", "bf16")
    assert not (checkpoint.parent / "gate").exists()


def test_what_is_measured() -> None:
    """A shift of a tenth of a voxel of 5 mm in half the brain; 3 of 512 labels changed; a fold in a plane of eight."""
    affine = np.diag([5.0, 5.0, 5.0, 1.0])
    image = np.ones((1, 1, 8, 8, 8), dtype=np.float32)
    pair = _Pair("made", image, image, Geometry((8, 8, 8), affine))
    still = np.zeros((3, 8, 8, 8), dtype=np.float32)
    labels = np.zeros((8, 8, 8), dtype=np.int64)
    shifted, others = still.copy(), labels.copy()
    shifted[1, 4:] = 0.1
    others.flat[:3] = 1
    record = _compare(pair, _Outcome(still, labels), _Outcome(shifted, others), (0.6, 0.01, 0.0))
    assert record.field_p99_mm == pytest.approx(0.5) and record.field_max_mm == pytest.approx(0.5)
    assert record.labels_share == 3 / 512
    assert record.folding_percent == record.folding_fp32_percent == 0.0
    assert record.passed
    folded = still.copy()
    folded[0, 3], folded[0, 5] = 2.0, -2.0  # the plane between: a slope of -2 voxels a voxel
    record = _compare(pair, _Outcome(still, None), _Outcome(folded, None), (100.0, 0.0, 1.0))
    assert record.folding_percent == pytest.approx(100 / 8) and record.labels_share is None
    assert not record.passed


@pytest.mark.parametrize(("field", "share", "folding"), [(0.2, 0.0, 0.0), (0.0, 0.02, 0.0), (0.0, 0.0, 0.7)])
def test_each_limit_counts(field: float, share: float, folding: float) -> None:
    assert not AccuracyRecord(field, field, share, 1.0 + folding, 1.0, (0.1, 0.01, 0.5)).passed
    assert AccuracyRecord(0.1, 9.0, 0.01, 1.5, 1.0, (0.1, 0.01, 0.5)).passed
    assert AccuracyRecord(None, None, 0.0, None, None, (0.1, 0.01, 0.5)).passed


def test_the_command_refuses_what_there_is_not(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from jrs.cli.main import run

    assert run(["export", str(checkpoint), "--out", "nowhere", "--precision", "int8"]) == 2
    assert "fp32, fp16 or bf16" in capsys.readouterr().err
    assert run(["export", str(checkpoint), "--out", "nowhere", "--precision", "bf16", "--fp16"]) == 2
