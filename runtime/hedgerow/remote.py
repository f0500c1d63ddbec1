"""A remote OIP endpoint as a backend: any server that speaks the protocol, over one gRPC channel.

What the wire can do to a caller is bounded here: connecting, a call, retries, and a remote that is down, which costs
one request a moment and the others nothing (`hedgerow.breaker`). `run` watches over the connection: it connects early,
notices silence, closes the breaker when the remote is back, and keeps metadata fresh.
"""

import asyncio
import logging
import math
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Annotated, Self, TypeVar

import grpc
import msgspec
from google.protobuf.message import Message

from hedgerow import rpc
from hedgerow.backend import Deadline, ModelState, Snapshot
from hedgerow.breaker import Breaker, RetryBudget
from hedgerow.config import Count, Seconds, Settings, Share
from hedgerow.connection import Connection, Stub, connect, credentials_from, in_words
from hedgerow.errors import (
    BackendUnavailable,
    DeadlineExceeded,
    EngineFault,
    HedgerowError,
    ModelNotFound,
    Unavailable,
)
from hedgerow.latency import LatencyWindow
from hedgerow.lifecycle import InFlight
from hedgerow.proto import oip_pb2
from hedgerow.tensors import (
    InferRequest,
    InferResponse,
    ModelMetadata,
    metadata_from_proto,
    request_to_proto,
    response_from_proto,
)

MAX_KNOWN_MODELS = 64
"""Models whose metadata is kept."""

M = TypeVar("M", bound=Message)
T = TypeVar("T")

log = logging.getLogger(__name__)


class RemoteSettings(Settings, frozen=True, kw_only=True):
    """How a remote endpoint is reached and when it is given up."""

    ca_file: str = ""
    """PEM file of the authority that signed the endpoint's certificate; empty: no TLS."""
    timeout_s: Seconds = 10.0
    """The longest one call may take, whatever the caller's deadline allows."""
    connect_timeout_s: Seconds = 1.0
    failures_to_open: Count = 3
    """Failures in a row that open the breaker; a refused connection opens it at once."""
    probe_timeout_s: Seconds = 2.0
    probe_min_s: Seconds = 0.2
    """First pause between probes while the breaker is open; each is twice the one before, up to `probe_max_s`."""
    probe_max_s: Seconds = 5.0
    heartbeat_s: Seconds = 20.0
    """How often the remote is asked while all is well, its metadata with it."""
    retry_share: Share = 0.2
    """Retries, as a share of the requests."""
    retry_burst: Annotated[int, msgspec.Meta(ge=0)] = 3
    retry_pause_s: Seconds = 0.025
    """Longest pause before a retry, unless the remote asks for another."""
    max_message_bytes: Count = 2**31 - 1


class RemoteBackend:
    """The endpoint at `target` ("host:port") as a `Backend`. Belongs to one event loop.

    Either enter it, or give `run()` to a TaskGroup and `close` at the end; unwatched, an open breaker stays open.
    """

    def __init__(self, name: str, target: str, settings: RemoteSettings | None = None) -> None:
        self.settings = settings or RemoteSettings()
        self._name = name
        self._target = target
        self._credentials = credentials_from(self.settings.ca_file)
        self._connection: Connection | None = None
        self._breaker = Breaker(self.settings.failures_to_open)
        self._opened_at = 0.0
        self._opened = asyncio.Event()
        self._retries = RetryBudget(self.settings.retry_share, self.settings.retry_burst)
        self._latency = LatencyWindow()
        self._inflight = InFlight()
        # Models that were asked for, with when they were last heard of; the watcher keeps them fresh.
        self._known: dict[tuple[str, str], tuple[float, ModelMetadata | None]] = {}
        self._watch: asyncio.TaskGroup | None = None
        self._watcher: asyncio.Task[None] | None = None

    @property
    def name(self) -> str:
        """See `Backend`."""
        return self._name

    async def __aenter__(self) -> Self:
        self._watch = await asyncio.TaskGroup().__aenter__()
        self._watcher = self._watch.create_task(self.run(), name=f"{self._name}-watch")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._watch is not None
        assert self._watcher is not None
        self._watcher.cancel()
        try:
            await self._watch.__aexit__(kind, error, trace)
        finally:
            await self.close()

    async def run(self) -> None:
        """Watch over the connection until cancelled."""
        pause_s = self.settings.probe_min_s
        while True:
            if await self._probe():
                pause_s = self.settings.probe_min_s
                self._opened.clear()
                try:
                    async with asyncio.timeout(self.settings.heartbeat_s):
                        await self._opened.wait()
                except TimeoutError:
                    continue
            # Jitter, so that the callers of a remote that comes back do not all come at once.
            await asyncio.sleep(pause_s * random.uniform(0.5, 1.0))  # noqa: S311 (no secret)
            pause_s = min(2 * pause_s, self.settings.probe_max_s)

    async def models(self) -> Sequence[ModelState]:
        """See `Backend`; none where the remote does not list its models."""
        try:
            index = self._whole(
                await self._unary(
                    lambda stub, timeout_s: stub.RepositoryIndex(oip_pb2.RepositoryIndexRequest(), timeout=timeout_s),
                    Deadline.after(self.settings.probe_timeout_s),
                )
            )
        except HedgerowError:
            return ()
        return tuple(ModelState(m.name, m.version, m.state == "READY", m.reason) for m in index.models)

    async def ready(self, model: str, version: str = "") -> bool:
        """See `Backend`; False as well while the remote cannot be reached."""
        try:
            answer = self._whole(
                await self._unary(
                    lambda stub, timeout_s: stub.ModelReady(
                        oip_pb2.ModelReadyRequest(name=model, version=version), timeout=timeout_s
                    ),
                    Deadline.after(self.settings.probe_timeout_s),
                )
            )
        except HedgerowError:
            return False
        return answer.ready

    async def metadata(self, model: str, version: str = "") -> ModelMetadata:
        """See `Backend`. At most two heartbeats old, or of the time before the remote went away."""
        at, metadata = self._known.setdefault((model, version), (-math.inf, None))
        if len(self._known) > MAX_KNOWN_MODELS:
            del self._known[next(iter(self._known))]
        if metadata is not None and (self._breaker.open or time.monotonic() - at < 2 * self.settings.heartbeat_s):
            return metadata
        learned = await self._unary(
            lambda stub, _: self._learn(stub, model, version), Deadline.after(self.settings.probe_timeout_s)
        )
        if learned is None:
            raise ModelNotFound(
                f"{self._name} has no model {model!r}" + (f" in version {version!r}" if version else "")
            )
        return learned

    async def infer(self, request: InferRequest, deadline: Deadline) -> InferResponse:
        """See `Backend`. Retries once, within the budget, what the remote could not take."""
        message = request_to_proto(request)
        self._retries.requested()
        with self._inflight:
            try:
                return await self._infer(message, deadline)
            except BackendUnavailable as error:
                pause_s = error.retry_after_s
                if pause_s is None:
                    pause_s = random.uniform(0, self.settings.retry_pause_s)  # noqa: S311 (no secret)
                enough_s = min(self.settings.timeout_s, deadline.remaining) - (self._latency.quantile(0.5) or 0.0)
                if self._breaker.open or pause_s > enough_s or not self._retries.spend():
                    raise
            await asyncio.sleep(pause_s)
            return await self._infer(message, deadline)

    async def stream(self, request: InferRequest, deadline: Deadline) -> AsyncIterator[InferResponse]:
        """See `Backend`. Not retried: some answers may have been given."""
        message = request_to_proto(request)
        with self._inflight:
            stub, timeout_s = await self._ready_stub(deadline)
            call = stub.ModelStreamInfer(iter([message]), timeout=timeout_s)
            try:
                with self._counted(timeout_s):
                    async for answer in call:
                        if self._whole(answer).error_message:
                            raise EngineFault(f"{self._name}: {answer.error_message}")
                        yield response_from_proto(answer.infer_response)
            finally:
                call.cancel()

    def snapshot(self, model: str) -> Snapshot:  # noqa: ARG002 (the connection is the same for every model)
        """See `Backend`."""
        return Snapshot(
            healthy=not self._breaker.open,
            inflight=self._inflight.count,
            latency_p50_s=self._latency.quantile(0.5),
            latency_p95_s=self._latency.quantile(0.95),
            reason=f"circuit open: {self._breaker.reason}" if self._breaker.open else "",
        )

    async def close(self) -> None:
        """See `Backend`."""
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.close()

    async def _infer(self, message: oip_pb2.ModelInferRequest, deadline: Deadline) -> InferResponse:
        started = time.monotonic()
        answer = await self._unary(lambda stub, timeout_s: stub.ModelInfer(message, timeout=timeout_s), deadline)
        self._latency.add(time.monotonic() - started)
        return response_from_proto(self._whole(answer))

    def _whole(self, answer: M | None) -> M:
        return rpc.whole(answer, self._name)

    async def _unary(self, call: Callable[[Stub, float], Awaitable[T]], deadline: Deadline) -> T:
        """The answer to one call, counted by the breaker."""
        stub, timeout_s = await self._ready_stub(deadline)
        with self._counted(timeout_s):
            return await call(stub, timeout_s)

    @contextmanager
    def _counted(self, timeout_s: float) -> Iterator[None]:
        """Turns what a call raises into our errors, and tells the breaker how it ended."""
        try:
            yield
        except grpc.aio.AioRpcError as error:
            raise self._fault(error, timeout_s) from error
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            # Nobody cancelled us: the channel was closed under the call.
            raise BackendUnavailable(f"{self._name} unavailable: the connection was given up") from None
        else:
            self._breaker.succeeded()

    async def _ready_stub(self, deadline: Deadline) -> tuple[Stub, float]:
        """The stub over a connection that stands, and how long a call may take."""
        if self._breaker.open:
            raise BackendUnavailable(f"{self._name} unavailable: circuit open: {self._breaker.reason}")
        deadline.check(f"{self._name} was asked")
        self._connection = self._connection or self._new_connection()
        limit_s = min(self.settings.connect_timeout_s, deadline.remaining)
        try:
            async with asyncio.timeout(limit_s):
                await self._connection.ready()
        except TimeoutError:
            if limit_s < self.settings.connect_timeout_s:
                raise DeadlineExceeded(f"the deadline passed before {self._name} was connected") from None
            reason = f"no connection within {limit_s:g} s"
            self._trip(reason)
            raise BackendUnavailable(f"{self._name} unavailable: {reason}") from None
        except ConnectionError as error:
            self._trip(str(error))
            raise BackendUnavailable(f"{self._name} unavailable: {error}") from None
        return self._connection.stub, min(self.settings.timeout_s, deadline.remaining)

    def _fault(self, error: grpc.aio.AioRpcError, timeout_s: float) -> HedgerowError:
        """What a failed call means to the caller; counts it."""
        fault = rpc.received(error)
        if isinstance(fault, Unavailable):
            reason = in_words(error)
            self._failed(reason)
            return BackendUnavailable(f"{self._name} unavailable: {reason}", retry_after_s=fault.retry_after_s)
        if isinstance(fault, DeadlineExceeded):
            expected_s = self._latency.quantile(0.95) or self.settings.connect_timeout_s
            # With less time than an answer usually takes, its absence says nothing about the remote.
            if timeout_s >= expected_s:
                self._latency.add(timeout_s)
                self._failed("it does not answer in time")
            return DeadlineExceeded(f"{self._name} did not answer within {timeout_s * 1000:.0f} ms")
        self._breaker.succeeded()  # it is there, and this is its answer
        kind = EngineFault if type(fault) is HedgerowError else type(fault)
        return kind(f"{self._name}: {fault}", retry_after_s=fault.retry_after_s)

    async def _probe(self) -> bool:
        """Ask after the remote: closes the breaker if it answers, counts a failure if not.

        While the breaker is open each probe brings a connection of its own, which replaces the old one if it is good:
        the old one may hang on a path that no longer exists.
        """
        if self._connection is None and not self._breaker.open:
            self._connection = self._new_connection()
        connection = self._new_connection() if self._breaker.open or not self._connection else self._connection
        try:
            async with asyncio.timeout(self.settings.probe_timeout_s):
                await connection.ready()
                problem = await self._examine(connection.stub)
        except TimeoutError:
            problem = "it does not answer in time"
        except ConnectionError as error:
            self._trip(problem := str(error))
        except grpc.aio.AioRpcError as error:
            problem = in_words(error)
        except EngineFault as error:  # whatever listens there, it must not end the watch
            problem = str(error)
        if problem:
            self._failed(problem)
            if connection is not self._connection:
                await connection.close()
            return False
        if connection is not self._connection:
            old, self._connection = self._connection, connection
            if old is not None:
                await old.close()
        if self._breaker.close():
            self._latency.clear()  # of another time, and of waiting in vain
            log.warning("%s: circuit closed after %.1f s", self._name, time.monotonic() - self._opened_at)
        return True

    async def _examine(self, stub: Stub) -> str:
        """What keeps the remote from answering, and with nothing in the way, news of the models that were asked for."""
        if not self._whole(await stub.ServerReady(oip_pb2.ServerReadyRequest())).ready:
            # A server is ready when all of its models are; ours may be nevertheless.
            asked = [oip_pb2.ModelReadyRequest(name=model, version=version) for model, version in self._known]
            if not any([self._whole(await stub.ModelReady(request)).ready for request in asked]):
                return "it is not ready"
        for model, version in tuple(self._known):
            await self._learn(stub, model, version)
        return ""

    async def _learn(self, stub: Stub, model: str, version: str) -> ModelMetadata | None:
        """The remote's metadata of a model, remembered; None if it has no such model."""
        request = oip_pb2.ModelMetadataRequest(name=model, version=version)
        try:
            answer = self._whole(await stub.ModelMetadata(request, timeout=self.settings.probe_timeout_s))
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.NOT_FOUND:
                raise
            self._known.pop((model, version), None)
            return None
        metadata = metadata_from_proto(answer)
        if (model, version) in self._known:
            self._known[model, version] = (time.monotonic(), metadata)
        return metadata

    def _failed(self, reason: str) -> None:
        if self._breaker.failed(reason):
            self._note_opened()

    def _trip(self, reason: str) -> None:
        if self._breaker.trip(reason):
            self._note_opened()

    def _note_opened(self) -> None:
        self._opened_at = time.monotonic()
        self._opened.set()
        log.warning("%s: circuit open: %s", self._name, self._breaker.reason)

    def _new_connection(self) -> Connection:
        return connect(
            self._target,
            self._credentials,
            connect_timeout_s=self.settings.connect_timeout_s,
            max_message_bytes=self.settings.max_message_bytes,
        )
