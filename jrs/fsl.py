"""FSL's transforms: the one file where FSL's coordinates exist.

FSL places voxel (i, j, k) at (i sx, j sy, k sz) mm, with i counted from the other end where the header's affine has a
positive determinant; neither origin nor direction enters (newimage's ``newimagevox2mm``; the same in fslpy's
``getScalings``). A relative warp on the reference's grid holds, at each voxel, FSL mm of the source point less FSL mm
of the voxel; a FLIRT matrix leads from FSL mm of the source to FSL mm of the reference.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from jrs.fields import DisplacementField
from jrs.files import write_text
from jrs.geometry import FloatArray, Geometry
from jrs.writing import save_nifti


def fsl_from_voxels(grid: Geometry) -> FloatArray:
    """4x4: voxel indices of a grid to its FSL mm."""
    matrix = np.diag([*grid.spacing, 1.0])
    if np.linalg.det(grid.affine[:3, :3]) > 0:
        matrix[0, 0] *= -1.0
        matrix[0, 3] = (grid.shape[0] - 1) * grid.spacing[0]
    return matrix


def fsl_from_ras(grid: Geometry) -> FloatArray:
    """4x4: RAS mm to the FSL mm of a grid."""
    result: FloatArray = fsl_from_voxels(grid) @ grid.inverse
    return result


def save_warp(path: Path, field: DisplacementField, source: Geometry) -> None:
    """Write a total displacement on the reference's grid as a relative warp for ``applywarp --rel``.

    (X,Y,Z,3) float32, intent 2006 (FNIRT displacement field).
    """
    reference = field.geometry
    to_source = fsl_from_ras(source)
    out = np.empty((*reference.shape, 3), dtype=np.float32)
    # w(i) = S (x + d(x)) - R i with x = V i: affine in the index but for S d(x).
    straight = to_source @ reference.affine - fsl_from_voxels(reference)
    i, j, k = np.ogrid[tuple(slice(0, n) for n in reference.shape)]
    for row in range(3):
        a, b, c, t = straight[row]
        bent = np.tensordot(to_source[row, :3], field.vectors_mm, axes=1)
        out[..., row] = a * i + b * j + c * k + t + bent
    save_nifti(path, out, reference, "fsl-warp")


def save_matrix(path: Path, matrix: FloatArray, source: Geometry, reference: Geometry) -> None:
    """Write A (RAS mm of the reference to RAS mm of the source) as a FLIRT matrix, source to reference."""
    flirt = fsl_from_ras(reference) @ np.linalg.inv(matrix) @ np.linalg.inv(fsl_from_ras(source))
    write_text(path, "".join("  ".join(f"{value:.12g}" for value in row) + "\n" for row in flirt))
