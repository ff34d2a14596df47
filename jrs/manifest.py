"""What a trained network expects and means: shared by checkpoints and bundles, without PyTorch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from jrs.architecture import STRIDE, Architecture
from jrs.errors import ConfigurationError
from jrs.resources import ATLASES

MODALITIES = ("t1", "t1ce", "t2", "flair")
"""The modalities that jrs knows, in its own channel order."""

MOST_PASSES = 4

Normalization = Literal["zscore-foreground", "zscore-volume"]


@dataclass(frozen=True)
class GridSpec:
    """The network's own grid and where it lies on a fixed image.

    Attributes:
        shape: in voxels.
        spacing: in mm.
        orientation: anatomical directions of the array axes.
        frame: the shipped atlas in whose space the network was trained: the grid lies on that atlas along the
            world's axes, and on any other fixed image where the affine alignment with the atlas takes it. Empty: along
            the world's axes on any image's brain.
    """

    shape: tuple[int, int, int] = (96, 112, 96)
    spacing: tuple[float, float, float] = (2.0, 2.0, 2.0)
    orientation: str = "RAS"
    frame: str = ""

    def __post_init__(self) -> None:
        if any(n <= 0 or n % STRIDE for n in self.shape):
            raise ConfigurationError(f"grid shape {self.shape}: every side must be a positive multiple of {STRIDE}")
        if any(not 0.1 <= s <= 20 for s in self.spacing):
            raise ConfigurationError(f"grid spacing {self.spacing}: must lie between 0.1 and 20 mm")
        if sorted(self.orientation.translate(str.maketrans("LPI", "RAS"))) != sorted("RAS"):
            raise ConfigurationError(f"grid orientation {self.orientation!r}: must be like RAS or LPS")
        if self.frame and self.frame not in ATLASES:
            raise ConfigurationError(f"grid frame {self.frame!r}: must be empty or one of {', '.join(ATLASES)}")

    def axis_along(self, directions: str) -> int:
        """The array axis that runs along two opposite anatomical directions, ``LR``, ``AP`` or ``IS``."""
        return next(axis for axis, letter in enumerate(self.orientation) if letter in directions)


@dataclass(frozen=True)
class ModelSpec:
    """Everything about a network's inputs and outputs that its weights do not say.

    Attributes:
        architecture: the network.
        channels: modality of each input channel, in order.
        optional_channels: those that may be missing; a missing channel is all zero.
        grid: the grid it was trained on.
        normalization: ``zscore-foreground``: mean 0 and deviation 1 over the image's foreground, 0 outside;
            ``zscore-volume``: over the whole grid, background included (the authors' published weights).
        labels: class names of the segmentation, background first; empty without one.
        label_values: the number each class is written as (BraTS to 2022: 4 for enhancing tumour).
        passes: how often the network registers a pair: from the second time on the moving image is encoded as the
            passes before have moved it, and the displacements are composed (recursive cascades: Zhao et al. 2019, doi
            10.1109/ICCV.2019.01070, here with one network's weights throughout).
        mirroring: whether an image is segmented with left and right exchanged as well, and the probabilities are the
            mean of both (as nnU-Net does along every axis: Isensee et al. 2021, doi 10.1038/s41592-020-01008-z).
        certainty: the mean probability of being tumour that a connected region has to have to be labelled as one.
    """

    architecture: Architecture = field(default_factory=Architecture)
    channels: tuple[str, ...] = MODALITIES
    optional_channels: tuple[str, ...] = MODALITIES
    grid: GridSpec = field(default_factory=GridSpec)
    normalization: Normalization = "zscore-foreground"
    labels: tuple[str, ...] = ("background", "necrotic_or_nonenhancing_core", "edema", "enhancing_tumor")
    label_values: tuple[int, ...] = (0, 1, 2, 4)
    passes: int = 1
    mirroring: bool = False
    certainty: float = 0.0

    def __post_init__(self) -> None:
        if len(self.channels) != self.architecture.in_channels:
            raise ConfigurationError(
                f"{len(self.channels)} channel names for a network of {self.architecture.in_channels} channels"
            )
        if self.architecture.norm == "instance" and all(n == STRIDE for n in self.grid.shape):
            raise ConfigurationError(
                f"grid shape {self.grid.shape}: instance normalisation needs more than one voxel at the coarsest level"
            )
        if len(set(self.channels)) != len(self.channels):
            raise ConfigurationError(f"channel names {', '.join(self.channels)} repeat")
        if not set(self.optional_channels) <= set(self.channels):
            raise ConfigurationError("optional_channels names a channel that is not in channels")
        if not 1 <= self.passes <= MOST_PASSES:
            raise ConfigurationError(f"passes must lie between 1 and {MOST_PASSES}, not {self.passes}")
        if not 0.0 <= self.certainty < 1.0:
            raise ConfigurationError(f"certainty must lie from 0 to below 1, not {self.certainty}")
        if len(self.labels) != self.architecture.num_labels or len(self.label_values) != len(self.labels):
            raise ConfigurationError(
                f"{len(self.labels)} labels and {len(self.label_values)} values for a network of "
                f"{self.architecture.num_labels} classes"
            )
