"""When a remote asks again, elsewhere or twice at once, and when one request more is refused instead."""

import asyncio
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack

import pytest
from simulators.cloud import LONG_S, MODEL, Cloud
from simulators.foreign import Context, Foreign, says
from simulators.places import until
from simulators.remotes import ANSWER, REQUEST, ask, near_and_far, reached

from hedgerow.backend import Deadline
from hedgerow.errors import BackendUnavailable, DeadlineExceeded, EngineFault, Overloaded, Unavailable
from hedgerow.proto import oip_pb2
from hedgerow.remote.backend import RemoteBackend
from hedgerow.remote.known import MAX_KNOWN_MODELS
from hedgerow.remote.limits import WINDOW


async def test_what_a_draining_endpoint_sends_away_goes_to_another_at_once(stack: AsyncExitStack) -> None:
    near, far, remote = await near_and_far(stack)
    near.raises = [Unavailable("the server is shutting down", retry_after_s=600.0)]
    await ask(remote)
    assert (near.asked, far.asked) == (1, 1)


async def test_an_overloaded_endpoints_pushback_is_honoured_and_without_one_nothing_is_retried(
    stack: AsyncExitStack,
) -> None:
    near, far, remote = await near_and_far(stack)
    near.raises = [Overloaded("full", retry_after_s=0.2)]
    started = time.monotonic()
    await ask(remote)
    assert time.monotonic() - started >= 0.2
    assert (near.asked, far.asked) == (1, 1)
    near.raises = [Overloaded("full")]
    with pytest.raises(Overloaded, match="cloud: full"):
        await ask(remote)
    near.raises = [Overloaded("full", retry_after_s=600.0)]
    with pytest.raises(Overloaded, match="cloud: full"):
        await ask(remote)
    assert far.asked == 1


async def test_retries_end_when_every_endpoint_refuses(stack: AsyncExitStack) -> None:
    near, far, remote = await near_and_far(stack, failures_to_open=100, max_retries=2)
    for one in (near, far):
        one.raises = [Unavailable("no") for _ in range(9)]
    with pytest.raises(BackendUnavailable, match="no"):
        await ask(remote)
    assert near.asked + far.asked == 3
    assert min(near.asked, far.asked) == 1
    near.raises, far.raises = [], []
    broke = await reached(stack, near.target, far.target, retry_burst=0)
    for one in (near, far):
        one.raises = [Unavailable("no")]
    with pytest.raises(BackendUnavailable):
        await ask(broke)
    assert near.asked + far.asked == 4, "no budget, no retry"


async def warmed(remote: RemoteBackend) -> None:
    for _ in range(20):
        await ask(remote)


async def test_a_request_that_takes_unusually_long_is_hedged_and_the_loser_is_cancelled(stack: AsyncExitStack) -> None:
    near, far, remote = await near_and_far(stack, hedge_after_quantile=0.95, hedge_share=1.0)
    await warmed(remote)
    assert far.asked == 0
    near.delay_s = 600.0
    await ask(remote)
    assert far.asked == 1
    await until(lambda: near.given_up == 1)
    assert remote._pool.endpoints[0].inflight.count == 0
    assert len(remote._latency._bounds) == 1, "or hedging would hide the tail that it is there for"
    near.raises, near.delay_s = [EngineFault("boom")], 0.0
    with pytest.raises(EngineFault, match="boom"):
        await ask(remote)


async def test_a_hedge_that_fails_does_not_take_the_first_along(stack: AsyncExitStack) -> None:
    near, far, remote = await near_and_far(stack, hedge_after_quantile=0.95, hedge_share=1.0)
    await warmed(remote)
    near.delay_s = 0.5
    far.raises = [EngineFault("boom")]
    await ask(remote)
    assert far.asked == 1
    assert near.given_up == 0


async def test_hedges_are_a_share_of_the_requests_however_slow_the_remote_is(stack: AsyncExitStack) -> None:
    near, far, remote = await near_and_far(stack, hedge_after_quantile=0.95, hedge_share=0.1)
    await warmed(remote)
    asked = near.asked
    near.delay_s = far.delay_s = 0.05
    await asyncio.gather(*(ask(remote) for _ in range(30)))
    assert near.asked - asked == 30
    assert 1 <= far.asked <= 1 + 0.1 * 30


async def test_a_caller_who_leaves_takes_both_of_a_hedge_along(stack: AsyncExitStack) -> None:
    near, far, remote = await near_and_far(stack, hedge_after_quantile=0.95, hedge_share=1.0)
    await warmed(remote)
    near.delay_s = far.delay_s = 600.0
    async with asyncio.TaskGroup() as group:
        asking = group.create_task(ask(remote))
        await far.asking.wait()
        asking.cancel()
    await until(lambda: near.given_up == far.given_up == 1)
    assert remote.snapshot(MODEL).inflight == 0


async def test_more_than_the_remote_can_bear_is_refused_at_once(stack: AsyncExitStack) -> None:
    cloud = await stack.enter_async_context(Cloud())
    remote = await reached(stack, cloud.target, limit_min=4, limit_max=4)
    cloud.delay_s = 600.0
    async with asyncio.TaskGroup() as group:
        asking = [group.create_task(ask(remote)) for _ in range(4)]
        await until(lambda: cloud.asked == 4)
        with pytest.raises(Overloaded, match="4 requests are in flight"):
            await ask(remote)
        for task in asking:
            task.cancel()
    assert cloud.asked == 4
    cloud.delay_s = 0.0
    await ask(remote)


async def test_what_a_remote_would_not_answer_in_time_is_refused_until_it_is_quick_again(stack: AsyncExitStack) -> None:
    cloud = await stack.enter_async_context(Cloud())
    remote = await reached(stack, cloud.target, limit_min=1, limit_max=64, timeout_s=1.0, failures_to_open=10**6)

    async def burst() -> Sequence[BaseException | None]:
        return await asyncio.gather(*(ask(remote) for _ in range(8)), return_exceptions=True)

    assert remote.limit == 64
    cloud.delay_s = 0.6
    async with asyncio.timeout(LONG_S):
        while remote.limit >= 8:
            await burst()
    assert any(isinstance(one, Overloaded) and "one more has 1 s" in str(one) for one in await burst())
    cloud.delay_s = 0.0
    async with asyncio.timeout(LONG_S):
        while remote.limit < 64:
            await burst()


async def test_a_model_that_is_slow_does_not_have_requests_for_a_quick_one_refused(stack: AsyncExitStack) -> None:
    cloud = await stack.enter_async_context(Cloud())
    remote = await reached(stack, cloud.target, limit_min=1)
    limit = remote._admission.admit("slow", LONG_S).limit
    for _ in range(WINDOW):
        limit.missed(LONG_S, 1, LONG_S)
    with pytest.raises(Overloaded, match="for slow"), remote._admission.admit("slow", 1.0):
        remote._admission.admit("slow", 1.0)
    async with asyncio.TaskGroup() as group:
        for _ in range(8):
            group.create_task(ask(remote))
    assert cloud.asked == 8


async def test_names_of_models_that_nobody_has_do_not_pile_up(stack: AsyncExitStack) -> None:
    remote = await reached(stack, "127.0.0.1:1")
    busy = remote._admission.admit("busy", 1.0)
    with busy:
        for number in range(10 * MAX_KNOWN_MODELS):
            remote._admission.admit(f"model-{number}", 1.0)
        assert len(remote._admission._loads) <= MAX_KNOWN_MODELS
        assert remote._admission.admit("busy", 1.0) is busy


async def test_a_cloud_slower_than_every_caller_is_learnt_as_slow_and_not_as_down(stack: AsyncExitStack) -> None:
    cloud = await stack.enter_async_context(Cloud())
    remote = await reached(stack, cloud.target)
    await remote.metadata(MODEL)
    cloud.delay_s = 600.0
    for _ in range(4):
        with pytest.raises(DeadlineExceeded):
            await ask(remote, seconds=0.3)
    expected = remote.snapshot(MODEL).latency_p95_s
    assert expected is not None
    assert expected > 0.3
    assert remote.snapshot(MODEL).healthy


async def test_the_endpoints_deadline_leaves_time_for_the_way_back(stack: AsyncExitStack) -> None:
    async def far_away(_: bytes, __: Context) -> oip_pb2.ServerReadyResponse:
        await asyncio.sleep(0.2)
        return oip_pb2.ServerReadyResponse(ready=True)

    foreign = await stack.enter_async_context(Foreign({"ModelInfer": says(ANSWER), "ServerReady": far_away}))
    remote = await reached(stack, foreign.target, heartbeat_s=LONG_S)
    endpoint = remote._pool.endpoints[0]
    await until(lambda: endpoint._way_back_s > 0)
    assert endpoint._way_back_s >= 0.1
    endpoint._way_back_s = 4.0
    await remote.infer(REQUEST, Deadline.after(50.0))
    await remote.infer(REQUEST, Deadline.after(10.0))
    assert foreign.left_s[0] <= 47, "half of the way there and back is kept"
    assert 8 <= foreign.left_s[1] <= 9.5, "but at most a tenth of what is left"
