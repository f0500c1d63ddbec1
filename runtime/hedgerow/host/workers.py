"""Blocking work off the event loop, on a few threads of one's own."""

import asyncio
import contextlib
import threading
from collections.abc import Callable
from queue import SimpleQueue


class Workers:
    """Up to `threads` threads, each started when it is first needed. Belongs to one event loop.

    They are daemons: one that never comes back from an engine must not keep the process from ending.
    """

    def __init__(self, threads: int, name: str) -> None:
        self._limit = threads
        self._name = name
        self._threads: list[threading.Thread] = []
        self._jobs: SimpleQueue[tuple[Callable[[], None], Callable[[], None]] | None] = SimpleQueue()
        self._busy = 0

    def submit(self, work: Callable[[], None], done: Callable[[], None]) -> None:
        """Call `work` on a thread, then `done` on the event loop. `work` must not raise.

        Never blocks: with more jobs than threads, the last ones wait.
        """
        self._busy += 1
        if self._busy > len(self._threads) < self._limit:
            name = f"{self._name}-{len(self._threads)}"
            thread = threading.Thread(target=self._run, args=(asyncio.get_running_loop(),), name=name, daemon=True)
            self._threads.append(thread)
            thread.start()
        self._jobs.put((work, done))

    def close(self) -> None:
        """Let the threads end, each after what it is doing. Idempotent."""
        for _ in self._threads:
            self._jobs.put(None)
        self._threads.clear()
        self._limit = 0

    def _run(self, loop: asyncio.AbstractEventLoop) -> None:
        """On a thread."""
        while (job := self._jobs.get()) is not None:
            work, done = job
            work()
            with contextlib.suppress(RuntimeError):  # the loop was closed meanwhile, and nobody waits
                loop.call_soon_threadsafe(self._finished, done)

    def _finished(self, done: Callable[[], None]) -> None:
        self._busy -= 1
        done()
