"""The open loop must notice what goes wrong, or its latencies mean nothing."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from itertools import count
from pathlib import Path

import grpc
import numpy as np
import pytest
from bench.serving.openloop import Order, generate, report
from bench.serving.wire import FRAME_HEADER_BYTES, HOST, Grpc

from hedgerow.proto import oip_pb2

Context = grpc.aio.ServicerContext[bytes, bytes]
RATE = 200.0
SECONDS = 0.5
LARGE_BYTES = 300_000
"""Several windows and frames of HTTP/2."""


def answer(*values: float) -> bytes:
    output = oip_pb2.ModelInferResponse.InferOutputTensor(name="y", datatype="FP32", shape=[len(values)])
    raw = np.array(values, np.float32).tobytes()
    return oip_pb2.ModelInferResponse(outputs=[output], raw_output_contents=[raw]).SerializeToString()


def framed(message: bytes) -> bytes:
    return b"\0" + len(message).to_bytes(FRAME_HEADER_BYTES - 1, "big") + message


RIGHT = answer(1, 2)


@asynccontextmanager
async def serving(handle: Callable[[bytes, Context], Awaitable[bytes]]) -> AsyncIterator[int]:
    server = grpc.aio.server()
    method: grpc.RpcMethodHandler[bytes, bytes] = grpc.unary_unary_rpc_method_handler(handle)
    service = Grpc().path.split("/")[1]
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(service, {"ModelInfer": method})])
    port = server.add_insecure_port(f"{HOST}:0")
    await server.start()
    try:
        yield port
    finally:
        await server.stop(0)


async def measured(folder: Path, port: int, body: bytes = b"request") -> dict[str, float]:
    (folder / "answer").write_bytes(framed(RIGHT))
    np.save(folder / "expected.npy", np.array([1, 2], np.float32))
    order = Order(
        wire="grpc",
        port=port,
        body="",
        answer=str(folder / "answer"),
        expected=str(folder / "expected.npy"),
        tolerance=0.01,
        rate=RATE,
        seconds=SECONDS,
        seed=1,
    )
    return report(order, await generate(order, framed(body)), 0.0)


async def test_right_answers_of_whatever_bytes_all_count(tmp_path: Path) -> None:
    turn = count()

    async def handle(_: bytes, __: Context) -> bytes:
        return RIGHT if next(turn) % 2 else answer(1.001, 2)

    async with serving(handle) as port:
        found = await measured(tmp_path, port)
    assert found["requests"] == next(turn) > 0
    assert (found["missing"], found["wrong"]) == (0, 0)


async def test_failed_calls_and_wrong_answers_are_not_taken_for_good_ones(tmp_path: Path) -> None:
    turn = count()

    async def handle(_: bytes, context: Context) -> bytes:
        kind = next(turn) % 4
        if kind == 0:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "full")
        return (RIGHT, answer(1, 3), answer(1), RIGHT)[kind]

    async with serving(handle) as port:
        found = await measured(tmp_path, port)
    requests = next(turn)
    assert found["requests"] == requests
    assert found["missing"] == pytest.approx(requests / 4, abs=1)
    assert found["wrong"] == pytest.approx(requests / 2, abs=2)


async def test_large_bodies_arrive_whole_through_flow_control(tmp_path: Path) -> None:
    body = bytes(range(256)) * (LARGE_BYTES // 256)
    spoilt = []

    async def handle(raw: bytes, _: Context) -> bytes:
        if raw != body:
            spoilt.append(len(raw))
        return RIGHT

    async with serving(handle) as port:
        found = await measured(tmp_path, port, body)
    assert not spoilt
    assert (found["missing"], found["wrong"]) == (0, 0)


async def test_a_server_that_dies_leaves_no_one_waiting(tmp_path: Path) -> None:
    stopped = asyncio.Event()

    async def handle(_: bytes, __: Context) -> bytes:
        stopped.set()
        await asyncio.Event().wait()
        return RIGHT

    async with asyncio.TaskGroup() as group, serving(handle) as port:
        found = group.create_task(measured(tmp_path, port))
        await stopped.wait()
    assert found.result()["missing"] == found.result()["requests"] > 0
