"""An event loop in a thread of its own, for those who block and ask what awaits."""

import asyncio
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import CancelledError, Future
from contextlib import AbstractAsyncContextManager
from typing import Any, Final, Generic, TypeVar

from hedgerow.errors import HedgerowError

CLOSED: Final = "the client is closed"

R = TypeVar("R")
T = TypeVar("T")


class LoopThread(Generic[T]):
    """An event loop in a thread of its own, and what was `opened` in it."""

    def __init__(self, opening: AbstractAsyncContextManager[T]) -> None:
        self._lock = threading.Lock()
        self._closed = False
        self._stop = asyncio.Event()
        opened: Future[tuple[asyncio.AbstractEventLoop, T]] = Future()
        self._ended: Future[None] = Future()

        async def live() -> None:
            async with opening as value:
                opened.set_result((asyncio.get_running_loop(), value))
                await self._stop.wait()

        def thread() -> None:
            try:
                asyncio.run(live())
            except BaseException as error:  # noqa: BLE001 (raised in the thread that waits for it)
                (self._ended if opened.done() else opened).set_exception(error)
            else:
                self._ended.set_result(None)

        self._thread = threading.Thread(target=thread, name="hedgerow-client", daemon=True)
        self._thread.start()
        self._loop, self.opened = opened.result()

    def start(self, coroutine: Coroutine[Any, Any, R]) -> Future[R]:
        """Run `coroutine` in the loop."""
        with self._lock:  # so that whatever is started precedes the end, and is cancelled there
            if not self._closed:
                return asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        coroutine.close()
        raise HedgerowError(CLOSED)

    def run(self, coroutine: Coroutine[Any, Any, R]) -> R:
        """What `coroutine` returns."""
        future = self.start(coroutine)
        try:
            return future.result()
        except CancelledError:
            raise HedgerowError(CLOSED) from None
        except BaseException:
            future.cancel()  # Ctrl-C, while it still runs
            raise

    def call(self, function: Callable[[R], object], argument: R) -> bool:
        """Have `function` called in the loop; False if that has ended."""
        with self._lock:
            if not self._closed:
                self._loop.call_soon_threadsafe(function, argument)
            return not self._closed

    def close(self) -> None:
        """Leave what was opened, cancel what still runs, and wait for that. Idempotent."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._loop.call_soon_threadsafe(self._stop.set)
        self._ended.result()
