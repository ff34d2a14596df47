"""Every backend computes what onnx's own reference and PyTorch compute, and says so when it cannot run."""

from __future__ import annotations

import gc
import importlib.util
import sys
import types
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jrs.errors import BackendError, JrsError, OutOfMemoryError, UsageError
from jrs.runtime import engines
from jrs.runtime.engines import EngineOptions, available_backends, choose_backend, hosted, open_engine

onnx = pytest.importorskip("onnx")
reference = pytest.importorskip("onnx.reference")

SHAPE = (8, 6, 10)
BACKENDS = available_backends()
ONE = EngineOptions("fp32", 1)


@pytest.fixture(scope="module")
def weights() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    sizes = {"w1": (4, 2, 3, 3, 3), "b1": (4,), "w2": (6, 4, 2, 2, 2), "b2": (6,)}
    return {name: rng.normal(scale=0.3, size=size).astype(np.float32) for name, size in sizes.items()}


@pytest.fixture(scope="module")
def graph(weights: Mapping[str, np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """image (1,2,X,Y,Z) to code1 (residual 3x3x3 convolution, ReLU) and code2 (2x2x2, stride 2)."""
    h = onnx.helper
    nodes = [
        h.make_node("Conv", ["image", "w1", "b1"], ["a"], kernel_shape=[3, 3, 3], pads=[1] * 6),
        h.make_node("Relu", ["a"], ["code1"]),
        h.make_node("Conv", ["code1", "w2", "b2"], ["b"], kernel_shape=[2, 2, 2], strides=[2, 2, 2]),
        h.make_node("Relu", ["b"], ["code2"]),
    ]
    value = h.make_tensor_value_info
    half = [n // 2 for n in SHAPE]
    model = h.make_model(
        h.make_graph(
            nodes,
            "encoder",
            [value("image", 1, [1, 2, *SHAPE])],
            [value("code1", 1, [1, 4, *SHAPE]), value("code2", 1, [1, 6, *half])],
            [onnx.numpy_helper.from_array(array, name) for name, array in weights.items()],
        ),
        opset_imports=[h.make_opsetid("", 20)],
        ir_version=10,
    )
    path = tmp_path_factory.mktemp("engine") / "bundle7" / "encoder.onnx"
    path.parent.mkdir()
    onnx.save(model, path)
    return path


@pytest.fixture
def image() -> np.ndarray:
    return np.random.default_rng(1).normal(size=(1, 2, *SHAPE)).astype(np.float32)


def by_reference(graph: Path, image: np.ndarray) -> Any:
    """code1 and code2 as onnx's own evaluator computes them."""
    return reference.ReferenceEvaluator(str(graph)).run(None, {"image": image})


def worst(got: np.ndarray, want: np.ndarray) -> float:
    """Largest error relative to the deviation."""
    return float(np.abs(got.astype(float) - want).max() / want.std())


# The same numbers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_backend_agrees_with_onnx_reference_and_torch(
    graph: Path, image: np.ndarray, weights: Mapping[str, np.ndarray], backend: str
) -> None:
    torch = pytest.importorskip("torch")
    expected = by_reference(graph, image)
    w = {name: torch.from_numpy(array) for name, array in weights.items()}
    code1 = torch.relu(torch.nn.functional.conv3d(torch.from_numpy(image), w["w1"], w["b1"], padding=1))
    code2 = torch.relu(torch.nn.functional.conv3d(code1, w["w2"], w["b2"], stride=2))
    with open_engine(graph, "encoder", backend, ONE) as engine:
        got = engine({"image": image})
        assert (engine.info.backend, engine.info.device, engine.info.precision) == (backend, "CPU", "fp32")
    assert list(got) == ["code1", "code2"]
    for name, onnx_says, torch_says in zip(got, expected, (code1.numpy(), code2.numpy()), strict=True):
        assert got[name].dtype == np.float32
        assert worst(got[name], onnx_says) < 1e-5
        assert worst(got[name], torch_says) < 1e-5


@pytest.mark.skipif("openvino" not in BACKENDS, reason="needs OpenVINO")
def test_bf16_is_near_and_says_so(graph: Path, image: np.ndarray) -> None:
    expected = by_reference(graph, image)
    with open_engine(graph, "encoder", "openvino", EngineOptions("bf16", 1)) as engine:
        got = engine({"image": image})
        assert engine.info.precision == "bf16"
    for name, want in zip(("code1", "code2"), expected, strict=True):
        assert got[name].dtype == np.float32
        assert worst(got[name], want) < 0.08


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("threads", [None, 1, 2])
def test_threads_do_not_change_the_numbers(graph: Path, image: np.ndarray, backend: str, threads: int | None) -> None:
    want = by_reference(graph, image)[1]
    with open_engine(graph, "encoder", backend, EngineOptions("fp32", threads)) as engine:
        assert worst(engine({"image": image})["code2"], want) < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_are_not_changed_and_results_stay(graph: Path, image: np.ndarray, backend: str) -> None:
    before = image.copy()
    image.setflags(write=False)
    with open_engine(graph, "encoder", backend, ONE) as engine:
        first = engine({"image": image})
        kept = {name: array.copy() for name, array in first.items()}
        second = engine({"image": -2.0 * image})
        assert not np.array_equal(second["code1"], first["code1"])
        again = engine({"image": image})
    np.testing.assert_array_equal(image, before)
    for name, array in first.items():
        # A later run must not overwrite an earlier one's results: an atlas's codes are kept.
        np.testing.assert_array_equal(array, kept[name])
        np.testing.assert_array_equal(again[name], kept[name])


@pytest.mark.parametrize("backend", BACKENDS)
def test_results_outlive_the_engine(graph: Path, image: np.ndarray, backend: str) -> None:
    with open_engine(graph, "encoder", backend, ONE) as engine:
        result = engine({"image": image})["code1"]
        kept = result.copy()
    del engine
    gc.collect()
    np.testing.assert_array_equal(result, kept)


def test_the_transformer_runs_where_the_custom_op_does() -> None:
    """OpenVINO has no 5-D GridSample: whatever the backend, this graph goes to ONNX Runtime, in FP32."""
    from scipy import ndimage

    from jrs.resources import DATA

    volume = np.random.default_rng(2).normal(size=(1, 1, 5, 6, 7)).astype(np.float32)
    coords = np.random.default_rng(3).uniform(0, 4, (1, 3, 4, 4, 4)).astype(np.float32)
    want = ndimage.map_coordinates(volume[0, 0], coords[0].astype(float), order=1)
    for backend, precision in (("openvino", "bf16"), ("ort-cpu", "fp32")):
        options = EngineOptions(precision, 1)
        with open_engine(DATA / "graphs" / "sampler.onnx", "transformer", backend, options) as engine:
            assert (engine.info.backend, engine.info.precision) == ("ort-cpu", "fp32")
            np.testing.assert_allclose(engine({"volume": volume, "coords": coords})["sampled"][0, 0], want, atol=1e-5)


# Choosing -------------------------------------------------------------------------------------------------


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Let find_spec know only the named libraries."""

    def only(*names: str) -> None:
        real = importlib.util.find_spec

        def find_spec(name: str, *rest: Any) -> Any:
            if name in ("openvino", "onnxruntime"):
                return object() if name in names else None
            return real(name, *rest)

        monkeypatch.setattr(importlib.util, "find_spec", find_spec)

    return only


def refusal(kind: type[JrsError], *arguments: Any) -> str:
    with pytest.raises(JrsError) as caught:
        choose_backend(*arguments)
    message = str(caught.value)
    assert type(caught.value) is kind, message
    assert "\n" not in message
    return message


def test_auto_prefers_openvino_in_fp32(installed: Any) -> None:
    installed("openvino", "onnxruntime")
    assert available_backends() == ["openvino", "ort-cpu"]
    assert choose_backend() == ("openvino", "fp32")
    assert choose_backend("auto", "bf16") == ("openvino", "bf16")
    assert choose_backend("ort-cpu") == ("ort-cpu", "fp32")
    installed("onnxruntime")
    assert available_backends() == ["ort-cpu"]
    assert choose_backend() == ("ort-cpu", "fp32")


def test_an_unknown_backend_or_precision_lists_the_valid_ones() -> None:
    message = refusal(UsageError, "tensorflow")
    assert "tensorflow" in message
    assert all(name in message for name in ("auto", "openvino", "ort-cpu"))
    message = refusal(UsageError, "auto", "int8")
    assert "int8" in message
    assert all(name in message for name in ("auto", "fp32", "bf16"))


def test_a_backend_that_is_not_installed_says_what_to_install(installed: Any) -> None:
    installed("onnxruntime")
    assert "pip install openvino" in refusal(BackendError, "openvino")
    assert "openvino" in refusal(BackendError, "auto", "bf16")
    installed()
    assert "pip install" in refusal(BackendError, "auto")
    assert "pip install onnxruntime" in refusal(BackendError, "ort-cpu")


def test_a_precision_that_a_backend_does_not_offer_is_refused(graph: Path) -> None:
    with pytest.raises(BackendError, match="fp32"):
        open_engine(graph, "encoder", "ort-cpu", EngineOptions("bf16", 1))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_library_that_cannot_be_imported_is_one_line(
    graph: Path, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:

    library = engines._BACKENDS[backend][0]
    monkeypatch.setitem(sys.modules, library, None)  # what a broken install looks like
    with pytest.raises(BackendError) as caught:
        open_engine(graph, "encoder", backend, ONE)
    assert backend in str(caught.value) and "\n" not in str(caught.value)


# Damage ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("content", [b"", b"not a graph" * 50, None], ids=["empty", "text", "absent"])
def test_a_graph_that_cannot_be_loaded_is_named(
    tmp_path: Path, backend: str, content: bytes | None
) -> None:
    path = tmp_path / "bundle7" / "encoder.onnx"
    path.parent.mkdir()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(BackendError) as caught:
        open_engine(path, "encoder", backend, ONE)
    message = str(caught.value)
    assert "bundle7/encoder.onnx" in message and "\n" not in message


@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_that_do_not_fit_are_one_line(graph: Path, backend: str) -> None:
    wrong = np.zeros((1, 3, *SHAPE), dtype=np.float32)
    with open_engine(graph, "encoder", backend, ONE) as engine:
        for inputs in ({"image": wrong}, {"picture": wrong[:, :2]}):
            with pytest.raises(BackendError) as caught:
                engine(inputs)
            message = str(caught.value)
            assert backend in message and "bundle7/encoder.onnx" in message and "\n" not in message


# Leaving --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_leaving_releases_the_backends_memory(graph: Path, image: np.ndarray, backend: str) -> None:
    with open_engine(graph, "encoder", backend, ONE) as engine:
        engine({"image": image})
        native = weakref.ref(engine._native)  # type: ignore[attr-defined]
        assert native() is not None
    gc.collect()
    assert native() is None
    with pytest.raises(BackendError):
        engine({"image": image})


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_error_inside_is_not_swallowed(graph: Path, backend: str) -> None:
    with pytest.raises(ZeroDivisionError), open_engine(graph, "encoder", backend, ONE):
        raise ZeroDivisionError


# A real bundle --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_network_of_a_bundle_agrees_with_torch(tiny_bundle: Path, backend: str) -> None:
    torch = pytest.importorskip("torch")
    from jrs.bundle import Bundle
    from jrs.models.checkpoint import load_checkpoint
    from jrs.runtime.network import Network

    net = load_checkpoint(tiny_bundle.parent / "tiny.safetensors").network()
    rng = np.random.default_rng(5)
    moving, fixed = (rng.normal(size=(1, 4, 32, 32, 32)).astype(np.float32) for _ in range(2))
    with torch.no_grad():
        want = net(torch.from_numpy(moving), torch.from_numpy(fixed))
    with Network(Bundle.open(tiny_bundle), backend, "fp32", 1) as network:
        codes = {name: network.encode(array) for name, array in (("moving", moving), ("fixed", fixed))}
        probabilities = network.segment(moving, codes["moving"])
        registered = network.register(moving, codes["moving"], codes["fixed"])
        assert network.info.backend == backend
    assert list(codes["moving"]) == ["code1", "code2", "code3", "code4", "code5"]
    assert probabilities.shape == (4, 32, 32, 32)
    np.testing.assert_allclose(probabilities, want.moving_probabilities.numpy()[0], atol=1e-3)
    np.testing.assert_allclose(probabilities.sum(axis=0), 1.0, atol=1e-5)
    # The displacement head: the flow itself is u, in voxels.
    np.testing.assert_allclose(registered.displacement, want.flow.numpy(), atol=1e-3)
    np.testing.assert_allclose(registered.moved, want.moved.numpy(), atol=5e-3)
    assert np.abs(registered.displacement).max() > 0.05


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("orientation", "axis"), [("RAS", 0), ("PIL", 2)])
def test_mirroring_averages_both_sides(
    tiny_bundle: Path, changed_bundle: Any, backend: str, orientation: str, axis: int
) -> None:
    """PyTorch's own probabilities of an image and of the one with left and right exchanged."""
    torch = pytest.importorskip("torch")
    from jrs.bundle import Bundle
    from jrs.models.checkpoint import load_checkpoint
    from jrs.runtime.network import Network

    def change(manifest: dict[str, Any]) -> None:
        manifest["model"]["mirroring"] = True
        manifest["model"]["grid"]["orientation"] = orientation

    bundle = Bundle.open(changed_bundle(change))
    net = load_checkpoint(tiny_bundle.parent / "tiny.safetensors").network()
    image, _ = two_images()
    tensor = torch.from_numpy(image)
    with torch.no_grad():
        plain = net(tensor, tensor).moving_probabilities[0]
        flipped = tensor.flip(2 + axis)
        back = net(flipped, flipped).moving_probabilities[0].flip(1 + axis)
    assert float((plain - back).abs().max()) > 0.01
    with Network(bundle, backend, "fp32", 1) as network:
        codes = network.encode(image)
        got = network.segment(image, codes)
        # Nothing that others may still hold is changed.
        np.testing.assert_array_equal(network.segment(image, codes), got)
    np.testing.assert_allclose(got, ((plain + back) / 2).numpy(), atol=1e-3)


# Devices --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("last", [1, 2, 3, 4])
def test_mirrored_segmentation_goes_on_on_the_cpu(
    full_device: None, changed_bundle: Any, last: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever the device's memory ends: codes that lie there are still read."""
    from jrs.bundle import Bundle
    from jrs.runtime.network import Network

    monkeypatch.setitem(engines._BACKENDS, "full", ("numpy", __name__, "FillingDevice"))
    monkeypatch.setattr(sys.modules[__name__], "FillingDevice", FillingDevice, raising=False)
    monkeypatch.setattr(FillingDevice, "last", last)
    monkeypatch.setattr(FillingDevice, "runs", 0)
    bundle = Bundle.open(changed_bundle(lambda manifest: manifest["model"].update(mirroring=True)))
    image, _ = two_images()
    with Network(bundle, "ort-cpu", "fp32", 1) as network:
        want = network.segment(image, network.encode(image))
    with Network(bundle, threads=1) as network:
        got = network.segment(image, network.encode(image))
        assert network.notes == [f"GPU of 1 byte: out of device memory; went on with {BACKENDS[0]}"]
        assert network.info.backend == BACKENDS[0] and FillingDevice.runs == last
    np.testing.assert_allclose(got, want, atol=1e-3)


def test_outputs_bound_on_the_device_are_taken_in_place(graph: Path, image: np.ndarray, tmp_path: Path) -> None:
    """The half of the CUDA backend that a CPU has: inputs and outputs bound, one graph's outputs the next one's."""
    onnxruntime = pytest.importorskip("onnxruntime")
    from jrs.runtime.engines.onnxruntime_gpu import BoundSession, OrtArray

    h, value = onnx.helper, onnx.helper.make_tensor_value_info
    shape = [1, 4, *SHAPE]
    twice = h.make_graph(
        [h.make_node("Add", ["code1", "code1"], ["twice"])], "g", [value("code1", 1, shape)], [value("twice", 1, shape)]
    )
    onnx.save(h.make_model(twice, opset_imports=[h.make_opsetid("", 20)], ir_version=10), tmp_path / "twice.onnx")
    want = by_reference(graph, image)[0]
    first, second = (
        BoundSession(onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"]), "cpu")
        for path in (graph, tmp_path / "twice.onnx")
    )
    kept = first.run({"image": image})
    assert isinstance(kept["code1"], OrtArray) and kept["code1"].shape == want.shape
    other = first.run({"image": -image})["code1"].numpy()
    got = second.run({"code1": kept["code1"]})["twice"].numpy()
    np.testing.assert_allclose(got, 2 * want, atol=1e-5)
    np.testing.assert_allclose(kept["code1"].numpy(), want, atol=1e-5)
    assert not np.allclose(other, want)
    with pytest.raises(ValueError, match="picture"):
        first.run({"picture": image})


class FullDevice:
    """A GPU backend whose memory ends at the registration: what a real one raises, raised here."""

    def __init__(self, graph: Path, options: EngineOptions) -> None:
        from jrs.runtime.engines.onnxruntime import OnnxRuntimeEngine

        self.name = graph.stem
        self.engine = OnnxRuntimeEngine(graph, EngineOptions("fp32", 1))
        self.info = engines.EngineInfo("full", "GPU of 1 byte", options.graph_precision)

    def keep(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        if self.name == "registration":
            raise OutOfMemoryError("GPU of 1 byte: out of device memory")
        return {name: Handle(array) for name, array in self.engine(inputs).items()}

    def place(self, array: np.ndarray) -> Handle:
        return Handle(array)

    def __enter__(self) -> FullDevice:
        return self

    def __exit__(self, *rest: Any) -> None:
        self.engine.__exit__(*rest)


class FillingDevice(FullDevice):
    """One whose memory ends at the run of this number, whatever the graph."""

    last, runs = 0, 0

    def keep(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        FillingDevice.runs += 1
        if FillingDevice.runs == FillingDevice.last:
            raise OutOfMemoryError("GPU of 1 byte: out of device memory")
        return {name: Handle(array) for name, array in self.engine(hosted(inputs)).items()}


class BrokenDevice:
    """A GPU backend whose library does not fit its driver."""

    def __init__(self, graph: Path, options: EngineOptions) -> None:
        raise BackendError("backend broken: the driver is too old")


def two_images() -> list[np.ndarray]:
    """A moving and a fixed one, of noise, for the tiny bundle."""
    return [np.random.default_rng(k).normal(size=(1, 4, 32, 32, 32)).astype(np.float32) for k in (0, 1)]


class Handle:
    """Memory that only its ``numpy`` shows."""

    def __init__(self, array: np.ndarray) -> None:
        self._array, self.shape = array, array.shape

    def numpy(self) -> np.ndarray:
        return self._array.copy()


@pytest.fixture
def full_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "_BACKENDS", {"full": ("numpy", __name__, "FullDevice"), **engines._BACKENDS})
    monkeypatch.setattr(engines, "_ON_GPU", ("full",))
    monkeypatch.setattr(engines, "why_unavailable", lambda name: None if name in ("full", *BACKENDS) else "not here")
    monkeypatch.setitem(sys.modules, __name__, sys.modules.get(__name__, types.SimpleNamespace(FullDevice=FullDevice)))


class KeepingDevice(FullDevice):
    """A GPU backend that works: what comes out of a graph is shown only when it is asked for."""

    from_host: list[str] = []  # noqa: RUF012

    def keep(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        self.from_host.extend(f"{self.name} {name}" for name, value in inputs.items() if isinstance(value, np.ndarray))
        return {name: Handle(array) for name, array in self.engine(inputs).items()}


def test_several_passes_on_a_device(full_device: None, several_passes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the passes nothing leaves the device: the image is placed there once, and encoded."""
    from jrs.bundle import Bundle
    from jrs.runtime.network import Network

    monkeypatch.setattr(engines, "_BACKENDS", {**engines._BACKENDS, "full": ("numpy", __name__, "KeepingDevice")})
    monkeypatch.setattr(sys.modules[__name__], "KeepingDevice", KeepingDevice, raising=False)
    monkeypatch.setattr(KeepingDevice, "from_host", [])
    bundle = Bundle.open(several_passes(3))
    moving, fixed = two_images()
    found = []
    for backend in ("ort-cpu", "full"):
        with Network(bundle, backend, "fp32", 1) as network:
            found.append(network.register(moving, network.encode(moving), network.encode(fixed)))
    want, got = found
    assert type(got.moved) is type(got.displacement) is np.ndarray and np.abs(want.displacement).max() > 0.1
    np.testing.assert_allclose(got.displacement, want.displacement, atol=2e-3)
    np.testing.assert_allclose(got.moved, want.moved, atol=5e-3)
    assert KeepingDevice.from_host == ["encoder image"] * 2


class LateDevice(KeepingDevice):
    """A GPU backend that is lost at a run of a graph (``fails``), or, for ``results``, when results are copied."""

    fails = ("", 0)
    runs: list[str] = []  # noqa: RUF012

    def keep(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        outputs = super().keep(inputs)
        self.runs.append(self.name)
        if (self.name, self.runs.count(self.name)) == self.fails:
            raise BackendError("backend full: the device is lost")
        if self.fails == ("results", 0) and self.name in ("segmentation", "composer"):
            return {name: Lost(value.numpy()) for name, value in outputs.items()}
        return outputs


class Lost(Handle):
    """Memory that cannot be read any more."""

    def numpy(self) -> np.ndarray:
        raise BackendError("backend full: the device is lost")


@pytest.mark.parametrize(
    "fails",
    [(graph, run) for graph in ("registration", "transformer", "encoder") for run in (1, 2)]
    + [("encoder", 3), ("composer", 1), ("results", 0)],
)
def test_auto_leaves_a_device_in_the_middle_of_several_passes(
    full_device: None, several_passes: Any, monkeypatch: pytest.MonkeyPatch, fails: tuple[str, int]
) -> None:
    from jrs.bundle import Bundle
    from jrs.runtime.network import Network

    monkeypatch.setattr(engines, "_BACKENDS", {**engines._BACKENDS, "full": ("numpy", __name__, "LateDevice")})
    monkeypatch.setattr(sys.modules[__name__], "LateDevice", LateDevice, raising=False)
    monkeypatch.setattr(LateDevice, "fails", fails)
    monkeypatch.setattr(LateDevice, "runs", [])
    bundle = Bundle.open(several_passes(2))
    moving, fixed = two_images()
    found = []
    for backend in ("ort-cpu", "auto"):
        with Network(bundle, backend, "fp32", 1) as network:
            codes = [network.encode(image) for image in (moving, fixed)]
            probabilities = network.segment(moving, codes[0])
            found.append((probabilities, network.register(moving, *codes)))
    assert network.notes == [f"backend full: the device is lost; went on with {BACKENDS[0]}"]
    (want_p, want), (got_p, got) = found
    np.testing.assert_allclose(got_p, want_p, atol=5e-3)
    np.testing.assert_allclose(got.displacement, want.displacement, atol=2e-3)
    np.testing.assert_allclose(got.moved, want.moved, atol=5e-3)


def test_an_error_on_the_cpu_copies_nothing(tiny_bundle: Path) -> None:
    """What is to be done next with the codes is nobody's business then, and memory may have run out."""
    from jrs.bundle import Bundle
    from jrs.runtime.network import Network

    def full(inputs: Mapping[str, Any]) -> Any:
        raise OutOfMemoryError("out of memory")

    held = Lost(np.zeros((1, 4, 32, 32, 32), np.float32))
    with Network(Bundle.open(tiny_bundle), "ort-cpu", "fp32", 1) as network:
        network._engine("segmentation").keep = full  # type: ignore[method-assign]
        with pytest.raises(OutOfMemoryError, match="out of memory"):
            network.segment(two_images()[0], {"code1": held})


def test_ort_cuda_copies_itself_where_cuda_python_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    from jrs.runtime.engines import onnxruntime_gpu

    for error in (RuntimeError("no symbol"), OutOfMemoryError("full"), BackendError("no device")):

        def refuse(error: Exception = error) -> Any:
            raise error

        monkeypatch.setattr(onnxruntime_gpu, "shared_session", refuse)
        assert onnxruntime_gpu._copying_session() is None
        assert "jrs[cuda]" in str(onnxruntime_gpu.why_slow())


def test_auto_goes_on_with_the_next_library_then_the_cpu(
    full_device: None, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from jrs.bundle import Bundle
    from jrs.runtime.network import Network

    monkeypatch.setattr(engines, "_BACKENDS", {"broken": ("numpy", __name__, "BrokenDevice"), **engines._BACKENDS})
    monkeypatch.setattr(engines, "_ON_GPU", ("broken", "full"))
    here = ("broken", "full", *BACKENDS)
    monkeypatch.setattr(engines, "why_unavailable", lambda name: None if name in here else "not here")
    monkeypatch.setattr(sys.modules[__name__], "BrokenDevice", BrokenDevice, raising=False)
    assert engines.fallbacks("broken", gpus=True) == ["full", *BACKENDS]
    assert engines.fallbacks("broken", gpus=False) == BACKENDS == engines.fallbacks("full", gpus=True)
    image = np.random.default_rng(0).normal(size=(1, 4, 32, 32, 32)).astype(np.float32)
    with Network(Bundle.open(tiny_bundle), threads=1) as network:
        assert network.backend == "broken"
        codes = network.encode(image)
        assert network.backend == "full"
        network.register(image, codes, codes)
        assert network.notes == [
            "backend broken: the driver is too old; went on with full",
            f"GPU of 1 byte: out of device memory; went on with {BACKENDS[0]}",
        ]


def test_auto_leaves_a_full_device_and_says_so(full_device: None, tiny_bundle: Path) -> None:
    from jrs.bundle import Bundle
    from jrs.runtime.network import Network

    bundle = Bundle.open(tiny_bundle)
    moving, fixed = two_images()
    with Network(bundle, "ort-cpu", "fp32", 1) as network:
        want = network.register(moving, network.encode(moving), network.encode(fixed))
    with Network(bundle, threads=1) as network:
        assert network.backend == "full" and network.info.device == "GPU of 1 byte"
        codes = [network.encode(image) for image in (moving, fixed)]
        got = network.register(moving, *codes)
        assert network.notes == [f"GPU of 1 byte: out of device memory; went on with {BACKENDS[0]}"]
        assert network.info.backend == BACKENDS[0]
        assert network.segment(moving, codes[0]).shape == (4, 32, 32, 32)
    np.testing.assert_allclose(got.displacement, want.displacement, atol=1e-3)
    with Network(bundle, "full", threads=1) as network:
        codes = [network.encode(image) for image in (moving, fixed)]
        with pytest.raises(OutOfMemoryError) as caught:
            network.register(moving, *codes)
    assert caught.value.exit_code == 75


@pytest.mark.parametrize(("capability", "runs"), [((8, 6), True), ((12, 1), True), ((9, 0), False), ((7, 5), False)])
def test_tensorrt_rtx_is_offered_where_it_runs(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], runs: bool
) -> None:
    """An H200 with TensorRT-RTX 1.7: "Supported compute capabilities: 8.0 8.6 8.9 12.0 12.1 >12.0"."""
    from jrs.runtime.engines import cuda

    monkeypatch.setattr(engines, "_installed", lambda name: True)
    monkeypatch.setattr(cuda, "visible_devices", lambda: (cuda.Device("Simulated", capability, 2**33),))
    lacking = engines.why_unavailable("tensorrt-rtx")
    assert (lacking is None) is runs
    assert runs or "capability {}.{}; use tensorrt or ort-cuda".format(*capability) in str(lacking)
    assert engines.why_unavailable("tensorrt") is None


@pytest.mark.parametrize("version", ["1.22.0", "1.24.4"])
@pytest.mark.parametrize("name", ["transformer", "composer"])
def test_an_onnxruntime_whose_cuda_samples_no_volumes_gathers(name: str, version: str) -> None:
    import onnxruntime

    from jrs.bundle import Bundle
    from jrs.runtime.engines.onnxruntime_gpu import loadable

    bundle = Bundle.open()
    graph = bundle.graph(name)
    assert loadable(graph, "1.25.0") == str(graph) and loadable(graph, "2.0") == str(graph)
    model = loadable(graph, version)
    assert "GridSample" not in {n.op_type for f in onnx.load_from_string(model).functions for n in f.node}
    old, new = (onnxruntime.InferenceSession(m, providers=["CPUExecutionProvider"]) for m in (model, str(graph)))
    rng = np.random.default_rng(0)
    feed = {i.name: rng.normal(size=i.shape).astype(np.float32) for i in new.get_inputs()}
    for got, want in zip(old.run(None, feed), new.run(None, feed), strict=True):
        # GridSample takes coordinates from -1 to 1, whose rounding moves a point by some 1e-5 voxels.
        np.testing.assert_allclose(got, want, atol=1e-3)
        assert np.abs(got - want).mean() < 1e-5
    encoder = bundle.graph("encoder")
    assert loadable(encoder, version) == encoder.read_bytes()
