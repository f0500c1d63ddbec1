"""The Open Inference Protocol over any Backend, call by call; `hedgerow.server` listens.

The life of a call: admitted (not draining, not too many), turned into a request once, checked against the model's
metadata, given what is left of the caller's deadline, answered by the backend, counted. Errors become statuses in
`hedgerow.rpc`.
"""

import asyncio
import math
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import AbstractContextManager, asynccontextmanager, nullcontext
from functools import partial
from typing import Final

from google.protobuf.message import Message
from msgspec.structs import replace

from hedgerow import __version__
from hedgerow.alarms import Alarms, Until
from hedgerow.backend import Backend, Deadline, ModelControl
from hedgerow.config import ServerSettings
from hedgerow.errors import (
    Forbidden,
    HedgerowError,
    InvalidInput,
    ModelNotFound,
    ModelNotReady,
    Overloaded,
)
from hedgerow.identity import Identify, Tokens, as_said, bearer, token_digest
from hedgerow.lifecycle import InFlight
from hedgerow.messages import (
    Raws,
    classified,
    config_to_proto,
    metadata_to_proto,
    request_from_bytes,
    request_from_proto,
    response_to_proto,
    response_to_wire,
)
from hedgerow.overrides import check_config, wanted_config
from hedgerow.parameters import FINAL, FINAL_ASKED, STATUS
from hedgerow.proto import oip_pb2
from hedgerow.rpc import Call, Handler, Method, details, methods, parse, public
from hedgerow.shared_memory.calls import SharedMemoryCalls
from hedgerow.shared_memory.tensors import SharedTensors, names_regions
from hedgerow.statistics import BatchCounts, Statistics, Stopwatch
from hedgerow.telemetry.logs import REQUEST
from hedgerow.tensors import (
    HOPS,
    HOPS_KEY,
    NOWHERE,
    InferRequest,
    InferResponse,
    ModelMetadata,
    Origin,
    check_request,
)
from hedgerow.wire import Serialised

STREAM_CONCURRENCY = 8
"""Requests of one stream that are worked on at once; more wait unread, which slows the sender down."""
STREAM_ANSWERS = 16
"""Answers of one streamed request that may wait for the caller to read those before."""
RETRY_AFTER_S = 1.0
"""When a refused caller may try again."""

DECOUPLED: Final = "decoupled"
"""Property of a model that gives any number of answers to a request."""
_ORIGIN: Final = frozenset({HOPS_KEY, "traceparent", "tracestate"})

SERVICE: Final = oip_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"]
_Queue = asyncio.Queue[oip_pb2.ModelStreamInferResponse | None]


class OipService:
    """One method a call of GRPCInferenceService, in its order. Once `draining` is set, nothing new is begun."""

    def __init__(
        self,
        backend: Backend,
        settings: ServerSettings,
        control: ModelControl | None,
        name: str,
        batches: Callable[[str], BatchCounts | None] = lambda _: None,
        identify: Identify = as_said,
        shared: SharedTensors | None = None,
    ) -> None:
        self._backend = backend
        self._batches = batches
        self._identify = identify
        self._shared = shared
        token = settings.control_token
        self._managers = Tokens([(token_digest(token), "control")]) if token else None
        self._settings = settings
        self._control = control
        self._name = name
        self.statistics = Statistics()
        self.inflight = InFlight()
        self.draining = False
        self._alarms = Alarms(Until.is_over, Until.ring)

    @property
    def methods(self) -> dict[str, Method]:
        """What to serve."""
        regions = None if self._shared is None else self._shared.regions
        return methods(
            SERVICE,
            {
                "ServerLive": self.server_live,
                "ServerReady": _counting_hops(self.server_ready),
                "ModelReady": _counting_hops(self.model_ready),
                "ServerMetadata": self.server_metadata,
                "ModelMetadata": _counting_hops(self.model_metadata),
                "ModelInfer": self.model_infer,
                "ModelStreamInfer": self.model_stream_infer,
                "ModelConfig": _counting_hops(self.model_config),
                "ModelStatistics": _counting_hops(self.model_statistics),
                "RepositoryIndex": _counting_hops(self.repository_index),
                "RepositoryModelLoad": self.repository_model_load,
                "RepositoryModelUnload": self.repository_model_unload,
                **SharedMemoryCalls(regions, self._identify).handlers,
            },
            unparsed={"ModelInfer"},
        )

    def close(self) -> None:
        """Watch no more deadlines: once nothing is in flight."""
        self._alarms.close()

    async def ready(self) -> bool:
        """Whether requests are taken and every model has a version that is ready."""
        if self.draining:
            return False
        states = await self._backend.models()
        return {state.name for state in states} == {state.name for state in states if state.ready}

    async def server_live(self, _: oip_pb2.ServerLiveRequest, __: Call) -> oip_pb2.ServerLiveResponse:
        """Live: we answer."""
        return oip_pb2.ServerLiveResponse(live=True)

    async def server_ready(self, _: oip_pb2.ServerReadyRequest, __: Call) -> oip_pb2.ServerReadyResponse:
        """Whether all models are ready, as the protocol has it."""
        return oip_pb2.ServerReadyResponse(ready=await self.ready())

    async def model_ready(self, request: oip_pb2.ModelReadyRequest, _: Call) -> oip_pb2.ModelReadyResponse:
        """Whether one model is ready; an unknown one is not, which is no error."""
        ready = not self.draining and await self._backend.ready(request.name, request.version)
        return oip_pb2.ModelReadyResponse(ready=ready)

    async def server_metadata(self, _: oip_pb2.ServerMetadataRequest, __: Call) -> oip_pb2.ServerMetadataResponse:
        """Name, version, and the extensions of the protocol that are really there."""
        extensions = ["classification", "model_configuration", "parameters", "statistics"]
        if self._control is not None:
            extensions.append("model_repository")
        if self._shared is not None:
            extensions.append("system_shared_memory")
        name = self._settings.compatibility or self._name
        return oip_pb2.ServerMetadataResponse(name=name, version=__version__, extensions=extensions)

    async def model_metadata(self, request: oip_pb2.ModelMetadataRequest, _: Call) -> oip_pb2.ModelMetadataResponse:
        """A model's interface."""
        return metadata_to_proto(await self._interface(request.name, request.version))

    async def model_infer(self, raw: bytes, call: Call) -> Serialised:
        """One answer to one request. Without protobuf's messages, because large tensors are not parsed."""
        with self.statistics.request(call.deadline) as watch, self._admitted():
            caller = self._origin(call)
            message, raws = request_from_bytes(raw)
            if self._shared is not None and names_regions(message):
                with self._shared.lent(message, raws) as (lent, places):
                    response = await self._inferred(message, lent, caller, call, watch)
                    return self._shared.placed(response, places).SerializeToString()
            return response_to_wire(await self._inferred(message, raws, caller, call, watch))

    async def model_stream_infer(self, raws: AsyncIterator[bytes], call: Call) -> None:
        """The answers of many requests, in the order of the requests; a request that fails says so in its place."""
        waiting: asyncio.Queue[_Queue | None] = asyncio.Queue(STREAM_CONCURRENCY)

        async def read(group: asyncio.TaskGroup) -> None:
            async for raw in raws:
                answers = _Queue(STREAM_ANSWERS)
                await waiting.put(answers)
                group.create_task(self._answer_streamed(raw, call, answers))
            await waiting.put(None)

        async with asyncio.TaskGroup() as group:
            group.create_task(read(group))
            while (answers := await waiting.get()) is not None:
                while (answer := await answers.get()) is not None:
                    await call.write(answer.SerializeToString())

    async def model_config(self, request: oip_pb2.ModelConfigRequest, _: Call) -> oip_pb2.ModelConfigResponse:
        """The model's interface in the form of Triton's configuration."""
        metadata = await self._interface(request.name, request.version)
        return oip_pb2.ModelConfigResponse(config=config_to_proto(metadata))

    async def model_statistics(
        self, request: oip_pb2.ModelStatisticsRequest, _: Call
    ) -> oip_pb2.ModelStatisticsResponse:
        """What was counted of one model, or of all."""
        if request.name:
            metadata = await self._interface(request.name, request.version)
            served = {(request.name, version) for version in metadata.versions or ("",)}
        else:
            served = {(state.name, state.version) for state in await self._backend.models()}
        wanted = [
            (model, version)
            for model, version in sorted(served | self.statistics.counted())
            if request.name in {"", model} and request.version in {"", version}
        ]
        messages = []
        for model, version in wanted:
            batches = self._batches(model)
            running = batches is not None and await self._backend.ready(model, version)
            messages.append(self.statistics.message(model, version, batches if running else None))
        return oip_pb2.ModelStatisticsResponse(model_stats=messages)

    async def repository_index(
        self, request: oip_pb2.RepositoryIndexRequest, call: Call
    ) -> oip_pb2.RepositoryIndexResponse:
        """Every model and its state."""
        self._allowed_control(call)
        index = oip_pb2.RepositoryIndexResponse.ModelIndex
        return oip_pb2.RepositoryIndexResponse(
            models=[
                index(
                    name=state.name,
                    version=state.version,
                    state="READY" if state.ready else "UNAVAILABLE",
                    reason=state.reason,
                )
                for state in await self._backend.models()
                if state.ready or not request.ready
            ]
        )

    async def repository_model_load(
        self, request: oip_pb2.RepositoryModelLoadRequest, call: Call
    ) -> oip_pb2.RepositoryModelLoadResponse:
        """Load or reload a model from where it was configured, as it was configured: see `overrides`."""
        control, model = self._allowed_control(call), request.model_name
        try:
            wanted = wanted_config(request.parameters)
            if wanted.ByteSize():
                check_config(wanted, config_to_proto(await self._backend.metadata(model)))
            await control.load(model)
        except HedgerowError as error:
            if self._settings.compatibility == "triton":
                text = f"failed to load {model!r}: {error}"
                raise type(error)(text, retry_after_s=error.retry_after_s) from error
            raise
        return oip_pb2.RepositoryModelLoadResponse()

    async def repository_model_unload(
        self, request: oip_pb2.RepositoryModelUnloadRequest, call: Call
    ) -> oip_pb2.RepositoryModelUnloadResponse:
        """Stop serving a model."""
        await self._allowed_control(call).unload(request.model_name)
        return oip_pb2.RepositoryModelUnloadResponse()

    async def _inferred(
        self, message: oip_pb2.ModelInferRequest, raws: Raws, caller: Origin, call: Call, watch: Stopwatch
    ) -> InferResponse:
        request = request_from_proto(message, caller, raws)
        REQUEST.set(replace(request, inputs=()))  # timers and connections keep the context of who began them
        deadline, timeout = self._deadline(request, call)
        with timeout:
            metadata = await self._interface(request.model, request.version)
            watch.asks(metadata)
            check_request(request, metadata)
            started = time.perf_counter_ns()
            response = await self._backend.infer(request, deadline)
            watch.answered(response.version, time.perf_counter_ns() - started)
            return _answer(message, request, response, metadata)

    def _allowed_control(self, call: Call) -> ModelControl:
        if self._control is None:
            raise Forbidden("this server does not let its callers manage models")
        if self._managers is None:
            self._identify(call)  # raises where nobody is answered who proves nothing
        elif self._managers.owner(bearer(call.metadata)) is None:
            raise Forbidden("managing models needs this server's control token, as authorization: Bearer TOKEN")
        return self._control

    def _origin(self, call: Call) -> Origin:
        """Where a request comes from; raises if it does not come from whom it says."""
        metadata, tenant = call.metadata, self._identify(call)
        if not tenant and metadata.keys().isdisjoint(_ORIGIN):
            return NOWHERE
        return Origin(
            tenant=tenant,
            hops=_count_hops(call),
            traceparent=metadata.get("traceparent", ""),
            tracestate=metadata.get("tracestate", ""),
        )

    def _admitted(self) -> InFlight:
        """What counts a request while it is worked on; raises if no more are taken."""
        if self.draining:
            raise ModelNotReady("the server is shutting down", retry_after_s=RETRY_AFTER_S)
        if self.inflight.count >= self._settings.max_inflight:
            raise Overloaded(
                f"{self._settings.max_inflight} requests are being worked on, which is the limit",
                retry_after_s=RETRY_AFTER_S,
            )
        return self.inflight

    async def _interface(self, model: str, version: str) -> ModelMetadata:
        """What to check requests against, asked each time because releases are swapped live.

        A backend that may swap between this answer and the inference checks again against what it runs.
        """
        try:
            return await self._backend.metadata(model, version)
        except ModelNotFound as error:
            if self._settings.compatibility == "triton":
                raise ModelNotFound(f"Request for unknown model: {error}") from error
            raise

    def _deadline(self, request: InferRequest, call: Call) -> tuple[Deadline, AbstractContextManager[object]]:
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

    async def _answer_streamed(self, raw: bytes, call: Call, answers: _Queue) -> None:
        identity = ""
        try:
            message = parse(oip_pb2.ModelInferRequest, raw)
            identity = message.id
            with self.statistics.request(call.deadline) as watch, self._admitted():
                caller = self._origin(call)
                if self._shared is not None and names_regions(message):
                    with self._shared.lent(message, message.raw_input_contents) as (lent, places):
                        placed = partial(self._shared.placed, places=places)
                        await self._stream(message, lent, caller, call, answers, watch, placed)
                else:
                    await self._stream(message, message.raw_input_contents, caller, call, answers, watch)
        except Exception as unknown:  # noqa: BLE001 (one request's fault must not end the stream; `public` logs it)
            error = public(unknown, "ModelStreamInfer")
            failed = oip_pb2.ModelInferResponse(id=identity)
            failed.parameters[STATUS].string_param = error.status.name
            await answers.put(oip_pb2.ModelStreamInferResponse(error_message=details(error), infer_response=failed))
        await answers.put(None)

    async def _stream(
        self,
        message: oip_pb2.ModelInferRequest,
        raws: Raws,
        caller: Origin,
        call: Call,
        answers: _Queue,
        watch: Stopwatch,
        to_proto: Callable[[InferResponse], oip_pb2.ModelInferResponse] = response_to_proto,
    ) -> None:
        request = request_from_proto(message, caller, raws)
        REQUEST.set(replace(request, inputs=()))  # timers and connections keep the context of who began them
        deadline, timeout = self._deadline(request, call)
        # Who asks to be told of the last answer is: by an empty one after those of a model that gives any number.
        tell = request.parameters.get(FINAL_ASKED) is True
        with timeout:
            metadata = await self._interface(request.model, request.version)
            watch.asks(metadata)
            decoupled = metadata.properties.get(DECOUPLED) == "true"
            check_request(request, metadata)
            async with _closing(self._backend.stream(request, deadline)) as responses:
                while True:
                    started = time.perf_counter_ns()
                    response = await anext(responses, None)
                    if response is None:
                        break
                    watch.answered(response.version, time.perf_counter_ns() - started)
                    answer = to_proto(_answer(message, request, response, metadata))
                    if tell:
                        answer.parameters[FINAL].bool_param = not decoupled
                    await answers.put(oip_pb2.ModelStreamInferResponse(infer_response=answer))
            if tell and decoupled:
                last = oip_pb2.ModelInferResponse(model_name=request.model, model_version=watch.version, id=request.id)
                last.parameters[FINAL].bool_param = True
                await answers.put(oip_pb2.ModelStreamInferResponse(infer_response=last))


def _counting_hops(handle: Handler) -> Handler:
    """`handle`, whose questions to backends say how many routers the call has passed, so that circles end."""

    async def answer(request: Message, call: Call) -> Message:
        _count_hops(call)
        answered: Message = await handle(request, call)
        return answered

    return answer


def _count_hops(call: Call) -> int:
    """How many routers `call` has passed, for what is asked on its behalf."""
    said = call.metadata.get(HOPS_KEY, "0")
    if not said.isdecimal() or len(said) > 4:
        raise InvalidInput(f"{HOPS_KEY} is {said[:20]!r}; expected a small number")
    hops = int(said)
    HOPS.set(hops)
    return hops


def _answer(
    message: oip_pb2.ModelInferRequest, request: InferRequest, response: InferResponse, metadata: ModelMetadata
) -> InferResponse:
    """The answer under the name and id that the caller used, whatever those behind us call the model."""
    if response.model != request.model or response.id != request.id:
        response = replace(response, model=request.model, id=request.id)
    return classified(response, message, metadata) if message.outputs else response


@asynccontextmanager
async def _closing(responses: AsyncIterator[InferResponse]) -> AsyncIterator[AsyncIterator[InferResponse]]:
    """Let a backend's generator finish now, not when it is collected, if nobody waits for the rest."""
    try:
        yield responses
    finally:
        if isinstance(responses, AsyncGenerator):
            await responses.aclose()


_UNLIMITED: Final = nullcontext()
