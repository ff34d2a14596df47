"""From images as they are on disk to what the network takes, the same in training and in deployment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

from jrs.errors import BadDataError, UsageError
from jrs.geometry import FloatArray, Geometry
from jrs.manifest import GridSpec, ModelSpec, Normalization
from jrs.parallel import together
from jrs.reading import read_volume
from jrs.resources import atlas_path
from jrs.runtime.affine import foreground_box, register_affine
from jrs.runtime.sampling import resample_affine
from jrs.volume import Volume, foreground_mask

Array = npt.NDArray[np.float32]

_CASE = "the case"


@dataclass(frozen=True)
class NetworkInput:
    """One image as the network takes it.

    ``tensor`` is (1,C,X,Y,Z) float32 on ``grid``, normalised, a missing channel all zero; ``present`` says which
    channels were there. ``scale`` is what the affine makes of a volume on the grid in the image's own space, |det A|.
    """

    tensor: Array
    present: tuple[bool, ...]
    grid: Geometry
    scale: float = 1.0

    @property
    def voxel_ml(self) -> float:
        """Of the patient, in a voxel of the grid."""
        return self.grid.voxel_volume_ml * self.scale


def place_grid(spec: GridSpec, fixed: Volume, threads: int | None = None) -> tuple[Geometry, str | None]:
    """The network's grid in the world of a fixed image, and one line if it does not lie where it should.

    On the atlas that is the network's frame, and on any image where there is none: along the world's axes, its middle
    on the middle of the brain. Elsewhere that grid taken along by the affine alignment with the atlas, so the network
    sees every fixed image in the pose and the size that it was trained on.
    """
    if not spec.frame:
        return _upright(spec, fixed), None
    atlas = read_volume(atlas_path(spec.frame))
    if fixed.geometry == atlas.geometry and np.array_equal(fixed.data, atlas.data):
        return _upright(spec, fixed), None
    try:
        found = register_affine(fixed, atlas, threads=threads)
    except BadDataError:
        found = None
    if found is None or found.warning is not None:
        return _upright(spec, fixed), (
            f"the fixed image does not align well with {spec.frame}, in whose space the network was trained: "
            "look at the moved image and the labels"
        )
    grid = _upright(spec, atlas)
    return Geometry(grid.shape, found.matrix @ grid.affine), None


def _upright(spec: GridSpec, image: Volume) -> Geometry:
    lower, upper = foreground_box(image)
    return Geometry.aligned(spec.shape, spec.spacing, (lower + upper) / 2.0, spec.orientation)


def network_input(
    images: Mapping[str, Volume],
    spec: ModelSpec,
    grid: Geometry,
    moving_from_fixed: FloatArray | None = None,
    threads: int | None = None,
    whose: str = _CASE,
) -> NetworkInput:
    """Resample each modality onto ``grid`` through the affine A (fixed to moving, RAS mm) and normalise it.

    Raises UsageError if a modality that the network needs is missing, or none that it knows is there.
    """
    present = tuple(channel in images for channel in spec.channels)
    if not any(present):
        raise UsageError(
            f"none of the modalities of {whose} ({', '.join(images)}) is known to this bundle; "
            f"it takes {', '.join(spec.channels)}"
        )
    for channel, there in zip(spec.channels, present, strict=True):
        if not there and channel not in spec.optional_channels:
            remedy = f"pass --{channel} FILE" if whose == _CASE else "give a folder that has it"
            raise UsageError(f"{whose} lacks modality {channel}, which this bundle needs; {remedy}")
    tensor = np.zeros((len(spec.channels), *grid.shape), dtype=np.float32)

    def fill(index: int, channel: str) -> None:
        volume = images[channel].canonical
        sampled = resample_affine(volume.data[None], volume.geometry, grid, moving_from_fixed, threads=threads)[0]
        try:
            tensor[index] = normalize(sampled, spec.normalization)
        except BadDataError as error:
            raise BadDataError(f"{volume.path or channel}: {error}") from error

    together([partial(fill, i, channel) for i, channel in enumerate(spec.channels) if present[i]], threads)
    scale = 1.0 if moving_from_fixed is None else abs(float(np.linalg.det(moving_from_fixed[:3, :3])))
    return NetworkInput(tensor[None], present, grid, scale)


def normalize(data: Array, method: Normalization) -> Array:
    """Mean 0 and standard deviation 1: over the foreground, zero outside, or over the whole volume."""
    mask = foreground_mask(data) if method == "zscore-foreground" else np.ones(data.shape, dtype=bool)
    values = data[mask]
    if values.size < 100 or values.min() == values.max():
        raise BadDataError("nothing but background lies in the network's grid; check the alignment (--affine)")
    mean, deviation = float(values.mean(dtype=np.float64)), float(values.std(dtype=np.float64))
    return np.where(mask, (data - np.float32(mean)) / np.float32(deviation), np.float32(0.0)).astype(np.float32)
