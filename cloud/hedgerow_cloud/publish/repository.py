"""The two TUF repositories, on disk and signed: what is valid, and who gets it.

::

    <release>/1.root.json 3.targets.json 7.snapshot.json timestamp.json
    <director>/1.root.json
    <director>/devices/<id>/2.targets.json 2.snapshot.json timestamp.json

Rules:

- a target is a release's manifest, "<model>/<counter>/manifest.json"; everything else hangs from its digests;
- the release repository's targets are signed by offline keys (`sign_targets`, on the publisher's machine) and never
  change or go away: each version adds to the one before;
- the online key signs which of them are current (snapshot, timestamp), and in the director each device's targets;
- the timestamp is written last, so that a crash leaves the repository at the old version or at the new one.

Methods block on the disk and may be called from any thread.
"""

import re
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple, Self, TypeVar

from securesystemslib.signer import Signer
from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import Metadata, MetaFile, Root, Signed, Snapshot, TargetFile, Targets, Timestamp

from hedgerow import release
from hedgerow.durable import sync_folder, write_durably
from hedgerow.errors import ConfigError, HedgerowError, InvalidRelease, UntrustedRelease
from hedgerow.link import MAX_METADATA_BYTES, checked_id

KEPT_VERSIONS = 8
"""Older targets and snapshots stay this long, for devices that are in the middle of a check."""

_NAME = re.compile(r"([1-9][0-9]{0,9}\.)?(root|timestamp|snapshot|targets)\.json")
_FIRST_ROOT = "1.root.json"
_S = TypeVar("_S", Root, Timestamp, Snapshot, Targets)


@dataclass(frozen=True, slots=True)
class Lifetimes:
    """How long signatures hold. What the online key signs is signed again at half of its time (`refresh`)."""

    root: timedelta = timedelta(days=365)
    targets: timedelta = timedelta(days=365)
    snapshot: timedelta = timedelta(days=30)
    timestamp: timedelta = timedelta(days=3)


DEFAULT_LIFETIMES = Lifetimes()


class ManifestEntry(NamedTuple):
    """A release by its manifest's digest (hex SHA-256) and size."""

    model: str
    counter: int
    sha256: str
    size: int

    @classmethod
    def of(cls, manifest: bytes) -> Self:
        """The entry of the release whose manifest.json has this content; raises `InvalidRelease`."""
        parsed = release.parse(manifest)
        return cls(parsed.model, parsed.counter, sha256(manifest).hexdigest(), len(manifest))

    @property
    def path(self) -> str:
        """The target path."""
        return f"{self.model}/{self.counter}/{release.MANIFEST}"

    def target(self, **custom: object) -> TargetFile:
        """The TUF target, with `custom` facts."""
        return TargetFile(self.size, {"sha256": self.sha256}, self.path, {"custom": custom})


def sign_targets(
    root: bytes,
    current: bytes,
    entries: Iterable[ManifestEntry],
    signers: Sequence[Signer],
    lifetime: timedelta = DEFAULT_LIFETIMES.targets,
) -> bytes:
    """The next targets metadata: `current` with `entries` added, signed by the offline `signers`.

    `root` is the publisher's own copy of the root metadata: whatever the fleet says is current must be signed by keys
    that it names, or a fleet that was broken into could have anything signed. Raises `UntrustedRelease` if not, or if
    a signer has no say, and `InvalidRelease` if an entry is there already as something else.
    """
    trusted = _read(Root, root)
    targets = _read(Targets, current)
    _verify(trusted.signed, targets, "the current targets metadata")
    for entry in entries:
        target = entry.target(model=entry.model, counter=entry.counter)
        if targets.signed.targets.setdefault(entry.path, target) != target:
            raise InvalidRelease(
                f"{entry.model}/{entry.counter} is signed already, with other content; a release needs a new counter"
            )
    targets.signed.version += 1
    targets.signed.expires = _now() + lifetime
    targets.signatures.clear()
    for signer in signers:
        if signer.public_key.keyid not in trusted.signed.roles["targets"].keyids:
            raise UntrustedRelease(f"key {signer.public_key.keyid[:12]}… may not sign releases")
        targets.sign(signer, append=True)
    content = targets.to_bytes()
    if len(content) > MAX_METADATA_BYTES:
        raise InvalidRelease(
            f"this fleet holds as many releases ({len(targets.signed.targets) - 1}) as it can: devices take no targets "
            f"metadata over {MAX_METADATA_BYTES} bytes"
        )
    return content


class ReleaseRepository:
    """What is valid. `online` signs snapshot and timestamp; the offline keys are never here."""

    def __init__(self, folder: Path, online: Signer, lifetimes: Lifetimes = DEFAULT_LIFETIMES) -> None:
        self._set = _MetadataSet(folder, online, lifetimes)
        self._lock = threading.Lock()

    @classmethod
    def create(
        cls,
        folder: Path,
        *,
        root: Sequence[Signer],
        targets: Sequence[Signer],
        online: Signer,
        root_threshold: int = 1,
        targets_threshold: int = 1,
        lifetimes: Lifetimes = DEFAULT_LIFETIMES,
    ) -> Self:
        """A new repository with no release in it; raises `ConfigError` if there is one already."""
        keys = {"root": root, "targets": targets, "snapshot": [online], "timestamp": [online]}
        thresholds = {"root": root_threshold, "targets": targets_threshold}
        signed_root = _new_root(folder, keys, thresholds, lifetimes)
        empty = Metadata(Targets(version=1, expires=_now() + lifetimes.targets))
        for signer in targets:
            empty.sign(signer, append=True)
        repository = cls(folder, online, lifetimes)
        repository._set.commit(empty)
        write_durably(folder / _FIRST_ROOT, signed_root)  # last: a crash before leaves nothing that counts
        return repository

    @property
    def root(self) -> bytes:
        """The newest root metadata: what devices and publishers are given to trust."""
        return self._set.newest_root()

    def metadata(self, name: str) -> bytes | None:
        """The file `name` ("timestamp.json", "3.targets.json"), None if there is none.

        "root.json" and "targets.json" stand for the newest and the current one.
        """
        if name == "root.json":
            return self.root
        return self._set.read(name)

    def releases(self) -> dict[str, str]:
        """SHA-256 of the manifest of each valid release, by target path."""
        return {path: target.hashes["sha256"] for path, target in self._set.targets().signed.targets.items()}

    def accept(self, targets: bytes) -> None:
        """Make `targets`, as `sign_targets` gives it, current. Does nothing if it is already.

        Raises `UntrustedRelease` if it is not signed by enough offline keys, is not the next version, or changes or
        drops a release, and `InvalidRelease` if a target is not a manifest's.
        """
        with self._lock:
            current, new = self._set.targets(), _read(Targets, targets)
            if new == current:
                return
            _verify(_read(Root, self.root).signed, new, "the targets metadata")
            if new.signed.version != current.signed.version + 1:
                raise UntrustedRelease(
                    f"the targets metadata is version {new.signed.version}, the next one is "
                    f"{current.signed.version + 1}: another release was published meanwhile, or it is replayed"
                )
            if new.signed.is_expired():
                raise UntrustedRelease(f"the targets metadata expired on {new.signed.expires:%Y-%m-%d}")
            if new.signed.delegations is not None:
                raise UntrustedRelease("the targets metadata delegates to other keys, which is not supported")
            for path, target in current.signed.targets.items():
                if new.signed.targets.get(path) != target:
                    raise UntrustedRelease(f"the targets metadata changes or drops {path}, which is published")
            for path, target in new.signed.targets.items():
                _check_target(path, target)
            self._set.commit(new, targets)

    def refresh(self) -> bool:
        """Sign what would expire again; whether anything was. To be called a few times a day."""
        with self._lock:
            return self._set.refresh()


class Director:
    """Who gets it: a set of metadata a device under one root, signed by the `online` key."""

    def __init__(self, folder: Path, online: Signer, lifetimes: Lifetimes = DEFAULT_LIFETIMES) -> None:
        self._root = _MetadataSet(folder, online, lifetimes)
        self._devices = folder / "devices"
        self._online = online
        self._lifetimes = lifetimes
        self._lock = threading.Lock()

    @classmethod
    def create(
        cls,
        folder: Path,
        *,
        root: Sequence[Signer],
        online: Signer,
        root_threshold: int = 1,
        lifetimes: Lifetimes = DEFAULT_LIFETIMES,
    ) -> Self:
        """A new director that knows no device; raises `ConfigError` if there is one already."""
        keys = {"root": root, "targets": [online], "snapshot": [online], "timestamp": [online]}
        signed_root = _new_root(folder, keys, {"root": root_threshold}, lifetimes)
        folder.mkdir(parents=True, exist_ok=True)
        write_durably(folder / _FIRST_ROOT, signed_root)
        return cls(folder, online, lifetimes)

    @property
    def root(self) -> bytes:
        """The newest root metadata."""
        return self._root.newest_root()

    def register(self, device: str) -> None:
        """Have metadata for `device`, with nothing assigned if it is new."""
        with self._lock:
            if not self._of(device).exists():
                self._commit(device, [], version=1)

    def assign(self, device: str, entries: Iterable[tuple[str, int, str, int]]) -> bool:
        """Say that `device` gets `entries` (as `ManifestEntry`) and nothing else; False if that is said already."""
        with self._lock:
            wanted = sorted(ManifestEntry(*entry) for entry in entries)
            known = self._of(device).exists()
            if known and wanted == self._assigned(device):
                return False
            self._commit(device, wanted, self._of(device).targets().signed.version + 1 if known else 1)
            return True

    def assigned(self, device: str) -> list[ManifestEntry]:
        """What `device` gets, sorted; nothing if it is unknown."""
        with self._lock:
            return self._assigned(device) if self._of(device).exists() else []

    def metadata(self, device: str, name: str) -> bytes | None:
        """The file `name` as `device` gets it, None if there is none."""
        if name == "root.json":
            return self.root
        return self._root.read(name) if name.endswith(".root.json") else self._of(device).read(name)

    def refresh(self) -> list[str]:
        """Sign what would expire again; the devices whose metadata is new. To be called a few times a day.

        Raises `ConfigError`, once all others are done, if some device's metadata is damaged.
        """
        renewed, damaged = [], []
        for name in sorted(folder.name for folder in self._devices.iterdir()) if self._devices.is_dir() else []:
            try:
                if self._refresh(name):
                    renewed.append(name)
            except (HedgerowError, RepositoryError) as error:
                damaged.append(f"{name}: {error}")
        if damaged:
            raise ConfigError(f"the director's metadata of {len(damaged)} devices is damaged: {damaged[0]}")
        return renewed

    def _refresh(self, name: str) -> bool:
        with self._lock:
            device = self._of(name)
            if not device.exists():
                return False
            targets = device.targets().signed
            if not _due(targets, self._lifetimes.targets):
                return device.refresh()
            self._commit(name, self._assigned(name), targets.version + 1)
            return True

    def _of(self, device: str) -> "_MetadataSet":
        return _MetadataSet(self._devices / checked_id(device, "device"), self._online, self._lifetimes)

    def _assigned(self, device: str) -> list[ManifestEntry]:
        return sorted(
            ManifestEntry(*_check_target(path, target), target.hashes["sha256"], target.length)
            for path, target in self._of(device).targets().signed.targets.items()
        )

    def _commit(self, device: str, entries: Sequence[ManifestEntry], version: int) -> None:
        targets = {
            entry.path: entry.target(device=device, model=entry.model, counter=entry.counter) for entry in entries
        }
        metadata = Metadata(Targets(version=version, expires=_now() + self._lifetimes.targets, targets=targets))
        metadata.sign(self._online)
        self._of(device).commit(metadata)


class _MetadataSet:
    """The files of one set of metadata, and the signing of its snapshot and timestamp."""

    def __init__(self, folder: Path, online: Signer, lifetimes: Lifetimes) -> None:
        self._folder = folder
        self._online = online
        self._lifetimes = lifetimes

    def exists(self) -> bool:
        return (self._folder / "timestamp.json").exists()

    def read(self, name: str) -> bytes | None:
        if not _NAME.fullmatch(name):
            return None
        if name == "targets.json" and self.exists():
            name = f"{self._snapshot().signed.meta[name].version}.{name}"
        try:
            return (self._folder / name).read_bytes()
        except FileNotFoundError:
            return None

    def newest_root(self) -> bytes:
        versions = [int(path.name.partition(".")[0]) for path in self._folder.glob("*.root.json")]
        if not versions:
            raise ConfigError(f"there is no repository in {self._folder}")
        return (self._folder / f"{max(versions)}.root.json").read_bytes()

    def targets(self) -> Metadata[Targets]:
        return self._load(Targets, f"{self._snapshot().signed.meta['targets.json'].version}.targets.json")

    def commit(self, targets: Metadata[Targets], content: bytes | None = None) -> None:
        """Make `targets` (signed, with these very bytes if given) current. The timestamp, last, makes it count."""
        content = content or targets.to_bytes()
        if not self._folder.is_dir():
            self._folder.mkdir(parents=True)
            for folder in (self._folder.parent, self._folder.parent.parent):
                sync_folder(folder)
        self._write(f"{targets.signed.version}.targets.json", content)
        self._sign_snapshot(MetaFile.from_data(targets.signed.version, content, ["sha256"]))
        self._prune()

    def refresh(self) -> bool:
        """Sign snapshot and timestamp again if they have passed half of their time; whether that was so."""
        snapshot = self._snapshot()
        if _due(snapshot.signed, self._lifetimes.snapshot):
            self._sign_snapshot(snapshot.signed.meta["targets.json"])
        elif _due(self._load(Timestamp, "timestamp.json").signed, self._lifetimes.timestamp):
            self._sign_timestamp(self._load(Timestamp, "timestamp.json").signed.snapshot_meta)
        else:
            return False
        self._prune()
        return True

    def _sign_snapshot(self, targets: MetaFile) -> None:
        version = self._snapshot().signed.version + 1 if self.exists() else 1
        snapshot = Metadata(
            Snapshot(version=version, expires=_now() + self._lifetimes.snapshot, meta={"targets.json": targets})
        )
        snapshot.sign(self._online)
        content = snapshot.to_bytes()
        self._write(f"{version}.snapshot.json", content)
        self._sign_timestamp(MetaFile.from_data(version, content, ["sha256"]))

    def _sign_timestamp(self, snapshot: MetaFile) -> None:
        version = self._load(Timestamp, "timestamp.json").signed.version + 1 if self.exists() else 1
        timestamp = Metadata(
            Timestamp(version=version, expires=_now() + self._lifetimes.timestamp, snapshot_meta=snapshot)
        )
        timestamp.sign(self._online)
        self._write("timestamp.json", timestamp.to_bytes())

    def _snapshot(self) -> Metadata[Snapshot]:
        version = self._load(Timestamp, "timestamp.json").signed.snapshot_meta.version
        return self._load(Snapshot, f"{version}.snapshot.json")

    def _load(self, kind: type[_S], name: str) -> Metadata[_S]:
        try:
            return _read(kind, (self._folder / name).read_bytes())
        except FileNotFoundError as error:
            raise ConfigError(f"the repository in {self._folder} lacks {name}") from error

    def _write(self, name: str, content: bytes) -> None:
        write_durably(self._folder / name, content)

    def _prune(self) -> None:
        for role in ("targets", "snapshot"):
            paths = sorted(self._folder.glob(f"*.{role}.json"), key=lambda path: int(path.name.partition(".")[0]))
            for path in paths[:-KEPT_VERSIONS]:
                path.unlink()


def _new_root(
    folder: Path, keys: dict[str, Sequence[Signer]], thresholds: dict[str, int], lifetimes: Lifetimes
) -> bytes:
    if (folder / _FIRST_ROOT).exists():
        raise ConfigError(f"there is a repository in {folder} already")
    root = Root(version=1, expires=_now() + lifetimes.root, consistent_snapshot=True)
    for role, signers in keys.items():
        for signer in signers:
            root.add_key(signer.public_key, role)
        root.roles[role].threshold = thresholds.get(role, 1)
        if len({signer.public_key.keyid for signer in signers}) < root.roles[role].threshold:
            raise ConfigError(f"{role}: a threshold of {root.roles[role].threshold} needs as many keys")
    metadata = Metadata(root)
    for signer in keys["root"]:
        metadata.sign(signer, append=True)
    return metadata.to_bytes()


def _read(kind: type[_S], content: bytes) -> Metadata[_S]:
    """The metadata in `content`, unverified; raises `UntrustedRelease`."""
    try:
        metadata: Metadata[_S] = Metadata.from_bytes(content)
    except (RepositoryError, ValueError, KeyError) as error:
        raise UntrustedRelease(f"{kind.type} metadata cannot be read: {error}") from error
    if not isinstance(metadata.signed, kind):
        raise UntrustedRelease(f"{metadata.signed.type} metadata came instead of {kind.type}")
    return metadata


def _verify(root: Root, metadata: Metadata[Targets], what: str) -> None:
    try:
        root.verify_delegate(Targets.type, metadata.signed_bytes, metadata.signatures)
    except RepositoryError as error:
        raise UntrustedRelease(f"{what} is not signed by enough of the keys that may: {error}") from error


def _check_target(path: str, target: TargetFile) -> tuple[str, int]:
    """Model and counter of a release's target; raises `InvalidRelease`."""
    custom = target.custom if isinstance(target.custom, dict) else {}
    model, counter = custom.get("model"), custom.get("counter")
    if not isinstance(model, str) or not isinstance(counter, int) or "sha256" not in target.hashes:
        raise InvalidRelease(f"{path} lacks model, counter or sha256")
    if path != f"{model}/{counter}/{release.MANIFEST}":
        raise InvalidRelease(f"{path} is not the manifest of {model}/{counter}")
    return model, counter


def _due(signed: Signed, lifetime: timedelta) -> bool:
    return signed.expires - _now() < lifetime / 2


def _now() -> datetime:
    return datetime.now(UTC).replace(microsecond=0)
