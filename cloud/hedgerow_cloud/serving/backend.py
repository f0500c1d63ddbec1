"""The way to the models on Ray Serve, as a Backend.

Requests and answers go over Serve's handle as the objects of `hedgerow.tensors`, pickled; what is over 100 kB travels
through Ray's shared memory.
"""

import asyncio
import contextlib
import logging
import math
from collections.abc import AsyncIterator, Sequence
from typing import Any, Final

from hedgerow.backend import Deadline, ModelState, Snapshot
from hedgerow.errors import BackendUnavailable, DeadlineExceeded, HedgerowError, ModelNotFound, Overloaded
from hedgerow.latency import LatencyWindow
from hedgerow.tensors import InferRequest, InferResponse, ModelMetadata
from hedgerow_cloud.serving.replica import VERSION

PING_INTERVAL_S: Final = 0.5
PING_TIMEOUT_S: Final = 3.0
"""How long a replica may be silent before callers are told that there is none."""
RETRY_AFTER_S: Final = 1.0

log = logging.getLogger(__name__)


class RayServeBackend:
    """A `Backend` over the handle of a deployment of `Replica`. Belongs to one event loop.

    While `watch` runs it knows whether a replica answers: when none does, requests in flight and new ones fail as
    unavailable at once. (Serve itself would let them wait for a replica to come back.)
    """

    def __init__(self, handle: Any, *, name: str = "ray-serve") -> None:
        self._handle = handle
        self._name = name
        self._metadata: dict[str, ModelMetadata] = {}
        self._latencies = {"": LatencyWindow()}
        """By model, and of all."""
        self._lost = "not connected yet"
        self._look = asyncio.Event()
        self._waits: set[asyncio.Timeout] = set()

    @property
    def name(self) -> str:
        """See `Backend`."""
        return self._name

    async def connect(self) -> None:
        """Ask a replica what it serves; raises `BackendUnavailable`."""
        await self._ping()
        if self._lost:
            raise BackendUnavailable(f"the models on Ray Serve do not answer: {self._lost}")

    async def watch(self) -> None:
        """Look after the replicas until cancelled."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(PING_INTERVAL_S):
                    await self._look.wait()
            self._look.clear()
            await self._ping()

    async def models(self) -> Sequence[ModelState]:
        """See `Backend`."""
        return tuple(ModelState(name, VERSION, ready=not self._lost, reason=self._lost) for name in self._metadata)

    async def ready(self, model: str, version: str = "") -> bool:
        """See `Backend`."""
        return not self._lost and model in self._metadata and version in {"", VERSION}

    async def metadata(self, model: str, version: str = "") -> ModelMetadata:
        """See `Backend`. `properties` say the file's sha256."""
        metadata = self._metadata.get(model)
        if metadata is None:
            raise ModelNotFound(f"there is no model {model!r} here")
        if version not in {"", VERSION}:
            raise ModelNotFound(f"there is no version {version!r} of {model} here; {VERSION} is serving")
        return metadata

    async def infer(self, request: InferRequest, deadline: Deadline) -> InferResponse:
        """See `Backend`."""
        await self.metadata(request.model, request.version)
        if self._lost:
            raise self._unavailable()
        deadline.check("the request was sent to a replica")
        timeout_s = None if math.isinf(deadline.at) else deadline.remaining
        started = asyncio.get_running_loop().time()
        answer: InferResponse = await self._call("infer", request, timeout_s, timeout_s=timeout_s)
        for model in ("", request.model):
            self._latencies[model].add(asyncio.get_running_loop().time() - started)
        return answer

    async def stream(self, request: InferRequest, deadline: Deadline) -> AsyncIterator[InferResponse]:
        """See `Backend`: models in files give one answer a request."""
        yield await self.infer(request, deadline)

    def snapshot(self, model: str) -> Snapshot:
        """See `Backend`; of all models where none is named."""
        if model and model not in self._metadata:
            return Snapshot(healthy=False, reason="no such model")
        latency = self._latencies[model]
        return Snapshot(
            healthy=not self._lost,
            inflight=len(self._waits),
            latency_p50_s=latency.quantile(0.5),
            latency_p95_s=latency.quantile(0.95),
            reason=self._lost,
        )

    async def close(self) -> None:
        """See `Backend`. The deployment stays: it is `deployed`'s to take down."""
        self._lose("closed")

    async def _call(self, method: str, *arguments: Any, timeout_s: float | None) -> Any:
        """What `method` of a replica returns, with everything that can go wrong on the way as errors of ours."""
        from ray.exceptions import RayActorError, RayError, RayTaskError, TaskCancelledError
        from ray.serve.exceptions import BackPressureError, RayServeException

        response = getattr(self._handle, method).remote(*arguments)
        try:
            async with asyncio.timeout(timeout_s) as wait:
                self._waits.add(wait)
                try:
                    return await response
                finally:
                    self._waits.discard(wait)
        except TimeoutError:
            response.cancel()
            if self._lost and method == "infer":
                raise self._unavailable() from None
            raise DeadlineExceeded("the deadline passed before the model had answered") from None
        except asyncio.CancelledError:
            response.cancel()
            raise
        except BackPressureError as error:
            raise Overloaded("all replicas are busy", retry_after_s=RETRY_AFTER_S) from error
        except RayTaskError as error:
            raise error.cause from None
        except (RayActorError, TaskCancelledError) as error:
            self._lose(f"a replica is gone ({type(error).__name__})")
            self._look.set()  # another one may answer: the watch finds out at once
            raise self._unavailable() from error
        except (RayError, RayServeException) as error:
            raise BackendUnavailable(
                f"Ray Serve failed: {type(error).__name__}", retry_after_s=RETRY_AFTER_S
            ) from error

    async def _ping(self) -> None:
        try:
            interfaces = await self._call("interfaces", timeout_s=PING_TIMEOUT_S)
        except DeadlineExceeded:
            self._lose(f"no replica has answered for {PING_TIMEOUT_S:g} s")
            return
        except HedgerowError as error:
            self._lose(str(error))
            return
        self._metadata = {metadata.name: metadata for metadata in interfaces}
        for name in self._metadata:
            self._latencies.setdefault(name, LatencyWindow())
        if self._lost and self._metadata:
            log.info("%s: a replica answers", self._name)
        self._lost = ""

    def _lose(self, reason: str) -> None:
        """No replica answers any more: let go of those who wait."""
        if not self._lost:
            log.warning("%s: %s", self._name, reason)
        self._lost = reason
        now = asyncio.get_running_loop().time()
        for wait in self._waits:
            if not wait.expired():
                wait.reschedule(now)

    def _unavailable(self) -> BackendUnavailable:
        return BackendUnavailable(f"no model server is available: {self._lost}", retry_after_s=RETRY_AFTER_S)
