"""Which precision ``auto`` takes: BF16 where the processor has it and the bundle bears it, the same each time."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jrs.bundle import Bundle
from jrs.cli.main import run
from jrs.errors import OutOfMemoryError
from jrs.geometry import Geometry
from jrs.manifest import ModelSpec
from jrs.runtime import machine, precision
from jrs.runtime.caching import Store
from jrs.runtime.engines import available_backends
from jrs.runtime.network import Network, engine_options
from jrs.runtime.precision import Verdict, choose_precision, compare, reference_pair, verdict_of

GOOD = Verdict(0.04, 0.9999)
BAD = Verdict(0.2, 0.9999)
needs_openvino = pytest.mark.skipif("openvino" not in available_backends(), reason="needs OpenVINO")


@pytest.fixture
def bundle(tiny_bundle: Path) -> Bundle:
    return Bundle.open(tiny_bundle)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache."""
    monkeypatch.setenv("JRS_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def gate(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """A processor with BF16 (or without), and what would be measured there; gives the list of measurements."""

    def pretend(verdict: Verdict, bf16: bool = True) -> list[str]:
        measured: list[str] = []

        def measure(bundle: Bundle, threads: int | None = None) -> Verdict:
            measured.append(bundle.name)
            return verdict

        monkeypatch.setattr(precision, "computes_bf16", lambda: bf16)
        monkeypatch.setattr(precision, "measure", measure)
        return measured

    return pretend


# What is measured -----------------------------------------------------------------------------------------


@needs_openvino
@pytest.mark.parametrize("mirroring", [False, True])
def test_measuring_opens_every_engine_once(bundle: Bundle, mirroring: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a large grid an engine that is asked for again stays open beside all others."""
    from jrs.runtime import network as network_module

    model = dataclasses.replace(bundle.manifest.model, mirroring=mirroring)
    bundle = dataclasses.replace(bundle, manifest=dataclasses.replace(bundle.manifest, model=model))
    real, opened = network_module.open_engine, []

    def noted(graph: Path, name: str, *rest: Any) -> Any:
        opened.append(name)
        return real(graph, name, *rest)

    monkeypatch.setattr(network_module, "_MANY_VOXELS", 1000)
    monkeypatch.setattr(network_module, "open_engine", noted)
    images = [np.random.default_rng(seed).normal(size=(1, 4, 32, 32, 32)).astype(np.float32) for seed in (0, 1)]
    precision._outcome(bundle, "fp32", *images, threads=1)
    assert opened[:3] == ["encoder", "segmentation", "registration"] and len(opened) == len(set(opened))


def test_the_fields_99th_percentile_in_the_brain_in_mm() -> None:
    """Of 100 voxels of brain two differ by 3 voxels of 2 mm, all others by 0.01; what lies outside does not count."""
    grid = Geometry((10, 10, 2), np.diag([2.0, 2.0, 2.0, 1.0]))
    brain = np.zeros(grid.shape, dtype=bool)
    brain[..., 0] = True
    want = np.zeros((3, *grid.shape), dtype=np.float32)
    got = want.copy()
    got[1] += 0.01
    got[:, ..., 1] = 50.0
    assert compare((want, None), (got, None), brain, grid).field_p99_mm == pytest.approx(0.02)
    got[1, 0, :2, 0] = 3.0
    assert compare((want, None), (got, None), brain, grid).field_p99_mm == pytest.approx(6.0, rel=0.02)
    got[1, 5, 5, 0] = np.nan
    assert not compare((want, None), (got, None), brain, grid).passed


def test_the_share_of_labels_that_stay() -> None:
    grid = Geometry((10, 10, 2), np.eye(4))
    brain = np.zeros(grid.shape, dtype=bool)
    brain[..., 0] = True
    want = np.zeros((3, *grid.shape), dtype=np.float32)
    want[0] = 1.0
    got = want.copy()
    got[:, ..., 1] = [[[0.0]], [[1.0]], [[0.0]]]  # outside
    got[2, 0, 0, 0] = 2.0
    verdict = compare((None, want), (None, got), brain, grid)
    assert verdict.labels_equal == pytest.approx(0.99) and verdict.field_p99_mm is None
    assert not verdict.passed


@pytest.mark.parametrize(
    ("verdict", "passed"),
    [
        (Verdict(0.1, 0.995), True),
        (Verdict(0.1001, 0.995), False),
        (Verdict(0.1, 0.9949), False),
        (Verdict(None, 0.995), True),
        (Verdict(0.05, None), True),
        (Verdict(None, None, "no such thing"), False),
    ],
)
def test_the_limits(verdict: Verdict, passed: bool) -> None:
    assert verdict.passed is passed and verdict.record()["passed"] is passed
    assert "bf16" in str(verdict) and "\n" not in str(verdict)


def test_the_pair_asks_every_channel_and_shows_a_tumour() -> None:
    spec = ModelSpec()
    moving, fixed, grid = reference_pair(spec)
    assert moving.shape == fixed.shape == (1, 4, *spec.grid.shape) and grid.shape == spec.grid.shape
    brain = fixed[0, 0] != 0
    for image in (moving, fixed):
        assert all(channel.std() > 0.1 for channel in image[0])
    t1, t1ce, t2, _ = (channel[brain] for channel in fixed[0])
    np.testing.assert_allclose(t1, t1ce, atol=1e-4)  # no tumour: no enhancement
    assert np.corrcoef(t1, t2)[0, 1] < -0.9
    bright = moving[0, 3] > 1.5
    points = np.argwhere(bright)
    center = grid.to_ras(np.median(points, axis=0))
    middle = grid.to_ras(np.argwhere(brain).mean(axis=0))
    assert center[0] > middle[0] + 10 and center[2] > middle[2]  # to the right, above
    rim = moving[0, 1] - moving[0, 0]
    assert rim.max() > 1.0
    again = reference_pair(spec)
    assert again[0].tobytes() == moving.tobytes() and again[1].tobytes() == fixed.tobytes()


# What is chosen -------------------------------------------------------------------------------------------


def test_auto_takes_bf16_where_the_bundle_bears_it(bundle: Bundle, gate: Any) -> None:
    gate(GOOD)
    chosen = choose_precision(bundle, "openvino", "auto")
    assert (chosen.precision, chosen.verdict) == ("bf16", GOOD)
    assert "0.040 mm" in chosen.reason and "99.99 %" in chosen.reason


def test_auto_falls_back_and_says_why(bundle: Bundle, gate: Any) -> None:
    gate(BAD)
    chosen = choose_precision(bundle, "openvino", "auto")
    assert chosen.precision == "fp32" and "0.200 mm (limit 0.1)" in chosen.reason


@pytest.mark.parametrize(
    ("backend", "asked", "bf16", "want"),
    [
        ("openvino", "bf16", True, "bf16"),
        ("openvino", "bf16", False, "bf16"),
        ("openvino", "fp32", True, "fp32"),
        ("openvino", "auto", False, "fp32"),
        ("ort-cpu", "auto", True, "fp32"),
        ("tensorrt", "auto", True, "fp32"),
    ],
)
def test_where_there_is_nothing_to_decide_nothing_is_measured(
    backend: str, asked: str, bf16: bool, want: str, bundle: Bundle, gate: Any
) -> None:
    measured = gate(GOOD, bf16)
    chosen = choose_precision(bundle, backend, asked)
    assert (chosen.precision, chosen.verdict, measured) == (want, None, []) and chosen.reason


def test_a_verdict_is_measured_once(bundle: Bundle, gate: Any) -> None:
    measured = gate(BAD)
    assert verdict_of(bundle) == verdict_of(bundle) == BAD
    assert len(measured) == 1


def test_another_bundle_library_or_processor_is_measured_anew(
    bundle: Bundle, gate: Any, changed_bundle: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = gate(GOOD)
    verdict_of(bundle)
    verdict_of(Bundle.open(changed_bundle(lambda manifest: manifest.update(name="another"))))
    assert measured == ["tiny", "another"]
    monkeypatch.setattr(machine, "versions", lambda: {"openvino": "1"})
    verdict_of(bundle)
    monkeypatch.setattr(machine, "cpu_name", lambda: "another")
    verdict_of(bundle)
    assert len(measured) == 4


def test_a_damaged_verdict_is_measured_anew(bundle: Bundle, gate: Any, folder: Path) -> None:
    measured = gate(GOOD)
    verdict_of(bundle)
    file = next((folder / "precision").iterdir())
    file.write_bytes(file.read_bytes().replace(b"0.9999", b"0.1999"))
    assert verdict_of(bundle) == GOOD and len(measured) == 2


def test_without_a_cache_it_is_measured_each_time(
    bundle: Bundle, gate: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = gate(GOOD)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("JRS_CACHE_DIR", str(tmp_path / "file" / "cache"))
    assert verdict_of(bundle) == verdict_of(bundle) == GOOD
    assert len(measured) == 2


def test_what_could_not_be_measured_is_fp32_and_not_kept(
    bundle: Bundle, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any, **named: Any) -> None:
        raise OutOfMemoryError("out of memory; close other programs")

    monkeypatch.setattr(precision, "computes_bf16", lambda: True)
    monkeypatch.setattr(precision, "_outcome", full)
    chosen = choose_precision(bundle, "openvino", "auto")
    assert chosen.precision == "fp32" and "out of memory" in chosen.reason
    assert Store(folder).contents()["precision"] == (0, 0)


# Where it shows -------------------------------------------------------------------------------------------


@needs_openvino
@pytest.mark.parametrize(("verdict", "want"), [(GOOD, "bf16"), (BAD, "fp32")])
def test_the_report_says_what_was_taken(
    verdict: Verdict, want: str, tiny_bundle: Path, phantom: Any, gate: Any, tmp_path: Path, capsys: Any
) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    from jrs.runtime.report_schema import report_schema

    gate(verdict)
    case = [str(phantom.folder), "--atlas", str(phantom.atlas), "--affine", "off", "--refine", "0", "--no-inverse"]
    arguments = ["--bundle", str(tiny_bundle), "--backend", "openvino", "--out", str(tmp_path), "--threads", "1"]
    assert run(["infer", *case, *arguments]) == 0
    report = json.loads((tmp_path / "case7" / "case7_report.json").read_text(encoding="utf-8"))
    jsonschema.validate(report, report_schema())
    engine = report["engine"]
    assert (engine["backend"], engine["precision"]) == ("openvino", want)
    assert engine["gate"] == {
        "field_p99_mm": verdict.field_p99_mm,
        "labels_equal": 0.9999,
        "failure": None,
        "limits": [0.1, 0.995],
        "passed": want == "bf16",
    }
    assert f"{verdict.field_p99_mm:.3f} mm" in engine["reason"]


def test_what_is_not_installed_is_told(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    real = importlib.util.find_spec
    absent = ("openvino", "tensorrt", "tensorrt_rtx")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name in absent else real(name, *a))
    with Network(bundle, threads=1) as network:
        if network.backend == "ort-cpu":  # no GPU here
            assert network.info.precision == "fp32"
            assert "openvino is not installed; pip install openvino" in str(network.info.reason)


@needs_openvino
def test_doctor_says_what_auto_takes(gate: Any, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setattr("jrs.runtime.doctor.choose_backend", lambda: ("openvino", "fp32"))
    gate(GOOD)
    assert run(["doctor", "--json"]) == 0
    out = capsys.readouterr()
    auto = json.loads(out.out)["auto"]
    assert (auto["backend"], auto["precision"]) == ("openvino", "bf16") and "0.040 mm" in auto["reason"]
    assert "openvino in bf16" in out.err


# On this machine ------------------------------------------------------------------------------------------


@needs_openvino
@pytest.mark.slow
@pytest.mark.skipif(not machine.computes_bf16(), reason="needs AVX512-BF16 or AMX-BF16")
def test_the_default_bundle_bears_bf16(folder: Path) -> None:
    verdict = precision.measure(Bundle.open())
    assert verdict.failure is None and verdict.field_p99_mm is not None and verdict.labels_equal is not None
    assert 0.0 < verdict.field_p99_mm <= 0.1 and 0.995 <= verdict.labels_equal < 1.0
    assert precision.measure(Bundle.open()) == verdict


@pytest.mark.slow
def test_the_reference_pair_makes_the_default_bundle_find_a_tumour() -> None:
    """Else equal labels would say nothing."""
    bundle = Bundle.open()
    moving, _, grid = reference_pair(bundle.manifest.model)
    with Network(bundle, "ort-cpu") as network:
        labels = network.segment(moving, network.encode(moving)).argmax(axis=0)
    volume = float((labels > 0).sum()) * grid.voxel_volume_ml
    assert 10.0 < volume < 60.0  # a ball of 18 mm radius holds 24 ml
    assert set(np.unique(labels)) == {0, 1, 2, 3}


# What a bundle's graphs are opened in ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("graphs", "passes", "expected"),
    [
        ("fp32", 1, ("bf16", "bf16", "bf16")),
        ("fp32", 2, ("bf16", "fp32", "fp32")),
        ("fp16", 2, ("bf16", "fp32", "fp32")),
        ("bf16", 2, ("bf16", "bf16", "bf16")),
    ],
)
def test_of_several_passes_what_goes_into_the_field_stays_fp32(
    graphs: str, passes: int, expected: tuple[str, str, str]
) -> None:
    """Precision of the encoder, of the registration's decoder, and of the codes between them."""
    opened = Bundle.open()
    model = dataclasses.replace(opened.manifest.model, passes=passes)
    bundle = dataclasses.replace(opened, manifest=dataclasses.replace(opened.manifest, model=model, precision=graphs))
    encoder, registration = (engine_options(bundle, name, "bf16") for name in ("encoder", "registration"))
    assert (encoder.precision, registration.precision, encoder.codes) == expected
    assert encoder.codes == registration.codes and encoder.graph_precision == graphs
    assert engine_options(bundle, "transformer", "bf16").precision == "fp32"
