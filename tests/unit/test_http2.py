"""Our HTTP/2 against python-hyper's, in memory: whatever the one says the other must understand, in any pieces."""

import itertools
import struct
import tracemalloc
from collections.abc import Sequence
from typing import Any

import h2.config
import h2.connection
import h2.events
import h2.settings
import pytest
from hpack import Encoder
from hypothesis import given
from hypothesis import strategies as st

from hedgerow.http2 import frames as http2
from hedgerow.http2.connection import Connection
from hedgerow.http2.frames import Code, ConnectionFault
from hedgerow.http2.grpc import GROWTH, PREFIX_BYTES, MessageReader, frame_message
from hedgerow.http2.headers import header_block
from hedgerow.http2.sending import BURST_BYTES, MAX_FRAMES_AHEAD
from hedgerow.http2.stream import STREAM_WINDOW, Stream
from hedgerow.wire import joined

REQUEST = [(":method", "POST"), (":scheme", "http"), (":path", "/a"), (":authority", "x"), ("te", "trailers")]
ANSWER = header_block([(b":status", b"200")])
TRAILERS = header_block([(b"grpc-status", b"0"), (b"long", b"x" * 300)])
Pairs = list[tuple[str, str]]


class Call(Stream):
    """A stream and what came on it."""

    def __init__(self, identity: int, window: int) -> None:
        super().__init__(identity, window)
        self.data = b""
        self.headers: list[Pairs] = []
        self.whole = self.gone = False


class Side(Connection[Call, Pairs]):
    """A connection that keeps what it is told, and grants back what it takes while `taking`."""

    def __init__(self, *, client: bool = False, max_streams: int = 100) -> None:
        super().__init__(client=client, convert=list, max_streams=max_streams)
        self.calls: dict[int, Call] = {}
        self.taking = True
        self.pongs = 0

    def _wake(self) -> None:
        """Whoever tests takes when it wants."""

    def on_open(self, identity: int, headers: Pairs) -> Call:
        return self.call(identity, headers)

    def call(self, identity: int, headers: Pairs | None = None) -> Call:
        call = self.calls[identity] = self.streams[identity] = Call(identity, self.initial_window)
        if headers is not None:
            call.headers.append(headers)
        return call

    def on_headers(self, stream: Call, headers: Pairs) -> None:
        stream.headers.append(headers)

    def on_data(self, stream: Call, parts: Sequence[bytes | memoryview], size: int) -> None:
        stream.data += b"".join(parts)
        if self.taking:
            self.grant(stream, size)

    def on_end(self, stream: Call) -> None:
        stream.whole = True

    def on_gone(self, stream: Call) -> None:
        assert not stream.gone
        stream.gone = True

    def on_pong(self) -> None:
        self.pongs += 1


class Peer:
    """python-hyper's client (or server) at the other end."""

    def __init__(self, side: Side, *, client: bool = True, pieces: int = 2**20) -> None:
        self.side = side
        self.h2 = h2.connection.H2Connection(h2.config.H2Configuration(client_side=client, header_encoding=None))
        self.h2.initiate_connection()
        self.pieces = pieces
        self.events: list[Any] = []
        self.exchange()

    def exchange(self) -> None:
        """Carry bytes both ways until nobody has more to say."""
        while True:
            there = self.h2.data_to_send()
            for at in range(0, len(there), self.pieces):
                lent = bytearray(there[at : at + self.pieces])
                self.side.feed(memoryview(lent))
                lent[:] = b"\xff" * len(lent)  # as the next bytes do that come
            back = b""
            while self.side.unsent:
                back += self.side.take()
            if not there and not back:
                return
            for event in self.h2.receive_data(back) if back else ():
                self.events.append(event)
                if isinstance(event, h2.events.DataReceived) and event.flow_controlled_length:
                    self.h2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)

    def data(self, identity: int) -> bytes:
        received = [event for event in self.events if isinstance(event, h2.events.DataReceived)]
        return b"".join(event.data for event in received if event.stream_id == identity)

    def upload(self, identity: int, body: bytes) -> None:
        while body:
            self.exchange()
            size = min(len(body), self.h2.local_flow_control_window(identity), self.h2.max_outbound_frame_size)
            assert size > 0, "no window, for ever"
            self.h2.send_data(identity, body[:size])
            body = body[size:]
        self.h2.end_stream(identity)
        self.exchange()


BODIES = st.one_of(st.binary(max_size=100), st.integers(0, 300_000).map(bytes))


@given(st.lists(st.tuples(BODIES, BODIES), min_size=1, max_size=5), st.sampled_from([1, 7, 4096, 2**20]))
def test_whatever_is_asked_and_answered_arrives_whole(calls: list[tuple[bytes, bytes]], pieces: int) -> None:
    if sum(len(up) for up, _ in calls) > 5000:
        pieces = max(pieces, 4096)
    side = Side()
    peer = Peer(side, pieces=pieces)
    for number, (up, down) in enumerate(calls):
        identity = 1 + 2 * number
        peer.h2.send_headers(identity, [*REQUEST, ("n", str(number))])
        peer.upload(identity, up)
        call = side.calls[identity]
        assert (call.data, call.whole) == (up, True)
        assert call.headers[0][-1] == ("n", str(number))
        side.send(call, ANSWER, down, TRAILERS)
        peer.exchange()
        assert peer.data(identity) == down
        assert call.gone
    ended = [event.stream_id for event in peer.events if isinstance(event, h2.events.StreamEnded)]
    assert ended == list(side.calls)
    assert not side.streams


@given(
    st.lists(st.integers(0, 200_000), min_size=2, max_size=5),
    st.integers(1, 2**14),
    st.sampled_from([100, 4096, 2**20]),
)
def test_messages_that_come_frame_by_frame_in_turns_are_not_mixed_up(sizes: list[int], most: int, pieces: int) -> None:
    most = max(most, max(sizes) // 100)
    side = Side()
    peer = Peer(side, pieces=pieces)
    left = {1 + 2 * number: bytes([number]) * size for number, size in enumerate(sizes)}
    for identity in left:
        peer.h2.send_headers(identity, REQUEST)
    while left:
        for identity, body in tuple(left.items()):
            peer.h2.send_data(identity, body[:most], end_stream=len(body) <= most)
            left[identity] = body[most:]
            if len(body) <= most:
                del left[identity]
        if min(peer.h2.local_flow_control_window(1 + 2 * number) for number in range(len(sizes))) < 2 * most:
            peer.exchange()
    peer.exchange()
    for number, size in enumerate(sizes):
        call = side.calls[1 + 2 * number]
        assert (call.data, call.whole) == (bytes([number]) * size, True)


def test_the_answer_with_the_least_left_is_whole_first_and_none_starves() -> None:
    side = Side()
    peer = Peer(side)
    identities = range(1, 41, 2)
    for identity in identities:
        peer.h2.send_headers(identity, REQUEST, end_stream=True)
    peer.h2.increment_flow_control_window(2**24)
    for identity in identities:
        peer.h2.increment_flow_control_window(2**20, identity)
    peer.exchange()
    for identity in identities:
        side.send(side.calls[identity], ANSWER, bytes(2**18 if identity == 39 else 2**19), TRAILERS)
    for _ in range(2):
        assert len(side.take()) < 2 * BURST_BYTES
    assert side.calls[39].finished
    assert sum(call.finished for call in side.calls.values()) == 1
    for _ in identities:  # one a turn
        side.take()
    assert all(side.calls[identity].unsent_bytes < 2**19 for identity in identities)


def test_a_large_answer_does_not_keep_a_small_one_waiting() -> None:
    side = Side()
    peer = Peer(side)
    for identity in (1, 3):
        peer.h2.send_headers(identity, REQUEST, end_stream=True)
    peer.exchange()
    side.send(side.calls[1], ANSWER, bytes(2**20), TRAILERS)
    side.send(side.calls[3], ANSWER, b"small", TRAILERS)
    peer.exchange()
    ended = [event.stream_id for event in peer.events if isinstance(event, h2.events.StreamEnded)]
    assert ended == [3, 1]


def test_a_client_of_ours_is_understood_by_a_server() -> None:
    side = Side(client=True)
    peer = Peer(side, client=False)
    head = header_block([(name.encode(), value.encode()) for name, value in REQUEST])
    for number in range(3):
        call = side.call(side.next_id())
        body = bytes([number]) * 200_000
        side.send(call, head, body, b"")
        peer.exchange()
        assert peer.data(call.id) == body
        peer.h2.send_headers(call.id, [(":status", "200")])
        for _ in range(200):
            peer.h2.send_data(call.id, bytes(10_000))
            peer.exchange()
        peer.h2.send_headers(call.id, [("grpc-status", "0")], end_stream=True)
        peer.exchange()
        assert [pairs[0] for pairs in call.headers] == [(":status", "200"), ("grpc-status", "0")]
        assert (len(call.data), call.whole, call.gone) == (2_000_000, True, True)


def test_a_client_hears_of_the_servers_reset() -> None:
    side = Side(client=True)
    peer = Peer(side, client=False)
    call = side.call(side.next_id())
    side.send(call, header_block([(name.encode(), value.encode()) for name, value in REQUEST]), b"x", None)
    peer.exchange()
    peer.h2.reset_stream(call.id)
    peer.exchange()
    assert (call.gone, call.whole) == (True, False)


def test_nobody_can_have_more_kept_than_was_granted() -> None:
    side = Side()
    side.taking = False
    peer = Peer(side)
    peer.h2.send_headers(1, REQUEST)
    with pytest.raises(AssertionError, match="no window"):
        peer.upload(1, bytes(2 * STREAM_WINDOW))
    assert len(side.calls[1].data) == STREAM_WINDOW
    side.grant(side.calls[1], STREAM_WINDOW)
    peer.exchange()
    assert peer.h2.local_flow_control_window(1) == STREAM_WINDOW
    # And who does not keep to it is let go.
    over = frame(http2.DATA, 0, 1, bytes(2**19)) * 9
    with pytest.raises(ConnectionFault, match="more data than was granted to stream 1"):
        side.feed(over)


def test_streams_beyond_the_limit_are_refused_and_may_come_later() -> None:
    side = Side(max_streams=1)
    peer = Peer(side)
    peer.h2.send_headers(1, REQUEST)
    peer.exchange()
    # python-hyper would not send it, so by hand.
    side.feed(frame(http2.HEADERS, http2.END_HEADERS, 3, Encoder().encode(REQUEST)))
    assert frame(http2.RST_STREAM, 0, 3, struct.pack(">I", Code.REFUSED_STREAM)) in side.take()
    assert 3 not in side.calls


def test_who_does_not_read_that_he_is_refused_is_hung_up_on() -> None:
    side = Side(max_streams=0)
    block = Encoder().encode(REQUEST)
    calls = [frame(http2.HEADERS, http2.END_HEADERS, number, block) for number in range(1, 4 * MAX_FRAMES_AHEAD, 2)]
    with pytest.raises(ConnectionFault, match="answers that are not read"):
        side.feed(http2.PREFACE + SETTINGS + b"".join(calls))
    assert side.closing


def test_while_nothing_is_taken_data_waits_in_streams_that_stay_open() -> None:
    side = Side()
    peer = Peer(side)
    peer.h2.send_headers(1, REQUEST, end_stream=True)
    peer.exchange()
    side._stalled = True
    side.send(side.calls[1], ANSWER, b"answer", b"")
    assert side.streams[1].unsent_bytes == len(b"answer")
    side._stalled = False
    peer.exchange()
    assert 1 not in side.streams
    assert peer.data(1) == b"answer"


def test_pings_are_answered_and_pongs_told() -> None:
    side = Side()
    peer = Peer(side)
    peer.h2.ping(b"12345678")
    side.ping()
    peer.exchange()
    acks = [event.ping_data for event in peer.events if isinstance(event, h2.events.PingAckReceived)]
    assert (acks, side.pongs) == ([b"12345678"], 1)


def test_a_new_initial_window_counts_for_streams_that_are_open() -> None:
    side = Side()
    peer = Peer(side)
    peer.h2.send_headers(1, REQUEST, end_stream=True)
    peer.h2.update_settings({h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: 10})
    peer.exchange()
    side.send(side.calls[1], ANSWER, bytes(30_000), TRAILERS)
    side.take()
    assert side.calls[1].unsent_bytes == 30_000 - 10
    peer.h2.update_settings({h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: 30_000})
    peer.side.feed(peer.h2.data_to_send())
    side.take()
    assert side.calls[1].unsent_bytes == 0


def frame(kind: int, flags: int, identity: int, payload: bytes) -> bytes:
    return len(payload).to_bytes(3) + bytes((kind, flags)) + identity.to_bytes(4) + payload


HEAD = Encoder().encode(REQUEST)
OPEN = frame(http2.HEADERS, http2.END_HEADERS, 1, HEAD)
THIRD = frame(http2.HEADERS, http2.END_HEADERS, 3, HEAD)
DATA_1, DATA_3 = (frame(http2.DATA, 0, identity, b"a") for identity in (1, 3))
SETTINGS = frame(http2.SETTINGS, 0, 0, b"")

LONG = frame(http2.CONTINUATION, 0, 1, bytes(9000))
BOMB = b"\x40\x01a\x7f\xe0\x1e" + bytes(4063) + b"\xbe" * 10
"""One entry that fills the table, and that one again and again."""


def setting(name: int, value: int) -> bytes:
    return frame(http2.SETTINGS, 0, 0, struct.pack(">HI", name, value))


@pytest.mark.parametrize(
    ("sent", "code"),
    [
        (OPEN, Code.PROTOCOL_ERROR),  # before any settings
        (SETTINGS + frame(http2.HEADERS, 4, 2, HEAD), Code.PROTOCOL_ERROR),
        (SETTINGS + frame(http2.HEADERS, 4, 0, HEAD), Code.PROTOCOL_ERROR),
        (SETTINGS + frame(http2.HEADERS, 0, 1, HEAD) + SETTINGS, Code.PROTOCOL_ERROR),
        (SETTINGS + frame(http2.CONTINUATION, 4, 1, HEAD), Code.PROTOCOL_ERROR),
        (SETTINGS + frame(http2.HEADERS, 0, 1, b"") + frame(http2.CONTINUATION, 0, 1, b""), Code.ENHANCE_YOUR_CALM),
        (SETTINGS + frame(http2.HEADERS, 0, 1, b"") + LONG * 2, Code.ENHANCE_YOUR_CALM),
        (SETTINGS + frame(http2.HEADERS, 4, 1, b"\xff\xff\xff\xff\xff"), Code.COMPRESSION_ERROR),
        (SETTINGS + frame(http2.HEADERS, 4, 1, b"\xfe"), Code.COMPRESSION_ERROR),
        (SETTINGS + frame(http2.HEADERS, 4, 1, BOMB), Code.COMPRESSION_ERROR),
        (SETTINGS + frame(http2.HEADERS, 12, 1, b"\xff"), Code.PROTOCOL_ERROR),
        (SETTINGS + frame(http2.HEADERS, 0x24, 1, b"\0"), Code.FRAME_SIZE_ERROR),
        (SETTINGS + OPEN + frame(http2.DATA, 8, 1, b"\x05abc"), Code.PROTOCOL_ERROR),
        (SETTINGS + frame(http2.DATA, 0, 1, b"a"), Code.PROTOCOL_ERROR),
        (SETTINGS + frame(http2.DATA, 0, 0, b"a"), Code.PROTOCOL_ERROR),
        (SETTINGS + OPEN + frame(http2.DATA, 1, 1, b"a") + frame(http2.DATA, 0, 1, b"a"), Code.STREAM_CLOSED),
        (SETTINGS + OPEN + frame(http2.DATA, 1, 1, b"a") + frame(http2.DATA, 1, 1, b""), Code.STREAM_CLOSED),
        (SETTINGS + OPEN + THIRD + DATA_3 + frame(http2.DATA, 1, 1, b"a") + DATA_3 + DATA_1, Code.STREAM_CLOSED),
        (SETTINGS + OPEN + DATA_1 + DATA_3, Code.PROTOCOL_ERROR),
        (SETTINGS + OPEN + DATA_1 + (2**20 + 1).to_bytes(3) + bytes(2) + b"\0\0\0\1", Code.FRAME_SIZE_ERROR),
        (SETTINGS + OPEN + frame(http2.DATA, 1, 1, b"") + OPEN, Code.STREAM_CLOSED),
        (SETTINGS + frame(http2.RST_STREAM, 0, 1, bytes(4)), Code.PROTOCOL_ERROR),
        (SETTINGS + OPEN + frame(http2.RST_STREAM, 0, 1, bytes(3)), Code.FRAME_SIZE_ERROR),
        (SETTINGS + frame(http2.WINDOW_UPDATE, 0, 1, b"\0\0\0\1"), Code.PROTOCOL_ERROR),
        (SETTINGS + frame(http2.WINDOW_UPDATE, 0, 0, b"\0\0\0\0"), Code.FLOW_CONTROL_ERROR),
        (SETTINGS + frame(http2.WINDOW_UPDATE, 0, 0, b"\x7f\xff\xff\xff"), Code.FLOW_CONTROL_ERROR),
        (SETTINGS + frame(http2.PUSH_PROMISE, 4, 1, b"\0\0\0\2" + HEAD), Code.PROTOCOL_ERROR),
        (SETTINGS + frame(http2.PING, 0, 0, bytes(7)), Code.FRAME_SIZE_ERROR),
        (SETTINGS + frame(http2.PING, 0, 1, bytes(8)), Code.PROTOCOL_ERROR),
        (SETTINGS + frame(http2.PING, 0, 0, bytes(8)) * 1001, Code.ENHANCE_YOUR_CALM),
        (SETTINGS * 1001, Code.ENHANCE_YOUR_CALM),
        (SETTINGS + frame(http2.SETTINGS, 1, 0, bytes(6)), Code.FRAME_SIZE_ERROR),
        (frame(http2.SETTINGS, 0, 0, bytes(5)), Code.FRAME_SIZE_ERROR),
        (setting(http2.INITIAL_WINDOW_SIZE, 2**31), Code.FLOW_CONTROL_ERROR),
        (setting(http2.MAX_FRAME_SIZE, 1), Code.PROTOCOL_ERROR),
        (setting(http2.ENABLE_PUSH, 2), Code.PROTOCOL_ERROR),
        (SETTINGS + (2**20 + 1).to_bytes(3) + bytes(2) + b"\0\0\0\1", Code.FRAME_SIZE_ERROR),
    ],
)  # fmt: skip
def test_who_breaks_a_rule_of_the_connection_is_told_which(sent: bytes, code: Code) -> None:
    side = Side()
    side.take()
    with pytest.raises(ConnectionFault) as caught:
        side.feed(http2.PREFACE + sent)
    assert caught.value.code is code
    goodbye = b""
    while side.unsent:
        goodbye += side.take()
    at = goodbye.index(bytes((http2.GOAWAY, 0, 0, 0, 0, 0)))
    assert int.from_bytes(goodbye[at + 10 : at + 14]) == code
    assert side.closing


def test_what_is_no_http2_is_seen_at_its_first_byte() -> None:
    for sent in (b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01", b"PRI * HTTP/2.0\r\n\r\nSMxx"):
        with pytest.raises(ConnectionFault, match="not HTTP/2"):
            Side().feed(sent)


@given(st.binary(max_size=200), st.lists(st.integers(0, 200), max_size=4))
def test_noise_raises_nothing_but_faults(noise: bytes, cuts: list[int]) -> None:
    side = Side()
    sent = http2.PREFACE + SETTINGS + OPEN + noise
    edges = [0, *sorted(min(cut, len(sent)) for cut in cuts), len(sent)]
    try:
        for start, end in itertools.pairwise(edges):
            side.feed(sent[start:end])
    except ConnectionFault:
        assert side.closing


MESSAGES = st.lists(st.one_of(st.binary(max_size=30), st.integers(0, 50_000).map(bytes)), max_size=5)


@given(MESSAGES, st.sampled_from(["", "gzip"]), st.lists(st.lists(st.integers(1, 20_000), min_size=1), min_size=1))
def test_messages_are_put_together_whatever_they_are_cut_into(
    messages: list[bytes], encoding: str, cuts: list[list[int]]
) -> None:
    sent = b"".join(joined(frame_message(message, encoding)) for message in messages)
    reader, got, at = MessageReader(2**20, encoding), list[bytes](), 0
    for sizes in itertools.cycle(cuts):
        parts = []
        for size in sizes:
            if part := sent[at : at + size]:
                parts.append(bytearray(part))
            at += size
        if parts:
            got += reader.feed([memoryview(part) for part in parts], sum(map(len, parts)))
        for lent in parts:
            lent[:] = bytes(len(lent))
        if at >= len(sent):
            break
    assert got == messages
    assert all(type(message) is bytes for message in got)
    assert reader.held == 0


def test_a_message_that_claims_to_be_large_takes_up_little() -> None:
    reader, came = MessageReader(2**31 - 1), 2**16
    tracemalloc.start()
    try:
        assert not list(reader.feed([b"\0\x7f\xff\xff\xff", bytes(came)], PREFIX_BYTES + came))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2 * GROWTH * came
    assert GROWTH * came <= reader.held < 2 * GROWTH * came


def test_a_message_of_which_nothing_came_yet_is_seen() -> None:
    reader = MessageReader(100)
    assert not list(reader.feed([b"\0\0\0\0\x05"], PREFIX_BYTES))
    assert reader.held
    assert list(reader.feed([b"12345"], 5)) == [b"12345"]
