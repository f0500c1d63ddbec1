"""Transports: ways to serve methods as gRPC. One module a transport, found by its file name.

Whatever serves them, methods see the same calls and callers the same protocol; the contract and fault tests run over
each transport found. A new one is a new file here with a function `listen`.
"""

import importlib
import pkgutil
from typing import Protocol

from hedgerow.config import ServerSettings
from hedgerow.errors import ConfigError
from hedgerow.rpc import Methods


class Listener(Protocol):
    """A server that listens."""

    @property
    def port(self) -> int:
        """The bound port."""
        ...

    async def stop(self, grace_s: float) -> None:
        """Take nothing new, give what is in flight `grace_s` to end, cancel the rest; idempotent."""
        ...


class Transport(Protocol):
    """What a module of this package offers."""

    async def listen(self, methods: Methods, settings: ServerSettings) -> Listener:
        """Serve `methods` where `settings` say; raises `ConfigError` if that cannot be."""
        ...


def known() -> tuple[str, ...]:
    """Names of all transports."""
    return tuple(sorted(module.name for module in pkgutil.iter_modules(__path__)))


async def listen(methods: Methods, settings: ServerSettings) -> Listener:
    """Serve `methods` by the transport that `settings` name; raises `ConfigError`."""
    if settings.transport not in known():
        raise ConfigError(f"server.transport: there is no {settings.transport!r}; there are: {', '.join(known())}")
    if not settings.tls_cert_file and (settings.tls_key_file or settings.tls_client_ca_file):
        raise ConfigError("server.tls_cert_file: is missing, and tls_key_file or tls_client_ca_file is there")
    transport: Transport = importlib.import_module(f"{__name__}.{settings.transport}")
    return await transport.listen(methods, settings)
