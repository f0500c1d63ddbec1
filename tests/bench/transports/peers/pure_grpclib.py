"""grpclib, gRPC in plain Python over python-hyper's h2, as a transport."""

# mypy: disable-error-code="import-not-found, misc"

import asyncio
from typing import Any

from grpclib.config import Configuration
from grpclib.const import Cardinality, Handler, Status
from grpclib.encoding.base import CodecBase
from grpclib.exceptions import GRPCError
from grpclib.server import Server

from hedgerow import rpc
from hedgerow.backend import Deadline
from hedgerow.config import ServerSettings
from hedgerow.errors import HedgerowError
from hedgerow.rpc import Method, Methods
from hedgerow.wire import joined

CARDINALITIES = {
    (False, False): Cardinality.UNARY_UNARY,
    (False, True): Cardinality.UNARY_STREAM,
    (True, False): Cardinality.STREAM_UNARY,
    (True, True): Cardinality.STREAM_STREAM,
}


async def listen(methods: Methods, settings: ServerSettings) -> "GrpclibListener":
    """See `hedgerow.transports.Transport`."""
    keepalive = Configuration(
        _keepalive_time=settings.keepalive_s,
        _keepalive_timeout=settings.keepalive_s,
        _keepalive_permit_without_calls=True,
        _http2_max_pings_without_data=0,
    )
    server = Server([_Methods(methods)], codec=_Bytes(), config=keepalive)
    await server.start(settings.host, settings.port)
    return GrpclibListener(server)


class GrpclibListener:
    """See `hedgerow.transports.Listener`."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self.port: int = server._server.sockets[0].getsockname()[1]

    async def stop(self, grace_s: float) -> None:
        """See `Listener`."""
        self._server.close()  # which waits for nothing: it cancels what is in flight
        await asyncio.wait_for(self._server.wait_closed(), grace_s or None)


class _Bytes(CodecBase):
    __content_subtype__ = "proto"

    def encode(self, message: bytes, message_type: Any) -> bytes:
        return message

    def decode(self, data: bytes, message_type: Any) -> bytes:
        return data


class _Methods:
    def __init__(self, methods: Methods) -> None:
        self._methods = methods

    def __mapping__(self) -> dict[str, Any]:
        return {
            path: Handler(
                _handler(method), CARDINALITIES[method.client_streaming, method.server_streaming], bytes, bytes
            )
            for path, method in self._methods.items()
        }


class _Call:
    """See `rpc.Call`."""

    def __init__(self, stream: Any) -> None:
        self.deadline = Deadline.after(stream.deadline.time_remaining()) if stream.deadline else Deadline.never()
        self.metadata: dict[str, str] = {k: v for k, v in stream.metadata.items() if isinstance(v, str)}
        self.write = stream.send_message
        self.peer = ""


def _handler(method: Method) -> Any:
    async def answer(stream: Any) -> None:
        received = stream if method.client_streaming else await stream.recv_message()
        if received is None:
            raise GRPCError(Status.INTERNAL, "the call ended before its message")
        try:
            response = await method.answer(received, _Call(stream))
        except HedgerowError as error:
            await stream.send_trailing_metadata(
                status=Status(error.status.value[0]),
                status_message=rpc.details(error),
                metadata=dict(rpc.trailers(error)),
            )
        else:
            if response is not None:
                await stream.send_message(joined(response))

    return answer
