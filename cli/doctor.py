"""``jrs doctor`` and ``jrs selftest``."""

from __future__ import annotations

from typing import Annotated

import typer


def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False) -> None:
    """Say which backends work on this machine, and what the others lack."""
    import dataclasses
    import json

    from jrs.cli.console import note, table
    from jrs.runtime.doctor import diagnose

    found = diagnose()
    rows = [(library.name, library.version or "not installed") for library in found.libraries]
    rows = [("jrs", found.jrs), ("Python", found.python), ("system", found.system), *rows]
    rows.append(("CPU", f"{found.cpu}, {found.cores} cores"))
    rows.append(("kernels", found.kernels))
    for device in found.devices:
        major, minor = device.capability
        rows.append(("GPU", f"{device.name}, compute capability {major}.{minor}, {device.memory / 2**30:.1f} GB"))
    rows.append(("driver", found.driver) if found.devices else ("GPU", f"none: {found.no_gpu}"))
    if found.auto is not None:
        rows.append(("auto", f"{found.auto.backend} in {found.auto.precision} ({found.auto.reason})"))
    table("this machine", ("", ""), rows)
    table(
        "backends, best first",
        ("backend", "works", "device", "precisions", "remarks"),
        [
            (b.name, "yes" if b.works else "no", b.device or "", ", ".join(b.precisions), b.reason or b.remark or "")
            for b in found.backends
        ],
    )
    if as_json:
        print(json.dumps({**dataclasses.asdict(found), "healthy": found.healthy}, indent=2))
    else:
        print(", ".join(b.name for b in found.backends if b.works) or "no backend works")
    if not found.healthy:
        note("jrs: no backend works; pip install onnxruntime")
        raise typer.Exit(69)


def selftest(
    backend: Annotated[str, typer.Option("--backend", help="Backend to test (default: the best one here).")] = "auto",
    bundle: Annotated[
        str | None, typer.Option("--bundle", help="Folder of a bundle (default: the one that ships with jrs).")
    ] = None,
    precision: Annotated[str, typer.Option("--precision", help="auto, fp32 or bf16.")] = "auto",
    runs: Annotated[int, typer.Option("--runs", min=1, help="Runs to take the median of.")] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
) -> None:
    """Compare every graph of a bundle on a backend with ONNX Runtime on the CPU, and time it."""
    import dataclasses
    import json

    from jrs.bundle import Bundle
    from jrs.cli.console import table
    from jrs.runtime.selftest import run_selftest

    result = run_selftest(Bundle.open(bundle), backend, precision, runs)
    table(
        f"{result.graphs[0].info.backend} on {result.graphs[0].info.device}, {result.graphs[0].info.precision}",
        ("graph", "runs on", "error p99", "limit", "ms", "ort-cpu", ""),
        [
            (
                r.graph,
                r.info.backend,
                f"{r.error_p99:.1e}",
                f"{r.limit:g}",
                f"{r.milliseconds:.1f}",
                f"{r.reference_ms:.1f}",
                "passed" if r.passed else "FAILED",
            )
            for r in result.graphs
        ],
    )
    if as_json:
        print(json.dumps({**dataclasses.asdict(result), "passed": result.passed}, indent=2))
    else:
        verdict = "passed" if result.passed else "failed"
        print(f"{verdict}; a case takes {result.case_ms:.1f} ms, the atlas encoded before")
    if not result.passed:
        raise typer.Exit(70)
