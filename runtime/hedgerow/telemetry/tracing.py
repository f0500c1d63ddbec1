"""Traces (OpenTelemetry): what one request went through, from its caller to the engine, over every Hedgerow on the way.

Off unless asked for, and then it stands *around* what answers: `Tracing.methods` around a service's methods, `Traced`
around backends. Without it nothing of this module is there, so that untraced requests pay nothing. Spans follow the
caller's W3C trace context, and what is sent on carries ours (`hedgerow.tensors.Origin`).
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

from msgspec.structs import replace

from hedgerow import __version__
from hedgerow.backend import Around, Backend, Deadline
from hedgerow.errors import ConfigError, HedgerowError, MissingExtra
from hedgerow.rpc import Call, Method, Methods
from hedgerow.telemetry.settings import TracingSettings
from hedgerow.tensors import InferRequest, InferResponse
from hedgerow.wire import Serialised

try:
    from opentelemetry import trace
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor
    from opentelemetry.sdk.trace.sampling import ParentBasedTraceIdRatio
    from opentelemetry.trace import Span, SpanKind, Status, StatusCode
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
except ImportError as error:
    raise MissingExtra("traces need OpenTelemetry; pip install 'hedgerow[tracing]' brings it") from error

TRACED_METHODS: Final = ("ModelInfer", "ModelStreamInfer")
EXPLAINS: Final = "hedgerow_"
"""How those parameters of an answer begin that say why it is this one: they become attributes of its span."""
TRACEPARENT_CHARS = 55
"""Of version 00; its last one has the bit that says whether the caller's span is sampled."""
FLUSH_S = 5.0
"""How long the end may wait for the last spans to be sent."""

_propagator = TraceContextTextMapPropagator()


class Tracing:
    """Makes the spans of this process and sends them. Close it at the end."""

    def __init__(self, settings: TracingSettings, *, instance: str = "") -> None:
        if not settings.endpoint.startswith(("http://", "https://")):
            raise ConfigError(f"tracing.endpoint: {settings.endpoint!r} must begin with http:// or https://")
        resource = {
            "service.name": settings.service,
            "service.version": __version__,
            **({"service.instance.id": instance} if instance else {}),
        }
        self._provider = TracerProvider(
            resource=Resource.create(resource),
            sampler=ParentBasedTraceIdRatio(settings.sample),
            shutdown_on_exit=False,  # ours to do
        )
        exporter = OTLPSpanExporter(endpoint=settings.endpoint, timeout=settings.timeout_s)
        # Bounded: 2048 spans wait, what comes while it is full is dropped; a thread of its own sends them.
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("hedgerow", __version__)

    def methods(self, served: Methods) -> Methods:
        """`served`, with a span around each call that asks for inference."""
        return {path: self._traced(path, method) for path, method in served.items()}

    @contextmanager
    def span(self, name: str, kind: SpanKind, parent: Mapping[str, str]) -> Iterator[tuple[Span, dict[str, str]]]:
        """A span below the one that `parent` names in its headers, and the headers that name it.

        An error that passes through is its end. It is not OpenTelemetry's "current" one: requests carry their own
        context, which also survives being queued, batched and streamed.
        """
        span = self._tracer.start_span(name, _propagator.extract(parent), kind)
        headers: dict[str, str] = {}
        _propagator.inject(headers, trace.set_span_in_context(span))
        try:
            yield span, headers
        except BaseException as error:
            _failed(span, error)
            raise
        finally:
            span.end()

    def around(self, backend: Backend, what: str, *, remote: bool = False) -> "Traced":
        """`backend`, with a span around each request."""
        return Traced(backend, self, what, remote=remote)

    async def close(self) -> None:
        """Send what is left, within `FLUSH_S`. Idempotent."""
        await asyncio.to_thread(self._provider.force_flush, round(FLUSH_S * 1000))
        await asyncio.to_thread(self._provider.shutdown)

    def _traced(self, path: str, method: Method) -> Method:
        if method.name not in TRACED_METHODS:
            return method
        fields = {field: getattr(method, field) for field in Method.__slots__}
        return _TracedMethod(**fields, path=path, tracing=self)


class Traced(Around):
    """`backend` with a span around each request, named `what` and the model. With `remote`, what it asks is a client's.

    The request goes on as one of this span.
    """

    def __init__(self, backend: Backend, tracing: Tracing, what: str, *, remote: bool = False) -> None:
        super().__init__(backend)
        self._tracing = tracing
        self._what = what
        self._kind = SpanKind.CLIENT if remote else SpanKind.INTERNAL

    async def infer(self, request: InferRequest, deadline: Deadline) -> InferResponse:
        """See `Backend`."""
        if _left_out(request.origin.traceparent):
            return await self._backend.infer(request, deadline)
        with self._span(request) as (span, below):
            response = await self._backend.infer(below, deadline)
            _answered(span, response)
            return response

    async def stream(self, request: InferRequest, deadline: Deadline) -> AsyncIterator[InferResponse]:
        """See `Backend`."""
        with self._span(request) as (span, below):
            answers = self._backend.stream(below, deadline)
            try:
                async for response in answers:
                    _answered(span, response)
                    yield response
            finally:
                if isinstance(answers, AsyncGenerator):  # now, not when it is collected
                    await answers.aclose()

    @contextmanager
    def _span(self, request: InferRequest) -> Iterator[tuple[Span, InferRequest]]:
        """The span, and the request as it goes on below it."""
        origin = request.origin
        parent = {"traceparent": origin.traceparent, "tracestate": origin.tracestate}
        with self._tracing.span(f"{self._what} {request.model}", self._kind, parent) as (span, headers):
            span.set_attributes({"hedgerow.backend": self.name, "hedgerow.model": request.model})
            if request.id:
                span.set_attribute("hedgerow.request_id", request.id)
            if headers:  # there are none where the environment has turned OpenTelemetry off
                origin = replace(origin, traceparent=headers["traceparent"], tracestate=headers.get("tracestate", ""))
            yield span, replace(request, origin=origin)


@dataclass(frozen=True, slots=True)
class _TracedMethod(Method):
    """A method whose calls are spans of a server."""

    path: str
    tracing: Tracing

    async def answer(self, received: bytes | AsyncIterator[bytes], call: Call) -> Serialised | None:
        """See `Method`."""
        with self.tracing.span(self.path.removeprefix("/"), SpanKind.SERVER, call.metadata) as (_, headers):
            return await Method.answer(self, received, _TracedCall(call, headers))


class _TracedCall:
    """`call` as one whose caller is our span. See `rpc.Call`."""

    def __init__(self, call: Call, headers: Mapping[str, str]) -> None:
        self.metadata = {**call.metadata, **headers}
        self.deadline = call.deadline
        self.peer = call.peer
        self.write = call.write


def _left_out(traceparent: str) -> bool:
    """Whether the caller's span is not sampled, so that none below it would be: then there is no need to make any."""
    return len(traceparent) == TRACEPARENT_CHARS and traceparent[-1] in "02468ace"


def _answered(span: Span, response: InferResponse) -> None:
    """Have the span say what the answer says of itself."""
    span.set_attribute("hedgerow.version", response.version)
    for name, value in response.parameters.items():
        if name.startswith(EXPLAINS):
            span.set_attribute(f"hedgerow.{name.removeprefix(EXPLAINS)}", value)


def _failed(span: Span, error: BaseException) -> None:
    """Have the span say what the caller is told; what is unexpected is in the log."""
    if isinstance(error, GeneratorExit):  # the caller has heard enough
        return
    if isinstance(error, HedgerowError):
        span.set_attribute("rpc.grpc.status_code", error.status.value[0])
        span.set_status(Status(StatusCode.ERROR, str(error)))
    else:
        span.set_status(Status(StatusCode.ERROR, type(error).__name__))
