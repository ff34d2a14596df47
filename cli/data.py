"""``jrs data``: look at training data, and prepare it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jrs.errors import ConfigurationError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from jrs.train.cache_build import BuildReport, CaseOutcome
    from jrs.train.datasets import TrainingCase
    from jrs.train.datasets.scan import CaseReport, ScanReport

app = typer.Typer(
    help="Look at training data before hours are spent on it, and prepare it once.", no_args_is_help=True
)

_Layout = Annotated[str, typer.Option("--layout", help="auto, brats, msd, bids, freesurfer or manifest.")]
_Workers = Annotated[int | None, typer.Option("--workers", help="Processes (default: one a CPU).", min=1)]


@app.command()
def scan(
    data: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of cases, or a CSV or JSON manifest.")],
    layout: _Layout = "auto",
    deep: Annotated[bool, typer.Option("--deep", help="Read every voxel, not headers alone.")] = False,
    require: Annotated[
        str | None, typer.Option("--require", help="Modalities that a case must have, such as t1,t1ce,t2,flair.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Everything found as JSON on stdout.")] = False,
    out: Annotated[
        Path | None, typer.Option("--out", help="Manifest (.csv or .json) of the usable cases, for jrs train --data.")
    ] = None,
    workers: _Workers = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing manifest.")] = False,
) -> int:
    """List the cases of a folder and what is wrong with each; exit code 1 if some are unusable."""
    from jrs.files import refuse_existing
    from jrs.manifest import MODALITIES
    from jrs.parallel import available_cpus
    from jrs.train.datasets import find_cases
    from jrs.train.datasets.manifest import write_manifest
    from jrs.train.datasets.scan import scan_cases

    required = [name.strip().lower() for name in (require or "").split(",") if name.strip()]
    if unknown := [name for name in required if name not in MODALITIES]:
        raise UsageError(f"--require: unknown modality {unknown[0]!r}; choose from {', '.join(MODALITIES)}")
    if out is not None and out.suffix.lower() not in (".csv", ".json"):
        raise UsageError(f"--out {out}: must end in .csv or .json")
    if out is not None:
        refuse_existing(out.parent, [out.name], overwrite)
    cases = find_cases(data, layout)
    with _progress("looking", len(cases)) as advance:
        report = scan_cases(
            cases, deep=deep, required=required, workers=workers or available_cpus(), done=lambda _: advance()
        )
    _show(report)
    if out is not None and report.usable:
        write_manifest(out, report.usable)
    usable, total = len(report.usable), len(report.cases)
    if as_json:
        print(json.dumps(report.as_json(), indent=2, ensure_ascii=False))
    else:
        subjects = len({case.subject for case in cases})
        written = f"; {out} lists them" if out is not None and usable else ""
        print(f"{usable} of {total} cases ({subjects} subjects, layout {cases[0].layout}) are usable{written}")
    return 0 if usable == total else 1


def _show(report: ScanReport) -> None:
    """The table of cases, and what the cohort as a whole shows."""
    from rich.markup import escape

    from jrs.cli.console import note, table

    def row(case: CaseReport) -> list[str]:
        shape = "" if case.shape is None else "x".join(map(str, case.shape))
        spacing = "" if case.spacing is None else "x".join(f"{s:.3g}" for s in case.spacing)
        values = "" if case.values is None else " " + ",".join(map(str, case.values))
        named = {"seg": "seg" + values, "structures": "structures"}
        labels = [text for role, text in named.items() if role in case.case.files()]
        who = case.case.subject + (f" / {case.case.session}" if case.case.session else "")
        counts = Counter(finding.level for finding in case.findings)
        told = ", ".join(f"{n} {level}{'s' if n > 1 else ''}" for level, n in sorted(counts.items())) or "ok"
        images = ",".join(case.case.images)
        return [escape(t) for t in (case.case.name, who, images, " + ".join(labels), f"{shape} {spacing}", told)]

    columns = ("case", "subject / session", "images", "labels", "voxels, mm", "found")
    table("cases, every voxel read" if report.deep else "cases, headers only", columns, map(row, report.cases))
    # A line each, which a search finds whole: the table breaks names.
    for case in report.cases:
        for finding in case.findings:
            note(f"{finding.level}: {case.case.name}: {finding.text}")
    for finding in report.cohort:
        note(f"{finding.level}: {finding.text}")


@app.command()
def prepare(
    data: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of cases, or a CSV or JSON manifest.")],
    out: Annotated[Path, typer.Option("--out", help="Folder of the cache; a run that was stopped goes on.")],
    config: Annotated[
        str, typer.Option("--config", help="Training configuration that it is for: a TOML file, or one that ships.")
    ] = "paper",
    layout: _Layout = "auto",
    atlas: Annotated[str, typer.Option("--atlas", help="T1 atlas that the network's grid is placed on.")] = "sri24",
    align: Annotated[
        str, typer.Option("--align", help="auto: align affinely what lies not on the atlas's grid; or off.")
    ] = "auto",
    splits: Annotated[
        Path | None, typer.Option("--splits", help="JSON of case or subject names: train, validation, test.")
    ] = None,
    validation_share: Annotated[
        float | None, typer.Option("--validation-share", help="Of the cases (default: the configuration's).")
    ] = None,
    test_share: Annotated[float, typer.Option("--test-share", help="Of the cases, kept from training.")] = 0.0,
    seed: Annotated[int | None, typer.Option("--seed", help="Of the splits (default: the configuration's).")] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Check every byte of what is there already.")] = False,
    workers: _Workers = None,
) -> int:
    """Prepare cases once, for training to map into memory; exit code 1 if some could not be."""
    from jrs.parallel import available_cpus
    from jrs.resources import atlas_path
    from jrs.train.cache_build import build_cache
    from jrs.train.configfile import load_config
    from jrs.train.datasets import find_cases

    if align not in ("auto", "off"):
        raise UsageError(f"--align {align} is unknown; choose auto or off")
    settings = load_config(config)
    cases = find_cases(data, layout)
    with _progress("preparing", len(cases)) as advance:
        report = build_cache(
            cases,
            settings.model,
            atlas_path(atlas),
            out,
            align="off" if align == "off" else "auto",
            workers=workers or available_cpus(),
            verify=verify,
            done=lambda outcome: advance(_complaint(outcome)),
        )
    shares = (settings.validation_share if validation_share is None else validation_share, test_share)
    parts = _store_splits(cases, report, out, splits, settings.seed if seed is None else seed, shares)
    made, failed = len(report.index.entries), len(report.index.failed)
    stale = f", {report.removed} stale ones removed" if report.removed else ""
    print(f"{out}: {made} of {made + failed} cases ({report.reused} were there{stale}){parts}")
    return 1 if failed else 0


def _complaint(outcome: CaseOutcome) -> str:
    return "" if outcome.record is not None else f"{outcome.name}: {outcome.error}"


def _store_splits(
    cases: Sequence[TrainingCase],
    report: BuildReport,
    out: Path,
    given: Path | None,
    seed: int,
    shares: tuple[float, float],
) -> str:
    """Settle the splits of all cases and store them in the cache; the counts as text."""
    from jrs.cli.console import note
    from jrs.train.splits import SPLITS, identities, settle_splits, write_splits

    hashes = {entry.name: list(entry.record.images.values()) for entry in report.index.entries}
    whose = identities(cases, hashes)
    try:
        splits = settle_splits(cases, whose, seed, shares, given=given, stored=out / SPLITS)
    except ConfigurationError as error:
        if shares[1] > 0.0:  # or training would draw splits of its own, from the cases to be kept from it
            raise ConfigurationError(f"{error}; the cases are prepared, but none is kept for testing") from error
        # The cases are prepared all the same: with a validation folder or more cases they can be trained on.
        note(f"no splits: {error}")
        return ""
    write_splits(out / SPLITS, splits)
    left = len(cases) - sum(map(len, splits.parts().values()))
    if left:
        note(f"{left} cases are in no split; remove {out / SPLITS} to draw the splits anew")
    return "; " + ", ".join(f"{len(names)} {part}" for part, names in splits.parts().items())


@contextmanager
def _progress(doing: str, total: int) -> Iterator[Callable[..., None]]:
    """A bar on stderr; ``advance(complaint)`` counts one case and prints what is wrong with it above the bar."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns: list[Any] = [TextColumn(doing), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()]
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(doing, total=total)

        def advance(complaint: str = "") -> None:
            if complaint:
                bar.console.print(complaint, markup=False, highlight=False, soft_wrap=True)
            bar.advance(task)

        yield advance
