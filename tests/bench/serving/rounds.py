"""The rounds: each server by itself, started, checked, loaded, checked and ended; then the next one; then all again."""

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from bench.serving import load, servers
from bench.serving.environments import Environments, PeerUnavailable, run
from bench.serving.load import LoadFailure, Target
from bench.serving.models import PEERS, Model
from bench.serving.process import Process
from bench.serving.servers import SERVERS, Server
from bench.serving.wire import HOST, WIRES, WrongAnswer

START_S = 120.0
ASK_EVERY_S = 0.2
WARM_UP_S = 1.0
WARM_UP_INFLIGHT = 8
RAW = "raw"
RAW_TITLE = "the engine alone"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to measure. `seconds`: of each load. `shares`: open loops, as parts of the best closed rate."""

    servers: Sequence[str]
    models: Sequence[Model]
    rounds: int
    seconds: float
    inflight: Sequence[int]
    shares: Sequence[float]
    cores: int


@dataclass(slots=True)
class Findings:
    """One entry of `runs` a load, of `failures` a server that could not be measured to its end."""

    runs: list[dict[str, Any]] = field(default_factory=list)
    failures: list[dict[str, Any]] = field(default_factory=list)


class Rounds:
    """Measures a `Plan`; `findings` grow as it runs."""

    def __init__(self, plan: Plan, cache: Path, environments: Environments) -> None:
        self._plan = plan
        self._folder = cache / "run"
        self._environments = environments
        self.findings = Findings()

    def run(self) -> None:
        """All of it."""
        for number in range(1, self._plan.rounds + 1):
            for model in self._plan.models:
                for name in self._plan.servers:
                    self._visit(number, model, name)

    def _visit(self, number: int, model: Model, name: str) -> None:
        where = {"round": number, "model": model.name, "server": name}
        say(f"round {number}: {model.name} on {name}")
        running: list[Process] = []
        try:
            if name == RAW:
                self._raw(where, model)
                return
            with self._started(SERVERS[name], model, running) as target:
                self._load(where, target)
        except (LoadFailure, PeerUnavailable, WrongAnswer, OSError) as error:
            ended = [process for process in running if not process.running]
            text = f"{'it ended: ' if ended else ''}{error}"
            say(f"  failed: {text}")
            log = [line for process in ended or running[-1:] for line in process.log_tail()]
            self.findings.failures.append({**where, "error": text, "log": log})
        finally:
            for process in reversed(running):
                process.stop()

    def _load(self, where: dict[str, Any], target: Target) -> None:
        load.closed(target, WARM_UP_INFLIGHT, WARM_UP_S)
        best = 0.0
        for inflight in self._plan.inflight:
            result = load.closed(target, inflight, self._plan.seconds)
            best = max(best, result.rate)
            self._note({**where, "inflight": inflight}, result)
        for share in self._plan.shares:
            result = load.opened(target, share * best, self._plan.seconds, seed=where["round"])
            self._note({**where, "share": share}, result)
        target.wire.judge(target.model, target.wire.ask(target.port, target.body.read_bytes()))

    def _note(self, where: dict[str, Any], result: load.Result) -> None:
        self.findings.runs.append({**where, **asdict(result)})
        level = f"{where['inflight']} in flight" if "inflight" in where else f"{where['share']:.0%} of capacity"
        faults = f", {result.missing} missing, {result.wrong} wrong" if result.missing or result.wrong else ""
        say(
            f"  {level}: {result.rate:,.0f}/s, p50 {result.p50_ms:.2f} ms, p99 {result.p99_ms:.2f} ms, "
            f"{result.cpu_us:,.0f} µs CPU{faults}"
        )

    @contextmanager
    def _started(self, server: Server, model: Model, running: list[Process]) -> Iterator[Target]:
        """`server`, answering rightly. Every process is in `running` from its start."""
        upstream = ""
        if server.upstream:
            behind = self._start(SERVERS[server.upstream], model, running, "")
            upstream = f"{HOST}:{behind.port}"
        yield self._start(server, model, running, upstream)

    def _start(self, server: Server, model: Model, running: list[Process], upstream: str) -> Target:
        folder = self._folder / ("front" if upstream else "server")
        at = servers.place(server, model, folder, self._environments, upstream)
        command = server.prepare(at)
        process = Process(command.arguments, folder, command.variables)
        running.append(process)
        wire = WIRES[server.wire]
        body = folder / "request"
        body.write_bytes(wire.body(model))
        target = Target(wire, at.job.port, model, body, b"", process)
        return replace(target, answer=_first_answer(target))

    def _raw(self, where: dict[str, Any], model: Model) -> None:
        """Threads that call the engine: as many as cores, and one."""
        folder = self._folder / "raw"
        at = servers.place(Server(RAW_TITLE, lambda _: servers.Command([], {})), model, folder, self._environments, "")
        np.save(folder / "request.npy", model.request)
        callers = sorted({1, self._plan.cores})
        command = [at.python, str(PEERS / "raw_engine.py"), str(folder), str(self._plan.seconds), *map(str, callers)]
        for line in run(command, START_S + len(callers) * self._plan.seconds, "the raw engine").splitlines():
            found = json.loads(line)
            self._note({**where, "inflight": found.pop("inflight")}, load.Result(**found))


def _first_answer(target: Target) -> bytes:
    """The first answer, judged; asked for until it comes, the server ends, or `START_S` are over."""
    body = target.body.read_bytes()
    deadline = time.monotonic() + START_S
    while True:
        try:
            answer = target.wire.ask(target.port, body)
        except OSError as error:
            if not target.process.running:
                raise LoadFailure(f"it ended before it answered: {error}") from error
            if time.monotonic() > deadline:
                raise LoadFailure(f"it did not answer within {START_S:.0f} s: {error}") from error
            time.sleep(ASK_EVERY_S)
        else:
            target.wire.judge(target.model, answer)
            return answer


def say(text: str) -> None:
    """Progress, for whoever waits."""
    print(text, file=sys.stderr, flush=True)  # noqa: T201
