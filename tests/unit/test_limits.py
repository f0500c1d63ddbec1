"""The limit of requests in flight: it must neither turn away what would be answered nor flood a remote."""

import heapq
import itertools
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hedgerow.remote.limits import WINDOW, PaceLimit

LEAST, MOST = 4, 1024
SPREAD = 0.3
"""Standard deviation of a service time's logarithm."""

seconds = st.floats(min_value=0, max_value=1e4, allow_nan=False)
outcomes = st.lists(st.tuples(st.booleans(), seconds, st.integers(1, 2000), seconds), max_size=300)


def feed(limit: PaceLimit, outcomes: list[tuple[bool, float, int, float]]) -> None:
    for came, took_s, inflight, time_s in outcomes:
        (limit.answered if came else limit.missed)(took_s, inflight, time_s)


@given(outcomes, st.integers(1, 50), st.integers(1, 200), seconds)
def test_it_stays_within_its_bounds_whatever_comes(
    outcomes: list[tuple[bool, float, int, float]], least: int, most: int, time_s: float
) -> None:
    limit = PaceLimit(least, most)
    feed(limit, outcomes)
    assert min(least, most) <= limit.allowed(time_s) <= most


@given(outcomes, seconds, seconds)
def test_more_time_never_means_a_lower_limit(
    outcomes: list[tuple[bool, float, int, float]], one: float, other: float
) -> None:
    limit = PaceLimit(LEAST, MOST)
    feed(limit, outcomes)
    assert limit.allowed(min(one, other)) <= limit.allowed(max(one, other))


@given(outcomes, st.lists(st.floats(0, 1e4, allow_nan=False), min_size=WINDOW, max_size=10 * WINDOW))
def test_it_never_falls_without_pressure(
    outcomes: list[tuple[bool, float, int, float]], latencies: list[float]
) -> None:
    limit = PaceLimit(LEAST, MOST)
    feed(limit, outcomes[: len(outcomes) // WINDOW * WINDOW])  # whole windows: what is left of one is of the pressure
    before = limit.allowed(1.0)
    for took_s in latencies:
        limit.answered(took_s, 1, 1e9)
        assert limit.allowed(1.0) >= before
        before = limit.allowed(1.0)


@dataclass(eq=False, slots=True)
class Asked:
    """One request in a simulation."""

    at: float
    inflight: int
    time_s: float
    over: bool = False


@dataclass
class Simulation:
    """A remote that works on `workers` requests at once, `service_s` each, in virtual time; requests come at random.

    The others wait in the order of their arrival, without bound, and it works on those that nobody waits for, too.
    """

    workers: int
    service_s: Callable[[float], float]
    """At a time."""
    time_s: Callable[[random.Random], float]
    limit: PaceLimit = field(default_factory=lambda: PaceLimit(LEAST, MOST))
    answered: list[Asked] = field(default_factory=list)
    missed: list[Asked] = field(default_factory=list)
    refused: list[Asked] = field(default_factory=list)

    def run(self, rate: float, until: float, seed: int = 1) -> None:
        """Requests at `rate` a second, in a Poisson process, until `until` seconds."""
        draw, numbers = random.Random(seed), itertools.count()
        waiting: deque[Asked] = deque()
        events: list[tuple[float, int, str, Asked | None]] = [(0.0, -1, "arrives", None)]
        free, inflight = self.workers, 0
        while True:
            now, _, what, asked = heapq.heappop(events)
            if now >= until:
                return
            if what == "arrives":
                heapq.heappush(events, (now + draw.expovariate(rate), next(numbers), "arrives", None))
                asked = Asked(now, inflight + 1, self.time_s(draw))
                if asked.inflight > self.limit.allowed(asked.time_s):
                    self.refused.append(asked)
                    continue
                inflight += 1
                waiting.append(asked)
                heapq.heappush(events, (now + asked.time_s, next(numbers), "leaves", asked))
            else:
                assert asked is not None
                free += what == "is done"
                if not asked.over:
                    asked.over = True
                    inflight -= 1
                    count, kind = (
                        (self.limit.answered, self.answered) if what == "is done" else (self.limit.missed, self.missed)
                    )
                    count(now - asked.at, asked.inflight, asked.time_s)
                    kind.append(asked)
            while free and waiting:
                free -= 1
                takes_s = self.service_s(now) * draw.lognormvariate(-(SPREAD**2) / 2, SPREAD)
                heapq.heappush(events, (now + takes_s, next(numbers), "is done", waiting.popleft()))


REMOTES = [(1, 0.05, 1.0), (4, 0.05, 1.0), (4, 0.05, 10.0), (16, 0.05, 0.3), (2, 0.001, 0.1), (64, 0.2, 2.0)]
"""Workers; service time and the callers' time, in seconds."""


def remote(workers: int, service_s: float, time_s: float) -> tuple[Simulation, float, float]:
    """A simulation, the requests a second that it can answer, and seconds in which it answers some thousands."""
    capacity = workers / service_s
    return Simulation(workers, lambda _: service_s, lambda _: time_s), capacity, max(20 * time_s, 8000 / capacity)


@pytest.mark.parametrize(("workers", "service_s", "time_s"), REMOTES)
def test_at_four_fifths_of_what_a_remote_can_do_nobody_is_refused(
    workers: int, service_s: float, time_s: float
) -> None:
    simulation, capacity, until = remote(workers, service_s, time_s)
    simulation.run(0.8 * capacity, until)
    assert len(simulation.answered) > 5000
    assert len(simulation.refused) + len(simulation.missed) < 0.001 * len(simulation.answered)


@pytest.mark.parametrize("times", [3, 10])
@pytest.mark.parametrize(("workers", "service_s", "time_s"), REMOTES)
def test_in_an_overload_a_remote_answers_what_it_can_and_who_is_not_refused_is_answered_in_time(
    workers: int, service_s: float, time_s: float, times: int
) -> None:
    simulation, capacity, until = remote(workers, service_s, time_s)
    simulation.run(times * capacity, until)
    begun = 5 * time_s  # at first the pace is unknown
    answered = sum(one.at > begun for one in simulation.answered)
    missed = sum(one.at > begun for one in simulation.missed)
    assert answered > 0.9 * capacity * (until - time_s - begun)
    assert missed < 0.05 * answered


@pytest.mark.parametrize("load", [0.8, 3])
@pytest.mark.parametrize(("workers", "service_s", "time_s"), REMOTES)
def test_a_remote_that_was_slow_for_a_while_is_asked_as_before_within_seconds(
    workers: int, service_s: float, time_s: float, load: float
) -> None:
    slow, well = 10 * time_s, 20 * time_s
    simulation = Simulation(workers, lambda now: service_s * (10 if slow < now < well else 1), lambda _: time_s)
    recovered = well + 10 * time_s
    until = recovered + max(5 * time_s, 2000 * service_s / workers)
    simulation.run(load * workers / service_s, until)
    missed_s = [one.at for one in simulation.missed if one.at > slow]
    assert len(missed_s) > LEAST, "or it was not slow"
    answered = sum(recovered < one.at < until - time_s for one in simulation.answered)
    assert answered > 0.9 * min(1, load) * workers / service_s * (until - time_s - recovered)
    assert not [at for at in missed_s if at > recovered][int(0.02 * answered) :]


@pytest.mark.parametrize("little_s", [0.001, 0.2])
def test_those_who_have_too_little_time_cost_the_others_no_answer(little_s: float) -> None:
    simulation = Simulation(4, lambda _: 0.05, lambda draw: little_s if draw.random() < 0.5 else 1.0)
    simulation.run(0.8 * 80, 100)
    patient = [one for one in simulation.refused + simulation.missed if one.time_s == 1.0]
    assert len(patient) < 0.001 * sum(one.time_s == 1.0 for one in simulation.answered)


def test_a_burst_after_a_quiet_time_is_let_through() -> None:
    limit = PaceLimit(LEAST, MOST)
    feed(limit, [(True, 0.05, 1, 1.0)] * 10 * WINDOW)
    assert limit.allowed(1.0) == MOST
