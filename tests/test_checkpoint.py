"""Checkpoints: whole, checked, understood."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_training import (
    ROOT,
    model_spec,
    small_checkpoint,
)

from jrs.architecture import Architecture
from jrs.errors import (
    ConfigurationError,
    MissingInputError,
    OutputError,
)
from jrs.models.checkpoint import load_checkpoint
from jrs.models.network import JointNet
from jrs.train.loop import LAST

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_checkpoint_comes_back_as_it_was(tmp_path: Path) -> None:
    checkpoint = small_checkpoint(optimizer={"0.exp_avg": torch.randn(2, 3), "0.step": torch.tensor(4.0)})
    checkpoint.save(tmp_path / "new" / "net.safetensors")
    loaded = load_checkpoint(tmp_path / "new" / "net.safetensors")
    assert loaded.spec == checkpoint.spec and loaded.training == {"a": [1, None]}
    for name in ("weights", "optimizer"):
        expected, got = getattr(checkpoint, name), getattr(loaded, name)
        assert expected.keys() == got.keys()
        assert all(torch.equal(expected[k], got[k]) and expected[k].dtype == got[k].dtype for k in expected)
    assert not loaded.network().training


def test_a_write_that_fails_leaves_the_old_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / LAST
    small_checkpoint().save(path)
    content = path.read_bytes()

    def broken(error: BaseException) -> Callable[..., None]:
        def save(tensors: Any, file: Path, metadata: Any) -> None:
            Path(file).write_bytes(content[:100])
            raise error

        return save

    for error, expected in (
        (KeyboardInterrupt(), KeyboardInterrupt),
        (OSError(errno.ENOSPC, "No space left on device"), OutputError),
    ):
        monkeypatch.setattr("safetensors.torch.save_file", broken(error))
        with pytest.raises(expected):
            small_checkpoint(training={"b": 2}).save(path)
        assert path.read_bytes() == content
        assert [p.name for p in tmp_path.iterdir()] == [LAST]


def test_a_process_killed_while_writing_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / LAST
    path.write_text("old")
    code = f"""
import os
from pathlib import Path
from jrs.files import whole_file
with whole_file(Path({str(path)!r})) as temporary:
    temporary.write_text("half of the n")
    os.kill(os.getpid(), 9)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60)
    assert done.returncode == -9
    assert path.read_text() == "old"


def write_header(path: Path, metadata: dict[str, str] | None) -> None:
    from safetensors.torch import save_file

    save_file({"model.x": torch.zeros(2)}, path, metadata=metadata)


def good_header(**changes: Any) -> str:
    from jrs.schema import encode

    return json.dumps({"format_version": 1, "spec": encode(model_spec()), "training": {}} | changes)


def cut_in_half(path: Path) -> None:
    small_checkpoint().save(path)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


GARBAGE: dict[str, Callable[[Path], Any]] = {
    "text": lambda path: path.write_text("not a checkpoint\n" * 20),
    "empty": lambda path: path.write_bytes(b""),
    "pickle": lambda path: torch.save({"a": torch.zeros(2)}, path),
    "cut in half": cut_in_half,
    "safetensors of another program": lambda path: write_header(path, None),
    "header that is no JSON": lambda path: write_header(path, {"jrs": "{"}),
    "newer format": lambda path: write_header(path, {"jrs": good_header(format_version=2)}),
    "unknown field": lambda path: write_header(path, {"jrs": good_header(spec={"colour": 1})}),
    "wrong type": lambda path: write_header(path, {"jrs": good_header(spec={"channels": "t1"})}),
    "spec that is no object": lambda path: write_header(path, {"jrs": good_header(spec=[])}),
    "header without a spec": lambda path: write_header(path, {"jrs": json.dumps({"format_version": 1})}),
    "header that is a list": lambda path: write_header(path, {"jrs": "[]"}),
}


@pytest.mark.parametrize("kind", list(GARBAGE))
def test_what_is_no_checkpoint(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "net.safetensors"
    GARBAGE[kind](path)
    with pytest.raises(ConfigurationError) as caught:
        load_checkpoint(path)
    message = str(caught.value)
    assert message.startswith(str(path)) and "\n" not in message


def test_weights_that_do_not_fit(tmp_path: Path) -> None:
    other = JointNet(Architecture(2, 4, 4, head="displacement", norm="instance")).state_dict()
    small_checkpoint(weights=other).save(tmp_path / "net.safetensors")
    with pytest.raises(ConfigurationError, match=r"^[^\n]*do not fit[^\n]*$"):
        load_checkpoint(tmp_path / "net.safetensors").network()


def test_no_checkpoint_at_all(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none.safetensors"):
        with pytest.raises(MissingInputError, match=rf"^{path}: [^\n]+$"):
            load_checkpoint(path)
