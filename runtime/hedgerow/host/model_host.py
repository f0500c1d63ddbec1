"""The host: the backend that owns engines. Loads, warms, swaps and drains models, each with threads of its own.

A model's life: `stage` opens and warms it beside what serves; `activate` makes it the one that answers, in one step;
what runs then finishes on the one it started on, which is closed after the last of them, and what waits is answered by
the new one. Requests are queued and put together in `batching`, model by model, so that one which hangs or is
slow keeps no other from answering. Nor does one that hangs while it is loaded or closed keep others from that, as long
as its engine lets other Python threads run; against the rest, and against crashes, there is `isolation`.
"""

import asyncio
import logging
import math
import os
import time
from collections.abc import AsyncIterator, Sequence
from functools import partial
from typing import Annotated

import msgspec

from hedgerow.backend import Deadline, ModelState, Snapshot
from hedgerow.config import Count, Seconds, Settings
from hedgerow.errors import EngineFault, ModelNotFound, ModelNotReady
from hedgerow.host.batch import Runnable
from hedgerow.host.batching import Batcher
from hedgerow.host.loading import ModelFile, file_bytes, open_model
from hedgerow.host.scheduling import BatchSettings
from hedgerow.host.workers import Abandoning
from hedgerow.isolation.session import IsolationSettings
from hedgerow.statistics import BatchCounts
from hedgerow.tensors import InferRequest, InferResponse, ModelMetadata

__all__ = ["BatchSettings", "HostSettings", "ModelFile", "ModelHost", "Staged"]

MEMORY_FACTOR = 1.5
"""Memory that an open model takes, as a multiple of its file: the weights, often once more in the layout of the
kernels, and what is between the layers."""
ROOM_RETRY_S = 1.0
"""When to ask again for a model that is being loaded, or that there is no room for."""

log = logging.getLogger(__name__)


class HostSettings(Settings, frozen=True, kw_only=True):
    """How models are run on this machine."""

    workers: Count = 2
    """Batches of one model that run at the same time."""
    engine_threads: Annotated[int, msgspec.Meta(ge=0)] = 0
    """Threads that an engine uses for one batch; 0: the machine's cores shared among the workers."""
    queue_size: Count = 512
    """Requests for one model that wait for a worker; more are refused."""
    batching: BatchSettings = BatchSettings()
    models: dict[str, BatchSettings] = msgspec.field(default_factory=dict)
    """By model, in place of `batching`."""
    isolation: dict[str, IsolationSettings] = msgspec.field(default_factory=dict)
    """Models that run in a process of their own, by name."""
    drain_s: Seconds = 10.0
    """How long requests in flight may take when their model is replaced or unloaded or the host closed. What takes
    longer is left to end by itself."""
    loaders: Count = 4
    """Models that are loaded or closed at the same time."""
    load_timeout_s: Seconds = 300.0
    """Of loading a model, checksum and warming included, or closing it. After that it is given up, and what it has
    taken of this process is lost until it comes back."""
    max_hung_loads: Count = 4
    """Models that were given up and have not come back. With so many, no more are loaded in this process."""
    memory_budget_bytes: Annotated[int, msgspec.Meta(ge=0)] = 0
    """What all open models together may take; 0: no limit. See `MEMORY_FACTOR`. Leave room for a swap, during which a
    model is open twice."""

    def batch_settings(self, model: str) -> BatchSettings:
        """Those of `model`, with real `instances` and `queue_size`."""
        settings = self.models.get(model, self.batching)
        if model in self.isolation:  # the event loop must not wait for a process that may hang
            settings = msgspec.structs.replace(settings, inline_below_s=0.0)
        return msgspec.structs.replace(
            settings, instances=settings.instances or self.workers, queue_size=settings.queue_size or self.queue_size
        )


class Staged:
    """A model that is open and warm. Made by `ModelHost.stage`."""

    def __init__(self, file: ModelFile, model: Runnable, host: "ModelHost", memory_bytes: int) -> None:
        self.file = file
        self.metadata = model.metadata
        self.batcher = Batcher(model, host.settings.batch_settings(file.model))
        self.memory_bytes = memory_bytes
        """What it is taken to need."""
        self.used = 0
        """The larger, the more recently."""
        self.closed = asyncio.Event()
        self._model = model
        self._host = host

    @property
    def answers(self) -> int:
        """Requests that it has answered."""
        return self.batcher.answers

    @property
    def faults(self) -> int:
        """Requests that it has crashed on, hung on, or answered with nonsense."""
        return self.batcher.faults

    @property
    def users(self) -> int:
        """Requests that wait for it or run."""
        return self.batcher.inflight

    async def infer(self, request: InferRequest, deadline: Deadline) -> InferResponse:
        """The answer of this very model, whatever the host serves meanwhile."""
        return await self.batcher.infer(request, deadline, bound=True)

    def retire(self) -> None:
        """Take no more requests, and close once the last one is done."""
        self.batcher.retire(self._close)

    def _close(self) -> None:
        self.batcher.close()
        self._host.let_go(self, self._model)


class ModelHost:
    """A `Backend` and `ModelControl` over model files on this machine. Belongs to one event loop."""

    def __init__(self, settings: HostSettings | None = None, *, name: str = "edge") -> None:
        self.settings = settings or HostSettings()
        self._name = name
        self._loader = Abandoning(self.settings.loaders, self.settings.load_timeout_s, f"{name}-loader")
        self._closing: set[asyncio.Future[None]] = set()
        self._closed = False
        self._serving: dict[str, Staged] = {}
        self._files: dict[str, ModelFile] = {}
        self._staged: set[Staged] = set()
        self._left: set[Staged] = set()
        self._evicted: dict[str, ModelMetadata] = {}
        self._reloads: dict[str, asyncio.Future[Runnable]] = {}
        self._load_s: dict[str, float] = {}
        self._uses = 0
        self.memory_bytes = 0
        """What all open models are taken to need."""

    @property
    def name(self) -> str:
        """See `Backend`."""
        return self._name

    @property
    def left_running(self) -> int:
        """Models that were let go but still run something after `drain_s`: those that hang, above all."""
        return len(self._left)

    @property
    def hung_loads(self) -> int:
        """Models that hang in being loaded or closed: given up after `load_timeout_s` and not back yet."""
        return self._loader.abandoned

    async def stage(self, file: ModelFile) -> Staged:
        """`file`, open and warm beside what serves; nothing is served from it yet.

        Raises what `loading.open_model` does, `EngineFault` if that takes longer than `load_timeout_s`, and
        `ModelNotReady` if there is no room for it or too many hang. Ends in `activate` or `discard`.
        """
        future, memory_bytes = self._open(file)
        try:
            model = await asyncio.shield(future)
        except asyncio.CancelledError:
            future.add_done_callback(partial(self._close_abandoned, memory_bytes))
            raise
        staged = Staged(file, model, self, memory_bytes)
        self._staged.add(staged)
        return staged

    async def activate(self, staged: Staged) -> None:
        """Answer from `staged` from now on, also those who wait for the one before.

        Returns when that one has answered what it runs and is closed, or after `drain_s`.
        """
        self._staged.discard(staged)
        model = staged.file.model
        old = self._serving.get(model)
        self._serve(staged)
        if old is not None and old is not staged:
            staged.batcher.adopt(old.batcher.hand_over())
            await self._drain([old])

    async def discard(self, staged: Staged) -> None:
        """Let go of `staged`, which was not activated."""
        self._staged.discard(staged)
        await self._drain([staged])

    async def load_file(self, file: ModelFile) -> None:
        """`stage` and `activate`."""
        await self.activate(await self.stage(file))

    async def load(self, model: str) -> None:
        """See `ModelControl`: the file that served last, read again."""
        if model not in self._files:
            raise ModelNotFound(f"there is no model {model!r} here to load")
        await self.load_file(self._files[model])

    async def unload(self, model: str) -> None:
        """See `ModelControl`."""
        staged = self._serving.pop(model, None)
        if staged is None and self._evicted.pop(model, None) is None:
            raise ModelNotFound(f"there is no model {model!r} here to unload")
        if staged is not None:
            await self._drain([staged])

    def serving(self, model: str) -> Staged | None:
        """What answers for `model` now."""
        return self._serving.get(model)

    def counts(self, model: str) -> BatchCounts | None:
        """What was run of the version that serves `model` now; None if none does."""
        staged = self._serving.get(model)
        return None if staged is None else staged.batcher.counts

    def let_go(self, staged: Staged, model: Runnable) -> None:
        """Free the `model` of `staged`, which runs nothing any more, off the event loop."""
        self.memory_bytes -= staged.memory_bytes

        def closed(_: object = None) -> None:
            self._left.discard(staged)
            staged.closed.set()

        if self._closed:  # it was still in use then, and nobody waits any more
            model.close()
            closed()
        else:
            self._close(model).add_done_callback(closed)

    async def models(self) -> Sequence[ModelState]:
        """See `Backend`."""
        return tuple(
            ModelState(model, file.version, ready=self._ready(model), reason=self.snapshot(model).reason)
            for model, file in self._files.items()
        )

    async def ready(self, model: str, version: str = "") -> bool:
        """See `Backend`. A model that was unloaded to make room for another one is: it comes back when it is asked."""
        return self._ready(model) and version in {"", self._files[model].version}

    async def metadata(self, model: str, version: str = "") -> ModelMetadata:
        """See `Backend`. `properties` say the file's `sha256`, its `engine` and, where known, `precision` and `labels`.

        The labels are joined by commas.
        """
        staged = self._serving.get(model)
        metadata = self._evicted.get(model) if staged is None else staged.metadata
        if metadata is None or version not in {"", *metadata.versions}:
            raise self._missing(model, version)
        return metadata

    async def infer(self, request: InferRequest, deadline: Deadline) -> InferResponse:
        """See `Backend`."""
        staged = self._serving.get(request.model)
        if staged is None or request.version not in {"", staged.file.version}:
            staged = await self._reloaded(request, deadline)
        self._uses += 1
        staged.used = self._uses
        return await staged.batcher.infer(request, deadline)

    async def stream(self, request: InferRequest, deadline: Deadline) -> AsyncIterator[InferResponse]:
        """See `Backend`: models in files give one answer a request."""
        yield await self.infer(request, deadline)

    def snapshot(self, model: str) -> Snapshot:
        """See `Backend`."""
        staged = self._serving.get(model)
        if staged is None:
            if model in self._evicted:
                return Snapshot(healthy=True, reason="unloaded to make room until it is asked")
            return Snapshot(healthy=False, reason="unloaded" if model in self._files else "no such model")
        return Snapshot(
            healthy=not staged.batcher.stuck,
            inflight=staged.users,
            latency_p50_s=staged.batcher.latency.quantile(0.5),
            latency_p95_s=staged.batcher.latency.quantile(0.95),
            reason="it hangs" if staged.batcher.stuck else "",
        )

    async def close(self) -> None:
        """See `Backend`. Requests in flight are answered first, within `drain_s`."""
        leaving = [*self._serving.values(), *self._staged]
        self._serving.clear()
        self._staged.clear()
        self._evicted.clear()
        await self._drain(leaving)
        for staged in leaving:
            staged.batcher.refuse_waiting("no more requests are taken here: it is closing")
        self._closed = True

    def _ready(self, model: str) -> bool:
        staged = self._serving.get(model)
        return model in self._evicted if staged is None else not staged.batcher.stuck

    def _missing(self, model: str, version: str) -> ModelNotFound | ModelNotReady:
        """Why `model` in `version` cannot be asked."""
        if model in self._serving or model in self._evicted:
            serving = self._files[model].version
            return ModelNotFound(f"there is no version {version!r} of {model} here; {serving} is serving")
        if model in self._files:
            return ModelNotReady(f"model {model} is not loaded")
        wanted = f"version {version!r} of {model!r}" if version else f"model {model!r}"
        return ModelNotFound(f"there is no {wanted} here")

    def _serve(self, staged: Staged) -> None:
        model = staged.file.model
        self._serving[model] = staged
        self._files[model] = staged.file
        self._evicted.pop(model, None)
        self._uses += 1
        staged.used = self._uses

    async def _drain(self, leaving: Sequence[Staged]) -> None:
        """Retire them, and wait until they are closed, at most `drain_s`."""
        for staged in leaving:
            staged.retire()
        try:
            async with asyncio.timeout(self.settings.drain_s):
                for staged in leaving:
                    await staged.closed.wait()
        except TimeoutError:
            left = {staged for staged in leaving if not staged.closed.is_set()}
            self._left |= left
            names = ", ".join(sorted(f"{staged.file.model} {staged.file.version}" for staged in left))
            log.warning(
                "%s: %s still running after %g s and left to end by itself", self._name, names, self.settings.drain_s
            )

    def _open(self, file: ModelFile) -> tuple["asyncio.Future[Runnable]", int]:
        """`file` being opened on a thread, and the memory that was set aside for it."""
        isolation = self.settings.isolation.get(file.model)
        if isolation is None and self.hung_loads >= self.settings.max_hung_loads:
            raise ModelNotReady(
                f"{file.model} is not loaded: {self.hung_loads} models hang in this process while they are loaded or"
                " closed, and until it is started again only isolated ones are loaded"
            )
        settings = self.settings.batch_settings(file.model)
        threads = self.settings.engine_threads or max(1, (os.cpu_count() or 1) // settings.instances)
        memory_bytes = int(MEMORY_FACTOR * file_bytes(file))
        self._make_room(file, memory_bytes)
        started = time.monotonic()
        hangs = EngineFault(
            f"{file.model} {file.version} cannot be loaded: it was not open within {self.settings.load_timeout_s:g} s"
        )

        def late(model: Runnable | None) -> None:
            self.memory_bytes -= memory_bytes
            log.warning("%s: %s %s has come back from being loaded", self._name, file.model, file.version)
            if model is not None:
                self._close(model)

        future = self._loader.submit(
            partial(
                open_model,
                file,
                streams=settings.instances,
                threads=threads,
                batches=settings.max_batch_size > 1,
                isolation=isolation,
            ),
            too_late=hangs,
            late=late,
            # What is unloaded to make room is closed before what needs the room is opened.
            after=tuple(self._closing) if self.settings.memory_budget_bytes else (),
        )
        self.memory_bytes += memory_bytes

        def opened(done: "asyncio.Future[Runnable]") -> None:
            self._load_s[file.model] = time.monotonic() - started
            if done.exception() is hangs:  # it keeps its memory
                log.error("%s: %s", self._name, hangs)
            elif done.exception() is not None:
                self.memory_bytes -= memory_bytes

        future.add_done_callback(opened)
        return future, memory_bytes

    def _close(self, model: Runnable) -> "asyncio.Future[None]":
        """`model` being closed on a thread."""
        name = f"{model.metadata.name} {model.version}"
        future = self._loader.submit(
            model.close, too_late=EngineFault(f"{name} was not closed within {self.settings.load_timeout_s:g} s")
        )
        self._closing.add(future)

        def closed(done: "asyncio.Future[None]") -> None:
            self._closing.discard(done)
            if (error := done.exception()) is not None:
                log.error("%s: closing %s failed: %s", self._name, name, error)

        future.add_done_callback(closed)
        return future

    def _make_room(self, file: ModelFile, memory_bytes: int) -> None:
        """Unload what was used longest ago until `file` fits, or raise `ModelNotReady`."""
        budget_bytes = self.settings.memory_budget_bytes
        missing = self.memory_bytes + memory_bytes - budget_bytes if budget_bytes else 0
        idle = [
            staged
            for staged in self._serving.values()
            if not staged.users and not staged.file.pinned and staged.file.model != file.model
        ]
        if missing > sum(staged.memory_bytes for staged in idle):  # all of them would go for nothing
            raise ModelNotReady(
                f"there is no room for {file.model}: it needs about {memory_bytes} bytes, and"
                f" {self.memory_bytes} of {budget_bytes} are taken by models in use",
                retry_after_s=ROOM_RETRY_S,
            )
        for oldest in sorted(idle, key=lambda staged: staged.used):
            if missing <= 0:
                break
            missing -= oldest.memory_bytes
            log.info("%s: unloading %s to make room for %s", self._name, oldest.file.model, file.model)
            del self._serving[oldest.file.model]
            self._evicted[oldest.file.model] = oldest.metadata
            oldest.retire()

    async def _reloaded(self, request: InferRequest, deadline: Deadline) -> Staged:
        """The model that `request` asks for, loaded again if it was unloaded to make room; once for all who ask.

        The loading goes on if those who ask leave, or they might never wait long enough.
        """
        model = request.model
        metadata = self._evicted.get(model)
        if metadata is None or request.version not in {"", *metadata.versions}:
            raise self._missing(model, request.version)
        loading = self._reloads.get(model)
        if loading is None:
            file = self._files[model]
            loading, memory_bytes = self._open(file)
            self._reloads[model] = loading
            loading.add_done_callback(partial(self._came_back, file, memory_bytes))
        too_late = ModelNotReady(f"model {model} is being loaded again", retry_after_s=ROOM_RETRY_S)
        if deadline.remaining < self._load_s.get(model, 0.0):
            raise too_late
        try:
            async with asyncio.timeout(None if math.isinf(deadline.at) else deadline.remaining):
                await asyncio.shield(loading)
        except TimeoutError:
            raise too_late from None
        staged = self._serving.get(model)
        if staged is None or request.version not in {"", staged.file.version}:
            raise self._missing(model, request.version)
        return staged

    def _came_back(self, file: ModelFile, memory_bytes: int, loading: "asyncio.Future[Runnable]") -> None:
        del self._reloads[file.model]
        if loading.exception() is not None:
            return
        staged = Staged(file, loading.result(), self, memory_bytes)
        if file.model in self._evicted:
            self._serve(staged)
        else:  # it was unloaded or replaced meanwhile
            staged.retire()

    def _close_abandoned(self, memory_bytes: int, opening: "asyncio.Future[Runnable]") -> None:
        if opening.exception() is None:
            self._close(opening.result())
            self.memory_bytes -= memory_bytes
