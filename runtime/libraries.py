"""Imports of libraries that would otherwise report to their makers that they were imported: patients' data lie here."""

from __future__ import annotations

import sys
from threading import Lock
from typing import Any

_CONVERTER = "openvino.tools.ovc"
_IMPORTING = Lock()


def import_openvino() -> Any:
    """OpenVINO without its model converter, for which ``openvino.convert_model`` still stands; raises ImportError.

    The import of that part sends an event to a web service, writes an identifier to the user's home folder, and takes
    as long as all the rest of the library.
    """
    with _IMPORTING:
        if "openvino" in sys.modules or _CONVERTER in sys.modules:
            import openvino

            return openvino
        sys.modules[_CONVERTER] = None  # type: ignore[assignment]  # as if it were not installed
        try:
            import openvino
        finally:
            sys.modules.pop(_CONVERTER, None)
        if not hasattr(openvino, "convert_model"):
            openvino.convert_model = _convert_model
        return openvino


def _convert_model(*arguments: Any, **options: Any) -> Any:
    from openvino.tools.ovc import convert_model

    return convert_model(*arguments, **options)


def import_onnxruntime() -> Any:
    """ONNX Runtime, the events of its builds for Windows turned off, silent but for errors; raises ImportError."""
    import onnxruntime

    onnxruntime.disable_telemetry_events()
    # A session's own level does not hold while its providers are set up.
    onnxruntime.set_default_logger_severity(3)
    return onnxruntime
