"""The service over Python functions, under the OIP contract."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pytest
from contract.oip import OipContract, Target
from numpy.typing import NDArray
from simulators.background import in_background

from hedgerow import transports
from hedgerow.config import ServerSettings
from hedgerow.function import FunctionBackend, FunctionModel
from hedgerow.server import Server
from hedgerow.tensors import ModelMetadata, TensorSpec

MAX_MESSAGE_BYTES = 2**20

# The model of Triton's own examples.
SIMPLE = ModelMetadata(
    "simple",
    ("1",),
    "python",
    (TensorSpec("INPUT0", "INT32", (-1, 16)), TensorSpec("INPUT1", "INT32", (-1, 16))),
    (TensorSpec("OUTPUT0", "INT32", (-1, 16)), TensorSpec("OUTPUT1", "INT32", (-1, 16))),
)
ECHO = ModelMetadata(
    "echo", ("7",), "python", (TensorSpec("text", "BYTES", (-1, 2)),), (TensorSpec("text", "BYTES", (-1, 2)),)
)


def simple(inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    a, b = inputs["INPUT0"], inputs["INPUT1"]
    return {"OUTPUT0": a + b, "OUTPUT1": a - b}


async def echo(inputs: Mapping[str, NDArray[Any]]) -> Mapping[str, NDArray[Any]]:
    return inputs


def simple_inputs() -> dict[str, NDArray[Any]]:
    return {"INPUT0": np.arange(32, dtype=np.int32).reshape(2, 16), "INPUT1": np.full((2, 16), -3, np.int32)}


def echo_inputs() -> dict[str, NDArray[Any]]:
    return {"text": np.array([["grün".encode(), b"nul\0inside\0"], [b"", b"x" * 1000]], dtype=object)}


@pytest.fixture(scope="module", params=transports.known())
def address(request: pytest.FixtureRequest) -> Iterator[str]:
    backend = FunctionBackend(FunctionModel(SIMPLE, simple), FunctionModel(ECHO, echo))
    settings = ServerSettings(port=0, max_message_bytes=MAX_MESSAGE_BYTES, transport=request.param)
    with in_background(lambda: Server(backend, settings)) as server:
        yield server.address


class TestServiceWithNumbers(OipContract):
    @pytest.fixture
    def target(self, address: str) -> Target:
        return Target(address, "simple", simple_inputs, MAX_MESSAGE_BYTES)


class TestServiceWithText(OipContract):
    @pytest.fixture
    def target(self, address: str) -> Target:
        return Target(address, "echo", echo_inputs, MAX_MESSAGE_BYTES)
