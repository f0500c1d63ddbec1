"""Which gate judges an answer of the edge, and whether the guarantee behind it was measured on these models."""

import asyncio
import re
from contextlib import AsyncExitStack
from pathlib import Path

import msgspec
import pytest
from msgspec.structs import replace
from onnx import TensorProto
from simulators import models
from simulators.cloud import Cloud
from simulators.guarantees import guarantee
from simulators.places import until
from simulators.routers import GATE, SOON_S, SURE, UNSURE, ask, heard, infer, routed

from hedgerow.backend import Deadline
from hedgerow.errors import EngineFault, InvalidRelease, Unavailable
from hedgerow.gate import Gate
from hedgerow.host.model_host import ModelHost
from hedgerow.host.settings import ModelFile
from hedgerow.judge import Judges
from hedgerow.parameters import DEGRADED, REASON, RELEASE, TIER
from hedgerow.policies import Policy, cloud_first, edge_first
from hedgerow.tensors import InferRequest, InferResponse

PATIENCE_S = 60.0


async def test_the_gate_sees_its_output_also_where_the_caller_wants_another(
    stack: AsyncExitStack, host: ModelHost, cloud: Cloud
) -> None:
    router, _ = await routed(stack, host, cloud.target)
    for strength, tier in ((SURE, "edge"), (UNSURE, "cloud")):
        response = await infer(router, replace(ask(strength=strength), outputs=("label",)))
        assert response.parameters[TIER] == tier
        assert [output.name for output in response.outputs] == ["label"]
        assert response.output("label").tolist() == [3]


@pytest.mark.parametrize("policy", [edge_first.plan, cloud_first.plan])
async def test_without_a_cloud_the_answers_of_a_model_whose_gate_is_refused_are_second_best(
    stack: AsyncExitStack, host: ModelHost, policy: Policy
) -> None:
    router, _ = await routed(stack, host, None, policy=policy)
    router.set_gate("digits", "1", None, guarantee(GATE, student="x" * 64))
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
        (guarantee(GATE, student=digest), "edge", "confidence"),
        (guarantee(GATE, student="x" * 64), "cloud", "student's digest"),
        (guarantee(GATE, student=digest, teacher="x" * 64), "cloud", "teacher's digest"),
        (msgspec.structs.replace(guarantee(GATE, student=digest), precision="int8"), "cloud", "precision"),
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
        router.set_gate("digits", "1", Gate(threshold=0.5), guarantee(GATE, student=digest))


async def test_a_guarantee_does_not_outlive_the_file_it_was_measured_on(
    stack: AsyncExitStack, host: ModelHost, cloud: Cloud, tmp_path: Path
) -> None:
    router, remote = await routed(stack, host, cloud.target)
    await heard(remote)
    router.set_gate("digits", "1", None, guarantee(GATE, student=(await host.metadata("digits")).properties["sha256"]))
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
    router.set_gate("digits", "1", None, guarantee(GATE, student=(await host.metadata("digits")).properties["sha256"]))
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


async def test_another_teacher_ends_what_was_found_of_the_gate(stack: AsyncExitStack, host: ModelHost) -> None:
    digest = (await host.metadata("digits")).properties["sha256"]
    async with Cloud(sha256="t" * 64) as first:
        router, remote = await routed(stack, host, first.target)
        await heard(remote)
        router.set_gate("digits", "1", None, guarantee(GATE, student=digest))
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
    router.set_gate("digits", "1", None, guarantee(GATE, student=digest))
    response = await infer(router, ask(strength=SURE))
    assert response.parameters[DEGRADED] is True
    assert "the student's digest" in str(response.parameters[REASON])
