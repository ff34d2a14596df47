"""Transforms from and to files: our fields, ITK's and ANTs' transforms, FSL's warps and matrices.

A file is one chain of affines and fields. ITK's composite ``.h5`` and binary ``.mat`` are read and written by
SimpleITK; what a file is, its content tells.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from jrs import fsl, itk
from jrs.errors import BadDataError, MissingInputError, UsageError, last_line
from jrs.fields import DisplacementField
from jrs.files import unnumbered, whole_file
from jrs.geometry import FloatArray, Geometry
from jrs.headers import shown
from jrs.runtime.chain import Chain, Step, composed
from jrs.transforms import Affine

IDENTITY = "identity"
_NIFTI_MAGIC = (b"\x5c\x01\x00\x00", b"\x00\x00\x01\x5c", b"\x1c\x02\x00\x00", b"\x00\x00\x02\x1c")
_KINDS = "a displacement field (.nii, .nii.gz) or an ITK or ANTs transform (.h5, .mat, .tfm, .txt)"


def load_chain(names: Sequence[str], inverse: bool = False, threads: int | None = None) -> Chain:
    """Transforms in ANTs' order as one chain: the first named is the first to act on a fixed point.

    Each is a path, ``identity``, or ``[path,1]`` for its inverse; ``inverse`` inverts the whole.
    """
    chains = []
    for name in names:
        path, inverted = _spelled(name)
        chain = Chain((), threads) if path == IDENTITY else load_transform(Path(path), threads)
        chains.append(chain.inverse() if inverted else chain)
    chain = composed(chains, threads)
    return chain.inverse() if inverse else chain


def _spelled(name: str) -> tuple[str, bool]:
    """A path and whether its inverse is meant, as ANTs spells it.

    >>> _spelled("[0GenericAffine.mat,1]"), _spelled("warp.nii.gz")
    (('0GenericAffine.mat', True), ('warp.nii.gz', False))
    """
    if not (name.startswith("[") and name.endswith("]")):
        return name, False
    path, comma, flag = name[1:-1].rpartition(",")
    if not comma or flag.strip() not in ("0", "1"):
        raise UsageError(f"--transform {name}: write [FILE,1] for the inverse of a file")
    return path.strip(), flag.strip() == "1"


def load_transform(path: Path, threads: int | None = None) -> Chain:
    """Read one file. Raises MissingInputError or BadDataError, with the file's name and what to give instead."""
    if not path.is_file():
        raise MissingInputError(f"{shown(path)}: no such transform; give {_KINDS}")
    if _is_nifti(path):
        return Chain((itk.load_field(path),), threads)
    if itk.is_text_transform(path):
        try:
            kinds = [kind for kind, _, _ in itk.text_transforms(path)]
        except (ValueError, UnicodeDecodeError) as error:
            raise BadDataError(f"{shown(path)}: is a damaged ITK transform ({error}); write it again") from error
        if len(kinds) == 1 and itk.is_affine_type(kinds[0]):
            return Chain((Affine(itk.load_affine(path)),), threads)
    import SimpleITK as sitk

    try:
        with _silenced():
            transform = sitk.ReadTransform(str(path))
        return Chain(tuple(_steps(path, sitk, transform)), threads)
    except RuntimeError as error:
        reason = "it is damaged or cut off" if _is_hdf5(path) else last_line(error)
        raise BadDataError(f"{shown(path)}: cannot be read as a transform ({reason}); give {_KINDS}") from error


def _is_hdf5(path: Path) -> bool:
    with path.open("rb") as stream:
        return stream.read(4) == b"\x89HDF"


def load_affine(path: Path) -> FloatArray:
    """A file that holds nothing but affine maps, as one 4x4 matrix, RAS mm of a fixed point to the moving point."""
    affine = load_transform(path).affine
    if affine is None:
        raise BadDataError(f"{shown(path)}: holds a deformation where an affine is needed; give its affine part alone")
    return affine.matrix


def _is_nifti(path: Path) -> bool:
    import gzip

    with path.open("rb") as stream:
        head = stream.read(4)
    if head[:2] == b"\x1f\x8b":
        try:
            with gzip.open(path, "rb") as stream:
                head = stream.read(4)
        except (OSError, EOFError):
            return True  # the reader says what is wrong with it
    return head in _NIFTI_MAGIC


def _steps(path: Path, sitk: Any, transform: Any) -> list[Step]:
    """A SimpleITK transform as steps in the order in which they act on a point."""
    if transform.GetDimension() != 3:
        raise BadDataError(f"{shown(path)}: is a {transform.GetDimension()}-D transform, images are 3-D here")
    kind = transform.GetTransformEnum()
    if kind == sitk.sitkComposite:
        composite = sitk.CompositeTransform(transform)
        # ITK applies what was added last first.
        parts = [composite.GetNthTransform(n) for n in reversed(range(composite.GetNumberOfTransforms()))]
        return [step for part in parts for step in _steps(path, sitk, part)]
    if kind == sitk.sitkDisplacementField:
        image = sitk.DisplacementFieldTransform(transform).GetDisplacementField()
        grid = itk.grid_of_itk(image.GetSize(), image.GetOrigin(), image.GetSpacing(), image.GetDirection())
        data = sitk.GetArrayViewFromImage(image).transpose(2, 1, 0, 3).astype(np.float32)
        if not np.isfinite(data).all():
            raise BadDataError(f"{shown(path)}: has vectors that are not finite; export the field again")
        return [DisplacementField(itk.from_lps_array(data), grid)]
    if not transform.IsLinear():
        name = transform.GetName()
        raise BadDataError(f"{shown(path)}: holds a {name}, which is not supported; convert it into a field")
    origin = np.array(transform.TransformPoint((0.0, 0.0, 0.0)))
    columns = [np.array(transform.TransformPoint(e)) - origin for e in np.eye(3).tolist()]
    affine = Affine.of_parts(np.stack(columns, axis=1), origin)
    if not np.isfinite(affine.matrix).all() or abs(affine.determinant) < 1e-6:
        raise BadDataError(f"{shown(path)}: is singular or not finite; give an invertible affine")
    return [Affine(itk.flipped_matrix(affine.matrix))]


# Writing --------------------------------------------------------------------------------------------------


def save_transform(path: Path, chain: Chain, grid: Geometry | None = None) -> None:
    """Write a chain in the form that the ending names; any ITK program applies it.

    ``.nii``, ``.nii.gz``: one field on ``grid`` (default: the grid of a chain that is one field). ``.h5``: a
    composite of the steps as they are, inverted fields made dense on ``grid``. ``.tfm``, ``.txt``, ``.mat``: an affine.
    """
    name = path.name.lower()
    if name.endswith((".nii", ".nii.gz")):
        itk.save_field(path, _as_field(chain, grid))
    elif name.endswith((".h5", ".hdf5")):
        _save_composite(path, chain, grid)
    elif name.endswith((".tfm", ".txt", ".mat")):
        affine = chain.affine
        if affine is None:
            raise UsageError(f"{shown(path)}: holds affines alone, this transform deforms; write .h5 or .nii.gz")
        if name.endswith(".mat"):
            _write(path, _itk_affine(affine))
        else:
            itk.save_affine(path, affine.matrix)
    else:
        raise UsageError(f"{shown(path)}: unknown ending; write .nii.gz, .h5, .tfm, .txt or .mat")


def save_fsl(path: Path, chain: Chain, source: Geometry, reference: Geometry) -> None:
    """Write for FSL: a relative warp (``.nii.gz``) for applywarp, or for an affine a FLIRT matrix (``.mat``)."""
    name = path.name.lower()
    if name.endswith((".nii", ".nii.gz")):
        fsl.save_warp(path, chain.dense(reference), source)
    elif name.endswith(".mat"):
        if chain.affine is None:
            raise UsageError(f"{shown(path)}: a FLIRT matrix is an affine, this transform deforms; write .nii.gz")
        fsl.save_matrix(path, chain.affine.matrix, source, reference)
    else:
        raise UsageError(f"{shown(path)}: unknown ending; FSL takes a warp as .nii.gz and an affine as .mat")


def _as_field(chain: Chain, grid: Geometry | None) -> DisplacementField:
    if grid is not None:
        return chain.dense(grid)
    if len(chain.steps) == 1 and isinstance(chain.steps[0], DisplacementField):
        return chain.steps[0]
    raise UsageError("a displacement field needs a grid; name an image of it with --reference")


def _save_composite(path: Path, chain: Chain, grid: Geometry | None) -> None:
    import SimpleITK as sitk

    composite = sitk.CompositeTransform(3)
    for step in reversed(chain.steps):
        if isinstance(step, Affine):
            composite.AddTransform(_itk_affine(step))
            continue
        field = step if isinstance(step, DisplacementField) else _as_field(Chain((step,), chain.threads), grid)
        lps = itk.to_lps_array(field.vectors_mm)[:, :, :, 0, :].transpose(2, 1, 0, 3)
        image = sitk.GetImageFromArray(lps.astype(np.float64), isVector=True)
        origin, spacing, direction = itk.grid_for_itk(field.geometry)
        image.SetOrigin(origin)
        image.SetSpacing(spacing)
        image.SetDirection(direction)
        composite.AddTransform(sitk.DisplacementFieldTransform(image))
    if not chain.steps:
        composite.AddTransform(_itk_affine(Affine(np.eye(4))))
    _write(path, composite)


def _itk_affine(affine: Affine) -> Any:
    import SimpleITK as sitk

    lps = itk.flipped_matrix(affine.matrix)
    return sitk.AffineTransform(lps[:3, :3].ravel().tolist(), lps[:3, 3].tolist())


def _write(path: Path, transform: Any) -> None:
    import SimpleITK as sitk

    with whole_file(path) as temporary:
        try:
            with _silenced():
                sitk.WriteTransform(transform, str(temporary))
        except RuntimeError as error:
            raise unnumbered(error, temporary.parent) from error


@contextmanager
def _silenced() -> Iterator[None]:
    """Without what libraries print on the process's stderr: HDF5 its whole call chain, before ITK says it in a line."""
    try:
        kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    except OSError:  # closed
        yield
        return
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
