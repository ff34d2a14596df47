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
from jrs.export.parity import Arrays, GraphSession, parity_images
from jrs.fields import DisplacementField, jacobian_determinant
from jrs.geometry import Geometry
from jrs.manifest import ModelSpec
from jrs.models.network import JointNet
from jrs.models.spatial import displacement
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
    outcomes = ((_by_torch(net, pair, spec.passes), _by_graphs(sessions, pair, spec.passes)) for pair in pairs)
    return {pair.name: _compare(pair, *outcome, limits) for pair, outcome in zip(pairs, outcomes, strict=True)}


def _real_pair(case: str | Path, spec: ModelSpec) -> _Pair:
    atlas = read_volume(atlas_path("sri24"))
    loaded = load_case(case, default_channels=spec.channels)
    grid = place_grid(spec.grid, atlas)[0]
    images = loaded.images
    affine = register_affine(images.get("t1", next(iter(images.values()))), atlas).matrix
    fixed = network_input({"t1" if "t1" in spec.channels else spec.channels[0]: atlas}, spec, grid)
    return _Pair(loaded.name, network_input(images, spec, grid, affine).tensor, fixed.tensor, grid)


def _by_torch(net: JointNet, pair: _Pair, passes: int) -> _Outcome:
    moving, fixed = torch.from_numpy(pair.moving), torch.from_numpy(pair.fixed)
    found, labels = None, None
    with torch.no_grad():
        if net.registration is not None:
            found = displacement(net.register(moving, fixed, passes)).numpy()[0]
        if net.segmentation is not None:
            labels = net.segmentation(net.encoder(moving)).numpy()[0].argmax(axis=0)
    return _Outcome(found, labels)


def _by_graphs(run: dict[str, GraphSession], pair: _Pair, passes: int) -> _Outcome:
    codes = {"moving": run["encoder"](image=pair.moving), "fixed": run["encoder"](image=pair.fixed)}
    found, labels = None, None
    if "segmentation" in run:
        labels = run["segmentation"](**codes["moving"])["probabilities"][0].argmax(axis=0)
    if "registration" in run:
        done = run["transformer"](image=pair.moving, flow=_flow_by(run, codes))
        for _ in range(passes - 1):
            codes["moving"] = run["encoder"](image=done["moved"])
            further = run["transformer"](image=done["moved"], flow=_flow_by(run, codes))["displacement"]
            done = run["composer"](image=pair.moving, first=done["displacement"], further=further)
        found = done["displacement"][0]
    return _Outcome(found, labels)


def _flow_by(run: dict[str, GraphSession], codes: dict[str, Arrays]) -> Array:
    both = {f"{side}_{name}": code for side in codes for name, code in codes[side].items()}
    return run["registration"](**both)["flow"]


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
