"""The Python clients, over each transport and in process: what they give, what they make of errors, how they retry."""

import asyncio
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace
from simulators.clients import (
    DOUBLE,
    EXPLANATION,
    KINDS,
    TIMEOUT_S,
    TRANSPORTS,
    Explaining,
    served,
    served_blocking,
)

from hedgerow import errors
from hedgerow.client import MAX_ATTEMPTS, AsyncClient, AsyncInferenceClient, Client, InferenceClient, Inputs
from hedgerow.client.retries import RETRY_BURST, RETRY_SHARE
from hedgerow.config import ServerSettings
from hedgerow.errors import HedgerowError
from hedgerow.function import FunctionBackend, FunctionModel
from hedgerow.server import Server
from hedgerow.tensors import TensorSpec

kinds = pytest.mark.parametrize("kind", KINDS)
TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
X = np.arange(3, dtype=np.float32)


@kinds
def test_arrays_in_arrays_and_the_reason_out(kind: str) -> None:
    backend = Explaining()
    with served_blocking(kind, backend) as client:
        assert client.ready()
        assert client.ready("double", "3")
        assert not client.ready("double", "4")
        assert not client.ready("no-such-model")
        assert client.metadata("double") == DOUBLE
        for inputs in ({"x": X}, X):
            result = client.infer("double", inputs, id="me", parameters={"n": 1})
            assert result.outputs["y"].tolist() == [0, 2, 4]
        assert (result.model, result.model_version, result.id) == ("double", "3", "me")
        assert (result.tier, result.reason, result.confidence) == ("edge", "sure enough", 0.75)
        assert (result.release, result.degraded) == ("double/3", True)
        assert result.parameters == EXPLANATION
        assert backend.requests[-1].parameters == {"n": 1}

        joined = client.infer("join", {"a": ["grün"], "b": np.array([b"\0"], object)}, outputs=["ba"])
        assert {name: array.tolist() for name, array in joined.outputs.items()} == {"ba": [b"\0" + "grün".encode()]}
        with pytest.raises(errors.InvalidInput, match=r"has 2 inputs \(a, b\): give the arrays by name"):
            client.infer("join", X)
        many = client.infer_many("double", [X, X + 1])
        assert [result.outputs["y"].tolist() for result in many] == [[0, 2, 4], [2, 4, 6]]


@kinds
async def test_the_async_client_gives_the_same(kind: str) -> None:
    async with served(kind, Explaining()) as client:
        assert await client.ready()
        assert await client.ready("double")
        assert not await client.ready("no-such-model")
        assert await client.metadata("double") == DOUBLE
        results = await asyncio.gather(*(client.infer("double", X + i, id=str(i)) for i in range(20)))
        assert [result.id for result in results] == [str(i) for i in range(20)]
        assert all((result.outputs["y"] == 2 * (X + i)).all() for i, result in enumerate(results))
        assert (results[0].tier, results[0].parameters) == ("edge", EXPLANATION)


@kinds
def test_threads_share_a_client(kind: str) -> None:
    def ask(client: InferenceClient, number: int) -> tuple[str, list[float]]:
        result = client.infer("double", X + number, id=str(number))
        return result.id, result.outputs["y"].tolist()

    with served_blocking(kind, Explaining()) as client, ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(lambda number: ask(client, number), range(100)))
    assert answers == [(str(number), (2 * (X + number)).tolist()) for number in range(100)]


@kinds
async def test_what_is_said_with_a_request_arrives(kind: str) -> None:
    backend = Explaining()
    async with served(kind, backend) as client:
        await client.infer(
            "double", X, priority=1, privacy="edge-only", tenant="acme", traceparent=TRACE, parameters={"n": 0.5}
        )
        request = backend.requests[-1]
        assert request.parameters == {"priority": 1, "hedgerow_privacy": "edge-only", "n": 0.5}
        assert (request.origin.tenant, request.origin.traceparent) == ("acme", TRACE)

        scores = np.array([[1, 3, 2], [7, 7, 9]], np.float32)
        for outputs in ([], ["y"]):
            result = await client.infer("scores", scores, classes=2, outputs=outputs)
            assert result.outputs["y"].tolist() == [
                [b"6.000000:1:one", b"4.000000:2:two"],
                [b"18.000000:2:two", b"14.000000:0:none"],
            ]

        asked = backend.calls
        for wrong in (
            client.infer("double", X, privacy="edge_only"),
            client.infer("double", X, tenant="ac\nme"),
            client.infer("double", X, traceparent="größe"),
            client.infer("double", X, classes=-1),
        ):
            with pytest.raises(errors.InvalidInput, match=r"privacy|tenant|traceparent|classes"):
                await wrong
        assert backend.calls == asked


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        ({"x": np.array([1.0])}, "input 'x': expected FP32 [-1], got FP64 [1]"),
        ({"x": np.zeros((2, 2), np.float32)}, "input 'x': expected FP32 [-1], got FP32 [2, 2]"),
        ({"z": X}, "input 'x' is missing: model double expects x FP32 [-1]"),
        ({"x": np.array([1j])}, "arrays of complex128 have no datatype in the protocol"),
        ({"x": np.array([1, b"1"], object)}, "input 'x': expected BYTES elements to be bytes, got int"),
    ],
)
@kinds
async def test_a_wrong_input_is_refused_in_the_same_words_everywhere(kind: str, inputs: Inputs, said: str) -> None:
    backend = Explaining()
    async with served(kind, backend) as client:
        with pytest.raises(errors.InvalidInput) as caught:
            await client.infer("double", inputs)
        assert said in str(caught.value)
        with pytest.raises(errors.InvalidInput, match="parameter 'n'"):
            await client.infer("double", X, parameters={"n": None})  # type: ignore[dict-item]
        with pytest.raises(errors.ModelNotFound, match="'no-such-model'"):
            await client.infer("no-such-model", {"x": X})
    assert not backend.calls


@pytest.mark.parametrize(
    "error",
    [
        errors.InvalidInput,
        errors.Unavailable,
        errors.Overloaded,
        errors.DeadlineExceeded,
        errors.Forbidden,
        errors.Unsupported,
    ],
)
@kinds
async def test_an_error_arrives_as_what_it_was_with_its_message(kind: str, error: type[HedgerowError]) -> None:
    backend = Explaining()
    async with served(kind, backend) as client:
        backend.failures = [lambda: error("the reason", retry_after_s=0.05)] * MAX_ATTEMPTS
        with pytest.raises(error, match="the reason") as caught:
            await client.infer("double", {"x": X})
        assert type(caught.value) is error
        assert caught.value.retry_after_s == 0.05


@kinds
async def test_a_bug_on_the_other_side_arrives_as_its_id(kind: str) -> None:
    backend = Explaining()
    async with served(kind, backend) as client:
        backend.failures = [lambda: KeyError("secret")]
        with pytest.raises(HedgerowError, match=r"internal error [0-9a-f]{12}"):
            await client.infer("double", {"x": X})


@kinds
async def test_the_deadline_holds_and_the_work_is_dropped(kind: str) -> None:
    backend = Explaining()
    async with served(kind, backend) as client:
        with pytest.raises(errors.DeadlineExceeded):
            await client.infer("held", {"x": X}, timeout_s=0.2)
        assert await asyncio.to_thread(backend.cancelled.acquire, timeout=TIMEOUT_S)


@kinds
def test_the_deadline_holds_for_those_who_block(kind: str) -> None:
    backend = Explaining()
    with served_blocking(kind, backend) as client:
        with pytest.raises(errors.DeadlineExceeded):
            client.infer("held", {"x": X}, timeout_s=0.2)
        assert backend.cancelled.acquire(timeout=TIMEOUT_S)


@kinds
async def test_a_caller_who_is_cancelled_cancels_the_work(kind: str) -> None:
    backend = Explaining()
    async with served(kind, backend) as client, asyncio.TaskGroup() as group:
        call = group.create_task(client.infer("held", {"x": X}))
        assert await asyncio.to_thread(backend.begun.acquire, timeout=TIMEOUT_S)
        call.cancel()
        assert await asyncio.to_thread(backend.cancelled.acquire, timeout=TIMEOUT_S)
    assert call.cancelled()


@kinds
async def test_a_bad_moment_is_tried_again_but_only_so_often(kind: str) -> None:
    backend = Explaining()
    async with served(kind, backend) as client:
        for error in (errors.Unavailable("loading"), errors.Overloaded("full", retry_after_s=0.001)):
            backend.requests.clear()
            backend.failures = [raises(error)] * (MAX_ATTEMPTS - 1)
            assert (await client.infer("double", {"x": X})).outputs["y"].tolist() == [0, 2, 4]
            assert backend.calls == MAX_ATTEMPTS

        backend.requests.clear()
        backend.failures = [raises(errors.Overloaded("full, and no idea for how long"))]
        with pytest.raises(errors.Overloaded):
            await client.infer("double", {"x": X})
        assert backend.calls == 1


def raises(error: HedgerowError) -> Callable[[], HedgerowError]:
    return lambda: type(error)(str(error), retry_after_s=error.retry_after_s)


@kinds
def test_those_who_block_try_again_too(kind: str) -> None:
    backend = Explaining()
    with served_blocking(kind, backend) as client:
        backend.failures = [raises(errors.Unavailable("loading"))] * (MAX_ATTEMPTS - 1)
        assert client.infer("double", {"x": X}).outputs["y"].tolist() == [0, 2, 4]
        assert backend.calls == MAX_ATTEMPTS


@kinds
async def test_a_request_that_is_larger_than_a_buffer_is_tried_again(kind: str) -> None:
    backend, picture = Explaining(), np.ones(2**20, np.float32)
    async with served(kind, backend) as client:
        backend.failures = [raises(errors.Unavailable("loading"))]
        assert (await client.infer("double", {"x": picture})).outputs["y"].shape == (2**20,)
        assert backend.calls == 2


@kinds
async def test_a_server_that_asks_for_more_patience_than_there_is_is_quoted_at_once(kind: str) -> None:
    backend = Explaining()
    async with served(kind, backend) as client:
        backend.failures = [raises(errors.Unavailable("loading", retry_after_s=15.0))]
        with pytest.raises(errors.Unavailable, match="loading"):
            await client.infer("double", {"x": X}, timeout_s=10)
        assert backend.calls == 1


@kinds
async def test_a_server_is_left_alone_for_as_long_as_it_asks(kind: str) -> None:
    backend = Explaining()
    async with served(kind, backend) as client:
        backend.failures = [raises(errors.Overloaded("full", retry_after_s=0.3))]
        started = time.monotonic()
        await client.infer("double", {"x": X})
        assert time.monotonic() - started >= 0.3
        assert backend.calls == 2


@kinds
async def test_a_server_that_keeps_failing_is_not_sent_more_by_retrying(kind: str) -> None:
    backend, calls = Explaining(), 50
    async with served(kind, backend) as client:
        backend.failures = [raises(errors.Unavailable("loading", retry_after_s=0.001))] * 1000
        for _ in range(calls):
            with pytest.raises(errors.Unavailable):
                await client.infer("double", {"x": X})
        assert calls < backend.calls <= calls + RETRY_BURST + RETRY_SHARE * calls


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_whoever_wants_no_retries_has_none(transport: str) -> None:
    backend = Explaining()
    async with (
        Server(backend, ServerSettings(port=0, transport=transport)) as server,
        AsyncClient(server.address, attempts=1) as client,
    ):
        backend.failures = [raises(errors.Unavailable("loading"))]
        with pytest.raises(errors.Unavailable, match="loading"):
            await client.infer("double", {"x": X})
        assert backend.calls == 1


async def test_a_server_that_is_not_there_is_not_ready() -> None:
    async with Server(FunctionBackend(), ServerSettings(port=0)) as server:
        address = server.address
    async with AsyncClient(address, timeout_s=5) as client:
        assert not await client.ready()
        with pytest.raises(errors.Unavailable):
            await client.infer("double", {"x": X})


async def test_a_closed_client_says_so_to_those_who_wait_and_those_who_come() -> None:
    backend = Explaining()
    async with Server(backend, ServerSettings(port=0, drain_s=0.1)) as server, AsyncClient(server.address) as client:
        async with asyncio.TaskGroup() as group:
            call = group.create_task(failure(client.infer("held", {"x": X})))
            assert await asyncio.to_thread(backend.begun.acquire, timeout=TIMEOUT_S)
            await client.close()
        assert "closed" in str(call.result())
        assert "closed" in str(await failure(client.infer("double", {"x": X})))
    with Client(server.address) as blocking:
        pass
    with pytest.raises(HedgerowError, match="closed"):
        blocking.infer("double", {"x": X})


async def failure(call: Coroutine[Any, Any, Any]) -> HedgerowError | None:
    try:
        await call
    except HedgerowError as error:
        return error
    return None


async def ask_for_y(client: AsyncInferenceClient) -> list[float]:
    result: list[float] = (await client.infer("double", X)).outputs["y"].tolist()
    return result


async def test_a_bare_array_finds_its_input_again_after_the_model_was_replaced() -> None:
    renamed = replace(DOUBLE, inputs=(TensorSpec("image", "FP32", (-1,)),))
    first = Server(Explaining(), ServerSettings(port=0))
    port = await first.start()
    async with AsyncClient(first.address) as client:
        await ask_for_y(client)
        await first.stop()
        backend = FunctionBackend(FunctionModel(renamed, lambda inputs: {"y": inputs["image"]}))
        async with Server(backend, ServerSettings(port=port)):
            with pytest.raises(errors.InvalidInput, match="'image' is missing"):
                await ask_for_y(client)
            assert await ask_for_y(client) == X.tolist()


async def test_a_stream_of_bare_arrays_finds_their_input_again_too() -> None:
    renamed = replace(DOUBLE, inputs=(TensorSpec("image", "FP32", (-1,)),))
    first = Server(Explaining(), ServerSettings(port=0))
    port = await first.start()
    async with AsyncClient(first.address) as client:
        await ask_for_y(client)
        await first.stop()
        backend = FunctionBackend(FunctionModel(renamed, lambda inputs: {"y": inputs["image"]}))
        async with (
            Server(backend, ServerSettings(port=port)),
            client.stream("double", [X] * 9, read_ahead=1) as answers,
        ):
            outcomes = [outcome async for outcome in answers.outcomes()]
            assert isinstance(outcomes[0], HedgerowError)
            assert "'image' is missing" in str(outcomes[0])
            assert not isinstance(outcomes[-1], HedgerowError)
