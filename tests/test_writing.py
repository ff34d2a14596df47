"""NIfTI files as stored, beside what nibabel makes of the same header, and as SimpleITK reads them."""

from __future__ import annotations

import errno
import gzip
import os
import tracemalloc
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from jrs import writing
from jrs.errors import OutputError
from jrs.geometry import Geometry
from jrs.writing import save_nifti

SHAPE = (6, 5, 37)  # more planes than are written at a time, and no multiple of them


def array(dtype: str, more: tuple[int, ...] = ()) -> np.ndarray:
    values = np.random.default_rng(0).integers(0, 100, (*SHAPE, *more))
    return (values + 0.25).astype(dtype) if dtype[-2] == "f" else values.astype(dtype)


@pytest.fixture
def grid(helpers: Any) -> Geometry:
    return Geometry(SHAPE, helpers.grid_affine(SHAPE, (1.5, 2.0, 3.0), "LAS", (12, -20, 30), (5, -7, 11)))


def stored(path: Path) -> bytes:
    content = path.read_bytes()
    return gzip.decompress(content) if path.name.lower().endswith(".gz") else content


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz", "A.NII.GZ"])
@pytest.mark.parametrize("dtype", ["u1", "i2", "i4", "f4", "f8", ">i2", ">f4"])
@pytest.mark.parametrize("more", [(), (3,), (1, 3)], ids=["3-D", "4-D", "5-D"])
def test_byte_for_byte_what_nibabel_writes(
    tmp_path: Path, grid: Geometry, name: str, dtype: str, more: tuple[int, ...]
) -> None:
    data = array(dtype, more)
    path = tmp_path / name
    save_nifti(path, data, grid, "label", "about")
    image = nib.Nifti1Image(data, grid.affine)
    image.header.set_data_dtype(np.dtype(dtype).newbyteorder("="))
    image.header.set_xyzt_units("mm", "unknown")
    image.header["intent_code"] = 1002
    image.header["descrip"] = f"jrs {writing.__version__} about".encode()
    image.header["scl_slope"], image.header["scl_inter"] = 1.0, 0.0
    image.set_sform(grid.affine, code=1)
    image.set_qform(grid.affine, code=1)
    assert stored(path) == image.to_bytes()
    np.testing.assert_array_equal(np.asarray(nib.Nifti1Image.from_bytes(stored(path)).dataobj), data)


@pytest.mark.parametrize("order", ["C", "F", "turned", "every other"])
def test_in_whatever_order_the_array_lies(tmp_path: Path, grid: Geometry, order: str) -> None:
    data = array("f4")
    views = {
        "C": np.ascontiguousarray(data),
        "F": np.asfortranarray(data),
        "turned": np.ascontiguousarray(data[::-1, ::-1])[::-1, ::-1],
        "every other": np.repeat(data, 2, axis=2)[:, :, ::2],
    }
    before = data.copy()
    save_nifti(tmp_path / "a.nii.gz", views[order], grid)
    assert stored(tmp_path / "a.nii.gz")[352:] == data.tobytes(order="F")
    np.testing.assert_array_equal(data, before)


def test_values_as_stored_are_multiples_of_the_step(tmp_path: Path, grid: Geometry) -> None:
    data = np.random.default_rng(0).normal(0, 20, (*SHAPE, 1, 3)).astype(np.float32)
    data[0, 0, 0, 0] = 0.25, 0.125, -0.375  # halves of the step go to the even side
    before = data.copy()
    save_nifti(tmp_path / "a.nii.gz", data, grid, "vector", bits=1, signs=(-1.0, -1.0, 1.0))
    found = np.asarray(nib.load(tmp_path / "a.nii.gz").dataobj)
    expected = np.round(2.0 * data.astype(np.float64)) / 2.0 * np.array([-1.0, -1.0, 1.0])
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(found[0, 0, 0, 0], [0.0, 0.0, -0.5])
    np.testing.assert_array_equal(data, before)


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_simpleitk_reads_it(tmp_path: Path, grid: Geometry, name: str) -> None:
    sitk = pytest.importorskip("SimpleITK")
    data = array("f4")
    save_nifti(tmp_path / name, data, grid)
    image = sitk.ReadImage(str(tmp_path / name))
    np.testing.assert_array_equal(sitk.GetArrayFromImage(image).T, data)
    at = image.TransformIndexToPhysicalPoint((5, 4, 36))
    np.testing.assert_allclose(np.array(at) * [-1, -1, 1], grid.to_ras([5, 4, 36]), atol=1e-3)


def test_equal_content_gives_equal_files(tmp_path: Path, grid: Geometry) -> None:
    for name in ("a.nii.gz", "b.nii.gz"):
        save_nifti(tmp_path / name, array("f4"), grid, bits=11)
    assert (tmp_path / "a.nii.gz").read_bytes() == (tmp_path / "b.nii.gz").read_bytes()


def test_no_second_image_in_memory(tmp_path: Path) -> None:
    data = np.zeros((64, 64, 512, 1, 3), dtype=np.float32)  # 24 MiB
    tracemalloc.start()
    try:
        save_nifti(tmp_path / "a.nii.gz", data, Geometry((64, 64, 512), np.eye(4)), "vector", bits=11)
        assert tracemalloc.get_traced_memory()[1] < 4 * 2**20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_a_disk_that_fills_leaves_the_old_file(
    tmp_path: Path, grid: Geometry, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / name).write_bytes(b"old")
    blocks = writing._blocks

    def full(*arguments: Any) -> Any:
        yield next(iter(blocks(*arguments)))
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(writing, "_blocks", full)
    with pytest.raises(OutputError, match="No space left"):
        save_nifti(tmp_path / name, array("f4"), grid)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {name: b"old"}
