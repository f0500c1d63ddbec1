"""A port for several processes: each listens on it by itself (SO_REUSEPORT), and the kernel deals connections out.

A connection stays with the process that it was dealt to. What the kernel would allow, that a server of somebody else
joins in unnoticed and takes its share, is ruled out between servers that hold their port like this.
"""

import contextlib
import socket
import sys
from collections.abc import Iterator

from hedgerow import rpc
from hedgerow.errors import ConfigError

SHARED = sys.platform == "linux"
"""Whether ports can be shared. Others have the option too, but there the last one that listens gets everything."""


@contextlib.contextmanager
def held(host: str, port: int) -> Iterator[int]:
    """The port (0: any free one), ours for the length of a ``with``, to be listened on with SO_REUSEPORT only.

    Raises `ConfigError` if anybody listens there or holds it, in this way or otherwise.
    """
    with contextlib.ExitStack() as stack:
        try:
            found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
            for family, _, _, _, (name, *_) in dict.fromkeys(found):
                place = stack.enter_context(_held(family, str(name), port))
                port = place.getsockname()[1]
        except OSError as error:
            wanted = rpc.address(host, port)
            raise ConfigError(f"server.host, server.port: cannot listen on {wanted}: {error.strerror}") from error
        yield port


def _held(family: socket.AddressFamily, name: str, port: int) -> socket.socket:
    """A socket that is bound there and takes no connections."""
    # This one listens without the option, which works only if nobody else is there.
    with socket.create_server((name, port), family=family) as alone:
        # From now on those with the option may come, first of all the one that stays when this one leaves. It does not
        # listen, so others that could be here twice (SO_REUSEADDR) would not mind it: it must say that it does.
        alone.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        place = socket.socket(family, socket.SOCK_STREAM)
        try:
            place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # past connections that have just ended
            place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            if family == socket.AF_INET6:
                place.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            place.bind(alone.getsockname())
            place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
        except BaseException:
            place.close()
            raise
    return place
