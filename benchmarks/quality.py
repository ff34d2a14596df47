"""What a bundle is worth: structures on held-out label maps, tissues of a real scan, the tumour of a real case.

    python benchmarks/quality.py --labels HELD_OUT_LABEL_MAPS --tcga DIR --bert DIR --tissues FILE [--bundle DIR]
    python benchmarks/quality.py --quick ...

Everything goes through ``jrs.evaluate``, and so through ``Pipeline`` as a user's case does: label maps each to the
next from T1 alone and from four contrasts, bert and the tumour case to SRI24. Images are drawn here from the label
maps at 1 mm (tissue means, blur, noise), not by the training's synthesis. Always beside the affine alone; without
``--quick`` also beside ANTs SyN and greedy, with and without the tumour masked. ``--quick`` prints one line of JSON
with the numbers that choose between checkpoints; else JSON goes to stdout, and with ``--markdown FILE`` tables, too.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import SimpleITK as sitk

from jrs.evaluate.compare import Row, compare, side_by_side, summarize
from jrs.evaluate.methods import BASELINES, Evaluator, Inference, check_baselines
from jrs.evaluate.overlap import dice, label_dice
from jrs.evaluate.pairs import Pair, paired
from jrs.evaluate.scores import structure_scores
from jrs.evaluate.subjects import atlas_case
from jrs.evaluate.tables import aligned, grid, plain
from jrs.evaluate.transforms import warp_labels
from jrs.geometry import Geometry
from jrs.itk import save_affine
from jrs.reading import read_volume
from jrs.runtime.labels import REGIONS
from jrs.runtime.pipeline import Pipeline
from jrs.structures import TISSUES, compact_tables
from jrs.train.datasets import ImageFile, TrainingCase
from jrs.volume import Volume

# Mean intensities in the order of TISSUES: background, white matter, cortex, deep grey, CSF, cerebellar cortex, stem.
CONTRASTS = {
    "t1": (0.0, 1.0, 0.70, 0.80, 0.28, 0.68, 0.93),
    "t1ce": (0.0, 1.0, 0.75, 0.84, 0.32, 0.74, 0.95),
    "t2": (0.0, 0.45, 0.63, 0.52, 1.0, 0.60, 0.47),
    "flair": (0.0, 0.62, 0.78, 0.70, 0.16, 0.74, 0.64),
}
ALL = tuple(CONTRASTS)
INPUTS = {"four": ALL, "flair+t1ce": ("t1ce", "flair"), **{name: (name,) for name in ALL}}
PEERS = tuple(name for name in BASELINES if name not in ("identity", "affine"))
GREY_WHITE = {"grey": 2, "white": 3}
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


def draw(file: Path, folder: Path, seed: int) -> TrainingCase:
    """Images of a label map, one a contrast, and the part of the map that holds the brain, written into a folder."""
    labels = read_volume(file, labels=True)
    folder.mkdir(parents=True)
    small, box = cropped(labels)
    tissue = compact_tables()[1][small.data]
    images = {}
    for number, (contrast, typical) in enumerate(CONTRASTS.items()):
        generator = np.random.default_rng(seed if number == 0 else [seed, number])
        means = np.array(typical) * (1 + 0.05 * generator.standard_normal(len(TISSUES)))
        image = sitk.GetImageFromArray(means[tissue].astype(np.float32))
        image = sitk.GetArrayFromImage(sitk.SmoothingRecursiveGaussian(image, 0.7))
        # The noise of the whole grid, so that a voxel's value does not depend on the crop.
        image += (0.03 * generator.standard_normal(labels.data.shape)).astype(np.float32)[box]
        data = np.where(tissue > 0, 400 * image, 0).astype(np.float32)
        images[contrast] = ImageFile(folder / f"{folder.name}_{contrast}.nii")
        nib.save(nib.Nifti1Image(data, small.geometry.affine), images[contrast].path)
    structures = folder / f"{folder.name}_aseg.nii"
    nib.save(nib.Nifti1Image(small.data.astype(np.int16), small.geometry.affine), structures)
    return TrainingCase(folder.name, images, structures=ImageFile(structures))


def only(case: TrainingCase, modalities: Sequence[str], name: str = "") -> TrainingCase:
    """A case with some of its images."""
    chosen = {modality: case.images[modality] for modality in modalities}
    return TrainingCase(name or case.name, chosen, case.segmentation, structures=case.structures)


def map_pairs(files: Sequence[Path], work: Path) -> dict[str, list[Pair]]:
    """Each drawn map to the next, from T1 alone and from four contrasts."""
    cases = [draw(file, work / f"map{index}", 100 + index) for index, file in enumerate(files)]
    return {"maps_t1": paired([only(case, ("t1",)) for case in cases], "ring"), "maps_four": paired(cases, "ring")}


def tumor_case(folder: Path) -> TrainingCase:
    """The case of four modalities with its pseudo-truth."""
    images = {name: ImageFile(next(folder.glob(f"*_{name}.nii.gz"))) for name in ALL}
    return TrainingCase("tcga", images, ImageFile(next(folder.glob("*seg-fused*"))))


def tissue_scores(found: Inference, evaluator: Evaluator, labels_file: Path, tissues: Path) -> Iterator[Row]:
    """Dice of grey and white matter of a scan with FreeSurfer's labels against an atlas's tissues."""
    labels, fixed = read_volume(labels_file, labels=True), read_volume(tissues, labels=True)
    to_class = np.array([0, 3, 2, 2, 1, 2, 3])  # tissue -> 1 CSF, 2 grey, 3 white
    classes = Volume(to_class[compact_tables()[1][labels.data]].astype(np.int32), labels.geometry)
    for method, transform, _ in evaluator.transforms(found):
        # The aseg has no CSF around the brain, so CSF is left out.
        scores = label_dice(warp_labels(classes, transform.dense(fixed.geometry)), fixed.data, GREY_WHITE)
        for tissue, value in scores.items():
            yield Row("bert", "sri24", method, "tissue_dice", tissue, value)


def healthy(found: Inference) -> float | None:
    """Tumour found where there is none, ml."""
    return None if found.result.volumes_ml is None else round(found.result.volumes_ml["native"]["WT"], 2)


def quick_maps(evaluator: Evaluator, groups: dict[str, list[Pair]], work: Path) -> dict[str, Any]:
    """Mean Dice of the 30 structures; the affine is found on T1 in either group: the same one."""
    scores: dict[str, list[dict[str, float]]] = {name: [] for name in groups}
    tumors: dict[str, list[float | None]] = {name: [] for name in groups}
    for pairs in zip(*groups.values(), strict=True):
        evaluator.affine = "auto"
        for name, pair in zip(groups, pairs, strict=True):
            found = evaluator.infer(pair)
            score = {"folding": found.result.folding_percent}
            for method, transform, _ in evaluator.transforms(found):
                field = transform.dense(found.data.target.geometry)
                every = {s.of: s.value for s in structure_scores(transform, field, found.data, surfaces=False)}
                score[method] = every["mean"]
            scores[name].append(score)
            tumors[name].append(healthy(found))
            save_affine(work / "affine.txt", found.result.transform.affine)
            evaluator.affine = str(work / "affine.txt")
    evaluator.affine = "auto"
    return {
        name: {
            "pairs": len(found),
            "dice_affine": round(float(np.mean([s["affine"] for s in found])), 4),
            "dice": round(float(np.mean([s["jrs"] for s in found])), 4),
            "gain_smallest": round(min(s["jrs"] - s["affine"] for s in found), 4),
            "folding_percent": round(float(np.mean([s["folding"] for s in found])), 3),
            "healthy_tumor_ml": tumors[name],
        }
        for name, found in scores.items()
    }


def quick_tumor(evaluator: Evaluator, pair: Pair) -> dict[str, Any]:
    """Dice against the fused pseudo-truth, its volume before and after, similarity outside it."""
    found = evaluator.infer(pair)
    truth = found.data.moving.tumor
    assert truth is not None
    scores: dict[str, Any] = {}
    if found.predicted is not None:
        for region, classes in REGIONS.items():
            scores[region] = round(dice(np.isin(found.predicted, classes), np.isin(truth.data, classes)), 4)
        scores["WT_ml"] = healthy(found)
    grid_ = found.data.target.geometry
    after = {m: np.count_nonzero(warp_labels(truth, t.dense(grid_))) for m, t, _ in evaluator.transforms(found)}
    similarity = found.result.similarity
    return {
        **scores,
        "truth_ml": round(np.count_nonzero(truth.data) * truth.geometry.voxel_volume_ml, 2),
        "truth_moved_ml": round(after["jrs"] * grid_.voxel_volume_ml, 2),
        "volume_to_affine": round(after["jrs"] / after["affine"], 4),
        "folding_percent": round(found.result.folding_percent, 3),
        "similarity": similarity and {key: similarity[key] for key in ("modality", "before", "after")},
    }


def quick(options: argparse.Namespace, pipeline: Pipeline, work: Path) -> dict[str, Any]:
    """The numbers that choose between checkpoints."""
    evaluator = Evaluator(pipeline, ("jrs", "affine"), work, refine=options.refine, threads=options.threads)
    found: dict[str, Any] = {}
    atlas = atlas_case("sri24")
    if options.labels:
        found |= quick_maps(evaluator, map_pairs(sorted(options.labels.glob("*.nii.gz")), work), work)
    if options.bert and options.tissues:
        inference = evaluator.infer(Pair(bert_case(options.bert), atlas))
        rows = tissue_scores(inference, evaluator, options.bert / "bert_aseg.nii.gz", options.tissues)
        found["bert"] = {f"{r.of}{'' if r.method == 'jrs' else '_' + r.method}": round(r.value, 4) for r in rows}
        found["bert"] |= {"folding_percent": round(inference.result.folding_percent, 3)}
        found["bert"] |= {"healthy_tumor_ml": healthy(inference)}
    if options.tcga:
        case = tumor_case(options.tcga)
        pairs = {name: Pair(only(case, INPUTS[name]), atlas) for name in ("four", "flair+t1ce")}
        found["tcga"] = {name: quick_tumor(evaluator, pair) for name, pair in pairs.items()}
    return found


def bert_case(folder: Path) -> TrainingCase:
    """FreeSurfer's sample subject."""
    return TrainingCase("bert", {"t1": ImageFile(folder / "bert_t1.nii.gz")})


def thorough(options: argparse.Namespace, pipeline: Pipeline, work: Path) -> tuple[dict[str, Any], list[str]]:
    """Every score of every method, as JSON and as Markdown lines."""
    methods = ("jrs", *check_baselines(PEERS if options.peers else ()))
    atlas = atlas_case("sri24")
    groups: dict[str, list[Pair]] = {}
    if options.labels:
        groups |= map_pairs(sorted(options.labels.glob("*.nii.gz")), work)
    if options.bert and options.tissues:
        groups["bert"] = [Pair(bert_case(options.bert), atlas)]
    if options.tcga:
        case = tumor_case(options.tcga)
        groups |= {f"tcga_{name}": [Pair(only(case, chosen), atlas)] for name, chosen in INPUTS.items()}
    found: dict[str, Any] = {"methods": methods, "failures": {}}
    lines: list[str] = []
    for group, pairs in groups.items():
        # The other programs see one modality: once is enough for the tumour case.
        chosen = methods if not group.startswith("tcga_") or group == "tcga_four" else methods[:2]
        evaluator = Evaluator(pipeline, chosen, work, refine=options.refine, threads=options.threads)
        rows = []
        for pair in pairs:
            print(f"{group}: {pair.name}", file=sys.stderr)
            scored = evaluator.evaluate(pair, lambda text: print(f"  {text}", file=sys.stderr))
            rows += [Row(pair.moving.name, pair.fixed.name, s.method, s.metric, s.of, s.value) for s in scored.scores]
            if scored.failures:
                found["failures"][f"{group}: {pair.name}"] = scored.failures
        if group == "bert":
            files = (options.bert / "bert_aseg.nii.gz", options.tissues)
            rows += tissue_scores(evaluator.infer(pairs[0]), evaluator, *files)
        summaries = summarize(rows)
        table = {name: {m: s.mean for m, s in by.items()} for name, by in side_by_side(summaries, chosen)}
        for s in summaries:
            if s.metric in ("tissue_dice", "tumor_predicted_ml", "tumor_true_ml"):
                table.setdefault(f"{s.metric} {s.of}", {})[s.method] = s.mean
        tests = compare(rows, "jrs", chosen[1:]) if len(pairs) > 1 else []
        found[group] = {"pairs": len(pairs), "mean": table, "tests": tests, "rows": rows}
        lines += [f"## {group}", "", *aligned(*grid(summaries, chosen)), ""]
    return found, lines


def main() -> None:
    """Print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--labels", type=Path, help="folder of held-out label maps")
    parser.add_argument("--tcga", type=Path, help="folder of the tumour case")
    parser.add_argument("--bert", type=Path, help="folder of bert_t1.nii.gz and bert_aseg.nii.gz")
    parser.add_argument("--tissues", type=Path, help="tissues of SRI24")
    parser.add_argument("--bundle")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--refine", type=int, help="iterations of the refinement; 0: the network alone")
    parser.add_argument("--quick", action="store_true", help="one line, no other programs")
    parser.add_argument("--no-peers", dest="peers", action="store_false", help="everything but the other programs")
    parser.add_argument("--markdown", type=Path, help="also write tables")
    options = parser.parse_args()
    found: dict[str, Any] = {"bundle": str(options.bundle or "default"), "refine": options.refine}
    start = time.perf_counter()
    with (
        tempfile.TemporaryDirectory() as name,
        Pipeline.open(options.bundle, options.backend, threads=options.threads) as pipeline,
    ):
        if options.quick:
            found |= quick(options, pipeline, Path(name))
        else:
            scores, lines = thorough(options, pipeline, Path(name))
            found |= scores
            if options.markdown:
                options.markdown.write_text("\n".join(lines), encoding="utf-8")
    found["seconds"] = round(time.perf_counter() - start, 1)
    json.dump(plain(found), sys.stdout, indent=None if options.quick else 2)
    print()


if __name__ == "__main__":
    main()
