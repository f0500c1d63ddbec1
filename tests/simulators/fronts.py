"""Several processes on one port, with models that tell which of them answers, and clients that know who answers.

As a script, the parent: `python fronts.py SETTINGS_AS_JSON`, which prints two addresses, of OIP and of the metrics,
once all serve. With "worker" in place of the settings it is one of the processes.
"""

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self
from urllib.error import HTTPError
from urllib.request import urlopen

import grpc
import msgspec
import numpy as np
from numpy.typing import NDArray
from simulators import victims
from simulators.victims import ECHO, SLOW, echo, model, slow

from hedgerow import lifecycle
from hedgerow.config import ServerSettings, Settings, environment
from hedgerow.errors import ConfigError
from hedgerow.function import FunctionBackend
from hedgerow.oip.messages import response_from_proto
from hedgerow.processes import worker
from hedgerow.processes.line import Report
from hedgerow.processes.pages import SupervisedMetrics
from hedgerow.processes.port import held
from hedgerow.processes.supervisor import Supervisor, SupervisorSettings
from hedgerow.proto import oip_pb2, oip_pb2_grpc
from hedgerow.restarts import RestartSettings
from hedgerow.server import Server
from hedgerow.telemetry import metrics
from hedgerow.telemetry.diagnostics import Diagnostics, health

WHO, EXIT = "who", "exit"
LAST = "last"
UNEVEN_S = 1.0
WAIT_S = 90.0
TESTS = Path(__file__).parents[1]


class FrontSettings(Settings, frozen=True, kw_only=True):
    """What the processes are told."""

    processes: int = 2
    server: ServerSettings = ServerSettings(port=0)
    refuse: str = ""
    """Why none of them can serve: "config", or "exit"."""
    uneven: str = ""
    """Folder in which they agree on one that takes longer to start, and leaves a file `LAST` when it could listen."""
    python: str = sys.executable
    """What runs them."""
    supervisor: SupervisorSettings = SupervisorSettings(restarts=RestartSettings(backoff_s=0.01))


async def who(_: Mapping[str, NDArray[Any]]) -> Mapping[str, NDArray[Any]]:
    """The process's id."""
    return {"y": np.array([os.getpid()], np.float32)}


async def leave(inputs: Mapping[str, NDArray[Any]]) -> Mapping[str, NDArray[Any]]:
    """Ends the process with the code that is asked for."""
    os._exit(int(inputs["x"][0]))


class Front:
    """See `worker.Front`."""

    def __init__(self, settings: ServerSettings) -> None:
        functions = {ECHO: echo, SLOW: slow, WHO: who, EXIT: leave}
        self.server = Server(
            FunctionBackend(*(model(name, function) for name, function in functions.items())), settings
        )
        self._counted = metrics.Metrics(lambda: metrics.of_server(self.server))

    async def start(self) -> None:
        await self.server.start()

    async def report(self) -> Report:
        return Report(await self.server.service.ready(), self._counted.page()[0])


@asynccontextmanager
async def serving(told: bytes) -> AsyncIterator[Front]:
    """What each process serves."""
    settings = msgspec.json.decode(told, type=FrontSettings)
    if settings.refuse == "config":
        raise ConfigError("models: there is no such thing")
    if settings.refuse:
        os._exit(3)
    if settings.uneven:
        try:
            Path(settings.uneven, "first").touch(exist_ok=False)  # noqa: ASYNC240 (a moment)
        except FileExistsError:
            await asyncio.sleep(UNEVEN_S)
            Path(settings.uneven, LAST).touch()  # noqa: ASYNC240 (a moment)
    front = Front(settings.server)
    yield front
    await front.server.stop()


async def parent(stop: asyncio.Event) -> None:
    settings = msgspec.json.decode(sys.argv[1], type=FrontSettings)
    with held(settings.server.host, settings.server.port) as port:
        server = msgspec.structs.replace(settings.server, port=port, reuse_port=True)
        told = msgspec.json.encode(msgspec.structs.replace(settings, server=server))
        command = (settings.python, __file__, "worker")
        supervisor = Supervisor(command, told, settings.processes, server.drain_s, settings.supervisor)
        pages = SupervisedMetrics(supervisor)
        async with Diagnostics("127.0.0.1:0", {"/metrics": pages.metrics, **health(pages.ready)}) as watched:

            async def say() -> None:
                await supervisor.serving.wait()
                sys.stdout.write(f"{server.host}:{port} {watched.address}\n")
                sys.stdout.flush()

            await lifecycle.supervise(stop, processes=supervisor.run(), say=say())


@dataclass
class Fronts:
    """Processes that run."""

    address: str
    watched: str
    parent: asyncio.subprocess.Process
    met: set[int] = field(default_factory=set)
    """The processes that were seen."""

    async def meets(self, count: int) -> set[int]:
        """Connect until `count` processes have answered that were not known before; those."""
        new: set[int] = set()
        async with asyncio.timeout(WAIT_S):
            while len(new) < count:
                async with Caller(self.address) as caller:
                    new |= {caller.process} - self.met
        self.met |= new
        return new

    async def get(self, path: str) -> tuple[int, str]:
        """What the parent's pages say there."""

        def get() -> tuple[int, str]:
            try:
                with urlopen(f"http://{self.watched}{path}", timeout=WAIT_S) as answer:
                    return answer.status, answer.read().decode()
            except HTTPError as error:
                with error:
                    return error.code, error.read().decode()

        return await asyncio.to_thread(get)

    async def ended(self) -> int:
        """Wait for the parent to end; its exit code."""
        return await asyncio.wait_for(self.parent.wait(), WAIT_S)


class Caller:
    """A client with a connection of its own, and the process at the other end of it."""

    def __init__(self, address: str) -> None:
        self._channel = grpc.aio.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)])
        self._stub: Any = oip_pb2_grpc.GRPCInferenceServiceStub(self._channel)
        self.process = 0

    async def __aenter__(self) -> Self:
        while not self.process:
            try:
                self.process = int((await self.ask(WHO))[0])
            except grpc.aio.AioRpcError as error:  # it went to a process that went
                assert error.code() is grpc.StatusCode.UNAVAILABLE, error  # noqa: PT017
                await asyncio.sleep(0.02)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._channel.close()

    async def ask(self, name: str, *values: float) -> NDArray[Any]:
        request = oip_pb2.ModelInferRequest.FromString(victims.message(name, *values))
        return response_from_proto(await self._stub.ModelInfer(request, timeout=WAIT_S)).output("y")


@asynccontextmanager
async def started(**settings: Any) -> AsyncIterator[asyncio.subprocess.Process]:
    """The parent, which need not get anywhere."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        __file__,
        json.dumps(settings),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=environment(PYTHONPATH=str(TESTS)),
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


@asynccontextmanager
async def running(**settings: Any) -> AsyncIterator[Fronts]:
    """The parent and all of its processes, which serve."""
    async with started(**settings) as process:
        assert process.stdout is not None
        line = (await asyncio.wait_for(process.stdout.readline(), WAIT_S)).decode()
        assert line, "they did not start"
        address, watched = line.split()
        fronts = Fronts(address, watched, process)
        await fronts.meets(settings.get("processes", 2))
        try:
            yield fronts
        finally:  # where they are at fault, they are not to outlive the test
            for one in fronts.met:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(one, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(worker.run(serving) if sys.argv[1] == "worker" else lifecycle.run(parent))
