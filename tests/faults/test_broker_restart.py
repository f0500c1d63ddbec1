"""A large release on its way to a device, and kill -9 of the device's agent and of the broker in the middle of it."""

import asyncio
import re
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import msgspec
import pytest
from simulators import models
from simulators.brokers import Broker
from simulators.fleet import until

from hedgerow import release
from hedgerow.client import AsyncClient
from hedgerow.config import BrokerSettings
from hedgerow.errors import DeadlineExceeded
from hedgerow.proto import fleet_pb2
from hedgerow.release import CHUNK_BYTES, Manifest, Variant
from hedgerow_cloud.fleet.client import FleetClient
from hedgerow_cloud.local.linkshaper import LinkShaper
from hedgerow_cloud.local.stack import Stack
from hedgerow_cloud.publish import provision

DEVICE = "here"
WEIGHTS_BYTES = 16 * 2**20
WINDOW_BYTES = 16 * CHUNK_BYTES
"""What the agent asks for at once."""
RTT_S = 0.08
"""Makes the transfer last: a window a round trip. Almost two seconds, on however fast a machine."""
WAIT_S = 60.0
Condition = Callable[[fleet_pb2.Device], bool]


class System:
    """Fleet service and agent as `hedgerow up` runs them; the device reaches the broker over a `wire`."""

    def __init__(self, folder: Path, broker: Broker, wire: LinkShaper) -> None:
        self.wire = wire
        self.broker = broker
        self.stack = Stack.provision(folder / "home", device=DEVICE)
        self.stack.settings = msgspec.structs.replace(
            self.stack.settings,
            ports=msgspec.structs.replace(self.stack.settings.ports, broker=broker.port),
            edge={"link": {"port": wire.port}, "updates": {"probation_s": 0.2, "retry_s": 0.5}},
        )
        self.fleet = FleetClient(self.stack.address("fleet"))
        self._folder = folder

    async def start(self, *names: str) -> None:
        await asyncio.to_thread(self.stack.start, *names)

    async def until(self, condition: Condition) -> fleet_pb2.Device:
        """The device as the fleet sees it, once it is as `condition` says."""

        def look() -> fleet_pb2.Device:
            seen = []
            try:
                for device in self.fleet.watch(DEVICE, WAIT_S):
                    seen.append(device)
                    if condition(device):
                        return device
            except DeadlineExceeded:
                pass
            raise AssertionError(f"it stayed so: {seen[-1:]}")

        return await asyncio.to_thread(look)

    async def carried(self, down_bytes: int) -> None:
        """Return once the wire has brought so much to the device."""
        async with asyncio.timeout(WAIT_S):
            while self.wire.counts.down_bytes < down_bytes:  # noqa: ASYNC110 (nobody tells)
                await asyncio.sleep(0.005)

    async def runs(self, counter: int) -> fleet_pb2.Device:
        """The device, once it has confirmed digits/`counter`."""
        return await self.until(
            lambda device: any(model.running == counter and model.phase == "idle" for model in device.models)
        )

    async def assign(self, counter: int, write: Callable[[Path], object]) -> int:
        """Publish digits/`counter` and give it to the device; the bytes of its file and its manifest."""
        folder = self._folder / f"release-{counter}"
        folder.mkdir()
        write(folder / "student.onnx")
        file = release.describe(folder, "student.onnx")
        variant = Variant(name="fp32", engine="onnxruntime", precision="fp32", file=file.path)
        manifest = Manifest(
            format=release.FORMAT, model="digits", counter=counter, created="", variants=(variant,), files=(file,)
        )
        (folder / release.MANIFEST).write_bytes(manifest.encode())

        def publish() -> None:
            targets = provision.sign(self.stack.keys, self.fleet.metadata("targets.json"), manifest.encode())
            self.fleet.publish(folder, targets)
            assert self.fleet.assign("digits", counter) == [DEVICE]

        await asyncio.to_thread(publish)
        return file.bytes + len(manifest.encode())

    async def answers_with(self, counter: int) -> None:
        async with AsyncClient(self.stack.address("edge")) as client:
            result = await client.infer("digits", models.pixels(3), timeout_s=WAIT_S)
        assert result.model_version == str(counter)
        assert result.outputs["logits"].argmax() == (3 + counter) % models.CLASSES


@pytest.fixture
async def system(broker: Broker, tmp_path: Path) -> AsyncIterator[System]:
    """A device that serves digits/1."""
    async with LinkShaper((BrokerSettings().host, broker.port), rtt_s=RTT_S) as wire:
        system = System(tmp_path, broker, wire)
        try:
            await system.start("fleet", "edge")
            await until(lambda: asyncio.to_thread(system.fleet.devices), WAIT_S)
            await system.assign(1, lambda path: models.classifier(path, shift=1))
            await system.runs(1)
            yield system
        finally:
            await asyncio.to_thread(system.stack.stop)
            system.fleet.close()


async def test_a_transfer_goes_on_after_the_agent_and_the_broker_were_killed_and_little_is_fetched_twice(
    system: System,
) -> None:
    fetched_before = (await system.runs(1)).bytes_fetched
    wire_before = system.wire.counts.down_bytes
    size = await system.assign(2, lambda path: models.heavy(path, weights_bytes=WEIGHTS_BYTES, shift=2))

    await system.carried(wire_before + size // 4)
    await asyncio.to_thread(system.stack.kill, "edge")
    counted = (await system.until(lambda device: not device.online)).bytes_fetched
    await system.start("edge")
    assert counted > fetched_before
    assert (await system.until(lambda device: device.online)).bytes_fetched >= counted
    await system.answers_with(1)

    await system.carried(wire_before + size * 6 // 10)
    await system.broker.kill()
    wire_at_kill = system.wire.counts.down_bytes
    await system.answers_with(1)
    await system.broker.start()
    device = await system.runs(2)
    await system.answers_with(2)

    (resumed,) = re.findall(r"student\.onnx: (\d+) of \d+ bytes are here already", system.stack.log("edge").read_text())
    assert 0 < int(resumed) < size // 2, "the agent was killed in the middle"
    assert system.wire.counts.down_bytes - wire_at_kill > WINDOW_BYTES, "and so was the broker"
    # The window in which the agent was killed may be here and not have been counted, and no more than that.
    assert -WINDOW_BYTES <= device.bytes_fetched - device.bytes_refetched - fetched_before - size <= 0
    assert device.bytes_refetched < 0.02 * size
    # And by what crossed the wire, whatever the device says: each kill costs at most the window that was in flight.
    assert system.wire.counts.down_bytes - wire_before < 1.02 * size + 2 * WINDOW_BYTES
