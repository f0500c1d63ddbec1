"""Files by their SHA-256, in one folder: written whole or not at all, and on the disk before they count."""

import os
from collections.abc import Set as AbstractSet
from pathlib import Path

from hedgerow.durable import sync_folder
from hedgerow.errors import NotFound


class Blobs:
    """The blob folder. Nothing in it is trusted because it is there: who reads a blob checks its digest."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def path(self, sha256: str) -> Path:
        """Where the blob with this digest (hex) lies, whether it is there or not."""
        return self._folder / sha256

    def take(self, file: Path, sha256: str) -> bool:
        """Move `file`, whose digest the caller has checked, in; whether the blob was not here before.

        It takes the place of one that was, which may have rotted. The file must be on the same file system. Call `sync`
        once all are in.
        """
        target = self.path(sha256)
        new = not target.exists()
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
        file.replace(target)
        return new

    def sync(self) -> None:
        """Make the folder's entries durable."""
        sync_folder(self._folder)

    def read(self, sha256: str, offset: int, size: int) -> bytes:
        """At most `size` bytes of a blob from `offset`; raises `NotFound`."""
        try:
            with self.path(sha256).open("rb") as stream:
                stream.seek(offset)
                return stream.read(size)
        except FileNotFoundError as error:
            raise NotFound(f"no file with sha256 {sha256[:12]}… is published") from error

    def drop(self, sha256: str) -> None:
        """Remove a blob, if it is there."""
        self.path(sha256).unlink(missing_ok=True)

    def keep_only(self, digests: AbstractSet[str]) -> None:
        """Remove what is not in `digests`: the remains of uploads that came to nothing."""
        for file in self._folder.iterdir():
            if file.name not in digests:
                file.unlink()
