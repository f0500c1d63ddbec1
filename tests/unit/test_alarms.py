"""Deadlines watched with one timer: none is forgotten, and whoever cancels for another reason is heard."""

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest

from hedgerow.alarms import STALE, Alarms, Until
from hedgerow.backend import Deadline
from hedgerow.errors import DeadlineExceeded

SOON_S = 0.02
LONG_S = 60.0


class Thing:
    """Something that is watched."""

    def __init__(self) -> None:
        self.done = False
        self.rang = asyncio.Event()

    @staticmethod
    def is_done(thing: "Thing") -> bool:
        return thing.done

    @staticmethod
    def ring(thing: "Thing") -> None:
        thing.rang.set()


async def test_tidying_up_forgets_only_those_that_are_done() -> None:
    alarms: Alarms[Thing] = Alarms(Thing.is_done, Thing.ring)
    things = [Thing() for _ in range(3 * STALE)]
    deadline = Deadline.after(SOON_S).at
    for number, thing in enumerate(things):
        alarms.watch(thing, deadline)
        thing.done = number % 3 == 0
    assert len(alarms) < len(things)
    async with asyncio.timeout(LONG_S):
        for thing in things:
            if not thing.done:
                await thing.rang.wait()
    assert not any(thing.rang.is_set() for thing in things if thing.done)


async def until(seconds: float, what: Coroutine[Any, Any, None]) -> None:
    """Do `what` within `seconds`; the task must not be left as one that is being cancelled."""
    try:
        with Until(Deadline.after(seconds), Alarms(Until.is_over, Until.ring)):
            await what
    finally:
        task = asyncio.current_task()
        assert task is not None
        assert not task.cancelling()


async def test_what_takes_too_long_ends_as_that() -> None:
    with pytest.raises(DeadlineExceeded):
        await until(SOON_S, asyncio.sleep(LONG_S))
    await until(LONG_S, asyncio.sleep(0))


async def test_tasks_inside_end_with_it() -> None:
    async def both() -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(asyncio.sleep(LONG_S))
            await asyncio.sleep(LONG_S)

    with pytest.raises(DeadlineExceeded):
        await until(SOON_S, both())


async def test_a_group_around_it_hears_of_the_deadline_and_not_of_a_cancellation() -> None:
    with pytest.raises(ExceptionGroup) as caught:
        async with asyncio.TaskGroup() as group:
            group.create_task(until(SOON_S, asyncio.sleep(LONG_S)))
    assert isinstance(caught.value.exceptions[0], DeadlineExceeded)


async def test_a_timeout_that_fires_with_it_leaves_nothing_behind() -> None:
    async def timed() -> None:
        async with asyncio.timeout(SOON_S):
            await asyncio.sleep(LONG_S)

    with pytest.raises((DeadlineExceeded, TimeoutError)):
        await until(SOON_S, timed())


async def test_a_caller_that_leaves_while_the_deadline_passes_is_cancelled() -> None:
    inside = asyncio.Event()

    async def waits() -> None:
        inside.set()
        await asyncio.sleep(LONG_S)

    alarms: Alarms[Until] = Alarms(Until.is_over, Until.ring)

    async def left() -> None:
        scope = Until(Deadline.after(LONG_S), alarms)
        with scope:
            scopes.append(scope)
            await waits()

    scopes: list[Until] = []
    async with asyncio.TaskGroup() as group:
        task = group.create_task(left())
        await inside.wait()
        task.cancel()
        scopes[0].ring()
    assert task.cancelled()
