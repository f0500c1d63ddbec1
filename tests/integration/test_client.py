"""The Python client: what it gives, what it makes of errors, and that its retries stay within bounds."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace

import numpy as np
import pytest
from simulators.background import in_background

from hedgerow import errors
from hedgerow.backend import Deadline
from hedgerow.client import MAX_ATTEMPTS, AsyncClient, Client
from hedgerow.config import ServerSettings
from hedgerow.errors import HedgerowError
from hedgerow.function import FunctionBackend, FunctionModel
from hedgerow.service import Server
from hedgerow.tensors import InferRequest, InferResponse, ModelMetadata, Parameter, TensorSpec

DOUBLE = ModelMetadata(
    "double", ("3",), "python", (TensorSpec("x", "FP32", (-1,)),), (TensorSpec("y", "FP32", (-1,)),), {"sha256": "ff"}
)
JOIN = ModelMetadata(
    "join",
    ("1",),
    "python",
    (TensorSpec("a", "BYTES", (-1,)), TensorSpec("b", "BYTES", (-1,))),
    (TensorSpec("ab", "BYTES", (-1,)), TensorSpec("ba", "BYTES", (-1,))),
)
EXPLANATION: dict[str, Parameter] = {
    "hedgerow_tier": "edge", "hedgerow_reason": "sure enough", "hedgerow_confidence": 0.75,
    "hedgerow_release": "double/3", "hedgerow_degraded": True,
}  # fmt: skip


class Explaining(FunctionBackend):
    """Says what a router says, and fails as often as it is told to."""

    def __init__(self) -> None:
        super().__init__(
            FunctionModel(DOUBLE, lambda inputs: {"y": inputs["x"] * 2}),
            FunctionModel(JOIN, lambda i: {"ab": i["a"] + i["b"], "ba": i["b"] + i["a"]}),
        )
        self.failures: list[Callable[[], Exception]] = []
        self.calls = 0
        self.requests: list[InferRequest] = []

    async def infer(self, request: InferRequest, deadline: Deadline) -> InferResponse:
        self.calls += 1
        self.requests.append(request)
        if self.failures:
            fail = self.failures.pop(0)
            raise fail()
        return replace(await super().infer(request, deadline), parameters=EXPLANATION)


@asynccontextmanager
async def connected() -> AsyncIterator[tuple[Explaining, AsyncClient]]:
    backend = Explaining()
    async with Server(backend, ServerSettings(port=0)) as server, AsyncClient(server.address, timeout_s=20) as client:
        yield backend, client


X = np.arange(3, dtype=np.float32)


def test_arrays_in_arrays_and_the_reason_out() -> None:
    backend = Explaining()
    with in_background(lambda: Server(backend, ServerSettings(port=0))) as server, Client(server.address) as client:
        assert client.ready()
        assert client.ready("double", "3")
        assert not client.ready("double", "4")
        assert not client.ready("no-such-model")
        assert client.metadata("double") == DOUBLE
        for inputs in ({"x": X}, X):
            result = client.infer("double", inputs, id="me", parameters={"hedgerow_privacy": "no-learning", "n": 1})
            assert result.outputs["y"].tolist() == [0, 2, 4]
        assert (result.model, result.model_version, result.id) == ("double", "3", "me")
        assert (result.tier, result.reason, result.confidence) == ("edge", "sure enough", 0.75)
        assert (result.release, result.degraded) == ("double/3", True)
        assert result.parameters == EXPLANATION
        assert backend.requests[-1].parameters == {"hedgerow_privacy": "no-learning", "n": 1}

        joined = client.infer("join", {"a": ["grün"], "b": np.array([b"\0"], object)}, outputs=["ba"])
        assert {name: array.tolist() for name, array in joined.outputs.items()} == {"ba": [b"\0" + "grün".encode()]}
        with pytest.raises(errors.InvalidInput, match=r"has 2 inputs \(a, b\): give the arrays by name"):
            client.infer("join", X)


async def test_the_async_client_gives_the_same() -> None:
    async with connected() as (_, client):
        assert await client.ready("double")
        assert await client.metadata("double") == DOUBLE
        results = await asyncio.gather(*(client.infer("double", X + i, id=str(i)) for i in range(20)))
        assert [result.id for result in results] == [str(i) for i in range(20)]
        assert all((result.outputs["y"] == 2 * (X + i)).all() for i, result in enumerate(results))
        assert results[0].tier == "edge"


@pytest.mark.parametrize(
    "kind",
    [
        errors.InvalidInput,
        errors.ModelNotFound,
        errors.Unavailable,
        errors.Overloaded,
        errors.DeadlineExceeded,
        errors.Forbidden,
        errors.Unsupported,
    ],
)
async def test_an_error_arrives_as_what_it_was_with_its_message(kind: type[HedgerowError]) -> None:
    async with connected() as (backend, client):
        backend.failures = [lambda: kind("the reason", retry_after_s=0.05)] * MAX_ATTEMPTS
        with pytest.raises(kind, match="the reason") as caught:
            await client.infer("double", {"x": X})
        assert type(caught.value) is kind
        assert caught.value.retry_after_s == 0.05


async def test_a_bug_on_the_other_side_arrives_as_its_id() -> None:
    async with connected() as (backend, client):
        backend.failures = [lambda: KeyError("secret")]
        with pytest.raises(HedgerowError, match=r"internal error [0-9a-f]{12}"):
            await client.infer("double", {"x": X})


async def test_only_unavailable_is_tried_again_and_only_so_often() -> None:
    async with connected() as (backend, client):
        backend.failures = [lambda: errors.Unavailable("loading")] * (MAX_ATTEMPTS - 1)
        assert (await client.infer("double", {"x": X})).outputs["y"].tolist() == [0, 2, 4]
        assert backend.calls == MAX_ATTEMPTS

        backend.calls, backend.failures = 0, [lambda: errors.Unavailable("loading")] * (MAX_ATTEMPTS + 1)
        with pytest.raises(errors.Unavailable, match="loading"):
            await client.infer("double", {"x": X})
        assert backend.calls == MAX_ATTEMPTS

        backend.calls, backend.failures = 0, [lambda: errors.Overloaded("full")] * 2
        with pytest.raises(errors.Overloaded):
            await client.infer("double", {"x": X})
        assert backend.calls == 1


async def test_a_server_that_asks_for_patience_does_not_hold_a_caller_past_the_deadline() -> None:
    async with connected() as (backend, client):
        backend.failures = [lambda: errors.Unavailable("loading", retry_after_s=15.0)]
        started = time.monotonic()
        with pytest.raises((errors.Unavailable, errors.DeadlineExceeded)):
            await client.infer("double", {"x": X}, timeout_s=0.3)
        assert time.monotonic() - started < 5
        assert backend.calls == 1


async def test_come_back_at_once_is_no_trap() -> None:
    async with connected() as (backend, client):
        backend.failures = [lambda: errors.Unavailable("loading", retry_after_s=0.0)]
        assert (await client.infer("double", {"x": X})).outputs["y"].tolist() == [0, 2, 4]


async def test_a_server_that_keeps_failing_is_not_sent_more_by_retrying() -> None:
    async with connected() as (backend, client):
        backend.failures = [lambda: errors.Unavailable("loading", retry_after_s=0.001)] * 1000
        for _ in range(20):
            with pytest.raises(errors.Unavailable):
                await client.infer("double", {"x": X})
        assert backend.calls < 20 * 1.5


async def test_a_server_that_is_not_there_is_not_ready() -> None:
    async with Server(FunctionBackend(), ServerSettings(port=0)) as server:
        address = server.address
    async with AsyncClient(address, timeout_s=5) as client:
        assert not await client.ready()
        with pytest.raises(errors.Unavailable):
            await client.infer("double", {"x": X})


async def test_a_bare_array_finds_its_input_again_after_the_model_was_replaced() -> None:
    renamed = replace(DOUBLE, inputs=(TensorSpec("image", "FP32", (-1,)),))
    first = Server(Explaining(), ServerSettings(port=0))
    port = await first.start()
    async with AsyncClient(first.address) as client:
        await client.infer("double", X)
        await first.stop()
        backend = FunctionBackend(FunctionModel(renamed, lambda inputs: {"y": inputs["image"]}))
        async with Server(backend, ServerSettings(port=port)):
            with pytest.raises(errors.InvalidInput, match="'image' is missing"):
                await client.infer("double", X)
            assert (await client.infer("double", X)).outputs["y"].tolist() == X.tolist()
