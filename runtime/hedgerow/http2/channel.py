"""A gRPC client of our own on asyncio: one address, calls from bytes to bytes.

grpc.aio spends several times what a small call is worth on making it; here a call is a few frames in a write that it
may share with others. Calls go over one connection at a time: one that breaks or says goodbye is replaced by the next
call, and finishes what it can.
"""

import asyncio
import re
import ssl
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from functools import lru_cache, partial
from typing import Final

import grpc

from hedgerow import rpc
from hedgerow.errors import DeadlineExceeded, EngineFault, HedgerowError, InvalidInput, Overloaded, Unavailable
from hedgerow.http2.frames import Code, ConnectionFault
from hedgerow.http2.grpc import MessageReader, format_timeout, frame_message, unquote
from hedgerow.http2.headers import MAX_REMEMBERED, TABLE_BYTES, HeaderWriter
from hedgerow.http2.sockets import SocketConnection, new_space
from hedgerow.http2.stream import Stream
from hedgerow.wire import Serialised

MAX_STREAMS = 1000
"""Calls at once that we make before the server has said how many it takes."""
MAX_ANSWERS_AHEAD = 64
"""Answers of a stream that wait for who asked; more are not let in by the window."""
KEEPALIVE_S = 310.0
"""Silence, with calls in flight, after which the server is asked whether it is there. Stock gRPC servers hang up on
clients that ask more often than every five minutes; calls have deadlines besides."""
CANNOT_CONNECT: Final = "cannot connect"
GIVEN_UP: Final = "the connection was given up"

Metadata = Sequence[tuple[str, str]]
_NAME: Final = re.compile(r"[0-9a-z_.-]+")
_STATUSES: Final = {status.value[0]: status for status in grpc.StatusCode}
_HTTP: Final = {
    "401": grpc.StatusCode.UNAUTHENTICATED,
    "403": grpc.StatusCode.PERMISSION_DENIED,
    "404": grpc.StatusCode.UNIMPLEMENTED,
    "429": grpc.StatusCode.UNAVAILABLE,
    "502": grpc.StatusCode.UNAVAILABLE,
    "503": grpc.StatusCode.UNAVAILABLE,
    "504": grpc.StatusCode.UNAVAILABLE,
}
"""What answers that are none of gRPC mean (http-grpc-status-mapping.md of the gRPC project)."""
_Pairs = dict[str, str]


class Channel:
    """Calls to one address ("host:port"). Belongs to one event loop; raises the errors of `hedgerow.errors`.

    `metadata` goes with every call, for hardly more than nothing: the server's table remembers it.
    """

    def __init__(
        self,
        host: str,
        port: int,
        *,
        authority: str = "",
        tls: ssl.SSLContext | None = None,
        connect_timeout_s: float,
        max_message_bytes: int,
        metadata: Metadata = (),
    ) -> None:
        self._metadata = _encoded(metadata)
        self.max_message_bytes = max_message_bytes
        self._host, self._port = host, port
        self._authority = authority or rpc.address(host, port)
        self._tls = tls
        self._connect_timeout_s = connect_timeout_s
        self._connection: _Connection | None = None
        self._connecting: asyncio.Task[None] | None = None
        self._closed = False
        self._scheme = "https" if tls else "http"
        self.space = new_space()
        """For the connection to read into."""

    @property
    def standing(self) -> bool:
        """Whether a call would go out at once. Asking also starts what is needed to get there."""
        if self._connection is not None and not self._connection.closing:
            return True
        if not self._closed:
            self._connect()
        return False

    async def ready(self) -> None:
        """Wait until it stands; raises `ConnectionError` if it cannot be had."""
        if self._closed:
            raise ConnectionError(GIVEN_UP)
        if not self.standing:
            await asyncio.shield(self._connect())
            if not self.standing:  # it came and went
                raise ConnectionError(CANNOT_CONNECT)

    async def unary(self, path: str, request: Serialised, timeout_s: float, metadata: Metadata = ()) -> bytes:
        """The answer to one call; cancelling it cancels the work at the other end."""
        connection = await self._standing()
        stream = await connection.open(path, request, timeout_s, metadata)
        try:
            await stream.done
        finally:
            if not stream.done.done() or stream.done.cancelled():
                connection.reset(stream, Code.CANCEL)
        if len(stream.answers) != 1:
            raise EngineFault(f"expected one answer, got {len(stream.answers)}")
        return stream.answers[0]

    async def stream(
        self, path: str, request: Serialised, timeout_s: float, metadata: Metadata = ()
    ) -> AsyncGenerator[bytes, None]:
        """The answers to one request of a streaming method; closing the generator cancels the call."""
        connection = await self._standing()
        stream = await connection.open(path, request, timeout_s, metadata)
        try:
            while True:
                while stream.answers:
                    yield stream.answers.popleft()
                    connection.taken(stream)
                if stream.done.done():
                    stream.done.result()
                    return
                stream.news.clear()
                await stream.news.wait()
        finally:
            if stream.done.done():
                stream.done.exception()
            connection.reset(stream, Code.CANCEL)

    async def close(self) -> None:
        """Close it; calls on it fail with `Unavailable`."""
        self._closed = True
        if self._connecting is not None:
            self._connecting.cancel()
        connection, self._connection = self._connection, None  # they would keep each other
        if connection is not None:
            connection.close()

    async def _standing(self) -> "_Connection":
        try:
            await self.ready()
        except ConnectionError as error:
            raise Unavailable(str(error)) from error
        assert self._connection is not None
        return self._connection

    def _connect(self) -> asyncio.Task[None]:
        """The attempt to connect that is being made, for whoever waits for it."""
        if self._connecting is None or self._connecting.done():
            # Not in a TaskGroup: it belongs to the channel, whose `close` ends it; who waits for it hears how it ended.
            self._connecting = asyncio.get_running_loop().create_task(self._connect_once())
            self._connecting.add_done_callback(lambda task: task.cancelled() or task.exception())
        return self._connecting

    async def _connect_once(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self._connect_timeout_s):
                _, connection = await loop.create_connection(
                    partial(_Connection, loop, self),
                    self._host,
                    self._port,
                    ssl=self._tls,
                    server_hostname=self._authority.rpartition(":")[0].strip("[]") if self._tls else None,
                )
                try:
                    await connection.settled
                except BaseException:
                    connection.close()
                    raise
        except (OSError, ConnectionFault, HedgerowError) as error:
            raise ConnectionError(CANNOT_CONNECT) from error
        if self._closed:
            connection.close()
            raise ConnectionError(GIVEN_UP)
        self._connection = connection

    def head(self, path: str) -> tuple[tuple[bytes, bytes], ...]:
        """What the headers of every call to `path` begin with."""
        return (
            (b":method", b"POST"),
            (b":scheme", self._scheme.encode()),
            (b":path", path.encode()),
            (b":authority", self._authority.encode()),
            (b"te", b"trailers"),
            (b"content-type", b"application/grpc"),
            (b"grpc-accept-encoding", b"identity,gzip,deflate"),
            *self._metadata,
        )


class _Stream(Stream):
    """A call, and what has come of it."""

    __slots__ = ("answers", "done", "encoding", "headers", "news", "reader", "withheld")

    def __init__(self, identity: int, window: int, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(identity, window)
        self.headers: _Pairs = {}
        """Those that came last: the status is among them at the end."""
        self.encoding = ""
        self.reader: MessageReader | None = None
        self.answers: deque[bytes] = deque()
        self.withheld = 0
        self.news = asyncio.Event()
        self.done: asyncio.Future[None] = loop.create_future()

    def end(self, error: HedgerowError | None) -> None:
        """The call is over."""
        if not self.done.done():
            if error is None:
                self.done.set_result(None)
            else:
                self.done.set_exception(error)
        self.news.set()


class _Connection(SocketConnection[_Stream, _Pairs]):
    """One connection to the server."""

    def __init__(self, loop: asyncio.AbstractEventLoop, channel: Channel) -> None:
        super().__init__(client=True, convert=dict, max_streams=MAX_STREAMS)
        self.settled: asyncio.Future[None] = loop.create_future()
        self._loop = loop
        self._channel = channel
        self._space = channel.space
        self._writer = HeaderWriter()
        self._heads: dict[str, tuple[tuple[bytes, bytes], ...]] = {}
        self._waiting: deque[asyncio.Future[None]] = deque()
        """Calls for which the server has no room yet."""

    async def open(self, path: str, request: Serialised, timeout_s: float, metadata: Metadata) -> _Stream:
        """A call that is on its way."""
        said = _encoded(metadata)
        deadline = self._loop.time() + timeout_s
        while len(self.streams) >= self._max_streams and not self.closing:
            room = self._loop.create_future()
            self._waiting.append(room)
            try:
                async with asyncio.timeout_at(deadline):
                    await room
            except TimeoutError:
                raise DeadlineExceeded("the deadline passed before the server had room for the call") from None
        if self.closing or self._transport is None:
            raise Unavailable(GIVEN_UP)
        head = self._heads.get(path)
        if head is None:
            head = self._heads[path] = self._channel.head(path)
        timeout = format_timeout(max(0.0, deadline - self._loop.time()))
        stream = _Stream(self.next_id(), self.initial_window, self._loop)
        self.streams[stream.id] = stream
        self.watch(stream, deadline)
        once = [(b"grpc-timeout", timeout.encode()), *said]
        # A table smaller than every side's own is not worth keeping a second one in step with.
        block = self._writer.write(head, once, remember=self.table_bytes >= TABLE_BYTES)
        self.send(stream, block, frame_message(request), b"")
        return stream

    def taken(self, stream: _Stream) -> None:
        """An answer of `stream` was taken."""
        if stream.withheld and len(stream.answers) < MAX_ANSWERS_AHEAD:
            self.grant(stream, stream.withheld)
            stream.withheld = 0

    # The socket's side.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See `asyncio.BufferedProtocol`."""
        super().connection_made(transport)
        self._timer = self._loop.call_later(KEEPALIVE_S, self._look)

    def buffer_updated(self, size: int) -> None:
        """See `asyncio.BufferedProtocol`."""
        super().buffer_updated(size)
        if self._settled and not self.settled.done():
            self.settled.set_result(None)
        if self.closing and not self.streams:
            self.close()

    def connection_lost(self, error: Exception | None) -> None:
        """See `asyncio.BufferedProtocol`."""
        super().connection_lost(error)
        if not self.settled.done():
            self.settled.set_exception(ConnectionError(CANNOT_CONNECT))
            self.settled.exception()
        self._make_room()

    def close(self) -> None:
        """Hang up."""
        if self._transport is not None and not self.closing:
            self.say_goodbye()
        super().close()
        self.closing = True
        for stream in tuple(self.streams.values()):
            self._drop(stream)

    def _look(self) -> None:
        """Now and then: is the server there?"""
        if self._silent(asks=bool(self.streams)):
            self.abort()
            return
        self._timer = self._loop.call_later(KEEPALIVE_S, self._look)

    # The calls' side.

    def on_headers(self, stream: _Stream, headers: _Pairs) -> None:
        """See `Connection`."""
        if stream.reader is None and "grpc-status" not in headers and headers.get(":status", "200") == "200":
            stream.encoding = headers.get("grpc-encoding", "identity")
            stream.reader = MessageReader(self._channel.max_message_bytes, stream.encoding)
        stream.headers = headers

    def on_data(self, stream: _Stream, parts: Sequence[bytes | memoryview], size: int) -> None:
        """See `Connection`."""
        if stream.reader is None:
            return  # a page of some proxy's: its status says all
        try:
            stream.answers.extend(stream.reader.feed(parts, size))
        except HedgerowError as error:
            fault = Overloaded(str(error)) if isinstance(error, Overloaded) else EngineFault(str(error))
            stream.end(fault)
            self.reset(stream, Code.CANCEL)
            return
        stream.news.set()
        if len(stream.answers) < MAX_ANSWERS_AHEAD:
            self.grant(stream, size)
        else:
            stream.withheld += size

    def on_end(self, stream: _Stream) -> None:
        """See `Connection`."""
        stream.end(_fault(stream.headers))
        if not stream.finished:  # it did not want to hear the rest
            self.reset(stream, Code.CANCEL)

    def on_gone(self, stream: _Stream) -> None:
        """See `Connection`."""
        stream.end(Unavailable("the call was cut off" if self._transport is not None else GIVEN_UP))
        self._make_room()

    def _make_room(self) -> None:
        while self._waiting and (self.closing or len(self.streams) < self._max_streams):
            room = self._waiting.popleft()
            if not room.done():
                room.set_result(None)
                if not self.closing:
                    return

    def on_expired(self, stream: _Stream) -> None:
        """See `SocketConnection`."""
        stream.end(DeadlineExceeded("the deadline passed without an answer"))
        self.reset(stream, Code.CANCEL)


def _encoded(metadata: Metadata) -> list[tuple[bytes, bytes]]:
    """`metadata` as it is sent; raises `InvalidInput` for what gRPC does not take for a name or a value.

    The message does not say the value, which may be a secret.
    """
    for name, value in metadata:
        if not _is_name(name):
            raise InvalidInput(
                f"metadata {name[:40]!r}: expected a name of lower-case letters, digits, '_', '-' and '.'"
            )
        if not (value.isascii() and value.isprintable()):
            raise InvalidInput(f"metadata {name!r}: expected a value of printable ASCII")
    return [(name.encode(), value.encode()) for name, value in metadata]


@lru_cache(MAX_REMEMBERED)
def _is_name(name: str) -> bool:
    return _NAME.fullmatch(name) is not None


def _fault(headers: _Pairs) -> HedgerowError | None:
    """What went wrong, by the last headers of a call; None if nothing did."""
    said = headers.get("grpc-status", "")
    if said == "0":
        return None
    status = _STATUSES.get(int(said)) if said.isdecimal() and len(said) < 4 else None
    text = unquote(headers.get("grpc-message", "").encode("latin-1"))
    if status is None:
        http = headers.get(":status", "")
        status = _HTTP.get(http, grpc.StatusCode.UNKNOWN)
        text = text or (f"the server answered with HTTP status {http}" if http else "the answer has no status")
    return rpc.failed(status, text, headers.get(rpc.PUSHBACK_KEY, ""))
