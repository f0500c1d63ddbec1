"""What the steps of the story share: the daemons, the fleet's view of the device, and claims that hold or do not."""

import asyncio
import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from hedgerow import release
from hedgerow.client import Client
from hedgerow.errors import DeadlineExceeded
from hedgerow.proto import fleet_pb2, link_pb2
from hedgerow_cloud.cli import console
from hedgerow_cloud.fleet.client import FleetClient
from hedgerow_cloud.learn import data
from hedgerow_cloud.learn.pipeline import MODEL
from hedgerow_cloud.local.linkshaper import read_counts
from hedgerow_cloud.local.stack import Stack
from hedgerow_cloud.publish import provision

DEVICE: Final = "here"
MEET_TIMEOUT_S = 60.0
MEET_POLL_S = 0.1

Done = Callable[[fleet_pb2.Device, link_pb2.ModelStatus], bool]


@dataclass(slots=True)
class Scene:
    """The stage of one telling."""

    stack: Stack
    fleet: FleetClient
    digits: data.Digits
    seed: int
    failed_claims: list[str] = field(default_factory=list)

    def claim(self, text: str, held: bool) -> None:
        """Say `text` and whether it held."""
        say(f"  {'ok ' if held else 'NOT'} {text}")
        if not held:
            self.failed_claims.append(text)

    def client(self, name: str = "edge") -> Client:
        """A client of one of the daemons."""
        return Client(self.stack.address(name))

    def cloud_bytes(self) -> int:
        """Bytes that went up the link to the cloud so far."""
        return asyncio.run(read_counts(self.stack.settings.ports.link_stats)).up_bytes

    def publish(self, folder: Path) -> None:
        """Sign the release in `folder` with the offline keys and upload it to the fleet service."""
        manifest = (folder / release.MANIFEST).read_bytes()
        targets = provision.sign(self.stack.keys, self.fleet.metadata("targets.json"), manifest)
        published = self.fleet.publish(folder, targets)
        say(f"  published {published.model}/{published.counter}: {console.size(published.bytes)}, signed offline")

    def meet(self) -> None:
        """Wait until the fleet has heard of the device; raises `DeadlineExceeded`."""
        until = time.monotonic() + MEET_TIMEOUT_S
        while not any(device.id == DEVICE and device.online for device in self.fleet.devices()):
            if time.monotonic() > until:
                raise DeadlineExceeded(f"the fleet has not heard of the device within {MEET_TIMEOUT_S:g} s")
            time.sleep(MEET_POLL_S)  # polls: a device that nobody has heard of cannot be watched

    def wait_for(self, done: Done, timeout_s: float) -> tuple[fleet_pb2.Device, link_pb2.ModelStatus]:
        """The device and its model's status as the fleet knows them, once `done`, or as they are when time is up."""
        device = self.fleet.device(DEVICE)
        with contextlib.suppress(DeadlineExceeded), contextlib.closing(self.fleet.watch(DEVICE, timeout_s)) as changes:
            for device in changes:
                if done(device, status_of(device)):
                    break
        return device, status_of(device)


def status_of(device: fleet_pb2.Device) -> link_pb2.ModelStatus:
    """What the device says of the story's model; empty if it has said nothing yet."""
    return next((model for model in device.models if model.model == MODEL), link_pb2.ModelStatus())


def say(line: str) -> None:
    """A line of the story."""
    print(line, flush=True)


def say_indented(line: str) -> None:
    """A line of a step."""
    say(f"  {line}")
