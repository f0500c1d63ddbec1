"""The fleet service: hedgerow.v1.Fleet over gRPC, for operators and the publisher.

`Publish` in order: the files are spooled (`fleet.intake`); the whole is checked against its manifest and the signed
targets; the blobs are moved in; the release repository verifies the targets' signatures and makes them current; the
store writes the release down. What fails before the repository's yes leaves nothing; what a crash cuts off after it,
`recover` brings to its end at the next start.
"""

import asyncio
import contextlib
import hashlib
import logging
import shutil
import tempfile
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final, Self

import msgspec

from hedgerow import release, transports
from hedgerow.config import ServerSettings
from hedgerow.errors import HedgerowError, InvalidInput, InvalidRelease, LinkError, NotFound, Overloaded
from hedgerow.health import Health, reflection_methods
from hedgerow.proto import fleet_pb2, link_pb2
from hedgerow.rpc import Call, Method, methods, parse
from hedgerow_cloud.fleet.blobs import Blobs
from hedgerow_cloud.fleet.distribute import Distributor
from hedgerow_cloud.fleet.intake import Intake
from hedgerow_cloud.fleet.store import Store
from hedgerow_cloud.publish.repository import Director, ReleaseRepository

SERVICE: Final = "hedgerow.v1.Fleet"
MAX_MESSAGE_BYTES = 16 * 2**20
"""One part of an upload, or the metadata of a large fleet."""
MAX_CALLS = 1024
"""At once; more are refused with RESOURCE_EXHAUSTED."""
MAX_UPLOADS = 2
MAX_WATCHERS = 256
PART_TIMEOUT_S = 60.0
"""Silence after which an upload is given up."""
SAMPLES_PAGE = 64

_log = logging.getLogger(__name__)


class FleetService:
    """Answers the calls. `incoming` is a folder of its own, on the blobs' file system; it is emptied by `recover`."""

    def __init__(
        self,
        *,
        store: Store,
        blobs: Blobs,
        releases: ReleaseRepository,
        director: Director,
        distributor: Distributor,
        incoming: Path,
        max_release_bytes: int,
    ) -> None:
        self._store = store
        self._blobs = blobs
        self._releases = releases
        self._director = director
        self._distributor = distributor
        self._incoming = incoming
        self._max_release_bytes = max_release_bytes
        self._publishing = threading.Lock()
        self._directing = threading.Lock()
        self._uploads = 0
        self._watchers: dict[str, set[asyncio.Event]] = {}
        self._closing = False
        distributor.on_change(self._changed)

    @property
    def methods(self) -> dict[str, Method]:
        """What to serve."""
        return methods(
            fleet_pb2.DESCRIPTOR.services_by_name["Fleet"],
            {
                "ListDevices": self.list_devices,
                "GetDevice": self.get_device,
                "WatchDevice": self.watch_device,
                "ListReleases": self.list_releases,
                "Assign": self.assign,
                "GetMetadata": self.get_metadata,
                "Publish": self.publish,
                "ListSamples": self.list_samples,
            },
        )

    def recover(self) -> None:
        """Bring to an end what the last run left half done: releases, uploads, assignments. Blocks; call it first.

        One damaged release or device does not keep the others from being served.
        """
        shutil.rmtree(self._incoming, ignore_errors=True)
        self._incoming.mkdir(parents=True, exist_ok=True)
        known = self._published()
        for path, sha256 in self._releases.releases().items():
            if path not in known:
                self._write_down(path, sha256)
        self._blobs.keep_only(self._store.blobs())
        self._direct([device.id for device in self._store.devices()])

    def _write_down(self, path: str, sha256: str) -> None:
        """Have the store know a signed release, by its manifest's blob."""
        try:
            content = self._blobs.read(sha256, 0, release.MAX_MANIFEST_BYTES)
            manifest = release.parse(content)
        except (NotFound, InvalidRelease) as error:
            _log.error("%s is signed, but cannot be served until it is published again: %s", path, error)
            return
        if hashlib.sha256(content).hexdigest() == sha256:
            self._store.add_release(manifest, sha256, len(content))
            _log.info("%s was signed and is written down now", path)
        else:
            _log.error("%s is not what was signed, and cannot be served until it is published again", path)

    def close(self) -> None:
        """End what would run on for ever."""
        self._closing = True
        for device in tuple(self._watchers):
            self._changed(device)

    # Devices

    async def list_devices(self, _: fleet_pb2.ListDevicesRequest, __: Call) -> fleet_pb2.ListDevicesResponse:
        """Every device that was ever seen."""
        return fleet_pb2.ListDevicesResponse(devices=await asyncio.to_thread(self._store.devices))

    async def get_device(self, request: fleet_pb2.GetDeviceRequest, _: Call) -> fleet_pb2.Device:
        """One device; NOT_FOUND."""
        return await asyncio.to_thread(self._store.device, request.id)

    async def watch_device(self, request: fleet_pb2.GetDeviceRequest, call: Call) -> None:
        """One device, now and after each change; what changes faster than the caller reads is skipped."""
        if sum(map(len, self._watchers.values())) >= MAX_WATCHERS:
            raise Overloaded(f"{MAX_WATCHERS} callers watch devices already", retry_after_s=5.0)
        news = asyncio.Event()
        self._watchers.setdefault(request.id, set()).add(news)
        try:
            last = None
            while not self._closing:
                news.clear()
                device = await asyncio.to_thread(self._store.device, request.id)
                if device != last:
                    await call.write(device.SerializeToString())
                    last = device
                await news.wait()
        finally:
            self._watchers[request.id].discard(news)
            if not self._watchers[request.id]:
                del self._watchers[request.id]

    def _changed(self, device: str) -> None:
        for news in self._watchers.get(device, ()):
            news.set()

    # Releases

    async def list_releases(self, request: fleet_pb2.ListReleasesRequest, _: Call) -> fleet_pb2.ListReleasesResponse:
        """The releases of one model or of all."""
        return fleet_pb2.ListReleasesResponse(releases=await asyncio.to_thread(self._store.releases, request.model))

    async def get_metadata(self, request: fleet_pb2.GetMetadataRequest, _: Call) -> fleet_pb2.MetadataFile:
        """A metadata file of the release repository; NOT_FOUND."""
        content = await asyncio.to_thread(self._releases.metadata, request.name)
        if content is None:
            raise NotFound(f"the release repository has no {request.name[:200]!r}")
        return fleet_pb2.MetadataFile(content=content)

    async def publish(self, parts: AsyncIterator[bytes], call: Call) -> None:
        """Take a release in, wholly or not at all; answers with it as the fleet lists it."""
        if self._uploads >= MAX_UPLOADS:
            raise Overloaded(f"{MAX_UPLOADS} releases are being uploaded already", retry_after_s=5.0)
        self._uploads += 1
        try:
            with self._spool() as intake:
                targets = await self._receive(parts, intake)
                published = await asyncio.to_thread(self._take_in, intake, targets)
        finally:
            self._uploads -= 1
        await _if_linked(self._distributor.announce)
        await call.write(published.SerializeToString())

    @contextmanager
    def _spool(self) -> Iterator[Intake]:
        with tempfile.TemporaryDirectory(dir=self._incoming, ignore_cleanup_errors=True) as folder:
            intake = Intake(Path(folder), self._max_release_bytes)
            with contextlib.closing(intake):
                yield intake

    @staticmethod
    async def _receive(parts: AsyncIterator[bytes], intake: Intake) -> bytes:
        """Spool the file parts; gives the targets that end them."""
        while True:
            try:
                async with asyncio.timeout(PART_TIMEOUT_S):
                    raw = await anext(parts, None)
            except TimeoutError as error:
                raise InvalidInput(f"the upload was silent for {PART_TIMEOUT_S:g} s") from error
            if raw is None:
                raise InvalidInput("the upload ended without the signed targets")
            part = parse(fleet_pb2.PublishRequest, raw)
            match part.WhichOneof("part"):
                case "targets":
                    return part.targets
                case "file":
                    await asyncio.to_thread(intake.write, part.file.path, part.file.content, last=part.file.last)
                case _:
                    raise InvalidInput("a part of the upload is neither a file's nor the targets")

    def _take_in(self, intake: Intake, targets: bytes) -> fleet_pb2.Release:
        """Check the upload and make it count. In one thread from start to end, so that nothing comes in between."""
        with self._publishing:
            checked = intake.check(targets, self._published())
            path, new = f"{checked.manifest.name}/{release.MANIFEST}", list[str]()
            try:
                for sha256, file in checked.files.items():
                    if self._blobs.take(file, sha256):
                        new.append(sha256)
                self._blobs.sync()
                self._releases.accept(targets)
            except BaseException:
                if path not in self._releases.releases():  # the disk may have failed after it became current
                    for sha256 in new:
                        self._blobs.drop(sha256)
                raise
            published = self._store.add_release(checked.manifest, checked.manifest_sha256, checked.manifest_bytes)
            _log.info("release %s is published: %d bytes", checked.manifest.name, checked.manifest.bytes)
            return published

    def _published(self) -> dict[str, str]:
        """Manifest digests of all releases by target path."""
        return {
            f"{item.model}/{item.counter}/{release.MANIFEST}": item.manifest_sha256 for item in self._store.releases()
        }

    # Assignments

    async def assign(self, request: fleet_pb2.AssignRequest, _: Call) -> fleet_pb2.AssignResponse:
        """Give a release to devices: written down, signed into each one's director metadata, and said to it."""
        devices = sorted(set(request.devices)) or [device.id for device in await asyncio.to_thread(self._store.devices)]
        if not devices:
            raise NotFound("no device has been seen yet")
        await asyncio.to_thread(self._store.assign, devices, request.model, request.counter)
        undirected = await asyncio.to_thread(self._direct, devices)
        for device in devices:
            self._changed(device)
        _log.info("release %s/%d is assigned to %d devices", request.model, request.counter, len(devices))
        await _if_linked(lambda: self._distributor.command(devices))
        if undirected:
            raise HedgerowError(
                f"{len(undirected)} of {len(devices)} devices cannot be told of it, {undirected[0]} first: the "
                "director's metadata cannot be signed; the fleet's log says why. Then assign it again"
            )
        return fleet_pb2.AssignResponse(devices=devices)

    def _direct(self, devices: Sequence[str]) -> list[str]:
        """Sign what each of `devices` is assigned, unless its director metadata says so; those where that failed.

        In one thread from start to end: the caller may leave, this does not.
        """
        failed = []
        for device in devices:
            try:
                with self._directing:  # or, of two at once, the one that read first could sign last
                    self._director.assign(device, self._store.assignments(device))
            except (HedgerowError, OSError) as error:
                _log.error("what %s is assigned cannot be signed: %s", device, error)
                failed.append(device)
        return failed

    # Samples

    async def list_samples(self, request: fleet_pb2.ListSamplesRequest, call: Call) -> None:
        """The samples of a model in the order of arrival."""
        after = 0
        while page := await asyncio.to_thread(self._store.samples, request.model, after, SAMPLES_PAGE):
            for number, sample in page:
                await call.write(sample.SerializeToString())
                after = number


class FleetServer:
    """Serves a `FleetService`, with health and reflection, as a context manager; `port` is the bound one."""

    def __init__(self, service: FleetService, settings: ServerSettings, ready: Callable[[], bool]) -> None:
        self._service = service
        self._settings = settings
        self._ready = ready
        self.port = settings.port

    async def __aenter__(self) -> Self:
        async def ready() -> bool:
            return self._ready()

        files = [link_pb2.DESCRIPTOR, fleet_pb2.DESCRIPTOR]
        served = self._service.methods | Health(ready, [SERVICE]).methods | reflection_methods([SERVICE], files)
        limits = msgspec.structs.replace(self._settings, max_message_bytes=MAX_MESSAGE_BYTES, max_calls=MAX_CALLS)
        self._listener = await transports.listen(served, limits)
        self.port = self._listener.port
        _log.info("the fleet service listens on %s:%d", self._settings.host, self.port)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._service.close()
        await self._listener.stop(self._settings.drain_s)


async def _if_linked(say: Callable[[], Awaitable[None]]) -> None:
    """Say something over the link; if that is down, the next connection will."""
    try:
        await say()
    except LinkError as error:
        _log.warning("the devices will hear of it when the link is back: %s", error)
