"""The models that Triton's own client examples call, by their stock names, shapes and behaviour."""

from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hedgerow.backend import Deadline
from hedgerow.function import FunctionBackend, FunctionModel
from hedgerow.tensors import InferRequest, InferResponse, ModelMetadata, TensorSpec, tensor

Arrays = Mapping[str, NDArray[Any]]
Interface = Mapping[str, tuple[str, tuple[int, ...]]]
"""Datatype and shape by tensor."""

SEQUENCE = "simple_sequence"


def sum_and_difference(inputs: Arrays) -> Arrays:
    a, b = inputs["INPUT0"], inputs["INPUT1"]
    return {"OUTPUT0": a + b, "OUTPUT1": a - b}


def sum_and_difference_of_digits(inputs: Arrays) -> Arrays:
    """The same for numbers written out in BYTES."""
    numbers = {name: array.astype(np.int64) for name, array in inputs.items()}
    return {
        name: np.array([str(one).encode() for one in array.ravel()], object).reshape(array.shape)
        for name, array in sum_and_difference(numbers).items()
    }


def identity(inputs: Arrays) -> Arrays:
    return {"OUTPUT0": inputs["INPUT0"]}


async def repeat(inputs: Arrays) -> AsyncIterator[Arrays]:
    """An answer an element; the delays that clients ask for are not waited for."""
    for index, value in enumerate(inputs["IN"]):
        yield {"OUT": np.array([value], np.int32), "IDX": np.array([index], np.uint32)}


def classify(inputs: Arrays) -> Arrays:
    return {"fc6_1": np.full((1000, 1, 1), inputs["data_0"].size, np.float32)}


def model(name: str, function: Any, inputs: Interface, outputs: Interface) -> FunctionModel:
    def specs(interface: Interface) -> tuple[TensorSpec, ...]:
        return tuple(TensorSpec(tensor_name, *kind) for tensor_name, kind in interface.items())

    return FunctionModel(ModelMetadata(name, ("1",), "python", specs(inputs), specs(outputs)), function)


def arithmetic(name: str, function: Any, datatype: str) -> FunctionModel:
    """Two rows of 16 into their sum and difference."""
    row = (datatype, (-1, 16))
    return model(name, function, {"INPUT0": row, "INPUT1": row}, {"OUTPUT0": row, "OUTPUT1": row})


def one_to_one(name: str, function: Any, datatype: str, *, numbered: bool = True) -> FunctionModel:
    rows = (datatype, (-1, -1))
    digit = "0" if numbered else ""
    return model(name, function, {f"INPUT{digit}": rows}, {f"OUTPUT{digit}": rows})


MODELS = (
    arithmetic("simple", sum_and_difference, "INT32"),
    arithmetic("simple_int8", sum_and_difference, "INT8"),
    arithmetic("simple_string", sum_and_difference_of_digits, "BYTES"),
    one_to_one("simple_identity", identity, "BYTES"),
    one_to_one(SEQUENCE, identity, "INT32", numbered=False),
    one_to_one("custom_identity_int32", identity, "INT32"),
    model(
        "repeat_int32",
        repeat,
        {"IN": ("INT32", (-1,)), "DELAY": ("UINT32", (-1,)), "WAIT": ("UINT32", (1,))},
        {"OUT": ("INT32", (1,)), "IDX": ("UINT32", (1,))},
    ),
    model("densenet_onnx", classify, {"data_0": ("FP32", (3, 224, 224))}, {"fc6_1": ("FP32", (1000, 1, 1))}),
)
"""Eight, as the model control example counts them."""


class TritonModels(FunctionBackend):
    """All of them. The sequence model adds one to the first value of a sequence, which only the parameters tell."""

    def __init__(self) -> None:
        super().__init__(*MODELS, name="triton-models")

    async def stream(self, request: InferRequest, deadline: Deadline) -> AsyncGenerator[InferResponse, None]:
        if request.model == SEQUENCE:
            first = bool(request.parameters.get("sequence_start", False))
            output = tensor("OUTPUT", request.input("INPUT") + np.int32(first))
            yield InferResponse(model=SEQUENCE, version="1", outputs=(output,), id=request.id)
            return
        async with aclosing(super().stream(request, deadline)) as responses:
            async for response in responses:
                yield response
