"""What somebody could do who has the fleet's disk and the broker, but not the offline keys."""

import asyncio
import shutil
from pathlib import Path

import msgspec

from hedgerow import release
from hedgerow.config import BrokerSettings
from hedgerow.link import Link, Topics
from hedgerow.proto.link_pb2 import Command
from hedgerow.release import Manifest
from hedgerow_cloud.demo.scene import DEVICE, Scene
from hedgerow_cloud.learn.pipeline import MODEL

REFUSAL_TIMEOUT_S = 60.0


def flip_a_byte(scene: Scene, good: Manifest, folder: Path) -> None:
    """Have the device take a properly signed release, the one in `folder` again, of which one byte is wrong."""
    counter = good.counter + 1
    copy = Path(shutil.copytree(folder, scene.stack.home / "learn" / "tampered", dirs_exist_ok=True))
    manifest = msgspec.structs.replace(good, counter=counter)
    (copy / release.MANIFEST).write_bytes(manifest.encode())
    scene.publish(copy)

    blob = scene.stack.home / "fleet" / "blobs" / manifest.file(manifest.variants[0].file).sha256
    whole = blob.read_bytes()
    blob.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    scene.fleet.assign(MODEL, counter, [DEVICE])
    _, status = scene.wait_for(lambda _, model: model.target == counter and bool(model.reason), REFUSAL_TIMEOUT_S)
    scene.claim(
        f"one flipped byte in {manifest.name} is refused: {status.reason or 'it was not'}",
        status.running == good.counter and "sha256" in status.reason,
    )
    scene.fleet.assign(MODEL, good.counter, [DEVICE])
    scene.wait_for(lambda _, model: not model.target, REFUSAL_TIMEOUT_S)
    blob.write_bytes(whole)  # not before, or the device would go on with what it has begun, and be right to


def copy_directions(scene: Scene) -> Path:
    """A copy of all that the director has signed for the device until now."""
    return Path(shutil.copytree(_directions(scene), scene.stack.home / "replay", dirs_exist_ok=True))


def replay(scene: Scene, old: Path) -> None:
    """Put directions back that were valid once, every signature intact, and tell the device to look."""
    current = shutil.copytree(_directions(scene), scene.stack.home / "current", dirs_exist_ok=True)
    shutil.copytree(old, _directions(scene), dirs_exist_ok=True)
    asyncio.run(_tell_to_check(scene))
    device, _ = scene.wait_for(lambda device, _: bool(device.trust), REFUSAL_TIMEOUT_S)
    shutil.copytree(current, _directions(scene), dirs_exist_ok=True)
    scene.claim(
        f"replayed directions to run release 1 are refused: {device.trust or 'they were not'}",
        "replayed" in device.trust,
    )


async def _tell_to_check(scene: Scene) -> None:
    """What anybody can do who may write to the broker."""
    settings = scene.stack.settings
    link = Link(BrokerSettings(port=settings.ports.broker), "intruder")
    command = Command(kind=Command.CHECK, serial=2**32)
    async with asyncio.TaskGroup() as group:
        running = group.create_task(link.run())
        await link.wait_connected()
        await link.publish(Topics(settings.fleet).command(DEVICE), command.SerializeToString())
        running.cancel()


def _directions(scene: Scene) -> Path:
    return scene.stack.home / "fleet" / "director" / "devices" / DEVICE
