"""Checkpoints: one safetensors file, its JSON header beside the tensors, so it is whole or not there.

The header's ``jrs`` entry holds the format version, the ``ModelSpec`` and a training record. No pickle.
"""

from __future__ import annotations

import errno
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jrs.bundle import MANIFEST, Bundle
from jrs.errors import ConfigurationError, MissingInputError, last_line
from jrs.files import unnumbered, whole_file
from jrs.manifest import ModelSpec
from jrs.models.network import JointNet
from jrs.resources import DATA
from jrs.schema import decode, encode

FORMAT_VERSION = 1
_MODEL, _OPTIMIZER = "model.", "optimizer."


@dataclass
class Checkpoint:
    """Weights and what they mean.

    Attributes:
        spec: the network's inputs and outputs.
        weights: the network's state.
        training: JSON values: how it was trained, and what ``--resume`` needs.
        optimizer: the optimiser's tensors, ``<parameter index>.<name>``; empty in a file for export only.
    """

    spec: ModelSpec
    weights: dict[str, Tensor]
    training: dict[str, Any] = field(default_factory=dict)
    optimizer: dict[str, Tensor] = field(default_factory=dict)

    def network(self) -> JointNet:
        """A JointNet with these weights, in evaluation mode."""
        net = JointNet(self.spec.architecture)
        try:
            net.load_state_dict(self.weights)
        except RuntimeError as error:
            raise ConfigurationError(
                f"checkpoint: its weights do not fit its architecture ({last_line(error)})"
            ) from error
        return net.eval()

    def save(self, path: Path) -> None:
        """Write the file, whole or not at all."""
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        tensors = {_MODEL + name: value.detach().cpu().contiguous() for name, value in self.weights.items()}
        tensors |= {_OPTIMIZER + name: value.detach().cpu().contiguous() for name, value in self.optimizer.items()}
        header = {
            "format_version": FORMAT_VERSION,
            "spec": encode(self.spec),
            "training": encode(self.training),
        }
        with whole_file(path) as temporary:
            try:
                save_file(tensors, temporary, metadata={"jrs": json.dumps(header)})
            except SafetensorError as error:
                raise unnumbered(error, temporary.parent, errno.EIO) from error


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Read a checkpoint file, of a run's folder its best one (else its last), or the weights of a bundle.

    A bundle is a folder with a manifest or a shipped name (``default``).
    Raises MissingInputError if there is none, ConfigurationError if the file is not one of ours.
    """
    from safetensors import SafetensorError, safe_open

    path = find_checkpoint(Path(path))
    if (path / MANIFEST).exists():
        return _from_bundle(path)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        header = json.loads(metadata["jrs"])
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise ConfigurationError(
            f"{path}: is not a checkpoint of jrs; give a .safetensors file written by jrs train or import-weights"
        ) from error
    version = header.get("format_version") if isinstance(header, dict) else None
    if version != FORMAT_VERSION:
        raise ConfigurationError(f"{path}: format version {version} is unknown; update jrs")
    return Checkpoint(
        spec=decode(ModelSpec, header.get("spec"), f"{path}: spec"),
        weights=_part(tensors, _MODEL),
        training=header.get("training", {}),
        optimizer=_part(tensors, _OPTIMIZER),
    )


def find_checkpoint(path: Path) -> Path:
    """What ``path`` means: itself, the best or last file of a run's folder, or the folder of a bundle."""
    if not path.exists() and path.parent == Path() and (DATA / "bundles" / path / MANIFEST).exists():
        return DATA / "bundles" / path
    if path.is_dir():
        if (path / MANIFEST).exists():
            return path
        for name in ("best.safetensors", "last.safetensors"):
            if (path / name).exists():
                return path / name
        raise MissingInputError(f"{path}: holds no checkpoint (best.safetensors or last.safetensors); train first")
    if not path.exists():
        raise MissingInputError(f"{path}: no such checkpoint; give a .safetensors file or the folder of a run")
    return path


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}


def _from_bundle(folder: Path) -> Checkpoint:
    """The weights inside a bundle's graphs, whose initialisers keep the network's names."""
    import onnx
    from onnx import numpy_helper

    bundle = Bundle.open(folder)
    spec = bundle.manifest.model
    expected = JointNet(spec.architecture).state_dict()
    weights: dict[str, Tensor] = {}
    for graph in ("encoder", "segmentation", "registration"):
        if graph not in bundle.manifest.graphs:
            continue
        for tensor in onnx.load(bundle.graph(graph)).graph.initializer:
            name = graph + "." + tensor.name.split(".", 1)[-1]
            if name in expected:
                # A norm's parameters are stored in the shape that they multiply with.
                value = torch.from_numpy(numpy_helper.to_array(tensor).astype("float32"))
                weights[name] = value.reshape(expected[name].shape)
    missing = sorted(set(expected) - set(weights))
    if missing:
        # Equal parameters, as untrained norms have, become one initialiser of one name.
        raise ConfigurationError(
            f"{folder}: its graphs do not keep {missing[0]} apart; use the checkpoint it came from"
        )
    return Checkpoint(spec, weights, {"from_bundle": bundle.name, **bundle.manifest.training})
