"""grpc.aio as a transport: the reference, which every other one is measured against."""

import asyncio
import math
from collections.abc import AsyncIterator
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import grpc

from hedgerow import rpc
from hedgerow.backend import Deadline
from hedgerow.config import ServerSettings
from hedgerow.errors import ConfigError, DeadlineExceeded, HedgerowError
from hedgerow.identity import certificate_name
from hedgerow.rpc import Method, Methods
from hedgerow.wire import joined

MIN_PING_INTERVAL_MS = 1000
"""How often clients may ask whether we are there; gRPC's own limit is five minutes."""
_COMPRESSIONS: Final = {
    "": grpc.Compression.NoCompression,
    "gzip": grpc.Compression.Gzip,
    "deflate": grpc.Compression.Deflate,
}
_Context = grpc.aio.ServicerContext[bytes, bytes]


async def listen(methods: Methods, settings: ServerSettings) -> "GrpcioListener":
    """See `Transport`."""
    server = grpc.aio.server(
        options=[
            ("grpc.max_receive_message_length", settings.max_message_bytes),
            ("grpc.max_send_message_length", settings.max_message_bytes),
            ("grpc.so_reuseport", int(settings.reuse_port)),  # or a second server would take half of them unnoticed
            ("grpc.keepalive_time_ms", round(settings.keepalive_s * 1000)),
            ("grpc.keepalive_timeout_ms", round(settings.keepalive_s * 1000)),
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.http2.min_ping_interval_without_data_ms", MIN_PING_INTERVAL_MS),
        ],
        compression=_COMPRESSIONS[settings.compression],
        maximum_concurrent_rpcs=settings.max_calls,
    )
    server.add_generic_rpc_handlers((_Handlers(methods),))
    wanted = rpc.address(settings.host, settings.port)
    credentials = _credentials(settings)
    try:
        port = server.add_secure_port(wanted, credentials) if credentials else server.add_insecure_port(wanted)
    except RuntimeError as error:
        raise ConfigError(f"server.host, server.port: cannot listen on {wanted}; is it taken?") from error
    await server.start()
    return GrpcioListener(server, port)


class GrpcioListener:
    """See `Listener`."""

    def __init__(self, server: grpc.aio.Server, port: int) -> None:
        self._server = server
        self.port = port

    async def stop(self, grace_s: float) -> None:
        """See `Listener`."""
        await self._server.stop(grace_s)


def _credentials(settings: ServerSettings) -> grpc.ServerCredentials | None:
    if not settings.tls_cert_file:
        return None
    try:
        key, chain = Path(settings.tls_key_file).read_bytes(), Path(settings.tls_cert_file).read_bytes()
        authority = Path(settings.tls_client_ca_file).read_bytes() if settings.tls_client_ca_file else None
    except OSError as error:
        raise ConfigError(f"server.tls_…_file: cannot read {error.filename}: {error.strerror}") from error
    return grpc.ssl_server_credentials([(key, chain)], authority, require_client_auth=authority is not None)


class _Handlers(grpc.GenericRpcHandler):
    def __init__(self, methods: Methods) -> None:
        self._handlers = {path: _handler(method) for path, method in methods.items()}

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> "grpc.RpcMethodHandler[bytes, bytes] | None":
        return self._handlers.get(handler_call_details.method)


class _Call:
    """See `rpc.Call`."""

    def __init__(self, context: _Context) -> None:
        remaining_s: float | None = context.time_remaining()
        self.deadline = Deadline.never() if remaining_s is None else Deadline.after(remaining_s)
        self.write = context.write
        self._context = context

    @cached_property
    def metadata(self) -> dict[str, str]:
        return {key: value for key, value in self._context.invocation_metadata() or () if isinstance(value, str)}

    @property
    def peer(self) -> str:
        known = self._context.auth_context()
        uris, dns, common = (
            [name.decode(errors="replace") for name in known.get(key, ())]
            for key in ("peer_uri", "peer_dns", "x509_common_name")
        )
        return certificate_name(uris, dns, common)


def _handler(method: Method) -> "grpc.RpcMethodHandler[bytes, bytes]":
    async def answer(received: bytes | AsyncIterator[bytes], context: _Context) -> bytes | None:
        call = _Call(context)
        at = None if math.isinf(call.deadline.at) else call.deadline.at
        try:
            try:
                async with asyncio.timeout_at(at):
                    answer = await method.answer(received, call)
                    return None if answer is None else joined(answer)
            except TimeoutError as timeout:
                raise DeadlineExceeded(f"the deadline passed while {method.name} was being answered") from timeout
        except HedgerowError as error:
            await context.abort(error.status, rpc.details(error), rpc.trailers(error))

    kinds: dict[tuple[bool, bool], Any] = {
        (False, False): grpc.unary_unary_rpc_method_handler,
        (False, True): grpc.unary_stream_rpc_method_handler,
        (True, True): grpc.stream_stream_rpc_method_handler,
        # One answer at the end, written like those of a stream.
        (True, False): grpc.stream_stream_rpc_method_handler,
    }
    handler: grpc.RpcMethodHandler[bytes, bytes] = kinds[method.client_streaming, method.server_streaming](answer)
    return handler
