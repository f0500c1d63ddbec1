"""One process that speaks OIP before the models on Ray Serve: alone, or one of several that share a port.

``python -m hedgerow_cloud.serving.front`` is one of several: a `hedgerow.processes.worker`, told what to do by
`endpoint`.
"""

import asyncio
import os
import platform
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from typing import Final, Self

import msgspec

from hedgerow.backend import Backend
from hedgerow.processes import worker
from hedgerow.processes.line import Report
from hedgerow.server import Server
from hedgerow.telemetry.logs import configure_logging
from hedgerow.telemetry.metrics import Metrics, of_remotes, of_server
from hedgerow.telemetry.traffic import of_quotas
from hedgerow.traffic.quotas import Quotas
from hedgerow.traffic.tenants import identify
from hedgerow_cloud.cluster import joined_ray
from hedgerow_cloud.serving.backend import RayServeBackend
from hedgerow_cloud.serving.deployment import handle
from hedgerow_cloud.serving.settings import ServeSettings

COMMAND: Final = (sys.executable, "-m", "hedgerow_cloud.serving.front")


class Told(msgspec.Struct, frozen=True):
    """What one of several is told."""

    settings: ServeSettings
    ray: str
    """Where the Ray is that has the models."""
    log_level: str


class Front:
    """The server, with what watches it: a `hedgerow.processes.worker.Front`. Leaving ``async with`` drains it."""

    def __init__(self, backend: RayServeBackend, settings: ServeSettings) -> None:
        self._end = AsyncExitStack()
        served: Backend = backend
        quotas = None
        if settings.tenants is not None:
            served = quotas = Quotas(served, settings.tenants)
        around = None
        if settings.tracing.endpoint:
            from hedgerow.telemetry.tracing import Tracing

            tracing = Tracing(settings.tracing, instance=f"{platform.node()}-{os.getpid()}")
            self._end.push_async_callback(tracing.close)
            served, around = tracing.around(served, "serve", remote=True), tracing.methods
        self.server = Server(
            served,
            settings.server,
            name="hedgerow-cloud",
            around=around,
            identify=identify(settings.tenants, settings.server),
        )
        self._end.push_async_callback(self.server.stop)
        self.metrics = Metrics(
            partial(of_server, self.server), partial(of_remotes, (backend,)), partial(of_quotas, quotas)
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._end.aclose()

    async def start(self) -> None:
        """Listen; raises `ConfigError` if the address cannot be had."""
        await self.server.start()

    async def report(self) -> Report:
        """How it fares."""
        return Report(await self.server.service.ready(), self.metrics.page()[0])


@asynccontextmanager
async def serving(told: bytes) -> AsyncIterator[Front]:
    """See `worker.Serving`."""
    what = msgspec.msgpack.decode(told, type=Told)
    configure_logging(what.log_level)
    with joined_ray(what.ray):
        backend = RayServeBackend(await handle())
        await backend.connect()
        async with Front(backend, what.settings) as front, asyncio.TaskGroup() as group:
            watch = group.create_task(backend.watch())
            try:
                yield front
            finally:
                watch.cancel()


if __name__ == "__main__":
    sys.exit(worker.run(serving))
