"""Python functions as models: a Backend for tests, for glue, and for embedding Hedgerow where there is no model file.

::

    def double(inputs):
        return {"y": inputs["x"] * 2}

    spec = ModelMetadata(
        "double", ("1",), "python", (TensorSpec("x", "FP32", (-1,)),), (TensorSpec("y", "FP32", (-1,)),)
    )
    backend = FunctionBackend(FunctionModel(spec, double))
"""

import asyncio
import inspect
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from numpy.typing import NDArray

from hedgerow.backend import Deadline, ModelState, Snapshot
from hedgerow.errors import EngineFault, HedgerowError, ModelNotFound, ModelNotReady, Unsupported
from hedgerow.lifecycle import InFlight
from hedgerow.tensors import InferRequest, InferResponse, ModelMetadata, Tensor, check_request, numpy_dtype

Arrays = Mapping[str, NDArray[Any]]
"""Arrays by tensor name."""


@dataclass(frozen=True, slots=True)
class FunctionModel:
    """A function with the interface it promises.

    `function` takes the input arrays by name and gives the output arrays by name. A plain function runs in a thread; an
    ``async def`` on the event loop; an async generator gives several answers, or none, and can only be streamed.
    Large outputs that are read-only are sent from where they lie, later: nothing may write to that memory any more.
    """

    metadata: ModelMetadata
    function: Callable[[dict[str, NDArray[Any]]], Any]


@dataclass(slots=True)
class _Entry:
    model: FunctionModel
    ready: bool = True
    inflight: InFlight = field(default_factory=InFlight)


class FunctionBackend:
    """Serves `models`, each in the last of its declared versions. Loading and unloading switch one on and off."""

    def __init__(self, *models: FunctionModel, name: str = "function") -> None:
        self._name = name
        self._entries = {model.metadata.name: _Entry(model) for model in models}

    @property
    def name(self) -> str:
        """A short name for logs and explanations."""
        return self._name

    async def models(self) -> Sequence[ModelState]:
        """Every model, also while it is unloaded."""
        return [
            ModelState(name, _version(entry.model), entry.ready, "" if entry.ready else "unloaded")
            for name, entry in self._entries.items()
        ]

    async def ready(self, model: str, version: str = "") -> bool:
        """Whether `infer` would be taken now; False for an unknown model."""
        entry = self._entries.get(model)
        return entry is not None and entry.ready and version in {"", _version(entry.model)}

    async def metadata(self, model: str, version: str = "") -> ModelMetadata:
        """The interface that was declared; raises `ModelNotFound`."""
        return self._entry(model, version).model.metadata

    async def infer(self, request: InferRequest, deadline: Deadline) -> InferResponse:
        """The function's answer; raises `EngineFault` if it fails or does not keep to its interface."""
        if inspect.isasyncgenfunction(self._entry(request.model, request.version).model.function):
            raise Unsupported(f"model {request.model} gives several answers: call it through a stream")
        async with aclosing(self.stream(request, deadline)) as responses:
            async for response in responses:
                return response
        raise EngineFault(f"model {request.model} gave no answer")

    async def stream(self, request: InferRequest, deadline: Deadline) -> AsyncGenerator[InferResponse, None]:
        """The function's answers."""
        entry = self._entry(request.model, request.version)
        if not entry.ready:
            raise ModelNotReady(f"model {request.model} is unloaded")
        check_request(request, entry.model.metadata)
        deadline.check("the function was called")
        with entry.inflight:
            try:
                async with aclosing(_call(entry.model.function, {t.name: t.array for t in request.inputs})) as answers:
                    async for outputs in answers:
                        yield _response(entry.model, request, outputs)
            except HedgerowError:
                raise
            except Exception as error:
                raise EngineFault(f"model {request.model} failed with {type(error).__name__}") from error

    def snapshot(self, model: str) -> Snapshot:
        """Health and load now."""
        entry = self._entries.get(model)
        if entry is None:
            return Snapshot(healthy=False, reason="unknown model")
        return Snapshot(entry.ready, entry.inflight.count, reason="" if entry.ready else "unloaded")

    async def load(self, model: str) -> None:
        """Serve `model` again; raises `ModelNotFound`."""
        self._entry(model).ready = True

    async def unload(self, model: str) -> None:
        """Stop serving `model` once what is in flight has been answered."""
        entry = self._entry(model)
        entry.ready = False
        await entry.inflight.idle()

    async def close(self) -> None:
        """Nothing to let go of."""

    def _entry(self, model: str, version: str = "") -> _Entry:
        entry = self._entries.get(model)
        if entry is None:
            raise ModelNotFound(f"there is no model {model!r}")
        if version not in {"", _version(entry.model)}:
            raise ModelNotFound(f"model {model!r} is here in version {_version(entry.model)}, not {version!r}")
        return entry


def _version(model: FunctionModel) -> str:
    return model.metadata.versions[-1] if model.metadata.versions else ""


async def _call(
    function: Callable[[dict[str, NDArray[Any]]], Any], inputs: dict[str, NDArray[Any]]
) -> AsyncGenerator[Arrays, None]:
    if inspect.isasyncgenfunction(function):
        async for outputs in function(inputs):
            yield outputs
    elif inspect.iscoroutinefunction(function):
        yield await function(inputs)
    else:
        yield await asyncio.to_thread(function, inputs)


def _response(model: FunctionModel, request: InferRequest, outputs: Arrays) -> InferResponse:
    specs = {spec.name: spec for spec in model.metadata.outputs}
    tensors = []
    for name in request.outputs or specs:
        spec, array = specs[name], outputs.get(name)
        if array is None or array.dtype != numpy_dtype(spec.datatype):
            got = "nothing" if array is None else str(array.dtype)
            raise EngineFault(f"model {request.model}, output {name!r}: expected {spec.datatype}, got {got}")
        tensors.append(Tensor(name, spec.datatype, array))
    return InferResponse(model=request.model, version=_version(model), outputs=tuple(tensors), id=request.id)
