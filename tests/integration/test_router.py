"""The router between a real edge host and a real cloud over gRPC: who answers, why, and what happens when it breaks."""

import asyncio
import contextlib
import logging
import math
import re
import socket
import time
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import grpc
import msgspec
import numpy as np
import pytest
from msgspec.structs import replace
from onnx import TensorProto
from simulators import models
from simulators.cloud import MODEL, Cloud
from simulators.places import until

from hedgerow.backend import Deadline
from hedgerow.errors import (
    EngineFault,
    Forbidden,
    InvalidInput,
    InvalidRelease,
    ModelNotFound,
    Overloaded,
    Unavailable,
)
from hedgerow.function import FunctionBackend, FunctionModel
from hedgerow.gate import Gate, Guarantee
from hedgerow.host.model_host import HostSettings, ModelFile, ModelHost
from hedgerow.journey import Route
from hedgerow.judge import Judges
from hedgerow.parameters import CONFIDENCE, DEGRADED, PRIVACY, REASON, RELEASE, TIER
from hedgerow.policies import Policy, Privacy, cloud_first, edge_first
from hedgerow.remote.backend import RemoteBackend, RemoteSettings
from hedgerow.router import Observation, Router
from hedgerow.tensors import InferRequest, InferResponse, Parameter

GATE = Gate(threshold=0.8)
SURE, UNSURE = 8.0, 1.0
"""Strength of the pixels: the edge's confidence is above 0.99, or about 0.23."""
REMOTE = RemoteSettings(
    connect_timeout_s=0.5, probe_timeout_s=0.5, probe_min_s=0.02, probe_max_s=0.1, heartbeat_s=0.2, timeout_s=5
)
SOON_S = 10.0
PATIENCE_S = 60.0


@pytest.fixture
async def host(stack: AsyncExitStack, tmp_path: Path) -> ModelHost:
    host = ModelHost(HostSettings(workers=1))
    stack.push_async_callback(host.close)
    await host.load_file(ModelFile("digits", "1", models.classifier(tmp_path / "1.onnx", extra=True), precision="fp32"))
    return host


@pytest.fixture
async def cloud(stack: AsyncExitStack) -> Cloud:
    return await stack.enter_async_context(Cloud())


async def routed(
    stack: AsyncExitStack, host: ModelHost, target: str | None, *, gate: Gate | None = GATE, **route: object
) -> tuple[Router, RemoteBackend | None]:
    """A router over `host` and the remote at `target`; one without a cloud for None."""
    remote = None
    if target is not None:
        remote = await stack.enter_async_context(RemoteBackend("cloud", target, REMOTE))
    router = Router({"digits": Route(model="digits", edge=host, cloud=remote, cloud_model=MODEL, **route)})  # type: ignore[arg-type] # a test's shorthand
    router.set_gate("digits", "1", gate, None)
    return router, remote


async def heard(remote: RemoteBackend | None) -> None:
    """Return when the remote's metadata is at hand: a request waits for it no longer than its deadline allows."""
    assert remote is not None
    async with asyncio.timeout(SOON_S):
        while True:
            with contextlib.suppress(Unavailable):
                await remote.metadata(MODEL)
                return


def ask(digit: int = 3, strength: float = UNSURE, **parameters: str) -> InferRequest:
    return models.request(models.pixels(digit, strength=strength), **parameters)


async def infer(router: Router, request: InferRequest, seconds: float = SOON_S) -> InferResponse:
    response = await router.infer(request, Deadline.after(seconds))
    assert isinstance(response.parameters[REASON], str)
    assert response.parameters[REASON]
    return response


def guarantee(*, student: str, teacher: str = "t" * 64) -> Guarantee:
    return Guarantee(
        gate=GATE,
        risk="disagreement",
        epsilon=0.01,
        delta=0.05,
        bound="binomial",
        samples=1000,
        errors=3,
        escalated=0.2,
        thresholds={},
        calibration_sha256="c" * 64,
        student_sha256=student,
        teacher_sha256=teacher,
        engine="onnxruntime",
        precision="fp32",
    )


async def test_the_edge_answers_what_it_is_sure_of_and_the_cloud_the_rest(
    stack: AsyncExitStack, host: ModelHost, cloud: Cloud
) -> None:
    router, _ = await routed(stack, host, cloud.target)
    cloud.contradicts = True
    sure = await infer(router, ask(strength=SURE))
    assert sure.output("logits").argmax() == 3
    assert sure.version == "1"
    assert sure.parameters[TIER] == "edge"
    assert sure.parameters[RELEASE] == "digits/1"
    assert sure.parameters[DEGRADED] is False
    assert float(sure.parameters[CONFIDENCE]) > 0.99
    assert cloud.asked == 0
    unsure = await infer(router, replace(ask(), id="42"))
    assert unsure.output("logits").argmax() == 4
    assert (unsure.model, unsure.version, unsure.id) == ("digits", "2031", "42")
    pinned = await infer(router, replace(ask(), version="1"))
    assert pinned.parameters[TIER] == "cloud", "versions are the edge's and mean nothing there"
    assert unsure.parameters == {
        TIER: "cloud",
        REASON: "confidence 0.232 < 0.800",
        CONFIDENCE: pytest.approx(math.e / (math.e + 9)),
        RELEASE: "digits/1",
        DEGRADED: False,
    }


async def test_a_batch_is_escalated_whole_for_its_worst_row(
    stack: AsyncExitStack, host: ModelHost, cloud: Cloud
) -> None:
    router, _ = await routed(stack, host, cloud.target)
    rows = np.concatenate([models.pixels(3, strength=SURE), models.pixels(5, strength=UNSURE)])
    assert (await infer(router, models.request(rows))).parameters[TIER] == "cloud"


async def test_the_gate_sees_its_output_also_where_the_caller_wants_another(
    stack: AsyncExitStack, host: ModelHost, cloud: Cloud
) -> None:
    router, _ = await routed(stack, host, cloud.target)
    for strength, tier in ((SURE, "edge"), (UNSURE, "cloud")):
        response = await infer(router, replace(ask(strength=strength), outputs=("label",)))
        assert response.parameters[TIER] == tier
        assert [output.name for output in response.outputs] == ["label"]
        assert response.output("label").tolist() == [3]


async def test_escalations_are_observed_with_both_answers_and_a_failing_observer_harms_nobody(
    stack: AsyncExitStack, host: ModelHost, cloud: Cloud, caplog: pytest.LogCaptureFixture
) -> None:
    router, _ = await routed(stack, host, cloud.target)
    cloud.contradicts = True
    seen: list[Observation] = []

    def broken(_: Observation) -> None:
        raise ZeroDivisionError

    router.observe(broken)
    router.observe(seen.append)
    await infer(router, ask(strength=SURE))
    await infer(router, ask(hedgerow_privacy="no-learning"))
    (observation,) = seen
    assert observation.edge.output("logits").argmax() == 3
    assert observation.cloud.output("logits").argmax() == 4
    assert observation.privacy is Privacy.NO_LEARNING
    assert observation.confidence == pytest.approx(0.232, abs=0.001)
    assert "an observer failed" in caplog.text


async def test_an_edge_only_request_never_leaves_the_device(
    stack: AsyncExitStack, host: ModelHost, cloud: Cloud, tmp_path: Path
) -> None:
    for gate in (GATE, None):
        for policy in ({}, {"policy": cloud_first.plan}):
            router, _ = await routed(stack, host, cloud.target, gate=gate, **policy)
            response = await infer(router, ask(hedgerow_privacy="edge-only"))
            assert response.parameters[TIER] == "edge"
            assert response.parameters[DEGRADED] is True
            assert "privacy: edge-only" in str(response.parameters[REASON])
    await host.load_file(ModelFile("digits", "1", models.square_root(tmp_path / "nan.onnx")))
    with pytest.raises(EngineFault):
        await infer(router, ask(strength=-1, hedgerow_privacy="edge-only"))
    await host.unload("digits")
    with pytest.raises(Unavailable, match="no release on the device"):
        await infer(router, ask(hedgerow_privacy="edge-only"))
    assert cloud.asked == 0


@pytest.mark.parametrize("value", ["edge_only", "EDGE-ONLY", True, 1])
async def test_a_privacy_class_that_is_not_known_fails_closed(
    stack: AsyncExitStack, host: ModelHost, cloud: Cloud, value: str | bool | int
) -> None:
    router, _ = await routed(stack, host, cloud.target)
    with pytest.raises(InvalidInput, match=PRIVACY):
        await router.infer(replace(ask(), parameters={PRIVACY: value}), Deadline.after(SOON_S))
    assert cloud.asked == 0


@pytest.mark.parametrize("name", ["hedgerow_privcay", "hedgerow-privacy", "Hedgerow_Privacy"])
async def test_a_privacy_class_under_a_misspelt_name_is_refused_and_not_overlooked(
    stack: AsyncExitStack, host: ModelHost, cloud: Cloud, name: str
) -> None:
    router, _ = await routed(stack, host, cloud.target)
    with pytest.raises(InvalidInput, match=f"'{name}'.*'{PRIVACY}'"):
        await router.infer(replace(ask(), parameters={name: "edge-only"}), Deadline.after(SOON_S))
    assert cloud.asked == 0


async def test_bad_input_is_refused_by_the_edge_and_not_sent_on(
    stack: AsyncExitStack, host: ModelHost, cloud: Cloud
) -> None:
    router, _ = await routed(stack, host, cloud.target)
    with pytest.raises(InvalidInput, match="'pixels'"):
        await infer(router, models.request(np.zeros((1, 63), np.float32)))
    with pytest.raises(ModelNotFound, match="'9'"):
        await infer(router, replace(ask(), version="9"))
    with pytest.raises(ModelNotFound, match="'letters'"):
        await infer(router, replace(ask(), model="letters"))
    assert cloud.asked == 0


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
    router.set_gate("digits", "1", None, guarantee(student=(await host.metadata("digits")).properties["sha256"]))
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


async def test_a_deadline_that_is_too_close_is_not_spent_on_the_cloud(
    stack: AsyncExitStack, host: ModelHost, cloud: Cloud
) -> None:
    router, _ = await routed(stack, host, cloud.target)
    cloud.delay_s = 0.25
    await asyncio.gather(*(infer(router, ask()) for _ in range(20)))
    asked = cloud.asked
    response = await infer(router, ask(), seconds=0.2)
    assert cloud.asked == asked
    assert response.parameters[DEGRADED] is True
    assert re.search(r"deadline too close: 1\d\d ms left, cloud p95 is \d{3} ms", str(response.parameters[REASON]))


async def test_where_the_cloud_is_required_there_is_no_second_best(
    stack: AsyncExitStack, host: ModelHost, cloud: Cloud
) -> None:
    router, _ = await routed(stack, host, cloud.target, require_cloud=True)
    assert (await infer(router, ask(strength=SURE))).parameters[TIER] == "edge"
    cloud.raises = [Overloaded("full")]
    with pytest.raises(Unavailable, match=r"requires the cloud.*full"):
        await infer(router, ask())
    with pytest.raises(Forbidden, match="privacy: edge-only"):
        await infer(router, ask(hedgerow_privacy="edge-only"))


async def test_a_crash_of_the_edge_is_answered_by_the_cloud(
    stack: AsyncExitStack, host: ModelHost, cloud: Cloud, tmp_path: Path
) -> None:
    await host.load_file(ModelFile("digits", "1", models.square_root(tmp_path / "nan.onnx")))
    router, _ = await routed(stack, host, cloud.target)
    response = await infer(router, ask(strength=-1))
    assert response.parameters[TIER] == "cloud"
    assert response.parameters[DEGRADED] is False
    assert "edge failed: output 'logits' of digits 1 is not finite" in str(response.parameters[REASON])
    assert CONFIDENCE not in response.parameters
    cloud.raises = [EngineFault("out of memory")]
    with pytest.raises(EngineFault, match=r"edge failed:.*cloud failed:.*out of memory"):
        await infer(router, ask(strength=-1))


async def test_without_a_release_on_the_device_the_cloud_answers(
    stack: AsyncExitStack, host: ModelHost, cloud: Cloud
) -> None:
    bare = ModelHost()
    stack.push_async_callback(bare.close)
    router, _ = await routed(stack, bare, cloud.target)
    assert await router.ready("digits")
    metadata = await router.metadata("digits")
    assert (metadata.name, metadata.versions) == ("digits", ()), "versions are the edge's"
    response = await infer(router, ask())
    assert response.parameters == {TIER: "cloud", REASON: "no release on the device", DEGRADED: False}
    assert [(state.name, state.ready) for state in await router.models()] == [("digits", True)]
    alone, _ = await routed(stack, bare, None)
    assert not await alone.ready("digits")
    with pytest.raises(Unavailable, match="no release on the device"):
        await infer(alone, ask())


async def test_without_a_cloud_the_edge_answers_everything(stack: AsyncExitStack, host: ModelHost) -> None:
    router, _ = await routed(stack, host, None)
    assert (await infer(router, ask(strength=SURE))).parameters[DEGRADED] is False
    refused = await infer(router, ask())
    assert refused.parameters[DEGRADED] is True
    assert "no cloud configured" in str(refused.parameters[REASON])
    ungated, _ = await routed(stack, host, None, gate=None)
    assert (await infer(ungated, ask())).parameters[DEGRADED] is False


@pytest.mark.parametrize("policy", [edge_first.plan, cloud_first.plan])
async def test_without_a_cloud_the_answers_of_a_model_whose_gate_is_refused_are_second_best(
    stack: AsyncExitStack, host: ModelHost, policy: Policy
) -> None:
    router, _ = await routed(stack, host, None, policy=policy)
    router.set_gate("digits", "1", None, guarantee(student="x" * 64))
    response = await infer(router, ask(strength=SURE))
    assert (response.parameters[TIER], response.parameters[DEGRADED]) == ("edge", True)
    assert re.search(r"no cloud configured; gate refused: .*the student's digest", str(response.parameters[REASON]))


async def test_without_a_cloud_an_answer_of_a_version_that_is_gone_before_it_is_judged_is_second_best(
    stack: AsyncExitStack, tmp_path: Path
) -> None:
    class Passing(ModelHost):
        """Answers from version 2, on trial, and goes back to version 1 at once."""

        async def infer(self, request: InferRequest, deadline: Deadline) -> InferResponse:
            await self.load_file(ModelFile("digits", "2", models.classifier(tmp_path / "2.onnx")))
            answer = await super().infer(request, deadline)
            await self.load_file(ModelFile("digits", "1", models.classifier(tmp_path / "1.onnx")))
            return answer

    host = Passing()
    stack.push_async_callback(host.close)
    await host.load_file(ModelFile("digits", "1", models.classifier(tmp_path / "1.onnx")))
    router, _ = await routed(stack, host, None, gate=None)
    response = await infer(router, ask(strength=SURE))
    assert (response.parameters[RELEASE], response.parameters[DEGRADED]) == ("digits/2", True)
    assert "digits/2 is gone" in str(response.parameters[REASON])


async def test_what_the_gate_refused_is_never_returned_as_good(stack: AsyncExitStack, host: ModelHost) -> None:
    unsure, _ = await routed(stack, host, None, policy=cloud_first.plan)
    assert (await infer(unsure, ask(strength=SURE))).parameters[DEGRADED] is False
    assert (await infer(unsure, ask())).parameters[DEGRADED] is True
    for gate in (GATE, None):
        strict, _ = await routed(stack, host, None, gate=gate, policy=cloud_first.plan, require_cloud=True)
        with pytest.raises(Unavailable, match=r"requires the cloud: .*no cloud configured"):
            await infer(strict, ask())


async def test_a_second_best_answer_of_a_router_in_the_cloud_stays_marked_and_teaches_nobody(
    stack: AsyncExitStack, host: ModelHost
) -> None:
    class SecondBest(FunctionBackend):
        async def infer(self, request: InferRequest, deadline: Deadline) -> InferResponse:
            said: dict[str, Parameter] = {TIER: "edge", REASON: "no cloud configured", DEGRADED: True}
            return replace(await super().infer(request, deadline), parameters=said)

    interface = replace(await host.metadata("digits"), name=MODEL, versions=("9",), properties={})
    logits = np.eye(1, models.CLASSES, dtype=np.float32)
    site = SecondBest(FunctionModel(interface, lambda _: {"logits": logits, "label": np.zeros(1, np.int64)}))
    seen: list[Observation] = []
    for require_cloud in (False, True):
        route = Route(model="digits", edge=host, cloud=site, cloud_model=MODEL, require_cloud=require_cloud)
        router = Router({"digits": route})
        router.set_gate("digits", "1", GATE, None)
        router.observe(seen.append)
        if require_cloud:
            with pytest.raises(Unavailable, match="second best"):
                await infer(router, ask())
        else:
            response = await infer(router, ask())
            assert (response.parameters[TIER], response.parameters[DEGRADED]) == ("cloud", True)
            assert "cloud: no cloud configured" in str(response.parameters[REASON])
    assert not seen


async def test_an_edge_without_a_gate_stands_in_for_the_cloud_only(
    stack: AsyncExitStack, host: ModelHost, cloud: Cloud
) -> None:
    router, _ = await routed(stack, host, cloud.target, gate=None)
    response = await infer(router, ask(strength=SURE))
    assert (response.parameters[TIER], response.parameters[REASON]) == ("cloud", "no gate for digits/1")
    cloud.raises = [EngineFault("broken")]
    response = await infer(router, ask(strength=SURE))
    assert (response.parameters[TIER], response.parameters[DEGRADED]) == ("edge", True)


async def test_a_guarantee_of_other_models_judges_nothing_and_that_is_said_once(
    stack: AsyncExitStack, host: ModelHost, caplog: pytest.LogCaptureFixture
) -> None:
    digest = (await host.metadata("digits")).properties["sha256"]
    cloud = await stack.enter_async_context(Cloud(sha256="t" * 64))
    router, remote = await routed(stack, host, cloud.target)
    await heard(remote)
    for binding, tier, word in (
        (guarantee(student=digest), "edge", "confidence"),
        (guarantee(student="x" * 64), "cloud", "student's digest"),
        (guarantee(student=digest, teacher="x" * 64), "cloud", "teacher's digest"),
        (msgspec.structs.replace(guarantee(student=digest), precision="int8"), "cloud", "precision"),
    ):
        caplog.clear()
        router.set_gate("digits", "1", None, binding)
        for _ in range(3):
            response = await infer(router, ask(strength=SURE))
            assert response.parameters[TIER] == tier
            assert word in str(response.parameters[REASON])
        refusals = [record for record in caplog.records if "gate refused" in record.message]
        assert len(refusals) == (0 if tier == "edge" else 1)
    with pytest.raises(InvalidRelease):
        router.set_gate("digits", "1", Gate(threshold=0.5), guarantee(student=digest))


async def test_a_guarantee_does_not_outlive_the_file_it_was_measured_on(
    stack: AsyncExitStack, host: ModelHost, cloud: Cloud, tmp_path: Path
) -> None:
    router, remote = await routed(stack, host, cloud.target)
    await heard(remote)
    router.set_gate("digits", "1", None, guarantee(student=(await host.metadata("digits")).properties["sha256"]))
    assert (await infer(router, ask(strength=SURE))).parameters[TIER] == "edge"
    models.classifier(tmp_path / "1.onnx", shift=1, extra=True)
    await host.load("digits")
    response = await infer(router, ask(strength=SURE))
    assert response.parameters[TIER] == "cloud"
    assert "the student's digest" in str(response.parameters[REASON])


async def test_a_teacher_without_a_digest_is_not_checked_and_that_is_said_once(
    stack: AsyncExitStack, host: ModelHost, cloud: Cloud, caplog: pytest.LogCaptureFixture
) -> None:
    router, remote = await routed(stack, host, cloud.target)
    await heard(remote)
    router.set_gate("digits", "1", None, guarantee(student=(await host.metadata("digits")).properties["sha256"]))
    for _ in range(3):
        assert (await infer(router, ask(strength=SURE))).parameters[TIER] == "edge"
    assert caplog.text.count("is not checked") == 1


async def test_a_gate_over_an_output_that_is_not_there_judges_nothing(
    stack: AsyncExitStack, host: ModelHost, cloud: Cloud
) -> None:
    router, _ = await routed(stack, host, cloud.target, gate=Gate(threshold=0.0, output="scores"))
    response = await infer(router, ask(strength=SURE))
    assert response.parameters[TIER] == "cloud"
    assert "'scores'" in str(response.parameters[REASON])


@pytest.mark.parametrize("onnx_type", [TensorProto.BFLOAT16, TensorProto.STRING])
async def test_a_gate_over_an_output_without_numbers_judges_nothing(
    stack: AsyncExitStack, cloud: Cloud, tmp_path: Path, onnx_type: int
) -> None:
    host = ModelHost()
    stack.push_async_callback(host.close)
    await host.load_file(ModelFile("digits", "1", models.swapped(tmp_path / "m.onnx", onnx_type)))
    judges = Judges()
    judges.set("digits", "1", Gate(threshold=0.0, output="y"), None)
    verdict = await judges.find("digits", "", host, None, "", Deadline.after(SOON_S))
    assert verdict.gate is None
    assert "has no scores" in verdict.reason


async def test_model_and_gate_swap_together_under_load(
    stack: AsyncExitStack, host: ModelHost, cloud: Cloud, tmp_path: Path
) -> None:
    """Version 2 is never unsure but has a gate that nothing passes: its answers must never come out."""
    router, _ = await routed(stack, host, cloud.target)
    stop, tiers = asyncio.Event(), set()

    async def caller() -> None:
        while not stop.is_set():
            response = await infer(router, ask(strength=SURE))
            assert response.output("logits").argmax() == 3
            tiers.add((response.parameters[TIER], response.parameters[RELEASE]))

    async with asyncio.TaskGroup() as group:
        for _ in range(4):
            group.create_task(caller())
        await until(lambda: ("edge", "digits/1") in tiers)
        router.set_gate("digits", "2", Gate(threshold=1.1), None)
        await host.load_file(ModelFile("digits", "2", models.classifier(tmp_path / "2.onnx", shift=1, extra=True)))
        router.drop_gate("digits", "1")
        await until(lambda: ("cloud", "digits/2") in tiers)
        stop.set()
    assert not {tier for tier in tiers if tier == ("edge", "digits/2")}


async def test_an_answer_is_judged_by_the_gate_of_the_version_that_gave_it(
    stack: AsyncExitStack, cloud: Cloud, tmp_path: Path
) -> None:
    class Swapping(ModelHost):
        """Swaps between the router's look at it and its answer."""

        async def infer(self, request: InferRequest, deadline: Deadline) -> InferResponse:
            await self.load_file(ModelFile("digits", "2", models.classifier(tmp_path / "2.onnx")))
            return await super().infer(request, deadline)

    host = Swapping()
    stack.push_async_callback(host.close)
    await host.load_file(ModelFile("digits", "1", models.classifier(tmp_path / "1.onnx")))
    router, _ = await routed(stack, host, cloud.target)
    router.set_gate("digits", "2", Gate(threshold=1.1), None)
    response = await infer(router, ask(strength=SURE))
    assert response.parameters[TIER] == "cloud"
    assert response.parameters[RELEASE] == "digits/2"
    assert "< 1.100" in str(response.parameters[REASON])


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


async def test_another_teacher_ends_what_was_found_of_the_gate(stack: AsyncExitStack, host: ModelHost) -> None:
    digest = (await host.metadata("digits")).properties["sha256"]
    async with Cloud(sha256="t" * 64) as first:
        router, remote = await routed(stack, host, first.target)
        await heard(remote)
        router.set_gate("digits", "1", None, guarantee(student=digest))
        assert (await infer(router, ask(strength=SURE))).parameters[TIER] == "edge"
    async with Cloud(port=first.port, sha256="u" * 64), asyncio.timeout(PATIENCE_S):
        while "the teacher's digest" not in (said := str((await infer(router, ask(strength=SURE))).parameters[REASON])):
            assert "confidence" in said
            await asyncio.sleep(0.02)  # polls: until the remote has heard of it, the old word counts


async def test_an_answer_of_another_file_under_the_same_version_is_not_judged_by_the_old_ones_guarantee(
    stack: AsyncExitStack, tmp_path: Path
) -> None:
    class Replacing(ModelHost):
        """Has another file answer than the one that is there when the request sets out."""

        async def infer(self, request: InferRequest, deadline: Deadline) -> InferResponse:
            await self.load_file(ModelFile("digits", "1", models.classifier(tmp_path / "new.onnx", shift=1)))
            return await super().infer(request, deadline)

    host = Replacing()
    stack.push_async_callback(host.close)
    await host.load_file(ModelFile("digits", "1", models.classifier(tmp_path / "old.onnx"), precision="fp32"))
    router, _ = await routed(stack, host, None)
    digest = (await host.metadata("digits")).properties["sha256"]
    router.set_gate("digits", "1", None, guarantee(student=digest))
    response = await infer(router, ask(strength=SURE))
    assert response.parameters[DEGRADED] is True
    assert "the student's digest" in str(response.parameters[REASON])
