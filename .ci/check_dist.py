"""Checks that the wheel and the sdist hold every file they must and nothing else.

    python .ci/check_dist.py dist

What they must hold is read from the tree that this file lies in, so run it in a clean copy.
"""

from __future__ import annotations

import re
import sys
import tarfile
import zipfile
from email.parser import HeaderParser
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parent.parent
LARGEST_BYTES = 20_000_000

# Package -> the folder it is built from; must agree with [tool.setuptools] in pyproject.toml.
PACKAGES = {
    "jrs": "jrs",
    "jrs.models": "jrs/models",
    "jrs.train": "jrs/train",
    "jrs.train.datasets": "jrs/train/datasets",
    "jrs.evaluate": "jrs/evaluate",
    "jrs.export": "export",
    "jrs.runtime": "runtime",
    "jrs.runtime.engines": "runtime/engines",
    "jrs.cli": "cli",
}
# Links in the tree, which the mapping replaces in an installed package.
LINKS = ("jrs/export", "jrs/runtime", "jrs/cli")
DATA = (
    "jrs/py.typed",
    "jrs/data/atlases/sri24_t1.nii.gz",
    "jrs/data/atlases/LICENSE_SRI24.txt",
    "jrs/data/graphs/sampler.onnx",
    "jrs/data/graphs/sampler_gathering.onnx",
    "jrs/data/graphs/refine.onnx",
    "jrs/data/report/report.css",
    "jrs/data/report/report.js",
    "jrs/data/report/niivue.umd.js.gz",
    "jrs/data/report/LICENSE_NIIVUE.txt",
    "jrs/data/schemas/report-1.json",
    "jrs/data/graphs/probe_convolution.onnx",
    "jrs/data/graphs/probe_sampler.onnx",
    "jrs/data/kernels/grid_sample_3d.cu",
    "jrs/data/configs/default.toml",
    "jrs/data/configs/paper.toml",
)
DEFAULT_BUNDLE = "jrs/data/bundles/default"
# The kernels, compiled for the stable ABI.
SOURCES = ("setup.py", "runtime/kernels.c", "runtime/kernels.h", "runtime/refinement.c")
COMPILED = re.compile(r"jrs/runtime/_kernels\.(abi3\.so|pyd)")
# Where else than in pyproject.toml the version stands.
VERSIONS = {"jrs/__init__.py": r'^__version__ = "(.+)"$', "CITATION.cff": r"^version: (.+)$"}
HOUSE_FILES = (
    "pyproject.toml",
    "MANIFEST.in",
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "CITATION.cff",
    "LICENSE",
    "NOTICE",
    "constraints.txt",
)


def modules() -> dict[str, str]:
    """Every module of every package: path in the tree -> path in the wheel."""
    return {
        file.relative_to(ROOT).as_posix(): str(PurePosixPath(package.replace(".", "/"), file.name))
        for package, folder in PACKAGES.items()
        for file in sorted((ROOT / folder).glob("*.py"))
    }


def data_files() -> set[str]:
    """Every file in jrs/data, and what must be among them whether the tree has it or not."""
    there = {f.relative_to(ROOT).as_posix() for f in (ROOT / "jrs/data").rglob("*") if f.is_file()}
    required = set(DATA)
    if (ROOT / DEFAULT_BUNDLE).is_dir():
        required.add(f"{DEFAULT_BUNDLE}/manifest.json")
        if not any((ROOT / DEFAULT_BUNDLE).glob("*.onnx")):
            required.add(f"{DEFAULT_BUNDLE}/*.onnx")
    return there | required


def stray_packages() -> list[str]:
    """Modules below the package folders that no line of PACKAGES covers, so that no wheel holds them."""
    folders = {folder.split("/")[0] for folder in PACKAGES.values()}
    found = {
        file.relative_to(ROOT).as_posix()
        for folder in folders
        for file in (ROOT / folder).rglob("*.py")
        if not file.relative_to(ROOT).as_posix().startswith(tuple(f"{link}/" for link in LINKS))
    }
    stray = sorted(found - set(modules()))
    return [f"tree: {name} is in no package; name it in pyproject.toml and here" for name in stray]


def compare(where: str, found: set[str], wanted: set[str]) -> list[str]:
    """What is missing and what should not be there."""
    missing = [f"{where}: {name} is missing" for name in sorted(wanted - found)]
    return missing + [f"{where}: {name} should not be there" for name in sorted(found - wanted)]


def check_wheel(path: Path) -> list[str]:
    """Everything wrong with the wheel."""
    where = path.name
    with zipfile.ZipFile(path) as archive:
        files = {i.filename: i for i in archive.infolist() if not i.is_dir()}
        info = next(name.split("/")[0] for name in files if name.endswith(".dist-info/METADATA"))
        metadata = HeaderParser().parsestr(archive.read(f"{info}/METADATA").decode())
        entry_points = archive.read(f"{info}/entry_points.txt").decode()
    inside = {"METADATA", "RECORD", "WHEEL", "entry_points.txt", "top_level.txt"}
    inside |= {"licenses/LICENSE", "licenses/NOTICE"}
    wanted = set(modules().values()) | data_files() | {f"{info}/{name}" for name in inside}
    compiled = {name for name in files if COMPILED.fullmatch(name)}
    problems = compare(where, set(files) - compiled, wanted)
    if len(compiled) != 1 or "-abi3-" not in where:
        problems.append(f"{where}: the compiled kernels are missing; build it with a C compiler")
    problems += [f"{where}: {name} is a link" for name, i in files.items() if (i.external_attr >> 28) == 0xA]
    problems += too_large(where, {name: i.file_size for name, i in files.items()})
    if "jrs = jrs.cli.start:start" not in entry_points:
        problems.append(f"{where}: the command jrs is missing from entry_points.txt")
    if metadata["License-Expression"] != "Apache-2.0":
        problems.append(f"{where}: License-Expression is {metadata['License-Expression']}")
    for file, pattern in VERSIONS.items():
        version = re.search(pattern, (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE)
        if version is None or version[1] != metadata["Version"]:
            problems.append(f"{file}: the version is not {metadata['Version']}, as in pyproject.toml")
    base = [r for r in metadata.get_all("Requires-Dist", []) if "extra ==" not in r]
    heavy = [r for r in base if r.startswith(("torch", "monai", "lightning"))]
    return problems + [f"{where}: {requirement} must not be a base dependency" for requirement in heavy]


def check_sdist(path: Path) -> list[str]:
    """Everything wrong with the sdist."""
    where = path.name
    top = path.name.removesuffix(".tar.gz") + "/"
    with tarfile.open(path) as archive:
        members = [m for m in archive.getmembers() if not m.isdir()]
    sizes = {m.name.removeprefix(top): m.size for m in members}
    generated = {"PKG-INFO", "setup.cfg"}
    found = {name for name in sizes if not name.startswith("jrs.egg-info/")}
    tests = {f.relative_to(ROOT).as_posix() for f in (ROOT / "tests").rglob("*") if f.is_file()}
    tests = {name for name in tests if "__pycache__" not in name}
    wanted = set(modules()) | data_files() | tests | set(HOUSE_FILES) | set(SOURCES) | generated
    problems = compare(where, found, wanted)
    problems += [f"{where}: {m.name} is a link" for m in members if m.issym() or m.islnk()]
    return problems + too_large(where, sizes)


def too_large(where: str, sizes: dict[str, int]) -> list[str]:
    """Files that nobody wants to download."""
    return [f"{where}: {name} has {n / 1e6:.1f} MB" for name, n in sizes.items() if n > LARGEST_BYTES]


def one(folder: Path, pattern: str) -> Path:
    """The only file that matches."""
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        raise SystemExit(f"{folder}: one {pattern} expected, {len(found)} found")
    return found[0]


def main() -> None:
    """Entry point."""
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    dist = Path(sys.argv[1])
    wheel, sdist = one(dist, "jrs-*.whl"), one(dist, "jrs-*.tar.gz")
    problems = stray_packages() + check_wheel(wheel) + check_sdist(sdist)
    for problem in problems:
        print(problem)
    if problems:
        raise SystemExit(f"{len(problems)} problems")
    for path in (wheel, sdist):
        print(f"{path.name}: {path.stat().st_size / 1e6:.1f} MB, holds what it must and nothing else")


if __name__ == "__main__":
    main()
