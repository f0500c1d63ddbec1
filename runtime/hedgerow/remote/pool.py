"""The endpoints of a remote: found by static and DNS targets, watched, chosen from, ejected, changed while in use."""

import asyncio
import logging
import random
import socket
import time
from collections.abc import Awaitable, Callable, Container, Iterable, Sequence

from hedgerow import rpc
from hedgerow.errors import ConfigError
from hedgerow.latency import LatencyWindow
from hedgerow.remote import balancing
from hedgerow.remote.connection import Connector
from hedgerow.remote.endpoint import Address, Endpoint
from hedgerow.remote.known import KnownModels
from hedgerow.remote.proof import warn_of_eavesdroppers
from hedgerow.remote.settings import RemoteSettings, Target

MAX_ADDRESSES = 64
"""Addresses of one name that are used; more are left out."""
RESOLVE_PAUSE_S = 1.0
"""Least time between two looks at the names, however many endpoints fail."""
RESOLVE_TIMEOUT_S = 10.0
DNS = "dns:"

Resolve = Callable[[str, int], Awaitable[Sequence[str]]]
"""The addresses ("host:port") of a name; raises `OSError`."""
Targets = str | Target | Iterable[str | Target]

log = logging.getLogger(__name__)


async def addresses(host: str, port: int) -> Sequence[str]:
    """The addresses of `host` as the operating system knows them."""
    found = await asyncio.get_running_loop().getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_ADDRCONFIG
    )
    return sorted({rpc.address(str(one[4][0]), port) for one in found})


class Pool:
    """The endpoints that `targets` lead to. Belongs to one event loop; `run` watches over them.

    It is the `Owner` of its endpoints. Without `run`, open breakers stay open and names are not resolved.
    """

    def __init__(
        self,
        name: str,
        targets: Targets,
        settings: RemoteSettings,
        latency: LatencyWindow,
        models: KnownModels,
        resolve: Resolve,
    ) -> None:
        self._name = name
        self._settings = settings
        self._latency = latency
        self._models = models
        self._resolve = resolve
        self._connector = Connector(
            ca_file=settings.ca_file,
            cert_file=settings.cert_file,
            key_file=settings.key_file,
            token=settings.token,
            connect_timeout_s=settings.connect_timeout_s,
            max_message_bytes=settings.max_message_bytes,
            native=settings.transport == "native",
        )
        self._draw = random.Random()  # noqa: S311 (no secret)
        self._targets: tuple[Target, ...] = ()
        self._resolved: dict[str, Sequence[str]] = {}
        self._unresolved: set[str] = set()
        self._retired: list[Endpoint] = []
        self._changed = asyncio.Event()
        self._look = asyncio.Event()
        self._looked = asyncio.Event()
        self.endpoints: tuple[Endpoint, ...] = ()
        self.update(targets)

    @property
    def reason(self) -> str:
        """Why none can be asked, in words; empty if one can."""
        if not self.endpoints:
            return "no address is known"
        for one in self.endpoints:  # not any(): this is asked for each request, and the first one is usually well
            if not one.open:
                return ""
        return f"circuit open: {'; '.join(dict.fromkeys(one.breaker.reason for one in self.endpoints))}"

    def choose(self, avoid: Container[Endpoint] = ()) -> Endpoint | None:
        """The endpoint to ask; None if none can be."""
        if len(self.endpoints) == 1:
            only = self.endpoints[0]
            return None if only.open else only
        return balancing.choose(
            self.endpoints, zone=self._settings.zone, now=time.monotonic(), draw=self._draw, avoid=avoid
        )

    def update(self, targets: Targets) -> None:
        """Lead to `targets` from now on. What is in flight elsewhere finishes there. Raises `ConfigError`."""
        given = [targets] if isinstance(targets, str | Target) else targets
        wanted = tuple(one if isinstance(one, Target) else Target(address=one) for one in given)
        for target in wanted:
            _split(target.address)
            if self._settings.token and not self._settings.ca_file and target not in self._targets:
                warn_of_eavesdroppers(target.address)
        self._targets = wanted
        self._settle()
        self._look.set()

    async def known(self, timeout_s: float) -> None:
        """Wait, where nothing but names is known, until they have been looked up once."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._looked.wait()
        except TimeoutError:
            return

    async def run(self) -> None:
        """Watch over the endpoints and the names until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._look_up(), name=f"{self._name}-names")
            watches: dict[Endpoint, asyncio.Task[None]] = {}
            while True:
                self._changed.clear()
                for endpoint in self.endpoints:
                    if endpoint not in watches:
                        watches[endpoint] = group.create_task(endpoint.run(), name=f"{endpoint.label}-watch")
                for endpoint in [one for one in watches if one not in self.endpoints]:
                    watches.pop(endpoint).cancel()
                    group.create_task(self._let_go(endpoint), name=f"{endpoint.label}-end")
                await self._changed.wait()

    async def close(self) -> None:
        """Let go of all connections."""
        for endpoint in (*self.endpoints, *self._retired):
            await endpoint.close()

    def opened(self, endpoint: Endpoint) -> None:
        """See `Owner`: its name may lead elsewhere by now."""
        if endpoint.address.authority:
            self._look.set()

    def closed(self, endpoint: Endpoint) -> None:
        """See `Owner`."""
        if all(one is endpoint or one.open for one in self.endpoints):
            self._latency.clear()  # of another time, and of waiting in vain

    def at_fault(self, endpoint: Endpoint) -> None:
        """See `Owner`."""
        now = time.monotonic()
        if not endpoint.ejected(now) and balancing.may_eject(endpoint, self.endpoints, now):
            faults = endpoint.conduct.faults
            log.warning("%s: left alone for %g s after %d faults", endpoint.label, endpoint.conduct.eject(now), faults)

    async def _let_go(self, endpoint: Endpoint) -> None:
        await endpoint.retire()
        self._retired.remove(endpoint)

    async def _look_up(self) -> None:
        while True:
            self._look.clear()
            for target in self._targets:
                if target.address.startswith(DNS):
                    await self._look_up_one(target.address)
            self._settle()
            self._looked.set()
            await asyncio.sleep(RESOLVE_PAUSE_S)
            try:
                async with asyncio.timeout(self._settings.resolve_s):
                    await self._look.wait()
            except TimeoutError:
                continue

    async def _look_up_one(self, name: str) -> None:
        """What was found last holds while a name cannot be resolved."""
        host, port = _split(name)
        try:
            async with asyncio.timeout(RESOLVE_TIMEOUT_S):
                found = await self._resolve(host, port)
        except (OSError, UnicodeError) as error:  # TimeoutError is an OSError
            found, problem = (), str(error) or "no answer"
        else:
            problem = "no addresses"
        if found:
            self._resolved[name] = found[:MAX_ADDRESSES]
            if name in self._unresolved:
                self._unresolved.remove(name)
                log.warning("%s: %s is resolved again", self._name, name)
        elif name not in self._unresolved:
            self._unresolved.add(name)
            log.warning("%s: cannot resolve %s: %s", self._name, name, problem)

    def _settle(self) -> None:
        """Have the endpoints that the targets lead to, those that there are already among them."""
        self._resolved = {
            name: found for name, found in self._resolved.items() if any(name == one.address for one in self._targets)
        }
        wanted: dict[Address, None] = {}
        for target in self._targets:
            if target.address.startswith(DNS):
                host, _ = _split(target.address)
                for at in self._resolved.get(target.address, ()):
                    wanted[Address(at, target.zone, host)] = None
            else:
                wanted[Address(target.address, target.zone)] = None
        there = {one.address: one for one in self.endpoints}
        if there.keys() == wanted.keys():
            return
        self._retired += [one for address, one in there.items() if address not in wanted]
        self.endpoints = tuple(there.get(address) or self._endpoint(address) for address in wanted)
        self._changed.set()

    def _endpoint(self, address: Address) -> Endpoint:
        return Endpoint(self._name, address, self._connector, self._settings, self._latency, self._models, self)


def _split(address: str) -> tuple[str, int]:
    host, _, port = address.removeprefix(DNS).removeprefix("///").rpartition(":")
    if not host or not port.isdecimal():
        raise ConfigError(f"target {address!r}: expected host:port or dns:host:port")
    return host.strip("[]"), int(port)
