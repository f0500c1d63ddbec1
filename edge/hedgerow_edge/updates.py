"""Updates: learns what is assigned to this device, whenever there may be news, and has it installed."""

import asyncio
import logging
import sqlite3
from collections.abc import Callable, Collection, Sequence

from hedgerow.errors import HedgerowError, UntrustedRelease
from hedgerow.link import Link
from hedgerow.proto.link_pb2 import ModelStatus, Status
from hedgerow_edge.installer import Installer, UpdateSettings
from hedgerow_edge.store import Store
from hedgerow_edge.transfer import Counts, Transfer
from hedgerow_edge.trust import Assigned, Trust

FETCHED_BYTES, REFETCHED_BYTES = "bytes_fetched", "bytes_refetched"
"""The transfer's counters in the store, counted on over restarts."""

_log = logging.getLogger(__name__)


class Updates:
    """Everything between the link and the installer. Looks for news only while `run` runs.

    `reserved` are the models that the settings bring and that no release may replace; `on_change` is called whenever
    `report` may have something new to say.
    """

    def __init__(
        self,
        installer: Installer,
        store: Store,
        trust: Trust,
        transfer: Transfer,
        settings: UpdateSettings,
        *,
        reserved: Collection[str],
        on_change: Callable[[], None],
    ) -> None:
        self._installer = installer
        self._store = store
        self._trust = trust
        self._transfer = transfer
        self._settings = settings
        self._reserved = frozenset(reserved)
        self._on_change = on_change
        self._news = asyncio.Event()
        self._last_fault = ""
        self._trust_problem = ""
        self._left_alone: dict[str, str] = {}
        """By model: why what is assigned is not taken."""
        self._counts = Counts(store.counter(FETCHED_BYTES), store.counter(REFETCHED_BYTES))
        transfer.count_on(self._counts, self._keep)

    def check(self) -> None:
        """Have `run` look for news now, or again once it has done what it is doing."""
        self._news.set()

    def report(self, status: Status) -> None:
        """Fill in what runs, what is under way and what went wrong."""
        status.models.extend(self._installer.status())
        status.models.extend(ModelStatus(model=model, reason=why) for model, why in sorted(self._left_alone.items()))
        status.trust = self._trust_problem
        status.bytes_fetched, status.bytes_refetched = self._counts

    async def run(self, link: Link) -> None:
        """Finish what was begun, then look for news whenever there may be some, until cancelled."""
        failures = 0
        while True:
            fault = await self._attempt(link)
            if link.connected:  # else the link has said what is wrong
                self._say_fault(fault)
            failures = failures + 1 if fault else 0
            wait_s = self._settings.poll_s
            if failures:
                wait_s = min(wait_s, self._settings.retry_s * 2 ** min(failures - 1, 16))
            try:
                async with asyncio.timeout(wait_s):
                    await self._news.wait()
            except TimeoutError:
                pass

    async def _attempt(self, link: Link) -> str:
        """Take what is assigned. Why it is worth trying again soon; empty if there is nothing more to do."""
        try:
            await self._installer.finish_begun()
            await link.wait_connected()
            self._news.clear()
            done = [await self._installer.take(one, self._transfer) for one in await self._assigned()]
            if not self._installer.fetching:
                await asyncio.to_thread(self._transfer.prune)
        except (HedgerowError, sqlite3.Error, OSError) as error:
            return str(error) or type(error).__name__
        except Exception as error:  # noqa: BLE001  a fault of updating must not end serving
            _log.exception("looking for updates failed")
            return f"unexpected {type(error).__name__}"
        return "" if all(done) else "a transfer was interrupted"

    def _keep(self, counts: Counts) -> None:
        """Write down what came. Only what is written down is reported, so that no kill makes it less."""
        try:
            self._store.set_counters({FETCHED_BYTES: counts.fetched, REFETCHED_BYTES: counts.refetched})
        except sqlite3.Error as error:  # a full or locked disk must not cost the transfer; the next window tries again
            _log.debug("the transfer's counters cannot be kept: %s", error)
        else:
            self._counts = counts

    async def _assigned(self) -> Sequence[Assigned]:
        problem, assigned = "", tuple[Assigned, ...]()
        try:
            assigned = await self._trust.refresh()
        except UntrustedRelease as error:
            problem = str(error)
        if problem != self._trust_problem:
            if problem:
                _log.error("update refused: %s", problem)
            else:
                _log.info("updates are trusted again")
            self._trust_problem = problem
            self._on_change()
        if problem:
            return ()
        left_alone = {
            one.model: f"{one.name} is assigned, but this device's settings bring a {one.model} of its own"
            for one in assigned
            if one.model in self._reserved
        }
        if left_alone != self._left_alone:
            for why in left_alone.values():
                _log.warning("%s", why)
            self._left_alone = left_alone
            self._on_change()
        return [one for one in assigned if one.model not in self._reserved]

    def _say_fault(self, fault: str) -> None:
        """Once when it begins, once when it is over."""
        if fault and not self._last_fault:
            _log.warning("updates have to wait: %s", fault)
        elif self._last_fault and not fault:
            _log.info("updates go on")
        self._last_fault = fault
