"""Streams of the Python clients, over each transport and in process: order, poison, flow, deadlines, closing."""

import asyncio
import gc
import itertools
import threading
from collections.abc import AsyncIterator, Coroutine, Iterable, Iterator
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from simulators.clients import KINDS, TIMEOUT_S, TRANSPORTS, Explaining, served, served_blocking

from hedgerow import errors
from hedgerow.client import AsyncClient, AsyncInferenceClient, Client, Result
from hedgerow.config import ServerSettings
from hedgerow.errors import HedgerowError
from hedgerow.server import Server
from hedgerow.transports.native import NativeListener

kinds = pytest.mark.parametrize("kind", KINDS)
REQUESTS = 100
POISON = [np.nan]
READ_AHEAD = 4

Array = NDArray[Any]


def numbers(start: int = 0) -> Iterator[Array]:
    return (np.full(2, value, np.float32) for value in itertools.count(start))


def some(count: int, start: int = 0) -> Iterator[Array]:
    return itertools.islice(numbers(start), count)


def floats(*rows: list[float]) -> list[Array]:
    return [np.array(row, np.float32) for row in rows]


def camera() -> Iterator[Array]:
    """Breaks after three pictures."""
    yield from some(3)
    raise OSError("the camera is gone")


async def follow(
    client: AsyncInferenceClient, model: str, inputs: Iterable[Array], got: list[Result], timeout_s: float | None = None
) -> None:
    """Take all answers of a stream, those before an error too, into `got`."""
    async with client.stream(model, inputs, timeout_s=timeout_s) as answers:
        async for result in answers:
            got.append(result)  # noqa: PERF401 (what comes before an error counts)


def values(outcomes: list[Result | HedgerowError]) -> list[float | str]:
    """The first value of each answer; of an error its note."""
    return [one.__notes__[0] if isinstance(one, HedgerowError) else float(one.outputs["y"][0]) for one in outcomes]


@kinds
async def test_answers_come_in_order_and_say_their_place(kind: str) -> None:
    async with served(kind, Explaining()) as client, client.stream("double", some(REQUESTS)) as answers:
        results = [result async for result in answers]
    assert [result.outputs["y"].tolist() for result in results] == [[2 * i, 2 * i] for i in range(REQUESTS)]
    assert [result.id for result in results] == [str(i) for i in range(REQUESTS)]
    assert (results[0].model, results[0].model_version, results[0].parameters) == ("double", "3", {})


@kinds
def test_answers_come_in_order_and_say_their_place_to_those_who_block(kind: str) -> None:
    with served_blocking(kind, Explaining()) as client, client.stream("double", some(REQUESTS)) as answers:
        results = list(answers)
    assert [result.outputs["y"].tolist() for result in results] == [[2 * i, 2 * i] for i in range(REQUESTS)]
    assert [result.id for result in results] == [str(i) for i in range(REQUESTS)]
    assert (results[0].model, results[0].model_version, results[0].parameters) == ("double", "3", {})


@kinds
async def test_many_requests_at_once_are_a_list_of_results(kind: str) -> None:
    async with served(kind, Explaining()) as client:
        results = await client.infer_many("double", some(30), outputs=["y"])
        assert [float(result.outputs["y"][0]) for result in results] == [2 * i for i in range(30)]
        with pytest.raises(HedgerowError, match="ValueError"):
            await client.infer_many("double", floats([1.0], POISON, [3.0]))


POISONED = [*floats([1], POISON, [3]), np.array([4.0]), np.array([1j], np.complex64), *floats([6])]
"""The second fails in the model, the fourth and the fifth before they get there."""


@kinds
async def test_a_poisoned_request_fails_in_its_place_and_no_other_does(kind: str) -> None:
    expected = [2.0, "request 1 of the stream", 6.0, "request 3 of the stream", "request 4 of the stream", 12.0]
    async with served(kind, Explaining()) as client:
        async with client.stream("double", POISONED) as answers:
            outcomes = [outcome async for outcome in answers.outcomes()]
        assert values(outcomes) == expected
        assert "expected FP32 [-1], got FP64 [1]" in str(outcomes[3])
        assert isinstance(outcomes[4], errors.InvalidInput)
        assert "complex64" in str(outcomes[4])

        caught: list[Result | HedgerowError] = []
        async with client.stream("double", POISONED) as answers:
            while True:
                try:
                    caught.append(await anext(answers))
                except HedgerowError as error:  # raised in its place; the stream goes on
                    caught.append(error)
                except StopAsyncIteration:
                    break
        assert values(caught) == expected


@kinds
def test_a_poisoned_request_fails_in_its_place_for_those_who_block(kind: str) -> None:
    expected = [2.0, "request 1 of the stream", 6.0, "request 3 of the stream", "request 4 of the stream", 12.0]
    with served_blocking(kind, Explaining()) as client:
        with client.stream("double", POISONED) as answers:
            assert values(list(answers.outcomes())) == expected
        with client.stream("double", POISONED) as answers:
            assert next(answers).id == "0"
            with pytest.raises(HedgerowError, match="ValueError"):
                next(answers)
            assert next(answers).id == "2"


@kinds
async def test_a_model_may_give_several_answers_to_a_request_or_none(kind: str) -> None:
    rows = floats([1, 2, 3], [], [4], *([value, value] for value in np.arange(5.0, 30.0).tolist()))
    async with served(kind, Explaining()) as client, client.stream("each", rows, read_ahead=2) as answers:
        got = [(result.id, float(result.outputs["y"][0])) async for result in answers]
    assert got == [(str(place), value) for place, row in enumerate(rows) for value in row.tolist()]


@kinds
async def test_the_callers_iterable_is_read_only_so_far_ahead(kind: str) -> None:
    read = 0

    async def endless() -> AsyncIterator[Array]:
        nonlocal read
        for number in numbers():
            read += 1
            yield number
            await asyncio.sleep(0)

    async with served(kind, Explaining()) as client:
        async with client.stream("double", endless(), read_ahead=READ_AHEAD) as answers:
            for taken in range(1, 20):
                result = await anext(answers)
                assert result.id == str(taken - 1)
                await client.infer("double", next(numbers()))  # time for more to be read, if it were
                assert taken <= read <= taken + READ_AHEAD
        with pytest.raises(errors.InvalidInput, match="read_ahead"):
            async with client.stream("double", [], read_ahead=0):
                pass


@kinds
def test_the_iterable_of_those_who_block_is_read_only_so_far_ahead(kind: str) -> None:
    read = 0

    def endless() -> Iterator[Array]:
        nonlocal read
        for number in numbers():
            read += 1
            yield number

    with (
        served_blocking(kind, Explaining()) as client,
        client.stream("double", endless(), read_ahead=READ_AHEAD) as answers,
    ):
        for taken in range(1, 20):
            assert next(answers).id == str(taken - 1)
            client.infer("double", next(numbers()))
            assert taken <= read <= taken + READ_AHEAD


@kinds
async def test_an_answer_does_not_wait_for_the_next_request(kind: str) -> None:
    answered = asyncio.Event()

    async def one_by_one() -> AsyncIterator[Array]:
        for number in some(5):
            yield number
            await asyncio.wait_for(answered.wait(), TIMEOUT_S)
            answered.clear()

    ids = []
    async with served(kind, Explaining()) as client, client.stream("double", one_by_one()) as answers:
        async for result in answers:
            ids.append(result.id)
            answered.set()
    assert ids == ["0", "1", "2", "3", "4"]


@kinds
def test_an_answer_does_not_wait_for_the_next_request_of_those_who_block(kind: str) -> None:
    answered = threading.Semaphore(0)

    def one_by_one() -> Iterator[Array]:
        for number in some(5):
            yield number
            assert answered.acquire(timeout=TIMEOUT_S)

    ids = []
    with served_blocking(kind, Explaining()) as client, client.stream("double", one_by_one()) as answers:
        for result in answers:
            ids.append(result.id)
            answered.release()
    assert ids == ["0", "1", "2", "3", "4"]


def arrived(semaphore: threading.Semaphore, count: int) -> bool:
    return all(semaphore.acquire(timeout=TIMEOUT_S) for _ in range(count))


@kinds
async def test_leaving_early_cancels_the_work(kind: str) -> None:
    backend = Explaining()
    async with served(kind, backend) as client:
        async with client.stream("held", numbers(), read_ahead=3):
            assert await asyncio.to_thread(arrived, backend.begun, 3)
        assert await asyncio.to_thread(arrived, backend.cancelled, 3)


@kinds
def test_leaving_early_cancels_the_work_for_those_who_block(kind: str) -> None:
    backend = Explaining()
    with served_blocking(kind, backend) as client:
        with client.stream("held", numbers(), read_ahead=3):
            assert arrived(backend.begun, 3)
        assert arrived(backend.cancelled, 3)


@kinds
async def test_what_the_callers_own_iterable_raises_comes_after_the_answers_so_far(kind: str) -> None:
    got: list[Result] = []
    async with served(kind, Explaining()) as client:
        with pytest.raises(OSError, match="the camera is gone"):
            await follow(client, "double", camera(), got)
    assert [result.id for result in got] == ["0", "1", "2"]


@kinds
def test_what_a_blocking_callers_iterable_raises_comes_after_the_answers_so_far(kind: str) -> None:
    got: list[str] = []
    with (
        served_blocking(kind, Explaining()) as client,
        pytest.raises(OSError, match="the camera is gone"),
        client.stream("double", camera()) as answers,
    ):
        got.extend(result.id for result in answers)
    assert got == ["0", "1", "2"]


@kinds
async def test_what_the_caller_raises_inside_comes_out_as_it_is(kind: str) -> None:
    async def mistaken(client: AsyncInferenceClient) -> None:
        async with client.stream("double", numbers()) as answers:
            await anext(answers)
            raise KeyError("mine")

    async with served(kind, Explaining()) as client:
        with pytest.raises(KeyError, match="mine"):
            await mistaken(client)


@kinds
async def test_a_stream_ends_with_its_deadline(kind: str) -> None:
    got: list[Result] = []
    async with served(kind, Explaining()) as client:
        with pytest.raises(errors.DeadlineExceeded):
            await follow(client, "held", numbers(), got, timeout_s=0.2)
    assert not got


@kinds
def test_a_blocking_stream_ends_with_its_deadline(kind: str) -> None:
    with (
        served_blocking(kind, Explaining()) as client,
        pytest.raises(errors.DeadlineExceeded),
        client.stream("held", numbers(), timeout_s=0.2) as answers,
    ):
        list(answers)


@kinds
async def test_a_stream_tells_the_model_the_same_as_a_call(kind: str) -> None:
    async with served(kind, Explaining()) as client:
        async with client.stream("scores", [np.array([[1, 3, 2]], np.float32)], classes=2, version="1") as answers:
            (result,) = [result async for result in answers]
        assert result.outputs["y"].tolist() == [[b"6.000000:1:one", b"4.000000:2:two"]]
        with pytest.raises(errors.ModelNotFound):
            await follow(client, "no-such-model", floats([1.0]), [])


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_a_server_that_goes_away_ends_the_stream(transport: str) -> None:
    backend = Explaining()
    server = Server(backend, ServerSettings(port=0, transport=transport, drain_s=0.01))
    await server.start()
    async with AsyncClient(server.address) as client, asyncio.TaskGroup() as group:
        following = group.create_task(failed(follow(client, "held", numbers(), [])))
        assert await asyncio.to_thread(arrived, backend.begun, 1)
        await server.stop()
    assert isinstance(following.result(), HedgerowError)


async def test_a_client_that_is_closed_ends_its_streams_and_opens_no_more() -> None:
    backend = Explaining()
    async with (
        Server(backend, ServerSettings(port=0, drain_s=0.01)) as server,
        AsyncClient(server.address) as client,
        asyncio.TaskGroup() as group,
    ):
        following = group.create_task(failed(follow(client, "held", numbers(), [])))
        assert await asyncio.to_thread(arrived, backend.begun, 1)
        await client.close()
        assert isinstance(await following, HedgerowError)
        assert "closed" in str(await failed(follow(client, "double", numbers(), [])))


async def failed(following: Coroutine[None, None, None]) -> Exception | None:
    try:
        await following
    except Exception as error:  # noqa: BLE001 (it is looked at)
        return error
    return None


@pytest.fixture
def _no_collection() -> Iterator[None]:
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("_no_collection")
async def test_a_closed_client_hangs_up_also_where_a_stream_was_left_early() -> None:
    def ask_and_leave(address: str) -> None:
        with Client(address) as client, client.stream("double", numbers()) as answers:
            next(answers)

    async with Server(Explaining(), ServerSettings(port=0, transport="native")) as server:
        async with AsyncClient(server.address) as client, client.stream("double", numbers()) as answers:
            await anext(answers)
        await asyncio.to_thread(ask_and_leave, server.address)
        assert isinstance(server.listener, NativeListener)
        async with asyncio.timeout(TIMEOUT_S):
            while server.listener.connections:  # noqa: ASYNC110 (no event says it)
                await asyncio.sleep(0.005)


def test_a_blocking_client_that_is_closed_streams_no_more() -> None:
    with Client("127.0.0.1:1") as client:
        pass
    with pytest.raises(HedgerowError, match="closed"), client.stream("double", numbers()):
        pass


@kinds
async def test_streams_of_one_client_do_not_mix(kind: str) -> None:
    async with served(kind, Explaining()) as client:

        async def one(start: int) -> list[float]:
            async with client.stream("double", some(20, start)) as answers:
                return [float(result.outputs["y"][0]) async for result in answers]

        got = await asyncio.gather(*(one(1000 * start) for start in range(5)))
    assert got == [[2.0 * (1000 * start + i) for i in range(20)] for start in range(5)]
