"""The load generator, in a process of its own: first the peak in closed loops, then multiples of it in open ones.

``python -m bench.overload.generator ORDER`` with an `Order` in JSON prints a line as each phase begins, its name, and
at last their reports in JSON. A call counts for the phase that it was sent in. Its deadline and its latency begin when
it is sent; how much later that was than it was due is told apart, as lag.
"""

import asyncio
import json
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from bench.overload.calls import Calls
from bench.overload.outcomes import Phase, report
from bench.serving.openloop import Alarm
from bench.serving.wire import WIRES

WIRE = WIRES["grpc"]
LOOK_S = 0.002
"""How often calls past their deadline are looked for, and calls sent where all end at once."""
MAX_INFLIGHT = 8000
"""More are not sent, and counted as unsent: the generator must not die of its own load."""
MAX_BURST = 64
"""Calls that are sent late in one go, before answers are read again."""
MAX_ANSWERS = 1000
"""Different answers whose judgement is remembered; there should be one."""


@dataclass(frozen=True, slots=True)
class Order:
    """What to send where, and what is right. `body` and `answer` are files with bytes as they travel."""

    port: int
    body: str
    answer: str
    expected: Sequence[float]
    tolerance: float
    deadline_s: float
    connections: int
    inflight: Sequence[int]
    """Closed loops that look for the peak, each for `closed_s`."""
    closed_s: float
    factors: Sequence[tuple[float, float]]
    """Open loops one after the other: multiples of the peak, and seconds."""
    seed: int


class Generator:
    """Sends what is ordered. `begins` is called with the name of each phase."""

    def __init__(self, order: Order, calls: Sequence[Calls], begins: Callable[[str], None]) -> None:
        self._order = order
        self._calls = calls
        self._begins = begins
        self._random = random.Random(order.seed)
        self._alarm = Alarm(asyncio.get_running_loop())
        self._judged = {Path(order.answer).read_bytes(): True}
        self._sent = 0
        self._inflight = 0
        self._ended = asyncio.Event()

    async def run(self) -> list[dict[str, Any]]:
        """The reports of all phases; there is nothing to multiply, and no open loop, if nothing is answered in time."""
        async with asyncio.TaskGroup() as group:
            watch = group.create_task(self._watch())
            phases = [await self._closed(inflight) for inflight in self._order.inflight]
            peak = max(self._report(phase)["goodput"] for phase in phases)
            factors = self._order.factors if peak else ()
            phases += [await self._open(factor, factor * peak, seconds) for factor, seconds in factors]
            await self._drained()
            watch.cancel()
        return [self._report(phase) for phase in phases]

    async def _closed(self, inflight: int) -> Phase:
        """`inflight` calls at any time."""
        phase = self._begun(f"{inflight} in flight")
        while time.monotonic() < phase.started + self._order.closed_s:
            for _ in range(inflight - self._inflight):
                self._send(phase)
            self._ended.clear()
            # Where the connections are lost, calls end as they are sent, and none is left to wait for.
            await (self._ended.wait() if self._inflight else asyncio.sleep(LOOK_S))
        self._over(phase)
        await self._drained()
        return phase

    async def _open(self, factor: float, rate: float, seconds: float) -> Phase:
        """Arrivals by a Poisson process, whatever the server does."""
        phase = self._begun(f"{factor:g}x", rate)
        due, until = phase.started, phase.started + seconds
        while due < until:
            if time.monotonic() < due:
                await self._alarm.until(due)
            else:
                await asyncio.sleep(0)
            now = time.monotonic()
            for _ in range(MAX_BURST):
                if due > now or due >= until:
                    break
                phase.lags.append(now - due)
                if self._inflight < MAX_INFLIGHT:
                    self._send(phase)
                else:
                    phase.unsent += 1
                due += self._random.expovariate(rate)
        self._over(phase)
        return phase

    def _begun(self, name: str, rate: float = 0.0) -> Phase:
        self._begins(name)
        return Phase(name, rate, started=time.monotonic(), cpu_s=-time.process_time())

    def _over(self, phase: Phase) -> None:
        phase.seconds = time.monotonic() - phase.started
        phase.cpu_s += time.process_time()

    def _send(self, phase: Phase) -> None:
        sent = time.monotonic()

        def ended(status: int, answer: bytes | None) -> None:
            self._inflight -= 1
            self._ended.set()
            phase.ends.append((sent - phase.started, status, time.monotonic() - sent, answer))

        self._inflight += 1
        self._sent += 1
        self._calls[self._sent % len(self._calls)].call(ended)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(LOOK_S)
            for calls in self._calls:
                calls.give_up(time.monotonic())

    async def _drained(self) -> None:
        """Until no call is open; all have deadlines."""
        while self._inflight:
            self._ended.clear()
            await self._ended.wait()

    def _report(self, phase: Phase) -> dict[str, Any]:
        return report(phase, self._order.deadline_s, self._right)

    def _right(self, answer: bytes) -> bool:
        right = self._judged.get(answer)
        if right is None:
            right = self._fits(answer)
            if len(self._judged) < MAX_ANSWERS:
                self._judged[answer] = right
        return right

    def _fits(self, answer: bytes) -> bool:
        try:
            array = WIRE.array(answer).reshape(-1)
        except Exception:  # noqa: BLE001 (whatever is wrong with it, it is wrong)
            return False
        expected = np.array(self._order.expected, np.float32)
        return array.size == expected.size and bool(np.abs(array - expected).max() <= self._order.tolerance)


async def generate(order: Order, body: bytes, begins: Callable[[str], None]) -> list[dict[str, Any]]:
    """The reports of all phases of `order`."""
    headers = (*WIRE.headers, ("grpc-timeout", f"{order.deadline_s * 1e3:.0f}m"))
    calls = [await Calls.connect(order.port, WIRE.path, headers, body) for _ in range(order.connections)]
    try:
        for each in calls:
            each.timeout_s = order.deadline_s
        return await Generator(order, calls, begins).run()
    finally:
        for each in calls:
            each.close()


if __name__ == "__main__":
    ordered = Order(**json.loads(sys.argv[1]))
    prepared = Path(ordered.body).read_bytes()
    found = asyncio.run(generate(ordered, prepared, lambda name: print(name, flush=True)))  # noqa: T201
    print(json.dumps(found))  # noqa: T201
