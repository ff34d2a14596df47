"""Which precision ``auto`` stands for: BF16 where the processor computes it and the bundle bears it, else FP32.

Whether a bundle bears it is measured once on each machine, on a pair that ships with jrs: the SRI24 atlas, and the
same brain turned, stretched, given a tumour and, in place of the other modalities, inverted. The verdict is kept in
the user's cache; nothing is timed, so that a machine always answers the same.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from jrs.bundle import Bundle
from jrs.errors import JrsError, first_line
from jrs.fields import DisplacementField
from jrs.geometry import FloatArray, Geometry
from jrs.manifest import ModelSpec
from jrs.reading import read_volume
from jrs.resources import atlas_path
from jrs.runtime.caching import VERDICTS, Entry, Store
from jrs.runtime.engines import on_gpu
from jrs.runtime.machine import code_digest, computes_bf16, numerics
from jrs.runtime.preprocess import normalize, place_grid
from jrs.runtime.sampling import affine_coords, resample_affine
from jrs.volume import foreground_mask

Array = npt.NDArray[np.float32]

FIELD_MM = 0.1
"""The largest 99th percentile of the field's change in the brain."""
LABELS_SHARE = 0.995
"""The smallest share of the brain's voxels whose label stays."""
_CODE = (
    "jrs.runtime.precision",
    "jrs.runtime.preprocess",
    "jrs.runtime.sampling",
    "jrs.runtime.network",
    "jrs.runtime.engines.openvino",
    "jrs.runtime.engines.openvino_graph",
)

_TUMOR_MM = (28.0, 10.0, 22.0)  # from the middle of the brain: white matter of the right hemisphere
_EDEMA_MM, _CORE_MM, _NECROSIS_MM, _EDGE_MM = 18.0, 9.0, 5.0, 1.5
_NO_NUMBER = 1e6


@dataclass(frozen=True)
class Verdict:
    """What BF16 changes on the reference pair: the field's 99th percentile, mm, and the share of labels that stay.

    Both over the fixed image's brain; None where the bundle has no such output. ``failure`` is why it could not
    be measured.
    """

    field_p99_mm: float | None
    labels_equal: float | None
    failure: str | None = None

    @property
    def passed(self) -> bool:
        """Whether BF16 may stand for FP32."""
        field = self.field_p99_mm is None or self.field_p99_mm <= FIELD_MM
        labels = self.labels_equal is None or self.labels_equal >= LABELS_SHARE
        return self.failure is None and field and labels

    def __str__(self) -> str:
        if self.failure is not None:
            return f"bf16 does not run here ({self.failure})"
        parts = []
        if self.field_p99_mm is not None:
            parts.append(f"field within {self.field_p99_mm:.3f} mm (limit {FIELD_MM:g})")
        if self.labels_equal is not None:
            parts.append(f"{100 * self.labels_equal:.2f} % of labels equal (limit {100 * LABELS_SHARE:g})")
        return f"bf16 beside fp32 on the reference pair: {', '.join(parts)}"

    def record(self) -> dict[str, Any]:
        """For the report."""
        return {**asdict(self), "limits": [FIELD_MM, LABELS_SHARE], "passed": self.passed}


@dataclass(frozen=True)
class Choice:
    """A precision, why it was taken, and the verdict where one was needed."""

    precision: str
    reason: str
    verdict: Verdict | None = None


def choose_precision(bundle: Bundle, backend: str, asked: str, threads: int | None = None) -> Choice:
    """What ``asked`` (auto, fp32, bf16) means for a bundle on a backend; the gate is run where it never was.

    Where the cache cannot be written it is run each time: the choice does not depend on the state of a disk.
    """
    if asked != "auto":
        return Choice(asked, "asked for")
    if on_gpu(backend):
        return Choice("fp32", "a GPU computes in what the bundle's graphs are stored in")
    if backend != "openvino":
        return Choice("fp32", f"{backend} computes in fp32 alone")
    if not computes_bf16():
        return Choice("fp32", "this processor has neither AMX-BF16 nor AVX512-BF16")
    verdict = verdict_of(bundle, threads)
    return Choice("bf16" if verdict.passed else "fp32", str(verdict), verdict)


def verdict_of(bundle: Bundle, threads: int | None = None, store: Store | None = None) -> Verdict:
    """The stored verdict on BF16, or one measured now."""
    store = store or Store.open()
    key = {**numerics(None), "bundle": bundle.sha256, "code": code_digest(*_CODE), "atlas": "sri24", "format": 1}
    known = store.load(VERDICTS, key)
    if known is not None:
        return Verdict(*(known.value[name] for name in ("field_p99_mm", "labels_equal", "failure")))
    verdict = measure(bundle, threads)
    # A failure may have been a lack of memory: not to be kept.
    if verdict.failure is None:
        store.save(VERDICTS, key, Entry(value={**asdict(verdict), "bundle_name": bundle.name}))
    return verdict


def measure(bundle: Bundle, threads: int | None = None) -> Verdict:
    """Run the reference pair in both precisions."""
    spec = bundle.manifest.model
    try:
        moving, fixed, grid = reference_pair(spec, threads)
        want, got = (_outcome(bundle, precision, moving, fixed, threads) for precision in ("fp32", "bf16"))
    except JrsError as error:
        return Verdict(None, None, first_line(error))
    brain = np.any(fixed[0] != 0, axis=0) if spec.normalization == "zscore-foreground" else np.ones(grid.shape, bool)
    return compare(want, got, brain, grid)


def compare(
    want: tuple[Array | None, Array | None],
    got: tuple[Array | None, Array | None],
    brain: npt.NDArray[np.bool_],
    grid: Geometry,
) -> Verdict:
    """The verdict from displacements (3,X,Y,Z) in voxels and probabilities (K,X,Y,Z) of both precisions."""
    field = labels = None
    if want[0] is not None and got[0] is not None:
        ours, theirs = (DisplacementField.from_voxels(u, grid).vectors_mm for u in (got[0], want[0]))
        distance = np.linalg.norm(ours.astype(np.float64) - theirs, axis=0)[brain]
        field = float(np.percentile(distance, 99)) if np.isfinite(distance).all() else _NO_NUMBER
    if want[1] is not None and got[1] is not None:
        labels = float((want[1].argmax(axis=0) == got[1].argmax(axis=0))[brain].mean())
    return Verdict(field, labels)


def _outcome(
    bundle: Bundle, precision: str, moving: Array, fixed: Array, threads: int | None
) -> tuple[Array | None, Array | None]:
    from jrs.runtime.network import Network

    architecture = bundle.manifest.model.architecture
    with Network(bundle, "openvino", precision, threads) as network:
        # Both encoded first: on a large grid the next engine closes the encoder's.
        codes = network.encode(moving)
        theirs = network.encode(fixed) if architecture.registration else None
        probabilities = network.segment(moving, codes) if architecture.segmentation else None
        displacement = None if theirs is None else network.register(moving, codes, theirs).displacement[0]
    return displacement, probabilities


# The pair -------------------------------------------------------------------------------------------------


def reference_pair(spec: ModelSpec, threads: int | None = None) -> tuple[Array, Array, Geometry]:
    """Network inputs (1,C,X,Y,Z) of a brain with a tumour and of SRI24, all channels filled, and their grid."""
    atlas = read_volume(atlas_path("sri24"))
    grid = place_grid(spec.grid, atlas)[0]
    images = []
    for affine, tumor in ((_moved_affine(), True), (np.eye(4), False)):
        t1 = resample_affine(atlas.data[None], atlas.geometry, grid, affine, threads=threads)[0]
        modalities = _modalities(np.maximum(t1, 0.0), grid, tumor)
        channels = [modalities.get(name, modalities["t1"]) for name in spec.channels]
        images.append(np.stack([normalize(channel, spec.normalization) for channel in channels])[None])
    return images[0], images[1], grid


def _moved_affine() -> FloatArray:
    """Four degrees about the vertical axis, 4 % along the first one, a few millimetres."""
    angle = np.radians(4.0)
    matrix = np.eye(4)
    matrix[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    matrix[0, 0] *= 1.04
    matrix[:3, 3] = (3.0, -4.0, 2.0)
    return matrix


def _modalities(t1: Array, grid: Geometry, tumor: bool) -> dict[str, Array]:
    """T1 and what stands for the others: fluid bright, white matter dark, a tumour as each of them shows one."""
    brain = foreground_mask(t1)
    bright = float(np.percentile(t1[brain], 98.0)) if brain.any() else 1.0
    points = affine_coords(grid.shape, grid.affine)
    center = points[:, brain].mean(axis=1) + np.array(_TUMOR_MM, dtype=np.float32)
    distance = np.sqrt(((points - center.reshape(3, 1, 1, 1)) ** 2).sum(axis=0))

    def ball(radius: float) -> Array:
        if not tumor:
            return np.zeros_like(distance)
        inside: Array = 1.0 / (1.0 + np.exp(np.clip((distance - radius) / _EDGE_MM, -30.0, 30.0)))
        return inside

    inverted = np.where(brain, np.clip(1.15 * bright - t1, 0.05 * bright, None), 0.0)
    edema, rim = ball(_EDEMA_MM), ball(_CORE_MM) - ball(_NECROSIS_MM)
    images = {
        "t1": t1 * (1.0 - 0.45 * edema),
        "t1ce": t1 * (1.0 - 0.5 * edema) + 0.9 * bright * rim,
        "t2": inverted + 0.6 * bright * edema,
        "flair": np.where(brain, 0.55 * inverted + 0.2 * bright, 0.0) + 0.6 * bright * edema,
    }
    return {name: image.astype(np.float32) for name, image in images.items()}
