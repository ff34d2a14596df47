"""JointNet: its equations written out with torch.nn.functional, its merges, its mask, its number types."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from jrs.architecture import Architecture
from jrs.models.network import InstanceNorm, JointNet, JointOutput

COUNTS = (1, 2, 3, 3, 3)
SHAPE = (16, 32, 16)


def network(**choices: Any) -> JointNet:
    """A small network with random weights: a field of about a voxel, every class wins somewhere."""
    torch.manual_seed(3)
    net = JointNet(Architecture(**{"in_channels": 2, "base_channels": 2, **choices})).eval()
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
        codes = net.encoder(torch.cat(pair()))
        if net.registration is not None:
            net.registration.output.weight.normal_(std=0.5)
            flow = net.flow(codes, tuple(code.flip(0) for code in codes))
            net.registration.output.weight /= flow.std()
        if net.segmentation is not None:
            net.segmentation.output.weight.normal_(std=0.5)
            logits = net.segmentation(codes)
            scale = 2.0 / logits.std(dim=(0, 2, 3, 4))
            bias = net.segmentation.output.bias
            assert bias is not None
            bias.copy_((bias - logits.mean(dim=(0, 2, 3, 4))) * scale)
            net.segmentation.output.weight *= scale.view(-1, 1, 1, 1, 1)
            net.segmentation.output.bias[0] += 1.0
    return net


def pair(batch: int = 2, channels: int = 2, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(batch, channels, *SHAPE, generator=generator) for _ in range(2))  # type: ignore[return-value]


def largest(tensor: Tensor) -> float:
    return float(tensor.detach().abs().max())


def close(got: Tensor | None, expected: Tensor, tolerance: float = 1e-5) -> None:
    assert got is not None and got.shape == expected.shape
    np.testing.assert_allclose(
        got.detach().numpy(), expected.detach().numpy(), atol=tolerance, rtol=tolerance
    )


# The equations --------------------------------------------------------------------------------------------


class Written:
    """The network of the paper from its weights alone: no module of jrs takes part."""

    def __init__(self, net: JointNet) -> None:
        self.weights = net.state_dict()
        self.instance = net.architecture.norm == "instance"
        self.made: dict[int, Tensor] = {}  # what each level of the last decoder made

    def get(self, name: str) -> tuple[Tensor, Tensor]:
        return self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]

    def level(self, x: Tensor, name: str, count: int) -> Tensor:
        for i in range(count):
            x = functional.conv3d(x, *self.get(f"{name}.convs.{i}"), padding=1)
            if self.instance:
                mean = x.mean(dim=(2, 3, 4), keepdim=True)
                variance = (x - mean).square().mean(dim=(2, 3, 4), keepdim=True)
                weight, bias = (t.view(1, -1, 1, 1, 1) for t in self.get(f"{name}.norms.{i}"))
                x = (x - mean) / (variance + 1e-5).sqrt() * weight + bias
            x = x.clamp(min=0)
        return x

    def encode(self, image: Tensor) -> list[Tensor]:
        x = functional.conv3d(image, *self.get("encoder.input"))
        codes = []
        for k in range(5):
            x = self.level(x, f"encoder.levels.{k}", COUNTS[k]) + x
            codes.append(x)
            if k < 4:
                x = functional.conv3d(x, *self.get(f"encoder.downs.{k}"), stride=2).clamp(min=0)
        return codes

    def decode(self, codes: list[Tensor], name: str) -> Tensor:
        x = codes[4]
        for k in (3, 2, 1, 0):
            up = functional.conv_transpose3d(x, *self.get(f"{name}.ups.{k}"), stride=2).clamp(min=0)
            x = self.level(torch.cat([codes[k], up], dim=1), f"{name}.levels.{k}", COUNTS[k]) + up
            self.made[k] = x
        return functional.conv3d(x, *self.get(f"{name}.output"))


@pytest.mark.parametrize(
    ("merge", "norm"),
    [("subtract", "none"), ("concatenate", "instance"), ("add", "none"), ("subtract", "instance")],
)
def test_against_the_network_written_out(merge: Any, norm: Any) -> None:
    net, (moving, fixed) = network(merge=merge, norm=norm), pair()
    written = Written(net)
    a, b = written.encode(moving), written.encode(fixed)
    merged = {
        "subtract": lambda m, f: m - f,
        "concatenate": lambda m, f: torch.cat([m, f], dim=1),
        "add": lambda m, f: m + f,
    }[merge]
    with torch.no_grad():
        out = net(moving, fixed)
    close(out.flow, written.decode([merged(m, f) for m, f in zip(a, b, strict=True)], "registration"), 1e-4)
    close(out.moving_logits, written.decode(a, "segmentation"), 1e-4)
    close(out.fixed_logits, written.decode(b, "segmentation"), 1e-4)
    assert out.flow is not None and float(out.flow.std()) > 1e-2


def test_codes_are_five_and_halve() -> None:
    net = network(base_channels=3)
    codes = net.encoder(pair()[0])
    assert [tuple(code.shape) for code in codes] == [
        (2, 3 * 2**k, *(side // 2**k for side in SHAPE)) for k in range(5)
    ]


# Two voxels are left at the coarsest level: normalising them enlarges what is rounded.
@pytest.mark.parametrize(("norm", "tolerance"), [("none", 1e-5), ("instance", 2e-3)])
def test_every_image_is_encoded_by_itself(norm: Any, tolerance: float) -> None:
    net, (moving, fixed) = network(norm=norm), pair()
    together = net.encoder(torch.cat([moving, fixed]))
    for n, image in enumerate([*moving, *fixed]):
        for code, expected in zip(net.encoder(image[None]), together, strict=True):
            close(code, expected[n : n + 1], tolerance)


# Merging --------------------------------------------------------------------------------------------------


def test_subtraction_is_antisymmetric() -> None:
    net, (moving, fixed) = network(), pair()
    a, b = net.encoder(moving), net.encoder(fixed)
    for there, back in zip(net.merge(a, b), net.merge(b, a), strict=True):
        assert bool(there.any())
        assert torch.equal(there, -back)


def test_equal_images_subtract_to_nothing() -> None:
    net, (moving, fixed) = network(), pair()
    for image in (moving, fixed):
        codes = net.encoder(image)
        assert not any(bool(code.any()) for code in net.merge(codes, codes))
    # So the field of an image onto itself is the same whatever it shows.
    assert torch.equal(
        net(moving[:1], moving[:1]).flow, net.flow(*[tuple(torch.zeros_like(c[:1]) for c in codes)] * 2)
    )


def test_concatenation_puts_the_moving_codes_first() -> None:
    net, (moving, fixed) = network(merge="concatenate"), pair()
    a, b = net.encoder(moving), net.encoder(fixed)
    for merged, m, f in zip(net.merge(a, b), a, b, strict=True):
        width = m.shape[1]
        assert merged.shape[1] == 2 * width
        assert torch.equal(merged[:, :width], m) and torch.equal(merged[:, width:], f)


def test_addition_is_symmetric() -> None:
    net, (moving, fixed) = network(merge="add"), pair()
    a, b = net.encoder(moving), net.encoder(fixed)
    for merged, other, m, f in zip(net.merge(a, b), net.merge(b, a), a, b, strict=True):
        assert torch.equal(merged, m + f) and torch.equal(merged, other)


def test_flow_from_kept_codes_is_the_flow_of_the_pair() -> None:
    net, (moving, fixed) = network(), pair()
    expected = net(moving, fixed).flow
    close(net.flow(net.encoder(moving), net.encoder(fixed)), expected)


# Output ---------------------------------------------------------------------------------------------------

FIELDS = {
    "moving_probabilities": 4,
    "fixed_probabilities": 4,
    "flow": 3,
    "coords_vox": 3,
    "moved": 2,
    "moved_probabilities": 4,
    "nontumor_mask": 1,
    "moving_logits": 4,
    "fixed_logits": 4,
}
REGISTRATION = {"flow", "coords_vox", "moved"}
SEGMENTATION = {"moving_probabilities", "fixed_probabilities", "moving_logits", "fixed_logits"}


def check_fields(out: JointOutput, there: set[str]) -> None:
    for name, channels in FIELDS.items():
        value = getattr(out, name)
        assert (value is not None) is (name in there), name
        if value is not None:
            assert value.shape == (2, channels, *SHAPE), name
            assert value.dtype == torch.float32, name
            assert torch.isfinite(value).all(), name


@pytest.mark.parametrize("head", ["gradient", "potential", "displacement"])
def test_output_of_both_decoders(head: Any) -> None:
    out = network(head=head)(*pair())
    check_fields(out, set(FIELDS))
    for probabilities in (out.moving_probabilities, out.fixed_probabilities, out.moved_probabilities):
        assert probabilities is not None and bool((probabilities >= 0.0).all())
        close(probabilities.sum(dim=1), torch.ones(2, *SHAPE))
    close(out.moving_probabilities, torch.softmax(out.moving_logits, dim=1))
    close(out.fixed_probabilities, torch.softmax(out.fixed_logits, dim=1))


def test_output_of_registration_alone() -> None:
    check_fields(network(num_labels=0)(*pair()), REGISTRATION)


def test_output_of_segmentation_alone() -> None:
    net = network(registration=False)
    check_fields(net(*pair()), SEGMENTATION)
    codes = net.encoder(pair()[0])
    with pytest.raises(ValueError, match="registration"):
        net.flow(codes, codes)


@pytest.mark.parametrize("origin", [0, 1])
def test_coordinates_follow_the_head_and_the_origin(origin: int) -> None:
    flow = torch.randn(1, 3, 4, 5, 6, generator=torch.Generator().manual_seed(1))
    v = flow.double().numpy()
    identity = np.indices((4, 5, 6))
    got = network(head="displacement", grid_origin=origin).coordinates(flow).numpy()
    np.testing.assert_allclose(got, identity + v + origin, atol=1e-5)
    phi = 2.0 / (1.0 + np.exp(-v))
    got = network(head="gradient", grid_origin=origin).coordinates(flow).numpy()
    expected = np.stack([np.cumsum(phi[:, i], axis=i + 1) for i in range(3)], axis=1) - 1 + origin
    np.testing.assert_allclose(got, expected, atol=1e-5)


def sampled(image: Tensor, coords: Tensor) -> Tensor:
    unit = [2.0 * coords[:, axis] / (image.shape[2 + axis] - 1) - 1.0 for axis in (2, 1, 0)]
    return functional.grid_sample(
        image, torch.stack(unit, dim=-1), padding_mode="border", align_corners=True, mode="bilinear"
    )


def test_moved_images_and_probabilities_are_sampled_at_the_coordinates() -> None:
    net, (moving, fixed) = network(head="displacement"), pair()
    out = net(moving, fixed)
    assert out.coords_vox is not None and out.moving_probabilities is not None
    close(out.moved, sampled(moving, out.coords_vox), 1e-4)
    close(out.moved_probabilities, sampled(out.moving_probabilities, out.coords_vox), 1e-4)
    alone = network(head="displacement", num_labels=0)(moving, fixed)
    assert alone.coords_vox is not None
    close(alone.moved, sampled(moving, alone.coords_vox), 1e-4)


# The mask -------------------------------------------------------------------------------------------------


def test_the_mask_of_the_paper_is_warped() -> None:
    out = network(head="displacement", mask="warped")(*pair())
    assert out.moving_probabilities is not None and out.fixed_probabilities is not None
    assert out.coords_vox is not None and out.nontumor_mask is not None
    moved_background = sampled(out.moving_probabilities[:, :1], out.coords_vox)
    close(out.nontumor_mask, moved_background * out.fixed_probabilities[:, :1], 1e-4)
    still = out.moving_probabilities[:, :1] * out.fixed_probabilities[:, :1]
    assert largest(out.nontumor_mask - still) > 0.1


def test_the_mask_of_the_published_code_is_thresholded_and_unwarped() -> None:
    out = network(head="displacement", mask="unwarped")(*pair())
    moving = out.moving_probabilities.detach().numpy().argmax(axis=1) == 0  # type: ignore[union-attr]
    fixed = out.fixed_probabilities.detach().numpy().argmax(axis=1) == 0  # type: ignore[union-attr]
    expected = np.minimum(moving, fixed)[:, None].astype(np.float32)
    assert 0.0 < expected.mean() < 1.0
    assert out.nontumor_mask is not None
    np.testing.assert_array_equal(out.nontumor_mask.numpy(), expected)


@pytest.mark.parametrize("mask", ["warped", "unwarped"])
def test_no_gradient_passes_through_the_mask(mask: Any) -> None:
    net, (moving, fixed) = network(mask=mask).train(), pair()
    out = net(moving, fixed)
    assert out.nontumor_mask is not None and out.moved is not None
    assert not out.nontumor_mask.requires_grad
    assert out.moved_probabilities is not None and not out.moved_probabilities.requires_grad
    ((out.moved - fixed) * out.nontumor_mask).square().mean().backward()
    assert net.segmentation is not None and net.registration is not None
    assert all(p.grad is None or not p.grad.any() for p in net.segmentation.parameters())
    assert all(p.grad is not None for p in net.registration.parameters())
    assert any(bool(p.grad.any()) for p in net.encoder.parameters() if p.grad is not None)


# Number types and layouts ---------------------------------------------------------------------------------


@pytest.mark.parametrize("head", ["gradient", "displacement"])
def test_bf16_autocast_leaves_the_head_in_float32(head: Any) -> None:
    net, (moving, fixed) = network(norm="instance", head=head), pair()
    exact = net(moving, fixed)
    with torch.autocast("cpu", torch.bfloat16):
        out = net(moving, fixed)
        codes = net.encoder(moving)
    assert codes[0].dtype == torch.bfloat16, "the convolutions are to run in bf16"
    check_fields(out, set(FIELDS))
    assert out.flow is not None and out.moving_logits is not None and out.coords_vox is not None
    # A last convolution in bf16 would leave numbers of eight bits.
    for raw in (out.flow, out.moving_logits):
        rounded = raw.bfloat16().float()
        assert float((rounded != raw).float().mean()) > 0.9
    close(out.coords_vox, net.coordinates(out.flow.detach()), 0.0)
    assert exact.flow is not None
    assert largest(out.flow - exact.flow) < 0.1 * float(exact.flow.detach().std())


@pytest.mark.parametrize("norm", ["none", "instance"])
def test_the_layout_in_memory_does_not_matter(norm: Any) -> None:
    net, (moving, fixed) = network(norm=norm), pair()
    expected = net(moving, fixed)
    layout = torch.channels_last_3d
    other = network(norm=norm).to(memory_format=layout)  # type: ignore[call-overload]
    out = other(moving.to(memory_format=layout), fixed.to(memory_format=layout))
    for name in FIELDS:
        close(getattr(out, name), getattr(expected, name), 1e-4)


def test_instance_norm_of_half_precision_adds_up_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    normalize, seen = functional.instance_norm, []
    monkeypatch.setattr(
        functional, "instance_norm", lambda x, *rest: (seen.append(x.dtype), normalize(x, *rest))[1]
    )
    norm = InstanceNorm(1, affine=True)
    with torch.no_grad():
        norm.weight.fill_(2.0)  # type: ignore[union-attr]
        norm.bias.fill_(0.5)  # type: ignore[union-attr]
    # The sum of these squares, 4e9, has no place in float16.
    values = (1000.0 + 8.0 * torch.randn(1, 1, 16, 16, 16, generator=torch.Generator().manual_seed(2))).half()
    got = norm(values)
    assert got.dtype == torch.float16
    # On the CPU both types would pass below; other devices add up in the type they are given.
    assert seen == [torch.float32]
    x = values.double().numpy()
    expected = (x - x.mean()) / np.sqrt(x.var() + 1e-5) * 2.0 + 0.5
    np.testing.assert_allclose(got.detach().double().numpy(), expected, atol=0.01)


def test_choices_by_name_are_an_architecture() -> None:
    assert JointNet().architecture == Architecture()
    assert JointNet(in_channels=1, base_channels=2, merge="add").architecture == Architecture(
        in_channels=1, base_channels=2, merge="add"
    )
    changed = JointNet(Architecture(in_channels=1, base_channels=2), registration=False)
    assert changed.registration is None and changed.architecture.in_channels == 1


# Both ways --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("merge", ["subtract", "concatenate", "add"])
@pytest.mark.parametrize("choices", [{}, {"norm": "instance"}, {"num_labels": 0}, {"mask": "unwarped"}])
def test_the_way_back_is_the_pass_with_the_images_exchanged(merge: Any, choices: dict[str, Any]) -> None:
    net, (moving, fixed) = network(merge=merge, **choices), pair()
    with torch.no_grad():
        both, there, back = net(moving, fixed, reverse=True), net(moving, fixed), net(fixed, moving)
    assert there.reverse is None and both.reverse is not None and both.reverse.reverse is None
    for name in FIELDS:
        for got, expected in ((both, there), (both.reverse, back)):
            value = getattr(expected, name)
            assert (getattr(got, name) is None) is (value is None), name
            if value is not None:
                close(getattr(got, name), value, 1e-4)


def test_the_way_back_has_its_own_gradient() -> None:
    net, (moving, fixed) = network(), pair()
    gradients = []
    for flow in (net(moving, fixed, reverse=True).reverse.flow, net(fixed, moving).flow):
        net.zero_grad()
        flow.square().mean().backward()
        gradients.append([p.grad for name, p in net.named_parameters() if not name.startswith("segmentation")])
    assert any(largest(g) > 1e-3 for g in gradients[0])
    for got, expected in zip(*gradients, strict=True):
        close(got, expected, 1e-4)


# Deep supervision -------------------------------------------------------------------------------------------


def test_auxiliary_heads_read_the_levels_below_the_finest() -> None:
    net, (moving, fixed) = network(deep_supervision=2).train(), pair()
    out = net(moving, fixed)
    assert net.segmentation is not None
    for image, logits, auxiliary in (
        (moving, out.moving_logits, out.moving_auxiliary),
        (fixed, out.fixed_logits, out.fixed_auxiliary),
    ):
        assert [tuple(x.shape) for x in auxiliary] == [(2, 4, *(n // 2**k for n in SHAPE)) for k in (1, 2)]
        written = Written(net)
        close(logits, written.decode(written.encode(image), "segmentation"), 1e-4)
        for k, got in enumerate(auxiliary, start=1):
            close(got, functional.conv3d(written.made[k], *written.get(f"auxiliary.{k - 1}")), 1e-4)


def test_deep_supervision_is_for_training_alone() -> None:
    net, plain = network(deep_supervision=3).eval(), network()
    assert net(*pair()).moving_auxiliary == ()
    assert plain.train()(*pair()).moving_auxiliary == ()
    assert not any(name.startswith("auxiliary") for name in plain.state_dict())
    heads = sum(p.numel() for p in net.parameters()) - sum(p.numel() for p in plain.parameters())
    widths = net.architecture.widths
    assert heads == sum(4 * width + 4 for width in widths[1:4])


def test_weights_fit_with_and_without_auxiliary_heads() -> None:
    plain, deep = network(), network(deep_supervision=1)
    with torch.no_grad():
        for p in deep.parameters():
            p.add_(1.0)
    state, heads = deep.state_dict(), [p.clone() for p in deep.auxiliary.parameters()]
    plain.load_state_dict(state)
    assert "auxiliary.0.weight" in state
    close(plain.encoder.input.weight, deep.encoder.input.weight, 0.0)
    other = network().state_dict()
    deep.load_state_dict(other)
    close(deep.encoder.input.weight, other["encoder.input.weight"], 0.0)
    assert all(torch.equal(a, b) for a, b in zip(heads, deep.auxiliary.parameters(), strict=True))
    with pytest.raises(RuntimeError, match="encoder"):
        deep.load_state_dict({name: x for name, x in other.items() if not name.startswith("encoder")})


def test_several_passes() -> None:
    """By the network's own forward passes, its images and fields sampled by PyTorch's grid_sample."""
    torch.manual_seed(3)
    net = JointNet(in_channels=2, base_channels=2, norm="instance", head="displacement")
    assert net.registration is not None
    torch.nn.init.normal_(net.registration.output.weight, std=0.3)
    moving, fixed = torch.randn(2, 2, 32, 32, 48), torch.randn(2, 2, 32, 32, 48)
    size = torch.tensor([32.0, 32.0, 48.0]).view(1, 3, 1, 1, 1)
    index = torch.stack(torch.meshgrid(*(torch.arange(float(n)) for n in moving.shape[2:]), indexing="ij"))

    def at(volume: torch.Tensor, coords: torch.Tensor) -> torch.Tensor:
        grid = (2.0 * coords / (size - 1.0) - 1.0).flip(1).permute(0, 2, 3, 4, 1)
        return torch.nn.functional.grid_sample(volume, grid, padding_mode="border", align_corners=True)

    want, moved = index.expand(2, -1, -1, -1, -1), moving
    for passes in (1, 2, 3):
        further = net(moved, fixed).coords_vox.detach()
        want = further + at(want - index, further)
        moved = at(moving, want)
        got = net.register(moving, fixed, passes)
        assert not got.requires_grad and (want - index).abs().max() > 0.3
        torch.testing.assert_close(got, want, rtol=0.0, atol=2e-3)
