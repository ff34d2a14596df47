"""Which part of the house may import what: tried without PyTorch, and read from the source."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import jrs

PACKAGE = Path(jrs.__file__).resolve().parent
ROOT = PACKAGE.parent
TRAINING = ("torch", "monai", "onnx", "onnxscript", "h5py", "safetensors", "lightning_fabric", "tensorboard", "scipy")
BLOCK = f"""
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {TRAINING!r}:
            raise ImportError(f"{{name}} is blocked")
sys.meta_path.insert(0, Blocked())
"""


def python(code: str) -> str:
    """Run code in an interpreter of its own; what it prints."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# Modules and where they live ------------------------------------------------------------------------------


_PARTS = ("models", "train", "evaluate", "runtime", "export", "cli")


def part_of(module: str) -> str:
    """core, models, train, evaluate, runtime, export or cli."""
    names = module.split(".")
    if names[1:] == ["__main__"]:
        return "cli"
    return names[1] if len(names) > 1 and names[1] in _PARTS else "core"


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name."""
    found = {}
    folders = {"jrs": PACKAGE, **{f"jrs.{p}": (PACKAGE / p).resolve() for p in ("export", "runtime", "cli")}}
    for prefix, folder in folders.items():
        for file in sorted(folder.rglob("*.py")):
            names = file.relative_to(folder).with_suffix("").parts
            if prefix == "jrs" and names[0] in ("export", "runtime", "cli"):
                continue  # the same files again, through the links
            found[".".join((prefix, *names)).removesuffix(".__init__")] = file
    return found


MODULES = modules()
TORCH_FREE = sorted(name for name in MODULES if part_of(name) in ("core", "runtime", "evaluate", "cli"))


def test_the_house_was_found() -> None:
    assert {part_of(name) for name in MODULES} == {"core", "models", "train", "evaluate", "runtime", "export", "cli"}
    assert {"jrs.geometry", "jrs.runtime.engines.openvino", "jrs.cli.main", "jrs.export.exporter"} <= set(MODULES)


# Tried ----------------------------------------------------------------------------------------------------


def test_the_block_blocks() -> None:
    code = BLOCK + "try:\n    import jrs.models.network\nexcept ImportError as e:\n    print(e)"
    assert "torch is blocked" in python(code)


def test_core_runtime_and_command_line_import_without_torch() -> None:
    names = ", ".join(repr(name) for name in TORCH_FREE)
    code = BLOCK + f"import importlib\nfor name in ({names}):\n    importlib.import_module(name)\nprint('all')"
    assert python(code) == "all\n"


def test_the_public_names_work_without_torch() -> None:
    code = BLOCK + "import jrs\nprint(*[getattr(jrs, name) is not None for name in jrs.__all__])"
    assert set(python(code).split()) == {"True"}


@pytest.mark.parametrize("module", ["jrs", "jrs.cli.main"])
def test_the_command_answers_before_anything_large_is_imported(module: str) -> None:
    heavy = ("numpy", "nibabel", "onnxruntime", "openvino", "SimpleITK", "torch", "onnx", "PIL", "scipy")
    code = f"import sys, {module}\nprint(*(name for name in {heavy!r} if name in sys.modules))"
    assert python(code).split() == []


def test_help_imports_nothing_large() -> None:
    heavy = ("numpy", "onnxruntime", "SimpleITK", "torch")
    code = (
        "import sys\nfrom jrs.cli.main import run\nrun(['infer', '--help'])\n"
        f"print('HEAVY', *(name for name in {heavy!r} if name in sys.modules))"
    )
    assert python(code).splitlines()[-1] == "HEAVY"


def test_the_runtime_loads_each_backend_when_it_is_asked_for() -> None:
    code = (
        "import sys, jrs.runtime.pipeline, jrs.runtime.engines.openvino, jrs.runtime.engines.onnxruntime\n"
        "print(*(name for name in ('onnxruntime', 'openvino', 'SimpleITK') if name in sys.modules))"
    )
    assert python(code).split() == []


# Read -----------------------------------------------------------------------------------------------------

STANDARD = frozenset(sys.stdlib_module_names)
EVERYWHERE = {"numpy", "nibabel"}
RUNTIME = EVERYWHERE | {
    *("onnxruntime", "openvino", "SimpleITK", "tensorrt", "tensorrt_rtx", "cuda", "PIL", "filelock", "platformdirs")
}
LEARNING = EVERYWHERE | {"torch", "monai", "lightning_fabric", "safetensors", "h5py", "tensorboard", "tomli"}
LIBRARIES = {
    "core": EVERYWHERE | {"isal"},
    "models": LEARNING | {"onnx"},  # to read the weights inside a bundle
    # Progress on stderr, pictures of the validation, one process a cache.
    "train": LEARNING | {"rich", "PIL", "filelock"},
    "evaluate": RUNTIME | {"scipy", "matplotlib", "ants", "picsl_greedy"},
    "runtime": RUNTIME,
    "export": LEARNING | RUNTIME | {"onnx", "onnxscript"},
    "cli": LEARNING | RUNTIME | {"onnx", "onnxscript", "typer", "rich"},
}
PARTS = {
    "core": {"core"},
    "models": {"core", "models"},
    # Cases are read and prepared in training as they are in deployment: agreed.
    "train": {"core", "models", "train", "runtime"},
    # Of training only what knows cases and their labels, none of which needs PyTorch.
    "evaluate": {"core", "train", "runtime", "evaluate", "export"},
    "runtime": {"core", "runtime"},
    "export": {"core", "models", "train", "runtime", "export"},
    "cli": {"core", "models", "train", "evaluate", "runtime", "export", "cli"},
}


class Imports(ast.NodeVisitor):
    """What a file imports: names, and whether it happens when the module is imported."""

    def __init__(self) -> None:
        self.found: list[tuple[str, bool]] = []
        self.relative = False
        self._inside = 0

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        self._inside += 1
        self.generic_visit(node)
        self._inside -= 1

    def visit_If(self, node: ast.If) -> None:
        # Names for the type checker alone are no dependency.
        if ast.unparse(node.test) not in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            self.generic_visit(node)

    def visit_Import(self, node: ast.Import) -> None:
        self.found += [(alias.name, not self._inside) for alias in node.names]

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        self.relative |= node.level > 0
        module = node.module or ""
        # from jrs import runtime imports jrs.runtime.
        names = [f"{module}.{alias.name}" for alias in node.names] if module == "jrs" else [module]
        self.found += [(name, not self._inside) for name in names]

    def visit_Call(self, node: ast.Call) -> None:
        # importlib.import_module("torch") with a name that can be read.
        function = ast.unparse(node.func)
        loads = function in ("importlib.import_module", "import_module", "__import__")
        if loads and node.args and isinstance(node.args[0], ast.Constant):
            self.found.append((str(node.args[0].value), not self._inside))
        self.generic_visit(node)


def imports(name: str) -> Imports:
    visitor = Imports()
    visitor.visit(ast.parse(MODULES[name].read_text(encoding="utf-8")))
    return visitor


@pytest.mark.parametrize("name", sorted(MODULES))
def test_dependencies_point_one_way(name: str) -> None:
    part = part_of(name)
    found = imports(name)
    assert not found.relative, "imports are absolute"
    for imported, _ in found.found:
        top = imported.split(".")[0]
        if top == "jrs":
            assert part_of(imported) in PARTS[part], f"{name} imports {imported}"
        elif top not in STANDARD:
            assert top in LIBRARIES[part], f"{name} imports {imported}"


@pytest.mark.parametrize("name", [n for n in TORCH_FREE if part_of(n) != "cli"])
def test_core_and_runtime_never_name_torch(name: str) -> None:
    tops = {imported.split(".")[0] for imported, _ in imports(name).found}
    allowed = {"scipy"} if part_of(name) == "evaluate" else set()
    assert tops.isdisjoint({*TRAINING} - allowed)


@pytest.mark.parametrize("name", [n for n in MODULES if part_of(n) == "cli"])
def test_verbs_import_the_heavy_parts_inside(name: str) -> None:
    for imported, at_once in imports(name).found:
        if at_once and imported.split(".")[0] == "jrs":
            assert part_of(imported) == "cli" or imported in ("jrs.__version__", "jrs.errors"), imported
        elif at_once:
            assert imported.split(".")[0] in {*STANDARD, "typer"}, imported
