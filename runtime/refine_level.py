"""One level of the refinement by the compiled kernels: what the graph of ``jrs.export.refinement`` computes.

On the CPU this takes a fraction of the graph's time: windows and kernels slide through the cache in place of passing
over whole images, and every step is shared by all threads. What comes out does not depend on their number.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt

from jrs.parallel import available_cpus
from jrs.runtime import native
from jrs.runtime.sampling import Sampled, in_threads

Array = npt.NDArray[np.float32]

WINDOW = 5
"""Voxels along each side of the window that correlation is taken over; the kernels know no other."""
VARIANCE_FLOOR = 2e-2
"""Added to each window's variances, of images of unit variance: noise in flat regions pulls on nothing."""
SMALLEST_VARIANCE = 1e-5
"""Far above what rounding leaves of a variance of zero."""
LEAST_WEIGHT = 0.21
"""A window with less of its weight than this is not compared. No whole number of voxels, or rounding would decide."""
FORCE_FLOOR = 1.0
"""Forces as long as this move by ``step``; where all are shorter, images nearly agree and updates shrink with them."""
_PLANES_A_THREAD = 12
"""Each thread looks at up to eight planes of its neighbours', so fewer than these are not worth a thread."""


def refine_level(inputs: Mapping[str, Array], threads: int | None = None) -> dict[str, Array]:
    """``refined``, ``similarity`` and ``done`` of the graph's inputs, by the same names and in the same shapes."""
    given = {name: np.ascontiguousarray(value, dtype=np.float32) for name, value in inputs.items()}
    _check_shapes(*(given[name].shape for name in ("fixed", "moving", "weights", "displacement")))
    level = _Level(given["fixed"][0], given["moving"][0], given["weights"][0, 0], threads)
    update_kernel, field_kernel = given["update_kernel"], given["field_kernel"]
    u = given["displacement"][0]
    following, update = np.empty_like(u), np.empty_like(u)
    similarities: list[float] = []
    falls = 0
    while len(similarities) < max(1.0, given["iterations"].item()) and falls < 2:
        force, similarity = level.force(u)
        largest = level.smooth(force, None, 0.0, update_kernel, update)
        scale = given["step"].item() / max(float(np.sqrt(largest)), FORCE_FLOOR)
        level.smooth(u, update, scale, field_kernel, following)
        u, following = following, (u if similarities else np.empty_like(u))  # the first one is the caller's
        # One fall may be the field's smoothing, as it begins to work on a rough start.
        falls = falls + 1 if similarities and similarity < similarities[-1] else 0
        similarities.append(similarity)
    return {
        "refined": u[None],
        "similarity": np.array([similarities[0], similarities[-1]], dtype=np.float32),
        "done": np.array(len(similarities), dtype=np.float32),
    }


def _check_shapes(fixed: tuple[int, ...], moving: tuple[int, ...], *others: tuple[int, ...]) -> None:
    """The kernels take sizes on trust."""
    want = [fixed, *((1, channels, *fixed[2:]) for channels in (1, 3))]
    if len(fixed) != 5 or fixed[0] != 1 or [moving, *others] != want:
        raise ValueError(f"images, weights and displacement do not lie on one grid: {[fixed, moving, *others]}")


class _Level:
    """Images (C,X,Y,Z) and weights (X,Y,Z) of a level, and what each iteration reads and writes."""

    def __init__(self, fixed: Array, moving: Array, weights: Array, threads: int | None) -> None:
        self.fixed, self.weights, self.threads = fixed, weights, threads
        self.shape = fixed.shape[1:]
        self._moving = Sampled(moving, threads)
        self._moved, self._force = np.empty_like(fixed), np.empty((3, *self.shape), dtype=np.float32)
        self._inverse = np.empty(self.shape, dtype=np.float32)
        self._means, self._precisions = np.empty_like(fixed), np.empty_like(fixed)
        self._planes = np.zeros(self.shape[0])
        self._windows = max(1.0, sum(self._look_at(index) for index in range(len(fixed))))

    def _look_at(self, index: int) -> float:
        """What one modality's windows hold of the fixed image; returns how many are compared."""
        results = self._inverse, self._means[index], self._precisions[index], self._planes
        self._in_planes(
            lambda part, scratch: native.windows(
                part, self.fixed[index], self.weights, LEAST_WEIGHT, VARIANCE_FLOOR, scratch, *results
            ),
            15,
            20,
        )
        return float(self._planes.sum())

    def force(self, u: Array) -> tuple[Array, float]:
        """What pushes at u (3,X,Y,Z), before it is smoothed, and the similarity there."""
        self._moving.warped(u, self._moved)
        for index in range(len(self.fixed)):
            self._push(index)
        return self._force, float(self._planes.sum()) / self._windows

    def _push(self, index: int) -> None:
        """Add one modality's force and similarity."""
        images = self.fixed[index], self._moved[index], self.weights
        windows = self._inverse, self._means[index], self._precisions[index]
        floors = VARIANCE_FLOOR, SMALLEST_VARIANCE
        self._in_planes(
            lambda part, scratch: native.force(
                part, *images, *windows, *floors, index == 0, scratch, self._force, self._planes
            ),
            30,
            20,
        )

    def smooth(self, field: Array, update: Array | None, scale: float, kernel: Array, out: Array) -> float:
        """``field``, composed with ``scale * update`` if there is one, convolved; its largest squared length."""
        largest = np.zeros(self.shape[0], dtype=np.float32)

        self._in_planes(
            lambda part, scratch: native.smooth(part, field, update, scale, kernel, scratch, out, largest),
            kernel.size + 1,
            2,
            3 * kernel.size + 1,
        )
        return float(largest.max())

    def _in_planes(
        self, work: Callable[[tuple[int, int], Array], None], planes: int, rows: int, more: int = 12
    ) -> None:
        """``work`` on pieces of the first axis, each with ``planes``, ``rows`` and ``more`` voxels of scratch."""
        _, ny, nz = self.shape
        size = planes * ny * nz + rows * nz + more
        workers = min(self.threads or available_cpus(), max(1, self.shape[0] // _PLANES_A_THREAD))
        in_threads(
            lambda start, stop: work((start, stop), np.empty(size, dtype=np.float32)),
            *(self.shape[0], workers, self.weights.size),
        )
