"""How well two images of one head are registered: follow-ups of a tumour case, drawn with a known deformation.

    python benchmarks/followup.py examples/TCGA-DU-7294 --segmentation SEG [--seeds 1 2 3 4] [--refine 0 4]
        [--baseline greedy]

SEG is the case's tumour. A follow-up is the case seen through a rigid motion, a smooth random deformation and a
collapse of the surroundings towards the tumour, with fluid in place of the tumour's inside, and another bias, contrast,
scale and noise. The truth is known everywhere; distances to it are taken at points up to 15 mm from the tumour and
further away. The case moves, the follow-up is fixed; from T1 alone, from four contrasts, and from T1 with the follow-up
of T1ce taken for its T1: another acquisition of the same tissue, with noise, vessels and contrast of its own, where
the others flatter every method. Prints a Markdown table; the figures are median and 90th percentile in mm.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt
from scipy import ndimage
from scipy.spatial.transform import Rotation

from jrs import Pipeline
from jrs.evaluate.peers import register
from jrs.evaluate.transforms import SpatialTransform
from jrs.reading import read_volume
from jrs.runtime.cases import load_case
from jrs.runtime.transform import Transform
from jrs.volume import Volume

FLUID = {"t1": 0.2, "t1ce": 0.2, "t2": 0.95, "flair": 0.2}
"""Intensity of what fills the cavity, as a share of the image's brightest."""
SEEN = {
    "T1": {"t1": "t1"},
    "four contrasts": {name: name for name in FLUID},
    "T1 on T1ce": {"t1": "t1ce"},
}
"""What is registered: each modality of the case and the follow-up's that is taken for it."""
POINTS = 2000
Floats = npt.NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Strength:
    """Deviations of the deformations of long and short waves, the collapse, and what is left of the rim, all mm."""

    long: float
    short: float
    collapse: float
    rim: int


STRENGTHS = (
    Strength(0.3, 0.2, 0.8, 5),
    Strength(0.8, 0.3, 3.2, 2),
    Strength(1.8, 0.6, 4.8, 3),
    Strength(2.4, 1.2, 9.6, 1),
)


@dataclass(frozen=True)
class FollowUp:
    """Images as files, and points of the fixed (n,3) with where they were, RAS mm, near the tumour and far from it."""

    images: dict[str, Path]
    points: dict[str, tuple[Floats, Floats]]


def smooth(rng: np.random.Generator, shape: tuple[int, ...], deviation: float, control: float) -> Floats:
    """A random field (3,X,Y,Z) of splines whose control points lie ``control`` voxels apart."""
    parts = []
    for _ in range(3):
        nodes = rng.normal(size=[int(np.ceil(n / control)) + 3 for n in shape])
        zoom = [(n + 2 * control) / k for n, k in zip(shape, nodes.shape, strict=True)]
        a, b, c = shape
        parts.append(ndimage.zoom(nodes, zoom, order=3)[:a, :b, :c])
    field = np.stack(parts)
    scaled: Floats = deviation * field / field.std()
    return scaled


def source_coords(rng: np.random.Generator, tumor: npt.NDArray[np.bool_], strength: Strength) -> Floats:
    """Where in the case each voxel of the follow-up comes from, (3,X,Y,Z) voxels of 1 mm."""
    shape = tumor.shape
    grid = np.stack(np.meshgrid(*(np.arange(n, dtype=float) for n in shape), indexing="ij"))
    u = smooth(rng, shape, strength.long, 40) + smooth(rng, shape, strength.short, 20)
    outwards = grid - np.reshape(ndimage.center_of_mass(tumor), (3, 1, 1, 1))
    radius = np.linalg.norm(outwards, axis=0) + 1e-6
    u += strength.collapse * outwards / radius * (radius / 18) * np.exp(1 - radius / 18)
    turn = Rotation.from_euler("xyz", 6.0 * rng.normal(size=3), degrees=True).as_matrix()
    middle = np.reshape([(n - 1) / 2 for n in shape], (3, 1, 1, 1))
    shift = 5.0 * rng.normal(size=(3, 1, 1, 1))
    coords: Floats = np.einsum("ij,jxyz->ixyz", turn, grid + u - middle) + middle + shift
    return coords


def follow_up(case: dict[str, Volume], tumor: npt.NDArray[np.bool_], seed: int, folder: Path) -> FollowUp:
    """Draw one; its strength goes by its seed."""
    rng = np.random.default_rng(seed)
    strength = STRENGTHS[(seed - 1) % len(STRENGTHS)]
    first = next(iter(case.values()))
    coords = source_coords(rng, tumor, strength)

    def seen(data: Floats) -> Floats:
        values: Floats = ndimage.map_coordinates(data.astype(np.float32), coords, order=1)
        return values

    there, brain = seen(tumor) > 0.5, seen(first.data != 0) > 0.5
    cavity = ndimage.gaussian_filter(ndimage.binary_erosion(there, iterations=strength.rim).astype(np.float32), 1.0)
    folder.mkdir()
    files = {}
    for name, volume in case.items():
        bright = np.percentile(volume.data[volume.data != 0], 99)
        image = seen(volume.data) * (1 - cavity) + FLUID[name] * bright * cavity
        bias = np.exp(0.12 * ndimage.zoom(rng.normal(size=(4, 4, 4)), [n / 4 for n in image.shape], order=3))
        image = bright * rng.uniform(0.7, 1.4) * np.clip(image / bright, 0, None) ** rng.uniform(0.85, 1.2) * bias
        image = np.where(brain, image + 0.02 * bright * rng.normal(size=image.shape), 0.0)
        files[name] = folder / f"post_{name}.nii"
        nib.save(nib.Nifti1Image(image.astype(np.float32), first.geometry.affine), files[name])
    distance = ndimage.distance_transform_edt(~there)
    inside = ndimage.binary_erosion(brain, iterations=3)
    points = {}
    for where, chosen in (("near", (distance > 3) & (distance < 15)), ("far", distance >= 15)):
        voxels = np.argwhere(inside & chosen)
        voxels = voxels[rng.permutation(len(voxels))[:POINTS]]
        origins = coords[:, voxels[:, 0], voxels[:, 1], voxels[:, 2]].T
        points[where] = first.geometry.to_ras(voxels), first.geometry.to_ras(origins)
    return FollowUp(files, points)


def distances(transform: SpatialTransform, case: FollowUp) -> dict[str, Floats]:
    """Of each point's image to where it was, mm."""
    pairs = case.points.items()
    return {where: np.linalg.norm(transform.points(fixed) - moving, axis=1) for where, (fixed, moving) in pairs}


def registered(
    pipeline: Pipeline, case: dict[str, Volume], later: FollowUp, options: argparse.Namespace, folder: Path
) -> Iterator[tuple[str, dict[str, Floats], float]]:
    """Every method's distances and seconds (of jrs: those of its refinement)."""
    for which, names in SEEN.items():
        atlas = folder / f"atlas {which}"
        atlas.mkdir()
        for name, other in names.items():
            (atlas / later.images[name].name).symlink_to(later.images[other])
        files = {name: case[name].path for name in names}
        for iterations in options.refine:
            result = pipeline.infer(modalities=files, atlas=atlas, refine=iterations, inverse=False)
            seconds = result.timings_s.get("refinement", 0.0)
            if iterations == options.refine[0]:
                yield f"affine alone, {which}", distances(Transform(result.transform.affine, None), later), 0.0
            yield f"jrs --refine {iterations}, {which}", distances(result.transform, later), seconds
    for name in options.baseline:
        for which in ("T1", "T1 on T1ce"):
            found = register(name, case["t1"], read_volume(later.images[SEEN[which]["t1"]]))
            yield f"{name}, {which}", distances(found.transform, later), found.seconds


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", type=Path)
    parser.add_argument("--segmentation", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4])
    parser.add_argument("--refine", type=int, nargs="+", default=[0, 4])
    parser.add_argument("--baseline", choices=("ants", "greedy"), nargs="*", default=[])
    parser.add_argument("--bundle")
    options = parser.parse_args()
    images = load_case(options.case).images
    case = {name: images[name] for name in FLUID}
    tumor = read_volume(options.segmentation, labels=True).data > 0
    rows: dict[str, list[tuple[dict[str, Floats], float]]] = {}
    with tempfile.TemporaryDirectory() as name, Pipeline.open(options.bundle) as pipeline:
        for seed in options.seeds:
            folder = Path(name) / f"seed{seed}"
            later = follow_up(case, tumor, seed, folder)
            for method, found, seconds in registered(pipeline, case, later, options, folder):
                rows.setdefault(method, []).append((found, seconds))
    print("| method |" + "".join(f" {seed}: near, far |" for seed in options.seeds) + " seconds |")
    print("|---|" + "---|" * (len(options.seeds) + 1))
    for method, found in rows.items():
        cells = ""
        for errors, _ in found:
            parts = (f"{np.median(errors[w]):.2f} ({np.percentile(errors[w], 90):.1f})" for w in ("near", "far"))
            cells += f" {', '.join(parts)} |"
        print(f"| {method} |{cells} {statistics.median(seconds for _, seconds in found):.1f} |")


if __name__ == "__main__":
    main()
