"""Runs jrs as an edge device has it: the wheel with its base dependencies, no PyTorch, outside the checkout.

    python .ci/torch_free.py

Needs no file but those that ship in the package: the case is the SRI24 atlas, moved by a few millimetres,
with a bright ball in it.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import pkgutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

CASE = "phantom"
NEEDS_TORCH = ("jrs.models", "jrs.train", "jrs.export")
REPORT_KEYS = {"case", "atlas", "bundle", "engine", "volumes_ml", "jacobian", "affine", "timings_s"}
REPORT_KEYS |= {"warnings", "versions", "outputs", "report_version", "volume_verdict", "label_scheme"}

# World points of the case: y = SCALE * x + SHIFT_MM, for x in the atlas.
SCALE = 1.03
SHIFT_MM = np.array([4.0, -3.0, 5.0])
AFFINE_TOLERANCE_MM = 2.0  # without any alignment it is 7.5
BALL_RADIUS_MM = 12.0


def world(affine: np.ndarray[Any, Any], shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """World coordinates of every voxel, (3, X, Y, Z) mm."""
    return np.tensordot(affine[:3, :3], np.indices(shape), axes=1) + affine[:3, 3].reshape(3, 1, 1, 1)


def write_case(folder: Path) -> np.ndarray[Any, Any]:
    """Write the case at 2 mm; returns points inside the atlas's brain, (N, 3) mm."""
    from jrs.resources import atlas_path

    atlas = nib.load(atlas_path("sri24"))
    data = np.asarray(atlas.dataobj, dtype=np.float32)
    x, y, z = (n // 2 for n in data.shape)
    halved = data[: 2 * x, : 2 * y, : 2 * z].reshape(x, 2, y, 2, z, 2).mean(axis=(1, 3, 5))
    grid = atlas.affine @ np.array([[2, 0, 0, 0.5], [0, 2, 0, 0.5], [0, 0, 2, 0.5], [0, 0, 0, 1]])
    points = world(grid, halved.shape)
    inside = points[:, halved > 0]
    centre = inside.mean(axis=1) + np.array([25.0, 10.0, 15.0])
    ball = np.linalg.norm(points - centre.reshape(3, 1, 1, 1), axis=0) < BALL_RADIUS_MM
    halved[ball] = 1.2 * np.percentile(halved[halved > 0], 99)
    move = np.diag([SCALE, SCALE, SCALE, 1.0])
    move[:3, 3] = SHIFT_MM
    folder.mkdir()
    nib.save(nib.Nifti1Image(halved, move @ grid), folder / f"{CASE}_t1.nii.gz")
    return inside.T[::500]


def check(condition: object, message: str) -> None:
    """Stop with a message unless the condition holds."""
    if not condition:
        raise SystemExit(f"torch_free: {message}")


def jrs(*arguments: str | Path) -> str:
    """Run the installed command; returns its stdout."""
    command = Path(sys.executable).with_name("jrs.exe" if sys.platform == "win32" else "jrs")
    check(command.exists(), f"{command.name} is not installed beside the interpreter")
    done = subprocess.run([command, *arguments], stdout=subprocess.PIPE, text=True, check=False)
    check(done.returncode == 0, f"jrs {arguments[0]} ended with exit code {done.returncode}")
    return done.stdout


def import_everything() -> None:
    """Import each module that has to work without PyTorch."""
    import jrs as package

    def fail(name: str) -> None:
        check(name.startswith(NEEDS_TORCH), f"{name} cannot be imported")

    names = [m.name for m in pkgutil.walk_packages(package.__path__, "jrs.", onerror=fail)]
    names = [name for name in names if not name.startswith(NEEDS_TORCH)]
    for name in names:
        importlib.import_module(name)
    check("jrs.runtime.engines" in names, "jrs.runtime.engines is not installed")
    print(f"imported {len(names)} modules without PyTorch")


def check_report(folder: Path, inside: np.ndarray[Any, Any]) -> None:
    """The report parses and what it says is there, is there."""
    report = json.loads((folder / f"{CASE}_report.json").read_text(encoding="utf-8"))
    check(report.keys() >= REPORT_KEYS, f"the report lacks {', '.join(sorted(REPORT_KEYS - report.keys()))}")
    check(report["case"] == CASE, f"the report is of case {report['case']}")
    outputs = report["outputs"]
    names = list(outputs.values()) if isinstance(outputs, dict) else list(outputs)
    images = [name for name in names if name.endswith(".nii.gz")]
    check(len(images) >= 4, f"the report lists {len(images)} images only")
    for name in names:
        check((folder / name).is_file(), f"{name} is in the report and not in the folder")
    for name in images:
        values = np.asarray(nib.load(folder / name).dataobj)
        check(np.isfinite(values).all(), f"{name} holds values that are not finite")
    on_disk = {file.name for file in folder.iterdir()}
    check(on_disk == set(names), f"not in the report: {', '.join(sorted(on_disk - set(names)))}")
    affine = np.array(report["affine"])
    check(affine.shape == (4, 4), "the report's affine is not 4x4")
    moved = inside @ affine[:3, :3].T + affine[:3, 3]
    error = float(np.linalg.norm(moved - (SCALE * inside + SHIFT_MM), axis=1).mean())
    check(error < AFFINE_TOLERANCE_MM, f"the affine misses the truth by {error:.1f} mm on average")
    print(f"{len(images)} images open; the affine is within {error:.2f} mm of the truth")


def main() -> None:
    """Entry point."""
    check(importlib.util.find_spec("torch") is None, "PyTorch is installed; use an environment without it")
    import_everything()
    check("infer" in jrs("--help"), "jrs --help does not name the verb infer")
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        inside = write_case(root / CASE)
        print(jrs("infer", root / CASE, "--atlas", "sri24", "--out", root / "out").strip())
        check_report(root / "out" / CASE, inside)
    print("torch_free: passed")


if __name__ == "__main__":
    main()
