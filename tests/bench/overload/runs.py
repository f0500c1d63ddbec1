"""One server at a time: started, warmed up by the closed loops, overloaded, and ended."""

import json
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from bench.overload.generator import Order
from bench.serving import servers
from bench.serving.environments import Environments
from bench.serving.load import TESTS, LoadFailure, Target
from bench.serving.models import Model, tiny
from bench.serving.process import Process
from bench.serving.rounds import _first_answer as first_answer
from bench.serving.rounds import say
from bench.serving.servers import Command, Place, Server
from bench.serving.wire import WIRES
from simulators.agents import EXECUTABLE

from hedgerow.config import environment

LAUNCH = Path(__file__).with_name("peers") / "launch.py"
ENGINE = "engine.py"
CONNECTIONS = 4
CLOSED = (4, 8, 16, 32, 64)
CLOSED_S = 2.0
FACTORS = (1.0, 2.0, 5.0)
AFTER = 0.5
"""What is offered after the overload, as a share of the peak."""
AFTER_S = 4.0
GRACE_S = 60.0
TRITON_QUEUE = 128
"""Requests that wait in Triton, as many as in ours; and they wait no longer than the deadline."""
WORKERS = 2
PAUSE_S, PAUSE_ROW_S = 0.004, 0.002
"""What a run of `pause` takes, and each row of it: 32 rows run at three times the rate of single ones."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How long each overload lasts, and the deadline of each call."""

    seconds: float
    deadline_s: float


@dataclass(frozen=True, slots=True)
class Kind:
    """A model, and the seconds that a run of it sleeps: at all, and for each row."""

    make: Callable[[Path, Environments], Model]
    pause_s: float = 0.0
    pause_row_s: float = 0.0


def pause(folder: Path, environments: Environments) -> Model:
    """`tiny`, told to run two batches at a time."""
    return replace(tiny(folder, environments), name="pause", workers=WORKERS)


MODELS: Mapping[str, Kind] = {"pause": Kind(pause, PAUSE_S, PAUSE_ROW_S), "tiny": Kind(tiny)}
SERVERS: Mapping[str, Server] = {
    name: servers.SERVERS[name] for name in ("agent", "bare", "floor", "kserve", "triton-batching")
}


def measure(
    name: str, model: str, plan: Plan, cache: Path, environments: Environments, *, seed: int
) -> list[dict[str, Any]]:
    """The phases of one server on one model. Raises what `bench.serving` raises where something does not run."""
    kind, folder = MODELS[model], cache / "run" / "overload"
    at = servers.place(SERVERS[name], kind.make(cache / "models", environments), folder, environments, "")
    command = _slowed(SERVERS[name].prepare(at), at, kind, plan.deadline_s)
    process = Process(command.arguments, folder, command.variables)
    try:
        wire = WIRES["grpc"]
        body = folder / "request"
        body.write_bytes(wire.body(at.model))
        answer = folder / "answer"
        answer.write_bytes(first_answer(Target(wire, at.job.port, at.model, body, b"", process)))
        order = Order(
            port=at.job.port,
            body=str(body),
            answer=str(answer),
            expected=[float(value) for value in np.ravel(at.model.expected)],
            tolerance=at.model.tolerance,
            deadline_s=plan.deadline_s,
            connections=CONNECTIONS,
            inflight=CLOSED,
            closed_s=CLOSED_S,
            factors=(*((factor, plan.seconds) for factor in FACTORS), (AFTER, AFTER_S)),
            seed=seed,
        )
        return _generated(order, process)
    finally:
        process.stop()


def _generated(order: Order, server: Process) -> list[dict[str, Any]]:
    """Run the generator; the phases, with what each cost the server."""
    command = [sys.executable, "-m", "bench.overload.generator", json.dumps(asdict(order))]
    limit_s = len(order.inflight) * order.closed_s + sum(seconds for _, seconds in order.factors) + GRACE_S
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment(PYTHONPATH=str(TESTS))) as child:
        timer = threading.Timer(limit_s, child.kill)
        timer.start()
        try:
            costs, printed = _followed(child, server)
            child.wait()
        finally:
            timer.cancel()
            child.kill()
    if child.returncode:
        raise LoadFailure(f"the generator ended with {child.returncode}; it may run for {limit_s:g} s")
    phases: list[dict[str, Any]] = json.loads(printed)
    if len(phases) == len(order.inflight):
        raise LoadFailure(f"no call was answered within {order.deadline_s:g} s, in any of the closed loops")
    for phase, cpu_s in zip(phases, costs, strict=True):
        phase["server_cpu_s"] = round(cpu_s, 3)
        if phase["offered"]:
            say(f"  {phase['phase']}: {phase['goodput']:,.0f} good/s of {phase['sent']:,.0f}/s, {phase['outcomes']}")
    return phases


def _followed(child: "subprocess.Popen[str]", server: Process) -> tuple[list[float], str]:
    """The server's CPU seconds in each phase, and the last line: the reports, if the child ended well."""
    marks, last = [], ""
    assert child.stdout is not None
    for line in child.stdout:
        marks.append(server.cpu_s())
        last = line
    return [after - before for before, after in pairwise(marks)], last


def _slowed(command: Command, at: Place, kind: Kind, deadline_s: float) -> Command:
    """The same server with a model that takes its time, and where Triton is, a bounded queue."""
    repository = at.folder / "models" / at.model.name
    if repository.exists():
        policy = (
            f"dynamic_batching {{ default_queue_policy {{ max_queue_size: {TRITON_QUEUE} timeout_action: REJECT "
            f"default_timeout_microseconds: {deadline_s * 1e6:.0f} }} }}"
        )
        config = repository / "config.pbtxt"
        config.write_text(config.read_text().replace("dynamic_batching { }", policy))
        engine = repository / "1" / ENGINE
        engine.write_text(engine.read_text() + _TRITON_PAUSE.format(kind=kind))
        return command
    python, *arguments = command.arguments
    if python == EXECUTABLE:
        python, arguments = sys.executable, command.arguments
    pauses = [str(kind.pause_s), str(kind.pause_row_s)]
    return Command([python, str(LAUNCH), *pauses, *arguments], command.variables)


_TRITON_PAUSE = """

import time

_run = Model.__call__


def _slow(self, array):
    time.sleep({kind.pause_s} + {kind.pause_row_s} * len(array))
    return _run(self, array)


Model.__call__ = _slow
"""
"""Appended to the copy of the peers' engine that Triton's model imports."""
