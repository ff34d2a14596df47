"""jrs doctor and jrs selftest: what works is tried, what does not says why."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jrs.cli.main import run
from jrs.errors import BackendError
from jrs.runtime import doctor, selftest
from jrs.runtime.engines import all_backends, available_backends, choose_backend, cuda, on_gpu


def test_doctor_tries_every_backend(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["doctor", "--json"]) == 0
    out = capsys.readouterr()
    found = json.loads(out.out)
    states = {state["name"]: state for state in found["backends"]}
    assert list(states) == all_backends()
    assert {name for name, state in states.items() if state["works"]} == set(available_backends())
    for state in states.values():
        assert state["works"] == (state["reason"] is None)
        assert state["works"] == bool(state["precisions"])
    assert states["ort-cpu"]["works"] and states["ort-cpu"]["device"] == "CPU"
    assert found["healthy"] is True
    assert {library["name"]: library["version"] for library in found["libraries"]}["numpy"] == np.__version__
    assert "backends, best first" in out.err


def test_doctor_prints_what_works(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["doctor"]) == 0
    assert capsys.readouterr().out.strip() == ", ".join(available_backends())


def test_brackets_are_not_taken_for_markup(capsys: pytest.CaptureFixture[str]) -> None:
    from jrs.cli.console import table

    table("t", ("a",), [("pip install 'jrs[cuda]'",)])
    assert "jrs[cuda]" in capsys.readouterr().err


def test_nothing_that_works_is_an_error(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    real = importlib.util.find_spec
    libraries = ("onnxruntime", "openvino", "tensorrt", "tensorrt_rtx")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name in libraries else real(name, *a))
    assert run(["doctor"]) == 69
    assert "no backend works" in capsys.readouterr().err
    assert not doctor.diagnose().healthy


def test_numbers_that_are_wrong_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another expectation than the backend's answer stands for a backend that computes something else."""
    monkeypatch.setattr(doctor, "_filtered", lambda image: np.ones((1, 1, 8, 8, 8), dtype=np.float32))
    state = next(state for state in doctor.diagnose().backends if state.name == "ort-cpu")
    assert not state.works and state.reason == "a convolution comes out wrong"


def test_the_expected_numbers_are_scipys() -> None:
    ndimage = pytest.importorskip("scipy.ndimage")
    image = np.random.default_rng(5).normal(size=(1, 2, 8, 8, 8)).astype(np.float32)
    mean = ndimage.uniform_filter(image[0, 0].astype(float), 3, mode="constant")
    np.testing.assert_allclose(doctor._filtered(image)[0, 0], np.maximum(mean - image[0, 1], 0), atol=1e-6)
    points = np.indices((8, 8, 8)).astype(float)
    points[2] += 0.5
    want = ndimage.map_coordinates(image[0, 1].astype(float), points, order=1, mode="nearest")
    np.testing.assert_allclose(doctor._shifted(image)[0, 1], want, atol=1e-6)


def test_the_probes_are_those_the_code_makes() -> None:
    onnx = pytest.importorskip("onnx")
    from jrs.export.custom_op import probe_models
    from jrs.resources import DATA

    for name, model in probe_models().items():
        onnx.checker.check_model(model)
        assert onnx.load(DATA / "graphs" / f"probe_{name}.onnx") == model


# Which backends there are ---------------------------------------------------------------------------------


def test_auto_prefers_gpus_then_openvino() -> None:
    order = [name for name in all_backends() if name != "ort-tensorrt"]
    assert order == ["tensorrt", "tensorrt-rtx", "ort-cuda", "openvino", "ort-cpu"]
    assert [name for name in all_backends() if on_gpu(name)] == ["tensorrt", "tensorrt-rtx", "ort-cuda", "ort-tensorrt"]


@pytest.mark.skipif(bool(cuda.visible_devices()), reason="a GPU is here")
@pytest.mark.parametrize("backend", ["tensorrt", "tensorrt-rtx", "ort-cuda", "ort-tensorrt"])
def test_a_gpu_backend_without_a_gpu_is_refused_in_one_line(backend: str) -> None:
    assert backend not in available_backends()
    with pytest.raises(BackendError) as caught:
        choose_backend(backend)
    text = str(caught.value)
    assert backend in text and "\n" not in text
    assert "CUDA device" in text or "pip install" in text


# Self-test ------------------------------------------------------------------------------------------------


def test_selftest_compares_every_graph(tiny_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["selftest", "--bundle", str(tiny_bundle), "--backend", "openvino", "--runs", "1", "--json"]) == 0
    out = capsys.readouterr()
    found = json.loads(out.out)
    assert [graph["graph"] for graph in found["graphs"]] == ["encoder", "segmentation", "registration", "transformer"]
    assert [graph["info"]["backend"] for graph in found["graphs"]] == ["openvino"] * 3 + ["ort-cpu"]
    for graph in found["graphs"]:
        assert 0.0 <= graph["error_p99"] <= graph["limit"] and graph["milliseconds"] > 0
    assert found["passed"] and found["case_ms"] > 0
    assert "openvino on CPU, fp32" in out.err and out.err.count("passed") == 4


def test_selftest_fails_where_the_numbers_differ(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(selftest.LIMITS, "bf16", 1e-7)  # what BF16 cannot keep to
    arguments = ["selftest", "--bundle", str(tiny_bundle), "--backend", "openvino", "--precision", "bf16"]
    code = run(arguments)
    out: Any = capsys.readouterr()
    assert code == 70
    assert out.out.startswith("failed") and "FAILED" in out.err


def test_what_would_be_faster_is_remarked(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from jrs.runtime.engines import onnxruntime_gpu

    here = ("ort-cuda", "ort-cpu")
    monkeypatch.setattr(doctor, "why_unavailable", lambda name: None if name in here else "not here")
    monkeypatch.setattr(doctor, "_probe", lambda name: ("Simulated", None))
    monkeypatch.setattr(doctor, "visible_devices", lambda: (cuda.Device("Simulated", (9, 0), 2**33),))
    monkeypatch.setattr(onnxruntime_gpu, "why_slow", lambda: "install more")
    assert run(["doctor", "--json"]) == 0
    out = capsys.readouterr()
    states = {state["name"]: state for state in json.loads(out.out)["backends"]}
    assert states["ort-cuda"]["works"] and states["ort-cuda"]["reason"] is None
    assert states["ort-cuda"]["remark"] == "install more" and states["ort-cpu"]["remark"] is None
    assert "install more" in out.err
