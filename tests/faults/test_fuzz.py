"""Random requests: mutated frames, mutated messages, and such that Hypothesis makes up. Thousands, or 100,000 (slow).

No crash, no hang, nothing left; every message gets an answer, and none of them says that the server was surprised.
"""

import asyncio
import random
from collections.abc import Iterator
from functools import partial
from typing import Any

import grpc
import pytest
from contract.target import outcome
from faults.attacks import INFER, KNOWN
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from simulators import victims
from simulators.background import in_background
from simulators.http2 import MAX_FRAME_BYTES, PREFACE, RawConnection, frame
from simulators.http2 import settings as http2_settings
from simulators.victims import ECHO, Victim, message

from hedgerow import transports
from hedgerow.proto import oip_pb2
from hedgerow.tensors import numpy_dtype

SERVICE = "/inference.GRPCInferenceService/"
SEED = 20_261
MUTATIONS = (1, 1, 1, 2, 4)
"""How many a message gets: mostly one, or nothing of it is right."""
AT_ONCE = 16
"""Connections or calls."""
WAIT_S = 60.0
SPARE_TASKS, SPARE_DESCRIPTORS = 20, 20
SPARE_BYTES = 96 * 2**20

# Frames (a connection each), messages, made-up requests: altogether 2,600, or 100,000.
FEW, MANY = (400, 2_000, 200), (20_000, 75_000, 5_000)
COUNTS = [
    pytest.param(FEW, id="few"),
    pytest.param(MANY, id="many", marks=[pytest.mark.slow, pytest.mark.timeout(3600)]),
]

EXPECTED = {
    grpc.StatusCode.OK,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.UNIMPLEMENTED,
    grpc.StatusCode.DEADLINE_EXCEEDED,  # the request's own parameter may say so
}


@pytest.fixture(scope="module", params=transports.known())
def transport(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def victim(transport: str) -> Iterator[Victim]:
    with in_background(lambda: victims.running(transport=transport)) as victim:
        yield victim


def mutated(chance: random.Random, whole: bytes) -> bytes:
    """`whole` with a few bytes changed, lost, added or repeated."""
    mutant = bytearray(whole)
    for _ in range(chance.choice(MUTATIONS)):
        at = chance.randrange(len(mutant) + 1)
        size = chance.choice((1, 1, 2, 4, 9, 64))
        match chance.randrange(6):
            case 0 if at < len(mutant):
                mutant[at] ^= 1 << chance.randrange(8)
            case 1:
                del mutant[at : at + size]
            case 2:
                mutant[at:at] = chance.randbytes(size)
            case 3:
                mutant[at : at + size] = chance.choice((b"\0", b"\xff", b"\x7f")) * size
            case 4:
                mutant[at:at] = mutant[at : at + size]
            case _:
                del mutant[at:]
        if not mutant:
            break
    return bytes(mutant)


def conversation(chance: random.Random) -> bytes:
    """What a client says that makes a few good calls, with a few frames of other kinds, mutated."""
    to = RawConnection("nowhere:0")
    parts = [http2_settings()]
    for stream in range(1, 2 * chance.randint(1, 4), 2):
        parts.append(to.call(stream, INFER, message(ECHO)))
        if chance.random() < 0.5:
            kind, flags = chance.randrange(12), chance.choice((0, 1, 4, 5, 8, 0xFF))
            parts.append(frame(kind, flags, chance.choice((0, 1, 2, stream)), chance.randbytes(chance.randrange(20))))
    chance.shuffle(parts)
    whole = b"".join(parts)
    return PREFACE + mutated(chance, whole) if chance.random() < 0.9 else mutated(chance, PREFACE + whole)


@pytest.mark.parametrize("counts", COUNTS)
async def test_mutated_frames_end_with_the_connection_and_hurt_nobody(
    counts: tuple[int, int, int], transport: str, victim: Victim
) -> None:
    if counts is MANY and (reason := KNOWN.get(transport, {}).get("many mutated frames")):
        pytest.xfail(reason)

    async def one(seed: int) -> None:
        async with RawConnection(victim.address, greet=False) as to:
            to.send(conversation(random.Random(seed)))
            to.half_close()
            try:
                while await to.reader.read(MAX_FRAME_BYTES):
                    pass
            except ConnectionError:
                pass  # hung up on

    await some_at_once(one, counts[0], victim)


@pytest.mark.parametrize("counts", COUNTS)
async def test_mutated_messages_are_answered_each_without_surprise(
    counts: tuple[int, int, int], victim: Victim
) -> None:
    good: dict[str, bytes] = {
        "ModelInfer": message(ECHO, 1.0, 2.0, identity="fuzz"),
        "ModelMetadata": oip_pb2.ModelMetadataRequest(name=ECHO, version="1").SerializeToString(),
        "ModelReady": oip_pb2.ModelReadyRequest(name=ECHO, version="1").SerializeToString(),
        "ModelConfig": oip_pb2.ModelConfigRequest(name=ECHO, version="1").SerializeToString(),
        "ModelStatistics": oip_pb2.ModelStatisticsRequest(name=ECHO, version="1").SerializeToString(),
    }
    methods = ["ModelInfer"] * 8 + list(good)
    async with grpc.aio.insecure_channel(victim.address) as channel:

        async def one(seed: int) -> None:
            chance = random.Random(seed)
            method = chance.choice(methods)
            call: Any = channel.unary_unary(SERVICE + method)
            await answered(call(mutated(chance, good[method]), timeout=WAIT_S), f"seed {seed}")

        await some_at_once(one, counts[1], victim)


def requests() -> st.SearchStrategy[oip_pb2.ModelInferRequest]:
    """Requests that might be meant for `echo`: of everything the right thing, or something near it, or anything."""
    names = st.sampled_from(["x", "x", "x", "y", "", "\N{SNOWMAN}", "a\0b"])
    sizes = st.sampled_from([0, 1, 2, 3, -1, 2**31, 2**62, -(2**63)])
    datatypes = st.sampled_from(
        ["FP32", "FP32", "FP32", "BOOL", "INT8", "UINT64", "FP16", "BF16", "FP64", "BYTES", "STRING", ""]
    )
    parameter = st.one_of(
        st.builds(oip_pb2.InferParameter, bool_param=st.booleans()),
        st.builds(oip_pb2.InferParameter, int64_param=st.integers(-(2**63), 2**63 - 1)),
        st.builds(oip_pb2.InferParameter, string_param=st.text(max_size=20)),
        st.builds(oip_pb2.InferParameter, double_param=st.floats()),
        st.builds(oip_pb2.InferParameter, uint64_param=st.integers(0, 2**64 - 1)),
        st.just(oip_pb2.InferParameter()),
    )
    keys = st.sampled_from(["timeout", "priority", "sequence_id", "sequence_start", "classification", "any", ""])
    parameters = st.one_of(st.just({}), st.dictionaries(keys, parameter, max_size=3))
    contents = st.one_of(
        st.none(),
        st.builds(oip_pb2.InferTensorContents, fp32_contents=st.lists(st.floats(width=32), max_size=4)),
        st.builds(oip_pb2.InferTensorContents, int_contents=st.lists(st.integers(-(2**31), 2**31 - 1), max_size=4)),
        st.builds(oip_pb2.InferTensorContents, bytes_contents=st.lists(st.binary(max_size=9), max_size=4)),
    )
    inputs = st.builds(
        oip_pb2.ModelInferRequest.InferInputTensor,
        name=names,
        datatype=datatypes,
        shape=st.lists(sizes, max_size=4),
        parameters=parameters,
        contents=contents,
    )
    right = st.builds(
        oip_pb2.ModelInferRequest.InferInputTensor,
        name=st.just("x"),
        datatype=st.just("FP32"),
        shape=st.lists(st.integers(0, 8), min_size=1, max_size=1),
    )
    asked = st.builds(oip_pb2.ModelInferRequest.InferRequestedOutputTensor, name=names, parameters=parameters)
    request = st.builds(
        oip_pb2.ModelInferRequest,
        model_name=st.sampled_from([ECHO, ECHO, ECHO, "", "no-such-model", "\N{SNOWMAN}" * 1000]),
        model_version=st.sampled_from(["", "", "1", "2"]),
        id=st.text(max_size=50),
        parameters=parameters,
        inputs=st.one_of(st.lists(right, min_size=1, max_size=1), st.lists(inputs, max_size=3)),
        outputs=st.one_of(st.just([]), st.lists(asked, max_size=3)),
        raw_input_contents=st.lists(st.binary(max_size=40), max_size=3),
    )
    return st.tuples(request, st.booleans()).map(lambda made: fitting(*made))


def fitting(request: oip_pb2.ModelInferRequest, fit: bool) -> oip_pb2.ModelInferRequest:
    """The request with raw contents of the right size, if it is to `fit` and could."""
    if fit and all(0 <= size < 9 for one in request.inputs for size in one.shape):
        del request.raw_input_contents[:]
        for one in request.inputs:
            one.ClearField("contents")
            count = 1
            for size in one.shape:
                count *= size
            known = one.datatype not in {"", "STRING", "BYTES"}
            request.raw_input_contents.append(bytes(count * (numpy_dtype(one.datatype).itemsize if known else 4)))
    return request


@pytest.mark.parametrize("counts", COUNTS)
def test_made_up_requests_are_answered_each_without_surprise(counts: tuple[int, int, int], victim: Victim) -> None:
    with grpc.insecure_channel(victim.address) as channel:
        call: Any = channel.unary_unary(SERVICE + "ModelInfer")

        @settings(max_examples=counts[2], suppress_health_check=list(HealthCheck))
        @given(requests())
        def check(request: oip_pb2.ModelInferRequest) -> None:
            _, status, said = outcome(partial(call, request.SerializeToString(), timeout=WAIT_S))
            assert status in EXPECTED, said

        check()
    asyncio.run(victim.serves())


async def answered(call: Any, which: str) -> None:
    """Raise unless the call is answered with a status that is the caller's to mend, or none."""
    try:
        await call
    except grpc.aio.AioRpcError as error:
        assert error.code() in EXPECTED, f"{which}: {error}"  # noqa: PT017 (both are answers)


async def some_at_once(one: Any, count: int, victim: Victim) -> None:
    """Run `one` with `count` seeds, `AT_ONCE` at a time; then the server must be as it was before."""
    await victim.serves()
    before = await victim.vitals()
    seeds = iter(range(SEED, SEED + count))

    async def worker() -> None:
        for seed in seeds:
            try:
                async with asyncio.timeout(WAIT_S):
                    await one(seed)
            except TimeoutError:
                raise AssertionError(f"seed {seed} hangs") from None

    async with asyncio.TaskGroup() as group:
        for _ in range(AT_ONCE):
            group.create_task(worker())
    await victim.serves()
    await victim.recovers(before, tasks=SPARE_TASKS, descriptors=SPARE_DESCRIPTORS, grown_bytes=SPARE_BYTES)
