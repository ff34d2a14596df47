"""The command as a user runs it: exit codes, one line on stderr for an error, one JSON line on stdout."""

from __future__ import annotations

import gzip
import inspect
import json
import os
import shutil
import signal
import subprocess
import sys
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import jrs
from jrs.cli.infer import infer as infer_command
from jrs.cli.main import run
from jrs.runtime.options import InferOptions

pytest.importorskip("torch")  # makes the tiny bundle

ROOT = Path(jrs.__file__).resolve().parent.parent
# Stands before the command in the same interpreter: what an edge device lacks cannot be imported.
NO_TORCH = """
import sys
import typing
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "monai", "onnx", "h5py", "safetensors", "scipy", "lightning_fabric"):
            raise ImportError(f"{name} is blocked")
sys.meta_path.insert(0, Blocked())
"""


def jrs_command(*arguments: Any, before: str = "") -> subprocess.CompletedProcess[str]:
    """Run ``jrs`` in an interpreter of its own, ``before`` first."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    environment.pop("JRS_DEBUG", None)
    return subprocess.run(
        [sys.executable, "-c", f"{before}\nfrom jrs.cli.main import main; main()", *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
        check=False,
    )


def failed(done: subprocess.CompletedProcess[str], code: int) -> str:
    """The one line of an error."""
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("jrs: ")
    assert "Traceback" not in done.stderr
    return lines[0]


@pytest.fixture
def infer(tiny_bundle: Path, phantom: Any, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """``jrs infer`` on the phantom, without the search for an affine."""

    def call(
        *more: Any, case: Any = phantom.folder, bundle: Path = tiny_bundle, before: str = "", affine: str = "off"
    ) -> subprocess.CompletedProcess[str]:
        fixed = ("--atlas", phantom.atlas, "--bundle", bundle, "--affine", affine, "--threads", 1)
        return jrs_command("infer", case, *fixed, "--out", tmp_path / "out", *more, before=before)

    return call


# Help -----------------------------------------------------------------------------------------------------


def test_the_command_and_the_library_do_the_same_unless_told_otherwise() -> None:
    options, command = InferOptions(), inspect.signature(infer_command).parameters
    for name in ("affine", "inverse", "same_patient", "label_scheme"):
        assert command[name].default == getattr(options, name)
    assert command["seg"].default == options.segment
    assert command["refine"].default is None  # the library's, which the help names
    hint = typing.get_type_hints(infer_command, include_extras=True)["refine"]
    assert f"(default: {options.refine})" in hint.__metadata__[0].help


@pytest.mark.parametrize("verb", [None, "infer", "train", "export", "import-weights"])
def test_every_verb_explains_itself(verb: str | None) -> None:
    done = jrs_command(*([verb] if verb else []), "--help")
    assert done.returncode == 0 and done.stderr == ""
    assert "Usage: jrs" in done.stdout
    if verb is None:
        assert all(name in done.stdout for name in ("infer", "train", "export", "import-weights"))
    else:
        assert "--out" in done.stdout


def test_infer_help_names_every_option() -> None:
    text = jrs_command("infer", "-h").stdout
    wanted = "--atlas --out --bundle --modality --channels --t1 --t1ce --t2 --flair --affine --no-seg --no-inverse"
    assert all(option in text for option in f"{wanted} --backend --precision --threads --overwrite".split())


def test_version() -> None:
    done = jrs_command("--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"jrs {jrs.__version__}\n", "")


def test_no_arguments_show_the_help() -> None:
    done = jrs_command()
    assert done.returncode == 2
    assert "Usage: jrs" in done.stdout + done.stderr and "Traceback" not in done.stderr


# Done -----------------------------------------------------------------------------------------------------


def test_infer_prints_one_json_line_and_needs_no_torch(
    infer: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    done = infer(before=NO_TORCH)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1 and done.stdout.endswith("\n")
    line = json.loads(done.stdout)
    folder = tmp_path / "out" / "case7"
    report = json.loads((folder / "case7_report.json").read_text(encoding="utf-8"))
    assert Path(line["out"]) == folder
    assert (line["case"], line["atlas"]) == ("case7", "phantomatlas")
    assert line["volumes_ml"] == report["volumes_ml"]
    assert line["folding_percent"] == report["jacobian"]["folding_percent"]
    assert line["seconds"] == report["timings_s"]["total"] > 0
    assert {path.name for path in folder.iterdir()} == set(report["outputs"].values())
    assert all(text.startswith("jrs: warning: ") for text in done.stderr.splitlines())


def test_warnings_go_to_stderr(infer: Callable[..., subprocess.CompletedProcess[str]], phantom: Any) -> None:
    done = infer("--no-inverse", case=phantom.folder / "case7_t1.nii.gz")
    assert done.returncode == 0
    assert "jrs: warning: " in done.stderr and "flair" in done.stderr
    assert json.loads(done.stdout)["volumes_ml"] is not None
    without = infer("--no-seg", "--no-inverse", "--overwrite", case=phantom.folder / "case7_t1.nii.gz")
    assert "flair" not in without.stderr and json.loads(without.stdout)["volumes_ml"] is None


def test_existing_results_are_kept_then_replaced(
    infer: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    folder = tmp_path / "out" / "case7"
    assert infer().returncode == 0
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    message = failed(infer(), 73)
    assert "--overwrite" in message and str(folder) in message
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert infer("--overwrite", "--no-seg", "--no-inverse").returncode == 0
    left = {path.name for path in folder.iterdir()}
    assert left < set(before) and not any("dseg" in name or "to-native" in name for name in left)


def test_names_with_spaces_and_umlauts(
    infer: Callable[..., subprocess.CompletedProcess[str]], phantom: Any, tmp_path: Path
) -> None:
    case = tmp_path / "Fälle 1" / "Müller, Jörg_t1.nii.gz"
    case.parent.mkdir()
    shutil.copy(phantom.folder / "case7_t1.nii.gz", case)
    done = infer("--no-inverse", case=case)
    assert done.returncode == 0, done.stderr
    folder = Path(json.loads(done.stdout)["out"])
    assert folder.is_dir() and " " not in folder.name and "," not in folder.name


# Exit codes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("infer",), "no case given"),
        (("infer", "x.nii.gz", "--backend", "abacus"), "openvino"),
        (("infer", "x.nii.gz", "--precision", "fp8"), "fp32"),
        (("infer", "x.nii.gz", "--no-such-option"), "--no-such-option"),
        (("infer", "x.nii.gz", "--threads", "0"), "threads"),
        (("infer", "x.nii.gz", "--threads", "many"), "threads"),
        (("infer", "x.nii.gz", "y.nii.gz", "--t1", "z.nii.gz"), "--t1 is for one case, and 2 are given"),
        (("infer", "x.nii.gz", "--overwrite", "--skip-existing"), "contradict"),
        (("guess",), "guess"),
        (("train", "--out", "o"), "--synthetic"),
        (("train", "--out", "o", "--data", "a", "--synthetic", "b"), "either"),
        (("export", "x.safetensors"), "--out"),
        (("import-weights", "x.h5", "--out", "o", "--merge", "blend"), "subtract"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_2_for_a_request_that_makes_no_sense(
    arguments: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str], tiny_bundle: Path
) -> None:
    """In this interpreter: only the parser and the first checks run."""
    bundle = ["--bundle", str(tiny_bundle)] if arguments[0] == "infer" else []
    assert run([*arguments, *bundle]) == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1, err
    assert err.startswith("jrs: ") and words in err


def test_2_in_a_process_of_its_own(infer: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    assert "t1, t1ce, t2, flair" in failed(infer("--modality", "ct"), 2)
    assert "--channels" in failed(infer("--channels", "t1,t2"), 2)


def test_65_for_data_that_cannot_be_trusted(
    infer: Callable[..., subprocess.CompletedProcess[str]], phantom: Any, tmp_path: Path
) -> None:
    whole = (phantom.folder / "case7_t1.nii.gz").read_bytes()
    (tmp_path / "cut_t1.nii.gz").write_bytes(whole[: len(whole) // 2])
    assert "cut_t1.nii.gz" in failed(infer(case=tmp_path / "cut_t1.nii.gz"), 65)
    (tmp_path / "text_t1.nii.gz").write_bytes(gzip.compress(b"no image" * 1000))
    assert "text_t1.nii.gz" in failed(infer(case=tmp_path / "text_t1.nii.gz"), 65)
    (tmp_path / "rigid.tfm").write_text("#Insight Transform File V1.0\nTransform: Euler3DTransform_double_3_3\n")
    assert "rigid.tfm" in failed(infer(affine=str(tmp_path / "rigid.tfm")), 65)
    assert not (tmp_path / "out").exists()


def test_66_for_what_is_not_there(infer: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path) -> None:
    assert "nowhere" in failed(infer(case=tmp_path / "nowhere"), 66)
    assert "nowhere" in failed(infer("--atlas", tmp_path / "nowhere.nii.gz"), 66)
    assert "nowhere" in failed(infer(bundle=tmp_path / "nowhere"), 66)
    assert "nowhere" in failed(infer(affine=str(tmp_path / "nowhere.txt")), 66)
    assert not (tmp_path / "out").exists()


def test_66_for_a_checkpoint_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["export", str(tmp_path / "nowhere.safetensors"), "--out", str(tmp_path / "bundle")]) == 66
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1 and err.startswith("jrs: ") and "nowhere" in err
    assert not (tmp_path / "bundle").exists()


def test_69_for_a_backend_that_is_missing(infer: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    assert "fp32" in failed(infer("--backend", "ort-cpu", "--precision", "bf16"), 69)
    hidden = """
import importlib.util as u
real = u.find_spec
u.find_spec = lambda name, *rest: None if name == "openvino" else real(name, *rest)
"""
    assert "pip install openvino" in failed(infer("--backend", "openvino", before=hidden), 69)


@pytest.mark.parametrize("verb", ["export", "import-weights", "train"])
def test_69_where_the_training_packages_are_not_installed(verb: str, tmp_path: Path) -> None:
    """An edge device has no PyTorch: say what to install, not where the import failed."""
    arguments = {
        "export": ("x.safetensors", "--out", tmp_path / "b"),
        "import-weights": ("x.h5", "--out", tmp_path / "c.safetensors"),
        "train": ("--out", tmp_path / "r", "--synthetic", tmp_path),
    }[verb]
    message = failed(jrs_command(verb, *arguments, before=NO_TORCH), 69)
    assert "jrs[train]" in message


def test_73_for_a_place_that_cannot_be_written(
    infer: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("x", encoding="utf-8")
    assert "file" in failed(infer("--out", tmp_path / "file"), 73)
    assert (tmp_path / "file").read_text(encoding="utf-8") == "x"


def test_74_for_a_full_disk(infer: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path) -> None:
    full = """
import errno, os
def replace(*a, **k):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
os.replace = replace
"""
    message = failed(infer("--no-inverse", before=full), 74)
    assert "No space left" in message and "free some space" in message
    assert list((tmp_path / "out").rglob("*")) == []


PATCH = """
import jrs.runtime.pipeline as p
def load_case(*a, **k):
    {}
p.load_case = load_case
"""


def test_75_for_memory_that_ran_out(infer: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    assert "memory" in failed(infer(before=PATCH.format("raise MemoryError")), 75)


def test_78_for_a_bundle_that_is_damaged(
    infer: Callable[..., subprocess.CompletedProcess[str]], tiny_bundle: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(tiny_bundle, copy)
    graph = copy / "registration.onnx"
    content = graph.read_bytes()
    graph.write_bytes(content[:-1] + b"\0")
    assert "checksum" in failed(infer(bundle=copy), 78)
    graph.write_bytes(content)
    manifest = (copy / "manifest.json").read_text(encoding="utf-8")
    (copy / "manifest.json").write_text(manifest.replace('"format_version": 1', '"format_version": 99'))
    assert "99" in failed(infer(bundle=copy), 78)
    (copy / "manifest.json").write_text(manifest[:100], encoding="utf-8")
    assert "manifest.json" in failed(infer(bundle=copy), 78)
    graph.unlink()
    (copy / "manifest.json").write_text(manifest, encoding="utf-8")
    assert "registration.onnx" in failed(infer(bundle=copy), 78)


def test_70_for_an_error_of_ours(infer: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    """One line as well; the traceback on demand."""
    broken = PATCH.format("raise RuntimeError('boom\\nsecond line')")
    message = failed(infer(before=broken), 70)
    assert "boom" in message and "JRS_DEBUG" in message
    debugging = "import os; os.environ['JRS_DEBUG'] = '1'\n"
    assert "Traceback" in infer(before=debugging + broken).stderr


def test_a_package_of_another_extra_is_named_with_it(infer: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    done = infer(before=PATCH.format("raise ModuleNotFoundError('no scipy', name='scipy')"))
    assert "package scipy is not installed; pip install 'jrs[evaluate]'" in failed(done, 69)


def test_130_for_ctrl_c(infer: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path) -> None:
    done = infer(before=PATCH.format("raise KeyboardInterrupt"))
    assert done.returncode == 130 and done.stdout == ""
    assert done.stderr == "jrs: interrupted\n"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_128_and_more_for_a_signal_that_leaves_nothing_half_written(
    infer: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path, number: signal.Signals
) -> None:
    """SIGTERM, as a batch system sends it, or SIGHUP of a closed terminal, while the files are being written."""
    killed = f"""
import os, signal, time
import jrs.runtime.report_html as h
signal.signal({int(number)}, signal.SIG_DFL)  # nohup, which may run these tests, has SIGHUP ignored
def page(*a, **k):
    os.kill(os.getpid(), {int(number)})
    time.sleep(5)
h.page = page
"""
    done = infer("--no-inverse", before=killed)
    assert done.returncode == 128 + number, done.stderr
    assert done.stdout == "" and "Traceback" not in done.stderr
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_terminal_that_is_closed_is_nothing_under_nohup(
    infer: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    before = """
import os, signal
signal.signal(signal.SIGHUP, signal.SIG_IGN)
import jrs.runtime.report_html as h
real = h.page
def page(*a, **k):
    os.kill(os.getpid(), signal.SIGHUP)
    return real(*a, **k)
h.page = page
"""
    done = infer("--no-inverse", before=before)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["infer", ""], "argument 2 is empty; is a variable unset?"),
        (["infer", "x", "--out", ""], "argument 4 is empty"),
        (["infer", "x", "--out="], "argument 3 (--out=) is empty"),
        (["infer", "--t1="], "argument 2 (--t1=) is empty"),
    ],
)
def test_2_for_an_argument_that_is_empty(
    arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """It would be the current folder."""
    assert run(arguments) == 2
    assert capsys.readouterr().err.startswith(f"jrs: {told}")


@pytest.mark.skipif(sys.platform != "linux", reason="names are bytes on Linux alone")
@pytest.mark.parametrize("folder", [False, True])
def test_names_that_are_no_text(
    infer: Callable[..., subprocess.CompletedProcess[str]], phantom: Any, tmp_path: Path, folder: bool
) -> None:
    """Latin-1 from an old disk: what is written holds the bytes as escapes, and is JSON."""
    name = os.fsdecode(b"M\xfcller")
    place = tmp_path / name
    place.mkdir()
    for file in Path(phantom.folder).glob("case7_t*.nii.gz"):
        (place / f"{name}_{file.name.split('_')[-1]}").symlink_to(file)
    case = place if folder else place / f"{name}_t1.nii.gz"
    done = infer("--no-inverse", case=case)
    assert done.returncode == 0, done.stderr
    out = Path(json.loads(done.stdout)["out"])
    assert out.name == "M_ller"
    report = json.loads((out / "M_ller_report.json").read_text(encoding="utf-8"))
    assert "M\udcfcller" in report["inputs"]["t1"]["file"]


@pytest.mark.parametrize(
    ("more", "code", "words"),
    [
        (("--precision", "bf16", "--triton", "models"), 78, "BF16"),
        (("--triton", "there"), 73, "there: exists already"),
        (("--triton", "models", "--triton-atlas", "nowhere.nii.gz"), 66, "nowhere.nii.gz"),
        (("--capability", "8.6"), 2, "--capability is for --tensorrt"),
        (("--triton", "bundle", "--overwrite"), 2, "folders beside each other"),
        (("--triton", "bundle/models"), 2, "folders beside each other"),
        (("--tensorrt", "--capability", "1.0"), 2, "SM10 is no target"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_an_export_says_first_what_it_cannot_do(
    tiny_bundle: Path,
    tmp_path: Path,
    more: tuple[str, ...],
    code: int,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if "--tensorrt" in more:
        pytest.importorskip("tensorrt_rtx")
    monkeypatch.chdir(tmp_path)
    Path("there").mkdir()
    assert run(["export", str(tiny_bundle.parent / "tiny.safetensors"), "--out", "bundle", *more]) == code
    assert words in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_training_says_first_what_it_lacks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Before label maps are aligned, which takes seconds each."""
    maps = tmp_path / "maps"
    maps.mkdir()
    for number in range(3):
        (maps / f"seg_{number}.nii.gz").write_bytes(b"not even read")
    common = ["train", "--synthetic", str(maps), "--out", str(tmp_path / "run")]
    assert run(common) == 78
    assert "3 images are too few" in capsys.readouterr().err
    assert run([*common, "--init", str(tmp_path / "nowhere.safetensors")]) == 66
    assert "nowhere.safetensors" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["maps"]


def test_the_line_is_json_in_any_encoding(
    infer: Callable[..., subprocess.CompletedProcess[str]],
    phantom: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file = next(Path(phantom.folder).glob("*_t1.nii.gz"))
    (tmp_path / "M\u00fcller\U0001f600_t1.nii.gz").symlink_to(file)
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    done = infer("--no-inverse", case=tmp_path / "M\u00fcller\U0001f600_t1.nii.gz")
    assert json.loads(done.stdout)["case"].startswith("M\u00fcller")
