"""The bundle that ships, on the real example case: engines and precisions agree, the tumour is found."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from jrs.bundle import SAMPLING, Bundle
from jrs.geometry import Geometry
from jrs.reading import read_volume
from jrs.resources import atlas_path
from jrs.runtime.affine import register_affine
from jrs.runtime.cases import load_case
from jrs.runtime.network import Network
from jrs.runtime.preprocess import NetworkInput, network_input, place_grid

EXAMPLE = Path(__file__).parents[1] / "examples" / "TCGA-DU-7294"
pytestmark = pytest.mark.skipif(not EXAMPLE.is_dir(), reason="the examples are not part of an sdist")

Answer = tuple[np.ndarray, np.ndarray]


@pytest.fixture(scope="module")
def images() -> tuple[NetworkInput, NetworkInput, Geometry, np.ndarray]:
    """The example case and SRI24 on the network's grid, that grid, and the affine between them."""
    spec = Bundle.open().manifest.model
    atlas = read_volume(atlas_path("sri24"))
    case = load_case(EXAMPLE)
    affine = register_affine(case.images["t1"], atlas).matrix
    grid = place_grid(spec.grid, atlas)[0]
    return network_input(case.images, spec, grid, affine), network_input({"t1": atlas}, spec, grid), grid, affine


def answer(network: Network, images: tuple[NetworkInput, NetworkInput, Geometry, np.ndarray]) -> Answer:
    """Displacement (3,X,Y,Z) in voxels and the class of each voxel."""
    moving, fixed = network.encode(images[0].tensor), network.encode(images[1].tensor)
    displacement = network.register(images[0].tensor, moving, fixed).displacement[0]
    return displacement, network.segment(images[0].tensor, moving).argmax(axis=0)


@pytest.fixture(scope="module")
def reference(images: tuple[NetworkInput, NetworkInput, Geometry, np.ndarray]) -> Answer:
    """What PyTorch computes with the weights inside the bundle."""
    torch = pytest.importorskip("torch")
    from jrs.models.checkpoint import load_checkpoint

    loaded = load_checkpoint("default")
    net = loaded.network()
    moving, fixed = (torch.from_numpy(image.tensor) for image in images[:2])
    with torch.no_grad():
        plain = net(moving, fixed).moving_probabilities[0]
        mirrored = net(moving.flip(2), fixed).moving_probabilities[0].flip(1)
    x, y, z = (np.arange(n, dtype=np.float32) for n in images[2].shape)
    coords = net.register(moving, fixed, loaded.spec.passes)[0].numpy()
    displacement = coords - np.stack(np.meshgrid(x, y, z, indexing="ij"))
    return displacement, (plain + mirrored).argmax(dim=0).numpy()


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The default bundle exported again in FP16, from its own weights."""
    pytest.importorskip("torch")
    from jrs.export.exporter import export_bundle

    yield export_bundle("default", tmp_path_factory.mktemp("bundle") / "half", "fp16").folder


def test_the_field_is_not_trivial(reference: Answer) -> None:
    brain_scale_mm = np.abs(reference[0]).max() * 2.0
    assert 1.0 < brain_scale_mm < 30.0


@pytest.mark.parametrize("backend", ["ort-cpu", "openvino"])
def test_a_backend_agrees_with_pytorch(backend: str, images: tuple, reference: Answer) -> None:
    """The gate of a CPU backend: field within 0.1 mm for 99 % of voxels, labels equal in 99.5 %."""
    if backend == "openvino":
        pytest.importorskip("openvino")
    with Network(Bundle.open(), backend) as network:
        displacement, labels = answer(network, images)
    error_mm = 2.0 * np.linalg.norm(displacement - reference[0], axis=0)
    assert np.percentile(error_mm, 99) < (1e-3 if backend == "ort-cpu" else 0.1)
    assert (labels == reference[1]).mean() > (0.9999 if backend == "ort-cpu" else 0.995)


@pytest.mark.parametrize("backend", ["ort-cpu", "openvino"])
def test_fp16_agrees_with_fp32(backend: str, half: Path, images: tuple, reference: Answer) -> None:
    """Field within 0.05 voxel everywhere, labels equal in 99.5 % of voxels; graphs of half the size."""
    pytest.importorskip({"ort-cpu": "onnxruntime"}.get(backend, backend))
    with Network(Bundle.open(half), backend, "fp32") as network:
        displacement, labels = answer(network, images)
    assert np.abs(displacement - reference[0]).max() < 0.05
    assert (labels == reference[1]).mean() >= 0.995
    single = Bundle.open().graph("encoder").stat().st_size
    assert (half / "encoder.onnx").stat().st_size < 0.55 * single


def test_the_tumor_of_the_example_is_found(images: tuple, reference: Answer) -> None:
    """Against the fused segmentation of five published algorithms, sampled where the network's voxels lie."""
    _, _, grid, affine = images
    truth = read_volume(EXAMPLE / "TCGA-DU-7294_seg-fused.nii.gz", labels=True)
    index = np.indices(grid.shape).reshape(3, -1).T
    native = np.rint(truth.geometry.to_voxels(grid.to_ras(index) @ affine[:3, :3].T + affine[:3, 3])).astype(int)
    inside = ((native >= 0) & (native < truth.geometry.shape)).all(axis=1)
    expected = np.zeros(len(index), dtype=bool)
    expected[inside] = truth.data[tuple(native[inside].T)] > 0
    found = reference[1].ravel() > 0
    assert 2 * (found & expected).sum() / (found.sum() + expected.sum()) > 0.6


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_every_graph_builds_in_tensorrt(precision: str, half: Path) -> None:
    """Parsed and built without a GPU; the sampler becomes TensorRT's own grid-sample layer, and nothing a CumSum."""
    trt = pytest.importorskip("tensorrt_rtx")
    bundle = Bundle.open() if precision == "fp32" else Bundle.open(half)
    logger = trt.Logger(trt.Logger.ERROR)
    for name in bundle.manifest.graphs:
        builder = trt.Builder(logger)
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = trt.OnnxParser(network, logger)
        parsed = parser.parse(bundle.graph(name).read_bytes())
        assert parsed, [str(parser.get_error(i)) for i in range(parser.num_errors)]
        kinds = {network.get_layer(i).type for i in range(network.num_layers)}
        assert (trt.LayerType.GRID_SAMPLE in kinds) == (name in SAMPLING)
        assert trt.LayerType.CUMULATIVE not in kinds
        config = builder.create_builder_config()
        config.clear_flag(trt.BuilderFlag.TF32)
        config.num_compute_capabilities = 1
        config.set_compute_capability(trt.ComputeCapability.SM89, 0)
        engine = builder.build_serialized_network(network, config)
        assert engine is not None and engine.nbytes > 10_000
