"""Blocking work off the event loop, on a few threads of one's own: short work over and over, or calls that may hang."""

import asyncio
import contextlib
import threading
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import Any, Generic, TypeVar

T = TypeVar("T")


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
            del job, work, done  # and with them the tensors, instead of at the next job

    def _finished(self, done: Callable[[], None]) -> None:
        self._busy -= 1
        done()


class _Job(Generic[T]):
    __slots__ = ("after", "future", "given_up", "late", "timer", "too_late", "work")

    def __init__(
        self,
        work: Callable[[], T],
        future: "asyncio.Future[T]",
        too_late: Exception,
        late: Callable[[T | None], None],
        after: "Sequence[asyncio.Future[Any]]",
    ) -> None:
        self.work = work
        self.future = future
        self.too_late = too_late
        self.late = late
        self.after = after
        self.given_up = False
        self.timer: asyncio.TimerHandle | None = None


class Abandoning:
    """Calls that may never come back, each on a daemon thread of its own. Belongs to one event loop.

    Up to `threads` of them run at once, the others wait for their turn. One that has not come back `timeout_s` after it
    began is given up: its thread is left alone with it, and somebody else has its place.
    """

    def __init__(self, threads: int, timeout_s: float, name: str) -> None:
        self._limit = threads
        self._timeout_s = timeout_s
        self._name = name
        self._running = 0
        self._waiting: list[_Job[Any]] = []
        self.abandoned = 0
        """Calls that were given up and have not come back yet."""

    def submit(
        self,
        work: Callable[[], T],
        *,
        too_late: Exception,
        late: Callable[[T | None], None] = lambda _: None,
        after: "Sequence[asyncio.Future[Any]]" = (),
    ) -> "asyncio.Future[T]":
        """What `work` gives or raises, once all of `after`, which were given out here, are done. Not to be cancelled.

        If it is given up, the future raises `too_late`. Should it still come back, `late` is called on the event loop
        with what it gives, or with None if it raises.
        """
        job = _Job(work, asyncio.get_running_loop().create_future(), too_late, late, after)
        self._waiting.append(job)
        self._next()
        return job.future

    def _next(self) -> None:
        """Begin what may begin."""
        for job in list(self._waiting):
            if self._running == self._limit:
                return
            if all(future.done() for future in job.after):
                self._waiting.remove(job)
                self._begin(job)

    def _begin(self, job: _Job[Any]) -> None:
        loop = asyncio.get_running_loop()
        self._running += 1
        job.timer = loop.call_later(self._timeout_s, self._give_up, job)
        try:
            threading.Thread(target=self._run, args=(loop, job), name=self._name, daemon=True).start()
        except RuntimeError as error:  # the machine has no more threads
            self._came_back(job, None, error)

    def _run(self, loop: asyncio.AbstractEventLoop, job: _Job[Any]) -> None:
        """On a thread."""
        result, error = None, None
        try:
            result = job.work()
        except BaseException as raised:  # noqa: BLE001 (handed over)
            error = raised
        with contextlib.suppress(RuntimeError):  # the loop was closed meanwhile, and nobody waits
            loop.call_soon_threadsafe(self._came_back, job, result, error)

    def _came_back(self, job: _Job[Any], result: Any, error: BaseException | None) -> None:
        if job.given_up:
            self.abandoned -= 1
            job.late(result)
            return
        assert job.timer is not None
        job.timer.cancel()
        self._running -= 1
        if error is None:
            job.future.set_result(result)
        else:
            job.future.set_exception(error)
        self._next()

    def _give_up(self, job: _Job[Any]) -> None:
        job.given_up = True
        self._running -= 1
        self.abandoned += 1
        job.future.set_exception(job.too_late)
        self._next()
