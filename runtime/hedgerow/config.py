"""Settings from a TOML file and the environment, frozen and checked, with errors that name the key.

A daemon declares its settings as a frozen `msgspec.Struct` and calls `load`. The environment wins over the file:
``HEDGEROW_SERVER__PORT=9000`` sets ``server.port``. Values from the environment are read as TOML where they are TOML
(numbers, booleans, arrays) and as text otherwise. This module is the only reader of the environment.
"""

import contextlib
import os
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal, TypeVar

import msgspec

from hedgerow.errors import ConfigError

PREFIX = "HEDGEROW_"
SECRETS: Final = frozenset({"token", "control_token", "password"})
"""Names of settings that nobody should find in a log."""

Port = Annotated[int, msgspec.Meta(ge=0, le=65535)]
Seconds = Annotated[float, msgspec.Meta(gt=0)]
Share = Annotated[float, msgspec.Meta(ge=0, le=1)]
Count = Annotated[int, msgspec.Meta(ge=1)]


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of every settings section: frozen, keyword-only, an unknown key is an error, and secrets are not shown."""

    def __rich_repr__(self) -> list[tuple[str, Any]]:
        return [(name, "…" if name in SECRETS and value else value) for name, value in super().__rich_repr__()]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self.__rich_repr__())})"


class ServerSettings(Settings, frozen=True, kw_only=True):
    """Where OIP is served."""

    host: str = "127.0.0.1"
    port: Port = 8001
    """0: any free port."""
    reuse_port: bool = False
    """Whether other processes of the same user may listen there too (SO_REUSEPORT), which share the connections."""
    max_message_bytes: Annotated[int, msgspec.Meta(ge=1, le=2**31 - 1)] = 2**31 - 1
    drain_s: Seconds = 10.0
    """How long requests in flight may take at shutdown."""
    default_timeout_s: Seconds = 60.0
    """The deadline of a request that brings none."""
    max_inflight: Count = 1024
    """Requests being worked on at once; more are refused."""
    max_calls: Count = 2048
    """Calls at once of any kind: requests, idle streams, health and its watchers. More are refused. Far enough above
    `max_inflight` that requests meet that first, which says when to come back."""
    compatibility: Literal["", "triton"] = ""
    """Whose name and error texts clients are given that hold them against what they know."""
    model_control: bool = False
    """Whether callers may list, load and unload models."""
    control_token: str = ""
    """What they must bring to do so, as "authorization: Bearer TOKEN"; empty: nothing."""
    max_connections: Count = 16384
    """More are hung up on. Only the native transport counts them."""
    max_buffered_bytes: Annotated[int, msgspec.Meta(ge=1)] = 2**32
    """Of messages that are still coming, all together; more are refused. Only the native transport counts them."""
    transport: str = "native"
    """What speaks gRPC: a module of `hedgerow.transports`."""
    compression: Literal["", "gzip", "deflate"] = ""
    """Of answers, to callers who take it."""
    keepalive_s: Seconds = 60.0
    """Silence after which a client is asked whether it is there; without an answer for as long it is let go, and so is
    a call whose caller has neither sent what is missing nor taken what is ready."""
    tls_cert_file: str = ""
    """PEM file with the server's certificate chain; empty: in the clear."""
    tls_key_file: str = ""
    tls_client_ca_file: str = ""
    """PEM file of the authority that callers' certificates must come from; empty: callers need none."""


class BrokerSettings(Settings, frozen=True, kw_only=True):
    """Where the MQTT broker is, and how to be let in."""

    host: str = "127.0.0.1"
    port: Port = 1883
    username: str = ""
    password: str = ""
    ca_file: str = ""
    """PEM file of the authority that signed the broker's certificate; empty: no TLS."""
    keepalive_s: Annotated[int, msgspec.Meta(ge=1, le=3600)] = 30


T = TypeVar("T", bound=Settings)


def load(kind: type[T], file: Path | None = None, environ: Mapping[str, str] | None = None) -> T:
    """Settings of `kind` from `file` and the environment; raises `ConfigError` naming the key and what it should be."""
    tree: dict[str, Any] = {}
    if file is not None:
        try:
            tree = tomllib.loads(file.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"cannot read the settings file {file}: {error.strerror}") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{file} is not TOML: {error}") from error
    for name, text in (os.environ if environ is None else environ).items():
        if name.startswith(PREFIX) and "__" in name:
            _set(tree, name.removeprefix(PREFIX).lower().split("__"), text, name)
    try:
        return msgspec.convert(tree, kind)
    except msgspec.ValidationError as error:
        raise ConfigError(_explain(str(error), file)) from error


def variable(name: str, default: str = "") -> str:
    """One variable of the environment, for what is no setting of ours (NO_COLOR, XDG_STATE_HOME)."""
    return os.environ.get(name, default)


def environment(**extra: str) -> dict[str, str]:
    """The environment for a child process, with `extra` on top."""
    return {**os.environ, **extra}


@contextlib.contextmanager
def exported(**variables: str) -> Iterator[None]:
    """Variables set for the length of a ``with``, for libraries that take settings from the environment only."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _set(tree: dict[str, Any], path: list[str], text: str, variable_name: str) -> None:
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"{variable_name}: {key} is a value, not a section")
    try:
        value: Any = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    tree[path[-1]] = value


def _explain(message: str, file: Path | None) -> str:
    """msgspec says "Expected `int`, got `str` - at `$.server.port`": put the key first."""
    what, _, where = message.partition(" - at `$")
    key = where.rstrip("`").removeprefix(".") or "settings"
    source = f" (in {file} or the environment)" if file else ""
    return f"{key}: {what[:1].lower()}{what[1:]}{source}"
