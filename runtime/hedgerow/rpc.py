"""What our gRPC services share, whatever transport brings their calls: methods, parsing, the error table both ways.

Handlers take and return messages and raise the errors of `hedgerow.errors`; what callers see of an error is decided
here and nowhere else. A service is a table of `Method` by path; `hedgerow.transports` serve such tables.
"""

import logging
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Container, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Protocol, TypeVar

import grpc
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass

from hedgerow import errors
from hedgerow.backend import Deadline
from hedgerow.errors import EngineFault, HedgerowError, InvalidInput
from hedgerow.telemetry.logs import ERROR_ID
from hedgerow.wire import Serialised

MAX_DETAILS_CHARS = 512
"""Longest error message on the wire: with percent-encoding it must fit into 8 KiB of trailers. The log has it whole."""
PUSHBACK_KEY: Final = "grpc-retry-pushback-ms"


class Call(Protocol):
    """One call on the server's side, as its handler sees it. Cancelled when the caller leaves or its time is up."""

    @property
    def metadata(self) -> Mapping[str, str]:
        """What the caller sent beside the message, by lower-case name; the last of equal names, no binary ones."""
        ...

    @property
    def deadline(self) -> Deadline:
        """Until when the caller waits."""
        ...

    @property
    def peer(self) -> str:
        """The name in the caller's certificate, which was verified (`hedgerow.identity`); empty: it has none."""
        ...

    async def write(self, message: bytes) -> None:
        """Send one of several answers; returns when there is room for the next."""
        ...


Handler = Callable[[Any, Any], Awaitable[Any]]
"""``async (request, call)``. A unary one returns its answer, as a message or serialised; a streaming one writes
serialised answers to the call; where requests stream, `request` is the iterator over their bytes, for `parse`."""
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
        errors.Unauthenticated,
        errors.Unsupported,
    )
}


@dataclass(frozen=True, slots=True)
class Method:
    """One method of a service, from bytes to bytes."""

    name: str
    handle: Handler
    request: type[Message] | None
    """What requests are parsed as; None where the handler does that itself."""
    client_streaming: bool
    server_streaming: bool
    shed: bool = field(default=False, kw_only=True)
    """Whether calls may be refused unseen where a server has too much to do. Questions after its health may not: who
    asks has little patience, and takes it for dead."""

    async def answer(self, received: bytes | AsyncIterator[bytes], call: Call) -> Serialised | None:
        """The serialised answer, None after a stream of them. Raises nothing but `HedgerowError`, fit for callers.

        Requests are parsed in here, not by the transport, so that garbage is INVALID_ARGUMENT on each of them.
        """
        try:
            request: Any = received
            if self.request is not None and isinstance(received, bytes):
                request = parse(self.request, received)
            response = await self.handle(request, call)
            return response.SerializeToString() if isinstance(response, Message) else response
        except HedgerowError as error:  # the border: `public` logs what must not cross it
            public(error, self.name)
            raise  # not "from" itself: each refused call would be a cycle for the garbage collector to find
        except Exception as unknown:
            raise public(unknown, self.name) from unknown


Methods = Mapping[str, Method]
"""By path: "/package.Service/Method"."""


def methods(
    service: ServiceDescriptor,
    handlers: Mapping[str, Handler],
    *,
    unparsed: Container[str] = (),
    shed: Container[str] = (),
) -> dict[str, Method]:
    """`handlers`, by method name, as `service` describes them; those of `unparsed` take their requests as bytes.

    Calls of those of `shed` may be refused unseen where there is too much to do.
    """

    def method(name: str, handle: Handler) -> Method:
        described: MethodDescriptor = service.methods_by_name[name]
        kind = None if name in unparsed else GetMessageClass(described.input_type)
        return Method(name, handle, kind, described.client_streaming, described.server_streaming, shed=name in shed)

    return {f"/{service.full_name}/{name}": method(name, handle) for name, handle in handlers.items()}


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
        log.error("%s: internal error %s", method, identity, exc_info=error, extra={ERROR_ID: identity})
        return HedgerowError(f"internal error {identity}")
    if error.status is grpc.StatusCode.INTERNAL:
        log.error("%s: %s", method, error, exc_info=error)
    return error


def details(error: HedgerowError) -> str:
    """The message of `error`, short enough for the wire."""
    text = str(error)
    return text if len(text) <= MAX_DETAILS_CHARS else text[: MAX_DETAILS_CHARS - 1] + "…"


def trailers(error: HedgerowError) -> tuple[tuple[str, str], ...]:
    """The metadata that goes with `error`: gRPC's retry pushback, where it is known when to come back."""
    if error.retry_after_s is None:
        return ()
    # At least 1: told 0, gRPC's clients (1.85) wait for the deadline instead of trying at once.
    return ((PUSHBACK_KEY, str(max(1, round(error.retry_after_s * 1000)))),)


def received(error: grpc.RpcError) -> HedgerowError:
    """What a failed call (of either kind of channel) means, with the server's message and pushback."""
    assert isinstance(error, grpc.Call | grpc.aio.AioRpcError)
    pushback = str(dict(error.trailing_metadata() or ()).get(PUSHBACK_KEY, ""))
    return failed(error.code(), error.details() or "", pushback)


def failed(status: grpc.StatusCode, text: str, pushback: str = "") -> HedgerowError:
    """What a call means that ended with `status`, `text` and the trailer `pushback`."""
    # Anything but a plain number means "do not retry" to gRPC, and nothing to us.
    retry_after_s = int(pushback) / 1000 if pushback.isascii() and pushback.isdigit() else None
    return _ERRORS.get(status, HedgerowError)(text or status.name, retry_after_s=retry_after_s)


def whole(answer: M | None, server: str) -> M:
    """The `answer` of a call; raises `EngineFault` for None, which grpc.aio gives for bytes that it cannot parse."""
    if answer is None:
        raise EngineFault(f"{server} answered with bytes that are no message of the protocol")
    return answer


def address(host: str, port: int) -> str:
    """Host and port, as gRPC wants them: "127.0.0.1:8001", "[::1]:8001"."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
