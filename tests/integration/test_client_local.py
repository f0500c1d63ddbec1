"""What only the clients without gRPC have to get right: their event loop, and arrays shared with the caller."""

import asyncio
import dataclasses
import re
import textwrap
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace
from simulators import models
from simulators.background import in_background
from simulators.clients import TIMEOUT_S, Explaining

import hedgerow.backend
import hedgerow.client
import hedgerow.host.model_host
from hedgerow.backend import Backend, Deadline
from hedgerow.client import AsyncLocalClient, Client, InferenceClient, LocalClient, Result
from hedgerow.config import ServerSettings
from hedgerow.errors import HedgerowError, InvalidInput, ModelNotFound
from hedgerow.host.model_host import ModelHost
from hedgerow.host.settings import ModelFile
from hedgerow.journey import Route
from hedgerow.router import Router
from hedgerow.server import Server
from hedgerow.tensors import InferRequest, InferResponse

X = np.arange(3, dtype=np.float32)


class Keeping(Explaining):
    """Keeps what it is given and gives what it keeps, as caches and observers do."""

    async def infer(self, request: InferRequest, deadline: Deadline) -> InferResponse:
        response = await super().infer(request, deadline)
        self.response = response
        return response


@asynccontextmanager
async def digits(path: Path) -> AsyncIterator[Backend]:
    host = ModelHost()
    await host.load_file(ModelFile("digits", "1", models.classifier(path), engine="onnxruntime"))
    yield Router({"digits": Route(model="digits", edge=host)})
    await host.close()


@asynccontextmanager
async def serving(path: Path) -> AsyncIterator[Server]:
    async with digits(path) as backend, Server(backend, ServerSettings(port=0)) as server:
        yield server


def ask(client: InferenceClient) -> list[Result]:
    """Takes either kind of client."""
    return [client.infer("digits", models.pixels(3)), *client.infer_many("digits", [models.pixels(4)] * 20)]


def test_a_model_file_answers_on_a_device_as_it_does_over_the_wire(tmp_path: Path) -> None:
    with LocalClient(digits(tmp_path / "local.onnx")) as here:
        local = ask(here)

    with in_background(lambda: serving(tmp_path / "remote.onnx")) as server, Client(server.address) as there:
        remote = ask(there)
    for mine, yours in zip(local, remote, strict=True):
        assert mine.outputs["logits"].tolist() == yours.outputs["logits"].tolist()
        assert not mine.outputs["logits"].flags.writeable
        assert not yours.outputs["logits"].flags.writeable
        assert dataclasses.replace(mine, outputs={}) == dataclasses.replace(yours, outputs={})
    assert [int(one.outputs["logits"].argmax()) for one in local[:2]] == [3, 4]
    assert local[0].tier == "edge"


def test_the_examples_of_the_documentation_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    remote, local = re.findall(r"::\n\n((?:(?:    .*)?\n)+)", hedgerow.client.__doc__ or "")
    names = {
        **vars(hedgerow.client), **vars(hedgerow.host.model_host), **vars(hedgerow.backend),
        "AsyncIterator": AsyncIterator, "asynccontextmanager": asynccontextmanager, "Path": Path,
        "image": models.pixels(3), "images": [models.pixels(digit) for digit in range(3)],
    }  # fmt: skip
    monkeypatch.chdir(tmp_path)
    with in_background(lambda: serving(Path("digits.onnx"))) as server:
        exec(textwrap.dedent(remote).replace("localhost:8001", server.address).replace('"image":', '"pixels":'), names)
    assert capsys.readouterr().out.split() == ["3", "edge", "None", "0", "0", "1", "1", "2", "2"]
    exec(textwrap.dedent(local), names)
    assert capsys.readouterr().out.split() == ["3"]


async def test_a_caller_may_reuse_its_buffers_and_spoils_nothing_of_the_backends() -> None:
    backend = Keeping()
    async with AsyncLocalClient(backend) as client:
        frame = X.copy()
        result = await client.infer("double", frame)
        frame[:] = 9
        assert backend.requests[-1].input("x").tolist() == [0, 1, 2]
        with pytest.raises(ValueError, match="read-only"):
            result.outputs["y"][0] = 9
        assert backend.response.output("y").flags.writeable, "it stays the backend's to write to"


@pytest.mark.parametrize("given", [X.astype(">f4"), np.arange(6, dtype=np.float32)[::2] / 2, X[::-1][::-1]])
async def test_an_array_reaches_an_engine_as_it_would_over_the_wire(given: np.ndarray) -> None:
    backend = Explaining()
    async with AsyncLocalClient(backend) as client:
        assert (await client.infer("double", given)).outputs["y"].tolist() == [0, 2, 4]
    array = backend.requests[-1].input("x")
    assert array.dtype == np.dtype("<f4")
    assert array.flags.c_contiguous


def test_what_goes_wrong_in_opening_is_raised_by_the_constructor(tmp_path: Path) -> None:
    @asynccontextmanager
    async def broken() -> AsyncIterator[Backend]:
        host = ModelHost()
        try:
            await host.load("digits")
            yield host
        finally:
            await host.close()

    with pytest.raises(ModelNotFound, match="'digits'"):
        LocalClient(broken())


def test_what_goes_wrong_in_closing_is_raised_by_close_and_what_was_opened_is_left_in_its_loop() -> None:
    loops: list[asyncio.AbstractEventLoop] = []

    @asynccontextmanager
    async def opened() -> AsyncIterator[Backend]:
        loops.append(asyncio.get_running_loop())
        yield Explaining()
        loops.append(asyncio.get_running_loop())
        raise OSError("the disk is full")

    client = LocalClient(opened())
    assert client.infer("double", X).outputs["y"].tolist() == [0, 2, 4]
    with pytest.raises(OSError, match="the disk is full"):
        client.close()
    assert loops[0] is loops[1]
    assert loops[0].is_closed()


def test_closing_ends_those_who_wait_and_refuses_those_who_come() -> None:
    backend, caught = Explaining(), []
    client = LocalClient(backend)

    def wait() -> None:
        try:
            client.infer("held", {"x": X})
        except HedgerowError as error:
            caught.append(error)

    waiting = threading.Thread(target=wait)
    waiting.start()
    assert backend.begun.acquire(timeout=TIMEOUT_S)
    client.close()
    waiting.join(TIMEOUT_S)
    assert [str(error) for error in caught] == ["the client is closed"]
    assert backend.cancelled.acquire(timeout=TIMEOUT_S)
    for call in (lambda: client.infer("double", X), lambda: client.infer_many("double", [X])):
        with pytest.raises(HedgerowError, match="the client is closed"):
            call()
    client.close()


def test_a_closed_client_leaves_no_thread_behind_even_where_an_iterable_never_comes_to_an_end() -> None:
    before, blocked = set(threading.enumerate()), threading.Event()

    def waiting() -> object:
        yield X
        blocked.wait()

    with LocalClient(Explaining()) as client, client.stream("double", waiting()) as answers:  # type: ignore[arg-type]
        assert next(answers).id == "0"
    loops = [thread for thread in set(threading.enumerate()) - before if thread.name == "hedgerow-client"]
    for thread in loops:
        thread.join(TIMEOUT_S)
    assert not any(thread.is_alive() for thread in loops)
    blocked.set()


async def test_a_model_that_is_replaced_by_one_with_another_input_is_found_again() -> None:
    backend = Explaining()
    async with AsyncLocalClient(backend) as client:
        await client.infer("double", X)
        metadata = client._plans._interfaces["double", ""]
        renamed = replace(metadata, inputs=(replace(metadata.inputs[0], name="old"),))
        client._plans._interfaces["double", ""] = renamed
        with pytest.raises(InvalidInput, match="'x' is missing"):
            await client.infer("double", X)
        assert (await client.infer("double", X)).outputs["y"].tolist() == [0, 2, 4]
