"""What a bundle is worth: structures on held-out label maps, tissues of a real scan, the tumour of a real case.

    python benchmarks/quality.py --labels HELD_OUT_LABEL_MAPS [--tcga DIR] [--bert DIR --tissues FILE] [--bundle DIR]

Everything goes through ``Pipeline`` as a user's case does. Images are drawn here from the label maps at 1 mm (by
tissue means, blur and noise; T1 alone, and four contrasts), not by the training's synthesis. Labels are warped by
nearest neighbour on the fixed image's own grid. ``affine`` is the same run without the network's displacement.
``--quick`` prints the few numbers that choose between checkpoints.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import nibabel as nib
import numpy as np
import SimpleITK as sitk

from jrs import Pipeline, Result
from jrs.evaluate.overlap import dice, label_dice
from jrs.evaluate.transforms import warp_labels
from jrs.fields import DisplacementField
from jrs.geometry import Geometry
from jrs.itk import save_affine
from jrs.reading import read_volume
from jrs.runtime.transform import Transform
from jrs.structures import STRUCTURES, TISSUES, compact_tables
from jrs.volume import Volume

# Mean intensities in the order of TISSUES: background, white matter, cortex, deep grey, CSF, cerebellar cortex, stem.
CONTRASTS = {
    "t1": (0.0, 1.0, 0.70, 0.80, 0.28, 0.68, 0.93),
    "t1ce": (0.0, 1.0, 0.75, 0.84, 0.32, 0.74, 0.95),
    "t2": (0.0, 0.45, 0.63, 0.52, 1.0, 0.60, 0.47),
    "flair": (0.0, 0.62, 0.78, 0.70, 0.16, 0.74, 0.64),
}
REGIONS = {"WT": (1, 2, 4), "TC": (1, 4), "ET": (4,)}
GREY_WHITE = {"grey": 2, "white": 3}
INPUTS = {"four": ("t1", "t1ce", "t2", "flair"), "flair+t1ce": ("t1ce", "flair")}


MARGIN = 16
"""Voxels of background left around a drawn brain."""


def cropped(labels: Volume) -> tuple[Volume, tuple[slice, ...]]:
    """The part of a label map that holds the brain, and which part it is."""
    brain = compact_tables()[1][labels.data] > 0
    ends = [np.flatnonzero(brain.any(axis=tuple({0, 1, 2} - {axis})))[[0, -1]] for axis in range(3)]
    start = [max(0, int(low) - MARGIN) for low, _ in ends]
    box = tuple(slice(low, int(high) + MARGIN) for low, (_, high) in zip(start, ends, strict=True))
    affine = labels.geometry.affine.copy()
    affine[:3, 3] = labels.geometry.to_ras(start)
    data = np.ascontiguousarray(labels.data[box])
    return Volume(data, Geometry(data.shape, affine), labels.path), box


def draw(labels: Volume, folder: Path, seed: int) -> Volume:
    """Images of a label map, one a contrast, written as NIfTI into a folder; the label map on their grid."""
    folder.mkdir(parents=True)
    small, box = cropped(labels)
    tissue = compact_tables()[1][small.data]
    for number, (contrast, typical) in enumerate(CONTRASTS.items()):
        generator = np.random.default_rng(seed if number == 0 else [seed, number])
        means = np.array(typical) * (1 + 0.05 * generator.standard_normal(len(TISSUES)))
        image = sitk.GetImageFromArray(means[tissue].astype(np.float32))
        image = sitk.GetArrayFromImage(sitk.SmoothingRecursiveGaussian(image, 0.7))
        # The noise of the whole grid, so that a voxel's value does not depend on the crop.
        image += (0.03 * generator.standard_normal(labels.data.shape)).astype(np.float32)[box]
        data = np.where(tissue > 0, 400 * image, 0).astype(np.float32)
        nib.save(nib.Nifti1Image(data, small.geometry.affine), folder / f"{folder.name}_{contrast}.nii")
    return small


def affine_field(result: Result) -> DisplacementField:
    """The same run without the network's displacement, dense on the fixed image's grid."""
    return Transform(result.transform.affine, None).dense(result.fixed.geometry)


@dataclass
class Maps:
    """Scores of registered label maps, one entry a pair."""

    affine: list[float] = field(default_factory=list)
    moved: list[float] = field(default_factory=list)
    folding: list[float] = field(default_factory=list)
    tumor_ml: list[float] = field(default_factory=list)

    def add(self, result: Result, labels: Volume, fixed: Volume) -> None:
        """Score one pair."""
        for dense, into in ((affine_field(result), self.affine), (result.field, self.moved)):
            found = label_dice(warp_labels(labels, dense), fixed.data, STRUCTURES)
            into.append(float(np.nanmean(list(found.values()))))
        self.folding.append(result.folding_percent)
        if result.volumes_ml is not None:
            self.tumor_ml.append(result.volumes_ml["native"]["WT"])

    def summary(self) -> dict[str, object]:
        """Means over the pairs."""
        return {
            "pairs": len(self.moved),
            "dice_affine": round(float(np.mean(self.affine)), 4),
            "dice": round(float(np.mean(self.moved)), 4),
            "gain_smallest": round(float(np.min(np.array(self.moved) - np.array(self.affine))), 4),
            "folding_percent": round(float(np.mean(self.folding)), 3),
            "healthy_tumor_ml": [round(value, 2) for value in self.tumor_ml],
        }


def structures(pipeline: Pipeline, files: Sequence[Path]) -> dict[str, object]:
    """Mean Dice of the 30 structures over each map registered to the next: from T1 alone, from four contrasts."""
    scores = {"maps_t1": Maps(), "maps_four": Maps()}
    with tempfile.TemporaryDirectory() as name:
        folders = [Path(name) / f"map{index}" for index in range(len(files))]
        maps = [
            draw(read_volume(file, labels=True), folder, 100 + index)
            for index, (file, folder) in enumerate(zip(files, folders, strict=True))
        ]
        for index, labels in enumerate(maps):
            other = (index + 1) % len(maps)
            alone = [folders[i] / f"map{i}_t1.nii" for i in (index, other)]
            result = pipeline.infer(*alone, inverse=False)
            scores["maps_t1"].add(result, labels, maps[other])
            # The affine is found on T1 in either case: the same one.
            save_affine(Path(name) / "affine.txt", result.transform.affine)
            four = pipeline.infer(folders[index], folders[other], inverse=False, affine=str(Path(name) / "affine.txt"))
            scores["maps_four"].add(four, labels, maps[other])
    return {key: value.summary() for key, value in scores.items()}


def tissues(pipeline: Pipeline, folder: Path, truth: Path) -> dict[str, object]:
    """Dice of grey and white matter of a real scan (with aseg labels) against an atlas's tissues."""
    result = pipeline.infer(folder / "bert_t1.nii.gz", "sri24", inverse=False)
    labels, fixed = read_volume(folder / "bert_aseg.nii.gz", labels=True), read_volume(truth, labels=True)
    to_class = np.array([0, 3, 2, 2, 1, 2, 3])  # tissue -> 1 CSF, 2 grey, 3 white
    classes = Volume(to_class[compact_tables()[1][labels.data]].astype(np.int32), labels.geometry)
    scores: dict[str, object] = {}
    for name, dense in (("_affine", affine_field(result)), ("", result.field)):
        # The aseg has no CSF around the brain, so CSF is left out.
        found = label_dice(warp_labels(classes, dense), fixed.data, GREY_WHITE)
        scores |= {f"{tissue}{name}": round(value, 4) for tissue, value in found.items()}
    scores["folding_percent"] = round(result.folding_percent, 3)
    if result.volumes_ml is not None:
        scores["healthy_tumor_ml"] = round(result.volumes_ml["native"]["WT"], 2)
    return scores


def tumor(pipeline: Pipeline, folder: Path, modalities: Sequence[str]) -> dict[str, object]:
    """A real case: Dice against the fused pseudo-truth, its volume before and after, similarity outside it."""
    files = {name: next(folder.glob(f"*_{name}.nii.gz")) for name in modalities}
    result = pipeline.infer(atlas="sri24", modalities=files, inverse=False)
    truth = read_volume(next(folder.glob("*seg-fused*")), labels=True)
    ours = result.labels_native
    scores: dict[str, object] = {}
    if ours is not None and result.volumes_ml is not None:
        for region, members in REGIONS.items():
            scores[region] = round(dice(np.isin(ours, members), np.isin(truth.data, members)), 4)
        scores["WT_ml"] = round(result.volumes_ml["native"]["WT"], 2)
    before = np.count_nonzero(truth.data) * truth.geometry.voxel_volume_ml
    ml = result.fixed.geometry.voxel_volume_ml
    after, alone = (
        np.count_nonzero(warp_labels(truth, dense)) * ml for dense in (result.field, affine_field(result))
    )
    scores |= {
        "truth_ml": round(before, 2),
        "truth_moved_ml": round(after, 2),
        "volume_to_affine": round(after / alone, 4),
        "folding_percent": round(result.folding_percent, 3),
        "similarity": result.similarity and {k: result.similarity[k] for k in ("modality", "before", "after")},
    }
    return scores


def main() -> None:
    """Print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--labels", type=Path)
    parser.add_argument("--tcga", type=Path)
    parser.add_argument("--bert", type=Path)
    parser.add_argument("--tissues", type=Path)
    parser.add_argument("--bundle")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--quick", action="store_true", help="one compact line")
    options = parser.parse_args()
    found: dict[str, object] = {"bundle": str(options.bundle or "default")}
    start = time.perf_counter()
    with Pipeline.open(options.bundle, options.backend, threads=options.threads) as pipeline:
        if options.labels:
            found |= structures(pipeline, sorted(options.labels.glob("*.nii.gz")))
        if options.bert and options.tissues:
            found["bert"] = tissues(pipeline, options.bert, options.tissues)
        if options.tcga:
            found["tcga"] = {name: tumor(pipeline, options.tcga, chosen) for name, chosen in INPUTS.items()}
    found["seconds"] = round(time.perf_counter() - start, 1)
    json.dump(found, sys.stdout, indent=None if options.quick else 2)
    print()


if __name__ == "__main__":
    main()
