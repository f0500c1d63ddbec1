"""The device's metrics beside those of the runtime (`hedgerow.telemetry.metrics`): its releases, and what waits."""

import asyncio
from collections.abc import Iterator

from prometheus_client.core import GaugeMetricFamily, Metric

from hedgerow_edge.install import Phase
from hedgerow_edge.installer import Installer
from hedgerow_edge.store import Store


class DeviceMetrics:
    """Which release each model runs, which one is on its way, and how many samples wait: a `Source`.

    Look before each reading: the outbox is on the disk, where reading it may wait for another to be synced.
    """

    def __init__(self, installer: Installer, store: Store) -> None:
        self._installer = installer
        self._store = store
        self._waiting = 0

    async def look(self) -> None:
        """Find out what is not in memory."""
        self._waiting = await asyncio.to_thread(self._store.samples_waiting)

    def __call__(self) -> Iterator[Metric]:
        """The metrics now."""
        running = GaugeMetricFamily(
            "hedgerow_release_running", "Counter of the release that answers; 0 while none does.", labels=("model",)
        )
        target = GaugeMetricFamily(
            "hedgerow_release_target", "Counter of the release that is being installed; 0: none is.", labels=("model",)
        )
        failed = GaugeMetricFamily(
            "hedgerow_release_failed", "Counter of the last release that was refused; 0: none was.", labels=("model",)
        )
        phase = GaugeMetricFamily(
            "hedgerow_release_phase", "1 for the phase that the installation is in.", labels=("model", "phase")
        )
        for status in self._installer.status():
            running.add_metric((status.model,), status.running)
            target.add_metric((status.model,), status.target)
            failed.add_metric((status.model,), status.failed)
            for one in Phase:
                phase.add_metric((status.model, one), int(one == status.phase))
        yield from (running, target, failed, phase)
        yield GaugeMetricFamily("hedgerow_samples_waiting", "Samples in the outbox.", value=self._waiting)
