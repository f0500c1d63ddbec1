"""Every kind of client over one backend whose moves a test decides: over each transport, and in this process."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from typing import Any, Final

import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray
from simulators.background import in_background

from hedgerow.backend import Deadline
from hedgerow.client import (
    AsyncClient,
    AsyncInferenceClient,
    AsyncLocalClient,
    Client,
    InferenceClient,
    LocalClient,
)
from hedgerow.config import ServerSettings
from hedgerow.function import FunctionBackend, FunctionModel
from hedgerow.server import Server
from hedgerow.tensors import InferRequest, InferResponse, ModelMetadata, Parameter, TensorSpec

TRANSPORTS: Final = ("native", "grpcio")
KINDS: Final = (*TRANSPORTS, "local")
TIMEOUT_S: Final = 60.0

_X, _Y = TensorSpec("x", "FP32", (-1,)), TensorSpec("y", "FP32", (-1,))
DOUBLE = ModelMetadata("double", ("3",), "python", (_X,), (_Y,), {"sha256": "ff"})
JOIN = ModelMetadata(
    "join",
    ("1",),
    "python",
    (TensorSpec("a", "BYTES", (-1,)), TensorSpec("b", "BYTES", (-1,))),
    (TensorSpec("ab", "BYTES", (-1,)), TensorSpec("ba", "BYTES", (-1,))),
)
EACH = ModelMetadata("each", ("1",), "python", (_X,), (_Y,), {"decoupled": "true"})
SCORES = ModelMetadata(
    "scores",
    ("1",),
    "python",
    (TensorSpec("x", "FP32", (-1, 3)),),
    (TensorSpec("y", "FP32", (-1, 3)),),
    {"labels": "none,one,two"},
)
HELD = ModelMetadata("held", ("1",), "python", (_X,), (_Y,))
EXPLANATION: dict[str, Parameter] = {
    "hedgerow_tier": "edge", "hedgerow_reason": "sure enough", "hedgerow_confidence": 0.75,
    "hedgerow_release": "double/3", "hedgerow_degraded": True,
}  # fmt: skip

Arrays = Mapping[str, NDArray[Any]]


class Explaining(FunctionBackend):
    """Says what a router says, and fails as often as it is told to.

    Its models: `double` and, by rows of three, `scores`; `join` for text; `each`, which answers with one value after
    the other; and `held`, which answers when it is let.
    """

    def __init__(self) -> None:
        super().__init__(
            FunctionModel(DOUBLE, self._double),
            FunctionModel(SCORES, self._double),
            FunctionModel(JOIN, lambda i: {"ab": i["a"] + i["b"], "ba": i["b"] + i["a"]}),
            FunctionModel(EACH, self._each),
            FunctionModel(HELD, self._held),
        )
        self.failures: list[Callable[[], Exception]] = []
        self.requests: list[InferRequest] = []
        self.let = asyncio.Event()
        self.begun, self.cancelled = threading.Semaphore(0), threading.Semaphore(0)
        """Released as `held` is asked, and as it is cancelled."""

    @property
    def calls(self) -> int:
        return len(self.requests)

    async def infer(self, request: InferRequest, deadline: Deadline) -> InferResponse:
        self.requests.append(request)
        if self.failures:
            fail = self.failures.pop(0)
            raise fail()
        return replace(await super().infer(request, deadline), parameters=EXPLANATION)

    @staticmethod
    async def _double(inputs: Arrays) -> Arrays:
        if np.isnan(inputs["x"]).any():
            raise ValueError("poison")
        return {"y": inputs["x"] * 2}

    @staticmethod
    async def _each(inputs: Arrays) -> AsyncIterator[Arrays]:
        for value in inputs["x"]:
            yield {"y": np.array([value])}

    async def _held(self, inputs: Arrays) -> Arrays:
        self.begun.release()
        try:
            await self.let.wait()
        except asyncio.CancelledError:
            self.cancelled.release()
            raise
        return {"y": inputs["x"]}


@asynccontextmanager
async def served(kind: str, backend: FunctionBackend) -> AsyncIterator[AsyncInferenceClient]:
    """A client of `kind`."""
    if kind == "local":
        async with AsyncLocalClient(backend, timeout_s=TIMEOUT_S) as local:
            yield local
    else:
        async with (
            Server(backend, ServerSettings(port=0, transport=kind, drain_s=0.1)) as server,
            AsyncClient(server.address, timeout_s=TIMEOUT_S) as client,
        ):
            yield client


@contextmanager
def served_blocking(kind: str, backend: FunctionBackend) -> Iterator[InferenceClient]:
    """A client of `kind` that blocks."""
    if kind == "local":
        with LocalClient(backend, timeout_s=TIMEOUT_S) as local:
            yield local
        return
    settings = ServerSettings(port=0, transport=kind, drain_s=0.1)
    with (
        in_background(lambda: Server(backend, settings)) as server,
        Client(server.address, timeout_s=TIMEOUT_S) as client,
    ):
        yield client
