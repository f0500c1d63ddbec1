"""A line to another network that a test can make slow, lossy or a black hole. Needs root and /dev/net/tun, no more.

Both ends are real networks of the kernel's, so connections over it are real ones that know nothing of it; the packets
between pass through here. Nothing of it is left when the process ends, however it does.
"""

import asyncio
import ctypes
import fcntl
import itertools
import os
import random
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Self

TUN = Path("/dev/net/tun")
NAMESPACE = Path("/proc/thread-self/ns/net")
PACKET_BYTES = 65536
CLONE_NEWNET = 0x40000000
TUNSETIFF = 0x400454CA
SIOCSIFADDR, SIOCSIFDSTADDR, SIOCGIFFLAGS, SIOCSIFFLAGS = 0x8916, 0x8918, 0x8913, 0x8914
IFF_TUN, IFF_NO_PI, IFF_UP = 0x0001, 0x1000, 0x1

_libc = ctypes.CDLL(None, use_errno=True)
_numbers = itertools.count()


def missing() -> str:
    """Why there can be no lines here; empty if there can."""
    try:
        with Line():
            return ""
    except OSError as error:
        return f"no networks of our own ({error}): what black holes do to us is not tested"


class Line:
    """A line to `address`, whose sockets are made ``with far()``. Good, until told otherwise. For one event loop."""

    def __init__(self) -> None:
        self.loss = 0.0
        """Share of the packets that are lost, either way; 1: a black hole."""
        self.delay_s = 0.0
        """How long a packet takes one way."""
        number = next(_numbers)
        self._names = (f"hg{os.getpid()}n{number}", "far")
        # Of the network that RFC 2544 sets aside for tests, two for each line of each process.
        first = (os.getpid() * 64 + 2 * (number % 32)) % 2**17
        self._here, self.address = (
            socket.inet_ntoa(struct.pack("!I", (198 << 24) + (18 << 16) + first + i)) for i in (0, 1)
        )
        self._draw = random.Random(number)
        self._open: list[int] = []
        self._home = self._abroad = -1
        self._tuns: tuple[int, ...] = ()

    def __enter__(self) -> Self:
        try:
            self._home = self._keep(os.open(NAMESPACE, os.O_RDONLY))
            near = self._tun(self._names[0], self._here, self.address)
            _check(_libc.unshare(CLONE_NEWNET))
            try:
                self._abroad = self._keep(os.open(NAMESPACE, os.O_RDONLY))
                far = self._tun(self._names[1], self.address, self._here)
            finally:
                _check(_libc.setns(self._home, CLONE_NEWNET))
        except BaseException:
            self.__exit__()
            raise
        self._tuns = (near, far)
        with suppress(RuntimeError):  # without a loop nothing gets through
            loop = asyncio.get_running_loop()
            loop.add_reader(near, partial(self._carry, loop, near, far))
            loop.add_reader(far, partial(self._carry, loop, far, near))
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(RuntimeError):
            loop = asyncio.get_running_loop()
            for tun in self._tuns:
                loop.remove_reader(tun)
        self._tuns = ()
        while self._open:
            os.close(self._open.pop())

    @contextmanager
    def far(self) -> Iterator[None]:
        """Sockets that this thread makes in here are at the other end of the line."""
        _check(_libc.setns(self._abroad, CLONE_NEWNET))
        try:
            yield
        finally:
            _check(_libc.setns(self._home, CLONE_NEWNET))

    def connections(self) -> int:
        """Connections over the line that this process holds at this end."""
        (peer,) = struct.unpack("=I", socket.inet_aton(self.address))
        rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
        return sum(row[2].startswith(f"{peer:08X}:") and row[9] != "0" for row in rows)

    def _carry(self, loop: asyncio.AbstractEventLoop, source: int, sink: int) -> None:
        with suppress(BlockingIOError):
            while True:
                packet = os.read(source, PACKET_BYTES)
                if self._draw.random() >= self.loss:
                    loop.call_later(self.delay_s, self._put, sink, packet)

    def _put(self, sink: int, packet: bytes) -> None:
        if sink in self._tuns:
            with suppress(BlockingIOError):  # lost, as it happens to packets
                os.write(sink, packet)

    def _tun(self, name: str, own: str, peer: str) -> int:
        tun = self._keep(os.open(TUN, os.O_RDWR | os.O_NONBLOCK))
        fcntl.ioctl(tun, TUNSETIFF, struct.pack("16sH14x", name.encode(), IFF_TUN | IFF_NO_PI))
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
            for request, address in ((SIOCSIFADDR, own), (SIOCSIFDSTADDR, peer)):
                packed = struct.pack("16sHH4s8x", name.encode(), socket.AF_INET, 0, socket.inet_aton(address))
                fcntl.ioctl(control, request, packed)
            asked = fcntl.ioctl(control, SIOCGIFFLAGS, struct.pack("16sH14x", name.encode(), 0))
            (flags,) = struct.unpack("16xH14x", asked)
            fcntl.ioctl(control, SIOCSIFFLAGS, struct.pack("16sH14x", name.encode(), flags | IFF_UP))
        return tun

    def _keep(self, descriptor: int) -> int:
        self._open.append(descriptor)
        return descriptor


def _check(result: int) -> None:
    if result != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
