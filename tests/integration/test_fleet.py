"""The fleet service for real: uploads that must not count, devices that lie or babble, ends in the middle."""

import asyncio
import hashlib
import random
import re
import subprocess
import sys
from pathlib import Path

import grpc
import pytest
from simulators.background import in_background
from simulators.brokers import Broker
from simulators.fleet import Device, Fleet, until
from tuf.api.metadata import Metadata, Targets

from hedgerow import release
from hedgerow.errors import HedgerowError, InvalidInput, NotFound
from hedgerow.proto import fleet_pb2, fleet_pb2_grpc
from hedgerow.proto.link_pb2 import ChunkRequest, Command, ModelStatus, Request, Sample, SampleUpload, Status
from hedgerow_cloud.local.broker import free_port
from hedgerow_cloud.publish import keys, provision
from hedgerow_cloud.publish.repository import ManifestEntry, sign_targets

CONTENT = random.Random(1).randbytes(200_000)
Part = fleet_pb2.PublishRequest


async def test_a_release_travels_from_the_publisher_to_the_device_that_it_is_assigned_to(
    broker: Broker, tmp_path: Path
) -> None:
    async with Fleet(tmp_path, broker.port).running() as fleet, Device(fleet, "edge-1").running() as device:
        await asyncio.to_thread(fleet.publish, 1, CONTENT)
        await until(lambda: asyncio.to_thread(fleet.client.devices))
        assert await device.trust.refresh() == ()
        assert await asyncio.to_thread(fleet.client.assign, "digits", 1) == ["edge-1"]
        command = await asyncio.wait_for(device.commands.get(), 5)
        assert command.kind == Command.CHECK
        (assigned,) = await device.trust.refresh()
        manifest = await device.transfer.manifest(assigned)
        await device.transfer.fetch(manifest.files[0], tmp_path / "fetched.onnx")
        assert (tmp_path / "fetched.onnx").read_bytes() == CONTENT

        def watched() -> list[fleet_pb2.Device]:
            seen = []
            for state in fleet.client.watch("edge-1", 10):
                seen.append(state)
                if state.models:
                    break
            return seen

        async with asyncio.TaskGroup() as group:
            watching = group.create_task(asyncio.to_thread(watched))
            running = ModelStatus(model="digits", running=1, running_manifest=assigned.manifest_sha256)
            status = Status(session=1, serial=1, online=True, models=[running])
            await device.link.publish(device.topics.status("edge-1"), status.SerializeToString(), retain=True)
        last = watching.result()[-1]
        assert (last.id, last.online, last.profile) == ("edge-1", True, "cpu"), "the topic says who it is"
        assert [(item.model, item.counter) for item in last.assigned] == [("digits", 1)]
        (listed,) = await asyncio.to_thread(fleet.client.releases)
        assert (listed.assigned, listed.running, listed.bytes) == (1, 1, len(CONTENT))


async def test_what_was_assigned_while_the_broker_was_away_is_said_when_it_is_back(
    broker: Broker, tmp_path: Path
) -> None:
    async with Fleet(tmp_path, broker.port).running() as fleet, Device(fleet, "edge-1").running() as device:
        await asyncio.to_thread(fleet.publish, 1, CONTENT)
        await until(lambda: asyncio.to_thread(fleet.client.devices))
        await broker.kill()
        await asyncio.to_thread(fleet.client.assign, "digits", 1)
        assert device.commands.empty()
        await broker.start()
        command = await asyncio.wait_for(device.commands.get(), 40)
        assert command.serial == 1
        (assigned,) = await device.trust.refresh()
        assert assigned.name == "digits/1"


async def test_what_a_device_asks_for_wrongly_is_refused_and_babble_is_dropped(tmp_path: Path, broker: Broker) -> None:
    async with Fleet(tmp_path, broker.port).running() as fleet, Device(fleet, "edge-1").running() as device:
        await asyncio.to_thread(fleet.publish, 1, CONTENT)
        for topic in (device.topics.request("edge-1"), device.topics.birth("edge-1"), device.topics.status("edge-1")):
            await device.link.publish(topic, b"\xff\xff\xff babble")
        (blob,) = {path.name for path in (fleet.home / "blobs").iterdir() if path.read_bytes() == CONTENT}
        (fleet.home / "blobs" / ("e" * 64)).write_bytes(b"here, and not published")
        good = ChunkRequest(sha256=blob, chunk_bytes=48 * 1024, missing=b"\x1f", window=8)
        faults: list[tuple[ChunkRequest, type[HedgerowError], str]] = [
            (ChunkRequest(sha256="e" * 64, chunk_bytes=1024, missing=b"\1", window=1), NotFound, "published"),
            (ChunkRequest(sha256="../fleet.db", chunk_bytes=1024, missing=b"\1", window=1), NotFound, "published"),
            (ChunkRequest(sha256=blob, chunk_bytes=2**20, missing=b"\1", window=1), InvalidInput, "chunks of 1048576"),
            (ChunkRequest(sha256=blob, chunk_bytes=0, missing=b"\1", window=1), InvalidInput, "chunks of 0"),
            (ChunkRequest(sha256=blob, chunk_bytes=1024, missing=b"\1", window=9999), InvalidInput, "window of 9999"),
            (ChunkRequest(sha256=blob, chunk_bytes=48 * 1024, missing=b"\x20", window=1), InvalidInput, "5 chunks"),
            (ChunkRequest(sha256=blob, chunk_bytes=48 * 1024, missing=b"\1" * 9, window=1), InvalidInput, "5 chunks"),
        ]
        for ask, error, named in faults:
            with pytest.raises(error, match=named):
                await device.exchange.ask(Request(chunks=ask), 5)
        with pytest.raises(InvalidInput, match="nothing that this fleet knows"):
            await device.exchange.ask(Request(), 5)
        assert await device.exchange.metadata("release", "../../fleet.db") is None
        assert await device.exchange.metadata("director", "9.root.json") is None
        chunks = {chunk.index: chunk.content async for chunk in device.exchange.chunks(good, 5)}
        assert b"".join(chunks[index] for index in range(5)) == CONTENT


async def test_samples_are_stored_once_and_listed_in_order(broker: Broker, tmp_path: Path) -> None:
    samples = [Sample(digest=f"{number:064x}", request=bytes([number]) * 100) for number in range(5)]
    async with Fleet(tmp_path, broker.port).running() as fleet, Device(fleet, "edge-1").running() as device:
        for batch in (samples[:3], samples[1:]):
            answer = await device.exchange.ask(Request(samples=SampleUpload(model="digits", samples=batch)), 5)
            assert list(answer.receipt.digests) == [sample.digest for sample in batch]
        assert await asyncio.to_thread(lambda: list(fleet.client.samples("digits"))) == samples
        with pytest.raises(InvalidInput, match="digest"):
            await device.exchange.ask(
                Request(samples=SampleUpload(model="digits", samples=[Sample(digest="short")])), 5
            )


# Uploads need no broker: nobody listens at its port here.


def parts(fleet: Fleet, folder: Path, targets: bytes | None = None) -> list[Part]:
    """A whole and good upload."""
    manifest = release.read(folder)
    paths = [release.MANIFEST, *(file.path for file in manifest.files)]
    files = [
        fleet_pb2.FilePart(path=f"{manifest.name}/{path}", content=(folder / path).read_bytes(), last=True)
        for path in paths
    ]
    return [*(Part(file=file) for file in files), Part(targets=targets or fleet.sign(folder))]


def send(fleet: Fleet, upload: list[Part]) -> tuple[grpc.StatusCode, str]:
    """Upload; the status, and what was said with it."""
    with grpc.insecure_channel(fleet.target) as channel:
        try:
            fleet_pb2_grpc.FleetStub(channel).Publish(iter(upload), timeout=10)
        except grpc.RpcError as error:
            return error.code(), error.details() or ""
    return grpc.StatusCode.OK, ""


def missing_file(fleet: Fleet, folder: Path) -> list[Part]:
    upload = parts(fleet, folder)
    del upload[1]
    return upload


def wrong_digest(fleet: Fleet, folder: Path) -> list[Part]:
    upload = parts(fleet, folder)
    content = bytearray(upload[1].file.content)
    content[50_000] ^= 1
    upload[1].file.content = bytes(content)
    return upload


def file_too_many(fleet: Fleet, folder: Path) -> list[Part]:
    upload = parts(fleet, folder)
    extra = fleet_pb2.FilePart(path="digits/2/extra.onnx", content=b"x", last=True)
    return [Part(file=extra), *upload]


def out_of_the_folder(fleet: Fleet, folder: Path) -> list[Part]:
    extra = fleet_pb2.FilePart(path="digits/2/../../../../evil", content=b"x", last=True)
    return [Part(file=extra), *parts(fleet, folder)]


def two_releases(fleet: Fleet, folder: Path) -> list[Part]:
    extra = fleet_pb2.FilePart(path="digits/3/student.onnx", content=b"x", last=True)
    return [*parts(fleet, folder)[:2], Part(file=extra)]


def half_a_file(fleet: Fleet, folder: Path) -> list[Part]:
    upload = parts(fleet, folder)
    upload[1].file.last = False
    return upload


def no_targets(fleet: Fleet, folder: Path) -> list[Part]:
    return parts(fleet, folder)[:-1]


def no_manifest(fleet: Fleet, folder: Path) -> list[Part]:
    return parts(fleet, folder)[1:]


def targets_of_strangers(fleet: Fleet, folder: Path) -> list[Part]:
    targets = fleet.sign(folder)
    key = keys.generate(fleet.folder / "stolen", "releases")
    metadata: Metadata[Targets] = Metadata.from_bytes(targets)
    metadata.sign(key)
    return parts(fleet, folder, metadata.to_bytes())


def targets_without_it(fleet: Fleet, folder: Path) -> list[Part]:
    return parts(fleet, folder, fleet.client.metadata("targets.json"))


def targets_of_more(fleet: Fleet, folder: Path) -> list[Part]:
    root, key = (fleet.keys / provision.RELEASE_ROOT).read_bytes(), keys.load(fleet.keys, "releases")
    entries = [ManifestEntry.of((folder / release.MANIFEST).read_bytes()), ManifestEntry("digits", 9, "a" * 64, 9)]
    return parts(fleet, folder, sign_targets(root, fleet.client.metadata("targets.json"), entries, [key]))


def babble(fleet: Fleet, folder: Path) -> list[Part]:
    return [*parts(fleet, folder)[:-1], Part(targets=b"no json")]


def too_large(fleet: Fleet, folder: Path) -> list[Part]:
    upload = parts(fleet, folder)
    part = fleet_pb2.FilePart(path="digits/2/student.onnx", content=bytes(2**20), last=False)
    return [upload[0], *(Part(file=part) for _ in range(5))]


BROKEN = {
    missing_file: "student.onnx is missing",
    wrong_digest: "has sha256",
    file_too_many: "extra.onnx is not in the manifest",
    out_of_the_folder: "is not a target path",
    two_releases: "is not of release digits/2",
    half_a_file: "before the last part|is not complete",
    no_targets: "without the signed targets",
    no_manifest: "manifest.json is missing",
    targets_of_strangers: "not signed by enough",
    targets_without_it: "do not list digits/2",
    targets_of_more: "disagree with what is published: digits/9",
    babble: "cannot be read",
    too_large: "more than 4194304 bytes",
}


def state(fleet: Fleet) -> dict[str, bytes]:
    """All that an upload may change, apart from the database."""
    return {
        str(path.relative_to(fleet.home)): path.read_bytes()
        for folder in ("blobs", "release", "incoming")
        for path in (fleet.home / folder).rglob("*")
        if path.is_file()
    }


def test_a_broken_upload_is_refused_with_its_fault_and_leaves_nothing(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path, free_port())
    fleet.extra = "max_release_bytes = 4194304"
    with in_background(fleet.running):
        fleet.publish(1, CONTENT)
        folder = fleet.release(2, {"student.onnx": CONTENT[::-1]})
        before = state(fleet)
        for fault, said in BROKEN.items():
            code, details = send(fleet, fault(fleet, folder))
            assert code in {grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.INVALID_ARGUMENT}, fault.__name__
            assert re.search(said, details), f"{fault.__name__}: {details}"
            assert state(fleet) == before, fault.__name__
        assert [item.counter for item in fleet.client.releases()] == [1]
        assert send(fleet, parts(fleet, folder)) == (grpc.StatusCode.OK, "")


def test_a_counter_is_never_used_twice(tmp_path: Path) -> None:
    with in_background(Fleet(tmp_path, free_port()).running) as fleet:
        fleet.publish(1, CONTENT)
        before = state(fleet)
        other = fleet.release(1, {"student.onnx": CONTENT[::-1]})
        with pytest.raises(HedgerowError, match="digits/1 is signed already"):
            fleet.sign(other)
        code, details = send(fleet, parts(fleet, other, b'{"signed":{"targets":{}}}'))
        assert code is grpc.StatusCode.FAILED_PRECONDITION
        assert "other content; a new release needs a higher counter" in details
        assert state(fleet) == before


def test_an_end_between_the_signature_and_the_database_is_made_good_at_the_next_start(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path, free_port())
    with in_background(fleet.running):
        fleet.publish(1, CONTENT)
        folder = fleet.release(2, {"student.onnx": CONTENT[::-1]})
        targets = fleet.sign(folder)
    for path in (folder / release.MANIFEST, folder / "student.onnx"):
        content = path.read_bytes()
        (fleet.home / "blobs" / hashlib.sha256(content).hexdigest()).write_bytes(content)
    provision.open_repositories(fleet.home)[0].accept(targets)
    (fleet.home / "blobs" / ("f" * 64)).write_bytes(b"of an upload that came to nothing")
    (fleet.home / "incoming" / "left").mkdir()
    with in_background(fleet.running):
        assert [item.counter for item in fleet.client.releases()] == [1, 2]
        assert not (fleet.home / "blobs" / ("f" * 64)).exists()
        assert not list((fleet.home / "incoming").iterdir())


def test_a_second_service_leaves_the_first_ones_uploads_alone(tmp_path: Path) -> None:
    with in_background(Fleet(tmp_path, free_port()).running) as fleet:
        (fleet.home / "incoming" / "upload").mkdir()
        command = [sys.executable, "-m", "hedgerow_cloud.daemons", "fleet", "--config", str(tmp_path / "fleet.toml")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
        assert done.returncode == 2
        assert "another fleet service uses" in done.stderr
        assert (fleet.home / "incoming" / "upload").exists()


def test_a_home_that_was_never_made_is_a_setting_error_that_says_how(tmp_path: Path) -> None:
    (tmp_path / "fleet.toml").write_text(f'home = "{tmp_path / "home"}"\n')
    command = [sys.executable, "-m", "hedgerow_cloud.daemons", "fleet", "--config", str(tmp_path / "fleet.toml")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 2
    assert "hedgerow keys init" in done.stderr
    assert "Traceback" not in done.stderr
