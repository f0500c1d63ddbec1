"""A device whose gate lets nothing pass, and the cloud behind it: killed, frozen, and back again, under a stock client.

Agent and cloud are processes of their own; the client is NVIDIA's.
"""

import asyncio
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import tritonclient.grpc.aio as triton
from simulators import agents, cloud, models
from simulators.agents import Agent

from hedgerow.parameters import DEGRADED, REASON, RELEASE, TIER

IN_FLIGHT = 8
DEADLINE_S = 2.5
SPARED_S = 5.0
"""More than 50 answers of the edge take on a busy machine."""
WAIT_S = 30.0
NEVER_S = 600.0
"""How long a cloud takes that shall not answer."""
SETTINGS = {
    "timeout_s": NEVER_S,
    "probe_min_s": 0.05,
    "probe_max_s": 0.2,
    "probe_timeout_s": 2.0,
    "heartbeat_s": 0.5,
}


@dataclass(frozen=True)
class Answer:
    """What a stock client can read in an answer."""

    digit: int
    version: str
    tier: str
    reason: str
    degraded: bool
    release: str


class Client:
    """Asks a device for digits."""

    def __init__(self, client: triton.InferenceServerClient) -> None:
        self._client = client

    async def ask(self, digit: int, *, deadline_s: float = WAIT_S) -> Answer:
        """The answer; raises if it does not come before the deadline."""
        pixels = triton.InferInput("pixels", [1, models.FEATURES], "FP32")
        pixels.set_data_from_numpy(models.pixels(digit))
        result = await self._client.infer("digits", [pixels], client_timeout=deadline_s)
        response = result.get_response()
        said = response.parameters
        return Answer(
            digit=int(result.as_numpy("label")[0]),
            version=response.model_version,
            tier=said[TIER].string_param,
            reason=said[REASON].string_param,
            degraded=said[DEGRADED].bool_param,
            release=said[RELEASE].string_param,
        )

    async def until_the_cloud_answers(self) -> None:
        async with asyncio.timeout(WAIT_S):
            while (await self.ask(0)).tier != "cloud":
                pass


@asynccontextmanager
async def device(folder: Path, target: str) -> AsyncIterator[tuple[Agent, Client]]:
    """An agent with a cloud at `target`, where everything is escalated."""
    models.classifier(folder / "student.onnx", extra=True)
    agent = Agent(
        folder / "device",
        {
            "models": {"digits": {"path": "../student.onnx", "gate": {"output": "logits", "threshold": 1.1}}},
            "routes": {"digits": {"cloud_model": cloud.MODEL}},
            "cloud": {"target": target, **SETTINGS},
        },
    )
    async with agents.running(agent), triton.InferenceServerClient(agent.address) as client:
        yield agent, Client(client)


def is_the_edges_second_best(answer: Answer, digit: int, reason: str) -> bool:
    expected = Answer(digit, "1", "edge", answer.reason, degraded=True, release="digits/1")
    return answer == expected and reason in answer.reason


async def degraded_at_once(client: Client) -> None:
    """Check that the breaker spares requests the cloud: 50 of them together take little."""
    async with asyncio.timeout(SPARED_S):
        for number in range(50):
            answer = await client.ask(number % 10)
            assert is_the_edges_second_best(answer, number % 10, "cloud unavailable: circuit open"), answer


async def asked(process: asyncio.subprocess.Process, times: int) -> None:
    """Return once so many requests have reached the cloud."""
    assert process.stdout is not None
    async with asyncio.timeout(WAIT_S):
        for _ in range(times):
            assert await process.stdout.readline() == b"asked\n"


async def test_killed_with_requests_in_flight_each_gets_the_edges_answer_and_escalation_resumes_by_itself(
    tmp_path: Path,
) -> None:
    async with cloud.in_process_of_its_own(NEVER_S) as (process, target), device(tmp_path, target) as (agent, client):
        async with asyncio.TaskGroup() as group:
            asking = [group.create_task(client.ask(digit)) for digit in range(IN_FLIGHT)]
            await asked(process, IN_FLIGHT)
            assert not any(task.done() for task in asking)
            process.kill()
            killed_at = time.monotonic()
        assert time.monotonic() - killed_at < WAIT_S / 3, "at once, not at the deadline"
        for digit, task in enumerate(asking):
            assert is_the_edges_second_best(task.result(), digit, "cloud unavailable"), task.result()

        await degraded_at_once(client)
        port = int(target.rpartition(":")[2])
        async with cloud.in_process_of_its_own(port=port):
            await client.until_the_cloud_answers()
            for digit in range(10):
                answer = await client.ask(digit)
                assert (answer.tier, answer.version, answer.digit) == ("cloud", "2031", digit)
                assert not answer.degraded
            log = agent.log
        assert log.count("circuit open") == log.count("circuit closed") == 1, log


async def test_frozen_it_costs_a_request_its_deadline_at_most_and_then_nothing(tmp_path: Path) -> None:
    async with cloud.in_process_of_its_own() as (process, target), device(tmp_path, target) as (_, client):
        await client.until_the_cloud_answers()
        process.send_signal(signal.SIGSTOP)
        async with asyncio.TaskGroup() as group:  # raises if one does not come in time
            asking = [group.create_task(client.ask(digit, deadline_s=DEADLINE_S)) for digit in range(IN_FLIGHT)]
        for digit, task in enumerate(asking):
            assert is_the_edges_second_best(task.result(), digit, "cloud did not answer within"), task.result()
        async with asyncio.timeout(WAIT_S):
            while "circuit open" not in (await client.ask(3, deadline_s=DEADLINE_S)).reason:
                pass
        await degraded_at_once(client)
        process.send_signal(signal.SIGCONT)
        await client.until_the_cloud_answers()
