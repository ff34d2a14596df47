"""Other registration programs, run as their authors recommend: ANTs (antspyx) and greedy (picsl-greedy).

Each aligns affinely and deformably by itself. Files go through a temporary folder, so that what is applied is what
the program wrote: one total displacement field, read as any ITK field is.
"""

from __future__ import annotations

import importlib
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from jrs.errors import BackendError, JrsError, first_line
from jrs.evaluate.transforms import FieldTransform
from jrs.itk import load_field
from jrs.volume import Volume
from jrs.writing import save_nifti

Mask = npt.NDArray[np.bool_]

PEERS = {"ants": ("ants", "antspyx"), "greedy": ("picsl_greedy", "picsl-greedy")}
"""Program: the module to import, and the package that brings it."""


@dataclass(frozen=True)
class PeerResult:
    """The total transform and the seconds it took, files included."""

    transform: FieldTransform
    seconds: float


def require(name: str) -> None:
    """Raise BackendError if the program behind a method (``ants``, ``greedy-masked``) is not installed."""
    module, package = PEERS[name.removesuffix("-masked")]
    try:
        importlib.import_module(module)
    except ImportError as error:
        raise BackendError(
            f"--baseline {name} needs the package {package} ({first_line(error)}); pip install 'jrs[peers]' brings it"
        ) from error


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
    run: Callable[..., Path] = {"ants": _ants, "greedy": _greedy}[name]
    with tempfile.TemporaryDirectory(prefix="jrs-peer-") as folder:
        work = Path(folder)
        start = time.perf_counter()
        for role, volume, tumor in (("moving", moving, moving_tumor), ("fixed", fixed, fixed_tumor)):
            save_nifti(work / f"{role}.nii", volume.data.astype(np.float32), volume.geometry)
            if tumor is not None and tumor.any():
                save_nifti(work / f"{role}_cost.nii", (~tumor).astype(np.uint8), volume.geometry, "label")
        try:
            with _quiet():
                written = run(work, threads)
            field = load_field(written)
        except JrsError:
            raise
        except Exception as error:
            raise BackendError(f"{name}: failed ({first_line(error)}); try it on this pair by itself") from error
        return PeerResult(FieldTransform(field, threads), time.perf_counter() - start)


@contextmanager
def _quiet() -> Iterator[None]:
    """Send what a library in C++ prints to the null device: stdout is for results."""
    sys.stdout.flush()
    kept = os.dup(1)
    null = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(null)


def _ants(work: Path, threads: int | None) -> Path:
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
    return Path(path)


def _greedy(work: Path, threads: int | None) -> Path:
    """Affine, then deformable, both by normalised cross-correlation of radius 2, 100x50x10 iterations."""
    greedy = importlib.import_module("picsl_greedy").Greedy3D()
    pair, masks = f"-i {work}/fixed.nii {work}/moving.nii", ""
    # The deformable stage alone: the affine's line search fails behind a moving mask.
    for option, mask in (("-gm", work / "fixed_cost.nii"), ("-mm", work / "moving_cost.nii")):
        masks += f" {option} {mask}" if mask.exists() else ""
    options = f"-d 3 -m NCC 2x2x2 -n 100x50x10 -V 0{f' -threads {threads}' if threads else ''}"
    greedy.execute(f"{options} {pair} -a -ia-image-centers -o {work}/affine.mat")
    greedy.execute(f"{options} {pair}{masks} -it {work}/affine.mat -o {work}/warp.nii.gz")
    total = work / "total.nii.gz"
    greedy.execute(f"-d 3 -rf {work}/fixed.nii -r {work}/warp.nii.gz {work}/affine.mat -rc {total} -V 0")
    return total
