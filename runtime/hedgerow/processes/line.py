"""What a process that serves and the one that started it say to each other, over a socket that is its standard input.

Frames: four bytes with the length, then so many. Each of the parent's is answered by one of the process's:

1. what it is told (its settings); an empty one, once all that takes time is done and it could listen;
2. an empty one, have it listen; an empty one, once it does;
3. and so on: an empty one, how does it fare; a `Report`.

When the parent hangs up, or is gone, the process drains and ends.
"""

import asyncio

import msgspec

from hedgerow.errors import HedgerowError

MAX_FRAME_BYTES = 64 * 2**20
LENGTH_BYTES = 4


class Report(msgspec.Struct, frozen=True, array_like=True):
    """How a process fares."""

    ready: bool
    metrics: bytes
    """In Prometheus' text form."""


def frame(content: bytes) -> bytes:
    """`content` as it is sent."""
    return len(content).to_bytes(LENGTH_BYTES) + content


async def read_frame(reader: asyncio.StreamReader) -> bytes:
    """The next frame's content; raises EOFError if the other side has hung up or is gone."""
    try:
        length = int.from_bytes(await reader.readexactly(LENGTH_BYTES))
        if length > MAX_FRAME_BYTES:
            raise HedgerowError(f"a frame of {length} bytes is no frame; {MAX_FRAME_BYTES} are allowed")
        return await reader.readexactly(length)
    except ConnectionError as error:  # it went before it had read what we sent
        raise EOFError from error
