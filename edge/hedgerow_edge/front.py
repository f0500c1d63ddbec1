"""What stands around the router: quotas and splits before it, shadows and the cache between it and the host.

::

    Server ── Quotas ── Split ── Router ── Shadow ── CachedBackend ── ModelHost

A split is before the router, so that each release keeps its own gate and guarantee; a shadow is behind it, so that
students are held against students. What the settings do not ask for is not there.
"""

import asyncio
from collections.abc import Iterator

from prometheus_client.core import Metric

from hedgerow.backend import Backend
from hedgerow.cache import CachedBackend
from hedgerow.router import Router
from hedgerow.telemetry.traffic import of_cache, of_quotas, of_shadows, of_splits
from hedgerow.traffic.quotas import Quotas
from hedgerow.traffic.shadow import Mirror, Shadow
from hedgerow.traffic.split import Split
from hedgerow_edge.settings import AgentSettings


class Front:
    """Built in two steps, because the router comes between them: `edge` is for its routes, `before` for the server."""

    def __init__(self, settings: AgentSettings, host: Backend) -> None:
        self._settings = settings
        self.edge = host
        """What answers on the device."""
        self._cache: CachedBackend | None = None
        self._shadow: Shadow | None = None
        self._split: Split | None = None
        self._quotas: Quotas | None = None
        if settings.cache.models:
            self.edge = self._cache = CachedBackend(self.edge, settings.cache)
        if settings.shadows:
            mirrors = {model: Mirror(host, one, local=True) for model, one in settings.shadows.items()}
            self.edge = self._shadow = Shadow(self.edge, mirrors)

    def before(self, router: Router) -> Backend:
        """What the server serves."""
        front: Backend = router
        if self._settings.splits:
            splits = {model: one.over(router, local=True) for model, one in self._settings.splits.items()}
            front = self._split = Split(router, splits)
        if self._settings.tenants is not None:
            front = self._quotas = Quotas(front, self._settings.tenants)
        return front

    def metrics(self) -> Iterator[Metric]:
        """What has come of it: a `telemetry.metrics.Source`."""
        yield from of_cache(self._cache)
        yield from of_splits({} if self._split is None else self._split.splits)
        yield from of_shadows({} if self._shadow is None else self._shadow.mirrors)
        yield from of_quotas(self._quotas)

    async def run(self) -> None:
        """Watch the splits and feed the shadows until cancelled."""
        async with asyncio.TaskGroup() as group:
            for part in (self._split, self._shadow):
                if part is not None:
                    group.create_task(part.run())
