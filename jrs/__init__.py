"""jrs: concurrent brain MRI registration and tumour segmentation, deployed without PyTorch.

>>> from jrs import Pipeline                              # doctest: +SKIP
>>> with Pipeline.open() as pipeline:                     # doctest: +SKIP
...     result = pipeline.infer("case.nii.gz", atlas="atlas.nii.gz")
>>> result.save("out/")                                   # doctest: +SKIP
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jrs.bundle import Bundle
    from jrs.errors import JrsError
    from jrs.fields import DisplacementField
    from jrs.geometry import Geometry
    from jrs.runtime.options import InferOptions
    from jrs.runtime.pipeline import Pipeline
    from jrs.runtime.results import Result
    from jrs.volume import Volume

__version__ = "0.1.0"

# Loaded when first used: the command line must answer before numpy has been imported.
_HOMES = {
    "Bundle": "jrs.bundle",
    "JrsError": "jrs.errors",
    "DisplacementField": "jrs.fields",
    "Geometry": "jrs.geometry",
    "InferOptions": "jrs.runtime.options",
    "Pipeline": "jrs.runtime.pipeline",
    "Result": "jrs.runtime.results",
    "Volume": "jrs.volume",
}

__all__ = [
    "Bundle",
    "DisplacementField",
    "Geometry",
    "InferOptions",
    "JrsError",
    "Pipeline",
    "Result",
    "Volume",
    "__version__",
]


def __getattr__(name: str) -> object:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'jrs' has no attribute {name!r}")
