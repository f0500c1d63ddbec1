"""A server under test, known by its address: valid requests for it, and what it says when it refuses one."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar, cast

import grpc
import numpy as np
from numpy.typing import NDArray

from hedgerow.oip.messages import request_to_proto
from hedgerow.proto import oip_pb2, oip_pb2_grpc
from hedgerow.tensors import InferRequest, numpy_dtype, tensor

SERVICE = "inference.GRPCInferenceService"
WAIT_S = 30.0
CHANNEL_OPTIONS = (("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1))

T = TypeVar("T")
Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Target:
    """A server under the contract. Its model answers the same inputs with the same outputs."""

    address: str
    model: str
    inputs: Callable[[], Arrays]
    """Makes valid inputs."""
    max_message_bytes: int = 2**31 - 1
    """What the server was told to take at most."""
    datatypes: Mapping[str, str] = field(default_factory=dict)
    """By input, where the dtype does not tell: BF16."""


def channel(address: str) -> grpc.Channel:
    """A channel that sets no limit of its own."""
    return grpc.insecure_channel(address, options=CHANNEL_OPTIONS)


def request(target: Target) -> oip_pb2.ModelInferRequest:
    """A valid request, raw."""
    tensors = tuple(tensor(name, array, target.datatypes.get(name, "")) for name, array in target.inputs().items())
    return request_to_proto(InferRequest(model=target.model, inputs=tensors))


def raw_contents(array: NDArray[Any]) -> bytes:
    """An array as it travels."""
    return request_to_proto(InferRequest(model="m", inputs=(tensor("x", array),))).raw_input_contents[0]


def from_metadata(address: str, model: str, given: Arrays) -> Target:
    """The server at `address` with inputs made to fit the metadata of `model`, but for those that are `given`.

    Free dimensions get size 1, or 2 if the model refuses that.
    """
    with channel(address) as to:
        stub: Any = oip_pb2_grpc.GRPCInferenceServiceStub(to)
        specs = stub.ModelMetadata(oip_pb2.ModelMetadataRequest(name=model), timeout=WAIT_S).inputs
        for free in (1, 2):
            arrays = {spec.name: given.get(spec.name, made(spec, free)) for spec in specs}
            datatypes = {spec.name: spec.datatype for spec in specs}
            target = Target(address, model, arrays.copy, datatypes=datatypes)
            if outcome(partial(stub.ModelInfer, request(target), timeout=WAIT_S))[1] is grpc.StatusCode.OK:
                break
    return target  # the rules will say what is wrong with it


def made(spec: Any, free: int) -> NDArray[Any]:
    """An array for the tensor that `spec` describes: 0, 1, 2 ... 9, 0 ... in any datatype (BYTES in digits)."""
    shape = [free if size < 0 else size for size in spec.shape]
    digits = np.arange(int(np.prod(shape))) % 10
    if spec.datatype == "BYTES":
        array = np.array([str(digit).encode() for digit in digits], object)
    elif spec.datatype == "BF16":
        array = (digits.astype("<f4").view("<u4") >> 16).astype("<u2")
    else:
        array = digits.astype(numpy_dtype(spec.datatype))
    return array.reshape(shape)


def refused(call: Callable[[], object], *statuses: grpc.StatusCode) -> str:
    """What the server says when it refuses `call` with one of `statuses`."""
    _, status, said = outcome(call)
    assert status in statuses, f"expected {' or '.join(one.name for one in statuses)}, got {status.name} {said}"
    return said


def outcome(call: Callable[[], T]) -> tuple[T | None, grpc.StatusCode, str]:
    """The answer of `call` if there is one, its status, and what the server says when it refuses."""
    try:
        return call(), grpc.StatusCode.OK, ""
    except grpc.RpcError as error:
        refusal = cast("grpc.Call", error)
        return None, refusal.code(), refusal.details() or ""


def still_serves(stub: Any, target: Target) -> None:
    """Raise unless a valid request is answered."""
    assert stub.ModelInfer(request(target), timeout=WAIT_S).model_name == target.model
