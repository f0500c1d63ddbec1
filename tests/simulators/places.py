"""Models in places of their own, whose every move a test decides: what a split is over, and a shadow behind."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray
from simulators import models

from hedgerow.backend import Backend, Deadline
from hedgerow.function import FunctionBackend, FunctionModel
from hedgerow.host.model_host import ModelHost
from hedgerow.host.settings import HostSettings, ModelFile
from hedgerow.parameters import STICKY
from hedgerow.remote.backend import RemoteSettings
from hedgerow.tensors import InferRequest, InferResponse, ModelMetadata, Origin, TensorSpec, tensor

PATIENCE_S = 60.0
X, Y = TensorSpec("x", "FP32", (-1,)), TensorSpec("y", "FP32", (-1,))
REMOTE = RemoteSettings(
    connect_timeout_s=5, probe_timeout_s=5, probe_min_s=0.02, probe_max_s=0.1, heartbeat_s=0.2, timeout_s=PATIENCE_S
)
Arrays = Mapping[str, NDArray[Any]]


class Place(FunctionBackend):
    """A backend of one model, `there`, which answers `number`, once it is let; and says what it was asked."""

    def __init__(self, number: float, *, version: str = "1", output: TensorSpec = Y, **properties: str) -> None:
        self.metadata_of = ModelMetadata("there", (version,), f"python-{number:g}", (X,), (output,), properties)
        super().__init__(FunctionModel(self.metadata_of, self._answer), name=f"place-{number:g}")
        self.number = number
        self.asked: list[InferRequest] = []
        self.called = asyncio.Semaphore(0)
        self.let = asyncio.Event()
        self.let.set()
        self.raises: Exception | None = None
        self.silent = False
        self.closed = 0
        self.now = self.most = 0

    async def infer(self, request: InferRequest, deadline: Deadline) -> InferResponse:
        self.asked.append(request)
        self.now += 1
        self.most = max(self.most, self.now)
        try:
            return replace(await super().infer(request, deadline), parameters={"said": self.number})
        finally:
            self.now -= 1

    async def metadata(self, model: str, version: str = "") -> ModelMetadata:
        if self.silent:
            await asyncio.Event().wait()
        return await super().metadata(model, version)

    async def close(self) -> None:
        self.closed += 1

    def becomes(self, **changes: Any) -> None:
        """Serve another version or interface from now on."""
        self.metadata_of = replace(self.metadata_of, **changes)
        self._entries["there"].model = FunctionModel(self.metadata_of, self._answer)

    async def _answer(self, inputs: Arrays) -> dict[str, NDArray[Any]]:
        self.called.release()
        await self.let.wait()
        if self.raises is not None:
            raise self.raises
        return {spec.name: np.array([self.number], np.float32) for spec in self.metadata_of.outputs}


@asynccontextmanager
async def running(*loops: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(loop) for loop in loops]
        yield
        for task in tasks:
            task.cancel()


async def until(condition: Callable[[], object]) -> None:
    """Return when `condition()` gives something true; what is waited for has no event."""
    async with asyncio.timeout(PATIENCE_S):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


def ask(key: str = "", tenant: str = "", **fields: Any) -> InferRequest:
    parameters = {**({STICKY: key} if key else {}), **fields.pop("parameters", {})}
    value = tensor("x", np.ones(1, np.float32))
    return InferRequest(
        **{"model": "m", "inputs": (value,), "parameters": parameters, **fields}, origin=Origin(tenant=tenant)
    )


async def infer(backend: Backend, request: InferRequest) -> InferResponse:
    return await backend.infer(request, Deadline.after(PATIENCE_S))


async def releases(stack: AsyncExitStack, folder: Path) -> ModelHost:
    """A host of three releases of a classifier, digits-7 to digits-9: the third takes each class for the next."""
    host = ModelHost(HostSettings(workers=1))
    stack.push_async_callback(host.close)
    for number, shift in ((7, 0), (8, 0), (9, 1)):
        file = models.classifier(folder / f"{number}.onnx", shift=shift)
        await host.load_file(ModelFile(f"digits-{number}", str(number), file, precision="fp32"))
    return host
