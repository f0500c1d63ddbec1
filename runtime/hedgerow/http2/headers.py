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
TABLE_BYTES = 4096
"""What a table remembers, unless the two sides agree on something else (RFC 7541, 4.2)."""
LAST_STATIC = 61
"""Index of the last entry that every table has (RFC 7541, appendix A)."""
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


class HeaderWriter:
    """Writes the blocks of one direction of a connection. Pairs that come again and again are sent as their index."""

    def __init__(self) -> None:
        self._sent: dict[tuple[bytes, bytes], int] = {}
        """What is in the other side's table, with when it came there, the oldest first."""
        self._count = 0
        self._bytes = 0
        self._remembers = True

    def write(
        self, pairs: Iterable[tuple[bytes, bytes]], once: Iterable[tuple[bytes, bytes]] = (), *, remember: bool = True
    ) -> bytes:
        """The block for `pairs`, and for those that are not worth remembering.

        Without `remember`, from now on, the other side is asked to forget and to remember nothing.
        """
        if not remember:
            forget, self._remembers = b"\x20" if self._remembers else b"", False
            return forget + header_block(pairs) + header_block(once)
        block = bytearray()
        for pair in pairs:
            number = self._sent.get(pair)
            if number is None:
                block += self._add(*pair)
            else:
                block += _integer(0x80, 7, LAST_STATIC + self._count - number)
        return bytes(block) + header_block(once)

    def _add(self, name: bytes, value: bytes) -> bytes:
        """A literal that the other side's table remembers (RFC 7541, 6.2.1)."""
        size = len(name) + len(value) + 32
        if size > TABLE_BYTES // 8:
            return header_block(((name, value),))
        self._bytes += size
        while self._bytes > TABLE_BYTES:
            oldest = next(iter(self._sent))
            del self._sent[oldest]
            self._bytes -= len(oldest[0]) + len(oldest[1]) + 32
        self._sent[name, value] = self._count
        self._count += 1
        return b"\x40" + _string(name) + _string(value)


def header_block(pairs: Iterable[tuple[bytes, bytes]]) -> bytes:
    """The block for `pairs`, as literals that no table remembers (RFC 7541, 6.2.2): the same on any connection."""
    return b"".join(b"\0" + _string(name) + _string(value) for name, value in pairs)


def _string(text: bytes) -> bytes:
    """A string literal without Huffman coding (RFC 7541, 5.2)."""
    return _integer(0, 7, len(text)) + text


def _integer(first: int, bits: int, value: int) -> bytes:
    """`value` in the lower `bits` of a byte that begins like `first`, and as many more as it takes (RFC 7541, 5.1)."""
    limit = (1 << bits) - 1
    if value < limit:
        return bytes((first | value,))
    encoded, value = bytearray((first | limit,)), value - limit
    while value >= 128:
        encoded.append(value % 128 + 128)
        value //= 128
    encoded.append(value)
    return bytes(encoded)
