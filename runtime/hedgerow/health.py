"""grpc.health.v1 over a question ("are you ready?"), and reflection, for any of our servers."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from typing import Final, cast

from google.protobuf import descriptor_pool
from google.protobuf.descriptor import FileDescriptor
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from google.protobuf.json_format import MessageToJson, Parse
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection, reflection_pb2

from hedgerow.errors import HedgerowError, NotFound
from hedgerow.rpc import Call, Method, methods, parse

WATCH_INTERVAL_S = 0.5
"""How often a watched status is looked at."""

SERVICE: Final = "grpc.health.v1.Health"
_Status = health_pb2.HealthCheckResponse
_POOL = descriptor_pool.Default()  # where grpcio-health-checking and grpcio-reflection keep theirs


class Health:
    """The health service: `ready` is asked each time, so that the answer cannot be out of date.

    It speaks for the whole server ("") and for each of `services`. The stock servicer keeps statuses that somebody must
    set, and its watchers forget each other.
    """

    def __init__(self, ready: Callable[[], Awaitable[bool]], services: Iterable[str]) -> None:
        self._ready = ready
        self._services = {"", SERVICE, *services}

    @property
    def methods(self) -> dict[str, Method]:
        """What to serve."""
        return methods(_POOL.FindServiceByName(SERVICE), {"Check": self.check, "Watch": self.watch})

    async def check(self, request: health_pb2.HealthCheckRequest, _: Call) -> _Status:
        """The status of one service now; NOT_FOUND for one that is not here."""
        if request.service not in self._services:
            raise NotFound(f"there is no service {request.service[:200]!r} here")
        return _Status(status=await self._status(request.service))

    async def watch(self, request: health_pb2.HealthCheckRequest, call: Call) -> None:
        """The status of one service, and again each time it has changed."""
        last = None
        while True:
            status = await self._status(request.service)
            if status != last:
                await call.write(_Status(status=status).SerializeToString())
                last = status
            await asyncio.sleep(WATCH_INTERVAL_S)

    async def _status(self, service: str) -> int:
        if service not in self._services:
            return _Status.SERVICE_UNKNOWN
        try:
            return _Status.SERVING if await self._ready() else _Status.NOT_SERVING
        except HedgerowError:
            return _Status.NOT_SERVING


def reflection_methods(services: Iterable[str], files: Iterable[FileDescriptor]) -> dict[str, Method]:
    """Server reflection of `services`, as `files` of any pool describe them (imports first), and of health.

    In both versions, which differ in nothing but the package's name: older tools know v1alpha only, newer ask v1 first.
    """
    alpha = _POOL.FindServiceByName(reflection.SERVICE_NAME)
    text = MessageToJson(FileDescriptorProto.FromString(alpha.file.serialized_pb))
    first = Parse(text.replace("v1alpha", "v1"), FileDescriptorProto())
    pool = descriptor_pool.DescriptorPool()
    for file in (*files, *(_POOL.FindServiceByName(name).file for name in (SERVICE, alpha.full_name))):
        pool.AddSerializedFile(file.serialized_pb)
    pool.Add(first)
    described = (alpha, pool.FindServiceByName(f"{first.package}.{alpha.name}"))
    names = (*services, SERVICE, *(service.full_name for service in described))
    servicer = reflection.aio.ReflectionServicer(names, pool)

    async def answer(raws: AsyncIterator[bytes], call: Call) -> None:
        requests = (parse(reflection_pb2.ServerReflectionRequest, raw) async for raw in raws)
        # The type stubs take the generator for a coroutine.
        responses = cast("AsyncIterator[Message]", servicer.ServerReflectionInfo(requests, None))
        async for response in responses:
            await call.write(response.SerializeToString())

    return {
        path: method
        for service in described
        for path, method in methods(service, {"ServerReflectionInfo": answer}).items()
    }
