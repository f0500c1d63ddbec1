"""What a gRPC transport owes its callers, each as a function over a running server; a broken one raises."""

import asyncio
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from functools import partial
from typing import Any

import grpc
import numpy as np
from bench.transports import loads
from bench.transports.running import TESTS, Running
from faults import test_connections
from faults.attacks import GARBAGE, INFER, STORMS, WRONG_CALLS, WRONG_CONNECTIONS
from simulators.http2 import PREFACE, RawConnection, call_fields, reset, settings
from simulators.victims import BIG, ECHO, SLOW, Victim, message

from hedgerow.config import environment
from hedgerow.oip.messages import response_from_proto
from hedgerow.proto import oip_pb2, oip_pb2_grpc

LONG_S = 30.0
"""What a call takes that is to be cut short."""
GONE_S = 10.0
"""Within which work for nobody must have stopped."""
DRAIN_CALL_S = 2.0
KEEPALIVE_WITHIN_S = 150.0
"""Within which a client that answers no pings is let go, however long a transport's own times are."""
LARGE_FLOATS = 25_000_000
"""A hundred megabytes."""
LEAK_CALLS, LEAK_WARM_UP = 100_000, 20_000
LEAK_WITHIN_S = 170.0
LEAK_BYTES = 16 * 2**20
"""What an allocator may keep."""
UNLIMITED = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]

Probe = Callable[[Running, Victim], Awaitable[str | None]]
"""Gives a remark, or None; raises where the server fails."""


async def deadline(_: Running, victim: Victim) -> None:
    """The server itself ends a call whose time is up, and its work."""
    async with RawConnection(victim.address) as to:
        to.send(to.call(1, INFER, message(SLOW, LONG_S), grpc_timeout="300m"))
        answer = await to.answer(1)
        assert answer.grpc_status == grpc.StatusCode.DEADLINE_EXCEEDED.value[0] or answer.reset is not None, answer
        await sleepers(victim, 0)


async def cancellation(_: Running, victim: Victim) -> None:
    """A call that is reset stops working."""
    async with RawConnection(victim.address) as to:
        to.send(to.call(1, INFER, message(SLOW, LONG_S)))
        await sleepers(victim, 1)
        to.send(reset(1))
        await sleepers(victim, 0)


async def disconnection(_: Running, victim: Victim) -> None:
    """So does one whose client has gone."""
    async with RawConnection(victim.address) as to:
        to.send(to.call(1, INFER, message(SLOW, LONG_S)))
        await sleepers(victim, 1)
    await sleepers(victim, 0)


async def sleepers(victim: Victim, count: int) -> None:
    """Wait until the server works on so many slow calls."""
    limit = time.monotonic() + GONE_S
    while (found := (await victim.vitals()).sleeping) != count:
        assert time.monotonic() < limit, f"{found} calls are being worked on, expected {count}"
        await asyncio.sleep(0.05)


async def streams_both_ways(_: Running, victim: Victim) -> None:
    """Each answer comes before the next request is sent."""
    asks: asyncio.Queue[oip_pb2.ModelInferRequest] = asyncio.Queue()

    async def requests() -> AsyncIterator[oip_pb2.ModelInferRequest]:
        for _asked in range(3):
            yield await asks.get()

    async with asyncio.timeout(GONE_S), grpc.aio.insecure_channel(victim.address) as channel:
        stub: Any = oip_pb2_grpc.GRPCInferenceServiceStub(channel)
        call = stub.ModelStreamInfer(requests())
        for _answered in range(3):
            asks.put_nowait(oip_pb2.ModelInferRequest.FromString(message(ECHO)))
            answer = await call.read()
            assert isinstance(answer, oip_pb2.ModelStreamInferResponse), answer
            assert not answer.error_message, answer


async def a_hundred_megabytes(_: Running, victim: Victim) -> None:
    """There and back."""
    request = oip_pb2.ModelInferRequest.FromString(message(ECHO))
    x = np.arange(LARGE_FLOATS, dtype=np.float32)
    request.inputs[0].shape[:] = [LARGE_FLOATS]
    request.raw_input_contents[0] = x.tobytes()
    async with grpc.aio.insecure_channel(victim.address, options=UNLIMITED) as channel:
        stub: Any = oip_pb2_grpc.GRPCInferenceServiceStub(channel)
        y = response_from_proto(await stub.ModelInfer(request, timeout=LONG_S)).output("y")
    assert np.array_equal(x, y)


async def large_answers_one_after_another(_: Running, victim: Victim) -> None:
    """Ten megabytes through windows that are opened as they are read."""
    async with grpc.aio.insecure_channel(victim.address, options=UNLIMITED) as channel:
        stub: Any = oip_pb2_grpc.GRPCInferenceServiceStub(channel)
        request = oip_pb2.ModelInferRequest.FromString(message(BIG, 2_500_000))
        for _answered in range(3):
            assert len(response_from_proto(await stub.ModelInfer(request, timeout=LONG_S)).output("y")) == 2_500_000


async def compressed_requests(_: Running, victim: Victim) -> None:
    """By gzip, as any client of gRPC may."""
    async with grpc.aio.insecure_channel(victim.address) as channel:
        stub: Any = oip_pb2_grpc.GRPCInferenceServiceStub(channel)
        request = oip_pb2.ModelInferRequest.FromString(message(ECHO, *[1.0] * 1000))
        await stub.ModelInfer(request, timeout=GONE_S, compression=grpc.Compression.Gzip)


async def silent_clients_are_let_go(_: Running, victim: Victim) -> str:
    """Keep-alive: a client that answers no pings, and holds a call."""
    started = time.monotonic()
    async with asyncio.timeout(KEEPALIVE_WITHIN_S), RawConnection(victim.address, greet=False) as to:
        to.send(PREFACE + settings() + to.headers(1, call_fields(INFER)))
        while await to.reader.read(2**16):
            pass
    return f"after {time.monotonic() - started:.0f} s"


async def drains(server: Running, victim: Victim) -> None:
    """At SIGTERM the client is told (GOAWAY), the call in flight is answered, and the process ends well."""
    async with RawConnection(victim.address) as to:
        to.send(to.call(1, INFER, message(SLOW, DRAIN_CALL_S)))
        await sleepers(victim, 1)
        server.process._process.terminate()
        answer = await to.answer(1)
        assert answer.grpc_status == 0, answer
        await to.until_gone()
        assert to.goaway is not None, "no GOAWAY"
    assert await asyncio.to_thread(server.process._process.wait, LONG_S) == 0


async def leaks_nothing(server: Running, _: Victim) -> str:
    """Over many calls."""
    await asyncio.to_thread(calls, server, LEAK_WARM_UP)
    before = server.process.rss_bytes()
    await asyncio.to_thread(calls, server, LEAK_CALLS)
    grown = server.process.rss_bytes() - before
    assert grown < LEAK_BYTES, f"grew by {grown / 2**20:.1f} MB"
    return f"grew by {grown / 2**20:.1f} MB"


def calls(server: Running, count: int) -> None:
    """`count` small calls, 32 in flight."""
    call = loads.CALLS["infer"]
    url = f"http://{server.address}{call.path}"
    headers = ["-H", "content-type: application/grpc", "-H", "te: trailers"]
    with tempfile.NamedTemporaryFile() as body:
        body.write(call.body)
        body.flush()
        command = ["h2load", "-n", str(count), "-c", "1", "-m", "32", "-d", body.name, *headers, url]
        subprocess.run(command, check=True, capture_output=True, timeout=LEAK_WITHIN_S)


async def conformance(_: Running, victim: Victim) -> str:
    """The Open Inference Protocol, rule by rule, by address."""
    command = [sys.executable, "-m", "contract.judge", victim.address, "--model", ECHO, "--json"]
    process = await asyncio.create_subprocess_exec(
        *command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment(PYTHONPATH=str(TESTS))
    )
    said, _error = await process.communicate()
    verdicts = json.loads(said)
    broken = [verdict["rule"] for verdict in verdicts if verdict["outcome"] == "FAIL"]
    assert not broken, f"{len(broken)} of {len(verdicts)} rules: {'; '.join(broken)}"
    return f"{len(verdicts)} rules"


ROOMY: Mapping[str, Probe] = {
    "conformance": conformance,
    "100 MB message": a_hundred_megabytes,
    "no leak over 100,000 calls": leaks_nothing,
}
"""Those that need large messages."""
PATIENT: Mapping[str, Probe] = {"keep-alive": silent_clients_are_let_go}
"""Those that need a short keep-alive, which lets go of raw connections, since they answer no pings."""


def of(test: Callable[..., Awaitable[None]], *arguments: Any) -> Probe:
    """A test of `faults.test_connections` as a probe."""

    async def probe(_: Running, victim: Victim) -> None:
        await partial(test, *arguments)(victim=victim)

    return probe


PROBES: Mapping[str, Probe] = {
    "deadline": deadline,
    "cancellation": cancellation,
    "disconnection": disconnection,
    "streaming both ways": streams_both_ways,
    "large answers": large_answers_one_after_another,
    "compressed requests": compressed_requests,
    "drain with GOAWAY": drains,
    **{
        attack.__name__: of(test_connections.test_a_storm_hurts_nobody_else_and_leaves_nothing, attack, "")
        for attack in STORMS
    },
    **{
        wrong: of(test_connections.test_a_connection_that_breaks_the_protocol_is_told_and_closed, wrong, "")
        for wrong in WRONG_CONNECTIONS
    },
    **{kind: of(test_connections.test_what_is_no_http2_is_hung_up_on, kind) for kind in GARBAGE},
    **{
        wrong: of(test_connections.test_a_wrong_call_is_refused_and_the_next_one_served, wrong, "")
        for wrong in WRONG_CALLS
    },
}
