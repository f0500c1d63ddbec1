"""Fetching the files of a release chunk by chunk, so that nothing is lost when the link, the process or the power goes.

A file grows in place as ``<sha256>.part``. Which chunks it has is not written down anywhere: whoever resumes hashes
what is there, so a torn or lost write is just a chunk that is still missing. The manifest's digests decide what a chunk
is; where it came from and how often does not matter.
"""

import asyncio
import contextlib
import errno
import hashlib
import logging
import os
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Collection, Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

from hedgerow import release
from hedgerow.durable import sync_folder, write_durably
from hedgerow.errors import InvalidInput, InvalidRelease, LinkError, NotFound, Overloaded, TransferFailed
from hedgerow.proto.link_pb2 import Chunk, ChunkRequest
from hedgerow.release import CHUNK_BYTES, File, Manifest
from hedgerow_edge.trust import Assigned

WINDOW_CHUNKS = 16
"""Chunks asked for at once; halved at each silence, doubled back at each window that came whole."""
CHUNK_TIMEOUT_S = 5.0
"""Silence after which a window is asked for again."""
STALL_LIMIT_S = 120.0
"""Time without a single new chunk after which the transfer gives up for now."""
RETRY_BASE_S = 0.2
RETRY_MAX_S = 5.0
CHUNK_ATTEMPTS = 3
"""How often a chunk may come wrong before its file is given up."""
FLUSH_BYTES = 4 * 2**20
"""New bytes after which the part file is synced: what a power cut can cost."""

Progress = Callable[[int, int], None]
"""Takes the bytes of the file that are here and its size."""

_log = logging.getLogger(__name__)


class Counts(NamedTuple):
    """Bytes of all chunks that ever came, and of those that were here already."""

    fetched: int = 0
    refetched: int = 0


class ChunkSource(Protocol):
    """Where chunks come from: the link, or a test."""

    async def ready(self) -> None:
        """Return when there is somebody to ask."""
        ...

    def chunks(self, request: ChunkRequest, timeout_s: float) -> AsyncGenerator[Chunk, None]:
        """Chunks for `request` until as many came as were due, in any order, perhaps doubled.

        Raises `LinkError` after `timeout_s` of silence and when there is nobody to ask any more, and `NotFound`,
        `InvalidInput` or `Overloaded` if refused.
        """
        ...


class Transfer:
    """Brings files into place. `folder` holds what is under way, on the file system where files shall end up.

    `counts` says how much came.
    """

    def __init__(
        self,
        folder: Path,
        source: ChunkSource,
        *,
        window_chunks: int = WINDOW_CHUNKS,
        chunk_timeout_s: float = CHUNK_TIMEOUT_S,
        stall_limit_s: float = STALL_LIMIT_S,
    ) -> None:
        self._folder = folder
        self._source = source
        self._window = window_chunks
        self._timeout_s = chunk_timeout_s
        self._stall_limit_s = stall_limit_s
        self._keep: Callable[[Counts], None] = lambda _counts: None
        self.counts = Counts()

    def count_on(self, counts: Counts, keep: Callable[[Counts], None]) -> None:
        """Count on from `counts`, and have `keep` called with the sums after each window, in a worker thread.

        So a process that dies takes no more than what came in one window out of them.
        """
        self.counts, self._keep = counts, keep

    async def manifest(self, assigned: Assigned, into: Path | None = None) -> Manifest:
        """The manifest that `assigned` names, checked against it; its bytes are kept at `into`, and used if there.

        Raises `TransferFailed`, `InvalidRelease`, or `LinkError` when nothing came for too long.
        """
        name = f"the manifest of {assigned.name}"
        with _disk(name):
            content = await asyncio.to_thread(_read_if_right, into, assigned.manifest_sha256) if into else None
            if content is None:
                content = await self._manifest_bytes(name, assigned)
                if into is not None:
                    await asyncio.to_thread(write_durably, into, content)
        manifest = release.parse(content)
        if (manifest.model, manifest.counter) != (assigned.model, assigned.counter):
            raise InvalidRelease(f"the manifest signed as {assigned.name} says it is {manifest.name}")
        return manifest

    async def fetch(self, file: File, into: Path, progress: Progress | None = None) -> None:
        """Bring `file` to the path `into`, complete, verified and synced. Does nothing if it is there already.

        Raises `TransferFailed` if it cannot be had intact or the disk is full, and `LinkError` when nothing came for
        too long. After a `LinkError`, a cancellation or a kill the next call goes on from what is here.
        """
        with _disk(file.path):
            if await asyncio.to_thread(_is_right, into, file.sha256):
                return
            self._folder.mkdir(parents=True, exist_ok=True)
            path = self._folder / f"{file.sha256}.part"
            part = await asyncio.to_thread(_Part, path, file, progress)
            try:
                part.tell()
                await self._pull(file.path, file.sha256, file.bytes, file.chunk_bytes, part)
                await asyncio.to_thread(part.sync)
            finally:
                part.close()
            if not await asyncio.to_thread(_is_right, path, file.sha256):
                path.unlink()
                raise TransferFailed(f"{file.path}: each chunk is what the manifest says, and the whole is not")
            path.replace(into)
            await asyncio.to_thread(sync_folder, into.parent)

    def prune(self, keep: Collection[str] = ()) -> None:
        """Remove what is under way of files whose sha256 is not among `keep`."""
        for path in self._folder.glob("*.part"):
            if path.stem not in keep:
                path.unlink(missing_ok=True)

    async def _manifest_bytes(self, name: str, assigned: Assigned) -> bytes:
        if assigned.manifest_bytes > release.MAX_MANIFEST_BYTES:
            raise InvalidRelease(
                f"{name} has {assigned.manifest_bytes} bytes; at most {release.MAX_MANIFEST_BYTES} are allowed"
            )
        found = ""
        for _ in range(CHUNK_ATTEMPTS):  # its chunks have no digests of their own: only the whole can be judged
            whole = _Whole(assigned.manifest_bytes)
            await self._pull(name, assigned.manifest_sha256, assigned.manifest_bytes, CHUNK_BYTES, whole)
            found = hashlib.sha256(whole.content).hexdigest()
            if found == assigned.manifest_sha256:
                return bytes(whole.content)
        raise TransferFailed(
            f"{name} has sha256 {found[:12]}…, but {assigned.manifest_sha256[:12]}… was signed "
            f"({CHUNK_ATTEMPTS} attempts)"
        )

    async def _pull(self, name: str, sha256: str, size: int, chunk_bytes: int, sink: "_Sink") -> None:
        """Ask for what `sink` misses, window by window, until it misses nothing."""
        window, failures, last_news = self._window, 0, time.monotonic()
        while sink.missing:
            before, problem = len(sink.missing), "only what was here or not asked for"
            request = ChunkRequest(sha256=sha256, chunk_bytes=chunk_bytes, missing=bitmap(sink.missing), window=window)
            with contextlib.suppress(TimeoutError):  # asking says why there is nobody
                async with asyncio.timeout(last_news + self._stall_limit_s - time.monotonic()):
                    await self._source.ready()
            try:
                async with contextlib.aclosing(self._source.chunks(request, self._timeout_s)) as chunks:
                    async for chunk in chunks:
                        if chunk.sha256 == sha256 and len(chunk.content) == _length(size, chunk_bytes, chunk.index):
                            self._take(chunk, sink)
                window = min(self._window, 2 * window)
            except (NotFound, InvalidInput) as error:
                raise TransferFailed(f"{name}: {error}") from error
            except (LinkError, Overloaded) as error:
                problem, window = str(error), max(1, window // 2)
            await asyncio.to_thread(self._after_window, sink)
            if len(sink.missing) < before:
                failures, last_news = 0, time.monotonic()
                continue
            if (stalled_s := time.monotonic() - last_news) >= self._stall_limit_s:
                raise LinkError(f"{name}: nothing new came for {stalled_s:.0f} s: {problem}")
            _log.debug("%s: %s; asking again", name, problem)
            await asyncio.sleep(min(RETRY_MAX_S, RETRY_BASE_S * 2 ** min(failures, 10)))
            failures += 1

    def _take(self, chunk: Chunk, sink: "_Sink") -> None:
        size, known = len(chunk.content), chunk.index not in sink.missing
        self.counts = Counts(self.counts.fetched + size, self.counts.refetched + size * known)
        if not known and sink.keep(chunk.index, chunk.content):
            sink.missing.discard(chunk.index)

    def _after_window(self, sink: "_Sink") -> None:
        sink.after_window()
        self._keep(self.counts)


class _Sink(Protocol):
    """Where chunks go."""

    missing: set[int]

    def keep(self, index: int, content: bytes) -> bool:
        """Take a chunk of the right length; False if its content is wrong and it must be asked for again."""
        ...

    def after_window(self) -> None:
        """Called between windows, in a worker thread."""
        ...


class _Whole:
    """A small file in memory, whose chunks cannot be judged one by one."""

    def __init__(self, size: int) -> None:
        self.content = bytearray(size)
        self.missing = set(range(-(-size // CHUNK_BYTES)))

    def keep(self, index: int, content: bytes) -> bool:
        self.content[index * CHUNK_BYTES : index * CHUNK_BYTES + len(content)] = content
        return True

    def after_window(self) -> None:
        """Nothing to do."""


class _Part:
    """A part file, with the room for the whole taken at once, so that a full disk shows at the beginning."""

    def __init__(self, path: Path, file: File, progress: Progress | None) -> None:
        self._file = file
        self._progress = progress
        self._wrong: Counter[int] = Counter()
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            before = os.fstat(self._fd).st_size
            os.truncate(self._fd, file.bytes)
            if file.bytes:
                try:
                    os.posix_fallocate(self._fd, 0, file.bytes)
                except OSError:
                    os.truncate(self._fd, min(before, file.bytes))  # what could be had must not keep the disk full
                    raise
            sync_folder(path.parent)
            self.missing = set(self._look())
        except BaseException:
            os.close(self._fd)
            raise
        self._done = file.bytes - sum(_length(file.bytes, file.chunk_bytes, index) for index in self.missing)
        self._synced = self._done
        if self._done:
            _log.info("%s: %d of %d bytes are here already", file.path, self._done, file.bytes)

    def keep(self, index: int, content: bytes) -> bool:
        expected, found = self._file.chunks[index], hashlib.sha256(content).hexdigest()
        if found != expected:
            self._wrong[index] += 1
            problem = f"{self._file.path}: chunk {index} has sha256 {found[:12]}…, the manifest says {expected[:12]}…"
            if self._wrong[index] >= CHUNK_ATTEMPTS:
                raise TransferFailed(f"{problem} ({CHUNK_ATTEMPTS} attempts)")
            _log.warning("%s; asking again", problem)
            return False
        os.pwrite(self._fd, content, index * self._file.chunk_bytes)
        self._done += len(content)
        self.tell()
        return True

    def tell(self) -> None:
        """Say how far it is; belongs to the event loop, as whoever listens does."""
        if self._progress is not None:
            self._progress(self._done, self._file.bytes)

    def after_window(self) -> None:
        if self._done - self._synced >= FLUSH_BYTES:
            self.sync()

    def sync(self) -> None:
        os.fsync(self._fd)
        self._synced = self._done

    def close(self) -> None:
        os.close(self._fd)

    def _look(self) -> Iterator[int]:
        """The chunks that are not in the file as they should be."""
        for index, digest in enumerate(self._file.chunks):
            content = os.pread(self._fd, self._file.chunk_bytes, index * self._file.chunk_bytes)
            if hashlib.sha256(content).hexdigest() != digest:
                yield index


def bitmap(indices: Collection[int]) -> bytes:
    """The bits of `indices`: least significant bit of byte 0 is index 0."""
    bits = bytearray(max(indices, default=-1) // 8 + 1)
    for index in indices:
        bits[index // 8] |= 1 << index % 8
    return bytes(bits)


def _length(size: int, chunk_bytes: int, index: int) -> int:
    """Bytes of chunk `index` of a file of `size` bytes; nothing at all (-1) is of the right length beyond its end."""
    start = index * chunk_bytes
    return min(chunk_bytes, size - start) if start < size else -1


def _is_right(path: Path, sha256: str) -> bool:
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest() == sha256
    except FileNotFoundError:
        return False


def _read_if_right(path: Path, sha256: str) -> bytes | None:
    return path.read_bytes() if _is_right(path, sha256) else None


@contextlib.contextmanager
def _disk(name: str) -> Iterator[None]:
    """Say what the disk refused in words of the release."""
    try:
        yield
    except OSError as error:
        full = error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
        reason = "this device's disk is full" if full else f"this device's disk failed ({error.strerror})"
        raise TransferFailed(f"{name}: {reason}") from error
