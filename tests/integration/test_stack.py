"""Everything on one machine, with a broker of one's own in the embedded one's place."""

import asyncio
import time
from pathlib import Path

from simulators import brokers

from hedgerow.backend import Deadline
from hedgerow_cloud.fleet.client import FleetClient
from hedgerow_cloud.local.stack import Stack

WAIT_S = 30
POLL_S = 0.05


def bring_up(home: Path, broker: brokers.Broker) -> None:
    with Stack.provision(home, device="lamp") as stack:
        stack.meet_at(brokers.settings(broker))
        stack.start()
        assert stack.running() == ["fleet", "edge"]
        assert Stack(home).settings == stack.settings  # and so it stays

        deadline = Deadline.after(WAIT_S)
        with FleetClient(stack.address("fleet")) as fleet:
            while not any(device.online for device in fleet.devices()):
                deadline.check("the device was online")
                time.sleep(POLL_S)  # the fleet tells nobody of new devices
            assert [device.id for device in fleet.devices()] == ["lamp"]


async def test_device_and_fleet_meet_at_the_broker_that_is_named(broker: brokers.Broker, tmp_path: Path) -> None:
    await asyncio.to_thread(bring_up, tmp_path / "home", broker)
