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
from collections.abc import AsyncIterator, Sequence
from functools import partial

from hedgerow.backend import Deadline, ModelState, Snapshot
from hedgerow.errors import ModelNotFound, ModelNotReady
from hedgerow.host.batch import Runnable
from hedgerow.host.batching import Batcher
from hedgerow.host.loading import Loader
from hedgerow.host.room import ROOM_RETRY_S, leaving
from hedgerow.host.settings import HostSettings, ModelFile
from hedgerow.statistics import BatchCounts
from hedgerow.tensors import InferRequest, InferResponse, ModelMetadata

log = logging.getLogger(__name__)


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
        self._loader = Loader(self.settings, name, self._make_room)
        self._closed = False
        self._serving: dict[str, Staged] = {}
        self._files: dict[str, ModelFile] = {}
        self._staged: set[Staged] = set()
        self._left: set[Staged] = set()
        self._evicted: dict[str, ModelMetadata] = {}
        self._reloads: dict[str, asyncio.Future[Runnable]] = {}
        self._uses = 0

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
        return self._loader.hung

    @property
    def memory_bytes(self) -> int:
        """What all open models are taken to need."""
        return self._loader.memory_bytes

    async def stage(self, file: ModelFile) -> Staged:
        """`file`, open and warm beside what serves; nothing is served from it yet.

        Raises what `loading.open_model` does, `EngineFault` if that takes longer than `load_timeout_s`, and
        `ModelNotReady` if there is no room for it or too many hang. Ends in `activate` or `discard`.
        """
        future, memory_bytes = self._loader.open(file)
        try:
            model = await asyncio.shield(future)
        except asyncio.CancelledError:
            future.add_done_callback(partial(self._loader.abandon, memory_bytes))
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
        self._loader.memory_bytes -= staged.memory_bytes

        def closed(_: object = None) -> None:
            self._left.discard(staged)
            staged.closed.set()

        if self._closed:  # it was still in use then, and nobody waits any more
            model.close()
            closed()
        else:
            self._loader.close(model).add_done_callback(closed)

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

    def _make_room(self, file: ModelFile, memory_bytes: int) -> None:
        """Unload what was used longest ago until `file` fits, or raise `ModelNotReady`."""
        for oldest in leaving(
            file,
            memory_bytes,
            self._serving.values(),
            taken_bytes=self.memory_bytes,
            budget_bytes=self.settings.memory_budget_bytes,
        ):
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
            loading, memory_bytes = self._loader.open(file)
            self._reloads[model] = loading
            loading.add_done_callback(partial(self._came_back, file, memory_bytes))
        too_late = ModelNotReady(f"model {model} is being loaded again", retry_after_s=ROOM_RETRY_S)
        if deadline.remaining < self._loader.load_s.get(model, 0.0):
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
