"""Regions of shared memory that callers have registered with a server: OIP's extension, as Triton has it.

A region is a part of a POSIX shared memory object, under a name. Callers are not trusted with more than that:

- nothing is mapped. Regions are read by pread and written to by pwrite, because who truncates memory that a server has
  mapped kills the server (SIGBUS); here it is told that its region has become too short;
- a key is the name of a regular file right in `FOLDER`; links are not followed;
- regions and their bytes are bounded. They stay until somebody unregisters them or the server stops.

Copying happens on the event loop, where it takes a fraction of what reading the same bytes from a socket does.
"""

import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import msgspec

from hedgerow.config import Count, Settings
from hedgerow.errors import HedgerowError, InvalidInput, NotFound, Overloaded, Unavailable
from hedgerow.oip.messages import Raw

FOLDER = Path("/dev/shm")  # noqa: S108 (what is in it is opened with the care that the rules above tell)
"""Where Linux keeps POSIX shared memory."""
MAX_KEY_BYTES = 255
"""NAME_MAX, as of any file's name."""
MAX_NAME_CHARS = 1024
"""Of a region's name."""


class SharedMemorySettings(Settings, frozen=True, kw_only=True):
    """What callers may register.

    Only for servers whose callers are trusted with the machine's shared memory: they can have all of it read and
    written that the server may read and write, and whose key has the prefix.
    """

    key_prefix: str = ""
    """Of every key that may be registered, without the slash before it."""
    max_regions: Count = 64
    max_bytes: Annotated[int, msgspec.Meta(ge=1, le=2**40)] = 2**28
    """Of all regions together."""
    max_copied_bytes: Annotated[int, msgspec.Meta(ge=1, le=2**40)] = 2**30
    """Of the inputs that were copied out of regions for requests that are being worked on."""


class Region:
    """Registered memory: `byte_size` bytes of the object `key`, from its byte `offset` on."""

    def __init__(self, name: str, key: str, offset: int, byte_size: int) -> None:
        self.name = name
        self.key = key
        self.offset = offset
        self.byte_size = byte_size
        self._file, self._writable = _opened(key)
        self._closed = False

    def check(self, where: str, offset: int, size: int, *, write: bool) -> None:
        """Raise `InvalidInput` unless these bytes are there now and may be read, or written to."""
        if self._closed:
            raise InvalidInput(f"{where}: shared memory region {self.name!r} was unregistered meanwhile")
        if write and not self._writable:
            raise InvalidInput(f"{where}: shared memory region {self.name!r} is read-only to this server")
        there, end = os.fstat(self._file).st_size, self.offset + offset + size
        if end > there:
            raise InvalidInput(
                f"{where}: expected {self.key!r}, the memory of region {self.name!r}, to have {end} bytes,"
                f" and it has {there} now"
            )

    def read(self, where: str, offset: int, size: int) -> bytes:
        """A copy of `size` bytes from `offset` on; raises `InvalidInput` if they are not there any more."""
        self.check(where, offset, size, write=False)
        parts, at = [], 0
        try:
            while at < size:
                parts.append(os.pread(self._file, size - at, self.offset + offset + at))
                at += len(parts[-1])
                if not parts[-1]:
                    raise InvalidInput(f"{where}: shared memory region {self.name!r} was truncated while it was read")
        except OSError as error:
            raise Unavailable(f"{where}: region {self.name!r} cannot be read: {error.strerror}") from error
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def write(self, where: str, offset: int, raw: Raw) -> None:
        """Put `raw` there, from `offset` on; raises `InvalidInput` if there is no such room any more."""
        view, at = memoryview(raw), 0
        self.check(where, offset, view.nbytes, write=True)
        try:
            while at < view.nbytes:
                at += os.pwrite(self._file, view[at:], self.offset + offset + at)
        except OSError as error:
            raise Unavailable(f"{where}: region {self.name!r} cannot be written to: {error.strerror}") from error

    def close(self) -> None:
        """Let go of it. Once."""
        self._closed = True
        os.close(self._file)


class Regions:
    """The regions of one server. `compatibility` is that of `ServerSettings`."""

    def __init__(self, settings: SharedMemorySettings, *, compatibility: str = "") -> None:
        self._settings = settings
        self._triton = compatibility == "triton"
        self._regions: dict[str, Region] = {}

    def register(self, name: str, key: str, offset: int, byte_size: int) -> None:
        """Let requests name `byte_size` bytes from `offset` on of the shared memory `key` ("/frames") as `name`.

        Raises `InvalidInput` if there is no such memory or the name is taken, `Overloaded` if there are enough.
        """
        where = f"shared memory region {name!r}"
        if not 0 < len(name) <= MAX_NAME_CHARS:
            raise InvalidInput(f"a shared memory region needs a name of 1 to {MAX_NAME_CHARS} characters")
        if name in self._regions:
            raise self.fault(InvalidInput, f"{where} already in manager", f"{where} is registered already")
        if len(self._regions) >= self._settings.max_regions:
            raise Overloaded(f"{where}: {self._settings.max_regions} regions are registered, which is the limit")
        taken = sum(region.byte_size for region in self._regions.values())
        if taken + byte_size > self._settings.max_bytes:
            raise Overloaded(
                f"{where}: there is no room for {byte_size} bytes: {taken} of {self._settings.max_bytes} are registered"
            )
        if not byte_size:
            raise InvalidInput(f"{where}: expected a size of at least one byte, got 0")
        file = key.removeprefix("/")
        if "/" in file or "\0" in file or file in {"", ".", ".."} or len(file.encode()) > MAX_KEY_BYTES:
            raise InvalidInput(f"{where}: expected the key of POSIX shared memory, such as '/frames', got {key!r}")
        if not file.startswith(self._settings.key_prefix):
            raise InvalidInput(f"{where}: expected a key that starts with {self._settings.key_prefix!r}, got {key!r}")
        try:
            region = Region(name, key, offset, byte_size)
        except OSError as error:
            theirs = f"Unable to open shared memory region: {key!r}"
            raise self.fault(InvalidInput, theirs, f"{where}: {key!r} cannot be opened: {error.strerror}") from error
        try:
            region.check(where, 0, byte_size, write=False)
        except InvalidInput as short:
            region.close()
            raise self.fault(InvalidInput, f"failed to register {where}: invalid args", str(short)) from None
        self._regions[name] = region

    def unregister(self, name: str) -> None:
        """Forget the region called `name`, or all of them if it is empty. One that there is not is no error."""
        for gone in [name] if name else list(self._regions):
            if (region := self._regions.pop(gone, None)) is not None:
                region.close()

    def status(self, name: str) -> Sequence[Region]:
        """The region called `name`, or all of them if it is empty; raises `NotFound`."""
        if not name:
            return tuple(self._regions.values())
        return (self.find(name, "status", "system shared memory region"),)

    def find(self, name: str, where: str, kind: str = "shared memory region") -> Region:
        """The region called `name`; raises `NotFound`, which says `where` it was named. `kind` is Triton's word."""
        if name not in self._regions:
            theirs = f"Unable to find {kind}: {name!r}"
            raise self.fault(NotFound, theirs, f"{where}: there is no shared memory region {name!r}")
        return self._regions[name]

    def fault(self, kind: type[HedgerowError], theirs: str, ours: str) -> HedgerowError:
        """The error in our words, behind Triton's for callers who look for those."""
        return kind(f"{theirs}: {ours}" if self._triton else ours)


def _opened(key: str) -> tuple[int, bool]:
    """A descriptor of the shared memory `key`, and whether it may be written to; raises OSError."""
    flags, path = os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY, FOLDER / key.removeprefix("/")
    try:
        file, writable = os.open(path, os.O_RDWR | flags), True
    except PermissionError:
        file, writable = os.open(path, os.O_RDONLY | flags), False
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise OSError(0, "it is no shared memory")
    return file, writable
