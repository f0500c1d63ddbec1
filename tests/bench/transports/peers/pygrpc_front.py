"""pygrpc-native's low-level front as a transport: calls come in batches, from a thread, and are answered by id.

It serves no method whose requests stream; callers of those are told UNIMPLEMENTED.
"""

# mypy: disable-error-code="import-not-found"

import asyncio
import threading
from collections.abc import Mapping
from typing import Any

from pygrpc_native import EVENT_CANCEL, NativeGrpcFront

from hedgerow import rpc
from hedgerow.backend import Deadline
from hedgerow.config import ServerSettings
from hedgerow.errors import HedgerowError
from hedgerow.rpc import Method, Methods
from hedgerow.wire import joined

BATCH = 64
"""Events at most that are taken over at once."""


async def listen(methods: Methods, settings: ServerSettings) -> "FrontListener":
    """See `hedgerow.transports.Transport`."""
    return FrontListener(methods, settings)


class FrontListener:
    """See `hedgerow.transports.Listener`."""

    def __init__(self, methods: Methods, settings: ServerSettings) -> None:
        unary = {path: method for path, method in methods.items() if not method.client_streaming}
        keepalive_ms = round(settings.keepalive_s * 1000)
        self._front = NativeGrpcFront(
            rpc.address(settings.host, settings.port),
            [(path, method.server_streaming) for path, method in unary.items()],
            call_details=True,
            keepalive_time_ms=keepalive_ms,
            keepalive_timeout_ms=keepalive_ms,
        )
        self._methods = list(unary.values())
        self._loop = asyncio.get_running_loop()
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self.port: int = self._front.bound_port
        self._front.start()
        self._thread = threading.Thread(target=self._receive, name="front", daemon=True)
        self._thread.start()

    async def stop(self, grace_s: float) -> None:
        """See `Listener`."""
        if self._tasks:
            await asyncio.wait(self._tasks.values(), timeout=grace_s)
        for task in tuple(self._tasks.values()):
            task.cancel()
        await asyncio.to_thread(self._front.close)
        await asyncio.to_thread(self._thread.join)

    def _receive(self) -> None:
        while (events := self._front.recv_batch_details(BATCH)) is not None:
            self._loop.call_soon_threadsafe(self._take, events)

    def _take(self, events: list[Any]) -> None:
        for kind, identity, index, payload, _, details in events:
            if kind == EVENT_CANCEL:
                if identity in self._tasks:
                    self._tasks[identity].cancel()
                continue
            call = _Call(self._front, identity, details)
            answer = self._answer(self._methods[index], payload, call, identity)
            self._tasks[identity] = self._loop.create_task(answer)

    async def _answer(self, method: Method, received: bytes, call: "_Call", identity: int) -> None:
        try:
            answer = await method.answer(received, call)
            if answer is None:
                self._front.stream_end(identity)
            else:
                self._front.respond(identity, joined(answer))
        except HedgerowError as error:
            self._front.fail(identity, error.status.value[0], rpc.details(error), rpc.trailers(error))
        finally:
            del self._tasks[identity]


class _Call:
    """See `rpc.Call`."""

    def __init__(self, front: NativeGrpcFront, identity: int, details: Any) -> None:
        fields, _, remaining_s = details
        self._front, self._identity = front, identity
        self.peer = ""
        self.metadata: Mapping[str, str] = {key: value for key, value in fields if isinstance(value, str)}
        self.deadline = Deadline.never() if remaining_s is None else Deadline.after(remaining_s)

    async def write(self, message: bytes) -> None:
        await asyncio.to_thread(self._front.stream_send, self._identity, message)
