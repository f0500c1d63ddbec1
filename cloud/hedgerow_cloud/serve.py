"""Large models on Ray Serve, behind the Open Inference Protocol.

Each replica is a process of Ray Serve with a `ModelHost` in it; `RayServeBackend` is the way there, so what callers
meet is the same `Server` as on a device, with the same statuses. Requests and answers go over Serve's handle as the
objects of `hedgerow.tensors`, pickled; what is over 100 kB travels through Ray's shared memory.
"""

import asyncio
import contextlib
import logging
import math
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec

from hedgerow.backend import Deadline, ModelState, Snapshot
from hedgerow.config import Count, ServerSettings, Settings
from hedgerow.errors import (
    BackendUnavailable,
    ConfigError,
    DeadlineExceeded,
    HedgerowError,
    ModelNotFound,
    Overloaded,
)
from hedgerow.host.model_host import HostSettings, ModelFile, ModelHost
from hedgerow.lifecycle import supervise
from hedgerow.remote.latency import LatencyWindow
from hedgerow.service import Server
from hedgerow.tensors import InferRequest, InferResponse, ModelMetadata
from hedgerow_cloud.cluster import local_ray

VERSION: Final = "1"
"""Large models are served in one version; which file that is, the metadata's sha256 says."""
PING_INTERVAL_S: Final = 0.5
PING_TIMEOUT_S: Final = 3.0
"""How long a replica may be silent before callers are told that there is none."""
RETRY_AFTER_S: Final = 1.0
MAX_ONGOING: Final = 256
"""Requests in one replica, waiting ones included; its host refuses more than it wants itself."""
MAX_QUEUED: Final = 64
"""Requests that wait on this side for a replica to take them."""
START_ATTEMPTS: Final = 1
HEALTH_CHECK_S: Final = 1.0
SHUTDOWN_POLL_S: Final = 0.2
_APP: Final = "hedgerow"

log = logging.getLogger(__name__)


class ServeSettings(Settings, frozen=True, kw_only=True):
    """The large models: `hedgerow-cloud serve --config FILE`."""

    models: dict[str, str]
    """Files by the name they are served under; relative to the folder of the settings."""
    server: ServerSettings = ServerSettings(port=8003)
    replicas: Count = 1
    host: HostSettings = HostSettings()
    """How each replica runs its models."""


async def serve(settings: ServeSettings, base: Path, stop: asyncio.Event) -> None:
    """Serve the models of `settings` until `stop` is set. Relative paths begin at `base`.

    Raises `ConfigError` naming a file that is not there.
    """
    settings = _located(settings, base)
    with local_ray():
        async with deployed(settings) as backend, Server(backend, settings.server, name="hedgerow-cloud") as server:
            log.info("serving %s on %s", ", ".join(settings.models), server.address)
            await supervise(stop, watch=backend.watch())
            log.info("stopping")


@contextlib.asynccontextmanager
async def deployed(settings: ServeSettings) -> AsyncIterator["RayServeBackend"]:
    """The models of `settings` on Ray Serve, in the Ray that runs, for the length of an ``async with``."""
    from ray import serve as ray_serve

    logging.getLogger("ray.serve").setLevel(logging.ERROR)  # what matters of it, we say ourselves
    application = ray_serve.deployment(
        name="models",
        num_replicas=settings.replicas,
        max_ongoing_requests=MAX_ONGOING,
        max_queued_requests=MAX_QUEUED,
        max_constructor_retry_count=START_ATTEMPTS,
        health_check_period_s=HEALTH_CHECK_S,
        graceful_shutdown_timeout_s=settings.server.drain_s,
        graceful_shutdown_wait_loop_s=SHUTDOWN_POLL_S,
        user_config={"models": settings.models, "host": msgspec.to_builtins(settings.host)},
    )(Replica).bind()
    ray_serve.start(proxy_location="Disabled")
    try:
        try:
            handle = await asyncio.to_thread(ray_serve.run, application, name=_APP, route_prefix=None)
        except RuntimeError as error:
            reason = await asyncio.to_thread(_reason, error)
            raise HedgerowError(f"the models do not start on Ray Serve: {reason}") from error
        backend = RayServeBackend(handle)
        await backend.connect()
        yield backend
    finally:
        await asyncio.to_thread(ray_serve.shutdown)


class Replica:
    """What runs in a process of Ray Serve: a `ModelHost`, and its methods for the handle."""

    def __init__(self) -> None:
        self._host: ModelHost | None = None

    async def reconfigure(self, config: dict[str, Any]) -> None:
        """Load the models of `config`; called by Serve before the first request, and again for new ones."""
        host = self._host or ModelHost(msgspec.convert(config["host"], HostSettings), name="replica")
        for name, path in config["models"].items():
            await host.load_file(ModelFile(name, VERSION, Path(path)))
        self._host = host

    async def interfaces(self) -> tuple[ModelMetadata, ...]:
        """The metadata of all models, and a sign of life."""
        host = self._loaded()
        return tuple([await host.metadata(state.name) for state in await host.models()])

    async def infer(self, request: InferRequest, timeout_s: float | None) -> InferResponse:
        """The answer; `timeout_s` is what is left of the deadline, since clocks differ between machines."""
        deadline = Deadline.never() if timeout_s is None else Deadline.after(timeout_s)
        return await self._loaded().infer(request, deadline)

    def _loaded(self) -> ModelHost:
        assert self._host is not None, "Serve calls reconfigure first"
        return self._host


class RayServeBackend:
    """A `Backend` over the handle of a deployment of `Replica`. Belongs to one event loop.

    While `watch` runs it knows whether a replica answers: when none does, requests in flight and new ones fail as
    unavailable at once. (Serve itself would let them wait for a replica to come back.)
    """

    def __init__(self, handle: Any, *, name: str = "ray-serve") -> None:
        self._handle = handle
        self._name = name
        self._metadata: dict[str, ModelMetadata] = {}
        self._latencies: dict[str, LatencyWindow] = {}
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
        self._latencies[request.model].add(asyncio.get_running_loop().time() - started)
        return answer

    async def stream(self, request: InferRequest, deadline: Deadline) -> AsyncIterator[InferResponse]:
        """See `Backend`: models in files give one answer a request."""
        yield await self.infer(request, deadline)

    def snapshot(self, model: str) -> Snapshot:
        """See `Backend`."""
        if model not in self._metadata:
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


def _located(settings: ServeSettings, base: Path) -> ServeSettings:
    """The settings with the models' files as replicas find them, whatever folder they run in."""
    if not settings.models:
        raise ConfigError("models: name at least one model and its file")
    files = {name: (base / path).resolve() for name, path in settings.models.items()}
    for name, file in files.items():
        if not file.is_file():
            raise ConfigError(f"models.{name}: there is no file {file}")
    return msgspec.structs.replace(settings, models={name: str(file) for name, file in files.items()})


def _reason(error: Exception) -> str:
    """Why a deployment failed: the last line of the replica's traceback, which Serve keeps in its status."""
    from ray import serve as ray_serve

    statuses = ray_serve.status().applications.values()
    told = [deployment.message for status in statuses for deployment in status.deployments.values()]
    lines = "\n".join([str(error), *told]).strip().splitlines()
    return lines[-1] if lines else type(error).__name__
