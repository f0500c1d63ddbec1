"""The answers of many requests over one call, in the order of the requests; each is taken in as `inference` does."""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Final

from msgspec.structs import replace

from hedgerow.oip.inference import Inference, as_asked
from hedgerow.oip.messages import Raws, request_from_proto, response_to_proto
from hedgerow.parameters import FINAL, FINAL_ASKED, STATUS
from hedgerow.proto import oip_pb2
from hedgerow.rpc import Call, details, parse, public
from hedgerow.shared_memory.tensors import names_regions
from hedgerow.statistics import Stopwatch
from hedgerow.telemetry.logs import REQUEST
from hedgerow.tensors import InferResponse, Origin, check_request

STREAM_CONCURRENCY = 8
"""Requests of one stream that are worked on at once; more wait unread, which slows the sender down."""
STREAM_ANSWERS = 16
"""Answers of one streamed request that may wait for the caller to read those before."""

DECOUPLED: Final = "decoupled"
"""Property of a model that gives any number of answers to a request."""

_Queue = asyncio.Queue[oip_pb2.ModelStreamInferResponse | None]


class Streams:
    """ModelStreamInfer over what `inference` asks."""

    def __init__(self, inference: Inference) -> None:
        self._inference = inference

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

    async def _answer_streamed(self, raw: bytes, call: Call, answers: _Queue) -> None:
        inference, identity = self._inference, ""
        try:
            message = parse(oip_pb2.ModelInferRequest, raw)
            identity = message.id
            with inference.statistics.request(call.deadline) as watch, inference.admitted():
                caller = inference.origin(call)
                if inference.shared is not None and names_regions(message):
                    with inference.shared.lent(message, message.raw_input_contents) as (lent, places):
                        placed = partial(inference.shared.placed, places=places)
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
        inference = self._inference
        request = request_from_proto(message, caller, raws)
        REQUEST.set(replace(request, inputs=()))  # timers and connections keep the context of who began them
        deadline, timeout = inference.deadline(request, call)
        # Who asks to be told of the last answer is: by an empty one after those of a model that gives any number.
        tell = request.parameters.get(FINAL_ASKED) is True
        with timeout:
            metadata = await inference.interface(request.model, request.version)
            watch.asks(metadata)
            decoupled = metadata.properties.get(DECOUPLED) == "true"
            check_request(request, metadata)
            async with _closing(inference.backend.stream(request, deadline)) as responses:
                while True:
                    started = time.perf_counter_ns()
                    response = await anext(responses, None)
                    if response is None:
                        break
                    watch.answered(response.version, time.perf_counter_ns() - started)
                    answer = to_proto(as_asked(message, request, response, metadata))
                    if tell:
                        answer.parameters[FINAL].bool_param = not decoupled
                    await answers.put(oip_pb2.ModelStreamInferResponse(infer_response=answer))
            if tell and decoupled:
                last = oip_pb2.ModelInferResponse(model_name=request.model, model_version=watch.version, id=request.id)
                last.parameters[FINAL].bool_param = True
                await answers.put(oip_pb2.ModelStreamInferResponse(infer_response=last))


@asynccontextmanager
async def _closing(responses: AsyncIterator[InferResponse]) -> AsyncIterator[AsyncIterator[InferResponse]]:
    """Let a backend's generator finish now, not when it is collected, if nobody waits for the rest."""
    try:
        yield responses
    finally:
        if isinstance(responses, AsyncGenerator):
            await responses.aclose()
