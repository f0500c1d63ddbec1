"""A connection with a socket under it: what server and client have in common on asyncio."""

import asyncio
import math
from typing import TypeVar, cast

from hedgerow.http2.connection import Connection
from hedgerow.http2.frames import ConnectionFault
from hedgerow.http2.stream import Stream

READ_BYTES = 2**19
"""What is read at a time: enough to spend little on each read, few enough to stay in the processor's cache."""
COPIED_BYTES = 2**14
"""Smaller reads are cheaper copied once than looked at in place."""

S = TypeVar("S", bound=Stream)
H = TypeVar("H")


def new_space() -> memoryview:
    """Where bytes are read into."""
    return memoryview(bytearray(READ_BYTES))


class SocketConnection(Connection[S, H], asyncio.BufferedProtocol):
    """Moves the bytes of a `Connection`. What is written in one turn of the loop leaves in one write.

    What comes is read into `_space`, which a subclass sets. The connections of an event loop may share one: what of it
    is not done with at once is copied.

    A subclass sets `_timer` to `_look` now and then whether the other side is there. One alarm watches over the
    deadlines of all streams: most end long before, and setting one up for each costs more than looking through them.
    `hedgerow.alarms` does the same for things without a list of their own; here, where `streams` is one, which is
    bounded, its heap would double what it costs to open a stream and let it end.
    """

    _transport: asyncio.Transport | None = None
    _timer: asyncio.TimerHandle | None = None
    _alarm: asyncio.TimerHandle | None = None
    _alarm_at = math.inf
    _flushing = _heard = _pinged = False
    _loop: asyncio.AbstractEventLoop
    _space: memoryview

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See `asyncio.BufferedProtocol`."""
        self._transport = cast("asyncio.Transport", transport)
        self._wake()

    def get_buffer(self, _: int) -> memoryview:
        """See `asyncio.BufferedProtocol`."""
        return self._space

    def buffer_updated(self, size: int) -> None:
        """See `asyncio.BufferedProtocol`."""
        self._heard = True
        data = self._space[:size]
        try:
            self.feed(bytes(data) if size < COPIED_BYTES else data)
        except ConnectionFault:
            self.close()

    def connection_lost(self, _: Exception | None) -> None:
        """See `asyncio.BufferedProtocol`."""
        self._transport, self.closing = None, True
        for timer in (self._timer, self._alarm):
            if timer is not None:
                timer.cancel()
        self.abandon()

    def pause_writing(self) -> None:
        """See `asyncio.BufferedProtocol`."""
        self._stalled = True

    def resume_writing(self) -> None:
        """See `asyncio.BufferedProtocol`."""
        self._stalled = False
        self._wake()

    def watch(self, stream: S, deadline: float) -> None:
        """Have `on_expired` told if `stream` is still there at `deadline`, by the monotonic clock."""
        stream.expires = deadline
        if deadline < self._alarm_at:
            self._set_alarm(deadline)

    def on_expired(self, stream: S) -> None:
        """The deadline of `stream` has passed."""
        raise NotImplementedError

    def _set_alarm(self, at: float) -> None:
        if self._alarm is not None:
            self._alarm.cancel()
        self._alarm_at = at
        self._alarm = self._loop.call_at(at, self._expire)

    def _expire(self) -> None:
        now, self._alarm_at = self._loop.time(), math.inf
        for stream in tuple(self.streams.values()):
            if stream.expires <= now:
                self.on_expired(stream)
        following = min((stream.expires for stream in self.streams.values()), default=math.inf)
        if following < self._alarm_at:
            self._set_alarm(following)

    def close(self) -> None:
        """Let go of the connection once what is to be sent has left, or at once where nobody reads it."""
        if self._transport is not None:
            self._flush()
            self._transport.close()
            if self._stalled:
                self._transport.abort()

    def abort(self) -> None:
        """Let go of the connection with no more words."""
        if self._transport is not None:
            self._transport.abort()

    def _wake(self) -> None:
        if not self._flushing and not self._stalled:
            self._flushing = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._flushing = False
        while self._transport is not None and not self._stalled and self.unsent:
            self._transport.write(memoryview(self.take()))  # what the socket does not take is copied once, not twice

    def _silent(self, *, asks: bool) -> bool:
        """Whether the other side did not even answer a ping since this was asked last; it is sent one if it `asks`."""
        silent, self._pinged = self._pinged and not self._heard, asks and not self._heard
        self._heard = False
        if self._pinged and not silent:
            self.ping()
        return silent
