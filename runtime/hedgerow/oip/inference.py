"""One answer to one request, and what streams of them share with it.

The life of a request: admitted (not draining, not too many), turned into an `InferRequest` once, checked against the
model's metadata, given what is left of the caller's deadline, answered by the backend, counted.
"""

import math
import time
from contextlib import AbstractContextManager, nullcontext
from typing import Final

from msgspec.structs import replace

from hedgerow.alarms import Alarms, Until
from hedgerow.backend import Backend, Deadline
from hedgerow.config import ServerSettings
from hedgerow.errors import ModelNotFound, ModelNotReady, Overloaded
from hedgerow.identity import Identify
from hedgerow.lifecycle import InFlight
from hedgerow.oip.classification import classified
from hedgerow.oip.hops import count_hops
from hedgerow.oip.messages import Raws, request_from_bytes, request_from_proto, response_to_wire
from hedgerow.proto import oip_pb2
from hedgerow.rpc import Call
from hedgerow.shared_memory.tensors import SharedTensors, names_regions
from hedgerow.statistics import Statistics, Stopwatch
from hedgerow.telemetry.logs import REQUEST
from hedgerow.tensors import HOPS_KEY, NOWHERE, InferRequest, InferResponse, ModelMetadata, Origin, check_request
from hedgerow.wire import Serialised

RETRY_AFTER_S = 1.0
"""When a refused caller may try again."""

_ORIGIN: Final = frozenset({HOPS_KEY, "traceparent", "tracestate"})
_UNLIMITED: Final = nullcontext()


class Inference:
    """ModelInfer over `backend`, and who may ask it for what, and until when. Once `draining`, nothing new is begun."""

    def __init__(
        self, backend: Backend, settings: ServerSettings, identify: Identify, shared: SharedTensors | None
    ) -> None:
        self.backend = backend
        self.shared = shared
        self.statistics = Statistics()
        self.inflight = InFlight()
        self.draining = False
        self._settings = settings
        self._identify = identify
        self._alarms = Alarms(Until.is_over, Until.ring)

    def close(self) -> None:
        """Watch no more deadlines: once nothing is in flight."""
        self._alarms.close()

    async def model_infer(self, raw: bytes, call: Call) -> Serialised:
        """One answer to one request. Without protobuf's messages, because large tensors are not parsed."""
        with self.statistics.request(call.deadline) as watch, self.admitted():
            caller = self.origin(call)
            message, raws = request_from_bytes(raw)
            if self.shared is not None and names_regions(message):
                with self.shared.lent(message, raws) as (lent, places):
                    response = await self._inferred(message, lent, caller, call, watch)
                    return self.shared.placed(response, places).SerializeToString()
            return response_to_wire(await self._inferred(message, raws, caller, call, watch))

    def admitted(self) -> InFlight:
        """What counts a request while it is worked on; raises if no more are taken."""
        if self.draining:
            raise ModelNotReady("the server is shutting down", retry_after_s=RETRY_AFTER_S)
        if self.inflight.count >= self._settings.max_inflight:
            raise Overloaded(
                f"{self._settings.max_inflight} requests are being worked on, which is the limit",
                retry_after_s=RETRY_AFTER_S,
            )
        return self.inflight

    def origin(self, call: Call) -> Origin:
        """Where a request comes from; raises if it does not come from whom it says."""
        metadata, tenant = call.metadata, self._identify(call)
        if not tenant and metadata.keys().isdisjoint(_ORIGIN):
            return NOWHERE
        return Origin(
            tenant=tenant,
            hops=count_hops(call),
            traceparent=metadata.get("traceparent", ""),
            tracestate=metadata.get("tracestate", ""),
        )

    async def interface(self, model: str, version: str) -> ModelMetadata:
        """What to check requests against, asked each time because releases are swapped live.

        A backend that may swap between this answer and the inference checks again against what it runs.
        """
        try:
            return await self.backend.metadata(model, version)
        except ModelNotFound as error:
            if self._settings.compatibility == "triton":
                raise ModelNotFound(f"Request for unknown model: {error}") from error
            raise

    def deadline(self, request: InferRequest, call: Call) -> tuple[Deadline, AbstractContextManager[object]]:
        """Until when `request` may take, and what holds it to that where the transport does not."""
        limit_s = self._settings.default_timeout_s if math.isinf(call.deadline.at) else math.inf
        timeout_us = request.parameters.get("timeout") if request.parameters else None  # reserved by the protocol
        if isinstance(timeout_us, int) and not isinstance(timeout_us, bool) and timeout_us > 0:
            limit_s = min(limit_s, timeout_us / 1e6)
        elif limit_s == math.inf:
            call.deadline.check("the request could be started")
            return call.deadline, _UNLIMITED
        own = Deadline.after(limit_s)
        if call.deadline.at <= own.at:
            call.deadline.check("the request could be started")
            return call.deadline, _UNLIMITED
        return own, Until(own, self._alarms)

    async def _inferred(
        self, message: oip_pb2.ModelInferRequest, raws: Raws, caller: Origin, call: Call, watch: Stopwatch
    ) -> InferResponse:
        request = request_from_proto(message, caller, raws)
        REQUEST.set(replace(request, inputs=()))  # timers and connections keep the context of who began them
        deadline, timeout = self.deadline(request, call)
        with timeout:
            metadata = await self.interface(request.model, request.version)
            watch.asks(metadata)
            check_request(request, metadata)
            started = time.perf_counter_ns()
            response = await self.backend.infer(request, deadline)
            watch.answered(response.version, time.perf_counter_ns() - started)
            return as_asked(message, request, response, metadata)


def as_asked(
    message: oip_pb2.ModelInferRequest, request: InferRequest, response: InferResponse, metadata: ModelMetadata
) -> InferResponse:
    """The answer under the name and id that the caller used, whatever those behind us call the model."""
    if response.model != request.model or response.id != request.id:
        response = replace(response, model=request.model, id=request.id)
    return classified(response, message, metadata) if message.outputs else response
