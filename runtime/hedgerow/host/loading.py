"""Model files: found to be the right one, opened, warmed, and tried for whether they take batches; and closed again.

`Loader` has that done on threads, and counts the memory that open models take.
"""

import asyncio
import hashlib
import logging
import os
import time
from collections.abc import Callable
from functools import partial

from hedgerow import engines
from hedgerow.errors import EngineFault, HedgerowError, InvalidRelease, ModelNotReady
from hedgerow.host.batch import Runnable, takes_batches, zeros
from hedgerow.host.room import MEMORY_FACTOR
from hedgerow.host.settings import HostSettings, ModelFile
from hedgerow.host.workers import Abandoning
from hedgerow.isolation.session import IsolationSettings, open_isolated
from hedgerow.tensors import ModelMetadata

log = logging.getLogger(__name__)


class Loader:
    """Opens models and closes them, for the host called `name`. Belongs to one event loop.

    `make_room` is called before one is opened with its file and the bytes that it is taken to need.
    """

    def __init__(self, settings: HostSettings, name: str, make_room: Callable[[ModelFile, int], None]) -> None:
        self._settings = settings
        self._name = name
        self._make_room = make_room
        self._threads = Abandoning(settings.loaders, settings.load_timeout_s, f"{name}-loader")
        self._closing: set[asyncio.Future[None]] = set()
        self.load_s: dict[str, float] = {}
        """How long loading a model took the last time, by its name."""
        self.memory_bytes = 0
        """What all open models are taken to need."""

    @property
    def hung(self) -> int:
        """Models that hang in being loaded or closed: given up after `load_timeout_s` and not back yet."""
        return self._threads.abandoned

    def open(self, file: ModelFile) -> tuple["asyncio.Future[Runnable]", int]:
        """`file` being opened on a thread, and the memory that was set aside for it."""
        isolation = self._settings.isolation.get(file.model)
        if isolation is None and self.hung >= self._settings.max_hung_loads:
            raise ModelNotReady(
                f"{file.model} is not loaded: {self.hung} models hang in this process while they are loaded or"
                " closed, and until it is started again only isolated ones are loaded"
            )
        settings = self._settings.batch_settings(file.model)
        threads = self._settings.engine_threads or max(1, (os.cpu_count() or 1) // settings.instances)
        memory_bytes = int(MEMORY_FACTOR * file_bytes(file))
        self._make_room(file, memory_bytes)
        started = time.monotonic()
        hangs = EngineFault(
            f"{file.model} {file.version} cannot be loaded: it was not open within {self._settings.load_timeout_s:g} s"
        )

        def late(model: Runnable | None) -> None:
            self.memory_bytes -= memory_bytes
            log.warning("%s: %s %s has come back from being loaded", self._name, file.model, file.version)
            if model is not None:
                self.close(model)

        future = self._threads.submit(
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
            after=tuple(self._closing) if self._settings.memory_budget_bytes else (),
        )
        self.memory_bytes += memory_bytes

        def opened(done: "asyncio.Future[Runnable]") -> None:
            self.load_s[file.model] = time.monotonic() - started
            if done.exception() is hangs:  # it keeps its memory
                log.error("%s: %s", self._name, hangs)
            elif done.exception() is not None:
                self.memory_bytes -= memory_bytes

        future.add_done_callback(opened)
        return future, memory_bytes

    def close(self, model: Runnable) -> "asyncio.Future[None]":
        """`model` being closed on a thread."""
        name = f"{model.metadata.name} {model.version}"
        future = self._threads.submit(
            model.close, too_late=EngineFault(f"{name} was not closed within {self._settings.load_timeout_s:g} s")
        )
        self._closing.add(future)

        def closed(done: "asyncio.Future[None]") -> None:
            self._closing.discard(done)
            if (error := done.exception()) is not None:
                log.error("%s: closing %s failed: %s", self._name, name, error)

        future.add_done_callback(closed)
        return future

    def abandon(self, memory_bytes: int, opening: "asyncio.Future[Runnable]") -> None:
        """Close what nobody waits for any more, once it is open."""
        if opening.exception() is None:
            self.close(opening.result())
            self.memory_bytes -= memory_bytes


def open_model(
    file: ModelFile, *, streams: int, threads: int, batches: bool, isolation: IsolationSettings | None = None
) -> Runnable:
    """`file`, ready to answer, for `streams` runs at once with `threads` threads each; isolated in a process or here.

    Raises `MissingExtra` for an engine that is not installed, `InvalidRelease` if the file is not the one meant, and
    `EngineFault` if the engine cannot run it. Whether it takes batches is tried only if `batches` are wanted.
    """
    engine = engines.load(file.engine)
    if comma := next((label for label in file.labels if "," in label), ""):
        raise InvalidRelease(f"the label {comma!r} of {file.model} has a comma in it, which separates labels")
    digest = _sha256(file)
    if file.sha256 and file.sha256 != digest:
        raise InvalidRelease(f"{file.path.name} has sha256 {digest[:12]}…, not {file.sha256[:12]}…")
    session: engines.Session
    if isolation is None:
        session = engine.open_model(file.path, streams=streams, threads=threads)
    else:
        name = f"{file.model} {file.version}"
        session = open_isolated(file.engine, file.path, streams=streams, threads=threads, name=name, settings=isolation)
    try:
        _warm(session)
        batches = batches and takes_batches(session)
    except HedgerowError:
        session.close()
        raise
    properties = {"sha256": digest, "engine": file.engine}
    if file.precision:
        properties["precision"] = file.precision
    if file.labels:
        properties["labels"] = ",".join(file.labels)
    metadata = ModelMetadata(file.model, (file.version,), engine.PLATFORM, session.inputs, session.outputs, properties)
    return Runnable(session, metadata, file.version, batches=batches)


def file_bytes(file: ModelFile) -> int:
    """Its size; 0 if it cannot be read, which opening it will say."""
    try:
        return file.path.stat().st_size
    except OSError:
        return 0


def _warm(session: engines.Session) -> None:
    """Run once on zeros, so that the first request does not pay for what engines put off until then."""
    try:
        session.run({spec.name: zeros(spec) for spec in session.inputs}, [spec.name for spec in session.outputs])
    except EngineFault:
        if not any(-1 in spec.shape[1:] for spec in session.inputs):
            raise
        # Sizes other than the batch's were guessed, and the model may rightly refuse the guess.
        log.info("warming up with 1 for the sizes that the model leaves open did not work; it starts cold")


def _sha256(file: ModelFile) -> str:
    try:
        with file.path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise InvalidRelease(f"{file.path.name} cannot be read: {error.strerror}") from error
