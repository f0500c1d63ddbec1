"""Tensors in shared memory: they arrive whole, and who plays tricks with the memory gets an error and no more."""

import contextlib
import os
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from contract.extensions import ExtensionRules
from contract.target import Target
from numpy.typing import NDArray
from simulators.background import in_background

from hedgerow import transports
from hedgerow.backend import Deadline
from hedgerow.config import ServerSettings
from hedgerow.errors import InvalidInput, NotFound, Overloaded
from hedgerow.function import FunctionBackend, FunctionModel
from hedgerow.oip.messages import request_to_proto, response_from_proto
from hedgerow.proto import oip_pb2, oip_pb2_grpc
from hedgerow.server import Server
from hedgerow.shared_memory.regions import FOLDER, Regions, SharedMemorySettings
from hedgerow.shared_memory.tensors import SharedTensors
from hedgerow.tensors import InferRequest, ModelMetadata, TensorSpec, tensor

pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="no POSIX shared memory in files here")

CALL_S = 60.0
SIZE = 64
"""Bytes of an array of sixteen FP32."""
X = np.arange(16, dtype=np.float32)

Arrays = Mapping[str, NDArray[Any]]
Make = Callable[..., Path]


@pytest.fixture
def memory() -> Iterator[Make]:
    """Makes shared memory that holds these bytes; its path, whose name is its key."""
    made: list[Path] = []

    def make(held: bytes = bytes(2 * SIZE)) -> Path:
        path = FOLDER / f"hedgerow-test-{uuid.uuid4().hex}"
        made.append(path)
        path.write_bytes(held)
        return path

    yield make
    for path in made:
        path.unlink(missing_ok=True)


def doubled(inputs: Arrays) -> Arrays:
    return {"y": inputs["x"] * 2, "z": inputs["x"] + 1}


def shouted(inputs: Arrays) -> Arrays:
    return {"y": np.array([text.upper() for text in inputs["x"]], object)}


async def counted(inputs: Arrays) -> AsyncIterator[Arrays]:
    for number in inputs["x"]:
        yield {"y": np.full(16, number)}


def model(name: str, function: Any, datatype: str, *outputs: str) -> FunctionModel:
    x = TensorSpec("x", datatype, (-1,))
    specs = tuple(TensorSpec(output, datatype, (-1,)) for output in outputs)
    return FunctionModel(ModelMetadata(name, ("1",), "python", (x,), specs), function)


def backend() -> FunctionBackend:
    return FunctionBackend(
        model("doubled", doubled, "FP32", "y", "z"),
        model("shouted", shouted, "BYTES", "y"),
        model("counted", counted, "FP32", "y"),
    )


class Caller:
    """Who calls a server over a channel of its own."""

    def __init__(self, channel: grpc.aio.Channel, server: Server) -> None:
        self.stub: Any = oip_pb2_grpc.GRPCInferenceServiceStub(channel)
        self.server = server

    async def register(self, name: str, path: Path, byte_size: int = 2 * SIZE, offset: int = 0) -> None:
        await self.stub.SystemSharedMemoryRegister(
            oip_pb2.SystemSharedMemoryRegisterRequest(
                name=name, key=f"/{path.name}", offset=offset, byte_size=byte_size
            ),
            timeout=CALL_S,
        )

    async def unregister(self, name: str = "") -> None:
        await self.stub.SystemSharedMemoryUnregister(
            oip_pb2.SystemSharedMemoryUnregisterRequest(name=name), timeout=CALL_S
        )

    async def infer(self, message: oip_pb2.ModelInferRequest) -> oip_pb2.ModelInferResponse:
        answer: oip_pb2.ModelInferResponse = await self.stub.ModelInfer(message, timeout=CALL_S)
        return answer

    async def serves(self) -> None:
        """Raise unless a request as ever is answered."""
        assert (response_from_proto(await self.infer(plain())).output("y") == 2 * X).all()


@contextlib.asynccontextmanager
async def calling(transport: str = "native", compatibility: Any = "", **settings: Any) -> AsyncIterator[Caller]:
    server = Server(
        backend(),
        ServerSettings(port=0, transport=transport, compatibility=compatibility),
        shared_memory=SharedMemorySettings(**settings),
    )
    async with server, grpc.aio.insecure_channel(server.address) as channel:
        yield Caller(channel, server)


@pytest.fixture(params=transports.known())
async def caller(request: pytest.FixtureRequest) -> AsyncIterator[Caller]:
    async with calling(request.param) as caller:
        yield caller


def plain() -> oip_pb2.ModelInferRequest:
    """A request whose input lies in the message."""
    return request_to_proto(InferRequest(model="doubled", inputs=(tensor("x", X),)))


def lies(parameters: Any, region: str, byte_size: int, offset: int = 0) -> None:
    """Say in a tensor's `parameters` where it lies."""
    parameters["shared_memory_region"].string_param = region
    parameters["shared_memory_byte_size"].int64_param = byte_size
    if offset:
        parameters["shared_memory_offset"].int64_param = offset


def shared(
    region: str = "r", byte_size: int = SIZE, offset: int = 0, *, name: str = "doubled", shape: int = 16
) -> oip_pb2.ModelInferRequest:
    """A request whose input lies in `region`."""
    message = oip_pb2.ModelInferRequest(model_name=name)
    message.inputs.add(name="x", datatype="BYTES" if name == "shouted" else "FP32", shape=[shape])
    lies(message.inputs[0].parameters, region, byte_size, offset)
    return message


async def refused(call: Any) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await call
    return error.value.code(), error.value.details() or ""


async def test_inputs_and_outputs_lie_in_one_region_and_leave_the_message_empty(caller: Caller, memory: Make) -> None:
    path = memory(bytes(8) + X.tobytes() + bytes(SIZE))
    await caller.register("r", path, 2 * SIZE, offset=8)
    message = shared()
    for name in ("z", "y"):
        message.outputs.add(name=name)
    lies(message.outputs[1].parameters, "r", SIZE, SIZE)
    answer = await caller.infer(message)
    z, y = answer.outputs
    assert (y.datatype, list(y.shape)) == ("FP32", [16])
    assert y.parameters["shared_memory_region"].string_param == "r"
    assert y.parameters["shared_memory_byte_size"].int64_param == SIZE
    assert y.parameters["shared_memory_offset"].int64_param == SIZE
    assert z.name == "z"
    assert [len(raw) for raw in answer.raw_output_contents] == [SIZE, 0], "its place is kept among the others"
    assert (np.frombuffer(answer.raw_output_contents[0], np.float32) == X + 1).all()
    held = path.read_bytes()
    assert held[:8] == bytes(8)
    assert held[8 : 8 + SIZE] == X.tobytes(), "the input is as it was"
    assert (np.frombuffer(held[8 + SIZE :], np.float32) == 2 * X).all()


async def test_texts_lie_there_as_they_travel(caller: Caller, memory: Make) -> None:
    texts = b"\3\0\0\0abc\0\0\0\0"
    path = memory(texts + bytes(100))
    await caller.register("r", path, len(texts) + 100)
    message = shared("r", len(texts), name="shouted", shape=2)
    message.outputs.add(name="y")
    lies(message.outputs[0].parameters, "r", 100, len(texts))
    await caller.infer(message)
    assert path.read_bytes()[len(texts) :] == b"\3\0\0\0ABC\0\0\0\0" + bytes(100 - len(texts))


async def test_each_answer_of_a_stream_is_put_there_before_it_is_told(caller: Caller, memory: Make) -> None:
    path = memory(np.array([3, 4], np.float32).tobytes() + bytes(SIZE))
    await caller.register("r", path, 8 + SIZE)
    message = shared("r", 8, name="counted", shape=2)
    message.outputs.add(name="y")
    lies(message.outputs[0].parameters, "r", SIZE, 8)
    stream = caller.stub.ModelStreamInfer(iter([message, shared("none")]), timeout=CALL_S)
    answers = [answer async for answer in stream]
    assert [bool(answer.error_message) for answer in answers] == [False, False, True]
    assert "'none'" in answers[2].error_message
    assert (np.frombuffer(path.read_bytes()[8:], np.float32) == 4).all()


async def test_a_region_that_is_truncated_while_it_is_registered_costs_an_error_and_no_server(
    caller: Caller, memory: Make
) -> None:
    path = memory()
    await caller.register("r", path)
    writes = plain()
    writes.outputs.add(name="y")
    lies(writes.outputs[0].parameters, "r", SIZE)
    for size in (SIZE - 1, 0):
        os.truncate(path, size)
        for message in (shared(), writes):
            code, details = await refused(caller.infer(message))
            assert code is grpc.StatusCode.INVALID_ARGUMENT
            assert "'r'" in details
        assert path.stat().st_size == size, "it is not made longer again"
    await caller.serves()
    os.truncate(path, 2 * SIZE)
    await caller.infer(shared())


async def test_a_region_that_is_unregistered_while_a_request_runs_is_not_written_to(memory: Make) -> None:
    shared_tensors = SharedTensors(Regions(SharedMemorySettings()), 2**20)
    path = memory()
    shared_tensors.regions.register("r", path.name, 0, SIZE)
    message = plain()
    message.outputs.add(name="y")
    lies(message.outputs[0].parameters, "r", SIZE)
    answer = await backend().infer(InferRequest(model="doubled", inputs=(tensor("x", X),)), Deadline.never())
    with shared_tensors.lent(message, message.raw_input_contents) as (_, places):
        shared_tensors.regions.unregister("r")
        other = os.open(path, os.O_RDWR)  # most likely by the descriptor that has just become free
        with pytest.raises(InvalidInput, match="'r' was unregistered"):
            shared_tensors.placed(answer, places)
        os.close(other)
    assert path.read_bytes() == bytes(2 * SIZE)


async def test_what_is_outside_of_a_region_is_not_to_be_had(caller: Caller, memory: Make) -> None:
    await caller.register("r", memory(), SIZE)  # half of it
    for message, words in (
        (shared("r", SIZE, 1), "got 64 from 1 on"),
        (shared("r", SIZE + 4, shape=17), "got 68 from 0 on"),
        (shared("r", SIZE, 2**63 - 1), "'r' has 64 bytes"),
        (shared("r", 2**63 - 1), "'r' has 64 bytes"),
        (shared("r", -1), "shared_memory_byte_size"),
        (shared("r", SIZE - 4), "expected 64 bytes"),
    ):
        code, details = await refused(caller.infer(message))
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert "'x'" in details
        assert words in details
    code, details = await refused(caller.infer(shared("other")))
    assert code is grpc.StatusCode.NOT_FOUND
    assert "'other'" in details
    await caller.serves()


async def test_an_output_that_does_not_fit_is_not_written_at_all(caller: Caller, memory: Make) -> None:
    path = memory()
    await caller.register("r", path)
    message = plain()
    message.outputs.add(name="y")
    lies(message.outputs[0].parameters, "r", SIZE - 1)
    code, details = await refused(caller.infer(message))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert "'y'" in details
    assert path.read_bytes() == bytes(2 * SIZE)


async def test_contradictions_are_refused_by_name(caller: Caller, memory: Make) -> None:
    await caller.register("r", memory())
    typed = shared()
    typed.inputs[0].contents.fp32_contents[:] = [1.0] * 16
    more = shared()
    more.raw_input_contents.append(b"more")
    classes = plain()
    classes.outputs.add(name="y").parameters["classification"].int64_param = 1
    lies(classes.outputs[0].parameters, "r", SIZE)
    for message, words in ((typed, "'x'"), (more, "1 more"), (classes, "classes")):
        code, details = await refused(caller.infer(message))
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert words in details


async def test_the_status_tells_what_is_registered_and_stopping_closes_it(memory: Make) -> None:
    path = memory()
    before = _held(path)
    async with calling() as caller:
        await caller.register("r", path, SIZE, offset=4)
        await caller.register("s", path)
        asked = oip_pb2.SystemSharedMemoryStatusRequest
        told = (await caller.stub.SystemSharedMemoryStatus(asked(), timeout=CALL_S)).regions
        assert set(told) == {"r", "s"}
        assert (told["r"].name, told["r"].key, told["r"].offset, told["r"].byte_size) == ("r", f"/{path.name}", 4, SIZE)
        await caller.unregister("r")
        code, _ = await refused(caller.stub.SystemSharedMemoryStatus(asked(name="r"), timeout=CALL_S))
        assert code is grpc.StatusCode.NOT_FOUND
        assert (await refused(caller.infer(shared("r"))))[0] is grpc.StatusCode.NOT_FOUND
        await caller.infer(shared("s"))
        await caller.register("r", path)
        assert _held(path) == before + 2
        metadata = await caller.stub.ServerMetadata(oip_pb2.ServerMetadataRequest(), timeout=CALL_S)
        assert "system_shared_memory" in metadata.extensions
    assert _held(path) == before


def _held(path: Path) -> int:
    """Descriptors that this process has of a file."""
    count = 0
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            count += link.readlink() == path
    return count


async def test_a_server_that_was_not_told_to_takes_nothing_from_shared_memory(memory: Make) -> None:
    path = memory()
    async with (
        Server(backend(), ServerSettings(port=0)) as server,
        grpc.aio.insecure_channel(server.address) as channel,
    ):
        caller = Caller(channel, server)
        metadata = await caller.stub.ServerMetadata(oip_pb2.ServerMetadataRequest(), timeout=CALL_S)
        assert "system_shared_memory" not in metadata.extensions
        for call in (caller.register("r", path), caller.unregister(), caller.infer(shared())):
            assert (await refused(call))[0] is grpc.StatusCode.UNIMPLEMENTED
        assert _held(path) == 0
        await caller.serves()


async def test_memory_of_gpus_is_refused_and_forgetting_it_is_not(caller: Caller) -> None:
    register = oip_pb2.CudaSharedMemoryRegisterRequest(name="r", raw_handle=b"x", byte_size=SIZE)
    code, details = await refused(caller.stub.CudaSharedMemoryRegister(register, timeout=CALL_S))
    assert code is grpc.StatusCode.UNIMPLEMENTED
    assert "'r'" in details
    await caller.stub.CudaSharedMemoryUnregister(oip_pb2.CudaSharedMemoryUnregisterRequest(), timeout=CALL_S)
    status = await caller.stub.CudaSharedMemoryStatus(oip_pb2.CudaSharedMemoryStatusRequest(), timeout=CALL_S)
    assert not status.regions


async def test_tritons_words_are_there_for_those_who_look_for_them(memory: Make) -> None:
    path = memory()
    async with calling(compatibility="triton") as caller:
        await caller.register("r", path)
        large = plain()
        large.outputs.add(name="y")
        lies(large.outputs[0].parameters, "r", 4)
        for call, words in (
            (caller.register("r", path), "shared memory region 'r' already in manager"),
            (caller.register("s", FOLDER / "hedgerow-none"), "Unable to open shared memory region: '/hedgerow-none'"),
            (caller.register("s", path, 2**20), "failed to register shared memory region 's': invalid args"),
            (caller.infer(shared("s")), "Unable to find shared memory region: 's'"),
            (caller.infer(shared("r", 2**20)), "Invalid offset + byte size for shared memory region: 'r'"),
            (caller.infer(large), "request for output 'y' (4 bytes) should be at least 64 bytes to hold the results"),
        ):
            assert words in (await refused(call))[1]


class TestExtensions(ExtensionRules):
    """What the contract asks of a server that has the extension."""

    @pytest.fixture(params=transports.known())
    def target(self, request: pytest.FixtureRequest) -> Iterator[Target]:
        settings = ServerSettings(port=0, transport=request.param)
        with in_background(lambda: Server(backend(), settings, shared_memory=SharedMemorySettings())) as server:
            yield Target(server.address, "doubled", lambda: {"x": X})


# -- what may be registered


@pytest.fixture
def regions() -> Iterator[Regions]:
    regions = Regions(SharedMemorySettings(max_regions=2, max_bytes=1000))
    yield regions
    regions.unregister("")


@pytest.mark.parametrize(
    "key", ["", "/", ".", "..", "/..", "../etc/passwd", "/../../etc/passwd", "a/b", "//a", "a\0b", "/" + "a" * 256]
)
def test_a_key_that_is_no_name_in_the_folder_is_refused(regions: Regions, key: str) -> None:
    with pytest.raises(InvalidInput, match="'r': expected the key"):
        regions.register("r", key, 0, 8)


def test_only_regular_files_are_shared_memory(regions: Regions, memory: Make, tmp_path: Path) -> None:
    path = memory()
    path.unlink()
    (tmp_path / "secret").write_bytes(bytes(SIZE))
    makes: list[tuple[Callable[[], object], Callable[[], None]]] = [
        (lambda: path.symlink_to(tmp_path / "secret"), path.unlink),
        (path.mkdir, path.rmdir),
        (lambda: os.mkfifo(path), path.unlink),
    ]
    for make, remove in makes:
        make()
        with pytest.raises(InvalidInput, match=r"'r'.*cannot be opened"):
            regions.register("r", path.name, 0, 8)
        remove()
    assert _held(tmp_path / "secret") == 0


def test_regions_and_their_bytes_are_bounded_and_come_back(regions: Regions, memory: Make) -> None:
    key = memory(bytes(2000)).name
    with pytest.raises(Overloaded, match="'a': there is no room for 1001 bytes"):
        regions.register("a", key, 0, 1001)
    regions.register("a", key, 0, 900)
    with pytest.raises(Overloaded, match="'b': there is no room"):
        regions.register("b", key, 0, 101)
    regions.register("b", key, 0, 100)
    with pytest.raises(Overloaded, match="'c': 2 regions"):
        regions.register("c", key, 0, 1)
    regions.unregister("a")
    regions.register("c", key, 0, 900)


@pytest.mark.parametrize(
    ("name", "offset", "byte_size", "words"),
    [
        ("", 0, 8, "a name"),
        ("n" * 1025, 0, 8, "a name"),
        ("r", 0, 0, "'r': expected a size"),
        ("r", 0, 129, "'r'.*to have 129 bytes"),
        ("r", 128, 1, "'r'.*to have 129 bytes"),
        ("r", 2**64 - 1, 1, "'r'.*to have"),
    ],
)
def test_a_region_that_is_not_there_is_refused_and_nothing_kept_open(
    regions: Regions, memory: Make, name: str, offset: int, byte_size: int, words: str
) -> None:
    path = memory()
    with pytest.raises(InvalidInput, match=words):
        regions.register(name, path.name, offset, byte_size)
    assert _held(path) == 0
    assert not regions.status("")


def test_only_keys_with_the_prefix_are_taken(memory: Make) -> None:
    regions = Regions(SharedMemorySettings(key_prefix="hedgerow-test-"))
    regions.register("r", memory().name, 0, 8)
    regions.unregister("r")
    with pytest.raises(InvalidInput, match="starts with 'hedgerow-test-'"):
        regions.register("r", "psm_other", 0, 8)


def test_a_region_that_there_is_not_is_told_by_name(regions: Regions) -> None:
    regions.unregister("other")
    with pytest.raises(NotFound, match="'other'"):
        regions.status("other")


def test_copies_are_bounded_while_requests_use_them(memory: Make) -> None:
    lending = SharedTensors(Regions(SharedMemorySettings()), max_copied_bytes=SIZE)
    lending.regions.register("r", memory().name, 0, SIZE)
    try:
        for _ in range(2):
            first, second = shared(), shared()
            with lending.lent(first, []) as (raws, _):
                assert [len(raw) for raw in raws] == [SIZE]
                with pytest.raises(Overloaded, match="no room for 64 bytes") as refused, lending.lent(second, []):
                    pass
                assert refused.value.retry_after_s
        never = SharedTensors(lending.regions, max_copied_bytes=SIZE - 1)
        with pytest.raises(Overloaded) as refused, never.lent(shared(), []):
            pass
        assert refused.value.retry_after_s is None, "it will never fit"
    finally:
        lending.regions.unregister("")


@pytest.mark.skipif(os.geteuid() == 0, reason="everything may be written to by root")
def test_memory_that_may_only_be_read_gives_inputs_and_takes_no_outputs(regions: Regions, memory: Make) -> None:
    path = memory()
    path.chmod(0o444)
    regions.register("r", path.name, 0, SIZE)
    region = regions.find("r", "input 'x'")
    assert region.read("input 'x'", 0, 4) == bytes(4)
    with pytest.raises(InvalidInput, match="read-only"):
        region.write("output 'y'", 0, b"1234")
