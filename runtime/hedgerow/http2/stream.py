"""What a connection keeps of one stream: how far each side has got, and how far it may go."""

import math
from collections import deque

STREAM_WINDOW = 4 * 2**20
"""What we grant each stream, in bytes."""


class Stream:
    """One stream. `ended` says that the other side has sent all of it, `finished` that we have."""

    __slots__ = ("ended", "expires", "finished", "granted", "id", "last", "owed", "unsent", "unsent_bytes", "window")

    def __init__(self, identity: int, window: int) -> None:
        self.id = identity
        self.window = window
        """What we may still send."""
        self.granted = STREAM_WINDOW
        """What the other side may still send."""
        self.owed = 0
        """What it has sent and was not granted again."""
        self.unsent: deque[memoryview] = deque()
        self.unsent_bytes = 0
        self.last: bytes | None = None
        """The block of headers that ends our side once `unsent` is sent; empty to end it with the data."""
        self.expires = math.inf
        """When whoever holds the connection gives the stream up, by the clock there."""
        self.ended = False
        self.finished = False
