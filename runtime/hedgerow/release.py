"""The release format: a folder of files and the manifest that names each by digest. Reading and checking, not signing.

::

    manifest.json     what this is: `Manifest`
    student.int8.onnx one file a variant
    probes.npz        inputs with the outputs a device must reproduce: arrays "in.<tensor>" and "out.<tensor>"
    MODEL_CARD.md     for people

The manifest's own digest is what gets signed, so everything hangs from one signature.
"""

import builtins
import hashlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

import msgspec

from hedgerow.errors import InvalidRelease
from hedgerow.gate import Guarantee

FORMAT = 1
MANIFEST = "manifest.json"
MAX_MANIFEST_BYTES = 4 * 2**20
CHUNK_BYTES = 48 * 2**10
"""Size of the chunks that files travel in; fits every broker's payload limit with room for the envelope."""
MAX_CHUNK_BYTES = 60 * 2**10
"""The largest that fit, without much room."""
MAX_COUNTER = 10**18 - 1
"""What databases and target paths take."""

_MODEL = re.compile(r"[A-Za-z0-9_-]{1,64}")  # it becomes part of paths, topics and settings
_DIGEST = re.compile(r"[0-9a-f]{64}")


class File(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One file: `path` inside the release, its size and digest, and the digest of each of its chunks (hex SHA-256)."""

    path: str
    bytes: int
    sha256: str
    chunk_bytes: int
    chunks: tuple[str, ...]


class Variant(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One file of the model for one kind of hardware. No `profiles` means any that has the engine."""

    name: str
    engine: str
    precision: str
    file: str
    profiles: tuple[str, ...] = ()
    guarantee: Guarantee | None = None


class Probes(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The probe vectors and how far an output may be from the expected one (numpy.allclose)."""

    file: str
    atol: float = 1e-3
    rtol: float = 1e-3


class Limits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a device must not exceed for the release to be good there; None: no limit."""

    latency_ms: float | None = None
    memory_mb: float | None = None


class Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything about one release of one model. `counter` grows with each release and never goes back."""

    format: int
    model: str
    counter: int
    created: str
    """RFC 3339, UTC."""
    variants: tuple[Variant, ...]
    files: tuple[File, ...]
    probes: Probes | None = None
    limits: Limits = Limits()
    card: str | None = None
    labels: tuple[str, ...] = ()
    """Names of the classes, where there are classes."""

    @property
    def name(self) -> str:
        """Model and counter: "digits/3"."""
        return f"{self.model}/{self.counter}"

    @property
    def bytes(self) -> int:
        """Size of all files together."""
        return sum(file.bytes for file in self.files)

    def file(self, path: str) -> File:
        """The entry of `path`; raises `InvalidRelease` if there is none."""
        for file in self.files:
            if file.path == path:
                return file
        raise InvalidRelease(f"release {self.name} names the file {path!r} but does not list it")

    def choose(self, profile: str, engines: Sequence[str]) -> Variant:
        """The variant for a device: of its profile or of any, by the order of its `engines`."""
        for engine in engines:
            for variant in self.variants:
                if variant.engine == engine and (not variant.profiles or profile in variant.profiles):
                    return variant
        offered = ", ".join(f"{v.name} ({v.engine})" for v in self.variants)
        raise InvalidRelease(f"release {self.name} has no variant for {profile} with {', '.join(engines)}: {offered}")

    def encode(self) -> builtins.bytes:
        """The bytes of manifest.json: the same manifest always gives the same bytes."""
        return msgspec.json.format(msgspec.json.encode(self, order="deterministic"), indent=1) + b"\n"


def describe(folder: Path, path: str, chunk_bytes: int = CHUNK_BYTES) -> File:
    """The manifest entry of the file at `path` inside `folder`."""
    whole, size, chunks = hashlib.sha256(), 0, []
    with (folder / path).open("rb") as stream:
        while block := stream.read(chunk_bytes):
            whole.update(block)
            size += len(block)
            chunks.append(hashlib.sha256(block).hexdigest())
    return File(path=path, bytes=size, sha256=whole.hexdigest(), chunk_bytes=chunk_bytes, chunks=tuple(chunks))


def parse(content: bytes) -> Manifest:
    """The manifest in `content`, checked against itself; raises `InvalidRelease` naming what is wrong."""
    if len(content) > MAX_MANIFEST_BYTES:
        raise InvalidRelease(f"the manifest has {len(content)} bytes; at most {MAX_MANIFEST_BYTES} are allowed")
    try:
        manifest = msgspec.json.decode(content, type=Manifest)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidRelease(f"the manifest cannot be read: {error}") from error
    for problem in _problems(manifest):
        raise InvalidRelease(f"release {manifest.name}: {problem}")
    return manifest


def read(folder: Path) -> Manifest:
    """The manifest of the release in `folder`, with every file's presence, size and digest checked."""
    try:
        manifest = parse((folder / MANIFEST).read_bytes())
        for file in manifest.files:
            if (found := describe(folder, file.path, file.chunk_bytes)) != file:
                raise InvalidRelease(
                    f"release {manifest.name}: {file.path} has sha256 {found.sha256[:12]}… ({found.bytes} bytes), "
                    f"the manifest says {file.sha256[:12]}… ({file.bytes} bytes)"
                )
    except FileNotFoundError as error:
        raise InvalidRelease(f"{folder.name}: {Path(error.filename).name} is missing") from error
    return manifest


def _problems(manifest: Manifest) -> Iterator[str]:
    if manifest.format != FORMAT:
        yield f"format {manifest.format} is not known; this version reads format {FORMAT}"
    if not _MODEL.fullmatch(manifest.model):
        yield "the model's name must be 1 to 64 letters (a to z), digits, '-' and '_'"
    if not 1 <= manifest.counter <= MAX_COUNTER:
        yield f"the counter must be 1 to {MAX_COUNTER}"
    if not manifest.variants:
        yield "there is no variant"
    if len({variant.name for variant in manifest.variants}) != len(manifest.variants):
        yield "two variants have the same name"
    listed = [file.path for file in manifest.files]
    if len(set(listed)) != len(listed):
        yield "a file is listed twice"
    for label in manifest.labels:
        if "," in label:
            yield f"the label {label!r} has a comma in it, which separates labels in a model's metadata"
    for file in manifest.files:
        path = PurePosixPath(file.path)
        plain = str(path) == file.path and not path.is_absolute() and path.parts and ".." not in path.parts
        if not plain or "\\" in file.path or "\0" in file.path:
            yield f"{file.path!r} is not a plain path inside the release"
        elif file.path == MANIFEST:
            yield "the manifest cannot list itself"
        if not all(_DIGEST.fullmatch(digest) for digest in (file.sha256, *file.chunks)):
            yield f"{file.path}: a digest is not a hex SHA-256"
        if not 1 <= file.chunk_bytes <= MAX_CHUNK_BYTES:
            yield f"{file.path}: chunks of {file.chunk_bytes} bytes; they must be 1 to {MAX_CHUNK_BYTES}"
        elif file.bytes < 0 or len(file.chunks) != -(-file.bytes // file.chunk_bytes):
            yield f"{file.path}: {len(file.chunks)} chunks of {file.chunk_bytes} bytes do not make {file.bytes} bytes"
    named = [variant.file for variant in manifest.variants]
    named += [path for path in (manifest.probes.file if manifest.probes else None, manifest.card) if path]
    yield from (f"{path} is named but not listed" for path in named if path not in listed)
