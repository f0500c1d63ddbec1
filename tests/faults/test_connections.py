"""Hostile, broken and merely many connections: nobody else notices, and nothing is left of them.

The attacks are in `attacks`; they run over every transport.
"""

import asyncio
import resource
from collections.abc import Iterator
from contextlib import suppress

import grpc
import pytest
from faults.attacks import (
    GARBAGE,
    INFER,
    KNOWN,
    MAX_MESSAGE_BYTES,
    STORMS,
    WRONG_CALLS,
    WRONG_CONNECTIONS,
    Attack,
    not_done,
)
from simulators import victims
from simulators.background import in_background
from simulators.http2 import PREFACE, Gone, Kind, RawConnection, call_fields, frame, settings
from simulators.victims import ECHO, Victim, message

from hedgerow import transports

SPARE_TASKS, SPARE_DESCRIPTORS = 20, 20
"""What may be left: connections that the server has not yet noticed to be gone."""
SPARE_BYTES = 96 * 2**20
"""What an allocator may keep; each storm asks for many times that."""
OPENING = 50
"""Connections that are being opened at once."""


@pytest.fixture(scope="module", params=transports.known())
def transport(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def known(transport: str, wrong: str) -> None:
    """Leave a test that the transport is known to fail: it would wait in vain, or leave the server to die."""
    if reason := KNOWN.get(transport, {}).get(wrong):
        pytest.xfail(reason)


@pytest.fixture(scope="module")
def victim(transport: str) -> Iterator[Victim]:
    with in_background(lambda: victims.running(transport=transport, max_message_bytes=MAX_MESSAGE_BYTES)) as victim:
        yield victim


@pytest.mark.parametrize("attack", STORMS, ids=lambda attack: attack.__name__)
async def test_a_storm_hurts_nobody_else_and_leaves_nothing(attack: Attack, transport: str, victim: Victim) -> None:
    known(transport, attack.__name__)
    await victim.serves()
    before = await victim.vitals()
    async with asyncio.TaskGroup() as group:
        storm = group.create_task(attack(victim.address))
        while not storm.done():
            await victim.serves()
    await victim.recovers(before, tasks=SPARE_TASKS, descriptors=SPARE_DESCRIPTORS, grown_bytes=SPARE_BYTES)


@pytest.mark.parametrize("wrong", WRONG_CONNECTIONS)
async def test_a_connection_that_breaks_the_protocol_is_told_and_closed(
    wrong: str, transport: str, victim: Victim
) -> None:
    known(transport, wrong)
    async with RawConnection(victim.address) as to:
        to.send(WRONG_CONNECTIONS[wrong])
        await to.until_gone()
        assert to.goaway != 0, "no error was said"
    await victim.serves()


@pytest.mark.parametrize("kind", GARBAGE)
async def test_what_is_no_http2_is_hung_up_on(kind: str, victim: Victim) -> None:
    async with RawConnection(victim.address, greet=False) as to:
        to.send(GARBAGE[kind])
        to.half_close()
        await to.until_gone()
    await victim.serves()


@pytest.mark.parametrize("wrong", WRONG_CALLS)
async def test_a_wrong_call_is_refused_and_the_next_one_served(wrong: str, transport: str, victim: Victim) -> None:
    known(transport, wrong)
    async with RawConnection(victim.address) as to:
        to.send(WRONG_CALLS[wrong](to))
        answer = await to.answer(1)
        assert not_done(answer), answer
        assert answer.grpc_status != 2, answer  # UNKNOWN: something unforeseen was raised
        to.send(to.call(3, INFER, message(ECHO)))
        assert (await to.answer(3)).grpc_status == 0


async def test_a_client_that_only_stops_sending_is_answered_or_told(victim: Victim) -> None:
    async with RawConnection(victim.address) as to:
        to.send(to.call(1, INFER, message(ECHO)))
        await to.flush()
        to.half_close()
        with suppress(Gone):  # or is taken to have left, as gRPC's own servers do
            assert (await to.answer(1)).grpc_status in {0, grpc.StatusCode.UNAVAILABLE.value[0]}
    await victim.serves()


async def test_unknown_frames_and_settings_are_passed_over(victim: Victim) -> None:
    async with RawConnection(victim.address) as to:
        to.send(frame(0xBA, 0xFF, 0, b"of a later protocol"), settings({0xBABA: 7}), to.call(1, INFER, message(ECHO)))
        assert (await to.answer(1)).grpc_status == 0


async def test_a_stream_numbered_backwards_harms_no_other(victim: Victim) -> None:
    async with RawConnection(victim.address) as to:
        fields = call_fields(INFER)
        to.send(to.headers(5, fields), to.headers(3, fields), to.call(7, INFER, message(ECHO)))
        with suppress(Gone):  # the better answer; servers that forget what was closed cannot tell
            assert (await to.answer(7)).grpc_status == 0
    await victim.serves()


async def test_a_call_may_come_byte_by_byte(victim: Victim) -> None:
    async with RawConnection(victim.address, greet=False) as to:
        for byte in PREFACE + settings() + to.call(1, INFER, message(ECHO)):
            to.send(bytes([byte]))
            await to.flush()
            await asyncio.sleep(0)
        assert (await to.answer(1)).grpc_status == 0


async def test_a_connection_stays_usable_while_it_is_asked_whether_it_is_there(victim: Victim) -> None:
    async with RawConnection(victim.address) as to:
        to.send(frame(Kind.PING, 0, 0, b"eight by"))
        while (got := await to.read()).kind != Kind.PING:
            pass
        assert (got.flags, got.payload) == (1, b"eight by")


@pytest.mark.parametrize("count", [1_000, pytest.param(10_000, marks=pytest.mark.slow)])
async def test_idle_connections_in_number_keep_nobody_from_being_served(count: int, transport: str) -> None:
    enough = count + 1_000
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < enough:
        pytest.skip(f"{count} connections need more descriptors than the {hard} that a process may have here")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, enough), hard))  # the server inherits it
    try:
        async with victims.running(transport=transport) as victim:
            await victim.serves()
            before = await victim.vitals()
            connections = [RawConnection(victim.address) for _ in range(count)]
            try:
                for at in range(0, count, OPENING):
                    async with asyncio.TaskGroup() as group:
                        for one in connections[at : at + OPENING]:
                            group.create_task(greeted(one))
                held = await victim.vitals()
                assert held.descriptors >= before.descriptors + count
                await victim.serves()
                for one in (connections[0], connections[-1]):
                    one.send(one.call(1, INFER, message(ECHO)))
                    assert (await one.answer(1)).grpc_status == 0
            finally:
                for one in connections:
                    one.abort()
            await victim.recovers(
                before, tasks=SPARE_TASKS, descriptors=SPARE_DESCRIPTORS, grown_bytes=SPARE_BYTES + count * 2**16
            )
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def greeted(connection: RawConnection) -> None:
    """Open a connection and wait for the server's SETTINGS."""
    await connection.__aenter__()
    while (await connection.read()).kind != Kind.SETTINGS:
        pass
