"""What overload does to a server must be seen as it is: late answers are not good ones, late refusals no refusals."""

import asyncio
from pathlib import Path
from typing import Any

import grpc
import pytest
from bench.overload.calls import GAVE_UP, RESET
from bench.overload.generator import Order, generate
from bench.overload.outcomes import LATE, Phase, outcome, report
from bench.overload.report import markdown
from bench.serving.test_openloop import RIGHT, Context, answer, framed, serving

DEADLINE_S = 60.0
"""Nobody misses it, however slow the machine is."""
SOON_S = 0.2


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
    assert {outcome(status, 0.1, 0.1, None, right) for status in (RESET, GAVE_UP)} == {"reset", "gave up"}


def test_the_figures_of_a_phase_count_what_was_good_only() -> None:
    ends: list[tuple[float, int, float, bytes | None]] = [
        *[(0.5, 0, 0.05, b"right")] * 6,
        *[(3.0, 0, 0.2, b"right")] * 3,
        (1.0, 8, 0.001, None),
    ]
    found = report(Phase("5x", 10.0, seconds=2.0, ends=ends), 0.1, right)
    assert (found["goodput"], found["sent"]) == (3.0, 5.0)
    assert found["first"] == {"sent": 7, "good": 6}
    assert found["refused_ms"] == [1.0, 1.0]


async def measured(folder: Path, port: int, deadline_s: float) -> list[dict[str, Any]]:
    (folder / "answer").write_bytes(framed(RIGHT))
    order = Order(
        port=port,
        body="",
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
    return await generate(order, framed(b"request"), lambda _: None)


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


def test_the_page_says_who_missed_the_goal() -> None:
    def phase(name: str, offered: float, good: int, refused_ms: float) -> dict[str, Any]:
        ends: list[tuple[float, int, float, bytes | None]] = [(0.5, 0, 0.05, b"right")] * good
        found = report(
            Phase(name, offered, seconds=1.0, lags=[0.0], ends=[*ends, (0.5, 8, refused_ms / 1e3, None)]), 0.1, right
        )
        return {**found, "server_cpu_s": 0.1}

    def run(server: str, good: int, refused_ms: float) -> dict[str, Any]:
        loads = [phase("8 in flight", 0, 100, 1), phase("5x", 500, good, refused_ms), phase("0.5x", 50, 50, 1)]
        return {"round": 1, "model": "pause", "server": server, "phases": loads}

    page = markdown(
        {
            "command": "scripts/bench overload",
            "started": "2026-01-01",
            "machine": "a machine",
            "deadline_s": 0.1,
            "seconds": 1,
            "rounds": 1,
            "titles": {"strong": "Strong", "weak": "Weak"},
            "runs": [run("strong", 95, 1), run("weak", 20, 30)],
            "failures": [],
        }
    )
    assert "| Strong | 95% | 1.0 ms |" in page
    assert "| Weak | **20%** | **30.0 ms** |" in page
