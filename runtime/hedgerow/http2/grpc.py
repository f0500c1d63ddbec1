"""gRPC's use of HTTP/2 (PROTOCOL-HTTP2.md of the gRPC project): messages in data, headers, statuses. No IO."""

import re
import zlib
from collections.abc import Iterable, Sequence
from io import BytesIO
from typing import Final
from urllib.parse import unquote_to_bytes

from hedgerow.errors import InvalidInput, Overloaded, Unsupported
from hedgerow.wire import PIECE_BYTES, Serialised, joined, size_of

PREFIX_BYTES: Final = 5
"""Before each message: whether it is compressed, and its length."""
ENCODINGS: Final = {"gzip": 31, "deflate": 15}
"""Compressions that we read, with zlib's `wbits` for them."""
MIN_COMPRESSED_BYTES: Final = 1024
"""Smaller messages are sent as they are."""
GROWTH: Final = 4
"""Times what has come of a message, there is room for it at most: its length alone is only a claim."""
_UNITS: Final = {"H": 3600.0, "M": 60.0, "S": 1.0, "m": 1e-3, "u": 1e-6, "n": 1e-9}
_TIMEOUT: Final = re.compile(r"(\d{1,8})([HMSmun])")


def parse_timeout(text: str) -> float:
    """The seconds in a `grpc-timeout`; raises `InvalidInput`."""
    match = _TIMEOUT.fullmatch(text)
    if match is None:
        raise InvalidInput(f"grpc-timeout is {text[:20]!r}; expected up to eight digits and one of H, M, S, m, u, n")
    return int(match[1]) * _UNITS[match[2]]


def format_timeout(seconds: float) -> str:
    """A `grpc-timeout` of at most `seconds`, and at most one percent less: three digits, so that headers repeat."""
    count, zeros = max(1, int(seconds * 1e6)), 0
    while count >= 1000:
        count, zeros = count // 10, zeros + 1
    units, zeros = min(zeros // 3, 2), zeros - 3 * min(zeros // 3, 2)
    return f"{count}{'0' * zeros}{'umS'[units]}" if zeros <= 5 else "99999999S"


def quote(text: str) -> bytes:
    """A `grpc-message`: UTF-8, what is not printable ASCII percent-encoded."""
    if text.isascii() and text.isprintable() and "%" not in text:
        return text.encode()
    return b"".join(
        b"%c" % byte if 0x20 <= byte <= 0x7E and byte != 0x25 else b"%%%02X" % byte
        for byte in text.encode(errors="replace")
    )


def unquote(text: bytes) -> str:
    """What a `grpc-message` says, as far as it can be read."""
    return unquote_to_bytes(text).decode(errors="replace")


def frame_message(message: Serialised, encoding: str = "") -> Serialised:
    """`message` with its prefix, compressed where that is asked for and pays."""
    if encoding:
        return _compressed(joined(message), encoding)
    prefix = b"\0" + size_of(message).to_bytes(4)
    if not isinstance(message, bytes):
        return [prefix, *message]
    return prefix + message if len(message) < PIECE_BYTES else [prefix, message]


def _compressed(message: bytes, encoding: str) -> bytes:
    if len(message) >= MIN_COMPRESSED_BYTES:
        packer = zlib.compressobj(level=1, wbits=ENCODINGS[encoding])
        packed = packer.compress(message) + packer.flush()
        if len(packed) < len(message):
            return b"\1" + len(packed).to_bytes(4) + packed
    return b"\0" + len(message).to_bytes(4) + message


class MessageReader:
    """Puts messages together from the data of a stream. Holds at most one that is incomplete.

    `limit` bounds a message, compressed or not; `encoding` is the stream's `grpc-encoding`.
    """

    __slots__ = ("_compressed", "_encoding", "_have", "_limit", "_message", "_prefix", "_room", "_size")

    def __init__(self, limit: int, encoding: str = "") -> None:
        self._limit = limit
        self._encoding = encoding
        self._prefix = b""
        self._size = -1
        """Of the message that has begun."""
        self._have = 0
        self._message = BytesIO()
        self._room = 0
        """What the incomplete message has of memory."""
        self._compressed = False

    @property
    def held(self) -> int:
        """Bytes that the incomplete message takes up."""
        return self._room + len(self._prefix)

    def feed(self, parts: Sequence[bytes | memoryview], size: int) -> Iterable[bytes]:
        """The messages that `parts`, of `size` bytes, complete.

        Raises `Overloaded` (too large), `Unsupported`, `InvalidInput`.
        """
        if self._size < 0:
            # The usual case: one whole message in one part.
            part = parts[0]
            if len(parts) == 1 and not self._prefix and size >= PREFIX_BYTES and part[0] == 0:
                length = int.from_bytes(part[1:PREFIX_BYTES])
                if size == PREFIX_BYTES + length and length <= self._limit:
                    return (bytes(part[PREFIX_BYTES:]),)
        elif self._have + size <= self._size:  # amid a large one
            return self._keep(parts, size)
        return [message for part in parts for message in self._feed(part)]

    def _feed(self, part: bytes | memoryview) -> Iterable[bytes]:
        while part:
            if self._size < 0:
                missing = PREFIX_BYTES - len(self._prefix)
                self._prefix += bytes(part[:missing])
                part = part[missing:]
                if len(self._prefix) < PREFIX_BYTES:
                    return
                self._begin()
            taken = part[: self._size - self._have]
            part = part[len(taken) :]
            yield from self._keep((taken,), len(taken))

    def _begin(self) -> None:
        flag, size = self._prefix[0], int.from_bytes(self._prefix[1:])
        if flag > 1:
            raise InvalidInput(f"a message begins with {flag}; expected 0 or 1")
        if flag and self._encoding not in ENCODINGS:
            raise Unsupported(f"a message is compressed by {self._encoding or 'nothing'!r}; expected gzip or deflate")
        self._check(size)
        self._compressed, self._size = bool(flag), size

    def _keep(self, parts: Sequence[bytes | memoryview], size: int) -> Iterable[bytes]:
        """The message, if `parts` complete it."""
        have, message = self._have + size, self._message
        if have > self._room:
            self._room = min(self._size, GROWTH * have)
            if have < self._room:  # by itself it would grow, and be copied, for each part
                message.seek(self._room - 1)
                message.write(b"\0")
                message.seek(self._have)
        message.writelines(parts)
        self._have = have
        if have < self._size:
            return ()
        whole = message.getvalue()  # what is in there, not a copy
        self._message, self._prefix, self._size, self._have, self._room = BytesIO(), b"", -1, 0, 0
        return (self._unpacked(whole) if self._compressed else whole,)

    def _unpacked(self, message: bytes) -> bytes:
        unpacker = zlib.decompressobj(ENCODINGS[self._encoding])
        try:
            plain = unpacker.decompress(message, self._limit + 1)
        except zlib.error as error:
            raise InvalidInput(f"a message is not {self._encoding}: {error}") from error
        self._check(len(plain))
        if not unpacker.eof:
            raise InvalidInput(f"a message in {self._encoding} is cut off")
        return plain

    def _check(self, size: int) -> None:
        if size > self._limit:
            raise Overloaded(f"Received message larger than max ({size} vs. {self._limit})")  # as gRPC itself says it
