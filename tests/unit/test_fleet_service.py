"""What a failing disk, a second process or two callers at once must not do to a fleet."""

import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

import pytest
from simulators.fleet import Fleet

from hedgerow import release
from hedgerow.config import BrokerSettings
from hedgerow.link import Link, Topics
from hedgerow.proto import link_pb2
from hedgerow_cloud.fleet.blobs import Blobs
from hedgerow_cloud.fleet.distribute import Distributor
from hedgerow_cloud.fleet.intake import Intake
from hedgerow_cloud.fleet.service import FleetService
from hedgerow_cloud.fleet.store import Store
from hedgerow_cloud.publish import provision, repository


class Rooms:
    """A fleet service in this process, without its server and its link; may be made again over the same folder."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet
        self.releases, self.director = provision.open_repositories(fleet.home)
        self.store = Store(fleet.home / "fleet.db")
        self.link = Link(BrokerSettings(), "fleet")
        blobs = Blobs(fleet.home / "blobs")
        distributor = Distributor(self.link, Topics("home"), self.store, blobs, self.releases, self.director)
        self.service = FleetService(
            store=self.store,
            blobs=blobs,
            releases=self.releases,
            director=self.director,
            distributor=distributor,
            incoming=fleet.home / "incoming",
            max_release_bytes=2**20,
        )

    def publish(self, counter: int) -> None:
        folder = self.fleet.release(counter, {"student.onnx": b"model %d" % counter})
        manifest = (folder / release.MANIFEST).read_bytes()
        current = self.releases.metadata("targets.json")
        assert current is not None
        spool = self.fleet.folder / f"spool-{len(list(self.fleet.folder.iterdir()))}"
        intake = Intake(spool, 2**20)
        for name in ("student.onnx", release.MANIFEST):
            intake.write(f"digits/{counter}/{name}", (folder / name).read_bytes(), last=True)
        self.service._take_in(intake, provision.sign(self.fleet.keys, current, manifest))

    def published(self) -> list[int]:
        return [item.counter for item in self.store.releases()]


@pytest.fixture
def rooms(tmp_path: Path) -> Iterator[Rooms]:
    rooms = Rooms(Fleet(tmp_path, 1))
    rooms.service.recover()
    with closing(rooms.fleet.client), closing(rooms.store):
        yield rooms


def test_nobody_else_can_read_keys_or_samples(rooms: Rooms) -> None:
    for folder in (rooms.fleet.home, rooms.fleet.keys):
        assert folder.stat().st_mode & 0o077 == 0


def test_a_disk_that_fails_just_after_the_signature_counts_costs_no_release(
    rooms: Rooms, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(_: object) -> None:
        raise OSError("Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(repository._MetadataSet, "_prune", failing)
        with pytest.raises(OSError, match="Input/output"):
            rooms.publish(1)
    assert rooms.published() == []
    rooms.service.recover()
    assert rooms.published() == [1]


def test_a_lost_manifest_costs_its_release_only_and_publishing_it_again_heals_it(rooms: Rooms) -> None:
    rooms.publish(1)
    rooms.publish(2)
    sha256 = rooms.store.releases()[0].manifest_sha256
    rooms.store.close()
    (rooms.fleet.home / "fleet.db").unlink()
    (rooms.fleet.home / "blobs" / sha256).unlink()
    with closing((again := Rooms(rooms.fleet)).store):
        again.service.recover()
        assert again.published() == [2]
        again.publish(1)
        assert again.published() == [1, 2]


def test_a_device_whose_metadata_is_damaged_does_not_keep_the_fleet_from_starting_or_others_from_releases(
    rooms: Rooms,
) -> None:
    rooms.publish(1)
    for device in ("edge-1", "edge-2"):
        rooms.store.birth(device, link_pb2.Birth(session=1))
        rooms.director.register(device)
    (rooms.fleet.home / "director" / "devices" / "edge-1" / "1.targets.json").write_bytes(b"{")
    rooms.store.assign(["edge-1", "edge-2"], "digits", 1)
    rooms.service.recover()
    assert [entry.path for entry in rooms.director.assigned("edge-2")] == ["digits/1/manifest.json"]
    assert rooms.service._direct(["edge-1", "edge-2"]) == ["edge-1"]


def test_of_two_assignments_at_once_the_later_one_is_signed_last(rooms: Rooms, monkeypatch: pytest.MonkeyPatch) -> None:
    rooms.publish(1)
    rooms.publish(2)
    rooms.store.birth("edge-1", link_pb2.Birth(session=1))
    rooms.store.assign(["edge-1"], "digits", 1)
    has_read, go_on = threading.Event(), threading.Event()
    assignments = rooms.store.assignments

    def slow(device: str) -> Sequence[tuple[str, int, str, int]]:
        found = assignments(device)
        if not has_read.is_set():
            has_read.set()
            go_on.wait(0.3)
        return found

    monkeypatch.setattr(rooms.store, "assignments", slow)
    first = threading.Thread(target=rooms.service._direct, args=(["edge-1"],))
    first.start()
    has_read.wait(10)
    rooms.store.assign(["edge-1"], "digits", 2)
    rooms.service._direct(["edge-1"])
    go_on.set()
    first.join(10)
    assert [entry.counter for entry in rooms.director.assigned("edge-1")] == [2]


def test_senders_that_no_device_can_be_are_said_once(rooms: Rooms, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        for topic in ("$x/status", "-y/birth", ".z/request", "$x/status"):
            rooms.link._dispatch(f"hedgerow/home/device/{topic}", b"", False)
    assert len(caplog.records) == 1
