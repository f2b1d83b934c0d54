"""Writes GGUF files for tests, sound ones and (with the keyword arguments) unsound ones.

build_gguf({"general.architecture": "llama"}, [("token_embd.weight", (64, 32), GgmlType.F32, data)])
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Tensor = tuple[str, Sequence[int], int, bytes]  # name, shape with the row length first, ggml type, stored bytes

U8, I8, U16, I16, U32, I32, F32, BOOL, TEXT, ARRAY, U64, I64, F64 = range(13)
_CODES = {U8: "B", I8: "b", U16: "H", I16: "h", U32: "I", I32: "i", F32: "f", BOOL: "?", U64: "Q", I64: "q", F64: "d"}


@dataclass(frozen=True)
class Typed:
    """A value whose GGUF type must be this one, where the Python type alone would choose another."""

    kind: int
    value: Any


@dataclass(frozen=True)
class Array:
    """An array with this element type; `values` may be bytes that are already encoded (then `length` counts them)."""

    kind: int
    values: Sequence[Any] | bytes
    length: int | None = None


def encode_text(text: str | bytes) -> bytes:
    raw = text if isinstance(text, bytes) else text.encode("utf-8", "surrogateescape")
    return struct.pack("<Q", len(raw)) + raw


def encode_value(value: Any) -> bytes:
    """The type id and the value."""
    if isinstance(value, Typed):
        return struct.pack("<I", value.kind) + _encode_scalar(value.kind, value.value)
    if isinstance(value, Array):
        length = len(value.values) if value.length is None else value.length
        body = value.values if isinstance(value.values, bytes) else _encode_elements(value.kind, value.values)
        return struct.pack("<IIQ", ARRAY, value.kind, length) + body
    if isinstance(value, (list, tuple)):
        return encode_value(Array(_kind_of(value[0]) if value else U32, value))
    return encode_value(Typed(_kind_of(value), value))


def _encode_elements(kind: int, values: Sequence[Any]) -> bytes:
    return b"".join(_encode_scalar(kind, value) for value in values)


def _kind_of(value: Any) -> int:
    if isinstance(value, bool):
        return BOOL
    if isinstance(value, float):
        return F32
    if isinstance(value, int):
        return I32 if value < 0 else U32 if value < 1 << 32 else U64
    return TEXT


def _encode_scalar(kind: int, value: Any) -> bytes:
    return encode_text(value) if kind == TEXT else struct.pack("<" + _CODES[kind], value)


def encode_tensor_entry(name: str | bytes, shape: Sequence[int], kind: int, offset: int) -> bytes:
    dimensions = b"".join(struct.pack("<Q", n % (1 << 64)) for n in shape)
    return encode_text(name) + struct.pack("<I", len(shape)) + dimensions + struct.pack("<IQ", kind, offset)


def encode_header(n_tensors: int, n_keys: int, *, magic: bytes = b"GGUF", version: int = 3) -> bytes:
    return magic + struct.pack("<IQQ", version, n_tensors, n_keys)


def build_gguf(metadata: Mapping[str, Any], tensors: Sequence[Tensor] = (), *, version: int = 3) -> bytes:
    """A whole file; tensors in the given order, each padded to `general.alignment` (32)."""
    alignment = metadata.get("general.alignment", 32)
    head = encode_header(len(tensors), len(metadata), version=version)
    head += b"".join(encode_text(key) + encode_value(value) for key, value in metadata.items())
    data = b""
    for name, shape, kind, stored in tensors:
        head += encode_tensor_entry(name, shape, kind, len(data))
        data += stored + bytes(-len(stored) % alignment)
    return head + bytes(-len(head) % alignment) + data
