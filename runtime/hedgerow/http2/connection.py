"""The rules of one HTTP/2 connection (RFC 9113), for either side of it. No IO, no clock: bytes in, bytes out.

A subclass is told what the other side does by the `on_...` methods, and whoever holds it moves bytes: `feed` takes
those that came, `take` gives those to be sent, `_wake` is called when there are some. What must hold:

- a fault of the other side that spoils the connection raises `ConnectionFault` out of `feed`, after which the
  connection only has its last words to say; one that spoils a stream resets that stream and nothing else;
- nothing is held for the other side beyond the windows that it was granted, one header block, and what is to be sent;
- data is sent as far as the other side's windows reach, the rest waits in its stream (`sending.py`);
- the other side's pings and settings are answered; too many answers that are not being read are a fault.
"""

from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from hedgerow.http2.frames import (
    ACK,
    CONTINUATION,
    DATA,
    DEFAULT_FRAME_BYTES,
    DEFAULT_WINDOW,
    ENABLE_PUSH,
    END_HEADERS,
    END_STREAM,
    FIXED_BYTES,
    GOAWAY,
    HAS_PRIORITY,
    HEAD,
    HEADER_TABLE_SIZE,
    INITIAL_WINDOW_SIZE,
    MAX_CONCURRENT_STREAMS,
    MAX_FRAME_SIZE,
    MAX_HEADER_LIST_SIZE,
    MAX_WINDOW,
    PADDED,
    PING,
    PREFACE,
    RST_STREAM,
    SETTING,
    SETTINGS,
    UINT32,
    WINDOW_UPDATE,
    Code,
    ConnectionFault,
    frame,
    unpadded,
)
from hedgerow.http2.headers import MAX_LIST_BYTES, TABLE_BYTES, HeaderFault, HeaderReader, Pair
from hedgerow.http2.sending import MAX_FRAMES_AHEAD, Sender
from hedgerow.http2.stream import STREAM_WINDOW, Stream

MAX_BLOCK_BYTES = MAX_LIST_BYTES
"""Largest header block, over all of its frames; Huffman coding never makes it larger than what it says."""
FRAME_BYTES = 2**20
"""Largest frame that we take. Data is handed on as it comes, so it need not be held."""
CONNECTION_WINDOW = 16 * 2**20
"""What we grant all streams of a connection together, in bytes."""

S = TypeVar("S", bound=Stream)
H = TypeVar("H")


class _Run:
    """What some bytes have of the data of one stream. `begun`: the lengths of the frames that begin among them."""

    __slots__ = ("begun", "ends", "parts", "size")

    def __init__(self, *, ends: bool = False) -> None:
        self.parts: list[bytes | memoryview] = []
        self.size = 0
        self.begun = 0
        self.ends = ends


class Connection(Sender[S], Generic[S, H]):
    """See the module. `H` is what `convert` makes of headers, `S` what the subclass keeps of a stream."""

    def __init__(
        self,
        *,
        client: bool,
        convert: Callable[[list[Pair]], H],
        max_streams: int,
    ) -> None:
        super().__init__(client=client)
        self.table_bytes = TABLE_BYTES
        """How much the other side remembers of our headers, if we want it to."""
        self._reader = HeaderReader(convert)
        self._max_streams = max_streams
        self._buffer = b""
        self._preface = b"" if client else PREFACE
        self._settled = False
        """Whether the other side's first settings have come."""
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
        payload = b"".join(SETTING.pack(*setting) for setting in settings.items())
        grant = frame(WINDOW_UPDATE, 0, 0, UINT32.pack(CONNECTION_WINDOW - DEFAULT_WINDOW))
        self._out.append((PREFACE if client else b"") + frame(SETTINGS, 0, 0, payload) + grant)

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
            upper, lower, kind, flags, identity = HEAD.unpack_from(data, position)
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
        if FIXED_BYTES.get(kind, len(payload)) != len(payload):
            raise ConnectionFault(Code.FRAME_SIZE_ERROR, f"a frame of kind {kind} has {len(payload)} bytes")
        if (identity == 0) != (kind in {SETTINGS, PING, GOAWAY}) and kind <= CONTINUATION and kind != WINDOW_UPDATE:
            raise ConnectionFault(Code.PROTOCOL_ERROR, f"a frame of kind {kind} on stream {identity}")
        match kind:
            case 0:
                whole, payload = len(payload), unpadded(payload)
                self._count_data(identity, whole)
                if (stream := self.streams.get(identity)) is not None:
                    self.grant(stream, whole - len(payload))
                self._hand_on(identity, (payload,), len(payload), ends=bool(flags & END_STREAM))
            case 1:
                if flags & PADDED:
                    payload = unpadded(payload)
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
                    self._answer(frame(PING, ACK, 0, payload))
            case 7:
                self.closing = True
            case 8:
                self._take_grant(identity, UINT32.unpack(payload)[0] & MAX_WINDOW)
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
            if len(self._out) > MAX_FRAMES_AHEAD:
                raise ConnectionFault(Code.ENHANCE_YOUR_CALM, "too many answers that are not read")
            if len(self.streams) >= self._max_streams:
                self._out.append(frame(RST_STREAM, 0, identity, UINT32.pack(Code.REFUSED_STREAM)))
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
            upper, lower, kind, flags, following = HEAD.unpack_from(data, position)
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
            self._out.append(frame(WINDOW_UPDATE, 0, 0, UINT32.pack(self._owed)))
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
        if len(payload) % SETTING.size:
            raise ConnectionFault(Code.FRAME_SIZE_ERROR, "a setting is cut off")
        for name, value in SETTING.iter_unpack(payload):
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
        self._answer(frame(SETTINGS, ACK, 0, b""))

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

    def abandon(self) -> None:
        """The bytes' way is gone: every stream ends here, and nothing is kept for it."""
        for stream in tuple(self.streams.values()):
            self._drop(stream)
        self._block = None
        self._buffer = b""
        self._out.clear()

    def grant(self, stream: S, size: int) -> None:
        """Let the other side send `size` more bytes on `stream`; it is told when it has come to something."""
        stream.owed += size
        if stream.owed >= STREAM_WINDOW // 2 and not stream.ended:
            stream.granted += stream.owed
            self._out.append(frame(WINDOW_UPDATE, 0, stream.id, UINT32.pack(stream.owed)))
            stream.owed = 0
            self._wake()
