"""What the refinement gives and costs: Dice of the structures, folding, tumour volume and seconds for each setting.

    python benchmarks/refinement.py --labels HELD_OUT_LABEL_MAPS [--pair MOVING MOVING_LABELS FIXED FIXED_LABELS]...
        [--tumor CASE_FOLDER]... [--refine 0 2 4 8] [--no-seg]

Images are drawn from the label maps (T1 alone, by tissue means, blur and noise), each map is registered to the next;
``--pair`` adds real scans with FreeSurfer's labels, ``drawn:N`` standing for the N-th drawn image and its map. Labels
are warped by nearest neighbour onto the fixed image's grid. ``--tumor`` registers a case to SRI24. Seconds are those
of the refinement alone, CPU seconds those of the process meanwhile. Prints Markdown tables.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
from scipy import ndimage

from jrs import Pipeline
from jrs.reading import read_volume
from jrs.runtime.refine import DEFAULT_ITERATIONS
from jrs.runtime.results import Result
from jrs.runtime.sampling import sample_nearest
from jrs.runtime.transform import Transform, to_voxel_coords
from jrs.structures import STRUCTURES, TISSUES, compact_tables
from jrs.volume import Volume

T1 = dict(zip(TISSUES, (0.0, 1.0, 0.70, 0.80, 0.28, 0.68, 0.93), strict=True))


@dataclass(frozen=True)
class Scan:
    name: str
    image: Path
    labels: Path


@dataclass
class Row:
    """One setting over all pairs."""

    dice: list[float]
    folding: list[float]
    seconds: list[float]
    cpu: list[float]


def draw(labels: Volume, path: Path, seed: int) -> None:
    """A T1-like image of a label map, written as NIfTI."""
    generator = np.random.default_rng(seed)
    means = np.array([T1[name] for name in TISSUES]) * (1 + 0.05 * generator.standard_normal(len(TISSUES)))
    tissue = compact_tables()[1][labels.data]
    image = ndimage.gaussian_filter(means[tissue], 0.7) + 0.03 * generator.standard_normal(tissue.shape)
    nib.save(nib.Nifti1Image(np.where(tissue > 0, 400 * image, 0).astype(np.float32), labels.geometry.affine), path)


def dice(moving: Volume, fixed: Volume, transform: Transform) -> float:
    """Mean over the structures that both have."""
    moved = sample_nearest(moving.data, to_voxel_coords(transform.positions(fixed.geometry), moving.geometry))
    scores = []
    for value in STRUCTURES.values():
        a, b = moved == value, fixed.data == value
        if a.any() and b.any():
            scores.append(2.0 * (a & b).sum() / (a.sum() + b.sum()))
    return float(np.mean(scores))


def timed(pipeline: Pipeline, case: Path, atlas: Path | str, refine: int, segment: bool) -> tuple[Result, float]:
    """The result and the CPU seconds of its refinement."""
    marks: list[tuple[str, float]] = []
    pipeline.progress = lambda stage: marks.append((stage, time.process_time()))
    result = pipeline.infer(case, atlas, refine=refine, segment=segment, inverse=False)
    ends = [end for (stage, _), (_, end) in itertools.pairwise(marks) if stage == "refinement"]
    starts = [start for stage, start in marks if stage == "refinement"]
    return result, ends[0] - starts[0] if ends else 0.0


def structures(pipeline: Pipeline, pairs: list[tuple[Scan, Scan]], settings: list[int], segment: bool) -> None:
    """Two tables: means over the pairs, and the Dice of each pair."""
    rows = {setting: Row([], [], [], []) for setting in settings}
    affine = []
    for moving, fixed in pairs:
        labels = read_volume(moving.labels, labels=True), read_volume(fixed.labels, labels=True)
        for setting, row in rows.items():
            result, cpu = timed(pipeline, moving.image, fixed.image, setting, segment)
            row.dice.append(dice(*labels, result.transform))
            row.folding.append(result.folding_percent)
            row.seconds.append(result.timings_s.get("refinement", 0.0))
            row.cpu.append(cpu)
        affine.append(dice(*labels, Transform(result.transform.affine, None)))
    print("| setting | Dice | smallest gain over affine | folding, % | seconds | CPU seconds |")
    print("|---|---|---|---|---|---|")
    print(f"| affine only | {np.mean(affine):.3f} | | 0 | | |")
    for setting, row in rows.items():
        gain = float(np.min(np.array(row.dice) - np.array(affine)))
        times = f"{statistics.median(row.seconds):.1f} | {statistics.median(row.cpu):.1f}"
        print(f"| --refine {setting} | {np.mean(row.dice):.3f} | {gain:+.3f} | {np.mean(row.folding):.3f} | {times} |")
    print("\n| pair | affine only |" + "".join(f" --refine {setting} |" for setting in settings))
    print("|---|---|" + "---|" * len(rows))
    for index, (moving, fixed) in enumerate(pairs):
        cells = "".join(f" {row.dice[index]:.3f} |" for row in rows.values())
        print(f"| {moving.name} to {fixed.name} | {affine[index]:.3f} |{cells}")


def tumors(pipeline: Pipeline, folders: list[Path], settings: list[int]) -> None:
    """Volume of the whole tumour on SRI24, over what the affine alone makes of it, and the rest of the brain."""
    print("\n| tumour case | setting | volume over affine's | T1 correlation outside | folding, % | seconds |")
    print("|---|---|---|---|---|---|")
    for folder in folders:
        for setting in settings:
            result, _ = timed(pipeline, folder, "sri24", setting, True)
            volumes, similarity = result.volumes_ml, result.similarity
            assert volumes is not None and similarity is not None
            alone = volumes["native"]["WT"] / float(np.linalg.det(result.transform.affine[:3, :3]))
            cells = f"{volumes['moved']['WT'] / alone:.3f} | {similarity['before']} to {similarity['after']}"
            seconds = result.timings_s.get("refinement", 0.0)
            print(f"| {folder.name} | --refine {setting} | {cells} | {result.folding_percent:.3f} | {seconds:.1f} |")


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--labels", type=Path, required=True)
    parser.add_argument("--pair", nargs=4, action="append", default=[])
    parser.add_argument("--tumor", type=Path, action="append", default=[])
    parser.add_argument("--refine", type=int, nargs="+", default=[0, DEFAULT_ITERATIONS, 2 * DEFAULT_ITERATIONS])
    parser.add_argument("--no-seg", action="store_true")
    parser.add_argument("--bundle")
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, Pipeline.open(options.bundle, threads=options.threads) as pipeline:
        drawn = []
        for index, file in enumerate(sorted(options.labels.glob("*.nii.gz"))):
            image = Path(name) / f"{file.name.removesuffix('.nii.gz')}_t1.nii.gz"
            draw(read_volume(file, labels=True), image, 100 + index)
            drawn.append(Scan(image.name.removesuffix("_t1.nii.gz"), image, file))

        def scan(image: str, labels: str) -> Scan:
            if image.startswith("drawn:"):
                return drawn[int(image.removeprefix("drawn:")) - 1]
            return Scan(Path(image).name.split(".")[0], Path(image), Path(labels))

        pairs = [(one, drawn[(index + 1) % len(drawn)]) for index, one in enumerate(drawn)]
        pairs += [(scan(a, b), scan(c, d)) for a, b, c, d in options.pair]
        structures(pipeline, pairs, options.refine, not options.no_seg)
        if options.tumor:
            tumors(pipeline, options.tumor, options.refine)


if __name__ == "__main__":
    main()
