"""Which endpoint a remote asks, over real servers: killed, frozen, slow, at fault, moved away."""

import asyncio
import signal
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack

import grpc
import numpy as np
import pytest
from simulators import cloud as clouds
from simulators.cloud import LONG_S, MODEL, Cloud
from simulators.foreign import Foreign, refuses, says
from simulators.places import until
from simulators.remotes import ANSWER, REQUEST, ask, near_and_far, reached

from hedgerow.backend import Deadline
from hedgerow.errors import BackendUnavailable, ConfigError, EngineFault
from hedgerow.proto import oip_pb2
from hedgerow.remote.backend import Target
from hedgerow.remote.balancing import FAULTS_TO_EJECT


async def test_an_endpoint_killed_with_requests_in_flight_costs_nobody_an_answer(stack: AsyncExitStack) -> None:
    process, doomed = await stack.enter_async_context(clouds.in_process_of_its_own(600.0))
    spare = await stack.enter_async_context(Cloud())
    targets = (Target(address=doomed, zone="near"), Target(address=spare.target))
    remote = await reached(stack, *targets)
    assert process.stdout is not None
    async with asyncio.TaskGroup() as group:
        for _ in range(8):
            group.create_task(ask(remote))
        for _ in range(8):
            assert await process.stdout.readline() == b"asked\n"
        process.kill()
    assert spare.asked == 8
    killed = remote._pool.endpoints[0]
    assert killed.open
    assert not killed.ejected(time.monotonic()), "one outage is one fault, however many it hits: its probes decide"
    assert remote.snapshot(MODEL).healthy
    for _ in range(20):
        await ask(remote)
    assert spare.asked == 28


async def test_a_frozen_endpoint_is_found_out_and_left_out_and_taken_back(stack: AsyncExitStack) -> None:
    process, frozen = await stack.enter_async_context(clouds.in_process_of_its_own())
    spare = await stack.enter_async_context(Cloud())
    remote = await reached(
        stack, Target(address=frozen, zone="near"), Target(address=spare.target), probe_timeout_s=0.5
    )
    await ask(remote)
    assert spare.asked == 0
    process.send_signal(signal.SIGSTOP)
    near = remote._pool.endpoints[0]
    await until(lambda: near.open)
    for _ in range(20):
        await ask(remote)
    assert spare.asked == 20
    process.send_signal(signal.SIGCONT)
    await until(lambda: not near.open)
    await ask(remote)
    assert spare.asked == 20


async def test_a_zones_own_endpoint_is_preferred_while_it_is_well(stack: AsyncExitStack) -> None:
    near, far, remote = await near_and_far(stack)
    for _ in range(20):
        await ask(remote)
    assert (near.asked, far.asked) == (20, 0)
    await near.__aexit__()
    for _ in range(20):
        await ask(remote)
    assert far.asked == 20


async def test_load_is_spread_and_the_slow_get_less(stack: AsyncExitStack) -> None:
    quick, slow = await stack.enter_async_context(Cloud()), await stack.enter_async_context(Cloud())
    slow.delay_s = 0.3
    remote = await reached(stack, quick.target, slow.target)
    async with asyncio.TaskGroup() as group:

        async def caller() -> None:
            for _ in range(25):
                await ask(remote)

        for _ in range(4):
            group.create_task(caller())
    assert slow.asked >= 1
    assert quick.asked > 3 * slow.asked


async def test_an_endpoint_whose_engine_is_broken_is_left_alone_though_its_probes_are_good(
    stack: AsyncExitStack, caplog: pytest.LogCaptureFixture
) -> None:
    near, far, remote = await near_and_far(stack)
    near.raises = [EngineFault("boom") for _ in range(100)]
    for _ in range(FAULTS_TO_EJECT):
        with pytest.raises(EngineFault):
            await ask(remote)
    for _ in range(20):
        await ask(remote)
    assert (near.asked, far.asked) == (FAULTS_TO_EJECT, 20)
    assert caplog.text.count("left alone for 30 s") == 1
    far.raises = [EngineFault("boom") for _ in range(100)]
    for _ in range(2 * FAULTS_TO_EJECT):
        with pytest.raises(EngineFault):
            await ask(remote)
    assert far.asked == 20 + 2 * FAULTS_TO_EJECT, "the last one is never left alone"
    remote._pool.endpoints[0].conduct.until = 0.0  # 30 s later
    near.raises = []
    await ask(remote)
    assert near.asked == FAULTS_TO_EJECT + 1


async def test_an_endpoint_that_answers_garbage_is_left_alone(stack: AsyncExitStack) -> None:
    misfit = oip_pb2.ModelInferResponse(raw_output_contents=[b"\0"])
    foreign = await stack.enter_async_context(Foreign({"ModelInfer": says(misfit)}))
    spare = await stack.enter_async_context(Cloud())
    remote = await reached(stack, Target(address=foreign.target, zone="near"), Target(address=spare.target))
    for _ in range(FAULTS_TO_EJECT):
        with pytest.raises(EngineFault):
            await ask(remote)
    await ask(remote)
    assert spare.asked == 1


async def test_an_endpoint_too_busy_for_a_probe_is_there(stack: AsyncExitStack) -> None:
    busy = refuses(grpc.StatusCode.RESOURCE_EXHAUSTED, "busy")
    foreign = await stack.enter_async_context(Foreign({"ServerReady": busy, "ModelInfer": says(ANSWER)}))
    remote = await reached(stack, foreign.target, failures_to_open=1)
    endpoint = remote._pool.endpoints[0]
    assert await endpoint._probe() is True
    assert remote.snapshot(MODEL).healthy


async def test_targets_change_while_requests_are_in_flight_and_none_is_lost(stack: AsyncExitStack) -> None:
    old, new = await stack.enter_async_context(Cloud()), await stack.enter_async_context(Cloud())
    remote = await reached(stack, old.target)
    (before,) = remote._pool.endpoints
    old.delay_s = 1.0
    async with asyncio.TaskGroup() as group:
        for _ in range(4):
            group.create_task(ask(remote))
        await until(lambda: old.asked == 4)
        remote.update_targets([new.target])
        await ask(remote)
        assert new.asked == 1
    assert (old.asked, old.given_up) == (4, 0)
    await until(lambda: before._connection is None)
    assert remote._pool._retired == []
    with pytest.raises(ConfigError, match="'nowhere'"):
        remote.update_targets("nowhere")
    await ask(remote)


class Names:
    """A name service whose answers a test decides."""

    def __init__(self, *found: str) -> None:
        self.found: Sequence[str] = found
        self.asked = 0

    async def __call__(self, host: str, port: int) -> Sequence[str]:
        self.asked += 1
        assert host == "cloud.example"
        if not self.found:
            raise OSError("no such name")
        return [f"{one}:{port}" for one in self.found]


async def test_a_name_stands_for_all_its_addresses_and_is_asked_again_when_one_fails(stack: AsyncExitStack) -> None:
    first = await stack.enter_async_context(Cloud(host="127.0.0.1"))
    async with Cloud(host="127.0.0.2", port=first.port) as second:
        names = Names("127.0.0.1", "127.0.0.2")
        remote = await reached(stack, f"dns:cloud.example:{first.port}", resolve=names, resolve_s=LONG_S)
        await asyncio.gather(*(ask(remote) for _ in range(20)))
        assert first.asked
        assert second.asked
        names.found = ["127.0.0.1"]
    await until(lambda: len(remote._pool.endpoints) == 1)
    await ask(remote)


async def test_a_name_that_cannot_be_resolved_is_waited_for_and_one_that_is_lost_keeps_its_addresses(
    stack: AsyncExitStack, caplog: pytest.LogCaptureFixture
) -> None:
    cloud = await stack.enter_async_context(Cloud())
    names = Names()
    remote = await reached(stack, f"dns:cloud.example:{cloud.port}", resolve=names, resolve_s=0.01)
    with pytest.raises(BackendUnavailable, match="no address is known"):
        await ask(remote)
    assert not remote.snapshot(MODEL).healthy
    names.found = ["127.0.0.1"]
    await until(lambda: remote.snapshot(MODEL).healthy)
    await ask(remote)
    names.found, asked = [], names.asked
    await until(lambda: names.asked > asked + 1)
    await ask(remote)
    assert caplog.text.count("cannot resolve") == 2
    assert caplog.text.count("resolved again") == 1


async def test_a_name_of_this_machine_is_resolved_by_it(stack: AsyncExitStack) -> None:
    cloud = await stack.enter_async_context(Cloud())
    remote = await reached(stack, f"dns:///localhost:{cloud.port}")
    await until(lambda: remote.snapshot(MODEL).healthy)
    await ask(remote)


async def test_a_stream_goes_to_an_endpoint_that_is_well(stack: AsyncExitStack) -> None:
    near, far, remote = await near_and_far(stack)
    await near.__aexit__()
    await until(lambda: remote._pool.endpoints[0].open)
    answers = [one async for one in remote.stream(REQUEST, Deadline.after(LONG_S))]
    assert [np.argmax(one.output("logits")) for one in answers] == [3]
    assert far.asked == 1
    assert remote.snapshot(MODEL).inflight == 0
