"""Who runs next, with whom, and who is refused: the rules of the queue in front of one model. Pure: no IO, no clock.

- The queue is bounded; what would not fit, or could not be answered by its deadline, is refused at once.
- Requests run in the order of `turn`: arrival plus `ageing_s` for each level of priority below the highest. Within a
  level that is first come, first served; and a low priority is overtaken for a bounded time only.
- A batch holds requests of one `key`, the first in turn among them, and never more rows than `max_batch_size`.
- Nobody is put into a batch that would end after their deadline, or after the deadline of one who is in it already;
  but a batch is not made so small for one who is in a hurry that all behind would suffer.
- What waits is spread over the free instances, so that none is idle while another runs everything.

Times are seconds on the monotonic clock.
"""

from collections import deque
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

from hedgerow.errors import DeadlineExceeded, Overloaded, Unavailable
from hedgerow.host.pace import GAIN, Inlining, RunTimes
from hedgerow.host.settings import BatchSettings

PROBE_AFTER_S = 1.0
"""What was measured this long ago, or longer ago than a run is said to take, no longer keeps a request out that finds
nothing running: one is let through, and measures anew. An idle model has nothing better to do."""
SLACK = 1.1
"""What is left between the predicted answer and the deadline, as a factor on the time until then."""
RETURN_SHARE = 0.03
"""Of the time that a caller gives, what is kept for the way back: its clock began to run before ours."""
EFFICIENCY = 0.75
"""Rows a second that a batch made smaller for an urgent request must still do, as a share of what a full one does."""
STUCK_RETRY_S = 5.0
"""When to ask a model again whose instances all hang."""


class Ticket:
    """A request that waits: its `rows`, its `level` (1 is the highest), and until when it has to be answered.

    Those with the same `key` may share a batch; with the key None it runs alone. `ready_by` is when the answer must be
    there to be with its caller in time: the caller's clock began to run before ours, and the answer has a way to go. A
    batch with it has `most` rows at most.
    """

    __slots__ = ("arrived", "deadline", "key", "level", "most", "ready_by", "rows", "turn", "waiting")

    def __init__(
        self, rows: int, key: Hashable, level: int, arrived: float, deadline: float, most: int = 2**31
    ) -> None:
        self.rows = rows
        self.key = key
        self.most = most
        self.level = level
        self.arrived = arrived
        self.deadline = deadline
        self.ready_by = deadline - RETURN_SHARE * (deadline - arrived) if deadline < float("inf") else deadline
        self.turn = arrived
        self.waiting = False


@dataclass(slots=True, eq=False)
class Run:
    """A batch of `rows` that runs since `started`."""

    rows: int
    started: float
    hung: bool = False


T = TypeVar("T", bound=Ticket)


class Scheduler(Generic[T]):
    """The queue of one model and what runs of it. `settings` say its real `instances` and `queue_size`."""

    def __init__(self, settings: BatchSettings) -> None:
        self._settings = settings
        self._groups: dict[tuple[Hashable, int], deque[T]] = {}
        self._again: deque[T] = deque()
        self._rows = [0] * (settings.priority_levels + 1)
        self._gone = 0
        self._running: set[Run] = set()
        self._last_end = float("-inf")
        self._usual_rows = 1.0
        self._full = settings.max_batch_size
        """Rows of a batch while enough of such wait as came last."""
        self.waiting = 0
        """Requests in the queue."""
        self.hung = 0
        """Instances whose run has been given up."""
        self.times = RunTimes()
        self.inlining = Inlining(settings.inline_below_s)

    @property
    def free(self) -> int:
        """Instances that could start a batch."""
        return self._settings.instances - len(self._running)

    @property
    def stuck(self) -> bool:
        """Whether all instances hang."""
        return self.hung >= self._settings.instances

    @property
    def idle(self) -> bool:
        """Whether nothing waits or runs."""
        return not self.waiting and not self._running

    def admit(self, ticket: T, now: float) -> None:
        """Queue `ticket`, or raise `Overloaded`, `Unavailable` or `DeadlineExceeded`."""
        if ticket.deadline <= now:
            raise DeadlineExceeded("the deadline passed before the request was queued")
        if self.stuck:
            raise Unavailable("the model does not answer: all its instances hang", retry_after_s=STUCK_RETRY_S)
        # What free instances will take at the end of this turn of the event loop does not count as waiting.
        if self.waiting >= self._settings.queue_size + self.free * self._settings.max_batch_size:
            wait_s = self._wait_s(ticket.level, now) + self.times.expected(self._full)
            raise Overloaded(f"the queue is full: {self.waiting} requests are waiting", retry_after_s=wait_s or None)
        most_s = self.times.bound(self._full) * (2 + self.waiting)
        if ticket.deadline < now + most_s:  # it can't be late otherwise
            wait_s = self._wait_s(ticket.level, now)
            # Those who come after it will fill up its batch as usual: were it too urgent for that, it would make the
            # batch small, and all others wait for longer.
            rows = ticket.rows + self._rows_ahead(ticket.level) % self._full
            rows = max(rows, round(self._usual_rows))
            run_s = self.times.expected(rows) if self.idle else self.times.bound(rows)
            if now + SLACK * (wait_s + run_s) > ticket.deadline and not self._outdated(now):
                raise Overloaded("the answer would come after the deadline", retry_after_s=wait_s)
        self.push(ticket)

    def push(self, ticket: T) -> None:
        """Queue `ticket`, whoever waits already."""
        ticket.turn = ticket.arrived + (ticket.level - 1) * self._settings.ageing_s
        ticket.waiting = True
        self.waiting += 1
        self._rows[ticket.level] += ticket.rows
        self._full = min(ticket.most, self._settings.max_batch_size)
        group = self._groups.get((ticket.key, ticket.level))
        if group is None:
            group = self._groups[ticket.key, ticket.level] = deque()
        group.append(ticket)

    def push_again(self, ticket: T) -> None:
        """Queue `ticket`, whose batch has failed, to run next and alone."""
        ticket.key = None
        ticket.waiting = True
        self.waiting += 1
        self._rows[ticket.level] += ticket.rows
        self._again.append(ticket)

    def leave(self, ticket: T) -> None:
        """Take `ticket` out, if it waits."""
        if not ticket.waiting:
            return
        self._left(ticket)
        self._gone += 1
        if self._gone > self._settings.queue_size:  # what has left must not pile up behind a batch that runs for long
            self._gone = 0
            self._again = deque(one for one in self._again if one.waiting)
            for name, group in list(self._groups.items()):
                self._groups[name] = deque(one for one in group if one.waiting)

    def clear(self) -> list[T]:
        """Take everybody out, in the order of their turns."""
        tickets = [one for group in (self._again, *self._groups.values()) for one in group if one.waiting]
        self._again.clear()
        self._groups.clear()
        for ticket in tickets:
            self._left(ticket)
        return sorted(tickets, key=lambda ticket: ticket.turn)

    def starts_at(self, now: float) -> float:
        """When the next batch may start: later than `now` while it is worth waiting for more rows."""
        settings = self._settings
        if not settings.max_delay_s or self._again or sum(self._rows) >= self._full:
            return now
        head = min(self._heads(), key=lambda group: group[0].turn, default=None)
        return now if head is None or head[0].key is None else head[0].arrived + settings.max_delay_s

    def inline(self) -> bool:
        """Whether the next batch is short enough for the event loop."""
        return self.inlining.allows(min(sum(self._rows), self._full))

    def take(self, now: float, *, spread: bool = True) -> tuple[list[T], list[T]]:
        """The next batch, and those found on the way whom not even a run of their own would answer in time.

        Without `spread` the batch is as large as can be. Both are empty if nobody waits.
        """
        waiting = sum(self._rows)
        share = -(-waiting // max(1, self.free)) if spread else self._full
        limit = max(1, min(self._full, share))
        times = RunTimes() if self._outdated(now) else self.times
        ends = now + times.expected(limit)
        batch: list[T] = []
        late: list[T] = []
        rows, until = 0, float("inf")
        while (group := self._next_group(batch)) is not None:
            ticket = group[0]
            hurried = ticket.ready_by < ends or ticket.rows > limit
            if hurried and ticket.ready_by - now < self._least_s(ticket, limit, times):
                late.append(self._pop(group))
                continue
            until = min(until, ticket.ready_by)
            together = rows + ticket.rows
            if batch and (
                together > min(limit, ticket.most) or (until < ends and until < now + times.expected(together))
            ):
                break
            rows += ticket.rows
            batch.append(self._pop(group))
            if ticket.key is None:
                break
        return batch, late

    def begin(self, rows: int, now: float) -> Run:
        """A batch starts."""
        self._usual_rows += GAIN * (rows - self._usual_rows)
        run = Run(rows, now)
        self._running.add(run)
        return run

    def give_up(self, run: Run) -> None:
        """`run` hangs: nobody waits for it any more, but its instance is not free."""
        run.hung = True
        self.hung += 1

    def end(self, run: Run, now: float) -> None:
        """A batch is over. What a hung one took says nothing of the next."""
        self._running.discard(run)
        self._last_end = now
        if run.hung:
            self.hung -= 1
        else:
            self.times.add(run.rows, now - run.started)

    def _least_s(self, ticket: T, limit: int, times: RunTimes) -> float:
        """The time that a ticket must have left to be started, where a batch of `limit` rows takes too long for it.

        That is the time of the smallest batch that does nearly as much in its time as the largest. A smaller one for
        its sake would hold up all behind it, the next would be as urgent, and in the end rows would run one by one.
        """
        if ticket.key is None:
            return times.expected(ticket.rows)
        full_s = times.expected(limit)
        rows = ticket.rows
        while rows < limit and rows * full_s < EFFICIENCY * limit * times.expected(rows):
            rows *= 2
        return times.expected(min(rows, limit))

    def _wait_s(self, level: int, now: float) -> float:
        """How long until a request of `level` that came now would start; 0 while nothing was measured."""
        free_in_s = 0.0
        if self.free <= 0:
            # One that is overdue is taken to need as long again: it may be hanging.
            rests = (run.started + self.times.expected(run.rows) - now for run in self._running if not run.hung)
            free_in_s = min((abs(rest_s) for rest_s in rests), default=0.0)
        batches = self._rows_ahead(level) // self._full
        each_s = self.times.expected(self._full)
        return free_in_s + batches * each_s / max(1, self._settings.instances - self.hung)

    def _rows_ahead(self, level: int) -> int:
        return sum(self._rows[1 : level + 1])

    def _outdated(self, now: float) -> bool:
        return not self._running and now - self._last_end > min(PROBE_AFTER_S, self.times.expected(1))

    def _heads(self) -> Iterator[deque[T]]:
        """Every group, once those who left are off its front."""
        for name, group in list(self._groups.items()):
            while group and not group[0].waiting:
                group.popleft()
                self._gone -= 1
            if group:
                yield group
            else:
                del self._groups[name]

    def _next_group(self, batch: list[T]) -> deque[T] | None:
        """The group whose first is the next to join `batch`."""
        while self._again and not self._again[0].waiting:
            self._again.popleft()
            self._gone -= 1
        if not batch and self._again:
            return self._again
        if len(self._groups) == 1:  # most often all are alike
            group = next(self._heads(), None)
            return group if group is not None and (not batch or group[0].key == batch[0].key) else None
        groups = [group for group in self._heads() if not batch or group[0].key == batch[0].key]
        return min(groups, key=lambda group: group[0].turn, default=None)

    def _pop(self, group: deque[T]) -> T:
        ticket = group.popleft()
        self._left(ticket)
        return ticket

    def _left(self, ticket: T) -> None:
        ticket.waiting = False
        self.waiting -= 1
        self._rows[ticket.level] -= ticket.rows
