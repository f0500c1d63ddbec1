"""The one interface of everything that answers inference.

A model host, a remote endpoint, a batcher, the router: each is a `Backend`, so each can stand in front of any other,
and the gRPC service serves whichever it is given.
"""

import time
from collections.abc import AsyncIterator, Sequence
from typing import Protocol, Self

import msgspec

from hedgerow.errors import DeadlineExceeded
from hedgerow.tensors import InferRequest, InferResponse, ModelMetadata


class Deadline(msgspec.Struct, frozen=True):
    """A point on the monotonic clock, in seconds, after which nobody waits for the answer."""

    at: float

    @classmethod
    def after(cls, seconds: float) -> Self:
        """The deadline `seconds` from now."""
        return cls(time.monotonic() + seconds)

    @classmethod
    def never(cls) -> Self:
        """No deadline."""
        return cls(float("inf"))

    @property
    def remaining(self) -> float:
        """Seconds left, never below zero; infinite if there is no deadline."""
        return max(0.0, self.at - time.monotonic())

    @property
    def expired(self) -> bool:
        """Whether the time is up."""
        return time.monotonic() >= self.at

    def check(self, doing: str) -> None:
        """Raise `DeadlineExceeded` if the time is up; `doing` says what was about to start."""
        if self.expired:
            raise DeadlineExceeded(f"the deadline passed before {doing}")


class Snapshot(msgspec.Struct, frozen=True):
    """What a policy may know of a backend without asking it: never blocks, may be a moment old.

    Latencies are in seconds over recent answers; None while there are none.
    """

    healthy: bool
    inflight: int = 0
    latency_p50_s: float | None = None
    latency_p95_s: float | None = None
    reason: str = ""


class ModelState(msgspec.Struct, frozen=True):
    """One model in one version, as the repository index lists it."""

    name: str
    version: str
    ready: bool
    reason: str = ""


class Backend(Protocol):
    """Answers inference. Methods raise the errors of `hedgerow.errors`."""

    @property
    def name(self) -> str:
        """A short name for logs and explanations."""
        ...

    async def models(self) -> Sequence[ModelState]:
        """What this backend serves or is about to."""
        ...

    async def ready(self, model: str, version: str = "") -> bool:
        """Whether `infer` would be taken now; False for an unknown model."""
        ...

    async def metadata(self, model: str, version: str = "") -> ModelMetadata:
        """The model's interface; raises `ModelNotFound`."""
        ...

    async def infer(self, request: InferRequest, deadline: Deadline) -> InferResponse:
        """The answer. Cancelling the call abandons the work."""
        ...

    def stream(self, request: InferRequest, deadline: Deadline) -> AsyncIterator[InferResponse]:
        """The answers of a request that may have none or several."""
        ...

    def snapshot(self, model: str) -> Snapshot:
        """Health and load now, from memory."""
        ...

    async def close(self) -> None:
        """Let go of everything; idempotent."""
        ...


class Around:
    """A `Backend` that is another one, but for what a subclass does otherwise with requests."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    @property
    def name(self) -> str:
        """See `Backend`."""
        return self._backend.name

    async def models(self) -> Sequence[ModelState]:
        """See `Backend`."""
        return await self._backend.models()

    async def ready(self, model: str, version: str = "") -> bool:
        """See `Backend`."""
        return await self._backend.ready(model, version)

    async def metadata(self, model: str, version: str = "") -> ModelMetadata:
        """See `Backend`."""
        return await self._backend.metadata(model, version)

    async def infer(self, request: InferRequest, deadline: Deadline) -> InferResponse:
        """See `Backend`."""
        return await self._backend.infer(request, deadline)

    def stream(self, request: InferRequest, deadline: Deadline) -> AsyncIterator[InferResponse]:
        """See `Backend`."""
        return self._backend.stream(request, deadline)

    def snapshot(self, model: str) -> Snapshot:
        """See `Backend`."""
        return self._backend.snapshot(model)

    async def close(self) -> None:
        """See `Backend`."""
        await self._backend.close()


class ModelControl(Protocol):
    """Loading and unloading by name, for the backends that allow it (OIP's repository extension)."""

    async def load(self, model: str) -> None:
        """Load or reload `model` from the place it was configured from; raises `ModelNotFound`."""
        ...

    async def unload(self, model: str) -> None:
        """Stop serving `model` once what is in flight has been answered."""
        ...
