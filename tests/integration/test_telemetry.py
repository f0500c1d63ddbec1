"""What watches the process from outside, over a real edge, cloud and collector: metrics, health, traces, logs."""

import asyncio
import io
import json
import logging
import re
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import msgspec
import pytest
from msgspec.structs import replace
from prometheus_client.parser import text_string_to_metric_families
from simulators import models
from simulators.cloud import MODEL, Cloud
from simulators.collector import Collector, collecting
from simulators.places import running, until

from hedgerow import transports
from hedgerow.backend import Deadline
from hedgerow.config import ServerSettings
from hedgerow.errors import ConfigError, HedgerowError, InvalidInput, ModelNotFound, Overloaded
from hedgerow.function import FunctionBackend, FunctionModel
from hedgerow.gate import Gate
from hedgerow.host.model_host import ModelFile, ModelHost
from hedgerow.journey import Route
from hedgerow.messages import request_to_proto, response_from_proto
from hedgerow.parameters import TIER
from hedgerow.proto import oip_pb2
from hedgerow.remote.backend import RemoteBackend, RemoteSettings
from hedgerow.router import Router
from hedgerow.rpc import received
from hedgerow.server import Server
from hedgerow.service import SERVICE
from hedgerow.telemetry import diagnostics, metrics
from hedgerow.telemetry.diagnostics import Diagnostics, Page, health
from hedgerow.telemetry.logs import (
    ERROR_ID,
    REPEAT_WINDOW_S,
    REPEATS,
    REQUEST,
    JsonFormatter,
    LineFormatter,
    Repeats,
    TracingSettings,
)
from hedgerow.telemetry.tracing import Tracing
from hedgerow.tensors import InferRequest, InferResponse, ModelMetadata, Origin, TensorSpec
from hedgerow_edge.front import Front
from hedgerow_edge.settings import AgentSettings

SURE, UNSURE = 8.0, 1.0
"""Strength of the pixels: the edge's confidence is above 0.99, or about 0.23."""
SOON_S = 60.0
INFER = f"{SERVICE.full_name}/ModelInfer"
REMOTE = RemoteSettings(connect_timeout_s=5, probe_timeout_s=5, probe_min_s=0.02, probe_max_s=0.1, heartbeat_s=0.2)


async def ask(server: Server, request: InferRequest, traceparent: str = "") -> InferResponse:
    """As any client would."""
    metadata = (("traceparent", traceparent),) if traceparent else ()
    async with grpc.aio.insecure_channel(server.address) as channel:
        infer: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(f"/{INFER}")
        message = request_to_proto(request).SerializeToString()
        try:
            answer = await infer(message, metadata=metadata, timeout=SOON_S)
        except grpc.aio.AioRpcError as error:
            raise received(error) from error
    return response_from_proto(oip_pb2.ModelInferResponse.FromString(answer))


@dataclass
class Device:
    server: Server
    watched: str
    """Where its metrics are."""

    async def ask(self, strength: float = SURE, **parameters: Any) -> InferResponse:
        return await ask(self.server, models.request(models.pixels(3, strength=strength), **parameters))

    async def metrics(self) -> dict[str, dict[tuple[str, ...], float]]:
        """Values by name and by the values of the labels, in the order of the labels' names."""
        status, body = await get(self.watched, "/metrics")
        assert status == 200
        found: dict[str, dict[tuple[str, ...], float]] = {}
        for family in text_string_to_metric_families(body):
            for sample in family.samples:
                labels = tuple(value for _, value in sorted(sample.labels.items()))
                found.setdefault(sample.name, {})[labels] = sample.value
        return found


async def a_device(
    stack: AsyncExitStack, folder: Path, target: str, tracing: Tracing | None = None, transport: str = "native"
) -> Device:
    """A device as the agent puts it together, in this process."""
    host = ModelHost()
    stack.push_async_callback(host.close)
    remote = await stack.enter_async_context(RemoteBackend("cloud", target, REMOTE))
    router = Router({})
    edge, cloud = (host, remote) if tracing is None else _traced(tracing, host, remote)
    router.add_route(Route(model="digits", edge=edge, cloud=cloud, cloud_model=MODEL))
    router.set_gate("digits", "1", Gate(threshold=0.8), None)
    await host.load_file(ModelFile("digits", "1", models.classifier(folder / "student.onnx"), engine="onnxruntime"))
    front = router if tracing is None else tracing.around(router, "route")
    around = None if tracing is None else tracing.methods
    server = Server(front, ServerSettings(port=0, transport=transport), around=around)
    page = metrics.Metrics(
        partial(metrics.of_server, server),
        partial(metrics.of_router, router),
        lambda: metrics.of_host(host, router.routes),
        partial(metrics.of_remotes, (remote,)),
    ).page

    async def make(accept: str) -> Page:
        return Page(*page(accept))

    watched = Diagnostics("127.0.0.1:0", {"/metrics": make, **health(server.service.ready)})
    await stack.enter_async_context(watched)
    await stack.enter_async_context(server)
    return Device(server, watched.address)


def _traced(tracing: Tracing, host: ModelHost, remote: RemoteBackend) -> Any:
    return tracing.around(host, "edge"), tracing.around(remote, "cloud", remote=True)


@pytest.fixture
async def cloud(stack: AsyncExitStack) -> Cloud:
    return await stack.enter_async_context(Cloud())


@pytest.fixture(params=transports.known())
async def device(request: pytest.FixtureRequest, stack: AsyncExitStack, tmp_path: Path, cloud: Cloud) -> Device:
    return await a_device(stack, tmp_path, cloud.target, transport=request.param)


async def raw(address: str, sent: bytes) -> bytes:
    """All that comes back for `sent` until the connection is closed."""
    host, _, port = address.rpartition(":")
    async with asyncio.timeout(SOON_S):
        reader, writer = await asyncio.open_connection(host, int(port))
        try:
            writer.write(sent)
            return await reader.read()
        except ConnectionResetError:  # it did not want to hear it
            return b""
        finally:
            writer.close()


async def get(address: str, path: str, method: str = "GET", *headers: str) -> tuple[int, str]:
    head = "\r\n".join((f"{method} {path} HTTP/1.1", f"Host: {address}", *headers, "", ""))
    answer = await raw(address, head.encode())
    head, _, body = answer.decode().partition("\r\n\r\n")
    assert f"Content-Length: {len(body.encode())}" in head or method == "HEAD"
    return int(head.split(" ")[1]), body


# Metrics


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


# Health, and the little server


async def test_ready_says_no_while_a_model_is_missing_and_live_says_yes(device: Device) -> None:
    assert await get(device.watched, "/readyz") == (200, "ready\n")
    device.server.service.draining = True
    assert (await get(device.watched, "/readyz"))[0] == 503
    assert await get(device.watched, "/healthz") == (200, "ok\n")
    assert (await device.metrics())["hedgerow_draining"] == {(): 1}


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"GET /nothing HTTP/1.1\r\n\r\n", 404),
        (b"POST /healthz HTTP/1.1\r\n\r\n", 405),
        (b"garbage\r\n\r\n", 400),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
        (b"GET /healthz HTTP/1.1\r\nX: " + b"x" * 2 * diagnostics.MAX_HEAD_BYTES, 431),
        (b"GET /healthz?x=1 HTTP/1.0\r\n\xff\x00: \xfe\r\nno colon\r\n\r\n", 200),
        (b"GET /broken HTTP/1.1\r\n\r\n", 500),
    ],
)
async def test_whatever_is_sent_it_gets_an_answer_and_the_server_stays(
    sent: bytes, status: int, caplog: pytest.LogCaptureFixture
) -> None:
    async def broken(_: str) -> Page:
        raise RuntimeError("of this page")

    async def ready() -> bool:
        return True

    async with Diagnostics("127.0.0.1:0", {"/broken": broken, **health(ready)}) as watched:
        answer = await raw(watched.address, sent)
        assert answer.split(b" ")[1] == str(status).encode()
        assert "of this page" not in answer.decode()
        assert ("of this page" in caplog.text) == (status == 500)
        assert await get(watched.address, "/readyz") == (200, "ready\n")
        assert await get(watched.address, "/readyz", "HEAD") == (200, "")


async def silent(stack: AsyncExitStack, address: str, sent: bytes = b"") -> asyncio.StreamReader:
    """A peer that does not finish what it says."""
    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    stack.callback(writer.close)
    writer.write(sent)
    await writer.drain()
    return reader


async def test_peers_that_say_nothing_are_let_go(stack: AsyncExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagnostics, "TIMEOUT_S", 0.2)
    watched = await stack.enter_async_context(Diagnostics("127.0.0.1:0", health(_always)))
    async with asyncio.timeout(SOON_S):
        reader = await silent(stack, watched.address, b"GET /heal")
        assert await reader.read() == b""


async def test_more_connections_than_it_takes_are_closed_at_once_and_do_no_harm(
    stack: AsyncExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(diagnostics, "TIMEOUT_S", 10 * SOON_S)
    watched = await stack.enter_async_context(Diagnostics("127.0.0.1:0", health(_always)))
    async with AsyncExitStack() as peers:
        for _ in range(diagnostics.MAX_CONNECTIONS):
            await silent(peers, watched.address)
        assert await raw(watched.address, b"") == b""
    async with asyncio.timeout(SOON_S):
        while not await raw(watched.address, b"GET /healthz HTTP/1.1\r\n\r\n"):  # noqa: ASYNC110 (nobody tells)
            await asyncio.sleep(0.01)


async def test_leaving_does_not_wait_for_a_peer_that_says_nothing(stack: AsyncExitStack) -> None:
    async with asyncio.timeout(SOON_S), Diagnostics("127.0.0.1:0", health(_always)) as watched:
        reader = await silent(stack, watched.address, b"GET /heal")
        assert await get(watched.address, "/healthz") == (200, "ok\n")
    assert await reader.read() == b""


async def test_an_address_that_is_taken_is_an_error_that_names_the_setting() -> None:
    async with Diagnostics("127.0.0.1:0", {}) as first:
        with pytest.raises(ConfigError, match=r"metrics\.listen: cannot listen on"):
            await Diagnostics(first.address, {}).__aenter__()


async def _always() -> bool:
    return True


# Traces


@pytest.fixture
def collector() -> Iterator[tuple[Collector, str]]:
    with collecting() as both:
        yield both


def large_model() -> FunctionModel:
    pixels, logits = TensorSpec("pixels", "FP32", (-1, 64)), TensorSpec("logits", "FP32", (-1, 10))

    async def answer(inputs: dict[str, Any]) -> dict[str, Any]:
        return {"logits": inputs["pixels"][:, :10]}

    return FunctionModel(ModelMetadata(MODEL, ("9",), "python", (pixels,), (logits,)), answer)


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


# Logs


@contextmanager
def logged(formatter: logging.Formatter, logger: str = "hedgerow") -> Iterator[io.StringIO]:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(formatter)
    logging.getLogger(logger).addHandler(handler)
    yield stream
    logging.getLogger(logger).removeHandler(handler)


class Crashing(FunctionBackend):
    """Fails where nobody expects it, so that its error is an internal one."""

    async def infer(self, *_: Any) -> InferResponse:
        raise ZeroDivisionError("unexpected")


@pytest.mark.parametrize("transport", transports.known())
async def test_the_line_of_an_internal_error_names_the_error_and_the_request(transport: str) -> None:
    request = models.request(model=MODEL)
    with logged(JsonFormatter()) as stream:
        async with Server(Crashing(large_model()), ServerSettings(port=0, transport=transport)) as server:
            with pytest.raises(HedgerowError, match="internal error") as caught:
                await ask(server, replace(request, id="of mine"))
    identity = re.search(r"internal error (\w+)", str(caught.value))
    assert identity is not None
    (line,) = [json.loads(line) for line in stream.getvalue().splitlines() if identity[1] in line]
    assert line["model"] == MODEL
    assert line["request_id"] == "of mine"
    assert "ZeroDivisionError: unexpected" in line["traceback"]
    assert line["level"] == "ERROR"
    assert line["error_id"] == identity[1]


def record(text: str, *arguments: object, **extra: object) -> logging.LogRecord:
    made = logging.LogRecord("hedgerow.test", logging.WARNING, __file__, 1, text, arguments, None)
    made.__dict__.update(extra)
    return made


@pytest.mark.parametrize(
    ("identity", "seen"), [("4711", "4711"), ("", r"~[0-9a-f]+"), ("x\n2026 INFO forged", r"x\\x0a2026 INFO forged")]
)
def test_a_line_names_the_request_that_it_concerns(identity: str, seen: str) -> None:
    token = REQUEST.set(replace(models.request(), id=identity, origin=Origin(traceparent="00-ab-cd-01")))
    try:
        text = LineFormatter().format(record("no room for %s", "it"))
        fields = json.loads(JsonFormatter().format(record("no room", **{ERROR_ID: "e1"})))
    finally:
        REQUEST.reset(token)
    assert re.fullmatch(rf"\S+ WARNING hedgerow.test no room for it \[digits {seen}\]", text.replace("\\", "\\"))
    assert fields["message"] == "no room"
    assert fields["traceparent"] == "00-ab-cd-01"
    assert fields["error_id"] == "e1"
    if identity:
        assert fields["request_id"] == identity


def test_without_a_request_a_line_is_as_it_was() -> None:
    assert LineFormatter().format(record("all is well")).endswith("WARNING hedgerow.test all is well")
    assert set(json.loads(JsonFormatter().format(record("all is well")))) == {"time", "level", "logger", "message"}


def test_the_same_line_over_and_over_is_left_out_and_counted_and_others_are_not() -> None:
    now = 0.0
    repeats = Repeats(lambda: now)
    passed = [repeats.filter(record("the disk is %s", "full")) for _ in range(REPEATS + 10)]
    assert passed == [True] * REPEATS + [False] * 10
    assert repeats.filter(record("the disk is %s", "slow"))
    now = REPEAT_WINDOW_S
    again = record("the disk is %s", "full")
    assert repeats.filter(again)
    assert again.getMessage() == f"the disk is full (and 10 times more in the last {REPEAT_WINDOW_S:.0f} s)"


def test_ever_new_lines_do_not_fill_the_memory() -> None:
    repeats = Repeats()
    for number in range(5000):
        assert repeats.filter(record("request %d", number))
    assert len(repeats._lines) <= 512
