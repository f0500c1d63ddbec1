"""The service as a server: drain, deadlines, limits, streams, health, control, and errors that give nothing away."""

import asyncio
import logging
import re
import time
from collections.abc import AsyncIterator, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any, Self

import grpc
import numpy as np
import pytest
import tritonclient.grpc.aio as triton
from grpc_health.v1 import health_pb2, health_pb2_grpc
from numpy.typing import NDArray
from simulators import models
from tritonclient.utils import InferenceServerException

from hedgerow import transports
from hedgerow.backend import Deadline
from hedgerow.config import ServerSettings
from hedgerow.errors import ConfigError
from hedgerow.function import FunctionBackend, FunctionModel
from hedgerow.host.model_host import ModelHost
from hedgerow.host.settings import HostSettings, ModelFile
from hedgerow.oip.messages import request_to_proto
from hedgerow.oip.streaming import STREAM_CONCURRENCY
from hedgerow.proto import oip_pb2, oip_pb2_grpc
from hedgerow.server import Server
from hedgerow.tensors import InferRequest, InferResponse, ModelMetadata, TensorSpec, tensor

X, Y = TensorSpec("x", "FP32", (-1,)), TensorSpec("y", "FP32", (-1,))
SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
WAIT_S = 20.0

Arrays = Mapping[str, NDArray[Any]]


class Held:
    """A model that says when it was called and answers when it is let."""

    def __init__(self) -> None:
        self.called = asyncio.Semaphore(0)
        self.let = asyncio.Event()
        self.calls = self.cancelled = self.now = self.peak = 0

    async def __call__(self, inputs: Arrays) -> Arrays:
        self.calls += 1
        self.now += 1
        self.peak = max(self.peak, self.now)
        self.called.release()
        try:
            await self.let.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.now -= 1
        return {"y": inputs["x"]}

    async def function(self, inputs: Arrays) -> Arrays:
        return await self(inputs)


async def count(inputs: Arrays) -> AsyncIterator[Arrays]:
    """As many answers as the input says."""
    for i in range(int(inputs["x"][0])):
        yield {"y": np.array([i], np.float32)}


def model(name: str, function: Any) -> FunctionModel:
    return FunctionModel(ModelMetadata(name, ("1",), "python", (X,), (Y,)), function)


def request(name: str, *values: float, identity: str = "", **parameters: Any) -> oip_pb2.ModelInferRequest:
    x = tensor("x", np.array(values or (1.0,), np.float32))
    return request_to_proto(InferRequest(model=name, inputs=(x,), id=identity, parameters=parameters))


_transport: ContextVar[str] = ContextVar("transport")


@pytest.fixture(params=transports.known(), autouse=True)
def transport(request: pytest.FixtureRequest) -> str:
    """Every test over every transport."""
    _transport.set(request.param)
    return str(request.param)


def settings(**changes: Any) -> ServerSettings:
    return ServerSettings(**{"port": 0, "drain_s": WAIT_S, "transport": _transport.get(), **changes})


async def refused(call: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value


async def nothing_in_flight(server: Server) -> None:
    """Stopping waits for what is in flight, and long: it is quick only if there is nothing."""
    async with asyncio.timeout(WAIT_S / 2):
        await server.stop()


def pushback_ms(error: grpc.aio.AioRpcError) -> int:
    return int(dict(error.trailing_metadata())["grpc-retry-pushback-ms"])


class Connection:
    """Stubs of one server."""

    def __init__(self, server: Server) -> None:
        self.channel = grpc.aio.insecure_channel(server.address)
        self.oip: Any = oip_pb2_grpc.GRPCInferenceServiceStub(self.channel)
        self.health: Any = health_pb2_grpc.HealthStub(self.channel)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.channel.close()

    async def status(self, service: str = "") -> int:
        answer: health_pb2.HealthCheckResponse = await self.health.Check(health_pb2.HealthCheckRequest(service=service))
        return answer.status


async def test_a_request_in_flight_is_answered_while_the_server_drains_and_nothing_new_gets_in() -> None:
    held = Held()
    server = Server(FunctionBackend(model("held", held.function)), settings())
    await server.start()
    async with Connection(server) as to, asyncio.TaskGroup() as group:
        watch = to.health.Watch(health_pb2.HealthCheckRequest())
        assert (await watch.read()).status == SERVING
        stream = to.oip.ModelStreamInfer()
        first = group.create_task(wait(to.oip.ModelInfer(request("held", identity="first"))))
        await held.called.acquire()

        stopping = group.create_task(server.stop())
        assert (await asyncio.wait_for(watch.read(), WAIT_S)).status == NOT_SERVING
        assert await to.status("inference.GRPCInferenceService") == NOT_SERVING
        assert not (await to.oip.ServerReady(oip_pb2.ServerReadyRequest())).ready
        assert not (await to.oip.ModelReady(oip_pb2.ModelReadyRequest(name="held"))).ready
        error = await refused(to.oip.ModelInfer(request("held")))
        assert (error.code(), error.details()) == (grpc.StatusCode.UNAVAILABLE, "the server is shutting down")
        assert pushback_ms(error) == 1000
        await stream.write(request("held", identity="late"))
        late = await stream.read()
        assert (late.infer_response.id, late.error_message) == ("late", "the server is shutting down")
        assert not stopping.done()

        held.let.set()
        assert (await first).id == "first"
        await asyncio.wait_for(stopping, WAIT_S)
    assert held.calls == 1
    await server.stop()  # once more does no harm


async def wait(call: Any) -> Any:
    return await call


async def test_a_request_that_outlasts_the_drain_is_cancelled_not_waited_for() -> None:
    held = Held()
    async with asyncio.TaskGroup() as group:
        async with Server(FunctionBackend(model("held", held.function)), settings(drain_s=0.1)) as server:
            to = await Connection(server).__aenter__()
            outcome = group.create_task(refused(to.oip.ModelInfer(request("held"))))
            await held.called.acquire()
            started = time.monotonic()
        assert time.monotonic() - started < 5
        assert (await outcome).code() in {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED}
        await to.channel.close()
    assert held.cancelled == 1


@pytest.mark.parametrize("timeout_s", [None, 0.1], ids=["server's default", "caller's own"])
async def test_work_that_nobody_waits_for_any_more_is_cancelled(timeout_s: float | None) -> None:
    held = Held()
    default_s = WAIT_S if timeout_s else 0.1
    backend = FunctionBackend(model("held", held.function))
    async with Server(backend, settings(default_timeout_s=default_s)) as server, Connection(server) as to:
        error = await refused(to.oip.ModelInfer(request("held"), timeout=timeout_s))
        assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        await nothing_in_flight(server)
    assert (held.calls, held.cancelled) == (1, 1)


async def test_one_request_too_many_is_refused_at_once_and_told_when_to_come_back() -> None:
    held = Held()
    backend = FunctionBackend(model("held", held.function))
    async with Server(backend, settings(max_inflight=1)) as server, Connection(server) as to:
        async with asyncio.TaskGroup() as group:
            first = group.create_task(wait(to.oip.ModelInfer(request("held"))))
            await held.called.acquire()
            error = await refused(to.oip.ModelInfer(request("held")))
            assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert pushback_ms(error) == 1000
            assert await to.status() == SERVING  # health is not a request
            held.let.set()
            await first
        await to.oip.ModelInfer(request("held"))


async def test_callers_who_only_hold_on_cannot_take_without_end() -> None:
    held = Held()
    held.let.set()
    backend = FunctionBackend(model("held", held.function))
    async with Server(backend, settings(max_inflight=1, max_calls=3)) as server, Connection(server) as to:

        async def is_answered() -> bool:
            try:
                await to.oip.ModelInfer(request("held"))
            except grpc.aio.AioRpcError as error:
                return error.code() is not grpc.StatusCode.RESOURCE_EXHAUSTED
            return True

        watches = [to.health.Watch(health_pb2.HealthCheckRequest()) for _ in range(3)]
        for watch in watches:
            assert (await watch.read()).status == SERVING
        assert not await is_answered()
        watches.pop().cancel()
        async with asyncio.timeout(WAIT_S):
            while not await is_answered():  # noqa: ASYNC110 (the server hears of it when it does)
                await asyncio.sleep(0.01)


class Broken(FunctionBackend):
    """A backend with a bug."""

    async def infer(self, request: InferRequest, deadline: Deadline) -> InferResponse:
        raise KeyError("/secret/path")


async def test_a_bug_reaches_callers_as_an_id_that_finds_it_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    backend = Broken(model("broken", lambda inputs: inputs))
    async with Server(backend, settings()) as server, Connection(server) as to:
        error = await refused(to.oip.ModelInfer(request("broken")))
        assert error.code() is grpc.StatusCode.INTERNAL
        found = re.fullmatch(r"internal error ([0-9a-f]{12})", error.details() or "")
        assert found
    (record,) = [record for record in caplog.records if found[1] in record.getMessage()]
    assert record.levelno == logging.ERROR
    assert record.exc_info
    assert "/secret/path" in str(record.exc_info[1])


async def test_a_model_that_breaks_its_word_is_never_believed() -> None:
    def crash(inputs: Arrays) -> Arrays:
        raise ZeroDivisionError("/secret/path")

    backend = FunctionBackend(model("crash", crash), model("mistyped", lambda inputs: {"y": np.zeros(1)}))
    async with Server(backend, settings()) as server, Connection(server) as to:
        error = await refused(to.oip.ModelInfer(request("crash")))
        assert (error.code(), error.details()) == (
            grpc.StatusCode.INTERNAL,
            "model crash failed with ZeroDivisionError",
        )
        error = await refused(to.oip.ModelInfer(request("mistyped")))
        assert (error.code(), error.details()) == (
            grpc.StatusCode.INTERNAL,
            "model mistyped, output 'y': expected FP32, got float64",
        )


async def test_a_stream_gives_none_or_several_answers_a_request_in_order_and_survives_garbage() -> None:
    backend = FunctionBackend(model("count", count))
    async with Server(backend, settings()) as server, Connection(server) as to:
        raw: Any = to.channel.stream_stream("/inference.GRPCInferenceService/ModelStreamInfer")
        stream = raw()
        await stream.write(request("count", 2, identity="two").SerializeToString())
        await stream.write(request("count", 0, identity="none").SerializeToString())
        await stream.write(b"\xff\xff garbage")
        await stream.write(request("count", 40, identity="forty").SerializeToString())
        await stream.done_writing()
        answers = [oip_pb2.ModelStreamInferResponse.FromString(raw) async for raw in stream]
        assert [a.infer_response.id for a in answers] == ["two"] * 2 + [""] + ["forty"] * 40
        assert answers[2].error_message == "the request is no valid inference.ModelInferRequest"
        last = answers[-1].infer_response.raw_output_contents[0]
        assert np.frombuffer(last, np.float32) == 39
        error = await refused(to.oip.ModelInfer(request("count", 1)))
        assert error.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_one_stream_cannot_have_more_than_its_share_worked_on_at_once() -> None:
    held = Held()
    backend = FunctionBackend(model("held", held.function))
    async with Server(backend, settings()) as server, Connection(server) as to:
        stream = to.oip.ModelStreamInfer()
        for i in range(4 * STREAM_CONCURRENCY):
            await stream.write(request("held", identity=str(i)))
        await stream.done_writing()
        for _ in range(STREAM_CONCURRENCY):
            await held.called.acquire()
        held.let.set()
        assert [a.infer_response.id async for a in stream] == [str(i) for i in range(4 * STREAM_CONCURRENCY)]
    assert STREAM_CONCURRENCY <= held.peak <= STREAM_CONCURRENCY + 1


async def test_a_stream_that_is_broken_off_takes_its_work_with_it() -> None:
    held = Held()
    backend = FunctionBackend(model("held", held.function))
    async with Server(backend, settings()) as server, Connection(server) as to:
        stream = to.oip.ModelStreamInfer()
        await stream.write(request("held"))
        await held.called.acquire()
        stream.cancel()
        await nothing_in_flight(server)
    assert held.cancelled == 1


class Trusting(FunctionBackend):
    """A backend that checks nothing itself."""

    def __init__(self) -> None:
        super().__init__(model("m", lambda inputs: {"y": inputs["x"]}))
        self.deadlines: list[float] = []

    async def infer(self, request: InferRequest, deadline: Deadline) -> InferResponse:
        self.deadlines.append(deadline.remaining)
        return InferResponse(model="its own name", version="1", outputs=())


async def test_nothing_wrong_and_nothing_late_reaches_a_backend() -> None:
    backend = Trusting()
    async with Server(backend, settings()) as server, Connection(server) as to:
        wrong = request("m")
        wrong.inputs[0].datatype = "INT32"
        error = await refused(to.oip.ModelInfer(wrong))
        assert error.details() == "input 'x': expected FP32 [-1], got INT32 [1]"
        error = await refused(to.oip.ModelInfer(request("m", timeout=1)))
        assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert not backend.deadlines

        # Of two deadlines, the caller's and the request's own (in microseconds), the backend gets the nearer.
        assert (await to.oip.ModelInfer(request("m"), timeout=10)).model_name == "m"
        await to.oip.ModelInfer(request("m", timeout=5_000_000), timeout=10)
        await to.oip.ModelInfer(request("m", timeout=5_000_000), timeout=1)
    assert [round(seconds) for seconds in backend.deadlines] == [10, 5, 1]


async def test_health_and_stock_clients_follow_a_model_that_is_unloaded_and_loaded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("hedgerow.health.WATCH_INTERVAL_S", 0.001)
    backend = FunctionBackend(model("m", lambda inputs: {"y": inputs["x"]}))
    async with (
        Server(backend, settings(), control=backend) as server,
        Connection(server) as to,
        triton.InferenceServerClient(server.address) as client,
    ):
        assert "model_repository" in (await client.get_server_metadata()).extensions
        watch = to.health.Watch(health_pb2.HealthCheckRequest(service="inference.GRPCInferenceService"))
        assert (await watch.read()).status == SERVING
        await asyncio.sleep(0.05)  # looked at many times, said once: the next to be read is the change
        await client.unload_model("m")
        assert (await asyncio.wait_for(watch.read(), WAIT_S)).status == NOT_SERVING
        (state,) = (await client.get_model_repository_index()).models
        assert (state.name, state.version, state.state, state.reason) == ("m", "1", "UNAVAILABLE", "unloaded")
        ready_ones = await to.oip.RepositoryIndex(oip_pb2.RepositoryIndexRequest(ready=True))
        assert not ready_ones.models
        assert not await client.is_model_ready("m")
        assert (await refused(to.oip.ModelInfer(request("m")))).code() is grpc.StatusCode.UNAVAILABLE
        await client.load_model("m")
        assert (await asyncio.wait_for(watch.read(), WAIT_S)).status == SERVING
        await to.oip.ModelInfer(request("m"))
        with pytest.raises(InferenceServerException, match="NOT_FOUND"):
            await client.load_model("no-such-model")
        with pytest.raises(InferenceServerException, match=r"UNIMPLEMENTED.*max_batch_size"):
            await client.load_model("m", config='{"max_batch_size": 16}')


async def test_without_control_nobody_manages_models() -> None:
    backend = FunctionBackend(model("m", lambda inputs: inputs))
    async with Server(backend, settings()) as server, triton.InferenceServerClient(server.address) as client:
        assert "model_repository" not in (await client.get_server_metadata()).extensions
        for call in (
            client.get_model_repository_index,
            lambda: client.load_model("m"),
            lambda: client.unload_model("m"),
        ):
            with pytest.raises(InferenceServerException, match="PERMISSION_DENIED"):
                await call()
        assert await client.is_model_ready("m")


async def test_a_port_that_is_taken_is_a_wrong_setting_not_a_shared_one() -> None:
    async with Server(FunctionBackend(), settings()) as server:
        second = Server(FunctionBackend(), settings(port=server.port))
        with pytest.raises(ConfigError, match=rf"cannot listen on 127\.0\.0\.1:{server.port}"):
            await second.start()


async def test_managing_models_takes_the_token_where_there_is_one() -> None:
    backend = FunctionBackend(model("count", count))
    async with (
        Server(backend, settings(control_token="s3cret"), control=backend) as server,
        Connection(server) as to,
    ):
        index = oip_pb2.RepositoryIndexRequest()
        for brought in ((), (("authorization", "Bearer other"),), (("authorization", "s3cret"),)):
            error = await refused(to.oip.RepositoryIndex(index, metadata=brought))
            assert error.code() is grpc.StatusCode.PERMISSION_DENIED
            assert "s3cret" not in str(error.details())
        allowed = await to.oip.RepositoryIndex(index, metadata=(("authorization", "Bearer s3cret"),))
        assert [listed.name for listed in allowed.models] == ["count"]


async def test_statistics_tell_of_batches_and_not_only_of_requests(tmp_path: Path) -> None:
    host = ModelHost(HostSettings(workers=1))
    await host.load_file(ModelFile("digits", "1", models.classifier(tmp_path / "1.onnx")))
    async with Server(host, settings(), batches=host.counts) as server, Connection(server) as to:
        message = request_to_proto(models.request(models.pixels(3, 5)))
        await asyncio.gather(*(to.oip.ModelInfer(message) for _ in range(8)))
        answer = await to.oip.ModelStatistics(oip_pb2.ModelStatisticsRequest(name="digits"))
    await host.close()
    (said,) = answer.model_stats
    assert (said.inference_stats.success.count, said.inference_count) == (8, 16)
    assert sum(batch.compute_infer.count for batch in said.batch_stats) == said.execution_count
    assert sum(batch.batch_size * batch.compute_infer.count for batch in said.batch_stats) == 16
    assert said.inference_stats.queue.count == 8
