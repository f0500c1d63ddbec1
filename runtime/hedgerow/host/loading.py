"""Model files: found to be the right one, opened, warmed, and tried for whether they take batches. Blocking."""

import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path

from hedgerow import engines
from hedgerow.errors import EngineFault, HedgerowError, InvalidRelease
from hedgerow.host.batch import Runnable, takes_batches, zeros
from hedgerow.isolation.session import IsolationSettings, open_isolated
from hedgerow.tensors import ModelMetadata

log = logging.getLogger(__name__)


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
    pinned: bool = False
    """Never unloaded to make room for another model."""


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
