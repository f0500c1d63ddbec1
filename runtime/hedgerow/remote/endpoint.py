"""One address of a remote: its connection, its breaker, its conduct, what it has in flight, and the watch over it.

What the wire can do to a caller is bounded here: connecting, a call, and an endpoint that is down, which costs one
request a moment and the others nothing. `run` watches: it connects early, notices silence, closes the breaker when the
endpoint is back, and keeps metadata fresh.
"""

import asyncio
import logging
import random
import time
from collections import deque
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Protocol

from google.protobuf.message import Message

from hedgerow.backend import Deadline
from hedgerow.errors import (
    BackendUnavailable,
    DeadlineExceeded,
    EngineFault,
    HedgerowError,
    Overloaded,
    Unavailable,
    Unsupported,
)
from hedgerow.latency import LatencyWindow, PeakLatency
from hedgerow.lifecycle import InFlight
from hedgerow.proto import oip_pb2
from hedgerow.remote.balancing import Conduct
from hedgerow.remote.breaker import Breaker
from hedgerow.remote.connection import FIRST_HOP, Connection, Connector, Metadata, meant, parsed
from hedgerow.remote.known import KnownModels
from hedgerow.remote.settings import RemoteSettings
from hedgerow.wire import Serialised

ROUND_TRIPS = 8
"""Heartbeats whose quickest is taken for the way there and back."""
MAX_WAY_BACK = 0.1
"""The most of the time left that is kept for the way back."""
NEARLY = 0.9
"""Share of the time that an answer usually takes which is as good as all of it: callers who wait equally long, and in
vain, would else be taken by turns for impatient by what they have taught themselves."""
SILENT = "it does not answer in time"

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Address:
    """Where an endpoint is: "host:port", its zone, and the name it was found by where `at` is a number."""

    at: str
    zone: str = ""
    authority: str = ""


class Owner(Protocol):
    """Is told what becomes of an endpoint."""

    def opened(self, endpoint: "Endpoint") -> None:
        """Its circuit opened."""
        ...

    def closed(self, endpoint: "Endpoint") -> None:
        """Its circuit closed again."""
        ...

    def at_fault(self, endpoint: "Endpoint") -> None:
        """It has failed so often in a row that it should be left alone for a while."""
        ...


class Endpoint:
    """Calls one address. `name` is for errors, which callers see, `label` for the log. Belongs to one event loop.

    `latency` and `models` are those of the whole remote.
    """

    def __init__(
        self,
        name: str,
        address: Address,
        connector: Connector,
        settings: RemoteSettings,
        latency: LatencyWindow,
        models: KnownModels,
        owner: "Owner",
    ) -> None:
        self.address = address
        self.label = f"{name} ({address.at})"
        self.breaker = Breaker(settings.failures_to_open)
        self.conduct = Conduct()
        self.inflight = InFlight()
        self._name = name
        self._connector = connector
        self._settings = settings
        self._latency = latency
        self._models = models
        self._owner = owner
        self._connection: Connection | None = None
        self._pace = PeakLatency()
        self._round_trips: deque[float] = deque(maxlen=ROUND_TRIPS)
        self._way_back_s = 0.0
        self._opened_at = 0.0
        self._opened = asyncio.Event()

    @property
    def zone(self) -> str:
        """See `balancing.Candidate`."""
        return self.address.zone

    @property
    def open(self) -> bool:
        """See `balancing.Candidate`."""
        return self.breaker.open

    def ejected(self, now: float) -> bool:
        """See `balancing.Candidate`."""
        return self.conduct.ejected(now)

    def cost(self, now: float) -> float:
        """See `balancing.Candidate`: seconds. One that has never answered gets one request at a time to show itself."""
        if not self._pace.known:
            return float("inf") if self.inflight.count else 0.0
        return self._pace.value(now) * (self.inflight.count + 1)

    async def unary(
        self, method: str, request: Serialised, deadline: Deadline, metadata: Metadata = (), *, timed: bool = False
    ) -> bytes:
        """The answer to one call. Where it is `timed`, what its time-out says of the latency is remembered."""
        with self.inflight:
            connection = self._connection
            if connection is None or self.breaker.open or not connection.standing:
                connection = await self._connected(deadline)
            started = time.monotonic()
            timeout_s = self._timeout_s(deadline.at - started)
            try:
                answer = await connection.unary(method, request, timeout_s, metadata)
            except HedgerowError as fault:
                took_s = time.monotonic() - started
                raise self._fault(fault, connection, took_s, timeout_s, timed=timed) from fault
        self.breaker.succeeded()
        return answer

    async def stream(
        self, method: str, request: Serialised, deadline: Deadline, metadata: Metadata
    ) -> AsyncGenerator[bytes, None]:
        """The answers to one request."""
        with self.inflight:
            connection = await self._connected(deadline)
            started = time.monotonic()
            timeout_s = self._timeout_s(deadline.at - started)
            try:
                async with aclosing(connection.stream(method, request, timeout_s, metadata)) as answers:
                    async for answer in answers:
                        yield answer
            except HedgerowError as fault:
                took_s = time.monotonic() - started
                raise self._fault(fault, connection, took_s, timeout_s, timed=False) from fault
        self.breaker.succeeded()

    def answered(self, seconds: float, now: float) -> None:
        """Count a good answer that took `seconds`; `now` is on the monotonic clock."""
        self._pace.add(seconds, now)
        self.conduct.answered()

    def waited(self, seconds: float) -> None:
        """Count an answer that nobody waited for any longer."""
        self._latency.add_bound(seconds)
        self._pace.add(seconds, time.monotonic())

    def faulted(self) -> None:
        """Count a fault that is the server's. While the circuit is open they are casualties of one outage."""
        if not self.open and self.conduct.faulted():
            self._owner.at_fault(self)

    async def run(self) -> None:
        """Watch over the connection until cancelled."""
        pause_s = self._settings.probe_min_s
        while True:
            if await self._probe():
                pause_s = self._settings.probe_min_s
                self._opened.clear()
                try:
                    async with asyncio.timeout(self._settings.heartbeat_s):
                        await self._opened.wait()
                except TimeoutError:
                    continue
            # Jitter, so that the callers of a remote that comes back do not all come at once.
            await asyncio.sleep(pause_s * random.uniform(0.5, 1.0))  # noqa: S311 (no secret)
            pause_s = min(2 * pause_s, self._settings.probe_max_s)

    async def retire(self) -> None:
        """Let what is in flight finish, then close."""
        await self.inflight.idle(self._settings.timeout_s)
        await self.close()

    async def close(self) -> None:
        """Let go of the connection; a later call makes another."""
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.close()

    def _timeout_s(self, remaining_s: float) -> float:
        """How long a call may take of what is left; raises `DeadlineExceeded` if that is nothing.

        The endpoint's clock starts when the call arrives, half a round trip from now: with that much taken off, its
        deadline and the caller's are the same moment, and it never works on what nobody waits for any more.
        """
        if remaining_s <= 0:
            raise DeadlineExceeded(f"the deadline passed before {self._name} was asked")
        return min(self._settings.timeout_s, remaining_s - min(self._way_back_s, MAX_WAY_BACK * remaining_s))

    async def _connected(self, deadline: Deadline) -> Connection:
        """A connection that stands."""
        if self.breaker.open:
            raise BackendUnavailable(f"{self._name} unavailable: circuit open: {self.breaker.reason}")
        deadline.check(f"{self._name} was asked")
        connection = self._connection = self._connection or self._new_connection()
        limit_s = min(self._settings.connect_timeout_s, deadline.remaining)
        try:
            async with asyncio.timeout(limit_s):
                await connection.ready()
        except TimeoutError:
            if limit_s < self._settings.connect_timeout_s:
                raise DeadlineExceeded(f"the deadline passed before {self._name} was connected") from None
            reason = f"no connection within {limit_s:g} s"
        except ConnectionError as error:
            reason = str(error)
        else:
            return connection
        self.faulted()
        self._trip(reason)
        raise BackendUnavailable(f"{self._name} unavailable: {reason}")

    def _fault(
        self, fault: HedgerowError, connection: Connection, took_s: float, timeout_s: float, *, timed: bool
    ) -> HedgerowError:
        """What a failed call means to the caller; counts it."""
        if isinstance(fault, Unavailable):
            if connection is self._connection:  # else it went down with a connection that was given up
                self.faulted()
                self._failed(str(fault))
            return BackendUnavailable(f"{self._name} unavailable: {fault}", retry_after_s=fault.retry_after_s)
        if isinstance(fault, DeadlineExceeded):
            expected_s = NEARLY * (self._latency.quantile(0.95) or self._settings.connect_timeout_s)
            # With less time than an answer usually takes, its absence says nothing about the endpoint's health, and
            # nothing about its latency but that it is longer.
            if took_s >= expected_s:
                self.faulted()
                self._failed(SILENT)
            if timed and took_s >= expected_s:
                self._latency.add(took_s)
                self._pace.add(took_s, time.monotonic())
            elif timed:
                self.waited(took_s)
            return DeadlineExceeded(f"{self._name} did not answer within {timeout_s * 1000:.0f} ms")
        self.breaker.succeeded()  # it is there, and this is its answer
        kind = meant(fault)
        if kind is EngineFault:
            self.faulted()
        return kind(f"{self._name}: {fault}", retry_after_s=fault.retry_after_s)

    async def _probe(self) -> bool:
        """Ask after the endpoint: closes the breaker if it answers, counts a failure if not.

        While the breaker is open each probe brings a connection of its own, which replaces the old one if it is good:
        the old one may hang on a path that no longer exists.
        """
        spare = self.breaker.open
        connection: Connection | None
        examined = connection = self._new_connection() if spare else self._connection or self._new_connection()
        if not spare:
            self._connection = connection
        try:
            problem = await self._problem(examined)
            if spare and not problem:
                connection, self._connection = self._connection, connection
        finally:
            if spare and connection is not None:  # the old one, or a new one that is no good
                await connection.close()
        if problem:
            self._failed(problem)
            return False
        if self.breaker.close():
            self._pace.clear()  # of another time
            self._owner.closed(self)
            log.warning("%s: circuit closed after %.1f s", self.label, time.monotonic() - self._opened_at)
        return True

    async def _problem(self, connection: Connection) -> str:
        """What keeps the endpoint from answering, in words; empty if nothing does."""
        try:
            async with asyncio.timeout(self._settings.probe_timeout_s):
                await connection.ready()
                return await self._examine(connection)
        except TimeoutError:
            return SILENT
        except ConnectionError as error:
            self._trip(str(error))
            return str(error)
        except Overloaded:
            return ""  # it is there, and this is its answer
        except HedgerowError as error:  # whatever listens there, it must not end the watch
            return str(error)

    async def _examine(self, connection: Connection) -> str:
        async def ask(method: str, request: Message) -> bytes:
            return await connection.unary(
                method, request.SerializeToString(), self._settings.probe_timeout_s, FIRST_HOP
            )

        started = time.monotonic()
        try:
            raw = await ask("ServerReady", oip_pb2.ServerReadyRequest())
        except Unsupported:  # a server of models only; it answers
            ready = True
        else:
            ready = parsed(oip_pb2.ServerReadyResponse.FromString, raw, self._name).ready
        self._round_trips.append(time.monotonic() - started)
        self._way_back_s = min(self._round_trips) / 2
        return await self._models.examine(ask, server_ready=ready)

    def _failed(self, reason: str) -> None:
        if self.breaker.failed(reason):
            self._note_opened()

    def _trip(self, reason: str) -> None:
        if self.breaker.trip(reason):
            self._note_opened()

    def _note_opened(self) -> None:
        self._opened_at = time.monotonic()
        self._opened.set()
        self._owner.opened(self)
        log.warning("%s: circuit open: %s", self.label, self.breaker.reason)

    def _new_connection(self) -> Connection:
        return self._connector.connect(self.address.at, self.address.authority)
