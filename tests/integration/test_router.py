"""The router between a real edge host and a real cloud: who answers, why, and what never leaves the device."""

import asyncio
import math
import re
from contextlib import AsyncExitStack
from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace
from simulators import models
from simulators.cloud import MODEL, Cloud
from simulators.routers import GATE, SOON_S, SURE, UNSURE, ask, infer, routed

from hedgerow.backend import Deadline
from hedgerow.errors import EngineFault, Forbidden, InvalidInput, ModelNotFound, Overloaded, Unavailable
from hedgerow.function import FunctionBackend, FunctionModel
from hedgerow.host.model_host import ModelHost
from hedgerow.host.settings import ModelFile
from hedgerow.journey import Route
from hedgerow.parameters import CONFIDENCE, DEGRADED, PRIVACY, REASON, RELEASE, TIER
from hedgerow.policies import Privacy, cloud_first
from hedgerow.router import Observation, Router
from hedgerow.tensors import InferRequest, InferResponse, Parameter


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
