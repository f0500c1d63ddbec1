"""A remote as a backend: any server that speaks the protocol, at one address or many.

The life of a request here: admitted if it is likely to be answered in time (`admission`, `limits`), marked with where
it comes from, sent to the endpoint that is likely to answer first (`pool`, `balancing`), hedged if it takes unusually
long, sent to another if the first could not take it (`breaker.RetryBudget`). What one endpoint may cost is bounded in
`endpoint`.
"""

import asyncio
import random
import time
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import aclosing
from types import TracebackType
from typing import Any, Self

import msgspec
from google.protobuf.message import Message

from hedgerow.backend import Deadline, ModelState, Snapshot
from hedgerow.errors import (
    BackendUnavailable,
    DeadlineExceeded,
    EngineFault,
    HedgerowError,
    InvalidInput,
    ModelNotFound,
    Overloaded,
)
from hedgerow.latency import LatencyWindow
from hedgerow.oip.messages import request_to_wire, response_from_bytes
from hedgerow.proto import oip_pb2
from hedgerow.remote.admission import Admission, Load
from hedgerow.remote.breaker import RetryBudget
from hedgerow.remote.connection import FIRST_HOP, Metadata, parsed
from hedgerow.remote.endpoint import Endpoint
from hedgerow.remote.known import KnownModels
from hedgerow.remote.pool import Pool, Resolve, Targets, addresses
from hedgerow.remote.settings import RemoteSettings, Target
from hedgerow.remote.streams import plain, streamed
from hedgerow.statistics import RemoteCounts
from hedgerow.tensors import HOPS, HOPS_KEY, TENANT_KEY, InferRequest, InferResponse, ModelMetadata, Origin
from hedgerow.wire import Serialised, size_of

__all__ = ["RemoteBackend", "RemoteSettings", "Target"]

HEDGE_BURST = 1
MAX_VALUE_CHARS = 512
"""Of one value of metadata: as much of `tracestate` W3C Trace Context wants propagated; more is left out whole."""


class _Call(msgspec.Struct, frozen=True):
    """One request on its way, and who has been asked."""

    request: InferRequest
    load: Load
    raw: Serialised
    metadata: Metadata
    deadline: Deadline
    asked: list[Endpoint] = []


class RemoteBackend:
    """What `targets` lead to as one `Backend`. Belongs to one event loop.

    Targets are "host:port" or "dns:host:port", or `Target`s, which may have a zone. Either enter it, or give `run()` to
    a TaskGroup and `close` at the end; unwatched, an open breaker stays open and names are not resolved.
    """

    def __init__(
        self, name: str, targets: Targets, settings: RemoteSettings | None = None, *, resolve: Resolve = addresses
    ) -> None:
        self.settings = settings = settings or RemoteSettings()
        self._name = name
        self._latency = LatencyWindow()
        self._models = KnownModels(name, 2 * settings.heartbeat_s)
        self._pool = Pool(name, targets, settings, self._latency, self._models, resolve)
        self._admission = Admission(name, settings)
        self._retries = RetryBudget(settings.retry_share, settings.retry_burst)
        self._hedges = RetryBudget(settings.hedge_share, HEDGE_BURST)
        self.counts = RemoteCounts()
        self._watch: asyncio.TaskGroup | None = None
        self._watcher: asyncio.Task[None] | None = None

    @property
    def name(self) -> str:
        """See `Backend`."""
        return self._name

    @property
    def limit(self) -> int:
        """See `Admission`."""
        return self._admission.limit

    def endpoint_states(self) -> dict[str, int]:
        """How many endpoints can be asked, are cut off, or are left alone for a while."""
        now, states = time.monotonic(), {"usable": 0, "open": 0, "ejected": 0}
        for endpoint in self._pool.endpoints:
            states["open" if endpoint.open else "ejected" if endpoint.ejected(now) else "usable"] += 1
        return states

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
        """Watch over the endpoints until cancelled."""
        await self._pool.run()

    def update_targets(self, targets: Targets) -> None:
        """Go to `targets` from now on; what is in flight elsewhere finishes there. Raises `ConfigError`."""
        self._pool.update(targets)

    async def models(self) -> Sequence[ModelState]:
        """See `Backend`; none where the remote does not list its models."""
        try:
            raw = await self._ask("RepositoryIndex", oip_pb2.RepositoryIndexRequest())
            index = parsed(oip_pb2.RepositoryIndexResponse.FromString, raw, self._name)
        except HedgerowError:
            return ()
        return tuple(ModelState(m.name, m.version, m.state == "READY", m.reason) for m in index.models)

    async def ready(self, model: str, version: str = "") -> bool:
        """See `Backend`; False as well while the remote cannot be reached."""
        try:
            return await self._models.ready(self._ask, model, version)
        except HedgerowError:
            return False

    async def metadata(self, model: str, version: str = "") -> ModelMetadata:
        """See `Backend`. At most two heartbeats old, or of the time before the remote went away."""
        known = self._models.get(model, version, whatever_age=bool(self._pool.reason))
        metadata = known or await self._models.learn(self._ask, model, version)
        if metadata is None:
            raise ModelNotFound(
                f"{self._name} has no model {model!r}" + (f" in version {version!r}" if version else "")
            )
        return metadata

    async def infer(self, request: InferRequest, deadline: Deadline) -> InferResponse:
        """See `Backend`. Retries, within the budget, what an endpoint could not take."""
        call = self._call(request, deadline)
        with call.load:
            for _ in range(self.settings.max_retries):
                try:
                    return await self._sent(call, self._pool.choose(call.asked) or await self._reach(deadline))
                except (BackendUnavailable, Overloaded) as error:
                    pause_s = self._pause_s(error, call)
                    if pause_s is None:
                        raise
                self.counts.retries += 1
                await asyncio.sleep(pause_s)
            return await self._sent(call, self._pool.choose(call.asked) or await self._reach(deadline))

    async def stream(self, request: InferRequest, deadline: Deadline) -> AsyncIterator[InferResponse]:
        """See `Backend`. Not retried: some answers may have been given."""
        call = self._call(plain(request), deadline)
        with call.load:
            endpoint = self._pool.choose() or await self._reach(deadline)
            async with aclosing(endpoint.stream("ModelStreamInfer", call.raw, deadline, call.metadata)) as answers:
                async for raw in answers:
                    answer = streamed(raw, self._name)
                    if answer is not None:
                        yield answer

    def snapshot(self, model: str) -> Snapshot:  # noqa: ARG002 (the way is the same for every model)
        """See `Backend`."""
        reason, now = self._pool.reason, time.monotonic()
        return Snapshot(
            healthy=not reason,
            inflight=self._admission.inflight.count,
            latency_p50_s=self._latency.quantile(0.5, now),
            latency_p95_s=self._latency.quantile(0.95, now),
            reason=reason,
        )

    async def close(self) -> None:
        """See `Backend`."""
        await self._pool.close()

    def _call(self, request: InferRequest, deadline: Deadline) -> _Call:
        """The request as it travels; raises `Overloaded` if it would be in vain."""
        load = self._admission.admit(request.model, min(self.settings.timeout_s, deadline.remaining))
        metadata = self._metadata(request.origin)
        self.counts.requests += 1
        self._retries.requested()
        self._hedges.requested()
        return _Call(request, load, request_to_wire(request), metadata, deadline)

    def _metadata(self, origin: Origin) -> Metadata:
        if origin.hops >= self.settings.max_hops:
            raise BackendUnavailable(
                f"{self._name} is not asked: the request has passed {origin.hops} routers, the limit is "
                f"{self.settings.max_hops}; do routers ask each other in a circle?"
            )
        tenant = origin.tenant if self.settings.forward_tenant else ""
        if not (origin.hops or origin.traceparent or tenant):
            return FIRST_HOP
        metadata = [(HOPS_KEY, str(origin.hops + 1))]
        if _fits(origin.traceparent):  # what is malformed is not propagated, says W3C
            metadata.append(("traceparent", origin.traceparent))
            if _fits(origin.tracestate):
                metadata.append(("tracestate", origin.tracestate))
        if tenant:
            if not _fits(tenant):
                raise InvalidInput("the tenant cannot be forwarded: expected a line of printable ASCII")
            metadata.append((TENANT_KEY, tenant))
        return tuple(metadata)

    async def _ask(self, method: str, request: Message) -> bytes:
        """The answer of any endpoint to a question about the server or its models."""
        metadata = self._metadata(Origin(hops=HOPS.get()))
        deadline = Deadline.after(self.settings.probe_timeout_s)
        endpoint = await self._reach(deadline)
        return await endpoint.unary(method, request.SerializeToString(), deadline, metadata)

    async def _reach(self, deadline: Deadline) -> Endpoint:
        """Any endpoint, waiting for the names to be resolved where none is known yet."""
        if not self._pool.endpoints:
            await self._pool.known(min(self.settings.connect_timeout_s, deadline.remaining))
        endpoint = self._pool.choose()
        if endpoint is None:
            raise BackendUnavailable(f"{self._name} unavailable: {self._pool.reason}")
        return endpoint

    def _sent(self, call: _Call, first: Endpoint) -> Coroutine[Any, Any, InferResponse]:
        """The answer of `first`, or of another that is asked beside it where it takes long."""
        if self.settings.hedge_after_quantile and len(self._pool.endpoints) > 1:
            usual_s = self._latency.quantile(self.settings.hedge_after_quantile)
            if usual_s is not None:
                return self._hedged(call, first, max(usual_s, self.settings.hedge_min_s))
        return self._attempt(call, first)

    async def _hedged(self, call: _Call, first: Endpoint, after_s: float) -> InferResponse:
        """The first good answer of `first` and, if there is none after so long, of another; the loser is cancelled."""
        started = time.monotonic()

        async def attempt(endpoint: Endpoint) -> InferResponse | HedgerowError:
            try:
                return await self._attempt(call, endpoint)
            except HedgerowError as error:  # given back, so that it does not cancel the other
                return error

        errors: list[HedgerowError] = []
        async with asyncio.TaskGroup() as group:
            primary = group.create_task(attempt(first))
            waiting = {primary}
            done, _ = await asyncio.wait(waiting, timeout=after_s)
            second = None if done else self._second(call)
            if second is not None:
                waiting.add(group.create_task(attempt(second)))
            while waiting:
                done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    answer = task.result()
                    if isinstance(answer, HedgerowError):
                        errors.append(answer)
                        continue
                    for loser in waiting:
                        loser.cancel()
                    if primary in waiting:
                        first.waited(time.monotonic() - started)
                    return answer
        raise errors[0]

    def _second(self, call: _Call) -> Endpoint | None:
        """Another endpoint for a request that takes long, if there is one and the budgets allow."""
        other = self._pool.choose(call.asked)
        if other is None or other in call.asked or not (self._hedges.spend() and self._retries.spend()):
            return None
        self.counts.hedges += 1
        return other

    async def _attempt(self, call: _Call, endpoint: Endpoint) -> InferResponse:
        call.asked.append(endpoint)
        started = time.monotonic()
        limit, inflight = call.load.limit, call.load.count
        time_s = min(self.settings.timeout_s, call.deadline.at - started)
        self.counts.sent_bytes += size_of(call.raw)
        try:
            raw = await endpoint.unary("ModelInfer", call.raw, call.deadline, call.metadata, timed=True)
        except (DeadlineExceeded, asyncio.CancelledError):
            limit.missed(time.monotonic() - started, inflight, time_s)
            raise
        except InvalidInput:
            if await self._is_ready(endpoint, call):
                raise
            raise BackendUnavailable(f"{self._name} unavailable: {call.request.model} is not ready") from None
        now = time.monotonic()
        took_s = now - started
        self.counts.received_bytes += len(raw)
        try:
            answer = parsed(response_from_bytes, raw, self._name)
        except EngineFault:
            endpoint.faulted()
            raise
        self._latency.add(took_s, now)
        limit.answered(took_s, inflight, time_s)
        endpoint.answered(took_s, now)
        return answer

    async def _is_ready(self, endpoint: Endpoint, call: _Call) -> bool:
        """Whether a refusal of the request is about the request: MLServer says INVALID_ARGUMENT for "not ready"."""
        deadline = Deadline(min(call.deadline.at, Deadline.after(self.settings.probe_timeout_s).at))

        async def ask(method: str, message: Message) -> bytes:
            return await endpoint.unary(method, message.SerializeToString(), deadline, call.metadata)

        try:
            return await self._models.ready(ask, call.request.model, call.request.version)
        except HedgerowError:
            return True

    def _pause_s(self, error: BackendUnavailable | Overloaded, call: _Call) -> float | None:
        """How long to wait before the request is sent again; None if it should not be.

        An unavailable endpoint's pushback is about itself: another is asked at once. One that is overloaded speaks for
        all of them, or retries would carry the overload from each to the next.
        """
        if isinstance(error, Overloaded) and error.retry_after_s is None:
            return None
        other = self._pool.choose(call.asked)
        if other is None:
            return None
        if isinstance(error, BackendUnavailable) and other not in call.asked:
            pause_s = 0.0
        elif error.retry_after_s is None:
            pause_s = random.uniform(0, self.settings.retry_pause_s)  # noqa: S311 (no secret)
        else:
            pause_s = error.retry_after_s
        enough_s = min(self.settings.timeout_s, call.deadline.remaining) - (self._latency.quantile(0.5) or 0.0)
        return None if pause_s > enough_s or not self._retries.spend() else pause_s


def _fits(value: str) -> bool:
    """Whether `value` can be sent as metadata."""
    return 0 < len(value) <= MAX_VALUE_CHARS and value.isascii() and value.isprintable()
