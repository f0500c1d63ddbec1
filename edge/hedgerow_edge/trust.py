"""What may run on this device: the TUF client for two repositories that must agree.

The release repository (offline keys) says which releases are valid; the director (an online key) says which of them
this device gets. `Trust.refresh` brings both up to date through python-tuf's client and gives what both agree on.

Rules that it keeps on top of TUF's own:

- a target of the director names this device; path, length and sha256 are the same in the release repository, and
  model and counter are those of the path;
- a release counter never goes below one that was confirmed on this device;
- metadata is synced to disk, and its versions are noted in a `VersionFloor` elsewhere: if the files are lost or torn,
  an older version is still refused. A floor holds for the keys of its role; a new root that replaces them begins a
  new one, which is how a repository recovers from stolen keys and versions that were run up (TUF 5.3.11).
"""

import asyncio
import concurrent.futures
import contextlib
import hashlib
import os
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

from tuf.api import exceptions as tuf
from tuf.api.metadata import Metadata, Root, Signed, TargetFile, Targets
from tuf.ngclient import FetcherInterface, Updater, UpdaterConfig

from hedgerow.durable import sync_folder
from hedgerow.errors import LinkError, TransferFailed, UntrustedRelease
from hedgerow.link import MAX_METADATA_BYTES

FETCH_TIMEOUT_S = 90.0
"""Backstop for one metadata file; the source has its own, shorter, time-outs."""
LIMITS = UpdaterConfig(
    max_root_rotations=32,
    root_max_length=64 * 2**10,
    timestamp_max_length=16 * 2**10,
    snapshot_max_length=64 * 2**10,
    targets_max_length=MAX_METADATA_BYTES,
)
"""Sizes in bytes; a metadata file travels in one message."""

_ROLES = ("root", "timestamp", "snapshot", "targets")
_PATH = re.compile(r"(?P<model>[A-Za-z0-9_-]+)/(?P<counter>[1-9][0-9]{0,17})/manifest\.json")
_BASE_URL = "link:///"


@dataclass(frozen=True, slots=True)
class Assigned:
    """A release that this device shall run, by the digest of its manifest (hex SHA-256)."""

    model: str
    counter: int
    manifest_sha256: str
    manifest_bytes: int

    @property
    def name(self) -> str:
        """Model and counter: "digits/3"."""
        return f"{self.model}/{self.counter}"


class MetadataSource(Protocol):
    """Where TUF metadata comes from: the link, or a test."""

    async def metadata(self, repository: str, name: str) -> bytes | None:
        """The file `name` ("2.root.json", "timestamp.json") of "release" or "director"; None if it does not exist.

        Raises `LinkError` when there is no answer, in bounded time.
        """
        ...


class VersionFloor(Protocol):
    """Versions below which nothing may go again, kept where the loss of the metadata files does not reach.

    Called in a worker thread. A model's name stands for its confirmed release counter, which whoever confirms releases
    raises; names with a "/" are this module's.
    """

    def floor(self, name: str) -> int:
        """The highest version noted for `name`; 0 if there is none."""
        ...

    def raise_floor(self, versions: Mapping[str, int]) -> None:
        """Note `versions`, all or none, durable at return; one that is lower than what is noted changes nothing."""
        ...


class Trust:
    """The metadata of both repositories in `folder`, for one device.

    `release_root` and `director_root` are the root metadata that the device was given when it was made.
    """

    def __init__(
        self,
        folder: Path,
        device: str,
        source: MetadataSource,
        floor: VersionFloor,
        release_root: bytes,
        director_root: bytes,
    ) -> None:
        self._device = device
        self._source = source
        self._floor = floor
        self._release = _Repository("release", folder / "release", release_root, floor)
        self._director = _Repository("director", folder / "director", director_root, floor)
        # In this order: a release is published before it is assigned, so whoever has seen that it is can find it.
        self._repositories = (self._director, self._release)
        self._lock = asyncio.Lock()

    async def refresh(self) -> tuple[Assigned, ...]:
        """What this device shall run, by the newest metadata that can be had.

        Raises `UntrustedRelease` with the reason in words, `LinkError` when the source is silent, or `TransferFailed`
        when the metadata cannot be written. What runs already is none of its business.
        """
        async with self._lock:
            loop = asyncio.get_running_loop()
            fetchers = [_Fetcher(self._source, repository.name, loop) for repository in self._repositories]
            work = loop.run_in_executor(None, self._refresh, fetchers)
            try:
                return await asyncio.shield(work)
            except asyncio.CancelledError:
                for fetcher in fetchers:  # the thread uses the files: it must end before anyone else may begin
                    fetcher.stop()
                await asyncio.wait([work])
                work.exception()
                raise

    def _refresh(self, fetchers: Sequence["_Fetcher"]) -> tuple[Assigned, ...]:
        for repository, fetcher in zip(self._repositories, fetchers, strict=True):
            repository.refresh(fetcher)
        assigned = [self._agreed(path, target) for path, target in sorted(self._director.targets().items())]
        models = [one.model for one in assigned]
        for model in models:
            if models.count(model) > 1:
                raise UntrustedRelease(f"the director assigns more than one release of {model}")
        return tuple(assigned)

    def _agreed(self, path: str, target: TargetFile) -> Assigned:
        match = _PATH.fullmatch(path)
        if match is None:
            raise UntrustedRelease(f"the director assigns {path!r}, which is no release's manifest")
        model, counter = match["model"], int(match["counter"])
        name = f"{model}/{counter}"
        if (device := _custom(target).get("device")) != self._device:
            raise UntrustedRelease(f"the director assigns {name} to device {device!r}, this device is {self._device!r}")
        valid = self._release.target(path)
        if valid is None:
            raise UntrustedRelease(f"the director assigns {name}, which the release repository does not know")
        sha256 = valid.hashes.get("sha256")
        if sha256 is None or (target.length, target.hashes.get("sha256")) != (valid.length, sha256):
            raise UntrustedRelease(f"the director and the release repository disagree on what {name} is")
        if (_custom(valid).get("model"), _custom(valid).get("counter")) != (model, counter):
            raise UntrustedRelease(f"the release repository signs {name} as something else")
        if counter < (confirmed := self._floor.floor(model)):
            raise UntrustedRelease(
                f"the director assigns {name}, this device has already confirmed {model}/{confirmed}: rolled back; "
                f"what is to run again needs a new release with a higher counter"
            )
        return Assigned(model, counter, sha256, valid.length)


class _Repository:
    """One repository's metadata on disk. Everything here blocks and runs in a worker thread."""

    def __init__(self, name: str, folder: Path, root: bytes, floor: VersionFloor) -> None:
        self.name = name
        self._title = "the director" if name == "director" else "the release repository"
        self._folder = folder
        self._root = root
        self._floor = floor
        self._updater: Updater | None = None

    def refresh(self, fetcher: "_Fetcher") -> None:
        """Bring the metadata up to date, sync it and note its versions; raises as `Trust.refresh`."""
        self._updater = None
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            for leftover in self._folder.glob("tmp*"):  # the updater's, of a process that was killed
                leftover.unlink()
            before = self._versions()
            try:
                updater = Updater(str(self._folder), _BASE_URL, fetcher=fetcher, config=LIMITS, bootstrap=self._root)
                updater.refresh()
            finally:
                self._sync()
            self._hold_floor()
        except tuf.RepositoryError as error:
            raise UntrustedRelease(self._explain(error, fetcher, before)) from error
        except tuf.DownloadLengthMismatchError as error:
            raise UntrustedRelease(f"{self._title}'s {fetcher.asked} is larger than allowed: {error}") from error
        except tuf.DownloadHTTPError as error:
            if fetcher.asked != "timestamp.json" or self._floor.floor(self._floor_names()["timestamp"]):
                raise UntrustedRelease(f"{self._title} has no {fetcher.asked} any more") from error
            return  # nothing was ever said to this device: no targets
        except tuf.DownloadError as error:
            if isinstance(error.__cause__, LinkError):
                raise error.__cause__ from error
            raise LinkError(f"{self._title}'s {fetcher.asked} could not be fetched: {error.__cause__}") from error
        except OSError as error:
            raise TransferFailed(f"{self._title}'s metadata cannot be kept on disk: {error.strerror}") from error
        self._updater = updater

    def targets(self) -> dict[str, TargetFile]:
        """All targets, after `refresh`."""
        if self._updater is None:
            return {}
        return Metadata[Targets].from_file(str(self._folder / "targets.json")).signed.targets

    def target(self, path: str) -> TargetFile | None:
        """The target at `path`, after `refresh`."""
        return self._updater.get_targetinfo(path) if self._updater else None

    def _local(self, role: str) -> Signed | None:
        with contextlib.suppress(OSError, tuf.RepositoryError, tuf.StorageError):
            signed: Signed = Metadata.from_file(str(self._folder / f"{role}.json")).signed
            return signed
        return None

    def _versions(self) -> dict[str, int]:
        """The versions on disk by role; 0 for what is missing or torn."""
        return {role: signed.version if (signed := self._local(role)) else 0 for role in _ROLES}

    def _floor_names(self) -> dict[str, str]:
        """The floor's name of each role: it changes with the role's keys, the root's apart."""
        root = self._local("root")
        if not isinstance(root, Root):
            raise UntrustedRelease(f"{self._title}'s root metadata is gone from disk")
        names = {"root": f"{self.name}/root"}
        for role in _ROLES[1:]:
            keys = ",".join(sorted(root.roles[role].keyids))
            names[role] = f"{self.name}/{role}/{hashlib.sha256(keys.encode()).hexdigest()[:16]}"
        return names

    def _hold_floor(self) -> None:
        names, versions = self._floor_names(), self._versions()
        for role, name in names.items():
            if versions[role] < (seen := self._floor.floor(name)):
                raise UntrustedRelease(_replayed(self._title, role, versions[role], seen))
        self._floor.raise_floor({names[role]: version for role, version in versions.items()})

    def _sync(self) -> None:
        """What python-tuf leaves out: a power cut must not bring back older files."""
        for path in (*self._folder.glob("*.json"), *self._folder.glob("root_history/*.json")):
            with path.open("rb") as stream:
                os.fsync(stream.fileno())
        for folder in (self._folder / "root_history", self._folder, self._folder.parent):
            if folder.is_dir():
                sync_folder(folder)

    def _explain(self, error: tuf.RepositoryError, fetcher: "_Fetcher", before: Mapping[str, int]) -> str:
        """What an operator should read. The role is the one that was worked on when the updater gave up."""
        named = re.search("|".join(_ROLES), str(error))
        role = named.group() if named else fetcher.role
        metadata = f"{self._title}'s {role}"
        if isinstance(error, tuf.ExpiredMetadataError):
            signed = fetcher.signed(role) or self._local(role)
            when = f" at {signed.expires:%Y-%m-%d %H:%M} UTC" if signed else ""
            return (
                f"{metadata} expired{when}: it is frozen, or the clock of this device "
                f"({datetime.now(UTC):%Y-%m-%d %H:%M} UTC) is wrong"
            )
        if isinstance(error, tuf.BadVersionNumberError):
            got = fetcher.signed(fetcher.role)
            if got is not None and got.version < before[fetcher.role]:
                return _replayed(self._title, fetcher.role, got.version, before[fetcher.role])
            return f"{metadata} does not fit the rest of its metadata, mixed or replayed: {error}"
        if isinstance(error, tuf.UnsignedMetadataError):
            return f"{metadata} is not signed by the keys that this device trusts: {error}"
        if isinstance(error, tuf.LengthOrHashMismatchError):
            return f"{metadata} is not what its metadata says, mixed or tampered with: {error}"
        return f"{metadata} cannot be used: {error}"


class _Fetcher(FetcherInterface):
    """Python-tuf's way to the source: blocks a worker thread on a coroutine of the event loop."""

    def __init__(self, source: MetadataSource, repository: str, loop: asyncio.AbstractEventLoop) -> None:
        self._source = source
        self._repository = repository
        self._loop = loop
        self._pending: concurrent.futures.Future[bytes | None] | None = None
        self._stopped = False
        self._lock = threading.Lock()
        self._contents: dict[str, bytes] = {}
        self.asked = "metadata"
        """The file asked for last."""

    @property
    def role(self) -> str:
        """The role of the file asked for last."""
        return self.asked.removesuffix(".json").rpartition(".")[2]

    def signed(self, role: str) -> Signed | None:
        """What came last for `role`, unverified, for messages only; None if nothing readable did."""
        with contextlib.suppress(KeyError, tuf.RepositoryError):
            signed: Signed = Metadata.from_bytes(self._contents[role]).signed
            return signed
        return None

    def stop(self) -> None:
        """Make the thread's present and later fetches fail at once."""
        with self._lock:
            self._stopped = True
            if self._pending is not None:
                self._pending.cancel()

    def _fetch(self, url: str) -> Iterator[bytes]:
        self.asked = url.removeprefix(_BASE_URL)
        with self._lock:  # or `stop` could come between the beginning of the task and the note of it
            if self._stopped:
                raise LinkError("the check was given up")
            # a task of the loop, which this thread waits for and `stop` cancels
            self._pending = asyncio.run_coroutine_threadsafe(
                self._source.metadata(self._repository, self.asked), self._loop
            )
        try:
            content = self._pending.result(FETCH_TIMEOUT_S)
        except concurrent.futures.CancelledError as error:
            raise LinkError("the check was given up") from error
        except TimeoutError as error:
            self._pending.cancel()
            raise LinkError(f"no answer to the request for {self.asked} within {FETCH_TIMEOUT_S:g} s") from error
        if content is None:
            raise tuf.DownloadHTTPError(f"{self.asked} does not exist", 404)
        self._contents[self.role] = content
        return iter((content,))


def _custom(target: TargetFile) -> Mapping[str, object]:
    return target.custom if isinstance(target.custom, dict) else {}


def _replayed(title: str, role: str, got: int, seen: int) -> str:
    return f"{title}'s {role} is version {got}, this device has already seen version {seen}: replayed"
