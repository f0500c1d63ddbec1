"""Blocking work off the event loop: a few threads, a bounded queue, and deadlines that hold while queued."""

import asyncio
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from hedgerow.backend import Deadline
from hedgerow.errors import DeadlineExceeded, Overloaded, Unavailable

T = TypeVar("T")


@dataclass(slots=True)
class _Job:
    work: Callable[[], Any]
    deadline: Deadline
    finished: Callable[[], None]
    answer: asyncio.Future[Any]


class Workers:
    """`threads` threads, and at most `queue_size` callers waiting for one. Belongs to one event loop.

    Callers wait on the event loop, where cancelling or the deadline takes them out of the queue at once. As many jobs
    as there are threads are handed over ahead, so that a thread starts the next one without a trip over the loop.
    """

    def __init__(self, threads: int, queue_size: int, name: str) -> None:
        self._threads = threads
        self._queue_size = queue_size
        self._waiting = 0
        self._slots = asyncio.Semaphore(2 * threads)
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix=name)

    def backlog_s(self, each_s: float | None) -> float | None:
        """How long the queue takes to empty when a job takes `each_s`."""
        return None if each_s is None else each_s * (self._waiting + 2 * self._threads) / self._threads

    async def run(
        self, work: Callable[[], T], deadline: Deadline, finished: Callable[[], None], each_s: float | None = None
    ) -> T:
        """What `work()` returns or raises.

        `finished` is called once, on the loop, when no thread will touch the work any more: a caller that has left
        cannot stop a thread. Raises `Overloaded` at once if the queue is full, with a wait estimated from `each_s`,
        `DeadlineExceeded` when the deadline passes, and `Unavailable` for what still waits when the workers are closed;
        work whose caller has left before it began is never run.
        """
        handed_over = False
        try:
            if self._slots.locked() and self._waiting >= self._queue_size:
                raise Overloaded(
                    f"the queue is full: {self._waiting} requests are waiting", retry_after_s=self.backlog_s(each_s)
                )
            async with asyncio.timeout(None if math.isinf(deadline.at) else deadline.remaining):
                self._waiting += 1
                try:
                    await self._slots.acquire()
                finally:
                    self._waiting -= 1
                loop = asyncio.get_running_loop()
                job = _Job(work, deadline, finished, loop.create_future())
                try:
                    self._pool.submit(self._execute, job, loop)
                except RuntimeError as error:
                    self._slots.release()  # so that the next in the queue hears it too
                    raise Unavailable("no more requests are taken here: it is closing") from error
                handed_over = True
                answer: T = await job.answer
                return answer
        except TimeoutError:
            doing = "the model had answered" if handed_over else "a worker was free"
            raise DeadlineExceeded(f"the deadline passed before {doing}") from None
        finally:
            if not handed_over:
                finished()

    def close(self) -> None:
        """Let the threads go; what is handed over still runs. Idempotent."""
        self._pool.shutdown(wait=False)

    def _execute(self, job: _Job, loop: asyncio.AbstractEventLoop) -> None:
        """On a thread."""
        answer, error = None, None
        try:
            if not job.answer.cancelled():
                job.deadline.check("a worker was free")
                answer = job.work()
        except Exception as raised:  # noqa: BLE001 (handed to the caller)
            error = raised
        loop.call_soon_threadsafe(self._deliver, job, answer, error)

    def _deliver(self, job: _Job, answer: Any, error: Exception | None) -> None:
        self._slots.release()
        job.finished()
        if job.answer.done():
            return
        if error is None:
            job.answer.set_result(answer)
        else:
            job.answer.set_exception(error)
