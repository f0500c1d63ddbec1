"""Load on a server, and what it saw: h2load in a closed loop, `openloop` in an open one, in processes of their own.

h2load does not read gRPC's statuses, but a call that fails has no message: so the bytes of all messages together say
how many calls were answered, and were answered in full.
"""

import json
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from bench.serving.models import Model
from bench.serving.openloop import Order
from bench.serving.process import Process
from bench.serving.wire import HOST, Wire, WrongAnswer
from numpy.typing import NDArray

from hedgerow.config import environment

CONNECTIONS = 4
"""Of HTTP/2, which the calls in flight share."""
GRACE_S = 60.0
"""How much longer than it was told a load generator may take."""
SIDE_CHECK_EVERY_S = 1.0
TESTS = Path(__file__).parent.parent.parent


class LoadFailure(Exception):
    """The load could not be run to its end."""


@dataclass(frozen=True, slots=True)
class Target:
    """A server under load: its wire and port, the request, and an answer to it that was judged right."""

    wire: Wire
    port: int
    model: Model
    body: Path
    answer: bytes
    process: Process


@dataclass(frozen=True, slots=True)
class Result:
    """One load on one server. `wrong`: answers that were no error, but not right; `missing`: calls without an answer.
    Both include what `side_checks`, by another client, found during the load.

    `cpu_us`: of the server's processes, a request. `generator_cpu_us` and `lag_p50_ms` (how late requests were sent)
    tell what an open loop's generator cost; it counts latency from when a request should have been sent.
    """

    rate: float
    p50_ms: float
    p99_ms: float
    requests: int
    missing: int = 0
    wrong: int = 0
    side_checks: int = 0
    cpu_us: float = 0.0
    rss_mb: float = 0.0
    offered: float = 0.0
    lag_p50_ms: float = 0.0
    generator_cpu_us: float = 0.0


def closed(target: Target, inflight: int, seconds: float) -> Result:
    """`inflight` requests at any time for `seconds`."""
    log = target.body.with_suffix(".log")
    log.unlink(missing_ok=True)
    command = ["h2load", "-D", f"{seconds * 1e3:.0f}ms", "-d", str(target.body), f"--log-file={log}"]
    for name, value in target.wire.headers:
        command += ["-H", f"{name}: {value}"]
    if target.wire.name == "http":
        command += ["--h1", "-c", str(inflight)]
    else:
        connections = min(inflight, CONNECTIONS)
        command += ["-c", str(connections), "-m", str(inflight // connections)]
    command.append(f"http://{HOST}:{target.port}{target.wire.path}")
    with _checked(target) as checks, _costed(target) as cost:
        printed = _run(command, seconds)
        result = h2load_result(
            printed,
            np.loadtxt(log, dtype=np.int64, usecols=2, ndmin=1),
            answer_bytes=len(target.answer) if target.wire.name == "grpc" else 0,
            inflight=inflight,
            seconds=seconds,
        )
    return cost.of(checks.into(result))


def opened(target: Target, rate: float, seconds: float, seed: int) -> Result:
    """Requests that arrive at random (Poisson) at `rate` a second for `seconds`, whatever the server does."""
    expected = target.body.with_suffix(".npy")
    np.save(expected, target.model.expected)
    answer = target.body.with_suffix(".answer")
    answer.write_bytes(target.answer)
    order = Order(
        wire=target.wire.name,
        port=target.port,
        body=str(target.body),
        answer=str(answer),
        expected=str(expected),
        tolerance=target.model.tolerance,
        rate=rate,
        seconds=seconds,
        seed=seed,
    )
    command = [sys.executable, "-m", "bench.serving.openloop", json.dumps(asdict(order))]
    with _checked(target) as checks, _costed(target) as cost:
        report = json.loads(_run(command, seconds))
    return cost.of(checks.into(Result(**report)))


def h2load_result(
    printed: str, took_us: NDArray[np.int64], *, answer_bytes: int, inflight: int, seconds: float
) -> Result:
    """What h2load `printed` and logged says. `answer_bytes` of a gRPC answer; 0: the HTTP status says all."""
    counts = re.search(r"requests: \d+ total, \d+ started, (\d+) done, (\d+) succeeded, (\d+) failed", printed)
    data = re.search(r"\((\d+)\) data", printed)
    if counts is None or data is None:
        raise LoadFailure(f"h2load said: {printed[-300:]}")
    done, succeeded = int(counts[1]), int(counts[2])
    if not done:
        raise LoadFailure(f"no request was answered in {seconds:g} s; h2load said: {printed[-300:]}")
    missing = done - succeeded
    if answer_bytes:
        unanswered = abs(succeeded - int(data[1]) / answer_bytes)
        if unanswered > inflight:  # what was in flight at the end may have been read in part
            missing += round(unanswered)
    p50_us, p99_us = np.percentile(took_us, (50, 99))
    return Result(
        rate=(done - missing) / seconds, p50_ms=p50_us / 1e3, p99_ms=p99_us / 1e3, requests=done, missing=missing
    )


def _run(command: Sequence[str], seconds: float) -> str:
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=seconds + GRACE_S,
            check=False,
            env=environment(PYTHONPATH=str(TESTS)),
        )
    except subprocess.TimeoutExpired as error:
        raise LoadFailure(f"the load was not over {GRACE_S:.0f} s after its time: the server hangs") from error
    if done.returncode:
        raise LoadFailure(f"{command[0]} ended with {done.returncode}: {(done.stderr or done.stdout)[-500:]}")
    return done.stdout


@dataclass(slots=True)
class _Checks:
    """What asking now and then during a load found. Its counts join those of the load."""

    right: int = 0
    wrong: int = 0
    missing: int = 0

    def into(self, result: Result) -> Result:
        return replace(
            result,
            side_checks=self.right + self.wrong + self.missing,
            wrong=result.wrong + self.wrong,
            missing=result.missing + self.missing,
        )


@contextmanager
def _checked(target: Target) -> Iterator[_Checks]:
    """Ask now and then, and judge the answers."""
    done, checks = threading.Event(), _Checks()
    body = target.body.read_bytes()

    def check() -> None:
        while not done.wait(SIDE_CHECK_EVERY_S):
            try:
                target.wire.judge(target.model, target.wire.ask(target.port, body))
                checks.right += 1
            except WrongAnswer:
                checks.wrong += 1
            except OSError:
                checks.missing += 1

    thread = threading.Thread(target=check)
    thread.start()
    try:
        yield checks
    finally:
        done.set()
        thread.join()


class _Cost:
    cpu_s = 0.0
    rss_bytes = 0

    def of(self, result: Result) -> Result:
        return replace(result, cpu_us=self.cpu_s / result.requests * 1e6, rss_mb=self.rss_bytes / 2**20)


@contextmanager
def _costed(target: Target) -> Iterator[_Cost]:
    cost, before_s = _Cost(), target.process.cpu_s()
    yield cost
    cost.cpu_s = target.process.cpu_s() - before_s
    cost.rss_bytes = target.process.rss_bytes()


def missing_tools() -> str:
    """What has to be installed before any load can be run; empty: nothing."""
    return "" if shutil.which("h2load") else "h2load is not installed (Debian: apt-get install nghttp2-client)"
