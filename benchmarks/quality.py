"""What a bundle is worth: structures on held-out label maps, tissues of a real scan, the tumour of a real case.

    python benchmarks/quality.py --labels HELD_OUT_LABEL_MAPS [--tcga DIR] [--bert DIR --tissues FILE] [--bundle DIR]

Everything goes through ``Pipeline`` as a user's case does. Images are drawn here from the label maps at 1 mm (T1
alone, by tissue means, blur and noise), not by the training's synthesis. Labels are warped by nearest neighbour on
the fixed map's own grid. ``affine`` is the same run without the network's displacement.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import nibabel as nib
import numpy as np
import SimpleITK as sitk

from jrs import Pipeline
from jrs.reading import read_volume
from jrs.runtime.sampling import sample_nearest
from jrs.runtime.transform import Transform, to_voxel_coords
from jrs.structures import STRUCTURES, TISSUES, compact_tables
from jrs.volume import Volume

T1 = dict(zip(TISSUES, (0.0, 1.0, 0.70, 0.80, 0.28, 0.68, 0.93), strict=True))


def draw(labels: Volume, path: Path, seed: int) -> None:
    """A T1-like image of a label map, written as NIfTI."""
    generator = np.random.default_rng(seed)
    means = np.array([T1[name] for name in TISSUES]) * (1 + 0.05 * generator.standard_normal(len(TISSUES)))
    tissue = compact_tables()[1][labels.data]
    image = sitk.GetImageFromArray(means[tissue].astype(np.float32))
    image = sitk.GetArrayFromImage(sitk.SmoothingRecursiveGaussian(image, 0.7))
    image += (0.03 * generator.standard_normal(image.shape)).astype(np.float32)
    nib.save(nib.Nifti1Image(np.where(tissue > 0, 400 * image, 0).astype(np.float32), labels.geometry.affine), path)


def warped_labels(labels: Volume, transform: Transform, fixed: Volume) -> np.ndarray:
    """``labels`` on the grid of ``fixed``, nearest neighbour."""
    out = np.zeros(fixed.geometry.shape, dtype=labels.data.dtype)
    for planes, points, _ in transform.forward(fixed.geometry):
        out[planes] = sample_nearest(labels.data, to_voxel_coords(points, labels.geometry))
    return out


def dice(a: np.ndarray, b: np.ndarray, values: list[int]) -> list[float]:
    """Dice of each label that is in both."""
    scores = []
    for value in values:
        x, y = a == value, b == value
        if x.any() and y.any():
            scores.append(float(2 * (x & y).sum() / (x.sum() + y.sum())))
    return scores


def structures(pipeline: Pipeline, folder: Path) -> dict[str, float]:
    """Mean Dice of the 30 structures over each map registered to the next."""
    files = sorted(folder.glob("*.nii.gz"))
    values = list(STRUCTURES.values())
    affine, moved, folding = [], [], []
    with tempfile.TemporaryDirectory() as name:
        maps = [read_volume(f, labels=True) for f in files]
        for index, labels in enumerate(maps):
            draw(labels, Path(name) / f"map{index}_t1.nii.gz", 100 + index)
        for index, labels in enumerate(maps):
            other = (index + 1) % len(maps)
            result = pipeline.infer(
                Path(name) / f"map{index}_t1.nii.gz", Path(name) / f"map{other}_t1.nii.gz", inverse=False
            )
            fixed = maps[other]
            alone = Transform(result.transform.affine, None)
            affine.append(np.mean(dice(warped_labels(labels, alone, fixed), fixed.data, values)))
            moved.append(np.mean(dice(warped_labels(labels, result.transform, fixed), fixed.data, values)))
            folding.append(result.folding_percent)
    return {
        "pairs": len(maps),
        "dice_affine": float(np.mean(affine)),
        "dice_moved": float(np.mean(moved)),
        "dice_gain_smallest": float(np.min(np.array(moved) - np.array(affine))),
        "folding_percent": float(np.mean(folding)),
    }


def tissues(pipeline: Pipeline, folder: Path, truth: Path) -> dict[str, float]:
    """Dice of CSF, grey and white matter of a real scan (with aseg labels) against an atlas's tissues."""
    result = pipeline.infer(folder / "bert_t1.nii.gz", "sri24", inverse=False)
    labels, fixed = read_volume(folder / "bert_aseg.nii.gz", labels=True), read_volume(truth, labels=True)
    to_class = np.array([0, 3, 2, 2, 1, 2, 3])  # tissue -> 1 CSF, 2 grey, 3 white
    classes = Volume(to_class[compact_tables()[1][labels.data]].astype(np.int32), labels.geometry)
    scores = {}
    for name, transform in (
        ("affine", Transform(result.transform.affine, None)),
        ("moved", result.transform),
    ):
        # The aseg has no CSF around the brain, so CSF is left out.
        grey, white = dice(warped_labels(classes, transform, fixed), fixed.data, [2, 3])
        scores |= {f"grey_{name}": grey, f"white_{name}": white}
    return {**scores, "folding_percent": result.folding_percent}


def tumor(pipeline: Pipeline, folder: Path) -> dict[str, object]:
    """A real case: Dice against the fused pseudo-truth, volumes before and after, similarity outside the tumour."""
    result = pipeline.infer(folder, "sri24")
    truth = read_volume(next(folder.glob("*seg-fused*")), labels=True).data
    ours = result.labels_native
    assert ours is not None
    scores = {}
    for region, members in {"WT": (1, 2, 4), "TC": (1, 4), "ET": (4,)}.items():
        a, b = np.isin(ours, members), np.isin(truth, members)
        scores[region] = float(2 * (a & b).sum() / (a.sum() + b.sum())) if b.any() else None
    report = result.report()
    keys = ("volumes_ml", "volume_ratio", "jacobian", "similarity", "timings_s")
    return {"dice": scores, **{key: report[key] for key in keys}}


def main() -> None:
    """Print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--labels", type=Path)
    parser.add_argument("--tcga", type=Path)
    parser.add_argument("--bert", type=Path)
    parser.add_argument("--tissues", type=Path)
    parser.add_argument("--bundle")
    parser.add_argument("--backend", default="auto")
    options = parser.parse_args()
    found: dict[str, object] = {}
    with Pipeline.open(options.bundle, options.backend) as pipeline:
        if options.labels:
            found["structures"] = structures(pipeline, options.labels)
        if options.bert and options.tissues:
            found["tissues"] = tissues(pipeline, options.bert, options.tissues)
        if options.tcga:
            found["tumor"] = tumor(pipeline, options.tcga)
    json.dump(found, sys.stdout, indent=2)
    print()


if __name__ == "__main__":
    main()
