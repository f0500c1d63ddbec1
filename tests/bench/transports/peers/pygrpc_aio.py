"""pygrpc-native's stand-in for grpc.aio as a transport: the handlers of `hedgerow.transports.grpcio`, unchanged."""

# mypy: disable-error-code="import-not-found"

from collections import defaultdict
from typing import Any

import pygrpc_native.aio

from hedgerow import rpc
from hedgerow.config import ServerSettings
from hedgerow.rpc import Methods
from hedgerow.transports.grpcio import GrpcioListener, _handler


async def listen(methods: Methods, settings: ServerSettings) -> GrpcioListener:
    """See `hedgerow.transports.Transport`."""
    server = pygrpc_native.aio.server(
        options=[
            ("grpc.max_receive_message_length", settings.max_message_bytes),
            ("grpc.max_send_message_length", settings.max_message_bytes),
            ("grpc.keepalive_time_ms", round(settings.keepalive_s * 1000)),
            ("grpc.keepalive_timeout_ms", round(settings.keepalive_s * 1000)),
            ("grpc.keepalive_permit_without_calls", 1),
        ]
    )
    services: dict[str, dict[str, Any]] = defaultdict(dict)
    for path, method in methods.items():
        _, service, name = path.split("/")
        services[service][name] = _handler(method)
    for service, handlers in services.items():
        server.add_registered_method_handlers(service, handlers)
    port = server.add_insecure_port(rpc.address(settings.host, settings.port))
    await server.start()
    return GrpcioListener(server, port)
