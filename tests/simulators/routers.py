"""A router over a real edge host and a real cloud, and what its tests ask of it."""

import asyncio
import contextlib
from contextlib import AsyncExitStack

from simulators import models
from simulators.cloud import MODEL

from hedgerow.backend import Deadline
from hedgerow.errors import Unavailable
from hedgerow.gate import Gate
from hedgerow.host.model_host import ModelHost
from hedgerow.journey import Route
from hedgerow.parameters import REASON
from hedgerow.remote.backend import RemoteBackend, RemoteSettings
from hedgerow.router import Router
from hedgerow.tensors import InferRequest, InferResponse

GATE = Gate(threshold=0.8)
SURE, UNSURE = 8.0, 1.0
"""Strength of the pixels: the edge's confidence is above 0.99, or about 0.23."""
REMOTE = RemoteSettings(
    connect_timeout_s=0.5, probe_timeout_s=0.5, probe_min_s=0.02, probe_max_s=0.1, heartbeat_s=0.2, timeout_s=5
)
SOON_S = 10.0


async def routed(
    stack: AsyncExitStack, host: ModelHost, target: str | None, *, gate: Gate | None = GATE, **route: object
) -> tuple[Router, RemoteBackend | None]:
    """A router over `host` and the remote at `target`; one without a cloud for None."""
    remote = None
    if target is not None:
        remote = await stack.enter_async_context(RemoteBackend("cloud", target, REMOTE))
    router = Router({"digits": Route(model="digits", edge=host, cloud=remote, cloud_model=MODEL, **route)})  # type: ignore[arg-type] # a test's shorthand
    router.set_gate("digits", "1", gate, None)
    return router, remote


async def heard(remote: RemoteBackend | None) -> None:
    """Return when the remote's metadata is at hand: a request waits for it no longer than its deadline allows."""
    assert remote is not None
    async with asyncio.timeout(SOON_S):
        while True:
            with contextlib.suppress(Unavailable):
                await remote.metadata(MODEL)
                return


def ask(digit: int = 3, strength: float = UNSURE, **parameters: str) -> InferRequest:
    return models.request(models.pixels(digit, strength=strength), **parameters)


async def infer(router: Router, request: InferRequest, seconds: float = SOON_S) -> InferResponse:
    response = await router.infer(request, Deadline.after(seconds))
    assert isinstance(response.parameters[REASON], str)
    assert response.parameters[REASON]
    return response
