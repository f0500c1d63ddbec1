"""Header blocks: decoded by the hpack package and remembered, written without a table.

Callers of one connection send the same few blocks over and over, and a block means the same as long as the table that
it points into is the same. So what a block was turned into is kept until the table changes.
"""

from collections.abc import Callable, Iterable
from typing import Any, Generic, TypeVar

from hpack import Decoder, HPACKError

MAX_LIST_BYTES = 16 * 2**10
"""Largest header list taken, counted as RFC 9113 counts (6.5.2)."""
MAX_REMEMBERED = 64
"""Blocks remembered of one connection."""
RESIZES = 0x20
"""How a block begins that changes the size of the table (RFC 7541, 6.3), in the upper three bits."""

T = TypeVar("T")


class HeaderFault(Exception):
    """A header block that cannot be read; the connection's state is lost with it."""


class HeaderReader(Generic[T]):
    """Reads the blocks of one direction of a connection, giving what `convert` makes of their (name, value) pairs."""

    def __init__(self, convert: Callable[[list[tuple[bytes, bytes]]], T]) -> None:
        self._convert = convert
        self._decoder = Decoder(MAX_LIST_BYTES)
        self._table = self._decoder.header_table.dynamic_entries
        self._remembered: dict[bytes, T] = {}

    def read(self, block: bytes) -> T:
        """What `block` says; raises `HeaderFault`."""
        known = self._remembered.get(block)
        if known is not None:
            return known
        table = self._table
        size, newest = len(table), table[0] if table else None
        try:
            # Its types promise an iterable; it gives a list of pairs of bytes.
            pairs: list[Any] = list(self._decoder.decode(block, raw=True))
        except HPACKError as error:
            raise HeaderFault(str(error)) from error
        result = self._convert(pairs)
        if len(table) != size or (table[0] if table else None) is not newest:
            self._remembered.clear()  # the block itself means something else the second time
        elif len(self._remembered) < MAX_REMEMBERED and block and block[0] & 0xE0 != RESIZES:
            self._remembered[block] = result
        return result


def header_block(pairs: Iterable[tuple[bytes, bytes]]) -> bytes:
    """The block for `pairs`, as literals that no table remembers (RFC 7541, 6.2.2): the same on any connection."""
    return b"".join(b"\0" + _string(name) + _string(value) for name, value in pairs)


def _string(text: bytes) -> bytes:
    """A string literal without Huffman coding (RFC 7541, 5.2)."""
    size = len(text)
    if size < 127:
        return bytes((size,)) + text
    prefix, rest = bytearray((127,)), size - 127
    while rest >= 128:
        prefix.append(rest % 128 + 128)
        rest //= 128
    prefix.append(rest)
    return bytes(prefix) + text
