"""Phantoms and helpers that several test files share.

Expected values never come from the code under test: images are analytic functions of points in the world, and
grids, orientations and SimpleITK images are made with numpy and nibabel alone.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

# Read when SimpleITK is first loaded: tests must not take every core of a busy machine.
os.environ.setdefault("ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS", "1")

from jrs.runtime.libraries import import_openvino

with suppress(ImportError):
    import_openvino()  # before any test imports it as it comes, which reports to its makers

Matrix = np.ndarray[Any, Any]
LPS_FROM_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


def world_points(affine: Matrix, shape: tuple[int, ...]) -> Matrix:
    """RAS mm of every voxel, (3,X,Y,Z) float64."""
    return np.moveaxis(nib.affines.apply_affine(affine, np.moveaxis(np.indices(shape[:3]), 0, -1)), -1, 0)


def rotation(degrees: tuple[float, float, float]) -> Matrix:
    """A 3x3 rotation: about x, then y, then z."""
    return nib.eulerangles.euler2mat(*np.radians(degrees)[::-1])


def grid_affine(
    shape: tuple[int, ...],
    spacing: tuple[float, float, float] = (2.0, 2.0, 2.0),
    codes: str = "RAS",
    degrees: tuple[float, float, float] = (0.0, 0.0, 0.0),
    center: tuple[float, float, float] = (0.0, 0.0, 0.0),
) -> Matrix:
    """The affine of a grid whose axes point to ``codes``, turned by ``degrees``, its middle at ``center``."""
    linear = np.zeros((3, 3))
    for axis, (world, sign) in enumerate(nib.orientations.axcodes2ornt(codes)):
        linear[int(world), axis] = sign
    affine = np.eye(4)
    affine[:3, :3] = rotation(degrees) @ linear @ np.diag(spacing)
    affine[:3, 3] = np.array(center) - affine[:3, :3] @ ((np.array(shape) - 1) / 2)
    return affine


def stored_as(data: Matrix, affine: Matrix, codes: str) -> tuple[Matrix, Matrix]:
    """The same image with its axes in another order and direction: data and affine."""
    old = nib.orientations.io_orientation(affine)
    change = nib.orientations.ornt_transform(old, nib.orientations.axcodes2ornt(codes))
    image = nib.Nifti1Image(data, affine).as_reoriented(change)
    return np.asarray(image.dataobj), image.affine


def sitk_image(data: Matrix, affine: Matrix) -> Any:
    """A SimpleITK image of an array (X,Y,Z) on an orthogonal grid, in ITK's LPS world."""
    import SimpleITK as sitk

    image = sitk.GetImageFromArray(np.ascontiguousarray(data.transpose(2, 1, 0)))
    lps = LPS_FROM_RAS @ affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    image.SetSpacing(spacing.tolist())
    image.SetDirection((lps[:3, :3] / spacing).ravel().tolist())
    image.SetOrigin(lps[:3, 3].tolist())
    return image


def sitk_array(image: Any) -> Matrix:
    """The voxels of a scalar SimpleITK image as (X,Y,Z)."""
    import SimpleITK as sitk

    return sitk.GetArrayFromImage(image).transpose(2, 1, 0)


HEAD_SIZE = 0.75  # of a human head: smaller images, faster tests


def head(points: Matrix, contrast: int = 0) -> Matrix:
    """Intensity of a head-like, textured, asymmetric phantom at RAS points (3,...).

    About 100 inside, 0 outside up to a small ripple of both signs, as skull-stripped and resampled images have
    it. ``contrast`` 0 to 3 stands for a modality: the same shapes, other brightness, a tumour at (18, 12, 9).
    """
    x, y, z = points / HEAD_SIZE
    u, v, w = x / 52.0, y / 64.0, z / 48.0
    radius = np.sqrt(u**2 + v**2 + w**2)
    # Lobes, a flat base: many affine maps take an ellipsoid to itself, and none takes this shape to itself.
    lobes = 0.55 * u**2 * w + 0.5 * v * w * (1.0 + v) + 0.35 * u * v * w - 0.2 * u * v**2
    radius = radius * (1.0 + 0.5 * lobes / (0.3 + radius**3)) + 0.12 * np.maximum(0.0, -w - 0.35)

    def edge(distance: Matrix, width: float) -> Matrix:
        """1 where ``distance`` (mm) is negative, 0 where it is positive."""
        return 1.0 / (1.0 + np.exp(np.clip(distance / width, -60.0, 60.0)))

    def ball(cx: float, cy: float, cz: float, size: float, flat: float = 1.0) -> Matrix:
        return edge(np.sqrt((x - cx) ** 2 + (y - cy) ** 2 + ((z - cz) / flat) ** 2) - size, 1.5)

    inside = edge((radius - 1.0) * 52.0, 1.2)
    # The border of the white matter winds, differently in every direction.
    winding = 7.0 * np.sin(0.31 * x + 0.12 * y + 0.4) * np.cos(0.27 * z - 0.09 * y) + 5.0 * np.sin(0.29 * y - 0.17 * z)
    white = edge((radius - 0.75) * 52.0 + winding, 1.5)
    fluid = ball(-9, 8, 6, 11, 0.6) + ball(10, -4, 9, 9, 0.8) + ball(2, -34, -16, 8)
    deep = ball(-20, -8, -6, 8) + ball(17, 28, -8, 7) + ball(-26, 26, 14, 6)
    tumour = ball(24, 16, 12, 10)
    grey, gain, dark, lesion = ((75, 45, -70, 10), (75, 40, -65, 80), (110, -40, 70, 60), (85, 20, -60, 70))[contrast]
    ripple = -1.2 * np.cos(radius * 40.0) * np.exp(-np.abs(radius - 1.1) * 8.0) * (radius > 1.05)
    return inside * (grey + gain * white + dark * fluid - 0.4 * gain * deep + lesion * tumour) + ripple


def write_image(path: Path, data: Matrix, affine: Matrix) -> Path:
    """Write a NIfTI file with nibabel, millimetres, qform and sform of code 1."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nib.Nifti1Image(data, affine)
    image.header.set_xyzt_units("mm")
    image.set_sform(affine, code=1)
    image.set_qform(affine, code=1)
    nib.save(image, path)
    return path


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """No test reads or writes the user's cache; processes that tests start inherit this one."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("JRS_CACHE_DIR", str(folder))
        patch.delenv("JRS_CACHE_LIMIT", raising=False)
        yield folder


def at(volume: np.ndarray, displacement: np.ndarray) -> np.ndarray:
    """``volume`` (C,X,Y,Z) at x + ``displacement`` (3,X,Y,Z), voxels, by scipy: linear, the border repeated."""
    from scipy.ndimage import map_coordinates

    coords = np.indices(volume.shape[1:]) + displacement
    return np.stack([map_coordinates(c, coords, order=1, mode="nearest") for c in volume.astype(np.float64)])


class Helpers:
    """The functions above, for test files: with pytest's importlib mode they cannot import this one."""

    world_points = staticmethod(world_points)
    rotation = staticmethod(rotation)
    grid_affine = staticmethod(grid_affine)
    stored_as = staticmethod(stored_as)
    sitk_image = staticmethod(sitk_image)
    sitk_array = staticmethod(sitk_array)
    head = staticmethod(head)
    write_image = staticmethod(write_image)
    at = staticmethod(at)


@pytest.fixture(scope="session")
def helpers() -> Helpers:
    return Helpers()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """PyTorch on one thread: small tensors gain nothing from more, and sums keep their order."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


MODALITIES = ("t1", "t1ce", "t2", "flair")


@dataclass(frozen=True)
class Phantom:
    """A case of four modalities and a T1 atlas of the same head, on disk.

    ``truth`` is A, RAS mm of an atlas point to RAS mm of the case's point.
    """

    folder: Path
    atlas: Path
    truth: Matrix
    name: str = "case7"

    def image(self, modality: str) -> Any:
        return nib.load(self.folder / f"{self.name}_{modality}.nii.gz")


@pytest.fixture(scope="session")
def phantom(tmp_path_factory: pytest.TempPathFactory) -> Phantom:
    """Native grid: oblique, LPS, 40x42x38 at about 3.3 mm. Atlas: LAS, 3 mm, another size."""
    root = tmp_path_factory.mktemp("phantom")
    truth = np.eye(4)
    truth[:3, :3] = rotation((4.0, -5.0, 6.0)) @ np.diag([1.04, 0.97, 1.02])
    truth[:3, 3] = (6.0, -8.0, 5.0)
    shape = (40, 42, 38)
    affine = grid_affine(shape, (3.2, 3.4, 3.3), "LPS", (3.0, 2.0, -4.0), (5.0, -9.0, 4.0))
    points = world_points(np.linalg.inv(truth) @ affine, shape)
    folder = root / "native"
    for contrast, modality in enumerate(MODALITIES):
        data = head(points, contrast).astype(np.float32)
        write_image(folder / f"case7_{modality}.nii.gz", data, affine)
    atlas_shape = (38, 44, 36)
    atlas_affine = grid_affine(atlas_shape, (3.0, 3.0, 3.0), "LAS", center=(1.0, -2.0, 0.5))
    data = head(world_points(atlas_affine, atlas_shape)).astype(np.float32)
    atlas = write_image(root / "phantom_atlas.nii.gz", data, atlas_affine)
    return Phantom(folder, atlas, truth)


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of random weights on 32x32x32 voxels of 5 mm: a field of some mm, labels of all four classes."""
    import torch

    from jrs.architecture import Architecture
    from jrs.export.exporter import export_bundle
    from jrs.export.parity import parity_images
    from jrs.manifest import GridSpec, ModelSpec
    from jrs.models.checkpoint import Checkpoint
    from jrs.models.network import JointNet

    folder = tmp_path_factory.mktemp("bundle")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        torch.manual_seed(11)
        architecture = Architecture(base_channels=4, norm="instance", head="displacement")
        spec = ModelSpec(architecture=architecture, grid=GridSpec((32, 32, 32), (5.0, 5.0, 5.0)))
        net = JointNet(architecture).eval()
        assert net.segmentation is not None and net.registration is not None
        moving, fixed = parity_images(spec)
        with torch.no_grad():
            # Every class wins somewhere, the background in most places.
            logits = net(moving, fixed).moving_logits
            scale = 4.0 / logits.std(dim=(0, 2, 3, 4))
            middle = logits.mean(dim=(0, 2, 3, 4))
            net.segmentation.output.weight *= scale.view(-1, 1, 1, 1, 1)
            net.segmentation.output.bias.copy_((net.segmentation.output.bias - middle) * scale)
            net.segmentation.output.bias[0] += 3.0
            # At most 1.7 voxels: up to 8 mm and a fold in a few places, a fraction of a mm in most.
            flow = net(moving, fixed).flow
            net.registration.output.weight *= 1.7 / flow.abs().max()
        Checkpoint(spec, net.state_dict()).save(folder / "tiny.safetensors")
        return export_bundle(folder / "tiny.safetensors", folder / "tiny").folder
    finally:
        torch.set_num_threads(threads)


@pytest.fixture
def changed_bundle(tiny_bundle: Path, tmp_path: Path) -> Callable[..., Path]:
    """A copy of the tiny bundle whose manifest was edited: ``change(manifest)`` works on the parsed JSON."""
    import shutil

    def make(change: Callable[[dict[str, Any]], None]) -> Path:
        copy = tmp_path / "changed-bundle"
        shutil.copytree(tiny_bundle, copy)
        manifest = json.loads((copy / "manifest.json").read_text(encoding="utf-8"))
        change(manifest)
        (copy / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
        return copy

    return make


@pytest.fixture
def several_passes(changed_bundle: Callable[..., Path]) -> Callable[[int], Path]:
    """A copy of the tiny bundle that registers in so many passes."""
    from jrs.bundle import Bundle
    from jrs.export.graphs import build_composer
    from jrs.files import sha256_of

    def make(passes: int) -> Path:
        folder = changed_bundle(lambda manifest: None)
        file = folder / "composer.onnx"
        file.write_bytes(build_composer(Bundle.open(folder).manifest.model).SerializeToString())
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        manifest["model"]["passes"] = passes
        manifest["graphs"]["composer"] = {"file": file.name, "sha256": sha256_of(file)}
        (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
        return folder

    return make


@pytest.fixture(params=["compiled", "portable"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What is tested twice: with the compiled kernels, and without them."""
    from jrs.runtime import native

    if request.param == "compiled" and not native.available():
        pytest.skip("the kernels were not compiled")
    monkeypatch.setenv("JRS_KERNELS", "on" if request.param == "compiled" else "off")
    return str(request.param)
