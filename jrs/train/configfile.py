"""Configurations as files: TOML, one extending another, single fields from the command line over them."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jrs.errors import ConfigurationError, MissingInputError, UsageError
from jrs.files import write_text
from jrs.resources import DATA, config_path
from jrs.schema import decode, decode_field, encode
from jrs.train.config import TrainConfig

EXTENDS = "extends"
Values = dict[str, Any]


def load_config(
    name: str,
    overrides: Mapping[str, Any] | None = None,
    head: str | None = None,
    settings: Sequence[str] = (),
) -> TrainConfig:
    """The configuration ``name``, shipped or a file, with single fields replaced.

    A file may start with ``extends = "NAME"``: another one, shipped or a path beside it ending in ``.toml``, whose
    fields hold where the file does not name them. ``settings`` are ``field=value`` with the field's dotted name
    (``loss.similarity=0.5``) and its value as TOML writes it, quotes around a word left out; they come last, over
    ``overrides`` (by dotted name as well). Raises ConfigurationError or UsageError naming the file or the setting.
    """
    path = config_path(name)
    values = _read(path, ())
    changes = dict(overrides or {})
    if head is not None:
        changes["model.architecture.head"] = head
    for field, value in changes.items():
        _put(values, field, encode(decode_field(TrainConfig, field, value, field)))
    for setting in settings:
        field, value = parse_setting(setting)
        _put(values, field, value)
    return decode(TrainConfig, values, str(path))


def parse_setting(setting: str) -> tuple[str, Any]:
    """``field=value`` as the field's dotted name and its value, of the type that the field has."""
    field, equals, text = setting.partition("=")
    field, text = field.strip(), text.strip()
    if not field or not equals:
        raise UsageError(f"--set {setting}: must be field=value, like loss.similarity=0.5")
    try:
        value = _parse(f"value = {text}")["value"]
    except ConfigurationError:
        value = text  # a word without quotes
    return field, encode(decode_field(TrainConfig, field, value, f"--set {setting}"))


def write_config(path: Path, config: TrainConfig) -> None:
    """Write every field as TOML, whole or not at all; ``load_config`` reads the same configuration from it."""
    write_text(path, "# Every field of this run's configuration; use it again with --config.\n" + to_toml(config))


def to_toml(config: TrainConfig) -> str:
    """Every field of a configuration as TOML, a table a section."""
    lines: list[str] = []
    _tables(lines, "", encode(config))
    return "\n".join(lines).strip() + "\n"


def differences(a: TrainConfig, b: TrainConfig) -> list[str]:
    """Dotted names of the fields in which two configurations differ."""
    first, second = _leaves(encode(a)), _leaves(encode(b))
    return [name for name in {**first, **second} if first.get(name) != second.get(name)]


def _read(path: Path, above: tuple[Path, ...]) -> Values:
    """The values of a file with those of the files it extends below them; ``above`` extend this one."""
    if path.resolve() in above:
        raise ConfigurationError(f"{path}: extends itself, by way of {above[-1]}; break the circle")
    try:
        values = _parse(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, OSError, ConfigurationError) as error:
        raise ConfigurationError(f"{path}: is not a TOML configuration ({error})") from error
    base = values.pop(EXTENDS, None)
    if base is None:
        return values
    if not isinstance(base, str):
        raise ConfigurationError(f"{path}: {EXTENDS} must be the name of one configuration, in quotes")
    return _merged(_read(_base_path(path, base), (*above, path.resolve())), values)


def _base_path(path: Path, base: str) -> Path:
    found = path.parent / base if base.endswith(".toml") else DATA / "configs" / f"{base}.toml"
    if not found.is_file():
        shipped = ", ".join(sorted(p.stem for p in (DATA / "configs").glob("*.toml")))
        raise MissingInputError(
            f"{path}: extends {base!r}, which is not there; give a .toml file beside it or one of {shipped}"
        )
    return found


def _parse(text: str) -> Values:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigurationError(str(error)) from error


def _merged(base: Values, over: Values) -> Values:
    """Tables are merged field by field, everything else is replaced."""
    result = dict(base)
    for name, value in over.items():
        below = result.get(name)
        result[name] = _merged(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return result


def _put(values: Values, field: str, value: Any) -> None:
    *sections, name = field.split(".")
    for section in sections:
        below = values.get(section)
        values[section] = dict(below) if isinstance(below, dict) else {}
        values = values[section]
    values[name] = value


def _tables(lines: list[str], name: str, values: Values) -> None:
    plain = {key: value for key, value in values.items() if not isinstance(value, dict) and value is not None}
    if name and plain:
        lines += ["", f"[{name}]"]
    lines += [f"{key} = {_toml_value(value)}" for key, value in plain.items()]
    for key, value in values.items():
        if isinstance(value, dict):
            _tables(lines, f"{name}.{key}" if name else key, value)


def _toml_value(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(_toml_value(item) for item in value)}]"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return repr(value) if math.isfinite(value) else str(value)
    return json.dumps(value, ensure_ascii=False)


def _leaves(values: Values, prefix: str = "") -> Values:
    found: Values = {}
    for name, value in values.items():
        found |= _leaves(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found
