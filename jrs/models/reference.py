"""Reads the weights that the method's authors published (Keras 2 ``.h5``) into a JointNet.

Only names, shapes and values of the file format are used; the authors' code carries no licence and none is here.
What differs from the paper in those weights is kept by the architecture: the identity grid starts at 1, the mask
is thresholded and unwarped, and the head is ``gradient``.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from jrs.architecture import CONVOLUTIONS_PER_LEVEL, LEVELS, Architecture, Merge
from jrs.errors import BadDataError, MissingInputError, first_line
from jrs.manifest import GridSpec, ModelSpec
from jrs.models.checkpoint import Checkpoint
from jrs.models.network import JointNet

Array = npt.NDArray[np.float32]
Layers = dict[str, tuple[Array, Array]]

REFERENCE_CHANNELS = ("flair", "t1", "t1ce", "t2")
"""The order of the four modalities in the authors' files; with one channel it is T1."""


def load_reference_weights(path: str | Path, merge: Merge | None = None) -> JointNet:
    """Build a JointNet with the weights of one of the authors' Keras files.

    ``path`` is plain or saved from inside a multi-GPU wrapper; any base width, number of channels and merge,
    with or without either decoder. A wrapped file does not say whether codes are subtracted or added (the
    shapes are equal): then ``merge`` decides, else a word in the file's name (``sub``, ``add``), else subtract
    with a warning.

    Raises MissingInputError if there is no file, BadDataError if it is not such a file.
    """
    path = Path(path)
    layers, hints = _read(path)
    parts = _split(path, layers)
    encoder = parts["encoder"]
    base, in_channels = encoder["reformatted_inputs"][0].shape[-1], encoder["reformatted_inputs"][0].shape[-2]
    registration = parts.get("registration")
    architecture = Architecture(
        in_channels=in_channels,
        num_labels=_out_channels(parts["segmentation"]) if "segmentation" in parts else 0,
        base_channels=base,
        registration=registration is not None,
        merge=_merge(path, registration, base, hints, merge) if registration is not None else "subtract",
        head="gradient",
        grid_origin=1,
        mask="unwarped",
    )
    net = JointNet(architecture)
    state: dict[str, torch.Tensor] = {}
    for name, part in parts.items():
        for layer, (kernel, bias) in part.items():
            target = f"{name}.{_ENCODER_NAMES[layer] if name == 'encoder' else _DECODER_NAMES[layer]}"
            # Keras keeps kernels as (x,y,z,in,out), transposed ones as (x,y,z,out,in); torch has space last.
            state[f"{target}.weight"] = torch.from_numpy(np.ascontiguousarray(kernel.transpose(4, 3, 0, 1, 2)))
            state[f"{target}.bias"] = torch.from_numpy(bias.copy())
    expected = net.state_dict()
    for name, tensor in expected.items():
        if name not in state:
            raise BadDataError(f"{path}: lacks the weights of {name}; it is not a complete file of the authors'")
        if state[name].shape != tensor.shape:
            raise BadDataError(
                f"{path}: {name} has shape {tuple(state[name].shape)}, a VNet of this width needs "
                f"{tuple(tensor.shape)}; it is not one of the authors' files"
            )
    net.load_state_dict(state)
    return net.eval()


def reference_checkpoint(path: str | Path, merge: Merge | None = None) -> Checkpoint:
    """The same as a checkpoint, with what the authors' preprocessing tells of its inputs.

    Crops of 144x208x144 voxels at 1 mm in BraTS array order (LPS), each channel z-scored over the whole crop;
    BraTS label 4 is class 3.
    """
    net = load_reference_weights(path, merge)
    architecture = net.architecture
    channels = REFERENCE_CHANNELS if architecture.in_channels == len(REFERENCE_CHANNELS) else ("t1",)
    if len(channels) != architecture.in_channels:
        raise BadDataError(f"{path}: takes {architecture.in_channels} channels; the authors' weights take 1 or 4")
    labels = ModelSpec().labels if architecture.segmentation else ()
    if len(labels) != architecture.num_labels:
        raise BadDataError(f"{path}: segments {architecture.num_labels} classes; the authors' weights segment 4")
    spec = ModelSpec(
        architecture=architecture,
        channels=channels,
        optional_channels=(),
        grid=GridSpec((144, 208, 144), (1.0, 1.0, 1.0), "LPS"),
        normalization="zscore-volume",
        labels=labels,
        label_values=ModelSpec().label_values if labels else (),
    )
    return Checkpoint(spec, net.state_dict(), {"imported_from": Path(path).name, "paper": "10.3389/fncom.2020.00017"})


def _names() -> tuple[dict[str, str], dict[str, str]]:
    """Keras layer name to our module, for the encoder and a decoder."""
    encoder = {"reformatted_inputs": "input"}
    decoder = {f"decoder_block{LEVELS - 1}_elementwise_filter": "output"}
    for level, count in enumerate(CONVOLUTIONS_PER_LEVEL):
        for i in range(count):
            encoder[f"encoder_block{level + 1}_conv{i + 1}"] = f"levels.{level}.convs.{i}"
            if level < LEVELS - 1:
                # The decoder's blocks count from the coarsest up: block 1 is level 4 of 5.
                decoder[f"decoder_block{LEVELS - 1 - level}_conv{i + 1}"] = f"levels.{level}.convs.{i}"
        if level < LEVELS - 1:
            encoder[f"encoder_block{level + 1}_downconv"] = f"downs.{level}"
            decoder[f"decoder_block{LEVELS - 2 - level}_upconv"] = f"ups.{level}"
    return encoder, decoder


_ENCODER_NAMES, _DECODER_NAMES = _names()
_NOT_OURS = "it is not a weights file of the published joint registration and segmentation network"


def _read(path: Path) -> tuple[list[tuple[str, Array]], list[str]]:
    """All weights in file order as (name, array), and every word that may tell the merge."""
    import h5py

    if not path.exists():
        raise MissingInputError(f"{path}: no such file; give the path of a Keras .h5 weights file")
    if path.is_dir():
        raise MissingInputError(f"{path}: is a folder; give the path of a Keras .h5 weights file")
    weights: list[tuple[str, Array]] = []
    try:
        with h5py.File(path, "r") as file:
            root = file.get("model_weights", file)
            hints = [str(name) for name in root]
            hints += _config_layers(file.attrs.get("model_config"))
            groups = [_text(n) for n in root.attrs.get("layer_names", [])] or list(root)
            for group in groups:
                if group not in root or not isinstance(root[group], h5py.Group):
                    continue
                for entry in root[group].attrs.get("weight_names", []):
                    name = _text(entry)
                    array = np.asarray(root[group][name], dtype=np.float32)
                    if not np.isfinite(array).all():
                        raise BadDataError(f"{path}: weights {name} are not finite; the file is damaged")
                    weights.append((name, array))
    except (OSError, KeyError, ValueError, TypeError, RuntimeError, AttributeError) as error:
        raise BadDataError(f"{path}: {_NOT_OURS} ({first_line(error)}); give one of the authors' .h5 files") from error
    if not weights:
        raise BadDataError(f"{path}: {_NOT_OURS} (no layer with weights); give one of the authors' .h5 files")
    return weights, hints


def _config_layers(config: Any) -> list[str]:
    """Names of a stored model's layers, nested ones included."""
    if config is None:
        return []
    names: list[str] = []

    def walk(node: Any) -> None:
        if isinstance(node, Mapping):
            if isinstance(node.get("config"), Mapping) and "name" in node["config"]:
                names.append(str(node["config"]["name"]))
            for value in node.values():
                walk(value)
        elif isinstance(node, list):
            for value in node:
                walk(value)

    walk(json.loads(_text(config)))
    return names


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _split(path: Path, weights: list[tuple[str, Array]]) -> dict[str, Layers]:
    """Sort the arrays into encoder, registration and segmentation decoder.

    Plain files keep them in groups; a wrapper puts all into one, where the second decoder's names may carry a
    suffix. A decoder is complete with its last layer, and that layer tells which one it is: three channels
    draw a deformation, any other number segments.
    """
    encoder: Layers = {}
    decoders: list[Layers] = []
    pending: dict[str, Array] = {}
    current: Layers = {}
    for name, array in weights:
        match = re.fullmatch(r"(?:.*/)?(\w+?)(?:_\d+)?/(kernel|bias):0", name)
        layer = match.group(1) if match else ""
        if match is None or (layer not in _ENCODER_NAMES and layer not in _DECODER_NAMES):
            raise BadDataError(f"{path}: {_NOT_OURS} (layer {name}); give one of the authors' .h5 files")
        pending[match.group(2)] = array
        if len(pending) < 2:
            continue
        kernel, bias = pending["kernel"], pending["bias"]
        pending = {}
        if kernel.ndim != 5 or bias.ndim != 1:
            raise BadDataError(f"{path}: {_NOT_OURS} ({name} is not a 3-D convolution); give one of the authors' files")
        if layer in _ENCODER_NAMES:
            encoder[layer] = (kernel, bias)
            continue
        if layer in current:
            raise BadDataError(f"{path}: holds layer {layer} twice; the file is damaged")
        current[layer] = (kernel, bias)
        if layer.endswith("elementwise_filter"):
            decoders.append(current)
            current = {}
    parts: dict[str, Layers] = {}
    if "reformatted_inputs" in encoder:
        parts["encoder"] = encoder
    for decoder in decoders:
        kind = "registration" if _out_channels(decoder) == 3 else "segmentation"
        if kind in parts:
            raise BadDataError(f"{path}: holds two {kind} decoders; the file is damaged")
        parts[kind] = decoder
    if "encoder" not in parts or len(parts) < 2 or current or pending:
        raise BadDataError(f"{path}: {_NOT_OURS} (encoder or decoder incomplete); give one of the authors' .h5 files")
    return parts


def _out_channels(decoder: Layers) -> int:
    return int(decoder[f"decoder_block{LEVELS - 1}_elementwise_filter"][1].shape[0])


def _merge(path: Path, decoder: Layers, base: int, hints: list[str], asked: Merge | None) -> Merge:
    # Seen by the shape alone: the first block's input is up (w) beside skip (w, or two of them).
    width = base * 2 ** (LEVELS - 2)
    concatenated = decoder["decoder_block1_conv1"][0].shape[3] == 3 * width if "decoder_block1_conv1" in decoder else 0
    found: Merge | None = "concatenate" if concatenated else None
    if found is None:
        told = [h for h in hints if h.startswith("encoded_source")]
        for word, kind in (("subtract", "subtract"), ("add", "add")):
            if any(word in h.replace("encoded_source_minus_encoded_target", "") for h in told):
                found = kind  # type: ignore[assignment]
    if found is not None:
        if asked is not None and asked != found:
            raise BadDataError(f"{path}: these weights {found}, not {asked}; leave --merge out")
        return found
    if asked == "concatenate":
        raise BadDataError(f"{path}: the shapes of these weights do not allow concatenate; leave --merge out")
    if asked is not None:
        return asked
    words = re.split(r"[^a-z]+", path.stem.lower())
    if any(w.startswith("add") for w in words):
        return "add"
    if not any(w.startswith("sub") for w in words):
        warnings.warn(
            f"{path}: does not say whether codes are subtracted or added; subtract is assumed, pass merge to choose",
            stacklevel=3,
        )
    return "subtract"
