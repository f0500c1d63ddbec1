"""The retained messages by which the fleet says "there is something new". They never say what: TUF metadata does."""

import hashlib
import logging
from collections.abc import Callable

from google.protobuf.message import DecodeError

from hedgerow.link import Link, Topics
from hedgerow.proto.link_pb2 import Command

_log = logging.getLogger(__name__)


def follow(link: Link, topics: Topics, device: str, check: Callable[[], None]) -> None:
    """Have `check` called at each connection, each command but the last one again, and each new release timestamp."""
    # Other than the last is enough: who could send a huge serial must not be able to silence the ones after it.
    seen_serial, seen_timestamp = 0, b""

    def on_command(topic: str, payload: bytes, _retained: bool) -> None:
        nonlocal seen_serial
        try:
            command = Command.FromString(payload)
        except DecodeError:
            _log.warning("%d bytes on %s are no command", len(payload), topic)
            return
        if command.kind == Command.CHECK and command.serial != seen_serial:
            seen_serial = command.serial
            check()

    def on_timestamp(_topic: str, payload: bytes, _retained: bool) -> None:
        nonlocal seen_timestamp
        if (digest := hashlib.sha256(payload).digest()) != seen_timestamp:
            seen_timestamp = digest
            check()

    async def on_connected() -> None:
        check()

    link.subscribe(topics.command(device), on_command)
    link.subscribe(topics.release_timestamp(), on_timestamp)
    link.on_connected(on_connected)
