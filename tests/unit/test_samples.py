"""What may leave the device as training data."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing
from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace
from simulators import models

from hedgerow.errors import InvalidInput, LinkError
from hedgerow.oip.messages import request_from_proto, request_to_proto
from hedgerow.policies import Privacy
from hedgerow.proto.link_pb2 import Request, Response, Sample, SampleReceipt
from hedgerow.proto.oip_pb2 import ModelInferRequest
from hedgerow.router import Observation
from hedgerow.tensors import InferRequest, InferResponse, tensor
from hedgerow_edge.samples import (
    MAX_MESSAGE_BYTES,
    MAX_PENDING,
    Collector,
    SampleSettings,
    Uploader,
    input_digest,
    to_sample,
)
from hedgerow_edge.store import Outboxed, Store

COLLECT = SampleSettings(collect="escalated", retry_s=0.02)


class Fleet:
    """Takes samples in place of the exchange and the link."""

    connected = True

    def __init__(self) -> None:
        self.messages: list[list[str]] = []
        self.bytes: list[int] = []
        self.stored: list[str] = []
        self.unwanted: set[str] = set()
        self.failures = 0

    async def wait_connected(self) -> None:
        await asyncio.sleep(0)

    async def ask(self, request: Request, timeout_s: float) -> Response:
        if self.failures:
            self.failures -= 1
            raise LinkError("the fleet did not answer")
        digests = [sample.digest for sample in request.samples.samples]
        self.messages.append(digests)
        self.bytes.append(request.ByteSize())
        if self.unwanted & set(digests):
            raise InvalidInput("the fleet refused: what is that?")
        self.stored += digests
        return Response(receipt=SampleReceipt(digests=digests))


def observation(strength: float = 0.5, privacy: Privacy = Privacy.DEFAULT, rows: int = 1) -> Observation:
    def answer(version: str) -> InferResponse:
        outputs = (tensor("logits", np.ones((rows, 10))),)
        return InferResponse(
            model="digits", version=version, id="secret id", outputs=outputs, parameters={"trace": "secret"}
        )

    asked = models.request(models.pixels(*[3] * rows, strength=strength), secret="of the caller")
    return Observation(
        request=replace(asked, id="secret id"),
        edge=answer("4"),
        cloud=answer("9"),
        confidence=0.25,
        privacy=privacy,
    )


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with closing(Store(tmp_path)) as store:
        yield store


@asynccontextmanager
async def running(store: Store, fleet: Fleet, settings: SampleSettings = COLLECT) -> AsyncIterator[Collector]:
    collector = Collector(store, settings)
    uploader = Uploader(store, fleet, fleet, settings, collector.kept)  # type: ignore[arg-type]  # stands for both
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(collector.run()), group.create_task(uploader.run())]
        yield collector
        for task in tasks:
            task.cancel()


async def until_sent(store: Store, fleet: Fleet, count: int) -> None:
    async with asyncio.timeout(10):
        while len(fleet.stored) < count or store.samples_waiting():  # noqa: ASYNC110 (nobody tells)
            await asyncio.sleep(0.01)


def test_nothing_is_kept_unless_the_settings_say_so() -> None:
    assert SampleSettings().collect == "none"


@pytest.mark.parametrize("privacy", [Privacy.NO_LEARNING, Privacy.EDGE_ONLY])
async def test_private_requests_are_never_kept(store: Store, privacy: Privacy) -> None:
    fleet = Fleet()
    async with running(store, fleet) as collector:
        collector.observe(observation(0.1, privacy))
        collector.observe(observation(0.2))
        await until_sent(store, fleet, 1)
    assert fleet.stored == [to_sample(observation(0.2), 0).digest]


async def test_when_collecting_is_switched_off_what_waits_is_deleted_not_sent(store: Store) -> None:
    kept = Collector(store, COLLECT)
    kept._keep([(observation(), 0)])
    assert store.samples_waiting() == 1
    fleet = Fleet()
    async with running(store, fleet, SampleSettings()) as collector:
        collector.observe(observation(0.2))
        await until_sent(store, fleet, 0)
    assert fleet.messages == []


def test_a_sample_holds_the_pair_and_nothing_of_the_caller() -> None:
    sample = to_sample(observation(), 17)
    request = request_from_proto(ModelInferRequest.FromString(sample.request))
    np.testing.assert_array_equal(request.input("pixels"), models.pixels(3, strength=0.5))
    assert (dict(request.parameters), request.id) == ({}, "")
    assert (sample.release, sample.confidence, sample.unix_ms) == ("digits/4", 0.25, 17)
    assert b"secret" not in sample.SerializeToString()


def test_the_digest_is_of_the_inputs_whatever_their_order() -> None:
    def digest(*names: str, shape: tuple[int, ...] = (2, 3), value: float = 1.0) -> str:
        inputs = tuple(tensor(name, np.full(shape, value, np.float32)) for name in names)
        return input_digest(request_to_proto(InferRequest(model="m", inputs=inputs)))

    assert digest("a", "b") == digest("b", "a")
    assert len({digest("a", "b"), digest("a"), digest("a", shape=(3, 2)), digest("a", value=2.0)}) == 4


async def test_messages_stay_under_the_limit_and_each_input_is_sent_once(store: Store) -> None:
    fleet = Fleet()
    async with running(store, fleet) as collector:
        for _ in range(2):
            for number in range(200):
                collector.observe(observation(number / 1000))
            await until_sent(store, fleet, 200)
    assert len(fleet.stored) == len(set(fleet.stored)) == 200
    assert 1 < len(fleet.messages) < 30
    assert max(fleet.bytes) <= MAX_MESSAGE_BYTES


async def test_what_cannot_be_kept_is_dropped_at_once_and_counted(store: Store) -> None:
    collector = Collector(store, COLLECT)
    collector.observe(observation(rows=MAX_MESSAGE_BYTES // 64))
    assert collector.dropped == 1
    for _ in range(MAX_PENDING + 5):
        collector.observe(observation())
    assert collector.dropped == 6
    full = Collector(store, SampleSettings(collect="escalated", max_count=2))
    full._keep([(observation(number / 10), 0) for number in range(5)])
    assert (full.dropped, store.samples_waiting()) == (3, 2)


async def test_a_failed_upload_is_tried_again_and_nothing_is_lost(store: Store) -> None:
    fleet = Fleet()
    fleet.failures = 3
    async with running(store, fleet) as collector:
        collector.observe(observation())
        await until_sent(store, fleet, 1)
    assert len(fleet.messages) == 1


async def test_a_sample_that_the_fleet_will_not_have_does_not_hold_up_the_others(store: Store) -> None:
    fleet = Fleet()
    samples = [to_sample(observation(number / 10), 0) for number in range(5)]
    fleet.unwanted = {samples[2].digest}
    collector = Collector(store, COLLECT)
    collector._keep([(observation(number / 10), 0) for number in range(5)])
    async with running(store, fleet):
        await until_sent(store, fleet, 4)
    assert set(fleet.stored) == {sample.digest for sample in samples} - fleet.unwanted


@pytest.mark.parametrize("content", [b"\xff\xff\xff", Sample(digest="of another").SerializeToString()])
async def test_a_sample_that_rots_in_the_outbox_costs_itself_and_no_other(content: bytes, store: Store) -> None:
    fleet = Fleet()
    store.add_samples([Outboxed("digits", "rotten", content)], max_count=9, max_bytes=10_000)
    async with running(store, fleet) as collector:
        collector.observe(observation())
        await until_sent(store, fleet, 1)
    assert len(fleet.stored) == 1


async def test_a_full_disk_costs_samples_and_nothing_else(store: Store) -> None:
    collector = Collector(store, COLLECT)
    store._database.execute("pragma query_only = on")
    collector._keep([(observation(), 0)])
    assert collector.dropped == 1
    store._database.execute("pragma query_only = off")
    collector._keep([(observation(), 0)])
    assert [Sample.FromString(one.content).digest for one in store.oldest_samples(MAX_MESSAGE_BYTES, 0)] == [
        to_sample(observation(), 0).digest
    ]
