"""A small HTTP server for whoever watches the process: metrics, and whether it lives and is ready.

HTTP/1.1, GET and HEAD, one answer a connection. Everything that a peer can do to it is bounded: connections, the size
of what is asked, the time that it takes.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from http import HTTPStatus
from typing import Final, Self

from hedgerow import rpc
from hedgerow.errors import ConfigError, HedgerowError

MAX_CONNECTIONS = 16
"""More are closed at once."""
MAX_HEAD_BYTES = 8192
"""Of a request's line and headers."""
TIMEOUT_S = 5.0
"""Within which a peer must have asked and taken the answer."""
PLAIN: Final = "text/plain; charset=utf-8"

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Page:
    """What is answered."""

    body: bytes
    kind: str = PLAIN
    status: HTTPStatus = HTTPStatus.OK


Pages = Mapping[str, Callable[[str], Awaitable[Page]]]
"""By path: what makes the page for a caller with an Accept header."""


def health(ready: Callable[[], Awaitable[bool]]) -> Pages:
    """``/healthz``, which answers while the process does, and ``/readyz``, which asks whether it is `ready`."""

    async def healthz(_: str) -> Page:
        return Page(b"ok\n")

    async def readyz(_: str) -> Page:
        try:
            if await ready():
                return Page(b"ready\n")
        except HedgerowError as error:
            return Page(f"not ready: {error}\n".encode(), status=HTTPStatus.SERVICE_UNAVAILABLE)
        return Page(b"not ready\n", status=HTTPStatus.SERVICE_UNAVAILABLE)

    return {"/healthz": healthz, "/readyz": readyz}


class Diagnostics:
    """Serves `pages` at `listen` ("host:port") between entering and leaving ``async with``.

    Entering raises `ConfigError` if the address cannot be had.
    """

    def __init__(self, listen: str, pages: Pages) -> None:
        host, _, port = listen.rpartition(":")
        self._host, self._port = host.strip("[]"), int(port)
        self._pages = pages
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()

    @property
    def address(self) -> str:
        """Where it listens: "host:port"."""
        return rpc.address(self._host, self._port)

    async def __aenter__(self) -> Self:
        try:
            self._server = await asyncio.start_server(self._serve, self._host, self._port, limit=MAX_HEAD_BYTES)
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ConfigError(f"metrics.listen: cannot listen on {self.address}: {reason}") from error
        self._port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        for connection in tuple(self._connections):
            connection.cancel()
        if self._connections:
            await asyncio.wait(self._connections)
        await self._server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(self._connections) >= MAX_CONNECTIONS:
            writer.transport.abort()
            return
        task = asyncio.current_task()  # asyncio's own, of this connection
        assert task is not None
        self._connections.add(task)
        try:
            async with asyncio.timeout(TIMEOUT_S):
                await self._answer(reader, writer)
        except (OSError, asyncio.CancelledError):  # a peer that is slow or gone, or the end
            writer.transport.abort()
        finally:
            self._connections.discard(task)
            writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = b""
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            page = await self._page(head.decode("latin-1"))
        except asyncio.IncompleteReadError:
            return
        except asyncio.LimitOverrunError:
            page = Page(b"too much was asked\n", status=HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)
        except Exception:
            log.exception("a page could not be made")
            page = Page(b"internal error; the log has it\n", status=HTTPStatus.INTERNAL_SERVER_ERROR)
        lines = (
            f"HTTP/1.1 {page.status.value} {page.status.phrase}",
            f"Content-Type: {page.kind}",
            f"Content-Length: {len(page.body)}",
            "Cache-Control: no-store",
            "Connection: close",
        )
        writer.write("\r\n".join((*lines, "", "")).encode("latin-1"))
        if not head.startswith(b"HEAD "):
            writer.write(page.body)
        await writer.drain()
        writer.write_eof()
        while await reader.read(MAX_HEAD_BYTES):
            pass  # closed with something unread, the connection would be reset and take the answer with it

    async def _page(self, head: str) -> Page:
        first, *lines = head.split("\r\n")
        match first.split(" "):
            case [method, target, version] if version.startswith("HTTP/1."):
                pass
            case _:
                return Page(b"this is no request of HTTP/1\n", status=HTTPStatus.BAD_REQUEST)
        make = self._pages.get(target.partition("?")[0])
        if make is None:
            known = ", ".join(self._pages)
            return Page(f"there is: {known}\n".encode(), status=HTTPStatus.NOT_FOUND)
        if method not in {"GET", "HEAD"}:
            return Page(b"only GET and HEAD\n", status=HTTPStatus.METHOD_NOT_ALLOWED)
        headers = {name.strip().casefold(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        return await make(headers.get("accept", ""))


async def watched(stack: AsyncExitStack, listen: str, pages: Pages) -> str:
    """Let `pages` be read at `listen` until `stack` ends; the address.

    Serving does not depend on it: what is in the way is said, and the address is empty, as it is for an empty `listen`.
    """
    if not listen:
        return ""
    try:
        diagnostics = await stack.enter_async_context(Diagnostics(listen, pages))
    except ConfigError as error:
        log.warning("there are no metrics to read: %s", error)
        return ""
    log.info("metrics are at http://%s/metrics", diagnostics.address)
    return diagnostics.address
