"""What is counted of a real edge and cloud, as whoever collects it sees it."""

import asyncio
from contextlib import AsyncExitStack
from pathlib import Path

import msgspec
import pytest
from msgspec.structs import replace
from simulators import models
from simulators.cloud import Cloud
from simulators.devices import SOON_S, SURE, UNSURE, Device, a_device, ask
from simulators.places import running, until

from hedgerow.backend import Deadline
from hedgerow.errors import InvalidInput, ModelNotFound, Overloaded
from hedgerow.host.model_host import ModelHost
from hedgerow.host.settings import ModelFile
from hedgerow.journey import Route
from hedgerow.router import Router
from hedgerow.tensors import Origin
from hedgerow_edge.front import Front
from hedgerow_edge.settings import AgentSettings


async def test_who_answered_and_why_is_counted(device: Device, cloud: Cloud) -> None:
    for _ in range(3):
        await device.ask(SURE)
    await device.ask(UNSURE)
    await device.ask(UNSURE, hedgerow_privacy="edge-only")
    cloud.raises.append(ValueError("the large model has a bad day"))
    await device.ask(UNSURE)
    found = await device.metrics()
    # By model, outcome, reason, release and tier.
    assert found["hedgerow_answers_total"] == {
        ("digits", "confident", "", "1", "edge"): 3,
        ("digits", "escalated", "", "1", "cloud"): 1,
        ("digits", "degraded", "privacy", "1", "edge"): 1,
        ("digits", "degraded", "internal", "1", "edge"): 1,
    }
    assert found["hedgerow_escalations_total"] == {("digits", "1"): 2}
    assert found["hedgerow_gate_confidence_count"] == {("digits", "1"): 6}
    assert found["hedgerow_gate_confidence_bucket"]["0.3", "digits", "1"] == 3
    assert found["hedgerow_gate_threshold"] == {("digits", "1"): 0.8}
    served = found["hedgerow_requests_total"]
    assert sum(count for (model, status, _), count in served.items() if (model, status) == ("digits", "OK")) == 6
    assert sum(found["hedgerow_request_duration_seconds_count"].values()) == 6
    assert found["hedgerow_engine_run_seconds_count"] == {("digits", "1"): 6}
    assert found["hedgerow_batch_rows_sum"] == {("digits", "1"): 6}
    assert found["hedgerow_remote_up"] == {("cloud",): 1}
    assert found["hedgerow_requests_inflight"] == {(): 0}


async def test_a_cloud_that_is_gone_is_the_reason_why_answers_are_degraded(
    stack: AsyncExitStack, tmp_path: Path
) -> None:
    device = await a_device(stack, tmp_path, "127.0.0.1:1")
    await device.ask(UNSURE)
    found = await device.metrics()
    assert found["hedgerow_answers_total"] == {("digits", "degraded", "unavailable", "1", "edge"): 1}
    assert found["hedgerow_remote_up"] == {("cloud",): 0}


async def test_callers_cannot_make_labels(device: Device) -> None:
    for number in range(20):
        with pytest.raises(ModelNotFound):
            await ask(device.server, models.request(model=f"made-up-{number}"))
    with pytest.raises(InvalidInput):
        await device.ask(hedgerow_privacy="made-up")
    with pytest.raises(ModelNotFound):
        await ask(device.server, replace(models.request(), version="made-up"))
    after = await device.metrics()
    served = after["hedgerow_requests_total"]
    assert served["(other)", "NOT_FOUND", ""] == 21
    assert served["digits", "INVALID_ARGUMENT", "1"] == 1
    assert set(served) == {("(other)", "NOT_FOUND", ""), ("digits", "INVALID_ARGUMENT", "1"), ("digits", "OK", "1")}
    assert not any("made-up" in value for samples in after.values() for labels in samples for value in labels)


async def test_what_is_open_is_seen_while_it_is_open(stack: AsyncExitStack, tmp_path: Path, cloud: Cloud) -> None:
    device = await a_device(stack, tmp_path, cloud.target)
    cloud.delay_s = SOON_S
    asked = asyncio.gather(device.ask(UNSURE))
    async with asyncio.timeout(SOON_S):
        await cloud.asking.wait()
    found = await device.metrics()
    assert found["hedgerow_requests_inflight"] == {(): 1}
    assert found["hedgerow_connections"] == {(): 1}
    assert found["hedgerow_calls"] == {(): 1}
    assert found["hedgerow_remote_inflight"] == {("cloud",): 1}
    asked.cancel()
    async with asyncio.timeout(SOON_S):
        while not (found := await device.metrics())["hedgerow_requests_total"].get(("digits", "CANCELLED", "1")):  # noqa: ASYNC110 (nobody tells)
            await asyncio.sleep(0.01)
    assert found["hedgerow_requests_inflight"] == {(): 0}


async def test_what_the_way_to_the_cloud_costs_is_counted(stack: AsyncExitStack, tmp_path: Path, cloud: Cloud) -> None:
    device = await a_device(stack, tmp_path, cloud.target)
    await device.ask(UNSURE)
    first = await device.metrics()
    sent = first["hedgerow_remote_sent_bytes_total"]["cloud",]
    assert sent > 64 * 4  # the pixels
    assert first["hedgerow_remote_received_bytes_total"]["cloud",] > 10 * 4
    assert first["hedgerow_remote_endpoints"] == {("cloud", "usable"): 1, ("cloud", "open"): 0, ("cloud", "ejected"): 0}
    assert first["hedgerow_remote_limit"]["cloud",] > 1
    cloud.raises.append(Overloaded("a moment", retry_after_s=0.01))
    await device.ask(UNSURE)
    second = await device.metrics()
    assert second["hedgerow_remote_requests_total"] == {("cloud",): 2}
    assert second["hedgerow_remote_retries_total"] == {("cloud",): 1}
    assert second["hedgerow_remote_sent_bytes_total"] == {("cloud",): 3 * sent}


async def test_what_stands_around_the_router_is_counted_and_no_caller_makes_a_label(
    stack: AsyncExitStack, tmp_path: Path
) -> None:
    host, router = ModelHost(), Router({})
    stack.push_async_callback(host.close)
    settings = msgspec.convert(
        {
            "splits": {"digits": {"targets": {"stable": {"model": "old"}, "candidate": {"model": "new", "weight": 0}}}},
            "shadows": {"old": {"model": "new", "share": 1.0}},
            "cache": {"models": ["old"]},
            "tenants": {"named": {"acme": {"requests_per_s": 1e-6, "burst_requests": 3}}, "each": {"max_inflight": 9}},
        },
        AgentSettings,
    )
    front = Front(settings, host)
    for name, shift in (("old", 0), ("new", 1)):
        await host.load_file(ModelFile(name, "1", models.classifier(tmp_path / f"{name}.onnx", shift=shift)))
        router.add_route(Route(model=name, edge=front.edge))
    served = front.before(router)
    await stack.enter_async_context(running(front.run()))
    for tenant in ("acme", "acme", "acme", "acme", "made-up", "made-up too", ""):
        try:
            await served.infer(replace(models.request(), origin=Origin(tenant=tenant)), Deadline.after(SOON_S))
        except Overloaded:
            assert tenant == "acme"

    def found() -> dict[str, dict[tuple[str, ...], float]]:
        values: dict[str, dict[tuple[str, ...], float]] = {}
        for family in front.metrics():
            for sample in family.samples:
                values.setdefault(sample.name, {})[tuple(sample.labels.values())] = sample.value
        return values

    await until(lambda: found()["hedgerow_shadow_requests_total"]["old", "differed"] == 6)
    after = found()
    assert after["hedgerow_cache_requests_total"] == {("old", "hit"): 5, ("old", "miss"): 1, ("old", "shared"): 0}
    assert after["hedgerow_cache_bytes"][()] > 0
    assert after["hedgerow_cache_entries"] == {(): 1}
    assert after["hedgerow_cache_evictions_total"] == {("room",): 0, ("age",): 0}
    assert after["hedgerow_split_requests_total"] == {
        ("digits", target, result): 6 if (target, result) == ("stable", "answered") else 0
        for target in ("stable", "candidate")
        for result in ("answered", "failed", "passed_over")
    }
    assert after["hedgerow_split_weight"] == {("digits", "stable"): 1, ("digits", "candidate"): 0}
    assert after["hedgerow_shadow_difference_max"] == {("old",): 1}
    assert {labels[:2] for labels in after["hedgerow_shadow_latency_seconds"]} == {
        ("old", "current"),
        ("old", "candidate"),
    }
    assert after["hedgerow_quota_requests_total"] == {
        ("acme", "admitted"): 3,
        ("acme", "refused"): 1,
        ("(others)", "admitted"): 3,
        ("(others)", "refused"): 0,
    }
    assert after["hedgerow_quota_tracked"] == {(): 3}
