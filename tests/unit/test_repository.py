"""What the repositories must never sign, lose or half do."""

import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from pathlib import Path

import pytest
from securesystemslib.signer import Signer
from tuf.api.metadata import Metadata, Snapshot, Targets, Timestamp

from hedgerow.errors import ConfigError, InvalidRelease, UntrustedRelease
from hedgerow_cloud.publish import keys
from hedgerow_cloud.publish.repository import (
    KEPT_VERSIONS,
    Director,
    Lifetimes,
    ManifestEntry,
    ReleaseRepository,
    sign_targets,
)
from hedgerow_edge.trust import LIMITS


def entry(model: str, counter: int, content: str = "") -> ManifestEntry:
    return ManifestEntry(model, counter, sha256(f"{model}{counter}{content}".encode()).hexdigest(), 100 + counter)


@pytest.fixture
def signers(tmp_path: Path) -> Callable[[str], Signer]:
    return lambda name: keys.load_or_generate(tmp_path / "keys", name)


@pytest.fixture
def repository(tmp_path: Path, signers: Callable[[str], Signer]) -> ReleaseRepository:
    return ReleaseRepository.create(
        tmp_path / "release", root=[signers("root")], targets=[signers("targets")], online=signers("online")
    )


def publish(repository: ReleaseRepository, signer: Signer, *entries: ManifestEntry) -> bytes:
    current = repository.metadata("targets.json")
    assert current is not None
    signed = sign_targets(repository.root, current, entries, [signer])
    repository.accept(signed)
    return signed


def test_a_published_release_is_current_over_restarts(
    repository: ReleaseRepository, signers: Callable[[str], Signer], tmp_path: Path
) -> None:
    first = publish(repository, signers("targets"), entry("digits", 1))
    publish(repository, signers("targets"), entry("digits", 2), entry("other", 1))
    again = ReleaseRepository(tmp_path / "release", signers("online"))
    assert again.releases() == {e.path: e.sha256 for e in (entry("digits", 1), entry("digits", 2), entry("other", 1))}
    assert again.metadata("2.targets.json") == first
    assert again.metadata("4.targets.json") is None
    for name in ("../keys/online.pem", "/etc/passwd", "1.root.json/..", "timestamp.json.new", ".timestamp.json.new"):
        assert again.metadata(name) is None


def test_nothing_counts_that_the_offline_keys_did_not_sign(
    repository: ReleaseRepository, signers: Callable[[str], Signer]
) -> None:
    current = repository.metadata("targets.json")
    assert current is not None
    signed = sign_targets(repository.root, current, [entry("digits", 1)], [signers("targets")])
    tampered = signed.replace(b'"length":101', b'"length":102')
    assert tampered != signed
    by_fleet = Metadata[Targets].from_bytes(signed)
    by_fleet.sign(signers("online"))
    for forged in (tampered, by_fleet.to_bytes(), signed[:-9], b"{}", repository.root):
        before = repository.metadata("timestamp.json")
        with pytest.raises(UntrustedRelease):
            repository.accept(forged)
        assert repository.metadata("timestamp.json") == before
    with pytest.raises(UntrustedRelease, match="may not sign releases"):
        sign_targets(repository.root, current, [entry("digits", 1)], [signers("stranger")])
    with pytest.raises(UntrustedRelease, match="the current targets metadata is not signed"):
        sign_targets(repository.root, by_fleet.to_bytes(), [entry("digits", 2)], [signers("targets")])


def test_releases_never_change_and_versions_go_up_one_by_one(
    repository: ReleaseRepository, signers: Callable[[str], Signer]
) -> None:
    signer = signers("targets")
    empty = repository.metadata("targets.json")
    assert empty is not None
    first = publish(repository, signer, entry("digits", 1))
    repository.accept(first)  # twice is once
    with pytest.raises(InvalidRelease, match="new counter"):
        sign_targets(repository.root, first, [entry("digits", 1, "other")], [signer])
    rival = sign_targets(repository.root, empty, [entry("digits", 2)], [signer])
    with pytest.raises(UntrustedRelease, match="version 2, the next one is 3"):
        repository.accept(rival)
    dropped = Metadata[Targets].from_bytes(rival)
    dropped.signed.version = 3
    dropped.sign(signer)
    with pytest.raises(UntrustedRelease, match="changes or drops digits/1"):
        repository.accept(dropped.to_bytes())
    odd = Metadata[Targets].from_bytes(first)
    odd.signed.version = 3
    odd.signed.targets["../../etc"] = entry("digits", 2).target(model="digits", counter=2)
    odd.sign(signer)
    with pytest.raises(InvalidRelease, match="is not the manifest of digits/2"):
        repository.accept(odd.to_bytes())


def test_a_threshold_of_two_needs_two_keys(tmp_path: Path, signers: Callable[[str], Signer]) -> None:
    pair, online = [signers("a"), signers("b")], signers("online")
    with pytest.raises(ConfigError, match="needs as many keys"):
        ReleaseRepository.create(tmp_path / "r", root=pair, targets=[pair[0]], online=online, targets_threshold=2)
    repository = ReleaseRepository.create(
        tmp_path / "r", root=pair, targets=pair, online=online, root_threshold=2, targets_threshold=2
    )
    current = repository.metadata("targets.json")
    assert current is not None
    with pytest.raises(UntrustedRelease, match="1/2 keys"):
        repository.accept(sign_targets(repository.root, current, [entry("digits", 1)], [pair[0]]))
    with pytest.raises(UntrustedRelease):
        repository.accept(sign_targets(repository.root, current, [entry("digits", 1)], [pair[0], pair[0]]))
    repository.accept(sign_targets(repository.root, current, [entry("digits", 1)], pair))
    with pytest.raises(ConfigError, match="already"):
        ReleaseRepository.create(tmp_path / "r", root=pair, targets=pair, online=online)


def test_a_crash_before_the_timestamp_leaves_the_old_version_and_a_retry_works(
    repository: ReleaseRepository, signers: Callable[[str], Signer], monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(repository, signers("targets"), entry("digits", 1))
    before, replace = repository.releases(), Path.replace

    def fail_on_timestamp(path: Path, target: Path) -> Path:
        if target.name == "timestamp.json":
            raise OSError("power cut")
        return replace(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", fail_on_timestamp)
        with pytest.raises(OSError, match="power cut"):
            publish(repository, signers("targets"), entry("digits", 2))
    assert repository.releases() == before
    publish(repository, signers("targets"), entry("digits", 3))
    assert entry("digits", 2).path not in repository.releases()
    assert entry("digits", 3).path in repository.releases()


def test_online_metadata_is_signed_again_in_time_and_old_files_go(
    tmp_path: Path, signers: Callable[[str], Signer]
) -> None:
    online = signers("online")
    short = Lifetimes(snapshot=timedelta(hours=2), timestamp=timedelta(seconds=0))
    repository = ReleaseRepository.create(
        tmp_path / "r", root=[signers("root")], targets=[signers("targets")], online=online, lifetimes=short
    )
    repository = ReleaseRepository(tmp_path / "r", online)  # with the usual lifetimes
    assert repository.refresh()
    assert not repository.refresh()
    content = repository.metadata("timestamp.json")
    assert content is not None
    timestamp = Metadata[Timestamp].from_bytes(content).signed
    assert timestamp.expires > datetime.now(UTC) + timedelta(days=1)
    snapshot = repository.metadata(f"{timestamp.snapshot_meta.version}.snapshot.json")
    assert snapshot is not None
    assert Metadata[Snapshot].from_bytes(snapshot).signed.expires > datetime.now(UTC) + timedelta(days=1)
    for counter in range(1, KEPT_VERSIONS + 4):
        publish(repository, signers("targets"), entry("digits", counter))
    assert len(list((tmp_path / "r").glob("*.snapshot.json"))) == KEPT_VERSIONS


def test_each_device_has_metadata_of_its_own(tmp_path: Path, signers: Callable[[str], Signer]) -> None:
    online = signers("online")
    director = Director.create(tmp_path / "director", root=[signers("root")], online=online)
    assert director.metadata("edge-1", "timestamp.json") is None
    director.register("edge-1")
    director.register("edge-2")
    assert director.assign("edge-1", [entry("digits", 2), entry("a", 1)])
    assert not director.assign("edge-1", [entry("a", 1), entry("digits", 2)])
    director.register("edge-1")  # known already: nothing changes
    assert Director(tmp_path / "director", online).assigned("edge-1") == [entry("a", 1), entry("digits", 2)]
    assert director.assigned("edge-2") == []
    first, second = (director.metadata(device, "timestamp.json") for device in ("edge-1", "edge-2"))
    assert first is not None
    assert second is not None
    assert [json.loads(content)["signed"]["version"] for content in (first, second)] == [2, 1]
    assert director.metadata("edge-2", "1.root.json") == director.root
    assert director.metadata("edge-2", "2.root.json") is None
    assert director.refresh() == []
    short = Director(tmp_path / "director", online, Lifetimes(targets=timedelta(days=3650)))
    assert short.refresh() == ["edge-1", "edge-2"]
    assert short.assigned("edge-1") == [entry("a", 1), entry("digits", 2)]
    for device in ("../edge-1", "", "a/b", ".."):
        with pytest.raises(ConfigError, match="device id"):
            director.assign(device, [])


def test_one_device_with_damaged_metadata_does_not_let_the_others_expire(
    tmp_path: Path, signers: Callable[[str], Signer]
) -> None:
    online = signers("online")
    director = Director.create(tmp_path, root=[signers("root")], online=online)
    for device in ("edge-1", "edge-2"):
        director.register(device)
    (tmp_path / "devices" / "edge-1" / "1.targets.json").write_bytes(b"{")
    (tmp_path / "devices" / ".stray").touch()
    due = Director(tmp_path, online, Lifetimes(targets=timedelta(days=3650)))
    with pytest.raises(ConfigError, match="metadata of 2 devices is damaged"):
        due.refresh()
    assert director.metadata("edge-2", "2.targets.json")


def test_no_more_releases_are_signed_than_devices_take(
    repository: ReleaseRepository, signers: Callable[[str], Signer]
) -> None:
    current = repository.metadata("targets.json")
    assert current is not None
    entries = [entry("digits", counter) for counter in range(1, 1000)]
    assert len(sign_targets(repository.root, current, entries[:500], [signers("targets")])) < LIMITS.targets_max_length
    with pytest.raises(InvalidRelease, match=r"this fleet holds as many releases \(998\) as it can"):
        sign_targets(repository.root, current, entries, [signers("targets")])


def test_key_files_are_private_and_found_by_name(tmp_path: Path) -> None:
    made = keys.generate(tmp_path, "root")
    private = tmp_path / "root.pem"
    assert private.stat().st_mode & 0o777 == 0o600
    assert keys.load(tmp_path, "root").sign(b"x").signature == made.sign(b"x").signature
    with pytest.raises(ConfigError, match="already"):
        keys.generate(tmp_path, "root")
    with pytest.raises(ConfigError, match="no key called 'other'"):
        keys.load(tmp_path, "other")
    keys.generate(tmp_path, "half")
    (tmp_path / "half.json").unlink()  # as a kill between the two files would leave it
    with pytest.raises(ConfigError, match=r"half\.pem lacks its half\.json: remove it"):
        keys.load_or_generate(tmp_path, "half")
    private.chmod(0o644)
    with pytest.raises(ConfigError, match=r"chmod 600"):
        keys.load(tmp_path, "root")
    private.write_bytes(keys.generate(tmp_path, "second").private_bytes)  # type: ignore[attr-defined]  # CryptoSigner's
    private.chmod(0o600)
    with pytest.raises(ConfigError, match="cannot be used"):
        keys.load(tmp_path, "root")
