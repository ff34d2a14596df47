"""Importing the authors' Keras weights: files made here, and the shared fixtures their own code computed.

Files are of the kind that ``reference/README.md`` describes: names, shapes and order of the arrays.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from jrs.cli.main import main
from jrs.errors import BadDataError, MissingInputError
from jrs.models.checkpoint import load_checkpoint
from jrs.models.network import JointNet, JointOutput
from jrs.models.reference import load_reference_weights, reference_checkpoint

Array = np.ndarray[Any, Any]
Layers = list[tuple[str, Array, Array]]

REFERENCE = Path(__file__).parents[1].parent / "shared" / "reference"
SHAPE = (16, 32, 16)
COUNTS = (1, 2, 3, 3, 3)

# Files of Keras ---------------------------------------------------------------------------------------------


def arrays(
    generator: np.random.Generator, size: int, inputs: int, outputs: int, up: bool = False
) -> tuple[Array, Array]:
    """A kernel as Keras keeps it, (k,k,k,in,out) or transposed (k,k,k,out,in), and a bias."""
    shape = (size,) * 3 + ((outputs, inputs) if up else (inputs, outputs))
    kernel = generator.normal(scale=(2.0 / (inputs * (1 if up else size**3))) ** 0.5, size=shape)
    return kernel.astype(np.float32), generator.normal(scale=0.1, size=outputs).astype(np.float32)


def encoder_layers(base: int, channels: int, seed: int) -> Layers:
    """34 arrays of an encoder, in the order of the authors' files."""
    rng, widths = np.random.default_rng(seed), [base * 2**k for k in range(5)]
    layers = [("reformatted_inputs", *arrays(rng, 1, channels, base))]
    for k, (width, count) in enumerate(zip(widths, COUNTS, strict=True)):
        layers += [(f"encoder_block{k + 1}_conv{i + 1}", *arrays(rng, 3, width, width)) for i in range(count)]
        if k < 4:
            layers.append((f"encoder_block{k + 1}_downconv", *arrays(rng, 2, width, 2 * width)))
    return layers


def decoder_layers(base: int, outputs: int, seed: int, factor: int = 1) -> Layers:
    """28 arrays of a decoder, from the coarsest block up; ``factor`` 2 for concatenated codes."""
    rng, layers = np.random.default_rng(seed), []
    for block in range(5):
        width = base * 2 ** (4 - block)
        if block > 0:
            for i in range(COUNTS[4 - block]):
                inputs = (1 + factor) * width if i == 0 else width
                layers.append((f"decoder_block{block}_conv{i + 1}", *arrays(rng, 3, inputs, width)))
        if block < 4:
            below = factor * width if block == 0 else width
            layers.append((f"decoder_block{block}_upconv", *arrays(rng, 2, below, width // 2, up=True)))
    layers.append(("decoder_block4_elementwise_filter", *arrays(rng, 1, base, outputs)))
    return layers


def registration_layers(base: int, seed: int, factor: int = 1) -> Layers:
    layers = decoder_layers(base, 3, seed, factor)
    name, kernel, bias = layers[-1]
    # Sigmoids far from their flat ends: a deformation of a few voxels.
    return [*layers[:-1], (name, 0.1 * kernel, bias)]


def write_group(group: Any, layers: Layers, suffix: str = "", text: Callable[[str], Any] = str) -> None:
    names = [str(name) for name in group.attrs.get("weight_names", [])]
    for layer, kernel, bias in layers:
        for kind, array in (("kernel", kernel), ("bias", bias)):
            group[f"{layer}{suffix}/{kind}:0"] = array
            names.append(f"{layer}{suffix}/{kind}:0")
    dtype = h5py.string_dtype() if text is str else None
    group.attrs["weight_names"] = np.array([text(name) for name in names], dtype=dtype)


MERGED = "encoded_source_minus_encoded_target"


def write_plain(
    path: Path, parts: dict[str, Layers], word: str | None = "subtraction", **options: Any
) -> Path:
    """One group a part, and layers without weights whose names tell the merge."""
    with h5py.File(path, "w") as file:
        root = file.create_group("model_weights")
        names = ["source_image", "target_image"]
        names += [f"{MERGED}_{word}_block{k}" for k in range(1, 6)] if word else []
        for name in names:
            root.create_group(name).attrs["weight_names"] = np.array([], dtype="S1")
        for name, layers in parts.items():
            write_group(root.create_group(name), layers, **options)
        root.attrs["layer_names"] = np.array([*names, *parts], dtype=h5py.string_dtype())
    return path


def write_nested(path: Path, parts: list[tuple[Layers, str]]) -> Path:
    """All arrays in one group, in this order, each part with a suffix."""
    with h5py.File(path, "w") as file:
        root = file.create_group("model_weights")
        names = ["source_image", "target_image", "lambda_1", "multitask_model", "lambda_2"]
        for name in names:
            root.create_group(name).attrs["weight_names"] = np.array([], dtype="S1")
        for layers, suffix in parts:
            write_group(root["multitask_model"], layers, suffix)
        root.attrs["layer_names"] = np.array(names, dtype=h5py.string_dtype())
    return path


def make_parts(
    base: int = 2, channels: int = 1, factor: int = 1, segmentation: bool = True
) -> dict[str, Layers]:
    parts = {
        "vnet_encoder": encoder_layers(base, channels, 1),
        "vnet_decoder_registration": registration_layers(base, 2, factor),
    }
    if segmentation:
        parts["decoder_segmentation"] = decoder_layers(base, 4, 3)
    return parts


# What the arrays mean ---------------------------------------------------------------------------------------


def keras(x: Tensor, layer: tuple[Array, Array], stride: int = 1) -> Tensor:
    """Conv3D, channels first, from Keras's own arrays; 'same' padding."""
    kernel, bias = (torch.from_numpy(a) for a in layer)
    return functional.conv3d(
        x, kernel.permute(4, 3, 0, 1, 2), bias, stride, padding=1 if kernel.shape[0] == 3 else 0
    )


def keras_up(x: Tensor, layer: tuple[Array, Array]) -> Tensor:
    """Conv3DTranspose of stride 2: every voxel becomes a block of eight, one matrix each."""
    kernel, bias = layer
    n, _, *shape = x.shape
    blocks = np.einsum("nixyz,abcoi->noxaybzc", x.numpy(), kernel)
    blocks = blocks.reshape(n, kernel.shape[3], *(2 * side for side in shape)) + bias.reshape(1, -1, 1, 1, 1)
    return torch.from_numpy(blocks)


def by_name(layers: Layers) -> dict[str, tuple[Array, Array]]:
    return {name: (kernel, bias) for name, kernel, bias in layers}


def run_encoder(layers: Layers, image: Tensor) -> list[Tensor]:
    named, codes = by_name(layers), []
    x = keras(image, named["reformatted_inputs"])
    for k, count in enumerate(COUNTS):
        y = x
        for i in range(count):
            y = keras(y, named[f"encoder_block{k + 1}_conv{i + 1}"]).clamp(min=0)
        x = y + x
        codes.append(x)
        if k < 4:
            x = keras(x, named[f"encoder_block{k + 1}_downconv"], stride=2).clamp(min=0)
    return codes


def run_decoder(layers: Layers, codes: list[Tensor]) -> Tensor:
    named, x = by_name(layers), codes[4]
    for block in range(1, 5):
        up = keras_up(x, named[f"decoder_block{block - 1}_upconv"]).clamp(min=0)
        y = torch.cat([codes[4 - block], up], dim=1)
        for i in range(COUNTS[4 - block]):
            y = keras(y, named[f"decoder_block{block}_conv{i + 1}"]).clamp(min=0)
        x = y + up
    return keras(x, named["decoder_block4_elementwise_filter"])


MERGES = {
    "subtract": lambda m, f: m - f,
    "concatenate": lambda m, f: torch.cat([m, f], dim=1),
    "add": lambda m, f: m + f,
}


def images(channels: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(1, channels, *SHAPE, generator=generator) for _ in range(2))  # type: ignore[return-value]


def check(net: JointNet, parts: dict[str, Layers], merge: str, channels: int) -> None:
    """The network computes what the arrays say, and its architecture is that of the published code."""
    architecture = net.architecture
    assert (architecture.merge, architecture.head, architecture.norm) == (merge, "gradient", "none")
    assert (architecture.grid_origin, architecture.mask) == (1, "unwarped")
    assert architecture.in_channels == channels
    assert not net.training
    moving, fixed = images(channels)
    a, b = (run_encoder(parts["vnet_encoder"], image) for image in (moving, fixed))
    with torch.no_grad():
        out = net(moving, fixed)
    if "decoder_segmentation" in parts:
        for got, codes in ((out.moving_logits, a), (out.fixed_logits, b)):
            equal(got, run_decoder(parts["decoder_segmentation"], codes))
    else:
        assert architecture.num_labels == 0 and out.moving_logits is None
    if "vnet_decoder_registration" not in parts:
        assert out.flow is None
        return
    merged = [MERGES[merge](m, f) for m, f in zip(a, b, strict=True)]
    flow = run_decoder(parts["vnet_decoder_registration"], merged)
    equal(out.flow, flow)
    phi = 2.0 / (1.0 + np.exp(-flow.double().numpy()))
    # The published identity runs 1..N: the running sum itself, without the paper's - 1.
    coords = np.stack([np.cumsum(phi[:, i], axis=i + 1) for i in range(3)], axis=1)
    assert out.coords_vox is not None
    np.testing.assert_allclose(out.coords_vox.numpy(), coords, atol=1e-3)
    assert float(flow.std()) > 1e-2


def equal(got: Tensor | None, expected: Tensor) -> None:
    assert got is not None and got.shape == expected.shape
    np.testing.assert_allclose(got.numpy(), expected.numpy(), atol=1e-4, rtol=1e-4)


def load(path: Path, merge: Any = None) -> JointNet:
    """Load, taking any warning for an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return load_reference_weights(path, merge)


# Good files -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("merge", "word", "base", "channels", "segmentation"),
    [
        ("subtract", "subtraction", 2, 1, True),
        ("subtract", "subtraction", 4, 4, False),
        ("concatenate", "concatenation", 2, 4, True),
        ("concatenate", "concatenation", 4, 1, False),
        ("add", "addition", 2, 1, True),
        ("add", "addition", 4, 4, False),
    ],
)
def test_plain_files(
    tmp_path: Path, merge: str, word: str, base: int, channels: int, segmentation: bool
) -> None:
    parts = make_parts(base, channels, 2 if merge == "concatenate" else 1, segmentation)
    net = load(write_plain(tmp_path / "weights.h5", parts, word))
    assert net.architecture.base_channels == base
    check(net, parts, merge, channels)


@pytest.mark.parametrize("suffixed", ["registration", "segmentation"])
@pytest.mark.parametrize("merge", ["subtract", "concatenate", "add"])
def test_nested_files(tmp_path: Path, merge: Any, suffixed: str) -> None:
    parts = make_parts(2, 1, 2 if merge == "concatenate" else 1)
    order = [
        (parts["vnet_encoder"], ""),
        (parts["vnet_decoder_registration"], "_1" if suffixed == "registration" else ""),
        (parts["decoder_segmentation"], "_1" if suffixed == "segmentation" else ""),
    ]
    path = write_nested(tmp_path / "weights.h5", order)
    check(load(path, None if merge == "concatenate" else merge), parts, merge, 1)


def test_decoders_are_told_by_their_last_layer_not_by_position(tmp_path: Path) -> None:
    parts = make_parts()
    order = [
        (parts["vnet_encoder"], ""),
        (parts["decoder_segmentation"], ""),
        (parts["vnet_decoder_registration"], "_1"),
    ]
    check(load(write_nested(tmp_path / "weights.h5", order), "subtract"), parts, "subtract", 1)


def test_a_nested_file_of_registration_alone(tmp_path: Path) -> None:
    parts = make_parts(segmentation=False)
    order = [(parts["vnet_encoder"], ""), (parts["vnet_decoder_registration"], "")]
    check(load(write_nested(tmp_path / "weights.h5", order), "add"), parts, "add", 1)


def test_segmentation_alone(tmp_path: Path) -> None:
    parts = make_parts()
    del parts["vnet_decoder_registration"]
    check(load(write_plain(tmp_path / "weights.h5", parts, None)), parts, "subtract", 1)


def test_swapped_groups_do_not_matter(tmp_path: Path) -> None:
    parts = make_parts()
    turned = {name: parts[name] for name in reversed(parts)}
    check(load(write_plain(tmp_path / "weights.h5", turned)), parts, "subtract", 1)


def test_names_stored_as_bytes(tmp_path: Path) -> None:
    """As h5py before version 3 wrote them."""
    parts = make_parts()
    path = write_plain(tmp_path / "weights.h5", parts, text=lambda name: np.bytes_(name.encode()))
    check(load(path), parts, "subtract", 1)


def test_weights_alone_without_the_model(tmp_path: Path) -> None:
    """Keras's save_weights has the layers' groups at the top of the file."""
    parts = make_parts()
    with h5py.File(tmp_path / "add.h5", "w") as file:
        for name, layers in parts.items():
            write_group(file.create_group(name), layers)
        file.attrs["layer_names"] = np.array(list(parts), dtype=h5py.string_dtype())
    check(load(tmp_path / "add.h5"), parts, "add", 1)


@pytest.mark.parametrize(("word", "merge"), [("subtraction", "subtract"), ("addition", "add")])
def test_the_stored_model_tells_the_merge(tmp_path: Path, word: str, merge: str) -> None:
    parts = make_parts()
    path = write_plain(tmp_path / "weights.h5", parts, None)
    inner = {"class_name": "Add", "config": {"name": f"{MERGED}_{word}_block1"}}
    with h5py.File(path, "a") as file:
        file.attrs["model_config"] = json.dumps({"config": {"name": "model", "layers": [inner]}})
    check(load(path), parts, merge, 1)


@pytest.mark.parametrize(
    ("name", "merge"), [("nested_add_t1.h5", "add"), ("model-sub-4.h5", "subtract"), ("ADDITION.h5", "add")]
)
def test_a_word_in_the_name_tells_the_merge(tmp_path: Path, name: str, merge: str) -> None:
    parts = make_parts()
    check(load(write_plain(tmp_path / name, parts, None)), parts, merge, 1)


def test_without_any_hint_subtraction_is_assumed_and_said(tmp_path: Path) -> None:
    parts = make_parts()
    path = write_plain(tmp_path / "weights.h5", parts, None)
    with pytest.warns(UserWarning, match="subtract is assumed"):
        net = load_reference_weights(path)
    check(net, parts, "subtract", 1)


def test_the_merge_asked_for_decides_where_the_file_does_not(tmp_path: Path) -> None:
    parts = make_parts()
    check(load(write_plain(tmp_path / "sub.h5", parts, None), "add"), parts, "add", 1)


def test_a_file_is_only_read(tmp_path: Path) -> None:
    path = write_plain(tmp_path / "weights.h5", make_parts())
    before = path.read_bytes()
    load(path)
    assert path.read_bytes() == before


# Bad files --------------------------------------------------------------------------------------------------


def refused(path: Path, *words: str, merge: Any = None, error: type[Exception] = BadDataError) -> None:
    """One line that names the file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(error) as caught:
            load_reference_weights(path, merge)
    message = str(caught.value)
    assert type(caught.value) is error
    assert message.startswith(f"{path}: "), message
    assert "\n" not in message and ";" in message
    assert all(word in message for word in words), message


def dense(path: Path) -> None:
    with h5py.File(path, "w") as file:
        group = file.create_group("model_weights").create_group("dense_1")
        group["dense_1/kernel:0"], group["dense_1/bias:0"] = np.zeros((3, 4)), np.zeros(4)
        group.attrs["weight_names"] = np.array(["dense_1/kernel:0", "dense_1/bias:0"], dtype="S20")


def flat_kernels(path: Path) -> None:
    parts = make_parts()
    parts["vnet_encoder"] = [(name, kernel[0], bias) for name, kernel, bias in parts["vnet_encoder"]]
    write_plain(path, parts)


def wrong_width(path: Path) -> None:
    parts = make_parts(2)
    parts["decoder_segmentation"] = decoder_layers(4, 4, 3)
    write_plain(path, parts)


def two_segmentations(path: Path) -> None:
    write_plain(path, {**make_parts(), "decoder_more": decoder_layers(2, 4, 9)})


def encoder_alone(path: Path) -> None:
    write_plain(path, {"vnet_encoder": encoder_layers(2, 1, 1)})


def no_encoder(path: Path) -> None:
    parts = make_parts()
    del parts["vnet_encoder"]
    write_plain(path, parts)


def lost_dataset(path: Path) -> None:
    write_plain(path, make_parts())
    with h5py.File(path, "a") as file:
        del file["model_weights/vnet_encoder/encoder_block3_conv2/kernel:0"]


def names_of_text(path: Path) -> None:
    write_plain(path, make_parts())
    with h5py.File(path, "a") as file:
        group = file["model_weights/vnet_encoder/encoder_block3_conv2"]
        del group["kernel:0"]
        group["kernel:0"] = np.array(["a", "b"], dtype="S1")


def weights_is_a_dataset(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file["model_weights"] = np.zeros(3)


def truncated(path: Path) -> None:
    write_plain(path, make_parts())
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


BAD: dict[str, Callable[[Path], Any]] = {
    "text": lambda path: path.write_text("not a weights file\n"),
    "nothing": lambda path: path.write_bytes(b""),
    "zip": lambda path: path.write_bytes(b"PK\x03\x04" + bytes(100)),
    "empty h5": lambda path: h5py.File(path, "w").close(),
    "another model": dense,
    "kernels of a 2-D network": flat_kernels,
    "a decoder of another width": wrong_width,
    "two segmentation decoders": two_segmentations,
    "encoder alone": encoder_alone,
    "no encoder": no_encoder,
    "a listed array is not there": lost_dataset,
    "text instead of numbers": names_of_text,
    "weights are no group": weights_is_a_dataset,
    "truncated": truncated,
}


@pytest.mark.parametrize("kind", BAD)
def test_files_of_another_kind(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "sub.h5"
    BAD[kind](path)
    refused(path)


@pytest.mark.parametrize(
    ("part", "layer"),
    [
        ("vnet_encoder", "reformatted_inputs"),
        ("vnet_encoder", "encoder_block3_conv2"),
        ("vnet_encoder", "encoder_block5_conv3"),
        ("decoder_segmentation", "decoder_block0_upconv"),
        ("decoder_segmentation", "decoder_block4_elementwise_filter"),
        ("vnet_decoder_registration", "decoder_block1_conv1"),
        ("vnet_decoder_registration", "decoder_block4_elementwise_filter"),
    ],
)
@pytest.mark.parametrize("nested", [False, True])
def test_a_missing_layer(tmp_path: Path, part: str, layer: str, nested: bool) -> None:
    parts = make_parts()
    parts[part] = [entry for entry in parts[part] if entry[0] != layer]
    path = tmp_path / "sub.h5"
    if nested:
        suffixes = {"vnet_decoder_registration": "_1"}
        write_nested(path, [(layers, suffixes.get(name, "")) for name, layers in parts.items()])
    else:
        write_plain(path, parts)
    refused(path)


@pytest.mark.parametrize("kind", ["kernel:0", "bias:0"])
def test_a_missing_array(tmp_path: Path, kind: str) -> None:
    path = write_plain(tmp_path / "sub.h5", make_parts())
    with h5py.File(path, "a") as file:
        group = file["model_weights/vnet_encoder"]
        names = [name for name in group.attrs["weight_names"] if name != f"encoder_block2_conv1/{kind}"]
        assert len(names) == 33
        group.attrs["weight_names"] = np.array(names, dtype=h5py.string_dtype())
    refused(path)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite(tmp_path: Path, value: float) -> None:
    parts = make_parts()
    parts["decoder_segmentation"][5][1][0, 0, 0, 0, 0] = value
    refused(write_plain(tmp_path / "sub.h5", parts), "not finite", parts["decoder_segmentation"][5][0])


def test_a_merge_that_contradicts_the_file(tmp_path: Path) -> None:
    path = write_plain(tmp_path / "a.h5", make_parts(), "subtraction")
    refused(path, "subtract", "add", merge="add")
    path = write_plain(tmp_path / "b.h5", make_parts(factor=2), "concatenation")
    refused(path, "concatenate", merge="subtract")
    refused(write_plain(tmp_path / "sub.h5", make_parts(), None), "concatenate", merge="concatenate")


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    refused(tmp_path / "none.h5", "no such file", error=MissingInputError)
    refused(tmp_path, "folder", error=MissingInputError)


# As a checkpoint, and on the command line -------------------------------------------------------------------


def test_a_checkpoint_says_what_the_authors_preprocessing_does(tmp_path: Path) -> None:
    checkpoint = reference_checkpoint(write_plain(tmp_path / "weights.h5", make_parts(channels=4)))
    spec = checkpoint.spec
    assert spec.normalization == "zscore-volume"
    assert (spec.grid.shape, spec.grid.spacing, spec.grid.orientation) == ((144, 208, 144), (1.0,) * 3, "LPS")
    assert sorted(spec.channels) == ["flair", "t1", "t1ce", "t2"] and spec.channels[1] == "t1"
    assert spec.optional_channels == ()
    assert spec.label_values == (0, 1, 2, 4)
    alone = reference_checkpoint(write_plain(tmp_path / "t1.h5", make_parts(segmentation=False)))
    assert (alone.spec.channels, alone.spec.labels, alone.spec.label_values) == (("t1",), (), ())


@pytest.mark.parametrize("change", ["two channels", "five classes"])
def test_a_checkpoint_of_what_the_authors_never_trained(tmp_path: Path, change: str) -> None:
    parts = make_parts(channels=2 if change == "two channels" else 1)
    if change == "five classes":
        parts["decoder_segmentation"] = decoder_layers(2, 5, 3)
    path = write_plain(tmp_path / "weights.h5", parts)
    assert load(path).architecture.in_channels == (2 if change == "two channels" else 1)
    with pytest.raises(BadDataError, match=r"^[^\n]*weights\.h5: [^\n]*$"):
        reference_checkpoint(path)


def jrs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: Any
) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["jrs", "import-weights", *map(str, words)])
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        main()
    out, err = capsys.readouterr()
    return int(caught.value.code or 0), out, err


def test_import_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = make_parts()
    source, out = write_plain(tmp_path / "weights.h5", parts), tmp_path / "new" / "net.safetensors"
    assert jrs(monkeypatch, capsys, source, "--out", out)[:2] == (0, f"{out}\n")
    loaded = load_checkpoint(out)
    check(loaded.network(), parts, "subtract", 1)
    assert loaded.training["imported_from"] == "weights.h5"
    code, _, err = jrs(monkeypatch, capsys, source, "--out", out)
    assert code == 73 and str(out) in err and "--overwrite" in err
    other = write_plain(tmp_path / "other.h5", make_parts(4), None)
    assert jrs(monkeypatch, capsys, other, "--out", out, "--overwrite", "--merge", "add")[0] == 0
    assert load_checkpoint(out).spec.architecture.merge == "add"


def test_import_weights_that_cannot_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, text = tmp_path / "net.safetensors", tmp_path / "text.h5"
    text.write_text("nothing")
    for source, words, expected in (
        (text, (), 65),
        (tmp_path / "none.h5", (), 66),
        (text, ("--merge", "multiply"), 2),
    ):
        code, printed, err = jrs(monkeypatch, capsys, source, "--out", out, *words)
        assert (code, printed) == (expected, "")
        assert err.startswith("jrs: ") and err.count("\n") == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["text.h5"]


# Parity with the authors' code ------------------------------------------------------------------------------

FIXTURES = ("sub_4mod", "trick_conc_t1", "nested_add_t1")
needs_reference = pytest.mark.skipif(not REFERENCE.is_dir(), reason="the shared fixtures are not here")


def channels_first(array: Array) -> Tensor:
    return torch.from_numpy(np.moveaxis(array, -1, 1).copy())


def run_fixture(name: str) -> tuple[Any, JointNet, JointOutput]:
    if not (REFERENCE / f"{name}.h5").is_file():
        pytest.skip(f"no fixture {name}")
    expected = np.load(REFERENCE / f"{name}.npz")
    net = load(REFERENCE / f"{name}.h5")
    with torch.no_grad():
        return expected, net, net(channels_first(expected["source"]), channels_first(expected["target"]))


@needs_reference
@pytest.mark.parametrize(
    ("name", "merge", "channels", "base"),
    [("sub_4mod", "subtract", 4, 8), ("trick_conc_t1", "concatenate", 1, 4), ("nested_add_t1", "add", 1, 4)],
)
def test_parity_with_the_published_code(name: str, merge: str, channels: int, base: int) -> None:
    expected, net, out = run_fixture(name)
    architecture = net.architecture
    assert (architecture.merge, architecture.in_channels, architecture.base_channels) == (
        merge,
        channels,
        base,
    )
    for got, key, tolerance in (
        (out.moving_probabilities, "decoder_segmentation_1", 1e-4),
        (out.fixed_probabilities, "decoder_segmentation_2", 1e-4),
        (out.coords_vox, "registration_map_construction", 1e-3),
        (out.moved, "registration_map_application", 1e-3),
    ):
        want = channels_first(expected[f"out_{key}"])
        assert got is not None and got.shape == want.shape
        np.testing.assert_allclose(got.numpy(), want.numpy(), atol=tolerance, rtol=0, err_msg=key)


@needs_reference
def test_parity_of_the_mask() -> None:
    expected, _, out = run_fixture("trick_conc_t1")
    want = channels_first(expected["out_predicted_background_merged_mask"]).numpy()
    assert out.nontumor_mask is not None and out.moved is not None
    assert 0.0 < want.mean() < 1.0
    assert (out.nontumor_mask.numpy() == want).mean() >= 0.9999
