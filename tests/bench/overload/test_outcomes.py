"""What overload does to a server must be seen as it is: late answers are not good ones, late refusals no refusals."""

import asyncio
import socket
import struct
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from bench.overload import runs
from bench.overload.calls import GAVE_UP, HELD, MAX_CONCURRENT_STREAMS, RESET, Calls
from bench.overload.generator import Order, generate
from bench.overload.outcomes import LATE, Phase, outcome, report
from bench.overload.report import markdown
from bench.serving.load import LoadFailure
from bench.serving.process import Process
from bench.serving.senders import SETTINGS, frame
from bench.serving.test_openloop import RIGHT, Context, answer, framed, serving
from bench.serving.wire import HOST, Grpc

DEADLINE_S = 60.0
"""Nobody misses it, however slow the machine is."""
SOON_S = 0.2
End = tuple[float, int, float, bytes | None]
GOOD: End = (0.5, 0, 0.05, b"right")


def right(body: bytes) -> bool:
    return body == b"right"


@pytest.mark.parametrize(
    ("status", "took_s", "body", "name"),
    [
        (grpc.StatusCode.OK, 0.09, b"right", "good"),
        (grpc.StatusCode.OK, 0.11, b"right", "late"),
        (grpc.StatusCode.OK, 0.01, b"left", "wrong"),
        (grpc.StatusCode.OK, 0.01, None, "wrong"),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, 0.01, None, "RESOURCE_EXHAUSTED"),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, 0.09, None, LATE),
        (grpc.StatusCode.DEADLINE_EXCEEDED, 0.1, None, LATE),
        (grpc.StatusCode.INTERNAL, 0.09, None, "INTERNAL"),
    ],
)
def test_each_end_of_a_call_has_its_name(status: grpc.StatusCode, took_s: float, body: bytes | None, name: str) -> None:
    assert outcome(status.value[0], took_s, 0.1, body, right) == name


def test_calls_that_nobody_answered_are_neither_good_nor_refused() -> None:
    ends = {outcome(status, 0.1, 0.1, None, right) for status in (RESET, GAVE_UP, HELD)}
    assert ends == {"reset", "gave up", "held"}


def test_the_figures_of_a_phase_count_what_was_good_only() -> None:
    ends: list[End] = [
        *[GOOD] * 6,
        *[(3.0, 0, 0.2, b"right")] * 3,
        (1.0, 8, 0.001, None),
    ]
    found = report(Phase("5x", 10.0, seconds=2.0, ends=ends), 0.1, right)
    assert (found["goodput"], found["sent"]) == (3.0, 5.0)
    assert found["first"] == {"sent": 7, "good": 6}
    assert found["refused_ms"] == [1.0, 1.0]


def order(folder: Path, port: int, deadline_s: float) -> Order:
    return Order(
        port=port,
        body=str(folder / "request"),
        answer=str(folder / "answer"),
        expected=[1, 2],
        tolerance=0.01,
        deadline_s=deadline_s,
        connections=2,
        inflight=(4,),
        closed_s=0.3,
        factors=((1.0, 0.3),),
        seed=1,
    )


async def measured(folder: Path, port: int, deadline_s: float) -> list[dict[str, Any]]:
    (folder / "answer").write_bytes(framed(RIGHT))
    return await generate(order(folder, port, deadline_s), framed(b"request"), lambda _: None)


async def test_deadlines_travel_and_statuses_come_back(tmp_path: Path) -> None:
    told: list[float | None] = []

    async def handle(_: bytes, context: Context) -> bytes:
        told.append(context.time_remaining())
        if len(told) % 3 == 0:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "full")
        return answer(1, 3) if len(told) % 3 == 1 else RIGHT

    async with serving(handle) as port:
        closed, opened = await measured(tmp_path, port, DEADLINE_S)
    assert all(remaining_s is not None and remaining_s <= DEADLINE_S for remaining_s in told)
    assert set(closed["outcomes"]) == {"good", "wrong", "RESOURCE_EXHAUSTED"}
    assert set(opened["outcomes"]) <= {"good", "wrong", "RESOURCE_EXHAUSTED"}
    assert opened["offered"] == closed["goodput"] > 0


async def test_a_client_gives_up_at_its_deadline_and_tells_the_server(tmp_path: Path) -> None:
    cancelled = asyncio.Event()

    async def handle(_: bytes, __: Context) -> bytes:
        try:
            return await asyncio.Event().wait() and RIGHT
        finally:
            cancelled.set()

    async with serving(handle) as port:
        (closed,) = await measured(tmp_path, port, SOON_S)
        await cancelled.wait()
    assert closed["goodput"] == 0
    assert set(closed["outcomes"]) <= {"gave up", LATE}


async def test_a_server_that_goes_away_is_not_called_without_an_end(tmp_path: Path) -> None:
    async def leave(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.transport.abort()

    async with await asyncio.start_server(leave, HOST, 0) as server:
        (closed,) = await measured(tmp_path, server.sockets[0].getsockname()[1], DEADLINE_S)
    assert set(closed["outcomes"]) == {"reset"}


@pytest.fixture
async def calls() -> AsyncIterator[Calls]:
    """To a server that takes one call at a time, and never answers."""
    with nobody() as port:
        calls = await Calls.connect(port, Grpc().path, (), b"")
        calls.timeout_s = DEADLINE_S
        calls.data_received(frame(SETTINGS, 0, 0, struct.pack(">HI", MAX_CONCURRENT_STREAMS, 1)))
        yield calls
        calls.close()


@contextmanager
def nobody() -> Iterator[int]:
    """A port where connections are made, and nothing is read."""
    with socket.create_server((HOST, 0)) as server:
        yield server.getsockname()[1]


def ended(calls: Calls) -> list[int]:
    """How two calls end: filled in as they do."""
    statuses: list[int] = []
    for _ in range(2):
        calls.call(lambda status, _: statuses.append(status))
    return statuses


async def test_a_server_is_not_blamed_for_a_call_that_it_had_no_room_for(calls: Calls) -> None:
    statuses = ended(calls)
    calls.give_up(time.monotonic() + 2 * DEADLINE_S)
    assert sorted(statuses) == sorted([GAVE_UP, HELD])


async def test_a_lost_connection_holds_nothing(calls: Calls) -> None:
    calls.pause_writing()
    statuses = ended(calls)
    calls.connection_lost(None)
    assert statuses == [RESET, RESET]


def test_a_generator_that_does_not_end_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "GRACE_S", 1.0)
    for name in ("request", "answer"):
        (tmp_path / name).write_bytes(framed(RIGHT))
    server = Process(["sleep", "600"], tmp_path, {})
    try:
        with nobody() as port, pytest.raises(LoadFailure, match="ended with -9"):
            runs._generated(order(tmp_path, port, deadline_s=600.0), server)
    finally:
        server.stop()


def phase(name: str, offered: float, ends: Sequence[End], *, unsent: int = 0) -> dict[str, Any]:
    found = Phase(name, offered, seconds=1.0, lags=[0.0], ends=list(ends), unsent=unsent)
    return {**report(found, 0.1, right), "server_cpu_s": 0.1}


def page(**servers: dict[str, Any]) -> str:
    """Of servers that have a peak of 100, and what each did at five times that."""
    peak, after = phase("8 in flight", 0, [GOOD] * 100), phase("0.5x", 50, [GOOD] * 50)
    return markdown(
        {
            "command": "scripts/bench overload",
            "started": "2026-01-01",
            "machine": "a machine",
            "deadline_s": 0.1,
            "seconds": 1,
            "rounds": 1,
            "titles": {name: name for name in servers},
            "runs": [
                {"round": 1, "model": "pause", "server": name, "phases": [peak, over, after]}
                for name, over in servers.items()
            ],
            "failures": [],
        }
    )


def test_the_page_says_who_missed_the_goal() -> None:
    strong, weak = (
        phase("5x", 500, [*[GOOD] * good, (0.5, 8, refused_s, None)]) for good, refused_s in ((95, 0.001), (20, 0.03))
    )
    found = page(strong=strong, weak=weak)
    assert "| strong | 95% | 1.0 ms |" in found
    assert "| weak | **20%** | **30.0 ms** |" in found


def test_the_page_keeps_what_was_late_from_what_was_never_sent() -> None:
    gave_up, held = (0.5, GAVE_UP, 0.1, None), (0.5, HELD, 0.1, None)
    found = page(full=phase("5x", 500, [*[GOOD] * 50, *[gave_up] * 10, *[held] * 20], unsent=20))
    assert "| 60 | 50 | 50% |  | 10.00% | 20.00% | 20.00% |" in found, "sent, good, of peak, -, too late, held, unsent"
