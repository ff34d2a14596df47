"""Frozen dataclasses to JSON and back, checked: the schema of manifests, checkpoints and configurations."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from jrs.errors import ConfigurationError

T = TypeVar("T")


def encode(value: Any) -> Any:
    """A dataclass as plain JSON values: tuples become lists, the order of the fields stays."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: encode(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, (list, tuple)):
        return [encode(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): encode(item) for key, item in value.items()}
    return value


def decode(cls: type[T], value: Any, source: str) -> T:
    """Build the dataclass ``cls`` from JSON values.

    ``source`` names the file (and the place in it) in an error. Raises ConfigurationError for an unknown or a
    missing field and for a value of the wrong type; nothing is converted silently but int to float.
    """
    if not isinstance(value, Mapping):
        raise ConfigurationError(f"{source}: must be an object with named fields, not {_name(value)}")
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    unknown = sorted(set(value) - set(fields))
    if unknown:
        raise ConfigurationError(
            f"{source}: unknown field {unknown[0]!r}; known are {', '.join(fields)} (a newer jrs may know it)"
        )
    hints = get_type_hints(cls)
    arguments = {}
    for name, field in fields.items():
        if name in value:
            arguments[name] = _decode(hints[name], value[name], f"{source}: {name}")
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ConfigurationError(f"{source}: field {name!r} is missing; the file is damaged or too old")
    try:
        return cls(**arguments)
    except ConfigurationError as error:
        raise ConfigurationError(f"{source}: {error}") from error


def decode_field(cls: type[Any], name: str, value: Any, source: str) -> Any:
    """The value of one field of ``cls``, whose name is dotted where it lies in a nested dataclass.

    Raises ConfigurationError for an unknown field, a section instead of a field, and a value of the wrong type.
    """
    hint: Any = cls
    for part in name.split("."):
        known = get_type_hints(hint) if dataclasses.is_dataclass(hint) else {}
        if part not in known:
            where = f"known are {', '.join(known)}" if known else "the part before it has no fields"
            raise ConfigurationError(f"{source}: unknown field {part!r}; {where}")
        hint = known[part]
    if dataclasses.is_dataclass(hint):
        raise ConfigurationError(f"{source}: is a section; set one of {', '.join(get_type_hints(hint))} in it")
    return _decode(hint, value, source)


def _decode(hint: Any, value: Any, source: str) -> Any:
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        return _decode(next(a for a in arguments if a is not type(None)), value, source)
    if origin is Literal:
        if value not in arguments:
            raise ConfigurationError(f"{source}: {value!r} is unknown; choose one of {', '.join(map(str, arguments))}")
        return value
    if dataclasses.is_dataclass(hint):
        return decode(hint, value, source)  # type: ignore[arg-type]
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise ConfigurationError(f"{source}: must be a list, not {_name(value)}")
        items = arguments[:1] * len(value) if arguments[-1] is Ellipsis else arguments
        if len(items) != len(value):
            raise ConfigurationError(f"{source}: must have {len(items)} entries, not {len(value)}")
        return tuple(_decode(a, v, f"{source}[{i}]") for i, (a, v) in enumerate(zip(items, value, strict=True)))
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ConfigurationError(f"{source}: must be an object, not {_name(value)}")
        return {key: _decode(arguments[1], item, f"{source}.{key}") for key, item in value.items()}
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:
        raise ConfigurationError(f"{source}: must be {hint.__name__}, not {_name(value)}")
    return value


def _name(value: Any) -> str:
    return "null" if value is None else type(value).__name__
