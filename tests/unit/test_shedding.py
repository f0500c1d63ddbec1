"""What is refused as it opens: calls that would be answered too late, and no others."""

import math
from collections.abc import AsyncIterator

import pytest
from simulators.places import until

from hedgerow.http2.shedding import CALM, TURNS, Shedding
from hedgerow.lifecycle import InFlight

LATE_S = 0.01
LOOKS = 40
"""Enough that only the last ones count."""
CROWD = 4 * CALM


@pytest.fixture
def calls() -> InFlight:
    return InFlight()


@pytest.fixture
async def shedding(calls: InFlight) -> AsyncIterator[Shedding]:
    shedding = Shedding(calls)
    yield shedding
    shedding.close()


def look(shedding: Shedding, late_s: float) -> None:
    assert not shedding.refuses(math.inf)  # which has it begin
    for _ in range(LOOKS):
        shedding.look(late_s)


async def test_those_who_cannot_wait_are_refused_and_counted(shedding: Shedding, calls: InFlight) -> None:
    calls.count = CROWD
    look(shedding, LATE_S)
    assert shedding.refuses(TURNS * LATE_S / 2)
    assert not shedding.refuses(TURNS * LATE_S * 2)
    assert not shedding.refuses(math.inf)
    assert shedding.refused == 1


async def test_a_loop_in_time_refuses_nobody_however_many_wait(shedding: Shedding, calls: InFlight) -> None:
    calls.count = 100 * CROWD  # of a slow model, say
    look(shedding, 0.0)
    assert not shedding.refuses(0.001)


async def test_the_more_are_open_the_later_it_will_be(shedding: Shedding, calls: InFlight) -> None:
    calls.count = CROWD
    look(shedding, LATE_S)
    timeout_s = TURNS * LATE_S * 0.9
    assert shedding.refuses(timeout_s)
    calls.count = CROWD // 2
    assert not shedding.refuses(timeout_s)


async def test_a_few_are_never_a_crowd(shedding: Shedding, calls: InFlight) -> None:
    calls.count = CROWD
    look(shedding, 1.0)
    calls.count = CALM
    assert not shedding.refuses(0.001)


async def test_many_that_came_at_once_may_be_waiting_for_something_else(shedding: Shedding, calls: InFlight) -> None:
    calls.count = CROWD
    look(shedding, LATE_S)
    calls.count = 100 * CROWD
    assert not shedding.refuses(TURNS * LATE_S * 10)


async def test_what_was_long_ago_is_forgotten(shedding: Shedding, calls: InFlight) -> None:
    calls.count = CROWD
    look(shedding, 1000.0)
    shedding.forget(10.0)
    assert not shedding.refuses(TURNS * LATE_S)


async def test_it_looks_by_itself_while_there_is_a_crowd(shedding: Shedding, calls: InFlight) -> None:
    calls.count = CROWD
    look(shedding, 1000.0)
    await until(lambda: not shedding.refuses(TURNS * 10.0))  # it has to find out that the loop is not so late
