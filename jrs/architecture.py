"""What a network is made of, without the network: shared by checkpoints, bundles and the exporter."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal, get_args

from jrs.errors import ConfigurationError

Merge = Literal["subtract", "concatenate", "add"]
Head = Literal["gradient", "potential", "displacement"]
Norm = Literal["none", "instance"]
Mask = Literal["warped", "unwarped"]

LEVELS = 5
CONVOLUTIONS_PER_LEVEL = (1, 2, 3, 3, 3)
STRIDE = 2 ** (LEVELS - 1)
"""Every side of the network's grid is a multiple of this many voxels."""


@dataclass(frozen=True)
class Architecture:
    """The choices that fix the shape and meaning of a JointNet.

    Attributes:
        in_channels: modalities of one image.
        num_labels: classes of the segmentation, background included; 0 builds no segmentation decoder.
        base_channels: features of the first level, doubling at each of the five (the paper).
        level_channels: features of each of the five levels where they do not double; empty where they do.
        registration: whether there is a registration decoder.
        merge: how the two images' codes meet: ``moving - fixed``, ``[moving, fixed]`` or ``moving + fixed``.
        head: what the registration decoder's three channels mean; see ``jrs.models.spatial``.
        norm: after each 3x3x3 convolution: nothing (the paper) or instance normalisation.
        grid_origin: coordinate of the first voxel of the identity; 0, or 1 for the authors' published weights,
            whose identity grid runs 1..N but is sampled from 0.
        mask: the non-tumour mask uses the warped background of the moving image (the paper) or the unwarped
            one, thresholded (the published code).
        deep_supervision: how many levels of the segmentation decoder below the finest have a head of their own
            in training; nothing of it is exported.
    """

    in_channels: int = 4
    num_labels: int = 4
    base_channels: int = 8
    registration: bool = True
    merge: Merge = "subtract"
    head: Head = "gradient"
    norm: Norm = "none"
    grid_origin: int = 0
    mask: Mask = "warped"
    deep_supervision: int = 0
    level_channels: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name, choices in (("merge", Merge), ("head", Head), ("norm", Norm), ("mask", Mask)):
            if getattr(self, name) not in get_args(choices):
                raise ConfigurationError(
                    f"{name} {getattr(self, name)!r} is unknown; choose one of {', '.join(get_args(choices))}"
                )
        if self.in_channels < 1 or self.base_channels < 1:
            raise ConfigurationError("in_channels and base_channels must be at least 1")
        if self.level_channels and (
            len(self.level_channels) != LEVELS
            or min(self.level_channels) < 1
            or self.level_channels[0] != self.base_channels
        ):
            raise ConfigurationError(
                f"level_channels {self.level_channels}: must be {LEVELS} numbers of which the first is base_channels "
                f"({self.base_channels}), or none"
            )
        if self.num_labels == 1 or self.num_labels < 0:
            raise ConfigurationError("num_labels counts the background: 0 (no segmentation) or at least 2")
        if not self.segmentation and not self.registration:
            raise ConfigurationError("a network needs num_labels > 0, registration, or both")
        if not 0 <= self.deep_supervision <= LEVELS - 2:
            raise ConfigurationError(f"deep_supervision must lie between 0 and {LEVELS - 2}")
        if self.deep_supervision and not self.segmentation:
            raise ConfigurationError("deep_supervision needs a segmentation decoder; set it to 0, or num_labels")

    @property
    def deployed(self) -> Architecture:
        """The same network without what only training uses."""
        return dataclasses.replace(self, deep_supervision=0)

    @property
    def segmentation(self) -> bool:
        """Whether there is a segmentation decoder."""
        return self.num_labels > 0

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of the five levels."""
        return self.level_channels or tuple(self.base_channels * 2**level for level in range(LEVELS))
