"""Deadlines of many things, watched with one timer: a heap of them costs a fraction of a timer each."""

import asyncio
import math
import time
from collections.abc import Callable
from heapq import heapify, heappop, heappush
from typing import Generic, TypeVar

STALE = 256
"""Things that are done already which may be kept, until they are as many as those that are not."""

T = TypeVar("T")


class Alarms(Generic[T]):
    """Calls `ring` for each thing that is not `done` when its deadline passes. Belongs to one event loop."""

    def __init__(self, done: Callable[[T], bool], ring: Callable[[T], None]) -> None:
        self._done = done
        self._ring = ring
        self._heap: list[tuple[float, int, T]] = []
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
            self._heap = [entry for entry in self._heap if not self._done(entry[2])]
            heapify(self._heap)
            self._limit = 2 * len(self._heap) + STALE
        self._number += 1
        heappush(self._heap, (deadline, self._number, thing))
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
        while self._heap and (self._done(self._heap[0][2]) or self._heap[0][0] <= now):
            thing = heappop(self._heap)[2]
            if not self._done(thing):
                self._ring(thing)
        if self._heap and self._timer is None:
            self._set()

    def _set(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_at(self._heap[0][0], self._expire)
