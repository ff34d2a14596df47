"""The Triton model repository: its configurations by Triton's own schema, its graphs by ONNX Runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jrs.bundle import Bundle
from jrs.errors import CannotCreateError, ConfigurationError

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
model_config = pytest.importorskip("tritonclient.grpc.model_config_pb2")
text_format = pytest.importorskip("google.protobuf.text_format")

FP32 = "TYPE_FP32"


@pytest.fixture(scope="module")
def repository(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from jrs.export.triton import export_triton

    return export_triton(Bundle.open(tiny_bundle), tmp_path_factory.mktemp("triton") / "models")


def configuration(folder: Path) -> Any:
    return text_format.Parse((folder / "config.pbtxt").read_text(encoding="utf-8"), model_config.ModelConfig())


def session(path: Path) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


MODELS = ["jrs_encoder", "jrs_segmentation", "jrs_registration", "jrs_registration_sri24", "jrs_transformer"]


def test_the_repository_holds_a_model_a_graph_and_the_ensemble(repository: Path) -> None:
    assert sorted(f.name for f in repository.iterdir()) == sorted([*MODELS, "jrs"])
    for name in MODELS:
        assert (repository / name / "1" / "model.onnx").is_file()
    assert (repository / "jrs" / "1").is_dir()


@pytest.mark.parametrize("name", MODELS)
def test_a_configuration_says_what_the_graph_is(repository: Path, name: str) -> None:
    config = configuration(repository / name)
    assert (config.name, config.backend, config.max_batch_size) == (name, "onnxruntime", 0)
    assert config.default_model_filename == "model.onnx"
    assert [group.kind for group in config.instance_group] == [model_config.ModelInstanceGroup.KIND_AUTO]
    graph = session(repository / name / "1" / "model.onnx")
    for told, real in ((config.input, graph.get_inputs()), (config.output, graph.get_outputs())):
        assert [(t.name, list(t.dims)) for t in told] == [(t.name, t.shape) for t in real]
        assert {model_config.DataType.Name(t.data_type) for t in told} == {FP32}


def run_ensemble(repository: Path, image: np.ndarray) -> dict[str, np.ndarray]:
    """What Triton's scheduler does with the parsed ensemble, step by step."""
    config = configuration(repository / "jrs")
    assert config.platform == "ensemble"
    known = {"image": image}
    for step in config.ensemble_scheduling.step:
        assert step.model_version == -1
        run = session(repository / step.model_name / "1" / "model.onnx")
        names = [value.name for value in run.get_outputs()]
        assert set(step.input_map) == {value.name for value in run.get_inputs()}
        got = dict(zip(names, run.run(None, {own: known[of] for own, of in step.input_map.items()}), strict=True))
        known |= {of: got[own] for own, of in step.output_map.items()}
    for output in config.output:
        assert list(known[output.name].shape) == list(output.dims)
    return {output.name: known[output.name] for output in config.output}


def test_the_ensemble_computes_what_the_network_computes(repository: Path, tiny_bundle: Path) -> None:
    from jrs.reading import read_volume
    from jrs.resources import atlas_path
    from jrs.runtime.network import Network
    from jrs.runtime.preprocess import network_input, place_grid

    bundle = Bundle.open(tiny_bundle)
    spec = bundle.manifest.model
    atlas = read_volume(atlas_path("sri24"))
    fixed = network_input({"t1": atlas}, spec, place_grid(spec.grid, atlas)[0]).tensor
    moving = np.random.default_rng(0).normal(size=fixed.shape).astype(np.float32)
    got = run_ensemble(repository, moving)
    with Network(bundle, "ort-cpu", threads=1) as network:
        codes = network.encode(moving)
        registered = network.register(moving, codes, network.encode(fixed))
        probabilities = network.segment(moving, codes)
    assert sorted(got) == ["displacement", "moved", "probabilities"]
    np.testing.assert_allclose(got["displacement"], registered.displacement, atol=1e-4)
    np.testing.assert_allclose(got["moved"], registered.moved, atol=1e-3)
    np.testing.assert_allclose(got["probabilities"][0], probabilities, atol=1e-4)
    assert np.abs(got["displacement"]).max() > 0.05


@pytest.mark.parametrize("passes", [2, 3])
def test_an_ensemble_of_several_passes(several_passes: Any, tmp_path: Path, passes: int) -> None:
    from jrs.export.triton import export_triton
    from jrs.reading import read_volume
    from jrs.resources import atlas_path
    from jrs.runtime.network import Network
    from jrs.runtime.preprocess import network_input, place_grid

    bundle = Bundle.open(several_passes(passes))
    spec = bundle.manifest.model
    repository = export_triton(bundle, tmp_path / "models")
    assert sorted(f.name for f in repository.iterdir()) == sorted([*MODELS, "jrs_composer", "jrs"])
    atlas = read_volume(atlas_path("sri24"))
    fixed = network_input({"t1": atlas}, spec, place_grid(spec.grid, atlas)[0]).tensor
    moving = np.random.default_rng(0).normal(size=fixed.shape).astype(np.float32)
    got = run_ensemble(repository, moving)
    with Network(bundle, "ort-cpu", threads=1) as network:
        registered = network.register(moving, network.encode(moving), network.encode(fixed))
    assert sorted(got) == ["displacement", "moved", "probabilities"]
    np.testing.assert_allclose(got["displacement"], registered.displacement, atol=2e-4)
    np.testing.assert_allclose(got["moved"], registered.moved, atol=2e-3)
    assert list(got["moved"].shape) == list(moving.shape)


@pytest.mark.parametrize(("orientation", "axis"), [("RAS", 0), ("PIL", 2)])
def test_an_ensemble_that_mirrors(changed_bundle: Any, tmp_path: Path, orientation: str, axis: int) -> None:
    from jrs.export.triton import export_triton

    def change(manifest: dict[str, Any]) -> None:
        manifest["model"]["mirroring"] = True
        manifest["model"]["grid"]["orientation"] = orientation

    repository = export_triton(Bundle.open(changed_bundle(change)), tmp_path / "models")
    for name in ("jrs_mirror", "jrs_mean"):
        test_a_configuration_says_what_the_graph_is(repository, name)
    image = np.random.default_rng(0).normal(size=(1, 4, 32, 32, 32)).astype(np.float32)
    encoder, segmentation = (session(repository / f"jrs_{n}" / "1" / "model.onnx") for n in ("encoder", "segmentation"))
    one_by_one = []
    for given in (image, np.flip(image, 2 + axis)):
        codes = encoder.run(None, {"image": np.ascontiguousarray(given)})
        one_by_one += segmentation.run(None, {f"code{k}": code for k, code in enumerate(codes, start=1)})
    want = (one_by_one[0] + np.flip(one_by_one[1], 2 + axis)) / 2
    got = run_ensemble(repository, image)
    assert sorted(got) == ["displacement", "moved", "probabilities"]
    np.testing.assert_allclose(got["probabilities"], want, atol=1e-5)
    assert np.abs(got["probabilities"] - one_by_one[0]).max() > 0.01


def test_the_operator_keeps_its_body(repository: Path) -> None:
    model = onnx.load(repository / "jrs_transformer" / "1" / "model.onnx")
    assert [f"{f.domain}::{f.name}" for f in model.functions] == ["ai.jrs::JrsGridSample3D"]


def test_an_existing_folder_is_kept(repository: Path, tiny_bundle: Path) -> None:
    from jrs.export.triton import export_triton

    with pytest.raises(CannotCreateError, match="--overwrite"):
        export_triton(Bundle.open(tiny_bundle), repository)


def test_a_bf16_bundle_is_refused(changed_bundle: Any, tmp_path: Path) -> None:
    from jrs.export.triton import export_triton

    folder = changed_bundle(lambda manifest: manifest.update(precision="bf16"))
    with pytest.raises(ConfigurationError, match="fp16"):
        export_triton(Bundle.open(folder), tmp_path / "models")
    assert not (tmp_path / "models").exists()
