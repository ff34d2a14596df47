"""Fixed images on disk: a hit gives what a miss gives, to the last bit, and nothing that differs is a hit."""

from __future__ import annotations

import dataclasses
import gzip
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from jrs.bundle import Bundle
from jrs.manifest import GridSpec
from jrs.runtime import fixed as fixed_module
from jrs.runtime import machine
from jrs.runtime.caching import Store
from jrs.runtime.cases import load_case
from jrs.runtime.fixed import FixedImage, FixedImages, Shelf
from jrs.runtime.network import Network
from jrs.runtime.pipeline import Pipeline
from jrs.runtime.results import Result

MADE_BY = ("network_input", "place_grid", "block_of")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache."""
    monkeypatch.setenv("JRS_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@contextmanager
def stage(name: str) -> Iterator[None]:
    yield


class Fresh:
    """Fixed images as a new process sees them, and how often something was made for them."""

    def __init__(self, bundle: Path, monkeypatch: pytest.MonkeyPatch, threads: int = 1, backend: str = "ort-cpu"):
        self.made: list[str] = []
        self.network = Network(Bundle.open(bundle), backend, "fp32", threads)
        self.images = FixedImages(self.network, threads)
        encode = self.network.encode
        self.network.encode = lambda image: self._noted("encode", encode, image)  # type: ignore[method-assign]
        for name in MADE_BY:
            real = getattr(fixed_module, name)
            real = getattr(real, "real", real)
            noted = lambda *a, name=name, real=real, **k: self._noted(name, real, *a, **k)  # noqa: E731
            noted.real = real  # type: ignore[attr-defined]
            monkeypatch.setattr(fixed_module, name, noted)

    def _noted(self, name: str, real: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        self.made.append(name)
        return real(*arguments, **named)

    def get(self, path: Path) -> FixedImage:
        self.made.clear()
        with self.network:
            image = self.images.get(path, "atlas", stage)
            assert image.codes
            return image


@pytest.fixture
def fresh(tiny_bundle: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Fresh]:
    return lambda bundle=tiny_bundle, **options: Fresh(bundle, monkeypatch, **options)


def bits(image: FixedImage) -> list[bytes]:
    first = next(iter(image.case.images))
    arrays = [*image.codes.values(), image.input.tensor, image.grid.affine, image.block(first).data]
    return [np.asarray(array).tobytes() for array in arrays]


# A hit ----------------------------------------------------------------------------------------------------


def test_a_hit_makes_nothing_and_gives_the_same(fresh: Any, phantom: Any) -> None:
    one, two = fresh(), fresh()
    first = one.get(phantom.atlas)
    want = bits(first)
    second = two.get(phantom.atlas)
    got = bits(second)
    assert two.made == []
    assert want == got
    assert second.input.present == first.input.present == (True, False, False, False)
    assert second.grid.shape == first.grid.shape
    assert second.block("t1").grid.affine.tobytes() == first.block("t1").grid.affine.tobytes()


def infer(bundle: Path, phantom: Any, backend: str = "ort-cpu", precision: str = "fp32") -> Result:
    with Pipeline.open(bundle, backend, precision, threads=1) as pipeline:
        return pipeline.infer(phantom.folder, phantom.atlas)


def same(one: Result, two: Result) -> None:
    """Bit for bit."""
    assert one.transform.affine.tobytes() == two.transform.affine.tobytes()
    assert one.inverse_field is not None and two.inverse_field is not None
    pairs = [(one.field.vectors_mm, two.field.vectors_mm), (one.jacobian, two.jacobian)]
    pairs += [(one.inverse_field.vectors_mm, two.inverse_field.vectors_mm)]
    pairs += [(one.labels_native, two.labels_native), (one.labels_moved, two.labels_moved)]
    pairs += [(one.moved[name], two.moved[name]) for name in one.moved]
    for a, b in pairs:
        np.testing.assert_array_equal(a, b)
    assert one.similarity == two.similarity and one.refinement == two.refinement
    assert one.affine_quality == two.affine_quality


@pytest.mark.parametrize("engine", [("ort-cpu", "fp32"), ("openvino", "fp32"), ("openvino", "bf16")])
def test_a_case_comes_out_the_same(
    engine: tuple[str, str], tiny_bundle: Path, phantom: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if engine[0] == "openvino":
        pytest.importorskip("openvino")
    miss = infer(tiny_bundle, phantom, *engine)
    held = Store(folder).contents()
    assert {kind for kind, (number, _) in held.items() if number} == {"input", "codes", "affine", "pyramid"}
    hit = infer(tiny_bundle, phantom, *engine)
    assert Store(folder).contents() == held
    monkeypatch.setenv("JRS_CACHE_LIMIT", "0")
    same(miss, hit)
    same(miss, infer(tiny_bundle, phantom, *engine))


def test_what_depends_on_a_predicted_tumour_is_not_kept(tiny_bundle: Path, phantom: Any, folder: Path) -> None:
    """A patient as the fixed image: the refinement leaves the tumour out, and its mask is in no key."""
    results = []
    for _ in range(2):
        with Pipeline.open(tiny_bundle, "ort-cpu", "fp32", threads=1) as pipeline:
            results.append(pipeline.infer(phantom.folder, phantom.folder, affine="off"))
    held = {kind: number for kind, (number, _) in Store(folder).contents().items()}
    assert held["codes"] == 1 and held["pyramid"] == 0
    same(*results)


def test_content_is_what_counts(fresh: Any, phantom: Any, tmp_path: Path) -> None:
    """The same voxels under another name, compressed otherwise, are the same image."""
    fresh().get(phantom.atlas)
    renamed = tmp_path / "elsewhere_t1.nii"
    renamed.write_bytes(gzip.decompress(phantom.atlas.read_bytes()))
    again = fresh()
    again.get(renamed)
    assert again.made == []


def test_codes_of_a_gpu_stay_there(fresh: Any, phantom: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fixed_module, "on_gpu", lambda backend: True)
    fresh().get(phantom.atlas)
    again = fresh()
    again.get(phantom.atlas)
    assert again.made == ["encode"]
    assert Store(folder).contents()["codes"] == (0, 0)


# A miss ---------------------------------------------------------------------------------------------------


def changed_image(phantom: Any, helpers: Any, path: Path, change: Callable[[Any, Any], tuple[Any, Any]]) -> Path:
    image = nib.load(phantom.atlas)
    return helpers.write_image(path, *change(np.array(image.dataobj), image.affine.copy()))


def a_voxel(data: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    data[20, 20, 20] = np.nextafter(data[20, 20, 20], np.float32(1e9))
    return data, affine


def a_shift(data: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    affine[0, 3] += 0.01
    return data, affine


@pytest.mark.parametrize("change", [a_voxel, a_shift])
def test_another_image(change: Any, fresh: Any, phantom: Any, helpers: Any, tmp_path: Path) -> None:
    fresh().get(phantom.atlas)
    again = fresh()
    other = again.get(changed_image(phantom, helpers, tmp_path / phantom.atlas.name, change))
    other.block("t1")
    assert again.made == ["place_grid", "network_input", "encode", "block_of"]


def test_another_bundle_takes_the_same_input(
    fresh: Any, phantom: Any, changed_bundle: Callable[..., Path]
) -> None:
    fresh().get(phantom.atlas)
    again = fresh(changed_bundle(lambda manifest: manifest.update(name="another")))
    again.get(phantom.atlas)
    assert again.made == ["encode"]


def test_another_backend_and_other_threads(fresh: Any, phantom: Any) -> None:
    pytest.importorskip("openvino")
    fresh().get(phantom.atlas)
    again = fresh(backend="openvino")
    again.get(phantom.atlas)
    assert again.made == ["encode"]
    again = fresh(threads=2)
    again.get(phantom.atlas)
    assert again.made == ["place_grid", "network_input", "encode"]


@pytest.mark.parametrize("what", ["cpu_name", "versions", "code_digest"])
def test_another_machine_library_or_code(
    what: str, fresh: Any, phantom: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    fresh().get(phantom.atlas)
    module = fixed_module if what == "code_digest" else machine
    monkeypatch.setattr(module, what, lambda *names: "another")
    again = fresh()
    again.get(phantom.atlas)
    assert again.made == ["place_grid", "network_input", "encode"]


def test_every_part_of_a_networks_specification_is_in_the_key(tiny_bundle: Path, phantom: Any, folder: Path) -> None:
    spec = Bundle.open(tiny_bundle).manifest.model
    shelf = Shelf(Store.open(), load_case(phantom.atlas), 1)
    others = [
        dataclasses.replace(spec, grid=GridSpec((32, 32, 48), (5.0, 5.0, 5.0))),
        dataclasses.replace(spec, grid=GridSpec((32, 32, 32), (5.0, 5.0, 4.0))),
        dataclasses.replace(spec, grid=GridSpec((32, 32, 32), (5.0, 5.0, 5.0), "LPS")),
        dataclasses.replace(spec, normalization="zscore-volume"),
        dataclasses.replace(spec, optional_channels=("t2",)),
        dataclasses.replace(spec, channels=("t1ce", "t1", "t2", "flair")),
    ]
    keys = [repr(shelf.input_key(each)) for each in (spec, *others)]
    assert len(set(keys)) == len(keys)


def test_sources_are_told_apart() -> None:
    assert machine.code_digest("jrs.volume") != machine.code_digest("jrs.geometry")
    assert machine.code_digest("jrs.volume") == machine.code_digest("jrs.volume")


# Trouble --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["input", "codes", "affine"])
def test_a_damaged_entry_is_made_again(kind: str, fresh: Any, phantom: Any, folder: Path) -> None:
    want = bits(fresh().get(phantom.atlas))
    file = next((folder / kind).iterdir())
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2] + b"\x55" + whole[len(whole) // 2 + 1 :])
    again = fresh()
    assert bits(again.get(phantom.atlas)) == want
    assert again.made == {"input": ["place_grid", "network_input"], "codes": ["encode"], "affine": ["block_of"]}[kind]
    assert file.read_bytes() == whole


def test_a_folder_that_cannot_be_written_costs_time_alone(
    fresh: Any, phantom: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    want = bits(fresh().get(phantom.atlas))
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("JRS_CACHE_DIR", str(tmp_path / "file" / "cache"))
    again = fresh()
    assert bits(again.get(phantom.atlas)) == want
    assert again.made == ["place_grid", "network_input", "encode", "block_of"]
