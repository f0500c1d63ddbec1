"""The simulated link: it delays what it says, loses nothing, counts everything, and a cut end is seen at the other."""

import asyncio
import os
import time
from asyncio import StreamReader, StreamWriter
from collections.abc import AsyncIterator

import pytest

from hedgerow_cloud.local.linkshaper import LinkShaper, read_counts

RTT_S = 0.04
Address = tuple[str, int]


@pytest.fixture
async def echo() -> AsyncIterator[Address]:
    async def answer(source: StreamReader, sink: StreamWriter) -> None:
        while block := await source.read(65536):
            sink.write(block)
            await sink.drain()
        sink.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    yield server.sockets[0].getsockname()
    server.close()


async def test_bytes_arrive_whole_in_order_no_earlier_than_the_round_trip(echo: Address) -> None:
    sent = os.urandom(3_000_000)
    async with LinkShaper(echo, rtt_s=RTT_S) as link:
        source, sink = await asyncio.open_connection("127.0.0.1", link.port)
        began = time.monotonic()
        sink.write(b"?")
        assert await source.readexactly(1) == b"?"
        assert time.monotonic() - began >= RTT_S

        async with asyncio.TaskGroup() as group:
            sink.write(sent)
            got = group.create_task(source.readexactly(len(sent)))
            group.create_task(sink.drain())
        assert got.result() == sent
        counts = await read_counts(link.stats_port)
        assert (counts.up_bytes, counts.down_bytes, counts.connections) == (len(sent) + 1, len(sent) + 1, 1)
        sink.close()


async def test_a_target_that_is_gone_closes_the_connection() -> None:
    gone = await asyncio.start_server(lambda *_: None, "127.0.0.1", 0)
    address = gone.sockets[0].getsockname()
    gone.close()
    async with LinkShaper(address, rtt_s=RTT_S) as link:
        source, sink = await asyncio.open_connection("127.0.0.1", link.port)
        assert await asyncio.wait_for(source.read(), 5) == b""
        sink.close()


async def test_the_end_of_a_stream_reaches_the_other_side(echo: Address) -> None:
    async with LinkShaper(echo, rtt_s=RTT_S) as link:
        source, sink = await asyncio.open_connection("127.0.0.1", link.port)
        sink.write(b"last words")
        assert await source.readexactly(10) == b"last words"
        sink.write_eof()
        assert await asyncio.wait_for(source.read(), 5) == b""
        sink.close()
