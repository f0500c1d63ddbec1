"""Real brokers for tests, each on a port of its own that stays over restarts: the embedded one and Mosquitto."""

import asyncio
import os
import shutil
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from subprocess import DEVNULL, Popen
from typing import Protocol

from hedgerow.config import BrokerSettings, variable
from hedgerow_cloud.local.broker import HOST, EmbeddedBroker, free_port

KINDS = ("embedded", "mosquitto")


class Broker(Protocol):
    port: int

    @property
    def pid(self) -> int | None: ...

    async def start(self) -> None: ...

    async def stop(self) -> None: ...

    async def kill(self) -> None: ...


class Mosquitto:
    """Mosquitto with a temporary configuration, as `EmbeddedBroker` is used."""

    def __init__(self, folder: Path, *options: str) -> None:
        self._folder = folder
        self._options = options
        self._process: Popen[bytes] | None = None
        self.port = free_port()

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    async def start(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        config = self._folder / "mosquitto.conf"
        config.write_text(
            f"listener {self.port} {HOST}\nallow_anonymous true\n"
            f"persistence true\npersistence_location {self._folder}/\nuser {_user()}\n" + "\n".join(self._options)
        )
        command = [_mosquitto(), "-c", str(config)]
        self._process = Popen(command, stdin=DEVNULL, stdout=DEVNULL, stderr=DEVNULL)  # noqa: ASYNC220  returns at once
        async with asyncio.timeout(10):
            while True:
                try:
                    _, writer = await asyncio.open_connection(HOST, self.port)
                except OSError:
                    assert self._process.poll() is None, "mosquitto ended"
                    await asyncio.sleep(0.02)
                else:
                    writer.close()
                    await writer.wait_closed()
                    return

    async def stop(self) -> None:
        await self._end(signal.SIGTERM)

    async def kill(self) -> None:
        await self._end(signal.SIGKILL)

    async def _end(self, number: int) -> None:
        if self._process is not None:
            self._process.send_signal(number)
            await asyncio.to_thread(self._process.wait, 10)
            self._process = None


def missing(kind: str) -> str:
    """Why a kind of broker cannot be had here; empty if it can. Where CI is set, everything must be there."""
    if kind == "mosquitto" and not _mosquitto() and not variable("CI"):
        return "mosquitto is not installed: half of the broker tests do not run"
    return ""


@asynccontextmanager
async def running(kind: str, folder: Path) -> AsyncIterator[Broker]:
    broker: Broker = EmbeddedBroker(folder) if kind == "embedded" else Mosquitto(folder)
    await broker.start()
    try:
        yield broker
    finally:
        if broker.pid is not None:
            os.kill(broker.pid, signal.SIGCONT)  # a test may have frozen it
        await broker.stop()


def settings(broker: Broker) -> BrokerSettings:
    return BrokerSettings(host=HOST, port=broker.port, keepalive_s=5)


def _mosquitto() -> str:
    return shutil.which("mosquitto", path=f"{variable('PATH')}:/usr/sbin:/usr/local/sbin") or ""


def _user() -> str:
    """Mosquitto started by root gives that up for the user "mosquitto", who may not write here."""
    return "root" if os.geteuid() == 0 else "nobody"
