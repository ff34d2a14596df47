"""OpenVINO computes what a graph says, and codes go from graph to graph as its convolutions lay them out."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from jrs.architecture import Architecture
from jrs.manifest import GridSpec, ModelSpec
from jrs.runtime.engines import ChannelsLast, Engine, EngineOptions, open_engine

torch = pytest.importorskip("torch")
pytest.importorskip("openvino")
pytest.importorskip("onnx")

from jrs.export.exporter import export_bundle  # noqa: E402
from jrs.models.checkpoint import Checkpoint  # noqa: E402
from jrs.models.network import JointNet  # noqa: E402

SHAPE = (32, 48, 32)
MERGES = ("subtract", "add", "concatenate")
CODES = [f"code{k}" for k in range(1, 6)]


def bundle_of(merge: str, folder: Path, base_channels: int = 4, shape: tuple[int, int, int] = SHAPE) -> Path:
    torch.manual_seed(3)
    architecture = Architecture(base_channels=base_channels, norm="instance", head="displacement", merge=merge)
    net = JointNet(architecture).eval()
    assert net.registration is not None
    with torch.no_grad():
        net.registration.output.weight.normal_(std=0.5)
    Checkpoint(ModelSpec(architecture, grid=GridSpec(shape, (4.0, 4.0, 4.0))), net.state_dict()).save(folder / "net")
    return export_bundle(folder / "net", folder / "bundle").folder


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {merge: bundle_of(merge, tmp_path_factory.mktemp(merge)) for merge in MERGES}


@pytest.fixture(params=MERGES)
def bundle(request: pytest.FixtureRequest, bundles: dict[str, Path]) -> Iterator[Path]:
    yield bundles[request.param]


def engine(bundle: Path, graph: str, precision: str = "fp32", codes: str = "fp32", backend: str = "openvino") -> Engine:
    return open_engine(bundle / f"{graph}.onnx", graph, backend, EngineOptions(precision, 1, codes=codes))


def images() -> list[np.ndarray]:
    rng = np.random.default_rng(5)
    return [rng.normal(size=(1, 4, *SHAPE)).astype(np.float32) for _ in range(2)]


def pair(codes: list[dict]) -> dict:
    return {
        f"{role}_{name}": code for role, of in zip(("moving", "fixed"), codes, strict=True) for name, code in of.items()
    }


def error(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.abs(got - want).max() / want.std())


def test_what_is_computed_stays_the_same(bundle: Path) -> None:
    """Beside ONNX Runtime, which runs the graphs as they are."""
    results = []
    for backend in ("openvino", "ort-cpu"):
        with (
            engine(bundle, "encoder", backend=backend) as encoder,
            engine(bundle, "segmentation", backend=backend) as seg,
        ):
            codes = [encoder.keep({"image": image}) for image in images()]
            found = {**encoder({"image": images()[0]}), **seg(codes[0])}
        with engine(bundle, "registration", backend=backend) as registration:
            results.append({**found, **registration(pair(codes))})
    got, want = results
    assert list(want) == [*CODES, "probabilities", "flow"] and set(got) == set(want)
    for name, array in want.items():
        assert got[name].shape == array.shape and error(got[name], array) < 2e-4, name


@pytest.mark.parametrize("stored", ["fp32", "bf16"])
def test_codes_are_handed_on_as_they_lie(bundle: Path, stored: str) -> None:
    """As the encoder leaves them or as arrays on the host: the same bits come out."""
    with engine(bundle, "encoder", "bf16", stored) as encoder:
        codes = [encoder.keep({"image": image}) for image in images()]
    wanted = np.uint16 if stored == "bf16" else np.float32
    assert all(isinstance(code, ChannelsLast) and code.data.dtype == wanted for code in codes[0].values())
    assert codes[0]["code2"].shape == (1, 8, *(n // 2 for n in SHAPE))
    on_host = [{name: code.numpy() for name, code in of.items()} for of in codes]
    for graph, inputs in (("segmentation", (codes[0], on_host[0])), ("registration", (pair(codes), pair(on_host)))):
        with engine(bundle, graph, "bf16", stored) as decoder:
            (one, *_), (two, *_) = (decoder(given).values() for given in inputs)
        np.testing.assert_array_equal(one, two)


def test_codes_in_bf16_are_those_of_a_bf16_encoder(bundles: dict[str, Path]) -> None:
    """Rounding them costs no more than computing them did."""
    found = {}
    for precision, stored in (("fp32", "fp32"), ("bf16", "fp32"), ("bf16", "bf16")):
        with engine(bundles["subtract"], "encoder", precision, stored) as encoder:
            found[precision, stored] = encoder({"image": images()[0]})
    for name in CODES:
        exact = found["fp32", "fp32"][name]
        computed, rounded = (np.abs(found["bf16", s][name] - exact).mean() for s in ("fp32", "bf16"))
        assert computed > 0 and rounded < 2 * computed + 2**-9 * np.abs(exact).mean()


def test_norms_are_exact_over_large_volumes(tmp_path: Path) -> None:
    """FP32 sums over 3 million voxels, against PyTorch in double precision."""
    shape = (144, 144, 144)
    folder = bundle_of("subtract", tmp_path, 2, shape)
    image = np.random.default_rng(0).normal(3.0, 1.0, size=(1, 4, *shape)).astype(np.float32)
    from jrs.models.checkpoint import load_checkpoint

    with torch.inference_mode():
        want = load_checkpoint(tmp_path / "net").network().double().encoder(torch.from_numpy(image).double())
    with engine(folder, "encoder") as encoder:
        got = encoder({"image": image})
    for name, code in zip(CODES[:3], want, strict=False):
        assert np.abs(got[name] - code.numpy()).mean() < 3e-5 * code.abs().mean().item(), name


def test_bfloat16_is_rounded_as_pytorch_rounds() -> None:
    rng = np.random.default_rng(1)
    special = [0.0, -0.0, np.inf, -np.inf, 1e-40, 3.4e38, 1.0 + 2**-8, 1.0 + 3 * 2**-8, 1.0 + 2**-8 + 2**-20]
    values = np.concatenate([special, rng.normal(size=55) * 10.0 ** rng.integers(-30, 30, 55)]).astype(np.float32)
    volume = values.reshape(1, 4, 4, 2, 2)
    want = torch.from_numpy(volume).to(torch.bfloat16).float().numpy()
    kept = ChannelsLast.of(volume, np.uint16)
    assert kept.shape == volume.shape and kept.data.shape == (1, 4, 2, 2, 4)
    np.testing.assert_array_equal(kept.numpy(), want)
    np.testing.assert_array_equal(ChannelsLast.of(volume, np.float32).numpy(), volume)
    odd = np.frombuffer(np.uint32([0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001, 0x7FC00000]).tobytes(), np.float32)
    assert np.isnan(ChannelsLast.of(odd.reshape(1, 4, 1, 1, 1), np.uint16).numpy()).all()
