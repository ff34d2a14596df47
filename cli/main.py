"""The command line: thin verbs over the library, every error one line and an exit code."""

from __future__ import annotations

import errno
import io
import os
import re
import signal
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
    from jrs.cli import build, cache, data, doctor, evaluate, export, infer, schema, train, warp

    app.command("infer")(infer.infer)
    app.command("warp")(warp.warp)
    app.command("convert-xfm")(warp.convert_xfm)
    app.command("train")(train.train)
    app.command("evaluate")(evaluate.evaluate)
    app.add_typer(data.app, name="data")
    app.command("export")(export.export)
    app.command("import-weights")(export.import_weights)
    app.command("schema")(schema.schema)
    app.command("build")(build.build)
    app.add_typer(cache.app, name="cache")
    app.command("doctor")(doctor.doctor)
    app.command("selftest")(doctor.selftest)


_register_verbs()


def main() -> None:
    """Entry point of the ``jrs`` command."""
    signal.signal(signal.SIGTERM, _terminate)
    hangup = getattr(signal, "SIGHUP", None)
    if hangup is not None and signal.getsignal(hangup) is signal.SIG_DFL:  # under nohup it is ignored
        signal.signal(hangup, _terminate)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A file's name may hold bytes that are no text; in UTF-8 their escape is JSON's.
        sys.stdout.reconfigure(errors="backslashreplace")
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run the command line and return its exit code; every error is one line on stderr.

    The environment variable ``JRS_DEBUG`` lets the traceback through.
    """
    for number, argument in enumerate(arguments, 1):
        if not argument or re.fullmatch(r"--[a-z][a-z0-9-]*=", argument):
            return _fail(f"argument {number}{f' ({argument})' if argument else ''} is empty; is a variable unset?", 2)
    try:
        result = app(arguments, prog_name="jrs", standalone_mode=False)
    except JrsError as error:
        return _fail(str(error), error.exit_code)
    except MemoryError:
        return _fail("out of memory; close other programs or use a bundle with a smaller grid", 75)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except OSError as error:
        if error.errno == errno.EPIPE:
            return 1
        return _fail(f"{error.filename or 'I/O'}: {error.strerror or error}", 74 if error.errno == errno.ENOSPC else 70)
    except Exception as error:
        return _other(error)
    if result == 130:  # some versions of Typer take the interrupt for an end
        return _fail("interrupted", 130)
    return result if isinstance(result, int) else 0


def _other(error: Exception) -> int:
    # The parser's own exceptions, whose module differs between versions of Typer.
    kind = type(error).__name__
    if kind == "NoArgsIsHelpError":
        print(error, file=sys.stderr)
        return 2
    if kind == "Abort":
        return _fail("interrupted", 130)
    if hasattr(error, "format_message"):
        message = " ".join(str(error.format_message()).split())
        return _fail(f"{message.rstrip(chr(46))}; jrs --help lists what there is", 2)
    if os.environ.get("JRS_DEBUG"):
        raise error
    if isinstance(error, ImportError):
        extra = "evaluate" if error.name in ("scipy", "matplotlib") else "train"
        return _fail(f"package {error.name or error} is not installed; pip install 'jrs[{extra}]' brings it", 69)
    reason = (str(error).strip().splitlines() or ["no reason given"])[0]
    return _fail(f"internal error, {kind}: {reason}; please report it, with the traceback that JRS_DEBUG=1 shows", 70)


def _fail(message: str, code: int) -> int:
    print(f"jrs: {message}", file=sys.stderr)
    return code


def _terminate(number: int, frame: object) -> None:
    # An exception, so that temporary files are removed on the way out.
    raise SystemExit(128 + number)
