"""A gRPC client cheap enough to overload a server from one core: deadlines, statuses, and cancelling what is too late.

On the prepared bytes of `serving.senders`. It does what real clients do: says `grpc-timeout` with each call, gives up
at its deadline with RST_STREAM, and reads what the trailers say. What the server has no room for, by its limit of
streams or because the connection is full, waits here; if it does so until its deadline, it is never sent.
"""

import struct
import time
from collections import deque
from collections.abc import Callable, Sequence

from bench.serving.senders import ACK, END_STREAM, HEADERS, RST_STREAM, SETTINGS, Http2, frame
from hpack import Decoder

CANCEL = 8
MAX_CONCURRENT_STREAMS = 3
MAX_STREAMS = 100
"""At once, until the server has said how many it takes; RFC 9113 wants no less of it."""
MAX_BLOCKS = 4096
"""Different trailers whose reading is remembered; most are always the same."""
RESET = -1
"""In place of a status: the server reset the stream, or the connection was lost."""
GAVE_UP = -2
"""In place of a status: it was sent, and nothing had come by the deadline."""
HELD = -3
"""In place of a status: the server had no room for it until the deadline, and it was never sent."""

Ended = Callable[[int, bytes | None], None]
"""Called with the gRPC status, or `RESET`, `GAVE_UP` or `HELD`, and the answer's body if there is one."""


class Calls(Http2):
    """One connection; `call` sends its one request, which has to be answered within `timeout_s`."""

    timeout_s = float("inf")

    def __init__(self, path: str, headers: Sequence[tuple[str, str]], body: bytes) -> None:
        super().__init__(path, headers, body)
        self._ending = RESET
        """How the call ended that is about to end."""
        self._statuses: dict[bytes, int] = {}
        self._due: deque[tuple[float, int]] = deque()
        self._held: deque[tuple[float, Ended]] = deque()
        self._streams = MAX_STREAMS
        self._full = False

    def call(self, ended: Ended) -> None:
        """Send one, as soon as there is room; `ended` is called once."""
        self._held.append((time.monotonic() + self.timeout_s, ended))
        self._send_held()

    def _send_held(self) -> None:
        while self._held and not self._full and len(self._calls) < self._streams:
            deadline, ended = self._held.popleft()
            self._due.append((deadline, self._next))
            self.send(lambda body, ended=ended: ended(self._ending, body))  # type: ignore[misc] # bound now

    def pause_writing(self) -> None:
        self._full = True

    def resume_writing(self) -> None:
        self._full = False
        self._send_held()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._send_held()

    def give_up(self, now: float) -> None:
        """End the calls whose deadline has passed: cancelled where they were sent."""
        while self._held and self._held[0][0] <= now:
            self._held.popleft()[1](HELD, None)
        due = self._due
        while due and due[0][0] <= now:
            stream = due.popleft()[1]
            if stream in self._calls:
                self._write(frame(RST_STREAM, 0, stream, struct.pack(">I", CANCEL)))
                self._ending = GAVE_UP
                self._done(stream, failed=True)

    def connection_lost(self, exc: Exception | None) -> None:
        self._ending = RESET
        self._full = False  # nobody resumes a connection that is lost
        super().connection_lost(exc)
        self._send_held()

    def _received(self, kind: int, flags: int, stream: int, payload: bytearray) -> None:
        self._ending = self._status(bytes(payload)) if kind == HEADERS and flags & END_STREAM else RESET
        if kind == SETTINGS and not flags & ACK:
            self._streams = dict(struct.iter_unpack(">HI", payload)).get(MAX_CONCURRENT_STREAMS, self._streams)
        super()._received(kind, flags, stream, payload)

    def _status(self, block: bytes) -> int:
        """What trailers say."""
        if block not in self._statuses:
            if len(self._statuses) >= MAX_BLOCKS:
                self._statuses.clear()
            # No tables of HPACK are carried from one block to the next: we told the server that ours has no room.
            self._statuses[block] = int(dict(Decoder().decode(block, raw=True)).get(b"grpc-status", RESET))
        return self._statuses[block]
