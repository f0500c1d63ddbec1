"""Real agents in processes of their own."""

import asyncio
import signal
import sysconfig
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
from simulators import brokers
from simulators.publisher import Publisher
from simulators.responder import DEVICE, FLEET

from hedgerow.config import environment

EXECUTABLE = str(Path(sysconfig.get_path("scripts"), "hedgerow-edge"))
START_S = 90.0
STOP_S = 15.0


class Agent:
    """The daemon over the state in `folder`; it may be started again and again. Its port is its own choice."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self.folder = folder
        self.state = folder / "state"
        self.settings: dict[str, Any] = {"server": {"port": 0}, "metrics": {"listen": "127.0.0.1:0"}, **settings}
        self.settings["device"] = {"state": str(self.state), **self.settings.get("device", {})}
        self.address = ""
        self._process: asyncio.subprocess.Process | None = None

    @property
    def process(self) -> asyncio.subprocess.Process:
        assert self._process is not None
        return self._process

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text()

    async def start(self, *, command: Sequence[str] = (), **variables: str) -> None:
        """Start it; `address` is where it serves, empty if it ended before."""
        self.folder.mkdir(parents=True, exist_ok=True)
        config = self.folder / "edge.toml"
        config.write_text(_toml(self.settings))
        with (self.folder / "log").open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *(command or (EXECUTABLE,)),
                *("--config", str(config)),
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
                env=environment(**variables),
            )
        assert self._process.stdout is not None
        async with asyncio.timeout(START_S):
            line = (await self._process.stdout.readline()).decode()
        self.address = line.removeprefix("serving OIP on ").strip()

    async def stop(self) -> int:
        """End it in good order; its exit code."""
        if self.process.returncode is None:
            self.process.send_signal(signal.SIGTERM)
        return await self.ended()

    async def kill(self) -> None:
        if self.process.returncode is None:
            self.process.kill()
        await self.ended()

    async def ended(self) -> int:
        async with asyncio.timeout(STOP_S):
            await self.process.communicate()  # reads to the end, so that the pipe is closed
        assert self.process.returncode is not None
        return self.process.returncode


def linked(publisher: Publisher, broker: brokers.Broker, **sections: Any) -> dict[str, Any]:
    """Settings of `DEVICE` in a fleet, with short times."""
    roots = {"release_root": publisher.releases.root, "director_root": publisher.director.root}
    for name, content in roots.items():
        (publisher.folder / name).write_bytes(content)
    updates = {"probation_s": 0.3, "probation_requests": 1000, "retry_s": 0.5, "poll_s": 30.0}
    return {
        "device": {"id": DEVICE, "fleet": FLEET, "profile": "cpu-generic"},
        "link": {"host": "127.0.0.1", "port": broker.port},
        "trust": {name: str(publisher.folder / name) for name in roots},
        "updates": {**updates, **sections.pop("updates", {})},
        **sections,
    }


@asynccontextmanager
async def running(agent: Agent) -> AsyncIterator[Agent]:
    await agent.start()
    try:
        yield agent
    finally:
        await agent.kill()


def _toml(tree: Mapping[str, Any], section: str = "") -> str:
    lines = [f"{key} = {msgspec.json.encode(value).decode()}" for key, value in tree.items() if not _table(value)]
    for key, value in tree.items():
        if _table(value):
            lines += [f"[{section}{key}]", _toml(value, f"{section}{key}.")]
    return "\n".join(lines)


def _table(value: Any) -> bool:
    return isinstance(value, Mapping)
