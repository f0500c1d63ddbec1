"""The half of a connection that sends: what goes at once, what waits, and whose turn it is. No IO.

Data is sent as far as the other side's windows reach, the rest waits in its stream. A message is of use when it is
whole: half of what is sent goes to the stream that has the least left, for the rest they take turns.
"""

from operator import attrgetter
from typing import Final, Generic, TypeVar

from hedgerow.http2.frames import (
    DATA,
    DEFAULT_FRAME_BYTES,
    DEFAULT_WINDOW,
    END_HEADERS,
    END_STREAM,
    GOAWAY,
    HEAD,
    HEADERS,
    MAX_WINDOW,
    PING,
    RST_STREAM,
    UINT32,
    Code,
    ConnectionFault,
    frame,
)
from hedgerow.http2.stream import Stream

MAX_ANSWERS = 1000
"""Answers to pings and settings that may wait to be sent."""
MAX_FRAMES_AHEAD = 2**15
"""Frames, of data only those that were to go at once, that may wait when the other side opens a stream. One read does
not bring so many calls that are refused; who brings more does not read what he is told."""
BURST_BYTES = 2**18
"""What is taken from streams for sending at a time, so that little is copied ahead; two share it."""

S = TypeVar("S", bound=Stream)
_unsent_bytes: Final = attrgetter("unsent_bytes")


class Sender(Generic[S]):
    """See the module."""

    def __init__(self, *, client: bool) -> None:
        self.streams: dict[int, S] = {}
        self.closing = False
        """Whether the last words were said, by either side: no new streams."""
        self._client = client
        self._out: list[bytes | memoryview] = []
        self._stalled = False
        """Whether nothing is taken for now: data waits in its stream then, which stays open for so long."""
        self._answers = 0
        self._sending: dict[int, S] = {}
        """Streams with unsent data, in the order of their turns."""
        self._last_id = 0
        """The latest stream that the other side (for a client: we) opened."""
        self._window = DEFAULT_WINDOW
        self._initial_window = DEFAULT_WINDOW
        self._frame_bytes = DEFAULT_FRAME_BYTES

    # What the subclass is told.

    def _wake(self) -> None:
        """There is something to `take`."""
        raise NotImplementedError

    def on_gone(self, stream: S) -> None:
        """The stream has ended: `finished` and `ended` say how far it got, and otherwise somebody gave it up."""
        raise NotImplementedError

    def on_sent(self, stream: S) -> None:
        """Some of what waited in the stream is on its way."""

    # What goes.

    @property
    def unsent(self) -> bool:
        """Whether `take` would give something."""
        return bool(self._out or any(self._sendable(stream) for stream in self._sending.values()))

    def take(self) -> bytes:
        """What can be sent now, up to about a burst of data; to be called again while `unsent`."""
        out, self._out, self._answers = self._out, [], 0
        left = BURST_BYTES
        while self._sending and left > 0:
            ready = [stream for stream in self._sending.values() if self._sendable(stream)]
            if not ready:
                break
            # Taking turns alone, all would be whole at the end, and be held by both sides until then.
            for stream in {min(ready, key=_unsent_bytes): None, ready[0]: None}:
                left -= self._send_some(stream, BURST_BYTES // 2, out)
        return b"".join(out)

    def _sendable(self, stream: S) -> bool:
        return not stream.unsent or (self._window > 0 and stream.window > 0)

    def _send_some(self, stream: S, share: int, out: list[bytes | memoryview]) -> int:
        """Move up to `share` bytes of `stream` as frames, and its end, into `out`; how many bytes of data that were."""
        size, room = 0, min(self._window, stream.window, share)
        if stream.unsent and room <= 0:
            return 0
        while stream.unsent and size < room:
            part = stream.unsent[0]
            length = min(len(part), self._frame_bytes, room - size)
            if length == len(part):
                stream.unsent.popleft()
            else:
                part, stream.unsent[0] = part[:length], part[length:]
            size += length
            ends = not stream.unsent and stream.last == b""
            out.append(HEAD.pack(length >> 8, length & 255, DATA, END_STREAM if ends else 0, stream.id))
            out.append(part)
        self._window -= size
        stream.window -= size
        stream.unsent_bytes -= size
        del self._sending[stream.id]
        if stream.unsent:
            self._sending[stream.id] = stream  # behind the others
        elif stream.last is not None:
            if stream.last:
                out.append(frame(HEADERS, END_HEADERS | END_STREAM, stream.id, stream.last))
            elif not size:
                out.append(frame(DATA, END_STREAM, stream.id, b""))
            self._finish(stream)
        self.on_sent(stream)
        return size

    def next_id(self) -> int:
        """For a client: the number of the next stream, to be sent on at once."""
        self._last_id += 2 if self._last_id else 1
        return self._last_id

    @property
    def initial_window(self) -> int:
        """What may be sent on a new stream."""
        return self._initial_window

    def send(
        self, stream: S, first: bytes | None, data: bytes | memoryview | list[bytes | memoryview], last: bytes | None
    ) -> None:
        """Send on `stream`: a block of headers, data, and a block of headers that ends it, each if there is one.

        An empty `last` ends the stream with its data. What the windows do not allow yet waits.
        """
        if isinstance(data, list):
            for piece in data[:-1]:
                self.send(stream, first, piece, None)
                first = None
            data = data[-1]
        out, size = self._out, len(data)
        if first is not None:
            alone = END_STREAM if last == b"" and not data and not stream.unsent else 0
            out.append(frame(HEADERS, END_HEADERS | alone, stream.id, first))
            if alone:
                self._finish(stream)
                self._wake()
                return
        room = min(self._frame_bytes, self._window, stream.window)
        if size <= room and not stream.unsent and not (self._stalled and size):
            if size:
                self._window -= size
                stream.window -= size
                out.append(HEAD.pack(size >> 8, size & 255, DATA, END_STREAM if last == b"" else 0, stream.id))
                out.append(data)
            if last:
                out.append(frame(HEADERS, END_HEADERS | END_STREAM, stream.id, last))
            if last is not None:
                self._finish(stream)
        else:
            if size:
                stream.unsent.append(memoryview(data))
                stream.unsent_bytes += size
            stream.last = last
            self._sending[stream.id] = stream
        self._wake()

    def _finish(self, stream: S) -> None:
        """Our side of `stream` is on its way; with both sides done it is gone."""
        stream.finished = True
        if not stream.ended:
            if self._client:
                return
            self._out.append(frame(RST_STREAM, 0, stream.id, UINT32.pack(Code.NO_ERROR)))  # keep the rest (8.1)
        self._drop(stream)

    def _drop(self, stream: S | None) -> None:
        if stream is not None and self.streams.pop(stream.id, None) is not None:
            self._sending.pop(stream.id, None)
            self.on_gone(stream)

    def reset(self, stream: S, code: Code) -> None:
        """Give `stream` up."""
        if stream.id in self.streams:
            self._out.append(frame(RST_STREAM, 0, stream.id, UINT32.pack(code)))
            self._wake()
            self._drop(stream)

    def decline(self, identity: int, block: bytes) -> None:
        """For `on_open`: answer the stream with a block of headers, and hear no more of it. As cheap as can be."""
        self._out.append(frame(HEADERS, END_HEADERS | END_STREAM, identity, block))
        self._out.append(frame(RST_STREAM, 0, identity, UINT32.pack(Code.NO_ERROR)))
        self._wake()

    def ping(self) -> None:
        """Ask whether the other side is there; `on_pong` tells."""
        self._out.append(frame(PING, 0, 0, bytes(8)))
        self._wake()

    def _answer(self, answer: bytes) -> None:
        self._answers += 1
        if self._answers > MAX_ANSWERS:
            raise ConnectionFault(Code.ENHANCE_YOUR_CALM, "too many pings or settings")
        self._out.append(answer)
        self._wake()

    def say_goodbye(self, code: Code = Code.NO_ERROR, text: str = "") -> None:
        """Say that no new streams are wanted; those that were opened go on unless it is for a fault."""
        self.closing = True
        # A graceful server has seen all that it will not refuse, but cannot know what is on its way.
        seen = MAX_WINDOW if code is Code.NO_ERROR and not self._client else self._last_id
        self._out.append(frame(GOAWAY, 0, 0, UINT32.pack(seen) + UINT32.pack(code) + text.encode()[:200]))
        self._wake()
