"""The rules of one HTTP/2 connection (RFC 9113), for either side of it. No IO, no clock: bytes in, bytes out.

A subclass is told what the other side does by the `on_...` methods, and whoever holds it moves bytes: `feed` takes
those that came, `take` gives those to be sent, `wake` is called when there are some. What must hold:

- a fault of the other side that spoils the connection raises `ConnectionFault` out of `feed`, after which the
  connection only has its last words to say; one that spoils a stream resets that stream and nothing else;
- nothing is held for the other side beyond the windows that it was granted, one header block, and what is to be sent;
- data is sent as far as the other side's windows reach, the rest waits in its stream. A message is of use
  when it is whole: half of what is sent goes to the stream that has the least left, for the rest they take turns;
- the other side's pings and settings are answered; too many answers that are not being read are a fault.
"""

import math
import struct
from collections import deque
from collections.abc import Callable, Sequence
from enum import IntEnum
from operator import attrgetter
from typing import Final, Generic, TypeVar

from hedgerow.http2.headers import MAX_LIST_BYTES, TABLE_BYTES, HeaderFault, HeaderReader, Pair

PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DEFAULT_WINDOW = 65535
MAX_WINDOW = 2**31 - 1
DEFAULT_FRAME_BYTES = 2**14
MAX_BLOCK_BYTES = MAX_LIST_BYTES
"""Largest header block, over all of its frames; Huffman coding never makes it larger than what it says."""
FRAME_BYTES = 2**20
"""Largest frame that we take. Data is handed on as it comes, so it need not be held."""
STREAM_WINDOW = 4 * 2**20
"""What we grant each stream, in bytes."""
CONNECTION_WINDOW = 16 * 2**20
"""What we grant all streams of a connection together, in bytes."""
MAX_ANSWERS = 1000
"""Answers to pings and settings that may wait to be sent."""
BURST_BYTES = 2**18
"""What is taken from streams for sending at a time, so that little is copied ahead; two share it."""

_HEAD = struct.Struct(">HBBBI")
_SETTING = struct.Struct(">HI")
_UINT32 = struct.Struct(">I")

DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = range(10)
ACK = END_STREAM = 0x1
END_HEADERS, PADDED, HAS_PRIORITY = 0x4, 0x8, 0x20
HEADER_TABLE_SIZE, ENABLE_PUSH, MAX_CONCURRENT_STREAMS, INITIAL_WINDOW_SIZE, MAX_FRAME_SIZE, MAX_HEADER_LIST_SIZE = (
    range(1, 7)
)
_FIXED: Final = {PRIORITY: 5, RST_STREAM: 4, PING: 8, WINDOW_UPDATE: 4}
"""Lengths of the frames that have but one."""


class Code(IntEnum):
    """Why a stream or a connection ends (RFC 9113, 7)."""

    NO_ERROR = 0
    PROTOCOL_ERROR = 1
    INTERNAL_ERROR = 2
    FLOW_CONTROL_ERROR = 3
    STREAM_CLOSED = 5
    FRAME_SIZE_ERROR = 6
    REFUSED_STREAM = 7
    CANCEL = 8
    COMPRESSION_ERROR = 9
    ENHANCE_YOUR_CALM = 11


class ConnectionFault(Exception):
    """The other side broke a rule that ends the connection."""

    def __init__(self, code: Code, text: str) -> None:
        super().__init__(text)
        self.code = code


class Stream:
    """One stream. `ended` says that the other side has sent all of it, `finished` that we have."""

    __slots__ = ("ended", "expires", "finished", "granted", "id", "last", "owed", "unsent", "unsent_bytes", "window")

    def __init__(self, identity: int, window: int) -> None:
        self.id = identity
        self.window = window
        """What we may still send."""
        self.granted = STREAM_WINDOW
        """What the other side may still send."""
        self.owed = 0
        """What it has sent and was not granted again."""
        self.unsent: deque[memoryview] = deque()
        self.unsent_bytes = 0
        self.last: bytes | None = None
        """The block of headers that ends our side once `unsent` is sent; empty to end it with the data."""
        self.expires = math.inf
        """When whoever holds the connection gives the stream up, by the clock there."""
        self.ended = False
        self.finished = False


class _Run:
    """What some bytes have of the data of one stream. `begun`: the lengths of the frames that begin among them."""

    __slots__ = ("begun", "ends", "parts", "size")

    def __init__(self, *, ends: bool = False) -> None:
        self.parts: list[bytes | memoryview] = []
        self.size = 0
        self.begun = 0
        self.ends = ends


S = TypeVar("S", bound=Stream)
H = TypeVar("H")


class Connection(Generic[S, H]):
    """See the module. `H` is what `convert` makes of headers, `S` what the subclass keeps of a stream."""

    def __init__(
        self,
        *,
        client: bool,
        convert: Callable[[list[Pair]], H],
        max_streams: int,
        wake: Callable[[], None],
    ) -> None:
        self.streams: dict[int, S] = {}
        self.table_bytes = TABLE_BYTES
        """How much the other side remembers of our headers, if we want it to."""
        self.closing = False
        """Whether the last words were said, by either side: no new streams."""
        self._client = client
        self._reader = HeaderReader(convert)
        self._max_streams = max_streams
        self._wake = wake
        self._out: list[bytes | memoryview] = []
        self._answers = 0
        self._sending: dict[int, S] = {}
        """Streams with unsent data, in the order of their turns."""
        self._buffer = b""
        self._preface = b"" if client else PREFACE
        self._settled = False
        """Whether the other side's first settings have come."""
        self._last_id = 0
        """The latest stream that the other side (for a client: we) opened."""
        self._window = DEFAULT_WINDOW
        self._initial_window = DEFAULT_WINDOW
        self._frame_bytes = DEFAULT_FRAME_BYTES
        self._granted = CONNECTION_WINDOW
        self._owed = 0
        self._data_left = 0
        self._data_stream = 0
        self._data_ends = False
        self._block: bytearray | None = None
        self._block_stream = 0
        self._block_ends = False
        settings = {
            INITIAL_WINDOW_SIZE: STREAM_WINDOW,
            MAX_FRAME_SIZE: FRAME_BYTES,
            MAX_HEADER_LIST_SIZE: MAX_LIST_BYTES,
        }
        settings |= {ENABLE_PUSH: 0} if client else {MAX_CONCURRENT_STREAMS: max_streams}
        payload = b"".join(_SETTING.pack(*setting) for setting in settings.items())
        grant = _frame(WINDOW_UPDATE, 0, 0, _UINT32.pack(CONNECTION_WINDOW - DEFAULT_WINDOW))
        self._out.append((PREFACE if client else b"") + _frame(SETTINGS, 0, 0, payload) + grant)

    # What the subclass is told.

    def on_open(self, identity: int, headers: H) -> S | None:
        """A stream that the other side opens, or None if it was reset at once."""
        raise NotImplementedError

    def on_headers(self, stream: S, headers: H) -> None:
        """More headers of a stream: an answer's, or trailers."""
        raise NotImplementedError

    def on_data(self, stream: S, parts: Sequence[bytes | memoryview], size: int) -> None:
        """`size` bytes of data of a stream; to be granted again with `grant` when they no longer take up room.

        The parts are gone when this returns: what is to stay has to be copied.
        """
        raise NotImplementedError

    def on_end(self, stream: S) -> None:
        """The other side has sent all of the stream."""
        raise NotImplementedError

    def on_gone(self, stream: S) -> None:
        """The stream has ended: `finished` and `ended` say how far it got, and otherwise somebody gave it up."""
        raise NotImplementedError

    def on_sent(self, stream: S) -> None:
        """Some of what waited in the stream is on its way."""

    def on_pong(self) -> None:
        """Our ping was answered."""

    # What came.

    def feed(self, data: bytes | memoryview) -> None:
        """Take bytes from the other side; raises `ConnectionFault`, with the goodbye in `take`.

        `data` is not used any more when this returns.
        """
        try:
            self._feed(self._buffer + data if self._buffer else data)
        except ConnectionFault as fault:
            self.say_goodbye(fault.code, str(fault))
            raise

    def _feed(self, data: bytes | memoryview) -> None:
        position, end = 0, len(data)
        self._buffer = b""
        if self._preface:
            given = bytes(data[: len(self._preface)])
            if not self._preface.startswith(given):
                raise ConnectionFault(Code.PROTOCOL_ERROR, "this is not HTTP/2")
            self._preface, position = self._preface[len(given) :], len(given)
        while position < end:
            if self._data_left:
                position = self._take_data(data, position)
                continue
            if end - position < 9:
                break
            upper, lower, kind, flags, identity = _HEAD.unpack_from(data, position)
            length, identity = upper << 8 | lower, identity & MAX_WINDOW
            if not self._settled and kind != SETTINGS:
                raise ConnectionFault(Code.PROTOCOL_ERROR, "the first frame must be SETTINGS")
            if self._block is not None and (kind != CONTINUATION or identity != self._block_stream):
                raise ConnectionFault(Code.PROTOCOL_ERROR, "a header block must not be interrupted")
            if length > (FRAME_BYTES if kind == DATA else MAX_BLOCK_BYTES):
                raise ConnectionFault(Code.FRAME_SIZE_ERROR, f"a frame of {length} bytes is too large")
            if kind == DATA and not flags & PADDED:
                self._data_stream, self._data_ends = identity, False
                position = self._take_data(data, position)
                continue
            if end - position < 9 + length:
                break
            position += 9
            self._take_frame(kind, flags, identity, bytes(data[position : position + length]))
            position += length
        self._buffer = bytes(data[position:])

    def _take_frame(self, kind: int, flags: int, identity: int, payload: bytes) -> None:
        if _FIXED.get(kind, len(payload)) != len(payload):
            raise ConnectionFault(Code.FRAME_SIZE_ERROR, f"a frame of kind {kind} has {len(payload)} bytes")
        if (identity == 0) != (kind in {SETTINGS, PING, GOAWAY}) and kind <= CONTINUATION and kind != WINDOW_UPDATE:
            raise ConnectionFault(Code.PROTOCOL_ERROR, f"a frame of kind {kind} on stream {identity}")
        match kind:
            case 0:
                whole, payload = len(payload), _unpadded(payload)
                self._count_data(identity, whole)
                if (stream := self.streams.get(identity)) is not None:
                    self.grant(stream, whole - len(payload))
                self._hand_on(identity, (payload,), len(payload), ends=bool(flags & END_STREAM))
            case 1:
                if flags & PADDED:
                    payload = _unpadded(payload)
                if flags & HAS_PRIORITY:
                    if len(payload) < 5:
                        raise ConnectionFault(Code.FRAME_SIZE_ERROR, "HEADERS are too short for their priority")
                    payload = payload[5:]
                if flags & END_HEADERS:
                    self._take_block(identity, payload, ends=bool(flags & END_STREAM))
                else:
                    self._block, self._block_stream = bytearray(payload), identity
                    self._block_ends = bool(flags & END_STREAM)
            case 9:
                if self._block is None:
                    raise ConnectionFault(Code.PROTOCOL_ERROR, "CONTINUATION of nothing")
                self._block += payload
                if len(self._block) > MAX_BLOCK_BYTES or not payload:  # empty ones could go on for ever
                    raise ConnectionFault(Code.ENHANCE_YOUR_CALM, "the header block is too large")
                if flags & END_HEADERS:
                    block, self._block = bytes(self._block), None
                    self._take_block(identity, block, ends=self._block_ends)
            case 3:
                self._known(identity)
                self._drop(self.streams.get(identity))
            case 4:
                self._take_settings(flags, payload)
            case 6:
                if flags & ACK:
                    self.on_pong()
                else:
                    self._answer(_frame(PING, ACK, 0, payload))
            case 7:
                self.closing = True
            case 8:
                self._take_grant(identity, _UINT32.unpack(payload)[0] & MAX_WINDOW)
            case 5:
                raise ConnectionFault(Code.PROTOCOL_ERROR, "nobody may push")
            case _:
                pass  # PRIORITY, and kinds that are not known, mean nothing to us

    def _known(self, identity: int) -> None:
        """Frames may still come for streams that were closed; for one that was never opened it is a fault."""
        if identity > self._last_id or identity % 2 == 0:
            raise ConnectionFault(Code.PROTOCOL_ERROR, f"stream {identity} is idle")

    def _take_block(self, identity: int, block: bytes, *, ends: bool) -> None:
        try:
            headers = self._reader.read(block)
        except HeaderFault as fault:
            raise ConnectionFault(Code.COMPRESSION_ERROR, str(fault)) from fault
        stream = self.streams.get(identity)
        if stream is not None:
            if stream.ended:
                raise ConnectionFault(Code.STREAM_CLOSED, f"headers after the end of stream {identity}")
            self.on_headers(stream, headers)
        elif self._client or identity <= self._last_id:
            self._known(identity)
            return  # of a stream that is closed on our side
        else:
            if identity % 2 == 0:
                raise ConnectionFault(Code.PROTOCOL_ERROR, "clients open streams of odd numbers")
            self._last_id = identity
            if len(self.streams) >= self._max_streams:
                self._out.append(_frame(RST_STREAM, 0, identity, _UINT32.pack(Code.REFUSED_STREAM)))
                self._wake()
                return
            stream = self.on_open(identity, headers)
            if stream is None:
                return
        if ends and identity in self.streams:
            self._end(stream)

    def _end(self, stream: S) -> None:
        stream.ended = True
        self.on_end(stream)
        if stream.finished:
            self._drop(stream)

    def _drop(self, stream: S | None) -> None:
        if stream is not None and self.streams.pop(stream.id, None) is not None:
            self._sending.pop(stream.id, None)
            self.on_gone(stream)

    def _take_data(self, data: bytes | memoryview, position: int) -> int:
        """Take the rest of the frame of DATA that has begun, and those that follow it; where they end.

        What is there of a stream is handed on in one go: large messages come in hundreds of small frames.
        """
        identity, left = self._data_stream, self._data_left
        run = _Run(ends=self._data_ends)
        runs, end = {identity: run}, len(data)
        while True:
            if left:
                part = data[position : position + left]
                run.parts.append(part)
                taken = len(part)
                position, left = position + taken, left - taken
                run.size += taken
            if left or end - position < 9:
                break
            upper, lower, kind, flags, following = _HEAD.unpack_from(data, position)
            length = upper << 8 | lower
            if kind != DATA or flags & PADDED or length > FRAME_BYTES:
                break
            following &= MAX_WINDOW
            if following != identity:
                identity = following
                run = runs.get(identity) or runs.setdefault(identity, _Run())
            if run.ends:
                break
            position, left = position + 9, length
            run.begun += length
            run.ends = bool(flags & END_STREAM)
        self._data_stream, self._data_left, self._data_ends = identity, left, run.ends
        for each, taken_run in runs.items():
            self._count_data(each, taken_run.begun)
            self._hand_on(
                each, taken_run.parts, taken_run.size, ends=taken_run.ends and not (left and each == identity)
            )
        return position

    def _count_data(self, identity: int, length: int) -> None:
        """Frames of DATA of `length` have begun, which counts in the windows."""
        if identity == 0:
            raise ConnectionFault(Code.PROTOCOL_ERROR, "DATA on stream 0")
        self._known(identity)
        self._granted -= length
        if self._granted < 0:
            raise ConnectionFault(Code.FLOW_CONTROL_ERROR, "more data than was granted to the connection")
        # What takes up room is bounded stream by stream; the connection's window only keeps data coming.
        self._owed += length
        if self._owed >= CONNECTION_WINDOW // 2:
            self._granted += self._owed
            self._out.append(_frame(WINDOW_UPDATE, 0, 0, _UINT32.pack(self._owed)))
            self._owed = 0
            self._wake()
        stream = self.streams.get(identity)
        if stream is not None:
            if stream.ended:
                raise ConnectionFault(Code.STREAM_CLOSED, f"data after the end of stream {identity}")
            stream.granted -= length
            if stream.granted < 0:
                raise ConnectionFault(Code.FLOW_CONTROL_ERROR, f"more data than was granted to stream {identity}")

    def _hand_on(self, identity: int, parts: Sequence[bytes | memoryview], size: int, *, ends: bool) -> None:
        stream = self.streams.get(identity)
        if stream is not None and size:
            self.on_data(stream, parts, size)
            stream = self.streams.get(identity)
        if stream is not None and ends:
            self._end(stream)

    def _take_settings(self, flags: int, payload: bytes) -> None:
        if flags & ACK:
            if payload:
                raise ConnectionFault(Code.FRAME_SIZE_ERROR, "an acknowledgement of settings has no payload")
            return
        if len(payload) % _SETTING.size:
            raise ConnectionFault(Code.FRAME_SIZE_ERROR, "a setting is cut off")
        for name, value in _SETTING.iter_unpack(payload):
            if name == INITIAL_WINDOW_SIZE:
                if value > MAX_WINDOW:
                    raise ConnectionFault(Code.FLOW_CONTROL_ERROR, "the initial window is too large")
                for stream in self.streams.values():
                    stream.window += value - self._initial_window
                    if stream.window > MAX_WINDOW:
                        raise ConnectionFault(Code.FLOW_CONTROL_ERROR, "the initial window makes one too large")
                self._initial_window = value
            elif name == MAX_FRAME_SIZE:
                if not DEFAULT_FRAME_BYTES <= value < 2**24:
                    raise ConnectionFault(Code.PROTOCOL_ERROR, f"frames of {value} bytes are not allowed")
                self._frame_bytes = value
            elif name == ENABLE_PUSH and value > 1:
                raise ConnectionFault(Code.PROTOCOL_ERROR, "a switch is on or off")
            elif name == MAX_CONCURRENT_STREAMS and self._client:
                self._max_streams = value
            elif name == HEADER_TABLE_SIZE:
                self.table_bytes = value
        self._settled = True
        self._answer(_frame(SETTINGS, ACK, 0, b""))

    def _take_grant(self, identity: int, size: int) -> None:
        if identity == 0:
            self._window += size
            if not size or self._window > MAX_WINDOW:
                raise ConnectionFault(Code.FLOW_CONTROL_ERROR, "the connection's window is spoilt")
        else:
            self._known(identity)
            stream = self.streams.get(identity)
            if stream is None:
                return
            stream.window += size
            if not size or stream.window > MAX_WINDOW:
                self.reset(stream, Code.FLOW_CONTROL_ERROR if size else Code.PROTOCOL_ERROR)
                return
        if self._sending:
            self._wake()

    def _answer(self, frame: bytes) -> None:
        self._answers += 1
        if self._answers > MAX_ANSWERS:
            raise ConnectionFault(Code.ENHANCE_YOUR_CALM, "too many pings or settings")
        self._out.append(frame)
        self._wake()

    def abandon(self) -> None:
        """The bytes' way is gone: every stream ends here, and nothing is kept for it.

        The connection refers to itself through what it was given, so it would stay until the collector comes by.
        """
        for stream in tuple(self.streams.values()):
            self._drop(stream)
        self._block = None
        self._buffer = b""
        self._out.clear()

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
            out.append(_HEAD.pack(length >> 8, length & 255, DATA, END_STREAM if ends else 0, stream.id))
            out.append(part)
        self._window -= size
        stream.window -= size
        stream.unsent_bytes -= size
        del self._sending[stream.id]
        if stream.unsent:
            self._sending[stream.id] = stream  # behind the others
        elif stream.last is not None:
            if stream.last:
                out.append(_frame(HEADERS, END_HEADERS | END_STREAM, stream.id, stream.last))
            elif not size:
                out.append(_frame(DATA, END_STREAM, stream.id, b""))
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
            out.append(_frame(HEADERS, END_HEADERS | alone, stream.id, first))
            if alone:
                self._finish(stream)
                self._wake()
                return
        if not stream.unsent and size <= self._frame_bytes and size <= self._window and size <= stream.window:
            if size:
                self._window -= size
                stream.window -= size
                out.append(_HEAD.pack(size >> 8, size & 255, DATA, END_STREAM if last == b"" else 0, stream.id))
                out.append(data)
            if last:
                out.append(_frame(HEADERS, END_HEADERS | END_STREAM, stream.id, last))
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
            self._out.append(_frame(RST_STREAM, 0, stream.id, _UINT32.pack(Code.NO_ERROR)))  # keep the rest (8.1)
        self._drop(stream)

    def reset(self, stream: S, code: Code) -> None:
        """Give `stream` up."""
        if stream.id in self.streams:
            self._out.append(_frame(RST_STREAM, 0, stream.id, _UINT32.pack(code)))
            self._wake()
            self._drop(stream)

    def grant(self, stream: S, size: int) -> None:
        """Let the other side send `size` more bytes on `stream`; it is told when it has come to something."""
        stream.owed += size
        if stream.owed >= STREAM_WINDOW // 2 and not stream.ended:
            stream.granted += stream.owed
            self._out.append(_frame(WINDOW_UPDATE, 0, stream.id, _UINT32.pack(stream.owed)))
            stream.owed = 0
            self._wake()

    def decline(self, identity: int, block: bytes) -> None:
        """For `on_open`: answer the stream with a block of headers, and hear no more of it. As cheap as can be."""
        self._out.append(_frame(HEADERS, END_HEADERS | END_STREAM, identity, block))
        self._out.append(_frame(RST_STREAM, 0, identity, _UINT32.pack(Code.NO_ERROR)))
        self._wake()

    def ping(self) -> None:
        """Ask whether the other side is there; `on_pong` tells."""
        self._out.append(_frame(PING, 0, 0, bytes(8)))
        self._wake()

    def say_goodbye(self, code: Code = Code.NO_ERROR, text: str = "") -> None:
        """Say that no new streams are wanted; those that were opened go on unless it is for a fault."""
        self.closing = True
        # A graceful server has seen all that it will not refuse, but cannot know what is on its way.
        seen = MAX_WINDOW if code is Code.NO_ERROR and not self._client else self._last_id
        self._out.append(_frame(GOAWAY, 0, 0, _UINT32.pack(seen) + _UINT32.pack(code) + text.encode()[:200]))
        self._wake()


_unsent_bytes: Final = attrgetter("unsent_bytes")


def _frame(kind: int, flags: int, identity: int, payload: bytes) -> bytes:
    size = len(payload)
    return _HEAD.pack(size >> 8, size & 255, kind, flags, identity) + payload


def _unpadded(payload: bytes) -> bytes:
    if not payload or payload[0] >= len(payload):
        raise ConnectionFault(Code.PROTOCOL_ERROR, "the padding is longer than the frame")
    return payload[1 : len(payload) - payload[0]]
