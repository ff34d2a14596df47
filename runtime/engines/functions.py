"""The sampling operator's body in a serialized ONNX model: taken out, or replaced. No onnx package needed.

A backend that cannot run the body a graph comes with has a kernel for the operator, and the body must go, or takes
another body: of Gather and arithmetic (``jrs.export.gathering``).
"""

from __future__ import annotations

from collections.abc import Iterator

from jrs.resources import DATA

GATHERING = DATA / "graphs" / "sampler_gathering.onnx"
"""The operator alone, its body of Gather and arithmetic."""
_FUNCTIONS = 25
"""``ModelProto.functions`` in onnx.proto."""
_OPERATOR, _GATHERING = b"JrsGridSample3D", b"JrsGatherSample"
"""Under a name of its own: some parsers take a plugin that was registered under the operator's before any body. Equally
long, so that no length in the file changes."""


def samples(model: bytes) -> bool:
    """Whether a model holds the operator: only those have functions; False for what is no model."""
    return any(number == _FUNCTIONS for number, _ in _fields(model))


def without_body(model: bytes) -> bytes:
    """The model without the operator's body; what is no model comes back as it is."""
    return b"".join(field for number, field in _fields(model) if number != _FUNCTIONS)


def with_gathering(model: bytes) -> bytes:
    """The model with the body of Gather and arithmetic; one without the operator comes back as it is."""
    if not samples(model):
        return model
    body = [field for number, field in _fields(GATHERING.read_bytes()) if number == _FUNCTIONS]
    return (without_body(model) + b"".join(body)).replace(_OPERATOR, _GATHERING)


def _fields(message: bytes) -> list[tuple[int, bytes]]:
    """A protobuf message's fields, number and bytes with the tag; [(0, message)] for what is none."""
    try:
        return list(_walk(message))
    except (IndexError, KeyError):
        return [(0, message)]


def _walk(message: bytes) -> Iterator[tuple[int, bytes]]:
    position = 0
    while position < len(message):
        start = position
        tag, position = _varint(message, position)
        kind = tag & 7
        if kind == 2:
            length, position = _varint(message, position)
            position += length
        elif kind == 0:
            _, position = _varint(message, position)
        else:
            position += {1: 8, 5: 4}[kind]
        if position > len(message):
            raise IndexError(position)
        yield tag >> 3, message[start:position]


def _varint(content: bytes, position: int) -> tuple[int, int]:
    """A number as protobuf writes it, and where the next thing begins."""
    value = shift = 0
    while True:
        byte = content[position]
        value |= (byte & 127) << shift
        position, shift = position + 1, shift + 7
        if byte < 128:
            return value, position
