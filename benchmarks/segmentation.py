"""What the labels are worth on drawn images: Dice of tumours, and what is found in healthy brains, by modalities.

    python benchmarks/segmentation.py --labels HELD_OUT_LABEL_MAPS [--images N] [--seed N] [--bundle DIR] [--cache DIR]

Images are drawn on the network's grid by the training's synthesis with other seeds, tumours in half of them, and
segmented from several subsets of their modalities: by one look at the image, with the mirrored one (``mirroring``),
and without what is not to be believed (``certainty`` and the smallest volumes), which is what ``jrs infer`` does. The
truth is the whole tumour, whether the modalities at hand show it or not; enhancement is scored where T1ce is among
them. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from jrs.bundle import Bundle
from jrs.geometry import Geometry
from jrs.reading import read_volume
from jrs.resources import atlas_path
from jrs.runtime.labels import REGIONS
from jrs.runtime.network import Array, Network
from jrs.runtime.preprocess import NetworkInput, place_grid
from jrs.runtime.tumors import drop_unbelievable
from jrs.train.configfile import load_config
from jrs.train.labelmaps import find_label_maps, prepare_label_maps
from jrs.train.synth import SyntheticPairs

SUBSETS = ("t1 t1ce t2 flair", "t1ce flair", "t1 t2 flair", "t1 t1ce", "flair", "t2", "t1ce", "t1")
VARIANTS = ("one look", "mirrored as well", "and believed")
SETTINGS = {"moving_tumor": 0.5, "with_skull": 0, "single_modality_moving": 0, "two_modalities": 0, "drop_channel": 0}
LEAST_VOXELS = 30
"""Of a region of the truth that Dice is taken of."""


@dataclass
class Scores:
    """Of one subset and variant: Dice of each region in images that have it, ml of tumour in those that have none."""

    dice: dict[str, list[float]]
    healthy_ml: list[float]


def looks(network: Network, image: NetworkInput) -> list[Array]:
    """Probabilities by each of ``VARIANTS``."""
    bundle, codes = network.bundle, network.encode(image.tensor)
    model = bundle.manifest.model
    found = []
    for mirroring in (False, True):
        network.bundle = replace(bundle, manifest=replace(bundle.manifest, model=replace(model, mirroring=mirroring)))
        found.append(network.segment(image.tensor, codes))
    network.bundle = bundle
    believed = found[-1].copy()
    drop_unbelievable(believed, image, model)
    return [*found, believed]


def score(scores: Scores, labels: Array, truth: Array, voxel_ml: float) -> None:
    """Add what one image gives."""
    if not truth.any():
        scores.healthy_ml.append(float(np.count_nonzero(labels)) * voxel_ml)
        return
    for region, classes in REGIONS.items():
        ours, theirs = np.isin(labels, classes), np.isin(truth, classes)
        if np.count_nonzero(theirs) >= LEAST_VOXELS:
            both = np.count_nonzero(ours) + np.count_nonzero(theirs)
            scores.dice[region].append(2.0 * np.count_nonzero(ours & theirs) / both)


def main() -> None:
    """Draw, segment, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--labels", type=Path, required=True)
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--seed", type=int, default=9000)
    parser.add_argument("--bundle")
    parser.add_argument("--cache", type=Path, default=Path("label-maps"), help="prepared label maps are kept here")
    options = parser.parse_args()
    bundle = Bundle.open(options.bundle)
    model = bundle.manifest.model
    atlas = read_volume(atlas_path("sri24"))
    synthesis = replace(load_config("default-rigid").synthesis, **SETTINGS)
    files = find_label_maps(options.labels)
    maps = prepare_label_maps(files, model.grid, atlas, options.cache, oversampling=synthesis.oversampling)
    source = SyntheticPairs(maps, model, synthesis, options.seed)
    grid: Geometry = place_grid(model.grid, atlas)[0]
    table = defaultdict(lambda: Scores(defaultdict(list), []))
    with Network(bundle) as network:
        for number in range(options.images):
            drawn = source.draw(number % len(source), number, fixed=False)
            truth = drawn.tumor[0].numpy()
            for subset in SUBSETS:
                present = tuple(channel in subset.split() for channel in model.channels)
                tensor = drawn.image.numpy() * np.array(present, np.float32).reshape(1, -1, 1, 1, 1)
                found = looks(network, NetworkInput(tensor, present, grid))
                for variant, probabilities in zip(VARIANTS, found, strict=True):
                    score(table[subset, variant], probabilities.argmax(axis=0), truth, grid.voxel_volume_ml)
    print("| modalities | | WT | TC | ET | healthy brains with more than 1 ml | median, 90th percentile there, ml |")
    print("|---|---|---|---|---|---|---|")
    for (subset, variant), scores in table.items():
        shown = [region for region in REGIONS if region != "ET" or "t1ce" in subset]
        dice = " | ".join(f"{np.mean(scores.dice[region]):.3f}" if region in shown else "" for region in REGIONS)
        more = sum(ml > 1.0 for ml in scores.healthy_ml)
        middle, high = np.percentile(scores.healthy_ml, (50, 90))
        counts = f"{more} of {len(scores.healthy_ml)} | {middle:.1f}, {high:.1f}"
        print(f"| {subset.replace(' ', ', ') if variant == VARIANTS[0] else ''} | {variant} | {dice} | {counts} |")


if __name__ == "__main__":
    main()
