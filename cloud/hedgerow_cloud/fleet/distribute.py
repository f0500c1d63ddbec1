"""The fleet's end of the link: takes in what devices say, and answers what they ask.

- Facts (births, statuses, wills): only the newest of each device waits; the store decides what is stale.
- Requests: answered by a few workers from a bounded queue, at most `MAX_WAITING_OF_ONE` of them for one device; what
  finds no place is dropped, and the device asks again.
- Pointers: the release timestamp and each device's command are retained, and said again after each connection, since a
  broker may have lost them.

A device is who its topic says it is, whatever the payload claims. What cannot be read is logged once, until the same
device sends something that can.
"""

import asyncio
import logging
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TypeVar

from google.protobuf.message import DecodeError, Message

from hedgerow.errors import HedgerowError, InvalidInput, LinkError, NotFound, Overloaded, ReleaseError, Unavailable
from hedgerow.link import Link, Topics
from hedgerow.proto import link_pb2
from hedgerow.release import MAX_CHUNK_BYTES
from hedgerow_cloud.fleet.blobs import Blobs
from hedgerow_cloud.fleet.store import Store
from hedgerow_cloud.publish.repository import Director, ReleaseRepository

WORKERS = 8
MAX_WAITING = 1024
"""Requests of all devices that wait for a worker or have one."""
MAX_WAITING_OF_ONE = 4
MAX_FACTS_WAITING = 20_000
MAX_WINDOW = 128
"""Chunks sent for one request."""
MAX_SAMPLES = 1024
"""In one upload."""
MAX_COMPLAINTS = 10_000
"""Devices remembered for having sent something unreadable; beyond it nothing more is logged about others."""
TIMESTAMP = "timestamp.json"

_DIGEST = re.compile(r"[0-9a-f]{64}")
_CODES: tuple[tuple[type[HedgerowError], link_pb2.Refusal.Code], ...] = (
    (NotFound, link_pb2.Refusal.NOT_FOUND),
    (InvalidInput, link_pb2.Refusal.INVALID),
    (ReleaseError, link_pb2.Refusal.INVALID),
    (Overloaded, link_pb2.Refusal.BUSY),
    (Unavailable, link_pb2.Refusal.BUSY),
)

_log = logging.getLogger(__name__)

M = TypeVar("M", bound=Message)


class Distributor:
    """Serves the devices of one fleet over `link` while `run` runs."""

    def __init__(
        self, link: Link, topics: Topics, store: Store, blobs: Blobs, releases: ReleaseRepository, director: Director
    ) -> None:
        self._link = link
        self._topics = topics
        self._store = store
        self._blobs = blobs
        self._releases = releases
        self._director = director
        self._facts: dict[tuple[str, str], bytes] = {}
        self._facts_waiting = asyncio.Event()
        self._requests: asyncio.Queue[tuple[str, link_pb2.Request]] = asyncio.Queue(MAX_WAITING)
        self._waiting_of: Counter[str] = Counter()
        self._complained: set[tuple[str, str]] = set()
        self._observers: list[Callable[[str], None]] = []
        for kind, filter_of in (("birth", topics.birth), ("status", topics.status)):
            link.subscribe(filter_of("+"), self._taker(kind))
        link.subscribe(topics.request("+"), self._take_request)
        link.on_connected(self._say_pointers)

    def on_change(self, callback: Callable[[str], None]) -> None:
        """Have `callback` called with the id of each device of which something new is known."""
        self._observers.append(callback)

    async def run(self) -> None:
        """Work until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._work_on_facts(), name="facts")
            for number in range(WORKERS):
                group.create_task(self._work_on_requests(), name=f"requests-{number}")

    async def announce(self) -> None:
        """Publish the release repository's timestamp as the retained pointer; raises `LinkError`."""
        content = await asyncio.to_thread(self._releases.metadata, TIMESTAMP)
        if content is not None:
            await self._link.publish(self._topics.release_timestamp(), content, retain=True)

    async def command(self, devices: Sequence[str]) -> None:
        """Tell `devices` that there is something new; those that are away find it when they are back.

        Raises `LinkError` when the broker is; then the next connection says it.
        """
        serials = await asyncio.to_thread(self._store.commands)
        for device in devices:
            if device in serials:
                command = link_pb2.Command(kind=link_pb2.Command.CHECK, serial=serials[device])
                await self._link.publish(self._topics.command(device), command.SerializeToString(), retain=True)

    async def refresh(self, interval_s: float) -> None:
        """Sign online metadata again before it expires, until cancelled."""
        while True:
            try:
                if await asyncio.to_thread(self._releases.refresh):
                    await self.announce()
                await asyncio.to_thread(self._director.refresh)
            except LinkError as error:
                _log.debug("the new timestamp waits for the link: %s", error)
            except (HedgerowError, OSError) as error:
                _log.warning("the online metadata could not be signed again: %s", error)
            await asyncio.sleep(interval_s)

    async def _say_pointers(self) -> None:
        try:
            await self.announce()
            await self.command(list(await asyncio.to_thread(self._store.commands)))
        except (Unavailable, OSError) as error:
            _log.warning("the retained messages could not be said again: %s", error)

    # Facts

    def _taker(self, kind: str) -> Callable[[str, bytes, bool], None]:
        def take(topic: str, payload: bytes, _retained: bool) -> None:
            if not (device := self._device_of(topic)):
                return
            key = device, kind
            if key in self._facts or len(self._facts) < MAX_FACTS_WAITING:
                self._facts[key] = payload
                self._facts_waiting.set()
            else:
                self._complain(key, "is left out: too many births and statuses wait")

        return take

    async def _work_on_facts(self) -> None:
        while True:
            await self._facts_waiting.wait()
            self._facts_waiting.clear()
            while self._facts:
                key = next(iter(self._facts))
                await self._take_in(key, self._facts.pop(key))

    async def _take_in(self, key: tuple[str, str], payload: bytes) -> None:
        device, kind = key
        if not payload:
            return  # how a retained message is cleared
        try:
            if kind == "birth":
                birth = self._read(link_pb2.Birth, payload)
                news = await asyncio.to_thread(self._store.birth, device, birth)
                await asyncio.to_thread(self._director.register, device)
            else:
                status = self._read(link_pb2.Status, payload)
                news = await asyncio.to_thread(self._store.status, device, status)
        except (HedgerowError, OSError) as error:
            self._complain(key, f"is dropped: {error}")
            return
        self._complained.discard(key)
        if news:
            for observer in self._observers:
                observer(device)

    # Requests

    def _take_request(self, topic: str, payload: bytes, retained: bool) -> None:
        if not (device := self._device_of(topic)):
            return
        key = device, "request"
        if retained:
            self._complain(key, "is dropped: a request must not be retained")
            return
        try:
            request = self._read(link_pb2.Request, payload)
        except InvalidInput as error:
            self._complain(key, f"is dropped: {error}")
            return
        if self._requests.full() or self._waiting_of[device] >= MAX_WAITING_OF_ONE:
            self._complain(key, "is dropped: too many wait")
            return
        self._complained.discard(key)
        self._waiting_of[device] += 1
        self._requests.put_nowait((device, request))

    async def _work_on_requests(self) -> None:
        while True:
            device, request = await self._requests.get()
            try:
                await self._serve(device, request)
            except LinkError as error:
                _log.debug("an answer to %s was lost: %s", device, error)
            finally:
                self._waiting_of[device] -= 1
                if not self._waiting_of[device]:
                    del self._waiting_of[device]

    async def _serve(self, device: str, request: link_pb2.Request) -> None:
        try:
            answer = await self._answer_to(device, request)
        except LinkError:
            raise
        except HedgerowError as error:
            code = next((code for kind, code in _CODES if isinstance(error, kind)), link_pb2.Refusal.INTERNAL)
            answer = link_pb2.Response(refusal=link_pb2.Refusal(code=code, message=str(error)))
        except Exception:  # noqa: BLE001 (whatever one request runs into, the others must still be answered)
            _log.exception("request %r of %s", request.id[:64], device)
            answer = link_pb2.Response(
                refusal=link_pb2.Refusal(code=link_pb2.Refusal.INTERNAL, message="the fleet failed; see its log")
            )
        if answer is not None:
            await self._send(device, request, answer)

    async def _answer_to(self, device: str, request: link_pb2.Request) -> link_pb2.Response | None:
        """The one answer to `request`, or None where it has been answered in pieces."""
        match request.WhichOneof("ask"):
            case "metadata":
                return link_pb2.Response(metadata=await asyncio.to_thread(self._metadata, device, request.metadata))
            case "chunks":
                await self._send_chunks(device, request)
                return None
            case "samples":
                return link_pb2.Response(receipt=await asyncio.to_thread(self._keep, device, request.samples))
            case _:
                raise InvalidInput("the request asks for nothing that this fleet knows")

    async def _send(self, device: str, request: link_pb2.Request, answer: link_pb2.Response) -> None:
        answer.id = request.id
        await self._link.publish(self._topics.response(device), answer.SerializeToString())

    def _metadata(self, device: str, ask: link_pb2.MetadataRequest) -> link_pb2.Metadata:
        match ask.repository:
            case link_pb2.RELEASE:
                content = self._releases.metadata(ask.name)
            case link_pb2.DIRECTOR:
                content = self._director.metadata(device, ask.name)
            case _:
                raise InvalidInput("metadata is of the release repository or of the director")
        return link_pb2.Metadata(absent=content is None, content=content or b"")

    async def _send_chunks(self, device: str, request: link_pb2.Request) -> None:
        ask = request.chunks
        wanted = await asyncio.to_thread(self._wanted, ask)

        async def send(index: int) -> None:
            content = await asyncio.to_thread(self._blobs.read, ask.sha256, index * ask.chunk_bytes, ask.chunk_bytes)
            chunk = link_pb2.Chunk(sha256=ask.sha256, index=index, content=content)
            await self._send(device, request, link_pb2.Response(chunk=chunk))

        try:
            async with asyncio.TaskGroup() as group:  # side by side: one would wait for the broker each time
                for index in wanted:
                    group.create_task(send(index))
        except ExceptionGroup as group_error:  # one answer tells of one error: the first is as good as any
            raise group_error.exceptions[0] from group_error

    def _wanted(self, ask: link_pb2.ChunkRequest) -> list[int]:
        """The chunks to send for `ask`, checked against the file's size."""
        if not 1 <= ask.chunk_bytes <= MAX_CHUNK_BYTES:
            raise InvalidInput(f"chunks of {ask.chunk_bytes} bytes: must be 1 to {MAX_CHUNK_BYTES}")
        if not 1 <= ask.window <= MAX_WINDOW:
            raise InvalidInput(f"a window of {ask.window} chunks: must be 1 to {MAX_WINDOW}")
        size = self._store.blob_bytes(ask.sha256) if _DIGEST.fullmatch(ask.sha256) else None
        if size is None:
            raise NotFound(f"no file with sha256 {ask.sha256[:12]}… is published")
        count = -(-size // ask.chunk_bytes)
        bits = int.from_bytes(ask.missing, "little") if len(ask.missing) <= count // 8 + 1 else -1
        if bits < 0 or bits.bit_length() > count:
            raise InvalidInput(f"the bitmap of missing chunks does not fit a file of {count} chunks")
        wanted: list[int] = []
        while bits and len(wanted) < ask.window:
            lowest = bits & -bits
            wanted.append(lowest.bit_length() - 1)
            bits ^= lowest
        return wanted

    def _keep(self, device: str, upload: link_pb2.SampleUpload) -> link_pb2.SampleReceipt:
        if not 1 <= len(upload.samples) <= MAX_SAMPLES:
            raise InvalidInput(f"{len(upload.samples)} samples: must be 1 to {MAX_SAMPLES}")
        if not 1 <= len(upload.model) <= 64:
            raise InvalidInput("the samples' model has no name, or one of more than 64 characters")
        for sample in upload.samples:
            if not _DIGEST.fullmatch(sample.digest):
                raise InvalidInput("a sample's digest is not a hex SHA-256")
        return link_pb2.SampleReceipt(digests=self._store.add_samples(device, upload.model, upload.samples))

    def _device_of(self, topic: str) -> str:
        """The device that a message came from; empty for one whose id could not be a device's."""
        try:
            return self._topics.device_of(topic)
        except LinkError as error:
            self._complain(("", "message"), f"is dropped, and so are others like it: {error}")
            return ""

    def _read(self, kind: type[M], payload: bytes) -> M:
        try:
            return kind.FromString(payload)
        except DecodeError as error:
            raise InvalidInput(f"{len(payload)} bytes are no {kind.DESCRIPTOR.name}") from error

    def _complain(self, key: tuple[str, str], problem: str) -> None:
        if key not in self._complained and len(self._complained) < MAX_COMPLAINTS:
            self._complained.add(key)
            _log.warning("a %s of %s %s", key[1], key[0], problem)
