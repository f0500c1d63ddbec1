"""A fleet's end of the link over a real broker, answering from a `Publisher`, where a test can spoil what is sent.

Its releases are real models; what devices say is kept.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray
from simulators import brokers, models
from simulators.guarantees import guarantee
from simulators.publisher import Publisher

from hedgerow import release
from hedgerow.errors import LinkError, NotFound
from hedgerow.gate import Gate
from hedgerow.link import Link, Topics
from hedgerow.proto import link_pb2
from hedgerow.release import Limits, Manifest, Probes, Variant
from hedgerow_cloud.publish.repository import ManifestEntry, sign_targets

FLEET = "test"
DEVICE = "edge-1"
SURE = 20.0
"""Logits of this size make a confidence of almost 1."""
REPOSITORIES = {link_pb2.RELEASE: "release", link_pb2.DIRECTOR: "director"}


def answer(counter: int, *classes: int) -> NDArray[np.float32]:
    """The logits that release `counter` gives for `models.pixels(*classes)`: each release answers differently."""
    logits = np.zeros((len(classes), models.CLASSES), np.float32)
    logits[np.arange(len(classes)), [(k + counter) % models.CLASSES for k in classes]] = SURE
    return logits


class Responder:
    """Everything a device can ask for, and the last of what each device said."""

    def __init__(self, publisher: Publisher, broker: brokers.Broker) -> None:
        self.publisher = publisher
        self.broker = broker
        self.topics = Topics(FLEET)
        self.births: dict[str, link_pb2.Birth] = {}
        self.statuses: dict[str, link_pb2.Status] = {}
        self.phases: list[str] = []
        """Of any device's first model, each time it changed."""
        self.samples: list[link_pb2.Sample] = []
        self.tamper: Callable[[link_pb2.Chunk], None] = lambda _chunk: None
        self._link = link = Link(brokers.settings(broker), "fleet")
        self._serial = 0
        self._heard = asyncio.Condition()
        self._waiting: asyncio.Queue[tuple[str, bytes]] = asyncio.Queue()
        for topic in (self.topics.birth("+"), self.topics.status("+"), self.topics.request("+")):
            link.subscribe(topic, lambda topic, payload, _retained: self._waiting.put_nowait((topic, payload)))

    async def wait_connected(self) -> None:
        await self._link.wait_connected()

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(self._link.run())
            group.create_task(self._work())

    async def until(self, true: Callable[[link_pb2.Status], bool], timeout_s: float = 30.0) -> link_pb2.Status:
        """The status of `DEVICE`, once it is as `true` says."""
        try:
            async with asyncio.timeout(timeout_s), self._heard:
                await self._heard.wait_for(lambda: DEVICE in self.statuses and true(self.statuses[DEVICE]))
        except TimeoutError:
            raise AssertionError(f"it stayed so: {self.statuses.get(DEVICE)}") from None
        return self.statuses[DEVICE]

    async def runs(self, counter: int) -> link_pb2.ModelStatus:
        """The status of the device's first model, once the device is online and has confirmed release `counter`."""
        status = await self.until(
            lambda status: status.online and any(m.running == counter and m.phase == "idle" for m in status.models)
        )
        return status.models[0]

    async def rejected(self, counter: int) -> link_pb2.ModelStatus:
        """The status of the device's first model, once it has rejected release `counter`."""
        status = await self.until(lambda status: any(m.failed == counter and m.phase == "idle" for m in status.models))
        return status.models[0]

    def make(
        self,
        counter: int,
        *,
        model: str = "digits",
        write: Callable[[Path], object] | None = None,
        expected: NDArray[np.float32] | None = None,
        threshold: float | None = None,
        teacher_sha256: str = "",
        limits: Limits | None = None,
    ) -> ManifestEntry:
        """A release, signed and current. By default a classifier as `answer` says, and probes that it reproduces."""
        folder = self.publisher.folder / "made" / model / f"{counter}"
        folder.mkdir(parents=True)
        write = write or (lambda path: models.classifier(path, sure=SURE, shift=counter))
        write(folder / "student.onnx")
        classes = range(models.CLASSES)
        expected = answer(counter, *classes) if expected is None else expected
        probes: dict[str, Any] = {"in.pixels": models.pixels(*classes), "out.logits": expected}
        np.savez(folder / "probes.npz", **probes)
        files = tuple(release.describe(folder, name) for name in ("student.onnx", "probes.npz"))
        variant = Variant(name="cpu", engine="onnxruntime", precision="fp32", file="student.onnx")
        if threshold is not None:
            promise = guarantee(Gate(threshold=threshold), student=files[0].sha256, teacher=teacher_sha256)
            variant = msgspec.structs.replace(variant, guarantee=promise)
        manifest = Manifest(
            format=release.FORMAT,
            model=model,
            counter=counter,
            created="2026-01-01T00:00:00Z",
            variants=(variant,),
            files=files,
            probes=Probes(file="probes.npz"),
            limits=limits or Limits(),
        )
        self.publisher.files |= {file.sha256: (folder / file.path).read_bytes() for file in files}
        entry = ManifestEntry.of(manifest.encode())
        self.publisher.files[entry.sha256] = manifest.encode()
        current = self.publisher.releases.metadata("targets.json")
        assert current is not None
        signed = sign_targets(self.publisher.releases.root, current, [entry], [self.publisher.key("targets")])
        self.publisher.releases.accept(signed)
        return entry

    async def assign(self, *entries: ManifestEntry) -> None:
        """Give releases to `DEVICE` and tell it that there is something new."""
        self.publisher.director.assign(DEVICE, entries)
        await self.command()

    async def command(self) -> None:
        self._serial += 1
        command = link_pb2.Command(kind=link_pb2.Command.CHECK, serial=self._serial)
        await self._link.publish(self.topics.command(DEVICE), command.SerializeToString(), retain=True)

    async def _work(self) -> None:
        while True:
            topic, payload = await self._waiting.get()
            device, kind = self.topics.device_of(topic), topic.rpartition("/")[2]
            if kind == "request":
                await self._answer(device, link_pb2.Request.FromString(payload))
            elif kind == "birth":
                self.births[device] = link_pb2.Birth.FromString(payload)
            else:
                self._note(device, link_pb2.Status.FromString(payload))
            async with self._heard:
                self._heard.notify_all()

    def _note(self, device: str, status: link_pb2.Status) -> None:
        if device in self.statuses and status.session < self.statuses[device].session:
            return  # a will that came late
        self.statuses[device] = status
        for model in status.models[:1]:
            if self.phases[-1:] != [model.phase]:
                self.phases.append(model.phase)

    async def _answer(self, device: str, request: link_pb2.Request) -> None:
        match request.WhichOneof("ask"):
            case "metadata":
                repository = REPOSITORIES[request.metadata.repository]
                content = self.publisher.metadata(device, repository, request.metadata.name)
                metadata = link_pb2.Metadata(absent=content is None, content=content or b"")
                answers = [link_pb2.Response(metadata=metadata)]
            case "chunks":
                answers = self._chunks(request.chunks)
            case _:
                self.samples += request.samples.samples
                digests = [sample.digest for sample in request.samples.samples]
                answers = [link_pb2.Response(receipt=link_pb2.SampleReceipt(digests=digests))]
        for one in answers:
            one.id = request.id
            with contextlib.suppress(LinkError):  # it will ask again
                await self._link.publish(self.topics.response(device), one.SerializeToString())

    def _chunks(self, request: link_pb2.ChunkRequest) -> list[link_pb2.Response]:
        try:
            chunks = self.publisher.chunks(request)
        except NotFound as error:
            refusal = link_pb2.Refusal(code=link_pb2.Refusal.NOT_FOUND, message=str(error))
            return [link_pb2.Response(refusal=refusal)]
        for chunk in chunks:
            self.tamper(chunk)
        return [link_pb2.Response(chunk=chunk) for chunk in chunks]


@asynccontextmanager
async def running(publisher: Publisher, broker: brokers.Broker) -> AsyncIterator[Responder]:
    """A responder on `broker` that knows `DEVICE`."""
    responder = Responder(publisher, broker)
    publisher.director.register(DEVICE)
    async with asyncio.TaskGroup() as group:
        task = group.create_task(responder.run())
        await responder.wait_connected()
        try:
            yield responder
        finally:
            task.cancel()
