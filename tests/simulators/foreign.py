"""A server of another house: a real gRPC server that has no more of the protocol than a test gives it."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Any, Self

import grpc
from google.protobuf.message import Message

from hedgerow.proto import oip_pb2

Context = grpc.aio.ServicerContext[bytes, bytes]
Answer = Callable[[bytes, Context], Awaitable[Message]]


def says(message: Message) -> Answer:
    """Answers with `message`."""

    async def answer(_: bytes, __: Context) -> Message:
        return message

    return answer


def refuses(code: grpc.StatusCode, details: str) -> Answer:
    """Refuses with a status."""

    async def answer(_: bytes, context: Context) -> Message:
        await context.abort(code, details)

    return answer


class Foreign(grpc.GenericRpcHandler):
    """Answers the unary calls in `answers`, by method name, and each streamed request with all of `streamed`.

    Other calls are unimplemented. Ready unless told otherwise. `heard` has the metadata, `left_s` the time left at
    arrival, of each `ModelInfer`; `asked_in_streams` the streamed requests.
    """

    def __init__(self, answers: Mapping[str, Answer], streamed: Sequence[Message] = ()) -> None:
        self.streamed = streamed
        self.asked_in_streams: list[oip_pb2.ModelInferRequest] = []
        self.answers = {"ServerReady": says(oip_pb2.ServerReadyResponse(ready=True)), **answers}
        self.heard: list[dict[str, str]] = []
        self.left_s: list[float] = []
        self.asked = asyncio.Event()
        self.target = ""
        self._server: grpc.aio.Server | None = None

    def service(self, details: grpc.HandlerCallDetails) -> Any:
        name = details.method.rpartition("/")[2]
        if name == "ModelStreamInfer" and self.streamed:
            return grpc.stream_stream_rpc_method_handler(self._stream)
        if name not in self.answers:
            return None

        async def answer(raw: bytes, context: Context) -> bytes:
            if name == "ModelInfer":
                self.heard.append({key: str(value) for key, value in context.invocation_metadata() or ()})
                self.left_s.append(context.time_remaining())
                self.asked.set()
            return (await self.answers[name](raw, context)).SerializeToString()

        return grpc.unary_unary_rpc_method_handler(answer)

    async def _stream(self, raws: AsyncIterator[bytes], _: Context) -> AsyncIterator[bytes]:
        async for raw in raws:
            self.asked_in_streams.append(oip_pb2.ModelInferRequest.FromString(raw))
            for message in self.streamed:
                yield message.SerializeToString()

    async def __aenter__(self) -> Self:
        self._server = grpc.aio.server()
        self._server.add_generic_rpc_handlers([self])
        self.target = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        await self._server.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        await self._server.stop(0)
