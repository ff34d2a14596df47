"""Every error that a user can meet, and the exit code it becomes.

A message says what is wrong, with which file, and what to do about it, in one line.
"""

from __future__ import annotations

from pathlib import Path


class JrsError(Exception):
    """Root of all errors that jrs raises on purpose; ``exit_code`` is what the command line returns."""

    exit_code = 70


class UsageError(JrsError):
    """The request contradicts itself or names something that does not exist."""

    exit_code = 2


class BadDataError(JrsError):
    """A file was read and its content cannot be trusted."""

    exit_code = 65


class MissingInputError(JrsError):
    """A file or folder that was named is not there."""

    exit_code = 66


class BackendError(JrsError):
    """A backend, a device or an optional package is missing or does not work."""

    exit_code = 69


class CannotCreateError(JrsError):
    """An output exists already or its place cannot be written."""

    exit_code = 73


class AlreadyThereError(CannotCreateError):
    """An output exists already; ``file`` is one."""

    def __init__(self, file: Path, remedy: str) -> None:
        super().__init__(f"{file}: exists already; {remedy}")
        self.file = file


class OutputError(JrsError):
    """Writing failed part way: disk full or another I/O error."""

    exit_code = 74


class OutOfMemoryError(JrsError):
    """Memory ran out on the host or the device."""

    exit_code = 75


class ConfigurationError(JrsError):
    """A bundle, checkpoint or configuration file is damaged or of an unknown version."""

    exit_code = 78


def first_line(error: Exception) -> str:
    """The first line of a library's message, for a message of one line; its type where it says nothing."""
    return (_lines(error) or [type(error).__name__])[0]


def last_line(error: Exception) -> str:
    """The last line, where libraries that print their whole call chain say what happened."""
    return (_lines(error) or [type(error).__name__])[-1]


def _lines(error: Exception) -> list[str]:
    return [line.strip() for line in str(error).splitlines() if line.strip()]
