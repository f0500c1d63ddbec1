"""What a device must refuse to run, whoever says so, and what it tells the operator."""

import asyncio
import shutil
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path

import pytest
from simulators.publisher import Publisher, Source
from tuf.api.metadata import Metadata, Root, Targets

from hedgerow.errors import LinkError, UntrustedRelease
from hedgerow_cloud.publish.repository import Director, Lifetimes, ManifestEntry
from hedgerow_edge.trust import Assigned, Trust


class Floor:
    """`VersionFloor` in memory: what a device keeps apart from the metadata files."""

    def __init__(self) -> None:
        self.versions: dict[str, int] = {}

    def floor(self, name: str) -> int:
        return self.versions.get(name, 0)

    def raise_floor(self, versions: Mapping[str, int]) -> None:
        self.versions |= {name: max(version, self.floor(name)) for name, version in versions.items()}


class Device:
    def __init__(self, folder: Path, publisher: Publisher, name: str = "edge-1") -> None:
        self.folder = folder
        self.source, self.floor = Source(publisher, name), Floor()
        self.roots = publisher.releases.root, publisher.director.root
        self.trust = self.restarted()

    def restarted(self) -> Trust:
        self.trust = Trust(self.folder, self.source.device, self.source, self.floor, *self.roots)
        return self.trust

    async def refused(self) -> str:
        with pytest.raises(UntrustedRelease) as refusal:
            await self.trust.refresh()
        return str(refusal.value)


@pytest.fixture
def publisher(tmp_path: Path) -> Publisher:
    return Publisher(tmp_path / "fleet")


@pytest.fixture
def device(tmp_path: Path, publisher: Publisher) -> Device:
    publisher.director.register("edge-1")
    return Device(tmp_path / "device", publisher)


def backup(publisher: Publisher) -> Path:
    """The repositories as they are now, for a replay."""
    copy = publisher.folder.with_name("old")
    for name in ("release", "director"):
        shutil.copytree(publisher.folder / name, copy / name)
    return copy


def replay(publisher: Publisher, old: Path, *names: str) -> None:
    for name in names:
        shutil.rmtree(publisher.folder / name)
        shutil.copytree(old / name, publisher.folder / name)


async def test_what_both_repositories_agree_on_is_assigned(device: Device, publisher: Publisher) -> None:
    assert await device.trust.refresh() == ()
    first, other = publisher.publish("digits", 1), publisher.publish("other", 4)
    publisher.publish("digits", 2)
    assert await device.trust.refresh() == ()  # valid is not assigned
    publisher.director.assign("edge-1", [first, other])
    expected = (Assigned("digits", 1, first.sha256, first.size), Assigned("other", 4, other.sha256, other.size))
    assert await device.trust.refresh() == expected
    device.source.asked.clear()
    assert await device.restarted().refresh() == expected
    assert device.source.asked == [  # nothing new: four small questions
        "director/2.root.json",
        "director/timestamp.json",
        "release/2.root.json",
        "release/timestamp.json",
    ]


@pytest.mark.parametrize("lost", [False, True], ids=["metadata kept", "metadata lost"])
@pytest.mark.parametrize("repository", ["release", "director"])
async def test_a_replayed_repository_is_refused_even_after_the_metadata_was_lost(
    device: Device, publisher: Publisher, repository: str, lost: bool
) -> None:
    first = publisher.publish("digits", 1)
    publisher.director.assign("edge-1", [first])
    old = backup(publisher)
    publisher.director.assign("edge-1", [publisher.publish("digits", 2)])
    await device.trust.refresh()
    if lost:
        shutil.rmtree(device.folder)
    replay(publisher, old, repository)
    device.restarted()
    whose = {"release": "the release repository", "director": "the director"}[repository]
    assert await device.refused() == (
        f"{whose}'s timestamp is version 2, this device has already seen version 3: replayed"
    )


@pytest.mark.parametrize("damage", ["torn", "deleted"])
async def test_torn_metadata_heals_from_an_honest_source(device: Device, publisher: Publisher, damage: str) -> None:
    publisher.director.assign("edge-1", [publisher.publish("digits", 1)])
    expected = await device.trust.refresh()
    for path in device.folder.rglob("*.json"):
        if damage == "torn":
            path.write_bytes(path.read_bytes()[:100])
        else:
            path.unlink()
    assert await device.restarted().refresh() == expected


async def test_a_release_for_another_device_is_refused(device: Device, publisher: Publisher) -> None:
    publisher.director.assign("edge-2", [publisher.publish("digits", 1)])
    device.source.tamper = lambda repository, name, content: (
        publisher.director.metadata("edge-2", name) if repository == "director" else content
    )
    assert await device.refused() == "the director assigns digits/1 to device 'edge-2', this device is 'edge-1'"


async def test_a_stolen_director_key_cannot_bring_in_a_release(device: Device, publisher: Publisher) -> None:
    valid = publisher.publish("digits", 1)
    publisher.director.assign("edge-1", [ManifestEntry("digits", 2, "ab" * 32, 99)])
    assert await device.refused() == "the director assigns digits/2, which the release repository does not know"
    publisher.director.assign("edge-1", [ManifestEntry("digits", 1, "ab" * 32, valid.size)])
    assert await device.refused() == "the director and the release repository disagree on what digits/1 is"


async def test_a_stolen_online_key_of_the_release_repository_cannot_either(
    device: Device, publisher: Publisher
) -> None:
    publisher.director.assign("edge-1", [publisher.publish("digits", 1)])
    content = publisher.releases.metadata("targets.json")
    assert content is not None
    forged = Metadata[Targets].from_bytes(content)
    forged.signed.version += 1
    forged.signed.targets["digits/2/manifest.json"] = ManifestEntry("digits", 2, "ab" * 32, 99).target(
        model="digits", counter=2
    )
    forged.sign(publisher.key("online"))
    publisher.releases._set.commit(forged)  # past the repository's own check
    assert "the release repository's targets is not signed by the keys that this device trusts" in (
        await device.refused()
    )


async def test_a_release_below_a_confirmed_one_is_refused(device: Device, publisher: Publisher) -> None:
    first, second = publisher.publish("digits", 1), publisher.publish("digits", 2)
    publisher.director.assign("edge-1", [second])
    await device.trust.refresh()
    device.floor.raise_floor({"digits": 2})
    publisher.director.assign("edge-1", [first])
    assert await device.refused() == (
        "the director assigns digits/1, this device has already confirmed digits/2: rolled back; "
        "what is to run again needs a new release with a higher counter"
    )


async def test_mixed_and_tampered_metadata_is_refused(device: Device, publisher: Publisher) -> None:
    publisher.director.assign("edge-1", [publisher.publish("digits", 1)])
    old = {name: publisher.releases.metadata(f"2.{name}.json") for name in ("snapshot", "targets")}
    publisher.publish("digits", 2)
    for name in ("timestamp", "2.snapshot", "2.targets"):
        device.source.tamper = lambda repository, asked, honest, name=name: (  # type: ignore[misc]
            honest.replace(b'"version":', b'"version":1')
            if (repository, asked) == ("director", f"{name}.json")
            else honest
        )
        reason = await device.refused()
        assert f"the director's {name[-9:].lstrip('.2')}" in reason.replace("2.", ""), reason
    for name, content in old.items():
        assert content is not None
        device.source.tamper = lambda repository, asked, honest, name=name, content=content: (  # type: ignore[misc]
            content if (repository, asked) == ("release", f"3.{name}.json") else honest
        )
        assert f"the release repository's {name} is not what its metadata says, mixed" in await device.refused()
    device.source.tamper = lambda _repository, _name, honest: honest
    assert len(await device.trust.refresh()) == 1


async def test_endless_or_empty_metadata_is_refused(device: Device) -> None:
    for junk, words in ((b"x" * 2**20, "larger than allowed"), (b"", "cannot be used"), (b"[]", "cannot be used")):
        device.source.tamper = lambda _repository, name, honest, junk=junk: junk if "timestamp" in name else honest  # type: ignore[misc]
        assert words in await device.refused()


async def test_before_anything_was_said_to_a_device_nothing_is_assigned_and_afterwards_it_cannot_be_unsaid(
    tmp_path: Path, publisher: Publisher
) -> None:
    device = Device(tmp_path / "device", publisher)  # unknown to the director
    assert await device.trust.refresh() == ()
    publisher.director.assign("edge-1", [publisher.publish("digits", 1)])
    assert len(await device.trust.refresh()) == 1
    shutil.rmtree(publisher.folder / "director" / "devices")
    assert await device.refused() == "the director has no timestamp.json any more"


async def test_expired_metadata_is_refused_and_says_that_the_clock_may_be_wrong(tmp_path: Path) -> None:
    publisher = Publisher(tmp_path / "fleet", Lifetimes(timestamp=timedelta(seconds=-60)))
    publisher.director.register("edge-1")
    reason = await Device(tmp_path / "device", publisher).refused()
    assert reason.startswith("the director's timestamp expired at 20")
    assert "it is frozen, or the clock of this device" in reason


async def test_silence_is_the_links_error_and_giving_up_ends_the_thread(device: Device) -> None:
    device.source.silent = True
    with pytest.raises(LinkError, match="did not answer"):
        await device.trust.refresh()
    device.source.silent = False
    asked = asyncio.Event()

    class Hanging:
        async def metadata(self, _repository: str, _name: str) -> bytes | None:
            asked.set()
            await asyncio.Event().wait()
            return None

    trust = Trust(device.folder, "edge-1", Hanging(), device.floor, *device.roots)
    async with asyncio.timeout(5):
        async with asyncio.TaskGroup() as tasks:
            task = tasks.create_task(trust.refresh())
            await asked.wait()
            task.cancel()
        assert await device.trust.refresh() == ()


async def test_stolen_keys_and_run_up_versions_are_recovered_from_by_a_new_root(
    device: Device, publisher: Publisher
) -> None:
    await device.trust.refresh()
    for version in range(3):  # a thief of the director's key runs the versions up
        publisher.director.assign("edge-1", [ManifestEntry("digits", version + 7, "ab" * 32, 9)])
    await device.refused()
    old = backup(publisher)
    root = Metadata[Root].from_bytes(publisher.director.root)
    for role in ("targets", "snapshot", "timestamp"):
        root.signed.revoke_key(publisher.key("director").public_key.keyid, role)
        root.signed.add_key(publisher.key("director-2").public_key, role)
    root.signed.version = 2
    root.sign(publisher.key("root"))
    folder = publisher.folder / "director"
    shutil.rmtree(folder / "devices")
    (folder / "2.root.json").write_bytes(root.to_bytes())
    publisher.director = Director(folder, publisher.key("director-2"))
    publisher.director.assign("edge-1", [publisher.publish("digits", 1)])
    assert [assigned.name for assigned in await device.trust.refresh()] == ["digits/1"]
    replay(publisher, old, "director")  # with the stolen key, as it was, against a device that lost its metadata
    shutil.rmtree(device.folder)
    assert await device.refused() == (
        "the director's root is version 1, this device has already seen version 2: replayed"
    )


async def test_what_is_published_and_assigned_while_a_device_looks_is_no_disagreement(
    device: Device, publisher: Publisher
) -> None:
    first, late = publisher.publish("digits", 1), list[str]()
    publisher.director.assign("edge-1", [first])

    def meanwhile(repository: str, name: str, honest: bytes | None) -> bytes | None:
        if not late and name == "timestamp.json":  # the first repository that is asked has just been read
            late.append(repository)
            publisher.director.assign("edge-1", [publisher.publish("digits", 2)])
        return honest

    device.source.tamper = meanwhile
    assert [one.counter for one in await device.trust.refresh()] == [1]
    assert [one.counter for one in await device.trust.refresh()] == [2]
