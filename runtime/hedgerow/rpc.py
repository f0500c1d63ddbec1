"""What our gRPC services share: listening, parsing, and the error table in both directions.

Handlers take and return messages and raise the errors of `hedgerow.errors`; what callers see of an error is decided
here and nowhere else. Requests are parsed inside the handler, because grpc.aio answers UNKNOWN and logs a traceback
when a deserializer raises.
"""

import logging
import secrets
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final, TypeVar

import grpc
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass

from hedgerow import errors
from hedgerow.config import ServerSettings
from hedgerow.errors import ConfigError, EngineFault, HedgerowError, InvalidInput

MAX_DETAILS_CHARS = 512
"""Longest error message on the wire: with percent-encoding it must fit into 8 KiB of trailers. The log has it whole."""
PUSHBACK_KEY: Final = "grpc-retry-pushback-ms"

Context = grpc.aio.ServicerContext[bytes, bytes]
Handler = Callable[[Any, Context], Awaitable[Any]]
M = TypeVar("M", bound=Message)

log = logging.getLogger(__name__)

# What a caller makes of each status: the most general error that has it, or (NOT_FOUND) the one that OIP means.
_ERRORS: dict[grpc.StatusCode, type[HedgerowError]] = {
    error.status: error
    for error in (
        errors.InvalidInput,
        errors.ModelNotFound,
        errors.Unavailable,
        errors.Overloaded,
        errors.DeadlineExceeded,
        errors.Forbidden,
        errors.Unsupported,
    )
}


def parse(kind: type[M], raw: bytes) -> M:
    """The message of `kind` in `raw`; raises `InvalidInput` if it is none."""
    try:
        return kind.FromString(raw)
    except DecodeError as error:
        raise InvalidInput(f"the request is no valid {kind.DESCRIPTOR.full_name}") from error


def public(error: Exception, method: str) -> HedgerowError:
    """`error` as callers may see it: unexpected ones become an id that finds them in the log."""
    if not isinstance(error, HedgerowError):
        identity = secrets.token_hex(6)
        log.error("%s: internal error %s", method, identity, exc_info=error)
        return HedgerowError(f"internal error {identity}")
    if error.status is grpc.StatusCode.INTERNAL:
        log.error("%s: %s", method, error, exc_info=error)
    return error


def details(error: HedgerowError) -> str:
    """The message of `error`, short enough for the wire."""
    text = str(error)
    return text if len(text) <= MAX_DETAILS_CHARS else text[: MAX_DETAILS_CHARS - 1] + "…"


def received(error: grpc.RpcError) -> HedgerowError:
    """What a failed call (of either kind of channel) means, with the server's message and pushback."""
    assert isinstance(error, grpc.Call | grpc.aio.AioRpcError)
    status: grpc.StatusCode = error.code()
    pushback = str(dict(error.trailing_metadata() or ()).get(PUSHBACK_KEY, ""))
    # Anything but a plain number means "do not retry" to gRPC, and nothing to us.
    retry_after_s = int(pushback) / 1000 if pushback.isascii() and pushback.isdigit() else None
    return _ERRORS.get(status, HedgerowError)(error.details() or status.name, retry_after_s=retry_after_s)


def whole(answer: M | None, server: str) -> M:
    """The `answer` of a call; raises `EngineFault` for None, which grpc.aio gives for bytes that it cannot parse."""
    if answer is None:
        raise EngineFault(f"{server} answered with bytes that are no message of the protocol")
    return answer


def address(host: str, port: int) -> str:
    """Host and port, as gRPC wants them: "127.0.0.1:8001", "[::1]:8001"."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def listen(server: grpc.aio.Server, settings: ServerSettings) -> int:
    """Have `server` listen, in plain text, where `settings` say; the bound port. Raises `ConfigError`."""
    wanted = address(settings.host, settings.port)
    try:
        return server.add_insecure_port(wanted)
    except RuntimeError as error:
        raise ConfigError(f"server.host, server.port: cannot listen on {wanted}; is it taken?") from error


def generic_handler(service: ServiceDescriptor, handlers: Mapping[str, Handler]) -> grpc.GenericRpcHandler:
    """Serve `handlers`, by method name, as `service`.

    A handler is ``async (request, context)``. A unary one returns its answer; a streaming one writes serialised answers
    to the context; where requests stream, `request` is the iterator over their bytes, for `parse`.
    """
    return grpc.method_handlers_generic_handler(
        service.full_name,
        {name: _method_handler(service.methods_by_name[name], handle) for name, handle in handlers.items()},
    )


def _pushback(retry_after_s: float | None) -> tuple[tuple[str, str], ...]:
    if retry_after_s is None:
        return ()
    # At least 1: told 0, gRPC's clients (1.85) wait for the deadline instead of trying at once.
    return ((PUSHBACK_KEY, str(max(1, round(retry_after_s * 1000)))),)


def _method_handler(method: MethodDescriptor, handle: Handler) -> "grpc.RpcMethodHandler[bytes, bytes]":
    kind = GetMessageClass(method.input_type)

    async def answer(received: Any, context: Context) -> bytes | None:
        try:
            request = received if method.client_streaming else parse(kind, received)
            response = await handle(request, context)
            return None if response is None else response.SerializeToString()
        except grpc.aio.AbortError:
            raise
        except Exception as unknown:  # noqa: BLE001 (the border: `public` logs what must not cross it)
            error = public(unknown, method.name)
            await context.abort(error.status, details(error), _pushback(error.retry_after_s))

    if method.client_streaming:
        return grpc.stream_stream_rpc_method_handler(answer)
    if method.server_streaming:
        return grpc.unary_stream_rpc_method_handler(answer)
    return grpc.unary_unary_rpc_method_handler(answer)
