"""Batches under fire: poisoned requests, hangs, swaps, deadlines, priorities, memory. Real models, and a puppet."""

import asyncio
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from msgspec.structs import replace
from numpy.typing import NDArray
from simulators import models
from simulators.places import until

from hedgerow import engines
from hedgerow.alarms import STALE
from hedgerow.backend import Deadline
from hedgerow.errors import (
    DeadlineExceeded,
    EngineFault,
    HedgerowError,
    InvalidInput,
    ModelNotFound,
    ModelNotReady,
    Unavailable,
)
from hedgerow.host.model_host import ModelHost, Staged
from hedgerow.host.settings import BatchSettings, HostSettings, ModelFile
from hedgerow.tensors import InferRequest, InferResponse, Tensor, TensorSpec, tensor

PATIENCE_S = 60.0
"""Longer than anything here takes on the slowest machine."""


class Puppet:
    """A model on strings: `x` (n, 1) comes back as `y`. It waits while `held`, and dies of a negative number."""

    inputs = (TensorSpec("x", "FP32", (-1, 1)),)
    outputs = (TensorSpec("y", "FP32", (-1, 1)),)

    def __init__(self) -> None:
        self.batches: list[list[float]] = []
        self.running = 0
        self._lock = threading.Lock()
        self._go = threading.Event()
        self._go.set()

    def run(self, inputs: Mapping[str, NDArray[Any]], _: Sequence[str]) -> dict[str, NDArray[Any]]:
        x = inputs["x"]
        self.batches.append(x[:, 0].tolist())
        with self._lock:
            self.running += 1
        self._go.wait(PATIENCE_S)
        with self._lock:
            self.running -= 1
        if (x < -50).any():
            raise EngineFault("it died")
        return {"y": np.where(x > 50, np.nan, x)}

    def hold(self) -> None:
        self.batches.clear()
        self._go.clear()

    def release(self) -> None:
        self._go.set()

    def close(self) -> None:
        pass


@pytest.fixture
def puppet(monkeypatch: pytest.MonkeyPatch) -> Iterator[Puppet]:
    """The model of every file whose engine is "puppet"."""
    session = Puppet()
    load, engine = engines.load, SimpleNamespace(PLATFORM="puppet", open_model=lambda *_, **__: session)
    monkeypatch.setattr(engines, "load", lambda name: engine if name == "puppet" else load(name))
    yield session
    session.release()


Start = Callable[..., Coroutine[object, object, ModelHost]]


@pytest.fixture
async def start(tmp_path: Path) -> AsyncIterator[Start]:
    """Starts a host that serves the puppet."""
    hosts: list[ModelHost] = []

    async def start(*, drain_s: float = 10.0, workers: int = 1, **batching: Any) -> ModelHost:
        settings = BatchSettings(**{"inline_below_s": 0.0, **batching})
        host = ModelHost(HostSettings(workers=workers, drain_s=drain_s, batching=settings))
        hosts.append(host)
        await host.load_file(puppet_file(tmp_path))
        return host

    yield start
    for host in hosts:
        await host.close()


def puppet_file(folder: Path, version: str = "1") -> ModelFile:
    path = folder / "puppet"
    path.write_bytes(b"puppet")
    return ModelFile("puppet", version, path, engine="puppet")


def ask(*values: float, **parameters: int) -> InferRequest:
    x = Tensor("x", "FP32", np.array(values, np.float32).reshape(-1, 1))
    return InferRequest(model="puppet", inputs=(x,), parameters=parameters)


async def answer(host: ModelHost, *values: float, deadline: Deadline | None = None, **parameters: int) -> list[float]:
    response = await host.infer(ask(*values, **parameters), deadline or Deadline.after(PATIENCE_S))
    numbers: list[float] = response.output("y")[:, 0].tolist()
    return numbers


async def error(host: ModelHost, *values: float, deadline: Deadline | None = None) -> HedgerowError:
    with pytest.raises(HedgerowError) as caught:
        await answer(host, *values, deadline=deadline)
    return caught.value


def served(host: ModelHost, model: str = "puppet") -> Staged:
    serving = host.serving(model)
    assert serving is not None
    return serving


async def test_what_waits_runs_together_and_everybody_gets_their_own_rows(start: Start, puppet: Puppet) -> None:
    host = await start(max_batch_size=8)
    puppet.hold()
    async with asyncio.TaskGroup() as group:
        first = group.create_task(answer(host, 0))
        await until(lambda: puppet.running == 1)
        rows: list[list[float]] = [[1.0], [2.0, 3.0], [], [4.0], list(range(10, 20)), [5.0, 6.0, 7.0, 8.0], [9.0]]
        tasks = [group.create_task(answer(host, *values)) for values in rows]
        await until(lambda: served(host).batcher.waiting == len(rows))
        assert host.snapshot("puppet").inflight == len(rows) + 1
        puppet.release()
    assert first.result() == [0]
    assert [task.result() for task in tasks] == rows
    # What is larger than a batch runs alone, in its turn; the others together.
    assert sorted(map(len, puppet.batches)) == [1, 1, 8, 10]
    counts = host.counts("puppet")
    assert counts is not None
    assert counts.rows == sum(map(len, puppet.batches))
    assert {size: compute.infer.count for size, compute in counts.executions.items()} == {1: 2, 8: 1, 10: 1}
    assert counts.queue.count == counts.requests.infer.count == len(rows) + 1
    assert counts.queue.ns > 0
    assert counts.requests.infer.ns >= counts.executions[8].infer.ns > 0


async def test_batches_are_padded_to_preferred_sizes_and_cut_back(start: Start, puppet: Puppet) -> None:
    host = await start(max_batch_size=8, preferred_sizes=(8, 4))
    puppet.batches.clear()
    assert await answer(host, 1, 2, 3) == [1, 2, 3]
    assert await answer(host) == []
    assert puppet.batches == [[1, 2, 3, 3], []]


async def test_a_delay_collects_rows_and_a_full_batch_does_not_wait(start: Start, puppet: Puppet) -> None:
    host = await start(max_batch_size=3, max_delay_s=PATIENCE_S / 2)
    puppet.batches.clear()
    async with asyncio.TaskGroup() as group:
        group.create_task(answer(host, 1))
        await until(lambda: served(host).batcher.waiting == 1)
        group.create_task(answer(host, 2))
        await until(lambda: served(host).batcher.waiting == 2)
        group.create_task(answer(host, 3))
    assert puppet.batches == [[1, 2, 3]]


async def test_a_poisoned_request_does_not_fail_its_neighbours(start: Start, puppet: Puppet) -> None:
    host = await start()
    puppet.hold()
    async with asyncio.TaskGroup() as group:
        group.create_task(answer(host, 0))
        await until(lambda: puppet.running == 1)
        good = [group.create_task(answer(host, value)) for value in (1, 2)]
        deadly = group.create_task(error(host, -99))
        nonsense = group.create_task(error(host, 99))
        await until(lambda: served(host).batcher.waiting == 4)
        puppet.release()
    assert [task.result() for task in good] == [[1], [2]]
    assert isinstance(deadly.result(), EngineFault)
    assert isinstance(nonsense.result(), EngineFault)
    assert "'y'" in str(nonsense.result())
    assert puppet.batches == [[0], [1, 2, -99, 99], [1], [2], [-99], [99]], "again, once and alone"
    assert (served(host).answers, served(host).faults) == (3, 2)


async def test_nonsense_in_some_rows_fails_their_request_only_and_the_rest_is_not_run_again(
    start: Start, puppet: Puppet
) -> None:
    host = await start()
    puppet.hold()
    async with asyncio.TaskGroup() as group:
        group.create_task(answer(host, 0))
        await until(lambda: puppet.running == 1)
        good = group.create_task(answer(host, 1))
        group.create_task(error(host, 2, 99))
        await until(lambda: served(host).batcher.waiting == 2)
        puppet.release()
    assert good.result() == [1]
    assert puppet.batches == [[0], [1, 2, 99], [2, 99]]


async def test_high_priority_goes_first_and_nonsense_for_a_priority_is_refused(start: Start, puppet: Puppet) -> None:
    host = await start(max_batch_size=1, ageing_s=PATIENCE_S)
    puppet.hold()
    async with asyncio.TaskGroup() as group:
        group.create_task(answer(host, 0))
        await until(lambda: puppet.running == 1)
        for value, priority in ((1, 3), (2, 0), (3, 1), (4, 9)):
            group.create_task(answer(host, value, priority=priority))
        await until(lambda: served(host).batcher.waiting == 4)
        puppet.release()
    assert puppet.batches == [[0], [3], [2], [4], [1]]
    for wrong in (-1, True, "high"):
        with pytest.raises(InvalidInput, match="priority"):
            await host.infer(replace(ask(1), parameters={"priority": wrong}), Deadline.after(PATIENCE_S))


async def test_the_cancelled_and_the_expired_leave_at_once_and_never_run(start: Start, puppet: Puppet) -> None:
    host = await start()
    puppet.hold()
    async with asyncio.TaskGroup() as group:
        group.create_task(answer(host, 0))
        await until(lambda: puppet.running == 1)
        cancelled = [group.create_task(answer(host, value)) for value in range(1, 40)]
        expired = group.create_task(error(host, 40, deadline=Deadline.after(0.05)))
        kept = group.create_task(answer(host, 41))
        await until(lambda: served(host).batcher.waiting >= 40)
        for task in cancelled:
            task.cancel()
        assert isinstance(await expired, DeadlineExceeded)
        assert served(host).batcher.waiting == 1
        puppet.release()
    assert kept.result() == [41]
    assert puppet.batches == [[0], [41]]


async def test_those_who_leave_are_not_kept_until_their_deadline(start: Start, puppet: Puppet) -> None:
    host = await start(queue_size=100)
    batcher = served(host).batcher
    puppet.hold()
    async with asyncio.TaskGroup() as group:
        running = group.create_task(answer(host, 0))
        await until(lambda: puppet.running == 1)
        for _ in range(50):
            gone = [group.create_task(answer(host, 1)) for _ in range(100)]
            await until(lambda: batcher.waiting == 100)
            for task in gone:
                task.cancel()
            await until(lambda: batcher.waiting == 0)
        assert len(batcher._alarms) <= 2 * 100 + STALE
        assert sum(map(len, batcher._queue._groups.values())) <= 100
        puppet.release()
    assert running.result() == [0]


@pytest.mark.usefixtures("puppet")
async def test_what_was_answered_is_not_kept_until_its_deadline(start: Start) -> None:
    host = await start()
    kept = []
    for number in range(3):
        request = ask(number)
        kept.append(weakref.ref(request.inputs[0].array))
        kept.append(weakref.ref((await host.infer(request, Deadline.after(PATIENCE_S))).outputs[0].array))
        del request
    await until(lambda: not any(array() is not None for array in kept))
    assert len(served(host).batcher._alarms)


async def test_a_caller_whose_deadline_passes_while_it_runs_is_told_and_the_others_are_answered(
    start: Start, puppet: Puppet
) -> None:
    host = await start()
    puppet.hold()
    async with asyncio.TaskGroup() as group:
        hurried = group.create_task(error(host, 1, deadline=Deadline.after(0.2)))
        patient = group.create_task(answer(host, 2))
        assert isinstance(await hurried, DeadlineExceeded)
        assert not patient.done()
        puppet.release()
    assert patient.result() == [2]


async def test_when_a_model_hangs_its_callers_are_told_others_refused_and_its_neighbours_answered(
    start: Start, puppet: Puppet, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    host = await start(hang_after_s=0.3, max_batch_size=1, workers=2)
    await host.load_file(ModelFile("digits", "1", models.classifier(tmp_path / "m.onnx")))
    puppet.hold()
    async with asyncio.TaskGroup() as group:
        hung = [group.create_task(error(host, value)) for value in (1, 2)]
        hurried = group.create_task(error(host, 3, deadline=Deadline.after(0.05)))
        await until(lambda: puppet.running == 2)
        waits = group.create_task(error(host, 4))
    assert isinstance(hurried.result(), DeadlineExceeded | Unavailable)
    assert [type(task.result()) for task in hung] == [EngineFault, EngineFault]
    assert type(waits.result()) is Unavailable
    refused = await error(host, 5)
    assert type(refused) is Unavailable
    assert refused.retry_after_s
    assert not await host.ready("puppet")
    assert not host.snapshot("puppet").healthy
    assert served(host).batcher.hung == 2
    assert served(host).faults == 2
    response = await host.infer(models.request(), Deadline.after(PATIENCE_S))
    assert response.output("logits").argmax() == 3
    puppet.release()
    await until(lambda: not served(host).batcher.hung)
    assert await answer(host, 6) == [6]
    assert served(host).faults == 2
    assert caplog.text.count("given up;") == 2
    assert caplog.text.count("came back") == 2


async def test_a_hung_model_holds_up_neither_its_replacement_nor_the_end(
    start: Start, puppet: Puppet, tmp_path: Path
) -> None:
    host = await start(hang_after_s=0.1, drain_s=0.2)
    old = served(host)
    puppet.hold()
    assert isinstance(await error(host, 1), EngineFault)
    classifier = ModelFile("puppet", "2", models.classifier(tmp_path / "m.onnx"))
    async with asyncio.timeout(PATIENCE_S):
        await host.load_file(classifier)
    assert host.left_running == 1
    response = await host.infer(models.request(model="puppet"), Deadline.after(PATIENCE_S))
    assert response.version == "2"
    async with asyncio.timeout(PATIENCE_S):
        await host.close()
    assert not old.closed.is_set()
    puppet.release()
    await until(old.closed.is_set)
    assert host.left_running == 0


async def test_a_request_fault_is_not_held_against_a_model(start: Start, puppet: Puppet) -> None:
    host = await start()
    with pytest.raises(InvalidInput, match="'x'"):
        await host.infer(InferRequest(model="puppet", inputs=(tensor("x", np.zeros(3, np.float32)),)), Deadline.never())
    assert (served(host).answers, served(host).faults) == (0, 0)


async def test_a_fast_model_runs_on_the_event_loop_and_goes_back_to_its_threads_when_it_is_slow(
    start: Start, puppet: Puppet, monkeypatch: pytest.MonkeyPatch
) -> None:
    where: set[int] = set()
    run = puppet.run

    def traced(inputs: Mapping[str, NDArray[Any]], outputs: Sequence[str]) -> dict[str, NDArray[Any]]:
        where.add(threading.get_ident())
        return run(inputs, outputs)

    monkeypatch.setattr(puppet, "run", traced)
    # Far beyond what anything here takes, and far below what the model is told to take then.
    host = await start(inline_below_s=0.2)
    here = threading.get_ident()

    async def until_inline() -> None:
        async with asyncio.timeout(PATIENCE_S):
            while here not in where:
                where.clear()
                await answer(host, 1)

    await until_inline()
    puppet.hold()
    threading.Timer(1.0, puppet.release).start()
    assert await answer(host, 2) == [2]
    where.clear()
    assert await answer(host, 3) == [3]
    assert here not in where
    await until_inline()


async def test_a_swap_under_load_loses_nobody_and_each_answer_is_of_one_version(tmp_path: Path) -> None:
    paths = [models.classifier(tmp_path / f"m{shift}.onnx", shift=shift) for shift in range(4)]
    host = ModelHost(HostSettings(workers=2))
    await host.load_file(ModelFile("digits", "0", paths[0]))
    stop, answered = asyncio.Event(), set[str]()

    async def caller(digit: int) -> None:
        while not stop.is_set():
            response = await host.infer(models.request(models.pixels(digit, 9 - digit)), Deadline.after(PATIENCE_S))
            shift = int(response.version)
            labels = response.output("logits").argmax(axis=1).tolist()
            assert labels == [(digit + shift) % 10, (9 - digit + shift) % 10]
            answered.add(response.version)

    async with asyncio.TaskGroup() as group:
        for digit in [*range(10)] * 3:
            group.create_task(caller(digit))
        for version, path in enumerate(paths[1:], 1):
            old = served(host, "digits")
            await until(lambda: len(answered) == version)  # noqa: B023 (called before it changes)
            await host.load_file(ModelFile("digits", str(version), path))
            assert old.closed.is_set()
        await until(lambda: len(answered) == 4)
        stop.set()
    await host.close()


@pytest.mark.parametrize("engine", engines.available())
async def test_every_datatype_survives_batching(engine: str, tmp_path: Path) -> None:
    kinds = {
        onnx.TensorProto.FLOAT: np.float32,
        onnx.TensorProto.FLOAT16: np.float16,
        onnx.TensorProto.INT32: np.int32,
        onnx.TensorProto.UINT8: np.uint8,
    }
    if engine == "onnxruntime":
        kinds |= {onnx.TensorProto.INT64: np.int64, onnx.TensorProto.STRING: np.object_}
    host = ModelHost(HostSettings(workers=1))
    for kind, dtype in kinds.items():
        await host.load_file(ModelFile("swap", "1", models.swapped(tmp_path / f"{kind}.onnx", kind), engine=engine))

        async def ask_for(rows: int, start: int, dtype: Any = dtype) -> None:
            x = np.arange(start, start + 2 * rows).reshape(rows, 2)
            x = x.astype(str) if dtype is np.object_ else x.astype(dtype)
            given_ = tensor("x", x)
            response = await host.infer(InferRequest(model="swap", inputs=(given_,)), Deadline.after(PATIENCE_S))
            assert response.output("y").tolist() == given_.array[:, ::-1].tolist()

        async with asyncio.TaskGroup() as group:
            for rows in (1, 3, 0, 2, 7):
                group.create_task(ask_for(rows, 10 * rows))
        counts = host.counts("swap")
        assert counts is not None
        assert list(counts.executions) == [13], "all in one batch"
    await host.close()


async def test_models_without_a_batch_dimension_and_scalars_are_answered_alone(tmp_path: Path) -> None:
    shape = onnx.helper.make_tensor_value_info
    path = models.save(
        tmp_path / "scalar.onnx",
        [onnx.helper.make_node("Mul", ["s", "v"], ["y"])],
        [shape("s", onnx.TensorProto.FLOAT, []), shape("v", onnx.TensorProto.FLOAT, [3])],
        [shape("y", onnx.TensorProto.FLOAT, [3])],
    )
    host = ModelHost(HostSettings(workers=1))
    await host.load_file(ModelFile("scale", "1", path))

    async def scaled(by: float) -> InferResponse:
        tensors = (tensor("s", np.float32(by)), tensor("v", np.arange(3, dtype=np.float32)))
        return await host.infer(InferRequest(model="scale", inputs=tensors), Deadline.after(PATIENCE_S))

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(scaled(by)) for by in range(5)]
    assert [task.result().output("y").tolist() for task in tasks] == [[0, by, 2 * by] for by in range(5)]
    await host.close()


@pytest.fixture
async def crowded(tmp_path: Path) -> AsyncIterator[ModelHost]:
    """A host with room for two of three models, "a", "b" and "c", that has loaded all of them, "a" first."""
    sizes = {name: models.classifier(tmp_path / f"{name}.onnx").stat().st_size for name in "abc"}
    host = ModelHost(HostSettings(workers=1, memory_budget_bytes=int(1.5 * 2.5 * sizes["a"])))
    for name in "abc":
        await host.load_file(ModelFile(name, "1", tmp_path / f"{name}.onnx"))
    yield host
    await host.close()


async def test_the_model_used_longest_ago_makes_room_and_comes_back_when_asked(crowded: ModelHost) -> None:
    assert crowded.serving("a") is None
    assert await crowded.ready("a"), "it would be answered"
    assert crowded.snapshot("a").healthy
    assert (await crowded.metadata("a")).inputs
    async with asyncio.TaskGroup() as group:
        tasks = [
            group.create_task(crowded.infer(models.request(model="a"), Deadline.after(PATIENCE_S))) for _ in range(8)
        ]
    assert {int(task.result().output("logits").argmax()) for task in tasks} == {3}
    assert crowded.serving("b") is None
    assert crowded.serving("c") is not None
    assert crowded.memory_bytes <= crowded.settings.memory_budget_bytes
    with pytest.raises(ModelNotFound):
        await crowded.infer(replace(models.request(model="b"), version="2"), Deadline.after(PATIENCE_S))
    await crowded.unload("b")
    with pytest.raises(ModelNotReady):
        await crowded.infer(models.request(model="b"), Deadline.after(PATIENCE_S))
    assert not await crowded.ready("b")


async def test_a_model_that_cannot_be_back_in_time_says_when_to_ask_and_comes_back_anyway(crowded: ModelHost) -> None:
    with pytest.raises(ModelNotReady) as refused:
        await crowded.infer(models.request(model="a"), Deadline.after(0))
    assert refused.value.retry_after_s
    await until(lambda: crowded.serving("a") is not None)
    response = await crowded.infer(models.request(model="a"), Deadline.after(PATIENCE_S))
    assert response.output("logits").argmax() == 3


async def test_models_that_are_pinned_or_in_use_stay(puppet: Puppet, tmp_path: Path) -> None:
    path = models.classifier(tmp_path / "m.onnx")
    host = ModelHost(HostSettings(workers=1, memory_budget_bytes=int(1.5 * 1.5 * path.stat().st_size)))
    await host.load_file(ModelFile("pinned", "1", path, pinned=True))
    with pytest.raises(ModelNotReady, match="no room for other") as refused:
        await host.load_file(ModelFile("other", "1", path))
    assert refused.value.retry_after_s
    await host.load_file(puppet_file(tmp_path))  # which is small
    await host.unload("pinned")
    (tmp_path / "puppet").write_bytes(bytes(path.stat().st_size))
    await host.load("puppet")
    puppet.hold()
    async with asyncio.TaskGroup() as group:
        running = group.create_task(answer(host, 1))
        await until(lambda: puppet.running == 1)
        with pytest.raises(ModelNotReady, match="no room for other"):
            await host.load_file(ModelFile("other", "1", path))
        puppet.release()
    assert running.result() == [1]
    await host.load_file(ModelFile("other", "1", path))
    assert host.serving("puppet") is None
    await host.close()
    await until(lambda: host.memory_bytes == 0)


async def test_memory_of_what_could_not_be_opened_is_given_back(tmp_path: Path) -> None:
    (tmp_path / "bad.onnx").write_bytes(b"no model")
    host = ModelHost(HostSettings(workers=1, memory_budget_bytes=10**9))
    for _ in range(3):
        with pytest.raises(EngineFault):
            await host.load_file(ModelFile("bad", "1", tmp_path / "bad.onnx"))
    assert host.memory_bytes == 0
    await host.close()
