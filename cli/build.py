"""``jrs build``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from jrs.errors import UsageError

if TYPE_CHECKING:
    from jrs.bundle import Bundle
    from jrs.runtime.engines.plans import BuildOptions

# How an engine samples volumes where the library has no layer for it.
_SAMPLERS = {"plugin": "sampler by plugin", "gather": "sampler by gather"}


def build(
    bundle: Annotated[
        str | None, typer.Argument(help="Folder of a bundle (default: the one that ships with jrs).")
    ] = None,
    library: Annotated[
        str, typer.Option("--library", help="tensorrt, tensorrt-rtx, or auto: the first that is installed.")
    ] = "auto",
    capability: Annotated[
        list[str] | None,
        typer.Option(
            "--capability", help="Target such as 8.6, ahead of time and without a GPU (tensorrt-rtx); may repeat."
        ),
    ] = None,
    optimization_level: Annotated[int, typer.Option("--optimization-level", help="0 (quick) to 5 (thorough).")] = 3,
    workspace_mb: Annotated[int, typer.Option("--workspace-mb", help="Limit of a layer's scratch memory.")] = 2048,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder (default: engines/ in the bundle, or the user's cache).")
    ] = None,
    rebuild: Annotated[bool, typer.Option("--rebuild", help="Build even what is stored and valid.")] = False,
) -> None:
    """Build TensorRT engines of a bundle's graphs, stored under all that they depend on."""
    from jrs.bundle import Bundle
    from jrs.cli.console import status
    from jrs.runtime.engines.plans import BuildOptions

    options = BuildOptions(optimization_level, workspace_mb, tuple(parse_capability(c) for c in capability or ()))
    with status() as say:
        paths = build_bundle(Bundle.open(bundle), library, options, out, rebuild, say)
    for path in paths:
        print(path)


def build_bundle(
    bundle: Bundle,
    library: str,
    options: BuildOptions,
    out: Path | None = None,
    rebuild: bool = False,
    say: Callable[[str], None] = lambda stage: None,
) -> list[Path]:
    """Build or find the engine of every graph; their files, with a table of what they hold on stderr."""
    from jrs.bundle import SAMPLING
    from jrs.cli.console import table
    from jrs.runtime.engines import plans

    module = plans.import_library(choose_library(library))
    paths, rows = [], []
    for name in bundle.manifest.graphs:
        graph = bundle.graph(name)
        say(f"{module.__name__}: {name}")
        precision = "fp32" if name in SAMPLING else bundle.manifest.precision
        key = plans.plan_key(module, graph, precision, options)
        folder = out if out is not None else plans.plan_folder(graph)
        path = folder / key.file
        # What was lacking for the plugin may be there now.
        fresh = rebuild or plans.load_plan(folder, key) is None or bool(plans.plan_record(path).get("remark"))
        if fresh:
            path = plans.store_plan(folder, plans.build_plan(module, graph, key, options, folder))
        record = plans.plan_record(path)
        holds = [f"{count} {kind}" for kind, count in record["types"].items()]
        if record.get("sampler") in _SAMPLERS:
            holds.append(_SAMPLERS[record["sampler"]])
        remark = f"; no plugin: {record['remark']}" if record.get("remark") else ""
        state = ("built" if fresh else "was there") + remark
        rows.append((name, f"{path.stat().st_size / 1e6:.1f} MB", ", ".join(holds).lower(), state))
        paths.append(path)
    title = f"{module.__name__} {module.__version__}, {key.capability}"
    table(title, ("graph", "engine", "layers", ""), rows)
    return paths


def choose_library(name: str) -> str:
    """``tensorrt`` or ``tensorrt-rtx``: the one named, or the first that is installed."""
    import importlib.util

    from jrs.errors import BackendError
    from jrs.runtime.engines.plans import LIBRARIES

    if name == "auto":
        found = [known for known, module in LIBRARIES.items() if importlib.util.find_spec(module) is not None]
        if not found:
            raise BackendError("neither TensorRT nor TensorRT-RTX is installed; pip install 'jrs[tensorrt-rtx]'")
        return found[0]
    if name not in LIBRARIES:
        raise UsageError(f"--library {name} is unknown; choose auto, {', '.join(LIBRARIES)}")
    return name


def parse_capability(text: str) -> str:
    """``8.6``, ``86``, ``sm_86`` or ``SM86`` as ``SM86``."""
    digits = text.upper().removeprefix("SM").lstrip("_").replace(".", "")
    if not digits.isdigit() or len(digits) not in (2, 3):
        raise UsageError(f"--capability {text}: give a compute capability, for example 8.6 or SM86")
    return f"SM{digits}"
