"""The Open Inference Protocol's requests and answers, to and from those of `hedgerow.tensors`: here and nowhere else.

Rules of the conversions:

- nothing is allocated from a size that a message merely claims: the bytes must be there first;
- numeric inputs that travelled raw are read-only views on the received bytes, never copies;
- large tensors are not parsed or copied on their way through (`hedgerow.wire`);
- what we send is always raw, the one form that every client reads; what we receive may be typed as well;
- a malformed request is `InvalidInput`, a malformed answer of another server `EngineFault`; both name the tensor, what
  was expected and what came.
"""

import math
import struct
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from hedgerow import wire
from hedgerow.errors import EngineFault, HedgerowError, InvalidInput, Unsupported
from hedgerow.oip.classification import CLASSIFICATION
from hedgerow.proto import oip_pb2
from hedgerow.tensors import (
    DTYPES,
    NOWHERE,
    InferRequest,
    InferResponse,
    Origin,
    Parameter,
    Tensor,
    check_distinct,
    objects,
)

Raw = bytes | memoryview
"""The bytes of one tensor."""
Raws = Sequence[Raw]

MAX_RANK = 32
"""Dimensions of a tensor; numpy 1's own limit."""
MAX_ELEMENTS = 2**31
"""Elements of a tensor, zero-size dimensions aside: a gRPC message cannot carry more."""

# Where typed contents of each datatype live, and how wide they are there. FP16 and BF16 have no such place.
_TYPED: dict[str, tuple[str, np.dtype[Any]]] = {
    "BOOL": ("bool_contents", np.dtype("?")),
    **dict.fromkeys(("INT8", "INT16", "INT32"), ("int_contents", np.dtype("i4"))),
    "INT64": ("int64_contents", np.dtype("i8")),
    **dict.fromkeys(("UINT8", "UINT16", "UINT32"), ("uint_contents", np.dtype("u4"))),
    "UINT64": ("uint64_contents", np.dtype("u8")),
    "FP32": ("fp32_contents", np.dtype("f4")),
    "FP64": ("fp64_contents", np.dtype("f8")),
    "BYTES": ("bytes_contents", np.dtype(object)),
}
MAX_REMEMBERED = 1024
"""Parts of messages of a kind that are remembered;"""
MAX_REMEMBERED_CHARS = 256
"""names and values of parameters that are longer are not."""
_DOUBLE = struct.Struct("<d")
_LENGTH = struct.Struct("<I")  # before each BYTES element


def request_from_bytes(raw: bytes) -> tuple[oip_pb2.ModelInferRequest, Raws]:
    """The message in `raw`, and the raw contents, which it is without if they are large: for `request_from_proto`."""
    if len(raw) >= wire.WORTHWHILE_BYTES:
        with suppress(DecodeError):
            head, raws = wire.lift(raw, wire.RAW_INPUTS)
            return oip_pb2.ModelInferRequest.FromString(head), raws
    try:
        message = oip_pb2.ModelInferRequest.FromString(raw)
    except DecodeError as error:
        raise InvalidInput("the request is no valid inference.ModelInferRequest") from error
    return message, message.raw_input_contents


def request_from_proto(
    message: oip_pb2.ModelInferRequest, origin: Origin = NOWHERE, raws: Raws | None = None
) -> InferRequest:
    """The request in `message`, well-formed in itself; whether it fits the model is for `check_request` to say."""
    if not message.model_name:
        raise InvalidInput("the request names no model")
    outputs: tuple[str, ...] = ()
    if message.outputs:
        for asked in message.outputs:
            for parameter, value in asked.parameters.items():
                if parameter.startswith("shared_memory_"):
                    raise Unsupported(f"output {asked.name!r}: {parameter} is not supported here")
                if parameter == CLASSIFICATION and value.int64_param < 1:
                    raise InvalidInput(f"output {asked.name!r}: {parameter} must be the number of classes wanted")
        outputs = tuple(asked.name for asked in message.outputs)
        check_distinct("output", outputs)
    return InferRequest(
        model=message.model_name,
        version=message.model_version,
        id=message.id,
        inputs=_tensors_from_proto(
            "input", message.inputs, message.raw_input_contents if raws is None else raws, InvalidInput
        ),
        outputs=outputs,
        parameters=_parameters_from_proto(message.parameters, InvalidInput),
        origin=origin,
    )


def request_to_proto(request: InferRequest) -> oip_pb2.ModelInferRequest:
    """The message for `request`, inputs raw; raises `InvalidInput` if an array is not of its datatype."""
    return oip_pb2.ModelInferRequest.FromString(wire.joined(request_to_wire(request)))


def request_to_wire(request: InferRequest) -> wire.Serialised:
    """`request_to_proto`, serialised; large inputs are copied only where their arrays can be written to."""
    parts = _parts(request, request.inputs)
    if request.outputs:
        wanted = oip_pb2.ModelInferRequest.InferRequestedOutputTensor
        parts.append(
            oip_pb2.ModelInferRequest(outputs=[wanted(name=name) for name in request.outputs]).SerializeToString()
        )
    return wire.serialised(parts, wire.RAW_INPUTS, [to_raw("input", one, InvalidInput) for one in request.inputs])


def response_from_bytes(raw: bytes) -> InferResponse:
    """The answer in `raw`; raises `DecodeError`, and `EngineFault` if it is malformed."""
    if len(raw) >= wire.WORTHWHILE_BYTES:
        with suppress(DecodeError):
            head, raws = wire.lift(raw, wire.RAW_OUTPUTS)
            return response_from_proto(oip_pb2.ModelInferResponse.FromString(head), raws)
    return response_from_proto(oip_pb2.ModelInferResponse.FromString(raw))


def response_from_proto(message: oip_pb2.ModelInferResponse, raws: Raws | None = None) -> InferResponse:
    """The answer in `message`, with its raw contents if it is without; raises `EngineFault` if it is malformed."""
    return InferResponse(
        model=message.model_name,
        version=message.model_version,
        id=message.id,
        outputs=_tensors_from_proto(
            "output", message.outputs, message.raw_output_contents if raws is None else raws, EngineFault
        ),
        parameters=_parameters_from_proto(message.parameters, EngineFault),
    )


def response_to_proto(response: InferResponse) -> oip_pb2.ModelInferResponse:
    """The message for `response`, outputs raw; raises `EngineFault` if an array is not of its datatype."""
    return oip_pb2.ModelInferResponse.FromString(wire.joined(response_to_wire(response)))


def response_to_wire(response: InferResponse) -> wire.Serialised:
    """`response_to_proto`, serialised; large outputs are copied only where their arrays can be written to."""
    raws = [to_raw("output", one, EngineFault) for one in response.outputs]
    return wire.serialised(_parts(response, response.outputs), wire.RAW_OUTPUTS, raws)


_TensorMessage = oip_pb2.ModelInferRequest.InferInputTensor | oip_pb2.ModelInferResponse.InferOutputTensor


def _tensors_from_proto(
    kind: str, messages: Sequence[_TensorMessage], raws: Raws, fault: type[HedgerowError]
) -> tuple[Tensor, ...]:
    if len(messages) > 1:
        check_distinct(kind, [message.name for message in messages], fault)
    if raws and len(raws) != len(messages):
        raise fault(f"expected one raw entry for each of {len(messages)} {kind}s, got {len(raws)}")
    tensors = []
    for index, message in enumerate(messages):
        name, datatype = message.name, message.datatype
        where = f"{kind} {name!r}"
        if message.parameters and any(parameter.startswith("shared_memory_") for parameter in message.parameters):
            raise Unsupported(f"{where}: shared memory is not supported here")
        if datatype not in DTYPES:
            raise fault(f"{where}: expected a datatype out of {', '.join(DTYPES)}, got {datatype!r}")
        shape = tuple(message.shape)
        if len(shape) > MAX_RANK:  # before anything remembers it
            raise fault(f"{where}: expected at most {MAX_RANK} dimensions, got {len(shape)}")
        count, problem = _elements(shape)
        if problem:
            raise fault(f"{where}: {problem}")
        if not raws:
            flat = _from_contents(where, message, count, fault)
        elif message.HasField("contents") and message.contents.ByteSize():  # MLServer sends an empty one
            raise fault(f"{where}: expected raw or typed contents, got both")
        elif datatype == "BYTES":
            flat = _from_raw_bytes(where, raws[index], count, fault)
        else:
            flat = _from_raw(where, raws[index], datatype, count, fault)
        tensors.append(Tensor(name, datatype, flat.reshape(shape)))
    return tuple(tensors)


@lru_cache(MAX_REMEMBERED)
def _elements(shape: tuple[int, ...]) -> tuple[int, str]:
    """How many elements a tensor of `shape` has, or what is wrong with it."""
    if shape and min(shape) < 0:
        return 0, f"expected dimensions of zero or more, got shape {list(shape)}"
    if math.prod([size or 1 for size in shape]) > MAX_ELEMENTS:
        return 0, f"expected at most {MAX_ELEMENTS} elements, got shape {list(shape)}"
    return math.prod(shape), ""


def _from_raw(where: str, raw: Raw, datatype: str, count: int, fault: type[HedgerowError]) -> NDArray[Any]:
    dtype = DTYPES[datatype]
    if len(raw) != count * dtype.itemsize:
        raise fault(
            f"{where}: expected {count * dtype.itemsize} bytes ({count} elements of {datatype}), got {len(raw)}"
        )
    array = np.frombuffer(raw, dtype)
    if datatype == "BOOL" and count and array.view(np.uint8).max() > 1:
        raise fault(f"{where}: expected a BOOL to be the byte 0 or 1, got {array.view(np.uint8).max()}")
    return array


def _from_raw_bytes(where: str, raw: Raw, count: int, fault: type[HedgerowError]) -> NDArray[Any]:
    if len(raw) < count * _LENGTH.size:
        raise fault(f"{where}: expected {count} BYTES elements, got {len(raw)} bytes, too few for their lengths")
    elements, at = [], 0
    for index in range(count):
        start = at + _LENGTH.size
        if start > len(raw):
            raise fault(f"{where}: expected {count} BYTES elements, got only {index}")
        (length,) = _LENGTH.unpack_from(raw, at)
        at = start + length
        if at > len(raw):
            raise fault(f"{where}: expected element {index} to have {length} bytes, got {len(raw) - start}")
        elements.append(bytes(raw[start:at]))
    if at != len(raw):
        raise fault(f"{where}: expected {count} BYTES elements, got {len(raw) - at} bytes after them")
    return objects(elements, (count,))


def _from_contents(where: str, message: _TensorMessage, count: int, fault: type[HedgerowError]) -> NDArray[Any]:
    datatype = message.datatype
    if datatype not in _TYPED:
        raise fault(f"{where}: expected {datatype} as raw contents, the only form it has, got none")
    place, dtype = _TYPED[datatype]
    for descriptor, _ in message.contents.ListFields():
        if descriptor.name != place:
            raise fault(f"{where}: expected {datatype} in {place}, got {descriptor.name}")
    values = getattr(message.contents, place)
    if len(values) != count:
        raise fault(f"{where}: expected {count} elements in {place}, got {len(values)}")
    if datatype == "BYTES":
        return objects(list(values), (count,))
    array = np.fromiter(values, dtype, count)
    exact = array.astype(DTYPES[datatype])
    if exact.dtype.kind in "iu" and not np.array_equal(array, exact):
        raise fault(f"{where}: expected values of {datatype}, got {array[array != exact][0]}")
    return exact


def to_raw(kind: str, tensor: Tensor, fault: type[HedgerowError]) -> Raw:
    """The raw contents of `tensor`, an input or an output; raises `fault` if its array is not of its datatype."""
    where, array = f"{kind} {tensor.name!r}", tensor.array
    wanted = DTYPES.get(tensor.datatype)
    if wanted is None:
        raise fault(f"{where}: expected a datatype out of {', '.join(DTYPES)}, got {tensor.datatype!r}")
    if array.dtype != wanted and array.dtype.newbyteorder("<") != wanted:
        raise fault(f"{where}: expected an array of {wanted.name} for {tensor.datatype}, got {array.dtype.name}")
    if tensor.datatype != "BYTES":
        if array.nbytes >= wire.WORTHWHILE_BYTES:
            return np.ascontiguousarray(array, wanted).data.cast("B")
        return array.astype(wanted, copy=False).tobytes()
    parts: list[bytes] = []
    for element in array.ravel():
        if not isinstance(element, bytes):
            raise fault(f"{where}: expected BYTES elements to be bytes, got {type(element).__name__}")
        parts += (_LENGTH.pack(len(element)), element)
    return b"".join(parts)


def _parameters_from_proto(
    parameters: Mapping[str, oip_pb2.InferParameter], fault: type[HedgerowError]
) -> dict[str, Parameter]:
    if not parameters:
        return {}
    plain: dict[str, Parameter] = {}
    for key, parameter in parameters.items():
        choice = parameter.WhichOneof("parameter_choice")
        if choice is None:
            raise fault(f"parameter {key!r}: expected a value, got none")
        plain[key] = getattr(parameter, choice)
    return plain


def _parts(message: InferRequest | InferResponse, tensors: Sequence[Tensor]) -> list[bytes]:
    """What requests and answers have in common, serialised: fields 1 to 5 mean the same in both, says the protocol.

    The encoding of a message is that of its fields, one after the other, in any order. Most of them are the same in
    each message of a model, so they are remembered.
    """
    parts = [_head(message.model, message.version)]
    if message.id:
        parts.append(oip_pb2.ModelInferResponse(id=message.id).SerializeToString())
    for key, value in message.parameters.items():
        if len(key) > MAX_REMEMBERED_CHARS or (isinstance(value, str) and len(value) > MAX_REMEMBERED_CHARS):
            parts.append(_parameter.__wrapped__(key, value))
        elif isinstance(value, float):
            parts += (_double(key), _DOUBLE.pack(value))
        else:
            parts.append(_parameter(key, value))
    parts += [_tensor(one.name, one.datatype, one.array.shape) for one in tensors]
    return parts


@lru_cache(MAX_REMEMBERED)
def _head(model: str, version: str) -> bytes:
    return oip_pb2.ModelInferResponse(model_name=model, model_version=version).SerializeToString()


@lru_cache(MAX_REMEMBERED)
def _tensor(name: str, datatype: str, shape: tuple[int, ...]) -> bytes:
    tensor = oip_pb2.ModelInferResponse.InferOutputTensor(name=name, datatype=datatype, shape=shape)
    return oip_pb2.ModelInferResponse(outputs=[tensor]).SerializeToString()


@lru_cache(MAX_REMEMBERED, typed=True)
def _parameter(key: str, value: Parameter) -> bytes:
    return oip_pb2.ModelInferResponse(parameters={key: _parameter_to_proto(key, value)}).SerializeToString()


@lru_cache(MAX_REMEMBERED)
def _double(key: str) -> bytes:
    """A parameter that is a float, up to its value."""
    return _parameter.__wrapped__(key, 1.0)[: -_DOUBLE.size]


def _parameter_to_proto(key: str, value: Parameter) -> oip_pb2.InferParameter:
    # bool before int: a bool is an int to Python.
    if isinstance(value, bool):
        return oip_pb2.InferParameter(bool_param=value)
    if isinstance(value, str):
        return oip_pb2.InferParameter(string_param=value)
    if isinstance(value, float):
        return oip_pb2.InferParameter(double_param=value)
    if isinstance(value, int) and -(2**63) <= value < 2**63:
        return oip_pb2.InferParameter(int64_param=value)
    if isinstance(value, int) and 0 <= value < 2**64:
        return oip_pb2.InferParameter(uint64_param=value)
    raise InvalidInput(f"parameter {key!r}: expected a bool, text, float or 64-bit integer, got {value!r}")
