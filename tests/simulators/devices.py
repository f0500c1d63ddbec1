"""A device as the agent puts it together, in the process of the test; what is asked of it, and watched."""

import asyncio
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import grpc
from prometheus_client.parser import text_string_to_metric_families
from simulators import models
from simulators.cloud import MODEL

from hedgerow.config import ServerSettings
from hedgerow.function import FunctionModel
from hedgerow.gate import Gate
from hedgerow.host.model_host import ModelHost
from hedgerow.host.settings import ModelFile
from hedgerow.journey import Route
from hedgerow.oip.messages import request_to_proto, response_from_proto
from hedgerow.oip.service import SERVICE
from hedgerow.proto import oip_pb2
from hedgerow.remote.backend import RemoteBackend, RemoteSettings
from hedgerow.router import Router
from hedgerow.rpc import received
from hedgerow.server import Server
from hedgerow.telemetry import metrics
from hedgerow.telemetry.diagnostics import Diagnostics, Page, health
from hedgerow.telemetry.tracing import Tracing
from hedgerow.tensors import InferRequest, InferResponse, ModelMetadata, TensorSpec

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


def large_model() -> FunctionModel:
    pixels, logits = TensorSpec("pixels", "FP32", (-1, 64)), TensorSpec("logits", "FP32", (-1, 10))

    async def answer(inputs: dict[str, Any]) -> dict[str, Any]:
        return {"logits": inputs["pixels"][:, :10]}

    return FunctionModel(ModelMetadata(MODEL, ("9",), "python", (pixels,), (logits,)), answer)
