"""Our own gRPC client against servers of both kinds: what answers, what fails and how, and what is let go of."""

import asyncio
import gc
import socket
import weakref
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from numpy.typing import NDArray
from simulators import http2
from simulators.certificates import Authority
from simulators.places import until

from hedgerow import transports
from hedgerow.config import ServerSettings
from hedgerow.errors import DeadlineExceeded, EngineFault, InvalidInput, ModelNotFound, Overloaded, Unavailable
from hedgerow.function import FunctionBackend, FunctionModel
from hedgerow.http2.channel import MAX_ANSWERS_AHEAD, Channel
from hedgerow.http2.grpc import MIN_COMPRESSED_BYTES
from hedgerow.oip.messages import request_to_proto, response_from_proto
from hedgerow.proto import oip_pb2
from hedgerow.rpc import PUSHBACK_KEY
from hedgerow.server import Server
from hedgerow.tensors import InferRequest, ModelMetadata, TensorSpec, tensor
from hedgerow.transports import native

INFER = "/inference.GRPCInferenceService/ModelInfer"
STREAM = "/inference.GRPCInferenceService/ModelStreamInfer"
WAIT_S = 30.0
X, Y = TensorSpec("x", "FP32", (-1,)), TensorSpec("y", "FP32", (-1,))
Arrays = Mapping[str, NDArray[Any]]


class Models(FunctionBackend):
    """An echo, one that counts, one that never answers, one that is overloaded."""

    def __init__(self) -> None:
        self.begun = asyncio.Semaphore(0)
        self.cancelled = asyncio.Semaphore(0)
        functions = (self.echo, self.count, self.never, self.full)
        super().__init__(*(FunctionModel(ModelMetadata(f.__name__, ("1",), "", (X,), (Y,)), f) for f in functions))

    async def echo(self, inputs: Arrays) -> Arrays:
        return {"y": inputs["x"]}

    async def count(self, inputs: Arrays) -> AsyncIterator[Arrays]:
        for number in range(int(inputs["x"][0])):
            yield {"y": np.array([number], np.float32)}

    async def never(self, _: Arrays) -> Arrays:
        self.begun.release()
        try:
            await asyncio.Event().wait()
        finally:
            self.cancelled.release()
        raise AssertionError

    async def full(self, _: Arrays) -> Arrays:
        raise Overloaded("full, 100 %: für später", retry_after_s=1.5)


@pytest.fixture(params=transports.known())
def settings(request: pytest.FixtureRequest) -> Callable[..., ServerSettings]:
    return lambda **changes: ServerSettings(**{"port": 0, "drain_s": WAIT_S, "transport": request.param, **changes})


@asynccontextmanager
async def channel_to(port: int, **options: Any) -> AsyncIterator[Channel]:
    limits = {"connect_timeout_s": WAIT_S, "max_message_bytes": 2**26}
    channel = Channel("127.0.0.1", port, **{**limits, **options})
    try:
        yield channel
    finally:
        await channel.close()


def ask(model: str, *values: float) -> bytes:
    x = tensor("x", np.array(values or (1.0,), np.float32))
    return request_to_proto(InferRequest(model=model, inputs=(x,))).SerializeToString()


def answered(raw: bytes) -> list[float]:
    values: list[float] = response_from_proto(oip_pb2.ModelInferResponse.FromString(raw)).output("y").tolist()
    return values


async def test_calls_side_by_side_get_their_own_answers(settings: Callable[..., ServerSettings]) -> None:
    async with Server(Models(), settings()) as server, channel_to(server.port) as channel:
        calls = [channel.unary(INFER, ask("echo", *range(size)), WAIT_S) for size in (1, 2, 70_000, 3, 2_000_000, 5)]
        assert [len(answered(raw)) for raw in await asyncio.gather(*calls)] == [1, 2, 70_000, 3, 2_000_000, 5]


async def test_faults_come_as_what_they_are(settings: Callable[..., ServerSettings]) -> None:
    async with Server(Models(), settings()) as server, channel_to(server.port, max_message_bytes=1000) as channel:
        with pytest.raises(ModelNotFound, match="there is no model 'none'"):
            await channel.unary(INFER, ask("none"), WAIT_S)
        with pytest.raises(Overloaded, match="full, 100 %: für später") as full:
            await channel.unary(INFER, ask("full"), WAIT_S)
        assert full.value.retry_after_s == 1.5
        with pytest.raises(InvalidInput):
            await channel.unary(INFER, b"\xff\xff", WAIT_S)
        with pytest.raises(Overloaded, match="larger than max"):
            await channel.unary(INFER, ask("echo", *range(1000)), WAIT_S)
        assert answered(await channel.unary(INFER, ask("echo", 2), WAIT_S)) == [2]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("traceparent", "s3cret\r\nb"),
        ("traceparent", "s3cret\0"),
        ("traceparent", "s3cretä"),
        ("Traceparent", "s3cret"),
        ("trace parent", "s3cret"),
        ("", "s3cret"),
        (":path", "s3cret"),
    ],
)
async def test_what_no_header_can_say_is_refused_by_name_and_the_next_call_gets_through(name: str, value: str) -> None:
    server = Server(Models(), ServerSettings(port=0, drain_s=WAIT_S))
    async with server, channel_to(server.port) as channel:
        wrong = (("good", "a"), (name, value))
        for _ in range(2):
            with pytest.raises(InvalidInput, match=r"^metadata ") as refused:
                await channel.unary(INFER, ask("echo", 2), WAIT_S, wrong)
            assert repr(name) in str(refused.value)
            assert "s3cret" not in str(refused.value)
            with pytest.raises(InvalidInput, match=r"^metadata "):
                await anext(channel.stream(STREAM, ask("echo", 2), WAIT_S, wrong))
        said = (("good", "a b"), ("x_y-z.1", "~"))
        assert answered(await channel.unary(INFER, ask("echo", 2), WAIT_S, said)) == [2]


async def test_a_deadline_and_a_caller_that_leaves_both_stop_the_work(settings: Callable[..., ServerSettings]) -> None:
    models = Models()
    async with Server(models, settings()) as server, channel_to(server.port) as channel, asyncio.timeout(WAIT_S):
        with pytest.raises(DeadlineExceeded):
            await channel.unary(INFER, ask("never"), 0.3)
        await models.cancelled.acquire()
        async with asyncio.TaskGroup() as group:
            call = group.create_task(channel.unary(INFER, ask("never"), WAIT_S))
            await models.begun.acquire()
            await models.begun.acquire()
            call.cancel()
        await models.cancelled.acquire()
        assert answered(await channel.unary(INFER, ask("echo", 2), WAIT_S)) == [2]


async def test_a_stream_comes_as_fast_as_it_is_taken(settings: Callable[..., ServerSettings]) -> None:
    many = 3 * MAX_ANSWERS_AHEAD
    async with Server(Models(), settings()) as server, channel_to(server.port) as channel:
        answers = []
        async for raw in channel.stream(STREAM, ask("count", many), WAIT_S):
            answers += answered(oip_pb2.ModelStreamInferResponse.FromString(raw).infer_response.SerializeToString())
        assert answers == list(range(many))
        async with aclosing(channel.stream(STREAM, ask("count", many), WAIT_S)) as stream:
            await anext(stream)
        # Nothing is left of the one that was not read to its end.
        assert answered(await channel.unary(INFER, ask("echo", 2), WAIT_S)) == [2]
        assert channel._connection is not None
        assert not channel._connection.streams


async def test_a_server_that_comes_back_is_spoken_to_again(settings: Callable[..., ServerSettings]) -> None:
    async with Server(Models(), settings()) as server:
        port = server.port
        async with channel_to(port) as channel:
            await channel.unary(INFER, ask("echo"), WAIT_S)
            await server.stop()
            with pytest.raises(Unavailable, match=r"cannot connect|given up|cut off|shutting down"):
                await channel.unary(INFER, ask("echo"), WAIT_S)
            assert not channel.standing
            async with Server(Models(), settings(port=port)):
                await asyncio.wait_for(until_ready(channel), WAIT_S)
                assert channel.standing
                assert answered(await channel.unary(INFER, ask("echo", 2), WAIT_S)) == [2]


async def until_ready(channel: Channel) -> None:
    while True:
        try:
            return await channel.ready()
        except ConnectionError:
            await asyncio.sleep(0.01)


async def test_a_goodbye_lets_calls_end_and_sends_new_ones_elsewhere(settings: Callable[..., ServerSettings]) -> None:
    models = Models()
    async with Server(models, settings(drain_s=0.5)) as server, channel_to(server.port) as channel:
        async with asyncio.TaskGroup() as group:
            call = group.create_task(failed(channel.unary(INFER, ask("never"), WAIT_S)))
            await models.begun.acquire()
            await server.stop()
        assert isinstance(call.result(), Unavailable)
        assert not channel.standing


async def failed(call: Any) -> Exception | None:
    try:
        await call
    except Exception as error:  # noqa: BLE001 (it is looked at)
        return error
    return None


async def test_a_channel_that_is_closed_fails_its_calls_at_once(settings: Callable[..., ServerSettings]) -> None:
    models = Models()
    async with Server(models, settings(drain_s=0.1)) as server, channel_to(server.port) as channel:
        async with asyncio.TaskGroup() as group:
            call = group.create_task(failed(channel.unary(INFER, ask("never"), WAIT_S)))
            await models.begun.acquire()
            await channel.close()
        assert isinstance(call.result(), Unavailable)
        assert isinstance(await failed(channel.unary(INFER, ask("echo"), WAIT_S)), Unavailable)


async def test_more_calls_than_the_server_takes_at_once_wait_for_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hedgerow.transports.native.MAX_STREAMS", 2)
    models = Models()
    async with (
        Server(models, ServerSettings(port=0, transport="native", drain_s=0.1)) as server,
        channel_to(server.port) as channel,
        asyncio.TaskGroup() as group,
    ):
        held = [group.create_task(failed(channel.unary(INFER, ask("never"), WAIT_S))) for _ in range(2)]
        for _ in held:
            await models.begun.acquire()
        with pytest.raises(DeadlineExceeded, match="room"):
            await channel.unary(INFER, ask("echo"), 0.2)
        waiting = group.create_task(channel.unary(INFER, ask("echo", 7), WAIT_S))
        held[0].cancel()
        assert answered(await waiting) == [7]
        held[1].cancel()


async def test_what_is_compressed_is_read(settings: Callable[..., ServerSettings]) -> None:
    values = [0.0] * MIN_COMPRESSED_BYTES
    async with Server(Models(), settings(compression="gzip")) as server, channel_to(server.port) as channel:
        assert answered(await channel.unary(INFER, ask("echo", *values), WAIT_S)) == values
        for compression in (grpc.Compression.Gzip, grpc.Compression.Deflate):
            async with grpc.aio.insecure_channel(server.address) as foreign:
                call: Any = foreign.unary_unary(INFER)
                assert answered(await call(ask("echo", *values), compression=compression, timeout=WAIT_S)) == values


async def test_over_tls_both_sides_are_who_they_say(settings: Callable[..., ServerSettings], tmp_path: Path) -> None:
    authority, stranger = Authority(tmp_path / "ca"), Authority(tmp_path / "stranger")
    certificate, key = authority.issue("server")
    secured = settings(
        tls_cert_file=str(certificate), tls_key_file=str(key), tls_client_ca_file=str(authority.certificate)
    )
    async with Server(Models(), secured) as server:
        async with channel_to(server.port, tls=authority.client(*authority.issue("client"))) as channel:
            assert answered(await channel.unary(INFER, ask("echo", 2), WAIT_S)) == [2]
        for refused in (authority.client(), stranger.client(*authority.issue("client")), None):
            async with channel_to(server.port, tls=refused, connect_timeout_s=5) as channel:
                assert isinstance(await failed(channel.unary(INFER, ask("echo"), WAIT_S)), Unavailable)


async def test_large_messages_side_by_side_are_not_mixed_up_over_tls(
    settings: Callable[..., ServerSettings], tmp_path: Path
) -> None:
    authority = Authority(tmp_path / "ca")
    certificate, key = authority.issue("server")
    secured = settings(tls_cert_file=str(certificate), tls_key_file=str(key))
    async with (
        Server(Models(), secured) as server,
        channel_to(server.port, tls=authority.client()) as one,
        channel_to(server.port, tls=authority.client()) as other,
    ):
        bodies = [list(range(size, 0, -1)) for size in (100_000, 1, 150_001, 99_999, 2, 60_000)]
        calls = [
            channel.unary(INFER, ask("echo", *body), WAIT_S)
            for body, channel in zip(bodies, [one, other] * 3, strict=True)
        ]
        assert [answered(raw) for raw in await asyncio.gather(*calls)] == bodies


@pytest.mark.parametrize(
    "said",
    [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"\0\0\0\4\0\0\0\0\0\xff\xff\xff", b"", b"\0\0\1\4\0\0\0\0\0\0"],
)
async def test_what_does_not_speak_http2_cannot_be_connected_to(said: bytes) -> None:
    async def talk(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(said)
        await writer.drain()
        writer.close()

    async with (
        await asyncio.start_server(talk, "127.0.0.1", 0) as server,
        channel_to(server.sockets[0].getsockname()[1]) as channel,
    ):
        assert isinstance(await failed(channel.unary(INFER, b"", WAIT_S)), Unavailable)


async def test_who_is_silent_is_not_waited_for_beyond_the_limit() -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:
        async with channel_to(mute.getsockname()[1], connect_timeout_s=0.2) as channel:
            with pytest.raises(ConnectionError):
                await channel.ready()


class Odd(grpc.GenericRpcHandler):
    """A server that answers each path in another wrong way."""

    def service(self, details: grpc.HandlerCallDetails) -> Any:
        async def none(_: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> None:
            pass

        async def two(_: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> None:
            await context.write(b"1")
            await context.write(b"2")

        async def refusing(_: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> None:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "later", ((PUSHBACK_KEY, "-1"),))

        handlers = {"/none": none, "/two": two, "/refusing": refusing}
        assert details.method is not None
        return grpc.unary_stream_rpc_method_handler(handlers[details.method])


async def test_answers_that_are_not_one_are_the_servers_fault() -> None:
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((Odd(),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with channel_to(port) as channel:
            for path in ("/none", "/two"):
                assert isinstance(await failed(channel.unary(path, b"", WAIT_S)), EngineFault)
            error = await failed(channel.unary("/refusing", b"", WAIT_S))
            assert (type(error), str(error), getattr(error, "retry_after_s", 0)) == (Unavailable, "later", None)
    finally:
        await server.stop(0)


async def test_each_call_has_its_own_deadline_though_the_server_keeps_none() -> None:
    async def swallow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(http2.settings())
        while await reader.read(2**16):
            pass
        writer.close()

    async with (
        await asyncio.start_server(swallow, "127.0.0.1", 0) as server,
        channel_to(server.sockets[0].getsockname()[1]) as channel,
        asyncio.TaskGroup() as group,
    ):
        patient = group.create_task(failed(channel.unary(INFER, b"", 600.0)))
        for _ in range(3):
            soon = (failed(channel.unary(INFER, b"", timeout_s)) for timeout_s in (0.2, 0.1, 0.3))
            assert {type(error) for error in await asyncio.gather(*soon)} == {DeadlineExceeded}
        assert not patient.done()
        await channel.close()
        assert isinstance(await patient, Unavailable)


async def test_the_server_keeps_each_deadline_of_a_caller_that_does_not(
    settings: Callable[..., ServerSettings],
) -> None:
    models = Models()
    async with Server(models, settings()) as server, http2.RawConnection(f"127.0.0.1:{server.port}") as to:
        for stream, timeout in ((1, "600S"), (3, "300m"), (5, "100m")):
            to.send(to.call(stream, INFER, ask("never"), grpc_timeout=timeout))
        for stream in (5, 3):
            assert (await to.answer(stream)).grpc_status == grpc.StatusCode.DEADLINE_EXCEEDED.value[0]
        to.send(to.call(7, INFER, ask("never"), grpc_timeout="100m"))
        assert (await to.answer(7)).grpc_status == grpc.StatusCode.DEADLINE_EXCEEDED.value[0]
        to.send(to.call(9, INFER, ask("echo", 5.0)))
        assert answered((await to.answer(9)).message) == [5.0]


async def test_a_connection_that_ended_is_gone_without_the_collector() -> None:
    listener = await native.listen({}, ServerSettings(port=0))
    channel = Channel("127.0.0.1", listener.port, connect_timeout_s=WAIT_S, max_message_bytes=1000)
    await channel.ready()
    left = [weakref.ref(one) for one in (channel._connection, *listener.connections) if one is not None]
    assert len(left) == 2
    gc.disable()
    try:
        await channel.close()
        await until(lambda: not any(connection() for connection in left))
    finally:
        gc.enable()
        await listener.stop(0)
