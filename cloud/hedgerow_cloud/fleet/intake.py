"""A release on its way in: its files are spooled to a folder, and nothing counts until the whole has been checked.

Checks, in order: every part belongs to one release and stays within the bounds; the manifest parses and agrees with the
place it was uploaded to; every file that it lists is there with its size and digests, and no other; the signed targets
list this manifest by digest, and otherwise exactly what is published already. Signatures are the repository's to check.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO

import msgspec

from hedgerow import release
from hedgerow.errors import InvalidRelease
from hedgerow.link import MAX_METADATA_BYTES

MAX_FILES = 256
MAX_PATH_BYTES = 255
"""What every file system takes as one name."""


class _Target(msgspec.Struct):
    length: int
    hashes: dict[str, str]


class _Signed(msgspec.Struct):
    targets: dict[str, _Target]


class _Envelope(msgspec.Struct):
    signed: _Signed


@dataclass(frozen=True, slots=True)
class Checked:
    """An upload that is what it says: every file by digest, the manifest too."""

    manifest: release.Manifest
    manifest_sha256: str
    manifest_bytes: int
    files: Mapping[str, Path]
    """Digest to spooled file."""


class Intake:
    """Spools one upload into `folder`, which must be empty; at most `max_bytes` in all. Methods block on the disk."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._folder = folder
        self._left = max_bytes
        self._max_bytes = max_bytes
        self._release = ""
        self._paths: set[str] = set()
        self._open: tuple[str, BinaryIO] | None = None

    def write(self, path: str, content: bytes, *, last: bool) -> None:
        """Take the next part of the file at target path "model/counter/file"; raises `InvalidRelease`."""
        if self._open is None:
            self._open = path, self._start(path).open("wb")
        current, stream = self._open
        if path != current:
            raise InvalidRelease(f"{path} came before the last part of {current}")
        self._left -= len(content)
        if self._left < 0:
            raise InvalidRelease(
                f"release {self._release} has more than {self._max_bytes} bytes, which the fleet takes"
            )
        stream.write(content)
        if last:
            stream.close()
            self._open = None

    def check(self, targets: bytes, published: Mapping[str, str]) -> Checked:
        """The whole upload against its manifest, `targets` and the manifest digests `published` by target path."""
        if self._open is not None:
            raise InvalidRelease(f"{self._open[0]} is not complete")
        if not self._paths:
            raise InvalidRelease("no file came before the signed targets")
        if len(targets) > MAX_METADATA_BYTES:
            raise InvalidRelease(f"targets.json has {len(targets)} bytes; devices take at most {MAX_METADATA_BYTES}")
        folder = self._folder / self._release
        manifest = release.read(folder)
        if manifest.name != self._release:
            raise InvalidRelease(f"the manifest is of release {manifest.name} but was uploaded as {self._release}")
        if extra := self._paths - {file.path for file in manifest.files} - {release.MANIFEST}:
            raise InvalidRelease(f"release {manifest.name}: {min(extra)} is not in the manifest")
        content = (folder / release.MANIFEST).read_bytes()
        sha256 = hashlib.sha256(content).hexdigest()
        _check_targets(targets, f"{manifest.name}/{release.MANIFEST}", sha256, len(content), published)
        files = {file.sha256: folder / file.path for file in manifest.files} | {sha256: folder / release.MANIFEST}
        return Checked(manifest, sha256, len(content), files)

    def close(self) -> None:
        """Close what an upload that broke off left open."""
        if self._open is not None:
            self._open[1].close()

    def _start(self, path: str) -> Path:
        parts = path.split("/", 2)
        plain = PurePosixPath(path)
        if (
            len(parts) != 3
            or len(path.encode()) > MAX_PATH_BYTES
            or plain.is_absolute()
            or ".." in plain.parts
            or str(plain) != path
            or "\\" in path
            or "\0" in path
        ):
            raise InvalidRelease(f"{path[:MAX_PATH_BYTES]!r} is not a target path (model/counter/file)")
        name = f"{parts[0]}/{parts[1]}"
        self._release = self._release or name
        if name != self._release:
            raise InvalidRelease(f"{path} is not of release {self._release}, which this upload began with")
        if parts[2] in self._paths:
            raise InvalidRelease(f"{path} came twice")
        if len(self._paths) == MAX_FILES:
            raise InvalidRelease(f"release {name} has more than {MAX_FILES} files")
        self._paths.add(parts[2])
        file = self._folder / path
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise InvalidRelease(f"{path} lies inside another file of the release") from error
        if file.is_dir():
            raise InvalidRelease(f"{path} is a folder of the release")
        return file


def _check_targets(targets: bytes, path: str, sha256: str, size: int, published: Mapping[str, str]) -> None:
    try:
        listed = msgspec.json.decode(targets, type=_Envelope).signed.targets
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidRelease(f"targets.json cannot be read: {error}") from error
    if path in published:
        same = published[path] == sha256
        raise InvalidRelease(
            f"{path.removesuffix('/' + release.MANIFEST)} is published already"
            + ("" if same else ", with other content; a new release needs a higher counter")
        )
    entry = listed.get(path)
    if entry is None:
        raise InvalidRelease(f"the signed targets do not list {path}")
    if (entry.hashes.get("sha256"), entry.length) != (sha256, size):
        raise InvalidRelease(f"{path} has sha256 {sha256[:12]}… ({size} bytes), which is not what the targets sign")
    found = {name: target.hashes.get("sha256") for name, target in listed.items() if name != path}
    if found != dict(published):
        differing = sorted(name for name in found.keys() | published.keys() if found.get(name) != published.get(name))
        raise InvalidRelease(f"the signed targets disagree with what is published: {', '.join(differing[:5])}")
