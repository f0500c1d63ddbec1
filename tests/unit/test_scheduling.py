"""The queue's rules: nobody lost or answered twice, order, bounds, ageing, and what is left of them under overload."""

import heapq
import itertools
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hedgerow.errors import DeadlineExceeded, HedgerowError, Overloaded, Unavailable
from hedgerow.host.pace import MAX_PROOF_RUNS, PROOF_RUNS, Inlining, RunTimes
from hedgerow.host.scheduling import PROBE_AFTER_S, Run, Scheduler, Ticket
from hedgerow.host.settings import BatchSettings

NEVER = float("inf")


def settings(**given_: object) -> BatchSettings:
    return BatchSettings(**{"instances": 1, "queue_size": 8, "max_batch_size": 4, **given_})  # type: ignore[arg-type] # by name


def ticket(
    now: float = 0.0, *, rows: int = 1, key: object = "a", level: int = 2, deadline: float = NEVER, most: int = 1000
) -> Ticket:
    return Ticket(rows, key, level, now, deadline, most)


def took(scheduler: Scheduler[Ticket], rows: int, seconds: float, now: float = 0.0) -> None:
    """Have it learn that `rows` take `seconds`."""
    run = scheduler.begin(rows, now - seconds)
    scheduler.end(run, now)


OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("admit"), st.integers(0, 6), st.sampled_from(["a", "b", None]), st.integers(1, 3)),
        st.tuples(st.just("leave"), st.integers(0, 30)),
        st.tuples(st.just("take"), st.booleans()),
        st.tuples(st.just("finish"), st.booleans()),
        st.tuples(st.just("clear")),
    ),
    max_size=80,
)


@given(OPERATIONS, st.integers(1, 3), st.integers(1, 6), st.integers(1, 8))
def test_nobody_is_lost_or_taken_twice_and_bounds_and_order_are_kept(
    operations: list[tuple[object, ...]], instances: int, queue_size: int, max_rows: int
) -> None:
    scheduler: Scheduler[Ticket] = Scheduler(
        settings(instances=instances, queue_size=queue_size, max_batch_size=max_rows, ageing_s=5.0)
    )
    everybody: list[Ticket] = []
    waiting: set[Ticket] = set()
    again: list[Ticket] = []
    running: list[tuple[Run, list[Ticket]]] = []
    for now, (what, *args) in enumerate(operations):
        if what == "admit":
            rows, key, level = args
            assert isinstance(rows, int)
            assert isinstance(level, int)
            new = ticket(float(now), rows=rows, key=key if rows <= max_rows else None, level=level)
            room = len(waiting) < queue_size + scheduler.free * max_rows
            try:
                scheduler.admit(new, float(now))
            except Overloaded:
                assert not room
                continue
            assert room
            everybody.append(new)
            waiting.add(new)
        elif what == "leave" and everybody:
            index = args[0]
            assert isinstance(index, int)
            gone = everybody[index % len(everybody)]
            scheduler.leave(gone)
            waiting.discard(gone)
        elif what == "take" and scheduler.free:
            batch, late = scheduler.take(float(now), spread=bool(args[0]))
            assert not late
            assert bool(batch) == bool(waiting)
            assert waiting.issuperset(batch)
            assert len(set(batch)) == len(batch)
            assert len({one.key for one in batch}) <= 1
            assert len(batch) == 1 or (batch[0].key is not None if batch else True)
            assert len(batch) <= 1 or sum(one.rows for one in batch) <= max_rows
            first = [one for one in again if one in waiting]
            if batch and first:
                assert batch == first[:1]
            elif batch:  # the longest waiting first, each level for itself, and nobody of its key passed over
                assert batch[0].turn == min(one.turn for one in waiting)
                alike = sorted((one for one in waiting if one.key == batch[0].key), key=lambda one: one.turn)
                assert [one.turn for one in batch] == [one.turn for one in alike[: len(batch)]]
            waiting -= set(batch)
            if batch:
                running.append((scheduler.begin(sum(one.rows for one in batch), float(now)), batch))
        elif what == "finish" and running:
            run, batch = running.pop(0)
            scheduler.end(run, float(now))
            if args[0] and len(batch) > 1:
                for one in batch:
                    scheduler.push_again(one)
                    waiting.add(one)
                    again.append(one)
        elif what == "clear":
            out = scheduler.clear()
            assert set(out) == waiting
            assert [one.turn for one in out] == sorted(one.turn for one in out)
            waiting.clear()
        assert scheduler.waiting == len(waiting)
        assert scheduler.idle == (not waiting and not running)
        assert {one for one in everybody if one.waiting} == waiting


@given(st.lists(st.tuples(st.integers(1, 3), st.floats(0, 3)), min_size=1, max_size=40))
def test_a_low_priority_is_overtaken_by_those_only_who_come_soon_after(arrivals: list[tuple[int, float]]) -> None:
    scheduler: Scheduler[Ticket] = Scheduler(settings(queue_size=100, max_batch_size=1, ageing_s=0.5))
    tickets = [ticket(at, level=level) for level, at in sorted(arrivals, key=lambda arrival: arrival[1])]
    for one in tickets:
        scheduler.admit(one, one.arrived)
    order = [scheduler.take(4.0)[0][0] for _ in tickets]
    for earlier, later in itertools.combinations(order, 2):
        if earlier.level == later.level:
            assert earlier.arrived <= later.arrived
        if earlier.arrived > later.arrived:  # it overtook
            assert earlier.level < later.level
            assert earlier.arrived - later.arrived <= 0.5 * (later.level - earlier.level) + 1e-9


def test_what_waits_is_spread_over_free_instances_and_a_large_batch_is_not_left_to_one() -> None:
    scheduler: Scheduler[Ticket] = Scheduler(settings(instances=2, max_batch_size=8))
    for _ in range(6):
        scheduler.admit(ticket(), 0)
    batch, _ = scheduler.take(0)
    assert len(batch) == 3
    scheduler.begin(3, 0)
    assert len(scheduler.take(0)[0]) == 3


def test_a_request_that_would_be_answered_too_late_is_refused_at_once() -> None:
    scheduler: Scheduler[Ticket] = Scheduler(settings(queue_size=100))
    took(scheduler, 4, 1.0)
    scheduler.begin(4, 0.0)
    for _ in range(8):  # two full batches, behind the one that runs
        scheduler.admit(ticket(), 0.0)
    with pytest.raises(Overloaded) as refused:
        scheduler.admit(ticket(deadline=3.5), 0.0)
    assert refused.value.retry_after_s == pytest.approx(3.0)
    scheduler.admit(ticket(deadline=6.0), 0.0)
    scheduler.admit(ticket(level=1, deadline=3.5), 0.0)  # it is not behind them
    with pytest.raises(DeadlineExceeded):
        scheduler.admit(ticket(deadline=0.0), 0.0)


def test_an_old_measurement_does_not_keep_everybody_out_for_ever() -> None:
    scheduler: Scheduler[Ticket] = Scheduler(settings())
    took(scheduler, 1, 10.0)
    with pytest.raises(Overloaded):
        scheduler.admit(ticket(deadline=1.0), 0.0)
    later = 2 * PROBE_AFTER_S
    scheduler.admit(ticket(later, deadline=later + 1), later)
    assert len(scheduler.take(later)[0]) == 1
    took(scheduler, 1, 0.1, later)
    for _ in range(50):
        took(scheduler, 1, 0.1, later)
    scheduler.admit(ticket(later, deadline=later + 1), later)


def test_nobody_starts_who_cannot_be_answered_in_time_and_nobody_is_made_late_by_joiners() -> None:
    scheduler: Scheduler[Ticket] = Scheduler(settings(queue_size=100))
    took(scheduler, 1, 1.0, 10.0)
    took(scheduler, 4, 3.0, 10.0)
    hopeless, tight, easy = (ticket(10.0, deadline=deadline) for deadline in (10.5, 12.5, NEVER))
    for one in (hopeless, tight, easy, ticket(10.0), ticket(10.0)):
        scheduler.push(one)
    batch, late = scheduler.take(10.0)
    assert late == [hopeless]
    assert batch[:2] == [tight, easy]
    assert len(batch) == 3, "a fourth row would make it too late for the second request"
    batch, late = scheduler.take(10.0)
    assert len(batch) == 1
    assert not late


def test_free_instances_wait_for_more_rows_no_longer_than_they_may() -> None:
    scheduler: Scheduler[Ticket] = Scheduler(settings(max_delay_s=0.5))
    scheduler.admit(ticket(1.0), 1.0)
    assert scheduler.starts_at(1.1) == 1.5
    for _ in range(3):
        scheduler.admit(ticket(1.2), 1.2)
    assert scheduler.starts_at(1.2) == 1.2
    scheduler.clear()
    scheduler.admit(ticket(2.0, key=None), 2.0)
    assert scheduler.starts_at(2.0) == 2.0, "nobody can join one that runs alone"


def test_when_all_instances_hang_requests_are_refused_and_taken_again_once_one_is_back() -> None:
    scheduler: Scheduler[Ticket] = Scheduler(settings(instances=2))
    runs = [scheduler.begin(1, 0.0) for _ in range(2)]
    scheduler.give_up(runs[0])
    scheduler.admit(ticket(), 1.0)
    scheduler.give_up(runs[1])
    with pytest.raises(Unavailable) as refused:
        scheduler.admit(ticket(), 1.0)
    assert refused.value.retry_after_s
    scheduler.end(runs[0], 100.0)
    scheduler.admit(ticket(), 100.0)
    assert scheduler.free == 1
    assert scheduler.times.bound(1) == 0, "what a hung run took says nothing of the next"


@dataclass
class Simulation:
    """A model whose batches take `fixed_s` and `row_s` a row, under requests at `rate` a second, in virtual time."""

    rate: float
    patience_s: float
    instances: int = 1
    fixed_s: float = 0.004
    row_s: float = 0.0005
    answered: int = 0
    late: int = 0
    refused: int = 0
    dropped: int = 0
    finishing: list[tuple[float, int, Run, list[Ticket]]] = field(default_factory=list)

    def run(self, seconds: float) -> None:
        scheduler: Scheduler[Ticket] = Scheduler(
            settings(instances=self.instances, queue_size=128, max_batch_size=32, inline_below_s=0.0)
        )
        numbers = itertools.count()
        for arrival in range(int(seconds * self.rate)):
            now = arrival / self.rate
            while self.finishing and self.finishing[0][0] <= now:
                at, _, run, batch = heapq.heappop(self.finishing)
                scheduler.end(run, at)
                self.answered += sum(one.deadline >= at for one in batch)
                self.late += sum(one.deadline < at for one in batch)
                self._start(scheduler, at, numbers)
            try:
                scheduler.admit(ticket(now, deadline=now + self.patience_s), now)
            except HedgerowError:
                self.refused += 1
                continue
            self._start(scheduler, now, numbers)

    def _start(self, scheduler: Scheduler[Ticket], now: float, numbers: "itertools.count[int]") -> None:
        while scheduler.free and scheduler.waiting:
            batch, late = scheduler.take(now)
            self.dropped += len(late)
            if batch:
                takes_s = self.fixed_s + self.row_s * len(batch)
                entry = (now + takes_s, next(numbers), scheduler.begin(len(batch), now), batch)
                heapq.heappush(self.finishing, entry)


@pytest.mark.parametrize("instances", [1, 2, 4])
@pytest.mark.parametrize("patience_s", [0.05, 0.2, 2.0])
def test_at_five_times_the_capacity_what_is_admitted_is_answered_in_time_and_the_model_never_idles(
    instances: int, patience_s: float
) -> None:
    peak = instances * 32 / (0.004 + 32 * 0.0005)
    simulation = Simulation(rate=5 * peak, patience_s=patience_s, instances=instances)
    simulation.run(seconds=4.0)
    assert simulation.answered >= 0.9 * 4.0 * peak
    admitted = simulation.answered + simulation.late + simulation.dropped
    assert simulation.late + simulation.dropped <= 0.02 * admitted
    assert simulation.refused


def test_without_load_nobody_is_refused() -> None:
    simulation = Simulation(rate=50, patience_s=0.05)
    simulation.run(seconds=4.0)
    assert (simulation.refused, simulation.late, simulation.dropped) == (0, 0, 0)


def test_a_machine_that_stood_still_for_once_keeps_nobody_out_afterwards() -> None:
    scheduler: Scheduler[Ticket] = Scheduler(settings())
    for turn in range(32):
        took(scheduler, 1, 0.006, 0.01 * turn)
    took(scheduler, 1, 2.0, 3.0)
    scheduler.admit(ticket(3.001, deadline=3.101), 3.001)


def test_a_model_that_was_slow_for_a_while_is_tried_again_as_soon_as_it_is_idle() -> None:
    scheduler: Scheduler[Ticket] = Scheduler(settings())
    for turn in range(32):
        took(scheduler, 1, 0.3, 0.3 * turn)
    now = 0.3 * 31
    with pytest.raises(Overloaded):
        scheduler.admit(ticket(now + 0.001, deadline=now + 0.101), now + 0.001)
    scheduler.admit(ticket(now + 0.4, deadline=now + 0.5), now + 0.4)


def test_a_batch_has_no_more_rows_than_any_in_it_allows() -> None:
    scheduler: Scheduler[Ticket] = Scheduler(settings(max_batch_size=8, queue_size=100))
    for key, most in [("large", 1)] * 2 + [("middle", 3)] * 4 + [("small", 1000)] * 8:
        scheduler.admit(ticket(key=key, most=most), 0.0)
    assert [len(scheduler.take(0.0)[0]) for _ in range(5)] == [1, 1, 3, 1, 8]


def test_who_would_wait_behind_many_that_run_one_by_one_is_told_so() -> None:
    scheduler: Scheduler[Ticket] = Scheduler(settings(max_batch_size=8, queue_size=100))
    took(scheduler, 1, 1.0, 1.0)
    for _ in range(20):
        scheduler.push(ticket(1.0, most=1))
    scheduler.begin(1, 1.0)
    with pytest.raises(Overloaded):
        scheduler.admit(ticket(1.0, deadline=10.0, most=1), 1.0)
    scheduler.admit(ticket(1.0, deadline=40.0, most=1), 1.0)


def test_a_batch_is_ready_a_little_before_the_first_deadline_in_it() -> None:
    scheduler: Scheduler[Ticket] = Scheduler(settings(queue_size=100))
    took(scheduler, 1, 1.0, 10.0)
    took(scheduler, 4, 4.0, 10.0)
    for _ in range(4):
        scheduler.push(ticket(10.0, deadline=13.0))
    assert len(scheduler.take(10.0)[0]) == 2, "three would be ready at the very deadline, too late for their callers"


def test_times_are_told_by_the_size_of_the_batch_and_follow_when_they_change() -> None:
    times = RunTimes()
    assert times.bound(5) == 0
    times.add(4, 1.0)
    assert times.expected(4) == 1.0
    assert times.expected(8) == 1.0
    for rows in [1, 32, 7, 16] * 10:
        times.add(rows, 0.5 + rows / 8)
    assert times.expected(20) == pytest.approx(0.5 + 20 / 8, rel=0.01), "which never ran"
    assert times.expected(20) <= times.bound(20) <= 1.1 * times.expected(20)
    for _ in range(100):
        times.add(8, 30.0)
    assert times.expected(8) == pytest.approx(30.0, rel=0.01)
    assert times.expected(1) <= times.expected(8) <= times.expected(32) <= 4 * 30.5


def test_a_run_that_another_process_interrupts_does_not_send_a_fast_model_back_to_its_threads() -> None:
    inlining = Inlining(0.001)
    for _ in range(PROOF_RUNS):
        inlining.add(1, 0.0002, 0.0001, inline=False)
    for _ in range(10):
        inlining.add(1, 0.04, 0.0001, inline=True)
        for _ in range(PROOF_RUNS):
            inlining.add(1, 0.0002, 0.0001, inline=True)
    assert inlining.allows(1)
    for _ in range(4):
        inlining.add(1, 0.04, 0.0001, inline=True)
    assert not inlining.allows(1), "it waits for something, an accelerator perhaps"


def test_a_model_runs_on_the_event_loop_only_once_it_is_proved_and_until_it_is_clearly_slow() -> None:
    inlining = Inlining(0.001)
    for _ in range(PROOF_RUNS - 1):
        inlining.add(1, 0.005, 0.0001, inline=False)
        assert not inlining.allows(1)
    inlining.add(1, 0.0002, 0.0001, inline=False)
    assert inlining.allows(1)
    assert not inlining.allows(64), "64 such rows would take too long"
    inlining.add(1, 0.0015, 0.0, inline=True)
    assert inlining.allows(1), "that was no clear excess"
    inlining.add(1, 0.1, 0.0, inline=True)
    assert not inlining.allows(1)
    for _ in range(PROOF_RUNS):
        inlining.add(1, 0.0002, 0.0001, inline=False)
    assert not inlining.allows(1), "the second proof is longer"
    for _ in range(MAX_PROOF_RUNS):
        inlining.add(1, 0.0002, 0.0001, inline=False)
    assert inlining.allows(1)


def test_a_model_that_waits_for_an_accelerator_is_not_fast() -> None:
    inlining = Inlining(0.001)
    for _ in range(10 * PROOF_RUNS):
        inlining.add(1, 0.02, 0.00001, inline=False)
    assert not inlining.proved


def test_one_slow_run_in_ten_is_no_proof() -> None:
    inlining = Inlining(0.001)
    for run in range(10 * PROOF_RUNS):
        seconds = 0.01 if run % 10 == 0 else 0.0001
        inlining.add(1, seconds, seconds, inline=False)
    assert not inlining.proved
