"""The router while its cloud is down, mute, at fault or replaced, and what a remote makes of that."""

import asyncio
import logging
import socket
import time
from contextlib import AsyncExitStack
from typing import Any

import grpc
import pytest
from msgspec.structs import replace
from simulators.cloud import MODEL, Cloud
from simulators.guarantees import guarantee
from simulators.places import until
from simulators.routers import GATE, REMOTE, SOON_S, SURE, ask, infer, routed

from hedgerow.backend import Deadline
from hedgerow.errors import EngineFault, Forbidden, InvalidInput, ModelNotFound, Overloaded, Unavailable
from hedgerow.host.model_host import ModelHost
from hedgerow.journey import Route
from hedgerow.parameters import DEGRADED, REASON, TIER
from hedgerow.remote.backend import RemoteBackend
from hedgerow.router import Router


async def test_a_cloud_that_is_down_costs_nothing_and_is_found_again_by_itself(
    stack: AsyncExitStack, host: ModelHost, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    router, remote = await routed(stack, host, f"127.0.0.1:{port}")
    assert remote is not None
    first = await infer(router, ask())
    assert first.parameters[DEGRADED] is True
    assert "cloud unavailable" in str(first.parameters[REASON])
    await until(lambda: not remote.snapshot(MODEL).healthy)
    started = time.monotonic()
    for _ in range(50):
        response = await infer(router, ask())
        assert response.parameters[TIER] == "edge"
        assert response.parameters[DEGRADED] is True
        assert response.parameters[REASON] == (
            "confidence 0.232 < 0.800; cloud unavailable: circuit open: cannot connect"
        )
    assert time.monotonic() - started < 1.0
    async with Cloud(port=port) as cloud:
        await until(lambda: remote.snapshot(MODEL).healthy)
        assert (await infer(router, ask())).parameters[TIER] == "cloud"
        assert cloud.asked == 1
    await infer(router, ask())
    await until(lambda: not remote.snapshot(MODEL).healthy)
    said = [record.message for record in caplog.records if "circuit" in record.message]
    assert len(said) == 3, "once when it breaks, once when it is over, once when it breaks again"
    assert "circuit closed" in said[1]


async def test_a_target_that_accepts_and_says_nothing_costs_a_bounded_wait(
    stack: AsyncExitStack, host: ModelHost
) -> None:
    mute = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
    router, remote = await routed(stack, host, f"127.0.0.1:{mute.getsockname()[1]}")
    assert remote is not None
    started = time.monotonic()
    response = await infer(router, ask())
    assert time.monotonic() - started < 3 * REMOTE.connect_timeout_s
    assert response.parameters[DEGRADED] is True
    await until(lambda: not remote.snapshot(MODEL).healthy)


async def test_a_teacher_that_cannot_be_asked_does_not_cost_the_edge_its_deadline(
    stack: AsyncExitStack, host: ModelHost
) -> None:
    mute = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
    router, _ = await routed(stack, host, f"127.0.0.1:{mute.getsockname()[1]}")
    router.set_gate("digits", "1", None, guarantee(GATE, student=(await host.metadata("digits")).properties["sha256"]))
    response = await infer(router, ask(strength=SURE), seconds=0.2)
    assert (response.parameters[TIER], response.parameters[DEGRADED]) == ("edge", False)


async def test_a_cloud_that_talks_nonsense_harms_no_request_and_does_not_end_the_watch(
    stack: AsyncExitStack, host: ModelHost
) -> None:
    class Nonsense(grpc.GenericRpcHandler):
        def service(self, _: grpc.HandlerCallDetails) -> Any:
            async def answer(_: bytes, __: object) -> bytes:
                return b"\xff\xff"

            return grpc.unary_unary_rpc_method_handler(answer)

    server = grpc.aio.server()
    server.add_generic_rpc_handlers([Nonsense()])
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    stack.push_async_callback(server.stop, 0)
    router, remote = await routed(stack, host, f"127.0.0.1:{port}")
    assert remote is not None
    response = await infer(router, ask())
    assert response.parameters[DEGRADED] is True
    assert "no message of the protocol" in str(response.parameters[REASON])
    await until(lambda: not remote.snapshot(MODEL).healthy)
    assert not await remote.ready(MODEL)
    assert "no message of the protocol" in remote.snapshot(MODEL).reason


async def test_a_cloud_that_refuses_what_the_edge_takes_is_said_once_to_the_operator(
    stack: AsyncExitStack, host: ModelHost, cloud: Cloud, caplog: pytest.LogCaptureFixture
) -> None:
    remote = await stack.enter_async_context(RemoteBackend("cloud", cloud.target, REMOTE))
    router = Router({"digits": Route(model="digits", edge=host, cloud=remote, cloud_model="unheard-of")})
    router.set_gate("digits", "1", GATE, None)
    for _ in range(3):
        assert (await infer(router, ask())).parameters[DEGRADED] is True
    said = [record.message for record in caplog.records if "does not take what the edge takes" in record.message]
    assert len(said) == 1
    assert "unheard-of" in said[0]


async def test_calls_on_a_connection_that_is_given_up_fail_and_are_not_cancelled(
    stack: AsyncExitStack, host: ModelHost, cloud: Cloud
) -> None:
    router, remote = await routed(stack, host, cloud.target)
    assert remote is not None
    cloud.delay_s = 60.0
    async with asyncio.TaskGroup() as group:
        asking = group.create_task(infer(router, ask()))
        await cloud.asking.wait()
        cloud.raises = [EngineFault("for the retry")]
        cloud.delay_s = 0.0
        await remote.close()
    assert asking.result().parameters[DEGRADED] is True


async def test_a_caller_who_leaves_takes_the_clouds_work_along(
    stack: AsyncExitStack, host: ModelHost, cloud: Cloud
) -> None:
    router, remote = await routed(stack, host, cloud.target)
    assert remote is not None
    cloud.delay_s = 60.0
    async with asyncio.TaskGroup() as group:
        asking = group.create_task(router.infer(ask(), Deadline.after(60)))
        await cloud.asking.wait()
        asking.cancel()
    await until(lambda: cloud.given_up == 1)
    assert remote.snapshot(MODEL).inflight == 0
    assert remote.snapshot(MODEL).healthy


async def test_an_unavailable_answer_is_retried_once_within_the_budget(
    stack: AsyncExitStack, host: ModelHost, cloud: Cloud
) -> None:
    _, remote = await routed(stack, host, cloud.target)
    assert remote is not None
    request = replace(ask(), model=MODEL)
    cloud.raises = [Unavailable("warming up")]
    assert (await remote.infer(request, Deadline.after(SOON_S))).version == "2031"
    assert cloud.asked == 2
    cloud.raises = [Unavailable("come later", retry_after_s=60.0)]
    with pytest.raises(Unavailable, match="come later") as caught:
        await remote.infer(request, Deadline.after(1.0))
    assert caught.value.retry_after_s == 60.0
    assert cloud.asked == 3, "pushed back beyond the deadline: not retried"
    for _ in range(12):
        cloud.raises = [Unavailable("no")]
        try:
            await remote.infer(request, Deadline.after(SOON_S))
        except Unavailable:
            break
    else:
        pytest.fail("the budget never ran out")
    assert remote.snapshot(MODEL).healthy, "single failures between successes open nothing"


async def test_a_remotes_refusals_keep_their_kind_and_say_who_refused(
    stack: AsyncExitStack, host: ModelHost, cloud: Cloud
) -> None:
    _, remote = await routed(stack, host, cloud.target)
    assert remote is not None
    for error in (InvalidInput("bad"), ModelNotFound("gone"), Overloaded("full"), Forbidden("no"), EngineFault("boom")):
        cloud.raises = [error]
        with pytest.raises(type(error), match=f"cloud: {error}"):
            await remote.infer(replace(ask(), model=MODEL), Deadline.after(SOON_S))
    with pytest.raises(ModelNotFound, match="cloud"):
        await remote.metadata("nothing")
    assert not await remote.ready("nothing")
    assert await remote.ready(MODEL)
    streamed = [r async for r in remote.stream(replace(ask(), model=MODEL), Deadline.after(SOON_S))]
    assert [int(r.output("logits").argmax()) for r in streamed] == [3]


async def test_a_watcher_learns_of_another_model_in_the_cloud(
    stack: AsyncExitStack, host: ModelHost, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    async with Cloud(sha256="a" * 64) as first:
        _, remote = await routed(stack, host, first.target)
        assert remote is not None
        assert (await remote.metadata(MODEL)).properties["sha256"] == "a" * 64
    await until(lambda: not remote.snapshot(MODEL).healthy)
    assert (await remote.metadata(MODEL)).properties["sha256"] == "a" * 64, "what was known last"
    async with Cloud(port=first.port, sha256="b" * 64):
        await until(lambda: remote.snapshot(MODEL).healthy)
        assert (await remote.metadata(MODEL)).properties["sha256"] == "b" * 64
