"""Health, and the little server that tells it: whatever is sent to it, it stays."""

import asyncio
from contextlib import AsyncExitStack

import pytest
from simulators.devices import SOON_S, Device, get, raw

from hedgerow.errors import ConfigError
from hedgerow.telemetry import diagnostics
from hedgerow.telemetry.diagnostics import Diagnostics, Page, health


async def test_ready_says_no_while_a_model_is_missing_and_live_says_yes(device: Device) -> None:
    assert await get(device.watched, "/readyz") == (200, "ready\n")
    device.server.service.draining = True
    assert (await get(device.watched, "/readyz"))[0] == 503
    assert await get(device.watched, "/healthz") == (200, "ok\n")
    assert (await device.metrics())["hedgerow_draining"] == {(): 1}


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"GET /nothing HTTP/1.1\r\n\r\n", 404),
        (b"POST /healthz HTTP/1.1\r\n\r\n", 405),
        (b"garbage\r\n\r\n", 400),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
        (b"GET /healthz HTTP/1.1\r\nX: " + b"x" * 2 * diagnostics.MAX_HEAD_BYTES, 431),
        (b"GET /healthz?x=1 HTTP/1.0\r\n\xff\x00: \xfe\r\nno colon\r\n\r\n", 200),
        (b"GET /broken HTTP/1.1\r\n\r\n", 500),
    ],
)
async def test_whatever_is_sent_it_gets_an_answer_and_the_server_stays(
    sent: bytes, status: int, caplog: pytest.LogCaptureFixture
) -> None:
    async def broken(_: str) -> Page:
        raise RuntimeError("of this page")

    async def ready() -> bool:
        return True

    async with Diagnostics("127.0.0.1:0", {"/broken": broken, **health(ready)}) as watched:
        answer = await raw(watched.address, sent)
        assert answer.split(b" ")[1] == str(status).encode()
        assert "of this page" not in answer.decode()
        assert ("of this page" in caplog.text) == (status == 500)
        assert await get(watched.address, "/readyz") == (200, "ready\n")
        assert await get(watched.address, "/readyz", "HEAD") == (200, "")


async def silent(stack: AsyncExitStack, address: str, sent: bytes = b"") -> asyncio.StreamReader:
    """A peer that does not finish what it says."""
    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    stack.callback(writer.close)
    writer.write(sent)
    await writer.drain()
    return reader


async def test_peers_that_say_nothing_are_let_go(stack: AsyncExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagnostics, "TIMEOUT_S", 0.2)
    watched = await stack.enter_async_context(Diagnostics("127.0.0.1:0", health(_always)))
    async with asyncio.timeout(SOON_S):
        reader = await silent(stack, watched.address, b"GET /heal")
        assert await reader.read() == b""


async def test_more_connections_than_it_takes_are_closed_at_once_and_do_no_harm(
    stack: AsyncExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(diagnostics, "TIMEOUT_S", 10 * SOON_S)
    watched = await stack.enter_async_context(Diagnostics("127.0.0.1:0", health(_always)))
    async with AsyncExitStack() as peers:
        for _ in range(diagnostics.MAX_CONNECTIONS):
            await silent(peers, watched.address)
        assert await raw(watched.address, b"") == b""
    async with asyncio.timeout(SOON_S):
        while not await raw(watched.address, b"GET /healthz HTTP/1.1\r\n\r\n"):  # noqa: ASYNC110 (nobody tells)
            await asyncio.sleep(0.01)


async def test_leaving_does_not_wait_for_a_peer_that_says_nothing(stack: AsyncExitStack) -> None:
    async with asyncio.timeout(SOON_S), Diagnostics("127.0.0.1:0", health(_always)) as watched:
        reader = await silent(stack, watched.address, b"GET /heal")
        assert await get(watched.address, "/healthz") == (200, "ok\n")
    assert await reader.read() == b""


async def test_an_address_that_is_taken_is_an_error_that_names_the_setting() -> None:
    async with Diagnostics("127.0.0.1:0", {}) as first:
        with pytest.raises(ConfigError, match=r"metrics\.listen: cannot listen on"):
            await Diagnostics(first.address, {}).__aenter__()


async def _always() -> bool:
    return True
