"""One connection to an OIP endpoint, from bytes to bytes: the only place that knows what speaks gRPC for us.

Whatever implements `Connection` raises the errors of `hedgerow.rpc.received`, whose messages name no addresses.
"""

import asyncio
import ssl
from collections.abc import AsyncGenerator, Callable, Coroutine
from functools import cache
from pathlib import Path
from typing import Any, Final, Protocol, TypeAlias, TypeVar

import grpc
from google.protobuf.message import DecodeError

from hedgerow import rpc
from hedgerow.errors import BackendUnavailable, ConfigError, EngineFault, HedgerowError, Unavailable
from hedgerow.http2.channel import CANNOT_CONNECT, GIVEN_UP, Channel
from hedgerow.proto import oip_pb2
from hedgerow.remote.proof import proof
from hedgerow.tensors import HOPS_KEY
from hedgerow.wire import Serialised, joined

SERVICE: Final = oip_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"].full_name
ADDRESSES = ("ipv4:", "ipv6:", "unix:", "DNS")
"""What marks the channel's own words, which name addresses, from the server's."""

Metadata = tuple[tuple[str, str], ...]
"""What goes with a call beside its message."""
FIRST_HOP: Final[Metadata] = ((HOPS_KEY, "1"),)
"""What goes with a call that begins here."""
Connectivity = grpc.ChannelConnectivity
T = TypeVar("T")
_Stream: TypeAlias = "grpc.aio.StreamStreamMultiCallable[bytes, bytes]"
_Unary: TypeAlias = "grpc.aio.UnaryUnaryMultiCallable[bytes, bytes]"


class Connection(Protocol):
    """A connection to one address. Belongs to one event loop; cancelling a call cancels the work at the other end."""

    @property
    def standing(self) -> bool:
        """Whether a call would go out at once. Asking also starts what is needed to get there."""
        ...

    async def ready(self) -> None:
        """Wait until it stands; raises `ConnectionError` if it cannot be had."""
        ...

    async def unary(self, method: str, request: Serialised, timeout_s: float, metadata: Metadata = ()) -> bytes:
        """The answer to one call of OIP's `method`."""
        ...

    def stream(
        self, method: str, request: Serialised, timeout_s: float, metadata: Metadata = ()
    ) -> AsyncGenerator[bytes, None]:
        """The answers to one request of a streaming `method`; closing the generator cancels the call."""
        ...

    async def close(self) -> None:
        """Close it; calls on it fail with `Unavailable`."""
        ...


class Connector:
    """Makes connections that differ in nothing but where they lead. Raises `ConfigError` for what it can't use.

    `ca_file` is the PEM file of the authority to trust; empty: in the clear. `cert_file` and `key_file` say who we are,
    to those who ask; `token` does with every call. Not `native`, it is by grpc.aio.
    """

    def __init__(
        self,
        *,
        ca_file: str,
        cert_file: str = "",
        key_file: str = "",
        token: str = "",
        connect_timeout_s: float,
        max_message_bytes: int,
        native: bool = True,
    ) -> None:
        if bool(cert_file) != bool(key_file) or (cert_file and not ca_file):
            raise ConfigError("cert_file, key_file: expected both or none, and with a ca_file")
        self._credentials: grpc.ChannelCredentials | None = None
        self._tls: ssl.SSLContext | None = None
        if ca_file:
            try:
                ours = [Path(file).read_bytes() for file in (key_file, cert_file) if file]
                self._credentials = grpc.ssl_channel_credentials(Path(ca_file).read_bytes(), *ours)
                self._tls = ssl.create_default_context(cafile=ca_file)
                if cert_file:
                    self._tls.load_cert_chain(cert_file, key_file)
            except OSError as error:  # of SSL too
                files = ", ".join(filter(None, (ca_file, cert_file, key_file)))
                raise ConfigError(f"ca_file, cert_file, key_file: cannot use {files}: {error.strerror}") from error
            self._tls.set_alpn_protocols(["h2"])
        self._proof = proof(token)
        self._native = native
        self._connect_timeout_s = connect_timeout_s
        self._max_message_bytes = max_message_bytes
        self._options: list[tuple[str, str | int]] = [
            ("grpc.max_receive_message_length", max_message_bytes),
            ("grpc.max_send_message_length", max_message_bytes),
            ("grpc.min_reconnect_backoff_ms", round(connect_timeout_s * 1000)),
            ("grpc.enable_retries", 0),  # retries are the caller's to budget
            ("grpc.use_local_subchannel_pool", 1),  # or a new channel would be given an old one's dead connection
        ]

    def connect(self, address: str, authority: str = "") -> Connection:
        """A connection to `address` ("host:port") that is about to be made.

        `authority` is the name that the endpoint's certificate and virtual host have, where `address` is a number.
        """
        if self._native:
            host, _, port = address.rpartition(":")
            channel = Channel(
                host.strip("[]"),
                int(port),
                authority=authority,
                tls=self._tls,
                connect_timeout_s=self._connect_timeout_s,
                max_message_bytes=self._max_message_bytes,
                metadata=self._proof,
            )
            return _NativeConnection(channel)
        options = list(self._options)
        if authority and self._credentials is not None:
            options.append(("grpc.ssl_target_name_override", authority))
        elif authority:
            options.append(("grpc.default_authority", authority))
        if self._credentials is None:
            return _GrpcConnection(grpc.aio.insecure_channel(address, options), self._proof)
        return _GrpcConnection(grpc.aio.secure_channel(address, self._credentials, options), self._proof)


def parsed(read: Callable[[bytes], T], raw: bytes, server: str) -> T:
    """What `read` makes of the bytes that `server` answered with; raises `EngineFault` if they are no such message."""
    try:
        return read(raw)
    except DecodeError:
        raise EngineFault(f"{server} answered with bytes that are no message of the protocol") from None


def meant(fault: HedgerowError) -> type[HedgerowError]:
    """What the `fault` that a server tells is to those who ask us; one that it has no name for is its engine's."""
    if isinstance(fault, Unavailable):
        return BackendUnavailable
    return EngineFault if type(fault) is HedgerowError else type(fault)


class _NativeConnection:
    """A channel of our own as a `Connection`."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self.ready, self.close = channel.ready, channel.close

    @property
    def standing(self) -> bool:
        return self._channel.standing

    def unary(
        self, method: str, request: Serialised, timeout_s: float, metadata: Metadata = ()
    ) -> Coroutine[Any, Any, bytes]:
        return self._channel.unary(_path(method), request, timeout_s, metadata)

    def stream(
        self, method: str, request: Serialised, timeout_s: float, metadata: Metadata = ()
    ) -> AsyncGenerator[bytes, None]:
        return self._channel.stream(_path(method), request, timeout_s, metadata)


@cache
def _path(method: str) -> str:
    return f"/{SERVICE}/{method}"


class _GrpcConnection:
    """A grpc.aio channel as a `Connection`; `always` goes with every call."""

    def __init__(self, channel: grpc.aio.Channel, always: Metadata) -> None:
        self._channel = channel
        self._always = always
        self._calls: dict[str, _Unary] = {}

    @property
    def standing(self) -> bool:
        return self._channel.get_state(try_to_connect=True) is Connectivity.READY

    async def ready(self) -> None:
        try:
            while (state := self._channel.get_state(try_to_connect=True)) is not Connectivity.READY:
                if state in {Connectivity.TRANSIENT_FAILURE, Connectivity.SHUTDOWN}:
                    raise ConnectionError(CANNOT_CONNECT)
                await self._channel.wait_for_state_change(state)
        except grpc.aio.UsageError:  # closed while we waited
            raise ConnectionError(GIVEN_UP) from None

    async def unary(self, method: str, request: Serialised, timeout_s: float, metadata: Metadata = ()) -> bytes:
        call = self._calls.get(method)
        if call is None:
            call = self._calls[method] = self._channel.unary_unary(_path(method))
        try:
            return await call(joined(request), timeout=timeout_s, metadata=self._always + metadata)
        except grpc.aio.AioRpcError as error:
            raise _received(error) from error
        except grpc.aio.UsageError:
            raise Unavailable(GIVEN_UP) from None
        except asyncio.CancelledError:
            _reraise_if_ours()
            raise Unavailable(GIVEN_UP) from None

    async def stream(
        self, method: str, request: Serialised, timeout_s: float, metadata: Metadata = ()
    ) -> AsyncGenerator[bytes, None]:
        start: _Stream = self._channel.stream_stream(_path(method))
        call = start(iter([joined(request)]), timeout=timeout_s, metadata=self._always + metadata)
        try:
            async for answer in call:
                yield answer
        except grpc.aio.AioRpcError as error:
            raise _received(error) from error
        except asyncio.CancelledError:
            _reraise_if_ours()
            raise Unavailable(GIVEN_UP) from None
        finally:
            call.cancel()

    async def close(self) -> None:
        await self._channel.close()


def _received(error: grpc.aio.AioRpcError) -> HedgerowError:
    fault = rpc.received(error)
    if any(mark in str(fault) for mark in ADDRESSES):
        return type(fault)(CANNOT_CONNECT, retry_after_s=fault.retry_after_s)
    return fault


def _reraise_if_ours() -> None:
    """Let a cancellation pass that somebody asked for; a closed channel cancels its calls as well."""
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise  # noqa: PLE0704 (called while it is being handled)
