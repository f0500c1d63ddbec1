"""What the fleet sees of this device: births, statuses, and the will that the broker speaks for it when it is gone.

Every connection has a session number, larger than all before; its birth, its statuses and its will carry it, so that a
will which comes late is known to be old (as in Sparkplug B). All are retained, so that a fleet service that was away
knows where things stand.
"""

import asyncio
import logging
import platform
import time
from collections.abc import Callable

from hedgerow import __version__
from hedgerow.errors import LinkError
from hedgerow.link import Link, Topics
from hedgerow.proto.link_pb2 import Birth, Status
from hedgerow_edge.store import Store

STATUS_INTERVAL_S = 0.25
"""At most one status in this time: progress comes with every chunk."""
GOODBYE_TIMEOUT_S = 2.0

_log = logging.getLogger(__name__)


class Presence:
    """Says over the link that it is attached to who the device is and how it fares, while `run` runs."""

    def __init__(self, store: Store, topics: Topics, device: str, profile: str) -> None:
        self.topics = topics
        self._store = store
        self._device = device
        self._profile = profile
        self._address = ""
        self._report: Callable[[Status], None] = lambda _status: None
        self._link: Link | None = None
        self._session = 0
        self._serial = 0
        self._news = asyncio.Event()

    @property
    def session(self) -> int:
        """The number of the present connection, or of the last."""
        return self._session

    def will(self) -> tuple[str, bytes, bool]:
        """The will of a new connection, for `Link`; begins its session."""
        self._session = self._store.next_session()
        self._serial = 0
        will = Status(session=self._session, online=False)
        return self.topics.status(self._device), will.SerializeToString(), True

    def attach(self, link: Link, address: str, report: Callable[[Status], None]) -> None:
        """Have every connection of `link` begin with a birth, which gives `address`, and a status.

        `report` puts the facts into a status. The link must have been made with this `will`.
        """
        self._link, self._address, self._report = link, address, report
        link.on_connected(self._be_born)

    def changed(self) -> None:
        """Have the status said again soon."""
        self._news.set()

    async def run(self) -> None:
        """Say the status whenever it changed and there is a connection, until cancelled."""
        assert self._link is not None
        while True:
            await self._news.wait()
            await self._link.wait_connected()
            self._news.clear()
            try:
                await self._say_status()
            except LinkError as error:
                _log.debug("a status was not heard: %s", error)  # the next connection begins with one
            await asyncio.sleep(STATUS_INTERVAL_S)

    async def goodbye(self) -> None:
        """Say that the device goes offline in good order, if it is still heard."""
        if self._link is not None and self._link.connected:
            try:
                await self._say_status(online=False)
            except LinkError as error:
                _log.debug("the goodbye was not heard: %s", error)

    async def _be_born(self) -> None:
        assert self._link is not None
        birth = Birth(
            session=self._session,
            device=self._device,
            hedgerow_version=__version__,
            profile=self._profile,
            platform=f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
            unix_ms=_now_ms(),
            address=self._address,
        )
        await self._link.publish(self.topics.birth(self._device), birth.SerializeToString(), retain=True)
        await self._say_status()

    async def _say_status(self, *, online: bool = True) -> None:
        assert self._link is not None
        self._serial += 1
        status = Status(session=self._session, online=online, serial=self._serial, unix_ms=_now_ms())
        self._report(status)
        topic = self.topics.status(self._device)
        timeout_s = {} if online else {"timeout_s": GOODBYE_TIMEOUT_S}
        await self._link.publish(topic, status.SerializeToString(), retain=True, **timeout_s)


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
