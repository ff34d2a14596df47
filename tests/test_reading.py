"""The gate for user images: what it accepts, what it notes, what it refuses."""

from __future__ import annotations

import gzip
import itertools
import math
import os
import struct
import tracemalloc
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from jrs import headers, reading
from jrs.errors import BadDataError, JrsError, MissingInputError, OutOfMemoryError
from jrs.reading import count_channels, read_channels, read_geometry, read_volume

SHAPE = (5, 4, 3)
# Oblique and anisotropic, with numbers that float32 holds exactly.
AFFINE = np.array([[-1.5, 0, 0.5, 90], [0, 2, 0, -126], [0.75, 0, 1, -72], [0, 0, 0, 1.0]])
CODES = {
    "u1": 2,
    "i2": 4,
    "i4": 8,
    "f4": 16,
    "f8": 64,
    "i1": 256,
    "u2": 512,
    "u4": 768,
    "i8": 1024,
    "u8": 1280,
}


def ramp(shape: tuple[int, ...] = SHAPE, dtype: str = "i2") -> np.ndarray:
    return np.arange(1, math.prod(shape) + 1).reshape(shape).astype(dtype)


def nifti(data: np.ndarray | None = None, order: str = "<", affine: np.ndarray = AFFINE) -> bytearray:
    """A NIfTI-1 file with an sform, put together by hand from the standard's table of offsets."""
    data = ramp() if data is None else data
    head = bytearray(352)

    def put(offset: int, kind: str, *values: Any) -> None:
        struct.pack_into(order + kind, head, offset, *values)

    put(0, "i", 348)
    put(40, f"{1 + data.ndim}h", data.ndim, *data.shape)
    put(70, "2h", CODES[data.dtype.str[1:]], 8 * data.itemsize)
    put(76, "4f", 1, *np.linalg.norm(affine[:3, :3], axis=0))
    put(108, "3f", 352, 1, 0)
    put(123, "B", 2)
    put(252, "2h", 0, 1)
    put(280, "12f", *affine[:3].ravel())
    head[344:348] = b"n+1\0"
    return head + data.astype(data.dtype.newbyteorder(order)).tobytes(order="F")


def patched(content: bytearray, *changes: tuple[int, str, Any]) -> bytearray:
    content = bytearray(content)
    for offset, kind, value in changes:
        struct.pack_into("<" + kind, content, offset, *(value if isinstance(value, tuple) else (value,)))
    return content


def saved(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def refused(path: Path, error: type[JrsError], words: str, read: Callable[..., Any] = read_volume) -> str:
    with pytest.raises(JrsError) as caught:
        read(path)
    message = str(caught.value)
    assert type(caught.value) is error, message
    assert "\n" not in message
    assert message.startswith(f"{path}: ")
    assert words in message
    remedy = message.split("; ")[-1]
    assert remedy != message and len(remedy) > 5
    return message


def assert_is_ramp(volume: Any, shape: tuple[int, ...] = SHAPE) -> None:
    assert volume.data.dtype == np.float32
    assert volume.data.flags.c_contiguous
    assert not volume.data.flags.writeable
    np.testing.assert_array_equal(volume.data, ramp(shape))
    np.testing.assert_allclose(volume.geometry.affine, AFFINE, atol=1e-4)


# Accepted -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("dtype", CODES)
def test_every_number_type_in_both_byte_orders(tmp_path: Path, dtype: str, order: str) -> None:
    volume = read_volume(saved(tmp_path / "a.nii", nifti(ramp(dtype=dtype), order)))
    assert_is_ramp(volume)
    assert volume.notes == ()
    assert volume.path == tmp_path / "a.nii"


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz", "a.NII.GZ", "a"])
@pytest.mark.parametrize("packed", [True, False])
def test_gzip_is_told_by_content(tmp_path: Path, name: str, packed: bool) -> None:
    content = bytes(nifti())
    assert_is_ramp(read_volume(str(saved(tmp_path / name, gzip.compress(content) if packed else content))))


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_nifti_2(tmp_path: Path, name: str, order: str) -> None:
    header = nib.Nifti2Header(endianness=order)
    header.set_data_dtype(np.int16)
    image = nib.Nifti2Image(ramp(), AFFINE, header)
    image.to_filename(tmp_path / name)
    assert_is_ramp(read_volume(tmp_path / name))


@pytest.mark.parametrize("dtype", ["u1", "i2", "i4", "f4"])
@pytest.mark.parametrize("name", ["a.mgz", "a.mgh"])
def test_freesurfer(tmp_path: Path, name: str, dtype: str) -> None:
    nib.MGHImage(ramp(dtype=dtype), AFFINE).to_filename(tmp_path / name)
    volume = read_volume(tmp_path / name)
    assert_is_ramp(volume)
    assert volume.notes == ()


@pytest.mark.parametrize("kind", [nib.Nifti1Pair, nib.Nifti2Pair])
@pytest.mark.parametrize("ending", ["", ".gz"])
def test_pair_by_either_half(tmp_path: Path, kind: Any, ending: str) -> None:
    kind(ramp(), AFFINE).to_filename(tmp_path / f"a.img{ending}")
    for half in ("hdr", "img"):
        assert_is_ramp(read_volume(tmp_path / f"a.{half}{ending}"))
    (tmp_path / f"a.img{ending}").unlink()
    refused(tmp_path / f"a.hdr{ending}", MissingInputError, "a.img is missing")


def test_the_half_that_was_named_is_read(tmp_path: Path) -> None:
    nib.Nifti1Pair(ramp(), AFFINE).to_filename(tmp_path / "a.img")
    saved(tmp_path / "a.img.gz", gzip.compress((ramp() + 1).tobytes(order="F")))
    assert_is_ramp(read_volume(tmp_path / "a.img"))
    np.testing.assert_array_equal(read_volume(tmp_path / "a.img.gz").data, ramp() + 1)


@pytest.mark.parametrize("axes", itertools.permutations(range(3)))
@pytest.mark.parametrize("signs", itertools.product((1, -1), repeat=3))
def test_48_orientations_are_kept_as_stored(
    tmp_path: Path, axes: tuple[int, ...], signs: tuple[int, ...]
) -> None:
    affine = np.eye(4)
    affine[:3, :3] = 0
    for column, (row, sign) in enumerate(zip(axes, signs, strict=True)):
        affine[row, column] = sign * (1.0, 1.5, 2.0)[column]
    affine[:3, 3] = (-10, 20, 30)
    volume = read_volume(saved(tmp_path / "a.nii", nifti(affine=affine)))
    np.testing.assert_array_equal(volume.data, ramp())
    np.testing.assert_array_equal(volume.geometry.affine, affine)
    assert volume.geometry.spacing == (1.0, 1.5, 2.0)
    letters = "".join(("RAS" if sign > 0 else "LPI")[row] for row, sign in zip(axes, signs, strict=True))
    assert volume.geometry.orientation == letters


@pytest.mark.parametrize("tail", [(1,), (1, 1)])
def test_trailing_axes_of_length_one_are_dropped_and_noted(tmp_path: Path, tail: tuple[int, ...]) -> None:
    volume = read_volume(saved(tmp_path / "a.nii", nifti(ramp(SHAPE + tail))))
    assert_is_ramp(volume)
    (note,) = volume.notes
    assert "5x4x3x1" in note


def test_channels_of_a_4d_file(tmp_path: Path) -> None:
    data = np.stack([ramp() + 1000 * k for k in range(3)], axis=-1)
    path = saved(tmp_path / "a.nii.gz", gzip.compress(nifti(data)))
    assert count_channels(path) == 3
    volumes = read_channels(path)
    assert len(volumes) == 3
    for k, volume in enumerate(volumes):
        np.testing.assert_array_equal(volume.data, ramp() + 1000 * k)
        assert volume.data.flags.c_contiguous
        assert volume.geometry.shape == SHAPE
    refused(
        path, BadDataError, "is 4-D with 3 volumes where one 3-D image is needed; pass it with --channels"
    )


def test_channels_of_a_3d_file_and_of_mgz(tmp_path: Path) -> None:
    (only,) = read_channels(saved(tmp_path / "a.nii", nifti()))
    assert_is_ramp(only)
    nib.MGHImage(np.stack([ramp(), -ramp()], axis=-1), AFFINE).to_filename(tmp_path / "a.mgz")
    first, second = read_channels(tmp_path / "a.mgz")
    assert_is_ramp(first)
    np.testing.assert_array_equal(second.data, -ramp())


def test_geometry_needs_no_voxels(tmp_path: Path) -> None:
    geometry = read_geometry(saved(tmp_path / "a.nii", nifti()))
    assert geometry.shape == SHAPE
    np.testing.assert_array_equal(geometry.affine, AFFINE)


@pytest.mark.parametrize(
    ("slope", "intercept", "expected"),
    [
        (2.0, -3.0, ramp() * 2.0 - 3.0),
        (0.5, 0.0, ramp() * 0.5),
        (1.0, 10.0, ramp() + 10.0),
        (0.0, 7.0, ramp()),
        (math.nan, 7.0, ramp()),
        (math.nan, math.nan, ramp()),
    ],
)
def test_scaling(tmp_path: Path, slope: float, intercept: float, expected: np.ndarray) -> None:
    content = patched(nifti(), (112, "2f", (slope, intercept)))
    volume = read_volume(saved(tmp_path / "a.nii", content))
    assert volume.data.dtype == np.float32
    np.testing.assert_array_equal(volume.data, expected)


def test_scaling_reaches_every_slice(tmp_path: Path) -> None:
    shape = (2, 3, 70)
    content = patched(nifti(ramp(shape)), (112, "2f", (2.0, 1.0)))
    np.testing.assert_array_equal(read_volume(saved(tmp_path / "a.nii", content)).data, ramp(shape) * 2 + 1)


def test_scaling_is_computed_in_double_precision(tmp_path: Path) -> None:
    content = patched(nifti(ramp(dtype="f4") + 2**23), (112, "2f", (3.0, -3.0 * 2**23)))
    np.testing.assert_array_equal(read_volume(saved(tmp_path / "a.nii", content)).data, ramp() * 3)


def qform(*quaternion: float) -> list[tuple[int, str, Any]]:
    """Only the qform: voxels of 1, 2 and 3 mm, the first voxel at (10, 20, 30)."""
    return [
        (252, "2h", (1, 0)),
        (256, "6f", (*quaternion, 10, 20, 30)),
        (76, "4f", (1, 1, 2, 3)),
        (280, "12f", (0,) * 12),
    ]


@pytest.mark.parametrize(
    ("changes", "columns"),
    [
        (qform(0, 0, 0), [(1, 0, 0), (0, 2, 0), (0, 0, 3)]),
        # Half a turn about z, as ITK writes LPS images.
        (qform(0, 0, 1), [(-1, 0, 0), (0, -2, 0), (0, 0, 3)]),
        ([*qform(0, 0, 0), (76, "f", -1)], [(1, 0, 0), (0, 2, 0), (0, 0, -3)]),
        ([*qform(0, 0, 0), (76, "f", 0)], [(1, 0, 0), (0, 2, 0), (0, 0, 3)]),
        ([*qform(0, 0, 0), (80, "f", -1)], [(1, 0, 0), (0, 2, 0), (0, 0, 3)]),
    ],
)
def test_qform_alone(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
    changes: list[tuple[int, str, Any]],
    columns: list[tuple[int, ...]],
) -> None:
    volume = read_volume(saved(tmp_path / "a.nii", patched(nifti(), *changes)))
    np.testing.assert_allclose(volume.geometry.affine[:3, :3].T, columns, atol=1e-6)
    np.testing.assert_array_equal(volume.geometry.affine[:3, 3], (10, 20, 30))
    assert volume.notes == ()
    assert not caplog.records and capfd.readouterr() == ("", "")


# Without shear: the quaternion cannot hold one.
STRAIGHT = np.array([[1.0, 0, 0, 10], [0, 2, 0, 20], [0, 0, 3, 30], [0, 0, 0, 1]])


@pytest.mark.parametrize(("shift", "noted"), [(0.0, False), (0.9, False), (1.1, True), (40.0, True)])
def test_disagreeing_forms_use_the_sform(tmp_path: Path, shift: float, noted: bool) -> None:
    content = patched(nifti(affine=STRAIGHT), (252, "2h", (1, 1)), (256, "6f", (0, 0, 0, 10 + shift, 20, 30)))
    volume = read_volume(saved(tmp_path / "a.nii", content))
    np.testing.assert_array_equal(volume.geometry.affine, STRAIGHT)
    assert [f"by up to {shift:.1f} mm" in note for note in volume.notes] == [True] * noted


def test_a_damaged_qform_beside_an_sform_is_noted(tmp_path: Path) -> None:
    content = patched(nifti(), (252, "2h", (1, 1)), (256, "3f", (3, 3, 3)))
    volume = read_volume(saved(tmp_path / "a.nii", content))
    np.testing.assert_array_equal(volume.geometry.affine, AFFINE)
    assert any("qform is damaged" in note for note in volume.notes)


@pytest.mark.parametrize(("code", "unit", "factor"), [(1, "metre", 1000.0), (3, "micron", 0.001)])
@pytest.mark.parametrize("form", ["sform", "qform"])
def test_units_become_mm(tmp_path: Path, code: int, unit: str, factor: float, form: str) -> None:
    small = STRAIGHT / factor
    small[3, 3] = 1
    changes: list[tuple[int, str, Any]] = [(123, "B", code + 8)]  # 8: seconds, in the upper bits
    if form == "qform":
        changes += [(252, "2h", (1, 0)), (256, "6f", (0, 0, 0, *small[:3, 3]))]
    volume = read_volume(saved(tmp_path / "a.nii", patched(nifti(affine=small), *changes)))
    np.testing.assert_allclose(volume.geometry.affine, STRAIGHT, rtol=1e-6)
    (note,) = volume.notes
    assert unit in note


@pytest.mark.parametrize(("cross", "noted"), [(0.0005, False), (0.1, True)])
def test_shear_is_noted(tmp_path: Path, cross: float, noted: bool) -> None:
    affine = np.eye(4)
    affine[0, 1] = cross
    volume = read_volume(saved(tmp_path / "a.nii", nifti(affine=affine)))
    np.testing.assert_allclose(volume.geometry.affine, affine, atol=1e-7)
    assert ["sheared" in note for note in volume.notes] == [True] * noted


@pytest.mark.parametrize("dtype", ["f4", "f8"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_percent_of_non_finite_voxels_becomes_zero(tmp_path: Path, value: float, dtype: str) -> None:
    data = ramp((10, 10, 10), dtype)
    data.flat[:10] = value
    volume = read_volume(saved(tmp_path / "a.nii", nifti(data)))
    expected = ramp((10, 10, 10), dtype)
    expected.flat[:10] = 0
    np.testing.assert_array_equal(volume.data, expected)
    (note,) = volume.notes
    assert "10 voxels" in note and "set to 0" in note
    data.flat[10] = value
    refused(saved(tmp_path / "b.nii", nifti(data)), BadDataError, "11 voxels (1.1 %) are NaN or infinite")


@pytest.mark.parametrize(
    "content",
    [
        gzip.compress(nifti()) + b"\0" * 500,
        gzip.compress(nifti()[:400]) + gzip.compress(nifti()[400:]),
        gzip.compress(nifti() + b"\0" * 5000),
        nifti() + b"padding",
    ],
    ids=["zeros behind gzip", "two gzip members", "padding inside", "padding"],
)
def test_harmless_surplus(tmp_path: Path, content: bytes) -> None:
    volume = read_volume(saved(tmp_path / "a.nii.gz", content))
    assert_is_ramp(volume)
    assert volume.notes == ()


def test_header_extension(tmp_path: Path) -> None:
    content = patched(nifti(), (108, "f", 384), (348, "B", 1))
    content[352:352] = struct.pack("<2i", 32, 6) + b"comment".ljust(24, b"\0")
    assert_is_ramp(read_volume(saved(tmp_path / "a.nii", content)))


# Labels ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["u1", "i2", "i8", "u8", "f4", "f8"])
def test_labels_are_int32(tmp_path: Path, dtype: str) -> None:
    volume = read_volume(saved(tmp_path / "a.nii", nifti(ramp(dtype=dtype))), labels=True)
    assert volume.data.dtype == np.int32
    assert volume.data.flags.c_contiguous
    np.testing.assert_array_equal(volume.data, ramp())


@pytest.mark.parametrize("dtype", ["i4", "f8"])
def test_large_labels_stay_exact(tmp_path: Path, dtype: str) -> None:
    data = ramp(dtype=dtype) + 2**24  # float32 would lose every second one
    volume = read_volume(saved(tmp_path / "a.nii", nifti(data)), labels=True)
    np.testing.assert_array_equal(volume.data, data)


def test_labels_with_a_scaling_and_an_empty_map(tmp_path: Path) -> None:
    scaled = patched(nifti(), (112, "2f", (2.0, 1.0)))
    volume = read_volume(saved(tmp_path / "a.nii", scaled), labels=True)
    np.testing.assert_array_equal(volume.data, ramp() * 2 + 1)
    empty = read_volume(saved(tmp_path / "b.nii", nifti(np.zeros(SHAPE, "u1"))), labels=True)
    assert not empty.data.any()


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (ramp(dtype="f4") / 2, "holds 0.5, labels are whole numbers"),
        (ramp(dtype="i8") + 2**40, "more than 32 bits"),
        (ramp(dtype="i8") - 2**40, "more than 32 bits"),
        (ramp(dtype="f8") * 1e12, "more than 32 bits"),
        (np.full(SHAPE, math.nan, "f4"), "60 voxels (100 %) are NaN or infinite"),
    ],
)
def test_refused_as_labels(tmp_path: Path, data: np.ndarray, words: str) -> None:
    path = saved(tmp_path / "a.nii", nifti(data))
    refused(path, BadDataError, words, lambda p: read_volume(p, labels=True))


# Refused by the header ------------------------------------------------------------------------------------


def dims(*sizes: int) -> tuple[int, str, Any]:
    return (40, "8h", (len(sizes), *sizes, *(1,) * (7 - len(sizes))))


NAN_SFORM = np.where(np.eye(4) > 0, math.nan, AFFINE)
FLAT = AFFINE * [1, 1, 0, 1]
NEARLY_FLAT = np.array([[1, 1, 0, 0], [0, 0.001, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]])

HEADERS: dict[str, tuple[list[tuple[int, str, Any]], str]] = {
    "dim 0": ([dims(5, 0, 3)], "size of 5x0x3"),
    "dim negative": ([dims(5, 4, -3)], "size of 5x4x-3"),
    "FreeSurfer's -1": ([dims(-1, 1, 1), (140, "i", 60)], "size of -1x1x1"),
    "no dimensions": ([dims()], "0 dimensions"),
    "8 dimensions": ([(40, "h", 8)], "8 dimensions"),
    "1-D": ([dims(60)], "is 2-D (60)"),
    "2-D": ([dims(20, 3)], "is 2-D (20x3)"),
    "one slice": ([dims(20, 3, 1)], "is 2-D (20x3x1)"),
    "4-D": ([dims(5, 4, 1, 3)], "is 2-D"),
    "vector": ([dims(5, 4, 3, 1, 3)], "is 5-D (5x4x3x1x3)"),
    "long axis": ([dims(1025, 4, 3)], "more than 1024 along an axis"),
    "many voxels": ([dims(1024, 1024, 1024)], "or 536870912 in all"),
    "many channels": ([dims(512, 512, 512, 5)], "or 536870912 in all"),
    "complex64": ([(70, "h", 32)], "complex64"),
    "complex128": ([(70, "h", 1792)], "complex128"),
    "complex256": ([(70, "h", 2048)], "complex256"),
    "RGB": ([(70, "h", 128)], "RGB"),
    "RGBA": ([(70, "h", 2304)], "RGBA"),
    "bits": ([(70, "h", 1)], "binary"),
    "no type": ([(70, "h", 0)], "none"),
    "unknown type": ([(70, "h", 77)], "unknown data type code 77"),
    "offset NaN": ([(108, "f", math.nan)], "vox_offset"),
    "offset inf": ([(108, "f", math.inf)], "vox_offset"),
    "offset negative": ([(108, "f", -16)], "vox_offset"),
    "offset in the header": ([(108, "f", 100)], "vox_offset"),
    "offset huge": ([(108, "f", 1e9)], "vox_offset"),
    "slope inf": ([(112, "f", math.inf)], "scl_slope inf"),
    "intercept NaN": ([(112, "2f", (2, math.nan))], "scl_inter nan"),
    "intercept inf": ([(112, "2f", (2, math.inf))], "scl_inter inf"),
    "no code": ([(252, "2h", (0, 0))], "no orientation code"),
    "negative code": ([(252, "2h", (0, -1))], "no orientation code"),
    "sform NaN": ([(280, "12f", tuple(NAN_SFORM[:3].ravel()))], "affine that is not finite"),
    "sform inf": ([(292, "f", math.inf)], "affine that is not finite"),
    "sform zero": ([(280, "12f", (0,) * 12)], "singular"),
    "sform flat": ([(280, "12f", tuple(FLAT[:3].ravel()))], "singular"),
    "sform nearly flat": ([(280, "12f", tuple(NEARLY_FLAT[:3].ravel()))], "singular"),
    "qform NaN": ([*qform(0, 0, 0), (256, "f", math.nan)], "damaged qform"),
    "qform not a rotation": ([*qform(1, 1, 0)], "damaged qform"),
    "pixdim NaN": ([*qform(0, 0, 0), (84, "f", math.nan)], "damaged qform"),
    "pixdim zero": ([*qform(0, 0, 0), (84, "f", 0)], "singular"),
    "tiny voxels": ([*qform(0, 0, 0), (80, "f", 0.04)], "voxels of 0.04 x 2 x 3 mm"),
    "huge voxels": ([*qform(0, 0, 0), (88, "f", 51)], "voxels of 1 x 2 x 51 mm"),
    "not metres": ([*qform(0, 0, 0), (123, "B", 1)], "voxels of 1000 x 2000 x 3000 mm (unit: metre)"),
    "far away": ([(292, "f", 2e6)], "mm from the origin"),
    "Analyze": ([(344, "4s", b"\0\0\0\0")], "Analyze 7.5"),
}


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gzip"])
@pytest.mark.parametrize("case", HEADERS)
def test_refused_by_the_header_before_any_voxel_is_read(tmp_path: Path, case: str, packed: bool) -> None:
    changes, words = HEADERS[case]
    # The voxels are not even there: whoever looked for them would complain about that instead.
    content = bytes(patched(nifti()[:352], *changes))
    path = saved(tmp_path / "a.nii", gzip.compress(content) if packed else content)
    refused(path, BadDataError, words)
    refused(path, BadDataError, words, read_channels)
    refused(path, BadDataError, words, count_channels)
    refused(path, BadDataError, words, read_geometry)


def test_a_damaged_sform_beside_a_qform_is_refused_without_a_warning(tmp_path: Path) -> None:
    content = patched(nifti(), (252, "2h", (1, 1)), (292, "f", math.inf), (280, "f", math.inf))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        refused(saved(tmp_path / "a.nii", content), BadDataError, "affine that is not finite")


def test_quad_precision_is_converted_or_refused(tmp_path: Path) -> None:
    content = patched(nifti(ramp(SHAPE, "f4")), (70, "2h", (1536, 128)))
    content[352:] = np.asfortranarray(ramp().astype(np.longdouble)).tobytes(order="F").ljust(960, b"\0")
    path = saved(tmp_path / "a.nii", content)
    if np.finfo(np.longdouble).nmant == 112:
        assert_is_ramp(read_volume(path))
    else:
        refused(path, BadDataError, "float128")


def mgh(*changes: tuple[int, str, Any]) -> bytes:
    content = bytearray(nib.MGHImage(ramp(), AFFINE).to_bytes())
    for offset, kind, value in changes:
        struct.pack_into(">" + kind, content, offset, value)
    return bytes(content)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (mgh((28, "h", 0)), "no orientation code"),
        (mgh((20, "i", 2)), "unknown MGH data type 2"),
        (mgh((4, "i", 0)), "size of 0x4x3"),
        (mgh((4, "i", 2000)), "more than 1024"),
        (mgh((30, "f", math.nan)), "not finite"),
        (mgh((30, "f", 0.0)), "singular"),
        (mgh((16, "i", 2)), "cut off"),
        (mgh()[:284], "cut off"),
        (mgh()[:100], "cut off within its header"),
    ],
)
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gzip"])
def test_refused_mgh(tmp_path: Path, content: bytes, words: str, packed: bool) -> None:
    path = saved(tmp_path / "a.mgz", gzip.compress(content) if packed else content)
    if packed and words == "cut off":
        # Too small a file for the early check of size to tell.
        words = "ends before its last voxel"
        refused(path, BadDataError, words, read_channels)
    else:
        refused(path, BadDataError, words)


# Refused as a file ----------------------------------------------------------------------------------------


def test_not_there(tmp_path: Path) -> None:
    refused(tmp_path / "a.nii", MissingInputError, "no such file")
    refused(saved(tmp_path / "b.nii", nifti()) / "c.nii", MissingInputError, "no such file")
    refused(tmp_path / ("x" * 300), MissingInputError, "no such file")
    (tmp_path / "link.nii").symlink_to(tmp_path / "gone.nii")
    refused(tmp_path / "link.nii", MissingInputError, "no such file")
    with pytest.raises(MissingInputError, match=r"no such file"):
        read_volume("a\0b.nii")


def test_folder_pipe_and_empty_file(tmp_path: Path) -> None:
    refused(tmp_path, MissingInputError, "is a folder")
    if hasattr(os, "mkfifo"):  # not on Windows
        os.mkfifo(tmp_path / "pipe.nii")
        refused(tmp_path / "pipe.nii", MissingInputError, "is a pipe")
    refused(saved(tmp_path / "a.nii.gz", b""), BadDataError, "is empty")
    saved(tmp_path / "b.hdr", b"")
    saved(tmp_path / "b.img", b"voxels")
    with pytest.raises(BadDataError, match=r"b\.hdr: is empty"):
        read_volume(tmp_path / "b.img")


@pytest.mark.parametrize(
    ("error", "expected", "words"),
    [
        (PermissionError(13, "Permission denied"), MissingInputError, "cannot be read (permission denied)"),
        (FileNotFoundError(2, "gone"), MissingInputError, "no longer there"),
        (OSError(5, "Input/output error"), BadDataError, "cannot be read (Input/output error)"),
        (ValueError("two\nlines"), BadDataError, "cannot be read (two lines)"),
        (zlib.error("Error -3"), BadDataError, "Error -3"),
        (MemoryError(), OutOfMemoryError, "not enough memory"),
    ],
)
def test_errors_of_the_system_become_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    expected: type[JrsError],
    words: str,
) -> None:
    path = saved(tmp_path / "a.nii", nifti())

    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(Path, "open", fail)
    refused(path, expected, words)


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root reads everything")
def test_without_permission(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.nii", nifti())
    path.chmod(0)
    refused(path, MissingInputError, "cannot be read (permission denied)")


@pytest.mark.parametrize(
    "content",
    [
        b"hello world",
        b"\0" * 1000,
        b"\x89PNG\r\n\x1a\n" * 50,
        b"\0" * 128 + b"DICM" + b"\0" * 900,
        b"\x5c\x01",
    ],
)
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gzip"])
def test_not_an_image(tmp_path: Path, content: bytes, packed: bool) -> None:
    path = saved(tmp_path / "a.nii.gz", gzip.compress(content) if packed else content)
    refused(path, BadDataError, "is not an image that jrs reads")


@pytest.mark.parametrize("length", [10, 347, 352, 400, 352 + 120 - 1])
def test_cut_off(tmp_path: Path, length: int) -> None:
    refused(saved(tmp_path / "a.nii", nifti()[:length]), BadDataError, "cut off")
    refused(saved(tmp_path / "b.nii.gz", gzip.compress(nifti()[:length])), BadDataError, "cut off")


def noise() -> bytearray:
    """Incompressible, so that half of the gzip file is about half of the voxels."""
    return nifti(np.random.default_rng(0).integers(1, 30000, (40, 40, 40)).astype("i2"))


@pytest.mark.parametrize("share", [0.001, 0.01, 0.5, 0.99])
@pytest.mark.parametrize("name", ["a.nii.gz", "a.mgz"])
def test_gzip_cut_off(tmp_path: Path, share: float, name: str) -> None:
    whole = gzip.compress(noise())
    assert read_volume(saved(tmp_path / name, whole)).data.shape == (40, 40, 40)
    refused(saved(tmp_path / name, whole[: int(share * len(whole))]), BadDataError, "cut off")


def test_gzip_without_its_last_byte(tmp_path: Path) -> None:
    refused(saved(tmp_path / "a.nii.gz", gzip.compress(noise())[:-1]), BadDataError, "cut off")


def test_gzip_damaged(tmp_path: Path) -> None:
    whole = gzip.compress(noise(), mtime=0)
    refused(saved(tmp_path / "a.nii.gz", whole + b"some garbage"), BadDataError, "is damaged")
    refused(saved(tmp_path / "a.nii.gz", whole + b"few"), BadDataError, "its gzip stream")
    wrong_checksum = bytearray(whole)
    wrong_checksum[-8] ^= 1
    refused(saved(tmp_path / "b.nii.gz", wrong_checksum), BadDataError, "CRC")
    stored = bytearray(gzip.compress(noise(), compresslevel=0))
    stored[len(stored) // 2] ^= 1  # one bit of one voxel: only the checksum can tell
    refused(saved(tmp_path / "c.nii.gz", stored), BadDataError, "CRC")
    broken = bytearray(whole)
    broken[len(whole) // 2 : len(whole) // 2 + 200] = b"\xff" * 200
    refused(saved(tmp_path / "d.nii.gz", broken), BadDataError, "is damaged")


# Refused by the voxels ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (np.zeros(SHAPE, "i2"), "every voxel is 0"),
        (np.full(SHAPE, 5, "f4"), "every voxel is 5"),
        (np.full(SHAPE, math.nan, "f4"), "60 voxels (100 %) are NaN"),
        (ramp(dtype="f8") * 1e300, "too large for 32-bit floats"),
        (np.stack([ramp(), ramp() * 0], axis=-1), "volume 2 of 2: every voxel is 0"),
    ],
)
def test_no_image_in_it(tmp_path: Path, data: np.ndarray, words: str) -> None:
    refused(saved(tmp_path / "a.nii", nifti(data)), BadDataError, words, read_channels)


def test_scaling_beyond_float32(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.nii", patched(nifti(), (112, "f", 3e38)))
    refused(path, BadDataError, "too large for 32-bit floats")


# Bombs and noise ------------------------------------------------------------------------------------------


def peak_mib(read: Callable[[], Any]) -> float:
    tracemalloc.start()
    try:
        read()
        return tracemalloc.get_traced_memory()[1] / 2**20
    finally:
        tracemalloc.stop()


def test_a_bomb_is_read_no_further_than_the_header_needs(tmp_path: Path) -> None:
    packer = zlib.compressobj(1, zlib.DEFLATED, 31)
    parts = [packer.compress(bytes(nifti()))]
    parts += [packer.compress(bytes(2**20)) for _ in range(64)]
    # The stream has no end: to have reached it would be an error.
    path = saved(tmp_path / "a.nii.gz", b"".join(parts))
    assert path.stat().st_size < 2**20

    def read() -> None:
        volume = read_volume(path)
        assert_is_ramp(volume)
        (note,) = volume.notes
        assert "more data than its header says" in note

    assert peak_mib(read) < 8


def test_a_header_that_promises_too_much_costs_no_memory(tmp_path: Path) -> None:
    content = patched(nifti(), dims(800, 800, 800))  # 1 GB, within the limits
    for name, packed in (("a.nii", bytes(content)), ("a.nii.gz", gzip.compress(content))):
        path = saved(tmp_path / name, packed)
        assert peak_mib(lambda path=path: refused(path, BadDataError, "cannot hold")) < 4  # type: ignore[misc]


def test_reading_holds_no_double_precision_copy(tmp_path: Path) -> None:
    data = np.random.default_rng(0).integers(0, 1000, (128, 128, 128)).astype("i2")
    path = saved(tmp_path / "a.nii.gz", gzip.compress(patched(nifti(data), (112, "f", 2.0)), 1))
    # 4 MiB stored, 8 MiB as float32, 2 MiB finite or not, 4 MiB a slab; in double precision 16 MiB more.
    assert peak_mib(lambda: read_volume(path)) < 24


def test_random_headers_never_leak_another_exception(tmp_path: Path) -> None:
    random = np.random.default_rng(7)
    accepted = 0
    for trial in range(400):
        source = (nifti(), bytearray(mgh()), bytearray(nib.Nifti2Image(ramp(), AFFINE).to_bytes()))[trial % 3]
        limit = 348 if trial % 3 == 0 else 284 if trial % 3 == 1 else 540
        for _ in range(int(random.integers(1, 6))):
            source[int(random.integers(4, limit))] = int(random.integers(0, 256))
        path = saved(tmp_path / "a.nii", gzip.compress(source) if trial % 2 else source)
        try:
            volume = read_volume(path)
        except JrsError as error:
            assert str(error).startswith(f"{path}: ") and "\n" not in str(error)
        else:
            accepted += 1
            assert np.isfinite(volume.data).all() and np.isfinite(volume.geometry.inverse).all()
    assert 0 < accepted < 400


def test_a_name_with_a_line_break_stays_on_one_line(tmp_path: Path) -> None:
    with pytest.raises(BadDataError) as caught:
        read_volume(saved(tmp_path / "a\nb.nii", b"x"))
    assert "\n" not in str(caught.value) and "a\\nb.nii" in str(caught.value)


def test_the_limits_are_the_documented_ones() -> None:
    assert (headers.MAX_AXIS, headers.MAX_VOXELS) == (1024, 512 * 1024**2)
    assert (headers.MIN_SPACING_MM, headers.MAX_SPACING_MM, reading.MAX_NON_FINITE) == (0.05, 50.0, 0.01)
