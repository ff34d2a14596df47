"""The command line: thin verbs over the library, every error one line and an exit code."""

from __future__ import annotations

import sys

import typer

from jrs import __version__
from jrs.errors import JrsError

app = typer.Typer(
    name="jrs",
    help="Register a brain MRI to an atlas and segment its tumour with one network.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"jrs {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    pass


def _register_verbs() -> None:
    from jrs.cli import export, infer, train

    app.command("infer")(infer.infer)
    app.command("train")(train.train)
    app.command("export")(export.export)
    app.command("import-weights")(export.import_weights)


_register_verbs()


def main() -> None:
    """Entry point of the ``jrs`` command."""
    try:
        app()
    except JrsError as error:
        print(f"jrs: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except MemoryError:
        print("jrs: out of memory; close other programs or use a bundle with a smaller grid", file=sys.stderr)
        sys.exit(75)
