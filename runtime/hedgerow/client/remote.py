"""Clients of any OIP server, over gRPC."""

import asyncio
import math
import ssl
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import aclosing, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, Final, TypedDict, Unpack

import grpc
from google.protobuf.message import Message

from hedgerow.backend import Deadline
from hedgerow.client.drivers import Awaiting, Blocking, Item, StreamTerms
from hedgerow.client.flow import SERVER, Flow
from hedgerow.client.interface import DEFAULT_TIMEOUT_S, Outcome
from hedgerow.client.loop_thread import CLOSED
from hedgerow.client.plans import Ask, Describe, IsReady, Plans, message
from hedgerow.client.retries import MAX_ATTEMPTS
from hedgerow.errors import ConfigError, HedgerowError
from hedgerow.oip.messages import response_from_bytes
from hedgerow.oip.model_metadata import metadata_from_proto
from hedgerow.proto import oip_pb2
from hedgerow.remote.connection import SERVICE, parsed
from hedgerow.remote.proof import proof, warn_of_eavesdroppers
from hedgerow.rpc import received
from hedgerow.tensors import TENANT_KEY, Origin

MAX_MESSAGE_BYTES = 2**31 - 1
KEEPALIVE_S = 310
"""Silence, with calls in flight, after which the server is asked whether it is there. Stock gRPC servers hang up on
clients that ask more often than every 300 s."""
KEEPALIVE_TIMEOUT_S = 20

_Metadata = tuple[tuple[str, str], ...]


class ConnectionOptions(TypedDict, total=False):
    """How to reach a server: keyword arguments, all of them optional. In the clear unless something speaks of TLS.

    ======================  ============================================================================================
    `timeout_s`             seconds for a call that says nothing else
    `attempts`              how often a call may be tried; 1: never again
    `ca_file`               PEM file of the authority that the server's certificate comes from
    `cert_file`             PEM file with a certificate of our own, for servers that ask for one
    `key_file`              its key
    `credentials`           gRPC's own, in place of files
    `token`                 a secret by which the server knows us, sent as ``authorization: Bearer``; take TLS with it
    `max_message_bytes`     largest message, either way
    ======================  ============================================================================================
    """

    timeout_s: float
    attempts: int
    ca_file: str | Path
    cert_file: str | Path
    key_file: str | Path
    credentials: grpc.ChannelCredentials
    token: str
    max_message_bytes: int


class Client(Blocking):
    """A connection to one OIP server. Raises `ConfigError` for files that it can't use."""

    def __init__(self, target: str, **options: Unpack[ConnectionOptions]) -> None:
        super().__init__(_plans(options))
        credentials, arguments, self._proof = _reached(target, options)
        self._channel = (
            grpc.secure_channel(target, credentials, arguments)
            if credentials
            else grpc.insecure_channel(target, arguments)
        )
        self._methods: dict[str, grpc.UnaryUnaryMultiCallable[bytes, bytes]] = {
            name: self._channel.unary_unary(f"/{SERVICE}/{name}") for name in _UNARY
        }
        self._streams: grpc.StreamStreamMultiCallable[bytes, bytes] = self._channel.stream_stream(_STREAMS)

    def close(self) -> None:
        """See `InferenceClient`."""
        self._channel.close()

    def _take(self, step: Ask | Describe | IsReady, deadline: Deadline) -> Any:
        name, request, metadata = _call(step, self._proof)
        try:
            raw = self._methods[name](request.SerializeToString(), timeout=deadline.remaining, metadata=metadata)
        except grpc.RpcError as error:
            raise received(error) from error
        except ValueError:
            raise HedgerowError(CLOSED) from None
        return _given(step, raw)

    @contextmanager
    def _stream(self, items: Iterator[Item], terms: StreamTerms) -> Iterator[Iterator[Outcome]]:
        room, left = threading.Semaphore(terms.read_ahead), threading.Event()
        flow = Flow(terms.failed, room.release)

        def requests() -> Iterator[bytes]:
            try:
                while room.acquire() and not left.is_set():
                    item = next(items, None)
                    if item is None:
                        return
                    yield flow.sent(item)
            except Exception as error:  # noqa: BLE001 (the caller's own, which is raised where they see it)
                flow.broken = error

        def outcomes() -> Iterator[Outcome]:
            try:
                for raw in call:
                    if (outcome := flow.heard(raw)) is not None:
                        yield outcome
            except grpc.RpcError as error:
                raise received(error) from error
            if flow.broken is not None:
                raise flow.broken

        try:
            call = self._streams(requests(), timeout=_timeout_s(terms), metadata=_metadata(terms.origin, self._proof))
        except ValueError:
            raise HedgerowError(CLOSED) from None
        try:
            yield outcomes()
        finally:
            left.set()
            room.release()
            call.cancel()


class AsyncClient(Awaiting):
    """`Client` for asyncio, to be made in the event loop that uses it."""

    def __init__(self, target: str, **options: Unpack[ConnectionOptions]) -> None:
        super().__init__(_plans(options))
        credentials, arguments, self._proof = _reached(target, options)
        self._channel = (
            grpc.aio.secure_channel(target, credentials, arguments)
            if credentials
            else grpc.aio.insecure_channel(target, arguments)
        )
        self._methods: dict[str, grpc.aio.UnaryUnaryMultiCallable[bytes, bytes]] = {
            name: self._channel.unary_unary(f"/{SERVICE}/{name}") for name in _UNARY
        }
        self._streams: grpc.aio.StreamStreamMultiCallable[bytes, bytes] = self._channel.stream_stream(_STREAMS)

    async def close(self) -> None:
        """See `InferenceClient`."""
        await self._channel.close()

    async def _take(self, step: Ask | Describe | IsReady, deadline: Deadline) -> Any:
        name, request, metadata = _call(step, self._proof)
        try:
            raw = await self._methods[name](request.SerializeToString(), timeout=deadline.remaining, metadata=metadata)
        except grpc.aio.AioRpcError as error:
            raise received(error) from error
        except grpc.aio.UsageError:
            raise HedgerowError(CLOSED) from None
        except asyncio.CancelledError:
            _reraise_if_ours()
            raise HedgerowError(CLOSED) from None
        return _given(step, raw)

    @asynccontextmanager
    async def _stream(
        self, items: AsyncGenerator[Item, None], terms: StreamTerms
    ) -> AsyncIterator[AsyncIterator[Outcome]]:
        room = asyncio.Semaphore(terms.read_ahead)
        flow = Flow(terms.failed, room.release)

        async def requests() -> AsyncGenerator[bytes, None]:
            try:
                async with aclosing(items):
                    await room.acquire()
                    async for item in items:
                        yield flow.sent(item)
                        await room.acquire()
            except Exception as error:  # noqa: BLE001 (the caller's own, which is raised where they see it)
                flow.broken = error

        async def outcomes() -> AsyncGenerator[Outcome, None]:
            try:
                # Not `async for`: left early, its generator and the call would keep each other and the connection.
                while isinstance(raw := await call.read(), bytes):
                    if (outcome := flow.heard(raw)) is not None:
                        yield outcome
            except grpc.aio.AioRpcError as error:
                raise received(error) from error
            except asyncio.CancelledError:
                _reraise_if_ours()
                raise HedgerowError(CLOSED) from None
            if flow.broken is not None:
                raise flow.broken

        try:
            call = self._streams(requests(), timeout=_timeout_s(terms), metadata=_metadata(terms.origin, self._proof))
        except grpc.aio.UsageError:
            raise HedgerowError(CLOSED) from None
        try:
            async with aclosing(outcomes()) as answers:
                yield answers
        finally:
            call.cancel()


_UNARY: Final = ("ModelInfer", "ModelMetadata", "ModelReady", "ServerReady")
_STREAMS: Final = f"/{SERVICE}/ModelStreamInfer"


def _plans(options: ConnectionOptions) -> Plans:
    return Plans(options.get("timeout_s", DEFAULT_TIMEOUT_S), options.get("attempts", MAX_ATTEMPTS))


def _reached(
    target: str, options: ConnectionOptions
) -> tuple[grpc.ChannelCredentials | None, list[tuple[str, Any]], _Metadata]:
    """A channel's credentials and arguments, and what goes with every call on it."""
    credentials, said = _credentials(options), proof(options.get("token", ""))
    if said and credentials is None:
        warn_of_eavesdroppers(target)
    return credentials, _arguments(options), said


def _arguments(options: ConnectionOptions) -> list[tuple[str, Any]]:
    max_message_bytes = options.get("max_message_bytes", MAX_MESSAGE_BYTES)
    return [
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.max_send_message_length", max_message_bytes),
        ("grpc.enable_retries", 0),  # see hedgerow.client.retries
        ("grpc.keepalive_time_ms", KEEPALIVE_S * 1000),
        ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_S * 1000),
    ]


def _credentials(options: ConnectionOptions) -> grpc.ChannelCredentials | None:
    ca_file, cert_file, key_file = options.get("ca_file"), options.get("cert_file"), options.get("key_file")
    if not (ca_file or cert_file or key_file):
        return options.get("credentials")
    if "credentials" in options:
        raise ConfigError("credentials: expected those, or ca_file, cert_file and key_file; got both")
    if bool(cert_file) != bool(key_file):
        raise ConfigError("cert_file, key_file: expected both or neither")
    authority = None if ca_file is None else _read("ca_file", ca_file)
    certificate = None if cert_file is None else _read("cert_file", cert_file)
    key = None if key_file is None else _read("key_file", key_file)
    # gRPC itself would say no more of a file that holds nonsense than that the server cannot be reached.
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        if ca_file:
            context.load_verify_locations(ca_file)
    except ssl.SSLError as error:
        raise ConfigError(f"ca_file: {ca_file} is no certificate in PEM") from error
    try:
        if cert_file:
            context.load_cert_chain(cert_file, key_file)
    except ssl.SSLError as error:
        raise ConfigError(f"cert_file, key_file: {cert_file} and {key_file} are no certificate and its key") from error
    return grpc.ssl_channel_credentials(authority, key, certificate)


def _read(name: str, file: str | Path) -> bytes:
    try:
        return Path(file).read_bytes()
    except OSError as error:
        raise ConfigError(f"{name}: cannot read {file}: {error.strerror}") from error


def _call(step: Ask | Describe | IsReady, proof: _Metadata) -> tuple[str, Message, _Metadata]:
    """The method, the message, and what goes with it."""
    match step:
        case Ask():
            return "ModelInfer", message(step), _metadata(step.request.origin, proof)
        case Describe(model, version):
            return "ModelMetadata", oip_pb2.ModelMetadataRequest(name=model, version=version), proof
        case IsReady("", _):
            return "ServerReady", oip_pb2.ServerReadyRequest(), proof
        case IsReady(model, version):
            return "ModelReady", oip_pb2.ModelReadyRequest(name=model, version=version), proof


def _given(step: Ask | Describe | IsReady, raw: bytes) -> Any:
    match step:
        case Ask():
            return parsed(response_from_bytes, raw, SERVER)
        case Describe():
            return metadata_from_proto(parsed(oip_pb2.ModelMetadataResponse.FromString, raw, SERVER))
        case IsReady("", _):
            return parsed(oip_pb2.ServerReadyResponse.FromString, raw, SERVER).ready
        case IsReady():
            return parsed(oip_pb2.ModelReadyResponse.FromString, raw, SERVER).ready


def _metadata(origin: Origin, proof: _Metadata) -> _Metadata:
    pairs = ((TENANT_KEY, origin.tenant), ("traceparent", origin.traceparent), *proof)
    return tuple(pair for pair in pairs if pair[1])


def _timeout_s(terms: StreamTerms) -> float | None:
    return None if math.isinf(terms.deadline.at) else terms.deadline.remaining


def _reraise_if_ours() -> None:
    """Let a cancellation pass that somebody asked for; a closed channel cancels its calls as well."""
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise  # noqa: PLE0704 (called while it is being handled)
