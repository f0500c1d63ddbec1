"""A cloud of our own: a real gRPC server with a classifier whose every move a test decides.

In the test's process as `Cloud`; or in a process of its own that can be killed and stopped.
"""

import asyncio
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from hedgerow.config import ServerSettings
from hedgerow.function import FunctionBackend, FunctionModel
from hedgerow.remote.settings import RemoteSettings
from hedgerow.server import Server
from hedgerow.tensors import ModelMetadata, TensorSpec

MODEL = "digits-large"
SHARPNESS = 20.0
"""The winning logit: the cloud is always sure."""
START_S = 90.0
LONG_S = 60.0
SETTINGS = RemoteSettings(
    connect_timeout_s=5,
    probe_timeout_s=5,
    probe_min_s=0.02,
    probe_max_s=0.1,
    heartbeat_s=0.2,
    timeout_s=LONG_S,
    retry_share=1.0,
    retry_burst=1000,
    zone="near",
)
"""For a remote that a test has go and come back."""


class Cloud:
    """Serves `MODEL`: its answer for class k is class k, or class k + 1 where it `contradicts`."""

    def __init__(self, *, port: int = 0, sha256: str = "", host: str = "127.0.0.1") -> None:
        self.host = host
        self.port = port
        self.sha256 = sha256
        self.delay_s = 0.0
        self.contradicts = False
        self.raises: list[Exception] = []
        """Raised one by one in place of answers."""
        self.asked = 0
        self.given_up = 0
        self.asking = asyncio.Event()
        self.on_asked: Callable[[], object] = lambda: None
        """Called with each request."""
        self._server: Server | None = None

    @property
    def target(self) -> str:
        return f"{self.host}:{self.port}"

    async def __aenter__(self) -> Self:
        properties = {"sha256": self.sha256} if self.sha256 else {}
        metadata = ModelMetadata(
            MODEL,
            ("2031",),
            "python",
            (TensorSpec("pixels", "FP32", (-1, 64)),),
            (TensorSpec("logits", "FP32", (-1, 10)), TensorSpec("label", "INT64", (-1,))),
            properties,
        )
        # Almost nothing is drained: leaving is as abrupt as a crash to whoever is being answered.
        settings = ServerSettings(host=self.host, port=self.port, drain_s=0.001)
        self._server = Server(FunctionBackend(FunctionModel(metadata, self._answer), name="cloud"), settings)
        self.port = await self._server.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        await self._server.stop()

    async def _answer(self, inputs: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        self.asked += 1
        self.asking.set()
        self.on_asked()
        try:
            await asyncio.sleep(self.delay_s)
        except asyncio.CancelledError:
            self.given_up += 1
            raise
        if self.raises:
            raise self.raises.pop(0)
        labels = (inputs["pixels"].argmax(axis=1) + int(self.contradicts)) % 10
        return {"logits": (SHARPNESS * np.eye(10)[labels]).astype(np.float32), "label": labels.astype(np.int64)}


@asynccontextmanager
async def in_process_of_its_own(
    delay_s: float = 0.0, *, port: int = 0
) -> AsyncIterator[tuple[asyncio.subprocess.Process, str]]:
    """The process, and its target. It writes a line to its output for each request that it begins to work on."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, Path(__file__), str(port), str(delay_s), stdout=asyncio.subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        line = await asyncio.wait_for(process.stdout.readline(), START_S)
        yield process, line.decode().strip()
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def _serve(port: int, delay_s: float) -> None:
    async with Cloud(port=port) as cloud:
        cloud.delay_s = delay_s
        cloud.on_asked = lambda: print("asked", flush=True)  # noqa: T201 (for the parent)
        print(cloud.target, flush=True)  # noqa: T201 (for the parent)
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(_serve(int(sys.argv[1]), float(sys.argv[2])))
