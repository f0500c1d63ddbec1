"""The host: the backend that owns engines. Loads, warms, swaps and drains models, and runs them off the event loop.

A model's life: `stage` opens and warms it beside what serves; `activate` makes it the one that answers, in one step;
requests in flight finish on the one they started on, which is closed after the last of them.
"""

import asyncio
import hashlib
import logging
import os
import time
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from hedgerow import engines
from hedgerow.backend import Deadline, ModelState, Snapshot
from hedgerow.config import Count, Seconds, Settings
from hedgerow.errors import EngineFault, HedgerowError, InvalidRelease, ModelNotFound, ModelNotReady
from hedgerow.latency import LatencyWindow
from hedgerow.tensors import (
    InferRequest,
    InferResponse,
    ModelMetadata,
    Tensor,
    TensorSpec,
    check_request,
    numpy_dtype,
)
from hedgerow.workers import Workers

BFLOAT16_EXPONENT = 0x7F80

log = logging.getLogger(__name__)


class HostSettings(Settings, frozen=True, kw_only=True):
    """How models are run on this machine."""

    workers: Count = 2
    """Requests that run at the same time."""
    engine_threads: Annotated[int, msgspec.Meta(ge=0)] = 0
    """Threads that an engine uses for one request; 0: the machine's cores shared among the workers."""
    queue_size: Count = 128
    """Requests that wait for a worker; more are refused."""
    drain_s: Seconds = 10.0
    """How long requests in flight may take when the host is closed."""


@dataclass(frozen=True, slots=True)
class ModelFile:
    """A file that can answer for `model` in `version`. A given `sha256` must be the file's."""

    model: str
    version: str
    path: Path
    engine: str = "onnxruntime"
    sha256: str = ""
    precision: str = ""
    labels: tuple[str, ...] = ()
    """Names of the classes; none may have a comma in it."""


class Staged:
    """A model that is open and warm. Made by `ModelHost.stage`.

    `answers` and `faults` count what it has answered, and what it has crashed on or answered with nonsense.
    """

    def __init__(self, file: ModelFile, session: engines.Session, metadata: ModelMetadata, host: "ModelHost") -> None:
        self.file = file
        self.metadata = metadata
        self.answers = 0
        self.faults = 0
        self.users = 0
        self.latency = LatencyWindow()
        self.closed = asyncio.Event()
        self._retired = False
        self._closing = False
        self._session = session
        self._host = host

    async def infer(self, request: InferRequest, deadline: Deadline) -> InferResponse:
        """The answer of this very model, whatever the host serves meanwhile."""
        if self._retired:
            raise ModelNotReady(f"{self.file.model} {self.file.version} is being let go")
        check_request(request, self.metadata)
        deadline.check("the model ran")
        self.users += 1
        started = time.monotonic()
        try:
            response = await self._host.workers.run(
                lambda: self._run(request), deadline, self._release, self.latency.quantile(0.5)
            )
        except EngineFault:
            self.faults += 1
            raise
        self.answers += 1
        self.latency.add(time.monotonic() - started)
        return response

    def retire(self) -> None:
        """Take no more requests, and close once the last one is done."""
        self._retired = True
        if not self.users and not self._closing:
            self._closing = True
            self._host.close_session(self._session, self.closed)

    def _release(self) -> None:
        self.users -= 1
        if self._retired:
            self.retire()

    def _run(self, request: InferRequest) -> InferResponse:
        """On a worker's thread."""
        outputs = request.outputs or tuple(spec.name for spec in self.metadata.outputs)
        arrays = self._session.run({given.name: given.array for given in request.inputs}, outputs)
        datatypes = {spec.name: spec.datatype for spec in self.metadata.outputs}
        for name, array in arrays.items():
            # What came in as NaN may go out as NaN: that is the model's answer, not its fault.
            if not _finite(array, datatypes[name]) and all(_finite(t.array, t.datatype) for t in request.inputs):
                raise EngineFault(f"output {name!r} of {self.file.model} {self.file.version} is not finite")
        return InferResponse(
            model=request.model,
            version=self.file.version,
            id=request.id,
            outputs=tuple(Tensor(name, datatypes[name], array) for name, array in arrays.items()),
        )


class ModelHost:
    """A `Backend` and `ModelControl` over model files on this machine. Belongs to one event loop."""

    def __init__(self, settings: HostSettings | None = None, *, name: str = "edge") -> None:
        self.settings = settings or HostSettings()
        self.workers = Workers(self.settings.workers, self.settings.queue_size, f"{name}-engine")
        self._name = name
        # One at a time, and not on the workers: loading must not take a thread away from those who are being answered.
        self._loader = ThreadPoolExecutor(1, thread_name_prefix=f"{name}-loader")
        self._serving: dict[str, Staged] = {}
        self._files: dict[str, ModelFile] = {}
        self._staged: set[Staged] = set()

    @property
    def name(self) -> str:
        """See `Backend`."""
        return self._name

    async def stage(self, file: ModelFile) -> Staged:
        """`file`, open and warm beside what serves; nothing is served from it yet.

        Raises `MissingExtra` for an engine that is not installed, `InvalidRelease` if the file is not the one meant,
        and `EngineFault` if the engine cannot run it. Ends in `activate` or `discard`.
        """
        future = asyncio.get_running_loop().run_in_executor(self._loader, self._open, file)
        try:
            session, metadata = await asyncio.shield(future)
        except asyncio.CancelledError:
            future.add_done_callback(_close_abandoned)
            raise
        staged = Staged(file, session, metadata, self)
        self._staged.add(staged)
        return staged

    async def activate(self, staged: Staged) -> None:
        """Answer from `staged` from now on; returns when the one before has answered its last request and is closed."""
        self._staged.discard(staged)
        old = self._serving.get(staged.file.model)
        self._serving[staged.file.model] = staged
        self._files[staged.file.model] = staged.file
        if old is not None and old is not staged:
            old.retire()
            await old.closed.wait()

    async def discard(self, staged: Staged) -> None:
        """Let go of `staged`, which was not activated."""
        self._staged.discard(staged)
        staged.retire()
        await staged.closed.wait()

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
        if staged is None:
            raise ModelNotFound(f"there is no model {model!r} here to unload")
        staged.retire()
        await staged.closed.wait()

    def serving(self, model: str) -> Staged | None:
        """What answers for `model` now."""
        return self._serving.get(model)

    def close_session(self, session: engines.Session, closed: asyncio.Event) -> None:
        """Free `session` off the event loop, and set `closed` when that is done."""
        try:
            future = asyncio.get_running_loop().run_in_executor(self._loader, session.close)
        except RuntimeError:  # it was still in use when the host was closed, and the loader is gone
            session.close()
            closed.set()
            return
        future.add_done_callback(lambda _: closed.set())

    async def models(self) -> Sequence[ModelState]:
        """See `Backend`."""
        return tuple(
            ModelState(
                model, file.version, ready=model in self._serving, reason="" if model in self._serving else "unloaded"
            )
            for model, file in self._files.items()
        )

    async def ready(self, model: str, version: str = "") -> bool:
        """See `Backend`."""
        staged = self._serving.get(model)
        return staged is not None and version in {"", staged.file.version}

    async def metadata(self, model: str, version: str = "") -> ModelMetadata:
        """See `Backend`. `properties` say the file's `sha256`, its `engine` and, where known, `precision` and `labels`.

        The labels are joined by commas.
        """
        return self._find(model, version).metadata

    async def infer(self, request: InferRequest, deadline: Deadline) -> InferResponse:
        """See `Backend`."""
        return await self._find(request.model, request.version).infer(request, deadline)

    async def stream(self, request: InferRequest, deadline: Deadline) -> AsyncIterator[InferResponse]:
        """See `Backend`: models in files give one answer a request."""
        yield await self.infer(request, deadline)

    def snapshot(self, model: str) -> Snapshot:
        """See `Backend`."""
        staged = self._serving.get(model)
        if staged is None:
            return Snapshot(healthy=False, reason="unloaded" if model in self._files else "no such model")
        return Snapshot(
            healthy=True,
            inflight=staged.users,
            latency_p50_s=staged.latency.quantile(0.5),
            latency_p95_s=staged.latency.quantile(0.95),
        )

    async def close(self) -> None:
        """See `Backend`. Requests in flight are answered first, within `drain_s`."""
        leaving = [*self._serving.values(), *self._staged]
        self._serving.clear()
        self._staged.clear()
        for staged in leaving:
            staged.retire()
        try:
            async with asyncio.timeout(self.settings.drain_s):
                for staged in leaving:
                    await staged.closed.wait()
        except TimeoutError:
            log.warning("%s: requests were still running after %s s", self._name, self.settings.drain_s)
        self.workers.close()
        self._loader.shutdown(wait=False)

    def _find(self, model: str, version: str) -> Staged:
        staged = self._serving.get(model)
        if staged is not None:
            if version in {"", staged.file.version}:
                return staged
            raise ModelNotFound(f"there is no version {version!r} of {model} here; {staged.file.version} is serving")
        if model in self._files:
            raise ModelNotReady(f"model {model} is not loaded")
        wanted = f"version {version!r} of {model!r}" if version else f"model {model!r}"
        raise ModelNotFound(f"there is no {wanted} here")

    def _open(self, file: ModelFile) -> tuple[engines.Session, ModelMetadata]:
        """On the loader's thread: open, check and warm `file`."""
        engine = engines.load(file.engine)
        if comma := next((label for label in file.labels if "," in label), ""):
            raise InvalidRelease(f"the label {comma!r} of {file.model} has a comma in it, which separates labels")
        digest = _sha256(file)
        if file.sha256 and file.sha256 != digest:
            raise InvalidRelease(f"{file.path.name} has sha256 {digest[:12]}…, not {file.sha256[:12]}…")
        streams = self.settings.workers
        threads = self.settings.engine_threads or max(1, (os.cpu_count() or 1) // streams)
        session = engine.open_model(file.path, streams=streams, threads=threads)
        try:
            _warm(session)
        except HedgerowError:
            session.close()
            raise
        properties = {"sha256": digest, "engine": file.engine}
        if file.precision:
            properties["precision"] = file.precision
        if file.labels:
            properties["labels"] = ",".join(file.labels)
        metadata = ModelMetadata(
            file.model, (file.version,), engine.PLATFORM, session.inputs, session.outputs, properties
        )
        return session, metadata


def _warm(session: engines.Session) -> None:
    """Run once on zeros, so that the first request does not pay for what engines put off until then."""
    try:
        session.run({spec.name: _zeros(spec) for spec in session.inputs}, [spec.name for spec in session.outputs])
    except EngineFault:
        if not any(-1 in spec.shape[1:] for spec in session.inputs):
            raise
        # Sizes other than the batch's were guessed, and the model may rightly refuse the guess.
        log.info("warming up with 1 for the sizes that the model leaves open did not work; it starts cold")


def _zeros(spec: TensorSpec) -> NDArray[Any]:
    shape = tuple(1 if size < 0 else size for size in spec.shape)
    return (
        np.full(shape, b"", dtype=object) if spec.datatype == "BYTES" else np.zeros(shape, numpy_dtype(spec.datatype))
    )


def _finite(array: NDArray[Any], datatype: str) -> bool:
    if datatype == "BF16":
        return bool(((array & BFLOAT16_EXPONENT) != BFLOAT16_EXPONENT).all())
    return array.dtype.kind != "f" or bool(np.isfinite(array).all())


def _sha256(file: ModelFile) -> str:
    try:
        with file.path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise InvalidRelease(f"{file.path.name} cannot be read: {error.strerror}") from error


def _close_abandoned(future: "asyncio.Future[tuple[engines.Session, ModelMetadata]]") -> None:
    if not future.cancelled() and future.exception() is None:
        future.result()[0].close()
