"""Affine pre-alignment: known misplacements of a textured, asymmetric head are found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from jrs.errors import BadDataError
from jrs.geometry import Geometry
from jrs.runtime.affine import foreground_box, judge_affine, register_affine
from jrs.runtime.affine_search import Block, quality, starts
from jrs.volume import Volume

SHAPE = (44, 48, 42)
RADII = (39.0, 48.0, 36.0)
OFFSET = np.array([-60.0, 85.0, 45.0])
"""The head lies far from the world's origin, as in a scanner: centres of rotation show."""


def volume(data: np.ndarray, affine: np.ndarray, name: str = "image.nii.gz") -> Volume:
    return Volume(np.ascontiguousarray(data, dtype=np.float32), Geometry(data.shape, affine), Path(name))


def misplacement(helpers: Any, degrees: tuple[float, float, float], linear: np.ndarray, shift: Any) -> np.ndarray:
    matrix = np.eye(4)
    matrix[:3, :3] = helpers.rotation(degrees) @ linear
    matrix[:3, 3] = shift
    return matrix


def moving_image(helpers: Any, truth: np.ndarray, contrast: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """The head after A, on an oblique LPS grid: data(y) = head(A^-1 y - offset)."""
    center = nib.affines.apply_affine(truth, OFFSET) + 3.0
    affine = helpers.grid_affine(SHAPE, (2.4, 2.6, 2.4), "LPS", (4, -3, 6), tuple(center))
    points = helpers.world_points(np.linalg.inv(truth) @ affine, SHAPE) - OFFSET.reshape(3, 1, 1, 1)
    return helpers.head(points, contrast), affine


@pytest.fixture(scope="module")
def fixed(helpers: Any) -> Volume:
    affine = helpers.grid_affine(SHAPE, (2.4, 2.5, 2.4), "RAS", center=tuple(np.add(OFFSET, (2, -3, 1))))
    points = helpers.world_points(affine, SHAPE) - OFFSET.reshape(3, 1, 1, 1)
    return volume(helpers.head(points), affine, "atlas.nii.gz")


def corners() -> np.ndarray:
    """Corners of the box that just holds the head, (8,3): the worst places for an affine."""
    signs = np.array([(a, b, c) for a in (-1, 1) for b in (-1, 1) for c in (-1, 1)])
    return OFFSET + signs * np.array(RADII) / np.sqrt(3) * 1.2


def worst_mm(got: np.ndarray, truth: np.ndarray) -> float:
    difference = nib.affines.apply_affine(got, corners()) - nib.affines.apply_affine(truth, corners())
    return float(np.linalg.norm(difference, axis=1).max())


CASES = {
    "identity": ((0, 0, 0), np.eye(3), (0, 0, 0)),
    "shifted": ((0, 0, 0), np.eye(3), (25, -40, 30)),
    "turned": ((6, -5, 7), np.eye(3), (6, -8, 5)),
    "scaled": ((3, 2, -4), np.diag([1.08, 0.94, 1.05]), (-5, 10, 4)),
    "sheared": ((-4, 5, 3), np.array([[1.02, 0.06, 0], [0, 0.97, -0.05], [0.03, 0, 1.0]]), (3, 3, -9)),
}


@pytest.mark.parametrize("name", CASES)
def test_a_known_misplacement_is_found(fixed: Volume, helpers: Any, name: str) -> None:
    truth = misplacement(helpers, *CASES[name])
    data, affine = moving_image(helpers, truth)
    found = register_affine(volume(data, affine), fixed, threads=1)
    assert worst_mm(found.matrix, truth) < 2.0
    np.testing.assert_array_equal(found.matrix[3], (0, 0, 0, 1))
    assert found.after.mutual_information > 0.5 and found.after.overlap > 0.95 and found.warning is None


def test_another_contrast_is_aligned_too(fixed: Volume, helpers: Any) -> None:
    """Mutual information: a T2-like image, its lesions inverted, to a T1."""
    truth = misplacement(helpers, (5, -4, 6), np.diag([1.03, 0.98, 1.02]), (6, -8, 5))
    data, affine = moving_image(helpers, truth, contrast=2)
    found = register_affine(volume(data, affine), fixed, threads=1)
    assert worst_mm(found.matrix, truth) < 4.0


def test_rigid_gives_a_rotation(fixed: Volume, helpers: Any) -> None:
    truth = misplacement(helpers, (6, -5, 7), np.eye(3), (12, -8, 5))
    data, affine = moving_image(helpers, truth)
    found = register_affine(volume(data, affine), fixed, "rigid", threads=1)
    linear = found.matrix[:3, :3]
    np.testing.assert_allclose(linear @ linear.T, np.eye(3), atol=1e-6)
    assert np.linalg.det(linear) == pytest.approx(1.0, abs=1e-6)
    assert worst_mm(found.matrix, truth) < 2.0


def test_rigid_does_not_scale_what_is_larger(fixed: Volume, helpers: Any) -> None:
    truth = misplacement(helpers, (3, 2, -4), 1.08 * np.eye(3), (4, 3, 2))
    data, affine = moving_image(helpers, truth)
    found = register_affine(volume(data, affine), fixed, "rigid", threads=1)
    assert np.linalg.det(found.matrix[:3, :3]) == pytest.approx(1.0, abs=1e-6)


@pytest.fixture(scope="module")
def as_stored(fixed: Volume, helpers: Any) -> np.ndarray:
    """What is found for the scaled head as it is stored, LPS."""
    data, affine = moving_image(helpers, misplacement(helpers, *CASES["scaled"]))
    return register_affine(volume(data, affine), fixed, threads=1).matrix


@pytest.mark.parametrize("codes", ["RAS", "PSR", "IAL"])
def test_the_result_does_not_depend_on_how_the_images_are_stored(
    fixed: Volume, helpers: Any, codes: str, as_stored: np.ndarray
) -> None:
    data, affine = moving_image(helpers, misplacement(helpers, *CASES["scaled"]))
    turned = helpers.stored_as(data, affine, codes)
    assert turned[0].shape != data.shape or not np.array_equal(turned[0], data)
    atlas = helpers.stored_as(np.asarray(fixed.data), np.asarray(fixed.geometry.affine), codes[::-1])
    got = register_affine(volume(*turned), volume(*atlas), threads=1).matrix
    # The last bits of the resampled images differ, and the optimiser ends a little elsewhere.
    assert worst_mm(got, as_stored) < 0.3


def test_the_same_images_give_the_same_result_on_any_number_of_threads(fixed: Volume, helpers: Any) -> None:
    data, affine = moving_image(helpers, misplacement(helpers, *CASES["shifted"]))
    one, two, three = (register_affine(volume(data, affine), fixed, threads=n) for n in (1, 1, 3))
    np.testing.assert_array_equal(one.matrix, two.matrix)
    np.testing.assert_array_equal(one.matrix, three.matrix)


# Refusals -------------------------------------------------------------------------------------------------


def refusal(moving: Volume, fixed: Volume) -> str:
    with pytest.raises(BadDataError) as caught:
        register_affine(moving, fixed, threads=1)
    message = str(caught.value)
    assert "\n" not in message and "; " in message
    return message


def test_an_empty_image_is_refused(fixed: Volume) -> None:
    empty = volume(np.zeros((20, 20, 20)), np.diag([5.0, 5, 5, 1]), "empty.nii.gz")
    assert "empty.nii.gz" in refusal(empty, fixed)
    assert "empty.nii.gz" in refusal(fixed, empty)
    negative = volume(np.full((20, 20, 20), -3.0), np.diag([5.0, 5, 5, 1]), "negative.nii.gz")
    assert "negative.nii.gz" in refusal(negative, fixed)


def test_a_speck_is_refused(fixed: Volume) -> None:
    data = np.zeros((20, 20, 20))
    data[10, 10, 10:13] = 100.0
    assert "speck.nii.gz" in refusal(volume(data, np.diag([5.0, 5, 5, 1]), "speck.nii.gz"), fixed)


def test_images_that_hardly_overlap_are_refused(helpers: Any) -> None:
    """A crumb, however it is placed, covers next to nothing of a head."""
    affine = helpers.grid_affine((24, 24, 24), (8.0, 8.0, 8.0), "RAS")
    large = volume(helpers.head(helpers.world_points(affine, (24, 24, 24))), affine, "large.nii.gz")
    data = np.zeros((20, 20, 20))
    data[7:13, 7:13, 7:13] = np.random.default_rng(0).uniform(50, 100, (6, 6, 6))
    crumb = volume(data, np.diag([1.0, 1.0, 1.0, 1.0]), "crumb.nii.gz")
    message = refusal(crumb, large)
    assert "crumb.nii.gz" in message and "large.nii.gz" in message and "--affine" in message


# The box --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codes", ["RAS", "LPS", "SAR"])
def test_the_box_holds_the_foreground_in_the_world(helpers: Any, codes: str) -> None:
    affine = helpers.grid_affine((20, 20, 20), (2.0, 3.0, 4.0), "RAS", center=(10, -5, 7))
    data = np.zeros((20, 20, 20), dtype=np.float32)
    data[4:15, 6:17, 5:12] = 100.0
    data[0, 0, 0] = 100.0  # a hot voxel does not stretch it
    lower, upper = foreground_box(volume(*helpers.stored_as(data, affine, codes)))
    np.testing.assert_allclose(lower, nib.affines.apply_affine(affine, (4, 6, 5)), atol=1e-9)
    np.testing.assert_allclose(upper, nib.affines.apply_affine(affine, (14, 16, 11)), atol=1e-9)


# Quality and further starts -------------------------------------------------------------------------------


def test_the_overlap_is_the_dice_score_of_the_foregrounds(helpers: Any) -> None:
    """Two equal boxes of 40 mm, one shifted by 10 mm: three quarters overlap; moved back, all of them do."""
    affine = helpers.grid_affine((40, 40, 40), (2.0, 2.0, 2.0), "LAS")
    data = np.zeros((40, 40, 40))
    data[10:30, 10:30, 10:30] = np.random.default_rng(0).uniform(60, 100, (20, 20, 20))
    shifted = affine.copy()
    shifted[0, 3] += 10.0
    matrix = np.eye(4)
    matrix[0, 3] = 10.0
    before, after, warning = judge_affine(volume(data, shifted), volume(data, affine), matrix)
    assert before.overlap == pytest.approx(0.75, abs=0.05)
    assert after.overlap == pytest.approx(1.0, abs=0.03) and warning is None
    assert after.mutual_information > before.mutual_information > 0


def test_a_placement_that_is_wrong_is_called_poor(fixed: Volume) -> None:
    wrong = np.eye(4)
    wrong[:3, 3] = (60.0, 0.0, 0.0)
    _, after, warning = judge_affine(fixed, fixed, wrong)
    assert after.overlap < 0.5 and warning is not None
    assert "poor" in warning and "--affine" in warning and "\n" not in warning


def test_a_placement_worse_than_none_is_called_poor(fixed: Volume, helpers: Any) -> None:
    """Nearly the same foreground, but turned by half a circle about the long axis."""
    linear = np.diag([-1.0, 1.0, -1.0])
    turned = np.eye(4)
    turned[:3, :3] = linear
    turned[:3, 3] = OFFSET - linear @ OFFSET
    before, after, warning = judge_affine(fixed, fixed, turned)
    assert after.overlap > 0.75 and after.mutual_information < before.mutual_information
    assert warning is not None and "mutual information" in warning


@pytest.mark.parametrize("degrees", [(0, 0, 44), (-30, 20, 25), (40, -10, 5), (25, 25, 25)], ids=str)
def test_large_rotations_shifts_and_scales_are_found(fixed: Volume, helpers: Any, degrees: Any) -> None:
    truth = misplacement(helpers, degrees, 0.87 * np.eye(3), (30, -40, 25))
    data, affine = moving_image(helpers, truth)
    found = register_affine(volume(data, affine), fixed, threads=1)
    assert worst_mm(found.matrix, truth) < 2.5
    assert found.before.overlap < 0.6 < 0.9 < found.after.overlap


def test_images_of_other_things_come_with_a_warning(fixed: Volume, helpers: Any) -> None:
    """A long thin thing is no head, wherever it is put: every start is tried, and the outcome said to be poor."""
    affine = helpers.grid_affine((20, 20, 70), (3.0, 3.0, 3.0), "RAS")
    x, y, z = helpers.world_points(affine, (20, 20, 70))
    rod = 100.0 * ((x**2 + y**2 < 15.0**2) & (np.abs(z) < 95.0)) + np.cos(z / 5.0)
    found = register_affine(volume(rod, affine, "rod.nii.gz"), fixed, "rigid", threads=1)
    assert found.starts > 1 and found.warning is not None


def test_an_upside_down_head_is_found_by_the_further_starts(fixed: Volume) -> None:
    """Search everywhere, without the first one's net of up to 50 degrees."""
    block = Block(np.maximum(np.asarray(fixed.data, dtype=np.float32), 0.0), fixed.geometry).averaged(3)
    turned = np.diag([1.0, -1.0, -1.0, 1.0])
    turned[:3, 3] = OFFSET - turned[:3, :3] @ OFFSET
    moving = Block(block.data, Geometry(block.grid.shape, turned @ block.grid.affine))
    near = starts(moving, block, True, False, 1)[0]
    found = starts(moving, block, True, True, 2)[0]
    assert worst_mm(found, turned) < 5.0
    assert quality(moving, block, found).mutual_information > quality(moving, block, near).mutual_information - 1e-6


@pytest.mark.parametrize("kind", ["a plane", "single voxels"])
def test_a_foreground_that_vanishes_at_the_searchs_resolution(kind: str) -> None:
    data = np.random.default_rng(0).normal(-1000.0, 5.0, (60, 60, 60)).astype(np.float32)
    if kind == "a plane":
        data[10:50, 10:50, 30] = 100.0
    else:
        data[::2, ::2, ::2] = 100.0
    thin = Volume(data, Geometry(data.shape, np.eye(4)), Path("thin.nii"))
    x = np.indices((60, 60, 60)) - 30.0
    inside = (np.linalg.norm(x, axis=0) < 22).astype(np.float32)
    ball = Volume(inside, thin.geometry, Path("ball.nii"))
    for pair in ((thin, ball), (ball, thin)):
        with pytest.raises(BadDataError, match=r"thin\.nii.*foreground"):
            register_affine(*pair)


def test_spacings_that_no_head_has() -> None:
    data = np.ones((30, 30, 30), dtype=np.float32)
    vast = Volume(data, Geometry(data.shape, np.diag([1.0, 50.0, 1.0, 1.0])), Path("vast.nii"))
    with pytest.raises(BadDataError, match=r"vast\.nii.*1450 mm.*voxel size"):
        register_affine(vast, vast)
