"""Dynamic batching in front of one model: requests come one by one, and run with those that wait beside them.

The shell around `scheduling`, which decides, and `batch`, which runs. The life of a request:

1. `submit`: checked, then queued or refused at once.
2. `_dispatch`: at the end of this turn of the event loop, when all that has arrived is queued, or when an instance
   becomes free. The batch runs on one of the model's threads, one hop for all, or right here if it is short enough.
3. `_finish`: everybody gets their answer. Those whose batch failed run again, once and alone, so that only the guilty
   fail.

Whoever cancels, or whose deadline passes, is out at once; a run whose callers have all left ends for nobody. No tasks:
each step is a callback, which is most of what makes it cheap.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec

from hedgerow.alarms import Alarms
from hedgerow.backend import Deadline
from hedgerow.errors import (
    DeadlineExceeded,
    EngineFault,
    HedgerowError,
    InvalidInput,
    ModelNotFound,
    ModelNotReady,
    Unavailable,
)
from hedgerow.host.batch import Fit, Outcome, Runnable
from hedgerow.host.scheduling import Run, Scheduler, Ticket
from hedgerow.host.settings import BatchSettings
from hedgerow.host.workers import Workers
from hedgerow.latency import LatencyWindow
from hedgerow.statistics import BatchCounts, Compute
from hedgerow.tensors import InferRequest, InferResponse

INLINE_TURN_S = 0.002
"""How long batches may run on the event loop before the rest of it has its turn. One batch a turn would be too little:
what is read in between may be more than that, and under a load near the limit more and more would be refused."""

log = logging.getLogger(__name__)


class Call(Ticket):
    """A request on its way through a batcher."""

    __slots__ = ("__weakref__", "answer", "bound", "owner", "request")

    def __init__(
        self, owner: "Batcher", request: InferRequest, fit: Fit, level: int, now: float, deadline: float, *, bound: bool
    ) -> None:
        super().__init__(fit.rows, fit.key, level, now, deadline, fit.most)
        self.owner = owner
        self.request = request
        self.bound = bound
        self.answer: asyncio.Future[InferResponse] = asyncio.get_running_loop().create_future()


@dataclass(slots=True)
class _Batch:
    """Calls that run together."""

    calls: Sequence[Call]
    rows: int
    size: int
    run: Run
    outcome: Outcome | None = None
    error: Exception | None = None
    wall_s: float = 0.0
    cpu_s: float = 0.0
    hang: asyncio.TimerHandle | None = None

    def execute(self, model: Runnable) -> None:
        """Run, on whichever thread, and keep what comes of it."""
        started, cpu = time.perf_counter(), time.thread_time()
        try:
            self.outcome = model.run(
                [call.request for call in self.calls], [call.rows for call in self.calls], self.size
            )
        except Exception as error:  # noqa: BLE001 (handed to the callers)
            self.error = error
        self.cpu_s = time.thread_time() - cpu
        self.wall_s = time.perf_counter() - started


class Batcher:
    """The queue, the threads and the counts of one open model. Belongs to one event loop.

    `settings` say its real `instances` and `queue_size`. `answers` and `faults` count what it has answered, and what it
    has crashed on, hung on or answered with nonsense.
    """

    def __init__(self, model: Runnable, settings: BatchSettings) -> None:
        self._model = model
        if not model.batches:
            settings = msgspec.structs.replace(settings, max_batch_size=1, max_delay_s=0.0, preferred_sizes=())
        self._settings = settings
        self._name = f"{model.metadata.name} {model.version}"
        self._queue: Scheduler[Call] = Scheduler(settings)
        self._workers = Workers(settings.instances, f"{model.metadata.name}-engine")
        self._dispatching = False
        self._delay: asyncio.TimerHandle | None = None
        self._new: list[Call] = []
        self._running = 0
        self._alarms = Alarms(_answered, _expired)
        self._retired: Callable[[], None] | None = None
        self.counts = BatchCounts()
        self.latency = LatencyWindow()
        self.answers = 0
        self.faults = 0

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return self._queue.waiting

    @property
    def inflight(self) -> int:
        """Requests in the queue or running."""
        return self._queue.waiting + self._running

    @property
    def stuck(self) -> bool:
        """Whether all instances hang."""
        return self._queue.stuck

    @property
    def hung(self) -> int:
        """Instances that hang."""
        return self._queue.hung

    async def infer(self, request: InferRequest, deadline: Deadline, *, bound: bool = False) -> InferResponse:
        """The model's answer. A `bound` request stays with this very model when another one takes over.

        Raises `InvalidInput`, `Overloaded` if the queue is full or the answer would be late, `Unavailable` if the model
        hangs, `ModelNotReady` once it is retired, `EngineFault` and `DeadlineExceeded`.
        """
        call = self._submit(request, deadline.at, bound=bound)
        try:
            return await call.answer
        except asyncio.CancelledError:
            call.owner.leave(call)
            raise

    def leave(self, call: Call) -> None:
        """Forget a call whose caller is gone."""
        self._queue.leave(call)
        self._settle()

    def hand_over(self) -> list[Call]:
        """Take out what waits and is not bound to this model, for another batcher to `adopt`."""
        calls = self._queue.clear()
        for call in calls:
            if call.bound:
                self._queue.push(call)
        return [call for call in calls if not call.bound]

    def adopt(self, calls: Sequence[Call]) -> None:
        """Queue calls that another batcher has taken; those that do not fit this model hear it."""
        for call in calls:
            try:
                if call.request.version not in {"", self._model.version}:
                    raise ModelNotFound(
                        f"version {call.request.version!r} of {self._model.metadata.name} was replaced by"
                        f" {self._model.version} while the request waited"
                    )
                fit = self._model.fit(call.request, self._settings.max_batch_size, self._settings.max_batch_bytes)
            except HedgerowError as error:
                _refuse(call, error)
                continue
            call.rows, call.key, call.most, call.owner = fit.rows, fit.key, fit.most, self
            self._queue.push(call)
            self._arrived(call)

    def retire(self, idle: Callable[[], None]) -> None:
        """Take no more requests, and call `idle` once the last one is done. The first call counts."""
        if self._retired is None:
            self._retired = idle
            self._settle()

    def refuse_waiting(self, reason: str) -> None:
        """Tell all who wait that they will not be answered here: `Unavailable`, for this reason."""
        for call in self._queue.clear():
            _refuse(call, Unavailable(reason))
        self._settle()

    def close(self) -> None:
        """Let the threads go, once it is retired and idle."""
        self._alarms.close()
        self._workers.close()

    def _submit(self, request: InferRequest, deadline: float, *, bound: bool) -> Call:
        if self._retired is not None:
            raise ModelNotReady(f"{self._name} is being let go")
        fit = self._model.fit(request, self._settings.max_batch_size, self._settings.max_batch_bytes)
        call = Call(self, request, fit, self._level(request), time.monotonic(), deadline, bound=bound)
        self._queue.admit(call, call.arrived)
        self._arrived(call)
        return call

    def _level(self, request: InferRequest) -> int:
        """The level of its `priority`, as Triton reads it: 0, and what is beyond the last level, is the default."""
        levels = self._settings.priority_levels
        priority = request.parameters.get("priority", 0) if request.parameters else 0
        if isinstance(priority, bool) or not isinstance(priority, int) or priority < 0:
            raise InvalidInput(f"parameter 'priority': expected 0, or 1 (the highest) to {levels}, got {priority!r}")
        return priority if 1 <= priority <= levels else (levels + 1) // 2

    def _arrived(self, call: Call) -> None:
        if self._queue.free > 0:
            # Its deadline is watched once it is clear that it isn't answered within this turn of the loop.
            self._new.append(call)
            if not self._dispatching:
                self._dispatching = True
                asyncio.get_running_loop().call_soon(self._dispatch)
        else:
            self._alarms.watch(call, call.deadline)

    def _dispatch(self) -> None:
        """Start what can start."""
        queue, now = self._queue, time.monotonic()
        self._dispatching, spent_s = False, 0.0
        try:
            while queue.waiting and queue.free > 0:
                if (start := queue.starts_at(now)) > now:
                    self._wake_at(start)
                    break
                inline = queue.inline()
                calls, late = queue.take(now, spread=not inline)
                for call in late:
                    _refuse(call, DeadlineExceeded("the deadline would pass before the model had answered"))
                calls = [call for call in calls if not call.answer.done()]
                if not calls:
                    continue
                self._start(calls, now, inline=inline)
                if inline:
                    began, now = now, time.monotonic()
                    spent_s += now - began
                    if queue.waiting and spent_s > INLINE_TURN_S:  # the rest of the loop has its turn first
                        self._again()
                        break
        finally:  # whatever goes wrong, nobody waits beyond their deadline
            new, self._new = self._new, []
            for call in new:
                if not call.answer.done():
                    self._alarms.watch(call, call.deadline)
        self._settle()

    def _again(self) -> None:
        if not self._dispatching:
            self._dispatching = True
            asyncio.get_running_loop().call_soon(self._dispatch)

    def _wake_at(self, when: float) -> None:
        if self._delay is not None:
            self._delay.cancel()
        self._delay = asyncio.get_running_loop().call_at(when, self._dispatch)

    def _start(self, calls: Sequence[Call], now: float, *, inline: bool) -> None:
        rows = sum(call.rows for call in calls)
        size = rows
        if rows and calls[0].key is not None:
            size = min((preferred for preferred in self._settings.preferred_sizes if preferred >= rows), default=rows)
        batch = _Batch(calls, rows, size, self._queue.begin(rows, now))
        self._running += len(calls)
        if inline:
            batch.execute(self._model)
            self._finish(batch, inline=True)
            return
        batch.hang = asyncio.get_running_loop().call_later(self._settings.hang_after_s, self._give_up, batch)
        self._workers.submit(lambda: batch.execute(self._model), lambda: self._finish(batch, inline=False))

    def _finish(self, batch: _Batch, *, inline: bool) -> None:
        """The batch has run: on the event loop."""
        now = time.monotonic()
        if batch.hang is not None:
            batch.hang.cancel()
        if batch.run.hung:
            log.warning("%s: a run that was given up came back after %.1f s", self._name, now - batch.run.started)
        self._running -= len(batch.calls)
        self._queue.end(batch.run, now)
        if batch.outcome is not None and not batch.run.hung:
            self._queue.inlining.add(batch.rows, batch.wall_s, batch.cpu_s, inline=inline)
            self._count(batch, batch.outcome, now)
        if not batch.run.hung:  # or its callers have been told long ago
            self._deliver(batch)
        if inline:
            return  # `_dispatch` goes on
        if self._queue.waiting:
            self._dispatch()
        else:
            self._settle()

    def _deliver(self, batch: _Batch) -> None:
        for position, call in enumerate(batch.calls):
            answer = batch.error if batch.outcome is None else batch.outcome.answers[position]
            assert answer is not None
            if isinstance(answer, InferResponse):
                self.answers += 1
                if not call.answer.done():
                    call.answer.set_result(answer)
            elif len(batch.calls) == 1:
                self._failed(call, answer)
            elif not call.answer.done():
                self._queue.push_again(call)

    def _failed(self, call: Call, error: Exception) -> None:
        if isinstance(error, EngineFault):
            self.faults += 1
        _refuse(call, error)

    def _count(self, batch: _Batch, outcome: Outcome, now: float) -> None:
        counts, started = self.counts, batch.run.started
        counts.rows += batch.rows
        counts.queue.count += len(batch.calls)
        counts.queue.ns += int(1e9 * sum(started - call.arrived for call in batch.calls))
        counts.requests.add(outcome, len(batch.calls))
        if batch.size not in counts.executions:
            counts.executions[batch.size] = Compute()
        counts.executions[batch.size].add(outcome)
        self.latency.add(now - batch.calls[0].arrived, now)

    def _give_up(self, batch: _Batch) -> None:
        """It hangs. Its thread is left to itself, and its instance does not count until it comes back."""
        self._queue.give_up(batch.run)
        log.error(
            "%s: a run has not come back for %g s and is given up; %d of %d instances hang",
            self._name,
            self._settings.hang_after_s,
            self._queue.hung,
            self._settings.instances,
        )
        for call in batch.calls:
            self._failed(call, EngineFault(f"{self._name} did not answer within {self._settings.hang_after_s:g} s"))
        if self._queue.stuck:
            self.refuse_waiting(f"{self._name} does not answer: all its instances hang")

    def _settle(self) -> None:
        if self._retired is not None and self._queue.idle:
            idle, self._retired = self._retired, _nothing
            idle()


def _expired(call: Call) -> None:
    doing = "the model ran" if call.waiting else "the model had answered"
    _refuse(call, DeadlineExceeded(f"the deadline passed before {doing}"))
    call.owner.leave(call)


def _answered(call: Call) -> bool:
    return call.answer.done()


def _refuse(call: Call, error: Exception) -> None:
    if not call.answer.done():
        call.answer.set_exception(error)


def _nothing() -> None:
    """Has been told that it is idle."""
