"""Ways to spoil a valid raw request for a model. Each gives the words that our own servers' error must contain.

Other servers need only refuse with the status. A way that a model leaves no room for skips its test and says why.
"""

from collections.abc import Callable
from typing import Any

import grpc
import numpy as np
import pytest

from hedgerow.proto import oip_pb2
from hedgerow.tensors import numpy_dtype

Request = oip_pb2.ModelInferRequest
Words = tuple[str, ...]
Spoil = Callable[[Request, oip_pb2.ModelMetadataResponse], Words]

INTEGERS = {"INT8": "int_contents", "INT16": "int_contents", "UINT8": "uint_contents", "UINT16": "uint_contents"}


def refill(message: Request, index: int) -> None:
    """Make the raw entry as long as datatype and shape say."""
    one = message.inputs[index]
    itemsize = 4 if one.datatype == "BYTES" else numpy_dtype(one.datatype).itemsize  # empty elements
    message.raw_input_contents[index] = bytes(itemsize * int(np.prod(one.shape)))


def wrong_rank(message: Request, _: Any) -> Words:
    message.inputs[0].shape.append(1)
    return message.inputs[0].name, "expected", "got", str(list(message.inputs[0].shape))


def wrong_dimension(message: Request, metadata: oip_pb2.ModelMetadataResponse) -> Words:
    """A fixed dimension that is one larger, with data to match."""
    specs = {spec.name: spec for spec in metadata.inputs}
    for index, one in enumerate(message.inputs):
        for axis, size in enumerate(specs[one.name].shape):
            if size > 0:
                one.shape[axis] += 1
                refill(message, index)
                return one.name, "expected", "got", str(list(one.shape))
    pytest.skip("the model has no fixed dimension")


def wrong_datatype(message: Request, _: Any) -> Words:
    first = message.inputs[0]
    was, first.datatype = first.datatype, "FP64" if first.datatype != "FP64" else "INT16"
    refill(message, 0)
    return first.name, f"expected {was}", f"got {first.datatype}"


def unheard_of_datatype(message: Request, _: Any) -> Words:
    message.inputs[0].datatype = "FP33"
    return message.inputs[0].name, "FP33"


def too_few_bytes(message: Request, _: Any) -> Words:
    message.raw_input_contents[0] = message.raw_input_contents[0][:-1]
    return message.inputs[0].name, "expected", "got"


def too_many_bytes(message: Request, _: Any) -> Words:
    message.raw_input_contents[0] += b"\0"
    return message.inputs[0].name, "expected", "got"


def text_length_beyond_the_end(message: Request, _: Any) -> Words:
    for index, one in enumerate(message.inputs):
        if one.datatype == "BYTES" and one.shape:
            message.raw_input_contents[index] = b"\xff\xff\xff\xff" + message.raw_input_contents[index][4:]
            return one.name, "expected", "got"
    pytest.skip("the model takes no BYTES")


def negative_dimension(message: Request, _: Any) -> Words:
    message.inputs[0].shape[0] = -1
    return message.inputs[0].name, "-1"


def dimensions_that_overflow(message: Request, _: Any) -> Words:
    message.inputs[0].shape[:] = [2**32, 2**32, 2**32]
    return message.inputs[0].name, str(2**32)


def raw_and_typed(message: Request, _: Any) -> Words:
    message.inputs[0].contents.fp64_contents.append(1.0)
    return message.inputs[0].name, "both"


def one_raw_too_many(message: Request, _: Any) -> Words:
    message.raw_input_contents.append(b"")
    return f"expected one raw entry for each of {len(message.inputs)}", f"got {len(message.inputs) + 1}"


def no_contents_at_all(message: Request, _: Any) -> Words:
    del message.raw_input_contents[:]
    return message.inputs[0].name, "expected", "got"


def typed_contents_of_another_datatype(message: Request, _: Any) -> Words:
    del message.raw_input_contents[:]
    for one in message.inputs:
        place = "fp64_contents" if one.datatype != "FP64" else "int64_contents"
        getattr(one.contents, place).extend([0] * int(np.prod(one.shape)))
    return message.inputs[0].name, "expected", "got"


def typed_half_precision(message: Request, _: Any) -> Words:
    halves = [one for one in message.inputs if one.datatype in {"FP16", "BF16"}]
    if not halves:
        pytest.skip("the model takes neither FP16 nor BF16")
    del message.raw_input_contents[:]
    for one in message.inputs:
        one.contents.fp32_contents.extend([0.0] * int(np.prod(one.shape)))
    return message.inputs[0].name, "expected"


def typed_integer_out_of_range(message: Request, _: Any) -> Words:
    if any(one.datatype not in INTEGERS for one in message.inputs):
        pytest.skip("the model takes more than narrow integers")
    del message.raw_input_contents[:]
    for one in message.inputs:
        getattr(one.contents, INTEGERS[one.datatype]).extend([2**17] * int(np.prod(one.shape)))
    return message.inputs[0].name, "expected", str(2**17)


def missing_input(message: Request, _: Any) -> Words:
    name = message.inputs[0].name
    del message.inputs[0], message.raw_input_contents[0]
    return name, "missing"


def extra_input(message: Request, _: Any) -> Words:
    message.inputs.add(name="surplus", datatype="FP32", shape=[1])
    message.raw_input_contents.append(bytes(4))
    return ("there is no input 'surplus'",)


def duplicate_input(message: Request, _: Any) -> Words:
    message.inputs.append(message.inputs[0])
    message.raw_input_contents.append(message.raw_input_contents[0])
    return message.inputs[0].name, "once"


def unknown_output(message: Request, _: Any) -> Words:
    message.outputs.add(name="surplus")
    return ("there is no output 'surplus'",)


def duplicate_output(message: Request, metadata: oip_pb2.ModelMetadataResponse) -> Words:
    for _ in range(2):
        message.outputs.add(name=metadata.outputs[0].name)
    return metadata.outputs[0].name, "once"


def valueless_parameter(message: Request, _: Any) -> Words:
    message.parameters["empty"].SetInParent()
    return ("empty",)


def no_model(message: Request, _: Any) -> Words:
    message.model_name = ""
    return ("names no model",)


def unknown_model(message: Request, _: Any) -> Words:
    message.model_name = "no-such-model"
    return ("no-such-model",)


def unknown_version(message: Request, _: Any) -> Words:
    message.model_version = "31337"
    return ("31337",)


def very_long_name(message: Request, _: Any) -> Words:
    """Must not burst the trailers that it is named in."""
    message.model_name = "\N{LATIN SMALL LETTER O WITH DIAERESIS}" * 20_000
    return ()


def shared_memory(message: Request, _: Any) -> Words:
    message.inputs[0].parameters["shared_memory_region"].string_param = "region"
    return message.inputs[0].name, "shared memory"


INVALID, NOT_FOUND = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND
MUST_REFUSE: list[tuple[Spoil, grpc.StatusCode]] = [
    *(
        (spoil, INVALID)
        for spoil in (
            wrong_rank, wrong_dimension, wrong_datatype, unheard_of_datatype, too_few_bytes, too_many_bytes,
            text_length_beyond_the_end, negative_dimension, dimensions_that_overflow, raw_and_typed, one_raw_too_many,
            no_contents_at_all, typed_half_precision, missing_input, extra_input, duplicate_input, unknown_output,
        )
    ),
    (unknown_model, NOT_FOUND),
    (unknown_version, NOT_FOUND),
]  # fmt: skip
"""What no server may answer, with the status it gets."""
SHOULD_REFUSE: list[tuple[Spoil, grpc.StatusCode]] = [
    (no_model, INVALID),
    (duplicate_output, INVALID),
    (typed_contents_of_another_datatype, INVALID),
    (typed_integer_out_of_range, INVALID),
    (valueless_parameter, INVALID),
    (very_long_name, NOT_FOUND),
]
"""What the protocol leaves open, or servers treat as they like."""
OURS_REFUSE: list[tuple[Spoil, grpc.StatusCode]] = [(shared_memory, grpc.StatusCode.UNIMPLEMENTED)]
"""What our servers refuse because they do not do it."""
