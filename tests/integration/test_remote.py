"""The way to the cloud over real servers: killed, frozen, draining, slow, at fault, of other houses, moved away."""

import asyncio
import dataclasses
import signal
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from typing import Any

import grpc
import msgspec
import numpy as np
import pytest
from msgspec.structs import replace
from simulators import cloud as clouds
from simulators import models
from simulators.cloud import LONG_S, MODEL, SETTINGS, Cloud
from simulators.foreign import Context, Foreign, refuses, says
from simulators.places import until

from hedgerow import rpc
from hedgerow.backend import Deadline
from hedgerow.config import ServerSettings
from hedgerow.errors import (
    BackendUnavailable,
    ConfigError,
    DeadlineExceeded,
    EngineFault,
    Forbidden,
    HedgerowError,
    InvalidInput,
    ModelNotFound,
    Overloaded,
    Unavailable,
)
from hedgerow.proto import oip_pb2
from hedgerow.remote.backend import RemoteBackend, Target
from hedgerow.remote.balancing import FAULTS_TO_EJECT
from hedgerow.remote.known import MAX_KNOWN_MODELS
from hedgerow.remote.limits import WINDOW
from hedgerow.server import Server
from hedgerow.tensors import InferRequest, InferResponse, Origin

REQUEST = replace(models.request(models.pixels(3)), model=MODEL)
ANSWER = oip_pb2.ModelInferResponse(model_name=MODEL, model_version="7")


async def reached(
    stack: AsyncExitStack, *targets: str | Target, resolve: Any = None, **changed: object
) -> RemoteBackend:
    settings = msgspec.structs.replace(SETTINGS, **changed)
    more = {"resolve": resolve} if resolve else {}
    return await stack.enter_async_context(RemoteBackend("cloud", targets, settings, **more))


async def near_and_far(stack: AsyncExitStack, **changed: object) -> tuple[Cloud, Cloud, RemoteBackend]:
    """Two clouds, and a remote that asks the first while it is well."""
    near, far = await stack.enter_async_context(Cloud()), await stack.enter_async_context(Cloud())
    targets = (Target(address=near.target, zone="near"), Target(address=far.target, zone="far"))
    return near, far, await reached(stack, *targets, **changed)


async def ask(remote: RemoteBackend, request: InferRequest = REQUEST, seconds: float = LONG_S) -> None:
    response = await remote.infer(request, Deadline.after(seconds))
    assert response.output("logits").argmax() == 3


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


async def test_endpoints_learn_where_a_request_comes_from_and_nothing_more(stack: AsyncExitStack) -> None:
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    origin = Origin(tenant="acme", hops=2, traceparent=trace, tracestate="a=1")
    foreign = await stack.enter_async_context(Foreign({"ModelInfer": says(ANSWER)}))
    discreet = await reached(stack, foreign.target)
    telling = await reached(stack, foreign.target, forward_tenant=True)
    for remote, said in ((discreet, origin), (telling, origin), (telling, Origin()), (telling, Origin(tenant="b"))):
        await remote.infer(replace(REQUEST, origin=said), Deadline.after(LONG_S))
    known = ("hedgerow-hops", "traceparent", "tracestate", "hedgerow-tenant")
    assert [{key: heard[key] for key in known if key in heard} for heard in foreign.heard] == [
        {"hedgerow-hops": "3", "traceparent": trace, "tracestate": "a=1"},
        {"hedgerow-hops": "3", "traceparent": trace, "tracestate": "a=1", "hedgerow-tenant": "acme"},
        {"hedgerow-hops": "1"},
        {"hedgerow-hops": "1", "hedgerow-tenant": "b"},
    ]
    with pytest.raises(InvalidInput, match="tenant"):
        await telling.infer(replace(REQUEST, origin=Origin(tenant="a\nb")), Deadline.after(LONG_S))
    await telling.infer(replace(REQUEST, origin=Origin(traceparent="\u00e4\n")), Deadline.after(LONG_S))
    assert "traceparent" not in foreign.heard[-1]


async def test_a_request_that_has_passed_too_many_routers_is_not_sent_on(stack: AsyncExitStack) -> None:
    cloud = await stack.enter_async_context(Cloud())
    remote = await reached(stack, cloud.target, max_hops=2)
    await ask(remote, replace(REQUEST, origin=Origin(hops=1)))
    with pytest.raises(BackendUnavailable, match="passed 2 routers, the limit is 2"):
        await ask(remote, replace(REQUEST, origin=Origin(hops=2)))
    assert cloud.asked == 1
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


async def test_typed_answers_of_servers_without_an_index_are_as_good_as_any(stack: AsyncExitStack) -> None:
    typed = oip_pb2.ModelInferResponse(
        model_name=MODEL,
        outputs=[
            oip_pb2.ModelInferResponse.InferOutputTensor(
                name="logits",
                datatype="FP32",
                shape=[1, 4],
                contents=oip_pb2.InferTensorContents(fp32_contents=[0, 0, 0, 1]),
            )
        ],
    )
    foreign = await stack.enter_async_context(Foreign({"ModelInfer": says(typed)}))
    remote = await reached(stack, foreign.target, failures_to_open=1)
    assert await remote.models() == ()
    await ask(remote)
    assert remote.snapshot(MODEL).healthy, "not to know a call is no fault"


async def test_a_server_with_a_model_of_others_that_is_not_ready_is_used_for_ours(stack: AsyncExitStack) -> None:
    metadata = oip_pb2.ModelMetadataResponse(name=MODEL)

    async def ready(raw: bytes, context: Context) -> oip_pb2.ModelReadyResponse:
        if oip_pb2.ModelReadyRequest.FromString(raw).name != MODEL:  # as KServe does it
            await context.abort(grpc.StatusCode.NOT_FOUND, "no such model")
        return oip_pb2.ModelReadyResponse(ready=True)

    server = Foreign(
        {
            "ServerReady": says(oip_pb2.ServerReadyResponse(ready=False)),
            "ModelReady": ready,
            "ModelMetadata": says(metadata),
            "ModelInfer": says(ANSWER),
        }
    )
    foreign = await stack.enter_async_context(server)
    remote = await reached(stack, foreign.target, failures_to_open=1)
    await until(lambda: remote._pool.endpoints[0].open)  # nobody has asked for a model yet
    remote._models.get("somebody else's", "", whatever_age=True)
    remote._models.get(MODEL, "", whatever_age=True)
    await until(lambda: not remote._pool.endpoints[0].open)
    assert await remote.ready(MODEL)
    assert not await remote.ready("somebody else's")
    assert (await remote.infer(REQUEST, Deadline.after(LONG_S))).version == "7"


async def test_mlservers_word_for_not_ready_is_not_held_against_the_request(stack: AsyncExitStack) -> None:
    refusal = refuses(grpc.StatusCode.INVALID_ARGUMENT, f"Model {MODEL} is not ready yet.")
    loading = await stack.enter_async_context(
        Foreign({"ModelInfer": refusal, "ModelReady": says(oip_pb2.ModelReadyResponse(ready=False))})
    )
    spare = await stack.enter_async_context(Cloud())
    remote = await reached(stack, loading.target, max_retries=0)
    with pytest.raises(BackendUnavailable, match=f"{MODEL} is not ready"):
        await ask(remote)
    assert remote.snapshot(MODEL).healthy
    both = await reached(stack, Target(address=loading.target, zone="near"), Target(address=spare.target))
    await ask(both)
    assert spare.asked == 1
    loading.answers["ModelReady"] = says(oip_pb2.ModelReadyResponse(ready=True))
    with pytest.raises(InvalidInput, match="not ready yet"):
        await ask(remote)


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


@pytest.mark.parametrize(
    ("raised", "arrives"),
    [
        (InvalidInput("no such thing"), InvalidInput),
        (ModelNotFound("no such thing"), ModelNotFound),
        (Overloaded("no such thing"), Overloaded),
        (Unavailable("no such thing"), BackendUnavailable),
        (Forbidden("no such thing"), Forbidden),
        (EngineFault("no such thing"), EngineFault),
    ],
    ids=lambda one: type(one).__name__ if isinstance(one, Exception) else None,
)
async def test_an_error_in_a_stream_keeps_what_it_means(
    stack: AsyncExitStack, raised: HedgerowError, arrives: type[HedgerowError]
) -> None:
    cloud = await stack.enter_async_context(Cloud())
    remote = await reached(stack, cloud.target)
    cloud.raises = [raised]
    with pytest.raises(HedgerowError, match="cloud: no such thing") as error:
        await streamed(remote)
    assert type(error.value) is arrives


async def streamed(remote: RemoteBackend, request: InferRequest = REQUEST) -> list[InferResponse]:
    return [one async for one in remote.stream(request, Deadline.after(LONG_S))]


def tokens(text: str, *, final: bool | None = None) -> oip_pb2.ModelInferResponse:
    """An answer with `text`, none if it is empty, marked as Triton does it."""
    response = oip_pb2.ModelInferResponse(model_name=MODEL, model_version="1")
    if text:
        response.outputs.add(name="text", datatype="BYTES", shape=[1]).contents.bytes_contents.append(text.encode())
    if final is not None:
        response.parameters["triton_final_response"].bool_param = final
    return response


async def test_tritons_marks_of_the_end_are_neither_asked_for_nor_passed_on(stack: AsyncExitStack) -> None:
    said = [tokens("a", final=False), tokens("b", final=False), tokens("", final=True)]
    triton = Foreign({}, [oip_pb2.ModelStreamInferResponse(infer_response=one) for one in said])
    remote = await reached(stack, (await stack.enter_async_context(triton)).target)
    asked = replace(REQUEST, parameters={"triton_enable_empty_final_response": True, "temperature": 0.5})
    answers = await streamed(remote, asked)
    assert [one.output("text").tolist() for one in answers] == [[b"a"], [b"b"]]
    assert [dict(one.parameters) for one in answers] == [{}, {}]
    assert [sorted(one.parameters) for one in triton.asked_in_streams] == [["temperature"]]


async def test_an_error_without_a_status_in_tritons_stream_is_an_engines(stack: AsyncExitStack) -> None:
    triton = Foreign({}, [oip_pb2.ModelStreamInferResponse(error_message="boom")])
    remote = await reached(stack, (await stack.enter_async_context(triton)).target)
    with pytest.raises(EngineFault, match="cloud: boom"):
        await streamed(remote)


@pytest.mark.parametrize("version", ["", "1", "v2.0"])
async def test_bare_answers_in_a_stream_are_understood_as_mlserver_gives_them(
    stack: AsyncExitStack, version: str
) -> None:
    said = [tokens("a"), tokens("b")]
    for one in said:
        one.model_version = version
    mlserver = await stack.enter_async_context(Foreign({}, said))
    remote = await reached(stack, mlserver.target)
    answers = await streamed(remote)
    assert [(one.model, one.version, one.output("text").tolist()) for one in answers] == [
        (MODEL, version, [b"a"]),
        (MODEL, version, [b"b"]),
    ]


class Counted:
    """Counts the calls that a server answers, and lets its callers manage models, of which there are none."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, served: rpc.Methods) -> rpc.Methods:
        def counted(method: rpc.Method) -> rpc.Method:
            async def handle(request: Any, call: rpc.Call) -> Any:
                self.calls += 1
                return await method.handle(request, call)

            return dataclasses.replace(method, handle=handle)

        return {path: counted(method) for path, method in served.items()}

    async def load(self, model: str) -> None:
        raise ModelNotFound(model)

    unload = load


async def test_routers_in_a_circle_do_not_chase_questions_about_models(stack: AsyncExitStack) -> None:
    settings = msgspec.structs.replace(SETTINGS, probe_timeout_s=LONG_S, heartbeat_s=600.0, max_hops=3)
    nowhere, counted = "127.0.0.1:1", Counted()
    first, second = (RemoteBackend(name, nowhere, settings) for name in ("first", "second"))
    for one, other in ((first, second), (second, first)):
        server = Server(one, ServerSettings(port=0, drain_s=0.001), around=counted, control=counted)
        await stack.enter_async_context(server)
        stack.push_async_callback(one.close)
        other.update_targets(server.address)
    with pytest.raises(BackendUnavailable, match="passed 3 routers, the limit is 3"):
        await first.metadata(MODEL)
    assert counted.calls == 3
    assert not await first.ready(MODEL)
    assert counted.calls == 6
    assert await first.models() == ()
    assert counted.calls == 9
