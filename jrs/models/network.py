"""JointNet: one shared encoder, a segmentation decoder, a registration decoder.

Estienne et al. 2020 (doi 10.3389/fncom.2020.00017), section 2.1, with the layer table of the authors' weights:
a VNet with 8 channels doubling over 5 levels and (1, 2, 3, 3, 3) convolutions of 3x3x3 per level, a residual
sum per level, 2x2x2 convolutions of stride 2 between levels, 1x1x1 convolutions at both ends.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from jrs.architecture import CONVOLUTIONS_PER_LEVEL, LEVELS, Architecture, Norm
from jrs.models.spatial import compose, coordinates, warp

Codes = tuple[Tensor, ...]


@dataclass
class JointOutput:
    """What one pass over a pair gives; N images, C channels, K labels, grid X, Y, Z.

    Attributes:
        moving_probabilities: (N,K,X,Y,Z) of the moving image on its own grid; None without segmentation.
        fixed_probabilities: likewise of the fixed image.
        flow: (N,3,X,Y,Z) raw channels of the registration decoder, float32; None without registration.
        coords_vox: (N,3,X,Y,Z) where in the moving image each fixed voxel is sampled, voxel indices.
        moved: (N,C,X,Y,Z) the moving image at ``coords_vox``.
        moved_probabilities: (N,K,X,Y,Z) the moving image's probabilities at ``coords_vox``.
        nontumor_mask: (N,1,X,Y,Z) in [0, 1], where the similarity counts; None unless both decoders exist.
        moving_logits: segmentation before the softmax, for the loss.
        fixed_logits: likewise of the fixed image.
        moving_auxiliary: logits (N,K,X/2^k,Y/2^k,Z/2^k) of the auxiliary heads, k = 1, 2, ...; empty but in training.
        fixed_auxiliary: likewise of the fixed image.
        reverse: the same with the roles exchanged, the fixed image moving onto the moving one's grid; on request.
    """

    moving_probabilities: Tensor | None = None
    fixed_probabilities: Tensor | None = None
    flow: Tensor | None = None
    coords_vox: Tensor | None = None
    moved: Tensor | None = None
    moved_probabilities: Tensor | None = None
    nontumor_mask: Tensor | None = None
    moving_logits: Tensor | None = None
    fixed_logits: Tensor | None = None
    moving_auxiliary: tuple[Tensor, ...] = ()
    fixed_auxiliary: tuple[Tensor, ...] = ()
    reverse: JointOutput | None = None


class Level(nn.Module):
    """Convolutions of 3x3x3, each with its norm and ReLU; the caller adds the residual."""

    def __init__(self, in_channels: int, channels: int, convolutions: int, norm: Norm) -> None:
        super().__init__()
        self.convs = nn.ModuleList(
            nn.Conv3d(in_channels if i == 0 else channels, channels, 3, padding=1) for i in range(convolutions)
        )
        self.norms = nn.ModuleList(_make_norm(norm, channels) for _ in range(convolutions))

    def forward(self, x: Tensor) -> Tensor:
        """(N,in,X,Y,Z) to (N,channels,X,Y,Z)."""
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = torch.relu(norm(conv(x)))
        return x


class InstanceNorm(nn.InstanceNorm3d):
    """Affine instance normalisation whose statistics are FP32: sums over a volume do not fit in FP16."""

    def forward(self, x: Tensor) -> Tensor:
        """(N,C,X,Y,Z), same shape and type."""
        if x.dtype == torch.float16:
            return super().forward(x.float()).half()
        return super().forward(x)


def _make_norm(norm: Norm, channels: int) -> nn.Module:
    return nn.Identity() if norm == "none" else InstanceNorm(channels, affine=True)


class Encoder(nn.Module):
    """One image (N,C,X,Y,Z) to five codes; code k has base*2^k channels on a grid 2^k times coarser."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        widths = architecture.widths
        self.input = nn.Conv3d(architecture.in_channels, widths[0], 1)
        self.levels = nn.ModuleList(
            Level(width, width, count, architecture.norm)
            for width, count in zip(widths, CONVOLUTIONS_PER_LEVEL, strict=True)
        )
        self.downs = nn.ModuleList(nn.Conv3d(widths[k], widths[k + 1], 2, stride=2) for k in range(LEVELS - 1))

    def forward(self, image: Tensor) -> Codes:
        """Run on one image alone, never on a pair: a fixed image's codes can be kept."""
        x = self.input(image)
        codes = []
        for k in range(LEVELS):
            x = self.levels[k](x) + x
            codes.append(x)
            if k < LEVELS - 1:
                x = torch.relu(self.downs[k](x))
        return tuple(codes)


class Decoder(nn.Module):
    """Five codes to ``out_channels`` raw channels on the full grid, the last convolution in FP32."""

    def __init__(self, architecture: Architecture, code_widths: tuple[int, ...], out_channels: int) -> None:
        super().__init__()
        widths = architecture.widths
        self.ups = nn.ModuleList(
            nn.ConvTranspose3d(code_widths[-1] if k == LEVELS - 2 else widths[k + 1], widths[k], 2, stride=2)
            for k in range(LEVELS - 1)
        )
        self.levels = nn.ModuleList(
            Level(widths[k] + code_widths[k], widths[k], CONVOLUTIONS_PER_LEVEL[k], architecture.norm)
            for k in range(LEVELS - 1)
        )
        self.output = nn.Conv3d(widths[0], out_channels, 1)

    def forward(self, codes: Codes, features: list[Tensor] | None = None) -> Tensor:
        """(N,out_channels,X,Y,Z), float32; what each level makes is put into ``features``, coarsest first."""
        x = codes[-1]
        for k in reversed(range(LEVELS - 1)):
            up = torch.relu(self.ups[k](x))
            x = self.levels[k](torch.cat([codes[k], up], dim=1)) + up
            if features is not None:
                features.append(x)
        with torch.autocast(x.device.type, enabled=False):
            output: Tensor = self.output(x.float())
        return output


class JointNet(nn.Module):
    """Registers a moving to a fixed image and segments both; see ``Architecture`` for the choices.

    ``JointNet(architecture)``, or its fields by name: ``JointNet(in_channels=1, merge="concatenate")``.
    """

    def __init__(self, architecture: Architecture | None = None, **choices: Any) -> None:
        super().__init__()
        self.architecture = dataclasses.replace(architecture or Architecture(), **choices)
        widths = self.architecture.widths
        self.encoder = Encoder(self.architecture)
        self.segmentation = (
            Decoder(self.architecture, widths, self.architecture.num_labels) if self.architecture.segmentation else None
        )
        # Heads that only training uses: they stand beside the decoder, which is exported without them.
        self.auxiliary = nn.ModuleList(
            nn.Conv3d(widths[k], self.architecture.num_labels, 1)
            for k in range(1, self.architecture.deep_supervision + 1)
        )
        self.register_load_state_dict_pre_hook(_settle_auxiliary)  # type: ignore[no-untyped-call]
        self.registration: Decoder | None = None
        if self.architecture.registration:
            factor = 2 if self.architecture.merge == "concatenate" else 1
            self.registration = Decoder(self.architecture, tuple(factor * w for w in widths), 3)
            # Start at the identity: the deformation grows out of nothing instead of out of noise.
            nn.init.normal_(self.registration.output.weight, std=1e-4)
            nn.init.zeros_(self.registration.output.bias)  # type: ignore[arg-type]

    def merge(self, moving: Codes, fixed: Codes) -> Codes:
        """Let two images' codes meet at every level, skips included."""
        if self.architecture.merge == "subtract":
            return tuple(m - f for m, f in zip(moving, fixed, strict=True))
        if self.architecture.merge == "add":
            return tuple(m + f for m, f in zip(moving, fixed, strict=True))
        return tuple(torch.cat([m, f], dim=1) for m, f in zip(moving, fixed, strict=True))

    def flow(self, moving: Codes, fixed: Codes) -> Tensor:
        """Raw registration channels (N,3,X,Y,Z), float32, before any sigmoid."""
        if self.registration is None:
            raise ValueError("this network has no registration decoder")
        flow: Tensor = self.registration(self.merge(moving, fixed))
        return flow

    def coordinates(self, flow: Tensor) -> Tensor:
        """Sampling coordinates (N,3,X,Y,Z), voxel indices, of a flow by this network's head."""
        return coordinates(flow, self.architecture.head, self.architecture.grid_origin)

    @torch.no_grad()
    def register(self, moving: Tensor, fixed: Tensor, passes: int = 1) -> Tensor:
        """Sampling coordinates (N,3,X,Y,Z) after so many passes, each over the image that those before have moved."""
        fixed_codes = self.encoder(fixed)
        coords = self.coordinates(self.flow(self.encoder(moving), fixed_codes))
        for _ in range(passes - 1):
            further = self.flow(self.encoder(warp(moving, coords)), fixed_codes)
            coords = compose(coords, self.coordinates(further))
        return coords

    def forward(self, moving: Tensor, fixed: Tensor, reverse: bool = False) -> JointOutput:
        """Both images (N,C,X,Y,Z), every side a multiple of 16; ``reverse`` registers them both ways."""
        out = JointOutput()
        # One batch of both images: half the kernel launches, the same numbers.
        images = torch.cat([moving, fixed])
        codes = self.encoder(images)
        n = moving.shape[0]
        if self.segmentation is not None:
            self._segment(out, codes, n)
        if self.registration is not None:
            self._register(out, images, codes, n, reverse)
        return out

    def _segment(self, out: JointOutput, codes: Codes, n: int) -> None:
        assert self.segmentation is not None
        features: list[Tensor] | None = [] if self.training and len(self.auxiliary) else None
        logits = self.segmentation(codes, features)
        out.moving_logits, out.fixed_logits = logits[:n], logits[n:]
        probabilities = torch.softmax(logits, dim=1)
        out.moving_probabilities, out.fixed_probabilities = probabilities[:n], probabilities[n:]
        if features is not None:
            # The finest level, 0, is the decoder's own.
            finest_first = features[::-1][1:]
            coarse = [head(x).float() for head, x in zip(self.auxiliary, finest_first, strict=False)]
            out.moving_auxiliary = tuple(x[:n] for x in coarse)
            out.fixed_auxiliary = tuple(x[n:] for x in coarse)

    def _register(self, out: JointOutput, images: Tensor, codes: Codes, n: int, reverse: bool) -> None:
        moving_codes, fixed_codes = tuple(c[:n] for c in codes), tuple(c[n:] for c in codes)
        directions = [out]
        if reverse:
            # The same codes, exchanged: subtracting them, the decoder is given the negative.
            exchanged = tuple(torch.cat([f, m]) for m, f in zip(moving_codes, fixed_codes, strict=True))
            flow = self.flow(codes, exchanged)
            out.reverse = JointOutput(
                out.fixed_probabilities,
                out.moving_probabilities,
                moving_logits=out.fixed_logits,
                fixed_logits=out.moving_logits,
            )
            directions.append(out.reverse)
        else:
            flow = self.flow(moving_codes, fixed_codes)
        coords = self.coordinates(flow)
        moved = warp(images[: coords.shape[0]], coords)
        for i, direction in enumerate(directions):
            part = slice(i * n, (i + 1) * n)
            direction.flow, direction.coords_vox, direction.moved = flow[part], coords[part], moved[part]
            if direction.moving_probabilities is not None:
                # For the mask alone; no gradient passes (paper, section 2.3).
                direction.moved_probabilities = warp(
                    direction.moving_probabilities.detach(), direction.coords_vox.detach()
                )
                direction.nontumor_mask = self._nontumor_mask(direction)

    def _nontumor_mask(self, out: JointOutput) -> Tensor:
        assert out.moving_probabilities is not None and out.fixed_probabilities is not None
        assert out.moved_probabilities is not None
        if self.architecture.mask == "warped":
            return out.moved_probabilities[:, :1] * out.fixed_probabilities[:, :1].detach()
        moving = out.moving_probabilities.argmax(dim=1, keepdim=True) == 0
        fixed = out.fixed_probabilities.argmax(dim=1, keepdim=True) == 0
        return (moving & fixed).float()


def _settle_auxiliary(net: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Weights with and without auxiliary heads fit a network with and without: heads stay as they are, or go."""
    assert isinstance(net, JointNet)
    own = {f"{prefix}auxiliary.{name}": value for name, value in net.auxiliary.state_dict().items()}
    for name in [name for name in state if name.startswith(f"{prefix}auxiliary.") and name not in own]:
        del state[name]
    for name, value in own.items():
        state.setdefault(name, value)
