"""A device's questions over real brokers: metadata, a release's bytes, refusals, and a broker that dies in between."""

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest
from simulators import brokers
from simulators.publisher import Publisher

from hedgerow.errors import InvalidInput, LinkError, NotFound, Overloaded
from hedgerow.link import Link, Topics
from hedgerow.proto.link_pb2 import (
    Chunk,
    ChunkRequest,
    Metadata,
    MetadataRequest,
    Refusal,
    Repository,
    Request,
    Response,
)
from hedgerow.release import CHUNK_BYTES
from hedgerow_edge.exchange import Exchange
from hedgerow_edge.transfer import Transfer, bitmap
from hedgerow_edge.trust import Trust

TOPICS = Topics("test")
CONTENT = random.Random(5).randbytes(8 * 2**20 + 77)
WAIT_S = 30


class Fleet:
    """The smallest thing that answers devices as the fleet does."""

    def __init__(self, link: Link, publisher: Publisher) -> None:
        self._link = link
        self._publisher = publisher
        self._requests: asyncio.Queue[tuple[str, Request]] = asyncio.Queue()
        self.served: list[Request] = []
        link.subscribe(TOPICS.request("+"), self._take)

    def _take(self, topic: str, payload: bytes, _retained: bool) -> None:
        self._requests.put_nowait((TOPICS.device_of(topic), Request.FromString(payload)))

    async def run(self) -> None:
        while True:
            device, request = await self._requests.get()
            self.served.append(request)
            with suppress(LinkError):  # the device asks again
                for answer in self._answers(device, request):
                    answer.id = request.id
                    await self._link.publish(TOPICS.response(device), answer.SerializeToString())

    def _answers(self, device: str, request: Request) -> list[Response]:
        if request.HasField("metadata"):
            name = "release" if request.metadata.repository == Repository.RELEASE else "director"
            content = self._publisher.metadata(device, name, request.metadata.name)
            return [Response(metadata=Metadata(absent=content is None, content=content or b""))]
        try:
            return [Response(chunk=chunk) for chunk in self._publisher.chunks(request.chunks)]
        except NotFound as error:
            return [Response(refusal=Refusal(code=Refusal.NOT_FOUND, message=str(error)))]


class Floor:
    def floor(self, name: str) -> int:
        return 0

    def raise_floor(self, versions: Mapping[str, int]) -> None:
        assert all(versions.values())


@asynccontextmanager
async def device_and_fleet(broker: brokers.Broker, publisher: Publisher) -> AsyncIterator[tuple[Exchange, Fleet]]:
    near, far = (Link(brokers.settings(broker), name, reconnect_max_s=0.3) for name in ("edge-1", "fleet"))
    exchange, fleet = Exchange(near, TOPICS, "edge-1", lambda: 41), Fleet(far, publisher)
    async with asyncio.TaskGroup() as tasks:
        running = [tasks.create_task(work) for work in (near.run(), far.run(), fleet.run())]
        async with asyncio.timeout(WAIT_S):
            await near.wait_connected()
            await far.wait_connected()
        yield exchange, fleet
        for task in running:
            task.cancel()


@pytest.fixture
def publisher(tmp_path: Path) -> Publisher:
    return Publisher(tmp_path / "fleet")


async def test_a_release_arrives_over_the_link_although_the_broker_dies_halfway(
    broker: brokers.Broker, publisher: Publisher, tmp_path: Path
) -> None:
    publisher.director.assign("edge-1", [publisher.publish("digits", 1, CONTENT, b"probes")])
    restarted = False

    async def restart() -> None:
        await broker.kill()
        await broker.start()

    async with device_and_fleet(broker, publisher) as (exchange, fleet), asyncio.timeout(WAIT_S):
        roots = publisher.releases.root, publisher.director.root
        (assigned,) = await Trust(tmp_path / "trust", "edge-1", exchange, Floor(), *roots).refresh()
        one = Transfer(tmp_path / "parts", exchange, chunk_timeout_s=1)
        manifest = await one.manifest(assigned)
        before = one.counts.fetched
        async with asyncio.TaskGroup() as tasks:

            def progress(done: int, total: int) -> None:
                nonlocal restarted
                if done > total / 2 and not restarted:
                    restarted = True
                    tasks.create_task(restart())

            await one.fetch(manifest.files[0], tmp_path / "0.onnx", progress)
        assert restarted
        assert (tmp_path / "0.onnx").read_bytes() == CONTENT
        assert one.counts.fetched - before - one.counts.refetched == len(CONTENT)
        assert one.counts.refetched < 0.02 * len(CONTENT)
        assert {request.session for request in fleet.served} == {41}
        assert len({request.id for request in fleet.served}) == len(fleet.served)


async def test_absent_is_an_answer_silence_is_not_and_refusals_keep_their_reason(
    broker: brokers.Broker, publisher: Publisher, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with device_and_fleet(broker, publisher) as (exchange, fleet), asyncio.timeout(WAIT_S):
        assert await exchange.metadata("release", "2.root.json") is None
        assert await exchange.metadata("release", "1.root.json") == publisher.releases.root
        unknown = ChunkRequest(sha256="ab" * 32, chunk_bytes=CHUNK_BYTES, missing=bitmap({0}), window=1)
        with pytest.raises(NotFound, match="the fleet refused: no file with sha256 abababababab"):
            async for _ in exchange.chunks(unknown):
                pass
        for code, kind in ((Refusal.INVALID, InvalidInput), (Refusal.BUSY, Overloaded), (Refusal.INTERNAL, LinkError)):
            answer = Response(refusal=Refusal(code=code, message="because"))
            monkeypatch.setattr(fleet, "_answers", lambda *_, answer=answer: [answer])
            with pytest.raises(kind, match="the fleet refused: because"):
                await exchange.ask(Request(metadata=MetadataRequest(name="x")))
        monkeypatch.setattr(fleet, "_answers", lambda *_: [])
        with pytest.raises(LinkError, match=r"did not answer within 0\.2 s"):
            await exchange.ask(Request(metadata=MetadataRequest(name="x")), timeout_s=0.2)


async def test_when_the_connection_ends_whoever_waits_for_an_answer_is_told_at_once(
    broker: brokers.Broker, publisher: Publisher
) -> None:
    async def outcome(asking: Awaitable[object]) -> LinkError | None:
        try:
            await asking
        except LinkError as error:
            return error
        return None

    publisher.files["ef" * 32] = CONTENT
    request = ChunkRequest(sha256="ef" * 32, chunk_bytes=4, missing=bitmap(range(3)), window=3)
    came: list[Chunk] = []
    some = asyncio.Event()

    async def take(exchange: Exchange) -> None:
        async for chunk in exchange.chunks(request, timeout_s=600):
            came.append(chunk)
            some.set()

    async with device_and_fleet(broker, publisher) as (exchange, fleet), asyncio.timeout(WAIT_S):
        answers = fleet._answers
        fleet._answers = lambda *asked: answers(*asked)[:1] if asked[1].HasField("chunks") else []  # type: ignore[method-assign]
        async with asyncio.TaskGroup() as tasks:
            waiting = [
                tasks.create_task(outcome(exchange.ask(Request(metadata=MetadataRequest(name="x")), timeout_s=600))),
                tasks.create_task(outcome(take(exchange))),
            ]
            await some.wait()
            while len(fleet.served) < len(waiting):  # noqa: ASYNC110 (nobody tells)
                await asyncio.sleep(0.01)
            await broker.kill()
        assert ["connection ended" in str(task.result()) for task in waiting] == [True, True]
        assert len(came) == 1
        await broker.start()
        fleet._answers = answers  # type: ignore[method-assign]
        await exchange.ready()
        await fleet._link.wait_connected()
        assert await exchange.metadata("release", "1.root.json") == publisher.releases.root


async def test_late_chunks_still_count_and_garbage_does_not(broker: brokers.Broker, publisher: Publisher) -> None:
    async with device_and_fleet(broker, publisher) as (exchange, fleet), asyncio.timeout(WAIT_S):
        late = Response(id="of an earlier request", chunk=Chunk(sha256="cd" * 32, index=3, content=b"late"))

        async def send_late() -> None:
            for payload in (b"\xff\xff garbage", b"", late.SerializeToString()):
                await fleet._link.publish(TOPICS.response("edge-1"), payload)

        fleet._answers = lambda *_: []  # type: ignore[method-assign]
        request = ChunkRequest(sha256="cd" * 32, chunk_bytes=4, missing=bitmap({3}), window=1)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(send_late())
            assert [chunk.content async for chunk in exchange.chunks(request, timeout_s=5)] == [b"late"]
