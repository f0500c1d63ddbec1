"""How a daemon lives: started with logging and signals, its loops supervised, its work in flight counted and drained.

::

    async def main(stop: asyncio.Event) -> None:
        async with Server(backend, settings) as server:
            await supervise(stop, link=link.run(), status=report(link))

    sys.exit(run(main))

Tasks live in a TaskGroup that belongs to whoever waits for it, so that a crash reaches somebody.
"""

import asyncio
import gc
import logging
import signal
import sys
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from typing import Any, Self

from hedgerow.errors import ConfigError, HedgerowError
from hedgerow.telemetry.logs import configure_logging

SWITCH_S = 0.0005
EXIT_OK = 0
EXIT_FAILED = 1
EXIT_CONFIG = 2
"""A setting is wrong: starting again will not help."""

log = logging.getLogger(__name__)


def run(main: Callable[[asyncio.Event], Awaitable[None]], *, log_level: str = "INFO") -> int:
    """Run `main(stop)` to its end and return the process's exit code. For the main thread.

    SIGTERM and SIGINT set `stop`, upon which `main` should let go and return; the second one cancels it, and the code
    is 128 + the signal's number. An error of `hedgerow.errors` is logged in a line, any other with its traceback.
    """
    configure_logging(log_level)
    return asyncio.run(_run(main))


def settle() -> None:
    """Take all that is there for lasting: for a daemon to call once, when it has loaded its models and will serve.

    The collector of reference cycles looks through everything several times a second under load, and all calls in
    flight wait 10 to 20 ms for it. What is there now it passes over from here on. And a thread that comes back from an
    engine gets the interpreter within `SWITCH_S` from an event loop that is busy; by default it may wait ten times as
    long, for nothing but reading what will be refused.
    """
    gc.collect()
    gc.freeze()
    sys.setswitchinterval(SWITCH_S)


async def supervise(stop: asyncio.Event, **loops: Coroutine[Any, Any, None]) -> None:
    """Run the named `loops` side by side until `stop` is set, then cancel and await them.

    A loop may end by itself. If one raises, the others are cancelled and the error comes out (in an ExceptionGroup).
    """
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(loop, name=name) for name, loop in loops.items()]
        await stop.wait()
        for task in tasks:
            task.cancel()


class InFlight:
    """Counts work between entering and leaving ``with``, and lets one wait until there is none."""

    def __init__(self) -> None:
        self.count = 0
        self._idle = asyncio.Event()
        self._idle.set()

    def enter(self) -> None:
        """Something begins."""
        self.count += 1
        if self.count == 1:
            self._idle.clear()

    def leave(self) -> None:
        """Something that has entered ends."""
        self.count -= 1
        if not self.count:
            self._idle.set()

    def __enter__(self) -> Self:
        self.enter()
        return self

    def __exit__(self, *_: object) -> None:
        self.leave()

    async def idle(self, timeout_s: float | None = None) -> bool:
        """Wait until nothing is in flight, at most `timeout_s`; whether that came about."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True


async def _run(main: Callable[[asyncio.Event], Awaitable[None]]) -> int:
    stop, killed_by = asyncio.Event(), 0
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None

    def on_signal(number: int) -> None:
        nonlocal killed_by
        name = signal.Signals(number).name
        if stop.is_set():
            log.warning("%s again: leaving at once", name)
            killed_by = number
            task.cancel()
        else:
            log.info("%s: stopping", name)
            stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal, number)
    try:
        await main(stop)
    except asyncio.CancelledError:
        if not killed_by:
            raise
        return 128 + killed_by
    except Exception as error:  # the end of the line: a log entry and an exit code
        leaves = list(_leaves(error))
        for leaf in leaves:
            if isinstance(leaf, HedgerowError):
                log.error("%s", leaf)  # noqa: TRY400 (its message says it all)
            else:
                log.critical("stopped by an unexpected error", exc_info=leaf)
        return EXIT_CONFIG if all(isinstance(leaf, ConfigError) for leaf in leaves) else EXIT_FAILED
    return EXIT_OK


def _leaves(error: Exception) -> Iterator[Exception]:
    if isinstance(error, ExceptionGroup):
        for inner in error.exceptions:
            yield from _leaves(inner)
    else:
        yield error
