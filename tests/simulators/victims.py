"""A server in a process of its own, to be attacked, with models that tell what the attack has left behind.

As a script, the process: `python victims.py SETTINGS_AS_JSON`, which prints its address and ends at SIGTERM. `running`
starts one and gives a `Victim`.
"""

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import msgspec
import numpy as np
from numpy.typing import NDArray

from hedgerow.config import ServerSettings
from hedgerow.function import FunctionBackend, FunctionModel
from hedgerow.lifecycle import run
from hedgerow.oip.messages import request_to_proto, response_from_proto
from hedgerow.proto import oip_pb2, oip_pb2_grpc
from hedgerow.server import Server
from hedgerow.tensors import InferRequest, ModelMetadata, TensorSpec, tensor

ECHO, BIG, SLOW, VITALS = "echo", "big", "slow", "vitals"
START_S, STOP_S = 60.0, 60.0
WAIT_S = 60.0
"""For one honest call, also while everything else goes wrong."""

sleepers: list[None] = []

Arrays = Mapping[str, NDArray[Any]]


async def echo(inputs: Arrays) -> Arrays:
    return {"y": inputs["x"]}


async def big(inputs: Arrays) -> Arrays:
    """As many numbers as are asked for."""
    return {"y": np.zeros(int(inputs["x"][0]), np.float32)}


async def slow(inputs: Arrays) -> Arrays:
    """An echo after as many seconds as it says."""
    sleepers.append(None)
    try:
        await asyncio.sleep(float(inputs["x"][0]))
    finally:
        sleepers.pop()
    return {"y": inputs["x"]}


async def vitals(inputs: Arrays) -> Arrays:
    """Tasks, descriptors and resident bytes of the process, and calls that `slow` is working on."""
    held = (len(asyncio.all_tasks()), descriptors(), resident_bytes(), len(sleepers))
    return {"y": np.array(held, np.float32)}


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class Vitals:
    """What a process holds."""

    tasks: int
    descriptors: int
    resident_bytes: int
    sleeping: int
    """Calls that `slow` is working on."""


def message(model: str, *values: float, identity: str = "") -> bytes:
    """A valid request."""
    x = tensor("x", np.array(values or (1.0,), np.float32))
    return request_to_proto(InferRequest(model=model, inputs=(x,), id=identity)).SerializeToString()


@dataclass
class Victim:
    """A server that runs at `address`."""

    address: str
    process: asyncio.subprocess.Process
    told_to_stop: bool = False

    def stop(self) -> None:
        """SIGTERM."""
        self.told_to_stop = True
        self.process.terminate()

    async def vitals(self) -> Vitals:
        return Vitals(*map(int, await self._infer(VITALS)))

    async def serves(self) -> None:
        """Raise unless a new caller is answered, and rightly."""
        assert list(await self._infer(ECHO, 1.0, 2.0, 3.0)) == [1.0, 2.0, 3.0]

    async def recovers(self, before: Vitals, *, tasks: int, descriptors: int, grown_bytes: int) -> None:
        """Wait until the process is back to what it held `before`, but for so much."""
        try:
            async with asyncio.timeout(WAIT_S):
                while True:
                    now = await self.vitals()
                    if (
                        now.tasks <= before.tasks + tasks
                        and now.descriptors <= before.descriptors + descriptors
                        and now.resident_bytes <= before.resident_bytes + grown_bytes
                    ):
                        return
                    await asyncio.sleep(0.1)
        except TimeoutError:
            raise AssertionError(f"it held {before} before, and now {now}") from None

    async def _infer(self, model: str, *values: float) -> NDArray[Any]:
        options = [("grpc.use_local_subchannel_pool", 1)]  # a connection of its own
        async with asyncio.timeout(WAIT_S), grpc.aio.insecure_channel(self.address, options=options) as channel:
            stub: Any = oip_pb2_grpc.GRPCInferenceServiceStub(channel)
            request = oip_pb2.ModelInferRequest.FromString(message(model, *values))
            return response_from_proto(await stub.ModelInfer(request)).output("y")


@asynccontextmanager
async def running(**settings: object) -> AsyncIterator[Victim]:
    """A server with these settings, which must run to the end, unless it was told to stop, and end well.

    Its log goes to our stderr.
    """
    process = await asyncio.create_subprocess_exec(
        sys.executable, __file__, json.dumps(settings), stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    try:
        line = await asyncio.wait_for(process.stdout.readline(), START_S)
        assert line, "the server did not start"
        victim = Victim(line.decode().strip(), process)
        yield victim
        if not victim.told_to_stop:
            assert process.returncode is None, "the server died"
            victim.stop()
        assert await asyncio.wait_for(process.wait(), STOP_S) == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


def model(name: str, function: Any) -> FunctionModel:
    x, y = TensorSpec("x", "FP32", (-1,)), TensorSpec("y", "FP32", (-1,))
    return FunctionModel(ModelMetadata(name, ("1",), "python", (x,), (y,)), function)


async def main(stop: asyncio.Event) -> None:
    settings = msgspec.convert({"port": 0, **json.loads(sys.argv[1])}, ServerSettings)
    models = [model(name, function) for name, function in MODELS.items()]
    async with Server(FunctionBackend(*models), settings) as server:
        sys.stdout.write(server.address + "\n")
        sys.stdout.flush()
        await stop.wait()


MODELS = {ECHO: echo, BIG: big, SLOW: slow, VITALS: vitals}

if __name__ == "__main__":
    sys.exit(run(main))
