"""A gRPC server of our own on asyncio: the rules of `hedgerow.http2`, sockets, calls and their limits.

grpc.aio spends some twenty times on carrying a small call what answering it costs. Here a burst of calls that came in
one read is taken apart in one go and their answers leave in one write.

What is held of a call: its message while it comes (all of them together within `ServerSettings.max_buffered_bytes`),
its task, its answer until the caller has read it. Callers that stop reading, sending or answering pings are let go.
"""

import asyncio
import contextlib
import ssl
import time
from collections.abc import AsyncIterator, Sequence
from functools import partial
from typing import Final

from hedgerow import rpc
from hedgerow.backend import Deadline
from hedgerow.config import ServerSettings
from hedgerow.errors import (
    ConfigError,
    DeadlineExceeded,
    HedgerowError,
    InvalidInput,
    Overloaded,
    Unavailable,
    Unsupported,
)
from hedgerow.http2.frames import Code
from hedgerow.http2.grpc import MessageReader, frame_message, quote
from hedgerow.http2.headers import header_block
from hedgerow.http2.heads import Head, read_head
from hedgerow.http2.shedding import Shedding
from hedgerow.http2.sockets import SocketConnection, new_space
from hedgerow.http2.stream import Stream
from hedgerow.identity import name_of_peer
from hedgerow.lifecycle import InFlight
from hedgerow.rpc import Method, Methods
from hedgerow.wire import Serialised

MAX_STREAMS = 512
"""Calls at once on one connection; more wait at the client, as HTTP/2 has it, so that none can hold all calls."""
GOODBYE_S = 1.0
"""How long clients may take to hang up once they were told goodbye and have all their answers."""
MAX_UNSENT_BYTES = 2**20
"""Of a stream of answers that the caller has not read; the next answer waits."""
HANDSHAKE_S = 20.0
"""Within which a new connection must begin to speak HTTP/2."""
BACKLOG = 1024
RETRY_AFTER_S = 1.0
_HEADERS: Final = ((b":status", b"200"), (b"content-type", b"application/grpc"))
_OK_HEADERS: Final = header_block((*_HEADERS, (b"grpc-accept-encoding", b"identity,gzip,deflate")))
_OK_TRAILERS: Final = header_block(((b"grpc-status", b"0"),))
_TOO_BUSY: Final = header_block(
    (
        *_HEADERS,
        (b"grpc-status", b"%d" % Overloaded.status.value[0]),
        (b"grpc-message", b"the server is too busy to answer before the deadline"),
        (rpc.PUSHBACK_KEY.encode(), b"%d" % (RETRY_AFTER_S * 1000)),
    )
)


async def listen(methods: Methods, settings: ServerSettings) -> "NativeListener":
    """See `Transport`."""
    listener = NativeListener(methods, settings)
    try:
        await listener.start()
    except OSError as error:
        wanted = rpc.address(settings.host, settings.port)
        raise ConfigError(f"server.host, server.port: cannot listen on {wanted}: {error.strerror}") from error
    return listener


class NativeListener:
    """See `Listener`."""

    def __init__(self, methods: Methods, settings: ServerSettings) -> None:
        self.methods = methods
        self.settings = settings
        self.port = 0
        self.calls = InFlight()
        self.buffered = 0
        """Bytes of messages that are not all there."""
        self.connections: set[_Connection] = set()
        self.space = new_space()
        """For the connections to read into."""
        self.shedding = Shedding(self.calls)
        self._left = asyncio.Event()
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        """Listen."""
        loop, settings = asyncio.get_running_loop(), self.settings
        self._server = await loop.create_server(
            lambda: _Connection(self, loop),
            settings.host,
            settings.port,
            backlog=BACKLOG,
            reuse_port=settings.reuse_port,  # or a second server would take half of the calls unnoticed
            ssl=_tls(settings),
        )
        self.port = self._server.sockets[0].getsockname()[1]

    def forget(self, connection: "_Connection") -> None:
        """That one has ended."""
        self.connections.discard(connection)
        self._left.set()

    async def _alone(self, timeout_s: float) -> None:
        """Wait until no connection is left, at most `timeout_s`."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while self.connections:
                    self._left.clear()
                    await self._left.wait()

    async def stop(self, grace_s: float) -> None:
        """See `Listener`."""
        server, self._server = self._server, None
        if server is None:
            return
        server.close()
        for connection in tuple(self.connections):
            connection.say_goodbye()
        deadline = Deadline.after(grace_s)
        if await self.calls.idle(grace_s):
            await self._alone(
                min(GOODBYE_S, deadline.remaining)
            )  # who hangs up first loses nothing that it still sends
        for connection in tuple(self.connections):
            connection.close()
        await self._alone(GOODBYE_S)  # over TLS the goodbye takes a while
        for connection in tuple(self.connections):
            connection.abort()
        self.shedding.close()
        await server.wait_closed()


class _Stream(Stream):
    """A call, in the form that handlers see: `rpc.Call`."""

    __slots__ = (
        "_connection",
        "_room",
        "begins",
        "begun",
        "buffered",
        "deadline",
        "encoding",
        "messages",
        "metadata",
        "method",
        "moved",
        "reader",
        "task",
        "withheld",
    )

    def __init__(self, identity: int, connection: "_Connection", method: Method, head: Head, limit: int) -> None:
        super().__init__(identity, connection.initial_window)
        self._connection = connection
        self._room: asyncio.Future[None] | None = None
        self.method = method
        self.metadata = head.metadata
        self.deadline = Deadline(time.monotonic() + head.timeout_s)
        self.encoding = head.answer_in
        self.reader = MessageReader(limit, head.encoding)
        self.buffered = 0
        """What the reader held when it was last looked at."""
        self.messages: asyncio.Queue[bytes | None] | None = asyncio.Queue() if method.client_streaming else None
        self.withheld = 0
        """What the caller has sent and may not send again before the messages that wait are taken."""
        self.begins = False
        """Whether its method has been called, or will be when all is taken apart that came with it;"""
        self.begun = False
        """whether headers were sent."""
        self.moved = True
        """Whether data came or went since somebody looked."""
        self.task: asyncio.Task[None] | None = None

    @property
    def peer(self) -> str:
        """See `rpc.Call`."""
        return self._connection.peer

    async def write(self, message: bytes) -> None:
        """See `rpc.Call`."""
        self._connection.answer(self, message)
        while self.unsent_bytes > MAX_UNSENT_BYTES:
            self._room = asyncio.get_running_loop().create_future()
            await self._room

    def sent(self) -> None:
        """There may be room now."""
        self.moved = True
        if self._room is not None and not self._room.done():
            self._room.set_result(None)

    async def received(self) -> AsyncIterator[bytes]:
        """The messages of a stream of requests."""
        assert self.messages is not None
        while (message := await self.messages.get()) is not None:
            if self.messages.empty() and self.withheld:
                self._connection.grant(self, self.withheld)
                self.withheld = 0
            yield message


class _Connection(SocketConnection[_Stream, Head]):
    """One client."""

    def __init__(self, listener: NativeListener, loop: asyncio.AbstractEventLoop) -> None:
        convert = partial(read_head, listener.settings.compression)
        super().__init__(client=False, convert=convert, max_streams=MAX_STREAMS)
        self._listener = listener
        self._space = listener.space
        self._loop = loop
        self._starting: list[tuple[_Stream, bytes | AsyncIterator[bytes]]] = []
        self.peer = ""
        """The name in the client's certificate, which was verified."""

    # The socket's side.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See `asyncio.BufferedProtocol`."""
        super().connection_made(transport)
        self.peer = name_of_peer(transport.get_extra_info("peercert"))
        if len(self._listener.connections) >= self._listener.settings.max_connections:
            self.abort()
            return
        self._listener.connections.add(self)
        self._timer = self._loop.call_later(HANDSHAKE_S, self._look)

    def buffer_updated(self, size: int) -> None:
        """See `asyncio.BufferedProtocol`."""
        super().buffer_updated(size)
        starting, self._starting = self._starting, []
        for stream, received in starting:
            if not stream.finished and stream.id in self.streams:
                # Not in a TaskGroup: each call's task belongs to its stream, which cancels it and handles its end.
                stream.task = self._loop.create_task(self._run(stream, received))

    def connection_lost(self, error: Exception | None) -> None:
        """See `asyncio.BufferedProtocol`."""
        super().connection_lost(error)
        self._listener.forget(self)

    def close(self) -> None:
        """End what is going on here, and let go of the connection once that is said."""
        for stream in tuple(self.streams.values()):
            self._refuse(stream, Unavailable("the server is shutting down", retry_after_s=RETRY_AFTER_S))
        super().close()

    def _look(self) -> None:
        """Now and then: is the other side there, and do its calls get on?"""
        if not self._settled or self._silent(asks=True):
            self.abort()
            return
        for stream in tuple(self.streams.values()):
            waits_for_caller = stream.unsent or not (stream.ended or stream.method.client_streaming)
            if waits_for_caller and not stream.moved:
                self.reset(stream, Code.CANCEL)
            stream.moved = False
        self._timer = self._loop.call_later(self._listener.settings.keepalive_s, self._look)

    # The calls' side.

    def on_open(self, identity: int, headers: Head) -> _Stream | None:
        """See `Connection`."""
        listener = self._listener
        method = listener.methods.get(headers.path, _NO_METHOD)
        if method.shed and listener.shedding.refuses(headers.timeout_s):
            self.decline(identity, _TOO_BUSY)
            return None
        stream = _Stream(identity, self, method, headers, listener.settings.max_message_bytes)
        self.streams[identity] = stream
        listener.calls.enter()
        if headers.malformed:
            self.reset(stream, Code.PROTOCOL_ERROR)
            return None
        if headers.http_status:
            self.send(stream, header_block(((b":status", headers.http_status.encode()),)), b"", b"")
            return None
        error = headers.error
        if listener.calls.count > listener.settings.max_calls:
            limit = listener.settings.max_calls
            error = Overloaded(f"{limit} calls are open, which is the limit", retry_after_s=RETRY_AFTER_S)
        if error is not None:
            self._refuse(stream, error)
            return None
        self.watch(stream, stream.deadline.at)
        if stream.messages is not None:
            self._begin(stream, stream.received())
        return stream

    def on_headers(self, stream: _Stream, headers: Head) -> None:
        """See `Connection`: trailers of a caller mean nothing in gRPC."""

    def on_data(self, stream: _Stream, parts: Sequence[bytes | memoryview], size: int) -> None:
        """See `Connection`."""
        stream.moved = True
        listener = self._listener
        try:
            messages = stream.reader.feed(parts, size)
            held = stream.reader.held
            if held or stream.buffered:
                listener.buffered += held - stream.buffered
                stream.buffered = held
                if listener.buffered > listener.settings.max_buffered_bytes:
                    raise Overloaded("too many messages are on their way here", retry_after_s=RETRY_AFTER_S)
            for message in messages:
                self._take_message(stream, message)
        except HedgerowError as error:
            self._refuse(stream, error)
            return
        if stream.messages is None or stream.messages.empty():
            self.grant(stream, size)
        else:
            stream.withheld += size

    def _take_message(self, stream: _Stream, message: bytes) -> None:
        if stream.messages is not None:
            stream.messages.put_nowait(message)
        elif not stream.begins:
            self._begin(stream, message)
        else:
            raise InvalidInput(f"{stream.method.name} takes one message; there are more")

    def on_end(self, stream: _Stream) -> None:
        """See `Connection`."""
        if stream.reader.held:
            self._refuse(stream, InvalidInput("the call ended within a message"))
        elif stream.messages is not None:
            stream.messages.put_nowait(None)
        elif not stream.begins and not stream.finished:
            self._refuse(stream, InvalidInput("the call ended without a message"))

    def on_sent(self, stream: _Stream) -> None:
        """See `Connection`."""
        stream.sent()

    def on_gone(self, stream: _Stream) -> None:
        """See `Connection`."""
        self._listener.calls.leave()
        self._listener.buffered -= stream.buffered
        if stream.task is not None:
            stream.task.cancel()

    def _begin(self, stream: _Stream, received: bytes | AsyncIterator[bytes]) -> None:
        # Once all that came with it is taken apart: under overload, it may have been given up in the same breath.
        stream.begins = True
        self._starting.append((stream, received))

    async def _run(self, stream: _Stream, received: bytes | AsyncIterator[bytes]) -> None:
        try:
            answer = await stream.method.answer(received, stream)
        except HedgerowError as error:
            stream.task = None
            self._refuse(stream, error)
        except asyncio.CancelledError:
            stream.task = None
            self._refuse(stream, Unavailable("the call was given up here", retry_after_s=RETRY_AFTER_S))
            raise
        else:
            stream.task = None
            self.answer(stream, answer, ends=True)

    def answer(self, stream: _Stream, message: Serialised | None, *, ends: bool = False) -> None:
        """Send `message`, if there is one, and after the last one the status."""
        if stream.id in self.streams and not stream.finished:
            first, last = None if stream.begun else _headers(stream.encoding), _OK_TRAILERS if ends else None
            stream.begun = True
            self.send(stream, first, b"" if message is None else frame_message(message, stream.encoding), last)

    def _refuse(self, stream: _Stream, error: HedgerowError) -> None:
        """End the call with the status of `error`."""
        if stream.id not in self.streams:
            return
        if stream.unsent and stream.last is not None:  # its status is said, and the caller does not take it
            self.reset(stream, Code.CANCEL)
            return
        status: int = error.status.value[0]
        said = (
            (b"grpc-status", b"%d" % status),
            (b"grpc-message", quote(rpc.details(error))),
            *((key.encode(), value.encode()) for key, value in rpc.trailers(error)),
        )
        if stream.begun:
            self.send(stream, None, b"", header_block(said))
        else:
            self.send(stream, header_block((*_HEADERS, *said)), b"", b"")

    def on_expired(self, stream: _Stream) -> None:
        """See `SocketConnection`."""
        self._refuse(stream, DeadlineExceeded(f"the deadline passed while {stream.method.name} was being answered"))
        if stream.id in self.streams:  # what it was sent before is still on its way
            self.reset(stream, Code.CANCEL)


def _headers(encoding: str) -> bytes:
    if not encoding:
        return _OK_HEADERS
    return header_block((*_HEADERS, (b"grpc-encoding", encoding.encode())))


async def _no_method(_: AsyncIterator[bytes], __: rpc.Call) -> None:
    raise Unsupported("there is no such method here")


# Takes a stream, so that it answers without waiting for a message.
_NO_METHOD: Final = Method("no method", _no_method, None, client_streaming=True, server_streaming=True)


def _tls(settings: ServerSettings) -> ssl.SSLContext | None:
    if not settings.tls_cert_file:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["h2"])
    try:
        context.load_cert_chain(settings.tls_cert_file, settings.tls_key_file)
        if settings.tls_client_ca_file:
            context.load_verify_locations(settings.tls_client_ca_file)
            context.verify_mode = ssl.CERT_REQUIRED
    except OSError as error:
        raise ConfigError(f"server.tls_…_file: the certificate, key or authority cannot be used: {error}") from error
    return context
