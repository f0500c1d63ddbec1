"""A kept answer is the right one, whole, within its bounds, and nobody's leaving costs another."""

import asyncio
import math
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from msgspec.structs import replace
from numpy.typing import NDArray
from simulators import models

from hedgerow.backend import Deadline, ModelState, Snapshot
from hedgerow.cache import CachedBackend, CacheSettings, Kept, request_key
from hedgerow.errors import (
    DeadlineExceeded,
    EngineFault,
    Forbidden,
    HedgerowError,
    ModelNotFound,
    ModelNotReady,
    Overloaded,
)
from hedgerow.host.model_host import ModelHost
from hedgerow.host.settings import ModelFile
from hedgerow.tensors import InferRequest, InferResponse, ModelMetadata, Parameter, Tensor, TensorSpec, tensor

PATIENCE_S = 60.0
METADATA = ModelMetadata(
    "m", ("1",), "test", (TensorSpec("x", "FP32", (-1,)),), (TensorSpec("y", "FP32", (-1,)),), {"sha256": "a"}
)
Answer = Callable[[InferRequest], Awaitable[InferResponse]]


class Scripted:
    """A backend that answers as it is told, counts, and says when it is asked."""

    name = "scripted"

    def __init__(self) -> None:
        self.calls = 0
        self.cancelled = 0
        self.asked = asyncio.Semaphore(0)
        self.gate = asyncio.Event()
        self.gate.set()
        self.interface = METADATA
        self.version = "1"
        self.errors: list[HedgerowError] = []
        self.parameters: dict[str, Parameter] = {}
        self.array: NDArray[Any] | None = None

    async def infer(self, request: InferRequest, deadline: Deadline) -> InferResponse:
        self.calls += 1
        self.asked.release()
        number = self.calls
        try:
            async with asyncio.timeout(None if math.isinf(deadline.at) else deadline.remaining):
                await self.gate.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        except TimeoutError:
            raise DeadlineExceeded("too late") from None
        if self.errors:
            raise self.errors.pop(0)
        array = np.array([number], np.float32) if self.array is None else self.array
        return InferResponse(
            model="m",
            version=self.version,
            outputs=(Tensor("y", "FP32", array),),
            id=request.id,
            parameters=self.parameters,
        )

    async def stream(self, request: InferRequest, deadline: Deadline) -> AsyncIterator[InferResponse]:
        yield await self.infer(request, deadline)

    async def models(self) -> list[ModelState]:
        return []

    async def ready(self, model: str, version: str = "") -> bool:
        return True

    async def metadata(self, model: str, version: str = "") -> ModelMetadata:
        return self.interface

    def snapshot(self, model: str) -> Snapshot:
        return Snapshot(healthy=True)

    async def close(self) -> None:
        """Nothing to let go of."""


@pytest.fixture
async def backend() -> Scripted:
    return Scripted()


def cached(backend: Scripted, **settings: Any) -> CachedBackend:
    return CachedBackend(backend, CacheSettings(**{"models": ("m",), **settings}))


def ask(x: Any = 1.0, /, **fields: Any) -> InferRequest:
    return InferRequest(**{"model": "m", "inputs": (tensor("x", np.array([x], np.float32)),), **fields})


async def value(cache: CachedBackend, request: InferRequest | None = None, deadline: Deadline | None = None) -> float:
    response = await cache.infer(request or ask(), deadline or Deadline.after(PATIENCE_S))
    return float(response.output("y")[0])


# -- what is the same


async def test_the_same_request_is_computed_once_and_answered_under_its_own_id(backend: Scripted) -> None:
    cache = cached(backend)
    backend.parameters = {"hedgerow_tier": "edge"}
    first = await cache.infer(ask(id="a", parameters={"priority": 1}), Deadline.never())
    again = await cache.infer(ask(id="b", parameters={"timeout": 5, "hedgerow_privacy": "high"}), Deadline.never())
    assert (first.id, again.id, backend.calls) == ("a", "b", 1)
    assert again.parameters == {"hedgerow_tier": "edge"}
    np.testing.assert_array_equal(first.output("y"), again.output("y"))
    counts = cache.counts["m"]
    assert (counts.hits, counts.misses, counts.shared, len(cache.kept)) == (1, 1, 0, 1)


FLOATS = np.array([1.0], np.float32)
DIFFERENT = {
    "value": ask(2.0),
    "minus zero": ask(-0.0),
    "zero": ask(0.0),
    "nan": ask(np.nan),
    "shape": ask(inputs=(tensor("x", FLOATS.reshape(1, 1)),)),
    "datatype": ask(inputs=(Tensor("x", "UINT32", FLOATS.view(np.uint32)),)),
    "byte order": ask(inputs=(Tensor("x", "FP32", FLOATS.view(">f4")),)),
    "name": ask(inputs=(tensor("z", FLOATS),)),
    "more": ask(inputs=(tensor("x", FLOATS), tensor("z", FLOATS))),
    "none": ask(inputs=()),
    "empty": ask(inputs=(tensor("x", FLOATS[:0]),)),
    "empty, other shape": ask(inputs=(tensor("x", np.zeros((0, 2), np.float32)),)),
    "empty, other way round": ask(inputs=(tensor("x", np.zeros((2, 0), np.float32)),)),
    "texts": ask(inputs=(tensor("x", np.array([b"ab", b"c"], object)),)),
    "texts, cut elsewhere": ask(inputs=(tensor("x", np.array([b"a", b"bc"], object)),)),
    "texts, NUL": ask(inputs=(tensor("x", np.array([b"ab\0", b"c"], object)),)),
    "version": ask(version="1"),
    "outputs": ask(outputs=("y",)),
    "outputs, order": ask(outputs=("y", "z")),
    "outputs, other order": ask(outputs=("z", "y")),
    "model": ask(model="n"),
    "parameter": ask(parameters={"p": 1}),
    "parameter's type": ask(parameters={"p": True}),
    "parameter's other type": ask(parameters={"p": 1.0}),
    "parameter's last type": ask(parameters={"p": "1"}),
}


def test_no_two_different_requests_have_the_same_key() -> None:
    keys = {request_key(request, METADATA) for request in (ask(), *DIFFERENT.values())}
    assert len(keys) == len(DIFFERENT) + 1


def test_what_says_nothing_of_the_answer_does_not_change_the_key() -> None:
    x, z = tensor("x", FLOATS), tensor("z", FLOATS)
    assert request_key(ask(inputs=(x, z)), METADATA) == request_key(ask(inputs=(z, x)), METADATA)
    assert request_key(ask(np.nan), METADATA) == request_key(ask(np.nan), METADATA)
    a, b = {"p": 1, "q": 2, "id": "a", "priority": 1}, {"q": 2, "p": 1, "timeout": 7, "hedgerow_hops": 3}
    assert request_key(ask(parameters=a), METADATA) == request_key(ask(id="b", parameters=b), METADATA)
    table = np.arange(12, dtype=np.float32).reshape(3, 4)
    strided, whole = tensor("x", table[:, ::2]), tensor("x", table[:, ::2].copy())
    assert request_key(ask(inputs=(strided,)), METADATA) == request_key(ask(inputs=(whole,)), METADATA)


def test_another_file_or_without_a_digest_another_version_is_another_key() -> None:
    unknown = replace(METADATA, properties={})
    interfaces = (
        METADATA,
        replace(METADATA, properties={"sha256": "b"}),
        unknown,
        replace(unknown, versions=("2",)),
    )
    assert len({request_key(ask(), interface) for interface in interfaces}) == len(interfaces)


ARRAYS = hnp.arrays(
    st.sampled_from([np.dtype(d) for d in ("?", "i1", "<i8", "<f2", "<f4")]), hnp.array_shapes(min_dims=0, min_side=0)
) | hnp.arrays(np.dtype(object), hnp.array_shapes(min_dims=1, min_side=0, max_side=4), elements=st.binary(max_size=3))
REQUESTS = st.builds(
    lambda arrays, outputs, parameters: ask(
        inputs=tuple(tensor(name, array) for name, array in arrays.items()), outputs=outputs, parameters=parameters
    ),
    st.dictionaries(st.text("ab", max_size=2), ARRAYS, max_size=2),
    st.lists(st.text("ab", max_size=2), max_size=2).map(tuple),
    st.dictionaries(
        st.text("ab", max_size=2), st.booleans() | st.integers(0, 2) | st.text("01", max_size=1), max_size=2
    ),
)


def plain(request: InferRequest) -> Any:
    """What a request says, in a form that Python compares: the model for the key."""
    inputs = sorted((t.name, t.datatype, t.shape, str(t.array.dtype), _content(t.array)) for t in request.inputs)
    parameters = sorted((name, type(v).__name__, str(v)) for name, v in request.parameters.items())
    return (inputs, request.outputs, parameters)


def _content(array: NDArray[Any]) -> Any:
    return tuple(array.ravel().tolist()) if array.dtype == object else array.tobytes()


@given(REQUESTS, REQUESTS)
def test_two_requests_have_the_same_key_just_when_they_say_the_same(one: InferRequest, other: InferRequest) -> None:
    assert (request_key(one, METADATA) == request_key(other, METADATA)) == (plain(one) == plain(other))


# -- what is kept


@given(
    st.lists(
        st.tuples(
            st.sampled_from("gp"), st.integers(0, 3), st.sampled_from([0, 30, 40, 101]), st.sampled_from([0, 1, 9])
        ),
        max_size=40,
    )
)
def test_what_is_kept_is_what_a_plain_model_of_it_keeps(steps: list[tuple[str, int, int, int]]) -> None:
    kept: Kept[int] = Kept(100, ttl_s=10.0)
    entries: list[tuple[bytes, int, int, float]] = []  # the most recently used at the end
    now = evictions = 0
    for number, (what, which, size, passed) in enumerate(steps):
        now += passed
        key = bytes([which])
        mine = next((entry for entry in entries if entry[0] == key), None)
        rest = [entry for entry in entries if entry[0] != key]
        if what == "g":
            fresh = mine is not None and now - mine[3] < 10
            assert kept.get(key, now) == (mine[1] if mine is not None and fresh else None)
            entries = [*rest, mine] if mine is not None and fresh else rest
        else:
            kept.put(key, number, size, now)
            entries = rest
            if size <= 100:
                while sum(entry[2] for entry in entries) + size > 100:
                    entries.pop(0)
                    evictions += 1
                entries.append((key, number, size, now))
        assert kept.bytes == sum(entry[2] for entry in entries) <= 100
        assert (len(kept), kept.evictions) == (len(entries), evictions)
        assert list(kept._entries) == [entry[0] for entry in entries]  # in the order in which they will leave


async def test_arrays_and_keys_count_and_the_least_recently_used_leaves(backend: Scripted) -> None:
    backend.array = np.zeros(2500, np.float32)  # 10 kB
    cache = cached(backend, max_bytes=25_000)
    for x in (1.0, 2.0, 1.0, 3.0, 1.0):  # 2 has to leave for 3
        await value(cache, ask(x))
    assert (backend.calls, cache.kept.evictions, len(cache.kept)) == (3, 1, 2)
    assert 20_000 < cache.kept.bytes <= 25_000
    await value(cache, ask(2.0))
    assert backend.calls == 4
    backend.array = np.zeros(10_000, np.float32)  # does not fit at all, and drives nobody out
    await value(cache, ask(9.0))
    assert len(cache.kept) == 2


async def test_an_answer_that_is_a_small_part_of_a_large_batch_does_not_hold_on_to_it(backend: Scripted) -> None:
    batch = np.zeros((1000, 1), np.float32)
    backend.array = batch[3]
    response = await cached(backend).infer(ask(), Deadline.never())
    assert response.output("y").base is None


async def test_answers_are_safe_from_those_who_got_them_and_from_the_backend(backend: Scripted) -> None:
    backend.array = np.array([1], np.float32)
    cache = cached(backend)
    first = await cache.infer(ask(), Deadline.never())
    with pytest.raises(ValueError, match="read-only"):
        first.output("y")[0] = 5
    assert isinstance(first.parameters, dict)
    first.parameters["mine"] = True
    backend.array[0] = 6  # still its own
    again = await cache.infer(ask(), Deadline.never())
    assert (again.output("y")[0], dict(again.parameters)) == (1, {})


async def test_answers_grow_old_where_that_is_set(backend: Scripted) -> None:
    cache = cached(backend, ttl_s=1e-9)
    assert (await value(cache), await value(cache)) == (1, 2)
    assert cache.kept.expired == 1


async def test_only_models_that_are_named_small_requests_and_no_streams(backend: Scripted) -> None:
    cache = cached(backend, max_request_bytes=8)
    for request in (ask(model="other"), ask(inputs=(tensor("x", np.zeros(3, np.float32)),))):
        assert await value(cache, request) != await value(cache, request)
    before = backend.calls
    for _ in range(2):
        assert len([response async for response in cache.stream(ask(), Deadline.never())]) == 1
    assert backend.calls == before + 2
    assert len(cache.kept) == 0


async def test_errors_and_degraded_answers_are_not_kept(backend: Scripted) -> None:
    cache = cached(backend)
    backend.errors = [EngineFault("once")]
    with pytest.raises(EngineFault):
        await value(cache)
    backend.parameters = {"hedgerow_degraded": True}
    assert await value(cache) == 2
    backend.parameters = {"hedgerow_degraded": False}
    assert await value(cache) == 3
    assert await value(cache) == 3


async def test_a_model_that_is_not_there_is_not_answered_for(
    backend: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = cached(backend)
    await value(cache)

    async def gone(model: str, version: str = "") -> ModelMetadata:
        raise ModelNotReady("unloaded")

    monkeypatch.setattr(backend, "metadata", gone)
    with pytest.raises(ModelNotReady):
        await value(cache)


@pytest.mark.parametrize("back", [False, True], ids=["replaced", "replaced and back again"])
async def test_what_a_model_says_that_is_replaced_meanwhile_is_not_kept(backend: Scripted, back: bool) -> None:
    cache = cached(backend)
    old, new = backend.interface, replace(backend.interface, versions=("2",), properties={"sha256": "b"})
    backend.gate.clear()
    async with asyncio.TaskGroup() as group:
        asked = group.create_task(cache.infer(ask(), Deadline.never()))
        await backend.asked.acquire()
        backend.version = "2"
        backend.interface = old if back else new
        backend.gate.set()
    assert asked.result().version == "2"
    assert len(cache.kept) == 0


# -- at the same time


async def outcome(cache: CachedBackend) -> float | str:
    """As `value`, or what went wrong."""
    try:
        return await value(cache)
    except HedgerowError as error:
        return str(error)


async def many(backend: Scripted, cache: CachedBackend, group: asyncio.TaskGroup) -> list[asyncio.Task[float]]:
    """Five who ask the same, of whom the first is being answered."""
    backend.gate.clear()
    tasks = [group.create_task(value(cache)) for _ in range(5)]
    await backend.asked.acquire()
    for _ in range(3):  # the others get to where they wait
        await asyncio.sleep(0)
    assert backend.calls == 1
    return tasks


async def test_the_same_at_the_same_time_is_computed_once(backend: Scripted) -> None:
    cache = cached(backend)
    async with asyncio.TaskGroup() as group:
        tasks = await many(backend, cache, group)
        backend.gate.set()
    assert [task.result() for task in tasks] == [1] * 5
    counts = cache.counts["m"]
    assert (counts.hits, counts.misses, counts.shared) == (0, 1, 4)


async def test_the_first_who_leaves_takes_only_their_own_work_along(backend: Scripted) -> None:
    cache = cached(backend)
    async with asyncio.TaskGroup() as group:
        tasks = await many(backend, cache, group)
        tasks[0].cancel()
        await backend.asked.acquire()  # the second took over
        assert (backend.calls, backend.cancelled) == (2, 1)
        backend.gate.set()
    assert [task.result() for task in tasks[1:]] == [2] * 4
    assert backend.calls == 2


async def test_one_who_waits_and_leaves_disturbs_nobody(backend: Scripted) -> None:
    cache = cached(backend)
    async with asyncio.TaskGroup() as group:
        tasks = await many(backend, cache, group)
        tasks[2].cancel()
        await asyncio.sleep(0)
        backend.gate.set()
    assert tasks[2].cancelled()
    assert [task.result() for task in (*tasks[:2], *tasks[3:])] == [1] * 4


async def test_when_all_have_left_nothing_is_computed_and_nothing_remembered(backend: Scripted) -> None:
    cache = cached(backend)
    async with asyncio.TaskGroup() as group:
        tasks = await many(backend, cache, group)
        for task in tasks:
            task.cancel()
    assert backend.cancelled == backend.calls
    backend.gate.set()
    assert await value(cache) == backend.calls


async def test_a_deadline_ends_only_the_wait_of_whose_it_is(backend: Scripted) -> None:
    cache = cached(backend)
    backend.gate.clear()
    async with asyncio.TaskGroup() as group:
        first = group.create_task(value(cache))
        await backend.asked.acquire()
        with pytest.raises(DeadlineExceeded):
            await value(cache, deadline=Deadline.after(0.2))
        backend.gate.set()
    assert first.result() == 1


@pytest.mark.parametrize("kind", [DeadlineExceeded, Forbidden, Overloaded])
async def test_what_is_wrong_with_the_first_caller_only_is_not_said_to_the_others(
    backend: Scripted, kind: type[HedgerowError]
) -> None:
    cache = cached(backend)
    backend.errors = [kind("not for you")]
    backend.gate.clear()
    async with asyncio.TaskGroup() as group:
        refused = group.create_task(outcome(cache))
        await backend.asked.acquire()
        others = [group.create_task(outcome(cache)) for _ in range(3)]
        await asyncio.sleep(0)
        backend.gate.set()
    assert refused.result() == "not for you"
    assert [other.result() for other in others] == [2] * 3


async def test_a_fault_is_had_once_by_all_who_wait_and_not_once_by_each(backend: Scripted) -> None:
    cache = cached(backend)
    backend.errors = [EngineFault("poison")]
    backend.gate.clear()
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(outcome(cache)) for _ in range(5)]
        await backend.asked.acquire()
        for _ in range(3):
            await asyncio.sleep(0)
        backend.gate.set()
    assert [task.result() for task in tasks] == ["poison"] * 5
    assert backend.calls == 1


async def test_a_degraded_answer_is_for_the_one_whom_it_was_made_for(backend: Scripted) -> None:
    cache = cached(backend)
    backend.parameters = {"hedgerow_degraded": True}
    async with asyncio.TaskGroup() as group:
        tasks = await many(backend, cache, group)
        backend.gate.set()
    assert sorted(task.result() for task in tasks) == [1, 2, 3, 4, 5]


# -- with a real host


async def test_a_swap_of_the_model_is_seen_at_once_and_the_old_one_back_finds_its_answers(tmp_path: Path) -> None:
    host = ModelHost()
    cache = CachedBackend(host, CacheSettings(models=("digits",)))
    request = models.request(models.pixels(3))

    async def label() -> int:
        response = await cache.infer(request, Deadline.after(PATIENCE_S))
        return int(response.output("logits").argmax())

    try:
        with pytest.raises(ModelNotFound):
            await label()
        files = [ModelFile("digits", "1", models.classifier(tmp_path / f"{k}.onnx", shift=k)) for k in range(2)]
        for file, digit, misses in ((files[0], 3, 1), (files[1], 4, 2), (files[0], 3, 2)):
            await host.load_file(file)
            assert [await label() for _ in range(3)] == [digit] * 3
            assert cache.counts["digits"].misses == misses
    finally:
        await cache.close()


async def test_under_swaps_no_answer_is_older_than_the_model(tmp_path: Path) -> None:
    host = ModelHost()
    cache = CachedBackend(host, CacheSettings(models=("digits",)))
    files = [ModelFile("digits", str(k), models.classifier(tmp_path / f"{k}.onnx", shift=k)) for k in range(3)]
    await host.load_file(files[0])
    stop = asyncio.Event()

    async def caller(digit: int) -> None:
        while not stop.is_set():
            response = await cache.infer(models.request(models.pixels(digit)), Deadline.after(PATIENCE_S))
            assert response.output("logits").argmax() == (digit + int(response.version)) % 10
            await asyncio.sleep(0)

    async with asyncio.TaskGroup() as group:
        for digit in (0, 0, 0, 1):
            group.create_task(caller(digit))
        for file in (*files[1:], *files, *files):
            await host.load_file(file)
            response = await cache.infer(models.request(models.pixels(5)), Deadline.after(PATIENCE_S))
            assert response.version == file.version
        stop.set()
    assert cache.counts["digits"].hits > 0
    await cache.close()
