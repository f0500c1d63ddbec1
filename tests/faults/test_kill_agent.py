"""kill -9 of the agent wherever it can hurt: it comes back serving the old release or the new one, and gets there."""

import asyncio
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest
from simulators import agents, brokers, crashing_agent, models, responder
from simulators.agents import Agent
from simulators.publisher import Publisher
from simulators.responder import Responder

from hedgerow.client import AsyncClient
from hedgerow_edge.install import MAX_CRASHES, Phase


@pytest.fixture
async def fleet(tmp_path: Path) -> AsyncIterator[tuple[Agent, Responder]]:
    """A device that serves digits/1, stopped."""
    publisher = Publisher(tmp_path / "fleet")
    async with (
        brokers.running("embedded", tmp_path / "broker") as broker,
        responder.running(publisher, broker) as cloud,
    ):
        agent = Agent(tmp_path / "device", agents.linked(publisher, broker))
        async with agents.running(agent):
            await cloud.assign(cloud.make(1))
            await cloud.runs(1)
            await agent.stop()
            yield agent, cloud


async def crash(agent: Agent, phase: Phase) -> None:
    """Run the agent until it has journalled `phase` and died of it."""
    await agent.start(command=(sys.executable, crashing_agent.__file__), **{crashing_agent.CRASH: phase.value})
    assert await agent.ended() == -signal.SIGKILL


async def serves(agent: Agent) -> int:
    """The release that answers, and answers rightly."""
    async with AsyncClient(agent.address) as client:
        result = await client.infer("digits", models.pixels(5))
    np.testing.assert_array_equal(result.outputs["logits"], responder.answer(int(result.model_version), 5))
    return int(result.model_version)


async def test_killed_after_any_step_it_is_back_at_once_with_the_old_release_or_the_new_one_and_gets_there(
    fleet: tuple[Agent, Responder],
) -> None:
    agent, cloud = fleet
    steps = (Phase.FETCHING, Phase.STAGED, Phase.PROVING, Phase.ACTIVATING, Phase.PROBATION, Phase.IDLE)
    assert set(steps) == set(Phase)
    for counter, phase in enumerate(steps, 2):
        await cloud.assign(cloud.make(counter))
        await crash(agent, phase)
        agent.settings["link"]["enabled"] = False
        await agent.start()
        assert await serves(agent) == (counter if phase is Phase.IDLE else counter - 1), phase
        await agent.stop()
        agent.settings["link"]["enabled"] = True
        await agent.start()
        assert await serves(agent) in {counter - 1, counter}
        await cloud.runs(counter)
        assert await serves(agent) == counter
        await agent.stop()


async def test_a_release_that_kills_the_agent_again_and_again_is_given_up(fleet: tuple[Agent, Responder]) -> None:
    agent, cloud = fleet
    await cloud.assign(cloud.make(2))
    for _ in range(MAX_CRASHES):
        await crash(agent, Phase.PROBATION)
    await agent.start()
    status = await cloud.runs(1)
    assert status.failed == 2
    assert f"the process died {MAX_CRASHES} times with it loaded, last in probation" in status.reason
    assert await serves(agent) == 1


async def test_stopped_in_good_order_while_on_probation_it_is_not_taken_for_a_crash(
    fleet: tuple[Agent, Responder],
) -> None:
    agent, cloud = fleet
    agent.settings["updates"]["probation_s"] = 60.0
    await cloud.assign(cloud.make(2))
    for _ in range(MAX_CRASHES + 1):
        await agent.start()
        status = await cloud.until(lambda status: status.online and status.models[0].phase == "probation")
        assert status.models[0].running == 2
        assert await agent.stop() == 0
        await cloud.until(lambda status: not status.online)
    agent.settings["updates"]["probation_s"] = 0.3
    await agent.start()
    await cloud.runs(2)


async def test_started_with_a_full_disk_it_serves_what_it_has_and_takes_the_update_when_there_is_room(
    fleet: tuple[Agent, Responder],
) -> None:
    agent, cloud = fleet
    await cloud.assign(cloud.make(2))
    await agent.start(command=("sh", "-c", 'ulimit -f 4; exec "$0" "$@"', agents.EXECUTABLE))  # blocks of 512 bytes
    await cloud.until(lambda status: status.online)
    assert await serves(agent) == 1
    async with asyncio.timeout(20):
        while "updates have to wait" not in agent.log:  # noqa: ASYNC110 (another process's file)
            await asyncio.sleep(0.05)
    assert await serves(agent) == 1
    assert await agent.stop() == 0
    await agent.start()
    await cloud.runs(2)
