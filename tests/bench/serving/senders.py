"""The least of HTTP/1.1 and HTTP/2 that a load generator needs: the same request again and again, in prepared bytes.

HTTP/2 (RFC 9113) with prior knowledge and one connection: flow control both ways, no HPACK tables, headers of answers
unread. A call's answer is the body of its stream; one that was reset, or has none, is None.
"""

import asyncio
import struct
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol, Self

HOST = "127.0.0.1"
Answered = Callable[[bytes | None], None]

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
END_STREAM, ACK, END_HEADERS, PADDED = 1, 1, 4, 8
HEADER_TABLE_SIZE, ENABLE_PUSH, INITIAL_WINDOW_SIZE, MAX_FRAME_SIZE = 1, 2, 4, 5
WINDOW_BYTES = 2**31 - 1
DEFAULT_WINDOW_BYTES = 65535
DEFAULT_FRAME_BYTES = 16384
GRANT_BYTES = 2**29
"""Read bytes after which the connection's window is opened again."""
MAX_CONNECTIONS = 256
"""Of HTTP/1.1, one a request; more requests wait for one."""


class Sender(Protocol):
    """Sends its one request; `answered` is called with the body of the answer, None for a failure."""

    def send(self, answered: Answered) -> None: ...
    def close(self) -> None: ...


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """A frame of HTTP/2."""
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


class Http2(asyncio.Protocol):
    """A `Sender` over one connection of HTTP/2."""

    def __init__(self, path: str, headers: Sequence[tuple[str, str]], body: bytes) -> None:
        fields = ((":method", "POST"), (":scheme", "http"), (":path", path), (":authority", HOST), *headers)
        self._headers = b"".join(_literal(name, value) for name, value in fields)
        self._body = body
        self._transport: asyncio.Transport | None = None
        self._buffer = bytearray()
        self._next = 1
        self._calls: dict[int, tuple[Answered, bytearray]] = {}
        self._unsent: deque[int] = deque()
        self._sent: dict[int, int] = {}
        self._stream_windows: dict[int, int] = {}
        self._window = DEFAULT_WINDOW_BYTES
        self._initial_window = DEFAULT_WINDOW_BYTES
        self._frame_bytes = DEFAULT_FRAME_BYTES
        self._ungranted = 0

    @classmethod
    async def connect(cls, port: int, path: str, headers: Sequence[tuple[str, str]], body: bytes) -> Self:
        """Connected to `port`."""
        loop = asyncio.get_running_loop()
        _, protocol = await loop.create_connection(lambda: cls(path, headers, body), HOST, port)
        return protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        settings = ((HEADER_TABLE_SIZE, 0), (ENABLE_PUSH, 0), (INITIAL_WINDOW_SIZE, WINDOW_BYTES))
        payload = b"".join(struct.pack(">HI", *setting) for setting in settings)
        grant = struct.pack(">I", WINDOW_BYTES - DEFAULT_WINDOW_BYTES)
        transport.write(PREFACE + frame(SETTINGS, 0, 0, payload) + frame(WINDOW_UPDATE, 0, 0, grant))

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        calls, self._calls = self._calls, {}
        for answered, _ in calls.values():
            answered(None)

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def send(self, answered: Answered) -> None:
        if self._transport is None:
            answered(None)
            return
        stream, self._next = self._next, self._next + 2
        self._calls[stream] = (answered, bytearray())
        self._stream_windows[stream] = self._initial_window
        self._sent[stream] = 0
        head = frame(HEADERS, END_HEADERS, stream, self._headers)
        self._unsent.append(stream)
        self._transport.write(head + self._sendable() if self._unsent[0] == stream else head)

    def _sendable(self) -> bytes:
        """Frames of bodies that the windows let pass now, first come first."""
        frames = []
        for _ in range(len(self._unsent)):
            stream = self._unsent.popleft()
            if stream not in self._sent:
                continue
            sent, size = self._sent[stream], len(self._body)
            while sent < size:
                room = min(self._window, self._stream_windows[stream], self._frame_bytes, size - sent)
                if room <= 0:
                    break
                flags = END_STREAM if sent + room == size else 0
                frames.append(frame(DATA, flags, stream, self._body[sent : sent + room]))
                sent += room
                self._window -= room
                self._stream_windows[stream] -= room
            self._sent[stream] = sent
            if sent < size:
                self._unsent.append(stream)
        return b"".join(frames)

    def data_received(self, data: bytes) -> None:
        buffer = self._buffer
        buffer += data
        start = 0
        while len(buffer) - start >= 9:
            end = start + 9 + int.from_bytes(buffer[start : start + 3], "big")
            if len(buffer) < end:
                break
            kind, flags = buffer[start + 3], buffer[start + 4]
            stream = int.from_bytes(buffer[start + 5 : start + 9], "big") & WINDOW_BYTES
            self._received(kind, flags, stream, buffer[start + 9 : end])
            start = end
        del buffer[:start]

    def _received(self, kind: int, flags: int, stream: int, payload: bytearray) -> None:
        if kind == DATA:
            self._ungranted += len(payload)
            if self._ungranted > GRANT_BYTES:
                self._write(frame(WINDOW_UPDATE, 0, 0, struct.pack(">I", self._ungranted)))
                self._ungranted = 0
            if stream in self._calls:
                self._calls[stream][1].extend(payload[1 : len(payload) - payload[0]] if flags & PADDED else payload)
        if kind in {DATA, HEADERS} and flags & END_STREAM:
            self._done(stream, failed=False)
        elif kind == RST_STREAM:
            self._done(stream, failed=True)
        elif kind == SETTINGS and not flags & ACK:
            for name, value in struct.iter_unpack(">HI", payload):
                if name == INITIAL_WINDOW_SIZE:
                    for open_stream in self._stream_windows:
                        self._stream_windows[open_stream] += value - self._initial_window
                    self._initial_window = value
                elif name == MAX_FRAME_SIZE:
                    self._frame_bytes = value
            self._write(frame(SETTINGS, ACK, 0) + self._sendable())
        elif kind == PING and not flags & ACK:
            self._write(frame(PING, ACK, 0, bytes(payload)))
        elif kind == WINDOW_UPDATE:
            grant = int.from_bytes(payload, "big")
            if not stream:
                self._window += grant
            elif stream in self._stream_windows:
                self._stream_windows[stream] += grant
            if self._unsent:
                self._write(self._sendable())
        elif kind == GOAWAY:
            self.close()

    def _done(self, stream: int, *, failed: bool) -> None:
        call = self._calls.pop(stream, None)
        self._sent.pop(stream, None)
        self._stream_windows.pop(stream, None)
        if call is not None:
            call[0](bytes(call[1]) if call[1] and not failed else None)

    def _write(self, data: bytes) -> None:
        if self._transport is not None and data:
            self._transport.write(data)


class _Connection(asyncio.Protocol):
    """One connection of HTTP/1.1: a request at a time. `free` is called when the next may come."""

    def __init__(self, free: Callable[["_Connection"], None]) -> None:
        self._free = free
        self.transport: asyncio.Transport | None = None
        self.answered: Answered | None = None
        self._buffer = bytearray()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        self.transport = None
        self._end(None)

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        head, found, rest = self._buffer.partition(b"\r\n\r\n")
        if not found:
            return
        status = head.split(b" ", 2)[1]
        lines = head.lower().split(b"\r\n")
        length = next((int(line[15:]) for line in lines if line.startswith(b"content-length:")), None)
        if length is None:  # nobody here streams
            if self.transport is not None:
                self.transport.abort()
        elif len(rest) >= length:
            self._buffer.clear()
            self._end(bytes(rest[:length]) if status == b"200" else None)

    def _end(self, answer: bytes | None) -> None:
        answered, self.answered = self.answered, None
        if answered is not None:
            answered(answer)
        self._free(self)


class Http1:
    """A `Sender` over many connections of HTTP/1.1."""

    def __init__(self, path: str, headers: Sequence[tuple[str, str]], body: bytes) -> None:
        lines = [f"POST {path} HTTP/1.1", f"host: {HOST}", f"content-length: {len(body)}"]
        lines += [f"{name}: {value}" for name, value in headers]
        self._request = ("\r\n".join(lines) + "\r\n\r\n").encode() + body
        self._connections: list[_Connection] = []
        self._idle: list[_Connection] = []
        self._waiting: deque[Answered] = deque()

    @classmethod
    async def connect(cls, port: int, path: str, headers: Sequence[tuple[str, str]], body: bytes) -> Self:
        """With all connections made."""
        sender = cls(path, headers, body)
        loop = asyncio.get_running_loop()
        for _ in range(MAX_CONNECTIONS):
            _, connection = await loop.create_connection(lambda: _Connection(sender._free), HOST, port)
            sender._connections.append(connection)
            sender._idle.append(connection)
        return sender

    def send(self, answered: Answered) -> None:
        while self._idle:
            connection = self._idle.pop()
            if connection.transport is not None:
                connection.answered = answered
                connection.transport.write(self._request)
                return
        if all(connection.transport is None for connection in self._connections):
            answered(None)
        else:
            self._waiting.append(answered)

    def close(self) -> None:
        self._waiting.clear()
        for connection in self._connections:
            if connection.transport is not None:
                connection.transport.abort()

    def _free(self, connection: _Connection) -> None:
        self._idle.append(connection)
        if self._waiting:
            self.send(self._waiting.popleft())


def _literal(name: str, value: str) -> bytes:
    """A header field in HPACK, by name and value in plain letters, to be kept out of tables (RFC 7541, 6.2.2)."""
    return b"\0" + b"".join(_text(text.encode()) for text in (name, value))


def _text(text: bytes) -> bytes:
    assert len(text) < 127
    return bytes([len(text)]) + text
