"""Other registration programs, run as their authors recommend: ANTs (antspyx) and greedy (picsl-greedy).

Each aligns affinely and deformably by itself, in a process of its own: a library that aborts takes no evaluation with
it, and what it prints does not mix with results. Files go through a temporary folder, so that what is applied is what
the program wrote: one total displacement field, read as any ITK field is.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from jrs.errors import BackendError
from jrs.evaluate.transforms import FieldTransform
from jrs.itk import load_field
from jrs.volume import Volume
from jrs.writing import save_nifti

Mask = npt.NDArray[np.bool_]

PEERS = {"ants": ("ants", "antspyx"), "greedy": ("picsl_greedy", "picsl-greedy")}
"""Program: the module to import, and the package that brings it."""
TOTAL = "total.nii.gz"
"""What each writes: the total displacement field."""


@dataclass(frozen=True)
class PeerResult:
    """The total transform and the seconds it took, files included."""

    transform: FieldTransform
    seconds: float


def require(name: str) -> None:
    """Raise BackendError if the program behind a method (``ants``, ``greedy-masked``) is not installed."""
    module, package = PEERS[name.removesuffix("-masked")]
    try:
        there = importlib.util.find_spec(module) is not None
    except ValueError:  # a module that was marked as missing
        there = False
    if not there:
        raise BackendError(
            f"--baseline {name} needs the package {package}, which is not installed; pip install 'jrs[peers]' brings it"
        )


def register(
    name: str,
    moving: Volume,
    fixed: Volume,
    moving_tumor: Mask | None = None,
    fixed_tumor: Mask | None = None,
    threads: int | None = None,
) -> PeerResult:
    """Register one image to another with ``ants`` or ``greedy``.

    The tumours, on the images' own grids, are left out of the cost: no similarity is sought there.
    Raises BackendError if the program is missing or fails.
    """
    require(name)
    with tempfile.TemporaryDirectory(prefix="jrs-peer-") as folder:
        work = Path(folder)
        start = time.perf_counter()
        for role, volume, tumor in (("moving", moving, moving_tumor), ("fixed", fixed, fixed_tumor)):
            save_nifti(work / f"{role}.nii", volume.data.astype(np.float32), volume.geometry)
            if tumor is not None and tumor.any():
                save_nifti(work / f"{role}_cost.nii", (~tumor).astype(np.uint8), volume.geometry, "label")
        done = subprocess.run(
            [sys.executable, "-m", "jrs.evaluate.peers", name, folder, str(threads or 0)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env=_environment(threads),
            check=False,
        )
        if done.returncode != 0:
            said = ([line.strip() for line in done.stderr.splitlines() if line.strip()] or ["no reason given"])[-1]
            raise BackendError(f"{name}: ended with exit code {done.returncode} ({said}); leave it out for this pair")
        field = load_field(work / TOTAL)
        return PeerResult(FieldTransform(field, threads), time.perf_counter() - start)


def _environment(threads: int | None) -> dict[str, str]:
    """This process's, and where it finds its modules."""
    found = {**os.environ, "PYTHONPATH": os.pathsep.join(path or str(Path.cwd()) for path in sys.path)}
    return {**found, "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS": str(threads)} if threads else found


def _ants(work: Path) -> None:
    """SyN after an affine, mutual information, antspyx's own settings; the seed makes runs repeatable."""
    ants: Any = importlib.import_module("ants")
    moving, fixed = (ants.image_read(str(work / f"{role}.nii")) for role in ("moving", "fixed"))
    masks = {
        option: ants.image_read(str(path))
        for option, path in (("mask", work / "fixed_cost.nii"), ("moving_mask", work / "moving_cost.nii"))
        if path.exists()
    }
    found = ants.registration(
        fixed=fixed,
        moving=moving,
        type_of_transform="SyN",
        outprefix=str(work / "ants_"),
        mask_all_stages=True,
        random_seed=1,
        **masks,
    )
    path = ants.apply_transforms(
        fixed=fixed, moving=moving, transformlist=found["fwdtransforms"], compose=str(work / "total_")
    )
    Path(path).replace(work / TOTAL)


def _greedy(work: Path, threads: int) -> None:
    """Affine, then deformable, both by normalised cross-correlation of radius 2, 100x50x10 iterations."""
    greedy = importlib.import_module("picsl_greedy").Greedy3D()
    pair, masks = f"-i {work}/fixed.nii {work}/moving.nii", ""
    # The deformable stage alone: the affine's line search fails behind a moving mask.
    for option, mask in (("-gm", work / "fixed_cost.nii"), ("-mm", work / "moving_cost.nii")):
        masks += f" {option} {mask}" if mask.exists() else ""
    # Its affine draws where it samples: without a seed, every run is another.
    options = f"-d 3 -m NCC 2x2x2 -n 100x50x10 -seed 1 -V 0{f' -threads {threads}' if threads else ''}"
    greedy.execute(f"{options} {pair} -a -ia-image-centers -o {work}/affine.mat")
    greedy.execute(f"{options} {pair}{masks} -it {work}/affine.mat -o {work}/warp.nii.gz")
    greedy.execute(f"-d 3 -rf {work}/fixed.nii -r {work}/warp.nii.gz {work}/affine.mat -rc {work / TOTAL} -V 0")


if __name__ == "__main__":
    _, program, folder, count = sys.argv
    if program == "ants":
        _ants(Path(folder))
    else:
        _greedy(Path(folder), int(count))
