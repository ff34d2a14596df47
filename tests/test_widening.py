"""A widened network computes what the narrow one did, and its copies are no longer alike once trained."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from jrs.architecture import Architecture
from jrs.errors import ConfigurationError
from jrs.models.network import JointNet
from jrs.models.widening import widen


def networks(wide: dict[str, Any], **choices: Any) -> tuple[JointNet, JointNet]:
    """A network of random weights (a real registration, not the identity it starts from), and it widened."""
    torch.manual_seed(3)
    old = Architecture(**{"in_channels": 2, "base_channels": 2, "norm": "instance", "head": "displacement"} | choices)
    new = Architecture(**{"in_channels": 2, "norm": "instance", "head": "displacement"} | choices | wide)
    narrow = JointNet(old)
    for name, parameter in narrow.named_parameters():
        if name.startswith("registration.output"):
            torch.nn.init.normal_(parameter)
    target = JointNet(new)
    target.load_state_dict(widen(narrow.state_dict(), old, new))
    return narrow.eval(), target.eval()


@pytest.mark.parametrize("merge", ["subtract", "add", "concatenate"])
@pytest.mark.parametrize(
    "wide",
    [
        {"base_channels": 4},
        {"base_channels": 3, "level_channels": (3, 5, 8, 16, 40)},
        {"base_channels": 2, "level_channels": (2, 9, 8, 16, 32)},
        {"base_channels": 2},
    ],
)
def test_a_widened_network_computes_the_same(wide: dict[str, Any], merge: str) -> None:
    narrow, target = networks(wide, merge=merge)
    moving, fixed = torch.randn(2, 1, 2, 32, 16, 32)
    with torch.no_grad():
        a, b = narrow(moving, fixed), target(moving, fixed)
    assert a.coords_vox is not None and b.coords_vox is not None and a.moving_logits is not None
    assert float((a.coords_vox - b.coords_vox).abs().max()) < 1e-3 * float(a.flow.abs().max())
    torch.testing.assert_close(a.moving_logits, b.moving_logits, rtol=1e-3, atol=1e-4)


def test_copies_of_a_channel_part_in_training() -> None:
    _, net = networks({"base_channels": 4})
    first = net.encoder.input
    assert torch.equal(first.weight[0], first.weight[1])
    out = net(*torch.randn(2, 1, 2, 32, 32, 32))
    out.flow.square().mean().backward()
    gradient = first.weight.grad
    assert gradient is not None and not torch.allclose(gradient[0], gradient[1], rtol=1e-2)


@pytest.mark.parametrize("wide", [{"base_channels": 1}, {"base_channels": 4, "head": "potential"}])
def test_what_is_no_wider_network_is_refused(wide: dict[str, Any]) -> None:
    old = Architecture(in_channels=2, base_channels=2, head="displacement")
    new = Architecture(**{"in_channels": 2, "head": "displacement"} | wide)
    with pytest.raises(ConfigurationError, match="cannot be widened"):
        widen(JointNet(old).state_dict(), old, new)
