"""A raw HTTP/2 client that sends whatever a test wants, wrong frames too, and reads what comes back.

RFC 9113 gives the frames, RFC 7541 (the `hpack` package) the header blocks, gRPC's PROTOCOL-HTTP2 what a call is.
"""

import asyncio
import struct
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from enum import IntEnum, IntFlag
from typing import Self

import hpack

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
MAX_WINDOW = 2**31 - 1
MAX_FRAME_BYTES = 2**14
"""What every peer takes."""
WAIT_S = 30.0
"""For an answer, or for the end of a connection."""


class Kind(IntEnum):
    """Frame types."""

    DATA = 0
    HEADERS = 1
    PRIORITY = 2
    RST_STREAM = 3
    SETTINGS = 4
    PUSH_PROMISE = 5
    PING = 6
    GOAWAY = 7
    WINDOW_UPDATE = 8
    CONTINUATION = 9


class Flag(IntFlag):
    """Frame flags; two of them share a bit, by frame type."""

    NONE = 0
    ACK = 1
    END_STREAM = 1
    END_HEADERS = 4
    PADDED = 8


class Setting(IntEnum):
    """Identifiers of SETTINGS."""

    HEADER_TABLE_SIZE = 1
    INITIAL_WINDOW_SIZE = 4
    MAX_FRAME_SIZE = 5


@dataclass(frozen=True)
class Frame:
    """One frame as it came."""

    kind: int
    flags: int
    stream: int
    payload: bytes


@dataclass
class Answer:
    """What came back on a stream."""

    headers: dict[str, str] = field(default_factory=dict)
    """Headers and trailers together."""
    data: bytes = b""
    reset: int | None = None
    """The error code, if the server reset the stream."""

    @property
    def grpc_status(self) -> int | None:
        status = self.headers.get("grpc-status")
        return None if status is None else int(status)

    @property
    def message(self) -> bytes:
        """The only gRPC message."""
        flag, length = struct.unpack_from(">BI", self.data)
        assert (flag, length) == (0, len(self.data) - 5)
        return self.data[5:]


class Gone(ConnectionError):
    """The server closed the connection."""


def frame(kind: int, flags: int, stream: int, payload: bytes = b"", *, length: int | None = None) -> bytes:
    """A frame; `length` lies about the payload's."""
    size = len(payload) if length is None else length
    return struct.pack(">I", size)[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def settings(values: dict[int, int] | None = None) -> bytes:
    payload = b"".join(struct.pack(">HI", key, value) for key, value in (values or {}).items())
    return frame(Kind.SETTINGS, Flag.NONE, 0, payload)


def window_update(stream: int, increment: int) -> bytes:
    return frame(Kind.WINDOW_UPDATE, Flag.NONE, stream, struct.pack(">I", increment))


def reset(stream: int, code: int = 8) -> bytes:
    """RST_STREAM, by default CANCEL."""
    return frame(Kind.RST_STREAM, Flag.NONE, stream, struct.pack(">I", code))


def grpc_message(message: bytes, *, compressed: int = 0, length: int | None = None) -> bytes:
    """A message behind gRPC's prefix; `length` lies."""
    return struct.pack(">BI", compressed, len(message) if length is None else length) + message


def data(stream: int, payload: bytes, *, end: bool = True) -> bytes:
    """DATA frames of a size that everybody takes."""
    parts = [payload[at : at + MAX_FRAME_BYTES] for at in range(0, len(payload), MAX_FRAME_BYTES)] or [b""]
    last = len(parts) - 1
    return b"".join(
        frame(Kind.DATA, Flag.END_STREAM if end and index == last else Flag.NONE, stream, part)
        for index, part in enumerate(parts)
    )


def call_fields(path: str, **changes: str | None) -> list[tuple[str, str]]:
    """The headers of a call. `changes` replace or (None) drop: `_path` is ":path", `content_type` "content-type"."""
    fields: dict[str, str | None] = {
        ":method": "POST",
        ":scheme": "http",
        ":path": path,
        ":authority": "localhost",
        "content-type": "application/grpc",
        "te": "trailers",
    }
    for key, value in changes.items():
        fields[key.replace("_", ":", 1) if key.startswith("_") else key.replace("_", "-")] = value
    return [(key, value) for key, value in fields.items() if value is not None]


class RawConnection:
    """A connection to "host:port". Sends its preface and SETTINGS unless told otherwise; nothing else by itself.

    Reading opens no windows and acknowledges nothing: a test does that, or leaves it.
    """

    def __init__(self, address: str, *, greet: bool = True, window: int = MAX_WINDOW) -> None:
        host, _, port = address.rpartition(":")
        self._host, self._port = host, int(port)
        self._greet = greet
        self._window = window
        self._encoder, self._decoder = hpack.Encoder(), hpack.Decoder()
        self._answers: dict[int, Answer] = {}
        self._ended: set[int] = set()
        self.goaway: int | None = None
        """The error code of the server's GOAWAY."""

    async def __aenter__(self) -> Self:
        self.reader, self.writer = await asyncio.open_connection(self._host, self._port)
        if self._greet:
            self.send(PREFACE + settings({Setting.INITIAL_WINDOW_SIZE: self._window}))
            if self._window == MAX_WINDOW:
                self.send(window_update(0, MAX_WINDOW - 65_535))
        return self

    async def __aexit__(self, *_: object) -> None:
        self.abort()

    def abort(self) -> None:
        """Drop the connection without a word."""
        self.writer.transport.abort()

    def half_close(self) -> None:
        """Say that nothing more will be sent."""
        with suppress(OSError):  # the server may have hung up already
            self.writer.write_eof()

    def send(self, *parts: bytes) -> None:
        """Hand over; `flush` waits until it is on its way. Raises `Gone`."""
        if self.writer.transport.is_closing():
            raise Gone("the server closed the connection")
        self.writer.write(b"".join(parts))

    async def flush(self) -> None:
        """Wait until what was sent is on its way; raises `Gone`."""
        try:
            async with asyncio.timeout(WAIT_S):
                await self.writer.drain()
                await asyncio.sleep(0)  # or a buffer that is never full lets nobody else run
        except ConnectionError as error:
            raise Gone("the server closed the connection") from error

    def block(self, fields: Iterable[tuple[str, str | bytes]]) -> bytes:
        """A header block; later ones depend on earlier ones, so each must be sent, in this order."""
        encoded: bytes = self._encoder.encode(fields)
        return encoded

    def headers(self, stream: int, fields: Iterable[tuple[str, str | bytes]], *, end: bool = False) -> bytes:
        flags = Flag.END_HEADERS | (Flag.END_STREAM if end else Flag.NONE)
        return frame(Kind.HEADERS, flags, stream, self.block(fields))

    def call(self, stream: int, path: str, message: bytes, **changes: str | None) -> bytes:
        """A whole unary call."""
        return self.headers(stream, call_fields(path, **changes)) + data(stream, grpc_message(message))

    async def read(self) -> Frame:
        """The next frame; raises `Gone`."""
        try:
            async with asyncio.timeout(WAIT_S):
                head = await self.reader.readexactly(9)
                payload = await self.reader.readexactly(int.from_bytes(head[:3], "big"))
        except (asyncio.IncompleteReadError, ConnectionError) as error:
            raise Gone("the server closed the connection") from error
        got = Frame(head[3], head[4], int.from_bytes(head[5:], "big") & 0x7FFFFFFF, payload)
        self._note(got)
        return got

    async def answer(self, stream: int) -> Answer:
        """What comes back on a stream, once it has ended; raises `Gone`."""
        while stream not in self._ended:
            await self.read()
        return self._answers[stream]

    async def until_gone(self) -> None:
        """Read until the server closes the connection."""
        with suppress(Gone):
            while True:
                await self.read()

    def _note(self, got: Frame) -> None:
        answer = self._answers.setdefault(got.stream, Answer())
        match got.kind:
            case Kind.HEADERS:
                assert got.flags & Flag.END_HEADERS
                decoded = self._decoder.decode(got.payload)
                answer.headers |= {str(key): str(value) for key, value in decoded}
            case Kind.DATA:
                answer.data += got.payload
            case Kind.RST_STREAM:
                answer.reset = int.from_bytes(got.payload, "big")
            case Kind.GOAWAY:
                self.goaway = int.from_bytes(got.payload[4:8], "big")
        if got.kind == Kind.RST_STREAM or (got.kind in {Kind.HEADERS, Kind.DATA} and got.flags & Flag.END_STREAM):
            self._ended.add(got.stream)
