"""Messages with big tensors, from bytes and to bytes, without parsing or copying the tensors.

Protobuf copies each `raw_..._contents` twice on its way into Python and twice on its way out. Here those fields are
found by their tags and given as views on the bytes that came, protobuf sees the rest, and what is sent stays in pieces,
tensors where they lie (the encoding: protobuf.dev/programming-guides/encoding).
"""

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Final

from google.protobuf.message import DecodeError

RAW_INPUTS: Final = 7
"""Number of `ModelInferRequest.raw_input_contents`."""
RAW_OUTPUTS: Final = 6
"""Number of `ModelInferResponse.raw_output_contents`."""
WORTHWHILE_BYTES = 2**14
"""Smaller messages are parsed faster than they are looked through."""
PIECE_BYTES = 2**16
"""Smaller tensors are copied faster than they are sent in pieces."""
Serialised = bytes | list[bytes | memoryview]
"""A message as it goes over the wire; a large one in pieces, one behind the other. They change no more."""

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_FIXED: Final = {_FIXED64: 8, _FIXED32: 4}


def lift(raw: bytes, number: int) -> tuple[bytes, list[memoryview]]:
    """`raw` without its fields `number`, which hold bytes, and those, in their order; raises `DecodeError`."""
    view, position, end = memoryview(raw), 0, len(raw)
    kept: list[memoryview] = []
    lifted: list[memoryview] = []
    since = 0
    while position < end:
        start = position
        tag, position = _varint(raw, position)
        kind = tag & 7
        if kind == _BYTES:
            size, position = _varint(raw, position)
        elif kind == _VARINT:
            (_, position), size = _varint(raw, position), 0
        elif kind in _FIXED:
            size = _FIXED[kind]
        else:
            raise DecodeError(f"a field of kind {kind}")
        if position + size > end:
            raise DecodeError("a field is cut off")
        if tag == number << 3 | _BYTES:
            kept.append(view[since:start])
            lifted.append(view[position : position + size])
            since = position + size
        position += size
    kept.append(view[since:])
    return b"".join(kept), lifted


def serialised(head: Iterable[bytes], number: int, fields: Iterable[bytes | memoryview]) -> Serialised:
    """The message whose beginning is `head`, with `fields` as its fields `number`.

    Large fields that are read-only are not copied: nobody may write to their memory any more by another way.
    """
    parts: list[bytes | memoryview] = [*head]
    pieces: list[bytes | memoryview] = []
    tag = _encoded(number << 3 | _BYTES)
    for field in fields:
        size = len(field) if isinstance(field, bytes) else field.nbytes
        parts += (tag, _encoded(size), field)
        if size >= PIECE_BYTES and (isinstance(field, bytes) or field.readonly):
            pieces += (b"".join(parts[:-1]), field)
            parts = []
    if not pieces:
        return b"".join(parts)
    if parts:
        pieces.append(b"".join(parts))
    return pieces


def joined(message: Serialised) -> bytes:
    """All of `message`, for those who take it in one piece only."""
    return message if isinstance(message, bytes) else b"".join(message)


def size_of(message: Serialised) -> int:
    """Bytes of `message`."""
    return len(message) if isinstance(message, bytes) else sum(map(len, message))


def _varint(raw: Sequence[int], position: int) -> tuple[int, int]:
    """The number at `position`, and where it ends."""
    value = shift = 0
    while True:
        try:
            byte = raw[position]
        except IndexError:
            raise DecodeError("a number is cut off") from None
        position += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, position
        shift += 7
        if shift > 63:
            raise DecodeError("a number is too long")


@lru_cache(1024)
def _encoded(value: int) -> bytes:
    encoded = bytearray()
    while value >= 128:
        encoded.append(value & 127 | 128)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)
