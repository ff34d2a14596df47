"""The names of every file that inference writes; nothing else spells them."""

from __future__ import annotations

import re
from pathlib import Path

_SUFFIX = {"t1": "T1w", "t1ce": "ce-gadolinium_T1w", "t2": "T2w", "flair": "FLAIR"}


def atlas_label(path: Path, name: str | None = None) -> str:
    """A BIDS label (letters and digits) for an atlas: its shipped name or its file's."""
    stem = name if name is not None else re.sub(r"(\.nii)?(\.gz)?(\.mgz)?$", "", path.name)
    return re.sub(r"[^0-9A-Za-z]", "", stem) or "atlas"


class OutputNames:
    """Names of one case's files against one atlas, in the case's folder."""

    def __init__(self, case: str, atlas: str) -> None:
        self.case, self.atlas = case, atlas

    @property
    def labels_native(self) -> str:
        """Tumour labels on the native grid."""
        return f"{self.case}_seg-tumor_dseg.nii.gz"

    @property
    def labels_moved(self) -> str:
        """Tumour labels on the atlas's grid."""
        return f"{self.case}_space-{self.atlas}_seg-tumor_dseg.nii.gz"

    def moved(self, modality: str) -> str:
        """One modality on the atlas's grid."""
        return f"{self.case}_space-{self.atlas}_desc-moved_{_SUFFIX.get(modality, modality)}.nii.gz"

    @property
    def field(self) -> str:
        """Total transform, to resample the native image on the atlas's grid."""
        return f"{self.case}_from-native_to-{self.atlas}_mode-image_xfm.nii.gz"

    @property
    def inverse_field(self) -> str:
        """Its inverse, to resample an image of the atlas's space on the native grid."""
        return f"{self.case}_from-{self.atlas}_to-native_mode-image_xfm.nii.gz"

    @property
    def jacobian(self) -> str:
        """Determinant of the total transform on the atlas's grid."""
        return f"{self.case}_space-{self.atlas}_desc-jacobian_map.nii.gz"

    @property
    def report_json(self) -> str:
        """The report for programs."""
        return f"{self.case}_report.json"

    @property
    def report_html(self) -> str:
        """The report for the eye."""
        return f"{self.case}_report.html"

    def everything(self) -> list[str]:
        """Every name that a run of this case against this atlas may have written."""
        return [
            self.labels_native,
            self.labels_moved,
            *(self.moved(modality) for modality in _SUFFIX),
            self.field,
            self.inverse_field,
            self.jacobian,
            self.report_json,
            self.report_html,
        ]
