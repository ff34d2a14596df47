"""Where the voxels of an image lie in the world.

Everything in jrs is RAS+ millimetres or voxel indices of a named grid.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
Shape = tuple[int, int, int]

# Headers hold single precision: the same head stored in another orientation or format lies up to 1e-5 mm elsewhere.
# Steps far above that make it the same grid to the last bit, save for the few numbers that lie between two steps.
_CENTER_STEP_MM = 2.0**-7
_COLUMN_STEP_MM = 2.0**-16


@dataclass(frozen=True)
class Reorientation:
    """Another order and direction of an array's axes: no value changes.

    Axis k of the new array is axis ``axes[k]`` of the old one, reversed where ``flipped[k]``.
    """

    axes: tuple[int, int, int]
    flipped: tuple[bool, bool, bool]

    def apply(self, data: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """``data`` (..., X, Y, Z) with its last three axes reoriented, a view."""
        lead = data.ndim - 3
        turned = data.transpose(*range(lead), *(lead + axis for axis in self.axes))
        return self._flip(turned)

    def undo(self, data: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """The array that ``apply`` was given, from what it gave; a view."""
        lead = data.ndim - 3
        return self._flip(data).transpose(*range(lead), *(lead + self.axes.index(axis) for axis in range(3)))

    def _flip(self, data: npt.NDArray[Any]) -> npt.NDArray[Any]:
        a, b, c = (slice(None, None, -1 if flip else 1) for flip in self.flipped)
        return data[..., a, b, c]


@dataclass(frozen=True, eq=False)
class Geometry:
    """A voxel grid: ``x_ras_mm = affine @ (i, j, k, 1)`` for voxel indices i, j, k (centres at integers)."""

    shape: Shape
    affine: FloatArray

    def __post_init__(self) -> None:
        affine = np.array(self.affine, dtype=np.float64)
        affine.setflags(write=False)
        object.__setattr__(self, "affine", affine)
        object.__setattr__(self, "shape", tuple(int(n) for n in self.shape))

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Geometry)
            and self.shape == other.shape
            and bool(np.array_equal(self.affine, other.affine))
        )

    def __hash__(self) -> int:
        return hash((self.shape, (self.affine + 0.0).tobytes()))  # -0.0 equals 0.0

    @cached_property
    def inverse(self) -> FloatArray:
        """The 4x4 matrix from RAS mm to voxel indices."""
        return np.asarray(np.linalg.inv(self.affine), dtype=np.float64)

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Voxel size along each array axis, mm."""
        lengths = np.linalg.norm(self.affine[:3, :3], axis=0)
        return (float(lengths[0]), float(lengths[1]), float(lengths[2]))

    @property
    def voxel_volume_ml(self) -> float:
        """Volume of one voxel, millilitres."""
        return float(abs(np.linalg.det(self.affine[:3, :3]))) / 1000.0

    @property
    def orientation(self) -> str:
        """The three nearest anatomical directions of the array axes, for example ``LPS``."""
        return "".join(nib.aff2axcodes(self.affine))

    @property
    def center(self) -> FloatArray:
        """RAS mm of the middle of the grid."""
        middle = (np.array(self.shape, dtype=np.float64) - 1.0) / 2.0
        return self.to_ras(middle)

    def to_ras(self, voxels: npt.ArrayLike) -> FloatArray:
        """Map voxel indices (..., 3) to RAS mm (..., 3)."""
        return apply_affine(self.affine, voxels)

    def to_voxels(self, points_ras: npt.ArrayLike) -> FloatArray:
        """Map RAS mm (..., 3) to voxel indices (..., 3)."""
        return apply_affine(self.inverse, points_ras)

    def holds(self, voxels: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
        """Which voxel coordinates (3,n) lie on the grid, half a voxel around it included."""
        ends = np.array(self.shape).reshape(3, 1) - 0.5
        inside: npt.NDArray[np.bool_] = np.all((voxels >= -0.5) & (voxels <= ends), axis=0)
        return inside

    def is_close_to(self, other: Geometry, tolerance_mm: float = 1e-3) -> bool:
        """Whether both grids have the same shape and no corner is further apart than ``tolerance_mm``."""
        if self.shape != other.shape:
            return False
        return bool(np.abs(self.corners() - other.corners()).max() <= tolerance_mm)

    def corners(self) -> FloatArray:
        """RAS mm of the eight corner voxel centres, (8, 3)."""
        ends = [(0, n - 1) for n in self.shape]
        grid = np.stack(np.meshgrid(*ends, indexing="ij"), axis=-1)
        return self.to_ras(grid.reshape(-1, 3))

    def refined(self, factors: Shape) -> Geometry:
        """The grid whose voxels are this one's, each cut into ``factors`` equal parts along each axis."""
        scale = np.array(factors, dtype=np.float64)
        affine = self.affine.copy()
        affine[:3, :3] = self.affine[:3, :3] / scale
        affine[:3, 3] = self.to_ras((1.0 / scale - 1.0) / 2.0)
        return Geometry(tuple(int(n * f) for n, f in zip(self.shape, factors, strict=True)), affine)  # type: ignore[arg-type]

    def padded(self, voxels: Shape) -> Geometry:
        """The grid with so many ``voxels`` more at both ends of each axis."""
        affine = self.affine.copy()
        affine[:3, 3] = self.to_ras([-n for n in voxels])
        shape = tuple(n + 2 * more for n, more in zip(self.shape, voxels, strict=True))
        return Geometry(shape, affine)  # type: ignore[arg-type]

    def part(self, box: tuple[slice, slice, slice]) -> Geometry:
        """The grid of ``data[box]``; the slices have a start, a stop and no step."""
        affine = self.affine.copy()
        affine[:3, 3] = self.to_ras([side.start for side in box])
        a, b, c = (side.stop - side.start for side in box)
        return Geometry((a, b, c), affine)

    def canonical(self) -> tuple[Geometry, Reorientation]:
        """This grid with its axes in the order and direction nearest to RAS, and how an array gets there.

        What is computed on the canonical grid does not depend on how a file stores its voxels. The middle is
        rounded to 1/128 mm and the steps to 1/65536 mm a voxel, so that it does not depend on the rounding of the
        file's header either: no voxel moves by more than 0.01 mm.
        """
        directions = nib.io_orientation(self.affine)
        order = [int(np.flatnonzero(directions[:, 0] == world)[0]) for world in range(3)]
        signs = np.array([directions[axis, 1] for axis in order])
        linear = _stepped(self.affine[:3, order] * signs, _COLUMN_STEP_MM)
        shape = (self.shape[order[0]], self.shape[order[1]], self.shape[order[2]])
        affine = np.eye(4)
        affine[:3, :3] = linear
        affine[:3, 3] = _stepped(self.center, _CENTER_STEP_MM) - linear @ ((np.array(shape) - 1.0) / 2.0)
        flips = (bool(signs[0] < 0), bool(signs[1] < 0), bool(signs[2] < 0))
        return Geometry(shape, affine), Reorientation((order[0], order[1], order[2]), flips)

    @staticmethod
    def aligned(
        shape: Shape, spacing: tuple[float, float, float], center_ras: npt.ArrayLike, orientation: str = "RAS"
    ) -> Geometry:
        """A grid along the world's axes whose middle lies at ``center_ras``; its axes point to ``orientation``.

        >>> grid = Geometry.aligned((2, 2, 2), (1.0, 1.0, 1.0), (0.0, 0.0, 0.0), "LPS")
        >>> grid.orientation, grid.to_ras((0, 0, 0)).tolist()
        ('LPS', [0.5, 0.5, -0.5])
        """
        directions = nib.orientations.axcodes2ornt(orientation)
        linear = np.zeros((3, 3))
        for axis, (world, sign) in enumerate(directions):
            linear[int(world), axis] = sign * spacing[axis]
        affine = np.eye(4)
        affine[:3, :3] = linear
        affine[:3, 3] = np.asarray(center_ras, dtype=np.float64) - linear @ ((np.array(shape) - 1.0) / 2.0)
        return Geometry(shape, affine)


def _stepped(values: FloatArray, step: float) -> FloatArray:
    result: FloatArray = np.rint(values / step) * step
    return result


def apply_affine(matrix: npt.ArrayLike, points: npt.ArrayLike) -> FloatArray:
    """Apply a 4x4 matrix to points (..., 3)."""
    m = np.asarray(matrix, dtype=np.float64)
    result: FloatArray = np.asarray(points, dtype=np.float64) @ m[:3, :3].T + m[:3, 3]
    return result
