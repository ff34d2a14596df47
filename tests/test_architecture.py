"""What a network is made of: parameter counts, refused choices, and the schema that stores them."""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest
import torch

from jrs.architecture import Architecture
from jrs.bundle import BundleManifest, GraphFile, ParityRecord
from jrs.errors import ConfigurationError, JrsError
from jrs.manifest import GridSpec, ModelSpec
from jrs.models.network import JointNet
from jrs.schema import decode, encode

# Convolutions of 3x3x3 per level, as DESIGN.md says.
COUNTS = (1, 2, 3, 3, 3)


def conv(inputs: int, outputs: int, kernel: int) -> int:
    return inputs * outputs * kernel**3 + outputs


def expected_encoder(channels: int, width: int, norm: bool) -> int:
    """Input 1x1x1, convolutions per level, 2x2x2 convolutions between levels."""
    w = [width * 2**k for k in range(5)]
    total = conv(channels, w[0], 1)
    total += sum(count * (conv(c, c, 3) + (2 * c if norm else 0)) for c, count in zip(w, COUNTS, strict=True))
    return total + sum(conv(w[k], w[k + 1], 2) for k in range(4))


def expected_decoder(width: int, skip_factor: int, outputs: int, norm: bool) -> int:
    """From the coarsest code up: 2x2x2 up, [skip, up] to the level's convolutions, 1x1x1 output."""
    w = [width * 2**k for k in range(5)]
    total = conv(w[0], outputs, 1)
    for k in range(4):
        below = skip_factor * w[4] if k == 3 else w[k + 1]
        total += conv(below, w[k], 2)
        total += conv(w[k] + skip_factor * w[k], w[k], 3) + (COUNTS[k] - 1) * conv(w[k], w[k], 3)
        total += COUNTS[k] * 2 * w[k] if norm else 0
    return total


def count(module: Any) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def refusal(**choices: Any) -> str:
    with pytest.raises(ConfigurationError) as caught:
        Architecture(**choices)
    message = str(caught.value)
    assert "\n" not in message
    return message


# Parameters -----------------------------------------------------------------------------------------------


def test_the_counts_of_the_paper() -> None:
    net = JointNet(Architecture(in_channels=4, num_labels=4, base_channels=8, merge="subtract"))
    assert count(net.encoder) == 1_845_408
    assert count(net.segmentation) == 664_676
    assert count(net.registration) == 664_667
    assert count(net) == 3_174_751


def test_the_defaults_are_the_papers() -> None:
    assert count(JointNet()) == 3_174_751
    assert JointNet().architecture.head == "gradient"


@pytest.mark.parametrize(
    ("channels", "labels", "width", "merge", "norm"),
    [
        (1, 4, 8, "subtract", "none"),
        (4, 4, 4, "concatenate", "none"),
        (1, 4, 4, "add", "none"),
        (4, 2, 2, "subtract", "instance"),
        (2, 7, 3, "concatenate", "instance"),
    ],
)
def test_other_choices(channels: int, labels: int, width: int, merge: Any, norm: Any) -> None:
    net = JointNet(Architecture(channels, labels, width, merge=merge, norm=norm))
    normed, factor = norm == "instance", 2 if merge == "concatenate" else 1
    assert count(net.encoder) == expected_encoder(channels, width, normed)
    assert count(net.segmentation) == expected_decoder(width, 1, labels, normed)
    assert count(net.registration) == expected_decoder(width, factor, 3, normed)


@pytest.mark.parametrize("head", ["gradient", "potential", "displacement"])
def test_a_head_has_no_parameters(head: Any) -> None:
    net = JointNet(Architecture(base_channels=2, head=head))
    assert count(net) == expected_encoder(4, 2, False) + sum(expected_decoder(2, 1, n, False) for n in (4, 3))


def test_registration_alone_and_segmentation_alone() -> None:
    registration = JointNet(Architecture(1, 0, 4))
    assert registration.segmentation is None
    assert count(registration) == expected_encoder(1, 4, False) + expected_decoder(4, 1, 3, False)
    segmentation = JointNet(Architecture(1, 5, 4, registration=False))
    assert segmentation.registration is None
    assert count(segmentation) == expected_encoder(1, 4, False) + expected_decoder(4, 1, 5, False)


def test_widths_double() -> None:
    assert Architecture(base_channels=6).widths == (6, 12, 24, 48, 96)


def test_levels_may_have_channels_of_their_own() -> None:
    architecture = Architecture(in_channels=1, base_channels=3, level_channels=(3, 4, 4, 5, 7))
    assert architecture.widths == (3, 4, 4, 5, 7)
    net = JointNet(architecture)
    assert [code.shape[1] for code in net.encoder(torch.zeros(1, 1, 16, 16, 16))] == [3, 4, 4, 5, 7]


@pytest.mark.parametrize("channels", [(8, 16), (8, 16, 32, 0, 64), (4, 16, 32, 64, 128)])
def test_channels_that_are_no_five_levels(channels: tuple[int, ...]) -> None:
    assert "level_channels" in refusal(base_channels=8, level_channels=channels)


def test_the_registration_starts_near_the_identity() -> None:
    net = JointNet(Architecture(base_channels=2))
    assert net.registration is not None
    assert float(net.registration.output.weight.detach().abs().max()) < 1e-2
    assert float(net.registration.output.bias.detach().abs().max()) == 0.0


# Refusals -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "valid"),
    [
        ("merge", ("subtract", "concatenate", "add")),
        ("head", ("gradient", "potential", "displacement")),
        ("norm", ("none", "instance")),
        ("mask", ("warped", "unwarped")),
    ],
)
def test_an_unknown_choice_names_the_known_ones(name: str, valid: tuple[str, ...]) -> None:
    message = refusal(**{name: "multiply"})
    assert name in message and "multiply" in message
    assert all(word in message for word in valid)


@pytest.mark.parametrize("name", ["in_channels", "base_channels"])
@pytest.mark.parametrize("value", [0, -1])
def test_no_channels(name: str, value: int) -> None:
    assert name in refusal(**{name: value})


@pytest.mark.parametrize("labels", [1, -1])
def test_a_single_class_is_no_segmentation(labels: int) -> None:
    assert "num_labels" in refusal(num_labels=labels)


@pytest.mark.parametrize("choices", [{"deep_supervision": 4}, {"deep_supervision": -1}, {"num_labels": 0}])
def test_deep_supervision_of_levels_that_are_not_there(choices: dict[str, int]) -> None:
    assert "deep_supervision" in refusal(**{"deep_supervision": 1, **choices})


def test_what_is_deployed_knows_nothing_of_training() -> None:
    architecture = Architecture(deep_supervision=2, merge="add")
    assert architecture.deployed == Architecture(merge="add")


def test_a_network_without_any_decoder() -> None:
    assert "registration" in refusal(num_labels=0, registration=False)


def test_an_architecture_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        Architecture().merge = "add"  # type: ignore[misc]


# What a network expects -----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(32, 32, 40), (0, 16, 16), (-16, 16, 16), (8, 16, 16)])
def test_a_grid_is_a_multiple_of_sixteen(shape: tuple[int, int, int]) -> None:
    with pytest.raises(ConfigurationError, match="multiple of 16"):
        GridSpec(shape)


@pytest.mark.parametrize("side", [0.0, -1.0, 0.09, 21.0, float("nan"), float("inf")])
def test_a_grids_spacing_is_millimetres(side: float) -> None:
    with pytest.raises(ConfigurationError, match="spacing"):
        GridSpec(spacing=(1.0, side, 1.0))


@pytest.mark.parametrize("orientation", ["RRS", "RA", "ras", "XYZ", "RLS", ""])
def test_an_orientation_names_each_axis_once(orientation: str) -> None:
    with pytest.raises(ConfigurationError, match="orientation"):
        GridSpec(orientation=orientation)


def test_every_orientation_is_taken() -> None:
    for axes in itertools.permutations(("RL", "AP", "SI")):
        for letters in itertools.product(*axes):
            assert GridSpec(orientation="".join(letters)).orientation == "".join(letters)


@pytest.mark.parametrize(
    "change",
    [
        {"channels": ("t1",)},
        {"channels": ("t1", "t1", "t2", "flair")},
        {"optional_channels": ("pd",)},
        {"labels": ("background", "tumor")},
        {"label_values": (0, 1, 2)},
        {"architecture": Architecture(num_labels=3)},
        {"passes": 0},
        {"passes": 5},
        {"certainty": 1.0},
        {"certainty": -0.1},
    ],
)
def test_a_model_whose_parts_disagree(change: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError):
        ModelSpec(**change)


@pytest.mark.parametrize(("orientation", "axes"), [("RAS", (0, 1, 2)), ("LPI", (0, 1, 2)), ("PIL", (2, 0, 1))])
def test_axes_by_their_directions(orientation: str, axes: tuple[int, int, int]) -> None:
    grid = GridSpec(orientation=orientation)
    assert tuple(grid.axis_along(directions) for directions in ("LR", "AP", "IS")) == axes


def test_a_grid_too_small_for_instance_norm_is_refused() -> None:
    caught: Exception | None = None
    try:
        spec = ModelSpec(Architecture(base_channels=2, norm="instance"), grid=GridSpec((16, 16, 16)))
        net = JointNet(spec.architecture)
        net(torch.zeros(1, 4, *spec.grid.shape), torch.zeros(1, 4, *spec.grid.shape))
    except Exception as error:
        caught = error
    assert caught is None or isinstance(caught, JrsError)


# Schema ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Inner:
    size: tuple[int, int]
    kind: Literal["a", "b"] = "a"


@dataclass(frozen=True)
class Outer:
    name: str
    ratio: float
    flag: bool = False
    inner: Inner = field(default_factory=lambda: Inner((1, 2)))
    many: tuple[float, ...] = ()
    table: dict[str, Inner] = field(default_factory=dict)
    maybe: int | None = None
    free: dict[str, Any] = field(default_factory=dict)


FULL = Outer("x", 0.5, True, Inner((3, 4), "b"), (1.0, 2.5), {"k": Inner((5, 6))}, 7, {"any": [1, None]})
PLAIN = {
    "name": "x",
    "ratio": 0.5,
    "flag": True,
    "inner": {"size": [3, 4], "kind": "b"},
    "many": [1.0, 2.5],
    "table": {"k": {"size": [5, 6], "kind": "a"}},
    "maybe": 7,
    "free": {"any": [1, None]},
}


def manifest() -> BundleManifest:
    return BundleManifest(
        format_version=1,
        name="tiny",
        model=ModelSpec(
            Architecture(1, 0, 4, head="potential", norm="instance", grid_origin=1, mask="unwarped"),
            ("t1",),
            (),
            GridSpec((32, 48, 16), (1.5, 2.0, 2.5), "LPS"),
            "zscore-volume",
            (),
            (),
        ),
        precision="fp16",
        opset=20,
        graphs={"encoder": GraphFile("encoder.onnx", "0" * 64)},
        training={"steps": 5, "config": {"seed": 1}},
        parity={"flow": ParityRecord(0.1, 0.05, "relative", 0.25)},
        jrs_version="0.1.0",
    )


def test_encode_gives_plain_values_in_the_order_of_the_fields() -> None:
    assert encode(FULL) == PLAIN
    assert list(encode(FULL)) == list(PLAIN)


@pytest.mark.parametrize("value", [FULL, Outer("y", 2.0), ModelSpec(), Architecture(), manifest()])
def test_round_trip_through_json(value: Any) -> None:
    assert decode(type(value), json.loads(json.dumps(encode(value))), "file") == value


def test_defaults_fill_what_is_not_there() -> None:
    assert decode(Outer, {"name": "x", "ratio": 1.5}, "f") == Outer("x", 1.5)


def test_whole_numbers_are_taken_for_floats_and_nothing_else_is_converted() -> None:
    decoded = decode(Outer, {"name": "x", "ratio": 2, "many": [1, 2]}, "f")
    assert (type(decoded.ratio), decoded.ratio) == (float, 2.0)
    assert [type(x) for x in decoded.many] == [float, float]


def test_null_where_it_may_be() -> None:
    assert decode(Outer, {"name": "x", "ratio": 1.0, "maybe": None}, "f").maybe is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"colour": 1}, ("f.json:", "unknown field 'colour'", "name")),
        ({"name": 3}, ("f.json: name:", "must be str, not int")),
        ({"name": None}, ("f.json: name:", "must be str, not null")),
        ({"ratio": "0.5"}, ("f.json: ratio:", "must be float, not str")),
        ({"ratio": True}, ("f.json: ratio:", "must be float, not bool")),
        ({"flag": 1}, ("f.json: flag:", "must be bool, not int")),
        ({"maybe": True}, ("f.json: maybe:", "must be int, not bool")),
        ({"maybe": 1.0}, ("f.json: maybe:", "must be int, not float")),
        ({"many": 1.0}, ("f.json: many:", "must be a list, not float")),
        ({"many": ["a"]}, ("f.json: many[0]:", "must be float, not str")),
        ({"inner": [1, 2]}, ("f.json: inner:", "must be an object", "not list")),
        ({"inner": {}}, ("f.json: inner:", "field 'size' is missing")),
        ({"inner": {"size": [1]}}, ("f.json: inner: size:", "must have 2 entries, not 1")),
        ({"inner": {"size": [1, 2.5]}}, ("f.json: inner: size[1]:", "must be int, not float")),
        ({"inner": {"size": [1, 2], "kind": "c"}}, ("f.json: inner: kind:", "'c' is unknown", "a, b")),
        ({"inner": {"size": [1, 2], "shape": 1}}, ("f.json: inner:", "unknown field 'shape'")),
        ({"table": []}, ("f.json: table:", "must be an object, not list")),
        ({"table": {"k": {"size": "ab"}}}, ("f.json: table.k: size:", "must be a list, not str")),
        ({"free": 1}, ("f.json: free:", "must be an object, not int")),
    ],
)
def test_an_error_says_where_and_what(change: dict[str, Any], words: tuple[str, ...]) -> None:
    with pytest.raises(ConfigurationError) as caught:
        decode(Outer, PLAIN | change, "f.json")
    message = str(caught.value)
    assert message.startswith(words[0]) and "\n" not in message
    assert all(word in message for word in words), message


@pytest.mark.parametrize("name", ["name", "ratio"])
def test_a_missing_field_is_named(name: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"^f\.json: field '{name}' is missing"):
        decode(Outer, {k: v for k, v in PLAIN.items() if k != name}, "f.json")


@pytest.mark.parametrize("value", [None, [], "text", 3])
def test_the_top_must_be_an_object(value: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"^f\.json: must be an object"):
        decode(Outer, value, "f.json")


def test_what_a_class_itself_refuses_names_the_place() -> None:
    value = encode(ModelSpec()) | {"grid": {"shape": [16, 16, 17]}}
    with pytest.raises(ConfigurationError, match=r"^f\.json: grid: .*multiple of 16"):
        decode(ModelSpec, value, "f.json")
