"""A real fleet service in this process, small releases for it, and a device made of the production parts."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

from hedgerow import release
from hedgerow.config import BrokerSettings
from hedgerow.errors import Unavailable
from hedgerow.link import Link, Topics
from hedgerow.proto.link_pb2 import Birth, Command
from hedgerow.release import Manifest, Variant
from hedgerow_cloud import daemons
from hedgerow_cloud.fleet.client import FleetClient
from hedgerow_cloud.local.broker import free_port
from hedgerow_cloud.publish import provision
from hedgerow_edge.exchange import Exchange
from hedgerow_edge.transfer import Transfer
from hedgerow_edge.trust import Trust


class Fleet:
    """A fleet in `folder`: its keys, its home, and the address of its service."""

    def __init__(self, folder: Path, broker_port: int) -> None:
        self.folder = folder
        self.keys = folder / "keys"
        self.home = folder / "fleet"
        self.target = f"127.0.0.1:{free_port()}"
        self.broker_port = broker_port
        self.extra = ""
        """More settings of the service, TOML."""
        self.client = FleetClient(self.target)
        provision.create(self.keys, self.home)

    def release(self, counter: int, contents: Mapping[str, bytes], model: str = "digits") -> Path:
        """The folder of a release made of `contents`, not signed yet."""
        folder = self.folder / "made" / f"{model}-{counter}-{len(list(self.folder.glob('made/*')))}"
        folder.mkdir(parents=True)
        for name, content in contents.items():
            (folder / name).write_bytes(content)
        files = tuple(release.describe(folder, name) for name in contents)
        variant = Variant(name="int8", engine="onnxruntime", precision="int8", file=files[0].path)
        manifest = Manifest(format=1, model=model, counter=counter, created="", variants=(variant,), files=files)
        (folder / release.MANIFEST).write_bytes(manifest.encode())
        return folder

    def sign(self, folder: Path) -> bytes:
        """The targets that list the release in `folder`, signed with the offline keys."""
        current = self.client.metadata("targets.json")
        return provision.sign(self.keys, current, (folder / release.MANIFEST).read_bytes())

    def publish(self, counter: int, content: bytes, model: str = "digits") -> None:
        """Sign and upload a release of one file; blocks."""
        folder = self.release(counter, {"student.onnx": content}, model)
        self.client.publish(folder, self.sign(folder))

    @asynccontextmanager
    async def running(self) -> AsyncIterator["Fleet"]:
        """The service, for the length of an ``async with``; may be entered again."""
        config = self.folder / "fleet.toml"
        port = self.target.rpartition(":")[2]
        config.write_text(
            f'home = "{self.home}"\n{self.extra}\n'
            f"[server]\nport = {port}\ndrain_s = 1.0\n"
            f"[broker]\nport = {self.broker_port}\n"
        )
        stop = asyncio.Event()
        async with asyncio.TaskGroup() as group:
            group.create_task(daemons.fleet(config, stop))
            await until(lambda: asyncio.to_thread(self.answers))
            try:
                yield self
            finally:
                stop.set()

    def answers(self) -> bool:
        """Whether the service takes calls."""
        try:
            self.client.releases()
        except Unavailable:
            return False
        return True


class Device:
    """A device's end of the link: what the agent is made of, without models."""

    def __init__(self, fleet: Fleet, device: str) -> None:
        self.id = device
        self.topics = Topics("default")
        self.link = Link(BrokerSettings(port=fleet.broker_port), device, reconnect_max_s=0.5)
        self.session = 1
        self.exchange = Exchange(self.link, self.topics, device, lambda: self.session)
        self.commands: asyncio.Queue[Command] = asyncio.Queue()
        self.link.subscribe(self.topics.command(device), self._take)
        self.floors: dict[str, int] = {}
        roots = [(fleet.keys / name).read_bytes() for name in (provision.RELEASE_ROOT, provision.DIRECTOR_ROOT)]
        self.trust = Trust(fleet.folder / device / "trust", device, self.exchange, self, *roots)
        self.transfer = Transfer(fleet.folder / device / "parts", self.exchange, chunk_timeout_s=2.0)

    def floor(self, name: str) -> int:
        """See `hedgerow_edge.trust.VersionFloor`."""
        return self.floors.get(name, 0)

    def raise_floor(self, versions: Mapping[str, int]) -> None:
        """See `hedgerow_edge.trust.VersionFloor`."""
        self.floors |= versions

    @asynccontextmanager
    async def running(self) -> AsyncIterator["Device"]:
        """Connected, and born."""
        async with asyncio.TaskGroup() as group:
            task = group.create_task(self.link.run())
            await self.link.wait_connected()
            birth = Birth(session=self.session, device="somebody else", profile="cpu")
            await self.link.publish(self.topics.birth(self.id), birth.SerializeToString(), retain=True)
            try:
                yield self
            finally:
                task.cancel()

    def _take(self, _topic: str, payload: bytes, _retained: bool) -> None:
        self.commands.put_nowait(Command.FromString(payload))


async def until(condition: Callable[[], Awaitable[object]], timeout_s: float = 10.0) -> None:
    """Return when `condition()` gives something true."""
    async with asyncio.timeout(timeout_s):
        while not await condition():  # noqa: ASYNC110 (what is waited for is in another process or thread)
            await asyncio.sleep(0.02)
