"""What a user may ask of a case."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from jrs.errors import UsageError
from jrs.runtime.labels import OWN_SCHEME
from jrs.runtime.refine import DEFAULT_ITERATIONS

AFFINES = ("auto", "rigid", "off")
"""What an affine may be asked to be; anything else is a file."""


@dataclass(frozen=True)
class InferOptions:
    """What to compute for a case; the fields are the options of ``jrs infer``.

    ``affine``: ``auto`` (12 parameters), ``rigid``, ``off`` (the images share a space), or an ITK affine file.
    ``segment``, ``inverse``: whether to make the labels and the inverse field. ``label_scheme``: what the labels
    are written as, ``brats2018`` (enhancing 4), ``brats2023`` (enhancing 3) or the bundle's own. ``refine``:
    iterations of the refinement at 1 mm, more at coarser levels; 0 for none. ``same_patient``: whether the atlas is a
    scan of the case's patient at another time; None: found out by the refinement. ``keep_clear_of``: stop before the
    work if this folder holds the case's results for this atlas already.
    """

    modality: str | None = None
    channels: Sequence[str] | None = None
    modalities: Mapping[str, Path] | None = None
    affine: str = "auto"
    segment: bool = True
    inverse: bool = True
    label_scheme: str = OWN_SCHEME
    refine: int = DEFAULT_ITERATIONS
    same_patient: bool | None = None
    keep_clear_of: Path | None = None

    def __post_init__(self) -> None:
        if self.same_patient is None:
            return
        if self.same_patient not in (True, False):
            raise UsageError(f"same_patient {self.same_patient!r}: must be true, false or None")
        if not self.refine:
            raise UsageError(
                "--same-patient and --other-patient are for the refinement, which --refine 0 leaves out; drop one"
            )
        object.__setattr__(self, "same_patient", bool(self.same_patient))
