"""The models on Ray Serve, for as long as somebody serves them."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from typing import Any, Final

import msgspec

from hedgerow.errors import HedgerowError
from hedgerow_cloud.serving.backend import RayServeBackend
from hedgerow_cloud.serving.replica import Replica
from hedgerow_cloud.serving.settings import ServeSettings

MAX_ONGOING: Final = 256
"""Requests in one replica, waiting ones included; its host refuses more than it wants itself."""
MAX_QUEUED: Final = 64
"""Requests that wait on this side for a replica to take them."""
START_ATTEMPTS: Final = 1
HEALTH_CHECK_S: Final = 1.0
SHUTDOWN_POLL_S: Final = 0.2
APP: Final = "hedgerow"


@contextlib.asynccontextmanager
async def deployed(settings: ServeSettings) -> AsyncIterator[RayServeBackend]:
    """The models of `settings` on Ray Serve, in the Ray that runs, for the length of an ``async with``."""
    ray_serve = _ray_serve()
    application = ray_serve.deployment(
        name="models",
        num_replicas=settings.replicas,
        max_ongoing_requests=MAX_ONGOING,
        max_queued_requests=MAX_QUEUED,
        max_constructor_retry_count=START_ATTEMPTS,
        health_check_period_s=HEALTH_CHECK_S,
        graceful_shutdown_timeout_s=settings.server.drain_s,
        graceful_shutdown_wait_loop_s=SHUTDOWN_POLL_S,
        user_config={
            "models": settings.models,
            "host": msgspec.to_builtins(settings.host),
            "tracing": msgspec.to_builtins(settings.tracing),
        },
    )(Replica).bind()
    ray_serve.start(proxy_location="Disabled")
    try:
        try:
            way = await asyncio.to_thread(ray_serve.run, application, name=APP, route_prefix=None)
        except RuntimeError as error:
            reason = await asyncio.to_thread(_reason, error)
            raise HedgerowError(f"the models do not start on Ray Serve: {reason}") from error
        backend = RayServeBackend(way)
        await backend.connect()
        yield backend
    finally:
        await asyncio.to_thread(ray_serve.shutdown)


async def handle() -> Any:
    """The way to the models that another process has deployed, in the Ray that this one has joined."""
    return await asyncio.to_thread(_ray_serve().get_app_handle, APP)


def _ray_serve() -> Any:
    """Ray Serve, quiet: what matters of it, we say ourselves."""
    from ray import serve as ray_serve

    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    return ray_serve


def _reason(error: Exception) -> str:
    """Why a deployment failed: the last line of the replica's traceback, which Serve keeps in its status."""
    from ray import serve as ray_serve

    statuses = ray_serve.status().applications.values()
    told = [deployment.message for status in statuses for deployment in status.deployments.values()]
    lines = "\n".join([str(error), *told]).strip().splitlines()
    return lines[-1] if lines else type(error).__name__
