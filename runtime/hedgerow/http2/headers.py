"""Header blocks (HPACK, RFC 7541): read with the table of the side that writes them, and written.

Callers of one connection send nearly the same blocks over and over. A block means the same as long as the table that it
points into is the same, so what it was turned into is kept until the table changes. Where a header is another one in
each call, as deadlines are, most clients change the table each time: so reading a block must be cheap, too. Names and
values are Latin-1, byte by byte, and each is decoded once, when it comes into the table.
"""

from collections import deque
from collections.abc import Callable, Iterable
from itertools import chain
from typing import Final, Generic, TypeVar

from hpack.table import HeaderTable

from hedgerow.http2 import huffman

MAX_LIST_BYTES = 16 * 2**10
"""Largest header list taken, counted as RFC 9113 counts (6.5.2)."""
MAX_REMEMBERED = 64
"""Blocks remembered of one connection."""
MAX_REMEMBERED_BYTES = 1024
"""Largest block that is remembered."""
TABLE_BYTES = 4096
"""What a table remembers, unless the two sides agree on something else (4.2)."""
ENTRY_BYTES = 32
"""What an entry counts besides its name and value (4.1)."""
MAX_INTEGER_BYTES = 5
"""Of an integer, behind the first one."""

T = TypeVar("T")
Pair = tuple[str, str]
_STATIC: Final = {
    index: (name.decode(), value.decode()) for index, (name, value) in enumerate(HeaderTable.STATIC_TABLE, 1)
}
"""The entries that every table has (appendix A), by index."""
LAST_STATIC: Final = len(_STATIC)


class HeaderFault(Exception):
    """A header block that cannot be read; the connection's state is lost with it."""


class HeaderReader(Generic[T]):
    """Reads the blocks of one direction of a connection, giving what `convert` makes of their (name, value) pairs."""

    def __init__(self, convert: Callable[[list[Pair]], T]) -> None:
        self._convert = convert
        self._table: deque[Pair] = deque()
        """The newest entry first."""
        self._used, self._limit = 0, TABLE_BYTES
        self._changed = False
        """Whether the block being read has changed the table, or its limit."""
        self._remembered: dict[bytes, T] = {}

    def read(self, block: bytes) -> T:
        """What `block` says; raises `HeaderFault`."""
        known = self._remembered.get(block)
        if known is not None:
            return known
        self._changed = False
        try:
            pairs = self._pairs(block)
        except LookupError:
            raise HeaderFault("a header block is cut off, or points beyond the table") from None
        except ValueError as error:
            raise HeaderFault(str(error)) from None
        # Only now: what was read are references, so however much they say together, they take up little.
        if ENTRY_BYTES * len(pairs) + sum(map(len, chain.from_iterable(pairs))) > MAX_LIST_BYTES:
            raise HeaderFault(f"a header list is larger than {MAX_LIST_BYTES} bytes")
        result = self._convert(pairs)
        if self._changed:
            self._remembered.clear()  # the block itself means something else the second time
        elif len(self._remembered) < MAX_REMEMBERED and len(block) <= MAX_REMEMBERED_BYTES:
            self._remembered[block] = result
        return result

    def _pairs(self, block: bytes) -> list[Pair]:
        """Raises `ValueError`, or `LookupError` at the end of the block and of the table."""
        pairs: list[Pair] = []
        static, table, at, end = _STATIC, self._table, 0, len(block)
        while at < end:
            first = block[at]
            at += 1
            if first & 0x80:  # an entry (6.1)
                index = first & 0x7F
                if index == 0x7F:
                    index, at = _integer_from(block, at, index)
                pairs.append(table[index - LAST_STATIC - 1] if index > LAST_STATIC else static[index])
                continue
            if first & 0xE0 == 0x20:  # a new size of the table (6.3)
                size = first & 0x1F
                if size == 0x1F:
                    size, at = _integer_from(block, at, size)
                if pairs or size > TABLE_BYTES:
                    raise ValueError("the size of the table changes where, or to what, it must not")
                self._limit, self._changed = size, True
                self._evict()
                continue
            largest = 0x3F if first & 0x40 else 0x0F  # a literal (6.2), to be remembered or not
            index = first & largest
            if index == largest:
                index, at = _integer_from(block, at, index)
            if index:
                name = (table[index - LAST_STATIC - 1] if index > LAST_STATIC else static[index])[0]
            else:
                name, at = _string_from(block, at)
            value, at = _string_from(block, at)
            pair = name, value
            pairs.append(pair)
            if first & 0x40:
                table.appendleft(pair)
                self._used += len(name) + len(value) + ENTRY_BYTES
                self._changed = True
                self._evict()
        return pairs

    def _evict(self) -> None:
        while self._used > self._limit:
            name, value = self._table.pop()
            self._used -= len(name) + len(value) + ENTRY_BYTES


def _string_from(block: bytes, at: int) -> tuple[str, int]:
    """The string literal at `at` (5.2), and where it ends."""
    first = block[at]
    at += 1
    size = first & 0x7F
    if size == 0x7F:
        size, at = _integer_from(block, at, size)
    end = at + size
    if end > len(block):
        raise ValueError("a string is cut off")
    text = block[at:end]
    return huffman.decode(text) if first & 0x80 else text.decode("latin-1"), end


def _integer_from(block: bytes, at: int, value: int) -> tuple[int, int]:
    """The integer that goes on at `at` because the first byte's bits, `value`, did not suffice (5.1); where it ends."""
    for shift in range(0, 7 * MAX_INTEGER_BYTES, 7):
        byte = block[at]
        at += 1
        value += (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ValueError("an integer is too long")


class HeaderWriter:
    """Writes the blocks of one direction of a connection. Pairs that come again and again are sent as their index."""

    def __init__(self) -> None:
        self._sent: dict[tuple[bytes, bytes], int] = {}
        """What is in the other side's table, with when it came there, the oldest first."""
        self._count = 0
        self._bytes = 0
        self._remembers = True
        self._written: dict[tuple[tuple[bytes, bytes], ...], bytes] = {}
        """Blocks that say all by index, by what they say; until the table changes."""

    def write(
        self,
        pairs: tuple[tuple[bytes, bytes], ...],
        once: Iterable[tuple[bytes, bytes]] = (),
        *,
        remember: bool = True,
    ) -> bytes:
        """The block for `pairs`, and for those that are not worth remembering.

        Without `remember`, from now on, the other side is asked to forget and to remember nothing.
        """
        if not (remember and self._remembers):
            forget, self._remembers = b"\x20" if self._remembers else b"", False
            return forget + header_block(pairs) + header_block(once)
        return (self._written.get(pairs) or self._write(pairs)) + header_block(once)

    def _write(self, pairs: tuple[tuple[bytes, bytes], ...]) -> bytes:
        block, count = bytearray(), self._count
        for pair in pairs:
            number = self._sent.get(pair)
            if number is None:
                block += self._add(*pair)
            else:
                block += _integer(0x80, 7, LAST_STATIC + self._count - number)
        if self._count != count:
            self._written.clear()
        elif len(self._written) < MAX_REMEMBERED:
            self._written[pairs] = bytes(block)
        return bytes(block)

    def _add(self, name: bytes, value: bytes) -> bytes:
        """A literal that the other side's table remembers (RFC 7541, 6.2.1)."""
        size = len(name) + len(value) + ENTRY_BYTES
        if size > TABLE_BYTES // 8:
            return header_block(((name, value),))
        self._bytes += size
        while self._bytes > TABLE_BYTES:
            oldest = next(iter(self._sent))
            del self._sent[oldest]
            self._bytes -= len(oldest[0]) + len(oldest[1]) + ENTRY_BYTES
        self._sent[name, value] = self._count
        self._count += 1
        return b"\x40" + _string(name) + _string(value)


def header_block(pairs: Iterable[tuple[bytes, bytes]]) -> bytes:
    """The block for `pairs`, as literals that no table remembers (RFC 7541, 6.2.2): the same on any connection."""
    return b"".join([b"\0" + _string(name) + _string(value) for name, value in pairs])


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
