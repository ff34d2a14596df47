"""The names of every file that inference writes; nothing else spells them."""

from __future__ import annotations

import re
from pathlib import Path

from jrs.runtime.bids import MOVED, BidsSource, bids_source, derived
from jrs.runtime.cases import Case

_SUFFIX = {"t1": "T1w", "t1ce": "ce-gadolinium_T1w", "t2": "T2w", "flair": "FLAIR"}
_IMAGE = ".nii.gz"


def atlas_label(path: Path, name: str | None = None) -> str:
    """A BIDS label (letters and digits) for an atlas: its shipped name or its file's."""
    stem = name if name is not None else re.sub(r"(\.nii)?(\.gz)?(\.mgz)?$", "", path.name)
    return re.sub(r"[^0-9A-Za-z]", "", stem) or "atlas"


def output_names(case: Case, atlas: str) -> OutputNames:
    """The names of a case's files: by BIDS if its images lie in a BIDS dataset."""
    return OutputNames(case.name, atlas, bids_source({name: volume.path for name, volume in case.images.items()}))


class OutputNames:
    """Names of one case's files against one atlas, in the case's folder.

    They begin with the case's name; for a case of a BIDS dataset with the entities that its images share.
    """

    def __init__(self, case: str, atlas: str, bids: BidsSource | None = None) -> None:
        self.case, self.atlas, self.bids = case if bids is None else bids.prefix, atlas, bids

    def folder(self, out: Path) -> Path:
        """Where below OUT the files go: ``<case>``, in BIDS ``sub-/[ses-/]anat``."""
        return out / (self.case if self.bids is None else self.bids.folder)

    @property
    def labels_native(self) -> str:
        """Tumour labels on the native grid."""
        return f"{self.case}_seg-tumor_dseg{_IMAGE}"

    @property
    def labels_moved(self) -> str:
        """Tumour labels on the atlas's grid."""
        return f"{self.case}_space-{self.atlas}_seg-tumor_dseg{_IMAGE}"

    def moved(self, modality: str) -> str:
        """One modality on the atlas's grid."""
        if self.bids is not None and modality in self.bids.files:
            return derived(self.bids.files[modality], space=self.atlas, desc=MOVED) + _IMAGE
        return f"{self.case}_space-{self.atlas}_desc-{MOVED}_{_SUFFIX.get(modality, modality)}{_IMAGE}"

    @property
    def field(self) -> str:
        """Total transform, to resample the native image on the atlas's grid."""
        return f"{self.case}_from-native_to-{self.atlas}_mode-image_xfm{_IMAGE}"

    @property
    def inverse_field(self) -> str:
        """Its inverse, to resample an image of the atlas's space on the native grid."""
        return f"{self.case}_from-{self.atlas}_to-native_mode-image_xfm{_IMAGE}"

    @property
    def jacobian(self) -> str:
        """Determinant of the total transform on the atlas's grid."""
        return f"{self.case}_space-{self.atlas}_desc-jacobian_map{_IMAGE}"

    @staticmethod
    def sidecar(image: str) -> str:
        """The JSON beside an image."""
        return image.removesuffix(_IMAGE) + ".json"

    @staticmethod
    def lookup(labels: str) -> str:
        """The BIDS table of label names beside a label map."""
        return labels.removesuffix(_IMAGE) + ".tsv"

    @property
    def slicer_colors(self) -> str:
        """Colour table of the labels for 3D Slicer."""
        return f"{self.case}_seg-tumor_desc-slicer_colors.ctbl"

    @property
    def itksnap_colors(self) -> str:
        """Label descriptions for ITK-SNAP."""
        return f"{self.case}_seg-tumor_desc-itksnap_colors.txt"

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
        labels = [self.labels_native, self.labels_moved]
        images = [*labels, *(self.moved(m) for m in _SUFFIX), self.field, self.inverse_field, self.jacobian]
        tables = [*map(self.lookup, labels), self.slicer_colors, self.itksnap_colors]
        return [*images, *map(self.sidecar, images), *tables, self.report_json, self.report_html]


TABLE = "cases.csv"
"""Of a run of several cases, beside their folders."""
NOT_IN_BIDS = (
    *("*_xfm.nii.gz", "*_xfm.json", "*_desc-jacobian_map.*", "*_colors.*", "*_report.json", "*_report.html"),
    TABLE,
)
"""What BIDS has no name for yet: the lines of ``.bidsignore``."""
