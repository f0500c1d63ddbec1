"""The way to the cloud swallows packets, all or some, or takes seconds: over real networks of the kernel's."""

import asyncio
from contextlib import AsyncExitStack
from pathlib import Path

import msgspec
import pytest
from msgspec.structs import replace
from simulators import cloud as clouds
from simulators import lines, models
from simulators.cloud import Cloud
from simulators.lines import Line
from simulators.places import until

from hedgerow.backend import Deadline
from hedgerow.config import ServerSettings
from hedgerow.errors import DeadlineExceeded, HedgerowError
from hedgerow.function import FunctionBackend
from hedgerow.gate import Gate
from hedgerow.host.model_host import ModelHost
from hedgerow.host.settings import HostSettings, ModelFile
from hedgerow.journey import Route
from hedgerow.parameters import DEGRADED, REASON, TIER
from hedgerow.remote.backend import RemoteBackend, RemoteSettings, Target
from hedgerow.router import Router
from hedgerow.server import Server
from hedgerow.tensors import InferResponse
from hedgerow.transports import native

NEVER_S = 600.0
DEADLINE_S = 3.0
SETTINGS = msgspec.structs.replace(clouds.SETTINGS, connect_timeout_s=1.0, probe_timeout_s=1.0)
PATIENT = msgspec.structs.replace(SETTINGS, connect_timeout_s=clouds.LONG_S, probe_timeout_s=clouds.LONG_S)
REQUEST = models.request(models.pixels(3))
IN_CLOUD = replace(REQUEST, model=clouds.MODEL)


@pytest.fixture(scope="module", autouse=True)
def networks() -> None:
    if reason := lines.missing():
        pytest.skip(reason)


async def behind(stack: AsyncExitStack) -> tuple[Line, Cloud]:
    """A line, and a cloud at its other end."""
    line = stack.enter_context(Line())
    cloud = Cloud(host=line.address)
    with line.far():
        await stack.enter_async_context(cloud)
    return line, cloud


async def routed(
    stack: AsyncExitStack, folder: Path, target: str, settings: RemoteSettings = SETTINGS
) -> tuple[Router, RemoteBackend]:
    """A router whose gate lets nothing pass, and its remote, which knows the model there already."""
    host = ModelHost(HostSettings(workers=1))
    stack.push_async_callback(host.close)
    await host.load_file(ModelFile("digits", "1", models.classifier(folder / "1.onnx"), precision="fp32"))
    remote = await stack.enter_async_context(RemoteBackend("cloud", target, settings))
    router = Router({"digits": Route(model="digits", edge=host, cloud=remote, cloud_model=clouds.MODEL)})
    router.set_gate("digits", "1", Gate(threshold=1.1), None)
    async with asyncio.timeout(clouds.LONG_S):
        while await tier(router) != "cloud":
            pass
    return router, remote


async def ask(router: Router, seconds: float = clouds.LONG_S) -> InferResponse:
    response = await router.infer(REQUEST, Deadline.after(seconds))
    assert response.output("logits").argmax() == 3
    return response


async def tier(router: Router) -> object:
    return (await ask(router)).parameters[TIER]


async def test_a_cloud_that_vanishes_mid_request_costs_a_better_answer_and_no_more(
    stack: AsyncExitStack, tmp_path: Path
) -> None:
    line, cloud = await behind(stack)
    router, remote = await routed(stack, tmp_path, cloud.target)
    cloud.asking.clear()
    cloud.delay_s = NEVER_S
    async with asyncio.TaskGroup() as group:
        asking = group.create_task(ask(router, DEADLINE_S))
        await cloud.asking.wait()
        line.loss = 1.0
    assert asking.result().parameters[DEGRADED] is True
    (endpoint,) = remote._pool.endpoints
    await until(lambda: endpoint.open)
    for _ in range(20):
        later = await ask(router, NEVER_S)
        assert later.parameters[DEGRADED] is True
        assert "circuit open" in str(later.parameters[REASON]), "or it waited"
    line.loss, cloud.delay_s = 0.0, 0.0
    await until(lambda: not endpoint.open)
    assert await tier(router) == "cloud"


async def test_connections_that_hang_in_a_hole_do_not_pile_up(stack: AsyncExitStack, tmp_path: Path) -> None:
    line, cloud = await behind(stack)
    router, remote = await routed(stack, tmp_path, cloud.target)
    (endpoint,) = remote._pool.endpoints
    for _ in range(2):
        line.loss = 1.0
        await until(lambda: endpoint.open)
        assert (await ask(router)).parameters[DEGRADED] is True
        line.loss = 0.0
        await until(lambda: not endpoint.open)
        assert await tier(router) == "cloud"
        await until(lambda: line.connections() == 1)


async def test_one_of_two_in_a_hole_costs_a_few_requests_where_nobody_else_looks(stack: AsyncExitStack) -> None:
    (hole, near), (_, far) = await behind(stack), await behind(stack)
    targets = [Target(address=near.target, zone="near"), Target(address=far.target)]
    settings = msgspec.structs.replace(SETTINGS, timeout_s=2.0, heartbeat_s=NEVER_S)
    remote = await stack.enter_async_context(RemoteBackend("cloud", targets, settings))
    for _ in range(20):
        await remote.infer(IN_CLOUD, Deadline.after(clouds.LONG_S))
    assert near.asked == 20
    hole.loss = 1.0
    lost = 0
    for _ in range(20):
        try:
            await remote.infer(IN_CLOUD, Deadline.after(clouds.LONG_S))
        except HedgerowError:
            lost += 1
    hole.loss = 0.0
    assert far.asked == 20 - lost
    assert lost <= settings.failures_to_open


async def test_one_of_two_in_a_hole_costs_nobody_an_answer_where_requests_are_hedged(stack: AsyncExitStack) -> None:
    (hole, near), (_, far) = await behind(stack), await behind(stack)
    targets = [Target(address=near.target, zone="near"), Target(address=far.target)]
    settings = msgspec.structs.replace(SETTINGS, hedge_after_quantile=0.9, hedge_share=1.0)
    remote = await stack.enter_async_context(RemoteBackend("cloud", targets, settings))
    for _ in range(20):
        await remote.infer(IN_CLOUD, Deadline.after(clouds.LONG_S))
    hole.loss = 1.0
    for _ in range(20):
        await remote.infer(IN_CLOUD, Deadline.after(clouds.LONG_S))
    await until(lambda: remote._pool.endpoints[0].open)


async def test_silence_is_noticed_at_both_ends_though_nobody_asks_anything(
    stack: AsyncExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "HANDSHAKE_S", 3.0)  # it is when a server looks after a connection first
    line = stack.enter_context(Line())
    backend = FunctionBackend(name="cloud")
    server = Server(backend, ServerSettings(host=line.address, port=0, drain_s=0.001, keepalive_s=0.5))
    with line.far():
        await stack.enter_async_context(server)
    listener = server.listener
    assert isinstance(listener, native.NativeListener)
    remote = await stack.enter_async_context(RemoteBackend("cloud", server.address, SETTINGS))
    await until(lambda: listener.connections)
    line.loss = 1.0
    await until(lambda: remote._pool.endpoints[0].open)
    await until(lambda: not listener.connections)
    line.loss = 0.0
    await until(lambda: not remote._pool.endpoints[0].open)


async def test_a_way_of_seconds_is_slow_and_not_down(stack: AsyncExitStack, tmp_path: Path) -> None:
    line, cloud = await behind(stack)
    line.delay_s = 1.0
    router, remote = await routed(stack, tmp_path, cloud.target, PATIENT)
    response = await ask(router, 0.5)
    assert response.parameters[DEGRADED] is True
    with pytest.raises(DeadlineExceeded):
        await remote.infer(IN_CLOUD, Deadline.after(0.5))
    assert remote.snapshot(clouds.MODEL).healthy
    assert await tier(router) == "cloud"


async def test_a_lossy_way_costs_time_and_no_answers(stack: AsyncExitStack, tmp_path: Path) -> None:
    line, cloud = await behind(stack)
    router, remote = await routed(stack, tmp_path, cloud.target, PATIENT)
    line.loss = 0.3
    async with asyncio.TaskGroup() as group:
        for _ in range(20):
            group.create_task(ask(router, DEADLINE_S))
    line.loss = 0.0
    await until(lambda: remote.snapshot(clouds.MODEL).healthy)
    assert await tier(router) == "cloud"
