"""How often affine registration finds back what was misplaced, and how long it takes, beside ANTs and greedy.

    python benchmarks/affine.py T1 [T1 ...] [--fixed FILE] [--trials N] [--peer-trials N] [--threads N]

Each T1 is placed wrongly by its header alone, no voxel changes: a rotation of up to 45 degrees about a random axis, a
shift of up to 60 mm, a scale of 0.85 to 1.15. What is found is taken back by the known misplacement and compared with
what the same program finds for the T1 as it lies: the mean distance over the eight corners of the box around the fixed
image's brain, in mm of the T1. Up to 3 mm counts as recovered. Peers run where they are installed (``antspyx``,
``picsl-greedy``), with their defaults for affine registration and the images' centres for a start.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import nibabel as nib
import numpy as np

from jrs.geometry import apply_affine
from jrs.reading import read_volume
from jrs.resources import atlas_path
from jrs.runtime.affine import foreground_box, register_affine
from jrs.runtime.affine_search import rotation_of
from jrs.runtime.transform_files import load_affine

RECOVERED_MM = 3.0
Register = Callable[[Path, Path, Path, int], np.ndarray]


def ours(moving: Path, fixed: Path, folder: Path, threads: int) -> np.ndarray:
    return register_affine(read_volume(moving), read_volume(fixed), threads=threads).matrix


def by_ants(moving: Path, fixed: Path, folder: Path, threads: int) -> np.ndarray:
    import ants

    found = ants.registration(
        ants.image_read(str(fixed)), ants.image_read(str(moving)), "Affine", outprefix=str(folder / "ants_")
    )
    return load_affine(Path(found["fwdtransforms"][0]))


def by_greedy(moving: Path, fixed: Path, folder: Path, threads: int) -> np.ndarray:
    from picsl_greedy import Greedy3D

    out = folder / "greedy.mat"
    Greedy3D().execute(
        f"-d 3 -a -m NCC 2x2x2 -i {fixed} {moving} -o {out} -n 100x50x10 -ia-image-centers -threads {threads} -V 0"
    )
    return np.loadtxt(out)


def misplacement(generator: np.random.Generator, center: np.ndarray) -> np.ndarray:
    """4x4: rotated and scaled about ``center``, then shifted."""
    axis, direction = (v / np.linalg.norm(v) for v in generator.normal(size=(2, 3)))
    linear = generator.uniform(0.85, 1.15) * rotation_of(axis * np.radians(generator.uniform(0, 45)))
    matrix = np.eye(4)
    matrix[:3, :3] = linear
    matrix[:3, 3] = center + direction * generator.uniform(0, 60) - linear @ center
    return matrix


def trials(register: Register, image: Path, fixed: Path, count: int, threads: int) -> list[tuple[float, float, float]]:
    """Error in mm, wall seconds and processor seconds of each trial."""
    lower, upper = foreground_box(read_volume(fixed))
    corners = np.stack(np.meshgrid(*zip(lower, upper, strict=True), indexing="ij"), axis=-1).reshape(-1, 3)
    volume = read_volume(image)
    generator = np.random.default_rng(0)
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        wanted = apply_affine(register(image, fixed, folder, threads), corners)
        for _ in range(count):
            wrong = misplacement(generator, volume.geometry.center)
            path = folder / "misplaced.nii.gz"
            nib.save(nib.Nifti1Image(volume.data, wrong @ volume.geometry.affine), path)
            wall, cpu = time.perf_counter(), time.process_time()
            try:
                found = register(path, fixed, folder, threads)
            except Exception as error:  # a peer that gives up has not recovered it
                print(f"{image.name}: {error}", file=sys.stderr)
                found = np.full((4, 4), np.inf)
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            reached = apply_affine(np.linalg.inv(wrong) @ found, corners)
            error_mm = float(np.linalg.norm(reached - wanted, axis=1).mean())
            rows.append((error_mm if np.isfinite(error_mm) else 999.0, wall, cpu))
            line = f"{register.__name__} {image.name} {rows[-1][0]:.2f} mm {wall:.1f} s ({cpu:.1f} s of processor)"
            print(line, file=sys.stderr, flush=True)
    return rows


def main() -> None:
    """Print one JSON object a line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path, nargs="+")
    parser.add_argument("--fixed", type=Path, default=atlas_path("sri24"))
    parser.add_argument("--trials", type=int, default=20, help="of each image (default 20)")
    parser.add_argument("--peer-trials", type=int, default=3, help="of each image, they are slow (default 3)")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    programs: list[tuple[str, Register, int]] = [("jrs", ours, options.trials)]
    programs += [("ANTs", by_ants, options.peer_trials)] if find_spec("ants") else []
    programs += [("greedy", by_greedy, options.peer_trials)] if find_spec("picsl_greedy") else []
    for name, register, count in programs:
        if not count:
            continue
        rows = [row for i in options.images for row in trials(register, i, options.fixed, count, options.threads)]
        errors, wall, cpu = np.array(rows).T
        print(
            json.dumps(
                {
                    "program": name,
                    "trials": len(rows),
                    "recovered": int((errors <= RECOVERED_MM).sum()),
                    "median_mm": round(float(np.median(errors)), 2),
                    "worst_mm": round(float(errors.max()), 2),
                    "median_s": round(float(np.median(wall)), 2),
                    "median_cpu_s": round(float(np.median(cpu)), 2),
                }
            ),
            flush=True,
        )


if __name__ == "__main__":
    main()
