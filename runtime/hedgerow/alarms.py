"""Deadlines of many things, watched with one timer: a heap of them costs a fraction of a timer each."""

import asyncio
import math
import time
from collections.abc import Callable
from heapq import heapify, heappop, heappush
from typing import Generic, TypeVar
from weakref import ref

from hedgerow.backend import Deadline
from hedgerow.errors import DeadlineExceeded

STALE = 256
"""Things that are done already which may be kept, until they are as many as those that are not."""

T = TypeVar("T")


class Alarms(Generic[T]):
    """Calls `ring` for each thing that is there, and not `done`, when its deadline passes. Belongs to one event loop.

    Things are not kept for being watched: most are done long before, with large tensors in their hands.
    """

    def __init__(self, done: Callable[[T], bool], ring: Callable[[T], None]) -> None:
        self._done = done
        self._ring = ring
        self._heap: list[tuple[float, int, ref[T]]] = []
        self._number = 0  # so that things themselves are never compared
        self._limit = STALE
        self._timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return len(self._heap)

    def watch(self, thing: T, deadline: float) -> None:
        """Have `ring(thing)` called at `deadline`, on the monotonic clock; infinity: never."""
        if math.isinf(deadline):
            return
        if len(self._heap) >= self._limit:
            self._heap = [entry for entry in self._heap if self._pending(entry[2]) is not None]
            heapify(self._heap)
            self._limit = 2 * len(self._heap) + STALE
        self._number += 1
        heappush(self._heap, (deadline, self._number, ref(thing)))
        if self._timer is None or deadline < self._timer.when():
            self._set()

    def close(self) -> None:
        """Let nothing ring any more."""
        self._heap.clear()
        if self._timer is not None:
            self._timer.cancel()

    def _expire(self) -> None:
        self._timer = None
        now = time.monotonic()
        while self._heap:
            deadline, _, watched = self._heap[0]
            thing = self._pending(watched)
            if thing is not None and deadline > now:
                break
            heappop(self._heap)
            if thing is not None:
                self._ring(thing)
        if self._heap and self._timer is None:
            self._set()

    def _pending(self, watched: "ref[T]") -> T | None:
        thing = watched()
        return None if thing is None or self._done(thing) else thing

    def _set(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_at(self._heap[0][0], self._expire)


class Until:
    """Ends what is in it when the deadline passes, as `DeadlineExceeded`: `asyncio.timeout`, without a timer each."""

    __slots__ = ("__weakref__", "_alarms", "_cancelling", "_deadline", "_over", "_rung", "_task")

    def __init__(self, deadline: Deadline, alarms: "Alarms[Until]") -> None:
        self._deadline = deadline
        self._alarms = alarms
        self._over = self._rung = False

    def is_over(self) -> bool:
        """Whether what is in it has ended."""
        return self._over

    def ring(self) -> None:
        """The deadline has passed."""
        self._rung = True
        self._task.cancel()

    def __enter__(self) -> None:
        self._deadline.check("the request could be started")
        task = asyncio.current_task()
        assert task is not None
        self._task, self._cancelling = task, task.cancelling()
        self._alarms.watch(self, self._deadline.at)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        self._over = True
        if self._rung and self._task.uncancel() <= self._cancelling and kind is asyncio.CancelledError:
            raise DeadlineExceeded("the deadline passed while the request was being worked on") from error
