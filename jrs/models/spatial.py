"""The spatial transformer: from the registration decoder's raw channels to a sampling grid and a warped image.

Heads (``Architecture.head``); ``flow`` is (N,3,X,Y,Z), channel i belongs to array axis i, ``o`` is the origin:

- ``gradient`` (Estienne et al. 2020, section 2.2): Phi_i = 2 sigmoid(flow_i), the derivative of coordinate i
  along axis i; coordinates are running sums, coords_i(n) = sum_{m<=n} Phi_i(m) - 1 + o.
- ``potential``: flow is a displacement-like potential v in voxels, Phi_i = 2 sigmoid(2 d_i v_i) with d_i the
  backward difference (v = 0 before the first voxel), then as above. Where |d_i v_i| is small this is x + v.
- ``displacement``: coords = x + flow, voxels.

In the first two, each coordinate increases along its own axis whatever the network says; cross terms are free,
so folding is possible and has to be measured. All of this is FP32: around the identity a sigmoid rounded to
BF16 moves in steps of 0.004 voxel.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from jrs.architecture import Head
from jrs.models.grid_sample import grid_sample_3d


def identity_coords(like: Tensor, origin: int = 0) -> Tensor:
    """Voxel indices of the identity on the grid of ``like`` (N,3,X,Y,Z), float32, the first voxel at ``origin``."""
    return _add_identity(torch.zeros_like(like, dtype=torch.float32), 1.0, origin)


def displacement(coords: Tensor) -> Tensor:
    """Coordinates (N,3,X,Y,Z) less the voxel's own index: u in voxels."""
    return _add_identity(coords.float(), -1.0, 0)


def spatial_gradients(flow: Tensor, head: Head) -> Tensor:
    """Phi (N,3,X,Y,Z) in (0, 2), 1 at the identity; for ``displacement`` 1 + d_i u_i, which is not bounded."""
    flow = flow.float()
    if head == "gradient":
        return 2.0 * torch.sigmoid(flow)
    if head == "potential":
        return 2.0 * torch.sigmoid(2.0 * _along_own_axis(flow, _difference_matrix))
    return 1.0 + _along_own_axis(flow, _difference_matrix)


def coordinates(flow: Tensor, head: Head, origin: int = 0) -> Tensor:
    """Absolute sampling coordinates (N,3,X,Y,Z), float32 voxel indices, from the decoder's raw channels."""
    if head == "displacement":
        return _add_identity(flow.float(), 1.0, origin)
    return _along_own_axis(spatial_gradients(flow, head), _summation_matrix) + float(origin - 1)


def compose(coords: Tensor, further: Tensor) -> Tensor:
    """Coordinates (N,3,X,Y,Z) of a map and of a ``further`` one after it, in one: u(y) + y at y = further(x)."""
    return further + warp(displacement(coords), further)


def warp(image: Tensor, coords: Tensor) -> Tensor:
    """Sample ``image`` (N,C,X,Y,Z) at ``coords`` (N,3,X,Y,Z) in FP32: trilinear, border values outside."""
    warped: Tensor = grid_sample_3d(image.float(), coords)
    return warped


def _add_identity(field: Tensor, sign: float, origin: int) -> Tensor:
    """Field plus ``sign`` times the identity, added axis by axis: a whole grid of constants would swell a graph."""
    x, y, z = (sign * (torch.arange(n, device=field.device, dtype=torch.float32) + origin) for n in field.shape[2:])
    return torch.stack([field[:, 0] + x.view(-1, 1, 1), field[:, 1] + y.view(-1, 1), field[:, 2] + z], dim=1)


def _summation_matrix(n: int, like: Tensor) -> Tensor:
    """Lower triangle of ones: (M x)_n = sum of x up to n. A product, because running sums do not export safely."""
    return torch.tril(torch.ones(n, n, device=like.device, dtype=torch.float32))


def _difference_matrix(n: int, like: Tensor) -> Tensor:
    """(M x)_n = x_n - x_(n-1), with x = 0 before the first voxel: the inverse of the summation."""
    one = torch.ones(n, device=like.device, dtype=torch.float32)
    return torch.diag(one) - torch.diag(one[:-1], -1)


def _along_own_axis(field: Tensor, matrix: Callable[[int, Tensor], Tensor]) -> Tensor:
    """Apply a matrix to channel i along axis i, in FP32 whatever the autocast state."""
    with torch.autocast(field.device.type, enabled=False):
        n, _, x, y, z = field.shape
        # No transposition: the matrix stands left of X (with Y and Z flattened) and Y, right of Z.
        along_x = torch.matmul(matrix(x, field), field[:, 0].reshape(n, x, y * z)).reshape(n, x, y, z)
        along_y = torch.matmul(matrix(y, field), field[:, 1])
        along_z = torch.matmul(field[:, 2], matrix(z, field).T)
        return torch.stack([along_x, along_y, along_z], dim=1)
