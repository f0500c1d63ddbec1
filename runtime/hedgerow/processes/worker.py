"""The side of a process that serves beside others: started by a `Supervisor`, gone when that is gone.

::

    @asynccontextmanager
    async def serving(told: bytes) -> AsyncIterator[Front]:
        async with Front(...) as front:
            yield front

    sys.exit(run(serving))
"""

import asyncio
import ctypes
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from functools import partial
from pathlib import Path
from typing import Protocol

import msgspec

from hedgerow import lifecycle
from hedgerow.isolation.child import PR_SET_PDEATHSIG
from hedgerow.processes.line import Report, frame, read_frame

log = logging.getLogger(__name__)


class Front(Protocol):
    """What serves in such a process."""

    async def start(self) -> None:
        """Listen."""
        ...

    async def report(self) -> Report:
        """How it fares."""
        ...


Serving = Callable[[bytes], AbstractAsyncContextManager[Front]]
"""Gives what is to serve as it is told, ready to listen; drains it in the end."""


def run(serving: Serving) -> int:
    """Serve until the parent hangs up, or a signal; the process's exit code. For the main thread."""
    # A parent that is killed takes us along, whatever we are doing; where it ends well, the line's end says so first.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    line = socket.socket(fileno=os.dup(sys.stdin.fileno()))
    with Path(os.devnull).open("rb") as nothing:  # or what we start would hold the line open after us
        os.dup2(nothing.fileno(), sys.stdin.fileno())
    return lifecycle.run(partial(_serve, serving, line))


async def _serve(serving: Serving, line: socket.socket, stop: asyncio.Event) -> None:
    reader, writer = await asyncio.open_unix_connection(sock=line)
    if (told := await _next(reader)) is None:
        return
    async with serving(told) as front:
        writer.write(frame(b""))
        if await _next(reader) is None:
            return
        lifecycle.settle()
        await front.start()
        writer.write(frame(b""))
        await lifecycle.supervise(stop, line=_answer(reader, writer, front, stop))


async def _answer(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, front: Front, stop: asyncio.Event
) -> None:
    while await _next(reader) is not None:
        try:
            report = await front.report()
        except Exception:
            log.exception("a report could not be made")
            report = Report(ready=False, metrics=b"")
        writer.write(frame(msgspec.msgpack.encode(report)))
    stop.set()


async def _next(reader: asyncio.StreamReader) -> bytes | None:
    """The parent's next frame; None when it has hung up or is gone."""
    try:
        return await read_frame(reader)
    except EOFError:
        return None
