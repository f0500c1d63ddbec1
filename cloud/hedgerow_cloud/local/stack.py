"""Everything on one machine: broker, fleet service, large models and one device, each a process of its own.

Where a round-trip time is asked for, a simulated link (`hedgerow_cloud.local.linkshaper`) stands between device and
large models.

::

    <home>/stack.toml                     addresses and models, chosen when the home is made
    <home>/{broker,fleet,serve,edge}.toml settings of each daemon, written at each start from stack.toml
    <home>/keys/                          offline keys
    <home>/{broker,fleet,edge}/           what each keeps
    <home>/logs/ <home>/run/              what they say, and which process each is

Everything listens on the loopback interface only.
"""

import contextlib
import json
import sys
import sysconfig
import time
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Self

import msgspec

from hedgerow.config import BrokerSettings, Port, Settings, load, variable
from hedgerow.durable import write_durably
from hedgerow.errors import ConfigError, HedgerowError
from hedgerow_cloud.local import probes
from hedgerow_cloud.local.broker import free_port
from hedgerow_cloud.local.children import Child

HOST = "127.0.0.1"
ORDER = ("broker", "fleet", "serve", "link", "edge")
"""In which they start; they stop the other way round."""
START_TIMEOUT_S = {"broker": 15.0, "fleet": 30.0, "serve": 180.0, "link": 10.0, "edge": 30.0}
WATCH_S = 0.5
ROOTS = ("release_root", "director_root")
STACK = "stack.toml"
CURRENT = "current-home"
"""In the default home: the path of the one that was used last."""


class Ports(Settings, frozen=True, kw_only=True):
    """Where each daemon listens."""

    broker: Port
    fleet: Port
    serve: Port
    link: Port
    link_stats: Port
    """Where the simulated link says what it has carried."""
    edge: Port


class StackSettings(Settings, frozen=True, kw_only=True):
    """What a home is made with."""

    ports: Ports
    device: str = "here"
    fleet: str = "home"
    teachers: dict[str, str] = msgspec.field(default_factory=dict)
    """Large models to serve: name to ONNX file. None: the device is on its own."""
    rtt_ms: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    """Round-trip time of the simulated link; 0: there is no such link."""
    broker: BrokerSettings | None = None
    """Where device and fleet meet; None: at the embedded broker."""
    edge: dict[str, dict[str, Any]] = msgspec.field(default_factory=dict)
    """Sections of the device's settings that go on top of ours."""


def default_home() -> Path:
    """Where `hedgerow up` keeps everything: in XDG's state folder."""
    return Path(variable("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "hedgerow"


def current_home() -> Path:
    """The home that was used last, or the default one."""
    pointer = default_home() / CURRENT
    return Path(pointer.read_text(encoding="utf-8")) if pointer.exists() else default_home()


class Stack:
    """The daemons of the home folder `home`. As a context manager it stops them at the end."""

    def __init__(self, home: Path) -> None:
        self.home = home.absolute()
        if not (self.home / STACK).exists():
            raise ConfigError(
                f"nothing was ever set up in {self.home}: `hedgerow up` does it, --home names another folder"
            )
        self.settings = load(StackSettings, self.home / STACK, environ={})
        self.children = {name: Child(self.home, name) for name in ORDER}

    @classmethod
    def provision(cls, home: Path, *, device: str = "here", fleet: str = "home", rtt_ms: float = 0.0) -> Self:
        """The stack in `home`; made with these settings if there is none: addresses, keys, repositories."""
        from hedgerow_cloud.publish import provision

        if not (home / STACK).exists():
            home.mkdir(parents=True, exist_ok=True, mode=0o700)
            _write(home / STACK, StackSettings(ports=_free_ports(), device=device, fleet=fleet, rtt_ms=rtt_ms))
        provision.create(home.absolute() / "keys", home.absolute() / "fleet")
        return cls(home)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def keys(self) -> Path:
        """The folder of the offline keys."""
        return self.home / "keys"

    def address(self, name: str) -> str:
        """Where a daemon listens: "127.0.0.1:port"."""
        return f"{HOST}:{getattr(self.settings.ports, name)}"

    def log(self, name: str) -> Path:
        """What a daemon says."""
        return self._child(name).log

    @property
    def of_use(self) -> list[str]:
        """The daemons that this home has a use for, in the order in which they start."""
        idle = {
            "broker": self.settings.broker is not None,
            "serve": not self.settings.teachers,
            "link": not (self.settings.teachers and self.settings.rtt_ms),
        }
        return [name for name in ORDER if not idle.get(name)]

    def running(self) -> list[str]:
        """The daemons that run, in the order in which they start."""
        return [name for name in ORDER if self.children[name].pid is not None]

    def teach(self, model: str, teacher: Path) -> None:
        """Serve the ONNX file `teacher` as the large model behind `model`, from the next start of "serve" on."""
        self._change(teachers={**self.settings.teachers, model: str(teacher.absolute())})

    def meet_at(self, broker: BrokerSettings) -> None:
        """Use `broker` instead of the embedded one, from the next start of the daemons on."""
        self._change(broker=broker)

    def start(self, *names: str) -> None:
        """Start daemons, all `of_use` by default, and return when each is ready; one that runs is left alone.

        Raises `HedgerowError` with the end of the log of one that does not start.
        """
        for name in sorted(names or self.of_use, key=ORDER.index):
            child = self._child(name)
            if child.pid is None:
                child.start(self._command(name))
            child.wait_ready(partial(self._ready, name), START_TIMEOUT_S[name])

    def stop(self, *names: str) -> None:
        """End daemons, all by default, the last started first; idempotent."""
        for name in sorted(names or ORDER, key=ORDER.index, reverse=True):
            self._child(name).stop()

    def restart(self, name: str) -> None:
        """Stop one daemon and start it again."""
        self.stop(name)
        self.start(name)

    def kill(self, name: str) -> None:
        """End one daemon with SIGKILL."""
        self._child(name).kill()

    def remember(self) -> None:
        """Make this the home that the command line talks to when it is told nothing else."""
        default_home().mkdir(parents=True, exist_ok=True, mode=0o700)  # a later `up` may live there
        write_durably(default_home() / CURRENT, str(self.home).encode())

    def watch(self) -> None:
        """Return at Ctrl-C; raises `HedgerowError` if a daemon that runs now ends before."""
        watched = self.running()
        with contextlib.suppress(KeyboardInterrupt):
            while all(self.children[name].pid is not None for name in watched):
                time.sleep(WATCH_S)  # polls: they may be other processes' children
            ended = next(name for name in watched if self.children[name].pid is None)
            raise HedgerowError(f"{ended} ended: {self.children[ended].tail()}")

    def _change(self, **settings: object) -> None:
        self.settings = msgspec.structs.replace(self.settings, **settings)
        _write(self.home / STACK, self.settings)

    def _child(self, name: str) -> Child:
        try:
            return self.children[name]
        except KeyError as error:
            raise ConfigError(f"there is no daemon {name!r}; there are: {', '.join(ORDER)}") from error

    @property
    def _cloud(self) -> str:
        """Where the device finds the large models; empty if there are none."""
        if not self.settings.teachers:
            return ""
        return self.address("link" if self.settings.rtt_ms else "serve")

    def _command(self, name: str) -> list[str]:
        """How to start a daemon; its settings are written first."""
        if name == "link":
            ports = self.settings.ports
            listen = ["--listen", str(ports.link), "--stats", str(ports.link_stats), "--to", self.address("serve")]
            return [
                sys.executable,
                "-m",
                "hedgerow_cloud.local.linkshaper",
                *listen,
                "--rtt-ms",
                str(self.settings.rtt_ms),
            ]
        config = self.home / f"{name}.toml"
        _write(config, self._settings_of(name))
        if name == "edge":
            # The device's package is never imported here: it is started as anybody would start it.
            return [str(Path(sysconfig.get_path("scripts"), "hedgerow-edge")), "--config", str(config)]
        return [sys.executable, "-m", "hedgerow_cloud.daemons", name, "--config", str(config)]

    def _ready(self, name: str) -> bool:
        """Ask a daemon whether it is ready."""
        match name:
            case "broker":
                return probes.accepts_mqtt(self.address(name))
            case "link":
                return probes.is_shaping(self.address("link_stats"))
            case "edge":
                return probes.lives(self.address(name))
            case _:
                return probes.is_healthy(self.address(name))

    def _settings_of(self, name: str) -> Mapping[str, Any]:
        ports, home = self.settings.ports, self.home
        broker = msgspec.to_builtins(self.settings.broker or BrokerSettings(host=HOST, port=ports.broker))
        match name:
            case "broker":
                return {"home": str(home / "broker"), "port": ports.broker}
            case "fleet":
                return {
                    "home": str(home / "fleet"),
                    "fleet": self.settings.fleet,
                    "server": {"host": HOST, "port": ports.fleet},
                    "broker": broker,
                }
            case "serve":
                return {
                    "server": {"host": HOST, "port": ports.serve},
                    "processes": 1,
                    "metrics": {"listen": f"{HOST}:0"},
                    "models": dict(self.settings.teachers),
                }
            case _:
                ours: dict[str, dict[str, Any]] = {
                    "device": {"id": self.settings.device, "fleet": self.settings.fleet, "state": str(home / "edge")},
                    "server": {"host": HOST, "port": ports.edge},
                    "metrics": {"listen": f"{HOST}:0"},  # `hedgerow top` reads which in the device's state folder
                    "link": broker,
                    "trust": {name: str(self.keys / f"{name.replace('_', '.')}.json") for name in ROOTS},
                    "cloud": {"target": self._cloud},
                    # Known before there is a release: until then the large model answers.
                    "routes": {model: {} for model in self.settings.teachers},
                    "samples": {"collect": "escalated"},
                }
                extra = self.settings.edge
                return {key: {**ours.get(key, {}), **extra.get(key, {})} for key in {**ours, **extra}}


def _free_ports() -> Ports:
    """Ports that are free now, all different."""
    names, found = Ports.__struct_fields__, set[int]()
    while len(found) < len(names):
        found.add(free_port())
    return Ports(**dict(zip(names, found, strict=True)))


def _write(path: Path, settings: Settings | Mapping[str, Any]) -> None:
    tree = msgspec.to_builtins(settings)
    write_durably(path, ("\n".join(_toml(tree)) + "\n").encode(), mode=0o600)


def _toml(tree: Mapping[str, Any], section: str = "") -> Iterable[str]:
    """The lines of `tree` as TOML. JSON's strings, numbers, booleans and arrays are TOML's too."""
    for key, value in tree.items():
        if value is not None and not isinstance(value, Mapping):
            yield f"{json.dumps(key, ensure_ascii=False)} = {json.dumps(value, ensure_ascii=False)}"
    for key, value in tree.items():
        if isinstance(value, Mapping):
            name = f"{section}{json.dumps(key, ensure_ascii=False)}"
            yield f"\n[{name}]"
            yield from _toml(value, f"{name}.")
