"""No library that jrs uses tells its makers that it was used: images of patients lie beside it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


def python(code: str, home: Path) -> str:
    environment = {**os.environ, "HOME": str(home), "USERPROFILE": str(home)}
    for name in ("CI", "TF_BUILD", "JENKINS_URL"):  # where the library keeps still by itself
        environment.pop(name, None)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_openvino_is_used_without_its_reports(tmp_path: Path, tiny_bundle: Path) -> None:
    pytest.importorskip("openvino")
    said = python(
        "import sys\n"
        "from jrs.bundle import Bundle\n"
        "from jrs.runtime.network import Network\n"
        f"with Network(Bundle.open({str(tiny_bundle)!r}), 'openvino', 'fp32') as network:\n"
        "    assert network.info.backend == 'openvino'\n"
        "print([name for name in sys.modules if 'telemetry' in name])",
        tmp_path,
    )
    assert said.strip() == "[]"
    assert list(tmp_path.iterdir()) == []


def test_openvinos_converter_is_still_there_for_who_asks(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    said = python(
        "from jrs.runtime.libraries import import_openvino\n"
        "openvino = import_openvino()\n"
        "try: openvino.convert_model('nowhere.onnx')\n"
        "except Exception as error: print(type(error).__name__)\n"
        "import openvino.tools.ovc as converter\n"
        "assert callable(converter.convert_model)\n",
        tmp_path,
    )
    assert said.strip() and said.strip() != "AttributeError"


def test_onnxruntimes_events_are_off(monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    from jrs.runtime.libraries import import_onnxruntime

    calls: list[None] = []
    monkeypatch.setattr(onnxruntime, "disable_telemetry_events", lambda: calls.append(None))
    assert import_onnxruntime() is onnxruntime and len(calls) == 1
