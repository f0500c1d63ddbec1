"""A model host under load and under fire: swaps, queues, deadlines, bad input, nonsense answers. Real ONNX models."""

import asyncio
import dataclasses
import hashlib
import math
import time
from collections.abc import AsyncIterator, Coroutine
from contextlib import AsyncExitStack
from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest
from msgspec.structs import replace
from simulators import models, puppet_engine
from simulators.places import until

from hedgerow import engines
from hedgerow.backend import Deadline
from hedgerow.errors import (
    DeadlineExceeded,
    EngineFault,
    HedgerowError,
    InvalidInput,
    InvalidRelease,
    ModelNotFound,
    ModelNotReady,
    Overloaded,
    Unavailable,
)
from hedgerow.host.model_host import ModelHost, Staged
from hedgerow.host.pace import PROOF_RUNS
from hedgerow.host.room import MEMORY_FACTOR
from hedgerow.host.settings import BatchSettings, HostSettings, ModelFile
from hedgerow.isolation.session import IsolationSettings
from hedgerow.tensors import InferRequest, InferResponse, tensor

SLOW_S = 0.15
"""At least what one run of the slow model takes."""


@pytest.fixture(params=engines.available())
def engine(request: pytest.FixtureRequest) -> str:
    return str(request.param)


PATIENCE_S = 60.0
ONE_BY_ONE = HostSettings(workers=1, queue_size=4, batching=BatchSettings(max_batch_size=1))
"""What runs together is the subject of test_batching."""


@pytest.fixture
async def host() -> AsyncIterator[ModelHost]:
    host = ModelHost(ONE_BY_ONE)
    yield host
    await host.close()


def file(path: Path, version: str = "1", engine: str = "onnxruntime") -> ModelFile:
    return ModelFile("digits", version, path, engine=engine)


async def label(host: ModelHost, digit: int, deadline: Deadline | None = None) -> int:
    response = await host.infer(models.request(models.pixels(digit)), deadline or Deadline.after(10))
    return int(response.output("logits").argmax())


def served(host: ModelHost) -> Staged:
    serving = host.serving("digits")
    assert serving is not None
    return serving


async def until_waiting(host: ModelHost, count: int) -> None:
    """Until so many requests wait, because an instance runs something else."""
    async with asyncio.timeout(60):
        while served(host).batcher.waiting != count or served(host).users <= count:  # noqa: ASYNC110 (nobody tells)
            await asyncio.sleep(0)


async def slow_model(host: ModelHost, folder: Path) -> None:
    """Load a model that takes at least SLOW_S on this machine, however fast or busy that is."""
    steps = 50
    while True:
        await host.load_file(file(models.slow(folder / f"slow{steps}.onnx", steps=steps)))
        started = time.monotonic()
        await label(host, 3)
        await label(host, 3)
        if (took := time.monotonic() - started) / 2 >= 1.5 * SLOW_S:
            return
        steps = math.ceil(steps * max(1.5, 3.4 * SLOW_S / took))


async def test_answers_with_what_the_file_says(host: ModelHost, engine: str, tmp_path: Path) -> None:
    path = models.classifier(tmp_path / "m.onnx", extra=True)
    await host.load_file(dataclasses.replace(file(path, "7", engine), precision="fp32"))
    assert await host.ready("digits")
    assert not await host.ready("digits", "6")
    properties = (await host.metadata("digits", "7")).properties
    assert properties == {
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "engine": engine,
        "precision": "fp32",
    }
    request = replace(models.request(models.pixels(3, 1)), id="a", outputs=("label",))
    response = await host.infer(request, Deadline.never())
    assert (response.model, response.version, response.id) == ("digits", "7", "a")
    assert [output.name for output in response.outputs] == ["label"]
    assert response.output("label").tolist() == [3, 1]


async def test_a_swap_under_load_fails_no_request_and_closes_the_old_model(
    host: ModelHost, engine: str, tmp_path: Path
) -> None:
    paths = [models.classifier(tmp_path / f"m{shift}.onnx", shift=shift) for shift in range(4)]
    await host.load_file(file(paths[0], "0", engine))
    stop, answered = asyncio.Event(), set()

    async def caller(digit: int) -> None:
        while not stop.is_set():
            response = await host.infer(models.request(models.pixels(digit)), Deadline.after(10))
            # Each answer is wholly of one version: that of the model which computed it.
            assert response.output("logits").argmax() == (digit + int(response.version)) % 10
            answered.add(response.version)

    async with asyncio.TaskGroup() as group:
        for digit in range(4):  # as many as fit into the queue
            group.create_task(caller(digit))
        for version, path in enumerate(paths[1:], 1):
            old = host.serving("digits")
            await host.load_file(file(path, str(version), engine))
            assert old is not None
            assert old.closed.is_set()
            assert old.users == 0
            assert await label(host, 0) == version
        stop.set()
    assert answered == {"0", "1", "2", "3"}


async def test_what_runs_finishes_on_the_old_model_and_what_waits_is_answered_by_the_new_one(
    host: ModelHost, tmp_path: Path
) -> None:
    await slow_model(host, tmp_path)
    async with asyncio.TaskGroup() as group:
        runs = group.create_task(host.infer(models.request(), Deadline.after(60)))
        await until_waiting(host, 0)
        waits = [group.create_task(host.infer(models.request(), Deadline.after(60))) for _ in range(2)]
        old = replace(models.request(), version="1")
        named = group.create_task(caught(host.infer(old, Deadline.after(60))))
        await until_waiting(host, 3)
        await host.load_file(file(models.classifier(tmp_path / "new.onnx", shift=1), "2"))
        assert runs.done(), "activate returns when the old one is drained"
    assert runs.result().version == "1"
    assert {task.result().version for task in waits} == {"2"}
    assert {int(task.result().output("logits").argmax()) for task in waits} == {4}
    assert isinstance(named.result(), ModelNotFound), "the version that it asks for is gone"
    assert "'1'" in str(named.result())


async def test_what_waits_and_does_not_fit_the_new_model_is_refused_by_name(host: ModelHost, tmp_path: Path) -> None:
    await slow_model(host, tmp_path)
    async with asyncio.TaskGroup() as group:
        group.create_task(host.infer(models.request(), Deadline.after(60)))
        await until_waiting(host, 0)
        waits = group.create_task(caught(host.infer(models.request(), Deadline.after(60))))
        await until_waiting(host, 1)
        await host.load_file(file(models.swapped(tmp_path / "new.onnx", onnx.TensorProto.FLOAT), "2"))
    assert isinstance(waits.result(), InvalidInput)
    assert "'x'" in str(waits.result())


async def test_what_is_staged_answers_beside_what_serves_and_can_be_discarded(host: ModelHost, tmp_path: Path) -> None:
    await host.load_file(file(models.classifier(tmp_path / "old.onnx"), "1"))
    staged = await host.stage(file(models.classifier(tmp_path / "new.onnx", shift=1), "2"))
    response = await staged.infer(models.request(models.pixels(3)), Deadline.after(10))
    assert (response.version, int(response.output("logits").argmax())) == ("2", 4)
    assert await label(host, 3) == 3
    await host.discard(staged)
    with pytest.raises(ModelNotReady):
        await staged.infer(models.request(), Deadline.after(10))
    assert await label(host, 3) == 3


async def test_a_full_queue_refuses_at_once_and_says_when_to_come_back(host: ModelHost, tmp_path: Path) -> None:
    await slow_model(host, tmp_path)
    async with asyncio.TaskGroup() as group:
        # One runs, four wait: the next is too many.
        taken = [group.create_task(host.infer(models.request(), Deadline.after(60))) for _ in range(5)]
        await until_waiting(host, 4)
        with pytest.raises(Overloaded) as refused:
            await host.infer(models.request(), Deadline.after(60))
        assert not any(task.done() for task in taken), "it was told at once"
        assert refused.value.retry_after_s is not None
        assert refused.value.retry_after_s > 0
        assert host.snapshot("digits").inflight == 5
    assert all(task.result() for task in taken)
    assert host.snapshot("digits").inflight == 0
    assert await label(host, 3) == 3, "and there is room again"


async def test_a_deadline_that_passes_while_queued_is_told_at_once_and_the_work_never_run(
    host: ModelHost, tmp_path: Path
) -> None:
    await slow_model(host, tmp_path)
    await host.load("digits")  # as new: how long it takes is not known, and nobody refused for it
    async with asyncio.TaskGroup() as group:
        running = group.create_task(host.infer(models.request(), Deadline.after(60)))
        await until_waiting(host, 0)
        with pytest.raises(DeadlineExceeded):
            await host.infer(models.request(), Deadline.after(SLOW_S / 10))
        assert not running.done()
        assert served(host).users == 1
    assert await label(host, 3) == 3
    assert served(host).answers == 2


async def test_what_cannot_be_answered_in_time_is_refused_before_it_waits(host: ModelHost, tmp_path: Path) -> None:
    await slow_model(host, tmp_path)
    async with asyncio.TaskGroup() as group:
        running = group.create_task(host.infer(models.request(), Deadline.after(60)))
        await until_waiting(host, 0)
        with pytest.raises(Overloaded, match="deadline"):
            await host.infer(models.request(), Deadline.after(SLOW_S / 2))
        assert not running.done()


async def test_a_cancelled_request_leaves_the_queue_and_never_runs(host: ModelHost, tmp_path: Path) -> None:
    await slow_model(host, tmp_path)
    before = served(host).answers
    async with asyncio.TaskGroup() as group:
        taken = [group.create_task(host.infer(models.request(), Deadline.after(60))) for _ in range(5)]
        await until_waiting(host, 4)
        for task in taken[1:]:
            task.cancel()
        await until_waiting(host, 0)
        assert await label(host, 3) == 3
    assert served(host).answers - before == 2, "the first and the last, none of those who left"
    assert host.snapshot("digits").inflight == 0


async def test_the_event_loop_stays_free_while_a_model_runs(host: ModelHost, tmp_path: Path) -> None:
    await slow_model(host, tmp_path)
    async with asyncio.TaskGroup() as group:
        running = group.create_task(host.infer(models.request(), Deadline.after(60)))
        ticks = 0
        while not running.done():
            await asyncio.sleep(SLOW_S / 20)
            ticks += 1
    assert ticks >= 5


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ((), "'pixels' is missing"),
        ((tensor("pixels", np.zeros((1, 63), np.float32)),), r"'pixels'.*\[-1, ?64\].*\[1, ?63\]"),
        ((tensor("pixels", np.zeros((1, 64), np.float64)),), "'pixels'.*FP32.*FP64"),
        ((tensor("pixels", models.pixels(1)), tensor("more", models.pixels(1))), "'more'"),
    ],
)
async def test_bad_input_reaches_no_engine_and_is_named(
    host: ModelHost, tmp_path: Path, tensors: tuple[object, ...], words: str
) -> None:
    await host.load_file(file(models.classifier(tmp_path / "m.onnx")))
    with pytest.raises(InvalidInput, match=words):
        await host.infer(InferRequest(model="digits", inputs=tensors), Deadline.after(10))  # type: ignore[arg-type] # object() for brevity
    serving = host.serving("digits")
    assert serving is not None
    assert (serving.answers, serving.faults) == (0, 0)


async def test_nonsense_is_a_fault_unless_the_caller_brought_it(host: ModelHost, engine: str, tmp_path: Path) -> None:
    await host.load_file(file(models.square_root(tmp_path / "m.onnx"), engine=engine))
    with pytest.raises(EngineFault, match=r"'logits'.*not finite"):
        await host.infer(models.request(models.pixels(3, strength=-1)), Deadline.after(10))
    serving = host.serving("digits")
    assert serving is not None
    assert serving.faults == 1
    theirs = await host.infer(models.request(models.pixels(3, strength=math.nan)), Deadline.after(10))
    assert np.isnan(theirs.output("logits")).any()
    assert await label(host, 3) == 3


async def test_unknown_models_and_versions_and_unloaded_models_are_told_apart(host: ModelHost, tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound):
        await host.metadata("digits")
    await host.load_file(file(models.classifier(tmp_path / "m.onnx")))
    with pytest.raises(ModelNotFound, match="'2'"):
        await host.infer(replace(models.request(), version="2"), Deadline.after(10))
    await host.unload("digits")
    assert not await host.ready("digits")
    with pytest.raises(ModelNotReady):
        await host.infer(models.request(), Deadline.after(10))
    await host.load("digits")
    assert await label(host, 3) == 3
    with pytest.raises(ModelNotFound):
        await host.load("other")


async def test_a_file_that_cannot_serve_leaves_what_serves_alone(host: ModelHost, tmp_path: Path) -> None:
    good = models.classifier(tmp_path / "good.onnx")
    await host.load_file(file(good, "1"))
    with pytest.raises(InvalidRelease, match="sha256"):
        await host.load_file(dataclasses.replace(file(good, "2"), sha256="0" * 64))
    (tmp_path / "bad.onnx").write_bytes(b"no model")
    with pytest.raises(EngineFault):
        await host.load_file(file(tmp_path / "bad.onnx", "2"))
    with pytest.raises(InvalidRelease, match="cannot be read") as missing:
        await host.load_file(file(tmp_path / "missing.onnx", "2"))
    assert str(tmp_path) not in str(missing.value)
    assert (await host.metadata("digits")).versions == ("1",)
    assert await label(host, 3) == 3


async def test_closing_answers_what_is_in_flight_first(tmp_path: Path) -> None:
    host = ModelHost(ONE_BY_ONE)
    await slow_model(host, tmp_path)
    async with asyncio.TaskGroup() as group:
        taken = [group.create_task(host.infer(models.request(), Deadline.after(60))) for _ in range(2)]
        await until_waiting(host, 1)
        await host.close()
        assert all(task.done() for task in taken)
    with pytest.raises(ModelNotReady):
        await host.infer(models.request(), Deadline.after(10))
    await host.close()


async def test_what_outlasts_the_drain_is_answered_and_what_waits_behind_it_refused_at_once(tmp_path: Path) -> None:
    host = ModelHost(msgspec.structs.replace(ONE_BY_ONE, drain_s=0.001))
    await slow_model(host, tmp_path)
    serving = served(host)
    async with asyncio.TaskGroup() as group:
        running = group.create_task(host.infer(models.request(), Deadline.after(60)))
        waiting = [group.create_task(caught(host.infer(models.request(), Deadline.after(60)))) for _ in range(2)]
        await until_waiting(host, 2)
        await host.close()
        assert not running.done()
        assert host.left_running == 1
    assert running.result().version == "1"
    assert [type(task.result()) for task in waiting] == [Unavailable, Unavailable]
    assert serving.closed.is_set()
    assert host.left_running == 0


async def caught(answer: Coroutine[object, object, InferResponse]) -> Exception:
    with pytest.raises(HedgerowError) as error:
        await answer
    return error.value


async def test_labels_keep_their_places_or_are_refused(host: ModelHost, tmp_path: Path) -> None:
    path = models.classifier(tmp_path / "m.onnx")
    await host.load_file(dataclasses.replace(file(path), labels=("none", "", "cat")))
    assert (await host.metadata("digits")).properties["labels"] == "none,,cat"
    with pytest.raises(InvalidRelease, match="'tench, Tinca tinca'"):
        await host.load_file(dataclasses.replace(file(path), labels=("tench, Tinca tinca", "cat")))


# -- loading that hangs


@pytest.fixture
def puppets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has the engine "puppet" in this process."""
    load = engines.load
    monkeypatch.setattr(engines, "load", lambda name: puppet_engine if name == "puppet" else load(name))


def puppet(folder: Path, name: str, text: str, version: str = "1") -> ModelFile:
    """A model that does what `text` says when it is opened and, in a second line, closed."""
    path = folder / f"{name}-{version}"
    path.write_text(text)
    return ModelFile(name, version, path, engine="puppet")


@pytest.fixture
async def patient(puppets: None, tmp_path: Path) -> AsyncIterator[ModelHost]:
    """A host that waits for models for as long as the test does, whose hanging threads end with it."""
    host = ModelHost(HostSettings(loaders=2, load_timeout_s=600.0))
    yield host
    (tmp_path / "let").touch()
    await host.close()


@pytest.fixture
async def hasty(puppets: None, tmp_path: Path) -> AsyncIterator[ModelHost]:
    """A host that gives up at once on what it has begun to load."""
    isolation = {"alone": IsolationSettings()}
    host = ModelHost(HostSettings(load_timeout_s=0.001, max_hung_loads=2, isolation=isolation))
    yield host
    (tmp_path / "let").touch()
    await until(lambda: host.hung_loads == 0)
    await host.close()


async def test_a_model_that_hangs_while_it_loads_keeps_no_other_from_loading_and_answering(
    patient: ModelHost, tmp_path: Path
) -> None:
    async with asyncio.TaskGroup() as group:
        hanging = group.create_task(patient.load_file(puppet(tmp_path, "hangs", f"wait {tmp_path / 'let'}")))
        await patient.load_file(file(models.classifier(tmp_path / "m.onnx")))
        assert await label(patient, 3) == 3
        assert not hanging.done()
        (tmp_path / "let").touch()
    assert await patient.ready("hangs")


async def test_more_models_than_loaders_wait_for_their_turn(patient: ModelHost, tmp_path: Path) -> None:
    async with asyncio.TaskGroup() as group:
        for index in range(2):
            hangs = puppet(tmp_path, f"hangs{index}", f"wait {tmp_path / 'let'}")
            group.create_task(patient.load_file(hangs))
        await asyncio.sleep(0)
        waits = group.create_task(patient.load_file(puppet(tmp_path, "waits", f"touch {tmp_path / 'opened'}")))
        await asyncio.sleep(0.05)  # time to do wrong; on a slow machine it just might not be noticed
        assert not (tmp_path / "opened").exists()
        (tmp_path / "let").touch()
    assert waits.done()
    assert (tmp_path / "opened").exists()


async def test_a_load_that_takes_too_long_is_given_up_and_closed_should_it_come_back(
    hasty: ModelHost, tmp_path: Path
) -> None:
    closed = tmp_path / "closed"
    hangs = puppet(tmp_path, "hangs", f"wait {tmp_path / 'let'}\ntouch {closed}")
    with pytest.raises(EngineFault, match=r"hangs 1 cannot be loaded: it was not open within 0\.001 s"):
        await hasty.load_file(hangs)
    assert hasty.hung_loads == 1
    assert hasty.memory_bytes > 0, "what it has taken is not given back"
    assert not await hasty.ready("hangs")
    (tmp_path / "let").touch()
    await until(lambda: hasty.hung_loads == 0)
    await until(closed.exists)
    assert hasty.memory_bytes == 0


async def test_with_too_many_that_hang_no_more_are_loaded_in_this_process_and_it_says_so(
    hasty: ModelHost, tmp_path: Path
) -> None:
    for index in range(2):
        with pytest.raises(EngineFault, match="was not open"):
            await hasty.load_file(puppet(tmp_path, f"hangs{index}", f"wait {tmp_path / 'let'}"))
    good = puppet(tmp_path, "good", "open")
    with pytest.raises(ModelNotReady, match="good is not loaded: 2 models hang"):
        await hasty.load_file(good)
    isolated = dataclasses.replace(file(models.classifier(tmp_path / "m.onnx")), model="alone")
    with pytest.raises(EngineFault, match="alone 1 cannot be loaded: it was not open"):  # but it was tried
        await hasty.load_file(isolated)
    (tmp_path / "let").touch()
    await until(lambda: hasty.hung_loads == 0)
    with pytest.raises(EngineFault, match="good 1 cannot be loaded"):  # tried again, by a host as hasty as ever
        await hasty.load_file(puppet(tmp_path, "good", f"wait {tmp_path / 'never'}"))
    (tmp_path / "never").touch()


async def test_a_model_that_hangs_while_it_is_closed_is_given_up_as_well(puppets: None, tmp_path: Path) -> None:
    host = ModelHost(HostSettings(loaders=1, load_timeout_s=1.0, drain_s=0.001))

    async def loaded(puppet: ModelFile) -> None:
        async with asyncio.timeout(60):
            while True:
                try:
                    return await host.load_file(puppet)
                except (EngineFault, ModelNotReady):  # a machine so slow that even this took too long
                    await asyncio.sleep(0.1)

    await loaded(puppet(tmp_path, "hangs", f"open\nwait {tmp_path / 'let'}"))
    await host.unload("hangs")
    await loaded(puppet(tmp_path, "good", "open"))  # the only thread for it was taken until then
    assert host.hung_loads >= 1
    (tmp_path / "let").touch()
    await until(lambda: host.hung_loads == 0)
    await host.close()


async def test_what_makes_room_is_closed_before_what_needs_it_is_opened(puppets: None, tmp_path: Path) -> None:
    text = f"open\nwait {tmp_path / 'let'}"
    host = ModelHost(HostSettings(memory_budget_bytes=2 * len(text)))
    await host.load_file(puppet(tmp_path, "old", text))
    async with asyncio.TaskGroup() as group:
        new = puppet(tmp_path, "new", f"touch {tmp_path / 'opened'}")
        loading = group.create_task(host.load_file(new))
        await until(lambda: host.serving("old") is None)
        await asyncio.sleep(0.05)  # time to do wrong; on a slow machine it just might not be noticed
        assert not (tmp_path / "opened").exists()
        assert not loading.done()
        (tmp_path / "let").touch()
    assert (tmp_path / "opened").exists()
    await host.close()


async def test_requests_without_rows_prove_nothing_and_keep_nobody_from_being_answered(
    stack: AsyncExitStack, tmp_path: Path
) -> None:
    host = ModelHost()
    stack.push_async_callback(host.close)
    await host.load_file(file(models.classifier(tmp_path / "1.onnx")))
    for _ in range(2 * PROOF_RUNS):
        empty = await host.infer(models.request(np.zeros((0, 64), np.float32)), Deadline.after(PATIENCE_S))
        assert empty.outputs[0].shape[0] == 0
    answer = await host.infer(models.request(models.pixels(3)), Deadline.after(PATIENCE_S))
    assert answer.output("logits").argmax() == 3


async def test_a_model_for_which_there_can_be_no_room_costs_no_other_its_place(
    stack: AsyncExitStack, tmp_path: Path
) -> None:
    small = models.classifier(tmp_path / "small.onnx")
    need = int(MEMORY_FACTOR * small.stat().st_size)
    host = ModelHost(HostSettings(memory_budget_bytes=3 * need))
    stack.push_async_callback(host.close)
    await host.load_file(dataclasses.replace(file(small), model="pinned", pinned=True))
    await host.load_file(dataclasses.replace(file(small), model="idle"))
    large = tmp_path / "large.onnx"
    large.write_bytes(small.read_bytes() + bytes(int(1.5 * small.stat().st_size)))
    with pytest.raises(ModelNotReady, match="no room"):
        await host.load_file(dataclasses.replace(file(large), model="large"))
    assert host.snapshot("idle").reason == ""
    assert "idle" in host._serving
