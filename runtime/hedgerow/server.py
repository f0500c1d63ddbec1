"""A gRPC server of one backend: the protocol's service with health and reflection, on a transport.

::

    async with Server(backend, ServerSettings(port=8001)) as server:
        await stop.wait()
"""

from collections.abc import Callable
from typing import Self

from hedgerow import transports
from hedgerow.backend import Backend, ModelControl
from hedgerow.config import ServerSettings
from hedgerow.health import Health, reflection_methods
from hedgerow.identity import Identify, as_said
from hedgerow.oip.service import SERVICE, OipService
from hedgerow.proto import oip_pb2
from hedgerow.rpc import Methods, address
from hedgerow.shared_memory.regions import Regions, SharedMemorySettings
from hedgerow.shared_memory.tensors import SharedTensors
from hedgerow.statistics import BatchCounts

FLUSH_S = 1.0
"""How long calls may linger after the drain: answers being sent, idle streams."""


class Server:
    """A gRPC server of one backend: OIP, health and reflection. An async context manager, or `start` and `stop`.

    The backend stays its owner's to close. With a `control`, callers may load and unload models. `around` may put
    something around the methods that are served, such as spans (`telemetry.tracing`). `batches` gives what ran of
    a model in the version that is serving, where somebody counts that. `identify` says for which tenant a call is. With
    `shared_memory`, tensors may lie there.
    """

    def __init__(
        self,
        backend: Backend,
        settings: ServerSettings,
        *,
        control: ModelControl | None = None,
        name: str = "hedgerow",
        around: Callable[[Methods], Methods] | None = None,
        batches: Callable[[str], BatchCounts | None] = lambda _: None,
        identify: Identify = as_said,
        shared_memory: SharedMemorySettings | None = None,
    ) -> None:
        self._settings = settings
        self._around = around
        self._shared: SharedTensors | None = None
        if shared_memory is not None:
            regions = Regions(shared_memory, compatibility=settings.compatibility)
            self._shared = SharedTensors(regions, shared_memory.max_copied_bytes)
        self.service = OipService(backend, settings, control, name, batches, identify, self._shared)
        self.listener: transports.Listener | None = None
        """The transport, while it listens."""
        self.port = 0
        """The port that is listened on, once started."""

    @property
    def address(self) -> str:
        """Where it listens: "host:port"."""
        return address(self._settings.host, self.port)

    async def start(self) -> int:
        """Listen; the bound port. Raises `ConfigError` if the address cannot be had."""
        names = [SERVICE.full_name]
        served: Methods = {
            **self.service.methods,
            **Health(self.service.ready, names).methods,
            **reflection_methods(names, [oip_pb2.DESCRIPTOR]),
        }
        if self._around is not None:
            served = self._around(served)
        self.listener = await transports.listen(served, self._settings)
        self.port = self.listener.port
        return self.port

    async def stop(self) -> None:
        """Say NOT_SERVING, refuse what is new, finish what is in flight within `drain_s`, then close. Idempotent."""
        listener, self.listener = self.listener, None
        if listener is None:
            return
        self.service.draining = True
        drained = False
        try:
            drained = await self.service.inflight.idle(self._settings.drain_s)
        finally:
            await listener.stop(FLUSH_S if drained else 0)
            if self._shared is not None:
                self._shared.regions.unregister("")
            self.service.close()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()
