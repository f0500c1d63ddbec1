"""SIGTERM under load, deadline storms and oversized messages: what was accepted is answered, the rest is told so."""

import asyncio
from collections import Counter
from typing import Any

import grpc
import pytest
from faults.attacks import INFER
from simulators import victims
from simulators.http2 import RawConnection
from simulators.victims import ECHO, SLOW, Victim, message

from hedgerow import transports
from hedgerow.proto import oip_pb2, oip_pb2_grpc

ACCEPTED = 8
"""Calls in flight on each raw connection."""
SECONDS = 3.0
"""That they take; the load goes on meanwhile."""
CLIENTS = 8
WAIT_S = 60.0
STORM = 500


@pytest.fixture(params=transports.known())
def transport(request: pytest.FixtureRequest) -> str:
    return str(request.param)


async def test_sigterm_under_load_fails_no_request_that_was_accepted(transport: str) -> None:
    outcomes: Counter[str] = Counter()
    async with victims.running(transport=transport) as victim, asyncio.TaskGroup() as group:
        await victim.serves()
        for _ in range(CLIENTS):
            group.create_task(load(victim.address, outcomes))
        async with RawConnection(victim.address) as one, RawConnection(victim.address) as other:
            streams = range(1, 2 * ACCEPTED, 2)
            for to in (one, other):
                to.send(*(to.call(stream, INFER, message(SLOW, SECONDS)) for stream in streams))
            async with asyncio.timeout(WAIT_S):
                while (await victim.vitals()).sleeping < 2 * ACCEPTED or not outcomes["OK"]:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
            victim.stop()
            for to in (one, other):
                answers = [await to.answer(stream) for stream in streams]
                assert [answer.grpc_status for answer in answers] == [0] * ACCEPTED, answers
    # Only what was not begun may fail, and says so. (grpc.aio cancels what it had not yet looked at.)
    told = {"UNAVAILABLE", "CANCELLED"} if transport == "grpcio" else {"UNAVAILABLE"}
    assert set(outcomes) <= {"OK", *told}, outcomes


async def load(address: str, outcomes: "Counter[str]") -> None:
    """Send requests one after the other until the server is gone, and count what became of them."""
    request = oip_pb2.ModelInferRequest.FromString(message(ECHO, 1.0))
    options = [("grpc.use_local_subchannel_pool", 1)]
    async with grpc.aio.insecure_channel(address, options=options) as channel:
        stub: Any = oip_pb2_grpc.GRPCInferenceServiceStub(channel)
        while True:
            try:
                await stub.ModelInfer(request, timeout=WAIT_S)
            except grpc.aio.AioRpcError as error:
                if "failed to connect" in (error.details() or "").lower():
                    return
                outcomes[error.code().name] += 1
                await asyncio.sleep(0.01)
            else:
                outcomes["OK"] += 1


@pytest.fixture
async def victim(transport: str) -> Any:
    async with victims.running(transport=transport) as victim:
        yield victim


async def test_a_storm_of_deadlines_that_cannot_be_kept_is_told_so_and_leaves_nothing(victim: Victim) -> None:
    await victim.serves()
    before = await victim.vitals()
    request = oip_pb2.ModelInferRequest.FromString(message(SLOW, 30.0))
    async with grpc.aio.insecure_channel(victim.address) as channel:
        stub: Any = oip_pb2_grpc.GRPCInferenceServiceStub(channel)
        for _ in range(4):
            calls = [stub.ModelInfer(request, timeout=0.001) for _ in range(STORM)]
            codes = Counter([await call.code() for call in calls])
            assert set(codes) == {grpc.StatusCode.DEADLINE_EXCEEDED}
            await victim.serves()
    await victim.recovers(before, tasks=5, descriptors=5, grown_bytes=64 * 2**20)
