"""A remote with endpoints that a test decides about, and what is asked of it."""

from contextlib import AsyncExitStack
from typing import Any

import msgspec
from msgspec.structs import replace
from simulators import models
from simulators.cloud import LONG_S, MODEL, SETTINGS, Cloud

from hedgerow.backend import Deadline
from hedgerow.proto import oip_pb2
from hedgerow.remote.backend import RemoteBackend, Target
from hedgerow.tensors import InferRequest, InferResponse

REQUEST = replace(models.request(models.pixels(3)), model=MODEL)
ANSWER = oip_pb2.ModelInferResponse(model_name=MODEL, model_version="7")


async def reached(
    stack: AsyncExitStack, *targets: str | Target, resolve: Any = None, **changed: object
) -> RemoteBackend:
    """A remote with `targets`, and `SETTINGS` but for what is `changed`."""
    settings = msgspec.structs.replace(SETTINGS, **changed)
    more = {"resolve": resolve} if resolve else {}
    return await stack.enter_async_context(RemoteBackend("cloud", targets, settings, **more))


async def near_and_far(stack: AsyncExitStack, **changed: object) -> tuple[Cloud, Cloud, RemoteBackend]:
    """Two clouds, and a remote that asks the first while it is well."""
    near, far = await stack.enter_async_context(Cloud()), await stack.enter_async_context(Cloud())
    targets = (Target(address=near.target, zone="near"), Target(address=far.target, zone="far"))
    return near, far, await reached(stack, *targets, **changed)


async def ask(remote: RemoteBackend, request: InferRequest = REQUEST, seconds: float = LONG_S) -> None:
    response = await remote.infer(request, Deadline.after(seconds))
    assert response.output("logits").argmax() == 3


async def streamed(remote: RemoteBackend, request: InferRequest = REQUEST) -> list[InferResponse]:
    return [one async for one in remote.stream(request, Deadline.after(LONG_S))]
