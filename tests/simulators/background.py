"""Anything asynchronous, running in a thread of its own, so that blocking clients can talk to it from a test."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import AbstractAsyncContextManager, contextmanager
from typing import TypeVar

START_S = 90.0
STOP_S = 30.0

T = TypeVar("T")


@contextmanager
def in_background(make: Callable[[], AbstractAsyncContextManager[T]]) -> Iterator[T]:
    """Enter what `make` gives in another thread's event loop; give what it gave; leave it there at the end."""
    entered: Future[tuple[T, asyncio.AbstractEventLoop, asyncio.Event]] = Future()
    left: Future[None] = Future()

    async def live() -> None:
        stop = asyncio.Event()
        async with make() as value:
            entered.set_result((value, asyncio.get_running_loop(), stop))
            await stop.wait()

    def thread() -> None:
        try:
            asyncio.run(live())
        except BaseException as error:  # noqa: BLE001 (it is the test's to raise)
            (left if entered.done() else entered).set_exception(error)
        else:
            left.set_result(None)

    runner = threading.Thread(target=thread, name="background", daemon=True)
    runner.start()
    value, loop, stop = entered.result(START_S)
    try:
        yield value
    finally:
        loop.call_soon_threadsafe(stop.set)
        left.result(STOP_S)
        runner.join(STOP_S)
