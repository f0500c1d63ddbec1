"""An open-loop load generator: requests arrive by a Poisson process, whether or not the server keeps up.

Python, but cheap: prepared bytes on raw HTTP connections (`senders`), woken by a timer of the kernel, because the event
loop's own rounds to milliseconds (h2load's timing scripts drift for that reason: they send 320 a second where 400 were
asked for). Every answer is compared with the right one. Latency counts from when a request should have been sent, so a
stall is felt by all that should have come in it (no coordinated omission).
"""

import asyncio
import ctypes
import json
import os
import random
import struct
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from bench.serving.senders import Http1, Http2, Sender
from bench.serving.wire import WIRES

MAX_INFLIGHT = 4000
"""More are not sent and count as missing: the server is far behind."""
DRAIN_S = 20.0
"""How long the last answers may take."""
MAX_KINDS = 1000
"""Different answers that are judged; there should be one."""
LEAD_S = 0.2
CLOCK_MONOTONIC = 1
TFD_ABSTIME = 1


@dataclass(frozen=True, slots=True)
class Order:
    """What to send where, and what is right. Files hold the body, an answer, and the floats in it."""

    wire: str
    port: int
    body: str
    answer: str
    expected: str
    tolerance: float
    rate: float
    seconds: float
    seed: int


@dataclass(slots=True)
class Tally:
    """What came of it. Times in seconds."""

    latencies: list[float] = field(default_factory=list)
    lags: list[float] = field(default_factory=list)
    answers: Counter[bytes] = field(default_factory=Counter)
    missing: int = 0
    pending: int = 0


class Alarm:
    """A timer of the kernel in the event loop: exact to some 50 µs."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._file = self._libc.timerfd_create(CLOCK_MONOTONIC, os.O_NONBLOCK)
        if self._file < 0:
            raise OSError(ctypes.get_errno(), "timerfd_create")
        self._rang = asyncio.Event()
        loop.add_reader(self._file, self._ring)

    async def until(self, when: float) -> None:
        """Sleep until `when` by `time.monotonic`."""
        self._rang.clear()
        seconds, rest = divmod(max(when, 1e-9), 1.0)
        value = struct.pack("qqqq", 0, 0, int(seconds), int(rest * 1e9) or 1)
        self._libc.timerfd_settime(self._file, TFD_ABSTIME, value, None)
        await self._rang.wait()

    def _ring(self) -> None:
        os.read(self._file, 8)
        self._rang.set()


async def generate(order: Order, body: bytes) -> Tally:
    """Send what was ordered."""
    wire = WIRES[order.wire]
    sender: Sender = await (Http2 if wire.name == "grpc" else Http1).connect(order.port, wire.path, wire.headers, body)
    tally, idle = Tally(), asyncio.Event()
    arrivals = random.Random(order.seed)
    alarm = Alarm(asyncio.get_running_loop())
    due = time.monotonic() + LEAD_S
    end = due + order.seconds

    def sent(due: float) -> None:
        def answered(answer: bytes | None) -> None:
            tally.pending -= 1
            if answer is None:
                tally.missing += 1
            else:
                tally.latencies.append(time.monotonic() - due)
                if answer in tally.answers or len(tally.answers) < MAX_KINDS:
                    tally.answers[answer] += 1
            if not tally.pending:
                idle.set()

        tally.lags.append(time.monotonic() - due)
        tally.pending += 1
        idle.clear()
        sender.send(answered)

    while due < end:
        if time.monotonic() < due:
            await alarm.until(due)
        else:
            await asyncio.sleep(0)  # late: but answers must be read between two requests
        while due <= time.monotonic() and due < end:
            if tally.pending < MAX_INFLIGHT:
                sent(due)
            else:
                tally.missing += 1
            due += arrivals.expovariate(order.rate)
    try:
        async with asyncio.timeout(DRAIN_S):
            if tally.pending:
                await idle.wait()
    except TimeoutError:
        tally.missing += tally.pending
    sender.close()
    return tally


def report(order: Order, tally: Tally, cpu_s: float) -> dict[str, float]:
    """The fields of `load.Result`; `cpu_s` is what the generating took."""
    expected = np.load(order.expected).reshape(-1)
    right = 0
    reference = Path(order.answer).read_bytes()
    for answer, count in tally.answers.items():
        if answer == reference or _right(order, answer, expected):
            right += count
    requests = len(tally.latencies) + tally.missing
    latencies = tally.latencies or [float("nan")]
    p50_s, p99_s = np.percentile(latencies, (50, 99))
    return {
        "offered": order.rate,
        "rate": right / order.seconds,
        "p50_ms": p50_s * 1e3,
        "p99_ms": p99_s * 1e3,
        "requests": requests,
        "missing": tally.missing,
        "wrong": len(tally.latencies) - right,
        "lag_p50_ms": float(np.median(tally.lags)) * 1e3,
        "generator_cpu_us": cpu_s / requests * 1e6,
    }


def _right(order: Order, answer: bytes, expected: "np.ndarray[tuple[int], np.dtype[np.float32]]") -> bool:
    try:
        array = WIRES[order.wire].array(answer).reshape(-1)
    except Exception:  # noqa: BLE001 (whatever is wrong with it, it is wrong)
        return False
    return array.size == expected.size and bool(np.abs(array - expected).max() <= order.tolerance)


if __name__ == "__main__":
    ordered = Order(**json.loads(sys.argv[1]))
    prepared = Path(ordered.body).read_bytes()
    started_s = time.process_time()
    tally = asyncio.run(generate(ordered, prepared))
    took_s = time.process_time() - started_s
    print(json.dumps(report(ordered, tally, took_s)))  # noqa: T201
