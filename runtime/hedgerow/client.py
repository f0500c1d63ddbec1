"""What Python applications import: numpy in, numpy out, and the reason for each answer.

::

    with Client("localhost:8001") as client:
        result = client.infer("digits", {"image": image})
        print(result.outputs["logits"].argmax(), result.tier, result.confidence)

`AsyncClient` is the same with ``await``. They talk to any OIP server; what a Hedgerow router explains (`Result.tier`
and so on) is None elsewhere. Errors are those of `hedgerow.errors`, with the server's message. A call that finds the
server UNAVAILABLE is tried again by gRPC itself: up to `MAX_ATTEMPTS` times, within the deadline, while few calls fail.
"""

import json
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from types import MappingProxyType
from typing import Any, Final, Self, TypeVar, cast

import grpc
from google.protobuf.message import Message
from numpy.typing import ArrayLike, NDArray

from hedgerow.backend import Deadline
from hedgerow.errors import InvalidInput, ModelNotFound, Unavailable
from hedgerow.proto import oip_pb2
from hedgerow.router import CONFIDENCE, DEGRADED, REASON, RELEASE, TIER
from hedgerow.rpc import received, whole
from hedgerow.tensors import (
    InferRequest,
    ModelMetadata,
    Parameter,
    metadata_from_proto,
    request_to_proto,
    response_from_proto,
    tensor,
)

DEFAULT_TIMEOUT_S = 60.0
MAX_ATTEMPTS = 3
MAX_MESSAGE_BYTES = 2**31 - 1

Inputs = Mapping[str, ArrayLike] | ArrayLike
"""Arrays by input name; or just the array, where the model has one input."""

_SERVICE: Final = oip_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"].full_name
_SERVICE_CONFIG = {
    "methodConfig": [
        {
            "name": [{"service": _SERVICE}],
            "retryPolicy": {
                "maxAttempts": MAX_ATTEMPTS,
                "initialBackoff": "0.05s",
                "maxBackoff": "1s",
                "backoffMultiplier": 3,
                "retryableStatusCodes": ["UNAVAILABLE"],
            },
        }
    ],
    # No retries while more than about one call in ten fails: a server in trouble is not helped by more of them.
    "retryThrottling": {"maxTokens": 10, "tokenRatio": 0.1},
}
_NOTHING: Final[Mapping[str, Any]] = MappingProxyType({})
R = TypeVar("R")


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One answer. BYTES outputs hold `bytes`; BF16 ones hold their bits as uint16."""

    outputs: dict[str, NDArray[Any]]
    model: str
    model_version: str
    id: str = ""
    tier: str | None = None
    """Who answered: "edge", "site" or "cloud"."""
    reason: str | None = None
    """Why that one."""
    confidence: float | None = None
    """What the gate made of the edge's answer, in [0, 1]."""
    release: str | None = None
    """The release that answered on the device: "digits/3"."""
    degraded: bool = False
    """Whether the gate refused this answer and nothing better could be had."""
    parameters: Mapping[str, Parameter] = field(default_factory=dict)
    """Everything the server said, as it said it."""


@dataclass(frozen=True, slots=True)
class _Call:
    """A call that a plan wants made. The plan is sent the answer, or has the error raised in it."""

    method: str
    request: Message
    answer: type[Message]


_Plan = Generator[_Call, Any, R]


class _Plans:
    """What both clients do, as generators of the calls to make: they differ only in how they wait."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._sole_inputs: dict[tuple[str, str], str] = {}

    def _deadline(self, timeout_s: float | None) -> Deadline:
        return Deadline.after(self._timeout_s if timeout_s is None else timeout_s)

    def _infer(self, request: InferRequest, inputs: Inputs) -> _Plan[Result]:
        key = (request.model, request.version)
        if not isinstance(inputs, Mapping):
            if key not in self._sole_inputs:
                self._sole_inputs[key] = _sole_input((yield from self._metadata(*key)))
            inputs = {self._sole_inputs[key]: inputs}
        tensors = tuple(tensor(name, value) for name, value in inputs.items())
        message = request_to_proto(replace(request, inputs=tensors))
        try:
            return _result((yield _Call("ModelInfer", message, oip_pb2.ModelInferResponse)))
        except InvalidInput:
            self._sole_inputs.pop(key, None)  # the model may have been replaced by one with another interface
            raise

    def _metadata(self, model: str, version: str) -> _Plan[ModelMetadata]:
        message = oip_pb2.ModelMetadataRequest(name=model, version=version)
        return metadata_from_proto((yield _Call("ModelMetadata", message, oip_pb2.ModelMetadataResponse)))

    def _ready(self, model: str, version: str) -> _Plan[bool]:
        call = _Call("ServerReady", oip_pb2.ServerReadyRequest(), oip_pb2.ServerReadyResponse)
        if model:
            message = oip_pb2.ModelReadyRequest(name=model, version=version)
            call = _Call("ModelReady", message, oip_pb2.ModelReadyResponse)
        try:
            answer = yield call
        except (Unavailable, ModelNotFound):  # some servers say so of an unknown model
            return False
        return bool(answer.ready)


class Client(_Plans):
    """A connection to one OIP server; threads may share it. In plain text unless given `credentials`."""

    def __init__(
        self,
        target: str,
        *,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        credentials: grpc.ChannelCredentials | None = None,
        max_message_bytes: int = MAX_MESSAGE_BYTES,
    ) -> None:
        super().__init__(timeout_s)
        options = _options(max_message_bytes)
        self._channel = (
            grpc.secure_channel(target, credentials, options) if credentials else grpc.insecure_channel(target, options)
        )

    def infer(
        self,
        model: str,
        inputs: Inputs,
        *,
        version: str = "",
        outputs: Sequence[str] = (),
        timeout_s: float | None = None,
        parameters: Mapping[str, Parameter] = _NOTHING,
        id: str = "",  # noqa: A002 (the protocol's name)
    ) -> Result:
        """The model's answer. No `outputs` means all of them; `timeout_s` counts from now, retries included."""
        request = _request(model, version, outputs, parameters, id)
        return self._run(self._infer(request, inputs), timeout_s)

    def metadata(self, model: str, version: str = "", *, timeout_s: float | None = None) -> ModelMetadata:
        """The model's interface."""
        return self._run(self._metadata(model, version), timeout_s)

    def ready(self, model: str = "", version: str = "", *, timeout_s: float | None = None) -> bool:
        """Whether the model, or the whole server, is ready. A server that cannot be reached is not."""
        return self._run(self._ready(model, version), timeout_s)

    def close(self) -> None:
        """Hang up; calls in flight are cancelled."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self, plan: _Plan[R], timeout_s: float | None) -> R:
        deadline, step = self._deadline(timeout_s), partial(next, plan)
        while True:
            try:
                call = step()
            except StopIteration as end:
                return cast("R", end.value)
            try:
                answer = self._channel.unary_unary(*_method(call))(call.request, timeout=deadline.remaining)
                step = partial(plan.send, answer)
            except grpc.RpcError as error:
                step = partial(plan.throw, received(error))


class AsyncClient(_Plans):
    """`Client` for asyncio, to be made in the event loop that uses it."""

    def __init__(
        self,
        target: str,
        *,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        credentials: grpc.ChannelCredentials | None = None,
        max_message_bytes: int = MAX_MESSAGE_BYTES,
    ) -> None:
        super().__init__(timeout_s)
        options = _options(max_message_bytes)
        self._channel = (
            grpc.aio.secure_channel(target, credentials, options)
            if credentials
            else grpc.aio.insecure_channel(target, options)
        )

    async def infer(
        self,
        model: str,
        inputs: Inputs,
        *,
        version: str = "",
        outputs: Sequence[str] = (),
        timeout_s: float | None = None,
        parameters: Mapping[str, Parameter] = _NOTHING,
        id: str = "",  # noqa: A002 (the protocol's name)
    ) -> Result:
        """The model's answer. No `outputs` means all of them; `timeout_s` counts from now, retries included."""
        request = _request(model, version, outputs, parameters, id)
        return await self._run(self._infer(request, inputs), timeout_s)

    async def metadata(self, model: str, version: str = "", *, timeout_s: float | None = None) -> ModelMetadata:
        """The model's interface."""
        return await self._run(self._metadata(model, version), timeout_s)

    async def ready(self, model: str = "", version: str = "", *, timeout_s: float | None = None) -> bool:
        """Whether the model, or the whole server, is ready. A server that cannot be reached is not."""
        return await self._run(self._ready(model, version), timeout_s)

    async def close(self) -> None:
        """Hang up; calls in flight are cancelled."""
        await self._channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _run(self, plan: _Plan[R], timeout_s: float | None) -> R:
        deadline, step = self._deadline(timeout_s), partial(next, plan)
        while True:
            try:
                call = step()
            except StopIteration as end:
                return cast("R", end.value)
            try:
                answer = await self._channel.unary_unary(*_method(call))(call.request, timeout=deadline.remaining)
                step = partial(plan.send, whole(answer, "the server"))
            except grpc.RpcError as error:
                step = partial(plan.throw, received(error))


def _options(max_message_bytes: int) -> list[tuple[str, Any]]:
    return [
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.max_send_message_length", max_message_bytes),
        ("grpc.service_config", json.dumps(_SERVICE_CONFIG)),
    ]


def _method(call: _Call) -> tuple[str, Callable[[Any], bytes], Callable[[bytes], Any]]:
    return f"/{_SERVICE}/{call.method}", type(call.request).SerializeToString, call.answer.FromString


def _request(
    model: str, version: str, outputs: Sequence[str], parameters: Mapping[str, Parameter], identity: str
) -> InferRequest:
    return InferRequest(
        model=model, version=version, inputs=(), id=identity, outputs=tuple(outputs), parameters=parameters
    )


def _sole_input(metadata: ModelMetadata) -> str:
    if len(metadata.inputs) != 1:
        names = ", ".join(spec.name for spec in metadata.inputs) or "none"
        raise InvalidInput(
            f"model {metadata.name} has {len(metadata.inputs)} inputs ({names}): give the arrays by name"
        )
    return metadata.inputs[0].name


def _result(message: oip_pb2.ModelInferResponse) -> Result:
    response = response_from_proto(message)

    def said(key: str, kind: type[R]) -> R | None:
        value = response.parameters.get(key)
        return value if isinstance(value, kind) else None

    return Result(
        outputs={output.name: output.array for output in response.outputs},
        model=response.model,
        model_version=response.version,
        id=response.id,
        parameters=response.parameters,
        tier=said(TIER, str),
        reason=said(REASON, str),
        confidence=said(CONFIDENCE, float),
        release=said(RELEASE, str),
        degraded=said(DEGRADED, bool) or False,
    )
