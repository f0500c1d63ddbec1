"""The endpoint for large models: Ray Serve with the models, and one or several processes before it that speak OIP.

Each replica is a process of Ray Serve with a `ModelHost` in it; `RayServeBackend` is the way there, so what callers
meet is the same `Server` as on a device, with the same statuses.

Several processes are for thousands of devices: carrying calls and pickling them for Ray keeps one Python process busy
long before the models are. They share a port (`hedgerow.processes`); this one then only looks after them, and gathers
what they have counted.
"""

import asyncio
import logging
from contextlib import AsyncExitStack
from pathlib import Path

import msgspec

from hedgerow import rpc
from hedgerow.lifecycle import supervise
from hedgerow.processes.pages import SupervisedMetrics
from hedgerow.processes.port import SHARED, held
from hedgerow.processes.supervisor import Supervisor
from hedgerow.telemetry.diagnostics import Page, health, watched
from hedgerow.traffic.tenants import identify
from hedgerow_cloud.cluster import local_ray, ray_address
from hedgerow_cloud.serving.deployment import deployed
from hedgerow_cloud.serving.front import COMMAND, Front, Told
from hedgerow_cloud.serving.settings import ServeSettings

log = logging.getLogger(__name__)


async def serve(settings: ServeSettings, base: Path, stop: asyncio.Event) -> None:
    """Serve the models of `settings` until `stop` is set. Relative paths begin at `base`.

    Raises `ConfigError` naming a file that is not there.
    """
    settings = settings.located(base)
    identify(settings.tenants, settings.server)  # raises now, not when the models are loaded
    if settings.processes > 1 and not SHARED:
        log.info("ports cannot be shared between processes on this system: one serves")
    if settings.fronts == 1:
        await _alone(settings, stop)
    else:
        await _several(settings, stop)


async def _alone(settings: ServeSettings, stop: asyncio.Event) -> None:
    with local_ray():
        async with deployed(settings) as backend, AsyncExitStack() as stack:
            front = Front(backend, settings)

            async def page(accept: str) -> Page:
                return Page(*front.metrics.page(accept))

            await watched(stack, settings.metrics.listen, {"/metrics": page, **health(front.server.service.ready)})
            await stack.enter_async_context(front)
            await front.start()
            log.info("serving %s on %s", ", ".join(settings.models), front.server.address)
            await supervise(stop, watch=backend.watch())
            log.info("stopping")


async def _several(settings: ServeSettings, stop: asyncio.Event) -> None:
    with held(settings.server.host, settings.server.port) as port, local_ray():
        async with deployed(settings), AsyncExitStack() as stack:
            server = msgspec.structs.replace(settings.server, port=port, reuse_port=True)
            level = logging.getLevelName(log.getEffectiveLevel())
            told = Told(msgspec.structs.replace(settings, server=server), ray_address(), level)
            supervisor = Supervisor(
                COMMAND, msgspec.msgpack.encode(told), settings.fronts, server.drain_s, settings.supervisor
            )
            pages = SupervisedMetrics(supervisor)
            await watched(stack, settings.metrics.listen, {"/metrics": pages.metrics, **health(pages.ready)})

            async def say() -> None:
                await supervisor.serving.wait()
                where = rpc.address(server.host, port)
                log.info("serving %s on %s, by %d processes", ", ".join(settings.models), where, settings.fronts)

            await supervise(stop, processes=supervisor.run(), say=say())
            log.info("stopped")
