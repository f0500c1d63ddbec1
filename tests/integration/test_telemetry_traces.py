"""Traces over a real edge, cloud and collector, and what a collector that is away costs."""

import asyncio
from collections.abc import Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import grpc
import pytest
from simulators import models
from simulators.cloud import MODEL
from simulators.collector import Collector, collecting
from simulators.devices import INFER, SOON_S, UNSURE, a_device, ask, large_model

from hedgerow import transports
from hedgerow.config import ServerSettings
from hedgerow.errors import ConfigError, InvalidInput
from hedgerow.function import FunctionBackend
from hedgerow.oip.messages import request_to_proto
from hedgerow.oip.service import SERVICE
from hedgerow.parameters import TIER
from hedgerow.server import Server
from hedgerow.telemetry.settings import TracingSettings
from hedgerow.telemetry.tracing import Tracing


@pytest.fixture
def collector() -> Iterator[tuple[Collector, str]]:
    with collecting() as both:
        yield both


@pytest.mark.parametrize("transport", transports.known())
async def test_one_trace_spans_caller_device_and_cloud(
    stack: AsyncExitStack, tmp_path: Path, collector: tuple[Collector, str], transport: str
) -> None:
    receiver, endpoint = collector
    device_tracing, cloud_tracing = (
        Tracing(TracingSettings(endpoint=endpoint, service=service), instance="x") for service in ("device", "cloud")
    )
    there = FunctionBackend(large_model())
    around = cloud_tracing.methods
    server = Server(cloud_tracing.around(there, "serve"), ServerSettings(port=0, transport=transport), around=around)
    await stack.enter_async_context(server)
    device = await a_device(stack, tmp_path, server.address, device_tracing, transport)
    trace_id, span_id = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    await ask(device.server, models.request(models.pixels(3, strength=UNSURE)), f"00-{trace_id}-{span_id}-01")
    await device_tracing.close()
    await cloud_tracing.close()

    spans = {receiver.services[span.span_id] + ": " + span.name: span for span in receiver.spans}
    way = (
        f"device: {INFER}",
        "device: route digits",
        f"device: cloud {MODEL}",
        f"cloud: {INFER}",
        f"cloud: serve {MODEL}",
    )
    assert set(spans) == {*way, "device: edge digits"}
    assert {span.trace_id.hex() for span in spans.values()} == {trace_id}
    parents = [spans[name].parent_span_id for name in way]
    assert parents == [bytes.fromhex(span_id), *(spans[name].span_id for name in way[:-1])]
    assert spans["device: edge digits"].parent_span_id == spans["device: route digits"].span_id
    told = {pair.key: pair.value for pair in spans["device: route digits"].attributes}
    assert told["hedgerow.tier"].string_value == "cloud"
    assert told["hedgerow.confidence"].double_value == pytest.approx(0.23, abs=0.01)


async def test_a_request_that_fails_or_streams_is_a_span_that_says_so(
    stack: AsyncExitStack, tmp_path: Path, collector: tuple[Collector, str]
) -> None:
    receiver, endpoint = collector
    tracing = Tracing(TracingSettings(endpoint=endpoint))
    device = await a_device(stack, tmp_path, "127.0.0.1:1", tracing)
    with pytest.raises(InvalidInput):
        await device.ask(hedgerow_privacy="made-up")
    assert len(await streamed(device.server)) == 1
    await tracing.close()
    by_name: dict[str, list[Any]] = {}
    for span in receiver.spans:
        by_name.setdefault(span.name, []).append(span)
    failed, answered = by_name["route digits"]
    assert failed.status.code == 2
    assert "made-up" in failed.status.message
    assert answered.status.code == 0
    (edge,) = by_name["edge digits"]
    assert edge.parent_span_id == answered.span_id


async def test_a_trace_that_its_caller_does_not_sample_is_not_sent(
    stack: AsyncExitStack, tmp_path: Path, collector: tuple[Collector, str]
) -> None:
    receiver, endpoint = collector
    tracing = Tracing(TracingSettings(endpoint=endpoint))
    device = await a_device(stack, tmp_path, "127.0.0.1:1", tracing)
    await ask(device.server, models.request(), "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00")
    await tracing.close()
    assert receiver.spans == []


async def test_a_collector_that_is_away_costs_no_answer_and_bounds_the_end(
    stack: AsyncExitStack, tmp_path: Path
) -> None:
    tracing = Tracing(TracingSettings(endpoint="http://127.0.0.1:1", timeout_s=0.2))
    device = await a_device(stack, tmp_path, "127.0.0.1:1", tracing)
    assert (await device.ask()).parameters[TIER] == "edge"
    async with asyncio.timeout(SOON_S):
        await tracing.close()
        await tracing.close()


async def test_opentelemetry_turned_off_by_its_own_variable_costs_no_answer(
    stack: AsyncExitStack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    tracing = Tracing(TracingSettings(endpoint="http://127.0.0.1:1"))
    device = await a_device(stack, tmp_path, "127.0.0.1:1", tracing)
    assert (await device.ask()).parameters[TIER] == "edge"
    await tracing.close()


def test_an_endpoint_that_is_no_url_is_named() -> None:
    with pytest.raises(ConfigError, match=r"tracing\.endpoint: 'collector:4317'"):
        Tracing(TracingSettings(endpoint="collector:4317"))


async def streamed(server: Server) -> list[bytes]:
    async with grpc.aio.insecure_channel(server.address) as channel:
        stream: grpc.aio.StreamStreamMultiCallable[bytes, bytes] = channel.stream_stream(
            f"/{SERVICE.full_name}/ModelStreamInfer"
        )
        messages = iter([request_to_proto(models.request()).SerializeToString()])
        return [answer async for answer in stream(messages, timeout=SOON_S)]
