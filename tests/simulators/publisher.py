"""A publisher and a fleet in one object: both repositories with real keys, releases of random bytes, and the production
source interfaces over them in memory, where tests can lose, delay and falsify what is sent."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from pathlib import Path

from securesystemslib.signer import Signer

from hedgerow import release
from hedgerow.errors import LinkError, NotFound
from hedgerow.proto.link_pb2 import Chunk, ChunkRequest
from hedgerow.release import Manifest, Variant
from hedgerow_cloud.publish import keys
from hedgerow_cloud.publish.repository import (
    DEFAULT_LIFETIMES,
    Director,
    Lifetimes,
    ManifestEntry,
    ReleaseRepository,
    sign_targets,
)


class Publisher:
    """Everything under `folder`: keys, repositories, and the published files by digest in `files`."""

    def __init__(self, folder: Path, lifetimes: Lifetimes = DEFAULT_LIFETIMES) -> None:
        self.folder = folder
        self.releases = ReleaseRepository.create(
            folder / "release",
            root=[self.key("root")],
            targets=[self.key("targets")],
            online=self.key("online"),
            lifetimes=lifetimes,
        )
        self.director = Director.create(
            folder / "director", root=[self.key("root")], online=self.key("director"), lifetimes=lifetimes
        )
        self.files: dict[str, bytes] = {}

    def key(self, name: str) -> Signer:
        return keys.load_or_generate(self.folder / "keys", name)

    def make(self, model: str, counter: int, *contents: bytes) -> Manifest:
        """A release whose files are `contents`, ready to be signed."""
        folder = self.folder / "made" / model / str(counter)
        folder.mkdir(parents=True)
        for index, content in enumerate(contents):
            (folder / f"{index}.onnx").write_bytes(content)
        files = tuple(release.describe(folder, f"{index}.onnx") for index in range(len(contents)))
        self.files |= {file.sha256: content for file, content in zip(files, contents, strict=True)}
        variant = Variant(name="int8", engine="onnxruntime", precision="int8", file="0.onnx")
        return Manifest(
            format=release.FORMAT, model=model, counter=counter, created="", variants=(variant,), files=files
        )

    def publish(self, model: str, counter: int, *contents: bytes) -> ManifestEntry:
        """A release, signed and current."""
        manifest = self.make(model, counter, *(contents or (f"{model}/{counter}".encode(),))).encode()
        entry = ManifestEntry.of(manifest)
        self.files[entry.sha256] = manifest
        current = self.releases.metadata("targets.json")
        assert current is not None
        self.releases.accept(sign_targets(self.releases.root, current, [entry], [self.key("targets")]))
        return entry

    def metadata(self, device: str, repository: str, name: str) -> bytes | None:
        return self.releases.metadata(name) if repository == "release" else self.director.metadata(device, name)

    def chunks(self, request: ChunkRequest) -> list[Chunk]:
        """What a fleet sends for `request`."""
        if request.sha256 not in self.files:
            raise NotFound(f"no file with sha256 {request.sha256[:12]}…")
        content, size = self.files[request.sha256], request.chunk_bytes
        missing = [index for index in range(8 * len(request.missing)) if request.missing[index // 8] >> index % 8 & 1]
        return [
            Chunk(sha256=request.sha256, index=index, content=content[index * size : (index + 1) * size])
            for index in missing[: request.window]
        ]


class Source:
    """`MetadataSource` and `ChunkSource` of one device. What it would send passes through `tamper` and `spoil`."""

    def __init__(self, publisher: Publisher, device: str = "edge-1") -> None:
        self.publisher = publisher
        self.device = device
        self.silent = False
        self.up = asyncio.Event()
        self.up.set()
        self.asked: list[str] = []
        self.requests: list[ChunkRequest] = []
        self.tamper: Callable[[str, str, bytes | None], bytes | None] = lambda _repository, _name, content: content
        self.spoil: Callable[[list[Chunk]], list[Chunk]] = lambda chunks: chunks

    async def metadata(self, repository: str, name: str) -> bytes | None:
        self.asked.append(f"{repository}/{name}")
        if self.silent:
            raise LinkError("the fleet did not answer within 10 s")
        return self.tamper(repository, name, self.publisher.metadata(self.device, repository, name))

    async def ready(self) -> None:
        await self.up.wait()

    async def chunks(self, request: ChunkRequest, timeout_s: float) -> AsyncGenerator[Chunk, None]:
        self.requests.append(request)
        if not self.up.is_set():
            raise LinkError("there is no connection")
        if self.silent:
            raise LinkError(f"the fleet did not answer within {timeout_s:g} s")
        whole = self.publisher.chunks(request)
        sent = self.spoil(whole)
        for chunk in sent:
            yield chunk
        if {chunk.index for chunk in whole} - {chunk.index for chunk in sent}:
            raise LinkError(f"the fleet did not answer within {timeout_s:g} s")
