"""gRPC's own server on threads, as a transport for comparison: each thread answers on an event loop of its own."""

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc

from hedgerow import rpc
from hedgerow.backend import Deadline
from hedgerow.config import ServerSettings
from hedgerow.errors import DeadlineExceeded, HedgerowError
from hedgerow.rpc import Method, Methods
from hedgerow.wire import joined

THREADS = 40
"""More than calls in flight, so that none waits for a thread."""


async def listen(methods: Methods, settings: ServerSettings) -> "SyncListener":
    """See `hedgerow.transports.Transport`."""
    return SyncListener(methods, settings)


class SyncListener:
    """See `hedgerow.transports.Listener`."""

    def __init__(self, methods: Methods, settings: ServerSettings) -> None:
        options = [
            ("grpc.max_receive_message_length", settings.max_message_bytes),
            ("grpc.max_send_message_length", settings.max_message_bytes),
        ]
        self._server = grpc.server(ThreadPoolExecutor(THREADS), options=options)
        self._server.add_generic_rpc_handlers((_Handlers(methods),))
        self.port = self._server.add_insecure_port(rpc.address(settings.host, settings.port))
        self._server.start()

    async def stop(self, grace_s: float) -> None:
        """See `Listener`."""
        await asyncio.to_thread(self._server.stop(grace_s).wait)


class _Handlers(grpc.GenericRpcHandler):
    def __init__(self, methods: Methods) -> None:
        self._handlers = {path: _handler(method) for path, method in methods.items() if not method.client_streaming}

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> "grpc.RpcMethodHandler[bytes, bytes] | None":
        return self._handlers.get(handler_call_details.method)


class _Call:
    """See `rpc.Call`, but that answers are written once all are there."""

    def __init__(self, context: grpc.ServicerContext) -> None:
        remaining_s: float | None = context.time_remaining()
        self.deadline = Deadline.never() if remaining_s is None else Deadline.after(remaining_s)
        self.written: list[bytes] = []
        self.peer = ""
        self._context = context

    @property
    def metadata(self) -> dict[str, str]:
        return {key: value for key, value in self._context.invocation_metadata() if isinstance(value, str)}

    async def write(self, message: bytes) -> None:
        self.written.append(message)


_local = threading.local()


def _handler(method: Method) -> "grpc.RpcMethodHandler[bytes, bytes]":
    def answers(received: bytes, context: grpc.ServicerContext) -> list[bytes]:
        runner = getattr(_local, "runner", None)
        if runner is None:
            runner = _local.runner = asyncio.Runner()
        call = _Call(context)
        try:
            answer = runner.get_loop().run_until_complete(_in_time(method, received, call))
        except HedgerowError as error:
            context.set_trailing_metadata(rpc.trailers(error))
            context.abort(error.status, rpc.details(error))
        return [*call.written, *([] if answer is None else [answer])]

    def unary(received: bytes, context: grpc.ServicerContext) -> bytes:
        return answers(received, context)[0]

    def stream(received: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
        yield from answers(received, context)

    handler: Any = (
        grpc.unary_stream_rpc_method_handler(stream)
        if method.server_streaming
        else grpc.unary_unary_rpc_method_handler(unary)
    )
    return handler  # type: ignore[no-any-return]


async def _in_time(method: Method, received: bytes, call: _Call) -> bytes | None:
    try:
        async with asyncio.timeout(call.deadline.remaining):
            answer = await method.answer(received, call)
            return None if answer is None else joined(answer)
    except TimeoutError as timeout:
        raise DeadlineExceeded(f"the deadline passed while {method.name} was being answered") from timeout
