"""What a reduced precision costs on real volumes: fields, labels and folding beside those of FP32, and a gate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import torch

from jrs.bundle import AccuracyRecord, Precision
from jrs.export.parity import GraphSession, parity_images
from jrs.fields import DisplacementField, jacobian_determinant
from jrs.geometry import Geometry
from jrs.manifest import ModelSpec
from jrs.models.network import JointNet
from jrs.reading import read_volume
from jrs.resources import atlas_path
from jrs.runtime.affine import register_affine
from jrs.runtime.cases import load_case
from jrs.runtime.preprocess import network_input, place_grid

Array = npt.NDArray[np.float32]

# Largest allowed: 99th percentile of the field's change in mm, share of changed labels, added folding in percent.
LIMITS: dict[Precision, tuple[float, float, float]] = {
    "fp32": (0.01, 1e-3, 0.01),
    "fp16": (0.1, 0.002, 0.05),
    "bf16": (0.3, 0.005, 0.1),
}


@dataclass(frozen=True)
class _Pair:
    """Network inputs (1,C,X,Y,Z) of a case and the atlas, on ``grid``."""

    name: str
    moving: Array
    fixed: Array
    grid: Geometry


@dataclass(frozen=True)
class _Outcome:
    """What a network says of a pair; the displacement in voxels, labels as class numbers."""

    displacement: Array | None
    labels: npt.NDArray[np.int64] | None


def check_accuracy(
    net: JointNet,
    spec: ModelSpec,
    graphs: dict[str, onnx.ModelProto],
    precision: Precision,
    cases: Sequence[str | Path] = (),
) -> dict[str, AccuracyRecord]:
    """Compare the chain of exported graphs with PyTorch in FP32: the shipped brain, and further ``cases``.

    A case is what ``jrs infer`` takes (a folder, a file); it is aligned to the shipped atlas as inference does it.
    """
    limits = LIMITS[precision]
    moving, fixed = parity_images(spec)
    grid = place_grid(spec.grid, read_volume(atlas_path("sri24")))[0]
    pairs = [_Pair("sri24", moving.numpy(), fixed.numpy(), grid), *(_real_pair(case, spec) for case in cases)]
    sessions = {name: GraphSession(model) for name, model in graphs.items()}
    return {pair.name: _compare(pair, _by_torch(net, pair), _by_graphs(sessions, pair), limits) for pair in pairs}


def _real_pair(case: str | Path, spec: ModelSpec) -> _Pair:
    atlas = read_volume(atlas_path("sri24"))
    loaded = load_case(case, default_channels=spec.channels)
    grid = place_grid(spec.grid, atlas)[0]
    images = loaded.images
    affine = register_affine(images.get("t1", next(iter(images.values()))), atlas).matrix
    fixed = network_input({"t1" if "t1" in spec.channels else spec.channels[0]: atlas}, spec, grid)
    return _Pair(loaded.name, network_input(images, spec, grid, affine).tensor, fixed.tensor, grid)


def _by_torch(net: JointNet, pair: _Pair) -> _Outcome:
    with torch.no_grad():
        out = net(torch.from_numpy(pair.moving), torch.from_numpy(pair.fixed))
    displacement = None
    if out.coords_vox is not None:
        displacement = (out.coords_vox.numpy() - np.indices(pair.grid.shape, dtype=np.float32))[0]
    probabilities = out.moving_probabilities
    return _Outcome(displacement, None if probabilities is None else probabilities.numpy()[0].argmax(axis=0))


def _by_graphs(run: dict[str, GraphSession], pair: _Pair) -> _Outcome:
    codes = {"moving": run["encoder"](image=pair.moving), "fixed": run["encoder"](image=pair.fixed)}
    displacement, labels = None, None
    if "segmentation" in run:
        labels = run["segmentation"](**codes["moving"])["probabilities"][0].argmax(axis=0)
    if "registration" in run:
        flow = run["registration"](**{f"{side}_{name}": x for side in codes for name, x in codes[side].items()})
        displacement = run["transformer"](image=pair.moving, flow=flow["flow"])["displacement"][0]
    return _Outcome(displacement, labels)


def _compare(pair: _Pair, want: _Outcome, got: _Outcome, limits: tuple[float, float, float]) -> AccuracyRecord:
    field_p99 = field_max = folding = folding_fp32 = share = None
    if want.displacement is not None and got.displacement is not None:
        ours, theirs = (DisplacementField.from_voxels(d, pair.grid) for d in (got.displacement, want.displacement))
        distance = np.linalg.norm(ours.vectors_mm.astype(np.float64) - theirs.vectors_mm, axis=0)
        field_p99, field_max = float(np.percentile(distance, 99)), float(distance.max())
        brain = np.any(pair.fixed[0] != 0, axis=0)
        folding, folding_fp32 = (float(100 * (jacobian_determinant(f)[brain] <= 0).mean()) for f in (ours, theirs))
    if want.labels is not None and got.labels is not None:
        share = float((got.labels != want.labels).mean())
    return AccuracyRecord(field_p99, field_max, share, folding, folding_fp32, limits)
