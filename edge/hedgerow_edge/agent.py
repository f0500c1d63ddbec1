"""The device's daemon: ``hedgerow-edge --config FILE``. The composition root: who is made of what, and in which order.

::

    Server ── Router ─┬─ ModelHost ── engines                       answers requests
                      └─ RemoteBackend ── the cloud
    Link ─┬─ Exchange ─┬─ Trust, Transfer ── Updates ── Installer   brings releases to the host
          │            └─ Uploader ── Collector                     brings samples to the fleet
          └─ Presence                                               says how the device fares
    Diagnostics ── Metrics                                          says so to whoever watches on the spot

Serving depends on nothing else: it starts before the link is tried and ends after what was in flight. Whatever happens
to the link, the disk or the clock is said once and leaves it alone.
"""

import argparse
import asyncio
import logging
import secrets
import sys
from collections.abc import Sequence
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from hedgerow import __version__, lifecycle, policies, profiles
from hedgerow.backend import Backend
from hedgerow.config import load
from hedgerow.durable import write_durably
from hedgerow.errors import ConfigError, HedgerowError
from hedgerow.host.model_host import ModelHost
from hedgerow.host.settings import ModelFile
from hedgerow.journey import Route
from hedgerow.link import Link, Topics, checked_id
from hedgerow.remote.backend import RemoteBackend
from hedgerow.router import Router, RouteSettings
from hedgerow.server import Server
from hedgerow.telemetry import metrics
from hedgerow.telemetry.diagnostics import Page, health, watched
from hedgerow.telemetry.logs import configure_logging
from hedgerow.traffic.tenants import identify
from hedgerow_edge.exchange import Exchange
from hedgerow_edge.front import Front
from hedgerow_edge.installer import Installer
from hedgerow_edge.metrics import DeviceMetrics
from hedgerow_edge.pointers import follow
from hedgerow_edge.presence import Presence
from hedgerow_edge.samples import Collector, Uploader
from hedgerow_edge.settings import AgentSettings, StaticModel
from hedgerow_edge.store import Store
from hedgerow_edge.transfer import Transfer
from hedgerow_edge.trust import Trust
from hedgerow_edge.updates import Updates

if TYPE_CHECKING:
    from hedgerow.telemetry.tracing import Tracing

ADDRESS_FILE = "address"
"""In the state folder: where the agent serves, host:port, for whoever let it choose a port."""
METRICS_FILE = "metrics-address"
"""The same of its metrics; empty while there are none."""

_log = logging.getLogger(__name__)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the daemon until SIGTERM; the process's exit code (2: a setting is wrong)."""
    parser = argparse.ArgumentParser(prog="hedgerow-edge", description="Hedgerow's agent on an edge device.")
    parser.add_argument("--config", type=Path, help="TOML file with the settings; HEDGEROW_… variables win over it")
    parser.add_argument("--version", action="version", version=__version__)
    file: Path | None = parser.parse_args(arguments).config
    base = file.absolute().parent if file else Path.cwd()

    async def run(stop: asyncio.Event) -> None:
        await serve(load(AgentSettings, file), base, stop)

    return lifecycle.run(run)


async def serve(settings: AgentSettings, base: Path, stop: asyncio.Event) -> None:
    """Be the device that `settings` describe until `stop` is set. Relative paths begin at `base`."""
    configure_logging(settings.log.level, form=settings.log.format)
    async with AsyncExitStack() as stack:
        roots = settings.roots(base) if settings.linked else None
        store = Store(settings.state(base))
        stack.callback(store.close)
        device = checked_id(store.device_id(settings.device.id, f"edge-{secrets.token_hex(4)}"), "device")
        profile = profiles.choose(settings.device.profile)
        _log.info("this is %s of fleet %s, profile %s", device, settings.device.fleet, profile.name)
        host = ModelHost(settings.host)
        stack.push_async_callback(host.close)
        if settings.cloud.forward_tenant and (settings.tenants is None or settings.tenants.identify_by is None):
            raise ConfigError("cloud.forward_tenant: needs tenants.identify_by, or callers are whoever they say")
        cloud: RemoteBackend | None = None
        targets = settings.cloud.targets or settings.cloud.target
        if targets:
            cloud = await stack.enter_async_context(RemoteBackend("cloud", targets, settings.cloud))

        tracing = None
        if settings.tracing.endpoint:
            from hedgerow.telemetry.tracing import Tracing

            tracing = Tracing(settings.tracing, instance=device)
            stack.push_async_callback(tracing.close)
        router, front = Router({}, name="hedgerow-edge"), Front(settings, host)
        presence = Presence(store, Topics(settings.device.fleet), device, profile.name)

        def admit(model: str) -> None:
            router.add_route(_route(model, settings.routes.get(model), front.edge, cloud, tracing))

        installer = Installer(
            store,
            host,
            router,
            settings.updates,
            profile=profile.name,
            engines=profile.usable_engines(),
            admit=admit,
            on_change=presence.changed,
        )
        for model in {*settings.routes, *settings.models}:
            admit(model)
        for model, static in settings.models.items():
            await _load(model, static, base, host, router)
        await installer.recover(settings.models)

        served = front.before(router)
        server = Server(
            served if tracing is None else tracing.around(served, "route"),
            settings.server,
            control=host if settings.server.model_control else None,
            name="hedgerow-edge",
            batches=host.counts,
            identify=identify(settings.tenants, settings.server),
            shared_memory=settings.shared_memory,
            around=None if tracing is None else tracing.methods,
        )
        device_metrics = DeviceMetrics(installer, store)
        runtime_metrics = metrics.Metrics(
            partial(metrics.of_server, server),
            partial(metrics.of_router, router),
            lambda: metrics.of_host(host, router.routes),
            partial(metrics.of_remotes, () if cloud is None else (cloud,)),
            front.metrics,
            device_metrics,
        )

        async def page(accept: str) -> Page:
            await device_metrics.look()
            return Page(*runtime_metrics.page(accept))

        pages = {"/metrics": page, **health(server.service.ready)}
        _note(store.folder / METRICS_FILE, await watched(stack, settings.metrics.listen, pages))
        await stack.enter_async_context(server)
        lifecycle.settle()
        _say_address(store.folder, server.address)
        if roots is None:
            await lifecycle.supervise(stop, front=front.run())
            return

        link = Link(settings.link, f"hedgerow-{device}", will=presence.will)
        exchange = Exchange(link, presence.topics, device, lambda: presence.session)
        trust = Trust(store.folder / "trust", device, exchange, store, *roots)
        transfer = Transfer(store.folder / "transfer", exchange)
        updates = Updates(
            installer, store, trust, transfer, settings.updates, reserved=settings.models, on_change=presence.changed
        )
        presence.attach(link, server.address, updates.report)
        follow(link, presence.topics, device, updates.check)
        collector = Collector(store, settings.samples)
        router.observe(collector.observe)
        uploader = Uploader(store, exchange, link, settings.samples, collector.kept)
        async with asyncio.TaskGroup() as group:  # the link outlives what uses it, so that the goodbye is heard
            connection = group.create_task(link.run(), name="link")
            try:
                await lifecycle.supervise(
                    stop,
                    updates=updates.run(link),
                    presence=presence.run(),
                    collector=collector.run(),
                    uploader=uploader.run(),
                    front=front.run(),
                )
            finally:
                await installer.stop()
                await server.stop()
                await presence.goodbye()
                connection.cancel()


def _route(
    model: str, settings: RouteSettings | None, host: Backend, cloud: Backend | None, tracing: "Tracing | None"
) -> Route:
    settings = settings or RouteSettings()
    try:
        policy = policies.load(settings.policy)
    except ConfigError as error:
        raise ConfigError(f"routes.{model}.policy: {error}") from error
    if tracing is not None:
        host = tracing.around(host, "edge")
        cloud = cloud and tracing.around(cloud, "cloud", remote=True)
    return Route(
        model=model,
        edge=host,
        cloud=cloud,
        cloud_model=settings.cloud_model,
        policy=policy,
        require_cloud=settings.require_cloud,
    )


async def _load(model: str, static: StaticModel, base: Path, host: ModelHost, router: Router) -> None:
    """Serve a model file from the settings; one that cannot be served is an error in them."""
    file = ModelFile(
        model,
        static.version,
        base / static.path,
        engine=static.engine,
        precision=static.precision,
        pinned=static.pinned,
    )
    try:
        router.set_gate(model, static.version, static.gate, None)
        await host.load_file(file)
    except HedgerowError as error:
        raise ConfigError(f"models.{model}: {error}") from error
    outputs = [spec.name for spec in (await host.metadata(model)).outputs]
    if static.gate is not None and static.gate.output not in outputs:
        raise ConfigError(
            f"models.{model}.gate.output: the model has no output {static.gate.output!r}; it has {', '.join(outputs)}"
        )


def _note(file: Path, address: str) -> None:
    try:
        write_durably(file, f"{address}\n".encode())
    except OSError as error:
        _log.warning("the address cannot be written to the state folder: %s", error.strerror)


def _say_address(folder: Path, address: str) -> None:
    _note(folder / ADDRESS_FILE, address)
    sys.stdout.write(f"serving OIP on {address}\n")
    sys.stdout.flush()
